"""What others bring along can do no harm: settings beside data, weights, names, output for a terminal."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from contextlib import redirect_stdout

import pytest
import structlog

from finetuned.config import Config, TrainingSettings, check_overrides, resolve
from finetuned.errors import ConfigError, FinetunedError, harmless
from finetuned.events import parse_event
from finetuned.home import data_extension, printable, safe_name
from finetuned.logs import set_up_logging
from finetuned.trainer.reporter import Reporter

# Settings that take text, and why an override may or may not set them. A new one must be judged here.
TEXT = {
    "model": "a hub id alone",
    "revision": "a branch, tag or commit alone",
    "resume_adapter": "refused",
    "eval_file": "refused",
    "benchmark": "refused",
    "teacher": "a hub id alone",
    "teacher_revision": "a branch, tag or commit alone",
    "system_prompt": "is only shown to the model",
    "target_modules": "is only compared with names",
}
PLACES = ["/etc/passwd", "../../x", "~/x", "./x", "..", "a/../../etc", "-x/../y", "file:///etc", "a\\..\\b", "a//b"]


def overridden(**changes: object) -> TrainingSettings:
    return resolve(Config(), "", check_overrides(changes, where="x.config.json"))


def test_every_setting_that_takes_text_is_judged():
    taking = set()
    for name in TrainingSettings.model_fields:
        for value in ("some-text", ["some-text"]):
            try:
                TrainingSettings(**{name: value})
            except ValueError:
                continue
            taking.add(name)
    assert taking == TEXT.keys()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("setting", sorted(name for name, why in TEXT.items() if not why.startswith("is only")))
def test_an_override_names_no_place(setting, place):
    with pytest.raises(ConfigError):
        overridden(**{setting: place})


def test_an_override_names_a_model_of_the_hub():
    for model in ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-0.5B"):
        for revision in ("main", "v1.0", "refs/pr/1", "a1b2c3d4"):
            settings = overridden(model=model, revision=revision)
            assert (settings.model, settings.revision) == (model, revision)


@pytest.mark.parametrize("setting", [*sorted({*Config.model_fields} - {*TrainingSettings.model_fields}), "command"])
def test_an_override_sets_training_settings_alone(setting):
    with pytest.raises(ConfigError, match="no such setting"):
        overridden(**{setting: 1})


def test_an_override_allows_no_foreign_code():
    with pytest.raises(ConfigError):
        overridden(trust_remote_code=True)
    with pytest.raises(ConfigError):
        resolve(Config(trust_remote_code=True), "", check_overrides({"model": "some/model"}, where="x"))
    assert not Config().trust_remote_code


# -- weights


class Trap:
    """Runs a command where it is unpickled."""

    def __init__(self, told) -> None:
        self.told = told

    def __reduce__(self):
        return (os.system, (f"touch {self.told}",))


def test_a_model_without_safetensors_is_refused_and_its_weights_are_not_read(tiny_model, tmp_path):
    import torch

    from finetuned.errors import ModelError
    from finetuned.trainer.base import Base
    from finetuned.trainer.model import load_model
    from finetuned.trainer.precision import choose

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    cpu = torch.device("cpu")
    precision = choose(cpu, "lora", "float32")
    with pytest.raises(ModelError, match="no weights in safetensors") as caught:
        load_model(Base(str(folder), "x"), TrainingSettings(), tuning="lora", precision=precision, device=cpu)
    assert caught.value.code == "no_safetensors"
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_runs_nothing(tmp_path):
    import torch
    from safetensors.torch import save_file

    from finetuned.trainer.checkpoint import Checkpoint, load

    save_file({"a": torch.zeros(1)}, tmp_path / "trained.safetensors")
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError):
        load(Checkpoint(tmp_path, 1, "plan", {}), device=torch.device("cpu"))
    assert not (tmp_path / "sprung").exists()


# -- names and terminals

NAMES = [
    b"-rf.jsonl",
    b"a\nb.jsonl",
    b"\x1b[31m\x1b]0;owned\x07.jsonl",
    b"\xff\xfe\x9b2J.jsonl",
    b"\xc2\x9b2J.jsonl",
    "\u202egnp.jsonl".encode(),
    b"~root.jsonl",
    b"$(touch x);`y`.jsonl",
    b"a\\..\\b.jsonl",
    b"..%2f..%2fetc.jsonl",
    b"n" * 249 + b".jsonl",
    b".jsonl.jsonl",
    "数字.jsonl".encode(),
]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_made_of_a_name_stays_in_its_folder_and_in_its_line(name):
    made = safe_name(name)
    assert made.isascii()
    assert set(made) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert made[0] not in "-."
    assert len(made) <= 48
    assert data_extension(name) == ".jsonl"
    shown = printable(name)
    assert harmless(shown) == shown
    assert len(shown.splitlines()) == 1


def test_a_name_with_a_line_end_behind_its_ending_is_no_data_file():
    assert data_extension(b"x.jsonl\n") == ""


def test_what_moves_a_terminal_is_shown_as_a_backslash_sequence():
    hostile = "\x00\x07\x1b\r\x7f\x9b\x9f\u202e\u2028\u2066\udcff"
    assert harmless(hostile) == "\\x00\\x07\\x1b\\r\\x7f\\x9b\\x9f\\u202e\\u2028\\u2066\\udcff"
    assert printable(b"\xff\x1b\t\n") == "\\xff\\x1b\\t\\n"


def test_letters_of_all_scripts_are_shown_as_they_are():
    text = "naïve 数字 عربي 👩‍🔬\u00a0x\n\ttab"
    assert harmless(text) == text


HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\x7f\r\u202ex"


def test_no_log_line_holds_what_moves_a_terminal(tmp_path, capsys):
    before = structlog.get_config()
    try:
        set_up_logging(tmp_path)
        structlog.get_logger().warning(f"event {HOSTILE}", what=HOSTILE, where=f"a\nb{HOSTILE}")
    finally:
        structlog.configure(**before)
    [log] = tmp_path.glob("daemon_*.log")
    for text in (log.read_text(), capsys.readouterr().err):
        assert "event" in text
        assert harmless(text) == text
    assert len(log.read_text().splitlines()) == 1


def test_a_trainer_says_nothing_that_moves_a_terminal(tmp_path):
    with redirect_stdout(io.StringIO()) as printed:
        say = Reporter(tmp_path / "events.jsonl")
        say.warn(f"row 1: {HOSTILE}")
        say.error(FinetunedError(HOSTILE, where=HOSTILE, remedy="mend it"))
    assert harmless(printed.getvalue()) == printed.getvalue()
    for line in (tmp_path / "events.jsonl").read_bytes().splitlines():
        event = parse_event(line)
        assert harmless(event.message) == event.message
        assert all(harmless(str(value)) == value for value in event.data.values())
