"""`python -m finetuned.trainer.glance`: whether a job's files will do, as far as that can be told in a moment and
without a tokenizer. `finetuned.preview` asks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetuned.config import settings_from
from finetuned.dataset.reading import RowFile
from finetuned.dataset.report import glance
from finetuned.trainer.saying import answer


def look(order: dict[str, Any]) -> dict[str, Any]:
    """Look at the file, and at the held-out one beside it. Raises DataError."""
    settings = settings_from(order["settings"], where="the settings")
    glance(RowFile(Path(order["file"]), name=order["name"]), max_bad_rows=settings.max_bad_rows)
    if order["beside"]:
        glance(RowFile(Path(order["beside"]), name=order["held_out"]), max_bad_rows=0.0, held_out=True)
    return {}


if __name__ == "__main__":
    answer(look, if_memory="The trainer may have more of it.")
