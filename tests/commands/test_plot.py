"""plot.py: logs of ours and of nanoGPT, resumed and killed runs, the panels drawn."""

import json
from pathlib import Path

import numpy as np
import pytest

from nanogpt_fast import plot
from nanogpt_fast.errors import ConfigError, DataError

pytest.importorskip("matplotlib")


def train(i: int, loss: float, **more: object) -> dict:
    row = {"kind": "train", "iter": i, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 1000.0}
    return {**row, "tokens": 10 * (i + 1), "elapsed_s": 0.5 * (i + 1), **more}


def evaluation(i: int, val_loss: float) -> dict:
    return {"kind": "eval", "iter": i, "train_loss": 1.0, "val_loss": val_loss, "tokens": 10 * i, "elapsed_s": 0.5 * i}


def header(start: int = 0) -> dict:
    return {"kind": "run", "start": start}


def write(folder: Path, rows: list[dict], tail: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / plot.METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    rows = [header(), evaluation(0, 4.2), *(train(i, 4.0 / (i + 1)) for i in range(20)), evaluation(20, 0.5)]
    return write(tmp_path / "first", rows)


def test_a_run_is_read_by_folder_or_by_file(out: Path):
    history = plot.read_history(out)
    assert history.name == "first"
    xs, ys = history.column("train", "loss", "tokens")
    assert xs.tolist() == [10 * (i + 1) for i in range(20)] and ys.tolist() == [4.0 / (i + 1) for i in range(20)]
    assert history.column("evals", "val_loss", "iter")[1].tolist() == [4.2, 0.5]
    assert plot.read_history(out / plot.METRICS) == history


def test_a_resumed_run_drops_what_the_abandoned_process_logged_later(tmp_path: Path):
    before = [header(), *(train(i, 9.0) for i in range(8)), evaluation(4, 3.0), evaluation(8, 9.0)]
    after = [header(4), *(train(i, 1.0, elapsed_s=0.5 * (i - 3)) for i in range(4, 6))]
    history = plot.read_history(write(tmp_path / "run", before + after))
    assert history.column("train", "loss", "iter")[1].tolist() == [9.0] * 4 + [1.0] * 2
    assert sorted(history.evals) == [4]  # measured on the very weights that the resume loaded
    seconds = history.column("train", "loss", "elapsed_s")[0]
    assert (np.diff(seconds) > 0).all(), "the seconds go on after a resume"


def test_a_resumed_run_that_logged_nothing_yet_ends_where_it_resumed(tmp_path: Path):
    rows = [header(), *(train(i, 9.0) for i in range(8)), header(4)]
    assert sorted(plot.read_history(write(tmp_path / "run", rows)).train) == [0, 1, 2, 3]


def test_a_fresh_run_in_the_same_folder_starts_over(tmp_path: Path):
    rows = [header(), train(0, 5.0), train(1, 5.0), header(), train(0, 2.0)]
    assert plot.read_history(write(tmp_path / "run", rows)).column("train", "loss", "iter")[1].tolist() == [2.0]


def test_a_line_cut_off_by_a_kill_is_passed_over(tmp_path: Path):
    cut = '{"kind": "train", "iter": 2, "lo'
    assert len(plot.read_history(write(tmp_path / "killed", [train(0, 5.0), train(1, 4.0)], cut)).train) == 2
    goes_on = json.dumps(header(2)) + "\n" + json.dumps(train(2, 3.0)) + "\n"
    for i, joint in enumerate(["\n", ""]):
        folder = write(tmp_path / f"resumed{i}", [train(0, 5.0), train(1, 4.0)], cut + joint + goes_on)
        assert plot.read_history(folder).column("train", "loss", "iter")[1].tolist() == [5.0, 4.0, 3.0]


@pytest.mark.parametrize("line", ['{"kind": "train", "iter": 2, "lo', "[1, 2]", '{"loss": 1.0}'])
def test_an_unreadable_line_elsewhere_is_named(tmp_path: Path, line: str):
    folder = write(tmp_path / "run", [train(0, 5.0)], line + "\n" + json.dumps(train(3, 1.0)) + "\n")
    with pytest.raises(DataError) as error:
        plot.read_history(folder)
    assert error.value.where == f"{folder / plot.METRICS}:2"


def test_nanogpt_console_log(tmp_path: Path):
    log = tmp_path / "gpt2.log"
    log.write_text(
        "tokens per iteration will be: 1,000\nnumber of parameters: 0.80M\n"
        "step 0: train loss 4.2874, val loss 4.2823\n"
        "iter 0: loss 4.2649, time 2000.00ms, mfu -100.00%\n"
        "iter 10: loss 3.1000, time 500.00ms, mfu 1.21%\n"
        "saving checkpoint to out\n"
        "step 20: train loss 2.5000, val loss nan\n"
    )
    history = plot.read_history(log)
    assert history.name == "gpt2"
    assert history.column("train", "loss", "iter")[1].tolist() == [4.2649, 3.1]
    assert history.column("train", "tokens_per_s", "tokens")[1].tolist() == [500.0, 2000.0]
    assert history.column("train", "tokens_per_s", "tokens")[0].tolist() == [1000, 11000]
    assert history.column("train", "loss", "elapsed_s")[0].tolist() == [2.0, 7.0]
    assert np.isnan(history.evals[20]["val_loss"])
    plot.draw([history], "time")


def test_missing_and_empty_runs(tmp_path: Path):
    with pytest.raises(DataError, match="no metrics there"):
        plot.read_history(tmp_path)
    with pytest.raises(DataError, match="no iteration"):
        plot.read_history(write(tmp_path / "run", [header()]))


def test_smooth_is_a_centred_mean_of_the_finite_values():
    assert plot.smooth(np.array([1.0, 2.0, 6.0])).tolist() == [1.5, 3.0, 4.0]
    assert plot.smooth(np.array([1.0, np.nan, 3.0])).tolist() == [1.0, 2.0, 3.0]
    line = np.arange(1000.0)
    assert np.allclose(plot.smooth(line)[10:-10], line[10:-10]), "no lag on a slope"


def test_limits_leave_the_first_drop_out_and_ignore_nan():
    x, y = np.arange(100.0), np.full(100, 2.0)
    y[:3], y[50], y[60] = 11.0, np.nan, 3.0
    low, high = plot.limits([(x, y)]) or (0.0, 0.0)
    assert 1.9 <= low < 2.0 and 3.0 < high <= 3.1
    assert plot.limits([(x, np.full(100, np.nan))]) is None


def test_two_runs_make_one_picture(out: Path, tmp_path: Path):
    other = write(tmp_path / "second", [header(), *(train(i, 3.0) for i in range(30)), evaluation(0, 3.1)])
    picture = tmp_path / "plot.png"
    plot.main([str(out), str(other), f"--out={picture}", "--x=tokens"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    figure = plot.draw([plot.read_history(out), plot.read_history(other)], "tokens")
    assert [ax.get_title() for ax in figure.axes] == [
        "loss", "learning rate", "tokens/s", "gradient norm, before clipping"
    ]  # fmt: skip
    loss = figure.axes[0]
    legend = loss.get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == [
        "first: train 0.205, smoothed",
        "first: val, best 0.5000",
        "second: train 3.000, smoothed",
        "second: val, best 3.1000",
    ]
    assert loss.get_xlabel() == "tokens"


def test_a_panel_without_data_is_left_out(tmp_path: Path):
    rows = [{"kind": "train", "iter": i, "loss": 1.0, "lr": 1e-3} for i in range(3)]
    figure = plot.draw([plot.read_history(write(tmp_path / "run", rows))])
    assert [ax.get_title() for ax in figure.axes] == ["loss", "learning rate"]


def test_runs_of_one_name_are_told_apart(tmp_path: Path):
    runs = [str(tmp_path / "a" / "out"), str(tmp_path / "b" / "out")]
    histories = plot.name_apart([plot.History("out"), plot.History("out")], runs)
    assert [h.name for h in histories] == runs


def test_command_line_errors(out: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="RUN missing"):
        plot.main([])
    with pytest.raises(ConfigError, match="cannot be written"):
        plot.main([str(out), f"--out={tmp_path / 'plot.docx'}"])
