"""Train or finetune a GPT: `python -m nanogpt_fast.train --config NAME [--flag=value ...]`. Flags are nanoGPT's."""

from nanogpt_fast.command import importing, run_command
from nanogpt_fast.settings.cli import load_config

AGAIN = "what was saved stands; --init_from=resume goes on from it, the same command begins anew where nothing was"


def main(argv: list[str]) -> int:
    """Train, or say what a run would ask for. Returns the exit code."""
    config = load_config(argv)
    with importing():  # torch, a second that --help and a wrong flag do without
        from nanogpt_fast.dry_run import describe
        from nanogpt_fast.training import train

    if config.system.dry_run:
        print(describe(config))
        return 0
    return train(config)


if __name__ == "__main__":
    run_command(main, again=AGAIN)
