"""A run's directory: how it is opened, what is written to it, how a run is resumed.

train.py leaves args.json, metrics.jsonl (a row a step), completions.jsonl, curves.png and
checkpoint-STEP/. A checkpoint is one of transformers, and holds what a resume needs besides: the
optimizer's moments, the state of the random generator, the position in the data. All of it is
safetensors and JSON, so loading a run cannot execute anything.
"""

import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

from engine.errors import UserError

ROOT = Path(__file__).resolve().parent.parent

# --------------------------------------------------------------------------------------------------
# The directory


def check_writable(directory):
    """Raises UserError when a directory cannot be made or written to. Writes nothing."""
    absolute = Path(directory).absolute()
    above = next(path for path in (absolute, *absolute.parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--output-dir {directory}: {above} is not a folder that can be written to")


def check_output_dir(args):
    """Raises UserError when --output-dir cannot be used for this run. Writes nothing.

    args: with output_dir, resume, overwrite and script (whose run it is).
    """
    directory = Path(args.output_dir or "runs")
    check_writable(directory)
    fresh = not directory.exists() or not any(directory.iterdir())
    if args.output_dir is None or args.resume or fresh:
        return
    if not args.overwrite:
        raise UserError(
            f"--output-dir {directory} is not empty: give --resume, --overwrite or another folder"
        )
    if own_settings(directory).get("script") != args.script:
        raise UserError(
            f"--overwrite: {directory} does not look like a run of {args.script}.py, "
            "so it is left alone"
        )


def open_output_dir(args, stem):
    """Makes the run's directory and returns it.

    It is --output-dir, where an earlier run is gone unless it is resumed, or a fresh runs/STEM-N.
    """
    check_output_dir(args)
    if args.output_dir is None:
        number = 1
        while Path("runs", f"{stem}-{number}").exists():
            number += 1
        args.output_dir = str(Path("runs", f"{stem}-{number}"))
    directory = Path(args.output_dir)
    if args.overwrite and not args.resume and directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def own_settings(directory):
    """The flags of the run that a directory is; {} where it is none."""
    path = Path(directory) / "args.json"
    return json.loads(path.read_text()) if path.exists() else {}


def is_embedded(model):
    """Whether --model means the embedded model, or a run or checkpoint that began with it."""
    if model == "tiny" or Path(model).resolve() == ROOT / "tiny":
        return True
    settings = own_settings(model) or own_settings(Path(model).parent)
    return settings.get("embedded") is True


# --------------------------------------------------------------------------------------------------
# Files


def write_json(path, value):
    """Writes aside and renames, so that a reader never sees half a file."""
    path.with_suffix(".tmp").write_text(json.dumps(value, indent=1))
    os.replace(path.with_suffix(".tmp"), path)


def read_jsonl(path):
    """The rows of a .jsonl file up to the first that is not whole: a run died as it was written."""
    rows = []
    text = path.read_text() if path.exists() else ""
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_jsonl(path, rows):
    """Writes a line a row, aside, and renames."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def append_jsonl(path, rows):
    """Appends a line a row."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with path.open("a") as file:
        file.write(text)


@contextmanager
def replacing(directory):
    """A new folder beside `directory`, which takes its place at the end.

    What fails half-way replaces nothing.
    """
    staging = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(directory, ignore_errors=True)
    os.rename(staging, directory)


def save_figure(figure, path):
    """Writes a PNG aside and renames it."""
    from matplotlib import pyplot

    figure.savefig(path.with_suffix(".tmp.png"), dpi=110)
    pyplot.close(figure)
    os.replace(path.with_suffix(".tmp.png"), path)


# --------------------------------------------------------------------------------------------------
# Checkpoints


def checkpoints(directory):
    """The folders checkpoint-N in a run's directory, by rising N. Other names are the user's."""
    found = []
    for path in Path(directory).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal() and path.is_dir() and not path.is_symlink():
            found.append((int(step), path))
    return [path for _, path in sorted(found)]


def latest_checkpoint(directory):
    """The checkpoint-N of the highest N in a run's directory, or None."""
    found = checkpoints(directory)
    return found[-1] if found else None


def rewind(directory, step):
    """Cuts the logs back to `step`, the last one that a checkpoint knows.

    Returns the rows of metrics.jsonl.
    """
    for name in ("completions.jsonl", "metrics.jsonl"):
        rows = [row for row in read_jsonl(directory / name) if row["step"] <= step]
        write_jsonl(directory / name, rows)
    return rows


def save_checkpoint(directory, step, model, tokenizer, optimizer, generator, cursor):
    """Writes checkpoint-STEP and deletes the older ones.

    generator: the sampler's; cursor: how many problems were taken so far (see tasks.take).
    """
    from safetensors.torch import save_file

    final = directory / f"checkpoint-{step}"
    tensors = {"generator": generator.get_state()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"{key}.{index}"] = value
    with replacing(final) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file(tensors, folder / "trainer.safetensors")
        write_json(folder / "trainer.json", {"step": step, "cursor": cursor})
    for path in checkpoints(directory):
        if path != final:
            shutil.rmtree(path)


def load_trainer_state(path, optimizer, generator):
    """Restores the optimizer's moments and the generator. Returns (step, cursor)."""
    from safetensors.torch import load_file

    tensors = load_file(path / "trainer.safetensors")
    generator.set_state(tensors.pop("generator"))
    state = optimizer.state_dict()  # its groups are the new run's: the learning rate may change
    for name, tensor in tensors.items():
        key, index = name.rsplit(".", 1)
        state["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(state)
    saved = json.loads((path / "trainer.json").read_text())
    return saved["step"], saved["cursor"]


# --------------------------------------------------------------------------------------------------
# What is seen of a run


def peak_memory_gb(device):
    """The most memory that this process has held: of the GPU where there is one, else in all."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
