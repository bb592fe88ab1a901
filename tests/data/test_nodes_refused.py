"""What does not belong to the dataset that many nodes prepare is refused by name."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from many_nodes import CONFIG, FLAGS, contents, needs_gpt2, run_nodes, straight, write_texts

from nanogpt_fast.data import token_writer
from nanogpt_fast.data.nodes import Node, claimed, node_of
from nanogpt_fast.data.preparation import prepare
from nanogpt_fast.data.splits import open_split
from nanogpt_fast.errors import ConfigError, DataError
from nanogpt_fast.prepare import main
from nanogpt_fast.settings.config import DataConfig

pytestmark = needs_gpt2


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(monkeypatch)


def test_a_missing_node_is_named_and_ends_in_3(capsys: pytest.CaptureFixture) -> None:
    assert main([*FLAGS, "--node=2/3"]) == 0
    told = capsys.readouterr().out
    assert "part 2/3 is done" in told and "still missing here: 1/3 (not here), 3/3 (not here)" in told
    Path("many/mine/parts/3of3/.partial").mkdir(parents=True)
    with pytest.raises(DataError, match="2 of 3 parts cannot be joined yet") as error:
        main([*FLAGS, "--join"])
    assert error.value.exit_code == 3 and "1/3 (not here), 3/3 (unfinished)" in str(error.value)
    with pytest.raises(DataError, match=r"did not finish\n.*\n.*\n  found: .*parts/2of3"):
        open_split(DataConfig(dataset=str(Path("many/mine").resolve())), "train")
    with pytest.raises(DataError, match="there are no parts to join"):
        prepare(replace(CONFIG, join=True, out="nothing/mine"))
    assert not Path("nothing/mine").exists()


def two_parts() -> Path:
    """Both of two, not joined yet; gives the second."""
    run_nodes([1], 2)
    run_nodes([2], 2, out="other/mine")
    return Path(shutil.copytree("other/mine/parts/2of2", "many/mine/parts/2of2"))


def test_a_flipped_bit_in_a_part_is_named_and_the_part_made_again() -> None:
    expected, part = straight(), two_parts()
    data = bytearray((part / "part.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (part / "part.bin").write_bytes(data)
    with pytest.raises(DataError, match=r"a part is not as it was made\n  where: .*2of2/part.bin") as error:
        prepare(replace(CONFIG, join=True))
    assert "--node=2/2 --force" in str(error.value) and not Path("many/mine/train.bin").exists()
    assert run_nodes([2], 2, force=True) == [None]
    assert prepare(replace(CONFIG, join=True)) and contents("many/mine") == expected


@pytest.mark.parametrize("damage", ["cut", "gone", "meta.json"])
def test_a_part_that_is_not_whole_is_named_and_the_same_command_makes_it(damage: str) -> None:
    expected, part = straight(), two_parts()
    if damage == "cut":
        os.truncate(part / "part.bin", 10)
    elif damage == "gone":
        (part / "part.bin").unlink()
    else:
        (part / "meta.json").write_text('{"format": 1')
    with pytest.raises(DataError, match=r"1 of 2 parts .*\n.*\n  found: +2/2 \(damaged\)\n.*--node=2/2"):
        prepare(replace(CONFIG, join=True))
    assert run_nodes([2], 2)[-1] and contents("many/mine") == expected


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"val_fraction": 0.2}, r"expected: val_fraction 0\.1\n  found: +val_fraction 0\.2"),
        ({"format": "llmc"}, "expected: format bin"),
        ({"seed": 1}, "expected: seed 2357"),
        ({"source": "changed"}, "expected: .*listing "),
    ],
)
def test_a_part_made_otherwise_is_refused_by_name(changes: dict[str, Any], told: str) -> None:
    shutil.copytree("texts", "changed")
    with open("changed/3.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    run_nodes([1], 2)
    run_nodes([2], 2, out="other/mine", **changes)
    shutil.copytree("other/mine/parts/2of2", "many/mine/parts/2of2")
    with pytest.raises(DataError, match=rf"a part was made otherwise\n  where: .*2of2\n  {told}"):
        prepare(replace(CONFIG, join=True))
    with pytest.raises(DataError, match=rf"this node's part was made otherwise\n  where: .*2of2\n  {told}"):
        run_nodes([2], 2)
    with pytest.raises(DataError, match=rf"made otherwise\n  where: .*2of2\n  {told}"):
        run_nodes([1], 2)  # its own is done: it would join


def test_another_number_of_nodes_is_refused_until_forced() -> None:
    expected = straight()
    run_nodes([1, 3], 3)
    with pytest.raises(DataError, match=r"another number of nodes(.*\n)*  expected: --node=K/3\n  found: +--node=K/2"):
        run_nodes([1], 2)
    assert run_nodes([1, 2], 2, force=True) == [None, None]  # whose the others' parts are, it cannot tell
    assert sorted(p.name for p in Path("many/mine/parts").iterdir()) == ["1of2", "2of2"]
    assert prepare(replace(CONFIG, join=True)) and contents("many/mine") == expected


def test_two_processes_that_are_the_same_node() -> None:
    with claimed(Path("many/mine"), Node(2, 3)):
        with pytest.raises(DataError, match=r"another process is node 2/3 of this dataset\n  where: .*2of3"):
            run_nodes([2], 3)
        assert run_nodes([1], 3) == [None]
    assert not Path("many/mine/parts/2of3").exists()


def test_without_locks_no_node_joins(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(token_writer.filelock.FileLock, "acquire", refuse)
    run_nodes([1], 2)
    assert main([*FLAGS, "--node=2/2"]) == 0
    assert "all parts are here\nnext: with all in many/mine/parts, --join" in capsys.readouterr().out
    assert main([*FLAGS, "--join"]) == 0


def test_the_help_explains_it(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert all(word in told for word in ("--node STR", "--join", "many machines:", "FOLDER/parts/KofN", "--node=env"))


def test_which_node_this_is() -> None:
    assert node_of("2/8") == (2, 8) and str(Node(2, 8)) == "2/8"
    assert node_of("env", {"RANK": "0", "WORLD_SIZE": "4", "SLURM_PROCID": "9", "SLURM_NTASKS": "10"}) == (1, 4)
    assert node_of("env", {"SLURM_PROCID": "9", "SLURM_NTASKS": "10"}) == (10, 10)
    for text in ("", "0/8", "9/8", "2", "2/", "-1/8", "1/0", "٢/8", "2 / 8", "slurm"):
        with pytest.raises(ConfigError, match="--node does not say"):
            node_of(text)
    for environ in ({}, {"RANK": "0"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}):
        with pytest.raises(ConfigError, match=r"found: +RANK"):
            node_of("env", environ)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([*FLAGS, "--node=1/6"], r"more parts than files of text(.*\n)*  expected: at most 5"),
        ([*FLAGS, "--node=1/2", "--join"], "leave one of them out"),
        ([*FLAGS, "--node=1/2", "--tokenizer=char"], "a character vocabulary needs the whole text first"),
        ([*FLAGS, "--node=1/2", "--max_tokens=9"], "--max_tokens counts from"),
        (["shakespeare", "--node=1/2"], "shakespeare is one text"),
        (["stdlib", "--join"], "a character vocabulary"),
        (["mine", "--source=texts/2.jsonl", "--node=1/1"], "split by position"),
        (["mine", "--source=one.txt", "--node=1/1"], "one text"),
    ],
)
def test_what_has_no_parts_says_why(argv: list[str], told: str) -> None:
    Path("one.txt").write_text("a text")
    with pytest.raises(ConfigError, match=told):
        main(argv)
    assert not [path for folder in ("many", "data") for path in Path(folder).glob("*")]
