"""One denoising step as a Gaussian, and the noise that siblings share.

Idea: a flow model is an ODE from noise to data, dx = v dsigma. An SDE with the same marginals turns every step into a
draw from a Gaussian whose density we know, so a trajectory becomes a policy that GRPO can push up or down. The same as dt -> 0:
in few steps dance and flow end noisier than sigma (T = 10, all steps noisy: 1.3 times at .7, dance 3.1 times at 1.6), cps never.

Direction of time: sigma_0 = 1 is pure noise, sigma_T = 0 is the picture; step i walks sigma_i -> sigma_{i+1}, so
dt = sigma_{i+1} - sigma_i < 0. v = v_theta(x, sigma, prompt) points from data to noise.

1. sigma_i        noise levels, shifted towards the noisy end          `sigma_schedule`
2. mean, std      of x_{i+1} given x_i and v: dance, flow, cps or ode  `step_moments`
3. log p          mean over dimensions of the Gaussian log-density     `gaussian_logp_mean`
4. xi_b           noises of K siblings, correlated through s, Eq. 2    `branch_noise`
5. the tail       after the last noise, an ODE in fewer, better steps  `second_order`

Departures from the papers. The log-density is a MEAN over the D dimensions of a latent, the convention of DDPO,
Flow-GRPO and DanceGRPO: with a sum every ratio would explode with D. CPS upstream drops the factor 1/(2 std^2) and the
constants; here that is an option (`density="upstream"`) and the true density the default. The last step, to sigma_T = 0,
is always `ode`: noise added there never reaches the reward.
"""

import math

import torch
from torch import Tensor


def sigma_schedule(steps: int, shift: float = 3.0, tail: tuple[int, int] | None = None) -> Tensor:
    """Noise levels of the sampler: u_i = 1 - i/T, sigma_i = shift u_i / (1 + (shift - 1) u_i).

    Args:
        steps: T >= 1, the number of denoising steps.
        shift: > 0; 1 is uniform, 3 is the Flux setting of DanceGRPO and of arXiv:2509.06040v5.
        tail: (k, n) walks from u_k to 0 in n even steps instead of T - k.

    Returns:
        (T+1,), or with a tail (k+n+1,), float64, decreasing from 1 to 0.

    Raises:
        ValueError: if steps < 1 or shift <= 0.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if shift <= 0:
        raise ValueError(f"shift must be above 0, got {shift}")
    u = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    if tail:
        k, n = tail
        u = torch.cat([u[:k], u[k] * (1 - torch.arange(n + 1, dtype=torch.float64) / n)])
    return shift * u / (1 + (shift - 1) * u)


def dance(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_1: float) -> tuple[Tensor, Tensor]:
    """DanceGRPO (arXiv:2505.07818): mean = x + v dt + (eta^2/2) (x - (1-sigma) x0hat)/sigma^2 dt, std = eta sqrt(-dt)."""
    dt = sigma_next - sigma
    x0hat = x - sigma * v
    score_drift = (eta**2 / 2) * (x - (1 - sigma) * x0hat) / sigma**2
    return x + v * dt + score_drift * dt, eta * (-dt).sqrt()


def flow(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_1: float) -> tuple[Tensor, Tensor]:
    """Flow-GRPO (arXiv:2505.05470): mean = x (1 + s^2 dt/(2 sigma)) + v (1 + s^2 (1-sigma)/(2 sigma)) dt, std = s sqrt(-dt).

    s = a sqrt(sigma/(1-sigma)); at sigma = 1 its denominator is 1 - sigma_1.
    """
    dt = sigma_next - sigma
    s = eta * (sigma / (1 - torch.where(sigma >= 1, sigma_1, sigma))).sqrt()
    x_scale = 1 + s**2 * dt / (2 * sigma)
    v_scale = (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    return x * x_scale + v * v_scale, s * (-dt).sqrt()


def cps(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_1: float) -> tuple[Tensor, Tensor]:
    """Flow-CPS (arXiv:2509.05952): mean = (1-sigma') x0hat + sqrt(sigma'^2 - std^2) x1hat, std = sigma' sin(a pi/2), a < 1."""
    std = sigma_next * math.sin(eta * math.pi / 2)
    x0hat, x1hat = x - sigma * v, x + (1 - sigma) * v
    return (1 - sigma_next) * x0hat + (sigma_next**2 - std**2).sqrt() * x1hat, std


def ode(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_1: float) -> tuple[Tensor, Tensor]:
    """Euler: mean = x + v dt, std = 0."""
    dt = sigma_next - sigma
    return x + v * dt, torch.zeros_like(dt)


def second_order(x: Tensor, x0hat: Tensor, before: Tensor, sigmas: tuple[float, float, float]) -> Tensor:
    """A deterministic step of DPM-Solver++ (2M) in flow form (arXiv:2211.01095, alpha = 1 - sigma).

    x' = D + (sigma'/sigma) (x - D), D = x0hat + h / (2 h_before) (x0hat - x0hat_before), h the step in log((1-sigma)/sigma).
    With D = x0hat this is Euler.

    Args:
        x, x0hat, before: (B, ...) the latents, their clean estimate, and that of the step before.
        sigmas: of the step before, of this one, of the next, which must be above 0.
    """
    a, b, c = (math.log(1 / s - 1) for s in sigmas)
    target = x0hat + (c - b) / (2 * (b - a)) * (x0hat - before)
    return target + sigmas[2] / sigmas[1] * (x - target)


STEPS = {"dance": dance, "flow": flow, "cps": cps, "ode": ode}


def step_moments(
    kind: str, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_1: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the next latent, x' ~ N(mean, std^2 I), by one of STEPS.

    In their equations dt = sigma' - sigma < 0, x0hat = x - sigma v is the clean and x1hat = x + (1-sigma) v the noise estimate.

    Args:
        kind: a name in STEPS.
        x, v: (B, ...) latents and predicted velocities.
        sigma, sigma_next: noise levels, broadcastable to x: (B, 1, ..., 1) or 0-d; sigma > sigma_next >= 0.
        eta: noise strength (eta of dance, a of flow and cps); cps needs 0 < a < 1.
        sigma_1: the second noise level of the schedule, used by flow at sigma = 1.

    Returns:
        mean (B, ...) and std, shaped like sigma.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in STEPS:
        raise ValueError(f"unknown step {kind!r}: choose from {', '.join(STEPS)}")
    return STEPS[kind](x, v, sigma, sigma_next, eta, sigma_1)


def gaussian_logp_mean(x: Tensor, mean: Tensor, std: Tensor, density: str = "true") -> Tensor:
    """MEAN over the D dimensions of log N(x; mean, std^2 I), the policy's log-prob of one step.

    log p = mean_D [ -(x - mean)^2 / (2 std^2) - log std - log(2 pi)/2 ]; "upstream" is Flow-CPS' -mean_D (x - mean)^2.

    Args:
        x, mean: (B, ...); std: > 0, broadcastable, constant over the D dimensions.
        density: "true" or "upstream".

    Returns:
        (B,) log-densities, natural log, per dimension.
    """
    square = ((x - mean) ** 2).flatten(1).mean(1)  # (B,)
    if density == "upstream":
        return -square
    std = std.expand(x.shape).flatten(1)[:, 0]  # (B,)
    return -square / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2


def branch_noise(parents: int, branch: int, shape: tuple[int, ...], s: float, generator: torch.Generator) -> Tensor:
    """Noises of siblings (Eq. 2, arXiv:2509.06040v5): xi_b = (xi_0 + s eta_b) / sqrt(1 + s^2).

    xi_0 is shared by the K siblings of a parent, eta_b is each child's own. Every xi_b ~ N(0, I), whatever s, so a child
    is distributed as a plain SDE step (hence the log-prob uses the unscaled std); Cov(xi_b, xi_b') = I / (1 + s^2).

    Args:
        parents, branch: number of parents and K, children each.
        shape: of one latent.
        s: >= 0; 4 is the paper's best; inf makes siblings independent.
        generator: a CPU generator: the tree is the same on every device.

    Returns:
        (parents * branch, *shape) float32; the children of a parent are adjacent.
    """
    own = torch.randn(parents, branch, *shape, generator=generator)
    if branch > 1 and math.isfinite(s):
        shared = torch.randn(parents, 1, *shape, generator=generator)
        own = (shared + s * own) / math.sqrt(1 + s**2)
    return own.flatten(0, 1)
