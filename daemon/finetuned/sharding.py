"""Which jobs may be trained with the model's layers spread over the GPUs of several processes. No torch, so that it can
be asked before any GPU is taken.
"""

from __future__ import annotations

from finetuned.errors import ConfigError

NO_BENCHMARK = "the benchmark is left out: the model is spread over several processes"

_WHERE = "a model spread over several GPUs"


def may_be_sharded(recipe: str, tuning: str) -> bool:
    """Whether a job may be trained so; one that would be quantised by choice of the machine may, unquantised."""
    try:
        check(recipe, tuning)
    except ConfigError:
        return False
    return True


def check(recipe: str, tuning: str) -> None:
    """Raise ConfigError unless a job of this recipe, on a rung with this tuning, may be sharded."""
    if tuning not in {"lora", "full", "auto"}:
        raise ConfigError(
            f'cannot be quantised: bitsandbytes\' weights cannot be cut up, and tuning is "{tuning}"',
            where=_WHERE,
            remedy='Set "tuning" to "lora" (and fallback_4bit to false), or train it on one GPU.',
        )
    if recipe not in {"sft", "distill"}:
        raise ConfigError(
            f'learns from given answers alone: recipe "{recipe}" learns from many of its own, and each token of them '
            "would fetch all layers anew",
            where=_WHERE,
            remedy='Set "recipe" to "sft", or take a model that fits on one GPU.',
        )
    if recipe == "distill" and tuning == "full":
        raise ConfigError(
            'is taught by a teacher through an adapter alone: the slopes of recipe "distill" are taken on weights that '
            'are whole, and tuning is "full"',
            where=_WHERE,
            remedy='Set "tuning" to "lora", or "recipe" to "sft".',
        )
