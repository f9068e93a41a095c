"""Pairs of prompt and response, refusals and degenerate completions."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tasks
from engine.errors import UserError
from tasks.safety import (
    GATED,
    PAIRS,
    SAFE_ANSWER,
    load_pairs,
    mmlu,
    plain,
    select_pairs,
)
from tests.test_tasks import (
    BAD_CHATS,
    CHAT,
    DATA,
    STRANGE_FILES,
    VALUES,
    Example,
    gsm8k,
    hub_folder,
    turn,
    write_jsonl,
)


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
        [
            {"question": "Which?", "subject": "art", "choices": CHOICES, "answer": 2},
            {"question": "Secret?", "subject": "art", "choices": CHOICES, "answer": -1},
            {"question": "First?", "subject": "art", "choices": CHOICES[:2], "answer": 0},
            {"question": "Fourth?", "subject": "art", "choices": CHOICES[:2], "answer": 3},
        ],
        {
            "Which?\nA. one\nB. two\nC. three\nD. four\nAnswer:": "C",
            "First?\nA. one\nB. two\nAnswer:": "A",
        },
        {"malformed": 1, "no response": 1},
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


PROMPTS = {
    "instruction": {"instruction": "Hello?", "category": None},
    "alpaca": {"instruction": "Hello?", "input": "", "output": ""},
    "prompt": {"prompt": "Hello?", "response": None},
    "messages": {"messages": [turn("user", "Hello?")]},
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_only(tmp_path, name):
    path = write_jsonl(tmp_path / "a.jsonl", [PROMPTS[name]])
    assert load_pairs(path, "over-refusal")[0] == [{"prompt": "Hello?", "response": ""}]
    for kind in ("safety", "utility"):
        with pytest.raises(UserError, match="no response: 1.*response.*jbb:PATH"):
            load_pairs(path, kind)


def test_harmful_prompts_alone(tmp_path):
    for column in ("Goal", "goal", "instruction", "prompt"):
        path = write_jsonl(tmp_path / "a.jsonl", [{column: "Harm!", "category": "x"}])
        pairs, _ = load_pairs(f"jbb:{path}", "safety")
        assert pairs == [{"prompt": "Harm!", "response": SAFE_ANSWER}]


NAN = float("nan")


@pytest.mark.parametrize(
    "row, response",
    [
        ({"prompt": "?", "response": None, "chosen": "a"}, "a"),
        ({"prompt": "?", "response": NAN, "chosen": None, "answer": "a"}, "a"),
        ({"prompt": None, "question": "?", "completion": "a"}, "a"),
        ({"prompt": "?", "instruction": None, "output": "a"}, "a"),
        ({"instruction": "?", "input": None, "output": None, "response": "a"}, "a"),
        ({"prompt": "?", "response": 0, "chosen": "a"}, "0"),
        ({"prompt": "?", "response": False, "chosen": "a"}, "False"),
        ({"prompt": "?", "response": "", "chosen": "a"}, None),
    ],
)
def test_null_hides_nothing(row, response):
    pairs, _ = select_pairs([row], plain, "utility", True)
    assert pairs == ([{"prompt": "?", "response": response}] if response else [])


def test_input_of_zero_is_kept(tmp_path):
    pairs, tally = select_pairs([alpaca("Double it.", 0, "0")], plain, "utility", True)
    assert not pairs and tally.counts["malformed"] == 1  # a number is not dropped in silence


# ---- chats

REPLY = turn("assistant", "8")
CHAT_ROWS = {
    "messages": {"messages": [*CHAT, REPLY]},
    "prompt": {"prompt": CHAT, "response": "8"},
    "prompt and completion": {"prompt": CHAT, "completion": [REPLY]},
    "chosen repeats the prompt": {"prompt": CHAT, "chosen": [*CHAT, REPLY], "rejected": "9"},
    "chosen holds the prompt": {"chosen": [*CHAT, REPLY], "rejected": [*CHAT, turn("user", "9")]},
    "messages and response": {"messages": CHAT, "response": "8"},
}


@pytest.mark.parametrize("name", CHAT_ROWS)
def test_chat_is_kept_whole(tmp_path, name):
    path = write_jsonl(tmp_path / "a.jsonl", [CHAT_ROWS[name]] * 2)
    (pair,), counts = load_pairs(path, "utility")
    assert pair["messages"] == CHAT and pair["response"] == "8"
    assert counts == {"rows": 2, "kept": 1, "duplicate prompt": 1}
    (pair,), _ = load_pairs(path, "over-refusal")
    assert pair["messages"] == CHAT and pair["response"] == ""
    text, _ = tasks.prompts.render(pair, None)
    assert all(each["content"] in text for each in CHAT) and "8" not in text


def test_chat_of_one_turn_is_a_text(tmp_path):
    rows = [
        {"messages": [turn("user", "Hi?"), turn("assistant", "Hi.")]},
        {"prompt": "Ho?", "chosen": [turn("user", "Ho?"), turn("assistant", "Ho.")]},
        {"prompt": "Hu?", "chosen": [turn("assistant", "Hu.")]},
    ]
    pairs, _ = load_pairs(write_jsonl(tmp_path / "a.jsonl", rows), "utility")
    assert responses_of(pairs) == {"Hi?": "Hi.", "Ho?": "Ho.", "Hu?": "Hu."}
    assert all("messages" not in pair for pair in pairs)


BAD_REPLIES = [
    ({"prompt": "?", "chosen": [turn("user", "a")]}, "not the assistant's"),
    ({"prompt": "?", "chosen": [turn("assistant", None)]}, "not the assistant's"),
    ({"prompt": "?", "chosen": [turn("user", "other"), REPLY]}, "two chats"),
    ({"prompt": "?", "response": {"a": 1}}, "not text"),
    ({"prompt": "?", "response": "\ud800"}, "not Unicode"),
    ({"prompt": "?", "response": float("inf")}, "not finite"),
    ({"messages": [turn("user", "a"), turn("tool", "b"), REPLY]}, "unknown role"),
    ({"messages": [turn("user", "a"), REPLY, REPLY]}, "end with the user"),
    ({"messages": [turn("user", "a"), REPLY], "response": "9"}, "end with the user"),
    ({"question": "?", "choices": "abcd", "answer": 1}, None),
]
BAD_REPLIES += [({"prompt": chat, "response": "x"}, reason) for chat, reason in BAD_CHATS]


@pytest.mark.parametrize("row, reason", BAD_REPLIES)
def test_bad_replies(row, reason):
    read = mmlu if reason is None else plain
    pairs, tally = select_pairs([row], read, "utility", True)
    assert not pairs and sum(tally.counts.values()) == 2
    assert [n for key, n in tally.counts.items() if (reason or "malformed (ch") in key] == [1]


@pytest.mark.parametrize(
    "row, column",
    [
        ({"question": "Which?", "choices": CHOICES, "answer": 2}, "choices"),
        ({"instruction": "Sum it up.", "context": "A text.", "response": "x"}, "context"),
        ({"prompt": "Sum it up.", "input": "A text.", "response": "x"}, "input"),
        ({"prompt": "A.", "instruction": "B.", "response": "x"}, "instruction"),
        ({"prompt": "A.", "system": "Be Bob.", "response": "x"}, "system"),
        ({"instruction": "A.", "input": "", "history": [["a", "b"]], "output": "x"}, "history"),
    ],
)
def test_part_of_a_prompt_is_not_lost(tmp_path, row, column):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "A?", "response": "x"}, row])
    with pytest.raises(UserError, match=column):
        load_pairs(path, "utility")


def test_unknown_columns_are_named(tmp_path, capsys):
    row = {"prompt": "A?", "chosen": "x", "rejected": "y", "\x1b[2J": 1, "id": 3, "input": None}
    load_pairs(write_jsonl(tmp_path / "a.jsonl", [row]), "utility")
    out, err = capsys.readouterr()
    assert not out and "rejected" in err and err.strip().isprintable() and "id" not in err.split()


@pytest.mark.parametrize("name", STRANGE_FILES)
def test_strange_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(STRANGE_FILES[name])
    for schema in ("", "gsm8k:", "mmlu:"):
        with pytest.raises(UserError) as error:
            load_pairs(schema + name, "utility")
        assert str(error.value).isprintable() and len(str(error.value)) < 1000


@pytest.mark.parametrize("yes, no", [("true", "false"), ("True", "False")])
def test_labels_of_a_csv(tmp_path, yes, no):
    columns = "prompt,response_0,response_1,is_response_0_safe,is_response_1_safe,safer_response_id"
    (tmp_path / "a.csv").write_text(f"{columns}\nA?,bad,good,{no},{yes},0\n")
    pairs, _ = load_pairs(f"pku-saferlhf:{tmp_path / 'a.csv'}", "safety")
    assert responses_of(pairs) == {"A?": "good"}


def test_unsafe_prompts_of_xstest(tmp_path):
    text = "id,prompt,type,label\n1,Kill it?,homonyms,safe\n2,Kill her?,contrast_homonyms,unsafe\n"
    (tmp_path / "a.csv").write_text(text)
    (tmp_path / "b.csv").write_text(
        text.replace(",label", "").replace(",safe", "").replace(",unsafe", "")
    )
    for name in ("a.csv", "b.csv"):
        for schema in ("", "xstest:"):
            pairs, counts = load_pairs(f"{schema}{tmp_path / name}", "over-refusal")
            assert responses_of(pairs) == {"Kill it?": ""} and counts["labelled unsafe"] == 1


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


@settings(max_examples=200)
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
    assert all(isinstance(pair[key], str) for pair in pairs for key in ("prompt", "response"))
    assert all(pair.keys() <= {"prompt", "response", "messages"} for pair in pairs)


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
    "name, count",
    [
        ("advbench.json", 520),
        ("harmful_train.json", 260),
        ("harmful_val.json", 39),
        ("harmless_val.json", 1500),
        ("jailbreakbench.json", 100),
        ("xstest_prompts.csv", 250),
        ("xstest_completions_llama2new.csv", 250),
    ],
)
def test_real_files(name, count):
    assert load_pairs(str(DATA / name), "over-refusal")[1]["kept"] == count
    if name not in ("xstest_prompts.csv", "xstest_completions_llama2new.csv"):
        pairs, _ = load_pairs(f"jbb:{DATA / name}", "safety")
        assert len(pairs) == count


def test_prompts_alone_where_no_response_is_needed(tmp_path):
    """A known set and a file alike; rows that do have a response do not keep it."""
    file = tmp_path / "prompts.jsonl"
    rows = [{"instruction": f"Do {i}."} for i in range(3)] + [{"instruction": "Go.", "output": "x"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    for name in (str(file), f"alpaca:{file}"):
        pairs, counts = load_pairs(name, "utility", responses=False)
        assert counts["kept"] == 4 and {pair["response"] for pair in pairs} == {""}
        assert load_pairs(name, "utility")[1]["kept"] == 1
