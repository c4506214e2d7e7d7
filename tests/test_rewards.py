"""Rewards on pictures whose right score is known."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import rewards as R
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
    with pytest.raises(R.CannotScore, match="taller than wide"):
        ocr(torch.ones(1, 3, 64, 32), ['red "CAT"'])
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
        with pytest.raises(ValueError, match=word):
            R.parse_weights(bad)


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
