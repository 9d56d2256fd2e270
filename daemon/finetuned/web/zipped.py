"""An adapter as a zip file, made while it is sent: nothing is written to the disk, and no more than a piece is held."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from starlette.responses import Response, StreamingResponse

from finetuned.adapters import belongs_to
from finetuned.home import Home
from finetuned.jobs import Job, Outcome
from finetuned.web.replies import Refused

_PIECE = 2**20  # bytes


def adapter_of(home: Home, job: Job) -> Path | None:
    """Give the folder of a job's adapter; None if there is none, or none any more."""
    folder = home.adapters / Path(job.adapter or "").name
    whose = job.duplicate_of or job.id
    there = job.outcome is Outcome.SUCCEEDED and job.adapter and belongs_to(folder, whose)
    return folder if there else None


def zipped(home: Home, job: Job) -> Response:
    """Answer with the adapter of a job. Raises Refused if there is none."""
    folder = adapter_of(home, job)
    if folder is None:
        raise Refused(404, "this job has no adapter in adapters/", code="not_found")
    headers = {"Content-Disposition": f'attachment; filename="{folder.name}.zip"'}
    return StreamingResponse(_pieces(folder), media_type="application/zip", headers=headers)


def _pieces(folder: Path) -> Iterator[bytes]:
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", allowZip64=True) as archive:  # type: ignore[call-overload]
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            entry = zipfile.ZipInfo.from_file(path, os.path.join(folder.name, path.relative_to(folder)))  # noqa: PTH118
            with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                while piece := source.read(_PIECE):
                    target.write(piece)
                    yield sink.take()
    yield sink.take()


class _Sink:
    """A file that can only be written, and is emptied as it is sent."""

    def __init__(self) -> None:
        self._waiting = bytearray()

    def write(self, content: bytes) -> int:
        self._waiting += content
        return len(content)

    def flush(self) -> None:
        """Nothing is held back."""

    def take(self) -> bytes:
        content = bytes(self._waiting)
        self._waiting.clear()
        return content
