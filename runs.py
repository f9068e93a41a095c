"""A run's flags and its directory: opened fresh or refused, written aside and renamed, resumed exactly, and drawn.

What train.py leaves behind (eval.py, cast.py and tiny.py use the same pieces): args.json, metrics.jsonl (a row a step),
completions.jsonl, curves.png and checkpoint-STEP/, a transformers checkpoint that also holds what a resume needs: the
optimizer's moments, the state of the random generator and the position in the data. Everything is safetensors and JSON:
loading a run can't execute anything.
"""

import argparse
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

from data import UserError


def run_script(main, script, resumable=True):
    """Runs a script's main. A mistake of the user's is one line and exit code 2, an interruption one line and 130."""
    try:
        main()
    except UserError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        how = "; what was begun with checkpoints or samples goes on with --resume --output-dir DIR"
        print(f"{script}: interrupted{how if resumable else ''}", file=sys.stderr)
        sys.exit(130)


def add_flag(parser, tables, name, default, help, kind=str, choices=None):
    """Adds a flag whose default stands in its help.

    A default of None is the model's or the algorithm's and is filled in after parsing; what it will be stands in tables, as
    {case: {flag: default}}. A default of False makes a switch; kind bool without a default --flag and --no-flag.
    """
    key = name[2:].replace("-", "_")
    shown = ", ".join(f"{table[key]} {case}" for case, table in tables.items() if key in table) if default is None else default
    help = help if default is False or shown == "" else f"{help} (default: {shown})"
    if default is False:
        parser.add_argument(name, action="store_true", help=help)
    elif kind is bool:
        parser.add_argument(name, action=argparse.BooleanOptionalAction, help=help)
    else:
        parser.add_argument(name, default=default, type=kind if default is None else type(default), choices=choices, help=help)


def add_machine_flags(parser):
    """The flags that every script has: copies of data, seed, device and threads."""
    parser.add_argument("--data-root", help="a directory with copies of hub data sets, one folder NAME each; it wins over the hub")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto takes the best there is")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all, or one where a small model is faster on one")


def add_run_flags(parser, script):
    """The flags of a script whose runs can be resumed: where the run goes and how it goes on. script: whose run it is."""
    parser.set_defaults(script=script)
    parser.add_argument("--output-dir", help="where the run is written (default: a fresh directory under runs/)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output-dir; it brings its flags along")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --output-dir")
    add_machine_flags(parser)


def at_least(args, least, keys):
    """Raises UserError for a flag below `least`. keys: names of flags, apart by spaces."""
    for key in keys.split():
        if not getattr(args, key) >= least:
            raise UserError(f"--{key.replace('_', '-')} must be at least {least}")


def parse_resumable(parser, argv, free):
    """Parses the flags. With --resume the run in --output-dir brings its own along; only those in `free` may be changed.

    Raises UserError when there is no run in --output-dir, or when a flag contradicts it.
    """
    args = parser.parse_args(argv)
    if not args.resume:
        return args
    if not args.output_dir or not (Path(args.output_dir) / "args.json").exists():
        raise UserError("--resume needs --output-dir with a run in it (one that has an args.json)")
    saved = json.loads((Path(args.output_dir) / "args.json").read_text())
    if saved.get("script") != args.script:
        raise UserError(f"--output-dir {args.output_dir} holds a run of {saved.get('script')}.py, which {args.script}.py can't go on with")
    parser.set_defaults(**{key: value for key, value in saved.items() if key not in ("resume", "overwrite", "output_dir")})
    args = parser.parse_args(argv)
    free = (*free, "resume", "overwrite", "output_dir", "device")
    changed = [key.replace("_", "-") for key, value in saved.items() if key not in free and getattr(args, key) != value]
    if changed:
        raise UserError(f"a resumed run keeps its settings; leave out --{', --'.join(changed)}")
    return args


def check_writable(directory):
    """Raises UserError when a directory can't be made or written to, before anything expensive is done. Writes nothing."""
    above = next(path for path in (Path(directory), *Path(directory).absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--output-dir {directory}: {above} is not a directory that can be written to")


def check_output_dir(args):
    """Raises UserError when --output-dir can't be used for this run, before anything expensive is loaded. Writes nothing."""
    directory = Path(args.output_dir or "runs")
    check_writable(directory)
    if args.output_dir is None or args.resume or not directory.exists() or not any(directory.iterdir()):
        return
    if not args.overwrite:
        raise UserError(f"--output-dir {directory} is not empty: give --resume, --overwrite or another directory")
    if run_settings(directory).get("script") != args.script:
        raise UserError(f"--overwrite: {directory} does not look like a run of {args.script}.py, so it is left alone")


def open_output_dir(args, stem):
    """The run's directory, made: --output-dir (an earlier run in it is gone unless resumed), or a fresh runs/STEM-N."""
    check_output_dir(args)
    if args.output_dir is None:
        number = 1
        while (directory := Path("runs") / f"{stem}-{number}").exists():
            number += 1
        args.output_dir = str(directory)
    directory = Path(args.output_dir)
    if args.overwrite and not args.resume and directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def run_settings(path):
    """The flags of the run that a directory is, or that a checkpoint directory lies in; {} where there is none."""
    for folder in (Path(path), Path(path).parent):
        if (folder / "args.json").exists():
            return json.loads((folder / "args.json").read_text())
    return {}


def is_embedded(model):
    """Whether --model means the embedded model or what was trained from it: the embedded defaults suit both."""
    return Path(model).name == "tiny" or run_settings(model).get("data") == "arithmetic"


def write_json(path, value):
    """Writes aside and renames, so that a reader never sees half a file."""
    path.with_suffix(".tmp").write_text(json.dumps(value, indent=1))
    os.replace(path.with_suffix(".tmp"), path)


def read_jsonl(path):
    """The rows of a .jsonl file up to the first that is not whole (it was being written when the run died)."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_jsonl(path, rows, mode="w"):
    """Writes a line a row, aside and renamed; with mode "a" appends."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    target = path if mode == "a" else path.with_suffix(".tmp")
    with target.open(mode) as file:
        file.write(text)
    os.replace(target, path)


@contextmanager
def replacing(directory):
    """A directory beside it to write into; at the end it takes the place of `directory`. What fails half-way replaces nothing."""
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


def latest_checkpoint(directory):
    """The checkpoint-N of the highest N in a run's directory, or None."""
    found = [path for path in Path(directory).glob("checkpoint-*") if path.name[11:].isdigit()]
    return max(found, key=lambda path: int(path.name[11:]), default=None)


def rewind(directory, step):
    """Cuts metrics.jsonl and completions.jsonl back to `step`, the last one a checkpoint knows. Returns the metric rows."""
    kept = {}
    for name in ("completions.jsonl", "metrics.jsonl"):
        kept[name] = [row for row in read_jsonl(directory / name) if row["step"] <= step]
        write_jsonl(directory / name, kept[name])
    return kept["metrics.jsonl"]


def save_checkpoint(directory, step, model, tokenizer, optimizer, generator, cursor):
    """checkpoint-STEP: a transformers checkpoint plus what a bit-exact resume needs. The older ones are then deleted.

    generator: the sampler's; cursor: how many problems were taken so far (see data.take).
    """
    from safetensors.torch import save_file

    final = directory / f"checkpoint-{step}"
    moments = {f"{key}.{index}": value for index, state in optimizer.state_dict()["state"].items() for key, value in state.items()}
    with replacing(final) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file({**moments, "generator": generator.get_state()}, folder / "trainer.safetensors")
        write_json(folder / "trainer.json", {"step": step, "cursor": cursor})
    for path in directory.glob("checkpoint-*"):
        if path != final:
            shutil.rmtree(path)


def load_trainer_state(path, optimizer, generator):
    """Restores the optimizer's moments and the generator; returns (step, cursor)."""
    from safetensors.torch import load_file

    tensors = load_file(path / "trainer.safetensors")
    generator.set_state(tensors.pop("generator"))
    state = optimizer.state_dict()
    for name, tensor in tensors.items():
        key, index = name.rsplit(".", 1)
        state["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(state)  # its groups are the new run's own: a resumed run may change the learning rate
    saved = json.loads((path / "trainer.json").read_text())
    return saved["step"], saved["cursor"]


def plot_curves(rows, path):
    """Draws reward, entropy, clip fraction and completion length over the steps as a PNG. rows: of metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "reward": ["reward", "accuracy"],
        "entropy (nats a token)": ["entropy"],
        "clipped share of tokens": ["clip_ratio/low", "clip_ratio/high"],
        "completion length (tokens)": ["completions/mean_length"],
    }
    figure, axes = pyplot.subplots(1, 4, figsize=(16, 3.4), layout="constrained")
    for axis, (title, keys) in zip(axes, panels.items()):
        for key, style in zip(keys, ("-", "--")):
            axis.plot([row["step"] for row in rows], [row[key] for row in rows], style, label=key.split("/")[-1])
        axis.set(title=title, xlabel="step")
        least = min((row[key] for row in rows for key in keys if row[key] is not None), default=0)
        axis.set_ylim(bottom=min(0, 1.05 * least), top=None if axis.get_ylim()[1] > 0.06 else 0.1)
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend()
    save_figure(figure, path)


def peak_memory_gb(device):
    """The most memory that this process has held: on the GPU where there is one, else of the machine."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
