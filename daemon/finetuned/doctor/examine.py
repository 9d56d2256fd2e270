"""All checks in order, and how they are shown."""

from __future__ import annotations

from pathlib import Path

from finetuned.doctor import clusters, machine, place
from finetuned.doctor.finding import Finding, Verdict, failed
from finetuned.errors import FinetunedError
from finetuned.home import find_home


def examine(base_dir: Path | None) -> list[Finding]:
    """Make all checks: those of the machine, and those of the base directory if there is one."""
    gpus, why_none = machine.find_gpus()
    findings = [
        machine.check_python(),
        machine.check_versions(),
        machine.check_cuda([str(gpu) for gpu in gpus], why_none),
        machine.check_bitsandbytes(needed=bool(gpus)),
        machine.check_jemalloc(needed=not gpus),
        machine.check_clock(),
    ]
    try:
        home = find_home(base_dir)
    except FinetunedError as error:
        return [*findings, failed("base directory", error)]
    checks = (
        place.check_config,
        place.check_folders,
        place.check_one_mount_holds,
        place.check_disk,
        place.check_daemon,
        place.check_inotify,
    )
    return [*findings, *(check(home) for check in checks), *clusters.check_places(home, gpus)]


def render(findings: list[Finding]) -> str:
    """Give it as text for a terminal."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:4}  {finding.check:{width}}  {finding.what}")
        if finding.remedy and finding.verdict is not Verdict.OK:
            lines.append(f"{'':4}  {'':{width}}  {finding.remedy}")
    return "\n".join(lines)
