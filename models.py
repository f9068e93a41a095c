"""A model and the machine it runs on: device, where weights come from, threads, how much memory, which tokens end a completion."""

import copy
import os
import time
from pathlib import Path

import torch

from data import UserError
from products import OneDNNLinear, use_fastest_product
from runs import latest_checkpoint

CHAT_ENDS = ("<|im_end|>", "<|eot_id|>")  # where a chat turn ends, also for base models whose eos is another token


def pick_device(name="auto"):
    """The torch device of that name; "auto" is the best of this machine. Raises UserError when it is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in present.items() if there)
    if not present[name]:
        raise UserError(f"--device {name}: this machine (or this build of torch {torch.__version__}) has none; use --device cpu")
    return torch.device(name)


OWNERS = {"Qwen": "Qwen", "Llama-3": "meta-llama", "Mistral-": "mistralai", "DeepSeek-R1-Distill": "deepseek-ai"}


def resolve_model(name):
    """What --model means: a directory, a run of train.py (its last checkpoint), or a hub id, whose owner may be left out.

    Qwen2.5-1.5B becomes Qwen/Qwen2.5-1.5B; "tiny" is the embedded model wherever the scripts are called from.
    Raises UserError when the name can only be a directory and there is none.
    """
    path = Path(name).expanduser()
    if name == "tiny":
        return str(Path(__file__).parent / "tiny")
    if path.is_dir():
        return str(path if (path / "config.json").exists() else latest_checkpoint(path) or path)
    owner = next((owner for prefix, owner in OWNERS.items() if name.startswith(prefix)), None)
    if "/" not in name and owner:
        return f"{owner}/{name}"
    if "/" not in name or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"--model {name}: there is no such directory, and a hub id is OWNER/NAME (or starts with {', '.join(OWNERS)})")
    return name


def from_hub_or_disk(loader, name, **options):
    """`loader.from_pretrained(name, **options)`, with the many ways in which it can fail turned into one line, a UserError."""
    import logging

    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a dozen lines of retries; what went wrong is said below
    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        if os.path.isdir(name):
            raise UserError(f"--model {name} cannot be loaded: {reason}") from error
        raise UserError(
            f"--model {name}: not on this machine and not to be had from the hub ({reason}); check the name, log in if it is "
            "gated (hf auth login), or download it where there is a network (hf download) and give its directory"
        ) from error


def load_tokenizer(name):
    """The tokenizer of a directory or a hub id. Raises UserError when it cannot be had."""
    from transformers import AutoTokenizer

    if not os.path.isdir(name):
        print(f"looking for {name} in the cache and on the hub", flush=True)  # without a network that takes most of a minute
    return from_hub_or_disk(AutoTokenizer, name)


def head_dim(config):
    """The width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def has_adapters(name):
    """Whether a directory holds low-rank adapters in place of a model: a checkpoint of train.py --lora-rank."""
    return (Path(name) / "adapter_model.safetensors").exists()


def load_model(name, device, dtype=torch.float32):
    """The causal language model of a directory or a hub id, without dropout; adapters of a --lora-rank run are merged into it.

    Weights are fp32 by default: at a learning rate of 1e-6 an update is lost in the rounding of bf16 weights.
    Raises UserError with one line when the model cannot be had.
    """
    from transformers import AutoModelForCausalLM

    if has_adapters(name):
        try:
            from peft import AutoPeftModelForCausalLM
        except ImportError:
            raise UserError(f"--model {name} was trained with --lora-rank: pip install peft") from None
        model = from_hub_or_disk(AutoPeftModelForCausalLM, name, dtype=dtype, use_safetensors=True).merge_and_unload().requires_grad_(True)
    else:
        model = from_hub_or_disk(AutoModelForCausalLM, name, dtype=dtype, use_safetensors=True)
    for module in model.modules():  # dropout would make two passes over the same tokens disagree, and the ratio with them
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # F.dropout with a rate of the module's own
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    if torch.device(device).type == "cpu":
        use_fastest_product(model)
    return model.to(device).eval()


def sampling_copy(model, dtype):
    """A frozen copy of the model with its weights in `dtype`, and its buffers as they are.

    In bf16 the frequencies of rotary positions would be off by a radian at position 1000, and the copy another model.
    """
    twin = copy.deepcopy(model).requires_grad_(False)
    for p in twin.parameters():
        p.data = p.data.to(dtype)
    return twin


def fastest_thread_count(model):
    """How many threads to use on a CPU: all for a model of over 50M parameters, else one or all, whichever is measured to be
    faster in a few forward passes (for a small model, or on a busy machine, it can be one)."""
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # a container's own, not the host's
    if sum(p.numel() for p in model.parameters()) > 50e6:
        return every
    ids, seconds = torch.zeros(64, 48, dtype=torch.long), {}
    for threads in (1, every):
        torch.set_num_threads(threads)
        with torch.no_grad():
            model(input_ids=ids, logits_to_keep=1)  # warm-up
            start = time.perf_counter()
            for _ in range(3):
                model(input_ids=ids, logits_to_keep=1)
        seconds[threads] = time.perf_counter() - start
    return min(seconds, key=seconds.get)


def memory_estimate(model, device, args, longest_prompt):
    """What a run will hold, in GB, computed and not measured: a dict weights, optimizer, cache, activations.

    The larger of the last two counts: sampling and updating take turns. args: the flags of train.py.
    """
    config, parameters = model.config, list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in parameters) * (2 if args.algo == "grpo" and args.beta else 1)
    weights += 2 * trained * (device.type == "cuda")  # autocast's bf16 copies
    weights += sum(p.numel() for p in parameters) * (2 if device.type == "cuda" else 4) * args.compile
    optimizer = 12 * trained  # fp32 gradients and AdamW's two moments
    layers, width = config.num_hidden_layers, config.hidden_size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    rows = min(args.rollout_batch_size, args.num_prompts * args.num_generations)
    size = 2 if device.type == "cuda" else 4  # bytes of a number in autocast's precision
    cache = 2 * layers * heads * head_dim(config) * size * rows * (longest_prompt + args.max_completion_length)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    layer = 37 * width + 4 * size * inner  # bytes a token, counted once with saved_tensors_hooks
    kept = layers * 4 * width + layer if args.gradient_checkpointing else layers * layer
    packed = sum(module.weight.numel() * 4 for module in model.modules() if isinstance(module, OneDNNLinear) and module.few)
    cache += max(0, packed - 4 * trained)  # `packed_weights`, less the gradients, which are not there at that time
    parts = {"weights": weights, "optimizer": optimizer, "cache": cache, "activations": kept * args.max_tokens_per_batch}
    return {name: size / 1e9 for name, size in parts.items()}


def stop_token_ids(model, tokenizer):
    """Every token that ends a completion: the tokenizer's eos, those of the generation_config, the chat template's end of turn."""
    named = model.generation_config.eos_token_id
    named = [*named] if isinstance(named, list) else [named]  # a copy: the model's own list must not grow
    template, vocabulary = str(tokenizer.chat_template or ""), tokenizer.get_vocab()
    named += [vocabulary[token] for token in CHAT_ENDS if token in template and token in vocabulary]
    return sorted({token for token in [tokenizer.eos_token_id, *named] if token is not None})


def positions_of(model):
    """How many tokens prompt and completion can be together: the model's positions, or a billion where it names no limit.

    With longrope or dynamic scaling, as far as the rotary frequencies do not change: beyond, one long sample would change the
    log-probs of its whole batch.
    """
    config = model.config
    limit, rope = getattr(config, "max_position_embeddings", None) or 10**9, getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        return rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None) or limit
    return limit


def check_positions(model, tokens):
    """Raises UserError when prompt and completion together can be longer than the model has positions for."""
    limit = positions_of(model)
    if tokens > limit:
        raise UserError(f"prompt and completion can take {tokens} tokens and the model has {limit} positions: "
                        "lower --max-completion-length, or --max-prompt-length (longer prompts are left out)")  # fmt: skip
