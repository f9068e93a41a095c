"""Fast matrix products on a CPU. The methods do not need this file: it makes linear layers faster, and nothing else.

On a CPU torch multiplies fp32 matrices by MKL. oneDNN, which torch carries too, is twice as fast in the same precision on AMD
processors with AVX-512, whose units MKL leaves out (measured once on 2 cores of an EPYC: 460 against 200 GFLOP/s); and everywhere a product of few
rows, as in decoding, is faster where the weight was packed beforehand (measured once, a Llama of 25M parameters on an EPYC without
AVX-512: it decodes in 0.62 of the time). `use_fastest_product` measures both and takes oneDNN where it is clearly ahead.
"""

import time
from contextlib import contextmanager
from functools import reduce

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

ROWS = 256  # of a block of a product by oneDNN
WORTHWHILE = 2**15  # weights of a layer; for smaller ones a call to oneDNN costs what it saves


def onednn(x, weight, bias=None):
    """x @ weight.T + bias by the operator to which torch's own compiler turns linear layers on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def filled(block):
    """The rows and so many rows of zeros that they are ROWS."""
    return block if len(block) == ROWS else F.pad(block, (0, 0, 0, ROWS - len(block)))


def multiply(x, weight, bias=None):
    """`onednn` for [N, in] in blocks of ROWS rows: it compiles a kernel for every shape, which takes 1 ms and up to 4 MB each."""
    blocks = [onednn(filled(block), weight, bias) for block in x.split(ROWS)]
    return torch.cat(blocks)[: len(x)] if len(blocks) > 1 else blocks[0][: len(x)]


class Product(torch.autograd.Function):
    """`multiply` with its gradients, which are two more products."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return multiply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        shape, x, grad = x.shape, x.flatten(0, -2), grad.flatten(0, -2)  # [N, in], [N, out]
        for_x, for_weight, for_bias = ctx.needs_input_grad
        if for_weight:
            blocks = zip(grad.split(ROWS), x.split(ROWS))
            weight_grad = reduce(torch.Tensor.add_, (onednn(filled(block_grad).t(), filled(block).t()) for block_grad, block in blocks))
        return (
            multiply(grad, weight.t()).view(shape) if for_x else None,
            weight_grad if for_weight else None,
            grad.sum(dim=0) if for_bias else None,
        )


class OneDNNLinear(torch.nn.Linear):
    """torch.nn.Linear, multiplied by oneDNN: from half of ROWS rows on where `many`, by fewer while its weight is packed."""

    many = few = False  # whether oneDNN is faster for many rows, for few
    packed = None  # the weight in oneDNN's own layout, while `packed_weights` holds

    def forward(self, x):
        rows = x.shape[:-1].numel()
        if rows >= ROWS // 2 and self.many:
            return Product.apply(x, self.weight, self.bias)
        if rows < ROWS // 2 and self.packed is not None:
            return onednn(x, self.packed, self.bias)
        return super().forward(x)


def least_seconds(call, laps=15):
    """The least time that a call takes, after one more to warm up: noise only ever adds."""
    seconds = []
    for _ in range(laps + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def onednn_is_faster():
    """Measures two products both ways: whether oneDNN is faster for many rows and, with a packed weight, for few.

    Faster is a quarter less time for many rows and a tenth for few, so that a busy moment does not decide.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False, False
    many, few, weight = torch.randn(512, 512), torch.randn(32, 512), torch.randn(2048, 512)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(few))
    return (
        least_seconds(lambda: onednn(many, many)) < 0.75 * least_seconds(lambda: F.linear(many, many)),
        least_seconds(lambda: onednn(few, packed)) < 0.9 * least_seconds(lambda: F.linear(few, weight)),
    )


def use_fastest_product(model):
    """Makes the model's fp32 linear layers OneDNNLinear where that is clearly faster here; returns whether it is anywhere."""
    many, few = onednn_is_faster()
    for module in model.modules() if many or few else ():
        if type(module) is torch.nn.Linear and module.weight.dtype == torch.float32 and module.weight.numel() > WORTHWHILE:
            module.__class__ = OneDNNLinear
            module.many, module.few = many, few
    return many or few


@contextmanager
def packed_weights(model, rows):
    """Within it every OneDNNLinear that gains by it also holds its weight packed for products of about so many rows.

    For as long as no weight changes. The copy takes the room of the gradients, which are not there while sampling.
    """
    layers = [module for module in model.modules() if isinstance(module, OneDNNLinear) and module.few]
    try:
        for layer in layers:
            layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        yield
    finally:
        for layer in layers:
            layer.packed = None
