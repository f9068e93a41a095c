"""A run's directory: what is of others stays, what is seen is whole, and nothing is mixed."""

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import cast
import eval as evaluation
import train
from engine import files, runs
from engine.errors import UserError, run_script
from engine.models import resolve_model
from experiments.kills import watch
from tests.conftest import ROOT, names_in

SUMS = f"--data {ROOT}/tests/sums.py --threads 1 --device cpu"
SMALL = f"""{SUMS} --num-prompts 2 --num-generations 4 --max-completion-length 24 --steps 1
    --steps-per-generation 1 --num-iterations 1 --dynamic-sampling off""".split()
SMALL_EVAL = f"{SUMS} --num-samples 1 --batch-size 4 --max-completion-length 8".split()
SMALL_CAST = """--examples 8 --steps 1 --batch-size 8 --sensitivity gate --threads 1
    --device cpu""".split()


def trained(directory, *given):
    return train.train(train.parse_args([*SMALL, "--output-dir", str(directory), *given]))


def evaluated(directory, *given):
    return evaluation.main([*SMALL_EVAL, "--output-dir", str(directory), *given])


def bytes_of(directory):
    """All files below a directory, as a dict name -> content."""
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    """A finished run of one step. Tests copy it."""
    directory = tmp_path_factory.mktemp("old") / "run"
    trained(directory)
    return directory


@pytest.fixture
def a_run(old_run, tmp_path):
    return shutil.copytree(old_run, tmp_path / "run")


# --------------------------------------------------------------------------------------------------
# What is not ours


def add_foreign(directory):
    """Puts things of a user into a run's directory. Returns their names."""
    for name in ("mydata", "checkpoint-best", "checkpoint-7", "checkpoint-07"):
        (directory / name).mkdir()
        (directory / name / "letter.txt").write_text("Dear")
    (directory / "checkpoint-notes.txt").write_text("good one")
    (directory / "notes.md").write_text("mine")
    (directory / ".hidden.new").write_text("mine")
    (directory / "checkpoint-3").symlink_to(directory / "mydata")
    return names_in(directory)


@pytest.mark.parametrize("given", [["--overwrite"], ["--resume", "--steps", "2"]])
def test_what_others_put_into_a_run_stays(a_run, given):
    before = add_foreign(a_run)
    foreign = {name: text for name, text in bytes_of(a_run).items() if "letter" in name}
    if "--overwrite" in given:
        trained(a_run, *given)
        assert names_in(a_run) == before
    else:
        train.train(train.parse_args(["--output-dir", str(a_run), *given]))
        assert names_in(a_run) == before - {"checkpoint-1"} | {"checkpoint-2"}
    assert foreign.items() <= bytes_of(a_run).items()
    assert (a_run / ".hidden.new").exists()


def test_an_old_run_is_not_deleted_for_a_checkpoint_that_is_in_the_way(a_run):
    (a_run / "checkpoint-2").mkdir()
    before = bytes_of(a_run)
    with pytest.raises(UserError, match="checkpoint-2"):
        trained(a_run, "--overwrite", "--steps", "2")
    assert bytes_of(a_run) == before


def test_a_damaged_checkpoint_of_whomever_is_not_deleted(a_run):
    (a_run / "checkpoint-7").mkdir()
    (a_run / "checkpoint-7" / "trainer.json").write_text("[1]")
    (a_run / "checkpoint-7" / "letter.txt").write_text("Dear")
    trained(a_run, "--overwrite")
    assert names_in(a_run / "checkpoint-7") == {"trainer.json", "letter.txt"}
    with pytest.raises(UserError, match="damaged"):  # it may be the newest
        train.main(["--output-dir", str(a_run), "--resume"])


def test_a_run_is_not_deleted_under_the_feet_of_the_next(a_run):
    before = bytes_of(a_run)
    with pytest.raises(UserError, match="begins"):
        trained(a_run, "--overwrite", "--model", str(a_run))
    assert bytes_of(a_run) == before


def test_the_model_of_a_run_is_its_own_last_checkpoint(a_run):
    (a_run / "old.gguf").write_bytes(b"GGUF")
    shutil.copytree(a_run / "checkpoint-1", a_run / "checkpoint-9")
    saved = json.loads((a_run / "checkpoint-9" / "trainer.json").read_text())
    (a_run / "checkpoint-9" / "trainer.json").write_text(json.dumps({**saved, "run": "another"}))
    assert resolve_model(str(a_run)) == str(a_run / "checkpoint-1")


def test_a_real_model_is_not_taken_for_the_run_around_it(a_run, monkeypatch):
    monkeypatch.chdir(a_run)
    assert not runs.is_embedded("Qwen2.5-1.5B")
    assert runs.is_embedded("checkpoint-1")


def test_tuned_may_be_a_link_that_is_not_followed(tmp_path):
    flags = [*SMALL_CAST, "--output-dir", str(tmp_path / "run")]
    cast.main(["--diagnose", "--tune", *flags])
    (tmp_path / "run" / "tuned").rename(tmp_path / "disk")
    (tmp_path / "run" / "tuned").symlink_to(tmp_path / "disk")
    before = bytes_of(tmp_path / "disk")
    with pytest.raises(UserError, match="tuned"):
        cast.main(["--tune", *flags])
    assert bytes_of(tmp_path / "disk") == before
    (tmp_path / "run" / ".tuned.gone").symlink_to(tmp_path / "disk")
    files.tidy(tmp_path / "run", runs.is_own)
    assert bytes_of(tmp_path / "disk") == before
    assert os.listdir(tmp_path / "disk")


def test_a_checkpoint_of_another_run_is_neither_used_nor_replaced(a_run, tmp_path):
    trained(tmp_path / "other", "--steps", "2")
    shutil.copytree(tmp_path / "other" / "checkpoint-2", a_run / "checkpoint-2")
    assert runs.own_checkpoints(a_run) == [a_run / "checkpoint-1"]
    before = bytes_of(a_run / "checkpoint-2")
    with pytest.raises(UserError, match="checkpoint-2"):
        train.train(train.parse_args(["--output-dir", str(a_run), "--resume", "--steps", "2"]))
    assert bytes_of(a_run / "checkpoint-2") == before
    assert (a_run / "checkpoint-1" / "trainer.json").exists()


@pytest.mark.parametrize("inner", ["mydata", "checkpoint-1", "checkpoint-2", "."])
def test_overwrite_wants_a_run(a_run, inner):
    (a_run / "mydata").mkdir()
    (a_run / "mydata" / "letter.txt").write_text("Dear")
    (a_run / "checkpoint-2").mkdir()
    (a_run / "checkpoint-2" / "letter.txt").write_text("Dear")
    if inner == ".":
        (a_run / "args.json").write_text('{"script": "eval"}')
    before = bytes_of(a_run)
    with pytest.raises(UserError, match="left alone"):
        trained(a_run / inner, "--overwrite")
    assert bytes_of(a_run) == before


def test_as_many_checkpoints_are_kept_as_were_asked_for(tmp_path):
    trained(tmp_path, "--steps", "4", "--save-steps", "1", "--save-total-limit", "2")
    assert [path.name for path in runs.checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


def test_an_empty_output_dir_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    for main in (train.main, evaluation.main, cast.main):
        with pytest.raises(SystemExit) as ended:
            main(["--output-dir", "", "--overwrite"])
        assert ended.value.code == 2
    assert names_in(tmp_path) == {"thesis.txt"}


@pytest.mark.parametrize("fault", ["--seed=99999999999999999999", "--model=nowhere/", "--data=no"])
def test_an_old_run_is_deleted_when_the_new_one_can_start(a_run, fault):
    before = bytes_of(a_run)
    with pytest.raises((UserError, SystemExit)):
        trained(a_run, "--overwrite", fault)
    assert bytes_of(a_run) == before


# --------------------------------------------------------------------------------------------------
# Killed, locked, full


def killed_at_every_change(directory, make, change):
    """Yields after each kill: `change` runs in a child that does not make its change number N.

    make: function () that sets the directory up.
    """
    number = 0
    while True:
        shutil.rmtree(directory, ignore_errors=True)
        make()
        child = os.fork()
        if child == 0:
            watch(directory, number)
            change()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        yield
        if status == 0:
            return
        number += 1


def test_a_folder_is_whole_whenever_its_writer_is_killed(tmp_path):
    tuned = tmp_path / "run" / "tuned"

    def write(text):
        with files.replacing(tuned) as folder:
            (folder / "a").write_text(text)
            (folder / "b").write_text(text)

    def make():
        tuned.parent.mkdir()
        write("old")

    seen = set()
    kills = 0
    for _ in killed_at_every_change(tuned.parent, make, lambda: write("new")):
        files.tidy(tuned.parent, runs.is_own)
        texts = [(tuned / name).read_text() for name in ("a", "b")]
        assert texts in (["old", "old"], ["new", "new"])
        assert os.listdir(tuned.parent) == ["tuned"]
        write("again")  # nothing is in the way
        seen.add(texts[0])
        kills += 1
    assert seen == {"old", "new"}
    assert kills > 7


def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path):
    path = tmp_path / "run" / "args.json"

    def make():
        path.parent.mkdir()
        files.write_json(path, {"text": "old"})

    change = lambda: files.write_json(path, {"text": "new"})  # noqa: E731
    texts = []
    for _ in killed_at_every_change(path.parent, make, change):
        texts.append(files.read_json(path)["text"])
    assert texts == sorted(texts, reverse=True)
    assert set(texts) == {"old", "new"}


def test_a_start_that_was_killed_is_in_nobodys_way(tmp_path):
    for given in ([], ["--overwrite"]):
        directory = tmp_path / f"run{len(given)}"
        directory.mkdir()
        (directory / ".args.json.new").write_text('{"scr')
        (directory / ".lock").write_text("process 1")
        trained(directory, *given)
        assert not (directory / ".args.json.new").exists()


@pytest.mark.parametrize("given", [["--resume"], ["--overwrite"]])
def test_a_live_run_is_not_disturbed(a_run, given):
    program = f"""
import sys
from engine.runs import lock
lock({str(a_run)!r})
print("locked", flush=True)
sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "locked\n"
        before = bytes_of(a_run)
        with pytest.raises(UserError, match=str(other.pid)):
            train.train(train.parse_args(["--output-dir", str(a_run), *given]))
        assert bytes_of(a_run) == before
    finally:
        other.kill()
        other.communicate()
    train.train(train.parse_args(["--output-dir", str(a_run), *given, "--steps", "1"]))


def full_disk(main, argv, room):
    """Runs a script in a child that cannot write files of more than `room` bytes.

    Returns its exit code and what it wrote to stderr.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr = os.fdopen(2, "w")
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        code = 0
        try:
            run_script(lambda: main(argv), "script")
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = 99
        sys.stderr.flush()
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), text


@pytest.mark.parametrize("room", [50, 400, 100_000, 2_000_000])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_whole(a_run, room):
    before = bytes_of(a_run / "checkpoint-1")
    argv = ["--output-dir", str(a_run), "--resume", "--steps", "2"]
    code, text = full_disk(train.main, argv, room)
    assert code == 1
    assert text.strip().splitlines()[-1].startswith("script: error: ")
    assert "Traceback" not in text
    assert bytes_of(a_run / "checkpoint-1") == before
    assert len(train.train(train.parse_args(argv))) == 2


def test_a_full_disk_keeps_the_tuned_model(tmp_path):
    argv = [*SMALL_CAST, "--output-dir", str(tmp_path)]
    cast.main(["--diagnose", "--tune", *argv])
    before = bytes_of(tmp_path)
    for room in (1_000, 1_000_000):
        code, text = full_disk(cast.main, ["--tune", "--learning-rate", "1e-2", *argv], room)
        assert code == 1
        assert "Traceback" not in text
        assert bytes_of(tmp_path) == before


# --------------------------------------------------------------------------------------------------
# Wrong results that look right


def write_sums(path, numbers):
    rows = [{"problem": f"{a}+{a}=", "answer": str(2 * a)} for a in numbers]
    files.write_jsonl(path, rows)


@pytest.mark.parametrize("changed", [(2, 1, 3, 4), (1, 2, 3), (1, 2, 3, 5), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("script", ["train", "eval"])
def test_a_run_does_not_go_on_with_other_data(tmp_path, changed, script):
    data = tmp_path / "data.jsonl"
    write_sums(data, (1, 2, 3, 4))
    go = trained if script == "train" else evaluated
    go(tmp_path / "run", "--data", str(data))
    write_sums(data, changed)
    before = bytes_of(tmp_path / "run")
    main = train.main if script == "train" else evaluation.main
    with pytest.raises(UserError, match="problems"):
        main(["--resume", "--output-dir", str(tmp_path / "run")])
    assert bytes_of(tmp_path / "run") == before
    write_sums(data, (1, 2, 3, 4))
    main(["--resume", "--output-dir", str(tmp_path / "run")])


def test_an_evaluation_does_not_go_on_with_other_weights(a_run, tmp_path):
    evaluated(tmp_path / "eval", "--model", str(a_run), "--limit", "4")
    record = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert record["args"]["checkpoint"] == str(a_run / "checkpoint-1")
    assert len(record["args"]["digests"]["weights of --model in torch.float32"]) == 64
    more = ["--output-dir", str(a_run), "--resume", "--steps", "2", "--learning-rate", "1e-2"]
    train.train(train.parse_args(more))
    with pytest.raises(UserError, match="weights"):
        evaluation.main(["--resume", "--output-dir", str(tmp_path / "eval")])


def test_a_run_does_not_go_on_with_another_objective_or_reference(tmp_path):
    own = tmp_path / "own.py"
    own.write_text((ROOT / "dapo.py").read_text())
    trained(tmp_path / "run", "--algo", str(own))
    own.write_text((ROOT / "grpo.py").read_text())
    with pytest.raises(UserError, match="code"):
        train.main(["--resume", "--output-dir", str(tmp_path / "run")])

    model = shutil.copytree(ROOT / "tiny", tmp_path / "model")
    grpo = ["--algo", "grpo", "--beta", "0.1", "--model", str(model), "--data", "arithmetic"]
    trained(tmp_path / "grpo", *grpo)
    trained(tmp_path / "other", "--learning-rate", "1e-2")
    weights = tmp_path / "other" / "checkpoint-1" / "model.safetensors"
    shutil.copy(weights, model / "model.safetensors")
    with pytest.raises(UserError, match="weights"):
        train.main(["--resume", "--output-dir", str(tmp_path / "grpo"), "--steps", "2"])


def test_adapters_are_not_merged_into_another_base(tmp_path):
    pytest.importorskip("peft")
    model = shutil.copytree(ROOT / "tiny", tmp_path / "model")
    lora = ["--lora-rank", "2", "--algo", "grpo", "--epsilon-high", "0.2"]
    trained(tmp_path / "lora", "--model", str(model), *lora)
    evaluated(tmp_path / "before", "--model", str(tmp_path / "lora"), "--limit", "2")
    trained(tmp_path / "other", "--learning-rate", "1e-2")
    shutil.copy(tmp_path / "other" / "checkpoint-1" / "model.safetensors", model)
    with pytest.raises(UserError, match="changed"):
        evaluated(tmp_path / "after", "--model", str(tmp_path / "lora"), "--limit", "2")
    assert not (tmp_path / "after").exists()


def test_weights_that_are_not_finite_replace_nothing(a_run, tmp_path, monkeypatch):
    before = bytes_of(a_run / "checkpoint-1")

    def overflow(optimizer):
        optimizer.param_groups[0]["params"][3].data[0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    argv = ["--output-dir", str(a_run), "--resume", "--steps", "2"]
    with pytest.raises(UserError, match="finite"):
        train.train(train.parse_args(argv))
    assert bytes_of(a_run / "checkpoint-1") == before
    assert len(runs.checkpoints(a_run)) == 1

    monkeypatch.undo()
    flags = [*SMALL_CAST, "--output-dir", str(tmp_path / "cast")]
    cast.main(["--diagnose", "--tune", *flags])
    before = bytes_of(tmp_path / "cast")
    with pytest.raises(UserError, match="finite"):
        cast.main(["--tune", *flags, "--steps", "3", "--learning-rate", "1e30"])
    assert bytes_of(tmp_path / "cast") == before


def test_moments_that_are_not_finite_replace_nothing(a_run, monkeypatch):
    before = bytes_of(a_run / "checkpoint-1")
    step = torch.optim.AdamW.step

    def overflow(optimizer):
        step(optimizer)
        next(iter(optimizer.state.values()))["exp_avg_sq"].fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    argv = ["--output-dir", str(a_run), "--resume", "--steps", "2"]
    with pytest.raises(UserError, match="moments"):
        train.train(train.parse_args(argv))
    assert bytes_of(a_run / "checkpoint-1") == before


def test_a_tuned_model_and_its_numbers_come_together(tmp_path):
    flags = [*SMALL_CAST, "--output-dir", str(tmp_path)]
    cast.main(["--diagnose", "--tune", *flags])
    assert {"tune.json", "args.json", "model.safetensors"} <= names_in(tmp_path / "tuned")
    assert runs.is_embedded(str(tmp_path / "tuned"))


def test_a_run_without_any_reward_says_so(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    write_sums(data, (1, 2, 3, 4))  # the embedded model knows nothing of boxes
    argv = [*SMALL, "--data", str(data), "--output-dir", str(tmp_path / "run")]
    train.main(argv)
    assert "frac_reward_zero_std" in capsys.readouterr().out
    train.main([*SMALL, "--output-dir", str(tmp_path / "good"), "--num-prompts", "8"])
    assert "frac_reward_zero_std" not in capsys.readouterr().out


def test_moments_survive_a_change_of_the_learning_rate(a_run):
    """The groups of the optimizer are the new run's, its moments the old one's."""
    first = load_file(a_run / "checkpoint-1" / "trainer.safetensors")
    argv = ["--output-dir", str(a_run), "--resume", "--steps", "2", "--learning-rate", "1e-3"]
    train.train(train.parse_args(argv))
    second = load_file(a_run / "checkpoint-2" / "trainer.safetensors")
    assert first["step.0"] == 1
    assert second["step.0"] == 2
