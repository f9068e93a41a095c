"""Clip-Cov: a few tokens that drive the entropy down get no gradient (Cui et al. 2025,
arXiv 2505.22617, "The Entropy Mechanism of Reinforcement Learning for Reasoning Models").

DAPO's token mean, without the tokens of a random set:

    Cov_it = (log pi(y_it) - mean log pi)(A_i - mean A)
    drawn are a share r of all tokens, at least one, among those with low < Cov_it < high

A token of high Cov is likely and rewarded (or unlikely and punished), so its gradient sharpens the
distribution. Panel B of the TEPO paper's Table 3, with r = 2e-4. The means and the share are those
of a micro-batch, as in verl (loss_mode clip_cov).
"""

import torch

from grpo import clipped_objective, log_ratio
from tepo import covariance_entropy_change

RECIPE = dict(
    epsilon=0.2,
    epsilon_high=0.28,
    clip_cov_ratio=2e-4,  # r
    clip_cov_lb=1.0,  # low
    clip_cov_ub=5.0,  # high
    dynamic_sampling="filter",
    overlong="none",
)


def loss(batch, logp, entropy, args):
    """What train.py calls for each micro-batch, see grpo.loss. num_tokens: sum_i |y_i|."""
    mask = batch["mask"]
    ratio = log_ratio(logp, batch["old_logp"], mask).exp()  # [B, T]
    objective, low, high = clipped_objective(
        ratio, batch["advantages"], args.epsilon, args.epsilon_high
    )
    token_advantages = batch["advantages"].unsqueeze(1).expand_as(logp)  # [B, T]
    cov = -covariance_entropy_change(
        logp, batch["advantages"], logp[mask].mean(), token_advantages[mask].mean()
    )  # nonsense off the mask
    candidates = (cov > args.clip_cov_lb) & (cov < args.clip_cov_ub) & mask & ~low & ~high
    places = candidates.nonzero()  # [n, 2]
    count = max(int(args.clip_cov_ratio * mask.sum().item()), 1)
    drawn = places[torch.randperm(len(places))[:count].to(places.device)]
    dropped = torch.zeros_like(mask)
    dropped[drawn[:, 0], drawn[:, 1]] = True
    loss = -(objective * (mask & ~dropped)).sum() / batch["num_tokens"]
    metrics = {
        "ratio": ratio.detach(),
        "clip_ratio/low": low & mask,
        "clip_ratio/high": high & mask,
        "clip_ratio/cov": dropped,
    }
    return loss, metrics
