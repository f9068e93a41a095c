"""Invariants of the three losses over random shapes, lengths, masks and groups, against brute-force float64 oracles."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dapo import dapo_loss, dynamic_sampling, mixed_groups, overlong_filter, soft_overlong_punishment
from grpo import clipped_objective, group_advantages, grpo_loss, k3
from tepo import KL_MASKS, covariance_entropy_change, exact_entropy_change, kl_token_mask, sequence_ratio, tepo_loss

ALGOS = ("grpo", "dapo", "tepo")


@st.composite
def batches(draw, off_policy=True):
    """A random batch: G completions a prompt, lengths from 0 to T, log-probs before and after an update, in float64."""
    # Shapes come from hypothesis, contents from a seed: lists of drawn numbers would mostly be short and mostly be zeros.
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    G, groups, T = draw(st.integers(2, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 7))
    B = G * groups
    lengths = torch.randint(0, T + 1, (B,), generator=generator)
    rewards = torch.randint(0, 2, (B,), generator=generator).float()
    rand = lambda: torch.rand(B, T, generator=generator, dtype=torch.float64)  # noqa: E731
    old_logp = -0.05 - 3 * rand()
    batch = {
        "old_logp": old_logp,
        "logp": (old_logp + (0.8 * (rand() - 0.5) if off_policy else 0)).requires_grad_(),
        "old_entropy": 2 * rand(),
        "ref_logp": -0.05 - 3 * rand(),
        "mask": torch.arange(T) < lengths[:, None],
        "advantages": group_advantages(rewards, G).double(),
    }
    batch["entropy"] = batch["old_entropy"] + ((rand() - 0.5) if off_policy else 0)
    return batch


def loss_of(algo, batch, num_tokens=None, num_sequences=None, **options):
    mask = batch["mask"]
    tensors = (batch["logp"], batch["old_logp"], batch["advantages"], mask)
    num_tokens = mask.sum() if num_tokens is None else num_tokens
    if algo == "grpo":
        options = {"beta": 0.3, "ref_logp": batch["ref_logp"], **options}
        return grpo_loss(*tensors, num_sequences=mask.any(1).sum() if num_sequences is None else num_sequences, **options)
    if algo == "dapo":
        return dapo_loss(*tensors, num_tokens=num_tokens, **options)
    change = exact_entropy_change(batch["entropy"], batch["old_entropy"])
    return tepo_loss(*tensors, num_tokens=num_tokens, entropy_change=change, **{"beta": 0.3, **options})


def gradient_of(algo, batch, **options):
    loss, _ = loss_of(algo, batch, **options)
    return torch.autograd.grad(loss, batch["logp"])[0]


def rows(batch, index):
    """The batch of some rows only, with log-probs that carry their own gradient."""
    part = {name: tensor[index] for name, tensor in batch.items()}
    part["logp"] = part["logp"].detach().clone().requires_grad_()
    return part


# ---- advantages


@given(st.integers(2, 8), st.integers(1, 5), st.floats(-1e3, 1e3, width=32))
def test_equal_rewards_have_exactly_zero_advantage(G, groups, value):
    assert (group_advantages(torch.full((G * groups,), value), G) == 0).all()


@given(st.integers(2, 6), st.integers(1, 4), st.data())
def test_advantages_are_the_group_z_scores_and_follow_a_permutation_of_groups(G, groups, data):
    rewards = data.draw(st.lists(st.floats(-1, 1, width=32), min_size=G * groups, max_size=G * groups))
    advantages = group_advantages(torch.tensor(rewards), G)
    for g in range(groups):
        r = rewards[g * G : (g + 1) * G]
        mean = math.fsum(r) / G
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in r) / (G - 1))
        assume(std > 1e-3 or max(r) == min(r))
        for i in range(G):
            expected = 0.0 if max(r) == min(r) else (r[i] - mean) / (std + 1e-6)
            assert advantages[g * G + i].item() == pytest.approx(expected, abs=2e-3)
    order = data.draw(st.permutations(range(groups)))
    permuted = torch.tensor(rewards).view(groups, G)[order].view(-1)
    assert torch.equal(group_advantages(permuted, G), advantages.view(groups, G)[order].view(-1))


@pytest.mark.parametrize("count, G", [(7, 4), (4, 1)])
def test_rewards_that_do_not_make_whole_groups_are_refused(count, G):
    with pytest.raises(ValueError, match="whole groups"):
        group_advantages(torch.zeros(count), G)


# ---- the losses against loops


def loop_loss(algo, batch, epsilon_low, epsilon_high, beta, kl_mask="positive"):
    """The equations, token by token, in Python floats."""
    total, B, T = 0.0, *batch["mask"].shape
    tokens = int(batch["mask"].sum())
    sequences = int(batch["mask"].any(1).sum())
    for i in range(B):
        length, A = int(batch["mask"][i].sum()), batch["advantages"][i].item()
        here = [t for t in range(T) if batch["mask"][i, t]]
        d = {t: (batch["logp"][i, t] - batch["old_logp"][i, t]).item() for t in here}
        for t in here:
            w = math.exp(sum(d.values()) / length) if algo == "tepo" else math.exp(d[t])
            term = min(w * A, min(max(w, 1 - epsilon_low), 1 + epsilon_high) * A)
            if algo == "grpo":
                r = math.exp((batch["ref_logp"][i, t] - batch["logp"][i, t]).item())
                total += (term - beta * (r - math.log(r) - 1)) / length / sequences
            elif algo == "dapo":
                total += term / tokens
            else:
                change = (batch["entropy"][i, t] - batch["old_entropy"][i, t]).item()
                positive, negative = A > 0 and change < 0, A < 0 and change > 0
                M = {"none": False, "all": True, "positive": positive, "negative": negative, "both": positive or negative}[kl_mask]
                r = math.exp(-d[t])
                total += (term - beta * (r - math.log(r) - 1) * M) / tokens
    return -total


@pytest.mark.parametrize("algo, kl_mask", [("grpo", None), ("dapo", None), *(("tepo", which) for which in KL_MASKS)])
@given(batch=batches(), low=st.floats(0.01, 0.3), high=st.floats(0.01, 0.4), beta=st.floats(0.1, 2))
def test_losses_equal_a_brute_force_loop(algo, kl_mask, batch, low, high, beta):
    options = {"epsilon_low": low, "epsilon_high": high}
    if algo != "dapo":
        options["beta"] = beta
    if algo == "tepo":
        options["kl_mask"] = kl_mask
    loss, _ = loss_of(algo, batch, **options)
    assert loss.item() == pytest.approx(loop_loss(algo, batch, low, high, beta, kl_mask), abs=1e-12)


@pytest.mark.parametrize("algo", ALGOS)
def test_gradients_match_finite_differences(algo):
    torch.manual_seed(0)
    old_logp = -0.5 - torch.rand(4, 3, dtype=torch.float64)
    batch = {
        "old_logp": old_logp, "logp": (old_logp + 0.5 * torch.randn(4, 3, dtype=torch.float64)).requires_grad_(),
        "ref_logp": old_logp - 0.1, "old_entropy": torch.rand(4, 3), "entropy": torch.rand(4, 3),
        "mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool(),
        "advantages": torch.tensor([0.7, -0.7, 1.1, -1.3], dtype=torch.float64),
    }  # fmt: skip
    assert torch.autograd.gradcheck(lambda logp: loss_of(algo, {**batch, "logp": logp})[0], batch["logp"])


# ---- what must not matter


@pytest.mark.parametrize("algo", ALGOS)
@given(batch=batches(), data=st.data())
def test_gradient_is_the_same_for_every_partition_into_micro_batches(algo, batch, data):
    B = len(batch["mask"])
    whole = gradient_of(algo, batch)
    order = data.draw(st.permutations(range(B)))
    cuts = sorted(data.draw(st.sets(st.integers(1, B - 1))))
    counts = dict(num_tokens=batch["mask"].sum(), num_sequences=batch["mask"].any(1).sum())
    pieces = torch.zeros_like(whole)
    for start, end in zip([0, *cuts], [*cuts, B]):
        index = order[start:end]
        pieces[index] = gradient_of(algo, rows(batch, index), **counts)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("algo", ALGOS)
@given(batch=batches(), garbage=st.sampled_from([float("nan"), float("inf"), -1e30]))
def test_what_stands_in_the_padding_changes_nothing(algo, batch, garbage):
    loss, _ = loss_of(algo, batch)
    gradient = torch.autograd.grad(loss, batch["logp"])[0]
    dirty = {name: t.detach().clone() for name, t in batch.items()}
    for name in ("logp", "old_logp", "ref_logp", "entropy", "old_entropy"):
        dirty[name][~batch["mask"]] = garbage
    dirty["logp"].requires_grad_()
    dirty_loss, parts = loss_of(algo, dirty)
    assert torch.equal(dirty_loss, loss)
    assert torch.equal(torch.autograd.grad(dirty_loss, dirty["logp"])[0], gradient)
    assert (gradient[~batch["mask"]] == 0).all()
    assert not any(parts[name][~batch["mask"]].any() for name in ("clip_low", "clip_high", "kl", "kl_mask"))


@pytest.mark.parametrize("algo", ALGOS)
@given(batch=batches())
def test_fully_masked_rows_and_wider_padding_change_nothing(algo, batch):
    gradient = gradient_of(algo, batch)
    B, T = batch["mask"].shape
    wide = {name: torch.nn.functional.pad(t.detach(), (0, 2, 0, 1)) if t.dim() == 2 else torch.cat([t, t.new_ones(1)]) for name, t in batch.items()}
    wide["logp"].requires_grad_()
    torch.testing.assert_close(gradient_of(algo, wide)[:B, :T], gradient, rtol=0, atol=1e-15)


@pytest.mark.parametrize("algo", ALGOS)
def test_a_batch_without_tokens_has_loss_zero_and_finite_gradients(algo):
    zeros = torch.zeros(4, 3)
    batch = {name: zeros.clone() for name in ("old_logp", "ref_logp", "entropy", "old_entropy")}
    batch |= {"logp": zeros.clone().requires_grad_(), "mask": zeros.bool(), "advantages": torch.ones(4)}
    loss, _ = loss_of(algo, batch)
    loss.backward()
    assert loss.item() == 0 and (batch["logp"].grad == 0).all()


@pytest.mark.parametrize("algo", ALGOS)
@given(batch=batches())
def test_no_input_is_mutated_and_only_logp_gets_a_gradient(algo, batch):
    others = [name for name in batch if batch[name].is_floating_point()]
    for name in others:
        batch[name] = batch[name].detach().requires_grad_()
    before = {name: tensor.detach().clone() for name, tensor in batch.items()}
    loss, parts = loss_of(algo, batch)
    gradients = torch.autograd.grad(loss, [batch[name] for name in others], allow_unused=True)
    for name, gradient in zip(others, gradients):
        # Only the policy's log-probs are differentiated; advantages are constants in training, never parameters.
        assert name in ("logp", "advantages") or gradient is None
    assert all(torch.equal(batch[name].detach(), before[name]) for name in batch)
    assert not any(part.requires_grad for part in parts.values())


# ---- ratios, clips, KL


@pytest.mark.parametrize("algo", ALGOS)
@given(batch=batches(off_policy=False))
def test_at_the_old_policy_every_ratio_is_one_and_nothing_is_clipped(algo, batch):
    _, parts = loss_of(algo, batch)
    assert (parts["ratio"] == 1).all() and not parts["clip_low"].any() and not parts["clip_high"].any()


@given(batches(off_policy=False))
def test_at_the_old_policy_tepo_has_the_gradient_of_dapo_and_an_empty_kl_mask(batch):
    torch.testing.assert_close(gradient_of("tepo", batch), gradient_of("dapo", batch), rtol=1e-14, atol=1e-16)
    _, parts = loss_of("tepo", batch)
    assert not parts["kl_mask"].any() and (parts["kl"] == 0).all()


@pytest.mark.parametrize("algo", ["grpo", "dapo"])
@given(batch=batches())
def test_a_clipped_token_has_no_gradient_and_an_unclipped_one_has(algo, batch):
    options = {"beta": 0.0} if algo == "grpo" else {}
    _, parts = loss_of(algo, batch, **options)
    clipped = parts["clip_low"] | parts["clip_high"]
    gradient = gradient_of(algo, batch, **options)
    alive = batch["mask"] & (batch["advantages"] != 0).unsqueeze(1)
    assert (gradient[clipped] == 0).all() and (gradient[alive & ~clipped] != 0).all()


@given(batches())
def test_the_gradient_of_tepo_is_w_A_over_all_tokens_and_zero_for_a_clipped_completion(batch):
    """No further 1/|y_i|, which Algorithm 1 line 21 prints and the derivative of Eq. 4 does not have."""
    w = sequence_ratio(batch["logp"], batch["old_logp"], batch["mask"]).detach()
    A, mask = batch["advantages"], batch["mask"]
    clipped = ((w < 0.8) & (A < 0)) | ((w > 1.28) & (A > 0))
    expected = -(w * A * ~clipped).unsqueeze(1) * mask / mask.sum().clamp(min=1)
    torch.testing.assert_close(gradient_of("tepo", batch, beta=0.0), expected, rtol=1e-12, atol=1e-15)


@given(batches())
def test_sequence_ratio_is_the_geometric_mean_of_the_token_ratios(batch):
    w = sequence_ratio(batch["logp"], batch["old_logp"], batch["mask"])
    for i in range(len(w)):
        ratios = (batch["logp"] - batch["old_logp"])[i][batch["mask"][i]].exp()
        expected = ratios.prod() ** (1 / max(len(ratios), 1))
        torch.testing.assert_close(w[i], expected if len(ratios) else torch.ones_like(w[i]))


@pytest.mark.parametrize("algo", ALGOS)
@given(new=st.floats(-1e4, 0), old=st.floats(-1e4, 0), advantage=st.sampled_from([-1.0, 1.0]))
def test_extreme_ratios_stay_finite(algo, new, old, advantage):
    batch = {name: torch.full((2, 3), old) for name in ("old_logp", "ref_logp", "entropy", "old_entropy")}
    batch |= {"logp": torch.full((2, 3), new, requires_grad=True), "mask": torch.ones(2, 3).bool()}
    batch["advantages"] = torch.full((2,), advantage)
    loss, _ = loss_of(algo, batch)
    loss.backward()
    assert loss.isfinite() and batch["logp"].grad.isfinite().all()


@given(st.integers(2, 6), st.integers(0, 10**6))
def test_k3_is_never_negative_and_its_expectation_is_the_kl(V, seed):
    generator = torch.Generator().manual_seed(seed)
    logp, anchor = (torch.log_softmax(2 * torch.randn(V, generator=generator, dtype=torch.float64), 0) for _ in range(2))
    mask = torch.ones(1, V, dtype=torch.bool)
    values = k3(logp[None], anchor[None], mask)[0]  # the estimate for each token that could have been sampled
    kl = (logp.exp() * (logp - anchor)).sum()
    assert (values >= 0).all() and (k3(logp[None], logp[None], mask) == 0).all()
    torch.testing.assert_close((logp.exp() * values).sum(), kl, rtol=1e-9, atol=1e-12)


def test_k3_keeps_small_values_exact_in_fp32():
    d = 1e-4
    value = k3(torch.tensor([[-d]]), torch.tensor([[0.0]]), torch.ones(1, 1).bool()).item()
    assert value == pytest.approx(d * d / 2, rel=1e-2)


@given(batches())
def test_kl_masks_select_what_they_say(batch):
    A, change, mask = batch["advantages"].unsqueeze(1), batch["entropy"] - batch["old_entropy"], batch["mask"]
    masks = {which: kl_token_mask(batch["advantages"], change, mask, which) for which in KL_MASKS}
    assert torch.equal(masks["positive"], (A > 0) & (change < 0) & mask)
    assert torch.equal(masks["negative"], (A < 0) & (change > 0) & mask)
    assert torch.equal(masks["both"], masks["positive"] | masks["negative"])
    assert torch.equal(masks["all"], mask) and not masks["none"].any()
    with pytest.raises(ValueError, match="kl_mask"):
        kl_token_mask(batch["advantages"], change, mask, "some")


@given(batches())
def test_covariance_proxy_has_the_sign_of_minus_the_covariance_term(batch):
    change = covariance_entropy_change(batch["logp"], batch["advantages"], -1.0, 0.1)
    expected = -(batch["logp"] + 1.0) * (batch["advantages"].unsqueeze(1) - 0.1)
    torch.testing.assert_close(change, expected.detach())
    assert not change.requires_grad


# ---- DAPO's data rules


@given(st.integers(1, 60), st.integers(1, 60))
def test_overlong_punishment_is_continuous_and_monotone_and_meets_its_corners(limit, cache):
    assume(cache <= limit)
    lengths = torch.arange(0, limit + 10)
    punishment = soft_overlong_punishment(lengths, limit, cache)
    assert (punishment[: limit - cache + 1] == 0).all() and (punishment[limit:] == -1).all()
    steps = punishment[:-1] - punishment[1:]
    assert (steps >= -1e-6).all() and (steps <= 1 / cache + 1e-6).all()
    with pytest.raises(ValueError, match="overlong cache"):
        soft_overlong_punishment(lengths, limit, limit + 1)


@given(batches(), st.data())
def test_overlong_filter_drops_whole_rows_and_nothing_else(batch, data):
    B = len(batch["mask"])
    truncated = torch.tensor(data.draw(st.lists(st.booleans(), min_size=B, max_size=B)))
    filtered = overlong_filter(batch["mask"], truncated)
    assert not filtered[truncated].any() and torch.equal(filtered[~truncated], batch["mask"][~truncated])


@given(st.integers(2, 5), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_dynamic_sampling_returns_mixed_groups_only_and_stops_at_the_cap(G, wanted, cap, seed):
    generator = torch.Generator().manual_seed(seed)

    def sample_groups(count):
        scores = (torch.rand(count * G, generator=generator) < 0.8).float()
        return list(scores.view(count, G)), mixed_groups(scores, G)

    mixed, sampled, used = dynamic_sampling(sample_groups, wanted, cap)
    assert all(0 < group.sum() < G for group in mixed)
    assert len(sampled) == used * wanted and used <= cap
    assert len(mixed) == wanted or (used == cap and len(mixed) == sum(0 < group.sum() < G for group in sampled) < wanted)


def test_clipped_objective_is_pessimistic():
    ratio, advantages = torch.linspace(0.1, 2, 50).unsqueeze(0).repeat(2, 1), torch.tensor([1.0, -1.0])
    objective, low, high = clipped_objective(ratio, advantages, 0.2, 0.28)
    assert (objective <= ratio * advantages.unsqueeze(1) + 1e-6).all()
    assert not low[0].any() and not high[1].any() and low[1].any() and high[0].any()


@given(batches())
def test_entropy_changes_are_constants(batch):
    entropy = batch["entropy"].clone().requires_grad_()
    assert not exact_entropy_change(entropy, batch["old_entropy"]).requires_grad


def test_a_pull_without_a_reference_to_pull_to_is_an_error():
    logp = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="needs ref_logp"):
        grpo_loss(logp, logp, torch.ones(2), logp == 0, num_sequences=2, beta=0.1)
