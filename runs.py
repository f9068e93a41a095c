"""A run's directory: opened fresh or refused, written atomically, resumed exactly, and drawn.

What train.py leaves behind (eval.py and cast.py use the same pieces): args.json, metrics.jsonl (a row a step), completions.jsonl, curves.png and checkpoint-STEP/, a
transformers checkpoint that also holds what a resume needs: the optimizer's moments, the state of the random generator
and the position in the data. Everything is safetensors and JSON: loading a run can't execute anything.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from data import UserError


def run_script(main, script):
    """Runs a script's main. A mistake of the user's is one line and exit code 2, an interruption one line and 130."""
    try:
        main()
    except UserError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: interrupted; what was begun with checkpoints or samples goes on with --resume --output-dir DIR", file=sys.stderr)
        sys.exit(130)


def add_common_flags(parser, script):
    """The flags that every script has: where the run goes, how it goes on, seed and machine. script: whose run it is."""
    parser.set_defaults(script=script)
    parser.add_argument("--output-dir", help="where the run is written (default: a fresh directory under runs/)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output-dir; it brings its flags along")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --output-dir")
    parser.add_argument("--data-root", help="a directory with copies of hub data sets, one folder NAME each; it wins over the hub")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto takes the best there is")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 measures which of one and all is faster")


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


def check_output_dir(args):
    """Raises UserError when --output-dir can't be used, before anything expensive is loaded. Writes nothing."""
    directory = Path(args.output_dir or "runs")
    above = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--output-dir {directory}: {above} is not a directory that can be written to")
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
    """Writes (or with mode "a" appends) a line a row."""
    with path.open(mode) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


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
    """checkpoint-STEP: a transformers checkpoint plus what a bit-exact resume needs. The older ones are then deleted."""
    from safetensors.torch import save_file

    staging = directory / "checkpoint.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    moments = {f"{key}.{index}": value for index, state in optimizer.state_dict()["state"].items() for key, value in state.items()}
    save_file({**moments, "generator": generator.get_state()}, staging / "trainer.safetensors")
    write_json(staging / "trainer.json", {"step": step, "cursor": cursor})
    final = directory / f"checkpoint-{step}"
    shutil.rmtree(final, ignore_errors=True)
    os.rename(staging, final)
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
    """reward, entropy, clip fraction and completion length over the steps."""
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
    figure.savefig(path.with_suffix(".tmp.png"), dpi=110)
    pyplot.close(figure)
    os.replace(path.with_suffix(".tmp.png"), path)


def peak_memory_gb(device):
    """The most memory that this process has held: on the GPU where there is one, else of the machine."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
