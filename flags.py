"""The command line that images and video share: flags with unit and origin, and what they resolve to.

A default is the value tuned for the embedded model (LAB.md has the runs), or the paper's where it says so; settings for
FLUX.1-dev are in configs/. What a flag leaves open is decided here, once, and printed: the splits, the noise strength, the
widths of windows. Only an explicit contradiction is an error.
"""

import argparse
import math
from importlib.util import find_spec
from pathlib import Path

from rewards import REWARDS, parse_weights
from schedules import DANCE_STEPS, METHODS, TREES, WINDOWED, schedule_of
from sde import STEPS
from tree import count, make_forest, parse_splits, spread_splits

HERE = Path(__file__).parent
TREE_FLAGS = ("branch", "splits", "roots", "branch_noise", "width_prune", "depth_prune")
BARE = -1  # a flag given without its value
MAY_CHANGE = (  # between a run and its resumption
    *("resume", "out", "eval_every", "save_every", "keep", "tracker", "device", "fsdp", "micro_batch", "compile"),
    *("gradient_checkpointing", "text_offload", "text_cache", "tree_offload", "reward_offload", "reward_batch"),
    *("reward_weights", "prompts", "eval_prompts"),  # where they lie; a hash of the prompts themselves is compared
)


def text_or_number(text: str) -> str | int:
    """'parent-top1' stays; 'extreme-4' and '4' become 4."""
    if text == "parent-top1":
        return text
    try:
        return int(text.removeprefix("extreme-"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"parent-top1 or extreme-B with B a whole number, got {text!r}") from None


def number(kind: type, low: float, high: float = math.inf, above=False, below=False):
    """An argparse type: a number of one kind in [low, high], without its ends where `above` or `below` says so."""
    rule = f"{'above' if above else 'at least'} {low}"
    rule += f" and {'below' if below else 'at most'} {high}" if math.isfinite(high) else ""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high) or (above and value == low) or (below and value == high):
            raise argparse.ArgumentTypeError(f"must be {'a whole number ' if kind is int else ''}{rule}, got {text!r}")
        return value

    return parse


COUNT, FROM_ZERO = number(int, 1), number(int, 0)
POSITIVE, NOT_NEGATIVE = number(float, 0, above=True), number(float, 0)
SHARE, BELOW_ONE = number(float, 0, 1, above=True), number(float, 0, 1, below=True)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default, except those that depend on other flags: their help says what they become."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, argparse.SUPPRESS) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage of fifty flags before it."""

    def error(self, message):
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def parser(description: str, model: str, height: int, width: int, reward: str, guidance=3.5) -> argparse.ArgumentParser:
    """All flags; the arguments are the defaults in which image and video differ."""
    p = Parser(description=description, formatter_class=Help, allow_abbrev=False)
    g = p.add_argument_group("model and data").add_argument
    g("--model", default=model, help="folder or hub id of a diffusers pipeline")
    g("--prompts", help="text (a line each), .json, .jsonl, .csv, .parquet, hub:NAME:SPLIT; default: the embedded ones")
    g("--eval-prompts", help="held-out prompts, likewise; default: a random tenth of --prompts")
    g("--prompt-column", default="prompt", help="of a record of --prompts and --eval-prompts")
    g("--height", type=COUNT, default=height, help="pixels (paper: 720)")
    g("--width", type=COUNT, default=width, help="pixels (paper: 720)")
    g("--guidance", type=NOT_NEGATIVE, default=guidance, help="scale (FLUX.1-dev, embedded: 3.5; Wan2.1: 5; 1 is none)")
    g("--lora", type=FROM_ZERO, default=0, help="LoRA rank, alpha = 2 rank; 0 trains all weights (Flow-GRPO: 64)")
    add_tree_flags(p.add_argument_group("tree").add_argument)
    add_learning_flags(p, reward)
    add_memory_flags(p.add_argument_group("memory").add_argument)
    g = p.add_argument_group("plan").add_argument
    g("--plan", metavar="ARCHITECTURE", help="of flux1-dev or wan2.1-1.3b: only say what it costs; default: train")
    g("--gpu", default="h100", help="of the plan: h100, h200, a100-80gb, l40s, rtx4090, rtx3090")
    g("--gpus", type=COUNT, default=1, help="of the plan")
    g("--utilisation", type=number(float, 0, 1, above=True), default=0.4, help="of the plan: share of the peak rate")
    g = p.add_argument_group("run").add_argument
    g("--seed", type=FROM_ZERO, default=0, help="of prompts order and noise; held-out noises never change")
    g("--out", help="the run's folder; default: runs/METHOD-DATE")
    g("--resume", nargs="?", const="", metavar="OUT", help="go on, same flags; bare: --out, or the newest in runs")
    g("--eval-every", type=COUNT, default=50, help="iterations between held-out evaluations")
    g("--eval-size", type=COUNT, default=256, help="held-out prompt-noise pairs")
    g("--save-every", type=COUNT, default=100, help="iterations between checkpoints")
    g("--keep", type=COUNT, default=2, help="checkpoints kept, the last ones")
    g("--tracker", choices=("tensorboard", "wandb"), default="tensorboard", help="of metrics, beside metrics.jsonl")
    g("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes the GPU if there is one")
    return p


def add_memory_flags(g) -> None:
    """What a model needs to fit; none but --dtype, --nf4, --vae-tiling and in bf16 --fsdp changes the result beyond rounding."""
    g("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast over fp32 master weights")
    g("--micro-batch", type=FROM_ZERO, default=64, help="most nodes in a transformer call; 0 = no limit")
    g("--gradient-checkpointing", action="store_true", help="compute activations twice instead of keeping them")
    packed = {"action": argparse.BooleanOptionalAction, "default": False}
    g("--nf4", **packed, help="frozen weights of the transformer in 4 bits; needs --lora and bitsandbytes")
    g("--fsdp", action="store_true", help="split weights, gradients and optimiser over all processes (torchrun)")
    g("--vae-tiling", action="store_true", help="decode in overlapping tiles")
    g("--text-offload", action="store_true", help="encode all prompts first; then the text encoders wait on the CPU")
    g("--text-cache", metavar="DIR", help="keep encoded prompts there, for other runs too; default: none")
    g("--compile", action="store_true", help="torch.compile the transformer's repeated blocks")
    g("--tree-offload", action="store_true", help="keep the tree's latents on the CPU")


def add_tree_flags(g) -> None:
    """The shape of the forest, what is stochastic, what is pruned; None is decided in `resolve_tree`."""
    g("--method", choices=METHODS, help="default: branchgrpo-mix, or branchgrpo with --*-prune")
    g("--steps", type=number(int, 2), default=10, help="denoising steps T (paper: 20)")
    g("--shift", type=POSITIVE, default=3.0, help="shift of the noise levels (paper: 3)")
    g("--leaves", type=number(int, 2), help="pictures a prompt; default: 16 (paper), or what --splits imply")
    g("--branch", type=number(int, 2), help="K, children of a node at a split; default: 2 (paper)")
    g("--splits", type=parse_splits, help="split steps, as in 0,3,6,9; default: log_K(leaves), first half")
    g("--roots", type=COUNT, help="independent trees a prompt; default: 1 (paper)")
    g("--branch-noise", type=NOT_NEGATIVE, help="s of Eq. 2, inf = independent siblings; default: 4 (paper)")
    g("--mix", type=FROM_ZERO, nargs="?", const=BARE, help="noisy window, steps; default: 0, mixgrpo T/5; bare: T/5")
    g("--mix-every", type=COUNT, help="iterations a window step; default: sweep once (MixGRPO: 25)")
    g("--width-prune", type=text_or_number, nargs="?", const="parent-top1", help="parent-top1 or extreme-B")
    g("--depth-prune", type=COUNT, nargs="?", const=BARE, help="window of dropped steps; bare: T/4 (paper: 5 of 20)")
    g("--depth-every", type=COUNT, help="iterations a window step; default: sweep once (paper: 30)")
    g("--flash", type=COUNT, metavar="N", help="steps of the tail, second-order between its ends; default: all, Euler")
    g("--depth-stop", type=FROM_ZERO, help="step at which the window's end stays; default: the last stochastic one")


def add_learning_flags(p, reward: str) -> None:
    """Steps, credit, loss and optimisation."""
    g = p.add_argument_group("steps").add_argument
    kinds = [k for k in STEPS if k != "ode"]
    g("--sde", choices=kinds, help="kind of stochastic step; default: cps for branchgrpo-mix, else the method's own")
    g("--eta", type=POSITIVE, help="noise strength; default: tuned (FLUX.1-dev: dance .3, flow .7, cps .8)")
    g("--cps-density", choices=("true", "upstream"), default="true", help="see sde.py")
    g = p.add_argument_group("credit and loss").add_argument
    g("--reward", default=reward, help=f"name:weight,... of {', '.join(REWARDS)}")
    g("--reward-mix", choices=("reward", "advantage"), default="reward", help="what is summed, see loop.py")
    g("--reward-weights", metavar="DIR", help="folder of preference models' REPOSITORY/FILE; default: the hub's cache")
    g("--reward-dtype", choices=("fp32", "bf16"), default="fp32", help="of preference models")
    g("--reward-batch", type=COUNT, default=32, help="pictures at a time in a preference model")
    g("--reward-offload", action="store_true", help="preference models wait on the CPU between scorings")
    g("--watch", default="auto", help="rewards to measure only; auto: ocr, colour, motion where all prompts allow")
    g("--fusion-beta", type=NOT_NEGATIVE, default=1.0, help="beta of Eq. 3; 0 = plain mean (paper: 1)")
    normalised = "over the nodes of a depth (Eq. 4), or by the prompt's leaves as in GRPO"
    g("--advantage", choices=("depth", "group"), default="depth", help=normalised)
    g("--adv-clip", type=POSITIVE, default=5.0, help="A_max (DanceGRPO: 5)")
    g("--loss-weight", choices=("edge", "path"), default="edge", help="see branchgrpo.flatten_edges (paper: edge)")
    g("--clip", type=SHARE, default=1e-4, help="clip range of the ratio (DanceGRPO: 1e-4)")
    g("--kl", type=NOT_NEGATIVE, default=0.0, help="weight of the KL to the untrained model (Flux: 0)")
    g("--timestep-fraction", type=SHARE, default=1.0, help="share of stochastic steps trained (DanceGRPO: .6, 1)")
    g = p.add_argument_group("optimisation").add_argument
    g("--iterations", type=FROM_ZERO, default=400, help="0 only evaluates (paper: 300)")
    g("--prompts-per-iteration", type=COUNT, default=4, help="over all processes")
    g("--updates", type=COUNT, default=1, help="optimiser steps an iteration; 1 is exactly on-policy")
    g("--lr", type=POSITIVE, default=7e-5, help="AdamW (paper: 1e-5 full, field: 3e-4 LoRA)")
    g("--lr-end", type=number(float, 0, 1), default=0.0, help="share of --lr left at the end, linear (paper: 1)")
    g("--weight-decay", type=NOT_NEGATIVE, default=1e-4, help="AdamW (paper: 1e-4)")
    g("--max-grad-norm", type=NOT_NEGATIVE, default=1.0, help="0 = no clipping (field: 1; .01 cures collapses)")
    g("--ema", type=BELOW_ONE, default=0.0, help="decay of the weights evaluated and saved; 0 = off (paper: .995)")


# ------------------------------------------------------------------------------------------------------------- resolve
def resolve_tree(args) -> None:
    """Decide method, splits, leaves and windows from what was given; explicit --splits win and imply the leaves."""
    pruned = args.depth_prune is not None or args.width_prune is not None
    if args.method is None:
        args.method = "branchgrpo" if pruned and args.mix is None else "branchgrpo-mix"
    elif args.method == "branchgrpo" and args.mix is not None:
        raise ValueError("--mix goes with --method branchgrpo-mix or mixgrpo, not with branchgrpo")
    if args.method not in TREES:
        for name in TREE_FLAGS:
            if getattr(args, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} does not go with --method {args.method}: its tree is fixed"
                )
    if args.mix is not None and args.method not in WINDOWED:
        raise ValueError(f"--mix does not go with --method {args.method}, which has no window")
    args.branch = 2 if args.branch is None else args.branch
    args.roots = 1 if args.roots is None else args.roots
    args.branch_noise = 4.0 if args.branch_noise is None else args.branch_noise
    if args.method in TREES:
        args.splits = (
            spread_splits(args.steps, args.branch, args.leaves or 16, args.roots)
            if args.splits is None
            else args.splits
        )
        leaves = make_forest(args.steps, args.branch, args.splits, args.roots).leaves
        if args.leaves not in (None, leaves):
            made = f"{len(args.splits)} splits make {args.roots} x {args.branch}^{len(args.splits)} = {leaves}"
            raise ValueError(f"--leaves {args.leaves} does not go with the tree: {made}")
        args.leaves = leaves
    args.leaves = args.leaves or 16
    args.mix = default_mix(args) if args.mix in (None, BARE) else args.mix
    args.depth_prune = round(args.steps / 4) if args.depth_prune == BARE else args.depth_prune
    check_windows(args)


def default_mix(args) -> int | None:
    """The mix window where no value was given: none for branchgrpo-mix without --mix (tuned), else the paper's fifth."""
    if args.method not in WINDOWED:
        return None
    return 0 if args.mix is None and args.method == "branchgrpo-mix" else max(1, round(args.steps / 5))


def check_windows(args) -> None:
    """Windows have a width that leaves something to do.

    Raises:
        ValueError: the flag, what is allowed, the value.
    """
    lowest = 1 if args.method == "mixgrpo" else 0
    if args.mix is not None and not lowest <= args.mix <= args.steps:
        raise ValueError(f"--mix must lie in {lowest}..{args.steps} (--steps), got {args.mix}")
    if args.depth_prune is not None and not 1 <= args.depth_prune <= args.steps:
        raise ValueError(f"--depth-prune must lie in 1..{args.steps} (--steps), got {args.depth_prune}")
    if args.depth_stop is not None and not 0 <= args.depth_stop <= args.steps - 2:
        raise ValueError(f"--depth-stop must lie in 0..{args.steps - 2}, got {args.depth_stop}")
    if (args.depth_prune is not None or args.width_prune is not None) and args.mix == 0:
        raise ValueError("--depth-prune and --width-prune drop steps after the last split; --mix 0 trains none")
    if args.width_prune == "parent-top1" and not args.splits:
        raise ValueError("--width-prune parent-top1 needs a split, and these --leaves and --roots leave none")
    if args.flash and args.flash >= args.steps:
        raise ValueError(f"--flash must be below --steps ({args.steps}), got {args.flash}")
    if isinstance(args.width_prune, int) and not 1 <= args.width_prune <= args.leaves // 2:
        raise ValueError(
            f"--width-prune extreme-B needs 1 <= B <= leaves / 2 = {args.leaves // 2}, got {args.width_prune}"
        )


TUNED_ETA = {"dance": (1.6, 0.7), "flow": (0.7, 0.7), "cps": (0.7, 0.7)}  # few noisy steps, all of them


def resolve(args) -> None:
    """Check all flags and fill in what was left open, before any long work.

    Raises:
        ValueError: one sentence: the flag, the value, what is allowed.
    """
    resolve_tree(args)
    published = "dance" if args.method in DANCE_STEPS else "flow"
    args.sde = args.sde or ("cps" if args.method == "branchgrpo-mix" else published)
    if args.eta is None:
        all_noisy = args.method in ("branchgrpo", "dancegrpo", "flowgrpo")
        args.eta = TUNED_ETA.get(args.sde, (0.3, 0.3))[all_noisy]
    if args.sde == "cps" and args.eta >= 1:
        raise ValueError(f"--eta must lie between 0 and 1 for --sde cps, got {args.eta}")
    if args.cps_density == "upstream" and args.sde != "cps":
        raise ValueError(f"--cps-density upstream goes with --sde cps, not {args.sde}")
    if args.prompts_per_iteration % args.updates:
        raise ValueError(
            f"--updates must divide --prompts-per-iteration ({args.prompts_per_iteration}), got {args.updates}"
        )
    weights = parse_weights(args.reward)
    if not any(weights.values()):
        raise ValueError(f"--reward needs a reward with a weight other than 0, got {args.reward!r}")
    if args.watch != "auto":
        parse_weights(args.watch)
    for asked, flag, package in (
        (args.tracker == "wandb", "--tracker wandb", "wandb"),
        (args.nf4, "--nf4", "bitsandbytes"),
    ):
        if asked and not args.plan and find_spec(package) is None:
            raise ValueError(f"{flag}: pip install {package}")
    if args.nf4 and not args.lora:
        raise ValueError("--nf4 freezes what it packs: give --lora, which is trained")
    if args.nf4 and args.fsdp:
        raise ValueError("--nf4 does not go with --fsdp: packed weights cannot be split")
    if schedule_of(args, 0).forest.last_stochastic < 0:
        raise ValueError("no step would be noisy, so none trained: give --splits, --mix or fewer --roots")


def describe(args, prompts: list[str], heldout: list[str]) -> str:
    """The resolved options and the derived counts with their formula, as printed at the start."""
    n = count(schedule_of(args, 0).forest)
    p = args.prompts_per_iteration
    rows = [f"  --{k.replace('_', '-'):<22} {v}" for k, v in sorted(vars(args).items()) if v is not None]
    rows += [
        f"prompts        {len(prompts)} to train on, {len(heldout)} held out",
        f"leaves         {p} prompts x {n['leaves']} = {p * n['leaves']} an iteration",
        f"nodes          {p} x {n['nodes']}, edges {p} x {n['edges']} (sums over depths of nodes a depth)",
        f"forwards       {p} x {n['forwards']} = {p * n['forwards']} (every node but the leaves)",
        f"trained edges  {p} x {n['trainable']} of {n['trained_parents']} parents, before pruning, at iteration 0",
        f"updates        {args.iterations} iterations x {args.updates} = {args.iterations * args.updates}",
    ]
    if args.updates == 1:
        rows.append("on-policy      with --updates 1 every ratio is 1 and nothing is ever clipped")
    return "\n".join(rows)
