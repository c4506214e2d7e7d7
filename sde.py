"""One denoising step as a Gaussian, and the noise that siblings share.

Idea: a flow model is an ODE from noise to data, dx = v dsigma. An SDE with the same marginals turns every step into a
draw from a Gaussian whose density we know:

    x_{i+1} = mean(x_i) + std * xi,   xi ~ N(0, I)                                        Eq. 1, arXiv:2509.06040v5

So a trajectory becomes a sequence of actions whose log-probabilities GRPO can push up or down. docs/method.md derives
the equations; here they are computed.

Direction of time: sigma_0 = 1 is pure noise, sigma_T = 0 is the picture. Step i walks sigma_i -> sigma_{i+1}, so
dt = sigma_{i+1} - sigma_i < 0. Between data x0 and noise x1 the path is x = (1-sigma) x0 + sigma x1, so the velocity
v = v_theta(x, sigma, prompt), an estimate of x1 - x0, points from data to noise, and x0hat = x - sigma v estimates x0.

1. sigma_i        noise levels, shifted towards the noisy end                  `sigma_schedule`
2. mean, std      of x_{i+1} given x_i and v: dance, flow, cps or ode          `step_moments`
3. log p          mean over dimensions of the Gaussian log-density             `gaussian_logp_mean`
4. xi_b           noises of K siblings, correlated through s, Eq. 2            `branch_noise`
5. the tail       after the last noise, an ODE in fewer, better steps          `second_order`

Symbols: `eta` is always the noise strength, the flag --eta (DanceGRPO writes eta, Flow-GRPO and Flow-CPS write a).
`zeta_b` is a child's own noise in Eq. 2 (the paper writes eta_b, which would be a second eta). `s` is always the branch
noise of Eq. 2, the flag --branch-noise; the amount of noise of an SDE is g (Flow-GRPO writes sigma_t).

Departures from the papers, and why:
- The log-density is a MEAN over the D dimensions of a latent, the convention of DDPO, Flow-GRPO and DanceGRPO. With
  a sum the ratio of Eq. 5 would be exp(D * something small), which explodes with D.
- Flow-CPS' code drops the factor 1/(2 std^2) and the constants of the density. Here that is an option
  (`density="upstream"`); the true density is the default.
- The last step, to sigma_T = 0, is always `ode`. The published code draws noise there, trains it, and scores a picture
  made without it, so its last edges learn from nothing; scored with it, the picture would have grain.
- dance and flow have the ODE's marginals only in the limit dt -> 0, and dance not even there near sigma = 0: in its
  last noisy step std / sigma' grows with T. With few steps both end with more noise than sigma; cps never does (table
  in docs/method.md).
"""

import math

import torch
from torch import Tensor


def sigma_schedule(steps: int, shift: float = 3.0, tail: tuple[int, int] | None = None) -> Tensor:
    """Noise levels of the sampler: u_i = 1 - i/T, sigma_i = shift u_i / (1 + (shift - 1) u_i).

    Args:
        steps: T >= 1, the number of denoising steps.
        shift: > 0; 1 is uniform, 3 is the FLUX setting of DanceGRPO and of arXiv:2509.06040v5.
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

    # Even times, from noise to data. T = 4 gives u = 1, 0.75, 0.5, 0.25, 0.
    u = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps  # (T+1,)

    # A shorter tail keeps the first k levels and walks the rest in n even steps.
    # T = 4 with tail (2, 1) gives u = 1, 0.75, 0.5, 0.
    if tail:
        k, n = tail
        u = torch.cat([u[:k], u[k] * (1 - torch.arange(n + 1, dtype=torch.float64) / n)])

    # The shift spends more steps where the picture is still noise: with shift 3, u = 0.5 becomes sigma = 0.75.
    # The ends 0 and 1 stay.
    return shift * u / (1 + (shift - 1) * u)


# ------------------------------------------------------------------------------------------ four kinds of a single step
# All have the same arguments and results, see `step_moments`; only flow uses sigma_1, and ode no eta. They discretise
#     dx = v dsigma + (g^2/2) (x - (1-sigma) x0hat)/sigma^2 dsigma + g dW,   dW of variance -dsigma,
# whose noise g dW would widen the marginal; the drift beside v, taken with dsigma < 0, pulls x back by just as much.
# docs/method.md derives it.
def dance(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_1: float) -> tuple[Tensor, Tensor]:
    """DanceGRPO (arXiv:2505.07818), g = eta: a constant amount of noise.

    mean = x + v dt + (eta^2/2) (x - (1-sigma) x0hat)/sigma^2 dt, std = eta sqrt(-dt).
    """
    dt = sigma_next - sigma
    x0hat = x - sigma * v

    # Minus the score of N((1-sigma) x0, sigma^2 I), times g^2/2. It points away from the clean estimate; multiplied by
    # dt < 0 it pulls x towards it, as much as the noise will push it away.
    drift = (eta**2 / 2) * (x - (1 - sigma) * x0hat) / sigma**2
    return x + v * dt + drift * dt, eta * (-dt).sqrt()


def flow(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_1: float) -> tuple[Tensor, Tensor]:
    """Flow-GRPO (arXiv:2505.05470), g = eta sqrt(sigma/(1-sigma)): much noise early, little late.

    mean = x (1 + g^2 dt/(2 sigma)) + v (1 + g^2 (1-sigma)/(2 sigma)) dt, std = g sqrt(-dt).
    It is the same SDE as dance's, written in x and v: x - (1-sigma) x0hat = sigma x + sigma (1-sigma) v.
    """
    dt = sigma_next - sigma

    # At the first step sigma = 1, and 1 - sigma = 0 would be divided by: there the next level, sigma_1, is put in.
    g = eta * (sigma / (1 - torch.where(sigma >= 1, sigma_1, sigma))).sqrt()

    x_scale = 1 + g**2 * dt / (2 * sigma)
    v_scale = (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    return x * x_scale + v * v_scale, g * (-dt).sqrt()


def cps(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_1: float) -> tuple[Tensor, Tensor]:
    """Flow-CPS (arXiv:2509.05952), 0 < eta < 1: part of the noise in x is replaced by new noise, the amount stays.

    mean = (1-sigma') x0hat + sqrt(sigma'^2 - std^2) x1hat, std = sigma' sin(eta pi/2), sigma' the next noise level.
    """
    # eta = 0 replaces nothing (the ODE), eta = 1 all of it. For any eta, std^2 + (sigma'^2 - std^2) = sigma'^2.
    std = sigma_next * math.sin(eta * math.pi / 2)

    # The clean and the noise estimate: what x is mixed from, if v is right.
    x0hat, x1hat = x - sigma * v, x + (1 - sigma) * v
    return (1 - sigma_next) * x0hat + (sigma_next**2 - std**2).sqrt() * x1hat, std


def ode(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_1: float) -> tuple[Tensor, Tensor]:
    """Euler's step of the ODE: mean = x + v dt, std = 0."""
    dt = sigma_next - sigma
    return x + v * dt, torch.zeros_like(dt)


STEPS = {"dance": dance, "flow": flow, "cps": cps, "ode": ode}


def step_moments(
    kind: str, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_1: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the next latent, x' ~ N(mean, std^2 I), by one of STEPS (Eq. 1).

    In their equations dt = sigma' - sigma < 0, x0hat = x - sigma v is the clean and x1hat = x + (1-sigma) v the noise
    estimate.

    Args:
        kind: a name in STEPS.
        x, v: (B, ...) latents and predicted velocities.
        sigma, sigma_next: noise levels, broadcastable to x: (B, 1, ..., 1) or 0-d; sigma > sigma_next >= 0.
        eta: noise strength, > 0; cps needs eta < 1; ode does not use it.
        sigma_1: the second noise level of the schedule, used by flow at sigma = 1.

    Returns:
        mean (B, ...) and std, shaped like sigma.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in STEPS:
        raise ValueError(f"unknown step {kind!r}: choose from {', '.join(STEPS)}")
    return STEPS[kind](x, v, sigma, sigma_next, eta, sigma_1)


# --------------------------------------------------------------------------------------------- density, noise, the tail
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

    # std is the same in all dimensions of a row: one value stands for all, and only the square needs the mean over D.
    std = std.expand(x.shape).flatten(1)[:, 0]  # (B,)
    return -square / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2


def branch_noise(parents: int, branch: int, shape: tuple[int, ...], s: float, generator: torch.Generator) -> Tensor:
    """Noises of siblings (Eq. 2, arXiv:2509.06040v5): xi_b = (xi_0 + s zeta_b) / sqrt(1 + s^2).

    xi_0 is shared by the K siblings of a parent, zeta_b is each child's own. Every xi_b ~ N(0, I) whatever s is, since
    (1 + s^2)/(1 + s^2) = 1. So each child by itself is a plain SDE step: its log-prob uses that step's std, without s.
    Siblings are correlated: Cov(xi_b, xi_b') = I / (1 + s^2), which is 0.5 for s = 1 and 0.059 for s = 4.

    Args:
        parents, branch: number of parents and K, children per parent.
        shape: of one latent.
        s: >= 0; 4 is the paper's best; inf makes siblings independent; 0 makes them equal.
        generator: a CPU generator: the tree is the same on every device.

    Returns:
        (parents * branch, *shape) float32; the children of a parent are adjacent.
    """
    # zeta_b: one draw for each child.
    own = torch.randn(parents, branch, *shape, generator=generator)  # (parents, K, *shape)

    # xi_0: one draw for each parent, broadcast to its K children. An only child, or s = inf, needs none: xi_b = zeta_b.
    if branch > 1 and math.isfinite(s):
        shared = torch.randn(parents, 1, *shape, generator=generator)  # (parents, 1, *shape)
        own = (shared + s * own) / math.sqrt(1 + s**2)

    # Children of parent j become rows jK .. jK + K - 1, the order of the tree: 2 parents, K = 3 -> rows 012 345.
    return own.flatten(0, 1)


def second_order(x: Tensor, x0hat: Tensor, x0hat_before: Tensor, sigmas: tuple[float, float, float]) -> Tensor:
    """A deterministic step of DPM-Solver++ (2M) in flow form (arXiv:2211.01095, alpha = 1 - sigma).

    x' = y + (sigma'/sigma) (x - y), y = x0hat + h / (2 h_before) (x0hat - x0hat_before), `target` below; h is the step
    in lambda = log((1-sigma)/sigma). With y = x0hat this is Euler's step.

    Args:
        x, x0hat, x0hat_before: (B, ...) the latents, their clean estimate, and that of the step before.
        sigmas: of the step before, of this one, of the next one, all below 1 and above 0 (at 0 lambda is infinite).

    Returns:
        (B, ...) the next latents.
    """
    # lambda at the three levels: the steps h_before = b - a and h = c - b are measured in it, because there the
    # solution is smooth.
    a, b, c = (math.log(1 / sigma - 1) for sigma in sigmas)

    # Extrapolate the clean estimate to the middle of the step, along the line through the last two estimates.
    target = x0hat + (c - b) / (2 * (b - a)) * (x0hat - x0hat_before)

    # Then walk towards it: the distance to it shrinks as the noise level does.
    return target + sigmas[2] / sigmas[1] * (x - target)
