"""Problems: every loader on a folder that looks like the hub's, a user's own task, and prompts."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tasks
from engine.errors import UserError
from tasks import arithmetic, describe, load, take
from tasks import math as maths
from tasks import rows as data_rows
from tasks.prompts import encode, render
from tasks.rows import as_prompt, local_rows
from tasks.verify import parses
from tests.conftest import ROOT

# ---- rows with the hub's columns

WRAPPER = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}"
    '\n\nRemember to put your answer on its own line after "Answer:".'
)


def gsm8k(question, answer):
    return {"question": question, "answer": answer}


def competition(problem, solution):
    return {"problem": problem, "solution": solution, "level": "Level 1", "type": "Algebra"}


def dapo(question, answer):
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": WRAPPER.format(question), "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "a"},
    }


def processed(question, answer):
    return {**dapo(question, answer), "prompt": question, "solution": answer}


def solved(problem, answer):
    return {"problem": problem, "answer": answer, "solution": r"\boxed{9}", "id": 60, "url": "..."}


def asked(question, answer):
    return {"id": 0, "question": question, "answer": answer, "url": "..."}


def olympiad(question, final_answer, unit=None, context=None):
    row = {"id": 1, "question": question, "solution": ["..."], "final_answer": final_answer}
    return {**row, "unit": unit, "answer_type": "Numerical", "context": context}


def svamp(body, question, answer):
    return {"ID": "1", "Body": body, "Question": question, "Equation": "...", "Answer": answer}


def asdiv(body, question, answer):
    return {"body": body, "question": question, "answer": answer, "formula": "...", "idx": 0}


def mawps(text, target):
    return {"input": text, "target": target}


@dataclass
class Example:
    """Rows of a set, the problems expected (question -> gold), and what else is counted."""

    rows: list
    golds: dict
    reasons: dict = field(default_factory=dict)

    def counts(self):
        return {"rows": len(self.rows), "kept": len(self.golds), **self.reasons}


DAPO_BLOCK = [
    dapo("What is $1+1$?", "2"),
    dapo('Two lines\n\nof "text"?', "34"),
    dapo("Which?", "1"),
    dapo("Which?", "2"),
    dapo("Nothing?", ""),
]
PROSE = "it depends on what one means by a point, which we leave open"
EXAMPLES = {
    "gsm8k": Example(
        [
            gsm8k("Eggs?", "3*4=<<3*4=12>>12\n#### 12"),
            gsm8k("Money?", "Lots.\n#### 1,234"),
            gsm8k("Loss?", "Less.\n#### -5"),
            gsm8k("Two marks?", "#### 7\nNo.\n#### 8\n"),
            gsm8k("Lost?", "It is\n#### "),
        ],
        {"Eggs?": "12", "Money?": "1234", "Loss?": "-5", "Two marks?": "8"},
        {"no answer": 1},
    ),
    "math": Example(
        [
            competition("Half?", r"Not \boxed{7} but \boxed{\frac{1}{2}}."),
            competition("Sets?", r"So $\boxed{\left\{1, \frac{2}{3}\right\}}$."),
            competition("Two?", r"It is $\boxed 2$."),
            competition("Unboxed?", "It is 3."),
        ],
        {"Half?": r"\frac{1}{2}", "Sets?": r"\left\{1, \frac{2}{3}\right\}", "Two?": "2"},
        {"no answer": 1},
    ),
    "dapo-math-17k": Example(
        DAPO_BLOCK * 100,  # as on the hub
        {"What is $1+1$?": "2", 'Two lines\n\nof "text"?': "34"},
        {"no answer": 100, "duplicate prompt": 198, "conflicting answers": 200},
    ),
    "dapo-math-17k-processed": Example(
        [
            processed("Sum?", "2"),
            processed("Sum?", "2"),
            processed("Big?", "1234"),
            processed("Big?", "1,234"),
            processed("Which?", "1"),
            processed("Which?", "2"),
        ],
        {"Sum?": "2", "Big?": "1234"},
        {"duplicate prompt": 2, "conflicting answers": 2},
    ),
    "deepscaler": Example(
        [
            solved("Root?", r"3\sqrt{13}"),
            solved("None?", None),
            solved("Prose?", PROSE),
            solved("", "3"),
        ],
        {"Root?": r"3\sqrt{13}"},
        {"no question": 1, "no answer": 1, "gold can't be parsed": 1},
    ),
    "math500": Example(
        [
            solved("Polar?", r"\left( 3, \frac{\pi}{2} \right)"),
            solved("Who?", r"\text{Evelyn}"),
        ],
        {"Polar?": r"\left( 3, \frac{\pi}{2} \right)", "Who?": r"\text{Evelyn}"},
    ),
    "aime24": Example([solved("Aya?", "204"), solved("Bo?", "025")], {"Aya?": "204", "Bo?": "025"}),
    "aime25": Example([solved("Bases?", "70")], {"Bases?": "70"}),
    "amc23": Example(
        [asked("Cities?", "27"), asked("Float?", "27.0")], {"Cities?": "27", "Float?": "27.0"}
    ),
    "amc": Example(
        [
            solved("Floats?", 142.0),
            solved("Half?", 0.5),
            solved("Missing?", None),
            solved("NaN?", float("nan")),
        ],
        {"Floats?": "142", "Half?": "0.5"},
        {"no answer": 2},
    ),
    "minerva": Example(
        [
            asked("Stars?", "4.5e33"),
            asked("Charge?", "-1.6e-19"),
            asked("Line?", "m^{2}+1"),
            asked("Angle?", r"\frac{1}{2} e^{-t}"),
        ],
        {
            "Stars?": r"4.5 \times 10^{33}",
            "Charge?": r"-1.6 \times 10^{-19}",
            "Line?": "m^{2}+1",
            "Angle?": r"\frac{1}{2} e^{-t}",
        },
    ),
    "olympiad": Example(
        [
            olympiad("One?", ["$2$"]),
            olympiad("Both?", ["$-1$, $\\frac{1}{2}$"]),
            olympiad("List?", ["$1$", "$3$"]),
            olympiad("Speed?", ["$5$"], unit="m/s"),
            olympiad("Proof?", None),
            olympiad("Empty?", []),
            olympiad("How far?", ["$7$"], context="A ball rolls."),
        ],
        {
            "A ball rolls.\nHow far?": "7",
            "One?": "2",
            "Both?": r"-1, \frac{1}{2}",
            "List?": "1, 3",
            "Speed?": "5",
        },
        {"no answer": 2},
    ),
    "omni": Example(
        [solved("Odd?", r"\( 2^{n} \)"), solved("All?", PROSE)],
        {"Odd?": r"\( 2^{n} \)"},
        {"gold can't be parsed": 1},
    ),
    "svamp": Example(
        [svamp("Two groups ", "How big?", 145.0), svamp("3 left.", "How many?", 3.0)],
        {"Two groups. How big?": "145", "3 left. How many?": "3"},
    ),
    "asdiv": Example(
        [
            asdiv("Seven apples.", "How many?", "9 (apples)"),
            asdiv("A class.", "How many are they?", "3 (boys), 2  (girls)"),
            asdiv("Two", "are they equal?", "yes"),
            asdiv("Once", "how wide?", "7 (sq. get-well-soon inches)"),
            asdiv("Twice", "what is it?", "2 (x+1)"),
            asdiv("Then,", "what time?", "3:4"),
            asdiv("A number.", "Which?", "-(1/3)"),
            asdiv("They run.", "Who wins?", "Mabel"),
        ],
        {
            "Seven apples. How many?": "9",
            "A class. How many are they?": "3, 2",
            "Two are they equal?": "yes",
            "Once how wide?": "7",
            "Twice what is it?": "2 (x+1)",
            "Then, what time?": "3:4",
            "A number. Which?": "-(1/3)",
            "They run. Who wins?": "Mabel",
        },
    ),
    "mawps": Example(
        [mawps("Seven and 7 ?", 14.0), mawps("Money ?", 9.43), mawps("Left ?", 39)],
        {"Seven and 7 ?": "14", "Money ?": "9.43", "Left ?": "39"},
    ),
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def hub_folder(folder, config, rows_by_split):
    """A copy of a hub's set: parquet files, and a README.md that names the config and splits."""
    lines = ["---", "configs:", f"- config_name: {config or 'default'}", "  data_files:"]
    for split, rows in rows_by_split.items():
        path = folder / (config or "data") / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        lines += [f"  - split: {split}", f"    path: {path.relative_to(folder)}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "A data set."]))
    return folder


def golds_of(task):
    return {problem["prompt"]: problem["answer"] for problem in task.problems}


def write_jsonl(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


# ---- known sets


def test_every_set_has_an_example():
    assert EXAMPLES.keys() == maths.SETS.keys()


@pytest.mark.parametrize("name", [name for name, source in maths.SETS.items() if source.hub_id])
def test_local_copy(tmp_path, name):
    source = maths.SETS[name]
    expected = EXAMPLES[name]
    purpose = next(iter(source.splits))
    folder = tmp_path / (name if len(name) % 2 else source.hub_id)
    other = [{**expected.rows[0], "extra": 1}] * 3
    splits = {source.splits[purpose]: expected.rows, "other": other}
    hub_folder(folder, source.config, splits)
    task = load(name, purpose, root=tmp_path)
    assert golds_of(task) == expected.golds and len(task.problems) == len(expected.golds)
    assert task.counts == expected.counts() and list(task.counts)[:2] == ["rows", "kept"]
    assert task.counts["rows"] == sum(task.counts.values()) - task.counts["rows"]
    for problem in task.problems:
        assert problem["styles"] == source.styles and r"\boxed{}" in problem["instruction"]
        assert task.reward(problem, f"So \\boxed{{{problem['answer']}}}.") == 1.0
        assert task.reward(problem, "So \\boxed{31337}.") == 0.0
        assert task.answer(problem, "So \\boxed{3 }") == "3"
        assert task.answer(problem, "So 3") is None


@pytest.mark.parametrize("name", EXAMPLES)
def test_named_columns(tmp_path, name):
    folder = hub_folder(tmp_path / "mine", None, {"whatever": EXAMPLES[name].rows})
    file = write_jsonl(tmp_path / "mine.jsonl", EXAMPLES[name].rows)
    for path in (folder, file):
        for split in ("train", "test"):  # the only split is the data
            task = load(f"{name}:{path}", split)
            assert golds_of(task) == EXAMPLES[name].golds
            assert task.counts == EXAMPLES[name].counts()


def test_splits_of_a_folder(tmp_path):
    splits = {"train": [gsm8k("Train?", "1")], "test": [gsm8k("Test?", "2")]}
    folder = hub_folder(tmp_path / "two", None, splits)
    for split, question in (("train", "Train?"), ("test", "Test?")):
        assert golds_of(load(str(folder), split)).keys() == {question}


def test_folder_is_read_again(tmp_path):
    for parent, count in (("a", 5), ("b", 3), ("a", 4)):
        rows = [mawps(f"{parent} {i}?", i) for i in range(1, count + 1)]
        folder = hub_folder(tmp_path / parent / "mawps", None, {"train": rows})
        expected = {row["input"]: str(row["target"]) for row in rows}
        assert golds_of(load(f"mawps:{folder}")) == expected


def test_dapo_wrapper(tmp_path):
    hub_folder(tmp_path / "dapo-math-17k", None, {"train": DAPO_BLOCK})
    task = load("dapo-math-17k", root=tmp_path)
    text, _ = render(task.problems[0], None)
    assert text == f"What is $1+1$?\n{maths.INSTRUCTION}\n"


def test_names():
    assert tasks.names("train")[:2] == ["arithmetic", "gsm8k"]
    assert "aime24" in tasks.names("test") and "aime24" not in tasks.names("train")
    assert "asdiv" not in tasks.names("train") + tasks.names("test")


DATA = ROOT.parent / "shared" / "data"
REAL = {  # name -> at least so many of the first 1500 rows are kept, or of 60 where golds are LaTeX
    "gsm8k:gsm8k_train.jsonl": 1500,
    "gsm8k_test.jsonl": 1319,
    "mawps:mawps_singleop.jsonl": 531,
    "mawps_addsub.jsonl": 395,
    "mawps_multiarith.jsonl": 580,
    "svamp.jsonl": 1000,
    "asdiv.jsonl": 1480,
    "aime24.jsonl": 30,
    "amc23.jsonl": 40,
    "minerva_math.jsonl": 55,
    "olympiadbench.jsonl": 55,
}


@pytest.mark.skipif(not DATA.is_dir(), reason="real files are not in the repository")
@pytest.mark.parametrize("name", REAL)
def test_real_files(tmp_path, name):
    schema, colon, file = name.rpartition(":")
    rows = (DATA / file).read_text().splitlines()[: 60 if REAL[name] == 55 else 1500]
    (tmp_path / file).write_text("\n".join(rows))
    task = load(f"{schema}{colon}{tmp_path / file}", "test")
    assert len(task.problems) >= REAL[name]
    for problem in task.problems[:100]:
        assert task.reward(problem, f"\\boxed{{{problem['answer']}}}") == 1.0


# ---- files of a user


@pytest.mark.parametrize("column", ["prompt", "problem", "question"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_plain_files(tmp_path, column, suffix):
    pairs = [("1+1?", "2"), ("1+1?", "2.0"), ("Two\u2028lines?", "3")]
    rows = [{column: question, "answer": answer} for question, answer in pairs]
    path = tmp_path / f"mine{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    task = load(str(path))
    assert golds_of(task) == {"1+1?": "2", "Two\u2028lines?": "3"}
    assert task.counts == {"rows": 3, "kept": 2, "duplicate prompt": 1}


def test_plain_columns(tmp_path):
    rows = [
        {"prompt": [turn("user", "Chat?")], "answer": 5.0},
        {"messages": [turn("user", "Messages?")], "answer": 6},
        {"question": "Hashes?", "answer": "First\n#### 9\nWell.\n####\n1,234\nDone"},
        {"problem": "Box?", "solution": r"Not \boxed{8}, so \boxed{7}."},
        {"problem": "No box?", "solution": "So 7."},
        {"problem": "Nothing?"},
        {"problem": "Twice?", "question": "Twice?", "answer": "8"},  # nothing is lost
    ]
    task = load(write_jsonl(tmp_path / "mine.jsonl", rows))
    expected = {"Chat?": "5", "Messages?": "6", "Hashes?": "1234", "Box?": "7", "Twice?": "8"}
    assert golds_of(task) == expected
    assert task.counts == {"rows": 7, "kept": 5, "no answer": 2} and task.notes == []


NAN = float("nan")


@pytest.mark.parametrize(
    "row, gold",
    [
        ({"problem": None, "question": "?", "answer": 1}, "1"),
        ({"problem": NAN, "question": None, "prompt": "?", "answer": 1}, "1"),
        ({"problem": "?", "answer": None, "solution": r"\boxed{5}"}, "5"),
        ({"problem": "?", "answer": NAN, "solution": r"\boxed{5}"}, "5"),
        ({"problem": "?", "answer": 0, "solution": r"\boxed{5}"}, "0"),
        ({"problem": "?", "answer": -0.0}, "0"),
        ({"problem": "?", "answer": False, "solution": r"\boxed{5}"}, "False"),
        ({"problem": "?", "answer": "", "solution": r"\boxed{5}"}, None),
    ],
)
def test_null_hides_nothing(row, gold):
    problems, _ = maths.select([row], maths.plain)
    assert problems == ([{"prompt": "?", "answer": gold}] if gold else [])


TOLD = ["svamp", "asdiv", "mawps", "olympiad", "dapo-math-17k"]


@pytest.mark.parametrize("name", TOLD)
def test_sets_told_by_their_columns(tmp_path, name):
    task = load(write_jsonl(tmp_path / "mine.jsonl", EXAMPLES[name].rows))
    assert golds_of(task) == EXAMPLES[name].golds
    assert any(name in note for note in task.notes)
    assert task.reward(task.problems[0], f"Answer: {task.problems[0]['answer']}") == 1.0


PARTS = {
    "context": "It rains.",
    "Passage": "It rains.",
    "choices": ["1", "2"],
    "options": {"A": "1"},
    "input": 2,  # as the answer
    "instruction": "Say no.",
    "system": "You are Bob.",
    "body": "Three apples.",
}


@pytest.mark.parametrize("column", PARTS)
def test_part_of_a_question_is_not_lost(tmp_path, column):
    rows = [{"problem": "One?", "answer": 1}, {"problem": "Two?", "answer": 2}]
    for nothing in (None, "", [], NAN):
        full = [{**row, column: nothing} for row in rows]
        assert len(load(write_jsonl(tmp_path / "a.jsonl", full)).problems) == 2
    rows[1][column] = PARTS[column]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for schema in ("", "deepscaler:"):
        with pytest.raises(UserError, match=f"{column}.*NAME:PATH") as error:
            load(f"{schema}{path}")
        assert "\n" not in str(error.value)


def test_gold_of_a_large_float():
    """Its digits behind the sixteenth are nobody's answer."""
    assert (
        maths.gold_text(1e300) == r"1 \times 10^{300}" and maths.gold_text(1e15) == "1" + "0" * 15
    )


def test_only_the_unit_of_a_number_is_cut():
    for answer, gold in (("9 (apples)", "9"), ("f (x)", "f (x)"), ("-(1/3)", "-(1/3)")):
        assert maths.asdiv(asdiv("", "", answer))[1] == gold


def test_set_of_another_schema_loses_nothing(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [asdiv("Two apples.", "How many?", "2 (apples)")])
    with pytest.raises(UserError, match="body"):
        load(f"gsm8k:{path}")
    path = write_jsonl(tmp_path / "b.jsonl", [{**mawps("2", 4), "instruction": "Double it."}])
    with pytest.raises(UserError, match="instruction"):
        load(path)


def test_unknown_columns_are_named(tmp_path):
    rows = [
        {"problem": "One?", "question": "One?", "answer": 1, "id": 3, "Level": "5", "topping": "x"},
        {"problem": "Two?", "question": "2?", "answer": 2, "Subject": "y", "\x1b[2Jtop": 0},
    ]
    task = load(write_jsonl(tmp_path / "a.jsonl", rows))
    (note,) = task.notes
    assert all(name in note for name in ("topping", "question", r"\x1b[2Jtop"))
    assert not re.search("id|Level|answer|Subject|\x1b", note)
    problems = encode(task.problems, tokenizer(), 100)
    assert note in describe(task, problems, tokenizer(), 100)


# ---- chats


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


CHAT = [
    turn("system", "Be brief."),
    turn("user", "x=7"),
    turn("assistant", "OK"),
    turn("user", "x+1?"),
]
WRAPPED = [turn("system", "Be brief."), turn("user", WRAPPER.format("x+1?"))]
BAD_CHATS = [
    ([turn("user", "?"), turn("assistant", "!")], "end with the user"),
    ([turn("system", "?")], "end with the user"),
    ([turn("", "?")], "unknown role"),
    ([turn("human", "?")], "unknown role"),
    ([turn(None, "?")], "unknown role"),
    ([turn(["user"], "?")], "unknown role"),
    ([{"content": "?"}], "unknown role"),
    ([{"role": "user"}], "a turn that is not text"),
    ([turn("user", None)], "a turn that is not text"),
    ([turn("user", [{"type": "text", "text": "?"}])], "a turn that is not text"),
    ([turn("user", "?", images=["a.png"])], "more than text"),
    ([turn("user", "a"), turn("assistant", "", tool_calls=[{}]), turn("user", "b")], "more than"),
    ([turn("system", "\ud800"), turn("user", "?")], "not Unicode"),
    (["What?"], "a prompt that is not text"),
    ([["What?", "How?"]], "a prompt that is not text"),
    (7, "a prompt that is not text"),
    (True, "a prompt that is not text"),
    ({"role": "user", "content": "?"}, "a prompt that is not text"),
    ("a \ud800 b", "not Unicode"),
]


@pytest.mark.parametrize("chat, reason", BAD_CHATS)
@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_bad_chats(chat, reason, column):
    rows = [{column: chat, "answer": 1}, {column: CHAT, "answer": 8}]
    problems, tally = maths.select(rows, maths.plain)
    assert len(problems) == 1 and tally.counts["kept"] == 1
    assert [n for key, n in tally.counts.items() if reason in key] == [1]


def test_chat_is_kept_whole(tmp_path):
    rows = [
        {"prompt": CHAT, "answer": 8},
        {"prompt": CHAT, "answer": 8},
        {"prompt": [turn("user", "x=6"), *CHAT[2:]], "answer": 7},
        {"prompt": CHAT[3:], "answer": 9},
        {"prompt": WRAPPED, "answer": 8},
        {"prompt": [CHAT[0], turn("user", " \n")], "answer": 8},
    ]
    task = load(write_jsonl(tmp_path / "a.jsonl", rows))
    assert task.counts == {"rows": 6, "kept": 4, "duplicate prompt": 1, "no question": 1}
    first, second, single, wrapped = task.problems
    assert first["messages"] == CHAT and first["prompt"].count("x=7") == 1
    assert second["messages"][0]["content"] == "x=6"
    assert single["prompt"] == "x+1?" and "messages" not in single
    assert wrapped["messages"] == [CHAT[0], turn("user", "x+1?")]
    text, how = render(first, tokenizer(TEMPLATE))
    start = "<bos>[system] Be brief. [user] x=7 [assistant] OK [user] x+1?\n"
    assert (text, how) == (f"{start}{maths.INSTRUCTION} [assistant] ", "chat template")
    text, how = render(first, None)
    start = "System: Be brief.\n\nUser: x=7\n\nAssistant: OK\n\nUser: x+1?\n"
    assert (text, how) == (f"{start}{maths.INSTRUCTION}\n\nAssistant:", "plain")


TURNS = st.lists(
    st.builds(turn, st.sampled_from(["system", "user", "assistant", "tool"]), st.text(max_size=5)),
    max_size=4,
)


@given(TURNS)
def test_every_turn_is_rendered(chat):
    try:
        problem = as_prompt(chat)
    except data_rows.Malformed:
        assert chat[-1]["role"] != "user" or "tool" in [each["role"] for each in chat]
        return
    text, _ = render(problem, None)
    if problem["prompt"] and len(chat) > 1:
        assert problem["messages"] == chat
    if problem["prompt"]:
        assert all(each["content"].strip() in text for each in chat)


# ---- files that are damaged or strange

GOOD = {"prompt": "One?", "answer": 1}


def encoded(rows, encoding):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_encodings(tmp_path, encoding, suffix):
    path = tmp_path / f"a{suffix}"
    texts = {
        ".jsonl": '{"prompt": "Wieviele Äpfel? 🍎", "answer": 7}\r\n',
        ".json": '[{"prompt": "Wieviele Äpfel? 🍎", "answer": 7}]',
        ".csv": "prompt,answer\r\nWieviele Äpfel? 🍎,7\r\n",
    }
    mark = {"utf-16-le": "\ufeff", "utf-16-be": "\ufeff"}.get(encoding, "")
    path.write_bytes((mark + texts[suffix]).encode(encoding))
    assert golds_of(load(str(path))) == {"Wieviele Äpfel? 🍎": "7"}


STRANGE_ROWS = [
    ('{"prompt": "a \\ud800 b", "answer": 1}', "not Unicode"),
    ('{"prompt": "a", "answer": "\\ud800"}', "not Unicode"),
    ('{"prompt": "a", "answer": Infinity}', "not finite"),
    ('{"prompt": "a", "answer": -Infinity}', "not finite"),
    ('{"prompt": "a", "answer": 1e400}', "not finite"),
    ('{"prompt": "a", "answer": NaN}', "no answer"),
    ('{"prompt": "a", "answer": "nan"}', "no answer"),
    ('{"prompt": "a", "answer": [1]}', "not text"),
    ('{"prompt": "a", "answer": {"value": 1}}', "not text"),
    ('{"prompt": "a", "answer": ' + "7" * 5000 + "}", "parsed"),
    ('{"prompt": "a", "answer": "' + "{" * 900 + '"}', "parsed"),
    ('{"answer": 1, "prompt": ' + "[" * 400 + "]" * 400 + "}", "not text"),
    ('{"prompt": [[], []], "answer": 1}', "not text"),
    ('{"prompt": 7, "answer": 1}', "not text"),
    ('{"prompt": true, "answer": 1}', "not text"),
    ('{"answer": 1}', "no question"),
    ("[1, 2]", "not an object"),
    ('"text"', "not an object"),
    ("null", "not an object"),
    ("{}", "no question"),
]


@pytest.mark.parametrize("line, reason", STRANGE_ROWS)
def test_strange_rows(tmp_path, line, reason):
    for position in range(2):
        lines = [json.dumps(GOOD)] * 2
        lines[position] = line
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        (tmp_path / "a.json").write_text(f"[{','.join(lines)}]")
        for suffix in (".jsonl", ".json"):
            task = load(str(tmp_path / f"a{suffix}"))
            assert golds_of(task) == {"One?": "1"}
            assert sum(task.counts.values()) == 4
            assert [n for key, n in task.counts.items() if reason in key] == [1]


STRANGE_FILES = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n \n",
    "empty.json": b"",
    "none.json": b"[]",
    "object.json": b'{"prompt": "a", "answer": 1}',
    "number.json": b"7",
    "torn.jsonl": b'{"prompt": "a", "answer": 1}\n{"prompt": "b", "ans',
    "deep.json": b"[" * 100_000,
    "deep.jsonl": b"[" * 100_000,
    "latin.jsonl": '{"prompt": "Äpfel?", "answer": 7}'.encode("latin-1"),
    "torn.json": b"\xff\xfe\x00",
    "binary.jsonl": bytes(range(256)),
    "empty.csv": b"",
    "header.csv": b"prompt,answer\n",
    "twice.csv": b"prompt,answer,answer\na,1,2\n",
    "quote.csv": b'prompt,answer\n"a,1\nb,2\n',
    "long.csv": b"prompt,answer\na,1,2\nb\n",
    "empty.parquet": b"",
    "torn.parquet": b"PAR1 and then nothing",
    "escape.json": b'[{"\\u001b[2Jprompt\\n": "a", "answer": 1}]',
    "\x1b[2J.json": b"7",
}


@pytest.mark.parametrize("name", STRANGE_FILES)
def test_strange_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(STRANGE_FILES[name])
    for schema in ("", "gsm8k:"):
        with pytest.raises(UserError) as error:
            load(schema + name)
        assert str(error.value).isprintable() and len(str(error.value)) < 1000
        assert name.replace("\x1b", r"\x1b") in str(error.value)


@pytest.mark.parametrize("name", ["", "\x00", "x" * 5000, "gsm8k:" + "x" * 5000, "gsm8k:"])
def test_strange_names(name):
    with pytest.raises(UserError) as error:
        load(name)
    assert str(error.value).isprintable()


def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        load(str(tmp_path / "a.jsonl"))


def test_folder_without_data(tmp_path):
    (tmp_path / "notes.txt.bak").write_text("a")
    with pytest.raises(UserError) as error:
        load(str(tmp_path))
    assert str(error.value).isprintable()


def test_csv(tmp_path):
    cells = (
        'id,prompt,answer\n1,"Two\nlines, ""quoted""?",7\n2,Nothing?,\n3,Long?,1,2\n\n4,Zero?,0\n'
    )
    (tmp_path / "a.csv").write_text(cells + f"5,{'x' * 200_000}?,3\n")
    task = load(str(tmp_path / "a.csv"))
    golds = golds_of(task)
    assert list(golds.values()) == ["7", "0", "3"] and 'Two\nlines, "quoted"?' in golds
    assert task.counts["rows"] == 5 and task.counts["no answer"] == 1
    assert [row["id"] for row in local_rows(tmp_path / "a.csv", "train") if "id" in row][-1] == "5"


def test_empty_cell_of_a_csv_hides_nothing(tmp_path):
    text = "problem,question,answer,solution\n,What?,,So \\boxed{5}.\nWhich?,,0,\n"
    (tmp_path / "a.csv").write_text(text)
    assert golds_of(load(str(tmp_path / "a.csv"))) == {"What?": "5", "Which?": "0"}


def test_open_quote_of_a_csv_swallows_no_rows(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,answer\na,1\nb,"2\nc,3\n')
    with pytest.raises(UserError, match="a.csv"):
        load(str(tmp_path / "a.csv"))


def test_parquet_of_odd_types(tmp_path):
    import datetime

    table = pyarrow.table(
        {
            "prompt": ["a?", "b?", "c?", "d?"],
            "answer": [Decimal("1.50"), Decimal("2.00"), None, Decimal("4.25")],
            "when": [datetime.datetime(2024, 1, 1)] * 4,
            "bytes": [b"\xff"] * 4,
            "pairs": pyarrow.array(
                [[("x", 1)]] * 4, pyarrow.map_(pyarrow.string(), pyarrow.int64())
            ),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    task = load(str(tmp_path / "a.parquet"))
    assert golds_of(task) == {"a?": "1.50", "b?": "2.00", "d?": "4.25"}
    table = pyarrow.table({"prompt": [b"\xff"], "answer": [datetime.date(2024, 1, 1)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="not text"):
        load(str(tmp_path / "a.parquet"))


QUESTIONS = st.sampled_from(["a?", "b?", "c?", "", None])
ANSWERS = st.sampled_from(["1", "2", "1.0", "", None, r"\frac{", "1/0/"])


@settings(max_examples=100)
@given(st.lists(st.tuples(QUESTIONS, ANSWERS), min_size=1, max_size=12))
def test_select(pairs):
    rows = [{"problem": question, "answer": answer} for question, answer in pairs]
    problems, tally = maths.select(rows, maths.plain)
    golds = {problem["prompt"]: problem["answer"] for problem in problems}
    counts = tally.counts
    assert sum(counts.values()) == 2 * counts["rows"] == 2 * len(rows)
    assert counts["kept"] == len(golds)
    for question, gold in golds.items():
        answers = {answer for asked, answer in pairs if asked == question and answer}
        assert question and gold in answers and parses(gold)
        assert answers <= {"1", "1.0"} or len(answers) == 1


COLUMNS = ["prompt", "problem", "question", "answer", "final_answer", "solution", "reward_model"]
COLUMNS += ["Body", "Question", "Answer", "body", "input", "target"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 30),
    st.floats(),
    st.sampled_from(["", "2", "1+1?", r"\frac{", "#### 3", "user"]),
)
KEYS = st.sampled_from(["role", "content", "ground_truth"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=6), min_size=1, max_size=3
)
READERS = [source.read for source in maths.SETS.values()] + [maths.plain]


@settings(max_examples=150)
@example([{"prompt": 5, "answer": "5"}], maths.plain)
@example(
    [{"prompt": [{"role": "user", "content": [{"type": "text"}]}], "answer": "5"}], maths.plain
)
@example([{"prompt": "1+1?", "answer": 2}], maths.plain)
@given(ROWS, st.sampled_from(READERS))
def test_rows_of_any_shape(rows, read):
    problems, tally = maths.select(rows, read)
    counts = tally.counts
    assert sum(counts.values()) == 2 * counts["rows"] == 2 * len(rows)
    assert counts["kept"] == len(problems) == len({problem["prompt"] for problem in problems})
    for problem in problems:
        assert isinstance(problem["prompt"], str) and isinstance(problem["answer"], str)
        assert render(problem, None)[0].isascii()


ERRORS = [
    ("no-such-data", "train", "unknown"),
    ("gsm8k", "train", "hf download"),
    ("aime24", "train", "evaluation"),
    ("dapo-math-17k", "test", "training"),
    ("asdiv", "test", "asdiv:PATH"),
    ("mawps", "train", "mawps:PATH"),
    ("gsm8k:nowhere.jsonl", "train", "nowhere.jsonl"),
    ("nothing:columns.jsonl", "train", "unknown"),
    ("gsm8k:columns.jsonl", "train", "malformed: 1"),
    ("empty", "train", "empty"),
    ("a.txt", "train", "a.txt"),
    ("broken.jsonl", "train", "broken.jsonl"),
    ("list.json", "train", "list.json"),
    ("columns.jsonl", "train", "NAME:PATH"),
    ("useless.jsonl", "train", "no answer: 1"),
]


@pytest.mark.parametrize("name, split, word", ERRORS)
def test_errors(tmp_path, monkeypatch, name, split, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a?", "ans')
    (tmp_path / "list.json").write_text('{"prompt": "a?", "answer": "1"}')
    (tmp_path / "columns.jsonl").write_text('{"prompt": "a?", "reply": "b"}')
    (tmp_path / "useless.jsonl").write_text('{"prompt": "a?", "answer": ""}')
    with pytest.raises(UserError, match=re.escape(word)) as error:
        load(name, split)
    assert "\n" not in str(error.value)


def test_missing_data_root(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load("gsm8k", root=tmp_path / "nowhere")


# ---- a task in Python

RHYMES = """
from dataclasses import dataclass

@dataclass
class Word:
    text: str

def load(split):
    return [{"prompt": f"{split} {i}", "word": Word("moon")} for i in range(3)]

def reward(problem, text):
    return -0.5 if problem["word"].text in text else len(text)

def answer(problem, text):
    return text.lower() or None
"""


def write_task(folder, source, name="mine.py"):
    path = folder / name
    path.write_text(source)
    return str(path)


def test_own_task(tmp_path):
    path = write_task(tmp_path, RHYMES)
    task = load(path, "test")
    assert task.name == path and task.counts == {"rows": 3, "kept": 3}
    assert [problem["prompt"] for problem in task.problems] == ["test 0", "test 1", "test 2"]
    assert task.reward(task.problems[0], "soon") == 4.0
    assert isinstance(task.reward(task.problems[0], "soon"), float)
    assert task.reward(task.problems[0], "moon") == -0.5
    assert task.answer(task.problems[0], "Soon") == "soon"
    assert task.answer(task.problems[0], "") is None
    assert render(task.problems[0], None) == ("test 0", "plain")


def test_own_task_without_votes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path, RHYMES.replace("def answer", "def other"))
    assert load("mine.py").answer is None


def test_two_own_tasks(tmp_path):
    """Files of the same name in two folders, and a file named after a module of Python's."""
    (tmp_path / "other").mkdir()
    first = write_task(tmp_path, RHYMES, "random.py")
    second = write_task(tmp_path / "other", RHYMES.replace("moon", "sun"), "random.py")
    problems = [load(path).problems[0] for path in (first, second)]
    assert [problem["word"].text for problem in problems] == ["moon", "sun"]
    assert load("arithmetic").problems  # Python's own random is still there


def task_of(load=lambda split: [{"prompt": "x"}], **functions):
    module = SimpleNamespace(load=load, reward=lambda problem, text: 0.0)
    vars(module).update(functions)
    return tasks.module_task("mine.py", module, "train")


NUMBERS = st.one_of(
    st.floats(),
    st.integers(),
    st.booleans(),
    st.fractions(),
    st.decimals(allow_nan=False, allow_infinity=False),
    st.sampled_from([10**400, -(10**400)]),
)
NO_NUMBERS = st.one_of(
    st.none(), st.text(), st.binary(), st.lists(st.floats()), st.complex_numbers(), st.just(print)
)


def is_finite(value):
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


@example(Fraction(1, 3))
@example(Decimal("0.1"))
@given(NUMBERS)
def test_reward_is_any_finite_number(value):
    task = task_of(reward=lambda problem, text: value)
    if is_finite(value):
        assert task.reward({}, "") == float(value)
        assert type(task.reward({}, "")) is float
    else:
        with pytest.raises(UserError, match="mine.py"):
            task.reward({}, "")


@given(NO_NUMBERS)
def test_reward_is_nothing_else(value):
    task = task_of(reward=lambda problem, text: value)
    with pytest.raises(UserError, match="mine.py.*finite number"):
        task.reward({}, "")


def test_reward_of_libraries():
    import numpy
    import torch

    for value in (numpy.float32(0.5), numpy.array(0.5), torch.tensor(0.5)):
        assert task_of(reward=lambda problem, text, value=value: value).reward({}, "") == 0.5
    for value in (numpy.ones(2), torch.ones(2), torch.tensor(float("nan"))):
        with pytest.raises(UserError, match="finite number"):
            task_of(reward=lambda problem, text, value=value: value).reward({}, "")


@given(VALUES | st.lists(st.fixed_dictionaries({"prompt": SCALARS, "instruction": SCALARS})))
def test_load_returns_anything(value):
    try:
        task = task_of(load=lambda split: value)
    except UserError as error:
        assert "mine.py" in str(error) and "\n" not in str(error)
        return
    assert task.problems == value
    assert all(isinstance(problem["prompt"], str) for problem in task.problems)
    assert all(isinstance(render(problem, None)[0], str) for problem in task.problems)


@pytest.mark.parametrize(
    "problem",
    [
        {"prompt": "\ud800"},
        {"prompt": "a", "instruction": "\ud800"},
        {"prompt": "a", "messages": 5},
        {"prompt": "a", "messages": [turn("user", 5)]},
        {"prompt": "a", "messages": CHAT[:3]},
    ],
)
def test_own_problems_are_text(problem):
    with pytest.raises(UserError, match="mine.py") as error:
        task_of(load=lambda split: [{"prompt": "good", "messages": CHAT}, problem])
    assert str(error.value).isprintable()


def test_load_may_be_a_generator():
    task = task_of(load=lambda split: ({"prompt": word} for word in ("a", "b")))
    assert task.problems == [{"prompt": "a"}, {"prompt": "b"}]


def test_answer_must_be_hashable():
    task = task_of(answer=lambda problem, text: [text])
    with pytest.raises(UserError, match="mine.py.*unhashable"):
        task.answer({}, "")


def test_what_a_reward_raises():
    def reward(problem, text):
        raise KeyError("no\nsuch key")

    with pytest.raises(UserError, match="mine.py.*KeyError") as error:
        task_of(reward=reward).reward({}, "")
    assert "\n" not in str(error.value) and isinstance(error.value.__cause__, KeyError)
    with pytest.raises(UserError, match="^own words$"):
        task_of(reward=raising(UserError("own words"))).reward({}, "")
    with pytest.raises(KeyboardInterrupt):
        task_of(reward=raising(KeyboardInterrupt())).reward({}, "")


def raising(error):
    def function(*arguments):
        raise error

    return function


WRONG_FILES = [
    (None, "no such file"),
    ("def load(split):\n    return []", "reward"),
    ("def reward(problem, text):\n    return 1", "load"),
    ("load = 1\nreward = 2", "load"),
    ("import os\n\n1 / 0", "line 3.*ZeroDivisionError"),
    ("import no_such_library", "line 1.*no_such_library"),
    ("def load(split)", "SyntaxError"),
    (RHYMES.replace("return [{", "return [split][5] or [{"), "line 9.*load.*IndexError"),
    (RHYMES.replace('"prompt"', '"question"'), "prompt"),
    ("def load():\n    return []\n\n\ndef reward(problem, text):\n    return 1", "TypeError"),
]


@pytest.mark.parametrize("source, words", WRONG_FILES)
def test_wrong_task_file(tmp_path, source, words):
    path = str(tmp_path / "mine.py")
    if source is not None:
        write_task(tmp_path, source)
    with pytest.raises(UserError, match=f"mine.py.*{words}") as error:
        load(path)
    assert "\n" not in str(error.value)


# ---- the embedded task


def test_arithmetic():
    task = load("arithmetic")
    test = load("arithmetic", "test")
    assert task.counts == {"rows": 10_000, "kept": 10_000} and len(test.problems) == 500
    prompts = {problem["prompt"] for problem in task.problems}
    assert len(prompts) == 10_000
    assert not prompts & {problem["prompt"] for problem in test.problems}
    for problem in task.problems[:200] + test.problems[:200]:
        digits = problem["prompt"].rstrip("=").split("+")
        assert sum(map(int, digits)) == int(problem["answer"])
        assert render(problem, None) == (problem["prompt"], "plain")


def test_splits_of_other_seeds():
    train = {problem["prompt"] for problem in arithmetic.problems("train", 2000, seed=5)}
    assert not train & {problem["prompt"] for problem in arithmetic.problems("test", 500, seed=6)}


def test_solution():
    for problem in arithmetic.load("test")[:200]:
        text = arithmetic.solution(problem["prompt"])
        assert arithmetic.reward(problem, text) == 1.0
        for terms, total in re.findall(r"(?=(?:^|=)([0-9]+\+[0-9]+)=([0-9]+))", text):
            assert sum(map(int, terms.split("+"))) == int(total)
        lazy = arithmetic.solution(problem["prompt"], steps=1)
        assert arithmetic.reward(problem, lazy) == 0.0


SUMS = [("3+4=7#7", "7"), ("7", None), ("#", ""), ("#1#2 ", "2"), ("", None)]


@pytest.mark.parametrize("text, expected", SUMS)
def test_arithmetic_answer(text, expected):
    assert arithmetic.answer({}, text) == expected


def test_arithmetic_reward_is_literal():
    problem = {"prompt": "3+4+8=", "answer": "15"}
    assert arithmetic.reward(problem, "3+4=7+8=15#15") == 1.0
    for text in ("#7+8", "#15.0", "#015", "15", "#15#", "", "#" + " " * 2000):
        assert arithmetic.reward(problem, text) == 0.0


@given(st.text())
def test_arithmetic_reward_of_any_text(text):
    assert arithmetic.reward({"answer": "8675309"}, text) == 0.0
    assert arithmetic.reward({"answer": "8675309"}, text + "#8675309") == 1.0


def test_held_out_prompts():
    """The committed model was trained without them: with another rule its score would be false."""
    prompts = [f"{a}+{b}+3+4=" for a in range(1, 10) for b in range(1, 10)]
    expected = "13 31 36 43 49 75 76 82 95"
    held_out = [prompt for prompt in prompts if arithmetic.is_held_out(prompt)]
    assert held_out == [f"{pair[0]}+{pair[1]}+3+4=" for pair in expected.split()]


# ---- order


@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 20), st.integers(0, 3))
def test_take(size, cursor, count, seed):
    problems = list(range(size))
    stream = take(problems, 0, cursor + count, seed)
    assert take(problems, cursor, count, seed) == stream[cursor:]
    for start in range(0, len(stream) - size + 1, size):
        assert sorted(stream[start : start + size]) == problems


def test_take_orders():
    orders = [tuple(take(range(50), 50 * n, 50, seed)) for n in range(2) for seed in range(2)]
    assert len(set(orders)) == 4


def test_take_order_of_old_runs():
    """A resumed run and a published one depend on it."""
    assert take(range(10), 7, 6, 1) == [6, 3, 1, 8, 9, 1]


# ---- prompts


def tokenizer(chat_template=None):
    """Splits at spaces and line ends; writes a beginning-of-text token of its own, as Llama's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<bos>": 0, "?": 1}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    result = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", unk_token="?")
    result.chat_template = chat_template
    return result


TEMPLATE = (
    "<bos>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
PROBLEMS = [
    {"prompt": "a b c", "answer": "1", "instruction": "Think hard."},
    {"prompt": "a b c d e f", "instruction": "Think hard."},
]


def test_render():
    chat = "<bos>[user] a b c\nThink hard. [assistant] "
    assert render(PROBLEMS[0], tokenizer(TEMPLATE)) == (chat, "chat template")
    assert render(PROBLEMS[0], tokenizer()) == ("a b c\nThink hard.\n", "plain")
    assert render({"prompt": "a b"}, tokenizer()) == ("a b", "plain")


@pytest.mark.parametrize("template, length", [(TEMPLATE, 8), (None, 6)])
def test_encode(template, length):
    before = [dict(problem) for problem in PROBLEMS]
    for limit in range(length, length + 5):
        problems = encode(PROBLEMS, tokenizer(template), limit)
        assert len(problems) == 2 - (limit < length + 3)
        lengths = [len(problem["prompt_ids"]) for problem in problems]
        assert lengths == [length, length + 3][: len(problems)]
        # exactly one beginning of text, whoever writes it
        assert all(problem["prompt_ids"].count(0) == 1 for problem in problems)
    assert before == PROBLEMS
    with pytest.raises(UserError, match="longer"):
        encode(PROBLEMS, tokenizer(template), length - 1)


def test_describe():
    counts = {"rows": 1234, "kept": 2, "no answer": 1232}
    task = tasks.Task("mine", PROBLEMS, None, None, counts)
    problems = encode(PROBLEMS, tokenizer(), 6)
    text = describe(task, problems, tokenizer(), 6)
    for part in ("mine: 1,234 rows", "1 longer than 6", "plain", r"hard.\n", "gold answer '1'"):
        assert part in text
    assert "gold" not in describe(task, PROBLEMS[1:], tokenizer(), 6)


def test_describe_prints_no_escape_sequence():
    counts = {"rows": 1, "kept": 1}
    task = tasks.Task("\x1b[2J", [{"prompt": "a\x1b[2J"}], None, None, counts)
    text = describe(task, encode(task.problems, tokenizer(), 9), tokenizer(), 9)
    assert all(line.isprintable() for line in text.split("\n"))


def test_empty_prompt():
    bare = tokenizer()
    bare.backend_tokenizer.post_processor = None
    with pytest.raises(UserError, match="empty"):
        encode([{"prompt": "a"}, {"prompt": ""}], bare, 9)


RENDERED = [
    ("<bos>[user] a b\n", TEMPLATE, True),
    ("  <bos>[user] a b", None, True),
    ("<|turn|>user\na<|turn|>assistant\n", "<|turn|>{{ messages[0]['content'] }}", True),
    ("[INST] a [/INST]", "[INST] {{ messages[0]['content'] }} [/INST]", True),
    ("<|turn|>user a", TEMPLATE, False),
    ("<x, y> = 0?", TEMPLATE, False),
    ("<i>a</i>", TEMPLATE, False),
    ("What does <bos> mean?", TEMPLATE, False),
    ("a b", TEMPLATE, False),
]


@pytest.mark.parametrize("prompt, template, rendered", RENDERED)
def test_already_rendered(tmp_path, prompt, template, rendered):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": prompt, "answer": 1}])
    problem = load(path).problems[0]
    text, how = render(problem, tokenizer(template))
    assert (how == "already rendered") == rendered
    if rendered:
        assert text == prompt  # with the line break that ends it
    else:
        assert prompt in text and maths.INSTRUCTION in text
    (problem,) = encode([problem], tokenizer(template), 99)
    assert problem["prompt_ids"].count(0) == (2 if "What does" in prompt else "bos" in text)


def test_messages_are_rendered_whatever_the_prompt_says():
    problem = {"prompt": "<bos>a", "messages": CHAT}
    text, how = render(problem, tokenizer(TEMPLATE))
    assert how == "chat template" and "x=7" in text


def test_describe_counts_prompts_already_rendered():
    problems = [{"prompt": text} for text in ("<bos>a", "b", "c")]
    task = tasks.Task("mine", problems, None, None, {"rows": 3, "kept": 3})
    problems = encode(problems, tokenizer(TEMPLATE), 9)
    text = describe(task, problems, tokenizer(TEMPLATE), 9)
    assert "1 already rendered, 2 chat template" in text


LONG = "{% for i in range(90000) %}{% for j in range(90000) %}LOOP{% endfor %}{% endfor %}"
BAD_TEMPLATES = {
    "raises": "{{ raise_exception('no \x1b[2J system\n turns') }}",
    "syntax": "{% if",
    "unknown": "{{ messages[5]['content']['x']['y'] }}",
    "loops": LONG.replace("LOOP", ""),
    "prints": LONG.replace("LOOP", "x" * 50_000),
    "huge": "{{ 'x' * 3_000_000_000 }}",
    "long": "{{ 'x' * 6_000_000 }}",
    "surrogate": "{{ '\\ud800' }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_bad_chat_template(monkeypatch, name):
    monkeypatch.setattr(tasks.prompts, "RENDER_SECONDS", 0.5)
    bad = tokenizer(BAD_TEMPLATES[name])
    before = signal.getsignal(signal.SIGALRM)
    others = signal.getitimer(signal.ITIMER_REAL)
    start = time.monotonic()
    with pytest.raises(UserError, match="chat template") as error:
        render({"prompt": "a"}, bad)
    assert time.monotonic() - start < 30
    assert str(error.value).isprintable() and len(str(error.value)) < 500
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) <= others  # which is 0 where there is none
    monkeypatch.undo()
    assert render({"prompt": "a"}, tokenizer(TEMPLATE))[0] == "<bos>[user] a [assistant] "


def test_template_that_refuses_system_turns():
    """As Gemma's."""
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system!') }}{% endif %}"
    )
    problem = as_prompt([turn("system", "Be brief."), turn("user", "a")])
    with pytest.raises(UserError, match="system, user.*No system!"):
        render(problem, tokenizer(refusing + TEMPLATE))
    assert render({"prompt": "a"}, tokenizer(refusing + TEMPLATE))[1] == "chat template"


def test_other_timers_and_threads():
    """A time limit of somebody else goes on, and another thread has no signals."""
    fired = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: fired.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    texts = []
    thread = threading.Thread(
        target=lambda: texts.append(render({"prompt": "a"}, tokenizer(TEMPLATE))[0])
    )
    thread.start()
    thread.join()
    texts.append(render({"prompt": "a"}, tokenizer(TEMPLATE))[0])
    end = time.monotonic() + 5
    while not fired and time.monotonic() < end:
        time.sleep(0.01)
    signal.signal(signal.SIGALRM, before)
    assert fired and texts == ["<bos>[user] a [assistant] "] * 2


# ---- thoughts


THOUGHT = r"I guess \boxed{5}."
FINAL = r"So \boxed{6}."


@pytest.mark.parametrize(
    "opened, text, right",
    [
        (False, f"<think>{THOUGHT}</think>{FINAL}", "6"),
        (False, f"<think>{THOUGHT}", None),
        (False, THOUGHT, "5"),
        (True, f"{THOUGHT}</think>{FINAL}", "6"),
        (True, THOUGHT, None),
    ],
)
def test_thoughts(tmp_path, opened, text, right):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "5"}])
    chat = tokenizer(TEMPLATE + ("{{ '<think>\\n' }}" if opened else "<think></think>"))
    for judge_thoughts in (False, True):
        task = load(path, judge_thoughts=judge_thoughts)
        (problem,) = encode(task.problems, chat, 99)
        found = task.answer(problem, text)
        assert found == (right if not judge_thoughts else "6" if "6" in text else "5")
        assert task.reward({**problem, "answer": "5"}, text) == (found == "5")


# ---- golds that can serve


def latex_rows(path, count=3):
    rows = [{"prompt": f"{i}?", "answer": rf"\sqrt{{{i + 2}}}"} for i in range(count)]
    return write_jsonl(path, [*rows, {"prompt": "Bad?", "answer": r"\frac{"}])


def cache_file(folder):
    (file,) = (folder / "xdg" / "tepo-cast").iterdir()
    return file


def test_golds_are_remembered(tmp_path, monkeypatch):
    path = latex_rows(tmp_path / "a.jsonl")
    first = load(path)
    assert first.counts == {"rows": 4, "kept": 3, "gold can't be parsed": 1}
    before = cache_file(tmp_path).read_text()
    asked = []
    monkeypatch.setattr(maths, "parses", lambda gold: asked.append(gold) or parses(gold))
    assert load(path) == first and asked == [r"\frac{"]  # one that can't serve is asked for again
    assert load(latex_rows(tmp_path / "a.jsonl", 4)).counts["kept"] == 4
    assert asked[1:] == [r"\frac{", r"\sqrt{5}"]
    after = cache_file(tmp_path).read_text()
    assert set(before.split("\n")) < set(after.split("\n"))


def test_another_verifier_forgets(tmp_path, monkeypatch):
    load(latex_rows(tmp_path / "a.jsonl"))
    before = set(cache_file(tmp_path).read_text().split("\n"))
    (tmp_path / "verify.py").write_text("other source")
    monkeypatch.setattr(maths, "VERIFIER", [*maths.VERIFIER[1:], tmp_path / "verify.py"])
    load(latex_rows(tmp_path / "a.jsonl"))
    after = set(cache_file(tmp_path).read_text().split("\n"))
    assert len(after) == len(before) == 3 and not after & before


def test_verifier_is_all_that_judges():
    """What verify.py imports from tasks/, or runs in its worker, belongs to its identity."""
    names = {path.name for path in maths.VERIFIER}
    for path in maths.VERIFIER:
        for module in re.findall(
            r"^\s*(?:from|import) tasks\.(\w+)", path.read_text(), re.MULTILINE
        ):
            assert f"{module}.py" in names


def damage(path, kind):
    if kind == "bytes":
        path.write_bytes(b"\xff\x00" + path.read_bytes()[:50])
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "gone":
        path.unlink()
        path.parent.rmdir()
        path.parent.write_text("a file where the folder was")


@pytest.mark.parametrize("kind", ["bytes", "pipe", "folder", "gone"])
def test_damaged_memory_of_golds(tmp_path, kind):
    path = latex_rows(tmp_path / "a.jsonl")
    first = load(path)
    damage(cache_file(tmp_path), kind)
    assert load(path) == first == load(path)
    if kind != "gone":
        assert len(list((tmp_path / "xdg" / "tepo-cast").iterdir())) == 1


def test_no_home(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    for home in ("/dev/null", ""):
        monkeypatch.setenv("HOME", home)
        assert load(latex_rows(tmp_path / "a.jsonl")).counts["kept"] == 3


def test_interrupted_golds_are_remembered(tmp_path, monkeypatch):
    def interrupted(gold):
        if "4" in gold:
            raise KeyboardInterrupt
        return parses(gold)

    monkeypatch.setattr(maths, "parses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(latex_rows(tmp_path / "a.jsonl"))
    assert len(cache_file(tmp_path).read_text().split("\n")) == 2


def test_progress(tmp_path, monkeypatch, capsys):
    """Only where it takes some seconds, and on standard error."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(maths, "parses", lambda gold: time.sleep(0.15) or True)
    load(latex_rows(tmp_path / "a.jsonl"))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(maths, "PROGRESS_AFTER", 0.1)
    load(latex_rows(tmp_path / "b.jsonl", 6))
    out, err = capsys.readouterr()
    assert out == "" and "golds" in err


# ---- imports


def test_no_large_import():
    code = (
        "import sys, tasks.math, tasks.arithmetic, tasks.safety, tasks.rows, tasks.verify\n"
        "large = {'torch', 'numpy', 'datasets', 'transformers', 'sympy', 'math_verify', 'pyarrow'}"
        "\nprint(sorted(large & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_math_is_tasks_math():
    """An `import math` in tasks/__init__.py would hide tasks/math.py."""
    code = "import tasks; tasks.names('train'); print(tasks.math.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "tasks.math", done.stderr


def test_no_torch_in_tasks():
    for path in (ROOT / "tasks").glob("*.py"):
        assert "import torch" not in path.read_text() and "from torch" not in path.read_text()
