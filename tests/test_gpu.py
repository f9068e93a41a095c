"""experiments/gpu.py at toy scale on a CPU: what it measures, and what it says where it cannot."""

import contextlib
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from engine.errors import UserError
from experiments import bench, gpu
from rollout import ROW_TOKENS
from tests.conftest import ROOT

PARTS = [
    "bf16 less fp32",
    "sampler less scorer",
    "decoded tokens a second",
    "a pass, by checkpointing",
    "most tokens of a pass",
    "a step beside TRL's",
]
CPU = torch.device("cpu")


def run_gpu(path, *given):
    """What the JSON of a run at toy scale holds, and the lines that it prints."""
    printed = io.StringIO()
    argv = ["--shape", "tiny", "--device", "cpu", "--output", str(path), *given]
    with contextlib.redirect_stdout(printed):
        gpu.main(argv)
    return json.loads(path.read_text()), printed.getvalue().splitlines()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A whole run: the record and the lines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "WORK", dict(bench.WORK))
        return run_gpu(tmp_path_factory.mktemp("gpu") / "new" / "gpu.json")


def numbers(found):
    """All numbers in a nest of dicts."""
    if isinstance(found, dict):
        return [number for value in found.values() for number in numbers(value)]
    return [found] if isinstance(found, float | int) else []


def cells(line):
    """The cells of a line of a Markdown table."""
    assert line.startswith("| ") and line.endswith(" |")
    return line[2:-2].split(" | ")


def test_each_part_gives_numbers(toy):
    record, lines = toy
    assert record["device"] == "CPU"
    assert record["shape"] == "tiny"
    assert record["torch"] == torch.__version__
    for part in PARTS:
        assert all(map(math.isfinite, numbers(record[part]))), part
        assert any(line.startswith(f"{part}: ") for line in lines), part


def test_bit_widths_differ(toy):
    bits = toy[0]["bf16 less fp32"]["tiny"]
    assert 1e-3 < bits["max"] < 1
    assert 1e-5 < bits["mean"] < bits["max"]
    assert bits["ratio"] == 0  # two passes of one kind agree bit for bit


def test_the_sampler_agrees_with_the_scorer_in_fp32(toy):
    found = toy[0]["sampler less scorer"]["tiny"]
    assert found["shared"] is True
    assert found["fp32"]["max"] < 1e-4
    assert 10 * found["fp32"]["max"] < found["bf16"]["max"] < 1
    assert found["bf16"]["mean"] < found["bf16"]["max"]


def test_speed(toy):
    record, _ = toy
    assert list(record["decoded tokens a second"]) == ["8 rows", "32 rows"]
    assert all(speed > 0 for speed in record["decoded tokens a second"].values())
    for values in record["a pass, by checkpointing"].values():
        assert values["tokens"] == ROW_TOKENS
        assert 0 < values["seconds"] < 60
        assert values["GB before"] is None and values["GB peak"] is None  # a CPU cannot say
    for values in record["most tokens of a pass"].values():
        assert values == {"fits": 2 * ROW_TOKENS, "too large": None}


def test_a_step_of_both_engines(toy):
    found = toy[0]["a step beside TRL's"]["tiny"]
    measured = {"ours": found["ours"]}
    if importlib.util.find_spec("trl"):
        measured["trl"] = found["trl"]
    else:
        assert found["trl"] is None
    for values in measured.values():
        assert values["seconds"] > 0
        assert values["per 1k"] > values["seconds"]  # there are 32 completions of 16 tokens at most
        assert values["GB"] >= 0


def test_the_row(toy):
    record, lines = toy
    title, rule, row = lines[-3:]
    assert cells(title) == list(record)
    assert set(record) >= set(PARTS)
    assert rule == "|---" * len(record) + "|"
    assert len(cells(row)) == len(record)
    assert all(cells(row))
    assert "failed" not in row
    largest = f"{record['bf16 less fp32']['tiny']['max']:.2g}"
    assert cells(row)[list(record).index("bf16 less fp32")].startswith(f"tiny max {largest}, mean")


def test_no_time_at_all(tmp_path):
    record, lines = run_gpu(tmp_path / "gpu.json", "--minutes", "0")
    assert [record[part] for part in PARTS] == [None] * len(PARTS)
    assert cells(lines[-1])[-len(PARTS) :] == ["not measured"] * len(PARTS)
    assert len(cells(lines[-1])) == len(cells(lines[-3]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path):
    path = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "experiments.gpu", "--device", "cuda", "--output", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu.py: error: --device cuda: this machine")
    assert done.stderr.count("\n") == 1
    assert not path.exists()


def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(*arguments):
        raise ValueError("no kernel | image")

    for name in ("bits", "sampler", "one_pass", "largest_batch", "beside_trl"):
        monkeypatch.setattr(gpu, name, lambda *arguments: {"x": 1.5})
    monkeypatch.setattr(gpu, "decode", broken)
    printed = io.StringIO()
    path = tmp_path / "gpu.json"
    with pytest.raises(UserError, match="decoded tokens a second"):  # noqa: SIM117
        with contextlib.redirect_stdout(printed):
            gpu.main(["--shape", "tiny", "--device", "cpu", "--output", str(path)])
    record = json.loads(path.read_text())
    assert record["decoded tokens a second"] == {"failed": "no kernel | image"}
    assert record["a step beside TRL's"] == {"x": 1.5}
    row = cells(printed.getvalue().splitlines()[-1])
    assert len(row) == len(record)
    assert row[list(record).index("decoded tokens a second")] == "failed"


@pytest.mark.parametrize(
    "limit, fits, too_large", [(0, None, 1), (1, 1, 2), (3, 2, 4), (9, 4, None)]
)
def test_the_end_of_memory(monkeypatch, limit, fits, too_large):
    """Memory for `limit` rows; tried are 1, 2 and 4."""

    def learn(model, tokens):
        if tokens > limit * ROW_TOKENS:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "in_training", lambda *arguments: (None, None))
    monkeypatch.setattr(gpu, "learn", learn)
    scale = {"tokens": ROW_TOKENS, "most_tokens": 4 * ROW_TOKENS}
    found = gpu.largest_batch("tiny", CPU, scale, False, time.monotonic() + 60)
    rows = {key: value and value // ROW_TOKENS for key, value in found.items()}
    assert rows == {"fits": fits, "too large": too_large}
    found = gpu.largest_batch("tiny", CPU, scale, False, time.monotonic() - 1)
    assert found == {"fits": None, "too large": None}  # there was no time


def test_checkpointing_is_on_where_it_is_asked_for(monkeypatch):
    asked = []
    recompute = gpu.models.recompute_activations
    monkeypatch.setattr(
        gpu.models, "recompute_activations", lambda model: asked.append(recompute(model))
    )
    model, optimizer = gpu.in_training("tiny", CPU, recompute=False)
    assert asked == []
    assert all("exp_avg" in state for state in optimizer.state.values())
    assert all(p.grad is not None for p in model.parameters())
    gpu.in_training("tiny", CPU, recompute=True)
    assert asked == [model.config.num_hidden_layers]


def test_precision_of_sampler_and_scorer(monkeypatch):
    """The two are compared in one precision, and then in the other."""
    seen = []

    def watched(name, function):
        def call(*arguments, **options):
            seen.append((name, torch.is_autocast_enabled("cpu")))
            return function(*arguments, **options)

        monkeypatch.setattr(gpu, name, call)

    watched("sample", gpu.sample)
    watched("score", gpu.score)
    gpu.sampler("tiny", CPU, {"prompts": 1, "length": 4})
    assert seen == [("sample", False), ("score", False), ("sample", True), ("score", True)]
    seen.clear()
    gpu.bits("tiny", CPU, {"prompts": 1, "length": 4})
    passes = [("score", True), ("score", False), ("score", True)]
    assert seen == [("sample", False), *passes]


def test_an_engine_that_fails_or_takes_too_long(monkeypatch, capsys):
    given = dict(shape="tiny", work={}, device="cpu", model="tiny", data="arithmetic")
    ended = SimpleNamespace(stdout="a line\n", stderr="Traceback\nCUDA out of memory\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: ended)
    found = gpu.run_engine("trl", given, time.monotonic() + 60)
    assert found == {"failed": "Traceback CUDA out of memory"}
    assert capsys.readouterr().out == "trl failed: Traceback CUDA out of memory\n"

    def too_long(command, timeout, **options):
        assert 0 <= timeout <= 60
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", too_long)
    assert gpu.run_engine("ours", given, time.monotonic() + 60) is None
    assert gpu.run_engine("ours", given, time.monotonic() - 60) is None


def test_text_of_a_cell():
    found = {"a": {"x": 0.01234, "y": None}, "b": {"z": 262144, "w": {"failed": "a | b"}}}
    assert gpu.text(found) == "a x 0.012, y not measured; b z 262,144, w failed"
    assert gpu.text({"8 rows": 12345.6}) == "8 rows 12,346"
    assert gpu.text("CPU") == "CPU"
    assert gpu.text(None) == "not measured"
