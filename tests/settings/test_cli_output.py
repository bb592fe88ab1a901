"""What the command line prints: --help, and configurations as TOML and flags that load back equal."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_fast.settings import cli
from nanogpt_fast.settings.config import SECTION_OF, Config

ROOT = Path(__file__).resolve().parents[2]

values = {
    "out_dir": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0~")),
    "wandb_run_name": st.text(st.characters(exclude_categories=["Cs"])),
    "learning_rate": st.floats(0, 1e300),
    "seed": st.integers(0, 2**63 - 1),
    "compile": st.booleans(),
    "dtype": st.sampled_from(["auto", "float16"]),
}


@settings(max_examples=40, deadline=None)  # 45 ms each
@given(st.fixed_dictionaries(values))
def test_toml_loads_back_equal(changes):
    config = Config().replace(**changes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.toml")
        path.write_text(cli.to_toml(config), encoding="utf-8")
        assert cli.load_config([str(path)]) == config


@settings(max_examples=40, deadline=None)  # 45 ms each
@given(st.fixed_dictionaries(values))
def test_flags_load_back_equal(changes):
    config = Config().replace(**changes)
    argv = [f"--{key}={value!r}" if isinstance(value, str) else f"--{key}={value}" for key, value in changes.items()]
    assert cli.load_config(argv) == config


def run(*argv: str, module: str = "settings.cli", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"nanogpt_fast.{module}", *argv], cwd=ROOT, text=True, capture_output=True, check=False,
        env=os.environ | {"COLUMNS": "80", "PYTHONPATH": str(ROOT / "kernels"), "PYTHONIOENCODING": "utf-8", **env},
    )  # fmt: skip


def test_the_module_prints_the_resolved_configuration(tmp_path):
    done = run("--config", "quickstart", "--batch_size=3")
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "x.toml").write_text(done.stdout)
    assert cli.load_config([str(tmp_path / "x.toml")]) == cli.load_config(["quickstart", "--batch_size=3"])


def test_an_error_is_one_block_and_exits_2():
    done = run("--learning_rte=1")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[0] == "error: unknown flag --learning_rte, did you mean '--learning_rate'?"
    assert "Traceback" not in done.stderr and "╭" not in done.stderr


def test_help_shows_every_flag_with_its_comment_and_default():
    done = run("--help")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    for key in SECTION_OF:
        assert f"--{key} " in done.stdout, key
    for section in ("run", "data", "model", "optim", "log", "system"):
        assert f"{section} options" in done.stdout
    for name in cli.preset_names():
        assert name in done.stdout
    assert "micro-batches an iteration, over all ranks together" in done.stdout and "(default: 40)" in done.stdout
    assert sum(line.startswith(("  python -m", "  torchrun")) for line in lines) == 3


@pytest.mark.parametrize("command", ["train", "prepare", "convert", "sample", "evaluate", "plot", "doctor"])
def test_help_is_80_columns_wide_and_names_every_argument(command):
    done = run("--help", module=command)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line for line in lines if len(line) > 80 or "\x1b" in line] == []
    assert lines[0].startswith(f"usage: python -m nanogpt_fast.{command} ") and lines[2].endswith(".")
    assert [line for line in lines if re.match(r"│ \[*STR", line)] == []
    assert all(line.startswith("│") == line.endswith("│") for line in lines)


def test_every_flag_has_a_comment_for_help():
    source = (ROOT / "nanogpt_fast/settings/config.py").read_text()
    for key in SECTION_OF:
        (first, *_) = re.findall(rf"^    {key}: .*$", source, re.MULTILINE)
        assert "  # " in first, f"{key} has no comment, so --help says nothing about it"


def test_help_wins_over_errors_and_survives_an_ascii_terminal():
    done = run("--nonsense", "-h", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.isascii() and "--batch_size" in done.stdout


@pytest.mark.parametrize("no_color, coloured", [("", True), ("1", False)])
def test_help_is_coloured_on_a_terminal_unless_no_color(no_color, coloured, monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit) as stop:
        cli.load_config(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert ("\x1b[" in out) is coloured and "quickstart" in out


A_RUNS = "--config quickstart --batch_sise=4"
WRONG = {"train": A_RUNS, "evaluate": A_RUNS, "verify": A_RUNS, "tune": A_RUNS, "plan": "--flop=1e19",
         "convert": "run hf --to=hf --dtyp=float32", "doctor": "--devise=cpu"}  # fmt: skip


@pytest.mark.parametrize("command", WRONG)
def test_help_and_a_wrong_flag_do_without_torch(command):
    """test_sample_batch.py has more of sample's."""
    code = (
        f"import sys\nfrom nanogpt_fast.errors import ConfigError\nfrom nanogpt_fast.{command} import main\n"
        f"for words in (['--help'], {WRONG[command].split()}):\n"
        "    try: main(words)\n    except (SystemExit, ConfigError) as error: print(repr(error), file=sys.stderr)\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    helped, wrong, loaded = done.stderr.splitlines()
    assert helped == "SystemExit(0)" and ", did you mean '--" in wrong and loaded == "[]"
