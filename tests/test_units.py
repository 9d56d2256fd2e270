"""`finetuned service install`: units with this machine's paths, as systemd reads them, and nothing started."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from finetuned import units
from finetuned.errors import HomeError
from finetuned.home import Home

needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")

BASES = {
    "where systemd keeps state": Path("/var/lib/finetuned"),
    "on a disk of its own": Path("/srv/tuning"),
    "in somebody's home": Path("/home/alice/tuning"),
    "with odd names": Path('/srv/my $tuning 100%/"quoted"'),
}


def setting(unit: str, name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", unit, flags=re.MULTILINE)


def service(*words: object, code: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "finetuned", "service", *map(str, words)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def base(home):
    """A base directory outside of /tmp, which a system service does not see."""
    folder = Path(tempfile.mkdtemp(prefix="finetuned-test-", dir=Path.home()))
    shutil.copy(home.config_file, folder)
    yield folder
    shutil.rmtree(folder)


@needs_analyze
@pytest.mark.parametrize("where", BASES)
def test_systemd_accepts_the_units_and_little_is_exposed(where, tmp_path):
    made = units.system_units(Home(BASES[where]), run_as="alice")
    assert units.verify(made, user=False) == ""
    (tmp_path / units.DAEMON).write_text(made[units.DAEMON])
    subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=18", tmp_path / units.DAEMON],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        check=True,
    )


@needs_analyze
def test_a_line_that_systemd_does_not_know_is_an_objection():
    made = units.system_units(Home(Path("/srv/tuning")), run_as="alice")
    broken = {**made, units.DAEMON: made[units.DAEMON].replace("WatchdogSec=", "WatchdogSecs=")}
    assert "WatchdogSecs" in units.verify(broken, user=False)


@pytest.mark.parametrize("where", BASES)
def test_the_base_directory_is_the_one_writable_tree_and_one_mount(where):
    base = BASES[where]
    unit = units.system_units(Home(base), run_as="alice")[units.DAEMON]
    writable = [f"/var/lib/{name}" for name in setting(unit, "StateDirectory")]
    writable += [path for name in ("ReadWritePaths", "BindPaths") for path in setting(unit, name)]
    assert set(writable) == {units._quoted(base)}
    assert bool(setting(unit, "StateDirectory")) == base.is_relative_to("/var/lib")
    assert setting(unit, "User") == ["alice"]


def test_all_homes_are_hidden_but_for_what_the_daemon_stands_on():
    elsewhere = units.system_units(Home(Path("/srv/tuning")), run_as="alice")[units.DAEMON]
    at_home = units.system_units(Home(Path("/home/alice/tuning")), run_as="alice")[units.DAEMON]
    if not any(units._in_a_home(Path(path)) for path in (sys.prefix, sys.base_prefix, units.__file__)):
        assert setting(elsewhere, "ProtectHome") == ["yes"]
    assert setting(at_home, "ProtectHome") == ["tmpfs"]
    assert "/home/alice/tuning" in setting(at_home, "BindPaths")


def test_the_program_is_this_interpreter_and_odd_names_are_quoted_as_systemd_reads_them():
    unit = units.system_units(Home(BASES["with odd names"]), run_as="alice")[units.DAEMON]
    (start,) = setting(unit, "ExecStart")
    assert start.startswith(f"{sys.executable} -P -m finetuned run --base-dir ")
    assert start.endswith(r'"/srv/my $$tuning 100%%/\"quoted\""')


@pytest.mark.parametrize("base", ["/tmp/x", "/var/tmp/x", "/run/user/1000/x"])
def test_a_base_directory_that_a_service_does_not_see_is_refused(base):
    with pytest.raises(HomeError, match="--user"):
        units.system_units(Home(Path(base)), run_as="alice")


def test_a_service_is_never_root_by_itself(tmp_path):
    name = units.owner(tmp_path)
    assert name == ("finetuned" if os.geteuid() == 0 else name) != "root"


# -- the verb


def test_printing_writes_nothing(base, tmp_path):
    said = service("install", "--base-dir", base, "--print", XDG_CONFIG_HOME=str(tmp_path))
    assert str(base) in said
    assert "[Service]" in said
    assert list(tmp_path.glob("systemd/**/*")) == []


def test_units_are_written_to_a_folder_with_what_to_run_next(base, tmp_path):
    said = service("install", "--base-dir", base, "--run-as", "nobody-here", "--output-dir", tmp_path / "units")
    assert {path.name for path in (tmp_path / "units").iterdir()} == {units.DAEMON, units.GPU_NODES}
    steps = [line.strip() for line in said.splitlines() if line.startswith("    ")]
    assert steps[0].startswith("useradd")
    assert steps[0].endswith(" nobody-here")
    assert steps[1] == f"chown -R nobody-here: {base}"
    assert steps[-2:] == ["systemctl daemon-reload", f"systemctl enable --now {units.GPU_NODES} {units.DAEMON}"]


def test_a_user_s_unit_goes_where_a_user_s_systemd_looks(home, tmp_path):
    said = service("install", "--user", "--base-dir", home.root, XDG_CONFIG_HOME=str(tmp_path / "config"))
    unit = (tmp_path / "config/systemd/user" / units.DAEMON).read_text()
    assert setting(unit, "ExecStart") == [f"{sys.executable} -P -m finetuned run --base-dir {home.root}"]
    assert "systemctl --user enable --now" in said
    assert not (tmp_path / "config/systemd/user/default.target.wants").exists()


def test_a_folder_that_cannot_be_written_to_is_a_sentence(home, tmp_path):
    (tmp_path / "config").write_text("a file")
    said = service("install", "--user", "--base-dir", home.root, code=78, XDG_CONFIG_HOME=str(tmp_path / "config"))
    assert "cannot be written" in said
    assert "Traceback" not in said


@needs_analyze
def test_what_systemd_objects_to_is_not_written(home, tmp_path):
    """A systemd-analyze of the test's own, which objects to everything."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "systemd-analyze").write_text("#!/bin/sh\necho 'no good' >&2\nexit 1\n")
    (programs / "systemd-analyze").chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "XDG_CONFIG_HOME": str(tmp_path / "config")}
    said = service("install", "--user", "--base-dir", home.root, code=1, **environment)
    assert "no good" in said
    assert not (tmp_path / "config").exists()
