"""The README's memory table: what a training run needs on one GPU, computed from the shapes (models.memory_estimate).

    python experiments/memory.py

Computed, not measured: bf16 autocast with fp32 masters, prompts of 256 tokens, completions of at most 2048, 64 x 8 a rollout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

GPUS = (24, 48, 80, 141)


def main():
    import torch
    from transformers import AutoModelForCausalLM

    import train
    from experiments.shapes import build_config
    from models import memory_estimate

    print("| model | trained | rows at once | tokens a pass | weights | optimizer | cache | activations | needs | GPU |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for shape in ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(build_config(shape))
        for lora in (True, False):
            for rows, tokens in ((32, 4096), (128, 16384)):
                flags = ["--model", shape, "--rollout-batch-size", str(rows), "--max-tokens-per-batch", str(tokens)]
                args = train.parse_args(flags)
                # LoRA: a frozen bf16 base; the adapters (about 1% of the weights) are left out of the sum.
                model.to(torch.bfloat16 if lora else torch.float32).requires_grad_(not lora)
                gb = memory_estimate(model, torch.device("cuda"), args, longest_prompt=256)
                total = 1.1 * (gb["weights"] + gb["optimizer"] + max(gb["cache"], gb["activations"])) + 1  # allocator, CUDA context
                fits = next((f"{size} GB" for size in GPUS if total <= size), "none")
                cells = [shape, "LoRA" if lora else "all", rows, tokens, *(f"{value:.1f}" for value in gb.values()), f"{total:.0f} GB", fits]
                print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
