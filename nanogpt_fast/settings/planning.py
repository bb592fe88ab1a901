"""The flags of `plan`."""

import math
from dataclasses import dataclass

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.settings.config import require_range

PROG = "python -m nanogpt_fast.plan"
EXAMPLES = f"""\
examples:
  {PROG} --hours=24 --gpu=h100 --gpus=8
  {PROG} --flops=1e19 --dataset=fineweb
  {PROG} --tokens=9e9 --epochs=1
  {PROG} --config gpt2_124m --hours=10 --gpu=a100
  {PROG} --published"""


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """A budget, a model, or both; 0 leaves a number open."""

    flops: float = 0.0  # model FLOPs of forward and backward, as MFU counts them
    hours: float = 0.0  # of all GPUs together at work
    tokens: float = 0.0  # to train on; without a model, its best size is taken
    params: float = 0.0  # of the model, all of them: the nearest of GPT-2's shapes is taken
    model: str = ""  # or a preset or file of train's: its model, batch and rates (--config says the same)
    gpu: str = "h100"  # a name as --dry_run's --on takes: h100, a100-40gb, rtx4090, or the driver's
    gpus: int = 1  # of them
    mfu: float = 0.0  # share of the data sheet's peak; 0 takes what was measured on one H100
    dataset: str = "openwebtext"  # folder in data_dir; its name says which published runs speak for its loss
    data_dir: str = "data"  # parent of the dataset folders
    epochs: float = 0.0  # passes over the dataset at most; 0 as many as the budget is enough for
    published: bool = False  # instead, what is expected of published runs beside what they were
    json: bool = False  # one JSON object

    def __post_init__(self) -> None:
        for key in ("flops", "hours", "tokens", "params", "epochs"):
            value = getattr(self, key)
            require_range(math.isfinite(value) and value >= 0, key, "a finite number > 0, or 0 for none", value)
        require_range(0.0 <= self.mfu <= 1.0, "mfu", "0 < mfu <= 1", self.mfu)
        whole = 1 <= self.gpus <= 8 or self.gpus % 8 == 0 and self.gpus <= 4096
        require_range(whole, "gpus", "1 to 8, or nodes of 8: 16, 24, ... 4096", self.gpus)
        budgets = [f"--{key}" for key in ("flops", "hours", "tokens") if getattr(self, key)]
        models = [f"--{key}" for key in ("params", "model") if getattr(self, key)]
        for given, what in ((budgets, "budget"), (models, "model")):
            if len(given) > 1:
                raise ConfigError(f"more than one {what}", where=" ".join(given), expected="one of them")
        if not self.published and not budgets and not models:
            raise ConfigError(
                "there is neither a budget nor a model",
                where="command line",
                expected="one of --flops, --hours, --tokens, --params, --model",
                hint=f"{PROG} --hours=24 --gpu=h100 --gpus=8",
            )
