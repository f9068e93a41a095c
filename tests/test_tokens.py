"""train.py --picture-tokens: what is recorded is what the update saw, and the page is safe."""

from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
from engine import tokens
from engine.files import read_jsonl, write_jsonl
from tests.conftest import names_in

SMALL = """--num-prompts 6 --num-generations 4 --max-completion-length 24 --steps-per-generation 3
    --threads 1 --device cpu --log-completions-steps 2 --seed 3""".split()


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """The folder of a run of three steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("run")
    flags = [*SMALL, "--steps", "3", "--save-steps", "1", "--save-total-limit", "3"]
    train.train(train.parse_args([*flags, "--picture-tokens", "--output-dir", str(folder)]))
    return folder


def test_rows_are_what_the_update_saw(pictured):
    rows = read_jsonl(pictured / "tokens.jsonl")
    assert {row["step"] for row in rows} == {1, 2, 3}
    for step in (1, 2, 3):
        here = [row for row in rows if row["step"] == step]
        assert len(here) == 2 * 2  # a right and a wrong one, in each epoch
        assert len({row["prompt"] for row in here}) == 1
        assert {row["task_reward"] for row in here} == {0.0, 1.0}
    for row in rows:
        A = row["advantage"]
        assert (A > 0) == (row["task_reward"] == 1)
        assert row["kl_mask_fraction"] == [A > 0 and dH < 0 for dH in row["dH"]]
        assert len(set(row["ratio"])) == 1  # TEPO has one a completion
        clipped = row["clip_ratio/low"][0] or row["clip_ratio/high"][0]
        ratio = row["ratio"][0]
        assert clipped == ((ratio < 0.98 and A < 0) or (ratio > 1.028 and A > 0))
        counts = {len(value) for value in row.values() if isinstance(value, list)}
        assert counts == {row["length"]}
        if row["update"] == 1:
            assert ratio == 1 and not any(row["dH"])


def test_it_changes_nothing_of_the_run(pictured, tmp_path):
    flags = [*SMALL, "--steps", "3", "--output-dir", str(tmp_path / "plain")]
    train.train(train.parse_args(flags))
    assert not {"tokens.jsonl", "tokens.html"} & names_in(tmp_path / "plain")
    with_pictures, plain = (
        [
            {key: x for key, x in row.items() if "second" not in key and "memory" not in key}
            for row in read_jsonl(folder / "metrics.jsonl")
        ]
        for folder in (pictured, tmp_path / "plain")
    )
    assert with_pictures == plain


def test_a_resumed_run_pictures_no_step_twice(pictured, tmp_path):
    run = tmp_path / "run"
    flags = [*SMALL, "--save-steps", "1", "--picture-tokens", "--output-dir", str(run)]
    train.train(train.parse_args([*flags, "--steps", "1"]))
    first = read_jsonl(run / "tokens.jsonl")
    late = [{**row, "step": 2} for row in first]  # a kill came between these and the checkpoint
    write_jsonl(run / "tokens.jsonl", first + late)
    train.train(train.parse_args(["--resume", "--steps", "3", "--output-dir", str(run)]))
    assert read_jsonl(run / "tokens.jsonl") == read_jsonl(pictured / "tokens.jsonl")


class Page(HTMLParser):
    """The tags of a page, and all of its text."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def row_of(texts, dH, **changes):
    """A row of tokens.jsonl."""
    return {
        "step": 1,
        "update": 1,
        "prompt": texts[0],
        "task_reward": 1.0,
        "advantage": 0.5,
        "length": len(texts),
        "tokens": texts,
        "entropy": [1.0] * len(texts),
        "dH": dH,
        **changes,
    }


@given(st.lists(st.tuples(st.text(max_size=8), st.floats(-3, 3)), min_size=1, max_size=5))
def test_whatever_a_model_writes_stays_text(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("page")
    texts = [text for text, _ in pairs]
    texts += ["<script>alert(1)</script>", "</span>", '" onmouseover="x', "\u202e\x1b[2J&amp;"]
    dH = [value for _, value in pairs] + [0.0] * 4
    write_jsonl(folder / "tokens.jsonl", [row_of(texts, dH)])
    tokens.write_page(folder, "<b>tepo")
    page = Page((folder / "tokens.html").read_text())
    allowed = "html meta title style h1 h2 p b span i u code div".split()
    for tag, attributes in page.tags:
        assert tag in allowed and set(attributes) <= {"class", "style", "title", "charset", "lang"}
    assert "<script>alert(1)</script>" in page.text and "\u202e" not in page.text
    assert sum("title" in attributes for _, attributes in page.tags) == len(texts)


def test_marks_say_what_the_row_says(tmp_path):
    """Clip, M and the sign of dH each have a mark that does not need colour."""
    row = row_of(
        list("abcd"),
        [-0.5, 0.5, 0.0, -0.5],
        **{
            "ratio": [1.5, 1.0, 1.0, 1.0],
            "clip_ratio/low": [False] * 4,
            "clip_ratio/high": [True, False, False, False],
            "kl_mask_fraction": [False, False, False, True],
        },
    )
    spans = [tokens.token_span(row, t, 0.5) for t in range(4)]
    assert ["clip" in span.split(">")[0].split("style")[0] for span in spans] == [1, 0, 0, 0]
    assert [' M"' in span for span in spans] == [0, 0, 0, 1]
    assert ["top:50%" in span for span in spans] == [1, 0, 1, 1]
    assert "ratio 1.5" in spans[0] and "dH -0.5" in spans[0]
    write_jsonl(tmp_path / "tokens.jsonl", [{**row, "step": s} for s in range(1, 100)])
    tokens.write_page(tmp_path, "many")
    text = (tmp_path / "tokens.html").read_text()
    assert text.count("<h2>") == tokens.MOST_STEPS and "step 1:" in text and "step 99:" in text


def test_the_last_mixed_group_is_chosen():
    def group(*rewards):
        return [SimpleNamespace(task_reward=reward) for reward in rewards]

    groups = [group(1, 0, 1), group(0, 1, 0), group(1, 1, 1)]
    assert tokens.choose(groups) == [groups[1][1], groups[1][0]]
    assert tokens.choose(groups[2:]) == [] == tokens.choose([])
