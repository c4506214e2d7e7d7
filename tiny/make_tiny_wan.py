"""Makes the embedded default of train_video.py: a small, real Wan pipeline that moves coloured shapes, and its prompts.

    python tiny/make_tiny_wan.py             # writes tiny/wan, tiny/video_train.txt, tiny/video_heldout.txt

Everything about the result is Wan2.1's own format (WanPipeline, WanTransformer3DModel, AutoencoderKLWan with 8x spatial
and 4x temporal downsampling and 16 channels, a UMT5 text encoder, FlowMatchEulerDiscreteScheduler); only the widths are
small.

1. Data. A prompt is `a red circle moves left`, or `a red circle stays still`: one of eight colours, six shapes, five
   motions. A clip has 9 frames of 32 x 32 pixels: the shape, anti-aliased, on white, at 1.5 pixels per frame.
2. Held out. 48 of the 240 combinations are set aside. No colour, shape or motion is new in them, but each combination
   is.
3. Autoencoder. AutoencoderKLWan on random clips: mean squared error + absolute error, the shape and its rim weighted
   tenfold, + a small KL term, without sampling. Then the mean and std of each latent channel are written into its
   config, as Wan2.1 has them.
4. Flow. As in make_tiny_flux.py: sigma follows the shift-3 schedule, and the text encoder (one token per word) is
   trained jointly. One prompt in ten is emptied, so that classifier-free guidance works.
5. Stop early, on purpose: where there is something left to learn by RL.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.training_utils import EMAModel
from PIL import ImageColor
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from rewards import colour, motion, score  # noqa: E402
from tiny.make_tiny_flux import COLOURS, SHIFT, descend  # noqa: E402

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
MOTIONS = {
    "moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1), "stays still": (0, 0),
}  # fmt: skip
FRAMES, SIZE, RADIUS, STEP = 9, 32, 5.5, 1.5  # frames of a clip, pixels, pixels, pixels per frame
WORDS = ["<pad>", "</s>", "<unk>", "a", "an", *COLOURS, *SHAPES, *dict.fromkeys(" ".join(MOTIONS).split())]
TEXT_LENGTH = 8  # tokens: the longest prompt has 5 words and its end


# ---------------------------------------------------------------------------------------------------------------- data
def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the signed distance in pixels from the outline of a shape of RADIUS around the origin.

    It is negative inside. y points down, as in a picture.
    """
    a, b, r = abs(x), abs(y), RADIUS
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(a, b) - 0.85 * r
    if shape == "triangle":
        return np.maximum(0.866 * a - 0.5 * y, y) - 0.6 * r
    if shape == "diamond":
        return (a + b - 1.3 * r) / 2**0.5
    if shape == "cross":
        return np.minimum(np.maximum(a - r, b - 0.38 * r), np.maximum(b - r, a - 0.38 * r))
    return abs(np.hypot(x, y) - 0.75 * r) - 0.3 * r  # ring


def draw(colour: str, shape: str, moves: str, rng: random.Random) -> np.ndarray:
    """Draw a clip (F, 3, 32, 32) in [0, 1], F = 9; it starts anywhere from where the whole way stays in the picture."""
    # Where it may start: RADIUS + 1 pixels from every edge, and farther from an edge that it moves towards.
    way = np.array(MOTIONS[moves]) * STEP * (FRAMES - 1)
    low = RADIUS + 1 - np.minimum(way, 0)
    high = SIZE - RADIUS - 2 - np.maximum(way, 0)
    start = low + (high - low) * np.array([rng.random(), rng.random()])
    centre = start + way * np.linspace(0, 1, FRAMES)[:, None]  # (F, 2)

    # A pixel is ink by how far it lies inside the outline: 0.5 at the outline itself, and 0 or 1 half a pixel away.
    grid = np.arange(SIZE)
    x, y = grid - centre[:, 0, None, None], grid[:, None] - centre[:, 1, None, None]
    inside = np.clip(0.5 - distance(shape, x, y), 0, 1)[:, None]  # (F, 1, 32, 32)

    # On white paper, ink takes away what its colour lacks.
    ink = np.array(ImageColor.getrgb(colour)).reshape(1, 3, 1, 1) / 255
    return 1 - inside * (1 - ink)


def combinations(rng: random.Random, n_heldout: int) -> tuple[list[tuple], list[tuple]]:
    """Divide all (colour, shape, motion) into those to train on and `n_heldout` others, with every motion in turn."""
    heldout, by_motion = [], {m: [*itertools.product(COLOURS, SHAPES)] for m in MOTIONS}
    for i in range(n_heldout):
        moves = list(MOTIONS)[i % len(MOTIONS)]
        pair = rng.choice(by_motion[moves])
        by_motion[moves].remove(pair)
        heldout.append((*pair, moves))
    return [(*pair, m) for m, pairs in by_motion.items() for pair in pairs], heldout


def prompt(colour: str, shape: str, moves: str) -> str:
    """Write a combination as text: red, circle, moves left -> `a red circle moves left`."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape} {moves}"


def batch(rows: list[tuple], n: int, rng: random.Random) -> tuple[list[str], torch.Tensor]:
    """Draw n random prompts and their clips in [-1, 1], channels before frames as in Wan: (n, 3, F, 32, 32)."""
    chosen = rng.choices(rows, k=n)
    clips = torch.from_numpy(np.stack([draw(*row, rng) for row in chosen])).float()
    return [prompt(*row) for row in chosen], clips.transpose(1, 2) * 2 - 1


# --------------------------------------------------------------------------------------------------------------- models
def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token for each word that a prompt may have."""
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=TEXT_LENGTH, **special)


def build() -> WanPipeline:
    """Make a WanPipeline with random weights: 0.7M (VAE), 4.8M (transformer) and 0.3M (text) parameters."""
    text = {"vocab_size": len(WORDS), "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
    near = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 32}
    blocks = {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024}
    return WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=UMT5EncoderModel(UMT5Config(**text, **near, dropout_rate=0.0)),
        vae=AutoencoderKLWan(base_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        transformer=WanTransformer3DModel(**blocks, text_dim=128, freq_dim=64),
    )


def decode_unclamped(vae: AutoencoderKLWan, z: torch.Tensor) -> torch.Tensor:
    """Decode as `vae.decode` does, without its final clamp.

    White paper is where clips mostly are, and the clamp cuts it off: once too white, it would have no gradient.
    """
    # The decoder works on one group of frames after another, so its outputs are collected.
    parts: list[torch.Tensor] = []
    hook = vae.decoder.register_forward_hook(lambda module, inputs, output: parts.append(output))
    vae.decode(z)
    hook.remove()
    return torch.cat(parts, 2)


def train_vae(vae: AutoencoderKLWan, rows: list[tuple], rng: random.Random, steps: int) -> None:
    """Fit the autoencoder: loss = mean w (e^2 + 0.2 |e|) + 1e-6 KL(posterior || N(0, I)), e the decoded mean's error.

    w = 10 on the shape and around it, and 1 elsewhere: most pixels are white paper, and would rule the mean.
    """
    vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    bar = tqdm(range(steps), desc="autoencoder", file=sys.stderr)
    for step in bar:
        _, x = batch(rows, 8, rng)

        # Wan folds the first frame alone, then groups of four. A frame and one group teach most of it, in half the
        # time; only the last quarter of the steps has whole clips.
        x = x[:, :, : 5 if step < 0.75 * steps else FRAMES]
        posterior = vae.encode(x).latent_dist
        error = (decode_unclamped(vae, posterior.mean) - x).abs()

        # Max-pooling over 5 x 5 pixels makes the shape 2 pixels wider on each side.
        ink = (x.amin(1, keepdim=True) < 0.9).float()
        near = F.max_pool3d(ink, (1, 5, 5), stride=1, padding=(0, 2, 2))  # (n, 1, F, 32, 32)
        loss = ((1 + 9 * near) * (error**2 + 0.2 * error)).mean() + 1e-6 * posterior.kl().mean()
        descend(loss, vae, optimizer, schedule)
        bar.set_postfix(loss=f"{loss.item():.4f}")
    vae.eval()


@torch.no_grad()
def measure(vae: AutoencoderKLWan, rows: list[tuple], rng: random.Random) -> None:
    """Write each latent channel's mean and std into the config, as Wan2.1 has them.

    They are those of the posterior's mean. Its spread was never trained, since the autoencoder never sampled.
    """
    z = torch.cat([vae.encode(batch(rows, 32, rng)[1]).latent_dist.mean for _ in range(16)])
    vae.register_to_config(latents_mean=z.mean((0, 2, 3, 4)).tolist(), latents_std=z.std((0, 2, 3, 4)).tolist())


@torch.no_grad()
def encoded(pipe: WanPipeline, rows: list[tuple], rng: random.Random, n: int) -> tuple[list[str], torch.Tensor]:
    """Draw n random prompts, and encode their clips into normalised latents (n, 16, 3, 4, 4).

    This is done once, before training, since encoding costs more than a training step.
    """
    prompts, latents = [], []
    for _ in tqdm(range(n // 64), desc="encoding", file=sys.stderr):
        texts, x = batch(rows, 64, rng)
        prompts += texts
        latents.append(pipe.vae.encode(x).latent_dist.mean)

    # Each channel has its own mean and std.
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    return prompts, (torch.cat(latents) - mean) / std


def flow_loss(pipe: WanPipeline, prompts: list[str], x0: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Conditional flow matching: || v_theta(x_sigma, sigma, prompt) - (noise - x_0) ||^2, mean over all numbers.

    Args:
        pipe: whose transformer and text encoder are trained.
        prompts: n texts.
        x0: (n, 16, 3, 4, 4) clean, normalised latents.
        generator: draws noise and noise levels.
    """
    # A point on the straight line from x_0 to noise, at a level that is shifted as at inference.
    noise = torch.randn(x0.shape, generator=generator)
    u = torch.rand(len(x0), generator=generator)
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    x_sigma = torch.lerp(x0, noise, sigma.view(-1, 1, 1, 1, 1))

    # The velocity of that line is noise - x_0 at each of its points. Wan takes sigma times 1,000.
    states, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
    v = pipe.transformer(hidden_states=x_sigma, timestep=sigma * 1000, encoder_hidden_states=states, return_dict=False)[
        0
    ]
    return F.mse_loss(v, noise - x0)


def right(pipe: WanPipeline, prompts: list[str]) -> tuple[float, float]:
    """Return the fractions of prompts whose clip has the right colour, and the right motion: a reward above 0.8.

    Clips are drawn in 10 steps without guidance.
    """
    size = {"height": SIZE, "width": SIZE, "num_frames": FRAMES, "max_sequence_length": TEXT_LENGTH}
    generator = torch.Generator().manual_seed(0)
    sigmas = {"num_inference_steps": 10, "guidance_scale": 1.0, "output_type": "pt", "generator": generator}
    videos = pipe(prompts, **size, **sigmas).frames
    scores = score({"colour": colour, "motion": motion}, videos, prompts)
    return tuple((scores[k] > 0.8).float().mean().item() for k in ("colour", "motion"))


def train_flow(pipe: WanPipeline, rows: list[tuple], rng: random.Random, stop_at: float, seed: int) -> None:
    """Train transformer and text encoder together until the fraction `stop_at` of 100 clips moves as it should.

    The clips are drawn with the EMA weights, which are also the weights that remain in `pipe`.
    """
    pipe.set_progress_bar_config(disable=True)
    probe, (texts, latents) = [prompt(*row) for row in rng.sample(rows, 100)], encoded(pipe, rows, rng, 4096)
    modules = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder]).train()

    # The learning rate rises to 1e-3 in 100 steps and stays: nobody knows beforehand how many steps there will be.
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 100))
    ema = EMAModel(modules.parameters(), decay=0.995)

    shares, bar = (0.0, 0.0), tqdm(itertools.count(1), desc="flow", file=sys.stderr)
    for step in bar:
        # One prompt in ten is emptied: the model then learns what clips look like without a prompt, as guidance needs.
        chosen = rng.sample(range(len(texts)), 64)
        prompts = ["" if rng.random() < 0.1 else texts[i] for i in chosen]
        loss = flow_loss(pipe, prompts, latents[chosen], generator)
        descend(loss, modules, optimizer, schedule)
        ema.step(modules.parameters())

        # Every 50 steps: look. The weights of training are put aside meanwhile, and put back if it goes on.
        if step % 50 == 0:
            ema.store(modules.parameters())
            ema.copy_to(modules.parameters())
            shares = right(pipe, probe)
            if shares[1] >= stop_at:
                break
            ema.restore(modules.parameters())

        bar.set_postfix(loss=f"{loss.item():.4f}", colour=shares[0], motion=shares[1])
    modules.eval()


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# A tiny Wan that moves coloured shapes

`{command}` made this WanPipeline in {minutes:.0f} minutes on one core. It makes clips of 9 frames, 32 x 32 pixels, \
from prompts such as
`a red circle moves left`: colours {colours}; shapes {shapes}; {motions}. Shift 3, 10 steps, guidance 1.

Pre-training was stopped early on purpose: on 256 prompt-noise pairs of 48 held-out combinations of colour, shape and \
motion, the
mean motion reward is {motion:.3f} and the mean colour reward {colour:.3f}. What is left to learn is for \
reinforcement learning.

Parameters: {parameters}. Weights in half precision. Licence Apache-2.0, as the project; the training clips are
drawn on the fly.
"""


def main() -> None:
    """Make prompts, autoencoder, transformer and card; the same seed and versions give the same model."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "wan", help="folder of the pipeline; prompts go beside it")
    parser.add_argument("--vae-steps", type=int, default=4000, help="steps of 8 clips; half an hour on one core")
    parser.add_argument("--vae", type=Path, help="an autoencoder that step 3 made, to skip it")
    parser.add_argument("--stop-at", type=float, default=0.6, help="fraction of clips that move right; ends the flow")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    args = parser.parse_args()

    # Prompts. Each later stage has a stream of its own, so that a given --vae leaves the others as they were.
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    rows, heldout = combinations(random.Random(args.seed), 48)
    pipe = build()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("train", rows), ("heldout", heldout)):
        (args.out.parent / f"video_{name}.txt").write_text("".join(f"{prompt(*row)}\n" for row in chosen))

    # The autoencoder takes half an hour, so it is saved at once, and may be given next time.
    if args.vae:
        pipe.vae = AutoencoderKLWan.from_pretrained(args.vae)
    else:
        train_vae(pipe.vae, rows, random.Random(args.seed + 1), args.vae_steps)
        pipe.vae.save_pretrained(args.out / "vae")

    # The flow.
    measure(pipe.vae, rows, random.Random(args.seed + 3))
    train_flow(pipe, rows, random.Random(args.seed + 2), args.stop_at, args.seed)
    pipe.to(torch.float16).save_pretrained(args.out)

    # The card says what training will start from: the scores of the files that were written, in half precision.
    script = [sys.executable, str(HERE.parent / "train_video.py"), "--iterations", "0", "--model", str(args.out)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*script, "--out", folder], check=True, capture_output=True, text=True)
    scores = json.loads(done.stdout.splitlines()[-1])

    parts = {"VAE": pipe.vae, "transformer": pipe.transformer, "UMT5": pipe.text_encoder}
    card = CARD.format(
        command="python tiny/make_tiny_wan.py",
        minutes=(time.perf_counter() - began) / 60,
        colours=", ".join(COLOURS),
        shapes=", ".join(SHAPES),
        motions=", ".join(MOTIONS),
        motion=scores["motion_before"],
        colour=scores["colour_before"],
        parameters=", ".join(f"{k} {sum(p.numel() for p in m.parameters()):,}" for k, m in parts.items()),
    )
    (args.out / "README.md").write_text(card)
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
