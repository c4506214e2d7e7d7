"""The authorities: the official packages' own scores of the seeded weights, as compare.py needs them.

It runs in the environment of requirements-reference.txt, and writes scores.json into FOLDER, beside the weights.

    python tests/reference/authority.py FOLDER                          # the five rewards of pictures
    python tests/reference/authority.py FOLDER --videoalign CLONE       # videoalign too; a clone of KwaiVGI/VideoAlign
    python tests/reference/authority.py FOLDER --full                   # hpsv2 and imagereward at full size: 8 GB
    python tests/reference/authority.py --manifest --videoalign CLONE   # writes manifest.json anew

- hpsv2 and imagereward run their packages' `score`.
- pickscore, clip and aesthetic run on open_clip's towers. Their weights are renamed here, from transformers' names, by
  code of this file that shares nothing with preference.py. pickscore is prepared as its authors do it, by transformers'
  CLIPProcessor; aesthetic has the head of the package image-reward.
- videoalign runs its authors' inference code.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

# On a GPU the packages would compute in half precision. It must be hidden before torch is imported.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch

warnings.filterwarnings("ignore")
HERE = Path(__file__).parent
MED = {  # med_config.json of ImageReward
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 30524, "encoder_width": 768,
    "add_cross_attention": True,
}  # fmt: skip
VIT_H = {"layers": 32, "width": 1280, "head_width": 80, "patch_size": 14, "image_size": 224}
VIT_H_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}


def hps_model(vision: dict, text: dict, dim: int):
    """CLIP as the package hpsv2 has it, of these sizes."""
    from hpsv2.src.open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    return CLIP(dim, CLIPVisionCfg(**vision), CLIPTextCfg(**text), output_dict=True).eval()


def image_reward_model(med: dict, vision: dict | None, folder: Path):
    """ImageReward as its package has it.

    `vision` makes the picture tower smaller. The package has no option for that, so its function is replaced. None: as
    it is.
    """
    import ImageReward.models.BLIP.blip_pretrain as blip
    from ImageReward.ImageReward import ImageReward
    from ImageReward.models.BLIP.vit import VisionTransformer

    if vision:
        blip.create_vit = lambda *_: (VisionTransformer(img_size=224, patch_size=16, **vision), vision["embed_dim"])
    (folder / "med_config.json").write_text(json.dumps(med))
    return ImageReward(med_config=str(folder / "med_config.json")).eval()


def video_align_model(clone: Path):
    """VideoAlign's Qwen2-VL-2B at full size, with three more tokens and a LoRA of rank 64."""
    sys.path.insert(0, str(clone))
    from peft import LoraConfig, get_peft_model
    from train_reward import find_target_linear_names
    from trainer import Qwen2VLRewardModelBT
    from transformers import Qwen2VLConfig

    text = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    text |= {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    model = Qwen2VLRewardModelBT(Qwen2VLConfig(**text, vision_config={"hidden_size": 1536}), output_dim=1)
    model.resize_token_embeddings(151660)
    names = find_target_linear_names(model, lora_namespan_exclude=["lm_head", "rm_head", "embed_tokens", "visual"])
    return get_peft_model(model, LoraConfig(target_modules=names, r=64, lora_alpha=128))


def write_manifest(clone: Path) -> None:
    """Writes manifest.json: keys and shapes of the packages' full-size models, made on the meta device, without memory.

    `{32}` in a key stands for the layers 0 .. 31, as in "visual.transformer.resblocks.{32}.ln_1.weight".
    """
    from ImageReward.models.AestheticScore import MLP
    from transformers import CLIPConfig, CLIPModel
    from weights import bert_tokenizer

    # ImageReward asks for "bert-base-uncased", which transformers also finds as a folder of the working directory.
    folder = Path(tempfile.mkdtemp())
    bert_tokenizer(folder)
    os.chdir(folder / "google-bert")

    shared = {"hidden_act": "gelu", "projection_dim": 1024}
    h = CLIPConfig(
        vision_config={"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "patch_size": 14}
        | {"num_hidden_layers": 32} | shared,
        text_config={"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
        | shared, projection_dim=1024,
    )  # fmt: skip
    large = CLIPConfig(
        vision_config={"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "patch_size": 14}
        | {"num_hidden_layers": 24, "projection_dim": 768},
        text_config={"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
        projection_dim=768,
    )

    # ImageReward is small enough to be made in memory, below.
    with torch.device("meta"):
        models = {
            "hpsv2": hps_model(VIT_H, VIT_H_TEXT, 1024),
            "pickscore": CLIPModel(h),
            "clip": CLIPModel(large),
            "aesthetic": MLP(768),
        }
        models["videoalign"] = video_align_model(clone)
    models["imagereward"] = image_reward_model(MED, None, folder)

    manifest = {}
    for name, model in models.items():
        state = {k: list(v.shape) for k, v in model.state_dict().items()}
        if name == "clip":  # the stored file also holds two buffers of its day
            state |= {f"{tower}_model.embeddings.position_ids": [1, n] for tower, n in (("text", 77), ("vision", 257))}

        # How many layers each key of a tower has. The layers of a head differ in shape, so their keys stay as they are.
        manifest[name] = {}
        layers = {}
        for key in state:
            if layer := re.search(r"\.(?:resblocks|layers|blocks|layer)\.(\d+)\.", key):
                if key.startswith(("mlp.", "layers.")):
                    continue
                stem = key.replace(f".{layer[1]}.", ".{}.", 1)
                layers[stem] = max(layers.get(stem, 0), int(layer[1]) + 1)

        # One entry for all layers: the stem, with their number in the braces.
        for key, shape in state.items():
            stem = re.sub(r"(\.(?:resblocks|layers|blocks|layer)\.)(\d+)\.", r"\1{}.", key, count=1)
            stem = stem.replace("{}", "{" + str(layers[stem]) + "}") if stem in layers else key
            manifest[name][stem] = shape

    # A shape is printed in one line.
    (HERE / "manifest.json").write_text(
        json.dumps(manifest, indent=1).replace("\n   ", "").replace(",  ", ", ").replace("\n  ]", "]")
    )


def open_clip_model(state: dict, config: dict):
    """open_clip's CLIP, filled with weights that have transformers' names.

    This is the inverse of preference.from_open_clip, written apart from it, so that an error in one is seen.
    """
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    v, t = config["vision_config"], config["text_config"]
    vision = CLIPVisionCfg(
        layers=v["num_hidden_layers"], width=v["hidden_size"], patch_size=v["patch_size"], image_size=224
    )
    vision.head_width = v["hidden_size"] // v["num_attention_heads"]
    text = CLIPTextCfg(
        77, t["vocab_size"], width=t["hidden_size"], heads=t["num_attention_heads"], layers=t["num_hidden_layers"]
    )
    model = CLIP(config["projection_dim"], vision, text, quick_gelu=t["hidden_act"] == "quick_gelu").eval()

    # The two projections are transposed.
    new = {
        "visual.proj": state["visual_projection.weight"].T,
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": state["logit_scale"],
    }

    # What stands before and behind the layers differs in the two towers. A layer's queries, keys, values are stacked.
    for tower, prefix in (("vision_model", "visual."), ("text_model", "")):
        e = f"{tower}.embeddings."
        new[f"{prefix}positional_embedding"] = state[f"{e}position_embedding.weight"]
        if prefix:
            new["visual.class_embedding"] = state[f"{e}class_embedding"]
            new["visual.conv1.weight"] = state[f"{e}patch_embedding.weight"]
        else:
            new["token_embedding.weight"] = state[f"{e}token_embedding.weight"]
        for kind in ("weight", "bias"):
            if prefix:
                new[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
                new[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
            else:
                new[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
            for i in range(v["num_hidden_layers"]):
                a, b = f"{tower}.encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
                stacked = [state[f"{a}self_attn.{n}_proj.{kind}"] for n in ("q", "k", "v")]
                new[f"{b}attn.in_proj_{kind}"] = torch.cat(stacked)
                new[f"{b}attn.out_proj.{kind}"] = state[f"{a}self_attn.out_proj.{kind}"]
                new[f"{b}ln_1.{kind}"], new[f"{b}ln_2.{kind}"] = (state[f"{a}layer_norm{j}.{kind}"] for j in (1, 2))
                new[f"{b}mlp.c_fc.{kind}"], new[f"{b}mlp.c_proj.{kind}"] = (
                    state[f"{a}mlp.fc{j}.{kind}"] for j in (1, 2)
                )
    model.load_state_dict(new)
    return model


def hps_scores(path: Path, model, pictures, prompts, bpe: Path | None) -> list[float]:
    """What hpsv2's own `score` says.

    The package keeps its model in a global, where ours of reduced size is put. bpe: a vocabulary of reduced size for
    its tokenizer; None: its own.
    """
    import hpsv2.img_score as package
    from hpsv2.src.open_clip import tokenizer
    from hpsv2.src.open_clip.transform import image_transform

    package.model_dict |= {"model": model}
    package.model_dict["preprocess_val"] = image_transform(224, is_train=False, resize_longest_max=True)
    if bpe:
        tokenizer._tokenizer = tokenizer.SimpleTokenizer(str(bpe))
    return [float(package.score(x, p, cp=str(path))[0]) for x, p in zip(pictures, prompts)]


CHAT = (  # Qwen2-VL's chat template, of one question about one video
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_files(folder: Path, small: dict) -> None:
    """The files of VideoAlign's base model besides its tokenizer.

    Its weights are random: VideoReward's replace all of them.
    """
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from weights import QWEN, SPECIAL

    text, rope = small["qwen_text"], {"type": "mrope", "mrope_section": [4, 6, 6], "rope_type": "default"}
    text = text | {"vocab_size": text["vocab_size"] - 3, "rope_theta": 1e6, "rope_scaling": rope}
    config = Qwen2VLConfig(**text, **small["qwen"], vision_config=small["qwen_vision"], tie_word_embeddings=True)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder / QWEN)
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    processor |= {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    processor |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / QWEN / "preprocessor_config.json").write_text(json.dumps(processor))
    words = {"tokenizer_class": "Qwen2Tokenizer", "processor_class": "Qwen2VLProcessor"}
    words |= {"pad_token": SPECIAL[0], "eos_token": SPECIAL[2], "additional_special_tokens": SPECIAL[1:]}
    (folder / QWEN / "tokenizer_config.json").write_text(json.dumps(words))
    (folder / QWEN / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))


def video_align_scores(folder: Path, small: dict, clone: Path, question: str | None) -> list[float]:
    """VideoAlign's own inference code on our files: VQ, MQ, TA of every video with every prompt, prompts outermost.

    Its video reader is given our frames where it would open files, and flash attention is left out. question: replaces
    that of the clone, unless it is None.
    """
    import types

    import weights

    # In place of the package decord, which opens video files: "file://2" is our video 2.
    class Reader(list):
        def __init__(self, path):
            super().__init__(weights.videos()[int(path.removeprefix("file://"))])

        def get_avg_fps(self):
            return 16

        def get_batch(self, index):
            return types.SimpleNamespace(asnumpy=lambda: torch.stack([torch.tensor(self[i]) for i in index]).numpy())

    os.environ["FORCE_QWENVL_VIDEO_READER"] = "decord"
    sys.modules["decord"] = types.SimpleNamespace(VideoReader=Reader)
    sys.path.insert(0, str(clone))
    qwen_files(folder, small)
    os.chdir(folder)  # model_config.json names Qwen/Qwen2-VL-2B-Instruct
    import inference
    import prompt_template

    # The rest of the clone looks these up when it is called, so replacing them here is enough.
    if question:
        prompt_template.DETAILED_PROMPT_WITH_SPECIAL_TOKEN = question
    create = inference.create_model_and_processor

    def without_flash(model_config, peft_lora_config, training_args):
        training_args.disable_flash_attn2 = True
        return create(model_config, peft_lora_config, training_args)

    inference.create_model_and_processor = without_flash
    judge = inference.VideoVLMRewardInference("KwaiVGI/VideoReward", device="cpu", dtype=torch.float32)
    prompts = [p for p in weights.PROMPTS if "<|" not in p]
    rated = [judge.reward([str(i)], [p])[0] for p in prompts for i in range(len(weights.VIDEOS))]
    return [r[d] for r in rated for d in ("VQ", "MQ", "TA")]


@torch.no_grad()
def scores(folder: Path, clone: Path | None) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The packages' scores of every picture with every prompt, prompts outermost, and their seconds per picture.

    clone: VideoAlign's; None leaves it out.
    """
    import ImageReward as package
    import weights
    from ImageReward.models.AestheticScore import MLP
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transform import image_transform
    from safetensors.torch import load_file
    from transformers import CLIPImageProcessor, CLIPTokenizerFast

    small = weights.write(folder)
    pairs = [(x, p) for p in weights.PROMPTS for x in weights.pictures()]
    pictures, prompts = [x for x, _ in pairs], [p for _, p in pairs]
    out, seconds = {}, {}

    def timed(name, work):
        began = time.perf_counter()
        out[name] = work()
        seconds[name] = (time.perf_counter() - began) / len(pairs)

    # hpsv2
    v, t = small["hpsv2"]["vision_config"], small["hpsv2"]["text_config"]
    vision = VIT_H | {"layers": 2, "width": v["hidden_size"]}
    text = VIT_H_TEXT | {"layers": 2, "width": t["hidden_size"], "heads": 2, "vocab_size": t["vocab_size"]}
    hps = hps_model(vision, text, 128)
    path = folder / weights.FILES["hpsv2"]
    timed("hpsv2", lambda: hps_scores(path, hps, pictures, prompts, folder / "bpe.txt.gz"))

    # imagereward, whose package asks the hub for bert-base-uncased: a folder of that name is taken in its place.
    os.chdir(folder / "google-bert")
    med = MED | {"num_hidden_layers": 2, "intermediate_size": 384, "vocab_size": small["blip_text"]["vocab_size"]}
    image_reward_model(med, {"embed_dim": 128, "depth": 2, "num_heads": 2}, folder)
    model = package.load(str(folder / weights.FILES["imagereward"]), med_config=str(folder / "med_config.json"))
    timed("imagereward", lambda: [model.score(p, x) for x, p in pairs])

    # pickscore and clip: two ways to prepare, one kind of model
    bpe = SimpleTokenizer(str(folder / "bpe.txt.gz"))
    preprocess = image_transform(224, is_train=False)
    files = (str(folder / weights.TOKENS[1] / f) for f in ("vocab.json", "merges.txt"))
    theirs, pixels = CLIPTokenizerFast(*files), CLIPImageProcessor()
    length = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
    for name in ("pickscore", "clip"):
        model = open_clip_model(load_file(folder / weights.FILES[name]), small[name])

        def inputs(x, p, name=name):
            if name == "clip":
                return preprocess(x)[None], bpe([p])
            return pixels(x, return_tensors="pt").pixel_values, theirs([p], **length).input_ids

        def cosines(model=model, inputs=inputs):
            features = (
                (model.encode_image(x, True), model.encode_text(p, True)) for x, p in (inputs(*pair) for pair in pairs)
            )
            return [float(model.logit_scale.exp() * (image * text).sum()) for image, text in features]

        timed(name, cosines)

    # aesthetic, on the last of these models, clip
    head = MLP(64).eval()
    head.load_state_dict(torch.load(folder / weights.FILES["aesthetic"]))
    timed("aesthetic", lambda: [float(head(model.encode_image(preprocess(x)[None], True))) for x in pictures])

    if clone:
        began = time.perf_counter()
        out["videoalign"] = video_align_scores(folder, small, clone, weights.QUESTION)
        seconds["videoalign"] = (time.perf_counter() - began) / (len(out["videoalign"]) / 3)
    return out, seconds


@torch.no_grad()
def full_scores(folder: Path) -> tuple[dict[str, list[float]], dict[str, float]]:
    """hpsv2's and ImageReward's scores of three pictures at full size, and their seconds per picture.

    hpsv2 loads its model anew for every picture, so its seconds include that.
    """
    import hpsv2.src.open_clip as open_clip
    import ImageReward as package
    import weights

    bpe = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    pictures, prompts = weights.pictures()[:3], weights.PROMPTS[:3]

    weights.write_full(folder, "hpsv2", bpe)
    began = time.perf_counter()
    model = hps_model(VIT_H, VIT_H_TEXT, 1024)
    out = {"hpsv2": hps_scores(folder / weights.FILES["hpsv2"], model, pictures, prompts, None)}
    seconds = {"hpsv2": (time.perf_counter() - began) / 3}
    del model  # 4 GB

    weights.write_full(folder, "imagereward", bpe, 1)
    os.chdir(folder / "google-bert")
    (folder / "med_config.json").write_text(json.dumps(MED))
    model = package.load(str(folder / weights.FILES["imagereward"]), med_config=str(folder / "med_config.json"))
    began = time.perf_counter()
    out["imagereward"] = [model.score(p, x) for x, p in zip(pictures, prompts)]
    return out, seconds | {"imagereward": (time.perf_counter() - began) / 3}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--videoalign", type=Path)
    parser.add_argument("--manifest", action="store_true")
    args = parser.parse_args()

    if args.manifest:
        write_manifest(args.videoalign.resolve())
    if args.folder:
        folder = args.folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        clone = args.videoalign and args.videoalign.resolve()
        out, seconds = full_scores(folder) if args.full else scores(folder, clone)
        (folder / "scores.json").write_text(json.dumps({"scores": out, "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
