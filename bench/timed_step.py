"""A training step of whatever nanogpt_fast is first on PYTHONPATH, for against_revision.py, which times two of them.

It imports nothing of bench/ but turns.py, and takes of nanogpt_fast only what its first revisions had too. The config
file is this checkout's: both sides do the same work.
"""

import argparse
import importlib
import importlib.util
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("nanogpt_fast", "nanogpt_kernels")
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def make_step(name: str, device_type: str, dtype: str, kernels: str = "reference") -> Callable[[], None]:
    """One optimisation step of a micro-batch of configs/NAME.toml on random tokens, until the device has finished."""
    import torch

    from nanogpt_fast.distributed import join
    from nanogpt_fast.model import GPT
    from nanogpt_fast.ops import REFERENCE
    from nanogpt_fast.optim import AdamW, FlatParameters
    from nanogpt_fast.step import TrainStep

    moved = importlib.util.find_spec("nanogpt_fast.settings")  # they stood at the top once
    config: Any = importlib.import_module("nanogpt_fast.settings.config" if moved else "nanogpt_fast.config")
    ops = REFERENCE
    if kernels != "reference":
        from nanogpt_fast.ops import select_ops

        ops = select_ops(kernels, device_type)
    sections = tomllib.loads((CONFIGS / f"{name}.toml").read_text())
    data, model = sections["data"], sections["model"]
    words = model.get("vocab_size") or (65 if "char" in data["dataset"] else 50304)
    sizes = {key: value for key, value in model.items() if key != "vocab_size"}
    shape = config.GPTConfig(block_size=data["block_size"], vocab_size=words, **sizes)
    world = join(device_type, "nccl" if device_type == "cuda" else "gloo", 1)
    network = GPT(shape, ops).train()
    network.init_weights(torch.Generator().manual_seed(1337))
    flat = FlatParameters(network, getattr(torch, dtype), world.device)
    optimizer = AdamW(flat, config.Config().optim, network.ops, dtype == "float16")
    optimizer.set_lr(1e-4)
    step = TrainStep(network, optimizer, world, 1337)
    tokens = torch.randint(words, (1, data["batch_size"], shape.block_size + 1))

    def run() -> None:
        step(tokens, 0).loss.item()

    return run


def main() -> None:
    from turns import serve

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--kernels", required=True)
    parser.add_argument("--root", required=True, type=Path, help="whose nanogpt_fast is meant")
    args = parser.parse_args()

    def make() -> tuple[dict[str, Any], Callable[[], None], Callable[[], dict[str, Any]]]:
        step = make_step(args.config, args.device, args.dtype, args.kernels)
        if foreign := strangers(args.root.resolve()):
            raise ImportError(f"there is no {foreign[0]} in {args.root}")
        return {}, step, dict

    serve(make)


def strangers(root: Path) -> list[str]:
    """Our modules that were loaded from elsewhere: an editable install of another checkout answers for what is missing
    here, whatever PYTHONPATH says."""
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] in PACKAGES}
    return [name for name, module in ours.items() if root not in Path(module.__file__ or "").resolve().parents]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
