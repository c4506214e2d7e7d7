"""Seeded random weights, tokenizers, pictures and prompts in the official file layouts, at reduced size.

Both environments run this file, so that the packages and we read the same files. Names and shapes of weights are those
of the official checkpoints, as manifest.json lists them; `reduced` keeps two layers of each tower and narrows them.
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
LAYERS = 2  # of each tower

# Official width -> reduced width.
NARROW = {
    "hpsv2": {1280: 160, 5120: 640, 3840: 480, 1024: 128, 4096: 512, 3072: 384},
    "pickscore": {1280: 160, 5120: 640, 1024: 128, 4096: 512},
    "clip": {1024: 128, 4096: 512, 768: 64, 3072: 256},
    "imagereward": {1024: 128, 4096: 512, 3072: 384},
    "aesthetic": {768: 64},
    "videoalign": {1536: 64, 8960: 128, 256: 32, 1280: 64, 3840: 192, 5120: 256, 64: 8},
}

# The file with the weights, under REPOSITORY/FILE.
FILES = {
    "hpsv2": "xswu/HPSv2/HPS_v2.1_compressed.pt",
    "pickscore": "yuvalkirstain/PickScore_v1/model.safetensors",
    "clip": "openai/clip-vit-large-patch14/model.safetensors",
    "imagereward": "THUDM/ImageReward/ImageReward.pt",
    "aesthetic": "christophschuhmann/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth",
    "videoalign": "KwaiVGI/VideoReward/checkpoint-11352/model.pth",
}
TOKENS = ("openai/clip-vit-large-patch14", "yuvalkirstain/PickScore_v1")  # folders with a CLIP vocabulary
BERT, QWEN = "google-bert/bert-base-uncased", "Qwen/Qwen2-VL-2B-Instruct"

# Qwen2-VL's special tokens, in its order.
SPECIAL = ["endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end"]
SPECIAL += ["quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"]
SPECIAL = [f"<|{name}|>" for name in SPECIAL]

# A question as VideoAlign's: each rating has a token of its own.
QUESTION = """
Rate this video. END means that a rating is given.

Quality: <|VQ_reward|>
END
Motion: <|MQ_reward|>
END
It was to show: {text_prompt}
Alignment: <|TA_reward|>
END
"""
MODEL_CONFIG = {  # what VideoReward's model_config.json says, at reduced size and in full precision
    "data_config": {"meta_data": "", "data_dir": "", "max_frame_pixels": 200704, "num_frames": None, "fps": 2.0}
    | {"eval_dim": ["VQ", "MQ", "TA"], "prompt_template_type": "detailed_special", "sample_type": "uniform"},
    "training_args": {},
    "model_config": {"model_name_or_path": QWEN, "output_dim": 1, "use_special_tokens": True, "reward_token": "special"}
    | {"torch_dtype": "float32", "loss_type": "btt"},
    "peft_lora_config": {"lora_enable": True, "vision_lora": False, "lora_r": 8, "lora_alpha": 16, "use_rslora": False}
    | {"lora_namespan_exclude": ["lm_head", "rm_head", "embed_tokens", "visual"]},
    "inference_config": {"VQ_mean": 3.6757, "VQ_std": 2.2476, "MQ_mean": 1.1646, "MQ_std": 1.3811}
    | {"TA_mean": 2.8105, "TA_std": 2.5121},
}
VIDEOS = [(9, 32, 32), (5, 40, 56), (17, 64, 48), (81, 30, 44), (33, 480, 832)]  # frames, height, width

# Short, long and empty; spaces; entities escaped twice; Chinese; Russian and a broken encoding; punctuation; longer
# than CLIP and BLIP read; apostrophes; Greek capitals, whose lower case depends on their place, and a spelt-out token.
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
    """All keys and shapes of an official checkpoint: `{32}` in a key of the manifest stands for 0 .. 31."""
    out = {}
    for key, shape in MANIFEST[name].items():
        layers = re.search(r"\{(\d+)\}", key)
        keys = [key.replace(layers[0], str(i)) for i in range(int(layers[1]))] if layers else [key]
        out |= dict.fromkeys(keys, shape)
    return out


def reduced(name: str, vocabulary: int) -> dict[str, list[int]]:
    """The same with two layers per tower, narrower, and a small vocabulary. ImageReward's head and text width stay."""
    narrow = NARROW[name] | {49408: vocabulary, 30524: vocabulary, 151660: vocabulary}
    out = {}
    for key, shape in official(name).items():
        # Layers from the third on are left out. The numbers in a head's keys are no layers of a tower.
        layer = re.search(r"\.(?:resblocks|layers|blocks|layer)\.(\d+)\.", key)
        if layer and not key.startswith(("mlp.", "layers.")) and int(layer[1]) >= LAYERS:
            continue

        # Both packages have their head's widths in their code. That of aesthetic begins with CLIP's narrowed features.
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
            # Norms are about 1 and biases about 0. Matrices are divided by the root of their number of inputs, so that
            # outputs are as large as inputs. Embeddings stay as they are.
            x = rng.standard_normal(shape, dtype=np.float32)
            if len(shape) == 1:
                x = 0.2 * x + (key.endswith("weight") or key.endswith("logit_scale"))
            elif "embed" not in key:
                x = x / np.float32(np.sqrt(np.prod(shape[1:])))
            out[key] = torch.from_numpy(x.astype(np.float32))

    # Qwen2-VL's output weights are its embedding.
    if "base_model.model.lm_head.weight" in out:
        out["base_model.model.lm_head.weight"] = out["base_model.model.model.embed_tokens.weight"]
    return out


def byte_letters() -> list[str]:
    """The printable stand-ins of the 256 bytes, in CLIP's order: printable bytes come first, as themselves."""
    keep = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in keep] + [chr(256 + i) for i in range(256 - len(keep))]


def clip_tokenizer(folder: Path) -> int:
    """A small byte-level vocabulary in CLIP's layout, for transformers and, as bpe.txt.gz, for open_clip.

    Returns:
        its size.
    """
    # Each word is merged from the left: "cat" adds c + a, then ca + t at the end of a word.
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
    # A token for each byte, for each byte that ends a word, for each merge, and two special ones.
    letters = byte_letters()
    tokens = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    for sub in TOKENS:
        (folder / sub).mkdir(parents=True, exist_ok=True)
        (folder / sub / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
        (folder / sub / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return len(tokens)


def bert_tokenizer(folder: Path, size: int = 0) -> int:
    """A small WordPiece vocabulary in BERT's layout, filled up to `size`.

    Returns:
        its size, with the two tokens that ImageReward adds.
    """
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()] + list("\u4e00\u53ea\u7ea2\u8272\u7684\u732b")
    letters += [chr(c) for c in range(0x430, 0x450)]
    words = ["cat", "photograph", "astronaut", "horse", "highly", "detail", "very", "long", "golden", "owl"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), *words, "##ed"]
    tokens += [f"[unused{i}]" for i in range(size - len(tokens))]
    (folder / BERT).mkdir(parents=True, exist_ok=True)
    (folder / BERT / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return len(tokens) + 2


def qwen_tokenizer(folder: Path, repository: str = QWEN, more: tuple[tuple[str, str], ...] = ()) -> int:
    """A small byte-level vocabulary in the layout of Qwen2-VL, which is also that of Qwen2.5-VL.

    Args:
        folder: it is written to REPOSITORY/tokenizer.json there. more: pairs of tokens to merge, besides those of
            VideoAlign's.

    Returns:
        its size, with the three tokens that VideoAlign adds.
    """
    letters = byte_letters()
    merges = [("r", "e"), ("re", "d"), ("c", "a"), ("ca", "t"), ("\u0120", "a"), ("i", "n"), *more]
    vocabulary = {t: i for i, t in enumerate([*letters, *("".join(m) for m in merges)])}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    words += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    bpe |= {"fuse_unk": False, "byte_fallback": False, "vocab": vocabulary, "merges": [" ".join(m) for m in merges]}
    added = [{"id": len(vocabulary) + i, "content": t} | plain for i, t in enumerate(SPECIAL)]
    document = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    document |= {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}}
    (folder / repository).mkdir(parents=True, exist_ok=True)
    text = json.dumps(document | {"post_processor": level, "decoder": level, "model": bpe})
    (folder / repository / "tokenizer.json").write_text(text)
    return len(vocabulary) + len(SPECIAL) + 3


def configs(clip_vocabulary: int, bert_vocabulary: int, qwen_vocabulary: int) -> dict[str, dict]:
    """What transformers needs to know of the reduced models; each argument is a number of tokens."""

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
        "qwen_text": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
        }
        | {"num_key_value_heads": 1, "vocab_size": qwen_vocabulary, "rms_norm_eps": 1e-6},
        "qwen_vision": {"depth": LAYERS, "embed_dim": 64, "num_heads": 2, "hidden_size": 64},
        "qwen": {"video_token_id": qwen_vocabulary - 4, "image_token_id": qwen_vocabulary - 5}
        | {"vision_end_token_id": qwen_vocabulary - 7, "vision_start_token_id": qwen_vocabulary - 8},
    }


# ---------------------------------------------------------------------------------------------------------------- vlm
# The config.json of both sizes: flat, as in the days when they were published.
SHARED = {"model_type": "qwen2_5_vl", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
SHARED |= {"max_position_embeddings": 128000, "sliding_window": 32768, "use_sliding_window": False}
SHARED |= {"attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True}
VISION = {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
VISION |= {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 2}
VISION |= {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
VLM = {  # reward -> the rest of its config, and the number of its files of weights
    "vlm": (
        {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
        | {"num_key_value_heads": 2, "vocab_size": 151936, "max_window_layers": 70, "tie_word_embeddings": True},
        2,
    ),
    "vlm-7b": (
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
        | {"num_key_value_heads": 4, "vocab_size": 152064, "max_window_layers": 28, "tie_word_embeddings": False},
        5,
    ),
}
QWEN2_5 = {"vlm": "Qwen/Qwen2.5-VL-3B-Instruct", "vlm-7b": "Qwen/Qwen2.5-VL-7B-Instruct"}

# Its preparation of pictures, and its chat template: {% if %} in one line, as it was published.
PREPARATION = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
PREPARATION |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
PREPARATION |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vlm_config(name: str, vocabulary: int | None = None) -> dict:
    """The official config of a Qwen2.5-VL; with the size of a small vocabulary, that of a small model.

    Both small ones have the same sizes, and so differ in the layout alone: `vlm` ties its output weights to its
    embedding, `vlm-7b` has them in its files.
    """
    config, vision = SHARED | VLM[name][0], VISION | {"out_hidden_size": VLM[name][0]["hidden_size"]}
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    tokens = {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "image_token_id": 151655}
    tokens |= {"video_token_id": 151656, "bos_token_id": 151643, "eos_token_id": 151645}
    if vocabulary:
        config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
        config |= {"num_key_value_heads": 1, "vocab_size": vocabulary + 7}  # larger than the tokenizer's, as officially
        vision |= {"depth": 3, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 64}
        vision |= {"fullatt_block_indexes": [1]}
        rope["mrope_section"] = [4, 6, 6]
        shift = vocabulary - 1 - tokens["video_token_id"]  # the special tokens are the last ones
        tokens = {key: number + shift for key, number in tokens.items()}
    return config | tokens | {"vision_config": vision, "rope_scaling": rope}


def vlm_shapes(config: dict) -> dict[str, list[int]]:
    """Names and shapes of a checkpoint of Qwen2.5-VL, as it was published."""
    v, width, inner = config["vision_config"], config["hidden_size"], config["intermediate_size"]
    c, m, square = v["hidden_size"], v["intermediate_size"], v["hidden_size"] * v["spatial_merge_size"] ** 2
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]

    out = {"visual.patch_embed.proj.weight": [c, 3, v["temporal_patch_size"], v["patch_size"], v["patch_size"]]}
    block = {"norm1": [c], "norm2": [c], "attn.qkv": [3 * c, c], "attn.proj": [c, c]}
    block |= {"mlp.gate_proj": [m, c], "mlp.up_proj": [m, c], "mlp.down_proj": [c, m]}
    places = {f"visual.blocks.{i}.{key}": shape for i in range(v["depth"]) for key, shape in block.items()}
    places |= {
        "visual.merger.ln_q": [c],
        "visual.merger.mlp.0": [square, square],
        "visual.merger.mlp.2": [width, square],
    }
    for key, shape in places.items():  # norms have no bias, all else of the picture's tower has
        out |= {f"{key}.weight": shape} | ({f"{key}.bias": shape[:1]} if len(shape) > 1 else {})

    out["model.embed_tokens.weight"] = [config["vocab_size"], width]
    layer = {"input_layernorm": [width], "post_attention_layernorm": [width], "self_attn.o_proj": [width, width]}
    layer |= {"self_attn.q_proj": [width, width], "self_attn.k_proj": [keys, width], "self_attn.v_proj": [keys, width]}
    layer |= {"mlp.gate_proj": [inner, width], "mlp.up_proj": [inner, width], "mlp.down_proj": [width, inner]}
    for i in range(config["num_hidden_layers"]):
        for key, shape in layer.items():
            biased = key.endswith(("q_proj", "k_proj", "v_proj"))
            out |= {f"model.layers.{i}.{key}.weight": shape}
            out |= {f"model.layers.{i}.{key}.bias": shape[:1]} if biased else {}
    out["model.norm.weight"] = [width]
    return out | ({} if config["tie_word_embeddings"] else {"lm_head.weight": [config["vocab_size"], width]})


def vlm_files(folder: Path, name: str, seed: int = 0) -> None:
    """All files of a small Qwen2.5-VL in the official layout, its weights spread over as many files as officially."""
    repository = QWEN2_5[name]
    words = (("Y", "e"), ("Ye", "s"), ("N", "o"))
    config = vlm_config(name, qwen_tokenizer(folder, repository, words) - 3)
    state = values(vlm_shapes(config), seed)

    # A narrow embedding keeps the logits near 1. Else nearly all scores would be 0 or 1, and equal for no good reason.
    state["model.embed_tokens.weight"] *= 0.1

    # The official index names a weight's file; transformers' own loader needs it.
    n, index = VLM[name][1], {}
    for i in range(n):
        file = f"model-{i + 1:05}-of-{n:05}.safetensors"
        shard = dict(list(state.items())[i::n])
        save_file(shard, folder / repository / file)
        index |= dict.fromkeys(shard, file)
    files = {"model.safetensors.index.json": {"metadata": {}, "weight_map": index}, "config.json": config}
    files |= {"preprocessor_config.json": PREPARATION, "chat_template.json": {"chat_template": TEMPLATE}}
    for file, content in files.items():
        (folder / repository / file).write_text(json.dumps(content))


def write(folder: Path, seed: int = 0) -> dict[str, dict]:
    """Every file that the preference models read, under REPOSITORY/FILE, at reduced size.

    Returns:
        the reduced configs.
    """
    clip, bert, qwen = clip_tokenizer(folder), bert_tokenizer(folder), qwen_tokenizer(folder)
    small = configs(clip, bert, qwen)
    sizes = {"imagereward": bert, "videoalign": qwen}
    for i, name in enumerate(FILES):
        save(folder, name, values(reduced(name, sizes.get(name, clip)), seed + i))
        if FILES[name].endswith(".safetensors"):
            (folder / FILES[name]).with_name("config.json").write_text(json.dumps(small[name]))
    (folder / "KwaiVGI/VideoReward/model_config.json").write_text(json.dumps(MODEL_CONFIG))
    (folder / "KwaiVGI/VideoAlign").mkdir(exist_ok=True)
    template = f"DETAILED_PROMPT_WITH_SPECIAL_TOKEN = {QUESTION!r}\n"
    (folder / "KwaiVGI/VideoAlign/prompt_template.py").write_text(template)
    for name in VLM:
        vlm_files(folder, name, seed)
    return small


def save(folder: Path, name: str, state: dict[str, torch.Tensor]) -> None:
    """One checkpoint in its official layout."""
    path = folder / FILES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        half = {k: v.half() for k, v in state.items()}
        torch.save({"state_dict": half} if name == "hpsv2" else state, path)  # the official file is of float16


def write_full(folder: Path, name: str, bpe: Path, seed: int = 0) -> None:
    """The files of one reward at full size, with CLIP's own vocabulary; bpe: open_clip's copy of it."""
    save(folder, name, values(official(name), seed))
    bert_tokenizer(folder, 30522)

    # The first line is a version; CLIP reads the 49,152 - 256 - 2 = 48,894 merges behind it, and leaves the rest.
    with gzip.open(bpe, "rt") as f:
        write_clip_tokenizer(folder, [tuple(line.split()) for line in f.read().split("\n")[1 : 49152 - 256 - 2 + 1]])


def pictures(seed: int = 0) -> list[Image.Image]:
    """RGB pictures of the shapes SIZES: smooth random colour fields with noise."""
    rng, out = np.random.default_rng(seed), []
    for width, height in SIZES:
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(
            (width, height), Image.BILINEAR
        )
        noise = rng.integers(-30, 31, (height, width, 3))
        out.append(Image.fromarray(np.clip(np.asarray(coarse).astype(int) + noise, 0, 255).astype(np.uint8)))
    return out


def videos(seed: int = 0) -> list[np.ndarray]:
    """(F, H, W, 3) uint8 videos of the shapes VIDEOS: a smooth random field that drifts, with noise."""
    rng, out = np.random.default_rng(seed), []
    for frames, height, width in VIDEOS:
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        wide = np.asarray(coarse.resize((width + frames, height), Image.BILINEAR)).astype(int)
        moving = np.stack([wide[:, i : i + width] for i in range(frames)])
        out.append(np.clip(moving + rng.integers(-30, 31, moving.shape), 0, 255).astype(np.uint8))
    return out
