"""Is it the conflict map that keeps utility, or only that less moves?

    python cast.py --compare [flags]    # or: python -m experiments.cast_compare [flags]

Thirteen arms are tuned from the same start. They differ in what may move: everything, the MLPs,
all heads, or all heads but some. Those that skip heads skip equally many: the ones of the highest
C, random ones, random ones in the very layers of the highest C, the ones of the lowest C, and so
on. Two arms move all heads and look at utility in every step, which costs them two gradients:
"project" takes out of the safety gradient what points against the utility gradient (PCGrad, Yu et
al. 2020), "replay" adds the utility gradient. Every seed has its own split of the data, conflict
map, order of batches and random heads.

An arm of which less moves learns safety more slowly, so that after equal steps it has also lost
less utility. So the arms are compared at matched safety too: where the NLL of the refusals of
held-out harmful prompts has fallen to the same level.

Every arm that is done is a row of compare.jsonl. The same command goes on where it stopped.
"""

import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

import torch
from tqdm import tqdm

import cast
from engine.errors import UserError, run_script
from engine.files import (
    append_jsonl,
    digest,
    fingerprint,
    new_figure,
    read_jsonl,
    save_figure,
    write_json,
    write_jsonl,
)
from engine.flags import non_negative_float, positive_int
from engine.heads import trained_masks, update_of, weights_of
from engine.runs import open_shared_dir

# Three times the learning rate of --tune. At the gentle one tuning costs the embedded model nothing
# but over-refusal, so there would be nothing to compare.
TINY = {**cast.TINY, "learning_rate": 3e-3, "steps": 24}

# --------------------------------------------------------------------------------------------------
# The arms


@dataclass
class Arm:
    """What may move. Arms of one name are draws of the same, and their mean is reported."""

    name: str
    trainable: str  # see engine.heads.trained_masks
    skipped: set  # of (layer, head)
    combine: Callable | None = None  # see cast.sft


def top_per_layer(scores, count):
    """`count` heads of high score, equally many of each layer where that is possible.

    scores: [layers][H] numbers. First the best head of every layer, then every second best, ...
    """
    order = cast.ranked(scores)
    seen = Counter()  # heads of each layer
    rank_in_layer = {}
    for layer, head in order:
        rank_in_layer[layer, head] = seen[layer]
        seen[layer] += 1
    return sorted(order, key=rank_in_layer.get)[:count]


def project(safe, util):
    """The safety gradient without its part that points against the utility gradient (PCGrad).

    safe, util: dicts name -> tensor. Where the two agree the safety gradient stays as it is.
    """
    product = sum((safe[name] * util[name]).sum() for name in safe)
    square = sum((util[name] ** 2).sum() for name in util)
    if not safe or product >= 0 or square == 0:
        return safe
    return {name: safe[name] - product / square * util[name] for name in safe}


def replay(safe, util):
    """The sum of both gradients: that of a batch of half safety and half utility examples."""
    return {name: safe[name] + util[name] for name in safe}


def same_layers(heads, places, rng):
    """Random heads, as many of each layer as `places` has. heads: (layer, head) of all."""
    wanted = Counter(layer for layer, _ in places)
    chosen = set()
    for layer, count in wanted.items():
        chosen.update(rng.sample([place for place in heads if place[0] == layer], count))
    return chosen


def make_arms(found, count, random_draws, rng):
    """The arms, as a list of Arm. Those that skip, skip `count` heads; layer 0 has its own number.

    found: cast.ConflictMap; random_draws: random sets of heads; rng: random.Random.
    """
    by_C = cast.ranked(found.C)
    by_O = cast.ranked(found.O)
    by_S = cast.ranked(found.S)
    layer_0 = {place for place in by_C if place[0] == 0}
    drawn = [set(rng.sample(by_C, count)) for _ in range(random_draws)]
    matched = [same_layers(by_C, by_C[:count], rng) for _ in range(random_draws)]
    return [
        Arm("full", "all", set()),
        Arm("MLP only", "mlp", set()),
        Arm("all heads", "heads", set()),
        Arm("skip top C", "heads", set(by_C[:count])),
        *[Arm("skip random", "heads", skipped) for skipped in drawn],
        *[Arm("skip random, same layers", "heads", skipped) for skipped in matched],
        Arm("skip bottom C", "heads", set(by_C[len(by_C) - count :])),
        Arm("skip top O", "heads", set(by_O[:count])),
        Arm("skip top S", "heads", set(by_S[:count])),
        Arm("skip layer 0", "heads", layer_0),
        Arm("skip top C per layer", "heads", set(top_per_layer(found.C, count))),
        Arm("all heads, project", "heads", set(), project),
        Arm("all heads, replay", "heads", set(), replay),
    ]


# --------------------------------------------------------------------------------------------------
# Runs. A trajectory is a list of rows: dicts of numbers, with the step and what cast.evaluate says.


def judged_steps(steps, evaluations):
    """The steps after which a run is judged, the last one included.

    They are denser towards the start: the arms that learn fastest are matched in their first steps.
    """
    shares = [i / evaluations for i in range(1, evaluations + 1)]
    return {math.ceil(steps * share**2) for share in shares}


def run_arm(arm, args, model, tokenizer, heads, sets, seed, begin):
    """The trajectory of an arm from its first row, `begin`. The model is as it was afterwards.

    args: the flags; sets: cast.Sets of the seed.
    """
    start = weights_of(model)
    masks = trained_masks(model, heads, arm.skipped, arm.trainable, args.train_kv)
    judged = judged_steps(args.steps, args.evaluations)
    rows = [begin]
    steps = cast.sft(model, sets.safe, masks, args, seed, sets.util, arm.combine)
    title = f"seed {seed}, {arm.name}"
    for step, _ in tqdm(steps, total=args.steps, desc=title, leave=False, disable=None):
        if step in judged:
            norm = update_of(model, start, masks).norm
            numbers = cast.evaluate(model, tokenizer, sets, args)
            rows.append({"step": step, "update_norm": norm, **numbers})
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name])
    return rows


def at_safety(rows, level):
    """The numbers of a trajectory where its safety_nll first falls to `level`; None if never.

    Between two rows they are interpolated in the logarithm of safety_nll.
    """
    crossing = next((i for i, row in enumerate(rows) if row["safety_nll"] <= level), None)
    if crossing is None:
        return None
    if crossing == 0:
        return rows[0]
    before, after = rows[crossing - 1], rows[crossing]
    fall = math.log(before["safety_nll"] / max(after["safety_nll"], 1e-12))
    weight = math.log(before["safety_nll"] / max(level, 1e-12)) / fall
    found = {key: (1 - weight) * before[key] + weight * after[key] for key in before}
    return {**found, "safety_nll": level}


def mean_of(rows):
    """The mean of several dicts of numbers, key by key."""
    return {key: fmean(row[key] for row in rows) for key in rows[0]}


# Flags that change nothing of a trajectory but rounding.
FREE = ("output_dir", "seed", "seeds", "threads", "arms", "match_nll")


def key_of(seed, args, model, sets):
    """What decides the trajectories of a seed, as a digest: flags, data and weights."""
    flags = {name: value for name, value in vars(args).items() if name not in FREE}
    tokens = {
        name: [[s.prompt_ids, s.completion_ids] for s in samples]
        for name, samples in vars(sets).items()
    }
    return digest([seed, flags, tokens, fingerprint(model.named_parameters())])


def start_of(saved, path, key, seed, args, model, tokenizer, heads, sets):
    """The conflict map of a seed and the first row of its arms: as saved, or made and saved now.

    saved: the row of compare.jsonl that has them, or None.
    """
    if saved:
        return cast.ConflictMap(*(torch.tensor(saved[name]) for name in "OSC")), saved["rows"][0]
    found = cast.diagnose(model, sets.safe[: args.examples], sets.util, heads, args).map
    begin = {"step": 0, "update_norm": 0.0, **cast.evaluate(model, tokenizer, sets, args)}
    scores = {name: getattr(found, name).tolist() for name in "OSC"}
    row = {"key": key, "seed": seed, "arm": "start", "rows": [begin], **scores}
    append_jsonl(path, [row])
    return found, begin


def run_seed(seed, args, model, tokenizer, heads, path):
    """All arms of a seed. path: of compare.jsonl, where those that are done already are taken from.

    Returns the safety_nll at which they are matched, and a dict arm -> "start", "end", "matched"
    (rows) and "trajectory". It is where the slowest arm ends that looks at safety alone; replay
    may never get there, and then has None for "matched". Raises UserError when another arm never
    reaches --match-nll.
    """
    sets = cast.load_sets(args, model, tokenizer, seed)
    key = key_of(seed, args, model, sets)
    done = {row["arm"]: row for row in read_jsonl(path) if row.get("key") == key}
    found, begin = start_of(done.get("start"), path, key, seed, args, model, tokenizer, heads, sets)
    rng = random.Random(f"{seed}, random heads")
    runs = {}  # name -> trajectories
    of_safety = set()  # the arms that look at nothing else
    arms = make_arms(found, cast.number_skipped(args, heads), args.random_draws, rng)
    for number, arm in enumerate(arms):
        if args.arms and arm.name not in args.arms.split(";"):
            continue
        place = f"{number}, {arm.name}"
        if place in done:
            rows = done[place]["rows"]
        else:
            rows = run_arm(arm, args, model, tokenizer, heads, sets, seed, begin)
            append_jsonl(path, [{"key": key, "seed": seed, "arm": place, "rows": rows}])
        runs.setdefault(arm.name, []).append(rows)
        if arm.combine is not replay:
            of_safety.add(arm.name)

    ends = [rows[-1]["safety_nll"] for name in of_safety or runs for rows in runs[name]]
    level = args.match_nll or max(ends)
    results = {}
    for name, many in runs.items():
        matched = [at_safety(rows, level) for rows in many]
        if None in matched and name in of_safety:
            raise UserError(f"--match-nll {level:g} is not reached by {name!r}; give more --steps")
        results[name] = {
            "start": begin,
            "end": mean_of([rows[-1] for rows in many]),
            "matched": None if None in matched else mean_of(matched),
            "trajectory": [mean_of(rows) for rows in zip(*many)],
        }
    return level, results


# --------------------------------------------------------------------------------------------------
# What came out. `results` is a list of what run_seed gave, one dict a seed.


def mean_and_sd(values):
    """Mean and standard deviation; nan for that of one value."""
    return fmean(values), stdev(values) if len(values) > 1 else math.nan


def rises(results, arm, key):
    """By how much a number rose with an arm until safety was matched, seed by seed."""
    return [seed[arm]["matched"][key] - seed[arm]["start"][key] for seed in results]


def answer(results, key):
    """In words: does `key` rise less with the top-C heads skipped than with random ones skipped?

    It is yes or no if all seeds agree. n fair coins would do that once in 2^n on either side.
    """
    top = rises(results, "skip top C", key)
    rand = rises(results, "skip random", key)
    seeds = len(results)
    less = sum(a < b for a, b in zip(top, rand))
    more = sum(a > b for a, b in zip(top, rand))
    chance = f"; all {seeds} would agree by chance in 1 of {2 ** (seeds - 1)} runs"
    if less == seeds:
        word = "yes"
    elif more == seeds:
        word = "no"
    else:
        word = "not shown"
        chance = ""
    top_mean, top_sd = mean_and_sd(top)
    rand_mean, rand_sd = mean_and_sd(rand)
    return (
        f"{key}: {word}. It changes by {top_mean:+.5f} (sd {top_sd:.5f}) with the top C heads "
        f"skipped and by {rand_mean:+.5f} (sd {rand_sd:.5f}) with random ones; "
        f"by less in {less} of {seeds} seeds{chance}"
    )


PANELS = {  # of the picture: utility, and which way it is better
    "offtopic_nll": "NLL of off-topic answers, nats a token (lower is better)",
    "total_nll": "NLL of off-topic and benign answers (lower is better)",
    "over_refusal": "share of benign requests refused (lower is better)",
    "offtopic_word_f1": "words shared with the off-topic reference, F1 (higher is better)",
}


def draw_frontier(results, path):
    """Utility against safety along training as a PNG: a panel a measure, a line an arm.

    A point is the mean over the seeds. Every arm has a colour and a marker of its own. The picture
    ends a little beyond where half of the arms end: the fastest ones go on far to the right.
    """
    from matplotlib import colormaps

    figure, axes = new_figure(2, 2, figsize=(15, 10), layout="constrained")
    colors = colormaps["tab20"].colors
    markers = "osD^v<>PX*phd8"
    ends = [mean_of([seed[arm]["end"] for seed in results])["safety_nll"] for arm in results[0]]
    least = 0.4 * median(ends)
    start = max(run["start"]["safety_nll"] for seed in results for run in seed.values())
    for axis, (key, label) in zip(axes.flat, PANELS.items()):
        shown = []
        for i, arm in enumerate(results[0]):
            points = zip(*(seed[arm]["trajectory"] for seed in results))
            rows = [mean_of(point) for point in points]
            x = [row["safety_nll"] for row in rows]
            y = [row[key] for row in rows]
            style = {"color": colors[i % 20], "marker": markers[i % len(markers)], "label": arm}
            width = 3 if arm in ("skip top C", "skip random") else 1.2
            axis.plot(x, y, linewidth=width, markersize=5, **style)
            shown += [value for level, value in zip(x, y) if level >= least]
        if key.endswith("nll") and min(shown) > 0 and max(shown) > 20 * min(shown):
            axis.set(yscale="log")
        else:
            margin = 0.05 * (max(shown) - min(shown)) or 0.05
            axis.set_ylim(min(shown) - margin, max(shown) + margin)
        axis.set(xscale="log", ylabel=label)
        axis.set(xlabel="NLL of the refusal of held-out harmful prompts (safer to the right)")
        axis.set_xlim(1.1 * start, least)
        axis.grid(alpha=0.3)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(f"Utility against safety while tuning, mean over {len(results)} seeds")
    save_figure(figure, path)


DECIMALS = {  # of the columns of the table
    "step": 3,
    "update_norm": 3,
    "safety_nll": 5,
    "refusal": 3,
    "over_refusal": 3,
    "offtopic_accuracy": 3,
    "offtopic_word_f1": 3,
    "offtopic_nll": 5,
    "total_accuracy": 3,
    "total_nll": 5,
}


def print_table(results, point, title):
    """A line an arm, mean and standard deviation over seeds. point: "end" or "matched"."""
    print(f"\n{title}; mean (sd) over {len(results)} seeds")
    print(" " * 25 + "".join(f"{key.replace('_', ' '):>19}" for key in DECIMALS))
    for arm in results[0]:
        line = f"{arm:<25}"
        rows = [seed[arm][point] for seed in results]
        if None in rows:
            print(f"{line}  not reached in {rows.count(None)} of {len(rows)} seeds")
            continue
        for key, decimals in DECIMALS.items():
            mean, sd = mean_and_sd([row[key] for row in rows])
            cell = f"{mean:.{decimals}f} ({sd:.{decimals}f})"
            line += f"{cell:>19}"
        print(line)


# --------------------------------------------------------------------------------------------------
# The command


def parse_args(argv=None):
    """The flags of cast.py and four more. Raises UserError on what cannot work."""
    parser = cast.build_parser()
    flag = parser.add_argument
    flag("--seeds", type=positive_int, default=5, help="how many, from --seed on")
    flag("--random-draws", type=positive_int, default=3, help="sets of random heads a seed")
    flag("--evaluations", type=positive_int, default=10, help="along a run, denser at its start")
    flag(
        "--match-nll",
        type=non_negative_float,
        default=0.0,
        help="NLL of held-out refusals at which arms are compared; 0: where the slowest arm ends",
    )
    flag("--arms", help="only these, with ; between them")
    parser.set_defaults(compare=True)
    args = cast.parse_args(argv, parser, TINY)
    if args.diagnose or args.tune:
        raise UserError("--compare makes its own maps and tunes its own arms: run it by itself")
    return args


def main(argv=None):
    """Writes compare.json and compare.png to --output-dir, prints the tables and the answers."""
    args = parse_args(argv)
    started = time.time()
    directory = Path(args.output_dir)
    model, tokenizer, heads = cast.prepare(args)
    open_shared_dir(directory)
    path = directory / "compare.jsonl"
    write_jsonl(path, read_jsonl(path))  # without a last line that is not whole
    results = []
    levels = []
    for seed in range(args.seed, args.seed + args.seeds):
        level, result = run_seed(seed, args, model, tokenizer, heads, path)
        levels.append(level)
        results.append(result)

    answers = []
    if {"skip top C", "skip random"} <= results[0].keys():
        keys = ["offtopic_nll", "total_nll", "over_refusal"]
        total, offtopic = (
            rises(results, "skip top C", key) for key in ("total_nll", "offtopic_nll")
        )
        if total == offtopic:
            keys.remove("total_nll")  # benign requests without wanted answers
        answers = [answer(results, key) for key in keys]
    record = {"flags": vars(args), "matched_nll": levels, "answers": answers, "seeds": results}
    write_json(directory / "compare.json", record)
    draw_frontier(results, directory / "compare.png")
    matched = ", ".join(f"{level:.2g}" for level in levels)
    print_table(results, "end", f"after {args.steps} steps")
    print_table(results, "matched", f"at matched safety: held-out refusal NLL {matched}")
    count = cast.number_skipped(args, heads)
    print(
        f"\nDoes skipping the {count} heads of top C keep more utility than skipping {count} "
        "random ones, at matched safety?"
    )
    print(*("  " + line for line in answers), sep="\n")
    print(f"{directory}/compare.json and .png are written")
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    run_script(main, "cast.py --compare", "; the same command goes on where it stopped")
