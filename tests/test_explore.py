"""tree.html: one file that needs nothing else, and whose script computes what tree.py and branchgrpo.py compute.

The page is opened in headless Chromium, its controls are moved as a reader moves them, and what its script computed is
compared with what Python computes. Without Chromium and its driver those tests are skipped.
"""

import io
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

import loop
import report
import train_image
import train_video
from branchgrpo import Rollout
from schedules import Schedule, kept_edges
from sde import sigma_schedule
from tree import Forest, count, effective_leaves, fuse, make_forest, path_weights

HERE = Path(__file__).parent.parent
PROMPT = """</script><b id="bold">"it's" & <!-- \u2028 ü"""
SMALL = "--iterations 1 --leaves 4 --prompts-per-iteration 1 --eval-size 2"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver")


# ----------------------------------------------------------------------------------------------------- made-up rollouts
def made_up(path, forest, frames=1, size=(8, 16), trained=None, depth=None, **options):
    """Write the page of a forest with random log-probs, scores and pictures; returns what Python needs to credit it."""
    draw = torch.Generator().manual_seed(forest.leaves)
    defaults = {"method": "branchgrpo", "fusion_beta": 1.0, "advantage": "depth", "adv_clip": 5.0}
    defaults |= {"reward_mix": "reward", "width_prune": None, "size_prune": None}
    stochastic = [i for i in range(forest.steps) if forest.stochastic(i)]
    trained = frozenset(stochastic if trained is None else trained)

    # Scores of one decimal have ties, which every rule of width pruning must break as Python does.
    logp = [(0.3 * torch.randn(1, n, generator=draw)) * forest.stochastic(i) for i, n in enumerate(forest.sizes[1:])]
    scores = {"ocr": (10 * torch.rand(forest.leaves, generator=draw)).round() / 10}
    scores |= {name: torch.rand(forest.leaves, generator=draw) for name in ("colour", "watched")}
    clips = [torch.rand(n, frames, 3, *size, generator=draw) for n in forest.sizes]

    run = SimpleNamespace(args=SimpleNamespace(**defaults | options), weights={"ocr": 1.0, "colour": 0.5}, iteration=3)
    schedule = Schedule(forest, sigma_schedule(forest.steps, 3.0), trained, depth, None)
    out = Rollout([], logp, [])
    report.explore(run, schedule, PROMPT, out, scores, clips, path)
    return run, schedule, out, scores


def python_result(made, state):
    """What Python makes of a rollout under the state of the page's controls."""
    run, schedule, out, scores = made
    forest = schedule.forest

    # A mix window: other steps than the splits and its own are taken for deterministic, and have no log-prob.
    if state["window"] is not None:
        start, width = state["window"]
        inside = [i in forest.splits or start <= i < start + width for i in range(forest.steps)]
        forest = Forest(forest.roots, forest.children, tuple(map(bool.__and__, forest.chosen, inside)))
        out = Rollout([], [level * forest.stochastic(i) for i, level in enumerate(out.logp_mean)], [])

    options = {"fusion_beta": state["beta"], "advantage": state["rule"], "reward_mix": state["mix"]}
    options |= {"adv_clip": state["clip"] or math.inf, "width_prune": state["width"], "size_prune": state["size"]}
    args = SimpleNamespace(**vars(run.args) | options)
    trained = schedule.trained_steps if state["trained"] else frozenset(range(forest.steps))
    schedule = Schedule(forest, schedule.sigmas, trained, state["depth"], None)

    rewards, ranking, advantages = loop.credit_leaves(
        SimpleNamespace(args=args, weights=run.weights), out, forest, scores
    )
    keep, paths = kept_edges(args, schedule, ranking, advantages), out.path_logp(forest)
    weights = [path_weights(paths, n, state["beta"]) for n in forest.sizes[:-1]]
    return {
        "fused": fuse(rewards, paths, forest, state["beta"]),
        "weights": [w.unflatten(2, (k, -1)).sum(-1).flatten(1) for w, k in zip(weights, forest.children)],
        "advantages": advantages,
        "keep": keep,
        "counts": count(forest, keep),
        "effectiveLeaves": effective_leaves(paths, forest, state["beta"]).mean().item(),
    }


def same(shown, expected):
    """Levels (n_d,) of the page against tensors (1, n_d)."""
    assert len(shown) == len(expected)
    for level, tensor in zip(shown, expected):
        torch.testing.assert_close(torch.tensor(level)[None].to(tensor), tensor, rtol=0, atol=1e-6)


def agrees(shown, made):
    """All of the page's last result against Python's under the same state."""
    expected = python_result(made, shown["state"])
    for name in ("fused", "weights", "advantages"):
        same(shown[name], expected[name])
    assert [torch.tensor(level).tolist() for level in shown["keep"]] == [mask[0].tolist() for mask in expected["keep"]]
    assert shown["counts"] == expected["counts"]
    assert shown["effectiveLeaves"] == pytest.approx(expected["effectiveLeaves"], abs=1e-6)


# ---------------------------------------------------------------------------------------------------- without a browser
def data_of(page):
    """The data of a page, as its script reads them."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def self_contained(page):
    """Nothing that a browser would fetch: no address, and every picture is text."""
    pictures = [uri for level in data_of(page)["pictures"] for uri in level]
    assert pictures and all(uri.startswith("data:image/jpeg;base64,") for uri in pictures)
    for uri in pictures:
        page = page.replace(uri, "")
    assert not re.search(r"\w://|<link|<iframe|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(|src=", page)
    assert "default-src 'none'" in page and page.count("</script>") == 2


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    """A small run's page, and what tree.png was drawn from."""
    out, drawn = tmp_path_factory.mktemp("explore") / "a", []
    patch = pytest.MonkeyPatch()
    patch.setattr(report, "draw_tree", lambda *args: drawn.extend(args))
    flags = "--method branchgrpo --width-prune --depth-prune --timestep-fraction 0.5 --fusion-beta 2 --adv-clip 1"
    flags += " --advantage sibling --reward colour:1,jpeg:0.01 --reward-mix advantage"
    train_image.main([*SMALL.split(), *flags.split(), "--watch", "", "--out", str(out)])
    patch.undo()
    return out / "tree.html", drawn


def test_an_image_run_leaves_a_page(image_run):
    page = image_run[0].read_text(encoding="utf-8")
    self_contained(page)
    data = data_of(page)
    assert [len(level) for level in data["pictures"]] == [1, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4]
    assert data["clip"] == {"frames": 1, "height": 32, "width": 64} and data["about"] == "branchgrpo after iteration 1"


def test_a_video_run_leaves_a_page_whose_nodes_are_clips(tmp_path):
    flags = "--iterations 0 --eval-size 1 --leaves 2 --steps 2 --frames 5"
    train_video.main([*flags.split(), "--out", str(tmp_path / "a")])
    page = (tmp_path / "a/tree.html").read_text(encoding="utf-8")
    self_contained(page)
    assert data_of(page)["clip"] == {"frames": 5, "height": 32, "width": 32}
    assert len(page) < 200e3


def test_the_committed_page_is_of_this_template():
    """docs/tree.html is explore.html with data in it: a change of the template must not leave it behind."""
    page = (HERE / "docs/tree.html").read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    assert report.TEMPLATE.read_text(encoding="utf-8").replace(report.PLACEHOLDER, data) == page


def test_the_page_is_small(tmp_path):
    """16 leaves at 64 x 32 pixels: below 3 MB even where all pictures are noise, which no JPEG makes small."""
    made_up(tmp_path / "tree.html", make_forest(20, 2, (0, 3, 6, 9)), size=(32, 64))
    assert 1e5 < (tmp_path / "tree.html").stat().st_size < 3e6


def test_large_pictures_and_long_videos_become_small():
    assert report.small_clips(torch.rand(2, 3, 32, 64)).shape == (2, 1, 3, 32, 64)
    assert report.small_clips(torch.rand(1, 3, 360, 720)).shape == (1, 1, 3, 64, 128)
    assert report.small_clips(torch.rand(1, 21, 3, 48, 80)).shape == (1, 9, 3, 38, 64)
    constant = report.small_clips(torch.full((1, 3, 200, 300), 0.25))
    torch.testing.assert_close(constant, torch.full((1, 1, 3, 85, 128), 0.25))


def test_any_prompt_is_harmless_and_infinity_is_no_clip(tmp_path):
    made_up(tmp_path / "tree.html", make_forest(3, 2, (0,)), adv_clip=math.inf)
    page = (tmp_path / "tree.html").read_text(encoding="utf-8")
    self_contained(page)
    assert data_of(page)["prompt"] == PROMPT and data_of(page)["run"]["clip"] is None


def test_a_page_that_fails_is_one_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "TEMPLATE", tmp_path / "lost.html")
    run, schedule, out, scores = made_up_anyway(tmp_path, monkeypatch)
    report.attempt(report.explore, run, schedule, PROMPT, out, scores, [torch.rand(1, 1, 3, 8, 8)], tmp_path / "a.html")
    said = capsys.readouterr().err
    assert said.startswith("warning: explore was not drawn (ValueError") and said.count("\n") == 1
    assert not (tmp_path / "a.html").exists()


def made_up_anyway(tmp_path, monkeypatch):
    """A rollout whose page was written with the true template."""
    with monkeypatch.context() as patch:
        patch.setattr(report, "TEMPLATE", HERE / "explore.html")
        return made_up(tmp_path / "tree.html", make_forest(3, 2, (0,)))


# --------------------------------------------------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium with a folder of its own; no test may leave an error in its log."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars"),
        *("disable-background-networking", "disable-component-update", "disable-sync", "disable-dev-shm-usage"),
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Made-up rollouts by name: path of the page, and what Python needs."""
    folder = tmp_path_factory.mktemp("pages")
    forests = {
        "paper": (make_forest(20, 2, (0, 3, 6, 9)), {"size": (2, 4)}),
        "four": (make_forest(6, 4, (0, 2)), {}),
        "wide": (make_forest(6, 3, (0, 1, 2, 3)), {"size": (2, 4)}),
        "roots": (make_forest(6, 3, (1,), roots=3), {"advantage": "unscaled"}),
        "flat": (make_forest(4, 2, (), roots=6), {}),
        "mix": (
            make_forest(8, 4, (0, 3), chosen=(4, 5, 7)),
            {
                "reward_mix": "advantage",
                "width_prune": 2,
                "depth": (5, 1),
                "trained": (0, 4),
                "adv_clip": 0.4,
                "fusion_beta": 0.5,
            },
        ),
    }
    made = {}
    for name, (forest, options) in forests.items():
        path = folder / f"{name}.html"
        made[name] = (path, made_up(path, forest, **{"size": (4, 8)} | options))
    return made


def show(browser, path, width=1400, height=1000, *features):
    """Open a page in a window of that size."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = [dict(zip(("name", "value"), feature)) for feature in features]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    browser.get(path.as_uri())


def explored(browser):
    """The last result of the page's script; infinity comes as null."""
    return json.loads(browser.execute_script("return JSON.stringify(window.explored)"))


def no_errors(browser):
    assert browser.get_log("browser") == []


def put(browser, **values):
    """Move controls, by their ids, as a reader does: type, choose, tick."""
    for name, value in values.items():
        control = browser.find_element("id", name)
        if control.tag_name == "select":
            Select(control).select_by_value(value)
        elif control.get_attribute("type") == "checkbox":
            if control.is_selected() != value:
                control.click()
        else:
            control.send_keys(Keys.CONTROL + "a", Keys.NULL, Keys.BACKSPACE, str(value))


WINDOW = {"windowOn": True, "windowStart": 2, "windowWidth": 2}
SETTINGS = [  # page, controls moved from the run's own state, and a part of the state that must come of it
    ("paper", {}, {"beta": 1, "rule": "depth", "width": None}),
    ("paper", {"beta": 0, "rule": "group"}, {"beta": 0, "rule": "group"}),
    ("paper", {"beta": 30, "rule": "sibling", "clip": 0.7}, {"beta": 30, "rule": "sibling", "clip": 0.7}),
    ("paper", {"width": "parent-top1", "depthOn": True, "depthStart": 9, "depthWidth": 5}, {"depth": [9, 5]}),
    ("paper", {"width": "extreme", "b": 3, "clip": ""}, {"width": 3, "clip": None}),
    ("paper", {"windowOn": True, "windowStart": 11, "windowWidth": 4, "beta": 3}, {"window": [11, 4]}),
    ("four", {"size": 0.3, "mix": "advantage"}, {"size": 0.3, "mix": "advantage"}),
    ("four", {"width": "parent-top1", "mix": "advantage", "rule": "sibling"}, {"width": "parent-top1"}),
    ("four", {**WINDOW, "width": "extreme", "b": 8, "beta": 30}, {"window": [2, 2], "width": 8}),
    ("wide", {"beta": 30, "width": "parent-top1", "size": 0.5}, {"size": 0.5}),
    ("wide", {"beta": 0, "width": "extreme", "b": 40, "rule": "group"}, {"width": 40}),
    ("roots", {"rule": "sibling", "beta": 5}, {"rule": "sibling"}),
    ("roots", {"depthOn": True, "depthStart": 0, "depthWidth": 6, "size": 0.34}, {"depth": [0, 6]}),
    ("flat", {"rule": "sibling", "width": "extreme", "b": 1}, {"width": 1}),
    ("mix", {}, {"mix": "advantage", "width": 2, "depth": [5, 1], "trained": True, "clip": 0.4}),
    ("mix", {"trained": False, "width": "none", "depthOn": False}, {"trained": False, "depth": None}),
    ("mix", {"windowOn": True, "windowStart": 5, "windowWidth": 0, "mix": "reward"}, {"window": [5, 0]}),
]


@needs_browser
@pytest.mark.parametrize("name, controls, state", SETTINGS)
def test_the_page_computes_what_python_does(browser, pages, name, controls, state):
    path, made = pages[name]
    show(browser, path)
    put(browser, **controls)
    shown = explored(browser)
    assert state.items() <= shown["state"].items()
    agrees(shown, made)

    # The counts stand on the page too, and an edge is drawn as what it is.
    kept = browser.find_element("css selector", "#counts dd").text
    assert kept == f"{shown['counts']['kept']} of {shown['counts']['edges']}"
    assert len(browser.find_elements("css selector", "path.trained")) == shown["counts"]["trainable"]
    no_errors(browser)


@needs_browser
def test_a_run_opens_with_its_own_credit_and_pruning(browser, image_run):
    """What tree.png was drawn from: advantages, masks and rewards of the run itself."""
    path, (_, _, advantages, keep, rewards, _) = image_run
    show(browser, path)
    shown = explored(browser)
    same(shown["advantages"], [a[None] for a in advantages])
    assert shown["keep"] == [mask.tolist() for mask in keep]
    assert (
        shown["state"]["rule"] == "sibling" and shown["state"]["width"] == "parent-top1" and shown["state"]["trained"]
    )
    labels = [label.text for label in browser.find_elements("css selector", ".reward")]
    assert labels == [f"{r:.2f}" for r in rewards.tolist()]
    no_errors(browser)


@needs_browser
def test_reset_and_numbers_that_are_not_valid(browser, pages):
    path, made = pages["mix"]
    show(browser, path)
    before = explored(browser)
    put(browser, beta=7, clip=2, rule="group", width="none", depthOn=False, windowOn=True)
    changed = explored(browser)
    assert changed["state"] != before["state"]

    # What is no number, or out of range, changes nothing.
    put(browser, beta=-1, windowWidth=9, size=2)
    assert explored(browser)["state"] == changed["state"]
    browser.find_element("id", "reset").click()
    assert explored(browser) == before

    # The slider moves the number, and the number the slider.
    browser.find_element("id", "slider").send_keys(Keys.END)
    assert explored(browser)["state"]["beta"] == 50
    put(browser, beta=20)
    assert browser.find_element("id", "slider").get_property("value") == "20"
    no_errors(browser)


def selection(browser):
    """Depth and index of the selected node, which has the focus and is the only one that Tab reaches."""
    chosen = browser.find_elements("css selector", ".node[aria-selected=true]")
    reachable = browser.find_elements("css selector", ".node[tabindex='0']")
    assert len(chosen) == 1 and chosen == reachable
    return int(chosen[0].get_attribute("data-depth")), int(chosen[0].get_attribute("data-index"))


@needs_browser
def test_keys_move_the_selection(browser, pages):
    path, made = pages["four"]  # sizes 1 4 4 16 16 16 16
    show(browser, path)
    assert selection(browser) == (0, 0)

    # Tab leads from the last control into the tree, in which one node at a time can be reached.
    browser.find_element("id", "zoom").send_keys(Keys.TAB)
    for keys, place in [
        (Keys.ARROW_UP, (0, 0)),
        (Keys.ARROW_RIGHT, (1, 0)),
        (Keys.ARROW_DOWN * 2, (1, 2)),
        (Keys.ARROW_RIGHT * 2, (3, 8)),
        (Keys.ARROW_DOWN, (3, 9)),
        (Keys.ARROW_LEFT, (2, 2)),
        (Keys.END, (6, 8)),
        (Keys.ARROW_RIGHT, (6, 8)),
        (Keys.HOME, (0, 0)),
        (Keys.ARROW_RIGHT + Keys.ARROW_DOWN * 9, (1, 3)),
    ]:
        ActionChains(browser).send_keys(keys).perform()
        assert selection(browser) == place
        assert browser.switch_to.active_element.get_attribute("aria-level") == str(place[0] + 1)
    assert browser.find_element("id", "panelTitle").text == "Depth 1, node 3"
    no_errors(browser)


@needs_browser
def test_the_panel_says_what_is_known_of_a_node(browser, pages):
    """A click selects, and the path to the root is marked; the mouse over another node shows that one in passing."""
    path, made = pages["four"]
    show(browser, path)
    put(browser, width="parent-top1", depthOn=True, depthStart=3, depthWidth=1)

    def node(d, j):
        place = f".node[data-depth='{d}'][data-index='{j}']"
        browser.execute_script("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", place)
        return browser.find_element("css selector", place)

    def panel():
        words = "return [...document.querySelectorAll('#facts ' + arguments[0])].map((cell) => cell.innerText)"
        return dict(zip(browser.execute_script(words, "dt"), browser.execute_script(words, "dd")))

    shown = explored(browser)
    dropped = shown["masks"]["width"][3].index(False)
    node(4, dropped).click()
    facts = panel()
    assert facts["depth"] == "4 of 6" and facts["index"].startswith(f"{dropped} ")
    assert facts["edge"] == "pruned by width, Parent-Top1 and by the depth window, steps 3 to 3"
    assert facts["advantage"].split("\n")[0] == f"{shown['advantages'][3][dropped]:+.4f}".replace("-", "\u2212")
    assert "the sum of the parent's softmax weights" in facts["weight"]
    on_path = {n.get_attribute("data-index") for n in browser.find_elements("css selector", ".node.path")}
    assert len(browser.find_elements("css selector", ".node.path")) == 5 and str(dropped // 4) in on_path

    ActionChains(browser).move_to_element(node(0, 0)).perform()
    assert browser.find_element("id", "panelTitle").text == "Depth 0, node 0" and "none" in panel()["edge"]
    ActionChains(browser).move_to_element(browser.find_element("id", "panelTitle")).perform()
    assert browser.find_element("id", "panelTitle").text == f"Depth 4, node {dropped}"

    node(6, 3).click()
    assert "only watched" in panel()["watched"] and "never trained" in panel()["edge"]
    no_errors(browser)


@needs_browser
def test_prompt_and_labels(browser, pages):
    """A prompt is text and nothing else; every control and every node has a name; a rule of one's own is explained."""
    show(browser, pages["roots"][0])
    assert browser.find_element("id", "prompt").get_property("textContent") == PROMPT
    with pytest.raises(NoSuchElementException):
        browser.find_element("id", "bold")
    assert "unscaled" in browser.find_element("id", "note").text and explored(browser)["state"]["rule"] == "depth"
    for control in browser.find_elements("css selector", "input, select, button"):
        assert control.accessible_name or not control.is_displayed(), control.get_attribute("id")
    leaf = browser.find_element("css selector", ".node.leaf")
    assert leaf.aria_role == "treeitem" and "reward" in leaf.accessible_name and "advantage" in leaf.accessible_name
    no_errors(browser)


@needs_browser
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_and_a_desk(browser, pages, width, scheme):
    """The page never scrolls sideways; the tree does, in its own box; no picture lies on another."""
    show(browser, pages["wide"][0], width, 800, ("prefers-color-scheme", scheme))
    browser.execute_script("document.getElementById('controls').open = true")
    assert Image.open(io.BytesIO(browser.get_screenshot_as_png())).size == (width, 800)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    wider = browser.execute_script("const b = document.getElementById('box'); return b.scrollWidth - b.clientWidth")
    assert (wider > 0) == (width == 400)

    boxes = browser.execute_script("return nodes.at(-1).map((n) => [n.offsetTop, n.offsetTop + n.offsetHeight])")
    assert all(end < start for (_, end), (start, _) in zip(boxes, boxes[1:])) and boxes[0][1] - boxes[0][0] >= 20
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    no_errors(browser)


@needs_browser
@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_clips_play_unless_less_motion_is_asked_for(browser, tmp_path, motion):
    made_up(tmp_path / "tree.html", make_forest(3, 2, (0,)), frames=9, size=(32, 32))
    show(browser, tmp_path / "tree.html", 1400, 1000, ("prefers-reduced-motion", motion))

    def playing():
        return browser.execute_script("return document.getAnimations().length")

    # Two leaves, the root that is shown, and its large clip; the box stops or starts them.
    expected = [4, 0] if motion == "no-preference" else [0, 4]
    box = browser.find_element("id", "play")
    counts = [playing()]
    box.click()
    assert [*counts, playing()] == expected

    # A frame is as wide as its node: the strip of nine is clipped to it.
    frame, strip = (browser.find_element("css selector", f".leaf {tag}").size for tag in (".frame", "img"))
    assert strip["width"] == pytest.approx(9 * frame["width"], abs=2) and strip["height"] == frame["height"]
    no_errors(browser)
