"""What does the method cost beyond the model? Iteration time over bare model calls, and over one node at a time.

Question    How much time do tree, noise, credit and loss add to the transformer calls they need?
Hypothesis  Rollout at most 1.10 times the bare calls at the same batch shapes, training at most 1.15 times bare forward and
            backward (optimiser step included on our side only), an iteration at least 8 times faster than one node at a time.
Metric      Ratios of seconds, measured in turn in one process, median and range over repetitions.
Rule        The medians against the three bounds.

    python bench/overhead.py             # 2 minutes on 2 cores; the paper's tree: T = 20, splits 0,3,6,9, 16 leaves, all stochastic
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from tqdm import tqdm  # noqa: E402

from branchgrpo import Sampler, credit, gather, generators, prune, rollout, update  # noqa: E402
from policies import FluxPolicy, take_cond  # noqa: E402
from rewards import load_rewards, score  # noqa: E402
from sde import sigma_schedule  # noqa: E402
from tree import count, make_forest  # noqa: E402


def seconds(work) -> float:
    """Wall-clock of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bare_rollout(policy, cond, forest, micro_batch: int) -> None:
    """The rollout's transformer calls and nothing else: the same batch shapes on fixed inputs."""
    prompts = len(next(iter(cond.values())))
    with torch.no_grad():
        for n in forest.sizes[:-1]:
            for part in torch.arange(prompts * n).split(micro_batch):
                c = {k: v[:1].expand(len(part), *v.shape[1:]) for k, v in cond.items()}
                policy.velocity(torch.zeros(len(part), *policy.latent_shape), torch.full((len(part),), 0.5), c)


def bare_training(policy, cond, edges, micro_batch: int) -> None:
    """Forward and backward of every trained parent, at the update's batch shapes, with a plain sum as the loss."""
    for part in torch.arange(len(edges.x)).split(micro_batch):
        c = take_cond(cond, edges.prompt[part])
        policy.velocity(edges.x[part], edges.step[part] / 20 + 0.01, c).sum().backward()


def one_node_at_a_time(policy, cond, forest, prompts: list[str], rewards, optimizer) -> dict[str, float]:
    """The same forest as the published code walks it: batch 1 for calls, decoding, rewards, and edges instead of parents.

    Its own optimiser steps every 12 edges, as there; tree, noise, credit and loss are left out, in its favour. Returns
    the seconds of its model calls and of all the rest.
    """
    n, sigma = count(forest), torch.full((1,), 0.5)
    x = torch.zeros(1, *policy.latent_shape)
    calls = rest = 0.0
    for p, prompt in enumerate(prompts):
        c = {k: v[p : p + 1] for k, v in cond.items()}
        with torch.no_grad():
            calls += seconds(lambda c=c: [policy.velocity(x, sigma, c) for _ in range(n["forwards"])])
        for _ in range(forest.leaves):
            rest += seconds(lambda prompt=prompt: score(rewards, policy.decode(x), [prompt]))
        for edge in range(n["edges"]):
            calls += seconds(lambda c=c: policy.velocity(x, sigma, c).sum().backward())
            if edge % 12 == 11:
                rest += seconds(lambda: (optimizer.step(), optimizer.zero_grad()))
    return {"calls": calls, "all": calls + rest}


def main() -> None:
    """Measure in turn, print the table; the last line is the JSON document."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "tiny/flux"), help="a Flux checkpoint")
    parser.add_argument("--height", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=4, help="trees an iteration")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--repetitions", type=int, default=5)
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    policy = FluxPolicy.load(o.model, o.height, o.width)
    prompts = [f'red "WORD{i}"' for i in range(o.prompts)]
    cond = policy.encode(prompts)
    scorers, _ = load_rewards("ocr", "colour", prompts, torch.ones(1, 3, o.height, o.width))
    other = copy.deepcopy(policy)  # trained one node at a time, so that the measured policy stays as it is
    other_optimizer = torch.optim.AdamW(other.trainable(), lr=1e-6)
    forest = make_forest(20, 2, (0, 3, 6, 9))
    sampler = Sampler(sigma_schedule(20, 3.0), "dance", 0.3)
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.AdamW(policy.trainable(), lr=1e-6))
    o.clip, o.kl, o.max_grad_norm = 1e-4, 0.0, 1.0
    rewards = torch.rand(o.prompts, forest.leaves)

    def whole_training(out):
        fused, advantages = credit(out, forest, rewards, 1.0, 5.0)
        keep = prune(forest, fused, None, None)
        edges = gather(out, forest, keep, advantages, torch.arange(o.prompts), "path")
        update(policy, optimizer, accelerator, edges, cond, sampler, o)
        return edges

    def roll():
        return rollout(policy, cond, forest, sampler, generators(0, 0, range(o.prompts)), o.micro_batch)

    def decode_and_score(out):
        each = [p for p in prompts for _ in range(forest.leaves)]
        return score(scorers, policy.decode(out.latents[-1].flatten(0, 1)), each)

    out = roll()
    edges = whole_training(out)
    bare_rollout(policy, cond, forest, o.micro_batch)
    raw = {k: [] for k in ("rollout", "bare_rollout", "training", "bare_training", "decode_and_score")}
    raw |= {"one_node_calls": [], "one_node_all": []}
    for _ in tqdm(range(o.repetitions), desc="repetitions", file=sys.stderr):
        raw["rollout"].append(seconds(roll))
        raw["bare_rollout"].append(seconds(lambda: bare_rollout(policy, cond, forest, o.micro_batch)))
        raw["training"].append(seconds(lambda: whole_training(out)))
        raw["bare_training"].append(seconds(lambda: bare_training(policy, cond, edges, o.micro_batch)))
        raw["decode_and_score"].append(seconds(lambda: decode_and_score(out)))
        one = one_node_at_a_time(other, cond, forest, prompts, scorers, other_optimizer)
        raw["one_node_calls"].append(one["calls"])
        raw["one_node_all"].append(one["all"])
    r = {k: np.array(v) for k, v in raw.items()}
    ratios = {
        "rollout over bare calls": r["rollout"] / r["bare_rollout"],
        "training over bare forward and backward": r["training"] / r["bare_training"],
        "one node at a time, model calls": r["one_node_calls"] / (r["rollout"] + r["training"]),
        "one node at a time, iteration": r["one_node_all"] / (r["rollout"] + r["training"] + r["decode_and_score"]),
    }
    bounds = ("at most 1.10", "at most 1.15", "for comparison", "at least 8")
    for (name, values), bound in zip(ratios.items(), bounds):
        print(f"{name:<42} {np.median(values):6.2f}  [{values.min():.2f}, {values.max():.2f}]   {bound}")
    document = {"arguments": {k: v for k, v in vars(o).items() if k != "model"}, "seconds": raw}
    document["ratios"] = {k: float(np.median(v)) for k, v in ratios.items()}
    path = ROOT / "bench/results/overhead.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=1))
    print(json.dumps(document["ratios"]))


if __name__ == "__main__":
    main()
