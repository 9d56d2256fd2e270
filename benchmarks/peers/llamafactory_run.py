"""LLaMA-Factory on tokenised rows, in the order given. A JSON object as argument, another as the last line printed.

Runs in an environment of its own (llamafactory_requirements.txt beside this file).
"""

import json
import sys
import tempfile
import types
from pathlib import Path

from datasets import Dataset, DatasetDict
from stations import Stations


def main(order: dict) -> None:
    """Train and print the stations."""
    # LLaMA-Factory imports a reader of sounds; text never calls it, and PyPI's build of it wants a CUDA torch.
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    from llamafactory.train.tuner import run_exp

    rows = [json.loads(line) for line in Path(order["tokens"]).read_text().splitlines()]
    columns = {
        "input_ids": [row["input_ids"] for row in rows],
        "attention_mask": [[1] * len(row["input_ids"]) for row in rows],
        "labels": [row["labels"] for row in rows],
    }
    stations = Stations()
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens"
        DatasetDict({"train": Dataset.from_dict(columns)}).save_to_disk(tokens)
        run_exp(
            {
                "stage": "sft",
                "do_train": True,
                "model_name_or_path": order["model"],
                "template": "default",
                "dataset": "the tokens below",
                "tokenized_path": str(tokens),
                "disable_shuffling": True,
                "cutoff_len": 2048,
                "finetuning_type": "lora",
                "lora_rank": 16,
                "lora_alpha": 32,
                "lora_target": "all",
                "output_dir": str(Path(folder) / "out"),
                "per_device_train_batch_size": order["batch"],
                "gradient_accumulation_steps": order["accumulation"],
                "disable_gradient_checkpointing": order["keep_activations"],
                "num_train_epochs": 1,
                "learning_rate": 2e-4,
                "lr_scheduler_type": "cosine",
                "bf16": True,
                "use_cpu": order["cpu"],
                "seed": order["seed"],
                "logging_steps": 1,
                "save_strategy": "no",
                "disable_tqdm": True,
                "report_to": "none",
            },
            callbacks=[stations],
        )
    print()
    print(json.dumps(stations.said))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
