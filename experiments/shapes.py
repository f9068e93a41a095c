"""Checkpoints of true shape with random weights: what a model costs does not depend on its weights.

    python -m experiments.shapes --shape qwen2.5-0.5b --output-dir runs/shapes/qwen2.5-0.5b
    python train.py --model runs/shapes/qwen2.5-0.5b ...

The tokenizer is a small byte-level BPE of Qwen's kind, trained on a sentence: pad is eos, there is
a chat template, and <|im_end|> ends a turn.
"""

import argparse

QWEN = dict(
    family="qwen2",
    vocab_size=151936,
    tie_word_embeddings=True,
    max_position_embeddings=32768,
    rope_theta=1e6,
)
SHAPES = {
    "tiny": dict(
        family="llama",
        vocab_size=98,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=12,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    ),
    "20m": dict(
        family="llama",
        vocab_size=32000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    ),
    "qwen2.5-0.5b": dict(
        QWEN,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    ),
    "qwen2.5-1.5b": dict(
        QWEN,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
    ),
    "qwen2.5-7b": dict(
        QWEN,
        vocab_size=152064,
        tie_word_embeddings=False,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_config(shape, **changes):
    """The transformers config of a shape of SHAPES, with changes to it."""
    from transformers import AutoConfig

    options = {**SHAPES[shape], **changes}
    family = options.pop("family")
    return AutoConfig.for_model(
        family, bos_token_id=None, eos_token_id=0, pad_token_id=0, **options
    )


def build_tokenizer(chat_template=CHAT_TEMPLATE):
    """A Qwen2Tokenizer: what AutoTokenizer makes of the files beside a qwen2 config."""
    from transformers import Qwen2Tokenizer

    sentence = (
        "Please reason step by step, and put your final answer within \\boxed{}. "
        "What is 12 + 30? Answer: 42"
    )
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        [sentence] * 20, vocab_size=330, show_progress=False
    )
    special = {
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }
    tokenizer.add_special_tokens(special)
    tokenizer.chat_template = chat_template
    return tokenizer


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--output-dir", required=True)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(build_config(args.shape))
    model.save_pretrained(args.output_dir)
    build_tokenizer().save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
