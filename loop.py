"""The training loop that images and video share.

Each iteration: 1. take the next prompts, 2. roll out their forests, 3. decode the leaves and score them, 4. credit and prune,
5. update, 6. log; now and then evaluate on held-out prompts (ODE, fixed noise) and save a checkpoint.

Everything random is keyed by (seed, iteration, prompt slot), so a killed run resumes bit for bit on the CPU, and but for
rounding the result does not depend on the number of processes. Direction of time: as in sde.py.
"""

import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import rewards as R
from branchgrpo import Rollout, credit, flatten_edges, generators, prune, rollout, sample_ode, update
from checkpoint import Log, Run, save_checkpoint
from prompts import own_prompts
from schedules import schedule_of
from tree import Forest, count, effective_leaves

EVAL_KEY = 2**31  # the held-out noises are the same for every seed: runs are paired


# --------------------------------------------------------------------------------------------------------- checkpoints


# ---------------------------------------------------------------------------------------------------------- evaluation
def score(run: Run, pictures: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """`rewards.score` of this process's pictures.

    Raises:
        CannotScore: on every process at once: one that stopped alone would leave the others waiting.
    """
    scores, failed = {}, None
    try:
        scores = R.score(run.rewards, pictures, prompts)
    except R.CannotScore as error:
        failed = str(error)
    for why in filter(None, gather_object([failed])):
        raise R.CannotScore(why)
    return scores


@torch.no_grad()
def generate(run: Run, numbers: range) -> tuple[list[str], dict[str, Tensor], Tensor]:
    """Held-out prompts and noises of these numbers, ODE, EMA weights where EMA is on: prompts, scores (n,), pictures (n, ...)."""
    args, acc = run.args, run.accelerator
    prompts = [run.heldout[i % len(run.heldout)] for i in numbers]
    if run.ema:
        run.ema.store(run.policy.trainable())
        run.ema.copy_to(run.policy.trainable())
    noise = torch.stack([torch.randn(run.policy.latent_shape, generator=g) for g in generators(EVAL_KEY, 0, numbers)])
    cond = run.policy.encode(prompts)
    latents = sample_ode(run.policy, cond, run.sampler(), noise.to(acc.device), args.micro_batch)
    if run.ema:
        run.ema.restore(run.policy.trainable())
    pictures = run.policy.decode(latents)
    return prompts, score(run, pictures, prompts), pictures


def evaluate(run: Run, show: int = 24) -> tuple[dict[str, float], Tensor]:
    """`--eval-size` held-out prompt-noise pairs, always the same.

    Returns:
        means (heldout_reward, heldout_exact, heldout_NAME), and the first `show` pictures (show, 3, H, W). heldout_exact is
        the share of pictures whose ocr score is 1, absent without ocr.
    """
    acc, size = run.accelerator, run.args.eval_size
    share = -(-size // acc.num_processes)  # of each process alike: the last may walk a few numbers too many
    numbers = range(acc.process_index * share, (acc.process_index + 1) * share)
    _, scores, pictures = generate(run, numbers)
    rows = gather_object([{name: float(scores[name][j]) for name in scores} for j, i in enumerate(numbers) if i < size])
    means = {name: float(np.mean([row[name] for row in rows])) for name in scores}
    shown = acc.gather((pictures[:show] * 255).round().byte().to(acc.device))[: min(show, size)].cpu() / 255
    result = {"heldout_reward": sum(w * means[name] for name, w in run.weights.items())}
    if "ocr" in means:
        result["heldout_exact"] = float(np.mean([row["ocr"] == 1 for row in rows]))
    return result | {f"heldout_{name}": value for name, value in means.items()}, shown


# ----------------------------------------------------------------------------------------------------------- iteration


def strip(pictures: Tensor, n: int = 3) -> Tensor:
    """Videos (B, F, 3, H, W) as n of their frames side by side, (B, 3, H, n W); pictures (B, 3, H, W) as they are."""
    return pictures if pictures.ndim == 4 else R.sampled_frames(pictures, n).permute(0, 2, 3, 1, 4).flatten(3)


def stopwatch(device: torch.device):
    """A function that returns the seconds since it was last called, the device's queue drained."""
    last = time.perf_counter()

    def lap() -> float:
        nonlocal last
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        before, last = last, time.perf_counter()
        return last - before

    return lap


def peak_gib(device: torch.device) -> float:
    """The most memory this process ever held, GiB: of the GPU, or without one its resident set (Linux, macOS)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if (status := Path("/proc/self/status")).exists():  # getrusage's starts at that of the process it was forked from
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def credit_leaves(run: Run, out: Rollout, forest: Forest, scores: dict[str, Tensor]) -> tuple[Tensor, list, list]:
    """The weighted rewards (P, leaves), and credit from them: fused rewards, which pruning ranks, and advantages.

    --reward-mix reward: the credit of the weighted sum of rewards. advantage: the weighted sum of each reward's own
    advantages, clipped again, so that no reward wins by its scale; leaves are then ranked by their sum.
    """
    args, each = run.args, {name: s.unflatten(0, (-1, forest.leaves)) for name, s in scores.items()}  # (P, leaves)
    rewards = R.weighted_sum(each, run.weights)
    how = (args.fusion_beta, args.adv_clip, args.advantage == "group")
    if args.reward_mix == "reward":
        return rewards, rewards, credit(out, forest, rewards, *how)
    parts = [(w, credit(out, forest, each[name], *how)) for name, w in run.weights.items()]
    summed = [sum(w * a[i] for w, a in parts).clamp(-args.adv_clip, args.adv_clip) for i in range(forest.steps)]
    return rewards, summed[-1], summed


def iterate(run: Run, iteration: int) -> tuple[dict, dict[str, Tensor]]:
    """One iteration: roll out, score, credit, prune, update; returns its row of metrics, and what histograms show."""
    args, acc, policy = run.args, run.accelerator, run.policy
    schedule, lap = schedule_of(args, iteration), stopwatch(acc.device)
    sampler, forest, prompts = (
        run.sampler(schedule.sigmas),
        schedule.forest,
        own_prompts(args, acc, run.prompts, iteration),
    )
    slots = range(args.prompts_per_iteration)[acc.process_index :: acc.num_processes]
    cond = policy.encode(prompts)
    store = "cpu" if args.tree_offload else None
    out = rollout(policy, cond, forest, sampler, generators(args.seed, iteration, slots), args.micro_batch, store=store)
    row = {"seconds_rollout": lap()}
    pictures = policy.decode(out.latents[-1].flatten(0, 1))
    row["seconds_decode"] = lap()
    scores = score(run, pictures, [p for p in prompts for _ in range(forest.leaves)])
    row["seconds_reward"] = lap()

    leaf_rewards, ranking, advantages = credit_leaves(run, out, forest, scores)
    keep = prune(forest, ranking, args.width_prune, schedule.depth, schedule.trained_steps)
    row["lr"] = args.lr * (1 - (1 - args.lr_end) * iteration / args.iterations)
    for group in run.optimizer.param_groups:
        group["lr"] = row["lr"]
    stats = []
    for part in torch.arange(len(prompts)).chunk(args.updates):
        edges = flatten_edges(out, forest, keep, advantages, part, args.loss_weight, schedule.step_weight)
        stats.append(update(policy, run.optimizer, acc, edges, cond, sampler, args))
        if run.ema:
            run.ema.step(policy.trainable())
    row["seconds_train"] = lap()

    counts = count(forest, keep)
    everywhere = acc.gather(leaf_rewards.to(acc.device))
    row |= {k: float(np.mean([s[k] for s in stats])) for k in stats[0]} | {"ratio_dev": stats[0]["ratio_dev"]}
    row |= {
        "reward_mean": everywhere.mean().item(),
        "reward_std": everywhere.std(1, correction=0).mean().item(),
        "effective_leaves": effective_leaves(out.path_logp(forest), forest, args.fusion_beta).mean().item(),
        "leaves": forest.leaves,
        "trained_edges": counts["trainable"] * args.prompts_per_iteration,
        "nfe": (counts["forwards"] + counts["trained_parents"]) * args.prompts_per_iteration,
        "peak_gib": peak_gib(acc.device),
    }
    row |= {f"reward_{name}": acc.gather(s.to(acc.device)).mean().item() for name, s in scores.items()}
    return row, {"leaf_rewards": leaf_rewards, "advantages": torch.cat(advantages, 1)}


# ---------------------------------------------------------------------------------------------------------------- runs


def train(run: Run) -> None:
    """All iterations that are left; evaluates first, at every --eval-every, and last; saves at --save-every and last.

    Raises:
        NonFinite, CannotScore: the run stops; the last good checkpoint stays.
    """
    args, log = run.args, Log(run)
    if not run.history:
        lap = stopwatch(run.accelerator.device)
        scores, run.pictures = evaluate(run)
        log.write({"iteration": 0, **scores, "seconds_eval": lap()}, strip(run.pictures))
        if run.accelerator.is_main_process:
            save_file({"pictures": run.pictures.contiguous()}, run.out / "before.safetensors")
    bar = tqdm(total=args.iterations, initial=run.iteration, desc=args.method, file=sys.stderr, disable=not log.main)
    held = [r["heldout_reward"] for r in run.history if "heldout_reward" in r][-1]
    for iteration in range(run.iteration, args.iterations):
        row, histograms = iterate(run, iteration)
        row, pictures = {"iteration": iteration + 1} | row, None
        run.iteration = iteration + 1
        last = run.iteration == args.iterations
        if last or run.iteration % args.eval_every == 0:
            lap = stopwatch(run.accelerator.device)
            scores, run.pictures = evaluate(run)
            pictures = strip(run.pictures)
            row |= scores | {"seconds_eval": lap()}
            held = scores["heldout_reward"]
        log.write(row, pictures, histograms)
        if last or run.iteration % args.save_every == 0:
            save_checkpoint(run)
        bar.set_postfix(reward=f"{row['reward_mean']:.3f}", heldout=f"{held:.3f}")
        bar.update()
    bar.close()
    if log.main:
        log.tracker.finish()
    if run.pictures is None:  # a finished run, resumed
        run.pictures = evaluate(run)[1]


def summary(run: Run) -> dict:
    """The final JSON document: held-out scores before and after, seconds, model evaluations, where the files are."""
    evaluated = [r for r in run.history if "heldout_reward" in r]
    first, last, rows = evaluated[0], evaluated[-1], run.history[1:]
    seconds = sum(v for r in run.history for k, v in r.items() if k.startswith("seconds_"))
    document = {"reward_before": first["heldout_reward"], "reward_after": last["heldout_reward"]}
    document |= {"exact_before": first.get("heldout_exact"), "exact_after": last.get("heldout_exact")}
    for name in run.rewards:
        document |= {f"{name}_before": first[f"heldout_{name}"], f"{name}_after": last[f"heldout_{name}"]}
    return document | {
        "seconds": round(seconds, 2),
        "nfe": sum(r["nfe"] for r in rows),
        "iterations": run.iteration,
        "leaves": rows[-1]["leaves"] if rows else run.args.leaves,
        "trained_edges": rows[-1]["trained_edges"] if rows else 0,
        "out": str(run.out),
    }
