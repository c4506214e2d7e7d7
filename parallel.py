"""Many processes: a transformer in pieces (FSDP2), and checkpoints that do not depend on the number of processes.

Each process owns its prompts and walks their forests alone; only gradients meet, in `branchgrpo.update`. All forests
of an iteration have one shape, and so have their masks, so every process makes the same calls and none waits for ever.

There are two ways to share a model. With DDP every process holds all of it; accelerate does that. With FSDP2 every
process holds a piece of every weight, and gathers a block's weights only while that block runs. That is torch's
fully_shard, called here: accelerate's own path ignores it on the CPU, where this one is tested.

1. shard        blocks, then what is left over: parameters become DTensors, gathered for a block when it runs
2. unshard      a plain copy on the main process, for pictures and export
3. together, Lookout   an error of one process ends all; who is waited for is said
4. save, load   trained weights, optimiser and EMA by torch.distributed.checkpoint; weights in safetensors beside them

Why a checkpoint resumes on any number of processes. A DTensor knows its whole shape and where its piece lies in it. So
`save` stores pieces of named tensors, not of processes, and `load` reads for each piece what overlaps with it, however
the file was cut. Optimiser and EMA are stored by the names of their parameters for the same reason. A plain tensor is
a piece that is the whole. Random numbers need no state: they are keyed by (seed, iteration, prompt).
"""

import json
import math
import pickle
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


# ------------------------------------------------------------------------------------------------------------ sharding
def shard(transformer: nn.Module, device: torch.device, bf16: bool) -> None:
    """Split every weight over all processes, in place; the pieces lie on the device, wherever the model was.

    Weights that are trained become float32, a block at a time: no process ever holds the whole model in float32.

    Args:
        transformer: a diffusers model; its repeated blocks are gathered one at a time.
        device: of the pieces.
        bf16: gather weights in bf16, norms too; the pieces and the reduction of gradients stay in float32.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))

    # Gradients are computed in bf16 but summed over the processes in float32. A bf16 sum would round every time
    # another process adds its part, so the gradient would depend on how many there are, and small parts would vanish.
    # Inputs are passed on as they are: cast to bf16, sigma would keep 8 bits, and 0.999 would become 1.
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )

    # Blocks come first and the transformer last: it then owns only what no block does (embeddings, output). Weights are
    # freed after the forward and gathered again in the backward, so that one block is whole at a time, not all. The
    # transformer itself needs telling: by default the outermost module stays whole, and whoever reads weights between
    # calls (EMA, checkpoints, the optimiser) must find the pieces.
    blocks = [m for m in transformer.modules() if type(m).__name__ in transformer._repeated_blocks]
    for module in (*blocks, transformer):
        for weight in module.parameters():
            if weight.requires_grad and weight.dtype != torch.float32:
                weight.data = weight.data.float()
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)


def whole(x: Tensor) -> Tensor:
    """A tensor gathered from its pieces, or itself where it is not split; every process must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def on_main(x: Tensor, main_process: bool, dtype: torch.dtype) -> Tensor:
    """A tensor gathered and kept on the CPU of the main process alone; every process must call it.

    Called weight by weight, it holds one whole weight on each device at a time. Elsewhere it returns a tensor without
    data.
    """
    x = whole(x).detach()
    return x.to("cpu", dtype).contiguous() if main_process else x.to("meta")


def unshard(transformer: nn.Module, main_process: bool, dtype: torch.dtype) -> nn.Module:
    """On the main process a plain model with the same weights, on its device; elsewhere the sharded one.

    A sharded model can only be called by all processes together; the main one draws and saves alone. Every process must
    call this.

    Args:
        transformer: a model that `shard` split. main_process: is this process the main one? dtype: of all weights of
        the plain model: that in which `shard` gathers them, or it would compute something else.
    """
    weights = {name: on_main(weight, main_process, dtype) for name, weight in transformer.state_dict().items()}
    if not main_process:
        return transformer

    # An empty model of the same class. FSDP2 replaced the class by one derived from (FSDPModule, the original), hence
    # the second base. On the meta device it takes no memory and no time to initialise.
    with torch.device("meta"):
        plain = type(transformer).__bases__[1].from_config(transformer.config)
        for name, adapter in getattr(transformer, "peft_config", {}).items():
            plain.add_adapter(adapter, name)
    plain.load_state_dict(weights, assign=True)

    # Buffers that no state dict has, as Wan's table of rotary embeddings, would stay without data. FSDP2 does not split
    # buffers, so those of the sharded model are complete.
    for module, sharded in zip(plain.modules(), transformer.modules()):
        module._buffers.update(sharded._buffers)
    return plain.to(next(transformer.parameters()).device).eval()


def together(message, kind: type[Exception]) -> None:
    """Raise on every process what one of them met; every process must call it, with its message or None.

    One that stopped alone would leave the others waiting for it in the next reduction.
    """
    for text in filter(None, gather_object([None if message is None else str(message)])):
        raise kind(text)


class Lookout:
    """Says which process the others wait for, and at what.

    Where processes meet, all wait for the last one, in silence and for as long as an hour. So each tells the others two
    things, through the key-value store by which torch's processes found each other:

    1. its place, such as "iteration 3: rollout", and how many places it has passed; all processes pass the same ones;
    2. that it lives: a number which a thread of its own raises. A process that was stopped has no running thread.

    A process that has been at one place for `PATIENCE` looks for those that have passed fewer places, or are silent.
    """

    BEAT = 5.0  # seconds between two signs of life
    PATIENCE = 30.0  # seconds before it is said, and again before it is said again

    def __init__(self):
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.store = torch.distributed.distributed_c10d._get_default_store().clone()  # a connection of its own
        self.passed, self.beats, self.place, self.since = 0, 0, "start", time.monotonic()
        self.closed = threading.Event()
        self.tell()

        # Reading a name that is not there yet would wait for it, so all write theirs before anyone reads.
        torch.distributed.barrier()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def at(self, place: str) -> None:
        """This process has come to a place."""
        self.passed, self.place, self.since = self.passed + 1, place, time.monotonic()

    def tell(self) -> None:
        """Write this process's place and sign of life."""
        self.store.set(f"lookout/{self.rank}", json.dumps([self.passed, self.beats, self.place]))

    def watch(self) -> None:
        """What the thread does until the run ends."""
        last_beat = {rank: (-1, time.monotonic()) for rank in range(self.size)}  # rank -> its number, when that came
        said = -math.inf
        while not self.closed.wait(self.BEAT):
            self.beats += 1
            try:
                self.tell()
                states = {rank: json.loads(self.store.get(f"lookout/{rank}")) for rank in range(self.size)}
            except RuntimeError:  # the process that holds the store has ended, and torch ends this one too
                return

            # Who is behind, who is silent? A process that was stopped itself finds all signs of life old, so it looks
            # at the others' numbers first.
            now = time.monotonic()
            for rank, (_, beats, _) in states.items():
                if beats != last_beat[rank][0]:
                    last_beat[rank] = beats, now
            silent = {rank for rank, (_, when) in last_beat.items() if now - when > self.PATIENCE}
            behind = {rank for rank, (passed, _, _) in states.items() if passed < self.passed}
            waited = now - self.since

            # One process speaks: the first of those that are not waited for.
            late = sorted(silent | (behind if waited > self.PATIENCE else set()))
            speaker = min(set(states) - set(late), default=None)
            if late and speaker == self.rank and now - said > self.PATIENCE:
                said = now
                who = ", ".join(self.describe(rank, states[rank][2], rank in silent) for rank in late)
                place = f"process {self.rank} is at {self.place} since {waited:.0f} s and waits for {who}"
                print(place, file=sys.stderr, flush=True)

    @staticmethod
    def describe(rank: int, place: str, silent: bool) -> str:
        """One process that is waited for."""
        return f"process {rank} (at {place}{', without a sign of life' * silent})"

    def close(self) -> None:
        """End the thread."""
        self.closed.set()
        self.thread.join()


# --------------------------------------------------------------------------------------------------------- checkpoints
def state(run) -> dict:
    """What a checkpoint keeps of a Run: trained weights, optimiser and EMA, all by the names of the parameters.

    torch.distributed.checkpoint saves this dictionary, and loads into the tensors of such a one in place.
    """
    transformer = run.policy.pipe.transformer
    weights = {name: p.detach() for name, p in transformer.named_parameters() if p.requires_grad}
    tensors = {"model": weights, "optimizer": get_optimizer_state_dict(transformer, run.optimizer.optimizer)}

    # EMAModel keeps a list in the order of the trainable parameters, which is that of `weights`.
    if run.ema:
        tensors["ema"] = dict(zip(weights, run.ema.shadow_params)) | {"step": run.ema.optimization_step}
    return tensors


def save(run, folder: Path) -> None:
    """Write a Run's state into a folder, as pieces from all processes, and the trained weights in one file.

    Every process must call it, with the same folder on a disk that all share.
    """
    tensors = state(run)
    dcp.save(tensors, checkpoint_id=folder)

    # The trained weights once more, whole and readable by any tool.
    main = run.accelerator.is_main_process
    weights = {name: on_main(weight, main, weight.dtype) for name, weight in tensors["model"].items()}
    if main:
        save_file(weights, folder / "trainable.safetensors")


class HarmlessUnpickler(pickle.Unpickler):
    """Makes nothing but what torch.distributed.checkpoint's own .metadata consists of.

    A pickle may name any function, and reading it calls that function. So a checkpoint from somebody else could run
    anything here.
    """

    CLASSES = {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(("pathlib", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
        *(("torch.distributed.checkpoint.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
        *(("torch.distributed.checkpoint.metadata", f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
        *(("torch.distributed.checkpoint.metadata", name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
    }

    def find_class(self, module: str, name: str):
        """The class that a pickle asks for, if it is one of CLASSES or a dtype of torch."""
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in self.CLASSES:
            return super().find_class(module, name)
        raise ValueError(f"it asks for {module}.{name}, which no checkpoint needs")


def check_metadata(path: Path) -> None:
    """Read a checkpoint's .metadata harmlessly, before torch reads it with all that pickle can do.

    Raises:
        ValueError: if it holds anything that no checkpoint needs, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            HarmlessUnpickler(file).load()
    except Exception as error:  # on garbage a pickle raises nearly anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is not what a run writes ({reason}): it was not loaded") from error


class SafePlanner(dcp.DefaultLoadPlanner):
    """Loads what is no tensor, such as the optimiser's settings, as data: torch's own would run a pickle's code."""

    def load_bytes(self, read_item, value) -> None:
        """Put one such value in its place."""
        loaded = torch.load(value, weights_only=True)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded)
        else:
            self.state_dict[read_item.dest_index.fqn] = loaded


def load(run, folder: Path) -> None:
    """Restore what `save` wrote, on any number of processes.

    Every process must call it.
    """
    # Tensors are loaded in place, which suffices for weights and EMA. Numbers cannot be: the optimiser's settings and
    # the EMA's step are handed over.
    tensors = state(run)
    check_metadata(folder / ".metadata")
    dcp.load(tensors, checkpoint_id=folder, planner=SafePlanner())
    set_optimizer_state_dict(run.policy.pipe.transformer, run.optimizer.optimizer, tensors["optimizer"])
    if run.ema:
        run.ema.optimization_step = tensors["ema"]["step"]
