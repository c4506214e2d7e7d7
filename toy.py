"""The whole method in two dimensions: `python toy.py`, under a minute, then look at runs/toy.

Idea: in the plane of plane.py a rollout tree can be drawn as it is, and a change to the method is seen within seconds.
Nothing of the method is written here: this file trains, draws and measures.

1. figure       toy.png: before and after, a tree, siblings' noise, marginals, reward against model evaluations
2. animation    toy.gif: trees grow, and the samples move
3. gradients    --gradient: noise and bias of each rule, against a gradient that is known
4. main         one JSON document on the last line

The known gradient comes another way than all the others. Once its noises are drawn, a path
x_{i+1} = mean(x_i) + std xi is a function of the weights, and the reward can be differentiated through all of it
("pathwise"). That needs a reward with a gradient, and the memory of a whole path, which large models lack. In the plane
both are there, and 100,000 paths give the gradient of the expected reward almost without noise.

    python toy.py --objective endpoint --mix 0
    python toy.py --eta 0.2         # little noise: few trees reach another mode than their root's, so it learns slowly
    python toy.py --gradient        # two minutes
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import torch
from torch import Tensor

import loop
import report
from branchgrpo import NonFinite, generators, rollout
from checkpoint import Run
from disk import check_writable, replacing
from plane import CENTRES, NAMES, SPREAD, TEST_KEY, TREE_KEY, learn, near, parse, prepare
from report import BLUE, GREEN, GREY, ORANGE, plt
from schedules import noise_sharing, schedule_of
from sde import branch_noise
from tree import Forest

COMPARED = {"dancegrpo": GREY, "mixgrpo": GREEN, "branchgrpo": BLUE, "branchgrpo-mix": ORANGE}


# ------------------------------------------------------------------------------------------------------------- pictures
def draw_points(ax, points: Tensor, title: str, wanted: str) -> None:
    """Samples, the eight modes as circles of three standard deviations, the wanted one in orange."""
    ax.scatter(*points.T, s=2, color=BLUE, alpha=0.3, lw=0)
    for name, centre in zip(NAMES, CENTRES.tolist()):
        ax.add_patch(plt.Circle(centre, 3 * SPREAD, fill=False, color=ORANGE if name == wanted else GREY))
    ax.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal", xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)


def draw_tree(ax, tree: tuple, depth: int | None = None) -> None:
    """A tree as it lies in the plane, down to a depth: every node a point, edges coloured by their advantage (Eq. 4).

    Thin grey edges draw no noise, dashed ones are pruned. A black arrow at a split begins where its children would be
    without noise, and is the part of their noises that they share (Eq. 2): short with s = 4, long with s = 0.5.
    """
    forest, out, advantages, keep, shared = tree
    shade = plt.cm.ScalarMappable(plt.Normalize(-2, 2), "coolwarm_r")
    points = [x[0] for x in out.latents]  # T+1 times (n_d, 2)
    for i in range(forest.steps if depth is None else depth):
        starts = points[i][forest.parents(i)]  # (n_{i+1}, 2)
        for a, b, advantage, kept in zip(starts, points[i + 1], advantages[i][0].tolist(), keep[i][0]):
            trained = bool(kept) and forest.stochastic(i)
            style = {"color": shade.to_rgba(advantage), "lw": 2} if trained else {"color": GREY, "lw": 0.8}
            ax.plot(*zip(a.tolist(), b.tolist()), ls="-" if kept or not forest.stochastic(i) else "--", **style)
        if i in shared:
            starts, ends = shared[i]
            ax.quiver(
                *starts.T,
                *(ends - starts).T,
                angles="xy",
                scale_units="xy",
                scale=1,
                width=0.005,
                headwidth=2,
                zorder=3,
            )
    for level in points[: forest.steps + 1 if depth is None else depth + 1]:
        ax.scatter(*level.T, s=7, color="black", zorder=2, lw=0)
    ax.scatter(*points[0].T, s=60, color="black", marker="*", zorder=3)


def draw_siblings(ax, s: float) -> None:
    """Eq. 2: the noises of two siblings against each other; the slope is their correlation, 1 / (1 + s^2)."""
    noise = branch_noise(2000, 2, (1,), s, torch.Generator().manual_seed(TREE_KEY)).view(2000, 2)
    line, slope = torch.tensor([-3.0, 3.0]), 1 / (1 + s**2)
    ax.scatter(*noise.T, s=3, color=BLUE, alpha=0.3, lw=0)
    ax.plot(line, slope * line, color=ORANGE, label=f"slope 1 / (1 + s²) = {slope:.3f}")
    ax.set(title=f"noises of siblings, s = {s:g}", xlabel="of one", ylabel="of the other", aspect="equal")
    ax.legend(fontsize=8, loc="upper left")


@torch.no_grad()
def draw_marginals(ax, run: Run, trees: int = 1000) -> None:
    """Where leaves lie on the circle: those of many trees, over as many points that share nothing with each other."""
    schedule = schedule_of(run.args, 0, [])
    forest, sampler = schedule.forest, run.sampler(schedule.sigmas)
    lone, paths = Forest(1, (1,) * forest.steps, forest.chosen), trees * forest.leaves
    filled = {"histtype": "stepfilled", "color": BLUE, "alpha": 0.4, "label": f"leaves of {trees} trees"}
    outlined = {"histtype": "step", "color": "black", "label": f"{paths} independent samples"}
    for shape, n, style in ((forest, trees, filled), (lone, paths, outlined)):
        cond = run.policy.encode(run.heldout * n)
        leaves = rollout(run.policy, cond, shape, sampler, generators(TREE_KEY, 1, range(n))).latents[-1].flatten(0, 1)
        angles = torch.atan2(leaves[:, 1], leaves[:, 0]).rad2deg()
        ax.hist(angles.numpy(), 72, range=(-180, 180), density=True, **style)
    ax.set(title="leaves of trees are samples as all others", xlabel="angle on the circle, degrees", yticks=[])
    ax.legend(fontsize=8)


def figure(run: Run, before: Run, stages: list[dict], curves: dict[str, list[dict]]):
    """Six panels: samples before and after, a tree in the plane; siblings' noise, marginals, reward per evaluation."""
    fig, axes = plt.subplots(2, 3, figsize=(14, 9.4), layout="constrained")
    for ax, stage, title in ((axes[0, 0], stages[0], "before"), (axes[0, 2], stages[-1], "after")):
        draw_points(ax, stage["points"], f"{title}: {stage['share']:.0%} in the rewarded mode", run.args.mode)
    draw_points(
        axes[0, 1], torch.empty(0, 2), "a tree, before training: blue edges led to better leaves", run.args.mode
    )
    draw_tree(axes[0, 1], stages[0]["tree"])
    draw_siblings(axes[1, 0], noise_sharing(run.args))
    draw_marginals(axes[1, 1], before)
    for name, curve in curves.items():
        colour, width = COMPARED.get(name, "black"), 3 if name == run.args.method else 1.5
        x, y = ([stage[key] for stage in curve] for key in ("evaluations", "reward"))
        axes[1, 2].plot(x, y, color=colour, lw=width, label=name + " (your flags)" * (width == 3))
    axes[1, 2].set(title="reward of samples (ODE)", xlabel="model evaluations, rollout and trained rows")
    axes[1, 2].legend(fontsize=8)
    return fig


def animation(stages: list[dict], mode: str, path: Path, growth: int = 8) -> None:
    """A GIF: on the left trees grow, each in `growth` frames from the policy of its time; on the right samples move."""
    images, depths = [], stages[0]["tree"][0].steps
    fig, axes = plt.subplots(1, 2, figsize=(6.4, 3.3), layout="constrained")
    for j in range(6 * growth):
        now, begun = (stages[round(i * (len(stages) - 1) / (6 * growth - 1))] for i in (j, j - j % growth))
        for ax in axes:
            ax.clear()
        draw_points(axes[0], torch.empty(0, 2), "a tree grows, from noise (star) to leaves", mode)
        draw_tree(axes[0], begun["tree"], round((j % growth) / (growth - 1) * depths))
        draw_points(axes[1], now["points"], f"iteration {now['iteration']}: {now['share']:.0%} in the mode", mode)
        fig.canvas.draw()
        images.append(np.asarray(fig.canvas.buffer_rgba())[..., :3].copy())
    plt.close(fig)
    with replacing(path) as unfinished:
        imageio.mimwrite(unfinished, [*images, *images[-1:] * 8], format="gif", duration=160, loop=0)


# ----------------------------------------------------------------------------------------------------------- laboratory
ARMS = {  # name -> flags; the first is BranchGRPO as the paper has it
    "BranchGRPO": "",
    "DanceGRPO": "--method dancegrpo",
    "independent": "--method flowgrpo",
    "no fusion weights (beta 0)": "--fusion-beta 0",
    "group advantage": "--advantage group",
    "sibling advantage": "--advantage sibling",
    "every depth the same weight": "--loss-weight path",
    "width pruning, Parent-Top1": "--width-prune",
    "width pruning, Extreme-4": "--width-prune extreme-4",
    "depth pruning": "--depth-prune",
    "size pruning, half": "--size-prune 0.5",
    "noise at the splits only": "--mix 0",
    "noise at the splits only, endpoint": "--mix 0 --objective endpoint",
    "star, endpoint": "--mix 0 --splits 0 --branch 16 --objective endpoint",
    "ODE, elbo": "--method ode --objective elbo",
    "ODE, nft": "--method ode --objective nft",
}


def flat_gradient(run: Run) -> Tensor:
    """The gradient that lies in the policy's weights, (weights,) float64."""
    return torch.cat([weight.grad.flatten() for weight in run.policy.trainable()]).double()


def known_gradient(run: Run, noisy_only: bool, paths: int = 100_000) -> Tensor:
    """The gradient of minus the expected reward, through paths of independent samples; see the module's docstring.

    Args:
        noisy_only: of the weights as they act at the noisy steps alone. Elsewhere the same velocity is asked of the
            untrained copy: x still depends on what came before, but these weights are not differentiated.
    """
    schedule, generator = schedule_of(run.args, 0, []), torch.Generator().manual_seed(TEST_KEY)
    sampler, batch = run.sampler(schedule.sigmas), 10_000
    run.policy.transformer.zero_grad()
    for _ in range(paths // batch):
        x = torch.randn(batch, 2, generator=generator)
        for i in range(schedule.forest.steps):
            step, noisy = torch.full((batch,), i), schedule.forest.stochastic(i)
            v = run.policy.velocity(x, sampler.levels(x)[step], None, reference=noisy_only and not noisy)
            mean, std = sampler.moments(step, x, v, noisy)
            x = mean + std * torch.randn(batch, 2, generator=generator)
        (-near(x, run.heldout * batch).mean() * batch / paths).backward()
    return flat_gradient(run)


def compared(estimates: Tensor, known: list[Tensor]) -> np.ndarray:
    """Noise over signal of an estimate, tr Cov(g) / |E g|^2, and the cosine of E g with each known gradient.

    |E g|^2 is the mean product of two different estimates: the square of their mean would be too large by noise / B.

    Args:
        estimates: (B, weights). known: tensors (weights,).
    """
    n, total, squares = len(estimates), estimates.sum(0), estimates.square().sum()
    signal = (total @ total - squares) / (n * (n - 1))
    cosines = [float(total @ g / n / (signal * g.square().sum()).sqrt()) for g in known]
    return np.array([float((squares / n - signal) / signal), *cosines])


def gradients(argv: list[str], trials: int = 100, rollouts: int = 64) -> dict:
    """Every arm's gradient at the pre-trained policy, `trials` times, each the mean over so many rollouts.

    Returns:
        arm -> units of one rollout, a trained row counting three; noise, of one rollout over its signal; units_to_1,
        until they are equal; cosine with the known gradient, and with that of the noisy steps, each with its standard
        error (by a jackknife), of which the printed table shows two.

    Raises:
        ValueError: for flags that the arms choose themselves.
    """
    free, given = ("seed", "mode", "steps", "shift", "sde", "eta", "out", "gradient"), parse(argv).origin.items()
    fixed = [f"--{name.replace('_', '-')}" for name, where in given if where == "given" and name not in free]
    if fixed:
        raise ValueError(f"--gradient does not go with {fixed[0]}, which its rows choose themselves")
    table, known = {}, {}
    print(f"{'':<36}{'units':>7}{'noise/signal':>14}{'units to 1':>12}{'cosine, all steps':>20}{'noisy steps':>18}")
    for name, own in ARMS.items():
        args = parse([*argv, *own.split(), "--prompts-per-iteration", str(rollouts), "--iterations", str(trials)])
        args.max_grad_norm, run = 0.0, prepare(args)

        # Where other steps are noisy the expected reward is another function of the weights.
        noisy = tuple(map(schedule_of(args, 0, []).forest.stochastic, range(args.steps)))
        if noisy not in known:
            known[noisy] = [known_gradient(run, part) for part in (False, True)[: 1 + any(noisy)]]

        # An optimiser that leaves the policy as it is, so that gradients can be read.
        run.optimizer, estimates = SimpleNamespace(param_groups=[], zero_grad=lambda **_: None, step=lambda: None), []
        for i in range(trials):
            run.policy.transformer.zero_grad()
            run.history.append(loop.iterate(run, i)[0])
            estimates.append(flat_gradient(run))

        # The jackknife leaves out a tenth of the estimates at a time. One rollout is as noisy as `rollouts` estimates.
        tenths = torch.stack(estimates).unflatten(0, (10, -1))  # (10, trials / 10, weights)
        noise, *cosines = compared(tenths.flatten(0, 1), known[noisy])
        left_out = [compared(tenths[torch.arange(10) != i].flatten(0, 1), known[noisy])[1:] for i in range(10)]
        errors = (np.std(left_out, 0) * 3).tolist()  # the square root of 10 - 1
        units = float(np.mean([row["units"] for row in run.history])) / rollouts
        row = {"units": units, "noise": noise * rollouts, "units_to_1": units * noise * rollouts}
        table[name] = row | {"cosine": list(zip(cosines, errors))}
        shown = "".join(f"{value:12.3f} ± {2 * error:.3f}" for value, error in table[name]["cosine"])
        print(f"{name:<36}{units:7.0f}{row['noise']:14.1f}{row['units_to_1']:12.0f}{shown}", flush=True)
    return {"command": "python toy.py --gradient", "rollouts": trials * rollouts, "arms": table}


def main(argv: list[str] | None = None) -> None:
    """Train and draw, or with --gradient measure; the last line is one JSON document."""
    argv, begin = sys.argv[1:] if argv is None else argv, time.perf_counter()
    try:
        args = parse(argv)
        folder = Path(args.out)
        check_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if args.gradient:
            document = gradients(argv)
            with replacing(folder / "toy_gradient.json") as unfinished:
                unfinished.write_text(json.dumps(document, indent=1))
        else:
            document = show(args, folder)
    except (ValueError, NonFinite) as error:
        print(f"toy.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(document | {"seconds": round(time.perf_counter() - begin, 1), "out": str(folder)}))


def show(args, folder: Path) -> dict:
    """Train as the flags say; then four methods with no flag but its seed, mode and iterations; toy.png, toy.gif."""
    shown = ("method", "sde", "eta", "objective", "steps", "leaves", "prompts_per_iteration", "iterations", "lr")
    print(", ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in shown), file=sys.stderr)
    run = prepare(args)
    stages = learn(run, every=max(1, args.iterations // 40), trees=True)
    curves = {args.method: stages}
    same = ["--seed", str(args.seed), "--mode", args.mode, "--iterations", str(args.iterations)]
    for method in COMPARED:
        curves[method] = curves.get(method) or learn(prepare(parse(["--method", method, *same])))

    report.save(figure(run, prepare(args), stages, curves), folder / "toy.png", 80)
    animation(stages, args.mode, folder / "toy.gif")
    first, last = stages[0], stages[-1]
    document = {
        f"{key}_{when}": s[key] for key in ("reward", "share") for when, s in (("before", first), ("after", last))
    }
    return document | {"nfe": last["evaluations"]}


if __name__ == "__main__":
    main()
