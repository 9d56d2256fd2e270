"""How a process that is asked answers, and what it says where it cannot: real processes, each with work of its own."""

from __future__ import annotations

import pytest
import transformers

from conftest import write_jsonl
from finetuned.asking import Terms, ask
from finetuned.config import settings_from
from finetuned.errors import FinetunedError, OutOfMemoryError
from finetuned.trainer import datagen, saying

ANSWERER = """
import os, signal, sys
from finetuned.errors import ConfigError
from finetuned.trainer.saying import answer, say

def work(order):
    say({"doing": "thinking"})
    WORK

answer(work, if_memory="Add memory.")
"""


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Let a process do some work on a file: what it answers. What it said before is in `asked.heard`."""

    def one(work: str) -> dict:
        (tmp_path / "answerer.py").write_text(ANSWERER.replace("WORK", work))
        terms = Terms(settings_from({}, where="the test"), tmp_path, tmp_path / "models")
        return ask("answerer", tmp_path / "x.jsonl", terms, gpu=None, heard=one.heard.append, more=3)

    one.heard = []
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return one


def test_it_says_how_far_it_is_and_answers_at_last(asked, tmp_path):
    assert asked("return {'of': order['file'], 'twice': 2 * order['more']}") == {
        "of": str(tmp_path / "x.jsonl"),
        "twice": 6,
    }
    assert asked.heard[0] == {"doing": "thinking"}


WRONG = {
    "raise ConfigError('is odd', where='config.json', remedy='Mend it.')": (
        "bad_settings",
        "config.json: is odd. Mend",
    ),
    "open(order['base_dir'] + '/nowhere')": ("unreadable", "/nowhere: cannot be read or written: No such file"),
    "raise MemoryError('std::bad_alloc')": ("out_of_memory", "x.jsonl: memory ran out: std::bad_alloc. Add memory."),
    "raise MemoryError": ("out_of_memory", "memory ran out"),
    "import torch; torch.empty(2**60)": ("out_of_memory", "allocate 4611686018427387904 bytes"),
    "raise RuntimeError('no such kernel')": ("error", "broke off: Traceback"),
    "import torch; raise RuntimeError('no such kernel')": ("error", "no such kernel"),
    "os.kill(os.getpid(), signal.SIGKILL)": ("error", "it was killed, as a system does that is out of memory"),
}


@pytest.mark.parametrize("work", WRONG)
def test_what_went_wrong_is_told_as_what_it_is(asked, work):
    code, said = WRONG[work]
    with pytest.raises(FinetunedError) as caught:
        asked(work)
    assert caught.value.code == code
    assert said in str(caught.value)


def test_memory_that_no_batch_of_answers_fits_into_is_told_with_a_remedy(tmp_path, tiny_model, monkeypatch):
    """And not before one question alone was tried."""
    sizes = []

    def short_of_memory(_, *, input_ids, **__):
        sizes.append(len(input_ids))
        raise MemoryError

    monkeypatch.setattr(transformers.GenerationMixin, "generate", short_of_memory)
    rows = [{"prompt": f"{n} + 1?", "completion": str(n + 1)} for n in range(2)]
    settings = settings_from(
        {"model": str(tiny_model), "judge": {"kind": "number"}, "rft": {"samples": 2}}, where="the test"
    )
    order = {
        "file": str(write_jsonl(tmp_path / "x.jsonl", rows)),
        "out": str(tmp_path / "kept.jsonl"),
        "settings": settings.model_dump(),
        "base_dir": str(tmp_path),
        "models": str(tmp_path / "models"),
    }
    with pytest.raises(OutOfMemoryError, match=r"memory ran out: 4 of 4 answers.*Set rft.max_new_tokens lower"):
        saying.work_on(order, datagen.make, if_memory=datagen.IF_MEMORY)
    assert sizes == [4, 2, 1, 1, 1, 1]
