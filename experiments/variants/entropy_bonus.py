"""DAPO's token mean with an entropy bonus, or with a punishment where --entropy-coef is negative.

    J = 1/(sum_i |y_i|) sum_i sum_t ( min(w_it A_i, clip(w_it) A_i) + c H(pi(. | x, y_i<t)) )

Panel B of the TEPO paper's Table 3 has both signs of c ("max-entropy", "min-entropy"), and does not
state its size.

The gradient of H is estimated from the sampled token, since rollout.score hands over entropies
without a gradient:

    grad H = -E_y[ (log pi(y) + H) grad log pi(y) ]        exact in the mean where y comes from pi

So c H is a reward of each token for being less likely than usual. From the second update of a
rollout on, y comes from pi_old: the ratio, cut at 1 + eps_high, corrects for it.
TRL: entropy_coef. verl: entropy_coeff. Both take the exact gradient.
"""

from grpo import clipped_objective, log_ratio

RECIPE = dict(
    epsilon=0.2,
    epsilon_high=0.28,
    entropy_coef=0.003,
    dynamic_sampling="filter",
    overlong="none",
)


def entropy_surrogate(logp, entropy, ratio, limit):
    """[B, T], whose gradient estimates that of the entropy. logp, entropy, ratio: [B, T]."""
    surprise = (logp + entropy).detach()
    return -ratio.detach().clamp(max=limit) * surprise * logp


def loss(batch, logp, entropy, args):
    """What train.py calls for each micro-batch, see grpo.loss. num_tokens: sum_i |y_i|."""
    mask = batch["mask"]
    logp = logp.masked_fill(~mask, 0.0)
    entropy = entropy.masked_fill(~mask, 0.0)
    ratio = log_ratio(logp, batch["old_logp"], mask).exp()  # [B, T]
    objective, low, high = clipped_objective(
        ratio, batch["advantages"], args.epsilon, args.epsilon_high
    )
    bonus = entropy_surrogate(logp, entropy, ratio, 1 + args.epsilon_high)
    per_token = (objective + args.entropy_coef * bonus) * mask
    loss = -per_token.sum() / batch["num_tokens"]
    metrics = {
        "ratio": ratio.detach(),
        "clip_ratio/low": low & mask,
        "clip_ratio/high": high & mask,
    }
    return loss, metrics
