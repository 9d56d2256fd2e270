"""Trainers as jobs of a Ray cluster."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from finetuned.durable import OTHERS_NOTHING, write_file
from finetuned.engine_settings import Ray
from finetuned.errors import FinetunedError
from finetuned.events import ExitCode
from finetuned.home import JobFolder
from finetuned.launchers import Needs
from finetuned.launchers.program import GHOST_SECONDS, GIVEN_UP_SECONDS, command, environment_elsewhere, given_up, tell
from finetuned.launchers.ray_cluster import Cluster, UnsureError
from finetuned.launchers.ray_ends import NOT_SHARED, End, end_of, waits_for
from finetuned.lifesigns import Silence, exit_code, locked

_AT_MOST = 0.5  # seconds for a connection, and as many for an answer, where the daemon waits for them
_IN_A_THREAD = 10.0  # likewise, where nobody waits
_PAUSE = 2.0  # seconds between two questions
# Seconds that Ray leaves a trainer from SIGTERM to SIGKILL: enough for a checkpoint when somebody stops it through Ray.
_RAYS_PATIENCE = {"RAY_JOB_STOP_WAIT_TIME_S": "10"}


class RayTrainer:
    """A trainer as a job of Ray's. What Ray says of it is asked for in a thread, so that nobody waits for that."""

    pid = None

    def __init__(self, cluster: Cluster, folder: JobFolder, submission: str, attempt: int) -> None:
        """Ask nothing yet; it may still have to be submitted."""
        self.id = submission
        self.taken = ""
        self.waits = ""
        self.order: dict[str, Any] | None = None  # to be given again, if the cluster turns out not to know it
        self._cluster = cluster
        self._folder = folder
        self._attempt = attempt
        self._status: int | None = None
        self._end: End | None = None  # as Ray says
        self._ended_at = 0.0
        self._asked_to_stop = False
        self._killed = False
        self._silence = Silence(folder)  # since it was killed, or Ray answered last
        self._ask_at = 0.0
        self._asking: threading.Thread | None = None

    @property
    def in_doubt(self) -> bool:
        """Whether nobody knows yet if the cluster has taken the order."""
        return self.order is not None and self._end is None and self._status is None

    def poll(self) -> int | None:
        """Give its exit status as subprocess does; None while it runs, waits for its turn, or cannot be asked for."""
        if self._status is None:
            self._ask_if_due()
            if self._end is not None:
                self._status = self._conclude(self._end)
            elif self._killed and self._silence.seconds() >= GIVEN_UP_SECONDS:
                self._status = self._give_up()
        return self._status

    def ask_to_stop(self) -> None:
        """Ask for a checkpoint and an end; one that has not begun never will."""
        with suppress(OSError):  # no room on the disk: it is killed in time, and Ray's first signal asks as well
            write_file(self._folder.stop(self._attempt), b"")
            self._asked_to_stop = True
        self._ask_at = 0.0

    def kill(self) -> None:
        """Have it ended by Ray. That takes a few seconds; `poll` says when it is done."""
        if not self._killed:
            self._killed = True
            self._silence = Silence(self._folder)
            self._ask_at = 0.0

    def _ask_if_due(self) -> None:
        busy = self._asking is not None and self._asking.is_alive()
        if self._end is None and not busy and time.monotonic() >= self._ask_at:
            self._ask_at = time.monotonic() + _PAUSE
            self._asking = threading.Thread(target=self._ask, name=self.id, daemon=True)
            self._asking.start()

    def _ask(self) -> None:
        with suppress(OSError):  # the cluster has noted it, and the next question comes
            may_withdraw = self._asked_to_stop  # what is not running after this will find the word to stop
            if self._killed:
                with suppress(OSError):
                    self._cluster.stop(self.id, seconds=_IN_A_THREAD)
            info = self._cluster.info(self.id, seconds=_IN_A_THREAD)
            self._silence = Silence(self._folder)
            if info is None and self.order is not None:
                self._submit_again(self.order)
                return
            self.order = None
            self.waits = waits_for(info)
            if info is not None and info["status"] == "PENDING" and may_withdraw:
                self._ended(End(ExitCode.STOPPED))
                self._cluster.stop(self.id, seconds=_IN_A_THREAD)
            else:
                self._ended(end_of(info))

    def _submit_again(self, order: dict[str, Any]) -> None:
        if self._asked_to_stop or self._killed:
            self._ended(End(ExitCode.STOPPED))
            return
        try:
            self._cluster.submit(order, seconds=_IN_A_THREAD)
        except FinetunedError as error:
            self._ended(End(ExitCode.BAD_SETTINGS, error=error))

    def _ended(self, end: End | None) -> None:
        self._ended_at = time.monotonic()
        self._end = end

    def _conclude(self, end: End) -> int | None:
        """Give the exit status; None while a trainer that Ray has lost may still be at work."""
        if end.taken and not self._asked_to_stop:
            self.ask_to_stop()
        if locked(self._folder) and time.monotonic() < self._ended_at + GHOST_SECONDS:
            return None
        said = exit_code(self._folder, self._attempt)
        if said is not None:
            return said
        if self._killed:
            return -signal.SIGKILL
        self.taken = end.taken
        if end.error is not None:
            tell(self._folder, end.error)
        return end.status

    def _give_up(self) -> int:
        """Wait no longer for a cluster that may be gone for ever."""
        said = exit_code(self._folder, self._attempt)
        if said is not None:
            return said
        look = f"ray job status --address {self._cluster.address} {self.id}"
        self.taken = given_up(self._folder, "Ray", self.id, look=look)
        return -signal.SIGKILL


class RayLauncher:
    """Runs trainers on a Ray cluster."""

    def __init__(self, settings: Ray) -> None:
        """Ask nothing yet."""
        self._settings = settings
        self._cluster = Cluster(settings)
        self._last: RayTrainer | None = None  # whose order was not answered

    @property
    def back_at(self) -> float:
        """When Ray, after it had been silent, answered again."""
        return self._cluster.back_at

    def start(self, folder: JobFolder, *, log: Path, environment: Mapping[str, str], needs: Needs) -> RayTrainer:
        """Submit a trainer on a job's folder, its output appended to `log`.

        Raises OSError if the cluster does not answer, FinetunedError if it refuses. Where it may have taken the job
        and did not say so, the trainer finds out.
        """
        if self._last is not None and self._last.in_doubt:
            raise ConnectionError("Ray has not answered yet")
        submission = submission_id(folder, needs.attempt)
        trainer = RayTrainer(self._cluster, folder, submission, needs.attempt)
        order = self._order(folder, log, environment, needs)
        try:
            self._cluster.submit(order, seconds=_AT_MOST)
        except UnsureError:
            trainer.order = order
            self._last = trainer
        return trainer

    def find(self, folder: JobFolder, *, trainer_id: str, attempt: int) -> RayTrainer | None:
        """Give the trainer that an earlier daemon submitted, also one whose id it had no time to note.

        None if the cluster knows none, and none has left a trace. While the cluster does not answer it is taken to
        know it.
        """
        submission = trainer_id or submission_id(folder, attempt)
        trainer = RayTrainer(self._cluster, folder, submission, attempt)
        with suppress(OSError):
            gone = self._cluster.info(submission, seconds=_AT_MOST) is None
            if gone and exit_code(folder, attempt) is None and not locked(folder):
                return None
        return trainer

    def _order(self, folder: JobFolder, log: Path, environment: Mapping[str, str], needs: Needs) -> dict[str, Any]:
        settings = self._settings
        variables = {
            **_RAYS_PATIENCE,
            **settings.runtime_env.get("env_vars", {}),
            **environment_elsewhere(environment, needs.attempt),
        }
        program = command(folder, python=settings.python)
        reserved: dict[str, Any] = {}
        if settings.across_nodes and needs.gpus > 1:
            program = self._in_ray_train(program, folder, log, needs)
        else:
            others = dict(settings.resources)
            reserved["entrypoint_num_gpus"] = needs.gpus
            reserved["entrypoint_num_cpus"] = others.pop("CPU", 0)
            reserved["entrypoint_memory"] = int(others.pop("memory", 0))
            reserved["entrypoint_resources"] = others
            if not reserved["entrypoint_num_cpus"] and "OMP_NUM_THREADS" not in variables:
                program = ["env", "-u", "OMP_NUM_THREADS", *program]  # Ray gives one thread to who reserves none
        return {
            "submission_id": submission_id(folder, needs.attempt),
            "entrypoint": _entry_point(program, folder, log, needs.attempt),
            "runtime_env": {**settings.runtime_env, "env_vars": variables},
            "metadata": {"job_name": f"finetuned {needs.job}"},
            **{name: value for name, value in reserved.items() if value},
        }

    def _in_ray_train(self, program: list[str], folder: JobFolder, log: Path, needs: Needs) -> list[str]:
        """Give the command that has Ray Train run `program` on each of so many GPUs. Raises OSError."""
        script = folder.path / "ray_train.py"
        write_file(script, Path(__file__).with_name(script.name).read_bytes())
        python = self._settings.ray_python or self._settings.python or sys.executable
        options = {
            "workers": needs.gpus,
            "resources": json.dumps(self._settings.resources),
            "folder": folder.path,
            "stop": folder.stop(needs.attempt),
            "log": log,
        }
        return [python, str(script), *(f"--{name}={value}" for name, value in options.items()), "--", *program]


def _entry_point(program: list[str], folder: JobFolder, log: Path, attempt: int) -> str:
    """Give the command for the node's shell. It does nothing where the job was stopped before its turn came."""
    path, word, output = (shlex.quote(str(path)) for path in (folder.path, folder.stop(attempt), log))
    return (
        f"test -d {path} || exit {NOT_SHARED}; test -e {word} && exit {ExitCode.STOPPED:d}; "
        f"umask {OTHERS_NOTHING:03o}; exec {shlex.join(program)} >> {output} 2>&1"
    )


def submission_id(folder: JobFolder, attempt: int) -> str:
    """Name an attempt so that it is the same whoever asks, and no other's on a cluster that several daemons share."""
    place = sha256(os.fsencode(folder.path)).hexdigest()[:12]
    return f"finetuned-{folder.path.name}-{attempt}-{place}"
