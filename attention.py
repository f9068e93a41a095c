"""Attention: which tokens see each other. The one part of a transformer that does not work on every token by itself.

So the batches of rollout.py need no padding, and hold a prompt once for all its G completions: their tokens lie end to end,
[1, N], embedded, normalised and multiplied one by one, and only here are they put into rows. transformers calls the function
`attention` in every layer of a model (see `prepare`), and hands it `over`, which says what the rows are:

    packed     rows of packed tokens, each seen causally: to score completions
    prefilled  the same rows of prompts, whose keys and values are kept in a cache
    cached     one new token a row, over the keys and values in the cache: to decode

    model(**inputs(ids, positions, over))      transformers hands what it does not know on to every layer
    attention(module, query, ..., over)        is what a layer calls
    over(layer, query, key, value, window, core)   puts packed tokens, [1, H, N, d], into rows
    core(query, key, value, sees)              is plain softmax attention over rows, see `attend`

Column i of the cache is position i of its row, so that the causal mask, a sliding window and rows of unequal length are all
one comparison of positions. With 8 completions a prompt, scoring and updating take 0.7 of the time that they take with a copy of it
for each (2 cores, experiments/scaling.py).
"""

from functools import partial

import torch
import torch.nn.functional as F

from data import UserError

NAME = "rows"  # under which transformers knows `attention`


def attend(query, key, value, sees, *, scaling=None, softcap=None):
    """softmax(query key^T * scaling) value. query: [B, H, Q, d]; key, value: [B, K, L, d], where K divides H.

    sees: bool, broadcastable to [B, 1, Q, L], which columns a query sees, or None: a single query all of them, others causally.
    softcap: Gemma's bound on the scores. Returns [B, H, Q, d].
    """
    B, H, Q, d = query.shape
    if Q == 1:  # the heads that share a key as the queries of one head: no key is copied
        query = query.reshape(B, key.shape[1], -1, d)
    causal, groups = sees is None and Q > 1, query.shape[1] // key.shape[1]
    if not softcap and not (Q == 1 and query.device.type == "cpu"):  # torch's own is slow on a CPU for a single query
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=sees, is_causal=causal, scale=scaling, enable_gqa=groups > 1)
        return out.reshape(B, H, Q, -1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query * (scaling or d**-0.5)) @ key.transpose(2, 3)  # [B, H, Q, L]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        sees = torch.ones(Q, Q, dtype=torch.bool, device=query.device).tril()
    if sees is not None:
        scores = scores.masked_fill(~sees, torch.finfo(scores.dtype).min)  # not -inf: a row of padding sees nothing
    return (torch.softmax(scores.float(), dim=-1).to(value.dtype) @ value).reshape(B, H, Q, -1)


def attention(module, query, key, value, attention_mask, over=None, scaling=None, softcap=None, sliding_window=None, **_):
    """What transformers calls in every layer. over: see the top of this file; without it the call is somebody else's."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves what was rotated in fp32
    core = partial(attend, scaling=scaling, softcap=softcap)
    if over is None:
        out = core(query, key, value, attention_mask)
    else:
        out = over(module.layer_idx, query, key, value, sliding_window, core)
    return out.transpose(1, 2).contiguous(), None  # [B, Q, H, d]


def inputs(input_ids, position_ids, over):
    """The arguments of a model's forward pass over packed tokens. A mask is among them, or transformers would make its own, of [N, N]."""
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)  # never looked at: `over` knows better
    return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask, "use_cache": False, "over": over}


def prepare(model):
    """Puts `attention` into every layer, once, and checks that the model still computes the same.

    Raises UserError for a model whose attention is more than this file knows (or does not go through transformers' interface).
    """
    own = model.config._attn_implementation
    if own == NAME:
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # for calls without `over`
    training, device = model.training, model.device
    ids, positions = torch.arange(6, device=device).view(2, 3) % model.config.vocab_size, torch.arange(3, device=device)
    rows = torch.tensor([[0, 1, 2], [3, 4, 5]], device=device)
    with torch.no_grad():
        model.eval()
        expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        model.set_attn_implementation(NAME)
        inside, windows = packed([rows], rows.flatten()), {}

        def over(layer, query, key, value, window, core):
            windows[layer] = window
            return inside(layer, query, key, value, window, core)

        try:
            found = model.base_model(**inputs(ids.view(1, 6), positions.repeat(2).unsqueeze(0), over)).last_hidden_state[0]
        except (TypeError, ValueError, RuntimeError):  # it takes no `over`, or no such mask
            found = torch.full_like(expected, float("nan"))
        model.train(training)
    tolerance = 1e-3 if expected.dtype == torch.float32 else 0.1
    kinds = getattr(model.config, "layer_types", None) or []
    masked = any(kind != "full_attention" and not windows.get(layer) for layer, kind in enumerate(kinds))  # by a mask that `over` never sees
    if masked or not (found - expected).abs().max() <= tolerance * expected.abs().max():
        model.set_attn_implementation(own)  # or a second call would find it prepared
        raise UserError(f"the attention of {model.config.model_type} is more than softmax(q k^T) v in rows: attention.py does not know it")


def gather(x, index):
    """The heads of packed tokens, [1, H, N, d], at the places of each row, [R, L]: [R, H, L, d].

    As a look-up in a table of N vectors, whose gradient is summed fast where several rows hold the same (prompt) token.
    """
    table = x[0].transpose(0, 1)  # [N, H, d]
    return F.embedding(index, table.flatten(1)).unflatten(2, table.shape[1:]).transpose(1, 2)


def packed(rows, back):
    """`over` for packed tokens. rows: list of [R, L], where the tokens of a row stand among the N, in order, then any padding;
    back: [N], where each token's output stands among those of all the rows, one after the other."""

    def over(layer, query, key, value, window, core):
        outputs = []
        for index in rows:
            L, sees = index.shape[1], None
            if window and window < L:
                near = torch.ones(L, L, dtype=torch.bool, device=index.device)
                sees = near.tril() & near.triu(1 - window)
            out = core(*(gather(x, index) for x in (query, key, value)), sees)  # [R, H, L, d]
            outputs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))  # [R * L, H * d]
        out = F.embedding(back, torch.cat(outputs))  # [N, H * d]
        return out.unflatten(1, (query.shape[1], -1)).transpose(0, 1).unsqueeze(0)

    return over


def prefilled(rows, cache, size, length, copies):
    """`over` for packed prompts, whose keys and values fill the first P * copies rows of the cache.

    rows: [P, L], where the tokens of each prompt stand, then padding (0); cache: {layer: (keys, values)}, made here where it is empty,
    of `size` rows of `length` columns each.
    """
    (P, L), real = rows.shape, rows > 0
    real[0, 0] = True  # the first token of all: its place is 0 too
    inside = packed([rows], real.flatten().nonzero().squeeze(1))

    def over(layer, query, key, value, window, core):
        if layer not in cache:
            cache[layer] = tuple(x.new_zeros(size, x.shape[1], length, x.shape[3]) for x in (key, value))
        for kept, new in zip(cache[layer], (key, value)):
            kept[: P * copies].unflatten(0, (P, copies))[:, :, :, :L] = gather(new, rows).unsqueeze(1)
        return inside(layer, query, key, value, window, core)

    return over


def cached(cache, position, length):
    """`over` for one new token a row: the first rows of the cache, as many as there are tokens, up to column `length`.

    position: [B] of the new tokens, which join the cache.
    """
    row, columns = torch.arange(len(position), device=position.device), torch.arange(length, device=position.device)
    behind = (columns <= position.unsqueeze(1))[:, None, None]  # [B, 1, 1, length]

    def over(layer, query, key, value, window, core):
        keys, values = cache[layer]
        keys[row, :, position], values[row, :, position] = key[:, :, 0], value[:, :, 0]
        sees = behind & (columns > position.unsqueeze(1) - window)[:, None, None] if window else behind
        return core(query, keys[: len(row), :, :length], values[: len(row), :, :length], sees)

    return over


def keep_rows(cache, kept, count):
    """Moves rows within the first `count` rows of the cache, so that those of `kept` are the first. Returns which row is now where.

    kept: int64, distinct rows below count. Only rows that must move are copied.
    """
    size = len(kept)
    stays = torch.zeros(count, dtype=torch.bool, device=kept.device)
    stays[kept] = True
    order = torch.arange(size, device=kept.device)
    holes, movers = (~stays[:size]).nonzero().squeeze(1), stays[size:].nonzero().squeeze(1) + size
    order[holes] = movers
    for tensors in cache.values():
        for x in tensors:
            x[holes] = x[movers]
    return order


def grow(cache, count, columns):
    """Appends so many empty columns to the cache, and lets go of its rows beyond the first `count`."""
    for layer, tensors in cache.items():
        cache[layer] = tuple(F.pad(x[:count], (0, 0, 0, columns)) for x in tensors)
