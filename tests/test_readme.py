"""The README agrees with the code: its links, its snippets and its commands."""

import ast
import io
import json
import re
import shlex
import textwrap
import tokenize
from pathlib import Path

import numpy as np
import pytest

import flags
import objectives
import rewards
import schedules
import sde
import train_image
import tree

HERE = Path(__file__).parent.parent
README = (HERE / "README.md").read_text()
NOT_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
EXTEND = (HERE / "docs/extend.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README + EXTEND, re.S)


def test_links_point_at_files():
    links = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert len(links) > 15
    for link in links:
        assert (HERE / link).exists(), link


def test_linked_functions_exist():
    """`name`](file.py): the file defines that name."""
    linked = re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", README)
    assert len(linked) >= 10
    for name, file in linked:
        assert re.search(rf"^(def|class) {name}\b", (HERE / file).read_text(), re.M), (name, file)


def test_the_algorithm_has_at_most_eight_steps():
    section = README.split("## The algorithm")[1].split("\n## ")[0]
    assert 5 <= len(re.findall(r"^\d\. ", section, re.M)) <= 8


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_readme_names_the_files_in_their_order():
    """Its reading order is that of ORDER: a file imports only files above it."""
    section = README.split("## Reading order")[1].split("\n## ")[0]
    named = re.findall(r"\]\((\w+)\.py\)", section)
    assert named == list(ORDER)


def test_readme_has_the_benchmarks_figures():
    """Its table is that of bench/results/equal_time.json, rounded."""
    document = json.loads((HERE / "bench/results/equal_time.json").read_text())
    lines = README.split("final reward minus")[1].split("\n\n")[0].splitlines()
    rows = [row.split("|")[2:5] for row in lines if row.startswith("| ")]
    arms = ["DanceGRPO", "MixGRPO", "BranchGRPO", "Mix, noise at the splits, flash", "endpoint, tree"]
    arms += ["endpoint, star at a random step", "nft, ODE"]
    assert len(rows) == len(arms)
    for cells, arm in zip(rows, arms):
        found = document["table"][arm]
        seconds, reward, reached = ([float(n) for n in re.findall(r"[-+]?\d\.\d+", cell)] for cell in cells)
        ratio = document["seconds"][arm]["policy"] / document["seconds"]["DanceGRPO"]["policy"]
        assert seconds == pytest.approx([ratio], abs=0.0051), arm
        assert reached == pytest.approx([found["median_to_final"]], abs=0.0051), arm
        if arm != "DanceGRPO":
            assert reward == pytest.approx(found["final_minus_dance"], abs=0.00051), arm

    # Where it starts, and where DanceGRPO ends.
    start, end = (document["curves"]["DanceGRPO"][0]["reward"][0], np.mean(document["table"]["DanceGRPO"]["final"]))
    assert f"starts\nat {start:.2f}, and DanceGRPO ends at {end:.2f}" in README


def test_readme_has_the_speedruns_ratio():
    """So many times fewer model evaluations does the newest record need than the demo, which is the first."""
    recipes = list(json.loads((HERE / "bench/results/speedrun.json").read_text())["recipes"].values())
    fewer = recipes[0]["units"][0] / recipes[-1]["units"][0]
    assert f"{fewer:.1f} times fewer model evaluations\n(`python bench/speedrun.py`)" in README


def test_snippets_are_short():
    assert len(SNIPPETS) == 5
    for snippet in SNIPPETS:
        assert len([line for line in snippet.splitlines() if line.strip() and "import" not in line]) <= 10


@pytest.mark.parametrize(
    "snippet, argv",
    list(
        zip(
            SNIPPETS,
            [
                *("--advantage unscaled", "--reward ocr:1,light:0.1", "--method late", "--sde constant --eta 0.2"),
                "--objective gentle",
            ],
        )
    ),
    ids=["credit", "reward", "schedule", "step", "objective"],
)
def test_snippets_train(snippet, argv, tmp_path, capsys):
    """Each snippet, with the flags that its page names, runs an iteration."""
    saved = [
        (t, dict(t)) for t in (tree.ADVANTAGES, rewards.REWARDS, schedules.METHODS, sde.STEPS, objectives.OBJECTIVES)
    ]
    try:
        exec(snippet, {})
        small = "--iterations 1 --leaves 4 --prompts-per-iteration 1 --eval-size 2"
        train_image.main([*small.split(), *argv.split(), "--out", str(tmp_path / "a")])
    finally:
        for table, before in saved:
            table.clear()
            table.update(before)
    assert '"iterations": 1' in capsys.readouterr().out
    assert argv in (README + EXTEND).replace("`", "")


def test_commands_parse():
    """Every `python train_image.py ...` of the README is accepted by the flags."""
    text = README.replace("\\\n", " ")
    commands = re.findall(r"^python train_image\.py(.*)$", text, re.M)
    assert len(commands) > 5
    parser = flags.parser("")
    for command in commands:
        argv = shlex.split(command, comments=True)
        if "--help" not in argv:
            flags.resolve(parser.parse_args(argv))


def lines_of_code(text: str) -> int:
    """Lines that hold code: blank lines, comments and docstrings do not count."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOT_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        documented = (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
        )
        if documented:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_size():
    """At most 5,200 lines of code at the top level, comments and docstrings apart; no function has more than 60.

    Five families of models and thirteen rewards are 400 of them.
    """
    total = 0
    for path in [*HERE.glob("*.py"), *HERE.glob("tiny/*.py")]:
        text = path.read_text()
        total += lines_of_code(text) * (path.parent == HERE)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = textwrap.dedent(ast.get_source_segment(text, node, padded=True))
                assert lines_of_code(body) <= 60, f"{path.name}: {node.name}"
    assert total <= 5200


def test_lines_of_code():
    """By hand: of these eight lines three are code."""
    text = '"""Doc\nstring."""\n\n# comment\ndef f():  # trailing\n    """Doc."""\n    return (\n        1)\n'
    assert lines_of_code(text) == 3


ORDER = (  # a file imports only what stands before it: nothing points upwards, and there are no circles
    *(
        "sde",
        "tree",
        "branchgrpo",
        "objectives",
        "schedules",
        "prompts",
        "pretrained",
        "preference",
        "rewards",
        "disk",
        "parallel",
    ),
    *("policy", "models", "flags", "checkpoint", "loop", "hardware", "launch", "report", "plane", "toy"),
    *("train_image", "train_video"),
)


def test_imports_point_downwards():
    """Every top-level file stands in ORDER and imports only earlier ones."""
    assert sorted(ORDER) == sorted(p.stem for p in HERE.glob("*.py"))
    for place, name in enumerate(ORDER):
        for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text())):
            imported = [node.module] if isinstance(node, ast.ImportFrom) else []
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for other in filter(ORDER.__contains__, imported):
                assert ORDER.index(other) < place, f"{name}.py imports {other}.py"


def long_line(path: Path) -> str | None:
    """The first line above 120 columns outside a Markdown table or link; None if there is none."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if len(line) > 120 and not (path.suffix == ".md" and line.lstrip().startswith(("|", "!["))):
            return f"{path.name}:{number}"
    return None


def test_lines_end_at_120_columns():
    """Of code, docs and scripts; tables apart."""
    paths = [
        p
        for kind in ("*.py", "bench/*.py", "tests/*.py", "tiny/*.py", "*.md", "docs/*.md", "configs/*.sh")
        for p in HERE.glob(kind)
    ]
    assert [where for where in map(long_line, paths) if where] == []


def test_flags_reach_the_code():
    """Every flag is read somewhere: none is parsed and forgotten."""
    code = "".join(p.read_text() for p in HERE.glob("*.py"))
    for action in flags.parser("")._actions:
        if action.dest != "help":
            assert re.search(rf"\bargs\.{action.dest}\b", code), action.dest


def test_every_default_is_shown(capsys):
    """--help names a default for every flag that takes a value."""
    with pytest.raises(SystemExit):
        train_image.main(["--help"])
    shown = capsys.readouterr().out
    entries = re.split(r"\n  (?=--)", shown)[1:]
    assert len(entries) > 40
    for entry in entries:
        assert "default" in entry or any(w in entry for w in ("bare", "parent-top1")), entry


def test_mutants_still_apply():
    """Every planted fault of `make mutants` finds its text exactly once; there are at least 25."""
    from mutants import MUTANTS

    assert len(MUTANTS) >= 25
    for name, right, wrong in MUTANTS:
        assert (HERE / f"{name}.py").read_text().count(right) == 1 and right != wrong, right
