"""What disks, other runs, other people's files and users' rewards do to a run: one sentence, and nothing is lost."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import FluxPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import checkpoint
import disk
import launch
import loop
import parallel
import report
import rewards
import train_image
from branchgrpo import NonFinite
from models import FluxPolicy
from policy import Policy

HERE = Path(__file__).parent.parent
SMALL = "--leaves 4 --prompts-per-iteration 1 --eval-size 2 --save-every 1 --lr 1e-3"


def run(capsys, *argv) -> dict:
    """A run in this process: its final document."""
    train_image.main([*SMALL.split(), *map(str, argv)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys, *argv) -> str:
    """A run that ends with one sentence and exit 2: the sentence."""
    with pytest.raises(SystemExit) as stopped:
        train_image.main([*SMALL.split(), *map(str, argv)])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def rows(out: Path) -> list[dict]:
    """metrics.jsonl without what a clock or the system measured."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(("seconds_", "peak_"))} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three iterations, with its last two checkpoints; tests work on copies of it."""
    out = tmp_path_factory.mktemp("runs") / "a"
    train_image.main([*SMALL.split(), "--iterations", "3", "--out", str(out)])
    return out


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that run, as if it had been stopped after its second iteration."""
    out = tmp_path / "a"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoint-3")
    return out


# ---------------------------------------------------------------------------------------------------- whose is a folder
def test_other_peoples_folders_are_neither_counted_nor_deleted(capsys, tmp_path, finished):
    """checkpoint-9 and checkpoint-10 of somebody else, a backup by hand, and a checkpoint of another run."""
    out = tmp_path / "a"
    foreign = ["checkpoint-9", "checkpoint-10", "checkpoint-2-mybackup", "checkpoint-x"]
    for name in foreign:
        (out / name).mkdir(parents=True)
        (out / name / "thesis.tex").write_text("mine")
    shutil.copytree(finished / "checkpoint-3", out / "checkpoint-7")
    run(capsys, "--iterations", 2, "--keep", 1, "--out", out)
    assert all((out / name / "thesis.tex").read_text() == "mine" for name in foreign)
    assert (out / "checkpoint-7/manifest.json").exists()
    assert [path.name for path in checkpoint.checkpoints(out)] == ["checkpoint-2"] and not (
        out / "checkpoint-1"
    ).exists()


def test_a_folder_has_one_run_at_a_time(capsys, copy):
    """Whoever comes second is told who has it; the owner's death frees it."""
    script = "import sys, time; sys.path.insert(0, sys.argv[2]); import disk, pathlib\n"
    script += "lock = disk.FolderLock(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    owner = subprocess.Popen([sys.executable, "-c", script, copy, HERE], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n"
    before = (copy / "metrics.jsonl").read_text()
    assert f"in use by process {owner.pid} on" in refused(capsys, "--iterations", 3, "--resume", copy)
    assert (copy / "metrics.jsonl").read_text() == before
    owner.kill()
    owner.wait()
    disk.FolderLock(copy).release()


def test_names_given_by_default_never_collide():
    args = SimpleNamespace(resume=None, out=None, method="branchgrpo")
    assert len({checkpoint.find_out(args) for _ in range(20)}) == 20


def test_other_peoples_files_are_never_replaced(capsys, tmp_path):
    """A new run would write over them, and could not save where another folder has a checkpoint's name."""
    for name, words in (("model", "holds model"), ("curves.png", "holds curves.png"), ("checkpoint-2", "in the way")):
        out = tmp_path / name
        (out / name).mkdir(parents=True)
        assert words in refused(capsys, "--iterations", 2, "--out", out)
        assert [path.name for path in out.iterdir()] == [name]


def test_a_lock_that_cannot_be_taken_is_named(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(ValueError, match="cannot be locked"):
        disk.FolderLock(tmp_path)


def saving(out: Path, iteration: int, keep: int) -> SimpleNamespace:
    """A run as `save_checkpoint` sees it."""
    (out / "options.json").write_text('{"run": "me"}')
    accelerator = Accelerator(cpu=True)
    policy, optimizer = SimpleNamespace(trainable=lambda: [torch.ones(1)]), SimpleNamespace(state={})
    run = SimpleNamespace(out=out, iteration=iteration, accelerator=accelerator, policy=policy, optimizer=optimizer)
    vars(run).update(
        ema=None,
        scaler=None,
        history=[],
        silent={},
        identity="me",
        at=lambda place: None,
        args=SimpleNamespace(keep=keep),
    )
    return run


def test_the_newest_checkpoint_is_never_the_one_to_go(tmp_path, monkeypatch):
    """A later one, damaged, does not push it out; of a link the link goes; a copy by hand is not counted."""
    monkeypatch.setattr(parallel, "save", lambda run, folder: (folder / "weights").write_text("1"))
    (out := tmp_path / "a").mkdir()
    for iteration in (1, 2, 4):
        checkpoint.save_checkpoint(saving(out, iteration, 9))
    empty(out / "checkpoint-4/weights")
    (out / "checkpoint-1").rename(tmp_path / "elsewhere")
    (out / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-02")

    checkpoint.save_checkpoint(saving(out, 3, 1))
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-02", "checkpoint-3", "checkpoint-4"]
    assert (tmp_path / "elsewhere/weights").exists() and checkpoint.whole_checkpoint(out, 4).name == "checkpoint-3"


def test_averages_and_moments_that_are_not_finite_are_not_kept(tmp_path):
    nan = torch.tensor([torch.nan])
    for name, changed in (
        ("averaged weight", {"ema": SimpleNamespace(shadow_params=[nan])}),
        ("moment of the optimiser", {"optimizer": SimpleNamespace(state={"w": {"exp_avg": nan}})}),
    ):
        run = saving(tmp_path, 1, 1)
        vars(run).update(changed)
        with pytest.raises(NonFinite, match=f"{name} is not finite after iteration 1"):
            checkpoint.save_checkpoint(run)
    assert not list(tmp_path.glob("checkpoint-*"))


# ----------------------------------------------------------------------------------------------------- damaged files
def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    """A file as a power failure leaves it."""
    path.write_bytes(b"")


@pytest.mark.parametrize("file", ["metrics.jsonl", "__0_0.distcp", "trainable.safetensors", ".metadata"])
@pytest.mark.parametrize("harm", [flip, empty, Path.unlink])
def test_a_damaged_file_is_noticed(finished, file, harm, tmp_path):
    """By size or checksum, whatever happened to it."""
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(finished / "checkpoint-3", folder)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert disk.damage(folder, files) is None
    harm(folder / file)
    assert disk.damage(folder, files).startswith(file)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(capsys, finished, tmp_path):
    """The third is damaged: the run goes on from the second, says so, and ends with the same rows."""
    out = tmp_path / "a"
    shutil.copytree(finished, out)
    flip(out / "checkpoint-3/__0_0.distcp")
    train_image.main([*SMALL.split(), "--iterations", "3", "--resume", str(out)])
    assert "checkpoint-3 is damaged (__0_0.distcp has changed" in (err := capsys.readouterr().err), err
    assert "going on from checkpoint-2" in err and rows(out) == rows(finished)

    # Where none is whole it is an error, not a run from the start.
    for name in ("checkpoint-2", "checkpoint-3"):
        empty(out / name / "metrics.jsonl")
    assert "no checkpoint is whole" in refused(capsys, "--iterations", 3, "--resume", out)


def test_a_checkpoint_of_another_run_is_not_loaded(capsys, copy, tmp_path):
    """Put in the place of one's own, or with its number changed."""
    other = tmp_path / "b"
    run(capsys, "--iterations", 3, "--seed", 1, "--out", other)
    shutil.copytree(other / "checkpoint-3", copy / "checkpoint-3")
    shutil.copytree(copy / "checkpoint-2", copy / "checkpoint-8")
    assert [path.name for path in checkpoint.checkpoints(copy)] == ["checkpoint-2"]


@pytest.mark.parametrize("files", [None, {}, ["a"], {"metrics.jsonl": {}}])
def test_a_list_of_files_that_is_torn_is_damage(tmp_path, files):
    (tmp_path / "metrics.jsonl").write_text("")
    assert disk.damage(tmp_path, files) == "its list of files is torn"


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100000])
def test_a_manifest_that_is_torn_is_named(capsys, copy, text):
    """Whose the folder is nobody can say: it is neither loaded nor deleted nor passed over in silence."""
    (copy / "checkpoint-2/manifest.json").write_text(text)
    assert "checkpoint-2 is in the way" in refused(capsys, "--iterations", 3, "--resume", copy)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"run": None}, "names no run"),
        ({"from_another_version": 1}, "has --from-another-version, which is unknown here"),
        ({"lr": ...}, "does not know --lr"),  # ...: it is not there
        ({"iterations": "3"}, "has --iterations 3, not 4"),
    ],
)
def test_options_of_another_version_are_named(capsys, copy, changed, words):
    options = json.loads((copy / "options.json").read_text()) | changed
    (copy / "options.json").write_text(json.dumps({name: v for name, v in options.items() if v is not ...}))
    assert words in refused(capsys, "--iterations", 4, "--resume", copy)


def test_a_damaged_checkpoint_is_not_exported(capsys, finished, tmp_path):
    """From the one before, its iterations would be trained again at the learning rates of a shorter run."""
    out = tmp_path / "a"
    shutil.copytree(finished, out)
    empty(out / "checkpoint-2/metrics.jsonl")
    assert "checkpoint-2 is damaged" in refused(capsys, "--iterations", 2, "--resume", out)


def test_options_that_are_lost_are_named(capsys, copy):
    empty(copy / "options.json")
    assert "options.json is damaged (" in refused(capsys, "--iterations", 3, "--resume", copy)


def test_pictures_of_before_that_are_lost_are_made_again(capsys, copy, finished):
    """From the untrained weights, before the checkpoint is loaded: the same pictures."""
    (copy / "before.safetensors").write_bytes(b"half")
    run(capsys, "--iterations", 3, "--resume", copy)
    assert (copy / "before.safetensors").read_bytes() == (finished / "before.safetensors").read_bytes()
    assert rows(copy) == rows(finished)


class Malicious:
    """Runs a command where it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_checkpoint_from_somebody_else_runs_no_code(capsys, copy, tmp_path):
    """Its .metadata is a pickle: with an honest list of files, it is refused before torch reads it."""
    target = tmp_path / "run-by-the-pickle"
    folder = copy / "checkpoint-2"
    (folder / ".metadata").write_bytes(pickle.dumps(Malicious(target)))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = disk.list_files(folder, "manifest.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    message = refused(capsys, "--iterations", 3, "--resume", copy)
    assert "it asks for posix.mkdir, which no checkpoint needs" in message and not target.exists()


def test_values_that_are_no_tensors_are_read_as_data(tmp_path):
    """The optimiser's settings lie in the shards as pickles of their own."""
    target, file = tmp_path / "run-by-the-pickle", tmp_path / "value.pt"
    torch.save(Malicious(target), file)
    planner = parallel.SafePlanner(flatten_state_dict=False)
    planner.state_dict = {}
    with pytest.raises(pickle.UnpicklingError), file.open("rb") as stream:
        planner.load_bytes(SimpleNamespace(dest_index=SimpleNamespace(fqn="lr")), stream)
    assert not target.exists()


# ------------------------------------------------------------------------------------------------------ disk and folder
def test_folders_that_cannot_be_written_are_named_before_anything_is_loaded(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "prepare", lambda *args: pytest.fail("it loaded first"))
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out, words in (
        (tmp_path / "file", "is a file, not a folder"),
        (tmp_path / "file/a", "is a file, not a folder"),
        (tmp_path / "link", "is a link that points nowhere"),
        (tmp_path / ("a" * 300), "255 bytes at most"),
        (os.fsdecode(bytes(tmp_path) + b"/\xff"), "not UTF-8"),
    ):
        assert words in refused(capsys, "--iterations", 1, "--out", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_disk_that_is_too_small_is_known_before_training(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * 2**20))
    message = refused(capsys, "--iterations", 1, "--out", tmp_path / "a")
    assert "needs about" in message and "0.01 are free" in message


def test_a_disk_that_fills_up_costs_one_sentence(capsys, copy):
    """Files may have 5 MB at most here: the third checkpoint cannot be written, the second stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 2**20, hard))
    try:
        message = refused(capsys, "--iterations", 3, "--resume", copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint-3 cannot be written" in message and "go on with --resume" in message
    assert [path.name for path in checkpoint.checkpoints(copy)] == ["checkpoint-2"]


def test_a_picture_that_fails_costs_nothing_else(capsys, copy, monkeypatch):
    def broken(*args):
        raise RuntimeError("no fonts")

    (copy / "curves.png").unlink()
    monkeypatch.setattr(report, "tree", broken)
    train_image.main([*SMALL.split(), "--iterations", "3", "--resume", str(copy)])
    said = capsys.readouterr()
    assert "warning: broken was not drawn (RuntimeError: no fonts)" in said.err
    assert json.loads(said.out.splitlines()[-1])["iterations"] == 3
    assert (copy / "curves.png").exists() and (copy / "model/model_index.json").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("disk"), SafetensorError("disk")])
def test_what_cannot_be_written_leaves_the_old_one_and_no_part(tmp_path, error):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_text("old")
    with pytest.raises(ValueError, match="model cannot be written"), disk.replacing(tmp_path / "model") as unfinished:
        unfinished.mkdir()
        raise error
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["model", "model/weights"]


def test_a_folder_is_replaced_whole_and_a_link_without_its_target(tmp_path, monkeypatch):
    """A kill while the old one is deleted finds the new one under its name."""
    names = []
    monkeypatch.setattr(
        disk, "remove", lambda path, remove=disk.remove: (names.append(os.listdir(model)), remove(path))
    )
    (old := tmp_path / "old").mkdir()
    (old / "a").write_text("")
    (model := tmp_path / "model").symlink_to(old)
    for name in ("b", "c"):
        with disk.replacing(model) as unfinished:
            unfinished.mkdir()
            (unfinished / name).write_text("")
    assert names[-1] == ["c"] and not model.is_symlink() and os.listdir(old) == ["a"]


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    accelerator = SimpleNamespace(is_main_process=True)
    with pytest.raises(ValueError, match="metrics.jsonl cannot be written"):
        checkpoint.Log(SimpleNamespace(out=tmp_path, accelerator=accelerator, history=[]))


def test_pictures_of_before_that_are_lost_cost_only_theirs(capsys, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "curves", lambda *args: drawn.append("curves"))
    monkeypatch.setattr(report, "tree", lambda *args: drawn.append("tree"))
    save_file({"other": torch.zeros(1)}, tmp_path / "before.safetensors")
    report.write(SimpleNamespace(out=tmp_path, iteration=0, history=[]))
    assert "compare was not drawn (KeyError" in capsys.readouterr().err and drawn == ["curves", "tree"]


def test_titles_are_drawn_literally(tmp_path):
    """ "$$" is mathematics to matplotlib, and "$DOG$" italics."""
    pictures = torch.rand(2, 3, 32, 64)
    report.before_after(pictures, pictures, ['red "CA$$H"', 'blue "$DOG$"'], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_sigterm_ends_with_a_checkpoint_and_one_line(tmp_path, finished):
    """Clusters send it before they kill; the run goes on to the same rows."""
    out = tmp_path / "a"
    command = [sys.executable, HERE / "train_image.py", *SMALL.replace("--save-every 1", "--save-every 99").split()]
    command += ["--iterations", "3", "--out", out]
    process = subprocess.Popen([str(c) for c in command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the run was over before the signal came")
    assert process.returncode == 143 and "is the newest checkpoint: the same flags with --resume" in err
    train_image.main(
        [*SMALL.replace("--save-every 1", "--save-every 99").split(), "--iterations", "3", "--resume", str(out)]
    )
    assert rows(out) == rows(finished)


# ---------------------------------------------------------------------------------------- extended, exported, compared
def test_a_finished_run_can_be_extended_and_an_older_checkpoint_exported(capsys, finished, tmp_path):
    out = tmp_path / "a"
    shutil.copytree(finished, out)
    assert run(capsys, "--iterations", 4, "--resume", out)["iterations"] == 4
    assert [row["iteration"] for row in rows(out)] == [0, 1, 2, 3, 4] and rows(out)[:3] == rows(finished)[:3]

    # The weights of checkpoint-3, as its file has them, are in the model.
    assert run(capsys, "--iterations", 3, "--resume", out)["iterations"] == 3
    kept = torch_file(out / "checkpoint-3/trainable.safetensors")
    exported = torch_file(out / "model/transformer/diffusion_pytorch_model.safetensors")
    assert kept.keys() == exported.keys() and all(torch.equal(kept[name], exported[name]) for name in kept)


def torch_file(path: Path) -> dict:
    """The tensors of a safetensors file."""
    from safetensors.torch import load_file

    return load_file(path)


def test_a_base_model_that_changed_in_place_is_noticed(capsys, tmp_path):
    """The path is the same, the weights are not: the run would go on from another beginning."""
    model, out = tmp_path / "model", tmp_path / "a"
    shutil.copytree(HERE / "tiny/flux", model)
    run(capsys, "--model", model, "--iterations", 1, "--out", out)
    policy = FluxPolicy.load(str(model), 32, 64)
    policy.transformer.proj_out.weight.data[0, 0] += 1
    policy.save(model)
    assert "are not those that the run began with" in refused(
        capsys, "--model", model, "--iterations", 1, "--resume", out
    )


def test_a_project_that_was_moved_knows_its_own_files(monkeypatch, tmp_path):
    here = HERE / "tiny/flux"
    assert checkpoint.same_place(str(here)) == "PROJECT/tiny/flux" == checkpoint.same_place(os.path.relpath(here))
    assert checkpoint.same_place("black-forest-labs/FLUX.1-dev") == "black-forest-labs/FLUX.1-dev"
    assert checkpoint.same_place(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    "file, text, words",
    [
        ("model_index.json", "[]", "model_index.json is that of no diffusers pipeline"),
        ("model_index.json", "{}", "model_index.json is that of no diffusers pipeline"),
        ("transformer/config.json", "{", "transformer/config.json is damaged"),
        ("transformer/config.json", "[]", "transformer/config.json is damaged"),
        ("text_encoder/config.json", "[]", "cannot be loaded"),
        ("tokenizer/tokenizer_config.json", "{", "cannot be loaded"),
        ("vae/diffusion_pytorch_model.safetensors", "short", "cannot be loaded"),
    ],
)
def test_a_damaged_model_is_named(capsys, tmp_path, file, text, words):
    shutil.copytree(HERE / "tiny/flux", tmp_path / "flux")
    (tmp_path / "flux" / file).write_text(text)
    assert words in refused(capsys, "--iterations", 0, "--model", tmp_path / "flux", "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_a_model_that_lacks_a_weight_is_named(capsys, tmp_path, component):
    """The libraries would draw it at random."""
    shutil.copytree(HERE / "tiny/flux", tmp_path / "flux")
    (file,) = (tmp_path / "flux" / component).glob("*.safetensors")
    weights = load_file(file)
    del weights[max(weights)]
    save_file(weights, file, metadata={"format": "pt"})
    error = refused(capsys, "--iterations", 0, "--model", tmp_path / "flux", "--out", tmp_path / "a")
    assert f"the files of its {component} lack 1 weights" in error or "cannot be loaded" in error


def test_a_cached_encoding_that_is_torn_is_made_again(capsys, tmp_path):
    """Half a file counts as none."""
    flags = ["--iterations", 0, "--text-cache", tmp_path / "text"]
    first = run(capsys, *flags, "--out", tmp_path / "a")
    torn, *_ = (path for path in sorted((tmp_path / "text").iterdir()))
    torn.write_bytes(torn.read_bytes()[:-1])
    assert run(capsys, *flags, "--out", tmp_path / "b")["reward_before"] == first["reward_before"]


def test_a_model_in_bf16_has_one_dtype(capsys, tmp_path):
    """Its files, and a picture from it as the README loads it: float32 beside bf16 could not be multiplied."""
    run(capsys, "--dtype", "bf16", "--iterations", 1, "--out", tmp_path / "a")
    for file in (tmp_path / "a/model").rglob("*.safetensors"):
        assert {value.dtype for value in torch_file(file).values()} == {torch.bfloat16}, file
    pipe = FluxPipeline.from_pretrained(tmp_path / "a/model", dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe('red "CAT"', height=32, width=64, num_inference_steps=2, max_sequence_length=16).images[0]
    assert picture.size == (64, 32)


# ------------------------------------------------------------------------------------------ what is not a number
def test_a_policy_that_is_not_finite_is_never_scored(capsys, tmp_path, monkeypatch):
    """One NaN weight makes black pictures, which would score 0: a whole run could train on them."""
    load = Policy.load.__func__

    def broken(cls, *args, **kwargs):
        policy = load(cls, *args, **kwargs)
        policy.transformer.proj_out.weight.data[0, 0] = torch.nan
        return policy

    monkeypatch.setattr(Policy, "load", classmethod(broken))
    assert "latents are not finite" in refused(capsys, "--iterations", 0, "--out", tmp_path / "a")


def test_a_decoder_that_overflows_is_noticed(capsys, tmp_path, monkeypatch):
    """Clamped to [0, 1], infinity would be a white picture."""
    from policy import in_unit_range

    x = torch.tensor([-3.0, -1.0, 0.0, 0.5, 3.0, torch.inf, -torch.inf, torch.nan])
    assert in_unit_range(x)[:5].tolist() == [0, 0, 0.5, 0.75, 1] and in_unit_range(x)[5:].isnan().all()


def test_ruined_weights_are_not_kept(capsys, copy, monkeypatch):
    """A step that makes a weight infinite leaves the checkpoint before it as the newest."""
    update = loop.update

    def ruin(policy, *args, **kwargs):
        stats = update(policy, *args, **kwargs)
        policy.trainable()[0].data[0] = torch.inf
        return stats

    monkeypatch.setattr(loop, "update", ruin)
    monkeypatch.setattr(loop, "evaluate", lambda run: ({"heldout_reward": 0.0}, torch.zeros(1, 3, 32, 64)))
    assert "a weight is not finite after iteration 3" in refused(capsys, "--iterations", 3, "--resume", copy)
    assert [path.name for path in checkpoint.checkpoints(copy)] == ["checkpoint-2"]


# --------------------------------------------------------------------------------------------------- a user's reward
def scores_of(monkeypatch, *functions):
    """Scores of two white pictures by these rewards, one after the other."""
    for i, function in enumerate(functions):
        monkeypatch.setitem(rewards.REWARDS, f"own{i}", lambda setup, function=function: function)
    mine = {f"own{i}": function for i, function in enumerate(functions)}
    return rewards.score(mine, torch.ones(2, 3, 4, 4), ["a", "b"])


def test_a_reward_cannot_harm_the_next_ones_pictures(monkeypatch):
    def normalises_in_place(pictures, prompts):
        prompts.clear()
        return pictures.sub_(1).mean((1, 2, 3))

    scores = scores_of(
        monkeypatch, normalises_in_place, lambda pictures, prompts: pictures.mean((1, 2, 3)) * len(prompts)
    )
    assert scores["own0"].tolist() == [0, 0] and scores["own1"].tolist() == [2, 2]


@pytest.mark.parametrize(
    "values",
    [[1, 2], (1.0, 2.0), np.array([1.0, 2.0]), torch.tensor([1, 2]), torch.tensor([1.0, 2.0], requires_grad=True)],
)
def test_scores_are_taken_for_what_they_are(monkeypatch, values):
    scores = scores_of(monkeypatch, lambda pictures, prompts: values)["own0"]
    assert scores.tolist() == [1, 2] and scores.dtype == torch.float32 and not scores.requires_grad


def unpacks(pictures, prompts):
    """Fails as users' code does."""
    a, b, c = prompts
    return a


@pytest.mark.parametrize(
    "function, words",
    [
        (unpacks, "the reward 'own0' failed at test_faults.py:"),
        (lambda pictures, prompts: 1.0, "must return 2 finite numbers, got 1.0"),
        (lambda pictures, prompts: torch.zeros(2, 1), "must return 2 finite numbers"),
        (lambda pictures, prompts: torch.zeros(2, dtype=torch.complex64), "values of torch.complex64"),
        (lambda pictures, prompts: ["good", "bad"], "the reward 'own0' failed"),
        (lambda pictures, prompts: None, "the reward 'own0' failed"),
        (lambda pictures, prompts: torch.tensor([1.0, torch.inf]), "must return 2 finite numbers"),
    ],
)
def test_a_reward_that_fails_is_named(monkeypatch, function, words):
    with pytest.raises(rewards.CannotScore) as caught:
        scores_of(monkeypatch, function)
    assert words in str(caught.value)


def test_rewards_that_nobody_asked_for_are_left_out():
    """A single frame has no motion, and a narrow picture no text; asked for, the message names the flag."""
    prompts = ['a red circle moves left "CAT"']
    names, _ = rewards.load_rewards("colour:1", "auto", prompts, torch.ones(1, 1, 3, 32, 32))
    assert "colour" in names and "motion" not in names
    names, _ = rewards.load_rewards("colour:1", "auto", prompts, torch.ones(1, 3, 512, 16))
    assert list(names) == ["colour"]
    with pytest.raises(rewards.CannotScore, match="--watch motion: this reward watches motion"):
        rewards.load_rewards("colour:1", "motion", prompts, torch.ones(1, 1, 3, 32, 32))


# ------------------------------------------------------------------------------------------------ several processes
def test_processes_must_be_started_alike(monkeypatch):
    """Another learning rate or prompt list would train on silently, another --iterations would hang all."""
    args = SimpleNamespace(lr=1e-4, iterations=3, origin={})
    for changed, words in (
        ({"lr": 1e-3}, "--lr 0.001, and the main process 0.0001"),
        ({"prompts": "x"}, "other prompts"),
    ):
        monkeypatch.setattr(launch, "gather_object", lambda own, changed=changed: [own[0], own[0] | changed])
        with pytest.raises(ValueError, match="process 1 was started with") as caught:
            launch.check_same_options(args, ["a"], ["b"])
        assert words in str(caught.value)
    monkeypatch.setattr(launch, "gather_object", lambda own: own * 2)
    launch.check_same_options(args, ["a"], ["b"])


def test_the_environment_does_not_change_a_result(capsys, finished, tmp_path, monkeypatch):
    """accelerate would divide every gradient by it."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    run(capsys, "--iterations", 3, "--out", tmp_path / "a")
    assert rows(tmp_path / "a") == rows(finished)


def test_half_of_torchruns_variables(capsys, tmp_path, monkeypatch):
    """A shell that kept LOCAL_RANK from another program; accelerate's own message is about its internals."""

    def refuses(**options):
        raise ValueError("Error initializing torch.distributed using env:// rendezvous\nmore")

    monkeypatch.setattr(launch, "Accelerator", refuses)
    error = refused(capsys, "--iterations", 0, "--out", tmp_path / "a")
    assert "the processes cannot be set up (Error initializing" in error and "unset RANK" in error


def test_output_that_nobody_reads_costs_one_line(tmp_path, capsys, monkeypatch):
    """As with `| head -1`."""

    def broken(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr(launch, "describe", broken)
    with pytest.raises(SystemExit) as stopped:
        train_image.main([*SMALL.split(), "--iterations", "0", "--out", str(tmp_path / "a")])
    assert stopped.value.code == 141 and "nobody reads the output" in capsys.readouterr().err


def test_ctrl_c_beside_damaged_options_is_one_line(tmp_path):
    (tmp_path / "options.json").write_text("{")
    assert "options.json is damaged" in launch.where_it_stands(SimpleNamespace(out=str(tmp_path)))


def test_a_terminal_in_latin_1(tmp_path):
    """A folder with other letters is printed with escapes, and the run goes on; so with a backend that there is not."""
    command = [sys.executable, HERE / "train_image.py", *SMALL.split(), "--iterations", "0", "--out", tmp_path / "日本"]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1", "MPLBACKEND": "nonsense"}
    done = subprocess.run([str(c) for c in command], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode("latin-1")[-500:]
    assert json.loads(done.stdout.splitlines()[-1])["iterations"] == 0
