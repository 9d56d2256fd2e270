"""The processes of one training: one alone, or several ranks that take a share of every step each.

Words that they exchange go through the CPU, by gloo, where one that is gone is noticed at once, so that they are waited
for without an end. Gradients go from device to device. NCCL notices nobody's end, so for these they wait minutes, and a
word comes before them, so that all begin at one time. Nobody wraps the model: DDP sums in the middle of the backward
pass, where a rank that has run out of memory and begins its part again would leave the others hanging.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from finetuned.errors import ConfigError, ModelError
from finetuned.trainer import memory, steps
from finetuned.trainer.ends import RankLostError, StopAskedError
from finetuned.trainer.store import lengths_of
from finetuned.trainer.tokens import Example

_MEETING = timedelta(minutes=30)  # for all to be there
_WORDS = timedelta(days=3650)  # no end: one may answer questions for days while the others wait
_SUMS = timedelta(minutes=10)  # of a gradient, or of a layer in a pass that all make together
_SILENT, _ASKED_AGAIN = 60, 10  # seconds until a connection's other end is asked whether it is there, nine times
_BUCKET = 8 * 2**20  # numbers that are summed at once
_FIRST, _COMES = "first to fail", "rank {} comes"

T = TypeVar("T")


@dataclass
class Group:
    """A training's processes, seen from one of them. Whoever is alone pays nothing for being asked.

    Its methods are called by all ranks, in the same order. They raise RankLostError where one does not come.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if _cuda() else "cpu"))
    store: Any = None  # torch's, which rank 0 keeps
    words: Any = None  # torch's process group for them
    sharded: bool = False  # whether they share the model's layers
    _room: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # for gradients on their way

    @property
    def leads(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    @property
    def lockstep(self) -> bool:
        """Whether ranks need each other for every pass through the model, and so must all make as many."""
        return self.sharded and self.size > 1

    def any(self, flag: bool) -> bool:  # noqa: FBT001, as Python's own
        """Whether it is so on any rank."""
        return bool(self.most(float(flag)))

    def most(self, number: float) -> float:
        """Give the highest of all ranks' numbers."""
        return self._reduced([number], dist.ReduceOp.MAX)[0]

    def sum(self, numbers: list[float]) -> list[float]:
        """Add up what ranks have, number by number."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def wait(self) -> None:
        """Wait until all are here."""
        self.most(0.0)

    def told(self, found: Callable[[], T]) -> T:
        """Let rank 0 find something out, and tell it to all."""
        value = [found()] if self.leads else [None]
        if self.size > 1:
            with _others_there():
                dist.broadcast_object_list(value, src=0, group=self.words)
        return value[0]  # type: ignore[return-value]

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Let rank 0 do something before the others: what it leaves on the disk is there for them."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:  # where it failed the others learn that from its end
            self.wait()

    def share(self, rows: list[int], lengths: list[int]) -> list[int]:
        """Give the rows of a step that are this rank's."""
        return steps.deal(rows, lengths, self.size)[self.rank]

    def share_of(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Give the examples that are this rank's."""
        if self.size == 1:
            return examples
        return [examples[row] for row in self.share(list(range(len(examples))), lengths_of(examples))]

    def short_of(self, rows: list[int], lengths: list[int], bound: steps.Bound) -> int:
        """Give how many micro-batches of a step's rows this rank has less than the one with most, where that counts."""
        if not self.lockstep:
            return 0
        counts = [len(steps.cut(share, lengths, bound)) for share in steps.deal(rows, lengths, self.size)]
        return max(counts) - counts[self.rank]

    def together(self, work: Callable[[], float]) -> float:
        """Let each rank do its part of a work, in which it waits for nobody but in lockstep, and give the sum.

        Raises MemoryError on all of them if memory ran out on one, StopAskedError if one was asked to stop. In lockstep
        memory that runs out is an error of that rank alone, which must end: the others wait in the middle of a pass.
        """
        if self.size == 1:
            return work()
        found, why, asked = 0.0, None, False
        if self.lockstep:
            self.wait()
        try:
            found = work()
        except StopAskedError:
            asked = True
        except (RuntimeError, MemoryError) as error:
            why = memory.out_of_memory(error)
            if self.lockstep and why is None and _speaks_of_others(error):
                raise RankLostError(_first_line(error)) from None
            if why is None or self.lockstep:
                raise
        total, failed, stops = self.sum([found, why is not None, asked])
        if stops:
            raise StopAskedError
        if failed:
            raise MemoryError(self._first_of(why))
        return total

    def _first_of(self, word: str | None) -> str:
        words: list[str | None] = [None] * self.size
        with _others_there():
            dist.all_gather_object(words, word, group=self.words)
        return next(f"{said} (rank {rank})" for rank, said in enumerate(words) if said is not None)

    def make_room(self, parameters: Iterable[torch.Tensor]) -> None:
        """Take the memory that summing gradients needs, so that it does not run out then. Raises as `together`."""
        numbers = min(_BUCKET, sum(one.numel() for one in parameters))

        def take() -> float:
            self._room = torch.zeros(numbers, dtype=torch.float32, device=self.device)
            return 0.0

        if self.size > 1:
            self.together(take)
            with _others_there():
                for part in (self._room, self._room[:1]):  # NCCL takes its own when it first sums so much
                    dist.all_reduce(part)

    def complete(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Give this rank zeros for each gradient that only others have, to be summed. One that no rank has stays away.

        Raises as `together`: there may be no memory for them.
        """
        if self.size == 1:
            return
        parameters = list(parameters)
        unready = any(one.grad is None or not one.grad.is_contiguous() for one in parameters)
        *somewhere, somebody = self._reduced(
            [*(one.grad is not None for one in parameters), unready], dist.ReduceOp.MAX
        )
        wanted = [one for one, there in zip(parameters, somewhere, strict=True) if there]
        if somebody:
            self.together(lambda: _completed(wanted))

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add up all ranks' gradients, to the same bits on each, once they are complete."""
        if self.size == 1:
            return
        gradients = [one.grad for one in parameters if one.grad is not None]
        with _others_there():
            for bucket in _buckets(gradients, _BUCKET):
                self._sum(bucket)

    def _sum(self, bucket: list[torch.Tensor]) -> None:
        if len(bucket) == 1:
            dist.all_reduce(bucket[0])
            return
        room = self._room[: sum(one.numel() for one in bucket)]
        places = torch.split(room, [one.numel() for one in bucket])
        for place, one in zip(places, bucket, strict=True):
            place.view(one.shape).copy_(one)
        dist.all_reduce(room)
        for place, one in zip(places, bucket, strict=True):
            one.copy_(place.view(one.shape))

    @torch.no_grad()
    def spread(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give all ranks what rank 0 has, in place."""
        if self.size > 1:
            self.wait()
            with _others_there():
                for tensor in tensors:
                    whole = tensor.detach().contiguous()
                    dist.broadcast(whole, src=0)
                    tensor.copy_(whole)

    def needing_others(self, work: Callable[[], T]) -> T:
        """Do work in which ranks wait for each other by torch's own means."""
        with _others_there():
            return work()

    def first_to_fail(self) -> bool:
        """Whether no other rank has asked this before: one of them tells what is wrong with all."""
        if self.store is None:
            return True
        try:
            return bool(self.store.add(_FIRST, 1) == 1)
        except RuntimeError:  # rank 0, which keeps it, is gone, and has told why if it could
            return False

    def leave(self) -> None:
        """Be alone again: nothing is asked of the others any more."""
        if self.size > 1:
            dist.destroy_process_group()
            self.rank, self.size, self.store, self.words = 0, 1, None, None

    def _reduced(self, numbers: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64)
        with _others_there():
            dist.all_reduce(found, op=how, group=self.words)
        result: list[float] = found.tolist()
        return result


def join(*, sharded: bool = False) -> Group:
    """Take the place among ranks that the environment gives, as torchrun's does. Raises RankLostError, ConfigError."""
    rank, size, place = _place()
    cuda = _cuda()
    if cuda and size > 1:
        if place >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {rank} has no GPU of its own: this training sees {torch.cuda.device_count()}",
                where=f"{size} processes",
                remedy="Give it as many GPUs as processes.",
            )
        torch.cuda.set_device(place)
    store = meet()
    if size == 1:
        return Group()
    with _others_there():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=_SUMS,
        )
        words = dist.new_group(backend="gloo", timeout=_WORDS)
    _keep_alive()
    return Group(rank, size, torch.device("cuda", place) if cuda else torch.device("cpu"), store, words, sharded)


def meet(*, well: bool = True) -> Any:
    """Meet the other ranks, if there are any, and tell them whether this one goes on; give the store that all share.

    Raises RankLostError where another does not come, or not go on. What the environment said is taken out: accelerate
    would wrap the model where it finds that.
    """
    rank, size, _ = _place()
    for name in (*_ENVIRONMENT, *_OF_MPI):
        os.environ.pop(name, None)
    if size == 1:
        return None
    with _others_there():
        store, *_ = next(rendezvous("env://", rank, size, timeout=_MEETING))
        store.set(_COMES.format(rank), "well" if well else "only to say so")
        if well and any(store.get(_COMES.format(other)) != b"well" for other in range(size)):
            raise RankLostError("it has ended before all had met")
    return store


def _place() -> tuple[int, ...]:
    """Give this process's rank, the number of ranks, and its rank on this machine."""
    return tuple(int(os.environ.get(name, usual)) for name, usual in _ENVIRONMENT.items())


_ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
_OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # which accelerate heeds, too
_PLACE = re.compile(r"^\[[^\]]*:\d+\] *")
_GONE = re.compile(r"\b(gloo|connection|timed? ?out|socket|(TCP|Hash|Prefix)?store|peer|NCCL)\b", re.IGNORECASE)


def _cuda() -> bool:
    """Whether there is a GPU. Raises ModelError where this process was given one and CUDA does not find it."""
    if torch.cuda.is_available():
        return True
    if torch.version.cuda and os.environ.get("CUDA_VISIBLE_DEVICES"):
        raise ModelError(
            f"CUDA finds no GPU, and {os.environ['CUDA_VISIBLE_DEVICES']} is for this training",
            remedy="See `finetuned doctor` and `nvidia-smi`; it is tried again.",
            code="gpu_gone",
        )
    return False


def _keep_alive() -> None:
    """Have the kernel end connections to a machine that is gone without a word, as one without power is: gloo waits."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile, or no connection
            if entry.is_socket():
                with socket.socket(fileno=os.dup(int(entry.name))) as one:
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENT)
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _ASKED_AGAIN)
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _buckets(tensors: Iterable[torch.Tensor], most: int) -> Iterator[list[torch.Tensor]]:
    """Give tensors in groups of at most so many numbers; a larger one alone."""
    bucket: list[torch.Tensor] = []
    numbers = 0
    for tensor in tensors:
        if bucket and numbers + tensor.numel() > most:
            yield bucket
            bucket, numbers = [], 0
        bucket.append(tensor)
        numbers += tensor.numel()
    if bucket:
        yield bucket


@torch.no_grad()
def _completed(parameters: Iterable[torch.nn.Parameter]) -> float:
    for one in parameters:
        zeros = partial(torch.zeros_like, one, memory_format=torch.contiguous_format)
        one.grad = zeros() if one.grad is None else one.grad.contiguous()
    return 0.0


@contextmanager
def _others_there() -> Iterator[None]:
    """Raise RankLostError where torch says in its many ways that another rank has not come."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or _GONE.search(str(error))
        if memory.out_of_memory(error) is not None or isinstance(error, torch.AcceleratorError) or not lost:
            raise
        raise RankLostError(_first_line(error)) from None


def _speaks_of_others(error: BaseException) -> bool:
    """Whether an error in the middle of a pass is that another rank is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _first_line(error: BaseException) -> str:
    """Say in short what torch says, less the place in its source that it begins with."""
    return _PLACE.sub("", str(error).strip()).split("\n")[0].split(". ")[0]
