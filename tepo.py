"""TEPO: token-level policy optimization (Lin et al. 2026, arXiv 2604.12736).

The reward is one number for a whole completion. So TEPO gives the completion one importance ratio,
the geometric mean of its token ratios (that of GSPO, arXiv 2507.18071), and, unlike GSPO, lets
every token of the batch weigh the same. A KL term holds back only the tokens that are rewarded and
lose entropy.

    J     = 1/(sum_i |y_i|) sum_i sum_t [ min(w_i A_i, clip(w_i, 1 - eps_low, 1 + eps_high) A_i)
                                          - beta KL(pi || pi_old)_it M_it ]                 (Eq. 4)
    w_i   = exp( 1/|y_i| sum_t log[ pi(y_it | x, y_i<t) / pi_old(y_it | x, y_i<t) ] )
    dH_it = H(pi(. | x, y_i<t)) - H(pi_old(. | x, y_i<t))                             entropy change
    M_it  = 1 if A_i > 0 and dH_it < 0, else 0                                               KL mask

At pi = pi_old: w = 1, dH = 0, M = 0, KL = 0, and the gradient is that of dapo.py on the same batch.
The methods part at the second update of a rollout. There a completion whose w_i is clipped gets no
policy gradient (its KL term stays), while GRPO and DAPO clip token by token.

Readings where the paper is silent:
- H is taken over the full softmax (Appendix C.2). The old entropies come from the same pass as the
  old log-probs. `covariance_entropy_change` is the second choice (Appendix C.5), for engines that
  do not hand entropies to the loss.
- KL is k3 on the sampled token (grpo.k3). Its anchor is the *old* policy, as Eq. 4 says. It is
  divided by all tokens, not by the masked ones, since it stands inside the bracket. beta is 0.001
  (the paper: 0.001 for Qwen2.5-7B, 1 for Qwen3-14B).
- The clip is min(w A, clip(w) A). Eq. 4 prints min(w, clip(w)) A, which is no trust region for
  A < 0: taken as a typo.
- eps is 0.2/0.28, the only values that the paper states. For a geometric mean that is wide. Try
  0.02/0.028 when a rollout has many updates.
- Groups of equal rewards are dropped ("removed", Section 4.1), and not sampled anew.
- Algorithm 1, line 21 prints a further 1/|y_i| in the gradient. The derivative of Eq. 4 does not
  have it: w_i stands in |y_i| equal terms, which cancel the 1/|y_i| of its mean, so each token's
  log-prob gets the weight w_i A_i / sum|y|. We follow Eq. 4.
- Lemma 3.2 ("A > 0 means that the entropy falls") does not hold for every token. So M is computed,
  and not inferred from A.

`python tepo.py` trains the embedded model on its sums. `loss` is what train.py calls.
"""

import math
from types import SimpleNamespace

import torch

from grpo import clipped_objective, group_advantages, k3, log_ratio, mixed_groups

RECIPE = dict(
    epsilon=0.2,  # the lower clip is at 1 - epsilon
    epsilon_high=0.28,  # the upper clip is at 1 + epsilon_high
    beta=0.001,  # weight of the KL term to the old policy
    kl_mask="positive",  # M as above; see `kl_token_mask` for the others
    entropy_change="exact",  # or "covariance"
    dynamic_sampling="filter",  # groups of equal rewards leave the batch
    overlong="none",  # a long completion is not punished
)

# On the embedded model the geometric mean stays inside 0.2/0.28 at a stable learning rate. A
# tighter clip shows what clipping does.
EMBEDDED = dict(epsilon=0.02, epsilon_high=0.028)

KL_MASKS = ("none", "all", "positive", "negative", "both")  # the paper's Table 3, panels A and E


def sequence_ratio(logp, old_logp, mask):
    """w_i [B], the geometric mean of the token ratios of a completion. logp, ...: [B, T]."""
    lengths = mask.sum(dim=1).clamp(min=1)
    return (log_ratio(logp, old_logp, mask).sum(dim=1) / lengths).exp()


def exact_entropy_change(entropy, old_entropy):
    """dH [B, T] = H(pi) - H(pi_old), without gradient. Both [B, T], in nats (Appendix C.2)."""
    return (entropy - old_entropy).detach()


def covariance_entropy_change(logp, advantages, mean_logp, mean_advantage):
    """A stand-in for dH [B, T]: -(log pi - mean log pi)(A - mean A), without gradient (C.5).

    logp: [B, T]; advantages: [B]; the means: numbers, over the tokens of the whole mini-batch, so
    that micro-batches agree on them. Only its sign is used: rewarding a likely token sharpens the
    distribution. Unlike the exact dH it is not 0 at pi = pi_old.
    """
    return -((logp - mean_logp) * (advantages.unsqueeze(1) - mean_advantage)).detach()


def kl_token_mask(advantages, entropy_change, mask, which="positive"):
    """M, bool [B, T]: the tokens that carry the KL term.

    advantages: [B]; entropy_change: dH [B, T]; mask: bool [B, T], the completion tokens;
    which: "positive" (A > 0 and dH < 0, which is TEPO), "negative" (A < 0 and dH > 0), "both" of
    them, "all" tokens, "none". Raises ValueError for any other word.
    """
    if which not in KL_MASKS:
        raise ValueError(f"kl_mask is one of {', '.join(KL_MASKS)}, not {which!r}")
    if which == "all":
        return mask.clone()
    if which == "none":
        return torch.zeros_like(mask)
    advantages = advantages.unsqueeze(1)  # [B, 1]
    positive = (advantages > 0) & (entropy_change < 0) & mask
    negative = (advantages < 0) & (entropy_change > 0) & mask
    if which == "positive":
        return positive
    if which == "negative":
        return negative
    return positive | negative


def tepo_loss(
    logp,
    old_logp,
    advantages,
    mask,
    *,
    entropy_change,
    num_tokens,
    epsilon_low=0.2,
    epsilon_high=0.28,
    beta=0.001,
    kl_mask="positive",
):
    """The TEPO loss: the mean over all tokens of the batch (Eq. 4).

    logp: [B, T], log-probs (nats) of the sampled tokens under the policy, with gradient;
    old_logp: [B, T], the same under the policy that sampled, a constant;
    advantages: [B], one for all tokens of a completion (grpo.group_advantages);
    mask: bool [B, T], True on completion tokens, the first stop token included. What stands where
        it is False may be anything, NaN included;
    entropy_change: dH [B, T] in nats, from one of the two functions above; only its sign counts;
    num_tokens: the True entries of the mask in *all* micro-batches of an optimizer step (not of the
        whole rollout). So the losses and gradients of micro-batches add up to those of the whole;
    epsilon_low, epsilon_high: w_i is clipped to [1 - epsilon_low, 1 + epsilon_high];
    beta: weight of the KL term, 0 or more;
    kl_mask: which tokens carry it, see `kl_token_mask`.

    Returns the scalar loss and a dict of detached [B, T] tensors for the log: ratio, the w_i of the
    token's completion; where each clip binds; kl, the k3 to the old policy; kl_mask_fraction, M.
    Raises ValueError for an unknown kl_mask.
    """
    ratio = sequence_ratio(logp, old_logp, mask).unsqueeze(1)  # [B, 1]: one for all tokens
    objective, low, high = clipped_objective(ratio, advantages, epsilon_low, epsilon_high)  # [B, 1]
    kl = k3(logp, old_logp, mask)  # [B, T]
    carries_kl = kl_token_mask(advantages, entropy_change, mask, kl_mask)  # [B, T]
    per_token = (objective - beta * kl * carries_kl) * mask  # [B, T]
    loss = -per_token.sum() / max(int(num_tokens), 1)
    metrics = {
        "ratio": ratio.detach().expand_as(kl),
        "clip_ratio/low": low & mask,
        "clip_ratio/high": high & mask,
        "kl": kl.detach(),
        "kl_mask_fraction": carries_kl,
    }
    return loss, metrics


def loss(batch, logp, entropy, args):
    """What train.py calls for each micro-batch. Returns the loss and metrics of `tepo_loss`.

    batch: dict with old_logp, old_entropy, advantages, mask, num_tokens, mean_logp, mean_advantage;
    logp, entropy: [B, T] under the policy; args: with the names of RECIPE.
    """
    if args.entropy_change == "exact":
        change = exact_entropy_change(entropy, batch["old_entropy"])
    else:
        change = covariance_entropy_change(
            logp, batch["advantages"], batch["mean_logp"], batch["mean_advantage"]
        )
    return tepo_loss(
        logp,
        batch["old_logp"],
        batch["advantages"],
        batch["mask"],
        entropy_change=change,
        num_tokens=batch["num_tokens"],
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon_high,
        beta=args.beta,
        kl_mask=args.kl_mask,
    )


def main(steps=30, seed=0):
    """Trains the embedded model on its sums by TEPO. Returns the mean reward of every step."""
    import tasks
    from engine.models import load_model, load_tokenizer, resolve_model, stop_token_ids
    from rollout import collate, sample, score, split_evenly

    torch.set_num_threads(1)  # enough for so small a model, and steady on a busy machine
    args = SimpleNamespace(**{**RECIPE, **EMBEDDED})
    num_prompts = 32  # of a rollout
    G = 8  # completions of a prompt
    mini_batches = 4  # of a rollout
    epochs = 2  # over it: up to 8 updates
    task = tasks.load("arithmetic", "train")
    tokenizer = load_tokenizer(resolve_model("tiny"))
    model = load_model(resolve_model("tiny"), "cpu")
    stop_ids = stop_token_ids(model, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-5, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    options = dict(
        max_completion_length=48, temperature=1.0, stop_ids=stop_ids, generator=generator
    )
    curve = []
    for step in range(steps):
        # 1. Sample G completions of each prompt.
        problems = tasks.take(task.problems, step * num_prompts, num_prompts, seed)
        prompts = [tokenizer(problem["prompt"]).input_ids for problem in problems]
        samples = sample(model, prompts, G, **options)

        # 2. Reward each completion. The group is its own baseline; one of equal rewards is dropped.
        for i, s in enumerate(samples):
            s.text = tokenizer.decode(s.completion_ids, skip_special_tokens=True)
            s.reward = task.reward(problems[i // G], s.text)
        rewards = torch.tensor([s.reward for s in samples])  # [B]
        for s, advantage in zip(samples, group_advantages(rewards, G).tolist()):
            s.advantage = advantage
        mixed = mixed_groups(rewards, G).tolist()
        groups = [samples[i * G : (i + 1) * G] for i in range(num_prompts) if mixed[i]]

        # 3. Old log-probs and entropies: those of the policy that sampled, without gradient. Where
        # groups were dropped there are fewer mini-batches, not smaller ones.
        batches = []
        count = math.ceil(mini_batches * len(groups) / num_prompts)
        for some_groups in split_evenly(groups, count):
            part = [s for group in some_groups for s in group]
            batch = collate(part, "cpu")
            batch["advantages"] = torch.tensor([s.advantage for s in part])
            batch["num_tokens"] = batch["mask"].sum().item()
            with torch.no_grad():
                batch["old_logp"], batch["old_entropy"] = score(model, batch, temperature=1.0)
            batches.append(batch)

        # 4. Update: an optimizer step for each mini-batch. From the second on, pi is not pi_old.
        clipped = 0  # tokens
        masked = 0
        tokens = 0
        for batch in batches * epochs:
            logp, entropy = score(model, batch, temperature=1.0)
            value, metrics = loss(batch, logp, entropy, args)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            clipped += (metrics["clip_ratio/low"] | metrics["clip_ratio/high"]).sum().item()
            masked += metrics["kl_mask_fraction"].sum().item()
            tokens += batch["num_tokens"]

        # 5. One line.
        curve.append(rewards.mean().item())
        clip = clipped / max(tokens, 1)
        M = masked / max(tokens, 1)
        print(f"step {step + 1:3d}  reward {curve[-1]:.3f}  clip {clip:.4f}  M {M:.3f}")
    return curve


if __name__ == "__main__":
    main()
