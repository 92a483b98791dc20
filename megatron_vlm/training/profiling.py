"""Record a torch.profiler trace of some steps."""

from __future__ import annotations

import os
from pathlib import Path

import torch.profiler

from megatron_vlm import platform


class ProfileWindow:
    """Records the steps of `logging.profile` into `run_dir/profile/steps_FIRST_LAST.json.gz`; used on rank 0.

    What the loop does between steps and right after the last (evaluating, saving) is in the trace too, which opens in
    Perfetto or chrome://tracing. A run that ends inside the window leaves what it had recorded, and one that resumes
    there records the rest under the numbers of its steps.

    Args:
        run_dir: folder of the run.
        window: first and last step, both recorded; None records nothing.
    """

    def __init__(self, run_dir: str | os.PathLike, window: list[int] | None) -> None:
        self._folder = Path(run_dir) / "profile"
        self._window = window
        self._profiler: torch.profiler.profile | None = None
        self._first = self._last = 0

    def step(self, step: int) -> None:
        """Step `step` is about to begin; call it before the batch is fetched."""
        inside = self._window is not None and self._window[0] <= step <= self._window[1]
        if not inside:
            self.close()
        elif self._profiler is None:
            self._profiler = torch.profiler.profile(activities=platform.current().profiler_activities())
            self._profiler.start()
            self._first = self._last = step
        else:
            self._profiler.step()
            self._last = step

    def close(self) -> None:
        """Write the trace if one is being recorded; call it when the run ends, whether or not it failed."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps_{self._first}_{self._last}.json.gz"
        temporary = path.with_name("partial_" + path.name)  # the profiler compresses by the name's ending
        profiler.export_chrome_trace(str(temporary))
        os.replace(temporary, path)
