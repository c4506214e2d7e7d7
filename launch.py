"""Launch."""

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list, gather_object
from diffusers.training_utils import EMAModel

import hardware
import rewards as R
from branchgrpo import NonFinite
from checkpoint import Run, checkpoints, find_out, load_checkpoint, options_to_keep
from flags import HERE, describe
from loop import summary, train
from prompts import own_prompts


def start(script: str, job, argv: list[str] | None, finish) -> None:
    """A script's main: what `job` makes of the flags is trained, or with --plan only counted; our errors are one sentence, exit 2."""
    try:
        args, *rest = job(argv)
        if args.plan:
            print(hardware.report(args))
        else:
            main(args, *rest, finish)
    except (ValueError, NonFinite) as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        if Path(where).resolve().parent != HERE.resolve():
            raise  # a library's: where it happened matters
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)


def main(args, load_policy, shape: tuple[int, ...], prompts: list[str], heldout: list[str], finish) -> None:
    """A whole run from resolved options: rewards, policy, loop, pictures; prints the counts first, the document last.

    Args:
        load_policy, shape, prompts, heldout: see `prepare`.
        finish: called with the Run at the end, on the main process; writes what people look at.

    Raises:
        ValueError: before any long work, one sentence; NonFinite or CannotScore in the loop.
    """
    for flag, asked in (("--device cuda", args.device == "cuda"), ("--nf4", args.nf4)):
        if asked and not torch.cuda.is_available():
            raise ValueError(f"{flag}: no GPU was found")
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=1))  # others wait while one writes a large checkpoint
    handlers = [patience, DistributedDataParallelKwargs(broadcast_buffers=False)]  # buffers are constants
    cpu = args.device == "cpu" or not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=handlers)  # --dtype alone decides
    if accelerator.distributed_type in ("FSDP", "DEEPSPEED") or accelerator.state.dynamo_plugin.backend != "NO":
        raise ValueError("accelerate's own sharding and compilation must be off: here they are --fsdp and --compile")
    main_process = accelerator.is_main_process
    args.out = broadcast_object_list([find_out(args) if main_process else None])[0]
    if main_process:
        options = options_to_keep(args, prompts, heldout)
        print(describe(args, prompts, heldout), flush=True)
    run = prepare(args, accelerator, load_policy, shape, prompts, heldout)
    if main_process and args.resume is None:
        run.out.mkdir(parents=True, exist_ok=True)
        (run.out / ".options").write_text(options)
        os.replace(run.out / ".options", run.out / "options.json")
    accelerator.wait_for_everyone()
    if not all(gather_object([(run.out / "options.json").exists()])):
        raise ValueError(f"--out {run.out} must be a folder that all processes share")
    last = broadcast_object_list([["", *map(str, checkpoints(run.out))][-1]])[0]  # as the main process sees it
    if args.resume is not None and last:
        load_checkpoint(run, Path(last))
    train(run)
    if run.ema:
        run.ema.copy_to(run.policy.trainable())
    run.policy.unshard(main_process)
    if main_process:
        finish(run)
        print(json.dumps(summary(run)))
    accelerator.wait_for_everyone()  # a node that leaves early may take the others' meeting point with it


def prepare(args, accelerator: Accelerator, load_policy, shape: tuple[int, ...], prompts, heldout) -> Run:
    """Rewards, policy, optimiser and EMA from resolved options: a Run at iteration 0.

    Args:
        load_policy: called with dtype, device, guidance, lora, keep_reference, checkpointing, tiling; see policy.py.
        shape: of one picture or video.
        prompts, heldout: from prompts.load_prompts.

    Raises:
        ValueError: if --fsdp has no other process, the processes do not share the prompts or updates evenly, or rewards or policy cannot be loaded.
    """
    if args.fsdp and not torch.distributed.is_initialized():
        raise ValueError("--fsdp splits the model over processes: start it with torchrun")
    share = args.prompts_per_iteration / accelerator.num_processes
    if share % args.updates:
        n = accelerator.num_processes * args.updates
        raise ValueError(f"--prompts-per-iteration must be a multiple of processes x --updates = {n}")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    setup = R.Setup(
        args.reward_weights, accelerator.device, dtypes[args.reward_dtype], args.reward_offload, args.reward_batch
    )
    rewards, weights = R.load_rewards(args.reward, args.watch, [*prompts, *heldout], torch.ones(1, *shape), setup)
    trained = {"guidance": args.guidance, "lora": args.lora, "keep_reference": args.kl > 0}
    memory = {
        "checkpointing": args.gradient_checkpointing,
        "tiling": args.vae_tiling,
        "sharded": args.fsdp,
        "nf4": args.nf4,
    }
    memory |= {"compiled": args.compile, "text_offload": args.text_offload, "text_cache": args.text_cache}
    policy = load_policy(dtype=dtypes[args.dtype], device=accelerator.device, **trained, **memory)
    if args.text_offload:
        mine = [p for i in range(args.iterations) for p in own_prompts(args, accelerator, prompts, i)]
        policy.remember([*dict.fromkeys(mine), *heldout[: args.eval_size + accelerator.num_processes]])
    run = Run(args, accelerator, policy, prompts, heldout, rewards, weights)
    optimizer = torch.optim.AdamW(policy.trainable(), lr=args.lr, weight_decay=args.weight_decay)
    run.ema = EMAModel(policy.trainable(), decay=args.ema, min_decay=args.ema) if args.ema else None  # no warm-up
    if not args.fsdp:
        policy.transformer = accelerator.prepare(policy.transformer)
    run.optimizer = accelerator.prepare(optimizer)
    return run
