"""How good is a checkpoint, or what did training gain? One checkpoint or two, paired, on any prompts and rewards.

Question    What is the mean of each reward over held-out prompts, and what does a second checkpoint gain on the same
            prompts and noises?
Hypothesis  Training with BranchGRPO raises the trained reward, and does not lower the watched ones.
Metric      Mean, paired difference and relative gain, each with Student's 95 % interval over prompt-noise pairs.
Rule        A gain counts where its interval lies above 0.

    python bench/evaluate.py --train "--iterations 200"     # the embedded model before and after; 4 minutes on one core
    python bench/evaluate.py --after runs/NAME/model        # the same of a run that was done before
    python bench/evaluate.py --before black-forest-labs/FLUX.1-dev --after-lora runs/NAME/model --size 400 \\
        --flags "--eval-prompts hpdv2_test.txt --prompts hpdv2_train.txt --height 720 --width 720 --steps 20 \\
        --reward hpsv2 --watch imagereward,pickscore --dtype bf16 --micro-batch 1"   # the paper's 400 prompts, on a GPU
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

SHOWN = 24  # pictures on the contact sheet
AT_A_TIME = 32  # pictures that are drawn and scored together


def scores_of(args, label: str, flags: str, size: int, lora: str | None = None) -> tuple[list[str], dict, torch.Tensor]:
    """Score one checkpoint on held-out prompt-noise pairs, which are the same for every checkpoint.

    Args:
        args: the benchmark's command line.
        label: of the progress bar.
        flags: those that name the checkpoint, as `--model FOLDER`; none is the embedded model.
        size: number of pairs.
        lora: folder of a LoRA to load on top.

    Returns:
        The prompts, the scores as name -> `size` values, and the first pictures.
    """
    run = common.prepare(args, flags)
    if lora:
        run.policy.pipe.load_lora_weights(lora)

    prompts, scores, pictures = [], {}, []
    for start in tqdm(range(0, size, AT_A_TIME), desc=label, file=sys.stderr):
        new_prompts, new_scores, new_pictures = loop.generate(run, range(start, min(start + AT_A_TIME, size)))
        prompts += new_prompts
        pictures += list(new_pictures) if len(pictures) < SHOWN else []
        scores = {name: scores.get(name, []) + values.tolist() for name, values in new_scores.items()}
    return prompts, scores, torch.stack(pictures[:SHOWN])


def contact_sheet(before: torch.Tensor, after: torch.Tensor | None, prompts: list[str], path) -> None:
    """Draw pictures, or frames of videos, with their prompts; those of a second checkpoint below the first one's."""
    columns, shown = 6 if before.ndim == 4 else 2, loop.strip(before, 9)  # a video is a strip of 9 frames, so 2 columns
    if after is not None:
        report.before_after(shown, loop.strip(after, 9), prompts, path, columns=columns)
        return

    # One checkpoint alone. Each row is as high as its pictures, and 0.3 inches more for the prompts above them.
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
    """Draw the mean of every reward with its interval, before and after."""
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
    """Score, compare, and write the table, the JSON, the figure and a contact sheet."""
    parser = common.parser(__doc__)
    parser.add_argument("--before", help="folder or hub id of a pipeline; default: the embedded model")
    parser.add_argument(
        "--train", metavar="FLAGS", help="train --before with these flags; the result is the second one"
    )
    parser.add_argument("--after", help="folder or hub id of a whole pipeline, the second checkpoint")
    parser.add_argument("--after-lora", help="folder of a LoRA, which on top of --before is the second checkpoint")
    parser.add_argument("--size", type=int, default=256, help="prompt-noise pairs")
    args = parser.parse_args()

    # The first checkpoint.
    size = 8 if args.smoke else args.size
    model = f" --model {args.before}" if args.before else ""
    prompts, before, pictures = scores_of(args, "before", model, size)
    rows = {name: {"before": common.interval(values)} for name, values in before.items()}
    raw = {"before": before}

    # The second checkpoint, where there is one; it may have to be trained first.
    after, pictures_after = args.after, None
    if args.train is not None:
        common.train(args, common.runs(args) / "evaluate", f"{model} {args.train}".split(), model=True)
        after = common.runs(args) / "evaluate/model"

    # Both were scored on the same pairs, so the interval is that of the differences: it leaves out how prompts differ.
    if after or args.after_lora:
        model = f" --model {after}" if after else model
        _, raw["after"], pictures_after = scores_of(args, "after", model, size, args.after_lora)
        for name, row in rows.items():
            gain = common.interval(np.subtract(raw["after"][name], before[name]))
            row |= {"after": common.interval(raw["after"][name]), "gain": gain}
            row["relative_gain"] = gain[0] / abs(row["before"][0]) if row["before"][0] else None

    sheet = common.folder(args) / f"{args.name or 'evaluate' + '_video' * args.video}_pictures.png"
    contact_sheet(pictures, pictures_after, prompts[:SHOWN], sheet)

    for name, row in rows.items():
        columns = [column for column in ("before", "after", "gain") if column in row]
        cells = ["{} {:8.4f} [{:.4f}, {:.4f}]".format(column, *row[column]) for column in columns]
        relative = f"   {100 * row['relative_gain']:+.1f} %" if row.get("relative_gain") is not None else ""
        print(f"{name:<14} {'   '.join(cells)}{relative}   n = {size}")
    common.finish("evaluate", args, {"rows": rows, "raw": raw}, draw)


if __name__ == "__main__":
    main()
