"""Are the Triton kernels right on this GPU? `python -m nanogpt_fast.verify [--config NAME] [--flag=value ...]`

Every op as a training run with these flags calls it, values and gradients, against plain PyTorch and float64, then 50
times for the same bits beside other work. The verdict is kept: `--kernels=auto` trains by it. Exit code 5 where an op
is wrong.
"""

import json
import sys

from nanogpt_fast.child import die_with_parent
from nanogpt_fast.command import importing, run_command
from nanogpt_fast.settings.cli import load_config

PROG = "python -m nanogpt_fast.verify"


def main(argv: list[str]) -> int:
    """Verify, or be the child that tries the ops. Returns the exit code."""
    is_child = argv[:1] == ["--child"]
    config = None if is_child else load_config(argv, prog=PROG)
    with importing():  # torch, a second that --help and a wrong flag do without
        from nanogpt_fast.verification import child, verify

    return verify(config) if config else child(json.loads(argv[1]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        die_with_parent()
    run_command(main, again="no verdict is kept; the same command tries every op anew")
