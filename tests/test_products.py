"""Matrix products by oneDNN: nothing but the time may change."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import products
from products import OneDNNLinear, multiply, packed_weights, use_fastest_product
from rollout import collate, score
from tests.conftest import build_model
from tests.test_rollout import gradients, sample_with

there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
needs_onednn = pytest.mark.skipif(not there, reason="this build of torch has no oneDNN")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of four rows and no layer too small, so that models of a test's size go through all of it."""
    monkeypatch.setattr(products, "ROWS", 4)
    monkeypatch.setattr(products, "WORTHWHILE", 0)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: (True, True))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_onednn
@settings(max_examples=60, deadline=None)
@given(st.integers(4, 70), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_products_in_blocks_are_products(rows, inputs, outputs, bias, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "ROWS", 4)
        generator = torch.Generator().manual_seed(seed)
        x, weight = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
        b = torch.randn(outputs, generator=generator) if bias else None
        call, shapes = products.onednn, set()
        patch.setattr(products, "onednn", lambda x, *rest: (shapes.add(tuple(x.shape)), call(x, *rest))[1])
        exact = x.double() @ weight.double().t() + (b.double() if bias else 0)
        close(multiply(x, weight, b).double(), exact)
        close(multiply(x, weight.t().contiguous().t(), b).double(), exact)  # as the backward pass hands it over
        assert shapes == {(4, inputs)}  # one kernel compiled, whatever the number of rows


@needs_onednn
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_gradients_of_a_product_are_those_of_a_linear_layer(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "ROWS", 4)
        batch, length = data.draw(st.integers(1, 5)), data.draw(st.integers(4, 11))
        wants = data.draw(st.lists(st.booleans(), min_size=2, max_size=2).filter(any))
        torch.manual_seed(data.draw(st.integers(0, 2**31)))
        plain = torch.nn.Linear(data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)), bias=data.draw(st.booleans()))
        plain.requires_grad_(wants[0])
        fast = copy.deepcopy(plain)
        fast.__class__ = OneDNNLinear
        x = torch.randn(batch, length, plain.in_features)
        weights = torch.randn(batch, length, plain.out_features)
        inputs = [x.clone().requires_grad_(wants[1]) for _ in range(2)]
        outputs = [layer(own) for layer, own in zip((plain, fast), inputs)]
        close(outputs[1], outputs[0])
        for out in outputs:
            (out * weights).sum().backward()
        for a, b in [(inputs[0], inputs[1]), *zip(plain.parameters(), fast.parameters())]:
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None:
                close(b.grad, a.grad)


@needs_onednn
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("rows", [4, 64])  # sampling has twelve rows: in blocks, and by packed weights
def test_a_model_samples_scores_and_learns_the_same_with_either_product(family, rows, small_blocks, monkeypatch):
    monkeypatch.setattr(products, "ROWS", rows)
    plain = build_model(family, attention_dropout=0.0)
    for name, p in plain.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    fast = copy.deepcopy(plain)
    assert use_fastest_product(fast) and any(isinstance(module, OneDNNLinear) for module in fast.modules())
    samples = sample_with(plain)
    assert [s["completion_ids"] for s in sample_with(fast)] == [s["completion_ids"] for s in samples]
    batch, call, shapes = collate(samples, "cpu"), products.onednn, set()
    monkeypatch.setattr(products, "onednn", lambda x, *rest: (shapes.add(tuple(x.shape)), call(x, *rest))[1])
    for a, b in zip(score(plain, batch, 0.9), score(fast, batch, 0.9)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert shapes and {shape[0] for shape in shapes} == {rows}
    expected = gradients(plain, batch)
    for name, gradient in gradients(fast, batch).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3)
    assert len({shape for shape in shapes if shape[1] == rows}) > 1, "gradients of weights are products of blocks too"
    fast.train()
    fast.activation_checkpointing_enable()
    for name, gradient in gradients(fast, batch).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3)


@needs_onednn
def test_packed_weights_multiply_the_same_and_are_gone_afterwards(small_blocks):
    model = build_model("qwen2")
    use_fastest_product(model)
    layer = next(module for module in model.modules() if isinstance(module, OneDNNLinear) and module.bias is not None)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(3, 1, layer.in_features)
    with torch.no_grad():
        plain = layer(x)
        with packed_weights(model, rows=3):
            assert layer.packed is not None and torch.equal(layer.weight, copy.deepcopy(layer.weight))
            close(layer(x), plain)
    with pytest.raises(KeyboardInterrupt), packed_weights(model, rows=3):
        raise KeyboardInterrupt
    assert layer.packed is None  # a stale copy would sample from the policy before the update
    with torch.no_grad():
        layer.weight.mul_(2)
        with packed_weights(model, rows=3):
            close(layer(x), plain * 2 - layer.bias)


@needs_onednn
def test_sampling_after_an_update_samples_from_the_updated_weights(small_blocks, monkeypatch):
    model = build_model("llama")
    monkeypatch.setattr(products, "ROWS", 64)  # more than the rows of the batch, which are then multiplied by packed weights
    use_fastest_product(model)
    before = sample_with(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)
    after = sample_with(model)
    assert [s["completion_ids"] for s in after] != [s["completion_ids"] for s in before]
    assert [s["completion_ids"] for s in after] == [s["completion_ids"] for s in sample_with(copy.deepcopy(model))]


@needs_onednn
@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("few", [True, False])
def test_only_products_that_were_measured_to_gain_go_to_onednn(many, few, small_blocks, monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: (many, few))
    model, calls, call = torch.nn.Sequential(torch.nn.Linear(8, 8)), [], products.onednn
    monkeypatch.setattr(products, "onednn", lambda x, *rest: (calls.append(len(x)), call(x, *rest))[1])
    assert use_fastest_product(model) == (many or few)
    with torch.no_grad(), packed_weights(model, rows=1):
        model(torch.randn(1, 8))
        assert len(calls) == few
        model(torch.randn(4, 8))  # a block
        assert len(calls) == few + many


def test_layers_that_gain_nothing_are_left_alone(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: (True, True))
    wide = 2 * int(products.WORTHWHILE**0.5)
    half = torch.nn.Linear(wide, wide).to(torch.bfloat16)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), half, torch.nn.Linear(wide, wide))
    use_fastest_product(model)
    assert [type(module) for module in model] == [torch.nn.Linear, torch.nn.Linear, OneDNNLinear]
    monkeypatch.setattr(products, "onednn_is_faster", lambda: (False, False))
    model = torch.nn.Sequential(torch.nn.Linear(wide, wide))
    assert not use_fastest_product(model) and type(model[0]) is torch.nn.Linear
