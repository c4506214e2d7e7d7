"""Prompts from every kind of file and from the hub, the tracker, and what is refused."""

import json
import sys
import time
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import datasets
import pytest

import flags
import train_image
from prompts import load_prompts, read_prompts

SMALL = "--leaves 4 --prompts-per-iteration 2 --eval-size 4 --iterations 1"
PROMPTS = ["a cat", "a dog", "a red  bicycle", "a cat", " ", "ein Löwe"]
WANTED = ["a cat", "a dog", "a red  bicycle", "ein Löwe"]


def written(folder, kind: str) -> str:
    """PROMPTS as a file of one kind."""
    path = folder / f"prompts.{kind}"
    table = datasets.Dataset.from_dict({"prompt": PROMPTS, "score": list(range(6))})
    if kind == "txt":
        path.write_text("\n".join(PROMPTS), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps([{"prompt": p, "image_path": ["0.jpg", "1.jpg"]} for p in PROMPTS]))
    elif kind == "jsonl":
        table.to_json(path)
    else:
        getattr(table, f"to_{kind}")(path)
    return str(path)


@pytest.mark.parametrize("kind", ["txt", "json", "jsonl", "csv", "parquet"])
def test_prompts_are_read_without_blanks_and_repeats(tmp_path, kind):
    assert read_prompts(written(tmp_path, kind), "--prompts") == WANTED


def test_a_list_of_prompts_and_another_column(tmp_path):
    path = tmp_path / "anime.json"  # as HPDv2's benchmark
    path.write_text(json.dumps(PROMPTS))
    assert read_prompts(str(path), "--prompts") == WANTED
    path.write_text(json.dumps([{"caption": p} for p in PROMPTS]))
    assert read_prompts(str(path), "--prompts", "caption") == WANTED


def test_a_data_set_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict({"prompt": PROMPTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_prompts("hub:a/b", "--prompts") == read_prompts("hub:a/b:test", "--prompts") == WANTED
    assert asked == [("a/b", "train"), ("a/b", "test")]


def test_a_data_set_that_is_a_script(monkeypatch):
    def load_dataset(name, split):
        raise RuntimeError("Dataset scripts are no longer supported, but found HPDv2.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="--prompts hub:ymhao/HPDv2 cannot be read: Dataset scripts"):
        read_prompts("hub:ymhao/HPDv2", "--prompts")


def test_the_held_out_tenth_of_a_sorted_file_is_of_all_kinds(tmp_path):
    path = tmp_path / "sorted.txt"
    path.write_text("\n".join(f"{kind} {i}" for kind in "abcd" for i in range(50)))
    args = SimpleNamespace(prompts=str(path), eval_prompts=None, prompt_column="prompt", plan=None)
    prompts, heldout = load_prompts(args, "", "")
    assert {p[0] for p in heldout} == set("abcd") and len(heldout) == 20 and not set(prompts) & set(heldout)
    assert (prompts, heldout) == load_prompts(args, "", "")  # always the same


def test_a_hundred_thousand_prompts(tmp_path):
    path, began = tmp_path / "many.txt", time.perf_counter()
    path.write_text("\n".join(f"prompt {i % 100_000}" for i in range(150_000)))
    args = SimpleNamespace(prompts=str(path), eval_prompts=None, prompt_column="prompt", plan=None)
    prompts, heldout = load_prompts(args, "", "")
    assert (len(prompts), len(heldout)) == (90_000, 10_000) and time.perf_counter() - began < 5


def test_prompts_that_cannot_be_read(tmp_path):
    for name, text, words in (
        ("a.json", "{", "cannot be read"),
        ("a.json", '[{"text": "a"}]', "--prompt-column"),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.jsonl", '{"text": "a"}\n', "--prompt-column"),
        ("a.txt", "\n \n", "holds no prompt"),
        ("missing.csv", None, "cannot be read"),
    ):
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_prompts(str(path), "--prompts")


def test_metrics_go_to_wandb(tmp_path, monkeypatch, capsys):
    """A stand-in for the package, which is not installed here: what it is given, step by step."""
    logged = []
    run = SimpleNamespace(
        log=lambda values, step=None: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    wandb = SimpleNamespace(
        init=lambda **kwargs: run, Image=lambda x: x.shape, __spec__=ModuleSpec("wandb", None), run=run
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train_image.main([*SMALL.split(), "--tracker", "wandb", "--out", str(tmp_path / "a")])
    scalars = [(step, values) for step, values in (row for row in logged if row != "end") if "heldout_reward" in values]
    assert [step for step, _ in scalars] == [0, 1] and "grad_norm" in scalars[1][1] and logged[-1] == "end"
    pictures = [values["heldout"] for _, values in (row for row in logged if row != "end") if "heldout" in values]
    assert pictures == [[(32, 64, 3)] * 4] * 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["iterations"] == 1


@pytest.mark.parametrize(
    "argv, words", [("--tracker wandb", "install wandb"), ("--nf4 --lora 4", "install bitsandbytes")]
)
def test_a_missing_package_is_named(capsys, tmp_path, monkeypatch, argv, words):
    monkeypatch.setattr(flags, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        train_image.main([*argv.split(), "--out", str(tmp_path / "a")])
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("argv, words", [("--nf4", "give --lora"), ("--nf4 --lora 4 --fsdp", "--fsdp")])
def test_four_bits_are_refused_where_they_cannot_be(capsys, tmp_path, monkeypatch, argv, words):
    monkeypatch.setattr(flags, "find_spec", lambda name: True)
    with pytest.raises(SystemExit) as stop:
        train_image.main([*argv.split(), "--out", str(tmp_path / "a")])
    assert stop.value.code == 2 and words in capsys.readouterr().err
