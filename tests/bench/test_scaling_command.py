"""roofline.py's --world: its table, what it refuses, the published rows beside it, docs/scaling.md."""

import re
import tomllib
from pathlib import Path

import pytest
from roofline import main as roofline
from scaling import Share
from scaling_published import ANCHORS, CURVES, MPT_SHAPES, curve_runs

from nanogpt_fast.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


# ---- published rows ----


def test_anchors_are_those_of_the_benchmarks_list():
    """bench/published.toml has their sources and caveats."""
    sources = tomllib.loads((ROOT / "bench/published.toml").read_text())["source"]
    known = {(s["name"], r["model"], r["gpu"][:4].lower(), r["tokens_per_s"]) for s in sources for r in s["rows"]
             if "tokens_per_s" in r}  # fmt: skip
    assert {(a.source, a.model, a.gpu[:4], a.tokens_per_s) for a in ANCHORS} <= known
    rows = {(a.source, a.model.split()[-1], a.gpu[:4]) for a in ANCHORS}
    for model, gpu in (("124M", "a100"), ("350M", "a100"), ("774M", "a100"), ("1558M", "h100")):
        assert ("llm.c", model, gpu) in rows
    assert {"llm.c, timed by modded-nanogpt", "MosaicML llm-foundry", "nanoGPT"} < {a.source for a in ANCHORS}


def test_mosaicml_s_models_have_as_many_parameters_as_its_table_says():
    counted = {"125m": 124525056, "350m": 354936832, "760m": 758897664, "1b": 1313853440}
    assert {name: shape.num_params(non_embedding=False) for name, shape in MPT_SHAPES.items()} == counted


def test_a_fitted_run_has_the_published_speed():
    for curve, fitted in curve_runs():
        first = min(curve.speeds)
        speed = fitted.row(first, Share(curve.batch, 1)).speed / first
        assert speed == pytest.approx(curve.speeds[first], rel=1e-6)
    assert sum(len(curve.speeds) - 1 for curve in CURVES) == 13


# ---- the command ----


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    roofline(["--config", "gpt2_124m", *words])
    return capsys.readouterr().out


def test_the_table_of_the_command(capsys: pytest.CaptureFixture[str]):
    out = shown(capsys, "--world", "8", "1", "64", "16", "--budget", "1e10", "--mfu", "0.5")
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    header = next(line for line in lines if line[0] == "GPUs")
    assert header[-1] == "binds" and {"hidden", "bare", "MFU", "GiB a rank", "kWh"} < set(header)
    rows = [dict(zip(header, line)) for line in lines if len(line) == len(header) and line[0].isdigit()]
    assert [row["GPUs"] for row in rows] == ["1", "8", "16", "1", "8", "16", "64"]  # 64 divides the weak batch alone
    one, eight = rows[:2]
    assert one["MFU"] == "50.0%" and one["efficiency"] == "100.0%" and one["bare"] == "0.00"
    assert float(one["hours"]) == pytest.approx(1e10 / float(one["K tokens/s"]) / 3.6e6, rel=0.01)
    assert float(eight["step ms"]) < float(one["step ms"]) / 7
    assert "supposed: an MFU of 50.0%" in out and "700 W a GPU" in out and "10,000,000,000 tokens" in out
    assert "16 GPUs by --batch_size=10 --gradient_accumulation_steps=48" in out
    assert "480 sequences an iteration do not divide by 64 ranks: 60 or 80 ranks" in out


def test_what_other_flags_change(capsys: pytest.CaptureFixture[str]):
    out = shown(capsys, "--world", "8", "--scaling", "weak", "--parallel", "zero1", "--reduce_dtype", "bfloat16",
                "--link", "nvlink", "--gpu", "a100", "--bucket_mb", "60", "--mfu", "floor")  # fmt: skip
    assert "strong scaling" not in out and "zero1, bfloat16 gradients in 4 buckets" in out
    assert "one node of 8 GPUs by NVLink, 240 GB/s" in out and "a bound, not an expectation" in out
    carried = shown(capsys, "--world", "8", "--scaling", "weak", "--gpu", "a100")
    assert "supposed of NVIDIA A100-SXM4-80GB, which has not been timed" in carried


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--world", "0"], r"no number of GPUs[\s\S]*--world 0[\s\S]*from 1"),
        (["--world", "8", "eight"], r"no number of GPUs[\s\S]*--world eight"),
        (["--world", "8", "--link", "token-ring"], r"unknown link 'token-ring'[\s\S]*nvlink, ib, ethernet"),
        (["--world", "16", "--link", "nvlink"], r"NVLink joins 8 of NVIDIA H100[\s\S]*--link=ib"),
        (["--world", "64", "--scaling", "strong"], r"480 sequences[\s\S]*60 or 80 ranks"),
        (["--world", "8", "--mfu", "fast"], r"no MFU[\s\S]*--mfu=fast"),
        (["--world", "8", "--mfu", "1.2"], r"no step is so fast"),
        (["--world", "8", "--overhead", "0"], r"out of range[\s\S]*--overhead=0"),
        (["--world", "8", "--dtype=float32"], r"16-bit"),
    ],
)
def test_what_it_refuses(words: list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        roofline(["--config", "gpt2_124m", *words])


@pytest.mark.parametrize(
    "words", [["--world", "8"], ["--config", "gpt2_124m", "--link", "ib"],
              ["--config", "gpt2_124m", "--world", "8", "--compiled"]]
)  # fmt: skip
def test_flags_that_do_not_go_together(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        roofline(words)
    assert re.search("only with --(config|world)|takes no --gelu", capsys.readouterr().err)


def test_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    path = tmp_path / "scaling.png"
    shown(capsys, "--world", "1", "8", "32", "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_the_page_is_what_the_command_says(capsys: pytest.CaptureFixture[str]):
    import scaling_page

    assert scaling_page.main(["--check"]) == 0, capsys.readouterr().out
