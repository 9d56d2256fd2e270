"""Hints that the inbox changed, from watchdog. A hint may be late, doubled or missing: it only makes the loop look
sooner.

watchdog loses events in a burst, and its emitter dies without a word when the watched folder is deleted and made
again, so the watch is renewed whenever the folder is another one than before, and the loop looks by itself every
`rescan_seconds`.
"""

from __future__ import annotations

import threading
from pathlib import Path

import structlog
from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

_log = structlog.get_logger()

# Not that a file was opened or closed unchanged: our own looks would wake us for ever, and of very many files such
# events alone would fill the kernel's queue.
_CHANGES: list[type[FileSystemEvent]] = [
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileModifiedEvent,
    FileMovedEvent,
]


class _Hint(FileSystemEventHandler):
    """Sets the flag and nothing else: an exception in a handler would end watchdog's thread."""

    def __init__(self, changed: threading.Event) -> None:
        self._changed = changed

    def on_any_event(self, _: FileSystemEvent) -> None:
        self._changed.set()


class Watch:
    """Watches the inbox and sets `changed`."""

    def __init__(self, inbox: Path, changed: threading.Event) -> None:
        self._inbox = inbox
        self._changed = changed
        self._observer: BaseObserver | None = None
        self._watched: tuple[int, int] | None = None  # device and inode of the folder under watch

    def renew(self) -> None:
        """Start watching, or start again if the folder was replaced or the watcher died. Cheap when all is well."""
        try:
            facts = self._inbox.stat()
        except OSError:
            self.stop()
            return
        folder = (facts.st_dev, facts.st_ino)
        if self._observer is not None and self.alive and folder == self._watched:
            return
        self.stop()
        observer = Observer()
        observer.daemon = True
        try:
            observer.schedule(_Hint(self._changed), str(self._inbox), recursive=True, event_filter=_CHANGES)
            observer.start()
        except OSError as error:  # out of inotify watches, most likely; the rescan goes on
            _log.warning("inbox not watched", error=error.strerror, remedy="Raise fs.inotify.max_user_watches.")
            return
        self._observer, self._watched = observer, folder
        self._changed.set()

    @property
    def alive(self) -> bool:
        """Whether its threads live. Where the kernel refused to watch there are none, and the rescan has to do."""
        observer = self._observer
        return observer is None or all(thread.is_alive() for thread in (observer, *observer.emitters))

    def stop(self) -> None:
        """Stop watching."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join(timeout=2)
            self._observer = None
