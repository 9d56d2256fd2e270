"""What a check found: ok, a warning, or something that must be mended, with the remedy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

from finetuned.errors import FinetunedError


class Verdict(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"  # works, but not as well as it could
    FAIL = "fail"  # must be mended


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    verdict: Verdict
    what: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """Give it as `--json` prints it."""
        return asdict(self)


def failed(check: str, error: FinetunedError) -> Finding:
    """Make an error the finding of a check."""
    what = f"{error.where}: {error.what}" if error.where else error.what
    return Finding(check, Verdict.FAIL, what, error.remedy)
