"""A short supervised warm start: some experiments begin from a model that was nudged this way."""

import argparse

import torch

import cast
from engine.files import replacing


def warm_start(model, tokenizer, pairs, directory, **settings):
    """Trains all weights on pairs of prompt and response, and writes the model to a directory.

    pairs: list of dicts with prompt and response, of which those of more than 1,000 tokens are left
        out; settings: steps, batch_size, learning_rate, max_tokens_per_batch.
    Yields (step, loss) after each step. The directory is there when all steps are taken.
    """
    samples = cast.encode_pairs("warm start", pairs, tokenizer, max_length=1000)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    args = argparse.Namespace(weight_decay=0.0, max_grad_norm=1.0, **settings)
    yield from cast.sft(model, samples, masks, args, seed=0)
    with replacing(directory) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
