"""Every method of the field as a forest with a schedule; the trainer is the same for all of them.

Idea: methods differ in how many initial noises a prompt has, where trajectories branch, and which steps draw noise.
Those three things are a Forest (tree.py), so each method is one function from the iteration to a forest.

| method         | roots  | splits             | K      | stochastic steps                           | siblings share |
|----------------|--------|--------------------|--------|--------------------------------------------|----------------|
| branchgrpo     | 1      | 0,3,6,9 of 20      | 2      | all                                        | noise, s = 4   |
| branchgrpo-mix | 1      | 0,3,6,9            | 2      | splits + a sliding window of --mix steps   | noise, s = 4   |
| dancegrpo      | 1      | 0                  | leaves | all                                        | initial noise  |
| flowgrpo       | leaves | none               | -      | all                                        | nothing        |
| mixgrpo        | 1      | the window's first | leaves | a window that slides over training         | ODE prefix     |
| flowgrpo-fast  | 1      | one random step    | leaves | that step and the next                     | ODE prefix     |
| tempflow       | 1      | one random step    | leaves | that step; loss weight std_i, of mean 1    | ODE prefix     |
| ode            | leaves | none               | -      | none: for objectives on noised leaves      | nothing        |

1. METHODS        method -> the forest of an iteration
2. schedule_of    that forest with what changes over training: noise levels, trained steps, depth window, loss weights

Direction of time: step 0 is the noisiest. An iteration is one rollout of all its prompts; windows slide with it.

Departures: where a method's code draws a random choice for each sample, here it is drawn once per iteration, so that
all forests of an iteration are regular and one batch. Everything is a function of options, seed and iteration, so a
resumed run draws the same.
"""

import itertools
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch

from branchgrpo import prune
from sde import sigma_schedule, step_moments
from tree import Forest, depth_window_range, make_forest, spread_splits, window_start

AUTO = "auto"  # the value of --splits that lets them move


# ------------------------------------------------------------------------------------------- a forest for each method
def mix_window(args, iteration: int, last_start: int) -> range:
    """The stochastic window of --mix steps: one step later every --mix-every iterations, up to `last_start`."""
    start = window_start(0, min(args.steps - args.mix, last_start), iteration, args.iterations, args.mix_every)
    return range(start, start + args.mix)


def branchgrpo(args, iteration: int, rng: np.random.Generator) -> Forest:
    """The paper's tree, every step stochastic but the last."""
    return make_forest(args.steps, args.branch, args.splits, args.roots)


def branchgrpo_mix(args, iteration: int, rng: np.random.Generator) -> Forest:
    """The paper's tree, stochastic at its splits and in the sliding window only."""
    window = mix_window(args, iteration, last_start=args.steps)
    return make_forest(args.steps, args.branch, args.splits, args.roots, chosen=window)


def dancegrpo(args, iteration: int, rng: np.random.Generator) -> Forest:
    """Independent trajectories from one shared initial noise: a split into all leaves at step 0."""
    return make_forest(args.steps, args.leaves, (0,))


def flowgrpo(args, iteration: int, rng: np.random.Generator) -> Forest:
    """Independent trajectories from initial noises of their own: as many roots as leaves."""
    return make_forest(args.steps, 2, (), roots=args.leaves)


def mixgrpo(args, iteration: int, rng: np.random.Generator) -> Forest:
    """A shared ODE prefix, then independent trajectories, stochastic inside the window only."""
    # The window starts with a split, and the last step, which is deterministic, cannot be one.
    window = mix_window(args, iteration, last_start=args.steps - 2)
    return make_forest(args.steps, args.leaves, (window.start,), chosen=window)


def flowgrpo_fast(args, iteration: int, rng: np.random.Generator) -> Forest:
    """A shared ODE prefix to a random step; that step and, unless it is the last, the next are stochastic."""
    step = int(rng.integers(0, args.steps - 1))
    return make_forest(args.steps, args.leaves, (step,), chosen=(step, step + 1))


def tempflow(args, iteration: int, rng: np.random.Generator) -> Forest:
    """A shared ODE prefix to a random step, the only stochastic one."""
    step = int(rng.integers(0, args.steps - 1))
    return make_forest(args.steps, args.leaves, (step,), chosen=())


def ode(args, iteration: int, rng: np.random.Generator) -> Forest:
    """Independent deterministic trajectories, for objectives that need no density (--objective elbo, nft)."""
    return make_forest(args.steps, 2, (), roots=args.leaves, chosen=())


METHODS = {  # --method -> the forest of an iteration
    "branchgrpo": branchgrpo,
    "branchgrpo-mix": branchgrpo_mix,
    "dancegrpo": dancegrpo,
    "flowgrpo": flowgrpo,
    "mixgrpo": mixgrpo,
    "flowgrpo-fast": flowgrpo_fast,
    "tempflow": tempflow,
    "ode": ode,
}
TREES = ("branchgrpo", "branchgrpo-mix")  # shaped by the tree flags; the shapes of the others are fixed
WINDOWED = ("branchgrpo-mix", "mixgrpo")
DANCE_STEPS = (*TREES, "dancegrpo")  # published with dance steps, the others with flow steps


# ----------------------------------------------------------------------------------------- the schedule of an iteration
@dataclass(frozen=True)
class Schedule:
    """What one iteration does.

    forest: its shape and its stochastic steps; T is its number of steps. sigmas: (T+1,) noise levels. trained_steps:
    the stochastic steps that are trained. depth_window: (start, width) of the steps that depth pruning drops, or None.
    step_weight: (T,) factors of the loss, or None for ones.
    """

    forest: Forest
    sigmas: torch.Tensor = field(compare=False)
    trained_steps: frozenset[int]
    depth_window: tuple[int, int] | None
    step_weight: list[float] | None


def units_of(forest: Forest) -> int:
    """What a prompt's forest costs, in forwards: one per node that has children, and three per trained parent."""
    return sum(forest.sizes[:-1]) + 3 * sum(n for i, n in enumerate(forest.sizes[:-1]) if forest.stochastic(i))


def adapted_splits(args, iteration: int, history: list[dict]) -> tuple[int, ...]:
    """--splits auto: the split steps that explain most of the reward's variance per evaluation.

    v_i, the variance that a split at step i makes (tree.split_variance), is the mean of its last 20 measurements in the
    rows of metrics; a step that was never split has the mean of the others. Of all sets S of as many splits that with
    the largest sum_{i in S} v_i / units(S) is taken: an early split is dearer, since all that follows is walked by more
    nodes. Every fourth iteration, and in the first 2 T, a set is drawn at random, or what was bad once would never be
    measured again.

    Everything is read from the rows, which checkpoints keep, so a resumed run makes the same choices.
    """
    start = spread_splits(args.steps, args.branch, args.leaves, args.roots)
    measured: dict[int, list[float]] = {}
    for row in history:
        for name in filter(lambda name: name.startswith("variance_step_"), row):
            measured.setdefault(int(name.rsplit("_", 1)[1]), []).append(row[name])
    if not measured:
        return start

    # The last step is deterministic, so it cannot split. Of many steps every second or third is a candidate.
    candidates = range(0, args.steps - 1, 1 + (args.steps - 2) // 20)
    sets = list(itertools.combinations(candidates, len(start)))
    if iteration < 2 * args.steps or iteration % 4 == 3:
        return sets[np.random.default_rng([args.seed, iteration, 4]).integers(len(sets))]

    v = {i: float(np.mean(values[-20:])) for i, values in measured.items()}
    unknown = float(np.mean(list(v.values())))

    def per_unit(splits: tuple[int, ...]) -> float:
        forest = METHODS[args.method](SimpleNamespace(**vars(args) | {"splits": splits}), iteration, None)
        forest = forest.with_tail(args.flash) if args.flash else forest
        return sum(max(v.get(i, unknown), 0.0) for i in splits) / units_of(forest)

    return max(sets, key=per_unit)


def schedule_of(args, iteration: int, history: list[dict] = ()) -> Schedule:
    """The schedule of one iteration, a function of the options, the seed, the iteration and the rows before it.

    history: the rows of metrics, which only --splits auto reads.

    timestep_fraction f trains a random ceil(f N) of the N stochastic steps, drawn anew in each iteration, the same for
    all leaves (DanceGRPO draws for every sample, and rounds down).
    """
    if args.splits == AUTO:
        args = SimpleNamespace(**vars(args) | {"splits": adapted_splits(args, iteration, history)})
    rng = np.random.default_rng([args.seed, iteration, 1])  # the last number is this stream's; that of prompts is 2
    forest = METHODS[args.method](args, iteration, rng)

    # A flash tail walks what follows the last noise in fewer steps: forest and noise levels are shortened together.
    short_tail = None
    if args.flash:
        k, forest = forest.last_stochastic + 1, forest.with_tail(args.flash)
        short_tail = (k, forest.steps - k)
    sigmas = sigma_schedule(args.steps, args.shift, short_tail)

    # ceil(f N); the small number is there because 0.07 * 100, say, is 7.000000000000001 and would become 8.
    stochastic = [i for i in range(forest.steps) if forest.stochastic(i)]
    n_trained = int(np.ceil(args.timestep_fraction * len(stochastic) - 1e-9))
    trained = frozenset(int(i) for i in rng.permutation(stochastic)[:n_trained])

    # Depth pruning: the window slides from just after the last split towards the picture.
    depth_window = None
    if args.depth_prune is not None:
        first, last = depth_window_range(forest, args.depth_prune, args.depth_stop)
        start = window_start(first, last, iteration, args.iterations, args.depth_every)
        depth_window = (start, args.depth_prune)

    step_weight = step_std_weights(args) if args.method == "tempflow" else None
    return Schedule(forest, sigmas, trained, depth_window, step_weight)


def kept_edges(args, schedule: Schedule, rewards: torch.Tensor, advantages: list[torch.Tensor]) -> list[torch.Tensor]:
    """The edges that a run's options leave to train, by `branchgrpo.prune`: T bool masks (P, n_{i+1}).

    Args:
        rewards: (P, leaves), which rank the leaves. advantages: T tensors (P, n_{i+1}).
    """
    windows = (args.width_prune, schedule.depth_window, schedule.trained_steps, args.size_prune)
    return prune(schedule.forest, rewards, *windows, advantages)


def step_std_weights(args) -> list[float]:
    """TempFlow-GRPO's loss factors (arXiv:2508.04324): std_i over the steps 0..T-2, scaled to mean 1; 0 for the
    last."""
    sigmas = sigma_schedule(args.steps, args.shift)

    # The std of a step does not depend on the latents, so zeros stand for them.
    zero = torch.zeros((), dtype=torch.float64)
    levels = [(sigmas[i], sigmas[i + 1]) for i in range(args.steps - 1)]
    std = [step_moments(args.sde, zero, zero, a, b, args.eta, float(sigmas[1]))[1].item() for a, b in levels]
    return [s * len(std) / sum(std) for s in std] + [0.0]


def noise_sharing(args) -> float:
    """Branch noise s of the method: the option's for trees, infinite (independent siblings) for all others."""
    return args.branch_noise if args.method in TREES else float("inf")
