"""What people look at: held-out pictures before and after, curves, and a rollout tree with its credit.

1. before_after.png  held-out prompts, the same noise, before and after training
2. curves.png        training reward and spread, held-out scores, diagnostics, seconds, from metrics.jsonl alone
3. tree.png          a real rollout: the clean estimate at every node, edges coloured by advantage, pruned edges dashed
4. tree.html         the same rollout as a page to explore, which recomputes credit and pruning as its controls say

Videos are drawn as strips of their frames, and played in before_after.mp4 and before_after.gif; in tree.html the leaves
and the node that is selected play.
"""

import base64
import dataclasses
import io
import json
import math
import os
import sys
import textwrap
from itertools import cycle
from pathlib import Path

import imageio.v2 as imageio

os.environ["MPLBACKEND"] = "agg"  # files, no windows; set before matplotlib reads what the user's shell may hold
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.collections import LineCollection
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from torch import Tensor

import loop
import rewards as R
from branchgrpo import generators, rollout
from disk import replacing
from schedules import kept_edges, schedule_of

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"  # Okabe and Ito: safe for colour-blind readers
TREE_KEY = 2**31 + 1  # noise of the drawn tree
TEMPLATE, PLACEHOLDER = Path(__file__).with_name("explore.html"), "@DATA@"  # the page, and where its data go


def write(run) -> None:
    """Write the model, where it was trained, into OUT/model, the pictures and the page into the run's folder."""
    # The model first, then the pictures, each by itself: one that fails costs neither the model nor the others.
    if run.iteration:
        run.policy.save(run.out / "model")
    attempt(compare, run)
    attempt(curves, run.history, run.out / "curves.png")
    attempt(tree, run)


def compare(run) -> None:
    """The same prompts and noises before and after, as before_after.png; videos also as .mp4 and .gif."""
    # On more processes the main one has fewer pictures. Videos are strips of nine frames, three times as wide.
    before = load_file(run.out / "before.safetensors")["pictures"]
    n = min(len(before), len(run.pictures))
    before, after, prompts = before[:n], run.pictures[:n], [run.heldout[i % len(run.heldout)] for i in range(n)]
    columns = 6 if before.ndim == 4 else 2
    pairs = (loop.strip(before, 9), loop.strip(after, 9), prompts)
    attempt(before_after, *pairs, run.out / "before_after.png", columns)
    if before.ndim == 5:
        attempt(play, before, after, prompts, run.out / "before_after", run.args.fps)


def attempt(draw, *args) -> None:
    """Draw one thing; if that fails, whatever the reason, it is one warning at the end of a run that went well."""
    try:
        draw(*args)
    except Exception as error:
        print(f"warning: {draw.__name__} was not drawn ({type(error).__name__}: {error})", file=sys.stderr)
        plt.close("all")


def save(fig, path: Path, dpi: int) -> None:
    """Write a figure and close it; on a disk that fills up the picture that was there stays."""
    with replacing(path) as unfinished:
        fig.savefig(unfinished, dpi=dpi)
    plt.close(fig)


def to_image(picture: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8."""
    return R.to_uint8(picture[None])[0]


def before_after(before: Tensor, after: Tensor, prompts: list[str], path: Path, columns: int = 6) -> None:
    """A sheet of pairs: above before, below after, (B, 3, H, W) each."""
    # A cell is as wide as its picture needs, between 2 and 6.5 inches, and holds two pictures and a title.
    rows = -(-len(prompts) // columns)
    aspect = before.shape[-2] / before.shape[-1]
    width = min(6.5, max(2, 0.7 / aspect))
    size = (width * columns, rows * (2 * width * aspect + 0.45))
    fig, axes = plt.subplots(2 * rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.set_xticks([]), ax.set_yticks([])
        ax.axis("off")

    # Pair i stands in two rows: before above, after below.
    for i, prompt in enumerate(prompts):
        row, column = divmod(i, columns)
        for k, (picture, colour) in enumerate(((before[i], GREY), (after[i], BLUE))):
            ax = axes[2 * row + k, column]
            ax.axis("on")
            ax.imshow(to_image(picture))
            ax.spines[:].set_color(colour)
            if column == 0:
                ax.set_ylabel(("before", "after")[k], color=colour)
        axes[2 * row, column].set_title("\n".join(textwrap.wrap(prompt, 30)[:3]), fontsize=9, parse_math=False)
    fig.suptitle("Held-out prompts, the same noise, before and after")
    save(fig, path, 100)


def play(before: Tensor, after: Tensor, prompts: list[str], path: Path, fps=8, columns: int = 6, side=96) -> None:
    """before_after.mp4 and .gif: pairs of videos (B, F, 3, H, W), before on the left, each of about `side` pixels.

    They play at `fps` frames per second, the GIF as nearly as its unit allows: it counts in hundredths of a second.
    """
    # Small videos are enlarged by a whole factor. Large ones have players of their own; here every n-th pixel will do.
    enlarge, columns = max(1, side // before.shape[-1]), min(columns, len(before))
    shrink = max(1, before.shape[-1] // (2 * side))
    before, after = before[..., ::shrink, ::shrink], after[..., ::shrink, ::shrink]

    # Before and after side by side, two grey columns between them, a white frame around both.
    pairs = torch.cat([before, F.pad(after, (2, 0), value=0.5)], -1)  # (B, F, 3, H, 2 W + 2)
    pairs = F.pad(pairs.flatten(0, 1), (1, 1, 1, 1), value=1.0).unflatten(0, pairs.shape[:2])
    pixels = R.to_uint8(pairs.flatten(0, 1)).reshape(*pairs.shape[:2], *pairs.shape[-2:], 3)
    pixels = pixels.repeat(enlarge, 2).repeat(enlarge, 3)

    # A wall of pairs, `columns` in each row, each below its prompt.
    rows = []
    for first in range(0, len(pixels) // columns * columns, columns):
        cells = []
        for video, prompt in zip(pixels[first : first + columns], prompts[first : first + columns]):
            title = Image.new("RGB", (video.shape[2], 16), "white")
            ImageDraw.Draw(title).text((4, 2), prompt, "black", ImageFont.load_default(10))
            titles = np.broadcast_to(np.asarray(title), (len(video), 16, video.shape[2], 3))
            cells.append(np.concatenate([titles, video], 1))
        rows.append(np.concatenate(cells, 2))

    # The codec wants even sides.
    frames = np.concatenate(rows, 1)  # (F, height, width, 3)
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    gif = {"duration": round(1000 / fps), "loop": 0}  # milliseconds per frame
    for suffix, options in ((".mp4", {"fps": fps, "macro_block_size": 1}), (".gif", gif)):
        with replacing(path.with_suffix(suffix)) as unfinished:
            imageio.mimwrite(unfinished, frames, **options)


def series(history: list[dict], name: str) -> tuple[list, list]:
    """Iterations and values of one metric, where it was measured."""
    rows = [r for r in history if r.get(name) is not None]
    return [r["iteration"] for r in rows], [r[name] for r in rows]


def curves(history: list[dict], path: Path) -> None:
    """Training reward with its within-prompt spread, held-out scores, the ratio and the gradient, seconds by part."""
    fig, axes = plt.subplots(1, 4, figsize=(18, 4))

    # 1. The weighted reward: of training rollouts, with the spread that credit lives on, and of held-out prompts.
    x, mean = map(np.array, series(history, "reward_mean"))
    spread = np.array(series(history, "reward_std")[1])
    axes[0].fill_between(x, mean - spread, mean + spread, color=BLUE, alpha=0.2, lw=0, label="± std within a prompt")
    axes[0].plot(x, mean, color=BLUE, lw=1, label="training rollouts")
    axes[0].plot(*series(history, "heldout_reward"), color=ORANGE, marker="o", ms=4, label="held out (ODE)")
    axes[0].set(title="weighted reward", xlabel="iteration")

    # 2. Each score of the held-out prompts, optimised or only watched.
    names = sorted({k for row in history for k in row if k.startswith("heldout_")} - {"heldout_reward"})
    for name, colour in zip(names, cycle((ORANGE, BLUE, GREEN, GREY, "#CC79A7", "#E69F00"))):
        axes[1].plot(*series(history, name), color=colour, marker="o", ms=4, label=name.removeprefix("heldout_"))
    axes[1].set(title="held-out scores", xlabel="iteration")

    # 3. Is training healthy? docs/metrics.md says what to look for.
    for name, colour in (("grad_norm", BLUE), ("ratio_dev", ORANGE), ("kl", GREEN)):
        if series(history, name)[0]:  # kl is there only with --kl
            axes[2].plot(*series(history, name), color=colour, lw=1, label=name)
    axes[2].set(title="diagnostics", xlabel="iteration")
    axes[2].set_yscale("symlog", linthresh=1e-7)

    # 4. Where the time goes.
    names = ("seconds_rollout", "seconds_decode", "seconds_reward", "seconds_train")
    stacked, labels = [series(history, name)[1] for name in names], [name.removeprefix("seconds_") for name in names]
    axes[3].stackplot(x, stacked, labels=labels, colors=[BLUE, GREEN, GREY, ORANGE])
    axes[3].set(title="seconds per iteration", xlabel="iteration")
    for ax in axes:
        ax.legend(fontsize=8, framealpha=0.8)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    save(fig, path, 100)


def tree(run) -> None:
    """Roll out the first held-out prompt's forest as in the last iteration and score it: tree.png, tree.html."""
    args, policy = run.args, run.policy

    # A rollout of its own, with noise that no training used; the clean estimate of every node is kept for its picture.
    schedule, prompt = schedule_of(args, max(0, args.iterations - 1), run.history), run.heldout[0]
    forest, sampler = schedule.forest, run.sampler(schedule.sigmas)
    noise = generators(TREE_KEY, 0, range(1))
    out = rollout(policy, policy.encode([prompt]), forest, sampler, noise, args.micro_batch, keep_x0hat=True)

    # Credit and pruning as in training.
    leaves = policy.decode(out.latents[-1][0])
    scores = R.score_own(run.rewards, leaves, [prompt] * forest.leaves, run.own)
    if run.own:  # for this prompt, its own rewards are those of the run
        scores = {name: s for name, s in scores.items() if name in run.own[prompt]}
        run = dataclasses.replace(run, weights={name: w for name, w in run.own[prompt].items() if w})
    rewards, ranking, advantages = loop.credit_leaves(run, out, forest, scores)
    keep = kept_edges(args, schedule, ranking, advantages)

    # What each node shows. Videos are large, so a depth is made small as soon as it is decoded: a strip of frames for
    # the picture, a small clip for the page.
    strips, clips = [], []
    for x in (*out.x0hat, None):
        decoded = leaves if x is None else policy.decode(x[0])
        strips.append(loop.strip(decoded))
        clips.append(small_clips(decoded))

    # One rollout, two views; if one of them fails, the other is still drawn.
    credit = ([a[0] for a in advantages], [k[0] for k in keep], rewards[0])
    attempt(draw_tree, forest, strips, *credit, run.out / "tree.png")
    attempt(explore, run, schedule, prompt, out, scores, clips, run.out / "tree.html")


def draw_tree(forest, pictures, advantages, keep, rewards, path: Path) -> None:
    """Thumbnails (n_d, 3, H, W) at (depth, height), edges between them; rewards (leaves,) beside the leaves."""
    # Node j of n at a depth is centred over the leaves below it: 16 leaves, 4 nodes -> heights 2, 6, 10, 14.
    fig, ax = plt.subplots(figsize=(1.35 * (forest.steps + 2), 0.62 * forest.leaves + 1.2))
    heights = [(np.arange(n) + 0.5) * forest.leaves / n for n in forest.sizes]

    # Edges: colour is advantage, one scale for the whole tree, so that white is 0 everywhere.
    limit = max(1.0, max(float(a.abs().max()) for a in advantages))
    shade = plt.cm.ScalarMappable(plt.Normalize(-limit, limit), "coolwarm_r")
    for i in range(forest.steps):
        parents = forest.parents(i)
        lines = [((i, heights[i][p]), (i + 1, heights[i + 1][j])) for j, p in enumerate(parents)]
        trained = keep[i] & forest.stochastic(i)
        colours = [shade.to_rgba(a) if t else GREY for a, t in zip(advantages[i].tolist(), trained)]
        styles = ["dashed" if pruned else "solid" for pruned in forest.stochastic(i) & ~keep[i]]
        widths = [3 if t else 1 for t in trained]
        ax.add_collection(LineCollection(lines, colors=colours, linestyles=styles, lw=widths))

    # Nodes: their pictures, 64 pixels wide. Leaves: their rewards beside them.
    zoom = 64 / pictures[0].shape[-1]
    for d, level in enumerate(pictures):
        for j, picture in enumerate(level):
            box, frame = OffsetImage(to_image(picture), zoom=zoom), {"edgecolor": GREY, "lw": 0.5}
            ax.add_artist(AnnotationBbox(box, (d, heights[d][j]), pad=0.05, bboxprops=frame))
    for j, r in enumerate(rewards.tolist()):
        ax.text(forest.steps + 0.52, heights[-1][j], f"{r:.2f}", va="center", fontsize=9)

    ax.set(xlim=(-0.6, forest.steps + 1.1), ylim=(forest.leaves + 0.2, -0.4), yticks=[])
    ax.set_xticks(range(forest.steps + 1), [f"{d}\nnoise" if d == 0 else f"{d}" for d in range(forest.steps + 1)])
    ax.set_xlabel("depth; clean estimate at each node. thick: trained; thin grey: deterministic; dashed: pruned")
    ax.spines[:].set_visible(False)
    fig.colorbar(shade, ax=ax, label="advantage (Eq. 4)", fraction=0.02, pad=0.01)
    fig.tight_layout()
    save(fig, path, 80)


# ------------------------------------------------------------------------------------------------------------- the page
def small_clips(decoded: Tensor, picture: int = 128, frame: int = 64) -> Tensor:
    """Pictures (n, 3, H, W), or videos (n, F, 3, H, W) of which at most 9 frames stay: (n, F, 3, h, w) on the CPU.

    At most `picture` or `frame` pixels wide, by the mean over areas; smaller ones keep their pixels.
    """
    if decoded.ndim == 4:
        clips, widest = decoded.unsqueeze(1), picture
    else:
        clips, widest = R.sampled_frames(decoded, min(9, decoded.shape[1])), frame

    height, width = clips.shape[-2:]
    if width > widest:
        size = (max(1, round(height * widest / width)), widest)
        clips = F.interpolate(clips.float().flatten(0, 1), size=size, mode="area").unflatten(0, clips.shape[:2])
    return clips.detach().cpu()


def data_uri(clip: Tensor) -> str:
    """(F, 3, h, w) in [0, 1] -> its frames side by side as the text of a JPEG, which a page holds without a file."""
    # Colour in full resolution: halved, as is usual in a JPEG, small red letters would blur.
    image, buffer = Image.fromarray(to_image(torch.cat([*clip], -1))), io.BytesIO()
    image.save(buffer, "JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def explore(run, schedule, prompt: str, out, scores: dict[str, Tensor], clips: list[Tensor], path: Path) -> None:
    """explore.html filled with a rollout: one file that needs nothing else, and computes credit and pruning itself.

    Args:
        run: whose args, weights and iteration the page starts from.
        schedule: of the rollout.
        out: a Rollout of one prompt, whose log-probs count.
        scores: (leaves,) by name, watched rewards among them.
        clips: T+1 tensors (n_d, F, 3, h, w) from `small_clips`.
    """
    args, forest = run.args, schedule.forest
    frames, _, height, width = clips[0].shape[1:]

    # The rollout: what no control of the page changes. Numbers are written so that reading gives the same float64.
    data = {
        "prompt": prompt,
        "about": f"{args.method} after iteration {run.iteration}",
        "roots": forest.roots,
        "children": forest.children,
        "chosen": forest.chosen,
        "sigmas": schedule.sigmas.tolist(),
        "trained": sorted(schedule.trained_steps),
        "logp": [level[0].tolist() for level in out.logp_mean],
        "rewards": R.weighted_sum(scores, run.weights).tolist(),
        "scores": {name: s.tolist() for name, s in scores.items()},
        "weights": run.weights,
        "clip": {"frames": frames, "height": height, "width": width},
        "pictures": [[data_uri(clip) for clip in level] for level in clips],
    }

    # The run's own options, with which the page starts. JSON has no infinity: null is no clip, and no window.
    data["run"] = {
        "beta": args.fusion_beta,
        "rule": args.advantage,
        "clip": args.adv_clip if math.isfinite(args.adv_clip) else None,
        "mix": args.reward_mix,
        "width": args.width_prune,
        "depth": schedule.depth_window,
        "size": args.size_prune,
    }

    # A prompt may hold anything, "</script>" too, which would end the data: inside JSON "<" can be written as an
    # escape, and then no text of the page can be taken for a tag.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    with replacing(path) as unfinished:
        unfinished.write_text(TEMPLATE.read_text(encoding="utf-8").replace(PLACEHOLDER, text), encoding="utf-8")
