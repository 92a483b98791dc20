"""Notices steps that should not be applied: a loss or gradient norm that is not finite, or a spike."""

from __future__ import annotations

import math
from dataclasses import dataclass

_MEMORY = 0.95
_STEPS_BEFORE_SPIKES_COUNT = 20


@dataclass
class StepCheck:
    """Judges gradient norms by a running mean of those applied.

    Args:
        spike_ratio: a norm beyond this many times the mean is a spike; None disables the check.
    """

    spike_ratio: float | None
    mean: float = 0.0
    steps: int = 0

    def problem(self, loss: float, norm: float) -> str | None:
        """Return why the step should not be applied, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        ratio = self.spike_ratio
        if ratio is not None and self.steps >= _STEPS_BEFORE_SPIKES_COUNT and norm > ratio * self.mean:
            return f"the gradient norm {norm:.4g} is over {ratio} times the recent {self.mean:.4g}"
        return None

    def applied(self, norm: float) -> None:
        """Count a step that was applied."""
        self.mean = norm if self.steps == 0 else _MEMORY * self.mean + (1 - _MEMORY) * norm
        self.steps += 1

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run needs to judge steps in the same way."""
        return {"mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a saved state."""
        self.mean, self.steps = float(state["mean"]), int(state["steps"])
