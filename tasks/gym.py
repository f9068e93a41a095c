"""Tasks of reasoning-gym, which makes problems and scores answers.

    pip install reasoning-gym==0.1.25

    python train.py --data reasoning_gym:chain_sum
    python train.py --data reasoning_gym:chain_sum:max_terms=2:max_digits=1

Each of its hundred tasks generates problems from a seed. One question in eight is for the test: a
checksum of its text decides, so that no question is on both sides. The answer is what stands in
the last <answer> </answer> of a completion; the task's own scorer judges it, with a number from 0
to 1.

Model output is never run as code here, and some scorers do just that. Those tasks are refused. Two
of them are kept (GUARDED): their scorers see only answers made of the numbers of the question and
+ - * / ( ). And a scorer gets little time and memory: some can be made to count to a billion.
"""

import inspect
import json
import os
import random
import re
import zlib

from tqdm import tqdm

from engine.errors import UserError, printable, reason
from tasks.prompts import limits
from tasks.verify import after_thought

PROBLEMS = 2400  # that are generated
INSTRUCTION = "Give the final answer between <answer> and </answer>."
LONGEST = 2000  # characters of an answer
SCORE_SECONDS = 2  # for one answer; an honest one takes a millisecond
# What runs a text as code. It is looked for in all of the file that a task's scorer is in.
EVALUATES = re.compile(
    r"\b(eval|exec|__import__|parse_expr|parse_latex|parse_mathematica|sympify|S|lambdify)\s*\("
    r"|(?<!re\.)\bcompile\s*\(|\bpickle\b"
)
# These run only text of their own; the last one has a parser that runs nothing.
TRUSTED = ("bitwise_arithmetic", "codeio", "number_sorting", "propositional_logic")
GUARDED = ("countdown", "puzzle24")
HARMLESS = re.compile(r"(?!.*([*/]) *\1)[-0-9+*/() ]{1,200}")  # no power: 9**9**9 has no end
# Their problems come from the order of a set, which is another one in each process.
UNSTEADY = ("codeio", "isomorphic_strings", "knight_swap", "ransom_note", "word_ladder")


def load(name, split, judge_thoughts=False):
    """The problems of a task, its reward and answer functions, counts and notes (see tasks.Task).

    name: reasoning_gym:TASK, and perhaps :KEY=VALUE, settings of the task; split: "train" or
    "test"; judge_thoughts: whether an answer inside a thought counts.
    Raises UserError without the package, for an unknown task or setting, for a task whose scorer
    would run what a model has written, or takes any answer, and for one that a resumed run could
    not make again.
    """
    label = f"--data {printable(name)}"
    try:
        import reasoning_gym
    except ImportError:
        raise UserError(f"{label} needs: pip install reasoning-gym==0.1.25") from None
    from reasoning_gym.factory import DATASETS

    _, task, *settings = name.split(":")
    if task not in DATASETS:
        near = [known for known in DATASETS if task and task[:5] in known] or list(DATASETS)[:8]
        raise UserError(f"{label}: reasoning-gym has no such task; it has {', '.join(near)}, ...")
    if task not in (*TRUSTED, *GUARDED) and evaluates(DATASETS[task][0].score_answer):
        raise UserError(f"{label}: its scorer may run the model's output as code: not used here")
    if task in UNSTEADY and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise UserError(f"{label}: it is the same in each run only with PYTHONHASHSEED=0: set that")

    random.seed(0)  # some tasks draw from the global generator
    try:
        dataset = reasoning_gym.create_dataset(
            task, seed=0, size=PROBLEMS, **chosen(settings, label)
        )
        show = tqdm(range(len(dataset)), task, leave=False, disable=None, delay=3)
        entries = [dataset[i] for i in show]
    except UserError:
        raise
    except Exception as error:  # a setting that is none, or that it refuses
        raise UserError(f"{label}: {reason(error)}") from None

    kept = {}
    of_split = 0
    for entry in entries:
        for_test = zlib.crc32(entry["question"].encode()) % 8 == 0
        if for_test == (split == "test"):
            of_split += 1
            kept.setdefault(entry["question"], entry)
    counts = {
        "rows": len(entries),
        "kept": len(kept),
        "of the other split": len(entries) - of_split,
    }
    counts["duplicate prompt"] = of_split - len(kept)
    if not kept:
        raise UserError(f"{label}: no problem is left: {counts}")
    problems = []
    for question, entry in kept.items():
        problem = {"prompt": question, "instruction": INSTRUCTION}
        if judge_thoughts:
            problem["judge_thoughts"] = True
        if entry["answer"] is not None:  # some tasks can only check
            problem["answer"] = str(entry["answer"])
        problems.append(problem)

    def reward(problem, text):
        entry = kept[problem["prompt"]]
        found = answer(problem, text)
        if found is None or (task in GUARDED and not is_harmless(found, entry)):
            return 0.0
        if "nan" in found.lower() and "nan" not in str(entry["answer"]).lower():
            return 0.0  # some scorers find no number far from nan
        try:
            with limits(SCORE_SECONDS):
                score = float(dataset.score_answer(found, entry))
        except Exception:  # whatever a scorer makes of a strange answer
            return 0.0
        return score if 0 <= score <= 1 else 0.0

    if all(reward(problem, "<answer>nonsense</answer>") == 1 for problem in problems):
        raise UserError(f"{label}: its scorer takes any answer for right")
    return problems, reward, answer, counts, []


def evaluates(scorer):
    """Whether the file of a function holds what runs a text as code."""
    return bool(EVALUATES.search(inspect.getsource(inspect.getmodule(scorer))))


def is_harmless(found, entry):
    """Whether an answer is arithmetic on the very numbers of its question."""
    if not HARMLESS.fullmatch(found):
        return False
    numbers = map(int, re.findall("[0-9]+", found))
    return sorted(numbers) == sorted(entry["metadata"]["numbers"])


def chosen(settings, label):
    """Settings KEY=VALUE as a dict. Raises UserError."""
    options = {}
    for setting in settings:
        key, mark, value = setting.partition("=")
        if not mark or key in ("", "seed", "size"):
            raise UserError(f"{label}: {printable(setting)!r} is not KEY=VALUE, a task's setting")
        try:
            options[key] = json.loads(value)
        except (ValueError, RecursionError):
            options[key] = value
    return options


def answer(problem, text):
    """What stands in the last <answer> </answer> behind a completion's thought, or None."""
    if not problem.get("judge_thoughts"):
        text = after_thought(text, problem.get("opened_thought", False)) or ""
    before, closed, _ = text.rpartition("</answer>")
    _, opened, found = before.rpartition("<answer>")
    found = found.partition("</answer>")[0]
    if not closed or not opened or len(found) > LONGEST:
        return None
    return found.strip()
