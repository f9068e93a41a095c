"""The sequence ratio of TEPO and GSPO, summed over tokens, then averaged over completions.

    J = 1/B sum_i |y_i| min(w_i A_i, clip(w_i, 1 - eps_low, 1 + eps_high) A_i)

Panel D of the TEPO paper's Table 3, "seq-mean-token-sum". It is TEPO without its KL term, but for
the normaliser: completions here, tokens there. So as completions grow, the gradient grows, too.
TRL: loss_type luspo (LUSPO, arXiv 2602.05261), importance_sampling_level sequence.
verl: loss_agg_mode seq-mean-token-sum, but its loss_mode gspo always takes seq-mean-token-mean.
"""

from grpo import clipped_objective
from tepo import sequence_ratio

RECIPE = dict(epsilon=0.2, epsilon_high=0.28, dynamic_sampling="filter", overlong="none")


def loss(batch, logp, entropy, args):
    """What train.py calls for each micro-batch, see grpo.loss. num_sequences: B."""
    mask = batch["mask"]
    ratio = sequence_ratio(logp, batch["old_logp"], mask).unsqueeze(1)  # [B, 1]
    objective, low, high = clipped_objective(
        ratio, batch["advantages"], args.epsilon, args.epsilon_high
    )  # [B, 1]
    loss = -(objective * mask).sum() / batch["num_sequences"]
    metrics = {
        "ratio": ratio.detach().expand_as(logp),
        "clip_ratio/low": low & mask,
        "clip_ratio/high": high & mask,
    }
    return loss, metrics
