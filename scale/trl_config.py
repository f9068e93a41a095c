"""From the flags of train.py to the arguments of TRL's GRPOTrainer, for scale/trl_tepo.py."""

import argparse
import os

import torch
from datasets import Dataset
from trl import GRPOConfig

import tasks
import train
from engine.errors import UserError
from engine.flags import positive_int
from engine.models import load_model, load_tokenizer, resolve_model
from tasks.prompts import encode, prompted, render

# Flags of train.py that mean something here; any other must keep its default.
TAKEN = """algo model data data_root steps num_prompts num_generations max_prompt_length temperature
    max_completion_length judge_thoughts learning_rate steps_per_generation num_iterations epsilon
    epsilon_high beta kl_mask seed report_to output_dir lora_rank save_steps adam_beta2
    weight_decay max_grad_norm gradient_checkpointing
    system_prompt few_shot instruction chat_template_kwargs preset overwrite embedded
    overlong_cache""".split()  # the last has another default for each --max-completion-length


def parse_args(argv=None):
    """The flags of train.py, and two more. Raises UserError for one that has no effect here."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--per-device-train-batch-size", type=positive_int, default=8, help="at once")
    own.add_argument("--use-vllm", action="store_true", help="vLLM samples, on the same GPUs")
    first, rest = own.parse_known_args(argv)
    args = train.parse_args(["--algo", "tepo", *rest])
    usual = vars(train.parse_args(["--algo", "tepo", "--model", args.model]))
    for name, value in vars(args).items():
        if name not in TAKEN and value != usual[name]:
            raise UserError(f"--{name.replace('_', '-')} has no effect here: leave it out")
    return argparse.Namespace(**vars(args), **vars(first))


def config(args, processes):
    """The GRPOConfig of our flags. One optimizer step takes one of our mini-batches.

    Raises UserError for what cannot be cut evenly, and for what makes TEPO another method.
    """
    completions = args.num_prompts * args.num_generations // args.steps_per_generation
    each = args.per_device_train_batch_size * processes  # completions of a micro-batch, everywhere
    if completions % each:
        raise UserError(
            f"an update has {completions} completions: not a multiple of {each}, which is "
            f"--per-device-train-batch-size times {processes} processes"
        )
    updates = args.steps_per_generation * args.num_iterations  # of a rollout
    if updates == 1:
        raise UserError(
            "with one update for each rollout every ratio is 1 and TEPO is DAPO: raise "
            "--num-iterations or --steps-per-generation"
        )
    return GRPOConfig(
        output_dir=args.output_dir or "runs/trl_tepo",
        max_steps=args.steps * updates,
        num_generations=args.num_generations,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=completions // each,
        steps_per_generation=completions // each * args.steps_per_generation,
        num_iterations=args.num_iterations,
        max_completion_length=args.max_completion_length,
        temperature=args.temperature,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=args.adam_beta2,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        beta=0.0,
        epsilon=args.epsilon,
        epsilon_high=args.epsilon_high,
        seed=args.seed,
        report_to=args.report_to,
        logging_steps=1,
        save_strategy="steps" if args.save_steps else "no",
        save_steps=max(args.save_steps, 1) * updates,
        use_vllm=args.use_vllm,
        vllm_mode="colocate",
        vllm_importance_sampling_correction=False,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=args.gradient_checkpointing,
    )


def trainer_arguments(args):
    """Model, reward, settings, prompts and adapters, as a dict for GRPOTrainer.

    Raises UserError for flags that cannot be, and for a model or data that cannot be read.
    """
    settings = config(args, int(os.environ.get("WORLD_SIZE", 1)))
    name = resolve_model(args.model)
    tokenizer = load_tokenizer(name)
    task = tasks.load(args.data, "train", args.data_root, args.judge_thoughts)
    problems = encode(prompted(task.problems, tokenizer, args), tokenizer, args.max_prompt_length)
    texts = [render(problem, tokenizer)[0] for problem in problems]

    def reward(completion_ids, number, **_):
        found = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return [task.reward(problems[i], text) for i, text in zip(number, found)]

    peft_config = None
    if args.lora_rank:
        from peft import LoraConfig

        peft_config = LoraConfig(r=args.lora_rank, target_modules="all-linear")
    return dict(
        model=load_model(name, "cpu"),
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list(
            [{"prompt": text, "number": i} for i, text in enumerate(texts)]
        ),
        processing_class=tokenizer,
        peft_config=peft_config,
        prompt_ids=dict(zip(texts, (problem["prompt_ids"] for problem in problems))),
    )
