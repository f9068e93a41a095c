"""Train a language model with TEPO, GRPO or DAPO on problems whose answers can be checked. Reads from top to bottom.

    python train.py --algo tepo                      # the embedded 0.4M-parameter model, two CPU cores, under a minute
    python train.py --algo tepo --model DIR_OR_ID    # any causal language model

One step is one rollout and the optimizer updates made on it:

    1. sample   G completions for each of num_prompts prompts                                   rollout.sample
    2. reward   check each answer; group the rewards into advantages                            reward.is_right, grpo.group_advantages
    3. score    log-probs and entropies under the policy that sampled, kept as "old"            rollout.score
    4. update   steps_per_generation mini-batches x num_iterations epochs, one AdamW step each  grpo / dapo / tepo loss

A mini-batch that is too large for one pass is cut into micro-batches, whose gradients add up.

At the first update of a rollout, where pi = pi_old, TEPO and DAPO have the same gradient (and GRPO's only weighs the tokens
by 1/|y_i|). They part at the later ones: a setting with one update per rollout can't tell them apart.
"""

import argparse
import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import data
from data import UserError
from reward import is_right
from runs import (
    add_flag, add_run_flags, at_least, check_output_dir, is_embedded, latest_checkpoint, load_trainer_state, open_output_dir, parse_resumable,
    peak_memory_gb, plot_curves, rewind, run_script, save_checkpoint, write_json, write_jsonl,
)  # fmt: skip

# What works without a flag: on the embedded model, and on real ones (one 80 GB GPU). --preset paper is Section 4.1 of TEPO,
# whose "updated 8 times" and mini-batches of 16 of 64 prompts are read as 4 mini-batches x 2 epochs. LORA: adapters want more.
TINY = dict(data="arithmetic", steps=30, num_prompts=32, learning_rate=3e-5, max_completion_length=48, rollout_batch_size=512, num_iterations=1, save_steps=10, gradient_checkpointing=False)  # fmt: skip
REAL = dict(data="dapo-math-17k", steps=100, num_prompts=64, learning_rate=1e-6, max_completion_length=2048, rollout_batch_size=128, num_iterations=1, save_steps=20, gradient_checkpointing=True)  # fmt: skip
PAPER = REAL | dict(steps=72, learning_rate=5e-7, max_completion_length=8192, num_iterations=2, rollout_batch_size=32)
LORA = dict(learning_rate=1e-5)
ALGO = {
    "grpo": dict(epsilon_high=0.2, beta=0.0, dynamic_sampling="off", overlong="none"),
    "dapo": dict(epsilon_high=0.28, beta=0.0, dynamic_sampling="refill", overlong="soft"),
    "tepo": dict(epsilon_high=0.28, beta=0.001, dynamic_sampling="filter", overlong="none"),
}


def build_parser():
    """The flags; defaults that depend on the model or the algorithm are filled in by parse_args."""
    usage = "python train.py --algo {tepo,grpo,dapo} [--model MODEL] [--data DATA] [flags]   (--help explains them)"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=usage)

    tables = {"on tiny": TINY, "else": REAL, **{f"for {algo}": table for algo, table in ALGO.items()}}
    flag = partial(add_flag, parser, tables)
    flag("--algo", "tepo", "the objective", choices=list(ALGO))
    flag("--model", "tiny", "a directory, a hub id, or a known name such as Qwen2.5-1.5B; tiny is the embedded model")
    flag("--data", None, f"training problems: {', '.join(data.names('train'))}, or a .jsonl/.parquet file or a folder")
    parser.add_argument("--preset", choices=["paper"], help="defaults of the TEPO paper's Section 4.1, for a real model")
    # Sampling
    flag("--steps", None, "rollouts to make", int)
    flag("--num-prompts", None, "prompts of a rollout", int)
    flag("--num-generations", 8, "completions of a prompt, G")
    flag("--max-prompt-length", 2048, "longer prompts are left out, never cut; in tokens")
    flag("--max-completion-length", None, "tokens of a completion, at most", int)
    flag("--temperature", 1.0, "sampling temperature; log-probs are taken at it too")
    flag("--rollout-batch-size", None, "completions sampled at once: bounds the key/value cache", int)
    flag("--compile", False, "decode by torch.compile and CUDA graphs, with a bf16 copy of the weights; for a GPU, where it was not measured")
    flag("--dynamic-sampling", None, "groups of equal scores: off keeps them, filter drops them, refill samples on until the batch is full of mixed groups", choices=["off", "filter", "refill"])  # fmt: skip
    flag("--max-sampling-rounds", 10, "cap on refill: rollouts of num-prompts prompts a step")
    # Reward
    flag("--overlong", None, "soft: DAPO's punishment on the reward; filter: truncated completions leave the loss", choices=["none", "soft", "filter"])  # fmt: skip
    flag("--overlong-cache", 0, "tokens before the limit at which the soft punishment begins; 0: a fifth of the limit")
    flag("--reward-scale", "unit", "unit: 1 and 0 for right and wrong; dapo: +1 and -1", choices=["unit", "dapo"])
    # Objective
    flag("--epsilon", 0.2, "clip the ratio below 1 - epsilon")
    flag("--epsilon-high", None, "clip the ratio above 1 + epsilon-high", float)
    flag("--beta", None, "weight of the KL term: to the initial model in grpo, to the old policy in tepo", float)
    flag("--kl-mask", "positive", "tepo: tokens that carry the KL term", choices=["none", "all", "positive", "negative", "both"])
    flag("--entropy-change", "exact", "tepo: what decides the sign of dH", choices=["exact", "covariance"])
    # Optimizer
    flag("--learning-rate", None, f"AdamW's, constant; {LORA['learning_rate']} with --lora-rank on a real model", float)
    flag("--adam-beta2", 0.95, "AdamW's second moment")
    flag("--weight-decay", 0.0, "AdamW's decoupled decay")
    flag("--max-grad-norm", 1.0, "gradient norm is clipped to this")
    flag("--steps-per-generation", 4, "mini-batches that a rollout is cut into, an update each")
    flag("--num-iterations", None, "epochs over a rollout", int)
    flag("--max-tokens-per-batch", 16384, "tokens of prompts and completions in one forward pass: lower it when out of memory")
    flag("--gradient-checkpointing", None, "recompute activations in the backward pass", bool)
    flag("--lora-rank", 0, "train low-rank adapters of this rank in place of all weights (pip install peft); 0: all weights")
    # House-keeping
    flag("--save-steps", None, "checkpoint every so many steps, and at the end; 0: only at the end", int)
    flag("--log-completions-steps", 10, "write a few completions every so many steps")
    add_run_flags(parser, "train")
    return parser


def parse_args(argv=None):
    """Flags, with the defaults of the algorithm and the model filled in. Raises UserError on a combination that can't work."""
    parser = build_parser()
    args = parse_resumable(parser, argv, free=("steps", "learning_rate", "save_steps", "log_completions_steps"))
    embedded = is_embedded(args.model)
    if args.preset and embedded:
        raise UserError("--preset paper is for a real model: give --model")
    by_model = TINY if embedded else {**(PAPER if args.preset else REAL), **(LORA if args.lora_rank else {})}
    for key, value in {**by_model, **ALGO[args.algo]}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.overlong_cache = args.overlong_cache or max(1, args.max_completion_length // 5)

    if args.algo == "dapo" and args.beta:
        raise UserError("--beta: dapo has no KL term; use --algo tepo or grpo")
    for key in ("kl_mask", "entropy_change"):
        if args.algo != "tepo" and getattr(args, key) != parser.get_default(key):
            raise UserError(f"--{key.replace('_', '-')} belongs to --algo tepo, not {args.algo}")
    if args.temperature <= 0:
        raise UserError("--temperature must be above 0 in training: greedy completions are all the same and carry no advantage")
    if args.num_generations < 2:
        raise UserError("--num-generations must be at least 2: a group of one is its own mean and has no advantage")
    at_least(args, 1, "steps num_prompts max_prompt_length max_completion_length max_sampling_rounds steps_per_generation num_iterations "
                      "max_tokens_per_batch log_completions_steps overlong_cache")  # fmt: skip
    at_least(args, 0, "beta weight_decay lora_rank save_steps threads")
    if not 0 < args.epsilon < 1 or not 0 <= args.adam_beta2 < 1 or min(args.epsilon_high, args.learning_rate, args.max_grad_norm) <= 0:
        raise UserError("--epsilon must be in (0, 1), --adam-beta2 in [0, 1), --epsilon-high, --learning-rate and --max-grad-norm above 0")
    if args.num_prompts % args.steps_per_generation:
        raise UserError(f"--num-prompts {args.num_prompts} can't be cut into --steps-per-generation {args.steps_per_generation} equal mini-batches")
    if args.rollout_batch_size < args.num_generations:
        raise UserError(f"--rollout-batch-size must be at least --num-generations, {args.num_generations}: a group is sampled together")
    if args.overlong_cache > args.max_completion_length:
        raise UserError("--overlong-cache can't be longer than --max-completion-length")
    return args


def with_adapters(model, rank, checkpoint):
    """The model with LoRA adapters on every linear layer, fresh or from a checkpoint; all else is frozen.

    Raises UserError where peft is not installed.
    """
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError:
        raise UserError("--lora-rank needs peft: pip install peft") from None
    if checkpoint:
        return PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear"))


def objective(args, batch, logp, entropy, totals):
    """The loss of one micro-batch under the chosen method, and the dict of [B, T] tensors for the log (see grpo.grpo_loss).

    batch: from `with_old_logp` in `train`; logp, entropy: [B, T] under the policy; totals: the whole mini-batch's counts and means.
    """
    from dapo import dapo_loss
    from grpo import grpo_loss
    from tepo import covariance_entropy_change, exact_entropy_change, tepo_loss

    tensors = (logp, batch["old_logp"], batch["advantages"], batch["loss_mask"])
    clip = dict(epsilon_low=args.epsilon, epsilon_high=args.epsilon_high)
    if args.algo == "grpo":
        return grpo_loss(*tensors, num_sequences=totals["sequences"], beta=args.beta, ref_logp=batch.get("ref_logp"), **clip)
    if args.algo == "dapo":
        return dapo_loss(*tensors, num_tokens=totals["tokens"], **clip)
    if args.entropy_change == "exact":
        change = exact_entropy_change(entropy, batch["old_entropy"])
    else:
        change = covariance_entropy_change(logp, batch["advantages"], totals["mean_logp"], totals["mean_advantage"])
    return tepo_loss(
        *tensors, entropy_change=change, num_tokens=totals["tokens"], beta=args.beta, kl_mask=args.kl_mask, **clip
    )


def train(args):
    """One run: see the top of this file. Returns the rows of metrics.jsonl. Raises UserError for what the user can mend."""
    import torch
    from tqdm import tqdm

    from dapo import dynamic_sampling, mixed_groups, overlong_filter, soft_overlong_punishment
    from grpo import group_advantages
    from models import (
        check_positions, fastest_thread_count, has_adapters, load_model, load_tokenizer, memory_estimate, pick_device, resolve_model,
        sampling_copy, stop_token_ids,
    )  # fmt: skip
    from rollout import collate, compiled, micro_batches, sample, score

    check_output_dir(args)
    device, name = pick_device(args.device), resolve_model(args.model)
    resumed = latest_checkpoint(args.output_dir) if args.resume else None
    tokenizer = load_tokenizer(name)
    problems = data.load_prompts(args.data, "train", tokenizer, args.max_prompt_length, args.data_root)
    # fp32 master weights; the frozen base of a LoRA run can be bf16 on a GPU, since no update is ever added to it.
    base_dtype = torch.bfloat16 if args.lora_rank and device.type == "cuda" else torch.float32
    model = load_model(name if args.lora_rank or not resumed else str(resumed), device, base_dtype)
    if args.lora_rank:
        if has_adapters(name):
            raise UserError(f"--lora-rank: {name} holds adapters itself; --resume goes on with them, without --lora-rank all weights are trained")
        torch.manual_seed(args.seed)
        model = with_adapters(model, args.lora_rank, resumed)
    reference = load_model(name, device, base_dtype).requires_grad_(False) if args.algo == "grpo" and args.beta else None
    longest = max(len(problem["prompt_ids"]) for problem in problems)
    check_positions(model, longest + args.max_completion_length)
    at_once = min(args.num_prompts, args.rollout_batch_size // args.num_generations)  # prompts
    graphs, sampler = None, model
    if args.compile:
        sampler = sampling_copy(model, torch.bfloat16 if device.type == "cuda" else base_dtype)
        graphs = compiled(at_once * args.num_generations, longest + args.max_completion_length)
    directory = open_output_dir(args, f"{args.algo}-{Path(args.model).name}")
    if device.type == "cpu":
        args.threads = args.threads or fastest_thread_count(model)
        torch.set_num_threads(args.threads)
    write_json(directory / "args.json", vars(args))

    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.learning_rate, betas=(0.9, args.adam_beta2), weight_decay=args.weight_decay, fused=True
    )
    generator = torch.Generator().manual_seed(args.seed)
    step, cursor = load_trainer_state(resumed, optimizer, generator) if resumed else (0, 0)
    rows = rewind(directory, step)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    stop_ids = stop_token_ids(model, tokenizer)

    print(f"{args.algo} on {name}: {sum(p.numel() for p in parameters):,} trained parameters on {device}"
          + (f" with {args.threads} thread(s)" if device.type == "cpu" else "") + "; expected memory: "
          + ", ".join(f"{1000 * gb:,.0f} MB {part}" for part, gb in memory_estimate(model, device, args, longest).items()))  # fmt: skip
    print(f"a step: {args.num_prompts} prompts x {args.num_generations} completions of at most {args.max_completion_length} tokens, "
          f"so at most {args.num_prompts * args.num_generations * args.max_completion_length:,}; {args.steps_per_generation} mini-batches x "
          f"{args.num_iterations} epoch(s) = {args.steps_per_generation * args.num_iterations} updates; "
          f"stop tokens {tokenizer.convert_ids_to_tokens(stop_ids)}; writing to {directory}")  # fmt: skip

    def sample_groups(count):
        """Samples and judges `count` fresh prompts; returns their groups and which of them are mixed."""
        nonlocal cursor
        chosen = data.take(problems, cursor, count, args.seed)
        cursor += count
        samples = []
        if graphs:
            with torch.no_grad():
                for own, trained in zip(sampler.parameters(), model.parameters()):
                    own.copy_(trained)
        for start in range(0, count, at_once):
            with nullcontext() if graphs else autocast:
                samples += sample(
                    sampler, [problem["prompt_ids"] for problem in chosen[start : start + at_once]], args.num_generations,
                    max_completion_length=args.max_completion_length, temperature=args.temperature, stop_ids=stop_ids,
                    generator=generator, graphs=graphs,
                )  # fmt: skip
        for i, s in enumerate(samples):
            s["problem"] = chosen[i // args.num_generations]
            s["text"] = tokenizer.decode(s["completion_ids"], skip_special_tokens=True)
            s["right"] = float(is_right(s["text"], s["problem"]["answer"], s["problem"]["styles"]))
            s["reward"] = 2 * s["right"] - 1 if args.reward_scale == "dapo" else s["right"]
        if args.overlong == "soft":
            lengths = torch.tensor([len(s["completion_ids"]) for s in samples])
            punishments = soft_overlong_punishment(lengths, args.max_completion_length, args.overlong_cache)
            for s, punishment in zip(samples, punishments.tolist()):
                s["reward"] += punishment
        groups = [samples[i : i + args.num_generations] for i in range(0, len(samples), args.num_generations)]
        return groups, mixed_groups(torch.tensor([s["right"] for s in samples]), args.num_generations)

    def with_old_logp(samples):
        """A mini-batch as micro-batches with old log-probs and entropies, and the counts they share."""
        batches = []
        for part in micro_batches(samples, args.max_tokens_per_batch):
            batch = collate(part, device)
            batch["advantages"] = torch.tensor([s["advantage"] for s in part], device=device)
            with torch.no_grad(), autocast:
                # The very batch that the update will use, so that the first ratio is exactly 1 in any precision.
                batch["old_logp"], batch["old_entropy"] = score(model, batch, args.temperature)
                if reference is not None:
                    batch["ref_logp"], _ = score(reference, batch, args.temperature)
            sampled = torch.tensor([x for s in part for x in s["logp"]], device=device)
            batch["sampling_gap"] = (sampled - batch["old_logp"][batch["mask"]]).abs()
            truncated = torch.tensor([s["truncated"] for s in part], device=device)
            batch["loss_mask"] = overlong_filter(batch["mask"], truncated) if args.overlong == "filter" else batch["mask"]
            batches.append(batch)
        total = lambda value_of: sum((value_of(batch) * batch["loss_mask"]).sum().item() for batch in batches)  # noqa: E731
        tokens = total(lambda batch: 1)
        # The covariance proxy is centred on the *old* log-probs: known before the update, so every micro-batch has the same mean.
        return batches, {
            "tokens": tokens,
            "sequences": sum(batch["loss_mask"].any(dim=1).sum().item() for batch in batches),
            "mean_logp": total(lambda batch: batch["old_logp"]) / max(tokens, 1),
            "mean_advantage": total(lambda batch: batch["advantages"].unsqueeze(1)) / max(tokens, 1),
        }

    bar = tqdm(total=args.steps, initial=step, desc=args.algo, disable=None)
    while step < args.steps:
        step += 1
        clock = [time.perf_counter()]
        # 1, 2. sample and reward
        if args.dynamic_sampling == "refill":
            groups, sampled, rounds = dynamic_sampling(sample_groups, args.num_prompts, args.max_sampling_rounds)
            if len(groups) < args.num_prompts:
                tqdm.write(f"step {step}: {len(groups)} of {args.num_prompts} groups are mixed after {rounds} rounds (--max-sampling-rounds); training on those")
        else:
            sampled, mixed = sample_groups(args.num_prompts)
            groups = [g for g, keep in zip(sampled, mixed.tolist()) if keep] if args.dynamic_sampling == "filter" else sampled
        everyone = [s for group in sampled for s in group]
        for group in groups:
            advantages = group_advantages(torch.tensor([s["reward"] for s in group]), args.num_generations)
            for s, advantage in zip(group, advantages.tolist()):
                s["advantage"] = advantage
        clock.append(time.perf_counter())

        # 3. score: mini-batches of whole groups; after a filter there are fewer of them, as full and as even as can be
        # (17 groups that are left of 32, and 4 mini-batches: 3 of them, of 5, 6 and 6 groups)
        count = -(-len(groups) * args.steps_per_generation // args.num_prompts)
        cuts = [i * len(groups) // count for i in range(count + 1)] if count else []
        minis = [with_old_logp([s for group in groups[a:b] for s in group]) for a, b in zip(cuts, cuts[1:])]
        gaps = torch.cat([batch["sampling_gap"] for batches, _ in minis for batch in batches]) if minis else torch.zeros(1)
        gap = gaps.max().item()
        # In fp32 rounding is a thousand times smaller. In bf16 a rare token can be far off, but not the mean.
        if (gaps.mean().item() > 0.2) if device.type == "cuda" else gap > 0.05:
            raise UserError(f"step {step}: the log-probs of sampler and scorer differ by up to {gap:.2f}: rollout.score does not compute the logits "
                            f"of {model.config.model_type} (is there a scaling behind its LM head?), so training would be wrong")  # fmt: skip
        clock.append(time.perf_counter())

        # 4. update
        sums = dict.fromkeys(["tokens", "entropy", "kl", "kl_mask", "clip_low", "clip_high"], 0.0)
        deviation, grad_norms = 0.0, []
        model.train()  # there is no dropout; gradient checkpointing asks for train mode
        for batches, totals in minis * args.num_iterations:
            if not totals["tokens"]:  # all truncated, and filtered out: even an empty step would let AdamW's momentum move
                continue
            for batch in batches:
                with autocast:
                    logp, entropy = score(model, batch, args.temperature)
                mask = batch["loss_mask"]
                loss, parts = objective(args, batch, logp, entropy, totals)
                loss.backward()
                sums["tokens"] += mask.sum().item()
                sums["entropy"] += entropy[mask].sum().item()
                for key in ("kl", "kl_mask", "clip_low", "clip_high"):
                    sums[key] += parts[key][mask].sum().item()
                deviation = max(deviation, (parts["ratio"] - 1)[mask].abs().max().item() if mask.any() else 0.0)
            grad_norms.append(torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item())
            if not math.isfinite(grad_norms[-1]):
                raise UserError(f"step {step}: the gradient is {grad_norms[-1]}, so training stops before it reaches the weights; "
                                "--resume with a lower --learning-rate goes on from the last checkpoint")  # fmt: skip
            optimizer.step()
            optimizer.zero_grad()  # here rather than before the next update: no gradient takes up memory while sampling
        clock.append(time.perf_counter())

        # 5. log
        lengths = [len(s["completion_ids"]) for s in everyone]
        per_token = {key: value / sums["tokens"] if sums["tokens"] else None for key, value in sums.items()}
        mean = lambda values: sum(values) / max(len(values), 1)  # noqa: E731
        seconds = [after - before for before, after in zip(clock, clock[1:])]
        rows.append({
            "step": step,
            "reward": mean([s["reward"] for s in everyone]),
            "accuracy": mean([s["right"] for s in everyone]),
            "frac_reward_zero_std": mean([len({s["reward"] for s in group}) == 1 for group in sampled]),
            "completions/mean_length": mean(lengths),
            "completions/max_length": max(lengths),
            "completions/clipped_ratio": mean([s["truncated"] for s in everyone]),
            "entropy": per_token["entropy"],
            "clip_ratio/low": per_token["clip_low"],
            "clip_ratio/high": per_token["clip_high"],
            "kl": per_token["kl"],
            "kl_mask_fraction": per_token["kl_mask"],
            "grad_norm": mean(grad_norms),
            "max_ratio_deviation": deviation,
            "sampling_logp_difference": gap,
            "groups_trained": len(groups),
            "groups_sampled": len(sampled),
            "updates": len(grad_norms),
            "tokens_per_second": sum(lengths) / sum(seconds),
            "seconds/sample": seconds[0], "seconds/score": seconds[1], "seconds/update": seconds[2],
            "peak_memory_gb": peak_memory_gb(device),
        })  # fmt: skip
        row = rows[-1]
        write_jsonl(directory / "metrics.jsonl", [row], mode="a")
        if step % args.log_completions_steps == 0 or step in (1, args.steps):
            write_jsonl(directory / "completions.jsonl", [
                {"step": step, "prompt": s["problem"]["prompt"], "completion": s["text"], "reward": s["reward"],
                 "answer": s["problem"]["answer"], "truncated": s["truncated"]}
                for group in sampled[:2] for s in group[:2]
            ], mode="a")  # fmt: skip
        # A step whose groups were all filtered out makes no update; what is measured while updating is null.
        updated = "no token to learn from, no update" if not sums["tokens"] else (
            f"entropy {row['entropy']:.3f}  clip {row['clip_ratio/low'] + row['clip_ratio/high']:.4f}  kl {row['kl']:.4f}  grad {row['grad_norm']:.2f}"
        )  # fmt: skip
        tqdm.write(f"step {step:3d}  reward {row['reward']:+.3f}  right {row['accuracy']:.3f}  equal groups {row['frac_reward_zero_std']:.2f}  "
                   f"length {row['completions/mean_length']:.1f}  {updated}  {sum(seconds):.1f} s")  # fmt: skip
        bar.update()
        if step == args.steps or args.save_steps and step % args.save_steps == 0:
            save_checkpoint(directory, step, model, tokenizer, optimizer, generator, cursor)
            plot_curves(rows, directory / "curves.png")
    bar.close()
    return rows


def main():
    started = time.time()
    args = parse_args()
    rows = train(args)
    if rows:
        mean = lambda part: sum(row["reward"] for row in part) / len(part)  # noqa: E731
        print(f"mean reward {mean(rows[:3]):.3f} in the first {len(rows[:3])} steps, {mean(rows[-5:]):.3f} in the last {len(rows[-5:])}; "
              f"{time.time() - started:.0f} s in all")  # fmt: skip
    print(f"metrics.jsonl, curves.png, completions.jsonl and the checkpoint are in {args.output_dir}")


if __name__ == "__main__":
    run_script(main, "train.py")
