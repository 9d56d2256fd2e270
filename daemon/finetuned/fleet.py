"""The GPUs that jobs may use: those found at the start, less those that failed since. Until the daemon starts anew."""

from __future__ import annotations

import json
import os
from contextlib import suppress

import structlog

from finetuned.durable import write_file
from finetuned.gpu import Sampler
from finetuned.home import Home

_log = structlog.get_logger()


class Fleet:
    """Knows which GPUs failed, and says so in a file that `finetuned status` reads."""

    def __init__(self, home: Home, sampler: Sampler) -> None:
        """Begin with all GPUs that the sampler found."""
        self._home = home
        self._sampler = sampler
        self._found = [gpu.uuid for gpu in sampler.gpus]
        self._aside: dict[str, str] = {}
        with suppress(OSError):
            home.gpus_aside.unlink(missing_ok=True)

    def next(self) -> str | None:
        """Give the GPU for the next job; None if there is none."""
        return next((uuid for uuid in self._found if uuid not in self._aside), None)

    @property
    def all_failed(self) -> bool:
        """Whether there were GPUs for jobs and none is left, so that jobs have to wait."""
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        if chosen == "":
            return False
        named = [name for name in (chosen or "").split(",") if name in self._found]
        return bool(self._found) and all(uuid in self._aside for uuid in named or self._found)

    def heed(self) -> list[str]:
        """Set aside what failed since the last call; their UUIDs."""
        failed = []
        for event in self._sampler.events():
            _log.warning("GPU trouble", gpu=event.uuid, kind=event.kind, detail=event.detail)
            if event.set_aside and event.uuid not in self._aside:
                self._aside[event.uuid] = event.detail
                failed.append(event.uuid)
                _log.error("GPU set aside", gpu=event.uuid, why=event.detail, then="no job uses it until a new start")
        if not failed:
            return failed
        with suppress(OSError):  # the log has it too
            write_file(self._home.gpus_aside, json.dumps(self._aside, indent=2).encode() + b"\n")
        return failed

    def serves(self, uuid: str, visible: str) -> bool:
        """Whether a trainer with this CUDA_VISIBLE_DEVICES may be at work on the GPU; numbers can be any of them."""
        if any(known in visible for known in self._found):
            return uuid in visible
        return bool(visible)
