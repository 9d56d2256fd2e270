"""Parsers of JSON over the lines of one file, in turns. The file as argument, seconds of each as the last line printed.

Runs in the environment of datasets_run.py.
"""

import gc
import json
import statistics
import sys
import time
from pathlib import Path

import msgspec
import orjson

PARSERS = {"json": json.loads, "msgspec": msgspec.json.Decoder().decode, "orjson": orjson.loads}
ROUNDS = 5


def main(path: Path) -> None:
    """Measure."""
    lines = path.read_bytes().splitlines()
    taken: dict[str, list[float]] = {name: [] for name in PARSERS}
    for _ in range(ROUNDS):
        for name, parse in PARSERS.items():
            gc.collect()
            began = time.perf_counter()
            for line in lines:
                parse(line)
            taken[name].append(time.perf_counter() - began)
    print(json.dumps({name: statistics.median(seconds) for name, seconds in taken.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
