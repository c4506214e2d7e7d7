"""What a run costs on a GPU, by arithmetic: model evaluations, FLOPs, memory, seconds. No weights, no hub, no GPU.

    python train_image.py --plan flux1-dev --gpu h100 --gpus 8 --fsdp
    python train_video.py --plan wan2.1-1.3b --gpu rtx4090 --lora 64 --gradient-checkpointing

1. ARCHITECTURES, GPUS, METHODS   figures of checkpoints and cards with their source; the methods and rows of the paper's Table 1
2. counted, seconds               forwards and trained parents of an iteration, and what they take
3. memory                         bytes on each GPU, by component
4. report                         a table of the methods, the command's own among them, and the memory of that one

A plan in float32 takes the bf16 rate too: it says what autocast would take. What is not in it: decoding and rewards, communication, the allocator's fragments. Peak rates are the makers', dense bf16 with
fp32 sums; `--utilisation` is the share of them that a run reaches, 40 % unless you have measured it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import flags
from branchgrpo import prune
from rewards import parse_weights
from schedules import schedule_of
from tree import count

GIB = 2**30


@dataclass(frozen=True)
class Architecture:
    """A checkpoint's figures, from its config.json; tests count them again on meta tensors.

    parameters: of the transformer. tokens: of the options. flops: of one forward, from tokens. width, blocks: of the transformer.
    block: parameters of its largest block. saved: bytes that autograd keeps under bf16 autocast for each token, channel and
    block, where all weights are trained and with a LoRA. lora: parameters for each rank, over the width. frozen: parameters of
    the parts that are not trained. shape: what the paper used.
    """

    parameters: int
    tokens: Callable
    flops: Callable
    width: int
    blocks: int
    block: int
    saved: tuple[int, int]
    lora: int
    frozen: dict[str, int]
    shape: dict[str, float]


def flux_flops(tokens: int, text: int = 512) -> float:
    """One forward of FLUX.1-dev: 19 double and 38 single blocks of width D, 12 D^2 weights a token in each."""
    d, both = 3072, tokens + text
    blocks = 57 * (2 * 12 * d**2 * both + 4 * both**2 * d)  # linear layers, attention
    once = 2 * d**2 * (19 * 12 + 38 * 3 + 2 + 3) + 2 * d * (2 * 256 + 768)  # modulation, time, guidance, text
    return blocks + once + 2 * d * (2 * 64 * tokens + 4096 * text)


def wan_flops(tokens: int, text: int = 512) -> float:
    """One forward of Wan2.1-T2V-1.3B: 30 blocks of width D, feed-forward F, attention to itself and to the text."""
    d, f = 1536, 8960
    linear = 2 * tokens * (6 * d**2 + 2 * d * f) + 2 * text * 2 * d**2
    attention = 4 * tokens * d * (tokens + text)
    outside = 2 * tokens * d * 2 * 64 + 2 * text * (4096 * d + d**2) + 2 * (256 * d + d**2 + 6 * d**2)
    return 30 * (linear + attention) + outside


ARCHITECTURES = {
    "flux1-dev": Architecture(
        parameters=11_901_408_320,
        tokens=lambda args: (args.height // 16) * (args.width // 16),
        flops=flux_flops,
        width=3072,
        blocks=57,
        block=339_831_296,
        saved=(63, 35),
        lora=19 * 16 + 38 * 6,
        frozen={"T5-XXL": 4_762_310_656, "CLIP-L": 123_060_480, "VAE": 83_819_683},
        shape={"height": 720, "width": 720, "steps": 20},
    ),
    "wan2.1-1.3b": Architecture(
        parameters=1_418_996_800,
        tokens=lambda args: ((args.frames - 1) // 4 + 1) * (args.height // 16) * (args.width // 16),
        flops=wan_flops,
        width=1536,
        blocks=30,
        block=46_440_704,
        saved=(92, 57),
        lora=30 * 16,
        frozen={"UMT5-XXL": 5_680_910_336, "VAE": 126_892_531},
        shape={"height": 480, "width": 832, "frames": 33, "steps": 20, "guidance": 5.0},
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
METHODS = {  # name -> flags, the paper's NFE old and new, its seconds (FLUX.1-dev, 16 GPUs; None where it gives none)
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
CLIPS = {"hpsv2": 986e6, "pickscore": 986e6, "clip": 428e6, "aesthetic": 428e6}
REWARDS = CLIPS | {"imagereward": 447e6, "videoalign": 2.3e9}  # parameters


# ------------------------------------------------------------------------------------------------------- counts, seconds
def counted(args, iteration: int) -> dict[str, float]:
    """Closed form: one prompt's counts of one iteration; see `tree.count`."""
    schedule = schedule_of(args, iteration)
    rewards = torch.zeros(1, schedule.forest.leaves)  # they choose edges, not how many
    return count(
        schedule.forest, prune(schedule.forest, rewards, args.width_prune, schedule.depth, schedule.trained_steps)
    )


def slide(args) -> range:
    """The iterations in which a window that moves every iteration visits each of its places once; one without a window.

    Where --timestep-fraction draws the trained steps: eight draws.
    """
    if args.timestep_fraction < 1:
        return range(8)
    places = []
    for i in range(args.steps):
        schedule = schedule_of(args, i)
        if (schedule.forest, schedule.depth) in places:
            break
        places.append((schedule.forest, schedule.depth))
    return range(len(places))


def micro_batch_sizes(total: int, most: int) -> list[int]:
    """Sizes of the micro-batches of `total` nodes."""
    full, rest = divmod(total, most or max(total, 1))
    return [most or total] * full + [rest] * (rest > 0)


def seconds(args, iteration: int, prompts: int, forward: Callable, trained: Callable) -> float:
    """Rollout and training of one iteration on one GPU.

    Args:
        prompts: of this GPU.
        forward, trained: seconds of a call without, and with gradient and backward, from its batch size.
    """
    sizes = schedule_of(args, iteration).forest.sizes
    rollout = sum(forward(b) for n in sizes[:-1] for b in micro_batch_sizes(n * prompts, args.micro_batch))
    parents = counted(args, iteration)["trained_parents"] * prompts // args.updates
    return rollout + args.updates * sum(trained(b) for b in micro_batch_sizes(parents, args.micro_batch))


def paper_errors() -> tuple[float, dict[str, float]]:
    """The paper's seconds as a (NFE old + 3 NFE new): a in seconds by least squares, and relative errors."""
    rows = {name: (nfe[0] + 3 * nfe[1], s) for name, (_, nfe, s) in METHODS.items() if s}
    a = sum(n * s for n, s in rows.values()) / sum(n * n for n, _ in rows.values())
    return a, {name: a * n / s - 1 for name, (n, s) in rows.items()}


# ---------------------------------------------------------------------------------------------------------------- memory
def guided(args) -> int:
    """Forwards a velocity takes: two with classifier-free guidance, which FLUX.1-dev has distilled into one."""
    return 2 if args.plan.startswith("wan") and args.guidance != 1 else 1


def memory(args, gpus: int) -> dict[str, float]:
    """Bytes on each GPU, by component; `activations` are those of the largest call with gradient."""
    arch, half = ARCHITECTURES[args.plan], 2 if args.dtype == "bf16" else 4
    share = gpus if args.fsdp else 1
    trained = args.lora * arch.lora * arch.width if args.lora else arch.parameters
    named = parse_weights(args.reward) | ({} if args.watch == "auto" else parse_weights(args.watch))
    of_rewards = sum(REWARDS.get(name, 0) for name in {name.partition("-")[0] for name in named})
    parents = counted(args, 0)["trained_parents"] * (args.prompts_per_iteration // gpus) // args.updates
    batch = min(args.micro_batch or parents, parents) * guided(args)
    nodes = batch * (arch.tokens(args) + 512) * arch.width
    stream = 4 if args.nf4 else half  # 4-bit layers return what they are given, float32 latents
    a_block, kept = nodes * arch.saved[args.lora > 0] * stream / 2, nodes * stream * arch.blocks
    found = {
        "weights, frozen": (4.5 / 8 if args.nf4 else half) * arch.parameters / share if args.lora else 0,
        "weights, trained, fp32": 4 * trained / share,
        "reference weights": half * arch.parameters / share if args.kl and not args.lora else 0,
        "reward models": 0 if args.reward_offload else (2 if args.reward_dtype == "bf16" else 4) * of_rewards,
    }
    for name, n in arch.frozen.items():
        each = 4 if name == "VAE" and "frames" in arch.shape else half  # Wan's VAE stays in float32
        found[name] = 0 if args.text_offload and name != "VAE" else each * n
    found |= {
        "weights cast to bf16 for a step": half * trained if half == 2 and not args.fsdp else 0,
        "two blocks gathered, one reduced": (2 * half + half + 4) * arch.block if args.fsdp else 0,
        "gradients, fp32": 4 * trained / share,
        "gradients, DDP's buckets": 4 * trained if gpus > 1 and not args.fsdp else 0,
        "AdamW's two moments and a temporary, fp32": 12 * trained / share,
        "EMA, fp32": 4 * trained / share if args.ema else 0,
        "activations": kept + a_block if args.gradient_checkpointing else a_block * arch.blocks,
    }
    return found


def memory_while_encoding(args, found: dict[str, float]) -> float:
    """Bytes while --text-offload's encoders are on the GPU: they, and all that does not come with the first update."""
    early = ("weights, frozen", "weights, trained, fp32", "reference weights", "reward models", "VAE")
    encoders = sum(n for name, n in ARCHITECTURES[args.plan].frozen.items() if name != "VAE")
    encoders += 32 * 512 * (3 * 10240 + 4 * 4096)  # what T5's widest layer makes of 32 prompts
    return sum(found[name] for name in early) + (2 if args.dtype == "bf16" else 4) * encoders


# ---------------------------------------------------------------------------------------------------------------- report
def parse(parser, argv: list[str] | None):
    """Parsed flags; with --plan, what they leave open of the shape is the paper's.

    Raises:
        ValueError: if --plan or --gpu is unknown, or the other script plans this checkpoint.
    """
    args = parser.parse_args(argv)
    if args.plan is None:
        return args
    for flag, value, table in (("--plan", args.plan, ARCHITECTURES), ("--gpu", args.gpu, GPUS)):
        if value not in table:
            raise ValueError(f"{flag} must be one of {', '.join(table)}, got {value!r}")
    shape = ARCHITECTURES[args.plan].shape
    if hasattr(args, "frames") != ("frames" in shape):
        raise ValueError(f"--plan {args.plan} goes with train_{'video' if 'frames' in shape else 'image'}.py")
    parser.set_defaults(**shape)
    return parser.parse_args(argv)


def variant(args, text: str):
    """The options of another method at the same steps, leaves, branching, prompts and micro-batch; None where it has no such tree."""
    shape = f" --steps {args.steps} --leaves {args.leaves} --prompts-per-iteration {args.prompts_per_iteration}"
    shape += f" --branch {args.branch} --roots {args.roots}" * ("branchgrpo" in text)
    other = flags.parser("", "", 1, 1, "jpeg").parse_args(f"{text}{shape} --micro-batch {args.micro_batch}".split())
    try:
        flags.resolve(other)
    except ValueError:
        return None
    return other


def report(args) -> str:
    """What the command would cost, beside the methods of the paper's Table 1.

    Raises:
        ValueError: if the GPUs do not share the prompts evenly.
    """
    if args.prompts_per_iteration % args.gpus:
        raise ValueError(f"--prompts-per-iteration must be a multiple of --gpus = {args.gpus}")
    arch, (rate, size) = ARCHITECTURES[args.plan], GPUS[args.gpu]
    share, tokens = args.prompts_per_iteration // args.gpus, arch.tokens(args)
    tflop = arch.flops(tokens) * guided(args) / 1e12
    a_call = tflop * 1e12 / (rate * args.utilisation)
    again = (
        (2 if args.lora else 3) + args.gradient_checkpointing + (args.kl > 0)
    )  # with a LoRA hardly any weight gradients
    (a, errors), rows = paper_errors(), {}
    variants = {name: (variant(args, f), s) for name, (f, _, s) in METHODS.items()}
    variants = {name: row for name, row in variants.items() if row[0]} | {"this command": (args, None)}
    for name, (options, theirs) in variants.items():
        iterations = (
            range(0, max(1, args.iterations), max(1, args.iterations // 50)) if options is args else slide(options)
        )
        counts = [counted(options, i) for i in iterations]
        each = [seconds(options, i, share, lambda b: a_call * b, lambda b: again * a_call * b) for i in iterations]
        n = [np.mean([c[k] for c in counts]) / options.leaves for k in ("edges", "forwards", "trained_parents")]
        rows[name] = (*n, float(np.mean(each)), theirs)
    base = rows["sequential DanceGRPO"][3]
    lines = [
        f"{args.plan}: {arch.parameters / 1e9:.2f}B parameters, {tokens} tokens + 512 of text, {tflop:.2f} TFLOP a forward",
        f"{args.gpus} x {args.gpu}: {rate / 1e12:.0f} TFLOP/s x {args.utilisation:g} = {a_call:.3f} s a forward; with backward as much as {again}",
        f"{args.prompts_per_iteration} prompts x {args.leaves} leaves an iteration, {share} prompts a GPU",
        "",
        f"{'a picture':<28}{'edges':>8}{'forwards':>10}{'trained':>9}{'s/iter':>10}{'ratio':>8}{'paper s':>9}{'ratio':>8}",
    ]
    for name, (edges, forwards, parents, time, theirs) in rows.items():
        paper = f"{theirs:9d}{theirs / 698:8.3f}" if theirs else ""
        lines.append(f"{name:<28}{edges:8.2f}{forwards:10.2f}{parents:9.2f}{time:10.1f}{time / base:8.3f}{paper}")
    lines += [
        f"paper's seconds = {a:.2f} (NFE old + 3 NFE new): " + ", ".join(f"{100 * e:+.0f} %" for e in errors.values()),
        f"Mix is the row that differs: the published script trains 2.125 edges a picture, not 4.25, which makes {a * (13.68 + 3 * 2.125):.0f} s.",
        "",
    ]
    found = memory(args, args.gpus)
    lines += [f"{name:<44}{n / GIB:8.2f} GiB" for name, n in found.items() if n]
    total = sum(found.values())
    if args.text_offload:
        encoding = memory_while_encoding(args, found)
        lines.append(f"{'(while prompts are encoded, before training':<44}{encoding / GIB:8.2f} GiB)")
        total = max(total, encoding)
    verdict = "fits" if total < 0.9 * size else "DOES NOT FIT"
    lines.append(f"{f'at most, of {size / GIB:.1f}':<44}{total / GIB:8.2f} GiB: {verdict}")
    return "\n".join(lines)
