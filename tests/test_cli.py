"""The command line, as a user meets it."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from conftest import eventually
from finetuned import __version__
from finetuned.cli import cli
from finetuned.config import Config, load_config
from finetuned.home import Home

VERBS = {"plan", "init", "run", "status", "logs", "train", "demo"}
UNUSABLE = 78


def finetuned(*words: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program itself."""
    clean = {key: value for key, value in os.environ.items() if key != "FINETUNED_HOME"}
    return subprocess.run(
        [sys.executable, "-m", "finetuned", *map(str, words)],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def invoke(*words: object) -> Result:
    """Run a verb in this process."""
    return CliRunner().invoke(cli, [str(word) for word in words])


# -- help


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_the_verbs_each_with_a_sentence(option):
    said = invoke(option)
    assert said.exit_code == 0
    verbs = dict(re.findall(r"^  (\w+)  +(\S.*)$", said.output.split("Commands:")[1], re.MULTILINE))
    assert verbs.keys() >= VERBS
    assert all(verbs.values())


@pytest.mark.parametrize("verb", sorted(cli.commands))
def test_every_option_of_every_verb_is_known_to_its_help(verb):
    said = invoke(verb, "--help")
    assert said.exit_code == 0
    for parameter in cli.commands[verb].params:
        if parameter.param_type_name == "option":
            assert parameter.opts[0] in said.output


def test_help_is_quick_because_each_verb_imports_what_it_needs_by_itself():
    script = "import sys, finetuned.cli; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "click" in loaded
    heavy = {"pydantic", "watchdog", "structlog", "orjson", "zstandard", "sqlite3", "pynvml", "torch", "numpy"}
    assert heavy.isdisjoint(loaded)


def test_the_version_is_the_packages():
    assert __version__ in invoke("--version").output


def test_an_unknown_verb_is_used_wrongly():
    assert invoke("trian").exit_code == 2


# -- init


def test_init_makes_a_base_directory_that_works(tmp_path):
    root = tmp_path / "a b" / "base"
    said = invoke("init", root)
    assert said.exit_code == 0
    assert str(root) in said.output
    home = Home(root)
    assert all(folder.is_dir() for folder in home.folders)
    assert load_config(home.config_file).training() == Config().training()
    schema = json.loads(home.config_file.read_text())["$schema"]
    assert (root / schema).is_file()
    assert stat.S_IMODE(home.web_token.stat().st_mode) == 0o600
    assert invoke("status", "--base-dir", root).exit_code == 0


def test_init_never_overwrites_what_is_there(tmp_path):
    (tmp_path / "inbox").mkdir()
    (tmp_path / "inbox" / "x.jsonl").write_text("mine")
    (tmp_path / "config.json").write_text('{"epochs": 7}')
    for _ in range(2):
        assert invoke("init", tmp_path).exit_code == 0
    assert (tmp_path / "config.json").read_text() == '{"epochs": 7}'
    assert (tmp_path / "inbox" / "x.jsonl").read_text() == "mine"


def test_init_of_a_file_is_used_wrongly(tmp_path):
    (tmp_path / "x").touch()
    assert invoke("init", tmp_path / "x").exit_code == 2


# -- base directories that cannot be used


@pytest.mark.parametrize("verb", ["run", "status", "logs"])
def test_a_folder_without_config_gets_one_sentence_and_exit_78(tmp_path, verb):
    said = finetuned(verb, cwd=tmp_path)
    assert said.returncode == UNUSABLE
    assert said.stdout == ""
    assert len(said.stderr.strip().splitlines()) == 1
    assert str(tmp_path) in said.stderr
    assert "finetuned init" in said.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_base_directory_can_be_named_in_the_environment(home, tmp_path):
    said = finetuned("status", "--json", cwd=tmp_path, FINETUNED_HOME=str(home.root))
    assert json.loads(said.stdout)["base_dir"] == str(home.root)


def test_a_broken_config_gets_a_sentence_with_all_of_it_and_exit_78(home):
    home.config_file.write_text('{"epochs": 0, "modle": 3}')
    said = finetuned("run", "--base-dir", home.root)
    assert said.returncode == UNUSABLE
    assert "epochs" in said.stderr
    assert "modle" in said.stderr
    assert "Traceback" not in said.stderr


# -- status


def test_status_of_a_fresh_folder_says_what_to_do(home):
    said = invoke("status", "--base-dir", home.root)
    assert said.exit_code == 0
    assert "not running" in said.output
    assert "finetuned run" in said.output
    assert "inbox/" in said.output
    assert not home.ledger.exists()


def test_status_while_the_daemon_is_making_its_ledger(home):
    home.ledger.touch()
    said = invoke("status", "--base-dir", home.root)
    assert said.exit_code == 0
    assert "nothing yet" in said.output


def test_status_for_machines(home):
    facts = json.loads(invoke("status", "--json", "--base-dir", home.root).output)
    assert facts["daemon_pid"] is None
    assert (facts["running"], facts["queue"], facts["finished"]) == ([], [], [])


# -- logs


def test_without_a_log_there_is_a_sentence_and_exit_78(home):
    for words in ([], ["x-1"]):
        said = finetuned("logs", "--base-dir", home.root, *words)
        assert said.returncode == UNUSABLE
        assert len(said.stderr.strip().splitlines()) == 1


def test_logs_show_the_last_lines_of_the_newest_log(home):
    for day, name in enumerate(("daemon_20260101.log", "daemon_20260102.log")):
        path = home.logs / name
        path.write_text("".join(f"{name} {n}\n" for n in range(100)))
        os.utime(path, (day, day))
    said = invoke("logs", "--base-dir", home.root, "-n", 3)
    assert said.output.splitlines() == [f"daemon_20260102.log {n}" for n in (97, 98, 99)]


def test_logs_of_a_job_are_found_by_the_beginning_of_its_id(home):
    for job in ("units-aaaaaa", "units-aaaaaa-2", "other-bbbbbb"):
        home.job_log(job).write_text(f"{job}\n")
    assert invoke("logs", "--base-dir", home.root, "oth").output == "other-bbbbbb\n"
    assert invoke("logs", "--base-dir", home.root, "units-aaaaaa").output == "units-aaaaaa\n"


class Follower:
    """`finetuned logs -f`, and what it says."""

    def __init__(self, home: Home, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "finetuned", "logs", "-f", "--base-dir", str(home.root), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))

    def line(self) -> str:
        return self._lines.get(timeout=30)

    def has_read_all_of(self, path: Path) -> bool:
        """Whether it stands at the end of the file."""
        for opened in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(OSError):
                if opened.readlink() == path:
                    position = (opened.parent.with_name("fdinfo") / opened.name).read_text().split()[1]
                    return int(position) == path.stat().st_size
        return False


@pytest.fixture
def follow(home):
    started = []

    def start(*words: str) -> Follower:
        started.append(Follower(home, *words))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def test_logs_follow_what_is_written_whole_lines_only(home, follow):
    path = home.job_log("x-1")
    path.write_text("first\n")
    follower = follow("x-1")
    assert follower.line() == "first"
    with path.open("a", buffering=1) as log:
        log.write("second\n")
        assert follower.line() == "second"
        log.write("thi")
        log.flush()
        eventually(lambda: follower.has_read_all_of(path))
        log.write("rd\nfourth\n")
        assert [follower.line(), follower.line()] == ["third", "fourth"]


def test_a_line_that_was_being_written_at_the_start_is_shown_once_and_whole(home, follow):
    path = home.job_log("x-1")
    path.write_text("first\nsec")
    follower = follow("x-1")
    assert follower.line() == "first"
    eventually(lambda: follower.has_read_all_of(path))
    with path.open("a") as log:
        log.write("ond\nthird\n")
    assert [follower.line(), follower.line()] == ["second", "third"]


def test_logs_go_over_to_the_next_days_file(home, follow):
    (home.logs / "daemon_20260101.log").write_text("old\n")
    follower = follow()
    assert follower.line() == "old"
    (home.logs / "daemon_20260102.log").write_text("new\n")
    assert follower.line() == "new"


def test_following_ends_with_the_interrupt_key_without_a_traceback(home, follow):
    home.job_log("x-1").write_text("first\n")
    follower = follow("x-1")
    assert follower.line() == "first"
    follower.process.send_signal(signal.SIGINT)
    assert follower.process.wait(60) in {1, 130}
    assert follower.process.stderr
    assert "Traceback" not in follower.process.stderr.read()


# -- run


def test_a_second_daemon_is_refused_with_the_firsts_pid(home, daemon):
    first = daemon()
    first.says("finetuned starts")
    said = finetuned("run", "--base-dir", home.root)
    assert said.returncode == UNUSABLE
    assert f"pid {first.process.pid}" in said.stderr
    assert len(said.stderr.strip().splitlines()) == 1
    status = finetuned("status", "--base-dir", home.root)
    assert f"running, pid {first.process.pid}" in status.stdout
    assert first.process.poll() is None
    assert first.stop() == 0
    assert "not running" in finetuned("status", "--base-dir", home.root).stdout


def test_a_killed_daemon_does_not_keep_the_next_one_out(home, daemon):
    first = daemon()
    first.says("finetuned starts")
    first.stop(signal.SIGKILL)
    assert json.loads(finetuned("status", "--json", "--base-dir", home.root).stdout)["daemon_pid"] is None
    second = daemon()
    eventually(lambda: second.log().count("finetuned starts") == 2)
    assert second.stop() == 0


def test_once_with_an_empty_inbox_ends_at_once(home):
    said = finetuned("run", "--once", "--base-dir", home.root)
    assert said.returncode == 0


def test_once_exits_1_when_a_job_failed_and_status_says_why(home):
    (home.inbox / "x.jsonl").write_text('{"messages": []}\n')
    (home.inbox / "x.config.json").write_text('{"epochs": 0}')
    assert finetuned("run", "--once", "--base-dir", home.root).returncode == 1
    said = finetuned("status", "--base-dir", home.root).stdout
    assert "failed" in said
    assert "epochs" in said
    assert "archive/failed/x-" in said
    (job,) = json.loads(finetuned("status", "--json", "--base-dir", home.root).stdout)["finished"]
    assert (job["file"], job["outcome"], job["reason"]["code"]) == ("x.jsonl", "failed", "bad_settings")
