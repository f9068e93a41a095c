"""engine/heads.py: whose parameters are whose, what a mask lets move, what a gate does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import heads as heads_module
from engine.errors import UserError
from engine.heads import find_heads, scaled_heads, trained_masks, update_of, weights_of
from tests.conftest import VOCAB, build_model

FAMILIES = list(heads_module.FAMILIES)
PROJECTIONS = ("_proj.", "query_key_value", "c_attn", "attn.c_proj", "attention.dense")
IDS = torch.randint(1, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))


def build_like_llama(family, **changes):
    """A small model of a family that tests/conftest.py does not know."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**options, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def awkward(family):
    """A model as real checkpoints may be: biases that are not zero, heads wider than usual."""
    if family == "llama":
        model = build_model(family, attention_bias=True)
    elif family == "mistral":
        model = build_model(family, head_dim=12)
    elif family == "gemma3_text":
        model = build_like_llama(family, head_dim=12, sliding_window=6)
    elif family == "smollm3":
        model = build_like_llama(family, attention_bias=True)
    else:
        model = build_model(family)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.3)
    return model


MODELS = {}


def model_of(family):
    """The awkward model of a family, built once. Only for tests that leave it as it was."""
    if family not in MODELS:
        MODELS[family] = awkward(family)
    return MODELS[family]


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


# ---- slices


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroed_columns_are_zeroed_input(family):
    model = model_of(family)
    heads = find_heads(model)
    start = weights_of(model)
    base = logits_of(model)
    assert heads.shape == (2, 4) and [head.place for head in heads.all] == [
        (layer, index) for layer in range(2) for index in range(4)
    ]
    parameters = dict(model.named_parameters())
    for head in heads.all:
        gates = torch.ones(heads.shape)
        gates[head.place] = 0
        with scaled_heads(heads, gates):
            masked = logits_of(model)
        with torch.no_grad():
            parameters[head.output.name][head.output.index] = 0
        assert (logits_of(model) - masked).abs().max() < 1e-4 < (masked - base).abs().max()
        with torch.no_grad():
            parameters[head.output.name].copy_(start[head.output.name])
    assert torch.equal(logits_of(model), base)


def heads_that_change(model, heads, seen, layer, part):
    """The heads whose output in `layer` changes when a slice does. seen: filled by hooks."""
    parameter = dict(model.named_parameters())[part.name]
    saved = parameter.detach().clone()
    logits_of(model)
    before = seen[layer]
    noise = torch.randn(parameter[part.index].shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        parameter[part.index] += noise
    logits_of(model)
    with torch.no_grad():
        parameter.copy_(saved)
    changed = (seen[layer] != before).unflatten(-1, (heads.num_heads, -1))  # [B, N, H, d]
    return set(changed.any(dim=-1).flatten(0, 1).any(dim=0).nonzero().flatten().tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slice_moves_its_head_or_group(family):
    model = awkward(family)
    heads = find_heads(model)
    seen = {}
    for layer, projection in enumerate(heads.outputs):

        def keep(module, inputs, layer=layer):
            seen[layer] = inputs[0].detach().clone()

        projection.register_forward_pre_hook(keep)
    for head in heads.all:
        for part in head.query:
            assert heads_that_change(model, heads, seen, head.layer, part) == {head.index}
        group = {h.index for h in heads.all if h.layer == head.layer and h.group == head.group}
        assert head.index in group and len(group) == heads.group_size
        for part in head.kv:
            assert heads_that_change(model, heads, seen, head.layer, part) == group


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_are_a_partition(family):
    model = model_of(family)
    heads = find_heads(model)
    assert heads.group_size == (1 if family in ("gpt2", "gpt_neox") else 2)
    times = {name: torch.zeros(p.shape, dtype=torch.int) for name, p in model.named_parameters()}
    for head in heads.all:
        first_of_group = head.index % heads.group_size == 0
        for part in head.own + (head.kv if first_of_group else []):
            times[part.name][part.index] += 1
    for name, count in times.items():
        in_projection = any(word in name for word in PROJECTIONS) and "mlp" not in name
        output_bias = name.endswith(("dense.bias", "c_proj.bias", "o_proj.bias"))
        assert (count == (in_projection and not output_bias)).all(), name


def test_unknown_family():
    with pytest.raises(UserError, match="'opt'.*llama"):
        find_heads(build_model("opt"))


# ---- gates


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_leave_no_trace(family):
    model = model_of(family)
    heads = find_heads(model)
    base = logits_of(model)
    with scaled_heads(heads, torch.ones(heads.shape)):
        assert torch.equal(logits_of(model), base)
    with pytest.raises(ZeroDivisionError), scaled_heads(heads, torch.zeros(heads.shape)):
        raise ZeroDivisionError
    assert torch.equal(logits_of(model), base)
    assert not any(module._forward_pre_hooks for module in model.modules())


@settings(max_examples=20)
@given(st.sampled_from(FAMILIES), st.integers(0, 999))
def test_every_row_has_its_own_gates(family, seed):
    model = model_of(family)
    heads = find_heads(model)
    gates = torch.rand(3, *heads.shape, generator=torch.Generator().manual_seed(seed))
    with scaled_heads(heads, gates):
        together = logits_of(model)
    for row in range(3):
        with scaled_heads(heads, gates[row]):
            alone = logits_of(model, IDS[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-3, atol=1e-3)


# ---- masks


@st.composite
def plans(draw):
    """(family, skipped heads, trainable, train_kv)."""
    family = draw(st.sampled_from(FAMILIES))
    skipped = draw(st.sets(st.tuples(st.integers(0, 1), st.integers(0, 3))))
    return family, skipped, draw(st.sampled_from(["heads", "all", "mlp"])), draw(st.booleans())


@given(plans())
def test_masks_follow_the_rule(plan):
    family, skipped, trainable, train_kv = plan
    model = model_of(family)
    heads = find_heads(model)
    masks = trained_masks(model, heads, skipped, trainable, train_kv)
    whole = {  # what a parameter of no head does
        name: trainable == "all" or (trainable == "mlp" and ".mlp." in name)
        for name, _ in model.named_parameters()
    }
    expected = {name: torch.full(p.shape, whole[name]) for name, p in model.named_parameters()}
    for head in heads.all:
        group = [h for h in heads.all if (h.layer, h.group) == (head.layer, head.group)]
        moves = trainable != "mlp" and head.place not in skipped
        kv_moves = (trainable == "all" or (trainable == "heads" and train_kv)) and not any(
            h.place in skipped for h in group
        )
        for part in head.own:
            expected[part.name][part.index] = moves
        for part in head.kv:
            expected[part.name][part.index] = kv_moves
    assert set(masks) == {name for name, mask in expected.items() if mask.any()}
    assert all(torch.equal(masks[name], expected[name]) for name in masks)


@pytest.mark.parametrize("place", ["a skipped head", "another matrix", "minus zero"])
def test_update_sees_one_frozen_element(place):
    model = awkward("llama")
    heads = find_heads(model)
    parameters = dict(model.named_parameters())
    masks = trained_masks(model, heads, {(1, 2)})
    frozen = parameters["model.layers.0.mlp.up_proj.weight"]
    with torch.no_grad():
        frozen[3, 4] = 0.0
        start = weights_of(model)
        assert update_of(model, start, masks).norm == 0
        assert update_of(model, start, masks).frozen_identical
        if place == "a skipped head":
            part = next(head for head in heads.all if head.place == (1, 2)).output
            parameters[part.name][part.index][5, 0] += 1e-6
        else:
            frozen[3, 4] = -0.0 if place == "minus zero" else 1e-6
    assert not update_of(model, start, masks).frozen_identical
