"""The files of experiments/variants: against loops in float64, against verl 0.9 and TRL 1.16."""

import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dapo
import tepo
import train
from engine.files import read_jsonl
from grpo import group_advantages
from tasks import import_file
from tests.conftest import ROOT
from tests.test_losses import batches

FOLDER = ROOT / "experiments" / "variants"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
PICKING = ("clip_cov", "kl_cov")  # they choose among the tokens of a micro-batch
each_variant = pytest.mark.parametrize("name", NAMES)


@cache
def variant(name):
    return import_file(str(FOLDER / f"{name}.py"))


def complete(batch, **flags):
    """A batch with the normalisers that train.py adds, and the flags of a variant."""
    mask = batch["mask"]
    normalisers = {
        "num_tokens": max(mask.sum().item(), 1),
        "num_sequences": max(mask.any(1).sum().item(), 1),
    }
    return {**batch, **normalisers}, SimpleNamespace(max_completion_length=9, **flags)


def call(name, batch, seed=0, **flags):
    """The loss of a variant and its metrics, with its RECIPE where no flag says otherwise."""
    full, args = complete(batch, **{**variant(name).RECIPE, **flags})
    torch.manual_seed(seed)
    return variant(name).loss(full, batch["logp"], batch["entropy"], args)


def gradient(name, batch, **flags):
    loss, _ = call(name, batch, **flags)
    return torch.autograd.grad(loss, batch["logp"])[0]


def detached(batch):
    copy = {key: tensor.detach().clone() for key, tensor in batch.items()}
    copy["logp"].requires_grad_()
    return copy


# ---- against loops


def clip(x, low, high):
    return min(max(x, 1 - low), 1 + high)


def loop_loss(name, batch, low, high):
    """The equations of the docstrings, token by token, in Python floats. Not the two that pick."""
    rows = []  # of each completion: log-ratios, log-probs, A
    for i, mask in enumerate(batch["mask"].tolist()):
        length = sum(mask)
        logp = batch["logp"][i, :length].tolist()
        old = batch["old_logp"][i, :length].tolist()
        entropy = batch["entropy"][i, :length].tolist()
        rows.append(([a - b for a, b in zip(logp, old)], logp, entropy))
    tokens = max(sum(len(d) for d, _, _ in rows), 1)
    sequences = max(sum(bool(d) for d, _, _ in rows), 1)
    total = 0.0
    for (d, logp, entropy), A in zip(rows, batch["advantages"].tolist()):
        for t in range(len(d)):
            ratio = math.exp(d[t])
            if name in ("gspo", "seq_mean_token_sum"):
                ratio = math.exp(sum(d) / len(d))
            if name == "prefix":
                ratio = math.exp(sum(d[: t + 1]) / (t + 1))
            term = min(ratio * A, clip(ratio, low, high) * A)
            if name == "cispo":
                term = clip(ratio, low, high) * A * logp[t]
            if name == "gpg":
                term = A * logp[t]
            if name == "entropy_bonus":
                term -= 0.003 * min(ratio, 1 + high) * (logp[t] + entropy[t]) * logp[t]
            normaliser = tokens
            if name == "gspo":
                normaliser = sequences * len(d)
            if name == "seq_mean_token_sum":
                normaliser = sequences
            if name == "dr_grpo":
                normaliser = sequences * 9
            total -= term / normaliser
    return total


@pytest.mark.parametrize("name", [name for name in NAMES if name not in PICKING])
@given(batch=batches(), low=st.floats(0.01, 0.5), high=st.floats(0.01, 0.5))
def test_losses_equal_a_loop(name, batch, low, high):
    flags = {"epsilon": low, "epsilon_high": high}
    loss, _ = call(name, batch, **flags)
    assert loss.item() == pytest.approx(loop_loss(name, batch, low, high), abs=1e-12)


@given(batches(), st.floats(0.01, 0.5), st.floats(0.1, 3.0))
def test_kl_cov_equals_a_loop(batch, share, beta):
    found, metrics = call("kl_cov", batch, kl_cov_ratio=share, beta=beta)
    tokens = []
    for i, t in batch["mask"].nonzero().tolist():
        tokens.append((batch["logp"][i, t].item(), batch["advantages"][i].item(), i, t))
    if not tokens:
        assert found == 0
        return
    mean_logp = math.fsum(x[0] for x in tokens) / len(tokens)
    mean_A = math.fsum(x[1] for x in tokens) / len(tokens)
    covs = [(logp - mean_logp) * (A - mean_A) for logp, A, _, _ in tokens]
    k = max(int(share * len(tokens)), 1)
    kth = sorted(covs)[-k]
    total = 0.0
    for cov, (logp, A, i, t) in zip(covs, tokens):
        d = logp - batch["old_logp"][i, t].item()
        held_back = metrics["kl_mask_fraction"][i, t].item()
        if abs(cov - kth) > 1e-12:  # which of equal ones is taken may differ
            assert held_back == (cov > kth)
        total -= math.exp(d) * A - beta * abs(d) * held_back
    assert metrics["kl_mask_fraction"].sum() == k
    assert found.item() == pytest.approx(total / len(tokens), abs=1e-12)


@given(batches(), st.floats(0.01, 1.0), st.floats(-0.5, 0.5), st.integers(0, 99))
def test_clip_cov_drops_as_many_as_it_says(batch, share, low, seed):
    """Those that are dropped are candidates; with them, the loss is DAPO's."""
    flags = {"clip_cov_ratio": share, "clip_cov_lb": low, "clip_cov_ub": low + 0.5}
    loss, metrics = call("clip_cov", batch, seed=seed, **flags)
    mask = batch["mask"]
    dropped = metrics["clip_ratio/cov"]
    clipped = metrics["clip_ratio/low"] | metrics["clip_ratio/high"]
    candidates = torch.zeros_like(mask)
    if mask.any():
        A = batch["advantages"].unsqueeze(1).expand_as(mask)
        logp = batch["logp"].detach()
        cov = (logp - logp[mask].mean()) * (A - A[mask].mean())
        candidates = (cov > low) & (cov < low + 0.5) & mask & ~clipped
    assert not (dropped & ~candidates).any()
    wanted = max(int(share * mask.sum().item()), 1)
    assert dropped.sum() == min(wanted, candidates.sum())
    full, _ = complete(batch)
    arguments = [batch[key] for key in ("logp", "old_logp", "advantages", "mask")]
    whole, _ = dapo.dapo_loss(*arguments, num_tokens=full["num_tokens"])
    ratio = (batch["logp"] - batch["old_logp"]).exp()
    without = (ratio * batch["advantages"].unsqueeze(1))[dropped].sum() / full["num_tokens"]
    assert loss.item() == pytest.approx((whole + without).item(), abs=1e-12)
    again, _ = call("clip_cov", batch, seed=seed, **flags)
    assert again == loss


# ---- what all of them share


@each_variant
@given(batch=batches(), data=st.data())
def test_micro_batches_add_up(name, batch, data):
    if name in PICKING:  # their choice depends on the micro-batch, as they say
        return
    full, args = complete(batch, **variant(name).RECIPE)
    whole = gradient(name, batch)
    cut = data.draw(st.integers(0, len(batch["mask"])))
    total = torch.zeros_like(whole)
    for part in (slice(0, cut), slice(cut, None)):
        piece = {key: x[part] if isinstance(x, torch.Tensor) else x for key, x in full.items()}
        loss, _ = variant(name).loss(piece, piece["logp"], piece["entropy"], args)
        total += torch.autograd.grad(loss, batch["logp"])[0]
    assert torch.allclose(total, whole, atol=1e-12)


@each_variant
@given(batch=batches(), garbage=st.sampled_from([float("nan"), float("inf"), -1e30]))
def test_padding_may_hold_anything(name, batch, garbage):
    expected = gradient(name, batch)
    dirty = detached(batch)
    with torch.no_grad():
        for key in ("logp", "old_logp", "entropy", "old_entropy"):
            dirty[key][~batch["mask"]] = garbage
    found = gradient(name, dirty)
    assert torch.allclose(found, expected, atol=1e-12)
    assert not found[~batch["mask"]].any()


@each_variant
@given(batch=batches())
def test_metrics_are_token_tensors(name, batch):
    loss, metrics = call(name, batch)
    assert loss.shape == () and loss.requires_grad
    for value in metrics.values():
        assert value.shape == batch["mask"].shape and not value.requires_grad
    for key in set(metrics) - {"ratio"}:
        assert not metrics[key][~batch["mask"]].any()


@given(batches(off_policy=False))
def test_all_token_means_agree_at_the_old_policy(batch):
    """At pi = pi_old the ratio is 1: only normalisers and added terms tell methods apart."""
    full, _ = complete(batch)
    arguments = [batch[key] for key in ("logp", "old_logp", "advantages", "mask")]
    loss, _ = dapo.dapo_loss(*arguments, num_tokens=full["num_tokens"])
    expected = torch.autograd.grad(loss, batch["logp"])[0]
    for name in ("gpg", "cispo", "seq_mean_token_sum"):
        scale = 1.0
        if name == "seq_mean_token_sum":
            scale = full["num_sequences"] / full["num_tokens"]
        assert torch.allclose(gradient(name, batch) * scale, expected, atol=1e-12)
    assert torch.allclose(gradient("entropy_bonus", batch, entropy_coef=0.0), expected, atol=1e-12)
    assert torch.allclose(gradient("clip_cov", batch, clip_cov_lb=9.0), expected, atol=1e-12)
    # |log w| has no derivative at w = 1; torch takes 0.
    assert torch.allclose(gradient("kl_cov", batch), expected, atol=1e-12)


@given(batches())
def test_tepo_without_kl_is_seq_mean_token_sum_but_for_its_normaliser(batch):
    full, _ = complete(batch)
    arguments = [batch[key] for key in ("logp", "old_logp", "advantages", "mask")]
    loss, _ = tepo.tepo_loss(
        *arguments,
        entropy_change=torch.zeros_like(batch["logp"]),
        num_tokens=full["num_tokens"],
        beta=0.0,
    )
    found, _ = call("seq_mean_token_sum", batch)
    scale = full["num_sequences"] / full["num_tokens"]
    assert found.item() * scale == pytest.approx(loss.item(), abs=1e-12)


@given(st.integers(2, 8), st.floats(0.1, 6.0), st.integers(0, 10**6))
def test_entropy_surrogate_by_enumeration(V, sharpness, seed):
    """The mean over y of its gradient by the logits is the gradient of the entropy."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(V, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logp = logits.log_softmax(0)
    entropy = -(logp.exp() * logp).sum()
    expected = torch.autograd.grad(entropy, logits, retain_graph=True)[0]
    ones = torch.ones(1, V, dtype=torch.float64)
    values = variant("entropy_bonus").entropy_surrogate(
        logp.unsqueeze(0), entropy.detach() * ones, ones, 1.28
    )
    found = torch.autograd.grad((values.squeeze(0) * logp.detach().exp()).sum(), logits)[0]
    assert torch.allclose(found, expected, atol=1e-10)


@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_unscaled_advantages_are_the_centred_rewards(G, groups, seed):
    rewards = torch.rand(G * groups, generator=torch.Generator().manual_seed(seed))
    found = group_advantages(rewards, G, scale=False).view(groups, G)
    parts = rewards.view(groups, G)
    assert torch.allclose(found, parts - parts.mean(1, keepdim=True), atol=1e-6)
    assert (group_advantages(torch.ones(G), G, scale=False) == 0).all()


# ---- against other people's code


@cache
def verl_losses():
    return pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed")


def verl_loss(loss_mode, loss_agg_mode, batch, low, high, **policy):
    """The loss of verl's registry, of a batch in our form."""
    core = verl_losses()
    from verl.workers.config import ActorConfig, PolicyLossConfig

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=low,
        clip_ratio_low=low,
        clip_ratio_high=high,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode, **policy),
    )
    mask = batch["mask"].double()
    found, _ = core.get_policy_loss_fn(loss_mode)(
        old_log_prob=batch["old_logp"],
        log_prob=batch["logp"],
        advantages=batch["advantages"].unsqueeze(1) * torch.ones_like(mask),
        response_mask=mask,
        loss_agg_mode=loss_agg_mode,
        config=config,
    )
    return found


OF_VERL = {  # name: loss_mode, loss_agg_mode
    "gspo": ("gspo", "seq-mean-token-mean"),
    "cispo": ("cispo", "token-mean"),
    "gpg": ("gpg", "token-mean"),
    "clip_cov": ("clip_cov", "token-mean"),
    "kl_cov": ("kl_cov", "token-mean"),
    "dr_grpo": ("vanilla", "seq-mean-token-sum-norm"),
}


@pytest.mark.parametrize("name", OF_VERL)
@settings(max_examples=300)
@given(batch=batches(), low=st.floats(0.05, 0.5), high=st.floats(0.05, 0.5))
def test_equal_to_verl(name, batch, low, high):
    verl_losses()
    if not batch["mask"].any():
        return
    flags = {"epsilon": low, "epsilon_high": high}
    policy = {}
    if name == "clip_cov":
        policy = {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1, "clip_cov_ub": 5.0}
        flags |= policy
    if name == "kl_cov":
        policy = {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7}
        flags |= {"kl_cov_ratio": 0.2, "beta": 0.7}
    found = gradient(name, batch, **flags)
    torch.manual_seed(0)
    theirs = verl_loss(*OF_VERL[name], batch, low, high, **policy)
    if name == "dr_grpo":  # its default horizon is the width of the batch
        theirs = theirs * batch["mask"].shape[1] / 9
    ours, _ = call(name, batch, **flags)
    # verl divides by a length plus 1e-8.
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-7)
    expected = torch.autograd.grad(theirs, batch["logp"])[0]
    assert torch.allclose(found, expected, atol=1e-7)


OF_TRL = {  # name: loss_type, importance_sampling_level
    "gspo": ("grpo", "sequence"),
    "seq_mean_token_sum": ("luspo", "sequence"),
    "cispo": ("cispo", "token"),
    "dr_grpo": ("dr_grpo", "token"),
}


def trl_loss(loss_type, level, batch, low, high):
    """TRL's own _compute_loss on log-probs in the place of a model's."""
    trainer_module = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not installed")
    trainer = object.__new__(trainer_module.GRPOTrainer)
    mask = batch["mask"].long()
    entropies = batch["entropy"]

    def statistics(*arguments, **named):
        return batch["logp"], entropies, None

    accelerator = SimpleNamespace(
        num_processes=1,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    trainer.__dict__.update(
        _get_per_token_logps_and_entropies=statistics,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=0.0,
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=1 + high if loss_type == "cispo" else high,
        args=SimpleNamespace(delta=None, steps_per_generation=1),
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=9,
        accelerator=accelerator,
        _entropy_bonus_enabled=False,
        _metrics={"train": trainer_module.defaultdict(list)},
    )
    nothing = torch.zeros(len(mask), 0, dtype=torch.long)
    inputs = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old_logp"],
        "num_items_in_batch": mask.sum(),
    }
    return trainer._compute_loss(None, inputs)


@pytest.mark.parametrize("name", OF_TRL)
@settings(max_examples=300)
@given(batch=batches(), low=st.floats(0.05, 0.5), high=st.floats(0.05, 0.5))
def test_equal_to_trl(name, batch, low, high):
    kept = batch["mask"].any(1)  # TRL counts completions without a token, too
    batch = {key: x[kept] for key, x in batch.items()}
    if not len(batch["mask"]):
        return
    if name == "cispo":
        low = 1.0  # TRL clips it above only
    theirs = trl_loss(*OF_TRL[name], batch, low, high)
    ours, _ = call(name, batch, epsilon=low, epsilon_high=high)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6, abs=1e-9)
    leaf = batch["logp"]
    found = torch.autograd.grad(ours, leaf)[0]
    assert torch.allclose(found, torch.autograd.grad(theirs, leaf)[0], atol=1e-9)


# ---- as programs


@each_variant
def test_trains(tmp_path, name):
    flags = f"""--algo {FOLDER}/{name}.py --steps 2 --num-prompts 6 --num-generations 4
        --max-completion-length 24 --steps-per-generation 3 --threads 1 --device cpu
        --output-dir {tmp_path}/run --save-steps 0""".split()
    rows = train.train(train.parse_args(flags))
    assert len(rows) == 2 and all(row["updates"] for row in rows)


def test_a_draw_is_the_same_after_a_resume(tmp_path):
    """Clip-Cov draws tokens. A run that is cut in two gives the rows of one that is not."""
    flags = f"""--algo {FOLDER}/clip_cov.py --clip-cov-ratio 0.2 --clip-cov-lb -0.5
        --num-prompts 6 --num-generations 4 --max-completion-length 24 --steps-per-generation 3
        --threads 1 --device cpu --save-steps 1""".split()
    train.train(train.parse_args([*flags, "--steps", "3", "--output-dir", f"{tmp_path}/whole"]))
    train.train(train.parse_args([*flags, "--steps", "1", "--output-dir", f"{tmp_path}/cut"]))
    torch.manual_seed(12345)
    train.train(train.parse_args(["--resume", "--steps", "3", "--output-dir", f"{tmp_path}/cut"]))
    kept = ("reward", "entropy", "grad_norm", "clip_ratio/cov")
    whole, cut = (
        [[row[key] for key in kept] for row in read_jsonl(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "cut")
    )
    assert whole == cut and any(row[-1] for row in whole)
