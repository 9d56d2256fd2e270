"""Write sums.jsonl and sums.eval.jsonl, always the same: sums of two numbers, answered in four wordings.

`python examples/hybrid/make_sums.py [FOLDER]`
"""

from __future__ import annotations

import json
import random
import sys
from itertools import product
from pathlib import Path

ROWS, HELD_OUT = 48, 8
WORDINGS = ("{} + {} = {}", "The sum of {} and {} is {}.", "{} plus {} makes {}.", "{} and {} are {}.")


def main(folder: Path) -> None:
    """Write both files; no sum is in both."""
    rng = random.Random(7)
    sums = rng.sample(list(product(range(2, 50), range(2, 20))), ROWS + HELD_OUT)
    for name, part in (("sums.jsonl", sums[:ROWS]), ("sums.eval.jsonl", sums[ROWS:])):
        with (folder / name).open("w", encoding="utf-8") as file:
            for one, other in part:
                answer = rng.choice(WORDINGS).format(one, other, one + other)
                turns = (("user", f"What is {one} + {other}?"), ("assistant", answer))
                row = {"messages": [{"role": role, "content": text} for role, text in turns]}
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
