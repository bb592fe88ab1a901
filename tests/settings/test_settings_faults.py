"""What users' files and flags did that no test had: rates, helpers of a config, files that are none, odd values."""

import os
from pathlib import Path

import pytest

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.settings import cli, nanogpt_config, toml_files
from nanogpt_fast.settings.config import Config

posix = pytest.mark.skipif(os.name == "nt", reason="files of POSIX")


def error(*argv: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        cli.load_config(list(argv))
    return caught.value


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return str(path)


# ---- min_lr beside learning_rate ----


def test_a_presets_min_lr_goes_with_its_rate(caplog: pytest.LogCaptureFixture):
    optim = cli.load_config(["--config", "gpt2_124m", "--learning_rate=3e-4"]).optim
    assert (optim.learning_rate, optim.min_lr) == (3e-4, 3e-5)
    assert "min_lr = 3e-05: gpt2_124m's ratio" in caplog.text and "--min_lr=6e-05" in caplog.text
    assert cli.load_config(["--learning_rate=3e-4", "--config=gpt2_124m"]).optim.min_lr == 3e-5


@pytest.mark.parametrize(
    "argv, min_lr",
    [
        (["gpt2_124m", "--learning_rate=3e-4", "--min_lr=1e-5"], 1e-5),  # given
        (["gpt2_124m", "--learning_rate=3e-4", "--min_lr=6e-5"], 6e-5),  # given, and the preset's own
        (["gpt2_124m"], 6e-5),
        (["gpt2_350m", "--learning_rate=1e-4"], 0.0),  # the preset's ratio is 0
        (["finetune_shakespeare", "--learning_rate=1e-5"], 6e-5),  # it says no min_lr; the rate is constant
        (["--learning_rate=1e-3"], 6e-5),  # nanoGPT's defaults and its meaning of a flag
    ],
)
def test_min_lr_stays_where_it_was_given_or_is_nanogpts(argv, min_lr, caplog: pytest.LogCaptureFixture):
    assert cli.load_config(argv).optim.min_lr == min_lr and not caplog.text


def test_a_config_of_nanogpt_keeps_its_min_lr(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    mine = write(tmp_path / "x.py", "learning_rate = 1e-3\nmin_lr = 1e-4\n")
    assert cli.load_config([mine, "--learning_rate=5e-4"]).optim.min_lr == 1e-4 and not caplog.text
    assert cli.load_config(["gpt2_124m", mine]).optim.min_lr == 1e-4


def test_a_rate_below_min_lr_is_warned_of(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    assert cli.load_config(["--learning_rate=3e-5"]).optim.min_lr == 6e-5
    assert "rises to min_lr = 6e-05, above its peak of 3e-05: --min_lr=3e-06" in caplog.text
    caplog.clear()
    for more in ("--decay_lr=False", "--schedule=constant", "--eval_only", "--min_lr=3e-6"):
        cli.load_config(["--learning_rate=3e-5", more])
    monkeypatch.setenv("RANK", "1")  # rank 0 has said it
    cli.load_config(["--learning_rate=3e-5"])
    assert not caplog.text


# ---- helpers of a nanoGPT config ----


def test_a_name_that_only_other_lines_use_is_a_helper(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    mine = write(tmp_path / "x.py", "num_epochs = 3\nper = 100\nsteps = per * 2\nmax_iters = num_epochs * steps\n")
    assert cli.load_config([mine]).optim.max_iters == 600 and not caplog.text
    assert nanogpt_config.read(Path(mine)).keys() == {"num_epochs", "per", "steps", "max_iters"}


def test_a_name_that_no_line_uses_is_unknown_and_one_like_a_setting_is_named(tmp_path: Path, caplog):
    caught = error(write(tmp_path / "x.py", "num_epochs = 3\nmax_iters = 100\n"))
    assert caught.what.startswith("unknown key num_epochs") and caught.where.endswith("x.py:1")
    mine = write(tmp_path / "x.py", "max_iter = 5000\nlr_decay_iters = max_iter\n")
    assert cli.load_config([mine]).optim.max_iters == Config().optim.max_iters
    assert "x.py:1: max_iter is no setting but a helper of other lines; max_iters is one" in caplog.text


# ---- files that are none, and files that nobody wrote by hand ----


@posix
@pytest.mark.parametrize("suffix", [".py", ".toml"])
def test_a_pipe_or_a_device_is_no_config(tmp_path: Path, suffix: str):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        caught = error("--config", str(tmp_path / f"{name}{suffix}"))
        assert caught.found == "not a regular file" and name in caught.where


@pytest.mark.parametrize("name, limit", [("x.py", nanogpt_config.MAX_FILE), ("x.toml", toml_files.MAX_FILE)])
def test_a_huge_file_is_no_config(tmp_path: Path, name: str, limit: int):
    with (tmp_path / name).open("wb") as file:
        file.truncate(limit + 1)
    assert "at most" in error(str(tmp_path / name)).found


@pytest.mark.parametrize("coding", ["rot13", "undefined", "hex", "utf-16", "no-such"])
def test_a_coding_line_that_is_no_encoding_of_text(tmp_path: Path, coding: str):
    caught = error(write(tmp_path / "x.py", f"# coding: {coding}\nbatch_size = 3\n"))
    assert caught.exit_code == 2 and "x.py" in caught.where


def test_a_coding_line_of_an_old_text_is_minded(tmp_path: Path):
    (tmp_path / "x.py").write_bytes("# coding: latin-1\r\nout_dir = 'ä'\r\nbatch_size = 3\r".encode("latin-1"))
    config = cli.load_config([str(tmp_path / "x.py")])
    assert (config.run.out_dir, config.data.batch_size) == ("ä", 3)


@pytest.mark.parametrize(
    "name, text",
    [
        ("x.py", f"batch_size = {'9' * 5000}"),
        ("x.py", f"batch_size = 0x{'f' * 5000}"),
        ("x.py", f"batch_size = {'(' * 5000}1{')' * 5000}"),
        ("x.py", f"batch_size = {'-' * 50_000}1"),
        ("x.py", "batch_size = '\\ud800'"),
        ("x.py", "wandb_run_name = '\\ud800'"),
        ("x.py", "out_dir = 'a\\0b'"),
        ("x.py", "batch_size = 3\0"),
        ("x.toml", f"batch_size = {'9' * 5000}"),
        ("x.toml", f"batch_size = 0x{'f' * 5000}"),
        ("x.toml", f"batch_size = [0x{'f' * 5000}]"),
        ("x.toml", f"batch_size = {'[' * 50_000}{']' * 50_000}"),
        ("x.toml", f"batch_size{'.a' * 200} = 1"),
        ("x.toml", 'out_dir = "a\\u0000b"'),
        ("x.toml", f"{'x' * 500_000} = 1"),
        ("x.toml", "learning_rate = nan"),
        ("x.toml", "learning_rate = inf"),
        ("x.toml", "dropout = nan"),
    ],
    ids=lambda value: value[:24],
)
def test_odd_values_in_a_file_are_errors_of_ours(tmp_path: Path, name: str, text: str):
    caught = error(write(tmp_path / name, text))
    assert caught.exit_code == 2 and len(str(caught)) < 2000


def test_a_key_of_very_many_parts_is_refused_before_it_is_read(tmp_path: Path):
    """50,000 took tomllib half a minute, and gigabytes."""
    caught = error(write(tmp_path / "x.toml", f"seed = 1\nbatch_size{'.a' * 201} = 1"))
    assert caught.what == "a line with 201 dots; 200 at most are read" and caught.where.endswith("x.toml:2")


@pytest.mark.parametrize("flag", ["--batch_size=9223372036854775808", "--seed=1e30", "--learning_rate=inf",
                                  "--min_lr=nan", "--weight_decay=-inf", "--beta1=nan"])  # fmt: skip
def test_odd_numbers_on_the_line_are_out_of_range(flag: str):
    assert flag.partition("=")[0] in error(flag).what


@posix
def test_a_name_that_no_disk_takes():
    assert error("--config", "x" * 300 + ".toml").found == "File name too long"
    assert "no preset" in error("--config", "x" * 300).what


# ---- the home folder ----


@posix
def test_a_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = cli.load_config(
        ["--out_dir=~/x", "--data_dir=~", "--init_from=~/y/ckpt.pt", "--dataset=~/z", "--wandb_run_name=~"]
    )
    assert (config.run.out_dir, config.data.data_dir) == (f"{tmp_path}/x", str(tmp_path))
    assert (config.run.init_from, config.data.dataset) == (f"{tmp_path}/y/ckpt.pt", f"{tmp_path}/z")
    assert config.log.wandb_run_name == "~"  # no path
    write(tmp_path / "mine.toml", 'out_dir = "~/x"\n')
    assert cli.load_config(["--config=~/mine.toml"]).run.out_dir == f"{tmp_path}/x"
    assert cli.load_config(["--out_dir=~nobody-has-this-name/x", "--dataset=a~"]).run.out_dir[0] == "~"


@posix
def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # neither $HOME nor an entry in passwd
    for argv in (["--out_dir=~/x"], ["--config=~/x.toml"]):
        assert error(*argv).what == "there is no home folder here"
