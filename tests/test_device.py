"""Device placement, proven without a GPU: whole iterations on the emulated accelerator of fakegpu.py.

    python tests/test_device.py            # names of all cases
    python tests/test_device.py waits      # one case, or several; here: where an iteration waits for the device

1. rules     the emulator itself: what CUDA refuses is refused, what it allows gives the CPU's values
2. runs      training with all kinds of flags on the device: the same metrics as on the CPU
3. faults    device faults planted in a copy of the code: none is seen on the CPU, each is on the device
4. waits     how often, and where, one iteration makes the CPU wait for the device

The emulator changes torch for good, so all cases run in one process of their own, which is this file as a script. It
prints one JSON document per case. The suite has some cases of each kind; with -m slow all others run.
"""

import contextlib
import copy
import inspect
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
GPU = "fakegpu:0"


# ------------------------------------------------------------------------------------------------------------- 1. rules
# Each is a function `rule_NAME(torch, fakegpu)`: hand-made examples that fail with an AssertionError.
@contextlib.contextmanager
def refused(kind: type[Exception], text: str):
    """The block must raise this, with this text in its message."""
    try:
        yield
    except kind as error:
        assert text in str(error), f"{text!r} is not in {error!r}"
    else:
        raise AssertionError(f"nothing was raised, but {kind.__name__} with {text!r} must be")


MIXED = "Expected all tensors to be on the same device"


def rule_devices_do_not_mix(torch, fakegpu):
    a, b = torch.ones(2, 2, device="fakegpu"), torch.ones(2, 2)
    for mix in (
        lambda: a + b,
        lambda: b + a,
        lambda: a @ b,
        lambda: torch.cat([a, b]),
        lambda: torch.stack([a, b]),
        lambda: torch.nn.functional.linear(a, b),
        lambda: a.mul_(b),
        lambda: b.mul_(a),
        lambda: torch.where(a > 0, a, b),
        lambda: a.masked_fill(b > 0, 1.0),
        lambda: torch.searchsorted(a[0], b[0]),
        lambda: a.gather(0, b.long()),
        lambda: torch.nn.functional.embedding(b.long()[0], a),
        lambda: torch.einsum("ij,jk->ik", a, b),
        lambda: torch.maximum(a, b),
        lambda: torch.equal(a, b),
        lambda: a + torch.ones(1),  # one element, but not a number: it has a dimension
    ):
        with refused(RuntimeError, MIXED):
            mix()


def rule_numbers_of_the_cpu_are_allowed_in_arithmetic(torch, fakegpu):
    a, two = torch.arange(3.0, device="fakegpu"), torch.tensor(2.0)
    assert (a * two).tolist() == (two * a).tolist() == [0, 2, 4]
    assert a.clone().add_(two).tolist() == [2, 3, 4]
    assert torch.where(a > 0, two, a).tolist() == [0, 2, 2] and torch.where(a > 0, 0.0, a).tolist() == [0, 0, 0]
    assert (a * two).dtype == (a.to(torch.bfloat16) * torch.tensor(2)).float().dtype == torch.float32

    # Not where it is written to, and not where no arithmetic is done.
    for mix in (lambda: two.add_(a.sum()), lambda: torch.stack([a.sum(), two]), lambda: torch.cat([a, two.view(1)])):
        with refused(RuntimeError, MIXED):
            mix()


def rule_indices_of_the_cpu_are_allowed(torch, fakegpu):
    a = torch.arange(6.0, device="fakegpu").view(3, 2)
    rows, mask = torch.tensor([2, 0]), torch.tensor([True, False, True])
    assert a[rows].tolist() == [[4, 5], [0, 1]] and a[mask].tolist() == [[0, 1], [4, 5]]
    assert a[rows.to("fakegpu")].tolist() == a[rows].tolist() and a[mask.to("fakegpu")].tolist() == a[mask].tolist()
    assert a[torch.tensor(1)].tolist() == [2, 3] and a[:, 1].tolist() == [1, 3, 5]
    a[rows] = 7.0
    a[torch.tensor([1])] = torch.tensor(8.0)  # one value of the CPU may be put at the indices
    assert a.tolist() == [[7, 7], [8, 8], [7, 7]]

    with refused(RuntimeError, MIXED):
        torch.arange(3)[rows.to("fakegpu")]
    with refused(RuntimeError, MIXED):
        a[rows] = torch.ones(2, 2)
    with refused(RuntimeError, MIXED):
        a.index_select(0, rows)


def rule_generators_of_the_cpu_do_not_draw_on_the_device(torch, fakegpu):
    generator = torch.Generator().manual_seed(0)
    for draw in (
        lambda: torch.randn(3, device="fakegpu", generator=generator),
        lambda: torch.randperm(3, device="fakegpu", generator=generator),
        lambda: torch.zeros(3, device="fakegpu").normal_(generator=generator),
        lambda: torch.bernoulli(torch.full((3,), 0.5, device="fakegpu"), generator=generator),
    ):
        with refused(RuntimeError, "Expected a 'fakegpu' device type for generator but found 'cpu'"):
            draw()

    # Without a generator the device draws from a stream of its own and leaves the CPU's alone.
    torch.manual_seed(0)
    on_cpu = torch.randn(4)
    torch.manual_seed(0)
    on_device = torch.randn(4, device="fakegpu")
    assert on_device.tolist() != on_cpu.tolist() and torch.equal(torch.randn(4), on_cpu)
    torch.manual_seed(0)  # seeds both
    assert torch.randn(4, device="fakegpu").tolist() == on_device.tolist()
    assert torch.rand_like(on_device).tolist() != torch.nn.functional.dropout(on_device).tolist()


def rule_numpy_does_not_read_the_device(torch, fakegpu):
    import numpy as np

    a = torch.arange(3.0, device="fakegpu")
    for read in (a.numpy, lambda: np.asarray(a), lambda: np.mean([a.sum(), a.sum()]), lambda: torch.from_numpy(a)):
        with refused(TypeError, ""):
            read()
    assert a.cpu().numpy().tolist() == [0, 1, 2] and np.mean([float(a.sum())]) == 3
    assert f"{a.sum():.2f}" == "3.00" and "fakegpu" in repr(a)


def rule_views_share_memory(torch, fakegpu):
    a = torch.zeros(2, 6, device="fakegpu")
    a[0, 2:4] = 1.0
    a.view(3, 4)[2].add_(2)
    a.unflatten(1, (2, 3))[:, 1, 0].mul_(10)
    a.t()[5].sub_(1)
    a.transpose(0, 1).flatten(0).fill_(9)  # not contiguous: a copy
    first, second = a.chunk(2)
    second.copy_(first * 100)
    b = torch.zeros(2, 6)
    b[0, 2:4] = 1.0
    b.view(3, 4)[2].add_(2)
    b.unflatten(1, (2, 3))[:, 1, 0].mul_(10)
    b.t()[5].sub_(1)
    b.chunk(2)[1].copy_(b.chunk(2)[0] * 100)
    assert a.tolist() == b.tolist() and a.is_contiguous() and not a.t().is_contiguous()

    # In-place operators return the very tensor; `out=` writes into it; copies do not share.
    assert a.add_(1) is a and torch.add(a, 1, out=a) is a and a.tolist() == (b + 2).tolist()
    clone, on_cpu = a.clone(), a.cpu()
    a.zero_()
    assert clone.tolist() == on_cpu.tolist() == (b + 2).tolist() and a.detach().fill_(3) is not a
    assert a.tolist() == [[3] * 6] * 2 and a._version > 0 and a.view(-1)._base is a


def rule_factories(torch, fakegpu):
    d, made = "fakegpu", []
    for make in (
        lambda **where: torch.zeros(2, 3, **where),
        lambda **where: torch.ones((2,), dtype=torch.long, **where),
        lambda **where: torch.full((2,), 7, **where),
        lambda **where: torch.arange(1, 9, 2, **where),
        lambda **where: torch.linspace(0, 1, 5, **where),
        lambda **where: torch.eye(2, **where),
        lambda **where: torch.tensor([[1.5, 2]], **where),
        lambda **where: torch.as_tensor([True], **where),
        lambda **where: torch.scalar_tensor(3.0, **where),
        lambda **where: torch.tril_indices(3, 3, **where),
    ):
        on_device, on_cpu = make(device=d), make()
        assert on_device.device == torch.device("fakegpu", 0) and on_device.dtype == on_cpu.dtype
        assert on_device.tolist() == on_cpu.tolist()
        made.append(on_device)
    x = made[0]
    for like in (torch.zeros_like(x), torch.full_like(x, 0.0), x.new_zeros(2, 3), torch.empty_like(x).zero_()):
        assert like.tolist() == x.tolist() and like.device == x.device
    assert torch.empty(2, 3, device=d).shape == (2, 3) and torch.zeros_like(x, device="cpu").device.type == "cpu"
    assert torch.zeros_like(torch.zeros(2), device=d).device == x.device and x.new_tensor([1]).device == x.device
    assert torch.randn(1000, device=d).std().item() == pytest.approx(1, abs=0.1)
    with torch.device("fakegpu"):
        assert torch.zeros(2).device == x.device


def rule_moving(torch, fakegpu):
    a = torch.arange(4.0).view(2, 2).t()
    b = a.to("fakegpu")
    assert b.device == torch.device("fakegpu", 0) and b.stride() == a.stride() and torch.equal(b.cpu(), a)
    assert b.to("fakegpu") is b and b.to(torch.float32) is b and b.to("fakegpu", torch.float64).dtype == torch.float64
    assert torch.equal(b.to("cpu", torch.bfloat16), a.bfloat16()) and torch.equal(b.to("cpu", non_blocking=True), a)
    assert torch.equal(torch.zeros(2, 2).copy_(b), a) and torch.equal(torch.zeros_like(b).copy_(a, True).cpu(), a)
    a.zero_()
    assert b.tolist() == [[0, 2], [1, 3]] and b.to(torch.zeros(1)).device.type == "cpu"
    assert b.to("meta").device.type == "meta" and b.type_as(torch.zeros(1)).device.type == "cpu"
    assert b.cpu().is_cpu and not b.is_cpu and not b.is_cuda and b.device != a.device


def rule_autograd(torch, fakegpu):
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint

    def loss(w, x, index):
        h = F.layer_norm(x @ w, (4,))
        h = F.scaled_dot_product_attention(h[None, None], h[None, None], h[None, None])[0, 0]
        y = h.clone()
        y[:, 1:3].mul_(2)  # in place, on a view of what gradients flow through
        y = torch.cat([y[index], F.silu(y)]) + F.conv1d(h[None], w.new_ones(1, 5, 3), padding=1).mean()
        return (y.softmax(-1) * y).sum()

    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(3, 4, generator=generator), torch.randn(5, 3, generator=generator)
    gradients = []
    for device in ("cpu", "fakegpu"):
        for call in (loss, lambda *args: checkpoint(loss, *args, use_reentrant=False)):
            leaf = w.to(device, copy=True).requires_grad_()
            value = call(leaf, x.to(device), torch.tensor([2, 0]))
            value.backward()
            assert leaf.grad.device == leaf.device == value.device
            gradients.append(leaf.grad.cpu())
    assert all(torch.equal(g, gradients[0]) for g in gradients)

    # Across the devices, and without gradients.
    leaf = w.clone().requires_grad_()
    (leaf.to("fakegpu") * 2).cpu().sum().backward()
    assert leaf.grad.tolist() == [[2] * 4] * 3
    with torch.no_grad():
        assert not (leaf.to("fakegpu") * 2).requires_grad
    assert torch.autograd.grad(leaf.to("fakegpu").square().sum(), leaf)[0].equal(2 * w)


def rule_autocast(torch, fakegpu):
    import torch.nn.functional as F

    w, x, norm = torch.randn(4, 4), torch.randn(2, 4), torch.ones(4)

    def results(device, lists="CPU"):
        fakegpu.autocast_lists = lists
        leaf = w.to(device, copy=True).requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            y = F.linear(x.to(device), leaf)
            z = F.layer_norm(y, (4,), norm.to(device, y.dtype))
            both = torch.cat([y, x.to(device)])
            assert F.linear(x.double().to(device), w.double().to(device)).dtype == torch.float64  # never cast
            assert F.linear(x, w).dtype == (torch.bfloat16 if device == "cpu" else torch.float32)  # another device
        z.float().square().sum().backward()
        assert leaf.grad.dtype == torch.float32
        fakegpu.autocast_lists = "CPU"
        return (y.dtype, z.dtype, both.dtype), [t.detach().cpu() for t in (y, z, both, leaf.grad)]

    types, values = results("fakegpu")
    assert types == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(values, results("cpu")[1]))
    assert results("fakegpu", "CUDA")[0] == (torch.bfloat16, torch.float32, torch.float32)  # CUDA's norms are float32


def rule_modules(torch, fakegpu):
    def trained(device):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.GELU(), torch.nn.GroupNorm(2, 8)).to(device)
        assert all(isinstance(p, torch.nn.Parameter) and p.device.type == device for p in model.parameters())
        twin = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 3, device=device)).square().sum().backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        weights = [p.detach().cpu() for p in model.parameters()]
        assert all(isinstance(p, torch.nn.Parameter) for p in twin.parameters())
        assert not torch.equal(weights[0], next(twin.parameters()).detach().cpu())  # a deep copy does not train along
        twin.load_state_dict(model.state_dict())
        assert torch.equal(next(twin.parameters()).detach().cpu(), weights[0])
        twin[0].weight.data = twin[0].weight.data.double()
        assert twin[0].weight.dtype == torch.float64 and twin[0].weight.sum().item() != 0
        return [*weights, norm.cpu()]

    assert all(torch.equal(a, b) for a, b in zip(trained("cpu"), trained("fakegpu")))


def rule_files(torch, fakegpu):
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        a = torch.arange(3.0, device="fakegpu")
        save_file({"a": a}, f"{folder}/a.safetensors")
        assert load_file(f"{folder}/a.safetensors")["a"].tolist() == [0, 1, 2]


def rule_everything_that_waits_is_counted(torch, fakegpu):
    a, mask = torch.arange(3.0, device="fakegpu"), torch.tensor([True, False, True], device="fakegpu")
    rows, here = torch.tensor([1]), Path(__file__).name
    fakegpu.project = HERE
    expected = [
        (lambda: a.sum().item(), "read"),
        (lambda: float(a.sum()), "read"),
        (lambda: int(a.sum()), "read"),
        (lambda: bool(a.sum()), "read"),
        (lambda: a.tolist(), "read"),
        (lambda: 1 if a.any() else 0, "read"),
        (lambda: mask.nonzero(), "read"),
        (lambda: a[mask], "read"),
        (lambda: a.masked_select(mask), "read"),
        (lambda: a.repeat_interleave(mask.long()), "read"),
        (lambda: torch.equal(a, a), "read"),
        (lambda: a.unique(), "read"),
        (lambda: a.cpu(), "device to host"),
        (lambda: a.to("cpu", torch.float64), "device to host"),
        (lambda: torch.zeros(3).copy_(a), "device to host"),
        (lambda: torch.zeros(3).to("fakegpu"), "host to device"),
        (lambda: torch.tensor([1.0], device="fakegpu"), "host to device"),
        (lambda: a.copy_(torch.zeros(3)), "host to device"),
        (lambda: a.copy_(torch.zeros(3), non_blocking=True), "host to device, queued"),
        (lambda: torch.zeros(3).to("fakegpu", non_blocking=True), "host to device, queued"),
        (lambda: a.to("cpu", non_blocking=True), "device to host"),
        (lambda: a[rows], "host to device"),
    ]
    for call, kind in expected:
        with fakegpu.counted() as events:
            call()
        ((place, counted_kind, operator), times), *others = events.items()
        line = inspect.getsourcelines(call)[1]
        assert (place, counted_kind, times, others) == (f"{here}:{line}", kind, 1, []), (events, line)

    # What does not wait.
    with fakegpu.counted() as events:
        b = torch.full((3,), 2, device="fakegpu").to("fakegpu") * a + torch.tensor(1.0)
        b[mask] = 0.0
        b[0], b[1:] = 1.0, a[:2]
        torch.where(mask, a, b).sum().sqrt().detach().view(1).expand(3).repeat_interleave(2)
        torch.zeros(2) + 1
    assert not events, events
    fakegpu.project = ROOT


def rule_complex_numbers_have_gradients(torch, fakegpu):
    turn = torch.polar(torch.ones(3), torch.arange(3.0))

    def gradient(device):
        x = torch.ones(3, 2, device=device, requires_grad=True)
        turned = torch.view_as_real(torch.view_as_complex(x) * turn.to(device))
        (turned * torch.arange(6.0, device=device).view(3, 2)).sum().backward()
        return x.grad.cpu()

    assert torch.equal(gradient("fakegpu"), gradient("cpu"))
    assert torch.equal(turn.to("fakegpu").conj().imag.cpu(), turn.conj().imag)


def rule_what_it_cannot_do_is_said(torch, fakegpu):
    a = torch.zeros(2, 3, device="fakegpu")
    for change in (lambda: a.resize_(7), lambda: a.unsqueeze_(0), lambda: torch.arange(9.0, out=a)):
        with refused(NotImplementedError, "changes the shape of a tensor in place"):
            change()


RULES = [name for name in dict(globals()) if name.startswith("rule_")]


# -------------------------------------------------------------------------------------------------------------- 2. runs
SMALL = "--steps 5 --leaves 4 --prompts-per-iteration 2 --eval-size 4 --iterations 2 --device cpu"
SCORERS = "--reward hpsv2,pickscore,clip:0.1,aesthetic,imagereward --reward-mix advantage --reward-weights WEIGHTS"
OTHER = "--prompts tiny/prompts_train.txt --reward jpeg --height 32 --width 64 --method branchgrpo --dtype fp32"
RUNS = {  # name -> flags beside SMALL; WEIGHTS, CACHE, FAMILY-... are folders; --video takes train_video.py
    "branchgrpo": "--method branchgrpo",
    "branchgrpo-mix": "--method branchgrpo-mix --mix 1",
    "dancegrpo": "--method dancegrpo",
    "flowgrpo": "--method flowgrpo",
    "mixgrpo": "--method mixgrpo --mix 2",
    "flowgrpo-fast": "--method flowgrpo-fast",
    "tempflow": "--method tempflow",
    "ode": "--method ode --objective nft",
    "width": "--method branchgrpo --width-prune",
    "width, extreme": "--method branchgrpo --width-prune extreme-1",
    "depth": "--method branchgrpo --depth-prune 1",
    "size": "--method branchgrpo --size-prune 0.5",
    "width and depth": "--method branchgrpo --width-prune extreme-1 --depth-prune 1 --iterations 1",
    "dance": "--method branchgrpo --sde dance",
    "flow": "--method branchgrpo --sde flow",
    "cps": "--method branchgrpo --sde cps --cps-density upstream",
    "flash": "--steps 6 --flash 3",
    "endpoint": "--objective endpoint --updates 2 --updates-by parents --kl 0.1 --iterations 1",
    "elbo": "--objective elbo --updates 2 --kl 0.1",
    "nft": "--objective nft --updates 2 --updates-by parents --micro-batch 3",
    "micro-batch": "--method branchgrpo --micro-batch 3",
    "checkpointing": "--gradient-checkpointing",
    "tree-offload": "--method branchgrpo --tree-offload --micro-batch 4",
    "tree-offload, elbo": "--objective elbo --tree-offload --updates 2 --micro-batch 4 --iterations 1",
    "tree-offload, endpoint": "--objective endpoint --tree-offload --micro-batch 4",
    "text-offload": "--text-offload --text-cache CACHE",
    "vae-tiling": "--vae-tiling",
    "LoRA, KL": "--method branchgrpo --lora 4 --kl 0.1",
    "KL": "--kl 0.1",
    "updates": "--method branchgrpo --updates 2 --clip 1e-4",
    "updates by parents": "--method branchgrpo --updates 2 --updates-by parents --loss-weight path",
    "advantages": "--method branchgrpo --advantage sibling --roots 2 --reward-mix advantage --fusion-beta 0",
    "group": "--method branchgrpo --advantage group --splits 0,2 --branch-noise inf --silent-prompts 0.5",
    "bf16": "--dtype bf16",
    "bf16, short": "--dtype bf16 --steps 4 --lora 4 --updates 2 --micro-batch 3 --tree-offload --eval-size 1"
    " --iterations 1",
    "bf16, much": "--dtype bf16 --method branchgrpo --lora 4 --kl 0.1 --updates 2 --gradient-checkpointing"
    " --tree-offload --micro-batch 3",
    "bf16, KL": "--dtype bf16 --kl 0.1",
    "bf16, elbo": "--dtype bf16 --objective elbo --updates 2",
    "video": "--video",
    "video, guided": "--video --guidance 2 --method branchgrpo --kl 0.1 --frames 5 --iterations 1",
    "video, objective": "--video --objective nft --updates 2 --vae-tiling --text-offload",
    "video, bf16": "--video --dtype bf16 --lora 4 --gradient-checkpointing --guidance 2",
    "scorers": f"{SCORERS} --iterations 1",
    "scorers, offload": f"{SCORERS} --reward-offload --reward-dtype bf16 --reward-batch 3",
    "videoalign": "--video --reward videoalign --reward-weights WEIGHTS --reward-offload --frames 9",
    "SD3": f"--model FAMILY-sd3 {OTHER} --guidance 2 --kl 0.1",
    "FLUX.2": f"--model FAMILY-flux2 {OTHER} --guidance 2 --lora 4 --gradient-checkpointing",
    "Z-Image": f"--model FAMILY-z_image {OTHER} --guidance 2 --micro-batch 3 --text-offload --text-cache CACHE",
}
BUG: dict[str, str] = {}  # case -> why it fails: a fault of the project that is not mended yet
WHOLE = "--ema 0.9 --lora 4 --kl 0.1 --save-every 1 --eval-every 1 --method branchgrpo"  # flags of whole runs


def accelerator(device: str):
    """accelerate's Accelerator, in a state of its own, that says it has this device."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    made = Accelerator(cpu=True, mixed_precision="no")
    for state in (PartialState, AcceleratorState):
        state._shared_state["device"] = torch.device(device)
    assert made.device == torch.device(device)
    return made


def module(name: str):
    """A module of the project, as it stands in sys.modules now: faults replace them."""
    return __import__(name)


def prepared(flags: str, device: str, folder: str):
    """A Run at iteration 0 on a device."""
    script = module("train_video" if "--video" in flags else "train_image")
    flags = f"{SMALL} {flags}".replace("--video", "").replace("CACHE", folder)
    words = flags.replace("WEIGHTS", str(weights()) if "WEIGHTS" in flags else "").split()
    words = [family(word) if word.startswith("FAMILY-") else word for word in words]
    args, *rest = script.job([*words, "--out", f"{folder}/run"])
    return module("launch").prepare(args, accelerator(device), *rest)


def weights() -> Path:
    """Seeded random weights of all preference models at reduced size, written once; preference.py is told of them."""
    folder = Path(os.environ["DEVICE_TEST_FOLDER"]) / "weights"
    import compare
    import weights as writer

    if not folder.exists():
        folder.mkdir()
        writer.write(folder)
    compare.P = module("preference")
    if compare.P.VIT_H.vision_config.num_hidden_layers == 32:  # the official architecture: it was not reduced yet
        compare.reduce_architectures(folder)
    module("pretrained").try_to_load_from_cache = lambda *_: None  # whatever this machine's cache holds
    return folder


def family(word: str) -> str:
    """The folder of a family's small random checkpoint, FAMILY-sd3 for example, written once."""
    folder = Path(os.environ["DEVICE_TEST_FOLDER"]) / word
    if not folder.exists():
        import families

        families.saved(word.removeprefix("FAMILY-"), folder)
    return str(folder)


def steady(row: dict) -> dict:
    """A row of metrics without what a clock or the system measured."""
    return {name: value for name, value in row.items() if not name.startswith(("seconds_", "peak_"))}


def iterations(flags: str, device: str) -> list[dict]:
    """Rows of metrics of the iterations, and those of an evaluation after them; last the sums of all weights."""
    loop = module("loop")
    with tempfile.TemporaryDirectory() as folder:
        run = prepared(flags, device, folder)
        rows = [steady(loop.iterate(run, i)[0]) for i in range(run.args.iterations)]
        rows.append(loop.evaluate(run)[0])
        trained = run.policy.trainable()
        assert {p.device.type for p in trained} == {device.partition(":")[0]}
        return [*rows, {f"weight_{i}": p.double().sum().item() for i, p in enumerate(trained)}]


def largest_difference(rows: list[dict], others: list[dict]) -> float:
    """Between two lists of rows with the same names, in units of max(1, the value)."""
    assert [list(row) for row in rows] == [list(row) for row in others]
    pairs = [(row[name], other[name]) for row, other in zip(rows, others) for name in row]
    return max(abs(a - b) / max(1, abs(b)) for a, b in pairs)


def run_case(name: str) -> dict:
    """Iterations and an evaluation, on the CPU and on the device."""
    return {"difference": largest_difference(*(iterations(RUNS[name], d) for d in (GPU, "cpu")))}


def whole_runs(video: bool, plans: list[tuple[str, str]]) -> dict:
    """`main` from start to end: evaluation, checkpoints, EMA, pictures and model, in runs that were stopped halfway.

    A run that is begun on one device and ended on the same or the other has the rows, the first pictures and the
    weights of one that never left the CPU.

    Args:
        plans: devices of the first and of the second iteration of each run.
    """
    from safetensors.torch import load_file

    launch, loop, report = module("launch"), module("loop"), module("report")
    script = module("train_video" if video else "train_image")
    untouched = launch.make_accelerator, loop.iterate, report.write

    def main(device: str, out: str, *flags: str, stop_at: int | None = None, pictures: bool = True) -> None:
        def stopping(run, iteration):
            if iteration == stop_at:
                raise KeyboardInterrupt
            return untouched[1](run, iteration)

        launch.make_accelerator, loop.iterate = lambda args: accelerator(device), stopping
        report.write = untouched[2] if pictures else lambda run: None
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
                script.main([*SMALL.split(), *WHOLE.split(), "--out", out, *flags])
        except SystemExit as stop:
            assert stop.code == 130 and stop_at is not None, said.getvalue()
        finally:
            launch.make_accelerator, loop.iterate, report.write = untouched
        assert "warning:" not in said.getvalue(), said.getvalue()  # of a picture that could not be drawn

    def left(out: Path) -> tuple[list[dict], dict]:
        rows = [steady(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]
        files = ("before.safetensors", "checkpoint-2/trainable.safetensors")
        return rows, {f"{file} {key}": value for file in files for key, value in load_file(out / file).items()}

    with tempfile.TemporaryDirectory() as folder:
        main("cpu", f"{folder}/cpu", pictures=False)
        expected_rows, expected_tensors = left(Path(folder, "cpu"))
        differences = []
        for i, (first, second) in enumerate(plans):
            out = Path(folder, str(i))
            main(first, str(out), stop_at=1)
            main(second, str(out), "--resume")
            rows, tensors = left(out)
            differences.append(largest_difference(rows, expected_rows))
            differences += [float((tensors[key] - value).abs().max()) for key, value in expected_tensors.items()]
            for name in (
                "before_after.png",
                "curves.png",
                "tree.png",
                "tree.html",
                "model/pytorch_lora_weights.safetensors",
            ):
                assert (out / name).stat().st_size > 1000, name
    return {"difference": max(differences)}


def autocast_of_cuda() -> dict:
    """bf16 with the autocast lists of CUDA: other types meet than on the CPU, and nothing may refuse them.

    The values are those of other roundings, so only their size is compared.
    """
    import fakegpu

    fakegpu.autocast_lists = "CUDA"
    try:
        for flags in (
            "--dtype bf16 --kl 0.1",
            "--dtype bf16 --lora 4 --gradient-checkpointing",
            "--video --dtype bf16",
        ):
            rows = iterations(f"{flags} --iterations 1", GPU)
            assert all(math.isfinite(value) for row in rows for value in row.values())
            assert rows[0]["ratio_dev"] < 0.01
    finally:
        fakegpu.autocast_lists = "CPU"
    return {}


# ------------------------------------------------------------------------------------------------------------ 3. faults
# File, a text that stands in it exactly once, a wrong text, flags that reach it. On the CPU all of them do nothing.
FAULTS = [
    ("branchgrpo", "= self.sigmas.to(like)", "= self.sigmas.to(like.dtype)", ""),
    ("branchgrpo", "for g in rng]), device)  # (P, n_0, *latent)", 'for g in rng]), "cpu")', ""),
    (
        "branchgrpo",
        "torch.randn(forest.roots, *shape, generator=g)",
        "torch.randn(forest.roots, *shape, generator=g, device=device)",
        "",
    ),
    ("branchgrpo", "std * moved(noise, device)", "std * noise", ""),
    ("branchgrpo", "torch.cat(self.logp_mean, 1).cpu()", "torch.cat(self.logp_mean, 1)", ""),
    ("branchgrpo", "torch.zeros(latents.shape[:2], device=device)", "torch.zeros(latents.shape[:2])", ""),
    (
        "branchgrpo",
        "torch.zeros(len(mean), device=device)",
        "torch.zeros(len(mean))",
        "--method branchgrpo-mix --mix 0 --splits 0,2",
    ),
    ("branchgrpo", "moved(torch.tensor([*starts, n]), batch.parent.device)", "torch.tensor([*starts, n])", ""),
    (
        "branchgrpo",
        "name: moved(value, device) for name, value in fields",
        "name: value for name, value in fields",
        "--tree-offload",
    ),
    (
        "branchgrpo",
        "torch.full((len(batch.x),), -1, device=rows.device)",
        "torch.full((len(batch.x),), -1)",
        "--updates 2 --updates-by parents",
    ),
    ("branchgrpo", "torch.zeros(3, device=device)  # loss", "torch.zeros(3)  # loss", ""),
    ("branchgrpo", "kl = torch.zeros((), device=device) if kl", "kl = torch.zeros(()) if kl", ""),
    ("branchgrpo", "sampler.levels(mean)[edges.step]", "sampler.sigmas.float()[edges.step]", "--kl 0.1"),
    (
        "branchgrpo",
        "x.to(edges.logp_old.device) for x in logp",
        "x for x in logp",
        "--dtype bf16 --updates 2 --tree-offload",
    ),
    (
        "objectives",
        "generator=g) for g in own]).to(x0)  # (p, J",
        "generator=g) for g in own])  # (p, J",
        "--objective nft",
    ),
    ("objectives", "values[prompts].to(ends)", "values[prompts]", "--objective endpoint"),
    (
        "objectives",
        "sampler.levels(points.x)[points.step]",
        "sampler.sigmas.float()[points.step]",
        "--objective endpoint",
    ),
    ("policy", "for row in rows]).to(self.device)", "for row in rows])", ""),
    ("policy", "                    component.to(self.device)\n", "                    pass\n", ""),
    ("models", "self.columns, self.device, torch.float32)", 'self.columns, "cpu", torch.float32)', ""),
    ("policy", "numel() // 16)].float().cpu()", "numel() // 16)].float()", "--text-cache CACHE"),
    ("policy", "torch.autocast(self.device.type,", 'torch.autocast("cpu",', "--dtype bf16"),
    (
        "models",
        'torch.zeros(cond["states"].shape[1], 3, device=x.device)',
        'torch.zeros(cond["states"].shape[1], 3)',
        "",
    ),
    ("policy", "self.latents_of(part.to(self.device))", "self.latents_of(part)", "--tree-offload"),
    ("models", "torch.tensor(values, device=x.device)", "torch.tensor(values)", "--video"),
    ("preference", "/ std).to(self.setup.device, self.setup.dtype)", "/ std).to(self.setup.dtype)", SCORERS),
    ("preference", 'ids["input_ids"], device=self.setup.device)', 'ids["input_ids"])', SCORERS),
    ("preference", "            model.to(self.setup.device)\n", "            pass\n", SCORERS),
    (
        "preference",
        "return (rated.cpu() - self.mean) / self.std",
        "return (rated - self.mean) / self.std",
        "--video --reward videoalign --reward-weights WEIGHTS --frames 9",
    ),
    ("loop", "run.sampler(), noise.to(acc.device)", "run.sampler(), noise", ""),
]
SAYS = ("same device", "device type for generator", "can't convert", "same dtype")  # what a fault's error speaks of


@contextlib.contextmanager
def planted(name: str, right: str, wrong: str):
    """While it is open, the project's modules are those of a copy with this fault."""
    import fakegpu

    names, path = [file.stem for file in ROOT.glob("*.py")], list(sys.path)
    originals = {each: sys.modules.pop(each) for each in names if each in sys.modules}
    with tempfile.TemporaryDirectory() as folder:
        for file in ROOT.glob("*.py"):
            shutil.copy(file, folder)
        os.symlink(ROOT / "tiny", f"{folder}/tiny")
        source = Path(folder, f"{name}.py")
        text = source.read_text()
        assert text.count(right) == 1, f"{name}.py must hold {right!r} exactly once"
        source.write_text(text.replace(right, wrong))

        sys.path.insert(0, folder)
        fakegpu.project = Path(folder)
        try:
            assert Path(module(name).__file__).parent == Path(folder)
            yield
        finally:
            fakegpu.project, sys.path[:] = ROOT, path
            for each in names:
                sys.modules.pop(each, None)
            sys.modules.update(originals)


def fault_case(i: int) -> dict:
    """The CPU does not see it; the device raises, or computes something else."""
    name, right, wrong, flags = FAULTS[i]
    flags = f"{flags} --iterations 1 --steps 4"
    with planted(name, right, wrong):
        on_cpu = iterations(flags, "cpu")
        try:
            difference = largest_difference(iterations(flags, GPU), on_cpu)
        except Exception as error:
            assert any(text in str(error) for text in SAYS), f"an error of another kind: {error!r}"
            return {"noticed": str(error)[:200]}
    assert difference > 1e-6, "it went unnoticed"
    return {"noticed": f"a metric differs by {difference}"}


# ------------------------------------------------------------------------------------------------------------- 4. waits
ITERATION = "--steps 20 --leaves 16 --prompts-per-iteration 2 --micro-batch 4 --lora 8"


# How often it may wait, by kind, however many nodes and micro-batches it has. 3 of the 8 ways to the device and 2 of
# the 6 back are those of prompts that were never encoded before. Queued copies do not wait: noise, indices.
MOST = {"host to device": 8, "device to host": 6, "read": 5, "host to device, queued": 23}


def waits(flags: str = ITERATION, warm: bool = False) -> dict:
    """Where one iteration makes the CPU wait for the device: place -> kind -> how often; and the sums by kind.

    It is the second iteration of a run. With `warm` the first one goes before it, which changes no count.
    """
    import fakegpu

    with tempfile.TemporaryDirectory() as folder:
        run = prepared(flags, GPU, folder)
        if warm:
            module("loop").iterate(run, 0)
        with fakegpu.counted() as events:
            module("loop").iterate(run, 1)
    table, sums = {}, Counter()
    for (place, kind, _), times in sorted(events.items()):
        row = table.setdefault(place, {})
        row[kind] = row.get(kind, 0) + times
        sums[kind] += times
    return {"table": table, "sums": sums}


def waits_twice() -> dict:
    """The first iteration of a process has no more waits than the second."""
    first, second = waits(), waits(warm=True)
    assert first == second, (first, second)
    return second


# ---------------------------------------------------------------------------------------------------------- the process
CALLS = {f"rule {name[5:]}": (name, ()) for name in RULES}  # case -> name of a function of this file, its arguments
CALLS |= {f"run {name}": ("run_case", (name,)) for name in RUNS}
CALLS |= {"whole": ("whole_runs", (False, [(GPU, GPU)]))}
CALLS |= {"whole, other devices": ("whole_runs", (False, [(GPU, "cpu"), ("cpu", GPU)]))}
CALLS |= {"whole, video": ("whole_runs", (True, [(GPU, GPU)]))}
CALLS |= {"autocast of CUDA": ("autocast_of_cuda", ())}
CALLS |= {f"fault {i}: {fault[0]}": ("fault_case", (i,)) for i, fault in enumerate(FAULTS)}
CALLS |= {"waits": ("waits", ()), "waits twice": ("waits_twice", ())}
CALLS |= {"waits, one node at a time": ("waits", (ITERATION.replace("--micro-batch 4", "--micro-batch 1"),))}


def worker(cases: list[str]) -> None:
    """Run cases, one line of JSON each. The first line says whether the emulator could be installed."""
    sys.path[:0] = [str(ROOT), str(HERE), str(HERE / "reference")]
    sys.dont_write_bytecode = True  # of the copies with faults, which may have the size and time of the original
    try:
        import fakegpu

        fakegpu.install()
    except Exception as error:
        print(json.dumps({"unavailable": f"{type(error).__name__}: {str(error).splitlines()[0]}"}), flush=True)
        return
    import compare  # noqa: F401  now, since it changes sys.path
    import torch

    torch.set_num_threads(1)
    sys.path[:0] = [str(ROOT), str(HERE)]
    for case in cases:
        (function, arguments), stdout = CALLS[case], sys.stdout
        arguments = (torch, fakegpu) if function in RULES else arguments
        began, error, result = time.process_time(), None, None
        try:
            with contextlib.redirect_stdout(sys.stderr):
                result = globals()[function](*arguments)
        except BaseException as raised:
            error = "".join(traceback.format_exception(raised))[-6000:]
        row = {"case": case, "error": error, "seconds": round(time.process_time() - began, 2)}
        print(json.dumps(row | (result or {})), file=stdout, flush=True)


# ------------------------------------------------------------------------------------------------------------ the tests
IN_SUITE = {"run endpoint", "run tree-offload, elbo", "run bf16, short", "run video, guided", "whole", "waits"}
IN_SUITE |= {f"rule {name[5:]}" for name in RULES}
IN_SUITE |= {case for case in CALLS if case.split(":")[0] in ("fault 0", "fault 2", "fault 15", "fault 18", "fault 22")}


def parameters(*starts: str) -> list:
    """The cases whose name begins so, marked: those outside the suite are slow, those in BUG are known to fail."""
    chosen = []
    for case in (case for case in CALLS if case.startswith(starts)):
        marks = [] if case in IN_SUITE else [pytest.mark.slow]
        marks += [pytest.mark.xfail(reason=BUG[case], strict=True)] if case in BUG else []
        chosen.append(pytest.param(case, marks=marks, id=case))
    return chosen


@pytest.fixture(scope="module")
def outcomes(request) -> dict[str, dict]:
    """What the process says of the cases that this session runs: case -> document."""
    own = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    chosen = [item.callspec.params["case"] for item in own]
    command, environment = [sys.executable, __file__, *chosen], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    if rows and "unavailable" in rows[0]:
        pytest.skip(f"the emulated accelerator cannot be installed: {rows[0]['unavailable']}")
    answered = {row["case"]: row for row in rows}
    silent = {"error": f"the process ended with code {done.returncode}:\n{done.stderr[-3000:]}"}
    return {case: answered.get(case, silent) for case in chosen}


@pytest.mark.parametrize("case", parameters("rule"))
def test_rule_of_the_emulator(case, outcomes):
    assert outcomes[case]["error"] is None, outcomes[case]["error"]


@pytest.mark.parametrize("case", parameters("run", "whole", "autocast"))
def test_training_on_the_device_is_training_on_the_cpu(case, outcomes):
    assert outcomes[case]["error"] is None, outcomes[case]["error"]
    assert outcomes[case].get("difference", 0) <= 1e-6  # 0 where it was written


@pytest.mark.parametrize("case", parameters("fault"))
def test_a_device_fault_is_noticed(case, outcomes):
    assert outcomes[case]["error"] is None, outcomes[case]["error"]


@pytest.mark.parametrize("case", parameters("waits"))
def test_an_iteration_rarely_waits_for_the_device(case, outcomes):
    """The failure lists the places: line of code -> kind -> times."""
    assert outcomes[case]["error"] is None, outcomes[case]["error"]
    sums, table = outcomes[case]["sums"], outcomes[case]["table"]
    assert all(times <= MOST.get(kind, times) for kind, times in sums.items()), json.dumps(table, indent=1)


def test_faults_stand_in_the_code():
    """Each is a text that its file holds exactly once."""
    for name, right, _, _ in FAULTS:
        assert (ROOT / f"{name}.py").read_text().count(right) == 1, f"{name}.py must hold {right!r} exactly once"


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print("\n".join(CALLS))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            os.environ |= {"HF_HUB_OFFLINE": "1", "DEVICE_TEST_FOLDER": scratch}
            worker(sys.argv[1:])
