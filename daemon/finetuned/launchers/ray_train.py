"""One job on GPUs of several nodes of a Ray cluster: Ray Train starts a worker for each GPU, and each worker one rank
of the trainer, which finds its place in the environment as below torchrun.

This runs on the cluster, in the Python that has Ray there: the launcher copies it into the job's folder, and nothing of
finetuned is imported.
"""

from __future__ import annotations

import argparse
import ctypes
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_WORKER_LOST = 74  # exit code, as `ray_ends.py` knows it
_PATIENCE = 30.0  # seconds for rank 0 to end once another has failed: it may write a checkpoint
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_SAID = re.compile(r"rank (\d+) ended with (-?\d+)")


def train(order: dict[str, Any]) -> None:
    """Run this worker's rank to its end. Raises RuntimeError with its exit status if that is none of success."""
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    rank = ray.train.get_context().get_world_rank()
    # Ray's own group of these workers has the port that is in the environment.
    port = broadcast_from_rank_zero(_free_port() if rank == 0 else None)
    environment = {**os.environ, "MASTER_PORT": str(port)}
    environment.pop("ACCELERATE_TORCH_DEVICE", None)  # the trainer finds it out
    parent = ctypes.CDLL(None)
    with Path(order["log"]).open("ab") as output:
        status = subprocess.run(
            order["command"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=lambda: parent.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0),
            check=False,
        ).returncode
    if status and rank:
        time.sleep(_PATIENCE)
    if status:
        raise RuntimeError(f"rank {rank} ended with {status}")


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("", 0))
        port: int = place.getsockname()[1]
        return port


def exit_code(failure: str) -> int:
    """Give what this process ends with, as a shell would: the status of rank 0, else of the first that has said one."""
    said = {int(rank): int(status) for rank, status in _SAID.findall(failure)}
    status = said[min(said)] if said else _WORKER_LOST
    return status if status > 0 else 128 - status


def main(words: list[str]) -> int:
    """Train with as many workers as were ordered."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--resources", type=json.loads, default={}, help="of each worker, beside its GPU")
    parser.add_argument("--folder", required=True, help="on storage that all nodes share")
    parser.add_argument("--stop", type=Path, required=True, help="what the trainer looks for")
    parser.add_argument("--log", required=True)
    parser.add_argument("command", nargs="+")
    order = parser.parse_args(words)

    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    signal.signal(signal.SIGTERM, lambda *_: order.stop.touch())
    # The daemon begins anew, from the checkpoint and in its own count.
    known = inspect.signature(FailureConfig).parameters
    once = FailureConfig(**{name: 0 for name in ("max_failures", "max_preemption_failures") if name in known})
    trainer = TorchTrainer(
        train,
        train_loop_config={"command": order.command, "log": order.log},
        scaling_config=ScalingConfig(
            num_workers=order.workers, use_gpu=True, resources_per_worker=order.resources or None
        ),
        torch_config=TorchConfig(backend="gloo"),  # which takes nothing of the GPUs
        run_config=RunConfig(name=f"ray{order.stop.suffix}", storage_path=order.folder, failure_config=once),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        return exit_code(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
