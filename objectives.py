"""Objectives: what can be learnt from the leaves of one forest, beside the clipped surrogate of Eq. 5.

Idea: after a rollout every leaf has a clean latent x0 and a reward. Eq. 5 reinforces the noises that were injected on
the way there. Nearly all of such a noise does nothing to the reward, so its direction is mostly chance. The others look
at where the paths ended instead:

| --objective | what is trained                 | direction of the update                      | density | units       |
|-------------|---------------------------------|----------------------------------------------|---------|-------------|
| surrogate   | every noisy step that is kept   | the injected noises, by advantage (Eq. 5)    | yes     | 3 / parent  |
| endpoint    | clean estimates at split nodes  | from the worse children's ends to the better | no      | 3 / split   |
| elbo        | the velocity at noised leaves   | towards good leaves, away from bad ones      | bound   | 3 / draw    |
| nft         | the velocity at noised leaves   | the same, by two regressions                 | no      | 3 / draw    |

A unit is one forward; a backward is two. A split is a node that branches, a draw one noised copy of one leaf.

1. split_points, endpoint      one row per split node; a pull on its clean estimate
2. noised_leaves               --noise-draws copies of every leaf, each at a noise level of its own
3. elbo                        ELBO policy gradient, also known as AWM
4. nft                         DiffusionNFT
5. OBJECTIVES                  name -> how rows are made, and their loss; `branchgrpo.update` does the rest
6. rows_per_prompt             what they cost

All share rollouts, credit, micro-batches, processes and the KL term. `endpoint` needs splits. `elbo` and `nft` need no
noise, so their rollouts may be plain ODEs (--method ode).

Direction of time: as in sde.py. x_sigma = (1 - sigma) x0 + sigma eps and v = eps - x0, so x0hat = x - sigma v.

Sources, and departures from them:
- endpoint: finite differences of flows (FDFO, arXiv:2603.12893) take pairs of whole paths. Here a pair is two siblings,
  and the leaves below a child are averaged, which removes the chance of later splits. Only a tree can do that.
- elbo: arXiv:2509.25050 and arXiv:2602.04663 weigh the error of the velocity evenly over noise levels. Here it is the
  error of the clean estimate, which weighs it by sigma^2: that learnt faster on the embedded model (LAB.md).
- nft: arXiv:2509.16117 rolls out with a slow average of the policy. Here the old policy is that which made the leaves.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from branchgrpo import (
    Cond,
    Edges,
    Rollout,
    Rows,
    Sampler,
    clipped_loss,
    flatten_edges,
    micro_batches,
    moved,
    rows_chosen,
    surrogate,
    take_cond,
    take_rows,
)
from tree import Forest, count


def edges(out: Rollout, forest: Forest, keep, advantages, values, prompts, rng, args, step_weight=None) -> Edges:
    """The rows of Eq. 5, see `branchgrpo.flatten_edges`; this has the arguments that all objectives share.

    Args:
        out, forest: the rollout and its shape.
        keep: T masks (P, n_{i+1}) of the edges to train.
        advantages: T tensors (P, n_{i+1}) from `credit`; the last one is that of the leaves.
        values: (P, leaves) weighted rewards, on their own scale.
        prompts: (p,) indices of the prompts of this optimiser step.
        rng: P generators, for noise that is drawn after the rollout.
        args: options loss_weight, noise_draws, shift, adv_clip.
        step_weight: (T,) factors of each step's loss, or None for ones.
    """
    return flatten_edges(out, forest, keep, advantages, prompts, args.loss_weight, step_weight)


# ------------------------------------------------------------------------------------------------------------ endpoint
@dataclass
class Points(Rows):
    """Split nodes: N rows. x (N, *latent) at step (N,); pull (N, *latent), the direction for its clean estimate."""

    step: Tensor
    pull: Tensor


def split_points(
    out: Rollout, forest: Forest, keep, advantages, values, prompts, rng, args, step_weight=None
) -> Points:
    """A row for every split node that is trained, with the direction in which its better children ended.

        X_b = mean of x0 over the leaves below child b      d_b = X_b - mean_b X_b
        R_b = mean of their rewards                         c_b = R_b - mean_b R_b
        g   = sum_b c_b d_b / sqrt(mean_D sum_b d_b^2)

    g is the reward's slope along what differs between the children, times the size of that difference. Two children
    that end at +e and -e with rewards 1 and -1 give g = 2 e / sqrt(mean_D 2 e^2), which has length sqrt(2 D)
    whatever the size of e. Rewards keep their scale, so a prompt whose leaves differ more teaches more; over each
    prompt's own standard deviation it learnt more slowly (LAB.md).

    Arguments: see `edges`.
    """
    ends = out.latents[-1][prompts]  # (p, leaves, *latent)
    rewards = values[prompts].to(ends)  # (p, leaves)
    columns: dict[str, list[Tensor]] = {name: [] for name in Points.__dataclass_fields__}
    for i in forest.splits:
        # The leaves below a child are adjacent: with 8 leaves and K = 2 at step 0, 0..3 and 4..7.
        families = (forest.sizes[i], forest.children[i], -1)  # n_i nodes, K children, leaves below each
        x0 = ends.unflatten(1, families).mean(3)  # (p, n_i, K, *latent)
        reward = rewards.unflatten(1, families).mean(3)  # (p, n_i, K)

        # Differences between siblings; what they share teaches nothing about their choice.
        d = x0 - x0.mean(2, keepdim=True)
        c = reward - reward.mean(2, keepdim=True)
        scale = d.square().sum(2).flatten(2).mean(2).sqrt().clamp_min(1e-8)  # (p, n_i)
        pull = torch.einsum("pnk,pnk...->pn...", c, d) / scale.view(*scale.shape, *[1] * (x0.ndim - 3))

        # A node is trained if one of its edges is kept.
        trained = keep[i][prompts].unflatten(1, (forest.sizes[i], -1)).any(2)  # (p, n_i)
        node, n = rows_chosen(trained, prompts), int(trained.sum())
        columns["x"].append(take_rows(out.latents[i], node))  # (N_i, *latent)
        columns["prompt"].append(prompts[trained.nonzero()[:, 0]])
        columns["step"].append(torch.full((n,), i))
        columns["pull"].append(take_rows(pull, rows_chosen(trained, torch.arange(len(prompts)))))
        columns["weight"].append(torch.full((n,), step_weight[i] if step_weight else 1.0))
    return Points(**{name: moved(torch.cat(tensors), ends.device) for name, tensors in columns.items()})


def endpoint(
    policy, points: Points, cond: Cond, sampler: Sampler, clip: float | None, with_kl=False
) -> tuple[Tensor, None, Tensor | None]:
    """Pull the clean estimate at a split towards the ends of the children that scored higher.

        loss_n = - mean_D < g_n, x0hat_theta(x_n, sigma_n) >,    x0hat = x - sigma v

    The gradient with respect to v is sigma g / D: no density, no ratio, nothing to clip. It is biased: where the clean
    estimate moves, the end of the path is taken to move as much (the flow's Jacobian is taken for the identity), which
    holds best where little of the path is left. Known failure: a rate that is too high pulls on and on, since nothing
    holds it back as a clipped ratio does; lower --lr, or add --kl. At the same reward and on the same trees it leaves
    less diversity than Eq. 5: a prompt's pictures are closer to each other, 0.79 of their distance before training
    against 0.86 (bench/spread.py).

    Args:
        clip: not used. The others, and what is returned: see `branchgrpo.surrogate`; there are no ratios.
    """
    cond, sigma = take_cond(cond, points.prompt), sampler.levels(points.x)[points.step]  # (N,)
    v = policy.velocity(points.x, sigma, cond)
    x0hat = points.x - sigma.view(-1, *[1] * (v.ndim - 1)) * v
    loss = -(points.pull * x0hat).flatten(1).mean(1)  # (N,)
    return loss, None, velocity_kl(policy, points.x, sigma, cond, v) if with_kl else None


def velocity_kl(policy, x: Tensor, sigma: Tensor, cond: Cond, v: Tensor) -> Tensor:
    """mean_D (v - v_ref)^2 (N,): how far the velocity is from the untrained policy's.

    Times the gap in sigma squared over 2 std^2 it is the Gaussian KL of a noisy step. Without noise it has no scale of
    its own, so it is left as it is.
    """
    with torch.no_grad():
        v_ref = policy.velocity(x, sigma, cond, reference=True)
    return (v - v_ref).square().flatten(1).mean(1)


# ------------------------------------------------------------------------------------------ objectives on noised leaves
@dataclass
class Noised(Rows):
    """Leaves with noise on them: N = P leaves draws rows, x (N, *latent) at noise level sigma (N,).

    target (N, *latent): the velocity eps - x0 that leads back to the leaf. advantage (N,): of the leaf. v_old (N,
    *latent): the velocity of the policy that made the leaves; None where that is the policy itself, in the first
    optimiser step.
    """

    sigma: Tensor
    target: Tensor
    advantage: Tensor
    v_old: Tensor | None = None


def noised_leaves(
    out: Rollout, forest: Forest, keep, advantages, values, prompts, rng, args, step_weight=None
) -> Noised:
    """--noise-draws copies of every leaf, each noised to a level of its own: x = (1 - sigma) x0 + sigma eps.

    Levels and noises are shared by the leaves of a prompt. What a level or a noise does to the loss is then the same
    for good and bad leaves, and cancels, since their advantages sum to zero. The levels are stratified: of J draws the
    j-th lies in the j-th of J equal parts of the schedule's time.

    Arguments: see `edges`.
    """
    x0, draws = out.latents[-1][prompts], args.noise_draws  # (p, leaves, *latent)
    shape, leaves = x0.shape[2:], forest.leaves
    own = [rng[int(p)] for p in prompts]

    # u = (j + a number in [0, 1)) / J, and sigma by the schedule's shift, as in `sde.sigma_schedule`.
    u = torch.stack([torch.rand(draws, generator=g) for g in own])  # (p, J)
    u = (torch.arange(draws) + u) / draws
    sigma = (args.shift * u / (1 + (args.shift - 1) * u)).to(x0)
    eps = torch.stack([torch.randn(draws, *shape, generator=g) for g in own]).to(x0)  # (p, J, *latent)

    # Row ((p leaves) + leaf) J + j: every leaf of a prompt beside every draw.
    level = sigma.view(len(own), 1, draws, *[1] * len(shape))
    x = (1 - level) * x0.unsqueeze(2) + level * eps.unsqueeze(1)  # (p, leaves, J, *latent)
    target = eps.unsqueeze(1) - x0.unsqueeze(2)
    advantage = advantages[-1][prompts].to(x0).unsqueeze(2).expand(-1, -1, draws)
    return Noised(
        x=x.flatten(0, 2),
        prompt=prompts.repeat_interleave(leaves * draws).to(x0.device),
        weight=torch.ones(len(own) * leaves * draws, device=x0.device),
        sigma=sigma.unsqueeze(1).expand(-1, leaves, -1).flatten(),
        target=target.flatten(0, 2),
        advantage=advantage.flatten() / (args.adv_clip if args.objective == "nft" else 1),
    )


@torch.no_grad()
def remember_velocity(policy, rows: Noised, cond: Cond, micro_batch: int) -> None:
    """Keep the velocity of the policy as it is now: later optimiser steps compare with it. One unit per row."""
    parts = micro_batches(rows, micro_batch, next(iter(cond.values())).device)
    velocities = [policy.velocity(part.x, part.sigma, take_cond(cond, part.prompt)) for part in parts]
    rows.v_old = torch.cat(velocities).to(rows.x.device)


def clean_error(x: Tensor, sigma: Tensor, v: Tensor, target: Tensor) -> Tensor:
    """mean_D |x0hat - x0|^2 = sigma^2 mean_D |v - (eps - x0)|^2, per row (N,)."""
    return sigma**2 * (v - target).square().flatten(1).mean(1)


def elbo(
    policy, rows: Noised, cond: Cond, sampler: Sampler, clip: float | None, with_kl=False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """ELBO policy gradient (AWM, arXiv:2509.25050): raise a bound on the log-likelihood of good leaves.

        E_theta(x0) = - mean_D |x0hat_theta(x_sigma) - x0|^2
        loss = -min(rho A, clip(rho, 1-c, 1+c) A),    rho = exp(E_theta - E_old)

    In the first optimiser step rho is 1, and the gradient is that of -A E_theta. For A < 0 it drives the estimate away
    from the leaf with nothing to stop it on-policy, so it is the first to diverge. Known failure: it raises the
    likelihood of everything that good leaves have, so the colours of a model drift before its letters improve.

    Args and what is returned: see `branchgrpo.surrogate`.
    """
    cond = take_cond(cond, rows.prompt)
    v = policy.velocity(rows.x, rows.sigma, cond)
    error = clean_error(rows.x, rows.sigma, v, rows.target)  # (N,)
    old = error.detach() if rows.v_old is None else clean_error(rows.x, rows.sigma, rows.v_old, rows.target)
    ratio = (old - error).exp()  # exp(E_theta - E_old)
    loss = clipped_loss(ratio, rows.advantage, 1.0 if clip is None else clip)  # on-policy the ratio is exactly 1
    return loss, ratio, velocity_kl(policy, rows.x, rows.sigma, cond, v) if with_kl else None


def nft(
    policy, rows: Noised, cond: Cond, sampler: Sampler, clip: float | None, with_kl=False
) -> tuple[Tensor, None, Tensor | None]:
    """DiffusionNFT (arXiv:2509.16117): regress on good leaves with v, on bad ones with its mirror image, beta = 1.

        r = (1 + A / A_max) / 2,    v+ = v,    v- = 2 v_old - v,    x0+- = x_sigma - sigma v+-
        loss = r |x0+ - x0|^2 / w+  +  (1 - r) |x0- - x0|^2 / w-,    w+- = mean_D |x0+- - x0| without gradient

    Moving v- towards a bad leaf moves v away from it, but both are regressions, bounded from below. In the first
    optimiser step v = v_old, and a row's gradient is elbo's over A_max w. Known failure: as elbo, a drift of what is
    not rewarded; its authors hold it back by rolling out with a slow average of the policy.

    Args:
        clip: not used. The others, and what is returned: see `branchgrpo.surrogate`; there are no ratios.
    """
    cond = take_cond(cond, rows.prompt)
    v = policy.velocity(rows.x, rows.sigma, cond)
    v_old = v.detach() if rows.v_old is None else rows.v_old

    terms = []
    for side in (v, 2 * v_old - v):
        with torch.no_grad():  # |x0+- - x0| = sigma |v+- - target|
            size = (rows.sigma * (side - rows.target).abs().flatten(1).mean(1)).clamp_min(1e-5)  # (N,)
        terms.append(clean_error(rows.x, rows.sigma, side, rows.target) / size)
    r = (1 + rows.advantage) / 2  # the rows' advantages are A / A_max here
    loss = r * terms[0] + (1 - r) * terms[1]
    return loss, None, velocity_kl(policy, rows.x, rows.sigma, cond, v) if with_kl else None


OBJECTIVES: dict[str, tuple[Callable[..., Rows], Callable]] = {  # --objective -> rows of a rollout, their loss
    "surrogate": (edges, surrogate),
    "endpoint": (split_points, endpoint),
    "elbo": (noised_leaves, elbo),
    "nft": (noised_leaves, nft),
}
ON_LEAVES = ("elbo", "nft")  # they need no noise in the rollout


def rows_per_prompt(args, forest: Forest, keep: list[Tensor]) -> int:
    """How many rows the objective trains for one prompt; each takes a forward and a backward.

    Args:
        args: options objective, noise_draws.
        forest, keep: the shape, and T masks (P, n_{i+1}) of which the first prompt is counted.
    """
    if args.objective in ON_LEAVES:
        return forest.leaves * args.noise_draws
    if args.objective == "endpoint":
        return sum(int(keep[i][0].unflatten(0, (forest.sizes[i], -1)).any(1).sum()) for i in forest.splits)
    return count(forest, keep)["trained_parents"]
