"""The engines that run trainers on other machines, as config.json names them, and which of them do not answer."""

from __future__ import annotations

import time

import structlog

from finetuned.config import Config
from finetuned.home import Home
from finetuned.launchers import Launcher

_FIRST_PAUSE, _LAST_PAUSE = 5.0, 600.0  # seconds until one that did not answer is asked again, doubled each time

_log = structlog.get_logger()


class Engines:
    """Launchers by name, made when they are first needed and anew when their settings change."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._made: dict[str, tuple[object, Launcher]] = {}
        self._down: dict[str, tuple[float, float, str]] = {}  # until when, for how long, and why

    def launcher(self, name: str, config: Config) -> Launcher:
        """Give the launcher of this name. Only what is used is imported: most daemons have one machine."""
        settings = config.ray if name == "ray" else config.slurm
        if self._made.get(name, (None,))[0] != settings:
            self._made[name] = settings, self._make(name, config)
            self._down.pop(name, None)
        return self._made[name][1]

    def why_not(self, name: str) -> str:
        """Say why nothing is submitted to an engine now; nothing where it may be."""
        until, pause, why = self._down.get(name, (0.0, 0.0, ""))
        back = name in self._made and self._made[name][1].back_at > until - pause
        return why if time.monotonic() < until and not back else ""

    def answered(self, name: str) -> None:
        """Note that an engine took a job."""
        if self._down.pop(name, None):
            _log.info("engine answers again", launcher=name)

    def failed(self, name: str, error: OSError) -> None:
        """Note that an engine took none."""
        before = self._down.get(name)
        pause = min(2 * before[1], _LAST_PAUSE) if before else _FIRST_PAUSE
        why = f"{name} takes no jobs: {error}; it is tried again"
        self._down[name] = time.monotonic() + pause, pause, why
        if before is None:  # once in a night
            _log.error("engine takes no jobs", launcher=name, error=str(error), then="it is tried again")

    def _make(self, name: str, config: Config) -> Launcher:
        if name == "ray":
            from finetuned.launchers.ray import RayLauncher

            return RayLauncher(config.ray)
        from finetuned.launchers.slurm import SlurmLauncher

        return SlurmLauncher(config.slurm, self._home)
