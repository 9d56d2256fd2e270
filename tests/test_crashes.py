"""The real spool code, stopped by kill -9 or power loss after every single change that it makes to the disk."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crash_bench import Bench, State
from crash_model import NAMES, REASON, Scenario, check_crash, explore, run
from crash_scenarios import MEMORY, SCENARIOS, TWO_DEEP, dropped
from finetuned.config import Config
from finetuned.jobs import Job
from mutants import MUTANTS, caught

EVERY = int(os.environ.get("FINETUNED_CRASHES", "4"))  # of recoveries, one in so many is crashed too; make crashes: all
STATES = 5000  # at the least


@pytest.fixture
def bench() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        bench = Bench(Path(folder).resolve())
        with bench.world():
            yield bench
        bench.close()


def test_whatever_crash_comes_to_one_file_nothing_is_lost_torn_or_there_twice(bench):
    counts = {one.name: explore(bench, one, crashes=1 + (one.name in TWO_DEEP), every=EVERY) for one in SCENARIOS}
    total = sum(counts.values())
    sys.stdout.write(f"{total} states: {counts}\n")
    assert total >= STATES


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.sampled_from(NAMES), min_size=2, max_size=3, unique=True),
    failing=st.sets(st.sampled_from(NAMES)),
    crashes=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 10**6)), min_size=1, max_size=3),
)
def test_several_files_of_one_name_come_through_any_crashes(bench, names, failing, crashes):
    def fails(job: Job) -> dict[str, str] | None:
        return REASON if str(Path(job.profile, job.name.decode())) in failing else None

    outcomes = tuple("failed" if name in failing else "succeeded" for name in names)
    config = Config(profiles={"fast": {}})
    scenario = Scenario(" ".join(names), dropped(*names), fails, outcomes, config=config)
    state = scenario.begin(bench)
    for at, which in crashes:
        state = crashed(bench, scenario, state, at, which)
    run(bench, scenario, state)


def crashed(bench: Bench, scenario: Scenario, state: State, at: int, which: int) -> State:
    """Crash after so many changes, in one of the ways in which that may end."""
    found = [state]
    moments = itertools.count()

    def crash() -> None:
        if next(moments) == at:
            ways = list(bench.crashes())
            found.append(ways[which % len(ways)])
            check_crash(bench, found[-1])

    run(bench, scenario, state, crash)
    return found[-1]


@pytest.mark.parametrize("name", ["synchronous=NORMAL", "D10 before D9", "R3 before R1"])
def test_the_model_catches_what_is_broken(name):
    """All of the list: make mutants."""
    [mutant] = [mutant for mutant in MUTANTS if mutant.name == name]
    assert caught(mutant)
