"""Huge lines, rows and bombs are read or refused in bounded memory.

Each is read in a process of its own, which tells its peak.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

_READ = """
import json, sys
from pathlib import Path
from finetuned.dataset.report import Report, judge, rows_of
from finetuned.dataset.reading import RowFile
from finetuned.errors import DataError

report, code = Report(), ""
try:
    for row in rows_of(RowFile(Path(sys.argv[1]), name="x"), report, system_prompt=None):
        pass
    judge(report, name="x", max_bad_rows=0.9)
except DataError as error:
    code = error.code
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024
print(json.dumps([report.good_rows, {key: fault.lines for key, fault in report.faults.items()}, code, peak]))
"""
_MIB = 2**20


def read(path: Path) -> list:
    """Give a file's good rows, the lines of each fault, the code of its refusal, and the reader's peak in MiB."""
    done = subprocess.run([sys.executable, "-c", _READ, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(f"{path.name}: {found}")
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> int:
    """What the reader takes for a small file, in MiB."""
    path = tmp_path_factory.mktemp("small") / "small.jsonl"
    path.write_bytes(row(b"x") + b"\n")
    return read(path)[-1]


def row(text: bytes) -> bytes:
    return b'{"question": "a", "answer": "' + text + b'"}'


LONG = row(b"x" * 50 * _MIB)
BAD_LINES = {
    "no-json": b"x" * 50 * _MIB,
    "brackets": b"[" * 50 * _MIB,
    "nul": b"\0" * 50 * _MIB,
    "string-without-end": LONG[:-2],
    "escapes": row(b"\\" * (50 * _MIB + 1)),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_of_50_mb_costs_its_neighbours_nothing(tmp_path, base, name):
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(b"\n".join([row(b"a"), BAD_LINES[name], row(b"b"), b""]))
    good, faults, _, peak = read(path)
    assert (good, faults) == (2, {"not_json": [2]})
    assert peak - base < 350


def test_a_good_line_of_50_mb_is_a_row_and_one_of_70_mb_is_too_large(tmp_path, base):
    path = tmp_path / "long.jsonl"
    path.write_bytes(b"\n".join([row(b"a"), LONG, row(b"y" * 70 * _MIB), row(b"b"), b""]))
    good, faults, _, peak = read(path)
    assert (good, faults) == (3, {"row_too_large": [3]})
    assert peak - base < 450


def test_strings_of_50_mb_in_an_array_are_rows(tmp_path, base):
    path = tmp_path / "long.json"
    path.write_bytes(b"[" + LONG + b",\n" + row(b'\\"],[' * 10 * _MIB) + b",\n" + row(b"b") + b",\n1]")
    good, faults, _, peak = read(path)
    assert (good, faults) == (3, {"data_type": [4]})
    assert peak - base < 600


def test_an_array_of_200_mb_is_read_in_the_memory_of_a_small_one(tmp_path, base):
    path = tmp_path / "large.json"
    some = (row(b"x" * 900) + b",\n") * 1000
    with path.open("wb") as file:
        file.write(b"[\n")
        while file.tell() < 200 * _MIB:
            file.write(some)
        file.write(b"what]")
    good, faults, _, peak = read(path)
    assert good > 200_000
    assert faults == {"not_json": [good + 2]}
    assert peak - base < 30


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("content", [b"a", b"\n", b"0\n"], ids=["one line", "empty lines", "short lines"])
def test_a_bomb_ends_in_seconds_and_in_bounded_memory(tmp_path, base, content, suffix):
    """4 GiB in a few MB. It ends by the bytes, by the lines, or by the bad rows that are read at most."""
    pack = zstandard.ZstdCompressor().compress if suffix == ".zst" else gzip.compress
    path = tmp_path / f"bomb.jsonl{suffix}"
    path.write_bytes(pack(content * (64 * _MIB // len(content))) * 64)
    good, _, code, peak = read(path)
    assert good == 0
    assert code in {"too_large", "data_type"}
    assert peak - base < 250
