"""The comparison's page in a real browser: no request, no complaint, whole tables, links that lead somewhere."""

from pathlib import Path

import chromium
import compare
import compare_tables
import page
import pytest
from made_up_rows import FACTS, GPU, gemm, loader, old, profile, sample, step, written

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.find() is None, reason="no Chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    rows = [step(arm, [1.0 + i, 1.1 + i], config=config, params=params, run=config)
            for config, params in (("small", 1e6), ("large", 1e8))
            for i, arm in enumerate(("triton", "reference+compile", "nanogpt+compile"))]  # fmt: skip
    lost = {**FACTS, **GPU, "bench": "step", "config": "small", "arm": "hf", "status": "failed: <b>" + "long " * 40}
    other = step("triton", [0.5, 0.6], config="small", params=1e6, run="b", commit="0123456789")
    others = [loader("thread"), *profile({"matrix products": 3.0, "GELU": 1.0}), sample("ours", [0.1, 0.2])]
    written(folder / "in/a.jsonl", *rows, lost, other, gemm("sweep", 50.0, 1.0), old("ours", 0, 1.0), *others)
    assert compare.main([str(folder / "in"), "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("width,dark", [(1400, False), (1400, True), (400, False)])
def test_page_in_a_browser(out: Path, tmp_path: Path, width: int, dark: bool):
    with chromium.opened(out / "compare.html", tmp_path, width=width, dark=dark) as tab:
        count = "[...document.querySelectorAll('section')].map(s => [s.id, s.querySelectorAll('tbody tr').length])"
        rows = dict(tab.value(count))
        assert rows["training-steps"] == 8 and rows["two-versions-on-one-machine"] == 1 and rows["whole-runs"] == 1
        assert (rows["where-the-step-goes"], rows["sampling"], rows["loader"]) == (2, 1, 1)
        assert rows["published-by-others"] == len(compare_tables.published_table()[1])
        links = tab.value("[...document.links].map(a => a.getAttribute('href'))")
        assert len(links) > 20
        for link in links:
            assert link.startswith("https://") or tab.value(f"document.getElementById({link[1:]!r}) !== null"), link
        assert all(tab.value("[...document.images].map(i => i.complete && i.naturalWidth > 0 && i.alt.length > 9)"))
        assert tab.value("document.documentElement.scrollWidth") <= width  # wide tables scroll inside
        assert tab.value("document.querySelectorAll('section td b').length") == 0
        background = tab.value("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(21, 24, 27)" if dark else "rgb(255, 255, 255)")
        assert tab.requests == [(out / "compare.html").resolve().as_uri()]
        assert tab.complaints == []


def test_a_click_on_a_heading_sorts_by_the_number(out: Path, tmp_path: Path):
    rows = [["a", "9.5 (9 to 10)"], ["b", "10"], ["c", None], ["d", "1,234"]]
    path = tmp_path / "sorted.html"
    path.write_text(page.document("t", [("s", page.table(["name", "figure"], rows))]))
    with chromium.opened(path, tmp_path / "profile") as tab:
        names = "[...document.querySelectorAll('tbody th')].map(cell => cell.textContent).join('')"
        click = "document.querySelectorAll('thead button')[{}].click()"
        found = [tab.value(names)]
        for column in (1, 1, 0):
            tab.value(click.format(column))
            found.append(tab.value(names))
        assert found == ["abcd", "abdc", "dbac", "abcd"]
        assert tab.complaints == []


def test_the_browser_tells_of_what_a_page_must_not_do(out: Path, tmp_path: Path):
    """So that silence above means something: a foreign picture and a foreign script, both refused by the policy."""
    text = (out / "compare.html").read_text()
    foreign = '<img src="http://127.0.0.1:9/x.png" alt=""><script>document.title = "run"</script></body>'
    path = tmp_path / "foreign.html"
    path.write_text(text.replace("</body>", foreign))
    with chromium.opened(path, tmp_path / "profile") as tab:
        assert len([line for line in tab.complaints if "Content Security Policy" in line]) == 2
        assert tab.value("document.title") != "run"
    path.write_text('<!DOCTYPE html><title>t</title><img src="http://127.0.0.1:9/x.png" alt="">')
    with chromium.opened(path, tmp_path / "profile2") as tab:
        assert "http://127.0.0.1:9/x.png" in tab.requests
