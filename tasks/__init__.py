"""Tasks: what is asked, and how an answer is judged. Edit this folder to train on something else.

A task is a list of problems (dicts with the text "prompt") and a reward: a number for a completion.
A problem that is a chat of several turns has them as "messages", too: a list of dicts with the
texts "role" (system, user, assistant) and "content", the last of them the user's.
It is the embedded one (arithmetic.py), a known data set (math.py), a file of problems, or a Python
file of your own. Such a file needs two functions:

    def load(split):            # split is "train" or "test"
        return [{"prompt": "Name a colour:", "wanted": "blue"}]

    def reward(problem, text):  # any finite number: 1.0, -0.3, ...
        return 1.0 if problem["wanted"] in text else 0.0

and `answer(problem, text)` if its answers can be voted on. Then: `train.py --data my_task.py`.
"""

import importlib.util
import os
import random
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite  # never `import math`: here that name belongs to tasks/math.py

from engine.errors import UserError, printable, reason
from tasks.prompts import render
from tasks.rows import Malformed, as_prompt, unicode


@dataclass(frozen=True)
class Task:
    """What is asked and how it is judged.

    problems: dicts with at least the text "prompt", for a chat also "messages"; an "instruction" is
        put behind the prompt.
    reward: function (problem, completion text) -> float.
    answer: function (problem, completion text) -> hashable, or None for a text without an answer;
        equal answers vote together. None where the task has no such function.
    counts: dict reason -> rows, "rows" and "kept" first.
    notes: what else is to be said about the rows, as sentences.
    """

    name: str
    problems: list
    reward: Callable
    answer: Callable | None
    counts: dict
    notes: list = field(default_factory=list)


def names(split):
    """The data sets that have a "train" or a "test" side; the embedded one comes first."""
    from tasks import math

    return ["arithmetic", *math.names(split)]


def load(name, split="train", root=None, judge_thoughts=False):
    """A task by its name.

    name: "arithmetic", a known data set, the path of a data file or folder, NAME:PATH for a file
    with the columns of a known data set (see math.load), reasoning_gym:NAME (see gym.load), or the
    path of a .py file (see the top of this file); split: "train" or "test"; root: a folder with
    local copies of hub sets.
    judge_thoughts: whether an answer inside a thought counts (see math.reward); the embedded task
    and .py files judge as they do.
    Raises UserError for whatever the user can mend.
    """
    from tasks import arithmetic, math

    if name == "arithmetic":
        return module_task(name, arithmetic, split)
    if name.endswith(".py"):
        return module_task(name, import_file(name), split)
    if name.startswith("reasoning_gym:"):
        from tasks import gym  # an extra

        return Task(name, *gym.load(name, split, judge_thoughts))
    problems, counts, notes = math.load(name, split, root, judge_thoughts)
    return Task(name, problems, math.reward, math.answer, counts, notes)


# -------------------------------------------------------------------------------------------------
# A task that is a Python module


def import_file(path, flag="--data"):
    """The module in a file. Raises UserError when there is no such file or it can't be imported.

    flag: that named it, for the message.
    """
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: there is no such file")
    name = f"task file {path}"  # not the name of anything that can be imported
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up here
    guarded(path, "import", spec.loader.exec_module, module)
    return module


def module_task(name, module, split):
    """The Task of a module with load, reward and perhaps answer. Raises UserError for a wrong one.

    The functions of the module are wrapped: what they raise, and a reward or an answer of the wrong
    kind, becomes a UserError that names the file.
    """
    for function in ("load", "reward"):
        if not callable(getattr(module, function, None)):
            raise UserError(f"{name}: needs a function {function} (see tasks/arithmetic.py)")
    problems = guarded(name, "load", lambda: checked_problems(module.load(split)))

    def reward(problem, text):
        return guarded(name, "reward", lambda: checked_reward(module.reward(problem, text)))

    def answer(problem, text):
        return guarded(name, "answer", lambda: checked_answer(module.answer(problem, text)))

    votes = answer if callable(getattr(module, "answer", None)) else None
    counts = {"rows": len(problems), "kept": len(problems)}
    return Task(name, problems, reward, votes, counts)


def guarded(path, what, function, *arguments):
    """What the function returns. Whatever it raises becomes a UserError with file and line."""
    try:
        return function(*arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # also sys.exit(0), which would look like success
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(path)]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise UserError(
            f"{printable(where)}: {what}: {type(error).__name__}: {reason(error)}"
        ) from error


def checked_problems(problems):
    """The problems as a list. Raises TypeError unless they are dicts with a text "prompt"."""
    wanted = 'load(split) must return a list of dicts with the text "prompt"'
    problems = list(problems or [])
    if not problems:
        raise TypeError(f"{wanted}, not an empty one")
    for problem in problems:
        if not isinstance(problem, dict) or not isinstance(problem.get("prompt"), str):
            raise TypeError(f"{wanted}; one of them is {problem!r}")
        if not isinstance(problem.get("instruction", ""), str):
            raise TypeError(f'an "instruction" must be a text; one problem is {problem!r}')
        try:
            unicode(problem["prompt"] + problem.get("instruction", ""))
            if "messages" in problem:
                as_prompt(list(problem["messages"]))
        except Malformed as error:
            raise TypeError(f"{error}: {problem!r}") from None
    return problems


def checked_reward(value):
    """The reward as a float. Raises TypeError unless it is a finite number."""
    if isinstance(value, (str, bytes)):
        raise TypeError(f"a reward must be a finite number, not {value!r}")
    try:
        number = float(value)  # also a NumPy number or a tensor of one element
    except Exception:
        raise TypeError(f"a reward must be a finite number, not {value!r}") from None
    if not isfinite(number):
        raise TypeError(f"a reward must be a finite number, not {value!r}")
    return number


def checked_answer(value):
    """The answer. Raises TypeError unless it is hashable, so that equal ones can be counted."""
    hash(value)
    return value


# -------------------------------------------------------------------------------------------------
# Problems in order, and what to say of them


def take(problems, cursor, count, seed):
    """Problems from an endless stream: one shuffled pass over all of them after another.

    cursor: position of the first one; count: how many. The same arguments give the same problems.
    """
    chosen = []
    orders = {}
    for position in range(cursor, cursor + count):
        epoch, index = divmod(position, len(problems))
        if epoch not in orders:
            rng = random.Random(f"{seed}, pass {epoch}")
            orders[epoch] = rng.sample(range(len(problems)), len(problems))
        chosen.append(problems[orders[epoch][index]])
    return chosen


def describe(task, problems, tokenizer, max_prompt_length):
    """Some lines about a task: rows kept and dropped and why, the first prompt, its gold, notes.

    problems: those of the task that `encode` has kept for max_prompt_length.
    """
    text, how = render(problems[0], tokenizer)
    reasons = [f"{count:,} {reason}" for reason, count in task.counts.items()]
    too_long = len(task.problems) - len(problems)
    reasons.append(f"{too_long} longer than {max_prompt_length} tokens")
    hows = Counter(problem.get("prompt_form", how) for problem in problems)
    if len(hows) > 1:
        how = ", ".join(f"{count:,} {how}" for how, count in hows.items())
    lines = [f"{printable(task.name)}: {', '.join(reasons)}; {how}", f"  first prompt {text!r}"]
    if "answer" in problems[0]:
        lines.append(f"  its gold answer {problems[0]['answer']!r}")
    lines += [f"  {note}" for note in task.notes]
    return "\n".join(lines)
