"""Fill docs/performance.md with its figures: every number there is made here, from results or from arithmetic.

    python bench/performance_page.py [--check] [--only NAME]

The page is written by hand but for its blocks, `<!-- figures: NAME ARGUMENTS -->` to `<!-- end -->`, made here:

  floor MODEL GPU       where the least time of a step goes (profiling/roofline.py)
  floors GPU ...        the least time of a step, and the MFU that it would be, by model and GPU
  forms MODEL           bytes a token that each fused form moves, and that the separate ops would
  results FILE TITLE    the tables of a section of bench/report.py, of a committed results file

--check changes nothing; exit code 1 where the page is not what this would write (a test runs it).
--only looks at blocks of that NAME.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import machine
import page
import page_blocks
from report_sections import Rows, every_section
from roofline import CHOICES, MODELS, compute_and_memory, step_work
from work import EXPONENTIALS_A_CLOCK, HALF, Work, add_norm_bytes, attention_bytes, gelu_bytes

from nanogpt_fast.command import run_command
from nanogpt_fast.errors import ConfigError, DataError
from nanogpt_fast.gpus import GPUS
from nanogpt_fast.hardware import flops_per_token

PAGE = machine.ROOT / "docs/performance.md"
BATCH, TOKENS = 64, 2**19  # sequences a micro-step, tokens a step
KINDS = {  # of a step's ops, by how their names begin
    "matrix products": ("qkv", "attention projection", "fc", "MLP projection", "head"),
    "attention": ("attention",),
    "cross-entropy in place": ("cross-entropy",),
    "residual and LayerNorm": ("residual",),
    "embedding": ("embedding",),
    "gradient norm, AdamW, zeroing": ("gradient norm",),
}


def _seconds(work: Work, gpu_name: str) -> tuple[float, float]:
    """(compute, memory) at the data sheet's rates."""
    gpu = GPUS[gpu_name]
    if gpu.flops_a_clock is None:
        raise ConfigError(f"gpus.py has no FLOPs a clock of {gpu_name}")
    exp_rate = gpu.tflops * 1e12 / gpu.flops_a_clock * EXPONENTIALS_A_CLOCK
    return compute_and_memory(work, gpu.tflops * 1e12, gpu.gbps * 1e9, exp_rate)


def _micro_steps(model: str) -> int:
    return TOKENS // (BATCH * MODELS[model].block_size)


def kind_of(op: str) -> str:
    return next(kind for kind, starts in KINDS.items() if op.startswith(starts))


def floor(model: str, gpu: str) -> str:
    """A row a kind of op."""
    name, found = CHOICES[gpu], {}
    for op, work in step_work(MODELS[model], BATCH, _micro_steps(model)).items():
        compute, memory = _seconds(work, name)
        row = found.setdefault(kind_of(op), [0.0, 0.0, 0.0, set()])
        row[0] += work.flops / 1e12
        row[1] += work.bytes / 1e9
        row[2] += max(compute, memory) * 1e3
        row[3].add("memory" if memory > compute else "compute")
    total = sum(row[2] for row in found.values())
    cells = [[kind, f"{flops:.1f}", f"{moved:.1f}", f"{ms:.1f}", f"{ms / total:.1%}", " and ".join(sorted(bound))]
             for kind, (flops, moved, ms, bound) in found.items()]  # fmt: skip
    head = f"GPT-2 {model} on {name}, {TOKENS:,} tokens, micro-batches of {BATCH}: {total:.1f} ms at least.\n\n"
    return head + page.markdown_table(["part of a step", "TFLOP", "GB", "floor ms", "share", "bound by"], cells)


def floors(*gpus: str) -> str:
    cells = []
    for model, config in MODELS.items():
        for gpu in gpus:
            name, works = CHOICES[gpu], step_work(config, BATCH, _micro_steps(model))
            seconds = sum(max(_seconds(work, name)) for work in works.values())
            flops, peak = flops_per_token(config), GPUS[name].tflops * 1e12
            mfu = [f"{flops[count] * TOKENS / seconds / peak:.1%}" for count in ("nanogpt", "llmc")]
            params = f"{config.num_params(non_embedding=False) / 1e6:.1f}M"
            cells.append(
                [f"GPT-2 {model}", params, name, f"{seconds * 1e3:.0f}", f"{TOKENS / seconds / 1e3:,.0f}K", *mfu]
            )
    header = ["model", "parameters", "GPU", "floor ms a step", "tokens/s", "MFU, nanoGPT's count", "MFU, llm.c's count"]
    return page.markdown_table(header, cells)


def forms(model: str) -> str:
    """Bytes a token and layer, forward and backward together, bfloat16."""
    C = MODELS[model].n_embd
    both = lambda count, *args: sum(count(1, *args, backward=b) for b in (False, True))
    c, F = HALF * C, 4 * C
    norms = 2 * both(add_norm_bytes, C)
    rows = [
        ("residual and LayerNorm in one op, twice", norms, norms + 2 * 3 * c,
         "r' is read again by LayerNorm, whose dr is written and read again"),
        ("GELU in its product's epilogue, both ways", 4 * HALF * F, 4 * HALF * F + both(gelu_bytes, F) - 2 * HALF * F,
         "pre is read again; dact is written and read again"),
        ("attention on packed q, k, v", both(attention_bytes, C), both(attention_bytes, C) + 8 * c,
         "o is copied into [T, H D]; dq, dk, dv are copied together"),
        ("bias gradients summed where dy is made", 0, 9 * c, "a pass over each dy: 3C, C, 4C and C wide"),
    ]  # fmt: skip
    cells = [[form, f"{ours:,}", f"{theirs:,}", f"{1 - ours / theirs:.0%}", what] for form, ours, theirs, what in rows]
    header = ["form", "bytes a token and layer", "as separate ops", "saved", "the separate ops"]
    return f"GPT-2 {model}, bfloat16, by arithmetic.\n\n" + page.markdown_table(header, cells)


def results(file: str, title: str) -> str:
    """The tables of every section of this title, with what the rows were measured on."""
    path = machine.ROOT / "bench/results" / file
    if not path.is_file():
        raise DataError("a results file is not there", where=str(path), hint="python bench/run.py leaves one")
    rows: Rows = {}
    for row in machine.read_lines(path):
        rows.setdefault(row.get("bench", ""), []).append(row)
    found = [section for section in every_section(rows, []) if section.title.startswith(title)]
    if not found:
        raise DataError(
            f"no section {title!r}", where=str(path), expected=", ".join(s.title for s in every_section(rows, []))
        )
    parts = [f"bench/results/{file}."]
    for section in found:
        parts += section.text
        for caption, header, cells in section.tables:
            shown = [["" if cell is None else cell for cell in row] for row in cells]
            parts += [f"*{caption}*", page.markdown_table([name or " " for name in header], shown).rstrip()]
    return "\n\n".join(parts) + "\n"


MAKERS: dict[str, Callable[..., str]] = {"floor": floor, "floors": floors, "forms": forms, "results": results}


def main(argv: list[str]) -> int:
    return page_blocks.main(argv, __doc__, PAGE, MAKERS, "bench/performance_page.py")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
