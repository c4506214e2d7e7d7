"""Preference rewards on seeded random weights in the official layouts, against the official packages' own scores.

tests/reference/scores.json holds what the packages said, run by authority.py in an environment of their own;
`make reference` asks them again.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import BlipTextModel, BlipVisionModel, CLIPConfig, CLIPModel

import preference as P
import pretrained
import rewards as R

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "reference"))

import compare  # noqa: E402
import weights  # noqa: E402

AUTHORITY = json.loads((HERE / "reference/scores.json").read_text())
NAMES = [n for n in AUTHORITY if n != "videoalign"]
EVERY = list(AUTHORITY)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The six rewards' files at reduced size, and preference.py told of the reduced architectures."""
    path = tmp_path_factory.mktemp("weights")
    weights.write(path)
    with pytest.MonkeyPatch.context() as patch:
        compare.reduce_architectures(path, patch.setattr)
        patch.setattr(pretrained, "try_to_load_from_cache", lambda *_: None)  # whatever this machine's cache holds
        yield path


@pytest.fixture(scope="module")
def loaded(folder):
    """The five rewards of pictures, with batches of 4."""
    return {name: R.REWARDS[name](pretrained.Setup(str(folder), batch=4)) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_official_packages(loaded, name):
    """88 scores: 8 shapes of picture; prompts empty, long, Chinese, Russian, with entities and broken encoding."""
    for ours, theirs in zip(compare.our_scores(loaded[name]), AUTHORITY[name], strict=True):
        assert ours == pytest.approx(theirs, abs=compare.limit(name, theirs), rel=0)
    assert np.std(AUTHORITY[name]) > 1e-3  # they depend on the picture: constant scores would be easy to match


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_one_by_one_in_order(loaded, name):
    """A batch, the same backwards, and each picture alone."""
    x = torch.cat([t[..., :48, :48] for t in compare.tensors() if min(t.shape[2:]) >= 48])
    prompts = (weights.PROMPTS * 2)[: len(x)]
    one_by_one = torch.cat([loaded[name](x[i : i + 1], prompts[i : i + 1]) for i in range(len(x))])
    assert one_by_one.unique().numel() == len(x)
    torch.testing.assert_close(loaded[name](x, prompts), one_by_one, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(loaded[name](x.flip(0), prompts[::-1]), one_by_one.flip(0), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_close(folder, loaded, name):
    """bfloat16 differs, by less than a twentieth of the scores' range."""
    x, prompts = torch.rand(6, 3, 40, 50, generator=torch.Generator().manual_seed(0)), weights.PROMPTS[:6]
    full = loaded[name](x, prompts)
    half = R.REWARDS[name](pretrained.Setup(str(folder), dtype=torch.bfloat16))
    assert 0 < (half(x, prompts) - full).abs().max() < 0.05 * (full.max() - full.min())


@pytest.mark.parametrize("name", NAMES)
def test_all_parts_go_to_the_device_and_back(folder, name):
    """Every module is listed in `models`, goes to the device and comes back.

    On the meta device, which computes nothing, a module left behind would raise an error, and the scores come out on
    that device. ImageReward looks at values, which meta tensors do not have.
    """
    reward = R.REWARDS[name](pretrained.Setup(str(folder)))
    modules = [m for m in vars(reward).values() if isinstance(m, torch.nn.Module)]
    assert {id(m) for m in modules} == {id(m) for m in reward.models}
    if name != "imagereward":
        reward.setup = pretrained.Setup(device="meta")
        for model in reward.models:
            model.to("meta")
        assert reward.scores(np.zeros((2, 40, 50, 3), np.uint8), ["a", "b"]).device.type == "meta"
    moved = []
    for model in reward.models:
        model.to = lambda device, moved=moved: moved.append(device)
    reward.setup, reward.scores = (
        pretrained.Setup(device="X", offload=True),
        lambda pictures, prompts: torch.zeros(len(prompts)),
    )
    reward(torch.zeros(1, 3, 32, 32), ["a"])
    assert moved == ["X"] * len(reward.models) + ["cpu"] * len(reward.models)


def test_pictures_of_every_mode_are_read_as_rgb(tmp_path, loaded):
    """Red plain, on a palette and half transparent; grey of 8 and of 16 bits; black and white: the pixels are known."""
    red = Image.new("RGB", (30, 20), (200, 10, 10))
    transparent = red.convert("RGBA")
    transparent.putalpha(100)
    pictures = {"RGB": red, "P": red.convert("P", palette=Image.Palette.ADAPTIVE), "RGBA": transparent}
    pictures |= {"L": Image.new("L", (30, 20), 77), "1": Image.new("1", (30, 20), 1)}
    pictures["I;16"] = Image.fromarray(np.full((20, 30), 77 * 257, np.uint16))
    for mode, picture in pictures.items():
        picture.save(tmp_path / "x.png")
        x = R.read_picture(str(tmp_path / "x.png"))
        expected = {"L": (77,) * 3, "I;16": (77,) * 3, "1": (255,) * 3}.get(mode, (200, 10, 10))
        assert x.shape == (1, 3, 20, 30) and R.to_uint8(x)[0, 5, 5].tolist() == list(expected), mode
        assert loaded["hpsv2"](x, ["a red cat"]).isfinite().all()
    (tmp_path / "no.png").write_text("text")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    for name, words in (
        ("no.png", "cannot be read"),
        ("float.tiff", "of no known range"),
        ("none.png", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=words):
            R.read_picture(str(tmp_path / name))


@pytest.mark.parametrize("size", [(1, 500), (1000, 2), (2, 1000)])
def test_extreme_shapes_are_scored(loaded, size):
    """Pictures so narrow that a rounded side would be 0."""
    for reward in loaded.values():
        assert reward(torch.rand(1, 3, *size), ["a"]).isfinite().all()


ENTRIES = [(name, *pair) for name in EVERY for pair in pretrained.FILES[name]]


def copy(folder, tmp_path, name):
    """The files of one reward, to be damaged."""
    for sub in {r for r, _ in pretrained.FILES[name]}:
        shutil.copytree(folder / sub, tmp_path / sub)


@pytest.mark.parametrize("name, repository, file", ENTRIES)
def test_a_missing_file_is_named_with_the_command_that_fetches_it(folder, tmp_path, name, repository, file):
    """Each file of each reward in turn; the command brings it into the folder."""
    copy(folder, tmp_path, name)
    (tmp_path / repository / file).unlink()
    with pytest.raises(ValueError) as error:
        R.load_rewards(name, "", ["a cat"], torch.ones(1, 3, 32, 32), pretrained.Setup(str(tmp_path)))
    fetch = (
        "curl -fL --create-dirs -o"
        if repository in pretrained.GITHUB
        else f"hf download {repository} {file} --local-dir"
    )
    assert f"lacks {file}; fetch with: {fetch} {tmp_path}/{repository}" in str(error.value)


def test_all_missing_files_are_fetched_by_one_line():
    """What stands behind "fetch with:" is shell and nothing else: a command per repository, joined by &&."""
    with pytest.raises(ValueError) as error:
        pretrained.weight_files("aesthetic", pretrained.Setup())
    message, _, line = str(error.value).partition("fetch with: ")
    hub, github = line.split(" && ")
    assert hub == f"hf download {pretrained.CLIP_L} model.safetensors config.json vocab.json merges.txt"
    assert github.startswith(f"curl -fL --create-dirs -o weights/{pretrained.AESTHETIC}/sac+logos")
    assert github.endswith(f"https://github.com/{pretrained.AESTHETIC}/raw/main/sac+logos+ava1-l14-linearMSE.pth")
    assert "give --reward-weights weights" in message


def test_files_may_lie_in_the_folder_and_in_the_cache(folder, tmp_path, monkeypatch, loaded):
    """Weights in the folder, vocabulary in the cache: each file is taken from where it is."""
    copy(folder, tmp_path, "pickscore")
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / pretrained.PICK / file).unlink()
    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda repository, file: str(folder / repository / file))
    x = torch.rand(3, 3, 32, 32)
    reward = P.PickScore(pretrained.Setup(str(tmp_path)))
    torch.testing.assert_close(reward(x, weights.PROMPTS[:3]), loaded["pickscore"](x, weights.PROMPTS[:3]))


@pytest.mark.parametrize("fault", ["empty", "half", "page"])
@pytest.mark.parametrize("name, repository, file", ENTRIES)
def test_a_damaged_file_is_one_sentence_that_names_it(folder, tmp_path, name, repository, file, fault):
    """An empty file, half of it, and the web page of a failed download."""
    copy(folder, tmp_path, name)
    path = tmp_path / repository / file
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "page": b"<html>404</html>"}[fault])
    with pytest.raises(ValueError) as error:
        R.REWARDS[name](pretrained.Setup(str(tmp_path)))
    assert str(path) in str(error.value) and "fetch it again" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "list", "number"])
def test_wrong_weights_are_one_sentence(folder, tmp_path, name, fault):
    """A weight missing, one too many, one of another shape, and files that hold a list or a number."""
    copy(folder, tmp_path, name)
    path = tmp_path / weights.FILES[name]
    state = pretrained.read_weights(path)
    key = next(
        k
        for k in state
        if k.endswith(("ln_pre.weight", "pre_layrnorm.weight", "layers.2.weight", "q_proj.base_layer.weight"))
    )
    if fault == "missing":
        del state[key]
    elif fault in ("extra", "shape"):
        state["surplus.weight" if fault == "extra" else key] = torch.zeros(3, 3)
    if path.suffix == ".safetensors":
        save_file(state if fault in ("missing", "extra", "shape") else {}, path)
    else:
        torch.save({"list": [1], "number": {"state_dict": {"a": 1}}}.get(fault, state), path)
    with pytest.raises(ValueError) as error:
        R.REWARDS[name](pretrained.Setup(str(tmp_path)))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_official_checkpoints_fit_the_official_architectures(monkeypatch):
    """Our full-size models have every key and shape of the packages' models, which manifest.json lists."""
    monkeypatch.undo()

    def meta(name):
        return {k: torch.empty(s, device="meta") for k, s in weights.official(name).items() if "position_ids" not in k}

    def shapes(state, start=""):
        return {k.removeprefix(start): v.shape for k, v in state.items() if k.startswith(start)}

    import importlib.util

    spec = importlib.util.spec_from_file_location("official_preference", P.__file__)
    official = importlib.util.module_from_spec(spec)
    sys.modules["official_preference"] = official
    spec.loader.exec_module(official)  # the module as it stands, without the reduced architectures
    with torch.device("meta"):
        vit_h, vision = CLIPModel(official.VIT_H), BlipVisionModel(official.BLIP_VISION)
        text = BlipTextModel(official.BLIP_TEXT, add_pooling_layer=False)
        text_sizes = {"num_attention_heads": 12, "projection_dim": 768, "hidden_size": 768, "intermediate_size": 3072}
        large = CLIPModel(
            CLIPConfig(
                vision_config=official.VIT_L | {"patch_size": 14, "projection_dim": 768},
                text_config=text_sizes,
                projection_dim=768,
            )
        )
    assert shapes(official.from_open_clip(meta("hpsv2"))) == shapes(vit_h.state_dict())
    assert shapes(meta("pickscore")) == shapes(vit_h.state_dict())
    assert shapes(meta("clip")) == shapes(large.state_dict())
    blip = official.renamed(meta("imagereward"), official.BLIP)
    assert shapes(blip, "vision.") == shapes(vision.state_dict())
    assert shapes(blip, "text.") == shapes(text.state_dict())
    for name, start in (("imagereward", "mlp."), ("aesthetic", "")):
        state = {
            k.removeprefix(start): torch.zeros(s) for k, s in weights.official(name).items() if k.startswith(start)
        }
        official.linear_head(state, Path("x"), 768)
    assert sum(v.numel() for v in meta("hpsv2").values()) == 986_109_441
    qwen = official.merged(official.renamed(meta("videoalign"), official.QWEN), 2.0)
    heads = {"rm_head.weight": (1, 1536), "lm_head.weight": (151660, 1536)}
    with torch.device("meta"):
        assert shapes(qwen) == shapes(official.Qwen2VLModel(official.QWEN2_VL).state_dict()) | heads
    # The published file has 5,031,072,529 bytes: 2 per weight, and about 290 of names and offsets per key.
    assert 0 < 5_031_072_529 - 2 * sum(v.numel() for v in meta("videoalign").values()) < 400 * len(meta("videoalign"))


@pytest.fixture(scope="module")
def video_align(folder):
    """VideoAlign with batches of 4."""
    return P.VideoAlign(pretrained.Setup(str(folder), batch=4))


def small_videos(n: int) -> torch.Tensor:
    """(n, 9, 3, 32, 32) in [0, 1], each of a seed of its own."""
    return torch.from_numpy(np.stack([weights.videos(i)[0] for i in range(n)])).permute(0, 1, 4, 2, 3).float() / 255


def test_videoalign_is_the_official_code(video_align):
    """150 ratings: VQ, MQ and TA of videos of 5 to 81 frames, enlarged and reduced, each with ten prompts."""
    ours = compare.our_ratings(video_align)
    assert ours == pytest.approx(AUTHORITY["videoalign"], abs=1e-5, rel=1e-5)
    assert np.std(np.reshape(ours, (-1, 3)), 0).min() > 0.1


def test_videoalign_in_batches_and_in_half_precision(folder, video_align):
    """Five videos in batches of four and one by one; prompts of different lengths, so that padding must not count."""
    x, prompts = small_videos(5), ["a", "a red cat", "very long " * 9, "", "b"]
    rated = video_align(x, prompts)
    one_by_one = torch.cat([video_align(x[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(rated, one_by_one, atol=2e-5, rtol=1e-5)
    half = P.VideoAlign(pretrained.Setup(str(folder), dtype=torch.bfloat16))(x, prompts)
    assert 0 < (half - rated).abs().max() < 0.3


def test_videoalign_sums_its_ratings_and_looks_once(folder, monkeypatch):
    """All four rewards of the same videos and prompts run the model once; other videos or prompts run it again."""
    looks, whole = [], P.VideoAlign.scores
    monkeypatch.setattr(P.VideoAlign, "scores", lambda *a: looks.append(1) or whole(*a))
    x, prompts, names = small_videos(2), ["a red cat", "a dog"], ",".join(pretrained.PARTS)
    rewards, _ = R.load_rewards(names, "", prompts, torch.ones(1, 9, 3, 32, 32), pretrained.Setup(str(folder)))
    del looks[:]
    scores = R.score(rewards, x, prompts)
    assert looks == [1]
    ratings = [scores[f"videoalign-{d}"] for d in ("vq", "mq", "ta")]
    torch.testing.assert_close(scores["videoalign"], sum(ratings))
    torch.testing.assert_close(torch.stack(ratings, 1), P.VideoAlign(pretrained.Setup(str(folder)))(x, prompts))
    R.score(rewards, x, prompts[::-1])
    R.score(rewards, x.clone(), prompts[::-1])
    assert looks == [1] * 4  # another model, other prompts, other videos


def test_videoalign_refuses_what_it_cannot_see_or_read(folder):
    """Pictures, videos of one frame, and prompts that spell out a token."""

    def load(prompt, blank):
        return R.load_rewards("videoalign-mq", "", [prompt], blank, pretrained.Setup(str(folder)))

    for blank in (torch.ones(1, 3, 32, 32), torch.ones(1, 1, 3, 32, 32)):
        with pytest.raises(P.CannotScore, match="videos of two frames"):
            load("a cat", blank)
    with pytest.raises(P.CannotScore, match="tokens written"):
        load("a <|MQ_reward|> cat", torch.ones(1, 9, 3, 32, 32))


def test_command_line(folder, tmp_path, capsys):
    """`rewards.py score` and `list`: the last line is a JSON document, and what cannot be used is exit code 2."""
    for i, picture in enumerate(weights.pictures()[:2]):
        picture.save(tmp_path / f"{i}.png")
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    common = ["--reward-weights", str(folder)]
    R.main(["score", "--reward", "hpsv2,aesthetic", *files, "--prompt", weights.PROMPTS[0], *common])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("hpsv2", "aesthetic"):
        assert document["scores"][name] == pytest.approx(AUTHORITY[name][:2], abs=1e-5)
    R.main(["list", *common])
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1]).values()) == {"ready"}
    R.main(["list"])
    state = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert state["ocr"] == "ready" and "hf download xswu/HPSv2 HPS_v2.1_compressed.pt" in state["hpsv2"]
    one = ["--prompt", "a"]
    for bad in (
        one * 3,
        [*one, "--reward", "beauty"],
        [*one, "--reward", ""],
        [*one, "--device", "cuda"],
        ["--prompt", "\udcff"],
    ):
        with pytest.raises(SystemExit) as stop:
            R.main(["score", "--reward", "clip", *files, *bad, *common])
        assert stop.value.code == 2


def test_training_on_a_preference_model(folder, tmp_path, capsys):
    """One iteration on two preference models, watched by a third: all of them are in the document and the metrics."""
    import train_image

    flags = "--leaves 4 --prompts-per-iteration 2 --eval-size 4 --iterations 1"
    flags += " --reward clip:0.1,pickscore --watch aesthetic --reward-mix advantage"
    train_image.main([*flags.split(), "--reward-weights", str(folder), "--out", str(tmp_path / "a")])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"clip_after", "pickscore_after", "aesthetic_after"} <= set(document)
    row = json.loads((tmp_path / "a/metrics.jsonl").read_text().splitlines()[-1])
    assert {"reward_clip", "reward_pickscore", "heldout_aesthetic"} <= set(row)


@pytest.mark.slow
def test_full_size_equals_the_packages(tmp_path):
    """HPSv2.1 and ImageReward at full size, random weights, 3 pictures: 8 GB of disk, 10 GB of memory, some minutes."""
    root = HERE.parent
    for python, script, more in ((".venv-reference", "authority.py", ["--full"]), (".venv", "compare.py", [])):
        command = [root / python / "bin/python", HERE / "reference" / script, tmp_path, *more]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout[-3000:])
        assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout.splitlines()[-1])
    assert set(document) == {"hpsv2", "imagereward"} and all(row["passed"] for row in document.values())
