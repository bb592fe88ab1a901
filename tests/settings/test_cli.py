"""The command line: every form of a flag, config files and their order, errors a reader can act on."""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from tyro.conf import Positional, arg

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.settings import cli
from nanogpt_fast.settings.config import Config


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Stands for a command without positional words, as sample is."""

    out_dir: str = "out"  # where the run is
    start: str = "\n"  # the prompt
    top_k: int | None = 200  # keep so many candidates
    temperature: float = 0.8  # below 1: less random
    compile: bool = False
    style: Literal["plain", "colour"] = "plain"

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError("--temperature is out of range", where=f"temperature = {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class Copying:
    """Stands for a command with two words."""

    src: Positional[str]  # read from
    dst: Annotated[Positional[str], arg(metavar="TARGET")]  # written to
    to: Literal["wax", "stone"]  # material
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Stands for a command with any number of words."""

    runs: Positional[tuple[str, ...]]  # what to draw
    out: str = "plot.png"
    size: tuple[int, int] = (8, 6)  # a type that tyro reads, not we


def flat(*argv: str) -> dict:
    return cli.load_config(list(argv)).flat()


def sampling(*argv: str) -> Sampling:
    return cli.parse(Sampling, list(argv), prog="python -m nanogpt_fast.sample")


def error(*argv: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        cli.load_config(list(argv))
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize(
    "argv, key, value",
    [
        (["--batch_size=32"], "batch_size", 32), (["--batch_size", "32"], "batch_size", 32),
        (["--batch-size=32"], "batch_size", 32), (["--batch-size", "32"], "batch_size", 32),
        (["--learning_rate=1"], "learning_rate", 1.0), (["--dropout=0"], "dropout", 0.0),
        (["--learning_rate=3e-5"], "learning_rate", 3e-5), (["--max_iters=1e5"], "max_iters", 100_000),
        (["--max_iters=1_000"], "max_iters", 1000), (["--max_iters=20.0"], "max_iters", 20),
        (["--min_lr=0"], "min_lr", 0.0), (["--out_dir=2024"], "out_dir", "2024"), (["--out_dir=1e5"], "out_dir", "1e5"),
        (["--out_dir=True"], "out_dir", "True"), (["--out_dir=None"], "out_dir", "None"),
        (["--out_dir", "2024"], "out_dir", "2024"), (["--out_dir=a=b=c"], "out_dir", "a=b=c"),
        (["--out_dir="], "out_dir", ""), (["--out_dir=-x"], "out_dir", "-x"), (["--out_dir", "-x"], "out_dir", "-x"),
        (["--out_dir=--x=1"], "out_dir", "--x=1"), (["--out_dir='a b'"], "out_dir", "a b"),
        (['--out_dir="x"'], "out_dir", "x"), (['--out_dir="x'], "out_dir", '"x'), (["--out_dir='"], "out_dir", "'"),
        (["--out_dir=été\n2"], "out_dir", "été\n2"), (["--out_dir=x.toml"], "out_dir", "x.toml"),
        (["--kernels=triton,attention=reference"], "kernels", "triton,attention=reference"),
        (["--device=cuda"], "device", "cuda"), (["--dtype=float16"], "dtype", "float16"),
        (["--dtype='float16'"], "dtype", "float16"), (["--data-order", "nanogpt"], "data_order", "nanogpt"),
    ],
)  # fmt: skip
def test_each_form_of_a_value(argv, key, value):
    got = flat(*argv)[key]
    assert got == value and type(got) is type(value)
    assert {k for k, v in flat(*argv).items() if v != Config().flat()[k]} <= {key}


@pytest.mark.parametrize("word", ["True", "true", "TRUE", "1", "yes", "on", "False", "false", "0", "no", "off"])
def test_each_form_of_a_boolean(word):
    wanted = word.lower() in ("true", "1", "yes", "on")
    for argv in ([f"--compile={word}"], ["--compile", word]):
        assert flat(*argv)["compile"] is wanted
        assert flat(*argv, "--batch_size=3")["batch_size"] == 3


def test_bare_booleans():
    assert flat("--eval_only")["eval_only"] is True
    assert flat("--eval-only", "--batch_size=3")["batch_size"] == 3
    assert flat("--no-compile")["compile"] is flat("--no_compile")["compile"] is False
    assert flat("--compile", "quickstart")["compile"] is False, "quickstart is a preset here, not the flag's value"


def test_a_value_that_begins_with_a_dash_reaches_the_range_check():
    for argv, seen in ((["--min_lr=-1"], "-1.0"), (["--min_lr", "-1e-5"], "-1e-05"), (["--min-lr", "-1"], "-1.0")):
        assert error(*argv).where == f"min_lr = {seen} (command line)"
    assert "nan" in error("--learning_rate=nan").where and "inf" in error("--weight_decay=inf").where
    assert error("--batch_size=-5").what == "--batch_size is out of range"
    assert error("--dropout=1").expected == "0 <= dropout < 1"


def test_what_comes_later_wins_files_included(tmp_path):
    (tmp_path / "a.toml").write_text("batch_size = 3\n[model]\nn_layer = 2\n")
    (tmp_path / "b.py").write_text("batch_size = 5\n")
    a, b = str(tmp_path / "a.toml"), str(tmp_path / "b.py")
    assert flat(a, "--batch_size=7")["batch_size"] == 7
    assert flat("--batch_size=7", a)["batch_size"] == 3
    assert flat("--config", a, f"--config={b}")["batch_size"] == 5
    assert (
        flat(b, "--n_layer=4", a, "--batch_size=1", "--batch_size=2")
        == Config().replace(batch_size=2, n_layer=2).flat()
    )
    assert flat("shakespeare_char", "--n_layer=1")["block_size"] == 256


def test_toml_takes_keys_in_their_section_or_at_top_level(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("dropout = 0\ncompile = false\n[optim]\nmax_iters = 1e5\n")
    assert cli.load_config([str(path)]) == Config().replace(dropout=0.0, compile=False, max_iters=100_000)


@pytest.mark.parametrize(
    "text, what, where",
    [
        ("[model]\nlearning_rate = 1e-3", "learning_rate is in the wrong section", " [model]"),
        ("[optimizer]\nlearning_rate = 1e-3", "unknown section [optimizer], did you mean 'optim'?", " [optimizer]"),
        ("[optim]\nlearning_rte = 1e-3", "unknown key learning_rte, did you mean 'learning_rate'?", " [optim]"),
        ("batch_sise = 3", "unknown key batch_sise, did you mean 'batch_size'", ""),
        ("batch_size = 1\n[data]\nbatch_size = 2", "batch_size is set twice", " [data]"),
        ("optim = 3", "unknown key optim", ""),
        ("[learning_rate]\nx = 3", "unknown section [learning_rate]", " [learning_rate]"),
        ("learning_rate = '1e-3'", "wrong value for --learning_rate", ""),
        ("[data]\nbatch_size = 1.5", "wrong value for --batch_size", " [data]"),
        ("[data]\nbatch_size = [1]", "wrong value for --batch_size", " [data]"),
        ("[data]\nbatch_size = 1979-05-27", "wrong value for --batch_size", " [data]"),
        ("bias = 'yes'", "wrong value for --bias", ""),
        ("dtype = 'bfloat'", "wrong value for --dtype, did you mean 'bfloat16'", ""),
        ("learning_rate = 1" + "0" * 400, "wrong value for --learning_rate", ""),
        ("[data]\n\nbatch_size = = 3", "not valid TOML", ":3"),
        ("[data\n", "not valid TOML", ":1"),
        ("x = [", "not valid TOML", ":1"),
        ("a = 'b'\nx = '\xff'", "not UTF-8", ":2"),
        ("x = " + "[" * 5000, "not valid TOML", ":1"),
    ],
)  # fmt: skip
def test_a_wrong_toml_file_says_what_and_where(text, what, where, tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(text, encoding="latin-1")
    caught = error(str(path))
    assert what in caught.what
    assert caught.where == f"{path}{where}"


@pytest.mark.parametrize(
    "argv, what, detail",
    [
        (["--learning_rte=1"], "unknown flag --learning_rte, did you mean '--learning_rate'?", "--help"),
        (["--batch-sise", "3"], "unknown flag --batch-sise, did you mean '--batch_size'", "--help"),
        (["--confg=x"], "unknown flag --confg, did you mean '--config'", "--help"),
        (["-batch_size=3"], "unknown flag -batch_size, did you mean '--batch_size'", "--help"),
        (["batch_size=3"], "did you mean --batch_size=3?", "batch_size=3"),
        (["--max_iters=1.5"], "wrong value for --max_iters", "a whole number, as 12 or 1e5\n  found:    '1.5'"),
        (["--max_iters=inf"], "wrong value for --max_iters", "whole number"),
        (["--batch_size=abc"], "wrong value for --batch_size", "'abc'"),
        (["--learning_rate=fast"], "wrong value for --learning_rate", "a number, as 3e-4\n  found:    'fast'"),
        (["--compile=maybe"], "wrong value for --compile", "True or False\n  found:    'maybe'"),
        (["--dtype=bf16"], "wrong value for --dtype, did you mean 'bfloat16'?", "auto, float32, bfloat16, float16"),
        (["--out_dir"], "--out_dir needs a value", "the end of the line"),
        (["--out_dir", "--compile"], "--out_dir needs a value", "--compile"),
        (["--config"], "--config needs a value", "preset"),
        (["--no-dropout"], "unknown flag --no-dropout, did you mean '--dropout' ", "--help"),
        (["--no-compile=1"], "unknown flag --no-compile", "--help"),
        (["--"], "unknown flag --", "--help"),
        (["--n_head=7"], "n_embd is not divisible by n_head", "n_head = 7 (command line)"),
        (["--config", "shakspear_char"], "no preset is named 'shakspear_char', did you mean 'shakespeare_char'", "xl"),
        (["--config="], "no preset is named ''", "quickstart"),
        (["--start=hi"], "--start is a setting of sampling", "python -m nanogpt_fast.sample"),
        (["config/train_gpt2.py"], "no config file config/train_gpt2.py", "--config gpt2_124m"),
        (["config/eval_gpt2.py"], "no config file config/eval_gpt2.py", "--config eval_gpt2, the preset"),
        (["--out_dir=\udcff"], "not UTF-8", "udcff"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_says_what_and_what_next(argv, what, detail, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    caught = error(*argv)
    assert what in caught.what
    assert detail in str(caught)


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "mine.toml").write_text("")
    missing = error(str(tmp_path / "mime.toml"))
    assert "did you mean 'mine.toml'" in missing.what and missing.expected.endswith(": mine.toml")
    missing = error(str(tmp_path / "train_gpt3.py"))
    assert missing.what.endswith("train_gpt3.py") and not missing.hint and "gpt2_124m" in missing.expected
    (tmp_path / "train_mine.py").write_text("")
    assert error(str(tmp_path / "train_gpt3.py")).expected == f"in {tmp_path}: train_mine.py"
    (tmp_path / "folder.toml").mkdir()
    assert "no config file" in error(str(tmp_path / "folder.toml")).what


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "mine.toml").write_text("batch_size = 3")
    assert flat("--config=~/mine.toml")["batch_size"] == 3


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path: object, *_: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "x.toml").touch()
    monkeypatch.setattr(os, "open", refuse)  # file modes do not stop root
    caught = error(str(tmp_path / "x.toml"))
    assert caught.what == "a config file cannot be read" and caught.found == "Permission denied"


def test_the_error_names_the_file_a_bad_range_came_from(tmp_path):
    (tmp_path / "x.toml").write_text("[model]\nn_head = 7\n")
    caught = error("--n_embd=32", str(tmp_path / "x.toml"))
    assert caught.where == f"n_embd = 32, n_head = 7 (command line, {tmp_path / 'x.toml'} [model])"


# ------------------------------------------------------------------------------------------------ other commands


def test_a_flat_command_reads_the_same_forms(tmp_path):
    assert sampling() == Sampling()
    assert sampling("--start=1", "--top-k", "1e1", "--compile", "--style=colour") == Sampling(
        start="1", top_k=10, compile=True, style="colour"
    )
    assert sampling("--top_k=None").top_k is None and sampling("--temperature=1").temperature == 1.0
    (tmp_path / "x.py").write_text("start = 'Once' + ' upon'\ntop_k = 5\n")
    (tmp_path / "x.toml").write_text("start = 'b'\n")
    assert sampling(str(tmp_path / "x.py"), "--top_k=7") == Sampling(start="Once upon", top_k=7)
    assert sampling(str(tmp_path / "x.py"), "--config", str(tmp_path / "x.toml")) == Sampling(start="b", top_k=5)


def test_a_flat_command_gives_the_same_errors(tmp_path):
    (tmp_path / "x.toml").write_text("[run]\nout_dir = 'x'\n")
    for argv, what in (
        (["--top_k=few"], "wrong value for --top_k"),
        (["--stile=plain"], "did you mean '--style'"),
        (["--temperature=-1"], "--temperature is out of range"),
        (["--n_layer=3"], "--n_layer is a setting of training"),
        (["shakespeare_char"], "unknown section [run]"),
        ([str(tmp_path / "x.toml")], "unknown section [run]"),
    ):
        with pytest.raises(ConfigError) as caught:
            sampling(*argv)
        assert what in caught.value.what and caught.value.exit_code == 2


def test_defaults_of_the_caller():
    given_defaults = Sampling(top_k=3, start="x")
    assert cli.parse(Sampling, ["--start=y"], prog="p", default=given_defaults) == Sampling(top_k=3, start="y")


def test_positional_words():
    def copying(*argv: str) -> Copying:
        return cli.parse(Copying, [*argv, "--to=wax"], prog="python -m copy")

    assert copying("a", "b=c.py") == Copying(src="a", dst="b=c.py", to="wax")
    assert (
        copying("a", "--force", "b")
        == copying("--force=1", "a", "b")
        == Copying(src="a", dst="b", to="wax", force=True)
    )
    assert cli.parse(Drawing, ["--out", "x", "a", "b.toml"], prog="p") == Drawing(runs=("a", "b.toml"), out="x")
    for argv, what in (
        (["a"], "TARGET missing"),
        ([], "SRC and TARGET missing"),
        (["a", "b", "c"], "one word too many: 'c'"),
    ):
        with pytest.raises(ConfigError) as caught:
            copying(*argv)
        assert caught.value.what == what and caught.value.expected == "python -m copy SRC TARGET --to=wax|stone"
    with pytest.raises(ConfigError, match="RUNS missing"):
        cli.parse(Drawing, [], prog="p")


def test_flags_without_a_default():
    for argv, what in ((["a", "b"], "--to missing"), (["a"], "TARGET and --to missing")):
        with pytest.raises(ConfigError) as caught:
            cli.parse(Copying, argv, prog="python -m copy")
        assert caught.value.what == what and caught.value.expected == "python -m copy SRC TARGET --to=wax|stone"


def test_an_error_of_tyros_own_is_one_of_ours():
    with pytest.raises(ConfigError) as caught:
        cli.parse(Drawing, ["a", "--size=wide"], prog="python -m draw")
    assert "--size" in caught.value.what and "╭" not in caught.value.what and "\n" not in caught.value.what
    assert caught.value.hint == "python -m draw --help" and caught.value.exit_code == 2


def test_toml_of_a_flat_dataclass(tmp_path):
    for options in (Sampling(start='"\\\n\x7f\x00é'), Sampling(top_k=None, compile=True)):
        (tmp_path / "x.toml").write_text(cli.to_toml(options), encoding="utf-8")
        read = sampling(str(tmp_path / "x.toml"))
        assert read == options or options.top_k is None  # TOML cannot say None: the default stands


def test_flags_stand_above_the_config_flag_wherever_it_is_written():
    """Bare files keep nanoGPT's left-to-right rule; --config is ours, and no flag may silently lose to it."""
    for argv in (["--device=cuda", "--config", "quickstart"], ["--config=quickstart", "--device=cuda"]):
        assert cli.load_config(argv).system.device == "cuda"
    assert cli.load_config(["--device=cuda", "quickstart"]).system.device == "cpu"
