"""Rollout: sample completions from a language model, and score them. It knows models, not rewards.

`sample` draws G completions for each prompt. The prompts are prefilled once, and their key/value
cache is repeated for the G samples. Rows leave the batch when they have ended. A token is drawn
from plain softmax(logits / temperature): top_k, top_p or a repetition penalty in the model's
generation_config would make the sampler another distribution than the one whose gradient we take.

`score` gives the log-prob of every completion token, with gradient, and the entropy of the
distribution that it came from. Both are taken at the sampler's temperature, so that the log-probs
of sampler and scorer agree before any update. A row holds a prompt and several of its completions,
end to end, and the attention mask says who sees whom:

    row                10 11 12 | 20 21 22 | 30 31          a prompt and two completions
    completion_number   0  0  0 |  1  1  1 |  2  2          a token sees what stands before it
    position_ids        0  1  2 |  3  4  5 |  3  4          in the prompt and in its own completion

So a prompt is computed once for its completions, and hardly anything is computed for padding. The
model's own forward pass does the work, so its logits are right whatever the model. `check_model`
compares a few tokens before a run, and says whether rows may hold several completions.
"""

import inspect
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.utils.checkpoint import checkpoint

from engine.errors import UserError, reason

ROW_TOKENS = 1024  # a row takes completions of its prompt up to this length
LOGITS_AT_ONCE = 2**24  # logits in one chunk of the LM head: 64 MB in fp32


@dataclass
class Sample:
    """One completion. The sampler fills in the first four fields, a training loop the others."""

    prompt_ids: list[int]
    completion_ids: list[int]  # up to and including the stop token
    logp: list[float] | None = None  # of each completion token under the policy that sampled
    truncated: bool = False  # whether it was cut at the limit, before a stop token
    problem: dict | None = None  # what was asked
    text: str = ""  # the completion, decoded
    task_reward: float = 0.0  # what the task says of it
    reward: float = 0.0  # the same, rescaled, with a punishment for length
    advantage: float = 0.0  # the reward against those of its group


# --------------------------------------------------------------------------------------------------
# Sampling


def draw(logits, uniform, temperature):
    """One token a row from softmax(logits / temperature), by inverting the distribution function.

    logits: [B, V]; uniform: [B] in [0, 1); temperature 0 takes the most likely token.
    Returns the tokens [B] and their log-probs [B]. One number decides a row, so what a row draws
    does not depend on which other rows are in the batch.
    """
    logits = logits.float()
    if temperature not in (0, 1):
        logits = logits / temperature
    probs = torch.softmax(logits, dim=-1)  # [B, V]
    if temperature == 0:
        token = logits.argmax(dim=-1, keepdim=True)  # [B, 1]
    else:
        cdf = probs.cumsum(dim=-1)
        # At 0 the first token would be drawn, however small its probability. And the sum of the
        # probabilities is 1 only up to rounding.
        threshold = uniform.clamp(min=2**-25).unsqueeze(1) * cdf[:, -1:]
        token = torch.searchsorted(cdf, threshold, right=True).clamp(max=logits.shape[1] - 1)
    logp = probs.gather(1, token).log()
    return token.squeeze(1), logp.squeeze(1)


def left_padded(prompts, device):
    """Prompts as ids [P, L] and an attention mask [P, L], which is 0 on the padding at the left."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def accepted(module, **options):
    """Those of the options that the module's forward pass takes: not every family has positions."""
    known = inspect.signature(module.forward).parameters
    return {name: value for name, value in options.items() if name in known}


def step_forward(model, ids, attention_mask, kv_cache=None):
    """Logits [B, V] behind the last of the ids [B, Q], and the cache with their keys and values.

    attention_mask: [B, columns of the cache + Q].
    """
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # 0 on the padding, too
    out = model(
        input_ids=ids,
        attention_mask=attention_mask,
        past_key_values=kv_cache,
        use_cache=True,
        **accepted(model, position_ids=positions[:, -ids.shape[1] :], logits_to_keep=1),
    )
    return out.logits[:, -1], out.past_key_values


@torch.inference_mode()
def sample(
    model, prompts, num_generations, *, max_completion_length, temperature, stop_ids, generator
):
    """Samples `num_generations` completions of each prompt, all at once.

    prompts: list of lists of token ids; max_completion_length: in tokens, the stop token included;
    temperature: 0 is greedy; stop_ids: list of the tokens that end a completion; generator: a CPU
    torch.Generator, the only source of randomness, so that every device draws alike.
    Returns a list of Sample, those of one prompt next to each other. The caller bounds the rows.
    """
    model = causal_lm(model).eval()
    device = model.device
    G = num_generations
    T = max_completion_length
    B = len(prompts) * G
    uniforms = torch.rand(B, T, generator=generator).to(device)  # a row's own numbers
    stop = torch.tensor(stop_ids, dtype=torch.long, device=device)
    tokens = torch.zeros(B, T, dtype=torch.long, device=device)
    logps = torch.zeros(B, T, device=device)
    lengths = torch.full((B,), T, device=device)
    truncated = torch.ones(B, dtype=torch.bool, device=device)  # until a row draws a stop token

    # Each prompt is prefilled once. Its row of the cache then becomes G rows.
    ids, mask = left_padded(prompts, device)  # [P, L]
    logits, kv_cache = step_forward(model, ids, mask)
    rows = torch.arange(B, device=device)  # the samples that are still in the batch
    kv_cache.reorder_cache(rows // G)
    logits, mask = logits[rows // G], mask[rows // G]  # [B, V], [B, L]

    for t in range(T):
        token, logp = draw(logits, uniforms[rows, t], temperature)
        tokens[rows, t] = token
        logps[rows, t] = logp
        ended = torch.isin(token, stop)
        if ended.any():
            lengths[rows[ended]] = t + 1
            truncated[rows[ended]] = False
            going = (~ended).nonzero().squeeze(1)
            rows, token, mask = rows[going], token[going], mask[going]
            kv_cache.reorder_cache(going)
        if len(rows) == 0 or t == T - 1:
            break
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        logits, kv_cache = step_forward(model, token.unsqueeze(1), mask, kv_cache)

    samples = []
    for row, length in enumerate(lengths.tolist()):
        completion = tokens[row, :length].tolist()
        logp = logps[row, :length].tolist()
        samples.append(Sample(prompts[row // G], completion, logp, truncated[row].item()))
    return samples


# --------------------------------------------------------------------------------------------------
# Scoring


def split_evenly(items, parts):
    """Cuts a list into `parts` lists of neighbours, whose lengths differ by one at most.

    An empty list gives no part.
    """
    if not items:
        return []
    cuts = [i * len(items) // parts for i in range(parts + 1)]
    return [items[start:end] for start, end in zip(cuts[:-1], cuts[1:])]


def sample_length(s):
    """Tokens of a sample's prompt and completion together."""
    return len(s.prompt_ids) + len(s.completion_ids)


def fill_rows(samples, share_prompts):
    """The samples of each row, as a list of lists. share_prompts: see `collate`.

    A row takes neighbours of one prompt, up to ROW_TOKENS. A longer sample has a row of its own.
    """
    rows = []
    tokens = 0
    for s in samples:
        same_prompt = rows and rows[-1][0].prompt_ids == s.prompt_ids
        tokens += len(s.completion_ids)
        if not (share_prompts and same_prompt and tokens <= ROW_TOKENS):
            rows.append([])
            tokens = sample_length(s)
        rows[-1].append(s)
    return rows


def micro_batches(samples, max_tokens, share_prompts=True):
    """Cuts samples into lists for one forward pass each, with rows of like length together.

    max_tokens: in all rows of a list, padding included; a row that is longer stands alone.
    share_prompts: see `collate`.
    """
    rows = []  # (tokens, samples)
    for row in fill_rows(samples, share_prompts):
        rows.append((sample_length(row[0]) + sum(len(s.completion_ids) for s in row[1:]), row))
    parts = []
    count = 0
    for tokens, row in sorted(rows, key=lambda pair: pair[0]):
        count += 1
        if not parts or count * tokens > max_tokens:  # this row is the longest so far
            parts.append([])
            count = 1
        parts[-1] += row
    return parts


def collate(samples, device, share_prompts=True):
    """Samples as the tensors that `score` and the losses take.

    share_prompts: a row holds a prompt and several completions of it (see the top of this file).

    Returns a dict of R rows of N tokens, for B samples of at most T completion tokens, n in all:
    input_ids, position_ids, completion_number: [R, N], completion_number is -1 on the padding;
    predicts: [n], where in the flat [R * N] the completion tokens are predicted; targets: [n],
    which tokens they are, sample by sample; mask: bool [B, T], True on completion tokens. The mask
    comes from lengths, never from token ids: the padding token ends the text of many models.
    """
    rows = []  # of (token, position, completion number)
    predicts = []  # (row, column) for each completion token
    for row_samples in fill_rows(samples, share_prompts):
        prompt = row_samples[0].prompt_ids
        row = [(token, position, 0) for position, token in enumerate(prompt)]
        for number, s in enumerate(row_samples, start=1):
            inputs = s.completion_ids[:-1]  # the last token predicts nothing
            columns = [len(prompt) - 1, *range(len(row), len(row) + len(inputs))]
            predicts += [(len(rows), column) for column in columns]
            row += [(token, len(prompt) + i, number) for i, token in enumerate(inputs)]
        rows.append(row)

    N = max(map(len, rows))
    grid = [row + [(0, 0, -1)] * (N - len(row)) for row in rows]
    grid = torch.tensor(grid, device=device)  # [R, N, 3]
    targets = [token for s in samples for token in s.completion_ids]
    lengths = torch.tensor([[len(s.completion_ids)] for s in samples], device=device)
    return {
        "input_ids": grid[..., 0],
        "position_ids": grid[..., 1],
        "completion_number": grid[..., 2],
        "predicts": torch.tensor([row * N + column for row, column in predicts], device=device),
        "targets": torch.tensor(targets, device=device),
        "mask": torch.arange(int(lengths.max()), device=device) < lengths,
    }


def attention_mask(completion_number, dtype):
    """Who sees whom. completion_number: [R, N], see `collate`; dtype: of an additive mask, or bool.

    Rows of one completion need the ordinary mask [R, N] only. Others get [R, 1, N, N]: a token sees
    what stands before it in the prompt and in its own completion.
    """
    if completion_number.max() <= 1:
        return (completion_number >= 0).long()
    of_query = completion_number.unsqueeze(2)
    of_key = completion_number.unsqueeze(1)
    sees = (of_key == 0) | (of_key == of_query)  # [R, N, N]
    sees = sees.tril().unsqueeze(1)
    if dtype == torch.bool:
        return sees
    nothing_added = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return nothing_added.masked_fill(~sees, torch.finfo(dtype).min)


def causal_lm(model):
    """The causal language model itself: peft wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model):
    """The part of a causal language model that turns tokens into hidden states.

    Raises ValueError for a model that has no such part.
    """
    from transformers import PreTrainedModel

    parts = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if not parts:
        raise ValueError("it has no decoder apart from its head")
    inner = getattr(parts[0], "decoder", None)  # some families wrap it once more
    return inner if isinstance(inner, PreTrainedModel) else parts[0]


@contextmanager
def decoder_returns(model, outputs):
    """Within it the model's decoder returns `outputs` at once, so that only the LM head works."""
    decoder = decoder_of(model)
    decoder.forward = lambda *args, **options: outputs
    try:
        yield
    finally:
        del decoder.forward


def entropy_of(logits):
    """The entropy of softmax(logits) in nats. logits: [n, V] in fp32. Returns [n], no gradient.

    With x = logits - max: H = log(sum exp x) - sum x exp(x) / sum exp x. Neither term is negative,
    so nothing cancels, and the 1 of the largest logit stays out of the sum, so that log1p keeps
    the digits of a distribution that is nearly certain. The sign of a small dH depends on them.
    """
    with torch.no_grad():
        top, best = logits.max(dim=-1, keepdim=True)
        shifted = (logits - top).clamp(min=-1e4)  # a logit may be -inf
        weights = shifted.exp()
        mean = (shifted * weights).sum(dim=-1) / weights.sum(dim=-1)
        rest = weights.scatter_(1, best, 0.0).sum(dim=-1)
        return torch.log1p(rest) - mean


def token_statistics(model, outputs, hidden, targets, temperature):
    """Log-probs [n] of the targets [n] and entropies [n] from hidden states [n, D].

    The model's own forward pass makes the logits, with the decoder's work left out: what it does to
    them behind its head, a scale or a soft cap, is done here too. outputs: the decoder's.
    """
    outputs = replace(outputs, last_hidden_state=hidden.unsqueeze(0), past_key_values=None)
    with decoder_returns(model, outputs):
        logits = model(input_ids=targets.unsqueeze(0), use_cache=False).logits[0].float()  # [n, V]
    if temperature != 1:
        logits = logits / temperature
    logp = torch.log_softmax(logits, dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    return logp, entropy_of(logits)


def score(model, batch, temperature):
    """Log-probs, with gradient, and entropies of the completion tokens at a temperature.

    batch: from `collate`. Returns two tensors [B, T], which are 0 outside the mask. No [B, T, V]
    tensor ever exists: the LM head works in chunks, which the backward pass computes anew.
    """
    model = causal_lm(model)
    decoder = decoder_of(model)
    # Eager attention adds its mask to the scores, the others take one of True and False.
    mask_dtype = model.dtype if model.config._attn_implementation == "eager" else torch.bool
    outputs = decoder(
        input_ids=batch["input_ids"],
        attention_mask=attention_mask(batch["completion_number"], mask_dtype),
        use_cache=False,
        **accepted(decoder, position_ids=batch["position_ids"]),
    )
    hidden = outputs.last_hidden_state.flatten(0, 1)  # [R * N, D]
    hidden = hidden.index_select(0, batch["predicts"])  # [n, D]

    chunk = max(64, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    logps, entropies = [], []
    for h, y in zip(hidden.split(chunk), batch["targets"].split(chunk)):
        arguments = (model, outputs, h, y, temperature)
        if torch.is_grad_enabled() and len(hidden) > chunk:
            logp, entropy = checkpoint(token_statistics, *arguments, use_reentrant=False)
        else:
            logp, entropy = token_statistics(*arguments)
        logps.append(logp)
        entropies.append(entropy)
    empty = torch.zeros(batch["mask"].shape, device=hidden.device)  # [B, T]
    logp = empty.masked_scatter(batch["mask"], torch.cat(logps))
    return logp, empty.masked_scatter(batch["mask"], torch.cat(entropies))


# --------------------------------------------------------------------------------------------------
# The check before a run


@torch.no_grad()
def own_logp(model, samples):
    """The log-probs of all completion tokens, [n], from the model's logits of each row alone."""
    parts = []
    for s in samples:
        ids = torch.tensor([s.prompt_ids + s.completion_ids], device=model.device)
        kept = len(s.completion_ids) + 1  # the last of these predicts nothing
        out = model(input_ids=ids, use_cache=False, **accepted(model, logits_to_keep=kept))
        logits = out.logits[0, -kept:-1]
        targets = ids[0, len(s.prompt_ids) :].unsqueeze(1)
        parts.append(torch.log_softmax(logits.float(), dim=-1).gather(1, targets).squeeze(1))
    return torch.cat(parts)


@torch.no_grad()
def scored_logp(model, samples, share_prompts):
    """The same log-probs, [n], from `score`."""
    batch = collate(samples, model.device, share_prompts)
    return score(model, batch, temperature=1.0)[0][batch["mask"]]


def shortest_window(config):
    """The fewest tokens that a layer's attention looks back on, or None where there is no limit."""
    windows = [
        value
        for name, value in vars(config).items()
        if name.endswith(("window", "window_size", "chunk_size"))
        and isinstance(value, int)
        and value > 1
    ]
    return min(windows, default=None)


def check_model(model, longest):
    """Compares `sample` and `score` with the model's own logits, on a few tokens.

    longest: tokens of prompt and completion together, at most, that the run may see.
    Returns whether a row may hold several completions of a prompt: not where a window is shorter
    than a row, or where a model makes something else of the mask.
    Raises UserError for a model that `sample` or `score` cannot get right.
    """
    model = causal_lm(model).eval()
    kind = model.config.model_type
    config = model.config.get_text_config()
    window = shortest_window(config) or longest
    lengths = (3, 8)
    if window < longest:  # then look at what happens beyond it, too
        lengths = (3, window + 8)
    prompts = [[(7 * i + 3) % config.vocab_size for i in range(length)] for length in lengths]
    # fp32 weights are compared in fp32, on a GPU too. Rounding in bf16 was seen to move a log-prob
    # of SmolLM2-135M by up to 0.27.
    tolerance = 2e-3 if model.dtype == torch.float32 else 0.6

    def gap(found):
        return (found - expected).abs().max().item()

    try:
        samples = sample(
            model,
            prompts,
            3,
            max_completion_length=6,
            temperature=1.0,
            stop_ids=list(range(0, config.vocab_size, 5)),
            generator=torch.Generator().manual_seed(0),
        )
        expected = own_logp(model, samples)
        sampled = torch.tensor([logp for s in samples for logp in s.logp], device=model.device)
        gaps = [gap(sampled), gap(scored_logp(model, samples, share_prompts=False))]
    except Exception as error:  # whatever a model raises whose forward pass is of another form
        raise UserError(f"a model of type {kind} cannot be run here: {reason(error)}") from error
    if not all(off <= tolerance for off in gaps):  # NaN is off, too
        raise UserError(
            f"a model of type {kind} cannot be run here: beside its log-probs of each row alone "
            f"those of sampling are off by up to {gaps[0]:.2g}, those of scoring by {gaps[1]:.2g}"
        )
    if shortest_window(config) and max(longest, ROW_TOKENS) > window:
        return False
    try:
        return gap(scored_logp(model, samples, share_prompts=True)) <= tolerance
    except Exception:  # the model takes no such mask
        return False
