"""In the trainer's place: tries what the unit's hardening forbids, and notes in logs/probe.json what came of it."""

import ctypes
import errno
import json
import os
import socket
import sys
from pathlib import Path

BASE = Path(sys.argv[1]).parents[2]
LIBC = ctypes.CDLL(None, use_errno=True)


def said(attempt) -> str:
    """Give the name of the error, or `allowed`."""
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))
    return "allowed"


def call(name: str, *arguments) -> None:
    if getattr(LIBC, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), "")


def write(path: str) -> None:
    Path(path).write_text("x")


def set_id_file() -> None:
    path = BASE / "logs/suid"
    path.touch()
    path.chmod(0o4755)


def status(name: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))


CLONE_NEWUSER, CLONE_NEWNS, SCHED_FIFO, PERSONALITY_LINUX32, SYS_CLOCK = 0x10000000, 0x20000, 1, 8, 0

found = {
    "write to the base directory": said(lambda: write(BASE / "logs/probe")),
    "write to /tmp": said(lambda: write("/tmp/finetuned-probe")),
    "write to /etc": said(lambda: write("/etc/probe")),
    "write to /usr": said(lambda: write("/usr/probe")),
    "write to /var/lib": said(lambda: write("/var/lib/probe")),
    "write to the code": said(lambda: write("/opt/finetuned/probe")),
    "write to /proc/sys": said(lambda: write("/proc/sys/kernel/hostname")),
    "write to a control group": said(lambda: Path("/sys/fs/cgroup/systemd/probe").mkdir()),
    "homes": "seen" if list(Path("/root").glob(".*")) else "hidden",
    "other users' processes": "seen" if Path("/proc/1").exists() else "hidden",
    "mount": said(lambda: call("mount", b"none", b"/tmp", b"tmpfs", 0, None)),
    "a user namespace": said(lambda: call("unshare", CLONE_NEWUSER)),
    "a netlink socket": said(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()),
    "an internet socket": said(lambda: socket.socket(socket.AF_INET).close()),
    "a set-user-id file": said(set_id_file),
    "real-time scheduling": said(lambda: os.sched_setscheduler(0, SCHED_FIFO, os.sched_param(1))),
    "another personality": said(lambda: call("personality", PERSONALITY_LINUX32)),
    "ptrace": said(lambda: call("ptrace", 0, 0, None, None)),
    "kernel log": said(lambda: call("klogctl", 3, ctypes.create_string_buffer(10), 10)),
    "another user": said(lambda: os.setuid(0)),
    "host name": said(lambda: socket.sethostname("probe")),
    "own code": said(lambda: __import__("mmap").mmap(-1, 4096, prot=7)),
    "own thread's name": said(lambda: write(f"/proc/self/task/{os.getpid()}/comm")),
    "shared memory by descriptor": said(lambda: os.close(os.memfd_create("probe"))),
    "capabilities": status("CapEff") + status("CapBnd"),
    "no new privileges": status("NoNewPrivs"),
    "core size": __import__("resource").getrlimit(__import__("resource").RLIMIT_CORE)[0],
    "user": __import__("pwd").getpwuid(os.geteuid()).pw_name,
    "umask": f"{os.umask(0):04o}",
    "home": os.environ["HOME"],
}
(BASE / "logs/probe.json").write_text(json.dumps(found))
sys.exit(78)
