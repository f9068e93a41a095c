"""Is Lemma 3.2 of the TEPO paper true of a run? "A > 0 means that the entropy falls."

    python train.py --algo experiments/lemma.py
    python -m experiments.compare lemma

TEPO's own loss, with four more columns in metrics.jsonl, as shares of all tokens: those with A > 0,
those of them whose entropy has fallen, and the same for A < 0, where the lemma says that it rises.
Left out are tokens with dH = 0: at the first update of a rollout that is all of them.
"""

import tepo

RECIPE = tepo.RECIPE
EMBEDDED = tepo.EMBEDDED


def loss(batch, logp, entropy, args):
    """What train.py calls for each micro-batch: see tepo.loss."""
    value, metrics = tepo.loss(batch, logp, entropy, args)
    dH = tepo.exact_entropy_change(entropy, batch["old_entropy"])  # [B, T]
    moved = batch["mask"] & (dH != 0)
    positive = batch["advantages"].unsqueeze(1) > 0
    negative = batch["advantages"].unsqueeze(1) < 0
    metrics["A>0"] = positive & moved
    metrics["A>0, dH<0"] = positive & moved & (dH < 0)
    metrics["A<0"] = negative & moved
    metrics["A<0, dH>0"] = negative & moved & (dH > 0)
    return value, metrics
