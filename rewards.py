"""Rewards: a reward is a function of pictures and prompts to one float a picture; higher is better.

    reward(pictures, prompts) -> scores
    pictures  (B, 3, H, W) float in [0, 1], on any device;  prompts  B strings;  scores  (B,) float32 on the CPU

1. ocr               reads the picture as one line of text, compares with the text quoted in the prompt    [0, 1]
2. colour            ink colour against the first colour word of the prompt                                [0, 1]
3. jpeg, jpeg-large  size of the picture as JPEG in kB, small is good / large is good                      < 0 / > 0
4. motion, temporal  of videos (B, F, 3, H, W): optical flow against the prompt's direction; warping and flicker     [0, 1]
5. hpsv2, pickscore, clip, aesthetic, imagereward, videoalign   preference models (preference.py)

`python rewards.py list` says which are ready, `python rewards.py score --reward hpsv2 PICTURE --prompt TEXT` scores. That 5
equals the official packages is proven by `make reference`, in an environment of their own. Several at once, weighted and
summed: `--reward ocr:1,jpeg:0.1`. OCR cannot see colour, so a policy trained on it alone drifts from red to purple and from
black to brown: watch a second reward. To add one, write a function and name it in REWARDS; where it cannot score some prompts,
name in CHECKS what raises CannotScore on them.
"""

import argparse
import io
import json
import re
import unicodedata
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import cv2
import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from preference import (
    Aesthetic,
    CannotScore,
    ClipScore,
    Hpsv2,
    ImageReward,
    PickScore,
    no_tokens,
    to_uint8,
    video_align,
)
from pretrained import PARTS, Setup, weight_files

DEFAULT = Setup()
Reward = Callable[[Tensor, list[str]], Tensor]


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

        # 48 wide at least, wider by aspect ratio; batches of 8 are the fastest on a CPU
        size = {"Rec.rec_img_shape": [3, 48, 48], "Rec.rec_batch_num": 8}
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
    smooth     1 - mean_t |u_{t+1} - u_t| / (mean_t |u_t| + 4 SLOW)
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
        smooth = 1 - jerk / (float(fast.mean()) + 4 * slow)
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
    **{name: partial(video_align, which) for name, which in PARTS.items()},
}
CHECKS: dict[str, Callable[[str], object]] = {  # raise on a prompt
    "ocr": quoted_text,
    "colour": wanted_colour,
    "motion": wanted_motion,
    **dict.fromkeys(PARTS, no_tokens),
}
# Those that take (B, F, 3, H, W); of a video, all others see the first, the middle and the last frame.
VIDEO = ("motion", "temporal", *PARTS)


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
    reward: str, watch: str, prompts: list[str], blank: Tensor, setup: Setup = DEFAULT
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
    free = ("ocr", "colour", "motion") if blank.ndim == 5 else ("ocr", "colour")
    wanted = [n for n in free if can_score(n, prompts)] if watch == "auto" else parse_weights(watch)
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
    """(1, 3, H, W) in [0, 1], of a video (1, F, 3, H, W); grey, palette and transparent become RGB as Pillow converts them.

    Raises:
        ValueError: if the file is no picture, or one of whole or floating-point numbers without a known range.
    """
    try:
        if path.endswith((".mp4", ".mov", ".webm", ".mkv", ".avi")):
            return torch.from_numpy(np.stack(imageio.mimread(path, memtest=False))).movedim(-1, 1)[None].float() / 255
        with Image.open(path) as picture:
            if picture.mode in ("I", "F"):
                raise ValueError(f"{path} has mode {picture.mode}, of no known range: save it with 8 or 16 bits")
            if picture.mode.startswith("I;16"):
                picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
            pixels = np.array(picture.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def list_rewards(args) -> dict:
    """Which rewards are ready, and what the others lack."""
    state = {}
    for name in REWARDS:
        try:
            weight_files(name, Setup(args.reward_weights))
            state[name] = "ready"
        except ValueError as error:
            state[name] = "missing: " + str(error).partition(" lacks ")[2]
        print(f"{name:<12} {state[name]}")
    return state


def score_files(args) -> dict:
    """Score pictures or videos with one prompt, or each with its own; a table, then name -> scores.

    Raises:
        ValueError: if a reward, a picture or a prompt is unusable.
    """
    if len(args.prompt) not in (1, len(args.pictures)):
        raise ValueError(f"--prompt: give one, or one a picture ({len(args.pictures)}), not {len(args.prompt)}")
    prompts = args.prompt * (len(args.pictures) // len(args.prompt))
    if not parse_weights(args.reward):
        raise ValueError("--reward must name a reward")
    if any(re.search("[\ud800-\udfff]", p) for p in prompts):
        raise ValueError("--prompt is not UTF-8 text")
    pictures = [read_picture(path) for path in args.pictures]
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU was found")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    setup = Setup(args.reward_weights, device, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    rewards, _ = load_rewards(args.reward, "", prompts, pictures[0], setup)
    each = [score(rewards, x, [p]) for x, p in zip(pictures, prompts)]
    scores = {name: [s[name].item() for s in each] for name in rewards}
    print(f"{'picture':<40}" + "".join(f"{name:>14}" for name in scores))
    for i, path in enumerate(args.pictures):
        print(f"{path:<40}" + "".join(f"{values[i]:14.6f}" for values in scores.values()))
    return {"pictures": args.pictures, "prompts": prompts, "scores": scores}


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
    args = parser.parse_args(argv)
    try:
        print(json.dumps(args.work(args)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
