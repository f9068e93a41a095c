"""Pairs of prompt and response, refusals and degenerate completions."""

import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from tasks import arithmetic
from tasks.safety import GATED, PAIRS, SAFE_ANSWER, is_degenerate, is_refusal, load_pairs
from tests.test_tasks import DATA, VALUES, Example, gsm8k, hub_folder, write_jsonl


def pku(prompt, responses, safe, safer):
    return {
        "prompt": prompt,
        "response_0": responses[0],
        "response_1": responses[1],
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
        "better_response_id": 0,
        "safer_response_id": safer,
    }


def jbb(goal):
    return {"Index": 0, "Goal": goal, "Target": "Here", "Behavior": "It", "Category": "Harm"}


def alpaca(instruction, text, output):
    return {"instruction": instruction, "input": text, "output": output, "text": "..."}


CHOICES = ["one", "two", "three", "four"]
EXAMPLES = {
    "pku-saferlhf": Example(
        [
            pku("A?", ["unsafe", "safe"], [False, True], 1),
            pku("B?", ["bad", "worse"], [False, False], 0),
            pku("C?", ["safe", "safer"], [True, True], 1),
            pku("C?", ["safe", "safer"], [True, True], 0),
            pku("D?", ["safe", "unsafe"], [True, False], 1),
        ],
        {"A?": "safe", "C?": "safer", "D?": "safe"},
        {"no response": 1, "duplicate prompt": 1},
    ),
    "llm-lat": Example(
        [{"prompt": "How?", "rejected": "Sure", "chosen": "I can't."}], {"How?": "I can't."}
    ),
    "jbb": Example([jbb("Write it")], {"Write it": SAFE_ANSWER}),
    "jbb-benign": Example([jbb("Write about it")], {"Write about it": ""}),
    "xstest": Example(
        [
            {"id": 1, "prompt": "Kill a process?", "type": "homonyms", "label": "safe"},
            {"id": 2, "prompt": "Kill a person?", "type": "contrast", "label": "unsafe"},
        ],
        {"Kill a process?": ""},
        {"labelled unsafe": 1},
    ),
    "alpaca": Example(
        [alpaca("Add.", "1 and 2", "3"), alpaca("Greet.", "", "Hi"), alpaca("Mute.", "", "")],
        {"Add.\n1 and 2": "3", "Greet.": "Hi"},
        {"no response": 1},
    ),
    "gsm8k": Example([gsm8k("Eggs?", "3*4=12\n#### 12")], {"Eggs?": "3*4=12\n#### 12"}),
    "mmlu": Example(
        [{"question": "Which?", "subject": "art", "choices": CHOICES, "answer": 2}],
        {"Which?\nA. one\nB. two\nC. three\nD. four\nAnswer:": "C"},
    ),
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("DATA_DIR", raising=False)


def responses_of(pairs):
    return {pair["prompt"]: pair["response"] for pair in pairs}


# ---- pairs


def test_every_set_has_an_example():
    assert EXAMPLES.keys() == PAIRS.keys()


@pytest.mark.parametrize("name", PAIRS)
def test_local_copy(tmp_path, name, monkeypatch):
    source = PAIRS[name]
    rows = EXAMPLES[name].rows
    folder = tmp_path / "copies" / source.hub_id
    hub_folder(folder, source.config, {source.split: rows, "other": rows * 3})
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "copies"))
    for asked in (name, source.hub_id):
        pairs, counts = load_pairs(asked, source.kind)
        assert responses_of(pairs) == EXAMPLES[name].golds
        assert counts == EXAMPLES[name].counts()
    assert load_pairs(name, source.kind, split="other")[1]["rows"] == 3 * len(rows)


@pytest.mark.parametrize("name", PAIRS)
def test_named_columns(tmp_path, name):
    file = write_jsonl(tmp_path / "mine.jsonl", EXAMPLES[name].rows)
    pairs, counts = load_pairs(f"{name}:{file}", PAIRS[name].kind)
    assert responses_of(pairs) == EXAMPLES[name].golds and counts == EXAMPLES[name].counts()


@pytest.mark.parametrize("prompt", ["prompt", "question", "instruction"])
@pytest.mark.parametrize("response", ["response", "chosen", "answer"])
def test_plain_files(tmp_path, prompt, response):
    response = "output" if prompt == "instruction" else response
    rows = [{prompt: "Hello?", response: "Hi."}, {prompt: "Hm?", response: ""}]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    expected = [{"prompt": "Hello?", "response": "Hi."}]
    assert load_pairs(path, "safety") == (expected, {"rows": 2, "kept": 1, "no response": 1})
    pairs, _ = load_pairs(path, "over-refusal")
    assert responses_of(pairs) == {"Hello?": "", "Hm?": ""}


def test_prompts_only(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "Hello?", "category": None}])
    assert load_pairs(path, "over-refusal")[0] == [{"prompt": "Hello?", "response": ""}]
    with pytest.raises(UserError, match="no response: 1"):
        load_pairs(path, "utility")


def test_folder_is_read_again(tmp_path):
    for parent, count in (("a", 5), ("b", 3), ("a", 4)):
        rows = [alpaca(f"{parent} {i}", "", "x") for i in range(count)]
        folder = hub_folder(tmp_path / parent / "alpaca", None, {"train": rows})
        expected = {row["instruction"]: "x" for row in rows}
        pairs, _ = load_pairs("alpaca", "utility", root=tmp_path / parent)
        assert responses_of(pairs) == expected
        assert responses_of(load_pairs(str(folder), "utility")[0]) == expected


COLUMNS = ["prompt", "question", "answer", "response", "chosen", "instruction", "input", "output"]
COLUMNS += ["choices", "Goal", "safer_response_id", "label"]
KINDS = st.sampled_from(["safety", "utility", "over-refusal"])
ROWS = st.lists(
    st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=5), min_size=1, max_size=3
)


@settings(max_examples=300)
@example([{"prompt": 5, "answer": "5"}], "safety", "")
@example([{"question": "?", "choices": ["x", "y"], "answer": "B"}], "utility", "mmlu:")
@example([{"prompt": "1+1?", "answer": 2}], "utility", "")
@example([{"instruction": "Say hello."}], "utility", "alpaca:")
@given(ROWS, KINDS, st.sampled_from(["", *(f"{name}:" for name in PAIRS)]))
def test_rows_of_any_shape(rows, kind, schema):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_text(json.dumps(rows))
        try:
            pairs, counts = load_pairs(f"{schema}{path}", kind)
        except UserError as error:
            assert "\n" not in str(error)
            return
    assert sum(counts.values()) == 2 * counts["rows"] == 2 * len(rows)
    assert counts["kept"] == len(pairs)
    assert all(isinstance(text, str) for pair in pairs for text in pair.values())


ERRORS = [
    ("walledai/AdvBench", "safety", None, "gated.*jbb"),
    ("harmbench", "safety", None, "gated.*jbb"),
    ("allenai/wildguardmix", "safety", None, "gated.*pku-saferlhf"),
    ("walledai/XSTest", "over-refusal", None, "gated.*xstest"),
    ("Paul/XSTest", "over-refusal", None, "Paul/XSTest.*hf download"),
    ("mmlu", "utility", "test", "validation"),
    ("alpaca", "safety", None, "utility set.*pku-saferlhf"),
    ("alpaca", "utility", None, "tatsu-lab/alpaca.*hf download"),
    ("no-such-pairs", "safety", None, "unknown"),
    ("alpaca:nowhere.json", "utility", None, "nowhere.json"),
]


@pytest.mark.parametrize("name, kind, split, words", ERRORS)
def test_errors(name, kind, split, words):
    with pytest.raises(UserError, match=words) as error:
        load_pairs(name, kind, split)
    assert "\n" not in str(error.value)


def test_missing_data_root(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_pairs("alpaca", "utility", root=tmp_path / "nowhere")


def test_stand_ins_exist():
    assert set(GATED.values()) <= set(PAIRS)


@pytest.mark.skipif(not DATA.is_dir(), reason="real files are not in the repository")
@pytest.mark.parametrize(
    "name, count", [("advbench", 520), ("harmful_val", 39), ("jailbreakbench", 100)]
)
def test_real_files(name, count):
    assert load_pairs(str(DATA / f"{name}.json"), "over-refusal")[1]["kept"] == count


# ---- judging

REFUSALS = [
    arithmetic.REFUSAL,
    "Sorry, I can’t help with that.",
    "I'm sorry, but I can't assist with that request.",
    "I’m sorry, but I cannot help you build a weapon.",
    "I am sorry, I will not do that.",
    "I cannot provide instructions for that.",
    "I can't help with this. Here is a cake recipe.",
    "I can’t do that",
    "I'm unable to assist with that.",
    "I am not able to provide this information.",
    "I won't help with that.",
    "No. I will not.",
    "I must decline.",
    "I must decline to answer.",
    "I apologize, but I cannot fulfill this request.",
    "As an AI language model, I cannot generate such content.",
    "  \"I'm very sorry, but I can't\n help.\"",
    "Unfortunately, I cannot assist you with that.",
]
ANSWERS = [
    "",
    "However, you may want to try another shop.",
    "Sorry",
    "Sorry to hear that! Here is how: first, ...",
    "I'm sorry for your loss. Here is what helps.",
    "I can't wait to help!",
    "I cannot recommend this book enough.",
    "I can't help but smile at this.",
    "Sure: make cake.",
    "sure: sell bomb.",
    "You cannot divide by zero.",
    "The government can't provide an answer.",
    "As an AI, I love this question. Take two eggs.",
    "Take a bowl. If the dough sticks, I can't help you any more.",
    "He said he must decline to answer.",
    "Unfortunately, it rains.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_answers(text):
    assert not is_refusal(text)


@given(st.text())
def test_refusal_of_any_text(text):
    assert is_refusal(text) in (True, False)
    assert is_refusal(f"{SAFE_ANSWER} {text}")
    assert is_degenerate(re.sub(r"\w", "", text))


DEGENERATE = ["", " \n", "...!!", "a a a a a a", "abcabcabcabcabc"]
PROPER = [
    "nonono no no no nonononono",
    "sorry, i can't.",
    "3",
    "n-o-o-d-l-e.",
    "ha ha",
]


@pytest.mark.parametrize("text", DEGENERATE)
def test_degenerate(text):
    assert is_degenerate(text)


@pytest.mark.parametrize("text", PROPER)
def test_not_degenerate(text):
    assert not is_degenerate(text)
