"""Kills runs, and compares what goes on afterwards with a run that nobody killed, bit for bit.

    python -m experiments.kills                # every change of the file system, 50 random moments
    python -m experiments.kills --only train   # also: overwrite, eval, tune

A run is killed (SIGKILL) right before each file that Python opens to write, renames, makes or
deletes in its directory, and then at random moments, which are all that hits the inside of a write
of safetensors or tokenizers. Then the user does what the README says: --resume
where there is an args.json, else the same command again. All must be as if nothing had happened:
weights, optimizer, logs, results, and no leftovers in the directory. Four cases: train.py, train.py
--overwrite over an older run, eval.py, cast.py --tune over an older result.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import cast
import eval as evaluation
import train
from engine import flags
from engine.errors import run_script

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
NOISY = ("seconds", "tokens_per_second", "peak_memory_gb")
# Few problems: a start takes a second less.
TASK = """
from tasks.arithmetic import answer, problems, reward


def load(split):
    return problems(split, 40)
"""
TRAIN = """--data sums.py --steps 2 --save-steps 1 --num-prompts 4 --num-generations 4
    --max-completion-length 24 --steps-per-generation 2 --num-iterations 1 --dynamic-sampling off
    --log-completions-steps 1 --threads 1 --device cpu""".split()
EVAL = "--data sums.py --limit 12 --num-samples 2 --batch-size 8 --threads 1 --device cpu".split()
CAST = """--examples 16 --steps 2 --batch-size 8 --sensitivity gate --max-completion-length 8
    --threads 1 --device cpu""".split()


@dataclass
class Case:
    """What is killed.

    main: of the script; argv: its flags, without --output-dir; before: flags of an older run in
    the same directory, or None; again: flags of the command that follows where no run can be
    resumed; resumable: whether --resume goes on.
    """

    main: object
    argv: list
    before: list | None
    again: list
    resumable: bool


CASES = {
    "train": Case(train.main, TRAIN, None, TRAIN, True),
    "overwrite": Case(
        train.main,
        [*TRAIN, "--overwrite"],
        [*TRAIN, "--seed", "5", "--algo", "grpo"],
        [*TRAIN, "--overwrite"],
        False,
    ),
    "eval": Case(evaluation.main, EVAL, None, EVAL, True),
    "tune": Case(
        cast.main,
        ["--tune", *CAST],
        ["--diagnose", "--tune", *CAST, "--learning-rate", "1e-2"],
        ["--tune", *CAST],
        False,
    ),
}


def in_child(main, argv, directory, *, change=None, seconds=None):
    """Runs a script's main in a child process that may be killed. Returns (exit status, changes).

    change: which change of the file system it does not live to make; seconds: after which it is
    killed; changes: how many it made, where it was not killed.
    """
    count_file = directory.with_suffix(".count")
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        output = os.open(directory.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        changes = watch(directory, change)
        try:
            run_script(lambda: main([*argv, "--output-dir", str(directory)]), "killed")
            count_file.write_text(str(len(changes)))
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(99)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    changes = int(count_file.read_text()) if status == 0 and count_file.exists() else 0
    return status, changes


def watch(directory, last):
    """From now on notes each change that this process makes below a directory, in a list.

    Right before change number `last` (from 0) the process is killed; None: it never is.
    """
    changes = []

    def hook(event, arguments):
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not writes and event not in CHANGES:
            return
        path = os.fspath(arguments[0]) if not isinstance(arguments[0], int) else ""
        if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # rmtree: in an open folder
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
        if not str(path).startswith(str(directory)):
            return
        if len(changes) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        changes.append(event)

    sys.addaudithook(hook)
    return changes


def content(directory):
    """All that a run left, without what differs between equal runs, as a dict name -> value."""
    found = {}
    for path in sorted(Path(directory).rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_dir() or name == ".lock" or path.suffix == ".png":
            found[name] = None
        elif path.suffix == ".safetensors":
            found[name] = {key: t.numpy().tobytes() for key, t in load_file(path).items()}
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [without_noise(row) for row in rows]
        elif path.name in ("args.json", "trainer.json", "results.json", "tune.json"):
            found[name] = without_noise(json.loads(path.read_text()))
        else:
            found[name] = path.read_text()
    return found


def without_noise(row):
    """A dict without times, and without the flags and ids by which equal runs differ."""
    own = ("output_dir", "run", "resume", "overwrite", "args", "flags", "diagnose")
    return {k: v for k, v in row.items() if not k.startswith(NOISY) and k not in own}


def prepared(case, parent, name):
    """A directory with the older run of a case in it, where there is one."""
    directory = parent / name
    if case.before:
        shutil.copytree(parent / "before", directory)
    return directory


def goes_on(case, directory):
    """The command behind a kill. Returns what is wrong then, or None."""
    argv = case.again
    if case.resumable and (directory / "args.json").exists():
        argv = ["--resume"]
    status, _ = in_child(case.main, argv, directory)
    if status != 0:
        last = directory.with_suffix(".log").read_text().strip().splitlines()[-1]
        return f"{' '.join(argv[:3])} ends with status {status}: {last}"
    return None


def difference(found, expected):
    """The first name at which two contents differ, or None."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected or found[name] != expected[name]:
            return name
    return None


def trial(case, parent, name, expected, **kill):
    """One kill. Returns what is wrong afterwards, or None."""
    directory = prepared(case, parent, name)
    status, _ = in_child(case.main, case.argv, directory, **kill)
    if "change" in kill and status != signal.SIGKILL:
        return f"it was not killed but ended with status {status}"
    fault = goes_on(case, directory)
    if fault is None:
        wrong = difference(content(directory), expected)
        fault = wrong and f"{wrong} is not what it is without a kill"
    shutil.rmtree(directory)
    return fault


def run_case(name, case, parent, moments, seed):
    """Kills a case everywhere. Returns (kills, list of faults)."""
    parent.mkdir()
    if case.before:
        in_child(case.main, case.before, parent / "before")
    whole = prepared(case, parent, "whole")
    start = time.perf_counter()
    status, changes = in_child(case.main, case.argv, whole)
    length = time.perf_counter() - start
    if status != 0:
        sys.exit(f"{name}: fails without a kill: {whole.with_suffix('.log').read_text()[-500:]}")
    expected = content(whole)
    rng = random.Random(seed)
    kills = [{"change": change} for change in range(changes)]
    kills += [{"seconds": rng.uniform(0, 1.05 * length)} for _ in range(moments)]
    faults = []
    for number, kill in enumerate(tqdm(kills, desc=name, disable=None)):
        fault = trial(case, parent, f"run{number}", expected, **kill)
        if fault:
            faults.append(f"{name}, killed at {kill}: {fault}")
    print(f"{name}: {changes} changes and {moments} moments, {len(faults)} faults", flush=True)
    return len(kills), faults


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=flags.Formatter
    )
    parser.add_argument("--only", choices=CASES, help="one case; all if not given")
    parser.add_argument("--moments", type=flags.non_negative_int, default=50, help="random kills")
    parser.add_argument("--seed", type=flags.seed, default=0, help="of the random moments")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked child has none of its parent's threads
    kills = 0
    faults = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("sums.py").write_text(TASK)
        # A first run loads what is imported late, so that no child has to.
        train.main([*TRAIN, "--output-dir", f"{folder}/first"])
        for name, case in CASES.items():
            if args.only in (None, name):
                parent = Path(folder).resolve() / name
                count, found = run_case(name, case, parent, args.moments, args.seed)
                kills += count
                faults += found
    print(*faults, sep="\n")
    print(f"{kills} kills, {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
