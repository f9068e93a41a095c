"""README.md and docs/ stay true: commands run (at toy scale), so do the examples; flags exist."""

import contextlib
import importlib
import io
import re
import runpy
import shlex
import signal
import subprocess
import sys

import pytest

import train
from engine.errors import UserError
from tests.conftest import ROOT

PAGES = {path: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
TEXT = "\n".join(PAGES.values())

# What makes a command small. Everything else of it runs as it is written.
SMALL = {
    "train.py": "--steps 1 --num-prompts 4 --num-generations 4 --max-completion-length 16",
    "eval.py": "--limit 4 --num-samples 2",
    "cast.py": "--examples 8 --steps 2 --batch-size 4",
}
SMALL_COMPARE = "--seeds 2 --random-draws 1 --evaluations 1"
HERE = "--threads 1 --device cpu"

OTHER_PROGRAMS = {  # flags of pip, ruff, accelerate and torchrun, and scale/, which needs TRL
    *("--no-deps", "--target", "--check"),
    *("--num_processes", "--use_fsdp", "--fsdp_version", "--cpu", "--nproc_per_node"),
    *("--use-vllm", "--per-device-train-batch-size"),
}


# --------------------------------------------------------------------------------------------------
# What the pages say


def blocks(language):
    """The texts of the fenced blocks of a language, in all pages."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands_in(pages):
    """The commands of our scripts and modules, without comments."""
    found = []
    for block in pages:
        for line in block.splitlines():
            command = line.partition("#")[0].strip()
            if command.startswith("python ") and command not in found:
                found.append(command)
    return found


COMMANDS = commands_in(blocks("bash"))
OF_REAL_MODELS = [c for c in COMMANDS if "Qwen" in c or "SmolLM2" in c or "real_rl" in c]
MINUTES = (
    "experiments.bench",
    "experiments.compare",
    "experiments.scaling",
    "experiments.families",
    "experiments.shapes",
    "experiments.gpu",
)
OF_MINUTES = [c for c in COMMANDS if any(module in c for module in MINUTES)]
FLAGGED = [c for c in OF_MINUTES if " --" in c]
RUNNABLE = [c for c in COMMANDS if c not in OF_REAL_MODELS and c not in OF_MINUTES]


def example_files():
    """The python blocks that begin with `# NAME.py:`, as a dict NAME.py -> text."""
    named = {}
    for block in blocks("python"):
        start = re.match(r"# (\w+\.py):", block)
        if start:
            named[start[1]] = block
    return named


# --------------------------------------------------------------------------------------------------
# Commands


def python(*arguments):
    """Runs the interpreter, as a user would, and returns what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run_small(command, folder):
    """Runs a command in a folder, at toy scale and in this process: an import takes seconds."""
    script, *flags = shlex.split(command)[1:]
    if script == "-m":
        python(script, *flags)
        return
    module = importlib.import_module(script.removesuffix(".py"))
    with contextlib.chdir(folder):
        if script in SMALL:
            module.main([*flags, *SMALL[script].split(), *HERE.split()])
        else:
            module.main(steps=1)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what some commands build on: the examples, a run of train.py, a map."""
    folder = tmp_path_factory.mktemp("workplace")
    for name, text in example_files().items():
        (folder / name).write_text(text)
    for command in ("python train.py --algo tepo", "python cast.py --diagnose"):
        assert command in COMMANDS
        run_small(command, folder)
    return folder


@pytest.mark.parametrize("command", RUNNABLE)
def test_command_runs(command, workplace, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", sys.argv)  # cast.py --compare sets it
    if "--compare" in command:
        command += " " + SMALL_COMPARE
    run_small(command, workplace)
    if " -m " not in command:
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("command", sorted({*OF_REAL_MODELS, *FLAGGED}))
def test_command_that_does_not_run_here_parses(command):
    script, *flags = shlex.split(command)[1:]
    if script == "-m":
        script, *flags = flags
    if "--compare" in flags:
        script = "experiments.cast_compare"
    args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
    if script == "train.py" and "Qwen" in command:
        with pytest.raises(UserError, match=r"Qwen/Qwen2\.5-[\d.]+B: not on this machine"):
            train.train(args)


# --------------------------------------------------------------------------------------------------
# Flags


def help_of(script, monkeypatch):
    """What a script or a module prints for --help, in this process: an import takes seconds."""
    monkeypatch.setattr(sys, "argv", [*script, "--help"])
    printed = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(printed):
        if script[0] == "-m":
            sys.argv = sys.argv[1:]
            runpy.run_module(script[1], run_name="__main__")
        else:
            runpy.run_path(str(ROOT / script[0]), run_name="__main__")
    return printed.getvalue()


def test_every_flag_exists(monkeypatch):
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGHUP)}
    scripts = [["train.py"], ["eval.py"], ["cast.py"], ["cast.py", "--compare"]]
    for module in sorted(set(re.findall(r"python -m ((?:experiments|tiny)\.\w+)", TEXT))):
        if "argparse" in (ROOT / (module.replace(".", "/") + ".py")).read_text():
            scripts.append(["-m", module])
    known = set()
    for script in scripts:
        known |= set(re.findall(r"--[a-z][a-z-]+", help_of(script, monkeypatch)))
    for kind, handler in handlers.items():
        signal.signal(kind, handler)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", TEXT))
    assert named - OTHER_PROGRAMS <= known


# --------------------------------------------------------------------------------------------------
# Examples, files, figures


def test_there_is_an_objective_and_a_task_to_paste():
    assert set(example_files()) == {"my_loss.py", "my_task.py"}
    assert any("--algo my_loss.py --data my_task.py" in command for command in RUNNABLE)


def test_a_loss_can_be_lifted():
    (example,) = [block for block in blocks("python") if block not in example_files().values()]
    names = {}
    exec(example, names)
    assert names["loss"].isfinite()
    assert names["logp"].grad.abs().sum() > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_files_exist(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
    for file in re.findall(r"\b(?:[a-z_]+/)*[a-z_]+\.py\b", PAGES[page]):
        assert file in example_files() or (ROOT / file).exists(), file
    for module in re.findall(r"python -m ((?:experiments|tiny)\.\w+)", PAGES[page]):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


def test_memory_table_is_what_its_command_prints():
    table = python("-m", "experiments.memory")
    assert len(table.splitlines()) > 10
    assert table.strip() in TEXT


def test_ci_finds_the_test_command():
    line = next(line for line in PAGES[ROOT / "README.md"].splitlines() if "pytest" in line)
    for part in ("-r requirements.txt", "ruff check .", "ruff format --check .", "-n 2 tests"):
        assert part in line
