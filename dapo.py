"""DAPO: decoupled clip and dynamic sampling policy optimization (Yu et al. 2025, arXiv 2503.14476).

It takes GRPO's token ratio and group advantages, and changes four things:

    J = 1/(sum_i |y_i|) sum_i sum_t min(w_it A_i, clip(w_it, 1 - eps_low, 1 + eps_high) A_i)
        subject to 0 < #{right answers in the group} < G                                    (Eq. 8)

- Clip-higher: eps_low 0.2, eps_high 0.28, so that an unlikely token has room to grow.
- Token mean: one mean over all tokens of the batch, so that a token of a long completion weighs as
  much as one of a short completion.
- Dynamic sampling: a group of equal rewards has no gradient, so sampling goes on until the batch is
  full of mixed groups. It changes the *data*: read the reward before this filter.
- Overlong: a soft punishment is added to the reward as the length nears its limit (Eq. 13). There
  is no KL term.

Readings and deviations:
- Dynamic sampling is capped (max_rounds) and trains on what it has then; the paper loops on.
- Rewards are 1 and 0 here, and the paper's +1 and -1 with train.py --reward-scale dapo.
- Overlong filtering, the paper's simpler alternative, leaves truncated completions out of the loss:
  train.py --overlong filter.

`python dapo.py` trains the embedded model on its sums. `loss` is what train.py calls.
"""

import math
from types import SimpleNamespace

import torch

from grpo import clipped_objective, group_advantages, k3, log_ratio, mixed_groups

RECIPE = dict(
    epsilon=0.2,  # the lower clip is at 1 - epsilon
    epsilon_high=0.28,  # the upper clip is at 1 + epsilon_high
    dynamic_sampling="refill",  # sample on until the batch is full of mixed groups
    overlong="soft",  # a punishment that grows with the length, near the limit
)


def dapo_loss(logp, old_logp, advantages, mask, *, num_tokens, epsilon_low=0.2, epsilon_high=0.28):
    """The DAPO loss: the mean over all tokens of the batch (Eq. 8).

    logp: [B, T], log-probs (nats) of the sampled tokens under the policy, with gradient;
    old_logp: [B, T], the same under the policy that sampled, a constant;
    advantages: [B], one for all tokens of a completion (grpo.group_advantages);
    mask: bool [B, T], True on completion tokens, the first stop token included. What stands where
        it is False may be anything, NaN included;
    num_tokens: the True entries of the mask in *all* micro-batches of an optimizer step (not of the
        whole rollout). So the losses and gradients of micro-batches add up to those of the whole;
    epsilon_low, epsilon_high: the ratio is clipped to [1 - epsilon_low, 1 + epsilon_high].

    Returns the scalar loss and a dict of detached [B, T] tensors for the log: ratio; where each
    clip binds; kl, the k3 to the old policy; and where a KL term has weight (nowhere).
    """
    ratio = log_ratio(logp, old_logp, mask).exp()  # [B, T]
    objective, low, high = clipped_objective(ratio, advantages, epsilon_low, epsilon_high)
    loss = -(objective * mask).sum() / max(int(num_tokens), 1)
    metrics = {
        "ratio": ratio.detach(),
        "clip_ratio/low": low & mask,
        "clip_ratio/high": high & mask,
        "kl": k3(logp, old_logp, mask).detach(),
        "kl_mask_fraction": torch.zeros_like(mask),
    }
    return loss, metrics


def loss(batch, logp, entropy, args):
    """What train.py calls for each micro-batch. Returns the loss and metrics of `dapo_loss`.

    batch: dict with old_logp, advantages, mask, num_tokens; logp, entropy: [B, T] under the policy
    (DAPO has no use for entropies); args: with the names of RECIPE.
    """
    return dapo_loss(
        logp,
        batch["old_logp"],
        batch["advantages"],
        batch["mask"],
        num_tokens=batch["num_tokens"],
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon_high,
    )


def soft_overlong_punishment(lengths, max_length, cache):
    """What is added to a completion's reward (Eq. 13): 0, then falling linearly to -1, then -1.

    lengths: [B], in tokens; max_length: L_max, the longest completion; cache: L_cache, how long
    before it the punishment begins (20480 and 4096 in the paper). Returns [B] in [-1, 0].
    Raises ValueError unless 0 < cache <= max_length.
    """
    if not 0 < cache <= max_length:
        raise ValueError(
            f"the cache must be from 1 to the maximum length {max_length}, not {cache}"
        )
    return ((max_length - cache - lengths.float()) / cache).clamp(-1.0, 0.0)


def dynamic_sampling(sample_groups, num_prompts, max_rounds):
    """Samples until `num_prompts` mixed groups are there, or `max_rounds` rounds are spent.

    sample_groups: a function of n that samples n fresh prompts and returns a list of n groups (of
    any kind) and a bool tensor [n], which of them are mixed.
    Returns the mixed groups (at most num_prompts) and all groups that were sampled. There are fewer
    than num_prompts mixed ones only when the cap was hit.
    """
    mixed, sampled = [], []
    for _ in range(max_rounds):
        groups, keep = sample_groups(num_prompts)
        sampled += groups
        mixed += [group for group, kept in zip(groups, keep.tolist()) if kept]
        if len(mixed) >= num_prompts:
            break
    return mixed[:num_prompts], sampled


def main(steps=30, seed=0):
    """Trains the embedded model on its sums by DAPO. Returns the mean reward of every step."""
    import tasks
    from engine.models import load_model, load_tokenizer, resolve_model, stop_token_ids
    from rollout import collate, sample, score, split_evenly

    torch.set_num_threads(1)  # enough for so small a model, and steady on a busy machine
    args = SimpleNamespace(**RECIPE)
    num_prompts = 32  # of a rollout
    G = 8  # completions of a prompt
    T = 48  # tokens of a completion, at most
    mini_batches = 4  # of a rollout
    epochs = 2  # over it: 8 updates
    task = tasks.load("arithmetic", "train")
    tokenizer = load_tokenizer(resolve_model("tiny"))
    model = load_model(resolve_model("tiny"), "cpu")
    stop_ids = stop_token_ids(model, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-5, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    options = dict(max_completion_length=T, temperature=1.0, stop_ids=stop_ids, generator=generator)
    taken = 0  # problems so far
    curve = []

    def sample_groups(count):
        # 1. Sample G completions of each prompt.
        nonlocal taken
        problems = tasks.take(task.problems, taken, count, seed)
        taken += count
        prompts = [tokenizer(problem["prompt"]).input_ids for problem in problems]
        samples = sample(model, prompts, G, **options)
        # 2. Score each completion. Its length may be punished.
        for i, s in enumerate(samples):
            s.text = tokenizer.decode(s.completion_ids, skip_special_tokens=True)
            s.task_reward = task.reward(problems[i // G], s.text)
        lengths = torch.tensor([len(s.completion_ids) for s in samples])
        punishments = soft_overlong_punishment(lengths, T, cache=T // 5)
        for s, punishment in zip(samples, punishments.tolist()):
            s.reward = s.task_reward + punishment
        groups = [samples[i : i + G] for i in range(0, len(samples), G)]
        return groups, mixed_groups(torch.tensor([s.task_reward for s in samples]), G)

    for step in range(steps):
        # Dynamic sampling: steps 1 and 2 are repeated until the batch is full of mixed groups.
        groups, sampled = dynamic_sampling(sample_groups, num_prompts, max_rounds=10)
        for group in groups:
            advantages = group_advantages(torch.tensor([s.reward for s in group]), G)
            for s, advantage in zip(group, advantages.tolist()):
                s.advantage = advantage

        # 3. Old log-probs: those of the policy that sampled, from one pass without gradient.
        batches = []
        count = math.ceil(mini_batches * len(groups) / num_prompts)
        for some_groups in split_evenly(groups, count):
            part = [s for group in some_groups for s in group]
            batch = collate(part, "cpu")
            batch["advantages"] = torch.tensor([s.advantage for s in part])
            batch["num_tokens"] = batch["mask"].sum().item()
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
            tokens += batch["num_tokens"]

        # 5. One line. The reward is that of all groups, before the filter.
        rewards = [s.reward for group in sampled for s in group]
        curve.append(sum(rewards) / len(rewards))
        print(
            f"step {step + 1:3d}  reward {curve[-1]:.3f}  groups {len(sampled)}  "
            f"clip {clipped / max(tokens, 1):.4f}"
        )
    return curve


if __name__ == "__main__":
    main()
