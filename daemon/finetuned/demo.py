"""`finetuned demo`: a fresh base directory, a real daemon, a file in its inbox, and what the model learned from it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import click

from finetuned.base_directory import make_base_directory
from finetuned.errors import HomeError
from finetuned.events import Event, EventType
from finetuned.found import ledger_if_any
from finetuned.home import Home, find_home
from finetuned.jobs import Job, Outcome, State
from finetuned.live import LiveLine, duration

_SETTINGS = {
    "$schema": "./config.schema.json",
    "model": "smollm2-135m",
    "learning_rate": 1e-3,
    "epochs": 3,
    "batch_size": 8,
    "quiet_seconds": 0.5,
    "web": {"port": 0},  # any that is free: there may be a daemon at work on this machine
    "predictions": {"samples": 5, "max_new_tokens": 40},
}
_LIMIT = 900.0  # seconds
_CENTRE = 20.0  # seconds that the control centre may take to start


def run_demo(base_dir: Path | None, *, web: bool = False) -> int:
    """Run the demo and give the exit code: 1 if no adapter came or the held-out loss did not fall. With `web` its
    control centre stays open until Ctrl-C.
    """
    data, held_out = _examples()
    root = base_dir.expanduser().resolve() if base_dir else Path(tempfile.mkdtemp(prefix="finetuned-demo-"))
    home = Home(root)
    if home.config_file.exists():
        raise HomeError(
            "the demo wants a fresh folder", where=str(root), remedy="Name another, or leave --base-dir out."
        )
    _prepare(home, held_out)

    began = time.monotonic()
    click.echo(f"A fresh base directory: {root}")
    click.echo(f"Starting the daemon:    finetuned run --base-dir {root}")
    with (home.logs / "console.log").open("wb") as console:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "finetuned", "run", "--base-dir", str(root)],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
        )
    try:
        address = _address(home, daemon)
        if address:
            click.echo(f"Watch it:               {address}")
        click.echo(f"Dropping a file:        cp {data} {home.inbox}/\n")
        shutil.copyfile(data, home.inbox / data.name)
        job, events = _watch(home, daemon)
    finally:
        daemon.terminate()
        daemon.wait()
    if job is None or job.outcome is not Outcome.SUCCEEDED:
        what = (job.reason or {}).get("what") if job else None
        click.echo(f"No adapter came: {what or 'the daemon ended early'}. See {home.logs}/.", err=True)
        return 1
    code = _tell(home, job, events, seconds=time.monotonic() - began)
    _show(home, address, stay=web)
    return code


def _address(home: Home, daemon: subprocess.Popen[bytes]) -> str:
    """Give the address of the control centre that the daemon starts; nothing where it has none."""
    deadline = time.monotonic() + _CENTRE
    while daemon.poll() is None and time.monotonic() < deadline and find_spec("starlette"):
        with suppress(FileNotFoundError):
            if found := re.search(r"http://\S+", (home.logs / "web.log").read_text(encoding="utf-8")):
                return found[0]
        time.sleep(0.1)
    return ""


def _show(home: Home, address: str, *, stay: bool) -> None:
    """Say how to see it in the browser, or leave it open there."""
    if not address:
        return
    command = ["finetuned", "web", "--base-dir", str(home.root), "--port", str(urlsplit(address).port)]
    if not stay:
        click.echo(f"In the browser: {address}, with `{shlex.join(command)}`")
        return
    click.echo("Ctrl-C ends it.")
    with suppress(KeyboardInterrupt):
        subprocess.run([sys.executable, "-m", *command], check=False)


def _examples() -> tuple[Path, Path]:
    """Find the example data: in the repository, or in the installed package."""
    package = Path(__file__).parent
    for folder in (package.parents[1] / "examples", package / "examples"):
        if (folder / "units.jsonl").is_file():
            return folder / "units.jsonl", folder / "units-heldout.jsonl"
    raise HomeError(
        "the example data is missing", where=str(package), remedy="Run the demo in a clone of the repository."
    )


def _prepare(home: Home, held_out: Path) -> None:
    make_base_directory(home, json.dumps({**_SETTINGS, "eval_file": str(held_out)}, indent=2) + "\n")
    with suppress(HomeError):  # in a base directory the unpacked model is shared with it: it takes a while to unpack
        shared = find_home(None).models
        shared.mkdir(parents=True, exist_ok=True)
        home.models.rmdir()
        home.models.symlink_to(shared)


def _watch(home: Home, daemon: subprocess.Popen[bytes]) -> tuple[Job | None, list[Event]]:
    """Show the job's progress until it is finished."""
    line = LiveLine()
    deadline = time.monotonic() + _LIMIT
    job = None
    while daemon.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        with ledger_if_any(home) as ledger:
            job = next(iter(ledger.jobs(*State)), None) if ledger else None
            if ledger and job:
                line.show(job.progress)
                if job.state is State.FINISHED:
                    line.end()
                    return job, ledger.events(job.id)
    line.end()
    return None, []


def _tell(home: Home, job: Job, events: list[Event], *, seconds: float) -> int:
    """Print what came of it."""
    before, after = job.progress["valid_loss_before"], job.progress["valid_loss"]
    click.echo(f"\nHeld-out loss: {before:.4f} before, {after:.4f} after. Five held-out questions:\n")
    asked = [event.data["samples"] for event in events if event.type is EventType.PREDICTIONS]
    for old, new in zip(asked[0], asked[-1], strict=True):
        click.echo(f"  {_line(new['prompt'])}")
        click.echo(f"    before  {_line(old['answer'])}")
        click.echo(f"    after   {_line(new['answer'])}")
        click.echo(f"    wanted  {_line(new['expected'])}\n")
    adapter = home.adapters / str(job.adapter)
    base = json.loads((adapter / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    click.echo(f"The adapter:  {adapter}")
    click.echo(f"The input:    {next(home.archive.glob(f'*/{job.id}/*.jsonl'))}")
    click.echo(f"The story:    {home.job_log(job.id)}\n")
    click.echo("Load it:")
    click.echo(f'  PeftModel   PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{adapter}")')
    click.echo(f"  vLLM        vllm serve {base} --enable-lora --lora-modules {job.adapter}={adapter}")
    click.echo(
        f"  llama.cpp   python convert_lora_to_gguf.py {adapter} && llama-cli -m BASE.gguf --lora ADAPTER.gguf\n"
    )
    click.echo(f"All of it took {duration(seconds)}.")
    if after < before:
        return 0
    click.echo("The held-out loss did not fall.", err=True)
    return 1


def _line(text: str, limit: int = 110) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[:limit] + "..."
