"""A run's directory: who may write there, what a run leaves, how it is resumed.

train.py leaves args.json, metrics.jsonl (a row a step), completions.jsonl, curves.png and
checkpoint-STEP/. A checkpoint is one of transformers, and holds what a resume needs besides: the
optimizer's moments, the state of the random generator, the position in the data. All of it is
safetensors and JSON, so loading a run cannot execute anything.

A run has an id, in args.json and in its checkpoints. Only what it wrote itself is ever replaced or
deleted; all else in its directory is the user's.
"""

import fcntl
import os
import re
import sys
import time
import uuid
from pathlib import Path

import torch

from engine import files
from engine.errors import UserError, printable

ROOT = Path(__file__).resolve().parent.parent
LOGS = {  # what the scripts write to a run's directory, besides args.json and checkpoints
    "train": ("metrics.jsonl", "completions.jsonl", "curves.png", "tokens.jsonl", "tokens.html"),
    "eval": ("samples.jsonl", "results.json"),
    "cast": (
        *("conflict_map.json", "conflict_map.png", "tuned"),
        *("compare.json", "compare.jsonl", "compare.png"),
    ),
}
TRACKED = ("tensorboard", "wandb")  # folders of --report-to
CHECKPOINT = re.compile("checkpoint-(0|[1-9][0-9]{0,17})")


def is_own(name):
    """Whether a script may write a file or folder of that name to a run's directory."""
    names = {"args.json", *TRACKED, *(name for names in LOGS.values() for name in names)}
    return name in names or bool(CHECKPOINT.fullmatch(name))


# --------------------------------------------------------------------------------------------------
# The directory

_locks = {}  # path -> open file. The kernel drops a lock when its process ends, however it ends.


def lock(directory):
    """Keeps other processes from writing to a directory, until this one ends.

    Raises UserError, which names the other process, when one is writing there.
    """
    path = Path(directory).resolve() / ".lock"
    if path in _locks and path.exists():
        return
    file = path.open("a+", encoding="utf-8", errors="replace")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not isinstance(error, BlockingIOError):
            print(f"note: this file system has no locks, so nothing guards {directory}")
            return
        file.seek(0)
        owner = printable(file.read(300).strip())
        raise UserError(
            f"--output-dir {directory} is in use by {owner or 'another process'}: "
            "wait until it has ended, or give another folder"
        ) from None
    file.truncate(0)
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    file.write(f"process {os.getpid()} since {time.strftime('%F %T')} ({command[:200]})\n")
    file.flush()
    _locks[path] = file


def check_writable(directory):
    """Raises UserError when a directory cannot be made or written to. Writes nothing."""
    absolute = Path(directory).absolute()
    above = next(path for path in (absolute, *absolute.parents) if os.path.lexists(path))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"--output-dir {directory}: {above} is not a folder that can be written to")


def is_fresh(directory):
    """Whether a directory holds nothing, or nothing but what a killed start has left."""
    if not directory.exists():
        return True
    names = [path.name for path in directory.iterdir() if path.name != ".lock"]
    leftovers = (files.LEFTOVER.fullmatch(name) for name in names)
    return all(match and match["state"] == "new" and is_own(match["name"]) for match in leftovers)


def check_output_dir(args):
    """Raises UserError when --output-dir cannot be used for this run. Locks it if it is a run.

    args: with output_dir, resume, overwrite and script (whose run it is).
    """
    if args.output_dir is None:
        check_writable("runs")
        return
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it: give one of them")
    directory = Path(args.output_dir)
    check_writable(directory)
    if is_fresh(directory):
        return
    if not args.resume and not args.overwrite:
        raise UserError(
            f"--output-dir {directory} is not empty: give --resume, --overwrite or another folder"
        )
    if files.read_json(directory / "args.json").get("script") != args.script:
        raise UserError(
            f"{directory} does not look like a run of {args.script}.py, so it is left alone"
        )
    lock(directory)


def open_output_dir(args, stem):
    """Makes the run's directory, writes args.json and returns the directory. Call it when all else
    is ready: it deletes the run that --overwrite replaces.

    The directory is --output-dir, or a fresh runs/STEM-N. args gets `output_dir` and `run`, the id.
    """
    check_output_dir(args)
    if args.output_dir is None:
        args.output_dir = str(make_numbered(stem))
    directory = open_shared_dir(args.output_dir)
    if args.resume:
        args.run = settings_of(directory).get("run")
    else:
        args.run = uuid.uuid4().hex
        clear(directory, args.script)
    files.write_json(directory / "args.json", vars(args))
    return directory


def open_shared_dir(directory):
    """Makes and locks a directory in which several commands leave their results. Returns it.

    Raises UserError when another process writes there.
    """
    directory = Path(directory)
    check_writable(directory)
    directory.mkdir(parents=True, exist_ok=True)
    lock(directory)
    files.tidy(directory, is_own)
    return directory


def make_numbered(stem):
    """Makes and returns runs/STEM-N, with the lowest N that is free."""
    number = 1
    while True:
        try:
            Path("runs", f"{stem}-{number}").mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return Path("runs", f"{stem}-{number}")


def clear(directory, script):
    """Deletes what the run in a directory wrote, except args.json."""
    for path in own_checkpoints(directory):
        files.remove_folder(path)
    for name in LOGS[script]:
        (directory / name).unlink(missing_ok=True)
    tracked = directory / str(settings_of(directory).get("report_to"))
    if tracked.name in TRACKED and tracked.is_dir() and not tracked.is_symlink():
        files.remove_folder(tracked)


def settings_of(directory):
    """What args.json in a directory says; {} where there is none, or a damaged one."""
    try:
        return files.read_json(Path(directory) / "args.json")
    except (UserError, OSError):
        return {}


def is_embedded(model):
    """Whether --model means the embedded model, or a run or checkpoint that began with it."""
    if model == "tiny" or Path(os.path.realpath(model)) == ROOT / "tiny":  # also a link to itself
        return True
    settings = settings_of(model)
    if CHECKPOINT.fullmatch(Path(model).name) and os.path.isdir(model):
        settings = settings_of(Path(model).parent)
    return settings.get("embedded") is True


# --------------------------------------------------------------------------------------------------
# What a run was made of


def digest_of(problems):
    """sha256 of problems: their tokens, and all else of them that is text, numbers and lists."""
    parts = []
    for problem in problems:
        try:
            parts.append(files.digest({str(key): value for key, value in problem.items()}))
        except (TypeError, ValueError, RecursionError):  # a task file may keep anything in them
            parts.append(files.digest(problem["prompt_ids"]))
    return files.digest(parts)


def digest_of_code(*names):
    """sha256 of those of the names that are Python files of the user; None where none is."""
    contents = [Path(name).read_bytes().hex() for name in names if name.endswith(".py")]
    return files.digest(contents) if contents else None


def check_same(args, now):
    """Compares what a resumed run is made of with what it was begun with; sets args.digests.

    now: dict what -> digest; None for what was not needed this time.
    Raises UserError when something has changed.
    """
    before = {}
    if args.resume:
        before = settings_of(args.output_dir).get("digests") or {}
    for what, value in now.items():
        if value and before.get(what, value) != value:
            raise UserError(
                f"--resume: the {what} of {args.output_dir} changed since it began, so old and new "
                "results would be mixed: put them back, or begin again (--overwrite)"
            )
    args.digests = {**before, **{what: value for what, value in now.items() if value}}


# --------------------------------------------------------------------------------------------------
# Checkpoints


def checkpoints(directory):
    """The folders checkpoint-N in a directory, by rising N. Other names are the user's."""
    found = []
    for path in Path(directory).glob("checkpoint-*"):
        match = CHECKPOINT.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def own_checkpoints(directory, damaged=False):
    """Those of them that the run in this directory wrote.

    damaged: with those of which nobody can say. A resume must look at them and not go back to an
    older one; they may not be deleted.
    """
    run = settings_of(directory).get("run")
    return [path for path in checkpoints(directory) if is_checkpoint_of(run, path, damaged)]


def is_checkpoint_of(run, path, damaged):
    """Whether a folder is a checkpoint of the run of that id; `damaged` where nobody can say."""
    try:
        saved = files.read_json(path / "trainer.json")
    except UserError:
        return damaged
    return "step" in saved and saved.get("run") == run


def check_room(args, step):
    """Raises UserError when a checkpoint after `step` would replace another's."""
    if args.output_dir is None:
        return
    own = own_checkpoints(args.output_dir)
    for path in sorted(Path(args.output_dir).glob("checkpoint-*")):
        match = CHECKPOINT.fullmatch(path.name)
        if match and path not in own and step < int(match[1]) <= args.steps:
            raise UserError(f"{path} is not of this run and would be replaced: move it away")


def check_not_inside(args, model):
    """Raises UserError when --overwrite would delete the model that the new run begins with.

    model: the directory, or hub id, to which --model leads.
    """
    if not args.overwrite or args.output_dir is None:
        return
    if Path(args.output_dir).resolve() in Path(os.path.realpath(model)).parents:
        raise UserError(
            f"--overwrite would delete {model}, with which the run begins: copy it, or give "
            "another --output-dir"
        )


def rewind(directory, step):
    """Cuts the logs back to `step`, the last one that a checkpoint knows.

    Returns the rows of metrics.jsonl.
    """
    for name in ("completions.jsonl", "tokens.jsonl", "metrics.jsonl"):
        rows = files.read_jsonl(directory / name)
        rows = [row for row in rows if isinstance(row.get("step"), int) and row["step"] <= step]
        if name == "metrics.jsonl":
            rows = [row for row in rows if is_metrics(row)]
        if name != "tokens.jsonl" or (directory / name).exists():  # --picture-tokens alone makes it
            files.write_jsonl(directory / name, rows)
    if len(rows) < step:
        print(f"note: metrics.jsonl is damaged; it has {len(rows)} of the first {step} steps")
    return rows


def is_metrics(row):
    """Whether a dict is a row of metrics.jsonl, and not a damaged one: numbers, and the rewards."""
    rewards = (row.get("reward"), row.get("task_reward"))
    numbers = all(value is None or isinstance(value, int | float) for value in row.values())
    return numbers and None not in rewards


def save_checkpoint(directory, args, step, model, tokenizer, optimizer, generator, cursor):
    """Writes checkpoint-STEP and deletes the run's oldest ones.

    args: with run (the id), save_total_limit, and base (see train.load_policy); generator: the
    sampler's; cursor: how many problems were taken so far (see tasks.take).
    Raises UserError, and leaves all as it was, when checkpoint-STEP is another's, or the moments
    are not finite.
    """
    from safetensors.torch import save_file

    final = directory / f"checkpoint-{step}"
    if os.path.lexists(final) and final not in own_checkpoints(directory):
        raise UserError(f"{final} is not of this run: move it away, then go on with --resume")
    tensors = {"generator": generator.get_state()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"{key}.{index}"] = value
            if not torch.isfinite(value).all():
                raise UserError(
                    f"step {step}: the optimizer's moments are not finite, so nothing is saved: "
                    "lower --max-grad-norm"
                )
    with files.replacing(final) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file(tensors, folder / "trainer.safetensors")
        moments = len(optimizer.state)  # fewer than parameters, where one had no gradient yet
        saved = {"step": step, "cursor": cursor, "run": args.run, "moments": moments}
        if args.base:
            saved["base"] = args.base
        files.write_json(folder / "trainer.json", saved)
    keep_newest(directory, args.save_total_limit)


def keep_newest(directory, limit):
    """Deletes the run's oldest checkpoints, so that `limit` are left."""
    for path in own_checkpoints(directory)[:-limit]:
        files.remove_folder(path)


def load_trainer_state(path, optimizer, generator):
    """Restores the optimizer's moments and the generator. Returns (step, cursor).

    Raises UserError when they are damaged, or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    saved = files.read_json(path / "trainer.json")
    step, cursor = saved.get("step"), saved.get("cursor")
    try:
        tensors = load_file(path / "trainer.safetensors")
        generator.set_state(tensors.pop("generator"))
        state = optimizer.state_dict()  # its groups are the new run's: the learning rate may change
        for name, tensor in tensors.items():
            key, index = name.rsplit(".", 1)
            state["state"].setdefault(int(index), {})[key] = tensor
        parameters = dict(enumerate(optimizer.param_groups[0]["params"]))
        whole = all(fits(own, parameters[index]) for index, own in state["state"].items())
        whole = whole and len(state["state"]) == saved.get("moments")
        whole = whole and type(cursor) is int and cursor >= 0
        whole = whole and type(step) is int and path.name == f"checkpoint-{step}"
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        whole = False
    if not whole:
        raise UserError(
            f"{path}: trainer.safetensors or trainer.json is damaged: delete this checkpoint to go "
            "on from the one before it (or from the start)"
        )
    optimizer.load_state_dict(state)
    return step, cursor


def fits(state, parameter):
    """Whether a state is AdamW's for a parameter. AdamW does not look: it would write past the end
    of moments of another shape.
    """
    if state.keys() != {"step", "exp_avg", "exp_avg_sq"}:
        return False
    step = state["step"]
    moments = (state["exp_avg"], state["exp_avg_sq"])
    return (
        (step.shape, step.dtype) == ((), torch.float32)
        and all((m.shape, m.dtype) == (parameter.shape, parameter.dtype) for m in moments)
        and all(bool(tensor.isfinite().all()) for tensor in state.values())
    )


# --------------------------------------------------------------------------------------------------
# What is seen of a run


def peak_memory_gb(device):
    """The most memory that this process has held: of the GPU where there is one, else in all."""
    import resource

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
