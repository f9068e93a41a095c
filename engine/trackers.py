"""--report-to: the rows of metrics.jsonl, sent to an experiment tracker too.

metrics.jsonl stays the record of a run. A tracker is a view of it: when it fails in the middle of a
run, the run goes on without it.
"""

import importlib

from tqdm import tqdm

from engine.errors import UserError, reason
from engine.files import read_jsonl

TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
PROJECT = "tepo-cast"


def require(name):
    """The module of a tracker. Raises UserError, with the command to install it, without it."""
    try:
        return importlib.import_module(TRACKERS[name])
    except ImportError:
        raise UserError(f"--report-to {name} needs: pip install {name}") from None


def start_tracker(name, args, directory):
    """A function that sends a row of metrics.jsonl to a tracker. name: "none" for no tracker.

    args: the flags, sent once, and `run`, by which a resumed run goes on in its own curves;
    directory: of the run, with the rows so far; TensorBoard's files are in its folder tensorboard/,
    wandb's in wandb/.
    Raises UserError when it cannot be started.
    """
    if name == "none":
        return lambda row: None
    module = require(name)
    settings = {key: value for key, value in vars(args).items() if key != "digests"}
    try:
        if name == "tensorboard":
            # What a killed run has sent after its last checkpoint is sent again.
            step = len(read_jsonl(directory / "metrics.jsonl")) + 1
            writer = module.SummaryWriter(str(directory / "tensorboard"), purge_step=step)
            writer.add_text("flags", str(settings))
        elif name == "wandb":
            module.init(
                project=PROJECT,
                name=directory.name,
                id=args.run,
                resume="allow",
                config=settings,
                dir=str(directory),
            )
        else:
            title = f"{directory.name}-{args.run[:8]}"
            module.init(project=PROJECT, name=title, resume="allow", config=settings)
    except Exception as error:  # no login, no network, ...
        raise UserError(f"--report-to {name}: {reason(error)}") from None
    failed = False

    def send(row):
        nonlocal failed
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        step = numbers.pop("step")
        try:
            if failed:
                return
            if name == "tensorboard":
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)
                writer.flush()
            elif name == "wandb":  # which would keep a row back until the next one comes
                module.log(numbers, step=step, commit=True)
            else:
                module.log(numbers, step=step)
        except Exception as error:
            failed = True
            tqdm.write(f"note: {name} fails, and gets no more rows: {reason(error)}")

    return send
