"""docs/scaling_laws.md is what its script writes; its tables add up to the counters that training uses."""

from pathlib import Path

import page_blocks
import pytest
import scaling_laws_page as page
from tiny_checkpoint import CONFIG, save_steps

from nanogpt_fast.hardware import flops_per_token

HEAVY = {"bytes", "plan"}  # they predict memory


@pytest.mark.parametrize("heavy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_page_is_up_to_date(heavy: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    names = {match[2].split()[0] for match in page_blocks.BLOCK.finditer(page.PAGE.read_text())}
    assert names == set(page.MAKERS), "a maker without a block, or the reverse"
    for name in sorted(names & HEAVY if heavy else names - HEAVY):
        assert page.main(["--check", "--only", name]) == 0, f"{name}: run python {page.SCRIPT}"


def test_a_changed_figure_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    changed = tmp_path / "scaling_laws.md"
    changed.write_text(page.PAGE.read_text().replace("| 316M | 11.65B |", "| 400M | 9.20B |"))
    monkeypatch.setattr(page, "PAGE", changed)
    assert page.main(["--check", "--only", "notebook"]) == 1


@pytest.mark.parametrize("name", page.MODELS)
def test_parts_add_up_to_the_counters(name: str):
    shape = page.MODELS[name]
    assert sum(page.by_part(shape).values()) == shape.num_params(non_embedding=False)
    assert sum(page.flops_by_part(shape).values()) == flops_per_token(shape)["nanogpt"]


def test_a_checkpoint_holds_twelve_bytes_a_parameter(tmp_path: Path):
    (folder,) = save_steps(tmp_path, 1)
    held = 0
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        held += len(raw) - 8 - int.from_bytes(raw[:8], "little")  # less the header
    assert held == 12 * CONFIG.num_params(non_embedding=False)


@pytest.mark.slow  # it imports matplotlib
def test_the_picture_is_drawn():
    pytest.importorskip("matplotlib")
    from scaling_laws_plot import draw

    assert draw(page.BUDGET).startswith(b"\x89PNG")
