"""Rollout: sample completions from a model, and score them. Knows models, not rewards.

`sample` draws G completions for each prompt: the prompt is prefilled once and its key/value cache is shared out to the G
samples, rows leave the batch when they have ended, and a token is drawn from plain softmax(logits / temperature). Nothing of the
model's generation_config takes part: its top_k, top_p or repetition penalty would make the sampler another distribution
than the one that the policy gradient differentiates.

`score` gives the log-prob of every sampled token and the entropy of the distribution it came from, with gradient. Both
are taken at the sampler's temperature, so that before any update the sampler's log-probs and the scorer's agree. The LM
head runs only where a completion token is predicted, and in chunks, so that no [B, T, V] tensor ever exists.

A sample is a dict: prompt_ids and completion_ids (lists of token ids; the completion ends with its stop token, unless
it is truncated), logp (the sampler's, a list), truncated (bool).
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from data import UserError
from products import ROWS, packed_weights

LOGITS_AT_ONCE = 2**23  # logits in one chunk of the LM head: 32 MB in fp32, but ROWS rows at least (156 MB for Qwen)
SPREAD = 1.5  # in a micro-batch the longest sample has at most so many times the tokens of the shortest


def draw(logits, uniform, temperature):
    """One token a row from softmax(logits / temperature), by inverting its distribution function at `uniform`.

    logits: [B, V]; uniform: [B] in [0, 1); temperature 0 takes the most likely token. Returns the tokens [B] and their
    log-probs [B]. One number a row decides, so what a row draws does not depend on which other rows are in the batch.
    """
    logits = logits.float() if temperature in (0, 1) else logits.float() / temperature  # [B, V]
    probs = torch.softmax(logits, dim=-1)
    if temperature == 0:
        token = logits.argmax(dim=-1, keepdim=True)  # [B, 1]
    else:
        cdf = probs.cumsum(dim=-1)
        # The sum is 1 only up to rounding; and at 0 the first token of all would be drawn, however small its probability.
        threshold = uniform.clamp(min=2**-25).unsqueeze(1) * cdf[:, -1:]
        token = torch.searchsorted(cdf, threshold, right=True).clamp(max=logits.shape[1] - 1)
    logp = probs.gather(1, token).log()
    return token.squeeze(1), logp.squeeze(1)


def batch_size(going):
    """How many rows to keep for `going` unfinished ones: a few more, so that not every step has another shape.

    The cache is copied less often, and the kernels that oneDNN compiles for a shape are few.
    """
    step = max(8, 2 ** (going.bit_length() - 3))  # an eighth to a quarter
    return -(-going // step) * step


def growing_cache(model):
    """Decoding over a cache that grows by a token a step, as transformers does it. Returns the dict that `sample` asks for:

    move(cache, rows) gives a cache of those rows; step(token, mask, position, cache) the logits after one more token;
    size(going, rows) how many rows to keep for `going` unfinished ones of `rows`; during(rows) holds while decoding;
    length is that of the attention mask, or None when it may be as long as it has to.
    """

    def move(cache, rows):
        cache.batch_select_indices(rows)
        return cache

    def step(token, mask, position, cache):
        mask = mask[:, : cache.get_seq_length() + 1]
        return model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache).logits

    size, during = lambda going, rows: batch_size(going), lambda rows: packed_weights(model, rows)  # noqa: E731
    return {"move": move, "step": step, "size": size, "during": during, "length": None}


def static_cache(model, length):
    """Decoding compiled over caches of a fixed size: on a GPU one CUDA graph a token in place of some thousand kernel launches.

    length: tokens of prompt and completion together, at most. Returns a dict like `growing_cache`; its `move` copies the rows into
    the one cache that is kept for as many rows (a graph finds its tensors at the same addresses every time). Each number of rows
    is compiled once, for a minute or so, so there are four. Not measured on a GPU; a CPU only loses by it. Raises UserError
    for a model with a sliding window.
    """
    from transformers import StaticCache

    caches = {}
    if any(layer.is_sliding for layer in StaticCache(config=model.config, max_cache_len=length).layers):
        raise UserError(f"--compile: {model.config.model_type} attends to a sliding window, which this does not know; leave it out")

    def move(cache, rows):
        fixed = caches.setdefault(len(rows), StaticCache(config=model.config, max_cache_len=length))
        for new, old in zip(fixed.layers, cache.layers):
            if not new.is_initialized:
                new.lazy_initialization(old.keys[rows], old.values[rows])
            filled = old.keys.shape[2]
            new.keys[:, :, :filled], new.values[:, :, :filled] = old.keys[rows], old.values[rows]
            new.cumulative_length.fill_(old.get_seq_length())
        return fixed

    def step(token, mask, position, cache):
        return model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache).logits

    def size(going, rows):
        return next(size for size in (rows // 8, rows // 4, rows // 2, rows) if size >= going)

    step = torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)
    return {"move": move, "step": step, "size": size, "during": nullcontext, "length": length}


@torch.no_grad()
def sample(model, prompts, num_generations, *, max_completion_length, temperature, stop_ids, generator, decoding=None):
    """Samples `num_generations` completions for each prompt, all at once: the caller bounds the number of rows.

    prompts: list of lists of token ids; max_completion_length in tokens, the stop token included; stop_ids: the tokens
    that end a completion; generator: a CPU torch.Generator, the only source of randomness (the same on every device);
    decoding: `growing_cache` (the default) or `static_cache` of the same model.
    Returns a list of samples (see above), those of one prompt next to each other.
    """
    decoding = decoding or growing_cache(model)
    model.eval()  # in train mode gradient checkpointing turns the cache off, and decoding becomes quadratic
    device, G, T = model.device, num_generations, max_completion_length
    B, L = len(prompts) * G, max(map(len, prompts))
    uniforms = torch.rand(B, T, generator=generator).T.to(device)  # a row's own numbers, whatever shares its batch
    stop = torch.tensor(stop_ids, device=device)

    # Prefill each prompt once, left-padded so that all end at the same place; then share the cache out to its G samples.
    ids = torch.tensor([[0] * (L - len(prompt)) + prompt for prompt in prompts], device=device)  # [B/G, L]
    mask = torch.tensor([[0] * (L - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    cache = decoding["move"](out.past_key_values, torch.arange(B, device=device) // G)
    logits, mask = out.logits[:, -1].repeat_interleave(G, dim=0), mask.repeat_interleave(G, dim=0)
    mask = F.pad(mask, (0, (decoding["length"] or L + T) - L), value=1)  # of tokens to come: causal attention does not see them yet
    position = positions[:, -1:].repeat_interleave(G, dim=0)  # [B, 1]

    tokens = torch.zeros(B, T, dtype=torch.long, device=device)
    logps = torch.zeros(B, T, device=device)
    lengths = torch.full((B,), T, device=device)
    truncated = torch.ones(B, dtype=torch.bool, device=device)  # until the row ends by a stop token
    rows = torch.arange(B, device=device)  # those in the batch
    with decoding["during"](B):
        for t in range(T):
            token, logp = draw(logits, uniforms[t, rows], temperature)
            tokens[rows, t], logps[rows, t] = token, logp  # of a row that has ended, beyond its length: never looked at
            ended = rows[torch.isin(token, stop) & truncated[rows]]
            lengths[ended], truncated[ended] = t + 1, False
            going = truncated[rows].sum().item()
            if going == 0 or t == T - 1:
                break
            size = decoding["size"](going, B)
            if size < len(rows):
                kept = truncated[rows].argsort(descending=True, stable=True)[:size]  # the unfinished, and some more to fill up
                cache = decoding["move"](cache, kept)
                rows, token, mask, position = rows[kept], token[kept], mask[kept], position[kept]
            position = position + 1
            logits = decoding["step"](token.unsqueeze(1), mask, position, cache)[:, -1]

    return [
        {"prompt_ids": prompts[row // G], "completion_ids": row_tokens[:n], "logp": row_logps[:n], "truncated": cut}
        for row, (row_tokens, row_logps, n, cut) in enumerate(
            zip(tokens.tolist(), logps.tolist(), lengths.tolist(), truncated.tolist())
        )
    ]


def collate(samples, pad_id, device):
    """Samples as tensors for `score` and the losses; what stands in the padding never matters.

    Returns a dict: input_ids [B, L] (prompt, completion, then padding), predicts bool [B, L] (True where the next token
    is a completion token), completion_ids [B, T] and mask bool [B, T]. The mask comes from the completions' lengths,
    never from comparing ids with the padding token, which is the end-of-text token of many models.
    """
    B, T = len(samples), max(len(s["completion_ids"]) for s in samples)
    L = max(len(s["prompt_ids"]) + len(s["completion_ids"]) for s in samples)
    input_ids, completion_ids = torch.full((B, L), pad_id), torch.full((B, T), pad_id)
    predicts, mask = torch.zeros(B, L, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    for row, s in enumerate(samples):
        prompt, completion = s["prompt_ids"], s["completion_ids"]
        p, n = len(prompt), len(completion)
        input_ids[row, : p + n] = torch.tensor(prompt + completion)
        completion_ids[row, :n] = torch.tensor(completion)
        predicts[row, p - 1 : p + n - 1] = True
        mask[row, :n] = True
    batch = {"input_ids": input_ids, "predicts": predicts, "completion_ids": completion_ids, "mask": mask}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def micro_batches(samples, max_tokens):
    """Packs samples, sorted by length, into lists of at most `max_tokens` padded tokens (one sample at least).

    A list also ends where the next sample is SPREAD times as long as its first, so that little of a batch is padding: the
    embedded model writes short or long completions and seldom others, and its updates take about a fifth less time.
    """
    length = lambda s: len(s["prompt_ids"]) + len(s["completion_ids"])  # noqa: E731
    packed = []
    for sample in sorted(samples, key=length):  # the newest is the longest
        if not packed or (len(packed[-1]) + 1) * length(sample) > max_tokens or length(sample) > SPREAD * length(packed[-1][0]):
            packed.append([])
        packed[-1].append(sample)
    return packed


class LogProb(torch.autograd.Function):
    """Log-probs [N] of the targets [N], and entropies [N] in nats without gradient, from logits [N, V].

    d logp / d logits = onehot(target) - softmax(logits). Written out, so that hardly more than two [N, V] tensors are alive at a
    time: scoring 3,840 tokens of a vocabulary of 32,000 takes 0.2-0.5 GB in place of autograd's 0.8-1.0 (experiments/scaling.py).
    """

    @staticmethod
    def forward(ctx, logits, targets):
        top = logits.amax(dim=-1, keepdim=True)  # [N, 1]
        probs = (logits - top).exp_()
        normaliser = top + probs.sum(dim=-1, keepdim=True).log()
        torch.sub(logits, normaliser, out=probs).exp_()
        entropy = normaliser.squeeze(1) - probs.mul_(logits).sum(dim=-1)
        ctx.save_for_backward(logits, targets, normaliser)
        ctx.mark_non_differentiable(entropy)
        return (logits.gather(1, targets.unsqueeze(1)) - normaliser).squeeze(1), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        logits, targets, normaliser = ctx.saved_tensors
        grad = grad.unsqueeze(1)  # [N, 1]
        return (logits - normaliser).exp_().mul_(-grad).scatter_add_(1, targets.unsqueeze(1), grad), None


def token_statistics(hidden, targets, head, softcap, temperature):
    """Log-probs [N] of the targets [N] and entropies [N] from hidden states [N, D]."""
    logits = head(hidden).float()  # [N, V]; log-softmax in fp32 under autocast too
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return LogProb.apply(logits if temperature == 1 else logits / temperature, targets)


def score(model, batch, temperature):
    """Log-probs (with gradient where it is enabled) and entropies of the completion tokens, both [B, T], 0 in the padding.

    batch: from `collate`. Rows are right-padded and attention is causal, so no real token sees the padding and no
    attention mask is needed. Every chunk but a single one is recomputed in the backward pass instead of being kept.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft wraps the model
    head, softcap = causal_lm.get_output_embeddings(), getattr(causal_lm.config, "final_logit_softcapping", None)
    hidden = causal_lm.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state  # [B, L, D]
    hidden, targets = hidden[batch["predicts"]], batch["completion_ids"][batch["mask"]]  # [N, D], [N]

    chunk = ROWS * max(1, LOGITS_AT_ONCE // (ROWS * head.weight.shape[0]))
    parts = []
    for h, y in zip(hidden.split(chunk), targets.split(chunk)):
        arguments = (h, y, head, softcap, temperature)
        if len(targets) > chunk and torch.is_grad_enabled():
            parts.append(checkpoint(token_statistics, *arguments, use_reentrant=False))
        else:
            parts.append(token_statistics(*arguments))
    logp, entropy = (torch.cat(column) for column in zip(*parts))
    empty = torch.zeros(batch["mask"].shape, device=logp.device)  # [B, T]
    return empty.masked_scatter(batch["mask"], logp), empty.masked_scatter(batch["mask"], entropy)
