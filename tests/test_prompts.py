"""Prompts: every kind of file that people have, what is taken from it, and what is refused in one sentence."""

import json
import time
from types import SimpleNamespace

import datasets
import pyarrow.parquet
import pytest

import rewards
from prompts import digest_of, load_prompts, parquet_of, read_prompts

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
    elif kind == "tsv":
        table.to_csv(path, sep="\t")
    else:
        getattr(table, f"to_{kind}")(path)
    return str(path)


def asked(prompts, eval_prompts=None, iterations=1):
    """Options of --prompts and --eval-prompts."""
    files = {"prompts": str(prompts), "eval_prompts": eval_prompts and str(eval_prompts)}
    return SimpleNamespace(**files, prompt_column="prompt", reward_column=None, plan=None, iterations=iterations)


@pytest.mark.parametrize("kind", ["txt", "json", "jsonl", "csv", "tsv", "parquet"])
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
    args = asked(path)
    prompts, heldout = load_prompts(args, "", "")
    assert {p[0] for p in heldout} == set("abcd") and len(heldout) == 20 and not set(prompts) & set(heldout)
    assert (prompts, heldout) == load_prompts(args, "", "")  # always the same


def test_a_hundred_thousand_prompts(tmp_path):
    path, began = tmp_path / "many.txt", time.perf_counter()
    path.write_text("\n".join(f"prompt {i % 100_000}" for i in range(150_000)))
    args = asked(path)
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


# ----------------------------------------------------------------------------------------------- files that people have
CHAT = [{"role": "system", "content": "Describe."}, {"role": "user", "content": 'red "CAT"'}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": 'red "CAT"'}, {"type": "image"}]}]
FILES = {  # what it is -> name, content, column, its prompts
    "a table with tabs": (
        "a.tsv",
        "Prompt\tCategory\nA red car\tVehicles\nA blue cup\tFood\n",
        "Prompt",
        ["A red car", "A blue cup"],
    ),
    "a heading in another case": ("a.csv", "Prompt,n\nA red car,1\n", "prompt", ["A red car"]),
    "commas and lines in a cell": ("a.csv", 'prompt,n\n"a, b\nc",1\n', "prompt", ["a, b\nc"]),
    "an ending in capitals": ("A.TXT", "a cat\n", "prompt", ["a cat"]),
    "records by their id": ("a.json", '{"0": {"prompt": "a"}, "1": {"prompt": "b"}}', "prompt", ["a", "b"]),
    "columns": ("a.json", '{"prompt": ["a", "b"], "n": [1, 2]}', "prompt", ["a", "b"]),
    "chat messages": ("a.jsonl", json.dumps({"prompt": CHAT}), "prompt", ['red "CAT"']),
    "chat messages in parts": ("a.jsonl", json.dumps({"prompt": PARTS}), "prompt", ['red "CAT"']),
    "a column inside a column": ("a.jsonl", '{"extra_info": {"raw_prompt": "a"}}', "extra_info.raw_prompt", ["a"]),
    "a column with a dot in its name": ("a.jsonl", '{"a.b": "c"}', "a.b", ["c"]),
    "a folder with brackets": ("run[v2]/a.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"}\n', "prompt", ["a", "b"]),
    "brackets around a table": ("run[v2]/a.csv", "prompt\na\n", "prompt", ["a"]),
    "a byte-order mark": ("a.txt", "\ufeffa cat\n", "prompt", ["a cat"]),
    "a byte-order mark before a heading": ("a.csv", "\ufeffprompt\na cat\n", "prompt", ["a cat"]),
    "a byte-order mark before JSON": ("a.json", '\ufeff["a cat"]', "prompt", ["a cat"]),
    "lines that end as on Windows": ("a.txt", "a cat\r\na dog\r\n", "prompt", ["a cat", "a dog"]),
    "JSON lines in a file called .json": ("a.json", '{"prompt": "a"}\n{"prompt": "b"}\n', "prompt", ["a", "b"]),
    "prompts, one per line of JSON": ("a.jsonl", '"a"\n"b"\n', "prompt", ["a", "b"]),
    "separators inside a line": ("a.txt", "a\u2028b\x0cc\x85d\ne\n", "prompt", ["a\u2028b\x0cc\x85d", "e"]),
    "separators inside JSON": ("a.jsonl", '{"prompt": "a\u2028b"}\n', "prompt", ["a\u2028b"]),
    "quotes that a table with tabs does not close": (  # as PartiPrompts.tsv
        "a.tsv",
        'Prompt\tNote\n"OPEN" on a sign\tText\na 12" pizza\t\n"half\t\n',
        "prompt",
        ['"OPEN" on a sign', 'a 12" pizza', '"half'],
    ),
    "quotes around a cell with tabs": ("a.tsv", 'n\tprompt\n1\t"a ""b""\tc"\n', "prompt", ['a "b"\tc']),
    "empty cells beyond the heading": ("a.csv", "prompt,n\na,1,,\n", "prompt", ["a"]),
    "cells that are empty": ("a.csv", "prompt,n\n,1\na,2\n", "prompt", ["a"]),
}
REFUSED = {  # what it is -> name, content, column, words of the one sentence
    "an unknown ending": (
        "a.yaml",
        "- a cat\n",
        "prompt",
        "its ending is none of .txt, .json, .jsonl, .csv, .tsv, .parquet",
    ),
    "no ending": ("prompts", "a cat\n", "prompt", "its ending is none of"),
    "a column of lists": ("a.jsonl", '{"prompt": ["a", "b"]}', "prompt", "the column 'prompt' holds lists, not text"),
    "a column of records": ("a.jsonl", '{"prompt": {"en": "a"}}', "prompt", "holds records, not text"),
    "a column of numbers": ("a.jsonl", '{"prompt": 3}', "prompt", "holds numbers, not text"),
    "no such column": ("a.csv", "text,n\na,1\n", "prompt", "has no column 'prompt', only text, n: name one"),
    "no such column inside": ("a.jsonl", '{"info": {"x": 1}}', "info.text", "no column 'info.text', only info"),
    "an object of neither": ("a.json", '{"prompt": "a cat"}', "prompt", "a list of prompts or of records"),
    "columns of unequal length": ("a.json", '{"prompt": ["a"], "n": []}', "prompt", "a list of prompts or of records"),
    "a broken line": ("a.jsonl", '{"prompt": "a"}\n{"prompt"\n', "prompt", "line 2 is no JSON"),
    "another encoding": ("a.txt", b"caf\xe9\n", "prompt", "cannot be read: 'utf-8' codec"),
    "a prompt with commas without quotes": ("a.csv", "prompt\na\na cat, asleep\n", "prompt", "line 3 has more cells"),
    "a quote that does not close": ("a.csv", 'prompt,n\n"a,1\nb,2\n', "prompt", "line 3: unexpected end of data"),
    "quotes around half a cell": ("a.csv", 'prompt,n\n"OPEN" sign,1\n', "prompt", "line 2: ',' expected after '\"'"),
    "a column named twice": ("a.csv", "prompt,prompt\na,b\n", "prompt", "two of its columns are called 'prompt'"),
    "UTF-16 without a mark": ("a.txt", "a cat\n".encode("utf-16-le"), "prompt", "is no UTF-8 text"),
    "half a character": ("a.json", '["a \\ud83d"]', "prompt", "the prompt 'a \\ud83d' is no UTF-8 text"),
    "a list of numbers": ("a.json", "[1, 2]", "prompt", "a.json holds numbers, not text"),
    "a list in a line": ("a.jsonl", '["a", "b"]\n', "prompt", "a.jsonl holds lists, not text"),
    "a message without text": (
        "a.jsonl",
        json.dumps({"prompt": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}),
        "prompt",
        "holds no prompt",
    ),
    "a folder of prompts": ("prompts/b", "a cat\n", "prompt", "cannot be read: it is a folder"),
    "a folder": ("a.txt/b", "", "prompt", "cannot be read"),
}


def saved(folder, name: str, content) -> str:
    """A file of this content; of name "a.txt/b" or "prompts/b" the folder."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path.parent if path.name == "b" else path)


@pytest.mark.parametrize("name, content, column, wanted", FILES.values(), ids=FILES)
def test_files_that_people_have(tmp_path, name, content, column, wanted):
    assert read_prompts(saved(tmp_path, name, content), "--prompts", column) == wanted


@pytest.mark.parametrize("name, content, column, words", REFUSED.values(), ids=REFUSED)
def test_files_that_are_refused(tmp_path, name, content, column, words):
    """In one sentence that names the flag and the file."""
    path = saved(tmp_path, name, content)
    with pytest.raises(ValueError) as caught:
        read_prompts(path, "--eval-prompts", column)
    assert words in str(caught.value) and f"--eval-prompts {path}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_a_wide_table_only_the_column_is_read(tmp_path):
    """As Pick-a-Pic, whose files hold pictures; a heading in another case, a dot in a name, a column inside another."""
    path = tmp_path / "a.parquet"
    columns = {"Prompt": ["a", None, "b"], "a.b": ["c"] * 3, "info": [{"text": "d"}] * 3, "jpg": [b"\xff"] * 3}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    for column, wanted in (("prompt", ["a", "b"]), ("a.b", ["c"]), ("info.text", ["d"])):
        assert read_prompts(str(path), "--prompts", column) == wanted
        assert [len(row) for row in parquet_of(path, column)] == [1, 1, 1]
    for column, words in (("jpg", "'jpg' holds bytes, not text"), ("text", "only Prompt, a.b, info, jpg: name one")):
        with pytest.raises(ValueError, match=words):
            read_prompts(str(path), "--prompts", column)


def test_a_data_set_of_the_hub_with_a_heading_in_another_case(monkeypatch):
    """Only its first prompt was read."""
    table = datasets.Dataset.from_dict({"Prompt": PROMPTS, "a.b": WANTED + ["x", "y"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    assert read_prompts("hub:a/b", "--prompts") == WANTED
    assert read_prompts("hub:a/b", "--prompts", "a.b") == [*WANTED, "x", "y"]
    with pytest.raises(ValueError, match="no column 'text', only Prompt, a.b"):
        read_prompts("hub:a/b", "--prompts", "text")


@pytest.mark.parametrize("name", ["hub:", "hub::train"])
def test_a_data_set_without_a_name(name):
    with pytest.raises(ValueError, match=f"--prompts {name} cannot be read: it must be hub:NAME"):
        read_prompts(name, "--prompts")


def test_a_flag_left_empty_is_not_replaced_by_the_embedded_prompts(tmp_path):
    """As --prompts "$FILE" leaves it where FILE is not set."""
    path = saved(tmp_path, "a.txt", "a\nb\n")
    for prompts, eval_prompts, flag in (("", None, "--prompts"), (path, "", "--eval-prompts")):
        args = SimpleNamespace(**vars(asked(prompts)) | {"eval_prompts": eval_prompts})
        with pytest.raises(ValueError, match=f"{flag}  cannot be read: its name is empty"):
            load_prompts(args, path, path)


def test_a_byte_order_mark_hides_no_shared_prompt(tmp_path, capsys):
    """With the mark in it, red "CAT" would be trained on and held out unnoticed."""
    train = saved(tmp_path, "a.txt", '\ufeffred "CAT"\nblue "DOG"\n')
    heldout = saved(tmp_path, "b.txt", 'red "CAT"\n')
    assert load_prompts(asked(train, heldout), "", "") == (['blue "DOG"'], ['red "CAT"'])
    assert "1 of the prompts are also held out" in capsys.readouterr().err


def test_held_out_prompts_leave_training(tmp_path, capsys):
    """With a note, in which a long prompt is cut; where none is left, an error; without training, nothing to check."""
    long = "a " * 500 + "cat"
    train, heldout = saved(tmp_path, "a.txt", f"{long}\na dog\n"), saved(tmp_path, "b.txt", f"{long}\n")
    assert load_prompts(asked(train, heldout), "", "") == (["a dog"], [long])
    note = capsys.readouterr().err
    assert "they are not trained on, 1 are left" in note and len(note) < 200
    with pytest.raises(ValueError, match="none is left to train on"):
        load_prompts(asked(heldout, heldout), "", "")
    assert load_prompts(asked(heldout, heldout, iterations=0), "", "") == ([long], [long])


# ------------------------------------------------------------------------------------------------ rewards of their own
RECORDS = [
    {"prompt": 'red "CAT"', "rewards": "ocr:1"},
    {"prompt": "a dog", "rewards": " jpeg:1,colour:0.5 "},
    {"prompt": "a cat", "rewards": ""},
    {"prompt": "a cow"},
    {"prompt": 'red "CAT"', "rewards": "ocr:1"},
]


def with_rewards(prompts, eval_prompts=None, column="rewards", **changed):
    """Options of --prompts, --eval-prompts and --reward-column."""
    return SimpleNamespace(**vars(asked(prompts, eval_prompts)) | {"reward_column": column} | changed)


def lines(records) -> str:
    """Records as JSON lines."""
    return "\n".join(map(json.dumps, records))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_prompts_have_rewards_of_their_own(tmp_path, kind):
    """A field of the records. It may be missing or empty, and a plain prompt has none: there --reward serves."""
    path = tmp_path / f"a.{kind}"
    if kind in ("jsonl", "json"):
        path.write_text(lines(RECORDS) if kind == "jsonl" else json.dumps(RECORDS))
    else:
        table = [{"prompt": r["prompt"], "rewards": r.get("rewards"), "jpg": "x"} for r in RECORDS]
        getattr(datasets.Dataset.from_list(table), f"to_{kind}")(path)
    args = with_rewards(path, saved(tmp_path, "b.txt", "a bird\n"))
    prompts, heldout = load_prompts(args, "", "")
    assert (prompts, heldout) == (['red "CAT"', "a dog", "a cat", "a cow"], ["a bird"])
    own = {'red "CAT"': "ocr:1", "a dog": "jpeg:1,colour:0.5", "a cat": "", "a cow": "", "a bird": ""}
    assert args.prompt_rewards == own

    # Without the flag the field is not looked at, and the prompts are the same.
    plain = with_rewards(path, tmp_path / "b.txt", column=None)
    assert load_prompts(plain, "", "") == (prompts, heldout) and plain.prompt_rewards is None


def test_of_a_wide_table_only_prompts_and_their_rewards_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    columns = {"Prompt": ["a", "b"], "Rewards": ["ocr:1", None], "info": [{"r": "jpeg:1"}] * 2, "jpg": [b"\xff"] * 2}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert [list(row) for row in parquet_of(path, "prompt", "rewards")] == [["Prompt", "Rewards"]] * 2
    for column, own in (("rewards", {"a": "ocr:1", "b": ""}), ("info.r", dict.fromkeys("ab", "jpeg:1"))):
        args = with_rewards(path, column=column)
        load_prompts(args, "", "")
        assert args.prompt_rewards == own
    with pytest.raises(ValueError, match="no column 'text', only Prompt, Rewards, info, jpg: name one"):
        load_prompts(with_rewards(path, prompt_column="text"), "", "")


GENEVAL = [  # as its evaluation_metadata.jsonl
    {"tag": "two_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"},
]


def test_prompts_of_geneval(tmp_path):
    """Its records, its plain prompts, and its records with rewards added."""
    wanted = [record["prompt"] for record in GENEVAL]
    assert read_prompts(saved(tmp_path, "evaluation_metadata.jsonl", lines(GENEVAL)), "--prompts") == wanted
    assert read_prompts(saved(tmp_path, "generation_prompts.txt", "\n".join(wanted)), "--prompts") == wanted
    more = [record | {"rewards": "colour:1" if record["tag"] == "colors" else "jpeg:1"} for record in GENEVAL]
    args = with_rewards(saved(tmp_path, "train.jsonl", lines(more)))
    load_prompts(args, "", "")
    assert args.prompt_rewards == dict(zip(wanted, ("jpeg:1", "jpeg:1", "colour:1")))


REFUSED_REWARDS = {  # what it is -> training records, held-out records, words of the one sentence
    "plain prompts": (
        ["a", "b"],
        None,
        "--reward-column rewards: nothing in .*a.jsonl has this field; it takes a file",
    ),
    "no record has it": (
        [{"prompt": "a"}],
        [{"prompt": "b", "text": 1}],
        "nothing in .*a.jsonl or .*b.jsonl has this field; only prompt, text",
    ),
    "a list": ([{"prompt": "a", "rewards": ["ocr"]}], None, "a.jsonl: the column 'rewards' holds lists, not text"),
    "two sets": (
        [{"prompt": "a", "rewards": "ocr:1"}, {"prompt": "a ", "rewards": "jpeg:1"}],
        None,
        "the prompt 'a' of .*a.jsonl has two sets of rewards, ocr:1 and jpeg:1",
    ),
    "one set and none": (
        [{"prompt": "a", "rewards": "ocr:1"}, {"prompt": "b"}],
        ["a"],
        "the prompt 'a' of .* has two sets of rewards, ocr:1 and none",
    ),
}


@pytest.mark.parametrize("train, heldout, words", REFUSED_REWARDS.values(), ids=REFUSED_REWARDS)
def test_rewards_of_prompts_that_are_refused(tmp_path, train, heldout, words):
    path = saved(tmp_path, "a.jsonl", lines([*train, "more"]))
    args = with_rewards(path, heldout and saved(tmp_path, "b.jsonl", lines(heldout)))
    with pytest.raises(ValueError, match=words) as caught:
        load_prompts(args, "", "")
    assert "\n" not in str(caught.value)


def test_the_embedded_prompts_have_no_rewards_of_their_own(tmp_path):
    train, heldout = saved(tmp_path, "a.txt", "a\n"), saved(tmp_path, "b.txt", "b\n")
    args = with_rewards("")
    args.prompts = None
    with pytest.raises(ValueError, match="--reward-column rewards: nothing in the embedded prompts has this field"):
        load_prompts(args, train, heldout)


def test_other_rewards_are_other_prompts():
    """By their hash, which --resume compares; without the flag it is what it was before there was one."""
    plain = digest_of(["a", "b"], ["c"])
    assert plain == digest_of(["a", "b"], ["c"], None)
    assert plain == "e065ac2af3e0fcb06066a74d683ed8a2cdbf0407c710bd7922bdb409ac5778a1"
    texts = [dict(zip("abc", t)) for t in (("ocr", "", ""), ("", "ocr", ""), ("", "", "ocr"), ("ocr:2", "", ""))]
    assert len({plain, *(digest_of(["a", "b"], ["c"], rewards) for rewards in texts)}) == 5


# --------------------------------------------------------------------------------------------------------------- quotes
QUOTES = {
    'red "CAT"': "CAT",
    "A cat holding a sign that says '123'": "123",
    "A shop window with 'OPEN' in red letters": "OPEN",
    "red \u201cCAT\u201d": "CAT",
    "a sign \u2018CAT\u2019": "CAT",
    "un panneau \u00ab CHAT \u00bb": " CHAT ",
    "\u5199\u7740\u300c\u732b\u300d": "\u732b",
    "ein Schild \u201eKATZE\u201c": "KATZE",
    "the dog's sign says 'WOOF'": "WOOF",
    "a sign 'DON'T WALK' here": "DON'T WALK",
    "two signs, 'A' and \"B\"": "A",
}


@pytest.mark.parametrize("prompt, wanted", QUOTES.items())
def test_quotes_of_all_kinds(prompt, wanted):
    assert rewards.quoted_text(prompt) == wanted


@pytest.mark.parametrize(
    "prompt", ["The dog's bowl", "the dogs' bowl and the cats' toys", "a photo", 'blue " "', 'blue ""']
)
def test_an_apostrophe_is_no_quote_and_a_blank_is_no_text(prompt):
    """Refused at the start: a blank text has no length to divide by, in the middle of a run."""
    with pytest.raises(rewards.CannotScore, match="quoted text"):
        rewards.quoted_text(prompt)


def test_a_colour_in_quotes_is_no_colour():
    assert rewards.wanted_colour("a blue \u201cRED\u201d").tolist() == [0, 0, 1]
    assert rewards.wanted_colour("a blue 'RED' sign").tolist() == [0, 0, 1]
