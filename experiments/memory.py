"""The memory table of docs/PERFORMANCE.md: what a training run needs on one GPU, by its shapes.

    python -m experiments.memory

Computed, not measured: bf16 autocast over fp32 masters, prompts of 256 tokens, completions of at
most 2048, a rollout of 64 x 8, a tenth on top for the allocator and 1 GB for CUDA.
"""

import torch
from transformers import AutoModelForCausalLM

import train
from engine.models import memory_estimate
from experiments.shapes import build_config

GPUS = (24, 48, 80, 141)  # GB
COLUMNS = (
    "model",
    "trained",
    "rows at once",
    "tokens a pass",
    "weights",
    "optimizer",
    "cache",
    "activations",
    "needs",
    "GPU",
)


def row(shape, model, lora, rows, tokens):
    """The cells of one line, as a list. model: on the meta device; lora: train adapters only."""
    flags = f"--model {shape} --rollout-batch-size {rows} --max-tokens-per-batch {tokens}"
    args = train.parse_args(flags.split())
    # Of a LoRA run the frozen base is in bf16. Its adapters, about 1%, are left out of the sum.
    model.to(torch.bfloat16 if lora else torch.float32).requires_grad_(not lora)
    gb = memory_estimate(model, torch.device("cuda"), args, longest_prompt=256)
    needed = gb["weights"] + gb["optimizer"] + max(gb["cache"], gb["activations"])
    needed = 1.1 * needed + 1
    fitting = [f"{size} GB" for size in GPUS if needed <= size]
    parts = [f"{value:.1f}" for value in gb.values()]
    trained = "LoRA" if lora else "all"
    return [shape, trained, rows, tokens, *parts, f"{needed:.0f} GB", (fitting or ["none"])[0]]


def main():
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for shape in ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(build_config(shape))
        for lora in (True, False):
            for rows, tokens in ((32, 4096), (128, 8192)):
                cells = row(shape, model, lora, rows, tokens)
                print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
