"""sample's prompts from a file, batches, seeds, JSON lines and stop strings; what they refuse; how it starts."""

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import random_weights
from tiny_run import ENV
from torch import Tensor

from nanogpt_fast.command import importing, run_command
from nanogpt_fast.errors import ConfigError, DataError
from nanogpt_fast.generate import Text
from nanogpt_fast.model import GPT
from nanogpt_fast.prompts import read_prompts
from nanogpt_fast.sample import main
from nanogpt_fast.settings.sampling import stop_strings
from nanogpt_fast.weights import formats

LETTERS = ["\n", *map(chr, range(97, 97 + 19))]
TEXTS = ["abc", "de", "sssssssssssssss", "q"]  # of unequal length, within the block of 16


class Bytes:
    """An id a byte, 256 to end a document."""

    vocab_size, eot = 257, 256

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.fixture
def run(tmp_path: Path) -> list[str]:
    """Flags that sample from a saved run, in JSON."""
    formats.write(
        random_weights(vocab_size=20, tokenizer={"kind": "char", "itos": LETTERS}), tmp_path / "out", "native"
    )
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS) + "\n")
    return [f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--max_new_tokens=25", "--format=jsonl"]


def sampled(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    """The rows that the command prints."""
    main([*words])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# ---- stop strings ----


def test_what_a_shell_can_say():
    assert stop_strings(None) == () and stop_strings("User:") == ("User:",)
    assert stop_strings(r"\n\n") == ("\n\n",) and stop_strings(r"a\\n\t\x41\u00e9\q") == ("a\\n\tAé\\q",)
    assert stop_strings(r'["\n\n", "User:"]') == ("\n\n", "User:") and stop_strings("['a']") == ("a",)
    assert stop_strings("[") == ("[",) and stop_strings("[x") == ("[x",)


@pytest.mark.parametrize("spec", ["", "[]", '[""]', '["a", ""]', "[1]", "[a]", "[\"a'"[:3] + "]"])
def test_a_stop_that_is_none(spec: str):
    with pytest.raises(ConfigError, match="names no text to stop at"):
        main([f"--stop={spec}"])


def taken(data: bytes, stop: list[str], limit: int = 10**6) -> tuple[Text, list[str]]:
    text, pieces = Text(Bytes(), limit, stop), []  # type: ignore[arg-type]
    for token in data:
        if text.finish_reason:
            break
        pieces.append(text.take(token))
    return text, pieces


def test_a_stop_string_lies_across_tokens_and_none_of_it_is_given_out():
    text, pieces = taken(b"say ENDING END. END! more", ["END!", "."])
    assert "".join(pieces) == "say ENDING END" and text.finish_reason == "stop" and len(text.ids) == 15
    text, pieces = taken(b"aab aaab", ["aaab"])
    assert pieces == ["", "", "aab", " ", "", "", "", ""], "given out as soon as it cannot begin one"
    text, pieces = taken("né漢".encode(), ["漢"])
    assert "".join(pieces) == "né"


def test_an_end_by_length_gives_what_was_held():
    text, pieces = taken(b"abEN", ["END"], 4)
    assert pieces == ["a", "b", "", "EN"] and text.finish_reason == "length"
    text, pieces = taken(b"ab\xe6", ["\ufffd"], 3)
    assert "".join(pieces) == "ab" and text.finish_reason == "stop", "half a character is one at the end"
    assert Text(Bytes(), 0).finish_reason == "length"  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_it_ends_before_the_first_stop_string(data: str, stops: list[str]):
    text, pieces = taken(data.encode(), stops, max(1, len(data)))
    ends = [data.find(stop) + len(stop) for stop in stops if stop in data]
    # Tokens are bytes here: the text ends with the token that completes one, before the one of these that begins first.
    begins = min((data.find(stop) for stop in stops if stop in data[: min(ends, default=0)]), default=len(data))
    assert "".join(pieces) == data[:begins] and (text.finish_reason == "stop") == bool(ends)


def test_the_command_stops(run: list[str], capsys: pytest.CaptureFixture[str]):
    (free, other) = sampled(capsys, *run, "--num_samples=2", "--start=abc", "--seed_per_sample")
    stop = free["text"][5:7]
    (held, unlike) = sampled(capsys, *run, "--num_samples=2", "--start=abc", "--seed_per_sample", f"--stop=['{stop}']")
    assert held["text"] == free["text"][: free["text"].find(stop)] and held["finish_reason"] == "stop"
    assert held["tokens"] == len(held["text"]) + 2 and other["text"].startswith(unlike["text"])
    main([*run, "--format=text", "--num_samples=1", "--start=abc", f"--stop=['{stop}']"])
    assert capsys.readouterr().out == f"abc{held['text']}\n---------------\n"


# ---- batches, seeds, rows ----


def test_a_sample_does_not_depend_on_its_batch(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = [*run, f"--prompts={tmp_path / 'prompts.txt'}", "--num_samples=3", "--dtype=float32"]
    flags += ["--top_p=0.95", "--min_p=0.001", "--repetition_penalty=1.1", "--seed=7"]
    alone = sampled(capsys, *flags, "--seed_per_sample")
    assert [(row["prompt_index"], row["sample_index"]) for row in alone] == [(p, s) for p in range(4) for s in range(3)]
    assert [row["seed"] for row in alone] == [*range(7, 19)] and len({row["text"] for row in alone}) == 12
    assert [row["prompt"] for row in alone[::3]] == TEXTS
    for batch_size in (2, 5, 50):
        for row, want in zip(sampled(capsys, *flags, f"--batch_size={batch_size}"), alone, strict=True):
            assert row.pop("logprob") == pytest.approx(want["logprob"], abs=1e-3)
            assert row == {key: want[key] for key in row}
    (again,) = sampled(capsys, *flags[:4], *flags[5:], "--num_samples=1", "--start=q", "--seed=17")
    assert again["text"] == alone[10]["text"], "a row's seed draws it alone"


def test_without_new_flags_one_generator_goes_through_all(run: list[str], capsys: pytest.CaptureFixture[str]):
    """The texts of the JSON form are those of nanoGPT's form, which test_sample.py holds to the bit."""
    rows = sampled(capsys, *run, "--num_samples=3", "--start=ab")
    main([*run, "--format=text", "--num_samples=3", "--start=ab"])
    assert capsys.readouterr().out == "".join(f"ab{row['text']}\n---------------\n" for row in rows)
    assert {row["seed"] for row in rows} == {1337} and len({row["text"] for row in rows}) == 3
    assert all(row["finish_reason"] == "length" and row["tokens"] == 25 and row["logprob"] < 0 for row in rows)


@pytest.mark.usefixtures("signals_heeded")
def test_an_interrupted_run_leaves_whole_lines(
    run: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Ctrl-C within the second batch: the first one's lines are there, and no part of another."""
    stream, calls = GPT.stream, iter(range(10**6))

    def struck(*args: Any, **kwargs: Any) -> Iterator[Tensor]:
        for drawn in stream(*args, **kwargs):
            if next(calls) == 35:  # a batch has 25
                os.kill(os.getpid(), signal.SIGINT)
            yield drawn

    monkeypatch.setattr(GPT, "stream", struck)
    monkeypatch.setattr(sys, "argv", ["sample", *run, "--batch_size=2", "--num_samples=6"])
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    out = capsys.readouterr().out
    assert stop.value.code == 130 and out.endswith("}\n")
    assert [json.loads(line)["sample_index"] for line in out.splitlines()] == [0, 1]


@pytest.mark.usefixtures("signals_heeded")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_for_the_end_of_an_import(
    number: int, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def main(argv: list[str]) -> None:
        with importing():
            os.kill(os.getpid(), number)
            print("imported")
        print("went on")

    monkeypatch.setattr(sys, "argv", ["sample"])
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    signal.signal(number, before)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (code, "imported\n") and gc.isenabled()
    assert err.startswith(f"interrupted ({signal.Signals(number).name})")


# ---- files of prompts ----


def test_forms_of_a_file(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("one \r\n\n  \ntwo é\nlast".encode())
    found = read_prompts(str(tmp_path / "a.txt"), "prompt")
    assert [(p.text, p.where.split(", ")[-1]) for p in found] == [
        ("one ", "line 1"),
        ("two é", "line 4"),
        ("last", "line 5"),
    ]
    (tmp_path / "a.jsonl").write_text('{"prompt": "x\\ny"}\n\n{"prompt": "", "text": "t"}\n')
    assert [p.text for p in read_prompts(str(tmp_path / "a.jsonl"), "prompt")] == ["x\ny", ""]
    with pytest.raises(DataError, match=r"no field 'text'[\s\S]*line 1[\s\S]*--field=NAME"):
        read_prompts(str(tmp_path / "a.jsonl"), "text")


def test_files_that_hold_no_prompts(tmp_path: Path):
    for name, content in (("empty.txt", ""), ("blank.txt", "\n \n"), ("empty.jsonl", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match="the file has no prompts"):
            main([f"--prompts={tmp_path / name}"])
    with pytest.raises(ConfigError, match=r"did you mean 'empty\.txt'"):
        main([f"--prompts={tmp_path / 'emty.txt'}"])
    with pytest.raises(ConfigError, match="both say what to continue"):
        main([f"--prompts={tmp_path / 'empty.txt'}", "--start=x"])


def test_a_character_outside_the_vocabulary_is_told_by_its_line(run: list[str], tmp_path: Path):
    (tmp_path / "bad.txt").write_text("abc\n\nabZc\n")
    with pytest.raises(DataError, match=r"'Z' is not in the vocabulary[\s\S]*bad\.txt, line 3, position 2"):
        main([*run, f"--prompts={tmp_path / 'bad.txt'}"])


def test_prompts_longer_than_the_block(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "long.txt").write_text("abcdefgh" * 5 + "\nab\n")
    main([*run, f"--prompts={tmp_path / 'long.txt'}", "--num_samples=1", "--batch_size=2", "--repetition_penalty=1.5"])
    out, err = capsys.readouterr()
    assert "1 of 2 prompts are longer than 16 tokens; the model sees the last ones" in err
    (alone,) = sampled(capsys, *run, f"--start={'abcdefgh' * 2}", "--num_samples=1", "--repetition_penalty=1.5")
    assert json.loads(out.splitlines()[0])["text"] == alone["text"]


@pytest.mark.parametrize(
    "flag",
    ["--top_p=0", "--top_p=1.1", "--top_p=nan", "--min_p=-0.1", "--min_p=1.1", "--repetition_penalty=0",
     "--repetition_penalty=inf", "--batch_size=0"],
)  # fmt: skip
def test_ranges(flag: str):
    with pytest.raises(ConfigError, match=f"{flag.partition('=')[0]} is out of range"):
        main([flag])


# ---- start ----


def test_what_is_not_imported():
    """By --help nothing of torch; by a sample nothing that it does not need: torch itself is most of its start."""
    code = (
        "import sys\nfrom nanogpt_fast.sample import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'rich.progress', 'safetensors'} & set(sys.modules)\n"
        "import nanogpt_fast.samples\n"
        "unwanted = {'transformers', 'huggingface_hub', 'tiktoken', 'triton', 'rich.progress', 'torch._dynamo',\n"
        "            'torch._inductor', 'torch.utils.tensorboard', 'matplotlib', 'pyarrow', 'datasets'}\n"
        "print(sorted(unwanted & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n" and "--repetition_penalty" in done.stdout
