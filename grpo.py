"""GRPO: group relative policy optimization (DeepSeekMath, Shao et al. 2024, arXiv 2402.03300).

For one prompt the old policy samples a group of G completions y_1..y_G with rewards r_1..r_G. The group is its own
baseline, so no value network is needed: every token of y_i gets the advantage

    A_i = (r_i - mean(r)) / std(r)                                                              (DeepSeekMath, 4.1.2)

    J = 1/G sum_i 1/|y_i| sum_t { min(w_it A_i, clip(w_it, 1 - eps, 1 + eps) A_i) - beta KL[pi || pi_ref]_it }   (Eq. 3)

    w_it   = pi(y_it | x, y_i<t) / pi_old(y_it | x, y_i<t)                                               token ratio
    KL_it  = pi_ref / pi - log(pi_ref / pi) - 1                                                     (Eq. 4, "k3")

The loss is -J. At the first update after a rollout pi = pi_old, so every ratio is 1 and the value of the loss is the
mean of advantages that sum to about zero: it says nothing about progress. Its gradient does the work.

Deliberate deviations and readings:
- beta is 0 by default (0.04 in the paper): recipes since then leave the reference model out. It is here, and optional.
- std is the unbiased one, plus 1e-6; a group whose rewards are all equal gets exactly 0 (by an equality test: rounding
  noise over a tiny epsilon has produced large advantages for equal rewards in public code).
- Log-ratios are cut to +-20 before exp, so that a broken ratio stays finite; no trust region reaches that far.
- 1/|y_i| makes a long wrong answer cheaper per token than a short one. Dr. GRPO (arXiv 2503.20783) removes that bias;
  so does the token-mean of dapo.py.

All tensors are [B, T] (B completions, T token positions) or [B]. `mask` is bool, True on completion tokens up to and
including the first end-of-text. What stands where the mask is False may be anything, NaN included. The normalisers are
arguments: pass the count of the whole batch and the losses and gradients of its micro-batches add up to it exactly.
"""

import torch

LOG_RATIO_LIMIT = 20.0


def group_advantages(rewards, num_generations, eps=1e-6):
    """Rewards of each group, centred and scaled by the group's own standard deviation.

    rewards: [B], rows i*G .. (i+1)*G-1 are the completions of prompt i (groups go by position, never by prompt text).
    num_generations: G. Returns advantages [B]; exactly 0 in groups whose rewards are all equal.
    Raises ValueError when B is not a multiple of G or G < 2. Source: DeepSeekMath 4.1.2; TEPO (arXiv 2604.12736) Eq. 4.
    """
    if num_generations < 2 or len(rewards) % num_generations:
        raise ValueError(f"{len(rewards)} rewards do not make whole groups of {num_generations} (at least 2)")
    groups = rewards.float().view(-1, num_generations)  # [B/G, G]
    centred = groups - groups.mean(dim=1, keepdim=True)
    advantages = centred / (groups.std(dim=1, keepdim=True) + eps)
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).view(-1)


def log_ratio(logp, other_logp, mask):
    """logp - other_logp [B, T], 0 outside the mask and cut to +-LOG_RATIO_LIMIT. other_logp gets no gradient."""
    # Filling before the subtraction keeps NaN and inf of the padding out of the backward pass too.
    difference = logp.masked_fill(~mask, 0.0) - other_logp.detach().masked_fill(~mask, 0.0)
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clipped_objective(ratio, advantages, epsilon_low, epsilon_high):
    """PPO's pessimistic bound min(w A, clip(w, 1 - eps_low, 1 + eps_high) A) (arXiv 1707.06347).

    ratio: [B, T] (or [B, 1] for one ratio a sequence); advantages: [B]. Returns the bound and two bool tensors of the
    same shape: where the lower and where the upper clip binds, that is where the gradient is exactly zero.
    """
    advantages = advantages.unsqueeze(1)  # [B, 1]
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    low = (ratio < 1 - epsilon_low) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return objective, low, high


def k3(logp, anchor_logp, mask):
    """KL(pi || anchor) estimated from the sampled token alone: exp(d) - 1 - d with d = log anchor - log pi.

    logp, anchor_logp: [B, T]. Returns [B, T], 0 outside the mask. Never negative, 0 where the two agree, and its mean
    over samples of pi is the KL (Schulman 2020, "Approximating KL divergence"). expm1 keeps small values exact.
    """
    d = -log_ratio(logp, anchor_logp, mask)
    return torch.expm1(d) - d


def grpo_loss(logp, old_logp, advantages, mask, *, num_sequences, epsilon_low=0.2, epsilon_high=0.2, beta=0.0, ref_logp=None):
    """The GRPO loss of a (micro-)batch: the mean over a completion's tokens first, then the mean over completions.

    logp: [B, T] log-probs of the sampled tokens under the policy, with gradient; old_logp: [B, T] the same under the
    policy that sampled; advantages: [B]; mask: bool [B, T]; num_sequences: completions with at least one token in all
    micro-batches of one optimizer step together; beta, ref_logp: weight and [B, T] log-probs of the frozen reference (needed only when beta > 0).

    Returns the scalar loss and a dict of detached [B, T] tensors for the log: ratio, clip_low, clip_high, kl (the k3
    to the reference; to the old policy when beta is 0), kl_mask (where a KL term has weight). Raises ValueError when
    beta has no ref_logp to pull to.
    """
    if beta and ref_logp is None:
        raise ValueError("grpo_loss: beta > 0 needs ref_logp, the log-probs under the frozen reference")
    ratio = log_ratio(logp, old_logp, mask).exp()  # [B, T]
    objective, clip_low, clip_high = clipped_objective(ratio, advantages, epsilon_low, epsilon_high)
    kl = k3(logp, ref_logp if beta else old_logp, mask)
    per_token = (objective - beta * kl if beta else objective) * mask  # [B, T]
    per_sequence = per_token.sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # [B]
    loss = -per_sequence.sum() / max(int(num_sequences), 1)
    parts = {"ratio": ratio, "clip_low": clip_low & mask, "clip_high": clip_high & mask, "kl": kl}
    parts["kl_mask"] = mask if beta else torch.zeros_like(mask)
    return loss, {name: part.detach() for name, part in parts.items()}


def worked_example():
    """Two prompts, two completions each, small enough to follow by hand: what `python dapo.py` and `tepo.py` use too."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    old_logp = torch.log(torch.tensor([[0.5, 0.4, 0.6, 1], [0.5, 0.2, 0.3, 0.9], [0.7, 0.8, 1, 1], [0.7, 0.1, 0.5, 1]]))
    logp = torch.log(torch.tensor([[0.7, 0.55, 0.75, 1], [0.3, 0.25, 0.2, 0.9], [0.6, 0.8, 1, 1], [0.7, 0.2, 0.6, 1]]))
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    return logp, old_logp, rewards, mask


def show(values, mask):
    """One row of a worked example as text: numbers or yes/no, blanks outside the mask."""
    cells = [("  yes" if v else "   no") if v.dtype == torch.bool else f"{v:5.2f}" for v in values]
    return " ".join(cell if keep else "    ." for cell, keep in zip(cells, mask))


def main():
    logp, old_logp, rewards, mask = worked_example()
    advantages = group_advantages(rewards, num_generations=2)
    loss, parts = grpo_loss(logp, old_logp, advantages, mask, num_sequences=4)
    print("GRPO on 2 prompts x 2 completions; eps 0.2, no KL. w = pi/pi_old of each token; clipped tokens get no gradient.")
    for i in range(4):
        clipped = parts["clip_low"][i] | parts["clip_high"][i]
        print(f"y_{i + 1}  reward {rewards[i]:.0f}  A {advantages[i]:+.3f}  w {show(parts['ratio'][i], mask[i])}   clipped {show(clipped, mask[i])}")
    print(f"loss = -mean over completions of the mean over their tokens = {loss:+.4f}")
    loss, _ = grpo_loss(old_logp, old_logp, advantages, mask, num_sequences=4)
    print(f"at pi = pi_old every w is 1 and the loss is {abs(loss):.4f}, whatever was learned: look at the reward instead")


if __name__ == "__main__":
    main()
