"""Attention heads: which parameters belong to head h of layer l, which of them tuning may move, and how to scale a head's output.

A head owns the rows of W_Q that make its query (and their bias) and the columns of W_O that read its output. Under grouped
queries keys and values belong to a group of heads. A slice is (parameter name, index): parameters[name][index] is a view.
"""

from contextlib import contextmanager

import torch

from data import UserError

FAMILIES = {  # model_type: path of a layer's attention; q, k, v and output projections; how q, k and v share a matrix
    **dict.fromkeys(
        "llama mistral qwen2 qwen3 gemma2".split(), ("model.layers.{}.self_attn", "q_proj k_proj v_proj o_proj", "apart")
    ),
    "phi3": ("model.layers.{}.self_attn", "qkv_proj qkv_proj qkv_proj o_proj", "stacked"),  # all q, then all k, then all v
    "gpt2": ("transformer.h.{}.attn", "c_attn c_attn c_attn c_proj", "stacked"),  # and transposed: Conv1D keeps [in, out]
    # q, k and v rows of head 0, then those of head 1, ...
    "gpt_neox": ("gpt_neox.layers.{}.attention", "query_key_value query_key_value query_key_value dense", "interleaved"),
}


def find_heads(model):
    """The slices of every head of a transformers causal LM.

    Returns a dict: "own": {(layer, head): slices of q (+ bias) and o}, "kv": {(layer, kv head): slices of k and v},
    "group": query heads that share a kv head, "outputs": each layer's output projection (its input is [B, L, H*d], head h
    at h*d:(h+1)*d), "shape": (layers, H). Norms and the output bias are no head's. Raises UserError on an unknown family.
    """
    config, modules = model.config, dict(model.named_modules())
    if config.model_type not in FAMILIES:
        raise UserError(f"cast.py does not know the heads of {config.model_type!r}; it knows {', '.join(FAMILIES)}")
    path, projections, layout = FAMILIES[config.model_type]
    layers, H = config.num_hidden_layers, config.num_attention_heads
    K = getattr(config, "num_key_value_heads", None) or H
    heads = {"own": {}, "kv": {}, "group": H // K, "outputs": [], "shape": (layers, H)}
    for layer in range(layers):
        q, k, v, o = (f"{path.format(layer)}.{name}" for name in projections.split())
        transposed = type(modules[o]).__name__ == "Conv1D"
        d = modules[o].weight.shape[0 if transposed else 1] // H  # not hidden/H: some families have wider heads

        def outputs(name, block):
            """Output features block*d .. (block+1)*d of a projection: rows of its weight (columns of a Conv1D) and its bias."""
            span = slice(block * d, (block + 1) * d)
            slices = [(f"{name}.weight", (slice(None), span) if transposed else (span,))]
            return slices + [(f"{name}.bias", (span,))] if modules[name].bias is not None else slices

        for h in range(H):
            span = slice(h * d, (h + 1) * d)
            into = [(f"{o}.weight", (span,) if transposed else (slice(None), span))]
            heads["own"][layer, h] = outputs(q, 3 * h if layout == "interleaved" else h) + into
        for j in range(K):
            blocks = {"apart": (j, j), "stacked": (H + j, H + K + j), "interleaved": (3 * j + 1, 3 * j + 2)}[layout]
            heads["kv"][layer, j] = outputs(k, blocks[0]) + outputs(v, blocks[1])
        heads["outputs"].append(modules[o])
    return heads


def trained_masks(model, heads, skipped, trainable="heads", train_kv=False):
    """Which elements move: {parameter name: bool tensor of its shape}, without the parameters of which nothing does.

    skipped: set of (layer, head); trainable: "heads", "mlp" (the MLPs and no head), or "all" (everything but the skipped
    heads); train_kv: whether K and V of the groups without a skipped head move as well.
    """
    masks, kv_moves = {}, train_kv or trainable == "all"
    frozen_groups = {(layer, h // heads["group"]) for layer, h in skipped}
    slices = [(part, trainable != "mlp" and head not in skipped) for head, part in heads["own"].items()]
    slices += [(part, trainable != "mlp" and kv_moves and group not in frozen_groups) for group, part in heads["kv"].items()]
    attention = {name for part, _ in slices for name, _ in part}
    for name, p in model.named_parameters():
        whole = trainable == "all" or trainable == "mlp" and ".mlp." in name
        if whole or name in attention:
            masks[name] = torch.full_like(p, whole, dtype=torch.bool)
    for part, moves in slices:
        for name, index in part:
            masks[name][index] = moves
    return {name: mask for name, mask in masks.items() if mask.any()}


@contextmanager
def scaled_heads(heads, gates):
    """Within it every head's output is multiplied by its gate. gates: [layers, H], or [N, layers, H] for one set a token.

    0 does what zeroing the head's columns of W_O does, 1 changes no bit. The hooks are gone afterwards, whatever happens.
    """

    def scale(layer):
        def hook(module, inputs):
            gate = gates[..., layer, :].to(inputs[0].dtype)
            return (inputs[0] * gate.repeat_interleave(inputs[0].shape[-1] // gate.shape[-1], dim=-1),)  # [1, N, H*d]

        return hook

    handles = [output.register_forward_pre_hook(scale(layer)) for layer, output in enumerate(heads["outputs"])]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
