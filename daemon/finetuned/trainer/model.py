"""The base model and its quantisation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from finetuned.config import TrainingSettings
from finetuned.errors import ConfigError, ModelError
from finetuned.trainer import memory
from finetuned.trainer.base import Base, hub_options, loading
from finetuned.trainer.precision import Precision
from finetuned.trainer.vision import auto_class, tower

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_model(
    base: Base, settings: TrainingSettings, *, tuning: str, precision: Precision, device: torch.device
) -> PreTrainedModel:
    """Load the base weights onto the device, quantised where the tuning says so, a vision tower frozen.

    Raises ModelError.
    """
    quantised = {"quantization_config": _quantisation(tuning, precision)} if tuning in {"qlora", "lora-8bit"} else {}
    with loading(base), _conversion_told():
        config = AutoConfig.from_pretrained(base.source, **hub_options(settings))
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
            **hub_options(settings),
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
    with loading(base), torch.device("meta"):
        config = AutoConfig.from_pretrained(base.source, **hub_options(settings))
        config.use_cache = False
        model: PreTrainedModel = auto_class(config).from_config(
            config, dtype=dtype, trust_remote_code=settings.trust_remote_code
        )
    return model


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


def causal(model: PreTrainedModel) -> PreTrainedModel:
    """Give the model without PEFT's wrapping; its layers have the adapter on all the same."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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
