"""Mathematics: known data sets, and the files of a user. One small function reads a row of each.

    row --read--> question, gold answer --select--> problem

A new data set is a function and a line in SETS. Sets with the same columns share a function.
"""

import hashlib
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from engine.errors import UserError, printable
from tasks.notation import normalise
from tasks.rows import (
    as_turns,
    column_notes,
    first,
    load_rows,
    local_rows,
    new_tally,
    read_rows,
    scalar,
    used_counts,
)
from tasks.verify import extract_answer, is_right, last_boxed, parses, settle

# Qwen's own words
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

# -------------------------------------------------------------------------------------------------
# A row as (question, gold answer). A question is a text or a chat (see rows.as_prompt). None or ""
# is what the row lacks. An exception (KeyError, ...) counts the row as malformed.


def gsm8k(row):
    return row["question"], after_hashes(row["answer"])


def competition_math(row):
    return row["problem"], last_boxed(row["solution"] or "")


def dapo(row):
    return unwrapped(row["prompt"]), row["reward_model"]["ground_truth"]


def problem_answer(row):
    return row["problem"], row["answer"]


def question_answer(row):
    return row["question"], row["answer"]


def olympiad(row):
    gold = row["final_answer"]  # ["$2$"], or several in one
    question = "\n".join(part for part in (row.get("context"), row["question"]) if part)
    return question, ", ".join(gold) if isinstance(gold, list) else gold


def svamp(row):
    body = row["Body"].strip()
    if not body.endswith((".", "!", "?", ",")):
        body += "."
    return " ".join([body, row["Question"]]), row["Answer"]


def asdiv(row):
    gold = re.sub(r"(?<=[0-9])\s+\([A-Za-z .'-]+\)(?=\s*(,|$))", "", row["answer"])  # 9 (apples)
    return " ".join([row["body"].strip(), row["question"]]), gold


def mawps(row):
    return row["input"], row["target"]


def plain(row):
    """A file of a user: problem, question, prompt or messages; answer, or a solution with a box.

    A column that is null counts as not there.
    """
    gold = first(row, "answer")
    if gold is None:
        gold = last_boxed(first(row, "solution") or "")
    question = first(row, "problem", "question", "prompt", "messages")
    return unwrapped(question), after_hashes(gold)


PLAIN_HINT = (
    "; needed are problem, question, prompt or messages, and answer or a boxed solution;"
    " a file with the columns of a known set is NAME:PATH, for example gsm8k:PATH"
)


def after_hashes(answer):
    """The gold of GSM8K: the working, then #### 1,234. Any other answer is returned as it is."""
    if not isinstance(answer, str) or "####" not in answer:
        return answer
    line, _, _ = answer.rpartition("####")[2].strip().partition("\n")
    return line.replace(",", "")


DAPO_HEAD = re.compile(
    r"""
    \s* Solve[ ]the[ ]following[ ]math[ ]problem[ ]step[ ]by[ ]step\.\s{1,9}
    The[ ]last[ ]line[ ]of[ ]your[ ]response[ ]should[ ]be[ ]of[ ]the[ ]form[ ]Answer:[ ]\$?Answer
    .{0,200}?
    where[ ]\$?Answer[ ]is[ ]the[ ]answer[ ]to[ ]the[ ]problem\.\s
    """,
    re.DOTALL | re.VERBOSE,
)
DAPO_TAIL = re.compile(
    r"""
    \s Remember[ ]to[ ]put[ ]your[ ]answer[ ]on[ ]its[ ]own[ ]line[ ]after[ ]["“]Answer:["”]\.? $
    """,
    re.VERBOSE,
)


def unwrapped(question):
    """The question without the instruction that DAPO has put around it; of a chat the last turn."""
    if isinstance(question, list) and question:
        *earlier, last = as_turns(question)
        return [*earlier, {**last, "content": unwrapped(last["content"])}]
    if not isinstance(question, str):
        return question
    head = DAPO_HEAD.match(question)
    text = question.rstrip()
    tail = DAPO_TAIL.search(text, max(0, len(text) - 100))
    if not head or not tail or tail.start() < head.end():
        return question
    return text[head.end() : tail.start()].strip()


# -------------------------------------------------------------------------------------------------
# The known sets


@dataclass(frozen=True)
class Source:
    """A data set.

    read: turns a row into (question, gold answer); hub_id: None where the hub has no copy with
    these columns; splits: what the set is for ("train", "test") -> the split of the hub; styles:
    how a completion may state its answer (see verify.extract_answer); config: of the hub's set.
    """

    read: Callable
    hub_id: str | None = None
    splits: dict = field(default_factory=dict)
    styles: tuple = ("boxed",)
    config: str | None = None


BOTH = {"train": "train", "test": "test"}
TRAIN = {"train": "train"}
TEST = {"test": "test"}
TEST_IN_TRAIN = {"test": "train"}  # an evaluation set that the hub has under this name
HASH_LINE = ("boxed", "####")
ANSWER_LINE = ("boxed", "Answer:")

SETS = {
    "gsm8k": Source(gsm8k, "openai/gsm8k", BOTH, HASH_LINE, "main"),
    "math": Source(competition_math, "DigitalLearningGmbH/MATH-lighteval", BOTH),
    "dapo-math-17k": Source(dapo, "BytedTsinghua-SIA/DAPO-Math-17k", TRAIN, ANSWER_LINE),
    "dapo-math-17k-processed": Source(
        dapo, "open-r1/DAPO-Math-17k-Processed", TRAIN, ANSWER_LINE, "en"
    ),
    "deepscaler": Source(problem_answer, "agentica-org/DeepScaleR-Preview-Dataset", TRAIN),
    "math500": Source(problem_answer, "HuggingFaceH4/MATH-500", TEST),
    "aime24": Source(problem_answer, "HuggingFaceH4/aime_2024", TEST_IN_TRAIN),
    "aime25": Source(problem_answer, "math-ai/aime25", TEST),
    "amc23": Source(question_answer, "math-ai/amc23", TEST),
    "amc": Source(problem_answer, "AI-MO/aimo-validation-amc", TEST_IN_TRAIN),
    "minerva": Source(question_answer, "math-ai/minervamath", TEST),
    "olympiad": Source(olympiad, "math-ai/olympiadbench", TEST),
    "omni": Source(problem_answer, "KbsdJames/Omni-MATH", TEST),
    "svamp": Source(svamp, "ChilleD/SVAMP", BOTH),
    "asdiv": Source(asdiv),
    "mawps": Source(mawps),
}
PLAIN = Source(plain, styles=("boxed", "####", "Answer:"))
TELLING = {  # columns by which a user's file is read as one of a set
    "svamp": {"Body", "Question", "Answer"},
    "asdiv": {"body", "question", "answer"},
    "mawps": {"input", "target"},
    "olympiad": {"question", "final_answer"},
    "dapo-math-17k": {"prompt", "reward_model"},
}


def names(split):
    """The sets that the hub has for "train" or "test"."""
    return [name for name, source in SETS.items() if split in source.splits]


def load(name, split="train", root=None, judge_thoughts=False):
    """The problems of a data set.

    name: a key of SETS, the path of a file or folder (columns: see `plain`), or NAME:PATH for a
    file or folder with the columns of a set in SETS; split: "train" or "test"; root: a folder with
    local copies of hub sets (see rows.load_rows); judge_thoughts: see `reward`.
    Returns (problems, counts, notes). A problem is a dict with "prompt", for a chat of several
    turns "messages" (see rows.as_prompt), "answer" (the gold one), "styles" and "instruction" (what
    is put behind the prompt). counts: dict reason -> rows, "rows" and "kept" first; kept and the
    reasons add up to rows. notes: a list of what else is to be said about the rows.
    Raises UserError for an unknown name, a split that a set does not have, no usable row, or a part
    of the question in a column that is not understood.
    """
    source, rows, notes = open_source(name, split, root)
    label = f"--data {name}"
    problems, tally = select(rows, source.read)
    counts = used_counts(tally, label, PLAIN_HINT if source is PLAIN else "")
    unread = column_notes(tally, label, "give NAME:PATH (for example asdiv:PATH)")
    if source is PLAIN:  # those of a known set are known
        notes += unread
    more = {"styles": source.styles, "instruction": INSTRUCTION}
    if judge_thoughts:
        more["judge_thoughts"] = True
    return [{**problem, **more} for problem in problems], counts, notes


def open_source(name, split, root):
    """The Source of a name, its rows, not all read yet, and notes on how the name was taken.

    Raises UserError for an unknown name.
    """
    schema, _, path = name.partition(":")
    if name in SETS:
        return SETS[name], set_rows(name, split, root), []
    if schema in SETS and os.path.exists(path):
        return SETS[schema], local_rows(path, split), []
    if schema in SETS:
        raise UserError(f"--data {printable(name)}: there is no file or folder {printable(path)}")
    if os.path.exists(name):
        return told_by_columns(local_rows(name, split))
    known = ", ".join(["arithmetic", *SETS])
    raise UserError(
        f"--data {printable(name)}: unknown; neither a file, a folder, NAME:PATH nor one of {known}"
    )


def told_by_columns(rows):
    """The Source that the first of the rows tells by its columns, all the rows, and notes."""
    start = [row for _, row in zip(range(1), rows)]
    rows = chain(start, rows)
    for schema, columns in TELLING.items():
        if start and isinstance(start[0], dict) and columns <= start[0].keys():
            source = replace(SETS[schema], styles=PLAIN.styles)
            return source, rows, [f"read as {schema}, by its columns"]
    return PLAIN, rows, []


def set_rows(name, split, root):
    """The rows of a set in SETS. Raises UserError when the hub has no such split of it."""
    source = SETS[name]
    if not source.hub_id:
        raise UserError(f"--data {name}: the hub has no copy in these columns: give {name}:PATH")
    if split not in source.splits:
        use = "evaluation only" if split == "train" else "training only: it has no held-out split"
        raise UserError(f"--data {name}: {source.hub_id} is for {use}")
    return load_rows(name, source.hub_id, source.config, source.splits[split], root)


# -------------------------------------------------------------------------------------------------
# From rows to problems

REASONS = (
    "no question",
    "no answer",
    "duplicate prompt",
    "conflicting answers",
    "gold can't be parsed",
)


def select(rows, read):
    """The usable rows as (problems, tally), each question once.

    read: turns a row into (question, gold). Problems are dicts with "prompt", "answer" and perhaps
    "messages"; tally: a rows.Tally.
    """
    tally = new_tally(REASONS)
    counts = tally.counts
    problems = {}
    times = {}
    conflicting = set()
    for _, prompt, gold in read_rows(rows, read, gold_text, tally):
        text = prompt["prompt"]
        if not text:
            counts["no question"] += 1
        elif not gold:
            counts["no answer"] += 1
        elif text not in problems:
            problems[text] = {**prompt, "answer": gold}
            times[text] = 1
        else:
            times[text] += 1
            other = problems[text]["answer"]
            if gold != other and settle(gold, other) is not True:
                conflicting.add(text)
    for text in conflicting:  # one of the answers is wrong, and nobody knows which
        counts["conflicting answers"] += times[text]
        del problems[text]
    usable = usable_golds({problem["answer"] for problem in problems.values()})
    kept = []
    for text, problem in problems.items():
        counts["duplicate prompt"] += times[text] - 1
        if problem["answer"] in usable:
            kept.append(problem)
        else:
            counts["gold can't be parsed"] += 1
    counts["kept"] = len(kept)
    return kept, tally


def gold_text(gold):
    """A gold answer as text, "" for none. Raises rows.Malformed where it is no text or number."""
    if isinstance(gold, float) and gold.is_integer() and abs(gold) < 1e16:  # AMC: 142.0
        gold = int(gold)
    text = scalar(gold)
    if text.lower() == "nan":  # a missing number that has become a text
        return ""
    text = re.sub(r"(?<!\\)\$", "", text).strip()
    return re.sub(r"^([-+]?[0-9.]+)[eE]\+?(-?[0-9]+)$", r"\1 \\times 10^{\2}", text)  # Minerva


# -------------------------------------------------------------------------------------------------
# Which golds can serve. One of LaTeX takes a tenth of a second, and a set has thousands: those that
# can are remembered in a file, a line each. One that can't is asked for again, for the machine may
# have been busy. Without the file all is the same, but slow.

PROGRESS_AFTER = 3  # seconds
VERIFIER = [Path(__file__).with_name(name) for name in ("verify.py", "notation.py", "algebra.py")]


def usable_golds(golds):
    """The set of those golds to which an answer can be judged equal (see verify.parses)."""
    verifier = verifier_id()
    known = known_golds(verifier)
    usable = set()
    new = []
    try:
        for gold in tqdm(
            sorted(golds), "golds", leave=False, file=sys.stderr, disable=None, delay=PROGRESS_AFTER
        ):
            key = verifier + hashlib.sha256(gold.encode()).hexdigest()[:32]
            if key in known:
                usable.add(gold)
            elif parses(gold):
                usable.add(gold)
                if not re.fullmatch("[-+0-9.,]+", gold):  # a number takes no time
                    new.append(key)
    finally:  # also when it was interrupted
        remember_golds(verifier, new)
    return usable


def verifier_id():
    """A text that changes with what judges: its source and the libraries."""
    parts = [path.read_bytes() for path in VERIFIER]
    for library in ("math-verify", "latex2sympy2_extended", "sympy"):
        with suppress(ImportError):  # not installed, which `parses` will say
            parts.append(version(library).encode())
    return hashlib.sha256(b" ".join(parts)).hexdigest()[:32]


def golds_file():
    """The path of the file with the golds that were found usable. Raises RuntimeError."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "tepo-cast" / "usable-golds.txt"


def known_golds(verifier):
    """The set of the keys in the file that this verifier wrote."""
    with suppress(OSError, RuntimeError):  # RuntimeError: nobody's home
        path = golds_file()
        if path.is_file():  # a pipe would be waited for
            lines = path.read_text(encoding="ascii", errors="replace").split("\n")
            return {line for line in lines if line.startswith(verifier)}
    return set()


def remember_golds(verifier, new):
    """Adds keys to the file, whole or not at all. Keys of another verifier are dropped."""
    if not new:
        return
    with suppress(OSError, RuntimeError):
        path = golds_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        try:
            aside.write_text("\n".join(sorted({*known_golds(verifier), *new})), encoding="ascii")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------
# Judging


def reward(problem, text):
    """1.0 where the completion's final answer equals the gold one, else 0.0. See verify.py.

    A thought is not judged, only what follows </think>, unless the problem's "judge_thoughts" says
    so. "opened_thought": the prompt has opened it.
    """
    return float(is_right(text, problem["answer"], problem["styles"], **thoughts(problem)))


def answer(problem, text):
    """The final answer of a completion in the form in which answers vote together, or None."""
    found = extract_answer(text, problem["styles"], **thoughts(problem))
    return None if found is None else normalise(found)


def thoughts(problem):
    """How verify.py is to read the thoughts in the completions of a problem, as keywords."""
    return {
        "judge_thoughts": problem.get("judge_thoughts", False),
        "opened": problem.get("opened_thought", False),
    }
