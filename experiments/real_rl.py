"""TEPO, GRPO and DAPO on a real pretrained model and real word problems, on two CPU cores.

    python -m experiments.pretrained                       # once: models/SmolLM2-135M-Instruct
    python -m experiments.real_rl --data asdiv.jsonl       # the same command goes on after a stop

asdiv.jsonl is ASDiv (Miao et al. 2020) with the columns body, question, answer, formula, as
https://github.com/QwenLM/Qwen2.5-Math has it in evaluation/data/asdiv/test.jsonl. Taken are the
problems that one operation on two whole numbers solves. They are cut into three parts, always the
same: a few for a short supervised warm start (SmolLM2 gets hardly any of them right, and rambles),
some that are held out, and all others to learn from by reward.

Each run is one of train.py, judged by eval.py before and after, both called as a user would call
them. The runs share all flags but --algo and --seed; --epsilon and --epsilon-high are of them all.
real_rl.json holds what came out, real_rl.png shows it, and the tables of docs/RESULTS.md are what
is printed at the end.
"""

import argparse
import random
import re
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import torch
from tqdm import tqdm

from engine.errors import UserError, run_script
from engine.files import (
    new_figure,
    read_json,
    read_jsonl,
    save_figure,
    write_json,
    write_jsonl,
)
from engine.flags import (
    below_one,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)
from engine.models import load_model, load_tokenizer, resolve_model
from experiments.pool import present, run_all, steps_in
from experiments.warm import warm_start
from tasks.prompts import prompted
from tasks.rows import local_rows
from train import mean

ALGORITHMS = ("tepo", "grpo", "dapo")
SYSTEM = "Write one equation, then #### and the answer."
ONE_OPERATION = re.compile(r"(\d+[-+*/]\d+)=(\d+)")
HELD_OUT = 200  # problems
SETTINGS = [  # of train.py, for all runs: the same recipe, so that the objectives alone differ
    *("--num-prompts", "8", "--num-generations", "8", "--max-completion-length", "32"),
    *("--steps-per-generation", "4", "--num-iterations", "2", "--dynamic-sampling", "filter"),
    *("--overlong", "none", "--no-gradient-checkpointing", "--save-steps", "20"),
    *("--max-tokens-per-batch", "2048"),
]
JUDGING = {  # of eval.py: sampled as in training, and greedily
    "sampled": ["--temperature", "1", "--num-samples", "4"],
    "greedy": ["--temperature", "0", "--num-samples", "1"],
}


# --------------------------------------------------------------------------------------------------
# Problems, and a model that has seen a few of them solved


def one_operation_problems(path):
    """The problems of an ASDiv file that one operation solves, as dicts problem, answer, response.

    Raises UserError when there are too few.
    """
    problems = {}
    for row in local_rows(path, "train"):
        formula = str(row.get("formula", "")).replace(" ", "")
        match = ONE_OPERATION.fullmatch(formula)
        if match and row.get("body") and row.get("question"):
            text = f"{row['body'].strip()} {row['question'].strip()}"
            response = f"{formula}\n#### {match[2]}"
            problems[text] = {"problem": text, "answer": match[2], "response": response}
    if len(problems) < 20:
        raise UserError(
            f"--data {path}: {len(problems)} problems of one operation; needed are the columns "
            "body, question and formula of ASDiv"
        )
    found = list(problems.values())
    random.Random("the parts of ASDiv").shuffle(found)
    return found


def write_parts(args, directory):
    """Writes warm.jsonl, train.jsonl and test.jsonl to a directory, unless they are there."""
    if (directory / "train.jsonl").exists():
        return
    problems = one_operation_problems(args.data)
    held_out = min(HELD_OUT, len(problems) // 4)
    warm = min(args.warm_steps * 8, len(problems) // 4)
    plain = [{"problem": p["problem"], "answer": p["answer"]} for p in problems]
    write_jsonl(directory / "test.jsonl", plain[:held_out])
    write_jsonl(directory / "warm.jsonl", problems[held_out : held_out + warm])
    write_jsonl(directory / "train.jsonl", plain[held_out + warm :])


def make_warm(args, directory):
    """Writes warm/ to a directory: the model after a few steps on worked solutions."""
    name = resolve_model(args.model)
    tokenizer = load_tokenizer(name)
    model = load_model(name, "cpu")
    torch.set_num_threads(args.threads * args.jobs)
    rows = [{**row, "prompt": row["problem"]} for row in read_jsonl(directory / "warm.jsonl")]
    prompting = argparse.Namespace(system_prompt=SYSTEM, instruction="", chat_template_kwargs=None)
    steps = warm_start(
        model,
        tokenizer,
        prompted(rows, tokenizer, prompting),
        directory / "warm",
        steps=args.warm_steps,
        batch_size=8,
        learning_rate=args.warm_learning_rate,
        max_tokens_per_batch=2048,
    )
    for step, loss in tqdm(steps, "warm start", total=args.warm_steps, disable=None):
        print(f"warm start, step {step}: loss {loss:.4f}")


# --------------------------------------------------------------------------------------------------
# Runs. A task is a list of commands, one after another; several tasks run at a time.


def prompt_flags():
    """How train.py and eval.py are to ask."""
    return ["--system-prompt", SYSTEM, "--instruction", ""]


def judge_command(args, directory, model, way):
    """The command that judges a model on the held-out problems, or None where that is done.

    model: the name of a folder in the directory; way: a key of JUDGING.
    """
    folder = directory / f"{model}-{way}"
    if (folder / "results.json").exists():
        return None
    command = ["eval.py", "--output-dir", str(folder)]
    if (folder / "args.json").exists():
        return [*command, "--resume"]
    command += ["--model", str(directory / model), "--data", str(directory / "test.jsonl")]
    command += ["--limit", str(args.limit), "--max-completion-length", "32", "--batch-size", "64"]
    return [*command, *JUDGING[way], *prompt_flags(), "--threads", str(args.threads)]


def train_command(args, directory, algo, seed):
    """The command that trains, or goes on to train; None where the run is done."""
    folder = directory / f"{algo}-{seed}"
    if len(read_jsonl(folder / "metrics.jsonl")) >= args.steps:
        return None
    command = ["train.py", "--output-dir", str(folder), "--steps", str(args.steps)]
    if (folder / "args.json").exists():
        return [*command, "--resume"]
    command += ["--algo", algo, "--model", str(directory / "warm"), "--seed", str(seed)]
    command += ["--data", str(directory / "train.jsonl"), *SETTINGS, *prompt_flags()]
    command += ["--epsilon", str(args.epsilon), "--epsilon-high", str(args.epsilon_high)]
    return [*command, "--learning-rate", str(args.learning_rate), "--threads", str(args.threads)]


def commands_of(args, directory):
    """The tasks: first the judgement of the start, then the runs, each with its judgement.

    A task is a list of functions that return a command, or None where nothing is left to do.
    """
    judge = partial(judge_command, args, directory)
    tasks = [[partial(judge, "warm", way) for way in JUDGING]]
    for seed in range(args.seed, args.seed + args.seeds):
        for algo in args.algos:
            train = partial(train_command, args, directory, algo, seed)
            tasks.append([train, *(partial(judge, f"{algo}-{seed}", way) for way in JUDGING)])
    return tasks


# --------------------------------------------------------------------------------------------------
# What came out


def accuracies(model):
    """Accuracy of a model on the held-out problems and its standard error, for each way to judge.

    model: the path of its folder.
    """
    found = {}
    for way in JUDGING:
        results = read_json(model.with_name(f"{model.name}-{way}") / "results.json")["results"]
        (result,) = results.values()
        found[way] = (result[f"avg@{result['samples']}"], result["stderr"] or 0.0)
    return found


def collect(args, directory):
    """All figures of the runs, as a dict, ready for JSON."""
    runs = {}
    for algo in args.algos:
        runs[algo] = []
        for seed in range(args.seed, args.seed + args.seeds):
            rows = read_jsonl(directory / f"{algo}-{seed}" / "metrics.jsonl")[: args.steps]
            kept = ("reward", "entropy", "clip_ratio/low", "clip_ratio/high", "kl_mask_fraction")
            kept += ("updates", "groups_sampled", "frac_reward_zero_std")
            runs[algo].append(
                {
                    "seed": seed,
                    "accuracy": accuracies(directory / f"{algo}-{seed}"),
                    "seconds": sum(
                        value
                        for row in rows
                        for key, value in row.items()
                        if key.startswith("seconds/")
                    ),
                    **{key: [row.get(key) for row in rows] for key in kept},
                }
            )
    first = read_jsonl(directory / "warm-sampled" / "samples.jsonl")
    return {
        "flags": {key: str(value) for key, value in vars(args).items()},
        "settings": SETTINGS,
        "start": accuracies(directory / "warm"),
        "first_prompt": read_json(directory / "warm-sampled" / "results.json")["first_prompts"],
        "problems": {
            part: len(read_jsonl(directory / f"{part}.jsonl")) for part in ("warm", "train", "test")
        },
        "runs": runs,
        "samples_before": shown(first),
        "samples_after": shown(
            read_jsonl(directory / f"{args.algos[0]}-{args.seed}-sampled" / "samples.jsonl")
        ),
    }


def shown(samples):
    """Four completions for a reader: two right ones and two wrong ones."""
    keys = ("prompt", "answer", "completion", "right")
    picked = []
    for right in (True, False):
        some = [s for s in samples[::4] if s["right"] == right]
        picked += [{key: s[key] for key in keys} for s in some[:2]]
    return picked


def percent(accuracy):
    """An accuracy and its standard error as a cell of a table."""
    share, error = accuracy
    return f"{100 * share:.1f} ± {100 * error:.1f}%"


def print_tables(found):
    """The tables of docs/RESULTS.md, as Markdown."""
    start = found["start"]
    columns = ["", "reward, first 5 steps", "last 5", "entropy, first 5 steps", "last 5"]
    columns += ["clipped", "M", "updates", "minutes"]
    columns += [f"held out, {way}" for way in JUDGING]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    print("| start" + " |" * 8 + "".join(f" {percent(start[way])} |" for way in JUDGING))
    for algo, runs in found["runs"].items():
        for run in runs:
            entropy = present(run["entropy"])
            low, high = present(run["clip_ratio/low"]), present(run["clip_ratio/high"])
            cells = [
                f"{algo.upper()}, seed {run['seed']}",
                f"{fmean(run['reward'][:5]):.3f}",
                f"{fmean(run['reward'][-5:]):.3f}",
                f"{mean(entropy[:5]):.3f}",
                f"{mean(entropy[-5:]):.3f}",
                f"{100 * mean([a + b for a, b in zip(low, high)]):.2f}%",
                f"{mean(present(run['kl_mask_fraction'])):.3f}",
                f"{sum(run['updates'])}",
                f"{run['seconds'] / 60:.0f}",
                *[percent(run["accuracy"][way]) for way in JUDGING],
            ]
            print("| " + " | ".join(cells) + " |")
    for algo, runs in found["runs"].items():
        before = start["sampled"][0]
        after = [run["accuracy"]["sampled"][0] for run in runs]
        spread = f", sd {100 * stdev(after):.1f} over {len(after)} seeds" if len(after) > 1 else ""
        word = "doubled" if min(after) >= 2 * before else "not doubled"
        print(f"{algo.upper()}: {100 * before:.1f}% -> {100 * fmean(after):.1f}%{spread}: {word}")


def smoothed(values, width=5):
    """The mean of each value and the width - 1 before it; None counts as the value before."""
    held = []
    for value in values:
        held.append(value if value is not None else (held[-1] if held else 0.0))
    return [fmean(held[max(0, i - width + 1) : i + 1]) for i in range(len(held))]


def draw(found, path):
    """Reward, entropy, clipped share and M over the steps: mean and range of the seeds."""
    panels = {
        "reward (mean of 5 steps)": ["reward"],
        "entropy (nats a token)": ["entropy"],
        "share of tokens clipped": ["clip_ratio/low", "clip_ratio/high"],
        "share of tokens with a KL term (M)": ["kl_mask_fraction"],
    }
    figure, axes = new_figure(1, 4, figsize=(17, 3.8), layout="constrained")
    for axis, (title, keys) in zip(axes, panels.items()):
        for (algo, runs), color in zip(found["runs"].items(), ("tab:red", "tab:blue", "tab:green")):
            curves = []
            for run in runs:
                parts = [smoothed(run[key]) for key in keys]
                curves.append([sum(values) for values in zip(*parts)])
            steps = range(1, len(curves[0]) + 1)
            by_step = list(zip(*curves))
            axis.plot(steps, [fmean(values) for values in by_step], color=color, label=algo.upper())
            axis.fill_between(
                steps, list(map(min, by_step)), list(map(max, by_step)), color=color, alpha=0.15
            )
        axis.set(title=title, xlabel="step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    seeds = len(next(iter(found["runs"].values())))
    if seeds > 1:
        figure.suptitle(f"Mean over {seeds} seeds, band from the lowest to the highest")
    else:
        figure.suptitle("One seed")
    save_figure(figure, path)


# --------------------------------------------------------------------------------------------------
# The command


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flag = parser.add_argument
    flag("--data", required=True, help="a file with ASDiv's columns")
    flag("--model", default="models/SmolLM2-135M-Instruct", help="where it starts")
    flag("--output-dir", default="runs/real_rl", help="of the runs; those that are done stay")
    flag("--algos", nargs="+", choices=ALGORITHMS, default=ALGORITHMS, help="which methods run")
    flag("--epsilon", type=below_one, default=0.2, help="of all runs: clip below 1 - epsilon")
    flag("--epsilon-high", type=non_negative_float, default=0.28, help="and above 1 + this")
    flag("--seed", type=non_negative_int, default=0, help="the first one")
    flag("--seeds", type=positive_int, default=2, help="runs of each method")
    flag("--steps", type=positive_int, default=40, help="of a run")
    flag("--learning-rate", type=positive_float, default=1e-5, help="of all runs")
    flag("--warm-steps", type=positive_int, default=8, help="supervised, 8 problems each")
    flag("--warm-learning-rate", type=positive_float, default=3e-5, help="of the warm start")
    flag("--limit", type=non_negative_int, default=0, help="judge on so many problems; 0: all")
    flag("--jobs", type=positive_int, default=2, help="runs at a time")
    flag("--threads", type=positive_int, default=1, help="of a run")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    directory = Path(args.output_dir).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    write_parts(args, directory)
    if not (directory / "warm").is_dir():
        make_warm(args, directory)
    run_all(
        commands_of(args, directory),
        args.jobs,
        args.threads,
        log=directory / "log.txt",
        total=args.steps * args.seeds * len(args.algos),
        steps_done=lambda: steps_in(directory.glob("*-*"), args.steps),
    )
    found = collect(args, directory)
    write_json(directory / "real_rl.json", found)
    draw(found, directory / "real_rl.png")
    print_tables(found)
    print(f"real_rl.json and real_rl.png are in {directory}")


if __name__ == "__main__":
    run_script(main, "real_rl.py", "; the same command goes on where it stopped")
