"""GSPO: group sequence policy optimization (Zheng et al. 2025, arXiv 2507.18071, Eq. 5 and 7).

    J   = 1/B sum_i min(w_i A_i, clip(w_i, 1 - eps_low, 1 + eps_high) A_i)
    w_i = exp( 1/|y_i| sum_t log[ pi(y_it) / pi_old(y_it) ] )

TEPO has the same ratio. Here every completion weighs the same, there every token; and there is no
KL term. Panel D of the TEPO paper's Table 3, "seq-mean-token-mean".

The clip is TEPO's, so that the two can be compared. The GSPO paper's own is 3e-4 and 4e-4.
TRL: loss_type grpo, importance_sampling_level sequence. verl: loss_mode gspo.
"""

from grpo import clipped_objective
from tepo import sequence_ratio

RECIPE = dict(epsilon=0.2, epsilon_high=0.28, dynamic_sampling="filter", overlong="none")


def loss(batch, logp, entropy, args):
    """What train.py calls for each micro-batch, see grpo.loss. num_sequences: B."""
    mask = batch["mask"]
    ratio = sequence_ratio(logp, batch["old_logp"], mask)  # [B]
    objective, low, high = clipped_objective(
        ratio.unsqueeze(1), batch["advantages"], args.epsilon, args.epsilon_high
    )  # [B, 1]
    has_tokens = mask.any(dim=1, keepdim=True)
    loss = -(objective * has_tokens).sum() / batch["num_sequences"]
    metrics = {
        "ratio": ratio.detach().unsqueeze(1).expand_as(logp),
        "clip_ratio/low": low & mask,
        "clip_ratio/high": high & mask,
    }
    return loss, metrics
