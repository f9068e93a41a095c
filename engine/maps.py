"""The file of a conflict map: proof that it is whole, and that it is the map of these weights."""

import torch

from engine.errors import UserError
from engine.files import digest, fingerprint, read_json


def checksum(content):
    """sha256 over a map, its own checksum left out."""
    return digest({**content, "checksum": None})


def read_map(path, model):
    """The conflict map in a file, as a dict.

    Raises UserError when there is none, when it is damaged or changed, and when it is the map of
    other weights than the model's.
    """
    if not path.exists():
        raise UserError(
            f"{path} is not there: run --diagnose first, with the same --model and --output-dir"
        )
    content = read_json(path)
    if content.get("checksum") != checksum(content):
        raise UserError(
            f"{path} is damaged or was changed by hand (its checksum does not fit): "
            "run --diagnose again"
        )
    if content.get("fingerprint") != fingerprint(model.named_parameters()):
        raise UserError(
            f"{path} is the map of other weights ({content.get('model')}): "
            "run --diagnose with this --model first"
        )
    return content


def scores_of(path, content, shape):
    """The C of a map as a tensor [layers, H]. shape: (layers, H) of the model.

    Raises UserError when they are not finite numbers of that shape.
    """
    try:
        scores = torch.tensor(content.get("C"), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        scores = torch.empty(0)
    if scores.shape != shape or not scores.isfinite().all():
        raise UserError(
            f"{path} does not hold a score for each of the {shape[0]} x {shape[1]} heads: "
            "run --diagnose again"
        )
    return scores
