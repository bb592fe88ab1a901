"""A trainer that trains nothing, in place of the one that bench/ablate.py runs."""

import sys
from pathlib import Path

import ablate
import pytest

# A run's metrics.jsonl as ablate reads it. `loss`, and the exit code `code`, are of the flags by the script before it.
WRITE = """
import json, pathlib, sys, time
flags = dict(word[2:].partition("=")[::2] for word in sys.argv if word.startswith("--") and "=" in word)
out = pathlib.Path(flags["out_dir"]); out.mkdir()
time.sleep(0.05)
{outcome}
lines = [{{"kind": "run", "dtype": "float32"}}]
lines += [{{"kind": "train", "iter": i, "loss": loss, "grad_norm": i / 10, "clipped": 10 * i}} for i in (0, 10, 30)]
lines += [{{"kind": "eval", "iter": i, "val_loss": loss - i / 100, "tokens": i}} for i in (0, 30)]
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
print("last words"); sys.exit(code)
"""


def use(monkeypatch: pytest.MonkeyPatch, folder: Path, outcome: str) -> None:
    """From now on ablate's runs are these: outcome, of Python, makes `loss` and the exit code `code` of `flags`."""
    (folder / "stub.py").write_text(WRITE.format(outcome=outcome))
    real = ablate.command_of
    monkeypatch.setattr(
        ablate, "command_of", lambda *a, **k: [sys.executable, str(folder / "stub.py"), *real(*a, **k)[3:]]
    )
