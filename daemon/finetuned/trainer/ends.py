"""How an attempt ends other than by success or by a user's mistake. No torch, so that the exit code can be told
without it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from finetuned.errors import OutOfMemoryError
from finetuned.fallback import SHORTEST_ROW, Rung

_FULL_BYTES = 16  # a parameter's weight, gradient and AdamW's two moments in float32
_LITTLE = 0.1  # share of memory that other programs always have
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class StopAskedError(Exception):
    """The trainer was asked to stop; a checkpoint is written."""


class RankLostError(Exception):
    """Another process of the same training is gone or does not answer."""


@dataclass(frozen=True)
class Means:
    """What there was when memory ran out. 0: not known."""

    device: str  # "the GPU" or "the machine"
    total: int = 0  # bytes that this process could have at most
    others: int = 0  # bytes of these that other programs hold
    parameters: int = 0  # of the model; not known while it is loaded
    longest: int = 0  # tokens of the longest row
    allow_4bit: bool = False
    allow_shorter: bool = False


class OutOfMeansError(Exception):
    """Memory ran out and this process cannot help itself. `rung` is the one to climb down from."""

    def __init__(self, rung: Rung, detail: str, means: Means | None = None) -> None:
        super().__init__(detail)
        self.rung = rung
        self.detail = detail
        self.means = means or Means("the machine")

    def for_user(self) -> OutOfMemoryError:
        """Give what the user reads if the ladder has no rung left: what was needed, what there is, what to set."""
        means, asked = self.means, wanted_bytes(self.detail)
        needs = f"{readable(asked)} more were needed" if asked else self.detail
        has = f", and {means.device} has {readable(means.total)} in all" if means.total else ""
        others = (
            f", of which other programs hold {readable(means.others)}" if means.others > _LITTLE * means.total else ""
        )
        doing = "" if means.parameters else ", while the model was loaded"
        options = "; or ".join(_options(self.rung, means))
        return OutOfMemoryError(
            f"memory ran out at {self.rung}{doing}: {needs}{has}{others}", remedy=f"{options[0].upper()}{options[1:]}."
        )


def _options(rung: Rung, means: Means) -> list[str]:
    """Say what can still help, what costs least first."""
    options = []
    if means.others > _LITTLE * means.total:
        options.append(f"end the other programs on {means.device}")
    if rung.tuning == "full":
        size = f": all weights take {readable(_FULL_BYTES * means.parameters)}" if means.parameters else ""
        options.append(f'set tuning to "lora" (it is "full"{size} before the first row)')
    elif rung.tuning in {"lora", "lora-8bit"} and not means.allow_4bit:
        options.append(f'set tuning to "qlora" (it is "{rung.tuning}"), or fallback_4bit to true')
    shorter = -(-means.longest // 2 // 64) * 64
    if SHORTEST_ROW <= shorter < means.longest:
        option = f"set max_length to {shorter} (it is {rung.max_length}, the longest row has {means.longest} tokens)"
        options.append(option if means.allow_shorter else f"{option}, or fallback_max_length to true")
    size = f" (this one has {means.parameters / 1e6:,.0f} million parameters)" if means.parameters else ""
    return [*options, f"set model to a smaller one{size}"]


def wanted_bytes(detail: str) -> int:
    """Read from an allocator's message how much it could not give; 0 if it does not say."""
    if found := re.search(r"allocate ([\d.]+) ([KMGT]iB)", detail):
        return int(float(found[1]) * _UNITS[found[2]])
    found = re.search(r"(?:allocate|tried|mmap) (\d+) bytes", detail)
    return int(found[1]) if found else 0


def readable(size: int) -> str:
    """Give bytes as people read them: 3.1 GiB."""
    unit, factor = next(((u, f) for u, f in reversed(_UNITS.items()) if size >= f), ("bytes", 1))
    number = size / factor
    return f"{number:.1f} {unit}" if number < 10 and factor > 1 else f"{number:.0f} {unit}"
