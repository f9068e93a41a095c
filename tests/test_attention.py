"""Attention in rows: against loops, against transformers' own attention, with prompts shared and rows moved."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attention
from attention import attend, keep_rows, prepare
from data import UserError
from rollout import LogProb, collate, score
from tests.conftest import VOCAB, build_model
from tests.test_rollout import ALL_FAMILIES, gradients, plain_logits, sample_with


def looped(query, key, value, sees, scaling, softcap):
    """softmax(q k^T) v for one query of one head at a time."""
    B, H, Q, d = query.shape
    out = torch.zeros(B, H, Q, value.shape[3], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(Q):
                kv = h // (H // key.shape[1])
                seen = [j for j in range(key.shape[2]) if (sees[b, t, j] if sees is not None else j <= t or Q == 1)]
                scores = torch.stack([query[b, h, t].double() @ key[b, kv, j].double() * scaling for j in seen])
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = torch.softmax(scores, dim=0)
                out[b, h, t] = sum(w * value[b, kv, j].double() for w, j in zip(weights, seen))
    return out


@settings(max_examples=60)
@given(data=st.data())
def test_attend_is_softmax_of_scores_times_values(data):
    draw = lambda *bounds: data.draw(st.integers(*bounds))  # noqa: E731
    B, K, groups, Q, d = draw(1, 3), draw(1, 3), draw(1, 3), draw(1, 4), data.draw(st.sampled_from([4, 16]))
    causal, softcap = data.draw(st.booleans()), data.draw(st.sampled_from([None, 1.5]))
    L = Q if causal and Q > 1 else draw(Q, 6)
    generator = torch.Generator().manual_seed(draw(0, 2**31))
    query, key, value = (torch.randn(B, h, n, d, generator=generator) for h, n in ((K * groups, Q), (K, L), (K, L)))
    sees = None
    if not causal:
        sees = torch.rand(B, Q, L, generator=generator) < 0.5
        sees[:, :, 0] = True
    found = attend(query, key, value, sees if sees is None else sees.unsqueeze(1), scaling=0.7, softcap=softcap)
    torch.testing.assert_close(found.double(), looped(query, key, value, sees, 0.7, softcap), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_prepared_model_computes_what_it_did_also_for_others(family):
    """Padded batches, caches and generate(), as lm-eval and any other user of the model calls it."""
    model = build_model(family)
    twin = copy.deepcopy(model)
    prepare(model.train())
    assert model.training and not prepare(model.eval()) and not model.training
    assert model.config._attn_implementation == attention.NAME != twin.config._attn_implementation
    twin.set_attn_implementation("eager")
    ids = torch.randint(1, VOCAB, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 11, [0] * 4 + [1] * 7, [0] * 9 + [1] * 2])
    options = dict(attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    with torch.no_grad():
        logits = [m(input_ids=ids, **options).logits[mask.bool()] for m in (model, twin)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        generated = [m.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0) for m in (model, twin)]
    assert generated[0].tolist() == generated[1].tolist()
    assert "rows" not in str(model.config.to_dict().values()), "a checkpoint must not ask others for this attention"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
def test_sharing_a_prompt_changes_neither_scores_nor_gradients(models, family):
    samples = sample_with(models(family), prompts=[list(range(3, 17)), [5, 9], [11]], G=4)
    shared, apart = (collate(samples, "cpu", share_prompts=share) for share in (True, False))
    assert apart["input_ids"].numel() - shared["input_ids"].numel() == 3 * (14 + 2 + 1)
    for a, b in zip(score(models(family), shared, 0.9), score(models(family), apart, 0.9)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    expected = gradients(models(family), apart)
    for name, gradient in gradients(models(family), shared).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_the_window_of_the_model_is_kept_when_scoring_and_when_decoding(models, family):
    """Rows four times as long as the window of six, and a token beyond it that would change everything if it were seen."""
    prompt, model = list(range(1, 20)), models(family)
    (s,) = sample_with(model, prompts=[prompt], G=1, T=6, stop_ids=[-1])
    expected = torch.log_softmax(plain_logits(model, prompt + s["completion_ids"])[len(prompt) - 1 : -1], dim=-1)
    expected = expected.gather(1, torch.tensor(s["completion_ids"]).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(s["logp"]), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(score(model, collate([s], "cpu"), 1.0)[0][0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_under_autocast_the_cache_is_of_half_size_and_sampler_and_scorer_agree(models, family, monkeypatch):
    """On the CPU what autocast does on a GPU: fp32 weights, bf16 products."""
    dtypes, cached = set(), attention.cached

    def watched(cache, *rest):
        dtypes.update(x.dtype for tensors in cache.values() for x in tensors)
        return cached(cache, *rest)

    monkeypatch.setattr(attention, "cached", watched)
    with torch.autocast("cpu", torch.bfloat16):
        samples = sample_with(models(family))
        batch = collate(samples, "cpu")
        logp, entropy = score(models(family), batch, 1.0)
    assert dtypes == {torch.bfloat16} and logp.dtype == torch.float32
    gap = (logp[batch["mask"]] - torch.tensor([x for s in samples for x in s["logp"]])).abs()
    assert gap.mean() < 0.05 and gap.max() > 0  # rounding, and there is some
    assert entropy.dtype == torch.float32


def test_under_autocast_statistics_of_the_logits_are_those_in_fp32():
    """An entropy that went through bf16 would be off by more than it changes in an update, and TEPO's mask is the sign of that change."""
    logits = 5 + 3 * torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(8)
    with torch.autocast("cpu", torch.bfloat16):
        found = LogProb.apply(logits, targets)
    for a, b in zip(found, LogProb.apply(logits, targets)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_no_mask_over_all_packed_tokens_is_ever_made(family):
    """It would be [N, N], and nothing looks at it."""
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    model, made = build_model(family), []
    prepare(model)
    AttentionMaskInterface.register(attention.NAME, lambda *arguments, **options: made.append(options) or sdpa_mask(*arguments, **options))
    try:
        samples = sample_with(model)
        score(model, collate(samples, "cpu"), 1.0)
        assert not made
        model(input_ids=torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([[0, 1, 1]]))
        assert made  # for others
    finally:
        AttentionMaskInterface.register(attention.NAME, sdpa_mask)


@pytest.mark.parametrize("family", ["gpt_oss", "bloom", "qwen2_moe"])  # sinks in the softmax; not through the interface; a window in the mask only
def test_attention_that_is_not_known_is_refused_by_name(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {
        "gpt_oss": dict(hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                        num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"], initializer_range=0.3),
        "bloom": dict(hidden_size=32, n_layer=1, n_head=2, initializer_range=0.3),
        "qwen2_moe": dict(hidden_size=32, intermediate_size=16, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_hidden_layers=1,
                          num_attention_heads=2, num_key_value_heads=1, num_experts=2, num_experts_per_tok=1, sliding_window=9,
                          use_sliding_window=True, layer_types=["sliding_attention"], initializer_range=0.3),
    }[family]  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=VOCAB, pad_token_id=0, eos_token_id=0, **small)).eval()
    for _ in range(2):  # a model that was refused is not prepared
        with pytest.raises(UserError, match=family):
            score(model, collate([{"prompt_ids": [1, 2], "completion_ids": [3, 4]}], "cpu"), 1.0)


@given(data=st.data())
def test_rows_that_are_kept_come_first_and_no_other_row_is_moved(data):
    count = data.draw(st.integers(1, 12))
    kept = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True))
    cache = {layer: tuple(torch.arange(count).view(-1, 1, 1, 1) + 100 * part + 1000 * layer for part in (0, 1)) for layer in (0, 1)}
    before = {layer: [x.clone() for x in tensors] for layer, tensors in cache.items()}
    order = keep_rows(cache, torch.tensor(kept), count)
    assert sorted(order.tolist()) == sorted(kept)
    assert [row for row in kept if row < len(kept)] == [row for row in kept if row < len(kept) and order[row] == row]
    for layer, tensors in cache.items():
        for x, old in zip(tensors, before[layer]):
            assert torch.equal(x[: len(kept)], old[order]) and torch.equal(x[len(kept) :], old[len(kept) :])
