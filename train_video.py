"""Trains a video model with BranchGRPO: `python train_video.py`, or `python train_video.py --method dancegrpo`.

The sibling of train_image.py, step by step: the same flags and the same loop; the policy, the rewards and how results
are shown differ. With no flag it takes the embedded default, a small real Wan that moves coloured shapes, and rewards
that watch them. It writes before_after.mp4, .gif and .png, curves.png, tree.png, tree.html, and OUT/model.
"""

from functools import partial

import flags
import hardware
import launch
import report
from models import VIDEO_MODELS, checkpoint_values, policy_of
from prompts import load_prompts


def job(argv: list[str] | None = None) -> tuple:
    """What the flags ask for: the arguments of `launch.prepare`, its accelerator apart.

    Raises:
        ValueError: one sentence.
    """
    tiny = flags.HERE / "tiny"
    parser = flags.parser((__doc__ or "").partition("\n")[0], video=True)
    args = hardware.parse(parser, argv)
    kind = None if args.plan else policy_of(args.model, VIDEO_MODELS)
    flags.resolve(args, hardware.planned_values if args.plan else partial(checkpoint_values, kind))
    prompts, heldout = load_prompts(args, tiny / "video_train.txt", tiny / "video_heldout.txt")
    policy = kind and partial(kind.load, args.model, args.height, args.width, args.frames)
    return args, policy, (args.frames, 3, args.height, args.width), prompts, heldout


def main(argv: list[str] | None = None) -> None:
    """Parse, resolve, train, report."""
    launch.start("train_video.py", job, argv, report.write)


if __name__ == "__main__":
    main()
