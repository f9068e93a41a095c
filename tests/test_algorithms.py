"""The three algorithm files as programs, objectives and tasks of one's own, the golden runs."""

import ast
import importlib
import json

import pytest

import train
from engine.errors import UserError
from engine.files import read_jsonl
from tests.conftest import ROOT

SMALL = """--num-prompts 6 --num-generations 4 --max-completion-length 24 --threads 1 --device cpu
    --steps-per-generation 3""".split()

GSPO = '''
"""GSPO (arXiv 2507.18071): TEPO's sequence ratio, but every completion weighs the same."""
import torch
from grpo import clipped_objective
from tepo import sequence_ratio

RECIPE = dict(epsilon=3e-3, epsilon_high=4e-3, length_power=1.0)


def loss(batch, logp, entropy, args):
    mask = batch["mask"]
    ratio = sequence_ratio(logp, batch["old_logp"], mask).unsqueeze(1)
    advantages = batch["advantages"]
    objective, low, high = clipped_objective(ratio, advantages, args.epsilon, args.epsilon_high)
    weight = mask / mask.sum(dim=1, keepdim=True) ** args.length_power
    loss = -(objective * weight).sum() / batch["num_sequences"]
    return loss, {"ratio": ratio.expand_as(logp), "clip_ratio/high": high & mask}
'''

LENGTH_TASK = '''
"""A reward of another kind: the closer to twelve characters, the better."""


def load(split):
    return [{"prompt": f"{a}+{b}="} for a in range(1, 10) for b in range(1, 10)]


def reward(problem, text):
    return -abs(len(text) - 12) / 12
'''


@pytest.mark.parametrize("algo", ["grpo", "dapo", "tepo"])
def test_the_plain_loop_and_train_give_the_same_rewards(tmp_path, algo, capsys):
    plain = importlib.import_module(algo).main(steps=2, seed=1)
    flags = f"--algo {algo} --steps 2 --seed 1 --save-steps 0 --output-dir {tmp_path}/run"
    rows = train.train(train.parse_args(flags.split()))
    assert [row["reward"] for row in rows] == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize("algo", ["grpo", "dapo", "tepo"])
def test_rewards_are_those_of_the_golden_run(tmp_path, algo):
    golden = json.loads((ROOT / "tests" / "golden.json").read_text())["rewards"][algo]
    flags = "--learning-rate 3e-5 --num-iterations 1 --epsilon 0.2 --steps 4 --save-steps 0".split()
    flags += ["--algo", algo, "--epsilon-high", "0.2" if algo == "grpo" else "0.28"]
    rows = train.train(train.parse_args([*flags, "--output-dir", str(tmp_path / "run")]))
    # Another processor rounds otherwise, and may draw a token or two otherwise: 2 of 256.
    assert [row["reward"] for row in rows] == pytest.approx(golden[:4], abs=0.01)


@pytest.mark.parametrize(
    "algo, expected",
    [
        ("grpo", dict(epsilon=0.2, epsilon_high=0.2, beta=0.0, dynamic_sampling="off")),
        ("dapo", dict(epsilon=0.2, epsilon_high=0.28, dynamic_sampling="refill", overlong="soft")),
        ("tepo", dict(epsilon=0.2, epsilon_high=0.28, beta=0.001, dynamic_sampling="filter")),
    ],
)
def test_flags_default_to_the_papers_values(algo, expected):
    real = vars(train.parse_args(["--algo", algo, "--model", "Qwen2.5-1.5B"]))
    assert {name: real[name] for name in expected} == expected
    embedded = vars(train.parse_args(["--algo", algo]))
    if algo == "tepo":
        expected = {**expected, "epsilon": 0.02, "epsilon_high": 0.028}
    assert {name: embedded[name] for name in expected} == expected


def test_an_objective_of_ones_own_trains(tmp_path):
    (tmp_path / "gspo.py").write_text(GSPO)
    flags = ["--algo", str(tmp_path / "gspo.py"), "--learning-rate", "1e-4", "--steps", "12"]
    flags += "--num-prompts 16 --dynamic-sampling filter --length-power 1.0 --threads 1".split()
    rows = train.train(train.parse_args([*flags, "--output-dir", str(tmp_path / "run")]))
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 0.2
    assert any(row["clip_ratio/high"] > 0 for row in rows)
    saved = json.loads((tmp_path / "run" / "args.json").read_text())
    assert saved["length_power"] == 1.0
    assert saved["epsilon"] == 3e-3
    more = train.parse_args(["--resume", "--output-dir", str(tmp_path / "run"), "--steps", "13"])
    assert len(train.train(more)) == 13


@pytest.mark.parametrize(
    "recipe",
    ["dict(norm=None)", "dict(norm=[1])", "dict(dynamic_sampling='of')", "dict(kl_mask='some')"],
)
def test_a_recipe_that_cannot_work_is_one_line(tmp_path, recipe):
    (tmp_path / "mine.py").write_text(
        f"RECIPE = {recipe}\ndef loss(batch, logp, entropy, args): ..."
    )
    with pytest.raises(UserError, match="mine.py"):
        train.parse_args(["--algo", str(tmp_path / "mine.py")])


def test_flags_of_a_recipe_have_its_types(tmp_path):
    text = "RECIPE = dict(norm=True, power=2, word='a')\ndef loss(batch, logp, entropy, args): ..."
    (tmp_path / "mine.py").write_text(text)
    flags = ["--algo", str(tmp_path / "mine.py"), "--no-norm", "--power", "3", "--word", "b"]
    args = train.parse_args(flags)
    assert (args.norm, args.power, args.word) == (False, 3, "b")


@pytest.mark.parametrize(
    "body",
    [
        "return batch['no_such_key'].sum(), {}",
        "return logp.sum()",
        "return logp, {}",
        "return logp.detach().sum(), {}",
        "return logp.sum(), {'ratio': logp[:, :1]}",
        "return logp.sum(), {'mine': 3.0}",
        "return args.no_such_flag * logp.sum(), {}",
    ],
)
def test_a_loss_that_fails_is_one_line(tmp_path, body):
    text = f"RECIPE = dict()\n\n\ndef loss(batch, logp, entropy, args):\n    {body}\n"
    (tmp_path / "mine.py").write_text(text)
    flags = ["--algo", str(tmp_path / "mine.py"), "--steps", "1", *SMALL]
    with pytest.raises(UserError, match="mine.py") as error:
        train.train(train.parse_args([*flags, "--output-dir", str(tmp_path / "run")]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "RECIPE = {}",
        "def loss(): pass",
        "RECIPE = 3\ndef loss(): pass",
        "import nothing_like_it",
        "x =",
    ],
)
def test_a_broken_objective_is_one_line(tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match="mine.py"):
        train.parse_args(["--algo", str(tmp_path / "mine.py")])


def test_a_reward_of_another_kind_trains(tmp_path):
    (tmp_path / "length.py").write_text(LENGTH_TASK)
    flags = ["--data", str(tmp_path / "length.py"), "--steps", "10", "--learning-rate", "1e-4"]
    rows = train.train(train.parse_args([*flags, *SMALL, "--output-dir", str(tmp_path / "run")]))
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.1
    assert all(row["reward"] < 0 for row in rows[:3])
    # A group is mixed when its numbers differ, right or wrong has nothing to do with it.
    assert rows[0]["groups_trained"] == 6 * (1 - rows[0]["frac_reward_zero_std"])
    assert read_jsonl(tmp_path / "run" / "completions.jsonl")[0]["answer"] is None


# --------------------------------------------------------------------------------------------------
# The layout


def imports_of(path, top_only=False):
    """The modules that a file imports, by name."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(modules):
    """The first parts of the names that are this project's."""
    own = {"grpo", "dapo", "tepo", "rollout", "train", "eval", "cast"}
    own |= {"tasks", "engine", "tiny", "experiments", "tests"}
    return {name.split(".")[0] for name in modules} & own


def test_an_objective_can_be_lifted_with_torch_alone():
    for name, allowed in {"grpo": set(), "dapo": {"grpo"}, "tepo": {"grpo"}}.items():
        modules = imports_of(ROOT / f"{name}.py", top_only=True)
        assert ours(modules) == allowed
        others = {module.split(".")[0] for module in modules} - allowed
        assert others <= {"math", "types", "torch"}


def test_who_knows_whom():
    for path in (ROOT / "engine").glob("*.py"):
        assert ours(imports_of(path)) <= {"engine"}, path
    for path in (ROOT / "tasks").glob("*.py"):
        known = {m for m in imports_of(path) if ours({m}) == {"engine"}}
        assert ours(imports_of(path)) <= {"engine", "tasks"}, path
        assert all(module.startswith("engine.errors") for module in known), path
    assert ours(imports_of(ROOT / "rollout.py")) <= {"engine"}
    everything = [*ROOT.glob("*.py"), *(ROOT / "tasks").glob("*.py"), *(ROOT / "tiny").glob("*.py")]
    for path in everything:
        assert not ours(imports_of(path)) & {"train", "eval", "cast"}, path


def test_no_circle():
    files = [*ROOT.glob("*.py")]
    for folder in ("tasks", "engine", "tiny", "experiments"):
        files += (ROOT / folder).glob("*.py")
    graph = {}
    for path in files:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = imports_of(path, top_only=True)
    graph = {name: {m for m in modules if m in graph} - {name} for name, modules in graph.items()}
    while graph:
        leaves = {name for name, modules in graph.items() if not modules & set(graph)}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: modules for name, modules in graph.items() if name not in leaves}
