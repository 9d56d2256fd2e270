"""Which job starts next, and on which GPUs. Pure: state in, decisions out.

First in, first out within a priority: a job that has to wait for GPUs is passed by none that would need them too, so
that nothing starves. Jobs for an engine on other machines wait in that engine's queue, not in ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

LOCAL = "local"
CPU = "cpu"  # the one device of a machine without GPUs
FILL = 0.9  # share of a GPU's memory that predictions of jobs which share it may come to


@dataclass(frozen=True)
class Device:
    """A GPU of this machine, or its processor where it has none."""

    id: str  # the GPU's UUID
    name: str  # as people call it
    memory: int | None = None  # bytes
    others: int = 0  # bytes that other people's processes hold there, as far as that is known
    busy: str = ""  # why no job is started on it now, though none of ours is at work there


@dataclass(frozen=True)
class Wish:
    """What a queued job needs."""

    job: str
    launcher: str = LOCAL
    gpus: int | None = 1  # None: not known yet
    memory: int | None = None  # bytes on its GPU, as predicted; None: not known
    shares: bool = False  # whether it may be on a GPU with others
    same_as: str = ""  # names its data and settings; two jobs of one name are not trained at the same time


@dataclass(frozen=True)
class Work:
    """A job under way."""

    job: str
    devices: tuple[str, ...] = ()
    launcher: str = LOCAL
    memory: int | None = None
    shares: bool = False
    same_as: str = ""


@dataclass(frozen=True)
class Decisions:
    """Which jobs start where, in their order, and why others wait, where that is more than their turn."""

    starts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # the ids of devices; none for other machines
    waits: Mapping[str, str] = field(default_factory=dict)


def schedule(
    queue: Iterable[Wish], *, devices: Sequence[Device], work: Sequence[Work], most_elsewhere: int = 0
) -> Decisions:
    """Decide. `queue` is in the order in which jobs start; engines have at most `most_elsewhere` jobs at once."""
    starts: dict[str, tuple[str, ...]] = {}
    waits: dict[str, str] = {}
    under_way = list(work)
    first = {one.same_as: one.job for one in work}  # of each training, the job that does it or will
    blocked = False  # whether a local job waits for GPUs
    for wish in queue:
        if wish.same_as and first.setdefault(wish.same_as, wish.job) != wish.job:
            waits[wish.job] = f"{first[wish.same_as]} is the same file with the same settings"
            continue
        if wish.launcher != LOCAL:
            elsewhere = sum(one.launcher != LOCAL for one in under_way)
            if elsewhere >= most_elsewhere:
                waits[wish.job] = f"{elsewhere} jobs are with {wish.launcher} already"
                continue
            chosen: tuple[str, ...] | None = ()
        elif blocked:
            continue
        else:
            chosen, why = _choose(wish, devices, under_way)
            if chosen is None:
                blocked = True
                waits |= {wish.job: why} if why else {}
                continue
        starts[wish.job] = chosen or ()
        under_way.append(Work(wish.job, chosen or (), wish.launcher, wish.memory, wish.shares, wish.same_as))
    return Decisions(starts, waits)


def _choose(wish: Wish, devices: Sequence[Device], work: Sequence[Work]) -> tuple[tuple[str, ...] | None, str]:
    """Give the devices for a job, or None and why it waits. An empty GPU is taken before one that is shared."""
    if wish.gpus is None:
        return None, "how much memory it needs is being predicted"
    on = {device.id: [one for one in work if device.id in one.devices] for device in devices}
    empty = [device.id for device in devices if not on[device.id] and not device.busy]
    if len(empty) >= wish.gpus:
        return tuple(empty[: wish.gpus]), ""
    why = ""
    if wish.gpus == 1 and wish.shares and wish.memory is not None:
        for device in devices:
            if on[device.id] and not device.busy and _fits(wish.memory, device, on[device.id]):
                return (device.id,), ""
            if on[device.id] and _fits(wish.memory, replace(device, others=0), on[device.id]):
                why = f"others hold {device.others / 2**30:.1f} GiB of {device.name}, which it could share"
    return None, why or _why(wish.gpus, devices, on)


def _fits(memory: int, device: Device, work: Sequence[Work]) -> bool:
    if device.memory is None or not all(one.shares and one.memory is not None for one in work):
        return False
    return memory + sum(one.memory or 0 for one in work) + device.others <= FILL * device.memory


def _why(needed: int, devices: Sequence[Device], on: Mapping[str, Sequence[Work]]) -> str:
    taken = [f"{device.name} is at work on {on[device.id][0].job}" for device in devices if on[device.id]]
    busy = [f"{device.name} {device.busy}" for device in devices if device.busy and not on[device.id]]
    if needed == 1 and taken and not busy:
        return ""  # it is not its turn yet
    parts = "; ".join([*taken, *busy]) or "there is no GPU that it may use"
    return parts if needed == 1 else f"it needs {needed} GPUs: {parts}"
