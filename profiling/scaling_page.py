"""Fill docs/scaling.md with its figures, each by roofline.py's --world or from the tables of --published.

    python profiling/scaling_page.py [--check] [--only NAME]

The page is written by hand but for its blocks, `<!-- figures: NAME ARGUMENTS -->` to `<!-- end -->`, made here:

  world ARGUMENTS     what `python profiling/roofline.py ARGUMENTS` prints
  published NAME      a table of scaling_published.py: collectives, speeds, more_gpus

--check changes nothing; exit code 1 where the page is not what this would write. --only looks at blocks of that NAME.
"""

import io
import shlex
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import page_blocks
import roofline
from memory_page import table
from scaling_published import TABLES

from nanogpt_fast.command import run_command

PAGE = Path(__file__).resolve().parent.parent / "docs/scaling.md"


def world(*words: str) -> str:
    shown = io.StringIO()
    with redirect_stdout(shown):
        roofline.main(list(words))
    return f"    $ python profiling/roofline.py {shlex.join(words)}\n\n```text\n{shown.getvalue().strip()}\n```\n"


def published(name: str) -> str:
    return table(*TABLES[name]())


MAKERS: dict[str, Callable[..., str]] = {"world": world, "published": published}


def main(argv: list[str]) -> int:
    return page_blocks.main(argv, __doc__, PAGE, MAKERS, "profiling/scaling_page.py")


if __name__ == "__main__":
    run_command(main)
