"""nanoGPT's Python config files: what is folded, what is refused with file and line, and that nothing ever runs."""

import ast
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.settings import cli, nanogpt_config
from nanogpt_fast.settings.config import SECTION_OF, Config

# The seven files nanoGPT ships, as facts: the same keys, values and constructs.
SHIPPED = {
    "eval_gpt2": "batch_size = 8\neval_iters = 500 # more\neval_only = True\nwandb_log = False\ninit_from = 'gpt2'\n",
    "finetune_shakespeare": """
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False # a remark
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
""",
    "train_gpt2": """
wandb_log = True
wandb_project = 'owt'
wandb_run_name='gpt2-124M'
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
""",
    "train_shakespeare_char": """
out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
# device = 'cpu'
""",
} | {
    f"eval_gpt2_{size}": "batch_size = 8\neval_iters = 500\neval_only = True\n"
    f"wandb_log = False\ninit_from = 'gpt2-{size}'\n"
    for size in ("medium", "large", "xl")
}


def folded(tmp_path: Path, source: str) -> dict:
    path = tmp_path / "x.py"
    path.write_text(source)
    return {key: value for key, (value, _) in nanogpt_config.read(path).items()}


@pytest.mark.parametrize("name", sorted(SHIPPED))
@pytest.mark.parametrize("form", ["--config={}", "{}"])
def test_each_file_nanogpt_ships_gives_what_running_it_gives(name, form, tmp_path):
    path = tmp_path / f"{name}.py"
    path.write_text(SHIPPED[name])
    wanted: dict = {}
    exec(SHIPPED[name], wanted)  # our own text, just above: the oracle is Python
    flat = cli.load_config([form.format(path)]).flat()
    for key in wanted.keys() & SECTION_OF.keys():
        if key == "wandb_run_name" and name == "finetune_shakespeare":
            assert flat[key].startswith("ft-") and abs(float(flat[key][3:]) - time.time()) < 600
        else:
            assert flat[key] == wanted[key], key


nanogpt_dir = os.environ.get("NANOGPT_DIR", "")


@pytest.mark.skipif(not nanogpt_dir, reason="NANOGPT_DIR does not name a nanoGPT checkout")
def test_every_config_of_a_nanogpt_checkout_loads():
    files = sorted(Path(nanogpt_dir, "config").glob("*.py"))
    assert files
    for file in files:
        wanted: dict = {}
        exec(file.read_text(), wanted)
        flat = cli.load_config([str(file)]).flat()
        same = {key for key in wanted.keys() & flat.keys() if flat[key] == wanted[key]}
        assert wanted.keys() & flat.keys() - same <= {"wandb_run_name"}, file
        assert {k for k in wanted if not k.startswith("_")} - {"time"} <= set(flat), file


@pytest.mark.skipif(not nanogpt_dir, reason="NANOGPT_DIR does not name a nanoGPT checkout")
def test_every_setting_of_a_nanogpt_checkout_is_a_flag_here():
    tree = ast.parse(Path(nanogpt_dir, "train.py").read_text())
    end = next(n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "config_keys")
    names = {ast.unparse(n.targets[0]) for n in tree.body if isinstance(n, ast.Assign) and n.lineno < end.lineno}
    assert len(names) > 30 and names <= SECTION_OF.keys()


@pytest.mark.parametrize(
    "source, value",
    [
        ("x = 5 * 8", 40), ("x = 2**10", 1024), ("x = -3", -3), ("x = +3", 3), ("x = 7 // 2", 3), ("x = 7 % 4", 3),
        ("x = 1 / 4", 0.25), ("x = 1e-1", 0.1), ("x = 2 ** -1", 0.5), ("x = -(2 + 3) * 4 - 1", -21),
        ("x = 1_000", 1000),
        ("x = 'a' + 'b' + str(3)", "ab3"), ("x = str(5 * 8)", "40"), ("x = int(3.9)", 3), ("x = float('1e3')", 1000.0),
        ("x = int('7')", 7), ("x = str(True)", "True"), ("x = None", None), ("x = True", True),
        ("y = 4\nx = y * y", 16), ("x = y = 3", 3), ("x: int = 3", 3), ("x = 1\nx = x + 1", 2),
        ('"""A docstring."""\nimport os, sys\nfrom time import time as now\nx = 1', 1),
        ("x = '# no comment'", "# no comment"),
    ],
)  # fmt: skip
def test_folded(source, value, tmp_path):
    got = folded(tmp_path, source)["x"]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "line, why",
    [
        ("x = __import__('os').system('touch owned')", "would have to be run"),
        ("x = open('owned', 'w')", "would have to be run"),
        ("x = torch.cuda.is_available()", "would have to be run"),
        ("x = time.time(1)", "would have to be run"),
        ("x = os.time()", "would have to be run"),
        ("x = eval('1')", "would have to be run"),
        ("x = str(1, 2)", "would have to be run"),
        ("x = 'bfloat16' if True else 'float16'", "would have to be run"),
        ("x = f'{1}'", "would have to be run"),
        ("x = [1, 2]", "would have to be run"),
        ("x = 1j", "would have to be run"),
        ("x = not True", "would have to be run"),
        ("x = ~1", "would have to be run"),
        ("x = 1 << 9", "would have to be run"),
        ("x = 1 < 2", "would have to be run"),
        ("x = (lambda: 1)()", "would have to be run"),
        ("x = 1 / 0", "division by zero"),
        ("x = 5 // 0", "division"),
        ("x = 0 ** -1", "0.0 cannot be raised|zero to a negative power"),
        ("x = (-8) ** 0.5", "root of a negative"),
        ("x = int('seven')", "invalid literal"),
        ("x = int(None)", "None"),
        ("x = 'a' + 1", "use str"),
        ("x = 'a' * 9", "needs a number"),
        ("x = 'a%s' % 1", "needs a number"),
        ("x = True + 1", "needs a number"),
        ("x = -'a'", "needs a number"),
        ("x = y", "no value above"),
        ("x, y = 1, 2", "only a plain name"),
        ("x.y = 1", "only a plain name"),
        ("x += 1", "not an assignment"),
        ("x: int", "not an assignment"),
        ("print('hi')", "not an assignment"),
        ("if True: x = 1", "not an assignment"),
        ("def f(): pass", "not an assignment"),
        ("exec('x = 1')", "not an assignment"),
    ],
)
def test_anything_else_is_refused_with_file_line_and_expression(line, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.py").write_text(f"batch_size = 8\n\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        nanogpt_config.read(Path("x.py"))
    assert caught.value.where == "x.py:3"
    assert caught.value.found and caught.value.found in line
    assert caught.value.expected == nanogpt_config.ALLOWED
    assert any(part in caught.value.what for part in why.split("|")), caught.value.what
    assert sorted(os.listdir()) == ["x.py"], "the file was run"


@pytest.mark.parametrize(
    "source",
    [
        "x = 9**9**9", "x = 2 ** (2 ** 200)", "x = 9 ** 10 ** 10", "x = -9 ** 999999", "x = 1e300 ** 1e300",
        "x = 2**200\n" + "x = x * x\n" * 40, "x = 'aaaaaaaa'\n" + "x = x + x\n" * 60,
        "x = 3**120\n" + "x = x ** 60\n" * 9, "x = " + "(" * 90 + "1" + ")" * 90 + "++", "x = " + "-" * 50_000 + "1",
        "x = " + "1+" * 20_000 + "1", "x = " + "9" * 6000, "x = '" + "a" * 5000 + "'", "x = int('" + "9" * 4000 + "')",
    ],
)  # fmt: skip
def test_nothing_a_file_says_can_hang_or_fill_the_memory(source, tmp_path):
    start = time.perf_counter()
    with pytest.raises(ConfigError):
        folded(tmp_path, source)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "source", [b"x = = 1", b"x = (", b"x = '\xff'", b"x = 1\x00", b"\xff\xfe", b"# coding: klingon\n"]
)
def test_what_is_not_python_is_a_config_error(source, tmp_path):
    (tmp_path / "x.py").write_bytes(source)
    with pytest.raises(ConfigError, match="not valid Python"):
        nanogpt_config.read(tmp_path / "x.py")


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    (tmp_path / "x.py").write_bytes(b"\xef\xbb\xbfbatch_size = 8\r\ndropout = 0\r\n")
    assert cli.load_config([str(tmp_path / "x.py")]).data.batch_size == 8


@given(st.recursive(
    st.integers(-99, 99).map(str) | st.floats(0.01, 99).map(repr),
    lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "/"]), inner),
    max_leaves=8,
))  # fmt: skip
def test_arithmetic_folds_as_python_computes_it(expression):
    tree = ast.parse(f"x = {expression}")
    try:
        wanted = eval(expression)  # built from numbers and operators alone
    except ZeroDivisionError:
        return
    assert nanogpt_config._assignments(tree.body[0], {}) == [("x", wanted)]


def test_a_typo_in_a_file_is_an_error_where_nanogpt_made_a_new_global(tmp_path):
    (tmp_path / "x.py").write_text("batch_size = 8\nlearning_rte = 1e-3\n")
    with pytest.raises(ConfigError, match="unknown key learning_rte, did you mean 'learning_rate'") as caught:
        cli.load_config([str(tmp_path / "x.py")])
    assert caught.value.where.endswith("x.py:2")


def test_a_helper_begins_with_an_underscore(tmp_path):
    (tmp_path / "x.py").write_text("_gpus = 8\ngradient_accumulation_steps = 5 * _gpus\n")
    assert cli.load_config([str(tmp_path / "x.py")]) == Config()


def test_values_of_a_file_meet_the_same_types_and_ranges(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("dropout = 0\nmax_iters = 1e5\ncompile = 0\n")
    config = cli.load_config([str(path)])
    assert config.model.dropout == 0.0 and type(config.model.dropout) is float
    assert config.optim.max_iters == 100_000 and type(config.optim.max_iters) is int
    assert config.system.compile is False
    for line in ("learning_rate = '6e-4'", "batch_size = 1.5", "out_dir = 2024", "batch_size = True", "compile = 2"):
        path.write_text(f"n_layer = 2\n{line}\n")
        with pytest.raises(ConfigError, match="wrong value") as caught:
            cli.load_config([str(path)])
        assert caught.value.where == f"{path}:2"
    path.write_text("\nlearning_rate = -1\n")
    with pytest.raises(ConfigError, match="out of range") as caught:
        cli.load_config([str(path)])
    assert caught.value.where == f"learning_rate = -1.0 ({path}:2)"
