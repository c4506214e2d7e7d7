"""BranchGRPO, the algorithm: roll out a forest, credit its edges, update the policy on those that are kept.

Idea (arXiv:2509.06040v5): independent rollouts repeat the same early steps and share one sparse reward. A tree shares the
prefixes, so it costs fewer model calls, and its leaf rewards, fused upwards, give every depth an advantage of its own.

1. rollout    one transformer call a depth, for all prompts and nodes at once                        Eq. 1 and 2
2. credit     fuse leaf rewards upwards, normalise over each depth of a prompt                       Eq. 3 and 4
3. prune      choose the edges to train; rollouts and rewards are untouched
4. gather     the kept edges as flat arrays, a row for every parent that still has one
5. update     clipped surrogate over those edges; siblings share one forward and one backward        Eq. 5

Direction of time: step i walks from sigma_i (depth i) to sigma_{i+1} (depth i + 1); depth 0 is noise.

Departures from the paper and its code. The last step is an ODE step and is not trained. Log-probs are means over dimensions.
Every update is explicit (`--updates`): the published code steps its optimiser about 37 times an iteration. Every method of
the field is a forest with a schedule (schedules.py), so baselines share all of this code.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sde import branch_noise, gaussian_logp_mean, second_order, step_moments
from tree import Forest, depth_advantages, drop_window, fuse, intersect, keep_chosen, keep_extreme, keep_parent_top1

STATS = ("loss", "ratio_dev", "clip_frac", "kl", "grad_norm")  # of an update
Cond = dict[str, Tensor]  # what a policy makes of prompts, which are the first dimension of each


class NonFinite(RuntimeError):
    """A loss or a gradient is NaN or infinite: training stops before the optimiser sees it."""


@dataclass(frozen=True)
class Sampler:
    """What defines a transition: sigmas (T+1,) float64, the step's kind, its noise strength eta, branch noise s, density.

    flash: the tail of a rollout, after its last stochastic step, takes second-order steps, its first and last apart.
    """

    sigmas: Tensor
    kind: str
    eta: float
    s: float = 4.0
    density: str = "true"
    flash: bool = False

    def moments(self, step: Tensor, x: Tensor, v: Tensor, stochastic: bool = True) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and std (B, 1, ..., 1) of the next latent; step (B,) may differ from row to row."""
        sigmas = self.sigmas.to(x.device, x.dtype)
        shape = (-1, *[1] * (x.ndim - 1))
        sigma, sigma_next = sigmas[step].view(shape), sigmas[step + 1].view(shape)
        return step_moments(self.kind if stochastic else "ode", x, v, sigma, sigma_next, self.eta, float(sigmas[1]))


@dataclass
class Rollout:
    """A forest of P prompts, sampled.

    latents: T+1 tensors (P, n_d, *latent) float32, exactly those whose log-prob was taken (no cast after it).
    logp_mean: T tensors (P, n_{i+1}); 0 on deterministic edges.
    x0hat: T tensors (P, n_d, *latent), the clean estimate at every node that has children; empty unless asked for.
    """

    latents: list[Tensor]
    logp_mean: list[Tensor]
    x0hat: list[Tensor]

    def path_logp(self, forest: Forest) -> Tensor:
        """(P, leaves) float64: log-probs summed along each leaf's path."""
        steps = range(forest.steps)
        return sum(self.logp_mean[i].double()[:, forest.ancestors(i + 1, forest.steps)] for i in steps)


def generators(seed: int, iteration: int, slots: range) -> list[torch.Generator]:
    """A CPU generator for each prompt slot, keyed by (seed, iteration, slot).

    Noise then depends neither on the device, nor on micro-batches, nor on how many processes share the prompts, and a
    resumed run needs no saved random state.
    """
    seeds = [int(np.random.SeedSequence([seed, iteration, slot]).generate_state(1)[0]) for slot in slots]
    return [torch.Generator().manual_seed(s) for s in seeds]


def repeat_cond(cond: Cond, times: int) -> Cond:
    """Every prompt's conditioning `times` times, adjacent: (P, ...) -> (P * times, ...)."""
    return {name: value.repeat_interleave(times, 0) for name, value in cond.items()}


def take_cond(cond: Cond, index: Tensor) -> Cond:
    """The conditioning of the prompts at `index`: (P, ...) -> (B, ...)."""
    return {name: value[index.to(value.device)] for name, value in cond.items()}


def velocity(policy, x: Tensor, step: Tensor, sampler: Sampler, cond: Cond, micro_batch: int = 0) -> Tensor:
    """The policy's velocity at a batch of nodes, in micro-batches where asked: x (B, ...), step (B,) -> (B, ...)."""
    sigma = sampler.sigmas.to(x.device, x.dtype)[step]
    if not 0 < micro_batch < len(x):
        return policy.velocity(x, sigma, cond)
    parts = torch.arange(len(x)).split(micro_batch)
    return torch.cat([policy.velocity(x[p], sigma[p], take_cond(cond, p)) for p in parts])


@torch.no_grad()
def rollout(
    policy, cond: Cond, forest: Forest, sampler: Sampler, rng, micro_batch: int = 0, keep_x0hat=False, store=None
) -> Rollout:
    """Sample a forest for every prompt, one transformer call a depth for all prompts and nodes (Eq. 1 and 2).

    Args:
        policy: see policy.py.
        cond: conditioning of P prompts.
        forest: its shape; its steps are sampler.sigmas' T.
        rng: P generators, one a prompt, from `generators`.
        micro_batch: the most nodes in one transformer call; 0 is no limit.
        keep_x0hat: keep the clean estimate of every node, for drawing.
        store: device that keeps the latents; by default the policy's.
    """
    shape, device = policy.latent_shape, next(iter(cond.values())).device
    x = torch.stack([torch.randn(forest.roots, *shape, generator=g) for g in rng]).to(device)  # (P, n_0, ...)
    store, x0hat = store or device, None
    out = Rollout([x.to(store)], [], [])
    for i, k in enumerate(forest.children):
        nodes = x.flatten(0, 1)  # (P n_i, ...)
        step = torch.full((len(nodes),), i, device=device)
        v = velocity(policy, nodes, step, sampler, repeat_cond(cond, x.shape[1]), micro_batch)
        mean, std = sampler.moments(step, nodes, v, forest.stochastic(i))
        if keep_x0hat or sampler.flash:
            before, x0hat = x0hat, nodes - sampler.sigmas[i].item() * v
        if keep_x0hat:
            out.x0hat.append(x0hat.unflatten(0, x.shape[:2]))
        if sampler.flash and forest.last_stochastic + 1 < i < forest.steps - 1:  # its first and last steps stay Euler
            mean = second_order(nodes, x0hat, before, sampler.sigmas[i - 1 : i + 2].tolist())
        if forest.stochastic(i):
            mean, std = mean.repeat_interleave(k, 0), std.repeat_interleave(k, 0)  # (P n_{i+1}, ...)
            noise = torch.cat([branch_noise(x.shape[1], k, shape, sampler.s, g) for g in rng]).to(device)
            children = mean + std * noise
            logp = gaussian_logp_mean(children, mean, std, sampler.density)
        else:
            children, logp = mean, torch.zeros(len(mean), device=device)
        x = children.unflatten(0, (len(rng), -1))  # (P, n_{i+1}, ...)
        out.latents.append(x.to(store))
        out.logp_mean.append(logp.unflatten(0, (len(rng), -1)))
    return out


@torch.no_grad()
def sample_ode(policy, cond: Cond, sampler: Sampler, noise: Tensor, micro_batch: int = 0) -> Tensor:
    """Evaluation: the deterministic walk of the same T steps from given noise (B, ...) to clean latents (B, ...)."""
    x = noise
    for i in range(len(sampler.sigmas) - 1):
        step = torch.full((len(x),), i, device=x.device)
        x = sampler.moments(step, x, velocity(policy, x, step, sampler, cond, micro_batch), stochastic=False)[0]
    return x


def credit(out: Rollout, forest: Forest, rewards: Tensor, beta: float, adv_clip: float, group=False) -> list[Tensor]:
    """Edge advantages (T tensors (P, n_{i+1})) from leaf rewards (P, leaves), by Eq. 3 and 4."""
    fused = fuse(rewards.to(out.logp_mean[0].device), out.path_logp(forest), forest, beta)
    return depth_advantages([f.cpu() for f in fused], adv_clip, group=group)


def prune(forest: Forest, rewards: Tensor, width: str | int | None, depth: tuple[int, int] | None, trained_steps=None):
    """The edges to train, before the rule that deterministic ones are not: T bool masks (P, n_{i+1}).

    Args:
        rewards: (P, leaves), which rank the leaves.
        width: None, "parent-top1", or b for Extreme-b.
        depth: None, or (start, width) of the window of steps to drop.
        trained_steps: the stochastic steps that are trained; None is all.
    """
    keep = keep_chosen(forest, len(rewards))
    if trained_steps is not None:
        keep = [k & (i in trained_steps or not forest.stochastic(i)) for i, k in enumerate(keep)]
    if width == "parent-top1":
        keep = intersect(keep, keep_parent_top1(forest, rewards))
    elif width is not None:
        keep = intersect(keep, keep_extreme(forest, rewards, width))
    if depth is not None:
        keep = intersect(keep, drop_window(forest, *depth))
    return keep


@dataclass
class Edges:
    """Kept stochastic edges as flat arrays: N parents, a row each, and E >= N edges sorted by parent.

    x (N, *latent), step (N,), prompt (N,); child (E, *latent), parent (E,) into the N rows, advantage, logp_old, weight (E,).
    """

    x: Tensor
    step: Tensor
    prompt: Tensor
    child: Tensor
    parent: Tensor
    advantage: Tensor
    logp_old: Tensor
    weight: Tensor


def flatten_edges(
    out: Rollout, forest: Forest, keep, advantages, prompts: Tensor, loss_weight: str, step_weight=None
) -> Edges:
    """Flatten the kept stochastic edges of some prompts.

    Args:
        keep, advantages: T tensors (P, n_{i+1}).
        prompts: (p,) indices of the prompts of this update.
        loss_weight: "edge" counts every edge once (Eq. 5); "path" weighs an edge by its share of the prompt's leaves,
            1/n_{i+1}, as a flat rollout does, so that every depth weighs the same.
        step_weight: (T,) factor of each step's loss, for TempFlow-GRPO; ones by default. It is no part of the divisor.
    """
    columns: dict[str, list[Tensor]] = {name: [] for name in Edges.__dataclass_fields__}
    parents_so_far = 0
    for i in filter(forest.stochastic, range(forest.steps)):
        mask = keep[i][prompts].unflatten(1, (forest.sizes[i], -1))  # (p, n_i, K)
        trained = mask.any(2)  # (p, n_i)
        row = parents_so_far + trained.flatten().cumsum(0).view_as(trained) - 1  # number of each trained parent
        parents_so_far += int(trained.sum())
        device = out.latents[i].device
        edge, node = mask.flatten(1).to(device), trained.to(device)
        factor = step_weight[i] if step_weight else 1.0  # > 0, so it passes through the clipped loss
        columns["x"].append(out.latents[i][prompts][node])
        columns["step"].append(torch.full((int(trained.sum()),), i))
        columns["prompt"].append(prompts[trained.nonzero()[:, 0]])
        columns["child"].append(out.latents[i + 1][prompts][edge])
        columns["parent"].append(row.unsqueeze(2).expand_as(mask)[mask])
        columns["advantage"].append(advantages[i][prompts][mask.flatten(1)].float() * factor)
        columns["logp_old"].append(out.logp_mean[i][prompts][edge])
        weight = 1 / forest.sizes[i + 1] if loss_weight == "path" else 1.0
        columns["weight"].append(torch.full((int(mask.sum()),), weight))
    return Edges(**{name: torch.cat(parts).to(out.latents[0].device) for name, parts in columns.items()})


def micro_batch_of(edges: Edges, rows: slice, device) -> Edges:
    """The parents at `rows` and their edges, on the device that computes."""
    ends = torch.tensor([rows.start, rows.stop], device=edges.parent.device)
    e = slice(*torch.searchsorted(edges.parent, ends).tolist())
    some = {name: getattr(edges, name)[rows if name in ("x", "step", "prompt") else e] for name in vars(edges)}
    some["parent"] = some["parent"] - rows.start
    return Edges(**{name: value.to(device) for name, value in some.items()})


def clipped_loss(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate, negated (Eq. 5): -min(rho A, clip(rho, 1-e, 1+e) A), elementwise (E,)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def update(policy, optimizer, accelerator, edges: Edges, cond: Cond, sampler: Sampler, args) -> dict[str, float]:
    """One optimiser step on the kept edges of this process and of all others (Eq. 5).

    loss = sum_e w_e clipped_loss_e / sum_e w_e + kl * mean over trained parents of mean_D (m - m_ref)^2 / (2 std^2), both
    means over all micro-batches and processes.

    Args:
        args: options clip, kl, micro_batch, max_grad_norm.

    Returns:
        loss, ratio_dev = max |rho - 1|, clip_frac (of the ratios), kl, grad_norm.

    Raises:
        NonFinite: on every process at once, before the optimiser steps.
    """
    device = next(iter(cond.values())).device  # the edges may lie elsewhere
    n_parents, n_edges = len(edges.x), len(edges.child)
    total = torch.tensor([float(edges.weight.sum()), float(n_parents)], device=device)
    total = accelerator.reduce(total, "sum")
    if not total[0]:  # on every process alike: a window may leave nothing to train
        return dict.fromkeys(STATS, 0.0)
    size = args.micro_batch or n_parents
    sums = torch.zeros(3, device=device)  # loss, clipped edges, kl
    ratio_dev = torch.zeros((), device=device)
    optimizer.zero_grad(set_to_none=True)
    for a in range(0, n_parents, size):
        rows = slice(a, min(a + size, n_parents))
        p = micro_batch_of(edges, rows, device)
        last_one = rows.stop == n_parents
        with nullcontext() if last_one else accelerator.no_sync(policy.transformer):  # DDP sums at the end
            c = take_cond(cond, p.prompt)
            v = velocity(policy, p.x, p.step, sampler, c)
            mean, std = sampler.moments(p.step, p.x, v)
            logp = gaussian_logp_mean(p.child, mean[p.parent], std[p.parent], sampler.density)
            ratio = (logp - p.logp_old).exp()
            loss = (p.weight * clipped_loss(ratio, p.advantage, args.clip)).sum() / total[0]
            kl = torch.zeros((), device=device)
            if args.kl:
                with torch.no_grad():
                    v_ref = policy.velocity(p.x, sampler.sigmas.to(v)[p.step], c, reference=True)
                    mean_ref, _ = sampler.moments(p.step, p.x, v_ref)
                kl = ((mean - mean_ref) ** 2 / (2 * std**2)).flatten(1).mean(1).sum() / total[1]
            accelerator.backward((loss + args.kl * kl) * accelerator.num_processes)  # DDP averages over processes
        with torch.no_grad():
            ratio_dev = torch.maximum(ratio_dev, (ratio - 1).abs().max())
            sums += torch.stack([loss + args.kl * kl, ((ratio - 1).abs() > args.clip).float().sum() / n_edges, kl])
    sums = accelerator.reduce(sums, "sum")
    grad_norm = accelerator.clip_grad_norm_(policy.trainable(), args.max_grad_norm or math.inf)
    if not (sums.isfinite().all() and torch.as_tensor(grad_norm).isfinite()):
        raise NonFinite(f"the loss ({float(sums[0])}) or its gradient norm ({float(grad_norm)}) is not finite")
    optimizer.step()
    found = (sums[0], accelerator.gather(ratio_dev).max(), sums[1] / accelerator.num_processes, sums[2], grad_norm)
    return dict(zip(STATS, map(float, found)))
