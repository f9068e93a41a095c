"""DAPO: decoupled clip and dynamic sampling policy optimization (Yu et al. 2025, arXiv 2503.14476). A delta on grpo.py.

    J = 1/(sum_i |y_i|) sum_i sum_t min(w_it A_i, clip(w_it, 1 - eps_low, 1 + eps_high) A_i)                    (Eq. 8)
        subject to 0 < #{right answers in the group} < G

What differs from GRPO, and nothing else:
- Clip-higher: eps_low 0.2, eps_high 0.28, so that an unlikely token has room to grow.
- Token-mean: one mean over all tokens of the batch (1/sum|y|), so a token of a long completion weighs as much as a
  token of a short one.
- Dynamic sampling: a group that is all right or all wrong has no gradient; keep sampling until the batch is full of
  mixed groups. It is a constraint on the *data*, so the reward curve must be read before the filter.
- Overlong: a soft punishment added to the reward as the length nears the limit (Eq. 13), or, simpler, truncated
  completions masked out of the loss. No KL term.

Readings: dynamic sampling is capped (`max_rounds`) and trains on what it has when the cap is hit; the paper loops on.
The punishment is added to rewards of 1/0 here unless --reward-scale dapo asks for the paper's +1/-1.
"""

import torch

from grpo import clipped_objective, group_advantages, k3, log_ratio, show, worked_example


def dapo_loss(logp, old_logp, advantages, mask, *, num_tokens, epsilon_low=0.2, epsilon_high=0.28):
    """The DAPO loss of a (micro-)batch: the mean over all its tokens. Arguments and result as in grpo.grpo_loss.

    num_tokens: the True entries of the mask in all micro-batches of one optimizer step together (not of the whole rollout).
    """
    ratio = log_ratio(logp, old_logp, mask).exp()  # [B, T]
    objective, clip_low, clip_high = clipped_objective(ratio, advantages, epsilon_low, epsilon_high)
    loss = -(objective * mask).sum() / max(int(num_tokens), 1)
    parts = {"ratio": ratio, "clip_low": clip_low & mask, "clip_high": clip_high & mask, "kl": k3(logp, old_logp, mask)}
    parts["kl_mask"] = torch.zeros_like(mask)
    return loss, {name: part.detach() for name, part in parts.items()}


def soft_overlong_punishment(lengths, max_length, cache):
    """The punishment that is added to a completion's reward (Eq. 13): 0, then falling linearly to -1, then -1.

    lengths: [B] in tokens; max_length: L_max, the longest completion; cache: L_cache, how long before it the punishment
    begins (20480 and 4096 in the paper). Returns [B] in [-1, 0]. Raises ValueError unless 0 < cache <= max_length.
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"the overlong cache must be between 1 and the maximum length {max_length}, not {cache}")
    return ((max_length - cache - lengths.float()) / cache).clamp(-1.0, 0.0)


def overlong_filter(mask, truncated):
    """Masks truncated completions out of the loss. mask: bool [B, T]; truncated: bool [B]. Returns a new mask."""
    return mask & ~truncated.unsqueeze(1)


def mixed_groups(scores, num_generations):
    """Which groups are neither all right nor all wrong. scores: [B] of 1 (right) or 0. Returns bool [B/G]."""
    groups = scores.view(-1, num_generations)
    return (groups != groups[:, :1]).any(dim=1)


def dynamic_sampling(sample_groups, num_prompts, max_rounds):
    """Samples until `num_prompts` mixed groups are there, or `max_rounds` rounds are spent.

    sample_groups(n): samples n fresh prompts and returns (a list of n groups, of any kind; bool [n], which are mixed).
    Returns (the mixed groups, at most num_prompts; all groups that were sampled; the rounds used). Fewer than
    num_prompts mixed groups come back only when the cap was hit: the caller says so and trains on what there is.
    """
    mixed, sampled, rounds = [], [], 0
    while len(mixed) < num_prompts and rounds < max_rounds:
        groups, keep = sample_groups(num_prompts)
        mixed += [group for group, kept in zip(groups, keep.tolist()) if kept]
        sampled += groups
        rounds += 1
    return mixed[:num_prompts], sampled, rounds


def main():
    logp, old_logp, rewards, mask = worked_example()
    advantages = group_advantages(rewards, num_generations=2)
    loss, parts = dapo_loss(logp, old_logp, advantages, mask, num_tokens=mask.sum())
    print("DAPO on 2 prompts x 2 completions; eps 0.2 low, 0.28 high. w = pi/pi_old of each token.")
    for i in range(4):
        clipped = parts["clip_low"][i] | parts["clip_high"][i]
        print(f"y_{i + 1}  reward {rewards[i]:.0f}  A {advantages[i]:+.3f}  w {show(parts['ratio'][i], mask[i])}   clipped {show(clipped, mask[i])}")
    print(f"loss = -mean over all {mask.sum()} tokens = {loss:+.4f}")
    scores = torch.tensor([1.0, 0.0, 1.0, 1.0])
    print(f"dynamic sampling: of groups with scores {scores.view(-1, 2).tolist()} it keeps {mixed_groups(scores, 2).tolist()}")
    lengths = torch.tensor([10, 16, 18, 20])
    print(f"soft overlong punishment, limit 20, cache 4: lengths {lengths.tolist()} -> {soft_overlong_punishment(lengths, 20, 4).tolist()}")


if __name__ == "__main__":
    main()
