"""Safety: pairs of a prompt and the wanted response, for cast.py and eval.py.

A new data set is a function that reads a row and a line in PAIRS.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import UserError, printable
from tasks.rows import (
    Malformed,
    as_prompt,
    column_notes,
    first,
    is_empty,
    is_null,
    load_rows,
    local_rows,
    new_tally,
    read_rows,
    scalar,
    used_counts,
)

SAFE_ANSWER = "I'm sorry, but I can't help with that."  # where a set has no response of its own

# -------------------------------------------------------------------------------------------------
# A row as (prompt, response). A prompt is a text or a chat (see rows.as_prompt). None or "" is what
# the row lacks. An exception (KeyError, ...) counts the row as malformed.


def pku_saferlhf(row):
    """The safer response if it is safe, else the other one if that is: "safer" may be unsafe."""
    for index in (int(row["safer_response_id"]), 0, 1):
        if str(row[f"is_response_{index}_safe"]).lower() == "true":  # a .csv has only texts
            return row["prompt"], row[f"response_{index}"]
    return row["prompt"], ""


def llm_lat(row):
    return row["prompt"], row["chosen"]


def jailbreakbench(row):
    """Prompts alone. Other collections of harmful requests call the column otherwise."""
    return first(row, "Goal", "goal", "instruction", "prompt"), SAFE_ANSWER


def xstest(row):
    return row["prompt"], ""


def alpaca(row):
    parts = [row["instruction"], row.get("input")]
    return "\n".join(part for part in parts if not is_empty(part)), first(row, *RESPONSES)


def gsm8k(row):
    return row["question"], row["answer"]


def mmlu(row):
    choices = row["choices"]
    if not isinstance(choices, list) or len(choices) > 10:
        raise Malformed("choices that are no list of at most ten")
    letters = "ABCDEFGHIJ"[: len(choices)]
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices)]
    answer = int(row["answer"])
    wanted = letters[answer] if answer >= 0 else ""  # -1: a split whose answers are not given away
    return "\n".join([row["question"], *lines, "Answer:"]), wanted


RESPONSES = ("response", "chosen", "answer", "completion", "output")


def plain(row):
    """A file of a user: prompt, question, instruction and input, or messages; a response.

    The response is in the first of RESPONSES that is not null. It may be a chat that the assistant
    ends, and so may the messages: then the last turn is the response, and what is before it the
    prompt.
    """
    prompt = first(row, "prompt", "question")
    response = first(row, *RESPONSES)
    if prompt is None and not is_null(row.get("instruction")):
        prompt, response = alpaca(row)
    if isinstance(response, list):
        before, response = cut_response(response)
        prompt = prompt_of_chosen(prompt, before)
    elif prompt is None:
        prompt = first(row, "messages")
        if response is None and prompt and prompt[-1]["role"] == "assistant":
            prompt, response = cut_response(prompt)
    return prompt, response


def cut_response(chat):
    """A chat that the assistant ends as (what is before, its last text). Raises Malformed."""
    *before, last = chat
    if last["role"] != "assistant" or not isinstance(last["content"], str):
        raise Malformed("a response that is not the assistant's text")
    return before, last["content"]


def prompt_of_chosen(prompt, before):
    """The prompt where the response is a chat. Raises Malformed where they tell two prompts.

    before: the turns before the response. A set may repeat the prompt in them, or have it only
    there.
    """
    if not before:
        return prompt
    if prompt is None or as_prompt(prompt) == as_prompt(before):
        return before
    raise Malformed("a prompt and a response of two chats")


# -------------------------------------------------------------------------------------------------
# The known sets


@dataclass(frozen=True)
class PairSource:
    """A data set. kind: see `load_pairs`; read: turns a row into (prompt, response)."""

    kind: str
    read: Callable
    hub_id: str
    split: str
    config: str | None = None


JBB = "JailbreakBench/JBB-Behaviors"
PAIRS = {
    "pku-saferlhf": PairSource("safety", pku_saferlhf, "PKU-Alignment/PKU-SafeRLHF", "train"),
    "llm-lat": PairSource("safety", llm_lat, "LLM-LAT/harmful-dataset", "train"),
    "jbb": PairSource("safety", jailbreakbench, JBB, "harmful", "behaviors"),
    "jbb-benign": PairSource("over-refusal", jailbreakbench, JBB, "benign", "behaviors"),
    "xstest": PairSource("over-refusal", xstest, "Paul/XSTest", "train"),
    "alpaca": PairSource("utility", alpaca, "tatsu-lab/alpaca", "train"),
    "gsm8k": PairSource("utility", gsm8k, "openai/gsm8k", "train", "main"),
    "mmlu": PairSource("utility", mmlu, "cais/mmlu", "dev", "all"),  # test is for scores only
}
GATED = {  # of walledai and allenai -> the open set that stands in
    "advbench": "jbb",
    "harmbench": "jbb",
    "xstest": "xstest",
    "wildguardmix": "pku-saferlhf",
}


def load_pairs(name, kind, split=None, root=None, responses=True):
    """Prompts with the response that is wanted.

    name: a key of PAIRS or its hub id, the path of a file or folder (columns: see `plain`), or
    NAME:PATH for a file or folder with the columns of a set in PAIRS.
    kind: "safety" (harmful requests, safe responses), "utility", or "over-refusal" (harmless
    requests that look harmful; no response is wanted, so it is "").
    split: another split of the set; root: see rows.load_rows; responses: whether safety and utility
    pairs need one; if not, it is "".
    Returns (pairs, counts): dicts "prompt", "response", and for a chat of several turns "messages"
    (see rows.as_prompt); and a dict reason -> rows.
    Names columns that were not used on standard error.
    Raises UserError for an unknown or gated name, a set of another kind, mmlu's test split, a hub
    out of reach, no usable row, or a part of the prompt in a column that is not understood.
    """
    rows, read = open_pairs(name, kind, split, root)
    responses = responses and kind != "over-refusal"
    pairs, tally = select_pairs(rows, read, kind, responses)
    hint = ""
    if read is plain:
        hint = PLAIN_HINT + RESPONSE_HINT if responses else PLAIN_HINT
    counts = used_counts(tally, name, hint)
    notes = column_notes(tally, name, "give NAME:PATH (for example mmlu:PATH)")
    if notes and read is plain:  # those of a known set are known
        print(f"{printable(name)}: {', '.join(notes)}", file=sys.stderr)
    return pairs, counts


PLAIN_HINT = "; needed is prompt, question, instruction or messages"
RESPONSE_HINT = (
    f", and one of {', '.join(RESPONSES)}; for harmful prompts alone give jbb:PATH,"
    f" and each gets the response {SAFE_ANSWER!r}"
)


def open_pairs(name, kind, split, root):
    """The rows of a name, not read yet, and the function that reads a row. Raises UserError."""
    schema, _, path = name.partition(":")
    if schema in PAIRS and path:
        if not os.path.exists(path):
            raise UserError(f"{printable(name)}: there is no file or folder {printable(path)}")
        return local_rows(path, split or "train"), PAIRS[schema].read
    if name not in PAIRS and os.path.exists(name):
        return local_rows(name, split or "train"), plain

    of_kind = {key: source for key, source in PAIRS.items() if source.kind == kind}
    name = next((key for key, source in of_kind.items() if source.hub_id == name), name)
    short = name.rpartition("/")[2].lower()
    if name not in PAIRS and short in GATED:
        raise UserError(
            f"{printable(name)} is gated: the hub wants a login and an agreement for it; "
            f"its open stand-in here is {GATED[short]}"
        )
    known = ", ".join(of_kind)
    if name not in PAIRS:
        raise UserError(f"{printable(name)}: unknown; neither a file or folder nor one of {known}")
    source = PAIRS[name]
    if name not in of_kind:
        raise UserError(f"{name} is a {source.kind} set, not a {kind} set; those are {known}")
    if name == "mmlu" and split == "test":
        raise UserError("mmlu: its test split is for scores; use dev or validation")
    rows = load_rows(name, source.hub_id, source.config, split or source.split, root)
    return rows, source.read


REASONS = ("no prompt", "no response", "labelled unsafe", "duplicate prompt")


def select_pairs(rows, read, kind, wanted):
    """The usable rows as (pairs, tally), each prompt once. wanted: whether they need a response."""
    tally = new_tally(REASONS)
    counts = tally.counts
    pairs = {}
    for row, prompt, response in read_rows(rows, read, scalar if wanted else no_response, tally):
        text = prompt["prompt"]
        if not text:
            counts["no prompt"] += 1
        elif kind == "over-refusal" and labelled_unsafe(row):
            counts["labelled unsafe"] += 1
        elif wanted and not response:
            counts["no response"] += 1
        elif text in pairs:
            counts["duplicate prompt"] += 1
        else:
            pairs[text] = {**prompt, "response": response}
    counts["kept"] = len(pairs)
    return list(pairs.values()), tally


def no_response(response):
    """What is kept of a response that is not wanted."""
    return ""


def labelled_unsafe(row):
    """Whether XSTest says that refusing is right. Its files of answers have no label but a type."""
    return row.get("label") == "unsafe" or str(row.get("type")).startswith("contrast_")
