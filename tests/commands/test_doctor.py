"""doctor.py: the report's fields, its privacy, the smoke run, what it calls a problem."""

import json
import socket
import sys
from pathlib import Path

import pytest
import torch

from nanogpt_fast import doctor, examination
from nanogpt_fast.errors import DeviceError
from nanogpt_fast.privacy import private
from nanogpt_fast.settings.examining import DoctorConfig

QUICK = DoctorConfig(device="cpu", dtype="float32", smoke=False)


@pytest.fixture
def short_smoke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "SMOKE_STEPS", 15)


def test_the_json_report_has_every_section(short_smoke: None, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    code = doctor.main(["--json", "--device=cpu", "--dtype=float32", f"--data_dir={tmp_path}"])
    report = json.loads(capsys.readouterr().out)
    assert code == 0 and report["problems"] == []
    assert list(report) == ["versions", "extras", "cpu", "gpus", "caches", "data", "problems", "smoke"]
    assert report["versions"]["torch"] == torch.__version__
    assert set(examination.REQUIRED) < set(report["versions"]) and set(examination.EXTRAS) < set(report["extras"])
    assert report["cpu"]["threads of torch"] == torch.get_num_threads()
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert report["smoke"]["device"] == "cpu, float32"
    assert "ms a step" in report["smoke"]["speed"] and "tokens/s" in report["smoke"]["speed"]


def test_the_text_report_aligns_and_ends_with_the_verdict(capsys: pytest.CaptureFixture[str]):
    assert doctor.main(["--smoke=False", "--device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "versions" and lines[-1] == "no problems found"
    start = lines.index("caches")
    assert len({line.index(line.split()[1]) for line in lines[start + 1 : start + 5]}) == 1


def test_nothing_private_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    home = tmp_path / "home" / "alice"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "alice")
    monkeypatch.setattr(socket, "gethostname", lambda: "wonderland")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/scratch/alice/triton")
    monkeypatch.setenv("HF_HOME", "/mnt/wonderland/hf")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(home / "bpe"))
    doctor.main(["--smoke=False", "--device=cpu", f"--data_dir={home}"])
    text = capsys.readouterr().out
    assert "alice" not in text and "wonderland" not in text
    for shown in ("/scratch/$USER/triton", "/mnt/$HOST/hf", "torchinductor_$USER", "~/bpe"):
        assert shown in text


def test_privacy_leaves_words_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nanogpt_fast.privacy.user_name", lambda: "data")
    assert private({"data": ["data/shakespeare", "/home/data/x"]}) == {"data": ["data/shakespeare", "/home/$USER/x"]}


def test_the_smoke_run_learns(short_smoke: None):
    found = examination.smoke(QUICK)
    first, last = map(float, found["loss"].split(" in ")[0].split(" -> "))
    assert first == pytest.approx(5.55, abs=0.2), "ln 256 at the start"
    assert last < first - examination.SMOKE_FALL


def test_a_model_that_does_not_learn_is_a_problem(monkeypatch: pytest.MonkeyPatch, short_smoke: None):
    monkeypatch.setattr(examination.AdamW, "step", lambda *_: torch.zeros(()))
    with pytest.raises(DeviceError, match="did not learn"):
        examination.smoke(QUICK)
    assert doctor.main(["--device=cpu", "--dtype=float32"]) == 5


def test_an_absent_device_is_a_problem(capsys: pytest.CaptureFixture[str]):
    assert doctor.main(["--device=cuda:99"]) == 5
    assert "PROBLEM: the smoke run failed: there is no device 'cuda:99'" in capsys.readouterr().out


def test_a_driver_without_a_gpu_in_torch_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(examination, "_driver", lambda: "575.57.08")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert examination.examine(QUICK)["problems"] == [
        f"an NVIDIA driver (575.57.08) is here, but torch {torch.__version__} sees no GPU: it is the CPU build"
    ]


@pytest.mark.parametrize(
    "modules, verdict",
    [([], "missing"), (["apex"], "not NVIDIA's but PyPI's"), (["apex", "apex/optimizers"], "NVIDIA's, built without"),
     (["apex", "apex/optimizers", "amp_C"], "NVIDIA's, version")],
)  # fmt: skip
def test_apex_of_pypi_is_told_from_nvidias(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, modules: list[str], verdict: str
):
    for name in modules:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("apex", None)
    assert examination.apex().startswith(verdict)
    found = [p for p in examination.examine(QUICK)["problems"] if p.startswith("apex is not NVIDIA's")]
    assert bool(found) == (modules == ["apex"])
    sys.modules.pop("apex", None)  # finding its submodule imported it


def test_cache_folders(tmp_path: Path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.cubin").write_bytes(b"x" * 2_500_000)
    assert examination._folder(tmp_path) == f"{tmp_path}, 2.5 MB in 1 files, writable"
    assert examination._folder(tmp_path / "x" / "y") == f"{tmp_path / 'x' / 'y'}, not there yet, writable"
    assert examination._folder(tmp_path / "kernels" / "a.cubin" / "z").endswith("NOT writable")


def test_datasets_are_listed(tmp_path: Path):
    for name in ("gpt2_tokens", "characters", "damaged", "empty"):
        (tmp_path / name).mkdir()
    for name in ("gpt2_tokens", "characters", "damaged"):
        (tmp_path / name / "train.bin").write_bytes(bytes(2000))
    meta = {"format": 1, "vocab_size": 2, "tokenizer": {"kind": "char", "itos": ["a", "b"]}}
    splits = {"train": {"tokens": 1000, "files": []}, "val": {"tokens": 10, "files": []}}
    (tmp_path / "characters" / "meta.json").write_text(json.dumps({**meta, "splits": splits}))
    (tmp_path / "damaged" / "meta.json").write_text("{")
    found = examination.data(str(tmp_path))
    assert found[str(tmp_path / "gpt2_tokens")].endswith("no meta.json: taken for GPT-2 tokens")
    assert found[str(tmp_path / "characters")].endswith("char, 2 ids, tokens train 1,000, val 10")
    assert found[str(tmp_path / "damaged")].endswith("meta.json cannot be used")
    assert str(tmp_path / "empty") not in found
    assert "prepare" in examination.data(str(tmp_path / "empty"))["datasets"]
