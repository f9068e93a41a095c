"""Run by torchrun, in tests/test_scale.py: two updates of TEPO on a batch that is given.

    trl_worker.py tepo|cast OUT ACCUMULATION

TRL samples nothing: each process gets its rows of one global batch. The weights go to OUT.
"""

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from trl import GRPOConfig, GRPOTrainer, SFTConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cast
from engine.heads import find_heads, trained_masks
from engine.models import load_model, load_tokenizer, resolve_model
from scale.trl_cast import CASTTrainer, rows_of
from scale.trl_tepo import TEPOTrainer

ROWS = 16  # two groups of 8
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))
COMMON = dict(
    lr_scheduler_type="constant",
    use_cpu=True,
    bf16=False,  # TRL has it on
    report_to="none",
    save_strategy="no",
    optim="sgd",
    gradient_checkpointing=False,
    disable_tqdm=True,
)


def global_batch():
    """Prompts of 5 tokens, completions of 2 to 9, advantages of two groups."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 10, (ROWS, 1), generator=generator)
    mask = (torch.arange(9) < lengths).long()
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1, 0, 1, 1, 1, 0, 1, 1, 0])
    groups = rewards.view(2, 8)
    advantages = (groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True)
    return {
        "prompt_ids": torch.randint(5, 40, (ROWS, 5), generator=generator),
        "prompt_mask": torch.ones(ROWS, 5, dtype=torch.long),
        "completion_ids": torch.randint(5, 40, (ROWS, 9), generator=generator) * mask,
        "completion_mask": mask,
        "advantages": advantages.view(-1),
    }


def own_rows(self, inputs):
    """In the place of sampling: the rows of this process."""
    here = slice(RANK * ROWS // PROCESSES, (RANK + 1) * ROWS // PROCESSES)
    batch = {name: tensor[here].clone() for name, tensor in global_batch().items()}
    return {**batch, "num_items_in_batch": global_batch()["completion_mask"].sum()}


def tepo(out, accumulation):
    GRPOTrainer._generate_and_score_completions = own_rows
    config = GRPOConfig(
        output_dir=f"{out}-run",
        max_steps=2,
        num_generations=8,
        per_device_train_batch_size=ROWS // PROCESSES // accumulation,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation,
        num_iterations=2,
        learning_rate=1e-3,
        max_grad_norm=0.0,  # no clipping, which would hide a factor
        epsilon=0.02,
        epsilon_high=0.028,
        **COMMON,
    )
    name = resolve_model("tiny")
    trainer = TEPOTrainer(
        load_model(name, "cpu"),
        lambda completions, **_: [0.0] * len(completions),
        config,
        Dataset.from_list([{"prompt": "1+1="}] * 64),
        processing_class=load_tokenizer(name),
        tepo_beta=0.5,
    )
    trainer.train()
    return trainer


def tune(out, accumulation):
    name = resolve_model("tiny")
    tokenizer = load_tokenizer(name)
    model = load_model(name, "cpu")
    heads = find_heads(model)
    masks = trained_masks(model, heads, {(0, 1), (0, 4), (2, 3)})
    pairs = [{"prompt": f"make {noun}?", "response": "sorry, i can't."} for noun in "abcdefgh"]
    samples = cast.encode_pairs("safe", pairs, tokenizer, 100)
    config = SFTConfig(
        output_dir=f"{out}-run",
        max_steps=3,
        per_device_train_batch_size=8 // PROCESSES // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        weight_decay=0.1,
        completion_only_loss=True,
        **{**COMMON, "optim": "adamw_torch"},
    )
    data = Dataset.from_list(rows_of(samples))
    trainer = CASTTrainer(
        model, masks=masks, args=config, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, out, accumulation = sys.argv[1:]
    trainer = {"tepo": tepo, "cast": tune}[what](out, int(accumulation))
    if RANK == 0:
        model = trainer.accelerator.unwrap_model(trainer.model)
        print(f"{trainer.accelerator.num_processes} processes")
        save_file({name: p.detach().cpu().clone() for name, p in model.named_parameters()}, out)
