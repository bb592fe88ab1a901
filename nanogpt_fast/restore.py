"""What --init_from names, as weights: one door for train, sample and evaluate.

resume           out_dir's newest checkpoint that verifies, else nanoGPT's out_dir/ckpt.pt
best             out_dir's checkpoint of the lowest validation loss, as weights to start from
gpt2 ... gpt2-xl OpenAI's weights from the Hugging Face hub
anything else    a path: a run of ours or one step of it, nanoGPT's ckpt.pt, a Hugging Face folder, llm.c's .bin
"""

import dataclasses
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt_fast.data.tokenizer import Tokenizer, from_json
from nanogpt_fast.errors import CheckpointError, ConfigError, DataError, did_you_mean
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import REFERENCE, Ops
from nanogpt_fast.run import checkpoint
from nanogpt_fast.settings.config import Config, GPTConfig
from nanogpt_fast.weights import formats
from nanogpt_fast.weights.canonical import GPT2_PADDED, GPT2_VOCAB, Weights, dataset_meta
from nanogpt_fast.weights.huggingface import HUB


@dataclass
class Restored:
    """Weights and what came with them. Tensors are on the CPU, float32; copy them where they belong."""

    config: GPTConfig
    model: dict[str, Tensor]  # by name
    optimizer: dict[str, Tensor] | None  # exp_avg.NAME, exp_avg_sq.NAME
    step: int  # iterations the weights have behind them
    state: dict[str, Any]  # what the trainer saved beside them
    run_config: dict[str, Any]  # flat configuration of the run they come from, {} when unknown
    tokenizer_json: dict[str, Any] | None  # None: no file says what the ids stand for
    source: str  # what was loaded, for people
    activation_known: bool = True  # False: config's is nanoGPT's present one, for want of a word in the file

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the model was trained with. Raises DataError when it is unknown or does not fit the model."""
        vocab_size = self.config.vocab_size
        if self.tokenizer_json is None:
            dataset = self.run_config.get("dataset", "its dataset")
            raise DataError(
                f"what the model's {vocab_size} ids stand for is unknown",
                where=self.source,
                expected=f"a tokenizer in the checkpoint, a meta file of {dataset}, or GPT-2's {GPT2_VOCAB} ids",
                hint="give the parent of the dataset's folder by --data_dir",
            )
        tokenizer = from_json(self.tokenizer_json)
        if tokenizer.vocab_size > vocab_size:
            raise DataError(
                "the tokenizer has more ids than the model has embeddings",
                where=self.source,
                expected=f"at most {vocab_size}",
                found=f"{tokenizer.vocab_size}, kind {self.tokenizer_json['kind']!r}",
                hint="the dataset was prepared again, or --data_dir is another project's",
            )
        return tokenizer


def restore(
    init_from: str, out_dir: str, data_dir: str = "data", step: int = 0, *, optimizer: bool = True, activation: str = ""
) -> Restored:
    """The weights that init_from names; those of `resume` with their optimizer, unless nobody needs it, and of this
    `step`, where it is given. activation: the GELU to run them with instead of their file's. Raises CheckpointError;
    ConfigError for scratch, which has none.
    """
    found = _restore(init_from, Path(out_dir), data_dir, step, optimizer)
    if activation:
        found.config, found.activation_known = replace(found.config, activation=activation), True
    return found


def _restore(init_from: str, out_dir: Path, data_dir: str, step: int, optimizer: bool) -> Restored:
    if init_from == "scratch":
        raise ConfigError(
            "a model from scratch has no weights to load",
            where="--init_from=scratch",
            expected=f"resume, best, {', '.join(HUB)} or a path",
        )
    if init_from == "resume":
        return _resume(out_dir, data_dir, step, optimizer)
    if init_from == "best":
        return _best(out_dir, data_dir)
    on_hub = init_from.removeprefix("openai-community/") in HUB
    if not on_hub and not Path(init_from).exists():
        raise CheckpointError(
            f"--init_from names nothing that is there{did_you_mean(init_from, ['resume', 'best', 'scratch', *HUB])}",
            where=f"--init_from={init_from}",
            expected=f"resume, best, {', '.join(HUB)}, or a path: a run, ckpt.pt, Hugging Face folder or llm.c's .bin",
        )
    form = formats.sniff(init_from)
    if form == "native":
        return _from_native(Path(init_from), data_dir, False)
    source = f"{init_from} from the Hugging Face hub" if on_hub else f"{formats.FORMATS[form]} {init_from}"
    return _from_weights(formats.read(init_from, False), source, data_dir)


def _resume(out_dir: Path, data_dir: str, step: int, optimizer: bool) -> Restored:
    steps = checkpoint.readable_steps(out_dir)
    if step and step not in steps:
        raise CheckpointError(
            f"there is no checkpoint of step {step}",
            where=f"--out_dir={out_dir}, --resume_step={step}",
            expected="one of the run's steps",
            found=", ".join(map(str, steps)) or "none",
        )
    if step:
        return _from_native(steps[step], data_dir, optimizer)
    if steps:
        return _from_native(out_dir, data_dir, optimizer)
    if (out_dir / "ckpt.pt").is_file():
        found = formats.read(out_dir / "ckpt.pt", optimizer)
        return _from_weights(found, f"nanoGPT's {out_dir / 'ckpt.pt'}, imported at iteration {found.step}", data_dir)
    runs = _runs_near(out_dir)
    raise CheckpointError(
        "there is no checkpoint to resume from",
        where=f"--out_dir={out_dir}",
        expected=f"{out_dir}/checkpoints/step_..., or nanoGPT's {out_dir}/ckpt.pt",
        found=f"neither; runs beside it: {', '.join(runs)}" if runs else "neither",
        hint=checkpoint.bring_back(out_dir)
        or "name the run by --out_dir, or train first: python -m nanogpt_fast.train --config quickstart",
    )


def _best(out_dir: Path, data_dir: str) -> Restored:
    path = checkpoint.best(out_dir)
    if path is None:
        steps = checkpoint.readable_steps(out_dir)
        raise CheckpointError(
            "there is no best checkpoint",
            where=f"--out_dir={out_dir}",
            expected="a checkpoint saved with a validation loss",
            found=f"none with one among {len(steps)}" if steps else "no checkpoint",
            hint="--init_from=resume takes the newest" if steps else "",
        )
    return _from_native(path, data_dir, False)


def _runs_near(out_dir: Path) -> list[str]:
    """Up to 5 folders beside out_dir that hold a run, the latest written first."""
    parent = out_dir.parent
    folders = [p for p in (parent.iterdir() if parent.is_dir() else []) if p.is_dir() and p != out_dir]
    runs = []
    for folder in folders:
        with suppress(OSError):  # not ours to look into
            runs += [folder] * bool(checkpoint.list_steps(folder) or (folder / "ckpt.pt").is_file())
    return [str(p) for p in sorted(runs, key=lambda p: p.stat().st_mtime, reverse=True)][:5]


def _from_native(path: Path, data_dir: str, optimizer: bool) -> Restored:
    found, path = formats.read_native(path, optimizer)
    return _from_weights(found, f"{path}, iteration {found.step}", data_dir)


def _from_weights(found: Weights, source: str, data_dir: str) -> Restored:
    best = found.best_val_loss if math.isfinite(found.best_val_loss) else None
    return Restored(
        config=found.model_args,
        model=found.model,
        optimizer=found.optimizer,
        step=found.step,
        state={**found.state, "optimizer_step": found.optimizer_step, "best_val_loss": best},
        run_config=found.config,
        tokenizer_json=_tokenizer_json(found, data_dir),
        source=source,
        activation_known=found.activation_known,
    )


def _tokenizer_json(found: Weights, data_dir: str) -> dict[str, Any] | None:
    """The checkpoint's own; else its dataset's; else GPT-2's, where the vocabulary has that size."""
    if found.tokenizer is not None:
        return found.tokenizer
    if meta := dataset_meta(found.config, data_dir):
        return meta.tokenizer
    return {"kind": "gpt2"} if found.is_gpt2_vocab else None


def build_model(
    restored: Restored, device: torch.device, dtype: torch.dtype, ops: Ops = REFERENCE, dropout: float = 0.0
) -> GPT:
    """The model on the device, evaluating; matrices in dtype, vectors in float32, as the ops take them."""
    model = GPT(dataclasses.replace(restored.config, dropout=dropout), ops)
    model.load_state_dict(restored.model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype if parameter.dim() > 1 else torch.float32)
    return model.eval()


def shape_of(config: Config, restored: Restored | None, vocab_size: int | None, say: Any) -> GPTConfig:
    """The model's shape: the flags', or the loaded weights' with the flags' dropout and a smaller block_size."""
    m, block_size = config.model, config.data.block_size
    if restored is None:
        say("Initializing a new model from scratch")
        if not m.vocab_size and vocab_size is None:
            say(f"defaulting to vocab_size of GPT-2 to {GPT2_PADDED} (50257 rounded up for efficiency)")
        return config.shape(m.vocab_size or vocab_size or GPT2_PADDED)
    loaded = restored.config
    if m.activation == "gelu_tanh" and not restored.activation_known:  # the flag's default says nothing, this does
        restored.config = loaded = replace(loaded, activation=m.activation)
    if block_size > loaded.block_size:
        raise ConfigError(
            "block_size is longer than the loaded model's positions",
            where=f"block_size = {block_size}, {restored.source}",
            expected=f"at most {loaded.block_size}",
            hint=f"--block_size={loaded.block_size}",
        )
    for key in ("n_layer", "n_head", "n_embd", "bias", "norm_bias", "tie_word_embeddings", "activation"):
        if getattr(m, key) != getattr(loaded, key):
            say(f"{key} = {getattr(loaded, key)}, as the loaded weights have it")
    return replace(loaded, dropout=m.dropout, block_size=block_size)
