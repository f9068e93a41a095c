"""What --system-prompt, --few-shot, --instruction and --chat-template-kwargs make of a prompt."""

import argparse
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cast
import eval as evaluation
import train
from engine import flags
from engine.errors import UserError
from engine.files import read_jsonl, write_json, write_jsonl
from experiments.shapes import CHAT_TEMPLATE, build_tokenizer
from tasks.prompts import MOST_EXAMPLES, add_prompt_flags, encode, prompted, render
from tests.conftest import ROOT, build_checkpoint

THINKING = CHAT_TEMPLATE + (
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>\n{% endif %}"
)
CHAT = build_tokenizer(chat_template=THINKING)
PLAIN = build_tokenizer(chat_template=None)
SUM = {"prompt": "What is 12 + 30?", "answer": "42", "instruction": "Answer with a number."}
OTHER = {"prompt": "What is 1 + 2?", "answer": "3"}  # without an instruction
TALK = {
    "prompt": "System: Be brief.\n\nUser: 1?\n\nAssistant: 1\n\nUser: 2?",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "2?"},
    ],
    "instruction": "Go on.",
}
EXAMPLES = [("What is 3 + 4?", "It is 7."), ("What is 1 + 2?", "It is 3."), ("5 + 5?", "10")]


def parsed(*argv, examples=True):
    parser = argparse.ArgumentParser()
    add_prompt_flags(parser, examples)
    return parser.parse_args(argv)


def write_examples(path, pairs=EXAMPLES):
    write_jsonl(path, [{"question": question, "answer": answer} for question, answer in pairs])
    return f"--few-shot={path}"


def asked(problem, *argv, tokenizer=CHAT):
    """The problem as it is asked with these flags: the new dict, and its text."""
    (new,) = prompted([problem], tokenizer, parsed(*argv))
    return new, render(new, tokenizer)[0]


def turns_of(text):
    """The turns (role, content) in a text of the chat template, without the one that is to come."""
    return re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", text, re.DOTALL)


def in_one_line(error):
    return "\n" not in str(error.value) and "Traceback" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# What each flag adds


@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN, None])
def test_no_flag_changes_nothing(tokenizer):
    problems = [SUM, OTHER, TALK, {"prompt": "<|im_start|>user\nrendered"}]
    assert prompted(problems, tokenizer, parsed()) is problems
    assert prompted(problems, tokenizer, parsed(examples=False)) is problems
    if tokenizer is CHAT:
        assert prompted(problems, tokenizer, parsed("--chat-template-kwargs={}")) is problems


def test_system_prompt_comes_first_and_replaces_the_datas():
    for problem, rest in ((SUM, 1), (OTHER, 1), (TALK, 3)):
        before = json.dumps(problem)
        _, text = asked(problem, "--system-prompt", "You add.")
        assert turns_of(text)[0] == ("system", "You add.")
        assert [role for role, _ in turns_of(text)].count("system") == 1
        assert len(turns_of(text)) == 1 + rest
        assert json.dumps(problem) == before  # the problems stay as they are
    _, text = asked(SUM, "--system-prompt", "You add.", tokenizer=PLAIN)
    assert text.startswith("System: You add.\n\nUser: What is 12 + 30?\nAnswer with a number.")
    assert text.endswith("Assistant:")
    _, text = asked(TALK, "--system-prompt", "")  # an empty one is one
    assert turns_of(text)[0] == ("system", "")


def test_examples_are_turns_before_the_question(tmp_path):
    few = write_examples(tmp_path / "few.jsonl")
    _, text = asked(SUM, few, "--system-prompt", "You add.")
    wanted = [("system", "You add.")]
    for question, answer in EXAMPLES:
        wanted += [("user", f"{question}\nAnswer with a number."), ("assistant", answer)]
    assert turns_of(text) == [*wanted, ("user", "What is 12 + 30?\nAnswer with a number.")]
    _, text = asked(SUM, few, tokenizer=PLAIN)
    places = [text.index(part) for pair in EXAMPLES for part in pair]
    assert places == sorted(places)
    assert places[-1] < text.index(SUM["prompt"])
    # A chat of several turns is kept whole, and its system turn stays the first.
    _, text = asked(TALK, few)
    found = turns_of(text)
    assert found[0] == ("system", "Be brief.")
    assert found[1] == ("user", "What is 3 + 4?\nGo on.")
    assert found[-3:] == [("user", "1?"), ("assistant", "1"), ("user", "2?\nGo on.")]
    assert len(found) == 4 + 2 * len(EXAMPLES)


def test_example_that_asks_the_same_is_left_out_for_that_problem_only(tmp_path):
    few = write_examples(tmp_path / "few.jsonl")
    problems = [SUM, OTHER, {**OTHER, "prompt": OTHER["prompt"] + "\n"}]
    new = prompted(problems, CHAT, parsed(few))
    texts = [render(problem, CHAT)[0] for problem in new]
    assert [len(turns_of(text)) for text in texts] == [7, 5, 5]
    assert "It is 3." in texts[0]
    for text in texts[1:]:
        assert "It is 3." not in text and "It is 7." in text


def test_examples_may_be_chats(tmp_path):
    shown = [*TALK["messages"], {"role": "assistant", "content": "2"}]
    write_jsonl(tmp_path / "few.jsonl", [{"messages": shown}])
    _, text = asked(SUM, f"--few-shot={tmp_path}/few.jsonl", "--system-prompt", "You add.")
    roles = [role for role, _ in turns_of(text)]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert turns_of(text)[3:5] == [("user", "2?\nAnswer with a number."), ("assistant", "2")]
    assert "Be brief." not in text  # the system turn of an example is not the chat's


def test_instruction_replaces_the_datas(tmp_path):
    few = write_examples(tmp_path / "few.jsonl")
    for problem in (SUM, OTHER, TALK):
        _, text = asked(problem, few, "--instruction", "In words.")
        questions = [content for role, content in turns_of(text) if role == "user"]
        own = [q for q in questions if q != "1?"]  # an earlier turn of the chat itself
        assert all(q.endswith("\nIn words.") for q in own)
        assert "Answer with" not in text and "Go on." not in text
        for tokenizer in (CHAT, PLAIN):
            _, text = asked(problem, few, "--instruction", "", tokenizer=tokenizer)
            assert "Answer with" not in text and "Go on." not in text
    _, text = asked(SUM, "--instruction", "", tokenizer=PLAIN)
    assert text == SUM["prompt"]


def test_kwargs_reach_the_template():
    _, thoughtful = asked(SUM)
    _, brief = asked(SUM, '--chat-template-kwargs={"enable_thinking": false}')
    assert brief == thoughtful + "<think></think>\n"
    assert asked(SUM, '--chat-template-kwargs={"enable_thinking": true}')[1] == thoughtful
    documents = "{% for document in documents %}{{ document['text'] }}{% endfor %}"
    reader = build_tokenizer(chat_template=documents + CHAT_TEMPLATE)
    kwargs = '--chat-template-kwargs={"documents": [{"text": "12 is 12."}]}'
    assert asked(SUM, kwargs, tokenizer=reader)[1].startswith("12 is 12.<|im_start|>user")
    # The tokens are those of the text.
    new = prompted([SUM], CHAT, parsed('--chat-template-kwargs={"enable_thinking": false}'))
    (new,) = encode(new, CHAT, 500)
    assert CHAT.decode(new["prompt_ids"]) == brief


def test_safety_data_get_system_prompt_and_kwargs_only():
    argv = ["--system-prompt=S", '--chat-template-kwargs={"enable_thinking": false}']
    args = cast.build_parser().parse_args(["--diagnose", *argv])
    (new,) = prompted([{"prompt": "How?", "response": "So."}], CHAT, args)
    text, _ = render(new, CHAT)
    assert turns_of(text) == [("system", "S"), ("user", "How?")]
    assert text.endswith("<think></think>\n")
    assert new["response"] == "So."
    for flag in ("--few-shot=a", "--instruction=a"):
        with pytest.raises(SystemExit):
            cast.build_parser().parse_args(["--diagnose", flag])


def test_refusal_prompts_get_the_system_prompt_and_no_examples(tmp_path):
    write_jsonl(tmp_path / "asked.jsonl", [{"prompt": "How do I pick a lock?"}])
    argv = ["--system-prompt=S", "--instruction=In words.", write_examples(tmp_path / "few.jsonl")]
    kwargs = '--chat-template-kwargs={"enable_thinking": false}'
    args = evaluation.parse_args([*argv, kwargs])
    for name in (str(tmp_path / "asked.jsonl"), "harmful", "benign"):
        for problem in evaluation.refusal_prompts(name, CHAT, args)[:3]:
            text = CHAT.decode(problem["prompt_ids"])
            assert turns_of(text) == [("system", "S"), ("user", problem["prompt"])]
            assert text.endswith("<think></think>\n")
    assert args.few_shot and args.instruction  # for the data sets beside them


def test_the_examples_of_the_repository_can_be_read():
    few = ROOT / "tasks" / "few_shot_sums.jsonl"
    if not few.exists():
        pytest.skip("not in this checkout")
    new, _ = asked(SUM, f"--few-shot={few}")
    assert len(new["messages"]) == 1 + 2 * len(read_jsonl(few))


# --------------------------------------------------------------------------------------------------
# For whatever texts

TEXTS = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=30
)  # what a command line can hold
QUESTIONS = st.sampled_from(["1?", "2?", "3?", "4?"])


@settings(max_examples=25)
@given(TEXTS, TEXTS, st.dictionaries(QUESTIONS, TEXTS.filter(bool), min_size=1), QUESTIONS)
def test_a_question_is_always_asked_last(system, instruction, examples, question):
    """The turns alternate, the question ends them, and no flag's text is lost or changed."""
    problem = {"prompt": question, "instruction": "Old."}
    with tempfile.TemporaryDirectory() as folder:
        few = write_examples(Path(folder, "few.jsonl"), examples.items())
        argv = [f"--system-prompt={system}", f"--instruction={instruction}", few]
        (new,) = prompted([problem], CHAT, parsed(*argv))
    pairs = [(q, a) for q, a in examples.items() if q != question]
    first, *shown, last = new["messages"]
    assert first == {"role": "system", "content": system}
    assert last == {"role": "user", "content": question}  # `render` puts the instruction behind it
    assert [turn["role"] for turn in shown] == ["user", "assistant"] * (len(shown) // 2)
    end = f"\n{instruction}" if instruction else ""
    texts = [turn["content"] for turn in shown]
    assert texts == [text for q, a in pairs for text in (q + end, a)]
    text, _ = render(new, CHAT)
    assert text.endswith(f"{question}{end}<|im_end|>\n<|im_start|>assistant\n")
    plain, _ = render(new, PLAIN)
    assert plain.endswith(f"{question}{end}\n\nAssistant:")


@given(TEXTS, TEXTS, st.dictionaries(TEXTS, st.none() | st.booleans() | TEXTS, max_size=3))
def test_flags_outlive_a_resume(system, instruction, kwargs):
    """As saved in args.json and read again, whatever they begin with or hold."""
    parser = evaluation.build_parser()
    args = parser.parse_args(
        [
            f"--system-prompt={system}",
            f"--instruction={instruction}",
            f"--chat-template-kwargs={json.dumps(kwargs)}",
            f"--few-shot={system}",
        ]
    )
    saved = json.loads(json.dumps(vars(args)))
    assert parser.parse_args(flags.as_argv(parser, saved)) == args


STRANGE = ["-x", "--resume", "--model=none", "a=b", "two\nlines", "", "- b", "'\"$HOME\t", "ä 中"]


@pytest.mark.parametrize("script", [train, evaluation])
@pytest.mark.parametrize("text", STRANGE)
def test_a_resumed_run_has_strange_texts_again(tmp_path, script, text):
    argv = ["--output-dir", str(tmp_path), f"--system-prompt={text}", f"--instruction={text}"]
    args = script.parse_args([*argv, '--chat-template-kwargs={"a": "-=\\n"}'])
    write_json(tmp_path / "args.json", {**vars(args), "run": "1"})
    again = script.parse_args(["--resume", "--output-dir", str(tmp_path)])
    assert again.resume and not args.resume
    for name in ("system_prompt", "instruction", "chat_template_kwargs", "few_shot", "model"):
        assert getattr(again, name) == getattr(args, name)
    with pytest.raises(UserError, match="--instruction"):
        script.parse_args(["--resume", "--output-dir", str(tmp_path), "--instruction=new"])


def test_a_resumed_run_is_asked_the_same(tmp_path):
    """And when the examples have changed meanwhile, it does not go on."""
    model = build_checkpoint(tmp_path / "model", "qwen2")
    rows = [{"problem": f"What is {a} + 1?", "answer": str(a + 1)} for a in range(4)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    few = write_examples(tmp_path / "few.jsonl")
    argv = [f"--model={model}", f"--data={tmp_path}/data.jsonl", "--system-prompt=-s\n=", few]
    argv += ["--max-completion-length=3", "--device=cpu", "--threads=1"]
    where = ["--output-dir", str(tmp_path / "run")]
    begun = train.set_up(train.parse_args([*argv, *where]))
    resumed = train.set_up(train.parse_args(["--resume", *where]))
    assert resumed.problems == begun.problems
    text = begun.tokenizer.decode(begun.problems[0]["prompt_ids"])
    assert [role for role, _ in turns_of(text)] == ["system", *["user", "assistant"] * 3, "user"]
    write_examples(tmp_path / "few.jsonl", EXAMPLES[:2])
    with pytest.raises(UserError, match="problems"):
        train.set_up(train.parse_args(["--resume", *where]))


# --------------------------------------------------------------------------------------------------
# Mistakes of the user


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "1", "null", "true", '"a"', "[" * 10**5, "{a: 1}"]
)
@pytest.mark.parametrize("script", [train, evaluation, cast])
def test_kwargs_that_are_no_object(script, text, capsys):
    argv = ["--diagnose"] if script is cast else []
    with pytest.raises(SystemExit) as stop:
        script.parse_args([*argv, f"--chat-template-kwargs={text}"])
    assert stop.value.code == 2
    assert "JSON object" in capsys.readouterr().err.splitlines()[-1]


TAKEN = {
    "tokenize": True,
    "add_generation_prompt": False,
    "continue_final_message": True,
    "chat_template": "{{ messages[0]['content'] }}",
    "messages": [],
    "conversation": [],
    "self": 1,
    "return_dict": True,
    "return_tensors": "pt",
    "return_assistant_tokens_mask": True,
    "truncation": True,
    "max_length": 1,
}


@pytest.mark.parametrize("key", TAKEN)
def test_kwargs_that_are_not_the_templates(key):
    """They would change what a prompt is, or end in a TypeError of some library."""
    for options in ({key: TAKEN[key]}, {"enable_thinking": False, key: TAKEN[key]}):
        with pytest.raises(UserError, match=f"--chat-template-kwargs.*{key}") as error:
            asked(SUM, f"--chat-template-kwargs={json.dumps(options)}")
        assert in_one_line(error)


NAMES = st.sampled_from([*TAKEN, "tools", "documents", "enable_thinking", "eos_token", "loop", ""])
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.just("\ud800")


@given(st.dictionaries(NAMES | TEXTS, VALUES | st.lists(VALUES) | st.dictionaries(TEXTS, VALUES)))
def test_any_kwargs_give_a_text_or_one_line(options):
    try:
        _, text = asked(SUM, f"--chat-template-kwargs={json.dumps(options)}")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(text, str)
        assert turns_of(text) == [("user", "What is 12 + 30?\nAnswer with a number.")]
        assert not options.keys() & TAKEN.keys()


def test_kwargs_without_a_template():
    with pytest.raises(UserError, match="no chat template") as error:
        asked(SUM, '--chat-template-kwargs={"enable_thinking": false}', tokenizer=PLAIN)
    assert in_one_line(error)


def test_rendered_prompts_are_refused(tmp_path):
    rendered = {"prompt": "<|im_start|>user\nWhat is 1?<|im_end|>\n", "instruction": "Think."}
    kwargs = '--chat-template-kwargs={"a": 1}'
    few = write_examples(tmp_path / "few.jsonl")
    for flag in ("--system-prompt=S", "--instruction=", "--instruction=a", kwargs, few):
        with pytest.raises(UserError, match="rendered already") as error:
            prompted([SUM, rendered], CHAT, parsed(flag))
        assert in_one_line(error)
        # A chat whose first turn looks so is none.
        assert prompted([{**TALK, "prompt": rendered["prompt"]}], CHAT, parsed(flag))


FILES = {
    "no-such.jsonl": None,
    "half.jsonl": '{"question": "a", "answer": "b"}\n{"question": ',
    "list.jsonl": '["a", "b"]\n',
    "columns.jsonl": '{"a": "1", "b": "2"}\n',
    "unanswered.jsonl": '{"question": "a"}\n',
    "empty.jsonl": "",
    "text.txt": "a\n",
    "latin.jsonl": '{"question": "ä", "answer": "b"}'.encode("latin-1"),
    "": None,
}


@pytest.mark.parametrize("name", FILES)
def test_examples_that_cannot_be_read(tmp_path, name):
    if FILES[name] is not None:
        content = FILES[name]
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    path = str(tmp_path / name) if name else ""
    with pytest.raises(UserError, match="--few-shot") as error:
        asked(SUM, f"--few-shot={path}")
    assert in_one_line(error)


@pytest.mark.parametrize("more", [0, 1])
def test_too_many_examples(tmp_path, more):
    pairs = [(f"{i}?", str(i)) for i in range(MOST_EXAMPLES + more)]
    few = write_examples(tmp_path / "few.jsonl", pairs)
    if more:
        with pytest.raises(UserError, match=f"--few-shot.*{MOST_EXAMPLES}") as error:
            asked(SUM, few)
        assert in_one_line(error)
    else:
        assert len(asked(SUM, few)[0]["messages"]) == 2 * MOST_EXAMPLES + 1


@pytest.mark.parametrize("flag", ["--system-prompt", "--instruction"])
def test_a_text_that_is_not_unicode(flag, capsys):
    """As Python reads a byte of the command line that is no UTF-8. No tokenizer takes it."""
    with pytest.raises(SystemExit) as stop:
        train.parse_args([f"{flag}=a\udcff"])
    assert stop.value.code == 2
    assert flag in capsys.readouterr().err.splitlines()[-1]
