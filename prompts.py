"""Prompts."""

import json
import random
from pathlib import Path

import datasets
import numpy as np
from accelerate import Accelerator


def column_of(table: datasets.Dataset, column: str) -> list[str]:
    """A column of a data set; KeyError if there is none of this name."""
    if column not in table.column_names:
        raise KeyError(column)
    return table[column]


def read_prompts(path: str, flag: str, column: str = "prompt") -> list[str]:
    """Prompts of a file or of a data set on the hub; blank ones and repeats are dropped.

    Args:
        path: a text file, a prompt a line; .json, a list of prompts or of records, as HPDv2's; .jsonl, .csv or .parquet;
            hub:NAME or hub:NAME:SPLIT, by default its split `train`.
        column: of a record, that holds its prompt.

    Raises:
        ValueError: if it is missing, cannot be read, lacks the column or holds no prompt.
    """
    try:
        if path.startswith("hub:"):
            name, _, split = path.removeprefix("hub:").partition(":")
            rows = column_of(datasets.load_dataset(name, split=split or "train"), column)
        elif path.endswith((".jsonl", ".csv", ".parquet")):
            kind = {"jsonl": "json"}.get(path.rsplit(".")[-1], path.rsplit(".")[-1])
            rows = column_of(datasets.load_dataset(kind, data_files=path, split="train"), column)
        elif path.endswith(".json"):
            rows = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = [row if isinstance(row, str) else row[column] for row in rows]
        else:
            rows = Path(path).read_text(encoding="utf-8").splitlines()
    except (KeyError, TypeError) as error:
        raise ValueError(f"{flag} {path} has no column {column!r}: name it with --prompt-column") from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{flag} {path} cannot be read: {str(error).strip().splitlines()[0]}") from error
    prompts = list(dict.fromkeys(filter(None, (str(row).strip() for row in rows if row is not None))))
    if not prompts:
        raise ValueError(f"{flag} {path} holds no prompt")
    return prompts


def load_prompts(args, train: str, heldout: str) -> tuple[list[str], list[str]]:
    """Training and held-out prompts; `train` and `heldout` are the files used where --prompts is not given.

    Raises:
        ValueError: if a file is unusable, or a prompt stands in both.
    """
    if args.plan:  # needs none
        return [], []
    prompts = read_prompts(args.prompts or str(train), "--prompts", args.prompt_column)
    if args.eval_prompts or not args.prompts:
        held = read_prompts(args.eval_prompts or str(heldout), "--eval-prompts", args.prompt_column)
    else:
        n, mixed = max(1, len(prompts) // 10), random.Random(0).sample(prompts, len(prompts))  # files may be sorted
        prompts, held = mixed[:-n], mixed[-n:]
    if not prompts:
        raise ValueError(f"--prompts {args.prompts} needs at least two prompts, or --eval-prompts beside it")
    if shared := set(prompts) & set(held):
        raise ValueError(f"{len(shared)} held-out prompts are also trained on, such as {sorted(shared)[0]!r}")
    return prompts, held


def prompts_at(prompts: list[str], seed: int, first: int, n: int) -> list[str]:
    """Entries first .. first + n - 1 of the endless stream of prompts: each epoch is a new permutation."""
    size = len(prompts)
    epochs = range(first // size, (first + n - 1) // size + 1)
    order = {e: np.random.default_rng([seed, e, 2]).permutation(size) for e in epochs}
    return [prompts[order[i // size][i % size]] for i in range(first, first + n)]


def own_prompts(args, accelerator: Accelerator, prompts: list[str], iteration: int) -> list[str]:
    """Those of an iteration that this process owns: every n-th, so that --updates are alike on any number of processes."""
    n = args.prompts_per_iteration
    return prompts_at(prompts, args.seed, iteration * n, n)[accelerator.process_index :: accelerator.num_processes]
