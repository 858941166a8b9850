"""Several processes that train one model: who we are, our share of a batch, sums over all of us.

torchrun starts the processes and tells each by environment variables who it is; without it there is one, and nothing
here does anything. Gradients travel over NCCL between GPUs and over gloo between CPUs; what is decided together (to
stop, to save) over gloo in both cases.
"""

import contextlib
import datetime
import os
import re
import textwrap
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

GRADIENT_TIMEOUT = datetime.timedelta(minutes=10)     # after which a process that answers no more is given up
TALK_TIMEOUT = datetime.timedelta(hours=3)            # one process may decode a large folder while the others wait


class RankError(Exception):
    """Another process has left, differs from this one, or failed; the message is one line, empty where another one says
    it."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status                           # of the process that ends by it


@dataclass(frozen=True)
class Ranks:
    """This process among all."""
    rank: int = 0
    size: int = 1
    local_rank: int = 0              # among those on this machine
    talk: object = None              # the gloo group for what is decided together

    @property
    def first(self):
        return self.rank == 0

    def share(self, count):
        """The slice of `count` things that is this process's; size divides count."""
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


ALONE = Ranks()


def started_by_torchrun():
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def own_device(device):
    """Under torchrun the GPU that is this process's, made its current one; any other device as it is."""
    if device.type == "cuda" and started_by_torchrun():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def joined(device):
    """The Ranks of this process, which has joined the others. A collective that fails is a RankError inside."""
    if not started_by_torchrun():
        yield ALONE
        return
    try:
        try:
            # torchrun restarts dead processes with the same store, in which the dead ones' addresses still stand.
            store, rank, size = next(rendezvous("env://", timeout=GRADIENT_TIMEOUT))
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                    world_size=size, timeout=GRADIENT_TIMEOUT)
            talk = dist.new_group(backend="gloo", timeout=TALK_TIMEOUT)
        except RuntimeError as error:
            raise RankError(f"rank {os.environ['RANK']}: the processes have not met ({brief(error)}): is the port "
                            f"{os.environ.get('MASTER_PORT')} of {os.environ.get('MASTER_ADDR')} free, and reached by "
                            "all?") from None
        try:
            yield Ranks(rank, size, local_rank(), talk)
        except RuntimeError as error:
            if not of_a_collective(error):
                raise
            raise RankError(f"rank {rank}: another process has left ({brief(error)}); the newest checkpoint is whole, "
                            "and the same command goes on from it") from None
    finally:
        with contextlib.suppress(Exception):           # with a process gone there is nobody to take leave of
            dist.destroy_process_group()


def brief(error):
    """The first line of torch's message without its place in torch's source."""
    line = re.sub(r"\[?/[^\s\]]*:\d+\]?:?\s*", "", str(error).split("\n")[0])
    return textwrap.shorten(line, 160, placeholder=" ...")


def of_a_collective(error):
    """Whether a RuntimeError says that another process is gone."""
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL"))


def average_gradients(ranks, model):
    """The mean over all processes of each gradient, a missing one as zeros: one all_reduce of one flat tensor."""
    if ranks.size == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= ranks.size
    for p, gradient, part in zip(parameters, gradients, flat.split([p.numel() for p in parameters])):
        p.grad = gradient.copy_(part.view(gradient.shape))


def combined(ranks, values, how):
    """{name: tensor ()} -> the same over all processes: the mean, or where `how` has the name, torch.amin or amax."""
    if ranks.size == 1:
        return values
    mine = torch.stack([value.float() for value in values.values()])
    everyone = [torch.empty_like(mine) for _ in range(ranks.size)]
    dist.all_gather(everyone, mine)
    return {name: how.get(name, torch.mean)(column) for name, column in zip(values, torch.stack(everyone).T)}


def largest(ranks, numbers):
    """A list of whole numbers -> the largest of all processes at each place: how all learn what one has decided."""
    if ranks.size == 1:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=ranks.talk)
    return tensor.tolist()


def wait_for_all(ranks):
    """Returns when every process is here."""
    gathered(ranks, None)


def gathered(ranks, thing):
    """A list of every process's thing, on all of them. Things are plain objects and CPU tensors."""
    if ranks.size == 1:
        return [thing]
    everyone = [None] * ranks.size
    dist.all_gather_object(everyone, thing, group=ranks.talk)
    return everyone


def together(ranks, function, here):
    """What function() gives where `here` is true, None elsewhere, when all such processes are done.

    What it raises is raised there; all others then raise a RankError without a message, with the exit status of what
    was raised: torchrun reports whoever ends first.
    """
    result, error = None, None
    if here:
        try:
            result = function()
        except BaseException as raised:                # Ctrl-C too: the others wait
            error = raised
    everyone = gathered(ranks, None if error is None else getattr(error, "status", 1))
    if error is not None:
        raise error
    if failed := [status for status in everyone if status is not None]:
        raise RankError("", failed[0])
    return result


def on_first(ranks, function):
    """What function() gives on the first process, on all of them: a plain object or CPU tensors. Raises as together."""
    if ranks.size == 1:
        return function()
    box = [together(ranks, function, ranks.first)]
    dist.broadcast_object_list(box, src=0, group=ranks.talk)
    return box[0]


def in_turn(ranks, function):
    """function() on the first process of each machine, and when they are done, on the others. Raises as together."""
    first = ranks.local_rank == 0
    result = together(ranks, function, first)
    return result if first else function()


def check_equal(ranks, thing, what):
    """Raises RankError where a plain value, such as a check sum, is not the same on all processes."""
    everyone = gathered(ranks, thing)
    others = [rank for rank, other in enumerate(everyone) if other != everyone[0]]
    if others:
        raise RankError(f"rank {', '.join(map(str, others))} and rank 0 differ in {what}" if ranks.first else "")
