"""Weights."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging as transformers_logging


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


AESTHETIC, VIDEO_ALIGN = "christophschuhmann/improved-aesthetic-predictor", "KwaiVGI/VideoAlign"


GITHUB = (AESTHETIC, VIDEO_ALIGN)  # these two are not on the hub


CLIP_FILES = ("model.safetensors", "config.json", "vocab.json", "merges.txt")


FILES = {  # reward -> official files as (repository, file), the model's weights first
    "hpsv2": [("xswu/HPSv2", "HPS_v2.1_compressed.pt"), (CLIP_L, "vocab.json"), (CLIP_L, "merges.txt")],
    "imagereward": [("THUDM/ImageReward", "ImageReward.pt"), (BERT, "vocab.txt")],
    "pickscore": [(PICK, file) for file in CLIP_FILES],
    "clip": [(CLIP_L, file) for file in CLIP_FILES],
    "aesthetic": [*((CLIP_L, file) for file in CLIP_FILES), (AESTHETIC, "sac+logos+ava1-l14-linearMSE.pth")],
    "videoalign": [("KwaiVGI/VideoReward", "checkpoint-11352/model.pth"), ("KwaiVGI/VideoReward", "model_config.json")]
    + [("Qwen/Qwen2-VL-2B-Instruct", "tokenizer.json"), (VIDEO_ALIGN, "prompt_template.py")],
}

PARTS = {"videoalign": slice(0, 3)} | {f"videoalign-{d}": slice(i, i + 1) for i, d in enumerate(("vq", "mq", "ta"))}
FILES |= dict.fromkeys(PARTS, FILES["videoalign"])


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
        if repository in GITHUB:
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


def renamed(state: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """A state dict with every pattern of the table replaced in every key, in the table's order."""
    out = {}
    for key, value in state.items():
        for pattern, new in table.items():
            key = re.sub(pattern, new, key)
        out[key] = value
    return out
