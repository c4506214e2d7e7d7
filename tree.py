"""The forest as arrays of one level each: its shape, its credit, what is pruned from it, and what it costs.

Idea: trajectories of one prompt share their prefixes. `roots` initial noises each grow a tree; at a split step every
node gets K children, at any other step one. The forest is regular, so a level is an array and no node object exists:

    depth      0     1         2              3              T = 3, K = 2, splits at steps 0 and 1, one root
    nodes      0     0 1       0 1 2 3        0 1 2 3        node j at depth d + 1 has parent j // children[d],
    parents          0 0       0 0 1 1        0 1 2 3        the leaves below a node are one contiguous block

P is the number of prompts, n_d the nodes of one prompt at depth d, T the number of steps. The edges of step i lead from
depth i to depth i + 1. There is one per child, so whatever belongs to edges has the shape (P, n_{i+1}).

Direction of time: depth 0 is pure noise (sigma = 1), depth T the pictures (sigma = 0).

1. Forest               the shape: nodes per depth, parents, leaves below
2. fuse                 leaf rewards upwards, weighted by path probability                  Eq. 3, arXiv:2509.06040v5
   split_variance       how much of the reward's variance each split makes
3. ADVANTAGES           what an edge earned: `depth` is the paper's z-score per depth        Eq. 4
4. keep_parent_top1, keep_extreme                                                           width pruning
   keep_largest         by the size of advantages
5. drop_window, window_start                                                                depth pruning, mix window
6. count                nodes, edges, forwards, trained parents: by counting, not by formula

One tree by hand (docs/method.md has it in full; a test computes it): T = 4, K = 2, splits 0 and 1, beta = 0.

    leaf rewards                       0.2   0.4   0.9   0.5
    centred                           -0.3  -0.1  +0.4   0.0
    fused at depth 1 (two nodes)         -0.2       +0.2            the means of the leaves below
    advantages at depth 1                  -1         +1            (rbar - 0) / 0.2
    advantages at depths 2, 3, 4      -1.18 -0.39 +1.57  0.00       (rbar - 0) / 0.255

The fourth leaf earned exactly the mean. GRPO would give its whole path nothing; the tree credits its first step with
+1, because that step also led to the third leaf. (The last step has an advantage too, but it is never trained.)

Departures from the paper, and why:
- Rewards are centred before fusion and everything is float64: differences between rewards are small beside the rewards.
- A depth whose values all agree (or with one node) has advantage 0 exactly, where (x - mean)/(std + eps) would amplify
  rounding errors.
- Advantages use the whole tree, before pruning.

Known weaknesses, kept visible: with two nodes at a depth the z-score is +-1 whatever the gap. And path log-probs are
sums of per-dimension means, so at beta = 1 the weights of Eq. 3 are nearly uniform (`effective_leaves` is 15.9 of 16)
and fusion is close to the plain mean. Sums over the D dimensions would be beta = D (512 in tiny/flux), nearly one-hot.

    python tree.py --steps 20 --branch 2 --splits 0,3,6,9     # draws the tree, prints its counts
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


# --------------------------------------------------------------------------------------------------------------- shape
@dataclass(frozen=True)
class Forest:
    """The shape of one prompt's forest, and which steps the schedule wants stochastic.

    Args:
        roots: independent initial noises, >= 1.
        children: (T,) children of every node at each step: K at splits, 1 elsewhere.
        chosen: (T,) steps that the schedule makes stochastic. The last step stays an ODE step even where it is chosen:
            the paper's NFE counts it, training does not.

    Raises:
        ValueError: if the lengths differ, a count is below 1, or a split is not stochastic (siblings would be equal).
    """

    roots: int
    children: tuple[int, ...]
    chosen: tuple[bool, ...]

    def __post_init__(self):
        if len(self.children) != len(self.chosen) or not self.children:
            raise ValueError("children and chosen need one entry per step, at least one")
        if self.roots < 1 or min(self.children) < 1:
            raise ValueError("--roots must be at least 1, and so must every number of children")
        for i in self.splits:
            if not self.stochastic(i):
                raise ValueError(f"the split at step {i} is deterministic: its siblings would be equal")

    @property
    def steps(self) -> int:
        """T, the number of denoising steps."""
        return len(self.children)

    @property
    def splits(self) -> tuple[int, ...]:
        """Steps at which nodes branch."""
        return tuple(i for i, k in enumerate(self.children) if k > 1)

    @property
    def last_split(self) -> int:
        """The last split step, -1 for a forest that never branches."""
        return max(self.splits, default=-1)

    @property
    def last_stochastic(self) -> int:
        """The last step that draws noise, -1 if none does; what follows is an ODE, the tail."""
        return max((i for i in range(self.steps) if self.stochastic(i)), default=-1)

    @property
    def sizes(self) -> tuple[int, ...]:
        """(T+1,) nodes of one prompt at each depth: n_0 = roots, n_{d+1} = n_d children[d]."""
        # Each node gets the same number of children, so sizes multiply: roots 1, children (2, 1, 2) gives 1, 2, 2, 4.
        sizes = [self.roots]
        for k in self.children:
            sizes.append(sizes[-1] * k)
        return tuple(sizes)

    @property
    def leaves(self) -> int:
        """n_T, pictures per prompt."""
        return self.sizes[-1]

    def stochastic(self, step: int) -> bool:
        """True where the step draws noise; never at the last one, whose noise would not reach the reward."""
        return self.chosen[step] and step < self.steps - 1

    def with_tail(self, n: int) -> "Forest":
        """The same forest with at most n steps in its tail, whose steps neither branch nor draw noise."""
        steps = min(self.steps, self.last_stochastic + 1 + n)
        return Forest(self.roots, self.children[:steps], self.chosen[:steps])

    def parents(self, step: int) -> Tensor:
        """(n_{step+1},) index at depth `step` of every child's parent: 4 children, K = 2 -> 0 0 1 1."""
        return torch.arange(self.sizes[step + 1]) // self.children[step]

    def ancestors(self, depth: int, below: int) -> Tensor:
        """(n_below,) index at `depth` of the ancestor of every node at depth `below` >= depth."""
        # Each node at `depth` has equally many nodes below it, in one block: sizes 2 and 6 -> 0 0 0 1 1 1.
        return torch.arange(self.sizes[below]) // (self.sizes[below] // self.sizes[depth])


def make_forest(steps: int, branch: int, splits: tuple[int, ...], roots: int = 1, chosen=None) -> Forest:
    """A forest from its flags; `chosen` is a collection of steps, all of them by default; splits are always chosen.

    Raises:
        ValueError: branch < 2, splits repeated, unordered or outside 0..T-2; see Forest.
    """
    if branch < 2 and splits:
        raise ValueError(f"--branch must be at least 2, got {branch}")
    if list(splits) != sorted(set(splits)):
        raise ValueError(f"--splits must be increasing without repeats, got {','.join(map(str, splits))}")
    for i in splits:
        if not 0 <= i <= steps - 2:
            raise ValueError(f"--splits must lie in 0..{steps - 2} for --steps {steps} (the last step is ODE), got {i}")

    # Siblings of a deterministic step would be equal, so a split always draws noise.
    children = tuple(branch if i in splits else 1 for i in range(steps))
    chosen = range(steps) if chosen is None else {*chosen, *splits}
    return Forest(roots, children, tuple(i in chosen for i in range(steps)))


def spread_splits(steps: int, branch: int, leaves: int, roots: int = 1) -> tuple[int, ...]:
    """Splits in the first half of the steps, evenly: log_K(leaves / roots) of them, rounded; 0,3,6,9 for 20, 2, 16.

    Raises:
        ValueError: if so many splits do not fit into the first half.
    """
    if branch < 2:
        raise ValueError(f"--branch must be at least 2, got {branch}")
    if not 1 <= roots <= leaves:
        raise ValueError(f"--roots must lie in 1..leaves ({leaves}), got {roots}")

    # Early splits, since a late one leaves its children little time to differ: 0 .. T/2 - 1 are open to them.
    n = round(math.log(leaves / roots, branch))
    last = steps // 2 - 1
    if n > last + 1:
        raise ValueError(f"{n} splits do not fit into the first half of --steps {steps}: raise --steps or --branch")

    # n of those places, evenly, both ends among them: n = 4, last = 9 -> 0, 3, 6, 9.
    return tuple(round(i * last / max(n - 1, 1)) for i in range(n))


# ------------------------------------------------------------------------------------------------ credit: fusion, Eq. 3
def path_weights(path_logp: Tensor, nodes: int, beta: float) -> Tensor:
    """softmax_l(beta log p(l|n)) over the leaves below each of `nodes` nodes: (P, leaves) -> (P, nodes, leaves
    below)."""
    # The leaves below node j are a contiguous block: 16 leaves below 4 nodes -> 4 rows of 4, a softmax over each row.
    return (beta * path_logp.double()).unflatten(1, (nodes, -1)).softmax(-1)


def fuse(rewards: Tensor, path_logp: Tensor, forest: Forest, beta: float) -> list[Tensor]:
    """Leaf rewards upwards (Eq. 3, arXiv:2509.06040v5): rbar(n) = sum_l w_l r_l, w = softmax_l(beta log p(l|n)).

    l runs over the leaves below node n. log p(l|n) sums the log-probs of the stochastic edges from n to l. Siblings
    have one std, so paths differ in -sum_i mean_D(xi_i^2)/2 alone: the likeliest leaf has the least noise, whatever its
    reward. Leaves are drawn from p already, so beta > 0 counts p twice; 0 is the Monte Carlo mean, 1 the paper's.

    Args:
        rewards: (P, leaves), any unit, higher is better.
        path_logp: (P, leaves) sum over the whole path, root to leaf, of per-dimension mean log-probs.
        beta: >= 0; 0 is the plain mean over the leaves below, 1 the paper's.

    Returns:
        T+1 tensors (P, n_d), float64, of centred rewards: every prompt's leaf mean is subtracted first.
    """
    # A constant added to all rewards changes no advantage, but it costs digits: so they are moved to around 0.
    centred = rewards.double() - rewards.double().mean(1, keepdim=True)  # (P, leaves)

    # One weighted mean per node. The part of a path above n is the same for all leaves below n: it adds a constant
    # inside the softmax, which cancels. So whole-path sums serve every depth, and no sum from n to l has to be formed.
    fused = []
    for nodes in forest.sizes:
        weights = path_weights(path_logp, nodes, beta)  # (P, n_d, leaves below)
        fused.append((weights * centred.unflatten(1, (nodes, -1))).sum(-1))  # (P, n_d)
    return fused


def effective_leaves(path_logp: Tensor, forest: Forest, beta: float) -> Tensor:
    """1 / sum_l w_l^2 over the leaves below each root, (P, roots): to how many leaves fusion listens.

    16 equal weights give 16, one weight of 1 gives 1.
    """
    return 1 / (path_weights(path_logp, forest.roots, beta) ** 2).sum(-1)


def split_variance(rewards: Tensor, forest: Forest) -> dict[int, float]:
    """How much of the final reward's variance each split step makes: nested analysis of variance over the leaves.

    A leaf's reward is taken for a sum of independent effects, one per split on its path. Of split s, with m_s leaves
    below each child, the mean square of the children about their parents is on average

        E[MS_s] = m_s v_s + m_{s+1} v_{s+1} + ... + v_S,    so    v_s = (MS_s - MS_{s+1}) / m_s

    Noise that is drawn after the last split counts as that split's. An estimate may be negative; its mean is right.
    Rewards 1 1 5 5 of two splits with K = 2: all of the variance is the first split's, v = 8 and 0.

    Args:
        rewards: (P, leaves).
        forest: its shape; without a split there is nothing to tell apart.

    Returns:
        split step -> v_s, the mean over prompts, in squared units of the reward.
    """
    squares, below = [], []
    for i in forest.splits:
        k = forest.children[i]
        children = rewards.double().unflatten(1, (forest.sizes[i], k, -1)).mean(-1)  # (P, n_i, K)
        m = forest.leaves // forest.sizes[i + 1]
        squares.append(m * float(children.var(-1, correction=1).mean()))  # MS_s; K - 1 degrees of freedom per node
        below.append(m)

    # Below the last split there is no other: v_S = MS_S, for m_S = 1.
    later = [*squares[1:], 0.0]
    return {i: (own - rest) / m for i, own, rest, m in zip(forest.splits, squares, later, below)}


# -------------------------------------------------------------------------------------------- credit: advantages, Eq. 4
EPS, EQUAL = 1e-4, 1e-6  # added to the std; a std below which rewards count as equal


def z_score(values: Tensor, reference: Tensor) -> Tensor:
    """(values - mean) / (std + eps), mean and population std over the reference's last dimension; 0 where std <
    1e-6."""
    mean, std = reference.mean(-1, keepdim=True), reference.std(-1, correction=0, keepdim=True)
    z = (values - mean) / (std + EPS)

    # Equal rewards teach nothing. Rounding alone would leave 1e-17 / EPS = 1e-13: tiny, but where all gradients are
    # tiny, Adam makes a full step of them.
    return torch.where(std < EQUAL, 0.0, z)


def depth_advantage(fused: list[Tensor], forest: Forest) -> list[Tensor]:
    """The paper's (Eq. 4): A_d(n) = (rbar(n) - mean_d) / (std_d + eps) over the nodes of one prompt at depth d.

    Args:
        fused: T+1 tensors (P, n_d) from `fuse`.
        forest: their shape.

    Returns:
        T tensors (P, n_{i+1}): edge i takes its child's value.
    """
    # fused[0] is left out: no edge leads to a root, and its noise was not the policy's choice.
    return [z_score(level, level) for level in fused[1:]]


def group_advantage(fused: list[Tensor], forest: Forest) -> list[Tensor]:
    """GRPO's group, for comparison: at every depth mean and std are those of the prompt's leaves."""
    return [z_score(level, fused[-1]) for level in fused[1:]]


def sibling_advantage(fused: list[Tensor], forest: Forest) -> list[Tensor]:
    """The baseline is the mean over one's own siblings: A = (rbar(n) - mean_siblings) / (std_d + eps).

    std_d stays that of the depth: the std of two siblings would make every advantage +-1. After a split a chain has no
    siblings at its own depth, and is compared with the chains that left the same split node.
    """
    advantages = []
    for i, level in enumerate(fused[1:]):
        # Siblings are the nodes below one node of the last split so far; before any split the chains of all roots are.
        split = max((step for step in forest.splits if step <= i), default=None)
        families = 1 if split is None else forest.sizes[split]
        siblings = level.unflatten(1, (families, -1))  # (P, families, siblings)

        # Both z-scores are taken with the mean and std of the depth, so that mean cancels in their difference.
        mean = siblings.mean(-1, keepdim=True).expand_as(siblings).flatten(1)  # (P, n_{i+1})
        advantages.append(z_score(level, level) - z_score(mean, level))
    return advantages


ADVANTAGES: dict[str, Callable[[list[Tensor], Forest], list[Tensor]]] = {  # --advantage -> rule
    "depth": depth_advantage,
    "group": group_advantage,
    "sibling": sibling_advantage,
}


def advantages(fused: list[Tensor], forest: Forest, rule: str = "depth", clip: float = 5.0) -> list[Tensor]:
    """What each edge earned (Eq. 4), by one of ADVANTAGES, clipped to +-clip so that no outlier rules an update.

    Args:
        fused: T+1 tensors (P, n_d) from `fuse`.
        forest: their shape.
        rule: a name in ADVANTAGES.
        clip: A_max > 0.

    Returns:
        T tensors (P, n_{i+1}): edge i takes its child's value.
    """
    return [level.clamp(-clip, clip) for level in ADVANTAGES[rule](fused, forest)]


# ------------------------------------------------------------------------------------------------------------- pruning
def keep_chosen(forest: Forest, prompts: int) -> list[Tensor]:
    """Masks of all edges whose step the schedule chose: T bool tensors (P, n_{i+1}) that share no memory."""
    return [torch.full((prompts, n), c) for n, c in zip(forest.sizes[1:], forest.chosen)]


def keep_leaves(forest: Forest, kept: Tensor) -> list[Tensor]:
    """Keep an edge after the last split only on the chain of a kept leaf: kept (P, leaves) bool -> T masks (P,
    n_{i+1})."""
    # After the last split every node has one leaf below it, so a mask of leaves is a mask of the edges of each such
    # step. Split edges and all before them stay: they are shared by several leaves, kept ones among them.
    after = forest.last_split + 1
    return [kept if i >= after else torch.ones(len(kept), n, dtype=torch.bool) for i, n in enumerate(forest.sizes[1:])]


def keep_parent_top1(forest: Forest, rewards: Tensor) -> list[Tensor]:
    """Width pruning, Parent-Top1: of the K chains that leave a node of the last split only the best is trained.

    The K split edges themselves all stay. Ties go to the lower leaf index.

    Args:
        rewards: (P, leaves).

    Returns:
        T bool tensors (P, n_{i+1}); only edges after the last split are dropped.

    Raises:
        ValueError: if the forest has no split.
    """
    if not forest.splits:
        raise ValueError("Parent-Top1 needs a split: this forest has none")

    # Below the last split each child leads to one leaf, so K adjacent leaves are the children of one parent.
    k = forest.children[forest.last_split]
    siblings = rewards.unflatten(1, (-1, k))  # (P, parents, K)

    # A stable sort keeps the order of equal rewards: a tie goes to the lower index, on every machine.
    best = siblings.sort(dim=-1, descending=True, stable=True).indices[..., :1]  # (P, parents, 1)
    return keep_leaves(forest, torch.zeros_like(siblings, dtype=torch.bool).scatter(-1, best, True).flatten(1))


def keep_extreme(forest: Forest, rewards: Tensor, b: int) -> list[Tensor]:
    """Width pruning, Extreme-b: the best b and the worst b leaves of each prompt; ties go by leaf index.

    Args:
        rewards: (P, leaves).

    Returns:
        T bool tensors (P, n_{i+1}); only edges after the last split are dropped.

    Raises:
        ValueError: if b < 1 or 2b > leaves.
    """
    if b < 1 or 2 * b > forest.leaves:
        raise ValueError(f"Extreme-b needs 1 <= b and 2b <= leaves ({forest.leaves}), got b = {b}")

    # Leaves from best to worst; the two ends are kept. Rewards 0.2 0.4 0.9 0.5 with b = 1 keep leaves 2 and 0.
    order = rewards.sort(dim=1, descending=True, stable=True).indices  # (P, leaves)
    extremes = torch.cat([order[:, :b], order[:, -b:]], 1)  # (P, 2b)
    return keep_leaves(forest, torch.zeros_like(rewards, dtype=torch.bool).scatter(1, extremes, True))


def keep_largest(forest: Forest, advantages: list[Tensor], fraction: float) -> list[Tensor]:
    """Pruning by size: at every step the parents whose children's advantages are largest, with all their edges.

    A parent's size is the sum of |A| over its children: about how much its edges add to the gradient. How many are kept
    depends on the step alone, so all prompts, and all processes, train equally many.

    Args:
        advantages: T tensors (P, n_{i+1}).
        fraction: of the n_i parents of each step, in (0, 1]; ceil(fraction n_i) are kept. Ties go to the lower index.

    Returns:
        T bool tensors (P, n_{i+1}).
    """
    masks = []
    for i, level in enumerate(advantages):
        size = level.abs().unflatten(1, (forest.sizes[i], -1)).sum(2)  # (P, n_i)
        largest = size.sort(dim=1, descending=True, stable=True).indices[
            :, : math.ceil(fraction * forest.sizes[i] - 1e-9)
        ]
        parents = torch.zeros_like(size, dtype=torch.bool).scatter(1, largest, True)
        masks.append(parents.repeat_interleave(forest.children[i], 1))  # (P, n_{i+1})
    return masks


def drop_window(forest: Forest, start: int, width: int, prompts: int = 1) -> list[Tensor]:
    """Depth pruning: drop every edge whose step lies in [start, start + width) and comes after the last split.

    Returns:
        T bool tensors (P, n_{i+1}).
    """
    # The window may start at a split; the splits themselves are the tree's signal and are always trained.
    dropped = set(range(max(start, forest.last_split + 1), start + width))
    return [torch.full((prompts, n), i not in dropped) for i, n in enumerate(forest.sizes[1:])]


def window_start(first: int, last: int, iteration: int, iterations: int, every: int | None = None) -> int:
    """Where a sliding window starts: at `first`, one step later every `every` iterations, then staying at `last`.

    `every` defaults to iterations // positions, so that a run of at least as many iterations sweeps all of them.
    """
    # T = 20, splits 0,3,6,9, width 5: from 10 to 14, so 5 places; 300 iterations give 60 to each of them.
    last = max(first, last)
    every = every or max(1, iterations // (last - first + 1))
    return min(first + iteration // every, last)


def depth_window_range(forest: Forest, width: int, stop: int | None = None) -> tuple[int, int]:
    """First and last start of the depth window: just after the last split, and where its last step is `stop`.

    `stop` defaults to T - 2, the last stochastic step of a tree that draws noise at every step.
    """
    stop = forest.steps - 2 if stop is None else stop
    first = forest.last_split + 1
    return first, max(first, stop - width + 1)


# ------------------------------------------------------------------------------------------------------------ counting
def count(forest: Forest, keep: list[Tensor] | None = None) -> dict[str, float]:
    """Count one prompt's forest: nodes (roots included), edges, forwards, and what the masks leave to train.

    forwards: nodes that have children, one transformer evaluation each. kept: edges left, the paper's "NFE new", which
    counts the last, deterministic step. trainable: kept stochastic edges. trained_parents: nodes with at least one of
    them, since siblings share a forward and a backward.

    Args:
        forest: its shape.
        keep: T bool tensors (P, n_{i+1}); every chosen edge by default. The first prompt is counted.
    """
    # All prompts of an iteration have equally many edges of each kind, so the first one speaks for all.
    keep = [mask[0] for mask in (keep or keep_chosen(forest, 1))]  # T masks (n_{i+1},)

    # Of the kept edges only stochastic ones have a density. A parent is trained if any of its children's edges is.
    train = [mask & forest.stochastic(i) for i, mask in enumerate(keep)]
    parents = [mask.unflatten(0, (n, -1)).any(1) for n, mask in zip(forest.sizes, train)]  # T masks (n_i,)
    return {
        "leaves": forest.leaves,
        "nodes": sum(forest.sizes),
        "edges": sum(forest.sizes[1:]),
        "forwards": sum(forest.sizes[:-1]),
        "kept": sum(int(mask.sum()) for mask in keep),
        "trainable": sum(int(mask.sum()) for mask in train),
        "trained_parents": sum(int(mask.sum()) for mask in parents),
    }


def intersect(*masks: list[Tensor]) -> list[Tensor]:
    """The edges that every list of masks keeps; a mask of one prompt holds for all."""
    return [torch.stack(torch.broadcast_tensors(*level)).all(0) for level in zip(*masks)]


def count_variants(steps: int, branch: int, splits: tuple[int, ...], roots: int = 1) -> dict[str, dict | None]:
    """The paper's prunings of one tree, counted: kept, trainable and trained_parents of each; null where undefined."""
    forest = make_forest(steps, branch, splits, roots)
    rewards = torch.zeros(1, forest.leaves)  # they decide which edges go, not how many
    columns = ("kept", "trainable", "trained_parents")

    def row(*masks):
        counted = count(forest, intersect(keep_chosen(forest, 1), *masks))
        return {column: counted[column] for column in columns}

    # The mix window of 4 changes the forest itself: mean over the
    # places that it slides through (the paper's 17 for T = 20).
    windows = [range(start, start + 4) for start in range(max(1, steps - 3))]
    mixes = [count(make_forest(steps, branch, splits, roots, chosen=window)) for window in windows]

    first = forest.last_split + 1  # where the depth window begins to slide
    return {
        "all": row(),
        "parent_top1": row(keep_parent_top1(forest, rewards)) if splits else None,
        "extreme_4": row(keep_extreme(forest, rewards, 4)) if forest.leaves >= 8 else None,
        "depth_4": row(drop_window(forest, first, 4)),
        "depth_5": row(drop_window(forest, first, 5)),
        "mix_4_mean": {column: sum(mix[column] for mix in mixes) / len(mixes) for column in columns},
    }


# --------------------------------------------------------------------------------------------------------- command line
def draw(forest: Forest) -> str:
    """The forest as text, one row per leaf, time from left (noise) to right (picture)."""
    rows = []
    for leaf in range(forest.leaves):
        row = "o" if leaf % (forest.leaves // forest.roots) == 0 else " "  # a root stands on the row of its first leaf
        for i, k in enumerate(forest.children):
            # Leaves below the parent and below each child: the rows that they
            # cover. `offset` counts rows from the parent's.
            below_parent, below_child = forest.leaves // forest.sizes[i], forest.leaves // forest.sizes[i + 1]
            offset = leaf % below_parent

            # A row that is no child's first leaf is drawn elsewhere; the line
            # down to a later sibling may pass through it.
            if offset % below_child:
                row += "│ " if offset < below_parent - below_child else "  "
            elif k == 1:
                row += "──"
            else:
                row += "┬─" if offset == 0 else "└─" if offset == below_parent - below_child else "├─"
        rows.append(row + f" leaf {leaf}")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    """Draw a tree, print its counts as a table, and as the last line one JSON document."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="denoising steps T")
    parser.add_argument("--branch", type=int, default=2, help="K, children of a node at a split")
    parser.add_argument("--splits", type=parse_splits, help="split steps, as in 0,3,6,9; default: from --leaves")
    parser.add_argument("--leaves", type=int, default=16, help="pictures per prompt, where --splits is not given")
    parser.add_argument("--roots", type=int, default=1, help="independent initial noises")
    args = parser.parse_args(argv)

    try:
        splits = args.splits
        if splits is None:
            splits = spread_splits(args.steps, args.branch, args.leaves, args.roots)
        forest = make_forest(args.steps, args.branch, splits, args.roots)
    except ValueError as error:
        parser.error(str(error))

    total, variants = count(forest), count_variants(args.steps, args.branch, splits, args.roots)
    if forest.leaves <= 64:
        print(draw(forest))
    print(f"\nsplits {','.join(map(str, splits)) or 'none'}; {forest.leaves} leaves; nodes per depth {forest.sizes}")
    print(f"nodes {total['nodes']} = sum n_d, edges {total['edges']} = sum_(d>0) n_d,", end=" ")
    print(f"forwards {total['forwards']} = sum_(d<T) n_d\n")

    print(f"{'variant':<12} {'kept':>8} {'per leaf':>9} {'trainable':>10} {'trained parents':>16}")
    for name, row in variants.items():
        if row:
            print(f"{name:<12} {row['kept']:8g} {row['kept'] / forest.leaves:9.4g}", end=" ")
            print(f"{row['trainable']:10g} {row['trained_parents']:16g}")
    print(json.dumps({key: total[key] for key in ("leaves", "nodes", "edges", "forwards")} | {"variants": variants}))


def parse_splits(text: str) -> tuple[int, ...]:
    """'0,3,6,9' -> (0, 3, 6, 9); the empty text is no split."""
    try:
        return tuple(int(i) for i in text.split(",") if text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"whole numbers separated by commas, as in 0,3,6,9; got {text!r}") from None


if __name__ == "__main__":
    main()
