"""KL-Cov: a few tokens that drive the entropy down are held back (Cui et al. 2025,
arXiv 2505.22617, "The Entropy Mechanism of Reinforcement Learning for Reasoning Models").

    J = 1/(sum_i |y_i|) sum_i sum_t ( w_it A_i - beta |log w_it| [it among the top k of Cov] )

The top k are a share k of all tokens, at least one, those of the highest Cov (see clip_cov.py).
There is no clip. The estimate of the KL is |log w_it|, as in the code of its authors and in verl
(loss_mode kl_cov). Panel B of the TEPO paper's Table 3, with k = 2e-3 and beta = 1. Means and share
are those of a micro-batch.

Relative of TEPO: both hold back tokens that are about to lose entropy. TEPO picks them by A > 0 and
dH < 0, KL-Cov by a covariance.
"""

import torch

from grpo import log_ratio
from tepo import covariance_entropy_change

RECIPE = dict(beta=1.0, kl_cov_ratio=2e-3, dynamic_sampling="filter", overlong="none")


def loss(batch, logp, entropy, args):
    """What train.py calls for each micro-batch, see grpo.loss. num_tokens: sum_i |y_i|."""
    mask = batch["mask"]
    advantages = batch["advantages"].unsqueeze(1).expand_as(logp)  # [B, T]
    d = log_ratio(logp, batch["old_logp"], mask)
    held_back = torch.zeros_like(mask)
    if mask.any():
        cov = -covariance_entropy_change(
            logp, batch["advantages"], logp[mask].mean(), advantages[mask].mean()
        )[mask]  # [n]
        k = max(int(args.kl_cov_ratio * len(cov)), 1)
        chosen = torch.zeros_like(cov, dtype=torch.bool)
        chosen[cov.topk(k).indices] = True
        held_back[mask] = chosen
    per_token = (d.exp() * advantages - args.beta * d.abs() * held_back) * mask
    loss = -per_token.sum() / batch["num_tokens"]
    metrics = {
        "ratio": d.detach().exp(),
        "kl": d.detach().abs(),
        "kl_mask_fraction": held_back,
    }
    return loss, metrics
