"""--report-to: what trackers get of a run, and that a run does not need them."""

import argparse
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from engine.errors import UserError
from engine.files import read_jsonl, write_jsonl
from engine.trackers import TRACKERS, require, start_tracker
from tests.conftest import ROOT
from tests.test_train import SMALL, run

ARGS = argparse.Namespace(run="0123456789abcdef", steps=3, algo="tepo", digests={"a": "secret"})
ROWS = [{"step": n, "reward": n / 4, "kl": None, "a/b": n, "note": "text"} for n in (1, 2, 3)]


@pytest.fixture(scope="module")
def tensorboard():
    pytest.importorskip("tensorboard")
    return require("tensorboard")


def curves(directory):
    """What TensorBoard's own reader finds in a run: a dict key -> list of (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    keys = reader.Tags()["scalars"]
    return {key: [(event.step, event.value) for event in reader.Scalars(key)] for key in keys}


def sent(rows):
    """What a tracker should have of rows, in the form of `curves`."""
    found = {}
    for row in rows:
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)):
                number = pytest.approx(float(value), nan_ok=True)
                found.setdefault(key, []).append((row["step"], number))
    return found


# --------------------------------------------------------------------------------------------------
# TensorBoard

KEYS = st.sampled_from(["reward", "clip_ratio/low", "seconds/sample", "kl_mask_fraction"])
VALUES = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(width=32) | st.text(max_size=3)


@settings(max_examples=15)
@given(st.lists(st.dictionaries(KEYS, VALUES), max_size=4))
def test_tensorboard_has_the_numbers_by_step(tensorboard, rows):
    rows = [{"step": step, **row} for step, row in enumerate(rows, 1)]
    with tempfile.TemporaryDirectory() as folder:
        send = start_tracker("tensorboard", ARGS, Path(folder))
        for row in rows:
            before = dict(row)
            send(row)
            assert repr(row) == repr(before)  # it is the row of metrics.jsonl
        assert curves(Path(folder)) == sent(rows)


def test_a_resumed_run_goes_on_in_its_curves(tensorboard, tmp_path):
    """What was sent after the last checkpoint, by a run that was killed, is not there twice."""
    send = start_tracker("tensorboard", ARGS, tmp_path)
    for row in ROWS:
        send(row)
    for done in (2, 2, 0):  # twice killed after step 3, and once without a checkpoint
        write_jsonl(tmp_path / "metrics.jsonl", ROWS[:done])
        send = start_tracker("tensorboard", ARGS, tmp_path)
        for row in ROWS[done:]:
            send(row)
        assert curves(tmp_path) == sent(ROWS)


def test_a_run_with_tensorboard(tensorboard, tmp_path):
    where = tmp_path / "run"
    rows = run(where, "--steps", "2", "--report-to", "tensorboard")
    assert curves(where) == sent(rows)
    assert {"reward", "entropy", "seconds/sample"} <= curves(where).keys()
    rows = run(where, "--resume", "--steps", "3")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert curves(where) == sent(rows) == sent(read_jsonl(where / "metrics.jsonl"))
    assert not (where / "tensorboard" / "metrics.jsonl").exists()
    rows = run(where, "--overwrite", "--seed", "1", "--steps", "1", "--report-to", "tensorboard")
    assert curves(where) == sent(rows)  # and nothing of the run before
    with pytest.raises(UserError, match="--overwrite"):
        run(where, "--steps", "1")


def test_a_tracker_may_begin_with_a_resume(tensorboard, tmp_path):
    run(tmp_path / "run", "--steps", "1")
    assert not (tmp_path / "run" / "tensorboard").exists()
    rows = run(tmp_path / "run", "--resume", "--steps", "2", "--report-to", "tensorboard")
    assert curves(tmp_path / "run") == sent(rows[1:])


# --------------------------------------------------------------------------------------------------
# wandb and trackio, in processes of their own: they start threads and servers

SEND = """
import argparse, json, sys
from pathlib import Path
from engine.trackers import require, start_tracker
name, directory, args, rows = sys.argv[1:]
args = argparse.Namespace(**json.loads(args))
send = start_tracker(name, args, Path(directory))
for row in json.loads(rows):
    send(row)
if name == "wandb":
    import wandb
    run = wandb.run
    found = {"summary": dict(run.summary), "config": dict(run.config), "last": run.step}
    print("\\n" + json.dumps({**found, "id": run.id, "name": run.name, "project": run.project}))
require(name).finish()
"""


def send_from_another_process(name, directory, **environment):
    """Sends ROWS. Returns the process. Skips the test where the tracker wants the network."""
    pytest.importorskip(name)
    directory.mkdir(exist_ok=True)
    command = [sys.executable, "-c", SEND, name, str(directory)]
    command += [json.dumps(vars(ARGS)), json.dumps(ROWS)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    if "network" in done.stderr.lower() or "connection" in done.stderr.lower():
        pytest.skip(f"{name} wants the network")
    assert done.returncode == 0, done.stderr
    assert "note:" not in done.stdout
    return done


def test_wandb_offline(tmp_path):
    done = send_from_another_process(
        "wandb", tmp_path / "run", WANDB_MODE="offline", HOME=str(tmp_path)
    )
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    numbers = {key: v for key, v in found["summary"].items() if not key.startswith("_")}
    assert numbers == {"reward": 0.75, "a/b": 3}  # those of the last row
    assert found["summary"]["_step"] == 3
    assert found["config"] == {"run": ARGS.run, "steps": 3, "algo": "tepo"}
    assert (found["id"], found["name"]) == (ARGS.run, "run")
    written = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(written) == 1
    content = written[0].read_bytes()
    assert all(f"{row['reward']}".encode() in content for row in ROWS)


def test_trackio_in_a_folder(tmp_path):
    for _ in range(2):  # the second one goes on in the same run
        send_from_another_process("trackio", tmp_path / "run", TRACKIO_DIR=str(tmp_path / "t"))
    (path,) = (tmp_path / "t").glob("*.db")
    base = sqlite3.connect(path)
    rows = base.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    wanted = [(row["step"], {"reward": row["reward"], "a/b": row["a/b"]}) for row in ROWS]
    assert [(step, json.loads(text)) for _, step, text in rows] == 2 * wanted
    assert {name for name, _, _ in rows} == {f"run-{ARGS.run[:8]}"}
    assert len(base.execute("SELECT DISTINCT run_id FROM metrics").fetchall()) == 1
    base.close()


# --------------------------------------------------------------------------------------------------
# Trackers that fail


def test_no_tracker():
    send = start_tracker("none", ARGS, Path("no/such/folder"))
    assert all(send(row) is None for row in ROWS)
    assert not Path("no").exists()


@pytest.mark.parametrize("name", TRACKERS)
def test_without_its_package(tmp_path, monkeypatch, name):
    """One line that says what to install, before anything is written."""
    monkeypatch.setitem(sys.modules, name, None)
    if name != TRACKERS[name]:
        monkeypatch.delitem(sys.modules, TRACKERS[name], raising=False)
    argv = [*SMALL, "--report-to", name, "--output-dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match=f"--report-to {name}.*pip install {name}") as error:
        train.train(train.parse_args(argv))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--report-to", "paper"])
    assert "tensorboard" in capsys.readouterr().err


def test_a_tracker_that_cannot_start(tensorboard, tmp_path):
    (tmp_path / "tensorboard").write_text("a file where its folder should be")
    with pytest.raises(UserError, match="--report-to tensorboard") as error:
        start_tracker("tensorboard", ARGS, tmp_path)
    assert "\n" not in str(error.value)


def test_a_tracker_that_fails_later_is_left_alone(tensorboard, tmp_path, capsys):
    """It gets no more rows, and is spoken of once."""
    send = start_tracker("tensorboard", ARGS, tmp_path)
    send(ROWS[0])
    send({"step": 2, "reward": 10**400})  # no float is so large
    send({"step": 3, "reward": 10**400})
    send({"step": 4, "reward": 1.0})
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert out.startswith("note: tensorboard") and not err
    assert curves(tmp_path) == sent(ROWS[:1])


def test_a_run_outlives_its_tracker(tensorboard, tmp_path, monkeypatch, capsys):
    """Its folder is gone in the middle of the run: a full disk would look alike."""

    def broken(writer, *row):
        shutil.rmtree(tmp_path / "run" / "tensorboard", ignore_errors=True)
        raise OSError("No space left\non device")

    monkeypatch.setattr(tensorboard.SummaryWriter, "add_scalar", broken)
    rows = run(tmp_path / "run", "--steps", "2", "--report-to", "tensorboard")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["grad_norm"]) for row in rows)
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == rows
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    notes = [line for line in capsys.readouterr().out.splitlines() if "note: tensorboard" in line]
    assert len(notes) == 1 and "No space left on device" in notes[0]
