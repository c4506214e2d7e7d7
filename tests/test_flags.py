"""The command line: defaults and where they come from, the tracker, and what is refused."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest

import flags
import train_image

SMALL = "--leaves 4 --prompts-per-iteration 2 --eval-size 4 --iterations 1"


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
