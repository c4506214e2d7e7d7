"""The plan, the scripts of configs/ and the commands of docs/gpu.md.

The figures of the architectures are compared with the real ones on models without data (torch's meta device), memory
and seconds with sums by hand. The scripts and the commands are run with the embedded model in the place of the large
one.
"""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.normalization import RMSNorm
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

import hardware
import train_image
import train_video
from policy import lora_layers

BF16, HERE = torch.bfloat16, Path(__file__).parent.parent


# ----------------------------------------------------------------------------------------------------- the real models
# Each function makes the transformer on the meta device with so many blocks, and inputs of one picture or video with
# its prompt. Values that are not given are the defaults of diffusers' class.
def empty(*shape: int) -> torch.Tensor:
    """A bf16 tensor without data, where the default device is meta."""
    return torch.empty(shape, dtype=BF16)


def flux(double: int = 19, single: int = 38, height: int = 720, width: int = 720, text: int = 512) -> tuple:
    """FLUX.1-dev."""
    tokens = (height // 16) * (width // 16)
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True).to(BF16)
        inputs = {"hidden_states": empty(1, tokens, 64), "encoder_hidden_states": empty(1, text, 4096)}
        inputs |= {"timestep": empty(1), "guidance": empty(1), "pooled_projections": empty(1, 768)}
        inputs |= {"img_ids": torch.empty(tokens, 3), "txt_ids": torch.empty(text, 3)}
    return model, inputs


def sd3(dual: int = 13, other: int = 11, height: int = 720, width: int = 720, text: int = 333) -> tuple:
    """SD3.5-medium: blocks with a second attention, then blocks without; the last of these writes no text."""
    heads = {
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
    }
    with torch.device("meta"):
        blocks = {"num_layers": dual + other, "dual_attention_layers": tuple(range(dual))}
        model = SD3Transformer2DModel(**heads, **blocks).to(BF16)
        inputs = {"hidden_states": empty(1, 16, height // 8, width // 8), "timestep": empty(1)}
        inputs |= {"encoder_hidden_states": empty(1, text, 4096), "pooled_projections": empty(1, 2048)}
    return model, inputs


def flux2(double: int = 5, single: int = 20, height: int = 720, width: int = 720, text: int = 512) -> tuple:
    """FLUX.2-klein-4B."""
    tokens = (height // 16) * (width // 16)
    size = {"num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False}
    with torch.device("meta"):
        model = Flux2Transformer2DModel(**size, num_layers=double, num_single_layers=single).to(BF16)
        inputs = {"hidden_states": empty(1, tokens, 128), "encoder_hidden_states": empty(1, text, 7680)}
        inputs |= {"timestep": empty(1), "img_ids": torch.empty(tokens, 4), "txt_ids": torch.empty(text, 4)}
    return model, inputs


def z_image(refiners: int = 2, blocks: int = 30, height: int = 720, width: int = 720, text: int = 512) -> tuple:
    """Z-Image: refiners of the picture, as many of the text, and blocks over both. Inputs are lists."""
    with torch.device("meta"):
        model = ZImageTransformer2DModel(n_refiner_layers=refiners, n_layers=blocks).to(BF16)
        inputs = {"x": [empty(16, 1, height // 8, width // 8)], "t": empty(1), "cap_feats": [empty(text, 2560)]}
    return model, inputs


def wan(blocks: int = 30, frames: int = 33, height: int = 480, width: int = 832, text: int = 512) -> tuple:
    """Wan2.1-T2V-1.3B."""
    shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    heads = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "freq_dim": 256, "text_dim": 4096}
    with torch.device("meta"):
        model = WanTransformer3DModel(**heads, num_layers=blocks).to(BF16)
        inputs = {"hidden_states": empty(*shape), "timestep": empty(1), "encoder_hidden_states": empty(1, text, 4096)}
    return model, inputs


REAL = {"flux1-dev": flux, "sd3.5-medium": sd3, "flux2-klein-4b": flux2, "z-image": z_image, "wan2.1-1.3b": wan}


def blocks_of(model) -> list[torch.nn.Module]:
    """The blocks of a transformer, in the order of their names."""
    kinds = model._repeated_blocks or model._no_split_modules
    return [block for block in model.modules() if type(block).__name__ in kinds]


@pytest.mark.parametrize("name", REAL)
def test_parameters_and_flops_are_the_real_ones(name):
    """At full depth: shapes run through, parameters are exact, FLOPs within a thousandth of torch's counter."""
    arch, (model, inputs) = hardware.ARCHITECTURES[name], REAL[name]()
    assert sum(p.numel() for p in model.parameters()) == arch.parameters
    blocks = blocks_of(model)
    assert max(sum(p.numel() for p in b.parameters()) for b in blocks) == arch.block
    assert sum(b.numel() for b in model.buffers() if b.numel() > 1e6) == arch.position_table

    # A token passes all blocks, but in Z-Image the two refiners of the picture or the two of the text.
    assert len(blocks) == arch.blocks + 2 * (name == "z-image")

    # Inputs and outputs have the same shape. Z-Image takes and gives a list of pictures.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(**inputs).sample
    assert [v.shape for v in tree_leaves(output)] == [x.shape for x in tree_leaves(next(iter(inputs.values())))]
    options = planned("--frames 33" if arch.video else "--height 720 --width 720", name)
    assert arch.flops(arch.tokens(options), arch.text) == pytest.approx(counter.get_total_flops(), rel=1e-3)

    model.add_adapter(LoraConfig(r=4, target_modules=lora_layers(model)))
    assert sum(p.numel() for n, p in model.named_parameters() if "lora" in n) == 4 * arch.lora * arch.width


def test_flops_grow_as_the_real_ones_do():
    """TFLOP of torch's counter at other sizes: attention grows with the square of the tokens."""
    assert hardware.flux_flops(32**2, 512) / 1e12 == pytest.approx(21.50, rel=1e-3)
    assert hardware.flux_flops(64**2, 512) / 1e12 == pytest.approx(74.38, rel=1e-3)
    assert hardware.sd3_flops(64**2, 333) / 1e12 == pytest.approx(11.250, rel=1e-3)
    assert hardware.flux2_flops(64**2, 512) / 1e12 == pytest.approx(34.820, rel=1e-3)
    assert hardware.z_image_flops(64**2, 512) / 1e12 == pytest.approx(62.506, rel=1e-3)
    assert hardware.wan_flops(14 * 1560, 512) / 1e12 == pytest.approx(144.76, rel=1e-3)


# The autoencoders that pictures share, and CLIP-L: what the official configurations change in the defaults.
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
VAE |= {"use_quant_conv": False, "use_post_quant_conv": False}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "projection_dim": 1280}
T5_SIZE = {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu"}
QWEN = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_key_value_heads": 8}
FROZEN = {
    "T5-XXL": lambda: T5EncoderModel(T5Config(**T5_SIZE, vocab_size=32128)),
    "UMT5-XXL": lambda: UMT5EncoderModel(UMT5Config(**T5_SIZE, vocab_size=256384)),
    "CLIP-L": lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)),
    "OpenCLIP-bigG": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**BIG_G, num_hidden_layers=32)),
    "Qwen3-4B": lambda: Qwen3Model(Qwen3Config(**QWEN)),
    "VAE": lambda: AutoencoderKL(**VAE),
    ("sd3.5-medium", "CLIP-L"): lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_L)),
    ("flux2-klein-4b", "Qwen3-4B"): lambda: Qwen3ForCausalLM(Qwen3Config(**QWEN, tie_word_embeddings=True)),
    ("flux2-klein-4b", "VAE"): lambda: AutoencoderKLFlux2(),
    ("wan2.1-1.3b", "VAE"): lambda: AutoencoderKLWan(),
}


def frozen(name: str, part: str) -> torch.nn.Module:
    """A frozen part of an architecture in bf16, on the meta device."""
    with torch.device("meta"):
        return (FROZEN.get((name, part)) or FROZEN[part])().to(BF16).eval()


@pytest.mark.parametrize("name", REAL)
def test_frozen_parts_are_the_real_ones(name):
    """Parameters of text encoders and autoencoders, counted on models of the official configurations."""
    for part, parameters in hardware.ARCHITECTURES[name].frozen.items():
        assert sum(p.numel() for p in frozen(name, part).parameters()) == parameters, part


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that live at a time, except weights; keeps the largest count, `peak`."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self.storages = {weight.untyped_storage()._cdata for weight in model.parameters()}

    def free(self, address: int, size: int) -> None:
        self.now -= size
        self.storages.discard(address)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # A mask is asked whether it masks anything. Without data the answer is that it does.
        if function is torch.ops.aten._local_scalar_dense.default:
            return False
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.storages:
                storage = tensor.untyped_storage()
                self.storages.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return output


def three_layers(encoder, ids, mask):
    """What Flux2KleinPipeline makes of Qwen3's states."""
    output = encoder(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    layers = torch.stack([output.hidden_states[i] for i in (9, 18, 27)], 1)
    return layers.permute(0, 2, 1, 3).reshape(*ids.shape, -1)


ENCODED = {  # the widest encoder of each, called as diffusers' pipeline calls it
    "flux1-dev": ("T5-XXL", lambda encoder, ids, mask: encoder(ids)[0]),
    "sd3.5-medium": ("T5-XXL", lambda encoder, ids, mask: encoder(ids)[0]),
    "flux2-klein-4b": ("Qwen3-4B", three_layers),
    "z-image": ("Qwen3-4B", lambda encoder, ids, mask: encoder(ids, mask, output_hidden_states=True).hidden_states[-2]),
    "wan2.1-1.3b": ("UMT5-XXL", lambda encoder, ids, mask: encoder(ids, mask).last_hidden_state),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODED)
def test_what_an_encoder_holds(name, monkeypatch):
    """Bytes that live at once while 32 prompts are encoded, on the meta device.

    Attention is one kernel here, as on a GPU; without data torch would compute it step by step.
    """
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, *a, **k: torch.empty_like(q))
    part, encode = ENCODED[name]
    encoder, arch = frozen(name, part), hardware.ARCHITECTURES[name]
    ids, mask = (torch.ones(32, 512, dtype=dtype, device="meta") for dtype in (torch.long, torch.bool))
    with torch.no_grad(), Held(encoder) as held:
        encode(encoder, ids, mask)
    assert held.peak / 2 / ids.numel() == pytest.approx(arch.encoding, rel=0.01)


def saved_bytes(model, inputs) -> list[int]:
    """Bytes that autograd keeps of one forward, for each block, under autocast.

    A storage that is kept by several operations counts once, and weights do not count.
    """
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, int]] = {}  # address of a storage -> block, bytes
    alive, running = [], []  # tensors are held, so that no address is used twice; the block that runs now

    def pack(x):
        alive.append(x)
        address = x.untyped_storage().data_ptr()
        if running and address not in weights:
            kept.setdefault(address, (running[0], x.untyped_storage().nbytes()))
        return address  # instead of x, which no backward asks for

    blocks = blocks_of(model)
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda m, inputs, i=i: running.append(i))
        block.register_forward_hook(lambda m, inputs, output: running.clear())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", BF16):
        model(**inputs)
    alive.clear()  # the graph knows `pack`, which knows `alive`, which knows the graph: it would never be freed
    return [sum(n for j, n in kept.values() if j == i) for i in range(len(blocks))]


# Kinds of blocks, one of each: arguments of the function above, and how often the kind occurs in the whole model. Text
# has a refiner of its own in Z-Image, which keeps the same bytes however large the picture.
KINDS = {
    "flux1-dev": ((1, 1), (19, 38)),
    "sd3.5-medium": ((1, 2), (13, 10, 1)),
    "flux2-klein-4b": ((1, 1), (5, 20)),
    "z-image": ((1, 1), (2, 2, 30)),
    "wan2.1-1.3b": ((1, 1), (30,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_activations_are_those_autograd_keeps(name, lora, monkeypatch):
    """One real block of each kind at full width, on the CPU: bytes per further token, over the width."""
    # CUDA's autocast computes norms in float32, which the CPU's does not.
    arch, norm = hardware.ARCHITECTURES[name], torch.nn.functional.layer_norm
    monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda x, *a, **k: norm(x.float(), *a, **k))
    blocks, repeats = KINDS[name]

    # At two lengths, whose difference has nothing in it that does not grow with the tokens.
    saved = []
    for tokens in (64, 128):
        model, inputs = REAL[name](*blocks, height=128, width=2 * tokens, text=32)

        # As policy.py has them: weights that are trained are float32, frozen ones bf16, latents float32, and norms
        # return the type that they are given.
        if lora:
            model.requires_grad_(False)
            model.add_adapter(LoraConfig(r=64, target_modules=lora_layers(model)))
        for weight in model.parameters():
            weight.data = weight.data.float() if weight.requires_grad else weight.data
        for module in model.modules():
            if isinstance(module, (torch.nn.RMSNorm, RMSNorm)):
                module.register_forward_hook(lambda _, inputs, normed: normed.to(inputs[0].dtype))
        inputs = tree_map(lambda x: torch.zeros(x.shape), inputs)
        saved.append(saved_bytes(model.to_empty(device="cpu"), inputs))
        del model, inputs
        gc.collect()  # several GB, which cycles among peft's layers would keep
    per_token = sum(n * (more - less) / 64 for n, less, more in zip(repeats, *saved, strict=True)) / arch.blocks
    assert per_token / arch.width == pytest.approx(arch.saved[lora], rel=0.02)


def planned(text: str, name: str = "flux1-dev"):
    """Options of a plan, of FLUX.1-dev unless another architecture is named."""
    script = train_video if hardware.ARCHITECTURES[name].video else train_image
    return script.job(f"--plan {name} {text}".split())[0]


def test_memory_by_hand():
    """FLUX.1-dev at 720 x 720: 2025 tokens and 512 of text, width 3072, 57 blocks."""
    n, t5, clip, vae = 11_901_408_320, 4_762_310_656, 123_060_480, 83_819_683

    # All weights on eight GPUs with FSDP: an eighth of weights and moments on each, no frozen weights.
    options = "--dtype bf16 --fsdp --ema 0.99 --text-offload --reward jpeg --micro-batch 1 --prompts-per-iteration 8"
    full = hardware.memory(planned(options), 8)
    assert full["weights, trained, fp32"] == 4 * n / 8
    assert full["AdamW's two moments, fp32"] == 8 * n / 8
    assert full["T5-XXL"] == 0 and full["VAE"] == 2 * vae and full["weights, frozen"] == 0
    assert full["activations"] == (2025 + 512) * 3072 * 63 * 57

    # A LoRA with checkpointing, micro-batches of two: the input of every block, 2 bytes, and one block's activations.
    lora = hardware.memory(planned("--dtype bf16 --lora 64 --gradient-checkpointing --micro-batch 2 --reward hpsv2"), 1)
    assert lora["weights, frozen"] == 2 * n and lora["gradients, fp32"] == 4 * 64 * 532 * 3072
    assert lora["activations"] == 2 * 2537 * 3072 * (35 + 2 * 57)
    assert lora["reward models"] == 4 * 986e6

    # While prompts are encoded: the weights, and the encoders with what T5 holds of 32 prompts of 512 tokens.
    held = lora["weights, frozen"] + lora["weights, trained, fp32"] + lora["reward models"] + lora["VAE"]
    encoding = hardware.memory_while_encoding(planned("--dtype bf16 --lora 64"), lora)
    assert encoding == held + 2 * (t5 + clip + 32 * 512 * 58_368)

    # DDP without micro-batches: all 187 trained parents of each of the two prompts of a GPU in one call. Every GPU
    # holds all weights and moments.
    ddp = hardware.memory(planned("--dtype bf16 --micro-batch 0 --prompts-per-iteration 4 --method branchgrpo"), 2)
    assert ddp["activations"] == 2 * 187 * 2537 * 3072 * 63 * 57 and ddp["gradients, DDP's buckets"] == 4 * n
    assert ddp["weights, trained, fp32"] == 4 * n and ddp["AdamW's two moments, fp32"] == 8 * n


def test_sd3_by_hand():
    """SD3.5-medium at 512 x 512: 1024 tokens and 333 of text, width 1536, 24 blocks; two forwards per velocity.

    Its table of positions stays whole on every GPU, and in bf16 where the weights are packed in 4 bits.
    """
    options = "--dtype fp16 --lora 32 --height 512 --width 512 --micro-batch 2 --reward jpeg --guidance"
    parts = hardware.memory(planned(f"{options} 4.5", "sd3.5-medium"), 1)
    assert parts["activations"] == 2 * 2 * (1024 + 333) * 1536 * 58 * 24
    assert parts["weights, frozen"] == 2 * 2_243_171_520 and parts["table of positions"] == 2 * 384 * 384 * 1536
    assert hardware.memory(planned(f"{options} 1", "sd3.5-medium"), 1)["activations"] == parts["activations"] / 2
    packed = hardware.memory(planned(f"{options} 1 --nf4", "sd3.5-medium"), 1)
    assert packed["table of positions"] == parts["table of positions"]
    assert packed["weights, frozen"] == 4.5 / 8 * 2_243_171_520

    # It is there while prompts are encoded, too.
    held = parts["weights, frozen"] + parts["weights, trained, fp32"] + parts["table of positions"] + parts["VAE"]
    encoders = 4_762_310_656 + 694_659_840 + 123_650_304
    encoding = hardware.memory_while_encoding(planned(f"{options} 1", "sd3.5-medium"), parts)
    t5_apart = 2 * 24 * 10_240 * 4_096  # fp16: transformers keeps the last layer of each feed-forward in float32
    assert encoding == held + 2 * (encoders + 32 * 333 * 58_368) + t5_apart
    assert parts["T5-XXL"] == 2 * 4_762_310_656 + t5_apart


def test_offloaded_reward_models_come_one_at_a_time(capsys):
    """While pictures are scored: the largest of them, and what no update needs. --plan asks whether that fits, too."""
    flags = "--dtype bf16 --lora 32 --reward pickscore,vlm-7b --watch clip --reward-dtype bf16 --reward-offload"
    args = planned(f"{flags} --text-offload --micro-batch 1 --height 512 --width 512", "sd3.5-medium")
    parts = hardware.memory(args, 1)
    stay = ["weights, frozen", "weights, trained, fp32", "table of positions", "VAE", "EMA, fp32"]
    stay += ["AdamW's two moments, fp32"]
    assert parts["reward models"] == 0
    assert hardware.memory_while_scoring(args, parts) == sum(parts[name] for name in stay) + 2 * 8.29e9
    args.gpu = "rtx4090"
    lines = hardware.memory_lines(args)
    assert "while pictures are scored" in lines[-2] and "DOES NOT FIT" in lines[-1]


GUIDANCE = [  # --plan, what --guidance becomes, forwards per velocity with it, another scale, forwards with that
    ("flux1-dev", 3.5, 1, 1, 1),
    ("sd3.5-medium", 4.5, 2, 1, 1),
    ("flux2-klein-4b", 1, 1, 1, 1),
    ("z-image", 5, 2, 0, 1),
    ("wan2.1-1.3b", 5, 2, 1, 1),
]


@pytest.mark.parametrize("name, usual, forwards, other, other_forwards", GUIDANCE)
def test_guidance_asks_for_a_second_forward(name, usual, forwards, other, other_forwards):
    """By the convention of the model: Z-Image says 0 for none, and 1 is some; FLUX.1 and FLUX.2-klein never ask."""
    options = planned("", name)
    assert options.guidance == usual and hardware.forwards_per_velocity(options) == forwards
    options = planned(f"--guidance {other}", name)
    assert options.guidance == other and hardware.forwards_per_velocity(options) == other_forwards
    assert hardware.forwards_per_velocity(planned("--guidance 1", "z-image")) == 2


def test_seconds_by_hand():
    """T = 20, splits 0,3,6,9: nodes go in micro-batches of at most 4. A call of b nodes costs 1 + b, trained 10 b."""
    args = planned("--method branchgrpo --leaves 16 --micro-batch 4 --prompts-per-iteration 1")
    sizes = [1, *[2] * 3, *[4] * 3, *[8] * 3, *[16] * 10]  # nodes at the depths 0 to 19
    rollout = sum(n + -(-n // 4) for n in sizes)
    parents = sum(sizes[:-1])  # the last step is deterministic and not trained
    assert hardware.seconds(args, 0, 1, lambda b: 1 + b, lambda b: 10 * b) == rollout + 10 * parents


def test_the_papers_seconds_follow_its_own_counts_but_for_mix():
    unit, errors = hardware.paper_errors()
    assert unit == pytest.approx(8.41, abs=0.01) and len(errors) == 7
    assert sorted(errors, key=lambda n: abs(errors[n]))[-1] == "Mix, window 4"
    assert sum(abs(e) < 0.07 for e in errors.values()) == 6


def test_windows_visit_every_place_once():
    for text, places in (
        ("--mix 4 --mix-every 1", 17),
        ("--method branchgrpo --depth-prune 5 --depth-every 1", 5),
        ("", 1),
    ):
        assert len(hardware.slide(planned(f"--leaves 16 {text}"))) == places


def test_the_report(capsys):
    shared = "--dtype bf16 --lora 64 --micro-batch 1"
    train_image.main(f"--plan flux1-dev --gpu h100 {shared} --gradient-checkpointing".split())
    text = capsys.readouterr().out
    assert "11.90B parameters, 2025 tokens" in text and "37.28 TFLOP per velocity" in text and "fits" in text
    for name in hardware.METHODS:
        assert name.replace("splits alone", "noise at the splits only") in text
    train_video.main(f"--plan wan2.1-1.3b --gpu rtx4090 {shared}".split())
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_the_table_of_models():
    """docs/gpu.md sets the image models side by side, with the figures that their plans print for 720 x 720."""
    table = (HERE / "docs/gpu.md").read_text().split("\n| `--plan` | ")[1].split("\n\n")[0]
    names, parameters, tokens, tflop, forwards, guidance, encoders = (
        [cell.strip(" |`") for cell in row.split(" | ")[i > 0 :]] for i, row in enumerate(table.splitlines())
    )
    assert names == [name for name, arch in hardware.ARCHITECTURES.items() if not arch.video]
    for column, name in enumerate(names):
        arch, options = hardware.ARCHITECTURES[name], planned("--height 720 --width 720", name)
        n, per_velocity = arch.tokens(options), hardware.forwards_per_velocity(options)
        assert parameters[column] == f"{arch.parameters / 1e9:.2f}B" and tokens[column] == f"{n} + {arch.text}"
        assert float(tflop[column]) == round(arch.flops(n, arch.text) * per_velocity / 1e12, 2)
        assert int(forwards[column]) == per_velocity
        assert guidance[column].startswith(f"{options.guidance:g}")
        assert (f"{arch.policy.guidance_of_none:g} is none" in guidance[column]) == (per_velocity == 2)
        assert encoders[column].split(",")[0] == next(iter(arch.frozen))


def run_config(name: str, *argv, **environment) -> subprocess.CompletedProcess:
    """Run a script of configs/ with further flags, the last of which counts."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "NODES": "1", "HEAD": "localhost:29541"} | environment
    env["PATH"] = os.pathsep.join([environment.get("PATH", str(Path(sys.executable).parent)), os.environ["PATH"]])
    command = ["sh", str(HERE / "configs" / name), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=env, timeout=300)


def words_of_config(name: str, stand_ins: Path, *argv, **environment) -> list[str]:
    """What a script of configs/ would start, word by word, without python or torchrun: stand-ins print it instead."""
    for program in ("python", "torchrun"):
        (stand_ins / program).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (stand_ins / program).chmod(0o755)
    done = run_config(name, *argv, PATH=str(stand_ins), **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


CONFIGS = sorted(p.name for p in (HERE / "configs").glob("*.sh"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_needs_the_memory_it_states(name, tmp_path, capsys):
    """Its comment states the memory, the command of the plan and the sum. The plan of what it runs agrees, and fits."""
    text = (HERE / "configs" / name).read_text().replace("\n#   ", " ")  # a comment goes on where it is indented
    stated = re.search(r"# Memory: ([\d.]+) GiB of [\d.]+, by `.*sh configs/(\S+) (--plan [^`]*)`", text)
    words = words_of_config(name, tmp_path, *stated[3].split(), GPUS="1")

    # What it would run is planned here.
    script = "train_video.py" if name.startswith("wan") else "train_image.py"
    {"train_image.py": train_image, "train_video.py": train_video}[script].main(words[words.index(script) + 1 :])
    plan = capsys.readouterr().out.strip()
    total = plan.splitlines()[-1]
    assert stated[2] == name and f"{float(stated[1]):8.2f} GiB: fits" in total, total

    # The sum is that of the larger moment: training, or the encoding before it. Its terms are those of the plan, apart
    # from the encoders, whose own activations the plan adds to them.
    terms = re.search(r"\n# Sum: (.*)\n", text)[1]
    numbers = [float(x) for x in re.findall(r" ([\d.]+)(?:,|$)", terms)]
    assert sum(numbers) == pytest.approx(float(stated[1]), abs=0.005 * len(numbers))
    assert all(f" {x:.2f} GiB" in plan for x in numbers if f"encoders {x:.2f}" not in terms)


TINY = "--iterations 1 --eval-size 2 --leaves 4 --steps 10 --device cpu --micro-batch 0 --no-nf4 --watch auto"
TINY += " --text-cache {0}/text"
IMAGE = " --model tiny/flux --height 32 --width 64 --reward ocr:1 --prompts tiny/prompts_train.txt"
VIDEO = " --model tiny/wan --height 32 --width 32 --frames 9 --reward motion:1 --prompts tiny/video_train.txt"
QUICK = ("wan_lora_24gb.sh",)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
def test_a_config_trains_the_embedded_model(name, tmp_path, capsys, monkeypatch):
    """Each script as it stands, on two processes where it takes several; the embedded model, prompts and reward."""
    flags = (TINY + (VIDEO if name.startswith("wan") else IMAGE)).format(tmp_path).split()
    flags += ["--dtype", "fp32"] * name.startswith("wan")  # bf16 is slow on a CPU, and once is enough
    flags, environment = [*flags, "--out", tmp_path / "run"], {"GPUS": "2", "PROMPTS": "tiny/prompts_train.txt"}
    script, *words = words_of_config(name, tmp_path, *flags, **environment)
    if script.endswith(".py"):  # one process: this one, where the libraries are loaded already
        monkeypatch.chdir(HERE)
        {"train_image.py": train_image, "train_video.py": train_video}[script].main(words)
        printed = capsys.readouterr().out
    else:
        done = run_config(name, *flags, **environment)
        assert done.returncode == 0, done.stderr[-2000:]
        printed = done.stdout
    assert json.loads(printed.splitlines()[-1])["iterations"] == 1


def test_a_day_with_a_gpu(tmp_path, capsys, monkeypatch):
    """The commands of docs/gpu.md in their order, from the plan on, with the embedded model in place of FLUX.1-dev."""
    text = (HERE / "docs/gpu.md").read_text()
    commands = [line.split()[2:] for line in text.splitlines() if line.startswith("sh configs/flux_lora_24gb.sh")]
    assert len(commands) == 5 and commands[-1][-2:] == ["--iterations", "40"]
    small = (TINY + IMAGE).format(tmp_path).replace("--iterations 1 ", "").split()
    monkeypatch.chdir(HERE)

    def run(*argv) -> str:
        """The script's command in this process, where the libraries are loaded already; the last line it printed."""
        script, *words = words_of_config("flux_lora_24gb.sh", tmp_path, *argv)
        assert script == "train_image.py"
        train_image.main(words)
        return capsys.readouterr().out.splitlines()[-1]

    # The plan, as it stands.
    assert "fits" in run(*commands[0])

    # A try, a run of four iterations, the same resumed, and the checkpoint after two of them made the model.
    steps = zip(commands[1:], (1, 4, 4, 2), (["--out", str(tmp_path / "try")], [], [], []))
    for words, iterations, out in steps:
        if iterations == 2:
            shutil.rmtree(tmp_path / "day/checkpoint-4")
        argv = [word.replace("runs/day", str(tmp_path / "day")) for word in words]
        argv += [*out, *small, "--dtype", "fp32", "--save-every", "2", "--keep", "9", "--iterations", iterations]
        assert json.loads(run(*argv))["iterations"] == iterations

    # The snippet that loads the LoRA.
    snippet = re.search(r"```py\n(.*?)```", text, re.S)[1]
    for large, own in (("black-forest-labs/FLUX.1-dev", HERE / "tiny/flux"), ("runs/day", tmp_path / "day")):
        assert large in snippet
        snippet = snippet.replace(large, str(own))
    variables: dict = {}
    exec(snippet, variables)
    assert variables["pipe"].get_active_adapters()


BAD = [
    ("image", "--plan flux", "one of flux1-dev, sd3.5-medium, flux2-klein-4b, z-image, wan2.1-1.3b"),
    ("image", "--plan flux1-dev --gpu h900", "--gpu must be one of"),
    ("image", "--plan wan2.1-1.3b", "train_video.py"),
    ("video", "--plan flux1-dev", "train_image.py"),
    ("image", "--plan flux1-dev --gpus 3", "multiple of --gpus"),
    ("image", "--plan flux1-dev --dtype fp16", "--dtype fp16 is for StableDiffusion3Pipeline"),
    ("image", "--plan flux2-klein-4b --guidance 4", "--guidance must be 1 or left out"),
    ("image", "--plan sd3.5-medium --guidance 0", "--guidance must be at least 1"),
    ("image", "--plan z-image --height 500", "--height must be a positive multiple of 16, got 500"),
    ("video", "--plan wan2.1-1.3b --frames 16", "--frames must be a multiple of 4, plus 1, got 16"),
]


@pytest.mark.parametrize("script, flags, words", BAD)
def test_bad_plans(capsys, script, flags, words):
    with pytest.raises(SystemExit) as stop:
        {"image": train_image, "video": train_video}[script].main(flags.split())
    assert stop.value.code == 2 and words in capsys.readouterr().err
