"""What a training step does: multiply-adds, operator calls, bytes, and its time by purpose. Used by step.py."""

import math
import re
from collections.abc import Callable

import tables
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ALLOCATES = re.compile("aten::(new_)?empty")                     # writes nothing
OVERWRITES = ("aten::copy_", "aten::_foreach_copy_", "aten::fill_", "aten::zero_", "aten::_foreach_zero_")

# The first pattern that is found in an operator's name decides; other operators work element by element.
OPTIMIZERS = "optimizers, EMA, finite check"
PURPOSES = {
    OPTIMIZERS: "^Optimizer|_fused_|_foreach_",
    "autograd, Python and launches": "^(?!aten::)",
    "convolution, backward": "conv.*backward|backward.*conv",
    "convolution, forward": "conv",
    "attention": "attention",
    "pooling, backward": "pool.*backward",
    "pooling, forward": "pool",
    "matrix products": r"::(addmm|mm|addbmm|baddbmm|bmm|matmul|linear|mv|dot)(_backward)?$",
    "normalisation": "group_norm|layer_norm",
    "resizing and padding": "upsample|interpolate|_pad|pixel_(un)?shuffle",
    "copies and casts": (r"::(copy_|_to_copy|to|type_as|clone|contiguous|cat|stack|index|gather|scatter\w*|repeat|"
                         r"roll)$"),
    "views and memory": (r"::(view|_?reshape\w*|_unsafe_view|as_strided_?|resolve_\w+|(new_)?empty\w*|resize_|"
                         r"detach_?|alias|set_|t|numpy_T|transpose|permute|movedim|expand\w*|(un)?squeeze|select|slice|"
                         r"narrow|(un)?flatten|chunk|(unsafe_)?split\w*|unbind|lift_fresh|result_type|item|"
                         r"_local_scalar_dense|\w+_like)$"),
    "reductions": r"::(sum|mean|std|var\w*|amax|amin|max|min|any|all|\w*norm|nansum|prod)(_out)?$",
    "random draws": r"::(rand\w*|normal_?|uniform_?|bernoulli\w*)$",
    "element by element": "",
}


# ------------------------------------------------------------------------------------- counting

def tensors(values) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def size(tensor: Tensor) -> int:
    """Returns the bytes of a tensor in memory, where an expanded tensor has each element once."""
    return tensor.element_size() * math.prod(n for n, step in zip(tensor.shape, tensor.stride()) if step > 0)


class CountOperators(TorchDispatchMode):
    """Counts what the operators inside do, backward passes included.

    multiply_adds: of convolutions and matrix products. torch's FlopCounterMode raises under a double backward, and
    counts fused attention as 0 on the CPU.
    calls: operators that write memory; views do not.
    bytes: of the tensors that these operators read and write, as if no cache kept them from one to the next.
    """

    def __init__(self):
        super().__init__()
        self.multiply_adds = self.calls = self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        count = flop_registry.get(getattr(operator, "_overloadpacket", None))
        if count is not None:
            self.multiply_adds += count(*args, **kwargs, out_val=out) // 2      # the registry counts both operations
        self.count_bytes(operator._schema, args, kwargs, out)
        return out

    def count_bytes(self, schema, args, kwargs, out):
        given = list(zip(schema.arguments, args)) + [(a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs]
        written = tensors([value for a, value in given if a.alias_info is not None and a.alias_info.is_write])
        read = tensors([value for a, value in given
                        if not (schema.name in OVERWRITES and a.alias_info is not None and a.alias_info.is_write)])
        known = {tensor.untyped_storage().data_ptr() for tensor in (*read, *written)}
        if not ALLOCATES.match(schema.name):
            written += [tensor for tensor in tensors(out) if tensor.untyped_storage().data_ptr() not in known]
        if written:                                                             # if not, the result is a view
            self.calls += 1
            self.bytes += sum(map(size, (*read, *written)))


def count(function: Callable) -> CountOperators:
    """Returns the counts of function()."""
    with torch.enable_grad(), CountOperators() as counter:
        function()
    return counter


def multiply_adds(function: Callable) -> int:
    """Returns the multiply-adds of function(), those of attention included."""
    with sdpa_kernel(SDPBackend.MATH):
        return count(function).multiply_adds


# ------------------------------------------------------------------------------------- time by purpose

def purpose(operator: str) -> str:
    """Returns which of PURPOSES an operator such as "aten::mm" has."""
    return next(name for name, pattern in PURPOSES.items() if re.search(pattern, operator))


def purpose_of(event) -> str:
    """Returns the purpose of a profiled operator. What an optimizer calls belongs to the optimizer."""
    above = event
    while above is not None and purpose(above.name) != OPTIMIZERS:
        above = above.cpu_parent
    return purpose(event.name) if above is None else OPTIMIZERS


def time_by_purpose(function: Callable, device: torch.device) -> tuple[dict[str, tuple[float, int]], float, int]:
    """Profiles function() once. Returns {purpose: (seconds, calls)}, the longest first, the seconds of the whole, and
    its number of kernels.

    On CUDA the time and the number of the kernels that an operator starts; on the CPU its own time and its calls.
    On the CPU the purposes sum to the whole, on CUDA to what the profiler can attribute to operators.
    """
    on_cuda, found = device.type == "cuda", {}
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]
    with torch.profiler.profile(activities=activities) as profiler, torch.profiler.record_function("whole"):
        function()
        tables.now()
    events = profiler.events()
    for event in events:
        if event.device_type != DeviceType.CPU or (on_cuda and event.is_user_annotation):
            continue
        name, above = purpose_of(event), event.cpu_parent
        duration = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        calls = len(event.kernels) if on_cuda else int(above is None or purpose_of(above) != name)
        before = found.get(name, (0, 0))
        found[name] = before[0] + duration / 1e6, before[1] + calls
    if on_cuda:
        kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        whole = sum(event.device_time_total for event in kernels) / 1e6
    else:
        kernels, whole = [], next(event for event in events if event.name == "whole").cpu_time_total / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1][0])), whole, len(kernels)
