"""trl's SFTTrainer on tokenised rows, in the order given. A JSON object as argument, another as the last line printed.

Runs in an environment of its own (trl_requirements.txt beside this file).
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from stations import Stations
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer


def main(order: dict) -> None:
    """Train and print the stations."""
    pure = order.get("pure", False)
    rows = [json.loads(line) for line in Path(order["tokens"]).read_text().splitlines()]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = order["model"]
    if pure:
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        torch.manual_seed(order["seed"])
        model, lora = get_peft_model(model, lora, autocast_adapter_dtype=False), None
    chosen = {"bf16": False, "gradient_checkpointing": False} if pure else {}
    if order.get("packed"):
        chosen |= {"packing": True}
    stations = Stations()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir="/tmp/trl-bench",
            per_device_train_batch_size=order.get("batch", 8),
            gradient_accumulation_steps=order.get("accumulation", 1),
            num_train_epochs=1,
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            max_length=2048,
            seed=order["seed"],
            logging_steps=1,
            save_strategy="no",
            train_sampling_strategy="sequential",
            disable_tqdm=True,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            **chosen,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=lora,
        callbacks=[stations],
    )
    trainer.train()
    print()
    print(json.dumps(stations.said))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
