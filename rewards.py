"""Rewards: a reward is a function of pictures and prompts to one float a picture; higher is better.

    reward(pictures, prompts) -> scores
    pictures  (B, 3, H, W) float in [0, 1], on any device;  prompts  B strings;  scores  (B,) float32 on the CPU

1. ocr               reads the picture as one line of text, compares with the text quoted in the prompt    [0, 1]
2. colour            ink colour against the first colour word of the prompt                                [0, 1]
3. jpeg, jpeg-large  size of the picture as JPEG in kB, small is good / large is good                      < 0 / > 0

Several at once, weighted and summed: `--reward ocr:1,jpeg:0.1`. OCR cannot see colour, so a policy trained on it alone
drifts from red to purple and from black to brown: watch a second reward. To add one, write a function and name it in
REWARDS; where it cannot score some prompts, name in CHECKS what raises CannotScore on them.
"""

import io
import re
import unicodedata
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

Reward = Callable[[Tensor, list[str]], Tensor]


class CannotScore(ValueError):
    """A picture or a prompt that a reward cannot score, or a score that is not a finite number."""


def to_uint8(pictures: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8, rounded: what a saved picture would hold."""
    return (pictures.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


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


# ------------------------------------------------------------------------------------------------------------- several
REWARDS: dict[str, Callable[[], Reward]] = {  # name -> what makes it; models are loaded only when asked for
    "ocr": Ocr,
    "colour": lambda: colour,
    "jpeg": lambda: jpeg,
    "jpeg-large": lambda: jpeg_large,
}
CHECKS: dict[str, Callable[[str], object]] = {"ocr": quoted_text, "colour": wanted_colour}  # raise on a prompt


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
    reward: str, watch: str, prompts: list[str], blank: Tensor
) -> tuple[dict[str, Reward], dict[str, float]]:
    """The rewards to optimise and to watch, tried on every prompt and on one blank picture before any long work.

    Args:
        reward: 'name:weight,...' to optimise.
        watch: names to measure only; 'auto' takes ocr and colour where every prompt allows.
        prompts: all that will be scored.
        blank: (1, 3, H, W), of the size that will be scored.

    Returns:
        name -> reward, the optimised first; and name -> weight of the optimised ones.

    Raises:
        ValueError: for an unknown reward; CannotScore, a kind of it, for a prompt or a size that one cannot score.
    """
    weights = parse_weights(reward)
    wanted = [n for n in CHECKS if can_score(n, prompts)] if watch == "auto" else parse_weights(watch)
    names = list(dict.fromkeys([*weights, *wanted]))
    for name in names:
        for prompt in prompts:
            CHECKS.get(name, str)(prompt)
    rewards = {name: REWARDS[name]() for name in names}
    score(rewards, blank, prompts[:1])
    return rewards, weights


def score(rewards: dict[str, Reward], pictures: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Every reward on every picture: name -> (B,) float32.

    Raises:
        ValueError: if a reward returns a wrong shape or a value that is not finite.
    """
    scores = {name: reward(pictures, prompts).float() for name, reward in rewards.items()}
    for name, values in scores.items():
        if values.shape != (len(prompts),) or not values.isfinite().all():
            raise CannotScore(f"the reward {name!r} must return {len(prompts)} finite numbers, got {values}")
    return scores


def weighted_sum(scores: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The reward to optimise: sum_k w_k r_k, (B,)."""
    return sum(w * scores[name] for name, w in weights.items())
