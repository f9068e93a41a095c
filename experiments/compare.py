"""The tables of the TEPO paper, and its claim, on the embedded model: many runs of train.py.

    python -m experiments.compare convergence            # the claim: half the steps of GRPO/DAPO
    python -m experiments.compare convergence --task sparse
    python -m experiments.compare panel-A                # ... panel-E: the paper's Table 3
    python -m experiments.compare panel-C --updates 16   # where more of it can differ
    python -m experiments.compare lemma                  # Lemma 3.2, token by token

An experiment is a list of flags for train.py, times some seeds. Its runs go side by side, as many
as there are cores, and the same command goes on where it stopped. Two runs with the same seed begin
with the same rollout, so methods are compared seed by seed.

Whether TEPO needs half the steps is decided by `convergence --only "8 updates, wide" --seeds 10`:
8 updates are the paper's, and 0.2/0.28 the only clip that it states. That was fixed before any of
these runs was made. The other settings show where it would be otherwise.

Tasks:
    sums     the embedded task: one completion in three is right before training
    sparse   the same sums, from a model that a short supervised warm start has made lazier: three
             completions in a hundred are right, four groups in five have no reward at all

results.jsonl has a line a run, table.md the table, curves.png the curves: mean over the seeds, and
a band of a standard deviation on either side. ratios.png, of convergence alone, is its summary.
"""

import argparse
import itertools
import math
import os
import random
import re
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import torch

from engine.errors import run_script
from engine.files import new_figure, read_jsonl, save_figure, write_jsonl, written_aside
from engine.flags import non_negative_int, positive_int
from engine.models import load_model, load_tokenizer, resolve_model
from experiments.pool import present, run_all, steps_in
from experiments.warm import warm_start
from tasks import arithmetic

# --------------------------------------------------------------------------------------------------
# What is compared. All runs share the recipe, so that nothing but the objective differs.

RECIPE = "--dynamic-sampling filter --overlong none --save-steps 0".split()
WIDE = "--epsilon 0.2 --epsilon-high 0.28"  # the files of VARIANTS have it, too
TIGHT = "--epsilon 0.02 --epsilon-high 0.028"
STEPS = {  # of a run, and its flags, by updates a rollout: mini-batches x epochs
    1: (60, ["--steps-per-generation", "1", "--num-iterations", "1"]),
    4: (30, ["--steps-per-generation", "4", "--num-iterations", "1"]),
    8: (20, ["--steps-per-generation", "4", "--num-iterations", "2"]),
    16: (15, ["--steps-per-generation", "4", "--num-iterations", "4"]),
}
VARIANTS = "experiments/variants"
SOLVED = 0.8  # a run has solved the task when the mean reward of three steps reaches it
CLAIM = 72 / 132  # steps of TEPO to those of GRPO/DAPO, as the paper says


def convergence():
    """The three methods at 1, 4, 8 and 16 updates a rollout, at DAPO's clip and a tenth of it.

    Returns a dict label -> (updates, flags), like `panel`.
    """
    found = {}
    for clip, clip_flags in (("wide", WIDE), ("tight", TIGHT)):
        for updates in STEPS:
            if updates == 1 and clip == "tight":
                continue  # no ratio ever leaves 1
            setting = f"{updates} update{'s' if updates > 1 else ''}, {clip} clip"
            for algo in ("tepo", "grpo", "dapo"):
                label = f"{algo.upper()}, {setting}"
                found[label] = (updates, f"--algo {algo} {clip_flags}".split())
    return found


def panel(settings):
    """A panel of Table 3, as a dict label -> (None, flags): --updates says how many updates."""
    return {label: (None, flags.split()) for label, flags in settings.items()}


EXPERIMENTS = {
    "convergence": convergence(),
    "panel-A": panel(
        {
            f"KL on every token, beta {beta}": f"--algo tepo {WIDE} --kl-mask all --beta {beta}"
            for beta in ("1", "0.1", "0.01", "0.001", "0.0001")
        }
    ),
    "panel-B": panel(
        {
            "entropy bonus 0.003": f"--algo {VARIANTS}/entropy_bonus.py",
            "entropy punished 0.003": f"--algo {VARIANTS}/entropy_bonus.py --entropy-coef=-0.003",
            "Clip-Cov": f"--algo {VARIANTS}/clip_cov.py",
            "KL-Cov": f"--algo {VARIANTS}/kl_cov.py",
        }
    ),
    "panel-C": panel(
        {
            "token ratio (DAPO)": f"--algo dapo {WIDE}",
            "no ratio (GPG)": f"--algo {VARIANTS}/gpg.py",
            "CISPO": f"--algo {VARIANTS}/cispo.py",
            "prefix ratio": f"--algo {VARIANTS}/prefix.py",
            "sequence ratio (TEPO without KL)": f"--algo tepo --kl-mask none {WIDE}",
        }
    ),
    "panel-D": panel(
        {
            "seq-mean-token-mean (GSPO)": f"--algo {VARIANTS}/gspo.py",
            "seq-mean-token-sum": f"--algo {VARIANTS}/seq_mean_token_sum.py",
            "token-mean (TEPO without KL)": f"--algo tepo --kl-mask none {WIDE}",
            "token ratio, GRPO": f"--algo grpo {WIDE}",
            "token ratio, Dr. GRPO": f"--algo {VARIANTS}/dr_grpo.py {WIDE}",
        }
    ),
    "panel-E": panel(
        {
            "A < 0 and dH > 0": f"--algo tepo --kl-mask negative {WIDE}",
            "both": f"--algo tepo --kl-mask both {WIDE}",
            "A > 0 and dH < 0 (TEPO)": f"--algo tepo {WIDE}",
            "none": f"--algo tepo --kl-mask none {WIDE}",
        }
    ),
    "lemma": panel({"TEPO": f"--algo experiments/lemma.py {WIDE}"}),
}

# --------------------------------------------------------------------------------------------------
# The sparse task

LAZIER = dict(start=0.85, later=0.5)  # see tasks.arithmetic.lazy_steps: 0.55 and 0.15 there


def make_lazier(directory):
    """Writes the embedded model to a directory, after 40 supervised steps on lazier solutions."""
    name = resolve_model("tiny")
    tokenizer = load_tokenizer(name)
    model = load_model(name, "cpu")
    torch.set_num_threads(1)
    rng = random.Random(0)
    pairs = []
    for problem in arithmetic.load("train")[:2000]:
        prompt = problem["prompt"]
        response = arithmetic.solution(prompt, arithmetic.lazy_steps(prompt, rng, **LAZIER))
        pairs.append({"prompt": prompt, "response": response})
    settings = dict(steps=40, batch_size=64, learning_rate=1e-4, max_tokens_per_batch=4096)
    for _ in warm_start(model, tokenizer, pairs, directory, **settings):
        pass


# --------------------------------------------------------------------------------------------------
# Runs


def folder_of(directory, label, seed):
    """Where a run goes: "TEPO, 8 updates" -> tepo-8-updates-0."""
    return directory / f"{re.sub('[^a-z0-9.]+', '-', label.lower()).strip('-')}-{seed}"


def steps_of(args, updates):
    """The steps of a run."""
    steps = args.steps or STEPS[updates][0]
    return steps * 3 // 2 if args.task == "sparse" and not args.steps else steps


def train_command(args, directory, label, seed, updates, flags):
    """The command of a run, or None where it is done. One that was stopped begins anew."""
    folder = folder_of(directory, label, seed)
    steps = steps_of(args, updates)
    if len(read_jsonl(folder / "metrics.jsonl")) >= steps:
        return None
    command = ["train.py", *RECIPE, *STEPS[updates][1], *flags]
    command += ["--seed", str(seed), "--steps", str(steps)]
    command += ["--threads", "1", "--device", "cpu", "--overwrite", "--output-dir", str(folder)]
    if args.task == "sparse":
        command += ["--model", str(directory.parent / "lazier"), *TINY_DEFAULTS]
    return command


# The lazier model is a folder. train.py knows the embedded model by its name alone.
TINY_DEFAULTS = """--data arithmetic --num-prompts 32 --learning-rate 3e-5
    --max-completion-length 48 --rollout-batch-size 512 --no-gradient-checkpointing""".split()


def steps_to(rewards, level=SOLVED, width=3):
    """The step at which the mean of `width` rewards first reaches a level, or None.

    Between two steps it is interpolated, so that methods can be told apart by less than a step.
    """
    means = [fmean(rewards[i : i + width]) for i in range(len(rewards) - width + 1)]
    for i, value in enumerate(means):
        if value >= level:
            if i == 0:
                return float(width)
            return width + i - (value - level) / (value - means[i - 1])
    return None


def summary(rows):
    """What is told of a run, from its metrics.jsonl, as a dict of numbers and None."""
    rewards = [row["task_reward"] for row in rows]
    found = {
        "steps_to_0.8": steps_to(rewards),
        "final": fmean(rewards[-5:]),
        "rewards": rewards,
    }
    columns = {
        "entropy": ["entropy"],
        "clipped": ["clip_ratio/low", "clip_ratio/high"],
        "M": ["kl_mask_fraction"],
        "A>0": ["A>0"],
        "A>0, dH<0": ["A>0, dH<0"],
        "A<0": ["A<0"],
        "A<0, dH>0": ["A<0, dH>0"],
    }
    for name, keys in columns.items():
        values = [present([row.get(key) for row in rows]) for key in keys]
        found[name] = sum(map(fmean, values)) if all(values) else None
    return found


# --------------------------------------------------------------------------------------------------
# What came out. `results` is a dict label -> list of summaries, one a seed.


def mean_sd(values, decimals=3, scale=1.0):
    """A cell of a table: mean and standard deviation of the values that are not None."""
    found = [scale * value for value in present(values)]
    if not found:
        return ""
    spread = f" ± {stdev(found):.{decimals}f}" if len(found) > 1 else ""
    missing = f" ({len(found)} of {len(values)})" if len(found) < len(values) else ""
    return f"{fmean(found):.{decimals}f}{spread}{missing}"


def table(results):
    """The Markdown table, as a list of lines: mean and standard deviation over the seeds."""
    lines = [
        "| | steps to 0.8 | reward, last 5 steps | entropy, nats | clipped, % | M, % |",
        "|---|---|---|---|---|---|",
    ]
    for label, runs in results.items():
        cells = [
            label,
            mean_sd([run["steps_to_0.8"] for run in runs], 2),
            mean_sd([run["final"] for run in runs]),
            mean_sd([run["entropy"] for run in runs]),
            mean_sd([run["clipped"] for run in runs], 2, 100),
            mean_sd([run["M"] for run in runs], 1, 100),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def sign_flip_p(differences):
    """The two-sided p of a paired permutation test: could the mean difference as well be 0?

    If nothing told a pair's members apart, each difference could have had the other sign. p is the
    share of all 2^n choices of signs whose mean is as far from 0. With n pairs it is 2^(1-n) at
    least: 5 seeds never reach 0.05.
    """
    total = abs(math.fsum(differences)) * (1 - 1e-12)
    extreme = 0
    for signs in itertools.product((1, -1), repeat=len(differences)):
        extreme += abs(math.fsum(s * d for s, d in zip(signs, differences))) >= total
    return extreme / 2 ** len(differences)


def split(label):
    """Method and setting: "TEPO, 1 update, wide clip" -> "TEPO", "1 update, wide clip".

    A label of a panel is all method, and its setting is empty.
    """
    match = re.fullmatch("(TEPO|GRPO|DAPO), (.+)", label)
    return match.groups() if match else (label, "")


def log_ratios(results, one, other):
    """log(steps of `one` / steps of `other`), for each seed with which both reach 0.8."""
    pairs = [(a["steps_to_0.8"], b["steps_to_0.8"]) for a, b in zip(results[one], results[other])]
    return [math.log(a / b) for a, b in pairs if a and b]


def claim(results, one, other):
    """One sentence: how many steps `one` needs for those of `other`, tested over the seeds."""
    logs = log_ratios(results, one, other)
    if len(logs) < 2:
        return f"{one} against {other}: {len(logs)} pairs of runs reached {SOLVED}"
    ratio = math.exp(fmean(logs))
    sentence = (
        f"{one} needs {ratio:.3f} times the steps of {split(other)[0]} "
        f"({len(logs)} of {len(results[one])} seeds; from {math.exp(min(logs)):.3f} to "
        f"{math.exp(max(logs)):.3f}); equal steps: p = {sign_flip_p(logs):.3g}"
    )
    if split(one)[1]:  # of `convergence`
        half = sign_flip_p([x - math.log(CLAIM) for x in logs])
        sentence += f", the paper's {CLAIM:.2f}: p = {half:.3g}"
    return sentence


def against_tepo(results):
    """The pairs of labels (TEPO's, another) to be compared: of one setting, or of one panel."""
    pairs = []
    for label in results:
        method, setting = split(label)
        if method == "TEPO" and setting:
            others = [f"{other}, {setting}" for other in ("GRPO", "DAPO")]
            pairs += [(label, other) for other in others if other in results]
        elif "(TEPO" in label:
            pairs += [(label, other) for other in results if other != label]
    return pairs


def lemma(results):
    """The measured shares of Lemma 3.2, in one sentence; an empty list where none was measured."""
    sentences = []
    for label, runs in results.items():
        if not all(run["A>0"] and run["A<0"] for run in runs):
            continue
        falls = [run["A>0, dH<0"] / run["A>0"] for run in runs]
        rises = [run["A<0, dH>0"] / run["A<0"] for run in runs]
        sentences.append(
            f"{label}: the entropy falls at {mean_sd(falls, 1, 100)}% of the tokens with A > 0, "
            f"and rises at {mean_sd(rises, 1, 100)}% of those with A < 0"
        )
    return sentences


def draw(results, title, path):
    """Reward over steps, a line a setting with a band of one standard deviation, as a PNG.

    Settings of different numbers of updates have a panel each.
    """
    panels = {}
    for label in results:
        panels.setdefault(split(label)[1], []).append(label)
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    size = (4.2 * columns + (3 if columns == 1 else 0), 4.0 * rows)
    figure, _ = new_figure(rows, columns, figsize=size, layout="constrained")
    axes = figure.axes
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    styles = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
    for axis, (setting, labels) in zip(axes, panels.items()):
        for i, label in enumerate(labels):
            by_step = list(zip(*(run["rewards"] for run in results[label])))
            means = [fmean(values) for values in by_step]
            spreads = [stdev(values) if len(values) > 1 else 0.0 for values in by_step]
            steps = range(1, len(means) + 1)
            style = styles[i % 5]
            axis.plot(steps, means, linestyle=style, color=f"C{i}", label=split(label)[0])
            low = [m - s for m, s in zip(means, spreads)]
            high = [m + s for m, s in zip(means, spreads)]
            axis.fill_between(steps, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        axis.axhline(SOLVED, color="black", linewidth=0.6)
        axis.set(title=setting, xlabel="step (rollouts)", ylim=(0, 1.02))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right")
    for axis in axes[::columns]:
        axis.set_ylabel("reward: share of right completions")
    seeds = len(next(iter(results.values())))
    figure.suptitle(f"{title}: mean and standard deviation of {seeds} seeds")
    save_figure(figure, path)


def draw_ratios(results, path):
    """TEPO's steps in those of the other method, over the updates a rollout, as a PNG.

    A line for each other method and clip: the mean of the seeds, bars from the least to the most.
    """
    lines = {}
    for one, other in against_tepo(results):
        logs = log_ratios(results, one, other)
        method, setting = split(other)
        updates, clip = setting.split(", ")
        if logs:
            lines.setdefault(f"{method}, {clip}", []).append((int(updates.split()[0]), logs))
    figure, axis = new_figure(figsize=(7, 4.5), layout="constrained")
    for i, (label, points) in enumerate(lines.items()):
        means = [math.exp(fmean(logs)) for _, logs in points]
        below = [mean - math.exp(min(logs)) for mean, (_, logs) in zip(means, points)]
        above = [math.exp(max(logs)) - mean for mean, (_, logs) in zip(means, points)]
        axis.errorbar(
            [updates for updates, _ in points],
            means,
            yerr=[below, above],
            label=label,
            color="tab:orange" if label.startswith("GRPO") else "tab:green",
            linestyle="-" if label.endswith("wide clip") else "--",
            marker="osD^"[i],
            capsize=3,
        )
    axis.axhline(1.0, color="black", linewidth=0.6)
    axis.axhline(CLAIM, color="black", linewidth=0.6, linestyle=":")
    axis.annotate("the paper's 72/132", (1, CLAIM), va="bottom", fontsize=9)
    axis.set(xlabel="updates a rollout", xticks=list(STEPS), ylim=(0, 1.2))
    axis.set_ylabel(f"steps to reward {SOLVED}: TEPO's / the other's")
    axis.legend(loc="lower left")
    save_figure(figure, path)


# --------------------------------------------------------------------------------------------------
# The command


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument
    flag("experiment", choices=list(EXPERIMENTS))
    flag("--task", choices=["sums", "sparse"], default="sums", help="see the top of the file")
    flag("--seed", type=non_negative_int, default=0, help="the first one")
    flag("--seeds", type=positive_int, default=5, help="runs of each setting")
    flag("--steps", type=non_negative_int, default=0, help="of a run; 0: as many as it takes")
    flag("--updates", type=int, choices=STEPS, default=8, help="a rollout, in a panel")
    flag("--only", default="", help="only settings with this text in their label")
    flag("--jobs", type=positive_int, default=os.cpu_count() or 1, help="runs at a time")
    flag("--output-dir", default="runs/compare", help="runs that are done stay there")
    args = parser.parse_args(argv)
    if not any(args.only in label for label in EXPERIMENTS[args.experiment]):
        parser.error(f"--only {args.only}: {args.experiment} has no such setting")
    if args.experiment == "convergence" and args.updates != 8:
        parser.error('convergence has all of them: choose by --only "16 updates"')
    return args


def main(argv=None):
    args = parse_args(argv)
    root = Path(args.output_dir).absolute()
    name = f"{args.experiment}-{args.task}"
    if args.updates != 8:
        name += f"-{args.updates}-updates"
    directory = root / name
    directory.mkdir(parents=True, exist_ok=True)
    if args.task == "sparse" and not (root / "lazier").is_dir():
        make_lazier(root / "lazier")
    chosen = {
        label: (updates or args.updates, flags)
        for label, (updates, flags) in EXPERIMENTS[args.experiment].items()
        if args.only in label
    }
    seeds = range(args.seed, args.seed + args.seeds)
    tasks = []
    folders = {}
    for seed in seeds:
        for label, (updates, flags) in chosen.items():
            tasks.append([partial(train_command, args, directory, label, seed, updates, flags)])
            folders[folder_of(directory, label, seed)] = steps_of(args, updates)
    run_all(
        tasks,
        args.jobs,
        1,
        log=directory / "log.txt",
        total=sum(folders.values()),
        steps_done=lambda: sum(steps_in([folder], most) for folder, most in folders.items()),
    )
    results = {
        label: [
            summary(read_jsonl(folder_of(directory, label, seed) / "metrics.jsonl"))
            for seed in seeds
        ]
        for label in chosen
    }
    lines = [
        {"setting": label, "seed": seed, **run}
        for label, runs in results.items()
        for seed, run in zip(seeds, runs)
    ]
    write_jsonl(directory / "results.jsonl", lines)
    claims = [claim(results, *pair) for pair in against_tepo(results)]
    text = "\n".join([*table(results), "", *claims, *lemma(results), ""])
    with written_aside(directory / "table.md") as file:
        file.write(text)
    draw(results, name, directory / "curves.png")
    if args.experiment == "convergence":
        draw_ratios(results, directory / "ratios.png")
    print(text)
    print(f"results.jsonl, table.md and the pictures are in {directory}")


if __name__ == "__main__":
    run_script(main, "compare.py", "; the same command goes on where it stopped")
