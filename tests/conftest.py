"""What several tests share: a tiny model, chat files, a base directory, a daemon."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from finetuned.dataset.rows import Message, Row
from finetuned.home import Home
from finetuned.jobs import Job, State
from finetuned.ledger import Ledger

pytest_plugins = ["fixtures_nvml", "fixtures_slurm", "fixtures_web"]

# A test run started in the background of a shell inherits an ignored interrupt key, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def eventually(what: Callable[[], object], *, seconds: float = 120.0, why: str = "") -> object:
    """Poll until `what` gives something true, and give that; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := what():
            return result
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {why or what}")


def chat_rows(count: int, *, start: int = 0) -> list[dict]:
    """Give rows in OpenAI's chat format, of different lengths and no two alike."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Say the number {n}" + " please" * (n % 7)},
                {"role": "assistant", "content": f"The number is {n}." + " Indeed." * (n % 5)},
            ]
        }
        for n in range(start, start + count)
    ]


def row_of(*turns: tuple[str, str], line: int = 1) -> Row:
    """Give a row of (role, text) pairs."""
    return Row(line, tuple(Message(role, text) for role, text in turns))


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers_kept(file: Path) -> list[tuple[str, dict]]:
    """Give the answers in a file that they are kept in, with their keys, but how long they took; not of a torn line."""
    found = []
    for line in file.read_bytes().splitlines():
        with suppress(ValueError):
            found += json.loads(line).items()
    return [(key, {name: part for name, part in fields.items() if name != "seconds"}) for key, fields in found]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer and a ChatML template, as a folder."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


def make_tiny_model(folder: Path) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*special, *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def home(tmp_path) -> Home:
    """An empty base directory, with a config.json that makes a daemon quick."""
    return make_home(tmp_path / "base")


def make_home(root: Path) -> Home:
    home = Home(root)
    for folder in home.folders:
        folder.mkdir(parents=True)
    write_config(home)
    return home


def write_config(home: Home, **settings) -> None:
    """Write config.json, in place of what was there."""
    quick = {"quiet_seconds": 0.2, "rescan_seconds": 1, "dtype": "float32", "batch_size": 4, "epochs": 1}
    quick["web"] = {"enabled": False}  # daemons of tests must not fight for the port
    staged = home.config_file.with_suffix(".new")
    staged.write_text(json.dumps({**quick, **settings}))
    staged.replace(home.config_file)


class Daemon:
    """A real daemon in a process of its own."""

    def __init__(self, home: Home, *options: str, environment: dict[str, str] | None = None, **popen) -> None:
        self.home = home
        self.console = home.logs / "console.log"
        with self.console.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "finetuned", "run", "--base-dir", str(home.root), *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                **popen,
            )

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.home.logs.glob("daemon_*.log")))

    def says(self, text: str, *, seconds: float = 120.0) -> None:
        """Wait until the daemon's log holds the text."""
        eventually(lambda: text in self.log(), seconds=seconds, why=f"{text!r} in:\n{self.log()[-3000:]}")

    def jobs(self) -> list[Job]:
        try:
            ledger = Ledger.open_to_read(self.home.ledger)
        except sqlite3.OperationalError:  # not made yet
            return []
        try:
            return ledger.jobs(*State)
        finally:
            ledger.close()

    def job(self, name: str, *, state: State = State.FINISHED, seconds: float = 200.0) -> Job:
        """Wait until the job of the file `name` is in this state, and give it."""

        def found() -> Job | None:
            return next((j for j in self.jobs() if j.name == os.fsencode(name) and j.state is state), None)

        try:
            return eventually(found, seconds=seconds)
        except AssertionError:
            raise AssertionError(
                f"{name} not {state} within {seconds} s; {self.jobs()}\n{self.log()[-3000:]}"
            ) from None

    def stop(self, number: int = signal.SIGTERM, *, seconds: float = 120.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)


STANDIN = f"{sys.executable} {Path(__file__).with_name('standin_trainer.py')}"


@pytest.fixture
def standin(monkeypatch) -> Callable[..., None]:
    """Let daemons start a stand-in for the trainer, which computes nothing; `standin(seconds=1)` changes its ways."""
    monkeypatch.setenv("FINETUNED_TRAINER", STANDIN)

    def behave(**ways: object) -> None:
        for name, value in ways.items():
            monkeypatch.setenv(f"STANDIN_{name.upper()}", str(value))

    return behave


@pytest.fixture
def daemon(home) -> Callable[..., Daemon]:
    """Start daemons, `daemon()` in the base directory `home`; what still runs is killed when the test ends."""
    started: list[Daemon] = []

    def start(*options: str, **popen) -> Daemon:
        started.append(Daemon(home, *options, **popen))
        return started[-1]

    yield start
    for one in started:
        for job in one.jobs():
            if job.state is State.RUNNING and job.trainer_pid:
                try:
                    os.killpg(job.trainer_pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        one.process.kill()
        one.process.wait()
