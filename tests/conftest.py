"""What all tests share: one thread, small real models of several families, a real tokenizer."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / ".verl"))  # see tests/verl.txt
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network, or waits for it
# No test writes to the user's cache. matplotlib's fonts may stay there: finding them takes seconds.
os.environ.setdefault("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))
CACHE = tempfile.TemporaryDirectory(prefix="tepo-cast-")
os.environ["XDG_CACHE_HOME"] = CACHE.name
torch.set_num_threads(1)
# No deadline, for machines are noisy.
settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("default")

VOCAB = 40
COMMON = dict(vocab_size=VOCAB, bos_token_id=None, eos_token_id=0, pad_token_id=0)
MODERN = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.3,
    tie_word_embeddings=False,
)
OLDER = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
SHAPES = {
    "llama": dict(MODERN, attention_dropout=0.2),
    "mistral": dict(MODERN, sliding_window=6),
    "qwen2": MODERN,
    "qwen3": dict(MODERN, head_dim=12),  # head_dim * heads differs from the hidden size
    "phi3": MODERN,
    "gemma2": dict(
        MODERN,
        head_dim=12,
        final_logit_softcapping=5.0,
        query_pre_attn_scalar=12,
        sliding_window=6,
    ),
    "gemma3_text": dict(MODERN, head_dim=12, query_pre_attn_scalar=12, sliding_window=6),
    "granite": dict(MODERN, logits_scaling=4.0),  # a scale behind the LM head
    "cohere": dict(MODERN, logit_scale=0.3, tie_word_embeddings=True),
    "phimoe": dict(
        MODERN,
        num_local_experts=4,
        num_experts_per_tok=2,
        router_jitter_noise=0.3,
        input_jitter_noise=0.3,
        attention_dropout=0.2,
    ),
    # Learned absolute positions, and dropout.
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3),
    "opt": dict(
        OLDER,
        ffn_dim=48,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        init_std=0.3,
        dropout=0.3,
        attention_dropout=0.3,
    ),
    "gpt_neox": dict(OLDER, intermediate_size=48, max_position_embeddings=128),
    # Positions by alibi, from the attention mask.
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
    "falcon": dict(OLDER, alibi=True),
}


def names_in(folder):
    """The names of what a user sees in a folder."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def build_model(family, **changes):
    """A random model of a few thousand parameters. Its weights are large: its logits are not flat.

    changes: to its config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **SHAPES[family], **changes})
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
    """Writes a checkpoint of a small random model with a real BPE tokenizer. Returns its path."""
    from experiments.shapes import build_tokenizer

    tokenizer = build_tokenizer(**options)
    eos = tokenizer.eos_token_id
    changes = dict(eos_token_id=eos, pad_token_id=eos, max_position_embeddings=512)
    model = build_model(family, vocab_size=len(tokenizer), **changes)
    model.generation_config.eos_token_id = [eos, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
