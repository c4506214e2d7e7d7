"""How good is a checkpoint, or what did training gain? One checkpoint or two, paired, on a prompt set, with any rewards.

Question    The mean of each reward over held-out prompts, and the gain of a second checkpoint on the same prompts and noises.
Hypothesis  Training with BranchGRPO raises the trained reward, and does not lower the watched ones.
Metric      Mean, paired difference and relative gain, each with Student's 95 % interval over prompt-noise pairs.
Rule        A gain counts where its interval lies above 0.

    python bench/evaluate.py --train "--iterations 200"     # the embedded default before and after; 4 minutes on one core
    python bench/evaluate.py --after runs/NAME/model        # the same of a run that is there
    python bench/evaluate.py --before black-forest-labs/FLUX.1-dev --after-lora runs/NAME/model --size 400 \\
        --flags "--eval-prompts hpdv2_test.txt --prompts hpdv2_train.txt --height 720 --width 720 --steps 20 \\
        --reward hpsv2 --watch imagereward,pickscore --dtype bf16 --micro-batch 1"     # the paper's 400 prompts, on a GPU
"""

import sys
import textwrap

import common
import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

import loop
import report


def scores_of(args, label: str, flags: str, size: int, lora: str | None = None) -> tuple[list[str], dict, torch.Tensor]:
    """A checkpoint's scores on `size` held-out prompt-noise pairs, name -> (size,), with the first pictures."""
    run = common.prepare(args, flags)
    if lora:
        run.policy.pipe.load_lora_weights(lora)
    prompts, scores, pictures = [], {}, []
    for start in tqdm(range(0, size, 32), desc=label, file=sys.stderr):
        p, s, x = loop.generate(run, range(start, min(start + 32, size)))
        prompts += p
        pictures += list(x) if len(pictures) < 24 else []
        scores = {k: scores.get(k, []) + v.tolist() for k, v in s.items()}
    return prompts, scores, torch.stack(pictures[:24])


def contact_sheet(before: torch.Tensor, after: torch.Tensor | None, prompts: list[str], path) -> None:
    """Pictures, or frames of videos, with their prompts; those of a second checkpoint below the first one's."""
    columns, shown = 6 if before.ndim == 4 else 2, loop.strip(before, 9)
    if after is not None:
        report.before_after(shown, loop.strip(after, 9), prompts, path, columns=columns)
        return
    rows, width = -(-len(prompts) // columns), 12 / columns
    figure = plt.figure(figsize=(12, rows * (width * shown.shape[-2] / shown.shape[-1] + 0.3)), layout="constrained")
    for i, ax in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        ax.set_axis_off()
        if i < len(prompts):
            ax.imshow(report.to_image(shown[i]))
            ax.set_title(textwrap.shorten(prompts[i], 40), fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw(document: dict):
    """Means with intervals of every reward, before and after."""
    rows = document["rows"]
    figure = plt.figure(figsize=(2.2 * len(rows), 3))
    for ax, (name, row) in zip(np.atleast_1d(figure.subplots(1, len(rows))), rows.items()):
        for x, (label, colour) in enumerate((("before", common.COLOURS[7]), ("after", common.COLOURS[0]))):
            if label in row:
                mean, low, high = row[label]
                ax.errorbar(x, mean, [[mean - low], [high - mean]], fmt="o", color=colour, capsize=4)
        ax.set_xticks([0, 1], ["before", "after"])
        ax.set(title=name, xlim=(-0.5, 1.5))
    return figure


def main() -> None:
    """Score, compare, print the table; JSON, figure, contact sheet."""
    parser = common.parser(__doc__)
    parser.add_argument("--before", help="folder or hub id; default: the embedded model")
    parser.add_argument(
        "--train", metavar="FLAGS", help="train --before with these flags, and compare with what comes out"
    )
    parser.add_argument("--after", help="folder or hub id of a whole pipeline")
    parser.add_argument("--after-lora", help="folder of a LoRA for --before")
    parser.add_argument("--size", type=int, default=256, help="prompt-noise pairs")
    args = parser.parse_args()
    size = 8 if args.smoke else args.size
    model = f" --model {args.before}" if args.before else ""
    prompts, before, pictures = scores_of(args, "before", model, size)
    rows = {name: {"before": common.interval(values)} for name, values in before.items()}
    raw = {"before": before}
    after = args.after
    if args.train is not None:
        common.train(args, common.runs(args) / "evaluate", f"{model} {args.train}".split(), model=True)
        after = common.runs(args) / "evaluate/model"
    if after or args.after_lora:
        model = f" --model {after}" if after else model
        _, raw["after"], later = scores_of(args, "after", model, size, args.after_lora)
        for name, row in rows.items():
            difference = common.interval(np.subtract(raw["after"][name], before[name]))
            row |= {"after": common.interval(raw["after"][name]), "gain": difference}
            row["relative_gain"] = difference[0] / abs(row["before"][0]) if row["before"][0] else None
    else:
        later = None
    sheet = common.folder(args) / f"{args.name or 'evaluate' + '_video' * args.video}_pictures.png"
    contact_sheet(pictures, later, prompts[:24], sheet)
    for name, row in rows.items():
        cells = [
            f"{k} {row[k][0]:8.4f} [{row[k][1]:.4f}, {row[k][2]:.4f}]" for k in ("before", "after", "gain") if k in row
        ]
        relative = f"   {100 * row['relative_gain']:+.1f} %" if row.get("relative_gain") is not None else ""
        print(f"{name:<14} {'   '.join(cells)}{relative}   n = {size}")
    common.finish("evaluate", args, {"rows": rows, "raw": raw}, draw)


if __name__ == "__main__":
    main()
