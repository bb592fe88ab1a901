"""A page by hand but for its blocks, `<!-- figures: NAME ARGUMENTS -->` to `<!-- end -->`, made by scripts."""

import argparse
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from nanogpt_fast.errors import ConfigError

BLOCK = re.compile(r"(<!-- figures: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
Makers = Mapping[str, Callable[..., str]]  # {NAME: from ARGUMENTS to Markdown}


def filled(text: str, makers: Makers, where: Path, only: str | None = None) -> str:
    """The text with its blocks made anew; only: those of this NAME, or of this NAME and these ARGUMENTS. ConfigError
    for a name that has no maker."""

    def made(match: re.Match[str]) -> str:
        name, *words = shlex.split(match[2])
        if name not in makers:
            raise ConfigError(f"unknown figures {name!r}", where=str(where), expected=", ".join(makers))
        return f"{match[1]}\n{makers[name](*words)}\n{match[3]}" if only in (None, name, match[2]) else match[0]

    return BLOCK.sub(made, text)


def main(argv: list[str], doc: str | None, page: Path, makers: Makers, script: str) -> int:
    """The command of such a page's script; 1 where --check finds it out of date."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    parser.add_argument("--only", metavar="NAME", help="blocks of this name, or of this name and these arguments")
    args = parser.parse_args(argv)
    before = page.read_text()
    after = filled(before, makers, page, args.only)
    if args.check:
        print("up to date" if after == before else f"{page} is not what python {script} writes")
        return int(after != before)
    page.write_text(after)
    print(f"{page}: {len(BLOCK.findall(before))} blocks")
    return 0
