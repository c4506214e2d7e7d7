"""Are tree samples distributed as sequential ones? What diversity do shared prefixes cost, and what a shorter tail?

Question    How far are tree samples from sequential ones, by MMD^2 and KID, against the null of two sequential sets?
            How far apart are the leaves of one tree? How do pictures and rewards of `--flash N`, whose deterministic
            tail takes N steps, differ from those of the whole tail, from the same noises?
Hypothesis  One leaf of each of many trees cannot be told from sequential samples, since every child is marginally a
            plain SDE step. All leaves together differ, since they share ancestors: MMD^2 is at most 0.019 in the
            paper's protocol. Only pairs of leaves of one tree can make it differ, so it falls as trees are added;
            "same prompt" is the mean of h_ij over those pairs alone, which does not.
Metric      Unbiased MMD^2 (Gretton et al. 2012, Lemma 6, equation 4) with a Gaussian kernel exp(-d^2 / 2 h^2), h the
            median distance of sequential samples; KID, the same with the cubic polynomial kernel. Both sides have the
            same prompts, so p comes from exchanging the labels of pairs of one prompt at random: valid where all
            samples of a prompt are independent.
            Features: pixels (means over blocks of 4 x 4), the OCR model's outputs, and the picture features of every
            CLIP model that --reward or --watch names.
            Within a prompt: the mean pairwise distance of a tree's leaves over that of as many sequential samples,
            paired by prompt, with a jackknife over prompts.
            Tails, with noise at the splits only: the distance to the picture of a tail of 50 second-order steps, over
            the distance of two pictures of one prompt; and the reward minus that of the whole Euler tail.
Rule        One leaf per tree, drawn at random: p must be above 0.05, where p is that of the mean over four independent
            pairs of sets. Two positive controls must be rejected by one pair: the noise at splits times 4 with the
            density as it was, and eta raised by a fifth. A weak control, eta x 1.03, shows how fine the test is.
            Steps are dance with eta = 1.6, the best of most arms of alignment.py, whose pictures depend on eta (in few
            steps its samples end noisier than the noise level). These steps and the four pairs were chosen after two
            runs whose second control was not rejected: cps with eta = 0.7, which keeps marginals at any eta, and dance
            with eta = 0.7 (LAB.md).

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

KEY = 2**31 + 3  # of the noises: no training run and no other benchmark has them
EXACT = 50  # second-order steps of a tail that stands for the ODE's solution
BRANCH_NOISES = (1, 2, 4, 8)  # s of Eq. 2
AT_A_TIME = 16  # forests that are rolled out together


# ------------------------------------------------------------------------------------------------------------- samples
@dataclass(frozen=True)
class Loud(Sampler):
    """A sampler that is wrong on purpose, the positive control: four times the noise at splits."""

    splits: tuple[int, ...] = ()

    def moments(self, step, x, v, stochastic=True):
        """Return a Sampler's moments, with std times 4 where the step is a split."""
        mean, std = super().moments(step, x, v, stochastic)
        return mean, std * (4 if step[0].item() in self.splits else 1)


def samples(run, spaces: dict, forest, sampler: Sampler, first: int, n: int, all_leaves: bool) -> dict[str, np.ndarray]:
    """Roll out n forests and return the features of their leaves in each space.

    Forest i has prompt i whatever `first` is, so that two sets differ in their noises alone.

    Args:
        run: whose policy and prompts are used.
        spaces: name -> function of pictures (b, 3, H, W) and their prompts, which returns features (b, d).
        forest, sampler: its shape and its steps.
        first: number of the first forest's noise; sets whose numbers do not overlap are independent.
        n: number of forests.
        all_leaves: whether all leaves are returned, or one that is drawn at random from each forest.

    Returns:
        Name of a space -> (n, leaves, d) with all leaves, else (n, d).
    """
    features, rng = {space: [] for space in spaces}, np.random.default_rng(first)
    for start in range(first, first + n, AT_A_TIME):
        # Roll out the next forests.
        numbers = range(start, min(start + AT_A_TIME, first + n))
        prompts = [run.prompts[(i - first) % len(run.prompts)] for i in numbers]
        cond, noise = run.policy.encode(prompts), generators(KEY, 0, numbers)
        leaves = rollout(run.policy, cond, forest, sampler, noise, run.args.micro_batch).latents[-1]  # (b, leaves, ...)

        # Leaves of one tree depend on each other. One leaf of each tree is a set of independent samples.
        if not all_leaves:
            chosen = torch.from_numpy(rng.integers(forest.leaves, size=len(numbers)))
            leaves = leaves[torch.arange(len(numbers)), chosen][:, None]  # (b, 1, ...)

        # Only features are kept: the pictures of a thousand forests would be too large.
        pictures = loop.strip(run.policy.decode(leaves.flatten(0, 1)))  # a video becomes a strip of frames
        prompt_of_picture = [p for p in prompts for _ in leaves[0]]
        for space, features_of in spaces.items():
            features[space].append(features_of(pictures, prompt_of_picture).reshape(*leaves.shape[:2], -1))

    features = {space: np.concatenate(rows) for space, rows in features.items()}
    return features if all_leaves else {space: x[:, 0] for space, x in features.items()}


# ------------------------------------------------------------------------------------------------------------ features
def pixel_features(pictures: torch.Tensor, prompts: list[str]) -> np.ndarray:
    """Return means over blocks of 4 x 4 pixels: (n, 3, H, W) -> (n, d)."""
    return F.avg_pool2d(pictures, 4).flatten(1).double().numpy()


def ocr_features(run):
    """Make a function that returns the recogniser's outputs before any letter is chosen.

    They are log-probabilities of all letters at all positions, of which every 17th is taken.
    """
    session = run.rewards["ocr"].recogniser.session

    def features(pictures: torch.Tensor, prompts: list[str]) -> np.ndarray:
        rows = []
        for chunk in pictures.split(64):
            # The recogniser takes pictures of 48 pixels in height, in blue-green-red order, in [-1, 1].
            bgr = torch.from_numpy(np.ascontiguousarray(to_uint8(chunk)[..., ::-1])).permute(0, 3, 1, 2).float()
            x = F.interpolate(bgr, (48, 48 * bgr.shape[3] // bgr.shape[2]), mode="bilinear") / 127.5 - 1
            logp = np.log(np.asarray(session(x.numpy())) + 1e-6)  # (b, positions, letters)
            rows.append(logp.reshape(len(logp), -1)[:, ::17])
        return np.concatenate(rows).astype(np.float64)

    return features


def clip_features(scorer):
    """Make a function that returns the picture features, of length 1, of a preference model of the CLIP family."""

    @torch.no_grad()
    def features(pictures: torch.Tensor, prompts: list[str]) -> np.ndarray:
        return torch.cat([scorer.image_features(to_uint8(x)) for x in pictures.split(32)]).double().cpu().numpy()

    return features


def reward_features(run):
    """Make a function that returns every reward of the run, one per column: no space to measure distances in."""

    def features(pictures: torch.Tensor, prompts: list[str]) -> np.ndarray:
        return torch.stack(list(score(run.rewards, pictures, prompts).values()), 1).double().cpu().numpy()

    return features


# --------------------------------------------------------------------------------------------------------------- tails
def tails(args, run, spaces: dict, n: int) -> dict[str, dict]:
    """Measure what a shorter tail changes, from the same noises.

    Returns:
        Name of a tail -> model calls per picture, distance to the exact picture in each space, reward differences.
    """
    # One trajectory per prompt. Its first steps are those of training, noisy at the splits only; the steps that follow
    # the last split are the tail, which draws no noise and may therefore be walked in fewer steps.
    options = run.args
    before = max(options.splits) + 1
    euler = f"Euler, {options.steps - before} steps"
    steps = {"exact": EXACT, "other": EXACT, euler: options.steps - before} | {f"--flash {k}": k for k in (4, 3, 2, 1)}

    # "other" is the exact tail again from noises of its own: it says how far apart two pictures of a prompt are.
    drawn, spaces_and_rewards = {}, spaces | {"rewards": reward_features(run)}
    for name, k in tqdm(steps.items(), desc="tails", file=sys.stderr):
        forest = make_forest(before + k, 2, (), chosen=options.splits)
        sigmas = sigma_schedule(options.steps, options.shift, (before, k))
        sampler = Sampler(sigmas, options.sde, options.eta, flash=name != euler)
        arguments = (forest, sampler, n * (name == "other"), n, False)
        drawn[name] = common.kept(
            args, "diversity", f"tail {name}, {n}", lambda a=arguments: samples(run, spaces_and_rewards, *a)
        )

    # Compare each tail but "exact" and "other" with the exact one, and its rewards with those of Euler's whole tail.
    result = {}
    for name in list(steps)[2:]:
        differences = (drawn[name]["rewards"] - drawn[euler]["rewards"]).T  # (rewards, n)
        result[name] = {"model_calls": before + steps[name], "distance": {}}
        result[name]["reward_minus_euler"] = {r: common.interval(d) for r, d in zip(run.rewards, differences)}
        for space in spaces:
            exact = drawn["exact"][space]
            to_exact = np.linalg.norm(drawn[name][space] - exact, axis=1)
            of_two_pictures = np.linalg.norm(drawn["other"][space] - exact, axis=1)
            result[name]["distance"][space] = float(to_exact.mean() / of_two_pictures.mean())

    print(f"{'tail':<16}{'calls':>6}   distance to the exact picture, over that of two pictures; reward minus Euler's")
    for name, row in result.items():
        distances_shown = ", ".join(f"{space} {value:.3f}" for space, value in row["distance"].items())
        gains = ["{} {:+.4f} [{:+.4f}, {:+.4f}]".format(r, *v) for r, v in row["reward_minus_euler"].items()]
        print(f"{name:<16}{row['model_calls']:6d}   {distances_shown}; {', '.join(gains)}")
    return result


# --------------------------------------------------------------------------------------------------------- comparisons
def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return |x_i - y_j|^2 = |x_i|^2 + |y_j|^2 - 2 x_i . y_j: (n, d), (m, d) -> (n, m)."""
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T, 0)  # rounding may go below 0


def paired(k: np.ndarray) -> np.ndarray:
    """Return h_ij = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j), and 0 where i = j: (2n, 2n) -> (n, n).

    Args:
        k: kernel matrix of the n x's followed by the n y's.
    """
    n = len(k) // 2
    h = k[:n, :n] + k[n:, n:] - k[:n, n:] - k[n:, :n]
    np.fill_diagonal(h, 0)
    return h


def compare(
    pairs: list[tuple[np.ndarray, np.ndarray]], width: float, permutations: int, samples_per_prompt: int = 1
) -> dict:
    """Compute unbiased MMD^2 of paired samples, the mean over several pairs of sets, with its p-value, and KID.

    MMD^2 = sum_ij h_ij / (n (n - 1)). The samples x_i and y_i share a prompt, so their labels may be exchanged where
    nothing differs. Then h_ij changes its sign with each of i and j, so a draw of the null is
    sum_ij s_i h_ij s_j / (n (n - 1)) with random signs s.

    Args:
        pairs: of features x and y, (n, d) each.
        width: h of the Gaussian kernel.
        permutations: draws of the null.
        samples_per_prompt: so many samples in a row share a prompt. Where above 1, the mean of h_ij over pairs of one
            prompt is returned too.
    """
    mmd2s, kids, nulls, same_prompt, rng = [], [], [], [], np.random.default_rng(0)
    for x, y in pairs:
        # The two kernels, on all samples of both sides.
        z, n = np.concatenate([x, y]), len(x)
        gaussian = np.exp(-squared_distances(z, z) / (2 * width**2))
        h, cubic = paired(gaussian), paired((z @ z.T / z.shape[1] + 1) ** 3)

        # All draws of the null at once: (permutations, n) signs.
        signs = rng.choice([-1.0, 1.0], (permutations, n))
        nulls.append(((signs @ h) * signs).sum(1) / (n * (n - 1)))
        mmd2s.append(float(h.sum()) / (n * (n - 1)))
        kids.append(float(cubic.sum()) / (n * (n - 1)))

        # A block-diagonal mask picks the pairs of one prompt: n (samples_per_prompt - 1) of them, since h_ii = 0.
        m = samples_per_prompt
        same_prompt.append(float((np.kron(np.eye(n // m), np.ones((m, m))) * h).sum()) / (n * max(1, m - 1)))

    # p counts the draws that are at least as large, the observation itself among them.
    each_p = [float(1 + (null >= mmd2).sum()) / (1 + permutations) for mmd2, null in zip(mmd2s, nulls)]
    mmd2, null, kid = float(np.mean(mmd2s)), np.mean(nulls, 0), float(np.mean(kids))
    p = float(1 + (null >= mmd2).sum()) / (1 + permutations)
    result = {"mmd2": mmd2, "p": p, "null_95": float(np.quantile(null, 0.95)), "kid": kid, "each_p": each_p}
    return result | {"same_prompt": float(np.mean(same_prompt)) if samples_per_prompt > 1 else None}


def distance_ratio(x: np.ndarray, y: np.ndarray) -> list[float]:
    """Return the mean distance between the samples of a prompt, of x over that of y, with its interval.

    Args:
        x, y: (prompts, samples, d).
    """
    means = np.array([[distances(a).mean(), distances(b).mean()] for a, b in zip(x, y)])  # (prompts, 2)

    def ratio(left_out: int | None) -> float:
        of_x, of_y = means[np.arange(len(means)) != (-1 if left_out is None else left_out)].mean(0)
        return of_x / of_y

    return [float(value) for value in common.jackknife(ratio, len(means))]


def distances(x: np.ndarray) -> np.ndarray:
    """Return the distances of all pairs of n samples: (n, d) -> (n (n - 1) / 2,)."""
    return np.sqrt(squared_distances(x, x))[np.triu_indices(len(x), 1)]


# ------------------------------------------------------------------------------------------------------- what is drawn
def sample_sets(run, n: int, repeats: range) -> dict[str, tuple]:
    """Return name -> (forest, sampler, first noise, number of forests, all leaves?), the last arguments of `samples`.

    Noise numbers decide which sets are independent: 10 n of them belong to each repeat, n to each set.
    """
    options, leaves = run.args, run.args.leaves
    flat, tree = make_forest(options.steps, 2, ()), make_forest(options.steps, options.branch, options.splits)
    group = make_forest(options.steps, 2, (), roots=leaves)  # as many independent trajectories as a tree has leaves
    trees = n // leaves

    def sampler(s: float, eta: float = options.eta, kind=Sampler, **more) -> Sampler:
        return kind(sigma_schedule(options.steps, options.shift), options.sde, eta, s, **more)

    # The test of one leaf per tree, and what it is held against: a second set of sequential samples.
    sets = {}
    for r in repeats:
        sets[f"sequential {r}"] = flat, sampler(4), 10 * n * r, n, False
        sets[f"other {r}"] = flat, sampler(4), 10 * n * r + n, n, False
        sets[f"one {r}"] = tree, sampler(4), 10 * n * r + 2 * n, n, False

    # The controls have the noises of "one 0": they take its place.
    sets["loud"] = tree, sampler(4, kind=Loud, splits=options.splits), 2 * n, n, False
    sets["more"] = flat, sampler(4, 1.2 * options.eta), 2 * n, n, False
    sets["a little more"] = flat, sampler(4, 1.03 * options.eta), 2 * n, n, False

    # All leaves of whole trees, and groups of as many independent samples of one prompt.
    sets["groups"] = group, sampler(np.inf), 4 * n, trees, True
    sets["other groups"] = group, sampler(np.inf), 5 * n, trees, True
    return sets | {f"s = {s}": (tree, sampler(s), 6 * n, trees, True) for s in BRANCH_NOISES}


def compared_sets(leaves: int, repeats: range) -> dict[str, list[tuple[str, str]]]:
    """Return name of a comparison -> pairs of sets; the first of each pair is of sequential samples, prompts agree."""
    pairs = {
        "sequential, other noises": [(f"sequential {r}", f"other {r}") for r in repeats],
        "tree, one leaf of each": [(f"sequential {r}", f"one {r}") for r in repeats],
        "control: split noise x 4": [("sequential 0", "loud")],
        "control: eta x 1.2": [("sequential 0", "more")],
        "for scale: eta x 1.03": [("sequential 0", "a little more")],
        f"{leaves} sequential for each prompt": [("groups", "other groups")],
    }
    return pairs | {f"tree, all {leaves} leaves, s = {s}": [("groups", f"s = {s}")] for s in BRANCH_NOISES}


def draw(document: dict):
    """Draw MMD^2 of every comparison beside the 95 % quantile of its null, and the siblings' distance against s."""
    figure = plt.figure(figsize=(11, 4.5))
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))

    # Left: a row per comparison, one colour per space.
    for j, (space, rows) in enumerate(document["features"].items()):
        y, colour = np.arange(len(rows)) + 0.25 * j, common.COLOURS[j]
        left.plot([row["mmd2"] for row in rows.values()], y, "o", color=colour, label=space)
        null_95 = [row["null_95"] for row in rows.values()]
        left.plot(null_95, y, "|", ms=12, color=colour, label=f"{space}: 95 % of the null")
    left.set_yticks(np.arange(len(rows)) + 0.12, rows)
    left.invert_yaxis()

    # An unbiased MMD^2 may be negative, so the axis is linear around 0.
    left.set_xscale("symlog", linthresh=1e-3)
    largest = max(line.get_xdata().max() for line in left.lines)
    left.set(xlabel="MMD$^2$ to sequential samples", xlim=(None, 2 * largest))
    left.legend(fontsize=8)

    # Right: distances within a prompt.
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
    """Sample, compare, and write the table, the JSON and the figure."""
    parser = common.parser(__doc__)
    parser.set_defaults(flags="--sde dance --eta 1.6")
    parser.add_argument("--n", type=int, default=1024, help="samples on each side of a comparison")
    parser.add_argument("--permutations", type=int, default=2000, help="draws of the null")
    parser.add_argument("--repeats", type=int, default=4, help="independent pairs of sets to test one leaf per tree")
    args = parser.parse_args()

    n, permutations = (8, 20) if args.smoke else (args.n, args.permutations)
    repeats = range(2 if args.smoke else args.repeats)
    run = common.prepare(args, "--leaves 4" if args.smoke else "")
    leaves = run.args.leaves

    # The spaces in which distances are measured.
    spaces = {"OCR outputs": ocr_features(run)} if "ocr" in run.rewards else {}
    spaces |= {"pixels": pixel_features}
    spaces |= {name: clip_features(r) for name, r in run.rewards.items() if hasattr(r, "image_features")}

    # Draw all sets. Each is kept, since it takes minutes.
    drawn = {}  # name of a set -> space -> features
    for name, arguments in tqdm(sample_sets(run, n, repeats).items(), desc="samples", file=sys.stderr):
        drawn[name] = common.kept(
            args, "diversity", f"{name}, {n}", lambda arguments=arguments: samples(run, spaces, *arguments)
        )

    features, within = {}, {}
    for space in spaces:
        # MMD^2 takes a set as one list of samples. Only a comparison of all leaves has several samples per prompt.
        width = float(np.median(distances(drawn["sequential 0"][space])))
        flattened = {name: x[space].reshape(-1, x[space].shape[-1]) for name, x in drawn.items()}
        features[space] = {}
        for name, pairs in compared_sets(leaves, repeats).items():
            feature_pairs = [(flattened[a], flattened[b]) for a, b in pairs]
            features[space][name] = compare(feature_pairs, width, permutations, leaves if "all" in name else 1)
        groups = drawn["groups"][space]
        within[space] = {str(s): distance_ratio(drawn[f"s = {s}"][space], groups) for s in BRANCH_NOISES}

        print(f"{space:<32}{'MMD^2':>10}{'p':>8}{'95 % null':>11}{'KID':>10}")
        for name, row in features[space].items():
            print(f"  {name:<30}{row['mmd2']:10.5f}{row['p']:8.3f}{row['null_95']:11.5f}{row['kid']:10.5f}")
        ratios = ", ".join("s = {}: {:.3f} [{:.3f}, {:.3f}]".format(s, *v) for s, v in within[space].items())
        print(f"  distance within a prompt, over sequential: {ratios}")

    document = {"features": features, "within": within, "tails": tails(args, run, spaces, n), "n": n}
    common.finish("diversity", args, document, draw)


if __name__ == "__main__":
    main()
