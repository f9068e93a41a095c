"""Time and memory of a training step, side by side with TRL's GRPOTrainer on the same work, and the machine's limit.

    python experiments/bench.py --shape 20m                  # both engines, interleaved (pip install trl==1.16.0)
    python experiments/bench.py --shape tiny --engine ours   # this project only

The same weights, prompts, group size, sampling, DAPO loss, updates per rollout and dtype. One engine a process, in turns, so
that a drifting machine slows both; the first step of each process is a warm-up. On random weights completions end because
one token in --mean-length counts as end-of-text: lengths are geometric, cut at --max-completion-length, as uneven as real
ones. The two engines draw different lengths, so seconds are also given for a thousand completion tokens.

Memory is the peak while training above what the process held when the model was loaded (so it has the gradients and AdamW's
moments). The limit is what the step cannot avoid over what this machine was just measured to do: FLOPs (2 a weight and token
forward, 4 backward, attention left out) over the rate of a large matrix product, the fastest that torch has; for a decode
step bytes (every weight, and the keys and values of its rows) over the rate of a large copy, where that is longer. A prompt counts
once for its group. A product of a few rows is slower than a large one, on any machine: so the products of the decoding are also timed
alone, row for row, and the share of the decoding that they are is its distance from the limit of its matrix work. On a CPU, what the
rest of the decoding goes to is given too.
"""

import argparse
import collections
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WORK = {  # prompts a rollout, tokens of a prompt (about), the longest completion, one end-of-text in so many tokens
    "tiny": dict(num_prompts=32, prompt_tokens=None, max_completion_length=48, mean_length=None),
    "20m": dict(num_prompts=8, prompt_tokens=(48, 96), max_completion_length=128, mean_length=64),
    "qwen2.5-0.5b": dict(num_prompts=4, prompt_tokens=(48, 96), max_completion_length=64, mean_length=32),
    "qwen2.5-1.5b": dict(num_prompts=64, prompt_tokens=(48, 96), max_completion_length=512, mean_length=256),
}


def prepare(args, folder):
    """Writes the checkpoint and the problems; both engines read the same files."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from experiments.shapes import build_config, build_tokenizer

    disable_progress_bar()
    work = WORK[args.shape]
    if args.shape == "tiny":
        return str(ROOT / "tiny"), "arithmetic"
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_config(build_config(args.shape)), build_tokenizer(chat_template=None)
    vocabulary = model.config.vocab_size
    model.generation_config.eos_token_id = list(range(0, vocabulary, work["mean_length"]))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    with (folder / "problems.jsonl").open("w") as file:
        for index in range(256):
            length = rng.randint(*work["prompt_tokens"]) - 30  # the instruction takes about 30
            text = f"{index} " + " ".join(str(rng.randint(0, 9)) for _ in range(length // 2))
            file.write(json.dumps({"problem": text, "answer": "1"}) + "\n")
    return str(folder / "model"), str(folder / "problems.jsonl")


def resident_gb():
    """What this process holds now, and the most it ever held, in GB: of the GPU's memory if it used any, else of the machine's (Linux)."""
    import torch

    if torch.cuda.is_initialized():
        return [torch.cuda.memory_allocated() / 1e9, torch.cuda.max_memory_allocated() / 1e9]
    status = Path("/proc/self/status").read_text()
    return [int(status.split(f"{key}:")[1].split()[0]) * 1024 / 1e9 for key in ("VmRSS", "VmHWM")]


def finish(device):
    """Waits for what a GPU still has to do; a CPU is done when a call returns."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def ours(args, folder):
    """`train.train`, as a user runs it; rollout.sample is watched from outside for the time of its first forward pass, the prefill."""
    import attention
    import models
    import rollout
    import train

    work = WORK[args.shape]
    flags = dict(
        algo="dapo", model=args.model, data=args.data, steps=args.steps + 1, num_prompts=work["num_prompts"], num_generations=8,
        max_completion_length=work["max_completion_length"], dynamic_sampling="off", overlong="none", device=args.device,
        threads=args.threads, steps_per_generation=4, learning_rate=1e-6, rollout_batch_size=512, output_dir=folder / "run",
    )  # fmt: skip
    argv = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    argv += ["--no-gradient-checkpointing"] + ["--compile"] * args.compile
    load_model, sample, before, laps, spent = models.load_model, rollout.sample, [], [], collections.Counter()

    def now():
        finish(args.device)
        return time.perf_counter()

    def watched_load(*arguments, **options):
        model = load_model(*arguments, **options)
        before.append(resident_gb()[0])
        return model

    def watch(module, name, kind):
        call = getattr(module, name)

        def watched(*arguments, **options):
            start = time.perf_counter()
            out = call(*arguments, **options)
            spent[kind] += time.perf_counter() - start
            return out

        setattr(module, name, watched)

    def watched_sample(model, *arguments, **options):
        prefilled, start = [], now()

        def first_pass(*_):
            prefilled.append(now())
            hook.remove()
            spent.clear()

        hook = model.register_forward_hook(first_pass)
        samples = sample(model, *arguments, **options)
        laps.append({"prefill": prefilled[0] - start, "decode": now() - prefilled[0], "prompts": [len(s["prompt_ids"]) for s in samples[::8]],
                     "lengths": [len(s["completion_ids"]) for s in samples], **spent})  # fmt: skip
        return samples

    if args.device == "cpu" and not args.compile:  # on a GPU a call is over before its work is done
        watch(attention, "attend", "attention")
        watch(rollout, "draw", "drawing")

    models.load_model, rollout.sample = watched_load, watched_sample
    rows = train.train(train.parse_args(argv))[1:]
    del laps[0]  # the warm-up; a rollout is one call of sample
    return {
        "before": before[0], "after": rows[-1]["peak_memory_gb"], "tokens": [sum(lap["lengths"]) for lap in laps],
        "seconds": [sum(row[f"seconds/{phase}"] for phase in ("sample", "score", "update")) for row in rows],
        "score": [row["seconds/score"] for row in rows], "update": [row["seconds/update"] for row in rows],
        **{key: [lap[key] for lap in laps] for key in laps[0]},
    }  # fmt: skip


def trl(args, folder):
    """GRPOTrainer with its transformers backend: DAPO loss, no KL, no gradient checkpointing, four updates a rollout.

    What it does beside generating (scoring, four updates) is given as update.
    """
    import datasets
    import torch
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import data
    from models import load_tokenizer
    from reward import is_right

    work = WORK[args.shape]
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.model)
    problems = data.load_problems(args.data, "train")[0]
    rows = datasets.Dataset.from_list([{"prompt": data.render(p, tokenizer)[0], "answer": p["answer"]} for p in problems[:512]])
    tokens, clock, sampling = [], [], []

    def reward(completions, completion_ids, answer, **_):
        tokens.append(sum(map(len, completion_ids)))
        return [float(is_right(text, gold, ("boxed", "#"))) + random.random() for text, gold in zip(completions, answer)]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.append(time.perf_counter())

        def on_train_end(self, *_, **__):
            clock.append(time.perf_counter())

    config = GRPOConfig(
        output_dir=str(folder / "trl"), max_steps=4 * (args.steps + 1), per_device_train_batch_size=work["num_prompts"] * 2,
        steps_per_generation=4, num_generations=8, max_completion_length=work["max_completion_length"], temperature=1.0,
        loss_type="dapo", beta=0.0, epsilon_high=0.28, learning_rate=1e-6, lr_scheduler_type="constant", weight_decay=0.0,
        adam_beta2=0.95, bf16=args.device == "cuda", use_cpu=args.device == "cpu", gradient_checkpointing=False, logging_steps=10**6,
        save_strategy="no", report_to="none", disable_tqdm=True, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trainer = GRPOTrainer(model=args.model, args=config, train_dataset=rows, reward_funcs=reward, processing_class=tokenizer, callbacks=[Clock()])
    generate = trainer.model.generate

    def timed(*arguments, **options):
        start = time.perf_counter()
        out = generate(*arguments, **options)
        sampling.append(time.perf_counter() - start)
        return out

    trainer.model.generate = timed
    before = resident_gb()[0]
    trainer.train()
    cycles = clock[::4]  # the rollout happens inside the first of four steps
    seconds = [b - a for a, b in zip(cycles, cycles[1:])][1:]
    return {
        "before": before, "after": resident_gb()[1], "tokens": tokens[1:], "seconds": seconds, "decode": sampling[1:],
        "update": [whole - part for whole, part in zip(seconds, sampling[1:])],
    }  # fmt: skip


def child(args):
    """One engine in a process of its own: prints a line of JSON."""
    with tempfile.TemporaryDirectory() as folder:
        result = {"ours": ours, "trl": trl}[args.child](args, Path(folder))
    print("RESULT " + json.dumps(result))


def machine(args):
    """What this machine does now: FLOP/s of a large matrix product, the fastest of torch's, and bytes/s of a large copy."""
    import torch

    from products import least_seconds, onednn

    n, dtype = (8192, torch.bfloat16) if args.device == "cuda" else (2048, torch.float32)
    a, block = torch.randn(n, n, dtype=dtype, device=args.device), torch.zeros(2**26, device=args.device)

    def seconds(call):
        return least_seconds(lambda: (call(), finish(args.device)))

    products = [lambda: a @ a] + [lambda: onednn(a, a)] * (args.device == "cpu" and torch.backends.mkldnn.is_available())
    target = torch.empty_like(block)
    return 2 * n**3 / min(map(seconds, products)), 2 * block.numel() * 4 / seconds(lambda: target.copy_(block))


def limit(args, model, flops, bandwidth, lengths, prompts):
    """Seconds that each phase of a step must take. lengths: of all completions; prompts: of each group's prompt; in tokens."""
    import models

    config, size = model.config, 2 if args.device == "cuda" else 4
    head = config.vocab_size * config.hidden_size
    body = sum(p.numel() for p in model.parameters()) - head * (1 if config.tie_word_embeddings else 2)
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * models.head_dim(config) * size  # bytes of a token
    decode = 0.0
    for t in range(1, max(lengths)):  # the first token comes out of the prefill
        rows = sum(n > t for n in lengths)
        moved = size * (body + head) + cache * rows * (statistics.mean(prompts) + t)
        decode += max(2 * (body + head) * rows / flops, moved / bandwidth)
    forward = (2 * body * (sum(lengths) - len(lengths) + sum(prompts)) + 2 * head * sum(lengths)) / flops  # the last token predicts nothing
    return {"prefill": 2 * (body * sum(prompts) + head * len(prompts)) / flops, "decode": decode, "score": forward, "update": 3 * forward}


def bare_products(model, lengths):
    """Seconds of decoding's matrix products alone: the model's linear layers in a bare loop, at the rows of every decode step."""
    import torch

    from products import least_seconds, packed_weights
    from rollout import batch_size

    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]

    @functools.cache
    @torch.no_grad()
    def one_step(rows):
        inputs = [torch.randn(rows, layer.in_features, dtype=layer.weight.dtype, device=model.device) for layer in layers]
        with packed_weights(model, rows):
            return least_seconds(lambda: ([layer(x) for layer, x in zip(layers, inputs)], finish(model.device)))

    return sum(one_step(batch_size(sum(n > t for n in lengths))) for t in range(1, max(lengths)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shape", choices=WORK, default="20m", help="tiny, or a true shape with random weights")
    parser.add_argument("--engine", choices=["both", "ours", "trl"], default="both", help="trl needs: pip install trl==1.16.0")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each engine, in turns")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process, after one warm-up")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where both run")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of both")
    parser.add_argument("--compile", action="store_true", help="this project with --compile")
    parser.add_argument("--child", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    import torch

    import models

    torch.set_num_threads(args.threads)
    engines = ["ours", "trl"] if args.engine == "both" else [args.engine]
    results = {engine: [] for engine in engines}
    with tempfile.TemporaryDirectory() as folder:
        args.model, args.data = prepare(args, Path(folder))
        for repeat in range(args.repeats):
            for engine in engines:
                command = [sys.executable, __file__, "--child", engine, "--model", args.model, "--data", args.data]
                command += [part for name in ("shape", "steps", "device", "threads") for part in (f"--{name}", str(getattr(args, name)))]
                command += ["--compile"] * args.compile
                done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
                line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
                if line is None:
                    sys.exit(f"{engine} failed:\n{done.stderr.strip()[-800:]}\n(trl is an extra: pip install trl==1.16.0)")
                results[engine].append(json.loads(line[7:]))
                print(f"repeat {repeat + 1} {engine}: {statistics.median(results[engine][-1]['seconds']):.2f} s a step", flush=True)
        model = models.load_model(args.model, args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)

    phases = ("prefill", "decode", "score", "update")
    print(f"\n{'engine':<8}{'s a step':>10}{'min-max':>14}{'s/1k tokens':>13}" + "".join(f"{phase:>9}" for phase in phases) + f"{'tokens':>8}{'memory GB':>11}")
    medians = {}
    for engine, runs in results.items():
        pool = lambda key: [value for run in runs for value in run.get(key, [])]  # noqa: E731
        median = lambda key: statistics.median(pool(key)) if pool(key) else float("nan")  # noqa: E731
        rate = statistics.median(1000 * s / t for s, t in zip(pool("seconds"), pool("tokens")))
        medians[engine] = (median("seconds"), rate, statistics.median(run["after"] - run["before"] for run in runs))
        spread = f"{min(pool('seconds')):.2f}-{max(pool('seconds')):.2f}"
        print(f"{engine:<8}{medians[engine][0]:>10.2f}{spread:>14}{rate:>13.3f}" + "".join(f"{median(phase):>9.2f}" for phase in phases)
              + f"{median('tokens'):>8.0f}{medians[engine][2]:>11.3f}")  # fmt: skip
    if len(engines) == 2:
        names = ("seconds a step", "seconds a token", "memory")
        print("ours / trl: " + ", ".join(f"{name} {ours / other:.2f}" for name, ours, other in zip(names, medians["ours"], medians["trl"])))
    if "ours" in results:
        flops, bandwidth = machine(args)
        reached, bare = {phase: [] for phase in phases}, []
        parts = collections.defaultdict(list)
        for run in results["ours"]:
            for index, (lengths, prompts) in enumerate(zip(run["lengths"], run["prompts"])):
                least = limit(args, model, flops, bandwidth, lengths, prompts)
                for phase, seconds in least.items():
                    reached[phase].append(seconds / run[phase][index])
                alone = bare_products(model, lengths)
                bare.append(least["decode"] / alone)
                times = {"matrix products alone": alone} | {kind: run[kind][index] for kind in ("attention", "drawing") if kind in run}
                for kind, seconds in times.items():
                    parts[kind].append(seconds / run["decode"][index])
        print(f"the limit, at {flops / 1e9:,.0f} GFLOP/s and {bandwidth / 1e9:,.0f} GB/s; of it reached: "
              + ", ".join(f"{phase} {statistics.median(shares):.0%}" for phase, shares in reached.items()))  # fmt: skip
        shares = {kind: statistics.median(values) for kind, values in parts.items()}
        shares["small operations and the Python around them" if len(shares) > 1 else "the rest"] = 1 - sum(shares.values())
        print(f"decoding's matrix products alone, row for row, reach {statistics.median(bare):.0%} of that limit. Of the decoding are "
              + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()))  # fmt: skip


if __name__ == "__main__":
    main()
