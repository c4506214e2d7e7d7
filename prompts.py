"""Prompts: how they are read, and which of them an iteration takes.

1. `read_prompts`   a file of any kind, or a data set of the hub -> a list of different prompts
2. `load_prompts`   the prompts to train on, and the held-out ones, which have none in common with them
3. `prompts_at`     an endless stream of the training prompts: each epoch is a new permutation of all of them
4. `own_prompts`    the entries of the stream that one process takes in one iteration

What an iteration takes depends on the seed and the iteration's number alone. So a resumed run needs no state of a data
loader, and it goes on where the killed one stopped.

Processes share an iteration's prompts. Of n = --prompts-per-iteration slots, process r of R takes the slots r, r + R,
r + 2R, ... The loop then cuts each process's list into --updates consecutive pieces (--updates-by prompts). With n = 4,
R = 2 and --updates 2:

    process 0 takes slots 0, 2     first update: slot 0     second update: slot 2
    process 1 takes slots 1, 3     first update: slot 1     second update: slot 3

Together the first update sees the slots 0, 1 and the second 2, 3, as one process does that owns 0, 1, 2, 3. If each
process took a block (0, 1 and 2, 3), the first update would see 0, 2, and the result would depend on R.
"""

import json
import random
from pathlib import Path

import datasets
import numpy as np
from accelerate import Accelerator


# ------------------------------------------------------------------------------------------------------------ reading
def column_of(table: datasets.Dataset, column: str) -> list[str]:
    """A column of a data set.

    Raises:
        KeyError: if there is none of this name.
    """
    if column not in table.column_names:
        raise KeyError(column)
    return table[column]


def read_prompts(path: str, flag: str, column: str = "prompt") -> list[str]:
    """The prompts of a file or of a data set of the hub, in their order, without blank ones and repeats.

    Args:
        path: one of
            a text file, with one prompt per line;
            .json, a list of prompts, or of records that hold one each, as HPDv2 has them;
            .jsonl, .csv or .parquet, a table;
            hub:NAME or hub:NAME:SPLIT, a data set of the hub, by default its split `train`.
        flag: the flag that named the path, for errors.
        column: the field of a record, or the column of a table, that holds the prompt.

    Raises:
        ValueError: if the path is missing, cannot be read, lacks the column or holds no prompt.
    """
    try:
        # hub:NAME:SPLIT. NAME holds no colon, and without a second one SPLIT is empty.
        if path.startswith("hub:"):
            name, _, split = path.removeprefix("hub:").partition(":")
            rows = column_of(datasets.load_dataset(name, split=split or "train"), column)

        # A table. The library calls its readers by the ending, but for .jsonl, which its reader "json" takes.
        elif path.endswith((".jsonl", ".csv", ".parquet")):
            ending = path.rsplit(".")[-1]
            reader = {"jsonl": "json"}.get(ending, ending)
            rows = column_of(datasets.load_dataset(reader, data_files=path, split="train"), column)

        # A list of prompts, or of records. The former is no table, so it is read without the library.
        elif path.endswith(".json"):
            rows = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = [row if isinstance(row, str) else row[column] for row in rows]

        else:
            rows = Path(path).read_text(encoding="utf-8").splitlines()

    # KeyError: no such column. TypeError: an entry of the .json is neither a prompt nor a record.
    except (KeyError, TypeError) as error:
        raise ValueError(f"{flag} {path} has no column {column!r}: name it with --prompt-column") from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{flag} {path} cannot be read: {str(error).strip().splitlines()[0]}") from error

    # Spaces at the ends do not count. A dictionary keeps the first of equal prompts, and the order: "a ", "", "b", "a"
    # become "a", "b". A repeat would be drawn twice per epoch, and could be trained on and held out at once.
    prompts = list(dict.fromkeys(filter(None, (str(row).strip() for row in rows if row is not None))))
    if not prompts:
        raise ValueError(f"{flag} {path} holds no prompt")
    return prompts


def load_prompts(args, train: str, heldout: str) -> tuple[list[str], list[str]]:
    """The prompts to train on and the held-out ones. With --plan both are empty: arithmetic needs none.

    Args:
        args: the flags --prompts, --eval-prompts, --prompt-column and --plan.
        train, heldout: the embedded files; they serve where --prompts is not given.

    Raises:
        ValueError: if a file cannot be used, or a prompt stands in both.
    """
    if args.plan:
        return [], []
    prompts = read_prompts(args.prompts or str(train), "--prompts", args.prompt_column)

    # Held-out prompts of their own: those of --eval-prompts, or the embedded ones beside the embedded training prompts.
    if args.eval_prompts or not args.prompts:
        held_out = read_prompts(args.eval_prompts or str(heldout), "--eval-prompts", args.prompt_column)

    # Else a tenth of --prompts is held out, at least one. It is drawn at random, because a file may be sorted, and
    # always with the same seed, so that runs with different seeds are judged by the same prompts.
    else:
        n = max(1, len(prompts) // 10)
        shuffled = random.Random(0).sample(prompts, len(prompts))
        prompts, held_out = shuffled[:-n], shuffled[-n:]
    if not prompts:
        raise ValueError(f"--prompts {args.prompts} needs at least two prompts, or --eval-prompts beside it")

    # A held-out prompt that is trained on would measure memory.
    if shared := set(prompts) & set(held_out):
        raise ValueError(f"{len(shared)} held-out prompts are also trained on, such as {sorted(shared)[0]!r}")
    return prompts, held_out


# ------------------------------------------------------------------------------------------------------------- taking
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


def own_prompts(args, accelerator: Accelerator, prompts: list[str], iteration: int) -> list[str]:
    """The prompts of an iteration that this process owns; the module's example says why these.

    Args:
        args: the flags --prompts-per-iteration (n, over all processes) and --seed.
        prompts: all training prompts.
        iteration: from 0. Iteration 3 with n = 4 takes the entries 12 .. 15 of the stream.

    Returns:
        n / R prompts, for R processes.
    """
    n = args.prompts_per_iteration
    taken = prompts_at(prompts, args.seed, iteration * n, n)
    return taken[accelerator.process_index :: accelerator.num_processes]
