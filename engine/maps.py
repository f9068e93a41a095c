"""The file of a conflict map: proof that it is whole, and that it is the map of these weights."""

import hashlib
import json

import torch

from engine.errors import UserError


def fingerprint(model):
    """sha256 over the names, types, shapes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        digest.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def checksum(content):
    """sha256 over a map, its own checksum left out."""
    text = json.dumps({**content, "checksum": None}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_map(path, model):
    """The conflict map in a file, as a dict.

    Raises UserError when there is none, when it is damaged or changed, and when it is the map of
    other weights than the model's.
    """
    try:
        content = json.loads(path.read_text())
        intact = content["checksum"] == checksum(content)
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there: run --diagnose first, with the same --model and --output-dir"
        ) from None
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise UserError(
            f"{path} is damaged or was changed by hand (its checksum does not fit): "
            "run --diagnose again"
        )
    if content["fingerprint"] != fingerprint(model):
        raise UserError(
            f"{path} is the map of other weights ({content['model']}): "
            "run --diagnose with this --model first"
        )
    return content
