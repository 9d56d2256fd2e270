"""finetuned's data door on one file, as `finetuned check` reads it: no torch, an empty cache.

A JSON object as argument, another as the last line printed.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

sys.modules["torch"] = None  # type: ignore[assignment]  # transformers does without, as it does for `check`

from finetuned.config import settings_from  # noqa: E402
from finetuned.trainer.base import find_base, load_tokenizer, quiet_libraries  # noqa: E402
from finetuned.trainer.door import Door  # noqa: E402


def main(order: dict[str, str]) -> None:
    """Read, and say how many rows and tokens there were and how long it took."""
    quiet_libraries()
    settings = settings_from({}, where="the benchmark")
    base = find_base(settings, models=Path(order["models"]), base_dir=Path())
    tokenizer = load_tokenizer(base, settings)
    with tempfile.TemporaryDirectory(dir=order["scratch"]) as cache:
        began = time.perf_counter()
        _, report = Door(tokenizer, settings, cache=Path(cache)).read(Path(order["file"]), name="the file")
        seconds = time.perf_counter() - began
        print(json.dumps({"rows": report.good_rows, "tokens": report.tokens["tokens"], "seconds": seconds}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
