"""Rollout: sample completions from a model, and score them. Knows models, not rewards.

`sample` draws G completions for each prompt: the prompt is prefilled once and its keys and values are shared out to the G
samples, rows leave the batch when they have ended, and a token is drawn from plain softmax(logits / temperature). Nothing of the
model's generation_config takes part: its top_k, top_p or repetition penalty would make the sampler another distribution
than the one that the policy gradient differentiates.

`score` gives the log-prob of every sampled token and the entropy of the distribution it came from, with gradient. Both
are taken at the sampler's temperature, so that before any update the sampler's log-probs and the scorer's agree. A prompt
is computed once for its G completions, and nothing for padding (see attention.py). The LM head runs only where a completion
token is predicted, and in chunks, so that no [B, T, V] tensor ever exists.

A sample is a dict: prompt_ids and completion_ids (lists of token ids; the completion ends with its stop token, unless
it is truncated), logp (the sampler's, a list), truncated (bool).
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

import attention
from products import ROWS, packed_weights

LOGITS_AT_ONCE = 2**23  # logits in one chunk of the LM head: 32 MB in fp32, but ROWS rows at least (156 MB for Qwen)
FIRST_COLUMNS = 16  # for completion tokens that the cache begins with; it grows by a quarter
SPREAD = 1.5  # in one call of attention the longest row has at most so many times the tokens of the shortest


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

    The kernels that oneDNN compiles for a shape are then few.
    """
    step = max(8, 2 ** (going.bit_length() - 3))  # an eighth to a quarter
    return -(-going // step) * step


def decode_step(model, cache, token, position, length):
    """The logits [B, V] after one more token a row. token, position: [B]; length: columns of the cache to look at."""
    over = attention.cached(cache, position, length)
    return model(**attention.inputs(token.unsqueeze(1), position.unsqueeze(1), over)).logits[:, -1]


def compiled(rows, length):
    """What `sample` needs to decode by torch.compile: on a GPU one CUDA graph a token in place of some thousand kernel launches.

    rows: of the largest batch; length: tokens of prompt and completion together, at most. A graph finds its tensors at the same
    addresses every time, so the cache is made once and always looked at whole. Each number of rows is compiled once, for a
    minute or so, so there are four of them for a batch. Not measured on a GPU; a CPU only loses by it.
    """
    step = torch.compile(decode_step, mode="reduce-overhead", fullgraph=True, dynamic=False)
    return {"cache": {}, "rows": rows, "length": length, "step": step}


@torch.inference_mode()
def sample(model, prompts, num_generations, *, max_completion_length, temperature, stop_ids, generator, graphs=None):
    """Samples `num_generations` completions for each prompt, all at once: the caller bounds the number of rows.

    prompts: list of lists of token ids; max_completion_length in tokens, the stop token included; stop_ids: the tokens
    that end a completion; generator: a CPU torch.Generator, the only source of randomness (the same on every device);
    graphs: from `compiled`, or None. Returns a list of samples (see above), those of one prompt next to each other.
    """
    model = base(model).eval()
    device, G, T = model.device, num_generations, max_completion_length
    B, L = len(prompts) * G, max(map(len, prompts))
    uniforms = torch.rand(B, T, generator=generator).T.to(device)  # a row's own numbers, whatever shares its batch
    stop = torch.tensor(stop_ids, device=device)
    whole = graphs or {"cache": {}, "rows": B, "length": L + min(T, FIRST_COLUMNS), "step": decode_step}
    cache, columns = whole["cache"], whole["length"]

    # Prefill each prompt once; its keys and values go to its G rows of the cache.
    ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=device)  # [1, N]
    ends = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [B/G]
    parts = torch.arange(ids.shape[1], device=device).split(ends.tolist())
    positions, last = torch.cat([part - part[0] for part in parts]), ends.cumsum(dim=0) - 1
    over = attention.prefilled(pad_sequence(parts, batch_first=True), cache, whole["rows"], whole["length"], G)
    out = model(**attention.inputs(ids, positions.unsqueeze(0), over), logits_to_keep=last)
    logits, position = out.logits[0].repeat_interleave(G, dim=0), ends.repeat_interleave(G)  # [B, V], [B] of the token to come
    if graphs:
        for tensors in cache.values():
            for x in tensors:
                torch._dynamo.mark_static_address(x)

    tokens = torch.zeros(B, T, dtype=torch.long, device=device)
    logps = torch.zeros(B, T, device=device)
    lengths = torch.full((B,), T, device=device)
    truncated = torch.ones(B, dtype=torch.bool, device=device)  # until the row ends by a stop token
    rows = torch.arange(B, device=device)  # those in the batch
    # Column i of the cache is position i of its row; of the `columns` that there are, those up to the longest row's are looked at.
    with nullcontext() if graphs else packed_weights(model, B):
        for t in range(T):
            token, logp = draw(logits, uniforms[t, rows], temperature)
            tokens[rows, t], logps[rows, t] = token, logp  # of a row that has ended, beyond its length: never looked at
            ended = rows[torch.isin(token, stop) & truncated[rows]]
            lengths[ended], truncated[ended] = t + 1, False
            going = truncated[rows].sum().item()
            if going == 0 or t == T - 1:
                break
            size = next(size for size in (B // 8, B // 4, B // 2, B) if size >= going) if graphs else batch_size(going)
            if size < len(rows):
                kept = truncated[rows].argsort(descending=True, stable=True)[:size]  # the unfinished, and some more to fill up
                order = attention.keep_rows(cache, kept, len(rows))
                rows, token, position = rows[order], token[order], position[order]
            if L + t == columns:  # most rows end long before the longest may
                more = min(columns // 4, L + T - columns)
                attention.grow(cache, len(rows), more)
                columns += more
            logits = whole["step"](model, cache, token, position, columns if graphs else L + t + 1)
            position = position + 1

    return [
        {"prompt_ids": prompts[row // G], "completion_ids": row_tokens[:n], "logp": row_logps[:n], "truncated": cut}
        for row, (row_tokens, row_logps, n, cut) in enumerate(
            zip(tokens.tolist(), logps.tolist(), lengths.tolist(), truncated.tolist())
        )
    ]


def collate(samples, device, share_prompts=True):
    """Samples as tensors for `score` and the losses: their tokens end to end, a prompt once for the neighbours that share it.

    The last token of a completion predicts nothing and is left out. Prompt 10 11 with the completions 20 21 22 and 30 31 gives

        input_ids     10 11 20 21 30    [1, N]
        position_ids   0  1  2  3  2    [1, N]
        row            0  0  0  0  1    [N]     the sample that a token was laid down for
        rows          0 1 4 .           [R, L]  where the tokens of a row stand, shortest row first; a list, by like lengths
                      0 1 2 3
        back           4  5  6  7  2    [N]     where a token's output stands among those of all rows
        predicts       1  2  3  1  4    [n]     where the completion tokens are predicted, sample by sample
        targets       20 21 22 30 31    [n]     which they are
        mask          1 1 1             [B, T]  bool
                      1 1 0

    as a dict. The mask comes from the completions' lengths, never from comparing ids with the padding token, which ends the text
    of many models.
    """
    ids, positions, owners, rows, predicts, targets, prompt = [], [], [], [], [], [], None
    for number, s in enumerate(samples):
        if not share_prompts or s["prompt_ids"] != prompt:
            prompt, first = s["prompt_ids"], len(ids)
            ids += prompt
            positions += range(len(prompt))
        rows.append([*range(first, first + len(prompt)), *range(len(ids), len(ids) + len(s["completion_ids"]) - 1)])
        ids += s["completion_ids"][:-1]
        positions += range(len(prompt), len(rows[-1]))
        owners += [number] * (len(ids) - len(owners))
        predicts += rows[-1][len(prompt) - 1 :]
        targets += s["completion_ids"]

    parts, back, places = [], [0] * len(ids), 0
    for row in sorted(rows, key=len):
        if not parts or len(row) > SPREAD * len(parts[-1][0]):
            parts.append([])
        parts[-1].append(row)
    for part in parts:
        for row in part:
            for place, token in enumerate(row, start=places):  # a prompt's token is in several rows; any will do
                back[token] = place
            places += len(part[-1])  # the longest

    lengths = torch.tensor([[len(s["completion_ids"])] for s in samples])
    batch = {"input_ids": [ids], "position_ids": [positions], "row": owners, "predicts": predicts, "targets": targets, "back": back}
    batch = {name: torch.tensor(value, device=device) for name, value in batch.items()}
    batch["rows"] = [pad_sequence([torch.tensor(row) for row in part], batch_first=True).to(device) for part in parts]
    return batch | {"mask": (torch.arange(lengths.max()) < lengths).to(device)}


def micro_batches(samples, max_tokens):
    """Cuts samples into lists of neighbours with at most `max_tokens` tokens in their rows (one sample at least)."""
    parts, tokens = [], 0
    for sample in samples:
        length = len(sample["prompt_ids"]) + len(sample["completion_ids"])
        if not parts or tokens + length > max_tokens:
            parts.append([])
            tokens = 0
        parts[-1].append(sample)
        tokens += length
    return parts


class LogProb(torch.autograd.Function):
    """Log-probs [N] of the targets [N], and entropies [N] in nats without gradient, from logits [N, V].

    d logp / d logits = onehot(target) - softmax(logits). Written out, so that hardly more than two [N, V] tensors are alive at a
    time and each is passed over few times (experiments/scaling.py shows what scoring takes).
    """

    @staticmethod
    def forward(ctx, logits, targets):
        top, targets = logits.amax(dim=-1, keepdim=True), targets.unsqueeze(1)  # [N, 1]
        weights = (logits - top).exp_()  # softmax(logits) * total
        total = weights.sum(dim=-1, keepdim=True)
        normaliser = top + total.log()
        with torch.autocast(logits.device.type, enabled=False):  # in bf16 the sign of its change would be rounding
            mean_logit = (weights.unsqueeze(1) @ logits.unsqueeze(2)).squeeze(2) / total
        entropy = (normaliser - mean_logit).squeeze(1)
        ctx.save_for_backward(weights, targets, total)
        ctx.mark_non_differentiable(entropy)
        return (logits.gather(1, targets) - normaliser).squeeze(1), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        weights, targets, total = ctx.saved_tensors
        grad = grad.unsqueeze(1)  # [N, 1]
        return (weights * (-grad / total)).scatter_add_(1, targets, grad), None


def token_statistics(hidden, targets, head, softcap, temperature):
    """Log-probs [N] of the targets [N] and entropies [N] from hidden states [N, D]."""
    logits = head(hidden).float()  # [N, V]; log-softmax in fp32 under autocast too
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return LogProb.apply(logits if temperature == 1 else logits / temperature, targets)


def base(model):
    """The causal language model itself, with `attention` in its layers; peft wraps it. Raises UserError as attention.prepare does."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention.prepare(model)
    return model


def score(model, batch, temperature):
    """Log-probs (with gradient where it is enabled) and entropies of the completion tokens, both [B, T], 0 in the padding.

    batch: from `collate`. Every chunk of the LM head but a single one is recomputed in the backward pass instead of being kept.
    Raises UserError for a model whose attention is not known.
    """
    model = base(model)
    head, softcap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    over = attention.packed(batch["rows"], batch["back"])
    out = model.base_model(**attention.inputs(batch["input_ids"], batch["position_ids"], over))
    hidden, targets = F.embedding(batch["predicts"], out.last_hidden_state[0]), batch["targets"]  # [n, D], [n]

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
