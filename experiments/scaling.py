"""How the cost of a step grows: with completion tokens, samples, uneven lengths, the vocabulary.

    python -m experiments.scaling      # some minutes on two CPU cores; draws docs/scaling.png

A Llama shape of 25M parameters with random weights. Completions never end by themselves here, so
their lengths are those that are asked for. Seconds are medians of --repeats, taken in turns. Memory
is measured once for each vocabulary, in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from engine.files import new_figure, save_figure
from experiments.bench import memory_gb
from experiments.shapes import build_config
from rollout import Sample, collate, micro_batches, sample, score

ROOT = Path(__file__).resolve().parent.parent


def build(**changes):
    """The 20m shape with random weights, or with changes to its config."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(build_config("20m", **changes)).eval()


def draw(model, prompts, num_generations, length, prompt_length=72):
    """Completions of exactly `length` tokens."""
    return sample(
        model,
        [[1 + i] * prompt_length for i in range(prompts)],
        num_generations,
        max_completion_length=length,
        temperature=1.0,
        stop_ids=[-1],
        generator=torch.Generator().manual_seed(0),
    )


def learn(model, samples, max_tokens=1024, share_prompts=True):
    """Scores the samples twice, the second time with gradients: an epoch over a rollout."""
    for part in micro_batches(samples, max_tokens, share_prompts):
        batch = collate(part, "cpu", share_prompts)
        with torch.no_grad():
            old_logp, _ = score(model, batch, 1.0)
        logp, _ = score(model, batch, 1.0)
        (logp - old_logp).sum().backward()
    model.zero_grad()


def seconds(call):
    """The seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure_memory(vocabulary):
    """Prints the MB that scoring 480 and then 3,840 tokens with gradients takes (Linux)."""
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    model = build(vocab_size=vocabulary, num_attention_heads=1, num_key_value_heads=1, **small)
    peaks = []
    for count in (1, 8):
        samples = [Sample([1] * 32, [2] * 480) for _ in range(count)]
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        held = memory_gb("VmRSS")
        learn(model, samples, max_tokens=8192)
        peaks.append(1000 * (memory_gb("VmHWM") - held))
    print(json.dumps(peaks))


def measure_times(repeats):
    """Medians of all timings, as a dict from (what, phase, size) to seconds."""
    model = build()
    draw(model, 2, 4, 4)  # warm-up
    found = {}

    def add(key, value):
        found.setdefault(key, []).append(value)

    even = [replace(s, completion_ids=s.completion_ids[:40]) for s in draw(model, 8, 8, 40)]
    lengths = (4, 12, 24, 120)  # 40 on average
    uneven = []
    for i, s in enumerate(even):
        uneven.append(replace(s, completion_ids=(s.completion_ids * 3)[: lengths[i % 4]]))
    for _ in tqdm(range(repeats), disable=None):
        for length in (16, 32, 64, 96, 128):
            taken, samples = seconds(lambda length=length: draw(model, 4, 8, length))
            add(("completion tokens", "sample", 32 * length), taken)
            taken, _ = seconds(lambda samples=samples: learn(model, samples))
            add(("completion tokens", "score and update", 32 * length), taken)
        for count in (8, 16, 32, 48, 64):
            taken, samples = seconds(lambda count=count: draw(model, count // 8, 8, 48))
            add(("samples", "sample", count), taken)
            taken, _ = seconds(lambda samples=samples: learn(model, samples))
            add(("samples", "score and update", count), taken)
        add("even", seconds(lambda: learn(model, even))[0])
        add("uneven", seconds(lambda: learn(model, uneven))[0])
        add("apart", seconds(lambda: learn(model, even, share_prompts=False))[0])
        for group in (1, 4, 16):
            taken, _ = seconds(lambda group=group: draw(model, 4, group, 1, prompt_length=512))
            add(("prefill", group), taken)
    return {key: statistics.median(values) for key, values in found.items()}


def plot(times, path):
    """Draws the two series and their fitted lines, and prints the fits."""
    figure, axes = new_figure(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, what in zip(axes, ("completion tokens", "samples")):
        for phase, colour in (("sample", "tab:blue"), ("score and update", "tab:orange")):
            sizes = [key[2] for key in times if key[:2] == (what, phase)]
            values = [times[what, phase, size] for size in sizes]
            slope, start = statistics.linear_regression(sizes, values)
            explained = statistics.correlation(sizes, values) ** 2
            print(
                f"{phase:<17} by {what:<18} {start:6.2f} s + {1000 * slope:6.2f} ms for each, "
                f"R2 {explained:.3f}"
            )
            axis.plot(sizes, values, "o", color=colour, label=f"{phase} (R² {explained:.3f})")
            ends = [0, sizes[-1]]
            axis.plot(ends, [start + slope * end for end in ends], color=colour, linewidth=1)
        axis.set(xlabel=f"{what} of a step", ylabel="seconds", xlim=(0, None), ylim=(0, None))
        axis.legend()
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="of each timing (default: 3)")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    if args.child:
        measure_memory(args.child)
        return
    times = measure_times(args.repeats)
    plot(times, ROOT / "docs" / "scaling.png")
    print(f"2,560 completion tokens, scored and learnt from, all of 40: {times['even']:.2f} s")
    print(f"  completions of 4, 12, 24 and 120 tokens:                  {times['uneven']:.2f} s")
    print(f"  a row for each completion, no prompt shared:              {times['apart']:.2f} s")
    for group in (1, 4, 16):
        print(f"a prompt of 512 tokens, G = {group:>2}, one token: {times['prefill', group]:.2f} s")
    for vocabulary in (1000, 8000, 32000, 128000):
        command = [sys.executable, "-m", "experiments.scaling", "--child", str(vocabulary)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        few, many = json.loads(done.stdout.splitlines()[-1])
        logits = 3840 * vocabulary * 4 / 1e6
        print(
            f"vocabulary {vocabulary:>7,}: scoring with gradients takes {few:4.0f} MB for 480 "
            f"tokens, {many:4.0f} MB for 3,840; their logits alone are {logits:,.0f} MB"
        )


if __name__ == "__main__":
    main()
