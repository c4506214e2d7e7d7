"""What a run costs on a GPU, by arithmetic: model evaluations, FLOPs, memory, seconds. No weights, no hub, no GPU.

    python train_image.py --plan flux1-dev --gpu h100 --gpus 8 --fsdp
    python train_image.py --plan sd3.5-medium --gpu a100-80gb --lora 32
    python train_video.py --plan wan2.1-1.3b --gpu rtx4090 --lora 64 --gradient-checkpointing

Idea: an iteration's cost is known before it runs. Its forest says how often the transformer is called, the
transformer's width and depth say what one call takes, and the switches of memory say what must be held meanwhile.

1. ARCHITECTURES, GPUS, METHODS   figures of checkpoints and cards with their source; the rows of the paper's Table 1
2. block_flops, ..._flops         what one forward takes, from the widths and depths of each architecture
3. counted, seconds               forwards and trained parents of an iteration, and what they take
4. memory                         bytes on each GPU, by component
5. report                         a table of the methods, the command's own among them, and the memory of that one

Assumptions. A multiplication and an addition are two FLOPs, so an (m, k) by (k, n) product is 2 m n k. Only matrix
products are counted, as torch's own counter does, with which tests/test_hardware.py compares every architecture; norms
and activation functions add little. Peak rates are the makers', dense bf16 with float32 sums; `--utilisation` is
the fraction of them that a run reaches, 0.4 unless you have measured it. A plan in float32 takes the bf16 rate too: it
says what autocast would take.

What is not in it: decoding and rewards, communication between GPUs, and the fragments that an allocator leaves. For
these a plan counts as fitting only if it takes less than nine tenths of the card.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import flags
from models import (
    VIDEO_MODELS,
    Flux2Policy,
    FluxPolicy,
    SD3Policy,
    WanPolicy,
    ZImagePolicy,
    check_frames,
    check_options,
    check_size,
)
from objectives import rows_per_prompt
from policy import Policy
from rewards import parse_weights
from schedules import kept_edges, schedule_of
from tree import count

GIB = 2**30


# -------------------------------------------------------------------------------------------------------------- figures
@dataclass(frozen=True)
class Architecture:
    """A checkpoint's figures, from its config.json; tests count them again on models without data (torch's meta
    device)."""

    parameters: int  # of the transformer
    tokens: Callable  # of one picture or video, from the options
    text: int  # tokens of text, to which every prompt is padded; of Z-Image the most that a prompt may have
    flops: Callable  # of one forward of one picture or video, from its tokens and those of text
    width: int  # D, the channels of a token inside the transformer
    blocks: int  # of the transformer, that every token passes
    block: int  # parameters of its largest block
    saved: tuple[int, int]  # bytes that autograd keeps per token, channel and block, bf16: all weights trained, a LoRA
    lora: int  # parameters of a LoRA of rank r are lora * r * width
    policy: type[Policy]  # the class of models.py, which knows its guidance and its range of numbers
    frozen: dict[str, int]  # parameters of the parts that are never trained
    encoding: int  # numbers that the widest text encoder holds per token of text, at most
    position_table: int = 0  # numbers of a table that the transformer looks places up in; not trained, split or packed
    distilled: bool = False  # does it need no guidance?

    @property
    def video(self) -> bool:
        """Does train_video.py train it?"""
        return self.policy in VIDEO_MODELS


def block_flops(tokens: int, d: int, hidden: int, matrices: int = 2) -> float:
    """FLOPs of one transformer block of width d, whose `tokens` tokens all attend to one another.

    A linear layer with w weights takes 2 w per token. Attention has 4 d^2 of them (queries, keys, values, output), a
    feed-forward `matrices` times d hidden: in and out, and a third matrix where it has a gate. Attention over n tokens
    takes 4 n^2 d: n^2 products of length d for the scores, and as many again to mix the values.

    Where text and picture have layers of their own, every token still passes one set of them, and the count is the
    same. So it is where one layer computes queries, keys, values and the way into the feed-forward at once.
    """
    weights = 4 * d**2 + matrices * d * hidden
    return 2 * weights * tokens + 4 * tokens**2 * d


def flux_flops(tokens: int, text: int) -> float:
    """FLOPs of one forward of FLUX.1-dev: 19 double and 38 single blocks, over text and picture together.

    Double blocks have layers of their own for the text; single ones compute attention and feed-forward side by side.
    """
    d = 3072
    blocks = 57 * block_flops(tokens + text, d, 4 * d)

    # Once per forward, not per token. Modulation: shifts, scales and gates from the time embedding, 12 d outputs per
    # double block, 3 d per single one, 2 d for the last norm; and three embeddings (time 256, guidance 256, pooled
    # text 768 channels) of two layers each.
    once = 2 * d**2 * (19 * 12 + 38 * 3 + 2 + 3) + 2 * d * (2 * 256 + 768)

    # The way in and out: 64 channels per picture token both times, 4096 per text token.
    return blocks + once + 2 * d * (2 * 64 * tokens + 4096 * text)


def sd3_flops(tokens: int, text: int) -> float:
    """FLOPs of one forward of SD3.5-medium: 24 blocks, each with layers of their own for the text.

    In the first 13 the picture attends to itself once more. After the last nobody reads the text, so that this block
    computes neither its output of attention (d^2) nor its feed-forward (8 d^2).
    """
    d = 1536
    blocks = 24 * block_flops(tokens + text, d, 4 * d) - 2 * 9 * d**2 * text
    blocks += 13 * block_flops(tokens, d, hidden=0)

    # Modulation, once per forward: 6 d outputs per stream and block, 3 d more where there is a second attention, 2 d
    # for the text of the last block and for the last norm; and the embeddings of the time (256 channels) and of the
    # pooled text (2048).
    once = 2 * d**2 * (24 * 6 + 13 * 3 + 23 * 6 + 2 + 2 + 2) + 2 * d * (256 + 2048)

    # The way in and out: 64 channels per picture token both times, 4096 per text token.
    return blocks + once + 2 * d * (2 * 64 * tokens + 4096 * text)


def flux2_flops(tokens: int, text: int) -> float:
    """FLOPs of one forward of FLUX.2-klein-4B: 5 double and 20 single blocks, with gated feed-forwards 3 d wide."""
    d = 3072
    blocks = 25 * block_flops(tokens + text, d, 3 * d, matrices=3)

    # Once per forward. All blocks of a kind share one modulation: 6 d outputs for the picture and 6 d for the text of
    # the double ones, 3 d for the single ones, 2 d for the last norm; and the embedding of the time.
    once = 2 * d**2 * (6 + 6 + 3 + 2 + 1) + 2 * d * 256

    # The way in and out: 128 channels per picture token both times, 7680 per text token, three layers of Qwen3's.
    return blocks + once + 2 * d * (2 * 128 * tokens + 7680 * text)


def z_image_flops(tokens: int, text: int) -> float:
    """FLOPs of one forward of Z-Image: 30 blocks over picture and text together, with gated feed-forwards.

    Before them the picture passes two blocks by itself, and so does the text.
    """
    d, hidden = 3840, 10240
    blocks = 30 * block_flops(tokens + text, d, hidden, matrices=3)
    blocks += 2 * block_flops(tokens, d, hidden, matrices=3) + 2 * block_flops(text, d, hidden, matrices=3)

    # Once per forward: the embedding of the time (256 channels to 1024 to 256), and the modulation that follows from
    # it, 4 d outputs per block that is not the text's, and d for the last norm.
    once = 2 * 2 * 256 * 1024 + 2 * 256 * d * (32 * 4 + 1)

    # The way in: 64 channels per picture token, 2560 per text token. The way out is computed for the text, too.
    return blocks + once + 2 * d * (64 * tokens + 2560 * text + 64 * (tokens + text))


def wan_flops(tokens: int, text: int) -> float:
    """FLOPs of one forward of Wan2.1-T2V-1.3B: 30 blocks of the video, which also attends to the text.

    For that a video token passes 2 d^2 weights more (queries and output), a text token 2 d^2 (keys and values), and
    attention from n video tokens to m text tokens takes 4 n m d.
    """
    d = 1536
    to_text = 2 * 2 * d**2 * (tokens + text) + 4 * tokens * text * d
    blocks = 30 * (block_flops(tokens, d, 8960) + to_text)

    # Patches of 64 numbers in and out, the text's embedding of two layers, and the time's, which ends in 6 d numbers
    # for the modulation.
    outside = 2 * tokens * d * 2 * 64 + 2 * text * (4096 * d + d**2) + 2 * (256 * d + d**2 + 6 * d**2)
    return blocks + outside


def picture_tokens(args) -> int:
    """Tokens of a picture, each of which covers 16 x 16 pixels: the VAE's factor 8 times a patch of 2."""
    return (args.height // 16) * (args.width // 16)


# A LoRA of rank r on a layer from a to b channels has (a + b) r parameters, 2 d r on one from d to d. FLUX.1 has 8 such
# layers in a double block and 3 in a single one, Wan 8. SD3 has 8 per block, but 7 in the last, and 4 in each second
# attention; Z-Image 4 in each of its 34 blocks. A single block of FLUX.2 has two layers, from d to 9 d and from 4 d to
# d.
#
# What an encoder holds at most: T5 and UMT5 five tensors of their feed-forward's width (10240) and some of their own
# (4096), UMT5 also its mask with a bias for every head; Qwen3 the states of all 36 layers (2560), which the pipelines
# ask for, and for Z-Image their keys and values, for FLUX.2 the logits of 151,936 words.
ARCHITECTURES = {
    "flux1-dev": Architecture(
        parameters=11_901_408_320,
        tokens=picture_tokens,
        text=512,
        flops=flux_flops,
        width=3072,
        blocks=57,
        block=339_831_296,
        saved=(63, 35),
        lora=19 * 16 + 38 * 6,
        policy=FluxPolicy,
        frozen={"T5-XXL": 4_762_310_656, "CLIP-L": 123_060_480, "VAE": 83_819_683},
        encoding=58_368,
    ),
    "sd3.5-medium": Architecture(
        parameters=2_243_171_520,
        tokens=picture_tokens,
        text=77 + 256,
        flops=sd3_flops,
        width=1536,
        blocks=24,
        block=101_506_944,
        saved=(94, 58),
        lora=23 * 16 + 14 + 13 * 8,
        policy=SD3Policy,
        frozen={"T5-XXL": 4_762_310_656, "OpenCLIP-bigG": 694_659_840, "CLIP-L": 123_650_304, "VAE": 83_819_683},
        encoding=58_368,
        position_table=384 * 384 * 1536,
    ),
    "flux2-klein-4b": Architecture(
        parameters=3_875_544_576,
        tokens=picture_tokens,
        text=512,
        flops=flux2_flops,
        width=3072,
        blocks=25,
        block=245_367_296,
        saved=(68, 51),
        lora=5 * 16 + 20 * (10 + 5),
        policy=Flux2Policy,
        distilled=True,
        frozen={"Qwen3-4B": 4_022_468_096, "VAE": 84_046_115},
        encoding=262_016,
    ),
    "z-image": Architecture(
        parameters=6_154_908_736,
        tokens=lambda args: -(-picture_tokens(args) // 32) * 32,  # padded to a multiple of 32
        text=512,
        flops=z_image_flops,
        width=3840,
        blocks=2 + 30,
        block=180_910_336,
        saved=(108, 69),
        lora=34 * 8,
        policy=ZImagePolicy,
        frozen={"Qwen3-4B": 4_022_468_096, "VAE": 83_819_683},
        encoding=200_457,
    ),
    "wan2.1-1.3b": Architecture(
        parameters=1_418_996_800,
        tokens=lambda args: ((args.frames - 1) // 4 + 1) * picture_tokens(args),
        text=512,
        flops=wan_flops,
        width=1536,
        blocks=30,
        block=46_440_704,
        saved=(92, 57),
        lora=30 * 16,
        policy=WanPolicy,
        frozen={"UMT5-XXL": 5_680_910_336, "VAE": 126_892_531},
        encoding=91_392,
    ),
}
GPUS = {  # dense bf16 FLOP/s and bytes of memory, from NVIDIA's data sheets; a driver may show up to 7 % more
    "h100": (989e12, 80e9),
    "h200": (989e12, 141e9),
    "a100-80gb": (312e12, 80e9),
    "l40s": (362e12, 48e9),
    "rtx4090": (165e12, 24e9),
    "rtx3090": (71e12, 24e9),
}
# Name -> flags, the paper's NFE old and new, its seconds (FLUX.1-dev, 16 GPUs); None where it gives none. The names
# are keys of bench/results/*.json, so they stay as they were when those were measured; "splits alone" means: noise at
# the splits only.
METHODS = {
    "sequential DanceGRPO": ("--method flowgrpo --sde dance", (20, 20), 698),
    "DanceGRPO, shared noise": ("--method dancegrpo", (20, 20), None),
    "DanceGRPO, fraction 0.6": ("--method dancegrpo --timestep-fraction 0.6", (20, 12), 469),
    "Flow-GRPO": ("--method flowgrpo", None, None),
    "MixGRPO, window 5": ("--method mixgrpo --mix 5 --mix-every 1", (20, 5), 289),
    "BranchGRPO": ("--method branchgrpo", (13.68, 13.68), 493),
    "+ width (Parent-Top1)": ("--method branchgrpo --width-prune parent-top1", (13.68, 8.625), 314),
    "+ width (Extreme-4)": ("--method branchgrpo --width-prune extreme-4", (13.68, 8.625), None),
    "+ depth, window 5": ("--method branchgrpo --depth-prune 5 --depth-every 1", (13.68, 8.625), 314),
    "Mix, window 4": ("--method branchgrpo-mix --mix 4 --mix-every 1", (13.68, 4.25), 148),
    "Mix, splits alone": ("--method branchgrpo-mix --mix 0", None, None),
    "Mix, splits alone, flash 4": ("--method branchgrpo-mix --mix 0 --flash 4", None, None),
}
T5_FLOAT32 = 24 * 10_240 * 4_096  # parameters of T5-XXL that transformers keeps in float32 where the rest is fp16
CLIPS = {"hpsv2": 986e6, "pickscore": 986e6, "clip": 428e6, "aesthetic": 428e6}
REWARDS = CLIPS | {"imagereward": 447e6, "videoalign": 2.3e9, "vlm": 3.75e9, "vlm-7b": 8.29e9}  # parameters


# ------------------------------------------------------------------------------------------------------ counts, seconds
def counted(args, iteration: int) -> dict[str, float]:
    """One prompt's counts of one iteration, from the schedule alone; see `tree.count`.

    trained_parents are the rows that --objective trains.
    """
    schedule = schedule_of(args, iteration)
    forest = schedule.forest

    # Which edges are kept depends on the rewards, but how many does not, so any rewards and advantages will do.
    rewards, advantages = torch.zeros(1, forest.leaves), [torch.zeros(1, n) for n in forest.sizes[1:]]
    keep = kept_edges(args, schedule, rewards, advantages)
    return count(forest, keep) | {"trained_parents": rows_per_prompt(args, forest, keep)}


def slide(args) -> range:
    """The iterations over which counts are averaged: those in which a sliding window visits each of its places once.

    The window must move every iteration (--mix-every 1, --depth-every 1). Without a window one iteration is enough.
    Where --timestep-fraction draws the trained steps at random: eight draws.
    """
    if args.timestep_fraction < 1:
        return range(8)
    places = []
    for i in range(args.steps):
        schedule = schedule_of(args, i)
        if (schedule.forest, schedule.depth_window) in places:
            break
        places.append((schedule.forest, schedule.depth_window))
    return range(len(places))


def micro_batch_sizes(total: int, most: int) -> list[int]:
    """Sizes of the micro-batches of `total` nodes, at most `most` each (0: no limit): 10 nodes by 4 are 4, 4 and 2."""
    full, rest = divmod(total, most or max(total, 1))
    return [most or total] * full + [rest] * (rest > 0)


def seconds(args, iteration: int, prompts: int, forward: Callable, trained: Callable) -> float:
    """Rollout and training of one iteration on one GPU.

    Args:
        prompts: of this GPU.
        forward: seconds of a call without gradient, from its batch size.
        trained: seconds of a call with its backward, from its batch size.
    """
    # Rollout: one call per depth, for all nodes that have children (the leaves have none), cut into micro-batches.
    sizes = schedule_of(args, iteration).forest.sizes
    rollout = sum(forward(b) for n in sizes[:-1] for b in micro_batch_sizes(n * prompts, args.micro_batch))

    # Training: siblings share a forward, so a call's rows are parents, which --updates divides among its optimiser
    # steps.
    parents = counted(args, iteration)["trained_parents"] * prompts // args.updates
    return rollout + args.updates * sum(trained(b) for b in micro_batch_sizes(parents, args.micro_batch))


def paper_errors() -> tuple[float, dict[str, float]]:
    """How well the paper's seconds follow from its own counts: seconds = a (NFE old + 3 NFE new), a by least squares.

    Three, because a trained evaluation is a forward and a backward, and a backward takes two forwards.

    Returns:
        a in seconds, and the relative error of each row.
    """
    rows = {
        name: (nfe[0] + 3 * nfe[1], paper_seconds) for name, (_, nfe, paper_seconds) in METHODS.items() if paper_seconds
    }
    a = sum(cost * s for cost, s in rows.values()) / sum(cost * cost for cost, _ in rows.values())
    return a, {name: a * cost / s - 1 for name, (cost, s) in rows.items()}


# --------------------------------------------------------------------------------------------------------------- memory
def forwards_per_velocity(args) -> int:
    """Two with classifier-free guidance, one with the prompt and one without it; else one.

    FLUX.1-dev takes the scale as an input, and FLUX.2-klein was distilled from a guided model: neither needs a second.
    """
    arch = ARCHITECTURES[args.plan]
    needs_none = arch.distilled or not arch.policy.classifier_free
    return 1 if needs_none or args.guidance == arch.policy.guidance_of_none else 2


def activations(args, gpus: int) -> float:
    """Bytes that the largest call with gradient keeps for its backward."""
    arch = ARCHITECTURES[args.plan]

    # Rows of that call: a micro-batch of parents, or all parents of an update where there are fewer.
    parents = counted(args, 0)["trained_parents"] * (args.prompts_per_iteration // gpus) // args.updates
    rows = min(args.micro_batch or parents, parents) * forwards_per_velocity(args)
    channels = rows * (arch.tokens(args) + arch.text) * arch.width  # numbers in one tensor of the width of the model

    # `saved` was counted in bf16, so float32 takes twice that. Layers packed in 4 bits return what they are given, and
    # latents are float32.
    bytes_each = 4 if args.nf4 or args.dtype == "fp32" else 2
    one_block = channels * arch.saved[args.lora > 0] * bytes_each / 2

    # With checkpointing the input of every block is kept, and one block at a time is computed anew.
    if args.gradient_checkpointing:
        return channels * bytes_each * arch.blocks + one_block
    return one_block * arch.blocks


def frozen_part(args, name: str) -> float:
    """Bytes of a text encoder or VAE. Wan's VAE stays in float32, and so does a part of T5 where the rest is fp16."""
    arch = ARCHITECTURES[args.plan]
    in_float32 = args.dtype == "fp32" or (name == "VAE" and arch.video)
    apart = 2 * T5_FLOAT32 if (name, args.dtype) == ("T5-XXL", "fp16") else 0
    return (4 if in_float32 else 2) * arch.frozen[name] + apart


def reward_models(args) -> dict[str, float]:
    """Reward model -> its bytes. videoalign-vq and -mq are one model. The automatic watch takes none of them."""
    watched = {} if args.watch == "auto" else parse_weights(args.watch, "--watch")
    names = parse_weights(args.reward, "--reward") | watched
    models = {name if name in REWARDS else name.partition("-")[0] for name in names}
    return {name: (2 if args.reward_dtype == "bf16" else 4) * REWARDS[name] for name in models & REWARDS.keys()}


def memory(args, gpus: int) -> dict[str, float]:
    """Bytes on each GPU, by component; `activations` are those of the largest call with gradient."""
    arch = ARCHITECTURES[args.plan]
    bytes_each = 4 if args.dtype == "fp32" else 2  # of a weight that computes
    pieces = gpus if args.fsdp else 1  # FSDP splits weights, gradients and moments; DDP copies them
    trained = args.lora * arch.lora * arch.width if args.lora else arch.parameters

    # What lies on the GPU all the time. NF4 takes 4 bits per weight, and a float32 scale per 64 weights: 4.5.
    frozen_bytes = 4.5 / 8 if args.nf4 else bytes_each
    components = {
        "weights, frozen": frozen_bytes * arch.parameters / pieces if args.lora else 0,
        "weights, trained, fp32": 4 * trained / pieces,
        "reference weights": bytes_each * arch.parameters / pieces if args.kl and not args.lora else 0,
        "table of positions": bytes_each * arch.position_table,
        "reward models": 0 if args.reward_offload else sum(reward_models(args).values()),
    }
    for name in arch.frozen:
        components[name] = 0 if args.text_offload and name != "VAE" else frozen_part(args, name)

    # What comes with the first update:
    #
    #     autocast casts each float32 weight to 16 bits once per step and keeps the copy; FSDP gathers it so instead
    #     FSDP holds the weights of the block that runs and of the next, the gradients of one, and their float32 sums
    #     DDP copies gradients into buckets, which it sends
    #     AdamW keeps two moments per weight, 8 bytes; its step is one kernel on CUDA, which needs nothing more
    components |= {
        "weights cast to bf16 for a step": bytes_each * trained if bytes_each == 2 and not args.fsdp else 0,
        "two blocks gathered, one reduced": (2 * bytes_each + bytes_each + 4) * arch.block if args.fsdp else 0,
        "gradients, fp32": 4 * trained / pieces,
        "gradients, DDP's buckets": 4 * trained if gpus > 1 and not args.fsdp else 0,
        "AdamW's two moments, fp32": 8 * trained / pieces,
        "EMA, fp32": 4 * trained / pieces if args.ema else 0,
        "activations": activations(args, gpus),
    }
    return components


def memory_while_encoding(args, components: dict[str, float]) -> float:
    """Bytes while --text-offload's encoders are on the GPU: they, and all that does not come with the first update.

    Args:
        components: from `memory`.
    """
    arch = ARCHITECTURES[args.plan]
    early = ("weights, frozen", "weights, trained, fp32", "reference weights", "table of positions", "reward models")
    held = sum(components[name] for name in (*early, "VAE"))

    # The encoders' parameters, and what they make of 32 prompts at a time (policy.py).
    encoders = sum(frozen_part(args, name) for name in arch.frozen if name != "VAE")
    return held + encoders + (4 if args.dtype == "fp32" else 2) * 32 * arch.text * arch.encoding


def memory_while_scoring(args, components: dict[str, float]) -> float:
    """Bytes while --reward-offload's models are on the GPU, one at a time: the largest, and what stays between updates.

    Args:
        components: from `memory`.
    """
    of_updates = (
        "weights cast to bf16 for a step",
        "two blocks gathered, one reduced",
        "gradients, fp32",
        "activations",
    )
    held = sum(n for name, n in components.items() if name not in of_updates)
    return held + max(reward_models(args).values(), default=0)


# --------------------------------------------------------------------------------------------------------------- report
def parse(parser, argv: list[str] | None):
    """Parsed flags; with --plan it is checked that the script and the checkpoint go together.

    Raises:
        ValueError: if --plan or --gpu is unknown, or the other script plans this checkpoint.
    """
    args = parser.parse_args(argv)
    if args.plan is None:
        return args
    for flag, value, table in (("--plan", args.plan, ARCHITECTURES), ("--gpu", args.gpu, GPUS)):
        if value not in table:
            raise ValueError(f"{flag} must be one of {', '.join(table)}, got {value!r}")
    video = ARCHITECTURES[args.plan].video
    if hasattr(args, "frames") != video:
        raise ValueError(f"--plan {args.plan} goes with train_{'video' if video else 'image'}.py")
    return args


def planned_values(args) -> dict[str, tuple[float, str]]:
    """What --guidance becomes where a plan's command does not give it: name -> value, and where it comes from.

    It stands in for `models.checkpoint_values`, which would read the checkpoint, and refuses what that refuses.
    """
    arch = ARCHITECTURES[args.plan]
    check_options(arch.policy, args, arch.distilled)
    check_size(args.height, args.width, 16)
    if arch.video:
        check_frames(args.frames, 4)
    usual = arch.policy.guidance_of_none if arch.distilled else arch.policy.usual_guidance
    return {"guidance": (usual, f"usual for {args.plan}")}


def variant(args, text: str):
    """The options of another method at the same steps, leaves, branching, prompts and micro-batch.

    Args:
        args: the command's own options.
        text: the flags of the method.

    Returns:
        Resolved options, or None where the method has no such tree.
    """
    shape = f" --steps {args.steps} --leaves {args.leaves} --prompts-per-iteration {args.prompts_per_iteration}"
    shape += f" --branch {args.branch} --roots {args.roots}" * ("branchgrpo" in text)
    other = flags.parser("").parse_args(f"{text}{shape} --micro-batch {args.micro_batch}".split())
    try:
        flags.resolve(other)
    except ValueError:
        return None
    return other


def method_rows(args, forward: Callable, trained: Callable) -> dict[str, tuple]:
    """Every method that has a tree of the command's size, and the command itself.

    Args:
        forward, trained: see `seconds`.

    Returns:
        Name -> edges, forwards and trained parents per picture, seconds per iteration, and the paper's seconds or None.
    """
    planned = {name: (variant(args, text), paper) for name, (text, _, paper) in METHODS.items()}
    planned = {name: row for name, row in planned.items() if row[0]} | {"this command": (args, None)}

    # Costs vary while a window slides. Of a method each place of its window counts once, of the command about fifty
    # iterations of its whole run.
    rows = {}
    for name, (options, paper) in planned.items():
        own = range(0, max(1, args.iterations), max(1, args.iterations // 50))
        iterations = own if options is args else slide(options)
        counts = [counted(options, i) for i in iterations]
        prompts = args.prompts_per_iteration // args.gpus
        time = [seconds(options, i, prompts, forward, trained) for i in iterations]
        keys = ("edges", "forwards", "trained_parents")
        per_picture = [np.mean([c[key] for c in counts]) / options.leaves for key in keys]
        rows[name] = (*per_picture, float(np.mean(time)), paper)
    return rows


def call_seconds(args) -> tuple[float, int]:
    """What calls of one node cost: seconds of a forward, and how many forwards one with its backward takes."""
    # One velocity of one node: its FLOPs over the rate that is reached.
    arch, (rate, _) = ARCHITECTURES[args.plan], GPUS[args.gpu]
    forward = arch.flops(arch.tokens(args), arch.text) * forwards_per_velocity(args) / (rate * args.utilisation)

    # With backward, in forwards: 1, and 1 for the gradients of the activations, and 1 for those of the weights, of
    # which a LoRA has hardly any. Checkpointing repeats the forward, and the KL term asks the reference model too.
    return forward, (2 if args.lora else 3) + args.gradient_checkpointing + (args.kl > 0)


def report(args) -> str:
    """What the command would cost, beside the methods of the paper's Table 1.

    Raises:
        ValueError: if the prompts cannot be divided evenly among the GPUs.
    """
    if args.prompts_per_iteration % args.gpus:
        raise ValueError(f"--prompts-per-iteration must be a multiple of --gpus = {args.gpus}")

    arch, (rate, _) = ARCHITECTURES[args.plan], GPUS[args.gpu]
    tokens, prompts = arch.tokens(args), args.prompts_per_iteration // args.gpus
    forwards = forwards_per_velocity(args)
    tflop = arch.flops(tokens, arch.text) * forwards / 1e12
    seconds_per_forward, factor = call_seconds(args)
    rows = method_rows(args, lambda b: seconds_per_forward * b, lambda b: factor * seconds_per_forward * b)
    lines = [
        f"{args.plan}: {arch.parameters / 1e9:.2f}B parameters, {tokens} tokens + {arch.text} of text,"
        f" {tflop:.2f} TFLOP per velocity{', two forwards, with and without the prompt' * (forwards == 2)}",
        f"{args.gpus} x {args.gpu}: {rate / 1e12:.0f} TFLOP/s, of which a fraction of {args.utilisation:g} is reached:"
        f" {seconds_per_forward:.3f} seconds per forward, {factor} times that with its backward",
        f"{args.prompts_per_iteration} prompts x {args.leaves} leaves per iteration; prompts per GPU: {prompts}",
        "",
    ]
    return "\n".join([*lines, *method_lines(rows), "", *memory_lines(args)])


def method_lines(rows: dict[str, tuple]) -> list[str]:
    """The table of `method_rows`, and how well the paper's seconds follow from its counts."""
    lines = [
        f"{'':<40}{'-- per picture --':>27}{'-- this plan --':>18}{'-- paper --':>18}",
        f"{'method':<40}{'edges':>8}{'forwards':>10}{'trained':>9}" + 2 * f"{'seconds':>10}{'ratio':>8}",
    ]
    base, (_, _, paper_base) = rows["sequential DanceGRPO"][3], METHODS["sequential DanceGRPO"]
    for name, (edges, forwards, parents, time, paper) in rows.items():
        label = name.replace("splits alone", "noise at the splits only")
        theirs = f"{paper:10d}{paper / paper_base:8.3f}" if paper else ""
        lines.append(f"{label:<40}{edges:8.2f}{forwards:10.2f}{parents:9.2f}{time:10.1f}{time / base:8.3f}{theirs}")

    # Where the paper's figures contradict one another, the reader should not look for the error here.
    a, errors = paper_errors()
    percent = ", ".join(f"{100 * e:+.0f} %" for e in errors.values())
    published_mix = a * (13.68 + 3 * 2.125)
    return [
        *lines,
        "trained: parents, each a forward with its backward. seconds: rollout and training per iteration. ratio: to the"
        " first row.",
        f"The paper's seconds are {a:.2f} (NFE old + 3 NFE new) with these errors, row by row: {percent}.",
        "The row that departs is Mix: the published script trains 2.125 edges per picture, not 4.25, which makes"
        f" {published_mix:.0f} seconds.",
    ]


def memory_lines(args) -> list[str]:
    """The memory of the command, by component, and whether it fits."""
    _, size = GPUS[args.gpu]
    components = memory(args, args.gpus)
    lines = [f"{name:<44}{n / GIB:8.2f} GiB" for name, n in components.items() if n]
    total = sum(components.values())

    # Encoding comes before training: the larger of the two counts.
    if args.text_offload:
        encoding = memory_while_encoding(args, components)
        lines.append(f"{'(while prompts are encoded, before training':<44}{encoding / GIB:8.2f} GiB)")
        total = max(total, encoding)

    # So it is with offloaded reward models, which come when nothing is trained.
    if args.reward_offload:
        scoring = memory_while_scoring(args, components)
        lines.append(f"{'(while pictures are scored, by the largest model':<44}{scoring / GIB:8.2f} GiB)")
        total = max(total, scoring)
    verdict = "fits" if total < 0.9 * size else "DOES NOT FIT"
    return [*lines, f"{f'at most, of {size / GIB:.1f} GiB':<44}{total / GIB:8.2f} GiB: {verdict}"]
