"""Many processes: a transformer in pieces (FSDP2), its state in one checkpoint whatever the number of processes.

Each process owns its prompts and walks their forests alone; only gradients meet, in `branchgrpo.update`. All forests of an
iteration have one shape, and so have their masks, so every process makes the same calls and none waits for ever.

DDP, where every process holds the whole model, is accelerate's. FSDP2, where it holds a piece of every weight, is torch's
fully_shard, called here: accelerate's own path ignores it on the CPU, where this one is tested.

1. shard        blocks, then what is left over: parameters become DTensors, gathered for a block when it runs
2. save, load   trained weights, optimiser and EMA by torch.distributed.checkpoint; weights in safetensors beside them
3. unshard      a plain copy on the main process, for pictures and export
"""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def shard(transformer: nn.Module, device: torch.device, bf16: bool) -> None:
    """Split every weight over all processes, in place; the pieces lie on the device, wherever the model was.

    Those that are trained become float32, a block at a time: no process ever holds the whole model in float32.

    Args:
        transformer: a diffusers model; its repeated blocks are gathered one at a time.
        bf16: gather weights in bf16, norms too; the pieces and the reduction of gradients stay in float32.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    precision = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    blocks = [m for m in transformer.modules() if type(m).__name__ in transformer._repeated_blocks]
    for module in (*blocks, transformer):
        for weight in module.parameters():
            if weight.requires_grad and weight.dtype != torch.float32:
                weight.data = weight.data.float()
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)


def on_main(x: Tensor, main_process: bool, dtype: torch.dtype) -> Tensor:
    """A tensor gathered, kept by the main process alone, on the CPU; every process must ask."""
    x = whole(x).detach()
    return x.to("cpu", dtype).contiguous() if main_process else x.to("meta")


def whole(x: Tensor) -> Tensor:
    """A tensor gathered from its pieces; every process must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def unshard(transformer: nn.Module, main_process: bool, dtype: torch.dtype) -> nn.Module:
    """On the main process a plain model with the same weights, on its device; elsewhere the sharded one.

    Every process must call it. dtype: of all weights, those in which `shard` gathers them.
    """
    weights = {name: on_main(weight, main_process, dtype) for name, weight in transformer.state_dict().items()}
    if not main_process:
        return transformer
    with torch.device("meta"):
        plain = type(transformer).__bases__[1].from_config(transformer.config)  # the first is FSDP2's own
        for name, adapter in getattr(transformer, "peft_config", {}).items():
            plain.add_adapter(adapter, name)
    plain.load_state_dict(weights, assign=True)
    for module, same in zip(plain.modules(), transformer.modules()):
        module._buffers.update(same._buffers)  # Wan's rope, which no state dict has
    return plain.to(next(transformer.parameters()).device).eval()


def state(run) -> dict:
    """Trained weights, optimiser and EMA of a Run by name: what torch.distributed.checkpoint saves, and loads in place."""
    transformer = run.policy.pipe.transformer
    model = {name: p.detach() for name, p in transformer.named_parameters() if p.requires_grad}
    found = {"model": model, "optimizer": get_optimizer_state_dict(transformer, run.optimizer.optimizer)}
    if run.ema:
        found["ema"] = dict(zip(model, run.ema.shadow_params)) | {"step": run.ema.optimization_step}
    return found


def save(run, folder: Path) -> None:
    """Write a Run's state into a folder, as pieces from all processes, and the trained weights in one file.

    Every process must call it.
    """
    found = state(run)
    dcp.save(found, checkpoint_id=folder)
    main = run.accelerator.is_main_process
    weights = {name: on_main(weight, main, weight.dtype) for name, weight in found["model"].items()}
    if main:
        save_file(weights, folder / "trainable.safetensors")


def load(run, folder: Path) -> None:
    """Restore what `save` wrote, on any number of processes."""
    found = state(run)
    dcp.load(found, checkpoint_id=folder)
    set_optimizer_state_dict(run.policy.pipe.transformer, run.optimizer.optimizer, found["optimizer"])
    if run.ema:
        run.ema.optimization_step = found["ema"]["step"]
