"""The daemon: one process, one loop, each step a named function. Signals only set flags."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, replace

import structlog

from finetuned import gpu
from finetuned.attempts import began, ended
from finetuned.centre import ControlCentre
from finetuned.checked import file_state, remember_checked
from finetuned.config import Config, load_config
from finetuned.durable import has_room, make_folder
from finetuned.errors import ConfigError, FinetunedError, HomeError
from finetuned.events import Ending, Event, EventType, ExitCode
from finetuned.fleet import Fleet
from finetuned.guard import check_one_mount, check_place, only_daemon, say_waiting, why_paused
from finetuned.home import Home, printable
from finetuned.jobs import Job, State
from finetuned.launchers.local import start, trainer_environment
from finetuned.launchers.warm import WarmParent
from finetuned.ledger import Ledger
from finetuned.live import sentence
from finetuned.notify import notify, watchdog_seconds
from finetuned.on_finish import MOST_TRIES, Teller, news_of
from finetuned.pulse import Signs, no_room, trouble
from finetuned.spool import orders
from finetuned.spool.claim import claim, enqueue, files_to_hash, settle_duplicate, write_spec
from finetuned.spool.crashes import pause_if_too_many
from finetuned.spool.hasher import Hasher
from finetuned.spool.inbox import Complaint, Found
from finetuned.spool.orders import Verb
from finetuned.spool.publish import archive, fail, publish, published
from finetuned.spool.recover import recover, recover_job
from finetuned.spool.settle import Settler
from finetuned.spool.watch import Watch
from finetuned.supervisor import Attempt, boot_id, stop_orphan
from finetuned.tidy import keep_ends, release, tidy
from finetuned.wake import Hints, Wake

_TICK = 0.2  # seconds between two looks at a running trainer
_IDLE = 5.0  # seconds between two looks at config.json when nothing else happens
_ROUND = 0.2  # seconds that one step may take of a round in which thousands of files wait
_FIRST_RETRY, _LAST_RETRY = 1.0, 15.0  # seconds, after the disk was full or read-only; doubled each time
_LONG_AGO = 600.0  # seconds without trouble, after which the first retry comes soon again
_GPU_LINE_SECONDS = 60.0
_STOP_WORD = 60.0  # seconds that systemd shall wait for the next word of a daemon that stops
_TIDY_SECONDS = 86400.0
_LAST_NEWS = 5.0  # seconds for what `on_finish` has not told yet when the daemon is stopped
_UNREADABLE = frozenset({errno.EIO, errno.EACCES, errno.EPERM, errno.ELOOP})

_log = structlog.get_logger()


class Service:
    """The daemon of one base directory."""

    def __init__(self, home: Home, *, once: bool = False) -> None:
        """Prepare; nothing is touched before `run`. With `once` it ends when there is nothing left to do."""
        self._home = home
        self._once = once
        self._wake = Wake()
        self._hints = Hints(self._wake)
        self._watch = Watch(home.inbox, self._hints)
        self._settler = Settler(home.inbox)
        self._hasher = Hasher(self._wake.set)
        self._warm = WarmParent()
        self._teller = Teller(self._wake.set)
        self._telling: int | None = None  # the number of the news that is told at this moment
        self._centre = ControlCentre(home)
        self._attempt: Attempt | None = None
        # The job whose trainer could not be started, and why, until the ledger says so too.
        self._never_began: tuple[Job, str] | None = None
        self._stop = self._hurry = self._reload = False
        self._config_state: tuple[int, ...] = ()
        self._waiting: bool | None = None  # whether the last look left files that it will be worth looking at again
        self._ready: deque[Found] = deque()  # what the last look found ready and is not taken yet
        self._next_look = 0.0
        self._held = False  # the queue waits, for room on the disk say
        self._held_until = self._held_for = 0.0
        self._held_by: Exception | str | None = None
        self._recovered = False
        self._looked_at = time.monotonic()
        self._next_word = self._next_beat = 0.0  # to systemd: what is going on, and a sign of life
        self._next_sample = self._next_gpu_line = self._next_deep_sample = 0.0
        self._next_tidy = 0.0
        self._failures = 0
        self._config: Config
        self._ledger: Ledger
        self._gpus: gpu.Sampler
        self._fleet: Fleet

    # -- life

    def run(self) -> int:
        """Serve until a signal, or with `once` until all is done. Gives the exit code: 1 if a job failed under `once`.

        Waits for room on the disk, but not with `once`. Raises HomeError if another daemon is at work here or the
        folders cannot be used, ConfigError if config.json is broken.
        """
        self._catch_signals()  # before the pid is known to anybody: an order's signal would end this process
        pause = _FIRST_RETRY
        while not self._stop:
            try:
                return self._serve()
            except HomeError as error:
                if self._once or error.code != "no_room":
                    raise
                _log.error("the daemon waits", error=error.sentence(), again_in_seconds=pause)
                self._wake.rest(pause)
                pause = min(2 * pause, _LAST_RETRY)
        return 0

    def _serve(self) -> int:
        with only_daemon(self._home):
            self._config_state = file_state(self._home.config_file)
            self._config = load_config(self._home.config_file)
            remember_checked(self._home, self._config_state)
            check_one_mount(self._home)
            self._ledger = open_ledger(self._home)
            self._gpus = gpu.Sampler.open()
            self._fleet = Fleet(self._home, self._gpus)
            try:
                self._begin()
                while not self._done():
                    self._take_steps()
                    self._tell_systemd()
                    self._wake.rest(self._pause())
                return self._end()
            finally:
                self._end_telling()
                self._centre.close()
                self._warm.close()
                self._watch.stop()
                self._hasher.close()
                self._gpus.close()
                self._ledger.close()

    def _begin(self) -> None:
        _log.info("finetuned starts", base_dir=str(self._home.root), pid=os.getpid())
        if self._gpus.gpus:
            _log.info("GPUs found", gpus=", ".join(map(str, self._gpus.gpus)))
        else:
            _log.info("no GPU", reason=self._gpus.why_none, then="training runs on the CPU")
        try:
            self._recover()
        except (sqlite3.OperationalError, OSError) as error:
            self._hold(error, doing="putting right what a crash left")
        self._watch.renew()
        self._warm_up()
        notify(ready=1, status="waiting for files")

    def _recover(self) -> None:
        recover(self._ledger, self._home, stop_orphan=self._stop_orphan, adopt=self._adopt)
        if why := pause_if_too_many(self._home, self._config.most_crashes, time.time()):
            _log.error("paused", why=why, then="`finetuned resume` lets jobs start again")
        self._recovered = True

    def _done(self) -> bool:
        if self._stop:
            self._stop_attempt()
            # Where the disk is full its end cannot be recorded, and is left to recovery.
            return self._attempt is None or (self._held and self._attempt.trainer.poll() is not None)
        if not self._once or self._attempt or self._waiting is None or self._ready:
            return False
        if self._telling is not None or self._ledger.next_news():
            return False
        if not self._waiting and not self._ledger.unfinished():
            return True
        if self._paused():
            _log.error("the queue is paused", then="`finetuned resume`, and start again")
        elif self._fleet.all_failed:
            _log.error("no GPU is left", then="mend one, and start again")
        else:
            return False
        self._failures += 1
        return True

    def _end_telling(self) -> None:
        if self._teller.close(seconds=_LAST_NEWS) and self._telling is not None:
            with suppress(sqlite3.Error):
                self._ledger.drop_news(self._telling)

    def _end(self) -> int:
        notify(stopping=1)
        _log.info("finetuned ends")
        return 1 if self._once and self._failures else 0

    def _catch_signals(self) -> None:
        def stop(*_: object) -> None:
            self._hurry = self._stop
            self._stop = True
            self._wake.set()

        def reload(*_: object) -> None:
            self._reload = True
            self._wake.set()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGHUP, reload)
        # Sent when somebody opens a file for writing in the moment in which the kernel is asked whether anybody has.
        # A handler and not SIG_IGN, which the trainer would inherit.
        signal.signal(signal.SIGIO, lambda *_: None)
        for number in (signal.SIGCHLD, signal.SIGUSR1):  # USR1: a user gave an order
            signal.signal(number, lambda *_: self._wake.set())

    # -- the steps of the loop

    def _take_steps(self) -> None:
        steps = (
            self._reload_config,
            self._finish_held,
            self._obey,
            self._look_into_inbox,
            self._take_ready,
            self._queue_hashed,
            self._warm.listen,
            self._start_next,
            self._tend_attempt,
            self._sample_gpus,
            self._tidy,
            self._tend_centre,
            self._tell_news,
        )
        for step in steps:
            try:
                step()
            except (sqlite3.OperationalError, OSError) as error:  # a full disk, most likely
                self._hold(error, doing=step.__name__.strip("_").replace("_", " "))
        if self._held_by and not self._held:
            self._held_by = None
            say_waiting(self._home, "")
            _log.info("the queue goes on")

    def _reload_config(self) -> None:
        """Read config.json again when it changed. A broken edit keeps the last good one and says what is wrong."""
        state = file_state(self._home.config_file)
        if state == self._config_state and not self._reload:
            return
        self._config_state, self._reload = state, False
        try:
            self._config = load_config(self._home.config_file)
        except ConfigError as error:
            _log.error("config.json not taken over", error=error.sentence(), then="the last good one stays in use")
        else:
            _log.info("config.json read again", then="the next job uses it")
            remember_checked(self._home, state)
            self._next_look = 0.0
            self._warm_up()

    def _finish_held(self) -> None:
        """Go on with what a full disk stopped, as recovery would after a crash."""
        if not self._held or time.monotonic() < self._held_until:
            return
        self._held, self._next_look = False, 0.0
        if not self._recovered:
            self._recover()
        self._queue_again()
        for job in self._ledger.jobs(State.CLAIMING, State.RUNNING, State.TRAINED, State.FAILING):
            at_work = self._hasher.busy(job.id) or (self._attempt is not None and job.id == self._attempt.job.id)
            if at_work:
                continue
            try:
                recover_job(self._ledger, self._home, job, stop_orphan=self._stop_orphan, adopt=self._adopt)
            except OSError as error:
                self._hold(error, doing=f"going on with {job.id}")
                return

    def _obey(self) -> None:
        """Carry out what users want. An order stays until it is carried out or cannot be."""
        for number, verb, job_id, before in self._ledger.orders():
            try:
                carried_out = self._carry_out(Verb(verb), job_id, before)
            except (KeyError, ValueError):  # or a verb of a later version
                _log.warning("no such job or order", order=verb, job=job_id)
                carried_out = True
            except FinetunedError as error:
                _log.warning("order refused", order=verb, job=job_id, why=error.sentence())
                carried_out = True
            if carried_out:
                self._ledger.drop_order(number)
        if self._attempt and not self._attempt.stopping and self._paused():
            self._attempt.stop(self._config.pause_grace)

    def _carry_out(self, verb: Verb, job_id: str, before: str) -> bool:
        """Do what one order says; say whether that is all."""
        if verb is Verb.PAUSE:
            orders.pause(self._home, "a user asked for it")
            _log.info("paused", then="no job starts until `finetuned resume`")
            return True
        if verb is Verb.RESUME:
            orders.resume(self._home)
            _log.info("resumed")
            return True
        job = self._ledger.job(job_id)
        if verb is Verb.CANCEL:
            return self._cancel(job)
        if verb is Verb.RETRY:
            orders.retry(self._ledger, self._home, self._config, job)
        elif verb is Verb.BEFORE:
            orders.put_before(self._ledger, self._home, job, self._ledger.job(before))
        else:
            orders.change_turn(self._ledger, self._home, job, verb)
        _log.info("order carried out", order=verb, job=job.id)
        return True

    def _cancel(self, job: Job) -> bool:
        match job.state:
            case State.QUEUED:
                self._put_aside(job, orders.cancelled(job))
                _log.info("cancelled", job=job.id, input_in=f"archive/failed/{job.id}/")
                return True
            case State.RUNNING if self._attempt and self._attempt.job.id == job.id:
                self._attempt.stop(self._config.pause_grace)  # and once it has ended, it is queued
                return False
            case State.CLAIMING | State.RUNNING:
                return False
            case _:
                _log.warning("too late to cancel", job=job.id, status=job.status)
                return True

    def _look_into_inbox(self) -> None:
        """Find what is ready, say once what never will be."""
        now = time.monotonic()
        if self._stop or self._ready or now < self._held_until or not (self._hints.is_set() or now >= self._next_look):
            return
        self._hints.clear()
        make_folder(self._home.inbox)
        self._watch.renew()
        look = self._settler.look(self._config, now)
        self._looked_at = now
        self._waiting = look.again is not None
        for complaint in look.complaints:
            _complain(complaint)
        self._ready.extend(look.ready)
        self._next_look = now + min(look.again or self._config.rescan_seconds, self._config.rescan_seconds)

    def _take_ready(self) -> None:
        """Take what is ready (D1 to D3), of thousands some at a time."""
        until = time.monotonic() + _ROUND
        while self._ready and not self._stop and self._held_until <= time.monotonic() < until:
            found = self._ready.popleft()
            if not self._settler.is_as_seen(found):  # it changed before its turn; the next look judges it anew
                self._waiting, self._next_look = True, 0.0
                continue
            try:
                job = claim(self._ledger, self._home, found, self._config)
            except OSError as error:
                if no_room(error):
                    self._hold(error, doing=f"taking {printable(found.name)}")
                    return
                _complain(Complaint(found.path, f"cannot be taken: {error.strerror}", "Mend the folder's permissions."))
                continue
            also = {"held_out": printable(job.held_out)} if job.held_out else {}
            _log.info("file taken", job=job.id, file=printable(job.name), bytes=job.identity.size, **also)
            if job.reason:
                self._fail(job)

    def _queue_hashed(self) -> None:
        """Hash claimed files beside the loop and queue those that are done (D4, D5)."""
        now = time.monotonic()
        if now < self._held_until:
            return
        for job in self._ledger.jobs(State.CLAIMING):
            self._hasher.ask(job, files_to_hash(self._home, job), now)
        for job_id, result in self._hasher.results(now=now, pause=self._config.quiet_seconds):
            if isinstance(result, OSError) and result.errno in _UNREADABLE:
                self._fail(self._ledger.job(job_id), _unreadable(result))
            elif isinstance(result, OSError):
                self._hold(result, doing=f"reading the file of {job_id}")
            elif result is None:
                _log.info("file still changes", job=job_id)
            else:
                self._queue(self._ledger.job(job_id), *result)
            if time.monotonic() > now + _ROUND:
                self._wake.set()
                return

    def _queue(self, job: Job, *hashes: str) -> None:
        job = enqueue(self._ledger, self._home, self._config, job, *hashes)
        if job.state is State.QUEUED:
            _log.info("queued", job=job.id, sha256=hashes[0][:12])
        else:
            self._finish_untrained(job)

    def _finish_untrained(self, job: Job) -> None:
        """Do what is left for a job that was settled without a training."""
        if job.state is State.TRAINED:
            _log.info("trained before", job=job.id, duplicate_of=job.duplicate_of, adapter=job.adapter)
            self._archive(job)
        else:
            self._fail(job)

    def _start_next(self) -> None:
        """Start the first job of the queue (D6, D7)."""
        if self._attempt or self._stop or time.monotonic() < self._held_until or self._paused():
            return
        job = self._ledger.next_queued(time.time())
        if job is None or self._fleet.all_failed:
            return
        job = settle_duplicate(self._ledger, self._home, self._config, job)
        if job.state is not State.QUEUED:
            self._finish_untrained(job)
            self._wake.set()
            return
        environment, why = self._trainer_environment()
        try:
            check_place(self._home.adapters)
            following = replace(job, attempt=job.attempt + 1)
            write_spec(self._home, following)
            job = self._ledger.record(
                job.id,
                [began(following, at=time.time(), on=why)],
                offset=job.events_offset,
                state=State.RUNNING,
                attempt=following.attempt,
                boot_id=boot_id(),
                started_at=job.started_at or time.time(),
                progress={**job.progress, "gpu": {**os.environ, **environment}.get("CUDA_VISIBLE_DEVICES", "")},
            )
            how = self._warm.start if self._config.warm_trainer else start
            self._attempt = Attempt.launch(self._ledger, self._home, job, start=how, environment=environment)
        except FinetunedError as error:
            self._fail(job, error.as_dict())
        except (sqlite3.OperationalError, OSError) as error:
            self._hold(error, doing=f"starting {job.id}")
            self._never_began = job, f"it could not be started: {error}"
            self._queue_again()
        else:
            _log.info("training starts", job=job.id, attempt=job.attempt, pid=self._attempt.trainer.pid, where=why)
            self._next_sample = self._next_gpu_line = self._next_deep_sample = 0.0

    def _queue_again(self) -> None:
        """Put a job back whose trainer never began, so that nothing was interrupted. Once there is room for that."""
        if self._never_began is not None:
            job, why = self._never_began
            over = ended(job, Ending.TRANSIENT, at=time.time(), how=why)
            self._ledger.record(job.id, [over], offset=job.events_offset, state=State.QUEUED)
            self._never_began = None

    def _tend_attempt(self) -> None:
        """Record what the trainer says; when it has ended, do what follows."""
        attempt = self._attempt
        if attempt is None:
            return
        if self._hurry:
            attempt.hurry()
        events, status = attempt.tend()
        for event in events:
            _relay(attempt.job, event)
        keep_ends(self._home.job_log(attempt.job.id))
        release(self._home.job(attempt.job.id).events, attempt.job.events_offset)
        if status is None:
            return
        if status != ExitCode.DONE:
            self._gpus.sample()  # a GPU that is gone is noticed when it is asked
            self._heed_gpus()
        decision, ending = attempt.conclude(status)
        self._attempt = None
        self._wake.set()  # the next job need not wait
        job = attempt.job
        if decision.publish:
            self._publish(job)
        elif decision.reason:
            self._fail(job, decision.reason)
        elif ending is Ending.INTERRUPTED:
            _log.info("training stopped", job=job.id, then="it goes on from its checkpoint")
        elif decision.no_room:
            self._hold(decision.why, doing=f"training {job.id}")
        else:
            delay = {"after_seconds": decision.delay} if decision.delay else {}
            _log.warning("training goes on", job=job.id, why=decision.why, **delay)

    def _sample_gpus(self) -> None:
        """Read the GPUs while a job runs: into the ledger, and a line a minute."""
        now = time.monotonic()
        if self._attempt is None or not self._gpus.gpus or now < self._next_sample:
            return
        self._next_sample = now + self._config.gpu_sample_seconds
        deep = now >= self._next_deep_sample
        if deep:
            self._next_deep_sample = now + _GPU_LINE_SECONDS
        job = self._attempt.job
        samples = self._gpus.sample(self._attempt.trainer.pid, deep=deep)
        self._ledger.record_gpu(job.id, [(s.created_at, s.uuid, asdict(s)) for s in samples])
        self._heed_gpus()
        if now >= self._next_gpu_line and samples:
            self._next_gpu_line = now + _GPU_LINE_SECONDS
            _log.info("GPU", job=job.id, reading=gpu.summary(samples))

    def _tidy(self) -> None:
        """Once a day, throw away what config.json keeps no longer. What cannot be done waits for the next day."""
        now = time.monotonic()
        if now < self._next_tidy:
            return
        self._next_tidy = now + _TIDY_SECONDS
        try:
            tidy(self._home, self._ledger, self._config)
        except (OSError, sqlite3.OperationalError) as error:
            _log.warning("not tidied", error=str(error), again_in_seconds=_TIDY_SECONDS)

    def _tend_centre(self) -> None:
        """Keep the control centre running. That it cannot start is no reason for the queue to wait."""
        with suppress(OSError):
            self._centre.tend(self._config.web)

    def _tell_news(self) -> None:
        """Have told how jobs ended, one after the other. What is not told when the daemon ends is told by the next."""
        if self._teller.busy:
            return
        if self._telling is not None:
            self._ledger.drop_news(self._telling)
            self._telling = None
        news, settings = self._ledger.next_news(), self._config.on_finish
        if news is None or self._stop:
            return
        if not (settings.command or settings.urls):
            self._ledger.drop_news()
            return
        number, tries, job = news
        self._wake.set()  # for the next one
        if job.duplicate_of is not None or tries >= MOST_TRIES:
            if tries >= MOST_TRIES:
                _log.warning("on_finish: given up, as the daemon ended whenever it told this", job=job.id)
            self._ledger.drop_news(number)
            return
        self._ledger.begin_to_tell(number)
        self._telling = number
        self._teller.tell(settings, news_of(job))

    def _heed_gpus(self) -> None:
        """Keep away from GPUs that failed. A job at work on one is stopped and goes on elsewhere."""
        for uuid in self._fleet.heed():
            if self._attempt and self._fleet.serves(uuid, self._attempt.job.progress.get("gpu", "")):
                self._attempt.gpu_failed = True
                self._attempt.stop(self._config.pause_grace)

    def _tell_systemd(self) -> None:
        """Say what is going on, ask for patience while a checkpoint is written, and give a sign of life if all is well.

        Called by the loop and by nothing else, so a stuck loop is silent.
        """
        now = time.monotonic()
        if now < self._next_word:
            return
        beat = watchdog_seconds()
        self._next_word = now + min(_IDLE, beat or _IDLE)
        notify(status=self._doing())
        if self._stop:
            notify(watchdog=1, extend_timeout_usec=int(_STOP_WORD * 1e6))
        elif beat and now >= self._next_beat:
            why = trouble(self._signs(now))
            if why:
                _log.error("not well", why=why, then="systemd starts the daemon again unless it passes soon")
                self._hints.set()  # the look renews the watch
            else:
                notify(watchdog=1)
                self._next_beat = now + beat

    def _doing(self) -> str:
        """Say in a sentence what is going on: the job, its step, the time that is left."""
        if self._attempt is not None:
            job = self._attempt.job
            return f"{job.id}: {'writing a checkpoint' if self._attempt.stopping else sentence(job.progress)}"
        if self._held:
            return f"waiting: {self._held_by}"
        return "paused" if self._paused() else "waiting for files"

    def _signs(self, now: float) -> Signs:
        unwritten = None
        try:
            self._ledger.prove_writable()
        except sqlite3.Error as error:
            unwritten = error
        return Signs(
            watching=self._watch.alive,
            since_look=0.0 if self._ready else now - self._looked_at,
            look_every=self._config.rescan_seconds,
            unwritten=unwritten,
            waits_for=self._held_by if self._held else None,
        )

    def _pause(self) -> float:
        """Seconds to rest: until the next thing that can happen by itself."""
        if self._attempt is not None:
            return _TICK
        now = time.monotonic()
        pauses = [_IDLE, max(self._next_look, self._held_until) - now, self._next_word - now]
        if self._ready:
            pauses.append(self._held_until - now)
        if again_at := self._hasher.again_at():
            pauses.append(max(again_at, self._held_until) - now)
        return max(0.01, min(pauses))

    # -- what steps share

    def _paused(self) -> bool:
        return why_paused(self._home) is not None

    def _trainer_environment(self) -> tuple[dict[str, str], str]:
        return trainer_environment(self._fleet.next())

    def _warm_up(self) -> None:
        """Have a parent for trainers to be forked from, or none, as config.json says."""
        if self._config.warm_trainer:
            self._warm.open(self._trainer_environment()[0])
        else:
            self._warm.close()

    def _stop_attempt(self) -> None:
        if self._attempt is not None:
            if not self._attempt.stopping:
                _log.info(
                    "stopping, with a checkpoint",
                    job=self._attempt.job.id,
                    seconds=self._config.stop_seconds,
                    hurry="a second signal ends it at once, without one",
                )
                notify(stopping=1)
                self._next_word = 0.0
            self._attempt.stop(self._config.stop_seconds)

    def _publish(self, job: Job) -> None:
        try:
            job = publish(self._ledger, self._home, job)
            self._archive(job)
        except FinetunedError as error:
            self._fail(job, error.as_dict())
        except OSError as error:
            if no_room(error) or published(self._home, self._ledger.job(job.id)):
                self._hold(error, doing=f"publishing {job.id}")
            else:
                self._fail(job, _unwritable(error))

    def _archive(self, job: Job) -> None:
        try:
            job = archive(self._ledger, self._home, job)
        except OSError as error:
            self._hold(error, doing=f"archiving {job.id}")
            return
        if job.duplicate_of is None:
            figures = {key: job.progress[key] for key in ("train_loss", "valid_loss") if key in job.progress}
            _log.info("finished", job=job.id, adapter=f"adapters/{job.adapter}", **figures)

    def _fail(self, job: Job, reason: dict[str, str] | None = None) -> None:
        self._failures += 1
        told = reason or job.reason or {}
        _log.error(
            "job failed",
            job=job.id,
            file=printable(job.name),
            **{key: told[key] for key in ("code", "what", "where", "remedy") if told.get(key)},
            reason_in=f"archive/failed/{job.id}/reason.json",
        )
        with (
            suppress(OSError),
            self._home.job_log(job.id).open("a", encoding="utf-8", errors="backslashreplace") as log,
        ):
            log.write(f"failed: {told.get('where', '')}: {told.get('what', '')}. {told.get('remedy', '')}\n")
        self._put_aside(job, reason)

    def _put_aside(self, job: Job, reason: dict[str, str] | None) -> None:
        try:
            fail(self._ledger, self._home, job, reason)
        except OSError as error:
            self._hold(error, doing=f"putting {printable(job.name)} away")

    def _hold(self, error: Exception | str, *, doing: str) -> None:
        """Let the queue wait: nothing is lost, and it goes on by itself when the cause is gone."""
        now = time.monotonic()
        if self._held and now < self._held_until:
            return
        if now - self._held_until > _LONG_AGO:
            self._held_for = 0.0
        self._held_for = min(2 * self._held_for or _FIRST_RETRY, _LAST_RETRY)
        self._held, self._held_until = True, now + self._held_for
        if str(error) != str(self._held_by):
            _log.error("the queue waits", doing=doing, error=str(error), then="it goes on by itself")
        self._held_by = error
        self._next_word = 0.0
        say_waiting(self._home, f"{doing}: {error}")

    def _adopt(self, job: Job) -> bool:
        """Go on with a job whose daemon went down, if its trainer did not, or said how it ended."""
        if self._attempt is None:
            self._attempt = Attempt.adopt(self._ledger, self._home, job, stop_seconds=self._config.stop_seconds)
        return self._attempt is not None and self._attempt.job.id == job.id  # it may be so already, on a second try

    def _stop_orphan(self, job: Job) -> None:
        stop_orphan(self._home, job, seconds=self._config.stop_seconds)


def open_ledger(home: Home) -> Ledger:
    """Open the ledger; a damaged one is put aside, and recovery rebuilds what the folders know.

    Raises HomeError if it cannot be opened, for lack of room perhaps.
    """
    try:
        return Ledger.open(home.ledger)
    except (sqlite3.OperationalError, OSError) as error:  # not damaged: a full or read-only disk, say
        raise HomeError(
            f"the ledger cannot be opened: {error}",
            where=str(home.ledger),
            remedy="Make room on the disk, or mend its rights.",
            code="" if has_room(home.machinery) else "no_room",
        ) from error
    except sqlite3.DatabaseError as error:
        aside = home.ledger.with_name(f"state.damaged-{int(time.time())}.db")
        _log.error(
            "the ledger is damaged", error=str(error), moved_to=str(aside), then="it is rebuilt from the folders"
        )
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                home.ledger.with_name(home.ledger.name + suffix).rename(aside.with_name(aside.name + suffix))
        return Ledger.open(home.ledger)


def _complain(complaint: Complaint) -> None:
    _log.warning("left in the inbox", path=str(complaint.path), what=complaint.what, remedy=complaint.remedy)


def _relay(job: Job, event: Event) -> None:
    """Say in the daemon's log what matters there; the job's own log has everything."""
    if event.type is EventType.ERROR:
        return  # told with the job's end
    if event.type in {EventType.PLAN, EventType.RUNG, EventType.BENCHMARK, EventType.RESULT} or event.level != "info":
        log = {"warning": _log.warning, "error": _log.error}.get(event.level, _log.info)
        log(event.message, job=job.id)
    elif event.type is EventType.METRICS and "valid_loss" in event.data:
        _log.info(event.message, job=job.id)


def _unreadable(error: OSError) -> dict[str, str]:
    return {
        "code": "unreadable",
        "what": f"the file cannot be read: {error.strerror}",
        "where": str(error.filename or ""),
        "remedy": "Mend the disk or the file's rights, and drop the file again.",
    }


def _unwritable(error: OSError) -> dict[str, str]:
    return {
        "code": "cannot_publish",
        "what": f"the adapter is trained but cannot be put into adapters/: {error.strerror}",
        "where": str(error.filename2 or error.filename or ""),
        "remedy": "The adapter is kept in adapter/ beside this file; move it where you want it, and mend the folder.",
    }
