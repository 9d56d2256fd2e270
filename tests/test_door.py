"""A file's way in: what is learned of hard texts, what two processes do at once, what is kept and what it may be."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path

import pytest
from tokenizers import normalizers

from chat_templates import CHATML, tokenizer_for
from conftest import chat_rows, write_jsonl
from finetuned.config import TrainingSettings
from finetuned.trainer import store
from finetuned.trainer.base import without_padding
from finetuned.trainer.door import Door, split, tell_overlap

SETTINGS = TrainingSettings(system_prompt=None, max_length=256)


def pair(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def door_to(cache: Path, tokenizer=None, **settings) -> Door:
    chosen = SETTINGS.model_copy(update=settings)
    return Door(tokenizer or tokenizer_for(CHATML), chosen, cache=cache)


def learned(examples, tokenizer) -> list[list[str]]:
    """The texts that are learned, row by row."""
    rows = []
    for example in examples:
        runs = groupby(zip(example.ids, example.supervised, strict=True), key=lambda one: one[1])
        rows.append([tokenizer.decode([token for token, _ in run]) for kept, run in runs if kept])
    return rows


def read(tmp_path, rows: list, tokenizer=None, **settings):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return door_to(tmp_path / "cache", tokenizer, **settings).read(path, name=path.name)


def test_padding_that_a_tokenizer_was_saved_with_gets_into_no_row(tmp_path):
    tokenizer = tokenizer_for(CHATML)
    tokenizer.backend_tokenizer.enable_padding(direction="left", pad_id=0)
    tokenizer.backend_tokenizer.enable_truncation(16)
    without_padding(tokenizer)  # as load_tokenizer does
    examples, report = read(tmp_path, [pair("a", "b" * 20), pair("a", "b")], tokenizer)
    assert not report.faults
    assert learned(examples, tokenizer) == [["b" * 20 + "<|im_end|>"], ["b<|im_end|>"]]


def test_an_answer_that_ends_with_a_mark_still_has_its_end_learned(tmp_path):
    tokenizer = tokenizer_for(CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|box_end|>"]})
    examples, _ = read(tmp_path, [pair("where?", "at (1,2)<|box_end|>")], tokenizer)
    assert learned(examples, tokenizer) == [["at (1,2)<|box_end|><|im_end|>"]]


@pytest.mark.parametrize(
    ("question", "answer"), [("\u09df", "\u09ad\u09be\u09b2\u09c7\u09be"), ("\u09c7\u09be", "\u09b8\u09ae\u09df")]
)
def test_letters_that_a_tokenizer_writes_in_another_way_shift_no_label(tmp_path, question, answer):
    """One takes three bytes more so, the other three fewer, and the sum of bytes tells nothing."""
    tokenizer = tokenizer_for(CHATML)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    ((text,),) = learned(read(tmp_path, [pair(question, answer)], tokenizer)[0], tokenizer)
    assert text == normalizers.NFC().normalize_str(answer) + "<|im_end|>"


def test_a_plain_text_keeps_its_end_wherever_it_falls(tmp_path):
    tokenizer = tokenizer_for(CHATML)
    for length in range(60, 70):
        examples, _ = read(tmp_path, [{"text": "a" * length}], tokenizer, max_length=32)
        ids = [token for example in examples for token in example.ids]
        assert (tokenizer.decode(ids[:-1]), ids[-1]) == ("a" * length, tokenizer.eos_token_id)
        assert min(len(example.ids) for example in examples) > 1


@pytest.mark.parametrize("answer", ["1" * 50_000 + " and so on", "1" * 300 + " " * 20_000 + "a", "1," * 30_000])
def test_long_answers_of_digits_are_read_in_no_time(tmp_path, answer):
    began = time.process_time()
    _, report = read(tmp_path, [pair("go on", answer)], max_length=2048)
    assert "bare_number_answers" not in report.warnings
    assert time.process_time() - began < 5


def test_answers_in_a_prompt_are_not_learned_again(tmp_path):
    tokenizer = tokenizer_for(CHATML)
    asked = [*pair("a", "old")["messages"], {"role": "user", "content": "b"}]
    row = {"prompt": asked, "completion": [{"role": "assistant", "content": "new"}]}
    assert learned(read(tmp_path, [row], tokenizer)[0], tokenizer) == [["new<|im_end|>"]]


def test_a_number_that_lost_digits_is_a_fault_also_within_a_value(tmp_path):
    path = tmp_path / "rows.jsonl"
    line = '{"prompt": "a", "completion": {"id": 123456789012345678901234567890}}'
    path.write_text(f"{line}\n{json.dumps(pair('a', 'b'))}\n")
    _, report = door_to(tmp_path / "cache").read(path, name=path.name)
    assert report.faults["data_type"].lines == [1]


def test_a_question_beside_a_text_is_no_plain_text(tmp_path):
    _, report = read(tmp_path, [{"text": "a b c"}, {"text": "a b c", "instruction": "a", "output": "b"}])
    assert report.faults["mixed_formats"].lines == [2]


def test_rows_held_out_and_trained_are_counted_among_the_held_out(tmp_path):
    door = door_to(tmp_path / "cache")
    train, report = door.read(write_jsonl(tmp_path / "a.jsonl", chat_rows(50)), name="a.jsonl")
    held_out, _ = door.read(write_jsonl(tmp_path / "b.jsonl", chat_rows(4, start=48)), name="b.jsonl")
    tell_overlap(train, held_out, report)
    found = report.as_dict()["warnings"]["eval_overlap"]
    assert (found["count"], found["share"]) == (2, 0.5)


def test_pieces_of_a_text_are_one_row_and_stay_on_one_side(tmp_path):
    examples, _ = read(tmp_path, [{"text": f"{n} " + "word " * 40} for n in range(20)], max_length=32)
    train, held_out = split(examples, 0.5)
    assert len(examples) > len(examples.rows()) == 20
    assert len(train.rows()) + len(held_out.rows()) == 20
    assert not {*train.column(store.LINE)} & {*held_out.column(store.LINE)}


READ_OFTEN = """
import sys
from pathlib import Path
from chat_templates import CHATML, tokenizer_for
from finetuned.config import TrainingSettings
from finetuned.trainer import store
from finetuned.trainer.door import Door

path, cache = map(Path, sys.argv[1:])
door = Door(tokenizer_for(CHATML), TrainingSettings(system_prompt=None), cache=cache)
for _ in range(60):
    store.prune(cache, kept_days=0)
    assert len(door.read(path, name="x")[0]) == 30
"""


def test_processes_that_read_the_same_file_at_once_do_not_disturb_each_other(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", chat_rows(30))
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READ_OFTEN, str(path), str(tmp_path / "cache")],
            env={**os.environ, "PYTHONPATH": paths},
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for reader in readers:
        _, said = reader.communicate(timeout=120)
        assert reader.returncode == 0, said


def test_what_was_changed_while_it_was_read_is_not_kept(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", chat_rows(3))
    before = path.read_bytes()

    def change(*_) -> None:
        os.utime(path, ns=(1, 1))

    door = door_to(tmp_path / "cache")
    assert len(door.read(path, name="x", progress=change)[0]) == 3
    assert not [one for one in (tmp_path / "cache").iterdir() if not one.name.startswith(".")]
    assert path.read_bytes() == before


def test_a_full_disk_gives_the_tokens_of_other_files_back(tmp_path, monkeypatch):
    door, cache = door_to(tmp_path / "cache"), tmp_path / "cache"
    door.read(write_jsonl(tmp_path / "a.jsonl", chat_rows(3)), name="a")
    finish = store.Writer.finish

    def full(writer, *given, **named):
        if [one for one in cache.iterdir() if not one.name.startswith(".")]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return finish(writer, *given, **named)

    monkeypatch.setattr(store.Writer, "finish", full)
    assert len(door.read(write_jsonl(tmp_path / "b.jsonl", chat_rows(5)), name="b")[0]) == 5
    assert len(list(cache.iterdir())) == 1
