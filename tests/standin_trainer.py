"""A trainer that obeys the real one's contract and computes nothing: `python standin_trainer.py JOB_DIR`.

It reads job.json and the input, does a step for each row and epoch, writes checkpoints, resumes from them, stops when
it is asked to, says events and leaves an adapter. Its weights are a digest over all steps in order, so a step that is
lost, repeated or torn shows. Of finetuned it imports the version alone, so it starts in a moment. Behaviour by
environment:

STANDIN_SECONDS   seconds a step takes (0.01)
STANDIN_END       exit code with which it ends in place of training, once it has said an error (with 1 it says
                  none), or minus the signal that ends it
STANDIN_NOISE     so many MiB it prints at the beginning
STANDIN_DEAF      if set, it hears no request to stop
STANDIN_VERSION   of finetuned that it says it is
STANDIN_SAVE      seconds that writing a checkpoint at a stop takes (0)
STANDIN_EAT_MB    megabytes of memory that it fills before the first step
STANDIN_WEIGHT    bytes that are added to its weights
"""

import errno
import fcntl
import hashlib
import json
import os
import signal
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path

from finetuned import __version__

VERSION = os.environ.get("STANDIN_VERSION", __version__)
SECONDS = float(os.environ.get("STANDIN_SECONDS", "0.01"))
EVERY = 5  # steps between two checkpoints


def say(folder: Path, kind: str, message: str, *, level: str = "info", **data) -> None:
    line = {"created_at": time.time(), "type": kind, "message": message, "level": level, "data": data}
    with (folder / "events.jsonl").open("ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


def write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def weights_of(rows: list[bytes], steps: int) -> bytes:
    """What an undisturbed training of so many steps gives."""
    digest = b""
    for step in range(steps):
        digest = hashlib.sha256(digest + rows[step % len(rows)]).digest()
    return digest


def safetensors(content: bytes) -> bytes:
    content += bytes(int(os.environ.get("STANDIN_WEIGHT", "0")))
    header = json.dumps(
        {"digest": {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}}
    ).encode()
    return struct.pack("<Q", len(header)) + header + content


def main(folder: Path) -> int:
    if "FINETUNED_TAKES_LOCK" in os.environ:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o640)  # until this process ends
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    spec = json.loads((folder / "job.json").read_bytes())
    (folder / "lock").write_text(f"{os.getpid()} {spec['attempt']} {VERSION}\n")
    code = run(folder, spec)
    write(folder / f"exit.{spec['attempt']}", f"{code}\n".encode())
    return code


def run(folder: Path, spec: dict) -> int:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: None if os.environ.get("STANDIN_DEAF") else asked.append(number))
    if end := os.environ.get("STANDIN_END"):
        if int(end) < 0:
            os.kill(os.getpid(), -int(end))
        if int(end) != 1:
            told = {"code": "told_to", "what": "told to end so", "where": "", "remedy": "mend it"}
            say(folder, "error", "told to", level="error", **told)
        return int(end)
    rows = (folder / spec["input"]).read_bytes().splitlines()
    if spec["held_out"]:
        held_out = (folder / spec["held_out"]).read_bytes().splitlines()
        say(folder, "message", f"{len(held_out)} rows held out")
    total = max(1, int(len(rows) * spec["settings"].get("epochs", 1)))
    for _ in range(int(os.environ.get("STANDIN_NOISE", "0"))):
        sys.stdout.write("noise\n" * (2**20 // 6))
    checkpoint = folder / "checkpoints" / "standin.json"
    checkpoint.parent.mkdir(exist_ok=True)
    done, digest = 0, b""
    if checkpoint.exists():
        state = json.loads(checkpoint.read_bytes())
        done, digest = state["step"], bytes.fromhex(state["digest"])
        say(folder, "message", f"resumed after step {done} of {total}", step=done)
    say(folder, "phase", "training", phase="training", sees=os.environ.get("CUDA_VISIBLE_DEVICES"))
    hoard = b"x" * (int(os.environ.get("STANDIN_EAT_MB", "0")) << 20)  # noqa: F841
    while done < total:
        if asked or (folder / f"stop.{spec['attempt']}").exists():
            time.sleep(float(os.environ.get("STANDIN_SAVE", "0")))
            write(checkpoint, json.dumps({"step": done, "digest": digest.hex()}).encode())
            say(folder, "checkpoint", f"checkpoint after step {done}", checkpoint_step=done)
            return 130
        time.sleep(SECONDS)
        digest = hashlib.sha256(digest + rows[done % len(rows)]).digest()
        done += 1
        figures = {"step": done, "total_steps": total, "train_loss": 1 / done, "seconds_left": (total - done) * SECONDS}
        say(folder, "metrics", f"step {done} of {total}", **figures)
        if done % EVERY == 0:
            write(checkpoint, json.dumps({"step": done, "digest": digest.hex()}).encode())
            say(folder, "checkpoint", f"checkpoint after step {done}", checkpoint_step=done)
    adapter = folder / f"out.{spec['attempt']}" / "adapter"
    adapter.mkdir(parents=True, exist_ok=True)
    write(adapter / "adapter_model.safetensors", safetensors(digest))
    write(adapter / "adapter_config.json", b'{"peft_type": "LORA"}')
    story = {key: spec[key] for key in ("sha256", "held_out_sha256", "profile", "settings", "rung")}
    story |= {
        "job_id": spec["id"],
        "file": spec["name"],
        "finished_at": time.time(),
        "metrics": {"train_loss": 1 / done},
    }
    write(adapter / "finetuned.json", json.dumps(story).encode())
    say(folder, "result", "trained", step=done, total_steps=total)
    return 0


def told(folder: Path) -> int:
    """Train; without room on the disk say so, if there is room for that, and end as temporary."""
    try:
        return main(folder)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}:
            raise
        with suppress(OSError):
            say(
                folder,
                "error",
                "no room",
                level="error",
                code="no_space",
                what="no room on the disk",
                where="",
                remedy="",
            )
        return 75


if __name__ == "__main__":
    sys.exit(told(Path(sys.argv[1])))
