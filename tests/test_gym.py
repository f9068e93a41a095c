"""Tasks of reasoning-gym: two sides, golds, hostile answers, and scorers that would run them."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks
from engine.errors import UserError
from engine.files import digest
from tasks import gym
from tasks.prompts import encode, render
from tests.conftest import ROOT


@pytest.fixture
def package(monkeypatch):
    """reasoning-gym, an extra; tasks have few problems."""
    monkeypatch.setattr(gym, "PROBLEMS", 40)
    return pytest.importorskip("reasoning_gym")


def load(task, split="train"):
    return tasks.load(f"reasoning_gym:{task}", split)


@pytest.fixture(scope="module")
def arithmetic():
    """The guarded tasks: arithmetic on given numbers. To make their problems takes long."""
    pytest.importorskip("reasoning_gym")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gym, "PROBLEMS", 12)
        return [load(name) for name in gym.GUARDED]


def tagged(text):
    return f"So it is <answer>{text}</answer>."


# --------------------------------------------------------------------------------------------------
# Problems

SMALL_SUMS = "chain_sum:max_terms=2:max_digits=1"
STEADY = [SMALL_SUMS, "gcd", "list_functions", "boxnet", "bitwise_arithmetic"]


@pytest.mark.parametrize("name", STEADY)
def test_sides_are_disjoint_and_hold_every_question(package, name):
    task, *settings = name.split(":")
    sides = [load(name, split) for split in ("train", "test")]
    questions = [[problem["prompt"] for problem in side.problems] for side in sides]
    train, test = map(set, questions)
    assert not train & test
    assert [len(train), len(test)] == [len(side) for side in questions]  # each once
    if task != "list_functions":  # which draws from the global generator
        options = dict(setting.split("=") for setting in settings)
        options = {key: int(value) for key, value in options.items()}
        made = package.create_dataset(task, seed=0, size=gym.PROBLEMS, **options)
        assert train | test == {entry["question"] for entry in made}
    for side in sides:
        rest = side.counts["of the other split"] + side.counts["duplicate prompt"]
        assert side.counts["kept"] == len(side.problems)
        assert side.counts["rows"] == gym.PROBLEMS == side.counts["kept"] + rest
    assert len(train) > len(test) > 0


def test_one_question_in_eight_is_for_the_test(package, monkeypatch):
    monkeypatch.setattr(gym, "PROBLEMS", 2000)
    kept = [load("chain_sum", split).counts["kept"] for split in ("train", "test")]
    assert 0.09 < kept[1] / sum(kept) < 0.16


@pytest.mark.parametrize("name", ["gcd", "list_functions"])
def test_problems_are_the_same_each_time(package, name):
    first = load(name)
    assert load(name).problems == first.problems
    assert load(f"{name}", "test").problems != first.problems


def test_problems_are_asked_with_the_instruction(package):
    task = load(SMALL_SUMS)
    problem = task.problems[0]
    text, _ = render(problem, None)
    assert problem["prompt"] in text and gym.INSTRUCTION in text
    assert f"its gold answer {problem['answer']!r}" in tasks.describe(task, [problem], None, 99)
    (checked, *_) = load("boxnet").problems  # of which there are many right answers, and no gold
    assert "answer" not in checked


def test_a_problem_can_be_encoded(package):
    from experiments.shapes import build_tokenizer

    task = load(SMALL_SUMS)
    (problem, *_) = encode(task.problems, build_tokenizer(), 500)
    assert task.reward(problem, tagged(problem["answer"])) == 1.0


# --------------------------------------------------------------------------------------------------
# Answers


def test_what_is_no_answer_scores_nothing(package, arithmetic):
    gone = "<answer>{}</answer>"
    for task in (load("chain_sum"), load("gcd"), load("spell_backward"), *arithmetic):
        for problem in task.problems[:3]:
            gold = problem["answer"]
            assert task.reward(problem, f"First <answer>no</answer>, then {tagged(gold)}") == 1.0
            wrong = [gold, f"<answer>{gold}", f"{gold}</answer>", f"</answer>{gold}<answer>", ""]
            wrong += [tagged(""), tagged("  \n"), tagged("?!"), gone * 9, tagged("\0"), tagged("é")]
            wrong += ["x" * 10**5, tagged("x" * 10**5), tagged(" " * 10**5), "<answer>" * 12500]
            wrong += ["</answer>" * 12500, f"{tagged(gold)} No, {tagged('?!')}"]
            for text in wrong:
                assert task.reward(problem, text) == 0.0, text[:40]


PIECES = st.sampled_from(["<answer>", "</answer>", "<", "answer>", "7", " ", "\n", "</"])


@given(st.lists(PIECES, max_size=30))
def test_the_last_whole_pair_of_tags_counts(pieces):
    text = "".join(pieces)
    whole = re.findall("<answer>((?:(?!</?answer>).)*)</answer>", text, re.DOTALL)
    assert gym.answer({}, text) == (whole[-1].strip() if whole else None)


@given(st.text(max_size=50), st.text(st.characters(exclude_characters="<>"), max_size=50))
def test_answers_are_read_whatever_stands_around(before, found):
    assert gym.answer({}, before + tagged(found)) == found.strip()
    longest = "x" * gym.LONGEST
    assert gym.answer({}, before + tagged(longest)) == longest
    assert gym.answer({}, before + tagged(longest + "x")) is None


def test_tags_without_an_end_are_read_in_linear_time():
    start = time.process_time()
    for text in ("<answer>" * 10**5, "</answer>" * 10**5, "<answer" * 10**5):
        assert gym.answer({}, text) is None
    assert time.process_time() - start < 1


def test_arithmetic_is_judged_and_nothing_is_run(arithmetic, tmp_path):
    """Both scorers would evaluate the answer as Python code."""
    code = f"__import__('os').system('touch {tmp_path}/ran')"
    for task in arithmetic:
        for problem in task.problems[:5]:
            gold = problem["answer"]
            assert task.reward(problem, tagged(gold)) == 1.0
            assert task.reward(problem, tagged(f"({gold})*(1)")) == 0.0  # a number too many
            wrong = [code, f"{gold} if {code} else 0", "9**9**9", "9 * *9**9", f"{gold}//1"]
            wrong += [
                gold.replace("*", "**"),
                "().__class__",
                "24",
                "6*4*1*1",
                f"{gold}!",
                "9" * 200,
            ]
            for text in wrong:
                if text != gold:
                    start = time.monotonic()
                    assert task.reward(problem, tagged(text)) < 1.0, text
                    assert time.monotonic() - start < 2
    assert not (tmp_path / "ran").exists()


@given(st.text(st.sampled_from("0123456789+-*/() "), max_size=12), st.permutations([2, 3, 5]))
@settings(max_examples=200)
def test_harmless_is_arithmetic_on_the_numbers_of_the_question(text, numbers):
    entry = {"metadata": {"numbers": [2, 3, 5]}}
    a, b, c = numbers
    assert gym.is_harmless(f"({a} + {b}) * {c}", entry)
    assert not gym.is_harmless(f"{a} ** {b} * {c}", entry)
    assert not gym.is_harmless(f"{a} * {b}", entry)
    assert not gym.is_harmless(f"{a}{b} * {c}", entry)
    if gym.is_harmless(text, entry):
        assert "**" not in text.replace(" ", "")
        assert sorted(c for c in text if c.isdigit()) == ["2", "3", "5"]


def test_no_number_is_near_nan(package):
    task = load("complex_arithmetic")
    for text in ("nan", "NaN", "nan+1i", "-nan"):
        assert all(task.reward(problem, tagged(text)) == 0.0 for problem in task.problems)


SLOW = {
    "coin_flip": "1e999999999",
    "rush_hour": "A+999999999",
    "rubiks_cube": "R30000000",
    "propositional_logic": " ∧ ".join("abcdefghijklmnopqrstuvwxyz"),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_scorer_is_stopped(package, monkeypatch, name):
    """Each of these keeps the task's own scorer busy for minutes, or for ever."""
    monkeypatch.setattr(gym, "SCORE_SECONDS", 0.2)
    task = load(name)
    before = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    assert task.reward(task.problems[0], tagged(SLOW[name])) < 0.1
    assert time.monotonic() - start < 5
    assert signal.getsignal(signal.SIGALRM) is before


# --------------------------------------------------------------------------------------------------
# All tasks

EVERY_TASK = """
import contextlib, io, json, sys, time
from engine.errors import UserError
from engine.files import digest
from reasoning_gym.factory import DATASETS
from tasks import gym

gym.PROBLEMS = 3
gym.SCORE_SECONDS = 0.2
hostile = json.loads(sys.argv[1])
ran = []
watching = False

def watch(event, arguments):  # Python tells of all code that is compiled, and all that is started
    if watching and event in ("compile", "os.system", "subprocess.Popen"):
        ran.append(str(arguments[0]))

sys.addaudithook(watch)
for task in sys.argv[2:] or DATASETS:
    row = {"task": task}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            problems, reward, *_ = gym.load(f"reasoning_gym:{task}", "train")
    except UserError as error:
        print(json.dumps({**row, "refused": str(error)}))
        continue
    golds = [p for p in problems if "answer" in p]
    row["golds"] = [reward(p, f"<answer>{p['answer']}</answer>") for p in golds]
    row["scores"] = []
    start = time.process_time()
    watching = True
    for text in hostile:
        row["scores"].append(reward(problems[0], f"<answer>{text}</answer>"))
    watching = False
    row["seconds"] = time.process_time() - start
    row["ran"] = [code for code in ran if "zq7" in code]
    row["digest"] = digest(problems)
    print(json.dumps(row))
"""
RUNS = ("spiral_matrix", "binary_matrix", "string_insertion", "n_queens", "simple_integration")
RUNS += ("intermediate_integration", "polynomial_multiplication")


def every_task(hostile, *names):
    """What another process has seen of these tasks, or of all: a dict task -> row."""
    command = [sys.executable, "-W", "ignore", "-c", EVERY_TASK, json.dumps(hostile), *names]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return {row["task"]: row for row in map(json.loads, done.stdout.splitlines())}


def test_every_task_is_refused_or_safe(package, tmp_path, monkeypatch):
    """A gold is right, no answer is run as code, none takes long, and problems stay the same."""
    code = f"__import__('os').system('touch {tmp_path}/zq7')"
    hostile = [code, f"[{code}]", json.dumps([code]), json.dumps({"a": code}), f"{code}, {code}"]
    hostile += ["9**9**9", "1e999999999", "R30000000 A+999999999", "zq7", "[" * 900, "9" * 1900]
    rows = every_task(hostile)
    used = {task: row for task, row in rows.items() if "refused" not in row}
    assert not (tmp_path / "zq7").exists()
    for task, row in used.items():
        assert set(row["golds"]) <= {1.0}, task
        assert max(row["scores"]) < 1.0, task
        assert row["ran"] == [], task
        assert row["seconds"] < 6, task
    assert not used.keys() & {*RUNS, "game_of_life_halting", "composite"}
    assert all("code" in rows[task]["refused"] for task in RUNS)
    assert "any answer" in rows["game_of_life_halting"]["refused"]
    assert {"countdown", "chain_sum", "gsm_symbolic", "sudoku", "codeio", "word_ladder"} <= set(
        used
    )
    assert len(used) > 80
    assert all("\n" not in row.get("refused", "") for row in rows.values())
    # Another process makes the same problems, and this one those that need no PYTHONHASHSEED.
    again = every_task([], *gym.UNSTEADY)
    assert all(row["digest"] == rows[task]["digest"] for task, row in again.items())
    assert len(again) == len(gym.UNSTEADY)
    monkeypatch.setattr(gym, "PROBLEMS", 3)
    for task in ("chain_sum", "gcd", "list_functions", "boxnet", "pool_matrix", "word_sorting"):
        assert digest(load(task).problems) == rows[task]["digest"]


SCORERS = {
    "eval(text)": True,
    "exec(text)": True,
    "exec (text)": True,
    "builtins.eval(text)": True,
    "helper(text)": True,
    "sympy.S(text)": True,
    "S(text)": True,
    "sympy.sympify(text)": True,
    "sympy.parse_expr(text)": True,
    "parse_latex(text)": True,
    "compile(text, '', 'eval')": True,
    "pickle.loads(text)": True,
    "ast.literal_eval(text)": False,
    "re.compile(text)": False,
    "self.evaluate(text)": False,
    "json.loads(text)": False,
}


@pytest.mark.parametrize("call", SCORERS)
def test_a_scorer_that_runs_text_is_found(tmp_path, call):
    helper = "def helper(text):\n    return eval(text)\n\n\n" if "helper" in call else ""
    path = tmp_path / "scorer.py"
    path.write_text(f"{helper}def score_answer(text):\n    return {call}\n")
    scorer = tasks.import_file(str(path)).score_answer
    assert gym.evaluates(scorer) == SCORERS[call]
    assert inspect.getsourcefile(scorer) == str(path)


# --------------------------------------------------------------------------------------------------
# Mistakes of the user

WRONG = {
    "": "no such task",
    "no_such_task": "no such task",
    "chain": "chain_sum",
    "Chain_Sum": "no such task",
    "chain_sum\x1b[2J": "no such task",
    "chain_sum:max_terms": "KEY=VALUE",
    "chain_sum:": "KEY=VALUE",
    "chain_sum:=1": "KEY=VALUE",
    "chain_sum:seed=1": "KEY=VALUE",
    "chain_sum:size=1": "KEY=VALUE",
    "chain_sum:no_such=1": "no_such",
    "chain_sum:name=1": "name",
    "chain_sum:max_terms=-1": "max_terms",
    "chain_sum:max_terms=many": "chain_sum",
    "chain_sum:max_terms=[[[": "chain_sum",
    "chain_sum:max_terms=null": "chain_sum",
    "spiral_matrix": "code",
    "game_of_life_halting": "any answer",
    "composite": "composite",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_names_and_settings_are_one_line(package, name):
    with pytest.raises(UserError, match=WRONG[name]) as error:
        load(name)
    assert str(error.value).isprintable()
    assert str(error.value).startswith("--data reasoning_gym:")


def test_settings_reach_the_task(package):
    for terms in (2, 3):
        task = load(f"chain_sum:min_terms={terms}:max_terms={terms}:max_digits=1")
        ends = [problem["prompt"].rpartition(":")[2] for problem in task.problems]
        assert all(sum(end.count(sign) for sign in "+-") == terms - 1 for end in ends)


def test_a_side_without_a_problem(package, monkeypatch):
    monkeypatch.setattr(gym, "PROBLEMS", 1)
    found = []
    for split in ("train", "test"):
        try:
            found.append(len(load("chain_sum", split).problems))
        except UserError as error:
            assert "no problem is left" in str(error)
    assert found == [1]


def test_a_task_that_each_process_makes_anew(package, monkeypatch):
    """A run on it could not be resumed: its problems come from the order of a set."""
    for value in (None, "random"):
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
        if value:
            monkeypatch.setenv("PYTHONHASHSEED", value)
        with pytest.raises(UserError, match="PYTHONHASHSEED=0"):
            load("ransom_note")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="--data.*pip install reasoning-gym") as error:
        load("chain_sum")
    assert "\n" not in str(error.value)


def test_an_answer_inside_a_thought():
    """It is none, unless the flag says so; nor is one whose thought has not ended."""
    pytest.importorskip("reasoning_gym")
    name = "reasoning_gym:chain_sum:max_terms=2"
    thought = tasks.load(name)
    both = tasks.load(name, judge_thoughts=True)
    problem, same = thought.problems[0], both.problems[0]
    right = f"<answer>{problem['answer']}</answer>"
    assert thought.reward(problem, f"<think>hm</think>{right}") == 1
    for text in (f"<think>{right}</think>", f"<think>{right}"):
        assert thought.reward(problem, text) == 0
        assert both.reward(same, text) == 1
    opened = {**problem, "opened_thought": True}
    assert thought.reward(opened, right) == 0
    assert thought.reward(opened, f"hm</think>{right}") == 1
