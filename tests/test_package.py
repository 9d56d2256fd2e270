"""What is built for others to install, and that it works without this checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
BUILD = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"


def test_a_wheel_serves_every_page_and_brings_every_file_of_the_control_centre(web, tmp_path, monkeypatch):
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    name = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.split()[-1]
    place = tmp_path / "site"
    with zipfile.ZipFile(tmp_path / name) as wheel:
        wheel.extractall(place)
    package = REPOSITORY / "daemon" / "finetuned"
    files = [path for folder in ("templates", "static") for path in (package / "web" / folder).iterdir()]
    assert len(files) > 10
    for file in files:
        assert (place / "finetuned" / file.relative_to(package)).read_bytes() == file.read_bytes()
    assert (place / "finetuned" / "constraints.txt").is_file()
    assert any((place / "finetuned" / "systemd").iterdir())
    monkeypatch.setenv("PYTHONPATH", str(place))  # before that of this checkout
    found = subprocess.run(
        [sys.executable, "-c", "import finetuned; print(finetuned.__file__)"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.startswith(str(place))
    server = web()
    for path in (
        "/",
        "/drop",
        "/history",
        "/config",
        "/login",
        *(f"/static/{file.name}" for file in files if file.parent.name == "static"),
    ):
        assert server.ask(path)[0] == 200, path
