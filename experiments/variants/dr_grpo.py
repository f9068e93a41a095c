"""Dr. GRPO: GRPO without its two biases (Liu et al. 2025, arXiv 2503.20783, Section 3.2).

    A_i = r_i - mean(r)                                          without the deviation of the group
    J   = 1/B sum_i 1/T sum_t min(w_it A_i, clip(w_it, 1 - eps_low, 1 + eps_high) A_i)

T is --max-completion-length, a constant, where GRPO divides by |y_i|: so a token weighs the same in
a short completion and in a long one. TRL: loss_type dr_grpo, scale_rewards none.
verl: loss_agg_mode seq-mean-token-sum-norm, loss_scale_factor T, norm_adv_by_std_in_grpo False.
"""

from grpo import clipped_objective, log_ratio

RECIPE = dict(
    epsilon=0.2,
    epsilon_high=0.2,
    scale_rewards="none",
    dynamic_sampling="off",
    overlong="none",
)


def loss(batch, logp, entropy, args):
    """What train.py calls for each micro-batch, see grpo.loss. num_sequences: B."""
    mask = batch["mask"]
    ratio = log_ratio(logp, batch["old_logp"], mask).exp()  # [B, T]
    objective, low, high = clipped_objective(
        ratio, batch["advantages"], args.epsilon, args.epsilon_high
    )
    loss = -(objective * mask).sum() / (batch["num_sequences"] * args.max_completion_length)
    metrics = {
        "ratio": ratio.detach(),
        "clip_ratio/low": low & mask,
        "clip_ratio/high": high & mask,
    }
    return loss, metrics
