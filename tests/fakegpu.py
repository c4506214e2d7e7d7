"""An accelerator emulated on the CPU, so that device placement is proven without a GPU.

Idea: on a CPU every tensor is in the right place, so a forgotten `.to(device)` passes all tests and fails on the first
GPU. `install` registers a device "fakegpu" with torch. A tensor there is a `FakeGpuTensor`: a shell without memory of
its own, around a CPU tensor, `host`, that holds the values. Each operator runs on the hosts, so results are the CPU's
to the last bit, and raises where CUDA would: if tensors of both devices meet.

1. Tensor operators reach `FakeGpuTensor.__torch_dispatch__`, below autograd, which therefore works as on any device.
2. Factories (`torch.zeros(device=...)`) have no tensor argument that could say where to go: they are registered.
3. Autocast has a list of operators for each device; that of the CPU or that of CUDA is taken, see `autocast_lists`.
4. What crosses between the devices, and what makes the CPU wait for the device, is counted by place: see `counted`.

What raises, as on CUDA: operators on tensors of both devices, `.numpy()`, a CPU generator for a draw on the device.
What does not: CPU tensors without dimensions in arithmetic, CPU tensors as indices, `copy_` and `to`.

What it cannot see:
- kernels: their rounding, speed, memory, limits on types and sizes; what CUDA alone refuses, or alone can do;
- time: streams, overlap, and races of queued work, such as a buffer that is changed before its copy was made;
- waiting inside library kernels that are not in WAITS, such as torch.linalg's checks of its input; and inside the
  optimiser, whose grouped ("foreach") form CUDA takes and this device does not;
- code behind `device.type == "cuda"`: the stopwatch's synchronisation, the peak of memory, the search for a GPU;
- generators of the device, several devices, compilation, 4-bit weights, in-place changes of a shape (an error says so).

It rests on torch internals that may change: tests/test_device.py runs it in a process of its own, and skips its tests
where `install` fails.
"""

import sys
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "fakegpu"
aten, CPU = torch.ops.aten, torch.device("cpu")
DEVICE = torch.device("privateuseone", 0)  # torch's name of a device that is not its own, until `install` renames it

# The folder whose code is named as the place of a transfer. Tests of planted faults name that of their copy.
project = Path(__file__).resolve().parent.parent

# The list of autocast that the device follows. With "CPU" bf16 runs can be compared bit by bit with those on the CPU;
# with "CUDA" types meet as they would on a GPU, for instance a float32 norm beside bf16 projections.
autocast_lists = "CPU"


# ------------------------------------------------------------------------------------------------------------- counting
events: Counter = Counter()  # (place, kind, operator) -> how often, since `counted` last cleared it

# Kinds. The first three make the CPU wait until the device has done all that was asked of it before: torch waits for
# the end of a copy in either direction, and a `read` copies one number, or the size that a result will have. A copy to
# the device with non_blocking=True is queued, and the CPU goes on; one to the host waits, as its memory is not pinned.
TO_DEVICE, TO_HOST, READ, QUEUED = "host to device", "device to host", "read", "host to device, queued"

# Operators whose result has a value, or a shape, that the CPU must know before it can go on.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}
WAITS |= {"bincount", "repeat_interleave"}


def note(kind: str, operator: str) -> None:
    """Count one event at the innermost line of the project's own code that led to it."""
    # Backward passes run in a thread of the device, as on CUDA, where no frame is ours.
    frame = sys._getframe(1)
    while frame is not None:
        folder, _, file = frame.f_code.co_filename.rpartition("/")
        if folder == str(project) and file != Path(__file__).name:
            break
        frame = frame.f_back
    place = "autograd or library" if frame is None else f"{file}:{frame.f_lineno}"
    events[place, kind, operator] += 1


@contextmanager
def counted():
    """Clear the counts, and give the counter of what the block does: (place, kind, operator) -> times."""
    events.clear()
    yield events


# ----------------------------------------------------------------------------------------------------------- the tensor
class FakeGpuTensor(torch.Tensor):
    """A tensor on the emulated device: shape, type and autograd are its own, the values are those of `host`."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # operators are met below autograd only

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        shell = torch.Tensor._make_wrapper_subclass(cls, host.size(), **layout, device=DEVICE)
        shell.host = host
        return shell

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return execute(operator, args, kwargs or {})

    # `weight.data = other` moves C++ fields from one shell to the other; the values must go along.
    def _set_data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.host = value.host

    data = property(lambda self: torch.Tensor.data.__get__(self), _set_data)

    # These reach for memory, of which a shell has none. CUDA refuses the first two; an address only tells tensors that
    # share memory from those that do not.
    def numpy(self, *args, **kwargs):
        advice = "Use Tensor.cpu() to copy the tensor to host memory first."
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. {advice}")

    def __array__(self, *args, **kwargs):
        return self.numpy()

    def untyped_storage(self):
        return self.host.untyped_storage()

    def data_ptr(self):
        return self.host.data_ptr()

    def tolist(self):
        note(READ, "tolist")
        return self.host.tolist()

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __repr__(self, **kwargs):
        return f"{self.cpu()!r} on {NAME}"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = self.detach().clone().requires_grad_(self.requires_grad)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if hasattr(self, "_is_param") else copy
        return memo[id(self)]


def on_device(x) -> bool:
    """Whether a value is a tensor of the emulated device."""
    return isinstance(x, FakeGpuTensor)


def host_of(x: torch.Tensor) -> torch.Tensor:
    """The CPU tensor that holds a tensor's values."""
    return x.host if isinstance(x, FakeGpuTensor) else x


# -------------------------------------------------------------------------------------------------------- one operator
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
EAGER = {aten._conj.default: aten.conj_physical.default, aten._neg_view.default: aten.neg.default}
SCALARS = {aten.where.self, aten.clamp.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}  # beside arithmetic


def tensors_of(args, kwargs) -> list[torch.Tensor]:
    """The tensors among an operator's arguments, which may hold them in lists."""
    tensors = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            tensors += [x for x in value if isinstance(x, torch.Tensor)]
    return tensors


def exchanged(value, change):
    """An argument or a result with `change` applied to each of its tensors."""
    if isinstance(value, torch.Tensor):
        return change(value)
    return type(value)([exchanged(x, change) for x in value]) if isinstance(value, list | tuple) else value


@cache
def draws(operator) -> bool:
    """Whether an operator draws random numbers. (To ask torch takes longer than to add two tensors.)"""
    return torch.Tag.nondeterministic_seeded in operator.tags


def check_devices(operator, args, tensors: list[torch.Tensor]) -> None:
    """Refuse what CUDA refuses.

    Args:
        tensors: all tensors among the arguments.

    Raises:
        RuntimeError: if tensors of both devices meet where they may not.
    """
    strangers = [x for x in tensors if not on_device(x)]
    if not strangers or len(strangers) == len(tensors):
        return

    # Arithmetic takes a CPU tensor without dimensions for a number: operators of one or two tensors, and some more.
    # But what is written to is never taken for one.
    arithmetic = operator in SCALARS or (torch.Tag.pointwise in operator.tags and len(tensors) <= 2)
    written = [x for x, a in zip(args, operator._schema.arguments) if a.alias_info and a.alias_info.is_write]
    numbers = [x for x in strangers if arithmetic and x.dim() == 0 and all(x is not y for y in written)]

    # Indices may lie on the CPU: they are copied, which counts. One value may too, to be put at the indices.
    if operator in INDEXING and on_device(args[0]):
        numbers += [x for x in args[1] if x is not None and not on_device(x)]
        for _ in numbers:
            note(TO_DEVICE, "index")
        numbers += [x for x in args[2:3] if x.numel() == 1]

    refused = [x for x in strangers if all(x is not y for y in numbers)]
    if refused:
        both = f"found at least two devices, {NAME}:0 and {refused[0].device}"
        raise RuntimeError(f"Expected all tensors to be on the same device, but {both}! (when checking {operator})")


def note_wait(operator, args, kwargs) -> None:
    """Count an operator that makes the CPU wait for a number."""
    name = operator.overloadpacket.__name__
    if name in WAITS and kwargs.get("output_size") is None:
        note(READ, name)

    # How many rows does a mask pick? CUDA looks, except where one number is put in the places of a mask.
    masked = operator in INDEXING and any(on_device(x) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if masked and (len(args) < 3 or args[2].numel() != 1):
        note(READ, f"{name} by a mask")


def execute(operator, args, kwargs):
    """Run one operator on the hosts.

    Tensors of the device go in as their hosts, and what comes out is wrapped. A result that is one of the arguments,
    as in-place operators return it, is that very tensor again. A view of a host shares the host's memory, so views and
    in-place changes need nothing more.

    Raises:
        RuntimeError: as CUDA, where tensors of both devices meet, or a draw gets a generator of the CPU.
        NotImplementedError: if the shape of a tensor would change in place.
    """
    # 1. Who may meet whom, and what has to be counted. Every copy from the CPU ends in `copy_`.
    tensors, device = tensors_of(args, kwargs), kwargs.get("device")
    leaves_device = device is not None and torch.device(device).type != NAME
    if operator is aten.copy_.default:
        if on_device(args[0]) != on_device(args[1]):
            queued = len(args) > 2 and args[2]
            note((QUEUED if queued else TO_DEVICE) if on_device(args[0]) else TO_HOST, "copy_")
    else:
        check_devices(operator, args, tensors)
        note_wait(operator, args, kwargs)
        if leaves_device and operator is aten._to_copy.default and torch.device(device) == CPU:
            note(TO_HOST, "to")
    if (generator := kwargs.get("generator")) is not None:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device}'")

    # 2. Run it. What draws random numbers takes the device's, which are not the CPU's. A conjugate is computed at once:
    # torch would only mark the host, and below autograd such marks are not read any more.
    operator = EAGER.get(operator, operator)
    if device is not None and not leaves_device:
        kwargs = kwargs | {"device": CPU}
    host_args = exchanged(args, host_of)
    host_kwargs = {name: exchanged(value, host_of) for name, value in kwargs.items()}
    if draws(operator):
        with Random.swapped():
            result = operator(*host_args, **host_kwargs)
    else:
        result = operator(*host_args, **host_kwargs)

    # 3. Wrap the results, arguments that are returned excepted.
    if leaves_device:
        return result
    arguments = {id(host_of(x)): x for x in tensors}

    def wrapped(x: torch.Tensor) -> torch.Tensor:
        argument = arguments.get(id(x))
        if argument is not None and argument.shape != x.shape:
            raise NotImplementedError(f"{operator} changes the shape of a tensor in place, which {NAME} cannot")
        return FakeGpuTensor(x) if argument is None else argument

    return exchanged(result, wrapped)


# ----------------------------------------------------------------------------------------------------------- the device
class Random:
    """The device's random numbers: others than the CPU's, so that a draw on the wrong device shows."""

    generator = torch.Generator().manual_seed(2**31 - 1)

    @classmethod
    @contextmanager
    def swapped(cls):
        """While it is open, torch's default generator is the device's."""
        before = torch.get_rng_state()
        torch.set_rng_state(cls.generator.get_state())
        try:
            yield
        finally:
            cls.generator.set_state(torch.get_rng_state())
            torch.set_rng_state(before)


class Backend(_DummyBackendModule):
    """What torch asks of a device's module, which is reached as torch.fakegpu."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device=None):
        return Random.generator.get_state()

    def set_rng_state(self, state, device=None):
        Random.generator.set_state(state)

    def manual_seed_all(self, seed):
        Random.generator.manual_seed(seed + 2**31)  # CUDA's numbers of a seed are not the CPU's

    manual_seed = manual_seed_all

    def synchronize(self, device=None):
        note(READ, "synchronize")

    def current_stream(self, device=None):
        return self  # one queue of work, whose `synchronize` is the device's

    @contextmanager
    def device(self, index):
        yield

    stream = device


# What autocast does to an operator. Lower precision: these, on both kinds of device. Widest type of all arguments:
# PROMOTED. Anything else that torch's list of the device names is computed in float32.
LOWER = {"_convolution", "convolution", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv", "addr"}
LOWER |= {f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)} | {"conv_tbc", "mv", "chain_matmul", "prelu"}
LOWER |= {"linalg_vecdot", "linalg_multi_dot", "einsum", "scaled_dot_product_attention"}
PROMOTED = {"CPU": {"stack", "cat", "index_copy"}}
PROMOTED["CUDA"] = {"addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put"}
PROMOTED["CUDA"] |= {"tensordot", "scatter_add"}


def autocast_kernel(operator, name: str, devices: list[str]):
    """An operator under torch.autocast(NAME); `devices` are those whose list names it. (Casts are not cached here.)"""
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def eligible(x) -> bool:
        return on_device(x) and x.is_floating_point() and x.dtype != torch.float64

    def kernel(*args, **kwargs):
        # What is called here goes straight on to autograd.
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            if autocast_lists not in devices:
                return operator(*args, **kwargs)

            # The type in which the operator computes, by its list.
            low = torch.get_autocast_dtype(NAME)
            dtype = low if name in LOWER else torch.float32
            if name in PROMOTED[autocast_lists]:
                types = {x.dtype for x in tensors_of(args, kwargs) if eligible(x)}
                dtype = torch.float32 if torch.float32 in types else low

            # Tensors of the CPU and float64 are left as they are.
            def cast(x):
                return x.to(dtype) if eligible(x) else x

            kwargs = {keyword: exchanged(value, cast) for keyword, value in kwargs.items()}
            return operator(*exchanged(args, cast), **kwargs)

    return kernel


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """scaled_dot_product_attention as the CPU computes it: torch chooses its algorithm by the device."""
    if not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("Expected query, key, and value to have the same dtype")
    hosts = [x if x is None else host_of(x) for x in (q, k, v, attn_mask)]
    options, more = (dropout_p, is_causal), {"scale": scale}

    # 1 is the CPU's flash attention, which adds its mask to the scores: False becomes minus infinity.
    if torch._fused_sdp_choice(*hosts, *options, **more, enable_gqa=enable_gqa) == 1:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            zeros = torch.zeros_like(attn_mask, dtype=q.dtype)
            attn_mask = zeros.masked_fill_(~attn_mask, float("-inf"))
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, *options, attn_mask=attn_mask, **more)[0]
    return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, *options, **more, enable_gqa=enable_gqa)[0]


libraries = []  # torch forgets the registrations of a library that is freed


def install() -> None:
    """Register the device with torch, in this process and for good."""
    _setup_privateuseone_for_python_backend(NAME, Backend())
    library, rest = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    libraries.extend((library, rest))

    def kernel(operator):
        return lambda *args, **kwargs: execute(operator, args, kwargs)

    def registered(name: str, key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)

    for schema in torch._C._jit_get_all_schemas():
        namespace, _, base = schema.name.partition("::")
        name = f"{base}.{schema.overload_name}" if schema.overload_name else base
        if namespace != "aten" or not torch._C._dispatch_has_kernel(f"aten::{name}"):
            continue
        operator = getattr(getattr(aten, base), schema.overload_name or "default")

        # Factories; and what has a kernel for the CPU beside one made of other operators, which the device would get.
        arguments = {argument.name: str(argument.type) for argument in schema.arguments}
        factory = "device" in arguments and not any("Tensor" in kind for kind in arguments.values())
        if factory or (registered(name, "CPU") and registered(name, "CompositeImplicitAutograd")):
            library.impl(name, kernel(operator), "PrivateUse1")

        devices = [device for device in PROMOTED if registered(name, f"Autocast{device}")]
        if devices:
            library.impl(name, autocast_kernel(operator, base, devices), "AutocastPrivateUse1")
    library.impl("scaled_dot_product_attention", attention, "AutogradPrivateUse1")

    # Where torch passes over __torch_dispatch__, as within torch.tensor(device=...), operators arrive here.
    copy = aten.copy_.default
    library.impl("_copy_from", lambda x, to, queued=False: execute(copy, (to, x, queued), {}), "PrivateUse1")
    rest.fallback(lambda operator, *args, **kwargs: execute(operator, args, kwargs), "PrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
