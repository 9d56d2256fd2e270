"""The systemd units with this machine's paths: `finetuned service install`. Nothing here starts or enables anything.

The units in systemd/ are whole and valid for /opt/finetuned and /var/lib/finetuned; what differs here is replaced line
by line.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import click

from finetuned.errors import HomeError
from finetuned.home import Home

DAEMON = "finetuned.service"
GPU_NODES = "finetuned-gpu-nodes.service"
SYSTEM_FOLDER = Path("/etc/systemd/system")
_PACKAGE = Path(__file__).resolve().parent
_STATE = Path("/var/lib")
_HIDDEN = tuple(map(Path, ("/tmp", "/var/tmp", "/run/user", "/dev", "/proc", "/sys")))  # noqa: S108
_HOMES = (Path("/home"), Path("/root"))  # ProtectHome=


def install_units(home: Home, *, user: bool, run_as: str | None, folder: Path | None, only_print: bool) -> int:
    """Write the units, or print them, and say what is left to do. Gives the exit code: 1 if systemd objects to them.

    Raises HomeError if they cannot be made or written.
    """
    units = user_units(home) if user else system_units(home, run_as=run_as)
    if only_print:
        for name, content in units.items():
            click.echo(f"# ---- {name}\n\n{content}")
        return 0
    objection = verify(units, user=user)
    if objection:
        click.echo(f"finetuned: systemd objects to these units, so none is written:\n{objection}", err=True)
        return 1
    for path in write_units(units, folder or (user_folder() if user else SYSTEM_FOLDER)):
        click.echo(f"written   {path}")
    click.echo(
        "verified  " + ("not, as systemd-analyze is not installed" if objection is None else "by systemd-analyze")
    )
    click.echo("\nNothing is started. What is left to you:\n")
    for step in next_steps(home, units, user=user):
        click.echo(f"    {step}")
    return 0


def system_units(home: Home, *, run_as: str | None = None) -> dict[str, str]:
    """Give the units of a system service, name and content. It runs as `run_as`, else as the base directory's owner.

    Raises HomeError where the service could not reach the base directory.
    """
    base = home.root
    for folder in _HIDDEN:
        if base.is_relative_to(folder):
            raise HomeError(
                "a system service does not see this folder",
                where=str(base),
                remedy=f"Take a base directory outside of {folder}, or `finetuned service install --user`.",
            )
    changes = {
        "Documentation": _documentation(),
        "ExecStart": _start(base),
        "User": f"User={run_as or owner(base)}",
        "Environment": f"Environment={_quoted(f'HOME={home.machinery}')}",
        "ProtectHome": _protect_home(base),
    }
    if base.parent != _STATE or not re.fullmatch(r"[\w.-]+", base.name):
        # One path and so one mount; systemd makes and owns only what lies in /var/lib.
        changes["StateDirectory"] = f"ReadWritePaths={_quoted(base)}"
        changes["StateDirectoryMode"] = ""
        changes["After"] = f"After={GPU_NODES}\nRequiresMountsFor={_quoted(base)}"
    else:
        changes["StateDirectory"] = f"StateDirectory={base.name}"
    return {
        DAEMON: _with(_template(DAEMON), changes),
        GPU_NODES: _with(_template(GPU_NODES), {"Documentation": _documentation()}),
    }


def user_units(home: Home) -> dict[str, str]:
    """Give the unit of a user's own service, name and content."""
    changes = {"Documentation": _documentation(), "ExecStart": _start(home.root)}
    return {DAEMON: _with(_template(f"user/{DAEMON}"), changes)}


def user_folder() -> Path:
    """Give the folder of a user's own units."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd/user"


def owner(base: Path) -> str:
    """Give the user who owns the base directory; in root's place `finetuned`, as no trainer should be root."""
    try:
        name = pwd.getpwuid(base.stat().st_uid).pw_name
    except KeyError:
        name = str(base.stat().st_uid)
    return "finetuned" if name == "root" else name


def write_units(units: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the units. Raises HomeError if they may not be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in units.items():
            (folder / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise HomeError(
            f"the units cannot be written: {error.strerror}",
            where=str(folder),
            remedy="Run it with sudo, or with --user for a service of your own, or look first with --print.",
        ) from error
    return [folder / name for name in units]


def verify(units: Mapping[str, str], *, user: bool) -> str | None:
    """Have systemd read the units. Gives what it objects to, empty if nothing; None where systemd-analyze is not."""
    program = shutil.which("systemd-analyze")
    if program is None:
        return None
    with tempfile.TemporaryDirectory(prefix="finetuned-units-") as scratch:
        for name, content in units.items():
            Path(scratch, name).write_text(_without_absent(content), encoding="utf-8")
        command = [program, "verify", "--recursive-errors=no", *(["--user"] if user else [])]
        done = subprocess.run(
            [*command, *(str(Path(scratch, name)) for name in units)],
            capture_output=True,
            text=True,
            env={"XDG_RUNTIME_DIR": scratch, **os.environ},
            check=False,
        )
    said = (done.stdout + done.stderr).strip()
    return (said or f"systemd-analyze ended with {done.returncode}") if done.returncode else ""


def next_steps(home: Home, units: Mapping[str, str], *, user: bool) -> list[str]:
    """Give the commands that are left to whoever installs: nothing is started or enabled for them."""
    if user:
        return [
            "systemctl --user daemon-reload",
            f"systemctl --user enable --now {DAEMON}",
            "loginctl enable-linger    # or it stops when you log out",
        ]
    (name,) = re.findall(r"^User=(.*)$", units[DAEMON], flags=re.MULTILINE)
    base = shlex.quote(str(home.root))
    steps = []
    try:
        identity = pwd.getpwnam(name).pw_uid
    except KeyError:
        identity = -1
        steps.append(
            f"useradd --system --user-group --home-dir {base} --no-create-home --shell /usr/sbin/nologin {name}"
        )
    if home.root.stat().st_uid != identity:
        steps.append(f"chown -R {name}: {base}")
    return [*steps, "systemctl daemon-reload", f"systemctl enable --now {' '.join(sorted(units))}"]


def _template(name: str) -> str:
    return (_PACKAGE / "systemd" / name).read_text(encoding="utf-8")


def _with(unit: str, changes: Mapping[str, str]) -> str:
    """Replace the first line of each setting named, all of which are there; with nothing it goes."""
    for name, line in changes.items():
        before, after = re.split(rf"^{name}=.*\n", unit, maxsplit=1, flags=re.MULTILINE)
        unit = before + (f"{line}\n" if line else "") + after
    return unit


def _documentation() -> str:
    page = _PACKAGE.parents[1] / "docs/systemd.md"  # a wheel brings none
    return f"Documentation={page.as_uri().replace('%', '%%')}" if page.exists() else ""


def _start(base: Path) -> str:
    # -P: what lies in the working directory is not imported.
    words = [sys.executable, "-P", "-m", "finetuned", "run", "--base-dir", str(base)]
    return "ExecStart=" + " ".join(_quoted(word).replace("$", "$$") for word in words)


def _protect_home(base: Path) -> str:
    """Hide all homes, but for what the daemon itself stands on where that lies in one."""
    code = {Path(sys.prefix), Path(sys.prefix).resolve(), Path(sys.base_prefix), _PACKAGE.parent}
    needed = {path for path in code if _in_a_home(path)}
    lines = [f"BindReadOnlyPaths={_quoted(path)}" for path in sorted(needed) if not path.is_relative_to(base)]
    if _in_a_home(base):
        lines.append(f"BindPaths={_quoted(base)}")
    return "\n".join([f"ProtectHome={'tmpfs' if lines else 'yes'}", *lines])


def _in_a_home(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in _HOMES)


def _quoted(value: object) -> str:
    """Write a value as systemd reads it back: % is doubled, and in quotes if it needs them."""
    text = str(value).replace("%", "%%")
    if re.fullmatch(r"[\w@%+=:,./-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _without_absent(unit: str) -> str:
    """Put `true` in place of programs that may be missing ("-" in front) and are: `verify` objects to them."""

    def present(match: re.Match[str]) -> str:
        return match[0] if Path(match[1]).exists() else "ExecStart=-/bin/true"

    return re.sub(r"^ExecStart=-(\S+).*$", present, unit, flags=re.MULTILINE)
