"""Every method of the field as a forest with a schedule; the trainer is the same for all of them.

| method         | roots  | splits              | K      | stochastic steps                              | siblings share |
|----------------|--------|---------------------|--------|-----------------------------------------------|----------------|
| branchgrpo     | 1      | 0,3,6,9 of 20       | 2      | all                                           | noise, s = 4   |
| branchgrpo-mix | 1      | 0,3,6,9             | 2      | splits + a window that slides over training   | noise, s = 4   |
| dancegrpo      | 1      | 0                   | leaves | all                                           | initial noise  |
| flowgrpo       | leaves | none                | -      | all                                           | nothing        |
| mixgrpo        | 1      | the window's first  | leaves | a window that slides over training            | ODE prefix     |
| flowgrpo-fast  | 1      | one random step     | leaves | that step and the next                        | ODE prefix     |
| tempflow       | 1      | one random step     | leaves | that step; loss weight std_i, mean 1 over i   | ODE prefix     |

Direction of time: step 0 is the noisiest. An iteration is one rollout of all its prompts; windows slide with it.
"""

from dataclasses import dataclass

import numpy as np
import torch

from sde import sigma_schedule, step_moments
from tree import Forest, depth_window_range, make_forest, mix_window_range, window_start

TREES = ("branchgrpo", "branchgrpo-mix")
METHODS = (*TREES, "dancegrpo", "flowgrpo", "mixgrpo", "flowgrpo-fast", "tempflow")
WINDOWED = ("branchgrpo-mix", "mixgrpo")
DEFAULT_SDE = dict.fromkeys(METHODS, "flow") | dict.fromkeys((*TREES, "dancegrpo"), "dance")  # as each was published


@dataclass(frozen=True)
class Plan:
    """What one iteration does: the forest, the steps that may be trained, the depth window (start, width), loss factors."""

    forest: Forest
    trained_steps: frozenset[int]
    depth: tuple[int, int] | None
    step_weight: list[float] | None


def forest_at(o, iteration: int, rng: np.random.Generator) -> Forest:
    """The forest of one iteration; o is the resolved options, rng is used by the methods that draw a step."""
    steps, leaves = o.steps, o.leaves
    if o.method in WINDOWED:
        first, last = mix_window_range(steps, o.mix)
        last = min(last, steps - 2) if o.method == "mixgrpo" else last  # its window starts with a split
        start = window_start(first, last, iteration, o.iterations, o.mix_every)
        window = range(start, start + o.mix)
    if o.method == "branchgrpo":
        return make_forest(steps, o.branch, o.splits, o.roots)
    if o.method == "branchgrpo-mix":
        return make_forest(steps, o.branch, o.splits, o.roots, chosen=window)
    if o.method == "dancegrpo":
        return make_forest(steps, leaves, (0,))
    if o.method == "flowgrpo":
        return make_forest(steps, 2, (), roots=leaves)
    if o.method == "mixgrpo":
        return make_forest(steps, leaves, (window.start,), chosen=window)
    step = int(rng.integers(0, steps - 1))
    chosen = (step, step + 1) if o.method == "flowgrpo-fast" else (step,)
    return make_forest(steps, leaves, (step,), chosen=chosen)


def plan(o, iteration: int) -> Plan:
    """The plan of one iteration, a function of the options, the seed and the iteration alone, so a resumed run agrees.

    timestep_fraction f trains a random ceil(f n) of the n stochastic steps, drawn anew each iteration (DanceGRPO).
    """
    rng = np.random.default_rng([o.seed, iteration, 1])
    forest = forest_at(o, iteration, rng)
    stochastic = [i for i in range(o.steps) if forest.stochastic(i)]
    n = int(np.ceil(o.timestep_fraction * len(stochastic) - 1e-9))
    trained = frozenset(int(i) for i in rng.permutation(stochastic)[:n])
    depth = None
    if o.depth_prune is not None:
        first, last = depth_window_range(forest, o.depth_prune, o.depth_stop)
        depth = (window_start(first, last, iteration, o.iterations, o.depth_every), o.depth_prune)
    return Plan(forest, trained, depth, step_std_weights(o) if o.method == "tempflow" else None)


def step_std_weights(o) -> list[float]:
    """TempFlow-GRPO's loss factors (arXiv:2508.04324): std_i over the steps 0..T-2, scaled to mean 1."""
    sigmas = sigma_schedule(o.steps, o.shift)
    zero = torch.zeros((), dtype=torch.float64)
    args = [(sigmas[i], sigmas[i + 1]) for i in range(o.steps - 1)]
    std = [step_moments(o.sde, zero, zero, a, b, o.eta, float(sigmas[1]))[1].item() for a, b in args]
    return [s * len(std) / sum(std) for s in std] + [0.0]


def noise_sharing(o) -> float:
    """Branch noise s of the method: the option's for trees, infinite (independent siblings) for all others."""
    return o.branch_noise if o.method in TREES else float("inf")
