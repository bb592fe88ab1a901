"""What keeps a bad step out of the parameters, decided on the device, so that a captured step decides it too."""

import torch
from torch import Tensor

MIN_SPREAD = 1e-3  # nats: where losses hardly differ (a batch learnt by heart) their rounding is no spike


class LossGuard:
    """Refuses an update whose loss is not finite or, with sigma, lies more than sigma standard deviations above the
    mean of the last `window` losses that were not refused; until so many are known, it lets all finite ones pass.

    The rule is OLMo-core's SkipStepOptimizer (sigma_factor 6, rolling_interval_length 128), by the loss alone, and what
    was refused stays out of the window: one NaN in it would refuse all that follows. Tensors lie on `device`, and the
    losses are part of a checkpoint: after a resume the same steps are refused.
    """

    def __init__(self, sigma: float, window: int, device: torch.device):
        self.sigma = sigma
        self.losses = torch.zeros(window if sigma else 0, dtype=torch.float64, device=device)  # a ring
        self.seen = torch.zeros(1, dtype=torch.int64, device=device)  # losses that went into it

    def refuses(self, loss: Tensor) -> Tensor:
        """bool [] from a float64 [] loss."""
        refused = ~torch.isfinite(loss)
        if not self.sigma:
            return refused
        spread = self.losses.std(correction=0).clamp(min=MIN_SPREAD)
        spike = loss - self.losses.mean() > self.sigma * spread
        return refused | (spike & (self.seen[0] >= len(self.losses)))

    def add(self, loss: Tensor, refused: Tensor) -> None:
        """Note the loss of a step, unless that was refused."""
        if self.sigma:
            at = self.seen % len(self.losses)
            self.losses.index_copy_(0, at, torch.where(refused, self.losses.index_select(0, at), loss))
            self.seen.add_(~refused)

    def state_dict(self) -> dict[str, list[float]]:
        """JSON: the losses in the ring, oldest first."""
        if not self.sigma:
            return {}
        seen, losses = int(self.seen), self.losses.tolist()
        at = seen % len(losses)
        return {"recent_losses": losses[:seen] if seen < len(losses) else losses[at:] + losses[:at]}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """The inverse; of a longer window the newest losses, of none nothing."""
        recent = state.get("recent_losses", [])[-len(self.losses) :] if self.sigma else []
        self.losses[: len(recent)] = torch.tensor(recent, dtype=torch.float64)
        self.seen.fill_(len(recent))
