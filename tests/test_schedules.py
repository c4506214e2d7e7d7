"""Every method of the field as a forest: shape, stochastic steps, how windows slide, what randomness depends on."""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import oracle
import pytest

from schedules import DANCE_STEPS, METHODS, noise_sharing, schedule_of, step_std_weights
from tree import make_forest

T = 20


def options(method, **changed):
    """Resolved options as the paper has them."""
    args = {
        "method": method,
        "steps": T,
        "leaves": 16,
        "branch": 2,
        "splits": (0, 3, 6, 9),
        "roots": 1,
        "branch_noise": 4.0,
        "mix": 4,
        "mix_every": None,
        "iterations": 300,
        "seed": 0,
        "timestep_fraction": 1.0,
        "flash": None,
        "depth_prune": None,
        "depth_stop": None,
        "depth_every": None,
        "sde": "flow",
        "shift": 3.0,
        "eta": 0.7,
    }
    return SimpleNamespace(**(args | changed))


def stochastic(forest):
    """The steps that draw noise."""
    return [i for i in range(forest.steps) if forest.stochastic(i)]


def forests(args, iterations=None):
    """The forests of all iterations, or of the first ones."""
    return [schedule_of(args, i).forest for i in range(iterations or args.iterations)]


def test_the_seven_methods():
    seven = {"branchgrpo", "branchgrpo-mix", "dancegrpo", "flowgrpo", "mixgrpo", "flowgrpo-fast", "tempflow"}
    assert set(METHODS) == seven | {"ode"}  # and rollouts without noise, for objectives that need none
    dance = {"branchgrpo", "branchgrpo-mix", "dancegrpo"}
    assert dance == set(DANCE_STEPS) < set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_16_pictures_at_every_iteration(method):
    for forest in forests(options(method), 40):
        assert forest.steps == T and forest.leaves == 16
        assert set(forest.splits) <= set(stochastic(forest))


@pytest.mark.parametrize("method", METHODS)
def test_siblings_are_correlated_in_trees_alone(method):
    trees = ("branchgrpo", "branchgrpo-mix")
    assert noise_sharing(options(method, branch_noise=2.5)) == (2.5 if method in trees else math.inf)


def test_branchgrpo():
    args = options("branchgrpo", roots=2)
    for forest in forests(args, 3):
        assert (forest.roots, forest.splits) == (2, (0, 3, 6, 9)) and forest.leaves == 32
        assert stochastic(forest) == list(range(T - 1))
        assert [forest.children[i] for i in (0, 1, 3, 9, 19)] == [2, 1, 2, 2, 1]


def test_dancegrpo_shares_the_initial_noise_and_splits_at_once():
    forest = schedule_of(options("dancegrpo", leaves=12), 0).forest
    assert forest.sizes == (1,) + (12,) * T
    assert stochastic(forest) == list(range(T - 1))


def test_flowgrpo_is_independent_trajectories():
    forest = schedule_of(options("flowgrpo", leaves=12), 0).forest
    assert forest.sizes == (12,) * (T + 1) and forest.splits == ()
    assert stochastic(forest) == list(range(T - 1))


def test_branchgrpo_mix_slides_over_17_positions():
    """300 iterations over 17 starts: one later every 300 // 17 = 17 iterations.

    Splits are always stochastic, and the last step never is.
    """
    args = options("branchgrpo-mix")
    starts = oracle.window_positions(0, 16, 300)
    assert len(set(starts)) == 17 and starts[16] == 0 and starts[17] == 1

    # `chosen` holds the last step where the window reaches it, since the paper's NFE counts it.
    for start, forest in zip(starts, forests(args)):
        assert forest.splits == (0, 3, 6, 9)
        assert stochastic(forest) == sorted({0, 3, 6, 9, *range(start, start + 4)} - {T - 1})
        assert [i for i, c in enumerate(forest.chosen) if c] == sorted({0, 3, 6, 9, *range(start, start + 4)})


def test_branchgrpo_mix_moves_every_25_where_told():
    args = options("branchgrpo-mix", mix_every=25, iterations=500)
    for iteration, start in ((0, 0), (24, 0), (25, 1), (174, 6), (175, 7), (399, 15), (400, 16), (499, 16)):
        assert stochastic(schedule_of(args, iteration).forest) == sorted(
            {0, 3, 6, 9, *range(start, min(start + 4, T - 1))}
        )


def test_branchgrpo_mix_of_width_0_leaves_the_splits_alone():
    for forest in forests(options("branchgrpo-mix", mix=0, iterations=40)):
        assert stochastic(forest) == [0, 3, 6, 9]


def test_mixgrpo_splits_at_the_windows_first_step():
    """One initial noise, an ODE prefix, 16 independent children at the window's start, 17 starts for T = 20, w = 4."""
    args = options("mixgrpo")
    for start, forest in zip(oracle.window_positions(0, 16, 300), forests(args)):
        assert forest.sizes == (1,) * (start + 1) + (16,) * (T - start)
        assert stochastic(forest) == [i for i in range(start, start + 4) if i < T - 1]


def test_mixgrpo_of_width_1_never_starts_at_the_ode_step():
    """Its window begins with a split, so the last start is T - 2."""
    for iterations in (19, 40):
        splits = [forest.splits for forest in forests(options("mixgrpo", mix=1, iterations=iterations))]
        assert splits == [(start,) for start in oracle.window_positions(0, 18, iterations)]


@pytest.mark.parametrize("method, after", [("flowgrpo-fast", 2), ("tempflow", 1)])
def test_one_random_step_then_ode(method, after):
    """The split is uniform on 0..T-2 and stochastic, with the next step for Flow-GRPO-Fast and alone for TempFlow.

    400 draws over 19 steps: each count is binomial, mean 21.05, std 4.47; all lie within 5 std.
    """
    counts = np.zeros(T, dtype=int)
    for forest in forests(options(method), 400):
        (step,) = forest.splits
        counts[step] += 1
        assert forest.sizes == (1,) * (step + 1) + (16,) * (T - step)
        assert stochastic(forest) == [i for i in range(step, step + after) if i < T - 1]

    # The last step is never drawn, every other one is, and none too often.
    p = 1 / (T - 1)
    assert counts[T - 1] == 0 and (counts[:-1] > 0).all()
    assert np.abs(counts[:-1] - 400 * p).max() < 5 * math.sqrt(400 * p * (1 - p))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "ode"])  # it has nothing to choose
def test_a_plan_is_a_function_of_seed_and_iteration(method):
    """Asked again, or in another order, an iteration's plan is the same: a resumed run agrees."""
    args = options(method, timestep_fraction=0.5, depth_prune=3)
    forward = [schedule_of(args, i) for i in range(30)]
    np.random.seed(123)  # a global seed has no say
    assert forward == [schedule_of(args, i) for i in reversed(range(30))][::-1]

    # Iterations differ from each other, and seeds do.
    chosen = [p.trained_steps for p in forward]
    if method != "tempflow":  # which has one stochastic step
        assert len(set(chosen)) > 1
        assert chosen != [
            schedule_of(options(method, timestep_fraction=0.5, seed=1), i).trained_steps for i in range(30)
        ]
    if method in ("tempflow", "flowgrpo-fast"):
        assert len({p.forest.splits for p in forward}) > 1
        other = [schedule_of(options(method, seed=1), i).forest.splits for i in range(30)]
        assert [p.forest.splits for p in forward] != other


@pytest.mark.parametrize("fraction", ["0.05", "0.28", "0.5", "0.6", "1"])
@pytest.mark.parametrize("method, changed", [("dancegrpo", {}), ("branchgrpo-mix", {}), ("flowgrpo", {"steps": 26})])
def test_timestep_fraction_trains_the_ceiling(method, changed, fraction):
    """ceil(f n) of the n stochastic steps, with f n computed exactly (0.28 * 25 is 7, in floats 7.000000000000001)."""
    args = options(method, timestep_fraction=float(fraction), **changed)
    for i in range(10):
        p = schedule_of(args, i)
        steps = stochastic(p.forest)
        assert p.trained_steps <= set(steps)
        assert len(p.trained_steps) == math.ceil(Fraction(fraction) * len(steps))


def test_timestep_fraction_reaches_every_step_equally():
    """300 draws of 12 of 19: each step is trained 189.5 +- 8.4 times; all lie within 5 std."""
    counts = np.zeros(T)
    for i in range(300):
        counts[list(schedule_of(options("dancegrpo", timestep_fraction=0.6), i).trained_steps)] += 1
    p = 12 / 19
    assert np.abs(counts[:-1] - 300 * p).max() < 5 * math.sqrt(300 * p * (1 - p))


# ---------------------------------------------------------------------------------------------------------------- depth
def test_the_depth_window_sweeps_from_the_last_split_to_the_stop():
    """Width 5 of T = 20: starts 10..14, one later every 300 // 5 = 60 iterations; off by default."""
    assert schedule_of(options("branchgrpo"), 0).depth_window is None
    args = options("branchgrpo", depth_prune=5)
    want = [(start, 5) for start in oracle.window_positions(10, 14, 300)]
    assert [schedule_of(args, i).depth_window for i in range(300)] == want
    assert want[0] == (10, 5) and want[59] == (10, 5) and want[60] == (11, 5) and want[-1] == (14, 5)
    every = options("branchgrpo", depth_prune=5, depth_every=30)
    assert [schedule_of(every, i).depth_window[0] for i in (0, 29, 30, 119, 120, 299)] == [10, 10, 11, 13, 14, 14]
    stopped = options("branchgrpo", depth_prune=5, depth_stop=15)
    assert [schedule_of(stopped, i).depth_window[0] for i in (0, 149, 150, 299)] == [10, 10, 11, 11]


# ------------------------------------------------------------------------------------------------------------- TempFlow
@pytest.mark.parametrize("sde, eta", [("flow", 0.7), ("dance", 0.3), ("cps", 0.8)])
def test_tempflow_weights_are_the_stds_at_mean_1(sde, eta):
    """w_i = std_i / mean(std over steps 0..T-2); the last step is not trained."""
    args = options("tempflow", sde=sde, eta=eta)
    weights, sigmas = step_std_weights(args), oracle.sigma_schedule(T, 3.0)
    stds = [oracle.step_moments(sde, 0.0, 0.0, *sigmas[i : i + 2], eta, sigmas[1])[1] for i in range(T - 1)]
    assert len(weights) == T
    assert np.mean(weights[:-1]) == pytest.approx(1)
    assert weights[:-1] == pytest.approx([s / np.mean(stds) for s in stds])
    assert np.std(weights[:-1]) > 0.05


def test_only_tempflow_has_step_weights():
    for method in METHODS:
        weights = schedule_of(options(method), 0).step_weight
        assert weights == (step_std_weights(options(method)) if method == "tempflow" else None)


# ----------------------------------------------------------------------------------------------------- adaptive splits
def measured(**variances) -> list[dict]:
    """Rows as metrics.jsonl has them: the evaluation, then iterations with step1=0.3 as variance_step_1."""
    rows = [{f"variance_step_{name[4:]}": v} for name, v in variances.items()]
    return [{"heldout_reward": 1.0}, *rows]


AUTO_ARGS = {"splits": "auto", "steps": 10, "leaves": 4, "mix": 0, "method": "branchgrpo-mix", "seed": 3}


def test_adapted_splits_begin_as_the_spread_ones_then_look_around():
    args = options(**AUTO_ARGS)
    assert schedule_of(args, 0).forest.splits == (0, 4)
    drawn = [schedule_of(args, i, measured(step0=1.0)).forest for i in range(1, 20)]
    assert len({forest.splits for forest in drawn}) > 10 and all(forest.leaves == 4 for forest in drawn)
    assert [f.splits for f in drawn] == [schedule_of(args, i, measured(step0=1.0)).forest.splits for i in range(1, 20)]


def test_adapted_splits_go_where_variance_per_unit_is_largest():
    """Equal variances: the latest steps, which are cheapest. A step with most of it is always taken; noise is not."""
    args, steps = options(**AUTO_ARGS), range(9)
    equal = {f"step{i}": 0.1 for i in steps}
    assert schedule_of(args, 20, measured(**equal)).forest.splits == (7, 8)
    early = equal | {"step1": 2.0}
    assert 1 in schedule_of(args, 20, measured(**early)).forest.splits
    sole = {f"step{i}": -0.1 for i in steps} | {"step5": 1.0}
    best = schedule_of(args, 20, measured(**sole)).forest
    assert 5 in best.splits

    # By hand: the value of every pair, over its units.
    def value(pair):
        forest = make_forest(10, 2, pair, chosen=())
        nodes = forest.sizes[:-1]
        return sum(early[f"step{i}"] for i in pair) / (sum(nodes) + 3 * sum(nodes[i] for i in pair))

    chosen = schedule_of(args, 20, measured(**early)).forest.splits
    assert value(chosen) == max(value((i, j)) for i in steps for j in range(i + 1, 9))


def test_adapted_splits_follow_the_last_measurements():
    """Step 0 had all of the variance once, and none in the last 20 measurements: the mean is over those."""
    args = options(**AUTO_ARGS)
    once = measured(step0=9.0) + measured(**{f"step{i}": 0.1 for i in range(1, 9)}) + measured(step0=0.0) * 20
    assert 0 not in schedule_of(args, 20, once).forest.splits
    assert 0 in schedule_of(args, 20, once[:-10]).forest.splits


def test_adapted_splits_never_stop_looking_around():
    args = options(**AUTO_ARGS)
    rows = measured(**{f"step{i}": 0.1 for i in range(9)})
    splits = [schedule_of(args, i, rows).forest.splits for i in range(20, 60)]
    assert {s for i, s in enumerate(splits, 20) if i % 4 != 3} == {(7, 8)} and len(set(splits)) > 5
