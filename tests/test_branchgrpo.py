"""The algorithm end to end on a toy policy of 48 parameters, in float64: every number against a walk over nodes."""

import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler

import branchgrpo
from branchgrpo import (
    NonFinite,
    Sampler,
    clipped_loss,
    credit,
    flatten_edges,
    generators,
    prune,
    repeat_cond,
    rollout,
    rows_chosen,
    sample_ode,
    split_parents,
    surrogate,
    take_rows,
    update,
)
from schedules import schedule_of
from sde import branch_noise, second_order, sigma_schedule, step_moments
from tree import fuse, keep_chosen, make_forest

SHAPE = (3, 2)
DIM = 6


@pytest.fixture(autouse=True)
def float64():
    """Everything in double precision, so that no tolerance has to make room for rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Toy:
    """A policy as policy.py describes, with recorded calls: v = (tanh(W x + b sigma) + shift g) (1 + shift/5).

    shift is a prompt's: 0.3 for each of its letters.
    """

    latent_shape = SHAPE

    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.transformer = torch.nn.Module()
        self.transformer.w = torch.nn.Parameter(torch.randn(DIM, DIM, generator=g) / 2)
        self.transformer.b = torch.nn.Parameter(torch.randn(DIM, generator=g))
        self.transformer.g = torch.nn.Parameter(torch.randn(DIM, generator=g))
        self.reference = {n: p.detach().clone() for n, p in self.transformer.named_parameters()}
        self.calls = []

    def trainable(self):
        return list(self.transformer.parameters())

    def encode(self, prompts):
        """Two entries, of different ranks, that both matter."""
        shift = torch.tensor([0.3 * len(p) for p in prompts])
        return {"shift": shift.unsqueeze(1), "scale": 1 + shift.view(-1, 1, 1) * torch.ones(1, *SHAPE) / 5}

    def velocity(self, x, sigma, cond, reference=False):
        self.calls.append(len(x))
        assert sigma.shape == (len(x),) and all(len(c) == len(x) for c in cond.values())
        parameters = self.reference if reference else dict(self.transformer.named_parameters())
        w, b, g = (parameters[name].to(x) for name in ("w", "b", "g"))
        v = torch.tanh(x.flatten(1) @ w.T + b * sigma[:, None]) + cond["shift"].to(x) * g
        return v.view_as(x) * cond["scale"].to(x)

    def numpy(self, prompt, theta=None):
        """The velocity of one prompt on one latent, from a flat parameter vector."""
        if theta is None:
            theta = self.flat()
        w, b, g = theta[: DIM * DIM].reshape(DIM, DIM), theta[DIM * DIM : -DIM], theta[-DIM:]
        shift = 0.3 * len(prompt)
        return lambda x, sigma: ((np.tanh(w @ x.ravel() + b * sigma) + shift * g) * (1 + shift / 5)).reshape(SHAPE)

    def flat(self):
        """All parameters in one vector."""
        return torch.cat([p.detach().flatten() for p in self.trainable()]).numpy().copy()

    def perturb(self, size, seed=1):
        """Move off the parameters of the rollout, so that ratios leave 1."""
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.trainable():
                p.add_(size * torch.randn(p.shape, generator=g))


PROMPTS = ["a", "four", "prompts!"]
KINDS = [("dance", 0.8, "true"), ("flow", 0.7, "true"), ("cps", 0.8, "true"), ("cps", 0.8, "upstream")]


def case(steps=5, branch=2, splits=(0, 2), roots=1, chosen=None, kind="dance", eta=0.8, s=4.0, density="true"):
    """A forest, its sampler, and a function that makes the oracle's node trees."""
    forest = make_forest(steps, branch, splits, roots, chosen)
    sampler = Sampler(sigma_schedule(steps, 3.0), kind, eta, s, density)
    trees = [oracle.Tree(roots, steps, branch, splits, chosen) for _ in PROMPTS]
    return forest, sampler, trees


def rolled(forest, sampler, trees, seed=0, **kwargs):
    """The project's rollout, and the oracle's on noises drawn again from the same generators."""
    policy = Toy()
    slots = range(len(PROMPTS))
    out = rollout(policy, policy.encode(PROMPTS), forest, sampler, generators(seed, 7, slots), **kwargs)

    # The same generators give the same noises: first the roots', then depth by depth.
    sigmas = oracle.sigma_schedule(forest.steps, 3.0)
    for tree, prompt, g in zip(trees, PROMPTS, generators(seed, 7, slots)):
        initial, noises = torch.randn(forest.roots, *SHAPE, generator=g).numpy(), {}
        for i in range(forest.steps):
            if tree.stochastic(i):
                k = len(tree.level(i)[0].children)
                noises[i] = branch_noise(len(tree.level(i)), k, SHAPE, sampler.s, g).numpy()
        velocity = policy.numpy(prompt)
        oracle.sample(tree, velocity, sigmas, sampler.kind, sampler.eta, initial, noises, sampler.density)
    return policy, out


def rewards_for(forest, seed=0):
    """Leaf rewards (P, leaves)."""
    return np.random.default_rng(seed).normal(size=(len(PROMPTS), forest.leaves))


def credited(forest, trees, out, beta=1.0, width=None, depth=None):
    """Credit and masks, on both sides."""
    rewards = rewards_for(forest)
    advantages = credit(out, forest, torch.from_numpy(rewards), beta, 5.0)
    keep = prune(forest, torch.from_numpy(rewards), width, depth)

    # The oracle marks its own nodes and edges.
    for tree, r in zip(trees, rewards):
        oracle.fuse(tree, r.tolist(), beta)
        oracle.depth_advantages(tree)
        oracle.keep_all(tree)
        if width == "parent-top1":
            oracle.prune_parent_top1(tree)
        elif width is not None:
            oracle.prune_extreme(tree, width)
        if depth is not None:
            oracle.prune_depth(tree, *depth)
    return advantages, keep


def settings(**changed):
    """The options that `update` reads."""
    args = {"clip": 0.05, "kl": 0.0, "micro_batch": 0, "max_grad_norm": 0.0}
    return SimpleNamespace(**(args | changed))


def step(policy, edges, sampler, prompts=PROMPTS, accelerator=None, objective=surrogate, on_policy=False, **changed):
    """update() under SGD at rate 1: its log, and the gradient as (parameters before) - (after)."""
    before = policy.flat()
    optimizer = torch.optim.SGD(policy.trainable(), lr=1.0)
    accelerator = accelerator or Accelerator(cpu=True)
    options = settings(**changed)
    log = update(policy, optimizer, accelerator, edges, policy.encode(prompts), sampler, options, objective, on_policy)
    gradient = before - policy.flat()

    # The parameters are put back, so that the next step starts from the same.
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(torch.from_numpy(before), policy.trainable())
    return log, gradient


ALL = torch.arange(len(PROMPTS))


# -------------------------------------------------------------------------------------------------------------- rollout
FORESTS = [
    {},
    {"branch": 3, "splits": (1,), "roots": 2},
    {"steps": 6, "splits": (0, 1, 3), "chosen": {2}},
    {"splits": (), "roots": 3},
    {"splits": (2,), "branch": 4, "chosen": {2, 3, 4}},
]


@pytest.mark.parametrize("tail, splits", [(1, (0, 2)), (2, (0, 2)), (3, (0,)), (5, (0, 1))])
def test_the_tail_is_dpm_solver_of_diffusers(tail, splits):
    """Each leaf's walk after the last noise, by diffusers' DPMSolverMultistepScheduler on our noise levels."""
    args = SimpleNamespace(method="branchgrpo-mix", steps=10, branch=2, splits=splits, roots=1, mix=0, mix_every=None)
    for name, value in (("iterations", 9), ("seed", 0), ("timestep_fraction", 1.0), ("depth_prune", None)):
        setattr(args, name, value)
    args.flash, args.shift = tail, 3.0

    # The noise levels: up to the last noise as without a tail, then even in u.
    schedule, policy = schedule_of(args, 0), Toy()
    k, forest = splits[-1] + 1, schedule.forest
    assert forest.steps == k + tail and forest.leaves == 2 ** len(splits)
    torch.testing.assert_close(schedule.sigmas[: k + 1], sigma_schedule(10, 3.0)[: k + 1])
    u = schedule.sigmas[k:] / (3 - 2 * schedule.sigmas[k:])  # undo the shift: the tail's steps are even
    assert u.diff().std() < 1e-12 or tail == 1

    # Our rollout, then diffusers' walk from where our tail began.
    sampler = Sampler(schedule.sigmas, "cps", 0.7, flash=True)
    out = rollout(policy, policy.encode(PROMPTS), forest, sampler, generators(0, 0, range(3)))
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    solver.set_timesteps(tail)
    solver.sigmas = schedule.sigmas[k:].float()
    x = out.latents[k].flatten(0, 1)
    cond = repeat_cond(policy.encode(PROMPTS), forest.leaves)
    for i, t in enumerate(solver.timesteps):
        v = policy.velocity(x, schedule.sigmas[k + i].float().expand(len(x)), cond)
        x = solver.step(v, t, x).prev_sample
        torch.testing.assert_close(out.latents[k + i + 1].flatten(0, 1), x, atol=2e-6, rtol=1e-5)


def test_second_order_steps_are_nearer_to_the_fine_walk_than_euler():
    policy, x0 = Toy(), torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    cond = policy.encode(PROMPTS)

    def walk(steps, better):
        sigmas, x, before = torch.linspace(0.9, 0, steps + 1), x0, None
        for i in range(steps):
            v = policy.velocity(x, sigmas[i].expand(3), cond)
            x0hat = x - sigmas[i] * v
            if better and 0 < i < steps - 1:
                x = second_order(x, x0hat, before, sigmas[i - 1 : i + 2].tolist())
            else:
                x = x + v * (sigmas[i + 1] - sigmas[i])
            before = x0hat
        return x

    # In twelve steps, against Euler's in four thousand.
    exact = walk(4000, False)
    ends = {better: (walk(12, better) - exact).abs().max() for better in (False, True)}
    assert ends[True] < ends[False] / 2


@pytest.mark.parametrize("changed", FORESTS)
@pytest.mark.parametrize("kind, eta, density", KINDS)
def test_rollout_is_the_oracles(changed, kind, eta, density):
    """Latents, log-probs and path sums of every node of every prompt, on the same noises."""
    forest, sampler, trees = case(kind=kind, eta=eta, density=density, **changed)
    _, out = rolled(forest, sampler, trees)
    assert len(out.latents) == forest.steps + 1 and len(out.logp_mean) == forest.steps
    for d in range(forest.steps + 1):
        want = np.array([[n.latent for n in tree.level(d)] for tree in trees])
        np.testing.assert_allclose(out.latents[d].numpy(), want, rtol=1e-9, atol=1e-10)
    for i in range(forest.steps):
        want = np.array([[n.logp for n in tree.level(i + 1)] for tree in trees])
        np.testing.assert_allclose(out.logp_mean[i].numpy(), want, rtol=1e-9, atol=1e-10)
    want = [[sum(e.logp for e in leaf.up_to(None)) for leaf in tree.leaves()] for tree in trees]
    np.testing.assert_allclose(out.path_logp(forest).numpy(), want, rtol=1e-9)


def test_logp_is_that_of_the_stored_latents_under_the_step_of_their_parent():
    """log N(child; mean(parent), std), recomputed through torch.distributions, for every stochastic edge."""
    forest, sampler, trees = case(steps=6, branch=3, splits=(0, 3))
    policy, out = rolled(forest, sampler, trees)
    for i in range(forest.steps - 1):
        parents = out.latents[i][:, forest.parents(i)]  # (P, n_{i+1}, ...)
        for p, prompt in enumerate(PROMPTS):
            cond = policy.encode([prompt] * parents.shape[1])
            sigma, sigma_next = sampler.sigmas[i : i + 2]
            v = policy.velocity(parents[p], sigma.expand(len(parents[p])), cond)
            moments = step_moments("dance", parents[p], v, sigma, sigma_next, sampler.eta, float(sampler.sigmas[1]))
            normal = torch.distributions.Normal(*torch.broadcast_tensors(*moments))
            want = normal.log_prob(out.latents[i + 1][p]).mean((1, 2))
            torch.testing.assert_close(out.logp_mean[i][p], want)


def test_siblings_without_noise_of_their_own_are_equal():
    """s = 0, 4 roots, K = 3: the children of a parent agree, those of two parents do not."""
    forest, sampler, trees = case(splits=(2,), branch=3, roots=4, s=0.0)
    _, out = rolled(forest, sampler, trees)
    children = out.latents[3].unflatten(1, (4, 3))
    assert torch.equal(children, children[:, :, :1].expand_as(children))
    assert (children[:, 0, 0] - children[:, 1, 0]).abs().amin() > 0


def test_children_average_to_the_step_of_their_own_parent(k=3000):
    """For each parent, the mean of its K independent children is within 6 std/sqrt(K) of the step's mean from it."""
    forest = make_forest(3, k, (1,), roots=2)
    sampler = Sampler(sigma_schedule(3, 3.0), "flow", 0.7, float("inf"))
    policy = Toy()
    out = rollout(policy, policy.encode(PROMPTS), forest, sampler, generators(0, 0, range(3)))
    sigmas = oracle.sigma_schedule(3, 3.0)
    for p, prompt in enumerate(PROMPTS):
        for parent in range(2):
            x = out.latents[1][p, parent].numpy()
            v = policy.numpy(prompt)(x, sigmas[1])
            mean, std = oracle.step_moments("flow", x, v, sigmas[1], sigmas[2], 0.7, sigmas[1])
            children = out.latents[2][p].unflatten(0, (2, k))[parent]
            assert np.abs(children.mean(0).numpy() - mean).max() < 6 * std / np.sqrt(k)
            assert np.abs(children.std(0).numpy() / std - 1).max() < 6 / np.sqrt(2 * k)


def test_one_call_a_depth_for_all_prompts_and_nodes():
    """3 prompts, splits at 0 and 2 of 5: batches 3, 6, 6, 12, 12; in micro-batches of 5: 3, 5 1, 5 1, 5 5 2, 5 5 2."""
    policy, _ = rolled(*case())
    assert policy.calls == [3, 6, 6, 12, 12]
    policy, _ = rolled(*case(), micro_batch=5)
    assert policy.calls == [3, 5, 1, 5, 1, 5, 5, 2, 5, 5, 2]


def test_chosen_rows_by_hand():
    """Prompts 0 and 2 of three, three nodes each: the indices of their chosen nodes among all nine, and the nodes."""
    rows = rows_chosen(torch.tensor([[1, 0, 0], [0, 1, 1]]).bool(), torch.tensor([0, 2]))
    assert rows.tolist() == [0, 7, 8]
    assert take_rows(10 * torch.arange(9).view(3, 3), rows).tolist() == [0, 70, 80]


@pytest.mark.parametrize("micro_batch", [1, 4, 6, 100])
def test_micro_batches_change_nothing(micro_batch):
    _, whole = rolled(*case())
    _, batched = rolled(*case(), micro_batch=micro_batch)
    for a, b in zip(whole.latents + whole.logp_mean, batched.latents + batched.logp_mean):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_deterministic_steps_are_ode_and_have_no_density():
    """Splits at 1, window {3}: steps 0, 2 and the last draw no noise, have logp 0 and add sigma' - sigma times v."""
    forest, sampler, trees = case(steps=6, splits=(1,), chosen={3, 5})
    policy, out = rolled(forest, sampler, trees)
    for i in (0, 2, 4, 5):
        assert (out.logp_mean[i] == 0).all()
        sigma, sigma_next = sampler.sigmas[i : i + 2]
        for p, prompt in enumerate(PROMPTS):
            x = out.latents[i][p]
            v = np.stack([policy.numpy(prompt)(row.numpy(), float(sigma)) for row in x])
            want = x.numpy() + v * float(sigma_next - sigma)
            np.testing.assert_allclose(out.latents[i + 1][p].numpy(), want, rtol=1e-10)
    for i in (1, 3):
        assert (out.logp_mean[i] != 0).all()


def test_a_rollout_is_keyed_by_seed_iteration_and_slot():
    """Slot 3 alone is slot 3 of a batch of 4; another seed, iteration or slot is another forest."""
    forest, sampler, _ = case()
    policy, prompts = Toy(), ["p", "qq", "rrr", "ssss"]
    batch = rollout(policy, policy.encode(prompts), forest, sampler, generators(5, 9, range(4)))
    alone = rollout(policy, policy.encode(prompts[3:]), forest, sampler, generators(5, 9, range(3, 4)))

    # The initial noise is equal bit for bit; sums may be rounded differently in another batch.
    assert torch.equal(batch.latents[0][3:], alone.latents[0])
    for a, b in zip(batch.latents + batch.logp_mean, alone.latents + alone.logp_mean):
        torch.testing.assert_close(a[3:], b, rtol=1e-12, atol=1e-13)

    keys = [(5, 9, 3), (5, 9, 2), (5, 8, 3), (6, 9, 3), (9, 5, 3), (3, 9, 5)]
    firsts = [torch.randn(4, generator=generators(a, b, range(c, c + 1))[0]) for a, b, c in keys]
    assert len({tuple(f.tolist()) for f in firsts}) == len(keys)


def test_a_rollout_needs_no_gradient_and_keeps_clean_estimates_where_asked():
    """x0hat = x - sigma v at every node that has children."""
    forest, sampler, trees = case()
    policy, out = rolled(forest, sampler, trees, keep_x0hat=True)
    assert not any(x.requires_grad for x in out.latents + out.logp_mean + out.x0hat)
    assert len(out.x0hat) == forest.steps
    for i, x0hat in enumerate(out.x0hat):
        for p, prompt in enumerate(PROMPTS):
            for j, node in enumerate(trees[p].level(i)):
                sigma = float(sampler.sigmas[i])
                want = node.latent - sigma * policy.numpy(prompt)(node.latent, sigma)
                np.testing.assert_allclose(x0hat[p, j].numpy(), want, rtol=1e-9, atol=1e-10)
    assert rolled(*case())[1].x0hat == []


def test_evaluation_is_the_ode():
    """x_{i+1} = x_i + (sigma_{i+1} - sigma_i) v, all T steps, whatever the sampler's kind."""
    _, sampler, _ = case(steps=4, kind="flow")
    policy, noise = Toy(), torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    sigmas = oracle.sigma_schedule(4, 3.0)
    for micro_batch in (0, 2):
        got = sample_ode(policy, policy.encode(PROMPTS), sampler, noise, micro_batch)
        for p, prompt in enumerate(PROMPTS):
            x = noise[p].numpy()
            for a, b in zip(sigmas[:-1], sigmas[1:]):
                x = x + policy.numpy(prompt)(x, a) * (b - a)
            np.testing.assert_allclose(got[p].numpy(), x, rtol=1e-10)


# ----------------------------------------------------------------------------------------------------- credit and edges
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("changed", FORESTS)
def test_credit_is_the_oracles(changed, beta):
    """From the rollout's own log-probs: Eq. 3 along stochastic edges, then Eq. 4."""
    forest, sampler, trees = case(**changed)
    _, out = rolled(forest, sampler, trees)
    advantages, _ = credited(forest, trees, out, beta)
    fused = fuse(torch.from_numpy(rewards_for(forest)), out.path_logp(forest), forest, beta)
    for d, level in enumerate(fused):
        want = [[n.fused for n in tree.level(d)] for tree in trees]
        np.testing.assert_allclose(level.numpy(), want, rtol=1e-7, atol=1e-9)
    for i, level in enumerate(advantages):
        want = [[n.advantage for n in tree.level(i + 1)] for tree in trees]
        np.testing.assert_allclose(level.numpy(), want, rtol=1e-6, atol=1e-8)


PRUNINGS = [(None, None), ("parent-top1", None), (1, None), (None, (3, 2)), ("parent-top1", (3, 1)), (2, (4, 1))]


@pytest.mark.parametrize("width, depth", PRUNINGS)
@pytest.mark.parametrize("chosen", [None, {1, 4, 5}])
def test_prune_keeps_the_oracles_edges(width, depth, chosen):
    forest, sampler, trees = case(steps=7, splits=(0, 2), chosen=chosen)
    _, out = rolled(forest, sampler, trees)
    _, keep = credited(forest, trees, out, width=width, depth=depth)
    for i, mask in enumerate(keep):
        assert mask.tolist() == [[e.kept for e in tree.level(i + 1)] for tree in trees], f"step {i}"


def check_gather(out, forest, trees, keep, advantages, prompts, loss_weight):
    """flatten_edges() against an enumeration: by step, by prompt, by parent, by child."""
    edges = flatten_edges(out, forest, keep, advantages, torch.tensor(prompts), loss_weight)
    rows, columns = [], []  # (parent, step, prompt) of every row, (row, edge) of every edge
    for i in range(7):
        for p in prompts:
            for parent in trees[p].level(i):
                trained = [e for e in parent.children if e.kept and trees[p].stochastic(i)]
                columns += [(len(rows), e) for e in trained]
                rows += [(parent, i, p)] * bool(trained)

    # Whole numbers first, then what was stored of the rollout, then credit.
    assert len(rows) > 0 and edges.step.tolist() == [r[1] for r in rows]
    assert edges.prompt.tolist() == [r[2] for r in rows]
    assert edges.parent.tolist() == [c[0] for c in columns]
    np.testing.assert_allclose(edges.x.numpy(), [r[0].latent for r in rows], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(edges.child.numpy(), [c[1].latent for c in columns], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(edges.logp_old.numpy(), [c[1].logp for c in columns], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(edges.advantage.numpy(), [c[1].advantage for c in columns], rtol=1e-5, atol=1e-6)
    assert 6 not in edges.step.tolist()


@pytest.mark.parametrize("prompts", [[0, 1, 2], [1], [2, 0]])
@pytest.mark.parametrize("width, depth", PRUNINGS)
@pytest.mark.parametrize("loss_weight", ["edge", "path"])
@pytest.mark.parametrize("chosen", [None, {1, 4, 5, 6}])
def test_gather_enumerates_the_trained_edges(prompts, width, depth, loss_weight, chosen):
    """Step by step, prompt by prompt, parent by parent: each trained parent once, each kept stochastic edge once."""
    forest, sampler, trees = case(steps=7, branch=3, splits=(0, 2), chosen=chosen)
    _, out = rolled(forest, sampler, trees)
    advantages, keep = credited(forest, trees, out, width=width, depth=depth)
    check_gather(out, forest, trees, keep, advantages, prompts, loss_weight)


@pytest.mark.parametrize("chosen", [None, {1, 4}])
@pytest.mark.parametrize("fraction", [0.3, 0.7, 1.0])
def test_gather_takes_any_mask(fraction, chosen):
    """Some siblings kept and some not: a parent is trained while one is; deterministic edges never, even where kept."""
    forest, sampler, trees = case(steps=7, branch=3, splits=(0, 2), chosen=chosen)
    _, out = rolled(forest, sampler, trees)
    advantages, _ = credited(forest, trees, out)
    rng, keep = np.random.default_rng(0), []
    for i in range(7):
        for e in (e for tree in trees for e in tree.level(i + 1)):
            e.kept = bool(rng.random() < fraction)
        keep.append(torch.tensor([[e.kept for e in tree.level(i + 1)] for tree in trees]))
    check_gather(out, forest, trees, keep, advantages, [0, 1, 2], "edge")


def test_steps_that_are_not_trained_lose_their_stochastic_edges():
    """Steps 0, 2 and 4 of 0..5 are stochastic, and 5 is chosen but the last: 2 is dropped, deterministic ones stay."""
    forest = make_forest(6, 2, (0, 2), chosen={4, 5})
    rewards = torch.zeros(1, forest.leaves)
    kept = [bool(k.all()) for k in prune(forest, rewards, None, None, {0, 4})]
    assert kept == [True, False, False, False, True, True]

    # All stochastic steps are the same as no choice.
    unrestricted, all_steps = prune(forest, rewards, 1, None), prune(forest, rewards, 1, None, {0, 2, 4})
    assert all(torch.equal(a, b) for a, b in zip(unrestricted, all_steps))


def test_gather_counts_the_papers_tree():
    """T = 20, splits 0, 3, 6, 9, 3 prompts: 187 parents and 202 edges each; 115 and 130 after Parent-Top1."""
    forest, sampler, trees = case(steps=20, splits=(0, 3, 6, 9))
    policy = Toy()
    out = rollout(policy, policy.encode(PROMPTS), forest, sampler, generators(0, 0, range(3)))
    rewards = torch.from_numpy(rewards_for(forest))
    advantages = credit(out, forest, rewards, 1.0, 5.0)
    for width, depth, parents, edges in (
        (None, None, 187, 202),
        ("parent-top1", None, 115, 130),
        (None, (10, 5), 107, 122),
    ):
        flat = flatten_edges(out, forest, prune(forest, rewards, width, depth), advantages, ALL, "edge")
        assert (len(flat.x), len(flat.child)) == (3 * parents, 3 * edges)


# ----------------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize(
    "advantage, ratio, value, slope",
    [
        (2.0, 1.5, -2.4, 0.0),  # good and already more likely: clipped at 1.2, no push
        (2.0, 0.5, -1.0, -2.0),  # good but less likely: pushed up
        (-2.0, 1.5, 3.0, 2.0),  # bad and more likely: pushed down
        (-2.0, 0.5, 1.6, 0.0),  # bad and already less likely: clipped at 0.8, no push
        (2.0, 1.1, -2.2, -2.0),  # inside the range nothing is clipped
        (-2.0, 0.9, 1.8, 2.0),
        (0.0, 1.5, 0.0, 0.0),
    ],
)
def test_clipped_loss_in_every_quadrant(advantage, ratio, value, slope):
    """-min(rho A, clip(rho, 0.8, 1.2) A) and its derivative in rho."""
    rho = torch.tensor([ratio], requires_grad=True)
    loss = clipped_loss(rho, torch.tensor([advantage]), 0.2)
    loss.sum().backward()
    assert loss.item() == pytest.approx(value) and oracle.clipped_loss(ratio, advantage, 0.2) == pytest.approx(value)
    assert rho.grad.item() == pytest.approx(slope)


def edge_by_edge(policy, sampler, trees, prompts, loss_weight, clip, kl=0.0):
    """Loss and gradient of Eq. 5 by autograd, one edge and one forward at a time.

    Returns:
        The loss, its gradient (parameters,), the fraction of ratios that are clipped, the divergence.
    """
    total, weights, clipped, parents = 0.0, 0.0, [], {}
    for p in prompts:
        cond, sigmas = policy.encode([PROMPTS[p]]), sampler.sigmas
        for e in oracle.trained_edges(trees[p]):
            # How likely is the child that was drawn, under the parameters of now?
            i = e.step
            x, child = torch.from_numpy(e.parent.latent)[None], torch.from_numpy(e.latent)[None]
            levels = (sigmas[i], sigmas[i + 1], sampler.eta, float(sigmas[1]))
            mean, std = step_moments(sampler.kind, x, policy.velocity(x, sigmas[i : i + 1], cond), *levels)
            if sampler.density == "upstream":
                logp = -((child - mean) ** 2).mean()
            else:
                logp = torch.distributions.Normal(mean, std).log_prob(child).mean()

            # Its clipped loss and its weight.
            rho, w = (logp - e.logp).exp(), oracle.edge_weight(trees[p], e, loss_weight)
            total = total + w * torch.min(rho * e.advantage, rho.clamp(1 - clip, 1 + clip) * e.advantage).neg()
            weights += w
            clipped.append(abs(rho.item() - 1) > clip)

            # The divergence is a parent's, so each parent counts once.
            if kl and id(e.parent) not in parents:
                with torch.no_grad():
                    v_ref = policy.velocity(x, sigmas[i : i + 1], cond, reference=True)
                m_ref, _ = step_moments(sampler.kind, x, v_ref, *levels)
                parents[id(e.parent)] = ((mean - m_ref) ** 2 / (2 * std**2)).mean()

    divergence = sum(parents.values()) / len(parents) if kl else torch.zeros(())
    loss = total / weights + kl * divergence
    gradient = torch.autograd.grad(loss, policy.trainable())
    return loss.item(), torch.cat([g.flatten() for g in gradient]).numpy(), np.mean(clipped), divergence.item()


def check_update(forest, sampler, trees, loss_weight, width, depth, micro_batches=(0, 1, 3), kl=0.0, prompts=(0, 1, 2)):
    """update() at moved parameters equals the loop over edges, at every micro-batch."""
    policy, out = rolled(forest, sampler, trees)
    advantages, keep = credited(forest, trees, out, width=width, depth=depth)
    policy.perturb(0.1)

    clip = 0.02
    want_loss, want, clipped, divergence = edge_by_edge(policy, sampler, trees, prompts, loss_weight, clip, kl)
    assert 0 < clipped < 1, "the case must have clipped and free edges"
    edges = flatten_edges(out, forest, keep, advantages, torch.tensor(prompts), loss_weight)
    for micro_batch in micro_batches:
        policy.calls.clear()
        log, gradient = step(policy, edges, sampler, clip=clip, micro_batch=micro_batch, kl=kl)
        np.testing.assert_allclose(gradient, want, rtol=2e-6, atol=2e-6 * np.abs(want).max())
        assert log["loss"] == pytest.approx(want_loss, rel=1e-5, abs=1e-7)
        assert log["clip_frac"] == pytest.approx(clipped)
        assert log["kl"] == pytest.approx(divergence, rel=1e-6) if kl else "kl" not in log
        assert log["grad_norm"] == pytest.approx(np.linalg.norm(want), rel=1e-5)
        assert sum(policy.calls) == len(edges.x) * (2 if kl else 1)  # siblings share one forward
        assert max(policy.calls) == min(micro_batch or len(edges.x), len(edges.x))


@pytest.mark.parametrize("width, depth", [(None, None), ("parent-top1", None), (1, (4, 1))])
@pytest.mark.parametrize("branch", [2, 3])
@pytest.mark.parametrize("loss_weight", ["edge", "path"])
def test_update_is_the_loop_over_edges(loss_weight, branch, width, depth):
    """Loss, gradient, clipped fraction, forwards: on three prompts, pruned or not, in micro-batches of 1, 3 and all."""
    forest, sampler, trees = case(steps=6, branch=branch)
    check_update(forest, sampler, trees, loss_weight, width, depth)


@pytest.mark.parametrize("kind, eta, density", KINDS)
@pytest.mark.parametrize("changed", FORESTS[1:])
def test_update_on_other_forests_and_steps(changed, kind, eta, density):
    forest, sampler, trees = case(kind=kind, eta=eta, density=density, **changed)
    check_update(forest, sampler, trees, "path", None, None, micro_batches=(3,))


def test_update_of_some_prompts():
    """--updates: prompts 2 and 0 alone, in that order, with their own conditioning."""
    check_update(*case(), "edge", None, None, prompts=(2, 0))


@pytest.mark.parametrize("loss_weight", ["edge", "path"])
def test_kl_is_the_mean_over_trained_parents(loss_weight):
    """kl * mean_D (m - m_ref)^2 / (2 std^2), averaged over parents whatever the edges weigh."""
    check_update(*case(branch=3), loss_weight, "parent-top1", None, kl=0.7)


def test_the_whole_pipeline_against_finite_differences():
    """Rollout, credit, pruning and loss of the oracle, in numpy; its gradient by central differences."""
    forest, sampler, trees = case(steps=6, kind="flow", eta=0.7)
    policy, out = rolled(forest, sampler, trees)
    advantages, keep = credited(forest, trees, out, width="parent-top1", depth=(4, 1))
    policy.perturb(0.1)
    sigmas, theta = oracle.sigma_schedule(6, 3.0), policy.flat()

    def loss(theta):
        velocities = [policy.numpy(prompt, theta) for prompt in PROMPTS]
        return oracle.total_loss(trees, velocities, sigmas, "flow", 0.7, 0.3, "path")

    edges = flatten_edges(out, forest, keep, advantages, ALL, "path")
    log, gradient = step(policy, edges, sampler, clip=0.3)
    assert log["loss"] == pytest.approx(loss(theta), rel=1e-5, abs=1e-7)

    # Every fifth parameter: (loss(theta + h) - loss(theta - h)) / 2h.
    h = 1e-6
    for j in range(0, len(theta), 5):
        bump = np.zeros_like(theta)
        bump[j] = h
        slope = (loss(theta + bump) - loss(theta - bump)) / (2 * h)
        assert gradient[j] == pytest.approx(slope, rel=1e-4, abs=1e-6)

    velocities, references = ([Toy().numpy(p, t) for p in PROMPTS] for t in (theta, Toy().flat()))
    log, _ = step(policy, edges, sampler, kl=0.5)
    assert log["kl"] == pytest.approx(oracle.kl(trees, velocities, references, sigmas, "flow", 0.7), rel=1e-6)


@pytest.mark.parametrize("loss_weight", ["edge", "path"])
def test_every_depth_weighs_the_same_by_path(loss_weight):
    """With "path" each of the 5 trained steps has a fifth of all weight; with "edge" it is in proportion to n_{i+1}."""
    forest, sampler, trees = case(steps=6, branch=3)
    _, out = rolled(forest, sampler, trees)
    advantages, keep = credited(forest, trees, out)
    edges = flatten_edges(out, forest, keep, advantages, ALL, loss_weight)
    step_of_edge = edges.step[edges.parent]
    fractions = torch.tensor([edges.weight[step_of_edge == i].sum() for i in range(5)]) / edges.weight.sum()
    sizes = torch.tensor([3.0, 3, 9, 9, 9])
    want = torch.full((5,), 0.2) if loss_weight == "path" else sizes / sizes.sum()
    torch.testing.assert_close(fractions, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_a_step_weight_scales_the_loss_of_its_step(factor):
    """TempFlow-GRPO: the loss of its one step is multiplied by std_i / mean(std), so its gradient is, too."""
    forest, sampler, trees = case(splits=(2,), branch=4, chosen=())
    policy, out = rolled(forest, sampler, trees)
    advantages, keep = credited(forest, trees, out)
    plain = flatten_edges(out, forest, keep, advantages, ALL, "edge")
    weighted = flatten_edges(out, forest, keep, advantages, ALL, "edge", [1.0, 1.0, factor, 1.0, 0.0])
    _, want = step(policy, plain, sampler)
    _, gradient = step(policy, weighted, sampler)
    assert np.abs(want).max() > 1e-3
    np.testing.assert_allclose(gradient, factor * want, rtol=1e-6, atol=1e-7)


def test_step_weights_of_several_steps_are_the_oracles():
    """sum_e w_e f_step loss_e / sum_e w_e: the factors, of mean 1 over the steps, are no part of the count of edges."""
    forest, sampler, trees = case(kind="flow", eta=0.7)
    policy, out = rolled(forest, sampler, trees)
    advantages, keep = credited(forest, trees, out)
    policy.perturb(0.1)
    factors = [2.0, 1.0, 0.7, 0.3, 0.0]
    sigmas, velocities = oracle.sigma_schedule(5, 3.0), [policy.numpy(p) for p in PROMPTS]
    for loss_weight in ("edge", "path"):
        edges = flatten_edges(out, forest, keep, advantages, ALL, loss_weight, factors)
        want = oracle.total_loss(trees, velocities, sigmas, "flow", 0.7, 0.05, loss_weight, factors)
        assert step(policy, edges, sampler)[0]["loss"] == pytest.approx(want, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind, eta, density", KINDS)
def test_the_first_pass_has_ratio_1(kind, eta, density):
    """At the rollout's parameters rho = 1: nothing is clipped and the loss is minus the weighted mean advantage."""
    forest, sampler, trees = case(kind=kind, eta=eta, density=density)
    policy, out = rolled(forest, sampler, trees)
    advantages, keep = credited(forest, trees, out, width="parent-top1")
    edges = flatten_edges(out, forest, keep, advantages, ALL, "edge")
    log, _ = step(policy, edges, sampler, clip=1e-6)
    assert log["ratio_dev"] < 1e-9 and log["clip_frac"] == 0
    assert log["loss"] == pytest.approx(-edges.advantage.mean().item(), abs=1e-7)


def test_the_first_pass_has_ratio_1_in_float32():
    """What training runs in: rollout in micro-batches of 5, update in micro-batches of 3."""
    torch.set_default_dtype(torch.float32)
    forest, sampler, _ = case(steps=6)
    policy = Toy()
    out = rollout(policy, policy.encode(PROMPTS), forest, sampler, generators(0, 0, range(3)), 5)
    assert all(x.dtype == torch.float32 for x in out.latents)
    advantages = credit(out, forest, torch.from_numpy(rewards_for(forest)), 1.0, 5.0)
    edges = flatten_edges(out, forest, keep_chosen(forest, 3), advantages, ALL, "path")
    log, gradient = step(policy, edges, sampler, micro_batch=3)
    assert log["ratio_dev"] < 1e-6 and np.isfinite(gradient).all()


def test_ratio_dev_is_the_largest_deviation():
    forest, sampler, trees = case()
    policy, out = rolled(forest, sampler, trees)
    advantages, keep = credited(forest, trees, out)
    edges = flatten_edges(out, forest, keep, advantages, ALL, "edge")
    for edge, shift in ((0, 0.4), (5, -0.3), (len(edges.child) - 1, 0.2)):
        logp = edges.logp_old.clone()
        logp[edge] -= shift
        moved = branchgrpo.Edges(**{**vars(edges), "logp_old": logp})
        for micro_batch in (0, 2):
            log, _ = step(policy, moved, sampler, micro_batch=micro_batch, clip=0.1)
            assert log["ratio_dev"] == pytest.approx(abs(np.exp(shift) - 1), rel=1e-6)
            assert log["clip_frac"] == pytest.approx(1 / len(edges.child))


def test_a_nan_advantage_stops_before_the_optimiser():
    """NonFinite, parameters bit for bit as before, optimiser state empty; so too for a bad log-prob or latent."""
    forest, sampler, trees = case()
    policy, out = rolled(forest, sampler, trees)
    advantages, keep = credited(forest, trees, out)
    edges = flatten_edges(out, forest, keep, advantages, ALL, "edge")
    for name, value in (("advantage", float("nan")), ("logp_old", -float("inf")), ("x", float("nan"))):
        broken = getattr(edges, name).clone()
        broken[3] = value
        optimizer, before = torch.optim.AdamW(policy.trainable(), lr=0.1), policy.flat()
        bad = branchgrpo.Edges(**{**vars(edges), name: broken})
        for micro_batch in (0, 2):
            with pytest.raises(NonFinite):
                args = settings(micro_batch=micro_batch, max_grad_norm=1.0)
                update(policy, optimizer, Accelerator(cpu=True), bad, policy.encode(PROMPTS), sampler, args)
            assert np.array_equal(policy.flat(), before) and not optimizer.state
    _, gradient = step(policy, edges, sampler)  # and a good update after it starts from a clean gradient
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_an_update_with_nothing_to_train_is_no_step(micro_batch):
    """A depth window and a timestep fraction may leave no edge: the parameters stay, and no metric is made up."""
    forest, sampler, trees = case()
    policy, out = rolled(forest, sampler, trees)
    advantages, keep = credited(forest, trees, out)
    edges = flatten_edges(out, forest, [k & False for k in keep], advantages, ALL, "edge")
    log, moved = step(policy, edges, sampler, micro_batch=micro_batch)
    assert log == {} and (moved == 0).all()


def test_the_trained_parents_are_dealt_into_sets():
    """--updates-by parents: every edge is in one set, with its parent, its own columns, and its parent's latent."""
    forest, sampler, trees = case()
    policy, out = rolled(forest, sampler, trees)
    credits, keep = credited(forest, trees, out)
    edges = flatten_edges(out, forest, keep, credits, ALL, "path")
    sets = split_parents(edges, 3, [0, 1])
    assert {len(subset.x) for subset in sets} <= {len(edges.x) // 3, len(edges.x) // 3 + 1}

    def rows(e):
        """One row per edge: of its parent the latent, step and prompt, and its own columns."""
        columns = [e.x.flatten(1)[e.parent], e.step[e.parent], e.prompt[e.parent], e.child.flatten(1)]
        columns += [e.advantage, e.logp_old, e.weight]
        return sorted(
            tuple(torch.cat([c[k].flatten().double() for c in columns]).tolist()) for k in range(len(e.child))
        )

    assert sorted(sum((rows(subset) for subset in sets), [])) == rows(edges)
    for subset in sets:
        assert (subset.parent.diff() >= 0).all() and subset.parent.unique().tolist() == list(range(len(subset.x)))
    again, other = split_parents(edges, 3, [0, 1]), split_parents(edges, 3, [0, 2])
    assert torch.equal(again[0].x, sets[0].x) and not torch.equal(other[0].x[:5], sets[0].x[:5])


def test_the_surrogate_needs_no_machinery():
    """Its gradient, weighted and divided by hand, is that of `update`, without an accelerator."""
    forest, sampler, trees = case()
    policy, out = rolled(forest, sampler, trees)
    credits, keep = credited(forest, trees, out)
    edges = flatten_edges(out, forest, keep, credits, ALL, "path")
    policy.perturb(0.1)
    loss, ratio, kl = surrogate(policy, edges, policy.encode(PROMPTS), sampler, 0.05)
    assert kl is None and loss.shape == ratio.shape == edges.advantage.shape
    gradient = torch.autograd.grad((edges.weight * loss).sum() / edges.weight.sum(), policy.trainable())
    _, want = step(policy, edges, sampler)
    np.testing.assert_allclose(torch.cat([g.flatten() for g in gradient]).numpy(), want, rtol=1e-5, atol=1e-7)


def test_gradients_are_clipped_to_their_norm_and_reported_before():
    forest, sampler, trees = case()
    policy, out = rolled(forest, sampler, trees)
    advantages, keep = credited(forest, trees, out)
    edges = flatten_edges(out, forest, keep, advantages, ALL, "edge")
    log, free = step(policy, edges, sampler)
    norm = np.linalg.norm(free)
    clipped_log, clipped = step(policy, edges, sampler, max_grad_norm=norm / 4)
    assert log["grad_norm"] == pytest.approx(norm) and clipped_log["grad_norm"] == pytest.approx(norm)
    np.testing.assert_allclose(clipped, free / 4, rtol=1e-4)


def test_updates_do_not_add_up_gradients():
    """Each update starts from zero: the same one twice, with the parameters put back, gives the same step."""
    forest, sampler, trees = case()
    policy, out = rolled(forest, sampler, trees)
    advantages, keep = credited(forest, trees, out)
    edges = flatten_edges(out, forest, keep, advantages, ALL, "edge")
    assert np.array_equal(step(policy, edges, sampler)[1], step(policy, edges, sampler)[1])


# ----------------------------------------------------------------------------------------------------------- flat GRPO
@pytest.mark.parametrize("shape", [{"splits": (0,), "branch": 6}, {"splits": (), "roots": 6}])
@pytest.mark.parametrize("loss_weight", ["edge", "path"])
def test_without_a_split_below_the_root_it_is_flat_grpo(shape, loss_weight):
    """mean over samples and steps 0..T-2 of -min(rho A, clip(rho) A), A = (r - mean)/(std + eps) of the prompt's group.

    Flat GRPO is computed here on trajectories alone: one list of latents for each sample, no tree.
    """
    forest, sampler, trees = case(s=float("inf"), **shape)
    policy, out = rolled(forest, sampler, trees)
    rewards = rewards_for(forest)
    advantages = credit(out, forest, torch.from_numpy(rewards), 1.0, 5.0)
    policy.perturb(0.1)

    # A term for each sample and step, by DanceGRPO's formula with eta = 0.8, so eta^2/2 = 0.32.
    terms, sigmas = [], sampler.sigmas
    for p, prompt in enumerate(PROMPTS):
        group = (rewards[p] - rewards[p].mean()) / (rewards[p].std() + 1e-4)
        for sample in range(6):
            xs = [level[p, sample if level.shape[1] == 6 else 0] for level in out.latents]
            for i in range(4):
                # The log-prob of the next latent under the parameters of now, and the ratio.
                v = policy.velocity(xs[i][None], sigmas[i : i + 1], policy.encode([prompt]))[0]
                dt = sigmas[i + 1] - sigmas[i]
                clean = xs[i] - sigmas[i] * v
                mean = xs[i] + v * dt + 0.32 * (xs[i] - (1 - sigmas[i]) * clean) / sigmas[i] ** 2 * dt
                logp = torch.distributions.Normal(mean, 0.8 * (-dt).sqrt()).log_prob(xs[i + 1]).mean()
                rho = (logp - out.logp_mean[i][p, sample]).exp()
                terms.append(-torch.min(rho * group[sample], rho.clamp(0.95, 1.05) * group[sample]))

    loss = torch.stack(terms).mean()
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.trainable())]).numpy()
    edges = flatten_edges(out, forest, keep_chosen(forest, 3), advantages, ALL, loss_weight)
    log, gradient = step(policy, edges, sampler, clip=0.05)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(gradient, want, rtol=2e-6, atol=2e-6 * np.abs(want).max())


# -------------------------------------------------------------------------------------------------------- two processes
class Exchange:
    """What two processes share: a barrier, and one slot each for what they exchange."""

    def __init__(self):
        self.barrier, self.slots = threading.Barrier(2), [None, None]

    def swap(self, rank, value):
        """Both processes' values, in order of rank."""
        self.slots[rank] = value
        self.barrier.wait(30)  # both have written
        values = list(self.slots)
        self.barrier.wait(30)  # both have read: the slots are free again
        return values


class Process:
    """The part of an Accelerator that update() uses, for one of two processes; gradients are averaged as DDP does."""

    num_processes = 2
    device = torch.device("cpu")

    def __init__(self, rank, exchange):
        self.process_index, self.exchange = rank, exchange

    def reduce(self, tensor, reduction="sum"):
        assert reduction == "sum"
        return sum(self.exchange.swap(self.process_index, tensor.clone()))

    def gather(self, tensor):
        return torch.stack(self.exchange.swap(self.process_index, tensor.clone()))

    def no_sync(self, model):
        return nullcontext()

    autocast = staticmethod(nullcontext)

    def backward(self, loss):
        loss.backward()

    def clip_grad_norm_(self, parameters, max_norm):
        for p in parameters:
            p.grad = sum(self.exchange.swap(self.process_index, p.grad.clone())) / 2
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


@pytest.mark.parametrize("loss_weight", ["edge", "path"])
def test_two_processes_take_the_step_of_one(loss_weight):
    """Prompts 0 and 1 here, 2 there: counts run over both, so an edge weighs the same wherever it is."""
    forest, sampler, trees = case(steps=6)
    policy, out = rolled(forest, sampler, trees)
    advantages, keep = credited(forest, trees, out, width="parent-top1")
    policy.perturb(0.1)
    changed = {"clip": 0.02, "kl": 0.7, "micro_batch": 3}
    want_log, want = step(policy, flatten_edges(out, forest, keep, advantages, ALL, loss_weight), sampler, **changed)

    # Two threads stand for two processes, each with a policy of its own at the same parameters.
    exchange, results = Exchange(), {}

    def run(rank, prompts):
        own_policy = Toy()
        own_policy.perturb(0.1)
        edges = flatten_edges(out, forest, keep, advantages, prompts, loss_weight)
        results[rank] = step(own_policy, edges, sampler, accelerator=Process(rank, exchange), **changed)

    threads = [threading.Thread(target=run, args=(rank, prompts)) for rank, prompts in enumerate(ALL.split(2))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    for rank in (0, 1):
        log, gradient = results[rank]
        np.testing.assert_allclose(gradient, want, rtol=2e-6, atol=2e-6 * np.abs(want).max())
        for name in ("loss", "ratio_dev", "kl", "grad_norm"):
            assert log[name] == pytest.approx(want_log[name], rel=1e-5), name


def test_the_algorithm_needs_no_diffusers():
    """Who reads or changes it needs torch alone: no model library is imported."""
    code = "import branchgrpo, sys; assert not {'diffusers', 'transformers', 'accelerate', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(branchgrpo.__file__).parent)


# ---------------------------------------------------------------------------------------------- rounding and the ratio
def edges_of_a_rollout():
    """Policy, sampler and the edges of a rollout whose advantages are those of `credited`."""
    forest, sampler, trees = case()
    policy, out = rolled(forest, sampler, trees)
    advantages, keep = credited(forest, trees, out)
    return policy, sampler, flatten_edges(out, forest, keep, advantages, ALL, "edge")


def test_on_policy_nothing_is_clipped_however_the_rollout_rounded():
    """Old log-probs off by more than the clip range, as bf16 makes them: the gradient is that of exact ones."""
    policy, sampler, edges = edges_of_a_rollout()
    _, exact = step(policy, edges, sampler, clip=1e-4)
    edges.logp_old = edges.logp_old + 7e-4 * torch.randn(
        edges.logp_old.shape, generator=torch.Generator().manual_seed(0)
    )
    log, gradient = step(policy, edges, sampler, clip=1e-4, on_policy=True)
    np.testing.assert_allclose(gradient, exact, rtol=1e-9, atol=1e-12)
    assert log["clip_frac"] == 0 and log["ratio_dev"] > 5e-4  # which is reported all the same
    log, gradient = step(policy, edges, sampler, clip=1e-4)
    assert log["clip_frac"] > 0.5 and np.linalg.norm(gradient - exact) > 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize("micro_batch", [0, 1, 4])
def test_remembered_log_probs_are_those_of_the_updates_calls(micro_batch):
    policy, sampler, edges = edges_of_a_rollout()
    exact = edges.logp_old.clone()
    edges.logp_old = edges.logp_old + 1.0
    branchgrpo.remember_logp(policy, edges, policy.encode(PROMPTS), sampler, micro_batch)
    torch.testing.assert_close(edges.logp_old, exact)
    sizes, policy.calls = policy.calls[-len(range(0, len(edges.x), micro_batch or 99)) :], []
    step(policy, edges, sampler, micro_batch=micro_batch)
    assert policy.calls == sizes  # so they round alike
