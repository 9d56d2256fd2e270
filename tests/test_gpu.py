"""The sampler, in a process of its own, over the real nvidia-ml-py and our libnvidia-ml.so.1."""

from __future__ import annotations

import ctypes.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from fixtures_nvml import FakeNvml

# Answers each line of JSON, the name of what is asked and its arguments, with a line of JSON.
PROBE = """
import json, sys
from dataclasses import asdict
from structlog.testing import capture_logs
from finetuned.gpu import Sampler, summary

with capture_logs() as logs:
    sampler = Sampler.open()
    asks = {
        "why_none": lambda: sampler.why_none,
        "gpus": lambda: [asdict(gpu) for gpu in sampler.gpus],
        "sample": lambda **how: [asdict(one) for one in sampler.sample(**how)],
        "summary": lambda: summary(sampler.sample()),
        "events": lambda: [asdict(event) for event in sampler.events()],
        "logs": lambda: logs,
        "close": lambda: sampler.close(),
        "torch": lambda: "torch" in sys.modules,
    }
    for line in sys.stdin:
        name, how = json.loads(line)
        print(json.dumps(asks[name](**how)), flush=True)
"""


def at_work(trainer: int) -> dict[str, list[int]]:
    """Say that this trainer is at work on the first two GPUs."""
    return {uuid(0): [trainer], uuid(1): [trainer]}


class Probe:
    """A process with a sampler in it, asked from here."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Start it; the library that it finds is settled then."""
        path = {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROBE],
            env={**environment, **path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, what: str, **how: object) -> Any:
        """Ask, and wait for the answer."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([what, how]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


Start = Callable[[Mapping[str, str]], Probe]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a probe in the given environment; it ends with the test."""
    with ExitStack() as running:

        def start(environment: Mapping[str, str]) -> Probe:
            probe = Probe(environment)
            running.enter_context(probe.process)  # closes its stdin, which ends its loop
            return probe

        yield start


@pytest.fixture
def ask(fake_nvml: FakeNvml, start: Start) -> Callable[..., Any]:
    """Ask a sampler that sees the GPUs of `fake_nvml`; it opens at the first question."""
    probes: list[Probe] = []

    def ask(what: str, **how: object) -> Any:
        if not probes:
            probes.append(start(fake_nvml.environment()))
        return probes[0](what, **how)

    return ask


def uuid(index: int) -> str:
    """Give the UUID of a fake GPU."""
    return f"GPU-00000000-0000-0000-0000-{index:012}"


Ask = Callable[..., Any]


def test_every_field_of_a_gpu_is_in_its_documented_unit(fake_nvml: FakeNvml, ask: Ask) -> None:
    """Watts, joules, bytes, MHz, whatever NVML counts in."""
    fake_nvml.set(
        "0.name=NVIDIA H100 80GB HBM3",
        "0.memory_total=85899345920",
        "0.memory_used=19542101196",
        "0.utilization=93",
        "0.power=310400",
        "0.temperature=61",
        "0.sm_clock=1755",
        "0.memory_clock=2619",
        "0.throttle_reasons=0x25",  # idle is no throttling
    )
    assert ask("gpus") == [
        {
            "uuid": uuid(0),
            "index": 0,
            "name": "NVIDIA H100 80GB HBM3",
            "memory_total": 85899345920,
        }
    ]
    [sample] = ask("sample")
    assert sample.pop("created_at") > 1.7e9
    assert sample == {
        "uuid": uuid(0),
        "index": 0,
        "name": "NVIDIA H100 80GB HBM3",
        "utilization": 93,
        "memory_used": 19542101196,
        "memory_total": 85899345920,
        "power": 310.4,
        "energy": None,
        "temperature": 61,
        "sm_clock": 1755,
        "memory_clock": 2619,
        "throttle_reasons": ["power cap", "software thermal slowdown"],
        "trainer_memory": None,
        "ecc_errors": None,
        "remapped_rows": None,
    }
    assert ask("summary") == ("GPU 0 NVIDIA H100 80GB HBM3: 93% util, 18.2/80.0 GiB, 310 W, 61 C")
    assert ask("why_none") is None
    assert ask("logs") == []


def test_all_gpus_are_read_at_the_same_time_and_named_by_uuid(fake_nvml: FakeNvml, ask: Ask) -> None:
    """Eight GPUs give eight samples with one time stamp, and a summary of one line."""
    fake_nvml.set("gpus=8", "3.utilization=30", "7.utilization=70")
    samples = ask("sample")
    assert [sample["uuid"] for sample in samples] == [uuid(index) for index in range(8)]
    assert [sample["utilization"] for sample in samples] == [0, 0, 0, 30, 0, 0, 0, 70]
    assert len({sample["created_at"] for sample in samples}) == 1
    assert ask("summary").count("\n") == 0
    assert ask("summary").count("; ") == 7


def test_each_sample_reads_anew(fake_nvml: FakeNvml, ask: Ask) -> None:
    """What changes on the GPU changes in the next sample."""
    fake_nvml.set("0.utilization=10")
    assert ask("sample")[0]["utilization"] == 10
    fake_nvml.set("0.utilization=95")
    assert ask("sample")[0]["utilization"] == 95


def test_errors_of_the_memory_are_read_only_when_asked_for(fake_nvml: FakeNvml, ask: Ask) -> None:
    """ECC errors and remapped rows come with a deep sample alone."""
    fake_nvml.set("0.ecc_errors=2", "0.remapped_rows=3")
    [deep] = ask("sample", deep=True)
    assert (deep["ecc_errors"], deep["remapped_rows"]) == (2, 3)
    [shallow] = ask("sample")
    assert (shallow["ecc_errors"], shallow["remapped_rows"]) == (None, None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("not_supported", "Not Supported"),
        ("no_permission", "Insufficient Permissions"),
        ("unknown", "Unknown Error"),
    ],
)
def test_a_field_that_is_refused_is_none_and_said_once(fake_nvml: FakeNvml, ask: Ask, error: str, reason: str) -> None:
    """The other fields, and the other GPU, are as before; the log gets one line a GPU and field."""
    fake_nvml.set("gpus=2", f"0.power={error}", "0.utilization=50")
    for _ in range(3):
        first, second = ask("sample")
        assert first["power"] is None
        assert first["utilization"] == 50
        assert second["power"] == 70
    assert ask("logs") == [
        {
            "event": "GPU field not given",
            "log_level": "info",
            "gpu": uuid(0),
            "field": "power",
            "reason": reason,
        }
    ]
    assert ask("events") == []
    assert ask("summary").startswith("GPU 0 NVIDIA H100: 50% util, 0.0/80.0 GiB, 35 C; ")


def test_a_gpu_that_does_not_tell_its_memory_is_still_a_gpu(fake_nvml: FakeNvml, ask: Ask) -> None:
    """Boards whose GPU shares the host's memory answer so."""
    fake_nvml.set("0.memory_total=not_supported")
    assert ask("gpus")[0]["memory_total"] is None
    assert ask("summary") == "GPU 0 NVIDIA H100: 0% util, 70 W, 35 C"


def test_a_function_that_the_driver_lacks_costs_only_its_field(fake_nvml: FakeNvml, start: Start) -> None:
    """Energy, rows, processes and events are None or absent; the rest is read."""
    lacking = fake_nvml.without(
        "nvmlDeviceGetTotalEnergyConsumption",
        "nvmlDeviceGetRemappedRows",
        "nvmlDeviceGetComputeRunningProcesses_v3",
        "nvmlEventSetCreate",
    )
    fake_nvml.set("0.utilization=40", "0.energy=1000", "0.process.42=1024", "0.xid=79")
    ask = start(lacking.environment())
    for _ in range(2):
        [sample] = ask("sample", trainers=at_work(42), deep=True)
        assert sample["utilization"] == 40
        assert sample["ecc_errors"] == 0
        assert sample["energy"] is None
        assert sample["remapped_rows"] is None
        assert sample["trainer_memory"] is None
    assert ask("events") == []
    assert [(log["field"], log["reason"]) for log in ask("logs")] == [
        ("xid", "Function Not Found"),
        ("energy", "Function Not Found"),
        ("remapped_rows", "Function Not Found"),
        ("trainer_memory", "Function Not Found"),
    ]


@pytest.mark.parametrize(
    "missing",
    [
        ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetCurrentClocksEventReasons"),
        ("nvmlDeviceGetTemperature", "nvmlDeviceGetCurrentClocksThrottleReasons"),
    ],
    ids=["old driver", "new driver"],
)
def test_renamed_functions_are_found_by_either_name(
    fake_nvml: FakeNvml, start: Start, missing: tuple[str, str]
) -> None:
    """Drivers before the renaming and after the old names' end give the same fields."""
    fake_nvml.set("0.temperature=77", "0.throttle_reasons=0x40")
    ask = start(fake_nvml.without(*missing).environment())
    [sample] = ask("sample")
    assert sample["temperature"] == 77
    assert sample["throttle_reasons"] == ["hardware thermal slowdown"]
    assert ask("logs") == []


@pytest.mark.parametrize("error", ["lost", "reset_required"])
def test_a_lost_gpu_is_one_event_and_the_other_goes_on(fake_nvml: FakeNvml, ask: Ask, error: str) -> None:
    """The loss is told once; the GPU is in no later sample, even if it seems to be back."""
    fake_nvml.set("gpus=2")
    assert len(ask("sample")) == 2
    fake_nvml.set("gpus=2", f"1.utilization={error}", "0.utilization=88")
    [left] = ask("sample")
    assert (left["uuid"], left["utilization"]) == (uuid(0), 88)
    [event] = ask("events")
    assert (event["uuid"], event["kind"], event["set_aside"]) == (uuid(1), "lost", True)
    assert event["detail"].startswith("GPU 1 NVIDIA H100 does not answer any more: ")
    fake_nvml.set("gpus=2")
    assert [sample["uuid"] for sample in ask("sample")] == [uuid(0)]
    assert [gpu["uuid"] for gpu in ask("gpus")] == [uuid(0)]
    assert ask("events") == []


def test_a_gpu_that_answers_unknown_to_everything_is_lost(fake_nvml: FakeNvml, ask: Ask) -> None:
    """One unknown is a field that is not given (tested above); nothing but unknowns is a loss."""
    asked = "utilization memory_used power energy temperature sm_clock memory_clock throttle_reasons"
    assert len(ask("sample")) == 1
    fake_nvml.set(*(f"0.{field}=unknown" for field in asked.split()))
    assert ask("sample") == []
    assert [event["kind"] for event in ask("events")] == ["lost"]
    assert ask("summary") == "no GPU"


def test_a_loss_is_noticed_without_a_sample(fake_nvml: FakeNvml, ask: Ask) -> None:
    """Waiting for events notices it too, and the sample after it does not tell it again."""
    fake_nvml.set("gpus=2")
    assert ask("events") == []
    fake_nvml.set("gpus=2", "0.lost=1", "0.xid=79")
    xid, lost = ask("events")
    assert (xid["uuid"], xid["kind"], xid["xid"]) == (uuid(0), "xid", 79)
    assert (lost["uuid"], lost["kind"], lost["xid"]) == (uuid(0), "lost", None)
    assert [sample["uuid"] for sample in ask("sample")] == [uuid(1)]
    assert ask("events") == []


@pytest.mark.parametrize(("xid", "set_aside"), [(79, True), (48, True), (31, False), (45, False)])
def test_an_xid_is_one_event_of_its_gpu(fake_nvml: FakeNvml, ask: Ask, xid: int, *, set_aside: bool) -> None:
    """The GPU is still sampled; it is set aside only where the program is not to blame."""
    fake_nvml.set("gpus=2")
    assert ask("events") == []
    fake_nvml.set("gpus=2", f"1.xid={xid}")
    assert ask("events") == [
        {
            "uuid": uuid(1),
            "kind": "xid",
            "detail": f"GPU 1 NVIDIA H100 reported Xid {xid}.",
            "xid": xid,
            "set_aside": set_aside,
        }
    ]
    assert ask("events") == []
    assert len(ask("sample")) == 2


def test_a_gpu_without_events_is_read_all_the_same(fake_nvml: FakeNvml, ask: Ask) -> None:
    """Its Xids are not told, which is said once."""
    fake_nvml.set("gpus=2", "0.events=not_supported", "0.xid=79", "1.xid=79")
    assert [event["uuid"] for event in ask("events")] == [uuid(1)]
    assert len(ask("sample")) == 2
    assert [(log["gpu"], log["field"]) for log in ask("logs")] == [(uuid(0), "xid")]


def test_energy_is_what_was_used_since_the_sample_before(fake_nvml: FakeNvml, ask: Ask) -> None:
    """None at first, then the difference in joules; None when the counter began anew."""
    energies = []
    for millijoules in (5_000_000, 5_003_100, 5_003_100, 20):
        fake_nvml.set(f"0.energy={millijoules}")
        energies.append(ask("sample", trainers=at_work(42))[0]["energy"])
    assert energies == [None, pytest.approx(3.1), 0, None]


def test_energy_between_two_trainers_is_on_neithers_bill(fake_nvml: FakeNvml, ask: Ask) -> None:
    """The first sample of another trainer does not hold the idle hours before it."""
    fake_nvml.set("0.energy=1000")
    ask("sample", trainers=at_work(42))
    fake_nvml.set("0.energy=9000000")
    assert ask("sample", trainers=at_work(43))[0]["energy"] is None
    fake_nvml.set("0.energy=9001000")
    assert ask("sample", trainers=at_work(43))[0]["energy"] == 1


def test_the_trainers_memory_is_that_of_its_process(fake_nvml: FakeNvml, ask: Ask) -> None:
    """Summed over a GPU's instances; None where the process, or its share, is not to be seen."""
    fake_nvml.set(
        "gpus=2",
        "0.process.42=1000",
        "0.process.43=77",
        "0.process.42=24",
        "1.process.42=none",
    )
    first, second = ask("sample", trainers=at_work(42))
    assert (first["trainer_memory"], second["trainer_memory"]) == (1024, None)
    first, second = ask("sample", trainers=at_work(44))
    assert (first["trainer_memory"], second["trainer_memory"]) == (None, None)
    assert ask("sample")[0]["trainer_memory"] is None


def test_a_gpu_that_cannot_be_opened_does_not_hide_the_others(fake_nvml: FakeNvml, ask: Ask) -> None:
    """As in a container that was given only some of the GPUs."""
    fake_nvml.set("gpus=2", "0.handle=no_permission")
    assert [gpu["index"] for gpu in ask("gpus")] == [1]
    [log] = ask("logs")
    assert (log["event"], log["index"]) == ("GPU not usable", 0)


@pytest.mark.parametrize(
    ("scenario", "sentence"),
    [
        ("init=driver_not_loaded", "The NVIDIA driver is installed, but it is not loaded."),
        ("init=version_mismatch", "The NVIDIA driver was updated; restart the machine."),
        ("init=unknown", "NVML does not work: Unknown Error."),
        ("gpus=0", "The NVIDIA driver reports no GPU that can be used."),
    ],
)
def test_no_gpu_is_an_answer(fake_nvml: FakeNvml, ask: Ask, scenario: str, sentence: str) -> None:
    """There is a sentence to say, and everything else gives nothing without an error."""
    fake_nvml.set(scenario)
    assert_none(ask, sentence)


def test_no_library_is_an_answer(start: Start, tmp_path: Path) -> None:
    """The most usual machine of all: no NVIDIA driver. Nor does looking for one import torch."""
    if ctypes.util.find_library("nvidia-ml"):
        pytest.skip("this machine has an NVIDIA driver")
    ask = start({**os.environ, "LD_LIBRARY_PATH": str(tmp_path)})
    assert_none(ask, "No NVIDIA driver is installed (no libnvidia-ml.so.1).")
    assert ask("torch") is False


def assert_none(ask: Ask, sentence: str) -> None:
    """Check that a sampler gives no GPU and the sentence."""
    assert ask("why_none") == sentence
    assert ask("gpus") == []
    assert ask("sample", trainers=at_work(1), deep=True) == []
    assert ask("events") == []
    assert ask("summary") == "no GPU"
    assert ask("close") is None


def test_closing_twice_is_harmless(ask: Ask) -> None:
    """And a closed sampler has nothing to tell."""
    assert len(ask("sample")) == 1
    assert ask("close") is None
    assert ask("close") is None
    assert ask("sample") == []
    assert ask("events") == []
