"""Train a language model with TEPO, GRPO or DAPO on problems whose answers can be checked. Reads from top to bottom.

    python train.py --algo tepo                      # the embedded 0.4M-parameter model, two CPU cores, about a minute
    python train.py --algo tepo --model DIR_OR_ID    # any causal language model

One step is one rollout and the optimizer updates made on it:

    1. sample   G completions for each of num_prompts prompts                                   rollout.sample
    2. reward   check each answer; group the rewards into advantages                            data.reward, grpo.group_advantages
    3. score    log-probs and entropies under the policy that sampled, kept as "old"            rollout.score
    4. update   steps_per_generation mini-batches x num_iterations epochs, one AdamW step each  grpo / dapo / tepo loss

The three methods have the same gradient direction at the first update of a rollout, where pi = pi_old (GRPO weighs tokens
by 1/|y_i|); they part at the later ones, so a setting with one update per rollout can't tell them apart.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from data import UserError, is_right, load_problems, take
from runs import latest_checkpoint, load_trainer_state, open_output_dir, peak_memory_gb, plot_curves, rewind, save_checkpoint, write_json

# What works without a flag: on the embedded model, and on real ones (one 80 GB GPU).
TINY = dict(data="arithmetic", steps=30, num_prompts=32, learning_rate=3e-5, max_completion_length=48, save_steps=0)
REAL = dict(data="dapo-math-17k", steps=100, num_prompts=64, learning_rate=1e-6, max_completion_length=2048, save_steps=20)
ALGO = {
    "grpo": dict(epsilon_high=0.2, beta=0.0, dynamic_sampling="off", overlong="none"),
    "dapo": dict(epsilon_high=0.28, beta=0.0, dynamic_sampling="refill", overlong="soft"),
    "tepo": dict(epsilon_high=0.28, beta=0.001, dynamic_sampling="filter", overlong="none"),
}


def build_parser():
    usage = "python train.py --algo {tepo,grpo,dapo} [--model MODEL] [--data DATA] [flags]   (--help explains them)"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=usage)

    def flag(name, default, help, kind=str, choices=None):
        if default is False:
            parser.add_argument(name, action="store_true", help=help)
        elif default is None:
            parser.add_argument(name, type=kind, choices=choices, help=help)
        else:
            parser.add_argument(name, default=default, type=type(default), choices=choices, help=f"{help} (default: {default})")

    def by_model(key):
        return f" (default: {TINY[key]} on tiny, {REAL[key]} else)"

    def by_algo(key):
        return " (default: " + ", ".join(f"{values[key]} for {algo}" for algo, values in ALGO.items()) + ")"

    flag("--algo", "tepo", "the objective", choices=list(ALGO))
    flag("--model", "tiny", "a directory or a hub id; tiny is the embedded model")
    flag("--data", None, "training problems: arithmetic" + by_model("data"))
    flag("--output-dir", None, "where the run is written; default: a fresh directory under runs/")
    flag("--resume", False, "go on with the run in --output-dir from its last checkpoint")
    flag("--overwrite", False, "replace the run in --output-dir")
    # Sampling
    flag("--steps", None, "rollouts to make" + by_model("steps"), int)
    flag("--num-prompts", None, "prompts of a rollout" + by_model("num_prompts"), int)
    flag("--num-generations", 8, "completions of a prompt, G")
    flag("--max-completion-length", None, "tokens of a completion" + by_model("max_completion_length"), int)
    flag("--temperature", 1.0, "sampling temperature; log-probs are taken at it too")
    flag("--dynamic-sampling", None, "groups of equal scores: off keeps them, filter drops them, refill samples on until the batch is full of mixed groups" + by_algo("dynamic_sampling"), choices=["off", "filter", "refill"])  # fmt: skip
    flag("--max-sampling-rounds", 10, "cap on refill: rollouts of num-prompts prompts a step")
    # Reward
    flag("--overlong", None, "soft: DAPO's punishment on the reward; filter: truncated completions leave the loss" + by_algo("overlong"), choices=["none", "soft", "filter"])  # fmt: skip
    flag("--overlong-cache", 0, "tokens before the limit at which the soft punishment begins; 0: a fifth of the limit")
    flag("--reward-scale", "unit", "unit: 1 and 0 for right and wrong; dapo: +1 and -1", choices=["unit", "dapo"])
    # Objective
    flag("--epsilon", 0.2, "clip the ratio below 1 - epsilon")
    flag("--epsilon-high", None, "clip the ratio above 1 + epsilon-high" + by_algo("epsilon_high"), float)
    flag("--beta", None, "weight of the KL term: to the initial model in grpo, to the old policy in tepo" + by_algo("beta"), float)  # fmt: skip
    flag("--kl-mask", "positive", "tepo: tokens that carry the KL term", choices=["none", "all", "positive", "negative", "both"])
    flag("--entropy-change", "exact", "tepo: what decides the sign of dH", choices=["exact", "covariance"])
    # Optimizer
    flag("--learning-rate", None, "AdamW's, constant" + by_model("learning_rate"), float)
    flag("--adam-beta2", 0.95, "AdamW's second moment")
    flag("--weight-decay", 0.0, "AdamW's decoupled decay")
    flag("--max-grad-norm", 1.0, "gradient norm is clipped to this")
    flag("--steps-per-generation", 4, "mini-batches that a rollout is cut into, an update each")
    flag("--num-iterations", 1, "epochs over a rollout")
    flag("--max-tokens-per-batch", 16384, "padded tokens in one forward pass: lower it when out of memory")
    flag("--gradient-checkpointing", False, "recompute activations in the backward pass")
    # House-keeping
    flag("--seed", 0, "seed of the prompts' order and of the sampling")
    flag("--device", "auto", "where to run; auto takes the best there is", choices=["auto", "cpu", "cuda", "mps"])
    flag("--threads", 0, "CPU threads; 0: measure which of one and all is faster")
    flag("--save-steps", None, "checkpoint every so many steps, and at the end; 0: only at the end" + by_model("save_steps"), int)
    flag("--log-completions-steps", 10, "write a few completions every so many steps")
    return parser


def parse_args(argv=None):
    """Flags, with the defaults of the algorithm and the model filled in; a resumed run brings its own flags along."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.resume:
        if not args.output_dir or not (Path(args.output_dir) / "args.json").exists():
            raise UserError("--resume needs --output-dir with a run in it (one that has an args.json)")
        saved = json.loads((Path(args.output_dir) / "args.json").read_text())
        parser.set_defaults(**{key: value for key, value in saved.items() if key not in ("resume", "output_dir")})
        args = parser.parse_args(argv)
        free = ("resume", "overwrite", "output_dir", "steps", "save_steps", "log_completions_steps", "device")
        changed = [key for key, value in saved.items() if key not in free and getattr(args, key) != value]
        if changed:
            raise UserError("a resumed run keeps its settings; leave out --" + ", --".join(changed).replace("_", "-"))
    for key, value in {**(TINY if Path(args.model).name == "tiny" else REAL), **ALGO[args.algo]}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)

    if args.algo == "dapo" and args.beta:
        raise UserError("--beta: dapo has no KL term; use --algo tepo or grpo")
    tepo_only = [key for key in ("kl_mask", "entropy_change") if getattr(args, key) != parser.get_default(key)]
    if args.algo != "tepo" and tepo_only and not args.resume:
        raise UserError(f"--{tepo_only[0].replace('_', '-')} belongs to --algo tepo, not {args.algo}")
    if args.temperature <= 0:
        raise UserError("--temperature must be above 0 in training: greedy completions are all the same and carry no advantage")
    if args.num_generations < 2:
        raise UserError("--num-generations must be at least 2: a group of one is its own mean and has no advantage")
    for key in ("steps", "num_prompts", "max_completion_length", "steps_per_generation", "num_iterations", "max_sampling_rounds"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key.replace('_', '-')} must be at least 1")
    if args.steps_per_generation > args.num_prompts:
        raise UserError(f"--steps-per-generation {args.steps_per_generation}: a mini-batch needs a prompt, and there are {args.num_prompts}")
    args.overlong_cache = args.overlong_cache or max(1, args.max_completion_length // 5)
    return args


def objective(args, batch, logp, entropy, totals):
    """The loss of one micro-batch under the chosen method. totals: the whole mini-batch's counts and means."""
    from dapo import dapo_loss
    from grpo import grpo_loss
    from tepo import covariance_entropy_change, exact_entropy_change, tepo_loss

    tensors = (logp, batch["old_logp"], batch["advantages"], batch["mask"])
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
    """One run: see the top of this file. Returns the rows of metrics.jsonl."""
    import torch
    from tqdm import tqdm

    from dapo import dynamic_sampling, mixed_groups, overlong_filter, soft_overlong_punishment
    from grpo import group_advantages
    from rollout import collate, fastest_thread_count, load_model, load_tokenizer, micro_batches, pick_device, sample, score, stop_token_ids

    device = pick_device(args.device)
    resumed = latest_checkpoint(args.output_dir) if args.resume else None
    tokenizer = load_tokenizer(args.model)
    problems = load_problems(args.data, "train")
    model = load_model(str(resumed or args.model), device)
    reference = load_model(args.model, device).requires_grad_(False) if args.algo == "grpo" and args.beta else None
    directory = open_output_dir(args)
    if device.type == "cpu":
        args.threads = args.threads or fastest_thread_count(model)
        torch.set_num_threads(args.threads)
    write_json(directory / "args.json", vars(args))

    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.learning_rate, betas=(0.9, args.adam_beta2), weight_decay=args.weight_decay
    )
    generator = torch.Generator().manual_seed(args.seed)
    step, cursor = load_trainer_state(resumed, optimizer, generator) if resumed else (0, 0)
    rows = rewind(directory, step)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    stop_ids, pad_id = stop_token_ids(model, tokenizer), tokenizer.pad_token_id or 0

    print(f"{args.algo} on {args.model}: {sum(p.numel() for p in parameters):,} trained parameters, {device}"
          + (f", {args.threads} thread(s)" if device.type == "cpu" else ""))  # fmt: skip
    print(f"{args.data}: {len(problems):,} problems; the first: {problems[0]['prompt']!r} -> {problems[0]['answer']!r}")
    print(f"a step: {args.num_prompts} prompts x {args.num_generations} completions of at most {args.max_completion_length} tokens, "
          f"{args.steps_per_generation * args.num_iterations} updates; writing to {directory}")  # fmt: skip

    def sample_groups(count):
        """Samples and judges `count` fresh prompts; returns their groups and which of them are mixed."""
        nonlocal cursor
        chosen = take(problems, cursor, count, args.seed)
        cursor += count
        prompt_ids = [tokenizer(problem["prompt"]).input_ids for problem in chosen]
        with autocast:
            samples = sample(
                model, prompt_ids, args.num_generations, max_completion_length=args.max_completion_length,
                temperature=args.temperature, stop_ids=stop_ids, generator=generator,
            )  # fmt: skip
        for i, s in enumerate(samples):
            s["problem"] = chosen[i // args.num_generations]
            s["text"] = tokenizer.decode(s["completion_ids"], skip_special_tokens=True)
            s["right"] = float(is_right(s["text"], s["problem"]["answer"]))
            s["reward"] = 2 * s["right"] - 1 if args.reward_scale == "dapo" else s["right"]
        if args.overlong == "soft":
            lengths = torch.tensor([len(s["completion_ids"]) for s in samples])
            punishments = soft_overlong_punishment(lengths, args.max_completion_length, args.overlong_cache)
            for s, punishment in zip(samples, punishments.tolist()):
                s["reward"] += punishment
        groups = [samples[i : i + args.num_generations] for i in range(0, len(samples), args.num_generations)]
        return groups, mixed_groups(torch.tensor([s["right"] for s in samples]), args.num_generations)

    def prepare(samples):
        """A mini-batch as micro-batches with old log-probs and entropies, and the counts they share."""
        batches = []
        for packed in micro_batches(samples, args.max_tokens_per_batch):
            batch = collate(packed, pad_id, device)
            batch["advantages"] = torch.tensor([s["advantage"] for s in packed], device=device)
            with torch.no_grad(), autocast:
                # The very batch that the update will use, so that the first ratio is exactly 1 in any precision.
                batch["old_logp"], batch["old_entropy"] = score(model, batch, args.temperature)
                if reference:
                    batch["ref_logp"], _ = score(reference, batch, args.temperature)
            if args.overlong == "filter":
                batch["loss_mask"] = overlong_filter(batch["mask"], torch.tensor([s["truncated"] for s in packed], device=device))
            batches.append(batch)
        masks = [batch.get("loss_mask", batch["mask"]) for batch in batches]
        tokens = sum(mask.sum().item() for mask in masks)
        totals = {"tokens": tokens, "sequences": sum(mask.any(dim=1).sum().item() for mask in masks)}
        pairs = list(zip(batches, masks))
        totals["mean_logp"] = sum((b["old_logp"] * m).sum().item() for b, m in pairs) / max(tokens, 1)
        totals["mean_advantage"] = sum((b["advantages"].unsqueeze(1) * m).sum().item() for b, m in pairs) / max(tokens, 1)
        return batches, totals

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

        # 3. score: mini-batches of whole groups, of one size; fewer groups (after a filter) make fewer of them, not smaller ones
        size = -(-args.num_prompts // args.steps_per_generation)
        minis = [prepare([s for group in groups[i : i + size] for s in group]) for i in range(0, len(groups), size)]
        clock.append(time.perf_counter())

        # 4. update
        sums = dict.fromkeys(["tokens", "entropy", "kl", "kl_mask", "clip_low", "clip_high"], 0.0)
        deviation, grad_norms = 0.0, []
        model.train()  # there is no dropout; gradient checkpointing asks for train mode
        for batches, totals in minis * args.num_iterations:
            optimizer.zero_grad()
            for batch in batches:
                with autocast:
                    logp, entropy = score(model, batch, args.temperature)
                mask = batch.get("loss_mask", batch["mask"])
                loss, parts = objective(args, {**batch, "mask": mask}, logp, entropy, totals)
                loss.backward()
                sums["tokens"] += mask.sum().item()
                sums["entropy"] += entropy[mask].sum().item()
                for key in ("kl", "kl_mask", "clip_low", "clip_high"):
                    sums[key] += parts[key][mask].sum().item()
                deviation = max(deviation, (parts["ratio"] - 1)[mask].abs().max().item() if mask.any() else 0.0)
            grad_norms.append(torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item())
            optimizer.step()
        clock.append(time.perf_counter())

        # 5. log
        lengths = [len(s["completion_ids"]) for s in everyone]
        per_token = {key: value / max(sums["tokens"], 1) for key, value in sums.items()}
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
            "groups_trained": len(groups),
            "groups_sampled": len(sampled),
            "updates": len(grad_norms),
            "tokens_per_second": sum(lengths) / sum(seconds),
            "seconds/sample": seconds[0], "seconds/score": seconds[1], "seconds/update": seconds[2],
            "peak_memory_gb": peak_memory_gb(device),
        })  # fmt: skip
        row = rows[-1]
        with (directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if step % args.log_completions_steps == 0 or step in (1, args.steps):
            with (directory / "completions.jsonl").open("a") as file:
                for group in sampled[:2]:
                    for s in group[:2]:
                        record = {"step": step, "prompt": s["problem"]["prompt"], "completion": s["text"], "reward": s["reward"]}
                        file.write(json.dumps({**record, "answer": s["problem"]["answer"], "truncated": s["truncated"]}) + "\n")
        tqdm.write(f"step {step:3d}  reward {row['reward']:+.3f}  right {row['accuracy']:.3f}  equal groups {row['frac_reward_zero_std']:.2f}  "
                   f"length {row['completions/mean_length']:.1f}  entropy {row['entropy']:.3f}  clip {row['clip_ratio/low'] + row['clip_ratio/high']:.4f}  "
                   f"kl {row['kl']:.4f}  grad {row['grad_norm']:.2f}  {sum(seconds):.1f} s")  # fmt: skip
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
    try:
        main()
    except UserError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
