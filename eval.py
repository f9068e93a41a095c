"""Evaluate a model: sample completions of held-out problems, judge them, and count.

    python eval.py                                 # the embedded model on the embedded task
    python eval.py --model runs/tepo-tiny-1        # a run of train.py (its last checkpoint)
    python eval.py --model DIR_OR_ID --data math500,aime24 --protocol tepo
    python eval.py --model DIR_OR_ID --data my_task.py
    python eval.py --model runs/cast/tuned --data arithmetic --refusal     # refusal rates too

A problem gets n samples. A sample is right when its reward is at least 1; c of the n are right.
The rewards of the known data sets are 0 and 1. Those of a Python file can be any numbers.

    avg@n   The mean reward, with its standard error. The error is taken over problems: samples of
            one problem are alike, and to count them as independent would make it too small.
    pass@k  The mean of 1 - C(n-c, k)/C(n, k), the chance that k of the samples hold a right one
            (Chen et al. 2021, unbiased).
    maj@n   The share of problems whose most frequent answer is right. Tied answers share the vote.
            There is none for a Python file without a function `answer`.

The sampler is that of training. A score means little without its prompt: results.json holds the
first prompt of each data set, the flags and the versions, and samples.jsonl holds every sample.
An interrupted evaluation goes on with --resume. --protocol tepo is Section 4.1 of the paper: 32
samples at temperature 0.6 for AIME and AMC, one greedy sample for the rest, 8192 tokens.
"""

import argparse
import json
import math
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from itertools import takewhile
from statistics import fmean, stdev

import torch
from tqdm import tqdm

import tasks
from engine import flags, models, runs
from engine.errors import UserError, reason, run_script
from engine.files import append_jsonl, fingerprint, read_jsonl, write_json, write_jsonl
from rollout import check_model, sample
from tasks import arithmetic, refusals, safety
from tasks.prompts import add_prompt_flags, encode, prompted, render

EMBEDDED = "harmful,benign"  # requests that come with the embedded model, for --refusal
REFUSAL_TOKENS = 64  # of an answer whose opening is judged, at most
COLUMNS = dict(  # of samples.jsonl
    data=str,
    problem=int,
    prompt=str,
    answer=str,
    completion=str,
    vote=str | None,
    length=int,
    truncated=bool,
    reward=int | float,
    right=bool,
)
MANY_SAMPLES = ("aime24", "aime25", "amc23", "amc")  # small sets: the paper takes 32 samples


# --------------------------------------------------------------------------------------------------
# Scores


def average(means):
    """avg@n and its standard error over problems (None for a single problem).

    means: list of the mean reward of each problem.
    """
    if len(means) < 2:
        return fmean(means), None
    return fmean(means), stdev(means) / math.sqrt(len(means))


def pass_at_k(counts, n, k):
    """The unbiased pass@k: the mean over problems of 1 - C(n-c, k)/C(n, k).

    counts: list of c, the right samples of each problem; n: samples of each.
    Raises ValueError unless 1 <= k <= n. Source: Chen et al. 2021, equation 1.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@k needs 1 <= k <= {n} samples, not {k}")
    return fmean(1 - math.comb(n - c, k) / math.comb(n, k) for c in counts)


def majority(votes, verdicts):
    """Whether the most frequent answer is right, in [0, 1]: tied answers share the vote.

    votes: list of the answer of each sample, None where there is none, which is never counted;
    verdicts: list of whether each is right.
    """
    times = Counter(vote for vote in votes if vote is not None)
    if not times:
        return 0.0
    most = max(times.values())
    return fmean(right for vote, right in zip(votes, verdicts) if times[vote] == most)


def summarise(rows, n, has_votes):
    """The results of one data set, as a dict.

    rows: its lines of samples.jsonl; n: samples of each problem; has_votes: whether the task says
    which answers are equal. If not, maj@n is None.
    """
    by_problem = {}
    for row in rows:
        by_problem.setdefault(row["problem"], []).append(row)
    groups = list(by_problem.values())
    counts = [sum(row["right"] for row in group) for group in groups]
    mean, error = average([fmean(row["reward"] for row in group) for group in groups])
    result = {"problems": len(groups), "samples": n, f"avg@{n}": mean, "stderr": error}
    powers_of_two = [2**i for i in range(n.bit_length())]
    for k in sorted({*powers_of_two, n}):
        result[f"pass@{k}"] = pass_at_k(counts, n, k)
    result[f"maj@{n}"] = None
    if has_votes:
        votes = [[row["vote"] for row in group] for group in groups]
        verdicts = [[row["right"] for row in group] for group in groups]
        result[f"maj@{n}"] = fmean(map(majority, votes, verdicts))
    result["mean_length"] = fmean(row["length"] for row in rows)
    result["truncated"] = fmean(row["truncated"] for row in rows)
    return result


def percent(value):
    """A share in percent, "-" for None."""
    return "-" if value is None else f"{100 * value:.2f}"


def print_table(results):
    """Prints a line for each data set. results: dict name -> see `summarise`."""
    width = max(13, *map(len, results)) + 1
    head = f"{'problems':>9}{'avg@n':>8}{'+-':>6}{'n':>5}{'pass@n':>8}{'maj@n':>8}{'length':>9}"
    print(f"{'data':<{width}}{head}{'truncated':>11}")
    means = []
    for name, r in results.items():
        n = r["samples"]
        means.append(r[f"avg@{n}"])
        line = f"{name:<{width}}{r['problems']:>9}{percent(means[-1]):>8}{percent(r['stderr']):>6}"
        line += f"{n:>5}{percent(r[f'pass@{n}']):>8}{percent(r[f'maj@{n}']):>8}"
        print(f"{line}{r['mean_length']:>9.1f}{100 * r['truncated']:>10.1f}%")
    if len(results) > 1:
        print(f"mean of the avg@n column: {percent(fmean(means))}")


# --------------------------------------------------------------------------------------------------
# Data sets, and samples of them


@dataclass
class DataSet:
    """A data set to evaluate on, and how it is sampled."""

    name: str
    task: tasks.Task
    problems: list[dict]  # with their prompt_ids
    num_samples: int  # of each problem
    temperature: float


def sampling_of(name, args):
    """How the data set of that name is sampled: a dict num_samples, temperature."""
    if args.protocol is None:
        return {"num_samples": args.num_samples, "temperature": args.temperature}
    if name.partition(":")[0] in MANY_SAMPLES:  # NAME, or NAME:PATH
        return {"num_samples": 32, "temperature": 0.6}
    return {"num_samples": 1, "temperature": 0.0}


def load_data_set(name, tokenizer, args):
    """The held-out problems of a name in --data, reported on the terminal. Raises UserError."""
    sampling = sampling_of(name, args)
    n = sampling["num_samples"]
    if args.batch_size < n:
        raise UserError(f"--batch-size must be at least {n}: a problem's samples are drawn at once")
    task = tasks.load(name, "test", args.data_root, args.judge_thoughts)
    problems = prompted(task.problems, tokenizer, args)
    problems = encode(problems, tokenizer, args.max_prompt_length)
    print(tasks.describe(task, problems, tokenizer, args.max_prompt_length))
    problems = problems[: args.limit or None]
    print(f"  {len(problems)} problems x {n} samples at temperature {sampling['temperature']}")
    return DataSet(name, task, problems, **sampling)


def complete(model, tokenizer, problems, n, max_completion_length, temperature, seed=0):
    """n samples of each problem, with their texts, those of a problem next to each other.

    problems: with prompt_ids; seed: of these samples. For the rest see rollout.sample.
    """
    samples = sample(
        model,
        [problem["prompt_ids"] for problem in problems],
        n,
        max_completion_length=max_completion_length,
        temperature=temperature,
        stop_ids=models.stop_token_ids(model, tokenizer),
        generator=torch.Generator().manual_seed(seed),
    )
    for s in samples:
        s.text = tokenizer.decode(s.completion_ids, skip_special_tokens=True)
    return samples


def judged(data_set, number, s, spellings):
    """A sample as a line of samples.jsonl.

    number: of its problem; s: the Sample; spellings: dict answer -> its text in the file. It is
    filled here. So equal answers (1 and 1.0) have the same text.
    """
    problem = data_set.problems[number]
    vote = None
    if data_set.task.answer is not None:
        vote = data_set.task.answer(problem, s.text)
    if vote is not None:
        vote = spellings.setdefault(vote, str(vote))
    reward = data_set.task.reward(problem, s.text)
    return {
        "data": data_set.name,
        "problem": number,
        "prompt": problem["prompt"],
        "answer": str(problem.get("answer", "")),
        "completion": s.text,
        "vote": vote,
        "length": len(s.completion_ids),
        "truncated": s.truncated,
        "reward": reward,
        "right": reward >= 1,
    }


def evaluate(model, tokenizer, data_set, args, done, path):
    """Samples and judges a data set. Appends a line a sample to `path` and returns all its lines.

    done: the lines that an interrupted run has finished. A batch of problems has a seed of its own,
    made of --seed, the name and its place, so a resumed run gives what an uninterrupted one gives.
    """
    n = data_set.num_samples
    size = args.batch_size // n  # problems at once
    rows = list(done)
    first = len(rows) // n
    total = len(data_set.problems)
    with tqdm(total=total, initial=first, desc=data_set.name, disable=None) as bar:
        for start in range(first, total, size):
            batch = data_set.problems[start : start + size]
            seed = zlib.crc32(f"{args.seed} {data_set.name} {start}".encode())
            length = args.max_completion_length
            samples = complete(model, tokenizer, batch, n, length, data_set.temperature, seed)
            spellings = {}
            new = [judged(data_set, start + i // n, s, spellings) for i, s in enumerate(samples)]
            append_jsonl(path, new)
            rows += new
            bar.update(len(batch))
    return rows


def is_row(row):
    """Whether a dict is a line of samples.jsonl, and not a damaged one."""
    return (
        row.keys() == COLUMNS.keys()
        and all(isinstance(row[column], kind) for column, kind in COLUMNS.items())
        and math.isfinite(row["reward"])
    )


def finished_rows(path, data_sets, batch_size):
    """The lines of an interrupted run up to the last whole batch, as a dict name -> lines.

    Cuts the rest off the file. batch_size: in samples.
    """
    rows = list(takewhile(is_row, read_jsonl(path)))
    finished = {}
    for data_set in data_sets:
        n = data_set.num_samples
        own = [row for row in rows if row["data"] == data_set.name]
        wrong = (i for i, row in enumerate(own) if row["problem"] != i // n)  # a line was lost
        own = own[: next(wrong, len(own))]
        if len(own) < n * len(data_set.problems):  # if not, the last batch may be a small one
            batch = batch_size // n * n
            own = own[: len(own) // batch * batch]
        finished[data_set.name] = own
    write_jsonl(path, [row for own in finished.values() for row in own])
    return finished


# --------------------------------------------------------------------------------------------------
# Refusal rates, and lm-evaluation-harness


def refusal_prompts(name, tokenizer, args):
    """The prompts of a name in --refusal, as problems with prompt_ids. Raises UserError.

    "harmful" and "benign" are the embedded requests; for the others see safety.load_pairs.
    """
    if name in ("harmful", "benign"):
        pairs = arithmetic.requests(harmful=name == "harmful")
    else:
        known = safety.PAIRS.get(name)
        kind = known.kind if known else "over-refusal"  # which needs no responses
        pairs, _ = safety.load_pairs(name, kind, root=args.data_root)
    # Worked examples of maths have no place before a request.
    asked = argparse.Namespace(**{**vars(args), "few_shot": None, "instruction": None})
    pairs = prompted(pairs[: args.limit or None], tokenizer, asked)
    return encode(pairs, tokenizer, args.max_prompt_length)


def refusal_length(tokenizer, args):
    """Tokens of an answer whose opening is judged. A thinking model gets all: it thinks first."""
    if "</think>" in str(tokenizer.chat_template or ""):
        return args.max_completion_length
    return min(REFUSAL_TOKENS, args.max_completion_length)


def refusal_rates(model, tokenizer, asked, args):
    """Refusal rates of greedy completions: a dict name -> prompts, refusal_rate, degenerate.

    asked: dict name -> problems. A refusal rate is not an attack success rate: it says how an
    answer opens, not what it would be worth.
    """
    length = refusal_length(tokenizer, args)
    rates = {}
    for name, problems in asked.items():
        texts = []
        for start in range(0, len(problems), args.batch_size):
            batch = problems[start : start + args.batch_size]
            texts += [s.text for s in complete(model, tokenizer, batch, 1, length, temperature=0)]
        opened = [problem.get("opened_thought", False) for problem in problems]
        refused = fmean(map(refusals.is_refusal, texts, opened))
        degenerate = fmean(map(refusals.is_degenerate, texts, opened))
        rates[name] = {"prompts": len(texts), "refusal_rate": refused, "degenerate": degenerate}
        print(
            f"{name}: refusal rate {100 * refused:.1f}% of {len(texts)} prompts, "
            f"{100 * degenerate:.1f}% empty or degenerate; e.g. {texts[0][:60]!r}"
        )
    return rates


def load_lm_eval():
    """simple_evaluate and HFLM of lm-evaluation-harness. Raises UserError without it."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise UserError("--lm-eval needs: pip install 'lm-eval[hf]==0.4.13'") from None
    return simple_evaluate, HFLM


def lm_eval_scores(model, tokenizer, args):
    """What the harness gives for the tasks of --lm-eval, as a dict. Raises UserError."""
    simple_evaluate, HFLM = load_lm_eval()
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=min(16, args.batch_size))
    names = args.lm_eval.split(",")
    try:
        scores = simple_evaluate(model=harness, tasks=names, limit=args.limit or None)["results"]
    except Exception as error:  # an unknown task, a data set out of reach: it raises all sorts
        raise UserError(
            f"--lm-eval {args.lm_eval}: {reason(error)}; all else is written"
        ) from error
    return json.loads(json.dumps(scores, default=str))


# --------------------------------------------------------------------------------------------------
# The script


def build_parser():
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage="python eval.py [--model DIR_OR_ID] [--data NAME,NAME,...] [flags]",
        formatter_class=flags.Formatter,
        allow_abbrev=False,
    )
    parser.set_defaults(script="eval")
    flag = parser.add_argument
    known = ", ".join(tasks.names("test"))
    usual = "arithmetic for the embedded model and what was trained from it, else math500"
    sets = "harmful, benign (embedded), jbb, jbb-benign, xstest or paths"
    limit = "8192, or half of the positions that the model has"
    positive = flags.positive_int
    flag("--model", default="tiny", help="a directory, a run of train.py, or a hub id")
    flag("--data", help=f"comma-separated: {known}, or paths (default: {usual})")
    flag("--num-samples", type=positive, default=8, help="samples of each problem")
    flag("--temperature", type=flags.non_negative_float, default=0.6, help="0 is greedy")
    flag("--protocol", choices=["tepo"], help="the paper's samples and temperatures by data set")
    flag("--max-completion-length", type=positive, help=f"in tokens (default: {limit})")
    flag("--max-prompt-length", type=positive, default=2048, help="longer ones are left out")
    flag("--batch-size", type=positive, default=256, help="completions sampled at once")
    flag(
        "--limit",
        type=flags.non_negative_int,
        default=0,
        help="only the first so many problems; 0: all",
    )
    flag("--judge-thoughts", action="store_true", help="an answer inside <think> counts, too")
    add_prompt_flags(parser)
    flag("--refusal", nargs="?", metavar="SETS", const=EMBEDDED, help=f"refusal rates on {sets}")
    flag("--lm-eval", metavar="TASKS", help="run these tasks of lm-evaluation-harness too")
    flags.add_run_flags(parser)
    flags.add_machine_flags(parser)
    return parser


def parse_args(argv=None):
    """The flags, with those of the run that is resumed. Raises UserError on what cannot work."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    saved = {}
    if args.resume:
        saved = flags.resumed_flags(args.output_dir, "eval")
        argv = [*flags.as_argv(parser, saved), *argv]
        args = parser.parse_args(argv)
    if args.protocol:
        parser.set_defaults(num_samples=None, temperature=None)  # None unless they are given
        args = parser.parse_args(argv)
        if (args.num_samples, args.temperature) != (None, None):
            raise UserError("--protocol sets --num-samples and --temperature: leave them out")
    elif args.temperature == 0 and args.num_samples > 1:
        n = args.num_samples
        raise UserError(f"at --temperature 0 all {n} samples are the same: use --num-samples 1")
    flags.check_unchanged(args, saved, free=("refusal", "lm_eval"))
    return args


def check_fit(model, tokenizer, data_sets, asked, args):
    """Sets --max-completion-length where it was not given. asked: see `refusal_rates`.

    Raises UserError for a model that has too few positions, whose tokenizer is another's, or that
    cannot be sampled right.
    """

    def longest(lists):
        return max((len(p["prompt_ids"]) for problems in lists for p in problems), default=0)

    prompt = longest(data_set.problems for data_set in data_sets)
    if args.max_completion_length is None:
        positions = models.positions_of(model)
        args.max_completion_length = max(1, min(8192, positions // 2, positions - prompt))
    answer = refusal_length(tokenizer, args)
    tokens = max(prompt + args.max_completion_length, longest(asked.values()) + answer)
    models.check_positions(model, tokens)
    for problems in [*(data_set.problems for data_set in data_sets), *asked.values()]:
        models.check_tokens(model, [problem["prompt_ids"] for problem in problems])
    models.stop_token_ids(model, tokenizer)  # a wrong one shows now
    check_model(model, tokens)


def main(argv=None):
    """One evaluation: see the top of this file. Returns a dict data set -> see `summarise`."""
    args = parse_args(argv)
    runs.check_output_dir(args)
    if args.data is None:
        args.data = "arithmetic" if runs.is_embedded(args.model) else "math500"
    device = models.pick_device(args.device)
    model_name = models.resolve_model(args.model)
    if args.lm_eval:
        load_lm_eval()  # now, and not after the sampling

    packages = ("torch", "transformers", "datasets", "math-verify")
    versions = {package: version(package) for package in packages}
    # Names are looked up before a large model is loaded, so that a wrong one ends the run at once.
    tokenizer = models.load_tokenizer(model_name)
    names = dict.fromkeys(re.split(r",(?![^\[]*\])", args.data))  # not inside of [1,2]
    data_sets = [load_data_set(name, tokenizer, args) for name in names]
    refusal_sets = filter(None, (args.refusal or "").split(","))
    asked = {name: refusal_prompts(name, tokenizer, args) for name in refusal_sets}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = models.load_model(model_name, device, dtype)
    check_fit(model, tokenizer, data_sets, asked, args)
    models.set_threads(model, device, args.threads)
    made_of = {f"problems of {d.name}": runs.digest_of(d.problems) for d in data_sets}
    made_of[f"weights of --model in {dtype}"] = fingerprint(model.named_parameters())
    args.checkpoint = model_name  # what --model has led to
    made_of["own code"] = runs.digest_of_code(*names)
    runs.check_same(args, made_of)
    directory = runs.open_output_dir(args, "eval")
    print(f"writing to {directory}")

    path = directory / "samples.jsonl"
    finished = finished_rows(path, data_sets, args.batch_size)
    results = {}
    for d in data_sets:
        rows = evaluate(model, tokenizer, d, args, finished[d.name], path)
        results[d.name] = summarise(rows, d.num_samples, d.task.answer is not None)
    print_table(results)

    record = {
        "results": results,
        "first_prompts": {d.name: render(d.problems[0], tokenizer)[0] for d in data_sets},
        "args": vars(args),
        "versions": versions,
    }
    write_json(directory / "results.json", record)  # before what may still fail
    if asked:
        record["refusal"] = refusal_rates(model, tokenizer, asked, args)
    if args.lm_eval:
        record["lm_eval"] = lm_eval_scores(model, tokenizer, args)
        print(json.dumps(record["lm_eval"], indent=1))
    write_json(directory / "results.json", record)
    print(f"results.json and samples.jsonl are in {directory}")
    return results


if __name__ == "__main__":
    run_script(main, "eval.py")
