"""`datasets.load_dataset` and `map` over one file. A JSON object as argument, another as the last line printed.

Runs in an environment of its own (datasets_requirements.txt beside this file).
"""

import json
import os
import sys
import tempfile
import time

ORDER = json.loads(sys.argv[1])
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HOME": ORDER["scratch"]}

from datasets import load_dataset  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402


def main(order: dict) -> None:
    """Load and map, and say how many rows and tokens there were and how long it took."""
    tokenizer = AutoTokenizer.from_pretrained(order["model"])

    def tokenise(row: dict) -> dict:
        """Of a row, or of many where they come in batches."""
        return tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)

    with tempfile.TemporaryDirectory(dir=order["scratch"]) as cache:
        began = time.perf_counter()
        rows = load_dataset("json", data_files=order["file"], split="train", cache_dir=cache)
        tokenised = rows.map(tokenise, remove_columns=rows.column_names, **order["map"])
        seconds = time.perf_counter() - began
        tokens = sum(len(ids) for batch in tokenised.iter(1000) for ids in batch["input_ids"])
        print(json.dumps({"rows": len(tokenised), "tokens": tokens, "seconds": seconds}))


if __name__ == "__main__":
    main(ORDER)
