"""experiments/compare.py: what it says of a run, its test over pairs, toy runs."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
from engine.files import read_jsonl
from engine.models import load_model, load_tokenizer, stop_token_ids
from experiments import compare
from rollout import sample
from tasks import arithmetic
from tests.conftest import names_in


@given(st.lists(st.floats(0, 1), min_size=3, max_size=30))
def test_steps_to_is_the_first_crossing(rewards):
    found = compare.steps_to(rewards, level=0.5)
    means = {step: sum(rewards[step - 3 : step]) / 3 for step in range(3, len(rewards) + 1)}
    first = next((step for step, mean in means.items() if mean >= 0.5), None)
    if first is None:
        assert found is None
    elif first == 3:
        assert found == 3
    else:
        assert first - 1 <= found <= first
        share = found - (first - 1)
        crossed = (1 - share) * means[first - 1] + share * means[first]
        assert crossed == pytest.approx(0.5, abs=1e-9)


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=7))
def test_sign_flips_by_enumeration(differences):
    """Whole numbers, whose sums are exact, so that ties are ties."""
    p = compare.sign_flip_p([float(d) for d in differences])
    means = [
        abs(sum(s * d for s, d in zip(signs, differences)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    assert p == sum(mean >= abs(sum(differences)) for mean in means) / len(means)
    assert p >= 2 ** (1 - len(differences))


def test_a_claim_in_words():
    def runs(values):
        return [{"steps_to_0.8": value} for value in values]

    results = {"TEPO, x": runs([6, 7, 8, None]), "GRPO, x": runs([12, 14, 16, 9])}
    (pair,) = compare.against_tepo(results)
    sentence = compare.claim(results, *pair)
    assert "0.500 times the steps of GRPO" in sentence and "3 of 4 seeds" in sentence
    assert f"equal steps: p = {2 / 8:.3g}, the paper's 0.55: p = " in sentence
    panel = {"token ratio, GRPO": runs([7, 7]), "mean (TEPO)": runs([14, 14])}
    (pair,) = compare.against_tepo(panel)
    sentence = compare.claim(panel, *pair)
    assert "mean (TEPO) needs 2.000 times the steps of token ratio, GRPO" in sentence
    assert "paper" not in sentence
    assert "0 pairs" in compare.claim({"a": runs([None]), "b": runs([5])}, "a", "b")


@pytest.mark.parametrize("name", compare.EXPERIMENTS)
def test_flags_of_every_setting_are_known(name, tmp_path):
    """And the settings of an experiment differ, and go to folders of their own."""
    args = compare.parse_args([name])
    seen = set()
    for label, (updates, flags) in compare.EXPERIMENTS[name].items():
        updates = updates or args.updates
        command = compare.train_command(args, tmp_path, label, 0, updates, flags)
        parsed = vars(train.parse_args(command[1:]))
        made = parsed["steps_per_generation"] * parsed["num_iterations"]
        assert made == updates and parsed["steps"] == compare.STEPS[updates][0]
        assert parsed["dynamic_sampling"] == "filter" and parsed["overlong"] == "none"
        seen.add(parsed["output_dir"])
        if name != "convergence":
            assert parsed.get("epsilon", 0.2) == 0.2
            assert parsed.get("epsilon_high", 0.28) == 0.28
        if name == "convergence":
            assert parsed["epsilon_high"] == (0.028 if "tight" in label else 0.28)
            assert label.startswith(parsed["algo"].upper())
    assert len(seen) == len(compare.EXPERIMENTS[name])


def test_the_lazier_model_is_what_the_sparse_task_says(tmp_path):
    compare.make_lazier(tmp_path / "lazier")
    model = load_model(str(tmp_path / "lazier"), "cpu")
    tokenizer = load_tokenizer(str(tmp_path / "lazier"))
    problems = arithmetic.load("train")[:200]
    samples = sample(
        model,
        [tokenizer(problem["prompt"]).input_ids for problem in problems],
        8,
        max_completion_length=48,
        temperature=1.0,
        stop_ids=stop_token_ids(model, tokenizer),
        generator=None,
    )
    texts = [tokenizer.decode(s.completion_ids, skip_special_tokens=True) for s in samples]
    right = [arithmetic.reward(problems[i // 8], text) for i, text in enumerate(texts)]
    assert 0.005 < sum(right) / len(right) < 0.08
    groups = [sum(right[i : i + 8]) for i in range(0, len(right), 8)]
    assert sum(group == 0 for group in groups) / len(groups) > 0.6


def test_the_whole_at_toy_scale(tmp_path, capsys):
    flags = ["lemma", "--steps", "1", "--seeds", "2", "--jobs", "2"]
    flags += ["--output-dir", str(tmp_path)]
    compare.main(flags)
    out = capsys.readouterr().out
    folder = tmp_path / "lemma-sums"
    assert {"results.jsonl", "table.md", "curves.png", "tepo-0", "tepo-1"} <= names_in(folder)
    assert (folder / "table.md").read_text() in out and "with A > 0" in out
    rows = read_jsonl(folder / "results.jsonl")
    assert [row["seed"] for row in rows] == [0, 1]
    for row in rows:
        (metrics,) = read_jsonl(folder / f"tepo-{row['seed']}" / "metrics.jsonl")
        assert row["rewards"] == [metrics["task_reward"]]
        assert 0 < metrics["A>0, dH<0"] < metrics["A>0"] < 1
        assert math.isclose(row["M"], metrics["kl_mask_fraction"])
        # At the first update nothing has moved; later M is just these tokens.
        assert metrics["A>0, dH<0"] == pytest.approx(metrics["kl_mask_fraction"], abs=0.02)
    stamp = (folder / "tepo-0" / "metrics.jsonl").stat().st_mtime_ns
    compare.main(flags)  # all is done: nothing runs again
    assert (folder / "tepo-0" / "metrics.jsonl").stat().st_mtime_ns == stamp


def test_the_ratios_are_drawn(tmp_path):
    """Of a setting that some method never solves, too."""
    results = {
        label: [summary_of(6), summary_of(7)] for label in compare.EXPERIMENTS["convergence"]
    }
    results["GRPO, 8 updates, tight clip"] = [summary_of(None), summary_of(None)]
    assert len(compare.against_tepo(results)) == 14
    compare.draw_ratios(results, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").stat().st_size > 10_000


def summary_of(steps):
    return {"steps_to_0.8": steps}


@pytest.mark.parametrize(
    "flags, words",
    [("--only PPO", "no such setting"), ("--updates 16", "choose by --only")],
)
def test_what_convergence_has_not_is_one_line(flags, words, capsys):
    with pytest.raises(SystemExit):
        compare.parse_args(["convergence", *flags.split()])
    assert words in capsys.readouterr().err
