"""Reading a training file: lines with their numbers, plain or compressed, in constant memory."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson
import zstandard

from finetuned.errors import DataError

MAX_ROW = 64 * 2**20  # bytes of one line
MAX_UNPACKED = 64 * 2**30  # bytes of a file after decompression: a bomb ends here and not on the disk
_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class BadLine(Exception):  # noqa: N818, it is no error of the program: the caller counts it
    """A line that holds no JSON value. `code` says why."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


def read_rows(path: Path, *, name: str) -> Iterator[tuple[int, Any | BadLine]]:
    """Yield each row with its line number, from 1; a line that cannot be read as a `BadLine`; blank lines not at all.

    `name` is what the user calls the file. In a `.json` file, which holds one array, the number is the element's.
    Raises DataError where the file as a whole cannot be read.
    """
    try:
        if path.suffix.lower() == ".json":
            yield from _array(path, name)
            return
        with _unpacked(path) as file:
            yield from _lines(file, name)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(
            f"the compressed file is damaged or cut off: {error}",
            where=name,
            remedy="Pack it again and drop it again.",
            code="damaged_archive",
        ) from error


def _unpacked(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"), 2**20)
    if path.suffix.lower() == ".zst":
        _check_zstd_end(path)
        reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True, read_across_frames=True)
        return io.BufferedReader(reader, 2**20)
    return path.open("rb", buffering=2**20)


def _check_zstd_end(path: Path) -> None:
    """Walk over the frames and blocks to the end: the reader takes a file that is cut off for a whole one."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        position = 0
        while position < size:
            file.seek(position)
            head = file.read(18)
            if head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50:
                position += 8 + int.from_bytes(head[4:8], "little")
                continue
            checksum = 4 if zstandard.get_frame_parameters(head).has_checksum else 0
            position += zstandard.frame_header_size(head)
            last = False
            while not last:
                file.seek(position)
                block = int.from_bytes(head := file.read(3), "little")
                if len(head) < 3:
                    raise EOFError("the last frame has no end")
                last = bool(block & 1)
                position += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
            position += checksum
        if position > size:
            raise EOFError("the last frame has no end")


def _array(path: Path, name: str) -> Iterator[tuple[int, Any | BadLine]]:
    try:
        value = orjson.loads(path.read_bytes().removeprefix(_BOM))
    except orjson.JSONDecodeError as error:
        raise DataError(
            f"is not JSON: {error}",
            where=name,
            remedy="Mend it, or save one row a line as .jsonl.",
            code="not_json",
        ) from error
    if not isinstance(value, list):
        raise DataError(
            "holds no array", where=name, remedy="A .json file must be one array of rows.", code="data_type"
        )
    yield from enumerate(value, start=1)


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[int, Any | BadLine]]:
    total = number = 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        total += len(line)
        if number == 1 and _is_utf_16(line):
            raise DataError("is UTF-16", where=name, remedy="Save it as UTF-8.", code="not_utf8")
        if len(line) > MAX_ROW:
            yield number, BadLine("row_too_large", f"longer than {MAX_ROW // 2**20} MiB")
            while line and not line.endswith(b"\n") and total <= MAX_UNPACKED:
                line = file.readline(MAX_ROW)
                total += len(line)
        elif text := line.removeprefix(_BOM).strip() if number == 1 else line.strip():
            yield number, _value(text, ended=line.endswith(b"\n"))
        if total > MAX_UNPACKED:
            raise DataError(
                f"unpacks to more than {MAX_UNPACKED // 2**30} GiB",
                where=name,
                remedy="Split it.",
                code="too_large",
            )


def _is_utf_16(line: bytes) -> bool:
    """Whether the first line is JSON in UTF-16, as far as the byte of its line end lets it through."""
    if not line.startswith(_UTF_16):
        return False
    try:
        orjson.loads(line[: len(line) // 2 * 2].decode("utf-16"))
    except ValueError:
        return False
    return True


def _value(text: bytes, *, ended: bool) -> Any | BadLine:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if not ended:
            return BadLine("truncated_last_line", "the last line is cut off")
        try:
            text.decode()
        except UnicodeDecodeError as problem:
            return BadLine("not_utf8", f"byte {problem.start + 1} is no UTF-8")
        return BadLine("not_json", str(error))
