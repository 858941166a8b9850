"""How an update is applied: micro-batches, autocast, backward, all-reduce, finite check, optimizer; EMA; CUDA graph.

training_step.py has the mathematics; nothing here depends on the losses.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import distributed

REDUCTIONS = {"alpha_min": torch.amin, "alpha_max": torch.amax}    # over micro-batches and ranks; the others: the mean


# ------------------------------------------------------------------------------------- process-wide settings

def set_up(device: torch.device, c) -> None:
    """Applies process-wide settings for speed; on the CPU none of them changes a result."""
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if c.TF32 else "highest")
        torch.backends.cudnn.allow_tf32 = c.TF32
        torch.backends.cudnn.benchmark = True              # every step has the same shapes


def keep_freed_memory(keep: bool = True) -> None:
    """Makes glibc keep freed blocks for the next tensors; keep=False restores its default.

    By default glibc returns blocks above 32 MiB to the system and requests them again, zeroed page by page: 40 ms for
    64 MiB on the virtual machine where it was measured, several times the cost of computing with them.
    """
    mmap_max, mmap_threshold, trim_threshold = -4, -3, -1             # parameter numbers in malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):     # another C library: nothing to do
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version        # noqa: B018  raises AttributeError for another C library
        library.mallopt(mmap_max, 0 if keep else 65536)
        library.mallopt(mmap_threshold, 2 ** 25)
        library.mallopt(trim_threshold, 2 ** 31 - 1 if keep else 2 ** 26)


# ------------------------------------------------------------------------------------- one update

def descend(state, c, name: str, terms: Callable, pieces: list) -> dict[str, Tensor]:
    """Applies one update of the network `name`, such as "critic", to the sum of its loss's terms.

    terms(state, c, piece) yields (loss, values to log) once per term; each has a backward pass of its own, so that the
    graphs of two terms never need memory at the same time. All losses and values are means over images, so gradients of
    the micro-batches `pieces` and of all ranks are averaged. Returns the scalars to log: the values, and the sum of
    the losses as "critic_loss".
    """
    model, optimizer = getattr(state, name), getattr(state, f"{name}_optimizer")
    optimizer.zero_grad(set_to_none=True)
    logged = []
    for piece in pieces:
        total, values = 0, {}
        for loss, more in in_mixed_precision(state, c, terms(state, c, piece)):
            (loss / len(pieces)).backward()
            total, values = total + loss.detach(), values | more
        logged.append({f"{name}_loss": total, **values})
    distributed.average_gradients(state.ranks, model)
    apply_if_finite(state, model, optimizer)
    return {key: REDUCTIONS.get(key, torch.mean)(torch.stack([values[key] for values in logged])).detach()
            for key in logged[0]}


def in_mixed_precision(state, c, terms: Iterator) -> Iterator:
    """Yields the terms, each computed under bfloat16 autocast on CUDA; scores, gradient norms, alpha and image stay
    float32 by themselves. The consumer's backward pass runs outside of autocast, as PyTorch recommends."""
    enabled = c.BFLOAT16 and state.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    while True:
        with torch.autocast(state.device.type, torch.bfloat16, enabled=enabled):
            term = next(terms, None)
        if term is None:
            return
        yield term


def apply_if_finite(state, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Runs the optimizer's step, unless a gradient is not finite: then counts the update in state.skipped instead.

    The flag stays on the device, where fused Adam reads it as found_inf, as GradScaler sets it: the host does not wait.
    """
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    bad = ~torch.isfinite(norm)
    state.skipped[0] += bad
    if optimizer.defaults["fused"]:
        optimizer.found_inf, optimizer.grad_scale = bad.float(), None
        optimizer.step()
    elif not bad:
        optimizer.step()


@contextlib.contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """Inside, no gradients of the models' weights are computed."""
    for model in models:
        model.requires_grad_(False)
    try:
        yield
    finally:
        for model in models:
            model.requires_grad_(True)


def count_in_a_row(state, before: Tensor) -> None:
    """Counts, on the device, the newest steps in a row with a skipped update. before: state.skipped before the step."""
    state.skipped[1] = (state.skipped[1] + 1) * (state.skipped[0] > before[0])


def ema_weight(c, images: int, images_seen: int) -> float:
    """Returns the share of the current weights in the next average, after a step of `images` images: a half-life in
    images, shorter at the start (Karras et al. 2020)."""
    half_life = min(1000 * c.EMA_HALF_LIFE_KIMG, c.EMA_RAMP * images_seen)
    return 1 - 0.5 ** (images / half_life) if half_life > 0 else 1.0


@torch.no_grad()
def update_ema(state) -> None:
    """Averages the generator's weights: ema += state.ema_weight * (generator - ema)."""
    average, current = list(state.ema.parameters()), list(state.generator.parameters())
    if state.device.type != "cuda":
        torch._foreach_lerp_(average, current, state.ema_weight.item())
        return
    change = torch._foreach_sub(current, average)        # the weight stays a tensor: a CUDA graph reads its new value
    torch._foreach_mul_(change, state.ema_weight.float())
    torch._foreach_add_(average, change)


# ------------------------------------------------------------------------------------- CUDA

def wait_for_the_step_before(state) -> None:
    """On CUDA, waits for the step before the one that was just started. The host prepares a step while the device
    computes the one before; if it went further ahead, a signal or MINUTES would end the run late."""
    if state.device.type == "cuda":
        before, state.step_end = state.step_end, torch.cuda.Event(blocking=True)
        state.step_end.record()
        if before is not None:
            before.synchronize()


class RecordedStep:
    """A function (state, c, batches) -> scalars, recorded once as a CUDA graph and then replayed: thousands of small
    kernels start as one. The next replay overwrites the scalars.

    The first steps run eagerly, on a stream of their own as PyTorch requires, while cuDNN chooses its algorithms and
    Adam creates its averages. The recording keeps the addresses of all tensors, so new batches are copied into the
    memory of the recorded ones.
    """

    WARM_UP = 3      # steps

    def __init__(self, function: Callable):
        self.function, self.steps, self.graph = function, 0, None

    def __call__(self, state, c, batches: list) -> dict[str, Tensor]:
        self.steps += 1
        if self.steps <= self.WARM_UP:
            stream, current = torch.cuda.Stream(state.device), torch.cuda.current_stream(state.device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                values = self.function(state, c, batches)
            current.wait_stream(stream)
            return values
        if self.graph is None:
            self.graph, self.batches = torch.cuda.CUDAGraph(), batches
            with torch.cuda.graph(self.graph):
                self.values = self.function(state, c, batches)
        else:
            torch._foreach_copy_(*([tensor for batch in some for tensor in batch.tensors()]
                                   for some in (self.batches, batches)))
        self.graph.replay()
        return self.values


def run_recorded(function: Callable, state, c, batches: list) -> dict[str, Tensor]:
    """Returns function(state, c, batches), on CUDA with CUDA_GRAPH through a RecordedStep: one graph per kind of batch.
    """
    if not c.CUDA_GRAPH or state.device.type != "cuda" or state.ranks.size > 1:
        return function(state, c, batches)
    kind = tuple(batch.kind for batch in batches)
    return state.graphs.setdefault(kind, RecordedStep(function))(state, c, batches)
