"""Mathematics: known data sets, and the files of a user. One small function reads a row of each.

    row --read--> question, gold answer --select--> problem

A new data set is a function and a line in SETS. Sets with the same columns share a function.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import UserError
from tasks.rows import MALFORMED, load_rows, local_rows, used_counts
from tasks.verify import extract_answer, is_right, last_boxed, normalise, parses, settle

# Qwen's own words
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

# -------------------------------------------------------------------------------------------------
# A row as (question, gold answer). None or "" is what the row lacks. An exception (KeyError, ...)
# counts the row as malformed.


def gsm8k(row):
    return row["question"], after_hashes(row["answer"])


def competition_math(row):
    return row["problem"], last_boxed(row["solution"] or "")


def dapo(row):
    return unwrapped(last_user_turn(row["prompt"])), row["reward_model"]["ground_truth"]


def problem_answer(row):
    return row["problem"], row["answer"]


def question_answer(row):
    return row["question"], row["answer"]


def olympiad(row):
    gold = row["final_answer"]  # ["$2$"], or several in one
    return row["question"], ", ".join(gold) if isinstance(gold, list) else gold


def svamp(row):
    body = row["Body"].strip()
    if not body.endswith("."):
        body += "."
    return " ".join([body, row["Question"]]), row["Answer"]


def asdiv(row):
    gold = re.sub(r"\s+\([^()]*\)$", "", row["answer"])  # 9 (apples)
    return " ".join([row["body"].strip(), row["question"]]), gold


def mawps(row):
    return row["input"], row["target"]


def plain(row):
    """A file of a user: problem, question or prompt; answer, or else a solution with a box."""
    question = row.get("problem") or row.get("question") or row.get("prompt")
    if "answer" in row:
        gold = after_hashes(row["answer"])
    else:
        gold = last_boxed(row.get("solution") or "")
    return unwrapped(last_user_turn(question)), gold


PLAIN_HINT = (
    "; needed are problem, question or prompt, and answer or a boxed solution;"
    " a file with the columns of a known set is NAME:PATH, for example gsm8k:PATH"
)


def after_hashes(answer):
    """The gold of GSM8K: the working, then #### 1,234. Any other answer is returned as it is."""
    if not isinstance(answer, str) or "####" not in answer:
        return answer
    return answer.rpartition("####")[2].replace(",", "")


def last_user_turn(prompt):
    """The text of a prompt that may be a chat."""
    if not isinstance(prompt, list):
        return prompt
    return next((turn["content"] for turn in reversed(prompt) if turn["role"] == "user"), "")


DAPO_WRAPPER = re.compile(
    r"""
    Solve[ ]the[ ]following[ ]math[ ]problem[ ]step[ ]by[ ]step\.\s*
    The[ ]last[ ]line[ ]of[ ]your[ ]response[ ]should[ ]be[ ]of[ ]the[ ]form[ ]Answer:[ ]\$?Answer
    .*?
    where[ ]\$?Answer[ ]is[ ]the[ ]answer[ ]to[ ]the[ ]problem\.\s*
    (?P<question>.*?)\s*
    Remember[ ]to[ ]put[ ]your[ ]answer[ ]on[ ]its[ ]own[ ]line[ ]after[ ]["“]Answer:["”]\.?\s*
    """,
    re.DOTALL | re.VERBOSE,
)


def unwrapped(question):
    """The question without the instruction that DAPO has put around it."""
    match = DAPO_WRAPPER.fullmatch((question or "").strip())
    return match["question"] if match else question


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


def names(split):
    """The sets that the hub has for "train" or "test"."""
    return [name for name, source in SETS.items() if split in source.splits]


def load(name, split="train", root=None):
    """The problems of a data set.

    name: a key of SETS, the path of a file or folder (columns: see `plain`), or NAME:PATH for a
    file or folder with the columns of a set in SETS; split: "train" or "test"; root: a folder with
    local copies of hub sets (see rows.load_rows).
    Returns (problems, counts). A problem is a dict with "prompt", "answer" (the gold one), "styles"
    and "instruction" (what is put behind the prompt). counts: dict reason -> rows, "rows" and
    "kept" first; kept and the reasons add up to rows.
    Raises UserError for an unknown name, a split that a set does not have, or no usable row.
    """
    source, rows = open_source(name, split, root)
    hint = PLAIN_HINT if source is PLAIN else ""
    golds, counts = select(rows, source.read, f"--data {name}", hint)
    problems = [
        {"prompt": prompt, "answer": gold, "styles": source.styles, "instruction": INSTRUCTION}
        for prompt, gold in golds.items()
    ]
    return problems, counts


def open_source(name, split, root):
    """The Source of a name and its rows, not read yet. Raises UserError for an unknown name."""
    schema, _, path = name.partition(":")
    if name in SETS:
        return SETS[name], set_rows(name, split, root)
    if schema in SETS and Path(path).exists():
        return SETS[schema], local_rows(path, split)
    if schema in SETS:
        raise UserError(f"--data {name}: there is no file or folder {path}")
    if Path(name).exists():
        return PLAIN, local_rows(name, split)
    known = ", ".join(["arithmetic", *SETS])
    raise UserError(
        f"--data {name}: unknown; neither a file, a folder, NAME:PATH nor one of {known}"
    )


def set_rows(name, split, root):
    """The rows of a set in SETS. Raises UserError when the hub has no such split of it."""
    source = SETS[name]
    if not source.hub_id:
        raise UserError(f"--data {name}: the hub has no copy in these columns: give {name}:PATH")
    if split not in source.splits:
        use = "evaluation only" if split == "train" else "training only: it has no held-out split"
        raise UserError(f"--data {name}: {source.hub_id} is for {use}")
    return load_rows(name, source.hub_id, source.config, source.splits[split], root)


def gold_text(gold):
    """A gold answer as text, "" for none."""
    if gold is None or gold != gold:  # NaN is what a table makes of a missing number
        return ""
    if isinstance(gold, float) and gold.is_integer():  # AMC: 142.0
        gold = int(gold)
    text = re.sub(r"(?<!\\)\$", "", str(gold)).strip()
    return re.sub(r"^([-+]?[0-9.]+)[eE]\+?(-?[0-9]+)$", r"\1 \\times 10^{\2}", text)  # Minerva


REASONS = (
    "malformed",
    "no question",
    "no answer",
    "duplicate prompt",
    "conflicting answers",
    "gold can't be parsed",
)


def select(rows, read, label, hint=""):
    """The usable rows.

    read: turns a row into (question, gold); label, hint: for the message of the UserError that is
    raised when nothing is left. Returns ({question: gold}, counts), each question once.
    """
    counts = dict.fromkeys(("rows", "kept", *REASONS), 0)
    golds = {}
    times = {}
    conflicting = set()
    columns = ()
    for row in rows:
        columns = columns or tuple(row)
        counts["rows"] += 1
        try:
            question, gold = read(row)
            question = (question or "").strip()
            gold = gold_text(gold)
        except MALFORMED:
            counts["malformed"] += 1
            continue
        if not question:
            counts["no question"] += 1
        elif not gold:
            counts["no answer"] += 1
        elif question not in golds:
            golds[question] = gold
            times[question] = 1
        else:
            times[question] += 1
            if gold != golds[question] and settle(gold, golds[question]) is not True:
                conflicting.add(question)
    kept = {}
    for question, gold in golds.items():
        if question in conflicting:  # one of the answers is wrong, and nobody knows which
            counts["conflicting answers"] += times[question]
            continue
        counts["duplicate prompt"] += times[question] - 1
        if parses(gold):
            kept[question] = gold
        else:
            counts["gold can't be parsed"] += 1
    counts["kept"] = len(kept)
    return kept, used_counts(counts, label, columns, hint)


# -------------------------------------------------------------------------------------------------
# Judging


def reward(problem, text):
    """1.0 where the completion's final answer equals the gold one, else 0.0. See verify.py."""
    return float(is_right(text, problem["answer"], problem["styles"]))


def answer(problem, text):
    """The final answer of a completion in the form in which answers vote together, or None."""
    found = extract_answer(text, problem["styles"])
    return None if found is None else normalise(found)
