"""bench/page.py: foreign text stays text, tables keep their shape, one file without a request."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import page
import pytest

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
FOREIGN = "<script>alert(1)</script> \"GPU\" & 'x' | `y`"


class Tags(HTMLParser):
    """(tag, attributes) in order, the text of each cell, and whether every tag was closed."""

    VOID = {"meta", "link", "img"}

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_foreign_text_is_shown_as_it_is_everywhere():
    parts = [
        page.paragraph(FOREIGN),
        FOREIGN,
        page.heading(FOREIGN),
        page.bullets([FOREIGN]),
        page.preformatted(FOREIGN),
        page.details(FOREIGN, FOREIGN),
        page.figure(PIXEL, FOREIGN),
        page.table([FOREIGN, "b"], [[FOREIGN, page.Cell(FOREIGN, note=FOREIGN)]], caption=FOREIGN, notes=[FOREIGN]),
    ]
    tags = Tags(page.document(FOREIGN, [(FOREIGN, parts)]))
    assert len(tags.of("script")) == 1 and not tags.open
    assert tags.cells == [FOREIGN, "b", FOREIGN, FOREIGN]
    assert [s["title"] for s in tags.of("span")] == [FOREIGN]
    assert tags.of("img")[0]["alt"] == FOREIGN


def test_html_that_a_builder_made_is_not_escaped_again():
    assert page.paragraph("run ", page.code("a < b")) == "<p>run <code>a &lt; b</code></p>"


def test_a_page_asks_for_nothing_and_its_policy_names_its_own_script_and_style():
    text = page.document("t", [("a", "x"), ("b", page.figure(PIXEL, "c"))])
    tags = Tags(text)
    targets = [v for _, attributes in tags.found for k, v in attributes.items() if k in ("src", "href") and v]
    assert len(targets) == 4 and all(t.startswith(("data:", "#")) for t in targets)
    policy = next(m["content"] for m in tags.of("meta") if "http-equiv" in m) or ""
    for tag in ("script", "style"):
        (body,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert f"{tag}-src {page._digest(body)}" in policy
    assert policy.startswith("default-src 'none'")


def test_contents_lead_to_sections_and_equal_headings_stay_apart():
    tags = Tags(page.document("t", [("Same: one", "x"), ("Same one", "y"), ("Other", "z")]))
    ids = [s["id"] for s in tags.of("section")]
    assert ids == ["same-one", "same-one-2", "other"]
    assert [a["href"] for a in tags.of("a")] == [f"#{i}" for i in ids]


@pytest.mark.parametrize(
    "url,safe",
    [
        ("https://example.org/a?b=1&c=2", True),
        ("#here", True),
        ("javascript:alert(1)", False),
        ("file:///etc/passwd", False),
        ("https://a b", False),
        (" https://a", False),
        ('https://a"onclick=1', True),  # escaped, so it stays inside the attribute
    ],
)
def test_only_web_addresses_and_anchors_are_links(url: str, safe: bool):
    tags = Tags(page.paragraph(page.Link("text", url)))
    assert [a["href"] for a in tags.of("a")] == ([url] if safe else [])
    assert all(set(a) == {"href", "rel"} for a in tags.of("a"))


@pytest.mark.parametrize(
    "value,text",
    [
        (None, "n/a"),
        (float("nan"), "n/a"),
        (0.123456, "0.1235"),
        (1234567.8, "1,234,568"),
        (999.96, "1000"),
        (524288, "524,288"),
        (True, "yes"),
        ("x", "x"),
        (page.Cell(2.5, note="n"), "2.5"),
        (page.Link("nanoGPT", "https://example.org"), "nanoGPT"),
    ],
)
def test_values_as_text(value, text: str):
    assert page.shown(value) == text


def test_figures_stand_right_and_texts_left():
    rows = [
        ["triton", 1.5, "1,234 (1,200 to 1,300)", "12 x 40", "579a6a7", "95%", None, "2.0 (1 GPU)"],
        ["nanogpt", None, "n/a", "64 x 8", "1234567", "n/a", None, ""],
    ]
    tags = Tags(page.table([*"abcdefgh"], rows))
    first = [attributes.get("class") for tag, attributes in tags.found if tag in ("th", "td")][8:16]
    assert first == [None, "n", "n", "n", None, "n", "none", "n"]
    assert page.markdown_table([*"abcdefgh"], rows).splitlines()[1] == "|---|---:|---:|---:|---|---:|---|---:|"


def test_sorting_takes_the_number_behind_the_text():
    row = ["r", 1.5, "1,234 (1,200 to 1,300)", page.Cell(3, order=7.0), "text", None, "~380,000", "45%"]
    keys = [attributes.get("data-v") for attributes in Tags(page.table([*"abcdefgh"], [row])).of("td")]
    assert keys == ["1.5", "1234", "7", None, None, "380000", "45"]


def test_a_row_of_another_length_is_an_error_and_no_rows_say_so():
    for build in (page.table, page.markdown_table):
        with pytest.raises(ValueError, match="3 cells under a header of 2"):
            build(["a", "b"], [[1, 2, 3]])
    assert Tags(page.table(["a", "b"], [])).cells[-1] == "no rows"


def test_a_figure_is_a_png_from_bytes_or_a_file(tmp_path: Path):
    (tmp_path / "p.png").write_bytes(PIXEL)
    assert page.figure(tmp_path / "p.png", "c") == page.figure(PIXEL, "c")
    with pytest.raises(ValueError, match="no PNG"):
        page.figure(b"GIF89a", "c")


def cells_of(line: str) -> list[str]:
    """A reader of Markdown tables, independent of the writer: what stands between bars that no backslash precedes."""
    cells = re.split(r"(?<!\\)\|", line)[1:-1]
    return [re.sub(r"\\(.)", r"\1", cell).strip().replace("&lt;", "<") for cell in cells]


def test_a_markdown_table_parses_back():
    header = ["arm", "a|b", "why"]
    rows = [["triton", "x | y", "line\none"], [FOREIGN, "*b* [c](d) $e$", r"C:\x"]]
    lines = page.markdown_table(header, rows).splitlines()
    assert cells_of(lines[0]) == header
    assert [cells_of(line) for line in lines[2:]] == [["triton", "x | y", "line one"], rows[1]]


def test_markdown_links_only_to_the_web():
    text = page.markdown_table(
        ["a"], [[page.Link("p", "https://example.org/a(b)|c")], [page.Link("q", "javascript:x")]]
    )
    assert text.splitlines()[2:] == ["| [p](https://example.org/a%28b%29%7Cc) |", "| q |"]
