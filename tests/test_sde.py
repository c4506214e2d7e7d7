"""One step and the noise of siblings: against the oracle, against closed forms, against torch.distributions."""

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sde import branch_noise, gaussian_logp_mean, sigma_schedule, step_moments

KINDS = ("dance", "flow", "cps", "ode")
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
levels = st.floats(0.02, 0.98)
double = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=double)


def scalar_step(kind, x, v, sigma, sigma_next, eta, sigma_1=0.9):
    """Mean and std of a one-dimensional step, as floats."""
    mean, std = step_moments(kind, tensor(x), tensor(v), *tensor(sigma, sigma_next), eta, sigma_1)
    return mean.item(), std.item()


# ------------------------------------------------------------------------------------------------------------- schedule
@few
@given(st.integers(1, 60), st.floats(0.2, 8))
def test_schedule_is_the_formula(steps, shift):
    sigmas = sigma_schedule(steps, shift)
    assert sigmas.dtype == double and sigmas.shape == (steps + 1,)
    np.testing.assert_allclose(sigmas.numpy(), oracle.sigma_schedule(steps, shift), rtol=1e-12, atol=1e-15)


def test_schedule_falls_from_1_to_0_and_shift_3_is_noisier():
    sigmas = sigma_schedule(20)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert torch.equal(sigmas, sigma_schedule(20, 3.0))
    assert (sigmas[1:-1] > sigma_schedule(20, 1.0)[1:-1]).all()
    assert sigma_schedule(4, 3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])


@pytest.mark.parametrize("steps, shift", [(1, 3.0), (4, 1.0), (20, 3.0), (25, 3.0), (28, 6.5), (50, 0.5)])
def test_schedule_is_that_of_diffusers(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    np.testing.assert_allclose(sigma_schedule(steps, shift).numpy(), scheduler.sigmas.numpy(), atol=1e-6)


@pytest.mark.parametrize("steps, shift", [(0, 3.0), (-1, 3.0), (5, 0.0), (5, -1.0)])
def test_schedule_rejects(steps, shift):
    with pytest.raises(ValueError):
        sigma_schedule(steps, shift)


# -------------------------------------------------------------------------------------------------------------- moments
@few
@given(st.sampled_from(KINDS), levels, levels, st.floats(0.05, 0.95), st.integers(0, 10**6))
def test_moments_are_the_formula(kind, a, b, eta, seed):
    sigma, sigma_next = max(a, b), min(a, b)
    x, v = np.random.default_rng(seed).normal(size=(2, 3, 2))
    want = oracle.step_moments(kind, x, v, sigma, sigma_next, eta, 0.9)
    mean, std = step_moments(kind, *map(torch.from_numpy, (x, v)), *tensor(sigma, sigma_next), eta, 0.9)
    np.testing.assert_allclose(mean.numpy(), want[0], rtol=1e-10, atol=1e-12)
    assert float(std) == pytest.approx(want[1], rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_has_its_own_sigma(kind):
    """A batch whose rows stand at different steps, the first among them, is the rows one by one; std is (B, 1, 1)."""
    sigmas = sigma_schedule(6, 3.0)
    x, v = torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(0), dtype=double)
    step = torch.tensor([0, 1, 4, 2, 0])
    sigma, sigma_next = sigmas[step].view(-1, 1, 1), sigmas[step + 1].view(-1, 1, 1)
    mean, std = step_moments(kind, x, v, sigma, sigma_next, 0.5, float(sigmas[1]))
    assert mean.shape == x.shape and std.shape == (5, 1, 1)

    # One row at a time, with the noise levels as floats.
    for b, i in enumerate(step.tolist()):
        levels = (float(sigmas[i]), float(sigmas[i + 1]), 0.5, float(sigmas[1]))
        want_mean, want_std = oracle.step_moments(kind, x[b].numpy(), v[b].numpy(), *levels)
        np.testing.assert_allclose(mean[b].numpy(), want_mean, rtol=1e-10)
        assert std[b].item() == pytest.approx(want_std, rel=1e-12)


def test_flow_takes_sigma_1_under_the_root_where_sigma_is_1():
    """At sigma = 1: s^2 = a^2 / (1 - sigma_1); mean = x (1 + s^2 dt / 2) + v dt; here a = 0.7, sigma_1 = 0.9."""
    mean, std = scalar_step("flow", 2.0, 0.5, 1.0, 0.9, 0.7, sigma_1=0.9)
    assert std == pytest.approx(math.sqrt(0.49 / 0.1) * math.sqrt(0.1))  # 0.7
    assert mean == pytest.approx(2 * (1 + 4.9 * -0.1 / 2) + 0.5 * -0.1)  # 1.46
    elsewhere = [scalar_step("flow", 2.0, 0.5, 0.9, 0.8, 0.7, sigma_1=s) for s in (0.9, 0.5)]
    assert elsewhere[0] == elsewhere[1]


def test_ode_is_euler():
    assert scalar_step("ode", 2.0, 3.0, 0.75, 0.5, 0.7) == (2.0 + 3.0 * -0.25, 0.0)


@pytest.mark.parametrize("kind", ["dance", "flow", "cps"])
def test_small_noise_reaches_the_ode_at_second_order(kind):
    """mean(eta) - mean(ode) = O(eta^2) and std = O(eta): both shrink, by 100 and by 10 as eta falls by 10."""
    ode, _ = scalar_step("ode", 0.8, -0.3, 0.6, 0.4, 0.0)
    (mean, std), (mean_small, std_small) = (scalar_step(kind, 0.8, -0.3, 0.6, 0.4, eta) for eta in (1e-2, 1e-3))
    assert abs(mean - ode) / abs(mean_small - ode) == pytest.approx(100, rel=0.02)
    assert std / std_small == pytest.approx(10, rel=1e-3) and std_small < 1e-2


@few
@given(levels, levels, st.floats(0.05, 0.95))
def test_cps_coefficients_keep_the_noise_level(a, b, eta):
    """(sqrt(sigma'^2 - std^2))^2 + std^2 = sigma'^2, and the clean estimate has 1 - sigma'.

    x = sigma, v = 1 is the point with x0hat = 0, x1hat = 1; x = 1 - sigma, v = -1 the one with x0hat = 1, x1hat = 0.
    """
    sigma, sigma_next = max(a, b), min(a, b)
    noise, std = scalar_step("cps", sigma, 1.0, sigma, sigma_next, eta)
    clean, _ = scalar_step("cps", 1 - sigma, -1.0, sigma, sigma_next, eta)
    assert noise**2 + std**2 == pytest.approx(sigma_next**2, rel=1e-9)
    assert clean == pytest.approx(1 - sigma_next, rel=1e-9)
    assert std == pytest.approx(sigma_next * math.sin(eta * math.pi / 2))


def variance(sigma, c):
    """Var of x_sigma = (1 - sigma) x0 + sigma xi, x0 ~ N(0, c^2)."""
    return (1 - sigma) ** 2 * c**2 + sigma**2


def variance_after(kind, var, sigma, sigma_next, eta, c):
    """Variance after one step under the exact velocity v = E[xi - x0 | x] = x (sigma - (1 - sigma) c^2) / Var(x)."""
    slope = (sigma - (1 - sigma) * c**2) / variance(sigma, c)
    gain, std = scalar_step(kind, 1.0, slope, sigma, sigma_next, eta)
    return gain**2 * var + std**2


@pytest.mark.parametrize("c", [0.5, 2.0])
@pytest.mark.parametrize("sigma", [0.3, 0.8])
@pytest.mark.parametrize("kind, eta", [("dance", 0.3), ("dance", 1.0), ("flow", 0.7), ("ode", 0.0)])
def test_one_step_keeps_the_marginal(kind, eta, sigma, c):
    """The variance after one step misses the true one by O(dt^2).

    The error is then a quarter where dt is a half. A wrong drift would leave O(dt), and half the error.
    """
    errors = []
    for dt in (4e-4, 2e-4):
        after = variance_after(kind, variance(sigma, c), sigma, sigma - dt, eta, c)
        errors.append(abs(after - variance(sigma - dt, c)))
    assert errors[0] < 1e-4
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("kind, eta", [("dance", 0.3), ("flow", 0.7)])
def test_many_steps_converge_to_the_data(kind, eta, c=0.7):
    """From the exact marginal at sigma = 0.9 to 0.05 in n steps: the variance converges at first order in 1/n."""
    errors = []
    for n in (200, 400):
        path = np.linspace(0.9, 0.05, n + 1)
        var = variance(path[0], c)
        for a, b in zip(path[:-1], path[1:]):
            var = variance_after(kind, var, a, b, eta, c)
        errors.append(abs(var - variance(path[-1], c)))
    assert errors[1] < 5e-3
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_unknown_step_is_an_error():
    with pytest.raises(ValueError, match="heun"):
        scalar_step("heun", 1.0, 1.0, 0.5, 0.4, 0.3)


# ------------------------------------------------------------------------------------------------------------- log-prob
@few
@given(st.floats(0.01, 3), st.integers(0, 10**6))
def test_logp_is_the_mean_over_dimensions_of_normal(std, seed):
    x, mean = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=double)
    stds = std * torch.arange(1, 5, dtype=double).view(4, 1, 1)
    want = torch.distributions.Normal(mean, stds.expand_as(x)).log_prob(x).mean((1, 2))
    torch.testing.assert_close(gaussian_logp_mean(x, mean, stds), want, rtol=1e-10, atol=1e-12)
    for b in range(4):
        assert want[b].item() == pytest.approx(oracle.logp_mean(x[b].numpy(), mean[b].numpy(), float(stds[b])))


def test_logp_takes_a_plain_std():
    x, mean = torch.zeros(2, 5, dtype=double), torch.ones(2, 5, dtype=double)
    want = -1 / (2 * 0.25) - math.log(0.5) - math.log(2 * math.pi) / 2
    assert gaussian_logp_mean(x, mean, torch.tensor(0.5, dtype=double)).tolist() == pytest.approx([want, want])


def test_upstream_density_is_the_bare_square():
    """Flow-CPS' own form: -mean_D (x - mean)^2; rows (1, 3) and (0, 2) give -5 and -2, whatever std."""
    x, mean = torch.tensor([[1.0, 3.0], [0.0, 2.0]]), torch.zeros(2, 2)
    for std in (0.1, 2.0):
        logp = gaussian_logp_mean(x, mean, torch.full((2, 1), std), "upstream")
        assert logp.tolist() == [-5.0, -2.0]


# --------------------------------------------------------------------------------------------------------- branch noise
def siblings(parents, branch, shape, s, seed=0):
    """Branch noise with an axis for parents and one for the K siblings of each."""
    noise = branch_noise(parents, branch, shape, s, torch.Generator().manual_seed(seed))
    assert noise.shape == (parents * branch, *shape)
    return noise.double().unflatten(0, (parents, branch))  # (parents, K, ...)


@pytest.mark.parametrize("s", [0.0, 0.5, 1.0, 4.0, math.inf])
def test_branch_noise_moments(s, n=40_000, sigmas=6):
    """xi_b ~ N(0, 1) whatever s: mean 0, variance 1, fourth moment 3; Cov(xi_b, xi_b') = 1/(1 + s^2).

    Estimators of n draws: the mean has std 1/sqrt(n), the variance sqrt(2/n), the fourth moment sqrt(96/n), the
    covariance sqrt((1 + c^2)/n). All must lie within 6 of them.
    """
    # Each of the 3 siblings by itself is a standard normal.
    noise = siblings(n, 3, (2,), s)
    assert noise.mean(0).abs().max() < sigmas / math.sqrt(n)
    assert ((noise**2).mean(0) - 1).abs().max() < sigmas * math.sqrt(2 / n)
    assert ((noise**4).mean(0) - 3).abs().max() < sigmas * math.sqrt(96 / n)

    # Two of them have the covariance c.
    c = 1 / (1 + s**2)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert ((noise[:, a] * noise[:, b]).mean(0) - c).abs().max() < sigmas * math.sqrt((1 + c * c) / n)


@pytest.mark.parametrize("s", [0.0, 1.0, math.inf])
def test_parents_and_dimensions_are_independent(s, n=40_000, sigmas=6):
    noise = siblings(n, 2, (2,), s)
    across_parents = noise[1:, :, None] * noise[:-1, None, :]  # (n-1, K, K, 2)
    assert across_parents.mean(0).abs().max() < sigmas / math.sqrt(n - 1)
    across_dims = noise[:, :, None, 0] * noise[:, None, :, 1]  # (n, K, K)
    assert across_dims.mean(0).abs().max() < sigmas / math.sqrt(n)


def test_branch_noise_limits_and_adjacency():
    """s = 0: the siblings of a parent are equal and adjacent, other parents differ; s = inf: all differ."""
    same = siblings(5, 3, (4,), 0.0)
    assert torch.equal(same, same[:, :1].expand_as(same))
    assert len({tuple(row) for row in same[:, 0].tolist()}) == 5
    free = siblings(5, 3, (4,), math.inf).flatten(0, 1)
    assert len({tuple(row) for row in free.tolist()}) == 15


def test_siblings_at_s_4_are_closer_than_cousins_and_adjacent():
    """E|xi_b - xi_b'|^2 / D = 2 s^2/(1 + s^2) within a parent, 2 across: 1 against 2 at s = 1; D = 20,000."""
    noise = siblings(3, 2, (20_000,), 1.0).flatten(0, 1)
    distance = ((noise[:, None] - noise[None]) ** 2).mean(-1)
    for a in range(6):
        for b in range(a):
            assert distance[a, b].item() == pytest.approx(1.0 if a // 2 == b // 2 else 2.0, abs=0.1)


def test_branch_noise_is_the_generators():
    shape = (3, 2, (4, 5), 4.0)
    first, again, other = (branch_noise(*shape, torch.Generator().manual_seed(k)) for k in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.float32


def test_branch_noise_of_a_plain_step_is_standard_normal(n=40_000):
    """K = 1 has no siblings: unit variance at any s."""
    for s in (0.0, 1.0, 4.0):
        noise = siblings(n, 1, (1,), s)
        assert abs(noise.var(correction=0).item() - 1) < 6 * math.sqrt(2 / n)
