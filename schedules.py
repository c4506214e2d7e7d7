"""Every method of the field as a forest with a schedule; the trainer is the same for all of them.

| method         | roots  | splits              | K      | stochastic steps                              | siblings share |
|----------------|--------|---------------------|--------|-----------------------------------------------|----------------|
| branchgrpo     | 1      | 0,3,6,9 of 20       | 2      | all                                           | noise, s = 4   |
| branchgrpo-mix | 1      | 0,3,6,9             | 2      | splits + a sliding window of --mix steps (0)  | noise, s = 4   |
| dancegrpo      | 1      | 0                   | leaves | all                                           | initial noise  |
| flowgrpo       | leaves | none                | -      | all                                           | nothing        |
| mixgrpo        | 1      | the window's first  | leaves | a window that slides over training            | ODE prefix     |
| flowgrpo-fast  | 1      | one random step     | leaves | that step and the next                        | ODE prefix     |
| tempflow       | 1      | one random step     | leaves | that step; loss weight std_i, mean 1 over i   | ODE prefix     |

Direction of time: step 0 is the noisiest. An iteration is one rollout of all its prompts; windows slide with it.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from sde import sigma_schedule, step_moments
from tree import Forest, depth_window_range, make_forest, window_start


@dataclass(frozen=True)
class Schedule:
    """What one iteration does: forest, noise levels, steps that may be trained, depth window (start, width), loss factors."""

    forest: Forest
    sigmas: torch.Tensor = field(compare=False)
    trained_steps: frozenset[int]
    depth: tuple[int, int] | None
    step_weight: list[float] | None


# ------------------------------------------------------------------------------------------- a forest for each method
def mix_window(args, iteration: int, last_start: int) -> range:
    """The stochastic window of --mix steps: one later every --mix-every iterations, up to `last_start`."""
    start = window_start(0, min(args.steps - args.mix, last_start), iteration, args.iterations, args.mix_every)
    return range(start, start + args.mix)


def branchgrpo(args, iteration: int, rng: np.random.Generator) -> Forest:
    """The paper's tree, every step stochastic."""
    return make_forest(args.steps, args.branch, args.splits, args.roots)


def branchgrpo_mix(args, iteration: int, rng: np.random.Generator) -> Forest:
    """The paper's tree, stochastic at its splits and in the sliding window only."""
    return make_forest(args.steps, args.branch, args.splits, args.roots, chosen=mix_window(args, iteration, args.steps))


def dancegrpo(args, iteration: int, rng: np.random.Generator) -> Forest:
    """Independent trajectories from one shared initial noise."""
    return make_forest(args.steps, args.leaves, (0,))


def flowgrpo(args, iteration: int, rng: np.random.Generator) -> Forest:
    """Independent trajectories from initial noises of their own."""
    return make_forest(args.steps, 2, (), roots=args.leaves)


def mixgrpo(args, iteration: int, rng: np.random.Generator) -> Forest:
    """A shared ODE prefix, then independent trajectories, stochastic inside the window only."""
    window = mix_window(args, iteration, last_start=args.steps - 2)  # it starts with a split
    return make_forest(args.steps, args.leaves, (window.start,), chosen=window)


def flowgrpo_fast(args, iteration: int, rng: np.random.Generator) -> Forest:
    """A shared ODE prefix to a random step; that step and the next are stochastic."""
    step = int(rng.integers(0, args.steps - 1))
    return make_forest(args.steps, args.leaves, (step,), chosen=(step, step + 1))


def tempflow(args, iteration: int, rng: np.random.Generator) -> Forest:
    """A shared ODE prefix to a random step, the only stochastic one."""
    return make_forest(args.steps, args.leaves, (int(rng.integers(0, args.steps - 1)),), chosen=())


METHODS = {  # name -> forest of an iteration
    "branchgrpo": branchgrpo,
    "branchgrpo-mix": branchgrpo_mix,
    "dancegrpo": dancegrpo,
    "flowgrpo": flowgrpo,
    "mixgrpo": mixgrpo,
    "flowgrpo-fast": flowgrpo_fast,
    "tempflow": tempflow,
}
TREES = ("branchgrpo", "branchgrpo-mix")  # shaped by the tree flags; the shapes of the others are fixed
WINDOWED = ("branchgrpo-mix", "mixgrpo")
DANCE_STEPS = (*TREES, "dancegrpo")  # published with dance steps, the others with flow steps


# ------------------------------------------------------------------------------------------------ a plan for an iteration
def schedule_of(args, iteration: int) -> Schedule:
    """The plan of one iteration, a function of the options, the seed and the iteration alone, so a resumed run agrees.

    timestep_fraction f trains a random ceil(f n) of the n stochastic steps, drawn anew each iteration, the same for all
    leaves (DanceGRPO draws for every sample, and rounds down).
    """
    rng = np.random.default_rng([args.seed, iteration, 1])  # 1: this stream; prompts have 2
    forest = METHODS[args.method](args, iteration, rng)
    tail = None
    if args.flash:
        k, forest = forest.last_stochastic + 1, forest.with_tail(args.flash)
        tail = (k, forest.steps - k)
    stochastic = [i for i in range(forest.steps) if forest.stochastic(i)]
    n = int(np.ceil(args.timestep_fraction * len(stochastic) - 1e-9))
    trained = frozenset(int(i) for i in rng.permutation(stochastic)[:n])
    depth = None
    if args.depth_prune is not None:
        first, last = depth_window_range(forest, args.depth_prune, args.depth_stop)
        depth = (window_start(first, last, iteration, args.iterations, args.depth_every), args.depth_prune)
    sigmas = sigma_schedule(args.steps, args.shift, tail)
    return Schedule(forest, sigmas, trained, depth, step_std_weights(args) if args.method == "tempflow" else None)


def step_std_weights(args) -> list[float]:
    """TempFlow-GRPO's loss factors (arXiv:2508.04324): std_i over the steps 0..T-2, scaled to mean 1."""
    sigmas = sigma_schedule(args.steps, args.shift)
    zero = torch.zeros((), dtype=torch.float64)
    pairs = [(sigmas[i], sigmas[i + 1]) for i in range(args.steps - 1)]
    std = [step_moments(args.sde, zero, zero, a, b, args.eta, float(sigmas[1]))[1].item() for a, b in pairs]
    return [s * len(std) / sum(std) for s in std] + [0.0]


def noise_sharing(args) -> float:
    """Branch noise s of the method: the option's for trees, infinite (independent siblings) for all others."""
    return args.branch_noise if args.method in TREES else float("inf")
