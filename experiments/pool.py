"""Runs of train.py and eval.py as processes of their own, several at a time, under one bar."""

import os
import subprocess
import sys
import time

from tqdm import tqdm

from engine.errors import UserError
from engine.files import read_jsonl
from engine.runs import ROOT


def run_all(tasks, jobs, threads, log, total, steps_done):
    """Runs all tasks, `jobs` of them at a time.

    tasks: lists of functions without arguments, to be called one after another; each returns a
        command (a list of words for Python), or None where nothing is left to do;
    threads: of each process; log: the Path of a file for all that they print;
    total: steps of all tasks together; steps_done: function () -> how many there are so far.
    Raises UserError, with the file in which its words are, when one of them fails: then the others
    are stopped, too.
    """
    waiting = [list(commands) for commands in tasks]
    running = []  # of (process, the commands left)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tqdm(desc="steps of all runs", total=total, disable=None) as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append((None, waiting.pop(0)))
            still = []
            for process, commands in running:
                if process is not None and process.poll() is None:
                    still.append((process, commands))
                    continue
                if process is not None and process.returncode:
                    for other, _ in running:
                        if other is not None and other.poll() is None:
                            other.terminate()
                    raise UserError(f"a run has failed: its words are in {log}")
                command = None
                while commands and command is None:
                    command = commands.pop(0)()
                if command is not None:
                    with log.open("a") as words:
                        process = subprocess.Popen(
                            [sys.executable, *command],
                            cwd=ROOT,
                            env=environment,
                            stdout=words,
                            stderr=words,
                        )
                    still.append((process, commands))
            running = still
            bar.update(steps_done() - bar.n)
            if running:
                time.sleep(0.5)


def steps_in(folders, most):
    """The steps in the metrics.jsonl of some runs, at most `most` of each."""
    return sum(min(len(read_jsonl(folder / "metrics.jsonl")), most) for folder in folders)


def present(values):
    """The values that are not None: a step without an update has no entropy."""
    return [value for value in values if value is not None]
