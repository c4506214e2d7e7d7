"""Rewards: a reward is a function of pictures and prompts that returns one number per picture; higher is better.

    reward(pictures, prompts) -> scores
    pictures   (B, 3, H, W) float in [0, 1], on any device; of videos (B, F, 3, H, W)
    prompts    B strings
    scores     (B,) float32 on the CPU

1. ocr                 reads the text in the picture, and compares it with the text that the prompt quotes     [0, 1]
2. colour              the ink's colour against the first colour word of the prompt                            [0, 1]
3. jpeg, jpeg-large    minus the size of the picture as a JPEG, in kB; plus the size              below 0 / above 0
4. motion, temporal    of videos: optical flow against the prompt's direction; warping and flicker             [0, 1]
5. hpsv2, pickscore, clip, aesthetic, imagereward, videoalign: preference models, see preference.py
6. vlm, vlm-7b         is this the prompt? How sure a vision-language model is of Yes, see preference.py       [0, 1]

Several rewards are weighted and summed, as in `--reward ocr:1,jpeg:0.1`; others are only watched (`--watch`). With
`--reward-column` each prompt has rewards of its own, and a reward is asked about the prompts that name it. A policy
learns what its reward asks for and nothing else: ocr is blind to colour, so a policy trained on it alone drifts from
red to purple. A second reward, watched or optimised, shows it.

To add a reward, write the function and name it in REWARDS. If it cannot score some prompts, name in CHECKS what raises
CannotScore on them, so that a run stops before its first step. docs/rewards.md says more.

    python rewards.py list                                               # which rewards are ready?
    python rewards.py score --reward hpsv2 PICTURE --prompt TEXT
"""

import argparse
import dataclasses
import io
import json
import math
import os
import re
import textwrap
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import cv2
import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image, ImageColor, ImageSequence
from torch import Tensor

from preference import (
    Aesthetic,
    CannotScore,
    ClipScore,
    Hpsv2,
    ImageReward,
    PickScore,
    Vlm,
    no_tokens,
    to_uint8,
    video_align,
)
from pretrained import FILES, PARTS, QUESTION, VLMS, Setup, weight_files
from prompts import short

DEFAULT = Setup()  # preference models from the hub's cache, in float32 on the CPU
Reward = Callable[[Tensor, list[str]], Tensor]
Own = dict[str, dict[str, float]]  # prompt -> name -> weight, see `own_weights`


def sampled_frames(videos: Tensor, n: int = 3) -> Tensor:
    """(B, F, 3, H, W) -> n of the frames, evenly spread, the first and the last among them: (B, n, 3, H, W).

    Of 9 frames, 3 are the frames 0, 4 and 8.
    """
    return videos[:, torch.linspace(0, videos.shape[1] - 1, n).round().long()]


# --------------------------------------------------------------------------------------------------------------- ocr
QUOTED = re.compile(  # a text in quotes, of any kind that people type
    r"""
      "([^"]+)" | “([^”]+)” | „([^“”]+)[“”] | «([^»]+)» | 「([^」]+)」
    | ‘((?:[^’]|(?<=\w)’(?=\w))+)’(?!\w)          # ‘OPEN’ and ‘DON’T’
    | (?<!\w)'((?:[^']|(?<=\w)'(?=\w))+)'(?!\w)   # 'OPEN' and 'DON'T', but not the dog's and the dogs'
    """,
    re.VERBOSE,
)


def quoted_text(prompt: str) -> str:
    """The text that the prompt asks for: what stands between its first pair of quotes, "..." or any other kind.

    Raises:
        CannotScore: if nothing is quoted, or only spaces are.
    """
    match = QUOTED.search(prompt)
    text = next(filter(None, match.groups())) if match else ""
    if not normalise(text):
        need = 'the ocr reward needs a quoted text, as in red "CAT"'
        raise CannotScore(f"{need}; the prompt {prompt!r} has none")
    return text


def normalise(text: str) -> str:
    """Text as it is compared: without case, spaces and full-width forms, and with O for 0.

    In a word of a few letters no recogniser tells O from 0. For instance " C A 0" becomes "cao".
    """
    return "".join(unicodedata.normalize("NFKC", text).split()).casefold().replace("0", "o")


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the least number of insertions, deletions and substitutions that turn a into b.

    D[i][j], from the first i letters of a to the first j of b, is the least of
        D[i-1][j] + 1 (delete a letter), D[i][j-1] + 1 (insert one), D[i-1][j-1] + (0 if the letters are equal, else 1).
    """
    # One row is enough: row[j] holds D[i-1][j] before it is overwritten and D[i][j] after; `diagonal` is D[i-1][j-1].
    row = list(range(len(b) + 1))  # D[0][j] = j: from nothing, j insertions
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i  # D[i][0] = i: to nothing, i deletions
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


# A picture up to this height, and not taller than wide, is one line of text: those of the embedded model are, 32 x 64.
# In any other one the text may stand anywhere, and its lines are looked for first. At every height from 32 on, drawn
# text is read at least as well in this way. But at 32 x 64 it takes 1.5 times as long, and would change the figures of
# the embedded model (LAB.md).
LINE_HEIGHT = 32  # pixels
LONGEST_SIDE = 640  # pixels: larger pictures are shrunk to it when lines are looked for, not when they are read
SURE = 0.5  # a line is dropped if the recogniser is less sure of it, of 1; PaddleOCR does so in Flow-GRPO


def is_one_line(height: int, width: int) -> bool:
    """Whether a picture is read as one line of text. Its shape alone decides: all leaves of a prompt are read alike.

    A picture of 32 x 64 pixels (height x width) is one line; of 64 x 128 or 32 x 16 it is not.
    """
    return height <= min(width, LINE_HEIGHT)


def reading_order(boxes: np.ndarray) -> list[int]:
    """The order in which text is read: rows from top to bottom, and each row from left to right.

    Args:
        boxes: (N, 4, 2) the corners of N boxes of text, x and y in pixels; y points down.

    Returns:
        the N places of the boxes in `boxes`, in the order of reading. For the words of

            Spring sale
            2024

        given as sale, 2024, Spring, these are [2, 0, 1].
    """
    left, middle = boxes[:, :, 0].min(1), boxes[:, :, 1].mean(1)  # (N,), (N,)
    height = np.ptp(boxes[:, :, 1], axis=1)  # (N,)

    # From top to bottom, a box stands in the row of the box before it if their middles differ by less than half the
    # lower height of the two. Lines of text lie a whole height apart, so no row takes in the next one. In one row the
    # middles of "Top" and "dot", of which only one has a letter that reaches down, differ by a tenth of their height.
    rows: list[list[int]] = []
    for i in map(int, np.argsort(middle, kind="stable")):
        last = rows[-1][-1] if rows else None
        if last is not None and middle[i] - middle[last] < min(height[i], height[last]) / 2:
            rows[-1].append(i)
        else:
            rows.append([i])

    return [i for row in rows for i in sorted(row, key=left.__getitem__)]


def text_accuracy(text: str, target: str, anywhere: bool) -> float:
    """Flow-GRPO's score of a text: 1 - edit distance / length of the target, and 0 from that many edits on.

    For the target "cat", "cat" scores 1, "cut" 1 - 1/3, and what is three edits away or more 0.

    Args:
        text: what was read, after `normalise`.
        target: what was asked for, after `normalise`; not empty.
        anywhere: whether the text comes from the whole of a scene. There other writing is no mistake: a street with an
            "OPEN" sign has names of shops too. So a text that contains the target scores 1, as in Flow-GRPO. On a strip
            that holds nothing but the word, a letter too many is a mistake, and "cats" scores 1 - 1/3.
    """
    if anywhere and target in text:
        return 1.0
    return max(0.0, 1 - edit_distance(text, target) / len(target))


class Ocr:
    """Text accuracy, as in Flow-GRPO: 1 - edit distance / length of the quoted text, clipped to [0, 1]; 1 is exact.

    1. A picture that is one line of text (`is_one_line`) goes to the recogniser as it is, resized to 48 pixels' height.
    2. In any other one, the detector finds boxes of text, wherever they stand. The recogniser reads each, and what it
       reads is joined in the order of reading, without spaces.
    3. The text is compared with the quoted one (`text_accuracy`).

    Detector and recogniser are PP-OCRv6's (Apache-2.0, inside the rapidocr wheel). The detector is loaded when the
    first picture needs it.

    Departures from Flow-GRPO, which has PP-OCR's English models of an older version: quotes of all kinds; `normalise`,
    which also takes O for 0; the order of reading, whose rows know the size of the letters where PaddleOCR's are always
    10 pixels high; and on single lines a text that contains the target is no exact match.

    Raises:
        CannotScore: when called with a prompt without quotes, or a picture too narrow for the detector.
    """

    def __init__(self):
        from rapidocr import RapidOCR  # slow to import, and only this reward needs it

        # At least 48 pixels wide, wider by the aspect ratio. Batches of 8 are the fastest on a CPU (LAB.md).
        recogniser = {"Rec.rec_img_shape": [3, 48, 48], "Rec.rec_batch_num": 8}
        detector = {"Det.limit_side_len": LONGEST_SIDE, "Det.limit_type": "max"}

        # As many threads as torch has; onnxruntime's default would take all cores.
        threads = {"EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads()}
        self.models = RapidOCR(params={"Global.log_level": "critical", **recogniser, **detector, **threads})
        self.recogniser = self.models._load_rec_model()

    def read(self, pictures: Tensor) -> list[str]:
        """The text that stands in each picture, as it comes.

        Raises:
            CannotScore: if the pictures are too narrow for the detector.
        """
        from rapidocr.ch_ppocr_rec import TextRecInput

        # The recogniser was trained with OpenCV's order of colours, blue first.
        bgr = np.ascontiguousarray(to_uint8(pictures)[..., ::-1])  # (B, H, W, 3)
        height, width = bgr.shape[1:3]
        if is_one_line(height, width):
            return list(self.recogniser(TextRecInput(img=list(bgr))).txts)

        # The detector rounds both sides to multiples of 32: of 16 pixels or less nothing would be left.
        if min(height, width) * min(1, LONGEST_SIDE / max(height, width)) <= 16:
            raise CannotScore(f"the ocr reward finds no text in a picture of {width}x{height}: it is too narrow")
        return [self.read_anywhere(picture) for picture in bgr]

    def read_anywhere(self, picture: np.ndarray) -> str:
        """All lines of text in a picture (H, W, 3), uint8 with blue first, joined in the order of reading.

        One picture at a time: the recogniser fills the short lines of a batch up to the longest, which may change what
        it reads, and a picture's score must not depend on the other pictures. Batches would not be faster (LAB.md).
        """
        from rapidocr.ch_ppocr_rec import TextRecInput
        from rapidocr.utils.process_img import get_rotate_crop_image

        boxes = self.models._load_det_model()(picture).boxes  # (N, 4, 2), or None; loaded once
        if boxes is None:
            return ""

        # A box may be tilted: what it holds is turned upright.
        lines = [get_rotate_crop_image(picture, boxes[i]) for i in reading_order(boxes)]
        result = self.recogniser(TextRecInput(img=lines))
        return "".join(text for text, sure in zip(result.txts, result.scores, strict=True) if sure >= SURE)

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) scores in [0, 1]."""
        anywhere = not is_one_line(*pictures.shape[-2:])
        scores = []
        for text, prompt in zip(self.read(pictures), prompts, strict=True):
            scores.append(text_accuracy(normalise(text), normalise(quoted_text(prompt)), anywhere))
        return torch.tensor(scores)


# ------------------------------------------------------------------------------------------------------------ colour
def wanted_colour(prompt: str) -> Tensor:
    """(3,) RGB in [0, 1] of the prompt's first CSS colour word outside quotes, from Pillow's table.

    Raises:
        CannotScore: if the prompt names no colour.
    """
    # A word to be drawn may be a colour itself: '"BLUE" in red' asks for red.
    for word in re.findall(r"[a-z]+", QUOTED.sub(" ", prompt.lower())):
        if word in ImageColor.colormap:
            return torch.tensor(ImageColor.getrgb(word)) / 255
    raise CannotScore(f'the colour reward needs a colour word, as in red "CAT"; the prompt {prompt!r} has none')


def colour(pictures: Tensor, prompts: list[str]) -> Tensor:
    """Colour fidelity on white paper: 1 - (d - 0.1)/0.9 clipped to [0, 1], where d = ||ink - target|| in the RGB cube.

    `target` is the colour that the prompt names. `ink` is the mean colour of the pixels, each weighted by how far past
    1/2 its darkest channel lies from white, so that anti-aliased edges and faint stains do not count. A page without
    ink scores 0.

    Up to d = 0.1, twice what true renders miss, the score is exactly 1. Where all leaves have the right colour, a tie
    must stay a tie: Eq. 4 divides by the spread, and so turns differences that nobody sees into advantages of about 1.
    Red drawn purple scores 0.33, black drawn brown 0.35.
    """
    pixels = pictures.detach().float().clamp(0, 1).cpu().flatten(2)  # (B, 3, HW)

    # White (1, 1, 1) and light grey weigh 0; red (1, 0, 0), whose darkest channel is 0, weighs 0.5, as black does.
    weight = (0.5 - pixels.amin(1)).clamp(min=0)  # (B, HW)

    # The mean colour; without ink both sums are 0, and the clamp only avoids 0 / 0.
    total = weight.sum(1)  # (B,)
    ink = (pixels * weight[:, None]).sum(2) / total.clamp(min=1e-6)[:, None]  # (B, 3)

    target = torch.stack([wanted_colour(p) for p in prompts])  # (B, 3)
    score = 1 - ((ink - target).norm(dim=1) - 0.1) / 0.9
    return torch.where(total > 0, score.clamp(0, 1), 0.0)


# -------------------------------------------------------------------------------------------------------------- jpeg
def jpeg(pictures: Tensor, prompts: list[str]) -> Tensor:
    """Compressibility (DDPO): minus the size as a JPEG of quality 95, in kB (1,000 bytes). The higher, the smaller."""
    sizes = []
    for picture in to_uint8(pictures):
        Image.fromarray(picture).save(buffer := io.BytesIO(), "JPEG", quality=95)
        sizes.append(-buffer.tell() / 1000)
    return torch.tensor(sizes)


def jpeg_large(pictures: Tensor, prompts: list[str]) -> Tensor:
    """Incompressibility (DDPO): the size in kB as a JPEG of quality 95; above 0, higher is larger."""
    return -jpeg(pictures, prompts)


# ------------------------------------------------------------------------------------------------------------- video
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}  # x, y; y points down
SLOW = 0.005  # of the longer side, per frame: what moves less does not move


def wanted_motion(prompt: str) -> np.ndarray:
    """(2,) the direction that the prompt names, x and y: the first of left, right, up, down, still.

    Raises:
        CannotScore: if it names none.
    """
    for word in re.findall(r"[a-z]+", prompt.lower()):
        if word in DIRECTIONS:
            return np.array(DIRECTIONS[word], dtype=float)
    raise CannotScore(f"the motion reward needs one of {', '.join(DIRECTIONS)}; the prompt {prompt!r} names none")


def optical_flow(video: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """How far every pixel moves from frame to frame, by Farneback's method.

    Args:
        video: (F, 3, H, W) in [0, 1].

    Returns:
        the grey frames (F, H, W) uint8, and the flow (F - 1, H, W, 2), x and y in pixels per frame.

    Raises:
        CannotScore: if this is no video of two frames or more.
    """
    if video.ndim != 4 or len(video) < 2:
        raise CannotScore("this reward watches motion: it needs videos of two frames or more")
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in to_uint8(video)]

    # The method compares windows. One inside a flat object sees no change, so a window must be as large as an object:
    # a quarter of the shorter side.
    window = max(9, min(grey[0].shape) // 4)
    flow = [cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, window, 3, 5, 1.1, 0) for a, b in pairwise(grey)]

    # Between equal frames Farneback invents motion: there the flow is set to 0.
    moved = [not np.array_equal(a, b) for a, b in pairwise(grey)]
    return np.stack(grey), np.stack([f * m for f, m in zip(flow, moved)])


def still_change(grey: np.ndarray, speed: np.ndarray, slow: float) -> float:
    """Flicker: the mean absolute change from frame to frame where nothing moves, in [0, 1]; 1 if everything moves.

    Args:
        grey: (F, H, W) uint8. speed: (F - 1, H, W) in pixels per frame. slow: the speed below which nothing moves.
    """
    change = abs(np.diff(grey.astype(float), axis=0)) / 255  # (F - 1, H, W)
    return float(change[speed < slow].mean()) if (speed < slow).any() else 1.0


def motion(videos: Tensor, prompts: list[str]) -> Tensor:
    """Does the optical flow point where the prompt says, steadily, while the rest is still? 1 is best.

    score = direction x smooth x still. With u_t the flow from frame t to the next, averaged over the picture with its
    own length as weight, so that the empty page does not count:

    direction   mean_t cos(u_t, target), 0 where u_t is slower than SLOW; for `still`: 1 at rest, 0 from 4 SLOW on
    smooth      1 - mean_t |u_{t+1} - u_t| / (mean_t |u_t| + 4 SLOW)
    still       1 - 10 x mean change where nothing moves

    Each factor is exactly 1 within a tenth of its best (smooth: a fifth), so that ties stay ties, as with colour.

    Args:
        videos: (B, F, 3, H, W) in [0, 1].
        prompts: B strings, each with a word of DIRECTIONS.

    Returns:
        (B,) scores in [0, 1].

    Raises:
        CannotScore: for a prompt without a direction, or what is no video.
    """
    scores = []
    for video, prompt in zip(videos, prompts, strict=True):
        grey, flow = optical_flow(video)
        slow, speed = SLOW * max(video.shape[2:]), np.hypot(flow[..., 0], flow[..., 1])  # pixels per frame

        # u_t, and its length. The 1e-6 avoids 0 / 0 where nothing moves.
        u = (flow * speed[..., None]).sum((1, 2)) / (speed.sum((1, 2))[:, None] + 1e-6)  # (F - 1, 2)
        fast, target = np.hypot(u[:, 0], u[:, 1]), wanted_motion(prompt)  # (F - 1,), (2,)

        # The cosine of a flow that is nearly 0 would be noise, so slow frames count 0. To stand still has no direction:
        # there the speed itself is judged.
        if target.any():
            direction = float(np.mean(np.where(fast > slow, u @ target / (fast + 1e-6), 0.0)))
        else:
            direction = 1 - float(fast.mean()) / (4 * slow)

        # The change of speed is measured against the speed. Its floor 4 SLOW keeps resting clips, whose speed is nearly
        # 0, from being called jerky.
        jerk = float(np.hypot(*np.diff(u, axis=0).T).mean()) if len(u) > 1 else 0.0
        smooth = 1 - jerk / (float(fast.mean()) + 4 * slow)
        still = 1 - 10 * still_change(grey, speed, slow)
        scores.append(min(1, max(0, direction) / 0.9) * min(1, max(0, smooth) / 0.8) * min(1, max(0, still) / 0.9))
    return torch.tensor(scores, dtype=torch.float32)


def temporal(videos: Tensor, prompts: list[str]) -> Tensor:
    """Consistency in time: 1 - 5 (warping error + flicker), clipped to [0, 1]; 1 is best.

    warping error   mean |x_t - x_{t+1} moved back along the flow|, with x_t the grey frame t, of 1
    flicker         mean change where nothing moves

    A frozen video scores 1, so this is to be used beside motion, never alone.

    Args:
        videos: (B, F, 3, H, W) in [0, 1]. prompts: not looked at.

    Returns:
        (B,) scores in [0, 1].

    Raises:
        CannotScore: for what is no video.
    """
    scores = []
    for video in videos:
        grey, flow = optical_flow(video)

        # Where each pixel of x_t has gone in x_{t+1}: its own place plus the flow there, as columns and rows.
        rows, columns = np.indices(grey.shape[1:], dtype=np.float32)
        gone_to = [(columns + f[..., 0], rows + f[..., 1]) for f in flow]

        # x_{t+1}, read at those places: it equals x_t if things only moved.
        back = [
            cv2.remap(g, *xy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) for g, xy in zip(grey[1:], gone_to)
        ]
        warping = float(abs(np.stack(back).astype(float) - grey[:-1]).mean()) / 255

        flicker = still_change(grey, np.hypot(flow[..., 0], flow[..., 1]), SLOW * max(video.shape[2:]))
        scores.append(min(1.0, max(0.0, 1 - 5 * (warping + flicker))))
    return torch.tensor(scores, dtype=torch.float32)


# ----------------------------------------------------------------------------------------------------------- several
# Name -> what makes the reward. Models are loaded only when asked for.
REWARDS: dict[str, Callable[[Setup], Reward]] = {
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
    **{name: partial(Vlm, name) for name in VLMS},
}

# Name -> a function of a prompt that raises CannotScore if the reward cannot score it. Its result is not used.
CHECKS: dict[str, Callable[[str], object]] = {
    "ocr": quoted_text,
    "colour": wanted_colour,
    "motion": wanted_motion,
    **dict.fromkeys(PARTS, no_tokens),
    **{name: partial(no_tokens, reward=name) for name in VLMS},
}

# Rewards that take whole videos. All others see a video's first, middle and last frame.
VIDEO = ("motion", "temporal", *PARTS)


def parse_weights(text: str, flag: str = "--reward or --watch") -> dict[str, float]:
    """'ocr:1,jpeg:0.1' -> {'ocr': 1.0, 'jpeg': 0.1}; a missing weight is 1.

    Args:
        flag: that the text was given to, for errors. --watch takes no weights.

    Raises:
        ValueError: for an unknown or repeated name, or a weight that is no number, or too large for float32.
    """
    weights: dict[str, float] = {}
    for entry in filter(None, (e.strip() for e in text.split(","))):
        name, _, number = entry.partition(":")
        if name not in REWARDS:
            raise ValueError(f"{flag}: there is no reward {name!r}: choose from {', '.join(REWARDS)}")
        if name in weights:
            raise ValueError(f"{flag}: the reward {name!r} is named twice in {text!r}")
        if number and flag == "--watch":
            raise ValueError(f"--watch only measures: {name!r} takes no weight, got {entry!r}")

        # "nan" and "inf" are floats to Python: what is no number becomes nan, and both fail the same check.
        try:
            weights[name] = float(number or 1)
        except ValueError:
            weights[name] = float("nan")
        if not abs(weights[name]) < 1e30:
            raise ValueError(f"{flag}: the weight of {name!r} must be a number below 1e30, got {number!r}")
    return weights


def can_score(name: str, prompts: list[str]) -> bool:
    """True if the reward's check passes on every prompt."""
    try:
        for prompt in prompts:
            CHECKS.get(name, str)(prompt)
    except CannotScore:
        return False
    return True


def watched_names(watch: str, prompts: list[str], video: bool) -> list[str]:
    """The rewards of --watch; 'auto' takes those of ocr, colour and, for videos, motion that can score every prompt."""
    quick = ("ocr", "colour", "motion") if video else ("ocr", "colour")
    return [n for n in quick if can_score(n, prompts)] if watch == "auto" else [*parse_weights(watch, "--watch")]


def own_weights(texts: dict[str, str] | None, reward: str, watched=()) -> Own:
    """The rewards of each prompt by itself, with --reward-column.

    Args:
        texts: prompt -> 'name:weight,...', or '' where those of --reward serve; None without --reward-column.
        reward: that of --reward.
        watched: names of rewards that are measured on every prompt.

    Returns:
        prompt -> name -> weight, 0 for what is only watched: a reward is asked about the prompts that name it, and
        about no other. Empty without --reward-column.

    Raises:
        ValueError: for an unknown reward, or where all weights are 0, naming the prompt.
    """
    own, by_text = {}, {}
    for prompt, text in (texts or {}).items():
        if text not in by_text:  # thousands of prompts have a handful of texts
            flag = f"--reward-column: the prompt {short(prompt)}"
            weights = parse_weights(text or reward, flag)
            if not any(weights.values()):
                raise ValueError(f"{flag} needs a reward with a weight other than 0, got {text or reward!r}")
            by_text[text] = dict.fromkeys(watched, 0.0) | weights
        own[prompt] = by_text[text]
    return own


def sets_of_rewards(own: Own, prompts: list[str]) -> dict[str, int]:
    """How many prompts have each set of rewards of their own, such as {"ocr:1": 12, "jpeg:1,colour:0.5": 3}."""
    return dict(Counter(",".join(f"{name}:{w:g}" for name, w in own[p].items()) for p in prompts if own))


def load_rewards(
    reward: str, watch: str, prompts: list[str], blank: Tensor, setup: Setup = DEFAULT, own: Own | None = None
) -> tuple[dict[str, Reward], dict[str, float]]:
    """The rewards to optimise and to watch, tried on every prompt and on one blank picture before any long work.

    Args:
        reward: 'name:weight,...', to optimise.
        watch: names, to measure only, or 'auto': see `watched_names`.
        prompts: all that will be scored.
        blank: (1, 3, H, W) or (1, F, 3, H, W), of the size that will be scored.
        setup: where preference models lie, and how they run.
        own: the rewards of each prompt by itself, from `own_weights`; then those of `reward` serve only where no
            prompt has others.

    Returns:
        name -> reward, the optimised ones first; and name -> weight, of those of `reward`.

    Raises:
        ValueError: for an unknown reward, or a weight file that is missing or damaged.
        CannotScore: for a prompt or a size that a reward cannot score; it is a ValueError too.
    """
    # A reward that is optimised and watched stands once. With rewards of their own, prompts decide what is optimised.
    weights, watched = parse_weights(reward, "--reward"), watched_names(watch, prompts, blank.ndim == 5)
    optimised = dict.fromkeys(n for by_name in own.values() for n, w in by_name.items() if w) if own else weights
    names = list(dict.fromkeys([*optimised, *watched]))
    asked = {name: [p for p in prompts if not own or name in own[p]] for name in names}  # the prompts that it scores

    # The quick checks come first: all prompts, then all files, before the first model is read.
    flag = "--reward-column" if own else "--reward"
    flags = {name: f"{flag if name in optimised else '--watch'} {name}" for name in names}
    for name in names:
        for prompt in asked[name]:
            try:
                CHECKS.get(name, str)(prompt)
            except CannotScore as error:  # a reward may be of some prompts and be watched on all others
                cause = f"--watch {name}" if own and not own[prompt][name] else flags[name]
                raise CannotScore(f"{cause}: {error}") from error
    for name in names:
        weight_files(name, setup)

    # Load, and score once: an error in the first scoring would else come after the first rollout. What nobody asked for
    # and cannot score pictures of this size, or so few frames, is left out.
    rewards = {}
    for name in names:
        reward_of_name = make(name, setup)
        try:
            score({name: reward_of_name}, blank, asked[name][:1])
        except CannotScore as error:
            if watch == "auto" and name not in optimised:
                continue
            raise CannotScore(f"{flags[name]}: {error}") from error
        rewards[name] = reward_of_name
    return rewards, weights


def score(rewards: dict[str, Reward], pictures: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Every reward on every picture: name -> (B,) float32.

    Args:
        rewards: name -> reward.
        pictures: (B, 3, H, W) in [0, 1], or videos (B, F, 3, H, W).
        prompts: B strings.

    Raises:
        CannotScore: if a reward raises, or returns a wrong shape or what is no finite number; it names the reward.
    """
    scores = {}
    for name, reward in rewards.items():
        # A reward of pictures scores three frames of a video, and their mean is the video's. Two videos with prompts
        # a, b become six pictures with prompts a a a b b b.
        if pictures.ndim == 5 and name not in VIDEO:
            frames = sampled_frames(pictures).flatten(0, 1)  # (3 B, 3, H, W)
            frame_prompts = [prompt for prompt in prompts for _ in range(3)]
            scores[name] = ask(name, reward, frames, frame_prompts).view(-1, 3).mean(1)
        else:
            scores[name] = ask(name, reward, pictures, prompts)
    return scores


def score_own(rewards: dict[str, Reward], pictures: Tensor, prompts: list[str], own: Own) -> dict[str, Tensor]:
    """`score`, but with rewards of the prompts' own: each is asked about the rows only whose prompts name it.

    With own = {"a": {"ocr": 1}, "b": {"jpeg": 1}} and the prompts a a b, ocr sees the rows 0 and 1, and jpeg row 2:
    {"ocr": [0.5, 0.7, nan], "jpeg": [nan, nan, -2.1]}.

    Args:
        rewards, pictures, prompts: see `score`.
        own: from `own_weights`; empty, all rewards score all rows.

    Returns:
        name -> (B,) float32, nan in the rows that it was not asked about.
    """
    if not own:
        return score(rewards, pictures, prompts)

    # Rewards of the same rows are asked together, about the same tensor: VideoAlign's then watch each video once.
    rows_of = {name: tuple(i for i, prompt in enumerate(prompts) if name in own[prompt]) for name in rewards}
    scores = {name: torch.full((len(prompts),), torch.nan) for name in rewards}
    for rows in filter(None, dict.fromkeys(rows_of.values())):  # of several processes one may have no such prompt
        group = {name: reward for name, reward in rewards.items() if rows_of[name] == rows}
        for name, values in score(group, pictures[list(rows)], [prompts[i] for i in rows]).items():
            scores[name][list(rows)] = values
    return scores


def make(name: str, setup: Setup) -> Reward:
    """A reward from REWARDS.

    Raises:
        CannotScore: if that fails, or makes no function: the reward itself may stand there, without `lambda setup:`.
        ValueError: for weight files, which have sentences of their own.
    """
    if name in FILES:
        return REWARDS[name](setup)
    reward = guarded(f"REWARDS[{name!r}](setup)", REWARDS[name], setup)
    if not callable(reward):
        raise CannotScore(f"REWARDS[{name!r}](setup) must return a function of pictures and prompts, got {reward!r}")
    return reward


def guarded(what: str, function: Callable, *arguments):
    """What a user's function returns. What it changes in the whole process, and training relies on, is set back.

    Many a scorer begins with torch.set_grad_enabled(False): the update would have no gradients.

    Raises:
        CannotScore: if it raises anything or exits, naming the place in its code.
    """
    grad, dtype, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    threads, folder = torch.get_num_threads(), os.getcwd()  # --out may be relative
    try:
        return function(*arguments)
    except CannotScore:
        raise
    except (Exception, SystemExit) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 400)
        raise CannotScore(f"{what} failed at {place}: {reason}") from error
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        torch.set_default_device(None if device.type == "cpu" else device)  # None is quicker than "cpu"
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        os.chdir(folder)


def ask(name: str, reward: Reward, pictures: Tensor, prompts: list[str]) -> Tensor:
    """One reward's scores, (B,) float32 on the CPU, whatever it does and returns.

    A reward is a user's code. It gets pictures and prompts of its own, so that one which normalises in place does not
    turn the next one's pictures black. (VideoAlign's share them: it knows by them that it has just rated these videos.)

    Raises:
        CannotScore: naming the reward, and the place in its code where it failed.
    """
    own = pictures if name in PARTS else pictures.clone()

    values = guarded(f"the reward {name!r}", reward, own, list(prompts))
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor(values) if isinstance(values, list | tuple) else torch.from_numpy(np.array(values))
        except (TypeError, ValueError, RuntimeError) as error:
            shown = textwrap.shorten(repr(values), 80)
            raise CannotScore(f"the reward {name!r} failed: it returned {shown}, not numbers") from error
    if values.is_complex() or values.dtype == torch.bool:
        raise CannotScore(f"the reward {name!r} failed: it returned values of {values.dtype}, not numbers")

    # One nan would spoil the mean and the spread of its whole prompt (Eq. 4), and so all weights.
    values = values.detach().float().cpu().clone()  # a copy: the reward may write its next scores into the same memory
    if values.shape != (len(prompts),) or not values.isfinite().all():
        shown = values if values.numel() <= 8 else f"a tensor of shape {tuple(values.shape)}"
        raise CannotScore(f"the reward {name!r} must return {len(prompts)} finite numbers, got {shown}")
    return values


def weighted_sum(scores: dict[str, Tensor], weights: dict[str, float | Tensor]) -> Tensor:
    """The reward to optimise: sum_k w_k r_k, (B,); rewards without a weight are only watched."""
    return sum(weighted(scores[name], w) for name, w in weights.items())


def weighted(score: Tensor, weight: float | Tensor) -> Tensor:
    """w_k r_k. Weights of the prompts' own are a tensor that broadcasts to the score, (P, 1) to (P, leaves).

    Where such a weight is 0 the result is 0: there nobody asked for the score, it is nan, and so would 0 x nan be.
    """
    if not isinstance(weight, Tensor):
        return weight * score
    weight = weight.to(score)
    return torch.where(weight == 0, 0.0, weight * score)


def prompt_weights(prompts: list[str], weights: dict[str, float], own: Own) -> dict[str, float | Tensor]:
    """The weights of an iteration's prompts: those of --reward, or with --reward-column name -> (P, 1) float64.

    With own = {"a": {"ocr": 1}, "b": {"ocr": 2, "jpeg": 3}} the prompts a b have {"jpeg": [[0], [3]],
    "ocr": [[1], [2]]}.
    """
    if not own:
        return weights

    # In the order of the alphabet, so that the order of a sum does not depend on which prompts one process has.
    names = sorted({name for prompt in prompts for name, weight in own[prompt].items() if weight})
    return {name: torch.tensor([[own[p].get(name, 0.0)] for p in prompts], dtype=torch.float64) for name in names}


# ------------------------------------------------------------------------------------------------------ command line
VIDEO_FILES = (".mp4", ".mov", ".webm", ".mkv", ".avi")  # endings in any case; a .gif of several frames is one too


def read_picture(path: str) -> Tensor:
    """A picture (1, 3, H, W) or a video (1, F, 3, H, W) in [0, 1]; grey, palette and transparent ones become RGB.

    Raises:
        ValueError: if the file is no picture, or one of whole or floating-point numbers whose range is not known.
    """
    try:
        ending = Path(path).suffix.lower()
        if ending in VIDEO_FILES:
            return torch.from_numpy(np.stack(imageio.mimread(path, memtest=False))).movedim(-1, 1)[None].float() / 255

        with Image.open(path) as picture:
            if ending == ".gif" and picture.n_frames > 1:
                frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)]
                steady = np.repeat(np.stack(frames), gif_repeats(gif_times(picture)), 0)
                return torch.from_numpy(steady).movedim(-1, 1)[None].float() / 255
            if picture.mode in ("I", "F"):
                raise ValueError(f"{path} has mode {picture.mode}, of no known range: save it with 8 or 16 bits")

            # Pillow would cut 16 bits off at 255. 65,535 / 257 = 255.
            if picture.mode.startswith("I;16"):
                picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
            pixels = np.array(picture.convert("RGB"))
    except (OSError, EOFError, IndexError, Image.DecompressionBombError) as error:  # IndexError: a GIF cut short
        reason = str(error).partition("\n")[0]  # ffmpeg's own report follows on further lines
        raise ValueError(f"{path} cannot be read as a picture: {reason}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def gif_times(picture: Image.Image) -> list[int]:
    """How long each frame of a GIF is shown, in milliseconds; 0 where it does not say."""
    return [frame.info.get("duration", 0) for frame in ImageSequence.Iterator(picture)]


def gif_repeats(times: list[int]) -> list[int]:
    """How many frames of a steady video each frame of a GIF makes, since encoders join equal frames to one.

    The shortest makes one: frames of 50, 100 and 50 ms are 1, 2 and 1 frames at 20 per second.
    """
    shortest = min(filter(None, times), default=0)
    return [max(1, round(time / shortest)) if shortest else 1 for time in times]


def frame_rate(path: str) -> float | None:
    """Frames per second of a video, as `read_picture` reads it, by what the file says; None where it says nothing."""
    if Path(path).suffix.lower() in VIDEO_FILES:
        with imageio.get_reader(path) as reader:
            rate = reader.get_meta_data().get("fps", 0)
        return rate if 0 < rate < math.inf else None
    with Image.open(path) as picture:
        times = gif_times(picture)
    return 1000 * sum(gif_repeats(times)) / sum(times) if sum(times) else None


def frame_rates(args, names, pictures: list[Tensor]) -> list[float | None]:
    """The rate of each file, as --fps or the file says; None for pictures, and where no reward depends on it.

    Raises:
        ValueError: naming the file that says none.
    """
    rates = []
    for path, x in zip(args.pictures, pictures):
        needed = x.ndim == 5 and any(name in PARTS for name in names)
        rates.append((args.fps or frame_rate(path)) if needed else None)
        if needed and rates[-1] is None:
            raise ValueError(f"{path} does not say how many frames it has per second: give --fps")
    return rates


def list_rewards(args) -> dict:
    """Which rewards are ready, and what the others lack: prints a line for each, returns name -> state."""
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
    """Score pictures or videos with one prompt, or each with its own; prints a table, returns name -> scores.

    Raises:
        ValueError: if a reward, a picture or a prompt cannot be used.
    """
    # One prompt serves all pictures.
    if len(args.prompt) not in (1, len(args.pictures)):
        raise ValueError(f"--prompt: give one, or one per picture ({len(args.pictures)}), not {len(args.prompt)}")
    prompts = args.prompt * (len(args.pictures) // len(args.prompt))
    names = parse_weights(args.reward)
    if not names:
        raise ValueError("--reward must name a reward")
    if args.fps is not None and not 0 < args.fps < math.inf:
        raise ValueError(f"--fps must be a number above 0, got {args.fps}")

    # Bytes of the command line that are no UTF-8 reach Python as lone surrogates, which no tokenizer takes.
    if any(re.search("[\ud800-\udfff]", p) for p in prompts):
        raise ValueError("--prompt is not UTF-8 text")
    pictures = [read_picture(path) for path in args.pictures]
    rates = frame_rates(args, names, pictures)

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU was found")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    setup = Setup(args.reward_weights, device, dtype, question=args.reward_question)

    # One by one, because pictures may differ in size; and all of one frame rate after those of another.
    by_picture: list[dict[str, Tensor]] = [{} for _ in pictures]
    for rate in dict.fromkeys(rates):
        own_setup = dataclasses.replace(setup, fps=rate or setup.fps)
        rewards, _ = load_rewards(args.reward, "", prompts, pictures[rates.index(rate)], own_setup)
        for i, (x, p) in enumerate(zip(pictures, prompts)):
            by_picture[i] |= score(rewards, x, [p]) if rates[i] == rate else {}
    scores = {name: [s[name].item() for s in by_picture] for name in names}

    print(f"{'picture':<40}" + "".join(f"{name:>14}" for name in scores))
    for i, path in enumerate(args.pictures):
        print(f"{path:<40}" + "".join(f"{values[i]:14.6f}" for values in scores.values()))
    return {"pictures": args.pictures, "prompts": prompts, "scores": scores}


def main(argv: list[str] | None = None) -> None:
    """`list` says which rewards are ready; `score` scores pictures. The last line is one JSON document."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    lister, scorer = commands.add_parser("list"), commands.add_parser("score")

    # Both commands look for weight files.
    for command, work in ((lister, list_rewards), (scorer, score_files)):
        command.add_argument(
            "--reward-weights", help="folder of REPOSITORY/FILE; what it lacks comes from the hub's cache"
        )
        command.set_defaults(work=work)

    scorer.add_argument("pictures", nargs="+", metavar="PICTURE")
    scorer.add_argument("--reward", required=True, help=f"names of {', '.join(REWARDS)}, separated by commas")
    scorer.add_argument("--prompt", required=True, action="append", help="once, or once per picture")
    scorer.add_argument("--fps", type=float, help="frames per second of videos, for VideoAlign; default: the file's")
    scorer.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    scorer.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    scorer.add_argument("--reward-question", default=QUESTION, help="what vlm asks; {prompt} is the prompt's place")

    args = parser.parse_args(argv)
    try:
        print(json.dumps(args.work(args)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
