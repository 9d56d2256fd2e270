"""The checks of the machine. Whatever may crash or hang, drivers above all, is tried in a process of its own."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from finetuned import gpu
from finetuned.doctor.finding import Finding, Verdict
from finetuned.launchers.local import find_jemalloc

_PINS = Path(__file__).parents[1] / "constraints.txt"
_TRAINER_NEEDS = ("torch", "transformers", "peft", "bitsandbytes")
_CUDA_SECONDS = 60
_IMPORT_SECONDS = 180


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """Whether this Python is new enough."""
    said = ".".join(map(str, version))
    if version < (3, 11):
        return Finding("python", Verdict.FAIL, f"{said}, but 3.11 is the oldest that works", "Install a newer Python.")
    return Finding("python", Verdict.OK, f"{said}, {sys.executable}")


def check_versions() -> Finding:
    """Whether the libraries are there, and are those that were tested together."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", _PINS.read_text(encoding="utf-8"), re.MULTILINE))
    found = {name: _version(name) for name in (*_TRAINER_NEEDS, "watchdog")}
    missing = [name for name, version in found.items() if version is None]
    if missing:
        return Finding(
            "versions",
            Verdict.FAIL,
            f"not installed: {', '.join(missing)}",
            "`make .venv`, or `pip install 'finetuned[train]'` in this environment.",
        )
    others = [
        f"{name} {version} (tested: {pins[name]})"
        for name, version in found.items()
        if name in pins and (version or "").partition("+")[0] != pins[name]
    ]
    if others:
        return Finding(
            "versions",
            Verdict.WARN,
            f"other versions than those tested together: {', '.join(others)}",
            "If something is odd, install with `--constraint constraints.txt`.",
        )
    return Finding("versions", Verdict.OK, ", ".join(f"{name} {version}" for name, version in found.items()))


def _version(name: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


_CU_INIT = """
import ctypes
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError as error:
    print("absent", error)
else:
    code = cuda.cuInit(0)
    name = ctypes.c_char_p()
    try:
        cuda.cuGetErrorName(code, ctypes.byref(name))
    except AttributeError:
        pass
    print("code", code, (name.value or b"").decode())
"""
_NO_DEVICE = 100
_CUDA_REMEDIES = {
    _NO_DEVICE: "If there should be a GPU: `nvidia-smi`, and CUDA_VISIBLE_DEVICES.",
    3: "Restart the machine; the driver is being unloaded.",
    802: "The NVSwitch fabric is not up: `systemctl start nvidia-fabricmanager`.",
    803: "The driver was updated under a running kernel module: restart the machine.",
    804: "This driver is too old for this GPU; install a newer one.",
    999: "Most often nvidia_uvm is not loaded: `nvidia-modprobe -c0 -u` as root, or start finetuned-gpu-nodes.service.",
}


def check_cuda(gpus: list[str], why_none: str | None) -> Finding:
    """Whether CUDA starts. That NVML shows a GPU proves nothing."""
    status, said, _ = _apart(_CU_INIT, seconds=_CUDA_SECONDS)
    kind, _, rest = said.strip().partition(" ")
    if status != 0 or kind not in {"absent", "code"}:
        how = "did not end" if status is None else f"ended with {status}"
        return Finding("cuda", Verdict.FAIL, f"cuInit {how}", "The driver is broken: see `dmesg`, install it anew.")
    if kind == "absent":
        if gpus:
            return Finding(
                "cuda",
                Verdict.FAIL,
                f"{', '.join(gpus)}, but no libcuda.so.1: {rest}",
                "Install the driver's CUDA library: libcuda1 on Debian, libnvidia-compute on Ubuntu.",
            )
        return Finding("cuda", Verdict.OK, f"training runs on the CPU. {why_none or ''}".strip())
    code, _, name = rest.partition(" ")
    if code == "0" and gpus:
        return Finding("cuda", Verdict.OK, f"cuInit works; {', '.join(gpus)}")
    if code == "0":
        return Finding("cuda", Verdict.WARN, f"cuInit works, but NVML shows no GPU: {why_none}", "Try `nvidia-smi`.")
    verdict = Verdict.WARN if int(code) == _NO_DEVICE and not gpus else Verdict.FAIL
    remedy = _CUDA_REMEDIES.get(int(code), "Look the error up in CUDA's documentation, and into `dmesg`.")
    return Finding("cuda", verdict, f"cuInit says {name or 'error'} ({code})", remedy)


def find_gpus() -> tuple[list[gpu.Gpu], str | None]:
    """Give the GPUs that NVML shows, or why there is none."""
    sampler = gpu.Sampler.open()
    try:
        return list(sampler.gpus), sampler.why_none
    finally:
        sampler.close()


def check_bitsandbytes(*, needed: bool) -> Finding:
    """Whether bitsandbytes can be imported, with its CUDA libraries. QLoRA, the choice on a GPU, needs it."""
    status, said, complaint = _apart("import bitsandbytes; print(bitsandbytes.__version__)", seconds=_IMPORT_SECONDS)
    if status == 0:
        return Finding("bitsandbytes", Verdict.OK, f"{said.strip()} can be imported")
    last = (complaint.strip().splitlines() or ["it did not end" if status is None else f"ended with {status}"])[-1]
    return Finding(
        "bitsandbytes",
        Verdict.FAIL if needed else Verdict.WARN,
        f"cannot be imported: {last}",
        'Install it for this CUDA, or set "tuning": "lora", which does without.',
    )


def check_jemalloc(*, needed: bool, usr: Path = Path("/usr")) -> Finding:
    """Whether a trainer without a GPU finds an allocator that gives memory back."""
    found = find_jemalloc(usr)
    if found is None and needed:
        return Finding(
            "jemalloc",
            Verdict.WARN,
            "not installed: training on the CPU takes more memory and more time",
            "`apt install libjemalloc2`, or what your system calls it.",
        )
    return Finding("jemalloc", Verdict.OK, str(found) if found else "not needed with a GPU")


def check_clock(now: datetime | None = None) -> Finding:
    """Whether the clock can be true, and is kept so."""
    year = (now or datetime.now(UTC)).year
    if not 2026 <= year < 2100:
        return Finding(
            "clock", Verdict.FAIL, f"it says that this is the year {year}", "Set it: `timedatectl set-ntp true`."
        )
    with suppress(OSError, subprocess.SubprocessError):
        command = ["timedatectl", "show", "--property=NTPSynchronized", "--value"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        if done.returncode == 0 and done.stdout.strip() == "no":
            return Finding("clock", Verdict.WARN, "not synchronised", "`timedatectl set-ntp true`.")
    return Finding("clock", Verdict.OK, f"the year is {year}")


def _apart(script: str, *, seconds: float) -> tuple[int | None, str, str]:
    """Run Python in a process of its own: its exit status (None: it did not end), stdout and stderr."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return None, "", ""
    return done.returncode, done.stdout, done.stderr
