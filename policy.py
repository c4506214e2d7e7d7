"""Policy: what a model must offer to be trained here, and the switches that make a large one fit into memory.

Idea: a diffusion model is a policy in the sense of reinforcement learning. Its state is a noisy latent x, a noise level
sigma and a prompt; the velocity v_theta(x, sigma, prompt) decides the mean of the next latent (Eq. 1, sde.py). The
tree, the credit and the loss ask for nothing but this:

    encode(prompts) -> cond            text conditioning: a dict of tensors whose first dimension is the prompts
    velocity(x, sigma, cond) -> v      v_theta, noise minus data, of the shape of x
    decode(x) -> pictures              (B, 3, H, W) in [0, 1]; videos are (B, F, 3, H, W)
    latent_shape                       the shape of one x, without the batch
    trainable()                        the parameters that the optimiser sees

A policy wraps a diffusers pipeline: frozen text encoders, a trained transformer, a frozen VAE decoder. `Policy` holds
what all models share. A model (models.py) is a subclass that says in its own way what is left to say:

    predict(x, sigma, cond) -> v       one call of the transformer, from which `velocity` makes guidance
    text(prompts) -> cond              one call of the text encoders, which `encode` remembers
    latents_of(x) -> z                 from what the transformer sees to what the VAE decodes, which `decode` does
    latent_shape, text_length, pixels  set in __init__

Direction of time: sigma = 1 is pure noise, sigma = 0 the picture, and velocities point from data to noise.

1. Policy            the interface first, then construction, text, sharding and saving
2. load_pipeline     a diffusers pipeline from disk or the hub, with errors in one sentence
3. four_bits         the settings of QLoRA's 4-bit weights

Switches of memory, and what each costs:

    lora             trains a low-rank addition instead of all weights: it can express less
    autocast         computes in bf16 or fp16, but trains float32 master weights: numbers with 8 or 11 significant bits
    nf4              stores the frozen weights in 4 bits (needs lora): they are approximate
    checkpointing    keeps only the input of each block: one more forward per backward
    text_offload     keeps the text encoders on the CPU while they are idle: moving them there and back
    text_cache       keeps encodings on disk, for a second run too: space on the disk
    tiling           decodes in tiles, one picture at a time: seams change a little
    sharded          splits weights, gradients and moments over all processes (parallel.py): communication
"""

import copy
import hashlib
import json
import os
import socket
import sys
from functools import cached_property
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers.models.normalization import RMSNorm
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from branchgrpo import Cond
from disk import replacing
from parallel import shard, unshard

# The projections of attention (queries, keys, values, output) under the last part of the names that diffusers gives
# them in all models here. Those with "add" belong to the text stream of FLUX and SD3. The single blocks of FLUX.2 have
# two layers in all, into which those of attention and of the feed-forward are fused.
LORA_TARGETS = (".to_q", ".to_k", ".to_v", ".to_out.0", ".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out")
LORA_TARGETS += (".to_qkv_mlp_proj", ".to_out")

# The most pixels in one call of a VAE, which works at full resolution, where one large picture already fills gigabytes.
# Worked values: 64 pictures of 32 x 64 go together, pictures of 512 x 512 one by one.
PIXELS_PER_DECODE = 2**17


class Policy:
    """What image and video policies share: a frozen diffusers pipeline around a trained transformer.

    Args:
        pipe: the diffusers pipeline; its transformer is trained, the rest is frozen.
        device: where everything computes.
        guidance: scale of classifier-free guidance, or of the embedded one; see `velocity`.
        autocast: a dtype for autocast around the transformer, bfloat16 or float16; the weights that are trained stay
            float32. None: no autocast.
        lora: rank of a LoRA on the attention projections (alpha = 2 rank, as in Flow-GRPO); 0 trains all weights.
        lora_from: a LoRA to start from, a file or folder or hub id of the same rank; see `start_from`.
        keep_reference: keep the untrained velocity at hand, for the KL term (free with LoRA, a copy without).
        checkpointing: compute activations again in the backward pass instead of keeping them.
        tiling: decode in overlapping tiles, which changes seams a little, and the pictures of a batch one by one.
        sharded: split the transformer over all processes (FSDP2); see parallel.py.
        compiled: compile the repeated blocks.
        text_offload: the text encoders are on the device only while they encode.
        text_cache: a folder that keeps what they encoded, for this run and others.
    """

    pipeline: str  # the name of the diffusers pipeline that a model wraps; imported when it is loaded
    latent_shape: tuple[int, ...]  # of one x, without the batch
    text_length: int  # tokens that a prompt is padded or cut to
    pixels: int  # of one picture, or of all frames of a video
    classifier_free = True  # is guidance a second velocity, without the prompt? FLUX.1 takes the scale as an input
    guidance_of_none = 1.0  # the scale that switches classifier-free guidance off, by the pipeline's own convention
    fits_fp16 = False  # do its activations stay within the range of fp16, whose largest number is 65,504?

    # ------------------------------------------------------------------------------------------------------ interface
    def velocity(self, x: Tensor, sigma: Tensor, cond: Cond, reference: bool = False) -> Tensor:
        """v_theta(x, sigma, prompt), the model's estimate of noise minus data, with its guidance.

        Classifier-free guidance (arXiv:2207.12598) goes past the velocity with the prompt, c, away from that without,
        u: v = u + g (c - u). It is part of the policy, in rollout and in training alike.

        Args:
            x: noisy latents (B, *latent_shape), float32.
            sigma: (B,) in (0, 1], one noise level per row; 1 is pure noise.
            cond: from `encode`, B rows.
            reference: ask the untrained model, for the KL term; needs keep_reference, or a LoRA.

        Returns:
            The shape of x, float32.
        """
        if not self.guided:
            return self.predict(x, sigma, cond, reference)

        # Both velocities come from one call of twice the batch: rows 0 to B - 1 with the prompt, B to 2B - 1 without.
        # One call keeps a GPU busier than two, and under FSDP it gathers the weights once.
        names = [name for name in cond if not name.startswith("empty_")]
        doubled = {name: torch.cat([cond[name], cond[f"empty_{name}"]]) for name in names}
        both = self.predict(torch.cat([x, x]), torch.cat([sigma, sigma]), doubled, reference)
        v_prompt, v_empty = both.chunk(2)

        # g is the scale as the pipeline counts it: most say 1 for no guidance, Z-Image says 0.
        scale = self.guidance + 1 - self.guidance_of_none
        return v_empty + scale * (v_prompt - v_empty)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Clean latents (B, *latent_shape) to pictures in [0, 1], float32 on the CPU.

        Returns:
            (B, 3, H, W), or videos (B, F, 3, H, W).
        """
        vae = self.pipe.vae

        def pictures_of(part: Tensor) -> Tensor:
            z = self.latents_of(part.to(self.device))
            pictures = in_unit_range(vae.decode(z.to(vae.dtype)).sample.float())
            return pictures.transpose(1, 2) if pictures.ndim == 5 else pictures  # (b, 3, F, H, W): frames first

        return on_the_cpu(pictures_of, x, max(1, PIXELS_PER_DECODE // self.pixels))

    def predict(self, x: Tensor, sigma: Tensor, cond: Cond, reference: bool) -> Tensor:
        """The velocity that the transformer predicts, without guidance from outside. A model defines it, by `call`.

        Args and returns: as `velocity`; cond as from `text`.
        """
        raise NotImplementedError

    def text(self, prompts: list[str]) -> Cond:
        """What the text encoders make of prompts. A model defines it.

        Returns:
            A dict of tensors whose first dimension is the prompts. What a row holds depends on its own prompt alone.
        """
        raise NotImplementedError

    def latents_of(self, x: Tensor) -> Tensor:
        """What the VAE decodes, (B, channels, ...), from the transformer's latents (B, *latent_shape): undo packing
        and normalisation. A model defines it."""
        raise NotImplementedError

    def call(self, reference: bool, **inputs) -> Tensor:
        """Call the transformer, or with `reference` the untrained one, under autocast.

        Returns:
            Its output in float32: steps and log-probabilities are computed in float32 whatever the transformer uses.
        """
        # Without a LoRA the untrained model is a copy. With one it is the same transformer, its adapters switched off.
        # `transformer` may be wrapped in DDP, which does not know of adapters; `pipe.transformer` is the model inside.
        model = self.reference if reference and self.reference is not None else self.transformer
        adapters_off = reference and self.lora > 0
        if adapters_off:
            self.pipe.transformer.disable_adapters()

        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            v = model(**inputs, return_dict=False)[0]

        if adapters_off:
            self.pipe.transformer.enable_adapters()
        return (torch.stack(v) if isinstance(v, list) else v).float()  # Z-Image's is a list of rows

    def trainable(self) -> list[torch.nn.Parameter]:
        """The parameters that the optimiser sees: all of the transformer's, or those of the LoRA."""
        return [p for p in self.transformer.parameters() if p.requires_grad]

    # --------------------------------------------------------------------------------------------------- construction
    def __init__(
        self,
        pipe: DiffusionPipeline,
        guidance=1.0,
        device="cpu",
        autocast: torch.dtype | None = None,
        lora=0,
        lora_from: str | None = None,
        keep_reference=False,
        checkpointing=False,
        tiling=False,
        sharded=False,
        compiled=False,
        text_offload=False,
        text_cache: str | None = None,
    ):
        self.pipe, self.device, self.autocast, self.lora = pipe, torch.device(device), autocast, lora
        self.guidance, self.guided = guidance, self.classifier_free and guidance != self.guidance_of_none
        self.transformer = pipe.transformer
        self.fingerprint = hashlib.sha256("".join(samples(pipe.transformer) + samples(pipe.vae)).encode()).hexdigest()
        pipe.set_progress_bar_config(disable=True)

        # 1. Switches that diffusers offers. Slicing decodes the pictures of a batch one by one. Which blocks repeat it
        #    says of some models in a list for compilation, of SD3 in that of modules to keep on one device.
        pipe.transformer._repeated_blocks = pipe.transformer._repeated_blocks or pipe.transformer._no_split_modules
        if checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
        if tiling:
            pipe.vae.enable_tiling()
            pipe.vae.enable_slicing()

        # 2. Freeze everything and switch dropout off, for good: a velocity must be a function of its arguments, or the
        #    ratios of an unchanged policy would not be 1. Two components stay on the CPU for now: text encoders that
        #    come only when they are needed, and a transformer that would not fit before it is split (step 7).
        for name, component in pipe.components.items():
            if isinstance(component, torch.nn.Module):
                component.eval().requires_grad_(False)
                stays_on_cpu = text_offload if name.startswith("text_encoder") else sharded and name == "transformer"
                if not stays_on_cpu:
                    component.to(self.device)

        # 3. Under CUDA's autocast RMSNorm returns float32 for queries and keys, while values stay bf16; so does
        #    diffusers' own RMSNorm with float32 weights. Flash attention refuses such a mixture, so the norm's output
        #    is given the type of its input.
        if autocast:
            for module in pipe.transformer.modules():
                if isinstance(module, (torch.nn.RMSNorm, RMSNorm)):
                    module.register_forward_hook(lambda _, inputs, normed: normed.to(inputs[0].dtype))

        # 4. The untrained model, for the KL term. A LoRA needs no copy: without its adapters it is the untrained model.
        self.reference = copy.deepcopy(pipe.transformer) if keep_reference and not lora else None

        # 5. What is trained. A LoRA adds (alpha / rank) B A to each projection. B starts at 0, so the first velocities
        #    are those of the checkpoint. A is random: seeded, hence the same on every process, and forked, hence the
        #    caller's random numbers are what they would have been.
        if lora:
            targets = lora_layers(pipe.transformer)
            config = LoraConfig(r=lora, lora_alpha=2 * lora, init_lora_weights="gaussian", target_modules=targets)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.transformer.add_adapter(config)
            if lora_from:
                start_from(pipe, lora, lora_from)
        else:
            self.transformer.requires_grad_(True)

        # 6. Master weights are float32, whatever the checkpoint's dtype. Neighbouring bf16 numbers lie 0.4 % to 0.8 %
        #    apart, so a step that moves a weight by 0.05 % would be rounded away. `shard` does the same block by block.
        if not sharded:
            for weight in self.trainable():
                weight.data = weight.data.float()

        # 7. Compile, then split: compilation finds the repeated blocks by the names of their classes, and FSDP2 changes
        #    those names.
        if compiled:
            pipe.transformer.compile_repeated_blocks(dynamic=True)
        if sharded:
            for model in filter(None, (self.transformer, self.reference)):
                shard(model, self.device, autocast == torch.bfloat16)

        # 8. Encoded prompts: in memory, or as files in text_cache.
        self.text_offload, self.text_cache, self._encoded = text_offload, text_cache, {}
        if text_cache:
            Path(text_cache).mkdir(parents=True, exist_ok=True)

    @classmethod
    def load(cls, model: str, *sizes: int, dtype: torch.dtype = torch.float32, nf4=False, **kwargs) -> "Policy":
        """A policy from a checkpoint.

        Args:
            model: a local folder, or a hub id.
            sizes: of a picture or video, as the model's class takes them.
            dtype: of the frozen weights; bfloat16 and float16 also switch autocast on.
            nf4: store the transformer's frozen weights in 4 bits.
            kwargs: of the model's class.

        Raises:
            ValueError: see `load_pipeline` and the model's class.
        """
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        pipe = load_pipeline(model, getattr(diffusers, cls.pipeline), dtype, nf4)
        return cls(pipe, *sizes, autocast=None if dtype == torch.float32 else dtype, **kwargs)

    # ----------------------------------------------------------------------------------------------------------- text
    def encode(self, prompts: list[str]) -> Cond:
        """Text to conditioning. Each prompt is encoded once, with text_cache once for all runs.

        Returns:
            A dict of tensors (P, ...) on the device, in the order of the P prompts: what `text` returns, and with
            guidance the same of the empty prompt, under the names empty_....
        """
        self.remember(prompts)

        def stacked(texts: list[str]) -> Cond:
            rows = [load_file(self.cached(text)) if self.text_cache else self._encoded[text] for text in texts]
            return {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]}

        # The empty prompt is the same in every row. It is repeated without copying it, so that one rule holds for all
        # tensors of a `Cond`: the first dimension is the prompts.
        cond = stacked(prompts)
        if self.guided:
            empty = stacked([""])
            cond |= {f"empty_{name}": value.expand(len(prompts), *value.shape[1:]) for name, value in empty.items()}
        return cond

    @torch.no_grad()
    def remember(self, prompts: list[str]) -> None:
        """Encode the prompts that were never encoded, into memory or text_cache; with guidance, the empty one too.

        With text_offload the encoders visit the device for it. A run that calls this once with all of its prompts,
        before it trains, never needs the encoders again.
        """
        # The prompts without an encoding, each once, in their order. A file that cannot be read counts as none.
        known = (lambda p: readable(self.cached(p))) if self.text_cache else self._encoded.__contains__
        new = [p for p in dict.fromkeys([*prompts, ""] if self.guided else prompts) if not known(p)]
        if not new:
            return

        # With text_offload the encoders were on the CPU until now; otherwise this changes nothing.
        components = self.pipe.components.items()
        text_encoders = [component for name, component in components if name.startswith("text_encoder") and component]
        for encoder in text_encoders:
            encoder.to(self.device)

        # Batches of 32 bound the encoders' activations. Each row is stored by itself, since later batches mix the
        # prompts in other ways.
        for start in tqdm(range(0, len(new), 32), desc="prompts", file=sys.stderr, disable=len(new) < 256):
            batch = new[start : start + 32]
            cond = {name: value.cpu() for name, value in self.text(batch).items()}
            for i, prompt in enumerate(batch):
                row = {name: value[i].clone() for name, value in cond.items()}
                if self.text_cache:
                    self._write(row, self.cached(prompt))
                else:
                    self._encoded[prompt] = row

        if self.text_offload:
            for encoder in text_encoders:
                encoder.to("cpu")

    def cached(self, prompt: str) -> Path:
        """A prompt's file in text_cache, named by a hash of the prompt and of what else its encoding depends on."""
        return Path(self.text_cache, hashlib.sha256(f"{self.encoders}\n{prompt}".encode()).hexdigest())

    @cached_property
    def encoders(self) -> str:
        """A fingerprint of the encoders: class, length, and about sixteen values of each of their weights.

        Two checkpoints may then share one text_cache. A hash of every weight would take minutes for T5's 4.8 billion.
        """
        words = [type(self).__name__, str(self.text_length)]
        for name, encoder in sorted(self.pipe.components.items()):
            if name.startswith("text_encoder") and encoder:
                words += samples(encoder)
        return "\n".join(words)

    @staticmethod
    def _write(row: Cond, file: Path) -> None:
        """Write one encoding under a name of this process, then rename.

        Other processes and runs may write the same prompt at this moment, and none must ever read half a file.
        """
        temporary = file.with_suffix(f".{socket.gethostname()}-{os.getpid()}")
        try:
            save_file(row, temporary)
            os.replace(temporary, file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"--text-cache {file.parent} cannot be written: {error}") from error

    # --------------------------------------------------------------------------------------------- sharding and saving
    def unshard(self, main_process: bool) -> None:
        """Give the main process a whole transformer that it can call alone, to draw and to save.

        Every process must call it, since gathering the pieces takes all of them.
        """
        # FSDP2: the weights keep the precision in which `shard` gathers them, so pictures stay what they were.
        if isinstance(self.transformer, FSDPModule):
            dtype = self.autocast or torch.float32
            self.pipe.transformer = unshard(self.transformer, main_process, dtype)

        # DDP: the model inside the wrapper, whose calls would wait for the other processes.
        self.transformer = self.pipe.transformer

    def save(self, folder: Path) -> None:
        """Write what diffusers loads: a whole pipeline, or with LoRA a file for `pipe.load_lora_weights(folder)`.

        The file of a LoRA carries its rank and alpha, or diffusers would assume alpha = rank and halve its effect. A
        pipeline has one dtype, that of --dtype: from float32 master weights beside bf16 encoders diffusers could not
        sample. It is written beside and renamed, so that a half-written model never has the good name.
        """
        with replacing(folder) as unfinished:
            if self.lora:
                model = self.pipe.transformer
                weights, settings = get_peft_model_state_dict(model), model.peft_config["default"].to_dict()
                self.pipe.save_lora_weights(unfinished, weights, transformer_lora_adapter_metadata=settings)
                return

            dtype = self.autocast or torch.float32
            for component in self.pipe.components.values():
                if isinstance(component, torch.nn.Module):
                    torch.nn.Module.to(component, dtype)  # diffusers' own warns at each call
            self.pipe.save_pretrained(unfinished)


# ------------------------------------------------------------------------------------------------------------ decoding
def in_unit_range(decoded: Tensor) -> Tensor:
    """What a VAE decodes, about [-1, 1], as [0, 1]. What is not finite becomes NaN; infinity clamped would be white."""
    x = decoded / 2 + 0.5
    return x.clamp(0, 1) + 0 * x  # 0 times infinity is NaN


def on_the_cpu(decode, x: Tensor, micro_batch: int) -> Tensor:
    """Decode so many latents at a time, into one tensor on the CPU; parts that are joined at the end would lie there
    twice, and 64 videos of 33 frames of 480 x 832 are 10 GiB.

    Args:
        decode: latents (b, ...) to pictures or videos (b, ...).
        x: all latents (B, ...).
        micro_batch: >= 1, the most latents at a time.
    """
    pictures = None
    for start in range(0, len(x), micro_batch):
        part = decode(x[start : start + micro_batch])
        if pictures is None:
            pictures = torch.empty(len(x), *part.shape[1:])
        pictures[start : start + len(part)] = part
    return pictures


# ------------------------------------------------------------------------------------------------------------- loading
def readable(file: Path) -> bool:
    """Is this a whole file of tensors? Its header says how long it must be, so nothing else is read."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def samples(module: torch.nn.Module) -> list[str]:
    """About sixteen values of each weight, by which other weights of the same shape are told apart."""
    words = []
    for weight in module.parameters():
        sample = weight.detach().flatten()[:: max(1, weight.numel() // 16)].float().cpu()
        words += [str(weight.dtype), sample.numpy().tobytes().hex()]
    return words


def check_pipeline(model: str, *names: str) -> str:
    """Look at a checkpoint's index, before anything of it is loaded.

    Args:
        model: a local folder, or a hub id.
        names: of the pipelines that it may be.

    Returns:
        The one of them that it is.

    Raises:
        ValueError: if it is missing, lacks a component, or is of another class; one sentence.
    """
    # A download that was cut short is named by what it lacks. In the index a component is a list (library, class); one
    # that the pipeline does without has no library.
    folder = Path(model)
    try:
        if folder.is_file():
            raise ValueError(f"--model {model} is a file: give the folder of a diffusers pipeline, or a hub id")
        if folder.is_dir():
            index = folder / "model_index.json"
            if not index.is_file():
                raise ValueError(f"--model {model}: no model_index.json there, so it is no diffusers pipeline")
            config = json.loads(index.read_text())
            if not isinstance(config, dict) or "_class_name" not in config:
                raise ValueError(f"--model {model}: its model_index.json is that of no diffusers pipeline")
            for name, value in config.items():
                if isinstance(value, list) and value[0] and not (folder / name).is_dir():
                    raise ValueError(f"--model {model}: its component {name!r} is missing")
        else:
            config = DiffusionPipeline.load_config(model)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise cannot_be_loaded(model, error) from error

    if config["_class_name"] not in names:
        needed = " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        raise ValueError(f"--model {model} is a {config['_class_name']}; a {needed} is needed here")
    return config["_class_name"]


def cannot_be_loaded(model: str, error: Exception) -> ValueError:
    """What to raise for a library's error: it is long, and its first line says enough of a folder.

    Of a hub id it says one thing for several causes, "no valid model identifier" where a licence is to be accepted
    and "no file named model_index.json" where the network is down. So all of them are asked for.
    """
    if not Path(model).exists() and (model.startswith(("/", ".", "~")) or model.count("/") > 1):
        return ValueError(f"--model {model}: there is no such folder")

    lines = str(error).strip().splitlines() or [type(error).__name__]
    causes = f"is the name right, its licence accepted on https://huggingface.co/{model}, `hf auth login` done, and the"
    hint = "" if Path(model).exists() else f"; {causes} hub within reach?"
    return ValueError(f"--model {model} cannot be loaded: {lines[0]}{hint}")


def load_pipeline(model: str, pipeline_class: type, dtype: torch.dtype, nf4: bool = False) -> DiffusionPipeline:
    """Load a diffusers pipeline of one class.

    Args:
        model, pipeline_class: see `check_pipeline`.
        dtype: of its weights.
        nf4: store the linear layers of the transformer in 4 bits; see `four_bits`.

    Raises:
        ValueError: as `check_pipeline`, or if the weights cannot be read; one sentence.
    """
    check_pipeline(model, pipeline_class.__name__)
    packing = {"quantization_config": four_bits(dtype)} if nf4 else {}
    try:
        pipe = pipeline_class.from_pretrained(model, dtype=dtype, **packing)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise cannot_be_loaded(model, error) from error

    # What a file lacks the libraries draw at random, and say so in a note that nobody reads.
    if Path(model).is_dir():
        for name, component in pipe.components.items():
            if isinstance(component, torch.nn.Module):
                check_weights(model, name, component)
    return pipe


def check_weights(model: str, name: str, component: torch.nn.Module) -> None:
    """The files of a component hold all of its weights.

    Args:
        model: the pipeline's folder. name: the component's, which is the name of its folder there.

    Raises:
        ValueError: if a weight is in no file.
    """
    files = list((Path(model) / name).glob("*.safetensors"))
    stored: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            stored |= set(opened.keys())

    # Two names may share one weight, of which files keep one; a prefix may differ, and 4 bits add names of their own.
    by_weight: dict[int, set[str]] = {}
    for weight_name, weight in component.named_parameters(remove_duplicate=False):
        by_weight.setdefault(id(weight), set()).add(weight_name)
    short = {other.partition(".")[2] for other in stored}
    lacking = [min(names) for names in by_weight.values() if not names & (stored | short)]
    if files and lacking:
        raise ValueError(f"--model {model}: the files of its {name} lack {len(lacking)} weights, such as {lacking[0]}")


def lora_layers(transformer: torch.nn.Module) -> list[str]:
    """The names of the layers that a LoRA is added to."""
    layers = [name for name, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)]
    return [name for name in layers if name.endswith(LORA_TARGETS)]


def start_from(pipe: DiffusionPipeline, rank: int, source: str) -> None:
    """Give the new adapter of a pipeline's transformer the weights of a LoRA that was saved.

    A LoRA adds (alpha / rank) B A. Here alpha is 2 rank; one that was saved with another alpha has its B scaled by
    alpha / (2 rank), which adds the same. A file that does not say its alpha means alpha = rank, as in diffusers.

    Args:
        rank: of the adapter, which must be that of the file.
        source: what `pipe.load_lora_weights` takes: the model folder of a run with --lora, a file, a hub id.

    Raises:
        ValueError: if it cannot be read, has another rank, or does not fit the adapter's layers; one sentence.
    """
    if os.path.isabs(source) and not os.path.exists(source):
        raise ValueError(f"--lora-from {source}: there is no such file or folder")
    try:
        wanted = {"return_alphas": True, "return_lora_metadata": True, "use_safetensors": True}  # a pickle runs code
        saved, *alphas, metadata = pipe.lora_state_dict(source, **wanted)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--lora-from {source} cannot be loaded: {reason}") from error

    if any(alphas):
        raise ValueError(f"--lora-from {source} has an alpha for each layer: save it with diffusers first")

    # Its weights, by the names that they have in the transformer. Of A, (rank, in), the first dimension is the rank.
    prefix = "transformer."
    weights = {name.removeprefix(prefix): w for name, w in saved.items() if name.startswith(prefix)}
    ranks = {len(w) for name, w in weights.items() if "lora_A" in name}
    if ranks != {rank}:
        found = f"has rank {', '.join(map(str, sorted(ranks)))}" if ranks else "holds no LoRA of the transformer"
        raise ValueError(f"--lora-from {source} {found}, and --lora is {rank}: they must be equal")

    alpha = (metadata or {}).get(f"{prefix}lora_alpha", rank)
    weights = {name: w * (alpha / (2 * rank) if "lora_B" in name else 1) for name, w in weights.items()}
    unknown = set_peft_model_state_dict(pipe.transformer, weights).unexpected_keys
    if unknown:
        raise ValueError(f"--lora-from {source} is for other layers than are trained here, such as {unknown[0]}")


def four_bits(dtype: torch.dtype) -> PipelineQuantizationConfig:
    """QLoRA's NF4 (arXiv:2305.14314) for the transformer: 4.5 bits per weight, computed in `dtype`.

    Each weight is one of 16 levels, which are quantiles of a normal distribution, times a scale. One float32 scale per
    block of 64 weights adds half a bit: 4 + 32 / 64 = 4.5.
    """
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return PipelineQuantizationConfig("bitsandbytes_4bit", settings, components_to_quantize=["transformer"])
