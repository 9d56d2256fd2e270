"""What Slurm prints and what follows from it, the script that is submitted, and what becomes of a trainer where Slurm
says nothing, or says it late: commands that answer as they are told. The real Slurm is in `tests/cluster`.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from conftest import eventually
from finetuned.engine_settings import Slurm
from finetuned.errors import ConfigError
from finetuned.events import ExitCode, parse_event
from finetuned.home import Home, JobFolder
from finetuned.launchers import Needs, slurm, slurm_asking
from finetuned.launchers.slurm import SlurmLauncher, SlurmTrainer, last_word
from finetuned.launchers.slurm_queue import Entry, Queue, outcome, parse_accounting, parse_queue
from finetuned.launchers.slurm_script import TEMPLATE, fill, read_template
from finetuned.lifesigns import exit_code, leave_exit_code, sign
from fixtures_pretended import PretendedSlurm

HERE = Path("slurm.sh")

# As Slurm 22.05 prints them, asked by `Queue`.
SQUEUE = """\
11|COMPLETED|0|None|wrap|(null)|
7|FAILED|1|BadConstraints|t.sh|(null)|
12|FAILED|33280|NonZeroExitCode|t.sh|(null)|
16|FAILED|9|JobLaunchFailure|finetuned-x-1|finetuned /srv/a base/.finetuned/jobs/x-1 12|
9|PENDING|4294967294|Nodes required for job are DOWN|odd|name|(null)|
"""
SACCT = """\
3|CANCELLED by 1000|0:15|finetuned-x-1
4|OUT_OF_MEMORY|0:125|finetuned-x-1
5|FAILED|70:0|finetuned-x-1
9|FAILED|2:0|finetuned-x-1
10|FAILED|75:0|finetuned-x-1
7|FAILED|9:0|finetuned-x-1
8|FAILED|1:0|finetuned-x-1
6|RUNNING|0:0|finetuned-x-1
"""


def ended(state: str, status: int = 0) -> Entry:
    return Entry("1", state, status, "None", "finetuned-x-1", "")


@pytest.mark.parametrize(
    ("state", "status", "said", "end", "why"),
    [
        ("COMPLETED", 0, 0, 0, ""),
        ("COMPLETED", 0, None, 0, ""),
        ("COMPLETED", 0, 70, 70, ""),  # a template that does something after the trainer
        ("COMPLETED", 0, -11, -11, ""),  # the trainer's word is the exacter one
        ("FAILED", 1, -11, -11, ""),  # a rank's end, which no exit code can say
        ("FAILED", 137, 70, 70, ""),
        ("FAILED", 65, 65, 65, ""),
        ("FAILED", 75, None, 75, ""),  # the lock was held
        ("FAILED", -9, None, -9, ""),
        ("FAILED", 137, None, -9, ""),  # by a shell, or srun
        ("FAILED", 130, 130, 130, "Slurm asked it to stop"),
        ("FAILED", 143, 130, 130, "Slurm asked it to stop"),
        ("OUT_OF_MEMORY", -125, None, -9, ""),
        ("OUT_OF_MEMORY", 1, 70, 70, ""),  # it knows better which rung it was on
        ("OUT_OF_MEMORY", 0, 0, 0, ""),  # only a process beside it was killed
        ("TIMEOUT", 0, None, -15, "its time limit was reached"),
        ("TIMEOUT", 0, 130, 130, "its time limit was reached"),
        ("TIMEOUT", 0, 0, 0, ""),  # it was done, and something else hung
        ("PREEMPTED", 0, 65, 65, ""),
        ("PREEMPTED", 130, 130, 130, "another job was preferred to it"),
        ("NODE_FAIL", 1, None, -15, "its node failed"),
        ("BOOT_FAIL", 0, None, -15, "its node could not be started"),
        ("DEADLINE", 0, None, -15, "its deadline passed"),
        ("CANCELLED", -15, None, -15, "somebody cancelled it in Slurm"),
    ],
)
def test_an_end_in_slurm_means(state, status, said, end, why):
    given, taken = outcome(ended(state, status), said)
    assert given == end
    assert taken.startswith(why) if why else not taken


def test_a_job_that_no_node_can_run_any_more_is_submitted_anew_so_that_sbatch_says_why():
    assert outcome(parse_queue(SQUEUE)["7"], None) == (-15, "Slurm has no node any more that meets its options")


@pytest.mark.parametrize(
    "state", ["PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED"]
)
def test_a_job_in_slurms_hands_has_not_ended(state):
    assert not ended(state).ended


def test_the_queue_is_read_with_wait_statuses_and_what_our_jobs_are_called():
    found = parse_queue(SQUEUE)
    assert [found[job].status for job in ("11", "7", "12", "16")] == [0, -1, 130, -9]
    assert found["16"].comment == "finetuned /srv/a base/.finetuned/jobs/x-1 12"
    assert found["9"].state == "PENDING"  # whatever else somebody calls his job


def test_the_accounting_is_read_with_exit_codes_and_signals():
    found = parse_accounting(SACCT)
    assert {job: (entry.state, entry.status) for job, entry in found.items()} == {
        "3": ("CANCELLED", -15),
        "4": ("OUT_OF_MEMORY", -125),
        "5": ("FAILED", 70),
        "9": ("FAILED", 130),  # and never 2, which no trainer ends with
        "10": ("FAILED", 75),
        "7": ("FAILED", -9),  # 137 it was
        "8": ("FAILED", 1),
        "6": ("RUNNING", 0),
    }


def test_the_word_of_a_run_before_the_one_that_signed_last_does_not_count(tmp_path):
    folder = JobFolder(tmp_path)
    assert last_word(folder, 1) is None
    leave_exit_code(folder, 1, 130)
    assert last_word(folder, 1) == 130
    sign(folder, 1)
    os.utime(folder.exit_code(1), ns=(0, folder.lock.stat().st_mtime_ns - 1))
    assert exit_code(folder, 1) == 130
    assert last_word(folder, 1) is None
    leave_exit_code(folder, 1, 0)
    assert last_word(folder, 1) == 0


def test_placeholders_are_filled_and_the_shells_own_braces_are_left():
    template = "#!/bin/bash\n# {job}: ${HOME} { true; } {a,b} {} \\{job}\nexec {command}\n"
    filled = fill(template, {"job": "x-1", "command": "python -m it"}, where=HERE)
    assert filled == "#!/bin/bash\n# x-1: ${HOME} { true; } {a,b} {} \\{job}\nexec python -m it\n"


def test_all_that_is_wrong_in_a_template_is_said_at_once():
    with pytest.raises(ConfigError) as error:
        fill("{job} {gpu} {comand}\n", {"job": "x-1", "command": "python -m it"}, where=HERE)
    for said in ("{gpu} is no placeholder", "{comand} is no", "{command}, which starts", "#!/bin/bash", "{job}"):
        assert said in error.value.sentence()


def test_the_template_that_comes_along_can_be_filled():
    values = dict.fromkeys(("command", "gpus", "signal_seconds"), "1")
    assert "{" not in fill(read_template(TEMPLATE), values, where=TEMPLATE)


def test_a_template_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.sh: the template for Slurm cannot be read: No such file"):
        read_template(tmp_path / "gone.sh")


@pytest.mark.parametrize("option", ["--partition=gpu", "--exclusive", "--time=4:00:00", "--constraint=a100|h100"])
def test_long_options_of_sbatch_are_taken(option):
    assert Slurm(options=[option]).options == [option]


@pytest.mark.parametrize("option", ["-p gpu", "--partition gpu", "partition=gpu", "--", "--output=x", "--array=0-3"])
def test_what_is_no_long_option_or_is_the_launchers_own_is_refused(option):
    with pytest.raises(ValidationError):
        Slurm(options=[option])


# -- what Slurm says late, or not at all


@pytest.fixture
def told(tmp_path, monkeypatch) -> PretendedSlurm:
    """Commands that answer as they are told, in place of Slurm's."""
    told = PretendedSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{told.folder}:{os.environ['PATH']}")
    return told


@pytest.fixture
def folder(tmp_path) -> JobFolder:
    path = tmp_path / "job-1"
    path.mkdir()
    return JobFolder(path)


@pytest.fixture
def launcher(tmp_path):
    """Make launchers; each is one of a daemon of its own."""

    def make() -> SlurmLauncher:
        return SlurmLauncher(Slurm(), Home(tmp_path), Queue(every=0.05))

    return make


@pytest.fixture
def hurried(monkeypatch):
    """A daemon that waits for no answer at all, and submits again soon."""
    monkeypatch.setattr(slurm, "_AT_MOST", 0.0)
    monkeypatch.setattr(slurm_asking, "_FIRST_PAUSE", 0.05)


@pytest.fixture
def impatient(monkeypatch):
    """A daemon that gives up soon."""
    monkeypatch.setattr(slurm, "GIVEN_UP_SECONDS", 0.5)


def start(launcher: SlurmLauncher, folder: JobFolder, *, attempt: int = 1) -> SlurmTrainer:
    needs = Needs(job=folder.path.name, attempt=attempt, gpus=1)
    return launcher.start(folder, log=folder.path.with_suffix(".log"), environment={}, needs=needs)


def status_of(trainer: SlurmTrainer) -> int:
    eventually(lambda: trainer.poll() is not None)
    return trainer.poll()


def is_the_job(trainer: SlurmTrainer, number: str) -> None:
    eventually(lambda: trainer.poll() is None and trainer.id == number, why=f"job {number}")


def entry(folder: JobFolder, state: str, *, number: int = 1, status: int = 0, attempt: int = 1) -> str:
    name = folder.path.name
    return f"{number}|{state}|{status}|None|finetuned-{name}|finetuned {folder.path} {attempt}|"


@pytest.mark.usefixtures("hurried")
def test_the_daemon_does_not_wait_for_a_slow_sbatch_and_hears_its_answer_later(told, launcher, folder):
    told.takes(0.5)
    trainer = start(launcher(), folder)
    assert trainer.id == ""
    assert trainer.poll() is None
    assert trainer.waits == "Slurm has not answered yet"
    is_the_job(trainer, "1")
    told.lists(entry(folder, "COMPLETED"))
    assert status_of(trainer) == 0
    assert len(told.has("submitted")) == 1


@pytest.mark.usefixtures("hurried")
def test_while_sbatch_thinks_about_one_job_the_daemon_asks_it_for_no_other(told, launcher, folder):
    told.takes(0.5)
    one = launcher()
    trainer = start(one, folder)
    with pytest.raises(ConnectionError):
        start(one, folder, attempt=2)
    is_the_job(trainer, "1")


@pytest.mark.usefixtures("hurried")
def test_what_slurm_refuses_after_a_while_fails_the_job_in_its_words(told, launcher, folder):
    told.takes(0.3)
    told.says("sbatch", "invalid partition specified: nowhere")
    assert status_of(start(launcher(), folder)) == ExitCode.BAD_SETTINGS
    [event] = map(parse_event, folder.events.read_bytes().splitlines())
    assert "invalid partition specified: nowhere" in event.data["what"]


@pytest.mark.usefixtures("hurried")
def test_what_slurm_does_not_take_after_a_while_is_submitted_until_it_does(told, launcher, folder):
    told.takes(0.1)
    told.says("sbatch", told.AWAY)
    trainer = start(launcher(), folder)
    eventually(lambda: trainer.poll() is None and len(told.has("submitted")) > 2)
    assert told.AWAY in trainer.waits
    told.comes_back()
    eventually(lambda: trainer.poll() is None and trainer.id)
    assert len(told.has("queue")) == 1


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("taken", [True, False])
def test_one_that_is_stopped_while_nobody_knows_whether_slurm_took_it_is_looked_for(told, launcher, folder, taken):
    told.takes(0.3)
    told.says("sbatch", told.AWAY)
    if taken:
        told.loses_answers()
    trainer = start(launcher(), folder)
    eventually(lambda: trainer.poll() is None and told.has("submitted"))
    told.goes_away()
    trainer.ask_to_stop()
    eventually(lambda: trainer.poll() is None and not trainer._submit, why="no more tries")
    told.comes_back()
    if taken:
        eventually(lambda: trainer.poll() is None and "--state=PENDING 1" in told.has("cancelled"))
        told.lists(entry(folder, "CANCELLED"))
    status_of(trainer)
    assert not trainer.taken


def test_one_that_was_taken_and_whose_answer_came_too_late_is_not_submitted_again(told, launcher, folder):
    one = launcher()
    told.says("sbatch", told.AWAY)
    with pytest.raises(ConnectionError):
        start(one, folder)
    told.says("sbatch", "")
    told.lists(entry(folder, "PENDING", number=7))
    one._queue.now()
    assert start(one, folder).id == "7"
    assert len(told.has("submitted")) == 1
    assert told.has("cancelled") == []


@pytest.mark.parametrize("late", [False, True])
def test_a_daemon_that_has_no_id_finds_its_trainer_as_soon_as_slurm_answers(told, launcher, folder, monkeypatch, late):
    told.lists(entry(folder, "RUNNING", number=7))
    if late:
        monkeypatch.setattr(slurm, "_AT_MOST", 0.0)
    else:
        told.goes_away()
    found = launcher().find(folder, trainer_id="", attempt=1)
    assert found.poll() is None
    told.comes_back()
    is_the_job(found, "7")
    told.lists(entry(folder, "COMPLETED", number=7))
    assert status_of(found) == 0


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("said", [None, 70])
@pytest.mark.parametrize("known", [True, False])
def test_one_that_is_killed_in_a_slurm_that_is_gone_ends_in_the_end_and_the_log_says_where_it_may_be(
    told, launcher, folder, said, known
):
    told.lists(entry(folder, "RUNNING"))
    if not known:
        told.goes_away()
    trainer = launcher().find(folder, trainer_id="1" if known else "", attempt=1)
    trainer.poll()
    told.goes_away()
    if said:
        leave_exit_code(folder, 1, said)
    for _ in range(30):
        assert trainer.poll() is None
        time.sleep(0.02)
    trainer.kill()
    with capture_logs() as logs:
        assert status_of(trainer) == (said or -signal.SIGKILL)
    if said is None:
        look = "scontrol show job 1" if known else "squeue --name=finetuned-job-1"
        assert look in trainer.taken
        assert [line["look"] for line in logs if line["event"] == "given up"] == [look]


@pytest.mark.usefixtures("impatient")
def test_one_that_is_killed_is_not_given_up_while_slurm_answers_and_is_cancelled_there_when_it_comes_back(
    told, launcher, folder
):
    told.lists(entry(folder, "RUNNING"))
    one = launcher()
    trainer = one.find(folder, trainer_id="1", attempt=1)
    trainer.kill()
    for _ in range(50):
        assert trainer.poll() is None
        time.sleep(0.02)
    told.goes_away()
    (folder.path.parent / "bin/cancelled").write_text("")
    assert status_of(trainer) == -signal.SIGKILL
    told.comes_back()
    eventually(lambda: one._queue.tend() or "1" in told.has("cancelled"))


@pytest.mark.parametrize(
    "accounted",
    [
        ("1|FAILED|1:0|finetuned-job-1", -11, -11, ""),
        ("1|COMPLETED|0:0|finetuned-job-1", None, 0, ""),
        ("1|FAILED|70:0|finetuned-job-1", None, 70, ""),
        ("1|FAILED|2:0|finetuned-job-1", None, 130, "Slurm asked it to stop"),  # 130 it was
        ("1|FAILED|2:0|finetuned-job-1", 130, 130, "Slurm asked it to stop"),
        ("1|FAILED|9:0|finetuned-job-1", None, -9, ""),  # 137
        ("1|FAILED|11:0|finetuned-job-1", None, -11, ""),  # 139
        ("1|CANCELLED by 1000|0:15|finetuned-job-1", None, -15, "somebody cancelled it in Slurm"),
        ("1|CANCELLED by 0|0:0|finetuned-job-1", None, -15, "somebody cancelled it in Slurm"),
        ("1|TIMEOUT|0:0|finetuned-job-1", 130, 130, "its time limit was reached"),
        ("1|PREEMPTED|0:15|finetuned-job-1", None, -15, "another job was preferred to it"),
        ("1|NODE_FAIL|1:0|finetuned-job-1", None, -15, "its node failed"),
        ("1|OUT_OF_MEMORY|0:125|finetuned-job-1", None, -9, ""),
        ("1|COMPLETED|0:0|somebody-elses", None, -15, "Slurm does not know it any more"),  # a number given anew
        ("", None, -15, "Slurm does not know it any more"),
        ("sacct: warning: of some kind\n\n1|FAILED|65:0|finetuned-job-1", None, 65, ""),
    ],
)
def test_the_end_of_a_job_that_only_the_accounting_remembers(told, launcher, folder, accounted):
    accounts, said, end, why = accounted
    told.lists(entry(folder, "RUNNING"))
    trainer = launcher().find(folder, trainer_id="1", attempt=1)
    eventually(lambda: trainer.poll() is None and trainer._queue.listing)
    told.accounts(f"{accounts}\n")
    if said is not None:
        leave_exit_code(folder, 1, said)
    told.lists()
    assert status_of(trainer) == end
    assert trainer.taken.startswith(why) if why else not trainer.taken


def test_a_trainer_whose_id_was_lost_is_heard_though_slurm_has_forgotten_it(told, launcher, folder):
    told.lists()
    leave_exit_code(folder, 1, 65)
    assert status_of(launcher().find(folder, trainer_id="", attempt=1)) == 65
    assert launcher().find(folder, trainer_id="", attempt=2) is None


def test_where_there_is_no_accounting_a_job_that_the_queue_lost_has_ended_as_it_said(told, launcher, folder):
    (told.folder / "sacct").write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2; exit 1\n")
    told.lists(entry(folder, "RUNNING"))
    trainer = launcher().find(folder, trainer_id="1", attempt=1)
    told.lists()
    leave_exit_code(folder, 1, 70)
    assert status_of(trainer) == 70
