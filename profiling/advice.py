"""The first thing to do about a step: of the part that is furthest above its floor, by rules with their reasons."""

from collections.abc import Callable
from typing import Any

from nanogpt_fast.hardware import cpu_multiplies
from nanogpt_fast.run import step_parts as parts
from nanogpt_fast.run.step_parts import Summary

ONE_OFF = (parts.EVALUATION, parts.CHECKPOINT)
NEAR = 0.85  # of its floor: nothing worth doing is left


def first_thing(summary: Summary, above: dict[str, float], of_floor: dict[str, float | None]) -> str:
    """A sentence or two. above: ms a step over each part's floor; of_floor: the share of it that is reached."""
    total = summary.traced_ms
    one_off = sum(summary.parts.get(part, 0.0) for part in ONE_OFF)
    if one_off > 0.5 * total:
        return (
            "trace other iterations: an evaluation or a checkpoint fills this window, which are no part of a step "
            "(--profile between two multiples of --eval_interval)."
        )
    candidates = {part: ms for part, ms in above.items() if part not in ONE_OFF}
    if not candidates:
        return "nothing: no part of a step was traced."
    if (waits := candidates.get(parts.DATA_WAIT, 0.0)) > 0.05 * total:
        return RULES[parts.DATA_WAIT](summary, waits, None)  # whatever else is slow: the device stands idle for it
    part = max(candidates, key=lambda name: candidates[name])
    if candidates[part] < 0.05 * total or (of_floor.get(part) or 0.0) > NEAR:
        return "nothing in this program: every part is near its floor. Another size, dtype or machine is what is left."
    return RULES[part](summary, candidates[part], of_floor.get(part))


def _saves(summary: Summary, ms: float) -> str:
    return f"{ms:.3g} of {summary.traced_ms:.4g} ms"


def _data(summary: Summary, ms: float, reached: float | None) -> str:
    return (
        f"feed the device: a step waits {_saves(summary, ms)} for its batch. Put the token files on a local disk or in "
        "the page cache, and see what the loader gives alone with bench/loader.py."
    )


def _more_work(facts: dict[str, Any]) -> str:
    """How to have fewer launches on the same tokens, or more tokens a launch."""
    batch, rounds = facts.get("batch_size", 1), facts.get("micro_steps", 1)
    if rounds > 1:
        return f"--batch_size={2 * batch} with half the --gradient_accumulation_steps trains on the same tokens"
    return f"--batch_size={2 * batch} spreads them over twice the tokens"


def _gaps(summary: Summary, ms: float, reached: float | None) -> str:
    facts, longest = summary.facts, summary.gaps.get("longest", [])
    where = f" (the longest gap is in {longest[0]['in']})" if longest else ""
    cure = _more_work(facts)
    if not facts.get("compile") and facts.get("kernels") in ("auto", "reference"):
        cure = f"--compile=True fuses most launches away; {cure}"
    return f"launch less: the GPU is idle for {_saves(summary, ms)}, waiting for Python to launch{where}. {cure}."


def _dispatch(summary: Summary, ms: float, reached: float | None) -> str:
    return (
        f"give each operator more to do: Python, autograd and torch's dispatcher take {_saves(summary, ms)}, however "
        f"small the tensors are. {_more_work(summary.facts)}."
    )


def _products(summary: Summary, ms: float, reached: float | None) -> str:
    facts = summary.facts
    shape, dtype, on_gpu = facts.get("shape", {}), facts.get("dtype"), summary.device == "cuda"
    at = f"the matrix products reach {reached:.0%} of the machine's rate" if reached else "matrix products dominate"
    if dtype == "float32" and (on_gpu or _native_bfloat16()):
        return f"{at}: --dtype=bfloat16 multiplies several times as fast here."
    odd = [f"{name} = {shape[name]}" for name in ("vocab_size", "n_embd") if on_gpu and shape.get(name, 0) % 64]
    if odd:
        return f"{at}: pad {' and '.join(odd)} to a multiple of 64, which tensor cores want (--vocab_size=50304)."
    if facts.get("batch_size", 0) * shape.get("block_size", 0) < (8192 if on_gpu else 512):
        return f"{at}: they are small. {_more_work(facts)}."
    if on_gpu:
        return f"{at}: time the step's own shapes (python bench/ops.py), then the fused forms: --kernels=triton."
    return f"{at} ({_saves(summary, ms)} above it): torch's products of these shapes; wider layers come nearer to it."


def _native_bfloat16() -> bool:
    import torch

    return bool(cpu_multiplies(torch.bfloat16))


def _memory_bound(summary: Summary, ms: float, reached: float | None, part: str) -> str:
    facts, on_gpu = summary.facts, summary.device == "cuda"
    why = f"{part} takes {_saves(summary, ms)} more than its bytes need"
    if on_gpu and facts.get("kernels") in ("auto", "reference"):
        also = "" if facts.get("compile") else ", or at least --compile=True"
        return f"fuse: {why}, each operator reading and writing memory anew. --kernels=triton fuses it{also}."
    if on_gpu:
        return f"tune: {why}. python bench/tune.py tries other launch rows of that kernel on this GPU."
    if facts.get("residual_dtype") == "float32" and facts.get("dtype") != "float32":
        return f"{why}: --residual_dtype=auto moves half the bytes."
    return f"{why}: these are torch's own CPU operators. What is left is fewer tokens at once, which stay in the cache."


def _attention(summary: Summary, ms: float, reached: float | None) -> str:
    facts = summary.facts
    if summary.device == "cuda" and facts.get("shape", {}).get("dropout"):
        return f"--dropout=0.0: attention takes {_saves(summary, ms)} above its floor, and masks cost it the fast path."
    return _memory_bound(summary, ms, reached, parts.ATTENTION)


def _copies(summary: Summary, ms: float, reached: float | None) -> str:
    names = [row["name"] for row in summary.top if row["part"] == parts.COPIES][:2]
    which = f" ({', '.join(names)})" if names else ""
    if summary.device == "cpu" and summary.facts.get("dtype") != "float32":
        return f"compare with --dtype=float32: casts and copies take {_saves(summary, ms)}{which}; is 16 bit worth it?"
    return (
        f"find who copies: casts and copies take {_saves(summary, ms)}{which}; the trace shows in which range they are."
    )


def _optimizer(summary: Summary, ms: float, reached: float | None) -> str:
    return (
        f"more tokens an update: AdamW, the norm and zeroing take {_saves(summary, ms)} above their floor however many "
        "tokens an iteration has; raise --gradient_accumulation_steps."
    )


def _communication(summary: Summary, ms: float, reached: float | None) -> str:
    return (
        f"all-reduce less often: {_saves(summary, ms)} of communication is hidden behind nothing. Twice the "
        "--gradient_accumulation_steps halves its share; see that NCCL uses NVLink (NCCL_DEBUG=INFO)."
    )


Rule = Callable[[Summary, float, float | None], str]
RULES: dict[str, Rule] = {
    parts.DATA_WAIT: _data,
    parts.GAPS: _gaps,
    parts.DISPATCH: _dispatch,
    parts.PRODUCTS: _products,
    parts.ATTENTION: _attention,
    parts.COPIES: _copies,
    parts.OPTIMIZER: _optimizer,
    parts.COMMUNICATION: _communication,
    **{
        part: (lambda summary, ms, reached, part=part: _memory_bound(summary, ms, reached, part))
        for part in (parts.GELU, parts.NORM, parts.LOSS, parts.EMBEDDING, parts.ELEMENTWISE)
    },
}
