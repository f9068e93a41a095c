"""CAST inside TRL's SFTTrainer (TRL 1.16): safety-tuning that skips heads, on several GPUs.

    python cast.py --diagnose --model DIR --output-dir runs/cast    # one GPU: the conflict map
    accelerate launch --num_processes 8 scale/trl_cast.py --model DIR --output-dir runs/cast

`CASTTrainer` is SFTTrainer which trains what a mask names, and nothing else: gradients of frozen
elements are zeroed before they are clipped, frozen elements are put back after each step, since
AdamW's decay and momentum know nothing of masks, and in the end all their bits are compared. The
map comes from cast.py; so do the data and the flags.

It is for data-parallel training (DDP): a mask names elements of whole tensors, so that FSDP and
DeepSpeed's third stage, which cut them up, are refused.
"""

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cast
from engine.errors import UserError, run_script
from engine.heads import find_heads, trained_masks, update_of, weights_of
from engine.maps import read_map, scores_of
from engine.models import load_model, load_tokenizer, resolve_model


class CASTTrainer(SFTTrainer):
    """SFTTrainer that moves the elements in `masks` alone (engine.heads.trained_masks).

    masks: dict from a parameter's name to a bool tensor of its shape. Raises RuntimeError at the
    end of train() if a frozen element has moved.
    """

    def __init__(self, model, *arguments, masks, **named):
        model.requires_grad_(False)
        for name, p in model.named_parameters():
            if name in masks:
                p.requires_grad_(True)
                p.register_hook(lambda gradient, name=name: gradient * self.masks[name])
        self.masks = masks
        super().__init__(model, *arguments, **named)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("masks name elements of whole tensors: use plain DDP")

    def create_optimizer(self, *arguments, **named):
        optimizer = super().create_optimizer(*arguments, **named)
        device = self.accelerator.device
        self.masks = {name: mask.to(device) for name, mask in self.masks.items()}
        parameters = {n: p for n, p in self.model.named_parameters() if n in self.masks}
        start = {name: p.detach().clone() for name, p in parameters.items()}

        @torch.no_grad()
        def put_back(optimizer, arguments, named):
            for name, p in parameters.items():
                p.copy_(torch.where(self.masks[name], p, start[name]))

        optimizer.register_step_post_hook(put_back)
        return optimizer

    def train(self, *arguments, **named):
        start = {name: p.cpu() for name, p in weights_of(self.model).items()}
        result = super().train(*arguments, **named)
        masks = {name: mask.cpu() for name, mask in self.masks.items()}
        update = update_of(self.accelerator.unwrap_model(self.model).cpu(), start, masks)
        if not update.frozen_identical:
            raise RuntimeError("a frozen element moved")
        print(f"all {update.frozen_elements:,} frozen elements are bit-identical to the start")
        return result


def rows_of(samples):
    """The samples of cast.py as rows for SFTTrainer: tokens, and which of them are the response."""
    return [
        {
            "input_ids": s.prompt_ids + s.completion_ids,
            "completion_mask": [0] * len(s.prompt_ids) + [1] * len(s.completion_ids),
        }
        for s in samples
    ]


def main(argv=None):
    args = cast.parse_args(["--tune", *(sys.argv[1:] if argv is None else argv)])
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % processes:
        raise UserError(f"--batch-size {args.batch_size} is no multiple of {processes} processes")
    name = resolve_model(args.model)
    tokenizer = load_tokenizer(name)
    model = load_model(name, "cpu")
    heads = find_heads(model)
    path = Path(args.output_dir) / "conflict_map.json"
    scores = scores_of(path, read_map(path, model), heads.shape)
    skipped = set(cast.ranked(scores)[: cast.number_skipped(args, heads)])
    masks = trained_masks(model, heads, skipped, args.trainable, args.train_kv)
    sets = cast.load_sets(args, model, tokenizer, args.seed)
    config = SFTConfig(
        output_dir=str(Path(args.output_dir) / "trl"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size // processes,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        max_length=args.max_length,
        completion_only_loss=True,
        seed=args.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    data = Dataset.from_list(rows_of(sets.safe))
    trainer = CASTTrainer(
        model, masks=masks, args=config, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    run_script(main, "trl_cast.py")
