"""Building blocks of the reports' pages: one self-contained HTML file each, and the same tables as Markdown.

Import it; it needs only the standard library. A builder returns Html, which the others take as it is; every other text
is foreign (GPU names, errors, commit names) and is escaped. A cell of a table is a plain value, a Link, or a Cell.

    page.document("Step", [("Result", [page.paragraph("In turn."), page.table(["arm", "ms"], [["triton", 12.5]])])])

The page opens without a network and is read without its script, which only sorts tables by a click on a heading; a
Content-Security-Policy refuses every other script and every request.
"""

import base64
import hashlib
import html
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Html(str):
    """Text that is HTML already."""


@dataclass(frozen=True)
class Link:
    """A link to an http(s) address or to an anchor of the page ("#..."); any other target is shown as text alone."""

    text: str
    url: str

    @property
    def safe(self) -> bool:
        return re.match(r"https?://\S+$|#\S+$", self.url) is not None


@dataclass(frozen=True)
class Cell:
    """A value with more to say: `note` appears when the mouse rests on it, `bad` marks the reason for a failure,
    `order` is the number that sorting takes where the text shows none or another one."""

    value: Any
    note: str = ""
    bad: bool = False
    order: float | None = None


# ---- values ----

LONG = 36  # letters of a cell that may be broken into lines

FIGURE = re.compile(r"[-+<>~]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?( ?%)?( ?(x|to|\(|\[).*|( [A-Za-z/]{1,12}){0,2})$")


def shown(value: Any) -> str:
    """A value as text: four significant digits of a float, thousands apart, n/a for None and not-a-number."""
    if isinstance(value, Cell):
        return shown(value.value)
    if isinstance(value, Link):
        return value.text
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if math.isinf(value) or abs(value) < 1000:
            return f"{value:.4g}"
        return f"{value:,.0f}"
    return str(value)


def _escaped(value: Any) -> str:
    return value if isinstance(value, Html) else html.escape(shown(value), quote=True)


def _columns_of_figures(rows: Sequence[Sequence[Any]], width: int) -> list[bool]:
    """Which columns hold numbers, alone or with a unit or a range behind them: those are right-aligned."""
    found = []
    for i in range(width):
        cells = [row[i] for row in rows if not (isinstance(row[i], Cell) and row[i].bad)]
        texts = [text for cell in cells if (text := shown(cell)) not in ("", "-", "n/a")]
        found.append(bool(texts) and all(FIGURE.match(text) for text in texts))
    return found


def _checked(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[list[Any]]:
    kept = [list(row) for row in rows]
    for row in kept:
        if len(row) != len(header):
            raise ValueError(f"a row of {len(row)} cells under a header of {len(header)}: {row}")
    return kept


# ---- HTML ----

STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --dim: #5c6570; --back: #fff; --band: #f4f6f8; --line: #d5dae0;
  --link: #0b5cad; --bad: #a8261b; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ea; --dim: #9aa4af; --back: #15181b; --band: #1f2428;
  --line: #3a4149; --link: #7db7f2; --bad: #ff8f80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 96rem; padding: 1.5rem clamp(.8rem, 3vw, 2.5rem) 4rem; background: var(--back);
  color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .2rem 0 .6rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p, li, figcaption, summary { max-width: 52rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; }
a { color: var(--link); }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .6rem 0; padding: 0; }
code, pre { font: .88em/1.45 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; background: var(--band); }
code { padding: .1em .3em; border-radius: 3px; overflow-wrap: anywhere; }
pre { padding: .7rem .9rem; overflow-x: auto; border-radius: 4px; }
.wide { overflow-x: auto; margin: .8rem 0; border: 1px solid var(--line); border-radius: 4px; max-height: 90vh; }
.wide:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: separate; border-spacing: 0; font-size: .86rem; line-height: 1.35; min-width: 100%;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .4rem .6rem; color: var(--dim); }
th, td { padding: .34rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  max-width: 24rem; overflow-wrap: break-word; }
td, tbody th { white-space: nowrap; }
td.long { white-space: normal; min-width: 20rem; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { background: var(--band); vertical-align: bottom; position: sticky; top: 0; z-index: 2; font-weight: 600; }
tbody th { font-weight: 600; position: sticky; left: 0; z-index: 1; background: var(--back);
  border-right: 1px solid var(--line); }
thead th:first-child { left: 0; z-index: 3; border-right: 1px solid var(--line); }
.n { text-align: right; }
.bad { color: var(--bad); }
.none { color: var(--dim); }
[title] { text-decoration: underline dotted; text-decoration-color: var(--dim); text-underline-offset: 3px;
  cursor: help; }
thead button { all: unset; cursor: pointer; }
thead button:focus-visible { outline: 2px solid var(--link); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.notes { color: var(--dim); font-size: .86rem; margin: .3rem 0 1rem; padding-left: 1.2rem; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 4px; }
figcaption { color: var(--dim); font-size: .9rem; }
@media (max-width: 40rem) { tbody th { max-width: 40vw; white-space: normal; } body { font-size: 15px; }
  td.long { min-width: 12rem; } }
@media print { .wide { overflow: visible; max-height: none; } }
"""

# A heading becomes a button that sorts: numbers (data-v) before texts, by a second click the other way round.
SCRIPT = """
for (const table of document.querySelectorAll("table")) table.querySelectorAll("thead th").forEach((th, i) => {
  const button = document.createElement("button");
  button.append(...th.childNodes); th.append(button);
  button.onclick = () => {
    const down = th.getAttribute("aria-sort") === "ascending", body = table.tBodies[0];
    const key = (row) => row.cells[i].dataset.v === undefined ? NaN : Number(row.cells[i].dataset.v);
    const text = (row) => row.cells[i].textContent;
    const order = (a, b) => isNaN(key(a)) || isNaN(key(b)) ? isNaN(key(a)) - isNaN(key(b)) ||
      (down ? -1 : 1) * text(a).localeCompare(text(b)) : (down ? key(b) - key(a) : key(a) - key(b));
    table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
    th.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...[...body.rows].sort(order));
  };
});
"""


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def document(title: str, sections: Sequence[tuple[str, Any]], *, lead: Any = ()) -> str:
    """A whole page. Each section is (heading, Html or a sequence of Html); a plain str in it becomes a paragraph.
    `lead` is what stands before the list of contents."""
    policy = f"default-src 'none'; img-src data:; style-src {_digest(STYLE)}; script-src {_digest(SCRIPT)}"
    names = [name for name, _ in sections]
    anchors: list[str] = []
    for name in names:
        first = anchor(name)
        anchors.append(next(a for n in itertools.count(1) if (a := f"{first}-{n}" if n > 1 else first) not in anchors))
    nav = ""
    if len(names) > 1:
        links = "".join(f'<li><a href="#{a}">{_escaped(n)}</a></li>' for a, n in zip(anchors, names))
        nav = f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n'
    body = "\n".join(
        f'<section id="{a}">\n<h2>{_escaped(name)}</h2>\n{_blocks(parts)}\n</section>'
        for a, (name, parts) in zip(anchors, sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{_escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header>\n"
        f"<h1>{_escaped(title)}</h1>\n{_blocks(lead)}\n{nav}</header>\n<main>\n{body}\n</main>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def anchor(text: str) -> str:
    """The id of a section of this name: `#` and this is a link to it."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"


def _blocks(parts: Any) -> str:
    several = [parts] if isinstance(parts, str) else parts
    return "\n".join(part if isinstance(part, Html) else paragraph(part) for part in several)


def heading(text: str, level: int = 3) -> Html:
    """A heading inside a section."""
    return Html(f"<h{level}>{_escaped(text)}</h{level}>")


def paragraph(*parts: Any) -> Html:
    """Text, with Links and code() where it needs them."""
    return Html(f"<p>{_inline(parts)}</p>")


def bullets(lines: Iterable[Any]) -> Html:
    """A list; a line is a text, a Link or a tuple of such."""
    return Html("<ul>" + "".join(f"<li>{_inline(x if isinstance(x, tuple) else (x,))}</li>" for x in lines) + "</ul>")


def code(text: str) -> Html:
    return Html(f"<code>{_escaped(text)}</code>")


def preformatted(text: str) -> Html:
    """Lines as they are: a command, a terminal's table."""
    return Html(f"<pre>{_escaped(text)}</pre>")


def details(summary: str, parts: Any, *, opened: bool = False) -> Html:
    """A part that a reader unfolds."""
    return Html(
        f"<details{' open' if opened else ''}><summary>{_escaped(summary)}</summary>\n{_blocks(parts)}</details>"
    )


def _inline(parts: Sequence[Any]) -> str:
    return "".join(_anchored(part) if isinstance(part, Link) else _escaped(part) for part in parts)


def _anchored(link: Link) -> str:
    text = _escaped(link.text)
    return f'<a href="{html.escape(link.url)}" rel="noreferrer">{text}</a>' if link.safe else text


def table(
    header: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    *,
    caption: str = "",
    label: str = "",
    notes: Sequence[Any] = (),
) -> Html:
    """A table that scrolls where it is wide: its first column stays in sight, figures stand right, `notes` below it.
    label: its name for a screen reader, where no caption is to be seen. ValueError for a row of another length than
    the header."""
    kept = _checked(header, rows)
    right = _columns_of_figures(kept, len(header))
    head = "".join(_cell("th", cell, right[i], 'scope="col"') for i, cell in enumerate(header))
    lines = []
    for row in kept:
        first = _cell("th", row[0], right[0], 'scope="row"')
        lines.append(f"<tr>{first}{''.join(_cell('td', c, right[i]) for i, c in enumerate(row) if i)}</tr>")
    if not kept:
        lines.append(f'<tr><td colspan="{len(header)}">no rows</td></tr>')
    title = f"<caption>{_escaped(caption)}</caption>" if caption else ""
    label = _escaped(label or caption or "table")
    below = "".join(f"<li>{_inline(n if isinstance(n, tuple) else (n,))}</li>" for n in notes)
    return Html(
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}"><table>{title}\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>"
        + "\n".join(lines)
        + "</tbody></table></div>"
        + (f'<ul class="notes">{below}</ul>' if below else "")
    )


def _cell(tag: str, cell: Any, right: bool, extra: str = "") -> str:
    value, note, bad, order = (
        (cell.value, cell.note, cell.bad, cell.order) if isinstance(cell, Cell) else (cell, "", False, None)
    )
    marks = (
        ("n", right and not bad),
        ("bad", bad),
        ("none", shown(value) == "n/a"),
        ("long", tag == "td" and len(shown(value)) > LONG),
    )
    classes = " ".join(name for name, on in marks if on)
    text = _anchored(value) if isinstance(value, Link) else _escaped(value)
    if note:
        text = f'<span title="{html.escape(note)}">{text}</span>'
    attributes = [extra, f'class="{classes}"' if classes else "", _sort_key(value, order) if tag == "td" else ""]
    return f"<{' '.join([tag, *filter(None, attributes)])}>{text}</{tag}>"


def _sort_key(value: Any, order: float | None) -> str:
    if order is None:
        if isinstance(value, (int, float)):
            order = float(value)
        elif isinstance(value, str) and FIGURE.match(value):
            number = re.match(r"[-+]?[\d.]+", value.replace(",", "").lstrip("<>~"))
            order = float(number[0]) if number else None
    return "" if order is None or math.isnan(order) else f'data-v="{order:.10g}"'


def figure(picture: Path | bytes, caption: str, *, alt: str = "") -> Html:
    """A PNG, of a file or of its bytes, inside the page. ValueError where it is no PNG."""
    data = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"{picture if isinstance(picture, Path) else 'the picture'} is no PNG")
    source = base64.b64encode(data).decode()
    return Html(
        f'<figure><img alt="{html.escape(alt or caption)}" src="data:image/png;base64,{source}">\n'
        f"<figcaption>{_escaped(caption)}</figcaption></figure>"
    )


# ---- Markdown ----


def markdown_table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """The same rows for a README: one line each, figures right-aligned, notes left out. ValueError as table()."""
    kept = _checked(header, rows)
    right = _columns_of_figures(kept, len(header))
    lines = [_line(header), "|" + "|".join("---:" if r else "---" for r in right) + "|", *map(_line, kept)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(_markdown, cells)) + " |"


def markdown_text(text: Any) -> str:
    """A text on one line whose signs Markdown does not take for its own."""
    return re.sub(r"([\\|`*\[\]$])", r"\\\1", " ".join(shown(text).split())).replace("<", "&lt;")


def _markdown(cell: Any) -> str:
    value = cell.value if isinstance(cell, Cell) else cell
    text = markdown_text(value)
    if isinstance(value, Link) and value.safe and not value.url.startswith("#"):
        return f"[{text}]({re.sub(r'[()|]', lambda m: f'%{ord(m[0]):02X}', value.url)})"
    return text
