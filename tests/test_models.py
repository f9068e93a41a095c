"""engine/models.py: nothing that disturbs training or sampling comes along with a model."""

import os
from types import SimpleNamespace

import pytest
import torch

from engine.errors import UserError
from engine.models import (
    add_adapters,
    check_positions,
    has_adapters,
    head_dim,
    load_model,
    load_tokenizer,
    memory_estimate,
    pick_device,
    positions_of,
    recompute_activations,
    resolve_model,
    set_threads,
    stop_token_ids,
)
from experiments.shapes import build_tokenizer
from tests.conftest import ROOT, VOCAB, build_model

IDS = torch.randint(1, VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))


def test_weights_are_fp32(tmp_path):
    build_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), "cpu").dtype == torch.float32
    assert load_model(str(tmp_path), "cpu", torch.bfloat16).dtype == torch.bfloat16
    assert all(p.requires_grad for p in load_model(str(tmp_path), "cpu").parameters())


def test_recomputing_leaves_the_model_in_eval_mode():
    model = build_model("phimoe")
    assert recompute_activations(model) == 2
    assert not any(module.training for module in model.modules())


# ---- stop tokens, positions


def test_stop_tokens():
    model = build_model("llama")
    tokenizer = load_tokenizer(resolve_model("tiny"))
    model.generation_config.eos_token_id = [7, 3]
    assert stop_token_ids(model, tokenizer) == [0, 3, 7]
    model.generation_config.eos_token_id = 5
    assert stop_token_ids(model, tokenizer) == [0, 5]
    model.generation_config.eos_token_id = None
    assert stop_token_ids(model, tokenizer) == [0]


def test_stop_tokens_of_a_chat_template():
    """A base model whose eos is not what ends a turn."""
    model = build_model("llama")
    chat = build_tokenizer()
    plain = build_tokenizer(chat_template=None)
    eos = chat.eos_token_id
    end = chat.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = None
    assert stop_token_ids(model, chat) == sorted({eos, end})
    assert stop_token_ids(model, plain) == [plain.eos_token_id]
    model.generation_config.eos_token_id = [7]
    assert stop_token_ids(model, chat) == sorted({7, eos, end})
    assert model.generation_config.eos_token_id == [7]  # it is saved with the model


def longrope():
    rope = dict(
        rope_type="longrope",
        rope_theta=1e4,
        long_factor=[2.0] * 4,
        short_factor=[1.0] * 4,
    )
    return build_model("phi3", rope_parameters=rope, original_max_position_embeddings=64)


def dynamic():
    rope = dict(
        rope_type="dynamic",
        rope_theta=1e4,
        factor=2.0,
        original_max_position_embeddings=32,
    )
    return build_model("llama", rope_parameters=rope)


LIMITS = {
    "longrope": (longrope, 64),
    "dynamic": (dynamic, 32),
    "phi3": (lambda: build_model("phi3"), 128),
    "gpt2": (lambda: build_model("gpt2"), 128),
}


@pytest.mark.parametrize("name", LIMITS)
def test_positions(name):
    """They end where one long sample would change the rotary frequencies of its whole batch."""
    build, limit = LIMITS[name]
    model = build()
    assert positions_of(model) == limit
    check_positions(model, limit)
    with pytest.raises(UserError, match=str(limit)):
        check_positions(model, limit + 1)


def test_no_limit_of_positions():
    check_positions(build_model("bloom"), 10**6)


@pytest.mark.parametrize("build", [longrope, dynamic])
def test_frequencies_are_the_same_up_to_the_limit(build):
    """A row says the same beside a row that is as long as may be."""
    model = build()
    limit = positions_of(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB, (2, limit), generator=generator)
    with torch.no_grad():
        alone = model(input_ids=ids[:1, :9], use_cache=False).logits
        beside = model(input_ids=ids, use_cache=False).logits[:1, :9]
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-5)


# ---- names, devices, threads


def test_tiny_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("tiny") == str(ROOT / "tiny")
    assert resolve_model("./tiny") == str(tmp_path / "tiny")
    assert load_model(resolve_model("tiny"), "cpu").config.vocab_size == 98


def test_a_run_is_its_last_checkpoint(tmp_path):
    for step in (9, 10, "10-old"):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert resolve_model(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    "name, hub_id",
    [
        ("Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B"),
        ("Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("someone/Qwen-like", "someone/Qwen-like"),
    ],
)
def test_hub_ids(name, hub_id):
    assert resolve_model(name) == hub_id


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "nowhere", "a/b/c"])
def test_names_that_can_be_nothing(name):
    with pytest.raises(UserError, match="--model"):
        resolve_model(name)


@pytest.mark.parametrize("loader", [load_tokenizer, lambda name: load_model(name, "cpu")])
@pytest.mark.parametrize("config", ["", "{", "[]", "{}", '{"model_type": "no such"}'])
def test_a_broken_directory_is_one_line(tmp_path, loader, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError) as caught:
        loader(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_broken_weights_are_one_line(tmp_path):
    build_model("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError) as caught:
        load_model(str(tmp_path), "cpu")
    assert "\n" not in str(caught.value)


def test_adapters_need_peft(tmp_path):
    try:
        import peft  # noqa: F401

        pytest.skip("peft is installed")
    except ImportError:
        pass
    assert not has_adapters(str(tmp_path))
    with pytest.raises(UserError, match="peft"):
        add_adapters(build_model("llama"), 4)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert has_adapters(str(tmp_path))
    with pytest.raises(UserError, match="peft"):
        load_model(str(tmp_path), "cpu")


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cuda", "mps", "cpu")
    for name, there in (
        ("cuda", torch.cuda.is_available()),
        ("mps", torch.backends.mps.is_available()),
    ):
        if not there:
            with pytest.raises(UserError, match="--device"):
                pick_device(name)


def test_threads():
    before = torch.get_num_threads()
    model = build_model("llama")
    try:
        assert set_threads(model, "cpu", 1) == torch.get_num_threads() == 1
        found = set_threads(model, "cpu", 0)
        assert found == torch.get_num_threads()
        assert found in (1, len(os.sched_getaffinity(0)))
        torch.set_num_threads(1)
        assert set_threads(model, "cuda", 3) == 3
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# ---- memory


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_memory_estimate(family):
    """Against counts by hand, and what changes it."""
    model = build_model(family)
    args = SimpleNamespace(
        rollout_batch_size=64,
        num_prompts=4,
        num_generations=8,
        max_completion_length=32,
        max_tokens_per_batch=1000,
        gradient_checkpointing=False,
    )
    cpu = torch.device("cpu")
    found = memory_estimate(model, cpu, args, longest_prompt=16)
    parameters = sum(p.numel() for p in model.parameters())
    assert found["weights"] == pytest.approx(4 * parameters / 1e9)
    assert found["optimizer"] == pytest.approx(12 * parameters / 1e9)
    ids = torch.zeros(32, 48, dtype=torch.long)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert found["cache"] == pytest.approx(held / 1e9)
    assert memory_estimate(model, cpu, args, 16, reference=True)["weights"] == pytest.approx(
        2 * found["weights"]
    )
    args.gradient_checkpointing = True
    assert memory_estimate(model, cpu, args, 16)["activations"] < found["activations"]


@pytest.mark.parametrize("family, width", [("llama", 8), ("qwen3", 12), ("gpt2", 8)])
def test_head_dim(family, width):
    assert head_dim(build_model(family).config) == width
