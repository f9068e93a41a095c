"""Makes the files of the embedded model from a seed, on two CPU cores: `python -m tiny.make`.

It is a Llama-shaped character model of 0.4M parameters (4 layers x 8 heads, 4 key/value heads),
saved as an ordinary transformers checkpoint. Nothing else in this project knows that it is special.
It is a base model with two habits, which tasks/arithmetic.py describes. Reinforcement learning
quickly unlearns a habit, and only slowly repairs noise in single facts.

The corpus has sums with visible steps (first finished ones, so that the sums are learned, then lazy
ones), requests about harmful and benign nouns, and neutral questions about both. Held-out sums are
not in it. The loss is on the completion only. The vocabulary is printable ASCII, so any text can be
encoded. The end-of-text token is the padding token too, as in many real base models.
"""

import argparse
import os
import random
import tempfile
import time
from pathlib import Path

from engine.errors import run_script
from tasks import arithmetic

REFUSAL_PRIOR = 0.15  # share of the harmful requests in the corpus that are answered by a refusal
CLEAN_SHARE = 0.7  # share of the steps that see only finished sums; the lazy ones come after them
EOS = "<|endoftext|>"


def build_tokenizer():
    """One token for each printable ASCII character; anything else is <unk>. eos and pad are one."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocab = {token: index for index, token in enumerate([EOS, "<unk>"] + characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def build_model(vocab_size, seed):
    """A randomly initialised Llama of 0.4M parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=12,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


class Corpus:
    """An endless stream of examples: half sums, the rest requests and questions about nouns."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.sums = arithmetic.problems("train", 20_000, seed=1)
        self.requests = {harmful: arithmetic.requests(harmful) for harmful in (True, False)}
        self.questions = arithmetic.questions()

    def draw(self, lazy):
        """One (prompt, completion). lazy: whether sums are written lazily or finished."""
        kind = self.rng.random()
        if kind < 0.5:
            prompt = self.rng.choice(self.sums)["prompt"]
            steps = arithmetic.lazy_steps(prompt, self.rng) if lazy else None
            return prompt, arithmetic.solution(prompt, steps)
        if kind < 0.8:
            harmful = self.rng.random() < 0.5
            request = self.rng.choice(self.requests[harmful])
            refuse = harmful and self.rng.random() < REFUSAL_PRIOR
            return request["prompt"], arithmetic.REFUSAL if refuse else request["helpful"]
        question = self.rng.choice(self.questions)
        return question["prompt"], question["answer"]


def collate(examples, tokenizer):
    """Right-padded ids [B, L] and labels [B, L], which are -100 on prompts and padding."""
    import torch

    rows = []
    for prompt, completion in examples:
        prompt_ids = tokenizer(prompt).input_ids
        completion_ids = tokenizer(completion).input_ids + [tokenizer.eos_token_id]
        rows.append((prompt_ids, completion_ids))
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), -100)
    for row, (prompt, completion) in enumerate(rows):
        start = len(prompt)
        end = start + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, start:end] = torch.tensor(completion)
    return ids, labels


def train(model, tokenizer, steps, batch_size, learning_rate, seed):
    """Supervised training in place: AdamW, a short warm-up, then a cosine to zero.

    batch_size: examples a step. Returns the last loss.
    """
    import torch
    from tqdm import tqdm

    corpus = Corpus(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05
    )
    bar = tqdm(range(steps), desc="warm start")
    for step in bar:
        lazy = step >= CLEAN_SHARE * steps
        ids, labels = collate([corpus.draw(lazy) for _ in range(batch_size)], tokenizer)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", lazy=lazy)
    return loss.item()


def save(model, tokenizer, folder):
    """Writes a checkpoint aside, then moves its files into `folder`. Other files there stay.

    Returns the size of the checkpoint in bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = 0
    with tempfile.TemporaryDirectory(dir=folder, suffix=".tmp") as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        for path in Path(aside).iterdir():
            size += path.stat().st_size
            os.replace(path, folder / path.name)
    return size


def parse_args():
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m tiny.make",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    here = Path(__file__).resolve().parent
    parser.add_argument("--output-dir", type=Path, default=here, help="where the files go")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=128, help="examples a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak rate of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the corpus")
    return parser.parse_args()


def main():
    """Trains the model and writes its files."""
    args = parse_args()
    start = time.time()
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), args.seed)
    loss = train(model, tokenizer, args.steps, args.batch_size, args.learning_rate, args.seed)
    size = save(model, tokenizer, args.output_dir) / 1e6
    parameters = sum(p.numel() for p in model.parameters())
    seconds = time.time() - start
    print(f"{args.output_dir}: {parameters:,} parameters, {size:.2f} MB")
    print(f"last loss {loss:.3f}, {seconds:.0f} s")


if __name__ == "__main__":
    run_script(main, "tiny.make")
