"""GRPO: group relative policy optimization (DeepSeekMath, Shao et al. 2024, arXiv 2402.03300).

For one prompt the old policy samples a group of G completions y_1..y_G with rewards r_1..r_G. The
group is its own baseline, so no value network is needed: every token of y_i gets the advantage A_i.

    A_i   = (r_i - mean(r)) / std(r)                                                        (4.1.2)
    J     = 1/G sum_i 1/|y_i| sum_t { min(w_it A_i, clip(w_it, 1 - eps, 1 + eps) A_i)
                                      - beta KL[pi || pi_ref]_it }                          (Eq. 3)
    w_it  = pi(y_it | x, y_i<t) / pi_old(y_it | x, y_i<t)                                token ratio
    KL_it = pi_ref / pi - log(pi_ref / pi) - 1                                        (Eq. 4, "k3")

The loss is -J. At the first update after a rollout pi = pi_old, so every ratio is 1, and the value
of the loss is the mean of advantages that sum to zero. It says nothing about progress: look at the
reward. Its gradient does the work.

Readings and deviations:
- beta is 0 (0.04 in the paper): recipes since then leave the reference model out.
- std is the unbiased one, plus 1e-6. A group whose rewards are all equal gets exactly 0, by an
  equality test: rounding noise over a tiny epsilon has made large advantages of equal rewards.
- Log-ratios are cut to +-20 before exp, so that a broken ratio stays finite.
- 1/|y_i| makes a long wrong answer cheaper per token than a short one. Dr. GRPO (arXiv 2503.20783)
  removes that bias, and so does the token mean of dapo.py.

`python grpo.py` trains the embedded model on its sums. `loss` is what train.py calls.
"""

from types import SimpleNamespace

import torch

RECIPE = dict(
    epsilon=0.2,  # the lower clip is at 1 - epsilon
    epsilon_high=0.2,  # the upper clip is at 1 + epsilon_high
    beta=0.0,  # weight of the KL term to the frozen initial model
    dynamic_sampling="off",  # groups of equal rewards stay in the batch
    overlong="none",  # a long completion is not punished
)

LOG_RATIO_LIMIT = 20.0  # far outside of any clip


def group_advantages(rewards, num_generations, eps=1e-6, scale=True):
    """Rewards, centred and scaled within each group (DeepSeekMath 4.1.2; TEPO Eq. 4).

    rewards: [B]; rows i*G .. (i+1)*G-1 are the completions of prompt i. Groups go by position,
    never by the prompt's text. num_generations: G. scale: whether to divide by the deviation of the
    group; Dr. GRPO does not. Returns advantages [B]: exactly 0 in a group whose rewards are all
    equal. Raises ValueError when B is not a multiple of G, or G < 2.
    """
    if num_generations < 2 or len(rewards) % num_generations:
        raise ValueError(
            f"{len(rewards)} rewards do not make groups of {num_generations} (2 or more)"
        )
    groups = rewards.float().view(-1, num_generations)  # [B/G, G]
    centred = groups - groups.mean(dim=1, keepdim=True)
    advantages = centred
    if scale:
        advantages = centred / (groups.std(dim=1, keepdim=True) + eps)
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).view(-1)


def mixed_groups(scores, num_generations):
    """Which groups have something to learn from: those whose scores are not all equal.

    scores: [B], before any punishment. Returns bool [B/G].
    """
    groups = scores.view(-1, num_generations)
    return (groups != groups[:, :1]).any(dim=1)


def log_ratio(logp, other_logp, mask):
    """logp - other_logp, all [B, T]: 0 outside the mask, cut to +-LOG_RATIO_LIMIT.

    other_logp gets no gradient.
    """
    # Filling before the subtraction keeps NaN and inf of the padding out of the backward pass too.
    logp = logp.masked_fill(~mask, 0.0)
    other_logp = other_logp.detach().masked_fill(~mask, 0.0)
    return (logp - other_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clipped_objective(ratio, advantages, epsilon_low, epsilon_high):
    """PPO's pessimistic bound min(w A, clip(w, 1 - eps_low, 1 + eps_high) A) (arXiv 1707.06347).

    ratio: [B, T], or [B, 1] for one ratio a completion; advantages: [B]. Returns the bound and two
    bool tensors of its shape: where the lower and the upper clip bind, that is, where the gradient
    is exactly 0.
    """
    advantages = advantages.unsqueeze(1)  # [B, 1]
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    low = (ratio < 1 - epsilon_low) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return objective, low, high


def k3(logp, anchor_logp, mask):
    """KL(pi || anchor) from the sampled token alone: exp(d) - 1 - d, d = log anchor - log pi.

    logp, anchor_logp, mask: [B, T]. Returns [B, T], 0 outside the mask. It is never negative, 0
    where the two agree, and its mean over samples of pi is the KL (Schulman 2020, "Approximating
    KL divergence"). expm1 keeps the digits of small values.
    """
    d = -log_ratio(logp, anchor_logp, mask)
    return torch.expm1(d) - d


def grpo_loss(
    logp,
    old_logp,
    advantages,
    mask,
    *,
    num_sequences,
    epsilon_low=0.2,
    epsilon_high=0.2,
    beta=0.0,
    ref_logp=None,
):
    """The GRPO loss: the mean over the tokens of a completion, then the mean over completions.

    logp: [B, T], log-probs (nats) of the sampled tokens under the policy, with gradient;
    old_logp: [B, T], the same under the policy that sampled, a constant;
    advantages: [B], one for all tokens of a completion;
    mask: bool [B, T], True on completion tokens, the first stop token included. What stands where
        it is False may be anything, NaN included;
    num_sequences: completions with at least one token in *all* micro-batches of an optimizer step.
        So the losses and gradients of its micro-batches add up to those of the whole;
    epsilon_low, epsilon_high: the ratio is clipped to [1 - epsilon_low, 1 + epsilon_high];
    beta: weight of the KL term, 0 or more;
    ref_logp: [B, T], log-probs under the frozen reference model; needed only when beta > 0.

    Returns the scalar loss and a dict of detached [B, T] tensors for the log: ratio; where each
    clip binds; kl, the k3 to the reference (to the old policy when beta is 0); and where a KL term
    has weight. Raises ValueError when beta > 0 has no ref_logp to pull to.
    """
    if beta and ref_logp is None:
        raise ValueError("grpo_loss: beta > 0 needs ref_logp, the log-probs under the reference")
    ratio = log_ratio(logp, old_logp, mask).exp()  # [B, T]
    objective, low, high = clipped_objective(ratio, advantages, epsilon_low, epsilon_high)
    anchor_logp = ref_logp if beta else old_logp
    kl = k3(logp, anchor_logp, mask)  # [B, T]
    per_token = objective
    if beta:
        per_token = per_token - beta * kl
    per_token = per_token * mask
    per_sequence = per_token.sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # [B]
    loss = -per_sequence.sum() / max(int(num_sequences), 1)
    metrics = {
        "ratio": ratio.detach(),
        "clip_ratio/low": low & mask,
        "clip_ratio/high": high & mask,
        "kl": kl.detach(),
        "kl_mask_fraction": mask if beta else torch.zeros_like(mask),
    }
    return loss, metrics


def loss(batch, logp, entropy, args):
    """What train.py calls for each micro-batch. Returns the loss and metrics of `grpo_loss`.

    batch: dict with old_logp, advantages, mask, num_sequences, and ref_logp when args.beta > 0 (for
    all that train.py puts into it see train.old_statistics);
    logp, entropy: [B, T] under the policy (GRPO has no use for entropies); args: as in RECIPE.
    """
    return grpo_loss(
        logp,
        batch["old_logp"],
        batch["advantages"],
        batch["mask"],
        num_sequences=batch["num_sequences"],
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon_high,
        beta=args.beta,
        ref_logp=batch.get("ref_logp"),
    )


def needs_reference(args):
    """Whether train.py has to keep a frozen copy of the initial model, for batch["ref_logp"]."""
    return args.beta > 0


def main(steps=30, seed=0):
    """Trains the embedded model on its sums by GRPO. Returns the mean reward of every step."""
    import tasks
    from engine.models import load_model, load_tokenizer, resolve_model, stop_token_ids
    from rollout import collate, sample, score, split_evenly

    torch.set_num_threads(1)  # enough for so small a model, and steady on a busy machine
    args = SimpleNamespace(**RECIPE)
    num_prompts = 32  # of a rollout
    G = 8  # completions of a prompt
    mini_batches = 4  # of a rollout
    epochs = 2  # over it: 8 updates
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

        # 2. Reward each completion. The group is its own baseline.
        for i, s in enumerate(samples):
            s.text = tokenizer.decode(s.completion_ids, skip_special_tokens=True)
            s.reward = task.reward(problems[i // G], s.text)
        rewards = torch.tensor([s.reward for s in samples])  # [B]
        for s, advantage in zip(samples, group_advantages(rewards, G).tolist()):
            s.advantage = advantage

        # 3. Old log-probs: those of the policy that sampled, from one pass without gradient.
        batches = []
        for part in split_evenly(samples, mini_batches):
            batch = collate(part, "cpu")
            batch["advantages"] = torch.tensor([s.advantage for s in part])
            batch["num_sequences"] = len(part)
            with torch.no_grad():
                batch["old_logp"], _ = score(model, batch, temperature=1.0)
            batches.append(batch)

        # 4. Update: an optimizer step for each mini-batch.
        clipped = 0  # tokens
        tokens = 0
        for batch in batches * epochs:
            logp, entropy = score(model, batch, temperature=1.0)
            value, metrics = loss(batch, logp, entropy, args)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            clipped += (metrics["clip_ratio/low"] | metrics["clip_ratio/high"]).sum().item()
            tokens += batch["mask"].sum().item()

        # 5. One line.
        curve.append(rewards.mean().item())
        print(f"step {step + 1:3d}  reward {curve[-1]:.3f}  clip {clipped / tokens:.4f}")
    return curve


if __name__ == "__main__":
    main()
