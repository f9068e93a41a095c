"""cast.py --compare: is it the conflict map that keeps utility, or only that less moves?

Budget-matched arms from the same start, several seeds; each seed has its own split of the data, map, order of batches and
random heads. Arms are compared after equal steps and at matched safety (the same NLL of held-out refusals), because whoever
trains fewer heads is slower to become safe and looks better at equal steps.
"""

import math
import random

from cast import diagnose, evaluate, load_sets, ranked, settings, sft, update_of
from data import UserError
from heads import trained_masks
from runs import save_figure, write_json


def top_per_layer(scores, count):
    """`count` heads of high score, as many from each layer as can be: the best of each first, then each one's second, ..."""
    order, place = ranked(scores), {}
    for layer, head in order:
        place[layer, head] = sum(other == layer for other, _ in place)
    return sorted(order, key=place.get)[:count]


def arms(found, count, random_draws, rng):
    """The arms of --compare as (name, what is trainable, skipped heads). All that skip, skip `count` heads, but layer 0."""
    order = ranked(found["C"])
    return [
        ("full", "all", set()), ("MLP only", "mlp", set()), ("all heads", "heads", set()),
        ("skip top C", "heads", set(order[:count])),
        *((f"skip random {i + 1}", "heads", set(rng.sample(order, count))) for i in range(random_draws)),
        ("skip bottom C", "heads", set(order[len(order) - count :])),
        ("skip top O", "heads", set(ranked(found["O"])[:count])),
        ("skip top S", "heads", set(ranked(found["S"])[:count])),
        ("skip layer 0", "heads", {head for head in order if head[0] == 0}),
        ("skip top C per layer", "heads", set(top_per_layer(found["C"], count))),
    ]  # fmt: skip


def at_safety(rows, level):
    """A trajectory's numbers where its safety_nll first falls to `level`, interpolated in its logarithm; None if never."""
    for before, after in zip(rows[:1] + rows, rows):
        if after["safety_nll"] <= level:
            logs = [math.log(max(x, 1e-12)) for x in (before["safety_nll"], level, after["safety_nll"])]
            weight = (logs[0] - logs[1]) / (logs[0] - logs[2]) if logs[0] > logs[2] else 1.0
            found = {key: (1 - weight) * before[key] + weight * after[key] for key in before}
            return {**found, "safety_nll": min(level, before["safety_nll"])}
    return None


def mean_of(rows):
    """The mean of several dicts of numbers, key by key."""
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def spread(values):
    """Mean and standard deviation (nan of one)."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else math.nan


def answer(results, key):
    """In words: does `key` rise less with the top-C heads skipped than with random ones?

    Yes or no if all seeds agree, which n fair coins would do once in 2^n on either side; else it is not shown.
    """
    arms_compared = ("skip top C", "skip random")
    rises = [[seed[arm]["matched"][key] - seed[arm]["start"][key] for arm in arms_compared] for seed in results]
    less, more = sum(top < rand for top, rand in rises), sum(top > rand for top, rand in rises)
    (top, top_sd), (rand, rand_sd) = (spread(column) for column in zip(*rises))
    word = "yes" if less == len(rises) else "no" if more == len(rises) else "not shown"
    chance = f"; all {len(rises)} would agree by chance in 1 of {2 ** (len(rises) - 1)} runs" if word != "not shown" else ""
    return (f"{key}: {word}. It changes by {top:+.5f} (sd {top_sd:.5f}) with the top C heads skipped and by {rand:+.5f} "
            f"(sd {rand_sd:.5f}) with random ones; by less in {less} of {len(rises)} seeds{chance}")  # fmt: skip


def draw_frontier(results, path):
    """Utility against safety along training, a line an arm, the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(18, 5), layout="constrained")
    for axis, key in zip(axes, ("offtopic_nll", "total_nll", "over_refusal")):
        for arm, color in zip(results[0], pyplot.get_cmap("tab10").colors):
            rows = [mean_of(point) for point in zip(*(seed[arm]["trajectory"] for seed in results))]
            width = 3 if arm in ("skip top C", "skip random") else 1.2
            x, y = ([row[name] for row in rows] for name in ("safety_nll", key))
            axis.plot(x, y, ".-", label=arm, color=color, linewidth=width)
        axis.set(xscale="log", yscale="linear" if key == "over_refusal" else "log", title=key.replace("_", " "))
        axis.set(xlabel="NLL of the refusal of held-out harmful prompts (safer to the right)")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(f"Utility against safety while tuning, mean over {len(results)} seeds: at the same safety, lower is better")
    save_figure(figure, path)


def command_compare(args, model, tokenizer, heads, directory):
    """--compare: writes compare.json and .png to `directory` and prints the tables and the answers. heads: from find_heads.

    Raises UserError when an arm never reaches --match-nll.
    """
    import torch
    from tqdm import tqdm

    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    count, results, levels, (measuring, judging, tuning) = round(args.skip * len(heads["own"])), [], [], settings(args)
    # Denser towards the start: the arms that learn fastest cross the level in their first steps.
    judged_at = {math.ceil(args.steps * (i / args.evaluations) ** 2) for i in range(1, args.evaluations + 1)}
    bar = tqdm(total=args.seeds * (9 + args.random_draws) * args.steps, desc="compare", disable=None)
    for seed in range(args.seed, args.seed + args.seeds):
        sets, runs = load_sets(args, tokenizer, seed), {}
        found = diagnose(model, sets["safe"][: args.examples], sets["util"], heads, **measuring)
        begin = {"step": 0, "update_norm": 0.0, **evaluate(model, tokenizer, sets, **judging)}
        for name, trainable, skipped in arms(found, count, args.random_draws, random.Random(f"{seed}, random heads")):
            masks, rows = trained_masks(model, heads, skipped, trainable, args.train_kv), [begin]
            for step, _ in sft(model, sets["safe"], masks, seed=seed, **tuning):
                bar.update()
                if step in judged_at:
                    norm = update_of(model, start, masks)[0]
                    rows.append({"step": step, "update_norm": norm, **evaluate(model, tokenizer, sets, **judging)})
            runs[name] = rows
            with torch.no_grad():
                for parameter, p in model.named_parameters():
                    p.copy_(start[parameter])
        level = args.match_nll or max(rows[-1]["safety_nll"] for rows in runs.values())  # where the slowest arm ends
        levels.append(level)
        late = [name for name, rows in runs.items() if at_safety(rows, level) is None]
        if late:
            raise UserError(f"--match-nll {level:g} is not reached by: {', '.join(late)}; give more --steps")
        merged = {}  # the draws of random heads are one arm
        for name, rows in runs.items():
            merged.setdefault(name.rstrip(" 0123456789") if "random" in name else name, []).append(rows)
        results.append({
            name: {"start": begin, "end": mean_of([rows[-1] for rows in many]),
                   "matched": mean_of([at_safety(rows, level) for rows in many]), "trajectory": [mean_of(rows) for rows in zip(*many)]}
            for name, many in merged.items()
        })  # fmt: skip
    bar.close()

    answers = [answer(results, key) for key in ("offtopic_nll", "total_nll", "over_refusal")]
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "compare.json", {"flags": vars(args), "matched_nll": levels, "answers": answers, "seeds": results})
    draw_frontier(results, directory / "compare.png")
    columns = "step update_norm safety_nll refusal over_refusal offtopic_accuracy offtopic_nll total_accuracy total_nll".split()
    matched = f"at matched safety: held-out refusal NLL {', '.join(f'{level:.2g}' for level in levels)}"
    for point, title in (("end", f"after {args.steps} steps"), ("matched", matched)):
        print(f"\n{title}; mean (sd) over {args.seeds} seeds")
        print(" " * 21 + "".join(f"{c.replace('_', ' '):>19}" for c in columns))
        for name in results[0]:
            cells = [spread([seed[name][point][c] for seed in results]) for c in columns]
            texts = [f"{mean:.{d}f} ({sd:.{d}f})" for (mean, sd), d in zip(cells, (5 if "nll" in c else 3 for c in columns))]
            print(f"{name:<21}" + "".join(f"{text:>19}" for text in texts))
    print(f"\nDoes skipping the {count} heads of top C keep more utility than skipping {count} random ones, at matched safety?")
    print(*("  " + line for line in answers), f"{directory}/compare.json and .png are written", sep="\n")


