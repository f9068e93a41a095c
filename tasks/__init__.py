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
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import isfinite  # never `import math`: here that name belongs to tasks/math.py
from pathlib import Path

from engine.errors import UserError, printable, reason
from tasks.rows import MARKUP, Malformed, as_prompt, plain_chat, unicode


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
    with the columns of a known data set (see math.load), or the path of a .py file (see the top of
    this file); split: "train" or "test"; root: a folder with local copies of hub sets.
    judge_thoughts: whether an answer inside a thought counts (see math.reward); the embedded task
    and .py files judge as they do.
    Raises UserError for whatever the user can mend.
    """
    from tasks import arithmetic, math

    if name == "arithmetic":
        return module_task(name, arithmetic, split)
    if name.endswith(".py"):
        return module_task(name, import_file(name), split)
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
# Problems in order, and their prompts


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


def render(problem, tokenizer):
    """The text of a problem's prompt, and how it was made.

    problem: "prompt", and "messages" where it is a chat; an "instruction" is put behind the prompt,
    or behind the last turn of the chat.
    How: "chat template" where the tokenizer has one, else "plain". A plain prompt without an
    instruction stays as it is; with one, it ends in a line break; of a chat the turns begin with
    "System: ", "User: ", "Assistant: ", and it ends in "Assistant:". "already rendered" is a prompt
    that begins with a token of the chat template: it stays as it is, without an instruction.
    Raises UserError where the template fails.
    """
    messages = problem.get("messages")
    *earlier, last = messages or [{"role": "user", "content": problem["prompt"]}]
    if not messages and is_rendered(problem["prompt"], tokenizer):
        return problem["prompt"], "already rendered"
    instruction = problem.get("instruction", "")
    text = "\n".join(part for part in (last["content"], instruction) if part)
    turns = [*earlier, {**last, "content": text}]
    if getattr(tokenizer, "chat_template", None):
        return templated(turns, tokenizer), "chat template"
    if messages:
        return f"{plain_chat(turns)}\n\nAssistant:", "plain"
    if instruction:
        text += "\n"
    return text, "plain"


def is_rendered(prompt, tokenizer):
    """Whether a prompt begins with a token of the chat template, or a special one: <|im_start|>."""
    match = MARKUP.match(prompt)
    if not match:
        return False
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token) for token in added if token.special}
    return match["token"] in special or match["token"] in str(
        getattr(tokenizer, "chat_template", None)
    )


RENDER_SECONDS = 5  # for one prompt; an honest template takes a millisecond
RENDER_BYTES = 2 * 1024**3  # of memory
RENDER_LENGTH = 5_000_000  # characters


def templated(turns, tokenizer):
    """The turns as the tokenizer's chat template writes them. Raises UserError where it can't.

    The template is the work of a stranger, too: it may raise, loop and print without end.
    """
    try:
        with render_limits():
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        if len(text) > RENDER_LENGTH:
            raise ValueError(f"it has written {len(text):,} characters")
        return unicode(text)
    except Exception as error:
        roles = ", ".join(turn["role"] for turn in turns[:8])
        raise UserError(
            f"the tokenizer's chat template cannot write a prompt of the turns {roles}: "
            f"{type(error).__name__}: {reason(error)}"
        ) from None


@contextmanager
def render_limits():
    """Limits time and memory of what runs inside, on the main thread and where the system can.

    Raises TimeoutError or MemoryError inside.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are for the main thread
        return

    def stop(number, frame):
        raise TimeoutError(f"not ready after {RENDER_SECONDS} seconds")

    handler = signal.signal(signal.SIGALRM, stop)
    # Again and again: Python swallows what is raised while it drops a weak reference.
    timer = signal.setitimer(signal.ITIMER_REAL, RENDER_SECONDS, 0.1)
    try:
        with memory_limit():
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def memory_limit():
    """Limits the memory that this process may ask for beyond what it has (macOS can't)."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    if before[0] == resource.RLIM_INFINITY:
        with suppress(OSError, ValueError):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + RENDER_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def tokenized(rendered, tokenizer):
    """The token ids of what `render` returned for each problem, all at once: one by one is slow."""
    ids = [None] * len(rendered)
    for plain in (True, False):
        numbers = [i for i, (_, how) in enumerate(rendered) if (how == "plain") == plain]
        texts = [rendered[i][0] for i in numbers]
        # A chat template has written its own special tokens.
        found = tokenizer(texts, add_special_tokens=plain).input_ids if texts else []
        for i, tokens in zip(numbers, found):
            ids[i] = tokens
    return ids


def encode(problems, tokenizer, max_prompt_length):
    """Adds "prompt_ids" to each problem and leaves out those that are too long: it never cuts one.

    max_prompt_length: in tokens. Returns new dicts. Their "prompt_form" says how the prompt was
    rendered. Where it ends inside a thought, "opened_thought" is True.
    Raises UserError when all are too long, or one is empty.
    """
    kept = []
    rendered = [render(problem, tokenizer) for problem in problems]
    for problem, (text, how), ids in zip(problems, rendered, tokenized(rendered, tokenizer)):
        if not ids:
            raise UserError("a prompt is empty: a model needs at least one token to begin with")
        if len(ids) <= max_prompt_length:
            problem = {**problem, "prompt_ids": ids, "prompt_form": how}
            if text.rstrip().endswith("<think>"):
                problem["opened_thought"] = True
            kept.append(problem)
    if not kept:
        raise UserError(
            f"all {len(problems)} prompts are longer than {max_prompt_length} tokens: "
            "raise --max-prompt-length"
        )
    return kept


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
