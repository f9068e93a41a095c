"""Attention heads: whose parameters are whose, which of them move, and how to scale a head.

A query head owns the rows of W_Q that make its query (and their bias), and the columns of W_O that
read its output. Keys and values belong to a group of query heads where a model has fewer of them.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from engine.errors import UserError

# --------------------------------------------------------------------------------------------------
# Where a family keeps its heads


@dataclass(frozen=True)
class Family:
    """Where the models of a family keep their attention.

    attention: the path of a layer's attention, with {} for the layer; q, k, v, o: the names of its
    projections; packing: where the d rows of a head's q, k and v stand.
    "apart": each in a matrix of its own. "stacked": all q, then all k, then all v.
    "interleaved": q, k and v of head 0, then those of head 1, and so on.
    """

    attention: str
    q: str
    k: str
    v: str
    o: str
    packing: str


LAYER = "model.layers.{}.self_attn"
LLAMA = Family(LAYER, "q_proj", "k_proj", "v_proj", "o_proj", "apart")
PHI3 = Family(LAYER, "qkv_proj", "qkv_proj", "qkv_proj", "o_proj", "stacked")
GPT2 = Family("transformer.h.{}.attn", "c_attn", "c_attn", "c_attn", "c_proj", "stacked")
GPT_NEOX = Family(
    "gpt_neox.layers.{}.attention",
    "query_key_value",
    "query_key_value",
    "query_key_value",
    "dense",
    "interleaved",
)
FAMILIES = {  # by the model_type of a config
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "smollm3": LLAMA,
    "phi3": PHI3,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
}


@dataclass
class Slice:
    """A part of a parameter: dict(model.named_parameters())[name][index] is a view of it."""

    name: str
    index: tuple


@dataclass
class Head:
    """A query head and where its parameters are."""

    layer: int
    index: int  # its number in the layer
    group: int  # the number of the key/value head that it reads
    query: list[Slice]  # of W_Q, and of its bias where there is one
    output: Slice  # of W_O
    kv: list[Slice]  # of W_K and W_V, and of their biases: shared by the heads of the group

    @property
    def place(self):
        """(layer, index)."""
        return self.layer, self.index

    @property
    def own(self):
        """The slices that no other head shares."""
        return [*self.query, self.output]


@dataclass
class Heads:
    """The heads of a model."""

    num_layers: int
    num_heads: int  # query heads of a layer
    group_size: int  # query heads that share a key/value head
    all: list[Head]  # layer by layer
    outputs: list[torch.nn.Module]  # the output projection of each layer; it reads [..., H * d]
    layers: list[torch.nn.Module]  # the decoder's layers

    @property
    def shape(self):
        """(num_layers, num_heads)."""
        return self.num_layers, self.num_heads


def is_transposed(projection):
    """Whether a weight is [in, out], as in GPT-2, and not [out, in]."""
    return type(projection).__name__ == "Conv1D"


def feature_slices(name, projection, span):
    """The weight, and the bias where there is one, that make the output features in `span`."""
    if is_transposed(projection):
        weight = Slice(f"{name}.weight", (slice(None), span))
    else:
        weight = Slice(f"{name}.weight", (span, slice(None)))
    if projection.bias is None:
        return [weight]
    return [weight, Slice(f"{name}.bias", (span,))]


def input_slice(name, projection, span):
    """The weight that reads the input features in `span`."""
    if is_transposed(projection):
        return Slice(f"{name}.weight", (span, slice(None)))
    return Slice(f"{name}.weight", (slice(None), span))


def qkv_blocks(packing, head, group, H, K):
    """In which blocks of d rows q, k and v of a head stand. H, K: query and key/value heads."""
    if packing == "stacked":
        return head, H + group, H + K + group
    if packing == "interleaved":
        return 3 * head, 3 * group + 1, 3 * group + 2
    return head, group, group


def find_heads(model):
    """The heads of a transformers causal language model, as Heads.

    Norms and the bias of the output projection are no head's.
    Raises UserError for a family that is not in FAMILIES.
    """
    config = model.config
    modules = dict(model.named_modules())
    if config.model_type not in FAMILIES:
        raise UserError(
            f"the heads of a model of type {config.model_type!r} are not known; "
            f"known are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[config.model_type]
    H = config.num_attention_heads
    K = getattr(config, "num_key_value_heads", None) or H
    heads = []
    outputs = []
    layers = []
    for layer in range(config.num_hidden_layers):
        path = family.attention.format(layer)
        layers.append(modules[path.rpartition(".")[0]])
        q = f"{path}.{family.q}"
        k = f"{path}.{family.k}"
        v = f"{path}.{family.v}"
        o = f"{path}.{family.o}"
        outputs.append(modules[o])
        inputs_of_o = modules[o].weight.shape[0 if is_transposed(modules[o]) else 1]
        d = inputs_of_o // H  # not hidden_size // H: some families have wider heads
        spans = [slice(block * d, (block + 1) * d) for block in range(3 * H)]
        for index in range(H):
            group = index // (H // K)
            in_q, in_k, in_v = qkv_blocks(family.packing, index, group, H, K)
            query = feature_slices(q, modules[q], spans[in_q])
            keys = feature_slices(k, modules[k], spans[in_k])
            values = feature_slices(v, modules[v], spans[in_v])
            output = input_slice(o, modules[o], spans[index])
            heads.append(Head(layer, index, group, query, output, keys + values))
    return Heads(config.num_hidden_layers, H, H // K, heads, outputs, layers)


# --------------------------------------------------------------------------------------------------
# Which elements move, whether the others did not, and how much a head says


def trained_masks(model, heads, skipped, trainable="heads", train_kv=False):
    """Which elements of which parameters move in tuning.

    skipped: set of (layer, index), the heads that do not move;
    trainable: "heads" (q and o of the other heads), "mlp" (the MLPs and no head), or "all"
        (everything but the skipped heads);
    train_kv: whether K and V move too, in groups without a skipped head; they do with "all".
    Returns {parameter name: bool tensor of its shape}, without parameters of which nothing moves.
    """
    some_heads_move = trainable != "mlp"
    some_kv_move = trainable == "all" or (trainable == "heads" and train_kv)
    frozen_groups = {(head.layer, head.group) for head in heads.all if head.place in skipped}
    of_heads = {part.name for head in heads.all for part in head.own + head.kv}
    masks = {}
    for name, p in model.named_parameters():
        whole = trainable == "all" or (trainable == "mlp" and ".mlp." in name)
        if whole or name in of_heads:
            masks[name] = torch.full_like(p, whole, dtype=torch.bool)
    for head in heads.all:
        for part in head.own:
            masks[part.name][part.index] = some_heads_move and head.place not in skipped
        for part in head.kv:
            group_moves = (head.layer, head.group) not in frozen_groups
            masks[part.name][part.index] = some_kv_move and group_moves
    return {name: mask for name, mask in masks.items() if mask.any()}


@dataclass
class Update:
    """What tuning did to a model."""

    norm: float  # L2 norm of the change
    frozen_elements: int
    frozen_identical: bool  # whether every bit of the frozen elements is as it was


def weights_of(model):
    """A copy of all parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def update_of(model, start, masks):
    """The Update of a model since `start` (of weights_of). masks: what was to move."""
    bits_of_size = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    square = 0.0
    frozen_elements = 0
    identical = True
    for name, p in model.named_parameters():
        before = start[name]
        after = p.detach()
        square += (after - before).cpu().double().pow(2).sum().item()
        bits = bits_of_size[p.element_size()]  # as numbers, 0 and -0 would be the same
        changed = after.contiguous().view(bits) != before.contiguous().view(bits)
        frozen = ~masks[name] if name in masks else torch.ones_like(changed)
        frozen_elements += int(frozen.sum())
        identical = identical and not (changed & frozen).any().item()
    return Update(math.sqrt(square), frozen_elements, identical)


def scale_inputs(gate, projection, inputs):
    """A forward pre-hook of an output projection.

    gate: [H] or [R, H]; inputs: one tensor, [R, N, H * d]. Every d inputs are multiplied by theirs.
    """
    x = inputs[0]
    d = x.shape[-1] // gate.shape[-1]
    gate = gate.to(x.dtype).repeat_interleave(d, dim=-1).unsqueeze(-2)  # [1 or R, 1, H * d]
    return (x * gate,)


@contextmanager
def scaled_heads(heads, gates):
    """Within it the output of every head is multiplied by its gate.

    gates: [layers, H], or [R, layers, H] for one set for each of the R rows of a batch.
    A gate of 0 does what zeroing the head's columns of W_O does. A gate of 1 changes no bit.
    The hooks are gone afterwards, whatever happens.
    """
    handles = []
    for layer, projection in enumerate(heads.outputs):
        hook = partial(scale_inputs, gates[..., layer, :])
        handles.append(projection.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_layers(heads):
    """Within it the list that it gives is filled with what each layer returns, in their order."""
    returned = []
    handles = [
        layer.register_forward_hook(lambda module, inputs, output: returned.append(output))
        for layer in heads.layers
    ]
    try:
        yield returned
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def repeated_layers(heads, returned, first):
    """Within it the layers before `first` return at once what they returned before.

    returned: of `recorded_layers`. What changes only from layer `first` on costs only the layers
    from there.
    """
    skipped = heads.layers[:first]
    for layer, output in zip(skipped, returned):
        layer.forward = lambda *arguments, output=output, **options: output
    try:
        yield
    finally:
        for layer in skipped:
            del layer.forward
