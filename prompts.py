"""Prompts: how they are read, and which of them an iteration takes.

1. `read_records`   a file of any kind, or a data set of the hub -> different prompts, with rewards of their own or none
2. `load_prompts`   the prompts to train on, and the held-out ones, which have none in common with them
3. `prompts_at`     an endless stream of the training prompts: each epoch is a new permutation of all of them
4. `drawn_prompts`  the prompts of one iteration; those that teach nothing may give way to others
5. `own_prompts`    those of them that one process takes

What an iteration takes depends on the seed and the iteration's number alone. So a resumed run needs no state of a data
loader, and it goes on where the killed one stopped. (Which prompts taught nothing is kept in checkpoints.)

Processes share an iteration's prompts. Of n = --prompts-per-iteration slots, process r of R takes the slots r, r + R,
r + 2R, ... The loop then cuts each process's list into --updates consecutive pieces (--updates-by prompts). With n = 4,
R = 2 and --updates 2:

    process 0 takes slots 0, 2     first update: slot 0     second update: slot 2
    process 1 takes slots 1, 3     first update: slot 1     second update: slot 3

Together the first update sees the slots 0, 1 and the second 2, 3, as one process does that owns 0, 1, 2, 3. If each
process took a block (0, 1 and 2, 3), the first update would see 0, 2, and the result would depend on R.
"""

import csv
import hashlib
import json
import os
import random
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
from accelerate import Accelerator

# ------------------------------------------------------------------------------------------------------------ reading
CHAT = {"role", "content"}  # the keys of one chat message


def short(text: str, length: int = 60) -> str:
    """A prompt as messages show it: quoted, and cut where it is long."""
    return repr(text if len(text) <= length else text[: length - 3] + "...")


def lines_of(path: Path) -> list[str]:
    """The lines of a text file: its prompts.

    They end as in any editor. str.splitlines would also cut at a form feed or at U+2028, which stand inside texts.
    """
    return path.read_text(encoding="utf-8-sig").split("\n")


def json_of(path: Path) -> list:
    """A list of prompts or records, an object of records by id, or an object of columns; or one value per line.

    Raises:
        ValueError: for any other object: its keys would be taken for prompts.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second value: many files of JSON lines are called .json
            return json_lines_of(path)
        raise
    if isinstance(value, list):
        return value
    entries = list(value.values()) if isinstance(value, dict) else []

    # {"000000": {"prompt": ...}, "000001": {...}}: the records, whatever they are called.
    if entries and all(isinstance(entry, dict) for entry in entries):
        return entries

    # {"prompt": [...], "category": [...]}: one record for each row of the columns.
    if entries and all(isinstance(entry, list) and len(entry) == len(entries[0]) for entry in entries):
        return [dict(zip(value, row)) for row in zip(*entries)]
    raise ValueError("it must hold a list of prompts or of records, an object of records, or one of equal columns")


def json_lines_of(path: Path) -> list:
    """One JSON value per line, blank lines apart."""
    rows = []
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON: {error}") from error
    return rows


def table_of(path: Path) -> list[dict]:
    """A table whose first row names the columns, separated by commas, or in .tsv by tabs.

    Quotes around a cell are not part of it. In a .tsv where they do not close, a quote is a character like any other:
    PartiPrompts.tsv has the prompt "G I G G L E" painted in thick colorful lettering, without quotes around it.

    Raises:
        ValueError: if quotes do not close, a column is named twice, or a row is longer than the first, as where a
            prompt with commas has no quotes around it: its end would be lost.
    """
    if path.suffix.lower() != ".tsv":
        return cells_of(path, delimiter=",")
    try:
        return cells_of(path, delimiter="\t")
    except csv.Error:
        return cells_of(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def cells_of(path: Path, **form) -> list[dict]:
    """The rows of a table in one form; raises csv.Error where quotes do not close, ValueError as `table_of`."""
    rows = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, strict=True, **form)
        names = [name for name in table.fieldnames or () if name]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two of its columns are called {name!r}")
        try:
            for row in table:
                if any(row.get(None, ())):
                    raise ValueError(f"line {table.line_num} has more cells than the first: put text in quotes")
                rows.append(row)
        except csv.Error as error:
            raise csv.Error(f"line {table.reader.line_num}: {error}") from error
    return rows


def columns_for(names: list[str], column: str, reward_column: str | None = None) -> list[str]:
    """The columns of a wide table that `field_of` may look into; others may hold pictures, and are not read.

    Returns:
        Names; none where the column of prompts is not among them.
    """

    def fits(name: str, asked: str | None) -> bool:
        return asked is not None and (name == asked or name.lower() == asked.partition(".")[0].lower())

    has_prompts = any(fits(name, column) for name in names)
    return [name for name in names if has_prompts and (fits(name, column) or fits(name, reward_column))]


def parquet_of(path: Path, column: str, reward_column: str | None = None) -> list[dict]:
    """A parquet table, without the columns that are not asked for."""
    table = pyarrow.parquet.ParquetDataset(path)
    names = columns_for(table.schema.names, column, reward_column)
    return table.read(names).to_pylist() if names else [dict.fromkeys(table.schema.names)]


READERS: dict[str, Callable[[Path], list]] = {  # ending, in any case -> rows: prompts or records
    ".txt": lines_of,
    ".json": json_of,
    ".jsonl": json_lines_of,
    ".csv": table_of,
    ".tsv": table_of,
}
ENDINGS = (*READERS, ".parquet")


def field_of(row: dict, column: str):
    """The field of a record. A dotted column reaches into it: "info.text" of {"info": {"text": "a cat"}} is "a cat".

    Raises:
        KeyError: if there is none of this name. Its case does not count, since some tables are headed "Prompt".
    """
    if column in row:
        return row[column]
    first, _, rest = column.partition(".")
    names = [name for name in row if isinstance(name, str) and name.lower() == first.lower()]
    if len(names) != 1:
        raise KeyError(column)
    value = row[names[0]]
    if not rest:
        return value
    if not isinstance(value, dict):
        raise KeyError(column)
    return field_of(value, rest)


def text_of(value) -> str | None:
    """The prompt in a field: text as it is, of chat messages what the user said last; None where there is nothing.

    Raises:
        ValueError: if the field holds no text: a list of numbers, say, would be trained on as Python prints it.
    """
    if value is None or isinstance(value, str):
        return value

    # [{"role": "system", "content": ...}, {"role": "user", "content": text, or parts of which some are text}]
    if isinstance(value, list) and value and all(isinstance(m, dict) and m.keys() >= CHAT for m in value):
        said = [message["content"] for message in value if message["role"] == "user"]
        if said and isinstance(said[-1], list):
            texts = (part.get("text") for part in said[-1] if isinstance(part, dict))
            return " ".join(text for text in texts if isinstance(text, str))
        return text_of(said[-1]) if said else None
    kinds = {list: "lists", dict: "records", int: "numbers", float: "numbers", bool: "true or false"}
    raise ValueError(f"holds {kinds.get(type(value), type(value).__name__)}, not text")


def reward_text(row, column: str | None) -> str | None:
    """The rewards that a record names for its prompt, as "ocr:1,jpeg:0.1"; None where it has no such field.

    Raises:
        ValueError: if the field holds no text.
    """
    try:
        return (text_of(field_of(row, column)) or "").strip() if column and isinstance(row, dict) else None
    except KeyError:
        return None


def rows_of(path: str, column: str, reward_column: str | None = None) -> list:
    """What a file or a data set of the hub holds: prompts, or records that hold one each.

    Raises:
        ValueError: if its ending is not known; what the libraries raise where its content cannot be read.
    """
    # hub:NAME:SPLIT. NAME holds no colon, and without a second one SPLIT is empty.
    if path.startswith("hub:"):
        name, _, split = path.removeprefix("hub:").partition(":")
        if not name:
            raise ValueError("it must be hub:NAME or hub:NAME:SPLIT")
        table = datasets.load_dataset(name, split=split or "train")
        names = columns_for(table.column_names, column, reward_column)
        return list(table.select_columns(names)) if names else [dict.fromkeys(table.column_names)]

    if not path:
        raise ValueError("its name is empty")
    ending = Path(path).suffix.lower()
    if ending == ".parquet":
        return parquet_of(Path(path), column, reward_column)
    if ending not in READERS:
        raise ValueError("it is a folder" if Path(path).is_dir() else f"its ending is none of {', '.join(ENDINGS)}")
    return READERS[ending](Path(path))


def read_prompts(path: str, flag: str, column: str = "prompt") -> list[str]:
    """The prompts of a file or of a data set of the hub, in their order, without blank ones and repeats.

    Arguments and errors are those of `read_records`.
    """
    return list(dict.fromkeys(prompt for prompt, _ in read_records(path, flag, column)))


def read_records(
    path: str, flag: str, column: str = "prompt", reward_column: str | None = None
) -> list[tuple[str, str | None]]:
    """Prompts and their own rewards, of a file or of a data set of the hub, in their order.

    Args:
        path: one of
            .txt, one prompt per line;
            .json, a list of prompts or of records, as HPDv2 has them, an object of records, or one of columns;
            .jsonl, one prompt or record per line; .csv, .tsv and .parquet, a table;
            hub:NAME or hub:NAME:SPLIT, a data set of the hub, by default its split `train`.
        flag: the flag that named the path, for errors.
        column: the field of a record, or the column of a table, that holds the prompt; dotted, one inside it.
        reward_column: likewise, the field that holds the prompt's own rewards; None asks for none.

    Returns:
        Pairs, without blank prompts and repeats: the prompt, and the text of its rewards, None where it has no such
        field. A prompt stands twice only where it has two different texts.

    Raises:
        ValueError: one sentence, if the path is missing, cannot be read, lacks the column or holds no prompt.
    """
    try:
        rows = rows_of(path, column, reward_column)
    except (OSError, ValueError, RuntimeError, csv.Error, datasets.exceptions.DatasetsError) as error:
        reason = textwrap.shorten(str(error), 300) or type(error).__name__
        raise ValueError(f"{flag} {path} cannot be read: {reason}") from error

    # A record is asked for its column; the columns that there are help where it has none of this name.
    texts, rewards = [], []
    for row in rows:
        try:
            texts.append(text_of(field_of(row, column) if isinstance(row, dict) else row))
        except KeyError as error:
            names = ", ".join(str(name) for name in row)
            raise ValueError(
                f"{flag} {path} has no column {column!r}, only {names}: name one with --prompt-column"
            ) from error
        except ValueError as error:
            if not isinstance(row, dict):
                raise ValueError(f"{flag} {path} {error}") from error
            message = f"{flag} {path}: the column {column!r} {error}; name another with --prompt-column"
            raise ValueError(message) from error
        try:
            rewards.append(reward_text(row, reward_column))
        except ValueError as error:
            raise ValueError(f"{flag} {path}: the column {reward_column!r} {error} such as 'ocr:1'") from error

    # Spaces at the ends do not count. A dictionary keeps the first of equal prompts, and the order: "a ", "", "b", "a"
    # become "a", "b". A repeat would be drawn twice per epoch, and could be trained on and held out at once.
    pairs = ((text.strip(), reward) for text, reward in zip(texts, rewards) if text is not None)
    records = list(dict.fromkeys(pair for pair in pairs if pair[0]))
    if not records:
        raise ValueError(f"{flag} {path} holds no prompt")

    # UTF-16 read as UTF-8 has a zero beside every letter, and JSON can hold half of a character, "\\ud83d" alone, that
    # no tokenizer takes.
    for prompt, _ in records:
        if re.search("[\0\ud800-\udfff]", prompt):
            raise ValueError(f"{flag} {path}: the prompt {short(prompt)} is no UTF-8 text")
    return records


def rewards_of(args, records: list[tuple[str, str | None]]) -> dict[str, str] | None:
    """With --reward-column: prompt -> the text of its rewards, "" where those of --reward serve. Else None.

    Args:
        args: the flags --reward-column, --prompts and --eval-prompts.
        records: of all files together, see `read_records`.

    Raises:
        ValueError: if no record has such a field, or a prompt has two different ones: which would count?
    """
    if args.reward_column is None:
        return None

    # A name that is misspelt, or a file of plain prompts, would train silently with --reward alone.
    paths = [path for path in (args.prompts, args.eval_prompts) if path]
    files = " or ".join(paths) or "the embedded prompts"
    if all(text is None for _, text in records):
        rows = [row for path in paths for row in rows_of(path, args.prompt_column) if isinstance(row, dict)]
        fields = ", ".join(dict.fromkeys(str(name) for row in rows for name in row))
        needed = 'it takes a file of records, such as {"prompt": ..., "rewards": "ocr:1"} in .jsonl'
        needed = f"only {fields}" if fields else needed
        raise ValueError(f"--reward-column {args.reward_column}: nothing in {files} has this field; {needed}")

    # Without the field or with an empty one, a prompt takes --reward: "" stands for either.
    rewards = {}
    for prompt, text in records:
        first = rewards.setdefault(prompt, text or "")
        if first != (text or ""):
            sets = f"{first or 'none'} and {text or 'none'}"
            raise ValueError(f"--reward-column: the prompt {short(prompt)} of {files} has two sets of rewards, {sets}")
    return rewards


def load_prompts(args, train: str, heldout: str) -> tuple[list[str], list[str]]:
    """The prompts to train on and the held-out ones. With --plan both are empty: arithmetic needs none.

    With --reward-column, `args.prompt_rewards` becomes what `rewards_of` returns, without it None.

    Args:
        args: the flags --prompts, --eval-prompts, --prompt-column, --reward-column, --iterations and --plan.
        train, heldout: the embedded files; they serve where --prompts is not given.

    Raises:
        ValueError: if a file cannot be used, or no prompt is left to train on.
    """
    if args.plan:
        return [], []
    own = args.prompts is not None  # "" is what an unset variable of the shell leaves: no wish for the embedded ones
    columns = args.prompt_column, args.reward_column
    records = read_records(args.prompts if own else str(train), "--prompts", *columns)
    prompts = list(dict.fromkeys(prompt for prompt, _ in records))

    # Held-out prompts of their own: those of --eval-prompts, or the embedded ones beside the embedded training prompts.
    if args.eval_prompts is not None or not own:
        path = str(heldout) if args.eval_prompts is None else args.eval_prompts
        held_records = read_records(path, "--eval-prompts", *columns)
        held_out = list(dict.fromkeys(prompt for prompt, _ in held_records))
        records = records + held_records

    # Else a tenth of --prompts is held out, at least one. It is drawn at random, because a file may be sorted, and
    # always with the same seed, so that runs with different seeds are judged by the same prompts.
    else:
        n = max(1, len(prompts) // 10)
        shuffled = random.Random(0).sample(prompts, len(prompts))
        prompts, held_out = shuffled[:-n], shuffled[-n:]
    if not prompts:
        raise ValueError(f"--prompts {args.prompts} needs at least two prompts, or --eval-prompts beside it")
    args.prompt_rewards = rewards_of(args, records)

    # A held-out prompt that is trained on would measure memory, so it leaves training. Without training, let it be.
    unseen = set(held_out)
    shared = [prompt for prompt in prompts if prompt in unseen] if args.iterations else []
    if shared:
        prompts = [prompt for prompt in prompts if prompt not in unseen]
        what = f"{len(shared)} of the prompts are also held out, such as {short(shared[0])}"
        if not prompts:
            raise ValueError(f"--eval-prompts: {what}: none is left to train on")
        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            print(f"{what}: they are not trained on, {len(prompts)} are left", file=sys.stderr)
    return prompts, held_out


# ------------------------------------------------------------------------------------------------------------- taking
def digest_of(prompts: list[str], heldout: list[str], rewards: dict[str, str] | None = None) -> str:
    """A hash of all prompts in their order, and of their own rewards, by which other ones under the same name are
    noticed.
    """
    text = "\n".join([*prompts, "", *heldout])
    if rewards:
        text += "\n\n" + "\n".join(rewards[prompt] for prompt in (*prompts, *heldout))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def prompts_at(prompts: list[str], seed: int, first: int, n: int) -> list[str]:
    """Entries first .. first + n - 1 of the endless stream of prompts.

    Entry i stands in epoch i // size at place i % size, and each epoch is a permutation of all `size` prompts of its
    own. With 3 prompts, entries 0 .. 7 may be b c a, c b a, a b: the entries 2 .. 4 are a c b, across two epochs.
    """
    size = len(prompts)

    # Only the epochs that these entries touch. A generator is keyed by seed and epoch, so that any epoch can be made
    # without those before it. The 2 keeps it apart from the seed's other generators: 1 in schedules.py, 3 in loop.py.
    epochs = range(first // size, (first + n - 1) // size + 1)
    order = {e: np.random.default_rng([seed, e, 2]).permutation(size) for e in epochs}  # each (size,)

    return [prompts[order[i // size][i % size]] for i in range(first, first + n)]


def drawn_prompts(args, prompts: list[str], iteration: int, silent: dict[str, int]) -> list[str]:
    """The prompts of an iteration, of all processes.

    A prompt whose leaves all scored alike in its last two visits is silent: it taught nothing, and will hardly do so
    next time. With --silent-prompts F below 1 it keeps its place with probability F only. Else another one takes it,
    drawn from those that are not silent. The floor F is there because the policy changes: what was always solved, or
    never, may come to teach something.

    Args:
        args: the flags --prompts-per-iteration (n, over all processes), --seed and --silent-prompts.
        prompts: all training prompts.
        iteration: from 0. Iteration 3 with n = 4 takes the entries 12 .. 15 of the stream.
        silent: prompt -> its visits without spread since the last one that had some; see `count_silent`.
    """
    n = args.prompts_per_iteration
    taken = prompts_at(prompts, args.seed, iteration * n, n)
    if args.silent_prompts == 1:
        return taken

    # The 5 keeps this generator apart from the seed's others. The draw is made for every slot, so that one slot's
    # fortune does not move the next one's.
    rng, speaking = np.random.default_rng([args.seed, iteration, 5]), [p for p in prompts if silent.get(p, 0) < 2]
    for slot, (chance, other) in enumerate(zip(rng.random(n), rng.integers(max(1, len(speaking)), size=n))):
        if silent.get(taken[slot], 0) >= 2 and chance >= args.silent_prompts and speaking:
            taken[slot] = speaking[other]
    return taken


def count_silent(silent: dict[str, int], prompts: list[str], spreads: list[bool]) -> None:
    """Count, in place, the visits without spread of an iteration's prompts; one that has spread starts again at 0."""
    for prompt, spread in zip(prompts, spreads):
        if spread:
            silent.pop(prompt, None)
        else:
            silent[prompt] = silent.get(prompt, 0) + 1


def own_prompts(accelerator: Accelerator, drawn: list[str]) -> list[str]:
    """Those of an iteration's prompts that this process owns; the module's example says why these.

    Returns:
        n / R prompts, for n prompts and R processes.
    """
    return drawn[accelerator.process_index :: accelerator.num_processes]
