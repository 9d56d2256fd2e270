"""What a daemon is given to do in the crash model: every path that a file can take."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from crash_bench import NOW, Bench, State
from crash_model import OVERRIDE, REASON, UNWRITABLE, BrokenError, Daemon, Scenario, content, disk, explore, held_out_of
from finetuned.jobs import Job
from finetuned.spool.claim import claim
from finetuned.spool.inbox import Found, list_inbox


def dropped(
    *names: str, override: bool = False, held_out: bool = False, linked: bool = False
) -> Callable[[Bench], State]:
    """Files lie in the inbox."""
    treasures = {OVERRIDE} if override else set()
    if linked:
        treasures |= {content(name) for name in (*names, *(map(held_out_of, names) if held_out else ()))}
    here = disk(*names, override=override, held_out=held_out, linked=linked)
    return lambda _: State(here.copy(), treasures=frozenset(treasures))


def after(begin: Callable[[Bench], State], do: Callable[[Daemon], None], *orders: str) -> Callable[[Bench], State]:
    """A daemon has done this, the machine was idle for a while, and users gave orders for the last job."""

    def state(bench: Bench) -> State:
        bench.lay(begin(bench))
        with bench.watching(lambda: None):
            do(Daemon(bench, Scenario("before", begin)))
        here = bench.here("")
        last = str(here.rows[-1][0])
        given = tuple((n, NOW, verb, last, "") for n, verb in enumerate(orders, start=1))
        return replace(here, disk=here.disk.settle(), orders=given, story=())

    return state


def queue(daemon: Daemon) -> None:
    for found in list_inbox(daemon.home.inbox, ()):
        assert isinstance(found, Found)
        daemon.queue(claim(daemon.ledger, daemon.home, found, daemon.scenario.config))


def train_and_drop_again(daemon: Daemon) -> None:
    daemon.live()
    for name in ("x.eval.jsonl", "x.jsonl"):
        path = daemon.home.inbox / name
        path.write_bytes(content(name))
        os.utime(path, ns=(0, 10**18))


def fail_with(reason: dict[str, str]) -> Callable[[Daemon], None]:
    def do(daemon: Daemon) -> None:
        daemon.scenario = replace(daemon.scenario, fails=always(reason))
        daemon.live()

    return do


def always(reason: dict[str, str]) -> Callable[[Job], dict[str, str]]:
    return lambda _: reason


MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # nothing has to be really durable here
TWO_DEEP = {"success", "failure", "cancel", "retry fails"}  # where `make test` crashes during the recovery too
ONE = dropped("x.jsonl", override=True)
PAIR = dropped("x.jsonl", override=True, held_out=True)
SCENARIOS = [
    Scenario("success", ONE),
    Scenario("failure", ONE, always(REASON), ("failed",)),
    Scenario("hard link", dropped("x.jsonl", override=True, linked=True)),
    Scenario("cannot publish", ONE, always(UNWRITABLE), ("failed",), ("succeeded",)),
    Scenario("cancel", after(ONE, queue, "cancel"), outcomes=("cancelled",)),
    Scenario("retry", after(ONE, fail_with(REASON), "retry")),
    Scenario("retry fails", after(ONE, fail_with(REASON), "retry"), always(REASON), ("failed",)),
    Scenario(
        "retry of kept", after(ONE, fail_with(UNWRITABLE), "retry"), always(UNWRITABLE), ("failed",), ("succeeded",)
    ),
    Scenario("turn", after(dropped("x.jsonl", "y.jsonl"), queue, "first"), outcomes=("succeeded", "succeeded")),
    Scenario("pause", after(dropped("x.jsonl"), queue, "pause", "resume")),
    Scenario("held out", PAIR),
    Scenario("held out, failure", PAIR, always(REASON), ("failed",)),
    Scenario("held out, hard link", dropped("x.jsonl", held_out=True, linked=True)),
    Scenario("held out, cancel", after(PAIR, queue, "cancel"), outcomes=("cancelled",)),
    Scenario("held out, retry", after(PAIR, fail_with(REASON), "retry")),
    Scenario("held out, ledger lost", PAIR, ledger_lost=True),
    Scenario("held out, failure, ledger lost", PAIR, always(REASON), ("failed",), ledger_lost=True),
    Scenario("held out, retry, ledger lost", after(PAIR, fail_with(REASON), "retry"), ledger_lost=True),
    Scenario(
        "held out, duplicate, ledger lost",
        after(dropped("x.jsonl", held_out=True), train_and_drop_again),
        outcomes=("succeeded", "succeeded"),
        ledger_lost=True,
    ),
    Scenario("success, ledger lost", ONE, ledger_lost=True),
    Scenario("failure, ledger lost", ONE, always(REASON), ("failed",), ledger_lost=True),
    Scenario("retry, ledger lost", after(ONE, fail_with(REASON), "retry"), ledger_lost=True),
]


def until_broken() -> None:
    """Look for a crash that breaks the promise, the quick scenarios first; print it in one line and exit with 1."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        bench = Bench(Path(folder).resolve())
        with bench.world():
            for crashes in (0, 1, 2):
                for scenario in SCENARIOS if crashes < 2 else [one for one in SCENARIOS if one.name in TWO_DEEP]:
                    try:
                        explore(bench, scenario, crashes=crashes)
                    except BrokenError as error:
                        what = str(error).rpartition("\n")[2]
                        crash = [line[3:] for line in str(error).splitlines() if line.startswith("-- ")]
                        sys.stdout.write(f"{scenario.name}, {', then '.join(crash) or 'no crash'}: {what[:100]}")
                        sys.exit(1)
