"""The benchmark at a job's end: where its figures go, and that nothing in it costs a job its adapter."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import answers_kept, chat_rows, eventually, write_config, write_jsonl
from finetuned.events import EventType, ExitCode, parse_event
from finetuned.jobs import Outcome
from finetuned.scores import table
from test_training import Run


def run(tmp_path: Path, model: Path, *, rows=None, **settings) -> Run:
    data = write_jsonl(tmp_path / "data.jsonl", chat_rows(16))
    write_jsonl(tmp_path / "held.jsonl", rows or chat_rows(6, start=100))
    values = {"model": str(model), "benchmark": str(tmp_path / "held.jsonl"), "benchmark_tokens": 8, "epochs": 4}
    return Run(tmp_path / "job", data, **{**values, **settings})


def story_of(one: Run) -> dict:
    return json.loads((one.adapter / "finetuned.json").read_text())


def events_of(one: Run, kind: EventType) -> list:
    events = [parse_event(line) for line in one.folder.events.read_bytes().splitlines()]
    return [event for event in events if event.type is kind]


def assert_by_hand_the_same(base_dir: Path, one: Run) -> None:
    """Its base is the model without the adapter, and nothing of the training is left in it."""
    words = ["eval", str(one.adapter), "--data", str(base_dir / "held.jsonl"), "--max-new-tokens", "8", "--json"]
    (base_dir / "config.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "finetuned", *words, "--base-dir", str(base_dir)],
        capture_output=True,
        text=True,
        check=True,
    )
    by_hand, at_the_end = json.loads(done.stdout)["models"], story_of(one)["benchmark"]["models"]
    for one_way, other in zip(by_hand, at_the_end, strict=True):
        assert one_way["loss"]["value"] == pytest.approx(other["loss"]["value"], abs=1e-4)
        assert one_way["accuracy"] == other["accuracy"]


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_figures_stand_in_event_manifest_and_model_card_and_are_those_of_a_measurement_by_hand(
    tmp_path, tiny_model, tuning
):
    one = run(tmp_path, tiny_model, rows=[*chat_rows(5, start=100), *chat_rows(1, start=3)], tuning=tuning).done()
    facts = story_of(one)["benchmark"]
    (event,) = events_of(one, EventType.BENCHMARK)
    assert event.data == facts
    base, trained = facts["models"]
    assert (base["name"], trained["name"], trained["accuracy"]["of"]) == ("base", "trained", 6)
    assert trained["loss"]["value"] < base["loss"]["value"]
    assert [(row["line"], row["file"], row["of_line"]) for row in facts["overlap"]["rows"]] == [(6, "data.jsonl", 4)]
    assert trained["accuracy_unseen"]["of"] == 5
    card = (one.adapter / "README.md").read_text()
    assert f"| {' | '.join(table(facts)[2])} |" in card
    assert "CONTAMINATED: 1 of 6 rows" in card
    if tuning == "lora":
        assert_by_hand_the_same(tmp_path, one)


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([{"messages": []}], {}, "1 of 1 row cannot be used"),
        (None, {"judge": {"kind": "json"}}, "expected answers cannot be judged by json"),
        (None, {"benchmark": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
    ids=str,
)
def test_one_that_cannot_be_made_is_told_and_the_job_succeeds(tmp_path, tiny_model, rows, settings, said):
    one = run(tmp_path, tiny_model, rows=rows, **settings).done()
    assert said in story_of(one)["benchmark"]["error"]
    warnings = [event.message for event in events_of(one, EventType.MESSAGE) if event.level == "warning"]
    assert any("the benchmark is left out" in message and said in message for message in warnings)
    assert "Measured on" not in (one.adapter / "README.md").read_text()


def asked(one: Run) -> list[tuple[str, str]]:
    kept = one.folder.path.parent / "evaluations"  # beside the models, which here are in the job's folder
    return [(file.name, key) for file in kept.glob("*.jsonl") for key, _ in answers_kept(file)]


LONG = {"rows": chat_rows(32, start=100), "benchmark_tokens": 150}


def test_one_that_is_stopped_goes_on_where_it_was(tmp_path, tiny_model):
    one = run(tmp_path, tiny_model, **LONG)
    process = one.start()
    eventually(lambda: asked(one))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == ExitCode.STOPPED
    before = asked(one)
    assert 0 < len(before) < 64
    assert one.done().adapter
    assert set(before) < set(asked(one))
    assert len(asked(one)) == len(set(asked(one))) == 64
    assert story_of(one)["benchmark"]["models"][1]["accuracy"]["of"] == 32


def test_one_that_takes_its_process_down_is_not_tried_again(tmp_path, tiny_model):
    one = run(tmp_path, tiny_model, **LONG)
    process = one.start()
    eventually(lambda: asked(one))
    process.kill()
    process.wait()
    assert story_of(one.done())["benchmark"] == {"error": "an attempt ended in it"}


def test_a_daemon_s_job_is_measured_and_shown(home, daemon, tiny_model):
    held = write_jsonl(home.root / "held.jsonl", chat_rows(4, start=100))
    write_config(home, model=str(tiny_model), benchmark=held.name, benchmark_tokens=4)
    staged = write_jsonl(home.root / "x.jsonl", chat_rows(8))
    one = daemon()
    staged.rename(home.inbox / "x.jsonl")
    job = one.job("x.jsonl")
    assert job.outcome is Outcome.SUCCEEDED, job.reason
    one.says("benchmark held.jsonl: accuracy 0.0% (base 0.0%), loss ")
    words = [sys.executable, "-m", "finetuned", "predictions", "--base-dir", str(home.root), "x"]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "benchmark held.jsonl: accuracy 0.0%" in told
    facts = json.loads(subprocess.run([*words, "--json"], capture_output=True, text=True, check=True).stdout)
    assert facts["benchmark"]["overlap"]["files"] == ["x.jsonl"]
