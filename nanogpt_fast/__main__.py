"""`python -m nanogpt_fast`: the commands, a line each; `python -m nanogpt_fast train ...` is `python -m
nanogpt_fast.train ...`."""

import importlib
import runpy
import sys

from nanogpt_fast import __version__
from nanogpt_fast.command import importing, run_command
from nanogpt_fast.errors import ConfigError, did_you_mean

COMMANDS = {
    "prepare": "turn text into token files",
    "plan": "from a budget to a model, its tokens, hours and loss",
    "train": "train, finetune or evaluate a GPT",
    "sample": "print text that a model continues",
    "evaluate": "loss, perplexity and bits per byte of a model on a text",
    "plot": "draw the curves of runs",
    "convert": "turn weights into nanoGPT's, Hugging Face's or llm.c's form, and back",
    "doctor": "what this machine offers, and whether a model trains on it",
    "verify": "whether the Triton kernels are right on this GPU",
    "tune": "measure launch rows of the Triton kernels on this GPU",
}
HELP = f"""usage: python -m nanogpt_fast COMMAND [--help] ...

{chr(10).join(f"  {name:<10}{does}" for name, does in COMMANDS.items())}

begin with:
  python -m nanogpt_fast prepare stdlib
  python -m nanogpt_fast train --config quickstart"""


def main(argv: list[str]) -> int:
    word = argv[0] if argv else "--help"
    if word in ("-h", "--help", "--version"):
        print(__version__ if word == "--version" else HELP)
        return 0
    if word not in COMMANDS:
        raise ConfigError(
            f"there is no command {word[:80]!r}{did_you_mean(word, COMMANDS)}",
            where="command line",
            expected=", ".join(COMMANDS),
            hint="python -m nanogpt_fast --help",
        )
    module, sys.argv = f"nanogpt_fast.{word}", argv
    with importing():  # what the file imports; run, it has a boundary of its own
        importlib.import_module(module)
    del sys.modules[module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    run_command(main)
