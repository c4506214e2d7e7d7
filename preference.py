"""Preference models: rewards that people's choices were fitted to, run by transformers from their official weights.

    reward                              model                what it computes
    hpsv2, pickscore, clip              CLIP                 the cosine between features of picture and prompt
    aesthetic                           CLIP and a head      a number from the features of the picture alone
    imagereward                         BLIP and a head      the text tower reads the prompt and looks at the picture
    videoalign, -vq, -mq, -ta           Qwen2-VL and a head  a language model watches the video and rates it
    vlm, vlm-7b                         Qwen2.5-VL           the probability that it answers a question with Yes

1. pretrained.py finds the official files, or says how to fetch them, and makes models of exactly these weights.
2. A `Scorer` takes float pictures and prompts, prepares both as the official package does, and scores them in batches,
   without gradients.
3. `make reference` proves every score equal to the official package's, in an environment of its own (docs/rewards.md).
   vlm needs none: transformers itself is the official package, and tests/test_vlm.py compares with what it generates.

Each model gets the preparation that it was trained with, down to how half a pixel is rounded; they differ:

    reward                         resized to         then                                bicubic filter
    hpsv2                          longer side 224    black bars                          torch's, on floats
    clip, aesthetic, imagereward   shorter side 224   centre crop, half a pixel to even   Pillow's, on bytes
    pickscore                      shorter side 224   centre crop, half a pixel down      Pillow's, on bytes
    videoalign                     multiples of 28    rounded to bytes                    torch's, on floats
    vlm, vlm-7b                    multiples of 28    nothing                             Pillow's, on bytes

Why the packages are not simply imported: they pin old libraries (requirements-reference.txt), which cannot be installed
beside those that run FLUX and Wan.
"""

import ast
import html
import json
import math
import re
import weakref
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import ftfy
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    BertTokenizer,
    BlipTextModel,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen2VLModel,
)
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig

from pretrained import FILES, TOKEN, Setup, build, read_weights, renamed, tokenizer, weight_files

# Mean and standard deviation of the colours that all these models were trained with, RGB in [0, 1].
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# ----------------------------------------------------------------------------------------------- what all of them share
class CannotScore(ValueError):
    """A picture or a prompt that a reward cannot score, or a score that is not a finite number."""


def to_uint8(pictures: Tensor) -> np.ndarray:
    """(..., 3, H, W) in [0, 1] -> (..., H, W, 3) uint8, rounded: what a saved picture would hold."""
    return (pictures.detach().float().clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()


class Scorer:
    """A frozen model on the policy's device that scores pictures in batches and without gradients.

    A subclass sets `setup` and `models`, and defines `scores(pictures (B, H, W, 3) uint8, prompts) -> (B,)`; for
    VideoAlign these are (B, F, H, W, 3) and (B, 3). Pictures become bytes first, since the official packages read them
    from files, which hold bytes.
    """

    setup: Setup
    models: list[torch.nn.Module]

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) float32 scores on the CPU."""
        # With offload the models wait on the CPU between two calls; else this does nothing from the second call on.
        for model in self.models:
            model.to(self.setup.device)

        # Picture i stands beside prompt i, also in batch j, which holds the pictures j n .. j n + n - 1.
        n = self.setup.batch
        scores = [self.scores(to_uint8(x), prompts[j * n : (j + 1) * n]) for j, x in enumerate(pictures.split(n))]

        if self.setup.offload:
            for model in self.models:
                model.to("cpu")
        return torch.cat(scores).float().cpu()

    def pixels(self, x: Tensor) -> Tensor:
        """(..., 3, h, w) in [0, 1] -> the same, normalised with CLIP's mean and std, on the device and in its dtype."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        return ((x - mean) / std).to(self.setup.device, self.setup.dtype)


def linear_head(state: dict[str, Tensor], path: Path, width: int) -> torch.nn.Sequential:
    """The head that ImageReward and the aesthetic predictor share: five linear layers in a row, nothing between them.

    Args:
        state: its weights, under the official names. path: the file that they come from, for the error.
        width: of the features that it reads; it narrows them to 1024, 128, 64, 16 and 1.

    Raises:
        ValueError: if a weight is missing, left over or of another shape.
    """
    head = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in pairwise((width, 1024, 128, 64, 16, 1))))

    # The official head has dropout at the places 1, 3 and 5. It does nothing when scoring, so it is left out here, and
    # the linear layers move up: "layers.2.weight" becomes "1.weight". Any other name stays, and is refused below.
    places = {"layers.0": "0", "layers.2": "1", "layers.4": "2", "layers.6": "3", "layers.7": "4"}
    moved = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        moved[f"{places.get(layer, layer)}.{kind}"] = value

    try:
        head.load_state_dict(moved)
    except RuntimeError as error:  # of several lines
        raise ValueError(f"{path} does not hold this head: {' '.join(str(error).split())}") from error
    return head.eval().requires_grad_(False)


# ------------------------------------------------------------------- the CLIP family: hpsv2, pickscore, clip, aesthetic
VIT_H = CLIPConfig(  # open_clip's ViT-H-14, 986M parameters
    text_config={"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    | {"hidden_act": "gelu", "projection_dim": 1024},
    vision_config={"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32}
    | {"patch_size": 14, "hidden_act": "gelu", "projection_dim": 1024},
    projection_dim=1024,
)

# open_clip's names of weights -> transformers', applied in this order. For instance
# visual.transformer.resblocks.0.mlp.c_fc.bias -> vision_model.transformer.resblocks.0.mlp.c_fc.bias
#   -> vision_model.encoder.layers.0.mlp.c_fc.bias -> vision_model.encoder.layers.0.mlp.fc1.bias
OPEN_CLIP = {
    r"^visual\.proj$": "visual_projection.weight",
    r"^text_projection$": "text_projection.weight",
    r"^visual\.": "vision_model.",
    r"^(token_embedding|positional_embedding|transformer|ln_final)": r"text_model.\1",
    r"transformer\.resblocks": "encoder.layers",
    r"\.(class_embedding|token_embedding)": r".embeddings.\1",
    r"\.positional_embedding": ".embeddings.position_embedding.weight",
    r"\.conv1\.": ".embeddings.patch_embedding.",
    r"\.ln_pre\.": ".pre_layrnorm.",  # so misspelt in transformers
    r"\.ln_post\.": ".post_layernorm.",
    r"\.ln_final\.": ".final_layer_norm.",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.attn\.": ".self_attn.",
    r"\.c_fc\.": ".fc1.",
    r"\.c_proj\.": ".fc2.",
}


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's CLIP weights under transformers' names and in its shapes."""
    out = {}
    for key, value in renamed(state, OPEN_CLIP).items():
        # open_clip multiplies features by the projection, transformers by its transpose.
        if key.endswith("_projection.weight"):
            value = value.T.contiguous()

        # open_clip stacks queries, keys and values: in_proj_weight (3C, C) becomes q_proj.weight, k_proj.weight and
        # v_proj.weight, each (C, C). They are copies, so that no weight shares memory with another.
        if ".in_proj_" in key:
            for letter, block in zip("qkv", value.chunk(3)):
                out[key.replace("in_proj_", f"{letter}_proj.")] = block.clone()
        else:
            out[key] = value
    return out


def square(pictures: np.ndarray, size: int, crop=round) -> Tensor:
    """CLIP's preparation of a picture: the shorter side resized to `size` by Pillow's bicubic filter, a centre crop.

    For instance 97 x 301 pixels become 224 x 695 of them, and then the 224 in the middle: (695 - 224) / 2 = 235.5.

    Args:
        pictures: (B, H, W, 3) uint8.
        size: s, in pixels.
        crop: how half a pixel is rounded. OpenAI's, open_clip's and ImageReward's code take `round`, to the even number
            (236 above); transformers, and so PickScore, takes `math.floor` (235).

    Returns:
        (B, 3, s, s) float in [0, 1].
    """
    # The longer side keeps the aspect ratio, rounded down: int(224 * 301 / 97) = 695.
    height, width = pictures.shape[1:3]
    short = min(height, width)
    h, w = (size if x == short else int(size * x / short) for x in (height, width))

    # Of the crop, in resized pixels, as Pillow wants it: left, top, right, bottom.
    top, left = crop((h - size) / 2), crop((w - size) / 2)
    box = (left, top, left + size, top + size)

    # Pillow's filter works on bytes and rounds between the two axes, so no filter on tensors gives the same pixels.
    resized = [Image.fromarray(picture).resize((w, h), Image.BICUBIC) for picture in pictures]
    cropped = np.stack([np.asarray(picture.crop(box)) for picture in resized])  # (B, s, s, 3)
    return torch.from_numpy(cropped).permute(0, 3, 1, 2).float() / 255


def padded(pictures: np.ndarray, size: int) -> Tensor:
    """HPSv2's preparation of a picture: the longer side resized to `size`, black bars where nothing is left.

    Unlike CLIP's it shows the whole picture. For instance a picture 64 wide and 32 high becomes 224 wide and 112 high,
    between two bars of 56.

    Args:
        pictures: (B, H, W, 3) uint8.
        size: s, in pixels.

    Returns:
        (B, 3, s, s) float; the filter may overshoot [0, 1] a little, as it does in the package.
    """
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)

    # A picture of 1 x 500 would vanish: at least one pixel of it stays.
    scale = size / max(x.shape[2:])
    h, w = (max(1, round(d * scale)) for d in x.shape[2:])
    if scale != 1:
        x = F.interpolate(x, (h, w), mode="bicubic", antialias=True, align_corners=False)

    # F.pad takes left, right, top, bottom. An odd pixel goes right or below.
    top, left = (size - h) // 2, (size - w) // 2
    return F.pad(x, (left, size - w - left, top, size - h - top))


def clean(prompt: str) -> str:
    """What OpenAI's and open_clip's tokenizers do to a prompt first: mend encodings, resolve entities, lower its case.

    For instance " CafÃ© &amp;amp; TEA " becomes "café & tea".
    """
    # Twice, because texts from the web are often escaped twice: &amp;amp; -> &amp; -> &.
    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip().lower()

    # A prompt that spells out a special token means its letters. transformers' tokenizer would see the token itself,
    # and an end token cuts the prompt off, so the spelling is broken up: <|endoftext|> -> <| endoftext |>.
    return re.sub(r"<\|(startoftext|endoftext)\|>", r"<| \1 |>", text)


class PickScore(Scorer):
    """PickScore v1 (arXiv:2305.01569): exp(logit scale) x cosine, in a CLIP ViT-H-14 tuned on Pick-a-Pic's choices.

    The range is [-100, 100], in practice 17 to 25; higher is preferred. Papers that print 0.22 print the cosine.
    A picture is seen at 224 pixels, centre crop. Weights: yuvalkirstain/PickScore_v1 (MIT).
    Hacked by glossy, centred, over-detailed pictures.

    It is also the base of the other CLIPs, which differ in `name`, `preprocess`, `clean`, `read` and `scores`.
    """

    name = "pickscore"

    # Its authors published it for transformers, whose processor rounds half a pixel of the crop down, and whose
    # tokenizer is given the prompt as it stands.
    preprocess, clean = staticmethod(partial(square, crop=math.floor)), staticmethod(str)

    def __init__(self, setup: Setup):
        self.setup, self.files = setup, weight_files(self.name, setup)
        config, state = self.read()
        self.model = build(CLIPModel, config, state, self.files[0], setup.dtype)

        # CLIP learns log(100) or so, and multiplies cosines by its exponential. It is kept in float32.
        self.models, self.scale = [self.model], state["logit_scale"].float().exp()

        # All rewards of this family read with CLIP's vocabulary, from different places of FILES.
        path_of = {file: path for (_, file), path in zip(FILES[self.name], self.files)}
        size = config.text_config.vocab_size
        self.tokenizer = tokenizer(CLIPTokenizer, size, path_of["vocab.json"], path_of["merges.txt"])

    def read(self) -> tuple[CLIPConfig, dict[str, Tensor]]:
        """Config and weights of a CLIP in transformers' own format.

        Raises:
            ValueError: if a file is damaged.
        """
        # Older versions of transformers also stored 0, 1, 2, ... as `position_ids`; today's have no such weight.
        state = {k: v for k, v in read_weights(self.files[0]).items() if not k.endswith("position_ids")}
        try:
            return CLIPConfig.from_json_file(self.files[1]), state
        except Exception as error:  # a file that holds no object, or values of other types, raises nearly anything
            raise ValueError(f"{self.files[1]} is damaged: fetch it again") from error

    def image_features(self, pictures: np.ndarray) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, C) features of length 1, float32."""
        x = self.preprocess(pictures, self.model.config.vision_config.image_size)
        return F.normalize(self.model.get_image_features(self.pixels(x)).pooler_output.float(), dim=-1)

    def text_features(self, prompts: list[str]) -> Tensor:
        """B prompts -> (B, C) features of length 1, float32."""
        # The leaves of a tree have the same prompt: each different prompt is encoded once.
        distinct = list(dict.fromkeys(prompts))

        # The packages pad to 77 tokens, this to the longest prompt. The result is equal without a mask: the text tower
        # is causal and its feature is read at the end token, so what stands behind that token is never seen.
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer([self.clean(p) for p in distinct], padding=True, truncation=True, max_length=length)
        ids = torch.tensor(ids["input_ids"], device=self.setup.device)  # (distinct, tokens)
        features = F.normalize(self.model.get_text_features(ids).pooler_output.float(), dim=-1)  # (distinct, C)

        # Back to one row per picture: prompts a a b have the distinct ones a b, and take their rows 0 0 1.
        return features[[distinct.index(p) for p in prompts]]

    def scores(self, pictures: np.ndarray, prompts: list[str]) -> Tensor:
        """(B,) scaled cosines of each picture with its prompt."""
        return self.scale * (self.image_features(pictures) * self.text_features(prompts)).sum(1)


class ClipScore(PickScore):
    """CLIPScore (arXiv:2104.08718): 100 x cosine, the model's own logit, in OpenAI's CLIP ViT-L/14.

    The range is [-100, 100], in practice 15 to 35; higher is closer to the prompt. A picture is seen at 224 pixels,
    centre crop. Weights: openai/clip-vit-large-patch14 (MIT).
    Hacked by writing the prompt into the picture, and by repeating its objects.
    """

    # As OpenAI's own code prepares them; it was not written for transformers.
    name = "clip"
    preprocess, clean = staticmethod(square), staticmethod(clean)


class Hpsv2(ClipScore):
    """HPS v2.1 (arXiv:2306.09341): the cosine of picture and prompt, in a CLIP ViT-H-14 tuned on human preferences.

    The range is [-1, 1], in practice 0.15 to 0.40; higher is preferred. A picture is seen whole at 224 pixels, with
    black bars. Weights: xswu/HPSv2 (Apache-2.0).
    Hacked by saturated, high-contrast, illustration-like pictures.
    """

    name, preprocess = "hpsv2", staticmethod(padded)

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.scale = 1.0  # its package returns the bare cosine

    def read(self) -> tuple[CLIPConfig, dict[str, Tensor]]:
        """Config and weights of open_clip's ViT-H-14."""
        return VIT_H, from_open_clip(read_weights(self.files[0]))


class Aesthetic(ClipScore):
    """LAION's aesthetic predictor: a linear head on the picture features of OpenAI's CLIP ViT-L/14.

    The range is about 1 to 10, in practice 4 to 7; higher is prettier. The prompt does not count. A picture is seen at
    224 pixels, centre crop. Head: christophschuhmann/improved-aesthetic-predictor (Apache-2.0).
    Hacked by leaving the prompt for painterly portraits and landscapes.
    """

    name = "aesthetic"

    def __init__(self, setup: Setup):
        super().__init__(setup)
        path = self.files[-1]
        self.head = linear_head(read_weights(path), path, self.model.config.projection_dim)
        self.models.append(self.head)

    def scores(self, pictures: np.ndarray, prompts: list[str]) -> Tensor:
        """(B,) scores of the pictures; the prompts are not looked at."""
        return self.head(self.image_features(pictures))[:, 0]


# -------------------------------------------------------------------------------------------------------- imagereward
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
BLIP_VISION = BlipVisionConfig(**VIT_L, image_size=224, patch_size=16, layer_norm_eps=1e-6)

# BERT-base, whose every layer also looks at the 1024-wide output of BLIP_VISION.
BLIP_TEXT = BlipTextConfig(vocab_size=30524, encoder_hidden_size=1024, num_attention_heads=12)

# ImageReward's names of weights -> the tower, a dot, and transformers' names.
BLIP = {
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
    """ImageReward v1.0 (arXiv:2304.05977): BLIP's text tower reads the prompt while it looks at the picture.

    The range is about -2.3 to 2.3, normalised by its authors to mean 0 and standard deviation 1; higher is preferred.
    A picture is seen at 224 pixels, centre crop; a prompt up to 35 tokens. Weights: THUDM/ImageReward (Apache-2.0).
    Hacked by exaggerating what the prompt names, at the cost of realism.
    """

    MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores, from the package

    def __init__(self, setup: Setup):
        path, vocabulary = weight_files("imagereward", setup)
        state = renamed(read_weights(path), BLIP)

        # One file holds three models that we use. What still begins with "blip" only its pre-training needed.
        towers = {name: {} for name in ("vision", "text", "mlp", "blip")}
        for key, value in state.items():
            tower, _, rest = key.partition(".")
            if tower not in towers:
                raise ValueError(f"{path} does not fit ImageReward: {key!r} is left over")
            if not rest.endswith("position_ids"):  # 0, 1, 2, ...: no weight any more, see PickScore.read
                towers[tower][rest] = value

        self.vision = build(BlipVisionModel, BLIP_VISION, towers["vision"], path, setup.dtype)
        self.text = build(BlipTextModel, BLIP_TEXT, towers["text"], path, setup.dtype, add_pooling_layer=False)
        self.head = linear_head(towers["mlp"], path, BLIP_TEXT.hidden_size)
        self.models, self.setup = [self.vision, self.text, self.head], setup

        # BLIP added two tokens to BERT's vocabulary, [DEC] and [ENC], which are never read here.
        self.tokenizer = tokenizer(BertTokenizer, BLIP_TEXT.vocab_size - 2, vocabulary)

    def scores(self, pictures: np.ndarray, prompts: list[str]) -> Tensor:
        """(B,) scores, normalised with the package's mean and standard deviation."""
        device = self.setup.device

        # 224 pixels in patches of 16 are 14 x 14 = 196 tokens, and a class token before them.
        x = self.pixels(square(pictures, self.vision.config.image_size))
        image_tokens = self.vision(x).last_hidden_state  # (B, 197, 1024)

        # Every token of the prompt looks at the picture. Unlike CLIP's the tower looks both ways, so the padding of
        # shorter prompts must be masked; of the picture's tokens none is.
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=35, return_tensors="pt").to(device)
        hidden = self.text(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=image_tokens,
            encoder_attention_mask=torch.ones(image_tokens.shape[:2], dtype=torch.long, device=device),
        ).last_hidden_state  # (B, L, 768)

        # The first token, [CLS], stands for the whole.
        return (self.head(hidden[:, 0].float())[:, 0] - self.MEAN) / self.STD


# --------------------------------------------------------------------------------------------------------- videoalign
QWEN2_VL = Qwen2VLConfig(  # Qwen2-VL-2B, and VideoAlign's three tokens in its vocabulary
    text_config={"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    | {"num_key_value_heads": 2, "vocab_size": 151660, "rms_norm_eps": 1e-6}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
    vision_config={"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536},
)

# VideoAlign's names of weights -> transformers'.
QWEN = {r"^base_model\.model\.": "", r"^model\.": "language_model.", r"\.base_layer\.": "."}

# Qwen2-VL's chat template, of one question about one video.
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{video}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)
PAD = "<|video_pad|>"  # the place of one token of the video in the text
RATINGS = ("VQ", "MQ", "TA")  # visual quality, motion quality, text alignment
PATCH = 14  # pixels; the model merges 2 x 2 patches into a token, so a frame's sides are multiples of 28


def no_tokens(prompt: str, reward: str = "videoalign") -> None:
    """Refuse a prompt that spells out one of Qwen's own tokens: it could pose as the place of a rating or of a picture.

    Args:
        prompt: to be checked. reward: that it is for, which the message names.

    Raises:
        CannotScore: naming the prompt.
    """
    if re.search(TOKEN, prompt):
        raise CannotScore(f"the {reward} reward has tokens written <|so|>; the prompt {prompt!r} holds one")


def frame_size(height: int, width: int, most: int, least: int = 128 * 28**2) -> tuple[int, int]:
    """Qwen2-VL's size of a frame: multiples of 28, between `least` and `most` pixels, the aspect ratio nearly kept.

    With most = 200,704 a frame of 480 x 832 becomes 336 x 588, and one of 32 x 32 becomes 336 x 336.

    Args:
        height, width: in pixels.
        most, least: pixels of a frame, height times width.
    """
    # The nearest multiples; they serve if their area is allowed.
    h, w = (max(28, round(d / 28) * 28) for d in (height, width))

    # Else both sides are divided by one scale, and rounded to the allowed side: down if too large, up if too small.
    # 480 x 832: the scale is sqrt(480 * 832 / 200,704) = 1.41; 480 / 1.41 = 340.3 -> 336, 832 / 1.41 = 589.8 -> 588.
    scale = math.sqrt(height * width / (most if h * w > most else least))
    if h * w > most:
        return math.floor(height / scale / 28) * 28, math.floor(width / scale / 28) * 28
    return (math.ceil(height / scale / 28) * 28, math.ceil(width / scale / 28) * 28) if h * w < least else (h, w)


def merged(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A LoRA added once and for all: W + (alpha / r) B A stands under W's own name (arXiv:2106.09685, Eq. 3).

    Args:
        state: weights W "NAME.weight", A "NAME.lora_A.default.weight" and B "NAME.lora_B.default.weight".
        scale: alpha / r.
    """
    out = {key: value for key, value in state.items() if ".lora_" not in key}
    for key in [key for key in state if ".lora_A." in key]:
        down, up = state[key].float(), state[key.replace("lora_A", "lora_B")].float()  # A (r, in), B (out, r)

        # W is stored in bfloat16: the sum is taken in float32 and rounded once.
        name = key.replace("lora_A.default.", "")
        weight = out[name]  # W (out, in)
        out[name] = (weight.float() + scale * up @ down).to(weight.dtype)
    return out


class VideoAlign(Scorer):
    """VideoReward of VideoAlign (arXiv:2501.13918): Qwen2-VL-2B watches a video, and a head rates it three times.

    The ratings are visual quality, motion quality and text alignment. Each is about -2 to 2, with mean 0 and standard
    deviation 1 over its authors' videos; higher is better. It watches 2 frames per second, and at least 4, of at most
    200,704 pixels each, so a rating depends on the frame rate. Weights: KwaiVGI/VideoReward (Apache-2.0).
    Hacked by slow, smooth, glossy videos.

    As in its authors' code, the tokens of a video are counted like words, without positions in time and space.
    """

    def __init__(self, setup: Setup):
        path, settings, vocabulary, template = weight_files("videoalign", setup)
        try:
            # The question is a string in a file of Python code. The code is parsed, not run.
            config, code = json.loads(settings.read_text()), ast.parse(template.read_text())
            assigned = {n.targets[0].id: n.value for n in code.body if isinstance(n, ast.Assign)}
            self.question = ast.literal_eval(assigned["DETAILED_PROMPT_WITH_SPECIAL_TOKEN"])

            # How videos are read, the LoRA's scale, and mean and spread of each rating.
            self.video_config, lora, norm = (config[f"{name}_config"] for name in ("data", "peft_lora", "inference"))
            self.mean, self.std = (torch.tensor([norm[f"{d}_{k}"] for d in RATINGS]) for k in ("mean", "std"))
            self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(vocabulary), pad_token="<|endoftext|>")
        except Exception as error:  # the tokenizers library raises bare Exceptions
            names = f"{settings}, {template} or {vocabulary}"
            raise ValueError(f"{names} is damaged ({type(error).__name__}: {error}): fetch it again") from error

        # Three tokens that ask for a rating. They take the next numbers, as they did in training.
        self.tokenizer.add_tokens([f"<|{d}_reward|>" for d in RATINGS], special_tokens=True)
        if len(self.tokenizer) != QWEN2_VL.text_config.vocab_size:
            raise ValueError(f"{vocabulary} is damaged: {len(self.tokenizer)} tokens; fetch it again")

        # rm_head rates a token. lm_head predicts the next word, which nobody asks for here.
        state = renamed(read_weights(path), QWEN)
        try:
            state = merged(state, lora["lora_alpha"] / lora["lora_r"])
            head, _ = state.pop("rm_head.weight"), state.pop("lm_head.weight")
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{path} does not fit VideoAlign ({error}): fetch it again") from error

        self.model = build(Qwen2VLModel, QWEN2_VL, state, path, setup.dtype)
        self.head = torch.nn.Linear(head.shape[1], 1, bias=False).requires_grad_(False)  # float32
        self.head.weight.copy_(head)

        # last_call: a weak reference to the videos of the last call, its prompts and frame rate, and its ratings.
        self.models, self.setup, self.last_call = [self.model, self.head], setup, None
        self.fps = setup.fps

    def __call__(self, videos: Tensor, prompts: list[str], fps: float | None = None) -> Tensor:
        """(B, F, 3, H, W) in [0, 1] and B prompts -> (B, 3) ratings, float32 on the CPU.

        The rewards -vq, -mq and -ta ask for the same videos one after the other: the ratings of the last call are kept.

        Args:
            videos, prompts: see above.
            fps: frames per second of these videos; None: those of the setup.

        Raises:
            CannotScore: if these are no videos of two frames or more.
        """
        if videos.ndim != 5 or videos.shape[1] < 2:
            raise CannotScore("the videoalign reward needs videos of two frames or more")

        # The same tensor, not an equal one: that is quick to tell. The reference is weak, so that the videos' memory is
        # freed when nobody else needs them, and a new tensor at their address is not taken for them.
        asked = prompts, fps or self.setup.fps
        if self.last_call is None or self.last_call[0]() is not videos or self.last_call[1] != asked:
            self.fps = asked[1]
            self.last_call = weakref.ref(videos), asked, super().__call__(videos, prompts)
        return self.last_call[2]

    def frames(self, videos: np.ndarray) -> Tensor:
        """The frames that are watched, n of them, resized: (B, F, H, W, 3) uint8 -> (B, n, 3, h, w) in [0, 1]."""
        # 2 frames per second and at least 4, but not more than there are, and an even number: a patch covers two.
        # At 16 frames per second 81 frames last 81 / 16 = 5.06 s, which asks for 10.1 frames: 10. 33 ask for 4.1: 4.
        total, (height, width) = videos.shape[1], videos.shape[2:4]
        n = round(min(max(total / self.fps * self.video_config["fps"], 4), total // 2 * 2) / 2) * 2

        # Evenly spread, the first and the last among them: 4 of 33 are 0, 11, 21, 32.
        x = torch.from_numpy(videos[:, torch.linspace(0, total - 1, n).round().long().numpy()])  # (B, n, H, W, 3)

        # The package resizes with torch and then stores bytes, so the result is rounded to bytes here too.
        h, w = frame_size(height, width, self.video_config["max_frame_pixels"])
        x = x.movedim(-1, 2).flatten(0, 1).float()  # (B n, 3, H, W)
        x = F.interpolate(x, (h, w), mode="bicubic", antialias=True, align_corners=False)
        return x.clamp(0, 255).round().unflatten(0, (-1, n)) / 255

    def scores(self, videos: np.ndarray, prompts: list[str]) -> Tensor:
        """(B, F, H, W, 3) uint8 -> (B, 3) ratings, normalised with the authors' means and standard deviations."""
        device = self.setup.device
        x = self.pixels(self.frames(videos))
        b, n, _, h, w = x.shape
        grid = (n // 2, h // PATCH, w // PATCH)  # patches in time, rows and columns; one patch covers 2 frames

        # Cut into patches. The model merges squares of 2 x 2 patches into a token, so the four of a square must stand
        # together. One pair of frames of 28 x 56 pixels has 2 x 4 patches, which come square by square:
        #     0 1 | 2 3
        #     4 5 | 6 7     ->  0 1 4 5, 2 3 6 7
        # The axes after `view`: 0 video, 1 pair of frames, 2 frame of the pair, 3 colour, 4 row of squares, 5 patch
        # row in the square, 6 pixel row in the patch, and 7, 8, 9 the same for columns. After `permute`: which patch
        # (video, pair, square row, square column, row in it, column in it), then what is in it (colour, frame, pixels).
        x = x.view(b, n // 2, 2, 3, h // 28, 2, PATCH, w // 28, 2, PATCH)
        x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(b * math.prod(grid), -1)  # (all patches, 3 * 2 * 14 * 14)

        # The text has one <|video_pad|> for each token of the video, that is for four patches. Then comes the question.
        video = PAD * (math.prod(grid) // 4)
        texts = [CHAT.format(video=video, question=self.question.format(text_prompt=p)) for p in prompts]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(device)  # (B, L)

        # Qwen2-VL gives each token three positions, in time, row and column. The authors' code passes none, and the
        # transformers of its day then counted 0, 1, 2, ... in all three: the weights were trained so.
        positions = torch.arange(tokens.input_ids.shape[1], device=device).expand(3, b, -1)  # (3, B, L)
        grids = torch.tensor([grid] * b, device=device)  # (B, 3)
        watched = {"pixel_values_videos": x, "video_grid_thw": grids, "position_ids": positions}
        hidden = self.model(tokens.input_ids, tokens.attention_mask, **watched).last_hidden_state  # (B, L, C)

        # The question holds one token for each rating, in the order VQ, MQ, TA. The mask picks the states there, video
        # by video, so the rows are VQ MQ TA of the first video, VQ MQ TA of the second, ...
        asking = torch.tensor(self.tokenizer.convert_tokens_to_ids([f"<|{d}_reward|>" for d in RATINGS]), device=device)
        rated = self.head(hidden[torch.isin(tokens.input_ids, asking)].float()).view(b, 3)
        return (rated.cpu() - self.mean) / self.std


# One model for all rewards of the same setup and for all frame rates, since each would need its own 5 GB.
shared_video_align = lru_cache(maxsize=1)(VideoAlign)


def video_align(which: slice, setup: Setup):
    """The reward that sums some of VideoAlign's ratings; `which` is a slice of (VQ, MQ, TA), as in pretrained.PARTS."""
    model = shared_video_align(setup)
    return lambda videos, prompts: model(videos, prompts, setup.fps)[:, which].sum(1)


# ---------------------------------------------------------------------------------------------------------------- vlm
# Qwen2.5-VL's names of weights -> transformers'.
QWEN2_5 = {r"^visual\.": "model.visual.", r"^model\.(?!visual\.)": "model.language_model."}
PICTURE = "<|image_pad|>"  # the place of one token of the picture in the text


class Vlm(Scorer):
    """How sure Qwen2.5-VL is of Yes when it is asked about picture and prompt, in the manner of VQAScore.

        score = P(Yes) / (P(Yes) + P(No)) = 1 / (1 + exp(l_No - l_Yes))

    with P the probabilities of the first token of its answer and l their logits. The range is [0, 1]; higher is closer
    to the prompt. What is asked is `setup.question`. Weights: Qwen/Qwen2.5-VL-3B-Instruct (Qwen Research License: no
    commercial use) or, as vlm-7b, Qwen/Qwen2.5-VL-7B-Instruct (Apache-2.0).
    Hacked by whatever the question leaves out, and by the prompt written into the picture.

    VQAScore (arXiv:2404.01291) takes P(Yes) alone, out of all tokens of the vocabulary. That also rises when the model
    merely puts its answer in the form that is asked for, for instance Yes instead of yes or This, and a policy would be
    paid for it. Between Yes and No only the verdict counts. The difference is score - P(Yes) = score (1 - P(Yes) -
    P(No)): at most 0.01 where Yes and No have 99 per cent of the probability.
    """

    def __init__(self, name: str, setup: Setup):
        *weights, settings, preparation, vocabulary, template = weight_files(name, setup)
        try:
            config = Qwen2_5_VLConfig(**json.loads(settings.read_text()))
            self.prepare = Qwen2VLImageProcessorPil(**json.loads(preparation.read_text()))
            self.template = json.loads(template.read_text())["chat_template"]

            # Padding stands on the left, so that the answer begins in the last column whatever the prompt's length.
            arguments = {"pad_token": "<|endoftext|>", "padding_side": "left"}
            self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(vocabulary), **arguments)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            names = f"{settings}, {preparation}, {template} or {vocabulary}"
            raise ValueError(f"{names} is damaged ({type(error).__name__}: {error}): fetch it again") from error

        # Another model's vocabulary would score too, and wrongly. This one has Yes and No as whole tokens, and numbers
        # the place of a picture as the config says. (The config's vocabulary is a little larger: the rest is unused.)
        self.yes_and_no = self.tokenizer.convert_tokens_to_ids(["Yes", "No"])
        if None in self.yes_and_no or self.tokenizer.convert_tokens_to_ids(PICTURE) != config.image_token_id:
            raise ValueError(f"{vocabulary} is damaged or not that of {settings}: fetch it again")

        # The smaller model's output weights are its embedding, which its files hold only once.
        state = {}
        for path in weights:
            state |= renamed(read_weights(path), QWEN2_5)
        if config.tie_word_embeddings and "model.language_model.embed_tokens.weight" in state:
            state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]

        all_files = weights[0].with_name("model-*.safetensors")  # for errors: the files are one model
        self.model = build(Qwen2_5_VLForConditionalGeneration, config, state, all_files, setup.dtype)
        self.models, self.setup = [self.model], setup

    def text(self, prompt: str) -> str:
        """What the model reads: a conversation of one message, the picture and the question, up to the answer."""
        # `replace` and not `format`: a prompt may hold braces of its own.
        question = {"type": "text", "text": self.setup.question.replace("{prompt}", prompt)}
        message = {"role": "user", "content": [{"type": "image"}, question]}

        rendering = {"chat_template": self.template, "add_generation_prompt": True, "tokenize": False}
        return self.tokenizer.apply_chat_template([message], **rendering)

    def scores(self, pictures: np.ndarray, prompts: list[str]) -> Tensor:
        """(B, H, W, 3) uint8 -> (B,) scores in [0, 1]."""
        device = self.setup.device

        # Resized to multiples of 28, normalised, and cut into patches of 14 x 14 pixels. `grids` are the numbers of
        # patches in time, in a column and in a row, all pictures being of one size. 64 x 128 pixels become 56 x 140 and
        # 1 x 4 x 10 patches; each of them holds its picture twice, as if it were two frames of a video.
        prepared = self.prepare(list(pictures), input_data_format="channels_last", return_tensors="pt").to(device)
        pixels, grids = prepared["pixel_values"], prepared["image_grid_thw"]  # (all patches, 3 * 2 * 14 * 14), (B, 3)

        # The text has one <|image_pad|>. The model wants one for each token of the picture, that is for 2 x 2 patches.
        places = PICTURE * (int(grids[0].prod()) // self.prepare.merge_size**2)
        texts = [self.text(prompt).replace(PICTURE, places) for prompt in prompts]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(device)  # (B, L)

        # 1 for the tokens of the picture, 0 for words. Without it the model would count the former like words, and not
        # give them rows and columns.
        kinds = (tokens.input_ids == self.model.config.image_token_id).int()  # (B, L)
        seen = {"pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": kinds, "use_cache": False}
        hidden = self.model.model(tokens.input_ids, tokens.attention_mask, **seen).last_hidden_state  # (B, L, C)

        # The last state says what comes next. Only the logits of Yes and No are needed, and they are evaluated in
        # float32: bfloat16 has no number between 20 and 20.125, and many leaves would tie.
        head = self.model.lm_head.weight[self.yes_and_no].float()  # (2, C)
        return (hidden[:, -1].float() @ head.T).softmax(1)[:, 0]
