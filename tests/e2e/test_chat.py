"""`finetuned chat` with a tiny model's adapter, through a pipe and on a terminal."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from conftest import chat_rows, eventually, write_jsonl
from finetuned.errors import harmless
from finetuned.trainer.chatting import _Streamer
from test_training import Run

SYSTEM = "You say numbers."
LENGTH = 12


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    data = write_jsonl(folder / "data.jsonl", chat_rows(16))
    settings = {"model": str(tiny_model), "learning_rate": 2e-2, "epochs": 4, "system_prompt": SYSTEM}
    return Run(folder / "job", data, **settings).done().adapter


@pytest.fixture
def settled(home, adapter) -> Path:
    """A base directory with the adapter in it, as the newest one."""
    shutil.copytree(adapter, home.adapters / "numbers")
    (home.adapters / "latest").symlink_to("numbers")
    return home.root


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "finetuned", "chat", *map(str, words)]


def chat(*words: object, said: str = "", code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != "FINETUNED_HOME"}
    done = subprocess.run(
        command(*words), input=said, capture_output=True, text=True, cwd=cwd, env=clean, check=False, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def reference(tiny_model: Path, adapter: Path, question: str, *, base: bool = False) -> str:
    """What the libraries alone answer, with the template and the system prompt that were saved."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = model if base else PeftModel.from_pretrained(model, adapter)
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    found = model.generate(input_ids=inputs["input_ids"], max_new_tokens=LENGTH, do_sample=False)
    return harmless(tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


QUESTIONS = ["Say the number 3", "Say the number 12 please please"]


def test_lines_of_a_pipe_are_answered_by_the_newest_adapter_as_by_the_libraries_alone(settled, tiny_model, adapter):
    """Each by itself: with template and system prompt as they were saved."""
    done = chat("--base-dir", settled, "--max-new-tokens", LENGTH, said="\n".join(QUESTIONS) + "\n\n")
    expected = [f"> {question}\n{reference(tiny_model, adapter, question)}\n" for question in QUESTIONS]
    assert done.stdout == "\n".join(expected) + "\n"


def test_base_and_adapter_answer_one_after_the_other(adapter, tiny_model, tmp_path):
    done = chat(adapter, "--compare", "--max-new-tokens", LENGTH, said=QUESTIONS[0], cwd=tmp_path)
    base, tuned = (reference(tiny_model, adapter, QUESTIONS[0], base=which) for which in (True, False))
    assert base != tuned
    assert done.stdout == f"> {QUESTIONS[0]}\n[base]\n{base}\n[adapter]\n{tuned}\n\n"


def test_on_a_terminal_base_and_adapter_answer_side_by_side(adapter, tmp_path):
    master, slave = pty.openpty()
    words = command(adapter, "--compare", "--max-new-tokens", LENGTH)
    wide = {**os.environ, "COLUMNS": "80"}
    said = f"{QUESTIONS[0]}\n"
    subprocess.run(words, input=said, stdout=slave, text=True, cwd=tmp_path, env=wide, check=True, timeout=120)
    os.close(slave)
    shown = os.read(master, 2**16).decode().splitlines()
    os.close(master)
    assert f"{'[base]':<38} | [adapter]" in shown


def test_a_full_fine_tune_is_compared_with_the_model_that_it_was(tmp_path, tiny_model):
    data = write_jsonl(tmp_path / "data.jsonl", chat_rows(16))
    settings = {"tuning": "full", "learning_rate": 1e-2, "epochs": 2, "system_prompt": None}
    model = Run(tmp_path / "job", data, model=str(tiny_model), **settings).done().adapter
    said = chat(model, "--compare", "--max-new-tokens", LENGTH, said="Say the number 3\n").stdout
    base, tuned = said.partition("[base]\n")[2].split("[adapter]\n")
    assert base.strip()
    assert base.strip() != tuned.strip()


def test_what_is_not_there_is_named(home, adapter, tmp_path):
    said = chat("--base-dir", home.root, code=78).stderr
    assert "there is no adapter yet" in said
    said = chat("nothing", "--base-dir", home.root, code=78).stderr
    assert "nothing: there is no adapter in such a folder" in said
    assert "not a base directory" in chat(cwd=tmp_path, code=78).stderr
    said = chat(adapter, "--model", tmp_path / "gone", code=78).stderr
    assert "there is no such folder" in said
    assert "Traceback" not in said


def test_an_adapter_without_a_tokenizer_and_a_home_of_nobody_are_told_in_a_sentence(adapter, tmp_path):
    bare = shutil.copytree(adapter, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    said = chat(bare, code=78).stderr
    assert "there is no tokenizer that can be read" in said
    assert "Traceback" not in said
    assert "no adapter in such a folder" in chat("~no-such-user/x", code=78).stderr


def test_a_pipe_may_hold_anything_and_be_closed_at_any_time(adapter):
    words = command(adapter, "--max-new-tokens", LENGTH)
    done = subprocess.run(words, input=b"Say \xff\xfe\n", capture_output=True, check=True, timeout=120)
    assert b"no answer" not in done.stderr
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    _, complaints = process.communicate(b"Say the number 3\n" * 20, timeout=120)
    assert complaints == b""
    assert process.returncode == 0


def test_what_begins_with_a_space_after_a_line_s_end_keeps_it(capsys):
    """As in programs, with tokenizers whose tokens begin with the space before a word."""
    words = ["<unk>", "\u2581def", "\n", "\u2581\u2581", "\u2581x"]
    core = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    core.decoder = decoders.Metaspace()
    streamer = _Streamer(PreTrainedTokenizerFast(tokenizer_object=core), shown=True)
    for tokens in ([0, 0], [1], [2], [3], [4]):
        streamer.put(torch.tensor(tokens))
    streamer.end()
    assert capsys.readouterr().out == "def\n   x\n"
    assert streamer.text == "def\n   x"


class Talk:
    def __init__(self, *words: object) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command(*words), stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(slave)
        self.said = ""

    def read(self) -> str:
        try:
            while select.select([self.master], [], [], 0)[0]:
                self.said += os.read(self.master, 2**16).decode("utf-8", "replace")
        except OSError:  # the other end is closed
            pass
        return self.said

    def type(self, text: str) -> int:
        """Type, and give where in what is said the echo begins."""
        at = len(self.read())
        os.write(self.master, text.encode())
        return at

    def prompted(self, times: int) -> None:
        eventually(lambda: self.read().count("> ") >= times, why=f"{times} prompts in {self.said[-2000:]!r}")


def test_on_a_terminal_ctrl_c_ends_an_answer_and_ctrl_d_the_chat(adapter):
    talk = Talk(adapter, "--max-new-tokens", 900)
    try:
        eventually(lambda: "Ctrl-D ends it" in talk.read() and talk.said.endswith("> "), why="the first prompt")
        at = talk.type("Say the number 3\n")
        eventually(lambda: len(talk.read()) > at + 40, why="an answer that comes bit by bit")
        talk.process.send_signal(signal.SIGINT)
        talk.prompted(2)
        assert len(talk.said) - at < 700
        talk.process.send_signal(signal.SIGINT)  # with nothing to end
        eventually(lambda: "Ctrl-D ends the chat." in talk.read())
        assert talk.process.poll() is None
        talk.type("/new\n")
        talk.prompted(4)
        talk.type("\x04")
        assert talk.process.wait(60) == 0
        assert "Traceback" not in talk.read()
    finally:
        talk.process.kill()
        talk.process.wait()
        os.close(talk.master)
