"""GRPO, DAPO and TEPO side by side, on the same two prompts x two completions: a dozen tokens.

    python -m experiments.side_by_side

Every number comes from grpo_loss, dapo_loss and tepo_loss. One screen to project.
"""

import torch

from dapo import dapo_loss
from grpo import group_advantages, grpo_loss
from tepo import exact_entropy_change, tepo_loss

# Probabilities of the sampled tokens under the policy that sampled, and under the one that learns.
# The 1.0 at the end of a row is padding.
OLD = [
    [0.50, 0.40, 0.60, 1.0],
    [0.50, 0.20, 0.30, 0.90],
    [0.40, 0.50, 1.0, 1.0],
    [0.70, 0.10, 0.50, 1.0],
]
NEW = [
    [0.62, 0.38, 0.72, 1.0],
    [0.45, 0.15, 0.36, 0.92],
    [0.55, 0.64, 1.0, 1.0],
    [0.68, 0.13, 0.45, 1.0],
]
LENGTHS = [3, 4, 2, 3]
REWARDS = [1.0, 0.0, 1.0, 0.0]


def two_token_entropy(p):
    """The entropy of a choice between two tokens, so that the example needs no vocabulary."""
    return torch.special.entr(p) + torch.special.entr(1 - p)


def cells(values, length, form):
    """The first `length` values of a row as text, six columns each."""
    return "".join(f"{form(value):>6}" for value in values[:length].tolist()).ljust(24)


def mark(word):
    """A function that turns True into `word` and False into a dot."""

    def form(value):
        return word if value else "."

    return form


def number(value):
    return f"{value:.2f}"


def main():
    old, new = torch.tensor(OLD), torch.tensor(NEW)
    mask = torch.arange(4) < torch.tensor(LENGTHS).unsqueeze(1)  # [B, T]
    rewards = torch.tensor(REWARDS)
    advantages = group_advantages(rewards, num_generations=2)
    change = exact_entropy_change(two_token_entropy(new), two_token_entropy(old))
    tokens = int(mask.sum())

    def losses(logp, change):
        """(loss, metrics) of each method. logp, change (dH): of the policy that learns."""
        inputs = (logp, old.log(), advantages, mask)
        return {
            "GRPO": grpo_loss(*inputs, num_sequences=4),
            "DAPO": dapo_loss(*inputs, num_tokens=tokens),
            "TEPO": tepo_loss(*inputs, entropy_change=change, num_tokens=tokens),
        }

    found = losses(new.log(), change)
    _, tepo = found["TEPO"]
    clipped = {name: m["clip_ratio/low"] | m["clip_ratio/high"] for name, (_, m) in found.items()}
    token_ratio = found["GRPO"][1]["ratio"]
    print("two prompts x two completions; clips: GRPO 0.2/0.2, DAPO and TEPO 0.2/0.28; beta 0.001")
    print("'clip': the gradient is cut off. M: the KL term acts there.")
    for i, length in enumerate(LENGTHS):
        print(f"\ny_{i + 1}  reward {rewards[i]:.0f}  A {advantages[i]:+.2f}")
        print(f"  token ratio w_it      {cells(token_ratio[i], length, number)}")
        print(f"    clipped by GRPO     {cells(clipped['GRPO'][i], length, mark('clip'))}")
        print(f"    clipped by DAPO     {cells(clipped['DAPO'][i], length, mark('clip'))}")
        word = "clipped as a whole by TEPO" if clipped["TEPO"][i].any() else "not clipped by TEPO"
        print(f"  their geometric mean  {cells(tepo['ratio'][i], 1, number)}  {word}")
        line = cells(change[i], length, lambda value: f"{value:+.2f}")
        print(f"  dH {line}  M {cells(tepo['kl_mask_fraction'][i], length, mark('on'))}")
        print(f"  KL {cells(tepo['kl'][i], length, lambda value: f'{value:.3f}')}")
    print()
    print("loss: " + ", ".join(f"{name} {loss:+.4f}" for name, (loss, _) in found.items()))
    start = [metrics for _, metrics in losses(old.log(), torch.zeros_like(change)).values()]
    ratios = {value for metrics in start for value in metrics["ratio"][mask].tolist()}
    clips = sum(int((m["clip_ratio/low"] | m["clip_ratio/high"]).sum()) for m in start)
    kl = max(metrics["kl"].max().item() for metrics in start)
    masked = int(start[-1]["kl_mask_fraction"].sum())
    print(
        f"at pi = pi_old: every w in {ratios}, {clips} clipped, KL {kl:.0f}, M on {masked} tokens"
    )


if __name__ == "__main__":
    main()
