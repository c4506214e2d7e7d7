"""The method once more, slowly: float64, numpy, one Node object for every node, every sum by walking the tree.

Nothing is imported from the project and nothing here is fast. Where the project reshapes arrays, this file follows
parent and child links. Where the project works on a whole batch, this file takes one edge at a time. Both are written
from the same equations, so agreement means that both are right or that both misread them.

Direction of time: depth 0 is noise (sigma = 1), depth T the picture (sigma = 0); step i leads from depth i to i + 1.
"""

import math

import numpy as np


# ---------------------------------------------------------------------------------------------------------------- steps
def sigma_schedule(steps, shift):
    """The T + 1 noise levels sigma_i = shift u / (1 + (shift - 1) u), u = 1 - i/T."""
    levels = []
    for i in range(steps + 1):
        u = (steps - i) / steps
        levels.append(shift * u / (1 + (shift - 1) * u))
    return levels


def step_moments(kind, x, v, sigma, sigma_next, eta, sigma_1):
    """Mean and std of the next latent, for one latent x; eta is called a in the papers of flow and cps."""
    # x = (1 - sigma) clean + sigma noise and v = noise - clean, solved for both.
    dt = sigma_next - sigma
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    if kind == "ode":
        return x + v * dt, 0.0
    # DanceGRPO: Euler's step, and a drift along the score, eta^2/2 score (-dt), which makes up for the noise.
    if kind == "dance":
        minus_score = (x - (1 - sigma) * clean) / sigma**2
        return x + v * dt + eta**2 / 2 * minus_score * dt, eta * math.sqrt(-dt)
    # Flow-GRPO: s = a sqrt(sigma / (1 - sigma)), which is infinite at sigma = 1, so the next level stands in there.
    if kind == "flow":
        under_the_root = sigma / (1 - sigma_1) if sigma == 1 else sigma / (1 - sigma)
        s = eta * math.sqrt(under_the_root)
        mean = x * (1 + s * s * dt / (2 * sigma)) + v * (1 + s * s * (1 - sigma) / (2 * sigma)) * dt
        return mean, s * math.sqrt(-dt)
    # Flow-CPS: a part of the noise that x holds is replaced by fresh noise, so that sigma_next is met exactly.
    if kind == "cps":
        std = sigma_next * math.sin(eta * math.pi / 2)
        return (1 - sigma_next) * clean + math.sqrt(sigma_next**2 - std**2) * noise, std
    raise KeyError(kind)


def logp_mean(x, mean, std, density="true"):
    """log N(x; mean, std^2 I) as a mean over dimensions, one dimension at a time; "upstream" is the bare square."""
    total, dims = 0.0, 0
    for a, m in zip(np.ravel(x), np.ravel(mean)):
        if density == "upstream":
            total += -((a - m) ** 2)
        else:
            total += -((a - m) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
        dims += 1
    return total / dims


# ----------------------------------------------------------------------------------------------------------------- tree
class Node:
    """One latent. `logp`, `advantage`, `mean`, `std` and `kept` belong to the edge from its parent; roots have none."""

    def __init__(self, depth, parent=None):
        self.depth, self.parent, self.children = depth, parent, []
        self.logp, self.reward, self.latent = 0.0, None, None
        self.fused = self.advantage = self.mean = self.std = None
        self.kept = True

    @property
    def step(self):
        """The step of the edge that leads here."""
        return self.depth - 1

    def walk(self):
        """This node and all below it, depth first, left to right."""
        yield self
        for child in self.children:
            yield from child.walk()

    def leaves(self):
        return [n for n in self.walk() if not n.children]

    def up_to(self, ancestor):
        """Nodes from this one up to, not including, an ancestor."""
        node, path = self, []
        while node is not ancestor:
            path.append(node)
            node = node.parent
        return path


class Tree:
    """The forest of one prompt; `chosen` are the steps that the schedule makes stochastic, the last one never is."""

    def __init__(self, roots, steps, branch, splits, chosen=None):
        self.steps, self.splits = steps, list(splits)
        self.chosen = set(range(steps)) if chosen is None else {*chosen, *splits}
        self.roots = [Node(0) for _ in range(roots)]
        for root in self.roots:
            self._grow(root, branch)

    def _grow(self, node, branch):
        if node.depth == self.steps:
            return
        for _ in range(branch if node.depth in self.splits else 1):
            child = Node(node.depth + 1, node)
            node.children.append(child)
            self._grow(child, branch)

    def nodes(self):
        return [n for root in self.roots for n in root.walk()]

    def level(self, depth):
        """Nodes of one depth, left to right."""
        return [n for n in self.nodes() if n.depth == depth]

    def leaves(self):
        return self.level(self.steps)

    def edges(self):
        """Edges, named by the child they lead to."""
        return [n for n in self.nodes() if n.parent is not None]

    def stochastic(self, step):
        return step in self.chosen and step != self.steps - 1

    @property
    def last_split(self):
        return max(self.splits) if self.splits else -1


def sample(tree, velocity, sigmas, kind, eta, initial, noises, density="true"):
    """Walk the tree from noise to pictures, one node at a time: next = mean + std * noise on stochastic edges.

    velocity(x, sigma) is one prompt's; initial[j] is root j's latent; noises[i][j] the noise of node j at depth i + 1.
    """
    for root, x in zip(tree.roots, initial):
        root.latent = np.asarray(x, dtype=np.float64)

    for i in range(tree.steps):
        for j, child in enumerate(tree.level(i + 1)):
            x = child.parent.latent
            v = velocity(x, sigmas[i])
            kind_of_step = kind if tree.stochastic(i) else "ode"
            child.mean, child.std = step_moments(kind_of_step, x, v, sigmas[i], sigmas[i + 1], eta, sigmas[1])

            # A deterministic step has no density; 0 leaves the sum over a path as it is.
            if tree.stochastic(i):
                child.latent = child.mean + child.std * noises[i][j]
                child.logp = logp_mean(child.latent, child.mean, child.std, density)
            else:
                child.latent, child.logp = child.mean, 0.0


# --------------------------------------------------------------------------------------------------------------- credit
def path_logp(node, leaf):
    """log p(l|n): the log-probs of the edges from n down to l."""
    return math.fsum(edge.logp for edge in leaf.up_to(node))


def fusion_weights(node, beta):
    """softmax over the leaves below the node of beta * log p(l|n)."""
    logits = [beta * path_logp(node, leaf) for leaf in node.leaves()]
    largest = max(logits)  # cancels, and keeps the exponentials finite
    exponentials = [math.exp(logit - largest) for logit in logits]
    return [e / math.fsum(exponentials) for e in exponentials]


def fuse(tree, rewards, beta):
    """Eq. 3 at every node, rbar(n) = sum_l w_l r_l, on rewards centred over the prompt's leaves."""
    leaves = tree.leaves()
    centre = math.fsum(rewards) / len(leaves)
    for leaf, r in zip(leaves, rewards):
        leaf.reward = r - centre

    for node in tree.nodes():
        weighted_leaves = zip(fusion_weights(node, beta), node.leaves())
        node.fused = math.fsum(w * leaf.reward for w, leaf in weighted_leaves)


def depth_advantages(tree, clip=5.0, eps=1e-4):
    """Eq. 4: z-score with the population std over the nodes of a depth; 0 where that std is below 1e-6."""
    for depth in range(1, tree.steps + 1):
        level = tree.level(depth)
        mean = math.fsum(n.fused for n in level) / len(level)
        std = math.sqrt(math.fsum((n.fused - mean) ** 2 for n in level) / len(level))

        for n in level:
            z = 0.0 if std < 1e-6 else (n.fused - mean) / (std + eps)
            n.advantage = max(-clip, min(clip, z))


# -------------------------------------------------------------------------------------------------------------- pruning
def keep_all(tree):
    for edge in tree.edges():
        edge.kept = edge.step in tree.chosen


def drop_chain(tree, leaf):
    """Drop the edges on a leaf's path that come after the last split: they serve this leaf alone."""
    while leaf.parent is not None and leaf.step > tree.last_split:
        leaf.kept = False
        leaf = leaf.parent


def prune_parent_top1(tree):
    """At the last split every parent keeps its best child (first on ties); the other children's later edges go."""
    for parent in tree.level(tree.last_split):
        best = parent.children[0]
        for child in parent.children:
            if child.fused > best.fused:
                best = child

        for child in parent.children:
            if child is not best:
                for leaf in child.leaves():
                    drop_chain(tree, leaf)


def prune_extreme(tree, b):
    """Keep the later edges of the best b and the worst b leaves; among equals the lower index counts as the better."""
    leaves = tree.leaves()
    ranked = sorted(range(len(leaves)), key=lambda j: (-leaves[j].reward, j))
    for j in ranked[b : len(ranked) - b]:
        drop_chain(tree, leaves[j])


def prune_depth(tree, start, width):
    """Drop edges whose step lies in the window, never one at or before the last split."""
    for edge in tree.edges():
        if edge.step > tree.last_split and start <= edge.step <= start + width - 1:
            edge.kept = False


def window_positions(first, last, iterations, every=None):
    """Start of a sliding window at each iteration, found by letting it slide from iteration to iteration."""
    positions = max(first, last) - first + 1
    every = every or max(1, iterations // positions)

    start, starts = first, []
    for iteration in range(iterations):
        if iteration > 0 and iteration % every == 0 and start < last:
            start += 1
        starts.append(start)
    return starts


# ------------------------------------------------------------------------------------------------------------- counting
def trained_edges(tree):
    return [e for e in tree.edges() if e.kept and tree.stochastic(e.step)]


def count(tree):
    return {
        "leaves": len(tree.leaves()),
        "nodes": len(tree.nodes()),
        "edges": len(tree.edges()),
        "forwards": sum(1 for n in tree.nodes() if n.children),
        "kept": sum(1 for e in tree.edges() if e.kept),
        "trainable": len(trained_edges(tree)),
        "trained_parents": len({id(e.parent) for e in trained_edges(tree)}),
    }


# ----------------------------------------------------------------------------------------------------------------- loss
def clipped_loss(ratio, advantage, clip):
    """-min(rho A, clip(rho, 1-e, 1+e) A) for one edge."""
    inside = min(max(ratio, 1 - clip), 1 + clip)
    return -min(ratio * advantage, inside * advantage)


def edge_weight(tree, edge, loss_weight):
    """1, or the fraction of the prompt's leaves that lie below the edge."""
    return 1.0 if loss_weight == "edge" else len(edge.leaves()) / len(tree.leaves())


def total_loss(trees, velocities, sigmas, kind, eta, clip, loss_weight, step_weight=None, density="true"):
    """Eq. 5 at new parameters: the weighted mean over the kept stochastic edges of all prompts.

    `velocities` are those of the new parameters, one function per prompt; `edge.logp` is of the old ones. step_weight
    multiplies the loss of a step, and is no part of the divisor.
    """
    loss, weights = 0.0, 0.0
    for tree, velocity in zip(trees, velocities):
        for edge in trained_edges(tree):
            i, x = edge.step, edge.parent.latent
            mean, std = step_moments(kind, x, velocity(x, sigmas[i]), sigmas[i], sigmas[i + 1], eta, sigmas[1])
            ratio = math.exp(logp_mean(edge.latent, mean, std, density) - edge.logp)

            w = edge_weight(tree, edge, loss_weight)
            loss += w * (step_weight[i] if step_weight else 1.0) * clipped_loss(ratio, edge.advantage, clip)
            weights += w
    return loss / weights


def kl(trees, velocities, references, sigmas, kind, eta):
    """mean over trained parents of mean_D (m - m_ref)^2 / (2 std^2), the KL of two Gaussians with the same std."""
    terms = []
    for tree, velocity, reference in zip(trees, velocities, references):
        parents = {id(e.parent): e.parent for e in trained_edges(tree)}  # each once, however many edges it has
        for parent in parents.values():
            i, x = parent.depth, parent.latent
            settings = (sigmas[i], sigmas[i + 1], eta, sigmas[1])
            m, std = step_moments(kind, x, velocity(x, sigmas[i]), *settings)
            m_ref, _ = step_moments(kind, x, reference(x, sigmas[i]), *settings)
            terms.append(float(np.mean((m - m_ref) ** 2)) / (2 * std**2))
    return math.fsum(terms) / len(terms)
