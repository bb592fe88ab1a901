"""Many nodes write the files of one, whatever their number, their order and what cuts them off."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from many_nodes import CONFIG, FLAGS, FORMS, contents, environment, needs_gpt2, run_nodes, straight, write_texts

from nanogpt_fast.data import encode, nodes, preparation, token_writer
from nanogpt_fast.data.dataset import verify
from nanogpt_fast.data.documents import share
from nanogpt_fast.data.preparation import prepare
from nanogpt_fast.data.splits import open_split
from nanogpt_fast.settings.config import DataConfig

pytestmark = needs_gpt2


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(monkeypatch)


# ---- The same files ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("of", "order"), [(1, [1]), (2, [2, 1]), (3, [2, 1, 3]), (5, [5, 3, 1, 2, 4])])
def test_any_number_of_nodes_writes_the_bytes_of_one(form: str, of: int, order: list[int]) -> None:
    expected = straight(**FORMS[form])
    done = run_nodes(order, of, **FORMS[form])
    assert done[:-1] == [None] * (of - 1) and done[-1] == verify(Path("many/mine"))
    assert contents("many/mine") == expected  # meta.json, with its split and hashes, among them
    assert run_nodes([1], of, **FORMS[form]) == done[-1:]  # typed again
    with open_split(DataConfig(dataset=str(Path("many/mine").resolve())), "val") as val:  # type: ignore[union-attr]
        assert val.n_tokens == done[-1].splits["val"].tokens


def test_processes_and_plain_texts_change_nothing() -> None:
    """The last part is a single text, which is a document here."""
    for k, lines in enumerate((90, 1, 5000)):
        Path(f"texts/a{k}.txt").write_text(f"A file is a document. {k}\n" * lines)
    expected = straight()
    assert run_nodes([2, 1], 2, num_proc=2)[-1] and contents("many/mine") == expected


def start(*flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nanogpt_fast.prepare", *FLAGS, *flags]
    env = environment()
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_the_val_of_few_documents_is_that_of_one_machine() -> None:
    """Of 7 documents none is drawn: the one that would be first is val."""
    for k, count in enumerate((2, 1, 3, 1, 0)):
        Path(f"texts/{k}.jsonl").write_text("".join(json.dumps({"text": f"text {k}.{i}"}) + "\n" for i in range(count)))
    expected = straight()
    assert run_nodes([1, 2, 3], 3)[-1] and contents("many/mine") == expected


def test_a_node_whose_files_are_empty_has_an_empty_part() -> None:
    for k in (2, 3, 4):
        Path(f"texts/{k}.jsonl").write_text(json.dumps({"text": ""}) + "\n" * 20_000)
    expected = straight()
    assert run_nodes([3, 2, 1], 3)[-1] and contents("many/mine") == expected


def test_nodes_at_once_on_a_shared_folder() -> None:
    expected = straight()
    running = [start(f"--node={k}/3") for k in (1, 2, 3)]
    told = [run.communicate(timeout=60) for run in running]
    assert [run.returncode for run in running] == [0, 0, 0], told
    assert any("joined from 3 parts" in out for out, _ in told) and contents("many/mine") == expected


def test_folders_of_separate_disks_are_copied_together_and_joined(caplog: pytest.LogCaptureFixture) -> None:
    """Each machine has its own copy of the source, whose times may differ."""
    expected = straight()
    for k in (1, 2, 3):
        shutil.copytree("texts", f"disk{k}/texts", copy_function=shutil.copyfile)
        run_nodes([k], 3, source=f"disk{k}/texts", out=f"disk{k}/mine")
        shutil.copytree(f"disk{k}/mine/parts", "many/mine/parts", dirs_exist_ok=True)
    meta = prepare(replace(CONFIG, join=True))
    assert contents("many/mine") == expected and "part 1/3, 2/3, 3/3: the source's files had other times" in caplog.text
    assert prepare(replace(CONFIG, join=True)) == meta


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.data())
def test_parts_are_the_whole_once_and_about_equal(sizes: list[int], data: Any) -> None:
    of = data.draw(st.integers(1, len(sizes)))
    runs = [sizes[share(sizes, number, of)] for number in range(1, of + 1)]
    assert sum(runs, []) == sizes
    assert max(map(sum, runs)) <= sum(sizes) / of + max(sizes)


# ---- Cut off ----


def test_a_part_goes_on_where_it_was_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, write, begun = straight(), token_writer.TokenWriter.write, []
    real = encode.batches_by_document
    monkeypatch.setattr(preparation, "batches_by_document", lambda *args: (begun.append(args[3]), real(*args))[1])
    for cut in (3, 5):
        left = cut

        def failing(self: Any, split: str, tokens: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt
            write(self, split, tokens)

        monkeypatch.setattr(token_writer.TokenWriter, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            run_nodes([1], 2)
        assert [p.name for p in Path("many/mine").iterdir()] == ["parts"]
    monkeypatch.setattr(token_writer.TokenWriter, "write", write)
    assert run_nodes([1, 2], 2)[-1] and contents("many/mine") == expected
    assert 0 == begun[0] < begun[1] < begun[2]


@pytest.mark.parametrize("form", FORMS)
def test_a_join_cut_off_at_any_write_or_rename_goes_on(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = straight(**FORMS[form])
    run_nodes([1, 2], 3, **FORMS[form])
    run_nodes([3], 3, out="other/mine", **FORMS[form])
    shutil.copytree("other/mine/parts/3of3", "many/mine/parts/3of3")
    shutil.copytree("many", "before")
    reals, left, cuts = (token_writer.TokenWriter.write, os.replace, shutil.rmtree), 0, 0

    def cut(real: Any, *args: Any, **options: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        real(*args, **options)

    def killed() -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(token_writer.TokenWriter, "write", lambda *args: cut(reals[0], *args))
            patch.setattr(token_writer.os, "replace", lambda *args: cut(reals[1], *args))
            patch.setattr(nodes.shutil, "rmtree", lambda *args, **options: cut(reals[2], *args, **options))
            try:
                prepare(replace(CONFIG, join=True, **FORMS[form]))
            except KeyboardInterrupt:
                return True
        return False

    assert not killed()
    calls = -left
    for k in [*range(1, calls - 14, 15), *range(calls - 14, calls + 1)]:
        left = k
        shutil.rmtree("many")
        shutil.copytree("before", "many")
        cuts += killed()
        if Path("many/mine/meta.json").exists():
            verify(Path("many/mine"))
        prepare(replace(CONFIG, join=True, **FORMS[form]))
        assert contents("many/mine") == expected
    assert cuts > 30


def test_what_one_machine_began_a_join_ends_and_the_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, mark = straight(), token_writer.TokenWriter.mark

    def cut(self: Any, documents: int, state: Any) -> None:
        mark(self, documents, state)
        if documents > 40:
            raise KeyboardInterrupt

    run_nodes([1], 2)
    run_nodes([2], 2, out="other/mine")
    shutil.copytree("other/mine/parts/2of2", "many/mine/parts/2of2")
    for first in (False, True):
        shutil.copytree("many", f"both{first}")
        config = replace(CONFIG, out=f"both{first}/mine")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(token_writer.TokenWriter, "mark", cut)
            prepare(replace(config, join=first))
        assert json.loads(Path(f"both{first}/mine/.partial/journal.json").read_text())["documents"] > 40
        prepare(replace(config, join=not first))
        shutil.rmtree(f"both{first}/mine/parts", ignore_errors=True)
        assert contents(f"both{first}/mine") == expected


def test_a_disk_that_is_full_keeps_what_is_whole(tmp_path: Path) -> None:
    """A real ENOSPC, on a small file system of its own in a user namespace, that grows: in the join, then in a part."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("user namespaces (unshare -rm) are not permitted here")
    for k in range(5):
        Path(f"texts/{k}.jsonl").write_text(Path(f"texts/{k}.jsonl").read_text() * 20)
    expected = straight()
    command = f"'{sys.executable}' -m nanogpt_fast.prepare mine --source=texts --out=many/mine --node=1/1"
    script = (
        f"mkdir many && mount -t tmpfs -o size=100k tmpfs many || exit 77; {command}; echo $?; ls many;"
        f"mount -o remount,size=400k many; {command}; echo $?; ls many/mine many/mine/parts/1of1;"
        f"mount -o remount,size=2m many; {command} > /dev/null; echo $?; cp -r many/mine joined"
    )
    env = environment()
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True, env=env)
    if done.returncode == 77:
        pytest.skip("a tmpfs cannot be mounted here")
    whole = "many/mine:\nparts\n\nmany/mine/parts/1of1:\nmeta.json\npart.bin\n"
    assert done.stdout == f"3\n3\n{whole}0\n" and done.stderr.count("the disk is full") == 2, done.stdout + done.stderr
    assert contents("joined") == expected
