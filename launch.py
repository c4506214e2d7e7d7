"""From flags to a finished run: what happens before and after training.

1. start      a script's main: errors of ours become one sentence and exit code 2; --plan only counts
2. main       processes, folder, rewards and policy, the last checkpoint; loop.train; pictures and the document
3. prepare    rewards, policy, optimiser and EMA from resolved options: a Run at iteration 0

Bad input is refused before anything long begins: flags before models are loaded, models before training.
"""

import json
import os
import shlex
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file

import hardware
import rewards as R
from branchgrpo import NonFinite
from checkpoint import Run, checkpoints, find_out, load_checkpoint, options_to_keep, whole_checkpoint
from disk import FolderLock, cannot_write, check_room, check_writable, write_durably
from flags import HERE, describe
from loop import Stopped, evaluate, keep_before, summary, train
from parallel import Lookout, check_metadata, together
from prompts import digest_of, drawn_prompts, own_prompts


def start(script: str, job, argv: list[str] | None, finish) -> None:
    """A script's main: what `job` makes of the flags is trained, or with --plan only counted.

    An error of ours is printed as one sentence, exit code 2. An error raised inside a library keeps its traceback:
    where it happened matters.
    """
    # A terminal that is not UTF-8 must not end a run over a prompt, nor a closed one over a progress bar.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = None
    try:
        args, *rest = job(argv)
        if args.plan:
            print(hardware.report(args))
        else:
            main(args, *rest, finish)
    except (KeyboardInterrupt, Stopped) as stopped:
        print(f"{script}: {where_it_stands(args)}", file=sys.stderr)
        sys.exit(143 if isinstance(stopped, Stopped) else 130)  # as if the signal had ended it
    except BrokenPipeError:  # whoever read the output has gone, as `| head -1` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (or Python would complain once more at its exit)
        print(f"{script}: nobody reads the output any more; {where_it_stands(args)}", file=sys.stderr)
        sys.exit(141)
    except (ValueError, NonFinite) as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if Path(raised_in).resolve().parent != HERE.resolve():
            raise
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)


def where_it_stands(args) -> str:
    """One line on a run that was stopped: what is kept of it, and how it goes on."""
    out = Path(args.out) if args is not None and args.out else None
    if out is None or not (out / "options.json").exists():
        return "stopped before the run began"
    try:
        kept = checkpoints(out)
    except ValueError as error:
        return f"stopped; {error}"
    where = f"{kept[-1].name} is the newest checkpoint" if kept else "no checkpoint was written yet"
    return f"stopped; {where}: the same flags with --resume={shlex.quote(str(out))} go on from there"


def make_accelerator(args) -> Accelerator:
    """accelerate's view of the processes and the device; --dtype alone decides about precision.

    Raises:
        ValueError: if a GPU is asked for and there is none, or accelerate would shard or compile on its own.
    """
    for flag, asked in (("--device cuda", args.device == "cuda"), ("--nf4", args.nf4)):
        if asked and not torch.cuda.is_available():
            raise ValueError(f"{flag}: no GPU was found")

    # Others wait while one process writes a large checkpoint, hence an hour. Buffers are constants, which DDP need not
    # send. The plugin is there because accelerate would take the steps of accumulation from the environment, and divide
    # every gradient by them.
    handlers = [
        InitProcessGroupKwargs(timeout=timedelta(hours=1)),
        DistributedDataParallelKwargs(broadcast_buffers=False),
    ]
    try:
        accelerator = Accelerator(
            cpu=args.device == "cpu" or not torch.cuda.is_available(),
            mixed_precision="no",
            kwargs_handlers=handlers,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    except (ValueError, ImportError) as error:  # half of torchrun's variables, or one that asks for what is not there
        reason = str(error).strip().splitlines()[0]
        advice = "start with torchrun, or unset RANK, LOCAL_RANK, WORLD_SIZE and ACCELERATE_..."
        raise ValueError(f"the processes cannot be set up ({reason}): {advice}") from error

    # `accelerate launch` can be configured to shard or compile, on top of what is done here.
    if accelerator.distributed_type in ("FSDP", "DEEPSPEED") or accelerator.state.dynamo_plugin.backend != "NO":
        raise ValueError("accelerate's own sharding and compilation must be off: here they are --fsdp and --compile")
    return accelerator


def check_same_options(args, prompts: list[str], heldout: list[str]) -> None:
    """Every process has the flags and prompts of the main one; with other ones it would train on silently, or hang.

    Raises:
        ValueError: on every process, naming the first flag that differs.
    """
    own = {name: value for name, value in vars(args).items() if name != "origin"}
    own["prompts"] = digest_of(prompts, heldout, own.pop("prompt_rewards", None))
    everyone = gather_object([own])
    for rank, options in enumerate(everyone):
        for name, value in options.items():
            if value != everyone[0][name]:
                flag = f"--{name.replace('_', '-')} {value}, and the main process {everyone[0][name]}"
                what = "other prompts" if name == "prompts" else flag
                raise ValueError(f"process {rank} was started with {what}: give all processes the same flags")


def claim_folder(
    args, accelerator: Accelerator, prompts: list[str], heldout: list[str]
) -> tuple[dict, FolderLock | None]:
    """The run's folder, checked before anything is loaded; a run that goes on holds it from here.

    Returns:
        what options.json is to hold, and on the main process of a run that goes on the lock.

    Raises:
        ValueError: on every process.
    """
    out, options, lock, error = None, {}, None, None
    try:
        if accelerator.is_main_process:
            if args.out:
                check_writable(Path(args.out))
            if args.text_cache:
                check_writable(Path(args.text_cache), "--text-cache")
            args.out = out = find_out(args)
            check_writable(Path(out))
            options = options_to_keep(args, prompts, heldout)
            lock = FolderLock(Path(out)) if args.resume is not None else None
    except ValueError as raised:
        error = raised
    together(error, ValueError)
    args.out, options = broadcast_object_list([out, options])
    return options, lock


def make_folder(run: Run, options: dict) -> FolderLock:
    """A new run's folder with its options, once everything has been loaded, so that a start that fails leaves nothing.

    Raises:
        ValueError: if another run has begun in it meanwhile, or it cannot be made.
    """
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(run.out)
        if (run.out / "options.json").exists():
            raise ValueError(f"--out {run.out} holds a run by now: name another folder")
        write_durably(run.out / "options.json", json.dumps(options, indent=1))
    except OSError as error:
        raise cannot_write(run.out, error) from error
    return lock


def bytes_to_keep(run: Run) -> float:
    """What the checkpoints and the model will take on the disk, with one checkpoint being written beside those kept."""
    trained = sum(weight.numel() for weight in run.policy.trainable())
    a_checkpoint = 4 * trained * (4 + bool(run.ema))  # float32: weights twice, two moments, the average
    parts = [part for part in run.policy.pipe.components.values() if isinstance(part, torch.nn.Module)]
    model = 4 * trained if run.args.lora else sum(w.numel() * w.element_size() for m in parts for w in m.parameters())
    return (run.args.keep + 1) * a_checkpoint + model


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
    lookout = Lookout() if accelerator.num_processes > 1 else None

    # One folder for all processes, as the main one names it. Options are compared with those of the other processes and
    # of a run to resume before anything is loaded.
    check_same_options(args, prompts, heldout)
    options, lock = claim_folder(args, accelerator, prompts, heldout)
    if main_process:
        print(describe(args, prompts, heldout), flush=True)
    run = prepare(args, accelerator, load_policy, shape, prompts, heldout)
    run.lookout = lookout
    run.at("model loaded")

    # The model is known by some values of each weight: with other weights under the same name a run would not go on.
    fingerprint, error = run.policy.fingerprint, None
    if options.setdefault("sha256-of-model", fingerprint) != fingerprint:
        error = f"--resume: the weights of --model {args.model} are not those that the run began with"
    together(error, ValueError)
    run.identity = options["run"]
    try:
        if main_process and args.resume is None:
            lock = make_folder(run, options)
        if main_process and run.iteration < args.iterations:
            check_room(run.out, bytes_to_keep(run), f"{args.keep} checkpoints, one being written, and the model")
    except ValueError as raised:
        error = raised
    together(error, ValueError)
    if not all(gather_object([(run.out / "options.json").exists()])):
        raise ValueError(f"--out {run.out} must be a folder that all processes share")

    # All processes load the checkpoint that the main one found whole.
    if args.resume is not None:
        resume(run, options)
    train(run)

    # The averaged weights, where EMA is on, are the trained model. The main process draws and saves alone, so it needs
    # all pieces of a sharded transformer.
    if run.ema:
        run.ema.copy_to(run.policy.trainable())
    run.policy.unshard(main_process)
    run.at("pictures and model")
    if main_process:
        finish(run)
        print(json.dumps(summary(run)))
    run.at("end")
    accelerator.wait_for_everyone()  # a node that leaves early may take the others' meeting point with it
    if lookout:
        lookout.close()
    if lock:
        lock.release()


def resume(run: Run, options: dict) -> None:
    """Go on from the newest whole checkpoint; without any, from the start.

    Raises:
        ValueError: on every process, if none is whole, or one holds what no run writes.
    """
    last, error = None, None
    try:
        if run.accelerator.is_main_process:
            last = whole_checkpoint(run.out, run.args.iterations)
            if last is not None:  # before anything of it is unpickled, on any process
                check_metadata(last / ".metadata")
            write_durably(run.out / "options.json", json.dumps(options, indent=1))
    except (ValueError, OSError) as raised:
        error = raised
    together(error, ValueError)
    last = broadcast_object_list([last])[0]
    if last is None:
        return

    # The pictures before training are needed at the end. If they were lost, the untrained weights, which are still
    # here, make them again.
    lost = None
    if run.accelerator.is_main_process:
        try:
            pictures = load_file(run.out / "before.safetensors")["pictures"]
            if pictures.shape[1] != 3 or pictures.ndim != 4:
                raise OSError("it holds no pictures")
        except (OSError, KeyError, IndexError, SafetensorError) as raised:
            lost = str(raised).splitlines()[0]
            print(f"{run.out}/before.safetensors is lost ({lost}): its pictures are made again", file=sys.stderr)
    if broadcast_object_list([lost])[0] is not None:
        keep_before(run, evaluate(run)[1])
    load_checkpoint(run, last)


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
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

    # Rewards first: they are tried on every prompt and on one blank picture before the policy is loaded.
    where = (args.reward_weights, accelerator.device, dtypes[args.reward_dtype])
    rate = vars(args).get("fps", R.DEFAULT.fps)  # pictures have none
    setup = R.Setup(*where, args.reward_offload, args.reward_batch, args.reward_question, rate)
    blank, every_prompt = torch.ones(1, *shape), [*prompts, *heldout]
    watched = R.watched_names(args.watch, every_prompt, video=blank.ndim == 5)
    by_prompt = R.own_weights(args.prompt_rewards, args.reward, watched)
    rewards, weights = R.load_rewards(args.reward, args.watch, every_prompt, blank, setup, by_prompt)

    policy = load_policy(
        dtype=dtypes[args.dtype],
        device=accelerator.device,
        guidance=args.guidance,
        lora=args.lora,
        lora_from=args.lora_from,
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
        every = (drawn_prompts(args, prompts, i, {}) for i in range(args.iterations))
        own = [prompt for drawn in every for prompt in own_prompts(accelerator, drawn)]
        own = prompts if args.silent_prompts < 1 else own  # then any of them may come
        policy.remember([*dict.fromkeys(own), *heldout[: args.eval_size + accelerator.num_processes]])

    # min_decay = decay switches diffusers' warm-up off: the average has
    # the decay that was asked for from the first step.
    run = Run(args, accelerator, policy, prompts, heldout, rewards, weights, own=by_prompt)

    # One kernel for all weights where there is one, which also saves AdamW's temporary. On the CPU it would change
    # the last bits of every result, so there it stays off.
    fused = accelerator.device.type == "cuda"
    optimizer = torch.optim.AdamW(policy.trainable(), lr=args.lr, weight_decay=args.weight_decay, fused=fused or None)
    run.ema = EMAModel(policy.trainable(), decay=args.ema, min_decay=args.ema) if args.ema else None

    run.scaler = torch.amp.GradScaler(accelerator.device.type) if args.dtype == "fp16" else None

    # DDP is accelerate's; with --fsdp the policy has sharded its transformer already.
    if not args.fsdp:
        policy.transformer = accelerator.prepare(policy.transformer)
    run.optimizer = accelerator.prepare(optimizer)
    return run
