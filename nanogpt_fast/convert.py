"""Turn weights of one form into another: ours, nanoGPT's, Hugging Face's, llm.c's.

python -m nanogpt_fast.convert SRC DST --to native|nanogpt|hf|llmc
"""

from nanogpt_fast.command import importing, run_command
from nanogpt_fast.settings.cli import parse
from nanogpt_fast.settings.converting import ConvertConfig

PROG = "python -m nanogpt_fast.convert"
AGAIN = "DST is as it was or, in the last instant, new and whole; the same command starts over (a new DST: --force)"


def main(argv: list[str]) -> None:
    """Convert."""
    args = parse(ConvertConfig, argv, prog=PROG, description="Convert a model between formats.")
    with importing():  # torch, a second that --help and a wrong flag do without
        from nanogpt_fast.conversion import convert

    convert(args)


if __name__ == "__main__":
    run_command(main, again=AGAIN)
