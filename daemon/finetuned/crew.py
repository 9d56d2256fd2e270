"""The attempts under way: started where the scheduler says, tended until they end, stopped when they must be."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import structlog

from finetuned import gpu
from finetuned.attempts import began, ended
from finetuned.closer import Closer
from finetuned.config import WHERE, Config
from finetuned.engines import Engines
from finetuned.errors import ConfigError, FinetunedError
from finetuned.events import Ending, Event, EventType, ExitCode
from finetuned.fleet import Fleet
from finetuned.foresight import Foresight
from finetuned.guard import check_place
from finetuned.hold import Hold
from finetuned.home import Home, printable
from finetuned.jobs import Job, State
from finetuned.launchers import Needs, Start
from finetuned.launchers.local import start, trainer_environment
from finetuned.launchers.warm import WarmParent
from finetuned.ledger import Ledger
from finetuned.lifesigns import boot_id
from finetuned.live import sentence_of_all
from finetuned.preview import Preview
from finetuned.pulse import no_room
from finetuned.scheduler import CPU, LOCAL, Device, Wish, Work, schedule
from finetuned.sharding import may_be_sharded
from finetuned.spool.claim import settle_duplicate, write_spec
from finetuned.supervisor import Attempt
from finetuned.tidy import keep_ends, release

_GPU_LINE_SECONDS = 60.0
_DECIDE_EVERY = 1.0  # seconds, while jobs run and nothing happens to them
_FIRST_REFUSAL, _LAST_REFUSAL = 60.0, 1800.0  # seconds until its engine is asked again to take a job; doubled
_LOOKED_AT = 50  # waiting jobs that are looked at for a place, from the first

_UNDER_WAY = frozenset({State.QUEUED, State.RUNNING})

_log = structlog.get_logger()


class Crew:
    """The trainers of one base directory."""

    def __init__(
        self, ledger: Ledger, home: Home, hold: Hold, closer: Closer, gpus: gpu.Sampler, *, wake: Callable[[], None]
    ) -> None:
        """Begin with none; `wake` asks the daemon's loop for another round at once."""
        self._ledger, self._home, self._hold, self._closer = ledger, home, hold, closer
        self._gpus, self._wake = gpus, wake
        self.fleet = Fleet(home, gpus)
        self.attempts: list[Attempt] = []
        self._engines = Engines(home)
        self._foresight = Foresight(home, wake=wake)
        self._preview = Preview(home, wake=wake)
        self._warm = WarmParent()
        # The jobs whose trainers could not be started, with events and changes, until the ledger has them.
        self._never_began: list[tuple[Job, list[Event], dict[str, Any]]] = []
        self._next_decision = 0.0
        self._next_sample = self._next_gpu_line = self._next_deep_sample = 0.0

    def find(self, job_id: str) -> Attempt | None:
        """Give the attempt at a job that is under way."""
        return next((attempt for attempt in self.attempts if attempt.job.id == job_id), None)

    # -- the steps of the loop

    def start_next(self, config: Config) -> None:
        """Start the jobs whose turn it is (D6, D7)."""
        now = time.monotonic()
        if self.attempts and now < self._next_decision:
            return
        self._next_decision = now + _DECIDE_EVERY
        queue = self._first_in_turn()
        if not queue:
            self.fleet.rest(config)
            return
        jobs = {job.id: job for job in queue}
        good = [job for job in queue if not self._refused(config, job)]
        queue = [job for job in good if not self._unanswered(config, job)]
        at_work = self._at_work()
        self.fleet.look(config, at_work)
        self._heed_gpus(config)
        if self.fleet.none_left(config):
            queue = self._for_elsewhere(queue)
        devices = self.fleet.devices(config, at_work)
        work = [self._work(config, attempt.job) for attempt in self.attempts]
        decided = schedule(
            (self._wish(config, job, devices) for job in queue),
            devices=devices,
            work=work,
            most_elsewhere=config.remote_jobs,
        )
        for job_id, places in decided.starts.items():
            if self._hold.resting:
                return
            if self._unanswered(config, jobs[job_id]):  # since the one before it
                continue
            job = settle_duplicate(self._ledger, self._home, config, jobs[job_id])
            if job.state is State.QUEUED:
                self._start(config, job, [device for device in devices if device.id in places])
            else:
                self._closer.finish_untrained(job)
                self._wake()
        self._foresight.forget(but=[*jobs.values(), *(attempt.job for attempt in self.attempts)])
        for job in queue:
            if job.id not in decided.starts:
                self._note_wait(job, decided.waits.get(job.id, ""))
        self._look_at([job for job in good if job.id not in decided.starts])

    def tend(self, config: Config, *, hurry: bool) -> None:
        """Record what the trainers say; where one has ended, do what follows. `hurry` kills those on this machine."""
        for attempt in self.here if hurry else ():
            attempt.hurry()
        for attempt in list(self.attempts):
            try:
                self._tend(config, attempt)
            except (sqlite3.OperationalError, OSError) as error:  # of one job's folder: others go on
                self._hold.begin(error, doing=f"tending {attempt.job.id}")

    def sample(self, config: Config) -> None:
        """Read the GPUs while jobs run: into the ledger, and a line a minute."""
        now = time.monotonic()
        if not self.attempts or now < self._next_sample:
            return
        self._next_sample = now + config.gpu_sample_seconds
        deep = now >= self._next_deep_sample
        if deep:
            self._next_deep_sample = now + _GPU_LINE_SECONDS
        here = [(attempt, attempt.trainer.pid) for attempt in self.attempts if attempt.trainer.pid is not None]
        on = {
            one.uuid: [pid for attempt, pid in here if self.fleet.serves(one.uuid, _visible(attempt.job))]
            for one in self._gpus.gpus
        }
        samples = self._gpus.sample(on, deep=deep)
        self._heed_gpus(config)
        for attempt, pid in here:
            its = [sample for sample in samples if pid in on[sample.uuid]]
            self._ledger.record_gpu(attempt.job.id, [(one.created_at, one.uuid, asdict(one)) for one in its])
        if now >= self._next_gpu_line and samples and here:
            self._next_gpu_line = now + _GPU_LINE_SECONDS
            _log.info("GPU", jobs=", ".join(attempt.job.id for attempt, _ in here), reading=gpu.summary(samples))

    def stop(self, seconds: float) -> None:
        """Ask all trainers for a checkpoint and an end; after so many seconds they are killed."""
        for attempt in self.attempts:
            attempt.stop(seconds)

    @property
    def here(self) -> list[Attempt]:
        """The attempts on this machine. Those elsewhere go on without a daemon, and the next one finds them."""
        return [attempt for attempt in self.attempts if attempt.job.launcher == LOCAL]

    def warm_up(self, config: Config) -> None:
        """Have a parent for trainers to be forked from, or none, as config.json says."""
        if config.warm_trainer:
            self._warm.open(trainer_environment(*self.fleet.uuids[:1])[0])
        else:
            self._warm.close()

    def listen(self) -> None:
        """Hear what the warm parent says of itself."""
        self._warm.listen()

    def close(self) -> None:
        """End what helps to start trainers; they themselves go on."""
        self._warm.close()

    # -- after a crash, or a full disk

    def adopt(self, config: Config, job: Job) -> bool:
        """Go on with a job whose daemon went down, if its trainer did not, or said how it ended."""
        if self.find(job.id) is not None:  # on a second try
            return True
        if (name := job.launcher) == LOCAL:
            attempt = Attempt.adopt(self._ledger, self._home, job, stop_seconds=config.stop_seconds)
        else:
            attempt = Attempt.find(self._ledger, self._home, job, self._engines.launcher(name, config))
        if attempt is not None:
            self.attempts.append(attempt)
        return attempt is not None

    def queue_again(self) -> None:
        """Put jobs back whose trainers never began, so that nothing was interrupted. Once there is room for that."""
        while self._never_began:
            job, events, changes = self._never_began[0]
            if self._ledger.job(job.id).state in _UNDER_WAY:  # else a user has cancelled it meanwhile
                self._ledger.record(job.id, events, offset=job.events_offset, state=State.QUEUED, **changes)
            self._never_began.pop(0)

    # -- what is said of it

    def doing(self) -> str:
        """Say in a sentence what is going on: one job with its step and the time that is left, of many the first."""
        return sentence_of_all([(one.job.id, one.stopping, one.job.progress) for one in self.attempts])

    # -- inside

    def _start(self, config: Config, job: Job, devices: list[Device]) -> None:
        environment, why = trainer_environment(*(device.id for device in devices if device.id != CPU))
        if (name := job.launcher) != LOCAL:
            why = f"with {name}"
        again = job.progress.get("unsent")  # the same attempt, which its engine has not taken yet
        try:
            check_place(self._home.adapters)
            following = job if again is not None else replace(job, attempt=job.attempt + 1)
            told_apart = name == LOCAL and self.fleet.count(config)
            processes = len(devices) if told_apart else _wanted(job)
            forecast = self._foresight.of(job)
            large = forecast is not None and forecast.spread > 1
            # A rung of 4-bit weights, which cannot be spread, may fit on one GPU, which is why it was taken.
            sharded = large and processes > 1 and bool(told_apart) and _may_be_sharded(job)
            write_spec(self._home, following, processes=processes, sharded=sharded)
            progress = {key: value for key, value in job.progress.items() if key not in {"waits_for", "unsent"}}
            progress |= {"gpu": environment.get("CUDA_VISIBLE_DEVICES", ""), "devices": [one.id for one in devices]}
            progress |= {"processes": processes, "sharded": sharded}
            job = self._ledger.record(
                job.id,
                [began(following, at=time.time(), on=why)] if again is None else [],
                offset=job.events_offset,
                state=State.RUNNING,
                attempt=following.attempt,
                boot_id=boot_id(),
                trainer_id="",  # an earlier attempt's would mislead the next daemon, should this one die now
                started_at=job.started_at or time.time(),
                progress=progress,
            )
            how: Start = self._warm.start if config.warm_trainer else start
            if name != LOCAL:
                needs = Needs(job.id, job.attempt, gpus=_wanted(job))
                how = partial(self._engines.launcher(name, config).start, needs=needs)
            attempt = Attempt.launch(self._ledger, self._home, job, start=how, environment=environment)
        except FinetunedError as error:
            self._closer.fail(job, error.as_dict())
        except (sqlite3.OperationalError, OSError) as error:
            wait = 0.0
            if name == LOCAL or no_room(error) or isinstance(error, sqlite3.Error):
                self._hold.begin(error, doing=f"starting {job.id}")
            elif isinstance(error, (ConnectionError, TimeoutError)):
                self._engines.failed(name, error)
            else:  # it is about this job alone
                wait = min(2 * again if again else _FIRST_REFUSAL, _LAST_REFUSAL)
            self._put_back(job, error, wait=wait, again=again)
        else:
            self.attempts.append(attempt)
            who = {"pid": attempt.trainer.pid} if name == LOCAL else {"id": attempt.trainer.id}
            _log.info("training starts", job=job.id, attempt=job.attempt, **who, where=why)
            self._next_decision = 0.0
            if attempt.trainer.id:  # else it is still being asked
                self._engines.answered(name)
                if again is not None:
                    taken = Event(time.time(), EventType.MESSAGE, f"{name} takes it now")
                    with suppress(sqlite3.OperationalError):
                        self._ledger.record(job.id, [taken], offset=job.events_offset)
        self._next_sample = self._next_gpu_line = self._next_deep_sample = 0.0

    def _at_work(self) -> dict[str, list[int]]:
        """Give the devices of this machine where trainers are, with their processes there."""
        found: dict[str, list[int]] = {}
        for attempt in self.attempts:
            for device in _places(attempt.job):
                found.setdefault(device, []).extend(filter(None, [attempt.trainer.pid]))
        return found

    def _put_back(self, job: Job, error: Exception, *, wait: float, again: float | None) -> None:
        """Put a job back whose trainer could not be started. For an engine it stays at its attempt until it is taken,
        and one event says so, however often that is tried.
        """
        why = f"it could not be started: {error}"
        changes: dict[str, Any] = {"not_before": time.time() + wait} if wait else {}
        progress = {**job.progress, "waits_for": self._engines.why_not(job.launcher)}
        progress |= {"waits": why} if wait else {}
        if job.launcher == LOCAL or job.state is not State.RUNNING:
            events = [ended(job, Ending.TRANSIENT, at=time.time(), how=why)]
        else:
            progress = {**progress, "unsent": wait or again or 0.0}
            words = f"{job.launcher} does not take it: {error}; it is tried until it does"
            events = [Event(time.time(), EventType.MESSAGE, words, level="warning")] if again is None else []
        self._never_began.append((job, events, {**changes, "progress": progress}))
        self.queue_again()

    def _look_at(self, waiting: Sequence[Job]) -> None:
        """Fail jobs that wait for nothing, as their files will not do."""
        for job, why in self._preview.look(waiting):
            self._closer.fail(job, why)

    def _first_in_turn(self) -> list[Job]:
        """Give the first jobs of the queue, and the first for this machine if none of those is."""
        queue = self._ledger.may_start(time.time(), limit=_LOOKED_AT)
        if len(queue) == _LOOKED_AT and all(job.launcher != LOCAL for job in queue):
            queue += self._ledger.may_start(time.time(), limit=_LOOKED_AT, launcher=LOCAL)
        return queue

    def _for_elsewhere(self, queue: Sequence[Job]) -> list[Job]:
        """Leave the jobs for engines; note with the others that no GPU is left here."""
        for job in queue:
            if job.launcher == LOCAL:
                self._note_wait(job, "there is no GPU that it may use")
        return [job for job in queue if job.launcher != LOCAL]

    def _refused(self, config: Config, job: Job) -> bool:
        """Fail a job that wants more GPUs than there are."""
        wanted, there = job.settings.get("gpus_per_job", 1), self.fleet.most(config)
        if wanted == "auto" or wanted <= there or job.launcher != LOCAL:
            return False
        remedy = "Lower gpus_per_job, or leave fewer GPUs alone with `gpus`."
        what = f"gpus_per_job is {wanted}, and this machine has {there} for jobs"
        error = ConfigError(what, where=printable(job.name), remedy=remedy, code="too_few_gpus")
        self._closer.fail(job, error.as_dict())
        return True

    def _unanswered(self, config: Config, job: Job) -> bool:
        """Whether a job is for an engine that does not answer; it lets others pass."""
        if (name := job.launcher) == LOCAL:
            return False
        self._engines.launcher(name, config)  # with other settings it may answer
        why = self._engines.why_not(name)
        if why:
            self._note_wait(job, why)
        return bool(why)

    def _wish(self, config: Config, job: Job, devices: Sequence[Device]) -> Wish:
        """Say what a job needs here. Without GPUs to choose from there is one device, whatever is done on it."""
        same_as = "" if config.duplicates == "run" else _same_as(job)
        memory = min((one.memory for one in devices if one.memory), default=None)
        if memory is None or job.launcher != LOCAL:
            return Wish(job.id, job.launcher, same_as=same_as)
        wanted = job.settings.get("gpus_per_job", 1)
        shares = config.share_gpus and wanted in {1, "auto"}
        gpus: int | None = None if wanted == "auto" else wanted
        if shares or wanted == "auto" or (wanted > 1 and _may_be_sharded(job)):
            known = self._foresight.knows(job, gpu=devices[0].id, memory=memory)
            forecast = self._foresight.of(job)
            if wanted == "auto" and known:
                gpus = min(forecast.spread if forecast else 1, len(devices))
            elif wanted != 1 and not known:
                gpus = None
        if gpus and self.fleet.count(config) >= gpus > len(devices):
            gpus = len(devices)  # others have failed since; it goes on on what is left
        return Wish(job.id, gpus=gpus, memory=self._needed(job), shares=shares, same_as=same_as)

    def _needed(self, job: Job) -> int | None:
        forecast = self._foresight.of(job)
        return forecast.peak if forecast else None

    def _work(self, config: Config, job: Job) -> Work:
        places, memory = _places(job), self._needed(job)
        shares = config.share_gpus and len(places) == 1
        return Work(job.id, places, job.launcher, memory=memory, shares=shares, same_as=_same_as(job))

    def _note_wait(self, job: Job, why: str) -> None:
        """Keep for `finetuned status` why a job does not start, of those that would start next."""
        if job.progress.get("waits_for", "") != why:
            self._ledger.update(job.id, progress={**job.progress, "waits_for": why})

    def _tend(self, config: Config, attempt: Attempt) -> None:
        events, status = attempt.tend()
        for event in events:
            _relay(attempt.job, event)
        keep_ends(self._home.job_log(attempt.job.id))
        release(self._home.job(attempt.job.id).events, attempt.job.events_offset)
        if status is None:
            return
        if status != ExitCode.DONE:
            self._gpus.sample()  # a GPU that is gone is noticed when it is asked
            self._heed_gpus(config)
        decision, ending = attempt.conclude(status)
        self.attempts.remove(attempt)
        self._next_decision = 0.0
        self._wake()  # the next job need not wait
        job = attempt.job
        if decision.publish:
            self._closer.publish(job)
        elif decision.reason:
            self._closer.fail(job, decision.reason)
        elif ending is Ending.INTERRUPTED:
            then = {} if attempt.cancelled else {"then": "it goes on from its checkpoint"}
            _log.info("training stopped", job=job.id, **then)
        elif decision.no_room:
            self._hold.begin(decision.why, doing=f"training {job.id}")
        else:
            delay = {"after_seconds": decision.delay} if decision.delay else {}
            _log.warning("training goes on", job=job.id, why=decision.why, **delay)

    def _heed_gpus(self, config: Config) -> None:
        """Keep away from GPUs that failed. Jobs at work on one are stopped and go on elsewhere."""
        for uuid in self.fleet.heed(config):
            for attempt in self.attempts:
                if self.fleet.serves(uuid, _visible(attempt.job)):
                    attempt.gpu_failed = True
                    attempt.stop(config.pause_grace)


def _visible(job: Job) -> str:
    return str(job.progress.get("gpu", ""))


def _wanted(job: Job) -> int:
    """Give how many GPUs, or processes where there are none, a job is to have where nobody can say what it needs."""
    wanted = job.settings.get("gpus_per_job", 1)
    return 1 if wanted == "auto" else int(wanted)


def _may_be_sharded(job: Job) -> bool:
    """Whether it is worth asking if its model has to be spread over several GPUs."""
    return may_be_sharded(job.settings.get("recipe", "sft"), str(job.rung.get("tuning")))


def _places(job: Job) -> tuple[str, ...]:
    """Give the devices of this machine that a job was started on, also by an earlier daemon."""
    if job.launcher != LOCAL:
        return ()
    return tuple(job.progress.get("devices", [])) or tuple(filter(None, _visible(job).split(","))) or (CPU,)


def _same_as(job: Job) -> str:
    """Name what makes a job the same training as another."""
    settings = sorted((key, value) for key, value in job.settings.items() if key not in WHERE)
    return f"{job.sha256} {job.held_out_sha256} {settings}"


def _relay(job: Job, event: Event) -> None:
    """Say in the daemon's log what matters there; the job's own log has everything."""
    if event.type is EventType.ERROR:
        return  # told with the job's end
    if event.type in {EventType.PLAN, EventType.RUNG, EventType.BENCHMARK, EventType.RESULT} or event.level != "info":
        log = {"warning": _log.warning, "error": _log.error}.get(event.level, _log.info)
        log(event.message, job=job.id)
    elif event.type is EventType.METRICS and "valid_loss" in event.data:
        _log.info(event.message, job=job.id)
