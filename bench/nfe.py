"""How many model evaluations does each method need? By counting, and by hooks on a real run.

Question    Do the counts of the paper's NFE columns follow from the trees it describes, and does our code call the model so often?
Hypothesis  Yes: closed form and hooks agree exactly; the paper's figures agree where its text and its code do.
Metric      A picture's share of: nodes, edges (the paper's "NFE old"), edges kept (its "NFE new", the deterministic last step
            included), forwards of the rollout, trained parents (forward and backward). Windows are averaged over their slide.
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

OTHERS = {  # that the paper does not have; their tree starts at a random step: 16 draws
    "Flow-GRPO-Fast, window 2": "--method flowgrpo-fast",
    "TempFlow-GRPO": "--method tempflow",
}
SHARED = " --steps 20 --leaves 16 --prompts-per-iteration 1 --iterations 300 --watch jpeg --eval-size 1 --micro-batch 0"


def counted(options, iteration: int) -> dict[str, float]:
    """Closed form: one prompt's counts a picture, from the plan alone."""
    found = hardware.counted(options, iteration)
    return {k: v / found["leaves"] for k, v in found.items() if k != "leaves"}


def hooked(run: Run, iteration: int) -> dict[str, float]:
    """A real iteration, with a hook on the transformer that counts samples, with and without gradient."""
    calls = {"forwards": 0, "trained_parents": 0}

    def hook(module, inputs, kwargs):
        calls["trained_parents" if torch.is_grad_enabled() else "forwards"] += len(kwargs["hidden_states"])

    handle = run.policy.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    row, _ = loop.iterate(run, iteration)
    handle.remove()
    return {k: v / row["leaves"] for k, v in calls.items()}


def draw(document: dict):
    """Bars: rollout forwards and trained parents of each method, the paper's columns as marks."""
    rows, figure = document["rows"], plt.figure(figsize=(9, 4.5))
    ax, y = figure.subplots(), np.arange(len(document["rows"]))
    ax.barh(y - 0.2, [r["forwards"] for r in rows.values()], 0.38, label="rollout: forwards", color=common.COLOURS[0])
    trained = [r["trained_parents"] for r in rows.values()]
    ax.barh(y + 0.2, trained, 0.38, label="training: forwards with backward", color=common.COLOURS[1])
    for at, (side, label) in enumerate((("old", "paper, NFE old"), ("new", "paper, NFE new"))):
        marks = [(r[f"paper_{side}"], i - 0.2 + 0.4 * at) for i, r in enumerate(rows.values()) if r["paper_old"]]
        ax.plot(*zip(*marks), "kx" if at else "k|", label=label)
    ax.set_yticks(y, rows)
    ax.invert_yaxis()
    ax.set_xlabel("model evaluations a picture (T = 20, 16 leaves)")
    ax.legend()
    return figure


def main() -> None:
    """Count, run, compare; table, JSON, figure."""
    args = common.parser(__doc__).parse_args()
    rows, first = {}, common.prepare(args, SHARED, lr=1e-12)
    print(f"{'':<28}{'nodes':>9}{'edges':>9}{'kept':>9}{'forwards':>10}{'trained':>9}   paper: old, new")
    arms = [(name, flags, paper) for name, (flags, paper, _) in hardware.METHODS.items()]
    for name, flags, paper in arms + [(name, flags, None) for name, flags in OTHERS.items()]:
        run = common.variant(first, args, flags + SHARED)
        found = [counted(run.args, i) for i in (range(16) if name in OTHERS else hardware.slide(run.args))]
        for i in range((name == "BranchGRPO") if args.smoke else len(found)):
            seen = hooked(run, i)
            if any(abs(found[i][k] - seen[k]) > 1e-9 for k in seen):
                raise SystemExit(f"{name}, iteration {i}: counted {found[i]}, called {seen}")
        row = {k: float(np.mean([f[k] for f in found])) for k in found[0]}
        row |= dict(zip(("paper_old", "paper_new"), paper or (None, None)))
        rows[name] = row
        numbers = f"{row['nodes']:9.4f}{row['edges']:9.4f}{row['kept']:9.4f}{row['forwards']:10.4f}{row['trained_parents']:9.4f}"
        print(f"{name:<28}{numbers}   {'' if paper is None else f'{paper[0]}, {paper[1]}'}", flush=True)
    common.finish("nfe", args, {"rows": rows}, draw)


if __name__ == "__main__":
    main()
