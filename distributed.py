"""Data parallelism over processes: ranks, this rank's slice of a batch, all-reduce, errors on one rank.

torchrun starts the processes and describes each in environment variables; with a single process no function here
communicates. Gradients travel over NCCL between GPUs and over gloo between CPUs; decisions, such as to stop or to
save, over gloo in both cases.
"""

import contextlib
import datetime
import os
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from errors import RunError

GRADIENT_TIMEOUT = datetime.timedelta(minutes=10)     # after which a rank that does not answer counts as lost
DECISION_TIMEOUT = datetime.timedelta(hours=3)        # rank 0 may decode a large folder while the others wait


class RankError(RunError):
    """Another rank has left, differs from this one, or failed; without a message if that rank prints it."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Ranks:
    """This process among all that train together."""
    rank: int = 0
    size: int = 1
    local_rank: int = 0              # among those on this machine
    group: object = None             # the gloo group for decisions

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def slice_of(self, count: int) -> slice:
        """Returns this rank's slice of `count` items; size divides count."""
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


SINGLE = Ranks()


# ------------------------------------------------------------------------------------- joining

def started_by_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def own_device(device: torch.device) -> torch.device:
    """Returns this rank's GPU under torchrun, and makes it the current one; any other device unchanged."""
    if device.type == "cuda" and started_by_torchrun():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Joins the process group and yields this process's Ranks. A failed collective inside raises RankError."""
    if not started_by_torchrun():
        yield SINGLE
        return
    try:
        try:
            # torchrun restarts failed processes with the same store, which still has the addresses of the old ones.
            store, rank, size = next(rendezvous("env://", timeout=GRADIENT_TIMEOUT))
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                    world_size=size, timeout=GRADIENT_TIMEOUT)
            group = dist.new_group(backend="gloo", timeout=DECISION_TIMEOUT)
        except RuntimeError as error:
            raise RankError(f"rank {os.environ['RANK']}: the processes did not connect ({first_line(error)}): check "
                            f"that port {os.environ.get('MASTER_PORT')} of {os.environ.get('MASTER_ADDR')} is free and "
                            "can be reached from every machine") from None
        try:
            yield Ranks(rank, size, local_rank(), group)
        except RuntimeError as error:
            if not is_collective_error(error):
                raise
            raise RankError(f"rank {rank}: another process has left ({first_line(error)}); the newest checkpoint is "
                            "complete, and the same command continues from it") from None
    finally:
        with contextlib.suppress(Exception):           # a peer may already be gone
            dist.destroy_process_group()


def first_line(error: Exception) -> str:
    """Returns the first line of torch's message, without its source location, shortened."""
    line = re.sub(r"\[?/[^\s\]]*:\d+\]?:?\s*", "", str(error).split("\n")[0])
    return textwrap.shorten(line, 160, placeholder=" ...")


def is_collective_error(error: RuntimeError) -> bool:
    """Returns whether an error means that a peer is gone."""
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL"))


# ------------------------------------------------------------------------------------- tensors

def average_gradients(ranks: Ranks, model: torch.nn.Module) -> None:
    """Replaces each gradient by its mean over all ranks: one all_reduce of one flat tensor. A part of the model that
    has no gradient must have none on any rank."""
    if ranks.size == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= ranks.size
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view(gradient.shape))


def reduce_values(ranks: Ranks, values: dict, reductions: dict) -> dict:
    """{name: scalar tensor} -> the same reduced over all ranks: by reductions[name], or else by the mean."""
    if ranks.size == 1:
        return values
    mine = torch.stack([value.float() for value in values.values()])
    everyone = [torch.empty_like(mine) for _ in range(ranks.size)]
    dist.all_gather(everyone, mine)
    return {name: reductions.get(name, torch.mean)(column) for name, column in zip(values, torch.stack(everyone).T)}


# ------------------------------------------------------------------------------------- decisions

def maximum(ranks: Ranks, numbers: list[int]) -> list[int]:
    """Returns the maximum over all ranks of each number: how all ranks learn what one of them decided."""
    if ranks.size == 1:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=ranks.group)
    return tensor.tolist()


def gather(ranks: Ranks, item) -> list:
    """Returns every rank's item, on all ranks. Items are plain objects and CPU tensors."""
    if ranks.size == 1:
        return [item]
    everyone = [None] * ranks.size
    dist.all_gather_object(everyone, item, group=ranks.group)
    return everyone


def on_some_ranks(ranks: Ranks, function: Callable, selected: bool):
    """Returns function() on the ranks with selected=True, None on the others, after all of them have finished.

    If it raises on one rank, the others raise a RankError without a message and with the same exit status.
    """
    result, error = None, None
    if selected:
        try:
            result = function()
        except BaseException as raised:                # Ctrl-C too: the other ranks are waiting
            error = raised
    everyone = gather(ranks, None if error is None else getattr(error, "status", 1))
    if error is not None:
        raise error
    if failed := [status for status in everyone if status is not None]:
        raise RankError("", failed[0])
    return result


def on_rank_0(ranks: Ranks, function: Callable):
    """Calls function() on rank 0 and returns its result, a plain object or CPU tensors, on all ranks."""
    if ranks.size == 1:
        return function()
    box = [on_some_ranks(ranks, function, ranks.is_first)]
    dist.broadcast_object_list(box, src=0, group=ranks.group)
    return box[0]


def once_per_machine_first(ranks: Ranks, function: Callable):
    """Returns function(), called on one rank of each machine and, when those have finished, on the others."""
    first = ranks.local_rank == 0
    result = on_some_ranks(ranks, function, first)
    return result if first else function()


def check_equal(ranks: Ranks, value, description: str) -> None:
    """Raises RankError if a plain value, such as a checksum, differs between ranks."""
    everyone = gather(ranks, value)
    others = [rank for rank, other in enumerate(everyone) if other != everyone[0]]
    if others:
        raise RankError(f"rank {', '.join(map(str, others))} and rank 0 differ in {description}"
                        if ranks.is_first else "")
