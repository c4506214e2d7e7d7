"""Shape, credit, pruning and counting of the forest: against explicit node objects and trees worked by hand."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import schedules
import tree
from tree import (
    Forest,
    advantages,
    count,
    drop_window,
    fuse,
    keep_extreme,
    keep_largest,
    keep_parent_top1,
    make_forest,
    split_variance,
)

many = settings(max_examples=60, deadline=None, derandomize=True, database=None)
PAPER = (20, 2, (0, 3, 6, 9))


@st.composite
def shapes(draw, splits_needed=False):
    """(steps, branch, splits, roots) with at most 64 leaves."""
    steps, branch, roots = draw(st.integers(2, 12)), draw(st.integers(2, 4)), draw(st.integers(1, 3))

    # roots K^splits is at most 64, and the last step never splits.
    most = int(math.log(64 / roots, branch) + 1e-9)
    possible = st.integers(0, steps - 2)
    splits = draw(st.lists(possible, unique=True, min_size=int(splits_needed), max_size=min(most, steps - 1)))
    return steps, branch, tuple(sorted(splits)), roots


def pair(shape, chosen=None):
    """The project's forest and the oracle's tree of one shape."""
    steps, branch, splits, roots = shape
    return make_forest(steps, branch, splits, roots, chosen), oracle.Tree(roots, steps, branch, splits, chosen)


def tied_rewards(rng, prompts, leaves):
    """Multiples of 1/4 with many ties."""
    return rng.integers(-3, 4, (prompts, leaves)) / 4


def fill(trees, rng):
    """Random log-probs on every stochastic edge; returns (P, leaves) whole-path sums in the project's order."""
    for t in trees:
        for edge in t.edges():
            edge.logp = float(rng.normal(-1, 2)) if t.stochastic(edge.step) else 0.0

    paths = []
    for t in trees:
        paths.append([sum(e.logp for e in leaf.up_to(None) if e.parent is not None) for leaf in t.leaves()])
    return torch.tensor(paths, dtype=torch.float64)


def per_level(trees, attribute):
    """T+1 arrays (P, n_d) of an attribute of the nodes."""
    depths = range(trees[0].steps + 1)
    return [np.array([[getattr(n, attribute) for n in t.level(d)] for t in trees]) for d in depths]


def flat_fused(forest, rewards):
    """Fused rewards under beta = 0."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    return fuse(rewards, torch.zeros_like(rewards), forest, 0.0)


def equal_masks(masks, trees):
    """The project's masks name the same edges as the oracle's `kept`."""
    for i, mask in enumerate(masks):
        assert mask.dtype == torch.bool
        assert mask.tolist() == [[e.kept for e in t.level(i + 1)] for t in trees], f"step {i}"
    return True


# ---------------------------------------------------------------------------------------------------------------- shape
@many
@given(shapes())
def test_shape_is_the_node_trees(shape):
    forest, nodes = pair(shape)
    levels = [nodes.level(d) for d in range(nodes.steps + 1)]
    assert forest.steps == nodes.steps and forest.roots == len(nodes.roots)
    assert forest.sizes == tuple(map(len, levels))
    assert forest.leaves == len(nodes.leaves())
    assert forest.splits == tuple(nodes.splits) and forest.last_split == nodes.last_split
    for i in range(nodes.steps):
        assert forest.parents(i).tolist() == [levels[i].index(child.parent) for child in levels[i + 1]]
        for root, n in enumerate(nodes.roots):
            assert sum(a == root for a in forest.ancestors(0, i).tolist()) == sum(m.depth == i for m in n.walk())


@many
@given(shapes(), st.data())
def test_ancestors_are_found_by_walking(shape, data):
    forest, nodes = pair(shape)
    below = data.draw(st.integers(0, forest.steps))
    depth = data.draw(st.integers(0, below))
    level, want = nodes.level(depth), []
    for n in nodes.level(below):
        while n.depth > depth:
            n = n.parent
        want.append(level.index(n))
    assert forest.ancestors(depth, below).tolist() == want


def test_the_last_step_is_never_stochastic_and_splits_always_are():
    forest = make_forest(6, 2, (1, 3), chosen={4, 5})
    assert [forest.stochastic(i) for i in range(6)] == [False, True, False, True, True, False]
    assert forest.chosen == (False, True, False, True, True, True)
    assert [make_forest(3, 2, ()).stochastic(i) for i in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    "steps, branch, splits, roots",
    [
        (20, 2, (3, 3), 1),
        (20, 2, (3, 0), 1),
        (20, 2, (19,), 1),
        (20, 2, (20,), 1),
        (20, 2, (-1, 3), 1),
        (20, 1, (0,), 1),
        (20, 0, (0,), 1),
        (20, 2, (0,), 0),
    ],
)
def test_bad_trees_are_errors(steps, branch, splits, roots):
    """The message names the flag to change."""
    with pytest.raises(ValueError, match="--(splits|branch|roots) must"):
        make_forest(steps, branch, splits, roots)


def test_the_last_possible_split_is_the_last_but_one_step():
    assert make_forest(20, 2, (18,)).sizes == (1,) * 19 + (2, 2)


def test_a_forest_rejects_contradictions():
    for args in [(1, (2, 1), (False, True)), (1, (1, 2), (True, True)), (1, (1,), ()), (1, (), ()), (0, (1,), (True,))]:
        with pytest.raises(ValueError):
            Forest(*args)
    with pytest.raises(ValueError):
        Forest(1, (0, 1), (True, True))


def test_spread_splits():
    assert tree.spread_splits(20, 2, 16) == (0, 3, 6, 9)
    assert tree.spread_splits(10, 2, 8) == (0, 2, 4)
    assert tree.spread_splits(20, 3, 81) == (0, 3, 6, 9)
    assert tree.spread_splits(20, 2, 16, roots=4) == (0, 9)
    assert tree.spread_splits(20, 4, 4) == (0,)
    assert tree.spread_splits(20, 2, 4, roots=4) == ()


@pytest.mark.parametrize("args", [(4, 2, 8), (20, 1, 16), (20, 2, 4, 5), (20, 2, 4, 0)])
def test_spread_splits_rejects(args):
    with pytest.raises(ValueError):
        tree.spread_splits(*args)


# -------------------------------------------------------------------------------------------------------------- figures
def test_the_papers_tree():
    """1 + 2 + 2 + 2 + 4*3 + 8*3 + 16*11 = 219 nodes; 13.6875 per leaf, where the paper prints 13.68."""
    want = {"leaves": 16, "nodes": 219, "edges": 218, "forwards": 203, "kept": 218, "trainable": 202}
    assert count(make_forest(*PAPER)) == want | {"trained_parents": 187}
    assert (219 / 16, 218 / 16, 203 / 16) == (13.6875, 13.625, 12.6875)


def test_the_papers_prunings():
    """Kept 138 = 8.625 per leaf by Parent-Top1, Extreme-4 and a depth window of 5; a window of 4 leaves 154."""
    variants = tree.count_variants(*PAPER)
    got = {name: (v["kept"], v["trainable"], v["trained_parents"]) for name, v in variants.items()}
    assert got["all"] == (218, 202, 187)
    assert got["parent_top1"] == (138, 130, 115)
    assert got["extreme_4"] == (138, 130, 115)
    assert got["depth_5"] == (138, 122, 107)
    assert got["depth_4"] == (154, 138, 123)
    assert 138 / 16 == 8.625


def test_the_papers_mix():
    """Window of 4 over its 17 starts, splits always in: 68.24 edges = 4.26 per leaf; the oracle counts each start."""
    by_hand = []
    for start in range(17):
        nodes = oracle.Tree(1, *PAPER, chosen=range(start, start + 4))
        oracle.keep_all(nodes)
        by_hand.append(oracle.count(nodes))
    mean = {k: np.mean([c[k] for c in by_hand]) for k in ("kept", "trainable", "trained_parents")}
    assert round(mean["kept"], 2) == 68.24 and round(mean["kept"] / 16, 2) == 4.26
    assert tree.count_variants(*PAPER)["mix_4_mean"] == pytest.approx(mean)


def test_wider_trees():
    """K = 3: 81 leaves, 1008 edges, 12.44 per leaf; K = 4: 256 leaves."""
    three, four = count(make_forest(20, 3, (0, 3, 6, 9))), count(make_forest(20, 4, (0, 3, 6, 9)))
    assert (three["leaves"], three["edges"]) == (81, 1008) and round(1008 / 81, 2) == 12.44
    assert four["leaves"] == 256 and four["edges"] == 4 * 3 + 16 * 3 + 64 * 3 + 256 * 11


def test_cost_in_forwards():
    """Backward = 2: sequential DanceGRPO costs 16 (20 + 3 * 19) = 1232; a tree its forwards + 3 trained parents."""
    flat = count(make_forest(20, 2, (), roots=16))
    full = flat["forwards"] + 3 * flat["trained_parents"]
    assert full == 1232

    # The paper's tree has 203 forwards, whatever is pruned from it.
    variants = tree.count_variants(*PAPER)
    cost = {name: round((203 + 3 * row["trained_parents"]) / full, 3) for name, row in variants.items()}
    assert cost["depth_5"] == 0.425 and cost["parent_top1"] == 0.445 and cost["mix_4_mean"] == 0.292

    # With noise at the splits only, 1 + 2 + 4 + 8 = 15 parents are trained.
    splits_only = count(make_forest(*PAPER, chosen=()))
    assert splits_only["trained_parents"] == 15 and splits_only["trainable"] == 30
    assert round((203 + 3 * 15) / full, 2) == 0.20


def test_variants_that_are_undefined_are_null():
    assert tree.count_variants(10, 2, ())["parent_top1"] is None
    assert tree.count_variants(10, 2, (0, 2))["extreme_4"] is None
    assert tree.count_variants(10, 2, (0, 2, 4))["extreme_4"] is not None


@many
@given(shapes(), st.sets(st.integers(0, 11)))
def test_counts_are_the_oracles(shape, chosen):
    forest, nodes = pair(shape, {i for i in chosen if i < shape[0]})
    oracle.keep_all(nodes)
    assert count(forest) == oracle.count(nodes)


@many
@given(shapes(), st.integers(0, 10**6))
def test_counts_of_any_mask_are_the_oracles(shape, seed):
    """count() reads the first prompt's masks alone."""
    forest, nodes = pair(shape)
    rng, masks = np.random.default_rng(seed), []
    for i in range(forest.steps):
        level = nodes.level(i + 1)
        for edge in level:
            edge.kept = bool(rng.random() < 0.5)
        masks.append(torch.tensor([[e.kept for e in level], [True] * len(level)]))
    assert count(forest, masks) == oracle.count(nodes)


# --------------------------------------------------------------------------------------------------------------- fusion
@many
@given(shapes(), st.floats(0, 2), st.integers(0, 10**6))
def test_fusion_and_advantages_are_the_oracles(shape, beta, seed):
    """Whole-path log-probs serve every depth: the oracle sums log p(l|n) from each node on."""
    rng, (forest, _) = np.random.default_rng(seed), pair(shape)
    trees = [pair(shape)[1] for _ in range(3)]
    paths, rewards = fill(trees, rng), rng.normal(size=(3, forest.leaves))
    for t, r in zip(trees, rewards):
        oracle.fuse(t, r.tolist(), beta)
        oracle.depth_advantages(t, clip=1.5)

    # Eq. 3, then Eq. 4.
    fused = fuse(torch.from_numpy(rewards), paths, forest, beta)
    assert len(fused) == forest.steps + 1 and all(f.dtype == torch.float64 for f in fused)
    for got, want in zip(fused, per_level(trees, "fused")):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-8, atol=1e-10)
    earned = advantages(fused, forest, clip=1.5)
    assert len(earned) == forest.steps
    for got, want in zip(earned, per_level(trees, "advantage")[1:]):
        np.testing.assert_allclose(got.numpy(), want.astype(float), rtol=1e-6, atol=1e-8)


@many
@given(shapes(), st.floats(0, 3), st.integers(0, 10**6))
def test_effective_leaves_is_1_over_the_sum_of_squared_weights(shape, beta, seed):
    forest, nodes = pair(shape)
    paths = fill([nodes], np.random.default_rng(seed))
    want = [1 / sum(w**2 for w in oracle.fusion_weights(root, beta)) for root in nodes.roots]
    assert tree.effective_leaves(paths, forest, beta)[0].tolist() == pytest.approx(want)


def test_a_tree_by_hand_beta_0():
    """Four leaves, splits at steps 0 and 1 of 3, beta = 0, rewards 1 3 4 8.

    centre (1 + 3 + 4 + 8)/4 = 4: leaves -3 -1 0 4; depth 1: (-3 - 1)/2 = -2 and (0 + 4)/2 = 2; root 0.
    depth 1: mean 0, std 2: -2/2.0001, 2/2.0001.
    depths 2 and 3: mean 0, variance (9 + 1 + 0 + 16)/4 = 6.5, std 2.549510.
    """
    forest = make_forest(3, 2, (0, 1))
    fused = flat_fused(forest, [[1, 3, 4, 8]])
    assert fused[0].tolist() == [[0]]
    assert fused[1].tolist() == [[-2, 2]]
    assert fused[2].tolist() == fused[3].tolist() == [[-3, -1, 0, 4]]
    one, two, three = advantages(fused, forest)
    assert one[0].tolist() == pytest.approx([-0.9999500025, 0.9999500025], abs=1e-9)
    assert two[0].tolist() == pytest.approx([-1.1766508, -0.3922169, 0.0, 1.5688677], abs=2e-7)
    assert three.tolist() == two.tolist()


def test_a_tree_by_hand_beta_1():
    """Four leaves, splits at steps 0 and 1 of 3, beta = 1, rewards 0 1 0 1, unequal path log-probs.

    The edges have exp(logp) 1/2 and 5 (to the two nodes at depth 1), then 1 and 3 below the first, 1 and 1 below the
    second.
    centred rewards -1/2 1/2 -1/2 1/2.
    first node: weights 1/4 3/4, fused (-1/2)/4 + (1/2)(3/4) = 1/4; second: weights 1/2 1/2, fused 0.
    root: path products 1/2 3/2 5 5, sum 12; fused (-1/2 + 3/2 - 5 + 5)/24 = 1/24.
    depth 1: mean 1/8, std 1/8, so (+-0.125)/(0.125 + 0.0001) = +-0.99920064.
    """
    edges, below = torch.tensor([0.5, 5.0]).double().log(), torch.tensor([1.0, 3.0, 1.0, 1.0]).double().log()
    paths = (edges.repeat_interleave(2) + below).unsqueeze(0)
    forest = make_forest(3, 2, (0, 1))
    fused = fuse(torch.tensor([[0.0, 1.0, 0.0, 1.0]]), paths, forest, 1.0)
    assert fused[0][0].tolist() == pytest.approx([1 / 24])
    assert fused[1][0].tolist() == pytest.approx([1 / 4, 0], abs=1e-12)
    assert fused[3][0].tolist() == pytest.approx([-0.5, 0.5, -0.5, 0.5])
    assert advantages(fused, forest)[0][0].tolist() == pytest.approx([0.99920064, -0.99920064], abs=1e-8)


@many
@given(shapes(), st.integers(0, 10**6))
def test_beta_0_is_the_plain_mean_over_the_leaves_below(shape, seed):
    forest, nodes = pair(shape)
    rng = np.random.default_rng(seed)
    rewards, paths = rng.normal(size=forest.leaves), rng.normal(size=(1, forest.leaves))
    fused = fuse(torch.from_numpy(rewards[None]), torch.from_numpy(paths), forest, 0.0)
    leaves = nodes.leaves()
    for d, level in enumerate(fused):
        want = [np.mean([rewards[leaves.index(leaf)] for leaf in n.leaves()]) - rewards.mean() for n in nodes.level(d)]
        np.testing.assert_allclose(level[0].numpy(), want, atol=1e-12)


def test_the_part_of_a_path_above_a_node_cancels():
    """A constant added to all path log-probs below one node changes nothing at that node or below it."""
    rng = np.random.default_rng(0)
    forest = make_forest(4, 2, (0, 1))
    rewards, paths = torch.from_numpy(rng.normal(size=(1, 4))), torch.from_numpy(rng.normal(size=(1, 4)))
    moved = paths + torch.tensor([[3.0, 3.0, 0.0, 0.0]])
    before, after = fuse(rewards, paths, forest, 1.0), fuse(rewards, moved, forest, 1.0)
    for d in (1, 2, 3, 4):
        torch.testing.assert_close(before[d], after[d])
    assert abs(before[0] - after[0]).item() > 1e-3


def test_fusion_in_float64_survives_far_rewards_and_log_probs():
    """Rewards of 1e6 +- 1e-3 and path log-probs of -1e4 in float32 still give the z-scores of +-1e-3."""
    forest = make_forest(3, 2, (0, 1))
    rewards = 1e6 + 1e-3 * torch.tensor([[-1.0, 1.0, -1.0, 1.0]], dtype=torch.float64)
    fused = fuse(rewards, torch.full((1, 4), -1e4), forest, 1.0)
    assert fused[-1][0].tolist() == pytest.approx([-1e-3, 1e-3, -1e-3, 1e-3], abs=1e-8)
    assert advantages(fused, forest)[1][0].tolist() == pytest.approx([-1e-3 / 1.1e-3, 1e-3 / 1.1e-3] * 2, rel=1e-6)


# ----------------------------------------------------------------------------------------------------------- advantages
def advantages_of(shape, rewards, paths=None, beta=0.0, eps=tree.EPS, **kwargs):
    forest = make_forest(*shape)
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    paths = torch.zeros_like(rewards) if paths is None else paths
    with mock.patch.object(tree, "EPS", eps):
        return advantages(fuse(rewards, paths, forest, beta), forest, **kwargs)


@many
@given(shapes(), st.integers(0, 10**6))
def test_group_advantages_average_the_z_scores_of_the_leaves_below(shape, seed):
    forest, rng = make_forest(*shape), np.random.default_rng(seed)
    rewards = rng.normal(size=(2, forest.leaves))
    z = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)
    for a, n in zip(advantages_of(shape, rewards, clip=50.0, rule="group"), forest.sizes[1:], strict=True):
        want = z.reshape(2, n, -1).mean(2) if forest.leaves > 1 else np.zeros((2, n))
        np.testing.assert_allclose(a.numpy(), want, atol=1e-9)


@many
@given(shapes(), st.floats(-100, 100), st.floats(0, 2), st.integers(0, 10**6))
def test_a_constant_added_to_all_rewards_changes_nothing(shape, constant, beta, seed):
    forest, rng = make_forest(*shape), np.random.default_rng(seed)
    rewards, paths = torch.from_numpy(rng.normal(size=(2, 2, forest.leaves)))
    before, after = (advantages_of(shape, r, paths, beta) for r in (rewards, rewards + constant))
    for a, b in zip(before, after):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@many
@given(shapes(), st.floats(1, 100), st.integers(0, 10**6))
def test_scaled_rewards_change_advantages_by_eps_alone(shape, scale, seed):
    """(c r)/(c std + eps) = r/(std + eps/c): scaling rewards by c is the same as dividing eps by c."""
    forest, rng = make_forest(*shape), np.random.default_rng(seed)
    rewards = torch.from_numpy(rng.normal(size=(2, forest.leaves)))
    for eps in (0.0, 1e-4):
        pairs = zip(advantages_of(shape, scale * rewards, eps=eps), advantages_of(shape, rewards, eps=eps / scale))
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@many
@given(shapes(), st.integers(0, 10**6))
def test_sibling_advantages_compare_a_node_with_those_of_its_last_split(shape, seed):
    """By enumeration: (fused - mean of the nodes that left the same split node) / (std of the depth + eps)."""
    forest, nodes = pair(shape)
    rewards = np.random.default_rng(seed).normal(size=forest.leaves)
    leaves = nodes.leaves()
    for step, level in enumerate(advantages_of(shape, rewards[None], clip=50.0, rule="sibling")):
        members = nodes.level(step + 1)
        fused = np.array([np.mean([rewards[leaves.index(leaf)] for leaf in n.leaves()]) for n in members])
        splits = [i for i in forest.splits if i <= step]
        for got, member in zip(level[0].tolist(), members, strict=True):
            ancestor = member
            while splits and ancestor.depth > splits[-1]:
                ancestor = ancestor.parent
            family = [f for f, n in zip(fused, members) if not splits or n in ancestor.walk()]
            spread = fused.std()
            assert got == pytest.approx((fused[members.index(member)] - np.mean(family)) / (spread + 1e-4), abs=1e-9)


def test_sibling_advantages_of_the_worked_tree():
    """Rewards 0.2 0.4 0.9 0.5: depth 1 as Eq. 4 has it; below, +-0.1 and +-0.2 over the std of all four, 0.255."""
    levels = advantages_of((4, 2, (0, 1)), [[0.2, 0.4, 0.9, 0.5]], rule="sibling")
    assert levels[0][0].tolist() == pytest.approx([-1, 1], abs=1e-3)
    for level in levels[1:]:
        assert level[0].tolist() == pytest.approx([-0.392, 0.392, 0.784, -0.784], abs=1e-3)


def test_the_rules_agree_on_a_star():
    """One split into all leaves: depth, siblings and group are one and the same set, so flat GRPO is a special case."""
    rewards = np.random.default_rng(0).normal(size=(3, 8))
    first, *others = (advantages_of((5, 8, (0,)), rewards, rule=rule) for rule in tree.ADVANTAGES)
    assert len(others) >= 2
    for other in others:
        for a, b in zip(first, other):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@many
@given(shapes(), st.integers(0, 10**6))
def test_prompts_do_not_see_each_other(shape, seed):
    """Permuting prompts permutes fused rewards, advantages and masks."""
    forest, rng = make_forest(*shape), np.random.default_rng(seed)
    rewards, paths = torch.from_numpy(rng.normal(size=(2, 4, forest.leaves)))
    order = torch.tensor([2, 0, 3, 1])

    def everything(rewards, paths):
        fused = fuse(rewards, paths, forest, 1.0)
        masks = keep_parent_top1(forest, fused[-1]) if forest.splits else []
        masks = masks + (keep_extreme(forest, fused[-1], 1) if forest.leaves >= 2 else [])
        return fused + advantages(fused, forest) + [m.double() for m in masks]

    for a, b in zip(everything(rewards, paths), everything(rewards[order], paths[order])):
        torch.testing.assert_close(a[order], b, rtol=1e-9, atol=1e-12)


@many
@given(shapes(), st.floats(-1e3, 1e3), st.integers(0, 10**6))
def test_equal_rewards_give_exactly_0(shape, reward, seed):
    """At any log-probs: rounding in the softmax must not be blown up by 1/(std + eps)."""
    forest = make_forest(*shape)
    paths = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, forest.leaves)))
    for level in advantages_of(shape, torch.full((1, forest.leaves), reward), paths, 1.0):
        assert (level == 0).all()


def test_a_depth_with_one_node_has_advantage_0():
    """Before the first split, at step 2, there is one node per depth; at it and after there are two, with +-1."""
    levels = advantages_of((5, 2, (2,), 1), [[0.0, 1.0]])
    assert [level.tolist() for level in levels[:2]] == [[[0.0]], [[0.0]]]
    assert all(level[0].tolist() == pytest.approx([-1, 1], abs=1e-3) for level in levels[2:])


def test_the_std_is_that_of_the_population():
    """Rewards 0 0 3 at one depth: mean 1, population variance (1 + 1 + 4)/3 = 2; n - 1 would give 3."""
    level = advantages_of((2, 3, (0,), 1), [[0.0, 0.0, 3.0]], eps=0.0)[0]
    assert level[0].tolist() == pytest.approx([-1 / math.sqrt(2), -1 / math.sqrt(2), math.sqrt(2)])


def test_eps_is_added_to_the_std():
    level = advantages_of((2, 2, (0,), 1), [[0.0, 1.0]], eps=0.5)[0]
    assert level[0].tolist() == pytest.approx([-0.5, 0.5])  # 0.5 / (0.5 + 0.5)


def test_advantages_below_a_std_of_1e_6_are_0():
    """std 0.5e-6 gives exactly 0; std 2e-6 gives 2e-6/(2e-6 + 1e-4)."""
    assert (advantages_of((2, 2, (0,), 1), [[0.0, 1e-6]])[0] == 0).all()
    level = advantages_of((2, 2, (0,), 1), [[0.0, 4e-6]])[0]
    assert level[0].tolist() == pytest.approx([-2e-6 / 102e-6, 2e-6 / 102e-6])


def test_advantages_are_clipped_on_both_sides():
    """One of 64 leaves differs: z = sqrt(63) = 7.94 is cut to 5, and at A_max = 2 to 2."""
    rewards = np.zeros((2, 64))
    rewards[0, 7], rewards[1, 7] = 1, -1
    for clip in (5.0, 2.0):
        level = advantages_of((2, 4, (0,), 16), rewards, clip=clip)[1]
        assert level[0].max() == clip and level[1].min() == -clip
        assert level[0, 0].item() == pytest.approx(-1 / math.sqrt(63), rel=1e-3)
    assert torch.equal(advantages_of((2, 4, (0,), 16), rewards)[1].abs().amax(1), torch.tensor([5.0, 5.0]).double())


def test_a_split_at_the_root_alone_is_flat_grpo():
    """(r - mean)/(std + eps) of the group, at every depth."""
    rewards = np.random.default_rng(0).normal(size=(3, 16))
    want = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)
    for shape in ((8, 16, (0,), 1), (8, 2, (), 16)):
        levels = advantages_of(shape, rewards)
        assert len(levels) == 8
        for level in levels:
            np.testing.assert_allclose(level.numpy(), want, rtol=1e-9)


# -------------------------------------------------------------------------------------------------------------- pruning
@many
@given(shapes(splits_needed=True), st.floats(0, 2), st.integers(0, 10**6))
def test_parent_top1_is_the_oracles(shape, beta, seed):
    rng, (forest, _) = np.random.default_rng(seed), pair(shape)
    trees = [pair(shape)[1] for _ in range(3)]
    paths, rewards = fill(trees, rng), tied_rewards(rng, 3, forest.leaves)
    for t, r in zip(trees, rewards):
        oracle.fuse(t, r.tolist(), beta)
        oracle.prune_parent_top1(t)
    fused = fuse(torch.from_numpy(rewards), paths, forest, beta)
    assert equal_masks(keep_parent_top1(forest, fused[-1]), trees)


@many
@given(shapes(splits_needed=True), st.data(), st.integers(0, 10**6))
def test_extreme_is_the_oracles(shape, data, seed):
    rng, (forest, _) = np.random.default_rng(seed), pair(shape)
    b = data.draw(st.integers(1, forest.leaves // 2))
    trees, rewards = [pair(shape)[1] for _ in range(3)], tied_rewards(rng, 3, forest.leaves)
    for t, r in zip(trees, rewards):
        oracle.fuse(t, r.tolist(), 0.0)
        oracle.prune_extreme(t, b)
    assert equal_masks(keep_extreme(forest, flat_fused(forest, rewards)[-1], b), trees)


@many
@given(shapes(), st.integers(0, 12), st.integers(1, 6))
def test_depth_window_is_the_oracles(shape, start, width):
    forest, nodes = pair(shape)
    oracle.prune_depth(nodes, start, width)
    masks = drop_window(forest, start, width, prompts=2)
    assert all(m.shape == (2, n) for m, n in zip(masks, forest.sizes[1:]))
    assert equal_masks([m[:1] for m in masks], [nodes])
    assert all(torch.equal(m[0], m[1]) for m in masks)


@many
@given(shapes(splits_needed=True), st.integers(0, 12), st.integers(1, 6), st.integers(0, 10**6))
def test_no_pruning_touches_an_edge_at_or_before_the_last_split(shape, start, width, seed):
    forest = make_forest(*shape)
    fused = flat_fused(forest, np.random.default_rng(seed).normal(size=(2, forest.leaves)))
    kinds = (
        keep_parent_top1(forest, fused[-1]),
        keep_extreme(forest, fused[-1], 1),
        drop_window(forest, start, width, 2),
    )
    for masks in kinds:
        assert all(m.all() for m in masks[: forest.last_split + 1])


def test_width_pruning_by_hand():
    """Two parents at the last split (step 1 of 3), leaves 1 5 | 7 2; only the edges of step 2 may go.

    Parent-Top1 keeps leaves 1 and 2; Extreme-1 keeps the best, 2, and the worst, 0.
    """
    forest = make_forest(3, 2, (0, 1))
    fused = flat_fused(forest, [[1, 5, 7, 2]])
    top1, extreme = keep_parent_top1(forest, fused[-1]), keep_extreme(forest, fused[-1], 1)

    # Everything up to the last split stays.
    for masks in (top1, extreme):
        assert masks[0].tolist() == [[True] * 2] and masks[1].tolist() == [[True] * 4]
    assert top1[2].tolist() == [[False, True, True, False]]
    assert extreme[2].tolist() == [[True, False, True, False]]


def test_ties_go_by_leaf_index():
    """All equal: Parent-Top1 keeps every parent's first child; Extreme-b the first b as best, the last b as worst."""
    forest = make_forest(4, 3, (0, 1))

    # Nine leaves, three below each parent of the last split.
    fused = flat_fused(forest, [[2.0] * 9])
    assert keep_parent_top1(forest, fused[-1])[2].tolist() == [[True, False, False] * 3]
    assert keep_extreme(forest, fused[-1], 2)[2].tolist() == [[True] * 2 + [False] * 5 + [True] * 2]

    # Four of nine are equal and best.
    partly = flat_fused(forest, [[1.0, 1, 0, 0, 1, 0, 0, 0, 1]])
    assert keep_extreme(forest, partly[-1], 2)[3].tolist() == [[True, True] + [False] * 4 + [True, True, False]]
    assert keep_parent_top1(forest, partly[-1])[3].tolist() == [
        [True, False, False, False, True, False, False, False, True]
    ]


def test_many_ties_stay_in_order():
    """A sort that is not stable scrambles equal keys once there are more than a few; 64 leaves with two values."""
    forest = make_forest(3, 64, (0,))
    rewards = [[float(j % 2) for j in range(64)]]
    assert keep_parent_top1(forest, flat_fused(forest, rewards)[-1])[2].nonzero()[:, 1].tolist() == [1]
    kept = keep_extreme(forest, flat_fused(forest, rewards)[-1], 3)[2].nonzero()[:, 1].tolist()
    assert kept == [1, 3, 5, 58, 60, 62]


def test_pruning_errors():
    forest, flat = make_forest(4, 2, (0, 1)), make_forest(4, 2, (), roots=4)
    fused = flat_fused(forest, [[1, 2, 3, 4]])
    assert keep_extreme(forest, fused[-1], 2)[-1].all()
    for b in (3, 0, -1):
        with pytest.raises(ValueError):
            keep_extreme(forest, fused[-1], b)
    with pytest.raises(ValueError):
        keep_parent_top1(flat, flat_fused(flat, [[1, 2, 3, 4]])[-1])


def test_both_keeps_what_all_keep():
    a = [torch.tensor([[True, False], [True, True]])]
    b = [torch.tensor([[True, True]])]  # one row serves all prompts
    c = [torch.tensor([[True, True], [False, True]])]
    assert tree.intersect(a, b, c)[0].tolist() == [[True, False], [False, True]]


# -------------------------------------------------------------------------------------------------------------- windows
@many
@given(st.integers(0, 10), st.integers(0, 10), st.integers(1, 60), st.one_of(st.none(), st.integers(1, 7)))
def test_a_window_sweeps_once_and_stays(first, more, iterations, every):
    last = first + more
    starts = [tree.window_start(first, last, i, iterations, every) for i in range(iterations)]
    assert starts == oracle.window_positions(first, last, iterations, every)
    assert starts[0] == first and all(b - a in (0, 1) for a, b in zip(starts, starts[1:]))
    if every is None and iterations > more:
        assert starts[-1] == last
    assert tree.window_start(first, last, 10**6, iterations, every) == last


def test_a_window_whose_last_start_lies_before_its_first_stays_at_the_first():
    assert [tree.window_start(5, 2, i, 10) for i in range(10)] == [5] * 10


def test_paper_windows():
    """Mix 4 of 20: starts 0..16; with every = 25 one later each 25 iterations. Depth 5: 10..14, its end is step 18."""
    args = SimpleNamespace(steps=20, mix=4, iterations=300, mix_every=1)
    assert (schedules.mix_window(args, 0, 20).start, schedules.mix_window(args, 299, 20).start) == (0, 16)
    starts = [tree.window_start(0, 16, i, 300, 25) for i in (0, 24, 25, 49, 50, 299)]
    assert starts == [0, 0, 1, 1, 2, 11]

    # The depth window begins after the last split, 9, and may be told to stop earlier.
    forest = make_forest(*PAPER)
    assert tree.depth_window_range(forest, 5) == (10, 14)
    assert tree.depth_window_range(forest, 5, stop=16) == (10, 12)
    assert tree.depth_window_range(forest, 5, stop=11) == (10, 10)
    assert tree.depth_window_range(forest, 1) == (10, 18)


def test_depth_window_by_hand():
    """Last split at step 1 of 6: a window of 2 from step 2 drops steps 2 and 3; one from 0 may drop only step 2."""
    forest = make_forest(6, 2, (0, 1))
    dropped = [not m.any() for m in drop_window(forest, 2, 2)]
    assert dropped == [False, False, True, True, False, False]
    assert [not m.any() for m in drop_window(forest, 0, 3)] == [False, False, True, False, False, False]
    assert [not m.any() for m in drop_window(forest, 4, 5)] == [False, False, False, False, True, True]


# ------------------------------------------------------------------------------------------------------------------ CLI
def test_the_command_line_prints_one_json_last():
    root = Path(__file__).parent.parent
    command = [sys.executable, "tree.py", "--steps", "20", "--branch", "2", "--splits", "0,3,6,9"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    document = json.loads(done.stdout.splitlines()[-1])
    assert list(document) == ["leaves", "nodes", "edges", "forwards", "variants"]
    assert [document[k] for k in ("leaves", "nodes", "edges", "forwards")] == [16, 219, 218, 203]
    names = {"all", "parent_top1", "extreme_4", "depth_4", "depth_5", "mix_4_mean"}
    assert set(document["variants"]) == names
    assert all(set(v) == {"kept", "trainable", "trained_parents"} for v in document["variants"].values())
    assert document["variants"]["depth_5"] == {"kept": 138, "trainable": 122, "trained_parents": 107}
    assert done.stdout.count("leaf ") >= 16


def test_leaves_stand_for_splits_on_the_command_line(capsys):
    tree.main(["--steps", "10", "--leaves", "8"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    want = oracle.Tree(1, 10, 2, (0, 2, 4))
    assert document["leaves"] == 8 and document["nodes"] == len(want.nodes())


@pytest.mark.parametrize(
    "flags",
    ["--splits 3,3", "--splits 6,3", "--splits 19", "--splits a,b", "--branch 1", "--roots 0", "--leaves 0", "--nope"],
)
def test_bad_flags_exit_2(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        tree.main(flags.split())
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err


def test_the_drawing_has_a_row_a_leaf_and_shows_every_split():
    """Each split of K makes K - 1 new rows, each begun by a corner or a tee; T steps are 2 T characters wide."""
    rows = tree.draw(make_forest(5, 3, (0, 2), roots=2)).splitlines()
    assert len(rows) == 18 and [r.split()[-1] for r in rows] == [str(j) for j in range(18)]
    text = "\n".join(rows)
    assert text.count("┬") == 2 * (1 + 3) and text.count("└") == 2 * (1 + 3) and text.count("├") == 2 * (1 + 3)
    assert text.count("o") == 2 and all(r.index(" leaf") == 1 + 2 * 5 for r in rows)


def test_a_drawing_by_hand():
    """K = 2, splits at steps 0 and 2 of 4: a corner per second child, a bar where a later sibling's line passes."""
    assert tree.draw(make_forest(4, 2, (0, 2))).splitlines() == [
        "o┬───┬─── leaf 0",
        " │   └─── leaf 1",
        " └───┬─── leaf 2",
        "     └─── leaf 3",
    ]


# ------------------------------------------------------------------------------------------------ analysis of variance
def test_variance_of_splits_by_hand():
    """Rewards 1 1 5 5: the first split makes all of it, var(1, 5) = 8. Rewards 1 3 1 3: the second, var(1, 3) = 2."""
    forest = make_forest(3, 2, (0, 1))
    assert split_variance(torch.tensor([[1.0, 1.0, 5.0, 5.0]]), forest) == {0: 8.0, 1: 0.0}
    assert split_variance(torch.tensor([[1.0, 3.0, 1.0, 3.0]]), forest) == {0: -1.0, 1: 2.0}
    assert split_variance(torch.ones(2, 3), make_forest(3, 2, (), roots=3)) == {}


def test_variance_of_splits_is_unbiased():
    """Effects of known variance at three splits, K = 3: the mean estimate over 20,000 trees is that variance."""
    forest, variances = make_forest(5, 3, (0, 1, 3)), {0: 0.5, 1: 2.0, 3: 1.0}
    g, rewards = torch.Generator().manual_seed(0), torch.zeros(20000, 27)
    for i, v in variances.items():
        effects = v**0.5 * torch.randn(20000, forest.sizes[i + 1], generator=g)
        rewards += effects.repeat_interleave(27 // forest.sizes[i + 1], 1)
    estimated = split_variance(rewards, forest)
    assert all(estimated[i] == pytest.approx(v, rel=0.05) for i, v in variances.items())


# ---------------------------------------------------------------------------------------------------- pruning by size
def test_the_largest_parents_by_hand():
    """Sizes of the parents of step 1 are |0.1| + |-0.9| = 1.0 and 0.5 + 0.2 = 0.7: of two, half is the first."""
    forest = make_forest(3, 2, (0, 1))
    advantages = [torch.tensor([[1.0, -1.0]]), torch.tensor([[0.1, -0.9, 0.5, 0.2]]), torch.zeros(1, 4)]
    kept = keep_largest(forest, advantages, 0.5)
    assert [mask.tolist() for mask in kept] == [
        [[True] * 2],
        [[True, True, False, False]],
        [[True, True, False, False]],
    ]
    assert all(mask.all() for mask in keep_largest(forest, advantages, 1.0))


@many
@given(shapes(), st.sampled_from([0.1, 0.3, 0.5, 0.9]), st.integers(0, 9))
def test_every_prompt_keeps_equally_many_parents(shape, fraction, seed):
    """ceil(fraction n_i) of them, whole families, and none that is left out is larger than one that is kept."""
    forest = make_forest(*shape)
    rng = np.random.default_rng(seed)
    levels = [torch.from_numpy(np.round(rng.normal(size=(3, n)), 1)) for n in forest.sizes[1:]]
    for i, (mask, level) in enumerate(zip(keep_largest(forest, levels, fraction), levels)):
        families = mask.unflatten(1, (forest.sizes[i], -1))
        assert torch.equal(families.any(2), families.all(2))
        kept = families.all(2)
        assert (kept.sum(1) == math.ceil(fraction * forest.sizes[i] - 1e-9)).all()
        size = level.abs().unflatten(1, (forest.sizes[i], -1)).sum(2)
        for p in range(3):
            if not kept[p].all():
                assert size[p][kept[p]].min() >= size[p][~kept[p]].max()
