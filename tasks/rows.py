"""Reads rows, dicts of columns: from the hub, from a local copy of a hub's set, from a file."""

import json
import logging
import os
from pathlib import Path

from engine.errors import UserError

# What a function raises that reads a row whose columns are not there, or not of the expected types.
MALFORMED = (AttributeError, IndexError, KeyError, TypeError)


def load_rows(name, hub_id, config, split, root=None):
    """Yields the rows of a hub's data set.

    name, hub_id: its name here and on the hub; config, split: as the hub calls them; root: a folder
    with local copies, each in a folder of that name or id (default: $DATA_DIR). A copy is used
    where there is one. Raises UserError when the set can't be had.
    """
    root = root or os.environ.get("DATA_DIR")
    if root and not Path(root).is_dir():
        raise UserError(f"--data-root {root} (or DATA_DIR): there is no such folder")
    copies = [Path(root) / folder for folder in (name, hub_id)] if root else []
    copy = next((path for path in copies if path.is_dir()), None)
    if copy:
        yield from folder_rows(copy, config, split)
    else:
        yield from hub_rows(hub_id, config, split)


def hub_rows(hub_id, config, split):
    """Yields the rows of a data set of the hub. Raises UserError when the hub doesn't give it."""
    try:
        yield from dataset_rows(hub_id, config, split, streaming=False)
    except Exception as error:
        raise UserError(
            f"{hub_id} cannot be loaded ({brief(error)}); without a network: run `hf download "
            f"{hub_id} --repo-type dataset --local-dir FOLDER/{hub_id}` on a machine that has one, "
            "copy FOLDER here and give --data-root FOLDER (or set DATA_DIR)"
        ) from None


def folder_rows(path, config, split):
    """Yields the rows of a folder that looks like a data set of the hub. Raises UserError."""
    try:
        # Without streaming, datasets caches a folder by its file names, and finds it there again
        # after the files have changed.
        yield from dataset_rows(str(path), config, split, streaming=True)
    except Exception as error:
        raise UserError(f"{path}: config {config}, split {split}: {brief(error)}") from None


def dataset_rows(path, config, split, streaming):
    """Yields the rows that datasets.load_dataset finds. Raises what datasets raises."""
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs a line for each retry
    rows = datasets.load_dataset(path, config, split=split, streaming=streaming)
    for batch in rows.with_format("arrow").iter(10_000):  # ten times as fast as row by row
        yield from batch.to_pylist()


def local_rows(path, split):
    """Yields the rows of a .jsonl, .json or .parquet file, or of a folder that datasets reads.

    split: which split of a folder, where it has several. Raises UserError for anything else.
    """
    path = Path(path)
    readers = {".jsonl": jsonl_rows, ".json": json_rows, ".parquet": parquet_rows}
    try:
        if path.is_dir():
            yield from any_folder_rows(path, split)
        elif path.suffix in readers:
            yield from readers[path.suffix](path)
        else:
            raise ValueError("not a .jsonl, .json or .parquet file and not a folder")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be read as a data set: {brief(error)}") from None


def any_folder_rows(path, split):
    """Yields the rows of a folder whose config and splits are not known."""
    import datasets

    configs = datasets.get_dataset_config_names(str(path))
    usual = [config for config in ("default", "all", "main", "en") if config in configs]
    config = [*usual, *configs][0]
    splits = datasets.get_dataset_split_names(str(path), config)
    if len(splits) == 1:  # it is the data, whatever it is called
        split = splits[0]
    yield from folder_rows(path, config, split)


def jsonl_rows(path):
    """The rows of a file with one JSON object a line."""
    lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would split at U+2028 too
    return all_dicts([json.loads(line) for line in lines if line.strip()])


def json_rows(path):
    """The rows of a file that is one JSON list of objects."""
    return all_dicts(json.loads(path.read_text(encoding="utf-8")))


def parquet_rows(path):
    """Yields the rows of a parquet file."""
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def all_dicts(rows):
    """The rows. Raises ValueError unless they are a list of dicts."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("not a list of objects")
    return rows


def brief(error):
    """The message of an exception on one line, at most 200 characters of it."""
    return " ".join(str(error).split())[:200]


def used_counts(counts, label, columns, hint=""):
    """The counts without the reasons that never came up.

    counts: dict reason -> rows, with "rows" and "kept"; label, columns, hint: for the message, what
    was read, the columns of its first row, what to do. Raises UserError when no row was kept.
    """
    used = {reason: n for reason, n in counts.items() if n or reason in ("rows", "kept")}
    if not counts["kept"]:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in used.items())
        names = ", ".join(columns)
        raise UserError(f"{label}: no usable row ({reasons}); the columns are: {names}{hint}")
    return used
