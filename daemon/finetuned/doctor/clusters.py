"""The checks of what config.json names as places for jobs: the clusters of Ray and Slurm, and GPUs of this machine."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from finetuned.config import Config, load_config
from finetuned.doctor.finding import Finding, Verdict, failed
from finetuned.errors import FinetunedError
from finetuned.gpu import Gpu
from finetuned.home import Home

_SECONDS = 10.0  # for an answer


def check_places(home: Home, gpus: Sequence[Gpu]) -> list[Finding]:
    """Give a finding for each place that config.json names. `gpus` are those of this machine."""
    try:
        config = load_config(home.config_file)
    except FinetunedError:  # a finding of its own
        return []
    used = {config.launcher, *(settings.get("launcher") for settings in config.profiles.values())}
    findings = [] if config.gpus is None else [check_gpus(config, gpus)]
    if "ray" in used:
        findings.append(check_ray(config))
    if "slurm" in used:
        findings.append(check_slurm(config, home))
    return findings


def check_gpus(config: Config, gpus: Sequence[Gpu]) -> Finding:
    """Whether all that `gpus` names is there."""
    known = {name for gpu in gpus for name in (gpu.index, gpu.uuid)}
    absent = [str(name) for name in config.gpus or () if name not in known]
    if absent:
        there = ", ".join(f"{gpu.index}: {gpu.uuid}" for gpu in gpus) or "none"
        what = f"`gpus` names {', '.join(absent)}, which this machine does not have; there: {there}"
        return Finding("gpus", Verdict.FAIL, what, "Mend `gpus` in config.json, or leave it out for all.")
    return Finding("gpus", Verdict.OK, f"all that `gpus` names are there: {', '.join(map(str, config.gpus or ()))}")


def check_ray(config: Config) -> Finding:
    """Whether Ray answers, and lets us in."""
    from finetuned.launchers.ray_cluster import Cluster

    try:
        Cluster(config.ray).look("finetuned-doctor", seconds=_SECONDS)
    except OSError as error:
        remedy = (
            "Start the cluster, or mend `ray` in config.json: `address` is its dashboard's, `token_file` its token's."
        )
        return Finding("ray", Verdict.FAIL, str(error), remedy)
    return Finding("ray", Verdict.OK, f"answers at {config.ray.address}")


def check_slurm(config: Config, home: Home) -> Finding:
    """Whether Slurm's commands are here, Slurm answers, and the template can be read."""
    from finetuned.launchers.slurm_queue import require_commands
    from finetuned.launchers.slurm_script import read_template

    try:
        require_commands()
        if config.slurm.template is not None:
            read_template(home.root / Path(config.slurm.template).expanduser())
    except FinetunedError as error:
        return failed("slurm", error)
    try:
        command = ["squeue", "--me", "--noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        said = "" if done.returncode == 0 else done.stderr.strip() or f"squeue ended with {done.returncode}"
    except (OSError, subprocess.SubprocessError) as error:
        said = str(error)
    if said:
        return Finding("slurm", Verdict.FAIL, f"does not answer: {said}", "See whether its controller is up: `sinfo`.")
    return Finding("slurm", Verdict.OK, f"answers; {config.slurm.template or 'the template'} can be read")
