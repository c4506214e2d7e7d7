"""Trains an image model with BranchGRPO: `python train_image.py`, or `python train_image.py --branch 4 --depth-prune`.

With no flag it takes the embedded default, a small real FLUX that draws coloured words, and rewards that read them:

1. flags are checked and resolved (flags.py), the counts of the tree printed (tree.py)
2. policy and rewards are loaded (models.py, rewards.py); the class of the policy follows from --model
3. held-out prompts are evaluated, the loop runs (loop.py, branchgrpo.py), held-out prompts are evaluated again
4. pictures are written (report.py): before_after.png, curves.png, tree.png, tree.html; the trained model in OUT/model

Progress goes to stderr; the last line on stdout is one JSON document. Bad input is one sentence and exit code 2.
"""

from functools import partial

import flags
import hardware
import launch
import report
from models import IMAGE_MODELS, checkpoint_values, policy_of
from prompts import load_prompts


def job(argv: list[str] | None = None) -> tuple:
    """What the flags ask for: the arguments of `launch.prepare`, its accelerator apart.

    Raises:
        ValueError: one sentence.
    """
    tiny = flags.HERE / "tiny"
    parser = flags.parser((__doc__ or "").partition("\n")[0])
    args = hardware.parse(parser, argv)
    kind = None if args.plan else policy_of(args.model, IMAGE_MODELS)
    flags.resolve(args, hardware.planned_values if args.plan else partial(checkpoint_values, kind))
    prompts, heldout = load_prompts(args, tiny / "prompts_train.txt", tiny / "prompts_heldout.txt")
    policy = kind and partial(kind.load, args.model, args.height, args.width)
    return args, policy, (3, args.height, args.width), prompts, heldout


def main(argv: list[str] | None = None) -> None:
    """Parse, resolve, train, report."""
    launch.start("train_image.py", job, argv, report.write)


if __name__ == "__main__":
    main()
