"""What a user or a stranger's files can do wrong, in all three scripts.

A row says what is wrong, how it is made, the command, the exit code: 2 for what the user can mend,
1 where the system fails, 0 where a run can go on. Whatever the row, there is no traceback, a few
lines at most, no character that a terminal would obey. Where a command is refused, nothing is left
behind and no file has changed. The scripts run inside this process, by `run_script`, in a folder
that holds what `given` makes.
"""

import json
import logging
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers  # here, or its log would go to the captured stderr of a test
from safetensors.torch import load_file, save_file

import cast
import eval as evaluation
import tasks
import train
from engine import flags
from engine.errors import run_script
from tasks.rows import unicode
from tests.conftest import ROOT

SCRIPTS = {"train": train, "eval": evaluation, "cast": cast}
SECONDS = 60  # a row takes less than one; longer is a hang
# Quick commands on the model and the data of `given`.
TRAIN = """train --model model --data sums.py --steps 1 --num-prompts 2 --num-generations 2
    --steps-per-generation 1 --num-iterations 1 --max-completion-length 4 --threads 1"""
EVAL = """eval --model model --data sums.py --num-samples 2 --max-completion-length 4
    --threads 1"""
CAST = """--model model --examples 4 --steps 1 --batch-size 2 --max-completion-length 4
    --threads 1"""
DIAGNOSE = f"cast --diagnose --sensitivity gate {CAST}"
TUNE = f"cast --tune --output-dir cast-run {CAST}"
RESUME = "train --resume --output-dir train-run"
RESUME_EVAL = "eval --resume --output-dir eval-run"
SUMS = """
import os


def load(split):
    return [{"prompt": f"{a}+2=", "answer": str(a + 2)} for a in range(1, 5)]


def reward(problem, text):
    if os.path.exists("signal"):
        os.kill(os.getpid(), int(open("signal").read()))
    return float(sum(map(ord, text)) % 2)
"""


# --------------------------------------------------------------------------------------------------
# Running a row


class Hang(BaseException):
    """A row took too long."""


def hang(number, frame):
    raise Hang


def run(command):
    """Runs a command as its script would. Returns the exit code."""
    name, *argv = shlex.split(command) if isinstance(command, str) else command
    try:
        run_script(partial(SCRIPTS[name].main, argv), f"{name}.py")
    except SystemExit as stop:
        return stop.code
    return 0


def seen(folder):
    """Every file and folder below a folder, with what changes when it is written to.

    The lock of a run is no content, and Python keeps the compiled files of a user's module.
    """
    found = {}
    for path in Path(folder).rglob("*"):
        if path.name != ".lock" and "__pycache__" not in path.parts:
            status = path.lstat()
            is_file = path.is_file()
            found[str(path)] = (status.st_size, status.st_mtime_ns) if is_file else None
    return found


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a model, a task, and a run of each script."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=16, head_dim=2, initializer_range=0.5)
    own = transformers.AutoConfig.from_pretrained(ROOT / "tiny", **small)
    transformers.AutoModelForCausalLM.from_config(own).save_pretrained(folder / "model")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tiny" / name, folder / "model" / name)
    (folder / "sums.py").write_text(SUMS)
    rows = [{"problem": f"{a}+2=", "answer": str(a + 2)} for a in range(1, 5)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert run(f"{TRAIN} --steps 2 --output-dir train-run --algo grpo") == 0
        assert run(f"{EVAL} --output-dir eval-run") == 0
        assert run(f"{DIAGNOSE} --output-dir cast-run") == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(given, tmp_path, monkeypatch, capfd):
    """A copy of `given` as the current directory. It is gone afterwards."""
    for handler in logging.getLogger("transformers").handlers:
        if type(handler) is logging.StreamHandler:  # a terminal would show what it writes
            monkeypatch.setattr(handler, "stream", sys.stderr)
    here = tmp_path / "here"
    shutil.copytree(given, here)
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "argv", ["script"])
    monkeypatch.setattr(tasks.prompts, "RENDER_SECONDS", 0.5)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)}
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    yield here
    signal.alarm(0)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    shutil.rmtree(here)


def check(command, code, here, capfd):
    """Runs a command and checks all that a row promises."""
    before = seen(here)
    capfd.readouterr()
    found = run(command)
    out, err = capfd.readouterr()
    assert found == code, err or out
    assert "Traceback" not in err
    assert all(c.isprintable() or c == "\n" for c in out + err), "control characters"
    if code:
        assert 1 <= len(err.strip().splitlines()) <= 3, err
        assert len(err) < 1000, err
        assert seen(here) == before


# --------------------------------------------------------------------------------------------------
# Numbers: every numeric flag of every script

NO_NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1e400",
    "9" * 5000,
    "many",
    "",
    " ",
    "1,5",
    "\x1b[31m",
]
FRACTIONS = set(
    """--temperature --learning-rate --weight-decay --max-grad-norm --adam-beta2 --epsilon
    --epsilon-high --beta --own-fraction --skip""".split()
)  # all others are whole
MAY_BE_ZERO = set(
    """--temperature --weight-decay --adam-beta2 --epsilon --beta --own-fraction --skip
    --own-number --overlong-cache --lora-rank --save-steps --limit --seed --threads
    --judge-examples --mask-examples""".split()
)
MAY_BE_NEGATIVE = {"--own-fraction", "--own-number"}


def numeric_flags():
    """Every flag that takes a number, those of objectives included, with its parser."""
    found = []
    objective = dict(epsilon=0.2, epsilon_high=0.2, beta=0.1, own_number=1, own_fraction=0.5)
    parsers = {
        "train": train.build_parser(objective, {}),
        "eval": evaluation.build_parser(),
        "cast": cast.build_parser(),
    }
    for script, parser in parsers.items():
        for action in parser._actions:
            if action.type not in (None, str, unicode, flags.folder):
                flag = action.option_strings[0]
                found.append(pytest.param(parser, script, flag, id=f"{script} {flag}"))
    return found


@pytest.mark.parametrize("parser, script, flag", numeric_flags())
def test_a_number_that_is_none(parser, script, flag, capsys):
    values = list(NO_NUMBERS)
    if flag not in FRACTIONS:
        values += ["1.5", "1e3", "0x10"]
    if flag not in MAY_BE_NEGATIVE:
        values += ["-1", "-1e-9"]
    if flag not in MAY_BE_ZERO or (script, flag) == ("train", "--temperature"):
        values += ["0"]
    for value in values:
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([f"{flag}={value}"])
        err = capsys.readouterr().err
        assert stop.value.code == 2, value
        assert len(err) < 600, value
        assert all(c.isprintable() or c == "\n" for c in err)


# --------------------------------------------------------------------------------------------------
# How a row's fault is made, in the current directory


def put(path, content):
    """A function that writes a file: bytes, a text, or else JSON."""

    def make():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            Path(path).write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            Path(path).write_text(text, encoding="utf-8")

    return make


def keys(path, **values):
    """A function that changes keys of a JSON file. `...` removes one."""

    def make():
        content = {**json.loads(Path(path).read_text()), **values}
        put(path, {key: value for key, value in content.items() if value is not ...})()

    return make


def config(**values):
    return keys("model/config.json", **values)


def cut(path, share=0.5):
    """A function that leaves the first part of a file."""

    def make():
        data = Path(path).read_bytes()
        Path(path).write_bytes(data[: int(len(data) * share)])

    return make


def tensors(path, change):
    """A function that changes the tensors of a file. change: function (dict of tensors)."""

    def make():
        content = load_file(path)
        change(content)
        save_file(content, path)

    return make


def weight(change, path="model/model.safetensors", name="model.norm.weight"):
    """A function that replaces a weight. change: function (tensor) -> tensor, or None."""

    def make_one(content):
        value = change(content.pop(name))
        if value is not None:
            content[name] = value.contiguous()

    return tensors(path, make_one)


def sample_line(**values):
    """A function that changes the first line of the samples of eval-run."""

    def make():
        first, *rest = Path("eval-run/samples.jsonl").read_text().splitlines()
        lines = [json.dumps({**json.loads(first), **values}), *rest]
        put("eval-run/samples.jsonl", "\n".join(lines) + "\n")()

    return make


def more(name, path="model/model.safetensors"):
    """A function that adds a tensor."""
    return tensors(path, lambda content: content.update({name: torch.ones(3)}))


def gone(*paths):
    """A function that removes files and folders."""

    def make():
        for path in map(Path, paths):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return make


def both(*makes):
    def make():
        for one in makes:
            one()

    return make


def model_of(family, auto="AutoModelForCausalLM", **sizes):
    """A function that makes model/ a small random model of another family."""

    def make():
        torch.manual_seed(0)
        own = transformers.AutoConfig.for_model(family, vocab_size=98, **sizes)
        getattr(transformers, auto).from_config(own).save_pretrained("model")

    return make


def evil(name):
    """A function that gives model/ a Python file, which would leave a file `ran` when it is run."""
    return put(f"model/{name}.py", "open('ran', 'w').close()\n")


def folder(path):
    return lambda: Path(path).mkdir(parents=True)


def link(path, target):
    return lambda: Path(path).symlink_to(target)


def nothing():
    pass


def pickled():
    """Moves the weights of model/ to a pickle."""
    torch.save(load_file("model/model.safetensors"), "model/pytorch_model.bin")
    gone("model/model.safetensors")()


def embed(rows):
    """Leaves so many rows of the embedding of model/."""
    weight(lambda t: t[:rows].clone(), name="model.embed_tokens.weight")()
    config(vocab_size=rows)()


def adapters(**values):
    """A function that makes model/ a folder of adapters. values: of adapter_config.json, if any."""

    def make():
        pytest.importorskip("peft")
        gone("model/config.json", "model/model.safetensors")()
        save_file({"x": torch.ones(2)}, "model/adapter_model.safetensors")
        if values:
            put("model/adapter_config.json", values)()

    return make


def no_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")


LONG = "x" * 300
LOOP = "{% for a in range(9999) %}{% for b in range(9999) %}SAY{% endfor %}{% endfor %}"
OWN_CODE = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
INDEX = "model/model.safetensors.index.json"
CHECKPOINT = "train-run/checkpoint-2"
WEIGHTS = f"{CHECKPOINT}/model.safetensors"
STATE = f"{CHECKPOINT}/trainer.safetensors"
SMALL = dict(hidden_size=32, num_hidden_layers=2)


def first_moment(change):
    return weight(change, STATE, "exp_avg.0")


ROWS = [
    # The output folder
    ("an empty output folder", nothing, f"{TRAIN} --output-dir ''", 2),
    ("an empty output folder to replace", nothing, f"{TRAIN} --output-dir '' --overwrite", 2),
    ("an empty output folder, eval", nothing, f"{EVAL} --output-dir '' --overwrite", 2),
    ("an empty output folder, cast", nothing, f"{DIAGNOSE} --output-dir ''", 2),
    ("an empty output folder, tune", nothing, f"cast --tune {CAST} --output-dir ' '", 2),
    ("the current folder", nothing, f"{TRAIN} --output-dir .", 2),
    ("the current folder to replace", nothing, f"{TRAIN} --output-dir . --overwrite", 2),
    ("the root", nothing, f"{EVAL} --output-dir / --overwrite", 2),
    ("a file", nothing, f"{TRAIN} --output-dir sums.py", 2),
    ("a file to replace", nothing, f"{EVAL} --output-dir sums.py --overwrite", 2),
    ("a file, cast", nothing, f"{DIAGNOSE} --output-dir sums.py", 2),
    ("below a file", nothing, f"{TRAIN} --output-dir sums.py/run", 2),
    ("below a file, cast", nothing, f"{DIAGNOSE} --output-dir sums.py/a/b", 2),
    ("a name with a NUL", nothing, f"{TRAIN} --output-dir 'a\0b'", 2),
    ("a name with a NUL, cast", nothing, f"{DIAGNOSE} --output-dir 'a\0b'", 2),
    ("a name that is not UTF-8", nothing, f"{TRAIN} --output-dir 'a\udc80'", 2),
    ("a very long name", nothing, f"{EVAL} --output-dir {LONG}", 2),
    ("a very long path", nothing, f"{TRAIN} --output-dir {'/'.join(['x' * 200] * 25)}", 2),
    ("a link to nowhere", link("l", "no/where"), f"{TRAIN} --output-dir l", 2),
    ("a link to a file", link("l", "sums.py"), f"{TRAIN} --output-dir l --overwrite", 2),
    ("a link to itself", link("l", "l"), f"{EVAL} --output-dir l", 2),
    ("a file where runs/ would be", put("runs", ""), TRAIN, 2),
    ("a folder of the kernel", nothing, f"{EVAL} --output-dir /proc/run", 1),
    ("a folder of someone else", put("own/dear.txt", "Dear"), f"{TRAIN} --output-dir own", 2),
    ("one to replace", put("own/dear.txt", "Dear"), f"{TRAIN} --output-dir own --overwrite", 2),
    ("a model to replace", nothing, f"{TRAIN} --output-dir model --overwrite", 2),
    (
        "a folder inside a run",
        put("train-run/own/a", ""),
        f"{TRAIN} --output-dir train-run/own --overwrite",
        2,
    ),
    ("a checkpoint to replace", nothing, f"{TRAIN} --output-dir {CHECKPOINT} --overwrite", 2),
    ("a run that is there", nothing, f"{TRAIN} --output-dir train-run", 2),
    (
        "a run of another script to replace",
        nothing,
        f"{EVAL} --output-dir train-run --overwrite",
        2,
    ),
    ("another way round", nothing, f"{TRAIN} --output-dir eval-run --overwrite", 2),
    ("a map to replace", nothing, f"{TRAIN} --output-dir cast-run --overwrite", 2),
    (
        "a damaged run to replace",
        put("train-run/args.json", "{"),
        f"{TRAIN} --output-dir train-run --overwrite",
        2,
    ),
    (
        "a run to replace, with a model that fails",
        nothing,
        f"{TRAIN} --model no --output-dir train-run --overwrite",
        2,
    ),
    (
        "a run to replace, with too long completions",
        nothing,
        f"{TRAIN} --max-completion-length 600 --output-dir train-run --overwrite",
        2,
    ),
    ("a foreign tuned/", put("cast-run/tuned/dear.txt", "Dear"), TUNE, 2),
    ("tuned is a file", put("cast-run/tuned", "Dear"), TUNE, 2),
    ("tuned is a link", link("cast-run/tuned", "../model"), TUNE, 2),
    # Resuming
    ("resume without a folder", nothing, "train --resume", 2),
    ("resume without a folder, eval", nothing, "eval --resume", 2),
    ("resume an empty name", nothing, "train --resume --output-dir ''", 2),
    ("resume nothing", nothing, "train --resume --output-dir none", 2),
    ("resume an empty folder", folder("empty"), "eval --resume --output-dir empty", 2),
    ("resume a file", nothing, "train --resume --output-dir sums.py", 2),
    ("resume a model", nothing, "train --resume --output-dir model", 2),
    ("resume a run of eval", nothing, "train --resume --output-dir eval-run", 2),
    ("resume a run of train", nothing, "eval --resume --output-dir train-run", 2),
    ("resume a map", nothing, "train --resume --output-dir cast-run", 2),
    ("resume with another loss", nothing, f"{RESUME} --algo dapo", 2),
    ("resume with another setting", nothing, f"{RESUME} --seed 5", 2),
    ("resume with other data", nothing, f"{RESUME} --data sums.jsonl", 2),
    ("resume with another model", nothing, f"{RESUME} --model tiny", 2),
    ("resume eval with another setting", nothing, f"{RESUME_EVAL} --num-samples 3", 2),
    *[
        (f"args.json is {what}", put("train-run/args.json", content), RESUME, 2)
        for what, content in {
            "empty": "",
            "no JSON": "steps: 5",
            "half": '{"script": "train", "steps": ',
            "a list": [1, 2],
            "a number": 5,
            "null": None,
            "an empty object": {},
            "without a script": {"steps": 5},
            "not UTF-8": b'{"script": "train", "data": "\xff"}',
            "UTF-16": '{"script": "train"}'.encode("utf-16"),
            "nested a million times": "[" * 10**6,
            "of no script": {"script": ["train"]},
            "of a script with escapes": {"script": "\x1b[31mtrain"},
        }.items()
    ],
    ("args.json of eval is half", cut("eval-run/args.json"), RESUME_EVAL, 2),
    ("args.json of eval is not UTF-8", put("eval-run/args.json", b"\xff\xff"), RESUME_EVAL, 2),
    *[
        (f"args.json has {values}", keys("train-run/args.json", **values), RESUME, 2)
        for values in (
            {"steps": "many"},
            {"steps": [5]},
            {"steps": 1e400},
            {"steps": math.nan},
            {"num_prompts": {"a": 1}},
            {"num_prompts": -3},
            {"temperature": True},
            {"temperature": "\x1b[31m"},
            {"gradient_checkpointing": "maybe"},
            {"algo": 5},
            {"algo": ["grpo"]},
            {"algo": "no.py"},
            {"model": 5},
            {"model": "no/such/model"},
            {"model": "a\0b"},
            {"data": "no.py"},
            {"data": "a\0b"},
            {"data": 7},
            {"seed": -1},
            {"learning_rate": "fast"},
            {"threads": 10**18},
            {"device": "abacus"},
            {"lora_rank": "x"},
            {"lora_rank": None},
            {"digests": "x"},
            {"digests": ["x"]},
            {"digests": {"problems": 5}},
            {"run": 5},
            {"run": ["x"]},
        )
    ],
    *[
        (f"args.json of eval has {values}", keys("eval-run/args.json", **values), RESUME_EVAL, 2)
        for values in (
            {"num_samples": "x"},
            {"num_samples": -1},
            {"limit": []},
            {"protocol": "x"},
            {"batch_size": 0},
            {"digests": 5},
            {"data": "no"},
        )
    ],
    *[
        (f"trainer.json is {what}", put(f"{CHECKPOINT}/trainer.json", content), RESUME, 2)
        for what, content in {
            "empty": "",
            "half": '{"step": 1, "cur',
            "a list": [1],
            "not UTF-8": b"\xff\xfe\xfd",
        }.items()
    ],
    *[
        (f"trainer.json has {values}", keys(f"{CHECKPOINT}/trainer.json", **values), RESUME, 2)
        for values in (
            {"step": "two"},
            {"step": -1},
            {"step": 1.5},
            {"step": True},
            {"step": None},
            {"step": 10**30},
            {"step": 1},
            {"cursor": "x"},
            {"cursor": -1},
            {"cursor": ...},
            {"cursor": math.nan},
        )
    ],
    ("no trainer.safetensors", gone(STATE), RESUME, 2),
    ("half of trainer.safetensors", cut(STATE), RESUME, 2),
    ("an empty trainer.safetensors", cut(STATE, 0), RESUME, 2),
    ("trainer.safetensors is text", put(STATE, "x" * 1000), RESUME, 2),
    (
        "trainer.safetensors has a huge header",
        put(STATE, b"\xff" * 7 + b"\x00" + b"x" * 99),
        RESUME,
        2,
    ),
    ("trainer.safetensors is a folder", both(gone(STATE), folder(STATE)), RESUME, 2),
    ("moments of another shape", first_moment(lambda t: t[:5]), RESUME, 2),
    ("moments of more elements", first_moment(lambda t: torch.cat([t, t])), RESUME, 2),
    ("moments of another dtype", first_moment(torch.Tensor.half), RESUME, 2),
    ("moments that are NaN", first_moment(lambda t: t * math.nan), RESUME, 2),
    ("moments that are infinite", first_moment(lambda t: t + math.inf), RESUME, 2),
    ("a moment is missing", first_moment(lambda t: None), RESUME, 2),
    (
        "all of a weight's moments are missing",
        tensors(STATE, lambda c: [c.pop(k) for k in list(c) if k.endswith(".3")]),
        RESUME,
        2,
    ),
    ("a moment of no weight", more("exp_avg.999", STATE), RESUME, 2),
    ("a moment without a number", more("x", STATE), RESUME, 2),
    ("no generator", weight(lambda t: None, STATE, "generator"), RESUME, 2),
    ("half a generator", weight(lambda t: t[:99], STATE, "generator"), RESUME, 2),
    ("a generator of floats", weight(torch.Tensor.float, STATE, "generator"), RESUME, 2),
    ("no weights in a checkpoint", gone(WEIGHTS), RESUME, 2),
    ("half the weights of a checkpoint", cut(WEIGHTS), RESUME, 2),
    ("NaN in a checkpoint", weight(lambda t: t * math.nan, WEIGHTS), RESUME, 2),
    ("a tensor missing in a checkpoint", weight(lambda t: None, WEIGHTS), RESUME, 2),
    ("no config in a checkpoint", gone(f"{CHECKPOINT}/config.json"), RESUME, 2),
    ("other problems", put("sums.py", SUMS.replace("+2", "+3")), RESUME, 2),
    ("fewer problems", put("sums.py", SUMS.replace("5)", "4)")), RESUME, 2),
    ("no problems", gone("sums.py"), RESUME, 2),
    ("another reward", put("sums.py", SUMS.replace("% 2", "% 3")), RESUME_EVAL, 2),
    ("other problems, eval", put("sums.py", SUMS.replace("+2", "+3")), RESUME_EVAL, 2),
    ("other weights, eval", weight(lambda t: t * 1.5), RESUME_EVAL, 2),
    ("other weights of a run's base", both(gone(CHECKPOINT), weight(lambda t: t * 1.5)), RESUME, 2),
    *[
        (f"metrics.jsonl {what}", put("train-run/metrics.jsonl", content), RESUME, 0)
        for what, content in {
            "is empty": "",
            "is no JSON": "step 1\nstep 2\n",
            "is binary": bytes(range(256)),
            "ends in half a row": '{"step": 1, "rew',
            "is a list": "[1]\n[2]\n",
            "has a step that is a word": '{"step": "one", "reward": 1}\n',
            "has a row without rewards": '{"step": 1}\n',
            "has rewards that are words": '{"step": 1, "reward": "x", "task_reward": []}\n',
            "has rewards that are null": '{"step": 1, "reward": null, "task_reward": null}\n',
            "has a list": '{"step": 1, "reward": 0, "task_reward": 0, "kl": [1], "entropy": "x"}\n',
            "is nested": "[" * 10**6,
        }.items()
    ],
    ("no metrics.jsonl", gone("train-run/metrics.jsonl"), f"{RESUME} --steps 3", 0),
    ("binary completions", put("train-run/completions.jsonl", b"\xff\x00"), RESUME, 0),
    *[
        (f"samples.jsonl {what}", put("eval-run/samples.jsonl", content), RESUME_EVAL, 0)
        for what, content in {
            "is empty": "",
            "is binary": bytes(range(256)),
            "is a list": "[1]\n",
            "has other columns": '{"problem": 1}\n',
            "has columns of no value": json.dumps(dict.fromkeys(evaluation.COLUMNS)) + "\n",
            "has rewards that are words": json.dumps(dict.fromkeys(evaluation.COLUMNS, "sums.py"))
            + "\n",
            "is nested": "[" * 10**6,
        }.items()
    ],
    ("a reward that is a word", sample_line(reward="x"), RESUME_EVAL, 0),
    ("a reward that is NaN", sample_line(reward=math.nan), RESUME_EVAL, 0),
    ("a length that is a word", sample_line(length="x"), RESUME_EVAL, 0),
    ("a verdict that is null", sample_line(right=None), RESUME_EVAL, 0),
    ("a sample of another problem", sample_line(problem=3), RESUME_EVAL, 0),
    ("no samples.jsonl", gone("eval-run/samples.jsonl"), RESUME_EVAL, 0),
    ("results.json is damaged", put("eval-run/results.json", "{"), RESUME_EVAL, 0),
    # The conflict map
    ("no map", gone("cast-run/conflict_map.json"), TUNE, 2),
    ("no folder of a map", nothing, f"cast --tune {CAST} --output-dir none", 2),
    ("half a map", cut("cast-run/conflict_map.json"), TUNE, 2),
    *[
        (f"the map is {what}", put("cast-run/conflict_map.json", content), TUNE, 2)
        for what, content in {
            "empty": "",
            "a list": [],
            "an empty object": {},
            "not UTF-8": b"\xff",
            "nested": "[" * 10**6,
            "a checksum only": {"checksum": cast.checksum({})},
        }.items()
    ],
    *[
        (f"the map has {values}", keys("cast-run/conflict_map.json", **values), TUNE, 2)
        for values in (
            {"C": [[0.0]]},
            {"C": "x"},
            {"C": ...},
            {"checksum": 5},
            {"checksum": ...},
            {"fingerprint": ...},
            {"fingerprint": "\x1b[31m"},
            {"seed": "x"},
        )
    ],
    ("a map with a checksum and no scores", lambda: sealed(C=...), TUNE, 2),
    ("a map with a checksum and other scores", lambda: sealed(C=[[1.0, 2.0]]), TUNE, 2),
    ("a map with a checksum and words", lambda: sealed(C=[["x"] * 8] * 4), TUNE, 2),
    ("a map with a checksum and NaN", lambda: sealed(C=[[math.nan] * 8] * 4), TUNE, 2),
    ("the map of another model", weight(lambda t: t * 1.5), TUNE, 2),
    # Names of models
    ("a home of nobody", nothing, f"{EVAL} --model '~nobody-at-all/m'", 2),
    ("a link to itself as a model", link("l", "l"), f"{EVAL} --model l", 2),
    ("no model of that name", nothing, f"{TRAIN} --model no-such-model", 2),
    ("an empty name", nothing, f"{TRAIN} --model ''", 2),
    ("an empty name, cast", nothing, f"{DIAGNOSE} --model ' '", 2),
    ("no such folder", nothing, f"{EVAL} --model no/such/folder", 2),
    ("no such folder, absolute", nothing, f"{EVAL} --model /no/such", 2),
    ("a hub id that is not here", nothing, f"{TRAIN} --model nobody/has-this", 2),
    (
        "a hub id that is not here, cast",
        nothing,
        f"cast --diagnose {CAST} --model nobody/has-this",
        2,
    ),
    ("a hub id with spaces", nothing, f"{EVAL} --model 'no body/has this'", 2),
    ("a hub id with escapes", nothing, f"{EVAL} --model 'a\x1b[31m/b'", 2),
    ("a name with too many slashes", nothing, f"{EVAL} --model a//b/c", 2),
    ("a name of dots", nothing, f"{EVAL} --model ../..", 2),
    ("a very long name of a model", nothing, f"{EVAL} --model {LONG}/x", 2),
    ("a link to itself as a model, train", link("l", "l"), f"{TRAIN} --model l", 2),
    ("a file as a model", nothing, f"{EVAL} --model sums.py", 2),
    ("weights as a model", nothing, f"{EVAL} --model model/model.safetensors", 2),
    ("an empty folder as a model", folder("empty"), f"{EVAL} --model empty", 2),
    ("a run of eval as a model", nothing, f"{EVAL} --model eval-run", 2),
    ("a run without a checkpoint as a model", gone(CHECKPOINT), f"{EVAL} --model train-run", 2),
    # What a model's folder holds
    *[
        (f"config.json is {what}", put("model/config.json", content), EVAL, 2)
        for what, content in {
            "empty": "",
            "no JSON": "hidden_size: 5",
            "half": '{"model_type": "llama", "hid',
            "a list": [1, 2],
            "null": None,
            "an empty object": {},
            "not UTF-8": b'{"model_type": "\xff"}',
            "nested": "[" * 10**6,
        }.items()
    ],
    *[
        (f"config.json has {values}", config(**values), EVAL, 2)
        for values in (
            {"hidden_size": "x"},
            {"hidden_size": 10**9},
            {"hidden_size": None},
            {"hidden_size": 97},
            {"num_hidden_layers": -1},
            {"num_hidden_layers": 0},
            {"num_hidden_layers": 3},
            {"num_hidden_layers": 5},
            {"num_hidden_layers": 10**9},
            {"num_hidden_layers": 10**30},
            {"num_hidden_layers": None},
            {"num_attention_heads": 0},
            {"num_attention_heads": "\x1b[31m"},
            {"num_key_value_heads": 3},
            {"head_dim": 3},
            {"vocab_size": "many"},
            {"vocab_size": -5},
            {"vocab_size": 97},
            {"vocab_size": 10**12},
            {"rope_parameters": [1]},
            {"rope_parameters": "\x1b[31m"},
            {"rope_parameters": {"rope_type": "unknown"}},
            {"max_position_embeddings": -5},
            {"max_position_embeddings": 0},
            {"max_position_embeddings": "many"},
            {"max_position_embeddings": 5},
            {"rms_norm_eps": math.nan},
            {"rms_norm_eps": "x"},
            {"hidden_act": "none"},
            {"hidden_act": "\x1b]0;title\x07"},
            {"sliding_window": -3, "model_type": "mistral"},
            {"layer_types": ["\x1b[31m"] * 4},
            {"num_labels": 10**9},
            {"dtype": "\x1b[31m"},
            {"quantization_config": {"quant_method": "gptq"}},
            {"quantization_config": 5},
            {"use_return_dict": True},
            {"text_config": {"num_hidden_layers": 10**9}},
            {"attn_implementation": "\x1b[31m"},
            {"model_type": "no-such-type"},
            {"model_type": "\x1b[31mred\x1b[0m"},
            {"model_type": "x" * 10**6},
            {"model_type": 5},
            {"model_type": ["llama"]},
            {"model_type": ...},
            {"model_type": "qwen3"},
            {"model_type": "bert"},
        )
    ],
    ("a window that is a word", config(sliding_window="x"), EVAL, 2),
    ("a window that is a fraction", config(sliding_window=1.5), EVAL, 2),
    ("a config of wrong types, train", config(hidden_size="x"), TRAIN, 2),
    ("a config of wrong types, cast", config(hidden_size="x"), f"cast --diagnose {CAST}", 2),
    ("a type with escapes, cast", config(model_type="\x1b[31m"), f"cast --diagnose {CAST}", 2),
    ("no config.json", gone("model/config.json"), EVAL, 2),
    (
        "config.json is a folder",
        both(gone("model/config.json"), folder("model/config.json")),
        EVAL,
        2,
    ),
    *[
        (f"generation_config.json is {what}", put("model/generation_config.json", content), EVAL, 2)
        for what, content in {
            "no JSON": "x",
            "a list": [1],
            "with a word as the end": {"eos_token_id": "x"},
            "with an end below 0": {"eos_token_id": -7},
            "with a list of words": {"eos_token_id": [1, "\x1b[31m"]},
            "with a fraction": {"eos_token_id": 1.5},
            "with a huge number": {"eos_token_id": 10**30},
            "with an object": {"eos_token_id": {"a": 1}},
            "with a list in a list": {"eos_token_id": [[1]]},
            "half": '{"eos_tok',
        }.items()
    ],
    *[
        (f"tokenizer.json is {what}", put("model/tokenizer.json", content), EVAL, 2)
        for what, content in {
            "empty": "",
            "no JSON": "x",
            "a list": [1],
            "an empty object": {},
            "of an unknown model": {"model": {"type": "\x1b[31m"}},
            "nested": "[" * 10**6,
            "binary": bytes(range(256)),
        }.items()
    ],
    ("no tokenizer", gone("model/tokenizer.json", "model/tokenizer_config.json"), EVAL, 2),
    ("no tokenizer, train", gone("model/tokenizer.json", "model/tokenizer_config.json"), TRAIN, 2),
    *[
        (f"tokenizer_config.json is {what}", put("model/tokenizer_config.json", content), EVAL, 2)
        for what, content in {
            "no JSON": "x",
            "a list": [1],
            "of a class that is a number": {"tokenizer_class": 5},
            "of a length that is a word": {"model_max_length": "\x1b[31m"},
            "of a length that is a list": {"model_max_length": [1]},
        }.items()
    ],
    (
        "a tokenizer with an end that is a list",
        keys("model/tokenizer_config.json", eos_token=[1]),
        EVAL,
        2,
    ),
    ("no weights", gone("model/model.safetensors"), EVAL, 2),
    ("empty weights", cut("model/model.safetensors", 0), EVAL, 2),
    ("half the weights", cut("model/model.safetensors"), EVAL, 2),
    ("half the weights, train", cut("model/model.safetensors"), TRAIN, 2),
    ("half the weights, cast", cut("model/model.safetensors"), DIAGNOSE, 2),
    ("weights that are text", put("model/model.safetensors", "x" * 10**4), EVAL, 2),
    ("weights in a pickle only", lambda: pickled(), EVAL, 2),
    ("weights in a pickle only, train", lambda: pickled(), TRAIN, 2),
    (
        "an index of weights that are not there",
        both(
            gone("model/model.safetensors"),
            put(
                "model/model.safetensors.index.json",
                {"metadata": {}, "weight_map": {"model.norm.weight": "none.safetensors"}},
            ),
        ),
        EVAL,
        2,
    ),
    (
        "an index that leads elsewhere",
        both(
            gone("model/model.safetensors"),
            put(
                "model/model.safetensors.index.json",
                {"metadata": {}, "weight_map": {"model.norm.weight": "../../etc/passwd"}},
            ),
        ),
        EVAL,
        2,
    ),
    (
        "an index that is no object",
        both(gone("model/model.safetensors"), put("model/model.safetensors.index.json", [1])),
        EVAL,
        2,
    ),
    ("a tensor is missing", weight(lambda t: None), EVAL, 2),
    ("a tensor is missing, train", weight(lambda t: None), TRAIN, 2),
    ("a tensor is missing, cast", weight(lambda t: None), DIAGNOSE, 2),
    ("a tensor too many", more("more"), EVAL, 2),
    ("a tensor of an escaping name", more("\x1b[31m"), EVAL, 2),
    ("a layer too many", more("model.layers.4.input_layernorm.weight"), TRAIN, 2),
    ("a tensor of another shape", weight(lambda t: t[:5]), EVAL, 2),
    ("a tensor of another shape, train", weight(lambda t: t[:5]), TRAIN, 2),
    ("a tensor of no element", weight(lambda t: t[:0]), EVAL, 2),
    ("a tensor of bytes", weight(lambda t: t.to(torch.uint8)), EVAL, 0),
    ("weights that are NaN", weight(lambda t: t * math.nan), EVAL, 2),
    ("weights that are NaN, train", weight(lambda t: t * math.nan), TRAIN, 2),
    ("weights that are NaN, cast", weight(lambda t: t * math.nan), DIAGNOSE, 2),
    ("weights that are infinite", weight(lambda t: t * math.inf), EVAL, 2),
    ("weights whose logits are infinite", weight(lambda t: t * 1e38), EVAL, 2),
    (
        "weights whose gradients are infinite",
        weight(lambda t: t * 1e30, name="model.embed_tokens.weight"),
        DIAGNOSE,
        2,
    ),
    (
        "an encoder",
        model_of(
            "bert", "AutoModelForMaskedLM", intermediate_size=32, num_attention_heads=2, **SMALL
        ),
        EVAL,
        2,
    ),
    (
        "an encoder and a decoder",
        put("model/config.json", {"model_type": "t5", "d_model": 32}),
        EVAL,
        2,
    ),
    ("a state space model", model_of("mamba", state_size=4, **SMALL), EVAL, 2),
    ("a state space model, train", model_of("mamba", state_size=4, **SMALL), TRAIN, 2),
    ("a state space model, cast", model_of("mamba", state_size=4, **SMALL), DIAGNOSE, 2),
    ("a tokenizer larger than the embedding", lambda: embed(20), EVAL, 2),
    ("a tokenizer larger than the embedding, train", lambda: embed(20), TRAIN, 2),
    ("a tokenizer larger than the embedding, cast", lambda: embed(20), DIAGNOSE, 2),
    (
        "code for an unknown type",
        both(evil("own"), config(model_type="own", auto_map=OWN_CODE)),
        EVAL,
        2,
    ),
    (
        "code for an unknown type, train",
        both(evil("own"), config(model_type="own", auto_map=OWN_CODE)),
        TRAIN,
        2,
    ),
    (
        "code for an unknown type, cast",
        both(evil("own"), config(model_type="own", auto_map=OWN_CODE)),
        DIAGNOSE,
        2,
    ),
    (
        "code for the model only",
        both(evil("own"), config(model_type="vit", auto_map={"AutoModelForCausalLM": "own.Model"})),
        EVAL,
        2,
    ),
    (
        "code for a tokenizer",
        both(
            evil("own"),
            gone("model/tokenizer.json"),
            keys(
                "model/tokenizer_config.json",
                tokenizer_class="Own",
                auto_map={"AutoTokenizer": ["own.Tokenizer", None]},
            ),
        ),
        EVAL,
        2,
    ),
    (
        "code for generation",
        both(
            put("model/custom_generate/generate.py", "open('ran', 'w')"),
            keys("model/generation_config.json", eos_token_id="x"),
        ),
        EVAL,
        2,
    ),
    # Adapters
    ("adapters without a config", adapters(), EVAL, 2),
    ("adapters of no model", adapters(base_model_name_or_path=None), EVAL, 2),
    ("adapters of a number", adapters(base_model_name_or_path=5), EVAL, 2),
    ("adapters of a model that is gone", adapters(base_model_name_or_path="../gone/too"), EVAL, 2),
    ("adapters of themselves", adapters(base_model_name_or_path="model"), EVAL, 2),
    ("adapters of a name with a NUL", adapters(base_model_name_or_path="a\0b"), EVAL, 2),
    (
        "adapters of an unknown kind",
        adapters(base_model_name_or_path="tiny", peft_type="\x1b[31m"),
        EVAL,
        2,
    ),
    (
        "adapters that are damaged",
        both(
            adapters(base_model_name_or_path="tiny", peft_type="LORA"),
            put("model/adapter_model.safetensors", "x"),
        ),
        EVAL,
        2,
    ),
    (
        "adapters upon adapters",
        adapters(base_model_name_or_path="tiny"),
        f"{TRAIN} --lora-rank 2",
        2,
    ),
    (
        "adapters that fit nothing",
        adapters(base_model_name_or_path="tiny", peft_type="LORA", target_modules=["no"]),
        EVAL,
        2,
    ),
    (
        "adapters without tensors",
        adapters(base_model_name_or_path="tiny", peft_type="LORA", target_modules=["q_proj"]),
        EVAL,
        2,
    ),
    # Data
    ("no such data", nothing, f"{TRAIN} --data no-such-data", 2),
    ("an empty name of data", nothing, f"{TRAIN} --data ''", 2),
    ("an empty name of data, eval", nothing, f"{EVAL} --data ','", 2),
    ("no such file", nothing, f"{TRAIN} --data no.jsonl", 2),
    ("no such file, eval", nothing, f"{EVAL} --data sums.jsonl,no.jsonl", 2),
    ("no such file, cast", nothing, f"{DIAGNOSE} --safety-data no.jsonl", 2),
    ("no such file, cast, utility", nothing, f"{DIAGNOSE} --utility-data no.jsonl", 2),
    ("no such file, cast, benign", nothing, f"{DIAGNOSE} --benign-data no.jsonl", 2),
    ("no such file for refusals", nothing, f"{EVAL} --refusal no.jsonl", 2),
    ("a set that is not here", nothing, f"{TRAIN} --data gsm8k", 2),
    ("a set that is not here, cast", nothing, f"{DIAGNOSE} --safety-data jbb", 2),
    ("a gated set", nothing, f"{DIAGNOSE} --safety-data advbench", 2),
    ("a set of another kind", nothing, f"{DIAGNOSE} --utility-data jbb", 2),
    ("no folder of data", nothing, f"{TRAIN} --data gsm8k --data-root none", 2),
    ("an empty folder of data", nothing, f"{TRAIN} --data gsm8k --data-root ''", 2),
    ("a data file elsewhere", nothing, f"{TRAIN} --data svamp:no.jsonl", 2),
    ("an empty folder as data", folder("empty"), f"{TRAIN} --data empty", 2),
    ("a model as data", nothing, f"{EVAL} --data model", 2),
    ("a file of another kind", nothing, f"{TRAIN} --data model/model.safetensors", 2),
    ("data that never ends", nothing, f"{TRAIN} --data /dev/zero", 2),
    ("a harness task that is not installed", nothing, f"{EVAL} --lm-eval no-such-task", 2),
    *[
        (f"data: {what}", put("rows.jsonl", content), f"{TRAIN} --data rows.jsonl", 2)
        for what, content in {
            "an empty file": "",
            "no JSON": "one,two\n",
            "a list a line": "[1]\n[2]\n",
            "binary": bytes(range(256)),
            "nested": "[" * 10**6 + "\n",
            "no columns that are known": '{"a": 1, "b\x1b[31m": 2}\n',
            "no answer": '{"problem": "1+1="}\n',
            "no usable gold": '{"problem": "1+1=", "answer": "the answer is two, I think"}\n',
            "null": '{"problem": null, "answer": null}\n',
            "lone surrogates": '{"problem": "\\ud800", "answer": "2"}\n',
            "objects": '{"problem": {"a": 1}, "answer": [2]}\n',
            "too long prompts": json.dumps({"problem": "1+" * 3000, "answer": "2"}),
            "empty prompts": '{"problem": "", "answer": "2"}\n',
        }.items()
    ],
    *[
        (
            f"{what} as data of cast",
            put("rows.jsonl", content),
            f"{DIAGNOSE} --safety-data rows.jsonl",
            2,
        )
        for what, content in {
            "an empty file": "",
            "no JSON": "x",
            "no columns that are known": '{"a\x1b[31m": 1}\n',
            "one pair": '{"prompt": "x", "response": "y"}\n',
            "too long pairs": json.dumps({"prompt": "x" * 3000, "response": "y"}),
            "lone surrogates": '{"prompt": "\\ud800", "response": "y"}\n' * 5,
        }.items()
    ],
    ("data whose name has no suffix", put("rows", "{}"), f"{TRAIN} --data rows", 2),
    (
        "data in a damaged parquet file",
        put("rows.parquet", b"PAR1" + bytes(99)),
        f"{TRAIN} --data rows.parquet",
        2,
    ),
    ("data in an empty table", put("rows.csv", ""), f"{TRAIN} --data rows.csv", 2),
    ("data in an object", put("rows.json", {"a": 1}), f"{TRAIN} --data rows.json", 2),
    *[
        (f"a task that {what}", put("task.py", content), f"{TRAIN} --data task.py", 2)
        for what, content in {
            "is no Python": "def load(:",
            "is not UTF-8": b"x = '\xff'",
            "raises at once": "raise ValueError('no\\x1b[31m')",
            "imports what is not there": "import no_such_module",
            "has no reward": "def load(split):\n    return []",
            "has no load": "def reward(problem, text):\n    return 1",
            "has a number as load": SUMS + "load = 5",
            "loads nothing": SUMS + "def load(split): return []",
            "loads None": SUMS + "def load(split): return None",
            "loads a number": SUMS + "def load(split): return 5",
            "loads texts": SUMS + "def load(split): return ['a']",
            "loads prompts that are numbers": SUMS + "def load(split): return [{'prompt': 5}]",
            "loads empty prompts": SUMS + "def load(split): return [{'prompt': ''}]",
            "raises in load": SUMS + "def load(split): raise KeyError('\\x1b[31m')",
            "recurses in load": SUMS + "def load(split): return load(split)",
            "takes other arguments": SUMS + "def load(): return []",
            "loads lone surrogates": SUMS + "def load(split): return [{'prompt': '\\ud800'}]",
        }.items()
    ],
    # Algorithms
    *[
        (f"an objective that {what}", put("own.py", content), f"{TRAIN} --algo own.py", 2)
        for what, content in {
            "is empty": "",
            "is no Python": "def loss(:",
            "raises at once": "1 / 0",
            "has no loss": "RECIPE = {}",
            "has no recipe": "def loss(*a): pass",
            "has a list as its recipe": "RECIPE = []\ndef loss(*a): pass",
            "has a list in its recipe": "RECIPE = {'a': [1]}\ndef loss(*a): pass",
            "has None in its recipe": "RECIPE = {'a': None}\ndef loss(*a): pass",
            "has a number as a key": "RECIPE = {5: 1}\ndef loss(*a): pass",
            "has an empty key": "RECIPE = {'': 1}\ndef loss(*a): pass",
            "has a choice that is none": "RECIPE = {'overlong': 'x'}\ndef loss(*a): pass",
            "has a NaN": "RECIPE = {'epsilon': float('nan')}\ndef loss(*a): pass",
            "has an infinite decay": "RECIPE = {'weight_decay': float('inf')}\ndef loss(*a): pass",
            "has a negative count": "RECIPE = {'save_steps': -1}\ndef loss(*a): pass",
            "has a word as a count": "RECIPE = {'save_steps': 'x'}\ndef loss(*a): pass",
            "has a fraction as a count": "RECIPE = {'save_steps': 1.5}\ndef loss(*a): pass",
            "has True as a count": "RECIPE = {'save_steps': True}\ndef loss(*a): pass",
            "asks for help": "RECIPE = {'help': 1}\ndef loss(*a): pass",
            "names the folder": "RECIPE = {'output_dir': '/'}\ndef loss(*a): pass",
            "repeats a flag": "RECIPE = {'no_gradient_checkpointing': 1}\ndef loss(*a): pass",
            "has no letters as a key": "RECIPE = {'a b': 1}\ndef loss(*a): pass",
            "has a NaN of its own": "RECIPE = {'mine': float('nan')}\ndef loss(*a): pass",
            "has a list for the embedded model": "RECIPE = {}\nEMBEDDED = [1]\ndef loss(*a): pass",
            "has a list in it": "RECIPE = {}\nEMBEDDED = {'a': [1]}\ndef loss(*a): pass",
        }.items()
    ],
    ("no such objective", nothing, f"{TRAIN} --algo ppo", 2),
    ("no such file of an objective", nothing, f"{TRAIN} --algo no.py", 2),
    ("an empty objective", nothing, f"{TRAIN} --algo ''", 2),
    ("a folder as an objective", folder("own.py"), f"{TRAIN} --algo own.py", 2),
    # Flags that do not go together
    ("a group of one", nothing, f"{TRAIN} --num-generations 1", 2),
    ("prompts that cannot be cut", nothing, f"{TRAIN} --steps-per-generation 3", 2),
    ("fewer rows than a group", nothing, f"{TRAIN} --rollout-batch-size 1", 2),
    ("too many completions", nothing, f"{TRAIN} --num-prompts 1000000", 2),
    ("too long completions", nothing, f"{TRAIN} --max-completion-length 600", 2),
    ("a trillion tokens", nothing, f"{TRAIN} --max-completion-length 1000000000000", 2),
    ("a cache longer than a completion", nothing, f"{TRAIN} --overlong soft --overlong-cache 9", 2),
    ("too short prompts", nothing, f"{TRAIN} --max-prompt-length 1", 2),
    ("the settings of the paper for the embedded model", nothing, "train --preset paper", 2),
    ("a flag of another objective", nothing, f"{TRAIN} --algo dapo --beta 0.1", 2),
    ("a flag of no script", nothing, f"{TRAIN} --no-such-flag 1", 2),
    ("a flag cut short", nothing, f"{TRAIN} --temp 1", 2),
    ("a flag without its value", nothing, f"{TRAIN} --temperature", 2),
    ("a choice that is none", nothing, f"{TRAIN} --overlong hard", 2),
    ("a seed too large", nothing, f"{TRAIN} --seed {2**63}", 2),
    ("a seed too large, eval", nothing, f"{EVAL} --seed {2**64}", 2),
    ("a million million threads", nothing, f"{TRAIN} --threads {10**18}", 2),
    ("as many threads, eval", nothing, f"{EVAL} --threads {10**18}", 2),
    ("as many threads, cast", nothing, f"{DIAGNOSE} --threads {10**18}", 2),
    ("a huge rank", nothing, f"{TRAIN} --lora-rank {10**12}", 2),
    ("many equal samples", nothing, f"{EVAL} --temperature 0", 2),
    ("a protocol and its numbers", nothing, f"{EVAL} --protocol tepo", 2),
    ("a batch smaller than a problem", nothing, f"{EVAL} --batch-size 1", 2),
    ("too long answers", nothing, f"{EVAL} --max-completion-length 600", 2),
    ("no command", nothing, f"cast {CAST}", 2),
    ("too short pairs", nothing, f"{DIAGNOSE} --max-length 1", 2),
    ("too long answers, cast", nothing, f"{DIAGNOSE} --max-completion-length 600", 2),
    ("a trillion steps", nothing, f"{TUNE} --steps {10**13}", 2),
    ("comparing and tuning", nothing, f"cast --compare --tune {CAST}", 2),
    ("no seeds", nothing, f"cast --compare {CAST} --seeds 0", 2),
    ("a level that is NaN", nothing, f"cast --compare {CAST} --match-nll nan", 2),
    ("draws that are infinite", nothing, f"cast --compare {CAST} --random-draws inf", 2),
    ("no evaluations", nothing, f"cast --compare {CAST} --evaluations 0", 2),
    ("a comparison in a file", nothing, f"cast --compare {CAST} --output-dir sums.py", 2),
    (
        "a comparison with a model that is not there",
        nothing,
        f"cast --compare {CAST} --model no",
        2,
    ),
    *[
        (f"no such device, {command.split()[0]}", no_gpu, f"{command} --device cuda", 2)
        for command in (TRAIN, EVAL, DIAGNOSE, TUNE)
    ],
    ("no such device, compare", no_gpu, f"cast --compare {CAST} --device cuda", 2),
    ("a device of no kind", nothing, f"{TRAIN} --device abacus", 2),
    # Templates of chats
    *[
        (
            f"a chat template that {what}",
            keys("model/tokenizer_config.json", chat_template=text),
            EVAL,
            2,
        )
        for what, text in {
            "raises": "{{ raise_exception('\x1b[31mno') }}",
            "divides by zero": "{{ 1 / 0 }}",
            "is no template": "{% for %}",
            "knows no such filter": "{{ messages | no_such }}",
            "loops": LOOP.replace("SAY", ""),
            "prints without end": LOOP.replace("SAY", "x" * 99),
            "multiplies": "{{ 'x' * 10 ** 11 }}",
            "looks into Python": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
            "prints nothing": "{{ '' }}",
            "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "is a number": 5,
            "is a list": [1],
        }.items()
    ],
    (
        "a chat template that raises, train",
        keys("model/tokenizer_config.json", chat_template="{{ 1 / 0 }}"),
        TRAIN,
        2,
    ),
    (
        "a chat template that raises, cast",
        keys("model/tokenizer_config.json", chat_template="{{ 1 / 0 }}"),
        DIAGNOSE,
        2,
    ),
    (
        "a chat template that loops, cast",
        keys("model/tokenizer_config.json", chat_template=LOOP),
        DIAGNOSE,
        2,
    ),
    ("a chat template in a file", put("model/chat_template.jinja", "{{ 1 / 0 }}"), EVAL, 2),
    # Tuning
    ("a rate that breaks the weights", nothing, f"{TUNE} --steps 2 --learning-rate 1e30", 2),
    ("a rate that is no fp32", nothing, f"{TUNE} --learning-rate 1e38", 2),
    ("a decay that breaks the weights", nothing, f"{TUNE} --steps 2 --weight-decay 1e30", 2),
]


def sealed(**values):
    """Changes a conflict map and its checksum with it."""
    path = "cast-run/conflict_map.json"
    keys(path, **values)()
    keys(path, checksum=cast.checksum(json.loads(Path(path).read_text())))()


@pytest.mark.parametrize("make, command, code", [pytest.param(*row[1:], id=row[0]) for row in ROWS])
def test_a_bad_input(make, command, code, here, capfd):
    make()
    check(command, code, here, capfd)


# --------------------------------------------------------------------------------------------------
# What ends a run that has begun: what was there before is as it was

REWARD = "\n\n\ndef reward(problem, text):\n    return "
LOSS = "RECIPE = {'num_generations': 8}\n\n\ndef loss(batch, logp, entropy, args):\n    return "
BEGUN = [
    *[
        (
            f"a reward that is {value}",
            put("task.py", SUMS + REWARD + value),
            f"{script} --data task.py",
        )
        for script in (TRAIN, EVAL)
        for value in (
            "float('nan')",
            "float('inf')",
            "'1'",
            "None",
            "[]",
            "1 / 0",
            "reward(problem, text)",
            "problem['\\x1b[31m']",
        )
    ],
    *[
        (f"a loss that is {value}", put("own.py", LOSS + value), f"{TRAIN} --algo own.py")
        for value in (
            "None",
            "5",
            "logp.mean()",
            "logp, {}",
            "1.0, {}",
            "logp.detach().mean(), {}",
            "logp.mean(), [1]",
            "logp.mean(), {'a': 1}",
            "logp.mean(), {'a': logp.mean()}",
            "logp.mean(), {'a': 'x' * logp.numel()}",
            "logp.mean() * float('nan'), {}",
            "logp.mean() * float('inf'), {}",
            "batch['\\x1b[31m'], {}",
            "args.no_such_flag, {}",
            "loss(batch, logp, entropy, args)",
        )
    ],
    (
        "a vote that cannot be counted",
        put("task.py", SUMS + "\n\n\ndef answer(problem, text):\n    return []"),
        f"{EVAL} --data task.py",
    ),
    (
        "a vote that raises",
        put("task.py", SUMS + "\n\n\ndef answer(problem, text):\n    return 1 / 0"),
        f"{EVAL} --data task.py",
    ),
    ("a rate that breaks the weights", nothing, f"{TRAIN} --num-iterations 2 --learning-rate 1e30"),
    ("a decay that breaks the weights", nothing, f"{TRAIN} --num-iterations 2 --weight-decay 1e30"),
    (
        "a penalty that breaks the gradient",
        nothing,
        f"{TRAIN} --algo grpo --beta 1e30 --num-iterations 2",
    ),
]


@pytest.mark.parametrize(
    "make, command", [pytest.param(*row[1:], id=f"{row[0]}, {row[2].split()[0]}") for row in BEGUN]
)
def test_a_run_that_cannot_go_on(make, command, here, capfd):
    make()
    before = seen(here)
    assert run(command) == 2
    out, err = capfd.readouterr()
    assert 1 <= len(err.strip().splitlines()) <= 2, err
    assert len(err) < 1000
    assert all(c.isprintable() or c == "\n" for c in out + err)
    after = seen(here)
    assert {name: after.get(name) for name in before} == before
    assert not list(Path("runs").glob("*/checkpoint-*"))


@pytest.mark.parametrize(
    "make",
    [
        sample_line(reward="x"),
        sample_line(problem=3),
        cut("eval-run/samples.jsonl"),
        gone("eval-run/samples.jsonl"),
    ],
)
def test_damaged_samples_change_no_result(make, here):
    results = Path("eval-run/results.json")
    before = json.loads(results.read_text())["results"]
    make()
    assert run(RESUME_EVAL) == 0
    assert json.loads(results.read_text())["results"] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_a_whole_run(number, here, capfd):
    put("signal", str(int(number)))()
    before = seen(CHECKPOINT)
    Path("eval-run/samples.jsonl").unlink()
    for command in (f"{RESUME} --steps 3", RESUME_EVAL, f"{TRAIN} --output-dir new"):
        capfd.readouterr()
        assert run(command) == 128 + number
        err = capfd.readouterr().err
        assert len(err.strip().splitlines()) == 1, err
    assert seen(CHECKPOINT) == before
    gone("signal")()
    assert run(RESUME) == run(RESUME_EVAL) == 0


def test_a_hangup_that_is_ignored(here):
    put("signal", str(int(signal.SIGHUP)))()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    assert run(f"{EVAL} --output-dir new") == 0


def test_a_reader_that_has_gone(here):
    """`eval.py | head -0`: no traceback, no message."""
    command = [sys.executable, ROOT / "eval.py", *shlex.split(EVAL)[1:]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 1
    assert err == ""
