"""Every preset loads, does the arithmetic its comments claim, and carries the numbers it is known for."""

import re
import shutil
import tomllib

import pytest

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.hardware import flops_per_token
from nanogpt_fast.settings import cli
from nanogpt_fast.settings.config import SECTION_OF, Config

NAMES = [
    *("eval_gpt2", "eval_gpt2_large", "eval_gpt2_medium", "eval_gpt2_xl", "finetune_shakespeare"),
    *("gpt2_124m", "gpt2_1558m", "gpt2_350m", "gpt2_774m", "quickstart", "shakespeare_char", "shakespeare_char_cpu"),
]


def test_the_presets_are_these():
    assert cli.preset_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_loads_by_name_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = cli.load_config(["--config", name])
    given = tomllib.loads(cli.find_preset(name).read_text())
    assert set(given) <= {"run", "data", "model", "optim", "log", "system"}, "presets keep to the sections"
    for section, values in given.items():
        for key, value in values.items():
            assert SECTION_OF[key] == section and config.flat()[key] == value
    assert config == cli.load_config([name]) == cli.load_config([str(cli.find_preset(name))])


@pytest.mark.parametrize("name", NAMES)
def test_the_comment_says_how_many_tokens_an_iteration_has(name):
    text = cli.find_preset(name).read_text()
    config = cli.load_config([name])
    (figure,) = re.findall(r"([\d,]+) tokens/iter", text)
    assert int(figure.replace(",", "")) == config.tokens_per_iter
    data = config.data
    product = rf"{data.gradient_accumulation_steps} micro-batch\w* x {data.batch_size} sequences? x {data.block_size} ="
    assert re.search(product, text), f"the product is not spelled out: {product}"
    total = re.search(r"([\d,]+) iterations are ([\d.]+)([BM])", text)
    if total:
        iterations, amount = int(total[1].replace(",", "")), float(total[2]) * {"B": 1e9, "M": 1e6}[total[3]]
        assert iterations == config.optim.max_iters
        assert amount == pytest.approx(iterations * config.tokens_per_iter, rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_in_the_comment_names_the_preset(name):
    command = "evaluate" if name.startswith("eval") else "train"
    assert f"-m nanogpt_fast.{command} --config {name}" in cli.find_preset(name).read_text()


@pytest.mark.parametrize(
    "name, shape, millions",
    [
        ("gpt2_124m", (12, 12, 768), 124), ("gpt2_350m", (24, 16, 1024), 355),
        ("gpt2_774m", (36, 20, 1280), 774), ("gpt2_1558m", (48, 25, 1600), 1558),
    ],
)  # fmt: skip
def test_the_gpt2_family_has_its_shapes(name, shape, millions):
    config = cli.load_config([name])
    layers, heads, width = config.model.n_layer, config.model.n_head, config.model.n_embd
    assert (layers, heads, width) == shape
    assert (12 * layers * width**2 + (50257 + 1024) * width) / 1e6 == pytest.approx(millions, rel=0.005)
    assert config.data.gradient_accumulation_steps % 8 == 0, "eight GPUs must be able to share it"
    assert config.optim.lr_decay_iters == config.optim.max_iters


def test_gpt2_124m_is_nanogpts_run_without_wandb():
    run = {"eval_interval": 1000, "log_interval": 10, "wandb_run_name": "gpt2-124M", "out_dir": "out-gpt2-124m"}
    assert cli.load_config(["gpt2_124m"]) == Config().replace(**run)


def test_an_unknown_preset_names_the_closest_and_all():
    with pytest.raises(ConfigError, match="did you mean 'shakespeare_char'") as caught:
        cli.find_preset("shakspeare_char")
    assert "gpt2_124m" in caught.value.expected


def test_an_installed_package_reads_the_presets_inside_it(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "nanogpt_fast"
    (package / "presets").mkdir(parents=True)
    shutil.copy(cli.find_preset("quickstart"), package / "presets")
    (tmp_path / "site-packages" / "configs").mkdir()  # another package's folder of that name
    (tmp_path / "site-packages" / "configs" / "stranger.toml").write_text("batch_size = 1\n")
    monkeypatch.setattr(cli, "__file__", str(package / "settings/cli.py"))
    assert cli.preset_names() == ["quickstart"]
    assert cli.find_preset("quickstart") == package / "presets" / "quickstart.toml"


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_leaves_the_dtype_to_the_device(name):
    """bfloat16 on a CPU that emulates it is ten times as slow as float32 (nanogpt_fast/distributed.py)."""
    assert cli.load_config([name]).system.dtype == "auto"


def test_the_quickstart_is_small():
    """7.4 TFLOP by nanoGPT's count are what fits the promised time on two AVX2 cores without hurry (README.md)."""
    config = cli.load_config(["quickstart"])
    flops = flops_per_token(config.shape(vocab_size=96))["nanogpt"] * config.tokens_per_iter * config.optim.max_iters
    assert flops < 7.5e12
    assert config.model.n_layer * config.optim.max_iters <= 4800, "calls cost more than products on a faster CPU"
    evaluated = 2 * config.run.eval_iters * (config.optim.max_iters // config.run.eval_interval + 1)
    assert evaluated / 3 < 0.1 * config.optim.max_iters, "a forward pass is a third of an iteration"
