"""Every dtype decision of the project, in one room. Nothing falls back silently: what is set is what is computed in,
and `in_force` holds accelerate to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from finetuned.errors import ConfigError

BF16, FP16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
_SETTINGS = {"bf16": BF16, "fp16": FP16, "float32": FLOAT32}

# What is trained is float32 in every row, and Adam's two moments with it: its small steps round to nothing in bf16, and
# fp16 gradients cannot be unscaled into fp16 weights. A frozen base is stored as it is computed in; of a quantised one
# that is what is not quantised: embeddings, norms and head. Generation runs without autocast, on the base as it is
# stored. Only fp16 needs its gradients scaled: bf16 has float32's range.
_TABLE = {
    # tuning        computed in  base     trained  optimizer  scaled  generation
    ("full",        FLOAT32):   (FLOAT32, FLOAT32, FLOAT32,   False,  FLOAT32),
    ("full",        BF16):      (FLOAT32, FLOAT32, FLOAT32,   False,  FLOAT32),
    ("full",        FP16):      (FLOAT32, FLOAT32, FLOAT32,   True,   FLOAT32),
    ("lora",        FLOAT32):   (FLOAT32, FLOAT32, FLOAT32,   False,  FLOAT32),
    ("lora",        BF16):      (BF16,    FLOAT32, FLOAT32,   False,  BF16),
    ("lora",        FP16):      (FP16,    FLOAT32, FLOAT32,   True,   FP16),
    ("qlora",       FLOAT32):   (FLOAT32, FLOAT32, FLOAT32,   False,  FLOAT32),
    ("qlora",       BF16):      (BF16,    FLOAT32, FLOAT32,   False,  BF16),
    ("qlora",       FP16):      (FP16,    FLOAT32, FLOAT32,   True,   FP16),
    ("lora-8bit",   FLOAT32):   (FLOAT32, FLOAT32, FLOAT32,   False,  FLOAT32),
    ("lora-8bit",   BF16):      (BF16,    FLOAT32, FLOAT32,   False,  BF16),
    ("lora-8bit",   FP16):      (FP16,    FLOAT32, FLOAT32,   True,   FP16),
}  # fmt: skip

_QUANTISED = {
    "qlora": "of what is not quantised; layers are in 4-bit NF4, unpacked for each product",
    "lora-8bit": "of what is not quantised; layers are in 8 bits, to which a GPU rounds their inputs too",
}


@dataclass(frozen=True)
class Precision:
    """One row of the table: what is stored and computed in which number format, and why."""

    tuning: str
    compute: torch.dtype  # of matrix products in training; autocast brings it about where it differs from `trained`
    reason: str  # for `compute`
    weights: torch.dtype  # of the base model as it is loaded
    trained: torch.dtype  # of what the optimizer steps on: the adapter, or in full tuning all weights
    optimizer: torch.dtype  # of its state
    scaled: bool  # whether a gradient scaler is at work
    generation: torch.dtype

    @property
    def mixed(self) -> str:
        """Give accelerate's name for it."""
        return {BF16: "bf16", FP16: "fp16"}.get(self.compute, "no")

    def choices(self) -> dict[str, dict[str, str]]:
        """Give every choice with its reason."""
        base = _QUANTISED.get(self.tuning, "frozen, so stored as it is computed in")
        scaling = "fp16 underflows below 6e-8" if self.scaled else f"{_name(self.compute)} has the range"
        said = {
            "dtype": (_name(self.compute), self.reason),
            "weights": (_name(self.weights), "they are trained" if self.tuning == "full" else base),
            "trained": (_name(self.trained), "Adam's small steps round to nothing in 16 bits"),
            "optimizer": (_name(self.optimizer), "as what it steps on"),
            "gradient_scaling": ("on" if self.scaled else "off", scaling),
            "generation": (_name(self.generation), "without autocast, in the base's own format"),
        }
        return {name: {"choice": choice, "reason": reason} for name, (choice, reason) in said.items()}


def choose(device: torch.device, tuning: str, setting: str) -> Precision:
    """Look up the row for a device, a tuning (not "auto") and config.json's `dtype`."""
    compute, reason = _fastest(device) if setting == "auto" else (_SETTINGS[setting], f"dtype is {setting}")
    weights, trained, optimizer, scaled, generation = _TABLE[tuning, compute]
    return Precision(tuning, compute, reason, weights, trained, optimizer, scaled, generation)


def _fastest(device: torch.device) -> tuple[torch.dtype, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return BF16, "this GPU computes in bf16"
        return FP16, "this GPU has no bf16, so fp16 with a gradient scaler"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():  # noqa: SLF001, there is no public name
        return BF16, "this CPU multiplies in bf16"
    return FLOAT32, "this CPU has no bf16 arithmetic"


def in_force(precision: Precision, device: torch.device) -> Accelerator:
    """Give an accelerator that does what the row says. Raises ConfigError if it will not."""
    accelerator = Accelerator(mixed_precision=precision.mixed, cpu=device.type == "cpu")
    if precision.scaled and device.type == "cpu":
        # accelerate 1.15 trains in float32 there, without autocast, scaler or a word. torch has had both since 2.3.
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu")
    if (accelerator.scaler is not None, accelerator.native_amp) != (precision.scaled, precision.mixed != "no"):
        raise ConfigError(
            f"accelerate does not compute in {precision.mixed} on this device",
            where="dtype",
            remedy='Set "dtype" to "auto" or "float32".',
        )
    return accelerator


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
