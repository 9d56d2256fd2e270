"""The base directory: every path of the project, in one place. Nothing here reads or writes a file's content."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from finetuned.errors import HomeError, harmless


@dataclass(frozen=True)
class JobFolder:
    """`.finetuned/jobs/ID`: all that one job needs while it lives."""

    path: Path

    @property
    def spec(self) -> Path:
        """The whole resolved job, written by the daemon and read by the trainer."""
        return self.path / "job.json"

    @property
    def overrides(self) -> Path:
        """The file `x.config.json` that was dropped beside `x.jsonl`, once it is spent."""
        return self.path / "overrides.json"

    def held_out(self, extension: str) -> Path:
        """The file `x.eval.jsonl` that was dropped beside `x.jsonl`, with its extensions."""
        return self.path / f"held-out{extension}"

    @property
    def events(self) -> Path:
        """What the trainer says, one JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def lock(self) -> Path:
        """Locked as long as a trainer of this job lives, whatever became of the daemon."""
        return self.path / "lock"

    def exit_code(self, attempt: int) -> Path:
        """Where the trainer of an attempt says as its last act how it ends."""
        return self.path / f"exit.{attempt}"

    def stop(self, attempt: int) -> Path:
        """What the trainer of an attempt looks for: once it is there, it writes a checkpoint and ends.

        For trainers on other machines, which no signal reaches.
        """
        return self.path / f"stop.{attempt}"

    @property
    def checkpoints(self) -> Path:
        """The folder of this job's checkpoints."""
        return self.path / "checkpoints"

    @property
    def earlier(self) -> Path:
        """The adapter that this job builds on, as it was at the first attempt."""
        return self.path / "earlier"

    def output(self, attempt: int) -> Path:
        """Where attempt number `attempt` (from 1) leaves its result."""
        return self.path / f"out.{attempt}"

    def staged_adapter(self, attempt: int) -> Path:
        """The finished adapter of an attempt, before it is published."""
        return self.output(attempt) / "adapter"


@dataclass(frozen=True)
class Home:
    """A base directory. `root` is absolute; the other paths follow from it."""

    root: Path

    @property
    def inbox(self) -> Path:
        """Where files are dropped."""
        return self.root / "inbox"

    @property
    def adapters(self) -> Path:
        """Where finished adapters appear."""
        return self.root / "adapters"

    @property
    def archive(self) -> Path:
        """Where inputs go when their job has succeeded."""
        return self.root / "archive"

    @property
    def failed(self) -> Path:
        """Where inputs go when their job has failed."""
        return self.archive / "failed"

    @property
    def logs(self) -> Path:
        """The daemon's log files."""
        return self.root / "logs"

    @property
    def job_logs(self) -> Path:
        """One log file a job."""
        return self.logs / "jobs"

    @property
    def config_file(self) -> Path:
        """The one file to edit."""
        return self.root / "config.json"

    @property
    def schema_file(self) -> Path:
        """The JSON Schema of config.json, for editors."""
        return self.root / "config.schema.json"

    @property
    def machinery(self) -> Path:
        """What users need not look into."""
        return self.root / ".finetuned"

    @property
    def ledger(self) -> Path:
        """The SQLite file."""
        return self.machinery / "state.db"

    @property
    def jobs(self) -> Path:
        """The folders of jobs that are not finished."""
        return self.machinery / "jobs"

    @property
    def models(self) -> Path:
        """Base models that finetuned unpacked itself."""
        return self.machinery / "models"

    @property
    def lock(self) -> Path:
        """Locked by the daemon of this base directory."""
        return self.machinery / "lock"

    @property
    def config_checked(self) -> Path:
        """Which config.json the daemon found to be in order."""
        return self.machinery / "config.checked"

    @property
    def paused(self) -> Path:
        """There while the queue is paused, with the reason as its content."""
        return self.machinery / "paused"

    @property
    def crashes(self) -> Path:
        """When attempts died with the daemon or the machine of late."""
        return self.machinery / "crashes.json"

    @property
    def gpus(self) -> Path:
        """How the daemon sees each GPU, and why no job is started on some."""
        return self.machinery / "gpus.json"

    @property
    def web_token(self) -> Path:
        """What the control centre asks for where other machines can reach it."""
        return self.machinery / "web-token"

    @property
    def web_down(self) -> Path:
        """There while the daemon cannot keep the control centre running, with the reason as its content."""
        return self.machinery / "web-down"

    @property
    def uploads(self) -> Path:
        """Files that came through the control centre and are not in the inbox yet."""
        return self.machinery / "uploads"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Every folder that must exist before the daemon can work."""
        return (
            self.inbox,
            self.adapters,
            self.failed,
            self.job_logs,
            self.jobs,
            self.models,
        )

    def job(self, job_id: str) -> JobFolder:
        """Give the folder of one job."""
        return JobFolder(self.jobs / job_id)

    def job_log(self, job_id: str) -> Path:
        """Give the log file of one job."""
        return self.job_logs / f"{job_id}.log"


def find_home(base_dir: Path | None) -> Home:
    """Find the base directory: the option, else `$FINETUNED_HOME`, else the current folder.

    Raises HomeError when none of them holds a config.json.
    """
    named = base_dir or (Path(os.environ["FINETUNED_HOME"]) if os.environ.get("FINETUNED_HOME") else None)
    root = (named or Path.cwd()).expanduser().resolve()
    if not (root / "config.json").is_file():
        raise HomeError(
            "this folder is not a base directory: it holds no config.json",
            where=str(root),
            remedy=f"Make one with `finetuned init {root}`, or name another with --base-dir or $FINETUNED_HOME.",
        )
    return Home(root)


def printable(name: bytes) -> str:
    """Give a file name, which is bytes, as one line of text that any log and terminal can hold."""
    return harmless(_text(name)).replace("\n", "\\n").replace("\t", "\\t")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def data_stem(name: bytes) -> str:
    """Give a data file's name without its data extensions: `x.jsonl.gz` becomes `x`."""
    return re.sub(r"\.(jsonl|json)(\.gz|\.zst)?\Z", "", _text(name), flags=re.IGNORECASE)


def data_extension(name: bytes) -> str:
    """Give the data extensions of a file's name in lower case: `.jsonl.gz` of `x.jsonl.gz`."""
    return _text(name)[len(data_stem(name)) :].lower()


def safe_name(name: bytes, limit: int = 48) -> str:
    """Make a name that is safe as a folder, in a URL and in a shell from a data file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", data_stem(name)).strip("-.")[:limit].strip("-.") or "data"


def models_folder() -> Path:
    """Give the unpacked models' folder: the base directory's if there is one, else the user's cache."""
    try:
        folder = find_home(None).models
    except HomeError:
        folder = Home(Path.home() / ".cache" / "finetuned").models
    folder.mkdir(parents=True, exist_ok=True)
    return folder
