"""The prefix ratio: every token has the geometric mean of the token ratios up to itself.

    J    = 1/(sum_i |y_i|) sum_i sum_t min(w_it A_i, clip(w_it, 1 - eps_low, 1 + eps_high) A_i)
    w_it = exp( 1/t sum_{s <= t} log[ pi(y_is) / pi_old(y_is) ] )

Between the token ratio of DAPO (s = t alone) and the sequence ratio of TEPO (all of y_i). Panel C
of the TEPO paper's Table 3. Its gradient weighs early tokens more: log pi(y_is) stands in w_it for
every t >= s. TRL and verl do not have it.
"""

from grpo import clipped_objective, log_ratio

RECIPE = dict(epsilon=0.2, epsilon_high=0.28, dynamic_sampling="filter", overlong="none")


def loss(batch, logp, entropy, args):
    """What train.py calls for each micro-batch, see grpo.loss. num_tokens: sum_i |y_i|."""
    mask = batch["mask"]
    sums = log_ratio(logp, batch["old_logp"], mask).cumsum(dim=1)  # [B, T]
    t = mask.cumsum(dim=1).clamp(min=1)  # [B, T]: 1 for the first token
    ratio = (sums / t).exp()
    objective, low, high = clipped_objective(
        ratio, batch["advantages"], args.epsilon, args.epsilon_high
    )
    loss = -(objective * mask).sum() / batch["num_tokens"]
    metrics = {
        "ratio": ratio.detach(),
        "clip_ratio/low": low & mask,
        "clip_ratio/high": high & mask,
    }
    return loss, metrics
