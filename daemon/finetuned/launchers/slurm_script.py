"""The script that is submitted to Slurm: a template, its placeholders filled. Pure but for the reading of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from finetuned.errors import ConfigError

TEMPLATE = Path(__file__).with_name("slurm.sh")
_PLACEHOLDER = re.compile(r"(?<![$\\])\{([A-Za-z_]+)\}")  # not ${VARIABLE}, which is the shell's


def read_template(path: Path) -> str:
    """Read it. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the template for Slurm cannot be read: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            remedy="Put it there, or take slurm.template out of config.json for finetuned's own.",
        ) from None


def fill(template: str, values: Mapping[str, str], *, where: Path) -> str:
    """Put the values where the template names them in braces. Raises ConfigError, which lists all that is wrong."""
    named = set(_PLACEHOLDER.findall(template))
    wrong = [f"{{{name}}} is no placeholder" for name in sorted(named - values.keys())]
    if "command" not in named:
        wrong.append("{command}, which starts the trainer, is missing")
    if not template.startswith("#!"):
        wrong.append("its first line must name a shell, such as #!/bin/bash")
    if wrong:
        raise ConfigError(
            f"the template for Slurm cannot be used: {'; '.join(wrong)}",
            where=str(where),
            remedy=f"There are {', '.join(f'{{{name}}}' for name in values)}; the shell's own braces want a space "
            "inside.",
        )
    return _PLACEHOLDER.sub(lambda found: values[found[1]], template)
