"""What the GPUs are doing, as NVML tells it.

No GPU, no driver and no library are normal answers here. Nothing in this module imports torch,
writes a file or changes a GPU. Polling wakes sleeping GPUs: sample only while a job runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, Self

import pynvml as nvml
import structlog

log = structlog.get_logger()

# Errors that speak of the GPU, not of the question. Unknown can mean either, see `Sampler._ask`.
_GONE = {
    nvml.NVML_ERROR_GPU_IS_LOST,
    nvml.NVML_ERROR_RESET_REQUIRED,
    nvml.NVML_ERROR_GPU_NOT_FOUND,
}
_WHY_NONE = {
    nvml.NVML_ERROR_LIBRARY_NOT_FOUND: "No NVIDIA driver is installed (no libnvidia-ml.so.1).",
    nvml.NVML_ERROR_DRIVER_NOT_LOADED: "The NVIDIA driver is installed, but it is not loaded.",
    nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "The NVIDIA driver was updated; restart the machine.",
}

# NVML's bits. Idle (1) is left out: nothing holds an idle GPU back.
_THROTTLE_REASONS = {
    0x002: "clock setting",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
    0x100: "display clock setting",
    0x200: "board limit",
    0x400: "reliability",
}

# Xids after which a GPU works on: faults of the program (13, 31, 43), the clean-up after a program
# that was killed (45, so our own trainers too), memory errors that the GPU contained (63, 94).
# Source: NVIDIA's Xid catalog, https://docs.nvidia.com/deploy/xid-errors/
_HARMLESS_XIDS = {13, 31, 43, 45, 63, 94}

_EVENTS_AT_ONCE = 100  # a storm of Xids must not hold the daemon's loop


@dataclass(frozen=True)
class Gpu:
    """A GPU. `index` is NVML's, CUDA may count in another order. Memory is in bytes."""

    uuid: str
    index: int
    name: str
    memory_total: int | None

    def __str__(self) -> str:
        """Name it as people do: `GPU 0 NVIDIA H100`."""
        return f"GPU {self.index} {self.name}"


@dataclass(frozen=True)
class Sample:
    """One GPU at one moment. None: the GPU, its driver or our rights do not give that field."""

    created_at: float  # seconds since 1970
    uuid: str
    index: int
    name: str
    utilization: int | None = None  # percent of the time in which a kernel ran
    memory_used: int | None = None  # bytes, the driver's own share included
    memory_total: int | None = None  # bytes
    power: float | None = None  # watts
    energy: float | None = None  # joules since this trainer's sample before
    temperature: int | None = None  # degrees Celsius
    sm_clock: int | None = None  # MHz
    memory_clock: int | None = None  # MHz
    throttle_reasons: list[str] | None = None
    trainer_memory: int | None = None  # bytes, of all trainers at work on it
    ecc_errors: int | None = None  # uncorrected, since the driver was loaded
    remapped_rows: int | None = None


@dataclass(frozen=True)
class DeviceEvent:
    """Something that befell a GPU. `set_aside` says that jobs should keep away from it now."""

    uuid: str
    kind: Literal["lost", "xid"]
    detail: str
    xid: int | None = None
    set_aside: bool = True  # not after an Xid of the program's own making


def _newest(new: Callable[..., int], old: Callable[..., int], *arguments: object) -> int:
    """Ask by the name that CUDA 14 keeps, or by the old one where the driver lacks the new."""
    try:
        return new(*arguments)
    except nvml.NVMLError_FunctionNotFound:
        return old(*arguments)


def _temperature(handle: object) -> int:
    sensor = nvml.NVML_TEMPERATURE_GPU
    return _newest(nvml.nvmlDeviceGetTemperatureV, nvml.nvmlDeviceGetTemperature, handle, sensor)


def _throttle_reasons(handle: object) -> list[str]:
    new = nvml.nvmlDeviceGetCurrentClocksEventReasons
    bits = _newest(new, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    return [reason for bit, reason in _THROTTLE_REASONS.items() if bits & bit]


def _ecc_errors(handle: object) -> int:
    kind, since = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    return int(nvml.nvmlDeviceGetTotalEccErrors(handle, kind, since))


def _memory_of(trainers: Collection[int], handle: object) -> int | None:
    """Bytes of trainers' processes, over all MIG instances; None where NVML lists none of them.

    Not listed is not zero: seen from a container, NVML may list the host's pids, or none.
    """
    # The name without _v3 would say that it is missing by an exception that is no NVMLError.
    processes = nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
    used = [process.usedGpuMemory for process in processes if {process.pid, _session(process.pid)} & set(trainers)]
    return sum(used) if used and None not in used else None


def _session(pid: int) -> int | None:
    """Give the session of a process: a trainer leads one, and its helpers are in it."""
    try:
        return os.getsid(pid)
    except OSError:
        return None


# What is asked of a GPU, field by field of Sample; each takes NVML's handle of the GPU.
_Queries = Mapping[str, Callable[[Any], Any]]
_IDENTITY: _Queries = {
    "name": nvml.nvmlDeviceGetName,
    "memory_total": lambda handle: nvml.nvmlDeviceGetMemoryInfo(handle).total,
}
_ALWAYS: _Queries = {
    "utilization": lambda handle: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
    "memory_used": lambda handle: nvml.nvmlDeviceGetMemoryInfo(handle).used,
    "power": lambda handle: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    "energy": lambda handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000,
    "temperature": _temperature,
    "sm_clock": lambda handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
    "memory_clock": lambda handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
    "throttle_reasons": _throttle_reasons,
}
_DEEP: _Queries = {
    "ecc_errors": _ecc_errors,
    "remapped_rows": lambda handle: sum(nvml.nvmlDeviceGetRemappedRows(handle)[:2]),
}


@dataclass
class _Device:
    """A GPU as the sampler follows it."""

    gpu: Gpu
    handle: object
    event_set: object | None  # its own, so that nobody has to ask a lost GPU whose event it was
    joules: float | None = None  # the energy counter at the sample before
    trainers: frozenset[int] = frozenset()  # that were at work on it then
    lost: bool = False

    def spent(self, joules: float | None) -> float | None:
        """Joules since the last time; None if the counter was not read, or began anew."""
        before, self.joules = self.joules, joules
        if before is None or joules is None or joules < before:
            return None
        return joules - before


class Sampler:
    """Reads every GPU of this machine. Not for several threads at once."""

    def __init__(self) -> None:
        """Make a sampler that knows no GPU; `Sampler.open()` makes one that does."""
        self.why_none: str | None = None
        self._devices: list[_Device] = []
        self._events: list[DeviceEvent] = []
        self._said: set[tuple[str, str]] = set()
        self._resources = ExitStack()

    @classmethod
    def open(cls) -> Self:
        """Start NVML and find the GPUs. Never raises: `why_none` says why there is no GPU."""
        sampler = cls()
        try:
            nvml.nvmlInit()
            sampler._resources.callback(nvml.nvmlShutdown)
            for index in range(nvml.nvmlDeviceGetCount()):
                sampler._add(index)
        except nvml.NVMLError as error:
            sampler.why_none = _WHY_NONE.get(error.value, f"NVML does not work: {error}.")
        else:
            if not sampler._devices:
                sampler.why_none = "The NVIDIA driver reports no GPU that can be used."
        return sampler

    @property
    def gpus(self) -> list[Gpu]:
        """The GPUs that were found and are not lost. One that comes back needs a new sampler."""
        return [device.gpu for device in self._devices if not device.lost]

    def sample(self, trainers: Mapping[str, Collection[int]] | None = None, *, deep: bool = False) -> list[Sample]:
        """Read every GPU that is not lost. Never raises; a loss noticed here is in `events()`.

        `trainers` gives by a GPU's UUID the processes at work on it, whose memory is wanted. When they change, its
        `energy` starts anew: what was burnt between two jobs is on neither's bill. `deep` adds ECC errors and
        remapped rows, which seldom change.
        """
        created_at = time.time()
        samples = []
        for device in self._devices:
            if device.lost:
                continue
            at_work = frozenset((trainers or {}).get(device.gpu.uuid, ()))
            if at_work != device.trainers:
                device.joules, device.trainers = None, at_work
            queries = {**_ALWAYS, **(_DEEP if deep else {})}
            if at_work:
                queries["trainer_memory"] = partial(_memory_of, at_work)
            try:
                answers = self._ask(device.gpu.uuid, device.handle, queries)
            except nvml.NVMLError as error:
                self._lose(device, error)
                continue
            answers["energy"] = device.spent(answers["energy"])
            samples.append(Sample(created_at=created_at, **asdict(device.gpu), **answers))
        return samples

    def memory_of_others(self, trainers: Mapping[str, Collection[int]]) -> dict[str, int]:
        """Read the bytes in use of every GPU that is not lost, by UUID, less those of our trainers on it.

        A GPU that does not tell is left out, and one where our trainers' part is not to be seen.
        """
        others = {}
        for device in self._devices:
            if device.lost:
                continue
            ours = trainers.get(device.gpu.uuid, ())
            queries: _Queries = {**_ALWAYS, **({"ours": partial(_memory_of, ours)} if ours else {})}
            try:
                answers = self._ask(device.gpu.uuid, device.handle, queries)
            except nvml.NVMLError as error:
                self._lose(device, error)
                continue
            used, known = answers["memory_used"], answers.get("ours", 0)
            if used is not None and known is not None:
                others[device.gpu.uuid] = max(0, used - known)
        return others

    def events(self) -> list[DeviceEvent]:
        """Give what befell the GPUs since the last call: each loss once, and every Xid."""
        for device in self._devices:
            self._read_xids(device)
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Let go of NVML. Harmless a second time."""
        self._devices = []
        with suppress(nvml.NVMLError):
            self._resources.close()

    def _add(self, index: int) -> None:
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = nvml.nvmlDeviceGetUUID(handle)
            identity = self._ask(uuid, handle, _IDENTITY)
        except nvml.NVMLError as error:
            log.warning("GPU not usable", index=index, reason=str(error))
            return
        gpu = Gpu(uuid, index, identity["name"] or "unknown", identity["memory_total"])
        self._devices.append(_Device(gpu, handle, self._listen(uuid, handle)))

    def _listen(self, uuid: str, handle: object) -> object | None:
        """Ask for a GPU's Xids; None where it has none to give."""
        try:
            event_set: object = nvml.nvmlEventSetCreate()
            self._resources.callback(nvml.nvmlEventSetFree, event_set)
            nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, event_set)
        except nvml.NVMLError as error:
            self._say_once(uuid, "xid", error)
            return None
        return event_set

    def _read_xids(self, device: _Device) -> None:
        for _ in range(_EVENTS_AT_ONCE if device.event_set else 0):
            try:
                xid = nvml.nvmlEventSetWait(device.event_set, 0).eventData
            except nvml.NVMLError_Timeout:
                return
            except nvml.NVMLError as error:
                if error.value in _GONE:
                    self._lose(device, error)
                else:
                    self._say_once(device.gpu.uuid, "xid", error)
                return
            detail = f"{device.gpu} reported Xid {xid}."
            set_aside = xid not in _HARMLESS_XIDS
            self._events.append(DeviceEvent(device.gpu.uuid, "xid", detail, xid, set_aside))

    def _ask(self, uuid: str, handle: object, queries: _Queries) -> dict[str, Any]:
        """Put each query by itself; None for what is refused. Raises NVMLError if the GPU is gone.

        Some drivers say Unknown whatever a dead GPU is asked, some say it of a question that they
        cannot answer. So it means a loss only when it is the answer to everything.
        """
        answers: dict[str, Any] = {}
        unknown = 0
        for field, query in queries.items():
            try:
                answers[field] = query(handle)
            except nvml.NVMLError as error:
                unknown += error.value == nvml.NVML_ERROR_UNKNOWN
                if error.value in _GONE or unknown == len(queries):
                    raise
                answers[field] = None
                self._say_once(uuid, field, error)
        return answers

    def _say_once(self, uuid: str, field: str, error: Exception) -> None:
        if (uuid, field) not in self._said:
            self._said.add((uuid, field))
            log.info("GPU field not given", gpu=uuid, field=field, reason=str(error))

    def _lose(self, device: _Device, error: Exception) -> None:
        if not device.lost:
            device.lost = True
            detail = f"{device.gpu} does not answer any more: {error}."
            self._events.append(DeviceEvent(device.gpu.uuid, "lost", detail))


def _readings(sample: Sample) -> Iterable[str]:
    if sample.utilization is not None:
        yield f"{sample.utilization}% util"
    if sample.memory_used is not None:
        total = "" if sample.memory_total is None else f"/{sample.memory_total / 2**30:.1f}"
        yield f"{sample.memory_used / 2**30:.1f}{total} GiB"
    if sample.power is not None:
        yield f"{sample.power:.0f} W"
    if sample.temperature is not None:
        yield f"{sample.temperature} C"


def summary(samples: Iterable[Sample]) -> str:
    """Say it in a line, as `GPU 0 NVIDIA H100: 93% util, 18.2/80.0 GiB, 310 W, 61 C`."""
    lines = (f"GPU {one.index} {one.name}: {', '.join(_readings(one)) or 'no readings'}" for one in samples)
    return "; ".join(lines) or "no GPU"


def first_gpu() -> Gpu | None:
    """Give the first GPU, or None."""
    sampler = Sampler.open()
    try:
        return sampler.gpus[0] if sampler.gpus else None
    finally:
        sampler.close()
