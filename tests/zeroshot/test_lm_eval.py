"""lm-eval on our model beside lm-eval on transformers' (extra `eval`, and accelerate, which its HFLM needs).

REAL_GPT2_DIR as in tests/weights/test_real_model.py: then a pretrained model is compared too.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from random_weights import random_weights
from task_texts import LAMBADA_ROWS, WIKITEXT, write_task_texts

from nanogpt_fast import evaluate
from nanogpt_fast.data.tokenizer import gpt2_tokenizer
from nanogpt_fast.errors import ConfigError, DataError
from nanogpt_fast.restore import build_model, restore
from nanogpt_fast.weights import formats
from nanogpt_fast.zeroshot import harness
from nanogpt_fast.zeroshot.tasks import Tasks

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed: pip install -e '.[eval]' accelerate")
pytest.importorskip("accelerate", reason="lm-eval's HFLM needs accelerate")
transformers = pytest.importorskip("transformers")

ENDINGS = ["is using wrap to wrap skis.", "rips tiles off.", "is holding a cube.", "starts pulling up roofing."]
HELLASWAG = [
    {"ind": i, "activity_label": "Roof removal", "ctx_a": "A man sits on a roof.", "ctx_b": "he", "endings": ENDINGS,
     "ctx": "A man sits on a roof. he", "source_id": "a", "split": "val", "split_type": "indomain", "label": str(i)}
    for i in range(4)
]  # fmt: skip
ROWS = {
    "lambada_openai": LAMBADA_ROWS,
    "wikitext": [{"page": WIKITEXT}, {"page": WIKITEXT * 9}],
    "hellaswag": HELLASWAG,
}


def told(done: int, of: int) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 in hf/, a file for each of ROWS."""
    folder = tmp_path_factory.mktemp("harness")
    formats.write(random_weights(vocab_size=50257, block_size=64, optimizer=False), folder / "hf", "hf")
    write_task_texts(folder / "texts")
    for task, rows in ROWS.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def theirs(model: Any, folder: Path, length: int) -> Any:
    """lm-eval's HFLM of a transformers model, with GPT-2's tokenizer as our export writes it."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    return HFLM(pretrained=model.eval(), tokenizer=tokenizer, device="cpu", batch_size=3, max_length=length)


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Any, Any]:
    """(lm-eval's LM on transformers, on ours) of hf/."""
    restored = restore(str(folder / "hf"), "out", optimizer=False)
    ours = build_model(restored, torch.device("cpu"), torch.float32)
    hf = transformers.GPT2LMHeadModel.from_pretrained(folder / "hf", dtype=torch.float32)
    return theirs(hf, folder, 64), harness.adapter()(ours, gpt2_tokenizer(), told)


def requests(*args: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=one) for one in args]


def test_its_three_requests_are_answered_as_by_transformers(both: tuple[Any, Any]):
    hf, ours = both
    asked = requests(("A man sits on a roof. he", " is holding"), ("A man sits on a roof. he", " starts pulling up"),
                     ("", "No context"), ("word " * 90, "and long"), ("trailing space ", "here"))  # fmt: skip
    for (a, hit), (b, same) in zip(hf.loglikelihood(asked, disable_tqdm=True), ours.loglikelihood(asked)):
        assert b == pytest.approx(a, abs=1e-3) and hit == same
    texts = requests((WIKITEXT,), (WIKITEXT * 9,), ("x",))
    np.testing.assert_allclose(ours.loglikelihood_rolling(texts), hf.loglikelihood_rolling(texts, True), atol=1e-3)
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    prompts = requests(("A man sits on a roof", settings), ("Why", settings))
    assert ours.generate_until(prompts) == hf.generate_until(prompts, disable_tqdm=True)


def test_generation_ends_before_what_until_names(both: tuple[Any, Any]):
    _, ours = both
    (whole,) = ours.generate_until(requests(("A man", {"until": [], "max_gen_toks": 20})))
    end = whole[7:9]
    (cut,) = ours.generate_until(requests(("A man", {"until": ["never that", end], "max_gen_toks": 20})))
    assert cut == whole[: whole.find(end)]


@pytest.mark.parametrize("name", list(ROWS))
def test_its_tasks_from_files_give_transformers_figures(name: str, both: tuple[Any, Any], folder: Path):
    import lm_eval

    hf, ours = both
    asked = {"path": folder / f"{name}.jsonl", "limit": 0, "few_shot": -1}
    figures, version = harness.run(name, ours.model, gpt2_tokenizer(), told=told, **asked)
    task = harness._from_file(name, asked["path"])
    theirs = lm_eval.simple_evaluate(
        hf, tasks=[task], log_samples=False, bootstrap_iters=0, task_manager=harness.manager()
    )
    expected = theirs["results"][name]
    assert version == f"lm-eval {lm_eval.__version__}"
    assert {figure.metric for figure in figures} == {
        key.partition(",")[0] for key, value in expected.items() if ",none" in key and "stderr" not in key
    }
    for figure in figures:
        assert figure.value == pytest.approx(expected[f"{figure.metric},none"], rel=1e-3)
        assert (figure.task, figure.count, figure.higher) == (name, len(ROWS[name]), "acc" in figure.metric)


def test_ours_and_its_tasks_in_one_table(folder: Path, capsys: pytest.CaptureFixture[str]):
    evaluate.main([f"--init_from={folder / 'hf'}", "--tasks=lambada,lambada_openai", "--json",
                   f"--source={folder / 'texts'},lambada_openai={folder / 'lambada_openai.jsonl'}"])  # fmt: skip
    out = capsys.readouterr()
    cells = {(row["task"], row["metric"]): row for row in map(json.loads, out.out.splitlines())}
    ours, its = cells["lambada", "perplexity/word"], cells["lambada_openai", "perplexity"]
    assert ours["value"] == pytest.approx(its["value"], rel=1e-4), "one text, one rule"
    assert cells["lambada", "accuracy/word"]["value"] == cells["lambada_openai", "acc"]["value"]
    assert len(its["sha256"]) == 64


def test_what_is_refused(folder: Path):
    with pytest.raises(ConfigError, match="did you mean 'lambada_openai'"):
        Tasks("lambada_openia")
    restored = restore(str(folder / "hf"), "out", optimizer=False)
    model = build_model(restored, torch.device("cpu"), torch.float32)
    for name, text, error, said in (
        ("x.txt", "text", ConfigError, "read rows"),
        ("x.jsonl", '{"other": "field"}\n', DataError, "could not run task lambada_openai"),
    ):
        (folder / name).write_text(text)
        with pytest.raises(error, match=said):
            asked = {"path": folder / name, "limit": 0, "few_shot": -1}
            harness.run("lambada_openai", model, gpt2_tokenizer(), told=told, **asked)


@pytest.mark.slow
@pytest.mark.skipif("REAL_GPT2_DIR" not in os.environ, reason="REAL_GPT2_DIR names no folder of a pretrained GPT-2")
def test_a_pretrained_model_in_float32_and_bfloat16(folder: Path):
    """Log-likelihoods equal to 1e-3 in float32; what bfloat16 makes of the same is printed."""
    real = Path(os.environ["REAL_GPT2_DIR"])
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(real))
    hf.load_state_dict(torch.load(real / "pytorch_model.bin", map_location="cpu", weights_only=True), strict=False)
    restored = restore(str(real), "out", optimizer=False)
    c, draw = restored.config, np.random.default_rng(0)
    prefixes = [draw.integers(0, c.vocab_size, int(n)).tolist() for n in draw.integers(1, c.block_size - 8, 12)]
    asked = [(("", ""), p, draw.integers(0, c.vocab_size, int(k)).tolist()) for p in prefixes for k in (1, 3, 8, 2)]
    expected = theirs(hf, folder, c.block_size)._loglikelihood_tokens(asked, disable_tqdm=True)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(restored, torch.device("cpu"), dtype)
        found[dtype] = harness.adapter()(model, gpt2_tokenizer(), told)._loglikelihood_tokens(asked)
    ours, bf16 = found[torch.float32], found[torch.bfloat16]
    differ = max(abs(a - b) for (a, _), (b, _) in zip(expected, ours))
    moved = [b - a for (a, _), (b, _) in zip(ours, bf16)]
    print(f"{len(asked)} continuations, {np.mean([a for a, _ in ours]):.1f} nats on average: float32 differs from "
          f"transformers by at most {differ:.2g}; bfloat16 moves them by {np.mean(moved):+.3f} on average, at most "
          f"{np.abs(moved).max():.2f}")  # fmt: skip
    assert differ < 1e-3 and [hit for _, hit in ours] == [hit for _, hit in expected]
    assert np.abs(moved).max() > 1e-3, "bfloat16 is another model"
