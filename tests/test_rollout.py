"""The sampler and the scorer: exact masks, one distribution, whatever is packed with what."""

import functools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rollout
from engine import models as engine_models
from engine.errors import UserError
from rollout import (
    Sample,
    attention_mask,
    check_model,
    collate,
    decoder_of,
    draw,
    micro_batches,
    sample,
    score,
    split_evenly,
)
from tests.conftest import VOCAB, build_model

# In these a row may hold several completions. Granite, cohere: something scales the logits.
PACKED = (
    "llama",
    "qwen2",
    "qwen3",
    "gpt2",
    "gpt_neox",
    "phi3",
    "granite",
    "cohere",
    "phimoe",
    "opt",
)
# In these it may not. Mistral, gemma: windows of 6; bloom, falcon: positions from the mask alone.
APART = ("mistral", "gemma2", "gemma3_text", "bloom", "falcon")
SOME = ("llama", "gpt2", "qwen3")
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [0, 8, 0]]  # one holds the end token
all_families = pytest.mark.parametrize("family", PACKED + APART)
some_families = pytest.mark.parametrize("family", SOME)


def sample_with(model, seed=0, prompts=PROMPTS, G=3, T=10, temperature=1.0, stop_ids=(0, 1)):
    return sample(
        model,
        prompts,
        G,
        max_completion_length=T,
        temperature=temperature,
        stop_ids=list(stop_ids),
        generator=torch.Generator().manual_seed(seed),
    )


def collated(family, samples):
    """The samples, packed where the family may be."""
    return collate(samples, "cpu", share_prompts=family in PACKED)


@torch.no_grad()
def plain_logits(model, ids):
    """[len, V] of one row alone, by the model's own forward pass: no cache, no mask, eager."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    model.set_attn_implementation(implementation)
    return logits


def gradients(model, batch, temperature=0.9):
    """The gradients of a weighted sum of all log-probs."""
    model.zero_grad()
    logp, _ = score(model, batch, temperature)
    weights = torch.linspace(-1, 1, logp.numel()).view(logp.shape)
    (logp * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(found, expected, atol=1e-4):
    """Two dicts of gradients, or two tuples of tensors."""
    assert len(found) == len(expected)
    for key in found if isinstance(found, dict) else range(len(found)):
        scale = max(1.0, expected[key].abs().max().item())
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=atol * scale)


def calls_of(module, function):
    """The shapes that the module returned while the function ran."""
    shapes = []
    handle = module.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    function()
    handle.remove()
    return shapes


# ---- sampler and scorer against the model's own logits


@all_families
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_sampler_and_scorer_agree(models, family, temperature):
    model = models(family)
    samples = sample_with(model, temperature=temperature)
    batch = collated(family, samples)
    with torch.no_grad():
        logp, entropy = score(model, batch, temperature)
    sampled = torch.tensor([x for s in samples for x in s.logp])
    torch.testing.assert_close(logp[batch["mask"]], sampled, rtol=1e-4, atol=1e-4)
    assert not logp[~batch["mask"]].any()
    assert not entropy[~batch["mask"]].any()


@all_families
def test_scores_equal_the_softmax_of_each_row_alone(models, family):
    model = models(family)
    samples = sample_with(model, seed=1)
    logp, entropy = score(model, collated(family, samples), temperature=0.7)
    assert logp.requires_grad
    assert not entropy.requires_grad
    for row, s in enumerate(samples):
        n = len(s.completion_ids)
        logits = plain_logits(model, s.prompt_ids + s.completion_ids)[-n - 1 : -1]
        expected = torch.log_softmax(logits.double() / 0.7, dim=-1)  # [n, V]
        found = logp[row, :n].double()
        own = expected[range(n), s.completion_ids]
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
        own = -(expected.exp() * expected).sum(-1)
        torch.testing.assert_close(entropy[row, :n].double(), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family, field", [("granite", "logits_scaling"), ("cohere", "logit_scale")]
)
def test_a_scale_behind_the_head_counts(models, family, field):
    """Or the two tests above would say nothing of it."""
    model = models(family)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        hidden = decoder_of(model)(input_ids=ids).last_hidden_state
        unscaled = model.get_output_embeddings()(hidden)
        logits = model(input_ids=ids).logits
    assert getattr(model.config, field) != 1
    assert (logits - unscaled).abs().max() > 0.1


def test_a_soft_cap_counts(models):
    model = models("gemma2")
    logits = plain_logits(model, list(range(1, 20)))
    assert model.config.final_logit_softcapping == 5
    assert 4 < logits.abs().max() <= 5


@all_families
def test_batched_sampling_equals_each_row_alone(models, family):
    """Left padding, the cache, its repetition and the dropping of ended rows change nothing."""
    model = models(family)
    T, G, temperature = 10, 3, 0.8
    stops = range(6)
    samples = sample_with(model, T=T, G=G, temperature=temperature, stop_ids=stops)
    uniforms = torch.rand(len(PROMPTS) * G, T, generator=torch.Generator().manual_seed(0))
    for row, s in enumerate(samples):
        ids = list(PROMPTS[row // G])
        truncated = True
        for t in range(T):
            last = plain_logits(model, ids)[-1:]
            token, _ = draw(last, uniforms[row, t : t + 1], temperature)
            ids.append(token.item())
            if token in stops:
                truncated = False
                break
        assert s.prompt_ids + s.completion_ids == ids
        assert s.prompt_ids == PROMPTS[row // G]
        assert s.truncated == truncated
    lengths = {len(s.completion_ids) for s in samples}
    assert len(lengths) > 2, "the rows must end at different times, or nothing was tested"


def test_sampling_in_parts_draws_the_same(models):
    generator = torch.Generator().manual_seed(0)
    options = dict(max_completion_length=10, temperature=1.0, stop_ids=[0, 1], generator=generator)
    parts = [s for prompt in PROMPTS for s in sample(models("llama"), [prompt], 3, **options)]
    whole = sample_with(models("llama"))
    assert [s.completion_ids for s in parts] == [s.completion_ids for s in whole]


def test_greedy(models):
    model = models("llama")
    for s in sample_with(model, temperature=0, G=1):
        n = len(s.completion_ids)
        logits = plain_logits(model, s.prompt_ids + s.completion_ids)[-n - 1 : -1]
        assert s.completion_ids == logits.argmax(-1).tolist()


def test_eager_attention():
    """It takes an additive mask, the others one of True and False."""
    model = build_model("llama")
    samples = sample_with(model)
    for share in (True, False):
        batch = collate(samples, "cpu", share_prompts=share)
        with torch.no_grad():
            model.set_attn_implementation("sdpa")
            expected = score(model, batch, 1.0)
            model.set_attn_implementation("eager")
            close(score(model, batch, 1.0), expected, atol=1e-5)


def test_a_wrapped_model(models):
    """As peft wraps one."""
    model = models("llama")
    wrapped = SimpleNamespace(get_base_model=lambda: model)
    samples = sample_with(wrapped)
    assert samples == sample_with(model)
    batch = collate(samples, "cpu")
    assert torch.equal(score(wrapped, batch, 1.0)[0], score(model, batch, 1.0)[0])


# ---- sampling


def test_ends_at_the_first_stop_token(models):
    samples = sample_with(models("llama"), G=8)
    assert len({s.truncated for s in samples}) == 2
    for s in samples:
        stops = [i for i, token in enumerate(s.completion_ids) if token in (0, 1)]
        assert stops == ([] if s.truncated else [len(s.completion_ids) - 1])
        assert len(s.completion_ids) == 10 or not s.truncated
        assert len(s.logp) == len(s.completion_ids)


def test_stop_at_the_limit_is_no_truncation(models):
    samples = sample_with(models("llama"), T=1, G=30, stop_ids=range(20))
    assert len({s.truncated for s in samples}) == 2
    assert all(s.truncated == (s.completion_ids[0] >= 20) for s in samples)


@pytest.mark.parametrize("G", [1, 5, 15])
def test_prompts_are_prefilled_once(models, G):
    model = models("llama")
    shapes = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    samples = []
    heads = calls_of(
        model.get_output_embeddings(),
        lambda: samples.extend(sample_with(model, G=G, stop_ids=range(12))),
    )
    handle.remove()
    lengths = [len(s.completion_ids) for s in samples]
    going = [(sum(n > t for n in lengths), 1) for t in range(1, max(lengths))]
    assert shapes == [(len(PROMPTS), max(map(len, PROMPTS))), *going]
    # The head sees the last token of each row only.
    assert [tuple(shape[:-1]) for shape in heads] == [(len(PROMPTS), 1), *going]


def test_histogram_is_plain_softmax():
    """Whatever the generation_config says."""
    model = build_model("llama", initializer_range=0.15)
    wishes = dict(do_sample=True, top_k=5, top_p=0.5, temperature=0.1, repetition_penalty=3.0)
    for name, value in wishes.items():
        setattr(model.generation_config, name, value)
    count, temperature = 20_000, 1.3
    samples = sample_with(model, prompts=[[5, 6, 7]], G=count, T=1, temperature=temperature)
    tokens = torch.tensor([s.completion_ids[0] for s in samples])
    histogram = torch.bincount(tokens, minlength=VOCAB) / count
    expected = torch.softmax(plain_logits(model, [5, 6, 7])[-1] / temperature, dim=-1)
    assert (histogram > 0).sum() > 15  # far more than the five of top_k
    sigma = (expected * (1 - expected) / count).sqrt()
    assert ((histogram - expected).abs() < 5 * sigma + 1e-4).all()


BORDERS = st.sampled_from([0.0, 2**-24, 0.5, 1 - 2**-24])


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=20),
    uniform=BORDERS | st.floats(0, 1, exclude_max=True, width=32),
    temperature=st.just(1.0) | st.floats(0.3, 3),
)
def test_draw_inverts_the_cdf(logits, uniform, temperature):
    row = torch.tensor([logits])
    token, logp = draw(row, torch.tensor([uniform]), temperature)
    p = torch.softmax(row[0].double() / temperature, dim=-1)
    below = p[: token.item()].sum().item()
    assert below - 1e-5 <= uniform <= below + p[token.item()].item() + 1e-5
    assert logp.item() == pytest.approx(p[token.item()].log().item(), abs=1e-4)


def test_draw_at_the_borders():
    """Both ends of [0, 1), and tokens of probability zero at both ends of the vocabulary."""
    inf = float("inf")
    logits = torch.tensor([[-inf, 1.0, -inf, 2.0, -inf]]).repeat(1001, 1)
    uniforms = torch.linspace(0, 1 - 2**-24, 1001)
    token, logp = draw(logits, uniforms, 1.0)
    assert token[0] == 1
    assert token[-1] == 3
    assert set(token.tolist()) == {1, 3}
    assert logp.isfinite().all()
    # The least likely token of fp32, at the front: a uniform of 0 must not take it.
    logits = torch.tensor([[-80.0, 0.0]])
    assert draw(logits, torch.tensor([0.0]), 1.0)[0].item() == 1
    # A token has the half-open interval from the sum before it to its own.
    token, _ = draw(torch.zeros(5, 4), torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2**-24]), 1.0)
    assert token.tolist() == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("vocabulary", [2, 1000, 50_000])
def test_draw_stays_in_the_vocabulary(vocabulary):
    """Rounding leaves the sum of the probabilities below or above 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, vocabulary, generator=generator)
    logits[:, -1] = -float("inf")
    token, _ = draw(logits, torch.full((20,), 1 - 2**-24), 1.0)
    assert (token < vocabulary - 1).all()


@pytest.mark.parametrize("vocabulary", [3, 100, 32_000])
@pytest.mark.parametrize("temperature", [0, 0.5, 1.0, 2.0])
def test_draw_never_takes_what_cannot_be(vocabulary, temperature):
    """At both ends of [0, 1), with tokens of probability 0 at both ends of the vocabulary."""
    logits = torch.randn(400, vocabulary, generator=torch.Generator().manual_seed(1))
    logits[:, 0] = logits[:, -1] = -float("inf")
    uniforms = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24]).repeat(100)
    token, logp = draw(logits, uniforms, temperature)
    assert token.min() >= 1
    assert token.max() <= vocabulary - 2
    assert logp.isfinite().all()
    # And a row that is certain draws its token, whatever the number.
    certain = torch.full((4, vocabulary), -float("inf"))
    for place in (0, vocabulary - 1):
        certain.fill_(-float("inf"))[:, place] = 0.0
        token, logp = draw(certain, uniforms[:4], temperature)
        assert (token == place).all()
        assert not logp.any()


def test_draw_greedy():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    token, logp = draw(logits, torch.rand(50), 0)
    assert torch.equal(token, logits.argmax(-1))
    expected = torch.log_softmax(logits, dim=-1).max(-1).values
    torch.testing.assert_close(logp, expected)  # of the model, not 0


def test_sampling_is_in_eval_mode(tmp_path):
    """Also from a model in train mode, with activations recomputed."""
    saved = build_model("gpt2")
    saved.save_pretrained(tmp_path)
    model = engine_models.load_model(str(tmp_path), "cpu")
    expected = sample_with(saved)
    for prepare in (engine_models.recompute_activations, torch.nn.Module.train):
        prepare(model)
        assert sample_with(model) == expected
        assert not any(module.training for module in model.modules())


def test_dropout_has_no_part_in_draws_or_scores(tmp_path):
    """Of a model that another loop has left in train mode; check_model ends that."""
    model = build_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    samples = sample_with(model)
    batch = collate(samples, "cpu")
    with torch.no_grad():
        expected, _ = score(model, batch, 1.0)
        model.train()
        assert not torch.equal(score(model, batch, 1.0)[0], expected), "there is no dropout"
        assert check_model(model, 20) is True
        assert not model.training
        assert torch.equal(score(model, batch, 1.0)[0], expected)
    model.train()
    assert sample_with(model) == samples
    assert not any(module.training for module in model.modules())


# ---- collate and its mask


@st.composite
def sample_lists(draw, most=5):
    """Samples whose tokens are all different, in groups of one prompt."""
    number = iter(range(10**6))

    def fresh(n):
        return [next(number) for _ in range(n)]

    samples = []
    for _ in range(draw(st.integers(1, 4))):
        prompt = fresh(draw(st.integers(1, 9)))
        lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=most))
        samples += [Sample(list(prompt), fresh(n)) for n in lengths]
    return samples


def visible(batch, row, column):
    """The columns that a token sees, by a loop over the numbers of the row."""
    numbers = batch["completion_number"][row].tolist()
    return [c for c in range(column + 1) if numbers[c] in (0, numbers[column])]


@settings(max_examples=100)
@given(sample_lists(), st.booleans(), st.sampled_from([1, 20, 30, 1024]))
def test_collate_by_reading_it(samples, share, row_tokens):
    """Each prediction sees its prompt and its completion so far, at positions 0, 1, 2, ..."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "ROW_TOKENS", row_tokens)
        batch = collate(samples, "cpu", share_prompts=share)
    R, N = batch["input_ids"].shape
    assert batch["position_ids"].shape == batch["completion_number"].shape == (R, N)
    predicts = iter(zip(batch["predicts"].tolist(), batch["targets"].tolist(), strict=True))
    read = set()
    for s in samples:
        for i, token in enumerate(s.completion_ids):
            place, target = next(predicts)
            row, column = divmod(place, N)
            seen = visible(batch, row, column)
            assert target == token
            assert batch["input_ids"][row, seen].tolist() == s.prompt_ids + s.completion_ids[:i]
            assert batch["position_ids"][row, seen].tolist() == list(range(len(seen)))
            read |= {(row, c) for c in seen}
    assert next(predicts, None) is None
    # Nothing is computed that no prediction reads: the rest is padding at the right.
    real = (batch["completion_number"] >= 0).nonzero().tolist()
    assert {tuple(place) for place in real} == read
    lengths = (batch["completion_number"] >= 0).sum(1)
    assert torch.equal(batch["completion_number"] >= 0, torch.arange(N) < lengths.unsqueeze(1))
    assert lengths.max() == N
    assert (batch["completion_number"][lengths.unsqueeze(1) <= torch.arange(N)] == -1).all()
    # The rows are no longer than they may be, and a new one begins only where it must.
    longest = max(len(s.prompt_ids) + len(s.completion_ids) for s in samples)
    limit = max(row_tokens, longest)
    assert lengths.max() <= limit
    if not share:
        assert len(samples) == R
        assert batch["completion_number"].max() <= 1
    elif row_tokens == 1024:
        assert len({tuple(s.prompt_ids) for s in samples}) == R


@given(sample_lists(), st.integers(1, 60))
def test_rows_are_as_full_as_can_be(samples, row_tokens):
    """By an own count of what each row holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "ROW_TOKENS", row_tokens)
        batch = collate(samples, "cpu")
    lengths = []
    prompt = None
    whole = 0
    for s in samples:
        if s.prompt_ids != prompt or whole + len(s.completion_ids) > row_tokens:
            prompt = s.prompt_ids
            whole = len(prompt)
            lengths.append(len(prompt))
        whole += len(s.completion_ids)
        lengths[-1] += len(s.completion_ids) - 1  # the last token predicts nothing
    assert (batch["completion_number"] >= 0).sum(1).tolist() == lengths


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8))
def test_mask_counts_tokens_that_equal_the_padding(lengths):
    samples = [Sample([0] * p, [0] * n) for p, n in lengths]  # everything is the pad token
    batch = collate(samples, "cpu")
    assert batch["mask"].dtype == torch.bool
    assert batch["mask"].tolist() == [
        [t < n for t in range(max(n for _, n in lengths))] for _, n in lengths
    ]
    assert len(batch["predicts"]) == len(batch["targets"]) == batch["mask"].sum()


@given(sample_lists(), st.booleans(), st.sampled_from([torch.bool, torch.float32]))
def test_attention_mask_by_a_loop(samples, share, dtype):
    batch = collate(samples, "cpu", share_prompts=share)
    R, N = batch["input_ids"].shape
    mask = attention_mask(batch["completion_number"], dtype)
    if batch["completion_number"].max() <= 1:
        # The ordinary mask: the model adds that nothing sees what comes after it.
        assert torch.equal(mask, (batch["completion_number"] >= 0).long())
        return
    assert mask.shape == (R, 1, N, N)
    assert mask.dtype == dtype
    for row in range(R):
        for column in range(N):
            seen = mask[row, 0, column]
            if dtype != torch.bool:
                assert set(seen.tolist()) <= {0.0, torch.finfo(dtype).min}
                seen = seen == 0
            if batch["completion_number"][row, column] >= 0:
                assert seen.nonzero().flatten().tolist() == visible(batch, row, column)
            assert seen.any()  # a row that sees nothing is NaN


@pytest.mark.parametrize("more, rows", [(0, 1), (1, 2)])
def test_a_row_is_filled_up_to_its_limit(monkeypatch, more, rows):
    """A prompt of 4 tokens and completions of 3 and of 5: 12 in all."""
    monkeypatch.setattr(rollout, "ROW_TOKENS", 12)
    samples = [Sample([1, 2, 3, 4], [5] * 3), Sample([1, 2, 3, 4], [6] * (5 + more))]
    assert len(collate(samples, "cpu")["input_ids"]) == rows


# ---- scoring: what must not matter


@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_equal_separate_rows(models, family):
    model = models(family)
    samples = sample_with(model, prompts=[list(range(3, 17)), [5, 9], [11]], G=4)
    packed = collate(samples, "cpu")
    apart = collate(samples, "cpu", share_prompts=False)
    assert len(packed["input_ids"]) == 3
    assert len(apart["input_ids"]) == 12
    close(score(model, packed, 0.9), score(model, apart, 0.9))
    close(gradients(model, packed), gradients(model, apart))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_packed_rows_may_be_longer_than_the_window(family):
    """Where no sample is: the window is one of positions, not of columns."""
    model = build_model(family, sliding_window=20)
    samples = sample_with(model, G=8)
    packed = collate(samples, "cpu")
    assert packed["input_ids"].shape[1] > 40
    assert packed["position_ids"].max() < 20
    apart = collate(samples, "cpu", share_prompts=False)
    close(score(model, packed, 0.9), score(model, apart, 0.9))


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_the_window_is_kept(models, family):
    """Rows four times as long as the window of 6, alone and beside a short one."""
    model = models(family)
    samples = sample_with(model, prompts=[list(range(1, 20)), [7]], G=2, T=6, stop_ids=[])
    logp, _ = score(model, collate(samples, "cpu", share_prompts=False), 1.0)
    for row, s in enumerate(samples):
        logits = plain_logits(model, s.prompt_ids + s.completion_ids)[-7:-1]
        expected = torch.log_softmax(logits, dim=-1)[range(6), s.completion_ids]
        torch.testing.assert_close(torch.tensor(s.logp), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logp[row], expected, rtol=1e-4, atol=1e-4)
    if family == "mistral":  # there is a window; every other layer of gemma2 has none
        first = plain_logits(model, [2, 3, *range(8, 28)])[-1]
        second = plain_logits(model, [30, 31, *range(8, 28)])[-1]
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


PACKINGS = [(family, True) for family in PACKED] + [(family, False) for family in PACKED + APART]


@pytest.mark.parametrize("family, share", PACKINGS)
def test_padding_may_hold_anything(models, family, share):
    model = models(family)
    samples = sample_with(model, prompts=[list(range(3, 17)), [5, 9]])
    batch = collate(samples, "cpu", share_prompts=share)
    padding = batch["completion_number"] == -1
    assert padding.any()
    dirty = {**batch}
    for name in ("input_ids", "position_ids"):
        dirty[name] = batch[name].masked_fill(padding, 33)
    with torch.no_grad():
        found = score(model, dirty, 1.0)
        expected = score(model, batch, 1.0)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@some_families
@settings(max_examples=8)
@given(data=st.data())
def test_row_order_and_company(models, family, data):
    """Other samples in the batch, longer ones too, and sharing prompts change nothing."""
    model = models(family)
    samples = sample_with(model, seed=2)
    order = data.draw(st.permutations(range(len(samples))))
    prompt = [3] * data.draw(st.integers(1, 12))
    longer = Sample(prompt, [4] * data.draw(st.integers(1, 15)))
    share = data.draw(st.booleans())
    batch = collate([samples[i] for i in order] + [longer], "cpu", share_prompts=share)
    with torch.no_grad():
        reference, _ = score(model, collate(samples, "cpu"), 1.0)
        logp, _ = score(model, batch, 1.0)
    for new, old in enumerate(order):
        n = len(samples[old].completion_ids)
        torch.testing.assert_close(logp[new, :n], reference[old, :n], rtol=1e-4, atol=1e-4)
        assert not logp[new, n:].any()


@some_families
@settings(max_examples=15)
@given(data=st.data())
def test_causality(models, family, data):
    """Changing a token changes its own log-prob, and nothing before it."""
    completion = data.draw(st.lists(st.integers(1, VOCAB - 1), min_size=2, max_size=8))
    t = data.draw(st.integers(0, len(completion) - 1))
    changed = list(completion)
    changed[t] = (changed[t] + 1) % VOCAB
    batch = collate([Sample([5, 6, 7], completion), Sample([5, 6, 7], changed)], "cpu")
    with torch.no_grad():
        logp, entropy = score(models(family), batch, 1.0)
    torch.testing.assert_close(logp[0, :t], logp[1, :t], rtol=0, atol=1e-5)
    own = entropy[:, : t + 1]  # a token does not predict itself
    torch.testing.assert_close(own[0], own[1], rtol=0, atol=1e-5)
    assert logp[0, t] != logp[1, t]


@pytest.mark.parametrize("family", [*SOME, "gemma2", "granite"])
def test_chunks_change_nothing(models, family, monkeypatch):
    model = models(family)
    batch = collated(family, sample_with(model, G=10))
    assert len(batch["predicts"]) > 3 * 64
    whole = score(model, batch, 0.9)
    whole_gradients = gradients(model, batch)
    monkeypatch.setattr(rollout, "LOGITS_AT_ONCE", 1)
    close(score(model, batch, 0.9), whole, atol=1e-5)
    close(gradients(model, batch), whole_gradients)


@pytest.mark.parametrize("at_once, chunk", [(1, 64), (70 * VOCAB, 70), (2**22, 10**6)])
def test_head_sees_completion_positions_only(models, monkeypatch, at_once, chunk):
    """At most a chunk at a time, and the decoder does its work once."""
    model = models("llama")
    samples = sample_with(model, G=10)
    batch = collate(samples, "cpu")
    n = sum(len(s.completion_ids) for s in samples)
    monkeypatch.setattr(rollout, "LOGITS_AT_ONCE", at_once)
    head = model.get_output_embeddings()
    with torch.no_grad():
        seen = calls_of(head, lambda: score(model, batch, 1.0))
        layers = calls_of(model.model.layers[0].mlp, lambda: score(model, batch, 1.0))
    sizes = [shape[:-1].numel() for shape in seen]
    assert sizes == [min(chunk, n - start) for start in range(0, n, chunk)]
    assert len(layers) == 1
    # With a gradient the backward pass computes each chunk anew, and no layer.
    forward = calls_of(model.model.layers[0].mlp, lambda: gradients(model, batch))
    assert len(forward) == 1
    seen = calls_of(head, lambda: gradients(model, batch))
    assert len(seen) == len(sizes) * (2 if n > chunk else 1)
    assert "forward" not in vars(decoder_of(model))


def test_autocast(models):
    """fp32 weights and bf16 products, as on a GPU: rounding, and no more."""
    for family in ("llama", "gemma2"):
        model = models(family)
        with torch.autocast("cpu", torch.bfloat16):
            samples = sample_with(model)
            batch = collated(family, samples)
            logp, entropy = score(model, batch, 1.0)
        assert logp.dtype == entropy.dtype == torch.float32
        gap = logp[batch["mask"]] - torch.tensor([x for s in samples for x in s.logp])
        assert gap.abs().mean() < 0.05
        assert gap.abs().max() > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phimoe"])
def test_recomputed_activations_change_nothing(family, tmp_path):
    """Opt and gpt2 come with dropout, phimoe with the noise of its routers."""
    build_model(family).save_pretrained(tmp_path)
    model = engine_models.load_model(str(tmp_path), "cpu")
    batch = collate(sample_with(model), "cpu")
    with torch.no_grad():
        before, _ = score(model, batch, 1.0)
    expected = gradients(model, batch)
    runs = []
    layer = model.get_decoder().get_submodule("h.0" if family == "gpt2" else "layers.0")
    attention = next(m for name, m in layer.named_modules() if name.endswith("attn"))
    handle = attention.register_forward_hook(lambda module, args, out: runs.append(module))

    engine_models.recompute_activations(model)
    first, _ = score(model, batch, 1.0)
    second, _ = score(model, batch, 1.0)
    assert torch.equal(first, before)
    assert torch.equal(second, before)
    del runs[:]
    close(gradients(model, batch), expected, atol=1e-6)
    assert len(runs) == 2  # forward, and once more for the backward pass
    handle.remove()


# ---- cutting samples into batches


LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=15)


@given(LENGTHS, st.integers(1, 200), st.booleans())
def test_micro_batches(lengths, budget, share):
    samples = [Sample([1] * p, [1] * n, reward=i) for i, (p, n) in enumerate(lengths)]
    parts = micro_batches(samples, budget, share_prompts=share)
    order = [s.reward for part in parts for s in part]
    assert sorted(order) == list(range(len(samples)))
    longest = 0
    for part in parts:
        rows, columns = collate(part, "cpu", share)["input_ids"].shape
        assert rows == 1 or rows * columns <= budget  # padding counts
        assert columns >= longest  # rows of like length are together
        longest = columns - 1  # a row's last token is no input


def test_micro_batches_are_as_full_as_can_be():
    samples = [Sample([1, i], [1] * n) for i, n in enumerate((4, 4, 4, 8))]
    assert [len(part) for part in micro_batches(samples, 18)] == [3, 1]
    assert [len(part) for part in micro_batches(samples, 17)] == [2, 1, 1]
    group = [Sample([1], [1, 2, 3]) for _ in range(4)]
    assert [len(part) for part in micro_batches(group, 5)] == [4]  # one row, though it is too long
    assert [len(part) for part in micro_batches(group, 8, share_prompts=False)] == [2, 2]


@given(st.lists(st.integers()), st.integers(1, 40))
def test_split_evenly(items, parts):
    found = split_evenly(items, parts)
    assert [item for part in found for item in part] == items
    assert len(found) == (parts if items else 0)
    sizes = [len(part) for part in found]
    assert not sizes or max(sizes) - min(sizes) <= 1


# ---- the check before a run


@pytest.mark.parametrize("family", PACKED)
def test_check_model_allows_packing(models, family):
    assert check_model(models(family), 100) is True


@pytest.mark.parametrize("family", APART)
def test_check_model_forbids_packing(models, family):
    assert check_model(models(family), 100) is False


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "phimoe", "qwen2"])
def test_check_model_knows_windows(family):
    options = {}
    if family == "qwen2":
        options = dict(use_sliding_window=True, max_window_layers=0)
    window = rollout.ROW_TOKENS  # a row may be so long
    model = build_model(family, sliding_window=window, **options)
    assert check_model(model, 64) is True
    assert check_model(model, window) is True
    assert check_model(build_model(family, sliding_window=window - 1, **options), 64) is False
    long = build_model(family, sliding_window=window, max_position_embeddings=2048, **options)
    assert check_model(long, window + 100) is False  # looks beyond the window


def changed(model, change):
    """The model with another forward pass: change(output, arguments) -> output."""
    forward = model.forward

    @functools.wraps(forward)
    def other(*args, **kwargs):
        return change(forward(*args, **kwargs), kwargs)

    model.forward = other
    return model


def scales_with_a_cache(out, kwargs):
    if kwargs.get("use_cache"):
        out.logits = out.logits * 0.83
    return out


def scales_without_a_cache(out, kwargs):
    if not kwargs.get("use_cache"):
        out.logits = out.logits * 0.83
    return out


def depends_on_the_position(out, kwargs):
    """The sampler says where a token stands. Behind the head only a column is left."""
    columns = out.logits.shape[1]
    positions = kwargs.get("position_ids", torch.arange(columns).unsqueeze(0))
    out.logits = out.logits * (1 + 0.1 * positions[:, -columns:].unsqueeze(2))
    return out


def is_not_a_number(out, kwargs):
    out.logits = out.logits * float("nan")
    return out


def raises(out, kwargs):
    raise RuntimeError("no such kernel\nand more")


CHANGES = [
    scales_with_a_cache,
    scales_without_a_cache,
    depends_on_the_position,
    is_not_a_number,
    raises,
]


@pytest.mark.parametrize("change", CHANGES)
def test_check_model_refuses(change):
    model = changed(build_model("llama"), change)
    with pytest.raises(UserError, match="llama") as caught:
        check_model(model, 20)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("without_a_cache", [True, False])
def test_check_model_refuses_a_small_difference(without_a_cache):
    """In fp32: logits that are off by two parts in a hundred, in the sampler or in the scorer."""

    def slightly(out, kwargs):
        if bool(kwargs.get("use_cache")) != without_a_cache:
            out.logits = out.logits * 0.98
        return out

    with pytest.raises(UserError, match="llama"):
        check_model(changed(build_model("llama", initializer_range=0.1), slightly), 20)


def test_check_model_refuses_scores_that_are_no_numbers(monkeypatch):
    """Also where the sampler's are right."""

    def no_numbers(model, batch, temperature):
        return torch.full(batch["mask"].shape, float("nan")), None

    monkeypatch.setattr(rollout, "score", no_numbers)
    with pytest.raises(UserError, match="llama"):
        check_model(build_model("llama"), 20)


def test_check_model_refuses_a_blind_cache():
    """A decoder that forgets its mask: wrong on the padded prompts only."""
    model = build_model("llama")
    forward = model.forward

    @functools.wraps(forward)
    def other(*args, attention_mask=None, **kwargs):
        return forward(*args, **kwargs)

    model.forward = other
    with pytest.raises(UserError, match="llama"):
        check_model(model, 20)


def test_check_model_refuses_other_architectures():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mamba", vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    with pytest.raises(UserError, match="mamba"):
        check_model(AutoModelForCausalLM.from_config(config), 20)


def test_check_model_leaves_no_trace(models):
    model = models("llama")
    model.zero_grad()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.get_rng_state()
    check_model(model, 100)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite"])
def test_check_model_takes_bf16(family):
    model = build_model(family).to(torch.bfloat16)
    assert check_model(model, 100) is True
