"""Rewards: a reward is a function of pictures and prompts to one float a picture; higher is better.

    reward(pictures, prompts) -> scores
    pictures  (B, 3, H, W) float in [0, 1], on any device;  prompts  B strings;  scores  (B,) float32 on the CPU

1. ocr               reads the picture as one line of text, compares with the text quoted in the prompt    [0, 1]
2. colour            ink colour against the first colour word of the prompt                                [0, 1]
3. jpeg, jpeg-large  size of the picture as JPEG in kB, small is good / large is good                      < 0 / > 0
4. hpsv2, pickscore, clip, aesthetic, imagereward   preference models, run by transformers from their official weights
5. motion, temporal  of videos (B, F, 3, H, W): optical flow against the prompt's direction; warping and flicker     [0, 1]

`python rewards.py list` says which are ready, `python rewards.py score --reward hpsv2 PICTURE --prompt TEXT` scores. That 4
equals the official packages is proven by `make reference`, in an environment of their own. Several at once, weighted and
summed: `--reward ocr:1,jpeg:0.1`. OCR cannot see colour, so a policy trained on it alone drifts from red to purple and from
black to brown: watch a second reward. To add one, write a function and name it in REWARDS; where it cannot score some prompts,
name in CHECKS what raises CannotScore on them.
"""

import argparse
import html
import io
import json
import math
import re
import shlex
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import cv2
import ftfy
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from PIL import Image, ImageColor
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertTokenizer, BlipTextModel, BlipVisionModel, CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
from transformers.utils import logging as transformers_logging

Reward = Callable[[Tensor, list[str]], Tensor]


class CannotScore(ValueError):
    """A picture or a prompt that a reward cannot score, or a score that is not a finite number."""


def to_uint8(pictures: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8, rounded: what a saved picture would hold."""
    return (pictures.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def sampled_frames(videos: Tensor, n: int = 3) -> Tensor:
    """(B, F, 3, H, W) -> n of the frames, evenly spread, the first and the last among them: (B, n, 3, H, W)."""
    return videos[:, torch.linspace(0, videos.shape[1] - 1, n).round().long()]


# ----------------------------------------------------------------------------------------------------------------- ocr
def quoted_text(prompt: str) -> str:
    """The text that the prompt asks for: what stands between its first pair of double quotes.

    Raises:
        ValueError: if nothing is quoted.
    """
    found = re.search(r'"([^"]+)"', prompt)
    if not found:
        raise CannotScore(f'the ocr reward needs a quoted text, as in red "CAT"; the prompt {prompt!r} has none')
    return found[1]


def normalise(text: str) -> str:
    """Case, spaces and full-width forms do not count, and 0 reads as O: on single letters no recogniser tells them apart."""
    return "".join(unicodedata.normalize("NFKC", text).split()).casefold().replace("0", "o")


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the least number of insertions, deletions and substitutions from a to b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


class Ocr:
    """Text accuracy, as in Flow-GRPO: 1 - edit distance / length of the quoted text, clipped to [0, 1]; 1 is exact.

    PP-OCRv6's recogniser (Apache-2.0, inside the rapidocr wheel), fed the whole picture as one line, resized to height 48.

    Raises:
        ValueError: when called with a picture taller than wide (no single line of text), or a prompt without quotes.
    """

    def __init__(self):
        from rapidocr import RapidOCR

        size = {
            "Rec.rec_img_shape": [3, 48, 48],
            "Rec.rec_batch_num": 8,
        }  # 48 wide at least, wider by aspect ratio; batches of 8 are the fastest on a CPU
        threads = {"EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads()}
        self.recogniser = RapidOCR(params={"Global.log_level": "critical", **size, **threads})._load_rec_model()

    def read(self, pictures: Tensor) -> list[str]:
        """The text that the recogniser sees in each picture, as it comes."""
        from rapidocr.ch_ppocr_rec import TextRecInput

        if pictures.shape[-2] > pictures.shape[-1]:
            size = f"{pictures.shape[-1]}x{pictures.shape[-2]}"
            raise CannotScore(f"the ocr reward reads one line of text: a picture of {size} is taller than wide")
        bgr = np.ascontiguousarray(to_uint8(pictures)[..., ::-1])
        return list(self.recogniser(TextRecInput(img=list(bgr))).txts)

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores in [0, 1]; see the class."""
        scores = []
        for seen, prompt in zip(self.read(pictures), prompts, strict=True):
            wanted = normalise(quoted_text(prompt))
            scores.append(max(0.0, 1 - edit_distance(normalise(seen), wanted) / len(wanted)))
        return torch.tensor(scores)


# -------------------------------------------------------------------------------------------------------------- colour
def wanted_colour(prompt: str) -> Tensor:
    """(3,) RGB in [0, 1] of the first CSS colour word outside quotes, from Pillow's table.

    Raises:
        ValueError: if the prompt names no colour.
    """
    for word in re.findall(r"[a-z]+", re.sub(r'"[^"]*"', " ", prompt.lower())):
        if word in ImageColor.colormap:
            return torch.tensor(ImageColor.getrgb(word)) / 255
    raise CannotScore(f'the colour reward needs a colour word, as in red "CAT"; the prompt {prompt!r} has none')


def colour(pictures: Tensor, prompts: list[str]) -> Tensor:
    """Colour fidelity: 1 - (d - 0.1)/0.9 clipped to [0, 1], d = ||ink - wanted|| in the RGB cube; white paper, 0 without ink.

    ink is the mean colour of the pixels, each weighted by how far past 1/2 its darkest channel lies from white, so that
    anti-aliased edges and faint stains do not count. Up to d = 0.1, twice what true renders miss, the score is exactly 1:
    where all leaves have the right colour a tie must stay a tie, since Eq. 4 blows any difference up to +-1.
    Red drawn purple scores .33, black drawn brown .35.
    """
    pixels = pictures.detach().float().clamp(0, 1).cpu().flatten(2)  # (B, 3, HW)
    weight = (0.5 - pixels.amin(1)).clamp(min=0)  # (B, HW)
    total = weight.sum(1)  # (B,)
    ink = (pixels * weight[:, None]).sum(2) / total.clamp(min=1e-6)[:, None]  # (B, 3)
    wanted = torch.stack([wanted_colour(p) for p in prompts])
    score = 1 - ((ink - wanted).norm(dim=1) - 0.1) / 0.9
    return torch.where(total > 0, score.clamp(0, 1), 0.0)


# ---------------------------------------------------------------------------------------------------------------- jpeg
def jpeg(pictures: Tensor, prompts: list[str]) -> Tensor:
    """Compressibility (DDPO): minus the size in kB (1,000 bytes) as a JPEG of quality 95; below 0, higher is smaller."""
    sizes = []
    for picture in to_uint8(pictures):
        Image.fromarray(picture).save(buffer := io.BytesIO(), "JPEG", quality=95)
        sizes.append(-buffer.tell() / 1000)
    return torch.tensor(sizes)


def jpeg_large(pictures: Tensor, prompts: list[str]) -> Tensor:
    """Incompressibility (DDPO): the size in kB as a JPEG of quality 95; above 0, higher is larger."""
    return -jpeg(pictures, prompts)


# --------------------------------------------------------------------------------------------------------------- video
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}  # x, y; y points down
SLOW = 0.005  # of the longer side, in a frame: less is no motion


def wanted_motion(prompt: str) -> np.ndarray:
    """(2,) the direction that the prompt names: the first of left, right, up, down, still.

    Raises:
        CannotScore: if it names none.
    """
    for word in re.findall(r"[a-z]+", prompt.lower()):
        if word in DIRECTIONS:
            return np.array(DIRECTIONS[word], dtype=float)
    raise CannotScore(f"the motion reward needs one of {', '.join(DIRECTIONS)}; the prompt {prompt!r} names none")


def optical_flow(video: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(F, 3, H, W) in [0, 1] -> its grey frames (F, H, W) uint8 and Farneback's flow between them, (F - 1, H, W, 2) pixels.

    Raises:
        CannotScore: if it is no video of at least two frames.
    """
    if video.ndim != 4 or len(video) < 2:
        raise CannotScore("this reward watches motion: it needs videos of two frames or more")
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in to_uint8(video)]
    window = max(9, min(grey[0].shape) // 4)  # of a whole object, or its flat inside hides the motion
    flow = [cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, window, 3, 5, 1.1, 0) for a, b in pairwise(grey)]
    moved = [not np.array_equal(a, b) for a, b in pairwise(grey)]  # between equal frames Farneback invents motion
    return np.stack(grey), np.stack([f * m for f, m in zip(flow, moved)])


def still_change(grey: np.ndarray, speed: np.ndarray, slow: float) -> float:
    """Mean absolute change, of 1, from frame to frame where nothing moves: flicker."""
    change = abs(np.diff(grey.astype(float), axis=0)) / 255
    return float(change[speed < slow].mean()) if (speed < slow).any() else 1.0


def motion(videos: Tensor, prompts: list[str]) -> Tensor:
    """Does the optical flow point where the prompt says, steadily, and is the rest still? (B, F, 3, H, W) -> [0, 1], 1 is best.

    direction x smooth x still, where u_t is the flow between two frames, averaged with its own length as weight:
    direction  mean_t cos(u_t, wanted), 0 where slower than SLOW; for `still`: 1 at rest, 0 from 4 SLOW on
    smooth     1 - mean_t |u_{t+1} - u_t| / (mean_t |u_t| + SLOW)
    still      1 - 10 x mean change where nothing moves
    Each is exactly 1 within a tenth (smooth: a fifth) of its best, so that ties stay ties, as with colour.
    """
    scores = []
    for video, prompt in zip(videos, prompts, strict=True):
        grey, flow = optical_flow(video)
        slow, speed = SLOW * max(video.shape[2:]), np.hypot(flow[..., 0], flow[..., 1])
        u = (flow * speed[..., None]).sum((1, 2)) / (speed.sum((1, 2))[:, None] + 1e-6)  # (F - 1, 2)
        fast, wanted = np.hypot(u[:, 0], u[:, 1]), wanted_motion(prompt)
        if wanted.any():
            direction = float(np.mean(np.where(fast > slow, u @ wanted / (fast + 1e-6), 0.0)))
        else:
            direction = 1 - float(fast.mean()) / (4 * slow)
        jerk = float(np.hypot(*np.diff(u, axis=0).T).mean()) if len(u) > 1 else 0.0
        smooth = 1 - jerk / (float(fast.mean()) + slow)
        still = 1 - 10 * still_change(grey, speed, slow)
        scores.append(min(1, max(0, direction) / 0.9) * min(1, max(0, smooth) / 0.8) * min(1, max(0, still) / 0.9))
    return torch.tensor(scores, dtype=torch.float32)


def temporal(videos: Tensor, prompts: list[str]) -> Tensor:
    """Consistency in time: 1 - 5 (warping error + flicker), clipped to [0, 1]; (B, F, 3, H, W), 1 is best.

    warping error  mean |frame t - frame t+1 moved back along the flow|;  flicker  mean change where nothing moves
    A frozen video scores 1: watch it beside motion, never alone.
    """
    scores = []
    for video in videos:
        grey, flow = optical_flow(video)
        rows, columns = np.indices(grey.shape[1:], dtype=np.float32)
        at = [(columns + f[..., 0], rows + f[..., 1]) for f in flow]
        back = [cv2.remap(g, *xy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) for g, xy in zip(grey[1:], at)]
        warping = float(abs(np.stack(back).astype(float) - grey[:-1]).mean()) / 255
        flicker = still_change(grey, np.hypot(flow[..., 0], flow[..., 1]), SLOW * max(video.shape[2:]))
        scores.append(min(1.0, max(0.0, 1 - 5 * (warping + flicker))))
    return torch.tensor(scores, dtype=torch.float32)


# ---------------------------------------------------------------------------------------- preference models: their weights
@dataclass(frozen=True)
class Setup:
    """How preference models are found and run.

    weights: a folder that holds REPOSITORY/FILE as the hub names them; what it lacks is looked up in the hub's own cache.
    dtype: of weights and activations; features are compared, and heads evaluated, in float32.
    offload: back to the CPU after every scoring. batch: the most pictures at a time.
    """

    weights: str | None = None
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32
    offload: bool = False
    batch: int = 32


CLIP_L, PICK, BERT = "openai/clip-vit-large-patch14", "yuvalkirstain/PickScore_v1", "google-bert/bert-base-uncased"
AESTHETIC = "christophschuhmann/improved-aesthetic-predictor"  # on GitHub, not on the hub
CLIP_FILES = ("model.safetensors", "config.json", "vocab.json", "merges.txt")
FILES = {  # reward -> official files as (repository, file), the model's weights first
    "hpsv2": [("xswu/HPSv2", "HPS_v2.1_compressed.pt"), (CLIP_L, "vocab.json"), (CLIP_L, "merges.txt")],
    "imagereward": [("THUDM/ImageReward", "ImageReward.pt"), (BERT, "vocab.txt")],
    "pickscore": [(PICK, file) for file in CLIP_FILES],
    "clip": [(CLIP_L, file) for file in CLIP_FILES],
    "aesthetic": [*((CLIP_L, file) for file in CLIP_FILES), (AESTHETIC, "sac+logos+ava1-l14-linearMSE.pth")],
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def locate(repository: str, file: str, folder: str | None) -> Path | None:
    """A weights file in the folder or in the hub's cache; None if it is in neither."""
    if folder and (path := Path(folder, repository, file)).is_file():
        return path
    cached = try_to_load_from_cache(repository, file)
    return Path(cached) if isinstance(cached, str) else None


def fetch_commands(name: str, missing: list[tuple[str, str]], folder: str | None) -> str:
    """The commands that bring a reward's missing files to where `locate` finds them, one for each repository."""
    commands = []
    for repository in dict.fromkeys(r for r, _ in missing):
        files = " ".join(shlex.quote(f) for r, f in missing if r == repository)
        if repository == AESTHETIC:
            where = shlex.quote(f"{folder or 'weights'}/{repository}/{files}")
            commands.append(f"curl -fL --create-dirs -o {where} https://github.com/{repository}/raw/main/{files}")
            commands += [] if folder else ["then give --reward-weights weights"]
        else:
            into = f" --local-dir {shlex.quote(f'{folder}/{repository}')}" if folder else ""
            commands.append(f"hf download {repository} {files}{into}")
    return " && ".join(commands)


def weight_files(name: str, setup: Setup) -> list[Path]:
    """Where a reward's files are, in the order of FILES.

    Raises:
        ValueError: naming the missing files and the commands that fetch them.
    """
    found = [locate(repository, file, setup.weights) for repository, file in FILES.get(name, ())]
    missing = [pair for pair, path in zip(FILES.get(name, ()), found) if path is None]
    if missing:
        files, fetch = ", ".join(file for _, file in missing), fetch_commands(name, missing, setup.weights)
        raise ValueError(f"the reward {name!r} lacks {files}; fetch with: {fetch}")
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors, .pt or .pth file.

    Raises:
        ValueError: if the file is truncated or no weights file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        if not all(isinstance(v, Tensor) for v in state.values()):
            raise TypeError("it holds more than tensors")
        return state
    except MemoryError:
        raise
    except Exception as error:  # on garbage, the readers of pickles and archives raise nearly anything
        raise ValueError(f"{path} is damaged or holds no weights ({type(error).__name__}): fetch it again") from error


def tokenizer(kind, size: int, vocabulary: Path, merges: Path | None = None):
    """A transformers tokenizer from its official files, of exactly `size` tokens.

    Raises:
        ValueError: if a file is damaged: a shorter vocabulary would score, and wrongly.
    """
    files = {"vocab": str(vocabulary)} | ({"merges": str(merges)} if merges else {})
    names = " or ".join(files.values())
    try:
        lines = sum(1 for line in (merges or vocabulary).read_text(encoding="utf-8").splitlines() if line)
        loaded = kind(**files)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"{names} is damaged ({type(error).__name__}): fetch it again") from error
    wanted = size - 2 * 256 - 2 + 1 if merges else size  # CLIP: bytes twice, two special tokens; a line of version
    if len(loaded) != size or lines != wanted:
        raise ValueError(f"{names} is damaged: {len(loaded)} tokens in {lines} lines, not {size}; fetch it again")
    return loaded


def build(kind, config, state: dict[str, Tensor], path: Path, dtype: torch.dtype, **kwargs):
    """A frozen transformers model with exactly these weights.

    Raises:
        ValueError: if a weight is missing, left over or of another shape, naming it.
    """
    with torch.device("meta"):
        wanted = {k: v.shape for k, v in kind(config, **kwargs).state_dict().items()}
    for key in sorted(wanted.keys() | state.keys()):
        if wanted.get(key) != (state[key].shape if key in state else None):
            raise ValueError(f"{path} does not fit {kind.__name__}: {key!r} is missing, left over or of another shape")
    transformers_logging.disable_progress_bar()
    model = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **kwargs)
    return model.eval().requires_grad_(False)


def linear_head(state: dict[str, Tensor], path: Path, width: int) -> torch.nn.Sequential:
    """The head that ImageReward and the aesthetic predictor share: five linear layers in a row, nothing between them.

    Raises:
        ValueError: if a weight is missing, left over or of another shape.
    """
    head = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in pairwise((width, 1024, 128, 64, 16, 1))))
    places = {"layers.0": "0", "layers.2": "1", "layers.4": "2", "layers.6": "3", "layers.7": "4"}  # between: dropout
    try:
        head.load_state_dict(
            {places.get(k.rpartition(".")[0], k) + "." + k.rpartition(".")[2]: v for k, v in state.items()}
        )
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold this head: {' '.join(str(error).split())}") from error
    return head.eval().requires_grad_(False)


def renamed(state: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """A state dict with every pattern of the table replaced in every key, in the table's order."""
    out = {}
    for key, value in state.items():
        for pattern, new in table.items():
            key = re.sub(pattern, new, key)
        out[key] = value
    return out


# ------------------------------------------------------------------------------------- the CLIP family: hpsv2, pickscore, clip
VIT_H = CLIPConfig(  # open_clip's ViT-H-14, 986M parameters
    text_config={"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    | {"hidden_act": "gelu", "projection_dim": 1024},
    vision_config={"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32}
    | {"patch_size": 14, "hidden_act": "gelu", "projection_dim": 1024},
    projection_dim=1024,
)
OPEN_CLIP = {  # open_clip's names -> transformers'
    r"^visual\.proj$": "visual_projection.weight",
    r"^text_projection$": "text_projection.weight",
    r"^visual\.": "vision_model.",
    r"^(token_embedding|positional_embedding|transformer|ln_final)": r"text_model.\1",
    r"transformer\.resblocks": "encoder.layers",
    r"\.(class_embedding|token_embedding)": r".embeddings.\1",
    r"\.positional_embedding": ".embeddings.position_embedding.weight",
    r"\.conv1\.": ".embeddings.patch_embedding.",
    r"\.ln_pre\.": ".pre_layrnorm.",
    r"\.ln_post\.": ".post_layernorm.",
    r"\.ln_final\.": ".final_layer_norm.",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.attn\.": ".self_attn.",
    r"\.c_fc\.": ".fc1.",
    r"\.c_proj\.": ".fc2.",
}


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's CLIP weights in transformers' names: projections transposed, queries, keys and values apart."""
    out = {}
    for key, value in renamed(state, OPEN_CLIP).items():
        if key.endswith("_projection.weight"):
            value = value.T.contiguous()
        if ".in_proj_" in key:
            parts = zip("qkv", value.chunk(3))
            out |= {key.replace("in_proj_", f"{n}_proj."): part.clone() for n, part in parts}
        else:
            out[key] = value
    return out


def square(pictures: np.ndarray, size: int, crop=round) -> Tensor:
    """CLIP's pre-processing: shorter side to `size` with Pillow's bicubic filter, centre crop; (B, H, W, 3) -> (B, 3, s, s).

    crop: how half a pixel is rounded, `round` in OpenAI's and open_clip's code, `math.floor` in transformers.
    """
    height, width = pictures.shape[1:3]
    short = min(height, width)
    h, w = (size if x == short else int(size * x / short) for x in (height, width))
    top, left = crop((h - size) / 2), crop((w - size) / 2)
    box = (left, top, left + size, top + size)
    resized = [Image.fromarray(p).resize((w, h), Image.BICUBIC) for p in pictures]  # a copy where nothing changes
    return torch.from_numpy(np.stack([np.asarray(p.crop(box)) for p in resized])).permute(0, 3, 1, 2).float() / 255


def padded(pictures: np.ndarray, size: int) -> Tensor:
    """HPSv2's pre-processing: longer side to `size` with a bicubic filter on tensors, black bars; (B, 3, s, s)."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    scale = size / max(x.shape[2:])
    h, w = (max(1, round(d * scale)) for d in x.shape[2:])
    if scale != 1:
        x = F.interpolate(x, (h, w), mode="bicubic", antialias=True, align_corners=False)
    top, left = (size - h) // 2, (size - w) // 2
    return F.pad(x, (left, size - w - left, top, size - h - top))


def clean(prompt: str) -> str:
    """What OpenAI's and open_clip's tokenizers do to a prompt first; a special token that it spells out is plain text."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip().lower()
    return re.sub(r"<\|(startoftext|endoftext)\|>", r"<| \1 |>", text)


class Scorer:
    """A frozen model on the policy's device, that scores pictures in batches and without gradients.

    A subclass sets `setup` and `models`, and has `scores(pictures (B, H, W, 3) uint8, prompts) -> (B,)`.
    """

    setup: Setup
    models: list[torch.nn.Module]

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """(B,) float32 scores on the CPU; see the class."""
        for model in self.models:
            model.to(self.setup.device)
        size = self.setup.batch
        parts = [
            self.scores(to_uint8(p), prompts[i * size : (i + 1) * size]) for i, p in enumerate(pictures.split(size))
        ]
        if self.setup.offload:
            for model in self.models:
                model.to("cpu")
        return torch.cat(parts).float().cpu()

    def pixels(self, x: Tensor) -> Tensor:
        """(B, 3, s, s) in [0, 1] -> normalised with CLIP's mean and std, on the device, in the dtype."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        return ((x - mean) / std).to(self.setup.device, self.setup.dtype)


class PickScore(Scorer):
    """PickScore v1: exp(logit scale) x cosine in a CLIP ViT-H-14 tuned on Pick-a-Pic; [-100, 100], in practice 17 to 25.

    Higher is preferred. 224 pixels, centre crop, pre-processed as its authors do, by transformers' rules. Weights
    yuvalkirstain/PickScore_v1 (MIT), arXiv:2305.01569. Papers that print .22 print the cosine. Hacked by: glossy, centred,
    over-detailed pictures.
    """

    name = "pickscore"
    preprocess, clean = staticmethod(partial(square, crop=math.floor)), staticmethod(str)

    def __init__(self, setup: Setup):
        self.setup, self.files = setup, weight_files(self.name, setup)
        config, state = self.read()
        self.model = build(CLIPModel, config, state, self.files[0], setup.dtype)
        self.models, self.scale = [self.model], state["logit_scale"].float().exp()
        at = {file: path for (_, file), path in zip(FILES[self.name], self.files)}
        self.tokenizer = tokenizer(CLIPTokenizer, config.text_config.vocab_size, at["vocab.json"], at["merges.txt"])

    def read(self) -> tuple[CLIPConfig, dict[str, Tensor]]:
        """Config and weights of a CLIP in transformers' own format."""
        state = {k: v for k, v in read_weights(self.files[0]).items() if not k.endswith("position_ids")}
        try:
            return CLIPConfig.from_json_file(self.files[1]), state
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.files[1]} is damaged: fetch it again") from error

    def image_features(self, pictures: np.ndarray) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, C) of length 1, float32."""
        x = self.preprocess(pictures, self.model.config.vision_config.image_size)
        return F.normalize(self.model.get_image_features(self.pixels(x)).pooler_output.float(), dim=-1)

    def text_features(self, prompts: list[str]) -> Tensor:
        """(B, C) of length 1, float32; equal prompts are encoded once."""
        distinct = list(dict.fromkeys(prompts))
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer([self.clean(p) for p in distinct], padding=True, truncation=True, max_length=length)
        ids = torch.tensor(ids["input_ids"], device=self.setup.device)
        features = F.normalize(self.model.get_text_features(ids).pooler_output.float(), dim=-1)
        return features[[distinct.index(p) for p in prompts]]

    def scores(self, pictures: np.ndarray, prompts: list[str]) -> Tensor:
        """(B,) scaled cosines of each picture with its prompt."""
        return self.scale * (self.image_features(pictures) * self.text_features(prompts)).sum(1)


class ClipScore(PickScore):
    """CLIPScore: 100 x cosine, the model's own logit, in OpenAI's CLIP ViT-L/14; [-100, 100], in practice 15 to 35.

    Higher is closer to the prompt. 224 pixels, centre crop. Weights openai/clip-vit-large-patch14 (MIT), arXiv:2104.08718.
    Hacked by: writing the prompt into the picture, repeating its objects.
    """

    name = "clip"
    preprocess, clean = staticmethod(square), staticmethod(clean)


class Hpsv2(ClipScore):
    """HPS v2.1: cosine of picture and prompt in a CLIP ViT-H-14 tuned on human preferences; [-1, 1], in practice .15 to .40.

    Higher is preferred. 224 pixels, the longer side fitted, black bars. Weights xswu/HPSv2 (Apache-2.0), arXiv:2306.09341.
    Hacked by: saturated, high-contrast, illustration-like pictures.
    """

    name, preprocess = "hpsv2", staticmethod(padded)

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.scale = 1.0

    def read(self) -> tuple[CLIPConfig, dict[str, Tensor]]:
        """Config and weights of open_clip's ViT-H-14."""
        return VIT_H, from_open_clip(read_weights(self.files[0]))


class Aesthetic(ClipScore):
    """LAION's aesthetic predictor: a linear head on CLIP ViT-L/14's picture features; about 1 to 10, in practice 4 to 7.

    Higher is prettier; the prompt does not count. 224 pixels, centre crop. Head: improved-aesthetic-predictor (Apache-2.0).
    Hacked by: leaving the prompt for painterly portraits and landscapes.
    """

    name = "aesthetic"

    def __init__(self, setup: Setup):
        super().__init__(setup)
        head = self.files[-1]
        self.head = linear_head(read_weights(head), head, self.model.config.projection_dim)
        self.models.append(self.head)

    def scores(self, pictures: np.ndarray, prompts: list[str]) -> Tensor:
        """(B,) scores."""
        return self.head(self.image_features(pictures))[:, 0]


# ---------------------------------------------------------------------------------------------------------- imagereward
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
BLIP_VISION = BlipVisionConfig(**VIT_L, image_size=224, patch_size=16, layer_norm_eps=1e-6)
# BERT-base, which looks at BLIP_VISION's output.
BLIP_TEXT = BlipTextConfig(vocab_size=30524, encoder_hidden_size=1024, num_attention_heads=12)
BLIP = {  # ImageReward's names -> transformers'
    r"^blip\.visual_encoder\.(.*)": r"vision.\1",
    r"^blip\.text_encoder\.(.*)": r"text.\1",
    r"\.cls_token": ".embeddings.class_embedding",
    r"\.pos_embed": ".embeddings.position_embedding",
    r"\.patch_embed\.proj\.": ".embeddings.patch_embedding.",
    r"\.blocks\.": ".encoder.layers.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
    r"^vision\.norm\.": "vision.post_layernorm.",
}


class ImageReward(Scorer):
    """ImageReward v1.0: BLIP's text tower reads the prompt while looking at the picture; about -2.3 to 2.3, mean 0, std 1.

    Higher is preferred. 224 pixels, centre crop; 35 tokens. Weights THUDM/ImageReward (Apache-2.0), arXiv:2304.05977.
    Hacked by: exaggerating what the prompt names, at the cost of realism.
    """

    MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores, from the package

    def __init__(self, setup: Setup):
        path, vocabulary = weight_files("imagereward", setup)
        state = renamed(read_weights(path), BLIP)
        towers = {name: {} for name in ("vision", "text", "mlp", "blip")}  # blip: of its own pre-training, unused
        for key, value in state.items():
            tower, _, rest = key.partition(".")
            if tower not in towers:
                raise ValueError(f"{path} does not fit ImageReward: {key!r} is left over")
            if not rest.endswith("position_ids"):
                towers[tower][rest] = value
        self.vision = build(BlipVisionModel, BLIP_VISION, towers["vision"], path, setup.dtype)
        self.text = build(BlipTextModel, BLIP_TEXT, towers["text"], path, setup.dtype, add_pooling_layer=False)
        self.head = linear_head(towers["mlp"], path, BLIP_TEXT.hidden_size)
        self.models, self.setup = [self.vision, self.text, self.head], setup
        self.tokenizer = tokenizer(BertTokenizer, BLIP_TEXT.vocab_size - 2, vocabulary)  # the two: BLIP's [DEC], [ENC]

    def scores(self, pictures: np.ndarray, prompts: list[str]) -> Tensor:
        """(B,) scores."""
        device = self.setup.device
        seen = self.vision(self.pixels(square(pictures, self.vision.config.image_size))).last_hidden_state
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=35, return_tensors="pt").to(device)
        hidden = self.text(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
        ).last_hidden_state
        return (self.head(hidden[:, 0].float())[:, 0] - self.MEAN) / self.STD


# ------------------------------------------------------------------------------------------------------------- several
REWARDS: dict[str, Callable[[Setup], Reward]] = {  # name -> what makes it; models are loaded only when asked for
    "ocr": lambda setup: Ocr(),
    "colour": lambda setup: colour,
    "jpeg": lambda setup: jpeg,
    "jpeg-large": lambda setup: jpeg_large,
    "hpsv2": Hpsv2,
    "imagereward": ImageReward,
    "pickscore": PickScore,
    "clip": ClipScore,
    "aesthetic": Aesthetic,
    "motion": lambda setup: motion,
    "temporal": lambda setup: temporal,
}
CHECKS: dict[str, Callable[[str], object]] = {  # raise on a prompt
    "ocr": quoted_text,
    "colour": wanted_colour,
    "motion": wanted_motion,
}
# Those that take (B, F, 3, H, W); of a video, all others see the first, the middle and the last frame.
VIDEO = ("motion", "temporal")


def parse_weights(text: str) -> dict[str, float]:
    """'ocr:1,jpeg:0.1' -> {'ocr': 1.0, 'jpeg': 0.1}; a missing weight is 1.

    Raises:
        ValueError: for an unknown or repeated name, or a weight that is no finite number.
    """
    weights: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, number = part.partition(":")
        if name not in REWARDS:
            raise ValueError(f"there is no reward {name!r}: choose from {', '.join(REWARDS)}")
        if name in weights:
            raise ValueError(f"the reward {name!r} is named twice in {text!r}")
        try:
            weights[name] = float(number or 1)
        except ValueError:
            weights[name] = float("nan")
        if not np.isfinite(weights[name]):
            raise ValueError(f"the weight of {name!r} must be a number, got {number!r}")
    return weights


def can_score(name: str, prompts: list[str]) -> bool:
    """True where the reward's check passes on every prompt."""
    try:
        for prompt in prompts:
            CHECKS.get(name, str)(prompt)
    except CannotScore:
        return False
    return True


def load_rewards(
    reward: str, watch: str, prompts: list[str], blank: Tensor, setup: Setup = Setup()
) -> tuple[dict[str, Reward], dict[str, float]]:
    """The rewards to optimise and to watch, tried on every prompt and on one blank picture before any long work.

    Args:
        reward: 'name:weight,...' to optimise.
        watch: names to measure only; 'auto' takes ocr, colour and motion where every prompt allows.
        prompts: all that will be scored.
        blank: (1, 3, H, W) or (1, F, 3, H, W), of the size that will be scored.
        setup: where preference models are, and how they run.

    Returns:
        name -> reward, the optimised first; and name -> weight of the optimised ones.

    Raises:
        ValueError: for an unknown reward or a missing or damaged weights file; CannotScore, a kind of it, for a prompt or a
            size that one cannot score.
    """
    weights = parse_weights(reward)
    seen = [n for n in CHECKS if blank.ndim == 5 or n not in VIDEO]
    wanted = [n for n in seen if can_score(n, prompts)] if watch == "auto" else parse_weights(watch)
    names = list(dict.fromkeys([*weights, *wanted]))
    for name in names:
        for prompt in prompts:
            CHECKS.get(name, str)(prompt)
    for name in names:
        weight_files(name, setup)  # all of them, before the first is read
    rewards = {name: REWARDS[name](setup) for name in names}
    score(rewards, blank, prompts[:1])
    return rewards, weights


def score(rewards: dict[str, Reward], pictures: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Every reward on every picture: name -> (B,) float32.

    Raises:
        ValueError: if a reward returns a wrong shape or a value that is not finite.
    """
    scores = {}
    for name, reward in rewards.items():
        if pictures.ndim == 5 and name not in VIDEO:
            each = [prompt for prompt in prompts for _ in range(3)]
            scores[name] = reward(sampled_frames(pictures).flatten(0, 1), each).float().view(-1, 3).mean(1)
        else:
            scores[name] = reward(pictures, prompts).float()
    for name, values in scores.items():
        if values.shape != (len(prompts),) or not values.isfinite().all():
            raise CannotScore(f"the reward {name!r} must return {len(prompts)} finite numbers, got {values}")
    return scores


def weighted_sum(scores: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The reward to optimise: sum_k w_k r_k, (B,)."""
    return sum(w * scores[name] for name, w in weights.items())


# --------------------------------------------------------------------------------------------------------- command line
def read_picture(path: str) -> Tensor:
    """(1, 3, H, W) in [0, 1]; grey, palette and transparent pictures become RGB as Pillow converts them.

    Raises:
        ValueError: if the file is no picture, or one of whole or floating-point numbers without a known range.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode in ("I", "F"):
                raise ValueError(f"{path} has mode {picture.mode}, of no known range: save it with 8 or 16 bits")
            if picture.mode.startswith("I;16"):
                picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
            pixels = np.array(picture.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def list_rewards(o) -> dict:
    """Which rewards are ready, and what the others lack."""
    state = {}
    for name in REWARDS:
        try:
            weight_files(name, Setup(o.reward_weights))
            state[name] = "ready"
        except ValueError as error:
            state[name] = "missing: " + str(error).partition(" lacks ")[2]
        print(f"{name:<12} {state[name]}")
    return state


def score_files(o) -> dict:
    """Score pictures with one prompt, or each with its own; a table, then name -> scores.

    Raises:
        ValueError: if a reward, a picture or a prompt is unusable.
    """
    if len(o.prompt) not in (1, len(o.pictures)):
        raise ValueError(f"--prompt: give one, or one a picture ({len(o.pictures)}), not {len(o.prompt)}")
    prompts = o.prompt * (len(o.pictures) // len(o.prompt))
    if not parse_weights(o.reward):
        raise ValueError("--reward must name a reward")
    if any(re.search("[\ud800-\udfff]", p) for p in prompts):
        raise ValueError("--prompt is not UTF-8 text")
    pictures = [read_picture(path) for path in o.pictures]
    if o.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU was found")
    device = o.device if o.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    setup = Setup(o.reward_weights, device, torch.bfloat16 if o.dtype == "bf16" else torch.float32)
    rewards, _ = load_rewards(o.reward, "", prompts, pictures[0], setup)
    scores = {name: [reward(x, [p]).item() for x, p in zip(pictures, prompts)] for name, reward in rewards.items()}
    print(f"{'picture':<40}" + "".join(f"{name:>14}" for name in scores))
    for i, path in enumerate(o.pictures):
        print(f"{path:<40}" + "".join(f"{values[i]:14.6f}" for values in scores.values()))
    return {"pictures": o.pictures, "prompts": prompts, "scores": scores}


def main(argv: list[str] | None = None) -> None:
    """`list` says which rewards are ready; `score` scores pictures. The last line is one JSON document."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    lister, scorer = commands.add_parser("list"), commands.add_parser("score")
    for p, work in ((lister, list_rewards), (scorer, score_files)):
        p.add_argument("--reward-weights", help="folder of REPOSITORY/FILE; what it lacks comes from the hub's cache")
        p.set_defaults(work=work)
    scorer.add_argument("pictures", nargs="+", metavar="PICTURE")
    scorer.add_argument("--reward", required=True, help=f"names of {', '.join(REWARDS)}, separated by commas")
    scorer.add_argument("--prompt", required=True, action="append", help="once, or once a picture")
    scorer.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    scorer.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    o = parser.parse_args(argv)
    try:
        print(json.dumps(o.work(o)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
