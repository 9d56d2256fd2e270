"""The daemon: one process, one loop, each step a named function. Signals only set flags."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from contextlib import suppress

import structlog

from finetuned import gpu
from finetuned.centre import ControlCentre
from finetuned.checked import file_state, remember_checked
from finetuned.closer import Closer
from finetuned.config import Config, load_config
from finetuned.crew import Crew
from finetuned.durable import has_room
from finetuned.errors import ConfigError, FinetunedError, HomeError
from finetuned.guard import check_one_mount, only_daemon, why_paused
from finetuned.hold import FIRST_RETRY, LAST_RETRY, Hold
from finetuned.home import Home
from finetuned.intake import Intake
from finetuned.jobs import Job, State
from finetuned.ledger import Ledger
from finetuned.notify import notify, watchdog_seconds
from finetuned.on_finish import MOST_TRIES, Teller, news_of
from finetuned.pulse import Signs, trouble
from finetuned.spool import orders
from finetuned.spool.crashes import pause_if_too_many
from finetuned.spool.orders import Verb
from finetuned.spool.recover import recover, recover_job
from finetuned.supervisor import stop_orphan
from finetuned.tidy import tidy
from finetuned.wake import Hints, Wake

_TICK = 0.2  # seconds between two looks at a running trainer
_IDLE = 5.0  # seconds between two looks at config.json when nothing else happens
_STOP_WORD = 60.0  # seconds that systemd shall wait for the next word of a daemon that stops
_TIDY_SECONDS = 86400.0
_LAST_NEWS = 5.0  # seconds for what `on_finish` has not told yet when the daemon is stopped

_log = structlog.get_logger()


class Service:
    """The daemon of one base directory."""

    def __init__(self, home: Home, *, once: bool = False) -> None:
        """Prepare; nothing is touched before `run`. With `once` it ends when there is nothing left to do."""
        self._home = home
        self._once = once
        self._wake = Wake()
        self._hints = Hints(self._wake)
        self._teller = Teller(self._wake.set)
        self._telling: int | None = None  # the number of the news that is told at this moment
        self._centre = ControlCentre(home)
        self._hold = Hold(home)
        self._stop = self._hurry = self._reload = False
        self._config_state: tuple[int, ...] = ()
        self._recovered = False
        self._next_word = self._next_beat = 0.0  # to systemd: what is going on, and a sign of life
        self._next_tidy = 0.0
        self._config: Config
        self._ledger: Ledger
        self._gpus: gpu.Sampler
        self._closer: Closer
        self._intake: Intake
        self._crew: Crew

    # -- life

    def run(self) -> int:
        """Serve until a signal, or with `once` until all is done. Gives the exit code: 1 if a job failed under `once`.

        Waits for room on the disk, but not with `once`. Raises HomeError if another daemon is at work here or the
        folders cannot be used, ConfigError if config.json is broken.
        """
        self._catch_signals()  # before the pid is known to anybody: an order's signal would end this process
        pause = FIRST_RETRY
        while not self._stop:
            try:
                return self._serve()
            except HomeError as error:
                if self._once or error.code != "no_room":
                    raise
                _log.error("the daemon waits", error=error.sentence(), again_in_seconds=pause)
                self._wake.rest(pause)
                pause = min(2 * pause, LAST_RETRY)
        return 0

    def _serve(self) -> int:
        with only_daemon(self._home):
            self._config_state = file_state(self._home.config_file)
            self._config = load_config(self._home.config_file)
            remember_checked(self._home, self._config_state)
            check_one_mount(self._home)
            self._ledger = open_ledger(self._home)
            self._gpus = gpu.Sampler.open()
            self._closer = Closer(self._ledger, self._home, self._hold)
            common = (self._ledger, self._home, self._hold, self._closer)
            self._intake = Intake(*common, hints=self._hints, wake=self._wake.set)
            self._crew = Crew(*common, self._gpus, wake=self._wake.set)
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
                self._crew.close()
                self._intake.close()
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
            self._hold.begin(error, doing="putting right what a crash left")
        self._intake.renew_watch()
        self._crew.warm_up(self._config)
        notify(ready=1, status="waiting for files")

    def _recover(self) -> None:
        recover(self._ledger, self._home, stop_orphan=self._stop_orphan, adopt=self._adopt)
        if why := pause_if_too_many(self._home, self._config.most_crashes, time.time()):
            _log.error("paused", why=why, then="`finetuned resume` lets jobs start again")
        self._recovered = True

    def _done(self) -> bool:
        if self._stop:
            self._stop_attempts()
            # Where the disk is full their ends cannot be recorded, and are left to recovery.
            return all(self._hold.on and one.trainer.poll() is not None for one in self._crew.here)
        if not self._once or self._crew.attempts or self._intake.empty is None:
            return False
        if self._telling is not None or self._ledger.next_news():
            return False
        if self._intake.empty and not self._ledger.unfinished():
            return True
        if self._paused():
            _log.error("the queue is paused", then="`finetuned resume`, and start again")
        elif self._crew.fleet.none_left(self._config):
            _log.error("no GPU is left", then="mend one, and start again")
        else:
            return False
        self._closer.failures += 1
        return True

    def _end_telling(self) -> None:
        if self._teller.close(seconds=_LAST_NEWS) and self._telling is not None:
            with suppress(sqlite3.Error):
                self._ledger.drop_news(self._telling)

    def _end(self) -> int:
        notify(stopping=1)
        for attempt in self._crew.attempts:
            if attempt.trainer.id:
                then = "it goes on without a daemon, and the next one finds it"
                _log.info("left with its engine", job=attempt.job.id, id=attempt.trainer.id, then=then)
        _log.info("finetuned ends")
        return 1 if self._once and self._closer.failures else 0

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
            self._start_next,
            self._tend_attempts,
            self._sample_gpus,
            self._tidy,
            self._tend_centre,
            self._tell_news,
        )
        for step in steps:
            try:
                step()
            except (sqlite3.OperationalError, OSError) as error:  # a full disk, most likely
                self._hold.begin(error, doing=step.__name__.strip("_").replace("_", " "))
        self._hold.end_if_over()

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
            self._intake.look_soon()
            self._crew.warm_up(self._config)

    def _finish_held(self) -> None:
        """Go on with what a full disk stopped, as recovery would after a crash."""
        if not self._hold.on or self._hold.resting:
            return
        self._hold.on = False
        self._intake.look_soon()
        if not self._recovered:
            self._recover()
        self._crew.queue_again()
        for job in self._ledger.jobs(State.CLAIMING, State.RUNNING, State.TRAINED, State.FAILING):
            if self._intake.hashes(job) or self._crew.find(job.id):
                continue
            try:
                recover_job(self._ledger, self._home, job, stop_orphan=self._stop_orphan, adopt=self._adopt)
            except OSError as error:
                self._hold.begin(error, doing=f"going on with {job.id}")
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
        if self._crew.attempts and self._paused():
            self._crew.stop(self._config.pause_grace)

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
                self._closer.put_aside(job, orders.cancelled(job))
                _log.info("cancelled", job=job.id, input_in=f"archive/failed/{job.id}/")
                return True
            case State.CLAIMING | State.RUNNING:
                if attempt := self._crew.find(job.id):
                    attempt.cancelled = True
                    attempt.stop(self._config.pause_grace)  # and once it has ended, it is queued
                return False
            case _:
                _log.warning("too late to cancel", job=job.id, status=job.status)
                return True

    def _look_into_inbox(self) -> None:
        if not self._stop:
            self._intake.look(self._config)

    def _take_ready(self) -> None:
        if not self._stop:
            self._intake.take(self._config)

    def _queue_hashed(self) -> None:
        self._intake.queue_hashed(self._config)

    def _start_next(self) -> None:
        self._crew.listen()
        if not (self._stop or self._hold.resting or self._paused()):
            self._crew.start_next(self._config)

    def _tend_attempts(self) -> None:
        self._crew.tend(self._config, hurry=self._hurry)

    def _sample_gpus(self) -> None:
        self._crew.sample(self._config)

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
        if self._crew.attempts:
            return self._crew.doing()
        if self._hold.on:
            return f"waiting: {self._hold.by}"
        return "paused" if self._paused() else "waiting for files"

    def _signs(self, now: float) -> Signs:
        unwritten = None
        try:
            self._ledger.prove_writable()
        except sqlite3.Error as error:
            unwritten = error
        return Signs(
            watching=self._intake.watching,
            since_look=self._intake.since_look(now),
            look_every=self._config.rescan_seconds,
            unwritten=unwritten,
            waits_for=self._hold.by if self._hold.on else None,
        )

    def _pause(self) -> float:
        """Seconds to rest: until the next thing that can happen by itself."""
        if self._crew.attempts:
            return _TICK
        now = time.monotonic()
        return max(0.01, min(_IDLE, self._intake.next_at() - now, self._next_word - now))

    # -- what steps share

    def _paused(self) -> bool:
        return why_paused(self._home) is not None

    def _stop_attempts(self) -> None:
        for attempt in self._crew.here:
            if not attempt.stopping:
                _log.info(
                    "stopping, with a checkpoint",
                    job=attempt.job.id,
                    seconds=self._config.stop_seconds,
                    hurry="a second signal ends it at once, without one",
                )
                notify(stopping=1)
                self._next_word = 0.0
            attempt.stop(self._config.stop_seconds)

    def _adopt(self, job: Job) -> bool:
        return self._crew.adopt(self._config, job)

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
