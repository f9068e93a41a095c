"""Loading a model: nothing that disturbs training or sampling comes along."""

import pytest
import torch

from data import UserError
from models import check_positions, load_model, resolve_model, sampling_copy, stop_token_ids
from rollout import collate, score
from tests.conftest import ROOT, build_model
from tests.test_rollout import gradients, sample_with


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_loaded_models_have_no_dropout_in_train_mode_and_checkpointing_changes_no_gradient(family, tmp_path):
    saved = build_model(family)
    saved.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "cpu")
    batch = collate(sample_with(model), "cpu")
    model.train()
    first, second = score(model, batch, 1.0)[0], score(model, batch, 1.0)[0]
    assert torch.equal(first, second)
    plain = gradients(model, batch)
    model.activation_checkpointing_enable()
    model.train()
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-5)
    samples = sample_with(model)  # in train mode with checkpointing: the cache must be on all the same
    assert [s["completion_ids"] for s in samples] == [s["completion_ids"] for s in sample_with(saved)]


def test_a_copy_to_sample_from_rounds_weights_and_no_rotary_frequency():
    model = build_model("llama")
    twin = sampling_copy(model, torch.bfloat16)
    for own, copied in zip(model.parameters(), twin.parameters()):
        assert copied.dtype == torch.bfloat16 and not copied.requires_grad and own.requires_grad
        assert torch.equal(own.to(torch.bfloat16), copied)
    frequencies = dict(twin.named_buffers())["model.rotary_emb.inv_freq"]
    assert frequencies.dtype == torch.float32 and torch.equal(frequencies, dict(model.named_buffers())["model.rotary_emb.inv_freq"])
    assert model.dtype == torch.float32


def test_stop_tokens_come_from_the_tokenizer_and_the_generation_config():
    import tiny

    model, tokenizer = build_model("llama"), tiny.build_tokenizer()
    model.generation_config.eos_token_id = [7, 3]
    assert stop_token_ids(model, tokenizer) == [0, 3, 7]
    model.generation_config.eos_token_id = None
    assert stop_token_ids(model, tokenizer) == [0]
    from experiments.shapes import build_tokenizer

    chat, plain = build_tokenizer(), build_tokenizer(chat_template=None)  # a base model whose eos does not end a chat turn
    end = chat.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(model, chat) == sorted({chat.eos_token_id, end}) and stop_token_ids(model, plain) == [plain.eos_token_id]
    model.generation_config.eos_token_id = [7]
    assert stop_token_ids(model, chat) == sorted({7, chat.eos_token_id, end}) and model.generation_config.eos_token_id == [7]  # saved with the model


def test_positions_end_where_rotary_frequencies_would_change():
    """Beyond, the frequencies depend on the longest sample of a batch, and the log-probs of all others with them."""
    long = dict(rope_type="longrope", rope_theta=1e4, long_factor=[2.0] * 4, short_factor=[1.0] * 4)
    for model, limit in ((build_model("phi3", rope_parameters=long, original_max_position_embeddings=64), 64), (build_model("phi3"), 128), (build_model("gpt2"), 128)):
        check_positions(model, limit)
        with pytest.raises(UserError, match=f"{limit} positions"):
            check_positions(model, limit + 1)


def test_tiny_is_the_embedded_model_also_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("tiny") == str(ROOT / "tiny") and resolve_model("./tiny") == "tiny"
