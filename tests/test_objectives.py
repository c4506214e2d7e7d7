"""Objectives beside Eq. 5, on the toy policy in float64: gradients against loops over nodes and leaves, by differences.

And in real runs: on images and video, on every kind of forest, resumed bit for bit.
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_branchgrpo import ALL, DIM, PROMPTS, Toy, case, credited, float64, rewards_for, rolled, step  # noqa: F401

import objectives
import train_image
import train_video
from branchgrpo import Sampler, generators, rollout
from objectives import (
    OBJECTIVES,
    Noised,
    clean_error,
    elbo,
    endpoint,
    nft,
    noised_leaves,
    remember_velocity,
    rows_per_prompt,
    split_points,
)
from sde import sigma_schedule
from tree import keep_chosen, make_forest

ARGS = SimpleNamespace(noise_draws=3, shift=3.0, adv_clip=5.0, objective="elbo", loss_weight="edge")


def rng():
    """The prompts' generators, as they are after a rollout."""
    return generators(0, 7, range(len(PROMPTS)))


def differences(policy, loss) -> np.ndarray:
    """The gradient of a function of the flat parameters, by central differences."""
    theta, gradient = policy.flat(), []
    for i in range(len(theta)):
        up, down = theta.copy(), theta.copy()
        up[i] += 1e-6
        down[i] -= 1e-6
        gradient.append((loss(up) - loss(down)) / 2e-6)
    return np.array(gradient)


def check(policy, rows, sampler, objective, loss, **changed):
    """`update` has the gradient of `loss`, whatever the micro-batch."""
    expected = differences(policy, loss)
    for micro_batch in (0, 1, 4):
        log, gradient = step(policy, rows, sampler, micro_batch=micro_batch, objective=objective, **changed)
        assert np.abs(expected).max() > 1e-4
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)
        assert log["loss"] == pytest.approx(loss(policy.flat()), abs=1e-10)
    return log


# ------------------------------------------------------------------------------------------------------------ endpoint
SPLIT_FORESTS = [
    {},
    {"branch": 3, "splits": (1,), "roots": 2},
    {"steps": 6, "splits": (0, 1, 3), "chosen": {2}},
    {"splits": (0,), "branch": 4, "chosen": ()},
]


@pytest.mark.parametrize("kl", [0.0, 0.7])
@pytest.mark.parametrize("shape", SPLIT_FORESTS)
def test_endpoint_is_a_loop_over_split_nodes(shape, kl):
    """The loss spelled out node by node, with the leaves below each child found one by one."""
    forest, sampler, trees = case(**shape)
    policy, out = rolled(forest, sampler, trees)
    advantages, keep = credited(forest, trees, out)
    values = torch.from_numpy(rewards_for(forest))
    rows = split_points(out, forest, keep, advantages, values, ALL, rng(), ARGS)
    if kl:
        policy.perturb(0.1)

    nodes = []  # prompt, step, latent, pull
    for p in range(len(PROMPTS)):
        for i in forest.splits:
            for j in range(forest.sizes[i]):
                ends, rewards = [], []
                for child in range(j * forest.children[i], (j + 1) * forest.children[i]):
                    below = [leaf for leaf, up in enumerate(forest.ancestors(i + 1, forest.steps)) if int(up) == child]
                    ends.append(np.mean([out.latents[-1][p, leaf].numpy() for leaf in below], 0))
                    rewards.append(np.mean([float(values[p, leaf]) for leaf in below]))
                d, c = [e - np.mean(ends, 0) for e in ends], [r - np.mean(rewards) for r in rewards]
                pull = sum(a * b for a, b in zip(c, d)) / np.sqrt(np.mean(sum(b**2 for b in d)))
                nodes.append((PROMPTS[p], i, out.latents[i][p, j].numpy(), pull))
    assert len(nodes) == len(rows.x) == len(PROMPTS) * sum(forest.sizes[i] for i in forest.splits)

    reference = torch.cat([p.flatten() for p in policy.reference.values()]).numpy()

    def loss(theta):
        total = 0.0
        for prompt, i, x, pull in nodes:
            sigma = float(sampler.sigmas[i])
            v, v_ref = policy.numpy(prompt, theta)(x, sigma), policy.numpy(prompt, reference)(x, sigma)
            total += -np.mean(pull * (x - sigma * v)) + kl * np.mean((v - v_ref) ** 2)
        return total / len(nodes)

    log = check(policy, rows, sampler, endpoint, loss, kl=kl)
    assert not {"ratio_dev", "clip_frac"} & log.keys()


def test_a_pull_by_hand():
    """Two children end at +e and -e, with rewards 1 and -1: 2 e / sqrt(mean 2 e^2), of length sqrt(2 D)."""
    forest, e = make_forest(3, 2, (0,)), torch.tensor([[1.0, 2.0], [0.0, -1.0], [0.5, 0.0]])
    out = SimpleNamespace(latents=[torch.zeros(1, n, 3, 2) for n in forest.sizes])
    out.latents[-1] = torch.stack([e, -e])[None]
    pull = split_points(out, forest, keep_chosen(forest, 1), None, torch.tensor([[1.0, -1.0]]), *last()).pull
    torch.testing.assert_close(pull[0], 2 * e / (2 * e.square().mean()).sqrt())
    assert float(pull.norm()) == pytest.approx((2 * DIM) ** 0.5)


def last():
    """The arguments of one prompt's rows that do not matter here."""
    return torch.arange(1), rng(), ARGS


def test_equal_rewards_or_equal_ends_pull_nothing():
    forest = make_forest(3, 2, (0, 1))
    out = SimpleNamespace(latents=[torch.randn(1, n, 3, 2) for n in forest.sizes])
    same = torch.full((1, 4), 0.3)
    assert not split_points(out, forest, keep_chosen(forest, 1), None, same, *last()).pull.any()
    out.latents[-1] = out.latents[-1][:, :1].expand(1, 4, 3, 2)
    different = torch.tensor([[1.0, 2.0, 3.0, -6.0]])
    pull = split_points(out, forest, keep_chosen(forest, 1), None, different, *last()).pull
    assert pull.isfinite().all() and pull.abs().max() < 1e-6


def test_only_kept_splits_are_trained():
    """A mask without the edges of a split node drops its row, and the count says so."""
    forest, sampler, trees = case()
    _, out = rolled(forest, sampler, trees)
    advantages, keep = credited(forest, trees, out)
    keep[2] = keep[2].clone()
    keep[2][:, :2] = False  # the children of the first of two nodes
    rows = split_points(out, forest, keep, advantages, torch.from_numpy(rewards_for(forest)), ALL, rng(), ARGS)
    assert len(rows.x) == 2 * len(PROMPTS)
    torch.testing.assert_close(rows.x[3:], out.latents[2][:, 1])
    assert rows_per_prompt(SimpleNamespace(objective="endpoint"), forest, keep) == 2


# ------------------------------------------------------------------------------------------ objectives on noised leaves
def leaves_with_noise(shape, objective):
    """Policy, rows and sampler of a rollout, with advantages as the objective wants them."""
    forest, sampler, trees = case(**shape)
    policy, out = rolled(forest, sampler, trees)
    advantages, keep = credited(forest, trees, out)
    args = SimpleNamespace(**vars(ARGS) | {"objective": objective})
    return policy, noised_leaves(out, forest, keep, advantages, None, ALL, rng(), args), sampler, out, advantages


def test_noised_leaves_are_shared_and_stratified():
    """Every leaf of a prompt has the same levels and noises, one level in each third of the schedule's time."""
    _, rows, _, out, advantages = leaves_with_noise({}, "elbo")
    shape = (len(PROMPTS), 4, 3)
    sigma, eps = rows.sigma.view(shape), (rows.target + out.latents[-1].repeat_interleave(3, 1).flatten(0, 1))
    eps, x = eps.view(*shape, 3, 2), rows.x.view(*shape, 3, 2)
    assert torch.equal(sigma, sigma[:, :1].expand(shape))
    torch.testing.assert_close(eps, eps[:, :1].expand_as(eps))
    u = sigma / (3 - 2 * sigma)  # the schedule's shift of 3, undone
    assert torch.equal((u[:, 0] * 3).floor(), torch.arange(3.0).expand(3, 3))
    level = sigma[..., None, None]
    torch.testing.assert_close(x, (1 - level) * out.latents[-1].unsqueeze(2) + level * eps)
    assert torch.equal(rows.advantage.view(shape)[..., 1], advantages[-1])
    assert rows.prompt.view(shape)[:, 0, 0].tolist() == [0, 1, 2]

    # nft takes advantages as fractions of A_max = 5, so that r lies between 0 and 1.
    scaled = leaves_with_noise({}, "nft")[1].advantage
    torch.testing.assert_close(scaled, rows.advantage / 5)


def test_a_prompts_noise_does_not_depend_on_the_others():
    forest, sampler, trees = case()
    _, out = rolled(forest, sampler, trees)
    advantages, keep = credited(forest, trees, out)
    rows = noised_leaves(out, forest, keep, advantages, None, ALL, rng(), ARGS)
    alone = noised_leaves(out, forest, keep, advantages, None, torch.tensor([1]), rng(), ARGS)
    assert torch.equal(alone.x, rows.x[12:24]) and torch.equal(alone.target, rows.target[12:24])


@pytest.mark.parametrize("objective", [elbo, nft])
@pytest.mark.parametrize("moved", [False, True])
def test_objectives_on_leaves_are_loops(objective, moved):
    """On-policy, and against the velocity of a policy that made the leaves and has moved since."""
    policy, rows, sampler, _, _ = leaves_with_noise({"branch": 3, "splits": (1,)}, objective.__name__)
    old = policy.flat()
    if moved:
        remember_velocity(policy, rows, policy.encode(PROMPTS), micro_batch=5)
        policy.perturb(0.05)
    base = policy.flat() if not moved else old
    clip, frozen = 0.01, policy.flat()

    def loss(theta):
        total = 0.0
        for x, sigma, target, a, p in zip(rows.x, rows.sigma, rows.target, rows.advantage, rows.prompt):
            x, sigma, target, a = x.numpy(), float(sigma), target.numpy(), float(a)
            v, v_old, v_now = (policy.numpy(PROMPTS[p], t)(x, sigma) for t in (theta, base, frozen))
            x0 = x - sigma * target
            if objective is elbo:
                e, e_old = (-np.mean((x - sigma * w - x0) ** 2) for w in (v, v_old))
                rho = np.exp(e - e_old)
                total -= min(rho * a, np.clip(rho, 1 - clip, 1 + clip) * a)
            else:
                r = (1 + a) / 2
                for share, side, fixed in ((r, v, v_now), (1 - r, 2 * v_old - v, 2 * v_old - v_now)):
                    w = np.mean(np.abs(x - sigma * fixed - x0))
                    total += share * np.mean((x - sigma * side - x0) ** 2) / w
        return total / len(rows.x)

    log = check(policy, rows, sampler, objective, loss, clip=clip)
    assert ("ratio_dev" in log) == (objective is elbo)
    if objective is elbo:
        assert (log["ratio_dev"] > clip and 0 < log["clip_frac"] < 1) if moved else log["ratio_dev"] == 0


def test_on_policy_nft_is_elbo_over_the_error():
    """Row by row: the gradient of nft is that of elbo, over A_max w."""
    policy, rows, sampler, _, _ = leaves_with_noise({}, "elbo")
    cond = policy.encode(PROMPTS)
    for i in range(0, len(rows.x), 5):
        row = Noised(**{k: v[i : i + 1] for k, v in vars(rows).items() if v is not None})
        gradients = []
        for objective, scale in ((elbo, 1.0), (nft, 5.0)):
            row.advantage = rows.advantage[i : i + 1] / scale
            loss = objective(policy, row, cond, sampler, 1.0)[0].sum()
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.trainable())]))
        v = policy.velocity(row.x, row.sigma, {k: c[row.prompt] for k, c in cond.items()})
        w = float(row.sigma * (v - row.target).detach().abs().mean())
        torch.testing.assert_close(gradients[1], gradients[0] / (5 * w))


def test_the_error_is_that_of_the_clean_estimate():
    x, v, target, sigma = torch.randn(4, 3, 2), torch.randn(4, 3, 2), torch.randn(4, 3, 2), torch.rand(4)
    s = sigma[:, None, None]
    expected = ((x - s * v) - (x - s * target)).square().flatten(1).mean(1)
    torch.testing.assert_close(clean_error(x, sigma, v, target), expected)


def test_a_flat_rollout_of_the_ode():
    """--method ode draws nothing but the initial noises; with --flash its first two steps are Euler's."""
    forest = make_forest(4, 2, (), roots=3, chosen=())
    policy, sampler = Toy(), Sampler(sigma_schedule(4, 3.0), "flow", 0.7, float("inf"), flash=True)
    out = rollout(policy, policy.encode(PROMPTS), forest, sampler, rng())
    x = torch.stack([torch.randn(3, 3, 2, generator=g) for g in rng()])
    assert torch.equal(out.latents[0], x) and all(not logp.any() for logp in out.logp_mean)
    for p, prompt in enumerate(PROMPTS):
        latent, sigmas = x[p, 1].numpy(), sampler.sigmas.numpy()
        for i in range(2):
            latent = latent + (sigmas[i + 1] - sigmas[i]) * policy.numpy(prompt)(latent, sigmas[i])
        np.testing.assert_allclose(out.latents[2][p, 1].numpy(), latent, atol=1e-12)
    assert out.latents[-1].isfinite().all() and rows_per_prompt(ARGS, forest, None) == 9


# ---------------------------------------------------------------------------------------------------------------- runs
SMALL = "--prompts-per-iteration 2 --eval-size 2 --leaves 4 --iterations 2 --save-every 1 --lr 1e-4"


def run(module, out, flags) -> list[dict]:
    """A small run: its rows without clocks."""
    torch.set_default_dtype(torch.float32)
    module.main([*SMALL.split(), *flags.split(), "--out", str(out)])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds_", "peak_"))} for row in lines]


@pytest.mark.parametrize(
    "module, flags, nfe",
    [
        (train_image, "--objective endpoint --splits 0 --branch 4 --flash 3 --lr-warmup 2", 2 * (1 + 3 * 4 + 1)),
        pytest.param(
            *(train_image, "--objective endpoint --method tempflow --dtype bf16 --ema 0.9", None),
            marks=pytest.mark.slow,
        ),
        (train_image, "--splits auto --size-prune 0.5 --silent-prompts 0.5 --reward jpeg", None),
        (train_image, "--objective elbo --method ode --flash 4 --lora 2 --kl 0.1", 2 * (16 + 8)),
        (train_image, "--objective nft --updates 2 --micro-batch 3 --noise-draws 1", None),
        pytest.param(train_video, "--objective nft --method ode --frames 5", None, marks=pytest.mark.slow),
        (train_video, "--objective endpoint --frames 5", None),
    ],
)
def test_every_objective_trains(tmp_path, module, flags, nfe):
    """It moves the weights, a resumed run has the same rows, and model evaluations are counted."""
    rows = run(module, tmp_path / "a", flags)
    assert all(row["grad_norm"] > 0 and row["trained_edges"] > 0 for row in rows[1:])
    assert rows[0]["heldout_reward"] != rows[-1]["heldout_reward"]
    assert nfe is None or rows[1]["nfe"] == nfe
    shutil.rmtree(tmp_path / "a/checkpoint-2")  # as if it had been stopped after the first iteration
    assert run(module, tmp_path / "a", f"{flags} --resume") == rows


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--objective endpoint --method flowgrpo", "compares siblings"),
        ("--objective surrogate --method ode", "give --objective elbo or nft"),
        ("--objective endpoint --depth-prune", "--depth-prune does not go with --objective endpoint"),
        ("--objective elbo --loss-weight path", "--loss-weight does not go with --objective elbo"),
        ("--splits auto --depth-prune", "--splits auto does not go with --depth-prune"),
        ("--size-prune 0.5 --width-prune", "--size-prune does not go with --width-prune"),
        ("--splits automatic", "whole numbers"),
        ("--noise-draws 2", "--noise-draws does not go with --objective surrogate"),
        ("--objective fdfo", "invalid choice"),
    ],
)
def test_objectives_that_find_nothing_to_train(capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        train_image.main(flags.split())
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_the_table_of_objectives_is_complete():
    """Every objective has a row in the module's table."""
    assert all(f"| {name} " in objectives.__doc__ for name in OBJECTIVES)
