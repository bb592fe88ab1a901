"""bench/compare.py on made-up rows: what is compared with what, what stays, what a reader is told."""

import html as html_lib
import re
from pathlib import Path
from typing import Any

import compare
import compare_plots
import compare_rows
import compare_tables
import page
import pytest
from made_up_rows import CPU, FACTS, GPU, gemm, old, results, step, written
from test_page import Tags, cells_of

from nanogpt_fast.errors import ConfigError, DataError


def table_of(found: list[compare_rows.Result]) -> list[dict[str, str]]:
    """The main table as texts by heading."""
    (header, rows), _ = compare_tables.main_table(found)
    return [dict(zip(map(page.shown, header), map(page.shown, row))) for row in rows]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


# ---- what is divided by what ----


def test_ratio_to_stock_is_paired_by_round(file: Path):
    """A machine that slows down tenfold: unpaired medians would say 1.1 or so, the rounds say exactly 2."""
    stock, ours = [2.0, 4.0, 20.0, 21.0], [1.0, 2.0, 10.0, 10.5]
    found = results(file, step("triton", ours), step("nanogpt+compile", stock), step("nanogpt", [1.0] * 4))
    by_arm = {r.row["arm"]: r for r in found}
    assert by_arm["triton"].against_stock() == (2.0, 2.0, 2.0)
    assert [row["times stock"] for row in table_of(found) if row["arm"] == "nanogpt+compile"] == ["1"]
    assert {row["stock is"] for row in table_of(found)} == {"nanogpt+compile", "itself"}


def test_quartiles_of_the_ratio_are_of_the_rounds(file: Path):
    found = results(file, step("triton", [1.0] * 5), step("nanogpt", [1.0, 2.0, 3.0, 4.0, 5.0]))
    assert table_of(found)[0]["times stock"] == "3.000 (2.000 to 4.000)"
    assert table_of(found)[0]["stock is"] == "nanogpt"


def test_rounds_that_only_one_arm_has_are_left_out(file: Path):
    found = results(file, step("triton", [1.0, 1.0]), step("nanogpt", [2.0, 2.0, 90.0]))
    assert next(r for r in found if r.row["arm"] == "triton").against_stock() == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("change", [{"run": "r2"}, {"config": "other"}, {"dtype": "float32"}, {"tokens": 2000}])
def test_no_ratio_to_stock_of_another_run_or_work(file: Path, change: dict[str, Any]):
    found = results(file, step("triton", [1.0, 1.0]), step("nanogpt+compile", [2.0, 2.0], **change))
    assert next(r for r in found if r.row["arm"] == "triton").against_stock() is None
    assert {row.get("times stock") for row in table_of(found)} == {"n/a", "1"}


def test_an_arm_again_in_one_run_begins_another_comparison(file: Path):
    rows = [step("triton", [1.0]), step("nanogpt", [3.0]), step("triton", [1.0]), step("nanogpt", [5.0])]
    ratios = sorted(r.against_stock() or () for r in results(file, *rows) if r.row["arm"] == "triton")
    assert ratios == [(3.0, 3.0, 3.0), (5.0, 5.0, 5.0)]


def test_a_row_alone_shows_only_without_one_in_turn_and_lends_what_only_it_knows(file: Path):
    alone = step("triton", [1.0], how="alone", peak_gb=4.294967296)
    turn = step("triton", [2.0, 2.0])
    del turn["peak_gb"]
    found = table_of(results(file, alone, turn, step("hf", [3.0], how="alone")))
    assert [(row["arm"], row["timed, or why not"]) for row in found] == [("triton", "in turn"), ("hf", "alone")]
    assert found[0]["peak GiB"] == "4.00"
    assert {row.get("times stock", "left out") for row in found} == {"left out"}


def test_roof_is_of_the_same_file_machine_and_dtype(tmp_path: Path):
    rows = [
        step("triton", [1.0, 1.0]),
        gemm("sweep", 50.0, 1.0),
        gemm("square", 40.0, 1.0),
        gemm("model", 20.0, 1.0, config="tiny", batch_size=5),
        gemm("model", 40.0, 3.0, config="tiny", batch_size=5),
        gemm("model", 90.0, 9.0, config="other", batch_size=5, status="failed: x"),
        gemm("model", 30.0, 9.0, config="other", batch_size=5),
        gemm("sweep", 99.0, 1.0, dtype="float32"),
        gemm("sweep", 98.0, 1.0, gpu="Another"),
    ]
    written(tmp_path / "a.jsonl", *rows)
    written(tmp_path / "b.jsonl", gemm("sweep", 97.0, 1.0))
    (found,) = compare_rows.step_results(compare_rows.read([tmp_path]).rows)
    assert (found.best, found.own) == (50.0, pytest.approx((20.0 * 1 + 40.0 * 3) / 4))
    row = table_of([found])[0]
    assert (row["share of GEMM"], row["share of own GEMMs"]) == ("50.0%", "71.4%")


# ---- what a row shows ----


def test_units_and_conditions(file: Path):
    row = table_of(results(file, step("triton", [0.5, 1.0, 2.0], dirty=True, residual_dtype="float32")))[0]
    assert row["peak GiB"] == "2.00"  # 2.147483648 of 10^9 bytes
    assert (row["tokens/s"], row["quartiles of tokens/s"], row["ms a step"]) == ("1,000", "667 to 1,333", "1,000")
    assert (row["mJ/token"], row["MFU, nanoGPT"], row["MFU, llm.c"]) == ("1.50", "25.0%", "20.0%")
    assert (row["micro-batch x accumulation"], row["n"], row["T"]) == ("5 x 2", "3", "100")
    assert (row["commit"], row["dtype, residual"]) == ("abcdef0123 + changes", "bfloat16, residual float32")
    assert (row["form, power limit"], row["loss after"], row["CUDA graph"]) == ("400 W", "3.5000 (20 steps)", "on")


@pytest.mark.parametrize(
    "name,form",
    [
        ("NVIDIA A100-SXM4-80GB", "SXM"),
        ("NVIDIA H100 80GB HBM3", "SXM"),
        ("NVIDIA A100 80GB PCIe", "PCIe"),
        ("NVIDIA A100-PCIE-40GB", "PCIe"),
        ("NVIDIA H100 NVL", "NVL"),
        ("NVIDIA GeForce RTX 4090", "card"),
        ("NVIDIA B200", ""),
    ],
)
def test_form_by_the_exact_name(name: str, form: str):
    assert compare_rows.form({"gpu": name}) == form


def test_rows_that_failed_stay_with_their_reason_after_those_that_ran(file: Path):
    reasons = ["missing: pip install x", "out of memory at B=64, 32, 16", "failed: <b>boom</b> | x"]
    bad = [{**FACTS, **GPU, "bench": "step", "config": "tiny", "arm": f"bad{i}", "how": "alone", "status": reason}
           for i, reason in enumerate(reasons)]  # fmt: skip
    lost = {**step("lost", [1.0]), "ms_s": None}
    rows = table_of(results(file, *bad, lost, step("triton", [1.0, 1.0])))
    assert rows[0]["arm"] == "triton" and len(rows) == 5
    assert {row["timed, or why not"] for row in rows} == {"in turn", "the row has no time", *reasons}
    assert all(row["ms a step"] == row["peak GiB"] == row["mJ/token"] == "n/a" for row in rows[1:])
    assert sorted(row["tokens/s"] for row in rows[1:]) == ["failed", "missing", "out of memory", "the row has no time"]


def test_newest_run_first_all_kept_gpus_before_cpus_and_small_models_first(tmp_path: Path):
    def row(**changes: Any) -> dict[str, Any]:
        return step("triton", [1.0, 1.0], **changes)

    written(tmp_path / "1.jsonl", row(run="a", time="2026-01-01T00:00:00+00:00", commit="1"),
            {**row(run="c", config="a_cpu"), **CPU, "gpu": None})  # fmt: skip
    written(tmp_path / "2.jsonl", row(run="b", time="2026-01-03T00:00:00+00:00", commit="2"),
            row(run="d", config="large", params=9e9, commit="3"))  # fmt: skip
    found = table_of(compare_rows.step_results(compare_rows.read([tmp_path]).rows))
    assert [(r["model"], r["commit"]) for r in found] == [
        ("tiny", "2"), ("tiny", "1"), ("large", "3"), ("a_cpu", "abcdef0123"),
    ]  # fmt: skip


def test_columns_that_no_row_has_are_left_out_and_named(file: Path):
    row = {**step("reference", [1.0, 1.0]), **CPU, "gpu": None}
    for key in ("mfu_nanogpt", "mfu_llmc", "joules_per_token"):
        del row[key]
    (header, _), left_out = compare_tables.main_table(results(file, row))
    assert {"MFU, nanoGPT", "mJ/token", "CUDA graph"} <= set(left_out)
    assert not set(left_out) & set(map(page.shown, header))


# ---- two versions, whole runs ----


def test_two_commits_that_were_not_interleaved_are_not_paired(tmp_path: Path):
    written(tmp_path / "1.jsonl", step("triton", [2.0, 2.2, 2.4], run="a", commit="1"))
    written(
        tmp_path / "2.jsonl", step("triton", [1.0, 1.1, 1.2], run="b", commit="2", time="2026-02-01T00:00:00+00:00")
    )
    (pair,) = compare_tables.same_machine(compare_rows.step_results(compare_rows.read([tmp_path]).rows))
    low, median, high = pair.ratio
    assert (pair.paired, pair.differs, median) == (False, ["commit"], pytest.approx(2.0))
    assert (low, high) == (pytest.approx(2.1 / 1.15), pytest.approx(2.3 / 1.05))
    header, rows = compare_tables.pairs_table([pair])
    shown = dict(zip(header, rows[0]))
    assert (shown["speed, after / before"], shown["how"]) == ("2.00 (1.83 to 2.19)", "not interleaved")


def test_two_commits_of_one_run_are_paired_and_two_dtypes_are_not(file: Path):
    rows = [
        step("triton", [1.0, 3.0], commit="1", tree="1"),
        step("triton", [0.5, 1.5], commit="2", tree="2"),
        step("triton", [2.0, 6.0], commit="2", tree="2", dtype="float32", residual_dtype="float32"),
    ]
    pairs = compare_tables.same_machine(results(file, *rows))
    found = {(",".join(p.differs), p.paired): p.ratio[1] for p in pairs}
    assert found == {("commit", True): 2.0, ("dtype", False): pytest.approx(0.25)}


@pytest.mark.parametrize(
    "change", [{"gpu": "Another"}, {"power_limit_w": 300.0}, {"arm": "hf"}, {"block_size": 50}, {"tokens": 500}]
)
def test_versions_are_compared_on_the_same_machine_and_work_only(file: Path, change: dict[str, Any]):
    rows = [step("triton", [1.0], commit="1"), {**step("triton", [1.0], commit="2", run="b"), **change}]
    assert compare_tables.same_machine(results(file, *rows)) == []


def test_equal_names_of_cpus_with_other_instructions_are_not_one_machine(file: Path):
    rows = [{**step("reference", [1.0], commit=c, run=c), **CPU, "gpu": None, "cpu_flags": flags}
            for c, flags in (("1", ["avx2"]), ("2", ["avx2", "avx512f"]))]  # fmt: skip
    assert compare_tables.same_machine(results(file, *rows)) == []


def test_machines_that_rows_do_not_name_are_not_one_machine(file: Path):
    rows = [{**step("reference", [1.0], commit=c, run=c), "gpu": None} for c in ("1", "2")]
    assert compare_tables.same_machine(results(file, *rows)) == []


def test_old_rows_are_whole_runs_paired_by_round(tmp_path: Path):
    rows = [old("ours", 1, 60.0), old("nanogpt", 0, 10.0), old("ours", 0, 5.0), old("nanogpt", 1, 80.0)]
    found = compare_rows.read([written(tmp_path / "2026-01-01-abc.jsonl", *rows)])
    assert compare_rows.step_results(found.rows) == []
    header, cells = compare_tables.whole_runs_table(compare_rows.whole_runs(found.rows))
    shown = {row[0]: dict(zip(header, row)) for row in cells}
    assert shown["ours"]["of stock nanoGPT's"] == "0.625 (0.562 to 0.688)"
    assert (shown["ours"]["wall s"], shown["ours"]["n"]) == ("32.5 (18.8 to 46.2)", 2)
    assert shown["ours"]["commit or file"] == "2026-01-01-abc"


# ---- reading ----


def test_a_cut_off_last_line_is_left_out_and_noted(file: Path):
    written(file, step("triton", [1.0, 1.0]), end='\n{"bench": "step", "arm": "hf", "ms')
    found = compare_rows.read([file])
    assert len(found.rows) == 1 and "results.jsonl:2 is no JSON object" in found.notes[0]


def test_rows_that_two_files_share_count_once(tmp_path: Path):
    for name in ("a", "b"):
        written(tmp_path / f"{name}.jsonl", step("triton", [1.0]), step("nanogpt", [1.0]))
    found = compare_rows.read([tmp_path, tmp_path / "a.jsonl"])
    assert (len(found.rows), len(found.files)) == (2, 2) and "2 rows are in an earlier file" in found.notes[0]


@pytest.mark.parametrize("rows", ["", "\n\n", "no json\n", "[1]\n"])
def test_results_without_a_row_are_an_error(file: Path, rows: str):
    file.write_text(rows)
    with pytest.raises(DataError, match="hold no row"):
        compare.main([str(file)])


def test_unknown_paths_and_folders_without_results_are_errors(tmp_path: Path):
    with pytest.raises(DataError, match="no such results file"):
        compare.main([str(tmp_path / "nothing.jsonl")])
    with pytest.raises(DataError, match="no results below"):
        compare.main([str(tmp_path)])
    with pytest.raises(ConfigError, match="cannot be written"):
        compare.main([str(written(tmp_path / "a.jsonl", old("ours", 0, 1.0))), "--out", str(tmp_path / "a.jsonl/x")])


# ---- the page and the Markdown file ----


def test_page_and_markdown_have_the_same_tables(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.setattr(compare_plots, "draw_all", lambda *_: ([], compare_plots.NO_MATPLOTLIB))
    missing = {**FACTS, **GPU, "bench": "step", "config": "tiny", "arm": "llm.c", "status": "missing: a | <i>b</i>"}
    rows = [step("triton", [1.0, 1.0]), step("nanogpt+compile", [2.0, 2.0]), old("ours", 0, 1.0), missing]
    written(tmp_path / "in/a.jsonl", *rows)
    assert compare.main([str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    html, markdown = ((tmp_path / f"out/compare.{kind}").read_text() for kind in ("html", "md"))
    assert compare_plots.NO_MATPLOTLIB in html_lib.unescape(html) and "nanogpt-fast" in markdown
    tags, lines = Tags(html), markdown.splitlines()
    in_markdown = [cells_of(line) for line in lines if line.startswith("| ")]
    in_html = iter(tags.cells)
    for row in in_markdown:
        assert [re.sub(r"^\[(.*)\]\(.*\)$", r"\1", cell) for cell in row] == [next(in_html) for _ in row]
    assert next(in_html, None) is None
    assert "Made-up GPU <b>80GB</b>" in tags.cells and "missing: a | <i>b</i>" in tags.cells
    assert not {"b", "i"} & {name for name, _ in tags.found}
    sections = dict(re.findall(r'<section id="([^"]+)">(.*?)</section>', html, re.DOTALL))
    assert {name for name, text in sections.items() if "MosaicML" in text} == {"published-by-others"}
    assert {name for name, text in sections.items() if "Made-up GPU" in text} == {"training-steps"}


def test_published_figures_name_their_source_and_derivations_hold():
    """What is called derived follows from what the source says: tokens/s times FLOPs a token over the peak."""
    header, rows = compare_tables.published_table()
    sizes = {"124M": (12, 768), "350M": (24, 1024), "774M": (36, 1280), "1558M": (48, 1600)}
    checked = 0
    for row in (dict(zip(header, row)) for row in rows):
        assert row["source"].safe and row["what the source says"]
        assert row["tokens/s a GPU"] or row["MFU"]
        size = re.match(r"(?:GPT-2 )?(\d+M)", row["model"])
        if size and row["MFU"] and "MFU" in row["derived by us"]:
            layers, width = sizes[size[1]]
            params = 12 * layers * width**2 + 50304 * width
            peak = 312e12 if "A100" in row["GPU"] else 165.2e12 if "4090" in row["GPU"] else 989e12
            mfu = (6 * params + 12 * layers * width * 1024) * row["tokens/s a GPU"] / peak
            assert 100 * mfu == pytest.approx(float(row["MFU"].rstrip("%")), abs=0.25), row
            checked += 1
    assert checked > 9
