"""Command-line flags that several scripts share, and the types that check a flag's value."""

import argparse
import json
import math
from pathlib import Path

from engine.errors import UserError


def number(text, kind, least, above=False):
    """Text as an int or a float of at least `least` (or above it). Raises ArgumentTypeError."""
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of type {kind.__name__}"
        ) from None
    if not math.isfinite(value) or value < least or (above and value == least):
        relation = "above" if above else "at least"
        raise argparse.ArgumentTypeError(f"{text} must be {relation} {least}")
    return value


def positive_int(text):
    """An int of at least 1."""
    return number(text, int, 1)


def non_negative_int(text):
    """An int of at least 0."""
    return number(text, int, 0)


def positive_float(text):
    """A finite float above 0."""
    return number(text, float, 0, above=True)


def non_negative_float(text):
    """A finite float of at least 0."""
    return number(text, float, 0)


def share(text):
    """A float from 0 to 1."""
    value = number(text, float, 0)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} must be at most 1")
    return value


def below_one(text):
    """A float in [0, 1)."""
    value = share(text)
    if value == 1:
        raise argparse.ArgumentTypeError(f"{text} must be below 1")
    return value


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with each flag's default behind it, where the flag has one."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def add_machine_flags(parser):
    """The flags that every script has: copies of data sets, seed, device and threads."""
    flag = parser.add_argument
    flag("--data-root", help="a folder with copies of hub data sets; it wins over the hub")
    flag("--seed", type=non_negative_int, default=0, help="seed of everything random")
    flag("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to run")
    flag(
        "--threads",
        type=non_negative_int,
        default=0,
        help="CPU threads; 0: what is measured to be fastest",
    )


def add_run_flags(parser):
    """The flags of a script whose runs can be resumed."""
    flag = parser.add_argument
    flag("--output-dir", help="where the run is written; a fresh folder under runs/ if not given")
    flag("--resume", action="store_true", help="go on with the run in --output-dir, by its flags")
    flag("--overwrite", action="store_true", help="replace the run in --output-dir")


def resumed_flags(output_dir, script):
    """The flags of the run of `script` in a directory, as a dict.

    Raises UserError when there is no such run in it.
    """
    path = Path(output_dir or "") / "args.json"
    if not output_dir or not path.exists():
        raise UserError("--resume needs --output-dir with a run in it (one that has an args.json)")
    saved = json.loads(path.read_text())
    if saved.get("script") != script:
        raise UserError(
            f"--output-dir {output_dir} holds a run of {saved.get('script')}.py, "
            f"with which {script}.py cannot go on"
        )
    own = ("script", "resume", "overwrite", "output_dir", "embedded")
    return {key: value for key, value in saved.items() if key not in own}


def check_unchanged(args, saved, free):
    """Raises UserError when a flag of a resumed run was changed, other than those in `free`."""
    changed = [
        "--" + key.replace("_", "-")
        for key, value in saved.items()
        if key not in (*free, "device") and getattr(args, key, value) != value
    ]
    if changed:
        raise UserError(f"a resumed run keeps its settings: leave out {', '.join(changed)}")
