"""What the scheduler is told of GPUs."""

from __future__ import annotations

from types import SimpleNamespace

from conftest import make_home
from finetuned.config import Config
from finetuned.fleet import Fleet
from finetuned.gpu import Gpu

GIB = 2**30


def test_what_others_hold_is_remembered_while_the_part_of_a_trainer_is_not_to_be_seen(tmp_path, monkeypatch):
    """As in the seconds in which it loads its libraries, and in a container always."""
    monkeypatch.setattr("finetuned.fleet._LOOK_EVERY", 0.0)
    found = {"GPU-0": 30 * GIB}
    sampler = SimpleNamespace(
        gpus=[Gpu(uuid="GPU-0", index=0, name="H100", memory_total=80 * GIB)],
        memory_of_others=lambda _: found,
        lost=lambda _: False,
    )
    config = Config(share_gpus=True, gpu_busy_gib=40)
    fleet = Fleet(make_home(tmp_path / "base"), sampler)

    def others(trainers: dict[str, list[int]]) -> int:
        fleet.look(config, trainers)
        [device] = fleet.devices(config, trainers)
        return device.others

    assert others({}) == 30 * GIB
    found.clear()
    assert others({"GPU-0": [123]}) == 30 * GIB
    found["GPU-0"] = 20 * GIB
    assert others({"GPU-0": [123]}) == 20 * GIB
