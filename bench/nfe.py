"""How many model evaluations does each method need? By counting, and by hooks on a real run.

Question    Do the counts in the paper's NFE columns follow from the trees that it describes, and does our code call the
            model as often as the counts say?
Hypothesis  Yes: closed form and hooks agree exactly, and the paper's figures agree where its text and its code do.
Metric      Per picture: nodes, edges (the paper's "NFE old"), edges kept (its "NFE new", the deterministic last step
            included), forwards of the rollout, trained parents (one forward and one backward each). A window that
            slides over the steps is averaged over all its places.
Rule        Hooks and closed form must be equal, or the script fails.

    python bench/nfe.py                  # 1 minute on one core
"""

import common
import matplotlib.pyplot as plt
import numpy as np
import torch

import hardware
import loop
from checkpoint import Run

OTHERS = {  # methods that the paper does not count; their tree starts at a random step
    "Flow-GRPO-Fast, window 2": "--method flowgrpo-fast",
    "TempFlow-GRPO": "--method tempflow",
}
DRAWS = 16  # of that random step, which are averaged
SHARED = " --steps 20 --leaves 16 --prompts-per-iteration 1 --iterations 300 --watch jpeg --eval-size 1 --micro-batch 0"


def counted(options, iteration: int) -> dict[str, float]:
    """Count by closed form: what one prompt's forest needs in this iteration, per picture, from the schedule alone."""
    counts = hardware.counted(options, iteration)
    return {name: n / counts["leaves"] for name, n in counts.items() if name != "leaves"}


def hooked(run: Run, iteration: int) -> dict[str, float]:
    """Count by observation: do a real iteration, and count the samples that reach the transformer, per picture.

    A call with gradient is training, where each sample is a trained parent; a call without is the rollout's.
    """
    calls = {"forwards": 0, "trained_parents": 0}

    def hook(module, inputs, kwargs):
        calls["trained_parents" if torch.is_grad_enabled() else "forwards"] += len(kwargs["hidden_states"])

    handle = run.policy.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    row, _ = loop.iterate(run, iteration)
    handle.remove()
    return {name: n / row["leaves"] for name, n in calls.items()}


def draw(document: dict):
    """Draw bars of each method's rollout forwards and trained parents, with the paper's two columns as marks."""
    rows, figure = document["rows"], plt.figure(figsize=(9, 4.5))
    ax, y = figure.subplots(), np.arange(len(document["rows"]))
    forwards = [row["forwards"] for row in rows.values()]
    trained = [row["trained_parents"] for row in rows.values()]
    ax.barh(y - 0.2, forwards, 0.38, label="rollout: forwards", color=common.COLOURS[0])
    ax.barh(y + 0.2, trained, 0.38, label="training: forwards with backward", color=common.COLOURS[1])

    # "NFE old" belongs to the rollout, the upper bar, and "NFE new" to training, the lower one.
    for i, (column, label) in enumerate((("old", "paper, NFE old"), ("new", "paper, NFE new"))):
        marks = [(r[f"paper_{column}"], j - 0.2 + 0.4 * i) for j, r in enumerate(rows.values()) if r["paper_old"]]
        ax.plot(*zip(*marks), "kx" if i else "k|", label=label)

    ax.set_yticks(y, rows)
    ax.invert_yaxis()
    ax.set_xlabel("model evaluations per picture (T = 20, 16 leaves)")
    ax.legend()
    return figure


def main() -> None:
    """Count, run, compare, and write the table, the JSON and the figure."""
    # The learning rate is so small that the hooked iterations leave the policy as it is.
    args = common.parser(__doc__).parse_args()
    rows, first = {}, common.prepare(args, SHARED, lr=1e-12)
    print(f"{'':<28}{'nodes':>9}{'edges':>9}{'kept':>9}{'forwards':>10}{'trained':>9}   paper: NFE old, NFE new")

    methods = [(name, flags, paper) for name, (flags, paper, _) in hardware.METHODS.items()]
    methods += [(name, flags, None) for name, flags in OTHERS.items()]
    for name, flags, paper in methods:
        # One iteration for each place of a sliding window, or for each draw of a random step.
        run = common.variant(first, args, flags + SHARED)
        iterations = range(DRAWS) if name in OTHERS else hardware.slide(run.args)
        by_formula = [counted(run.args, i) for i in iterations]

        # Each is also done for real; a smoke run does the first of one method alone.
        observed_iterations = len(by_formula) if not args.smoke else int(name == "BranchGRPO")
        for i in range(observed_iterations):
            observed = hooked(run, i)
            if any(abs(by_formula[i][key] - observed[key]) > 1e-9 for key in observed):
                raise SystemExit(f"{name}, iteration {i}: counted {by_formula[i]}, but the model was called {observed}")

        row = {key: float(np.mean([counts[key] for counts in by_formula])) for key in by_formula[0]}
        row |= dict(zip(("paper_old", "paper_new"), paper or (None, None)))
        rows[name] = row
        numbers = f"{row['nodes']:9.4f}{row['edges']:9.4f}{row['kept']:9.4f}{row['forwards']:10.4f}"
        numbers += f"{row['trained_parents']:9.4f}"
        print(f"{name:<28}{numbers}   {'' if paper is None else f'{paper[0]}, {paper[1]}'}", flush=True)
    common.finish("nfe", args, {"rows": rows}, draw)


if __name__ == "__main__":
    main()
