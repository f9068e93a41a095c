"""The README stays true: its commands run at toy scale, its flags exist, its links point where they say."""

import re
import subprocess
import sys

import pytest

import train
from data import UserError
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = sorted({
    line.split("#")[0].replace(".venv/bin/", "").split("&&")[-1].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if "python" in line and "pytest" not in line
})  # fmt: skip
TOY = {  # what makes a command small; everything else of it runs as written
    "train.py": "--steps 1 --num-prompts 4 --num-generations 4 --max-completion-length 16 --threads 1 --device cpu",
    "eval.py": "--limit 4 --num-samples 2 --threads 1 --device cpu",
    "cast.py": "--examples 8 --steps 2 --batch-size 4 --threads 1 --device cpu",
}


def toy(command):
    """The command as arguments for this interpreter, with toy flags; a model of the hub is replaced by the embedded one."""
    script, *flags = command.removeprefix("python ").split()
    text = " ".join([script, *flags, TOY.get(script, "")])
    return text.split()


def test_the_readme_has_the_commands_of_every_script():
    for script in ("train.py", "eval.py", "cast.py", "tepo.py"):
        assert any(command.startswith(f"python {script}") for command in COMMANDS), script


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_in_the_readme_exists(command):
    script = command.split()[1]
    shown = help_of(script) if "--" in command else ""
    for flag in re.findall(r"--[a-z][a-z-]+", command):
        assert re.search(rf"{flag}\b", shown), f"{flag} of {script}"


HELP = {}


def help_of(script):
    if script not in HELP:
        HELP[script] = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return HELP[script]


def test_every_flag_named_anywhere_in_the_readme_belongs_to_some_script():
    scripts = ["train.py", "eval.py", "cast.py", "tiny.py", *(str(p.relative_to(ROOT)) for p in (ROOT / "experiments").glob("*.py") if "argparse" in p.read_text())]
    known = " ".join(help_of(script) for script in scripts)
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {"--repo-type", "--local-dir"}:
        assert re.search(rf"{flag}\b", known), flag


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(r"(train|eval|cast|tepo|grpo|dapo|reward)\.py", c) and "Qwen" not in c])
def test_the_commands_run_at_toy_scale(command, tmp_path):
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    script, *flags = toy(command)
    earlier = {"runs/": "python train.py --algo tepo", "--tune": "python cast.py --diagnose"}  # what a command builds on
    for first in (toy(other) for sign, other in earlier.items() if sign in command):
        subprocess.run([sys.executable, ROOT / first[0], *first[1:]], cwd=tmp_path, check=True, capture_output=True)
    done = subprocess.run([sys.executable, ROOT / script, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c and "Qwen" in c])
def test_the_commands_for_real_models_parse_and_name_the_hub_id_offline(command):
    args = train.parse_args(toy(command)[1:])
    try:
        import peft  # noqa: F401
    except ImportError:
        args.lora_rank = 0
    with pytest.raises(UserError, match=r"Qwen/Qwen2\.5-[\d.]+B: not on this machine"):
        train.train(args)


@pytest.mark.parametrize("file, line", sorted(set(re.findall(r"\]\((\w+\.py)#L(\d+)\)", README))))
def test_line_references_point_at_the_functions_they_name(file, line):
    code = (ROOT / file).read_text().splitlines()[int(line) - 1]
    assert code.startswith("def "), f"{file}:{line} is {code!r}"
    for label in re.findall(rf"\[([^\]]+)\]\({file}#L{line}\)", README):
        assert label == f"{file}:{line}"


def test_files_named_in_the_readme_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / path).exists(), path


def test_the_memory_table_is_what_its_command_prints():
    done = subprocess.run([sys.executable, "experiments/memory.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) > 10 and done.stdout.strip() in README


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_the_examples_run(block):
    names = {}
    exec(block, names)
    assert names["logp"].grad.abs().sum() > 0 and names["loss"].isfinite()


def test_the_table_of_recipes_is_that_of_train():
    rows = dict(re.findall(r"^\| `--([a-z-]+)` \| (.*) \|$", README, re.M))
    for flag, text in rows.items():
        for algo, cell in zip(("grpo", "dapo", "tepo"), text.split(" | "), strict=True):
            value = train.ALGO[algo][flag.replace("-", "_")]
            assert cell.startswith(f"{value:g}" if value else ("0", "no KL term")) if isinstance(value, float) else cell.startswith(value), (flag, algo)
    assert len(rows) == 4


def test_help_needs_no_torch():
    code = "import sys; sys.argv = ['train.py', '--help']\ntry:\n import runpy; runpy.run_path('train.py', run_name='__main__')\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    for script in ("train.py", "eval.py", "cast.py"):
        subprocess.run([sys.executable, "-c", code.replace("train.py", script)], cwd=ROOT, check=True, capture_output=True)
