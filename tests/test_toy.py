"""The method in the plane: it learns with every objective, its gradients agree with the known one, it draws.

What is known here by other means: the share of the eight modes before training, and the gradient of the expected
reward, differentiated through whole paths.
"""

import json
from functools import partial

import imageio.v2 as imageio
import pytest
import torch

import plane
import toy

OBJECTIVES = {  # each on a forest that suits it
    "surrogate": "",
    "surrogate, noise at the splits only": "--mix 0",
    "endpoint": "--mix 0 --objective endpoint",
    "elbo": "--method ode --objective elbo",
    "nft": "--method ode --objective nft",
}


def share_after(argv: str) -> tuple[float, float]:
    """The rewarded mode's share of the samples before and after training, for flags of the plane."""
    stages = plane.learn(plane.prepare(plane.parse(argv.split())), every=10**6)
    return stages[0]["share"], stages[-1]["share"]


def test_pretrained_samples_are_the_data():
    """Every mode has about an eighth, nearly all samples lie in one, and their spread is the data's."""
    points = plane.evaluate(plane.prepare(plane.parse([])))["points"]
    distance, mode = (points[:, None] - plane.CENTRES).norm(dim=2).min(1)
    shares = mode.bincount(minlength=8) / len(points)
    assert shares.min() > 0.08 and shares.max() < 0.17
    assert (distance < 3 * plane.SPREAD).float().mean() > 0.85
    inside = points[distance < 3 * plane.SPREAD] - plane.CENTRES[mode[distance < 3 * plane.SPREAD]]
    assert 0.6 < inside.std() / plane.SPREAD < 1.3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_reaches_the_mode(objective):
    before, after = share_after(OBJECTIVES[objective])
    assert before < 0.15 and after > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_reaches_the_mode_with_five_seeds(objective):
    for seed in range(1, 6):
        before, after = share_after(f"{OBJECTIVES[objective]} --seed {seed} --mode {plane.NAMES[seed]}")
        assert before < 0.17 and after > 0.8, seed


def test_options_of_training_work_here_too():
    """KL, EMA, several optimiser steps, splits that move, prunings: an iteration of each."""
    for argv in ("--kl 0.1 --ema 0.9", "--updates 2", "--splits auto", "--width-prune", "--depth-prune 2 --updates 2"):
        run = plane.prepare(plane.parse([*argv.split(), "--iterations", "2", "--prompts-per-iteration", "2"]))
        stages = plane.learn(run, every=1)
        assert len(stages) == 3 and stages[0]["reward"] != stages[-1]["reward"], argv
        assert run.history[0]["ratio_dev"] < 1e-5, argv


@pytest.mark.parametrize("s", [0.5, 4])
def test_shared_noise_is_that_of_the_tree(s):
    """Drawn again it leaves every child its own noise: each child alone leads to the same start."""
    args = plane.parse(["--branch-noise", str(s), "--branch", "3", "--splits", "0,2", "--steps", "6"])
    forest, out, *_, shared = plane.grown(plane.prepare(args))
    assert sorted(shared) == [0, 2]
    for i, (start, end) in shared.items():
        mean, std = moments(args, out, i)
        assert torch.allclose(start, mean, atol=1e-5)
        assert (end - start).norm(dim=1).max() < 4 * std / (1 + s**2) ** 0.5

    # With s small nearly all of it is shared, so the children lie at its tip.
    args = plane.parse(["--branch-noise", "0.001", "--branch", "3", "--splits", "0,2", "--steps", "6"])
    forest, out, *_, shared = plane.grown(plane.prepare(args))
    children = out.latents[3][0].unflatten(0, (-1, 3))
    assert torch.allclose(children, shared[2][1].unsqueeze(1).expand_as(children), atol=0.01)


def moments(args, out, i: int) -> tuple[torch.Tensor, float]:
    """Where the nodes of depth i would go without noise, and the std of that step."""
    run = plane.prepare(args)
    x = out.latents[i][0]
    step = torch.full((len(x),), i)
    with torch.no_grad():
        mean, std = run.sampler().moments(step, x, run.policy.velocity(x, run.sampler().levels(x)[step], None))
    return mean, float(std[0])


def test_reward_is_the_bump():
    centre = plane.CENTRES[2:3]
    assert plane.near(centre, ["north"]).item() == 1
    assert plane.near(centre + torch.tensor([[0.6, 0.8]]), ["north"]).item() == pytest.approx(0.60653, abs=1e-5)


@pytest.fixture
def double():
    """Everything that is made meanwhile is float64; not so the pre-trained weights, which other tests share."""
    plane.pretrain()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_known_gradient_is_that_of_the_expected_reward(double):
    """Along a direction it equals the difference quotient of the mean reward of the same paths."""
    run = plane.prepare(plane.parse(["--steps", "4", "--leaves", "4"]))
    run.policy.transformer.double()
    direction = [torch.randn(w.shape, generator=torch.Generator().manual_seed(i)) for i, w in enumerate(weights(run))]
    slope = sum(float((w.grad * d).sum()) for w, d in zip(weights(run, True), direction))

    rewards = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):  # from +1e-5 to -1e-5
            for w, d in zip(weights(run), direction):
                w += step * d
            rewards.append(-mean_reward(run))
    assert slope == pytest.approx((rewards[0] - rewards[1]) / 2e-5, rel=1e-4)


def weights(run, differentiate: bool = False) -> list:
    """The policy's weights, with their known gradient where asked."""
    if differentiate:
        toy.known_gradient(run, noisy_only=False, paths=10_000)
    return run.policy.trainable()


def mean_reward(run) -> float:
    """The mean reward of the paths that toy.known_gradient walks, by the equations of Flow-CPS written out."""
    sigmas = torch.tensor([1, 0.75, 0.5, 0.25, 0])
    generator = torch.Generator().manual_seed(plane.TEST_KEY)
    x = torch.randn(10_000, 2, generator=generator)
    for i in range(4):
        s, t = sigmas[i], sigmas[i + 1]
        v = run.policy.velocity(x, s.expand(len(x)), None)
        std = 0 if i == 3 else t * torch.sin(torch.tensor(0.7 * torch.pi / 2))
        x = (1 - t) * (x - s * v) + (t**2 - std**2) ** 0.5 * (x + (1 - s) * v)
        x = x + std * torch.randn(10_000, 2, generator=generator)
    return float(plane.near(x, ["north-east"] * len(x)).mean())


def test_moments_of_estimates():
    """Estimates g + e and g - e in turn have the signal |g|^2 and the noise |e|^2, up to the few estimates."""
    g, e = torch.tensor([3.0, 0, 0]).double(), torch.tensor([0, 2.0, 0]).double()
    estimates = torch.stack([g + e, g - e] * 500)
    noise, along, across = toy.compared(estimates, [2 * g, torch.tensor([1.0, 1, 0]).double()])
    assert noise == pytest.approx(4 / 9, rel=5e-3)
    assert along == pytest.approx(1, rel=5e-3) and across == pytest.approx(0.5**0.5, rel=5e-3)


def test_gradients_of_the_noisy_steps_agree_with_the_known_one(monkeypatch, capsys):
    """Two roads to one gradient: by log-probs from independent rollouts, and through the paths."""
    monkeypatch.setattr(toy, "ARMS", {name: toy.ARMS[name] for name in ("independent", "star, endpoint")})
    monkeypatch.setattr(toy, "known_gradient", partial(toy.known_gradient, paths=20_000))
    document = toy.gradients([], trials=10, rollouts=64)
    capsys.readouterr()
    for name, (least, noise) in {"independent": (0.95, (5, 20)), "star, endpoint": (0.98, (1, 5))}.items():
        row = document["arms"][name]
        assert row["cosine"][1][0] > least and row["cosine"][1][1] < 0.03, name
        assert noise[0] < row["noise"] < noise[1], name


def test_pictures_and_document(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toy, "COMPARED", {"branchgrpo": "black"})
    toy.main(["--iterations", "8", "--leaves", "4", "--out", str(tmp_path)])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(document) == {"reward_before", "reward_after", "share_before", "share_after", "nfe", "seconds", "out"}
    assert document["nfe"] > 0 and imageio.imread(tmp_path / "toy.png").shape[1] > 1000
    assert len(imageio.mimread(tmp_path / "toy.gif")) > 8


@pytest.mark.parametrize(
    "argv",
    [
        "--splits ,",
        "--eta 1 --sde cps",
        "--method ode",
        "--mode up",
        "--iterations 0",
        "--gradient --splits 0,2",
        "--grad",
    ],
)
def test_bad_flags_are_one_sentence(argv, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        toy.main([*argv.split(), "--out", str(tmp_path)])
    assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
