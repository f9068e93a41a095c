"""How the cost of a step grows: with completion tokens and samples (fits), padding, vocabulary and group size.

    python experiments/scaling.py      # two or three minutes on two CPU cores; draws experiments/scaling.png

A Llama shape of 25M parameters with random weights. Completions never end by themselves here, so that their lengths are
what is asked for. Seconds are medians of --repeats, taken in turns; memory is measured once, in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def build(**changes):
    """The 20m shape, or with changes to its config."""
    import torch
    from transformers import AutoModelForCausalLM

    from experiments.shapes import build_config
    from products import use_fastest_product

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(build_config("20m", **changes))
    use_fastest_product(model)
    return model


def draw(model, prompts, num_generations, length, prompt_length=72):
    """Completions of exactly `length` tokens."""
    import torch

    from rollout import sample

    return sample(
        model, [[1 + i] * prompt_length for i in range(prompts)], num_generations, max_completion_length=length, temperature=1.0,
        stop_ids=[-1], generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def learn(model, samples, max_tokens=2048, share_prompts=True):
    """Scores the samples twice, the second time with gradients: a rollout's scoring and one update."""
    import torch

    from rollout import collate, micro_batches, score

    for packed in micro_batches(samples, max_tokens):
        batch = collate(packed, "cpu", share_prompts)
        with torch.no_grad():
            old_logp, _ = score(model, batch, 1.0)
        logp, _ = score(model, batch, 1.0)
        (logp - old_logp).sum().backward()
    model.zero_grad()


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def fit(x, y):
    """Least squares y = a + b x, and the share of y's variance that it explains."""
    b, a = statistics.linear_regression(x, y)
    return a, b, statistics.correlation(x, y) ** 2


def child(vocabulary):
    """Prints the MB that scoring 480 and then 3,840 tokens, with gradients, takes above the model (Linux)."""
    import torch

    from experiments.bench import resident_gb

    torch.set_num_threads(os.cpu_count())
    model = build(vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    samples = [{"prompt_ids": [1] * 32, "completion_ids": [2] * 480} for _ in range(8)]
    peaks = []
    for count in (1, 8):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident_gb()[0]
        learn(model, samples[:count], max_tokens=8192)
        peaks.append(1000 * (resident_gb()[1] - before))
    print(json.dumps(peaks))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each figure")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    import matplotlib
    import torch
    from tqdm import tqdm

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    torch.set_num_threads(os.cpu_count())
    model = build()
    draw(model, 2, 4, 4)  # warm-up
    lengths, counts = (16, 32, 64, 96, 128), (8, 16, 32, 48, 64)
    series = {
        "completion tokens": [(32 * n, lambda n=n: draw(model, 4, 8, n)) for n in lengths],
        "samples": [(n, lambda n=n: draw(model, n // 8, 8, 48)) for n in counts],
    }
    even = [s | {"completion_ids": s["completion_ids"][:40]} for s in draw(model, 8, 8, 40)]
    uneven = [s | {"completion_ids": (s["completion_ids"] * 8)[: (4, 12, 24, 120)[i % 4]]} for i, s in enumerate(even)]  # as many tokens
    seconds = {}
    for _ in tqdm(range(args.repeats), disable=None):
        for name, points in series.items():
            for x, call in points:
                samples = []
                seconds.setdefault((name, "sample", x), []).append(timed(lambda: samples.extend(call())))
                seconds.setdefault((name, "score and update", x), []).append(timed(lambda: learn(model, samples)))
        for name, samples in (("even", even), ("uneven", uneven)):
            seconds.setdefault(name, []).append(timed(lambda: learn(model, samples)))
        seconds.setdefault("apart", []).append(timed(lambda: learn(model, even, share_prompts=False)))
        for group in (1, 4, 16):
            seconds.setdefault(("prefill", group), []).append(timed(lambda: draw(model, 4, group, 1, prompt_length=512)))
    seconds = {key: statistics.median(values) for key, values in seconds.items()}

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, (name, points) in zip(axes, series.items()):
        x = [value for value, _ in points]
        for phase, colour in (("sample", "tab:blue"), ("score and update", "tab:orange")):
            y = [seconds[name, phase, value] for value in x]
            a, b, explained = fit(x, y)
            print(f"{phase:<17} {name:<18}: {a:6.3f} s + {1000 * b:7.3f} ms for each, R2 {explained:.4f}   ("
                  + ", ".join(f"{u}: {v:.2f} s" for u, v in zip(x, y)) + ")")  # fmt: skip
            axis.plot(x, y, "o", color=colour, label=f"{phase} (R² {explained:.3f})")
            axis.plot([0, x[-1]], [a, a + b * x[-1]], color=colour, linewidth=1)
        axis.set(xlabel=f"{name} of a step", ylabel="seconds", xlim=(0, None), ylim=(0, None), title=f"Cost by {name}")
        axis.legend()
    figure.tight_layout()
    path = Path(__file__).with_name("scaling.png")
    figure.savefig(path, dpi=110)
    print(f"padding: score and update of {sum(len(s['completion_ids']) for s in even):,} completion tokens, all of 40: {seconds['even']:.2f} s; "
          f"of 4, 12, 24 and 120: {seconds['uneven']:.2f} s")  # fmt: skip
    print(f"prompts of 72 tokens, completions of 40: score and update take {seconds['even']:.2f} s with a prompt once for its 8 completions, "
          f"{seconds['apart']:.2f} s with a copy for each")  # fmt: skip
    print("a prompt of 512 tokens, one token each for G samples: " + ", ".join(f"G = {g}: {seconds['prefill', g]:.2f} s" for g in (1, 4, 16)))
    for vocabulary in (1000, 8000, 32000, 128000):
        done = subprocess.run([sys.executable, __file__, "--child", str(vocabulary)], capture_output=True, text=True, check=True)
        few, many = json.loads(done.stdout.splitlines()[-1])
        print(f"vocabulary {vocabulary:>7,}: scoring and its gradients take {few:4.0f} MB for 480 tokens, {many:4.0f} MB for 3,840 "
              f"(their logits alone: {3840 * vocabulary * 4 / 1e6:,.0f} MB)")  # fmt: skip
    print(f"drawn: {path}")


if __name__ == "__main__":
    main()
