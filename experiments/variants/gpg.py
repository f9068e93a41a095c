"""No ratio at all: the plain policy gradient (REINFORCE) with group advantages.

    J = 1/(sum_i |y_i|) sum_i sum_t A_i log pi(y_it)

So it is wrong, by a little, from the second update of a rollout on, and nothing holds it back.
Panel C of the TEPO paper's Table 3, as GPG (Chu et al. 2025, arXiv 2504.02546). GPG's own
advantages are scaled by the share of mixed groups, and not by a group's deviation. That part is not
here: `--scale-rewards none` leaves the deviation out. verl: loss_mode gpg.
"""

from grpo import log_ratio

RECIPE = dict(dynamic_sampling="filter", overlong="none")


def loss(batch, logp, entropy, args):
    """What train.py calls for each micro-batch, see grpo.loss. num_tokens: sum_i |y_i|."""
    mask = batch["mask"]
    advantages = batch["advantages"].unsqueeze(1)  # [B, 1]
    loss = -(advantages * logp.masked_fill(~mask, 0.0)).sum() / batch["num_tokens"]
    ratio = log_ratio(logp, batch["old_logp"], mask).exp().detach()  # for the log alone
    return loss, {"ratio": ratio}
