"""Train a language model by TEPO, GRPO, DAPO or an objective of your own, on tasks with a reward.

    python train.py --algo tepo                      # the embedded model: two CPU cores, a minute
    python train.py --algo tepo --model DIR_OR_ID    # any causal language model
    python train.py --algo my_loss.py --data my_task.py

One step is one rollout and the updates made on it:

    1. sample   G completions for each of num_prompts prompts                     rollout.sample
    2. reward   judge each completion; group the rewards into advantages          tasks, grpo.py
    3. score    log-probs and entropies under the policy that sampled, as "old"   rollout.score
    4. update   steps_per_generation mini-batches x num_iterations epochs         its loss
    5. log      a line on the terminal, a row in metrics.jsonl

A mini-batch that is too large for one pass is cut into micro-batches, whose gradients add up. At
the first update of a rollout pi = pi_old, and TEPO and DAPO have the same gradient. They part at
the later ones: a setting with one update a rollout cannot tell them apart.
"""

import argparse
import importlib
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import tasks
import tepo
from dapo import dynamic_sampling, soft_overlong_punishment
from engine import flags, models, runs
from engine.errors import UserError, run_script
from engine.files import append_jsonl, fingerprint
from engine.plots import plot_curves
from engine.tokens import choose, token_rows, write_page
from engine.trackers import TRACKERS, require, start_tracker
from grpo import group_advantages, mixed_groups
from rollout import check_model, collate, micro_batches, sample, score, split_evenly
from tasks import verify
from tasks.prompts import add_prompt_flags, encode, prompted

# Defaults for the embedded model and for a real one (one 80 GB GPU).
TINY = dict(
    data="arithmetic",
    steps=30,
    num_prompts=32,
    learning_rate=3e-5,
    num_iterations=2,
    max_completion_length=48,
    rollout_batch_size=512,
    save_steps=10,
    gradient_checkpointing=False,
)
REAL = dict(
    data="dapo-math-17k",
    steps=100,
    num_prompts=64,
    learning_rate=1e-6,
    num_iterations=1,
    max_completion_length=2048,
    rollout_batch_size=128,
    save_steps=20,
    gradient_checkpointing=True,
)
# Section 4.1 of the TEPO paper. "Updated 8 times", with mini-batches of 16 of the 64 prompts, is
# read as 4 mini-batches x 2 epochs.
PAPER = dict(
    steps=72,
    learning_rate=5e-7,
    num_iterations=2,
    max_completion_length=8192,
    rollout_batch_size=32,
)
LORA = dict(learning_rate=1e-5)  # adapters need a higher rate

ALGORITHMS = ("tepo", "grpo", "dapo")
SAMPLING = "groups of equal scores: off keeps them, filter drops them, refill samples on"
OVERLONG = "soft punishes long completions, filter leaves truncated ones out of the loss"
SCALING = "group: advantages are divided by the deviation of their group"
JUDGE_SECONDS = 60.0  # of algebra in a step: answers that would take more count as wrong
FREE_ON_RESUME = (
    "steps",
    "learning_rate",
    "save_steps",
    "save_total_limit",
    "log_completions_steps",
    "report_to",
    "picture_tokens",
    # These change nothing but rounding.
    "max_tokens_per_batch",
    "rollout_batch_size",
    "threads",
)
NOT_IN_A_RECIPE = "help script algo model preset output_dir resume overwrite".split()
OBJECTIVE_FLAGS = {  # of the keys of a RECIPE; a key that is not here becomes a flag as well
    "epsilon": dict(type=flags.below_one, help="clip the ratio below 1 - epsilon"),
    "epsilon_high": dict(type=flags.positive_float, help="clip the ratio above 1 + epsilon-high"),
    "beta": dict(type=flags.non_negative_float, help="weight of the KL term"),
    "kl_mask": dict(choices=tepo.KL_MASKS, help="the tokens that carry the KL term"),
    "entropy_change": dict(choices=["exact", "covariance"], help="what decides the sign of dH"),
}


# --------------------------------------------------------------------------------------------------
# Flags


def load_algorithm(name):
    """The module of an algorithm: "tepo", "grpo", "dapo", or the path of a Python file.

    It has RECIPE, a dict of its flags with their defaults, and loss(batch, logp, entropy, args),
    which returns the scalar loss and a dict of [B, T] tensors to log. It may have EMBEDDED, other
    defaults for the embedded model, and needs_reference(args).
    Raises UserError when there is no such file, or it cannot be imported, or it lacks these two.
    """
    if name in ALGORITHMS:
        return importlib.import_module(name)
    if not name.endswith(".py"):
        raise UserError(f"--algo {name}: neither a .py file nor one of {', '.join(ALGORITHMS)}")
    module = tasks.import_file(name, "--algo")
    recipe = getattr(module, "RECIPE", None)
    embedded = getattr(module, "EMBEDDED", {})
    dicts = isinstance(recipe, dict) and isinstance(embedded, dict)
    if not dicts or not hasattr(module, "loss"):
        raise UserError(f"--algo {name}: it needs RECIPE and loss(batch, logp, entropy, args)")
    for key, value in [*recipe.items(), *embedded.items()]:
        if not str(key).isidentifier() or key in NOT_IN_A_RECIPE:
            raise UserError(f"--algo {name}: {key!r} cannot be a key of RECIPE")
        if not isinstance(value, (bool, int, float, str)):
            raise UserError(f"--algo {name}: RECIPE[{key!r}] must be a number, a text or a bool")
    return module


def build_parser(recipe, defaults):
    """The flags. recipe: the algorithm's; defaults: those of the model, or of a run to resume."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage="train.py --algo {tepo,grpo,dapo,FILE.py} [--model MODEL] [--data DATA] [flags]",
        formatter_class=flags.Formatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--algo", default="tepo", help="tepo, grpo, dapo, or a .py file with RECIPE and loss")
    flag("--model", default="tiny", help="a directory, a hub id, or a name such as Qwen2.5-1.5B")
    flag("--data", help=f"{', '.join(tasks.names('train'))}, a data file or folder, or a .py file")
    flag("--preset", choices=["paper"], help="the settings of the TEPO paper, for a real model")
    add_prompt_flags(parser)
    # Sampling
    flag("--steps", type=flags.positive_int, help="rollouts to make")
    flag("--num-prompts", type=flags.positive_int, help="prompts of a rollout")
    flag("--num-generations", type=flags.positive_int, default=8, help="completions of a prompt, G")
    flag("--max-prompt-length", type=flags.positive_int, default=2048, help="leave out longer ones")
    flag("--max-completion-length", type=flags.positive_int, help="in tokens")
    flag("--temperature", type=flags.positive_float, default=1.0, help="of sampling and log-probs")
    flag("--rollout-batch-size", type=flags.positive_int, help="completions sampled at once")
    flag("--dynamic-sampling", choices=["off", "filter", "refill"], default="off", help=SAMPLING)
    flag("--max-sampling-rounds", type=flags.positive_int, default=10, help="cap on refill, a step")
    # Reward
    flag("--judge-thoughts", action="store_true", help="an answer inside <think> counts, too")
    flag("--overlong", choices=["none", "soft", "filter"], default="none", help=OVERLONG)
    flag(
        "--overlong-cache",
        type=flags.non_negative_int,
        default=0,
        help="soft begins so many tokens before the limit; 0: a fifth of it",
    )
    flag(
        "--reward-scale",
        choices=["unit", "dapo"],
        default="unit",
        help="dapo: -1 and 1 for 0 and 1",
    )
    flag("--scale-rewards", choices=["group", "none"], default="group", help=SCALING)
    # Optimizer
    flag("--learning-rate", type=flags.positive_float, help="AdamW's, constant")
    flag("--adam-beta2", type=flags.below_one, default=0.95, help="AdamW's second moment")
    flag("--weight-decay", type=flags.non_negative_float, default=0.0, help="AdamW's, decoupled")
    flag(
        "--max-grad-norm",
        type=flags.positive_float,
        default=1.0,
        help="gradients are clipped to it",
    )
    flag(
        "--steps-per-generation",
        type=flags.positive_int,
        default=4,
        help="mini-batches of a rollout",
    )
    flag("--num-iterations", type=flags.positive_int, help="epochs over a rollout")
    flag(
        "--max-tokens-per-batch",
        type=flags.positive_int,
        default=8192,
        help="tokens of a forward pass",
    )
    flag("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="saves memory")
    flag(
        "--lora-rank",
        type=flags.non_negative_int,
        default=0,
        help="of adapters; 0: train all weights",
    )
    # House-keeping
    flag(
        "--save-steps",
        type=flags.non_negative_int,
        help="a checkpoint every so many; 0: at the end only",
    )
    flag(
        "--save-total-limit",
        type=flags.positive_int,
        default=1,
        help="checkpoints that are kept, the newest",
    )
    flag(
        "--log-completions-steps",
        type=flags.positive_int,
        default=10,
        help="write a few, every so many",
    )
    flag("--picture-tokens", action="store_true", help="tokens.html: what happens to each of them")
    trackers = ["none", *TRACKERS]
    flag("--report-to", choices=trackers, default="none", help="send the log there too")
    flags.add_run_flags(parser)
    flags.add_machine_flags(parser)
    # The objective's own
    known = {action.dest for action in parser._actions}
    for key, value in recipe.items():
        if key not in known:
            kind = {"help": "the objective's own", "type": type(value)}
            if isinstance(value, float):
                kind["type"] = flags.any_float
            if isinstance(value, int):
                kind["type"] = flags.any_int
            if isinstance(value, bool):
                kind = {"help": kind["help"], "action": argparse.BooleanOptionalAction}
            flag("--" + key.replace("_", "-"), **OBJECTIVE_FLAGS.get(key, kind))
    parser.set_defaults(script="train", **{**defaults, **recipe})
    return parser


def parse_args(argv=None):
    """The flags, with the defaults of the algorithm and the model, as a namespace.

    Raises UserError on a combination that cannot work.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--algo", default="tepo")
    first.add_argument("--model", default="tiny")
    first.add_argument("--preset")
    first.add_argument("--lora-rank", default="0")
    first.add_argument("--output-dir")
    first.add_argument("--resume", action="store_true")
    look, _ = first.parse_known_args(argv)
    saved = {}
    if look.resume:
        saved = flags.resumed_flags(look.output_dir, "train")
        argv = [*flags.as_argv(first, saved), *argv]
        look, _ = first.parse_known_args(argv)

    algorithm = load_algorithm(look.algo)
    recipe = algorithm.RECIPE
    embedded = runs.is_embedded(look.model)
    if embedded:
        recipe = {**recipe, **getattr(algorithm, "EMBEDDED", {})}
    if look.preset and embedded:
        raise UserError("--preset paper is for a real model: give --model")
    defaults = TINY if embedded else REAL
    if look.preset:
        defaults = {**defaults, **PAPER}
    if look.lora_rank != "0" and not embedded:
        defaults = {**defaults, **LORA}
    try:
        parser = build_parser(recipe, defaults)
    except argparse.ArgumentError as error:  # two flags of one name
        raise UserError(f"RECIPE of {look.algo}: {error}") from None
    args = parser.parse_args([*flags.as_argv(parser, saved), *argv])
    for action in parser._actions:  # argparse does not look at defaults
        value = getattr(args, action.dest, None)
        if value is None:
            continue
        if action.choices and value not in action.choices:
            raise UserError(f"RECIPE of {args.algo}: {action.dest} cannot be {value!r}")
        try:
            (action.type or str)(str(value))
        except argparse.ArgumentTypeError as error:
            raise UserError(f"RECIPE of {args.algo}: {action.dest}: {error}") from None
    flags.check_unchanged(args, saved, FREE_ON_RESUME)
    args.embedded = embedded  # for whoever gives this run as --model
    args.overlong_cache = args.overlong_cache or max(1, args.max_completion_length // 5)

    if args.num_generations < 2:
        raise UserError("--num-generations must be at least 2: a group of one has no advantage")
    if args.num_prompts % args.steps_per_generation:
        raise UserError(
            f"--num-prompts {args.num_prompts} cannot be cut into "
            f"--steps-per-generation {args.steps_per_generation} equal mini-batches"
        )
    if args.lora_rank > 10**5:
        raise UserError(f"--lora-rank {args.lora_rank} is wider than any layer")
    if args.rollout_batch_size < args.num_generations:
        raise UserError("--rollout-batch-size must be at least --num-generations")
    if args.num_prompts * args.num_generations > 10**6:
        raise UserError("--num-prompts x --num-generations is more than a million completions")
    if args.overlong_cache > args.max_completion_length:
        raise UserError("--overlong-cache cannot be longer than --max-completion-length")
    return args


# --------------------------------------------------------------------------------------------------
# Set-up


@dataclass
class Run:
    """What a step needs: it is made once by `set_up`, and only step, cursor and rows change."""

    args: argparse.Namespace
    algorithm: object  # the module with `loss`
    task: tasks.Task
    problems: list  # of the task, with their prompt_ids
    tokenizer: object
    model: torch.nn.Module
    reference: torch.nn.Module | None  # the frozen initial model
    share_prompts: bool  # see rollout.check_model
    stop_ids: list
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # the sampler's
    directory: Path
    step: int  # steps done
    cursor: int  # problems taken
    rows: list  # of metrics.jsonl
    track: object  # sends a row to --report-to
    pictured: list  # the samples of this step whose tokens are pictured

    def autocast(self, cache=True):
        """bf16 on a GPU, fp32 elsewhere.

        cache: whether a weight is cast once for all its uses. Then the gradients of its uses add up
        in bf16: those of the LM head in the many chunks of `score` lose digits. So not there.
        """
        device = self.model.device.type
        on = device == "cuda"
        return torch.autocast(device, torch.bfloat16, enabled=on, cache_enabled=cache)


def load_policy(args, name, device, dtype, resumed):
    """The model to train. name: of its weights; resumed: the checkpoint to go on from, or None."""
    args.base = None  # of adapters: which model they are for
    if not args.lora_rank:
        return models.load_model(str(resumed or name), device, dtype)
    if models.has_adapters(name):
        raise UserError(f"--lora-rank: {name} holds adapters itself: --resume that run instead")
    torch.manual_seed(args.seed)
    model = models.load_model(name, device, dtype)
    args.base = models.base_digest(model)
    return models.add_adapters(model, args.lora_rank, resumed)


def start_digest(args, model, reference, resumed):
    """The digest of the weights that a run began with; None where a resume does not need them."""
    if args.lora_rank:
        return args.base
    if reference is not None:
        return fingerprint(reference.named_parameters())
    return None if resumed else fingerprint(model.named_parameters())


def set_up(args):
    """Loads everything, opens the run's directory and returns a Run. Raises UserError."""
    runs.check_output_dir(args)
    if args.report_to != "none":
        require(args.report_to)
    device = models.pick_device(args.device)
    name = models.resolve_model(args.model)
    runs.check_not_inside(args, name)
    args.checkpoint = name  # what --model has led to
    resumed = None
    if args.resume:
        found = runs.own_checkpoints(args.output_dir, damaged=True)
        resumed = found[-1] if found else None
    tokenizer = models.load_tokenizer(name)
    task = tasks.load(args.data, "train", args.data_root, args.judge_thoughts)
    problems = prompted(task.problems, tokenizer, args)
    problems = encode(problems, tokenizer, args.max_prompt_length)
    print(tasks.describe(task, problems, tokenizer, args.max_prompt_length))

    # fp32 master weights, or a small update would be lost in the rounding of bf16. The frozen base
    # of adapters may be bf16: no update is ever added to it.
    dtype = torch.float32
    if args.lora_rank and device.type == "cuda":
        dtype = torch.bfloat16
    model = load_policy(args, name, device, dtype, resumed)
    algorithm = load_algorithm(args.algo)
    reference = None
    if hasattr(algorithm, "needs_reference") and algorithm.needs_reference(args):
        reference = models.load_model(name, device, dtype).requires_grad_(False)
    longest = max(len(problem["prompt_ids"]) for problem in problems)
    models.check_positions(model, longest + args.max_completion_length)
    models.check_tokens(model, [problem["prompt_ids"] for problem in problems])
    stop_ids = models.stop_token_ids(model, tokenizer)
    share_prompts = check_model(model, longest + args.max_completion_length)
    args.threads = models.set_threads(model, device, args.threads)
    if args.gradient_checkpointing and not models.recompute_activations(model):
        print("note: no layer of this model can be recomputed, so all activations are kept")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=args.learning_rate,
        betas=(0.9, args.adam_beta2),
        weight_decay=args.weight_decay,
        fused=True,
    )
    generator = torch.Generator().manual_seed(args.seed)
    step = cursor = 0
    if resumed:
        step, cursor = runs.load_trainer_state(resumed, optimizer, generator)
    made_of = {
        "problems": runs.digest_of(problems),
        "own code": runs.digest_of_code(args.algo, args.data),
        f"start weights in {dtype}": start_digest(args, model, reference, resumed),
    }
    runs.check_same(args, made_of)
    runs.check_room(args, step)
    # Nothing was written or deleted before this line. No flag can be wrong behind it.
    directory = runs.open_output_dir(args, f"{Path(args.algo).stem}-{Path(args.model).name}")
    rows = runs.rewind(directory, step)
    runs.keep_newest(directory, args.save_total_limit)  # a kill may have left more

    memory = models.memory_estimate(model, device, args, longest, reference is not None)
    memory = ", ".join(f"{1000 * gb:,.0f} MB {part}" for part, gb in memory.items())
    trained = sum(p.numel() for p in parameters)
    print(f"{args.algo} on {name}: {trained:,} trained parameters on {device}; expected: {memory}")
    return Run(
        args=args,
        algorithm=algorithm,
        task=task,
        problems=problems,
        tokenizer=tokenizer,
        model=model,
        reference=reference,
        share_prompts=share_prompts,
        stop_ids=stop_ids,
        optimizer=optimizer,
        generator=generator,
        directory=directory,
        step=step,
        cursor=cursor,
        rows=rows,
        track=start_tracker(args.report_to, args, directory),
        pictured=[],
    )


# --------------------------------------------------------------------------------------------------
# A step


def sample_groups(run, count):
    """Samples and judges `count` fresh prompts. Returns their groups, and which are mixed."""
    args = run.args
    G = args.num_generations
    problems = tasks.take(run.problems, run.cursor, count, args.seed)
    run.cursor += count
    at_once = args.rollout_batch_size // G  # prompts
    samples = []
    for start in range(0, count, at_once):
        prompts = [problem["prompt_ids"] for problem in problems[start : start + at_once]]
        with run.autocast():
            samples += sample(
                run.model,
                prompts,
                G,
                max_completion_length=args.max_completion_length,
                temperature=args.temperature,
                stop_ids=run.stop_ids,
                generator=run.generator,
            )
    for i, s in enumerate(samples):
        s.problem = problems[i // G]
        s.text = run.tokenizer.decode(s.completion_ids, skip_special_tokens=True)
        s.task_reward = run.task.reward(s.problem, s.text)
        s.reward = s.task_reward
        if args.reward_scale == "dapo":
            s.reward = 2 * s.task_reward - 1
    if args.overlong == "soft":
        lengths = torch.tensor([len(s.completion_ids) for s in samples])
        punishments = soft_overlong_punishment(
            lengths, args.max_completion_length, args.overlong_cache
        )
        for s, punishment in zip(samples, punishments.tolist()):
            s.reward += punishment
    groups = [samples[i : i + G] for i in range(0, len(samples), G)]
    return groups, mixed_groups(torch.tensor([s.task_reward for s in samples]), G)


def roll_out(run):
    """Steps 1 and 2. Returns the groups to train on, with advantages, and all that were sampled."""
    args = run.args
    if args.dynamic_sampling == "refill":
        groups, sampled = dynamic_sampling(
            lambda count: sample_groups(run, count), args.num_prompts, args.max_sampling_rounds
        )
        if len(groups) < args.num_prompts:
            tqdm.write(
                f"step {run.step}: {len(groups)} of {args.num_prompts} groups are mixed after "
                f"--max-sampling-rounds {args.max_sampling_rounds}; training on those"
            )
    else:
        sampled, mixed = sample_groups(run, args.num_prompts)
        groups = sampled
        if args.dynamic_sampling == "filter":
            groups = [group for group, kept in zip(sampled, mixed.tolist()) if kept]
    for group in groups:
        rewards = torch.tensor([s.reward for s in group])
        scale = args.scale_rewards == "group"
        advantages = group_advantages(rewards, len(group), scale=scale)
        for s, advantage in zip(group, advantages.tolist()):
            s.advantage = advantage
    return groups, sampled


def old_statistics(run, samples):
    """One mini-batch as a list of micro-batches, with what the loss needs of the old policy."""
    args = run.args
    batches = []
    for part in micro_batches(samples, args.max_tokens_per_batch, run.share_prompts):
        batch = collate(part, run.model.device, run.share_prompts)
        batch["samples"] = part
        batch["advantages"] = torch.tensor([s.advantage for s in part], device=run.model.device)
        # The very batch that the update will use, so that the first ratio is exactly 1.
        with torch.no_grad(), run.autocast(cache=False):
            batch["old_logp"], batch["old_entropy"] = score(run.model, batch, args.temperature)
            if run.reference is not None:
                batch["ref_logp"], _ = score(run.reference, batch, args.temperature)
        sampled = [logp for s in part for logp in s.logp]
        gap = torch.tensor(sampled, device=run.model.device) - batch["old_logp"][batch["mask"]]
        batch["sampling_gap"] = gap.abs().max().item()
        batches.append(batch)

    # The normalisers are those of the whole mini-batch, so that micro-batches add up to it. The
    # means are for TEPO's covariance proxy.
    tokens = sum(batch["mask"].sum().item() for batch in batches)
    logp = sum((batch["old_logp"] * batch["mask"]).sum().item() for batch in batches)
    advantage = sum((batch["advantages"] * batch["mask"].sum(1)).sum().item() for batch in batches)
    for batch in batches:
        batch["num_tokens"] = tokens
        batch["num_sequences"] = len(samples)
        batch["mean_logp"] = logp / tokens
        batch["mean_advantage"] = advantage / tokens
    return batches


def mini_batches(run, groups):
    """Step 3. Returns a list of mini-batches, each a list of micro-batches.

    After a filter there are fewer mini-batches, as full as before and as even as can be: 17 groups
    that are left of 32, in mini-batches of 8, make 3, of 5, 6 and 6 groups.
    """
    count = math.ceil(len(groups) * run.args.steps_per_generation / run.args.num_prompts)
    minis = []
    for part in split_evenly(groups, count):
        samples = [s for group in part for s in group]
        if run.args.overlong == "filter":
            samples = [s for s in samples if not s.truncated]
        if samples:
            minis.append(old_statistics(run, samples))
    return minis


def checked_loss(run, batch, logp, entropy):
    """The algorithm's loss and metrics of a micro-batch.

    Raises UserError, with its line, for whatever goes wrong in an objective of the user's own.
    """
    args = run.args
    found = tasks.guarded(args.algo, "loss", run.algorithm.loss, batch, logp, entropy, args)
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], dict):
        raise UserError(f"--algo {args.algo}: loss(...) must return a loss and a dict of tensors")
    loss, metrics = found
    if not isinstance(loss, torch.Tensor) or loss.dim() > 0 or not loss.requires_grad:
        raise UserError(f"--algo {args.algo}: the loss must be a scalar tensor with a gradient")
    for key, value in metrics.items():
        if getattr(value, "shape", None) != logp.shape:
            raise UserError(f"--algo {args.algo}: the metric {key!r} must be a tensor [B, T]")
    return loss, metrics


def update(run, minis):
    """Step 4: one optimizer step for each mini-batch and epoch.

    Returns a dict of what was measured: token means of the loss's metrics, gradient norms, and so
    on. Raises UserError when a gradient is not finite.
    """
    args = run.args
    sums = {}
    tokens = 0
    deviation = None  # the largest |ratio - 1|
    grad_norms = []
    pictures = []
    parameters = run.optimizer.param_groups[0]["params"]
    for number, batches in enumerate(minis * args.num_iterations, 1):
        for batch in batches:
            with run.autocast(cache=False):
                logp, entropy = score(run.model, batch, args.temperature)
            mask = batch["mask"]
            loss, metrics = checked_loss(run, batch, logp, entropy)
            loss.backward()
            if run.pictured:
                pictures += token_rows(
                    run.tokenizer, run.step, number, batch, entropy, metrics, run.pictured
                )
            if "ratio" in metrics:
                off = (metrics.pop("ratio") - 1)[mask].abs().max().item()
                deviation = max(deviation or 0.0, off)
            for key, value in {"entropy": entropy, **metrics}.items():
                sums[key] = sums.get(key, 0.0) + value[mask].sum().item()
            tokens += mask.sum().item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item()
        if not math.isfinite(norm):
            advice = "lower --learning-rate, --weight-decay, --beta or --max-grad-norm"
            if run.step == 1 and not grad_norms:  # no weight has moved
                advice = "look for what is too large in the loss (--beta?)"
            raise UserError(
                f"step {run.step}: the gradient is {norm}, so training stops before it reaches the "
                f"weights: {advice}; --resume goes on from the last checkpoint, if there is one"
            )
        grad_norms.append(norm)
        run.optimizer.step()
        run.optimizer.zero_grad()  # no gradient takes up memory while sampling
    if pictures:
        append_jsonl(run.directory / "tokens.jsonl", pictures)
    means = {key: value / tokens for key, value in sums.items()}
    gaps = [batch["sampling_gap"] for batches in minis for batch in batches]
    return {
        **means,
        "grad_norm": mean(grad_norms),
        "max_ratio_deviation": deviation,
        "sampling_logp_difference": max(gaps, default=0.0),
        "updates": len(grad_norms),
    }


BUSY = 3  # times the median step
ENOUGH_STEPS = 3  # to know a median


def is_slow(seconds, before):
    """Whether a step took so much longer than those before that the machine must be busy.

    seconds: of sampling a token in this step; before: list of the same. (The rest of a step depends
    on how many groups are trained on.)
    """
    return len(before) >= ENOUGH_STEPS and seconds > BUSY * statistics.median(before)


def mean(values):
    """The mean of a list of numbers; 0 for an empty list."""
    return sum(values) / max(len(values), 1)


def shows_completions(run):
    """Whether some completions of this step are written down."""
    args = run.args
    return run.step % args.log_completions_steps == 0 or run.step in (1, args.steps)


def log(run, groups, sampled, measured, seconds):
    """Step 5: a row of metrics.jsonl, some completions, and a line on the terminal."""
    samples = [s for group in sampled for s in group]
    lengths = [len(s.completion_ids) for s in samples]
    row = {
        "step": run.step,
        "reward": mean([s.reward for s in samples]),
        "task_reward": mean([s.task_reward for s in samples]),
        "frac_reward_zero_std": mean([len({s.reward for s in group}) == 1 for group in sampled]),
        "completions/mean_length": mean(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": mean([s.truncated for s in samples]),
        # A step whose groups were all filtered out makes no update: these are null then.
        **dict.fromkeys(("entropy", "clip_ratio/low", "clip_ratio/high", "kl", "kl_mask_fraction")),
        **measured,
        "groups_trained": len(groups),
        "groups_sampled": len(sampled),
        "undecided_answers": verify.undecided(),
        "tokens_per_second": sum(lengths) / sum(seconds.values()),
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
        "peak_memory_gb": runs.peak_memory_gb(run.model.device),
    }
    run.rows.append(row)
    append_jsonl(run.directory / "metrics.jsonl", [row])
    run.track(row)
    if shows_completions(run):
        completions = [
            {
                "step": run.step,
                "prompt": s.problem["prompt"],
                "completion": s.text,
                "reward": s.reward,
                "answer": s.problem.get("answer"),
                "truncated": s.truncated,
            }
            for group in sampled[:2]
            for s in group[:2]
        ]
        append_jsonl(run.directory / "completions.jsonl", completions)
    shown = {
        "reward": row["reward"],
        "equal groups": row["frac_reward_zero_std"],
        "length": row["completions/mean_length"],
        "entropy": row.get("entropy"),
        "M": row.get("kl_mask_fraction"),
        "grad": row["grad_norm"],
    }
    if "clip_ratio/low" in measured and "clip_ratio/high" in measured:
        shown["clip"] = row["clip_ratio/low"] + row["clip_ratio/high"]
    parts = [f"{name} {value:.3f}" for name, value in shown.items() if value is not None]
    if not measured["updates"]:
        parts.append("nothing to learn from, no update")
    tqdm.write(f"step {run.step:3d}  {'  '.join(parts)}  {sum(seconds.values()):.1f} s")


NO_REWARD = (
    "not one completion had a reward, so nothing was learned. Look at completions.jsonl: are the "
    "answers in the form that the reward looks for, and do they end before "
    "--max-completion-length? If they are, the problems are too hard for this model "
    "(frac_reward_zero_std is 1): take easier ones, a stronger model, or raise --num-generations"
)


def never_rewarded(rows):
    """Whether a run of some steps had no reward at all. rows: of metrics.jsonl."""
    return bool(rows) and not any(row["task_reward"] for row in rows)


def train(args):
    """One run: see the top of this file. Returns the rows of metrics.jsonl. Raises UserError."""
    run = set_up(args)
    print(
        f"a step: {args.num_prompts} prompts x {args.num_generations} completions of at most "
        f"{args.max_completion_length} tokens, {args.steps_per_generation} mini-batches x "
        f"{args.num_iterations} epochs; stop tokens "
        f"{run.tokenizer.convert_ids_to_tokens(run.stop_ids)}; writing to {run.directory}"
    )
    paces = []  # seconds of sampling a token, step by step
    bar = tqdm(total=args.steps, initial=run.step, desc=Path(args.algo).stem, disable=None)
    while run.step < args.steps:
        run.step += 1
        verify.allow(JUDGE_SECONDS)
        torch.manual_seed(args.seed + run.step)  # an objective that draws may be resumed, too
        clock = [time.perf_counter()]
        groups, sampled = roll_out(run)
        run.pictured = choose(groups) if args.picture_tokens and shows_completions(run) else []
        clock.append(time.perf_counter())
        minis = mini_batches(run, groups)
        clock.append(time.perf_counter())
        measured = update(run, minis)
        clock.append(time.perf_counter())
        laps = [end - start for start, end in zip(clock[:-1], clock[1:])]
        log(run, groups, sampled, measured, dict(zip(("sample", "score", "update"), laps)))
        bar.update()
        pace = laps[0] / sum(len(s.completion_ids) for group in sampled for s in group)
        if is_slow(pace, paces):
            usual = statistics.median(paces)
            tqdm.write(
                f"note: step {run.step} sampled {pace / usual:.1f} times slower than usual, so "
                "another program must be busy on this machine; if that lasts, --resume with "
                "--threads 1 may be faster"
            )
        paces.append(pace)
        if run.step == 10 and never_rewarded(run.rows):
            tqdm.write(f"note: in 10 steps {NO_REWARD}")
        if run.step == args.steps or (args.save_steps and run.step % args.save_steps == 0):
            models.check_finite(run.model, f"step {run.step}, nothing is saved")
            runs.save_checkpoint(
                run.directory,
                args,
                run.step,
                run.model,
                run.tokenizer,
                run.optimizer,
                run.generator,
                run.cursor,
            )
            plot_curves(run.rows, run.directory / "curves.png")
            if args.picture_tokens:
                write_page(run.directory, f"{args.algo}, {args.model}")
    bar.close()
    return run.rows


def main(argv=None):
    started = time.time()
    args = parse_args(argv)
    rows = train(args)
    rewards = [row["reward"] for row in rows]
    print(
        f"mean reward {mean(rewards[:3]):.3f} in the first {len(rewards[:3])} steps, "
        f"{mean(rewards[-5:]):.3f} in the last {len(rewards[-5:])}; {time.time() - started:.0f} s"
    )
    if never_rewarded(rows):
        print(f"warning: {NO_REWARD}")
    print(
        f"metrics.jsonl, curves.png, completions.jsonl and the checkpoint are in {args.output_dir}"
    )


if __name__ == "__main__":
    run_script(main, "train.py", "; --resume --output-dir DIR goes on from its last checkpoint")
