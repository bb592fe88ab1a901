"""Fill docs/scaling_laws.md with its figures, and draw docs/scaling_laws.png.

    python profiling/scaling_laws_page.py [--check] [--only NAME]

The page is written by hand but for its blocks, `<!-- figures: NAME ARGUMENTS -->` to `<!-- end -->`, made here from the
counters that training uses (settings/config.py, hardware.py, memory.py) and from scaling_laws.py:

  parameters, flops, bytes     GPT-2's sizes, by part
  six_nd                       how far 6 N D is from a step's own FLOPs
  days                         the notebook's estimate of nanoGPT's own run
  notebook, tokens_for, large  Chinchilla's answers, by each set of constants
  wrong                        what a wrong size costs
  parabola, counting           two things that move an exponent
  error                        what the published standard errors come to, taken one by one
  gpt2                         what the law says of GPT-2's sizes
  runs                         published runs beside it
  plan ARGUMENTS               what `python -m nanogpt_fast.plan ARGUMENTS` prints

--check changes nothing; exit code 1 where the page is not what this would write; the picture is not looked at.
"""

import io
import os
import shlex
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from math import log, prod
from pathlib import Path

import memory_page
import numpy as np
import page_blocks
from memory_page import MODELS, table

from nanogpt_fast import plan as plan_command
from nanogpt_fast.command import run_command
from nanogpt_fast.hardware import flops_per_token
from nanogpt_fast.published_runs import FINEWEB, OWT, RUNS, UNIQUE, expected, published
from nanogpt_fast.run_plan import MEASURED_MFU, SHAPES, machine
from nanogpt_fast.scaling_fit import parabola
from nanogpt_fast.scaling_laws import (
    C4,
    LAWS,
    REFIT,
    ROUNDED,
    ROWS,
    TABLE_A3,
    UNROUNDED,
    along,
    effective_tokens,
    on_a_grid,
)
from nanogpt_fast.settings.config import GPTConfig

PAGE = Path(__file__).resolve().parent.parent / "docs/scaling_laws.md"
SCRIPT = "profiling/scaling_laws_page.py"
PARTS = {  # {part: what its parameters' names hold}
    "token embedding and head": ("wte",),
    "position embedding": ("wpe",),
    "attention: q, k, v": ("c_attn",),
    "attention: projection": ("attn.c_proj",),
    "MLP: up": ("c_fc",),
    "MLP: down": ("mlp.c_proj",),
    "LayerNorms": ("ln_",),
}
BUDGET = TABLE_A3[1]
LARGE = 5.88e23  # Chinchilla's own: 6 x 70e9 parameters x 1.4e12 tokens


# ---- sizing ----


def by_part(shape: GPTConfig) -> dict[str, int]:
    """{part: parameters}; each is in one of PARTS."""
    found = dict.fromkeys(PARTS, 0)
    for name, sizes in shape.parameter_shapes().items():
        (part,) = [part for part, words in PARTS.items() if any(word in name for word in words)]
        found[part] += prod(sizes)
    return found


def flops_by_part(shape: GPTConfig) -> dict[str, float]:
    """{part: FLOPs a token, forward and backward}: six a parameter, but for positions, which are looked up; the scores
    and the sum of values are 12 L C T of no parameter."""
    found = {part: 6.0 * count for part, count in by_part(shape).items() if part != "position embedding"}
    return {**found, "attention: scores, values": 12.0 * shape.n_layer * shape.n_embd * shape.block_size}


def parameters() -> str:
    parts = {name: by_part(shape) for name, shape in MODELS.items()}
    rows = [[part, *(f"{parts[name][part]:,}" for name in MODELS)] for part in PARTS]
    totals = {"all": False, "without positions: nanoGPT's N": True}
    for title, flag in totals.items():
        rows.append([f"**{title}**", *(f"{shape.num_params(non_embedding=flag):,}" for shape in MODELS.values())])
    share = [f"{parts[name]['token embedding and head'] / sum(parts[name].values()):.0%}" for name in MODELS]
    rows.append(["the token embedding's share", *share])
    return table(["parameters", *(f"GPT-2 {name}" for name in MODELS)], rows)


def flops() -> str:
    parts = {name: flops_by_part(shape) for name, shape in MODELS.items()}
    totals = {name: flops_per_token(shape)["nanogpt"] for name, shape in MODELS.items()}
    rows = []
    for part in next(iter(parts.values())):
        rows.append([part, *(f"{of[part] / 1e9:.3f} ({of[part] / totals[name]:.1%})" for name, of in parts.items())])
    rows.append(["**all: nanoGPT's count**", *(f"{total / 1e9:.3f}" for total in totals.values())])
    causal = [f"{flops_per_token(shape)['llmc'] / 1e9:.3f}" for shape in MODELS.values()]
    rows.append(["llm.c's count: half the scores, positions too", *causal])
    return table(["GFLOP a token", *(f"GPT-2 {name}" for name in MODELS)], rows)


def state_bytes(shape: GPTConfig) -> int:
    """What a GPU holds of a model in bfloat16, before activations."""
    held = memory_page.parts(memory_page.plan(shape))
    return sum(held[part] for part in ("parameters", "gradients", "optimizer"))


def bytes_held() -> str:
    rows = []
    for name, shape in MODELS.items():
        count, state = shape.num_params(non_embedding=False), state_bytes(shape)
        rows.append([f"GPT-2 {name}", f"{12 * count / 1e9:.2f}", f"{state / 2**30:.2f}", f"{state / count:.1f}",
                     f"{sum(memory_page.parts(memory_page.plan(shape)).values()) / 2**30:.2f}"])  # fmt: skip
    return table(
        ["", "checkpoint, GB", "state on the GPU, GiB", "bytes a parameter", "a step of one sequence, GiB"], rows
    )


def six_nd() -> str:
    rows = []
    for shape in (*(SHAPES[heads - 1] for heads in (2, 4, 8)), *MODELS.values()):
        count, cost = shape.num_params(non_embedding=False), flops_per_token(shape)
        inside = count - (shape.vocab_size + shape.block_size) * shape.n_embd
        rows.append([f"{shape.n_layer} x {shape.n_embd}", f"{count / 1e6:.1f}M", f"{cost['nanogpt'] / 1e9:.3f}",
                     *(f"{6 * n / cost['nanogpt'] - 1:+.0%}" for n in (count, inside)),
                     f"{cost['llmc'] / cost['nanogpt'] - 1:+.0%}"])  # fmt: skip
    header = ["layers x width", "N", "GFLOP a token", "6 N D, all N", "6 N D, N without embeddings", "llm.c's count"]
    return table(header, rows)


def days() -> str:
    """nanoGPT's 124M over 300B tokens, 8 A100 at 30%."""
    shape, rate = MODELS["124m"], 8 * 312e12 * 0.3
    counts = {"6 N D": 6.0 * shape.num_params(non_embedding=False), "its own": flops_per_token(shape)["nanogpt"]}
    rows = [[name, f"{of / 1e9:.3f}", f"{300e9 * of / rate / 86400:.2f}"] for name, of in counts.items()]
    return table(["count", "GFLOP a token", "days"], rows)


# ---- Chinchilla ----


def answer(name: str, params: float, tokens: float, a: str = "") -> list[str]:
    return [name, f"{params / 1e6:,.0f}M", f"{tokens / 1e9:,.2f}B", f"{tokens / params:.1f}", a]


def notebook() -> str:
    rows = [
        answer("the notebook: constants as printed, a grid of 16 sizes a decade", *on_a_grid(ROUNDED, BUDGET, 16)),
        answer("the same, 1,024 sizes a decade", *on_a_grid(ROUNDED, BUDGET, 1024)),
    ]
    rows += [answer(f"closed form: {law.name}", *law.optimum(BUDGET), f"{law.exponent:.3f}") for law in LAWS]
    for name, of in ROWS.items():
        params, tokens, a = along(of, BUDGET)
        rows.append(answer(f"{name}: a line through its rows", params, tokens, f"{a:.3f}"))
    rows.append(answer("**the paper, table A3**", TABLE_A3[0], TABLE_A3[2]))
    return table(["2.21e19 FLOPs", "N", "D", "D / N", "a of N ~ C^a"], rows)


def tokens_for() -> str:
    rows = [[law.name, *(f"{law.tokens_for(n) / 1e9:.2f}B" for n in (400e6, 124e6))] for law in LAWS]
    for name, of in ROWS.items():
        n, d = np.log(np.array(of)).T
        slope, at_zero = np.polyfit(n, d, 1)
        rows.append([name, *(f"{np.exp(at_zero + slope * log(size)) / 1e9:.2f}B" for size in (400e6, 124e6))])
    return table(["best D by", "of 400M", "of 124M"], rows)


def large() -> str:
    rows = [answer(law.name, *law.optimum(LARGE)) for law in LAWS]
    rows += [answer(name, *along(of, LARGE)[:2]) for name, of in ROWS.items()]
    rows.append(answer("**what they trained**", 70e9, 1.4e12))
    return table(["5.88e23 FLOPs", "N", "D", "D / N"], [row[:4] for row in rows])


def wrong() -> str:
    best = REFIT.loss(*REFIT.optimum(BUDGET))
    rows = []
    for factor in (1 / 4, 1 / 2, 0.8, 1.0, 1.25, 2.0, 4.0):
        params = REFIT.optimum(BUDGET)[0] * factor
        loss = REFIT.loss(params, BUDGET / 6 / params)
        reached = 6 * params * REFIT.tokens_to_reach(params, best) / BUDGET
        rows.append([f"{factor:g}", f"{params / 1e6:.0f}M", f"{loss - best:+.4f}", f"{reached:.2f}"])
    return table(["of the best size", "N", "loss", "FLOPs for the best size's loss, times"], rows)


def sizes_around(law_best: float, reach: float, lean: float = 1.0) -> np.ndarray:
    return law_best * lean * np.geomspace(1 / reach, reach, 7)


def parabolas() -> str:
    """By how much approach 2 misses the best size of a law without any noise; no budget changes it."""
    rows = []
    for reach, lean in ((2.0, 1.0), (4.0, 1.0), (8.0, 1.0), (4.0, 0.5), (4.0, 2.0)):
        cells = []
        for law in (REFIT, UNROUNDED):
            best = law.optimum(BUDGET)[0]
            params = sizes_around(best, reach, lean)
            found, _ = parabola(params.tolist(), law.loss(params, BUDGET / 6 / params).tolist())
            cells.append(f"{found / best - 1:+.1%}")
        rows.append([f"1/{reach:g} to {reach:g}, around {'' if lean == 1 else f'{lean:g} of '}the best", *cells])
    return table(["7 sizes", REFIT.name, UNROUNDED.name], rows)


def counting() -> str:
    """The exponent along the refit's optimum, counted with embeddings and without."""
    rows = []
    for heads in (3, 6, 12, 16, 25, 40):
        slopes = []
        for inside in (False, True):
            near = [SHAPES[h - 1] for h in (heads - 1, heads)]
            counts = [shape.num_params(non_embedding=False) for shape in near]
            shown = [n - inside * (s.vocab_size + s.block_size) * s.n_embd for n, s in zip(counts, near)]
            cost = [n * REFIT.tokens_for(count) for n, count in zip(shown, counts)]
            slopes.append(log(shown[1] / shown[0]) / log(cost[1] / cost[0]))
        rows.append([f"{SHAPES[heads - 1].num_params(non_embedding=False) / 1e6:,.0f}M", *(f"{a:.2f}" for a in slopes)])
    return table(["around N of", "a, N with embeddings", "a, N without"], rows)


def error() -> str:
    """Each published standard error of the refit, alone, in nats at 124M and 10B tokens."""
    params, tokens, rows = 124e6, 10e9, []
    for name, own in zip(("E", "A", "B", "alpha", "beta"), REFIT.errors):
        moved = replace(REFIT, **{name: getattr(REFIT, name) + own}).loss(params, tokens) - REFIT.loss(params, tokens)
        rows.append([name, f"{getattr(REFIT, name):g}", f"{own:g}", f"{moved:+.2f}"])
    return table(["constant", "value", "standard error", "moves L(124M, 10B) by"], rows)


# ---- GPT-2 ----


def gpt2() -> str:
    at, rows = machine("NVIDIA H100 80GB HBM3", 8, 0.0), []
    for name, shape in MODELS.items():
        count, cost = shape.num_params(non_embedding=False), flops_per_token(shape)["nanogpt"]
        best = REFIT.tokens_for(count)
        others = [law.tokens_for(count) / 1e9 for law in (UNROUNDED, C4)]
        losses = []
        for data in (OWT, FINEWEB):
            found = expected(count, effective_tokens(best, UNIQUE.get(data)), data)
            losses.append(f"{found.loss:.2f} ({found.low:.2f} to {found.high:.2f})")
        rows.append([f"GPT-2 {name}", f"{best / 1e9:.1f}B", f"{min(others):.1f}B to {max(others):.1f}B",
                     f"{best / count:.0f}", f"{best * cost:.2g}", f"{best * cost / at.rate / 3600:.2g}",
                     *losses])  # fmt: skip
    header = ["", "best D", "by other laws", "D / N", "FLOPs", "hours, 8 H100", "loss, OpenWebText", "loss, FineWeb"]
    return table(header, rows)


def runs() -> str:
    header, rows = published(MEASURED_MFU)
    lines = [f"- {run.name}: loss {run.loss_source}; time {run.hours_source}" for run in RUNS]
    return table(header, rows) + "\n" + "\n".join(lines) + "\n"


def plan(*words: str) -> str:
    """The command's own output, where there are no datasets."""
    shown, here = io.StringIO(), os.getcwd()
    with tempfile.TemporaryDirectory() as nowhere:
        os.chdir(nowhere)
        try:
            with redirect_stdout(shown):
                plan_command.main(list(words))
        finally:
            os.chdir(here)
    return f"    $ python -m nanogpt_fast.plan {shlex.join(words)}\n\n```text\n{shown.getvalue().strip()}\n```\n"


MAKERS: dict[str, Callable[..., str]] = {
    "parameters": parameters, "flops": flops, "bytes": bytes_held, "six_nd": six_nd, "days": days, "notebook": notebook,
    "tokens_for": tokens_for, "large": large, "wrong": wrong, "parabola": parabolas, "counting": counting, "error":
    error, "gpt2": gpt2, "runs": runs, "plan": plan,
}  # fmt: skip


def main(argv: list[str]) -> int:
    code = page_blocks.main(argv, __doc__, PAGE, MAKERS, SCRIPT)
    if not {"--check", "--only"}.intersection(argv):
        from scaling_laws_plot import draw  # which needs matplotlib

        PAGE.with_suffix(".png").write_bytes(draw(BUDGET))
    return code


if __name__ == "__main__":
    run_command(main)
