"""Every dtype decision of the project, in one room. Nothing falls back silently: a setting that cannot be had is an
error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from finetuned.errors import ConfigError


@dataclass(frozen=True)
class Precision:
    """What is stored and computed in which number format, and why."""

    weights: torch.dtype  # of the base model as it is loaded
    trained: torch.dtype  # of what the optimizer steps on
    compute: torch.dtype  # of matrix products in training; autocast brings it about where it differs from `trained`
    reason: str

    @property
    def mixed(self) -> str:
        """Give accelerate's name for it. fp16 brings a GradScaler with it, bf16 never."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.compute, "no")


def choose(device: torch.device, tuning: str, setting: str) -> Precision:
    """Decide from the device, the tuning and config.json's `dtype`. Raises ConfigError.

    What is trained stays float32: Adam's small steps round to nothing in bf16.
    """
    if setting == "auto":
        compute, reason = _fastest(device)
    else:
        compute, reason = (
            {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[setting],
            f"dtype is {setting}",
        )
    if compute is torch.float16 and device.type != "cuda":
        raise ConfigError("fp16 needs a GPU", where="dtype", remedy='Set "dtype" to "auto", "bf16" or "float32".')
    weights = torch.float32 if tuning == "full" else compute
    return Precision(weights, torch.float32, compute, reason)


def _fastest(device: torch.device) -> tuple[torch.dtype, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU computes in bf16"
        return torch.float16, "this GPU has no bf16, so fp16 with a gradient scaler"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():  # noqa: SLF001, there is no public name
        return torch.bfloat16, "this CPU multiplies in bf16"
    return torch.float32, "this CPU has no bf16 arithmetic"
