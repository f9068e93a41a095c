"""CAST: conflict-aware sparse tuning. Finds the heads where safety and utility pull apart.

    python cast.py --diagnose   # the conflict map: runs/cast/conflict_map.json and .png
    python cast.py --tune       # safety-tunes the other heads, proves that these did not move
    python cast.py --compare    # is it the map, or only that less moves? arms at matched safety

After "Safety-Utility Conflicts Are Not Global: Surgical Alignment via Head-Level Diagnosis" (Cai et
al., arXiv 2601.04262). It is rebuilt from the abstract and one equation, and claims no match with
the paper's tables. No code of the paper is public. Conditional Activation Steering (arXiv
2409.05907) is called CAST too, and is something else.

The map is made before any alignment, from two sets of prompts with responses, D_safe and D_util.
For head h with parameters theta_h:

    g_safe(h), g_util(h) = gradients of L_safe on D_safe and L_util on D_util, by theta_h
    O(h) = 1 - cos(g_safe(h), g_util(h))        optimization conflict, in [0, 2]: the known equation
    S(h) = max(0, L_util without h - L_util)    functional sensitivity
    C(h) = minmax(O)(h) * minmax(S)(h)          conflict score: tuning skips the heads of highest C

Our readings, for what the abstract and that equation leave open:
- theta_h is the rows of W_Q (and its bias) and the columns of W_O of head h. Under grouped queries
  a head shares all its other parameters. K and V are frozen. With --train-kv the K and V of a group
  count to each of its heads, and train only if none of them is skipped. With --trainable all
  everything else moves too, K and V by that same rule.
- L is the mean NLL of the response tokens. The gradients are those of the mean over the set, since
  those of single examples are mostly noise.
- S is measured by masking: one forward pass for each head, with its output set to zero, from its
  layer on. --mask-examples takes fewer examples of D_util for it than for the gradients. With
  --sensitivity gate it is the mean over examples of |dL_util / dxi_h|, where xi_h is a gate of 1 on
  the head's output (Michel et al. 2019): one backward pass for all heads.
- C is a product, because both should be high. It is min-max scaled, because in high dimension O
  lies near 1 for every head, and a raw product would rank by S alone.
- There is one ranking over all layers. Tuning skips the top --skip share of all heads.
- Gradients of frozen elements are zeroed before the norm is clipped. Frozen elements are restored
  after each step, because AdamW's decay and momentum move them even when their gradient is zero. At
  the end all their bits are compared.

To first order a safety step of size eta changes the utility loss by -eta * sum over trained heads
of <g_safe(h), g_util(h)>. So O, a direction without a size, does not say what a head costs. And a
model of which less moves learns safety more slowly. So --compare looks at matched safety, and skips
as many random heads. Relatives: Zhou et al. 2024 (safety heads), Wei et al. 2024 (set differences
of weights), PCGrad (Yu et al. 2020), the "safety tax" (Huang et al. 2025).
"""

import argparse
import math
import os
import random
import runpy
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

import tasks
from engine.errors import UserError, run_script
from engine.files import fingerprint, replacing, write_json
from engine.flags import (
    Formatter,
    add_machine_flags,
    folder,
    non_negative_float,
    non_negative_int,
    number,
    positive_float,
    positive_int,
    share,
)
from engine.heads import (
    find_heads,
    recorded_layers,
    repeated_layers,
    scaled_heads,
    trained_masks,
    update_of,
    weights_of,
)
from engine.maps import checksum, read_map, scores_of
from engine.models import (
    check_finite,
    check_positions,
    check_tokens,
    load_model,
    load_tokenizer,
    pick_device,
    positions_of,
    resolve_model,
    set_threads,
    stop_token_ids,
)
from engine.plots import draw_map
from engine.runs import (
    check_writable,
    is_embedded,
    open_shared_dir,
    peak_memory_gb,
    settings_of,
)
from rollout import Sample, check_model, collate, micro_batches, sample, sample_length, score
from tasks import arithmetic
from tasks.prompts import add_prompt_flags, prompted, render
from tasks.refusals import is_degenerate, is_refusal
from tasks.safety import load_pairs

# --------------------------------------------------------------------------------------------------
# Data


@dataclass
class Sets:
    """Five lists of rollout.Sample. `problem` is the pair, a dict "prompt", "response"."""

    safe: list  # to calibrate and to tune on: harmful prompts, safe responses
    util: list  # to calibrate on: what the model can do
    harmful: list  # to judge by, like the following two; disjoint from `safe`
    offtopic: list  # disjoint from `util`
    benign: list  # harmless requests, which should not be refused


def load_sets(args, model, tokenizer, seed):
    """The five sets, as Sets, shuffled by the seed.

    args: the flags; model: before tuning. Raises UserError for a set that cannot be had or has
    fewer than two pairs of at most --max-length tokens, or with tokens that the model does not
    know.
    """
    judged = args.judge_examples or args.examples
    pairs = arithmetic.noun_sets(seed)
    if args.safety_data != "embedded":
        found = load_shuffled(args.safety_data, "safety", args.data_root, seed)
        pairs["harmful"], pairs["safe"] = held_out(found, judged)
    if args.harmful_data:
        found = load_shuffled(args.harmful_data, "safety", args.data_root, seed)
        known = {pair["prompt"] for pair in pairs["safe"]}
        pairs["harmful"] = [pair for pair in found if pair["prompt"] not in known][:judged]
    if args.utility_data != "embedded":
        # Prompts alone will do where the model's own answers are the reference.
        responses = not args.own_answers
        found = load_shuffled(args.utility_data, "utility", args.data_root, seed, responses)
        pairs["offtopic"], pairs["util"] = held_out(found, judged)
    if args.benign_data != "embedded":
        found = load_shuffled(args.benign_data, "over-refusal", args.data_root, seed)
        pairs["benign"] = found[:judged]
    samples = {}
    for name, chosen in pairs.items():
        most = args.examples
        if name == "safe":  # tuning may want more
            most = max(most, args.steps * args.batch_size)
        random.Random(f"{seed}, {name}").shuffle(chosen)
        chosen = prompted(chosen[:most], tokenizer, args)
        samples[name] = encode_pairs(name, chosen, tokenizer, args.max_length)
        check_tokens(model, [s.prompt_ids + s.completion_ids for s in samples[name]])
    if args.own_answers:
        for name in ("util", "offtopic"):
            samples[name] = own_answers(model, tokenizer, samples[name], args)
    return Sets(**samples)


def own_answers(model, tokenizer, samples, args):
    """The prompts of the samples with the model's own greedy answers as the wanted responses.

    What tuning then costs is how far the model moves away from what it says now. args: the flags.
    """
    answered = []
    for s, completed in zip(samples, complete_greedily(model, tokenizer, samples, args)):
        pair = {**s.problem, "response": completed.text}
        answered.append(Sample(s.prompt_ids, completed.completion_ids, problem=pair))
    return answered


def load_shuffled(name, kind, root, seed, responses=True):
    """The pairs of a data set (see tasks.safety.load_pairs), shuffled. Prints how many."""
    pairs, counts = load_pairs(name, kind, root=root, responses=responses)
    print(f"{kind} data {name}: " + ", ".join(f"{n:,} {reason}" for reason, n in counts.items()))
    random.Random(f"{seed}, {kind}").shuffle(pairs)
    return pairs


def held_out(pairs, most):
    """Cuts pairs into two lists: at most `most`, or half of them, to judge by, and the rest."""
    cut = min(most, len(pairs) // 2)
    return pairs[:cut], pairs[cut:]


def encode_pairs(name, pairs, tokenizer, max_length):
    """Pairs of a prompt and a response as a list of Sample. A response ends with the eos token.

    Pairs of more than max_length tokens are left out. Raises UserError if fewer than two are left.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    samples = []
    for pair in pairs:
        text, how = render(pair, tokenizer)
        prompt_ids = tokenizer(text, add_special_tokens=how == "plain").input_ids
        response_ids = tokenizer(pair["response"], add_special_tokens=False).input_ids
        s = Sample(prompt_ids, response_ids + end, problem=pair)
        if sample_length(s) <= max_length:
            samples.append(s)
    if len(samples) < 2:
        raise UserError(
            f"{name} set: {len(samples)} pairs of at most {max_length} tokens (--max-length); "
            "2 are needed"
        )
    return samples


def batches(model, samples, max_tokens, description=None):
    """Yields (indices of the samples, batch of rollout.collate), each sample once, one in a row.

    max_tokens: of prompts and completions in a batch; description: of a progress bar, if wanted.
    """
    # The order in which micro_batches takes them, so that indices can be told.
    order = sorted(range(len(samples)), key=lambda i: sample_length(samples[i]))
    parts = micro_batches([samples[i] for i in order], max_tokens, share_prompts=False)
    start = 0
    for part in tqdm(parts, desc=description, leave=False, disable=None if description else True):
        indices = order[start : start + len(part)]
        start += len(part)
        yield indices, collate(part, model.device, share_prompts=False)


@torch.no_grad()
def nll(model, samples, max_tokens):
    """The NLL of each sample's completion, summed over its tokens: [N] on the CPU."""
    values = torch.zeros(len(samples))
    for indices, batch in batches(model, samples, max_tokens):
        logp, _ = score(model, batch, 1.0)  # [R, T]
        values[indices] = -logp.sum(dim=1).cpu()
    return values


def count_tokens(samples):
    """Completion tokens in all, at least 1: what a mean NLL is divided by."""
    return max(sum(len(s.completion_ids) for s in samples), 1)


# --------------------------------------------------------------------------------------------------
# Diagnosis


def head_gradients(model, samples, heads, max_tokens, *, train_kv=False, description=None):
    """The gradient by theta_h of the completion NLL, summed over all tokens, for every head h.

    Sums, because the gradients of two halves of a set then add up to those of the set. Their
    direction is that of the mean's gradient. heads: of engine.heads.find_heads; max_tokens: in a
    batch; train_kv: K and V of its group count to theta_h; description: of a progress bar.
    Returns a list of flat tensors in the order of heads.all. All parameters end up trainable.
    """
    theta = [head.own + head.kv if train_kv else head.own for head in heads.all]
    names = {part.name for slices in theta for part in slices}
    model.requires_grad_(False)
    wanted = {name: p.requires_grad_() for name, p in model.named_parameters() if name in names}
    totals = {name: torch.zeros_like(p) for name, p in wanted.items()}
    for _, batch in batches(model, samples, max_tokens, description):
        logp, _ = score(model, batch, 1.0)
        gradients = torch.autograd.grad(-logp.sum(), wanted.values())
        for name, gradient in zip(wanted, gradients):
            totals[name] += gradient
    model.requires_grad_(True)
    return [
        torch.cat([totals[part.name][part.index].flatten() for part in slices]) for slices in theta
    ]


def optimization_conflict(g_safe, g_util):
    """O = 1 - cos of two flat gradients, as a float in [0, 2].

    It is 1 when one of them is zero: without a direction there is no conflict.
    """
    g_safe, g_util = g_safe.cpu().double(), g_util.cpu().double()  # MPS has no float64
    cosine = torch.cosine_similarity(g_safe, g_util, dim=0, eps=1e-150)  # so 0 / 0 is 0
    return 1 - cosine.clamp(-1, 1).item()


@torch.no_grad()
def mask_sensitivity(model, samples, heads, max_tokens):
    """How much the NLL of each sample (summed over its tokens) rises when a head is set to zero.

    Returns [N, layers, H]. It takes a forward pass for each head, of the layers from the head's on:
    those before it give what they gave without a mask. It says how long that will be.
    """
    rises = torch.zeros(len(samples), *heads.shape)
    bar = tqdm(total=len(samples) * len(heads.all), desc="masking heads", disable=None)
    for indices, batch in batches(model, samples, max_tokens):
        start = time.perf_counter()
        with recorded_layers(heads) as returned:
            base, _ = score(model, batch, 1.0)  # [R, T]
        if bar.n == 0:
            half = (time.perf_counter() - start) / 2  # of the layers, on average
            seconds = half * len(heads.all) * len(samples) / len(indices)
            tqdm.write(
                f"masking {len(heads.all)} heads one by one on {len(samples)} examples takes about "
                f"{seconds / 60:.1f} minutes (--sensitivity gate takes one backward pass, "
                "--mask-examples takes fewer)"
            )
        for head in heads.all:
            gates = torch.ones(heads.shape, device=model.device)
            gates[head.place] = 0
            with scaled_heads(heads, gates), repeated_layers(heads, returned, head.layer):
                logp, _ = score(model, batch, 1.0)
            rises[indices, head.layer, head.index] = (base - logp).sum(dim=1).cpu()
            bar.update(len(indices))
    bar.close()
    return rises


def gate_sensitivity(model, samples, heads, max_tokens):
    """|d(mean NLL of a sample) / d(gate of a head)| at gates of 1 (Michel et al. 2019).

    Returns [N, layers, H]. It takes one backward pass for all heads.
    """
    sizes = torch.zeros(len(samples), *heads.shape)
    for indices, batch in batches(model, samples, max_tokens, "gates"):
        gates = torch.ones(len(indices), *heads.shape, device=model.device, requires_grad=True)
        with scaled_heads(heads, gates):  # a row is a sample, and has gates of its own
            logp, _ = score(model, batch, 1.0)
        means = -logp.sum(dim=1) / batch["mask"].sum(dim=1)  # [R]
        (gradient,) = torch.autograd.grad(means.sum(), gates)
        sizes[indices] = gradient.abs().cpu()
    return sizes


def functional_sensitivity(way, values, samples):
    """S: [layers, H]. way: "mask" or "gate"; values: [N, layers, H] of that way; samples: the N."""
    if way == "gate":
        return values.mean(dim=0)
    return (values.sum(dim=0) / count_tokens(samples)).clamp(min=0)


def minmax(x):
    """A tensor, scaled to [0, 1]; all 0 when all are equal."""
    if x.max() == x.min():
        return torch.zeros_like(x)
    return (x - x.min()) / (x.max() - x.min())


@dataclass
class ConflictMap:
    """O, S and C of every head, each [layers, H]."""

    O: torch.Tensor
    S: torch.Tensor
    C: torch.Tensor


def conflict_map(g_safe, g_util, S):
    """The ConflictMap of gradients and sensitivities.

    g_safe, g_util: lists of what head_gradients gave for the parts of D_safe and of D_util;
    S: [layers, H].
    """
    conflicts = []
    for head in range(S.numel()):
        safe = sum(part[head] for part in g_safe)
        util = sum(part[head] for part in g_util)
        conflicts.append(optimization_conflict(safe, util))
    O = torch.tensor(conflicts).view(S.shape)
    return ConflictMap(O, S, minmax(O) * minmax(S))


def centred_ranks(x):
    """The rank of every element of a tensor, flat, minus their mean. Equal ones share a rank."""
    x = x.flatten()
    ranks = (x[:, None] > x).sum(dim=1) + 0.5 * (x[:, None] == x).sum(dim=1)
    return ranks.double() - ranks.double().mean()


def spearman(x, y):
    """The rank correlation of two tensors of one shape; nan when all elements of one are equal."""
    x, y = centred_ranks(x), centred_ranks(y)
    return (x @ y / (x.norm() * y.norm())).item()


@dataclass
class Diagnosis:
    """What --diagnose finds."""

    map: ConflictMap
    sensitivities: dict  # way -> S by that way: "gate", and "mask" unless gate was asked for
    stability: dict  # "O", "S", "C" -> rank correlation between the even and the odd samples
    safe_loss: float  # mean NLL a token
    util_loss: float


def diagnose(model, safe, util, heads, args):
    """The Diagnosis of a model. safe, util: lists of Sample, D_safe and D_util.

    args: the flags sensitivity, mask_examples, train_kv and max_tokens_per_batch.
    """
    way = args.sensitivity
    masked = util[: args.mask_examples or None]
    max_tokens = args.max_tokens_per_batch
    even = slice(0, None, 2)
    odd = slice(1, None, 2)
    gradients = partial(
        head_gradients, model, heads=heads, max_tokens=max_tokens, train_kv=args.train_kv
    )
    g_safe = [gradients(safe[half], description="gradients, safe") for half in (even, odd)]
    g_util = [gradients(util[half], description="gradients, util") for half in (even, odd)]
    values = {"gate": gate_sensitivity(model, util, heads, max_tokens)}
    if way == "mask":
        values["mask"] = mask_sensitivity(model, masked, heads, max_tokens)

    judged = {"gate": util, "mask": masked}
    S = {name: functional_sensitivity(name, x, judged[name]) for name, x in values.items()}
    S_even = functional_sensitivity(way, values[way][even], judged[way][even])
    S_odd = functional_sensitivity(way, values[way][odd], judged[way][odd])
    whole = conflict_map(g_safe, g_util, S[way])
    first = conflict_map(g_safe[:1], g_util[:1], S_even)
    second = conflict_map(g_safe[1:], g_util[1:], S_odd)
    return Diagnosis(
        map=whole,
        sensitivities=S,
        stability={
            "O": spearman(first.O, second.O),
            "S": spearman(first.S, second.S),
            "C": spearman(first.C, second.C),
        },
        safe_loss=nll(model, safe, max_tokens).sum().item() / count_tokens(safe),
        util_loss=nll(model, util, max_tokens).sum().item() / count_tokens(util),
    )


def ranked(scores):
    """All (layer, head) by falling score, ties by position. scores: [layers][H] numbers."""
    table = torch.as_tensor(scores).tolist()
    places = [(l, h) for l, row in enumerate(table) for h in range(len(row))]
    return sorted(places, key=lambda place: -table[place[0]][place[1]])  # a stable sort


def number_skipped(args, heads):
    """How many heads the share --skip is."""
    return round(args.skip * len(heads.all))


# --------------------------------------------------------------------------------------------------
# The map, as it is written

METHOD = "CAST, rebuilt from the abstract of arXiv 2601.04262 and one equation"
DEFINITIONS = [
    "g_safe(h), g_util(h) = gradients of L_safe on D_safe and L_util on D_util, by theta_h",
    "O(h) = 1 - cos(g_safe(h), g_util(h))",
    "S(h) = max(0, L_util without h - L_util); by gates: mean |dL_util / dgate_h|",
    "C(h) = minmax(O)(h) * minmax(S)(h)",
]


def map_content(args, model, safe, util, found):
    """What conflict_map.json holds. safe, util: the samples that were used; found: a Diagnosis."""
    theta = "q rows (+ bias), o columns"
    if args.train_kv:
        theta += ", k and v of the group"
    agreement = None
    if "mask" in found.sensitivities:
        agreement = spearman(found.sensitivities["mask"], found.sensitivities["gate"])
    content = {
        "method": METHOD,
        "theta": theta,
        "definitions": DEFINITIONS,
        "model": args.model,
        "family": model.config.model_type,
        "fingerprint": fingerprint(model.named_parameters()),
        "seed": args.seed,
        "sensitivity": args.sensitivity,
        "mask_examples": args.mask_examples,
        "train_kv": args.train_kv,
        "safety_data": args.safety_data,
        "safety_examples": len(safe),
        "safety_loss": found.safe_loss,
        "utility_data": args.utility_data,
        "utility_examples": len(util),
        "utility_loss": found.util_loss,
        "split_half_spearman": found.stability,
        "O": found.map.O.tolist(),
        "S": found.map.S.tolist(),
        "C": found.map.C.tolist(),
        "sensitivities": {way: S.tolist() for way, S in found.sensitivities.items()},
        "mask_gate_spearman": agreement,
    }
    content["checksum"] = checksum(content)
    return content


# --------------------------------------------------------------------------------------------------
# Tuning


def masked_gradients(model, samples, trained, masks, max_tokens):
    """The gradients of the mean NLL of the samples' completion tokens, and that NLL.

    trained: dict name -> parameter; masks: dict name -> bool tensor, elements outside get 0.
    """
    gradients = {name: torch.zeros_like(p) for name, p in trained.items()}
    mean_nll = 0.0
    for _, batch in batches(model, samples, max_tokens):
        logp, _ = score(model, batch, 1.0)
        loss = -logp.sum() / count_tokens(samples)
        mean_nll += loss.item()
        if trained:
            for name, gradient in zip(trained, torch.autograd.grad(loss, trained.values())):
                gradients[name] += gradient.masked_fill(~masks[name], 0.0)
    return gradients, mean_nll


def sft(model, samples, masks, args, seed, utility=(), combine=None):
    """Supervised tuning of the elements in `masks` (engine.heads.trained_masks), of nothing else.

    samples: list of Sample; args: the flags steps, batch_size (samples a step), learning_rate,
    weight_decay, max_grad_norm and max_tokens_per_batch; seed: of the order of the samples;
    utility, combine: other samples, and what makes one of their gradients and those of `samples`:
    a function of two dicts name -> tensor that returns a third.
    Yields (step, mean NLL of its batch) after every step. AdamW with betas 0.9 and 0.95.
    """
    model.requires_grad_(False)
    trained = {name: p.requires_grad_() for name, p in model.named_parameters() if name in masks}
    partly = [name for name, mask in masks.items() if not mask.all()]
    start = {name: trained[name].detach().clone() for name in partly}
    group = {"params": list(trained.values())}  # may be empty, when all heads are skipped
    optimizer = torch.optim.AdamW(
        [group], args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay
    )
    max_tokens = args.max_tokens_per_batch
    for step in range(args.steps):
        chosen = tasks.take(samples, step * args.batch_size, args.batch_size, seed)
        gradients, mean_nll = masked_gradients(model, chosen, trained, masks, max_tokens)
        if combine is not None:
            others = tasks.take(utility, step * args.batch_size, args.batch_size, seed)
            of_others, _ = masked_gradients(model, others, trained, masks, max_tokens)
            gradients = combine(gradients, of_others)
        for name, p in trained.items():
            p.grad = gradients[name]
        torch.nn.utils.clip_grad_norm_(trained.values(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name in partly:  # decay and momentum know nothing of masks
                trained[name].copy_(torch.where(masks[name], trained[name], start[name]))
        yield step + 1, mean_nll
    model.requires_grad_(True)


# --------------------------------------------------------------------------------------------------
# Judging


def complete_greedily(model, tokenizer, samples, args):
    """The most likely completions of the samples' prompts, as Samples with their texts.

    args: the flags max_completion_length and max_tokens_per_batch.
    """
    longest = max(len(s.prompt_ids) for s in samples) + args.max_completion_length
    rows = max(1, args.max_tokens_per_batch // longest)
    completed = []
    starts = range(0, len(samples), rows)
    for start in tqdm(starts, desc="answers", leave=False, disable=None, delay=5):
        completed += sample(
            model,
            [s.prompt_ids for s in samples[start : start + rows]],
            1,
            max_completion_length=args.max_completion_length,
            temperature=0,
            stop_ids=stop_token_ids(model, tokenizer),
            generator=torch.Generator(),
        )
    for s in completed:
        s.text = tokenizer.decode(s.completion_ids, skip_special_tokens=True)
    return completed


def word_f1(text, reference):
    """How much two texts have in common: the F1 of their words, each as often as it stands there.

    It is 1 where they have the same words, 0 where they share none (SQuAD, Rajpurkar et al. 2016).
    """
    words, wanted = text.lower().split(), reference.lower().split()
    common = (Counter(words) & Counter(wanted)).total()
    if not words or not wanted:
        return float(words == wanted)
    return 2 * common / (len(words) + len(wanted))


@dataclass
class Judged:
    """How a model does on a set. Prompts without a response count in `texts` only."""

    texts: list  # greedy completions
    right: list  # whether each of them is the response, word for word
    word_f1: list  # of each of them with the response
    nll: float  # of the responses, summed
    tokens: int  # of the responses


def judge(model, tokenizer, samples, args):
    """The Judged of a model and a list of Sample. args: the flags, see complete_greedily."""
    texts = [s.text for s in complete_greedily(model, tokenizer, samples, args)]
    right = []
    overlap = []
    known = []
    for s, text in zip(samples, texts):
        if s.problem["response"]:
            known.append(s)
            right.append(text.strip() == s.problem["response"].strip())
            overlap.append(word_f1(text, s.problem["response"]))
    total = nll(model, known, args.max_tokens_per_batch).sum().item()
    return Judged(texts, right, overlap, total, sum(len(s.completion_ids) for s in known))


def evaluate(model, tokenizer, sets, args):
    """Everything that is reported of a model, as a dict of floats. All of it is held out.

    refusal: the share of harmful prompts that are refused. It is not an attack success rate;
    over_refusal: the same of benign prompts;
    *_degenerate: the share of completions that are empty or degenerate;
    safety_nll: the mean NLL a token of the safe responses to harmful prompts;
    offtopic_*: on prompts that request nothing; total_*: on those and on benign requests;
    *_accuracy: the share of prompts whose greedy completion is the response, word for word;
    offtopic_word_f1: how many words they share. For free text look at this and at the nll.
    """
    harmful = judge(model, tokenizer, sets.harmful, args)
    benign = judge(model, tokenizer, sets.benign, args)
    offtopic = judge(model, tokenizer, sets.offtopic, args)
    return {
        "refusal": fmean(map(is_refusal, harmful.texts)),
        "refusal_degenerate": fmean(map(is_degenerate, harmful.texts)),
        "over_refusal": fmean(map(is_refusal, benign.texts)),
        "over_refusal_degenerate": fmean(map(is_degenerate, benign.texts)),
        "safety_nll": harmful.nll / harmful.tokens,
        "offtopic_accuracy": fmean(offtopic.right),
        "offtopic_word_f1": fmean(offtopic.word_f1),
        "offtopic_nll": offtopic.nll / offtopic.tokens,
        "total_accuracy": fmean(offtopic.right + benign.right),
        "total_nll": (offtopic.nll + benign.nll) / (offtopic.tokens + benign.tokens),
    }


# --------------------------------------------------------------------------------------------------
# The commands


def run_diagnose(args, model, tokenizer, heads):
    """--diagnose: writes conflict_map.json and .png to --output-dir, prints the top heads."""
    sets = load_sets(args, model, tokenizer, args.seed)
    safe = sets.safe[: args.examples]  # the rest is for tuning
    if os.path.isdir(args.output_dir):  # is it in use? Now, and not after hours
        open_shared_dir(args.output_dir)
    found = diagnose(model, safe, sets.util, heads, args)
    if not found.map.C.isfinite().all():
        raise UserError("gradients or losses of this model are not finite, so there is no map")
    content = map_content(args, model, safe, sets.util, found)
    order = ranked(content["C"])
    skipped = order[: number_skipped(args, heads)]
    directory = open_shared_dir(args.output_dir)
    draw_map(content, skipped, directory / "conflict_map.png")
    write_json(directory / "conflict_map.json", content)

    print(f"safety set: {args.safety_data}, {len(safe)} examples, loss {found.safe_loss:.4f}")
    print(
        f"utility set: {args.utility_data}, {len(sets.util)} examples, loss {found.util_loss:.4f}"
    )
    print("\n layer  head       O         S       C")
    for layer, head in order[:10]:
        O = found.map.O[layer, head]
        S = found.map.S[layer, head]
        C = found.map.C[layer, head]
        print(f"{layer:6d}{head:6d}{O:8.3f}{S:10.5f}{C:8.3f}")
    stability = ", ".join(f"{name} {value:.2f}" for name, value in found.stability.items())
    print(f"\nrank correlation between two halves of the data: {stability}")
    if content["mask_gate_spearman"] is not None:
        agreement = content["mask_gate_spearman"]
        print(f"rank correlation of S by masking and S by gates: {agreement:.2f}")
    print(
        f"{directory}/conflict_map.json and .png are written; "
        f"--tune --skip {args.skip} skips the top {len(skipped)} of {len(order)}"
    )


def run_tune(args, model, tokenizer, heads):
    """--tune: safety-tunes `model` in place by the map in --output-dir.

    Writes tuned/ there, a model with its numbers in tune.json, prints before and after. Raises
    UserError when the map is missing or of another model, and when the weights are not finite in
    the end, and RuntimeError if a frozen element moved. Then tuned/ is as it was.
    """
    directory = Path(args.output_dir)
    target = directory / "tuned"
    content = read_map(directory / "conflict_map.json", model)
    scores = scores_of(directory / "conflict_map.json", content, heads.shape)
    open_shared_dir(directory)
    own = settings_of(target).get("script") == "cast" and not target.is_symlink()
    if os.path.lexists(target) and not own:
        raise UserError(f"{target} is not of cast.py, so it is not replaced: move it away")
    for key in ("seed", "safety_data", "train_kv"):
        if content.get(key) != getattr(args, key):
            print(f"note: the map was made with another --{key.replace('_', '-')}")
    sets = load_sets(args, model, tokenizer, args.seed)
    skipped = ranked(scores)[: number_skipped(args, heads)]
    masks = trained_masks(model, heads, set(skipped), args.trainable, args.train_kv)
    start = weights_of(model)
    before = evaluate(model, tokenizer, sets, args)
    moving = sum(int(mask.sum()) for mask in masks.values())
    print(
        f"tuning {moving:,} of {sum(p.numel() for p in start.values()):,} parameters "
        f"on {len(sets.safe)} safe responses; {len(skipped)} of {len(heads.all)} heads are skipped"
    )
    steps = sft(model, sets.safe, masks, args, args.seed)
    bar = tqdm(steps, total=args.steps, desc="tune", disable=None)
    for _, loss in bar:
        bar.set_postfix(loss=f"{loss:.4f}")
    check_finite(model, f"after {args.steps} steps, nothing is saved: lower --learning-rate")
    update = update_of(model, start, masks)
    if not update.frozen_identical:
        raise RuntimeError("a frozen element moved: nothing is saved")
    after = evaluate(model, tokenizer, sets, args)
    if not all(map(math.isfinite, after.values())):
        raise UserError(
            f"after {args.steps} steps the losses are not finite, nothing is saved: lower "
            "--learning-rate or --weight-decay"
        )
    report = {
        "flags": vars(args),
        "skipped": sorted(skipped),
        "update_norm": update.norm,
        "frozen_elements": update.frozen_elements,
        "frozen_bit_identical": update.frozen_identical,
        "before": before,
        "after": after,
    }
    began = {"script": "cast", "embedded": is_embedded(args.model)}  # for tuned/ as a --model
    with replacing(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "args.json", {**vars(args), **began})
        write_json(folder / "tune.json", report)

    print(f"\n{'held out':<26}{'before':>9}{'after':>9}")
    for key in before:
        print(f"{key.replace('_', ' '):<26}{before[key]:9.4f}{after[key]:9.4f}")
    print(
        f"\nall {update.frozen_elements:,} frozen elements are bit-identical to the start; "
        f"update norm {update.norm:.3f}, last loss {loss:.4f}"
    )
    print(f"the tuned model is in {target}, with these numbers in its tune.json")


# --------------------------------------------------------------------------------------------------
# Flags

TINY = dict(  # defaults for the embedded model
    learning_rate=1e-3,
    steps=32,
    batch_size=28,
    max_completion_length=24,
    max_tokens_per_batch=16384,
    examples=1000,
    mask_examples=0,
)


def two_or_more(text):
    """An int of at least 2."""
    return number(text, int, 2)


def build_parser():
    """The flags, with the defaults for real models."""
    parser = argparse.ArgumentParser(
        prog="cast.py",
        description="Find the heads where safety and utility pull apart, and tune the others.",
        usage="cast.py --diagnose | --tune | --compare [flags]",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--diagnose", action="store_true", help="measure every head; writes conflict_map.json")
    flag("--tune", action="store_true", help="tune the heads that the map does not skip")
    flag("--compare", action="store_true", help="other ways to skip; more in --compare --help")
    flag("--model", default="tiny", help="a directory or a hub id; tiny is the embedded model")
    flag("--safety-data", default="embedded", help="or pku-saferlhf, llm-lat, jbb, a file")
    flag("--utility-data", default="embedded", help="or alpaca, gsm8k, mmlu, a file")
    flag("--benign-data", default="embedded", help="or jbb-benign, xstest, a file: not to refuse")
    flag("--harmful-data", help="prompts to judge safety by; not given: a part of --safety-data")
    flag(
        "--own-answers", action="store_true", help="utility: the model's own answers before tuning"
    )
    flag("--judge-examples", type=non_negative_int, default=0, help="to judge by; 0: --examples")
    flag("--output-dir", type=folder, default="runs/cast", help="of the map and of tuned/")
    flag("--sensitivity", default="mask", choices=["mask", "gate"], help="how S is measured")
    flag("--mask-examples", type=non_negative_int, default=32, help="for masking; 0: all examples")
    flag("--examples", type=two_or_more, default=128, help="at most so many of each set")
    flag("--skip", type=share, default=0.3, help="share of all heads: those of the highest C")
    flag("--trainable", default="heads", choices=["heads", "all"], help="all: the MLPs etc. too")
    flag("--train-kv", action="store_true", help="K and V belong to the heads of their group")
    flag("--steps", type=positive_int, default=100, help="optimizer steps")
    flag("--batch-size", type=positive_int, default=16, help="examples a step")
    flag("--learning-rate", type=positive_float, default=2e-5, help="AdamW's, constant")
    flag("--weight-decay", type=non_negative_float, default=0.0, help="AdamW's")
    flag("--max-grad-norm", type=positive_float, default=1.0, help="gradients are clipped to it")
    flag("--max-tokens-per-batch", type=positive_int, default=1024, help="lower it to save memory")
    flag("--max-length", type=positive_int, default=512, help="tokens; longer pairs are left out")
    flag("--max-completion-length", type=positive_int, default=64, help="tokens that are judged")
    add_prompt_flags(parser, examples=False)
    add_machine_flags(parser)
    return parser


def parse_args(argv=None, parser=None, embedded=TINY):
    """The flags. Raises UserError on what cannot work.

    argv: list of texts, by default the command line's; parser: of build_parser, by default a new
    one; embedded: the defaults for the embedded model.
    """
    parser = parser or build_parser()
    first_look = argparse.ArgumentParser(add_help=False)
    first_look.add_argument("--model", default="tiny")
    if is_embedded(first_look.parse_known_args(argv)[0].model):
        parser.set_defaults(**embedded)
    args = parser.parse_args(argv)
    if not (args.diagnose or args.tune or args.compare):
        raise UserError("say what to do: --diagnose, --tune or --compare (--help explains them)")
    check_writable(args.output_dir)
    return args


def prepare(args):
    """The model, its tokenizer and its heads. Lowers --max-length to what the model can take.

    Raises UserError for a model that cannot be had, whose heads are not known, or that rollout.py
    cannot get right.
    """
    device = pick_device(args.device)
    name = resolve_model(args.model)
    tokenizer = load_tokenizer(name)
    model = load_model(name, device)
    heads = find_heads(model)
    check_positions(model, args.max_completion_length + 1)
    args.max_length = min(args.max_length, positions_of(model) - args.max_completion_length)
    check_model(model, args.max_length + args.max_completion_length)
    set_threads(model, device, args.threads)
    return model, tokenizer, heads


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--compare" in argv:
        # The experiment imports this file. So it is not imported here but run, with the same flags.
        sys.argv = ["cast.py", *argv]
        runpy.run_module("experiments.cast_compare", run_name="__main__")
        return
    args = parse_args(argv)
    started = time.time()
    model, tokenizer, heads = prepare(args)
    for wanted, command in ((args.diagnose, run_diagnose), (args.tune, run_tune)):
        if wanted:
            command(args, model, tokenizer, heads)
            memory = peak_memory_gb(model.device)
            print(f"{time.time() - started:.0f} s, {memory:.1f} GB at most")


if __name__ == "__main__":
    run_script(main, "cast.py")
