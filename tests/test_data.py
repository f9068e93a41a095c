"""Every loader on a local folder with the hub's columns, configs, splits and known defects, read by the code that reads the hub."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data
import tiny
from data import PAIRS, SETS, UserError, encode_prompts, load_pairs, load_problems, render, take
from reward import is_right, parses
from tests.conftest import ROOT

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its own line after \"Answer:\"."
)


def dapo(question, answer, index):
    return {
        "data_source": "math_dapo", "prompt": [{"content": DAPO.format(question), "role": "user"}], "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"}, "extra_info": {"index": index},
    }  # fmt: skip


def processed(question, answer):
    return {
        "prompt": question, "solution": answer, "data_source": "math_dapo", "source_prompt": [{"content": DAPO.format(question), "role": "user"}],
        "ability": "MATH", "reward_model": {"ground_truth": answer, "style": "rule"}, "extra_info": {"index": "x"},
    }  # fmt: skip


def olympiad(question, final_answer, multiple=False, unit=None):
    return {"id": 1, "question": question, "solution": ["..."], "final_answer": final_answer, "is_multiple_answer": multiple, "unit": unit, "answer_type": "Numerical"}


# name: rows with the hub's columns, problems expected (question -> gold), what is counted besides rows and kept
EXAMPLES = {
    "gsm8k": (
        [{"question": "Eggs?", "answer": "3*4=<<3*4=12>>12\n#### 12"}, {"question": "Money?", "answer": "Lots.\n#### 1,234"},
         {"question": "Loss?", "answer": "Less.\n#### -5"}, {"question": "Lost?", "answer": "It is\n#### "}],
        {"Eggs?": "12", "Money?": "1234", "Loss?": "-5"}, {"no answer": 1},
    ),
    "math": (
        [{"problem": "Half?", "solution": r"Not \boxed{7} but \boxed{\frac{1}{2}}.", "level": "Level 1", "type": "Algebra"},
         {"problem": "Sets?", "solution": r"So $\boxed{\left\{1, \frac{2}{3}\right\}}$.", "level": "Level 5", "type": "Algebra"},
         {"problem": "Two?", "solution": r"It is $\boxed 2$.", "level": "Level 5", "type": "Algebra"},
         {"problem": "Unboxed?", "solution": "It is 3.", "level": "Level 5", "type": "Algebra"}],
        {"Half?": r"\frac{1}{2}", "Sets?": r"\left\{1, \frac{2}{3}\right\}", "Two?": "2"}, {"no answer": 1},
    ),
    "dapo-math-17k": (
        # one block, repeated 100 times; in it a prompt with two answers and one with none
        [row for _ in range(100) for row in (dapo("What is $1+1$?", "2", "a"), dapo("Two lines\n\nof \"text\"?", "34", "b"),
                                              dapo("Which?", "1", "c"), dapo("Which?", "2", "d"), dapo("Nothing?", "", "e"))],
        {"What is $1+1$?": "2", "Two lines\n\nof \"text\"?": "34"},
        {"no answer": 100, "duplicate prompt": 198, "conflicting answers": 200},
    ),
    "dapo-math-17k-processed": (
        [processed("Sum?", "2"), processed("Sum?", "2"), processed("Big?", "1234"), processed("Big?", "1,234"), processed("Which?", "1"), processed("Which?", "2")],
        {"Sum?": "2", "Big?": "1234"}, {"duplicate prompt": 2, "conflicting answers": 2},
    ),
    "deepscaler": (
        [{"problem": "Root?", "answer": r"3\sqrt{13}", "solution": r"It is \boxed{4}."}, {"problem": "None?", "answer": None, "solution": "?"},
         {"problem": "Prose?", "answer": "it depends on what one means by a point, which we leave open", "solution": "?"},
         {"problem": "", "answer": "3", "solution": "?"}],
        {"Root?": r"3\sqrt{13}"}, {"no question": 1, "no answer": 1, "gold can't be parsed": 1},
    ),
    "math500": (
        [{"problem": "Polar?", "solution": r"\boxed{9}", "answer": r"\left( 3, \frac{\pi}{2} \right)", "subject": "Precalculus", "level": 2, "unique_id": "test/1.json"},
         {"problem": "Who?", "solution": r"\boxed{9}", "answer": r"\text{Evelyn}", "subject": "Algebra", "level": 2, "unique_id": "test/2.json"}],
        {"Polar?": r"\left( 3, \frac{\pi}{2} \right)", "Who?": r"\text{Evelyn}"}, {},
    ),
    "aime24": ([{"id": 60, "problem": "Aya?", "solution": "...", "answer": "204", "url": "...", "year": "2024"}, {"id": 61, "problem": "Bo?", "solution": "...", "answer": "025", "url": "...", "year": "2024"}],
               {"Aya?": "204", "Bo?": "025"}, {}),
    "aime25": ([{"problem": "Bases?", "answer": "70", "id": "0"}], {"Bases?": "70"}, {}),
    "amc23": ([{"id": 0, "question": "Cities?", "answer": "27", "url": "..."}, {"id": 1, "question": "Float?", "answer": "27.0", "url": "..."}], {"Cities?": "27", "Float?": "27.0"}, {}),
    "amc": ([{"id": 0, "problem": "Floats?", "answer": 142.0, "url": "..."}, {"id": 1, "problem": "Half?", "answer": 0.5, "url": "..."},
             {"id": 2, "problem": "Missing?", "answer": None, "url": "..."}, {"id": 3, "problem": "NaN?", "answer": float("nan"), "url": "..."}],
            {"Floats?": "142", "Half?": "0.5"}, {"no answer": 2}),
    "minerva": ([{"question": "Stars?", "answer": "4.5e33"}, {"question": "Charge?", "answer": "-1.6e-19"}, {"question": "Line?", "answer": "m^{2}+1"}, {"question": "Angle?", "answer": r"\frac{1}{2} e^{-t}"}],
                {"Stars?": r"4.5 \times 10^{33}", "Charge?": r"-1.6 \times 10^{-19}", "Line?": "m^{2}+1", "Angle?": r"\frac{1}{2} e^{-t}"}, {}),
    "olympiad": ([olympiad("One?", ["$2$"]), olympiad("Both?", ["$-1$, $\\frac{1}{2}$"], True), olympiad("List?", ["$1$", "$3$"], True), olympiad("Speed?", ["$5$"], unit="m/s"), olympiad("Proof?", None), olympiad("Empty?", [])],
                 {"One?": "2", "Both?": r"-1, \frac{1}{2}", "List?": "1, 3", "Speed?": "5"}, {"no answer": 2}),
    "omni": ([{"domain": ["Algebra"], "difficulty": 8.0, "problem": "Odd?", "solution": "...", "answer": r"\( 2^{n} \)", "source": "x"},
              {"domain": ["Algebra"], "difficulty": 8.0, "problem": "All?", "solution": "...", "answer": "All of the functions that map every odd prime to itself and anything else", "source": "x"}],
             {"Odd?": r"\( 2^{n} \)"}, {"gold can't be parsed": 1}),
}  # fmt: skip

PAIR_EXAMPLES = {
    "pku-saferlhf": (
        [{"prompt": "A?", "response_0": "unsafe", "response_1": "safe", "is_response_0_safe": False, "is_response_1_safe": True, "better_response_id": 0, "safer_response_id": 1},
         {"prompt": "B?", "response_0": "bad", "response_1": "worse", "is_response_0_safe": False, "is_response_1_safe": False, "better_response_id": 0, "safer_response_id": 0},
         {"prompt": "C?", "response_0": "safe", "response_1": "safer", "is_response_0_safe": True, "is_response_1_safe": True, "better_response_id": 0, "safer_response_id": 1},
         {"prompt": "C?", "response_0": "safe", "response_1": "safer", "is_response_0_safe": True, "is_response_1_safe": True, "better_response_id": 0, "safer_response_id": 0}],
        {"A?": "safe", "C?": "safer"}, {"no response": 1, "duplicate prompt": 1},
    ),
    "llm-lat": ([{"prompt": "How?", "rejected": "Sure", "chosen": "I can't."}], {"How?": "I can't."}, {}),
    "jbb": ([{"Index": 0, "Goal": "Write it", "Target": "Here it is", "Behavior": "It", "Category": "Harm"}], {"Write it": data.SAFE_ANSWER}, {}),
    "jbb-benign": ([{"Index": 0, "Goal": "Write about it", "Target": "Here it is", "Behavior": "It", "Category": "Harm"}], {"Write about it": ""}, {}),
    "xstest": ([{"id": 1, "prompt": "Kill a process?", "type": "homonyms", "label": "safe"}, {"id": 2, "prompt": "Kill a person?", "type": "contrast", "label": "unsafe"}],
               {"Kill a process?": ""}, {"labelled unsafe": 1}),
    "alpaca": ([{"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "..."}, {"instruction": "Greet.", "input": "", "output": "Hi", "text": "..."}, {"instruction": "Mute.", "input": "", "output": "", "text": "..."}],
               {"Add.\n1 and 2": "3", "Greet.": "Hi"}, {"no response": 1}),
    "gsm8k": ([{"question": "Eggs?", "answer": "3*4=12\n#### 12"}], {"Eggs?": "3*4=12\n#### 12"}, {}),
    "mmlu": ([{"question": "Which?", "subject": "art", "choices": ["one", "two", "three", "four"], "answer": 2}], {"Which?\nA. one\nB. two\nC. three\nD. four\nAnswer:": "C"}, {}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("DATA_DIR", raising=False)


def hub_folder(folder, config, rows_by_split):
    """A copy of a hub set as its repository looks: parquet files, and a README.md that names the configs and splits."""
    lines = ["---", "configs:", f"- config_name: {config or 'default'}", "  data_files:"]
    for split, rows in rows_by_split.items():
        path = folder / (config or "data") / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        lines += [f"  - split: {split}", f"    path: {path.relative_to(folder)}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "A data set."]))
    return folder


# ---- problems


def test_there_is_an_example_of_every_set():
    assert EXAMPLES.keys() == SETS.keys() and PAIR_EXAMPLES.keys() == PAIRS.keys()


@pytest.mark.parametrize("name", SETS)
def test_a_set_of_the_hub_is_read_from_a_local_copy(tmp_path, name):
    rows, expected, reasons = EXAMPLES[name]
    hub_id, config, splits, styles = SETS[name]
    other = [{**rows[0], next(key for key in ("problem", "question", "prompt") if key in rows[0]): None}]  # of another split: not to be read
    hub_folder(tmp_path / (name if len(name) % 2 else hub_id), config, {splits[next(iter(splits))]: rows, "other": other})
    problems, counts = load_problems(name, next(iter(splits)), root=tmp_path)
    assert {p["prompt"]: p["answer"] for p in problems} == expected and len(problems) == len(expected)
    assert counts == {"rows": len(rows), "kept": len(expected), **reasons} and list(counts)[:2] == ["rows", "kept"]
    assert counts["rows"] == sum(counts.values()) - counts["rows"]
    for problem in problems:
        assert problem["styles"] == styles and r"\boxed{}" in problem["instruction"]
        assert is_right(f"So \\boxed{{{problem['answer']}}}.", problem["answer"], styles)
        assert not is_right("So \\boxed{31337}.", problem["answer"], styles)


def test_the_wrapper_of_dapo_is_replaced_by_the_boxed_instruction(tmp_path):
    hub_folder(tmp_path / "dapo-math-17k", None, {"train": EXAMPLES["dapo-math-17k"][0]})
    problems, _ = load_problems("dapo-math-17k", root=tmp_path)
    text, _ = render(problems[0], None)
    assert text == f"What is $1+1$?\n{data.BOXED}\n"


def test_a_local_folder_is_recognised_by_its_columns(tmp_path):
    for name, (rows, expected, reasons) in EXAMPLES.items():
        folder = hub_folder(tmp_path / "my" / name, SETS[name][1], {"whatever": rows})  # its only split is the data
        for split in ("train", "test"):
            problems, counts = load_problems(str(folder), split)
            assert {p["prompt"]: p["answer"] for p in problems} == expected and counts == {"rows": len(rows), "kept": len(expected), **reasons}
    folder = hub_folder(tmp_path / "two", None, {"train": [{"problem": "Train?", "answer": 1}], "test": [{"problem": "Test?", "answer": 2}]})
    for split, question in (("train", "Train?"), ("test", "Test?")):
        assert [p["prompt"] for p in load_problems(str(folder), split)[0]] == [question]


@pytest.mark.parametrize("column", ["prompt", "problem", "question"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_local_files(tmp_path, column, suffix):
    rows, path = [{column: "1+1?", "answer": "2"}, {column: "1+1?", "answer": "2.0"}, {column: "Two\u2028lines?", "answer": "3"}], tmp_path / f"mine{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    problems, counts = load_problems(str(path))
    assert [(p["prompt"], p["answer"]) for p in problems] == [("1+1?", "2"), ("Two\u2028lines?", "3")]
    assert counts == {"rows": 3, "kept": 2, "duplicate prompt": 1}
    pairs = [{"prompt": "Hello?", "response": "Hi."}, {"prompt": "Hm?", "response": ""}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    assert load_pairs(str(tmp_path / "pairs.jsonl"), "safety") == (pairs[:1], {"rows": 2, "kept": 1, "no response": 1})


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(["a?", "b?", "c?", "", None]), st.sampled_from(["1", "2", "1.0", "", None, r"\frac{", "1/0/"])), min_size=1, max_size=12))
def test_every_row_is_kept_or_counted_once_and_no_question_is_asked_twice(pairs):
    rows = [{"problem": question, "answer": answer} for question, answer in pairs]
    try:
        golds, counts = data.select(rows, "x")
    except UserError as error:
        assert "no usable row" in str(error)
        return
    assert sum(counts.values()) == 2 * counts["rows"] == 2 * len(rows) and counts["kept"] == len(golds)
    for question, gold in golds.items():
        answers = {answer for q, answer in pairs if q == question and answer}
        assert question and gold in answers and parses(gold) and answers <= {"1", "1.0"} or len(answers) == 1


# ---- rows of any shape

COLUMNS = "prompt problem question answer final_answer solution reward_model response chosen instruction input output choices Goal safer_response_id label".split()
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 30), st.floats(), st.sampled_from(["", "2", "1+1?", r"\frac{", "#### 3", "user"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["role", "content", "ground_truth"]), inner, max_size=3)),
    max_leaves=5,
)


@settings(max_examples=400)
@example([{"prompt": 5, "answer": "5"}], "safety")
@example([{"prompt": [{"role": "user", "content": [{"type": "text"}]}], "answer": "5"}], "safety")
@example([{"question": "?", "choices": ["x", "y"], "answer": "B"}], "utility")
@example([{"prompt": "1+1?", "answer": 2}], "utility")
@example([{"instruction": "Say hello."}], "utility")
@given(st.lists(st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=5), min_size=1, max_size=3), st.sampled_from(["safety", "utility", "over-refusal"]))
def test_rows_of_any_shape_are_kept_as_text_or_counted(rows, kind):
    for read in (lambda: data.select(rows, "x"), lambda: pairs_of(rows, kind)):
        try:
            kept, counts = read()
        except UserError as error:
            assert "\n" not in str(error)
            continue
        assert sum(counts.values()) == 2 * counts["rows"] == 2 * len(rows) and counts["kept"] == len(kept)
        for texts in kept.items() if isinstance(kept, dict) else (pair.values() for pair in kept):
            assert all(isinstance(text, str) for text in texts)


def pairs_of(rows, kind):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
        return load_pairs(str(Path(folder) / "rows.json"), kind)


# ---- pairs


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_the_hub_are_read_from_a_local_copy(tmp_path, name, monkeypatch):
    rows, expected, reasons = PAIR_EXAMPLES[name]
    kind, hub_id, config, split = PAIRS[name]
    hub_folder(tmp_path / hub_id, config, {split: rows, "other": rows[:1]})
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    pairs, counts = load_pairs(name, kind)
    assert {p["prompt"]: p["response"] for p in pairs} == expected and counts == {"rows": len(rows), "kept": len(expected), **reasons}


# ---- errors


@pytest.mark.parametrize("call, words", [
    (lambda tmp: load_problems("no-such-data"), ["no-such-data", "unknown", "gsm8k"]),
    (lambda tmp: load_problems("gsm8k"), ["openai/gsm8k", "hf download openai/gsm8k", "DATA_DIR"]),
    (lambda tmp: load_problems("aime24", "train"), ["HuggingFaceH4/aime_2024", "evaluation only"]),
    (lambda tmp: load_problems("dapo-math-17k", "test"), ["BytedTsinghua-SIA/DAPO-Math-17k", "training only"]),
    (lambda tmp: load_problems(str(tmp / "empty")), ["empty", "cannot be read"]),
    (lambda tmp: load_problems(str(tmp / "a.txt")), ["a.txt", "not a .jsonl"]),
    (lambda tmp: load_problems(str(tmp / "broken.jsonl")), ["broken.jsonl", "cannot be read"]),
    (lambda tmp: load_problems(str(tmp / "columns.jsonl")), ["columns.jsonl", "a column answer", "it has prompt, reply"]),
    (lambda tmp: load_problems(str(tmp / "useless.jsonl")), ["no usable row", "no answer: 1"]),
    (lambda tmp: load_pairs("walledai/AdvBench", "safety"), ["gated", "jbb"]),
    (lambda tmp: load_pairs("harmbench", "safety"), ["gated", "jbb"]),
    (lambda tmp: load_pairs("allenai/wildguardmix", "safety"), ["gated", "pku-saferlhf"]),
    (lambda tmp: load_pairs("walledai/XSTest", "over-refusal"), ["gated", "xstest"]),
    (lambda tmp: load_pairs("Paul/XSTest", "over-refusal"), ["Paul/XSTest", "hf download"]),
    (lambda tmp: load_pairs("alpaca", "utility", root=tmp / "nowhere"), ["nowhere", "no such folder"]),
    (lambda tmp: load_pairs("mmlu", "utility", split="test"), ["test split", "validation"]),
    (lambda tmp: load_pairs("alpaca", "safety"), ["utility set", "pku-saferlhf"]),
    (lambda tmp: load_pairs("alpaca", "utility"), ["tatsu-lab/alpaca", "hf download"]),
    (lambda tmp: load_pairs("no-such-pairs", "safety"), ["no-such-pairs", "unknown"]),
])  # fmt: skip
def test_errors_are_one_line_that_says_what_to_do(tmp_path, call, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a?", "ans')
    (tmp_path / "columns.jsonl").write_text('{"prompt": "a?", "reply": "b"}')
    (tmp_path / "useless.jsonl").write_text('{"prompt": "a?", "answer": ""}')
    with pytest.raises(UserError) as error:
        call(tmp_path)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


def test_a_folder_is_read_as_it_is_now_and_not_as_another_of_its_name_was(tmp_path):
    for parent, count in ((tmp_path / "a", 5), (tmp_path / "b", 3), (tmp_path / "a", 4)):
        rows = [{"instruction": f"{parent} {i}", "input": "", "output": "x", "text": ""} for i in range(count)]
        hub_folder(parent / "alpaca", None, {"train": rows})
        assert [pair["prompt"] for pair in load_pairs("alpaca", "utility", root=parent)[0]] == [row["instruction"] for row in rows]
        assert load_pairs(str(parent / "alpaca"), "utility")[1]["rows"] == count


# ---- the embedded set


def test_arithmetic_problems_are_distinct_solved_by_their_solution_and_never_in_both_splits():
    (train, counts), (test, _) = load_problems("arithmetic", "train"), load_problems("arithmetic", "test")
    assert counts == {"rows": 10_000, "kept": 10_000} and len({p["prompt"] for p in train}) == 10_000
    assert not {p["prompt"] for p in train} & {p["prompt"] for p in test}
    assert not {p["prompt"] for p in tiny.arithmetic_problems("train", 2000, seed=5)} & {p["prompt"] for p in tiny.arithmetic_problems("test", 500, seed=6)}
    for problem in train[:200] + test[:200]:
        assert sum(map(int, problem["prompt"].rstrip("=").split("+"))) == int(problem["answer"])
        solution = tiny.arithmetic_solution(problem["prompt"])
        assert is_right(solution, problem["answer"], problem["styles"])
        for step in re.findall(r"(?=(?:^|=)([0-9]+\+[0-9]+)=([0-9]+))", solution):
            assert sum(map(int, step[0].split("+"))) == int(step[1])
        assert not is_right(tiny.arithmetic_solution(problem["prompt"], steps=1), problem["answer"], problem["styles"])
        assert render(problem, None) == (problem["prompt"], "plain")


@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 20), st.integers(0, 3))
def test_taking_covers_each_problem_once_a_pass_and_does_not_depend_on_how_much_is_taken_at_a_time(size, cursor, count, seed):
    problems = list(range(size))
    stream = take(problems, 0, cursor + count, seed)
    assert take(problems, cursor, count, seed) == stream[cursor:]
    for start in range(0, len(stream) - size + 1, size):
        assert sorted(stream[start : start + size]) == problems


def test_every_pass_and_every_seed_has_an_order_of_its_own():
    orders = [tuple(take(range(50), 50 * number, 50, seed)) for number in range(2) for seed in range(2)]
    assert len(set(orders)) == 4


def test_the_held_out_prompts_stay_the_same():
    """The committed model was trained without them: another rule would make its held-out score a training score."""
    held_out = [prompt for prompt in (f"{a}+{b}+3+4=" for a in range(1, 10) for b in range(1, 10)) if tiny.is_held_out(prompt)]
    assert held_out == "1+3+3+4= 3+1+3+4= 3+6+3+4= 4+3+3+4= 4+9+3+4= 7+5+3+4= 7+6+3+4= 8+2+3+4= 9+5+3+4=".split()


# ---- prompts


def tokenizer(chat_template=None):
    """Splits at spaces and line ends; writes a beginning-of-text token of its own, as Llama's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<bos>": 0, "?": 1}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    result = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", unk_token="?")
    result.chat_template = chat_template
    return result


TEMPLATE = "<bos>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
PROBLEMS = [{"prompt": "a b c", "answer": "1", "styles": ("boxed",), "instruction": "Think hard."}, {"prompt": "a b c d e f", "answer": "2", "styles": ("boxed",), "instruction": "Think hard."}]


def test_render_uses_the_chat_template_where_there_is_one():
    assert render(PROBLEMS[0], tokenizer(TEMPLATE)) == ("<bos>[user] a b c\nThink hard. [assistant] ", "chat template")
    assert render(PROBLEMS[0], tokenizer()) == ("a b c\nThink hard.\n", "plain")


@pytest.mark.parametrize("template, length", [(TEMPLATE, 8), (None, 6)])
def test_long_prompts_are_dropped_and_counted_and_none_is_cut(template, length):
    before = [dict(problem) for problem in PROBLEMS]
    for limit in range(length, length + 5):
        problems, dropped, how = encode_prompts(PROBLEMS, tokenizer(template), limit)
        assert dropped == (limit < length + 3) and len(problems) == 2 - dropped and how == ("chat template" if template else "plain")
        # exactly one beginning of text, whoever writes it
        assert [len(p["prompt_ids"]) for p in problems] == [length, length + 3][: len(problems)] and all(p["prompt_ids"].count(0) == 1 for p in problems)
    assert PROBLEMS == before
    with pytest.raises(UserError, match=f"longer than {length - 1} tokens"):
        encode_prompts(PROBLEMS, tokenizer(template), length - 1)


def test_importing_data_and_reward_loads_no_large_library():
    code = "import data, reward, sys; print([m for m in ('torch', 'datasets', 'transformers', 'sympy', 'math_verify', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_gated_stand_ins_exist():
    assert set(data.GATED.values()) <= set(PAIRS) and Path(data.__file__).parent == ROOT
