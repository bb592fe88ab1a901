"""Make the folder that Hugging Face's kernel hub carries: `kernels.get_kernel` then loads the ops from it.

    python kernels/build_hub.py [--out build/hub/nanogpt-kernels]        or: make kernels-hub

A repository of the hub holds build/VARIANT/; for kernels of Python and Triton alone, VARIANT is torch-cuda. It has the
package's files, a folder of its name, where older versions of `kernels` look, and metadata.json: the id that it
is imported by, which is also its ops' namespace, and a SHA-256 of each file. Copies of different content have
different ids, and live in one process. Source: huggingface.co/docs/kernels/kernel-requirements. Nothing is uploaded.
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE / "nanogpt_kernels"
VERSION = 0  # the hub's, an int; 0 by its convention while what is exported may change

BY_NAME = '''"""The ops, for versions of `kernels` that import the folder of the kernel's name."""

import importlib.util
import json
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_ID = json.loads((_ROOT / "metadata.json").read_text())["id"]
if _ID not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_ID, _ROOT / "__init__.py")
    sys.modules[_ID] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_ID])

__all__ = sys.modules[_ID].__all__


def __getattr__(name):
    return getattr(sys.modules[_ID], name)
'''


def build(out: Path) -> Path:
    """Write the hub's repository to `out`, its build folder anew; the variant's folder is returned."""
    shutil.rmtree(out / "build", ignore_errors=True)
    variant = out / "build" / "torch-cuda"
    shutil.copytree(PACKAGE, variant, ignore=shutil.ignore_patterns("__pycache__"))
    (variant / PACKAGE.name).mkdir()
    (variant / PACKAGE.name / "__init__.py").write_text(BY_NAME)
    files = {str(p.relative_to(variant)): _sha256(p) for p in sorted(variant.rglob("*")) if p.is_file()}
    (variant / "metadata.json").write_text(json.dumps(metadata(files), indent=2) + "\n")
    shutil.copy(HERE.parent / "LICENSE", out)
    (out / "README.md").write_text(_card())
    return variant


def metadata(files: dict[str, str]) -> dict[str, object]:
    """metadata.json of a variant of these files, {path: base64 of its SHA-256}."""
    version = _search(r'__version__ = "(.+)"', "__init__.py")[0].replace(".", "_")
    content = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]
    archs = _search(r"^    (\d+)(\d): Architecture\(", "launch_rows.py")
    return {
        "name": PACKAGE.name.replace("_", "-"),
        "id": f"{PACKAGE.name}_{version}_{content}",
        "version": VERSION,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": "cuda", "archs": [f"{major}.{minor}" for major, minor in archs]},
        "digest": {"algorithm": "sha256", "files": files},
    }


def _search(pattern: str, file: str) -> list:
    """All matches: read, not imported, so that the folder is made where there is no torch."""
    return re.findall(pattern, (PACKAGE / file).read_text(), re.MULTILINE)


def _sha256(path: Path) -> str:
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


CARD = f"""---
library_name: kernels
license: mit
---

# nanogpt-kernels

```python
from kernels import get_kernel

ops = get_kernel("OWNER/nanogpt-kernels", version={VERSION}, trust_remote_code=True)
y = ops.layernorm(x, weight, bias)
```
"""


def _card() -> str:
    return CARD + re.sub(r"^# .*\n", "", (HERE / "README.md").read_text(), count=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "build/hub/nanogpt-kernels", metavar="DIR")
    where = build(parser.parse_args().out)
    print(f"{where}: id {json.loads((where / 'metadata.json').read_text())['id']}")
