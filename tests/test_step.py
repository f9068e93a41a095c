"""Whole steps of train.py against the same steps done plainly: a row alone, loops, float64, SGD.

`plain_steps` takes from train.py nothing but the completions that were drawn. It judges them,
filters or refills, makes advantages, old log-probs, every epoch and every mini-batch, and writes
the objectives down as README.md has them. Plain SGD stands in place of AdamW on both sides: AdamW
divides by the size of the gradient, and so makes as much of its rounding as of the gradient.
"""

import copy
import functools
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import tasks
import train
from tests.conftest import ROOT, build_checkpoint

GIVEN = dict(  # in every run
    num_prompts=6,
    num_generations=4,
    steps_per_generation=3,
    num_iterations=2,
    max_completion_length=24,
    learning_rate=0.02,
    max_grad_norm=1e6,
    steps=1,
)
DEFAULTS = dict(  # written down once more: a flag that a case does not name has this value
    seed=0,
    temperature=1.0,
    reward_scale="unit",
    overlong_cache=0,
    max_sampling_rounds=10,
)
OF_ALGORITHM = {
    "grpo": dict(epsilon=0.2, epsilon_high=0.2, beta=0, dynamic_sampling="off", overlong="none"),
    "dapo": dict(epsilon=0.2, epsilon_high=0.28, dynamic_sampling="refill", overlong="soft"),
    "tepo": dict(
        epsilon=0.02,  # for the embedded model; 0.2 and 0.28 for others
        epsilon_high=0.028,
        beta=0.001,
        kl_mask="positive",
        entropy_change="exact",
        dynamic_sampling="filter",
        overlong="none",
    ),
}
ON_CPU = ["--threads", "1", "--device", "cpu", "--save-steps", "0"]

# Sums of four digits: an answer with all its steps has 17 to 21 tokens, a lazy one as few as 4.
SUMS_TASK = """
from tasks import arithmetic
from tasks.arithmetic import reward


def load(split):
    return [p for p in arithmetic.problems(split, 300) if p["prompt"].count("+") == 3]
"""
LENGTH_REWARD = """

def reward(problem, text):
    return len(text) / 20
"""
# A random model never gets a sum right. A reward for the parity of the length has both verdicts.
PARITY_TASK = """
def load(split):
    return [{"prompt": f"Write {number}.", "answer": ""} for number in range(40)]


def reward(problem, text):
    return float(len(text) % 2)
"""


@dataclass
class Drawn:
    """A completion as train.py drew it, and what the plain steps make of it."""

    prompt_ids: list
    completion_ids: list
    logp: list
    right: float = 0.0
    reward: float = 0.0
    truncated: bool = False
    advantage: float = 0.0
    old_logp: torch.Tensor | None = None  # [n]
    old_entropy: torch.Tensor | None = None  # [n]
    ref_logp: torch.Tensor | None = None  # [n]


# --------------------------------------------------------------------------------------------------
# The plain steps


def numbers_of(model, s, temperature):
    """Log-probs [n], with gradient, and entropies [n] of a completion's tokens, its row alone."""
    ids = torch.tensor([s.prompt_ids + s.completion_ids])
    logits = model(input_ids=ids).logits[0, len(s.prompt_ids) - 1 : -1].double()
    every = torch.log_softmax(logits / temperature, dim=-1)  # [n, V]
    own = every.gather(1, torch.tensor([s.completion_ids]).T).squeeze(1)
    return own, -(every.exp() * every).sum(dim=-1).detach()


def judge(s, flags, tokenizer, is_right, stops):
    """Fills in whether a completion is right, whether it is cut off, and its reward."""
    prompt = tokenizer.decode(s.prompt_ids, skip_special_tokens=True)
    s.right = float(is_right(prompt, tokenizer.decode(s.completion_ids, skip_special_tokens=True)))
    s.truncated = s.completion_ids[-1] not in stops
    s.reward = s.right if flags.reward_scale == "unit" else 2 * s.right - 1
    if flags.overlong == "soft":
        limit = flags.max_completion_length
        cache = flags.overlong_cache or limit // 5
        over = len(s.completion_ids) - (limit - cache)
        s.reward -= min(max(over / cache, 0.0), 1.0)


def is_mixed(group):
    """Whether its verdicts differ. Its rewards may differ by their lengths alone."""
    return len({s.right for s in group}) > 1


def groups_of_a_step(flags, take_round):
    """The groups to train on, and all that were drawn. take_round: gives the groups of a round."""
    sampled = take_round()
    mixed = [group for group in sampled if is_mixed(group)]
    if flags.dynamic_sampling == "off":
        return sampled, sampled
    rounds = 1
    while flags.dynamic_sampling == "refill" and len(mixed) < flags.num_prompts:
        if rounds == flags.max_sampling_rounds:
            break
        fresh = take_round()
        sampled = sampled + fresh
        mixed += [group for group in fresh if is_mixed(group)]
        rounds += 1
    return mixed[: flags.num_prompts], sampled


def objective(s, logp, entropy, flags, mini, seen):
    """What a completion adds to J, and to the counts in `seen`. mini: its mini-batch."""
    A = s.advantage
    lengths = [len(other.completion_ids) for other in mini]
    change = logp - s.old_logp
    ratio = change.exp()
    if flags.algo == "tepo":
        ratio = change.mean().exp().expand_as(change)
    clipped = ratio.clamp(1 - flags.epsilon, 1 + flags.epsilon_high)
    per_token = torch.minimum(ratio * A, clipped * A)

    # The KL term of GRPO is to the initial model, on all tokens; TEPO's to the old policy, on some.
    anchor = s.ref_logp if flags.algo == "grpo" and flags.beta else s.old_logp
    kl = (anchor - logp).exp() - 1 - (anchor - logp)
    carries = torch.zeros_like(kl, dtype=torch.bool)
    if flags.algo == "grpo" and flags.beta:
        carries = ~carries
    if flags.algo == "tepo":
        dH = entropy - s.old_entropy
        if flags.entropy_change == "covariance":
            mean_logp = sum(other.old_logp.sum() for other in mini) / sum(lengths)
            mean_A = sum(other.advantage * n for other, n in zip(mini, lengths)) / sum(lengths)
            dH = -(logp.detach() - mean_logp) * (A - mean_A)
            seen["A_below_mean"] += 0 < A < mean_A or mean_A < A < 0
        if flags.kl_mask in ("positive", "both") and A > 0:
            carries = dH < 0
        if flags.kl_mask in ("negative", "both") and A < 0:
            carries = dH > 0
        if flags.kl_mask == "all":
            carries = torch.ones_like(carries)
    if flags.algo != "dapo":
        per_token = per_token - flags.beta * kl * carries

    seen["tokens"] += len(logp)
    seen["low"] += int((ratio < 1 - flags.epsilon).sum()) if A < 0 else 0
    seen["high"] += int((ratio > 1 + flags.epsilon_high).sum()) if A > 0 else 0
    seen["deviation"] = max(seen["deviation"], (ratio - 1).abs().max().item())
    seen["M"] += int(carries.sum())
    seen["not_M"] += int((~carries).sum()) if A > 0 else 0
    seen["kl"] += kl.sum().item()
    seen["entropy"] += entropy.sum().item()
    if flags.algo == "grpo":
        return per_token.mean() / len(mini)
    return per_token.sum() / sum(lengths)


def plain_step(model, reference, flags, take_round, seen):
    """One step, in place. Returns what train.py should log of it."""
    groups, sampled = groups_of_a_step(flags, take_round)
    for group in groups:
        rewards = [s.reward for s in group]
        for s in group:
            if len(set(rewards)) > 1:
                s.advantage = (s.reward - fmean(rewards)) / (stdev(rewards) + 1e-6)
    count = math.ceil(len(groups) * flags.steps_per_generation / flags.num_prompts)
    cuts = [i * len(groups) // count for i in range(count + 1)] if count else []
    minis = [[s for group in groups[a:b] for s in group] for a, b in zip(cuts, cuts[1:])]
    if flags.overlong == "filter":
        minis = [[s for s in mini if not s.truncated] for mini in minis]
    minis = [mini for mini in minis if mini]
    with torch.no_grad():
        for s in (s for mini in minis for s in mini):
            s.old_logp, s.old_entropy = numbers_of(model, s, flags.temperature)
            if flags.algo == "grpo" and flags.beta:
                s.ref_logp, _ = numbers_of(reference, s, flags.temperature)
            assert s.old_logp.tolist() == pytest.approx(s.logp, abs=1e-3)  # the sampler's

    start = Counter(seen)
    seen["deviation"] = 0.0
    norms = []
    for mini in minis * flags.num_iterations:
        model.zero_grad()
        for s in mini:
            logp, entropy = numbers_of(model, s, flags.temperature)
            (-objective(s, logp, entropy, flags, mini, seen)).backward()
        parameters = list(model.parameters())
        norms.append(math.sqrt(sum(p.grad.pow(2).sum().item() for p in parameters)))
        scale = min(1.0, flags.max_grad_norm / (norms[-1] + 1e-6))
        seen["scaled_down"] += scale < 1
        with torch.no_grad():
            for p in parameters:
                p -= flags.learning_rate * scale * p.grad

    everyone = [s for group in sampled for s in group]
    equal_rewards = [len({s.reward for s in group}) == 1 for group in sampled]
    equal_verdicts = [not is_mixed(group) for group in sampled]
    only_lengths_differ = [a and not b for a, b in zip(equal_verdicts, equal_rewards)]
    seen["dropped"] += len(sampled) - len(groups)
    seen["truncated"] += sum(s.truncated for s in everyone)
    seen["right"] += sum(s.right for s in everyone)
    seen["punished"] += sum(s.reward not in (0.0, 1.0, -1.0) for s in everyone)
    seen["only_lengths_differ"] += sum(only_lengths_differ)
    seen["fewer_minis"] += len(minis) < flags.steps_per_generation
    seen["refilled"] += len(sampled) > flags.num_prompts
    row = {
        "reward": fmean(s.reward for s in everyone),
        "task_reward": fmean(s.right for s in everyone),
        "frac_reward_zero_std": fmean(equal_rewards),
        "completions/mean_length": fmean(len(s.completion_ids) for s in everyone),
        "completions/max_length": max(len(s.completion_ids) for s in everyone),
        "completions/clipped_ratio": fmean(s.truncated for s in everyone),
        "groups_trained": len(groups),
        "groups_sampled": len(sampled),
        "updates": len(norms),
        "grad_norm": fmean(norms) if norms else 0.0,
        "max_ratio_deviation": seen["deviation"] if norms else None,
    }
    names = {"clip_ratio/low": "low", "clip_ratio/high": "high", "kl_mask_fraction": "M"}
    for name, own in {**names, "kl": "kl", "entropy": "entropy"}.items():
        tokens = seen["tokens"] - start["tokens"]
        row[name] = (seen[own] - start[own]) / tokens if tokens else None
    return row


@functools.cache
def loaded(folder):
    """The model, in float64, and the tokenizer of a checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def plain_steps(folder, drawn, flags, problems, is_right):
    """All steps of a run. drawn: its completions, in order; problems: of its task.

    Returns the model, the rows to expect in metrics.jsonl, and a Counter of what has happened.
    """
    start, tokenizer = loaded(str(folder))
    model = copy.deepcopy(start)
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    seen = Counter()
    taken = 0  # problems
    G = flags.num_generations

    def take_round():
        nonlocal taken
        wanted = tasks.take(problems, taken, flags.num_prompts, flags.seed)
        groups = []
        for problem in wanted:
            group = drawn[taken * G : (taken + 1) * G]
            text, _ = tasks.prompts.render(problem, tokenizer)
            assert [s.prompt_ids for s in group] == [tokenizer(text).input_ids] * G
            for s in group:
                judge(s, flags, tokenizer, is_right, stops)
            groups.append(group)
            taken += 1
        return groups

    rows = [plain_step(model, start, flags, take_round, seen) for _ in range(flags.steps)]
    assert taken * G == len(drawn), "train.py has sampled another number of rounds"
    return model, rows, seen


# --------------------------------------------------------------------------------------------------
# The same by train.py


def run(monkeypatch, output_dir, flags, given):
    """train.py with SGD. Returns its rows, its weights, the completions, the collated batches."""
    drawn = []
    batches = []
    sample, collate = train.sample, train.collate

    def spied_sample(*arguments, **options):
        assert options["generator"].initial_seed() == flags.seed
        found = sample(*arguments, **options)
        drawn.extend(Drawn(s.prompt_ids, s.completion_ids, s.logp) for s in found)
        return found

    def spied_collate(*arguments):
        batches.append(collate(*arguments))
        return batches[-1]

    def sgd(parameters, lr, betas, weight_decay, fused):
        assert (betas, weight_decay) == ((0.9, 0.95), 0.0)
        return torch.optim.SGD(parameters, lr=lr)

    monkeypatch.setattr(train, "sample", spied_sample)
    monkeypatch.setattr(train, "collate", spied_collate)
    monkeypatch.setattr(torch.optim, "AdamW", sgd)
    monkeypatch.setattr(train, "plot_curves", lambda rows, path: None)  # half of the time
    argv = ["--algo", flags.algo, "--output-dir", str(output_dir), *ON_CPU]
    for name, value in given.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    rows = train.train(train.parse_args(argv))
    weights = load_file(Path(output_dir) / f"checkpoint-{flags.steps}" / "model.safetensors")
    return rows, weights, drawn, batches


def compare(monkeypatch, tmp_path, algo, changes, folder, problems, is_right, **own):
    """Runs a case both ways and compares. own: flags for train.py that change no step.

    Returns the Counter of what has happened.
    """
    flags = {"algo": algo, **GIVEN, **DEFAULTS, **OF_ALGORITHM[algo], **changes}
    flags = SimpleNamespace(**flags)
    given = {**GIVEN, **changes, **own}
    rows, weights, drawn, batches = run(monkeypatch, tmp_path / "run", flags, given)
    model, expected_rows, seen = plain_steps(folder, drawn, flags, problems, is_right)
    updates = sum(row["updates"] for row in rows)
    seen["micro"] = len(batches) * flags.num_iterations - updates

    start = loaded(str(folder))[0].named_parameters()
    moved = {name: (weights[name] - p.detach()).abs().max().item() for name, p in start}
    assert max(moved.values()) > 1e-3, "the step is too small to tell anything"
    for name, p in model.named_parameters():
        off = (weights[name].double() - p.detach()).abs().max().item()
        assert off < 1e-6, f"{name} is off by {off}, and has moved by {moved[name]}"
    for row, expected in zip(rows, expected_rows, strict=True):
        found = {name: row[name] for name in expected}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    return seen


def is_the_sum(prompt, text):
    """Whether a completion of the embedded task is right."""
    total = sum(map(int, prompt.rstrip("=").split("+")))
    return "#" in text and text.rpartition("#")[2].strip() == str(total)


def is_odd(prompt, text):
    """Whether a completion is of odd length."""
    return len(text) % 2 == 1


def length(prompt, text):
    """A reward that is not only 0 and 1."""
    return len(text) / 20


# Each case: the algorithm, what differs from the defaults, and what must have happened.
SOFT = dict(overlong="soft", max_completion_length=19, overlong_cache=12)
HARD = dict(overlong="filter", max_completion_length=19)
SMALL = dict(max_tokens_per_batch=60)
TWO = dict(steps=2, seed=1, num_iterations=1)
CASES = [
    ("grpo", dict(SMALL), "low high micro"),
    ("grpo", dict(epsilon=0.05, epsilon_high=0.1, max_grad_norm=0.5), "low high scaled_down"),
    ("grpo", dict(TWO, beta=0.3, temperature=0.7), "M"),
    ("grpo", dict(SOFT, dynamic_sampling="filter"), "punished only_lengths_differ dropped"),
    ("grpo", dict(SOFT, reward_scale="dapo", num_iterations=1), "punished only_lengths_differ"),
    ("grpo", dict(HARD, beta=0.1), "truncated M"),
    (
        "dapo",
        dict(SOFT, epsilon=0.01, epsilon_high=0.02, max_sampling_rounds=2),
        "refilled low high",
    ),
    ("dapo", dict(HARD, **SMALL, dynamic_sampling="filter"), "truncated dropped micro"),
    ("dapo", dict(TWO, reward_scale="dapo", temperature=1.2), "low high refilled"),
    ("tepo", {}, "low high M not_M dropped fewer_minis"),
    ("tepo", dict(epsilon=0.001, epsilon_high=0.003, beta=1.0), "low high M not_M"),
    ("tepo", dict(beta=1.0, kl_mask="none"), "not_M"),
    ("tepo", dict(beta=0.1, kl_mask="all"), "M"),
    ("tepo", dict(beta=1.0, kl_mask="negative"), "M not_M"),
    ("tepo", dict(SMALL, beta=1.0, kl_mask="both"), "M not_M micro"),
    ("tepo", dict(dynamic_sampling="refill", max_sampling_rounds=1, beta=0.3), "M fewer_minis"),
    ("tepo", dict(dynamic_sampling="off", steps_per_generation=6, num_iterations=1), "M not_M"),
    ("tepo", dict(TWO, **SOFT, temperature=0.8, rollout_batch_size=8), "M dropped"),
]


@pytest.mark.parametrize("algo, changes, needed", CASES)
def test_a_step_of_the_embedded_model(monkeypatch, tmp_path, algo, changes, needed):
    (tmp_path / "sums.py").write_text(SUMS_TASK)
    problems = tasks.load(str(tmp_path / "sums.py")).problems
    own = {"data": tmp_path / "sums.py"}
    seen = compare(monkeypatch, tmp_path, algo, changes, ROOT / "tiny", problems, is_the_sum, **own)
    assert all(seen[event] for event in needed.split()), f"not all of {needed}: {dict(seen)}"


def test_the_largest_gap_between_sampler_and_scorer_is_logged(monkeypatch, tmp_path):
    sample = train.sample

    def wrong_once(*arguments, **options):
        samples = sample(*arguments, **options)
        samples[5].logp[1] += 0.5
        return samples

    monkeypatch.setattr(train, "sample", wrong_once)
    (tmp_path / "sums.py").write_text(SUMS_TASK)
    argv = ["--algo", "grpo", "--num-prompts", "4", "--num-generations", "2", "--steps", "1"]
    argv += ["--data", str(tmp_path / "sums.py")]
    (row,) = train.train(train.parse_args([*argv, *ON_CPU, "--output-dir", str(tmp_path / "run")]))
    assert row["sampling_logp_difference"] == pytest.approx(0.5, abs=1e-3)


def test_the_covariance_is_centred_on_the_whole_mini_batch(monkeypatch, tmp_path):
    """A reward for length: so the mean advantage of a token is far above 0."""
    (tmp_path / "long.py").write_text(SUMS_TASK + LENGTH_REWARD)
    problems = tasks.load(str(tmp_path / "long.py")).problems
    own = {"data": tmp_path / "long.py"}
    changes = dict(SMALL, beta=1.0, entropy_change="covariance")
    seen = compare(monkeypatch, tmp_path, "tepo", changes, ROOT / "tiny", problems, length, **own)
    assert seen["A_below_mean"] and seen["micro"] and seen["M"] and seen["not_M"], dict(seen)


# gpt2 comes with dropout, gemma2 with a window shorter than its rows and a cap behind the LM head.
RANDOM = dict(max_completion_length=8, learning_rate=0.02)
FAMILIES = [
    ("gpt2", "grpo", dict(beta=0.2, epsilon=0.1, epsilon_high=0.1), "M low high"),
    ("gemma2", "tepo", dict(epsilon=0.01, epsilon_high=0.01, beta=0.5), "M not_M low high"),
]


@pytest.mark.parametrize("family, algo, changes, needed", FAMILIES)
def test_a_step_of_a_random_model(monkeypatch, tmp_path, family, algo, changes, needed):
    model = build_checkpoint(tmp_path / "model", family)
    (tmp_path / "parity.py").write_text(PARITY_TASK)
    problems = tasks.load(str(tmp_path / "parity.py")).problems
    own = {"model": model, "data": tmp_path / "parity.py"}
    changes = {**RANDOM, **changes}
    seen = compare(monkeypatch, tmp_path, algo, changes, model, problems, is_odd, **own)
    assert all(seen[event] for event in needed.split()), f"not all of {needed}: {dict(seen)}"
