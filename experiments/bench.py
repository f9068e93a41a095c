"""Time and memory of a training step, side by side with TRL's GRPOTrainer on the same work.

    python -m experiments.bench --shape 20m                  # with TRL: pip install trl==1.16.0
    python -m experiments.bench --shape tiny --engine ours   # this project only
    python -m experiments.bench --model models/SmolLM2-135M-Instruct    # any checkpoint

Both have the same weights, prompts, group size, sampling, DAPO loss, updates a rollout and dtype.
Each engine runs in a process of its own, in turns, so that a drifting machine slows both. The first
step of a process is a warm-up. Random weights end a completion because one token in mean_length
counts as end-of-text: lengths are as uneven as real ones. A checkpoint of --model gets questions
in words, and ends by itself. The engines draw different lengths, so seconds are also given for a
thousand completion tokens. Memory is the peak while training above what the process held when the
model was loaded.
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

from experiments.shapes import build_config, build_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WORK = {  # prompt_tokens: from, to; mean_length: of a completion, if it were not cut
    "tiny": dict(num_prompts=32, max_completion_length=48),
    "20m": dict(num_prompts=8, max_completion_length=128, prompt_tokens=(48, 96), mean_length=64),
    "qwen2.5-0.5b": dict(
        num_prompts=4, max_completion_length=64, prompt_tokens=(48, 96), mean_length=32
    ),
    "checkpoint": dict(num_prompts=8, max_completion_length=64),  # --model
    "qwen2.5-1.5b": dict(
        num_prompts=64, max_completion_length=512, prompt_tokens=(48, 96), mean_length=256
    ),
}


def questions(path):
    """Writes questions in words to a file, for a checkpoint that can read."""
    rng = random.Random(0)
    subjects = ["the number {}", "the year 19{}", "page {} of a book", "a {}-year-old", "{} birds"]
    texts = [f"Tell me something about {rng.choice(subjects).format(n)}." for n in range(10, 99)]
    rows = [json.dumps({"problem": text, "answer": "1"}) for text in texts]
    path.write_text("\n".join(rows))


def prepare(shape, folder):
    """Writes the checkpoint and the problems. Returns both as --model and --data take them."""
    import torch
    from transformers import AutoModelForCausalLM

    if shape == "tiny":
        return "tiny", "arithmetic"
    work = WORK[shape]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(build_config(shape))
    stops = list(range(0, model.config.vocab_size, work["mean_length"]))
    model.generation_config.eos_token_id = stops
    model.save_pretrained(folder / "model")
    build_tokenizer(chat_template=None).save_pretrained(folder / "model")
    rng = random.Random(0)
    rows = []
    for index in range(256):
        length = rng.randint(*work["prompt_tokens"]) - 30  # the instruction takes about 30
        digits = " ".join(str(rng.randint(0, 9)) for _ in range(length // 2))
        rows.append(json.dumps({"problem": f"{index} {digits}", "answer": "1"}) + "\n")
    (folder / "problems.jsonl").write_text("".join(rows))
    return str(folder / "model"), str(folder / "problems.jsonl")


def memory_gb(key):
    """What this process holds ("VmRSS") or has held at most ("VmHWM"), in GB (Linux)."""
    import torch

    if torch.cuda.is_initialized():
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return (now if key == "VmRSS" else peak) / 1e9
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) * 1024 / 1e9


def ours(args, folder):
    """train.py as a user runs it. Returns seconds and tokens of each step, and memory."""
    import train
    from engine import models

    work = WORK[args.shape]
    flags = f"""--algo dapo --model {args.model} --data {args.data} --steps {args.steps + 1}
        --num-prompts {work["num_prompts"]} --num-generations 8
        --max-completion-length {work["max_completion_length"]} --dynamic-sampling off
        --overlong none --steps-per-generation 4 --num-iterations 1 --learning-rate 1e-6
        --rollout-batch-size 512 --no-gradient-checkpointing --device {args.device}
        --max-tokens-per-batch {args.max_tokens_per_batch} --threads {args.threads}
        --output-dir {folder}/run"""
    load_model = models.load_model
    held = []

    def watched(*arguments):
        model = load_model(*arguments)
        held.append(memory_gb("VmRSS"))
        return model

    models.load_model = watched
    rows = train.train(train.parse_args(flags.split()))[1:]
    samples = work["num_prompts"] * 8
    return {
        "sample": [row["seconds/sample"] for row in rows],
        "score": [row["seconds/score"] for row in rows],
        "update": [row["seconds/update"] for row in rows],
        "tokens": [row["completions/mean_length"] * samples for row in rows],
        "memory": rows[-1]["peak_memory_gb"] - held[0],
    }


def trl(args, folder):
    """GRPOTrainer with its transformers backend. What is not generation counts as update."""
    import datasets
    import torch
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import tasks
    from engine.models import load_tokenizer, resolve_model
    from tasks.prompts import render

    work = WORK[args.shape]
    torch.set_num_threads(args.threads)
    name = resolve_model(args.model)
    tokenizer = load_tokenizer(name)
    task = tasks.load(args.data)
    problems = task.problems[:512]
    prompts = [render(problem, tokenizer)[0] for problem in problems]
    rows = [{"prompt": text, "index": index} for index, text in enumerate(prompts)]
    tokens = []
    clock = []
    sampling = []

    def reward(completions, completion_ids, index, **_):
        tokens.append(sum(map(len, completion_ids)))
        scores = [task.reward(problems[i], text) for i, text in zip(index, completions)]
        return [value + random.random() for value in scores]  # no group is equal

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.append(time.perf_counter())

        def on_train_end(self, *_, **__):
            clock.append(time.perf_counter())

    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=4 * (args.steps + 1),
        per_device_train_batch_size=work["num_prompts"] * 2,
        steps_per_generation=4,
        num_generations=8,
        max_completion_length=work["max_completion_length"],
        temperature=1.0,
        loss_type="dapo",
        beta=0.0,
        epsilon_high=0.28,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta2=0.95,
        bf16=args.device == "cuda",
        use_cpu=args.device == "cpu",
        gradient_checkpointing=False,
        logging_steps=10**6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = GRPOTrainer(
        model=name,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        reward_funcs=reward,
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    generate = trainer.model.generate

    def timed(*arguments, **options):
        start = time.perf_counter()
        out = generate(*arguments, **options)
        sampling.append(time.perf_counter() - start)
        return out

    trainer.model.generate = timed
    held = memory_gb("VmRSS")
    trainer.train()
    cycles = clock[::4]  # the rollout happens inside the first of four steps
    seconds = [end - start for start, end in zip(cycles[:-1], cycles[1:])][1:]
    return {
        "sample": sampling[1:],
        "update": [whole - part for whole, part in zip(seconds, sampling[1:])],
        "tokens": tokens[1:],
        "memory": memory_gb("VmHWM") - held,
    }


def product_seconds(args):
    """Seconds of a product of two 2048 x 2048 matrices in fp32, the fastest of ten."""
    import torch

    torch.set_num_threads(args.threads)
    a = torch.randn(2048, 2048, device=args.device)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def limit(args, tokens):
    """Seconds that the matrix products of one of our steps would take at this machine's best.

    tokens: completion tokens of a step. A token takes two operations a weight forwards and four
    backwards. Scoring is forwards, updating both; the head's weights work at completion tokens
    alone, and once more in the backward pass.
    """
    from engine.models import load_model, load_tokenizer, resolve_model
    from tasks.prompts import encode

    name = resolve_model(args.model)
    model = load_model(name, "cpu")
    head = model.get_output_embeddings().weight.numel()
    layers = sum(p.numel() for p in model.get_decoder().layers.parameters())
    problems = [json.loads(line) for line in Path(args.data).read_text().splitlines()]
    problems = [{"prompt": row["problem"]} for row in problems]
    encoded = encode(problems, load_tokenizer(name), 2048)
    prompts = WORK[args.shape]["num_prompts"]
    prompt_tokens = prompts * statistics.fmean(len(p["prompt_ids"]) for p in encoded)
    sampling = 2 * layers * (prompt_tokens + tokens) + 2 * head * tokens
    scoring = sampling
    updating = 6 * layers * (prompt_tokens + tokens) + 8 * head * tokens
    operations = sampling + scoring + updating
    return operations / (2 * 2048**3 / product_seconds(args))


def run_child(engine, args):
    """Runs one engine in a process of its own and returns its result, or None where it failed."""
    command = [sys.executable, "-m", "experiments.bench", "--child", engine]
    for name in ("shape", "steps", "device", "threads", "max_tokens_per_batch", "model", "data"):
        command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        reason = done.stderr.strip()[-800:]
        print(f"{engine} failed:\n{reason}\n(trl is an extra: pip install trl==1.16.0)")
        return None
    return json.loads(lines[0].removeprefix("RESULT "))


def summary(results):
    """The medians over all timed steps of an engine's processes, as a dict."""
    steps = []
    for result in results:
        phases = [result[name] for name in ("sample", "score", "update") if name in result]
        steps += zip((sum(parts) for parts in zip(*phases)), result["tokens"])
    seconds = [second for second, _ in steps]
    phases = {}
    for name in ("sample", "score", "update"):
        values = [value for result in results for value in result.get(name, [])]
        phases[name] = statistics.median(values) if values else float("nan")
    return {
        "seconds": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "per 1k tokens": statistics.median(1000 * second / tokens for second, tokens in steps),
        **phases,
        "memory": statistics.median(result["memory"] for result in results),
    }


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument
    flag("--shape", choices=WORK, default="20m", help="tiny, or random weights of a true shape")
    flag("--model", help="a folder with a checkpoint, in place of a shape")
    flag("--engine", choices=["both", "ours", "trl"], default="both", help="what to run")
    flag("--repeats", type=int, default=3, help="processes of each engine, in turns")
    flag("--steps", type=int, default=2, help="timed steps of a process, after one warm-up")
    flag("--device", choices=["cpu", "cuda"], default="cpu", help="where both run")
    flag("--threads", type=int, default=os.cpu_count(), help="CPU threads of both")
    flag("--max-tokens-per-batch", type=int, default=1024, help="of this project's passes")
    flag("--child", choices=["ours", "trl"], help=argparse.SUPPRESS)
    flag("--data", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main():
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.child:
            engine = {"ours": ours, "trl": trl}[args.child]
            print("RESULT " + json.dumps(engine(args, Path(folder))))
            return
        engines = ["ours", "trl"] if args.engine == "both" else [args.engine]
        results = {engine: [] for engine in engines}
        if args.model:
            args.shape = "checkpoint"
            args.data = str(Path(folder) / "questions.jsonl")
            questions(Path(args.data))
        else:
            args.model, args.data = prepare(args.shape, Path(folder))
        for repeat in range(args.repeats):
            for engine in engines:
                result = run_child(engine, args)
                if result:
                    results[engine].append(result)
                print(f"repeat {repeat + 1}: {engine} done", file=sys.stderr)
        results = {engine: found for engine, found in results.items() if found}
        if args.shape == "checkpoint" and "ours" in results:
            tokens = statistics.median(n for result in results["ours"] for n in result["tokens"])
            floor = limit(args, tokens)
            times = summary(results["ours"])["seconds"] / floor
            print(
                f"one of our steps takes {times:.1f} times the {floor:.1f} s that its matrix "
                "products would take at the speed of one large product\n"
            )

    columns = ["seconds", "least", "most", "per 1k tokens", "sample", "score", "update", "memory"]
    print("| engine | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    rows = {engine: summary(found) for engine, found in results.items()}
    for engine, row in rows.items():
        print(f"| {engine} | " + " | ".join(f"{row[name]:.3f}" for name in columns) + " |")
    if len(rows) == 2:
        for name in ("seconds", "per 1k tokens", "memory"):
            print(f"{name}: ours / trl = {rows['ours'][name] / rows['trl'][name]:.2f}")


if __name__ == "__main__":
    main()
