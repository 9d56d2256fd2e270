"""Telling systemd how the daemon is: READY, STATUS, WATCHDOG, EXTEND_TIMEOUT_USEC, STOPPING, as sd_notify(3) describes.
Without systemd, nothing happens.
"""

from __future__ import annotations

import os
import socket


def notify(**state: str | int) -> None:
    """Send `KEY=value` lines to systemd, `notify(ready=1)` as READY=1. Never raises: no unit fails for want of news."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    lines = ((key.upper(), str(value).replace("\n", " ")) for key, value in state.items())  # a line is a message
    message = "\n".join("=".join(line) for line in lines)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto(message.encode(), address)
    except OSError:
        pass


def watchdog_seconds() -> float | None:
    """Give how often systemd wants a sign of life, half the time it waits for one; None if it does not."""
    period = os.environ.get("WATCHDOG_USEC")
    return int(period) / 2e6 if period else None
