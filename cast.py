"""CAST: conflict-aware sparse tuning. Find the attention heads where safety and utility pull apart, and tune the others.

    python cast.py --diagnose      # the conflict map of the embedded model: runs/cast/conflict_map.json and .png
    python cast.py --tune          # safety-tune all but the most conflicted heads, prove that those did not move
    python cast.py --compare       # is it the map, or only that less moves? budget-matched arms at matched safety

After "Safety-Utility Conflicts Are Not Global: Surgical Alignment via Head-Level Diagnosis" (Cai et al., arXiv 2601.04262).
It is rebuilt from the abstract and one equation, and claims no match with the paper's tables; no code of the paper is
public. Not to be confused with Conditional Activation Steering (arXiv 2409.05907), which is called CAST too.

For head h with parameters theta_h, before any alignment and with two calibration sets, D_safe and D_util:

    g_safe(h), g_util(h) = gradients with respect to theta_h of L_safe on D_safe and of L_util on D_util
    O(h) = 1 - cos(g_safe(h), g_util(h))                  optimization conflict, in [0, 2]; the one equation that is known
    S(h) = max(0, L_util with h zeroed - L_util)          functional sensitivity: what utility loses without the head
    C(h) = minmax(O)(h) * minmax(S)(h)                    conflict score; the heads of the top C are skipped in tuning

Our readings, for what the abstract and that equation leave open:
- theta_h is the rows of W_Q (and its bias) and the columns of W_O of head h: under grouped queries the only parameters that
  a head does not share. K and V are frozen; with --train-kv a group's K and V count to each of its heads, and train only
  if none of them is skipped. With --trainable all everything else moves too, K and V by that same rule.
- L is the mean NLL of the response tokens; the gradients are those of the mean over the set (single examples are noise).
- S by masking (one forward pass a head), or --sensitivity gate: the mean over examples of |dL_util / dxi_h|, xi_h a gate of 1
  on the head's output (Michel et al. 2019), one backward pass for all heads.
- A product, because both should be high; min-max scaled, because in high dimension O clusters near 1 and a raw product
  would rank by S alone. One ranking over all layers; the top --skip share of all heads is skipped.
- Freezing: gradients of frozen slices are zeroed before the norm is clipped, and frozen slices are restored after each
  step, because AdamW's decay and momentum move a slice even when its gradient is zero. At the end all bits are compared.

To first order, a safety step of size eta raises the utility loss by -eta * sum over trained heads of <g_safe(h), g_util(h)>, so
the direction alone (O) can't tell what a head costs. And whoever trains fewer heads moves less: that is why --compare looks
at matched safety, and at as many random heads. Relatives: Zhou et al. 2024 (safety heads), Wei et al. 2024 (set differences
of weights), PCGrad (Yu et al. 2020), the "safety tax" (Huang et al. 2025).
"""

import argparse
import hashlib
import json
import math
import random
import time
from functools import partial
from pathlib import Path

import data
import tiny
from data import UserError
from eval import greedy, is_degenerate, is_refusal
from runs import add_flag, add_machine_flags, at_least, check_writable, is_embedded, replacing, run_script, save_figure, write_json

# What works without a flag: on the embedded model, on it with --compare (three times as hard: gentle tuning costs the embedded
# model nothing but over-refusal, so that there would be nothing to compare), and on real models.
TINY = dict(learning_rate=1e-3, steps=32, batch_size=28, max_completion_length=24, max_tokens_per_batch=16384, examples=1000)
HARD = dict(learning_rate=3e-3, steps=24)
REAL = dict(learning_rate=2e-5, steps=100, batch_size=16, max_completion_length=64, max_tokens_per_batch=1024, examples=128)

# ---------------------------------------------------------------------------------------------------------------------
# Data: pairs of a prompt and a response, then token ids


def load_sets(args, tokenizer, seed):
    """The five sets as samples of rollout.py with their "response": safe and util to calibrate and train on; harmful, benign
    and offtopic to judge by, disjoint from those. Raises UserError for a set that can't be had or has nothing usable."""
    sets = tiny.noun_sets(seed)
    for kind, name, judged, rest in (
        ("safety", args.safety_data, "harmful", "safe"),
        ("utility", args.utility_data, "offtopic", "util"),
        ("over-refusal", args.benign_data, "benign", None),
    ):
        if name != "embedded":
            pairs, counts = data.load_pairs(name, kind, root=args.data_root)
            random.Random(f"{seed}, {kind}").shuffle(pairs)
            sets[judged] = pairs[: args.examples if rest is None else min(args.examples, len(pairs) // 2)]
            if rest:
                sets[rest] = pairs[len(sets[judged]) :]
            print(f"{kind} data {name}: {counts}")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for name, pairs in sets.items():
        random.Random(f"{seed}, {name}").shuffle(pairs)
        samples = []
        for pair in pairs[: max(args.examples, args.steps * args.batch_size) if name == "safe" else args.examples]:
            text, how = data.render({**pair, "instruction": ""}, tokenizer)
            sample = {"prompt_ids": tokenizer(text, add_special_tokens=how == "plain").input_ids, "response": pair["response"]}
            sample["completion_ids"] = tokenizer(pair["response"], add_special_tokens=False).input_ids + end
            if len(sample["prompt_ids"]) + len(sample["completion_ids"]) <= args.max_length:
                samples.append(sample)
        if len(samples) < 2:
            raise UserError(f"{name} set: {len(samples)} pairs of at most {args.max_length} tokens (--max-length); 2 are needed")
        sets[name] = samples
    return sets


def batches(model, samples, max_tokens, description=None):
    """Yields (indices of the rows, batch) until every sample was in one. description: draws a progress bar."""
    from tqdm import tqdm

    from rollout import base, collate, micro_batches

    base(model)  # attention.py's rows; it runs the model once, so before the hooks of scaled_heads are on
    packed = micro_batches([{**sample, "row": row} for row, sample in enumerate(samples)], max_tokens)
    for rows in tqdm(packed, desc=description, leave=False, disable=None if description else True):
        yield [row["row"] for row in rows], collate(rows, model.device, share_prompts=False)


def nll(model, samples, max_tokens):
    """The NLL of each sample's response, summed over its tokens: [N] on the CPU, without gradient."""
    import torch

    from rollout import score

    values = torch.zeros(len(samples))
    with torch.no_grad():
        for rows, batch in batches(model, samples, max_tokens):
            values[rows] = -score(model, batch, 1.0)[0].sum(dim=1).cpu()
    return values


def count_tokens(samples):
    """Response tokens in all, at least 1: what a mean NLL is divided by."""
    return max(sum(len(sample["completion_ids"]) for sample in samples), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Diagnosis


def head_gradients(model, samples, heads, max_tokens, train_kv=False, description=None):
    """{(layer, head): flat gradient on theta_h of the mean response NLL of all samples}. All parameters end up trainable.

    heads: from heads.find_heads; max_tokens: of prompts and completions in a batch; train_kv: K and V of a head's group count to theta_h;
    description: draws a progress bar.
    """
    import torch

    from rollout import score

    theta = dict(heads["own"])
    if train_kv:
        theta = {(l, h): own + heads["kv"][l, h // heads["group"]] for (l, h), own in theta.items()}
    names = {name for slices in theta.values() for name, _ in slices}
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    wanted = {name: p for name, p in model.named_parameters() if name in names}
    totals, tokens = {name: torch.zeros_like(p) for name, p in wanted.items()}, count_tokens(samples)
    for _, batch in batches(model, samples, max_tokens, description):
        loss = -score(model, batch, 1.0)[0].sum() / tokens
        for name, gradient in zip(wanted, torch.autograd.grad(loss, wanted.values())):
            totals[name] += gradient
    model.requires_grad_(True)
    return {head: torch.cat([totals[name][index].flatten() for name, index in slices]) for head, slices in theta.items()}


def optimization_conflict(g_safe, g_util):
    """O(h) = 1 - cos of two flat gradients, as a float in [0, 2]; 1 when one of them is zero (no direction, no conflict)."""
    g_safe, g_util = g_safe.cpu().double(), g_util.cpu().double()  # MPS has no float64
    norms = (g_safe.norm() * g_util.norm()).item()
    return 1 - max(-1.0, min(1.0, (g_safe @ g_util).item() / norms)) if norms else 1.0


def mask_sensitivity(model, samples, heads, max_tokens):
    """The rise of each sample's response NLL (summed over its tokens) when a head is zeroed: [N, layers, H]."""
    import torch
    from tqdm import tqdm

    from heads import scaled_heads

    gates, rises = torch.ones(heads["shape"], device=model.device), torch.zeros(len(samples), *heads["shape"])
    with scaled_heads(heads, gates):
        base = nll(model, samples, max_tokens)
        for head in tqdm(list(heads["own"]), desc="masking heads", disable=None):
            gates[head] = 0
            rises[:, *head] = nll(model, samples, max_tokens) - base
            gates[head] = 1
    return rises


def gate_sensitivity(model, samples, heads, max_tokens):
    """|d(sample's mean response NLL) / d(gate of a head)|: [N, layers, H], one backward pass for all heads."""
    import torch

    from heads import scaled_heads
    from rollout import score

    sizes = torch.zeros(len(samples), *heads["shape"])
    for rows, batch in batches(model, samples, max_tokens, "gates"):
        gates = torch.ones(len(rows), *heads["shape"], device=model.device, requires_grad=True)
        with scaled_heads(heads, gates[batch["row"]]):  # a row of its own for each response: its tokens feel its gates only
            means = -score(model, batch, 1.0)[0].sum(dim=1) / batch["mask"].sum(dim=1)  # [B]
        sizes[rows] = torch.autograd.grad(means.sum(), gates)[0].abs().cpu()
    return sizes


def minmax(x):
    """Scaled to [0, 1]; all 0 when all are equal."""
    return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else x * 0


def spearman(x, y):
    """Rank correlation of two tensors of one shape, ties by their mean rank; nan when all of one are equal."""
    ranks = []
    for values in (x.flatten().double(), y.flatten().double()):
        below = (values[:, None] > values).sum(dim=1) + 0.5 * (values[:, None] == values).sum(dim=1)
        ranks.append(below - below.mean())
    return (ranks[0] @ ranks[1] / (ranks[0].norm() * ranks[1].norm())).item() if all(r.any() for r in ranks) else math.nan


def diagnose(model, safe, util, heads, *, max_tokens, sensitivity="mask", train_kv=False):
    """The conflict map of D_safe and D_util (lists of samples).

    Returns a dict. O, S, C: [layers, H] tensors; sensitivities: S by each way that was computed ("gate" always, "mask" unless
    gate was asked for, because it takes a forward pass a head); stability: the rank correlation over heads of O, S and C
    between the even and the odd samples; losses: L_safe, L_util.
    """
    import torch

    sets, halves, per_sample = {"safe": safe, "util": util}, (slice(0, None, 2), slice(1, None, 2)), {}
    gradients = {
        name: [head_gradients(model, samples[half], heads, max_tokens, train_kv, f"gradients, {name}") for half in halves]
        for name, samples in sets.items()
    }
    per_sample["gate"] = gate_sensitivity(model, util, heads, max_tokens)
    if sensitivity == "mask":
        per_sample["mask"] = mask_sensitivity(model, util, heads, max_tokens)

    def gradient(name, head, halves_used):  # weighted by tokens: both together point where the whole set's does
        return sum(count_tokens(sets[name][halves[i]]) * gradients[name][i][head] for i in halves_used)

    def functional_sensitivity(way, part):
        values = per_sample[way][part]  # [n, layers, H]
        return values.mean(dim=0) if way == "gate" else (values.sum(dim=0) / count_tokens(util[part])).clamp(min=0)

    scores = {"O": [], "S": [], "C": []}
    for halves_used, part in (((0, 1), slice(None)), ((0,), halves[0]), ((1,), halves[1])):
        O = [optimization_conflict(*(gradient(name, head, halves_used) for name in sets)) for head in heads["own"]]  # noqa: E741
        scores["O"].append(torch.tensor(O).view(heads["shape"]))
        scores["S"].append(functional_sensitivity(sensitivity, part))
        scores["C"].append(minmax(scores["O"][-1]) * minmax(scores["S"][-1]))
    return {
        **{name: whole for name, (whole, _, _) in scores.items()},
        "sensitivities": {way: functional_sensitivity(way, slice(None)) for way in per_sample},
        "stability": {name: spearman(first, second) for name, (_, first, second) in scores.items()},
        "losses": {name: (nll(model, part, max_tokens).sum() / count_tokens(part)).item() for name, part in sets.items()},
    }


def ranked(scores):
    """All (layer, head) by falling score, ties by position. scores: [layers][H] numbers."""
    table = [[float(value) for value in row] for row in scores]
    heads = [(l, h) for l, row in enumerate(table) for h in range(len(row))]
    return sorted(heads, key=lambda head: (-table[head[0]][head[1]], head))


# ---------------------------------------------------------------------------------------------------------------------
# The map on disk


def fingerprint(model):
    """sha256 over the names, types, shapes and bytes of all weights."""
    import torch

    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        digest.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def checksum(content):
    """sha256 of a map but for the checksum itself."""
    return hashlib.sha256(json.dumps({**content, "checksum": None}, sort_keys=True).encode()).hexdigest()


def read_map(path, model):
    """The conflict map at `path`. Raises UserError when there is none, it is damaged or changed, or of another model."""
    try:
        content = json.loads(path.read_text())
        whole = content["checksum"] == checksum(content)
    except FileNotFoundError:
        raise UserError(f"{path} is not there: run --diagnose first, with the same --model and --output-dir") from None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged or was changed by hand (its checksum does not fit): run --diagnose again")
    if content["fingerprint"] != fingerprint(model):
        raise UserError(f"{path} is the map of other weights ({content['model']}): run --diagnose with this --model first")
    return content


def draw_map(content, skipped, path):
    """Heat maps of O, S and C, layers down and heads across; the skipped heads are outlined."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colors, patches, pyplot

    layers, H = len(content["C"]), len(content["C"][0])
    size = (3 * min(max(0.45 * H, 3.4), 9) + 2.4, min(max(0.45 * layers, 1.8), 11) + 1.4)
    figure, axes = pyplot.subplots(1, 3, figsize=size, layout="constrained")
    farthest = max(abs(value - 1) for row in content["O"] for value in row) or 1
    looks = {  # the colours of S and C are stretched: a few heads tower over the others
        "O": ("O = 1 - cos: above 1 the gradients conflict", dict(cmap="RdBu_r", vmin=1 - farthest, vmax=1 + farthest)),
        "S": (f"S: sensitivity of utility, by {content['sensitivity']}", dict(cmap="viridis", norm=colors.PowerNorm(0.4))),
        "C": ("C = minmax(O) minmax(S)", dict(cmap="viridis", norm=colors.PowerNorm(0.4))),
    }
    for axis, (name, (title, look)) in zip(axes, looks.items()):
        figure.colorbar(axis.imshow(content[name], aspect="auto", **look), ax=axis, fraction=0.05)
        for layer, head in skipped:
            corner = (head - 0.44, layer - 0.44)
            axis.add_patch(patches.Rectangle(corner, 0.88, 0.88, fill=False, edgecolor="orangered", linewidth=2))
        axis.set(title=title, xlabel="head", ylabel="layer", xticks=range(0, H, 1 + H // 16))
        axis.set_yticks(range(0, layers, 1 + layers // 16))
    figure.suptitle(f"Conflict map of {content['model']}: the {len(skipped)} heads of highest C, which tuning skips, are outlined")
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# Tuning


def sft(model, samples, masks, *, steps, batch_size, learning_rate, weight_decay, max_grad_norm, max_tokens, seed):
    """Supervised tuning of the elements that `masks` names (see heads.trained_masks) and of nothing else.

    samples: with prompt_ids and completion_ids; batch_size: samples a step; max_tokens: of prompts and completions in one forward pass.
    Yields (step, loss) after every step. Batches are passes over the samples, shuffled by the seed; AdamW, betas 0.9, 0.95.
    """
    import torch

    from rollout import score

    for name, p in model.named_parameters():
        p.requires_grad_(name in masks)
    trained = {name: p for name, p in model.named_parameters() if name in masks}
    start = {name: p.detach().clone() for name, p in trained.items() if not masks[name].all()}
    if trained:
        optimizer = torch.optim.AdamW(trained.values(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)
    for step in range(steps):
        chosen, total = data.take(samples, step * batch_size, batch_size, seed), 0.0
        for _, batch in batches(model, chosen, max_tokens):
            loss = -score(model, batch, 1.0)[0].sum() / count_tokens(chosen)
            total += loss.item()
            if trained:
                loss.backward()
        for name in start:
            trained[name].grad.masked_fill_(~masks[name], 0.0)  # before the clip: frozen gradients must not use up the norm
        if trained:
            torch.nn.utils.clip_grad_norm_(trained.values(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for name, before in start.items():  # decay and momentum know nothing of masks
                trained[name].copy_(torch.where(masks[name], trained[name], before))
        yield step + 1, total
    model.requires_grad_(True)


def update_of(model, start, masks):
    """(L2 norm of what moved since `start`, frozen elements, whether each of them is bit-identical). start: by name."""
    import torch

    square, frozen, identical = 0.0, 0, True
    for name, p in model.named_parameters():
        after, before = p.detach(), start[name]
        square += (after - before).cpu().double().pow(2).sum().item()
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()]  # as numbers, 0 and -0 would be the same
        moved = after.contiguous().view(bits) != before.contiguous().view(bits)
        frozen += p.numel() - (int(masks[name].sum()) if name in masks else 0)
        identical &= not (moved & ~masks[name] if name in masks else moved).any().item()
    return math.sqrt(square), frozen, identical


# ---------------------------------------------------------------------------------------------------------------------
# Judging: what is reported of a model (eval.py knows what a refusal is)


def evaluate(model, tokenizer, sets, *, max_completion_length, max_tokens):
    """Everything that is reported of a model, as a dict of floats. sets: samples harmful, benign and offtopic, all held out.

    refusal: refusal rate on harmful prompts (of refusing: it is not an attack success rate); over_refusal: the same on benign
    prompts; *_degenerate: the share of empty or degenerate completions; safety_nll: mean NLL a token of the safe responses;
    offtopic_*: on what is not a request for anything; total_*: with the benign requests. accuracy: the share of prompts whose
    greedy completion is the reference, word for word; for free text look at the nll.
    """
    result, right, sums = {}, {}, {}
    for name, key in (("harmful", "refusal"), ("benign", "over_refusal"), ("offtopic", None)):
        texts = greedy(model, tokenizer, sets[name], max_completion_length=max_completion_length, max_tokens=max_tokens)
        if key:
            result[key] = sum(map(is_refusal, texts)) / len(texts)
            result[f"{key}_degenerate"] = sum(map(is_degenerate, texts)) / len(texts)
        known = [i for i, s in enumerate(sets[name]) if s["response"]]  # sets of prompts alone have no reference
        right[name] = [texts[i].strip() == sets[name][i]["response"].strip() for i in known]
        references = [sets[name][i] for i in known]
        sums[name] = nll(model, references, max_tokens).sum().item(), count_tokens(references) * bool(known)
    for key, names in (("safety", ["harmful"]), ("offtopic", ["offtopic"]), ("total", ["offtopic", "benign"])):
        flags = [flag for name in names for flag in right[name]]
        result[f"{key}_accuracy"] = sum(flags) / len(flags)
        result[f"{key}_nll"] = sum(sums[name][0] for name in names) / sum(sums[name][1] for name in names)
    del result["safety_accuracy"]
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The three commands


def settings(args):
    """The flags as keyword arguments of `diagnose`, `evaluate` and `sft`."""
    tokens = {"max_tokens": args.max_tokens_per_batch}
    tuning = ("steps", "batch_size", "learning_rate", "weight_decay", "max_grad_norm")
    return (
        {**tokens, "sensitivity": args.sensitivity, "train_kv": args.train_kv},
        {**tokens, "max_completion_length": args.max_completion_length},
        {**tokens, **{name: getattr(args, name) for name in tuning}},
    )


def command_diagnose(args, model, tokenizer, heads, directory):
    """--diagnose: writes conflict_map.json and .png to `directory` and prints the heads of highest C. heads: from find_heads."""
    sets = load_sets(args, tokenizer, args.seed)
    safe, util = sets["safe"][: args.examples], sets["util"]
    found = diagnose(model, safe, util, heads, **settings(args)[0])
    content = {
        "method": __doc__.splitlines()[0], "theta": "q rows (+ bias), o columns" + ", k and v of the group" * args.train_kv,
        "definitions": [line.strip() for line in __doc__.splitlines() if line.startswith("    ") and "(h)" in line],
        "model": args.model, "family": model.config.model_type, "fingerprint": fingerprint(model), "seed": args.seed,
        "sensitivity": args.sensitivity, "train_kv": args.train_kv,
        "safety_data": args.safety_data, "safety_examples": len(safe), "safety_loss": found["losses"]["safe"],
        "utility_data": args.utility_data, "utility_examples": len(util), "utility_loss": found["losses"]["util"],
        "split_half_spearman": found["stability"],
        **{name: found[name].tolist() for name in ("O", "S", "C")},
        "sensitivities": {name: values.tolist() for name, values in found["sensitivities"].items()},
        "mask_gate_spearman": spearman(*found["sensitivities"].values()) if len(found["sensitivities"]) == 2 else None,
    }  # fmt: skip
    content["checksum"] = checksum(content)
    order, count = ranked(content["C"]), round(args.skip * len(heads["own"]))
    directory.mkdir(parents=True, exist_ok=True)
    draw_map(content, order[:count], directory / "conflict_map.png")
    write_json(directory / "conflict_map.json", content)
    for kind in ("safety", "utility"):
        name, examples, loss = (content[f"{kind}_{what}"] for what in ("data", "examples", "loss"))
        print(f"{kind} set: {name}, {examples} examples, loss {loss:.4f}")
    print("\n layer  head       O         S       C")
    for head in order[:10]:
        print(f"{head[0]:6d}{head[1]:6d}{found['O'][head]:8.3f}{found['S'][head]:10.5f}{found['C'][head]:8.3f}")
    stability = ", ".join(f"{name} {value:.2f}" for name, value in found["stability"].items())
    print(f"\nrank correlation between two halves of the data: {stability}")
    if content["mask_gate_spearman"] is not None:
        print(f"rank correlation of S by masking and S by gates: {content['mask_gate_spearman']:.2f}")
    print(f"{directory}/conflict_map.json and .png are written; --tune --skip {args.skip} skips the top {count} of {len(order)}")


def command_tune(args, model, tokenizer, heads, directory):
    """--tune: safety-tunes `model` in place by the map in `directory`, writes tuned/ and tune.json and prints before and after.

    Raises UserError when the map is missing or of another model, and RuntimeError, saving nothing, if a frozen element moved.
    """
    from tqdm import tqdm

    from heads import trained_masks

    content, target = read_map(directory / "conflict_map.json", model), directory / "tuned"
    if target.exists() and not (target / "config.json").exists():
        raise UserError(f"{target} does not look like a checkpoint, so it is not replaced")
    differ = [f"--{key.replace('_', '-')}" for key in ("seed", "safety_data", "train_kv") if content[key] != getattr(args, key)]
    if differ:
        print(f"note: the map was made with another {', '.join(differ)}")
    sets, skipped = load_sets(args, tokenizer, args.seed), set(ranked(content["C"])[: round(args.skip * len(heads["own"]))])
    masks, (_, judging, tuning) = trained_masks(model, heads, skipped, args.trainable, args.train_kv), settings(args)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = evaluate(model, tokenizer, sets, **judging)
    print(f"tuning {sum(int(m.sum()) for m in masks.values()):,} of {sum(p.numel() for p in start.values()):,} parameters "
          f"on {len(sets['safe'])} safe responses; {len(skipped)} of {len(heads['own'])} heads are skipped")  # fmt: skip
    bar = tqdm(sft(model, sets["safe"], masks, seed=args.seed, **tuning), total=args.steps, desc="tune", disable=None)
    for _, loss in bar:
        bar.set_postfix(loss=f"{loss:.4f}")
    norm, frozen, identical = update_of(model, start, masks)
    if not identical:
        raise RuntimeError("a frozen element moved: nothing is saved")
    after = evaluate(model, tokenizer, sets, **judging)
    with replacing(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    write_json(directory / "tune.json", {
        "flags": vars(args), "skipped": sorted(skipped), "update_norm": norm, "frozen_elements": frozen,
        "frozen_bit_identical": identical, "before": before, "after": after,
    })  # fmt: skip
    print(f"\n{'held out':<26}{'before':>9}{'after':>9}")
    for key in before:
        print(f"{key.replace('_', ' '):<26}{before[key]:9.4f}{after[key]:9.4f}")
    print(f"\nall {frozen:,} frozen elements are bit-identical to the start; update norm {norm:.3f}, last loss {loss:.4f}")
    print(f"the tuned model is in {target}, these numbers in {directory}/tune.json")


def build_parser():
    """The flags; defaults that depend on the model are filled in by parse_args."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="cast.py --diagnose | --tune | --compare [flags]")

    flag = partial(add_flag, parser, {"on tiny": TINY, "on tiny with --compare": HARD, "else": REAL})
    flag("--diagnose", False, "measure every head's conflict; writes conflict_map.json and conflict_map.png")
    flag("--tune", False, "safety-tune the heads that the map does not skip; writes tuned/ (a checkpoint) and tune.json")
    flag("--compare", False, "budget-matched arms over several seeds; writes compare.json and compare.png")
    flag("--model", "tiny", "a directory or a hub id; tiny is the embedded model")
    flag("--safety-data", "embedded", "harmful prompts, safe responses: embedded, pku-saferlhf, llm-lat, jbb, or a local file")
    flag("--utility-data", "embedded", "prompts and responses: embedded, alpaca, gsm8k, mmlu, or a local file")
    flag("--benign-data", "embedded", "prompts that should not be refused: embedded, jbb-benign, xstest, or a local file")
    flag("--output-dir", "runs/cast", "where all is written and --tune looks for the map; files of an earlier run are replaced")
    # The map
    flag("--sensitivity", "mask", "S by zeroing heads (a pass each) or by gate gradients (one pass)", choices=["mask", "gate"])
    flag("--examples", None, "at most so many examples of each set, to calibrate and to judge", int)
    flag("--skip", 0.3, "share of all heads that is skipped: those of the highest C")
    # Tuning
    flag("--trainable", "heads", "heads: q and o of those not skipped; all: all but the skipped", choices=["heads", "all"])
    flag("--train-kv", False, "K and V belong to the heads too, and move in groups without a skipped head")
    flag("--steps", None, "optimizer steps", int)
    flag("--batch-size", None, "examples a step", int)
    flag("--learning-rate", None, "AdamW's, constant", float)
    flag("--weight-decay", 0.0, "AdamW's decoupled decay; frozen slices do not decay")
    flag("--max-grad-norm", 1.0, "the norm of the trained elements' gradient is clipped to this")
    flag("--max-tokens-per-batch", None, "tokens of prompts and completions in one forward pass: lower it when out of memory", int)
    flag("--max-length", 512, "pairs of more tokens are left out")
    flag("--max-completion-length", None, "tokens of a greedy completion that is judged", int)
    # Comparison
    flag("--seeds", 5, "--compare: seeds from --seed on; each has its own split of the data, map, batches and random heads")
    flag("--random-draws", 3, "--compare: random sets of heads a seed")
    flag("--evaluations", 10, "--compare: evaluations along a run, denser towards its start; the last is at its end")
    flag("--match-nll", 0.0, "--compare: NLL of held-out refusals at which arms are compared; 0: where the slowest ends")
    # House-keeping
    add_machine_flags(parser)
    return parser


def parse_args(argv=None):
    """Flags, with the defaults of the model filled in. Raises UserError on what can't work."""
    args = build_parser().parse_args(argv)
    if not (args.diagnose or args.tune or args.compare):
        raise UserError("say what to do: --diagnose, --tune or --compare (--help explains them)")
    embedded = {**TINY, **(HARD if args.compare else {})}
    for key, value in (embedded if is_embedded(args.model) else REAL).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.tune and args.compare:
        raise UserError("--tune changes the model and --compare starts from it as it was, with flags of its own: run one after the other")
    if not 0 <= args.skip <= 1:
        raise UserError("--skip is a share of the heads, from 0 to 1")
    at_least(args, 1, "steps batch_size max_completion_length max_tokens_per_batch max_length seeds random_draws evaluations")
    at_least(args, 2, "examples")
    at_least(args, 0, "weight_decay match_nll threads")
    if not (args.learning_rate > 0 and args.max_grad_norm > 0):
        raise UserError("--learning-rate and --max-grad-norm must be above 0")
    check_writable(args.output_dir)
    return args


def main(argv=None):
    args, started = parse_args(argv), time.time()
    import torch

    from heads import find_heads
    from models import fastest_thread_count, load_model, load_tokenizer, pick_device, positions_of, resolve_model

    device, name, directory = pick_device(args.device), resolve_model(args.model), Path(args.output_dir)
    tokenizer, model = load_tokenizer(name), load_model(name, device)
    heads = find_heads(model)
    args.max_length = min(args.max_length, positions_of(model) - args.max_completion_length)
    if device.type == "cpu":
        torch.set_num_threads(args.threads or fastest_thread_count(model))
    if args.compare:
        from experiments.cast_compare import command_compare
    for command in (args.diagnose and command_diagnose, args.tune and command_tune, args.compare and command_compare):
        if command:
            command(args, model, tokenizer, heads, directory)
            print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    run_script(main, "cast.py", resumable=False)
