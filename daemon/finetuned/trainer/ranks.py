"""One job by several processes on this machine: this one starts a rank for each, hands a stop on to them, and ends as
the first that failed. No torch here.

torchrun starts ranks too, but ends with 1 whatever they say; where somebody has started ranks already, there is none
of this: each process takes its place by the environment.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

from finetuned.events import ExitCode, describe_end
from finetuned.home import JobFolder

_AGENT = "FINETUNED_AGENT"  # the process that started this rank, and signs and leaves the exit code for it
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_TICK = 0.05  # seconds between two looks at ranks
_PATIENCE = 30.0  # seconds for the others to end once one has failed: rank 0 may write a checkpoint
_LONG_PATIENCE = 600.0  # where all of them end by agreement
_AGREED = frozenset({ExitCode.STOPPED, ExitCode.OUT_OF_MEMORY})
_SECOND_HAND = frozenset({ExitCode.TEMPORARY, -signal.SIGTERM})  # how ranks end that have lost another, or are asked to


def started_by_somebody() -> bool:
    """Whether this process is one rank of several already."""
    return "RANK" in os.environ


def signs() -> bool:
    """Whether this process holds the job's lock and says how the attempt ends: one of all does."""
    return rank() == 0 and not has_agent()


def rank() -> int:
    """Give this process's rank."""
    return int(os.environ.get("RANK", "0"))


def has_agent() -> bool:
    """Whether a process of this module started this one."""
    return _AGENT in os.environ


def awaited() -> bool:
    """Whether this process has yet to meet other ranks (`group.meet`), which nobody would end if it did not come."""
    return started_by_somebody() and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not has_agent()


def end_with_agent() -> None:
    """Let this rank end when the process that started it is gone, and leave the interrupt key to that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(os.environ[_AGENT]):  # it was gone before
        os._exit(ExitCode.TEMPORARY)


def run(folder: JobFolder, processes: int, *, sharded: bool = False, asked_to_stop: Callable[[], bool]) -> int:
    """Train with so many ranks and give how they ended, as subprocess does: the first that failed for its own reason.

    None of them outlives this call. Ranks that share the model's layers cannot agree on an end for want of memory: the
    others may be stuck on their GPUs.
    """
    environment = _environment(processes)
    running: dict[int, subprocess.Popen[bytes]] = {}
    endings: list[tuple[int, int]] = []  # rank and status, in the order of their ends
    stopped, deadline = False, float("inf")
    agreed = _AGREED - {ExitCode.OUT_OF_MEMORY} if sharded else _AGREED
    try:
        for number in range(processes):
            running[number] = _start(folder, environment | {"RANK": str(number), "LOCAL_RANK": str(number)})
        while running:
            for number, status in _ended(running):
                endings.append((number, status))
                if status:
                    sys.stdout.write(f"rank {number}: {describe_end(status)}\n")
                    sys.stdout.flush()
            if asked_to_stop() and not stopped:
                stopped = True
                _signal(running.values(), signal.SIGTERM)
            if deadline == float("inf") and (failed := [status for _, status in endings if status]):
                patience = _LONG_PATIENCE if failed[0] in agreed else _PATIENCE
                deadline = time.monotonic() + patience
                _signal(running.values(), signal.SIGTERM)
            # Rank 0 may write a large checkpoint, unless it waits in the middle of a pass that will never end.
            if time.monotonic() > deadline + (_LONG_PATIENCE if 0 in running and not sharded else 0):
                break
            time.sleep(_TICK)
    finally:
        _signal(running.values(), signal.SIGKILL)
        for process in running.values():
            process.wait()
    return verdict(endings, stopped=stopped)


def verdict(endings: list[tuple[int, int]], *, stopped: bool) -> int:
    """Say how all ended, by ranks and statuses in the order of their ends.

    What rank 0 has done is done: it writes the adapter. Who has lost another is not the cause.
    """
    failed = [] if (0, 0) in endings else [status for _, status in endings if status]
    causes = [status for status in failed if status not in _SECOND_HAND]
    if not causes and stopped and failed:
        return ExitCode.STOPPED
    if -signal.SIGKILL in causes:  # what others do of that, aborting say, may be seen before it
        return -signal.SIGKILL
    return next(iter([*causes, *failed]), ExitCode.DONE)


def _ended(running: dict[int, subprocess.Popen[bytes]]) -> list[tuple[int, int]]:
    """Take those that have ended out of `running`: their numbers and statuses."""
    found = [(number, status) for number, process in running.items() if (status := process.poll()) is not None]
    for number, _ in found:
        del running[number]
    return found


def _signal(processes: Iterable[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in processes:
        process.send_signal(number)  # does nothing to one that has ended


def _environment(processes: int) -> dict[str, str]:
    """Give what ranks find in their environment, in torchrun's words."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // processes)  # all compute at once
    usual = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    return {
        **usual,
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        _AGENT: str(os.getpid()),
    }


def _start(folder: JobFolder, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start one, in this process's group, so that who ends that ends all."""
    command = [sys.executable, "-P", "-m", "finetuned.trainer", str(folder.path)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)
