"""The command line that images and video share: flags with unit and origin, and what they resolve to.

What a flag leaves open is decided here, once, and printed with where it comes from. DEFAULTS_IMAGE and DEFAULTS_VIDEO
have two values for each such flag: the one tuned for the embedded models of tiny/ (LAB.md has the runs), and for any
other checkpoint that of the paper (arXiv:2509.06040) or of the method's authors: a value tuned on 4 million parameters
says nothing about FLUX.1-dev. What the checkpoint itself says, its shift and its usual guidance, goes before the table.
docs/defaults.md says why each value is what it is.

1. parser      all flags; those with two values are None until they are resolved
2. resolve     method, tree, steps, windows, rates: what was given stays, the rest is filled in
3. describe    every value with its origin, the derived counts, and the command of the unpruned counterpart

Only an explicit contradiction is an error: the flag, the value, what is allowed.
"""

import argparse
import json
import math
import shlex
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from objectives import OBJECTIVES, ON_LEAVES, rows_per_prompt
from pretrained import QUESTION
from rewards import REWARDS, own_weights, parse_weights, sets_of_rewards
from schedules import AUTO, DANCE_STEPS, METHODS, TREES, WINDOWED, schedule_of
from sde import STEPS
from tree import ADVANTAGES, count, keep_chosen, make_forest, parse_splits, spread_splits

HERE = Path(__file__).parent
TREE_FLAGS = ("branch", "splits", "roots", "branch_noise", "width_prune", "depth_prune")
PRUNE_FLAGS = ("width_prune", "depth_prune", "depth_every", "depth_stop", "size_prune")
BARE = -1  # a flag given without its value
BY_CHECKPOINT = ("shift", "guidance")
MAY_CHANGE = (  # between a run and its resumption
    *("resume", "out", "eval_every", "save_every", "keep", "tracker", "device", "fsdp", "micro_batch", "compile"),
    *("gradient_checkpointing", "text_offload", "text_cache", "tree_offload", "reward_offload", "reward_batch"),
    *("reward_weights", "prompts", "eval_prompts"),  # where they lie; a hash of the prompts themselves is compared
    "origin",  # of each value: given, tuned, the paper, ...
    "prompt_rewards",  # prompt -> its field --reward-column; the hash of the prompts covers them
)


# ------------------------------------------------------------------------------------------------------------- defaults
@dataclass(frozen=True)
class Default:
    """A value left open: for the embedded model, for any other checkpoint, and where the latter comes from."""

    embedded: object
    other: object
    source: str = "the paper"

    def __str__(self):
        if self.embedded == self.other:
            return f"{self.other} ({self.source})"
        return f"{self.embedded} for the embedded model, else {self.other} ({self.source})"


DEFAULTS_IMAGE = {  # by destination of the flag; the values that follow from others are in `resolve`
    "height": Default(32, 720),
    "width": Default(64, 720),
    "guidance": Default(3.5, 3.5, "FLUX.1-dev's model card"),
    "steps": Default(10, 20),
    "shift": Default(3.0, 3.0),
    "reward": Default("ocr:1,colour:1", "hpsv2"),
    "fusion_beta": Default(1.0, 1.0),
    "adv_clip": Default(5.0, 5.0, "DanceGRPO"),
    "clip": Default(1e-4, 1e-4, "DanceGRPO"),
    "kl": Default(0.0, 0.0, "DanceGRPO"),
    "iterations": Default(400, 300),
    "prompts_per_iteration": Default(4, 16, "the paper's 16 GPUs, one prompt each"),
    "lr_end": Default(0.0, 1.0),
    "weight_decay": Default(1e-4, 1e-4),
    "max_grad_norm": Default(1.0, 1.0, "DanceGRPO"),
    "ema": Default(0.0, 0.995),
    "dtype": Default("fp32", "bf16", "DanceGRPO"),
    "micro_batch": Default(64, 1, "the published code"),
}
DEFAULTS_VIDEO = (
    DEFAULTS_IMAGE
    | {  # frames and resolution of the paper's video runs were not published: Wan2.1's, shortened
        "height": Default(32, 480, "Wan2.1's model card"),
        "width": Default(32, 832, "Wan2.1's model card"),
        "frames": Default(9, 33, "a third of Wan2.1's 81, to fit"),
        "fps": Default(8, 16, "Wan2.1's model card"),
        "guidance": Default(1.0, 5.0, "Wan2.1's model card"),
        "reward": Default("motion:1,colour:1", "videoalign-mq"),
        "iterations": Default(200, 300),
    }
)
FOLLOWS = {  # what becomes of flags whose value follows from others, for their help
    "shift": "3.0 for the embedded model, else that of the checkpoint's scheduler",
    "guidance": "tuned for the embedded model, else the usual one of the model, see docs/models.md",
    "method": "branchgrpo; branchgrpo-mix with --mix, or on the embedded model unpruned",
    "mix": "T/5, also where the flag is bare (paper: 4 of 20); 0 on the embedded model",
    "depth_every": "it sweeps once on the embedded model, else 30 (paper)",
    "sde": "the method's own (cps for branchgrpo-mix on the embedded model)",
    "eta": "dance 0.3, flow 0.7, cps 0.8 as published, or tuned for the embedded model",
    "lr": "tuned for the embedded model, else 1e-5 (paper), with --lora 3e-4 (Flow-GRPO)",
}
TUNED_LR = {"flux": 7e-5, "wan": 2e-4}
TUNED_ETA = {"dance": (1.6, 0.7), "flow": (0.7, 0.7), "cps": (0.7, 0.7)}  # with few noisy steps, with all of them
PUBLISHED_ETA = {"dance": 0.3, "flow": 0.7, "cps": 0.8}  # DanceGRPO and the paper, Flow-GRPO, Flow-CPS


def kind_of(args) -> str:
    """Which embedded model the script has: "flux", or "wan" for video."""
    return "wan" if hasattr(args, "frames") else "flux"


def is_embedded(args) -> bool:
    """True where --model is an embedded model or was trained from it: its transformer has the same configuration.

    Raises:
        ValueError: if that configuration cannot be read.
    """

    def config(folder: Path) -> dict:
        file = folder / "transformer/config.json"
        try:
            values = json.loads(file.read_text()) if file.is_file() else {}
            return {name: value for name, value in values.items() if not name.startswith("_")}
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"--model {folder}: its transformer/config.json is damaged ({error})") from error

    own = config(HERE / "tiny" / kind_of(args))
    return args.plan is None and config(Path(args.model)) == own


def fill(args, name: str, value, origin: str) -> None:
    """Set an option that is still open, and remember where its value comes from."""
    if getattr(args, name) is None:
        setattr(args, name, value)
        args.origin[name] = origin


# ------------------------------------------------------------------------------------------------------ types of values
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
    rule += f" and {'below' if below else 'at most'} {high:g}" if math.isfinite(high) else ""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # fails every comparison below
        if not (low <= value <= high) or (above and value == low) or (below and value == high):
            raise argparse.ArgumentTypeError(f"must be a {'whole ' * (kind is int)}number {rule}, got {text!r}")
        return value

    return parse


MOST = 1e15  # of rates and scales; squares and products of two are still float32
COUNT, FROM_ZERO, PIXELS = number(int, 1), number(int, 0), number(int, 1, 16384)
POSITIVE, NOT_NEGATIVE = number(float, 0, MOST, above=True), number(float, 0, MOST)
UNLIMITED, UNLIMITED_POSITIVE = number(float, 0), number(float, 0, above=True)  # inf switches a bound off
FRACTION, BELOW_ONE = number(float, 0, 1, above=True), number(float, 0, 1, below=True)


# --------------------------------------------------------------------------------------------------------------- parser
class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default, except those that are decided later: their help says what they become."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, argparse.SUPPRESS) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Knows which flags were given, and says what is wrong in one sentence, without the usage of fifty flags."""

    def parse_args(self, argv=None, namespace=None):
        """Parsed flags; `origin` of each that was given is "given", of each with a plain default "default"."""
        # argparse fills in a default only where the namespace has no value yet: what is still unset was not given.
        unset = object()
        names = [action.dest for action in self._actions if action.dest != "help"]
        args = super().parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
        origin = {}
        for name in names:
            if getattr(args, name) is not unset:
                origin[name] = "given"
            else:
                setattr(args, name, self.get_default(name))
                if getattr(args, name) is not None:
                    origin[name] = "default"
        # An empty value is what an unset variable of the shell leaves: nobody means the default by it. Without a split,
        # without a watched reward and a bare --resume are meant so.
        for name, where in origin.items():
            if where == "given" and getattr(args, name) == "" and name not in ("splits", "watch", "resume"):
                self.error(f"--{name.replace('_', '-')} is empty: give a value, or leave the flag out")
        args.origin = origin
        return args

    def error(self, message):
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def adder(group, defaults: dict[str, Default | str]):
    """A group's add_argument; of the flags in `defaults` and FOLLOWS the value stays open, and the help says what it
    becomes."""

    def add(flag: str, help: str, **options) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        note = FOLLOWS.get(name) or defaults.get(name)
        if note:
            help, options = f"{help}; default: {note}", options | {"default": None}
        group.add_argument(flag, help=help.replace("%", "%%"), **options)

    return add


def parser(description: str, video: bool = False) -> Parser:
    """All flags of train_image.py, or with `video` of train_video.py."""
    p = Parser(description=description, formatter_class=Help, allow_abbrev=False)
    defaults = DEFAULTS_VIDEO if video else DEFAULTS_IMAGE

    def group(title: str):
        return adder(p.add_argument_group(title), defaults)

    g = group("model and data")
    g(
        "--model",
        default=str(HERE / "tiny" / ("wan" if video else "flux")),
        help="folder or hub id of a diffusers pipeline",
    )
    g(
        "--prompts",
        help=".txt (one per line), .json, .jsonl, .csv, .tsv, .parquet, hub:NAME:SPLIT; default: the embedded ones",
    )
    g("--eval-prompts", help="held-out prompts, likewise; default: a random tenth of --prompts")
    g("--prompt-column", default="prompt", help="of a record of --prompts and --eval-prompts")
    g("--height", type=PIXELS, help="pixels")
    g("--width", type=PIXELS, help="pixels")
    if video:
        g("--frames", type=COUNT, help="of a video, 4k + 1")
        rate = number(float, 0, 100, above=True)  # a GIF counts in hundredths of a second
        g("--fps", type=rate, help="frames per second at which videos are written, and rated by VideoAlign")
    g("--guidance", type=NOT_NEGATIVE, help="scale as the model's pipeline counts it; 1 is none, for Z-Image 0")
    g(
        "--lora",
        type=FROM_ZERO,
        default=0,
        help="LoRA rank, alpha = 2 rank; 0 trains all weights (Flow-GRPO: 32 for SD3.5)",
    )
    g(
        "--lora-from",
        metavar="LORA",
        help="start from a LoRA of that rank: a file, OUT/model, a hub id; default: a new one",
    )
    add_tree_flags(group("tree"))
    add_credit_flags(group("steps"), group("credit and loss"))
    add_reward_flags(group("rewards"))
    add_optimisation_flags(group("optimisation"))
    add_memory_flags(group("memory"))

    g = group("plan")
    planned = "wan2.1-1.3b" if video else "flux1-dev, sd3.5-medium, flux2-klein-4b or z-image"
    g("--plan", metavar="ARCHITECTURE", help=f"{planned}: only say what it costs; default: train")
    g("--gpu", default="h100", help="of the plan: h100, h200, a100-80gb, l40s, rtx4090, rtx3090")
    g("--gpus", type=COUNT, default=1, help="of the plan")
    g("--utilisation", type=FRACTION, default=0.4, help="of the plan: fraction of the peak rate that is reached")

    g = group("run")
    g("--seed", type=FROM_ZERO, default=0, help="of the order of prompts and of noise; held-out noises never change")
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
    """What a model needs to fit.

    None but --dtype, --nf4, --vae-tiling and in bf16 --fsdp changes the result beyond rounding.
    """
    g("--dtype", choices=("fp32", "bf16", "fp16"), help="bf16, for SD3 also fp16: autocast over fp32 master weights")
    g("--micro-batch", type=FROM_ZERO, help="most nodes in one transformer call; 0 is no limit")
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
    """The shape of the forest, which steps draw noise, what is pruned; what is None is decided in `resolve_tree`."""
    g("--method", choices=METHODS, help="which forest, see schedules.py")
    g("--steps", type=number(int, 2), help="denoising steps T")
    g("--shift", type=POSITIVE, help="shift of the noise levels")
    g("--leaves", type=number(int, 2), help="pictures per prompt; default: 16 (paper), or what --splits imply")
    g("--branch", type=number(int, 2), help="K, children of a node at a split; default: 2 (paper)")
    g(
        "--splits",
        type=lambda text: text if text == AUTO else parse_splits(text),
        help="split steps, as in 0,3,6,9; default: log_K(leaves), in the first half; auto: they move to where they"
        " explain most of the reward per evaluation",
    )
    g("--roots", type=COUNT, help="independent trees per prompt; default: 1 (paper)")
    g("--branch-noise", type=UNLIMITED, help="s of Eq. 2, inf makes siblings independent; default: 4 (paper)")
    g("--mix", type=FROM_ZERO, nargs="?", const=BARE, help="width of the noisy window")
    g("--mix-every", type=COUNT, help="iterations per step of that window; default: it sweeps once (MixGRPO: 25)")
    g(
        "--width-prune",
        type=text_or_number,
        nargs="?",
        const="parent-top1",
        help="parent-top1 or extreme-B; bare: the former",
    )
    g(
        "--depth-prune",
        type=COUNT,
        nargs="?",
        const=BARE,
        help="width of the window of dropped steps; bare: T/4 (paper: 5 of 20)",
    )
    g(
        "--size-prune",
        type=FRACTION,
        metavar="FRACTION",
        help="train this fraction of each step's parents, those with the largest advantages; default: all",
    )
    g("--depth-every", type=COUNT, help="iterations per step of that window")
    g("--depth-stop", type=FROM_ZERO, help="step at which the window's end stays; default: the last stochastic one")
    g(
        "--flash",
        type=COUNT,
        metavar="N",
        help="steps of the tail, second-order between its ends; default: all, Euler's",
    )


def add_credit_flags(steps, g) -> None:
    """The kind of step; credit and loss."""
    kinds = [kind for kind in STEPS if kind != "ode"]
    steps("--sde", choices=kinds, help="kind of stochastic step")
    steps("--eta", type=POSITIVE, help="noise strength")
    steps("--cps-density", choices=("true", "upstream"), default="true", help="see sde.py")

    g("--objective", choices=OBJECTIVES, default="surrogate", help="what is learnt from the leaves, see objectives.py")
    g("--noise-draws", type=COUNT, help="of elbo and nft: noised copies of every leaf; default: 2 (LAB.md)")
    g("--fusion-beta", type=NOT_NEGATIVE, help="beta of Eq. 3; 0 is the plain mean")
    rules = "what an edge is compared with: the nodes of its depth (Eq. 4), the leaves as in GRPO, or its siblings"
    g("--advantage", choices=ADVANTAGES, default="depth", help=rules)
    g("--adv-clip", type=UNLIMITED_POSITIVE, help="A_max, to which advantages are clipped")
    g("--loss-weight", choices=("edge", "path"), default="edge", help="see branchgrpo.flatten_edges (paper: edge)")
    g("--clip", type=FRACTION, help="clip range of the ratio")
    g("--kl", type=NOT_NEGATIVE, help="weight of the KL to the untrained model")
    g(
        "--timestep-fraction",
        type=FRACTION,
        default=1.0,
        help="fraction of stochastic steps trained (DanceGRPO: 0.6, 1)",
    )


def add_reward_flags(g) -> None:
    """What the leaves are scored by, optimised or only watched, and how preference models are run."""
    g("--reward", help=f"name:weight,... of {', '.join(REWARDS)}")
    own = "field of the records of --prompts and --eval-prompts with each prompt's own rewards, written as in --reward"
    g("--reward-column", metavar="FIELD", help=f"{own}; where it is empty, and by default, --reward serves")
    g("--reward-mix", choices=("reward", "advantage"), default="reward", help="what is summed, see loop.py")
    g("--reward-weights", metavar="DIR", help="folder of preference models' REPOSITORY/FILE; default: the hub's cache")
    g("--reward-dtype", choices=("fp32", "bf16"), default="fp32", help="of preference models")
    g("--reward-batch", type=COUNT, default=32, help="pictures at a time in a preference model")
    g("--reward-offload", action="store_true", help="preference models wait on the CPU between scorings")
    g("--reward-question", metavar="TEXT", default=QUESTION, help="what vlm asks; {prompt} is the prompt's place")
    g("--watch", default="auto", help="rewards to measure only; auto: ocr, colour, motion where all prompts allow")


def add_optimisation_flags(g) -> None:
    """Iterations, optimiser steps, rates."""
    g("--iterations", type=FROM_ZERO, help="0 only evaluates")
    g("--prompts-per-iteration", type=COUNT, help="over all processes")
    silent = "how often a prompt is still drawn whose leaves all scored alike in its last two visits; 1 is always"
    g("--silent-prompts", type=FRACTION, default=1.0, metavar="FRACTION", help=silent)
    g("--updates", type=COUNT, default=1, help="optimiser steps per iteration; 1 is exactly on-policy")
    g(
        "--updates-by",
        choices=("prompts", "parents"),
        default="prompts",
        help="what the optimiser steps of an iteration divide among them",
    )
    g("--lr", type=POSITIVE, help="AdamW")
    g("--lr-end", type=number(float, 0, 1), help="fraction of --lr left at the end, falling linearly; 1 is constant")
    g("--lr-warmup", type=FROM_ZERO, default=0, help="iterations in which --lr is reached, rising linearly; 0 is off")
    g("--weight-decay", type=NOT_NEGATIVE, help="AdamW")
    g("--max-grad-norm", type=UNLIMITED, help="0 is no clipping")
    g("--ema", type=BELOW_ONE, help="decay of the averaged weights, which are evaluated and saved; 0 is off")


# ------------------------------------------------------------------------------------------------------------- resolve
def resolve(args, checkpoint=None) -> None:
    """Check all flags and fill in what was left open, before any long work.

    Args:
        checkpoint: called with the options, returns what the checkpoint says, name -> (value, origin); see
            `models.checkpoint_values`. None, and for the embedded model: the table alone.

    Raises:
        ValueError: one sentence: the flag, the value, what is allowed.
    """
    embedded = is_embedded(args)
    tuned = f"tuned on tiny/{kind_of(args)}"

    # What stands in the table. What the checkpoint says goes before it, and may depend on size and steps.
    table = DEFAULTS_VIDEO if hasattr(args, "frames") else DEFAULTS_IMAGE

    def fill_from_table(names) -> None:
        for name in names:
            default = table[name]
            same = default.embedded == default.other
            fill(args, name, *((default.embedded, tuned) if embedded and not same else (default.other, default.source)))

    fill_from_table([name for name in table if name not in BY_CHECKPOINT])
    if checkpoint and not embedded:
        for name, (value, origin) in checkpoint(args).items():
            fill(args, name, value, origin)
    fill_from_table(BY_CHECKPOINT)

    # What follows from other flags.
    resolve_tree(args, embedded, tuned)
    resolve_step(args, embedded, tuned)
    if embedded:
        fill(args, "lr", TUNED_LR[kind_of(args)], tuned)
    fill(args, "lr", 3e-4 if args.lora else 1e-5, "follows from --lora (Flow-GRPO)" if args.lora else "the paper")
    check(args)


def resolve_tree(args, embedded: bool, tuned: str) -> None:
    """Decide method, splits, leaves and windows from what was given; explicit --splits win and imply the leaves."""
    pruned = args.depth_prune is not None or args.width_prune is not None

    # The method. Pruning drops steps after the splits; the tuned Mix trains none of them, so it is not for pruned runs.
    if args.method == "branchgrpo" and args.mix is not None:
        raise ValueError("--mix goes with --method branchgrpo-mix or mixgrpo, not with branchgrpo")
    if args.mix is not None:
        fill(args, "method", "branchgrpo-mix", "follows from --mix")
    if embedded and not pruned:
        fill(args, "method", "branchgrpo-mix", tuned)
    fill(args, "method", "branchgrpo", "follows from --*-prune" if embedded else "the paper")

    # Flags that the method has no use for are a contradiction.
    if args.method not in TREES:
        for name in TREE_FLAGS:
            if getattr(args, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} does not go with --method {args.method}: its tree is fixed")
    if args.mix is not None and args.method not in WINDOWED:
        raise ValueError(f"--mix does not go with --method {args.method}, which has no window")

    # The tree: K, roots, and splits in the first half of the steps, enough for the leaves.
    for name, value in (("branch", 2), ("roots", 1), ("branch_noise", 4.0)):
        fill(args, name, value, "the paper")
    if args.method in TREES:
        if args.splits is None:
            splits = spread_splits(args.steps, args.branch, args.leaves or 16, args.roots)
            fill(args, "splits", splits, "follows from --steps, --branch and --leaves")
        splits = spread_splits(args.steps, args.branch, args.leaves or 16, args.roots)
        splits = splits if args.splits == AUTO else args.splits
        leaves = make_forest(args.steps, args.branch, splits, args.roots).leaves
        if args.leaves not in (None, leaves):
            made = f"{len(splits)} splits make {args.roots} x {args.branch}^{len(splits)} = {leaves}"
            raise ValueError(f"--leaves {args.leaves} does not go with the tree: {made}")
        fill(args, "leaves", leaves, "follows from --splits and --branch")
        if leaves < 2:
            raise ValueError("a tree of one leaf has nothing to compare: give --splits, or more --roots")
    fill(args, "leaves", 16, "the paper")

    # Windows. The paper's: a fifth of the steps is noisy, a quarter is dropped and moves every 30 iterations.
    if args.mix == BARE:
        args.mix = max(1, round(args.steps / 5))
    if args.method == "branchgrpo-mix" and embedded:
        fill(args, "mix", 0, tuned)
    if args.method in WINDOWED:
        fill(args, "mix", max(1, round(args.steps / 5)), "the paper")
    if args.depth_prune == BARE:
        args.depth_prune = round(args.steps / 4)
    if args.depth_prune is not None and not embedded:
        fill(args, "depth_every", 30, "the paper")
    check_windows(args)


def resolve_step(args, embedded: bool, tuned: str) -> None:
    """Decide the kind of stochastic step and its noise strength."""
    if embedded and args.method == "branchgrpo-mix":
        fill(args, "sde", "cps", tuned)
    fill(args, "sde", "dance" if args.method in DANCE_STEPS else "flow", "follows from --method")
    if embedded:
        all_noisy = args.method in ("branchgrpo", "dancegrpo", "flowgrpo")
        fill(args, "eta", TUNED_ETA.get(args.sde, (0.3, 0.3))[all_noisy], tuned)
    fill(args, "eta", PUBLISHED_ETA.get(args.sde, 0.3), "follows from --sde, as published")


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
    if args.width_prune is not None and args.size_prune is not None:
        raise ValueError(
            "--size-prune does not go with --width-prune: what both keep would differ from prompt to prompt"
        )
    for name, needed, there in (
        ("depth_every", "--depth-prune", args.depth_prune is not None),
        ("depth_stop", "--depth-prune", args.depth_prune is not None),
        ("mix_every", "a window, --mix", bool(args.mix)),
    ):
        if args.origin.get(name) == "given" and not there:
            raise ValueError(f"--{name.replace('_', '-')} goes with {needed}")
    if args.splits == AUTO and (args.depth_prune is not None or args.mix):
        raise ValueError("--splits auto does not go with --depth-prune or a --mix window: both slide along the splits")
    if (args.depth_prune is not None or args.width_prune is not None) and args.mix == 0:
        raise ValueError("--depth-prune and --width-prune drop steps after the last split; --mix 0 trains none")
    if args.width_prune == "parent-top1" and not args.splits:
        raise ValueError("--width-prune parent-top1 needs a split, and these --leaves and --roots leave none")
    if args.flash and args.flash >= args.steps:
        raise ValueError(f"--flash must be below --steps ({args.steps}), got {args.flash}")
    if isinstance(args.width_prune, int) and not 1 <= args.width_prune <= args.leaves // 2:
        limit = f"leaves / 2 = {args.leaves // 2}"
        raise ValueError(f"--width-prune extreme-B needs 1 <= B <= {limit}, got {args.width_prune}")


def check(args) -> None:
    """Flags that contradict each other or need what is not installed.

    Raises:
        ValueError: one sentence.
    """
    check_learning(args)
    weights = parse_weights(args.reward, "--reward")
    if not any(weights.values()):
        raise ValueError(f"--reward needs a reward with a weight other than 0, got {args.reward!r}")
    if args.watch != "auto":
        parse_weights(args.watch, "--watch")

    packages = ((args.tracker == "wandb", "--tracker wandb", "wandb"), (args.nf4, "--nf4", "bitsandbytes"))
    for asked, flag, package in packages:
        if asked and not args.plan and find_spec(package) is None:
            raise ValueError(f"{flag}: pip install {package}")
    if args.lora_from and not args.lora:
        raise ValueError("--lora-from goes with --lora RANK, the rank of that LoRA")
    if args.nf4 and not args.lora:
        raise ValueError("--nf4 freezes what it packs: give --lora, which is trained")
    if args.dtype == "fp16" and is_embedded(args):
        raise ValueError("--dtype fp16 is for Stable Diffusion 3: the embedded models take fp32 or bf16")
    if args.dtype == "fp16" and args.fsdp:
        raise ValueError("--dtype fp16 does not go with --fsdp: give bf16, which needs no scaling of the loss")
    if args.nf4 and args.fsdp:
        raise ValueError("--nf4 does not go with --fsdp: packed weights cannot be split")


def check_learning(args) -> None:
    """What does not depend on the model: the steps' kind, the objective, the windows, the optimiser steps.

    Raises:
        ValueError: one sentence.
    """
    if args.sde == "cps" and args.eta >= 1:
        raise ValueError(f"--eta must lie between 0 and 1 for --sde cps, got {args.eta}")
    if args.cps_density == "upstream" and args.sde != "cps":
        raise ValueError(f"--cps-density upstream goes with --sde cps, not {args.sde}")
    if args.updates_by == "prompts" and args.prompts_per_iteration % args.updates:
        prompts = f"--prompts-per-iteration ({args.prompts_per_iteration})"
        raise ValueError(f"--updates must divide {prompts}, or take --updates-by parents; got {args.updates}")

    check_objective(args)
    forest = schedule_of(args, 0).forest
    first_end = forest.last_split + (args.depth_prune or 0)
    if args.depth_prune is not None and args.depth_stop is not None and args.depth_stop < first_end:
        window = f"the end of the first window of --depth-prune {args.depth_prune}, step {first_end}"
        raise ValueError(f"--depth-stop {args.depth_stop} lies before {window}: the window would never move")


def check_objective(args) -> None:
    """The objective finds what it trains, and no flag is given that it has no use for.

    Raises:
        ValueError: one sentence.
    """
    forest = schedule_of(args, 0).forest
    name = args.objective
    if name not in ON_LEAVES and args.method == "ode":
        raise ValueError(f"--method ode draws no noise: give --objective {' or '.join(ON_LEAVES)} with it")
    if name not in ON_LEAVES and forest.last_stochastic < 0:
        raise ValueError("no step would be noisy, so none trained: give --splits, --mix or fewer --roots")
    if name == "endpoint" and not forest.splits:
        raise ValueError("--objective endpoint compares siblings: give --splits, or a method that branches")

    # Pruning and loss weights are about noisy edges, of which these train the splits only, or none.
    if name != "surrogate":
        for flag in (*PRUNE_FLAGS, "timestep_fraction", "loss_weight"):
            if args.origin.get(flag) == "given":
                raise ValueError(f"--{flag.replace('_', '-')} does not go with --objective {name}")
    if name in ON_LEAVES:
        fill(args, "noise_draws", 2, "LAB.md")
    elif args.noise_draws is not None:
        raise ValueError(f"--noise-draws does not go with --objective {name}: it is for {', '.join(ON_LEAVES)}")


# ------------------------------------------------------------------------------------------------------------- describe
def unpruned_command(args) -> str:
    """The same run without pruning: what pruning also decided is given explicitly, so that nothing else changes."""
    argv = ["python", f"train_{'video' if hasattr(args, 'frames') else 'image'}.py"]
    fixed = ("method", "sde", "eta")
    for name, value in vars(args).items():
        if name in (*PRUNE_FLAGS, "out", "resume") or not (args.origin.get(name) == "given" or name in fixed):
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            argv.append(flag if value else f"--no-{name}")
        else:
            argv += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(argv)


def describe(args, prompts: list[str], heldout: list[str]) -> str:
    """The resolved options with their origin, and the derived counts with their formula, as printed at the start."""
    sets = sets_of_rewards(own_weights(vars(args).get("prompt_rewards"), args.reward), [*prompts, *heldout])
    hidden = ("origin", "prompt_rewards")
    options = {name: value for name, value in vars(args).items() if value is not None and name not in hidden}
    rows = []
    for name, value in sorted(options.items()):
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        rows.append(f"  --{name.replace('_', '-'):<22} {shown:<24} {args.origin.get(name, '')}".rstrip())

    forest, p = schedule_of(args, 0).forest, args.prompts_per_iteration
    n, trained = count(forest), rows_per_prompt(args, forest, keep_chosen(forest, 1))
    rows += [
        f"prompts        {len(prompts)} to train on, {len(heldout)} held out",
        *(f"rewards        prompts with {text}: {total}" for text, total in sets.items()),
        f"leaves         {p} prompts x {n['leaves']} = {p * n['leaves']} per iteration",
        f"nodes          {p} x {n['nodes']}, edges {p} x {n['edges']} (sums over depths of the nodes per depth)",
        f"forwards       {p} x {n['forwards']} = {p * n['forwards']} (every node but the leaves)",
        f"trained edges  {p} x {n['trainable']} of {trained} parents, before pruning, at iteration 0"
        if args.objective == "surrogate"
        else f"trained rows   {p} x {trained} = {p * trained}, see objectives.py",
        f"updates        {args.iterations} iterations x {args.updates} = {args.iterations * args.updates}",
    ]
    if args.updates == 1 and args.objective in ("surrogate", "elbo"):  # the others have no ratio
        rows.append("on-policy      with --updates 1 every ratio is 1 and nothing is ever clipped")
    if args.width_prune is not None or args.depth_prune is not None:
        rows.append(f"unpruned       {unpruned_command(args)}")
    return "\n".join(rows)
