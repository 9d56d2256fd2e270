"""The base model's place and its tokenizer, and what is said where they cannot be had. No torch here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from transformers import AutoTokenizer

from finetuned.config import TrainingSettings
from finetuned.errors import ModelError
from finetuned.trainer import embedded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def quiet_libraries() -> None:
    """Keep what the libraries tell each other out of logs and answers."""
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate|bitsandbytes)\b")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class HubUnreachableError(ModelError):
    """The model may exist, but the hub cannot be asked now."""

    code = "hub_unreachable"


@dataclass(frozen=True)
class Base:
    """A base model: where it lies, and what adapters call it."""

    source: str  # a folder or a hub id, as from_pretrained takes it
    name: str  # a hub id where there is one
    note: str = ""


def find_base(settings: TrainingSettings, *, models: Path, base_dir: Path) -> Base:
    """Find the base model by its name. Raises ModelError if it names a folder that does not hold a model."""
    name = settings.model
    if name == embedded.NAME:
        return Base(str(embedded.unpack(models)), embedded.HUB_ID, embedded.NOTE)
    folder = base_dir / Path(name).expanduser()
    if (folder / "config.json").is_file():
        return Base(str(folder), str(folder))
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            "this folder holds an adapter, not a model",
            where=str(folder),
            remedy=f"Merge it into its base first: finetuned merge {name} --output-dir merged",
        )
    if folder.is_dir() or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ModelError(
            "there is no model in this folder" if folder.is_dir() else "there is no such folder",
            where=str(folder),
            remedy="A model's folder holds config.json, weights and tokenizer; or name a hub id.",
        )
    return Base(name, name)


def choose_tuning(setting: str, *, gpu: bool, sharded: bool = False) -> tuple[str, str]:
    """Settle `tuning: auto`: the tuning and why."""
    if setting != "auto":
        return setting, f"tuning is {setting}"
    if sharded:
        return "lora", "4-bit weights cannot be spread over several GPUs"
    if gpu:
        return "qlora", "a 4-bit base leaves most of the GPU's memory to the batch"
    return "lora", "on a CPU a 4-bit base saves little and is not faster"


def load_tokenizer(base: Base, settings: TrainingSettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer. Raises ModelError if there is none that will do."""
    with loading(base):
        tokenizer = AutoTokenizer.from_pretrained(base.source, **hub_options(settings))
    if not tokenizer.is_fast:
        raise ModelError(
            "the model has no fast tokenizer, which tells where each token stands",
            where=base.name,
            remedy="Take another model.",
        )
    without_padding(tokenizer)
    return tokenizer


def without_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Take back what a call or a file has told the tokenizer to add or cut: rows are what they are."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()


def hub_options(settings: TrainingSettings) -> dict[str, Any]:
    """Give what from_pretrained is told beside the name."""
    return {"revision": settings.revision or "main", "trust_remote_code": settings.trust_remote_code}


@contextmanager
def loading(base: Base) -> Iterator[None]:
    """Turn what loading raises into a ModelError that says what to do; running out of memory passes through."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        text = str(error).strip().split("\n")[0]
        if _unreachable(error):
            raise HubUnreachableError(
                "the model is neither a folder nor downloaded, and the hub cannot be reached",
                where=base.name,
                remedy="Check the name and the network, or put the model into a folder.",
            ) from error
        if "model.safetensors" in text and ("no file named" in text or "does not appear to have a file" in text):
            raise ModelError(
                "it has no weights in safetensors, and other formats can hold programs that run when they are read",
                where=base.name,
                remedy="Take a model with safetensors, or convert it where you trust it.",
                code="no_safetensors",
            ) from error
        raise ModelError(
            f"the model cannot be loaded: {text}", where=base.name, remedy="Check the name in config.json."
        ) from error


def _unreachable(error: BaseException | None) -> bool:
    """Whether the network is at fault, somewhere down the chain of causes."""
    while error is not None:
        if type(error).__name__ in {
            "ConnectionError",
            "ConnectError",
            "ConnectTimeout",
            "ReadTimeout",
            "OfflineModeIsEnabled",
            "LocalEntryNotFoundError",
        }:
            return True
        error = error.__cause__ or error.__context__
    return False
