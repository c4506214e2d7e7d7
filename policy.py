"""Policies: what a model must offer to be trained here; FLUX for images and Wan for video, for any diffusers checkpoint.

A policy is a frozen text encoder, a trained transformer and a frozen decoder:

    encode(prompts) -> cond            dict of tensors, first dimension the prompts
    velocity(x, sigma, cond) -> v      v_theta(x, sigma, prompt), noise minus data; sigma = 1 is noise
    decode(x) -> pictures              (B, 3, H, W) in [0, 1]; videos are (B, F, 3, H, W)
    latent_shape, transformer, trainable(), remember(prompts), unshard(main_process), save(folder); with --kl velocity(reference=True)

The tree, the credit and the loss know nothing else of a model. Packing, VAE constants, channel counts and the length of the
text are read from the checkpoint's own config, so a small model and FLUX.1-dev or Wan2.1 take the same path.
"""

import copy
import hashlib
import json
import os
import socket
import sys
from functools import cached_property
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from branchgrpo import Cond
from parallel import shard, unshard

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def load_pipeline(model: str, wanted: type, dtype: torch.dtype, nf4: bool = False) -> DiffusionPipeline:
    """Load a diffusers pipeline of one class from a folder or a hub id; with nf4 the transformer's linear layers in 4 bits.

    Raises:
        ValueError: if it is missing, lacks a component, or is of another class; one sentence.
    """
    if Path(model).is_dir():
        index = Path(model) / "model_index.json"
        if not index.is_file():
            raise ValueError(f"--model {model}: no model_index.json there, so it is no diffusers pipeline")
        config = json.loads(index.read_text())
        for name, value in config.items():
            if isinstance(value, list) and value[0] and not (Path(model) / name).is_dir():
                raise ValueError(f"--model {model}: its component {name!r} is missing")
    try:
        config = config if Path(model).is_dir() else DiffusionPipeline.load_config(model)
        if config["_class_name"] != wanted.__name__:
            raise ValueError(f"--model {model} is a {config['_class_name']}; a {wanted.__name__} is needed here")
        return wanted.from_pretrained(model, dtype=dtype, **({"quantization_config": four_bits(dtype)} if nf4 else {}))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--model {model} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def four_bits(dtype: torch.dtype) -> PipelineQuantizationConfig:
    """QLoRA's NF4 (arXiv:2305.14314) for the transformer: 4.5 bits a weight, computed in `dtype`."""
    kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return PipelineQuantizationConfig("bitsandbytes_4bit", kind, components_to_quantize=["transformer"])


class Policy:
    """What image and video policies share: a frozen diffusers pipeline around a trained transformer.

    Args:
        pipe: the diffusers pipeline; its transformer is trained, the rest is frozen.
        device: of everything.
        autocast: bf16 autocast around the transformer and the decoder.
        lora: rank of a LoRA on the attention projections (alpha = 2 rank, as in Flow-GRPO); 0 trains all weights.
        keep_reference: keep the untrained velocity at hand, for the KL term (free with LoRA, a copy without).
        checkpointing: compute activations again in the backward pass instead of keeping them.
        tiling: decode in overlapping tiles, which changes seams a little, and pictures of a batch one by one.
        sharded: split the transformer over all processes (FSDP2); see parallel.py.
        compiled: compile the repeated blocks.
        text_offload: text encoders are on the device only while they encode.
        text_cache: a folder that keeps what they encoded, for this run and others.
    """

    pipeline_class: type
    latent_shape: tuple[int, ...]
    guided = False  # are prompts encoded with an empty one beside them?

    def __init__(
        self,
        pipe: DiffusionPipeline,
        device="cpu",
        autocast=False,
        lora=0,
        keep_reference=False,
        checkpointing=False,
        tiling=False,
        sharded=False,
        compiled=False,
        text_offload=False,
        text_cache: str | None = None,
    ):
        self.pipe, self.device, self.autocast, self.lora = pipe, torch.device(device), autocast, lora
        pipe.set_progress_bar_config(disable=True)
        if checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
        if tiling:
            pipe.vae.enable_tiling()
            pipe.vae.enable_slicing()
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
                waits = text_offload if name.startswith("text_encoder") else sharded and name == "transformer"
                if not waits:
                    part.to(self.device)
        for module in pipe.transformer.modules() if autocast else ():
            if isinstance(module, torch.nn.RMSNorm):  # CUDA's autocast leaves float32, which flash attention refuses
                module.register_forward_hook(lambda _, inputs, normed: normed.to(inputs[0].dtype))
        self.transformer = pipe.transformer
        self.reference = copy.deepcopy(pipe.transformer) if keep_reference and not lora else None
        if lora:
            config = LoraConfig(r=lora, lora_alpha=2 * lora, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # the same start on every process, whatever was drawn before
                self.transformer.add_adapter(config)
        else:
            self.transformer.requires_grad_(True)
        for weight in () if sharded else self.trainable():
            weight.data = weight.data.float()  # fp32 master weights, whatever the checkpoint's dtype
        if compiled:  # by the names of its blocks, which FSDP2 changes
            pipe.transformer.compile_repeated_blocks(dynamic=True)
        for model in filter(None, (self.transformer, self.reference)) if sharded else ():
            shard(model, self.device, autocast)
        self.text_offload, self.text_cache, self._encoded = text_offload, text_cache, {}
        if text_cache:
            Path(text_cache).mkdir(parents=True, exist_ok=True)

    @classmethod
    def load(cls, model: str, *sizes: int, dtype: torch.dtype = torch.float32, nf4=False, **kwargs) -> "Policy":
        """From a local folder or a hub id; see `load_pipeline` and the class for what is raised."""
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        pipe = load_pipeline(model, cls.pipeline_class, dtype, nf4)
        return cls(pipe, *sizes, autocast=dtype == torch.bfloat16, **kwargs)

    def trainable(self) -> list[torch.nn.Parameter]:
        """The parameters that the optimiser sees."""
        return [p for p in self.transformer.parameters() if p.requires_grad]

    def embed(self, prompts: list[str]) -> Cond:
        """Text to conditioning, with the pipeline's own encoders."""
        raise NotImplementedError

    @cached_property
    def encoders(self) -> str:
        """What an encoding depends on beside its prompt: class, length, guidance, and some values of every encoder's weight."""
        words = [type(self).__name__, str(self.text_length), str(self.guided)]
        for name, encoder in sorted(self.pipe.components.items()):
            if name.startswith("text_encoder") and encoder:
                for weight in encoder.parameters():
                    some = weight.flatten()[:: max(1, weight.numel() // 16)].float().cpu()
                    words += [str(weight.dtype), some.numpy().tobytes().hex()]
        return "\n".join(words)

    def cached(self, prompt: str) -> Path:
        """A prompt's file in text_cache."""
        return Path(self.text_cache, hashlib.sha256(f"{self.encoders}\n{prompt}".encode()).hexdigest())

    @torch.no_grad()
    def remember(self, prompts: list[str]) -> None:
        """Encode what was never encoded, in the memory or in text_cache; with text_offload the encoders visit the device for it."""
        known = (lambda p: self.cached(p).exists()) if self.text_cache else self._encoded.__contains__
        new = [p for p in dict.fromkeys(prompts) if not known(p)]
        encoders = [part for name, part in self.pipe.components.items() if name.startswith("text_encoder") and part]
        for encoder in encoders if new else ():
            encoder.to(self.device)
        for start in tqdm(range(0, len(new), 32), desc="prompts", file=sys.stderr, disable=len(new) < 256):
            some = new[start : start + 32]
            cond = {name: value.cpu() for name, value in self.embed(some).items()}
            for i, prompt in enumerate(some):
                row = {name: value[i].clone() for name, value in cond.items()}
                if not self.text_cache:
                    self._encoded[prompt] = row
                    continue
                mine = f".{socket.gethostname()}-{os.getpid()}"  # others may write it too
                beside = self.cached(prompt).with_suffix(mine)
                save_file(row, beside)
                os.replace(beside, self.cached(prompt))
        for encoder in encoders if new and self.text_offload else ():
            encoder.to("cpu")

    def encode(self, prompts: list[str]) -> Cond:
        """Text to conditioning, first dimension the prompts; each prompt is encoded once, with text_cache once for all runs."""
        self.remember(prompts)
        rows = [load_file(self.cached(p)) if self.text_cache else self._encoded[p] for p in prompts]
        return {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]}

    def call(self, reference: bool, **inputs) -> Tensor:
        """The transformer, or with `reference` the untrained one, under autocast: its output in float32."""
        model = self.reference if reference and self.reference is not None else self.transformer
        adapters_off = reference and self.lora > 0
        if adapters_off:
            self.pipe.transformer.disable_adapters()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            v = model(**inputs, return_dict=False)[0]
        if adapters_off:
            self.pipe.transformer.enable_adapters()
        return v.float()

    def unshard(self, main_process: bool) -> None:
        """Give the main process a whole transformer that it can call alone, to draw and to save; every process must call it."""
        if isinstance(self.transformer, FSDPModule):
            dtype = torch.bfloat16 if self.autocast else torch.float32
            self.pipe.transformer = unshard(self.transformer, main_process, dtype)
        self.transformer = self.pipe.transformer  # without DDP, whose calls meet those of others

    def save(self, folder: Path) -> None:
        """Write what diffusers loads: a whole pipeline, or with LoRA a file for `pipe.load_lora_weights(folder)`."""
        if self.lora:
            model = self.pipe.transformer
            weights, rank_and_alpha = get_peft_model_state_dict(model), model.peft_config["default"].to_dict()
            self.pipeline_class.save_lora_weights(folder, weights, transformer_lora_adapter_metadata=rank_and_alpha)
        else:
            self.pipe.save_pretrained(folder)
