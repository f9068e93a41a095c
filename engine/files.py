"""Files: written aside, forced to the disk, renamed.

A kill at any moment, a full disk and a power cut leave the old or the new, whole. (A folder cannot
take the place of another in one step: between two renames there is neither, which `tidy` mends.)
What was appended to a .jsonl file is on the disk when `append_jsonl` returns; half a last row is
left out when it is read. Beside NAME there may stand, for a moment or after a kill:

    .NAME.new    being written, not whole
    .NAME.old    a whole folder, while .NAME.new takes its place
    .NAME.gone   being deleted

`tidy` finishes what a kill has left.
"""

import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from engine.errors import UserError

LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<state>new|old|gone)")


def beside(path, state):
    """Where NAME stands in a state: .NAME.new, .NAME.old, .NAME.gone."""
    return path.with_name(f".{path.name}.{state}")


def sync(path):
    """Forces a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def named(path):
    """Within it an error of the system names the file: a full disk does not say where."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def written_aside(path, mode="w"):
    """An open file, which takes the place of `path` at the end.

    What fails half-way replaces nothing. mode: "w" for text, "wb" for bytes.
    """
    new = beside(path, "new")
    try:
        with named(path), new.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def replacing(directory):
    """A new, empty folder, which takes the place of `directory` at the end.

    What fails half-way replaces nothing. At every moment the old folder or the new one is whole.
    Raises OSError when something in it cannot be written, whatever a library raises then.
    """
    new = beside(directory, "new")
    old = beside(directory, "old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
        for path in [new, *new.rglob("*")]:
            sync(path)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, Exception) and "os error" in str(error).lower():
            raise OSError(f"{directory} cannot be written: {error}") from error  # from Rust
        raise
    if directory.exists():
        os.rename(directory, old)
    os.rename(new, directory)
    sync(directory.parent)
    if old.exists():
        remove_folder(old, beside(directory, "gone"))


def remove_folder(path, gone=None):
    """Deletes a folder, which is called `gone` meanwhile: half of it never has its own name."""
    gone = gone or beside(path, "gone")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(path, gone)
    if gone.is_symlink():
        gone.unlink()
    else:
        shutil.rmtree(gone)


def tidy(directory, is_own):
    """Finishes what a kill has left in a folder.

    is_own: function (name) -> whether the scripts write a file or folder of that name there.
    """
    for path in list(Path(directory).iterdir()):
        match = LEFTOVER.fullmatch(path.name)
        if not match or not is_own(match["name"]):
            continue
        target = path.with_name(match["name"])
        if match["state"] == "old" and not target.exists():
            os.rename(path, target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


# --------------------------------------------------------------------------------------------------
# JSON


def read_json(path):
    """The dict in a JSON file; {} where there is none. Raises UserError for a damaged one."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError):  # also bytes that are no text
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it does not hold a JSON object")
    return content


def write_json(path, value):
    """Writes JSON aside and renames it."""
    with written_aside(path) as file:
        json.dump(value, file, indent=1)


def read_jsonl(path):
    """The rows (dicts) of a .jsonl file up to the first that is not whole."""
    rows = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def write_jsonl(path, rows):
    """Writes a line a row, aside, and renames."""
    with written_aside(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def append_jsonl(path, rows):
    """Appends a line a row. They are on the disk when it returns."""
    with named(path), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def new_figure(*arguments, **named):
    """matplotlib's pyplot.subplots, for a picture that goes to a file: no display is needed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*arguments, **named)


def save_figure(figure, path):
    """Writes a matplotlib figure as a PNG, aside, renames it, and closes the figure."""
    from matplotlib import pyplot

    with written_aside(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


# --------------------------------------------------------------------------------------------------
# Digests: what a result was made of, by content


def digest(value):
    """sha256 of lists, dicts, texts and numbers. Of any other object the type counts."""
    text = json.dumps(value, sort_keys=True, default=lambda x: type(x).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(named_parameters):
    """sha256 over the names, types, shapes and bytes of weights: pairs (name, parameter)."""
    import torch

    total = hashlib.sha256()
    for name, p in named_parameters:
        total.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        total.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()
