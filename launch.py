"""From flags to a finished run: what happens before and after training.

1. start      a script's main: errors of ours become one sentence and exit code 2; --plan only counts
2. main       processes, folder, rewards and policy, the last checkpoint; loop.train; pictures and the document
3. prepare    rewards, policy, optimiser and EMA from resolved options: a Run at iteration 0

Bad input is refused before anything long begins: flags before models are loaded, models before training.
"""

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
    """A script's main: what `job` makes of the flags is trained, or with --plan only counted.

    An error of ours is printed as one sentence, exit code 2. An error raised inside a library keeps its traceback:
    where it happened matters.
    """
    try:
        args, *rest = job(argv)
        if args.plan:
            print(hardware.report(args))
        else:
            main(args, *rest, finish)
    except (ValueError, NonFinite) as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if Path(raised_in).resolve().parent != HERE.resolve():
            raise
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)


def make_accelerator(args) -> Accelerator:
    """accelerate's view of the processes and the device; --dtype alone decides about precision.

    Raises:
        ValueError: if a GPU is asked for and there is none, or accelerate would shard or compile on its own.
    """
    for flag, asked in (("--device cuda", args.device == "cuda"), ("--nf4", args.nf4)):
        if asked and not torch.cuda.is_available():
            raise ValueError(f"{flag}: no GPU was found")

    # Others wait while one process writes a large checkpoint, hence an
    # hour. Buffers are constants: DDP need not send them.
    handlers = [
        InitProcessGroupKwargs(timeout=timedelta(hours=1)),
        DistributedDataParallelKwargs(broadcast_buffers=False),
    ]
    cpu = args.device == "cpu" or not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=handlers)

    # `accelerate launch` can be configured to shard or compile, on top of what is done here.
    if accelerator.distributed_type in ("FSDP", "DEEPSPEED") or accelerator.state.dynamo_plugin.backend != "NO":
        raise ValueError("accelerate's own sharding and compilation must be off: here they are --fsdp and --compile")
    return accelerator


def main(args, load_policy, shape: tuple[int, ...], prompts: list[str], heldout: list[str], finish) -> None:
    """A whole run from resolved options: rewards, policy, loop, pictures; prints the counts first, the document last.

    Args:
        load_policy, shape, prompts, heldout: see `prepare`.
        finish: called with the Run at the end, on the main process; writes what people look at.

    Raises:
        ValueError: before any long work, one sentence; NonFinite or CannotScore in the loop.
    """
    accelerator = make_accelerator(args)
    main_process = accelerator.is_main_process

    # One folder for all processes, as the main one names it. Options are compared with a run to resume before loading.
    args.out = broadcast_object_list([find_out(args) if main_process else None])[0]
    if main_process:
        options = options_to_keep(args, prompts, heldout)
        print(describe(args, prompts, heldout), flush=True)
    run = prepare(args, accelerator, load_policy, shape, prompts, heldout)

    # The folder is made once everything has been loaded, so that a start that fails leaves nothing behind.
    if main_process and args.resume is None:
        run.out.mkdir(parents=True, exist_ok=True)
        (run.out / ".options").write_text(options)
        os.replace(run.out / ".options", run.out / "options.json")
    accelerator.wait_for_everyone()
    if not all(gather_object([(run.out / "options.json").exists()])):
        raise ValueError(f"--out {run.out} must be a folder that all processes share")

    # All processes load the checkpoint that the main one sees last.
    last = broadcast_object_list([["", *map(str, checkpoints(run.out))][-1]])[0]
    if args.resume is not None and last:
        load_checkpoint(run, Path(last))
    train(run)

    # The averaged weights, where EMA is on, are the trained model. The main process draws and saves alone, so it needs
    # all pieces of a sharded transformer.
    if run.ema:
        run.ema.copy_to(run.policy.trainable())
    run.policy.unshard(main_process)
    if main_process:
        finish(run)
        print(json.dumps(summary(run)))
    accelerator.wait_for_everyone()  # a node that leaves early may take the others' meeting point with it


def check_processes(args, accelerator: Accelerator) -> None:
    """The processes can share the prompts and the optimiser steps evenly, so that each makes the same calls.

    Raises:
        ValueError: if --fsdp has no other process, or a number does not divide.
    """
    if args.fsdp and not torch.distributed.is_initialized():
        raise ValueError("--fsdp splits the model over processes: start it with torchrun")

    n, wanted = accelerator.num_processes, "processes"
    if args.updates_by == "prompts":
        n, wanted = n * args.updates, "processes x --updates"
    if args.prompts_per_iteration % n:
        raise ValueError(f"--prompts-per-iteration must be a multiple of {wanted} = {n}")


def prepare(args, accelerator: Accelerator, load_policy, shape: tuple[int, ...], prompts, heldout) -> Run:
    """Rewards, policy, optimiser and EMA from resolved options: a Run at iteration 0.

    Args:
        load_policy: called with dtype, device, guidance, lora, keep_reference, checkpointing, tiling; see policy.py.
        shape: of one picture or video.
        prompts, heldout: from prompts.load_prompts.

    Raises:
        ValueError: if the processes do not share the prompts evenly, or rewards or policy cannot be loaded.
    """
    check_processes(args, accelerator)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}

    # Rewards first: they are tried on every prompt and on one blank picture before the policy is loaded.
    reward_dtype = dtypes[args.reward_dtype]
    setup = R.Setup(args.reward_weights, accelerator.device, reward_dtype, args.reward_offload, args.reward_batch)
    rewards, weights = R.load_rewards(args.reward, args.watch, [*prompts, *heldout], torch.ones(1, *shape), setup)

    policy = load_policy(
        dtype=dtypes[args.dtype],
        device=accelerator.device,
        guidance=args.guidance,
        lora=args.lora,
        keep_reference=args.kl > 0,
        checkpointing=args.gradient_checkpointing,
        tiling=args.vae_tiling,
        sharded=args.fsdp,
        nf4=args.nf4,
        compiled=args.compile,
        text_offload=args.text_offload,
        text_cache=args.text_cache,
    )

    # With --text-offload the text encoders visit the device once: all
    # prompts that this process will need are encoded now.
    if args.text_offload:
        own = [prompt for i in range(args.iterations) for prompt in own_prompts(args, accelerator, prompts, i)]
        policy.remember([*dict.fromkeys(own), *heldout[: args.eval_size + accelerator.num_processes]])

    # min_decay = decay switches diffusers' warm-up off: the average has
    # the decay that was asked for from the first step.
    run = Run(args, accelerator, policy, prompts, heldout, rewards, weights)
    optimizer = torch.optim.AdamW(policy.trainable(), lr=args.lr, weight_decay=args.weight_decay)
    run.ema = EMAModel(policy.trainable(), decay=args.ema, min_decay=args.ema) if args.ema else None

    # DDP is accelerate's; with --fsdp the policy has sharded its transformer already.
    if not args.fsdp:
        policy.transformer = accelerator.prepare(policy.transformer)
    run.optimizer = accelerator.prepare(optimizer)
    return run
