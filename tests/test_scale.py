"""scale/: the same gradients however a batch is split, the same losses as TRL's and verl's.

Skipped where trl 1.16 or verl 0.9 is not installed.
"""

import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import tepo
from engine.errors import UserError
from engine.heads import find_heads, trained_masks
from engine.models import load_model, load_tokenizer, resolve_model
from tests.conftest import ROOT
from tests.test_losses import batches
from tests.test_variants import complete, trl_loss, verl_losses

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
SPLITS = [(1, 1), (1, 4), (2, 2)]  # processes, accumulation steps


def launch(processes, script, *arguments):
    """Runs a script as several processes on CPUs. Returns what it printed.

    By torchrun: `accelerate launch --cpu --num_processes 2` of accelerate 1.15 starts one process.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, str(ROOT / script), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """The weights after two updates of TEPO, for each split."""
    folder = tmp_path_factory.mktemp("ends")
    found = {}
    for processes, accumulation in SPLITS:
        path = folder / f"{processes}-{accumulation}.safetensors"
        said = launch(processes, "tests/trl_worker.py", "tepo", path, accumulation)
        assert f"{processes} processes" in said
        found[processes, accumulation] = load_file(path)
    return found


@needs_trl
@pytest.mark.parametrize("split", SPLITS[1:])
def test_a_split_batch_has_the_gradient_of_the_whole(ends, split):
    start = dict(load_model(resolve_model("tiny"), "cpu").named_parameters())
    whole = ends[1, 1]
    assert whole.keys() == start.keys()
    moved = sum((whole[name] - p).square().sum() for name, p in start.items()).sqrt().item()
    off = sum((whole[name] - p).square().sum() for name, p in ends[split].items()).sqrt().item()
    assert moved > 0.01 and off < 1e-4 * moved


@needs_trl
def test_frozen_heads_do_not_move_under_ddp(tmp_path):
    out = tmp_path / "end"
    said = launch(2, "tests/trl_worker.py", "cast", out, 1)
    assert "frozen elements are bit-identical" in said and "2 processes" in said
    model = load_model(resolve_model("tiny"), "cpu")
    masks = trained_masks(model, find_heads(model), {(0, 1), (0, 4), (2, 3)})
    moved = 0
    for name, after in load_file(out).items():
        changed = after != model.get_parameter(name)
        mask = masks.get(name, torch.zeros_like(changed))
        assert not (changed & ~mask).any()
        moved += changed.sum().item()
    assert moved > 0.9 * sum(mask.sum().item() for mask in masks.values())


@needs_trl
def test_the_command_trains(tmp_path):
    """As README and docs/SCALE.md have it, at toy scale: two processes, two rollouts."""
    flags = """--steps 2 --num-prompts 8 --num-generations 4 --max-completion-length 48
        --steps-per-generation 2 --num-iterations 1 --per-device-train-batch-size 4""".split()
    said = launch(2, "scale/trl_tepo.py", *flags, "--output-dir", tmp_path / "out")
    assert said.count("'loss'") == 4 and "kl_mask_fraction" in said
    before = dict(load_model(resolve_model("tiny"), "cpu").named_parameters())
    after = dict(load_model(str(tmp_path / "out"), "cpu").named_parameters())
    assert any(not torch.equal(before[name], p) for name, p in after.items())


@needs_trl
@pytest.mark.parametrize(
    "flags, message",
    [
        ("--steps-per-generation 1 --num-iterations 1", "TEPO is DAPO"),
        ("--overlong soft", "--overlong has no effect here"),
        ("--num-prompts 12 --steps-per-generation 3 --num-generations 5", "not a multiple of 8"),
    ],
)
def test_settings_that_mean_nothing_here_are_refused(flags, message):
    from scale import trl_config

    with pytest.raises(UserError, match=message):
        trl_config.config(trl_config.parse_args(flags.split()), processes=1)


@needs_trl
@pytest.mark.parametrize(
    "wrong, message",
    [
        ({}, "TEPO is DAPO"),
        ({"num_iterations": 2, "beta": 0.1}, "tepo_beta"),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, "multiple"),
    ],
)
def test_trainer_refuses_what_is_not_tepo(wrong, message, tmp_path):
    from trl import GRPOConfig

    from scale.trl_tepo import TEPOTrainer

    name = resolve_model("tiny")
    usual = dict(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=message):
        TEPOTrainer(
            load_model(name, "cpu"),
            lambda completions, **_: [0.0] * len(completions),
            GRPOConfig(**usual, **wrong),
            Dataset.from_list([{"prompt": "1+1="}] * 8),
            processing_class=load_tokenizer(name),
        )


@needs_trl
@settings(max_examples=100)
@given(batch=batches(), low=st.floats(0.05, 0.5), high=st.floats(0.05, 0.5))
def test_without_kl_it_is_trls_dapo_at_the_sequence_level(batch, low, high):
    if not batch["mask"].any():
        return
    theirs = trl_loss("dapo", "sequence", batch, low, high)
    ours, _ = tepo_of(batch, low, high, beta=0.0)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9, abs=1e-12)
    leaf = batch["logp"]
    found = torch.autograd.grad(ours, leaf)[0]
    assert torch.allclose(found, torch.autograd.grad(theirs, leaf)[0], atol=1e-12)


def tepo_of(batch, low, high, beta, **options):
    """tepo_loss of a batch, by default with the exact dH."""
    full, _ = complete(batch)
    change = tepo.exact_entropy_change(batch["entropy"], batch["old_entropy"])
    arguments = [batch[key] for key in ("logp", "old_logp", "advantages", "mask")]
    options = {"entropy_change": change, **options}
    return tepo.tepo_loss(
        *arguments,
        num_tokens=full["num_tokens"],
        epsilon_low=low,
        epsilon_high=high,
        beta=beta,
        **options,
    )


# ---- verl


@cache
def verl_config(low, high, beta, tokens, ranks):
    from verl.workers.config import ActorConfig, PolicyLossConfig

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=low,
        clip_ratio_high=high,
        policy_loss=PolicyLossConfig(loss_mode="tepo", ppo_kl_coef=beta),
    )
    if tokens:
        config.global_batch_info.update(batch_num_tokens=tokens, dp_size=ranks)
    return config


@settings(max_examples=100)
@given(
    batch=batches(),
    low=st.floats(0.05, 0.5),
    high=st.floats(0.05, 0.5),
    beta=st.floats(0, 1),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_verl_tepo_is_tepo_loss(batch, low, high, beta, ranks, seed):
    core = verl_losses()
    import scale.verl_tepo  # noqa: F401

    mask = batch["mask"]
    tokens = mask.sum().item()
    if not tokens:
        return
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(len(mask), generator=generator, dtype=torch.float64)  # of graded rewards
    batch["advantages"] = A
    weights = mask.sum(1)
    dH = tepo.covariance_entropy_change(
        batch["logp"],
        A,
        (batch["logp"].detach() * mask).sum() / tokens,
        (A * weights).sum() / tokens,
    )
    expected, metrics = tepo_of(batch, low, high, beta, entropy_change=dH)
    given_tokens = 2 * tokens if ranks > 1 else None
    loss, measured = core.get_policy_loss_fn("tepo")(
        batch["old_logp"],
        batch["logp"],
        torch.where(mask, A.unsqueeze(1), 7.0),  # whatever the padding holds
        mask.double(),
        loss_agg_mode="token-mean",
        config=verl_config(low, high, beta, given_tokens, ranks),
    )
    if ranks > 1:
        expected = expected * ranks / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    share = (metrics["kl_mask_fraction"].sum() / tokens).item()
    assert measured["actor/kl_mask_fraction"] == pytest.approx(share)
    leaf = batch["logp"]
    found = torch.autograd.grad(loss, leaf)[0]
    assert torch.allclose(found, torch.autograd.grad(expected, leaf)[0], atol=1e-12)


def test_verl_loads_it_by_its_own_loader():
    verl_losses()
    found = os.pathsep.join([str(ROOT / ".verl"), os.environ.get("PYTHONPATH", "")])
    code = (
        "import verl; from verl.trainer.ppo.core_algos import get_policy_loss_fn as f; "
        "print(f('tepo').__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "VERL_USE_EXTERNAL_MODULES": "scale.verl_tepo", "PYTHONPATH": found},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "scale.verl_tepo", done.stderr[-2000:]


@pytest.mark.parametrize("wrong", ["mode", "token-wise", "rollout"])
def test_verl_settings_that_are_not_tepo_are_refused(wrong):
    core = verl_losses()
    import scale.verl_tepo  # noqa: F401

    ones = torch.ones(2, 3)
    advantages = torch.arange(6.0).view(2, 3) if wrong == "token-wise" else ones
    with pytest.raises(ValueError, match="TEPO"):
        core.get_policy_loss_fn("tepo")(
            -ones,
            -ones,
            advantages,
            ones,
            loss_agg_mode="seq-mean-token-mean" if wrong == "mode" else "token-mean",
            config=verl_config(0.2, 0.28, 0.001, None, 1),
            rollout_is_weights=ones if wrong == "rollout" else None,
        )
