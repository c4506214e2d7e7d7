"""Video: rewards on drawn clips whose motion is known, and train_video.py as a user meets it."""

import json
import random
import re
from functools import lru_cache
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from test_policies import a_tree_and_an_update
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel
from workers import prepared_run

import flags as flags_module
import loop
import preference
import report
import rewards as R
import train_image
import train_video
from models import WanPolicy
from pretrained import Setup
from tiny.make_tiny_wan import COLOURS, MOTIONS, SHAPES, build, combinations, draw, prompt

HERE = Path(__file__).parent.parent
WAN_1_3B = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}
WAN_1_3B |= {"text_dim": 4096, "freq_dim": 256, "in_channels": 16, "out_channels": 16, "cross_attn_norm": True}
WAN_1_3B |= {"qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "patch_size": (1, 2, 2)}
ROWS = st.tuples(st.sampled_from(COLOURS), st.sampled_from(SHAPES), st.sampled_from(list(MOTIONS)))
OPPOSITE = {
    "moves left": "moves right",
    "moves right": "moves left",
    "moves up": "moves down",
    "moves down": "moves up",
}


def clip(row, seed=0):
    """A drawn video (1, 9, 3, H, W) of a row: colour, shape, motion."""
    return torch.from_numpy(draw(*row, random.Random(seed))).float()[None]


@settings(deadline=None, max_examples=40)
@given(ROWS, st.integers(0, 1000))
def test_motion_is_one_when_right_and_zero_when_opposite(row, seed):
    """Every drawn motion scores high under its own prompt, near 0 under the others, and so does it played backwards."""
    x = clip(row, seed)
    assert R.motion(x, [prompt(*row)]).item() > 0.8
    for other in MOTIONS:
        if other != row[2]:
            assert R.motion(x, [prompt(*row[:2], other)]).item() < 0.1, other
    if row[2] in OPPOSITE:
        assert R.motion(x.flip(1), [prompt(*row[:2], OPPOSITE[row[2]])]).item() == 1


def test_motion_punishes_jerks_and_flicker():
    """Frames that stand still and jump, and a brightness that changes from frame to frame."""
    x, p = clip(("red", "circle", "moves right")), ["a red circle moves right"]
    jerky = x[:, [0, 0, 4, 4, 4, 8, 8, 8, 8]]
    flicker = (x + 0.08 * torch.randn(9, 1, 1, 1, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert R.motion(x, p) == 1 and R.motion(jerky, p) < 0.3 and R.motion(flicker, p) < 0.8
    assert R.temporal(x, p) > 0.95 > R.temporal(flicker, p)
    assert R.temporal(x[:, :1].expand(-1, 9, -1, -1, -1), p) == 1  # a frozen clip is consistent


def test_the_command_line_scores_a_video(tmp_path, capsys):
    """`python rewards.py score` of an mp4, once with its prompt and once with the opposite one."""
    x = clip(("blue", "square", "moves right"))
    frames = torch.nn.functional.interpolate(x[0], scale_factor=2)
    imageio.mimwrite(tmp_path / "a.mp4", list(R.to_uint8(frames)), fps=8, macro_block_size=1)
    prompts = [w for d in ("right", "left") for w in ("--prompt", f"a blue square moves {d}")]
    R.main(["score", "--reward", "motion,colour", *[str(tmp_path / "a.mp4")] * 2, *prompts])
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
    assert scores["motion"][0] > 0.9 and scores["motion"][1] == 0 and min(scores["colour"]) > 0.9


# ---------------------------------------------------------------------------------------------------------- frame rates
def grey_clip(path: Path, **options) -> str:
    """A file of nine frames, each a little lighter."""
    frames = [np.full((32, 32, 3), 25 * i, np.uint8) for i in range(9)]
    imageio.mimwrite(path, frames, **options)
    return str(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.MP4", "a.mov", "a.Mkv"])
def test_a_video_is_read_with_its_rate(tmp_path, name):
    """Its ending may be written in capitals."""
    path = grey_clip(tmp_path / name, fps=12.5, macro_block_size=1)
    assert R.read_picture(path).shape == (1, 9, 3, 32, 32) and R.frame_rate(path) == 12.5


def test_a_gif_is_a_video_with_a_rate(tmp_path):
    """From the times of its frames: one that stands twice as long is two. Without times there is no rate."""
    path = grey_clip(tmp_path / "a.Gif", duration=[100, 200] * 4 + [100], loop=0)
    x, twice = R.read_picture(path), torch.tensor([0.0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8])
    assert x.shape == (1, 13, 3, 32, 32) and R.frame_rate(path) == 10
    assert (x.mean((2, 3, 4)) * 255 - 25 * twice).abs().max() < 8  # its palette has 256 colours
    assert R.gif_repeats([30, 40, 0]) == [1, 1, 1] and R.gif_repeats([0, 0]) == [1, 1]
    assert R.frame_rate(grey_clip(tmp_path / "b.gif", duration=0)) is None
    Image.new("RGB", (32, 32)).save(tmp_path / "c.gif")
    assert R.read_picture(str(tmp_path / "c.gif")).shape == (1, 3, 32, 32)


def test_a_damaged_video_is_one_sentence(tmp_path):
    """What ffmpeg reports, its first line; a GIF that was cut short."""
    (tmp_path / "a.mp4").write_bytes(b"no video" * 100)
    whole = Path(grey_clip(tmp_path / "b.gif", duration=100)).read_bytes()
    (tmp_path / "b.gif").write_bytes(whole[: len(whole) // 2])
    for name in ("a.mp4", "b.gif"):
        with pytest.raises(ValueError, match="cannot be read as a picture") as caught:
            R.read_picture(str(tmp_path / name))
        assert "\n" not in str(caught.value)


@pytest.fixture
def rated_by_its_rate(monkeypatch):
    """In the place of videoalign-mq, which needs its weights: a reward whose score is the frame rate."""
    monkeypatch.setattr(R, "weight_files", lambda name, setup: [])
    monkeypatch.setitem(R.REWARDS, "videoalign-mq", lambda setup: lambda x, p: torch.full((len(p),), setup.fps))


def test_the_command_line_takes_the_rate_from_the_file(tmp_path, capsys, rated_by_its_rate):
    """Each file's own; --fps goes before it. Where it says none, and a reward needs it, that is one sentence."""
    fast = grey_clip(tmp_path / "a.mp4", fps=12.5, macro_block_size=1)
    files = [fast, grey_clip(tmp_path / "b.gif", duration=50), fast]

    def rates(*argv):
        R.main(["score", "--reward", "videoalign-mq,colour", *argv, "--prompt", "red"])
        scores = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
        assert len(scores["colour"]) == len(scores["videoalign-mq"])
        return scores["videoalign-mq"]

    assert rates(*files) == [12.5, 20, 12.5] and rates(*files, "--fps", "24") == [24] * 3

    timeless = grey_clip(tmp_path / "c.gif", duration=0)
    assert rates(timeless, "--fps", "8") == [8]
    for argv, words in (
        ([], "c.gif does not say how many frames it has per second: give --fps"),
        (["--fps", "0"], "0.0"),
    ):
        with pytest.raises(SystemExit) as stop:
            rates(timeless, *argv)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    R.main(["score", "--reward", "colour", timeless, "--prompt", "red"])  # it does not depend on the rate


def test_videoalign_watches_two_frames_per_second():
    """Of 81: 5.06 s at 16 frames per second, 3.4 s at 24, 10.1 s at 8; and never fewer than four frames."""
    model, videos = object.__new__(preference.VideoAlign), np.zeros((1, 81, 28, 28, 3), np.uint8)
    model.video_config = {"fps": 2.0, "max_frame_pixels": 200704}
    for fps, frames in ((16, 10), (24, 6), (8, 20), (60, 4)):
        model.fps = fps
        assert model.frames(videos).shape[1] == frames


def test_all_rates_share_one_videoalign(monkeypatch):
    """Each reward passes its own rate on; ratings that are kept are those of that rate."""
    made, asked = [], []

    class Model(preference.VideoAlign):
        def __init__(self, setup):
            self.setup, self.last_call, self.models = setup, None, []
            made.append(setup)

        def scores(self, videos, prompts):
            asked.append(self.fps)
            return torch.full((len(videos), 3), float(self.fps))

    monkeypatch.setattr(preference, "shared_video_align", lru_cache(maxsize=1)(Model))
    x, which = torch.zeros(1, 9, 3, 8, 8), slice(1, 2)
    slow, usual = (preference.video_align(which, Setup(fps=fps)) for fps in (8, 16))
    assert [reward(x, ["a"]).item() for reward in (slow, slow, usual, slow)] == [8, 8, 16, 8]
    assert len(made) == 1 and asked == [8, 16, 8]
    assert Setup().fps == 16 and Model(Setup())(x, ["a"]).tolist() == [[16] * 3]


def test_training_rates_videos_at_their_rate(tmp_path, rated_by_its_rate):
    """The embedded model's is 8, that of any other checkpoint 16; --fps goes before both, and pictures have none."""
    small = "--video --frames 5 --reward colour --watch videoalign-mq"
    for flags, rate in (("", 8), ("--fps 12.5", 12.5)):
        run = prepared_run(f"{small} {flags}", str(tmp_path))
        assert run.args.fps == rate and run.rewards["videoalign-mq"](torch.zeros(1), ["a"]).item() == rate
    assert flags_module.DEFAULTS_VIDEO["fps"].other == 16 == Setup().fps
    assert not hasattr(flags_module.parser("").parse_args([]), "fps")


def test_motion_does_not_depend_on_size():
    x, p = clip(("blue", "square", "moves up")), ["a blue square moves up"]
    large = torch.nn.functional.interpolate(x[0], scale_factor=4, mode="bicubic").clamp(0, 1)[None]
    assert R.motion(large, p) == 1 and R.motion(large, ["a blue square moves down"]) == 0


def test_what_video_rewards_cannot_score():
    with pytest.raises(R.CannotScore, match="names none"):
        R.wanted_motion("a red circle")
    for x in (torch.ones(1, 3, 32, 32), torch.ones(1, 1, 3, 32, 32)):
        with pytest.raises(R.CannotScore, match="two frames"):
            R.motion(x, ["left"])


def test_picture_rewards_see_first_middle_and_last_frame():
    """A reward of pictures is the mean over three frames of a video."""
    x = torch.stack([torch.full((3, 4, 4), i / 10) for i in range(9)])[None].repeat(2, 1, 1, 1, 1)
    seen = []

    def mean(pictures, prompts):
        seen.append(prompts)
        return pictures.mean((1, 2, 3))

    scores = R.score({"mean": mean}, x, ["a", "b"])["mean"]
    assert scores.tolist() == pytest.approx([0.4, 0.4]) and seen == [["a", "a", "a", "b", "b", "b"]]


def test_strips():
    """Frames 0, 4 and 8 of nine side by side, each two pixels wide; pictures stay as they are."""
    x = torch.arange(9.0).view(1, 9, 1, 1, 1).expand(1, 9, 3, 2, 2)
    assert loop.strip(x)[0, 0, 0].tolist() == [0, 0, 4, 4, 8, 8]
    assert loop.strip(x[0]) is not None and loop.strip(x[0]).shape == x[0].shape


def test_heldout_combinations_are_new_and_their_parts_are_not():
    """Every colour, shape and motion is trained on, but no held-out combination; the files hold what is drawn."""
    rows, heldout = combinations(random.Random(0), 48)
    assert len(set(rows)) == 192 and len(set(heldout)) == 48 and not set(rows) & set(heldout)
    for part in range(3):
        assert {r[part] for r in rows} == {r[part] for r in [*rows, *heldout]}
    for name, expected in (("train", rows), ("heldout", heldout)):
        lines = (HERE / f"tiny/video_{name}.txt").read_text().splitlines()
        assert lines == [prompt(*row) for row in expected]


def test_the_embedded_wan_is_small_and_in_half_precision():
    files = [p for p in (HERE / "tiny/wan").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 24e6
    for path in (HERE / "tiny/wan").rglob("*.safetensors"):
        assert {v.dtype for v in load_file(path).values()} == {torch.float16}


@pytest.mark.slow
def test_the_embedded_wan_is_as_its_card_says(tmp_path, capsys):
    """The rewards that its README states."""
    train_video.main(["--iterations", "0", "--out", str(tmp_path / "a")])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    card = (HERE / "tiny/wan/README.md").read_text()
    for name in ("motion", "colour"):
        stated = float(re.search(rf"{name} reward (?:is )?(\d\.\d+)", card)[1])
        assert document[f"{name}_before"] == pytest.approx(stated, abs=0.01)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """The embedded Wan before any training."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("wan")
    build().save_pretrained(path)
    return path


SMALL = "--leaves 4 --prompts-per-iteration 2 --eval-size 4 --iterations 1 --steps 4 --frames 5"


def test_a_run_leaves_videos_and_pictures(wan, tmp_path, capsys):
    """train_video.py from flags to files."""
    train_video.main([*SMALL.split(), "--model", str(wan), "--out", str(tmp_path / "a"), "--watch", "temporal"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"motion_after", "colour_after", "temporal_after"} <= set(document)
    before_after = [f"before_after.{kind}" for kind in ("png", "mp4", "gif")]
    for name in (*before_after, "curves.png", "tree.png", "tree.html", "model/model_index.json"):
        assert (tmp_path / "a" / name).stat().st_size > 500, name
    with Image.open(tmp_path / "a/before_after.gif") as gif:
        assert gif.n_frames == 5
    assert R.frame_rate(str(tmp_path / "a/before_after.mp4")) == 8  # the embedded model's


def test_played_videos_show_before_beside_after(tmp_path):
    """Black videos before, grey ones after: six pairs side by side, enlarged three times; a seventh adds no row."""
    before, after = torch.zeros(7, 3, 3, 32, 32), torch.ones(7, 3, 3, 32, 32) * 0.5
    report.play(before, after, ["a prompt"] * 7, tmp_path / "x")
    with Image.open(tmp_path / "x.gif") as gif:
        frame = np.asarray(gif.convert("RGB")).astype(int)
    middle = frame[16 + 3 + 48]
    assert abs(middle[20] - 0).max() < 30 and abs(middle[150] - 128).max() < 30
    assert frame.shape[1] == 6 * (2 * 32 + 4) * 3


def test_played_videos_have_the_rate_of_the_run(tmp_path):
    """By default the embedded model's."""
    moving = torch.rand(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    report.play(moving, moving, ["a prompt"] * 2, tmp_path / "x", 20)
    assert R.frame_rate(str(tmp_path / "x.mp4")) == R.frame_rate(str(tmp_path / "x.gif")) == 20
    assert R.read_picture(str(tmp_path / "x.gif")).shape[1] == 5


BAD = [
    ("--frames 8", "--frames"),
    ("--height 40", "--height"),
    ("--reward ocr:1", "quoted text"),
    (f"--model {HERE / 'tiny/flux'}", "is a FluxPipeline; a WanPipeline is needed"),
]


@pytest.mark.parametrize("flags, words", BAD)
def test_bad_input_is_one_sentence_and_exit_2(wan, capsys, tmp_path, flags, words):
    with pytest.raises(SystemExit) as stop:
        train_video.main(["--model", str(wan), *flags.split(), "--out", str(tmp_path / "a")])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_the_image_script_refuses_video(wan, capsys, tmp_path):
    """A video checkpoint, and a reward that needs two frames."""
    for flags, words in ((["--model", str(wan)], "is a WanPipeline"), (["--reward", "temporal"], "two frames")):
        with pytest.raises(SystemExit) as stop:
            train_image.main([*flags, "--out", str(tmp_path / "a")])
        assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.slow
def test_wan_1_3b_at_full_width_and_depth(tmp_path):
    """Wan2.1-T2V-1.3B's transformer with random weights: a tree and a LoRA update on the CPU.

    Text encoder and VAE are stand-ins.
    """
    official = WanTransformer3DModel(**WAN_1_3B)
    assert sum(p.numel() for p in official.parameters()) == 1_418_996_800
    text = UMT5Config(vocab_size=384, d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0.0)
    pipe = WanPipeline(
        tokenizer=ByT5Tokenizer(extra_ids=0, model_max_length=40),
        text_encoder=UMT5EncoderModel(text),
        vae=AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 4, 4], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=official,
    )
    policy = WanPolicy(pipe, 64, 64, 9, guidance=5.0, lora=8, checkpointing=True)
    loaded = loop.peak_gib(policy.device)
    videos, log, rolled, updated = a_tree_and_an_update(policy, policy.encode(["a red circle moves left"]))
    assert videos.shape == (4, 9, 3, 64, 64) and videos.isfinite().all()
    assert log["ratio_dev"] < 1e-5 and log["grad_norm"] > 0
    assert all(p.shape[0] == 8 or p.shape[1] == 8 for p in policy.trainable())
    print(
        f"Wan2.1-1.3B, 9 frames of 64 x 64, guidance, 4 leaves: loaded {loaded:.1f} GiB, rollout and decoding"
        f" {rolled:.0f} s, update {updated:.0f} s, peak {loop.peak_gib(policy.device):.1f} GiB"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("script, flags", [(train_image, ""), (train_video, "--frames 5")])
def test_both_scripts_train_on_a_gpu(script, flags, tmp_path, capsys):
    """bf16 and every memory flag; the first ratios stay 1, and float32 gives the CPU's rewards."""
    small = f"--leaves 4 --prompts-per-iteration 2 --eval-size 4 --iterations 2 {flags}".split()
    every = ["--device", "cuda", "--dtype", "bf16", "--gradient-checkpointing", "--vae-tiling"]
    every += ["--text-offload", "--tree-offload"]
    AcceleratorState._reset_state(reset_partial_state=True)
    script.main([*small, *every, "--out", str(tmp_path / "a")])
    rows = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert all(row["ratio_dev"] < 1e-3 and row["clip_frac"] == 0 for row in rows[1:])
    document = {}
    for device in ("cuda", "cpu"):
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps the first device of a process
        script.main([*small, "--device", device, "--iterations", "0", "--out", str(tmp_path / device)])
        document[device] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["cuda"]["reward_before"] == pytest.approx(document["cpu"]["reward_before"], abs=0.02)
