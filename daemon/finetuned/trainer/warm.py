"""`python -m finetuned.trainer.warm SOCKET`: has all imported that a trainer imports, and forks trainers from it.

What is said through the socket is told in launchers/warm.py. This process reads no data and touches no GPU: CUDA does
not survive a fork, nor do threads, so it forks only as long as it has neither. It ends when the daemon does.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from finetuned.durable import OTHERS_NOTHING
from finetuned.home import JobFolder

# What a trainer imports before its first step, on a plain base. Seconds, as each adds to those before it.
PRELOADED = (
    "torch",  # 1.2
    "transformers",  # 0.4
    "accelerate",
    "peft",  # 0.7
    "finetuned.trainer.__main__",
    "finetuned.trainer.loop",
    "finetuned.trainer.adapter",
    "finetuned.trainer.recipes.sft",
    "transformers.models.llama.modeling_llama",  # the embedded model's; transformers imports a model when it is loaded
    "peft.utils.transformers_weight_conversion",  # imported by get_peft_model
)
_REQUEST_BYTES = 65536


def main(daemon: socket.socket) -> JobFolder | None:
    """Serve until the daemon is gone. Gives a job's folder in each fork, which then is that job's trainer."""
    _preload()
    why = _unfit()
    daemon.send((why or "ready").encode())
    while True:
        request, descriptors, _, _ = socket.recv_fds(daemon, _REQUEST_BYTES, 3)
        if not request:
            return None
        lock, output, channel = descriptors
        with socket.socket(fileno=channel) as answer:
            if why := _unfit():
                answer.send(why.encode())
            elif _fork():
                daemon.close()
                return _become_trainer(json.loads(request), answer, output)
        os.close(lock)  # the trainer alone holds it
        os.close(output)


def _preload() -> None:
    """Import everything, without a thread and without CUDA."""
    blas = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's starts its threads on import; torch has another
    # Its import touches CUDA. None hides it from peft; what needs it imports it after the fork.
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    for name in PRELOADED:
        with suppress(ModuleNotFoundError):  # a library's inner modules come and go; one that is gone costs time only
            importlib.import_module(name)
    del sys.modules["bitsandbytes"]
    if blas is None:
        del os.environ["OPENBLAS_NUM_THREADS"]
    else:
        os.environ["OPENBLAS_NUM_THREADS"] = blas
    gc.collect()
    gc.freeze()  # a collection in a fork would write to, and so copy, every page


def _unfit() -> str:
    """Say why a fork of this process would not be sound, or nothing."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        return f"it runs {threads} threads, which a fork would lose"
    import torch

    if torch.cuda.is_initialized() or _has_gpu_open():  # type: ignore[no-untyped-call]
        return "it has touched the GPU, which a fork cannot share"
    return ""


def _has_gpu_open() -> bool:
    """Whether a driver is at work in this process, whichever library woke it."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # that of the listing itself
            if str(descriptor.readlink()).startswith(("/dev/nvidia", "/dev/kfd")):
                return True
    return False


def _fork() -> bool:
    """Fork a trainer that is not our child but the daemon's. True in the trainer."""
    try:
        middle = os.fork()
    except OSError:  # no memory: the daemon sees its channel closed
        return False
    if middle:
        os.waitpid(middle, 0)
        return False
    middle = os.getpid()
    try:
        if os.fork():
            os._exit(0)
    except OSError:
        os._exit(1)
    while os.getppid() == middle:
        time.sleep(0.0005)
    return True


def _become_trainer(request: dict[str, str | None], answer: socket.socket, output: int) -> JobFolder:
    """Take on what a subprocess would have been given, once the daemon says that it wants this trainer."""
    os.setsid()
    answer.send(str(os.getpid()).encode())
    if answer.recv(16) != b"go":
        os._exit(0)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    os.close(output)
    gpus = request["gpus"]
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    return JobFolder(Path(str(request["folder"])))


if __name__ == "__main__":
    folder = main(socket.socket(fileno=int(sys.argv[1])))
    if folder is None:
        sys.exit(0)
    from finetuned.trainer.__main__ import end

    os.umask(OTHERS_NOTHING)
    end(folder)
