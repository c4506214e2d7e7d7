"""Makes the embedded default: a small, real FLUX pipeline that draws short coloured words, and its prompts.

    python tiny/make_tiny_flux.py            # writes tiny/flux, tiny/prompts_train.txt, tiny/prompts_heldout.txt

Everything about the result is FLUX.1-dev's own format (FluxPipeline, FluxTransformer2DModel, AutoencoderKL with 8x
downsampling and 16 channels, CLIP and T5 text encoders, FlowMatchEulerDiscreteScheduler); only the widths are small.

1. Data. A prompt is `red "CAT"`: one of eight colours, 3 or 4 capital letters. The picture is 64 x 32 pixels: letters
   in cells of 12 pixels, in one of three faces of DejaVu Sans Mono (which matplotlib ships), on white. An image token
   is 16 pixels wide, so letters lie across tokens.
2. Held out. 256 strings are set aside first. A string that contains one of them, or is contained in one, is never
   drawn, neither in pre-training nor as an RL prompt. So the model must spell: it cannot have remembered.
3. Autoencoder. AutoencoderKL on random words: mean squared error + absolute error + a small KL term.
4. Flow. x_sigma = (1 - sigma) x_0 + sigma noise, and the network predicts v = noise - x_0. sigma = 1 is pure noise; it
   follows the shift-3 schedule of inference. The T5 (bytes) and CLIP (characters) encoders are trained jointly.
5. Stop early, on purpose: where there is something left to learn by RL.
"""

import argparse
import functools
import itertools
import json
import random
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import EMAModel
from PIL import Image, ImageColor, ImageDraw, ImageFont
from tqdm import tqdm
from transformers import ByT5Tokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from rewards import Ocr  # noqa: E402

COLOURS = ("red", "green", "blue", "orange", "purple", "black", "brown", "teal")
HEIGHT, WIDTH, CELL, FONT_SIZE = 32, 64, 12, 20  # pixels
LEFT, LENGTHS = 8, (3, 4)  # pixels before the first cell; letters of a word
FACES = ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique")  # matplotlib ships them
GUIDANCE = 3.5  # FLUX.1-dev's default; the tiny model has seen no other value
SHIFT = 3.0  # of the noise levels, in training and at inference
WORDS = """
    ace act add age air ant arm art ask axe bag bat bed bee big box boy bus buy cab cap car cat cow cry cup day
    dog dry ear egg elf end eye fan far fig fit fix fly fog fox fun gas gem get gum hat hen hot hub ice ink jam
    jar jet job joy key kid kit lab law leg lip log low mad map mix mud net new now nut oak oil old one owl pan
    pen pet pie pig pot ram rat raw red rib rim row rug sad saw sea sew shy sir sky son sum sun tap tax tea ten
    tie tin toe top toy tub two van vet wax web wet why win yes zap zoo able aqua baby ball band bank barn bear
    bell bird blue boat bold bone book bulb cake calm camp card cave chef city clay coat code coin cold cook
    cool corn crab crow cube dark dawn deer desk dice dish door down dune dusk dust echo edge epic face fact
    farm fast film fire fish five flag flow fork four free frog fuel game gate gift girl give glow goat gold
    good grid grow hand harp hawk heat hero high hill holy home hope horn hour idea iron jazz joke jump june
    keen keep kind king kite kiwi lake lamp leaf lime line lion long loud love luck luna milk mint moon nest
    note oval page palm park path peak pear pink play poem pond quiz rain ring rock root rose ruby sail salt
    sand seed ship shop silk sing snow soap song soup star swim taco tree tuna unit vase view vote wave west
    wild wind wing wolf wood word yarn year yoga zero zinc zone
""".upper().split()


# ---------------------------------------------------------------------------------------------------------------- data
@functools.cache
def load_face(face: str) -> ImageFont.FreeTypeFont:
    """Load a font file of matplotlib's, at the size that fills a cell; each is read once."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), f"fonts/ttf/{face}.ttf"), FONT_SIZE)


def draw(word: str, colour: str, face: str) -> np.ndarray:
    """Draw `word` in `colour`, one letter in the middle of each cell, from the left: returns (32, 64, 3) uint8."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(picture)

    # Cell i begins at LEFT + 12 i. "mm" puts the middle of the letter at the middle of the cell.
    for i, letter in enumerate(word):
        at = (LEFT + CELL * i + CELL / 2, HEIGHT / 2)
        pen.text(at, letter, ImageColor.getrgb(colour), load_face(face), anchor="mm")
    return np.asarray(picture)


def pieces(word: str) -> set[str]:
    """Return all substrings of at least three letters, the word itself included: "CATS" -> CAT, CATS, ATS."""
    return {word[a:b] for a in range(len(word)) for b in range(a + 3, len(word) + 1)}


class Words:
    """Random strings to train on: none contains a held-out one, and none is contained in one.

    Args:
        rng: draws letters, colours and faces. The order of its draws decides the data, so it must not change.
        heldout: the strings set aside.
    """

    def __init__(self, rng: random.Random, heldout: list[str]):
        self.rng, self.heldout = rng, set(heldout)
        self.inside = set().union(*map(pieces, heldout))  # every string that a held-out one contains

    def draw(self) -> str:
        """Draw 3 or 4 random capitals, again and again until the string is allowed."""
        while True:
            word = "".join(self.rng.choices(string.ascii_uppercase, k=self.rng.choice(LENGTHS)))
            if word not in self.inside and not pieces(word) & self.heldout:
                return word

    def batch(self, n: int) -> tuple[list[str], torch.Tensor]:
        """Draw n random prompts and their pictures in [-1, 1]: (n, 3, 32, 64)."""
        rows = [(self.draw(), self.rng.choice(COLOURS), self.rng.choice(FACES)) for _ in range(n)]
        pixels = torch.from_numpy(np.stack([draw(*row) for row in rows]))
        x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        return [f'{colour} "{word}"' for word, colour, _ in rows], x.contiguous(memory_format=torch.channels_last)


def choose_heldout(rng: random.Random, n: int) -> list[str]:
    """Draw n distinct strings of 3 or 4 letters: half English words, which read well in a figure, half random."""
    heldout = dict.fromkeys(rng.sample(WORDS, n // 2))
    while len(heldout) < n:
        heldout["".join(rng.choices(string.ascii_uppercase, k=rng.choice(LENGTHS)))] = None
    return list(heldout)


def write_prompts(words: Words, heldout: list[str], n_train: int, folder: Path) -> None:
    """Write prompts_heldout.txt and prompts_train.txt, one prompt per line, with the colours in turn.

    Training prompts have four letters, since most mistakes are made there.
    """
    # A dict keeps its order and holds every string once.
    train = {}
    while len(train) < n_train:
        word = words.draw()
        train |= {word: None} if len(word) == max(LENGTHS) else {}

    for name, strings in (("heldout", heldout), ("train", train)):
        lines = [f'{COLOURS[i % len(COLOURS)]} "{w}"\n' for i, w in enumerate(strings)]
        (folder / f"prompts_{name}.txt").write_text("".join(lines))


# --------------------------------------------------------------------------------------------------------------- models
def clip_tokenizer() -> CLIPTokenizer:
    """Make a CLIP tokenizer that knows single characters and no merges: a token is one character.

    A character inside a word and the same one at its end are two tokens, as CLIP has it.
    """
    characters = ["<|startoftext|>", "<|endoftext|>"]
    characters += [c + end for c in string.ascii_letters + string.digits + '"' for end in ("", "</w>")]
    return CLIPTokenizer({c: i for i, c in enumerate(characters)}, [], model_max_length=16)


def build() -> FluxPipeline:
    """Make a FluxPipeline with random weights: 0.7M (VAE), 2.7M (transformer) and 0.4M (text) parameters."""
    # The autoencoder: four levels of blocks halve the picture three times, to 4 x 8 cells of 16 channels.
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (16, 16, 32, 64), "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": 16}
    without = dict.fromkeys(("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"), False)

    # The transformer: 3 double and 3 single blocks of width 4 x 32. A token is 2 x 2 cells, so it has 64 numbers.
    depth = {"num_layers": 3, "num_single_layers": 3, "attention_head_dim": 32, "num_attention_heads": 4}
    joint = {"in_channels": 64, "joint_attention_dim": 128, "pooled_projection_dim": 64, "axes_dims_rope": (8, 12, 12)}

    # CLIP gives one vector per prompt, the T5 one vector per byte of it.
    tokenizer = clip_tokenizer()
    width = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": len(tokenizer)}
    clip = CLIPTextConfig(**width, **tokens, max_position_embeddings=16, projection_dim=64)
    width = {"vocab_size": 384, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
    near = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 32}
    t5 = T5Config(**width, **near, feed_forward_proj="gated-gelu", dropout_rate=0.0)

    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=AutoencoderKL(**blocks, **sizes, **without),
        transformer=FluxTransformer2DModel(**depth, **joint, guidance_embeds=True),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=ByT5Tokenizer(extra_ids=0, model_max_length=16),
    )


def descend(loss: torch.Tensor, module: torch.nn.Module, optimizer, schedule) -> None:
    """Take one step of the optimiser and of its schedule, with the gradient clipped to norm 1."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    schedule.step()


def train_vae(vae: AutoencoderKL, words: Words, steps: int) -> None:
    """Fit the autoencoder, then set its scaling and shift so that latents have mean 0 and std 1, as FLUX.1-dev does.

    loss = mean (y - x)^2 + 0.2 mean |y - x| + 1e-6 KL(posterior || N(0, I)), where y is the decoded sample. The
    absolute error keeps the edges of letters sharp; the KL term only keeps latents from growing.
    """
    vae.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    bar = tqdm(range(steps), desc="autoencoder", file=sys.stderr)
    for _ in bar:
        _, x = words.batch(16)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        loss = F.mse_loss(y, x) + 0.2 * F.l1_loss(y, x) + 1e-6 * posterior.kl().mean()
        descend(loss, vae, optimizer, schedule)
        bar.set_postfix(loss=f"{loss.item():.4f}")

    # Pipelines use latents (z - shift_factor) scaling_factor. They are measured on 512 pictures.
    vae.eval()
    with torch.no_grad():
        z = torch.cat([vae.encode(words.batch(64)[1]).latent_dist.sample() for _ in range(8)])
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())


def flow_loss(pipe: FluxPipeline, prompts: list[str], x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Conditional flow matching: || v_theta(x_sigma, sigma, prompt) - (noise - x_0) ||^2, mean over all numbers.

    Args:
        pipe: whose transformer and text encoders are trained.
        prompts: n texts.
        x: (n, 3, 32, 64) their pictures in [-1, 1].
        generator: draws noise and noise levels.
    """
    # The clean latent x_0, packed into 2 x 4 tokens of 64 numbers. The autoencoder stays as it is.
    with torch.no_grad():
        config = pipe.vae.config
        z = (pipe.vae.encode(x).latent_dist.mean - config.shift_factor) * config.scaling_factor
        n, c, h, w = z.shape
        x0 = pipe._pack_latents(z, n, c, h, w)  # (n, 8, 64)

    # A point on the straight line from x_0 to noise. The shift puts more of the levels near sigma = 1, where the walk
    # of inference spends more of its steps.
    noise = torch.randn(x0.shape, generator=generator)
    u = torch.rand(n, generator=generator)
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    x_sigma = torch.lerp(x0, noise, sigma.view(-1, 1, 1))

    # The velocity of that line is noise - x_0 at each of its points.
    embeds, pooled, text_ids = pipe.encode_prompt(prompts, None, max_sequence_length=16)
    v = pipe.transformer(
        hidden_states=x_sigma,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        timestep=sigma,
        guidance=torch.full((n,), GUIDANCE),
        img_ids=pipe._prepare_latent_image_ids(n, h // 2, w // 2, x.device, x0.dtype),
        txt_ids=text_ids,
        return_dict=False,
    )[0]
    return F.mse_loss(v, noise - x0)


def exact_match(pipe: FluxPipeline, prompts: list[str], ocr: Ocr) -> float:
    """Return the fraction of prompts whose picture, drawn in 10 steps, is read exactly."""
    size = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": 16, "generator": torch.Generator().manual_seed(0)}
    pictures = pipe(prompts, num_inference_steps=10, guidance_scale=GUIDANCE, output_type="pt", **size).images
    return (ocr(pictures, prompts) == 1).float().mean().item()


def train_flow(pipe: FluxPipeline, words: Words, stop_at: float, seed: int) -> None:
    """Train transformer and text encoders together until the fraction `stop_at` of 128 random words is read exactly.

    The words are drawn with the EMA weights, the average that is smoother than the weights of any one step. These are
    also the weights that remain in `pipe`.
    """
    pipe.set_progress_bar_config(disable=True)
    ocr, (probe, _) = Ocr(), words.batch(128)
    modules = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]).train()

    # The learning rate rises to 1e-3 in 100 steps and stays: nobody knows beforehand how many steps there will be.
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 100))
    ema = EMAModel(modules.parameters(), decay=0.995)

    exact, bar = 0.0, tqdm(itertools.count(1), desc="flow", file=sys.stderr)
    for step in bar:
        loss = flow_loss(pipe, *words.batch(64), generator)
        descend(loss, modules, optimizer, schedule)
        ema.step(modules.parameters())

        # Every 25 steps: look. The weights of training are put aside meanwhile, and put back if it goes on.
        if step % 25 == 0:
            ema.store(modules.parameters())
            ema.copy_to(modules.parameters())
            exact = exact_match(pipe, probe, ocr)
            if exact >= stop_at:
                break
            ema.restore(modules.parameters())

        bar.set_postfix(loss=f"{loss.item():.4f}", exact=f"{exact:.3f}")
    modules.eval()


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# A tiny FLUX that spells

`{command}` made this FluxPipeline in {minutes:.0f} minutes on one core. It draws words of 3 or 4 capitals, \
64 x 32 pixels,
from prompts such as `red "CAT"`, in {colours}; guidance 3.5, shift 3, 10 steps.

Pre-training was stopped early on purpose: on 256 held-out prompts, whose strings neither contain nor are contained in \
a string
that was trained on, {exact:.1%} of the words are read exactly by PP-OCRv6 (mean ocr reward {ocr:.3f}, \
colour {colour:.3f}).
What is left to learn is for reinforcement learning.

Parameters: {parameters}. Weights in half precision. Licence Apache-2.0, as the project. \
Training pictures are drawn on the fly
with DejaVu Sans Mono, its bold and its oblique, from matplotlib (Bitstream Vera and DejaVu licence, free to use).
"""


def main() -> None:
    """Make prompts, autoencoder, transformer and card; the same seed and versions give the same model."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "flux", help="folder of the pipeline; prompts go beside it")
    parser.add_argument("--vae-steps", type=int, default=2400, help="steps of 16 pictures; 4 minutes on one core")
    parser.add_argument("--stop-at", type=float, default=0.3, help="fraction of words right that ends pre-training")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    args = parser.parse_args()

    # Held-out strings come first, since they decide which others may be drawn. Python's generators draw strings,
    # colours and faces; torch's draws weights and noise.
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    heldout = choose_heldout(random.Random(args.seed), 256)
    words = Words(random.Random(args.seed + 1), heldout)
    pipe = build()
    args.out.mkdir(parents=True, exist_ok=True)
    write_prompts(words, heldout, 2048, args.out.parent)
    train_vae(pipe.vae, words, args.vae_steps)
    train_flow(pipe, words, args.stop_at, args.seed)
    pipe.to(torch.float16).save_pretrained(args.out)

    # The card says what training will start from: the scores of the files that were written, in half precision.
    script = [sys.executable, str(HERE.parent / "train_image.py"), "--iterations", "0", "--model", str(args.out)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*script, "--out", folder], check=True, capture_output=True, text=True)
    scores = json.loads(done.stdout.splitlines()[-1])

    parts = {"VAE": pipe.vae, "transformer": pipe.transformer, "CLIP": pipe.text_encoder, "T5": pipe.text_encoder_2}
    card = CARD.format(
        command="python tiny/make_tiny_flux.py",
        minutes=(time.perf_counter() - began) / 60,
        colours=", ".join(COLOURS),
        exact=scores["exact_before"],
        ocr=scores["ocr_before"],
        colour=scores["colour_before"],
        parameters=", ".join(f"{k} {sum(p.numel() for p in m.parameters()):,}" for k, m in parts.items()),
    )
    (args.out / "README.md").write_text(card)
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
