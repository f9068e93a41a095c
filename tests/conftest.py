"""What all tests share: the scripts on the path, one thread, small real models of several families, a real tokenizer."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network, and a test must not wait for it
torch.set_num_threads(1)
settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)  # machines are noisy: no deadline
settings.load_profile("default")

VOCAB = 40


def build_model(family, **changes):
    """A randomly initialised model of a few thousand parameters with large weights, so that its logits are far from flat."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = dict(vocab_size=VOCAB, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    modern = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    shapes = {
        "llama": {**modern, "attention_dropout": 0.2},
        "mistral": {**modern, "sliding_window": 6},
        "qwen2": modern,
        "qwen3": {**modern, "head_dim": 12},  # head_dim * heads differs from the hidden size
        "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3),  # learned absolute positions, dropout 0.1
        "gpt_neox": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3, max_position_embeddings=128),
        "gemma2": {**modern, "head_dim": 12, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 12, "sliding_window": 6},
        "gemma3_text": {**modern, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 6},
        "phi3": {**modern},
        "granite": {**modern, "logits_scaling": 4.0},  # a scaling behind the LM head, of which rollout.score knows nothing
        "opt": dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=32,
                    init_std=0.3, dropout=0.3, attention_dropout=0.3),  # F.dropout with a rate of the module's own
        "cohere": {**modern, "logit_scale": 0.3, "tie_word_embeddings": True},
        "phimoe": {**modern, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.3, "input_jitter_noise": 0.3, "attention_dropout": 0.2},
        "bloom": dict(hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),  # positions by alibi, from the attention mask
        "falcon": dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, initializer_range=0.3, alibi=True),
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**common, **shapes[family], **changes})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def models():
    """Models by family, built once."""
    cache = {}

    def get(family):
        if family not in cache:
            cache[family] = build_model(family)
        return cache[family]

    return get


def build_checkpoint(folder, family, **options):
    """A checkpoint directory of a small random model of the family with a real BPE tokenizer. Returns its path as text."""
    from experiments.shapes import build_tokenizer

    tokenizer = build_tokenizer(**options)
    eos = tokenizer.eos_token_id
    model = build_model(family, vocab_size=len(tokenizer), eos_token_id=eos, pad_token_id=eos, max_position_embeddings=512)
    model.generation_config.eos_token_id = [eos, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
