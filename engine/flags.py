"""Command-line flags that several scripts share, and the types that check a flag's value."""

import argparse
import os
import re
from pathlib import Path

from engine.errors import UserError
from engine.files import read_json

MOST = 10**12  # no count of anything is larger
LARGEST_FLOAT = 1e30  # far from where fp32 ends, which what is computed from it may not pass
LARGEST_SEED = 2**63 - 1  # of torch's generators


def number(text, kind, least, above=False, most=LARGEST_FLOAT):
    """Text as an int or a float of at least `least` (or above it) and at most `most`.

    Raises ArgumentTypeError.
    """
    shown = repr(text[:40])
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{shown} is not a number of type {kind.__name__}"
        ) from None
    if kind is float and not abs(value) <= LARGEST_FLOAT:  # NaN is not, either
        raise argparse.ArgumentTypeError(f"{shown} is not a number of at most {LARGEST_FLOAT:g}")
    if value < least or (above and value == least):
        relation = "above" if above else "at least"
        raise argparse.ArgumentTypeError(f"{shown} must be a number {relation} {least}")
    if value > most:
        raise argparse.ArgumentTypeError(f"{shown} must be at most {most}")
    return value


def positive_int(text):
    """An int of at least 1."""
    return number(text, int, 1, most=MOST)


def non_negative_int(text):
    """An int of at least 0."""
    return number(text, int, 0, most=MOST)


def any_float(text):
    """A finite float."""
    return number(text, float, -LARGEST_FLOAT)


def any_int(text):
    """An int."""
    return number(text, int, -MOST, most=MOST)


def seed(text):
    """A seed: an int from 0 on."""
    return number(text, int, 0, most=LARGEST_SEED)


def thread_count(text):
    """A number of threads, or 0."""
    return number(text, int, 0, most=1024)


def folder(text):
    """The path of a folder. An empty one would be the current directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path (an unset variable?)")
    sizes = [len(name.encode(errors="replace")) for name in Path(text).parts]
    unusable = re.search(r"[\0\ud800-\udfff]", text)  # NUL, and bytes that are not UTF-8
    if unusable or max(sizes, default=0) > 255 or sum(sizes) > 4000:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}... cannot be the path of a folder")
    return text


def positive_float(text):
    """A finite float above 0."""
    return number(text, float, 0, above=True)


def non_negative_float(text):
    """A finite float of at least 0."""
    return number(text, float, 0)


def share(text):
    """A float from 0 to 1."""
    return number(text, float, 0, most=1)


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
    flag("--data-root", type=folder, help="a folder with copies of hub data sets, used first")
    flag("--seed", type=seed, default=0, help="seed of everything random")
    flag("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to run")
    flag(
        "--threads",
        type=thread_count,
        default=0,
        help="CPU threads; 0: what is measured to be fastest",
    )


def add_run_flags(parser):
    """The flags of a script whose runs can be resumed."""
    flag = parser.add_argument
    flag(
        "--output-dir",
        type=folder,
        help="where the run is written; a fresh folder under runs/ if not given",
    )
    flag("--resume", action="store_true", help="go on with the run in --output-dir, by its flags")
    flag("--overwrite", action="store_true", help="replace the run in --output-dir")


def resumed_flags(output_dir, script):
    """The flags of the run of `script` in a directory, as a dict.

    Raises UserError when there is no such run in it.
    """
    path = Path(output_dir or "") / "args.json"
    saved = read_json(path) if output_dir and os.path.isdir(output_dir) else {}
    if not saved:
        raise UserError("--resume needs --output-dir with a run in it (one that has an args.json)")
    if saved.get("script") != script:
        raise UserError(
            f"--output-dir {output_dir} holds a run of {saved.get('script')}.py, "
            f"with which {script}.py cannot go on"
        )
    texts = [value for value in (*saved, *saved.values()) if isinstance(value, str)]
    if (
        not isinstance(saved.get("digests", {}), dict)
        or not isinstance(saved.get("run"), str)
        or any("\0" in text for text in texts)
    ):
        raise UserError(f"{path} is damaged: it is not what {script}.py wrote")
    own = "script resume overwrite output_dir embedded run digests base checkpoint".split()
    return {key: value for key, value in saved.items() if key not in own}


def as_argv(parser, saved):
    """Saved flags as they would be typed. So the parser looks at them as at any command line.

    saved: dict of `resumed_flags`; what is no flag of the parser is left out.
    """
    argv = []
    for action in parser._actions:
        value = saved.get(action.dest)
        if value is None or not action.option_strings:
            continue
        if isinstance(value, bool):  # --flag, and perhaps --no-flag
            argv += action.option_strings[:1] if value else action.option_strings[1:]
        else:
            argv.append(f"{action.option_strings[0]}={value}")
    return argv


def check_unchanged(args, saved, free):
    """Raises UserError when a flag of a resumed run was changed, other than those in `free`."""
    changed = [
        "--" + key.replace("_", "-")
        for key, value in saved.items()
        if key not in (*free, "device") and getattr(args, key, value) != value
    ]
    if changed:
        raise UserError(f"a resumed run keeps its settings: leave out {', '.join(changed)}")
