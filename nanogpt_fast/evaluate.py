"""Evaluate a model: `python -m nanogpt_fast.evaluate --out_dir=out [--split=val | --file=TEXT]`.

Loss in nats a token, perplexity, and bits per byte of the text behind the tokens, which compares models whatever
their tokenizers. Over a whole split in order, or over nanoGPT's random batches (--eval_mode=random). With --tasks the
table of GPT-2's paper, and lm-eval's tasks (zeroshot/, docs/evaluate.md).
"""

import textwrap
from collections import deque
from dataclasses import fields

from nanogpt_fast.command import importing, run_command
from nanogpt_fast.settings import cli
from nanogpt_fast.settings.evaluating import EvaluateConfig
from nanogpt_fast.zeroshot.published import TASKS

PROG = "python -m nanogpt_fast.evaluate"


def main(argv: list[str]) -> None:
    """Evaluate and print a table, or JSON lines."""
    config = parse_config(argv)
    with importing():  # torch, a second that --help and a wrong flag do without
        from nanogpt_fast.evaluation import evaluate

    evaluate(config)


def parse_config(argv: list[str]) -> EvaluateConfig:
    """The flags, over the values that `--config NAME` (or a leading NAME) shares with a training configuration."""
    trained: list[str] = []
    rest: list[str] = []
    words = deque(argv)
    while words:
        word = words.popleft()
        if word.partition("=")[0] == "--config":
            trained += [word, words.popleft()] if word == "--config" and words else [word]
        else:
            (rest if rest or word.startswith("-") else trained).append(word)  # bare words are names at the start only
    default = None
    if trained:
        flat = cli.load_config(trained, prog=PROG).flat()
        flat.pop("activation")  # of a model from scratch; here it would overrule the weights'
        shared = {f.name: flat[f.name] for f in fields(EvaluateConfig) if f.name in flat}
        if shared["init_from"] == "scratch":
            shared["init_from"] = "resume"  # the run it would train is the run to evaluate
        default = EvaluateConfig(**shared)
    description = "Evaluate a model: loss in nats a token, perplexity, bits per byte."
    epilog = "--config NAME (or a leading NAME) takes values from a training\nconfiguration.\n\n" + textwrap.fill(
        f"tasks: {', '.join(TASKS)}; with pip install 'nanogpt-fast[eval]' those of lm-eval: lambada_openai, "
        "hellaswag, wikitext ... (lm-eval ls tasks). docs/evaluate.md", 80)  # fmt: skip
    return cli.parse(EvaluateConfig, rest, prog=PROG, description=description, epilog=epilog, default=default)


if __name__ == "__main__":
    run_command(main, again="nothing is kept of it; the same command evaluates anew")
