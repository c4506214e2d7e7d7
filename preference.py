"""Preference models: rewards that people's choices were fitted to, run by transformers from their official weights.

    hpsv2, pickscore, clip, aesthetic   a CLIP's cosine of picture and prompt, or a head on its picture features
    imagereward                         BLIP: the text tower reads the prompt while looking at the picture
    videoalign                          Qwen2-VL watches the video and rates quality, motion and text alignment

1. weight_files finds the official files, or says how to fetch them; read_weights, build: exactly these weights, or an error
2. a Scorer prepares pixels and words as the official package does, and scores in batches without gradients
3. `make reference` proves every score equal to the official package's, in an environment of its own
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
    Qwen2VLConfig,
    Qwen2VLModel,
)
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig

from pretrained import FILES, Setup, build, read_weights, renamed, tokenizer, weight_files


class CannotScore(ValueError):
    """A picture or a prompt that a reward cannot score, or a score that is not a finite number."""


def to_uint8(pictures: Tensor) -> np.ndarray:
    """(..., 3, H, W) in [0, 1] -> (..., H, W, 3) uint8, rounded: what a saved picture would hold."""
    return (pictures.detach().float().clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()


# --------------------------------------------------------------------------------------------------------- weights


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def linear_head(state: dict[str, Tensor], path: Path, width: int) -> torch.nn.Sequential:
    """The head that ImageReward and the aesthetic predictor share: five linear layers in a row, nothing between them.

    Raises:
        ValueError: if a weight is missing, left over or of another shape.
    """
    head = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in pairwise((width, 1024, 128, 64, 16, 1))))
    places = {"layers.0": "0", "layers.2": "1", "layers.4": "2", "layers.6": "3", "layers.7": "4"}  # between: dropout
    try:
        parts = ((*key.rpartition(".")[::2], v) for key, v in state.items())
        head.load_state_dict({f"{places.get(layer, layer)}.{kind}": v for layer, kind, v in parts})
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold this head: {' '.join(str(error).split())}") from error
    return head.eval().requires_grad_(False)


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
        n = self.setup.batch
        parts = [self.scores(to_uint8(p), prompts[i * n : (i + 1) * n]) for i, p in enumerate(pictures.split(n))]
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


# ----------------------------------------------------------------------------------------------------------- videoalign
QWEN2_VL = Qwen2VLConfig(  # Qwen2-VL-2B with VideoAlign's three tokens
    text_config={"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    | {"num_key_value_heads": 2, "vocab_size": 151660, "rms_norm_eps": 1e-6}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
    vision_config={"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536},
)
# VideoAlign's names -> transformers'
QWEN = {r"^base_model\.model\.": "", r"^model\.": "language_model.", r"\.base_layer\.": "."}
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{video}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)
PAD, RATINGS = "<|video_pad|>", ("VQ", "MQ", "TA")
PATCH, FPS = 14, 16  # pixels;  frames a second of Wan2.1's videos


def no_tokens(prompt: str) -> None:
    """Raises CannotScore if a prompt spells out one of Qwen2-VL's own tokens."""
    if re.search(r"<\|\w+\|>", prompt):
        raise CannotScore(f"the videoalign reward has tokens written <|so|>; the prompt {prompt!r} holds one")


def frame_size(height: int, width: int, most: int, least: int = 128 * 28**2) -> tuple[int, int]:
    """Qwen2-VL's size of a frame: multiples of 28, between `least` and `most` pixels, the aspect ratio nearly kept."""
    h, w = (max(28, round(d / 28) * 28) for d in (height, width))
    scale = math.sqrt(height * width / (most if h * w > most else least))
    if h * w > most:
        return math.floor(height / scale / 28) * 28, math.floor(width / scale / 28) * 28
    return (math.ceil(height / scale / 28) * 28, math.ceil(width / scale / 28) * 28) if h * w < least else (h, w)


def merged(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """LoRA added once and for all: W + alpha/r B A under W's own name."""
    out = {k: v for k, v in state.items() if ".lora_" not in k}
    for key in [k for k in state if ".lora_A." in k]:
        down, up = state[key].float(), state[key.replace("lora_A", "lora_B")].float()
        weight = out[name := key.replace("lora_A.default.", "")]
        out[name] = (weight.float() + scale * up @ down).to(weight.dtype)
    return out


class VideoAlign(Scorer):
    """VideoReward (VideoAlign): Qwen2-VL-2B watches a video and rates visual quality, motion quality and text alignment.

    Each is about -2 to 2, mean 0 and std 1 over its authors' videos; higher is better. Two frames a second and four at least,
    at most 200,704 pixels each. Weights KwaiVGI/VideoReward (Apache-2.0), arXiv:2501.13918. Hacked by: slow, smooth, glossy
    videos. As in its authors' code, a video's tokens are counted like words, without positions in time and space.
    """

    def __init__(self, setup: Setup):
        path, settings, vocabulary, template = weight_files("videoalign", setup)
        try:
            config, code = json.loads(settings.read_text()), ast.parse(template.read_text())
            named = {n.targets[0].id: n.value for n in code.body if isinstance(n, ast.Assign)}
            self.question = ast.literal_eval(named["DETAILED_PROMPT_WITH_SPECIAL_TOKEN"])
            self.data, lora, norm = (config[f"{n}_config"] for n in ("data", "peft_lora", "inference"))
            self.mean, self.std = (torch.tensor([norm[f"{d}_{k}"] for d in RATINGS]) for k in ("mean", "std"))
            self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(vocabulary), pad_token="<|endoftext|>")
        except Exception as error:  # the tokenizers library raises bare Exceptions
            names = f"{settings}, {template} or {vocabulary}"
            raise ValueError(f"{names} is damaged ({type(error).__name__}: {error}): fetch it again") from error
        self.tokenizer.add_tokens([f"<|{d}_reward|>" for d in RATINGS], special_tokens=True)
        if len(self.tokenizer) != QWEN2_VL.text_config.vocab_size:
            raise ValueError(f"{vocabulary} is damaged: {len(self.tokenizer)} tokens; fetch it again")
        state = renamed(read_weights(path), QWEN)
        try:
            state = merged(state, lora["lora_alpha"] / lora["lora_r"])
            head, _ = state.pop("rm_head.weight"), state.pop("lm_head.weight")
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{path} does not fit VideoAlign ({error}): fetch it again") from error
        self.model = build(Qwen2VLModel, QWEN2_VL, state, path, setup.dtype)
        self.head = torch.nn.Linear(head.shape[1], 1, bias=False).requires_grad_(False)
        self.head.weight.copy_(head)
        self.models, self.setup, self.asked = [self.model, self.head], setup, None

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        """(B, F, 3, H, W) -> (B, 3) ratings; asked again about the same videos, it remembers.

        Raises:
            CannotScore: if they are no videos of two frames or more.
        """
        if videos.ndim != 5 or videos.shape[1] < 2:
            raise CannotScore("the videoalign reward needs videos of two frames or more")
        if self.asked is None or self.asked[0]() is not videos or self.asked[1] != prompts:
            self.asked = weakref.ref(videos), prompts, super().__call__(videos, prompts)
        return self.asked[2]

    def frames(self, videos: np.ndarray) -> Tensor:
        """(B, F, H, W, 3) uint8 -> (B, T, 3, h, w) in [0, 1], T even: the frames that are watched, at Qwen2-VL's size."""
        total, (height, width) = videos.shape[1], videos.shape[2:4]
        n = round(min(max(total / FPS * self.data["fps"], 4), total // 2 * 2) / 2) * 2
        h, w = frame_size(height, width, self.data["max_frame_pixels"])
        x = torch.from_numpy(videos[:, torch.linspace(0, total - 1, n).round().long().numpy()])
        x = x.movedim(-1, 2).flatten(0, 1).float()
        x = F.interpolate(x, (h, w), mode="bicubic", antialias=True, align_corners=False)
        return x.clamp(0, 255).round().unflatten(0, (-1, n)) / 255

    def scores(self, videos: np.ndarray, prompts: list[str]) -> Tensor:
        """(B, 3) ratings."""
        device = self.setup.device
        x = self.pixels(self.frames(videos))
        b, n, _, h, w = x.shape
        grid = (n // 2, h // PATCH, w // PATCH)
        # A patch covers 2 frames; patches come in squares of 2 x 2, which the model merges into one token.
        x = x.view(b, n // 2, 2, 3, h // 28, 2, PATCH, w // 28, 2, PATCH)
        x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(b * math.prod(grid), -1)
        video = PAD * (math.prod(grid) // 4)
        texts = [CHAT.format(video=video, question=self.question.format(text_prompt=p)) for p in prompts]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(device)
        places = torch.arange(tokens.input_ids.shape[1], device=device).expand(3, b, -1)
        grids = torch.tensor([grid] * b, device=device)
        seen = {"pixel_values_videos": x, "video_grid_thw": grids, "position_ids": places}
        hidden = self.model(tokens.input_ids, tokens.attention_mask, **seen).last_hidden_state
        marks = torch.tensor(self.tokenizer.convert_tokens_to_ids([f"<|{d}_reward|>" for d in RATINGS]), device=device)
        rated = self.head(hidden[torch.isin(tokens.input_ids, marks)].float()).view(b, 3)
        return (rated.cpu() - self.mean) / self.std


shared_video_align = lru_cache(maxsize=1)(VideoAlign)  # its ratings, asked for apart, share one model


def video_align(which: slice, setup: Setup):
    """The reward that sums these of VideoAlign's ratings VQ, MQ, TA."""
    model = shared_video_align(setup)
    return lambda videos, prompts: model(videos, prompts)[:, which].sum(1)
