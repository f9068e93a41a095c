"""Problems: every loader on a folder that looks like the hub's, a user's own task, and prompts."""

import json
import math
import re
import subprocess
import sys
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
from tasks import arithmetic, describe, encode, load, render, take
from tasks import math as maths
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


def olympiad(question, final_answer, unit=None):
    row = {"id": 1, "question": question, "solution": ["..."], "final_answer": final_answer}
    return {**row, "unit": unit, "answer_type": "Numerical"}


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
            gsm8k("Lost?", "It is\n#### "),
        ],
        {"Eggs?": "12", "Money?": "1234", "Loss?": "-5"},
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
        ],
        {"One?": "2", "Both?": r"-1, \frac{1}{2}", "List?": "1, 3", "Speed?": "5"},
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
            asdiv("Then,", "what time?", "3:4"),
            asdiv("A number.", "Which?", "-(1/3)"),
            asdiv("They run.", "Who wins?", "Mabel"),
        ],
        {
            "Seven apples. How many?": "9",
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
REAL = {
    "gsm8k:gsm8k_train.jsonl": 7473,
    "gsm8k:gsm8k_test.jsonl": 1319,
    "mawps:mawps_singleop.jsonl": 531,
    "mawps:mawps_addsub.jsonl": 395,
    "mawps:mawps_multiarith.jsonl": 580,
    "svamp:svamp.jsonl": 1000,
    "asdiv:asdiv.jsonl": 2200,
    "aime24:aime24.jsonl": 30,
    "amc23:amc23.jsonl": 40,
    "math:minerva_math.jsonl": 265,
    "olympiad:olympiadbench.jsonl": 670,
    "gsm8k_train.jsonl": 7473,
    "minerva_math.jsonl": 265,
}


@pytest.mark.skipif(not DATA.is_dir(), reason="real files are not in the repository")
@pytest.mark.parametrize("name", REAL)
def test_real_files(name):
    schema, colon, file = name.rpartition(":")
    task = load(f"{schema}{colon}{DATA / file}", "test")
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
    chat = [{"role": "user", "content": "Chat?"}, {"role": "assistant", "content": "No."}]
    rows = [
        {"prompt": chat, "answer": 5.0},
        {"question": "Hashes?", "answer": "Well.\n#### 1,234"},
        {"problem": "Box?", "solution": r"So \boxed{7}."},
        {"problem": "No box?", "solution": "So 7."},
        {"problem": "Nothing?"},
    ]
    task = load(write_jsonl(tmp_path / "mine.jsonl", rows))
    assert golds_of(task) == {"Chat?": "5", "Hashes?": "1234", "Box?": "7"}
    assert task.counts == {"rows": 5, "kept": 3, "no answer": 2}


QUESTIONS = st.sampled_from(["a?", "b?", "c?", "", None])
ANSWERS = st.sampled_from(["1", "2", "1.0", "", None, r"\frac{", "1/0/"])


@settings(max_examples=100)
@given(st.lists(st.tuples(QUESTIONS, ANSWERS), min_size=1, max_size=12))
def test_select(pairs):
    rows = [{"problem": question, "answer": answer} for question, answer in pairs]
    try:
        golds, counts = maths.select(rows, maths.plain, "x")
    except UserError as error:
        assert "no usable row" in str(error)
        return
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


@settings(max_examples=400)
@example([{"prompt": 5, "answer": "5"}], maths.plain)
@example(
    [{"prompt": [{"role": "user", "content": [{"type": "text"}]}], "answer": "5"}], maths.plain
)
@example([{"prompt": "1+1?", "answer": 2}], maths.plain)
@given(ROWS, st.sampled_from(READERS))
def test_rows_of_any_shape(rows, read):
    try:
        golds, counts = maths.select(rows, read, "x")
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert sum(counts.values()) == 2 * counts["rows"] == 2 * len(rows)
    assert counts["kept"] == len(golds)
    assert all(isinstance(text, str) for pair in golds.items() for text in pair)


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
