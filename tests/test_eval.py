"""The scores against enumeration, an interrupted evaluation against a whole one, and a real-shaped model from end to end."""

import itertools
import json
import random
import statistics

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
import train
from data import UserError
from eval import average, majority, pass_at_k
from tests.conftest import ROOT, build_checkpoint


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@given(st.integers(1, 7), st.data())
def test_pass_at_k_equals_the_enumeration_of_subsets_and_grows_with_k(n, data):
    counts = data.draw(st.lists(st.integers(0, n), min_size=1, max_size=4))
    values = []
    for k in range(1, n + 1):
        hits = [any(i < c for i in subset) for c in counts for subset in itertools.combinations(range(n), k)]
        values.append(pass_at_k(counts, n, k))
        assert values[-1] == pytest.approx(statistics.mean(hits))
    assert all(a <= b + 1e-12 for a, b in zip(values, values[1:]))
    assert values[0] == pytest.approx(average(counts, n)[0])
    for k in (0, n + 1):
        with pytest.raises(ValueError, match="pass@k"):
            pass_at_k(counts, n, k)


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=6), st.sampled_from("abc"))
def test_majority_equals_the_enumeration_of_tie_breaks(answers, gold):
    verdicts = [answer == gold for answer in answers]
    outcomes = []
    for order in itertools.permutations("abc"):  # every order in which ties could be broken
        counts = [(sum(answer == a for answer in answers), -order.index(a), a) for a in "abc"]
        count, _, winner = max(counts)
        outcomes.append(count > 0 and winner == gold)
    assert majority(answers, verdicts) == pytest.approx(statistics.mean(outcomes))


@pytest.mark.parametrize("spread", [0.1, 0.4])
def test_the_standard_error_agrees_with_a_bootstrap_over_problems(spread):
    rng, n = random.Random(0), 8
    counts = [sum(rng.random() < min(1, max(0, rng.gauss(0.5, spread))) for _ in range(n)) for _ in range(60)]
    mean, error = average(counts, n)
    resampled = [statistics.mean(rng.choices(counts, k=len(counts))) / n for _ in range(4000)]
    assert error == pytest.approx(statistics.stdev(resampled), rel=0.06)
    assert mean == pytest.approx(statistics.mean(counts) / n)
    for part in (counts[:2], counts[:3], counts):  # exactly, and for few problems, where n - 1 and n are not the same
        assert average(part, n)[1] == pytest.approx(statistics.stdev(c / n for c in part) / len(part) ** 0.5)
    assert average([3], n)[1] is None  # one problem has no spread


SMALL = ["--limit", "12", "--num-samples", "3", "--batch-size", "9", "--threads", "1", "--device", "cpu"]


def test_an_interrupted_evaluation_goes_on_as_if_nothing_had_happened(tmp_path):
    whole = evaluation.main([*SMALL, "--output-dir", str(tmp_path / "whole")])
    evaluation.main([*SMALL, "--output-dir", str(tmp_path / "parts")])
    path = tmp_path / "parts" / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 36
    path.write_text("".join(lines[:20]) + lines[20][:30])  # killed in the middle of a batch and of a line
    assert evaluation.main(["--resume", "--output-dir", str(tmp_path / "parts")]) == whole
    assert path.read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()
    record = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert record["results"] == whole and record["first_prompts"]["arithmetic"].endswith("=") and record["versions"]["torch"]
    result = whole["arithmetic"]
    assert result["problems"] == 12 and result["samples"] == 3
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert result["avg@3"] == pytest.approx(sum(row["right"] for row in rows) / 36)
    assert all(row["completion"].endswith("#" + row["answer"]) == row["right"] for row in rows)


def test_held_out_problems_are_not_in_the_training_stream():
    import data

    train_prompts = {problem["prompt"] for problem in data.load_problems("arithmetic", "train")[0]}
    assert not train_prompts & {problem["prompt"] for problem in data.load_problems("arithmetic", "test")[0]}


@pytest.mark.parametrize("flags, message", [
    ("--data no-such-set", "unknown"),
    ("--data dapo-math-17k", "training only"),
    ("--temperature 0", "--num-samples 1"),
    ("--num-samples 0", "at least 1"),
    ("--max-completion-length -3", "at least 1"),
    ("--limit -499", "at least 0"),
    ("--max-completion-length 600", "512 positions"),
    ("--num-samples 8 --batch-size 4", "at least 8"),
    ("--protocol tepo --num-samples 4", "leave them out"),
    ("--model no/such/dir/here", "no such directory"),
    ("--refusal harmful,no-such-set", "no-such-set: unknown"),
    ("--threads -1", "at least 0"),
    ("--lm-eval gsm8k --limit 1", "pip install lm-eval"),
])  # fmt: skip
def test_wrong_input_is_one_line(tmp_path, flags, message):
    if "lm-eval" in flags and __import__("importlib.util").util.find_spec("lm_eval"):
        pytest.skip("lm-eval is installed")
    with pytest.raises(UserError, match=message) as error:
        evaluation.main([*flags.split(), "--output-dir", str(tmp_path / "new")])
    assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


DAPO_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its own line after \"Answer:\"."
)


def dapo_folder(path):
    """A folder with the hub's schema of DAPO-Math-17k, three problems repeated four times."""
    rows = [
        {"data_source": "math_dapo", "prompt": [{"role": "user", "content": DAPO_PROMPT.format(f"What is {n} + 1?")}], "ability": "MATH",
         "reward_model": {"ground_truth": str(n + 1), "style": "rule"}, "extra_info": {"index": str(n)}}
        for n in (1, 2, 3)
    ] * 4  # fmt: skip
    (path / "data").mkdir(parents=True)
    pandas.DataFrame(rows).to_parquet(path / "data" / "train-00000-of-00001.parquet")
    (path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n")
    return str(path)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2"])
def test_a_real_shaped_model_trains_on_the_dapo_schema_and_is_evaluated(tmp_path, family, capsys):
    """Two steps of each family with a real BPE tokenizer (chat template, pad == eos) on a local folder of the hub's schema."""
    model = build_checkpoint(tmp_path / "model", family, **({} if family in ("qwen2", "qwen3") else {"chat_template": None}))
    flags = ["--model", model, "--data", dapo_folder(tmp_path / "dapo"), "--steps", "2", "--num-prompts", "2", "--num-generations", "2",
             "--steps-per-generation", "2", "--max-completion-length", "6", "--dynamic-sampling", "off", "--threads", "1",
             "--device", "cpu", "--learning-rate", "1e-3", "--output-dir", str(tmp_path / "run")]  # fmt: skip
    rows = train.train(train.parse_args(["--algo", "tepo", *flags]))
    assert len(rows) == 2 and all(row["updates"] == 2 for row in rows)
    shown = capsys.readouterr().out
    assert "12 rows, 3 kept, 9 duplicate prompt" in shown and "'2'" in shown
    assert ("chat template" if family in ("qwen2", "qwen3") else "plain") in shown
    assert "What is 1 + 1?" in shown and "boxed" in shown and "Answer: $Answer" not in shown
    assert "<|im_end|>" in shown and "<|endoftext|>" in shown  # stop tokens of the tokenizer and of the generation_config

    test_set = tmp_path / "test.jsonl"
    test_set.write_text("".join(json.dumps({"problem": f"What is {n} * 2?", "answer": 2 * n}) + "\n" for n in range(3)))
    results = evaluation.main(["--model", str(tmp_path / "run"), "--data", str(test_set), "--num-samples", "2", "--max-completion-length", "5",
                               "--threads", "1", "--device", "cpu", "--output-dir", str(tmp_path / "eval")])  # fmt: skip
    assert results[str(test_set)]["problems"] == 3 and 0 < results[str(test_set)]["mean_length"] <= 5


def test_the_protocol_of_the_paper_is_greedy_except_for_the_small_sets():
    args = evaluation.parse_args(["--protocol", "tepo"])
    assert evaluation.settings_of("aime24", args) == evaluation.settings_of("amc23", args) == (32, 0.6)
    assert evaluation.settings_of("math500", args) == evaluation.settings_of("olympiad", args) == (1, 0.0)
