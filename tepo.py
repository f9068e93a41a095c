"""TEPO: token-level policy optimization (Lin et al. 2026, arXiv 2604.12736). A delta on grpo.py and dapo.py.

The reward is one number for a whole sequence, so TEPO gives the whole sequence one importance ratio, the geometric mean
of its token ratios (GSPO's, arXiv 2507.18071), and, unlike GSPO, lets every token of the batch weigh the same. A KL term
anchors only the tokens that would lose entropy by being rewarded.

    J = 1/(sum_i |y_i|) sum_i sum_t [ min(w_i A_i, clip(w_i, 1 - eps_low, 1 + eps_high) A_i)
                                      - beta KL(pi || pi_old)_it M_it ]                                         (Eq. 4)
    w_i   = exp( 1/|y_i| sum_t log[ pi(y_it | x, y_i<t) / pi_old(y_it | x, y_i<t) ] )              sequence likelihood
    M_it  = 1 if A_i > 0 and dH_it < 0, else 0                                                                  KL mask

At pi = pi_old: w = 1, dH = 0, M = 0, KL = 0, and the gradient is that of dapo.py, exactly. The methods part only at the
second update of a rollout. There a completion whose w_i is clipped gets no policy gradient at all, where GRPO and DAPO
clip token by token.

Readings where the paper is silent (dH, beta, M and eps are arguments here and flags of train.py):
- dH_it = H(pi(.|s_t)) - H(pi_old(.|s_t)) over the full softmax (Appendix C.2). `covariance_entropy_change` is the second
  choice (Appendix C.5), for engines that do not hand entropies to the loss.
- KL is k3 on the sampled token (grpo.k3), anchored at the OLD policy as Eq. 4 says, and divided by all valid tokens,
  since it stands inside the bracket. beta is 0.001 (the paper: 0.001 for Qwen2.5-7B, 1 for Qwen3-14B).
- The clip is min(w A, clip(w) A). Eq. 4 prints min(w, clip(w)) A, which is no trust region for A < 0: taken as a typo.
- eps is 0.2/0.28, the only values the paper states. For a geometric mean that is wide; 0.02/0.028 is worth a try when
  there are many updates per rollout.
Deliberate deviations:
- Algorithm 1, line 21 prints a further 1/|y_i| in the gradient. The derivative of Eq. 4 does not have it: each token's
  log-prob gets weight w_i A_i / sum|y|. We follow Eq. 4.
- Lemma 3.2 ("A > 0 means the entropy falls") does not hold for every token, so M is computed, not inferred from A.
"""

import torch

from grpo import clipped_objective, group_advantages, k3, log_ratio, show, worked_example

KL_MASKS = ("none", "all", "positive", "negative", "both")  # the paper's Table 3: panel A is "all", panel E the rest


def sequence_ratio(logp, old_logp, mask):
    """w_i [B]: the geometric mean of the token ratios of each completion (1 where it has no token)."""
    lengths = mask.sum(dim=1).clamp(min=1)
    return (log_ratio(logp, old_logp, mask).sum(dim=1) / lengths).exp()


def exact_entropy_change(entropy, old_entropy):
    """dH [B, T] = H(pi) - H(pi_old), both [B, T] in nats over the full softmax. Without gradient (Appendix C.2)."""
    return (entropy - old_entropy).detach()


def covariance_entropy_change(logp, advantages, mean_logp, mean_advantage):
    """A stand-in for dH [B, T] that needs no entropies: -(log pi - mean log pi)(A - mean A) (Appendix C.5).

    Only its sign is used: a likely token that is rewarded sharpens the distribution. The means are over the tokens of the
    whole mini-batch and are passed in, so that micro-batches agree on them. It is not 0 at pi = pi_old, as the exact one is.
    """
    return -((logp - mean_logp) * (advantages.unsqueeze(1) - mean_advantage)).detach()


def kl_token_mask(advantages, entropy_change, mask, which="positive"):
    """M [B, T], the tokens that carry the KL term.

    which: "positive" (A > 0 and dH < 0: TEPO), "negative" (A < 0 and dH > 0), "both" of them, "all" tokens, "none".
    Raises ValueError on any other word.
    """
    if which not in KL_MASKS:
        raise ValueError(f"kl_mask is one of {', '.join(KL_MASKS)}, not {which!r}")
    if which in ("all", "none"):
        return mask.clone() if which == "all" else torch.zeros_like(mask)
    advantages = advantages.unsqueeze(1)  # [B, 1]
    positive = (advantages > 0) & (entropy_change < 0)
    negative = (advantages < 0) & (entropy_change > 0)
    return {"positive": positive, "negative": negative, "both": positive | negative}[which] & mask


def tepo_loss(
    logp, old_logp, advantages, mask, *, entropy_change, num_tokens, epsilon_low=0.2, epsilon_high=0.28, beta=0.001, kl_mask="positive"
):
    """The TEPO loss of a (micro-)batch, Eq. 4. Arguments and result as in dapo.dapo_loss, and further:

    entropy_change: dH [B, T] from one of the two functions above; beta: weight of the KL term (0 or more);
    kl_mask: which tokens carry it, see `kl_token_mask`.
    """
    ratio = sequence_ratio(logp, old_logp, mask).unsqueeze(1)  # [B, 1]: one ratio for all tokens of a completion
    objective, clip_low, clip_high = clipped_objective(ratio, advantages, epsilon_low, epsilon_high)  # [B, 1]
    kl = k3(logp, old_logp, mask)  # [B, T]
    carries_kl = kl_token_mask(advantages, entropy_change, mask, kl_mask)
    per_token = (objective - beta * kl * carries_kl) * mask  # [B, T]
    loss = -per_token.sum() / max(int(num_tokens), 1)
    parts = {"ratio": ratio.expand_as(kl), "clip_low": clip_low & mask, "clip_high": clip_high & mask, "kl": kl}
    parts["kl_mask"] = carries_kl
    return loss, {name: part.detach() for name, part in parts.items()}


def main():
    logp, old_logp, rewards, mask = worked_example()
    advantages = group_advantages(rewards, num_generations=2)
    # A worked example has no vocabulary, so let each position choose between two tokens: H(p) = -p log p - q log q.
    entropy, old_entropy = (torch.special.entr(p) + torch.special.entr(1 - p) for p in (logp.exp(), old_logp.exp()))
    change = exact_entropy_change(entropy, old_entropy)
    loss, parts = tepo_loss(logp, old_logp, advantages, mask, entropy_change=change, num_tokens=mask.sum())
    print("TEPO on 2 prompts x 2 completions; eps 0.2 low, 0.28 high, beta 0.001. One ratio w_i for the whole completion.")
    for i in range(4):
        clipped = (parts["clip_low"] | parts["clip_high"])[i].any()
        token_ratios = (logp - old_logp)[i].exp()
        print(f"y_{i + 1}  reward {rewards[i]:.0f}  A {advantages[i]:+.3f}  token ratios {show(token_ratios, mask[i])}   w_{i + 1} {parts['ratio'][i, 0]:.3f}{' clipped' if clipped else ''}")
        print(f"     dH {show(change[i], mask[i])}   M {show(parts['kl_mask'][i], mask[i])}   KL {show(parts['kl'][i], mask[i])}")
    print(f"loss = -mean over all {mask.sum()} tokens of [min(w A, clip(w) A) - beta KL M] = {loss:+.4f}")


if __name__ == "__main__":
    main()
