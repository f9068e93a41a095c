"""TEPO inside TRL's GRPOTrainer (TRL 1.16): several GPUs, vLLM rollouts, LoRA, trackers, the hub.

    pip install trl==1.16.0
    accelerate launch --num_processes 8 scale/trl_tepo.py --model Qwen2.5-7B --use-vllm

`TEPOTrainer` is GRPOTrainer with another `_compute_loss`, which calls tepo.tepo_loss. TRL does
everything else. Three things that it does not do are done here:

- Old log-probs *and old entropies* come from one more pass, without gradient, over each generation
  batch. TRL has no old entropies, and with its defaults no old log-probs: there every ratio is 1.
- The mean is over the tokens of an optimizer step: those of all processes and accumulation steps.
  TRL's own takes the mean over the generation batch for all of its optimizer steps.
- Groups of equal rewards do not count in it. They have no gradient; TEPO "removes" them.

With one update for each rollout TEPO would be DAPO, so that is refused. Flags have the names of
train.py; scale/trl_config.py makes TRL's arguments of them.
"""

import sys
from pathlib import Path

import torch
from trl import GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tepo
from engine.errors import run_script
from scale.trl_config import parse_args, trainer_arguments


class TEPOTrainer(GRPOTrainer):
    """GRPOTrainer with TEPO's loss. beta and kl_mask are TEPO's: the KL is to the old policy.

    prompt_ids: dict from each prompt's text to its tokens, if TRL shall not tokenize them.
    """

    def __init__(self, *arguments, tepo_beta=0.001, kl_mask="positive", prompt_ids=None, **named):
        super().__init__(*arguments, **named)
        args = self.args
        if args.steps_per_generation % args.gradient_accumulation_steps:
            raise ValueError("steps_per_generation must be a multiple of the accumulation steps")
        if args.steps_per_generation * args.num_iterations == args.gradient_accumulation_steps:
            raise ValueError(
                "one update for each rollout: every ratio is 1 and TEPO is DAPO; raise "
                "num_iterations or steps_per_generation"
            )
        if args.beta or args.use_liger_kernel:
            raise ValueError("beta must be 0 (give tepo_beta) and use_liger_kernel False")
        if args.use_vllm and args.vllm_importance_sampling_correction:
            raise ValueError("vllm_importance_sampling_correction weighs tokens: set it to False")
        self.tepo_beta = tepo_beta
        self.kl_mask = kl_mask
        self.prompt_ids = prompt_ids

    def _tokenize_prompts(self, prompts):
        if self.prompt_ids is None:
            return super()._tokenize_prompts(prompts)
        return [self.prompt_ids[prompt] for prompt in prompts], None, {}

    def statistics(self, model, inputs, batch_size=None):
        """Log-probs and entropies [B, T] of the completions in `inputs`."""
        completion_ids = inputs["completion_ids"]
        logp, entropy, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], completion_ids], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            completion_ids.size(1),
            batch_size,
            compute_entropy=True,
        )
        return logp, entropy

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        with torch.no_grad():
            size = self.args.per_device_train_batch_size
            old = self.statistics(self.model, batch, size)
        batch["old_per_token_logps"], batch["old_entropies"] = old
        return batch

    def _prepare_inputs(self, generation_batch):
        rollout = self.args.steps_per_generation * self.num_iterations  # micro-batches
        fresh = self._step % rollout == 0 or self._buffered_inputs is None
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and fresh:
            window = self.args.gradient_accumulation_steps  # micro-batches of an optimizer step
            for start in range(0, len(self._buffered_inputs), window):
                batches = self._buffered_inputs[start : start + window]
                tokens = sum(token_mask(batch).sum() for batch in batches)
                tokens = self.accelerator.reduce(tokens, reduction="sum").item()
                for batch in batches:
                    batch["num_tokens"] = tokens
        return inputs

    def _compute_loss(self, model, inputs):
        mask = token_mask(inputs)
        logp, entropy = self.statistics(model, inputs)
        loss, metrics = tepo.tepo_loss(
            logp,
            inputs["old_per_token_logps"],
            inputs["advantages"],
            mask,
            entropy_change=tepo.exact_entropy_change(entropy, inputs["old_entropies"]),
            num_tokens=inputs.get("num_tokens", mask.sum().item()),
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            beta=self.tepo_beta,
            kl_mask=self.kl_mask,
        )
        for name, value in {"entropy": entropy, **metrics}.items():
            sums = torch.stack([(value * mask).sum().float(), mask.sum().float()])
            sums = self.accelerator.reduce(sums, reduction="sum")
            mode = "train" if self.model.training else "eval"
            self._metrics[mode][name].append((sums[0] / sums[1].clamp(min=1)).item())
        return loss * self.accelerator.num_processes  # gradients are averaged over processes


def token_mask(inputs):
    """The completion tokens [B, T] that count. A group of equal rewards has advantages of 0."""
    mask = inputs["completion_mask"].bool()
    if "tool_mask" in inputs:
        mask = mask & inputs["tool_mask"].bool()
    return mask & (inputs["advantages"] != 0).unsqueeze(1)


def main(argv=None):
    args = parse_args(argv)
    trainer = TEPOTrainer(**trainer_arguments(args), tepo_beta=args.beta, kl_mask=args.kl_mask)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    run_script(main, "trl_tepo.py")
