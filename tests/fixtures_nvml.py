"""GPUs for tests on machines without one: our own libnvidia-ml.so.1 under the real nvidia-ml-py.

Reaches tests as a plugin: `pytest_plugins` in conftest.py names it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "nvml" / "fake_nvml.c"


def build_fake_nvml(folder: Path, *without: str) -> Path:
    """Compile the library into `folder`, less the functions named, and return `folder`.

    Raises CalledProcessError when the compiler refuses.
    """
    lacking = [f"-D{function}=absent_{number}" for number, function in enumerate(without)]
    library = folder / "libnvidia-ml.so.1"
    flags = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *lacking]
    subprocess.run(["gcc", *flags, "-o", str(library), str(SOURCE)], check=True)
    return folder


@dataclass(frozen=True)
class FakeNvml:
    """A folder with the library, and the scenario file that it reads at every call."""

    library: Path
    scenario: Path

    def set(self, *lines: str) -> None:
        """Replace the scenario at once; fake_nvml.c lists what a line can say."""
        draft = self.scenario.with_suffix(".new")
        draft.write_text("".join(f"{line}\n" for line in lines))
        draft.replace(self.scenario)  # a reader sees the old GPUs or the new ones, never half a file

    def environment(self) -> dict[str, str]:
        """Give the environment in which a new process sees these GPUs."""
        return {
            **os.environ,
            "LD_LIBRARY_PATH": str(self.library),
            "FAKE_NVML_SCENARIO": str(self.scenario),
        }

    def without(self, *functions: str) -> FakeNvml:
        """Put the same GPUs under an older driver, which lacks these functions."""
        folder = self.scenario.parent / "older"
        folder.mkdir()
        return FakeNvml(build_fake_nvml(folder, *functions), self.scenario)


@pytest.fixture(scope="session")
def fake_nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the library; its folder belongs on LD_LIBRARY_PATH."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, to build the fake libnvidia-ml.so.1")
    return build_fake_nvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def fake_nvml(fake_nvml_library: Path, tmp_path: Path) -> FakeNvml:
    """Give one idle H100, until `set` says otherwise."""
    nvml = FakeNvml(fake_nvml_library, tmp_path / "gpus.scenario")
    nvml.set("gpus=1")
    return nvml
