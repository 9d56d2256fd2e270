"""Virtual environments for the programs that finetuned is measured beside, each made the first time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).parent / "peers"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "finetuned"


def peers_python(peer: str) -> Path:
    """Give the interpreter of a peer's environment; make it the first time."""
    folder = CACHE / peer
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"installing {peer} into {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "--requirement", PEERS / f"{peer}_requirements.txt"], check=True)
        # Of no use to text, and PyPI's builds of them refuse a torch without CUDA.
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"], check=True)
        (folder / "ready").touch()
    return python
