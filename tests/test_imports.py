"""The daemon alone: it runs on a machine without torch, and the rooms stand on the floors below them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import chat_rows, write_jsonl

REPOSITORY = Path(__file__).parents[1]
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "numpy",
    "safetensors",
    "tokenizers",
    "gguf",
    "jinja2",
    "huggingface_hub",
)

# Every module but the trainer's and the control centre's, found by their files.
IMPORT_ALL = """
import importlib, pkgutil, sys
import finetuned

def names(package):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if module.name not in {"finetuned.trainer", "finetuned.web", "finetuned.__main__"}:
            yield module.name
            if module.ispkg:
                yield from names(importlib.import_module(module.name))

found = list(names(finetuned))
for name in found:
    importlib.import_module(name)
"""

# As on a machine where they were never installed.
BARE = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def python(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60, check=False
    )


def test_importing_all_of_the_daemon_loads_nothing_heavy():
    said = python(IMPORT_ALL + "print(*found); print(*sorted({name.split('.')[0] for name in sys.modules}))")
    assert said.returncode == 0, said.stderr
    found, loaded = (line.split() for line in said.stdout.splitlines())
    assert {"finetuned.service", "finetuned.supervisor", "finetuned.spool.recover", "finetuned.cli"} <= set(found)
    assert set(HEAVY) & set(loaded) == set()


def test_the_daemon_can_be_imported_where_nothing_heavy_is_installed():
    assert python(BARE + "import torch").returncode != 0
    said = python(BARE + IMPORT_ALL)
    assert said.returncode == 0, said.stderr


@pytest.mark.parametrize("words", [["run", "--once"], ["status"]])
def test_the_daemon_runs_where_nothing_heavy_is_installed(home, words):
    said = python(BARE + "from finetuned.cli import main; main()", *words, "--base-dir", str(home.root))
    assert said.returncode == 0, said.stderr


def test_data_can_be_checked_where_nothing_heavy_is_installed(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", chat_rows(3))
    script = (
        "from pathlib import Path; from finetuned.dataset.reading import RowFile;"
        "from finetuned.dataset.report import Report, rows_of; report = Report();"
        "list(rows_of(RowFile(Path(sys.argv[1]), name='x'), report, system_prompt=None)); print(report.summary())"
    )
    said = python(BARE + script, str(path))
    assert said.stdout == "3 rows of OpenAI chat\n", said.stderr


def test_the_rooms_stand_on_the_floors_below_them():
    """The contracts in pyproject.toml, as import-linter checks them."""
    program = Path(sys.executable).with_name("lint-imports")
    said = subprocess.run(
        [program, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert said.returncode == 0, said.stdout
    assert "0 broken" in said.stdout
