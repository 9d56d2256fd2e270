"""`report_to`: what trackers get, and that none of them can end a training."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import accelerate.tracking
import pytest

from conftest import chat_rows, write_jsonl
from finetuned.config import check_overrides
from finetuned.errors import ConfigError
from finetuned.events import EventType, ExitCode
from finetuned.trainer import trackers
from finetuned.trainer.reporter import Reporter
from finetuned.trainer.trackers import figures_of, reporting
from test_training import Run


def test_the_figures_of_a_step_are_reported_and_what_is_no_figure_is_not():
    data = {"step": 3, "total_steps": 9, "train_loss": 0.5, "grad_norm": math.inf, "note": "x"}
    assert figures_of(EventType.METRICS, data) == {"train_loss": 0.5}
    samples = [{"exact": True, "similarity": 1.0}, {"exact": False, "similarity": 0.5}]
    told = figures_of(EventType.PREDICTIONS, {"step": 3, "samples": samples})
    assert told == {"predictions_exact": 0.5, "predictions_similarity": 0.75}
    assert figures_of(EventType.CHECKPOINT, {"step": 3}) == {}


class Tracker:
    """One of accelerate's kind, as a user's library would be behind it."""

    requires_logging_directory = True
    told: list

    def __init__(self, name, logging_dir):
        self.told = [("begun", name, Path(logging_dir).name)]
        type(self).last = self

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.told.append(("settings", values["epochs"]))

    def log(self, values, step):
        self.told.append((step, values))

    def finish(self):
        self.told.append("finished")


class Breaking(Tracker):
    def log(self, values, step):
        super().log(values, step)
        raise SystemExit("no such project")


class Hanging(Tracker):
    def log(self, values, step):
        time.sleep(1000)


@pytest.fixture
def report(tmp_path, monkeypatch):
    def report(**kinds) -> str:
        monkeypatch.setattr(accelerate.tracking, "LOGGER_TYPE_TO_CLASS", kinds)
        monkeypatch.setattr(trackers, "_LAST_WAIT", 5.0 if Hanging not in kinds.values() else 0.2)
        say = Reporter(tmp_path / "events.jsonl")
        settings = {"epochs": 2, "predictions": {}}
        with reporting(say, list(kinds), job="x-1", settings=settings, folder=tmp_path / "tracking", cpu=True):
            for step in (1, 2):
                say.say(EventType.METRICS, "a step", step=step, train_loss=1 / step)
        say.say(EventType.METRICS, "afterwards", step=3, train_loss=0.0)
        return (tmp_path / "events.jsonl").read_text()

    return report


def test_a_tracker_gets_job_settings_and_each_step_in_order(report):
    assert "report_to" not in report(aim=Tracker)
    steps = [(1, {"train_loss": 1.0}), (2, {"train_loss": 0.5})]
    assert Tracker.last.told == [("begun", "x-1", "aim"), ("settings", 2), *steps, "finished"]


def test_one_that_fails_is_left_out_with_a_warning_and_the_others_go_on(report):
    said = report(wandb=Breaking, aim=Tracker, dvclive=lambda **_: None)
    assert said.count("report_to ") == 2
    assert "report_to dvclive: " in said
    assert Tracker.last.told[-1] == "finished"


def test_one_that_hangs_holds_up_no_step(report):
    said = report(aim=Hanging)
    assert said.index("afterwards") > said.index("not all was reported")


def test_a_training_whose_trackers_are_not_there_goes_on_and_says_so(tmp_path, tiny_model):
    data = write_jsonl(tmp_path / "data.jsonl", chat_rows(8))
    run = Run(tmp_path / "job", data, model=str(tiny_model), report_to=["aim", "clearml"])
    run.done()
    warned = [event.message for event in run.events(EventType.MESSAGE) if "report_to" in event.message]
    assert len(warned) == 2
    assert all("the training goes on without it" in message for message in warned)


AIM = """
import threading, time

threading.Thread(target=time.sleep, args=(1000,), daemon=False).start()  # Python waits for it at its end


class Run:
    def __init__(self, **_): pass
    def __setitem__(self, *_): pass
    def track(self, *_, **__): pass
    def close(self): pass
"""


def test_a_tracker_that_does_not_let_the_process_end_cannot_hold_up_the_next_job(tmp_path, tiny_model):
    (tmp_path / "aim.py").write_text(AIM)
    data = write_jsonl(tmp_path / "data.jsonl", chat_rows(8))
    run = Run(tmp_path / "job", data, model=str(tiny_model), report_to=["aim"])
    search = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert run.attempt(environment={"PYTHONPATH": search}) == ExitCode.DONE
    assert "report_to" not in run.log


def test_tensorboard_reads_what_was_reported(tmp_path, tiny_model):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = write_jsonl(tmp_path / "data.jsonl", chat_rows(16))
    held_out = write_jsonl(tmp_path / "held-out.jsonl", chat_rows(2, start=50))
    settings = {"model": str(tiny_model), "eval_file": str(held_out), "report_to": ["tensorboard"]}
    run = Run(tmp_path / "job", data, **settings).done()
    assert "report_to" not in run.log
    found = EventAccumulator(str(run.folder.path / "logs" / "tracking" / "tensorboard" / run.spec.id)).Reload()
    losses = [(point.step, point.value) for point in found.Scalars("train_loss")]
    assert losses == [(step["step"], pytest.approx(step["train_loss"])) for step in run.steps()]
    assert [point.step for point in found.Scalars("valid_loss")] == [0, 4]
    assert [point.step for point in found.Scalars("predictions_similarity")] == [0, 4]


def test_an_override_cannot_send_figures_elsewhere():
    with pytest.raises(ConfigError, match="report_to"):
        check_overrides({"report_to": ["wandb"]}, where="x.config.json")
