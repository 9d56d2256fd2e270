"""Asking a process that has the trainer's libraries about a file, with the settings that a job of it would have."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuned.adapters import CONFIG as ADAPTER_CONFIG
from finetuned.config import LATEST, Config, TrainingSettings, load_config, read_overrides, resolve, settings_from
from finetuned.errors import ConfigError, DataError, FinetunedError, HomeError, ModelError
from finetuned.home import Home, find_home, models_folder, printable
from finetuned.launchers.local import trainer_environment
from finetuned.spool.inbox import Found, held_out_files

_PATIENCE = 5.0  # seconds
_ERRORS: tuple[type[FinetunedError], ...] = (ConfigError, DataError, ModelError)


@dataclass(frozen=True)
class Terms:
    """What a file would be trained with."""

    settings: TrainingSettings
    base_dir: Path
    models: Path
    source: str = ""  # where the settings come from, in words


def terms(file: Path, *, base_dir: Path | None, profile: str = "", model: str | None = None) -> Terms:
    """Give those of the base directory, or the defaults where there is none, with what `x.config.json` beside the file
    says. Raises FinetunedError.
    """
    try:
        home = find_home(base_dir)
    except HomeError:
        if base_dir or os.environ.get("FINETUNED_HOME"):
            raise
        config, root, models = Config(), Path.cwd(), models_folder()
        source = "finetuned's defaults, as this folder is no base directory; --base-dir names one"
    else:
        config, root, models = load_config(home.config_file), home.root, home.models
        models.mkdir(parents=True, exist_ok=True)
        source = str(home.config_file)
    override = Found(file, profile).override
    overrides = read_overrides(override) if override.is_file() else {}
    settings = resolve(config, profile, overrides, where=str(override if overrides else root / "config.json"))
    if model:
        settings = settings_from({**settings.model_dump(), "model": model}, where="the command line")
    parts = [source, f"profile {profile}" if profile else "", str(override) if overrides else ""]
    return Terms(settings, root, models, ", then ".join(filter(None, parts)))


def held_out_beside(file: Path) -> str | None:
    """Give `x.eval.jsonl` beside `x.jsonl`, in any of the endings. Raises DataError if there are several."""
    found = held_out_files(file)
    if len(found) > 1:
        names = ", ".join(printable(os.fsencode(path.name)) for path in found)
        raise DataError(f"has several held-out files: {names}", where=str(file), remedy="Leave one of them beside it.")
    return str(found[0].absolute()) if found else None


def ask(
    module: str,
    file: Path,
    terms: Terms,
    *,
    gpu: str | None,
    heard: Callable[[dict[str, Any]], None] = lambda _: None,
    limit: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Give what `python -m module` answers about a file. `heard` gets what it says on the way. After `limit` seconds it
    is killed.

    Raises the FinetunedError that it answers, and one if it ends without an answer.
    """
    order = {
        "file": str(file.expanduser().absolute()),  # a link is called as its user does
        "settings": terms.settings.model_dump(),
        "base_dir": str(terms.base_dir),
        "models": str(terms.models),
        **more,
    }
    said: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+", errors="backslashreplace") as complaints:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env={**os.environ, **environment(gpu)},
        )
        assert process.stdin
        assert process.stdout
        with process, _killed_after(limit, process):
            try:
                with suppress(BrokenPipeError), process.stdin as pipe:
                    pipe.write(json.dumps(order))
                for line in process.stdout:
                    if found := _object(line):
                        said = found
                        heard(said)
            except BaseException:
                process.send_signal(signal.SIGINT)  # it leaves nothing half-written, if it has a moment
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_PATIENCE)
                process.kill()
                raise
        if "answer" in said:
            answer: dict[str, Any] = said["answer"]
            return answer
        complaints.seek(0)
        why = complaints.read().strip()[-2000:] or f"exit status {process.returncode}"
    if process.returncode == -signal.SIGKILL:
        why = "it was killed, as a system does that is out of memory"
    if "error" not in said:
        raise FinetunedError(
            f"the process that was asked broke off: {why}",
            where=str(file),
            remedy="Ask again; if it breaks off again, memory is short, or this is a bug.",
        )
    error = said["error"]
    kind = next((kind for kind in _ERRORS if error["code"] == kind.code), DataError)
    raise kind(error["what"], where=error["where"], remedy=error["remedy"], code=error["code"])


@contextmanager
def _killed_after(limit: float | None, process: subprocess.Popen[str]) -> Iterator[None]:
    if limit is None:
        yield
        return
    timer = threading.Timer(limit, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def environment(gpu: str | None) -> dict[str, str]:
    """Give the extra environment of a process that reads data. Jemalloc, where it is used, gives back what it does not
    need, as there is no training that would need it again; two arenas for the reader and the tokenizer's threads.
    """
    found, _ = trainer_environment(gpu)
    return found | {"MALLOC_CONF": "narenas:2,dirty_decay_ms:500,muzzy_decay_ms:0"}


def _object(line: str) -> dict[str, Any]:
    """Give what the process says; libraries talk, too, and that is nothing."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def find_adapter(adapter: Path | None, home: Home | None) -> Path:
    """Find the adapter's folder: as a path, or by its name in adapters/; the newest where none is named.

    Raises ConfigError or HomeError.
    """
    given = adapter or Path(LATEST)
    candidates = [Path(os.path.expanduser(given))] if adapter else []  # noqa: PTH111, as it is if nobody is called so
    candidates += [home.adapters / given] if home else []
    for folder in candidates:
        if any((folder / name).is_file() for name in (ADAPTER_CONFIG, "config.json")):
            return folder.resolve()
    if adapter is None:
        raise HomeError(
            "there is no adapter yet",
            where=str(home.adapters if home else Path.cwd()),
            remedy="Drop a file into inbox/ with the daemon running, or name an adapter's folder."
            if home
            else "This is no base directory: name an adapter's folder, or the base directory with --base-dir.",
        )
    raise ConfigError(
        "there is no adapter in such a folder",
        where=str(adapter),
        remedy="Name a folder, or one of those in adapters/.",
    )
