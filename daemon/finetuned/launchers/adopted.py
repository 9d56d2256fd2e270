"""A trainer whose daemon is gone, taken over by the next one (docs/protocol.md, "Adoption")."""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress
from pathlib import Path

from finetuned import __version__
from finetuned.home import JobFolder
from finetuned.lifesigns import Signature, exit_code, has_open, signed

_LONGEST_SILENCE = 1800.0  # seconds without an event


class AdoptedTrainer:
    """A trainer that another daemon started. It is no child of ours, so how it ended it says itself."""

    id = taken = waits = ""

    def __init__(self, folder: JobFolder, signature: Signature, process: int | None) -> None:
        """Take a descriptor of the process, which no other process can have; None if it has ended."""
        self.pid = signature.pid
        self._folder = folder
        self._signature = signature
        self._process = process
        self._status: int | None = None

    @classmethod
    def find(cls, folder: JobFolder, attempt: int) -> AdoptedTrainer | None:
        """Give the trainer of this attempt: at work, or ended with a word on how. None if there is neither, or the
        kernel has no descriptors of processes.
        """
        signature = signed(folder)
        if signature is None or signature.attempt != attempt:
            return None
        process = _open_process(signature.pid, folder.lock)
        if process is None and exit_code(folder, attempt) is None:
            return None
        return cls(folder, signature, process)

    @property
    def stands_still(self) -> bool:
        """Whether somebody has stopped it, so that it hears nothing."""
        try:
            facts = Path(f"/proc/{self.pid}/stat").read_bytes()
        except OSError:
            return False
        return facts[facts.rindex(b")") + 2 :][:1] in {b"T", b"t"}

    def why_unfit(self) -> str:
        """Say why it should not go on, or nothing."""
        if self.poll() is not None:
            return ""
        if self._signature.version != __version__:
            return f"it is of finetuned {self._signature.version}, and this is {__version__}"
        if self.stands_still:
            return "it stands still"
        try:
            silence = time.time() - self._folder.events.stat().st_mtime
        except OSError:
            return ""  # it has only just begun
        return f"it has said nothing for {silence / 60:.0f} minutes" if silence > _LONGEST_SILENCE else ""

    def poll(self) -> int | None:
        """Give its exit status as subprocess does, or None while it runs. An end without a word is SIGKILL."""
        if self._status is None and not self._runs():
            code = exit_code(self._folder, self._signature.attempt)
            self._status = -signal.SIGKILL if code is None else code
        return self._status

    def ask_to_stop(self) -> None:
        """Ask for a checkpoint and an end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and its children at once."""
        if self.poll() is None:
            self._signal(signal.SIGSTOP)  # so that it cannot end, and its number stays its own
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, number)

    def _runs(self) -> bool:
        if self._process is None:
            return False
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        if not poll.poll(0):
            return True
        os.close(self._process)
        self._process = None
        return False


def _open_process(pid: int, lock: Path) -> int | None:
    """Give a descriptor of the process that holds the lock, or None if it has ended."""
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return None
    with suppress(OSError):
        if has_open(pid, lock):
            return process
    os.close(process)
    return None
