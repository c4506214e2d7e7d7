"""The command line that images and video share: flags with unit and origin, and what they resolve to.

A default is the value tuned for the embedded model (LAB.md has the runs), or the paper's where it says so; settings for
FLUX.1-dev are in the README. What a flag leaves open is decided here, once, and printed: the splits, the noise strength, the
widths of windows. Only an explicit contradiction is an error.
"""

import argparse
import math
from pathlib import Path

from rewards import REWARDS, parse_weights
from schedules import DEFAULT_SDE, METHODS, TREES, WINDOWED, plan
from tree import count, make_forest, parse_splits, spread_splits

HERE = Path(__file__).parent
TREE_FLAGS = ("branch", "splits", "roots", "branch_noise", "width_prune", "depth_prune")
MAY_CHANGE = ("resume", "out", "eval_every", "save_every", "device", "micro_batch")  # between a run and its resumption


def text_or_number(text: str) -> str | int:
    """'parent-top1' stays; 'extreme-4' and '4' become 4."""
    if text == "parent-top1":
        return text
    try:
        return int(text.removeprefix("extreme-"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"parent-top1 or extreme-B with B a whole number, got {text!r}") from None


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default, except those that depend on other flags: their help says what they become."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, argparse.SUPPRESS) else super()._get_help_string(action)


def parser(description: str, model: str, height: int, width: int, reward: str) -> argparse.ArgumentParser:
    """All flags; the arguments are the defaults in which image and video differ."""
    p = argparse.ArgumentParser(description=description, formatter_class=Help, allow_abbrev=False)
    g = p.add_argument_group("model and data")
    g.add_argument("--model", default=model, help="folder or hub id of a diffusers pipeline")
    g.add_argument("--prompts", help="text file, a prompt a line; default: those of the embedded model")
    g.add_argument("--eval-prompts", help="held-out prompts, a line each; default: the last tenth of --prompts")
    g.add_argument("--height", type=int, default=height, help="pixels (paper: 720)")
    g.add_argument("--width", type=int, default=width, help="pixels (paper: 720)")
    g.add_argument("--guidance", type=float, default=3.5, help="embedded guidance scale (FLUX.1-dev: 3.5)")
    g.add_argument(
        "--lora", type=int, default=0, help="LoRA rank, alpha = 2 rank; 0 trains all weights (Flow-GRPO: 64)"
    )

    g = p.add_argument_group("tree")
    g.add_argument("--method", choices=METHODS, help="default: branchgrpo-mix, or branchgrpo with --*-prune")
    g.add_argument("--steps", type=int, default=10, help="denoising steps T (paper: 20)")
    g.add_argument("--shift", type=float, default=3.0, help="shift of the noise levels (paper: 3)")
    g.add_argument("--leaves", type=int, help="pictures a prompt; default: 16 (paper), or what --splits imply")
    g.add_argument("--branch", type=int, help="K, children of a node at a split; default: 2 (paper)")
    g.add_argument("--splits", type=parse_splits, help="split steps, as in 0,3,6,9; default: log_K(leaves), first half")
    g.add_argument("--roots", type=int, help="independent trees a prompt; default: 1 (paper)")
    g.add_argument("--branch-noise", type=float, help="s of Eq. 2, inf = independent siblings; default: 4 (paper)")
    g.add_argument(
        "--mix", type=int, nargs="?", const=-1, help="stochastic window, in steps; bare: T/5 (paper: 4 of 20)"
    )
    g.add_argument("--mix-every", type=int, help="iterations a window step; default: sweep once (MixGRPO: 25)")
    g.add_argument(
        "--width-prune", type=text_or_number, nargs="?", const="parent-top1", help="parent-top1 or extreme-B"
    )
    g.add_argument("--depth-prune", type=int, nargs="?", const=-1, help="window of dropped steps; bare: T/4 (paper: 5)")
    g.add_argument("--depth-every", type=int, help="iterations a window step; default: sweep once (paper: 30)")
    g.add_argument("--depth-stop", type=int, help="step at which the window's end stays; default: the last stochastic")

    g = p.add_argument_group("steps")
    g.add_argument("--sde", choices=("dance", "flow", "cps"), help="kind of stochastic step; default: the method's own")
    g.add_argument("--eta", type=float, help="noise strength; default: tuned (FLUX.1-dev: dance .3, flow .7, cps .8)")
    g.add_argument("--cps-density", dest="cps_density", choices=("true", "upstream"), default="true", help="see sde.py")

    g = p.add_argument_group("credit and loss")
    g.add_argument("--reward", default=reward, help=f"name:weight,... of {', '.join(REWARDS)}")
    g.add_argument("--watch", default="auto", help="rewards to measure only; auto: ocr, colour where all prompts allow")
    g.add_argument("--fusion-beta", type=float, default=1.0, help="beta of Eq. 3; 0 = plain mean (paper: 1)")
    g.add_argument("--adv-clip", type=float, default=5.0, help="A_max (DanceGRPO: 5)")
    g.add_argument(
        "--loss-weight", choices=("edge", "path"), default="path", help="see branchgrpo.gather (paper: edge)"
    )
    g.add_argument("--clip", type=float, default=1e-4, help="clip range of the ratio (DanceGRPO: 1e-4)")
    g.add_argument("--kl", type=float, default=0.0, help="weight of the KL to the untrained model (Flux: 0)")
    g.add_argument("--timestep-fraction", type=float, default=1.0, help="share of stochastic steps trained (DanceGRPO)")

    g = p.add_argument_group("optimisation")
    g.add_argument("--iterations", type=int, default=300, help="0 only evaluates (paper: 300)")
    g.add_argument("--prompts-per-iteration", type=int, default=8, help="over all processes")
    g.add_argument("--updates", type=int, default=1, help="optimiser steps an iteration; 1 is exactly on-policy")
    g.add_argument("--lr", type=float, default=1e-4, help="AdamW (paper: 1e-5 full, field: 3e-4 LoRA)")
    g.add_argument("--weight-decay", type=float, default=1e-4, help="AdamW (paper: 1e-4)")
    g.add_argument("--max-grad-norm", type=float, default=1.0, help="0 = no clipping (field: 1; .01 cures collapses)")
    g.add_argument(
        "--ema", type=float, default=0.0, help="decay of the weights evaluated and saved; 0 = off (paper: .995)"
    )
    g.add_argument("--micro-batch", type=int, default=64, help="most nodes in a transformer call; 0 = no limit")

    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0, help="of prompts order and noise; held-out noises never change")
    g.add_argument("--out", help="the run's folder; default: runs/METHOD-DATE")
    g.add_argument(
        "--resume", nargs="?", const="", metavar="OUT", help="continue a run; bare: --out, or the newest in runs"
    )
    g.add_argument("--eval-every", type=int, default=25, help="iterations between held-out evaluations")
    g.add_argument("--eval-size", type=int, default=256, help="held-out prompt-noise pairs")
    g.add_argument("--save-every", type=int, default=50, help="iterations between checkpoints; the last two are kept")
    g.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes the GPU if there is one"
    )
    g.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast over fp32 master weights")
    return p


# ------------------------------------------------------------------------------------------------------------- resolve
RANGES = {  # flag: (lowest, highest, words)
    "steps": (2, math.inf, "at least 2"),
    "iterations": (0, math.inf, "at least 0"),
    "eta": (0, math.inf, "above 0"),
    "shift": (0, math.inf, "above 0"),
    "branch_noise": (0, math.inf, "at least 0"),
    "fusion_beta": (0, math.inf, "at least 0"),
    "adv_clip": (0, math.inf, "above 0"),
    "clip": (0, 1, "above 0 and at most 1"),
    "kl": (0, math.inf, "at least 0"),
    "timestep_fraction": (0, 1, "above 0 and at most 1"),
    "prompts_per_iteration": (1, math.inf, "at least 1"),
    "updates": (1, math.inf, "at least 1"),
    "lr": (0, math.inf, "above 0"),
    "weight_decay": (0, math.inf, "at least 0"),
    "max_grad_norm": (0, math.inf, "at least 0"),
    "ema": (0, 1, "at least 0 and below 1"),
    "micro_batch": (0, math.inf, "at least 0"),
    "lora": (0, math.inf, "at least 0"),
    "leaves": (2, math.inf, "at least 2"),
    "mix_every": (1, math.inf, "at least 1"),
    "depth_every": (1, math.inf, "at least 1"),
    "eval_every": (1, math.inf, "at least 1"),
    "eval_size": (1, math.inf, "at least 1"),
    "save_every": (1, math.inf, "at least 1"),
    "seed": (0, math.inf, "at least 0"),
}


def check_ranges(o) -> None:
    """Every number lies where its flag allows.

    Raises:
        ValueError: the flag, what is allowed, the value.
    """
    for name, (low, high, words) in RANGES.items():
        value = getattr(o, name)
        open_below, open_above = "above 0" in words, "below 1" in words
        if value is None:
            continue
        inside = low <= value <= high and not (open_below and value <= low) and not (open_above and value >= high)
        if not inside:  # also where it is NaN
            raise ValueError(f"--{name.replace('_', '-')} must be {words}, got {value}")


def resolve_tree(o) -> None:
    """Decide method, splits, leaves and windows from what was given; explicit --splits win and imply the leaves."""
    pruned = o.depth_prune is not None or o.width_prune is not None
    if o.method is None:
        o.method = "branchgrpo" if pruned and o.mix is None else "branchgrpo-mix"
    elif o.method == "branchgrpo" and o.mix is not None:
        raise ValueError("--mix goes with --method branchgrpo-mix or mixgrpo, not with branchgrpo")
    if o.method not in TREES:
        for name in TREE_FLAGS:
            if getattr(o, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} does not go with --method {o.method}, which fixes its tree"
                )
    if o.mix is not None and o.method not in WINDOWED:
        raise ValueError(f"--mix does not go with --method {o.method}, which has no window")
    o.branch = 2 if o.branch is None else o.branch
    o.roots = 1 if o.roots is None else o.roots
    o.branch_noise = 4.0 if o.branch_noise is None else o.branch_noise
    if o.method in TREES:
        given = o.splits is not None
        o.splits = o.splits if given else spread_splits(o.steps, o.branch, o.leaves or 16, o.roots)
        leaves = make_forest(o.steps, o.branch, o.splits, o.roots).leaves
        if given and o.leaves is not None and o.leaves != leaves:
            made = f"{o.roots} x {o.branch}^{len(o.splits)} = {leaves}"
            raise ValueError(
                f"--leaves {o.leaves} contradicts --splits {','.join(map(str, o.splits))}, which make {made}"
            )
        o.leaves = leaves
    o.leaves = o.leaves or 16
    o.mix = default_mix(o) if o.mix in (None, -1) else o.mix
    o.depth_prune = round(o.steps / 4) if o.depth_prune == -1 else o.depth_prune
    check_windows(o)


def default_mix(o) -> int | None:
    """The mix window where no value was given: none for branchgrpo-mix without --mix (tuned), else the paper's fifth."""
    if o.method not in WINDOWED:
        return None
    return 0 if o.mix is None and o.method == "branchgrpo-mix" else max(1, round(o.steps / 5))


def check_windows(o) -> None:
    """Windows have a width that leaves something to do.

    Raises:
        ValueError: the flag, what is allowed, the value.
    """
    lowest = 1 if o.method == "mixgrpo" else 0
    if o.mix is not None and not lowest <= o.mix <= o.steps:
        raise ValueError(f"--mix must lie in {lowest}..{o.steps} (--steps), got {o.mix}")
    if o.depth_prune is not None and not 1 <= o.depth_prune <= o.steps:
        raise ValueError(f"--depth-prune must lie in 1..{o.steps} (--steps), got {o.depth_prune}")
    if o.depth_stop is not None and not 0 <= o.depth_stop <= o.steps - 2:
        raise ValueError(f"--depth-stop must lie in 0..{o.steps - 2}, got {o.depth_stop}")
    if (o.depth_prune is not None or o.width_prune is not None) and o.mix == 0:
        raise ValueError(
            "--depth-prune and --width-prune drop steps after the last split; with --mix 0 none is trained"
        )
    if isinstance(o.width_prune, int) and not 1 <= o.width_prune <= o.leaves // 2:
        raise ValueError(f"--width-prune extreme-B needs 1 <= B <= leaves / 2 = {o.leaves // 2}, got {o.width_prune}")


TUNED_ETA = {"dance": (1.6, 0.7), "flow": (0.7, 0.7), "cps": (0.8, 0.8)}  # few stochastic steps, all of them


def resolve(o) -> None:
    """Check all flags and fill in what was left open, before any long work.

    Raises:
        ValueError: one sentence: the flag, the value, what is allowed.
    """
    check_ranges(o)
    resolve_tree(o)
    o.sde = o.sde or DEFAULT_SDE[o.method]
    o.eta = TUNED_ETA[o.sde][o.method in ("branchgrpo", "dancegrpo", "flowgrpo")] if o.eta is None else o.eta
    if o.sde == "cps" and o.eta >= 1:
        raise ValueError(f"--eta must lie between 0 and 1 for --sde cps, got {o.eta}")
    if o.cps_density == "upstream" and o.sde != "cps":
        raise ValueError(f"--cps-density upstream goes with --sde cps, not {o.sde}")
    if o.prompts_per_iteration % o.updates:
        p = o.prompts_per_iteration
        raise ValueError(f"--updates must divide --prompts-per-iteration ({p}), got {o.updates}")
    weights = parse_weights(o.reward)
    if not any(weights.values()):
        raise ValueError(f"--reward needs a reward with a weight other than 0, got {o.reward!r}")
    if o.watch != "auto":
        parse_weights(o.watch)
    plan(o, 0)


def read_prompts(path: str, flag: str) -> list[str]:
    """Prompts of a text file, a line each; blank lines and repeats are dropped.

    Raises:
        ValueError: if the file is missing, no text or empty.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path} cannot be read: {error}") from error
    prompts = list(dict.fromkeys(filter(None, map(str.strip, lines))))
    if not prompts:
        raise ValueError(f"{flag} {path} holds no prompt")
    return prompts


def load_prompts(o, train: str, heldout: str) -> tuple[list[str], list[str]]:
    """Training and held-out prompts; `train` and `heldout` are the files used where --prompts is not given.

    Raises:
        ValueError: if a file is unusable, or a prompt stands in both.
    """
    prompts = read_prompts(o.prompts or train, "--prompts")
    if o.eval_prompts or not o.prompts:
        held = read_prompts(o.eval_prompts or heldout, "--eval-prompts")
    else:
        n = max(1, len(prompts) // 10)
        prompts, held = prompts[:-n], prompts[-n:]
    if not prompts:
        raise ValueError(f"--prompts {o.prompts} needs at least two prompts, or --eval-prompts beside it")
    if shared := set(prompts) & set(held):
        raise ValueError(f"{len(shared)} held-out prompts are also trained on, such as {sorted(shared)[0]!r}")
    return prompts, held


def describe(o, prompts: list[str], heldout: list[str]) -> str:
    """The resolved options and the derived counts with their formula, as printed at the start."""
    n = count(plan(o, 0).forest)
    p = o.prompts_per_iteration
    rows = [f"  --{k.replace('_', '-'):<22} {v}" for k, v in sorted(vars(o).items()) if v is not None]
    rows += [
        f"prompts        {len(prompts)} to train on, {len(heldout)} held out",
        f"leaves         {p} prompts x {n['leaves']} = {p * n['leaves']} an iteration",
        f"nodes          {p} x {n['nodes']}, edges {p} x {n['edges']} (sums over depths of nodes a depth)",
        f"forwards       {p} x {n['forwards']} = {p * n['forwards']} (every node but the leaves)",
        f"trained edges  {p} x {n['trainable']} of {n['trained_parents']} parents, before pruning, at iteration 0",
        f"updates        {o.iterations} iterations x {o.updates} = {o.iterations * o.updates}",
    ]
    if o.updates == 1:
        rows.append("on-policy      with --updates 1 every ratio is 1 and nothing is ever clipped")
    return "\n".join(rows)
