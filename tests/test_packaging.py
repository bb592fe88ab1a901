"""A wheel is the whole trainer: presets inside, runs from anywhere, and none of our folder names in site-packages."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow  # builds a wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder holding the unpacked wheel, as site-packages would."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_only_our_two_packages_land_in_site_packages(installed: Path):
    names = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert names == {"nanogpt_fast", "nanogpt_kernels"}
    presets = {p.name for p in (installed / "nanogpt_fast/presets").iterdir()}
    assert presets == {p.name for p in (ROOT / "configs").glob("*.toml")}


def test_the_wheel_trains_from_any_directory(installed: Path, tmp_path: Path):
    small = ["--n_layer=1", "--n_embd=16", "--block_size=8", "--max_iters=2", "--eval_interval=2", "--eval_iters=1"]
    command = [sys.executable, "-m", "nanogpt_fast.train", "--config", "quickstart", *small, "--sample_at_end=20"]
    env = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "data/stdlib/meta.json").exists() and (tmp_path / "out-quickstart/checkpoints").is_dir()
    assert "next:" in run.stdout
