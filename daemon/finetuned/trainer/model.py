"""The base model and its quantisation."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from finetuned.config import TrainingSettings
from finetuned.errors import ConfigError, ModelError
from finetuned.trainer import embedded, memory
from finetuned.trainer.precision import Precision
from finetuned.trainer.vision import auto_class, tower

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


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
    if folder.is_dir() or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ModelError(
            "there is no model in this folder" if folder.is_dir() else "there is no such folder",
            where=str(folder),
            remedy="A model's folder holds config.json, weights and tokenizer; or name a hub id.",
        )
    return Base(name, name)


def choose_tuning(setting: str, device: torch.device) -> tuple[str, str]:
    """Settle `tuning: auto`: the tuning and why."""
    if setting != "auto":
        return setting, f"tuning is {setting}"
    if device.type == "cuda":
        return "qlora", "a 4-bit base leaves most of the GPU's memory to the batch"
    return "lora", "on a CPU a 4-bit base saves little and is not faster"


def load_tokenizer(base: Base, settings: TrainingSettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer. Raises ModelError if there is none or it has no chat template."""
    with _loading(base):
        tokenizer = AutoTokenizer.from_pretrained(base.source, **_hub(settings))
    if not tokenizer.chat_template:
        raise ModelError(
            "the model has no chat template, so chats cannot be put into its words",
            where=base.name,
            remedy="Take its instruct or chat variant.",
            code="no_chat_template",
        )
    if not tokenizer.is_fast:
        raise ModelError(
            "the model has no fast tokenizer, which tells where each token stands",
            where=base.name,
            remedy="Take another model.",
        )
    return tokenizer


def load_model(
    base: Base, settings: TrainingSettings, *, tuning: str, precision: Precision, device: torch.device
) -> PreTrainedModel:
    """Load the base weights onto the device, quantised where the tuning says so, a vision tower frozen.

    Raises ModelError.
    """
    quantised = {"quantization_config": _quantisation(tuning, precision)} if tuning in {"qlora", "lora-8bit"} else {}
    with _loading(base), _conversion_told():
        config = AutoConfig.from_pretrained(base.source, **_hub(settings))
        _check_quantised(config, base, tuning)
        config.use_cache = False
        _switch_dropout_off(config)
        model: PreTrainedModel = auto_class(config).from_pretrained(
            base.source,
            config=config,
            dtype=precision.weights,
            device_map={"": device},
            use_safetensors=True,  # other formats hold programs
            **quantised,
            **_hub(settings),
        )
    for parameter in tower(model):
        parameter.requires_grad = False
    return model


def _check_quantised(config: PretrainedConfig, base: Base, tuning: str) -> None:
    """Refuse weights that are quantised already in another way than the tuning says: they would be trained, or merged
    into, as if they were not.
    """
    was = getattr(config, "quantization_config", None)
    if was is None:
        return
    was = was if isinstance(was, dict) else was.to_dict()
    bits = "load_in_4bit" if tuning == "qlora" else "load_in_8bit" if tuning == "lora-8bit" else ""
    if not (bits and was.get("quant_method") == "bitsandbytes" and was.get(bits)):
        raise ModelError(
            f"its weights are quantised already ({was.get('quant_method')}), which tuning {tuning} cannot train",
            where=base.name,
            remedy="Name the model that is not quantised; tuning qlora quantises by itself.",
        )


def _switch_dropout_off(config: PretrainedConfig) -> None:
    """Switch the base model's own dropout off: with it a step would depend on how it is cut. lora_dropout does not."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            if name.endswith(("dropout", "_pdrop")) and isinstance(value, float):
                setattr(part, name, 0.0)


@contextmanager
def _conversion_told() -> Iterator[None]:
    """Let an error of a weight's conversion say what it was.

    transformers logs it and raises one that names no cause, so that memory that ran out in quantising would pass for a
    bug.
    """
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "utils.loading_report")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    try:
        yield
    except RuntimeError as error:
        if said and memory.out_of_memory(error) is None:
            raise RuntimeError("\n".join([f"{error}", *said])) from error
        raise
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def empty_model(base: Base, settings: TrainingSettings, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model without its weights, on the meta device. Raises ModelError."""
    with _loading(base), torch.device("meta"):
        config = AutoConfig.from_pretrained(base.source, **_hub(settings))
        config.use_cache = False
        model: PreTrainedModel = auto_class(config).from_config(
            config, dtype=dtype, trust_remote_code=settings.trust_remote_code
        )
    return model


def _hub(settings: TrainingSettings) -> dict[str, Any]:
    return {"revision": settings.revision or "main", "trust_remote_code": settings.trust_remote_code}


def _quantisation(tuning: str, precision: Precision) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"tuning {tuning} needs bitsandbytes, which is not installed",
            where="tuning",
            remedy='Install it, or set "tuning" to "lora".',
        ) from error
    from transformers import BitsAndBytesConfig

    if tuning == "lora-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision.compute,
    )


@contextmanager
def _loading(base: Base) -> Iterator[None]:
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


def set_checkpointing(model: PreTrainedModel, *, on: bool) -> None:
    """Switch activation checkpointing."""
    # transformers renamed it on the way to version 6.
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    if on:
        getattr(model, f"{name}_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_disable")()


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode and back.

    bitsandbytes' layers stay in training mode: on a CPU their evaluation repacks the weights, and the next training
    pass would lose its gradient without a word.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module in modes:
        if type(module).__module__.startswith(("bitsandbytes", "peft.tuners.lora.bnb")):
            for part in module.modules():
                part.training = not isinstance(part, torch.nn.Dropout)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
