"""Reading a training file: lines with their numbers, plain or compressed, in constant memory."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson
import zstandard

from finetuned.errors import DataError
from finetuned.findings import ERRORS

MAX_ROW = 64 * 2**20  # bytes of one line
MAX_UNPACKED = 64 * 2**30  # bytes of a file after decompression
_SURE = 2**30  # bytes that any file may have
_DENSEST = 200  # times that text of any use is smaller when packed
_LINE = 256  # bytes that a line of a packed file counts for at least: each takes its time
_BLOCK = 2**18  # bytes read at once
_TOO_LARGE = f"longer than {MAX_ROW // 2**20} MiB"
# Whole strings, and what gives an array its structure. Possessive, so that long strings take no memory.
_STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\],"]', re.DOTALL)
_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class BadLine(Exception):  # noqa: N818, it is no error of the program: the caller counts it
    """A line that holds no JSON value. `code` says why."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class RowFile:
    """A training file, read once from its beginning to its end."""

    def __init__(self, path: Path, *, name: str) -> None:
        """Open it. `name` is what the user calls the file. Raises OSError."""
        self.path, self.name = path, name
        self.size = path.stat().st_size
        self._raw = path.open("rb", buffering=2**20)
        self._kind = path.suffix.lower()

    @property
    def fraction(self) -> float:
        """How much of the file is read."""
        return min(1.0, self._raw.tell() / self.size) if self.size and not self._raw.closed else 1.0

    def rows(self) -> Iterator[tuple[int, Any | BadLine]]:
        """Yield each row with the line where it begins, from 1; one that cannot be read as a `BadLine`; blank lines not
        at all.

        Raises DataError where the file as a whole cannot be read.
        """
        if not self.size:
            raise DataError(
                "the file is empty", where=self.name, remedy="Fill it and drop it again.", code="empty_file"
            )
        try:
            with self._raw, self._unpacked() as file:
                meter = _Meter(file, self.name, packed=self.size)
                yield from _array(meter) if self._holds_array(meter) else _lines(meter)
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise DataError(
                f"the compressed file is damaged or cut off: {error}",
                where=self.name,
                remedy="Pack it again and drop it again.",
                code="damaged_archive",
            ) from error

    def _unpacked(self) -> IO[bytes]:
        if self._kind == ".gz":
            return io.BufferedReader(gzip.GzipFile(fileobj=self._raw), _BLOCK)
        if self._kind == ".zst":
            _check_zstd_end(self.path)
            reader = zstandard.ZstdDecompressor().stream_reader(self._raw, read_across_frames=True)
            return io.BufferedReader(reader, _BLOCK)
        return self._raw

    def _holds_array(self, meter: _Meter) -> bool:
        """Whether a .json file is one array, as it should be; some have a row a line."""
        if self._kind != ".json":
            return False
        first = meter.first_bytes()
        if first.startswith(b"["):
            return True
        if first.startswith(b"{") and (b"\n" not in first or _is_json(first.split(b"\n", 1)[0])):
            return False
        raise DataError(
            "holds no array", where=self.name, remedy="A .json file must be one array of rows.", code="data_type"
        )


class _Meter:
    """The bytes of a file, counted, so that a bomb ends here and not on the disk or in an endless night."""

    def __init__(self, file: IO[bytes], name: str, *, packed: int) -> None:
        self.name = name
        self._file = file
        self._most = min(MAX_UNPACKED, max(_SURE, packed * _DENSEST))
        self._total = 0

    def first_bytes(self) -> bytes:
        """Give what the file begins with, after a byte order mark and white space, without taking it."""
        head = self._file.peek(_BLOCK) if isinstance(self._file, io.BufferedReader) else b""
        return head.removeprefix(_BOM).lstrip()

    def readline(self, most: int) -> bytes:
        """Read to the end of the line, or so many bytes."""
        line = self._file.readline(most)
        self._total += max(0, _LINE - len(line))
        return self._counted(line)

    def read(self, size: int) -> bytes:
        """Read so many bytes, fewer at the end."""
        return self._counted(self._file.read(size))

    def _counted(self, content: bytes) -> bytes:
        self._total += len(content)
        if self._total > self._most:
            raise DataError(
                f"unpacks to more than {self._most / 2**30:.0f} GiB, and nearly all of it is repetition"
                if self._most < MAX_UNPACKED
                else f"unpacks to more than {MAX_UNPACKED // 2**30} GiB",
                where=self.name,
                remedy="Split it, or take the repetition out.",
                code="too_large",
            )
        return content


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


def _array(meter: _Meter) -> Iterator[tuple[int, Any | BadLine]]:  # noqa: C901, PLR0912, a state machine reads best whole
    """Cut an array into its elements without reading it whole. One that is no JSON spoils no other.

    Its strings and brackets are found by a pattern; what an element means is the parser's business.
    """
    text, line = b"", 1
    while b"[" not in text:
        text += meter.read(_BLOCK)
    start = place = text.index(b"[") + 1  # of the element; up to `place` its structure is known
    line += text.count(b"\n", 0, start)
    block, depth = _BLOCK, 0
    while True:
        for token in _STRUCTURE.finditer(text, place):
            mark = token.group()
            if mark == b'"':  # the rest of the string is still to come
                place = token.start()
                break
            place = token.end()
            if mark in b"{[":
                depth += 1
            elif mark in b"}]" and depth:
                depth -= 1
            elif not depth and mark in b",]":
                element = text[start : token.start()]
                content = element.lstrip()
                at = line + _breaks_before(element)
                if content:
                    yield at, _element(content.rstrip())
                elif mark == b",":
                    yield at, BadLine("not_json", "nothing stands before a comma")
                line += element.count(b"\n")
                start = place
                if mark == b"]":
                    behind = text[place:] + meter.read(_BLOCK)
                    if behind.strip():
                        yield line + _breaks_before(behind), BadLine("not_json", "it stands behind the array's end")
                    return
        more = meter.read(block)
        if not more:
            yield line + _breaks_before(text[start:]), BadLine("truncated_last_line", "the array has no end")
            return
        block = _BLOCK if start else 2 * block
        text, place, start = text[start:] + more, place - start, 0
        if len(text) > 2 * MAX_ROW:
            raise DataError(
                f"an element is {_TOO_LARGE}",
                where=f"{meter.name}:{line + _breaks_before(text)}",
                remedy=ERRORS["row_too_large"].remedy,
                code="row_too_large",
            )


def _breaks_before(text: bytes) -> int:
    """Count the lines that end before a text begins."""
    return text.count(b"\n", 0, len(text) - len(text.lstrip()))


def _element(text: bytes) -> Any | BadLine:
    return BadLine("row_too_large", _TOO_LARGE) if len(text) > MAX_ROW else _value(text, ended=True)


def _lines(meter: _Meter) -> Iterator[tuple[int, Any | BadLine]]:
    number = 0
    while line := meter.readline(MAX_ROW + 1):
        number += 1
        if number == 1:
            _check_first(line, meter.name)
        if len(line) > MAX_ROW:
            yield number, BadLine("row_too_large", _TOO_LARGE)
            while line and not line.endswith(b"\n"):
                line = meter.readline(_BLOCK)
        elif text := line.removeprefix(_BOM).strip() if number == 1 else line.strip():
            yield number, _value(text, ended=line.endswith(b"\n"))


def _check_first(line: bytes, name: str) -> None:
    if _is_utf_16(line):
        raise DataError("is UTF-16", where=name, remedy="Save it as UTF-8.", code="not_utf8")
    text = line.removeprefix(_BOM).strip()
    if text.startswith(b"[") and not text.endswith(b"]"):
        raise DataError(
            "begins as an array, not as a row a line",
            where=f"{name}:1",
            remedy="Name it .json, which may hold one array, or save a row a line.",
            code="not_json",
        )


def _is_utf_16(line: bytes) -> bool:
    """Whether the first line is JSON in UTF-16, as far as the byte of its line end lets it through."""
    if not line.startswith(_UTF_16):
        return False
    try:
        return _is_json(line[: len(line) // 2 * 2].decode("utf-16"))
    except UnicodeDecodeError:
        return False


def _is_json(text: str | bytes) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
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
