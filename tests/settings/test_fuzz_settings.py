"""Mutations of what a user may write: a configuration, a line of flags, a log to plot. Each gives a result or an error
of ours, soon, and in little memory."""

import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nanogpt_fast import plot
from nanogpt_fast.errors import NanogptError
from nanogpt_fast.settings import cli
from nanogpt_fast.settings.config import SECTION_OF

PYTHON = """# coding: utf-8
import time
per = 1e3 / 2
out_dir = 'out-' + str(3)
wandb_run_name = 'run' + str(time.time())
max_iters = int(per * 4)
learning_rate: float = 6e-4
min_lr = learning_rate / 10
batch_size = 5 * 8
decay_lr = True
dtype = "float32"
batch_ramp = ""
"""
TOML = """max_iters = 2_000
[run]
out_dir = "out-x"
eval_only = false
[data]
batch_size = 12
batch_ramp = "8:2000"
[optim]
learning_rate = 6e-4
min_lr = 6e-5
[system]
dtype = "float32"
"""
METRICS = """{"kind": "run", "start": 0}
{"kind": "eval", "iter": 0, "train_loss": 4.2, "val_loss": 4.1, "lr": 1e-3, "tokens": 0, "elapsed_s": 0.1}
{"kind": "train", "iter": 1, "loss": 3.5, "lr": 1e-3, "grad_norm": 1.5, "tokens_per_s": 1e3, "tokens": 10}
{"kind": "refused", "iter": 2, "loss": null, "grad_norm": null}
{"kind": "train", "iter": 3, "loss": null, "lr": 1e-3, "grad_norm": 1.5, "tokens_per_s": 1e3, "elapsed_s": 2}
"""
CONSOLE = """tokens per iteration will be: 40,960
step 0: train loss 4.2, val loss 4.1
iter 0: loss 4.1234, time 1500.25ms, mfu -100.00%
iter 1: loss nan, time 0.00ms, mfu 12.34%
"""
ARGV = ["--batch_size=12", "--config", "gpt2_124m", "--learning_rate", "3e-4", "--compile=False", "--no-eval_only",
        "quickstart", "--out_dir=~/x", "--dtype=float32", "--profile=1:3"]  # fmt: skip
WORDS = ["9" * 5000, "0x" + "f" * 4000, "1e999", "-1e999", "nan", "inf", "\0", "\ud800", "\u2028", "\x1b[2J", "~", "~/",
         "[" * 3000, "(" * 3000, "{" * 3000, "'''", '"""', "**9**9**9", "--", "-", "=", "==", ":", "None", "null", "-0",
         "true", "[run]", "[[run]]", "a.b.c", "lambda: 0", "x" * 300, "9223372036854775808", "1e308*10", "\\", "#", "é",
         "NaN", "Infinity", "# coding: rot13\n", "{}", "[]", "1e-320", *SECTION_OF]  # fmt: skip


def mutated(text: str, draw: random.Random) -> str:
    """One to four cuts, repeats, swaps and insertions."""
    for _ in range(draw.randint(1, 4)):
        a, b = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + draw.choice((0, 1, 5, 40)))
        middle = draw.choice(("", text[a:b] * draw.choice((2, 50)), draw.choice(WORDS), chr(draw.randrange(128))))
        text = text[:a] + middle + text[b:]
    return text


def try_config(text: str, folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    again = cli.to_toml(cli.load_config(["--config", str(path)]))
    (folder / "again.toml").write_text(again, encoding="utf-8")
    cli.load_config([str(folder / "again.toml")])


def try_argv(text: str, folder: Path, name: str) -> None:
    cli.load_config([word for word in text.split("\n") if word not in ("-h", "--help")])


def try_plot(text: str, folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    history = plot.read_history(path)
    for kind in ("train", "evals"):
        for y in ("loss", "val_loss", "lr", "grad_norm", "tokens_per_s"):
            for x in ("iter", "tokens", "elapsed_s"):
                history.column(kind, y, x)
    if len(text) % 16 == 0:  # drawing takes half a second
        plot.draw([history]).canvas.draw()


KINDS: dict[str, tuple[str, str, Callable[[str, Path, str], None]]] = {
    "x.py": (PYTHON, "x.py", try_config),
    "x.toml": (TOML, "x.toml", try_config),
    "argv": ("\n".join(ARGV), "", try_argv),
    "metrics.jsonl": (METRICS, "metrics.jsonl", try_plot),
    "console.log": (CONSOLE, "console.log", try_plot),
}


def fuzz(kind: str, count: int, folder: Path, seed: int) -> None:
    text, name, attempt = KINDS[kind]
    if attempt is try_plot:
        pytest.importorskip("matplotlib")
    outcomes = {True: 0, False: 0}
    for number in range(count):
        draw = random.Random(f"{kind} {seed} {number}")
        given, began = mutated(text, draw), time.monotonic()
        try:
            attempt(given, folder, name)
            outcomes[True] += 1
        except NanogptError as error:
            assert error.exit_code in (2, 3) and len(str(error)) < 5000
            outcomes[False] += 1
        except BaseException as error:
            raise AssertionError(f"{kind}, seed {seed}, number {number}: {given[:2000]!r}") from error
        assert time.monotonic() - began < 10.0, f"{kind}, seed {seed}, number {number} takes long"
    assert outcomes[True] and (outcomes[False] or kind == "console.log"), f"{outcomes}: one side is not reached"


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_mutations_give_a_result_or_an_error_of_ours(kind: str, tmp_path: Path):
    fuzz(kind, 40, tmp_path, 0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutations_give_a_result_or_an_error_of_ours(kind: str, tmp_path: Path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz(kind, 2000, tmp_path, 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
