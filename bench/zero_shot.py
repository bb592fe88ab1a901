"""lm-eval's requests answered by our model and by transformers' (its HFLM), in turn: ms a request, do they agree.

    python bench/zero_shot.py [--config gpt2_124m] [--kinds passages choices4 ...] [--device cpu] [--out DIR]

Needs the extra `eval`, accelerate and transformers. One model of random weights, in float32; each kind's requests are
ids drawn at random in the shape of a task's, so no data set is needed. Both arms are lm-eval's own TemplateLM and are
asked by its `_loglikelihood_tokens`. An arm whose log-likelihoods differ from the first's by 1e-3 or more is not timed.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import harness
import machine
import numpy as np
import torch
import turns
from step_timing import why

from nanogpt_fast.command import run_command
from nanogpt_fast.data.tokenizer import gpt2_tokenizer
from nanogpt_fast.restore import build_model, restore
from nanogpt_fast.settings import cli
from nanogpt_fast.weights import formats
from nanogpt_fast.weights.canonical import Weights

ARMS: tuple[str, ...] = ("transformers", "ours")
AGREE = 1e-3  # nats a request


class Kind(NamedTuple):
    """The shape of a task's requests, in tokens."""

    groups: int  # of one prefix each
    prefix: tuple[int, int]  # shortest and longest
    choices: int  # continuations of a prefix
    continuation: tuple[int, int]


KINDS = {
    "passages": Kind(32, (50, 120), 1, (1, 3)),  # LAMBADA
    "choices4": Kind(32, (20, 60), 4, (10, 40)),  # HellaSwag
    "choices10": Kind(3, (420, 560), 10, (5, 20)),  # the Children's Book Test
}


def requests_of(kind: Kind, vocab_size: int, block_size: int) -> list[tuple[tuple[str, str], list[int], list[int]]]:
    """As lm-eval's TemplateLM gives them to a model, seeded."""
    draw = np.random.default_rng(0)

    def ids(low: int, high: int) -> list[int]:
        return draw.integers(0, vocab_size, min(int(draw.integers(low, high + 1)), block_size // 2)).tolist()

    prefixes = [ids(*kind.prefix) for _ in range(kind.groups)]
    return [(("", ""), prefix, ids(*kind.continuation)) for prefix in prefixes for _ in range(kind.choices)]


def make_arm(name: str, folder: Path, device: str, batch_size: int) -> Any:
    """lm-eval's LM over the model in `folder`."""
    restored = restore(str(folder), "out", optimizer=False)
    if name == "ours":
        from nanogpt_fast.zeroshot.harness import adapter

        model = build_model(restored, torch.device(device), torch.float32)
        return adapter()(model, gpt2_tokenizer(), lambda done, of: None)
    import transformers
    from lm_eval.models.huggingface import HFLM

    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    torch.nn.Module.to(model, torch.device(device))
    tokenizer, length = transformers.AutoTokenizer.from_pretrained(folder), restored.config.block_size
    return HFLM(pretrained=model, tokenizer=tokenizer, device=device, batch_size=batch_size, max_length=length)


def serve(name: str, args: argparse.Namespace) -> None:
    def make() -> tuple[dict[str, Any], Callable[[], Any], Callable[[], dict[str, Any]]]:
        arm = make_arm(name, args.model, args.device, args.batch_size)
        shape = restore(str(args.model), "out", optimizer=False).config
        requests = requests_of(KINDS[args.kinds[0]], min(shape.vocab_size, 50257), shape.block_size)

        def call() -> list[tuple[float, bool]]:
            return arm._loglikelihood_tokens(requests, disable_tqdm=True)

        return {"found": [value for value, _ in call()]}, call, dict

    turns.serve(make, why)


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="gpt2_124m")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--n_layer", type=int, help="instead of the preset's: a smaller model, sooner")
    parser.add_argument("--batch_size", type=int, default=8, help="of lm-eval's HFLM; ours sets its own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="append to DIR/zero_shot.jsonl")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=ARMS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parsed(argv)
    if args.serve:
        serve(args.serve, args)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        args.model = write_model(args, Path(folder) / "hf")
        facts = machine.machine_facts(args.device) | {"config": args.config, "n_layer": args.n_layer}
        lines = machine.Lines(args.out and args.out / "zero_shot.jsonl", bench="zero_shot", dtype="float32", **facts)
        rows = [row for kind in args.kinds for row in timed(kind, args, argv, lines)]
    header = ["requests", "arm", "ms a request", "x transformers", "quartiles", "differ by"]
    print(machine.table(header, rows) if rows else "no arm ran")
    return 0 if rows else 1


def write_model(args: argparse.Namespace, folder: Path) -> Path:
    """A Hugging Face folder of the preset's shape, weights as training begins with."""
    from nanogpt_fast.model import GPT

    shape = cli.load_config([f"--config={args.config}", *([f"--n_layer={args.n_layer}"] if args.n_layer else [])])
    model = GPT(shape.shape(50257))
    model.init_weights(torch.Generator().manual_seed(0))
    return formats.write(Weights(model_args=model.config, model=dict(model.state_dict())), folder, "hf")


def timed(kind: str, args: argparse.Namespace, argv: list[str], lines: machine.Lines) -> list[list[Any]]:
    """Rows of a kind's arms, which take turns."""
    arms: dict[str, turns.Apart] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    differ = dict.fromkeys(ARMS, 0.0)
    try:
        for name in ARMS:
            command = [sys.executable, __file__, *argv, "--kinds", kind, "--model", str(args.model), "--serve", name]
            try:
                arms[name] = turns.Apart(command)
                found = [np.array(arm.facts["found"]) for arm in (arms[name], next(iter(arms.values())))]
                differ[name] = float(np.abs(found[0] - found[1]).max())
                if differ[name] >= AGREE:
                    raise turns.Failed(f"WRONG: log-likelihoods differ from {next(iter(arms))}'s by {differ[name]:.2g}")
            except turns.Failed as problem:
                if name in arms:
                    arms.pop(name).end()
                lines.write(kind=kind, arm=name, status=str(problem))
                print(f"{kind}, {name}: {problem}", flush=True)
        for turn in range(args.rounds):
            for name in turns.rotated(list(arms), turn):
                seconds[name] += arms[name].turn(1)["seconds"]
    finally:
        for arm in arms.values():
            arm.end()
    rows, first = [], next(iter(arms), "")
    for name in arms:
        count = KINDS[kind].groups * KINDS[kind].choices
        found = harness.summary([s * 1e3 / count for s in seconds[name]])
        against = harness.summary([a / b for a, b in zip(seconds[name], seconds[first])])
        figures = {"ms_request": found["ms"], "x_first": against["ms"], "x_first_q1": against["q1"], "first": first}
        figures |= {"x_first_q3": against["q3"], "differ": differ[name], "requests": count}
        lines.write(kind=kind, arm=name, status="ok", seconds=seconds[name], **figures)
        rows.append([kind, name, found["ms"], against["ms"], f"{against['q1']:.3f}-{against['q3']:.3f}",
                     f"{differ[name]:.1g}"])  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
