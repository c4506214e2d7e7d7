"""The method once more, slowly: float64, numpy, one Node object for every node, every sum by walking the tree.

Nothing is imported from the project and nothing here is fast. Where the project reshapes arrays, this file follows parent
and child links; where it works in log-space for a whole batch, this file takes one edge at a time. Both are written from
the same equations, so agreement means that both are right or that both misread them.

Direction of time: depth 0 is noise (sigma = 1), depth T the picture (sigma = 0); step i leads from depth i to i + 1.
"""

import math

import numpy as np


# ----------------------------------------------------------------------------------------------------------------- steps
def sigma_schedule(steps, shift):
    """sigma_i = shift u / (1 + (shift - 1) u), u = 1 - i/T."""
    levels = []
    for i in range(steps + 1):
        u = (steps - i) / steps
        levels.append(shift * u / (1 + (shift - 1) * u))
    return levels


def step_moments(kind, x, v, sigma, sigma_next, eta, sigma_1):
    """Mean and std of the next latent, for one latent x."""
    dt = sigma_next - sigma
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    if kind == "ode":
        return x + v * dt, 0.0
    if kind == "dance":
        minus_score = (x - (1 - sigma) * clean) / sigma**2
        return x + v * dt + eta**2 / 2 * minus_score * dt, eta * math.sqrt(-dt)
    if kind == "flow":
        under_the_root = sigma / (1 - sigma_1) if sigma == 1 else sigma / (1 - sigma)
        s = eta * math.sqrt(under_the_root)
        mean = x * (1 + s * s * dt / (2 * sigma)) + v * (1 + s * s * (1 - sigma) / (2 * sigma)) * dt
        return mean, s * math.sqrt(-dt)
    if kind == "cps":
        std = sigma_next * math.sin(eta * math.pi / 2)
        return (1 - sigma_next) * clean + math.sqrt(sigma_next**2 - std**2) * noise, std
    raise KeyError(kind)


def logp_mean(x, mean, std, density="true"):
    """Gaussian log-density averaged over the dimensions, one dimension at a time."""
    total, dims = 0.0, 0
    for a, m in zip(np.ravel(x), np.ravel(mean)):
        if density == "upstream":
            total += -((a - m) ** 2)
        else:
            total += -((a - m) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
        dims += 1
    return total / dims


# ------------------------------------------------------------------------------------------------------------------ tree
class Node:
    """One latent. `logp` belongs to the edge from the parent; roots have none."""

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
    """The forest of one prompt; `chosen` are the steps the schedule makes stochastic, the last one never is."""

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
    """Walk the tree from noise to pictures, a node at a time: next = mean + std * noise, log-prob on stochastic edges.

    velocity(x, sigma) is one prompt's; initial[j] is root j's latent; noises[i][j] the noise of node j at depth i + 1.
    """
    for root, x in zip(tree.roots, initial):
        root.latent = np.asarray(x, dtype=np.float64)
    for i in range(tree.steps):
        for j, child in enumerate(tree.level(i + 1)):
            x = child.parent.latent
            v = velocity(x, sigmas[i])
            how = kind if tree.stochastic(i) else "ode"
            child.mean, child.std = step_moments(how, x, v, sigmas[i], sigmas[i + 1], eta, sigmas[1])
            if tree.stochastic(i):
                child.latent = child.mean + child.std * noises[i][j]
                child.logp = logp_mean(child.latent, child.mean, child.std, density)
            else:
                child.latent, child.logp = child.mean, 0.0


# ---------------------------------------------------------------------------------------------------------------- credit
def path_logp(node, leaf):
    """log p(l|n): the log-probs of the edges from n down to l."""
    return math.fsum(edge.logp for edge in leaf.up_to(node))


def fusion_weights(node, beta):
    """softmax over the leaves below the node of beta * log p(l|n)."""
    scores = [beta * path_logp(node, leaf) for leaf in node.leaves()]
    top = max(scores)
    exp = [math.exp(s - top) for s in scores]
    return [e / math.fsum(exp) for e in exp]


def fuse(tree, rewards, beta):
    """Eq. 3 at every node, on rewards centred over the prompt's leaves."""
    leaves = tree.leaves()
    centre = math.fsum(rewards) / len(leaves)
    for leaf, r in zip(leaves, rewards):
        leaf.reward = r - centre
    for node in tree.nodes():
        below = zip(fusion_weights(node, beta), node.leaves())
        node.fused = math.fsum(w * leaf.reward for w, leaf in below)


def depth_advantages(tree, clip=5.0, eps=1e-4):
    """Eq. 4: z-score with the population std over the nodes of a depth; 0 where that std is below 1e-6."""
    for depth in range(1, tree.steps + 1):
        level = tree.level(depth)
        mean = math.fsum(n.fused for n in level) / len(level)
        std = math.sqrt(math.fsum((n.fused - mean) ** 2 for n in level) / len(level))
        for n in level:
            z = 0.0 if std < 1e-6 else (n.fused - mean) / (std + eps)
            n.advantage = max(-clip, min(clip, z))


# --------------------------------------------------------------------------------------------------------------- pruning
def keep_all(tree):
    for edge in tree.edges():
        edge.kept = edge.step in tree.chosen


def drop_chain(tree, leaf):
    """Drop the edges on a leaf's path that come after the last split."""
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
    """Start of a sliding window at each iteration, advanced one iteration at a time."""
    positions = max(first, last) - first + 1
    every = every or max(1, iterations // positions)
    start, starts = first, []
    for iteration in range(iterations):
        if iteration > 0 and iteration % every == 0 and start < last:
            start += 1
        starts.append(start)
    return starts


# -------------------------------------------------------------------------------------------------------------- counting
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


# ------------------------------------------------------------------------------------------------------------------ loss
def clipped_loss(ratio, advantage, clip):
    """-min(rho A, clip(rho, 1-e, 1+e) A) for one edge."""
    inside = min(max(ratio, 1 - clip), 1 + clip)
    return -min(ratio * advantage, inside * advantage)


def edge_weight(tree, edge, loss_weight):
    """1, or the share of the prompt's leaves that lie below the edge."""
    return 1.0 if loss_weight == "edge" else len(edge.leaves()) / len(tree.leaves())


def total_loss(trees, velocities, sigmas, kind, eta, clip, loss_weight, step_weight=None, density="true"):
    """Eq. 5 at new parameters: the weighted mean over the kept stochastic edges of all prompts, against the stored logp."""
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
    """mean over trained parents of mean_D (m - m_ref)^2 / (2 std^2)."""
    terms = []
    for tree, velocity, reference in zip(trees, velocities, references):
        parents = {id(e.parent): e.parent for e in trained_edges(tree)}
        for p in parents.values():
            i = p.depth
            args = (sigmas[i], sigmas[i + 1], eta, sigmas[1])
            m, std = step_moments(kind, p.latent, velocity(p.latent, sigmas[i]), *args)
            m_ref, _ = step_moments(kind, p.latent, reference(p.latent, sigmas[i]), *args)
            terms.append(float(np.mean((m - m_ref) ** 2)) / (2 * std**2))
    return math.fsum(terms) / len(terms)
