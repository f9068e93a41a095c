"""What this project does on a GPU: bit widths, decoding, memory, a step beside TRL's, in one row.

    python -m experiments.gpu                              # some minutes on one CUDA GPU
    python -m experiments.gpu --shape tiny --device cpu    # the same at toy scale

Precision is that of train.py on a GPU, here on a CPU too: fp32 weights under bf16 autocast. A shape
has random weights, whose distributions are nearly flat, so log-probs are compared on the embedded
model as well, which was trained. What --minutes left no time for is null in the JSON. That is
written anew after each part, so that an interrupted run keeps what it has.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

import tasks
from engine import models, runs
from engine.errors import UserError, reason, run_script
from engine.files import write_json
from engine.flags import Formatter, non_negative_float
from experiments import bench
from experiments.shapes import build_config
from rollout import ROW_TOKENS, Sample, check_model, collate, sample, score

G = 8  # completions of a prompt
WORK = dict(max_completion_length=256, prompt_tokens=(48, 96), mean_length=128)
SCALES = {  # by --shape
    "tiny": dict(
        prompts=4,  # of which log-probs are compared
        length=24,  # of a completion, in tokens, at most
        rows=(8, 32),  # sampled at once
        tokens=ROW_TOKENS,  # of a pass of `learn`, and of the first one of `largest_batch`
        most_tokens=2 * ROW_TOKENS,  # where `largest_batch` ends
        work={"tiny": dict(num_prompts=4, max_completion_length=16)},  # of a step: see bench.WORK
    ),
    "qwen2.5-0.5b": dict(
        prompts=16,
        length=128,
        rows=(8, 64, 256),
        tokens=8 * ROW_TOKENS,
        most_tokens=256 * ROW_TOKENS,
        # TRL keeps the activations of a quarter of a step at once, and is to fit into 80 GB.
        work={
            "qwen2.5-0.5b": {"num_prompts": 16, **WORK},
            "qwen2.5-1.5b": {"num_prompts": 8, **WORK},
        },
    ),
}


def release():
    """Gives back the memory of a GPU that nobody holds: the next model needs it."""
    gc.collect()  # a model that recomputes activations is part of a circle of references
    torch.cuda.empty_cache()  # does nothing where there is no GPU


def load(name, device):
    """A model with fp32 weights, 64 prompts for it as lists of token ids, and its stop tokens.

    name: "tiny" for the embedded model and its sums, else a shape, for random weights and prompts.
    """
    release()
    if name == "tiny":
        folder = models.resolve_model(name)
        tokenizer = models.load_tokenizer(folder)
        model = models.load_model(folder, device)
        problems = tasks.load("arithmetic", "train").problems[:64]
        prompts = [tokenizer(problem["prompt"]).input_ids for problem in problems]
        return model, prompts, models.stop_token_ids(model, tokenizer)
    torch.manual_seed(0)
    with torch.device(device):  # where random weights take no time
        model = AutoModelForCausalLM.from_config(build_config(name), dtype=torch.float32).eval()
    ids = torch.randint(model.config.vocab_size, (64, 96)).tolist()
    return model, [row[: 48 + i % 48] for i, row in enumerate(ids)], [-1]


def precision(model, low, cache=True):
    """A context: bf16 autocast where `low`, else none. cache: see train.Run.autocast."""
    kind = model.device.type
    return torch.autocast(kind, torch.bfloat16, enabled=low, cache_enabled=cache)


def draw(model, prompts, stop_ids, length, low):
    """G completions of each prompt, of at most `length` tokens, as a list of Sample."""
    generator = torch.Generator().manual_seed(0)
    limits = dict(max_completion_length=length, temperature=1.0, stop_ids=stop_ids)
    with precision(model, low):
        return sample(model, prompts, G, generator=generator, **limits)


def scored(model, samples, low, gradient=False):
    """Log-probs of all completion tokens from rollout.score: [n], in nats, detached."""
    batch = collate(samples, model.device)
    with torch.set_grad_enabled(gradient), precision(model, low, cache=False):
        logp, _ = score(model, batch, temperature=1.0)  # [B, T]
    return logp.detach()[batch["mask"]]


def size(difference):
    """The largest and the mean absolute value of a tensor, as a dict of floats."""
    return {"max": difference.abs().max().item(), "mean": difference.abs().mean().item()}


def bits(name, device, scale):
    """Log-probs of the same samples under bf16 autocast less those in fp32: see `size`.

    "ratio" is the largest difference between two bf16 passes with and without gradient. train.py
    takes it for 0: then the first ratios of a rollout are 1.
    """
    model, prompts, stop_ids = load(name, device)
    samples = draw(model, prompts[: scale["prompts"]], stop_ids, scale["length"], low=False)
    low = scored(model, samples, low=True)  # [n]
    gap = size(low - scored(model, samples, low=False))
    return {**gap, "ratio": size(low - scored(model, samples, low=True, gradient=True))["max"]}


def sampler(name, device, scale):
    """Log-probs of rollout.sample less those of rollout.score, in both precisions: see `size`.

    In bf16 their maximum is sampling_logp_difference of train.py. "shared" is what
    rollout.check_model says on this device. It raises UserError when it finds the model wrong.
    """
    model, prompts, stop_ids = load(name, device)
    found = {"shared": check_model(model, longest=512)}
    for key, low in (("fp32", False), ("bf16", True)):
        samples = draw(model, prompts[: scale["prompts"]], stop_ids, scale["length"], low)
        sampled = torch.tensor([logp for s in samples for logp in s.logp], device=device)  # [n]
        found[key] = size(sampled - scored(model, samples, low))
    return found


def decode(name, device, scale):
    """Completion tokens a second of rollout.sample under autocast, prefill included, by rows."""
    model, prompts, stop_ids = load(name, device)
    draw(model, prompts[:1], stop_ids, 4, low=True)  # warm-up
    found = {}
    for rows in scale["rows"]:
        start = time.perf_counter()  # a rollout ends with lists: the clock waits for the GPU
        samples = draw(model, prompts[: rows // G], stop_ids, scale["length"], low=True)
        tokens = sum(len(s.completion_ids) for s in samples)
        found[f"{rows} rows"] = tokens / (time.perf_counter() - start)
    return found


def learn(model, tokens):
    """One forward and backward pass as train.py makes it. Gradients add up. Returns the seconds.

    tokens: of all rows. A row holds a prompt and seven completions of random tokens.
    """
    samples = []
    shape = (tokens // ROW_TOKENS, 8, ROW_TOKENS // 8)
    for row in torch.randint(model.config.vocab_size, shape).tolist():
        samples += [Sample(row[0], completion) for completion in row[1:]]
    batch = collate(samples, model.device)
    start = time.perf_counter()
    with precision(model, low=True, cache=False):
        logp, _ = score(model, batch, temperature=1.0)  # [B, T]
    logp.sum().backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_training(name, device, recompute):
    """A model after an update, so that gradients and AdamW's moments are there; the optimizer.

    recompute: whether with gradient checkpointing. The optimizer holds the moments: keep it.
    """
    model, _, _ = load(name, device)
    if recompute:
        models.recompute_activations(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    learn(model, ROW_TOKENS)
    optimizer.step()
    return model, optimizer


def one_pass(name, device, scale, recompute):
    """Seconds of a pass of `learn`; GB on the GPU before it and at its peak, None on a CPU."""
    model, optimizer = in_training(name, device, recompute)
    learn(model, scale["tokens"])  # warm-up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / 1e9 or None
    seconds = learn(model, scale["tokens"])
    peak = torch.cuda.max_memory_allocated() / 1e9 or None
    return {"tokens": scale["tokens"], "seconds": seconds, "GB before": before, "GB peak": peak}


def largest_batch(name, device, scale, recompute, end):
    """Doubles the tokens of `learn` up to the end of memory, of `most_tokens` or of the time.

    Returns the most tokens that fitted, and those that did not. None: there was no such pass.
    """
    model, optimizer = in_training(name, device, recompute)
    found = {"fits": None, "too large": None}
    tokens = scale["tokens"]
    while found["too large"] is None and tokens <= scale["most_tokens"] and time.monotonic() < end:
        try:
            learn(model, tokens)
            found["fits"] = tokens
        except torch.OutOfMemoryError:
            found["too large"] = tokens
        release()  # blocks of one size are in the way of another
        tokens *= 2
    return found


def beside_trl(device, scale, end):
    """A step of this project and of TRL on the same work, for each shape: see `run_engine`.

    TRL is None where it is not installed.
    """
    found = {}
    for shape, work in scale["work"].items():
        found[shape] = {"ours": None, "trl": None}
        if time.monotonic() > end:
            continue
        bench.WORK[shape] = work
        with tempfile.TemporaryDirectory() as folder:
            with torch.device(device):
                model, data = bench.prepare(shape, Path(folder))
            release()
            given = dict(shape=shape, work=work, device=device.type, model=model, data=data)
            found[shape]["ours"] = run_engine("ours", given, end)
            if find_spec("trl"):
                found[shape]["trl"] = run_engine("trl", given, end)
            else:
                print("trl is not installed (pip install trl==1.16.0): this project alone")
    return found


def run_engine(engine, given, end):
    """Runs an engine in a process of its own: a step that warms up and one that counts.

    engine: "ours" or "trl"; given: dict of shape, work, device, model and data, as bench takes
    them. Returns a dict of seconds, seconds for 1000 completion tokens (lengths differ), and GB
    above the model; or "failed" and why. None where time ran out.
    """
    settings = dict(steps=1, threads=torch.get_num_threads(), max_tokens_per_batch=8192, **given)
    child = json.dumps({"engine": engine, **settings})
    command = [sys.executable, "-m", "experiments.gpu", "--child", child]
    options = dict(cwd=bench.ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    left = max(0.0, end - time.monotonic())
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, **options)
    except subprocess.TimeoutExpired:
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        why = reason(done.stderr[-200:])
        print(f"{engine} failed: {why}")
        return {"failed": why}
    row = bench.summary([json.loads(lines[0].removeprefix("RESULT "))])
    return {"seconds": row["seconds"], "per 1k": row["per 1k tokens"], "GB": row["memory"]}


def run_child(settings):
    """What the process of an engine does: prints the result. settings: a namespace."""
    bench.WORK[settings.shape] = settings.work
    runs.save_checkpoint = lambda *arguments: None  # many GB, and no part of a step's time
    engine = {"ours": bench.ours, "trl": bench.trl}[settings.engine]
    with tempfile.TemporaryDirectory() as folder:
        print("RESULT " + json.dumps(engine(settings, Path(folder))))


def text(found, between="; "):
    """Numbers, and dicts of them, as the text of a cell."""
    if found is None:
        return "not measured"
    if isinstance(found, dict):
        if "failed" in found:
            return "failed"
        return between.join(f"{key} {text(value, ', ')}" for key, value in found.items())
    if isinstance(found, float):
        return f"{found:,.0f}" if found >= 100 else f"{found:.2g}"
    return f"{found:,}" if type(found) is int else str(found)


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=Formatter,
    )
    flag = parser.add_argument
    flag(
        "--shape", choices=SCALES, help="how much is measured; on a CPU the toy scale if not given"
    )
    flag("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to run")
    flag("--minutes", type=non_negative_float, default=8.0, help="no part begins after so many")
    flag("--output", default="runs/gpu.json", help="the JSON file")
    flag("--child", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.child:
        run_child(SimpleNamespace(**json.loads(args.child)))
        return
    end = time.monotonic() + 60 * args.minutes
    device = models.pick_device(args.device)
    shape = args.shape or ("tiny" if device.type == "cpu" else "qwen2.5-0.5b")
    scale = SCALES[shape]
    given = (shape, device, scale)
    names = dict.fromkeys(("tiny", shape))  # one, or two
    ways = {"off": False, "on": True}
    parts = {  # by the titles of their columns
        "bf16 less fp32": lambda: {name: bits(name, device, scale) for name in names},
        "sampler less scorer": lambda: {name: sampler(name, device, scale) for name in names},
        "decoded tokens a second": lambda: decode(*given),
        "a pass, by checkpointing": lambda: {way: one_pass(*given, ways[way]) for way in ways},
        "most tokens of a pass": lambda: {
            way: largest_batch(*given, ways[way], end) for way in ways
        },
        "a step beside TRL's": lambda: beside_trl(device, scale, end),
    }
    record = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper(),
        "shape": shape,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "trl": version("trl") if find_spec("trl") else "not installed",
        **dict.fromkeys(parts),
    }
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)  # if it cannot be written, this shows now
    for name, measure in parts.items():
        start = time.monotonic()
        if start < end:
            try:
                record[name] = measure()
            except Exception as error:  # the time of a GPU is dear: the other parts go on
                traceback.print_exc()
                record[name] = {"failed": reason(error)}
            write_json(path, record)
        print(f"{name}: {text(record[name])} ({time.monotonic() - start:.0f} s)", flush=True)
    print("\n| " + " | ".join(record) + " |")
    print("|---" * len(record) + "|")
    print("| " + " | ".join(map(text, record.values())) + " |")
    failed = [name for name in parts if "failed" in (record[name] or {})]
    if failed:
        raise UserError(f"failed, for the reasons above: {', '.join(failed)}")


if __name__ == "__main__":
    run_script(main, "gpu.py")
