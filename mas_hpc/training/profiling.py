"""Traces of torch's profiler for chosen steps: open them with ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import profile, supported_activities

from mas_hpc.config_distributed import ProfileConfig


class Profiler:
    """Writes <folder>/profile/rank_<r>_step_<n>.json.gz for each step of the training that the configuration names."""

    def __init__(self, folder: Path, rank: int, settings: ProfileConfig) -> None:
        self._folder, self._rank, self._settings = folder / "profile", rank, settings
        self._running: profile | None = None

    def begin(self, phase: str, step: int) -> None:
        """A step begins."""
        settings = self._settings
        if phase == "train" and settings.first <= step < settings.first + settings.count:
            self._running = profile(activities=supported_activities())
            self._running.start()

    def end(self, step: int) -> None:
        """The step is over."""
        if self._running is None:
            return
        self._running.stop()
        self._folder.mkdir(exist_ok=True)
        self._running.export_chrome_trace(str(self._folder / f"rank_{self._rank}_step_{step}.json.gz"))
        self._running = None
