"""The reward vlm against what transformers' own processor and `generate` say of the same small random weights.

The files are in the official layout of Qwen2.5-VL, at reduced size (tests/reference/weights.py). `vlm` and `vlm-7b`
differ in it: two files with output weights tied to the embedding, and five files with output weights of their own.
With -s the largest differences are printed.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

import preference as P
import pretrained
import rewards as R
import train_image

sys.path.insert(0, str(Path(__file__).parent / "reference"))

import weights

NAMES = list(weights.VLM)
PROMPTS = [
    "a red cat",
    "",
    "two  spaces\tand\na line",
    "一只红色的猫, caf\u00e9 \U0001f431",
    "very long " * 12,
    '{0} {} {x} "quoted"',
]
SIZES = [(64, 32), (48, 48), (97, 301), (225, 224), (250, 333)]  # width, height


def pictures() -> list[torch.Tensor]:
    """(1, 3, H, W) in [0, 1], one of each size."""
    found = {p.size: p for p in weights.pictures()}
    return [torch.from_numpy(np.array(found[s])).permute(2, 0, 1)[None].float() / 255 for s in SIZES]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The files of both rewards at reduced size; whatever this machine's cache holds is not looked at."""
    path = tmp_path_factory.mktemp("weights")
    for name in NAMES:
        weights.vlm_files(path, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "try_to_load_from_cache", lambda *_: None)
        yield path


@pytest.fixture(scope="module")
def loaded(folder):
    """Both rewards, with batches of 4."""
    return {name: R.REWARDS[name](pretrained.Setup(str(folder), batch=4)) for name in NAMES}


class Authority:
    """transformers' own model, read from the folder by its own loader, and its own processor of pictures and words."""

    def __init__(self, folder: Path, name: str, dtype=torch.float32):
        path = folder / weights.QWEN2_5[name]
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.answers = self.tokenizer.convert_tokens_to_ids(["Yes", "No"])

        # The whole processor also wants one for videos, which needs torchvision; no test has a video for it.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Qwen2_5_VLProcessor, "check_argument_for_proper_class", lambda *_: None)
            template = json.loads((path / "chat_template.json").read_text())["chat_template"]
            images = Qwen2VLImageProcessorPil.from_pretrained(path)
            self.processor = Qwen2_5_VLProcessor(images, self.tokenizer, None, chat_template=template)

    def inputs(self, x: torch.Tensor, prompts: list[str], question: str = pretrained.QUESTION, side: str = "left"):
        """What the processor makes of a batch (B, 3, H, W) and B prompts, padded on one side."""
        before, _, after = question.partition("{prompt}")
        texts = []
        for prompt in prompts:
            content = [{"type": "image"}, {"type": "text", "text": before + prompt + after}]
            message = [{"role": "user", "content": content}]
            texts.append(self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
        images = [Image.fromarray(picture) for picture in P.to_uint8(x)]
        common = {"padding": True, "padding_side": side, "return_tensors": "pt"}
        return self.processor(text=texts, images=images, **common)

    def __call__(self, x: torch.Tensor, prompts: list[str], question: str = pretrained.QUESTION) -> torch.Tensor:
        """(B,) P(Yes) / (P(Yes) + P(No)) at the first token that `generate` would sample from."""
        keep = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        logits = self.model.generate(**self.inputs(x, prompts, question), **keep).logits[0]
        probability = logits.float().softmax(1)[:, self.answers]  # among all tokens
        return probability[:, 0] / probability.sum(1)


@pytest.fixture(scope="module")
def authority(folder):
    """transformers' own models."""
    return {name: Authority(folder, name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_generate(loaded, authority, name):
    """Five sizes of picture; prompts empty, long, Chinese, with braces. Ours are scored in batches, theirs alone."""
    ours = torch.stack([loaded[name](x.expand(len(PROMPTS), -1, -1, -1), PROMPTS) for x in pictures()])
    theirs = torch.stack([torch.cat([authority[name](x, [p]) for p in PROMPTS]) for x in pictures()])
    difference = (ours - theirs).abs().max().item()
    print(f"\n{name:<7} {ours.numel()} scores from {theirs.min():.2f} to {theirs.max():.2f} differ by {difference:.1e}")
    assert difference < 2e-6
    assert ours.dtype == torch.float32 and ours.min() >= 0 and ours.max() <= 1
    assert min(theirs.std(0).min(), theirs.std(1).min()) > 1e-3  # both the picture and the prompt matter


def test_padding_does_not_count(loaded, authority):
    """A batch of prompts of different lengths: alone, backwards, and in transformers' batch padded on either side."""
    x = torch.rand(len(PROMPTS), 3, 40, 60, generator=torch.Generator().manual_seed(0))
    ours = loaded["vlm"](x, PROMPTS)
    alone = torch.cat([loaded["vlm"](x[i : i + 1], PROMPTS[i : i + 1]) for i in range(len(x))])
    near = {"atol": 2e-6, "rtol": 0}
    torch.testing.assert_close(ours, alone, **near)
    torch.testing.assert_close(loaded["vlm"](x.flip(0), PROMPTS[::-1]).flip(0), ours, **near)
    torch.testing.assert_close(authority["vlm"](x, PROMPTS), ours, **near)

    # Padded on the right the answer begins after each row's own last token.
    inputs = authority["vlm"].inputs(x, PROMPTS, side="right")
    last = inputs["attention_mask"].sum(1) - 1
    with torch.no_grad():
        logits = authority["vlm"].model(**inputs).logits[torch.arange(len(x)), last][:, authority["vlm"].answers]
    torch.testing.assert_close(logits.softmax(1)[:, 0], ours, **near)


def test_the_text_and_the_patches_are_the_processors(loaded, authority):
    """The words before tokens are made of them, and a reward that is called twice says the same."""
    for prompt in PROMPTS:
        ids = authority["vlm"].inputs(torch.rand(1, 3, 56, 56), [prompt])["input_ids"][0]
        text = loaded["vlm"].text(prompt).replace(P.PICTURE, P.PICTURE * 4)
        assert loaded["vlm"].tokenizer(text)["input_ids"] == ids.tolist()
    x = torch.rand(2, 3, 30, 30)
    assert torch.equal(loaded["vlm"](x, ["a", "b"]), loaded["vlm"](x, ["a", "b"]))


def test_half_precision_is_close(folder, loaded):
    """bfloat16 moves scores by less than a fifth of their spread, and does not round them to a few steps."""
    x = torch.rand(8, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    prompts = [PROMPTS[0]] * 4 + PROMPTS[:4]
    reward = R.REWARDS["vlm"](pretrained.Setup(str(folder), dtype=torch.bfloat16))
    assert next(reward.model.parameters()).dtype == torch.bfloat16
    full, half = loaded["vlm"](x, prompts), reward(x, prompts)
    difference = (half - full).abs().max().item()
    print(f"\nvlm in bfloat16 differs by {difference:.1e}, scores from {full.min():.2f} to {full.max():.2f}")
    assert 0 < difference < 0.2 * (full.max() - full.min())
    assert half.unique().numel() == len(x)


def test_offloaded(folder, loaded, monkeypatch):
    """The model goes to the device and back, and scores the same."""
    reward, moved = R.REWARDS["vlm"](pretrained.Setup(str(folder), offload=True)), []
    assert [m for m in vars(reward).values() if isinstance(m, torch.nn.Module)] == reward.models
    x = torch.rand(2, 3, 40, 50)
    torch.testing.assert_close(reward(x, ["a", "b"]), loaded["vlm"](x, ["a", "b"]), atol=2e-6, rtol=0)
    monkeypatch.setattr(reward.model, "to", moved.append)
    reward(x, ["a", "b"])
    assert moved == ["cpu", "cpu"]


def test_the_question_is_asked(folder, authority):
    """Another question, whose place for the prompt stands at its beginning; braces in a prompt are letters."""
    question = "{prompt}: is {this} in the picture?"
    reward = R.REWARDS["vlm"](pretrained.Setup(str(folder), question=question))
    x, prompts = torch.rand(2, 3, 40, 50), ["a {prompt}", "{} {0}"]
    torch.testing.assert_close(reward(x, prompts), authority["vlm"](x, prompts, question), atol=2e-6, rtol=0)
    assert (reward(x, prompts) - authority["vlm"](x, prompts)).abs().min() > 1e-4


@pytest.mark.parametrize("question", ["Is this a good picture?", "Is it {}?", "{prompt}? <|image_pad|>"])
def test_a_question_without_a_prompt_or_with_a_token_is_refused(folder, tmp_path, capsys, question):
    """By a run, before its folder is made, and by `rewards.py score`: exit code 2 and one sentence."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    asked = ["--reward", "vlm", "--reward-weights", str(folder), "--reward-question", question]
    for main, argv in (
        (train_image.main, ["--out", str(tmp_path / "run"), *asked]),
        (R.main, ["score", str(tmp_path / "a.png"), "--prompt", "a", *asked]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and "--reward-question must hold {prompt}" in message and question in message
    assert not (tmp_path / "run").exists()


def test_what_it_cannot_score_is_refused(folder, loaded):
    """A prompt that spells out a token, before any model is loaded; a picture more than 200 times as long as wide."""
    for prompt in ("a <|image_pad|> cat", "<|im_end|>", "a<|endoftext|>"):
        with pytest.raises(P.CannotScore, match="the vlm-7b reward has tokens written"):
            R.load_rewards("vlm-7b", "", ["a cat", prompt], torch.ones(1, 3, 32, 32), pretrained.Setup(str(folder)))
    with pytest.raises(P.CannotScore, match="aspect ratio"):
        R.score({"vlm": loaded["vlm"]}, torch.rand(1, 3, 1, 500), ["a"])
    assert loaded["vlm"](torch.rand(1, 3, 2, 390), ["a"]).isfinite().all()


def test_of_a_video_three_frames_count(loaded):
    """Their mean, as with all rewards of pictures."""
    video = torch.rand(2, 9, 3, 32, 32)
    frames = torch.stack([loaded["vlm"](video[:, t], ["a", "b"]) for t in (0, 4, 8)])
    scores = R.score({"vlm": loaded["vlm"]}, video, ["a", "b"])["vlm"]
    torch.testing.assert_close(scores, frames.mean(0), atol=2e-6, rtol=0)


ENTRIES = [(name, file) for name in NAMES for _, file in pretrained.FILES[name]]


@pytest.fixture
def copied(folder, tmp_path):
    """A function that copies a reward's files, to be damaged, and returns their folder."""
    return lambda name: Path(shutil.copytree(folder / weights.QWEN2_5[name], tmp_path / weights.QWEN2_5[name]))


@pytest.mark.parametrize("name, file", ENTRIES)
def test_missing_and_damaged_files_are_named(copied, tmp_path, name, file):
    """Each file in turn: cut in half, then gone."""
    path = copied(name) / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError) as error:
        R.REWARDS[name](pretrained.Setup(str(tmp_path)))
    assert str(path) in str(error.value) and "fetch it again" in str(error.value) and "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(ValueError, match=f"lacks {file}; fetch with: hf download {weights.QWEN2_5[name]} {file}"):
        R.load_rewards(name, "", ["a"], torch.ones(1, 3, 32, 32), pretrained.Setup(str(tmp_path)))


@pytest.mark.parametrize("fault", ["missing", "surplus", "shape", "vocabulary", "embedding"])
def test_files_of_another_model_are_refused(copied, tmp_path, fault):
    """A weight missing, left over or of another shape; a vocabulary without Yes; no embedding to tie to."""
    repository = copied("vlm")
    if fault == "vocabulary":
        weights.qwen_tokenizer(tmp_path, weights.QWEN2_5["vlm"])
    key = "model.embed_tokens.weight" if fault == "embedding" else "model.norm.weight"
    for path in repository.glob("model-*"):
        state = load_file(path)
        if key in state and fault in ("missing", "embedding"):
            del state[key]
        elif key in state and fault in ("surplus", "shape"):
            state["surplus.weight" if fault == "surplus" else key] = torch.zeros(3)
        save_file(state, path)
    with pytest.raises(
        ValueError, match="is damaged or not that of" if fault == "vocabulary" else "does not fit Qwen2"
    ):
        R.REWARDS["vlm"](pretrained.Setup(str(tmp_path)))


@pytest.mark.parametrize("name, size", [("vlm", 7_509_245_952), ("vlm-7b", 16_584_333_312)])
def test_the_official_sizes_fit(name, size):
    """At full size all names and shapes are transformers'; two bytes per weight make the size of the official files."""
    config = weights.vlm_config(name)
    shapes = weights.vlm_shapes(config)
    assert 2 * sum(int(np.prod(shape)) for shape in shapes.values()) == size
    ours = pretrained.renamed(shapes, P.QWEN2_5)
    if config["tie_word_embeddings"]:
        ours["lm_head.weight"] = ours["model.language_model.embed_tokens.weight"]
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == ours
    assert model.config.vision_config.patch_size * weights.PREPARATION["merge_size"] == 28


def test_command_line(folder, tmp_path, capsys):
    """`rewards.py score` asks the question that is given; `list` finds the files of both rewards."""
    picture = tmp_path / "a.png"
    Image.new("RGB", (64, 32), (200, 10, 10)).save(picture)
    where, question = ["--reward-weights", str(folder)], 'Is "{prompt}" here? Answer Yes or No.'
    asked = ["--prompt", "a cat", "--reward-question", question]
    R.main(["score", "--reward", "vlm,vlm-7b", str(picture), *asked, *where])
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
    for name in NAMES:
        reward = R.REWARDS[name](pretrained.Setup(str(folder), question=question))
        assert scores[name] == pytest.approx(reward(R.read_picture(str(picture)), ["a cat"]).tolist(), abs=1e-6)
    assert scores["vlm-7b"] != scores["vlm"]
    R.main(["list", *where])
    state = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {state[name] for name in NAMES} == {"ready"}
