"""What a step launches: bytes against the interpreter's count, FLOPs and launches in closed form, and the plan."""

import re
from collections import Counter
from contextlib import ExitStack

import byte_plan
import op_inputs
import pytest
import roofline
import step_launches
import torch
from byte_counter import counting_bytes
from nanogpt_kernels import launch
from nanogpt_kernels.ops.adamw import adamw_, grad_norm
from nanogpt_kernels.ops.linear_cross_entropy import linear_cross_entropy
from nanogpt_kernels.ops.mlp import bias_gelu
from nanogpt_kernels.ops.norm import add_norm, norm
from op_inputs import Setting, Shape
from step_launches import META, Launch, recorded, triton_launch

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.settings.cli import load_config

OPS = {f.__name__: f for f in (norm, add_norm, bias_gelu, linear_cross_entropy, adamw_, grad_norm)}
SHAPE = Shape(B=8, T=128, C=128, H=2, V=512, N=8 * 4096)
SHAPES = {"linear_cross_entropy": Shape(4, 8, 128, 2, 512, 0), "bias_gelu": Shape(8, 33, 64, 2, 0, 0)}
SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=128", "--block_size=256", "--batch_size=8", "--vocab_size=512",
         "--gradient_accumulation_steps=3", "--bias=False"]  # fmt: skip


def moved(op: str, device: torch.device) -> float:
    """Bytes of the op's Triton launches, forward and backward: by their operands on meta, else counted."""
    at = Setting(SHAPES.get(op, SHAPE), torch.bfloat16, device, main_grad=True)
    with ExitStack() as stack:
        for name in ("norm_fwd", "norm_bwd"):  # so many rows a program that its vectors do not count
            stack.enter_context(launch.override(name, blocks=dict(ROWS=64), choices=dict(programs_per_sm=1)))
        stack.enter_context(launch.override("bias_gelu_fwd", blocks=dict(BLOCK_M=64)))
        calls, counted = stack.enter_context(launch.recording(90)), stack.enter_context(counting_bytes())
        out = OPS[op](*getattr(op_inputs, op)(at))
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None and o.requires_grad]
        if outs:
            torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
    return float(sum(counted.values())) or sum(triton_launch(call).work.bytes for call in calls)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts")
@pytest.mark.parametrize("op", OPS)
def test_bytes_of_operands_are_those_that_the_interpreter_counts(op: str, monkeypatch: pytest.MonkeyPatch):
    """Up to what a cache serves: vectors that every program reads, the second read of a row of logits."""
    monkeypatch.setattr(launch, "sm_count", lambda device: 8)
    counted, ours = moved(op, torch.device("cpu")), moved(op, META)
    assert ours * (1.5 if op == "linear_cross_entropy" else 1.0) == pytest.approx(counted, rel=0.1)
    assert ours <= 1.01 * counted


def small(*flags: str, fused: bool = False) -> tuple[step_launches.Launches, Counter[Launch], roofline.GPTConfig]:
    config = load_config([*SMALL, *flags])
    shape = config.shape(512)
    found = recorded(config, shape, torch.bfloat16, 80, fused)  # whose rows leave GELU outside the products
    return found, found.step(config.data.gradient_accumulation_steps), shape


def test_flops_and_exponentials_are_step_work_s():
    _, step, shape = small()
    works = roofline.step_work(shape, 8, 3, deterministic=True).values()  # 7 products: the rows' form
    assert sum(one.work.flops * n for one, n in step.items()) == sum(w.flops for w in works) > 0
    assert sum(one.work.exps * n for one, n in step.items()) == sum(w.exps for w in works) > 0


def test_launches_by_hand():
    """Of 2 layers: a product and its two gradients for each of 4 weights and the head, whose rows fit one chunk; an op
    each way, attention two backward; three of the embedding's backward, two of the norm and the update."""
    found, step, _ = small()
    products = sum(n for one, n in found.micro_step.items() if one.kind == "product")
    assert products == 3 * (4 * 2 + 1)
    triton = Counter[str]()
    for one, n in found.micro_step.items():
        triton[one.name] += n * (one.kind == "Triton")
    assert {name: n for name, n in triton.items() if n} == {
        "norm_fwd": 5, "norm_bwd": 5, "column_sums": 5, "attention_fwd": 2, "attention_bwd_dq": 2,
        "attention_bwd_dkdv": 2, "bias_gelu_fwd": 2, "bias_gelu_bwd": 2, "cross_entropy": 1, "embedding_fwd": 1,
        "embedding_bwd": 1, "embedding_bwd_pieces": 1, "embedding_bwd_positions": 1,
    }  # fmt: skip
    once = Counter(one.name for one in found.once)  # each of them once
    assert once["grad_norm"] == once["adamw"] == once["zero_"] == 2  # the gradient and the loss
    assert sum(step.values()) == 3 * sum(found.micro_step.values()) + sum(found.once.values())


def test_bytes_by_hand():
    """Attention: q, k, v and o; both backward kernels read q, k, v and do. A weight's gradient: float32, in and out."""
    found, _, _ = small()
    of = {one.name: one.work.bytes for one in found.micro_step}
    c, row = 2 * 128 * 2048, 4 * 2 * 2048  # a [M, C] in bfloat16; lse or delta
    assert of["attention_fwd"] == 4 * c + row
    assert of["attention_bwd_dq"] == pytest.approx(6 * c + 2 * row)
    assert of["attention_bwd_dkdv"] == pytest.approx(6 * c + 2 * row)
    assert of["384 x 2048 x 128, added into float32"] == 4 * c + 2 * 4 * 384 * 128


def test_gelu_in_the_products_saves_its_passes():
    """12 rows of C a token and layer: pre read; dact written and read. Its products have the same FLOPs."""
    (plain, _, _), (fused, _, _) = small(), small(fused=True)
    totals = [[sum(getattr(one.work, what) * n for one, n in found.micro_step.items()) for what in ("bytes", "flops")]
              for found in (plain, fused)]  # fmt: skip
    assert totals[0][0] - totals[1][0] == 2 * 12 * 2 * 128 * 2048 and totals[0][1] == totals[1][1]
    assert not any("gelu" in one.name for one in fused.micro_step)


# ---- the plan ----


def test_the_plan_is_what_derives_it():
    shape = roofline.MODELS["124m"]
    for op, plan in byte_plan.PLAN.items():
        assert byte_plan.planned_bytes(op, shape, 2**19) / 1e9 == pytest.approx(plan.gb, abs=0.05), op
    assert sum(plan.gb for plan in byte_plan.PLAN.values()) == pytest.approx(1088.3, abs=0.15)


def shown(capsys: pytest.CaptureFixture, *argv: str) -> str:
    assert roofline.main(list(argv)) == 0
    return capsys.readouterr().out


FORMS = pytest.mark.parametrize("form", [[], ["--batch_size=64", "--gradient_accumulation_steps=8"]])


@FORMS
def test_a_step_of_gpt2_124m_moves_at_most_1_15_of_the_plan(form: list[str], capsys: pytest.CaptureFixture):
    text = shown(capsys, "--config", "gpt2_124m", "--gpu", "h100", *form)
    total = re.search(r"^total +([\d,.]+) +([\d,.]+) +([\d.]+)$", text, re.MULTILINE)
    assert total and float(total[3]) <= byte_plan.LIMIT == 1.15 and "within the limit of 1.15 of the plan" in text
    if form:
        assert total[2] == "1,088.3"
    cells = [
        re.split(r"\s{2,}", line) for line in text.splitlines() if line.startswith(("product:", "Triton:", "torch:"))
    ]
    whole = next(re.split(r"\s{2,}", line) for line in text.splitlines() if re.match(r"a step  ", line))
    for column, slack in ((1, 0), (2, 0), (4, 0.2)):  # launches of a micro-step, of a step, GB
        numbers = [float(row[column].replace(",", "")) for row in (*cells, whole)]
        assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=slack)


@FORMS
def test_it_does_on_every_gpu_that_the_table_is_of(form: list[str], capsys: pytest.CaptureFixture):
    """GELU beside the MLP's products moves 12 rows of C a token and layer more, which is over it."""
    gpus, ratios = ["h200", "a100", "a40", "rtx4090", "rtx5090"], []
    for gelu in ([], ["--gelu", "apart"]):
        text = shown(capsys, "--config", "gpt2_124m", "--gpu", *gpus, *gelu, *form)
        line = next(line for line in text.splitlines() if line.startswith("bytes / plan"))
        ratios.append([float(cell) for cell in line.split()[3:]])
    inside, apart = ratios
    assert len(inside) == 5 and max(inside) <= byte_plan.LIMIT < min(apart)


# ---- the command ----


def test_gpus_side_by_side(capsys: pytest.CaptureFixture):
    text = shown(capsys, "--config", "gpt2_124m", *SMALL, "--gpu", "h100", "h200", "a100", "rtx4090")
    rows = {line.split("  ")[0]: line.split()[-4:] for line in text.splitlines() if line.count("  ") > 2}
    assert rows["GPU"] == ["h100", "h200", "a100", "rtx4090"] and rows["rows"] == ["sm_90", "sm_90", "sm_80", "sm_89"]
    assert len(set(rows["TFLOP"])) == 1
    assert len(set(rows["launches"])) == 1
    floors = [float(cell) for cell in rows["floor ms"]]
    assert floors[1] < floors[0] < floors[2] < floors[3]  # H200: more bandwidth than H100
    assert "3 x 8 x 256 = 6,144 tokens" in text
    text = shown(capsys, "--gpu", "h100", "a100", "--model", "350m")
    assert re.search(r"^GPU +floor ms +K tokens/s +MFU nanogpt +MFU llmc\nh100 .*\na100 ", text, re.MULTILINE)


def test_what_it_refuses(capsys: pytest.CaptureFixture):
    with pytest.raises(ConfigError, match="--config does not go with --batch"):
        roofline.main(["--config", "gpt2_124m", "--batch", "8"])
    with pytest.raises(ConfigError, match="16-bit"):
        roofline.main(["--config", "gpt2_124m", "--dtype=float32"])
    with pytest.raises(ConfigError, match="did you mean"):
        roofline.main(["--config", "gpt2_125m"])
    for argv in (["--gelu", "inside"], ["--batch_size=8"]):
        with pytest.raises(SystemExit) as stop:
            roofline.main(argv)
        assert stop.value.code == 2 and "only with --config" in capsys.readouterr().err
