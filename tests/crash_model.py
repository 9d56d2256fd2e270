"""What a daemon is given to do while it is killed, what it does from its start to its end, and what must hold."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from safetensors.numpy import save

from crash_bench import NOW, Bench, State
from crash_disk import Disk, Tree
from finetuned.closer import Closer
from finetuned.config import Config
from finetuned.durable import make_folder, sync_tree, write_file
from finetuned.hold import Hold
from finetuned.intake import Intake
from finetuned.jobs import Job
from finetuned.jobs import State as Step
from finetuned.service import Service
from finetuned.spool.claim import claim, files_to_hash, fingerprint, input_path, write_spec
from finetuned.spool.inbox import Found, list_inbox
from finetuned.spool.publish import published
from finetuned.spool.recover import recover

REASON = {"code": "bad_data", "what": "it broke", "where": "x.jsonl:3", "remedy": "Mend it."}
UNWRITABLE = {"code": "cannot_publish", "what": "no right to", "where": "adapters", "remedy": "Mend the folder."}
WEIGHTS = save({"lora_A": np.zeros((1, 1), np.float32)})
CHECKPOINT, OVERRIDE = b"hours of work", b'{"epochs": 1}'
NAMES = ("x.jsonl", "x.json", "fast/x.jsonl", "y.jsonl")  # fast is a profile
FOLDERS = ("inbox", "adapters", "archive", "archive/failed", ".finetuned", ".finetuned/jobs")


@dataclass(frozen=True)
class Scenario:
    """`begin` gives the state in which the daemon is started. `fails` says why each job ends as it does."""

    name: str
    begin: Callable[[Bench], State]
    fails: Callable[[Job], dict[str, str] | None] = lambda _: None
    outcomes: tuple[str, ...] = ("succeeded",)  # of the jobs, in the order of their rows
    or_else: tuple[str, ...] = ()  # a crash may come at a better moment
    ledger_lost: bool = False
    config: Config = Config()  # noqa: RUF009, it is never changed


def content(name: str) -> bytes:
    """Give a file's content; no two names have the same."""
    return f'{{"messages": [{{"role": "assistant", "content": "{name}"}}]}}\n'.encode()


def held_out_of(name: str) -> str:
    """Give the name of a file's held-out file."""
    return f"{name.partition('.')[0]}.eval.jsonl"


def disk(*names: str, override: bool = False, held_out: bool = False, linked: bool = False) -> Disk:
    """Give a disk with these files in the inbox, perhaps with a held-out file beside each: their names are sure, the
    content of those that are not copied yet is not: uploaders do not fsync.
    """
    if held_out:
        names = (*names, *map(held_out_of, names))
    made = Disk()
    for folder in (*FOLDERS, *sorted({f"inbox/{name}".rpartition("/")[0] for name in names} - {"inbox"})):
        made.make(folder, None)
    for name in names:
        made.make(f"inbox/{name}", b"")
    if override:
        made.make("inbox/x.config.json", OVERRIDE)
        made.sync(made.find("inbox/x.config.json") or 0)
    for name in names if linked else ():
        made.link(f"inbox/{name}", f"elsewhere-{name}")
    made.settle()
    for name in names:
        node = made.find(f"inbox/{name}") or 0
        made.write(node, content(name))
        if linked:
            made.sync(node)
    return made


class Daemon:
    """What a daemon does from its start until nothing is left to do, without its waiting."""

    def __init__(self, bench: Bench, scenario: Scenario) -> None:
        self.bench, self.scenario = bench, scenario
        self.ledger, self.home = bench.ledger, bench.home
        self.closer = Closer(self.ledger, self.home, Hold(self.home))
        nobody = threading.Event()
        self.intake = Intake(self.ledger, self.home, Hold(self.home), self.closer, hints=nobody, wake=nobody.set)
        self.service = Service.__new__(Service)
        self.service.__dict__ |= {
            "_home": self.home,
            "_ledger": self.ledger,
            "_config": scenario.config,
            "_crew": SimpleNamespace(attempts=[], find=lambda _: None),
            "_closer": self.closer,
        }

    def live(self) -> None:
        self._recover()
        after = (self.bench.rows(), self.bench.tree())
        self._recover()
        assert (self.bench.rows(), self.bench.tree()) == after, "recovery does not come to rest"
        self.service._obey()
        for found in list(list_inbox(self.home.inbox, self.scenario.config.profiles)):
            assert isinstance(found, Found), found
            job = claim(self.ledger, self.home, found, self.scenario.config)
            if job.reason:
                self.closer.fail(job)
        for job in self.ledger.jobs(Step.CLAIMING):
            self.queue(job)
        while not self.service._paused() and (waiting := self.ledger.may_start(NOW, limit=1)):
            [queued] = waiting
            job = self.ledger.update(queued.id, state=Step.RUNNING, attempt=queued.attempt + 1, started_at=NOW)
            write_spec(self.home, job)
            self._attempt(job)

    def queue(self, job: Job) -> None:
        files = files_to_hash(self.home, job)
        hashed = [fingerprint(path) for path in files]
        assert None not in hashed
        self.intake.queue(self.scenario.config, job, *(found[1] for found in hashed if found))
        for path in files:
            self._keep(path)

    def _recover(self) -> None:
        recover(self.ledger, self.home, stop_orphan=lambda job: None)

    def _keep(self, path: Path) -> None:
        """From now on this content may not be lost."""
        if path.exists():
            self.bench.treasures |= {path.read_bytes()}

    def _attempt(self, job: Job) -> None:
        """Do as a trainer does: a whole checkpoint, then an adapter whose manifest comes when all else is durable."""
        folder = self.home.job(job.id)
        assert input_path(self.home, job).exists(), "the job has no input"
        held_out = json.loads(folder.spec.read_bytes())["held_out"]
        assert held_out is None or (folder.path / held_out).exists(), "the job has no held-out file"
        assert not published(self.home, job), "trained again although its adapter is published"
        if not (folder.checkpoints / "step-1").exists():
            make_folder(folder.checkpoints)
            write_file(folder.checkpoints / "step-1", CHECKPOINT + job.id.encode())
            self._keep(folder.checkpoints / "step-1")
        reason = self.scenario.fails(job)
        if reason is None or reason is UNWRITABLE:
            staged = folder.staged_adapter(job.attempt)
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            (staged / "adapter_model.safetensors").write_bytes(WEIGHTS)
            sync_tree(staged)
            unsure = staged / ".finetuned.json.tmp"
            unsure.write_text(json.dumps({"job_id": job.id, "sha256": job.sha256}))
            unsure.rename(staged / "finetuned.json")
        if reason is None:
            self.closer.publish(job)
        else:
            self.closer.fail(job, reason)


# -- what must hold


def check_crash(bench: Bench, state: State) -> None:
    """Look at what a crash left, before anything is put right."""
    tree = state.disk.tree()
    _check_adapters(tree)
    rows = [dict(zip(bench.columns, row, strict=True)) for row in state.rows]
    for row in rows:
        if row["state"] == "trained" or row["outcome"] == "succeeded":
            assert f"adapters/{row['adapter']}/finetuned.json" in tree, f"{row['id']} has lost its adapter"
    done = {row["id"].encode() for row in rows if row["outcome"] == "succeeded" or row["state"] == "trained"}
    there = {here for path, here in tree.items() if not path.startswith("elsewhere")}
    for treasure in state.treasures - there:
        spent = treasure.startswith(CHECKPOINT) and (
            treasure.removeprefix(CHECKPOINT) in done or _published(tree, treasure.removeprefix(CHECKPOINT))
        )
        assert spent, f"{treasure!r} is lost"


def _check_adapters(tree: Tree) -> None:
    for path, here in tree.items():
        if path.startswith("adapters/") and path.count("/") == 1 and here is None:
            files = {name.rpartition("/")[2]: tree[name] for name in tree if name.startswith(f"{path}/")}
            assert files.get("adapter_model.safetensors") == WEIGHTS, f"{path} is half an adapter: {sorted(files)}"
            assert files.get("finetuned.json"), f"{path} is half an adapter: {sorted(files)}"


def _published(tree: Tree, job_id: bytes) -> bool:
    return any(
        path.startswith("adapters/") and path.endswith("/finetuned.json") and job_id in (here or b"")
        for path, here in tree.items()
    )


def check_end(bench: Bench, scenario: Scenario, begun: State) -> None:
    """Look at what is left when nothing is left to do."""
    tree, rows = bench.tree(), bench.rows()
    _check_adapters(tree)
    left = [path for path in tree if path.startswith(("inbox/", ".finetuned/jobs/")) and path != "inbox/fast"]
    assert not left, f"left behind: {left}"
    if not scenario.ledger_lost:
        outcomes = sorted(row["outcome"] for row in rows)
        assert outcomes in [sorted(scenario.outcomes), sorted(scenario.or_else)], f"ended as {outcomes}"
    with_held_out = any(path.endswith(".eval.jsonl") for path in begun.disk.tree())
    inputs = [path for path in tree if path.startswith("archive/") and path.rpartition("/")[2] in NAMES]
    dropped = len(scenario.outcomes)
    assert len(inputs) == dropped, f"{dropped} files became {inputs}"
    for row in rows:
        assert row["state"] == "finished", row["state"]
        assert row["sha256"] or row["reason"]
        name = row["name"].decode()
        folder = "archive/failed" if row["outcome"] != "succeeded" else "archive/2027-01"
        archived = tree.get(f"{folder}/{row['id']}/{name}")
        assert archived is not None, f"{name} is not in {folder}"
        assert row["sha256"] in {None, hashlib.sha256(archived).hexdigest()}, f"{name} is not what was hashed"
        if with_held_out:
            beside = [path for path in tree if path.endswith(f"/{held_out_of(name)}") and row["id"] in path]
            assert beside == [f"{folder}/{row['id']}/{held_out_of(name)}"], f"held out from {name}: {beside}"
            digest = hashlib.sha256(tree[beside[0]] or b"").hexdigest()
            assert row["held_out_sha256"] in {None, digest}, "the held-out file is not what was hashed"
            assert row["held_out"] == held_out_of(name).encode()
            assert row["held_out_sha256"] or row["reason"]
        story = "reason.json" if row["outcome"] != "succeeded" else "job.json"
        assert json.loads(tree[f"{folder}/{row['id']}/{story}"])["job_id"] == row["id"]
        manifest = tree.get(f"adapters/{row['adapter']}/finetuned.json")
        if row["outcome"] == "succeeded":
            assert json.loads(manifest or b"{}").get("job_id") in {row["id"], row["duplicate_of"]}
        if OVERRIDE in begun.treasures and name == "x.jsonl":
            assert tree.get(f"{folder}/{row['id']}/overrides.json") == OVERRIDE, "the override is not beside its file"
            assert row["reason"] or json.loads(row["settings"])["epochs"] == 1, "trained with other settings"
    manifests = [tree[path] for path in tree if path.startswith("adapters/") and path.endswith("finetuned.json")]
    owners = [json.loads(manifest or b"{}")["job_id"] for manifest in manifests]
    assert len(owners) == len(set(owners)), f"a job has two adapters: {owners}"
    succeeded = max(ends.count("succeeded") for ends in (scenario.outcomes, scenario.or_else))
    assert len(owners) <= succeeded, f"{len(owners)} adapters of {succeeded} jobs"
    check_crash(bench, replace(begun, disk=_settled(tree), rows=tuple(tuple(r.values()) for r in rows)))


def _settled(tree: Tree) -> Disk:
    made = Disk()
    for path in sorted(tree):
        made.make(path, tree[path])
    return made


# -- all crashes


class BrokenError(AssertionError):
    """The promise is not kept; tells how it came to it."""


def run(bench: Bench, scenario: Scenario, state: State, crash: Callable[[], None] | None = None) -> None:
    """Let a daemon live from this state to its end, and check that. `crash` is called wherever it might die."""
    bench.lay(state)
    try:
        if crash is None:
            Daemon(bench, scenario).live()
        else:
            with bench.watching(crash):
                Daemon(bench, scenario).live()
        check_end(bench, scenario, replace(state, treasures=bench.treasures))
    except BrokenError:
        raise
    except Exception as error:
        raise BrokenError("\n".join([scenario.name, *bench.story, f"{type(error).__name__}: {error}"])) from error


def explore(bench: Bench, scenario: Scenario, *, crashes: int, every: int = 1) -> int:
    """Crash at every moment, at every moment of the recovery, ... so many deep. Gives the number of states.

    Of the states after a crash one in `every` is crashed again; all others are let come to their end.
    """
    begun = scenario.begin(bench)
    known: set[object] = {hash(begun.key())}
    waiting = deque([(begun, 0)])
    numbers = itertools.count()
    while waiting:
        state, deep = waiting.popleft()
        if deep == crashes or (deep and next(numbers) % every):
            run(bench, scenario, state)
            continue
        for found in _crashes_of(bench, scenario, state, known):
            waiting.append((found, deep + 1))
    return len(known)


def _crashes_of(bench: Bench, scenario: Scenario, state: State, known: set[object]) -> Iterator[State]:
    found: list[State] = []

    def crash() -> None:
        for after in bench.crashes(ledger_lost=scenario.ledger_lost):
            key = hash(after.key())
            if key in known:
                continue
            known.add(key)
            try:
                check_crash(bench, after)
            except AssertionError as error:
                raise BrokenError("\n".join([scenario.name, *after.story, str(error)])) from error
            found.append(after)

    run(bench, scenario, state, crash)
    yield from found
