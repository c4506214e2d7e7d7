"""BranchGRPO, the algorithm: roll out a forest, credit its edges, update the policy on those that are kept.

Idea (arXiv:2509.06040v5): independent rollouts pay for every early step once per picture, and have one reward per
path. A tree shares the prefixes, so it costs fewer model calls, and its leaf rewards, fused upwards, give every depth
its own advantage.

1. rollout         depth by depth, all nodes of all prompts in one batch                              Eq. 1 and 2
2. credit          fuse leaf rewards upwards, normalise over each depth of a prompt                   Eq. 3 and 4
3. prune           choose the edges to train; rollouts and rewards are untouched
4. flatten_edges   the kept edges as flat arrays, one row for every parent that still has one
5. surrogate       the clipped loss of those edges; siblings share one forward and one backward       Eq. 5
6. update          one optimiser step on it, or on another objective (objectives.py), over micro-batches and processes

Direction of time: step i walks from sigma_i (depth i) to sigma_{i+1} (depth i + 1); depth 0 is noise.

Departures from the paper and its code, and why:
- The last step is an ODE step and is not trained (sde.py says why).
- Log-probs are means over dimensions (sde.py says why).
- Optimiser steps are explicit (`--updates`): the published code takes about 37 per iteration, so that its curves per
  iteration compare different numbers of steps.
- Every method of the field is a forest with a schedule (schedules.py), so baselines share all of this code.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sde import branch_noise, gaussian_logp_mean, second_order, step_moments
from tree import (
    Forest,
    advantages,
    drop_window,
    fuse,
    intersect,
    keep_chosen,
    keep_extreme,
    keep_largest,
    keep_parent_top1,
)

Cond = dict[str, Tensor]  # conditioning: what a policy makes of prompts; the first dimension of each tensor is P


class NonFinite(RuntimeError):
    """A loss or a gradient is NaN or infinite: training stops before the optimiser sees it."""


@dataclass(frozen=True)
class Sampler:
    """What defines a transition from x_i to x_{i+1}.

    Args:
        sigmas: (T+1,) float64 noise levels.
        kind: of a stochastic step, a name in sde.STEPS.
        eta: noise strength.
        s: branch noise of Eq. 2.
        density: of the log-prob, "true" or "upstream", see sde.gaussian_logp_mean.
        flash: the tail, after the last stochastic step, takes second-order steps, see `tail`.
    """

    sigmas: Tensor
    kind: str
    eta: float
    s: float = 4.0
    density: str = "true"
    flash: bool = False
    copies: dict = field(default_factory=dict, compare=False, repr=False)

    def levels(self, like: Tensor) -> Tensor:
        """The noise levels (T+1,) on the device and in the dtype of a tensor, copied there once."""
        key = (like.device, like.dtype)
        if key not in self.copies:
            self.copies[key] = self.sigmas.to(like)
        return self.copies[key]

    def moments(self, step: Tensor, x: Tensor, v: Tensor, stochastic: bool = True) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and std (B, 1, ..., 1) of the next latent; step (B,) may differ from row to row."""
        # Each row has the noise level of its own step, as (B, 1, ..., 1) so that it broadcasts over the latent.
        sigmas = self.levels(x)
        shape = (-1, *[1] * (x.ndim - 1))
        sigma, sigma_next = sigmas[step].view(shape), sigmas[step + 1].view(shape)
        return step_moments(
            self.kind if stochastic else "ode", x, v, sigma, sigma_next, self.eta, float(self.sigmas[1])
        )


@dataclass
class Rollout:
    """A forest of P prompts, sampled; lists over depths or steps.

    latents: T+1 tensors (P, n_d, *latent) float32, exactly those whose log-prob was taken (no cast after it).
    logp_mean: T tensors (P, n_{i+1}); 0 on deterministic edges.
    x0hat: T tensors (P, n_d, *latent), the clean estimate at every node that has children; empty unless asked for.
    """

    latents: list[Tensor]
    logp_mean: list[Tensor]
    x0hat: list[Tensor]

    def path_logp(self, forest: Forest) -> Tensor:
        """(P, leaves) float64 on the CPU: log-probs summed along each leaf's path."""
        # All depths come to the CPU in one transfer, for which the host waits once.
        logp = torch.cat(self.logp_mean, 1).cpu().double().split(forest.sizes[1:], 1)  # T times (P, n_{i+1})

        # Edge i of a leaf's path is the one that leads to the leaf's ancestor at depth i + 1.
        # Two leaves below node 0 of depth 1 both take entry [:, 0] of step 0, then each its own entries.
        steps = range(forest.steps)
        return sum(logp[i][:, forest.ancestors(i + 1, forest.steps)] for i in steps)


def generators(seed: int, iteration: int, slots: range) -> list[torch.Generator]:
    """A CPU generator for each prompt slot, keyed by (seed, iteration, slot); a slot is a prompt's place in its
    iteration.

    Noise then depends neither on the device, nor on micro-batches, nor on how many processes share the prompts, and a
    resumed run needs no saved random state.
    """
    keys = [int(np.random.SeedSequence([seed, iteration, slot]).generate_state(1)[0]) for slot in slots]
    return [torch.Generator().manual_seed(key) for key in keys]


def repeat_cond(cond: Cond, times: int) -> Cond:
    """Every prompt's conditioning `times` times, adjacent: (P, ...) -> (P * times, ...)."""
    return {name: value.repeat_interleave(times, 0) for name, value in cond.items()}


def take_cond(cond: Cond, index: Tensor | slice) -> Cond:
    """The conditioning of the prompts at `index`: (P, ...) -> (B, ...)."""
    return {name: value[index] for name, value in cond.items()}


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on another device; on the way to a GPU without waiting: the host goes on to queue what comes next.

    CUDA copies from pinned memory alone while the host goes on. On the way back the host must wait: it would read
    numbers that have not come yet.
    """
    device = torch.device(device)
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def velocity(policy, x: Tensor, step: Tensor, sampler: Sampler, cond: Cond, micro_batch: int = 0) -> Tensor:
    """The policy's velocity at a batch of nodes, in micro-batches where asked: x (B, ...), step (B,) -> (B, ...)."""
    sigma = sampler.levels(x)[step]
    if not 0 < micro_batch < len(x):
        return policy.velocity(x, sigma, cond)

    # Slices, and no lists of indices, which would have to be copied to the device for each call.
    rows = [slice(a, a + micro_batch) for a in range(0, len(x), micro_batch)]
    return torch.cat([policy.velocity(x[r], sigma[r], take_cond(cond, r)) for r in rows])


# ------------------------------------------------------------------------------------------------- rollout, Eq. 1 and 2
@torch.no_grad()
def rollout(
    policy, cond: Cond, forest: Forest, sampler: Sampler, rng, micro_batch: int = 0, keep_x0hat=False, store=None
) -> Rollout:
    """Sample a forest for every prompt, depth by depth, all nodes of all prompts in one batch (Eq. 1 and 2).

    Args:
        policy: has latent_shape and velocity(x, sigma, cond) -> v like x; see policy.py.
        cond: conditioning of P prompts.
        forest: its shape, with as many steps as sampler.sigmas has intervals.
        rng: P generators, one per prompt, from `generators`.
        micro_batch: the most nodes in one transformer call; 0 is no limit.
        keep_x0hat: keep the clean estimate of every node, for drawing.
        store: device that keeps the latents; by default the policy's.
    """
    shape, device = policy.latent_shape, next(iter(cond.values())).device
    store = store or device

    # Depth 0: the initial noises, sigma_0 = 1, drawn by each prompt's own generator.
    x = moved(torch.stack([torch.randn(forest.roots, *shape, generator=g) for g in rng]), device)  # (P, n_0, *latent)
    out = Rollout([x.to(store)], [], [])

    # Up to the last noise, depth by depth; some of these steps may be deterministic (the ODE prefix, Mix).
    for i in range(forest.last_stochastic + 1):
        # All nodes of all prompts are one batch: node j of prompt p is row p n_i + j, beside its prompt's conditioning.
        nodes = x.flatten(0, 1)  # (P n_i, *latent)
        step = torch.full((len(nodes),), i, device=device)
        v = velocity(policy, nodes, step, sampler, repeat_cond(cond, x.shape[1]), micro_batch)
        mean, std = sampler.moments(step, nodes, v, forest.stochastic(i))

        # Eq. 1 with the noise of Eq. 2: K children per node, equal in mean and std. Those of row r become rows rK ..
        # rK + K - 1, as `branch_noise` lists them. The log-prob is that of the latent which is stored.
        if forest.stochastic(i):
            k = forest.children[i]
            mean, std = mean.repeat_interleave(k, 0), std.repeat_interleave(k, 0)  # (P n_{i+1}, *latent)
            noise = torch.cat([branch_noise(x.shape[1], k, shape, sampler.s, g) for g in rng])
            children = mean + std * moved(noise, device)
            logp = gaussian_logp_mean(children, mean, std, sampler.density)  # (P n_{i+1},)
        else:  # no split is deterministic (Forest checks it), so every node has one child
            children, logp = mean, torch.zeros(len(mean), device=device)

        if keep_x0hat:
            out.x0hat.append((nodes - sampler.sigmas[i].item() * v).unflatten(0, x.shape[:2]))
        x = children.unflatten(0, (len(rng), -1))  # (P, n_{i+1}, *latent)
        out.latents.append(x.to(store))
        out.logp_mean.append(logp.unflatten(0, (len(rng), -1)))

    # From there every node has one child and no step draws noise: an ODE to sigma_T = 0.
    for latents, x0hat in tail(policy, cond, x, forest, sampler, micro_batch):
        out.latents.append(latents.to(store))
        out.logp_mean.append(torch.zeros(latents.shape[:2], device=device))
        if keep_x0hat:
            out.x0hat.append(x0hat)
    return out


def tail(policy, cond: Cond, x: Tensor, forest: Forest, sampler: Sampler, micro_batch: int = 0):
    """The ODE after the last stochastic step, a generator: Euler steps, or with `flash` second-order ones in between.

    Args:
        x: (P, leaves, *latent) at depth last_stochastic + 1, where all branching is over.

    Yields:
        For each step that is left: the latents that it leads to, and the clean estimates that it started from,
        (P, leaves, *latent) each.
    """
    x0hat = None
    for i in range(forest.last_stochastic + 1, forest.steps):
        nodes = x.flatten(0, 1)  # (P leaves, *latent)
        step = torch.full((len(nodes),), i, device=x.device)
        v = velocity(policy, nodes, step, sampler, repeat_cond(cond, x.shape[1]), micro_batch)

        # A second-order step also needs the clean estimate of the one step before. Nothing branches here, so row j of
        # both is the same trajectory.
        x0hat_before, x0hat = x0hat, nodes - sampler.sigmas[i].item() * v
        mean, _ = sampler.moments(step, nodes, v, stochastic=False)

        # The first step stays Euler's: the estimate before it belongs to the parent, before noise was added, and is not
        # on this trajectory. The last one too: at sigma_T = 0 lambda, in which the solver steps, is infinite.
        # And where the step before began at pure noise, sigma = 1 (no step was noisy), lambda is infinite there.
        first, last = x0hat_before is None or sampler.sigmas[i - 1] == 1, i == forest.steps - 1
        if sampler.flash and not first and not last:
            mean = second_order(nodes, x0hat, x0hat_before, sampler.sigmas[i - 1 : i + 2].tolist())

        prompts_and_leaves = x.shape[:2]
        x = mean.unflatten(0, prompts_and_leaves)
        yield x, x0hat.unflatten(0, prompts_and_leaves)


@torch.no_grad()
def sample_ode(policy, cond: Cond, sampler: Sampler, noise: Tensor, micro_batch: int = 0) -> Tensor:
    """Evaluation: the deterministic walk of the same T steps from given noise (B, ...) to clean latents (B, ...)."""
    x = noise
    for i in range(len(sampler.sigmas) - 1):
        step = torch.full((len(x),), i, device=x.device)
        v = velocity(policy, x, step, sampler, cond, micro_batch)
        x, _ = sampler.moments(step, x, v, stochastic=False)
    return x


# ----------------------------------------------------------------------------------------- credit and pruning, Eq. 3, 4
def credit(
    out: Rollout, forest: Forest, rewards: Tensor, beta: float, adv_clip: float, rule: str = "depth"
) -> list[Tensor]:
    """What each edge earned, from the leaf rewards (Eq. 3 and 4).

    Args:
        out: the rollout, whose path log-probs weigh the leaves.
        rewards: (P, leaves), higher is better.
        beta: of Eq. 3, >= 0.
        adv_clip: A_max > 0, to which advantages are clipped on both sides.
        rule: a name in tree.ADVANTAGES.

    Returns:
        T tensors (P, n_{i+1}) float64 on the CPU: edge i takes its child's value.
    """
    # Eq. 3, bottom-up: fused[d] (P, n_d) is what the leaves below each node of depth d are worth.
    fused = fuse(rewards.cpu(), out.path_logp(forest), forest, beta)

    # Eq. 4: compare the nodes of one prompt at one depth. The whole tree is compared, before any pruning.
    return advantages(fused, forest, rule, adv_clip)


def prune(
    forest: Forest,
    rewards: Tensor,
    width: str | int | None,
    depth: tuple[int, int] | None,
    trained_steps=None,
    size: float | None = None,
    advantages: list[Tensor] | None = None,
) -> list[Tensor]:
    """The edges to train: T bool masks (P, n_{i+1}).

    Deterministic edges may be among them, since the paper's NFE counts them; `flatten_edges` leaves them out.

    Args:
        rewards: (P, leaves), which rank the leaves.
        width: None, "parent-top1", or b for Extreme-b.
        depth: None, or (start, width) of the window of steps to drop.
        trained_steps: the stochastic steps that are trained; None is all.
        size: None, or the fraction of each step's parents that is kept by the size of their `advantages`.
    """
    keep = keep_chosen(forest, len(rewards))

    # A fraction of the steps may be trained. Deterministic edges stay: they are counted as the paper counts them.
    if trained_steps is not None:
        keep = [mask & (i in trained_steps or not forest.stochastic(i)) for i, mask in enumerate(keep)]

    # Width: whole chains after the last split go. Depth: a window of steps goes. Together an edge must survive both.
    if width == "parent-top1":
        keep = intersect(keep, keep_parent_top1(forest, rewards))
    elif width is not None:
        keep = intersect(keep, keep_extreme(forest, rewards, width))
    if depth is not None:
        keep = intersect(keep, drop_window(forest, *depth))
    if size is not None:
        keep = intersect(keep, keep_largest(forest, advantages, size))
    return keep


# ------------------------------------------------------------------------------------------------- the loss, Eq. 5
@dataclass
class Rows:
    """What an objective trains on: N rows, each of which takes one forward and one backward.

    x (N, *latent): the latents at which the velocity is asked for. prompt (N,): whose conditioning a row needs. weight:
    of each term of the loss; (N,) where a row has one term.
    """

    x: Tensor
    prompt: Tensor
    weight: Tensor

    def of_edges(self, name: str) -> bool:
        """Has this field one entry per edge, and not one per row? See Edges."""
        return False


@dataclass
class Edges(Rows):
    """Kept stochastic edges as flat arrays: N parents, one row each, and E >= N edges sorted by parent.

    x (N, *latent), step (N,), prompt (N,): of a parent. child (E, *latent), parent (E,) index into the N rows,
    advantage (E,), logp_old (E,), weight (E,): of an edge.
    """

    step: Tensor
    child: Tensor
    parent: Tensor
    advantage: Tensor
    logp_old: Tensor

    def of_edges(self, name: str) -> bool:
        """Has this field one entry per edge, and not one per parent?"""
        return name not in ("x", "step", "prompt")


def flatten_edges(
    out: Rollout, forest: Forest, keep, credits, prompts: Tensor, loss_weight: str, step_weight=None
) -> Edges:
    """Flatten the kept stochastic edges of some prompts.

    Args:
        keep, credits: T tensors (P, n_{i+1}), masks from `prune` and advantages from `credit`.
        prompts: (p,) indices of the prompts of this update.
        loss_weight: "edge" counts every edge once (Eq. 5); "path" weighs an edge by the fraction of the prompt's leaves
            below it, 1/n_{i+1}, as a flat rollout does, so that without width pruning every depth weighs the same.
        step_weight: (T,) factor of each step's loss, for TempFlow-GRPO; ones by default. It does not enter the divisor.
    """
    columns: dict[str, list[Tensor]] = {name: [] for name in Edges.__dataclass_fields__}
    parents_so_far = 0
    for i in filter(forest.stochastic, range(forest.steps)):
        # A parent is trained if any of its children's edges is kept, since siblings share its forward and backward.
        # With p = 1, n_i = 3, K = 2: mask [[1,0],[0,0],[1,1]] gives trained [1,0,1].
        mask = keep[i][prompts].unflatten(1, (forest.sizes[i], -1))  # (p, n_i, K)
        trained = mask.any(2)  # (p, n_i)

        # Number the trained parents consecutively: cumsum - 1 of [1,0,1] is [0,0,1]. The middle one is never read, as
        # none of its edges is kept, and the edges (in the order of the mask) point at rows [0,1,1].
        row = parents_so_far + trained.flatten().cumsum(0).view_as(trained) - 1  # (p, n_i)
        parents_so_far += int(trained.sum())
        parent = row.unsqueeze(2).expand_as(mask)[mask]  # (E_i,)

        # Parents: latent x_i, step i, and the prompt whose conditioning the transformer needs.
        node, edge = rows_chosen(trained, prompts), rows_chosen(mask.flatten(1), prompts)
        columns["x"].append(take_rows(out.latents[i], node))  # (N_i, *latent)
        columns["step"].append(torch.full((len(node),), i))
        columns["prompt"].append(prompts[trained.nonzero()[:, 0]])

        # Edges: the child x_{i+1} that was drawn, its log-prob then, its advantage. TempFlow-GRPO's factor f scales the
        # loss; as clipped_loss(rho, f A) = f clipped_loss(rho, A) for f >= 0, it is put into the advantage.
        factor = step_weight[i] if step_weight else 1.0
        columns["child"].append(take_rows(out.latents[i + 1], edge))  # (E_i, *latent)
        columns["parent"].append(parent)
        columns["advantage"].append(credits[i][prompts][mask.flatten(1)].float() * factor)
        columns["logp_old"].append(take_rows(out.logp_mean[i], edge))

        # Eq. 5 counts edges: step 0 has 2 of the 202 stochastic edges of the paper's tree (T = 20). With "path" the
        # edges of a step weigh 1 together.
        weight = 1 / forest.sizes[i + 1] if loss_weight == "path" else 1.0
        columns["weight"].append(torch.full((len(edge),), weight))
    return Edges(**{name: moved(torch.cat(tensors), out.latents[0].device) for name, tensors in columns.items()})


def rows_chosen(mask: Tensor, prompts: Tensor) -> Tensor:
    """Where the nodes chosen by a mask lie among all nodes of a depth, prompt by prompt.

    Args:
        mask: (p, n) on the CPU. prompts: (p,) indices of the prompts that its rows are.

    Returns:
        (chosen,) indices into P n rows. Prompts [0, 2] with n = 3 and mask [[1,0,0],[0,1,1]] give [0, 7, 8].
    """
    n = mask.shape[1]
    return (prompts.unsqueeze(1) * n + torch.arange(n))[mask]


def take_rows(level: Tensor, rows: Tensor) -> Tensor:
    """The entries (P, n, ...) -> (rows, ...) at the indices of `rows_chosen`, on the level's own device.

    A mask would make the host wait until the device has counted it; how many indices there are is known already.
    """
    return level.flatten(0, 1)[moved(rows, level.device)]


def micro_batches(batch: Rows, size: int, device) -> Iterator[Rows]:
    """A batch cut into parts of at most `size` rows each, 0 is no limit: the calls that an update makes.

    The parts lie on the device that computes, parents together with their edges.
    """
    size, n = size or max(1, len(batch.x)), len(batch.x)
    tensors = {name: value for name, value in vars(batch).items() if value is not None}

    # Edges are sorted by parent, so those of rows a:b are contiguous: parent [0,1,1,2], rows 1:2 -> edges 1:3. All the
    # bounds are found at once, so the host waits for the device once and not for each part.
    starts = list(range(0, n, size))
    bounds = [0] * (len(starts) + 1)
    if isinstance(batch, Edges):
        ends = moved(torch.tensor([*starts, n]), batch.parent.device)
        bounds = torch.searchsorted(batch.parent, ends).tolist()

    for j, start in enumerate(starts):
        rows, between = slice(start, start + size), slice(bounds[j], bounds[j + 1])
        fields = {name: value[between if batch.of_edges(name) else rows] for name, value in tensors.items()}
        if isinstance(batch, Edges):  # their parents are numbered from 0 again
            fields["parent"] = fields["parent"] - start
        yield type(batch)(**{name: moved(value, device) for name, value in fields.items()})


def split_parents(batch: Rows, n: int, seed: list[int]) -> list[Rows]:
    """The rows, parents with their edges, dealt at random into n sets whose sizes differ by one at most.

    Args:
        n: >= 1, the number of sets, for --updates-by parents.
        seed: keys the permutation. Processes with equally many rows get sets of equal sizes.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(batch.x)))
    subsets = []
    for rows in order.tensor_split(n):
        rows, chosen = rows.sort().values.to(batch.x.device), None  # in order, so edges stay sorted

        # An edge goes where its parent goes. New numbers for the chosen parents, -1 for the others: rows [0,2] of 3 ->
        # [0,-1,1].
        if isinstance(batch, Edges):
            number = torch.full((len(batch.x),), -1, device=rows.device)
            number[rows] = torch.arange(len(rows), device=rows.device)
            chosen = (number[batch.parent] >= 0).nonzero()[:, 0]
        tensors = {name: value for name, value in vars(batch).items() if value is not None}
        fields = {name: value[chosen if batch.of_edges(name) else rows] for name, value in tensors.items()}
        if isinstance(batch, Edges):
            fields["parent"] = number[fields["parent"]]
        subsets.append(type(batch)(**fields))
    return subsets


def clipped_loss(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate, negated (Eq. 5): -min(rho A, clip(rho, 1-c, 1+c) A), elementwise (E,)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def edge_logp(policy, edges: Edges, cond: Cond, sampler: Sampler) -> tuple[Tensor, Tensor, Tensor]:
    """How likely each drawn child is under the policy of now: logp (E,), and mean (N, ...) and std (N, 1, ..., 1).

    One forward per parent: its velocity gives mean and std of the transition to any child.

    Args:
        cond: of the parents' prompts, row by row.
    """
    v = velocity(policy, edges.x, edges.step, sampler, cond)  # (N, *latent)
    mean, std = sampler.moments(edges.step, edges.x, v)
    logp = gaussian_logp_mean(edges.child, mean[edges.parent], std[edges.parent], sampler.density)  # (E,)
    return logp, mean, std


@torch.no_grad()
def remember_logp(policy, edges: Edges, cond: Cond, sampler: Sampler, micro_batch: int) -> None:
    """Take the old log-probs from calls of the same batches as the update's, before any weight moves.

    In bf16 a call of another batch size rounds otherwise. With several optimiser steps per iteration the ratios of the
    later ones are compared with the clip range, and would hold that rounding if the rollout's log-probs were kept. One
    more forward per parent.
    """
    parts = micro_batches(edges, micro_batch, next(iter(cond.values())).device)
    logp = [edge_logp(policy, part, take_cond(cond, part.prompt), sampler)[0] for part in parts]
    edges.logp_old = torch.cat([edges.logp_old[:0], *(x.to(edges.logp_old.device) for x in logp)])


def surrogate(
    policy, edges: Edges, cond: Cond, sampler: Sampler, clip: float | None, with_kl: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The body of Eq. 5 on one batch of edges, with gradient and without any machinery.

    loss_e = -min(rho_e A_e, clip(rho_e, 1-c, 1+c) A_e), rho_e = exp(logp_new - logp_old). The log-probs are means over
    D dimensions, so rho is the D-th root of the ratio of densities, and clip ranges are 1e-4 where PPO has 0.2. In the
    first update on a rollout rho = 1 up to rounding, and the gradient is that of -sum_e A_e logp_e.

    Args:
        policy: whose velocity is trained.
        edges: N parents, E edges, on the device that computes.
        cond: conditioning of all prompts; edges.prompt picks from it.
        sampler: the transitions of the rollout.
        clip: c > 0; None on-policy, where no weight has moved since the rollout and nothing may be clipped.
        with_kl: also the divergence from the untrained policy.

    Returns:
        loss (E,), ratio (E,), and kl (N,), which is None without `with_kl`.
    """
    cond = take_cond(cond, edges.prompt)
    logp, mean, std = edge_logp(policy, edges, cond, sampler)
    ratio = (logp - edges.logp_old).exp()

    # On-policy both are the same policy, and the ratio is 1 but for rounding: in bf16 a call of another batch size
    # rounds otherwise, by up to 7e-4, which a clip range of 1e-4 would take for a policy that has moved. So the old
    # log-prob is the new one without gradient, and the rollout's is only compared with it.
    if clip is None:
        loss = -(logp - logp.detach()).exp() * edges.advantage
    else:
        loss = clipped_loss(ratio, edges.advantage, clip)
    if not with_kl:
        return loss, ratio, None

    # KL of two Gaussians of equal std, per dimension: mean_D (m - m_ref)^2 / (2 std^2).
    with torch.no_grad():
        v_ref = policy.velocity(edges.x, sampler.levels(mean)[edges.step], cond, reference=True)
        mean_ref, _ = sampler.moments(edges.step, edges.x, v_ref)
    kl = ((mean - mean_ref) ** 2 / (2 * std**2)).flatten(1).mean(1)  # (N,)
    return loss, ratio, kl


# ----------------------------------------------------------------------------------------------------------- the update
def update(
    policy,
    optimizer,
    accelerator,
    batch: Rows,
    cond: Cond,
    sampler: Sampler,
    args,
    objective=surrogate,
    on_policy: bool = False,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, float]:
    """One optimiser step on the kept edges, or other rows, of this process and of all others (Eq. 5).

    loss = sum_e w_e loss_e / sum_e w_e + args.kl * mean over rows of their KL, with w_e from batch.weight; both means
    run over all micro-batches and processes.

    Args:
        batch: what `objective` trains on; Edges by default.
        args: options clip, kl, micro_batch, max_grad_norm.
        objective: `surrogate`, or a function of objectives.py with its arguments and results.
        on_policy: no weight has moved since the rollout: nothing is clipped.
        scaler: of --dtype fp16, whose smallest number is 6e-8: the gradient of one latent number would vanish. So the
            loss is multiplied by a large scale, and the gradients of the weights, float32, are divided by it. Where
            the scale was too large, they are not finite: then no step is made and the scale halves.

    Returns:
        loss, grad_norm, where there are ratios ratio_dev = max |rho - 1| and clip_frac, and kl where it is computed; {}
        if nothing is trained.

    Raises:
        NonFinite: on every process at once, before the optimiser steps.
    """
    device = next(iter(cond.values())).device  # the rows may lie elsewhere
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)  # which passes everything on as it is
    n_rows, n_terms = len(batch.x), len(batch.weight)

    # The divisors of both means. Forests are regular, so all processes hold equally many rows, and either all train
    # or none does. The reduction comes before the return, since it waits for every process; and the host waits for the
    # device here, to know whether there is anything to train.
    total = torch.stack([batch.weight.sum(), torch.full((), float(n_rows), device=batch.weight.device)])
    total_weight, total_rows = accelerator.reduce(moved(total, device), "sum")
    if not total_weight:  # on every process alike: a window may leave nothing to train
        return {}

    sums = torch.zeros(3, device=device)  # loss, fraction of edges with |rho - 1| > c (whatever A), kl
    ratio_dev = torch.zeros((), device=device)
    optimizer.zero_grad(set_to_none=True)
    done, clip = 0, None if on_policy else args.clip
    for part in micro_batches(batch, args.micro_batch, device):
        # Gradients of micro-batches add up. DDP averages them over processes, which it need do in the last one only.
        done += len(part.x)
        last = done == n_rows
        with nullcontext() if last else accelerator.no_sync(policy.transformer):
            loss, ratio, kl = objective(policy, part, cond, sampler, clip, with_kl=args.kl > 0)
            loss = (part.weight * loss).sum() / total_weight
            kl = torch.zeros((), device=device) if kl is None else kl.sum() / total_rows

            # An average over processes of sums over their own edges: times their number it is the sum over all edges.
            accelerator.backward(scaler.scale((loss + args.kl * kl) * accelerator.num_processes))

        with torch.no_grad():
            away = torch.zeros(1, device=device) if ratio is None else (ratio - 1).abs()
            ratio_dev = torch.maximum(ratio_dev, away.max())
            clipped = (away > (math.inf if on_policy else args.clip)).float().sum() / n_terms
            sums += torch.stack([loss + args.kl * kl, clipped, kl])

    # Gradients of the loss itself again, whose norm is clipped.
    scaler.unscale_(optimizer)

    # All that is reported comes to the host in one transfer, for which it must wait before the optimiser steps. Every
    # process sees the same sums and the same norm, so all stop together or none does.
    sums = accelerator.reduce(sums, "sum")
    grad_norm = accelerator.clip_grad_norm_(policy.trainable(), args.max_grad_norm or math.inf)
    if hasattr(grad_norm, "full_tensor"):  # FSDP2: its pieces lie on all processes
        grad_norm = grad_norm.full_tensor()
    reported = [*sums, torch.as_tensor(grad_norm, device=device), accelerator.gather(ratio_dev).max()]
    loss, clip_frac, kl, grad_norm, ratio_dev = torch.stack(reported).tolist()
    if not math.isfinite(grad_norm) and scaler.get_scale() > 1:
        grad_norm = 0.0  # the scale was too large: the scaler makes no step, and halves it
    if not all(map(math.isfinite, (loss, clip_frac, kl, grad_norm))):
        raise NonFinite(f"the loss ({loss}) or its gradient norm ({grad_norm}) is not finite")
    scaler.step(optimizer)
    scaler.update()

    stats = {"loss": loss} | ({} if ratio is None else {"ratio_dev": ratio_dev}) | {"grad_norm": grad_norm}
    return (
        stats
        | ({} if ratio is None else {"clip_frac": clip_frac / accelerator.num_processes})
        | ({"kl": kl} if args.kl else {})
        | ({"loss_scale": scaler.get_scale()} if scaler.is_enabled() else {})
    )
