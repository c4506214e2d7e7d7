"""The forest as arrays of one level each: its shape, its credit, what is pruned from it, and what it costs.

Idea: trajectories of one prompt share their prefixes. `roots` initial noises each grow a tree; at a split step every node
gets K children, at any other step one. The forest is regular, so a level is an array and no node object exists: node j at
depth d + 1 has parent j // children[d], and the leaves below node j at depth d are one contiguous block. P is the number of
prompts, n_d the nodes of a prompt at depth d, T the steps; edge i leads from depth i to depth i + 1.

Direction of time: depth 0 is pure noise (sigma = 1), depth T the pictures (sigma = 0).

1. Forest               shape: nodes per depth, parents, leaves below
2. fuse                 leaf rewards upwards, weighted by path probability           Eq. 3, arXiv:2509.06040v5
3. depth_advantages     z-score over the nodes of one prompt at one depth            Eq. 4
4. keep_parent_top1, keep_extreme                                                    width pruning
5. drop_window, window_start                                                         depth pruning and the mix window
6. count                nodes, edges, forwards, trained parents: by counting, not by formula

Departures from the paper. Rewards are centred before fusion and everything is float64. A depth whose values all agree (or
with one node) has advantage 0 exactly, where (x - mean)/(std + eps) would amplify rounding. Advantages use the whole tree,
before pruning. Known weaknesses, kept visible: with two nodes at a depth the z-score is +-1 whatever the gap; and path log-probs
are sums of per-dimension means, so at beta = 1 the weights of Eq. 3 are nearly uniform (`effective_leaves` is 15.9 of 16): fusion
is close to the plain mean. With sums they would be nearly one-hot; a larger beta (100) shows the difference.

    python tree.py --steps 20 --branch 2 --splits 0,3,6,9     # draws the tree, prints its counts
"""

import argparse
import json
import math
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
            raise ValueError("children and chosen need one entry a step, at least one")
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
        sizes = [self.roots]
        for k in self.children:
            sizes.append(sizes[-1] * k)
        return tuple(sizes)

    @property
    def leaves(self) -> int:
        """n_T, pictures for each prompt."""
        return self.sizes[-1]

    def stochastic(self, step: int) -> bool:
        """True where the step draws noise; never at the last one, whose noise would not reach the reward."""
        return self.chosen[step] and step < self.steps - 1

    def with_tail(self, n: int) -> "Forest":
        """The same forest with at most n steps in its tail."""
        steps = min(self.steps, self.last_stochastic + 1 + n)
        return Forest(self.roots, self.children[:steps], self.chosen[:steps])

    def parents(self, step: int) -> Tensor:
        """(n_{step+1},) index at depth `step` of every child's parent."""
        return torch.arange(self.sizes[step + 1]) // self.children[step]

    def ancestors(self, depth: int, of: int) -> Tensor:
        """(n_of,) index at `depth` of the ancestor of every node at depth `of` >= depth."""
        return torch.arange(self.sizes[of]) // (self.sizes[of] // self.sizes[depth])


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
    n = round(math.log(leaves / roots, branch))
    last = steps // 2 - 1
    if n > last + 1:
        raise ValueError(f"{n} splits do not fit into the first half of --steps {steps}: raise --steps or --branch")
    return tuple(round(i * last / max(n - 1, 1)) for i in range(n))


# -------------------------------------------------------------------------------------------------------------- credit
def path_weights(path_logp: Tensor, nodes: int, beta: float) -> Tensor:
    """softmax_l(beta log p(l|n)) over the leaves below each of `nodes` nodes: (P, leaves) -> (P, nodes, leaves below)."""
    return (beta * path_logp.double()).unflatten(1, (nodes, -1)).softmax(-1)


def fuse(rewards: Tensor, path_logp: Tensor, forest: Forest, beta: float) -> list[Tensor]:
    """Leaf rewards upwards (Eq. 3, arXiv:2509.06040v5): rbar(n) = sum_l w_l r_l, w = softmax_l(beta log p(l|n)).

    log p(l|n) sums the log-probs of the stochastic edges from n to l. The part of a path above n is the same for all
    leaves below n and cancels in the softmax, so whole-path sums serve every depth.

    Args:
        rewards: (P, leaves), any unit, higher is better.
        path_logp: (P, leaves) sum over the path of per-dimension mean log-probs.
        beta: >= 0; 0 is the plain mean over the leaves below, 1 the paper's.

    Returns:
        T+1 tensors (P, n_d), float64, of centred rewards: every prompt's leaf mean is subtracted first.
    """
    centred = rewards.double() - rewards.double().mean(1, keepdim=True)
    fused = []
    for n in forest.sizes:
        fused.append((path_weights(path_logp, n, beta) * centred.unflatten(1, (n, -1))).sum(-1))
    return fused


def effective_leaves(path_logp: Tensor, forest: Forest, beta: float) -> Tensor:
    """1 / sum_l w_l^2 over the leaves below each root, (P, roots): how many leaves fusion really listens to."""
    return 1 / (path_weights(path_logp, forest.roots, beta) ** 2).sum(-1)


def depth_advantages(fused: list[Tensor], clip: float = 5.0, eps: float = 1e-4, group: bool = False) -> list[Tensor]:
    """Depth-wise advantages (Eq. 4): A_d(n) = (rbar(n) - mean_d) / (std_d + eps), clipped to +-clip.

    Mean and population std run over the nodes of one prompt at depth d; where std_d < 1e-6 the advantages are 0.

    Args:
        fused: T+1 tensors (P, n_d) from `fuse`.
        clip: A_max > 0.
        group: take mean and std of the prompt's leaves at every depth, as GRPO does, for comparison.

    Returns:
        T tensors (P, n_{i+1}): edge i takes its child's value.
    """
    advantages = []
    for r in fused[1:]:
        of = fused[-1] if group else r
        std = of.std(1, correction=0, keepdim=True)
        z = (r - of.mean(1, keepdim=True)) / (std + eps)
        advantages.append(torch.where(std < 1e-6, 0.0, z).clamp(-clip, clip))
    return advantages


# ------------------------------------------------------------------------------------------------------------- pruning
def keep_chosen(forest: Forest, prompts: int) -> list[Tensor]:
    """Masks of all edges whose step the schedule chose: T bool tensors (P, n_{i+1}). Each is one of its own."""
    return [torch.full((prompts, n), c) for n, c in zip(forest.sizes[1:], forest.chosen)]


def keep_leaves(forest: Forest, kept: Tensor) -> list[Tensor]:
    """Keep an edge after the last split only on the chain of a kept leaf: kept (P, leaves) bool -> T masks (P, n_{i+1})."""
    after = forest.last_split + 1  # after the last split every node has one leaf below it
    return [kept if i >= after else torch.ones(len(kept), n, dtype=torch.bool) for i, n in enumerate(forest.sizes[1:])]


def keep_parent_top1(forest: Forest, rewards: Tensor) -> list[Tensor]:
    """Width pruning, Parent-Top1: at the last split each parent keeps its best child; ties go to the lower leaf index.

    Args:
        rewards: (P, leaves).

    Returns:
        T bool tensors (P, n_{i+1}); only edges after the last split are dropped.

    Raises:
        ValueError: if the forest has no split.
    """
    if not forest.splits:
        raise ValueError("Parent-Top1 needs a split: this forest has none")
    k = forest.children[forest.last_split]
    siblings = rewards.unflatten(1, (-1, k))  # (P, parents, K)
    best = siblings.sort(dim=-1, descending=True, stable=True).indices[..., :1]
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
    order = rewards.sort(dim=1, descending=True, stable=True).indices
    extremes = torch.cat([order[:, :b], order[:, -b:]], 1)
    return keep_leaves(forest, torch.zeros_like(rewards, dtype=torch.bool).scatter(1, extremes, True))


def drop_window(forest: Forest, start: int, width: int, prompts: int = 1) -> list[Tensor]:
    """Depth pruning: drop every edge whose step lies in [start, start + width), and never one at or before the last split.

    Returns:
        T bool tensors (P, n_{i+1}).
    """
    dropped = set(range(max(start, forest.last_split + 1), start + width))
    return [torch.full((prompts, n), i not in dropped) for i, n in enumerate(forest.sizes[1:])]


def window_start(first: int, last: int, iteration: int, iterations: int, every: int | None = None) -> int:
    """Where a sliding window starts: at `first`, one step later every `every` iterations, then staying at `last`.

    `every` defaults to iterations // positions, so that a run of at least as many iterations sweeps all of them.
    """
    last = max(first, last)
    every = every or max(1, iterations // (last - first + 1))
    return min(first + iteration // every, last)


def depth_window_range(forest: Forest, width: int, stop: int | None = None) -> tuple[int, int]:
    """First and last start of the depth window: from the step after the last split to where its end is the stop step.

    The stop step defaults to the last stochastic one, T - 2.
    """
    stop = forest.steps - 2 if stop is None else stop
    first = forest.last_split + 1
    return first, max(first, stop - width + 1)


# ------------------------------------------------------------------------------------------------------------ counting
def count(forest: Forest, keep: list[Tensor] | None = None) -> dict[str, float]:
    """Count one prompt's forest: nodes (roots included), edges, forwards, and what the masks leave to train.

    forwards: nodes that have children, one transformer evaluation each. kept: edges left, the paper's "NFE new", which
    counts the last, deterministic step. trainable: kept stochastic edges. trained_parents: nodes with one at least, since
    siblings share a forward and a backward.

    Args:
        forest: its shape.
        keep: T bool tensors (P, n_{i+1}); every chosen edge by default. The first prompt is counted.
    """
    keep = [k[0] for k in (keep or keep_chosen(forest, 1))]
    train = [k & forest.stochastic(i) for i, k in enumerate(keep)]
    return {
        "leaves": forest.leaves,
        "nodes": sum(forest.sizes),
        "edges": sum(forest.sizes[1:]),
        "forwards": sum(forest.sizes[:-1]),
        "kept": sum(int(k.sum()) for k in keep),
        "trainable": sum(int(t.sum()) for t in train),
        "trained_parents": sum(int(t.unflatten(0, (n, -1)).any(1).sum()) for n, t in zip(forest.sizes, train)),
    }


def intersect(*masks: list[Tensor]) -> list[Tensor]:
    """The edges that every list of masks keeps."""
    return [torch.stack(torch.broadcast_tensors(*level)).all(0) for level in zip(*masks)]


def count_variants(steps: int, branch: int, splits: tuple[int, ...], roots: int = 1) -> dict[str, dict | None]:
    """The paper's prunings of one tree, counted: kept, trainable and trained_parents of each; null where undefined."""
    forest = make_forest(steps, branch, splits, roots)
    rewards = torch.zeros(1, forest.leaves)  # which edges go does not change how many
    numbers = ("kept", "trainable", "trained_parents")

    def row(*masks):
        found = count(forest, intersect(keep_chosen(forest, 1), *masks))
        return {k: found[k] for k in numbers}

    first = forest.last_split + 1
    windows = [range(a, a + 4) for a in range(max(1, steps - 3))]  # the paper's 17 places for T = 20
    mixes = [count(make_forest(steps, branch, splits, roots, chosen=w)) for w in windows]
    return {
        "all": row(),
        "parent_top1": row(keep_parent_top1(forest, rewards)) if splits else None,
        "extreme_4": row(keep_extreme(forest, rewards, 4)) if forest.leaves >= 8 else None,
        "depth_4": row(drop_window(forest, first, 4)),
        "depth_5": row(drop_window(forest, first, 5)),
        "mix_4_mean": {k: sum(m[k] for m in mixes) / len(mixes) for k in numbers},
    }


def draw(forest: Forest) -> str:
    """The tree as text, a row a leaf, time from left (noise) to right (picture)."""
    rows = []
    for leaf in range(forest.leaves):
        row = "o" if leaf % (forest.leaves // forest.roots) == 0 else " "
        for i, k in enumerate(forest.children):
            parent, child = forest.leaves // forest.sizes[i], forest.leaves // forest.sizes[i + 1]
            at = leaf % parent
            if at % child:  # the chain is drawn on another row; a later sibling's line may pass through this one
                row += "│ " if at < parent - child else "  "
            else:
                row += "──" if k == 1 else ("┬─" if at == 0 else "└─" if at == parent - child else "├─")
        rows.append(row + f" leaf {leaf}")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    """Draw a tree, print its counts as a table, and as the last line one JSON document."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="denoising steps T")
    parser.add_argument("--branch", type=int, default=2, help="K, children of a node at a split")
    parser.add_argument("--splits", type=parse_splits, help="split steps, as in 0,3,6,9; default: from --leaves")
    parser.add_argument("--leaves", type=int, default=16, help="pictures a prompt, where --splits is not given")
    parser.add_argument("--roots", type=int, default=1, help="independent initial noises")
    args = parser.parse_args(argv)
    try:
        splits = spread_splits(args.steps, args.branch, args.leaves, args.roots) if args.splits is None else args.splits
        forest = make_forest(args.steps, args.branch, splits, args.roots)
    except ValueError as error:
        parser.error(str(error))
    total, variants = count(forest), count_variants(args.steps, args.branch, splits, args.roots)
    if forest.leaves <= 64:
        print(draw(forest))
    splits = ",".join(map(str, splits)) or "none"
    print(f"\nsplits {splits}; {forest.leaves} leaves; nodes at each depth {forest.sizes}")
    print(f"nodes {total['nodes']} = sum n_d, edges {total['edges']} = sum_(d>0) n_d,", end=" ")
    print(f"forwards {total['forwards']} = sum_(d<T) n_d\n")
    print(f"{'variant':<12} {'kept':>8} {'per leaf':>9} {'trainable':>10} {'trained parents':>16}")
    for name, v in variants.items():
        if v:
            cells = f"{v['kept']:8g} {v['kept'] / forest.leaves:9.4g} {v['trainable']:10g} {v['trained_parents']:16g}"
            print(f"{name:<12} {cells}")
    print(json.dumps({k: total[k] for k in ("leaves", "nodes", "edges", "forwards")} | {"variants": variants}))


def parse_splits(text: str) -> tuple[int, ...]:
    """'0,3,6,9' -> (0, 3, 6, 9); the empty text is no split."""
    try:
        return tuple(int(i) for i in text.split(",") if text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"whole numbers separated by commas, as in 0,3,6,9; got {text!r}") from None


if __name__ == "__main__":
    main()
