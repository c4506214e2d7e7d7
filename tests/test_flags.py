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
    requests = []

    def load_dataset(name, split):
        requests.append((name, split))
        return datasets.Dataset.from_dict({"prompt": PROMPTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_prompts("hub:a/b", "--prompts") == read_prompts("hub:a/b:test", "--prompts") == WANTED
    assert requests == [("a/b", "train"), ("a/b", "test")]


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

    # Scalars and pictures of both evaluations, then the end.
    assert logged.pop() == "end"
    scalars = [(step, values) for step, values in logged if "heldout_reward" in values]
    assert [step for step, _ in scalars] == [0, 1] and "grad_norm" in scalars[1][1]
    pictures = [values["heldout"] for _, values in logged if "heldout" in values]
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


# ------------------------------------------------------------------------------------------------------------- defaults
def resolved(text: str, video: bool = False):
    """Options of a command line, resolved."""
    args = flags.parser("", video).parse_args(text.split())
    flags.resolve(args)
    return args


def test_the_embedded_model_takes_tuned_values():
    args = resolved("")
    assert (args.method, args.mix, args.sde, args.eta, args.steps) == ("branchgrpo-mix", 0, "cps", 0.7, 10)
    assert (args.lr, args.lr_end, args.ema, args.iterations) == (7e-5, 0.0, 0.0, 400)
    assert args.origin["lr"] == args.origin["steps"] == "tuned on tiny/flux"
    assert resolved("", video=True).lr == 2e-4


def test_any_other_checkpoint_takes_the_papers_values():
    """A value tuned on 4 million parameters never reaches FLUX.1-dev unasked."""
    args = resolved("--model black-forest-labs/FLUX.1-dev")
    assert (args.method, args.steps, args.sde, args.eta, args.shift) == ("branchgrpo", 20, "dance", 0.3, 3.0)
    assert (args.splits, args.leaves, args.branch_noise) == ((0, 3, 6, 9), 16, 4.0)
    assert (args.lr, args.lr_end, args.ema, args.iterations) == (1e-5, 1.0, 0.995, 300)
    assert (args.height, args.width, args.reward) == (720, 720, "hpsv2")
    assert args.origin["steps"] == args.origin["lr"] == "the paper"
    assert not any("tuned" in origin for origin in args.origin.values())


def test_what_follows_from_other_flags_says_so():
    model = "--model black-forest-labs/FLUX.1-dev"
    assert resolved(f"{model} --lora 64").lr == 3e-4
    assert resolved(f"{model} --method branchgrpo-mix").mix == 4
    assert resolved(f"{model} --depth-prune").depth_every == 30
    for sde, eta in (("flow", 0.7), ("cps", 0.8), ("dance", 0.3)):
        args = resolved(f"{model} --sde {sde}")
        assert args.eta == eta and args.origin["sde"] == "given" and "--sde" in args.origin["eta"]
    assert resolved(f"{model} --method mixgrpo").sde == "flow"


def test_a_model_trained_from_the_embedded_one_is_embedded(tmp_path):
    """By its transformer's configuration, wherever it lies and whatever it was saved with."""
    for folder, changed in (("same", {}), ("wider", {"num_layers": 99})):
        config = json.loads((flags.HERE / "tiny/flux/transformer/config.json").read_text())
        path = tmp_path / folder / "transformer"
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config | {"_name_or_path": "elsewhere"} | changed))
    assert resolved(f"--model {tmp_path}/same").steps == 10
    assert resolved(f"--model {tmp_path}/wider").steps == 20


def test_every_value_is_printed_with_its_origin():
    args = resolved("--branch 4 --depth-prune --seed 3")
    text = flags.describe(args, ["a"], ["b"])
    for name, value in vars(args).items():
        if value is not None and name != "origin":
            row = next(row for row in text.splitlines() if row.startswith(f"  --{name.replace('_', '-')} "))
            assert row.endswith(args.origin[name]), row
    assert "--seed                   3                        given" in text


@pytest.mark.parametrize(
    "text",
    [
        "--branch 4 --depth-prune",
        "--width-prune extreme-2 --leaves 8",
        "--depth-prune 3 --mix 2 --sde flow --nf4 --lora 4",
    ],
)
def test_a_pruned_run_names_its_unpruned_counterpart(text, monkeypatch):
    """The command that is printed gives the same options, but for pruning."""
    monkeypatch.setattr(flags, "find_spec", lambda name: True)  # bitsandbytes
    pruned = resolved(text)
    command = next(r for r in flags.describe(pruned, [], []).splitlines() if r.startswith("unpruned"))
    script, *argv = command.split()[2:]
    assert script == "train_image.py"
    plain = resolved(" ".join(argv))
    differ = {name for name in vars(plain) if getattr(plain, name) != getattr(pruned, name)}
    assert differ <= {"depth_prune", "width_prune", "origin"} and plain.depth_prune is plain.width_prune is None
    assert not any(row.startswith("unpruned") for row in flags.describe(plain, [], []).splitlines())


def test_docs_defaults_is_the_table():
    """docs/defaults.md has a row for every open flag, with both of its values."""
    text = (flags.HERE / "docs/defaults.md").read_text()
    for table in (flags.DEFAULTS_IMAGE, flags.DEFAULTS_VIDEO):
        for name, default in table.items():
            rows = [row.split("|") for row in text.splitlines() if row.startswith(f"| `--{name.replace('_', '-')}`")]
            assert rows, name
            assert any(str(default.embedded) in row[2] and str(default.other) in row[3] for row in rows), (name, rows)


def test_updates_by_parents_need_not_divide_the_prompts():
    assert resolved("--updates 3 --updates-by parents").updates == 3
    with pytest.raises(ValueError, match="--updates-by parents"):
        resolved("--updates 3")
