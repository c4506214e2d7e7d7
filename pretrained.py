"""Weight files of the preference models: which files, where they lie, and a model that holds exactly what they say.

A score can be compared with a paper's only if the model is exactly the published one. The libraries forgive too much
for that: a missing weight is drawn at random, a surplus weight is ignored, a vocabulary cut short still gives token
numbers. Each of these mistakes would score, and wrongly, without an error. Here a file is either whole and fits, or
one sentence names it and says what to do.

1. FILES            the official files of every reward, as (repository, file)
2. `locate`         looks for a file in the folder --reward-weights, then in the hub's cache on this machine
3. `weight_files`   finds all files of a reward, or names the missing ones with the commands that fetch them
4. `read_weights`   reads a state dict, that is a table from the names of weights to tensors
5. `renamed`        translates an official package's names of weights into those of transformers
6. `build`          makes a frozen transformers model of exactly these weights
7. `tokenizer`      makes a transformers tokenizer of exactly this vocabulary

What is refused, each time with a ValueError, and why:
- A missing file. Nothing is downloaded here: a file has up to 5 GB, and a run that begins with one looks as if it hung.
- A file cut short, or another thing under its name, such as the web page that a failed download leaves behind.
- A .pt or .pth file that holds anything but tensors. It is a pickle, and an unpickled object may run any code; torch's
  reader for weights alone runs none.
- A weight that is missing, left over or of another shape than the architecture's.
- A vocabulary that has not exactly as many tokens as the model.
"""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

# ------------------------------------------------------------------------------------------------- the official files
CLIP_L = "openai/clip-vit-large-patch14"
PICK = "yuvalkirstain/PickScore_v1"
BERT = "google-bert/bert-base-uncased"
AESTHETIC = "christophschuhmann/improved-aesthetic-predictor"
VIDEO_ALIGN = "KwaiVGI/VideoAlign"
GITHUB = (AESTHETIC, VIDEO_ALIGN)  # repositories of GitHub; all others are of the Hugging Face hub

# A whole CLIP in transformers' own format.
CLIP_FILES = ("model.safetensors", "config.json", "vocab.json", "merges.txt")

# Reward -> its files as (repository, file), in the order in which the reward unpacks them: its weights come first.
FILES = {
    # open_clip's ViT-H-14. Its vocabulary is that of OpenAI's CLIP, so CLIP's files serve.
    "hpsv2": [("xswu/HPSv2", "HPS_v2.1_compressed.pt"), (CLIP_L, "vocab.json"), (CLIP_L, "merges.txt")],
    # BLIP, which reads with BERT's vocabulary.
    "imagereward": [("THUDM/ImageReward", "ImageReward.pt"), (BERT, "vocab.txt")],
    "pickscore": [(PICK, file) for file in CLIP_FILES],
    "clip": [(CLIP_L, file) for file in CLIP_FILES],
    # The same CLIP, and a head on top of it.
    "aesthetic": [*((CLIP_L, file) for file in CLIP_FILES), (AESTHETIC, "sac+logos+ava1-l14-linearMSE.pth")],
    # Weights and settings; the vocabulary of the model that it was tuned from; the question that it was trained on.
    "videoalign": [
        ("KwaiVGI/VideoReward", "checkpoint-11352/model.pth"),
        ("KwaiVGI/VideoReward", "model_config.json"),
        ("Qwen/Qwen2-VL-2B-Instruct", "tokenizer.json"),
        (VIDEO_ALIGN, "prompt_template.py"),
    ],
}

# VideoAlign gives a video three ratings: VQ, visual quality; MQ, motion quality; TA, text alignment. Reward -> the
# ratings that it sums, as a slice of these three. All four rewards are the same model, so they need the same files.
PARTS = {
    "videoalign": slice(0, 3),
    "videoalign-vq": slice(0, 1),
    "videoalign-mq": slice(1, 2),
    "videoalign-ta": slice(2, 3),
}
FILES |= dict.fromkeys(PARTS, FILES["videoalign"])

# Reward -> the repository of its Qwen2.5-VL, and the number of files that the weights are spread over.
VLMS = {"vlm": ("Qwen/Qwen2.5-VL-3B-Instruct", 2), "vlm-7b": ("Qwen/Qwen2.5-VL-7B-Instruct", 5)}
VLM_SETTINGS = ["config.json", "preprocessor_config.json", "tokenizer.json", "chat_template.json"]


def shards(n: int) -> list[str]:
    """The names of n files with one model's weights: model-00001-of-00002.safetensors and so on.

    The hub also has model.safetensors.index.json, which says what lies in which of them. Nothing needs it here: all of
    them are read, and `build` compares every name.
    """
    return [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]


FILES |= {name: [(repo, file) for file in shards(n) + VLM_SETTINGS] for name, (repo, n) in VLMS.items()}

# What these rewards ask about a picture, {prompt} being the place of the prompt; and how Qwen's own tokens are written.
QUESTION = 'Does this picture show "{prompt}"? Answer Yes or No.'
TOKEN = r"<\|\w+\|>"


# ------------------------------------------------------------------------------------------------------ finding files
@dataclass(frozen=True)
class Setup:
    """Where the weights of preference models lie, and how the models run.

    weights: a folder that holds REPOSITORY/FILE; what it lacks is looked up in the hub's cache. None: the cache only.
    device: where the models score.
    dtype: of weights and activations. Features are compared, and heads evaluated, in float32 whatever it is.
    offload: whether the models go back to the CPU after every scoring, so that the policy has the GPU to itself.
    batch: the most pictures or videos that are scored at once.
    question: what `vlm` asks about every picture, to be answered with Yes or No; {prompt} is the place of the prompt.
    fps: frames per second of the videos, by which VideoAlign chooses the frames that it watches; Wan2.1's are 16.

    Raises:
        ValueError: if the question has no place for the prompt, and so is the same for all prompts; or if it spells out
            one of the model's own tokens, which could pose as the picture.
    """

    weights: str | None = None
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32
    offload: bool = False
    batch: int = 32
    question: str = QUESTION
    fps: float = field(default=16, compare=False)  # not compared: the model is the same at any rate

    def __post_init__(self):
        if "{prompt}" not in self.question or re.search(TOKEN, self.question):
            rule = "must hold {prompt}, the place of the prompt, and none of Qwen's tokens, such as <|im_end|>"
            raise ValueError(f"--reward-question {rule}; got {self.question!r}")


def locate(repository: str, file: str, folder: str | None) -> Path | None:
    """Where a file lies: in the folder, else in the hub's cache; None if it is in neither."""
    if folder and (path := Path(folder, repository, file)).is_file():
        return path

    # The hub's library answers with a path, with None, or with an object that says "known not to exist".
    cached = try_to_load_from_cache(repository, file)
    return Path(cached) if isinstance(cached, str) else None


def fetch_commands(missing: list[tuple[str, str]], folder: str | None) -> str:
    """One line of shell that brings missing files to where `locate` finds them: a command for each repository.

    Args:
        missing: pairs (repository, file).
        folder: --reward-weights; None fetches into the hub's cache, and files of GitHub into ./weights.
    """
    commands = []
    for repository in dict.fromkeys(r for r, _ in missing):
        files = " ".join(shlex.quote(f) for r, f in missing if r == repository)

        # The hub's cache cannot hold what is not on the hub, so a file of GitHub always goes into a folder. No reward
        # needs two files of the same GitHub repository: `files` is one name here.
        if repository in GITHUB:
            target = shlex.quote(f"{folder or 'weights'}/{repository}/{files}")
            commands.append(f"curl -fL --create-dirs -o {target} https://github.com/{repository}/raw/main/{files}")

        # The hub's own command takes several files at once; without a folder it fills the cache.
        else:
            target = f" --local-dir {shlex.quote(f'{folder}/{repository}')}" if folder else ""
            commands.append(f"hf download {repository} {files}{target}")
    return " && ".join(commands)


def weight_files(name: str, setup: Setup) -> list[Path]:
    """The paths of a reward's files, in the order of FILES; none for a reward without weights.

    Raises:
        ValueError: naming the missing files and the commands that fetch them.
    """
    pairs = FILES.get(name, [])
    paths = [locate(repository, file, setup.weights) for repository, file in pairs]
    missing = [pair for pair, path in zip(pairs, paths) if path is None]

    if missing:
        # What follows "fetch with:" can be pasted into a shell, so any advice in words stands before it.
        files = ", ".join(file for _, file in missing)
        into_folder = not setup.weights and any(repository in GITHUB for repository, _ in missing)
        advice = "give --reward-weights weights and " if into_folder else ""
        raise ValueError(
            f"the reward {name!r} lacks {files}; {advice}fetch with: {fetch_commands(missing, setup.weights)}"
        )
    return paths


# ------------------------------------------------------------------------------------------------------ reading files
def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors, .pt or .pth file: names of weights -> tensors on the CPU.

    Raises:
        ValueError: if the file is cut short, or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)

        # weights_only: no object of the pickle is made but tensors and plain containers, so no foreign code runs.
        # HPSv2 stores its weights under "state_dict", beside nothing that we need.
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
            raise TypeError("it holds more than tensors and their names")
        return state

    # Too little memory is not the file's fault. All else is: on garbage, the readers of pickles and archives raise
    # nearly any exception.
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is damaged or holds no weights ({type(error).__name__}): fetch it again") from error


def renamed(state: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """The state dict under other names: every pattern of the table is replaced in every name, in the table's order.

    With {r"^visual\\.": "vision_model.", r"\\.c_fc\\.": ".fc1."} the weight "visual.0.c_fc.bias" becomes
    "vision_model.0.fc1.bias".
    """
    out = {}
    for key, value in state.items():
        for pattern, new in table.items():
            key = re.sub(pattern, new, key)
        out[key] = value
    return out


# --------------------------------------------------------------------------------------------- models and tokenizers
def build(kind, config, state: dict[str, Tensor], path: Path, dtype: torch.dtype, **kwargs):
    """A frozen transformers model that holds exactly these weights.

    Args:
        kind: a class of transformers; config: its configuration; kwargs: what else it is made with.
        state: the weights, under transformers' names. path: the file that they come from, for the error.
        dtype: of the model.

    Raises:
        ValueError: if a weight is missing, left over or of another shape, naming the first one; or if the configuration
            makes no model.
    """
    # The names and shapes that the architecture has. On the meta device a model costs no memory.
    try:
        with torch.device("meta"):
            expected = {key: value.shape for key, value in kind(config, **kwargs).state_dict().items()}
    except Exception as error:  # a negative size, an activation that nobody knows
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"the config beside {path} makes no {kind.__name__} ({reason}): fetch it again") from error

    # from_pretrained would draw a missing weight at random and skip a surplus one: so both sides must be equal first.
    for key in sorted(expected.keys() | state.keys()):
        if expected.get(key) != (state[key].shape if key in state else None):
            raise ValueError(f"{path} does not fit {kind.__name__}: {key!r} is missing, left over or of another shape")

    transformers_logging.disable_progress_bar()
    model = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **kwargs)
    return model.eval().requires_grad_(False)


def tokenizer(kind, size: int, vocabulary: Path, merges: Path | None = None):
    """A transformers tokenizer from its official files, of exactly `size` tokens.

    Args:
        kind: a class of transformers.
        size: the number of tokens that the model knows.
        vocabulary: BERT's vocab.txt, with one token per line, or CLIP's vocab.json.
        merges: CLIP's merges.txt, whose first line is a version and each other line a pair of tokens to merge.

    Raises:
        ValueError: if a file is damaged.
    """
    files = {"vocab": str(vocabulary)} | ({"merges": str(merges)} if merges else {})
    names = " or ".join(files.values())

    # The file that may be cut short without an error from the reader is the one of lines, so its lines are counted.
    try:
        lines = sum(1 for line in (merges or vocabulary).read_text(encoding="utf-8").splitlines() if line)
        loaded = kind(**files)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"{names} is damaged ({type(error).__name__}): fetch it again") from error

    # BERT has one line per token. CLIP's tokens are the 256 bytes, the 256 bytes that end a word, one token per merge,
    # and 2 special ones: 49,408 tokens are 49,408 - 512 - 2 = 48,894 merges, and the version makes 48,895 lines.
    expected = size - 2 * 256 - 2 + 1 if merges else size
    if len(loaded) != size or lines != expected:
        raise ValueError(f"{names} is damaged: {len(loaded)} tokens in {lines} lines, not {size}; fetch it again")
    return loaded
