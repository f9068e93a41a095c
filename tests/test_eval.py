"""Scores against enumeration, resumed against uninterrupted evaluations, tasks of a user's own."""

import importlib.util
import itertools
import json
import random
import re
import shutil
import statistics
import sys
from types import ModuleType, SimpleNamespace
from zlib import crc32

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
import rollout
import tasks
from engine import models
from engine.errors import UserError
from eval import average, majority, pass_at_k
from tests.conftest import ROOT, build_checkpoint

ON_CPU = ["--threads", "1", "--device", "cpu"]
SMALL = ["--limit", "4", "--num-samples", "3", "--batch-size", "9", *ON_CPU]

REWARDS = [-0.5, 0.25, 1, 2.5]
TASK = """
from zlib import crc32


def load(split):
    return [{"prompt": f"{n}+3+4+{n}=", "answer": 2 * n + 7, "kind": split} for n in range(1, 6)]


def reward(problem, text):
    assert problem["kind"] == "test"
    return [-0.5, 0.25, 1, 2.5][crc32(text.encode()) % 4]
"""
VOTES = """

def answer(problem, text):
    mark = crc32(text.encode())
    if mark % 5 == 0:
        return None
    return (mark % 2, [1, 1.0][mark % 3 % 2])  # (0, 1) and (0, 1.0) are equal
"""


def run(folder, *argv):
    """The results of an evaluation and the folder's results.json and samples.jsonl."""
    results = evaluation.main([*argv, "--output-dir", str(folder)])
    record = json.loads((folder / "results.json").read_text())
    lines = (folder / "samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return SimpleNamespace(results=results, record=record, rows=rows)


def by_problem(rows):
    """The lines of each problem."""
    groups = {}
    for row in rows:
        groups.setdefault(row["problem"], []).append(row)
    return list(groups.values())


# --------------------------------------------------------------------------------------------------
# Scores


@given(st.integers(1, 7), st.data())
def test_pass_at_k(n, data):
    counts = data.draw(st.lists(st.integers(0, n), min_size=1, max_size=4))
    values = []
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        hits = [any(i < c for i in subset) for c in counts for subset in subsets]
        values.append(pass_at_k(counts, n, k))
        assert values[-1] == pytest.approx(statistics.mean(hits))
    assert all(a <= b + 1e-12 for a, b in zip(values, values[1:]))
    assert values[0] == pytest.approx(statistics.mean(counts) / n)
    for k in (0, n + 1):
        with pytest.raises(ValueError, match="pass@k"):
            pass_at_k(counts, n, k)


@given(
    st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=6), st.sampled_from("abc")
)
def test_majority(votes, gold):
    verdicts = [vote == gold for vote in votes]
    outcomes = []
    for order in itertools.permutations("abc"):  # every order in which ties could be broken
        ranked = [(votes.count(a), -order.index(a), a) for a in "abc"]
        times, _, winner = max(ranked)
        outcomes.append(times > 0 and winner == gold)
    assert majority(votes, verdicts) == pytest.approx(statistics.mean(outcomes))


@pytest.mark.parametrize("spread", [0.1, 0.4])
def test_standard_error_bootstrap(spread):
    rng = random.Random(0)
    n = 8
    means = []
    for _ in range(60):
        chance = rng.gauss(0.5, spread)
        means.append(sum(rng.random() < chance for _ in range(n)) / n)
    mean, error = average(means)
    resampled = [statistics.mean(rng.choices(means, k=len(means))) for _ in range(4000)]
    assert mean == pytest.approx(statistics.mean(means))
    assert error == pytest.approx(statistics.stdev(resampled), rel=0.06)


@pytest.mark.parametrize("means", [[0, 1], [0.25, 1, 0.5], [-0.5, 2.5, 1, 1]])
def test_standard_error_of_few(means):
    mean, error = average(means)
    squares = sum((value - mean) ** 2 for value in means)
    assert error == pytest.approx((squares / (len(means) - 1) / len(means)) ** 0.5)
    assert average(means[:1]) == (means[0], None)  # one problem has no spread


# --------------------------------------------------------------------------------------------------
# Resume


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted evaluation on two data sets, whose last batches are smaller than others."""
    folder = tmp_path_factory.mktemp("whole")
    task = folder / "task.py"
    task.write_text(TASK + VOTES)
    return run(folder / "run", *SMALL, "--data", f"arithmetic,{task}"), folder / "run"


@pytest.mark.parametrize("lines", [0, 5, 9, 11, 12, 14, 21, 23, 24])
def test_resume_equals_whole(whole, tmp_path, lines):
    """12 lines a data set, in batches of 9 and 3, and a run that died in the middle of a line."""
    expected, folder = whole
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "samples.jsonl"
    written = path.read_text().splitlines(keepends=True)
    assert len(written) == 24
    path.write_text("".join(written[:lines]) + "".join(written[lines : lines + 1])[:30])
    (tmp_path / "run" / "results.json").unlink()
    resumed = run(tmp_path / "run", "--resume")
    assert resumed.results == expected.results
    assert path.read_text() == (folder / "samples.jsonl").read_text()
    assert resumed.record["first_prompts"] == expected.record["first_prompts"]


def test_resume_samples_only_the_rest(whole, tmp_path, monkeypatch):
    _, folder = whole
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:21]))
    asked = []
    complete = evaluation.complete

    def counting(model, tokenizer, problems, *rest):
        asked.extend(problem["prompt"] for problem in problems)
        return complete(model, tokenizer, problems, *rest)

    monkeypatch.setattr(evaluation, "complete", counting)
    run(tmp_path / "run", "--resume")
    assert asked == ["4+3+4+4="]


def test_resume_keeps_its_flags(whole, tmp_path):
    _, folder = whole
    shutil.copytree(folder, tmp_path / "run")
    for flags in (["--num-samples", "2"], ["--protocol", "tepo"], ["--seed", "1"]):
        with pytest.raises(UserError, match=flags[0]):
            run(tmp_path / "run", "--resume", *flags)


def test_resume_protocol(tmp_path):
    flags = ["--protocol", "tepo", "--limit", "5", "--batch-size", "2", *ON_CPU]
    expected = run(tmp_path, *flags)
    (tmp_path / "samples.jsonl").write_text("")
    assert run(tmp_path, "--resume").rows == expected.rows
    with pytest.raises(UserError, match="--temperature"):
        run(tmp_path, "--resume", "--temperature", "0.6")


# --------------------------------------------------------------------------------------------------
# What is sampled, and what is counted of it


def test_results_are_those_of_the_samples(whole):
    run, _ = whole
    result = run.results["arithmetic"]
    rows = [row for row in run.rows if row["data"] == "arithmetic"]
    assert run.record["results"] == run.results
    assert run.record["first_prompts"]["arithmetic"] == rows[0]["prompt"]
    assert run.record["versions"]["torch"] and run.record["args"]["seed"] == 0
    assert run.record["args"]["max_completion_length"] == 256  # half of the positions
    assert (result["problems"], result["samples"]) == (4, 3)
    assert result["avg@3"] == pytest.approx(sum(row["right"] for row in rows) / 12)
    assert result["pass@1"] == pytest.approx(result["avg@3"])
    assert result["mean_length"] == pytest.approx(sum(row["length"] for row in rows) / 12)
    held_out = [problem["prompt"] for problem in tasks.load("arithmetic", "test").problems]
    for i, row in enumerate(rows):
        assert row["prompt"] == held_out[row["problem"]] and row["problem"] == i // 3
        assert row["completion"].endswith("#" + row["answer"]) == row["right"]


def test_pass_at_powers_of_two():
    rows = [
        {"problem": 0, "reward": right, "right": right, "vote": "1", "length": 2, "truncated": True}
        for right in [True, False, False, False, False, False]
    ]
    result = evaluation.summarise(rows, 6, has_votes=True)
    passes = {key: value for key, value in result.items() if key.startswith("pass")}
    assert passes == pytest.approx({"pass@1": 1 / 6, "pass@2": 1 / 3, "pass@4": 2 / 3, "pass@6": 1})
    assert result["truncated"] == 1


def test_held_out_problems():
    train = {problem["prompt"] for problem in tasks.load("arithmetic", "train").problems}
    assert not train & {problem["prompt"] for problem in tasks.load("arithmetic", "test").problems}


def test_rewards_of_any_size(tmp_path, capsys):
    """avg@n is the mean reward, right is a reward of at least 1, and there is no vote."""
    (tmp_path / "task.py").write_text(TASK)
    name = str(tmp_path / "task.py")
    flags = ["--data", name, "--num-samples", "4", "--temperature", "2", *ON_CPU]
    found = run(tmp_path / "run", *flags)
    rewards = [row["reward"] for row in found.rows]
    assert len(rewards) == 20 and set(rewards) == set(REWARDS)
    marks = [crc32(row["completion"].encode()) for row in found.rows]
    assert rewards == [REWARDS[mark % 4] for mark in marks]
    assert [row["right"] for row in found.rows] == [reward >= 1 for reward in rewards]
    assert found.rows[0]["answer"] == "9" and found.rows[0]["vote"] is None

    result = found.results[name]
    means = [statistics.mean(row["reward"] for row in group) for group in by_problem(found.rows)]
    assert result["avg@4"] == pytest.approx(statistics.mean(rewards))
    assert result["stderr"] == pytest.approx(statistics.stdev(means) / 5**0.5)
    counts = [sum(row["right"] for row in group) for group in by_problem(found.rows)]
    assert result["pass@1"] == pytest.approx(sum(counts) / 20)
    assert result["pass@4"] == statistics.mean(c > 0 for c in counts)
    assert result["maj@4"] is None
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith(f"{name} "))
    assert line.split()[6] == "-"


def test_equal_answers_vote_together(whole):
    run, _ = whole
    name = run.record["args"]["data"].split(",")[1]
    groups = by_problem(row for row in run.rows if row["data"] == name)
    expected = []
    for group in groups:
        marks = [crc32(row["completion"].encode()) for row in group]
        votes = [None if mark % 5 == 0 else mark % 2 for mark in marks]
        expected.append(majority(votes, [row["right"] for row in group]))
    assert run.results[name]["maj@3"] == pytest.approx(statistics.mean(expected))


def test_spellings_of_equal_answers():
    answers = iter([1, 1.0, "x", None])
    task = tasks.Task("t", [], lambda problem, text: 0.5, lambda problem, text: next(answers), {})
    data_set = evaluation.DataSet("t", task, [{"prompt": "?"}], 4, 1.0)
    sample = SimpleNamespace(text="", completion_ids=[1], truncated=False)
    spellings = {}
    rows = [evaluation.judged(data_set, 0, sample, spellings) for _ in range(4)]
    assert [row["vote"] for row in rows] == ["1", "1", "x", None]


def test_a_failing_reward_is_one_line(tmp_path):
    (tmp_path / "task.py").write_text(TASK.replace("-0.5, 0.25, 1, 2.5", "None, None, None, None"))
    with pytest.raises(UserError, match="task.py") as error:
        run(tmp_path / "run", "--data", str(tmp_path / "task.py"), *SMALL)
    assert "\n" not in str(error.value)


def test_greedy_needs_no_seed(tmp_path):
    flags = ["--limit", "3", *ON_CPU]
    greedy = ["--temperature", "0", "--num-samples", "1"]
    texts = {}
    for seed in ("0", "1"):
        for kind, more in {"greedy": greedy, "sampled": []}.items():
            rows = run(tmp_path / f"{kind}-{seed}", *flags, *more, "--seed", seed).rows
            texts[kind, seed] = [row["completion"] for row in rows]
    assert texts["greedy", "0"] == texts["greedy", "1"]
    assert texts["sampled", "0"] != texts["sampled", "1"]


def test_batches_differ(tmp_path):
    """Equal prompts in different batches get different samples."""
    task = 'def load(split):\n    return [{"prompt": "3+4+5+6="}] * 6\n'
    (tmp_path / "task.py").write_text(task + "def reward(problem, text):\n    return 0\n")
    flags = ["--data", str(tmp_path / "task.py"), "--num-samples", "3", "--batch-size", "3"]
    rows = run(tmp_path / "run", *flags, *ON_CPU).rows
    texts = {tuple(row["completion"] for row in group) for group in by_problem(rows)}
    assert len(texts) > 1


def test_equal_problems_of_two_sets_get_different_samples(tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(TASK)
    flags = ["--data", f"{tmp_path}/a.py,{tmp_path}/b.py", "--temperature", "1.5", *SMALL]
    rows = run(tmp_path / "run", *flags).rows
    half = len(rows) // 2
    first, second = rows[:half], rows[half:]
    assert [row["prompt"] for row in first] == [row["prompt"] for row in second]
    assert [row["completion"] for row in first] != [row["completion"] for row in second]


def test_refusals_are_judged_by_greedy_answers(monkeypatch):
    """A sum has many likely answers, and one that is the most likely."""
    found = []
    complete = evaluation.complete

    def spied(*arguments, **options):
        found.append(complete(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(evaluation, "complete", spied)
    tokenizer = models.load_tokenizer(str(ROOT / "tiny"))
    model = models.load_model(str(ROOT / "tiny"), torch.device("cpu"))
    problems = tasks.prompts.encode([{"prompt": "3+4+5+6="}] * 24, tokenizer, 100)
    args = evaluation.parse_args(["--batch-size", "12", "--max-completion-length", "24"])
    rates = evaluation.refusal_rates(model, tokenizer, {"sums": problems}, args)
    assert rates["sums"]["prompts"] == 24
    assert [len(samples) for samples in found] == [12, 12]
    assert len({s.text for samples in found for s in samples}) == 1


def test_truncated(tmp_path):
    """Of 4 tokens are the lazy completions, such as 3#3 and the stop token. The rest is cut."""
    rows = run(tmp_path, "--limit", "12", "--max-completion-length", "4", *ON_CPU).rows
    assert len({row["truncated"] for row in rows}) == 2
    for row in rows:
        assert row["length"] == 4
        assert row["truncated"] == (re.fullmatch(r"\d#\d", row["completion"]) is None)


def test_threads(tmp_path):
    before = torch.get_num_threads()
    try:
        run(tmp_path, "--limit", "1", "--threads", "2", "--device", "cpu")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_protocol():
    args = evaluation.parse_args(["--protocol", "tepo"])
    many = {"num_samples": 32, "temperature": 0.6}
    one = {"num_samples": 1, "temperature": 0}
    for name in ("aime24", "amc23", "aime25:some/copy.jsonl"):
        assert evaluation.sampling_of(name, args) == many
    assert (
        evaluation.sampling_of("math500", args) == evaluation.sampling_of("olympiad", args) == one
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2"])
def test_real_checkpoint(tmp_path, family):
    """A run of each family with a real BPE tokenizer (chat template, pad == eos), and a file."""
    chat = family in ("qwen2", "qwen3")
    options = {} if chat else {"chat_template": None}
    build_checkpoint(tmp_path / "run" / "checkpoint-2", family, **options)
    problems = [{"problem": f"What is {n} * 2?", "answer": 2 * n} for n in range(3)]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    flags = ["--model", str(tmp_path / "run"), "--data", str(path), "--num-samples", "2"]
    found = run(tmp_path / "eval", *flags, "--max-completion-length", "5", *ON_CPU)
    result = found.results[str(path)]
    prompt = found.record["first_prompts"][str(path)]
    assert result["problems"] == 3 and 0 < result["mean_length"] <= 5
    assert "What is 0 * 2?" in prompt and "boxed" in prompt
    assert ("<|im_start|>" in prompt) == chat
    assert [row["answer"] for row in found.rows] == ["0", "0", "2", "2", "4", "4"]


# --------------------------------------------------------------------------------------------------
# Refusal rates, and lm-evaluation-harness


def test_refusal_rates(tmp_path, monkeypatch):
    """The embedded model never refuses, so another judge counts: of four verbs one is "make"."""
    judges = evaluation.refusals
    monkeypatch.setattr(judges, "is_refusal", lambda text, opened: text.startswith("sure: make"))
    monkeypatch.setattr(judges, "is_degenerate", lambda text, opened: "bomb" in text)
    prompts = ["make bomb?", "make cake?", "sell hat?", "use rake?", "make doll?"]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    flags = ["--limit", "8", "--num-samples", "1", "--batch-size", "2", *ON_CPU]
    refusal = run(tmp_path / "run", *flags, "--refusal", f"harmful,{path}").record["refusal"]
    assert refusal == {
        "harmful": {"prompts": 8, "refusal_rate": 0.25, "degenerate": 0.5},
        str(path): {"prompts": 5, "refusal_rate": 0.6, "degenerate": 0.2},
    }
    refusal = run(tmp_path / "run", "--resume", "--refusal").record["refusal"]
    assert refusal["harmful"]["degenerate"] == 0.5
    assert refusal["benign"] == {"prompts": 8, "refusal_rate": 0.25, "degenerate": 0}


@pytest.mark.parametrize("length, fits", [(400, True), (448, True), (449, False)])
def test_refusals_are_short(tmp_path, monkeypatch, length, fits):
    """A prompt and an answer of 64 tokens must fit into 512 positions, not one of 256."""
    drawn = []

    def recorded(*args, **options):
        drawn.append(options["max_completion_length"])
        return rollout.sample(*args, **options)

    monkeypatch.setattr(evaluation, "sample", recorded)
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"prompt": "+" * length}) + "\n")
    flags = ["--limit", "1", "--refusal", str(path), "--max-completion-length", "256", *ON_CPU]
    if fits:
        assert run(tmp_path / "run", *flags).record["refusal"][str(path)]["prompts"] == 1
        assert drawn == [256, 64]
    else:
        with pytest.raises(UserError, match="512 positions"):
            run(tmp_path / "run", *flags)


def test_lm_eval(tmp_path, monkeypatch):
    """What the harness gives is recorded. What it raises is one line, and all else is written."""

    def simple_evaluate(model, tasks, limit):
        if "no-such-task" in tasks:
            raise KeyError("no-such-task")
        return {"results": {task: {"acc": 0.5, "limit": limit, "n": {1}} for task in tasks}}

    harness = ModuleType("lm_eval")
    harness.simple_evaluate = simple_evaluate
    huggingface = ModuleType("lm_eval.models.huggingface")
    huggingface.HFLM = lambda pretrained, tokenizer, batch_size: pretrained
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    monkeypatch.setitem(sys.modules, "lm_eval.models", ModuleType("lm_eval.models"))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", huggingface)

    record = run(tmp_path / "run", *SMALL, "--lm-eval", "one,two").record
    assert record["lm_eval"]["two"] == {"acc": 0.5, "limit": 4, "n": "{1}"}
    with pytest.raises(UserError, match="no-such-task"):
        run(tmp_path / "bad", *SMALL, "--lm-eval", "no-such-task")
    written = json.loads((tmp_path / "bad" / "results.json").read_text())
    assert written["results"] == record["results"]


# --------------------------------------------------------------------------------------------------
# Mistakes of the user


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data no-such-set", "unknown"),
        ("--data no-such-task.py", "no such file"),
        ("--data arithmetic,dapo-math-17k", "training only"),
        ("--temperature 0", "--num-samples 1"),
        ("--max-completion-length 600", "512 positions"),
        ("--num-samples 8 --batch-size 4", "at least 8"),
        ("--protocol tepo --num-samples 8", "leave them out"),
        ("--protocol tepo --temperature 0.6", "leave them out"),
        ("--model no/such/dir/here", "no such directory"),
        ("--refusal harmful,no-such-set", "no-such-set: unknown"),
        ("--lm-eval gsm8k --limit 1", "pip install"),
        ("--resume", "args.json"),
    ],
)
def test_wrong_input(tmp_path, flags, message):
    """One line, and nothing is written."""
    if "lm-eval" in flags and importlib.util.find_spec("lm_eval"):
        pytest.skip("lm-eval is installed")
    with pytest.raises(UserError, match=message) as error:
        evaluation.main([*flags.split(), "--output-dir", str(tmp_path / "new")])
    assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "flags",
    [
        "--num-samples 0",
        "--max-completion-length -3",
        "--max-prompt-length 0",
        "--batch-size 0",
        "--limit -499",
        "--threads -1",
        "--temperature -1",
        "--temperature nan",
        "--protocol other",
    ],
)
def test_wrong_value(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluation.parse_args(flags.split())
    assert ended.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_model_is_checked_first(tmp_path, monkeypatch):
    """A model that cannot be sampled right is refused before anything is written."""

    def refuse(model, longest):
        raise UserError(f"no good at {longest} tokens")

    monkeypatch.setattr(evaluation, "check_model", refuse)
    with pytest.raises(UserError, match="no good at 34 tokens"):  # the longest prompt has 12
        run(tmp_path / "run", "--max-completion-length", "22", *ON_CPU)
    assert not (tmp_path / "run").exists()


def test_other_runs_stay(tmp_path):
    """A folder that is not an evaluation's is neither replaced nor gone on with."""
    (tmp_path / "args.json").write_text(json.dumps({"script": "train"}))
    for flag in ("--overwrite", "--resume"):
        with pytest.raises(UserError, match="train|eval"):
            run(tmp_path, *SMALL, flag)
    assert len(list(tmp_path.iterdir())) == 1
