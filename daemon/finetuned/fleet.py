"""The GPUs that jobs may use: those found at the start, less those that failed since, that config.json leaves alone, or
that other people's processes are using.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

import structlog

from finetuned.config import Config
from finetuned.durable import write_file
from finetuned.gpu import Gpu, Sampler
from finetuned.home import Home
from finetuned.scheduler import CPU, Device

_GIB = 2**30
_LOOK_EVERY = 2.0  # seconds between two looks at what others have in memory

_log = structlog.get_logger()


class Fleet:
    """Knows which GPUs failed or are not for jobs, and says so in a file that `finetuned status` reads."""

    def __init__(self, home: Home, sampler: Sampler) -> None:
        """Begin with all GPUs that the sampler found."""
        self._home = home
        self._sampler = sampler
        self._found = list(sampler.gpus)
        self._aside: dict[str, str] = {}
        self._others: dict[str, int] = {}  # bytes that they hold, by UUID, when last looked at
        self._looked_at = -_LOOK_EVERY
        self._busy: dict[str, str] = {}  # why no job is started on it, by UUID, when last asked
        self._said: object = None
        self._told: list[dict[str, object]] = []
        with suppress(OSError):
            home.gpus.unlink(missing_ok=True)

    def devices(self, config: Config, at_work: Collection[str]) -> list[Device]:
        """Give what jobs may be started on now. Those in `at_work`, where jobs of ours are, are not busy with others.

        Where the daemon's own CUDA_VISIBLE_DEVICES names GPUs by other things than UUIDs, which nobody can tell apart
        from here, all that it names is one device. Without a GPU the processor is one.
        """
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        if chosen == "" or (chosen is None and not self._found):
            return [Device(CPU, "the processor")]
        if not self._named():
            return [Device(str(chosen), f"GPU {chosen}")]
        usable = self._usable(config)
        self._busy = {gpu.uuid: self._why_busy(gpu, config, at_work) for gpu in usable}
        self._tell(config)
        return [
            Device(gpu.uuid, str(gpu), gpu.memory_total, self._others.get(gpu.uuid, 0), self._busy[gpu.uuid])
            for gpu in usable
        ]

    def look(self, config: Config, trainers: Mapping[str, Collection[int]]) -> None:
        """Read what others use of GPUs, and so notice those that are gone. `trainers` gives by GPU the processes of
        ours there, and those GPUs are asked only where jobs may share them.
        """
        self._read([gpu for gpu in self._usable(config) if config.share_gpus or gpu.uuid not in trainers], trainers)

    def rest(self, config: Config) -> None:
        """Note that nobody waits for a GPU, so that none is asked whether others use it."""
        self._busy = {}
        self._tell(config)

    def count(self, config: Config) -> int:
        """How many GPUs jobs could have if none failed and nobody else used them; 0 where they are not told apart."""
        return len(self._left(self._named(), config))

    @property
    def uuids(self) -> list[str]:
        """The GPUs that are left, whoever uses them."""
        return [gpu.uuid for gpu in self._found if gpu.uuid not in self._aside]

    def most(self, config: Config) -> int:
        """How many processes one job can have here: GPUs where they are told apart, else entries of
        CUDA_VISIBLE_DEVICES, else processors.
        """
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        return self.count(config) or (len(chosen.split(",")) if chosen else os.cpu_count() or 1)

    def none_left(self, config: Config) -> bool:
        """Whether there are GPUs and none of them is for jobs, so that jobs have to wait.

        Where CUDA_VISIBLE_DEVICES holds numbers nobody can tell whether it means one that failed, so it may.
        """
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not self._found:
            return False
        if not self._named():
            return bool(self._aside)
        return not self._usable(config)

    def heed(self, config: Config) -> list[str]:
        """Set aside what failed since the last call; their UUIDs."""
        failed = []
        for event in self._sampler.events():
            _log.warning("GPU trouble", gpu=event.uuid, kind=event.kind, detail=event.detail)
            if event.set_aside and event.uuid not in self._aside:
                self._aside[event.uuid] = event.detail
                failed.append(event.uuid)
                _log.error("GPU set aside", gpu=event.uuid, why=event.detail, then="no job uses it until a new start")
        self._tell(config)
        return failed

    def serves(self, uuid: str, visible: str) -> bool:
        """Whether a trainer with this CUDA_VISIBLE_DEVICES may be at work on the GPU; numbers can be any of them."""
        if any(known.uuid in visible for known in self._found):
            return uuid in visible
        return bool(visible)

    def _named(self) -> list[Gpu]:
        """Leave those that the daemon's own CUDA_VISIBLE_DEVICES names, or all where there is none."""
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        return [gpu for gpu in self._found if chosen is None or gpu.uuid in chosen.split(",")]

    def _usable(self, config: Config) -> list[Gpu]:
        """Leave those that are for jobs and have not failed."""
        return [gpu for gpu in self._left(self._named(), config) if gpu.uuid not in self._aside]

    def _left(self, gpus: Sequence[Gpu], config: Config) -> Sequence[Gpu]:
        """Leave those that config.json names, or all; say once what it names and is not there."""
        if config.gpus is None:
            return gpus
        unknown = [name for name in config.gpus if not any(name in (gpu.uuid, gpu.index) for gpu in self._found)]
        if unknown != self._said:
            self._said = unknown
            if unknown:
                there = ", ".join(f"{gpu.index}: {gpu.uuid}" for gpu in self._found)
                _log.error("no such GPU", gpus=", ".join(map(str, unknown)), there=there, then="mend `gpus`")
        return [gpu for gpu in gpus if gpu.uuid in config.gpus or gpu.index in config.gpus]

    def _read(self, gpus: Sequence[Gpu], trainers: Mapping[str, Collection[int]]) -> None:
        empty = [gpu.uuid for gpu in gpus if gpu.uuid not in trainers]
        new = any(uuid not in self._others for uuid in empty)
        if new or (gpus and time.monotonic() >= self._looked_at + _LOOK_EVERY):
            self._looked_at = time.monotonic()
            found = self._sampler.memory_of_others(trainers)
            # Of one that does not tell it is what it was: the part of a trainer that has just begun is not to be seen.
            self._others = {gpu.uuid: found.get(gpu.uuid, self._others.get(gpu.uuid, 0)) for gpu in gpus}

    def _why_busy(self, gpu: Gpu, config: Config, at_work: Collection[str]) -> str:
        others = self._others.get(gpu.uuid, 0)
        if gpu.uuid in at_work or others <= config.gpu_busy_gib * _GIB:
            return ""
        return f"is used by others: {others / _GIB:.1f} GiB are taken, and gpu_busy_gib is {config.gpu_busy_gib:g}"

    def _tell(self, config: Config) -> None:
        """Write how it is with each GPU, where that has changed."""
        left = {gpu.uuid for gpu in self._left(self._found, config)}
        named = {gpu.uuid for gpu in self._named()}
        numbers = bool(os.environ.get("CUDA_VISIBLE_DEVICES")) and not named  # nobody can tell which it means
        states: list[dict[str, object]] = []
        for gpu in self._found:
            if gpu.uuid in self._aside:
                state, why = "set_aside", self._aside[gpu.uuid]
            elif gpu.uuid not in named and not numbers:
                state, why = "left_alone", "is left alone by CUDA_VISIBLE_DEVICES"
            elif gpu.uuid not in left and not numbers:
                state, why = "left_alone", "is left alone by `gpus` in config.json"
            else:
                why = self._busy.get(gpu.uuid, "")
                state = "busy" if why else "usable"
            states.append({"uuid": gpu.uuid, "index": gpu.index, "name": gpu.name, "state": state, "why": why})
        if states == self._told:
            return
        with suppress(OSError):  # the log has what matters
            write_file(self._home.gpus, json.dumps(states, indent=2).encode() + b"\n")
            self._told = states
