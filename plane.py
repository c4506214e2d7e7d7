"""A policy in the plane: a model, data and a reward so small that the whole method can be drawn (toy.py).

Idea: a picture is a point here. The data are eight Gaussians on a circle, the velocity is a small MLP, and the reward
is high near one of the eight. To the other files this is a policy like FLUX or Wan, so rollout, credit, pruning,
objectives, schedules and steps are theirs, and so are the flags, where they mean the same.

1. Velocity, PlanePolicy   the MLP, and what a policy must offer (policy.py)
2. pretrain                flow matching on the data, the same for every seed, as a checkpoint would be
3. near                    the reward: a smooth bump around the mode that the prompt names
4. parse, prepare          flags, and a Run (checkpoint.py) that loop.iterate can train
5. evaluate, grown, learn  samples and a tree of the policy as it is; training, with both along the way

Direction of time: as in sde.py. sigma = 1 is noise, sigma = 0 the data.
"""

import copy
import math
import sys
from functools import lru_cache

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

import flags
import loop
from branchgrpo import Rollout, Sampler, generators, rollout, sample_ode
from checkpoint import Run
from schedules import kept_edges, schedule_of
from tree import Forest

NAMES = ("east", "north-east", "north", "north-west", "west", "south-west", "south", "south-east")
CENTRES = 2 * torch.tensor([[math.cos(i * math.pi / 4), math.sin(i * math.pi / 4)] for i in range(8)])  # (8, 2)
SPREAD, BUMP = 0.2, 1.0  # standard deviation of a mode; width of the reward
TREE_KEY, TEST_KEY = 2**31 + 3, 2**31 + 4  # keys of noise that training never draws

DEFAULTS = {  # what the embedded models have in flags.py, for the plane
    name: flags.Default(value, value, "plane.py")
    for name, value in {
        **{"steps": 10, "shift": 1.0, "fusion_beta": 1.0, "adv_clip": 5.0, "clip": 1e-2, "kl": 0.0, "iterations": 100},
        **{"prompts_per_iteration": 8, "lr_end": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0, "ema": 0.0},
    }.items()
}
ETA = {"dance": 1.0, "flow": 0.7, "cps": 0.7}  # enough noise that a tree reaches other modes than its root's
FOLLOWS = {"method": "branchgrpo; branchgrpo-mix with --mix", "mix": "T/5, also where the flag is bare", "sde": "cps"}
FOLLOWS |= {
    "eta": ", ".join(f"{kind} {eta}" for kind, eta in ETA.items()),
    "lr": "2e-3",
    "depth_every": "it sweeps once",
}


# --------------------------------------------------------------------------------------------------- model and reward
class Velocity(torch.nn.Module):
    """v_theta(x, sigma): an MLP on the point, the noise level, and sines and cosines of the noise level."""

    def __init__(self, width: int = 64):
        super().__init__()
        sizes = [2 + 5, width, width, width]
        hidden = [layer for a, b in zip(sizes, sizes[1:]) for layer in (torch.nn.Linear(a, b), torch.nn.SiLU())]
        self.layers = torch.nn.Sequential(*hidden, torch.nn.Linear(width, 2))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """(B, 2) and (B,) -> (B, 2)."""
        waves = [f(k * math.pi * sigma) for k in (1, 2) for f in (torch.sin, torch.cos)]
        return self.layers(torch.cat([x, torch.stack([sigma, *waves], 1)], 1))


class PlanePolicy:
    """A policy like FLUX or Wan (policy.py) whose pictures are points. It does not look at its prompt."""

    latent_shape = (2,)

    def __init__(self, net: Velocity):
        self.transformer, self.untrained = net, copy.deepcopy(net)

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Conditioning, (P, 1): the number of the mode that is wanted."""
        return {"mode": torch.tensor([[float(NAMES.index(prompt))] for prompt in prompts])}

    def velocity(self, x: Tensor, sigma: Tensor, cond, reference: bool = False) -> Tensor:
        """v_theta, or with `reference` that of the pre-trained model, for the KL term."""
        return (self.untrained if reference else self.transformer)(x, sigma)

    def decode(self, x: Tensor) -> Tensor:
        """A latent is its own picture."""
        return x

    def trainable(self) -> list[torch.nn.Parameter]:
        """All weights."""
        return list(self.transformer.parameters())


def sample_data(n: int, generator: torch.Generator) -> Tensor:
    """(n, 2) points, each from one of the eight modes."""
    modes = torch.randint(8, (n,), generator=generator)
    return CENTRES[modes] + SPREAD * torch.randn(n, 2, generator=generator)


@lru_cache
def pretrain(steps: int = 2000, batch: int = 512) -> Velocity:
    """Flow matching: at x = (1 - sigma) x0 + sigma eps, regress the velocity on eps - x0. Some seconds."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Velocity()
    optimizer = torch.optim.Adam(net.parameters())
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - i / steps)  # falling, so that the last steps average the noise
        x0, eps = sample_data(batch, generator), torch.randn(batch, 2, generator=generator)
        sigma = torch.rand(batch, generator=generator)
        x = (1 - sigma[:, None]) * x0 + sigma[:, None] * eps
        loss = (net(x, sigma) - (eps - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def near(points: Tensor, prompts: list[str]) -> Tensor:
    """The reward, (B,) in [0, 1]: exp(-d^2 / (2 BUMP^2)), d the distance to the centre that the prompt names."""
    centres = CENTRES[[NAMES.index(prompt) for prompt in prompts]]
    return (-(points - centres).square().sum(1) / (2 * BUMP**2)).exp()


# ------------------------------------------------------------------------------------------------------------ training
def parse(argv: list[str]):
    """Flags of the plane: those of trees, steps, credit and optimisation, with the project's meaning.

    Raises:
        ValueError: one sentence, for flags that contradict each other.
    """
    description = "The whole method in two dimensions, drawn. What a flag leaves open is printed at the start."
    parser = flags.Parser(description=description, formatter_class=flags.Help, allow_abbrev=False)
    tree, steps, credit, optimisation, own = (
        flags.adder(parser.add_argument_group(title), DEFAULTS | FOLLOWS)
        for title in ("tree", "steps", "credit and loss", "optimisation", "toy")
    )
    flags.add_tree_flags(tree)
    flags.add_credit_flags(steps, credit)
    flags.add_optimisation_flags(optimisation)
    own("--seed", type=flags.FROM_ZERO, default=0, help="of the rollouts' noise; pre-training never changes")
    own("--mode", choices=NAMES, default="north-east", help="the mode that is rewarded")
    own("--out", default="runs/toy", help="folder of toy.png and toy.gif, with --gradient of toy_gradient.json")
    own("--gradient", action="store_true", help="measure noise and bias of each rule, instead of training")
    args = parser.parse_args(argv)

    # As flags.resolve does for models that are not embedded; kind of step and rates are the plane's own.
    for name, default in DEFAULTS.items():
        flags.fill(args, name, default.other, default.source)
    flags.resolve_tree(args, False, "")
    flags.fill(args, "sde", "cps", "plane.py")
    flags.fill(args, "eta", ETA[args.sde], "plane.py")
    flags.fill(args, "lr", 2e-3, "plane.py")
    flags.check_learning(args)
    if args.iterations < 1 or args.silent_prompts < 1:
        raise ValueError("in the plane --iterations must be at least 1, and --silent-prompts 1: there is one prompt")

    # What training asks of a run beside the flags above: one float32 process, one reward.
    args.micro_batch, args.tree_offload, args.dtype, args.reward_mix = 0, False, "fp32", "reward"
    return args


def prepare(args) -> Run:
    """A Run at iteration 0: the pre-trained policy, one prompt, one reward."""
    policy = PlanePolicy(copy.deepcopy(pretrain()))
    run = Run(args, Accelerator(cpu=True), policy, [args.mode], [args.mode], {"near": near}, {"near": 1.0})
    run.optimizer = torch.optim.AdamW(policy.trainable(), lr=args.lr, weight_decay=args.weight_decay)
    run.ema = EMAModel(policy.trainable(), decay=args.ema, min_decay=args.ema) if args.ema else None
    return run


@torch.no_grad()
def evaluate(run: Run, n: int = 2000) -> dict:
    """Samples by the ODE, from noises that are always the same.

    Returns:
        points (n, 2); reward, its mean over them; share, the fraction of them within three standard deviations of the
        wanted mode; evaluations of the model in training so far, rollout and trained rows; iteration.
    """
    prompts, noise = run.heldout * n, torch.randn(n, 2, generator=torch.Generator().manual_seed(TEST_KEY))
    with loop.averaged(run):
        points = sample_ode(run.policy, run.policy.encode(prompts), run.sampler(), noise)
    inside = (points - CENTRES[NAMES.index(prompts[0])]).norm(dim=1) < 3 * SPREAD
    document = {"points": points, "reward": near(points, prompts).mean().item(), "share": inside.float().mean().item()}
    return document | {"evaluations": sum(row["nfe"] for row in run.history), "iteration": run.iteration}


def grown(run: Run) -> tuple:
    """A tree of the policy as it is, with noise of its own.

    Returns:
        forest, rollout, advantages, kept edges, and of each split what its siblings share, see `shared_noise`.
    """
    args = run.args
    schedule = schedule_of(args, min(run.iteration, args.iterations - 1), run.history)
    sampler, noise = run.sampler(schedule.sigmas), generators(TREE_KEY, 0, range(1))
    out = rollout(run.policy, run.policy.encode(run.heldout), schedule.forest, sampler, noise)
    scores = {"near": near(out.latents[-1][0], run.heldout * schedule.forest.leaves)}
    _, ranking, advantages = loop.credit_leaves(run, out, schedule.forest, scores)
    keep = kept_edges(args, schedule, ranking, advantages)
    return (
        schedule.forest,
        out,
        advantages,
        keep,
        shared_noise(schedule.forest, out, sampler, *generators(TREE_KEY, 0, range(1))),
    )


def shared_noise(forest: Forest, out: Rollout, sampler: Sampler, generator) -> dict[int, tuple[Tensor, Tensor]]:
    """What the siblings of each split share (Eq. 2), in a tree of one prompt; `generator` is as it was before it grew.

    Returns:
        split step -> where its n_i nodes would go without noise, (n_i, 2), and where the shared part alone leads them,
        xi_0 / sqrt(1 + s^2) further in standard deviations.
    """
    # Draw the noises again, in the order of `rollout` and of `branch_noise`: the root's, each child's own, the shared.
    result = {}
    torch.randn(forest.roots, 2, generator=generator)
    for i in filter(forest.stochastic, range(forest.steps)):
        k, n, x = forest.children[i], forest.sizes[i], out.latents[i][0]
        own = torch.randn(n, k, 2, generator=generator)
        if k > 1 and math.isfinite(sampler.s):
            shared = torch.randn(n, 1, 2, generator=generator)

            # A child lies at mean + std xi_b, so the first one tells where the mean was.
            std = sampler.moments(torch.full((n,), i), x, torch.zeros_like(x))[1]  # (n, 1), whatever the velocity
            xi = ((shared + sampler.s * own) / math.sqrt(1 + sampler.s**2))[:, 0]  # (n, 2)
            start = out.latents[i + 1][0].unflatten(0, (n, k))[:, 0] - std * xi
            result[i] = start, start + std * shared[:, 0] / math.sqrt(1 + sampler.s**2)
    return result


def learn(run: Run, every: int = 5, trees: bool = False) -> list[dict]:
    """Train; return evaluations: before training, every so many iterations, after the last; with trees where asked."""
    args, stages = run.args, []
    for iteration in tqdm(range(args.iterations + 1), desc=args.method, file=sys.stderr):
        if iteration % every == 0 or iteration == args.iterations:
            stages.append(evaluate(run) | ({"tree": grown(run)} if trees else {}))
        if iteration < args.iterations:
            run.history.append(loop.iterate(run, iteration)[0])
            run.iteration = iteration + 1
    return stages
