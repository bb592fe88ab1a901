"""EleutherAI's lm-evaluation-harness (extra `eval`) on our model: its tasks, its prompts, its arithmetic.

Only the model is ours: Model answers its three kinds of request, by likelihood.py and generate.py.
"""

import contextlib
import functools
import json
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanogpt_fast.data.text_files import kind_of
from nanogpt_fast.data.tokenizer import Tokenizer
from nanogpt_fast.draw import Draw
from nanogpt_fast.errors import ConfigError, DataError, NanogptError, did_you_mean
from nanogpt_fast.generate import Text, continued, prompt_ids
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import exact_device
from nanogpt_fast.zeroshot.figures import Figure
from nanogpt_fast.zeroshot.likelihood import Request, Told, answers, window_losses

_FORMS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}  # of files, for datasets
TOGETHER = 8  # texts that are generated at a time


def library() -> Any:
    """lm_eval, quiet. Raises ImportError where it is not installed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import lm_eval
    import lm_eval.tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


@functools.cache
def manager() -> Any:
    """lm-eval's index of its tasks."""
    return library().tasks.TaskManager()


def check_names(names: list[str], ours: list[str]) -> None:
    """ConfigError for a task that neither lm-eval nor we have, or that only lm-eval has where it is not installed."""
    try:
        library()
    except ImportError as error:
        raise ConfigError(
            f"{names[0]} is no task of ours{did_you_mean(names[0], ours)}, and others need lm-eval",
            where="--tasks",
            expected=f"{', '.join(ours)}, or lm-eval for the rest",
            found=str(error),
            hint="pip install 'nanogpt-fast[eval]'",
        ) from error
    if unknown := [name for name in names if name not in manager().all_tasks]:
        known = [*ours, *manager().all_tasks]
        raise ConfigError(
            f"there is no such task{did_you_mean(unknown[0], known)}",
            where=f"--tasks, {unknown[0]}",
            expected=f"{', '.join(ours)}, or one of lm-eval's {len(known) - len(ours):,}",
            hint="lm-eval ls tasks",
        )


def run(
    name: str, model: GPT, tokenizer: Tokenizer, *, path: Path | None, limit: int, few_shot: int, told: Told
) -> tuple[list[Figure], str]:
    """The figures of one of lm-eval's tasks or groups, and its version. path: its test set, instead of the hub's."""
    task: str | dict[str, Any] = name
    if path is not None:
        task = _from_file(name, path)
    lm = adapter()(model, tokenizer, told)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is the report's
            found = library().simple_evaluate(
                model=lm, tasks=[task], limit=limit or None, num_fewshot=None if few_shot < 0 else few_shot,
                log_samples=False, bootstrap_iters=1000, task_manager=manager(),
            )  # fmt: skip
    except NanogptError:
        raise
    except Exception as error:  # of its templates, of datasets, of HTTP: no common base
        raise DataError(
            f"lm-eval could not run task {name}",
            where=f"{path or 'its data from the Hugging Face hub'}",
            found=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300],
            hint=f"--source={name}=FILE (.jsonl, .json, .csv, .parquet) with its rows' fields, if there is no hub",
        ) from error
    counts = {task: samples["effective"] for task, samples in found.get("n-samples", {}).items()}
    return figures(found["results"], counts), f"lm-eval {library().__version__}"


def _from_file(name: str, path: Path) -> dict[str, Any]:
    """The task, reading its test set from a file; few-shot examples come from there too."""
    form = _FORMS.get(kind_of(path))
    if form is None:
        raise ConfigError(
            "lm-eval's tasks read rows",
            where=f"--source={name}={path}",
            expected=f"a file of {', '.join(_FORMS)}",
            hint='one JSON object a line, with the names of the task\'s own fields: {"text": "..."}',
        )
    files = {"data_files": {"test": str(path.absolute())}}
    splits = {"test_split": "test", "validation_split": None, "training_split": None, "fewshot_split": "test"}
    changed = {"task": name, "dataset_path": form, "dataset_name": None, "dataset_kwargs": files, **splits}
    return {"group": f"{name}_from_a_file", "task": [changed]}  # alone, what is changed would be all of the task


def figures(results: dict[str, dict[str, Any]], counts: dict[str, int]) -> list[Figure]:
    """lm-eval's results as ours, with the examples of each task; `acc,none` with `acc_stderr,none` is one."""
    found = []
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not filtered:
                continue
            spread = values.get(f"{metric}_stderr,{filtered}")
            lower = "perplexity" in metric or metric.startswith("bits")
            stderr = float(spread) if isinstance(spread, int | float) else math.nan
            name = metric if filtered == "none" else f"{metric},{filtered}"
            found.append(Figure(task, name, float(value), stderr, counts.get(task, 0), not lower))
    return found


@functools.cache
def adapter() -> Callable[[GPT, Tokenizer, Told], Any]:
    """The class Model, a TemplateLM of lm-eval; made here, for importing ours must not import theirs."""
    library()
    from lm_eval.api.model import TemplateLM

    class Model(TemplateLM):
        """GPT as lm-eval asks it."""

        def __init__(self, model: GPT, tokenizer: Tokenizer, told: Told):
            super().__init__()
            self.model, self.ours, self.told = model, tokenizer, told
            self._device = model.transformer.wte.weight.device

        @property
        def eot_token_id(self) -> int:
            return prompt_ids(self.ours, "")[0]

        @property
        def max_length(self) -> int:
            return self.model.config.block_size

        @property
        def tokenizer_name(self) -> str:  # of its cache of requests
            return json.dumps(self.ours.to_json())

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return self.ours.encode_ordinary(string).tolist()

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            wanted = [Request(prefix, continuation) for _, prefix, continuation in requests]
            found = answers(self.model, wanted, told=self.told)
            greedy = [bool((a.likeliest == r.continuation).all()) for a, r in zip(found, wanted)]
            return [(answer.logprob, hit) for answer, hit in zip(found, greedy)]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            texts = [request.args[0] for request in requests]
            documents = [np.array([self.eot_token_id, *self.tok_encode(text)]) for text in texts]
            T, sums = self.max_length, [0.0] * len(documents)
            for loss in window_losses(self.model, documents, block_size=T, stride=T):
                sums[loss.document] -= loss.nll
            self.told(len(documents), len(documents))
            return sums

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """Up to one of settings' `until`; greedy unless do_sample asks for draws, seeded. Requests of one kind are
            decoded together, those of like lengths first, for the short wait for the long."""
            found, lots = [""] * len(requests), {}
            for i, request in enumerate(requests):
                lots.setdefault(json.dumps(request.args[1], default=str), []).append(i)
            for lot in lots.values():
                lot.sort(key=lambda i: len(requests[i].args[0]))
                for at in range(0, len(lot), TOGETHER):
                    part = lot[at : at + TOGETHER]
                    texts = self._generate([requests[i].args[0] for i in part], requests[part[0]].args[1])
                    for i, text in zip(part, texts):
                        found[i] = text
                    self.told(len(part), len(requests))
            return found

        def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else [end for end in until if end]
            most = min(int(settings.get("max_gen_toks", 256)), self.max_length - 1)
            warm = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
            draw = Draw(warm, int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0))
            texts = [Text(self.ours, most, until, stop_at_eot=True) for _ in contexts]
            prompts = [prompt_ids(self.ours, context)[-(self.max_length - most) :] for context in contexts]
            home = exact_device(self._device)
            seeds = [torch.Generator(home).manual_seed(i) for i in range(len(contexts))]
            parts = [""] * len(contexts)
            for row, piece in continued(self.model, self.ours, prompts, texts, draw, seeds):
                parts[row] += piece
            return parts

    return Model
