"""TEPO as a policy loss of verl 0.9, for Ray, FSDP or Megatron, vLLM or SGLang on many GPUs.

    export PYTHONPATH=/path/to/this/repository VERL_USE_EXTERNAL_MODULES=scale.verl_tepo
    python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo \\
        actor_rollout_ref.actor.policy_loss.loss_mode=tepo \\
        actor_rollout_ref.actor.loss_agg_mode=token-mean \\
        actor_rollout_ref.actor.policy_loss.ppo_kl_coef=0.001 \\
        actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.28 \\
        actor_rollout_ref.actor.ppo_epochs=2 ...

The loss is tepo.tepo_loss. What is read from verl's config: the clip from clip_ratio_low and
clip_ratio_high, beta from policy_loss.ppo_kl_coef (whose default there is 0.1). Every ratio is 1
unless a rollout has several updates: ppo_epochs above 1, or ppo_mini_batch_size below
train_batch_size.

verl hands no entropies to a policy loss. So the sign of dH is read from the covariance of log-prob
and advantage, Appendix C.5 of the paper (tepo.covariance_entropy_change), with the means of the
micro-batch. For the exact one two places of verl would have to change: the actor's
compute_log_prob would have to keep the entropies that it can compute (calculate_entropy=True), as
old_entropys in the batch, and ppo_loss (workers/utils/losses.py) would have to pass those and
model_output["entropy"] on.

Groups of equal rewards are to be left out before: algorithm.filter_groups, or a filter of your own.
"""

import torch
from verl.trainer.ppo.core_algos import register_policy_loss

import tepo


@register_policy_loss("tepo")
def compute_policy_loss_tepo(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    """What verl calls for a micro-batch.

    old_log_prob, log_prob, advantages, response_mask: [B, T]. The advantages of a completion must
    be equal at all of its tokens, as those of GRPO are. config: verl's ActorConfig.
    Returns the loss, for verl's backward pass, and a dict of floats.
    Raises ValueError for another loss_agg_mode, for token-wise advantages, for rollout weights.
    """
    if loss_agg_mode != "token-mean":
        raise ValueError(f"TEPO is a token-mean: loss_agg_mode cannot be {loss_agg_mode!r}")
    if rollout_is_weights is not None:
        raise ValueError("TEPO has one ratio a completion: set rollout_correction.rollout_is=null")
    mask = response_mask.bool()
    tokens = mask.sum(dim=1).clamp(min=1)
    own = (advantages * mask).sum(dim=1) / tokens  # [B]
    if not torch.allclose(advantages[mask], own.unsqueeze(1).expand_as(mask)[mask], atol=1e-4):
        raise ValueError("TEPO needs one advantage a completion: algorithm.adv_estimator=grpo")
    here = mask.sum().clamp(min=1)
    dH = tepo.covariance_entropy_change(
        log_prob,
        own,
        mean_logp=(log_prob.detach() * mask).sum() / here,
        mean_advantage=(own * mask.sum(dim=1)).sum() / here,
    )
    everywhere = config.global_batch_info  # of all data-parallel ranks: how verl's agg_loss divides
    loss, metrics = tepo.tepo_loss(
        log_prob,
        old_log_prob,
        own,
        mask,
        entropy_change=dH,
        num_tokens=everywhere.get("batch_num_tokens") or here,
        epsilon_low=either(config.clip_ratio_low, config.clip_ratio),
        epsilon_high=either(config.clip_ratio_high, config.clip_ratio),
        beta=config.policy_loss.ppo_kl_coef,
    )
    clipped = metrics["clip_ratio/low"] | metrics["clip_ratio/high"]
    measured = {
        "actor/pg_clipfrac": (clipped.sum() / here).item(),
        "actor/pg_clipfrac_lower": (metrics["clip_ratio/low"].sum() / here).item(),
        "actor/ppo_kl": ((old_log_prob - log_prob.detach())[mask].sum() / here).item(),
        "actor/kl_mask_fraction": (metrics["kl_mask_fraction"].sum() / here).item(),
    }
    return loss * everywhere.get("dp_size", 1), measured


def either(value, default):
    """The value, or the default where it is None: an epsilon may be 0."""
    return default if value is None else value
