"""Time and memory of a training step, side by side with TRL's GRPOTrainer on the same work, and the machine's limit.

    python experiments/bench.py --shape 20m                  # both engines, interleaved (pip install trl==1.16.0)
    python experiments/bench.py --shape tiny --engine ours   # this project only

The same weights, prompts, group size, sampling, DAPO loss, updates per rollout and dtype. One engine a process, in turns, so
that a drifting machine slows both; the first step of each process is a warm-up. On random weights completions end because
one token in --mean-length counts as end-of-text: lengths are geometric, cut at --max-completion-length, as uneven as real
ones. The two engines draw different lengths, so seconds are also given for a thousand completion tokens.

Memory is the peak of the process above what it held before the model was loaded, less the weights (it still has the
gradients and AdamW's moments). The limit is the arithmetic that the step cannot avoid (2 FLOPs a weight and token forward,
4 backward, attention left out) over the rate of a large matrix product on this machine, measured in the same run.
"""

import argparse
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

    from experiments.shapes import build_config, build_tokenizer

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
    """What this process holds now, and the most it ever held, in GB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return [int(status.split(f"{key}:")[1].split()[0]) / 1e6 for key in ("VmRSS", "VmHWM")]


def ours(args, folder):
    """`train.train`, as a user runs it."""
    import train

    work = WORK[args.shape]
    flags = dict(
        algo="dapo", model=args.model, data=args.data, steps=args.steps + 1, num_prompts=work["num_prompts"], num_generations=8,
        max_completion_length=work["max_completion_length"], dynamic_sampling="off", overlong="none", device=args.device,
        threads=args.threads, steps_per_generation=4, output_dir=folder / "run",
    )  # fmt: skip
    argv = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    # What train.py imports on the way counts as much as what `import trl` does: not.
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import rollout  # noqa: F401

    before = resident_gb()[0]
    rows = train.train(train.parse_args(argv))[1:]
    count = work["num_prompts"] * 8
    return {
        "before": before, "tokens": [row["completions/mean_length"] * count for row in rows],
        "seconds": [sum(row[f"seconds/{phase}"] for phase in ("sample", "score", "update")) for row in rows],
        **{phase: [row[f"seconds/{phase}"] for row in rows] for phase in ("sample", "score", "update")},
    }  # fmt: skip


def trl(args, folder):
    """GRPOTrainer with its transformers backend: DAPO loss, no KL, no gradient checkpointing, four updates a rollout."""
    import datasets
    import torch
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import data
    from reward import is_right
    from models import load_tokenizer

    before, work = resident_gb()[0], WORK[args.shape]
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
        adam_beta2=0.95, bf16=False, use_cpu=args.device == "cpu", gradient_checkpointing=False, logging_steps=10**6,
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
    trainer.train()
    cycles = clock[::4]  # the rollout happens inside the first of four steps
    return {"before": before, "tokens": tokens[1:], "seconds": [b - a for a, b in zip(cycles, cycles[1:])][1:], "sample": sampling[1:]}


def child(args):
    """One engine in a process of its own: prints a line of JSON."""
    with tempfile.TemporaryDirectory() as folder:
        result = {"ours": ours, "trl": trl}[args.child](args, Path(folder))
    result["memory"] = resident_gb()[1] - result.pop("before")
    print("RESULT " + json.dumps(result))


def limit(args, tokens, prompt_tokens):
    """Seconds of unavoidable arithmetic of a step (decode, score, update), at the rate of a large matrix product now."""
    import torch
    from transformers import AutoModelForCausalLM

    from experiments.shapes import build_config

    torch.set_num_threads(args.threads)
    a = torch.randn(2048, 2048)
    a @ a
    start = time.perf_counter()
    for _ in range(8):
        a @ a
    rate = 8 * 2 * 2048**3 / (time.perf_counter() - start)
    config = build_config(args.shape)
    with torch.device("meta"):
        total = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    head = config.vocab_size * config.hidden_size
    body = total - head * (1 if config.tie_word_embeddings else 2)
    decode = 2 * (body + head) * tokens
    forward = 2 * body * (tokens + 8 * prompt_tokens) + 2 * head * tokens
    return rate, {"sample": decode + 2 * body * prompt_tokens, "score": forward, "update": 3 * forward}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shape", choices=WORK, default="20m", help="tiny, or a true shape with random weights")
    parser.add_argument("--engine", choices=["both", "ours", "trl"], default="both", help="trl needs: pip install trl==1.16.0")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each engine, in turns")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process, after one warm-up")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where both run")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of both")
    parser.add_argument("--child", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    engines = ["ours", "trl"] if args.engine == "both" else [args.engine]
    results = {engine: [] for engine in engines}
    with tempfile.TemporaryDirectory() as folder:
        args.model, args.data = prepare(args, Path(folder))
        for repeat in range(args.repeats):
            for engine in engines:
                command = [sys.executable, __file__, "--child", engine, "--model", args.model, "--data", args.data]
                for name in ("shape", "steps", "device", "threads"):
                    command += [f"--{name}", str(getattr(args, name))]
                done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
                line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
                if line is None:
                    sys.exit(f"{engine} failed:\n{done.stderr.strip()[-800:]}\n(trl is an extra: pip install trl==1.16.0)")
                results[engine].append(json.loads(line[7:]))
                print(f"repeat {repeat + 1} {engine}: {statistics.median(results[engine][-1]['seconds']):.2f} s a step", flush=True)
        weights = sum(f.stat().st_size for f in Path(args.model).glob("*.safetensors")) / 1e9
        import data
        from models import load_tokenizer

        problems = data.encode_prompts(data.load_problems(args.data, "train")[0], load_tokenizer(args.model), 4096)[0]
        prompt_tokens = statistics.mean(len(p["prompt_ids"]) for p in problems) * WORK[args.shape]["num_prompts"]

    print(f"\n{'engine':<8}{'s a step':>10}{'min-max':>14}{'s/1k tokens':>13}{'sample':>9}{'score':>8}{'update':>8}{'tokens':>8}{'memory GB':>11}")
    medians = {}
    for engine, runs in results.items():
        pool = lambda key: [value for run in runs for value in run.get(key, [])]  # noqa: E731
        median = lambda key: statistics.median(pool(key)) if pool(key) else float("nan")  # noqa: E731
        rates = [1000 * s / t for s, t in zip(pool("seconds"), pool("tokens"))]
        medians[engine] = (median("seconds"), statistics.median(rates), statistics.median(run["memory"] for run in runs) - weights)
        spread = f"{min(pool('seconds')):.2f}-{max(pool('seconds')):.2f}"
        print(f"{engine:<8}{medians[engine][0]:>10.2f}{spread:>14}{medians[engine][1]:>13.3f}{median('sample'):>9.2f}{median('score'):>8.2f}"
              f"{median('update'):>8.2f}{median('tokens'):>8.0f}{medians[engine][2]:>11.2f}")  # fmt: skip
    if len(engines) == 2:
        names = ("seconds a step", "seconds a token", "memory")
        print("ours / trl: " + ", ".join(f"{name} {ours / other:.2f}" for name, ours, other in zip(names, medians["ours"], medians["trl"])))
    if "ours" in results:
        rate, work = limit(args, statistics.median(t for run in results["ours"] for t in run["tokens"]), prompt_tokens)
        print(f"limit at {rate / 1e9:.0f} GFLOP/s: " + ", ".join(
            f"{phase} {flops / rate:.2f} s ({100 * flops / rate / statistics.median(t for run in results['ours'] for t in run[phase]):.0f}% of it reached)"
            for phase, flops in work.items()))  # fmt: skip


if __name__ == "__main__":
    main()
