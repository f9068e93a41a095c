"""Entropies, and the sign of their change, against float64: TEPO's KL mask is that sign."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tasks
from engine.models import load_model, load_tokenizer, resolve_model, stop_token_ids
from grpo import grpo_loss
from rollout import collate, entropy_of, sample, score

# exp(x) has the rounding error of its argument, |x| 2^-24. Where x < -87 the weight is no normal
# number of fp32, so a relative error of 87 / 2^24 = 5.2e-6 is what exp alone may make.
BOUND = 1e-5
SMALLEST = 1e-35  # an entropy below it underflows
VOCABULARIES = (2, 3, 40, 1000, 50_000)


def exact_entropy(logits):
    """The entropies of the rows in float64. Its own formula loses no digits either."""
    top, best = logits.double().max(dim=-1, keepdim=True)
    shifted = logits.double() - top
    weights = shifted.exp()
    rest = weights.scatter(1, best, 0.0).sum(dim=-1)
    terms = torch.where(weights > 0, shifted * weights, 0.0)
    return torch.log1p(rest) - terms.sum(dim=-1) / (1 + rest)


def agrees(logits):
    """Whether entropy_of is as close to float64 as it should be, also under autocast."""
    expected = exact_entropy(logits)
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        before = logits.clone()
        with context:
            found = entropy_of(logits)
        assert found.dtype == torch.float32
        assert torch.equal(logits, before)
        error = (found.double() - expected).abs()
        assert (error <= BOUND * expected + SMALLEST).all(), (error / expected).max()
    return True


def nearly_certain(q, vocabulary, offset):
    """A row of logits: all tokens but one share the probability q."""
    rest = math.log(q / (vocabulary - 1)) - math.log1p(-q)
    logits = torch.full((1, vocabulary), offset + rest)
    logits[0, vocabulary // 2] = offset
    return logits


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("scale", [0.1, 1, 5, 20, 200])
def test_peaked_and_flat(vocabulary, scale):
    generator = torch.Generator().manual_seed(0)
    rows = 8 if vocabulary > 1000 else 100
    for offset in (0, -1e3, 1e3):
        assert agrees(offset + scale * torch.randn(rows, vocabulary, generator=generator))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_nearly_certain(vocabulary):
    for k in range(1, 13):
        for offset in (0.0, 30.0, -1000.0):
            assert agrees(nearly_certain(10.0**-k, vocabulary, offset))


@given(st.integers(2, 50), st.floats(0.1, 5), st.integers(0, 2**31))
def test_the_exact_entropy(vocabulary, scale, seed):
    """Against -sum p log p, which is good enough in float64 where nothing is nearly certain."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(5, vocabulary, generator=generator)
    logp = torch.log_softmax(logits.double(), dim=-1)
    expected = -(logp.exp() * logp).sum(dim=-1)
    torch.testing.assert_close(exact_entropy(logits), expected, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_known_values(vocabulary):
    flat = torch.full((2, vocabulary), -7.5)
    assert entropy_of(flat).tolist() == pytest.approx([math.log(vocabulary)] * 2, rel=1e-6)
    certain = torch.full((2, vocabulary), -math.inf)
    certain[:, 1] = 3.0
    assert entropy_of(certain).tolist() == [0.0, 0.0]


@given(st.integers(2, 30), st.floats(0.1, 200), st.floats(0, 1), st.integers(0, 2**31))
def test_logits_of_minus_infinity(vocabulary, scale, share, seed):
    """They have no probability: the entropy is that of the others."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(5, vocabulary, generator=generator)
    gone = torch.rand(vocabulary, generator=generator) < share
    gone[0] = False
    masked = logits.masked_fill(gone, -math.inf)
    assert agrees(masked)
    expected = entropy_of(logits[:, ~gone])
    torch.testing.assert_close(entropy_of(masked), expected, rtol=1e-6, atol=1e-35)


@given(st.integers(2, 50), st.floats(0.1, 200), st.integers(0, 2**31))
def test_bounds_and_gradient(vocabulary, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(20, vocabulary, generator=generator)
    entropy = entropy_of(logits.requires_grad_())
    assert (entropy >= 0).all()
    assert (entropy <= math.log(vocabulary) * (1 + 1e-6)).all()
    assert not entropy.requires_grad


# ---- the sign of a change


def wrong_signs(before, after):
    """Two tensors of logits [n, V]. Returns how many dH were compared, and how many are wrong.

    Both entropies are right to BOUND, so the sign is certain where |dH| > BOUND (H + H').
    """
    old = exact_entropy(before)
    new = exact_entropy(after)
    large = (new - old).abs() > BOUND * (old + new) + 2 * SMALLEST
    found = (entropy_of(after) - entropy_of(before)).sign()
    return large.sum().item(), (found != (new - old).sign())[large].sum().item()


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_sign_of_a_small_change(vocabulary):
    generator = torch.Generator().manual_seed(0)
    rows = 4 if vocabulary > 1000 else 100
    compared = 0
    for scale in (0.1, 1, 5, 20):
        logits = scale * torch.randn(rows, vocabulary, generator=generator)
        for step in (1e-4, 1e-3, 1e-2, 1e-1):
            noise = step * torch.randn(logits.shape, generator=generator)
            count, wrong = wrong_signs(logits, logits + noise)
            assert wrong == 0, f"{wrong} of {count} at scale {scale} and step {step}"
            compared += count
    assert compared > 8 * rows


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_sign_where_nearly_certain(vocabulary):
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for k in range(1, 13):
        for offset in (0.0, 30.0):
            logits = nearly_certain(10.0**-k, vocabulary, offset).repeat(4, 1)
            for step in (1e-3, 1e-2):
                noise = step * torch.randn(logits.shape, generator=generator)
                count, wrong = wrong_signs(logits, logits + noise)
                assert wrong == 0, f"{wrong} of {count} at 1 - p = 1e-{k}, step {step}"
                compared += count
    assert compared > 100


# ---- through the model


@pytest.fixture(scope="module")
def tiny():
    """The embedded model, and completions of its sums."""
    name = resolve_model("tiny")
    model = load_model(name, "cpu")
    tokenizer = load_tokenizer(name)
    problems = tasks.load("arithmetic", "train").problems[:6]
    samples = sample(
        model,
        [tokenizer(problem["prompt"]).input_ids for problem in problems],
        8,
        max_completion_length=48,
        temperature=1.0,
        stop_ids=stop_token_ids(model, tokenizer),
        generator=torch.Generator().manual_seed(0),
    )
    return model, samples


@torch.no_grad()
def own_entropy(model, samples):
    """The entropies of all completion tokens, [n], from a float64 copy of the model."""
    model = copy.deepcopy(model).double()
    parts = []
    for s in samples:
        ids = torch.tensor([s.prompt_ids + s.completion_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(s.prompt_ids) - 1 : -1]
        parts.append(exact_entropy(logits))
    return torch.cat(parts)


def test_sign_after_an_update(tiny):
    """At the learning rate of a large model, where changes are small."""
    model, samples = tiny
    model = copy.deepcopy(model)
    batch = collate(samples, "cpu")
    mask = batch["mask"]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6)
    advantages = torch.randn(len(samples), generator=torch.Generator().manual_seed(0))

    old = own_entropy(model, samples)
    logp, entropy = score(model, batch, 1.0)
    loss, _ = grpo_loss(logp, logp.detach(), advantages, mask, num_sequences=len(samples))
    loss.backward()
    optimizer.step()
    new = own_entropy(model, samples)
    with torch.no_grad():
        _, entropy_now = score(model, batch, 1.0)

    change = new - old
    relative = change.abs() / torch.maximum(new, old)
    large = relative > 1e-4
    found = (entropy_now - entropy)[mask]
    assert large.sum() > 200
    assert (relative[large] < 1e-2).sum() > 200  # not only changes that nobody could get wrong
    assert old[large].min() < 1e-5  # some distributions are nearly certain
    assert 0.1 < (change < 0)[large].float().mean() < 0.9
    assert torch.equal(found.sign()[large].double(), change.sign()[large])


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_under_autocast(tiny, temperature):
    """The head gives bf16, and from there on everything is in fp32."""
    model, samples = tiny
    batch = collate(samples, "cpu")
    logits = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, out: logits.append(out))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, entropy = score(model, batch, temperature)
    handle.remove()
    assert logits[0].dtype == torch.bfloat16
    expected = exact_entropy(torch.cat([x.flatten(0, 1) for x in logits]).float() / temperature)
    found = entropy[batch["mask"]].double()
    torch.testing.assert_close(found, expected, rtol=BOUND, atol=SMALLEST)
