"""A task of sparse reward: sums of 6 to 9 digits, where the embedded model has learned 4 to 6.

    python train.py --data experiments/long_sums.py --max-completion-length 64

Before training one completion in twenty is right, and three groups in four have no right one.
"""

import random

from tasks.arithmetic import answer, is_held_out, reward

__all__ = ["answer", "load", "reward"]


def load(split):
    """The problems of a split, "train" or "test": as those of tasks.arithmetic, but longer."""
    rng = random.Random(0)
    found = {}
    while len(found) < (10_000 if split == "train" else 500):
        digits = [rng.randint(1, 9) for _ in range(rng.randint(6, 9))]
        prompt = "+".join(map(str, digits)) + "="
        if is_held_out(prompt) == (split == "test"):
            found[prompt] = {"prompt": prompt, "answer": str(sum(digits))}
    return list(found.values())
