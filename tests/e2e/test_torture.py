"""Killed at random moments, and nothing lost, doubled or torn. `make torture` does much more of it."""

from __future__ import annotations

import os
import random
import signal
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from conftest import Daemon, chat_rows, eventually, make_home, write_config, write_jsonl
from finetuned.jobs import Outcome, State
from torture import torture

LONG = {"epochs": 30, "checkpoint_steps": 10, "lora_r": 4}  # 180 steps, some seconds


def test_kills_and_orders_at_random_lose_double_and_tear_nothing(tmp_path, standin):
    standin(seconds=0.03)
    seed = random.randrange(10**6)
    found = torture(tmp_path / "base", kills=8, seed=seed)
    assert (found.lost, found.duplicated, found.torn, found.faults) == (0, 0, 0, []), f"seed {seed}"
    assert found.dropped


def has_done(daemon: Daemon, steps: int) -> bool:
    return any(job.progress.get("step", 0) >= steps for job in daemon.jobs())


@pytest.fixture
def trained(tmp_path, tiny_model):
    """Train the same file in a base directory of its own, killing whom `kills` names, each at a random step."""

    def train(name: str, *kills: str):
        home = make_home(tmp_path / name)
        write_config(home, model=str(tiny_model), **LONG)
        write_jsonl(home.root / "staged", chat_rows(24)).rename(home.inbox / "x.jsonl")
        daemon = Daemon(home)
        try:
            done = 0
            for whom in kills:
                done += random.randint(5, 40)
                eventually(partial(has_done, daemon, done))
                trainer = daemon.job("x.jsonl", state=State.RUNNING).trainer_pid
                if "daemon" in whom:
                    daemon.stop(signal.SIGKILL)
                if "trainer" in whom:
                    os.kill(trainer, signal.SIGKILL)
                daemon = daemon if daemon.process.poll() is None else Daemon(home)
            job = daemon.job("x.jsonl")
        finally:
            daemon.stop()
        assert job.outcome is Outcome.SUCCEEDED, job.reason
        assert (job.attempt > 1) == bool(kills)
        return load_file(home.adapters / "x" / "adapter_model.safetensors")

    return train


def test_a_real_training_that_is_killed_again_and_again_gives_the_same_weights(trained):
    undisturbed = trained("undisturbed")
    killed = trained("killed", "trainer", "daemon and trainer", "daemon")
    assert undisturbed.keys() == killed.keys()
    for name, weights in undisturbed.items():
        torch.testing.assert_close(killed[name], weights, rtol=1e-5, atol=1e-5, msg=name)
