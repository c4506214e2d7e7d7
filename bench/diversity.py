"""Are tree samples distributed as sequential ones, and how much diversity do shared prefixes cost?

Question    MMD^2 between tree and sequential samples, against the null of two sequential sets; KID; distance between siblings.
Hypothesis  One leaf of each of many trees cannot be told from sequential samples (every child is marginally a plain SDE step); all
            leaves together differ, since they share ancestors: MMD^2 at most .019 in the paper's protocol.
Metric      Unbiased MMD^2 (Gretton et al. 2012, Lemma 6, equation 4) with a Gaussian kernel, bandwidth the median distance of
            sequential samples; KID, the same with the cubic polynomial kernel. Both sides have the same prompts, so p comes from
            exchanging the two samples of a prompt at random; where 16 share a prompt, all 16 at once. Features: pixels
            (blocks of 4 x 4), the OCR model's outputs, and of every CLIP model that --reward or --watch names its picture
            features. Within a prompt: mean pairwise distance of a tree's leaves over that of sequential samples.
Rule        One leaf a tree: p above .05. Positive controls that must be rejected: split noise times 4 with the density as it
            was, and eta raised by a fifth.

    python bench/diversity.py            # 25 minutes on one core
"""

import sys

import common
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from branchgrpo import Sampler, generators, rollout
from rewards import to_uint8
from sde import sigma_schedule
from tree import make_forest

STEPS, SPLITS, KEY = 10, (0, 1, 3, 4), 2**31 + 3


class Loud(Sampler):
    """The positive control: four times the noise at splits."""

    def moments(self, step, x, v, stochastic=True):
        """As a Sampler's, with std times 4 where the step is a split."""
        mean, std = super().moments(step, x, v, stochastic)
        return mean, std * (4 if step[0].item() in SPLITS else 1)


def samples(run, forest, s: float, eta: float, first: int, n: int, kind: str, by=Sampler) -> torch.Tensor:
    """n forests, always of the same prompts, with noises from number `first` on, decoded: (n, leaves, 3, H, W)."""
    sampler, out = by(sigma_schedule(STEPS, 3.0), kind, eta, s), []
    for start in range(first, first + n, 16):
        numbers = range(start, min(start + 16, first + n))
        cond = run.policy.encode([run.prompts[(i - first) % len(run.prompts)] for i in numbers])
        latents = rollout(run.policy, cond, forest, sampler, generators(KEY, 0, numbers), 256).latents[-1]
        out.append(run.policy.decode(latents.flatten(0, 1)).unflatten(0, (len(numbers), -1)))
    return torch.cat(out)


def pixel_features(pictures: torch.Tensor) -> np.ndarray:
    """(n, 3, H, W) -> (n, d): means over blocks of 4 x 4."""
    return F.avg_pool2d(pictures, 4).flatten(1).double().numpy()


def ocr_features(run):
    """The recogniser's outputs before any choice of letters: log-probabilities at its positions, every 17th."""
    session = run.rewards["ocr"].recogniser.session

    def features(pictures: torch.Tensor) -> np.ndarray:
        rows = []
        for part in pictures.split(64):
            bgr = torch.from_numpy(np.ascontiguousarray(to_uint8(part)[..., ::-1])).permute(0, 3, 1, 2).float()
            x = F.interpolate(bgr, (48, 48 * bgr.shape[3] // bgr.shape[2]), mode="bilinear") / 127.5 - 1
            out = np.log(np.asarray(session(x.numpy())) + 1e-6)  # (b, positions, letters)
            rows.append(out.reshape(len(out), -1)[:, ::17])
        return np.concatenate(rows).astype(np.float64)

    return features


def clip_features(scorer):
    """Picture features of length 1 of a preference model of the CLIP family."""

    @torch.no_grad()
    def features(pictures: torch.Tensor) -> np.ndarray:
        return torch.cat([scorer.image_features(to_uint8(x)) for x in pictures.split(32)]).double().cpu().numpy()

    return features


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n, m)."""
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T, 0)


def paired(k: np.ndarray) -> np.ndarray:
    """h_ij = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j), 0 where i = j, from the kernel matrix of n x's and n y's."""
    n = len(k) // 2
    h = k[:n, :n] + k[n:, n:] - k[:n, n:] - k[n:, :n]
    np.fill_diagonal(h, 0)
    return h


def compare(x: np.ndarray, y: np.ndarray, bandwidth: float, permutations: int, block: int = 1) -> dict:
    """Unbiased MMD^2 of paired samples with its p-value, and KID.

    x_i and y_i share a prompt, so their labels may be exchanged, alone or with the `block` of samples of that prompt: then
    h_ij changes its sign with each of i and j.
    """
    z, n, rng = np.concatenate([x, y]), len(x), np.random.default_rng(0)
    h, cubic = (
        paired(k) for k in (np.exp(-squared_distances(z, z) / (2 * bandwidth)), (z @ z.T / z.shape[1] + 1) ** 3)
    )
    signs = rng.choice([-1.0, 1.0], (permutations, n // block)).repeat(block, 1)
    null = ((signs @ h) * signs).sum(1) / (n * (n - 1))
    found = float(h.sum()) / (n * (n - 1))
    p = float(1 + (null >= found).sum()) / (1 + permutations)
    return {"mmd2": found, "p": p, "null_95": float(np.quantile(null, 0.95)), "kid": float(cubic.sum()) / (n * (n - 1))}


def draw(document: dict):
    """MMD^2 of every comparison beside the 95 % quantile of its null; siblings' distance against s."""
    figure = plt.figure(figsize=(11, 4))
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for j, (space, rows) in enumerate(document["features"].items()):
        y = np.arange(len(rows)) + 0.25 * j
        left.plot([r["mmd2"] for r in rows.values()], y, "o", color=common.COLOURS[j], label=space)
        left.plot(
            [r["null_95"] for r in rows.values()],
            y,
            "|",
            ms=12,
            color=common.COLOURS[j],
            label=f"{space}: 95 % of the null",
        )
    left.set_yticks(np.arange(len(rows)) + 0.12, rows)
    left.invert_yaxis()
    left.set_xscale("symlog", linthresh=1e-3)
    left.set_xlabel("MMD$^2$ to sequential samples")
    left.legend(fontsize=8)
    for j, (space, rows) in enumerate(document["within"].items()):
        right.plot([str(s) for s in rows], list(rows.values()), "o-", color=common.COLOURS[j], label=space)
    right.set(xlabel="branch noise s", ylabel="distance within a prompt, over sequential", ylim=(0, None))
    right.legend(fontsize=8)
    return figure


def main() -> None:
    """Sample, compare; table, JSON, figure."""
    parser = common.parser(__doc__)
    parser.add_argument("--n", type=int, default=1024, help="samples a side")
    parser.add_argument("--permutations", type=int, default=2000)
    parser.add_argument("--sde", default="cps", help="kind of step")
    parser.add_argument("--eta", type=float, default=0.7)
    o = parser.parse_args()
    n, permutations, run = 32 if o.smoke else o.n, 20 if o.smoke else o.permutations, common.prepare(o, "")
    tree, flat = make_forest(STEPS, 2, SPLITS), make_forest(STEPS, 2, ())
    group = make_forest(STEPS, 2, (), roots=16)
    with tqdm(total=10, desc="samples", file=sys.stderr) as bar:

        def drawn(*args, **kwargs):
            bar.update()
            return samples(run, *args, kind=o.sde, **kwargs)

        sequential, other = (drawn(flat, 4.0, o.eta, first, n)[:, 0] for first in (0, n))
        trees = {s: drawn(tree, s, o.eta, 2 * n, n if s == 4.0 else n // 8) for s in (1.0, 2.0, 4.0, 8.0)}
        many, others = (drawn(group, float("inf"), o.eta, first * n, n // 16) for first in (4, 5))
        loud = drawn(tree, 4.0, o.eta, 2 * n, n, by=Loud)[:, 0]
        more = drawn(flat, 4.0, 1.2 * o.eta, 2 * n, n)[:, 0]
    sets = {  # name -> the samples, and the sequential ones of the same prompts
        "sequential, other noises": (other, sequential),
        "tree, one leaf of each": (trees[4.0][:, 0], sequential),
        "control: split noise x 4": (loud, sequential),
        "control: eta x 1.2": (more, sequential),
        "16 sequential for each prompt": (others.flatten(0, 1), many.flatten(0, 1)),
        "tree, all 16 leaves": (trees[4.0][: n // 16].flatten(0, 1), many.flatten(0, 1)),
    }
    spaces = {"pixels": pixel_features} | ({"OCR outputs": ocr_features(run)} if "ocr" in run.rewards else {})
    spaces |= {n: clip_features(r) for n, r in run.rewards.items() if hasattr(r, "image_features")}
    found, within = {}, {}
    for space, features in spaces.items():
        x = features(sequential)
        bandwidth = float(np.median(squared_distances(x, x)[np.triu_indices(len(x), 1)])) / 2
        found[space] = {}
        for name, (y, z) in sets.items():
            block = 16 if "16" in name else 1
            found[space][name] = compare(features(z), features(y), bandwidth, permutations, block)

        def spread(group, features=features):
            return float(
                np.mean(
                    [np.sqrt(squared_distances(f, f))[np.triu_indices(len(f), 1)].mean() for f in map(features, group)]
                )
            )

        base = spread(many)
        within[space] = {s: spread(x[: n // 8]) / base for s, x in trees.items()}
        print(f"{space:<32}{'MMD^2':>10}{'p':>8}{'95 % null':>11}{'KID':>10}")
        for name, r in found[space].items():
            print(f"  {name:<30}{r['mmd2']:10.5f}{r['p']:8.3f}{r['null_95']:11.5f}{r['kid']:10.5f}")
        print(
            "  distance within a prompt, over sequential: "
            + ", ".join(f"s = {s}: {v:.3f}" for s, v in within[space].items())
        )
    common.finish("diversity", o, {"features": found, "within": within, "n": n}, draw)


if __name__ == "__main__":
    main()
