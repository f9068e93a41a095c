"""Tasks of reasoning-gym (pip install reasoning-gym), which makes problems and scores answers.

    python train.py --data reasoning_gym:chain_sum
    python train.py --data reasoning_gym:chain_sum:max_terms=2:max_digits=1

Each of its hundred tasks generates problems from a seed. One question in eight is for the test: a
checksum of its text decides, so that no question is on both sides. The answer is what stands in
the last <answer> </answer> of a completion; the task's own scorer judges it, with a number from 0
to 1.

Model output is never evaluated here, and some scorers do just that. Those tasks are refused. Two of
them are kept (GUARDED): their scorers see only answers made of numbers and + - * / ( ).
"""

import inspect
import json
import re
import zlib

from tqdm import tqdm

from engine.errors import UserError, printable, reason

PROBLEMS = 2400  # that are generated
INSTRUCTION = "Give the final answer between <answer> and </answer>."
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
LONGEST = 2000  # characters of an answer
EVALUATES = re.compile(r"\b(eval|exec|parse_expr|sympify)\(")
GUARDED = ("countdown", "puzzle24")
HARMLESS = re.compile(r"(?!.*\*\s*\*)[-0-9+*/(). ]{1,200}")  # no power: 9**9**9 has no end


def load(name, split):
    """The problems of a task, its reward and answer functions, counts and notes (see tasks.Task).

    name: reasoning_gym:TASK, and perhaps :KEY=VALUE, settings of the task; split: "train" or
    "test". Raises UserError without the package, for an unknown task or setting, and for a task
    whose scorer would evaluate what a model has written.
    """
    label = f"--data {printable(name)}"
    try:
        import reasoning_gym
    except ImportError:
        raise UserError(f"{label} needs: pip install reasoning-gym") from None
    from reasoning_gym.factory import DATASETS

    _, task, *settings = name.split(":")
    if task not in DATASETS:
        near = [known for known in DATASETS if task and task[:5] in known] or list(DATASETS)[:8]
        raise UserError(f"{label}: reasoning-gym has no such task; it has {', '.join(near)}, ...")
    scorer = inspect.getsource(DATASETS[task][0].score_answer)
    if EVALUATES.search(scorer) and task not in GUARDED:
        raise UserError(f"{label}: its scorer evaluates the model's output as code: not run here")

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
    problems = [
        {"prompt": question, "answer": str(entry["answer"]), "instruction": INSTRUCTION}
        for question, entry in kept.items()
    ]

    def reward(problem, text):
        found = answer(problem, text)
        if found is None or (task in GUARDED and not HARMLESS.fullmatch(found)):
            return 0.0
        try:
            score = float(dataset.score_answer(found, kept[problem["prompt"]]))
        except Exception:  # whatever a scorer makes of a strange answer
            return 0.0
        return score if 0 <= score <= 1 else 0.0

    return problems, reward, answer, counts, []


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
    """What stands in the last <answer> </answer> of a completion, or None."""
    found = ANSWER.findall(text)
    if not found or len(found[-1]) > LONGEST:
        return None
    return found[-1].strip()
