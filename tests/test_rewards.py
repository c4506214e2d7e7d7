"""Rewards on pictures whose right score is known."""

import io
import itertools
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file

import rewards as R
from pretrained import FILES, read_weights
from tiny.make_tiny_flux import COLOURS, FACES, draw

WORDS = ["CAT", "ZEBRA", "OWL", "QUIZ", "WWW", "IJ", "OOO", "HOUSE"]


@pytest.fixture(scope="module")
def ocr():
    return R.Ocr()


def picture(word, colour="red", face=FACES[0]):
    """A word drawn in a colour and a face: (1, 3, 32, 64) in [0, 1]."""
    return torch.from_numpy(draw(word, colour, face).copy()).permute(2, 0, 1).float()[None] / 255


@pytest.mark.parametrize("face", FACES)
def test_ocr_reads_rendered_words_exactly(ocr, face):
    """Words of three letters and more, in every face and in seven colours."""
    words = [w for w in WORDS if len(w) > 2]
    x = torch.cat([picture(w, COLOURS[i % 8], face) for i, w in enumerate(words)])
    assert ocr(x, [f'red "{w}"' for w in words]).tolist() == [1.0] * len(words)


def test_ocr_scores_edits_and_clips(ocr):
    """A drawn CAT where CAT, CUT (1 edit in 3 letters), CATS (1 in 4) and XYZ (3 in 3) are asked for; a blank page."""
    x = picture("CAT").repeat(4, 1, 1, 1)
    prompts = ['red "CAT"', 'red "CUT"', 'red "CATS"', 'red "XYZ"']
    assert ocr(x, prompts).tolist() == pytest.approx([1, 2 / 3, 3 / 4, 0])
    assert ocr(torch.ones(1, 3, 32, 64), ['red "CAT"']).tolist() == [0]


def test_ocr_batch_equals_one_by_one_and_keeps_order(ocr):
    """The recogniser sorts a batch by width inside: scores must come back in the order of the pictures."""
    x = torch.cat([picture(w) for w in WORDS * 3])
    prompts = [f'red "{w}"' for w in reversed(WORDS * 3)]
    assert torch.equal(ocr(x, prompts), torch.cat([ocr(x[i : i + 1], prompts[i : i + 1]) for i in range(len(x))]))


def test_ocr_refuses_what_it_cannot_score(ocr):
    with pytest.raises(R.CannotScore, match="a picture of 16x512: it is too narrow"):
        ocr(torch.ones(1, 3, 512, 16), ['red "CAT"'])
    with pytest.raises(R.CannotScore, match="quoted text"):
        ocr(torch.ones(1, 3, 32, 64), ["a red cat"])


def test_normalise():
    """Spaces, a tab, a full-width T and a zero."""
    assert R.normalise(" C A\tＴ0 ") == "cato"


@given(st.text("ab c", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_is_the_recursive_definition(a, b):
    def levenshtein(a, b):
        if not a or not b:
            return len(a) + len(b)
        substituted = levenshtein(a[1:], b[1:]) + (a[0] != b[0])
        return min(levenshtein(a[1:], b) + 1, levenshtein(a, b[1:]) + 1, substituted)

    assert R.edit_distance(a, b) == levenshtein(a, b) == R.edit_distance(b, a)


def test_colour_knows_its_colours():
    """True renders score exactly 1 with their own colour, and less than 0.7 with any other of the eight."""
    x = torch.cat([picture("CAT", c) for c in COLOURS])
    table = torch.stack([R.colour(x, [f'{c} "CAT"'] * 8) for c in COLOURS], 1)  # (drawn, asked)
    assert (table.diagonal() == 1).all()
    assert (table - 2 * torch.eye(8)).max() < 0.7


@pytest.mark.parametrize(
    "drawn, asked, score", [("purple", "red", 0.326), ("brown", "black", 0.347), ("white", "red", 0)]
)
def test_colour_values(drawn, asked, score):
    """1 - (d - 0.1)/0.9. Purple (0.5, 0, 0.5) against red (1, 0, 0) has d = sqrt(0.5); a blank page has no ink."""
    full = torch.tensor(R.ImageColor.getrgb(drawn)).view(1, 3, 1, 1).expand(1, 3, 8, 8) / 255
    assert R.colour(full, [asked]).item() == pytest.approx(score, abs=0.002)


def test_colour_ignores_quoted_words_and_refuses_prompts_without_colour():
    assert torch.equal(R.wanted_colour('"BLUE" in red'), torch.tensor([1.0, 0, 0]))
    with pytest.raises(R.CannotScore, match="colour word"):
        R.wanted_colour('"RED"')


def test_jpeg_is_the_file_size():
    """Of noise, and of a flat picture, whose file is smaller."""
    x = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    x[1] = 0.5
    Image.fromarray(R.to_uint8(x)[0]).save(buffer := io.BytesIO(), "JPEG", quality=95)
    scores = R.jpeg(x, ["", ""])
    assert scores[0].item() == pytest.approx(-len(buffer.getvalue()) / 1000)
    assert scores[1] > scores[0]
    assert torch.equal(R.jpeg_large(x, ["", ""]), -scores)


def test_to_uint8_rounds_and_clips():
    x = torch.tensor([-1, 0.4999, 0.999, 2]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert R.to_uint8(x)[0, 0, :, 0].tolist() == [0, 127, 255, 255]


def test_weights():
    """Of the flag --reward: a missing weight is 1; unknown and repeated names and what is no number are refused."""
    assert R.parse_weights("ocr, colour:0.5") == {"ocr": 1, "colour": 0.5}
    for bad, word in (("beauty", "no reward"), ("ocr:x", "number"), ("ocr:nan", "number"), ("ocr,ocr", "twice")):
        with pytest.raises(ValueError, match=f"--reward: .*{word}"):
            R.parse_weights(bad, "--reward")
    with pytest.raises(ValueError, match="must be a number below 1e30, got '1e39'"):  # infinite in float32
        R.parse_weights("ocr:1e39")
    with pytest.raises(ValueError, match="--watch only measures: 'ocr' takes no weight"):
        R.parse_weights("ocr:2", "--watch")


def test_weighted_sum():
    """A reward without a weight does not count."""
    scores = {"a": torch.tensor([1.0, 2]), "b": torch.tensor([10.0, 20]), "watched": torch.tensor([5.0, 5])}
    assert R.weighted_sum(scores, {"a": 1, "b": 0.1}).tolist() == pytest.approx([2, 4])


def test_load_rewards_watches_what_the_prompts_allow():
    """--watch auto leaves out ocr where no text is quoted, and colour where no colour is named."""
    blank = torch.ones(1, 3, 32, 64)
    assert list(R.load_rewards("jpeg", "auto", ["a cat"], blank)[0]) == ["jpeg"]
    assert list(R.load_rewards("jpeg", "auto", ["a red cat"], blank)[0]) == ["jpeg", "colour"]
    rewards, weights = R.load_rewards("colour:2", "jpeg", ["a red cat"], blank)
    assert (list(rewards), weights) == (["colour", "jpeg"], {"colour": 2.0})
    with pytest.raises(R.CannotScore):
        R.load_rewards("colour", "auto", ["a red cat", "a cat"], blank)


def test_a_reward_must_return_finite_numbers():
    """A nan and a wrong shape are refused."""
    for bad in (torch.tensor([float("nan")]), torch.zeros(2)):
        with pytest.raises(R.CannotScore, match="finite"):
            R.score({"bad": lambda x, p, bad=bad: bad}, torch.ones(1, 3, 8, 8), ["x"])
    assert R.score({"jpeg": R.jpeg}, torch.ones(1, 3, 8, 8), ["x"])["jpeg"] < 0


# ------------------------------------------------------------------------------------------------- weights of a reward
@pytest.mark.parametrize(
    "config, words",
    [
        ("[]", "config.json is damaged: fetch it again"),
        ("null", "config.json is damaged: fetch it again"),
        ('{"text_config": {"hidden_size": "abc"}}', "config.json is damaged: fetch it again"),
        ('{"text_config": {"hidden_size": -8}}', "makes no CLIPModel (RuntimeError"),
        ('{"text_config": {"hidden_act": "nope"}}', "makes no CLIPModel (KeyError"),
        ("{}", "'a' is missing, left over or of another shape"),
    ],
)
def test_a_config_that_makes_no_model(tmp_path, config, words):
    """One sentence that names the file, whatever transformers raises."""
    for repository, name in FILES["pickscore"]:
        (tmp_path / repository).mkdir(parents=True, exist_ok=True)
        (tmp_path / repository / name).write_text(config)
    save_file({"a": torch.ones(1)}, tmp_path / repository / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        R.load_rewards("pickscore", "", ["a"], torch.ones(1, 3, 8, 8), R.Setup(str(tmp_path)))
    assert words in str(caught.value) and str(tmp_path) in str(caught.value)


def test_weights_without_names(tmp_path):
    for state in ({5: torch.ones(1)}, [torch.ones(1)], {"state_dict": 3}):
        torch.save(state, tmp_path / "a.pt")
        with pytest.raises(ValueError, match="a.pt is damaged or holds no weights"):
            read_weights(tmp_path / "a.pt")


# --------------------------------------------------------------------------------------------------- a user's reward
def brightness(pictures, prompts):
    """A reward as a user writes it."""
    return pictures.mean((1, 2, 3))


def test_a_reward_changes_nothing_that_training_relies_on(tmp_path):
    """Gradients switched off, another default type or device, another folder: in its making and in its scoring."""

    def careless(pictures, prompts):
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        os.chdir(tmp_path)
        return [0.5] * len(prompts) if prompts else pictures

    before = os.getcwd()
    R.REWARDS["careless"] = lambda setup: careless(brightness, [])
    try:
        reward = R.make("careless", R.DEFAULT)
        assert (torch.zeros(1).device.type, torch.zeros(1).dtype) == ("cpu", torch.float32)
    finally:
        del R.REWARDS["careless"]
    assert R.ask("x", reward, torch.ones(2, 3, 4, 4), ["a", "b"]).tolist() == [1, 1]
    assert R.ask("x", careless, torch.ones(2, 3, 4, 4), ["a", "b"]).tolist() == [0.5, 0.5]
    assert torch.is_grad_enabled() and torch.zeros(1).dtype == torch.float32 and os.getcwd() == before


def test_scores_do_not_share_a_rewards_memory():
    """Two rewards that write into one buffer: the second would overwrite the first one's scores."""
    buffer = torch.zeros(2)
    two = {"a": lambda x, p: buffer.fill_(1), "b": lambda x, p: buffer.fill_(2)}
    scores = R.score(two, torch.ones(2, 3, 4, 4), ["a", "b"])
    assert (scores["a"].tolist(), scores["b"].tolist()) == ([1, 1], [2, 2])


@pytest.mark.parametrize(
    "values",
    [np.array([2.0, 1.0])[::-1], [torch.tensor(1.0, requires_grad=True), torch.tensor(2.0)], (np.float64(1), 2)],
)
def test_scores_of_other_kinds(values):
    """Turned round by numpy, a list of tensors, numbers of two libraries."""
    assert R.ask("x", lambda x, p: values, torch.ones(2, 3, 4, 4), ["a", "b"]).tolist() == [1, 2]


def leaves(pictures, prompts):
    """A script that was made a reward: run to its end, it would end the training too, with exit code 0."""
    sys.exit(0)


@pytest.mark.parametrize(
    "function, words",
    [
        (leaves, "the reward 'x' failed at test_rewards.py:"),
        (lambda x, p: torch.ones(2, dtype=torch.bool), "it returned values of torch.bool, not numbers"),
        (lambda x, p: {"score": 1}, r"it returned {'score': 1}, not numbers"),
    ],
)
def test_what_is_no_score(function, words):
    with pytest.raises(R.CannotScore, match=words):
        R.ask("x", function, torch.ones(2, 3, 4, 4), ["a", "b"])


@pytest.mark.parametrize(
    "made, words",
    [
        (brightness, r"REWARDS\['x'\]\(setup\) failed at rewards.py:\d+: TypeError: brightness\(\) missing"),
        (lambda setup: None, "must return a function of pictures and prompts, got None"),
        (lambda setup: torch.load("/nowhere/weights.pt"), "failed at serialization.py:.* FileNotFoundError"),
    ],
)
def test_a_reward_that_cannot_be_made(monkeypatch, made, words):
    """The reward itself in the place of what makes it; nothing; a file that is not there."""
    monkeypatch.setitem(R.REWARDS, "x", made)
    with pytest.raises(R.CannotScore, match=words):
        R.load_rewards("x", "", ["a"], torch.ones(1, 3, 8, 8))


# ------------------------------------------------------------------------------------------------ a reward per prompt
TEXTS = {"a": "jpeg:1", "b": "", "c": "jpeg:0.5,jpeg-large:2"}
OWN = {"a": {"jpeg": 1.0}, "b": {"jpeg": 2.0}, "c": {"jpeg": 0.5, "jpeg-large": 2.0}}  # where --reward is jpeg:2


def test_rewards_of_prompts_are_parsed():
    """--reward serves where a prompt has none of its own; what is watched has weight 0 everywhere."""
    assert R.own_weights(TEXTS, "jpeg:2") == OWN and R.own_weights(None, "jpeg:2") == {}
    watched = R.own_weights(TEXTS, "jpeg:2", ["colour", "jpeg"])
    assert watched == {prompt: {"colour": 0.0, "jpeg": 0.0} | weights for prompt, weights in OWN.items()}
    assert R.sets_of_rewards(OWN, ["a", "c", "a"]) == {"jpeg:1": 2, "jpeg:0.5,jpeg-large:2": 1}
    assert R.sets_of_rewards({}, ["a"]) == {}


@pytest.mark.parametrize(
    "text, words",
    [
        ("beauty", "--reward-column: the prompt 'a cat': there is no reward 'beauty': choose from ocr"),
        ("ocr:x", "--reward-column: the prompt 'a cat': the weight of 'ocr' must be a number"),
        ("ocr:0,jpeg:0", "--reward-column: the prompt 'a cat' needs a reward with a weight other than 0, got 'ocr:0,"),
        (",", "--reward-column: the prompt 'a cat' needs a reward with a weight other than 0, got ','"),
    ],
)
def test_rewards_of_prompts_that_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        R.own_weights({"a dog": "", "a cat": text}, "jpeg")


def test_a_reward_is_asked_about_the_prompts_that_name_it():
    """One that is watched about all, one that nobody here names about none; those of equal rows get one tensor."""
    seen = []

    def reward(name):
        return lambda x, p: seen.append((name, p, x.data_ptr())) or x.mean((1, 2, 3))

    own = {
        "a": {"watched": 0.0, "first": 1.0},
        "b": {"watched": 0.0, "second": 1.0, "videoalign": 1, "videoalign-mq": 2},
    }
    rewards = {name: reward(name) for name in ("first", "second", "videoalign", "videoalign-mq", "other", "watched")}
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2).contiguous()
    scores = R.score_own(rewards, x, ["a", "b", "a", "b"], own)
    nan = float("nan")
    rows = {"first": [0, nan, 2, nan], "other": [nan] * 4, "watched": [0, 1, 2, 3]}
    assert list(scores) == list(rewards)
    for name in rewards:
        expected = torch.tensor(rows.get(name, [nan, 1, nan, 3]), dtype=torch.float32)
        torch.testing.assert_close(scores[name], expected, equal_nan=True)
    prompts = {"first": ["a", "a"], "watched": ["a", "b", "a", "b"]}
    assert [(name, p) for name, p, _ in seen] == [
        (name, prompts.get(name, ["b", "b"])) for name in rewards if name != "other"
    ]
    places = {name: place for name, _, place in seen}
    assert places["videoalign"] == places["videoalign-mq"]  # VideoAlign then watches once


def test_without_rewards_of_their_own_all_prompts_are_scored():
    x = torch.rand(2, 3, 8, 8)
    assert R.score_own({"jpeg": R.jpeg}, x, ["a", "b"], {})["jpeg"].tolist() == R.jpeg(x, ["a", "b"]).tolist()
    assert R.prompt_weights(["a"], {"jpeg": 2.0}, {}) == {"jpeg": 2.0}


def test_weights_of_prompts():
    """(P, 1) each; a prompt's sum takes its own rewards, and is what one weight for all would give, to the bit."""
    weights = R.prompt_weights(["c", "a"], {}, OWN | {"a": {"jpeg": 0.1, "watched": 0.0}})
    assert {name: w.tolist() for name, w in weights.items()} == {"jpeg": [[0.5], [0.1]], "jpeg-large": [[2], [0]]}
    g = torch.Generator().manual_seed(0)
    small, large = torch.rand(2, 4, generator=g), torch.rand(2, 4, generator=g)
    large[1] = torch.nan
    summed = R.weighted_sum({"jpeg": small, "jpeg-large": large}, weights)
    assert summed.dtype == torch.float32
    assert torch.equal(summed[0], 0.5 * small[0] + 2.0 * large[0]) and torch.equal(summed[1], 0.1 * small[1])
    assert torch.equal(R.weighted(small.double(), weights["jpeg"])[1], 0.1 * small.double()[1])


def test_only_rewards_that_a_prompt_has_are_loaded(monkeypatch):
    """--reward is not loaded where every prompt has others; a reward is checked and tried on its own prompts."""
    blank, prompts, asked = torch.ones(1, 3, 32, 64), ['red "CAT"', "a cat"], []
    monkeypatch.setitem(R.REWARDS, "mean", lambda setup: lambda x, p: asked.append(p) or x.mean((1, 2, 3)))

    def load(watch, reward="hpsv2", **texts):
        own = R.own_weights(dict(zip(prompts, texts.values())), reward, R.watched_names(watch, prompts, video=False))
        return list(R.load_rewards(reward, watch, prompts, blank, own=own)[0])

    assert load("auto", first="ocr:1,jpeg:0", second="mean:1") == ["ocr", "mean"] and asked == [["a cat"]]
    assert load("jpeg", first="ocr:1", second="mean:1") == ["ocr", "mean", "jpeg"]
    with pytest.raises(
        R.CannotScore, match="--reward-column ocr: the ocr reward needs a quoted text.*'a cat' has none"
    ):
        load("", first="mean:1", second="ocr:1")
    with pytest.raises(R.CannotScore, match="--watch ocr: the ocr reward needs a quoted text"):
        load("ocr", first="mean:1", second="mean:1")
    with pytest.raises(R.CannotScore, match="--watch ocr: the ocr reward needs a quoted text.*'a cat' has none"):
        load("ocr", first="ocr:1", second="mean:1")
    with pytest.raises(ValueError, match="the reward 'hpsv2' lacks"):
        load("", first="mean:1", second="")


# --------------------------------------------------------------------------------------------- ocr: text anywhere
def page(text, size, at=(40, 40), shape=(512, 512)):
    """Black text on white, in Pillow's own font: (1, 3, H, W) in [0, 1]. `at` is the left upper corner, x and y."""
    height, width = shape
    paper = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(paper).multiline_text(at, text, "black", ImageFont.load_default(size), spacing=size // 4)
    return torch.from_numpy(np.array(paper)).permute(2, 0, 1).float()[None] / 255


@pytest.mark.parametrize(
    "text, size, at, shape",
    [
        ("Spring Collection 2024", 36, (40, 230), (512, 512)),
        ("Spring\nCollection 2024", 50, (40, 190), (512, 512)),
        ("Forever\nYours", 105, (30, 120), (512, 512)),
        ("Try Our\nNew Burger", 130, (60, 90), (512, 1024)),
        ("Spring Collection 2024", 26, (20, 8), (48, 400)),
        ("Spring Collection 2024", 22, (10, 2), (32, 300)),  # one line of text, as a whole
        ("Forever\nYours", 40, (30, 300), (512, 256)),  # taller than wide
    ],
)
def test_ocr_reads_text_anywhere(ocr, text, size, at, shape):
    """Of other sizes, in other places, in one line and two."""
    quoted = text.replace("\n", " ")
    assert ocr(page(text, size, at, shape), [f'a sign that reads "{quoted}"']).item() > 0.9


def test_ocr_reads_rows_from_left_to_right(ocr):
    """In the upper row the right word hangs a little lower, and a row further down begins left of both."""
    x = torch.minimum(page("Two", 60, (60, 60)), page("more", 60, (300, 72)))
    x = torch.minimum(x, page("days", 60, (20, 200)))
    assert R.normalise(ocr.read(x)[0]) == "twomoredays"
    assert ocr(x, ['"Two more days"']).item() == 1


def box(left, top, width, height, tilt=0):
    """The corners of a box, its right end `tilt` pixels further down: (4, 2)."""
    right, bottom = left + width, top + height
    return np.array([[left, top], [right, top + tilt], [right, bottom + tilt], [left, bottom]], dtype=np.float32)


@pytest.mark.parametrize(
    "boxes, order",
    [
        ([box(0, 0, 9, 9)], [0]),
        ([box(100, 0, 60, 40), box(0, 60, 50, 40), box(0, 0, 90, 40)], [2, 0, 1]),
        ([box(0, 0, 90, 40), box(0, 30, 90, 40)], [0, 1]),  # boxes of two rows may overlap
        ([box(200, 100, 90, 100), box(0, 125, 190, 75)], [1, 0]),  # a capital beside small letters: middles 12.5 apart
        ([box(50, 0, 20, 8), box(0, 9, 20, 8)], [0, 1]),  # small print: 10 pixels are more than a row
        ([box(0, 40, 60, 30), box(100, 28, 60, 30), box(200, 16, 60, 30)], [0, 1, 2]),  # a line that rises
        ([box(0, 20, 60, 30, -10), box(80, 4, 60, 30, -10)], [0, 1]),
    ],
)
def test_reading_order(boxes, order):
    assert R.reading_order(np.stack(boxes)) == order


def test_reading_order_does_not_depend_on_the_order_of_boxes():
    """Three rows of two words, given in every order."""
    boxes = np.stack([box(100 * (i % 2), 50 * (i // 2), 80, 40) for i in range(6)])
    for places in itertools.permutations(range(6)):
        assert [places[i] for i in R.reading_order(boxes[list(places)])] == list(range(6))


def test_one_line_is_a_matter_of_shape():
    """Height and width: not above 32, the height of the embedded model's pictures, and not taller than wide."""
    assert all(R.is_one_line(*shape) for shape in ((32, 64), (32, 400), (32, 32), (8, 8)))
    assert not any(R.is_one_line(*shape) for shape in ((64, 64), (33, 400), (32, 31), (512, 1024), (64, 32)))


def test_text_accuracy():
    """Other writing is no mistake in a scene, and one on a single line; from as many edits as letters on it is 0."""
    assert R.text_accuracy("cafeopen24hours", "open", True) == 1
    assert R.text_accuracy("cats", "cat", True) == 1 and R.text_accuracy("cats", "cat", False) == pytest.approx(2 / 3)
    assert R.text_accuracy("cut", "cat", True) == R.text_accuracy("cut", "cat", False) == pytest.approx(2 / 3)
    assert R.text_accuracy("cafeoben24hours", "open", True) == 0 and R.text_accuracy("", "open", True) == 0


def test_other_writing_in_a_scene_is_no_mistake(ocr):
    """Wrong letters are."""
    x = torch.minimum(page("Cafe", 40), page("OPEN", 60, (250, 300)))
    assert ocr(x.repeat(2, 1, 1, 1), ['"Open"', '"Shut"']).tolist() == [1, 0]
    assert ocr(page("OPEN", 60), ['"OVEN"']).item() == pytest.approx(3 / 4)
    assert ocr(torch.ones(1, 3, 512, 512), ['"OPEN"']).item() == 0


def test_the_score_of_a_scene_does_not_depend_on_the_batch(ocr):
    """Lines of many lengths, which the recogniser would fill up to the longest one of the batch."""
    x = torch.cat([page(text, 20, (10, 10), (96, 256)) for text in ("Go", "Spring Collection", "Wonderful\nGo")])
    texts = ocr.read(x)
    assert texts == [ocr.read(x[i : i + 1])[0] for i in range(3)]
    assert texts[0] == "Go" and R.normalise(texts[2]) == "wonderfulgo"


def test_the_detector_is_loaded_when_a_picture_needs_it():
    reward = R.Ocr()
    reward(picture("CAT"), ['"CAT"'])
    assert reward.models.text_det is None
    reward(torch.ones(1, 3, 64, 64), ['"CAT"'])
    assert reward.models.text_det is not None
    with pytest.raises(R.CannotScore, match="quoted text"):
        reward(torch.ones(1, 3, 64, 64), ["a cat"])


def test_lines_that_the_recogniser_is_unsure_of_are_dropped(ocr, monkeypatch):
    """Of three lines, with 0.9, 0.49 and 0.5 of certainty."""
    boxes = np.stack([box(0, 50 * i, 60, 40) for i in range(3)])
    read = SimpleNamespace(txts=("one", "two", "three"), scores=(0.9, 0.49, 0.5))
    monkeypatch.setattr(ocr, "models", SimpleNamespace(_load_det_model=lambda: lambda x: SimpleNamespace(boxes=boxes)))
    monkeypatch.setattr(ocr, "recogniser", lambda lines: read)
    assert ocr.read(torch.ones(1, 3, 160, 80)) == ["onethree"]


def test_ocr_of_a_video(ocr):
    """Its first, middle and last frame count: here the text is missing, right, and right."""
    blank, right, wrong = (
        torch.ones(1, 3, 256, 256),
        page("OPEN", 60, shape=(256, 256)),
        page("X", 60, shape=(256, 256)),
    )
    video = torch.stack([blank, wrong, right, wrong, right], 1)  # (1, 5, 3, 256, 256)
    scores = R.score({"ocr": ocr}, torch.cat([video, video.flip(1)]), ['a shop "OPEN"'] * 2)
    assert scores["ocr"].tolist() == pytest.approx([2 / 3, 2 / 3])


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("New York's 'OPEN' sign", "OPEN"),
        ("the dogs' 'SIT'", "SIT"),
        ("the dogs' bowl says 'SIT', the cat's 'STAY'", "SIT"),
        ("It's a 'DON'T WALK' sign", "DON'T WALK"),
        ("the dog’s ‘DON’T WALK’ sign, the cats’ ‘STAY’", "DON’T WALK"),
        ("a note that reads 'Say \"YES\" now'", 'Say "YES" now'),
        ('a note that reads “Say "YES" now”', 'Say "YES" now'),
        ("a note that reads \"Don't say 'NO'\"", "Don't say 'NO'"),
        ('two signs, "GO" on the left and "STOP" on the right', "GO"),
        ("two signs, 'GO' and \"STOP\"", "GO"),
        ("two signs, “GO” and “STOP”", "GO"),
        ("„OFFEN“ und „ZU“", "OFFEN"),
        ("une porte «OUVERT», une porte « FERMÉ »", "OUVERT"),
        ("入口に「営業中」と「準備中」", "営業中"),
    ],
)
def test_quotes(prompt, text):
    """Of all kinds, and no apostrophe; of several texts the first one counts, as in Flow-GRPO."""
    assert R.quoted_text(prompt) == text


@pytest.mark.parametrize("prompt", ["the boys' and girls' club", "a dog's life, the cats’ life", '""', "a 12' pole"])
def test_no_quotes(prompt):
    with pytest.raises(R.CannotScore, match="quoted text"):
        R.quoted_text(prompt)
