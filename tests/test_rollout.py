"""The sampler and the scorer: same distribution, exact masks, no effect of packing, batching, caching or chunking."""

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import rollout
from rollout import batch_size, collate, draw, micro_batches, sample, score
from tests.conftest import VOCAB, build_model

FAMILIES = ("llama", "qwen3", "gpt2")
ALL_FAMILIES = (*FAMILIES, "qwen2", "mistral", "gpt_neox", "phi3", "gemma2")
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [0, 8, 0]]  # of uneven length; one holds the end token


def sample_with(model, seed=0, prompts=PROMPTS, G=3, T=10, temperature=1.0, stop_ids=(0, 1)):
    generator = torch.Generator().manual_seed(seed)
    return sample(
        model, prompts, G, max_completion_length=T, temperature=temperature, stop_ids=list(stop_ids), generator=generator
    )


def plain_logits(model, ids):
    """[len, V] logits of one row alone, through the model's own forward and its own attention: no cache, no packing, no chunks."""
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    model.set_attn_implementation(ours)
    return logits


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_sampler_and_scorer_agree_before_any_update(models, family, temperature):
    samples = sample_with(models(family), temperature=temperature)
    batch = collate(samples, device="cpu")
    logp, entropy = score(models(family), batch, temperature)
    for row, s in enumerate(samples):
        n = len(s["completion_ids"])
        torch.testing.assert_close(logp[row, :n], torch.tensor(s["logp"]), rtol=1e-4, atol=1e-4)
    assert not logp[~batch["mask"]].any() and not entropy[~batch["mask"]].any() and not entropy.requires_grad


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_scores_equal_the_full_softmax_of_each_row_alone(models, family):
    samples = sample_with(models(family), seed=1)
    batch = collate(samples, device="cpu")
    logp, entropy = score(models(family), batch, temperature=0.7)
    for row, s in enumerate(samples):
        ids, p, n = s["prompt_ids"] + s["completion_ids"], len(s["prompt_ids"]), len(s["completion_ids"])
        distribution = torch.log_softmax(plain_logits(models(family), ids)[p - 1 : -1].double() / 0.7, dim=-1)  # [n, V]
        torch.testing.assert_close(logp[row, :n].double(), distribution[range(n), s["completion_ids"]], rtol=1e-4, atol=1e-4)
        expected = -(distribution.exp() * distribution).sum(-1)
        torch.testing.assert_close(entropy[row, :n].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_batched_sampling_equals_each_row_alone_without_a_cache(models, family, monkeypatch):
    """Packed prompts, the cache, its growth and the dropping of finished rows change nothing of what a row draws."""
    monkeypatch.setattr(rollout, "FIRST_COLUMNS", 2)
    model, T, G, temperature, stops = models(family), 10, 3, 0.8, range(6)
    samples = sample_with(model, T=T, G=G, temperature=temperature, stop_ids=stops)
    uniforms = torch.rand(len(PROMPTS) * G, T, generator=torch.Generator().manual_seed(0)).T
    for row, s in enumerate(samples):
        ids, truncated = list(PROMPTS[row // G]), True
        for t in range(T):
            token, _ = draw(plain_logits(model, ids)[-1:], uniforms[t, row : row + 1], temperature)
            ids.append(token.item())
            if token in stops:
                truncated = False
                break
        assert s["prompt_ids"] == PROMPTS[row // G]
        assert s["completion_ids"] == ids[len(s["prompt_ids"]) :] and s["truncated"] == truncated
    lengths = {len(s["completion_ids"]) for s in samples}
    assert len(lengths) > 2, "the rows must end at different times, or nothing was tested"


def test_every_completion_ends_at_its_first_stop_token(models):
    samples = sample_with(models("llama"), G=8)
    assert any(s["truncated"] for s in samples) and not all(s["truncated"] for s in samples)
    for s in samples:
        stops = [i for i, token in enumerate(s["completion_ids"]) if token in (0, 1)]
        assert stops == ([] if s["truncated"] else [len(s["completion_ids"]) - 1])
        assert len(s["completion_ids"]) == 10 or not s["truncated"]


def test_a_prompt_is_prefilled_once_whatever_the_group(models, monkeypatch):
    model, shapes = models("llama"), []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    G = 15
    samples = sample_with(model, G=G, stop_ids=range(12))
    handle.remove()
    assert shapes[0] == (1, sum(map(len, PROMPTS)))  # each prompt once, without padding
    assert all(width == 1 for _, width in shapes[1:])
    going = [sum(len(s["completion_ids"]) > t for s in samples) for t in range(1, len(shapes))]
    assert [rows for rows, _ in shapes[1:]] == [min(G * len(PROMPTS), batch_size(n)) for n in going]  # rows leave when they have ended
    assert min(going) < max(going) / 2


def test_the_cache_grows_with_the_completions_and_lets_go_of_ended_rows(models, monkeypatch):
    monkeypatch.setattr(rollout, "FIRST_COLUMNS", 4)
    cached, shapes, L, T = rollout.attention.cached, [], max(map(len, PROMPTS)), 30
    monkeypatch.setattr(rollout.attention, "cached", lambda cache, *rest: shapes.append(cache[0][0].shape) or cached(cache, *rest))
    samples = sample_with(models("llama"), G=16, T=T)
    assert max(len(s["completion_ids"]) for s in samples) == T
    columns, rows = [shape[2] for shape in shapes], [shape[0] for shape in shapes]
    assert columns[0] == L + 4 and columns[-1] == L + T and columns == sorted(columns) and len(set(columns)) > 4
    assert rows[0] == 64 and rows[-1] <= 32 and rows == sorted(rows, reverse=True)


@given(st.integers(1, 2000))
def test_a_batch_has_room_for_all_unfinished_rows_and_few_more_in_few_sizes(going):
    assert going <= batch_size(going) <= max(going + 7, 1.25 * going)
    assert len({batch_size(n) for n in range(1, going + 1)}) <= 4 * going.bit_length()


def test_the_sampled_histogram_is_plain_softmax_whatever_the_generation_config_says():
    model = build_model("llama", initializer_range=0.15)
    for name, value in dict(do_sample=True, top_k=5, top_p=0.5, temperature=0.1, repetition_penalty=3.0).items():
        setattr(model.generation_config, name, value)
    count, temperature = 20_000, 1.3
    samples = sample_with(model, prompts=[[5, 6, 7]], G=count, T=1, temperature=temperature)
    histogram = torch.bincount(torch.tensor([s["completion_ids"][0] for s in samples]), minlength=VOCAB) / count
    expected = torch.softmax(plain_logits(model, [5, 6, 7])[-1] / temperature, dim=-1)
    assert (histogram > 0).sum() > 15  # far more than the five of top_k
    sigma = (expected * (1 - expected) / count).sqrt()
    assert ((histogram - expected).abs() < 5 * sigma + 1e-4).all()


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=20), st.floats(0, 1, exclude_max=True, width=32), st.floats(0.3, 3))
def test_draw_inverts_the_distribution_function(logits, uniform, temperature):
    row = torch.tensor([logits])
    token, logp = draw(row, torch.tensor([uniform]), temperature)
    p = torch.softmax(row[0].double() / temperature, dim=-1)
    below = p[: token.item()].sum().item()
    assert below - 1e-5 <= uniform <= below + p[token.item()].item() + 1e-5
    assert logp.item() == pytest.approx(p[token.item()].log().item(), abs=1e-4)


def test_draw_never_takes_a_token_of_probability_zero_and_temperature_zero_takes_the_best():
    logits = torch.tensor([[float("-inf"), 1.0, float("-inf"), 2.0, float("-inf")]]).repeat(1001, 1)
    token, _ = draw(logits, torch.linspace(0, 1 - 2**-24, 1001), 1.0)
    assert set(token.tolist()) == {1, 3}
    assert set(draw(logits, torch.rand(1001), 0)[0].tolist()) == {3}


def gradients(model, batch, temperature=0.9):
    model.zero_grad()
    logp, _ = score(model, batch, temperature)
    (logp * torch.linspace(-1, 1, logp.shape[1])).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(2, 30), st.floats(0.1, 20), st.sampled_from([0.0, -1e4, 1e4]), st.integers(0, 2**31))
def test_log_probs_entropies_and_gradients_are_those_of_log_softmax(rows, vocabulary, scale, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (offset + scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)).requires_grad_()
    targets, weights = torch.randint(vocabulary, (rows,), generator=generator), torch.randn(rows, generator=generator, dtype=torch.float64)
    logp, entropy = rollout.LogProb.apply(logits, targets)
    (gradient,) = torch.autograd.grad((logp * weights).sum(), logits)
    distribution = torch.log_softmax(logits, dim=-1)
    expected = distribution[range(rows), targets]
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(entropy, -(distribution.exp() * distribution).sum(-1), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * weights).sum(), logits)[0])
    assert not entropy.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_of_the_lm_head_change_neither_scores_nor_gradients(models, family, monkeypatch):
    model, batch = models(family), collate(sample_with(models(family)), "cpu")
    whole, whole_gradients = score(model, batch, 0.9), gradients(model, batch)
    monkeypatch.setattr(rollout, "ROWS", 3)
    monkeypatch.setattr(rollout, "LOGITS_AT_ONCE", 3 * VOCAB)  # three tokens a chunk
    chunked, chunked_gradients = score(model, batch, 0.9), gradients(model, batch)
    for a, b in zip(whole, chunked):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    for name in whole_gradients:
        torch.testing.assert_close(chunked_gradients[name], whole_gradients[name], rtol=1e-4, atol=1e-4)


def test_the_lm_head_sees_completion_positions_only_and_at_most_a_chunk(models, monkeypatch):
    model, samples = models("llama"), sample_with(models("llama"))
    batch, seen = collate(samples, "cpu"), []
    monkeypatch.setattr(rollout, "ROWS", 7)
    monkeypatch.setattr(rollout, "LOGITS_AT_ONCE", 20 * VOCAB)  # two blocks of rows
    handle = model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(out.shape[:-1].numel()))
    with torch.no_grad():
        score(model, batch, 1.0)
    handle.remove()
    assert max(seen) == 14 and sum(seen) == sum(len(s["completion_ids"]) for s in samples)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10)
@given(data=st.data())
def test_row_order_a_longer_row_and_sharing_prompts_change_nothing(models, family, data):
    model, samples = models(family), sample_with(models(family), seed=2)
    reference, _ = score(model, collate(samples, "cpu"), 1.0)
    order = data.draw(st.permutations(range(len(samples))))
    longer = {"prompt_ids": [3] * data.draw(st.integers(1, 12)), "completion_ids": [4] * data.draw(st.integers(1, 15))}
    batch = collate([samples[i] for i in order] + [longer], "cpu", share_prompts=data.draw(st.booleans()))
    logp, _ = score(model, batch, 1.0)
    for new, old in enumerate(order):
        n = len(samples[old]["completion_ids"])
        torch.testing.assert_close(logp[new, :n], reference[old, :n], rtol=1e-4, atol=1e-4)
        assert not logp[new, n:].any()


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20)
@given(data=st.data())
def test_changing_a_token_changes_its_own_log_prob_and_none_before_it(models, family, data):
    prompt, completion = [5, 6, 7], data.draw(st.lists(st.integers(1, VOCAB - 1), min_size=2, max_size=8))
    t = data.draw(st.integers(0, len(completion) - 1))
    changed = completion[:t] + [(completion[t] + 1) % VOCAB] + completion[t + 1 :]
    rows = [{"prompt_ids": prompt, "completion_ids": c} for c in (completion, changed)]
    logp, entropy = score(models(family), collate(rows, "cpu"), 1.0)
    torch.testing.assert_close(logp[0, :t], logp[1, :t], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy[0, : t + 1], entropy[1, : t + 1], rtol=0, atol=1e-5)  # a token does not predict itself
    assert logp[0, t] != logp[1, t]


def test_the_example_of_collate_is_what_it_returns():
    samples = [{"prompt_ids": [10, 11], "completion_ids": c} for c in ([20, 21, 22], [30, 31])]
    batch = {name: value[0] if name == "rows" else value for name, value in collate(samples, "cpu").items()}
    numbers = lambda text: [int(x) for x in text.replace(".", "0").split()]  # noqa: E731
    lines = {name: numbers(text) for name, text in re.findall(r"^ +(\w+) +((?:[\d.]+ +)+)\[", collate.__doc__, re.M)}
    assert set(lines) == set(batch)
    lines["rows"], lines["mask"] = lines["rows"] + [0, 1, 2, 3], lines["mask"] + [1, 1, 0]
    assert lines == {name: value.int().flatten().tolist() for name, value in batch.items()}


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8))
def test_the_mask_counts_completion_tokens_even_when_they_equal_the_padding(lengths):
    samples = [{"prompt_ids": [0] * p, "completion_ids": [0] * n} for p, n in lengths]  # everything is the pad token
    batch = collate(samples, device="cpu")
    assert batch["mask"].sum(1).tolist() == [n for _, n in lengths] and len(batch["predicts"]) == len(batch["targets"]) == batch["mask"].sum()
    assert (batch["mask"].int().diff(dim=1) <= 0).all()  # from the first token on
    positions = batch["position_ids"][0, batch["predicts"]].split([n for _, n in lengths])
    assert [part.tolist() for part in positions] == [list(range(p - 1, p + n - 1)) for p, n in lengths]


groups = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4)), min_size=1, max_size=5)


@given(groups, st.booleans())
def test_packed_tokens_are_the_samples_with_each_prompt_once_and_no_padding(groups, share):
    """groups: the length of a prompt, and those of its completions."""
    number = iter(range(10**6))
    fresh = lambda n: [next(number) for _ in range(n)]  # noqa: E731, no two tokens are the same
    samples = [{"prompt_ids": prompt, "completion_ids": fresh(n)} for p, lengths in groups for prompt in [fresh(p)] for n in lengths]
    batch = collate(samples, "cpu", share_prompts=share)
    ids = batch["input_ids"][0]
    prompts = sum(p * (1 if share else len(lengths)) for p, lengths in groups)
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, prompts + sum(n - 1 for _, lengths in groups for n in lengths))
    targets = batch["targets"].split([len(s["completion_ids"]) for s in samples])
    assert [part.tolist() for part in targets] == [s["completion_ids"] for s in samples]
    whole = [s["prompt_ids"] + s["completion_ids"] for s in samples]
    for s, part in zip(samples, ids[batch["predicts"]].split([len(s["completion_ids"]) for s in samples])):
        assert part.tolist() == (s["prompt_ids"] + s["completion_ids"])[len(s["prompt_ids"]) - 1 : -1]  # each predicts the next
    rows = [row.tolist() for part in batch["rows"] for row in ids[part]]
    for tokens in whole:
        assert any(row[: len(tokens) - 1] == tokens[:-1] for row in rows)
    assert len(rows) == len(samples)
    placed = torch.cat([part.flatten() for part in batch["rows"]])[batch["back"]]
    assert placed.tolist() == list(range(len(ids)))  # every token finds its own output
    lengths = sorted(len(tokens) - 1 for tokens in whole)
    for part in batch["rows"]:
        own, lengths = lengths[: len(part)], lengths[len(part) :]
        assert own[-1] == part.shape[1] <= rollout.SPREAD * own[0]
    for row, (tokens, s) in enumerate(zip(whole, samples)):
        own = ids[batch["row"] == row].tolist()
        assert own in (tokens[:-1], s["completion_ids"][:-1]) and (share or own == tokens[:-1])


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=30), st.integers(1, 200))
@example([(1, 2), (2, 1), (1, 2)], 6)  # just full, and
@example([(1, 2), (2, 1), (1, 2)], 5)  # one token too many
def test_micro_batches_hold_every_sample_once_and_stay_within_the_budget(lengths, budget):
    samples = [{"prompt_ids": [1] * p, "completion_ids": [1] * n, "index": i} for i, (p, n) in enumerate(lengths)]
    packed = micro_batches(samples, budget)
    assert [s["index"] for part in packed for s in part] == list(range(len(samples)))  # the samples of a prompt stay neighbours
    sizes = [[len(s["prompt_ids"]) + len(s["completion_ids"]) for s in part] for part in packed]
    for part, following in zip(sizes, [*sizes[1:], None]):
        assert len(part) == 1 or sum(part) <= budget
        assert following is None or sum(part) + following[0] > budget  # as full as can be


def test_sampling_in_parts_draws_the_same_completions(models):
    generator = torch.Generator().manual_seed(0)
    options = dict(max_completion_length=10, temperature=1.0, stop_ids=[0, 1], generator=generator)
    parts = [s for prompt in PROMPTS for s in sample(models("llama"), [prompt], 3, **options)]
    assert [s["completion_ids"] for s in parts] == [s["completion_ids"] for s in sample_with(models("llama"))]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mistral", "gemma2"])
def test_decoding_over_a_cache_of_fixed_size_draws_the_same_completions(family, monkeypatch):
    """The compiled path, traced in full but run without generated code, over two rollouts: the cache is used again."""
    compile, model = torch.compile, build_model(family)
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", lambda step, mode, **options: compile(step, backend="eager", **options))
    graphs = rollout.compiled(rows=20, length=max(map(len, PROMPTS)) + 10)  # room for more rows than there are
    options = dict(max_completion_length=10, temperature=1.0, stop_ids=list(range(8)))
    for seed in (0, 1):
        plain, static = (
            sample(model, PROMPTS, 4, generator=torch.Generator().manual_seed(seed), graphs=graphs if fixed else None, **options)
            for fixed in (False, True)
        )
        assert [s["completion_ids"] for s in static] == [s["completion_ids"] for s in plain]
        for a, b in zip(plain, static):
            assert b["logp"] == pytest.approx(a["logp"], abs=1e-4)
        assert len({len(s["completion_ids"]) for s in plain}) > 4, "rows must end at different times, or no cache was moved"
