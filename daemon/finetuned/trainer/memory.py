"""Out of memory: how it is recognised, and how memory is given back."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from contextlib import suppress
from pathlib import Path

import torch

# What libraries say, in lower case. oneDNN's message means memory only when memory is short, which after a
# failed allocation it is.
_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "defaultcpuallocator",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cublas_status_not_initialized",  # what a full card says at the first product
    "cudnn_status_not_initialized",
    "could not create a primitive",
    "unable to allocate",
)

_PURGE = b"arena.4096.purge"  # 4096 names all of jemalloc's arenas


def out_of_memory(error: BaseException) -> str | None:
    """Give an error's first line if it speaks of memory, else None.

    A string and not the error: its traceback would keep the failed step's tensors alive.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error).lower() for sign in _SIGNS):
        return str(error).strip().split("\n")[0] or "out of memory"  # which told on is known again
    return None


def give_back() -> None:
    """Return what is free to the device and to the system. Call it outside the `except` block."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        return
    library = ctypes.CDLL(None)
    with suppress(AttributeError):  # not jemalloc, which the launcher tells to keep freed memory: faults cost time
        library.mallctl(b"thread.tcache.flush", None, None, None, 0)
        library.mallctl(_PURGE, None, None, None, 0)
    with suppress(AttributeError):  # musl and jemalloc have none
        library.malloc_trim(0)


def peak_bytes() -> int:
    """Give the most memory used so far: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Give the memory that this process has now, as its own peak cannot: one that was forked inherits its parent's."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """Give the memory that a training may take now: what the GPU has free, else what the kernel can make free."""
    if torch.cuda.is_available():
        free: int = torch.cuda.mem_get_info()[0]
        return free
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def device_name() -> str:
    """Name the device as records of earlier trainings do."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def total_bytes() -> int:
    """Give the memory that this process could use at most: the GPU's where there is one, else the machine's or what a
    limit leaves of it.
    """
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    limits = [resource.getrlimit(resource.RLIMIT_AS)[0], _group_limit()]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit in limits if limit > 0)])


def _group_limit() -> int:
    """Give what the control group allows (systemd's MemoryMax, a container's limit), or 0."""
    with suppress(OSError, ValueError, IndexError):
        group = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()[-1].partition("::")[2]
        return int(Path(f"/sys/fs/cgroup{group}/memory.max").read_text(encoding="ascii"))
    return 0


def others_bytes() -> int:
    """Give the memory that other programs hold on the GPU; 0 on a CPU, where the kernel takes it back as it can."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return max(0, total - free - torch.cuda.memory_reserved())


def reset_peak() -> None:
    """Begin the GPU's peak anew; a process's own cannot be."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
