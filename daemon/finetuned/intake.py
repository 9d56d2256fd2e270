"""From the inbox into the queue: find what is ready, take it, hash it (D1 to D5 of docs/protocol.md)."""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Callable

import structlog

from finetuned.closer import Closer
from finetuned.config import Config
from finetuned.durable import make_folder
from finetuned.hold import Hold
from finetuned.home import Home, printable
from finetuned.jobs import Job, State
from finetuned.ledger import Ledger
from finetuned.pulse import no_room
from finetuned.spool.claim import claim, enqueue, files_to_hash
from finetuned.spool.hasher import Hasher
from finetuned.spool.inbox import Complaint, Found
from finetuned.spool.settle import Settler
from finetuned.spool.watch import Watch

_ROUND = 0.2  # seconds that one step may take of a round in which thousands of files wait
_UNREADABLE = frozenset({errno.EIO, errno.EACCES, errno.EPERM, errno.ELOOP})

_log = structlog.get_logger()


class Intake:
    """Takes files out of one inbox. Its steps are called again and again by the daemon's loop."""

    def __init__(
        self,
        ledger: Ledger,
        home: Home,
        hold: Hold,
        closer: Closer,
        *,
        hints: threading.Event,
        wake: Callable[[], None],
    ) -> None:
        """Prepare; `wake` asks the loop for another round at once, and may be called from another thread."""
        self._ledger, self._home, self._hold, self._closer = ledger, home, hold, closer
        self._hints, self._wake = hints, wake
        self._watch = Watch(home.inbox, hints)
        self._settler = Settler(home.inbox)
        self._hasher = Hasher(wake)
        self._ready: deque[Found] = deque()  # what the last look found ready and is not taken yet
        self._waiting: bool | None = None  # whether the last look left files that it will be worth looking at again
        self._looked_at = time.monotonic()
        self._next_look = 0.0

    def look(self, config: Config) -> None:
        """Find what is ready, say once what never will be."""
        now = time.monotonic()
        if self._ready or self._hold.resting or not (self._hints.is_set() or now >= self._next_look):
            return
        self._hints.clear()
        make_folder(self._home.inbox)
        self._watch.renew()
        look = self._settler.look(config, now)
        self._looked_at = now
        self._waiting = look.again is not None
        for complaint in look.complaints:
            _complain(complaint)
        self._ready.extend(look.ready)
        self._next_look = now + min(look.again or config.rescan_seconds, config.rescan_seconds)

    def look_soon(self) -> None:
        """Look again in the next round: something may have changed that the watch does not see."""
        self._next_look = 0.0

    def renew_watch(self) -> None:
        """Watch the inbox's folders, those too that are new."""
        self._watch.renew()

    def take(self, config: Config) -> None:
        """Take what is ready (D1 to D3), of thousands some at a time."""
        until = time.monotonic() + _ROUND
        while self._ready and not self._hold.resting and time.monotonic() < until:
            found = self._ready.popleft()
            if not self._settler.is_as_seen(found):  # it changed before its turn; the next look judges it anew
                self._waiting, self._next_look = True, 0.0
                continue
            try:
                job = claim(self._ledger, self._home, found, config)
            except OSError as error:
                if no_room(error):
                    self._hold.begin(error, doing=f"taking {printable(found.name)}")
                    return
                _complain(Complaint(found.path, f"cannot be taken: {error.strerror}", "Mend the folder's permissions."))
                continue
            also = {"held_out": printable(job.held_out)} if job.held_out else {}
            _log.info("file taken", job=job.id, file=printable(job.name), bytes=job.identity.size, **also)
            if job.reason:
                self._closer.fail(job)

    def queue_hashed(self, config: Config) -> None:
        """Hash claimed files beside the loop and queue those that are done (D4, D5)."""
        now = time.monotonic()
        if self._hold.resting:
            return
        for job in self._ledger.jobs(State.CLAIMING):
            self._hasher.ask(job, files_to_hash(self._home, job), now)
        for job_id, result in self._hasher.results(now=now, pause=config.quiet_seconds):
            if isinstance(result, OSError) and result.errno in _UNREADABLE:
                self._closer.fail(self._ledger.job(job_id), _unreadable(result))
            elif isinstance(result, OSError):
                self._hold.begin(result, doing=f"reading the file of {job_id}")
            elif result is None:
                _log.info("file still changes", job=job_id)
            else:
                self.queue(config, self._ledger.job(job_id), *result)
            if time.monotonic() > now + _ROUND:
                self._wake()
                return

    def queue(self, config: Config, job: Job, *hashes: str) -> None:
        """Queue a job whose files have these hashes (D5), or end it if it was trained before."""
        job = enqueue(self._ledger, self._home, config, job, *hashes)
        if job.state is State.QUEUED:
            _log.info("queued", job=job.id, sha256=hashes[0][:12])
        else:
            self._closer.finish_untrained(job)

    def hashes(self, job: Job) -> bool:
        """Whether a job's files are being hashed at this moment."""
        return self._hasher.busy(job.id)

    @property
    def empty(self) -> bool | None:
        """Whether nothing is left to take; None before the first look."""
        return None if self._waiting is None else not self._waiting and not self._ready

    @property
    def watching(self) -> bool:
        """Whether the kernel's notices of new files still come."""
        return self._watch.alive

    def since_look(self, now: float) -> float:
        """Seconds since the last look; none while thousands of files are being taken."""
        return 0.0 if self._ready else now - self._looked_at

    def next_at(self) -> float:
        """When there is something to do without a notice, by the monotonic clock."""
        ats = [max(self._next_look, self._hold.until)]
        if self._ready:
            ats.append(self._hold.until)
        if again_at := self._hasher.again_at():
            ats.append(max(again_at, self._hold.until))
        return min(ats)

    def close(self) -> None:
        """Stop watching and hashing."""
        self._watch.stop()
        self._hasher.close()


def _complain(complaint: Complaint) -> None:
    _log.warning("left in the inbox", path=str(complaint.path), what=complaint.what, remedy=complaint.remedy)


def _unreadable(error: OSError) -> dict[str, str]:
    return {
        "code": "unreadable",
        "what": f"the file cannot be read: {error.strerror}",
        "where": str(error.filename or ""),
        "remedy": "Mend the disk or the file's rights, and drop the file again.",
    }
