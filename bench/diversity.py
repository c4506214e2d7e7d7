"""Are tree samples distributed as sequential ones, how much diversity do shared prefixes cost, and what does a flash tail change?

Question    MMD^2 between tree and sequential samples, against the null of two sequential sets; KID; distance between siblings.
            The pictures and rewards of `--flash N` against those of the whole tail, from the same noises.
Hypothesis  One leaf of each of many trees cannot be told from sequential samples (every child is marginally a plain SDE step); all
            leaves together differ, since they share ancestors: MMD^2 at most .019 in the paper's protocol. (Only pairs of one tree
            can make it differ, so that it falls as trees are added; "same prompt" is the mean of h_ij over those pairs alone.)
Metric      Unbiased MMD^2 (Gretton et al. 2012, Lemma 6, equation 4) with a Gaussian kernel exp(-d^2 / 2 h^2), h the median distance
            of sequential samples; KID, the same with the cubic polynomial kernel. Both sides have the same prompts, so p comes
            from exchanging the labels of pairs of one prompt at random: valid where all samples of a prompt are independent.
            Features: pixels (blocks of 4 x 4), the OCR model's outputs, and of every CLIP model that --reward or --watch
            names its picture features. Within a prompt: mean pairwise distance of a tree's leaves over that of as many sequential
            samples, paired by prompt, with a jackknife over prompts. Tails (noise at the splits alone): distance to the picture of a tail of
            50 second-order steps, over that of two pictures of a prompt; reward minus that of the whole Euler tail.
Rule        One leaf a tree, drawn at random: p above .05, of the mean over four independent pairs of sets. Positive controls that
            must be rejected by one pair: split noise times 4 with the density as it was, and eta raised by a fifth; a weak one,
            eta x 1.03, shows how fine the test is. Steps are dance 1.6, the best of most arms of alignment.py, whose pictures
            depend on eta (in few steps its samples end noisier than the noise level). They and the four pairs were chosen
            after two runs whose second control was not rejected (cps .7, which keeps marginals at any eta, and dance .7: LAB.md).

    python bench/diversity.py            # 20 minutes on one core
"""

import sys
from dataclasses import dataclass

import common
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import loop
from branchgrpo import Sampler, generators, rollout
from rewards import score, to_uint8
from sde import sigma_schedule
from tree import make_forest

KEY = 2**31 + 3  # of the noises
EXACT = 50  # second-order steps of a tail that stands for the ODE's solution


@dataclass(frozen=True)
class Loud(Sampler):
    """The positive control: four times the noise at splits."""

    splits: tuple[int, ...] = ()

    def moments(self, step, x, v, stochastic=True):
        """As a Sampler's, with std times 4 where the step is a split."""
        mean, std = super().moments(step, x, v, stochastic)
        return mean, std * (4 if step[0].item() in self.splits else 1)


def samples(run, spaces: dict, forest, sampler: Sampler, first: int, n: int, every: bool) -> dict[str, np.ndarray]:
    """n forests, always of the same prompts, with noises from number `first` on: features of each space.

    Returns:
        (n, leaves, d) with `every` leaf, else (n, d), of a leaf drawn at random from each forest.
    """
    found, rng = {space: [] for space in spaces}, np.random.default_rng(first)
    for start in range(first, first + n, 16):
        numbers = range(start, min(start + 16, first + n))
        prompts = [run.prompts[(i - first) % len(run.prompts)] for i in numbers]
        cond = run.policy.encode(prompts)
        leaves = rollout(run.policy, cond, forest, sampler, generators(KEY, 0, numbers), run.args.micro_batch).latents[
            -1
        ]
        if not every:
            drawn = torch.from_numpy(rng.integers(forest.leaves, size=len(numbers)))
            leaves = leaves[torch.arange(len(numbers)), drawn][:, None]
        pictures = loop.strip(run.policy.decode(leaves.flatten(0, 1)))
        for space, features in spaces.items():
            found[space].append(
                features(pictures, [p for p in prompts for _ in leaves[0]]).reshape(*leaves.shape[:2], -1)
            )
    found = {space: np.concatenate(rows) for space, rows in found.items()}
    return found if every else {space: x[:, 0] for space, x in found.items()}


def pixel_features(pictures: torch.Tensor, prompts: list[str]) -> np.ndarray:
    """(n, 3, H, W) -> (n, d): means over blocks of 4 x 4."""
    return F.avg_pool2d(pictures, 4).flatten(1).double().numpy()


def ocr_features(run):
    """The recogniser's outputs before any choice of letters: log-probabilities at its positions, every 17th."""
    session = run.rewards["ocr"].recogniser.session

    def features(pictures: torch.Tensor, prompts: list[str]) -> np.ndarray:
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
    def features(pictures: torch.Tensor, prompts: list[str]) -> np.ndarray:
        return torch.cat([scorer.image_features(to_uint8(x)) for x in pictures.split(32)]).double().cpu().numpy()

    return features


def reward_features(run):
    """Every reward of the run, one a column: not a space to measure distances in."""

    def features(pictures: torch.Tensor, prompts: list[str]) -> np.ndarray:
        return torch.stack(list(score(run.rewards, pictures, prompts).values()), 1).double().cpu().numpy()

    return features


def tails(args, run, spaces: dict, n: int) -> dict[str, dict]:
    """What a shorter tail changes, from the same noises: name -> model calls, distances to the exact picture, reward differences."""
    options, found = run.args, {}
    before = max(options.splits) + 1  # steps before the tail, noisy at the splits alone
    euler = f"Euler, {options.steps - before} steps"
    steps = {"exact": EXACT, "other": EXACT, euler: options.steps - before} | {f"--flash {k}": k for k in (4, 3, 2, 1)}
    x, every = {}, spaces | {"rewards": reward_features(run)}
    for name, k in tqdm(steps.items(), desc="tails", file=sys.stderr):
        forest = make_forest(before + k, 2, (), chosen=options.splits)
        sigmas = sigma_schedule(options.steps, options.shift, (before, k))
        spec = (forest, Sampler(sigmas, options.sde, options.eta, flash=name != euler), n * (name == "other"), n, False)
        x[name] = common.kept(args, "diversity", f"tail {name}, {n}", lambda spec=spec: samples(run, every, *spec))
    for name in list(steps)[2:]:
        minus = (x[name]["rewards"] - x[euler]["rewards"]).T
        found[name] = {"model_calls": before + steps[name], "distance": {}}
        found[name]["reward_minus_euler"] = {r: common.interval(d) for r, d in zip(run.rewards, minus)}
        for space in spaces:
            own, between = (np.linalg.norm(v - x["exact"][space], axis=1) for v in (x[name][space], x["other"][space]))
            found[name]["distance"][space] = float(own.mean() / between.mean())
    print(f"{'tail':<16}{'calls':>6}   distance to the exact picture, over that of two pictures; reward minus Euler's")
    for name, r in found.items():
        shown = ", ".join(f"{space} {v:.3f}" for space, v in r["distance"].items())
        shown += "; " + ", ".join(
            "{} {:+.4f} [{:+.4f}, {:+.4f}]".format(k, *v) for k, v in r["reward_minus_euler"].items()
        )
        print(f"{name:<16}{r['model_calls']:6d}   {shown}")
    return found


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n, m)."""
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T, 0)


def paired(k: np.ndarray) -> np.ndarray:
    """h_ij = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j), 0 where i = j, from the kernel matrix of n x's and n y's."""
    n = len(k) // 2
    h = k[:n, :n] + k[n:, n:] - k[:n, n:] - k[n:, :n]
    np.fill_diagonal(h, 0)
    return h


def compare(pairs: list[tuple[np.ndarray, np.ndarray]], width: float, permutations: int, share: int = 1) -> dict:
    """Unbiased MMD^2 of paired samples, the mean of several pairs of sets, with its p-value, and KID.

    x_i and y_i share a prompt, so their labels may be exchanged: then h_ij changes its sign with each of i and j.

    Args:
        pairs: of (n, d) features x and y.
        width: h of the kernel.
        share: so many samples in a row share a prompt; the mean of h_ij over their pairs alone is given too, where above 1.
    """
    found, kid, null, same, rng = [], [], [], [], np.random.default_rng(0)
    for x, y in pairs:
        z, n = np.concatenate([x, y]), len(x)
        h, cubic = map(paired, (np.exp(-squared_distances(z, z) / (2 * width**2)), (z @ z.T / z.shape[1] + 1) ** 3))
        signs = rng.choice([-1.0, 1.0], (permutations, n))
        null.append(((signs @ h) * signs).sum(1) / (n * (n - 1)))
        found.append(float(h.sum()) / (n * (n - 1)))
        kid.append(float(cubic.sum()) / (n * (n - 1)))
        same.append(float((np.kron(np.eye(n // share), np.ones((share, share))) * h).sum()) / (n * max(1, share - 1)))
    each = [float(1 + (b >= a).sum()) / (1 + permutations) for a, b in zip(found, null)]
    mmd2, null, kid = float(np.mean(found)), np.mean(null, 0), float(np.mean(kid))
    p = float(1 + (null >= mmd2).sum()) / (1 + permutations)
    found = {"mmd2": mmd2, "p": p, "null_95": float(np.quantile(null, 0.95)), "kid": kid, "each_p": each}
    return found | {"same_prompt": float(np.mean(same)) if share > 1 else None}


def distance_ratio(x: np.ndarray, y: np.ndarray) -> list[float]:
    """Mean distance of the samples of a prompt, of x over that of y, (prompts, samples, d) each, with its interval."""
    found = np.array([[distances(a).mean(), distances(b).mean()] for a, b in zip(x, y)])

    def ratio(left_out: int | None) -> float:
        means = found[np.arange(len(found)) != (-1 if left_out is None else left_out)].mean(0)
        return means[0] / means[1]

    return [float(v) for v in common.jackknife(ratio, len(found))]


def distances(x: np.ndarray) -> np.ndarray:
    """Distances of all pairs of n samples."""
    return np.sqrt(squared_distances(x, x))[np.triu_indices(len(x), 1)]


def draw(document: dict):
    """MMD^2 of every comparison beside the 95 % quantile of its null; siblings' distance against s."""
    figure = plt.figure(figsize=(11, 4.5))
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for j, (space, rows) in enumerate(document["features"].items()):
        y, colour = np.arange(len(rows)) + 0.25 * j, common.COLOURS[j]
        left.plot([r["mmd2"] for r in rows.values()], y, "o", color=colour, label=space)
        left.plot(
            [r["null_95"] for r in rows.values()], y, "|", ms=12, color=colour, label=f"{space}: 95 % of the null"
        )
    left.set_yticks(np.arange(len(rows)) + 0.12, rows)
    left.invert_yaxis()
    left.set_xscale("symlog", linthresh=1e-3)
    left.set(
        xlabel="MMD$^2$ to sequential samples", xlim=(None, 2 * max(line.get_xdata().max() for line in left.lines))
    )
    left.legend(fontsize=8)
    for j, (space, rows) in enumerate(document["within"].items()):
        mean, low, high = np.array(list(rows.values())).T
        x = np.arange(len(rows)) + 0.06 * j
        right.errorbar(x, mean, [mean - low, high - mean], fmt="o-", capsize=3, color=common.COLOURS[j], label=space)
    right.set_xticks(range(len(rows)), rows)
    right.axhline(1, color="k", lw=0.8)
    right.set(xlabel="branch noise s", ylabel="distance within a prompt, over sequential", ylim=(0, None))
    right.legend(fontsize=8)
    return figure


def main() -> None:
    """Sample, compare; table, JSON, figure."""
    parser = common.parser(__doc__)
    parser.set_defaults(flags="--sde dance --eta 1.6")
    parser.add_argument("--n", type=int, default=1024, help="samples a side")
    parser.add_argument("--permutations", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=4, help="independent sets for the test of one leaf a tree")
    args = parser.parse_args()
    n, permutations, run = (
        32 if args.smoke else args.n,
        20 if args.smoke else args.permutations,
        common.prepare(args, ""),
    )
    options, leaves = run.args, run.args.leaves
    tree, flat = make_forest(options.steps, options.branch, options.splits), make_forest(options.steps, 2, ())
    group = make_forest(options.steps, 2, (), roots=leaves)
    spaces = {"OCR outputs": ocr_features(run)} if "ocr" in run.rewards else {}
    spaces |= {"pixels": pixel_features}
    spaces |= {n: clip_features(r) for n, r in run.rewards.items() if hasattr(r, "image_features")}
    trees = n // leaves  # whole ones

    def sampler(s: float, eta: float = options.eta, kind=Sampler, **more) -> Sampler:
        return kind(sigma_schedule(options.steps, options.shift), options.sde, eta, s, **more)

    repeats, sets = (
        range(2 if args.smoke else args.repeats),
        {},
    )  # name -> forest, its sampler, first noise, how many, all leaves?
    for r in repeats:
        sets[f"sequential {r}"] = flat, sampler(4), 10 * n * r, n, False
        sets[f"other {r}"] = flat, sampler(4), 10 * n * r + n, n, False
        sets[f"one {r}"] = tree, sampler(4), 10 * n * r + 2 * n, n, False
    sets |= {
        "loud": (tree, sampler(4, kind=Loud, splits=options.splits), 2 * n, n, False),
        "more": (flat, sampler(4, 1.2 * options.eta), 2 * n, n, False),
        "a little more": (flat, sampler(4, 1.03 * options.eta), 2 * n, n, False),
        "groups": (group, sampler(np.inf), 4 * n, trees, True),
        "other groups": (group, sampler(np.inf), 5 * n, trees, True),
    }
    sets |= {f"s = {s}": (tree, sampler(s), 6 * n, trees, True) for s in (1, 2, 4, 8)}
    x = {}
    for name, spec in tqdm(sets.items(), desc="samples", file=sys.stderr):
        x[name] = common.kept(args, "diversity", f"{name}, {n}", lambda spec=spec: samples(run, spaces, *spec))
    pairs = {  # what is compared with sequential samples of the same prompts
        "sequential, other noises": [(f"sequential {r}", f"other {r}") for r in repeats],
        "tree, one leaf of each": [(f"sequential {r}", f"one {r}") for r in repeats],
        "control: split noise x 4": [("sequential 0", "loud")],
        "control: eta x 1.2": [("sequential 0", "more")],
        "for scale: eta x 1.03": [("sequential 0", "a little more")],
        f"{leaves} sequential for each prompt": [("groups", "other groups")],
    }
    pairs |= {f"tree, all {leaves} leaves, s = {s}": [("groups", f"s = {s}")] for s in (1, 2, 4, 8)}
    found, within = {}, {}
    for space in spaces:
        width = float(np.median(distances(x["sequential 0"][space])))
        flattened = {name: v[space].reshape(-1, v[space].shape[-1]) for name, v in x.items()}
        found[space] = {
            k: compare([(flattened[a], flattened[b]) for a, b in v], width, permutations, leaves if "all" in k else 1)
            for k, v in pairs.items()
        }
        within[space] = {str(s): distance_ratio(x[f"s = {s}"][space], x["groups"][space]) for s in (1, 2, 4, 8)}
        print(f"{space:<32}{'MMD^2':>10}{'p':>8}{'95 % null':>11}{'KID':>10}")
        for name, r in found[space].items():
            print(f"  {name:<30}{r['mmd2']:10.5f}{r['p']:8.3f}{r['null_95']:11.5f}{r['kid']:10.5f}")
        shown = ", ".join("s = {}: {:.3f} [{:.3f}, {:.3f}]".format(s, *v) for s, v in within[space].items())
        print(f"  distance within a prompt, over sequential: {shown}")
    common.finish(
        "diversity", args, {"features": found, "within": within, "tails": tails(args, run, spaces, n), "n": n}, draw
    )


if __name__ == "__main__":
    main()
