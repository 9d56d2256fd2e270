"""Ray and Slurm, both real, as the tests of a daemon see them: what the two have in common."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from typing import Any

from conftest import eventually
from fixtures_ray import TOKEN, RayCluster
from fixtures_slurm import SlurmCluster


class RayEngine:
    """A Ray with one GPU."""

    name = "ray"

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster
        self._away = False

    def settings(self, *, wrong: bool = False, **ways: object) -> dict[str, Any]:
        """Give what config.json says of it, and how a stand-in behaves there; `wrong`: without the token."""
        variables = {f"STANDIN_{name.upper()}": str(value) for name, value in ways.items()}
        # As many threads as here, or sums are added up in another order.
        variables |= {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
        ray = {"address": self._cluster.address, "runtime_env": {"env_vars": variables}}
        return {"ray": ray if wrong else {**ray, "token_file": str(self._cluster.token_file)}}

    refusal = ("Ray does not let us in (401)", "ray.token_file")

    def at_work(self) -> list[str]:
        """Give the ids of the jobs that it has and that have not ended."""
        jobs = self._ask("GET", "/api/jobs/")
        return [job["submission_id"] for job in jobs if job["status"] in {"PENDING", "RUNNING"}]

    def take(self, trainer: str) -> None:
        """End a job as somebody else does."""
        self._ask("POST", f"/api/jobs/{trainer}/stop")

    def says_why(self, status: str) -> bool:
        """Whether `finetuned status` says why a job waits while nobody answers."""
        return "ray takes no jobs" in status

    def go_away(self) -> None:
        """Answer nobody any more, nor go on with a job."""
        self._away = True
        self._cluster.kill()

    def come_back(self) -> None:
        self._cluster.start()
        self._away = False

    def lose_node(self) -> None:
        """Lose what watches over jobs on the node."""
        os.kill(self._cluster.pid_of("ray::JobSupervisor"), signal.SIGKILL)

    def mend_node(self) -> None:
        """Do nothing: Ray starts that anew itself."""

    def ready(self) -> None:
        """Do nothing: it always is."""

    def empty(self) -> None:
        """End all jobs, also after a test that failed while the engine was away."""
        if self._away:
            self.come_back()
        for trainer in self.at_work():
            self.take(trainer)
        eventually(lambda: not self.at_work(), why="no job in Ray")

    def _ask(self, method: str, path: str) -> Any:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        request = urllib.request.Request(self._cluster.address + path, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


class SlurmEngine:
    """A Slurm with two GPUs."""

    name = "slurm"

    def __init__(self, cluster: SlurmCluster) -> None:
        self.cluster = cluster
        self._away = False

    def settings(self, *, wrong: bool = False, partition: str = "scrap", **ways: object) -> dict[str, Any]:
        """Give what config.json says of it, and how a stand-in of the trainer behaves there.

        What is preempted in the partition scrap ends; in low it is put back by Slurm itself.
        """
        variables = ",".join(["ALL", *(f"STANDIN_{name.upper()}={value}" for name, value in ways.items())])
        partition = "nowhere" if wrong else partition
        return {"slurm": {"options": [f"--partition={partition}", f"--export={variables}"]}}

    refusal = ("invalid partition specified: nowhere", "Mend its options")

    def at_work(self) -> list[str]:
        """Give the ids of the jobs that it has and that have not ended."""
        return self.cluster.run("squeue", "-h", "-o", "%i").split()

    def take(self, trainer: str) -> None:
        """Prefer another job to this one, which is cancelled for that."""
        options = ("--partition=high", "--gpus-per-node=2", "--output=/dev/null")
        self.cluster.run("sbatch", *options, "--wrap=sleep 1")
        eventually(lambda: self.cluster.state(trainer) not in {"RUNNING", "PENDING"}, why="a job that had to go")

    def says_why(self, status: str) -> bool:
        """Whether `finetuned status` says why a job waits while nobody answers: before it is submitted, or after."""
        return "slurm takes no jobs" in status or "waits for the cluster: Slurm" in status

    def go_away(self) -> None:
        """Answer nobody any more. Its jobs go on."""
        self._away = True
        self.cluster.stop_controller()

    def come_back(self) -> None:
        self.cluster.start_controller()
        self._away = False

    def lose_node(self) -> None:
        """Lose what watches over the node."""
        self.cluster.kill_node()

    def mend_node(self) -> None:
        self.cluster.start_node()

    def ready(self) -> None:
        """See to it that it takes jobs."""
        self.cluster.ready()

    def empty(self) -> None:
        """End all jobs, also after a test that failed while the engine was away."""
        if self._away:
            self.come_back()
        self.cluster.empty()
