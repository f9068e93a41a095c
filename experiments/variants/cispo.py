"""CISPO: the ratio is clipped, the gradient is not (MiniMax-M1, arXiv 2506.13585, Section 3.1).

    J = 1/(sum_i |y_i|) sum_i sum_t sg[clip(w_it, 1 - eps_low, 1 + eps_high)] A_i log pi(y_it)

w_it is the token ratio, sg stops the gradient. So no token ever loses its gradient: where PPO's
clip sets it to 0, here it is bounded. Panel C of the TEPO paper's Table 3.

The clip is DAPO's. TRL: loss_type cispo; it clips above only, and its epsilon_high is the bound
itself, 1 + ours. verl: loss_mode cispo.
"""

from grpo import log_ratio

RECIPE = dict(epsilon=0.2, epsilon_high=0.28, dynamic_sampling="filter", overlong="none")


def loss(batch, logp, entropy, args):
    """What train.py calls for each micro-batch, see grpo.loss. num_tokens: sum_i |y_i|."""
    mask = batch["mask"]
    ratio = log_ratio(logp, batch["old_logp"], mask).exp().detach()  # [B, T]
    weight = ratio.clamp(1 - args.epsilon, 1 + args.epsilon_high)
    logp = logp.masked_fill(~mask, 0.0)
    loss = -(weight * batch["advantages"].unsqueeze(1) * logp).sum() / batch["num_tokens"]
    metrics = {
        "ratio": ratio,
        "clip_ratio/low": (ratio < 1 - args.epsilon) & mask,
        "clip_ratio/high": (ratio > 1 + args.epsilon_high) & mask,
    }
    return loss, metrics
