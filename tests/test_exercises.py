"""docs/exercises.md keeps its word: its faults are noticed until they are mended, its answers run and print it.

The copy of an exercise must not give its answer away, and must never take the place of somebody's work.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mutants
import pytest
import torch
from mutants import ANSWERS, EXERCISES, MUTANTS, exercise, fault

import objectives
import schedules
import sde
import tree

HERE = Path(__file__).parent.parent
TEXT = (HERE / "docs/exercises.md").read_text()
NUMBERS = range(1, len(EXERCISES) + 1)


def section(name: str) -> str:
    """The text below the heading that begins with a name, such as A3, up to the next heading."""
    return re.split(r"\n##", TEXT.split(f"\n### {name}")[1])[0]


def prose(text: str) -> str:
    """A text with every run of white space as one blank, so that a sentence is found wherever its lines break."""
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------- A. the twelve faults
def test_an_exercise_chooses_one_mutant():
    """By file and wrong text, which no two mutants share; no exercise comes twice."""
    keys = [(name, wrong) for name, _, wrong in MUTANTS]
    chosen = [(name, wrong) for name, wrong, _ in EXERCISES]
    assert len(set(chosen)) == len(chosen) == 12 and all(keys.count(key) == 1 for key in chosen)
    assert {name for name, _ in chosen} == {"sde", "tree", "branchgrpo", "objectives", "schedules"}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_section_has_symptom_hints_and_answer(number):
    """The answer holds both lines of the file, in full, and the name of the function; what comes before it does not."""
    name, right, wrong = fault(number)
    text = section(f"A{number}.")
    question, answer = text.split("<details><summary>Answer</summary>")
    assert f"python tests/mutants.py --exercise {number}\n" in question
    assert prose(EXERCISES[number - 1][2]) in prose(question)
    assert question.count("hint</summary>") == 2 and answer.count("</details>") == 1
    assert right not in question and prose(wrong) not in prose(question)

    # The line of the file in which the text stands, without its comment.
    source = (HERE / f"{name}.py").read_text()
    line = next(line for line in source.splitlines() if right in line).partition("  #")[0]
    assert f"```diff\n-{line.replace(right, wrong)}\n+{line}\n```" in answer
    function = re.search(rf"\[{name}\.py\]\(\.\./{name}\.py\), `([\w.]+)`:", answer)[1].rpartition(".")[2]
    assert line in source.split(f"def {function}(")[1].split("\ndef ")[0]
    assert re.search(r"Eq\. \d|\(method\.md#flow-matching-in-three-lines\)", answer)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_copy_has_the_fault_and_not_the_answer(number, tmp_path):
    name, right, wrong = fault(number)
    said = exercise(number, tmp_path / "copy")
    original, planted = ((folder / f"{name}.py").read_text() for folder in (HERE, tmp_path / "copy"))
    assert planted == original.replace(right, wrong) != original

    # What is said tells the symptom and how to check, and no more.
    assert prose(EXERCISES[number - 1][2]) in prose(said) and right not in said and wrong not in said
    assert f"tests/{mutants.TESTS[name]}.py" in said and str(tmp_path / "copy") in said

    # Neither the list of faults, nor a file that names both texts, nor the project's history.
    names = [path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*")]
    assert not set(ANSWERS) & set(names) and not {".git", "runs", ".venv"} & set(names)
    for path in (tmp_path / "copy").rglob("*.*"):
        if path.suffix in (".py", ".md", ".html", ".ipynb") and path.name != f"{name}.py":
            text = path.read_text()
            assert "MUTANTS" not in text and not (right in text and wrong in text), path
    shutil.rmtree(tmp_path / "copy")


def test_nobodys_work_is_overwritten(tmp_path, capsys):
    """A folder with a file in it, and a file in the place of a folder: one sentence, exit code 2, nothing written."""
    (tmp_path / "mine.txt").write_text("work")
    for folder in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(SystemExit) as stop:
            mutants.main(["--exercise", "1", "--folder", str(folder)])
        assert stop.value.code == 2 and "is not empty" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "work"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--exercise", "13"], "invalid choice"),
        (["--exercise", "1", "3"], "does not go with numbers"),
        (["--folder", "x"], "--folder goes with --exercise"),
        ([str(len(MUTANTS))], "faults have the numbers 0 to"),
    ],
)
def test_bad_arguments_are_one_sentence(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        mutants.main(argv)
    assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_numbers_still_choose_faults(monkeypatch):
    chosen = []
    monkeypatch.setattr(mutants, "plant_all", lambda numbers: chosen.append(list(numbers)) or 0)
    assert mutants.main(["3", "17"]) == mutants.main([]) == 0
    assert chosen == [[3, 17], list(range(len(MUTANTS)))]


def check(number: int, folder: Path, *only: str) -> int:
    """The exit code of an exercise's command in its folder, with more arguments where given."""
    # No variable of the pytest that runs this, and no plugins: importing them takes a third of the time.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [*mutants.check_command(number), *only]
    return subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL).returncode


def red_then_green(number: int, folder: Path, *only: str) -> None:
    """Set an exercise, check, mend, check again: tests fail (1), then all pass (0)."""
    name, right, wrong = fault(number)
    exercise(number, folder)
    assert check(number, folder, *only) == 1
    mutants.plant(folder, name, wrong, right)
    assert check(number, folder, *only) == 0


def test_a_fault_is_red_until_it_is_mended(tmp_path):
    """One for real, by the tests of its function alone; the slow tests do it for all, by the whole command."""
    assert fault(3)[2] == "own = shared + s * own"
    red_then_green(3, tmp_path, "-k", "branch_noise")


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_every_fault_is_red_until_it_is_mended(number, tmp_path):
    red_then_green(number, tmp_path)


# --------------------------------------------------------------------------------------------------- B. pen and code
CODE = r"```python\n(.*?)```"
PRINTED = r"\n\n```text\n(.*?)```"


@pytest.fixture(scope="module")
def needed() -> dict:
    """The names that B4 to B6 need: one set for all, so that the default is trained once."""
    names: dict = {}
    exec(re.search(CODE, section("What B4 to B6 need"), re.S)[1], names)
    return names


@pytest.fixture
def answer(request, needed, monkeypatch):
    """The section of an exercise, what its code printed, and the names that it made; tables are restored afterwards."""
    # Answers name the project's folders, one of them adds to the path, and some register what they made.
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    tables = (tree.ADVANTAGES, schedules.METHODS, sde.STEPS, objectives.OBJECTIVES)
    saved = [(table, dict(table)) for table in tables]
    text, names = section(f"B{request.param}."), dict(needed) if request.param >= 4 else {}
    try:
        with torch.random.fork_rng(devices=[]):
            yield text, run(re.search(CODE, text, re.S)[1], names), names
    finally:
        for table, before in saved:
            table.clear()
            table.update(before)


def run(code: str, names: dict) -> str:
    """What code prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue()


def same(printed: str, stated: str) -> bool:
    """The same words, and numbers that agree to 0.01 or one part in fifty: other machines round otherwise."""
    pairs = list(zip(printed.split(), stated.split()))
    return len(printed.split()) == len(stated.split()) and all(a == b or alike(a, b) for a, b in pairs)


def alike(a: str, b: str) -> bool:
    """Are two words numbers that nearly agree? A comma behind them is no part of them."""
    try:
        return float(a.strip(",")) == pytest.approx(float(b.strip(",")), abs=0.01, rel=0.02)
    except ValueError:
        return False


def test_printed_numbers_are_compared():
    assert same("reward 0.438 after 21840", "reward 0.441 after 21840")
    assert not same("reward 0.438", "reward 0.46") and not same("reward 0.438", "return 0.438")
    assert not same("reward 0.438 ± 0.001", "reward 0.438")


@pytest.mark.parametrize("answer", range(1, 7), indirect=True)
def test_an_answer_runs_and_prints_what_is_stated(answer):
    text, printed, _ = answer
    stated = re.search(r"It prints:" + PRINTED, text, re.S)[1]
    assert text.count("```python") == 1 and "assert " in text
    assert same(printed, stated), printed


@pytest.mark.slow
@pytest.mark.parametrize("answer", range(4, 7), indirect=True)
def test_long_comparisons_print_what_is_stated(answer):
    """Ten seeds and 50 iterations: two minutes for all."""
    text, _, names = answer
    comparisons = re.findall(r"`(compare\([^`]*\))` prints:" + PRINTED, text, re.S)
    assert comparisons
    for call, stated in comparisons:
        assert same(printed := run(call, names), stated), printed
