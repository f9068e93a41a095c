"""Reads rows, dicts of columns: from the hub, from a local copy of a hub's set, from a file.

    file --local_rows--> rows --read_rows--> prompts, and the gold or the response of each

Rows are the work of strangers. A row that can't be used is counted by a reason, and the next one is
read.
"""

import csv
import io
import json
import logging
import os
import re
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from engine.errors import UserError, printable, reason

# -------------------------------------------------------------------------------------------------
# Where rows come from


def load_rows(name, hub_id, config, split, root=None):
    """Yields the rows of a hub's data set.

    name, hub_id: its name here and on the hub; config, split: as the hub calls them; root: a folder
    with local copies, each in a folder of that name or id (default: $DATA_DIR). A copy is used
    where there is one. Raises UserError when the set can't be had.
    """
    root = root or os.environ.get("DATA_DIR")
    if root and not os.path.isdir(root):
        where = printable(str(root))
        raise UserError(f"--data-root {where} (or DATA_DIR): there is no such folder")
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
            f"{hub_id} cannot be loaded ({reason(error)}); without a network: run `hf download "
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
        where = printable(f"{path}: config {config}, split {split}")
        raise UserError(f"{where}: {reason(error)}") from None


def dataset_rows(path, config, split, streaming):
    """Yields the rows that datasets.load_dataset finds. Raises what datasets raises."""
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs a line for each retry
    rows = datasets.load_dataset(path, config, split=split, streaming=streaming)
    for batch in rows.with_format("arrow").iter(10_000):  # ten times as fast as row by row
        yield from batch.to_pylist()


def local_rows(path, split):
    """Yields the rows of a .jsonl, .json, .csv or .parquet file, or of a folder.

    A folder is read as datasets reads it; split: which one, where it has several.
    Raises UserError for anything else.
    """
    path = Path(path)
    readers = {".jsonl": jsonl_rows, ".json": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}
    try:
        if path.is_dir():
            yield from any_folder_rows(path, split)
        elif path.suffix in readers and path.is_file():  # a pipe would be waited for
            yield from readers[path.suffix](path)
        else:
            raise ValueError("not a .jsonl, .json, .csv or .parquet file and not a folder")
    except UserError:
        raise
    except Exception as error:
        where = printable(str(path))
        raise UserError(f"{where} cannot be read as a data set: {reason(error)}") from None


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


def file_text(path):
    """The text of a file in UTF-8 or, by its byte order mark, UTF-16."""
    data = path.read_bytes()
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if utf16 else "utf-8-sig")


def jsonl_rows(path):
    """Yields the rows of a file with one JSON object a line."""
    lines = file_text(path).split("\n")  # splitlines would split at U+2028 too
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield parsed(line, f"line {number}")


def json_rows(path):
    """The rows of a file that is one JSON list of objects."""
    rows = parsed(file_text(path), "the file")
    if not isinstance(rows, list):
        raise ValueError("not a list of objects")
    return rows


def parsed(text, where):
    """The value of a JSON text. Raises ValueError that says where it is, and why it is none."""
    try:
        return json.loads(text, parse_int=whole_number)
    except RecursionError:
        raise ValueError(f"{where}: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def whole_number(digits):
    """The int of a JSON number. Thousands of digits, which Python refuses, stay a text."""
    return int(digits) if len(digits) < 4000 else digits


def csv_rows(path):
    """Yields the rows of a .csv file. Its first line names the columns; an empty cell is null."""
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(io.StringIO(file_text(path), newline=""), strict=True)
    columns = next(lines, [])
    if len(set(columns)) < len(columns):
        raise ValueError("two columns of one name")
    for cells in lines:
        if len(cells) == len(columns):
            yield {column: cell or None for column, cell in zip(columns, cells)}
        elif cells:
            yield cells  # counted as malformed


def parquet_rows(path):
    """Yields the rows of a parquet file."""
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


# -------------------------------------------------------------------------------------------------
# What a row holds


class Malformed(ValueError):
    """Why a row can't be used. Its message is the reason by which the row is counted."""

    def __init__(self, reason):
        super().__init__(f"malformed ({reason})")


# What a function raises that reads a row whose columns are not there, or not of the expected types.
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    IndexError,
    KeyError,
    RecursionError,
    TypeError,
    ValueError,
)


class Row(dict):
    """A row that keeps in `used` which of its columns were read."""

    def __init__(self, columns):
        super().__init__(columns)
        self.used = set()

    def __getitem__(self, column):
        self.used.add(column)
        return super().__getitem__(column)

    def get(self, column, default=None):
        """As of a dict."""
        self.used.add(column)
        return super().get(column, default)

    def unused(self, prompt):
        """The columns that were not read and hold something. One may hold the prompt once more."""
        rest = {column: value for column, value in self.items() if column not in self.used}
        return {c for c, value in rest.items() if not is_empty(value) and value != prompt}


def is_null(value):
    """Whether a column has no value: null, or the NaN that a table makes of it."""
    return value is None or value != value


def is_empty(value):
    """Whether a column holds nothing that one could miss. 0 and False are something."""
    return is_null(value) or value in ("", [], {})


def first(row, *columns):
    """The value of the first of these columns that is not null, or None. 0, False and "" count."""
    held = (column for column in columns if not is_null(dict.get(row, column)))  # not yet `used`
    return next((row[column] for column in held), None)


def unicode(text):
    """The text. Raises Malformed where it holds half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Malformed("text that is not Unicode") from None
    return text


def scalar(value):
    """A text or a number as a text, "" for null. Raises Malformed for any other value."""
    if is_null(value):
        return ""
    if not isinstance(value, (str, int, float, Decimal)):
        raise Malformed("an answer that is not text")
    if value in (float("inf"), -float("inf")):
        raise Malformed("a number that is not finite")
    return unicode(str(value))


# -------------------------------------------------------------------------------------------------
# Prompts: a text, or a chat, which is kept whole

ROLES = ("system", "user", "assistant")
MORE_THAN_TEXT = ("tool_calls", "function_call", "images", "reasoning_content")
# A chat template's own token at the start of a text: <|im_start|>, <s>, [INST].
MARKUP = re.compile(r"\s*(?P<token><[^<>\s]+>|\[[A-Z_]+\])")


def as_prompt(value):
    """A prompt as a dict: "prompt" is its text, and "messages" its turns where there are several.

    value: a text, or a chat, a list of turns with the texts "role" and "content", of which the last
    is the user's. Raises Malformed for anything else.
    """
    if is_empty(value):
        return {"prompt": ""}
    if isinstance(value, list):
        turns = as_turns(value)
        if turns[-1]["role"] != "user":
            raise Malformed("a chat that does not end with the user")
        if not turns[-1]["content"].strip():
            return {"prompt": ""}
        if len(turns) > 1:
            return {"prompt": plain_chat(turns), "messages": turns}
        value = turns[0]["content"]
    if not isinstance(value, str):
        raise Malformed("a prompt that is not text")
    # What a template has rendered ends with a line break that matters.
    return {"prompt": unicode(value if MARKUP.match(value) else value.strip())}


def as_turns(chat):
    """The turns of a chat as dicts of "role" and "content". Raises Malformed."""
    for turn in chat:
        if not isinstance(turn, dict):
            raise Malformed("a prompt that is not text")
        if turn.get("role") not in ROLES:
            raise Malformed("a turn of an unknown role")
        if not isinstance(turn.get("content"), str):
            raise Malformed("a turn that is not text")
        if any(turn.get(part) for part in MORE_THAN_TEXT):
            raise Malformed("a turn with more than text")
    return [{"role": turn["role"], "content": unicode(turn["content"])} for turn in chat]


def plain_chat(turns):
    """A chat where there is no chat template: "User: " and so on, turns apart by an empty line."""
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)


# -------------------------------------------------------------------------------------------------
# All rows, and what came across


@dataclass
class Tally:
    """What came across while rows were read.

    counts: dict reason -> rows, "rows" and "kept" first; columns: of the first row; unused: columns
    that hold something and that were not read.
    """

    counts: dict
    columns: tuple = ()
    unused: set = field(default_factory=set)


def new_tally(reasons):
    """A Tally of no rows yet. reasons: those that may come up, in their order."""
    return Tally(dict.fromkeys(("rows", "kept", "malformed", *reasons), 0))


def read_rows(rows, read, convert, tally):
    """Yields (row, prompt, value) for each row that can be read; the tally counts the others.

    read: turns a row into a prompt (see as_prompt) and a value; convert: turns that into a text.
    Both may raise what is in UNREADABLE.
    """
    for columns in rows:
        tally.counts["rows"] += 1
        try:
            if not isinstance(columns, dict):
                raise Malformed("not an object with columns")
            tally.columns = tally.columns or tuple(columns)
            row = Row(columns)
            prompt, value = read(row)
            unused = row.unused(prompt)
            prompt, value = as_prompt(prompt), convert(value)
        except Malformed as error:
            tally.counts[str(error)] = tally.counts.get(str(error), 0) + 1
            continue
        except UNREADABLE:
            tally.counts["malformed"] += 1
            continue
        tally.unused |= unused
        yield row, prompt, value


def used_counts(tally, label, hint=""):
    """The counts without the reasons that never came up.

    label, hint: for the message: what was read, what to do. Raises UserError when no row was kept.
    """
    used = {reason: n for reason, n in tally.counts.items() if n or reason in ("rows", "kept")}
    if not used["kept"]:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in used.items())
        raise UserError(
            f"{printable(label)}: no usable row ({reasons}); the columns are: "
            f"{listed(tally.columns)}{hint}"
        )
    return used


PARTS = frozenset(  # columns that may be a part of the question; in lower case
    """
    body context passage premise background choices options input instruction system system_prompt
    history image images figure table document documents
    """.split()
)
ASIDE = frozenset(  # columns that say nothing that a question or its answer needs
    """
    id idx index uid uuid unique_id problem_id question_id url link source data_source dataset
    subset split year date number level difficulty type problem_type question_type solution_type
    answer_type subject subfield field topic domain category focus note label tag tags language
    license author solution rationale explanation equation formula ability extra_info
    """.split()
)


def column_notes(tally, label, advice):
    """What to say about the columns that were not read, as a list of sentences.

    label, advice: for the message. Raises UserError where one is known to be a part of a question:
    without it the question would be another one.
    """
    rest = sorted(str(column) for column in tally.unused)
    parts = [column for column in rest if column.lower() in PARTS]
    if parts:
        raise UserError(
            f"{printable(label)}: {listed(parts)} would be lost, and may be a part of the question:"
            f" put it into the prompt, or rename the column where it is none, or {advice}"
        )
    rest = [column for column in rest if column.lower() not in ASIDE]
    return [f"columns not used: {listed(rest)}"] if rest else []


def listed(columns):
    """The names of columns in a text, the first twenty and not all of a long one."""
    names = [printable(str(column)[:60]) for column in columns]
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
