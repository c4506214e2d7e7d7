"""Seeded random weights, tokenizers, pictures and prompts in the official file layouts, at reduced size.

Both environments run this file, so that the packages and we read the same files. Key names and shapes are those of the
official checkpoints (manifest.json, where `{32}` in a key stands for 0 .. 31); `reduced` keeps two layers and narrows them.
"""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).parent
MANIFEST = json.loads((HERE / "manifest.json").read_text())
LAYERS = 2
NARROW = {
    "hpsv2": {1280: 160, 5120: 640, 3840: 480, 1024: 128, 4096: 512, 3072: 384},
    "pickscore": {1280: 160, 5120: 640, 1024: 128, 4096: 512},
    "clip": {1024: 128, 4096: 512, 768: 64, 3072: 256},
    "imagereward": {1024: 128, 4096: 512, 3072: 384},
    "aesthetic": {768: 64},
}
FILES = {
    "hpsv2": "xswu/HPSv2/HPS_v2.1_compressed.pt",
    "pickscore": "yuvalkirstain/PickScore_v1/model.safetensors",
    "clip": "openai/clip-vit-large-patch14/model.safetensors",
    "imagereward": "THUDM/ImageReward/ImageReward.pt",
    "aesthetic": "christophschuhmann/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth",
}
TOKENS = ("openai/clip-vit-large-patch14", "yuvalkirstain/PickScore_v1")  # folders with a CLIP vocabulary
BERT = "google-bert/bert-base-uncased"
PROMPTS = [
    "a red cat",
    "A photograph of an astronaut riding a horse, 4k, highly detailed",
    "",
    "  two   spaces\tand\na new line ",
    "Tom &amp;amp; Jerry's caf\u00e9, na\u00efve \u201cquotes\u201d",
    "\u4e00\u53ea\u7ea2\u8272\u7684\u732b",
    "\u041a\u0440\u0430\u0441\u043d\u044b\u0439 \u043a\u043e\u0442 \u0438 caf\u00c3\u00a9",
    "1234567890 !?.,;:-()[]{}",
    "very long " * 60,
    "an owl's eyes, they're 100% golden",
    "\u039f\u0394\u039f\u03a3 R&amp;B <|endoftext|> a red cat",
]
SIZES = [(224, 224), (64, 32), (333, 250), (250, 333), (512, 512), (97, 301), (225, 224), (48, 48)]  # width, height


def official(name: str) -> dict[str, list[int]]:
    """All keys and shapes of an official checkpoint."""
    out = {}
    for key, shape in MANIFEST[name].items():
        layers = re.search(r"\{(\d+)\}", key)
        keys = [key.replace(layers[0], str(i)) for i in range(int(layers[1]))] if layers else [key]
        out |= dict.fromkeys(keys, shape)
    return out


def reduced(name: str, vocabulary: int) -> dict[str, list[int]]:
    """The same with two layers a tower, narrower, and a small vocabulary. ImageReward's head and text width stay."""
    narrow = NARROW[name] | {49408: vocabulary, 30524: vocabulary}
    out = {}
    for key, shape in official(name).items():
        layer = re.search(r"\.(?:resblocks|layers|blocks|layer)\.(\d+)\.", key)
        if layer and not key.startswith(("mlp.", "layers.")) and int(layer[1]) >= LAYERS:
            continue
        fixed = (
            key.startswith("mlp.") or key.startswith("layers.") and name == "aesthetic" and not key.endswith("0.weight")
        )
        out[key] = list(shape) if fixed else [narrow.get(n, n) for n in shape]
    return out


def values(shapes: dict[str, list[int]], seed: int) -> dict[str, torch.Tensor]:
    """Random weights that keep activations near 1: the same bits wherever numpy's PCG64 is."""
    rng, out = np.random.default_rng(seed), {}
    for key, shape in shapes.items():
        if key.endswith("position_ids"):
            out[key] = torch.arange(shape[-1])[None]
        elif key == "logit_scale":
            out[key] = torch.tensor(np.log(100), dtype=torch.float32)
        else:
            x = rng.standard_normal(shape, dtype=np.float32)
            if len(shape) == 1:
                x = 0.2 * x + (key.endswith("weight") or key.endswith("logit_scale"))
            elif "embed" not in key:
                x = x / np.float32(np.sqrt(np.prod(shape[1:])))
            out[key] = torch.from_numpy(x.astype(np.float32))
    return out


def byte_letters() -> list[str]:
    """The printable stand-ins of the 256 bytes, in CLIP's order."""
    keep = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in keep] + [chr(256 + i) for i in range(256 - len(keep))]


def clip_tokenizer(folder: Path) -> int:
    """A small byte-level vocabulary in CLIP's layout, for transformers and (bpe.txt.gz) for open_clip; returns its size."""
    merges, have = [], {w for c in byte_letters() for w in (c, c + "</w>")}
    for word in ("cat", "red", "photograph", "astronaut", "riding", "horse", "highly", "very", "long", "golden", "owl"):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if "".join(pair) not in have:
                merges.append(pair)
                have.add("".join(pair))
            pieces = ["".join(pair), *pieces[2:]]
    with gzip.open(folder / "bpe.txt.gz", "wb") as f:
        f.write("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]).encode())
    return write_clip_tokenizer(folder, merges)


def write_clip_tokenizer(folder: Path, merges: list[tuple[str, str]]) -> int:
    """vocab.json and merges.txt as the hub has them; returns the vocabulary's size."""
    letters = byte_letters()
    tokens = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    for sub in TOKENS:
        (folder / sub).mkdir(parents=True, exist_ok=True)
        (folder / sub / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
        (folder / sub / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return len(tokens)


def bert_tokenizer(folder: Path, size: int = 0) -> int:
    """A small WordPiece vocabulary in BERT's layout, filled up to `size`; its size with the two tokens that ImageReward adds."""
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()] + list("\u4e00\u53ea\u7ea2\u8272\u7684\u732b")
    letters += [chr(c) for c in range(0x430, 0x450)]
    words = ["cat", "photograph", "astronaut", "horse", "highly", "detail", "very", "long", "golden", "owl"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), *words, "##ed"]
    tokens += [f"[unused{i}]" for i in range(size - len(tokens))]
    (folder / BERT).mkdir(parents=True, exist_ok=True)
    (folder / BERT / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return len(tokens) + 2


def configs(clip_vocabulary: int, bert_vocabulary: int) -> dict[str, dict]:
    """What transformers needs to know of the reduced models."""

    def clip(width, heads, text, text_heads, patch, act, dim):
        shared = {"num_hidden_layers": LAYERS, "hidden_act": act, "projection_dim": dim}
        vision = {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": heads,
            "patch_size": patch,
        }
        words = {"hidden_size": text, "intermediate_size": 4 * text, "num_attention_heads": text_heads}
        words |= {"vocab_size": clip_vocabulary, "eos_token_id": clip_vocabulary - 1}
        words |= {"bos_token_id": clip_vocabulary - 2, "pad_token_id": clip_vocabulary - 1}
        return {"vision_config": vision | shared, "text_config": words | shared, "projection_dim": dim}

    return {
        "hpsv2": clip(160, 2, 128, 2, 14, "gelu", 128),
        "pickscore": clip(160, 2, 128, 2, 14, "gelu", 128),
        "clip": clip(128, 2, 64, 1, 14, "quick_gelu", 64),
        "blip_vision": {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "image_size": 224}
        | {"patch_size": 16, "layer_norm_eps": 1e-6, "num_hidden_layers": LAYERS},
        "blip_text": {"vocab_size": bert_vocabulary, "encoder_hidden_size": 128, "hidden_size": 768}
        | {"intermediate_size": 384, "num_hidden_layers": LAYERS, "num_attention_heads": 12},
    }


def write(folder: Path, seed: int = 0) -> dict[str, dict]:
    """Every file that the five rewards read, under REPOSITORY/FILE, at reduced size; returns the reduced configs."""
    clip, bert = clip_tokenizer(folder), bert_tokenizer(folder)
    small = configs(clip, bert)
    for i, name in enumerate(FILES):
        save(folder, name, values(reduced(name, bert if name == "imagereward" else clip), seed + i))
        if FILES[name].endswith(".safetensors"):
            (folder / FILES[name]).with_name("config.json").write_text(json.dumps(small[name]))
    return small


def save(folder: Path, name: str, state: dict[str, torch.Tensor]) -> None:
    """One checkpoint in its official layout."""
    path = folder / FILES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        half = {k: v.half() for k, v in state.items()}
        torch.save({"state_dict": half} if name == "hpsv2" else state, path)  # the official file holds halves


def write_full(folder: Path, name: str, bpe: Path, seed: int = 0) -> None:
    """The same of one reward at full size, with CLIP's own vocabulary (bpe: open_clip's copy of it)."""
    save(folder, name, values(official(name), seed))
    bert_tokenizer(folder, 30522)
    with gzip.open(bpe, "rt") as f:
        write_clip_tokenizer(folder, [tuple(line.split()) for line in f.read().split("\n")[1 : 49152 - 256 - 2 + 1]])


def pictures(seed: int = 0) -> list[Image.Image]:
    """RGB pictures of several shapes: smooth random colour fields with noise."""
    rng, out = np.random.default_rng(seed), []
    for width, height in SIZES:
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(
            (width, height), Image.BILINEAR
        )
        noise = rng.integers(-30, 31, (height, width, 3))
        out.append(Image.fromarray(np.clip(np.asarray(coarse).astype(int) + noise, 0, 255).astype(np.uint8)))
    return out
