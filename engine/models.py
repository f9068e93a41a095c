"""A model and the machine it runs on: device, weights, threads, memory, stop tokens."""

import logging
import os
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from engine.errors import UserError
from engine.runs import ROOT, latest_checkpoint

CHAT_ENDS = ("<|im_end|>", "<|eot_id|>")  # end a chat turn, also where the eos is another token
OWNERS = {
    "Qwen": "Qwen",
    "Llama-3": "meta-llama",
    "Mistral-": "mistralai",
    "DeepSeek-R1-Distill": "deepseek-ai",
}


def pick_device(name="auto"):
    """The torch device of that name; "auto" is the best of this machine.

    Raises UserError when this machine has none.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in present.items() if there)
    if not present[name]:
        raise UserError(
            f"--device {name}: this machine (or this build of torch {torch.__version__}) has none; "
            "use --device cpu"
        )
    return torch.device(name)


def resolve_model(name):
    """What --model means: a directory, a run of train.py (its last checkpoint), or a hub id.

    "tiny" is the embedded model, from wherever a script is called. A known owner may be left out:
    Qwen2.5-1.5B becomes Qwen/Qwen2.5-1.5B. Raises UserError when the name can only be a directory
    and there is none.
    """
    if name == "tiny":
        return str(ROOT / "tiny")
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").exists():
            return str(path)
        return str(latest_checkpoint(path) or path)
    if "/" not in name:
        for prefix, owner in OWNERS.items():
            if name.startswith(prefix):
                return f"{owner}/{name}"
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise UserError(
            f"--model {name}: there is no such directory, and a hub id is OWNER/NAME "
            f"(or starts with {', '.join(OWNERS)})"
        )
    return name


def from_hub_or_disk(loader, name, **options):
    """`loader.from_pretrained(name, **options)`. Its many errors become a UserError of one line."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # The hub's client logs a dozen lines of retries; what went wrong is said below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return loader.from_pretrained(name, **options)
    except Exception as error:  # of many kinds, from a folder of which anything may be wrong
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        if os.path.isdir(name):
            raise UserError(f"--model {name} cannot be loaded: {reason}") from error
        raise UserError(
            f"--model {name}: not on this machine and not to be had from the hub ({reason}); check "
            "the name, log in if it is gated (hf auth login), or download it where there is a "
            "network (hf download) and give its directory"
        ) from error


def load_tokenizer(name):
    """The tokenizer of a directory or a hub id. Raises UserError when it cannot be had."""
    from transformers import AutoTokenizer

    if not os.path.isdir(name):  # without a network the search takes most of a minute
        print(f"looking for {name} in the cache and on the hub", flush=True)
    return from_hub_or_disk(AutoTokenizer, name)


def has_adapters(name):
    """Whether a directory holds low-rank adapters, as a checkpoint of train.py --lora-rank does."""
    return (Path(name) / "adapter_model.safetensors").exists()


def load_model(name, device, dtype=torch.float32):
    """The causal language model of a directory or a hub id, in eval mode.

    Weights are fp32 by default: at a learning rate of 1e-6 an update is lost in the rounding of
    bf16 weights. Adapters of a --lora-rank run are merged into their model.
    Raises UserError when the model cannot be had.
    """
    from transformers import AutoModelForCausalLM

    if has_adapters(name):
        try:
            from peft import AutoPeftModelForCausalLM
        except ImportError:
            raise UserError(f"--model {name} holds adapters: pip install peft") from None
        model = from_hub_or_disk(AutoPeftModelForCausalLM, name, dtype=dtype, use_safetensors=True)
        model = model.merge_and_unload().requires_grad_(True)
    else:
        model = from_hub_or_disk(AutoModelForCausalLM, name, dtype=dtype, use_safetensors=True)
    return model.to(device).eval()


def add_adapters(model, rank, checkpoint=None):
    """The model with LoRA adapters on every linear layer, fresh or from a checkpoint.

    All else is frozen. Raises UserError where peft is not installed.
    """
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError:
        raise UserError("--lora-rank needs peft: pip install peft") from None
    if checkpoint:
        return PeftModel.from_pretrained(model, checkpoint, is_trainable=True).eval()
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(model, config).eval()


def recompute_activations(model):
    """Gradient checkpointing: the backward pass computes each layer anew. Returns how many layers.

    transformers' own checkpoints layers in train mode only, and there dropout and the noise of
    routers are on: two passes over the same tokens would disagree, and no first ratio would be 1.
    Here the model stays in eval mode. Call it once.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = partial(recomputed, layer.forward)
    return len(layers)


def recomputed(forward, *arguments, **options):
    """What `forward` returns. Where there is a gradient, its activations are not kept."""
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options)


def fastest_thread_count(model):
    """How many threads to use on a CPU: all or one, whichever is faster in a few forward passes.

    For a small model, or on a busy machine, it can be one.
    """
    if hasattr(os, "sched_getaffinity"):
        every = len(os.sched_getaffinity(0))  # a container's own, not the host's
    else:
        every = os.cpu_count() or 1
    small = sum(p.numel() for p in model.parameters()) < 50e6
    ids = torch.zeros((64, 48) if small else (8, 16), dtype=torch.long)
    seconds = {}
    for threads in (1, every):
        torch.set_num_threads(threads)
        with torch.no_grad():
            model(input_ids=ids)  # warm-up
            start = time.perf_counter()
            for _ in range(3):
                model(input_ids=ids)
        seconds[threads] = time.perf_counter() - start
    return min(seconds, key=seconds.get)


def set_threads(model, device, threads):
    """Sets the number of CPU threads and returns it. threads: 0 takes the fastest count."""
    if torch.device(device).type != "cpu":
        return threads
    threads = threads or fastest_thread_count(model)
    torch.set_num_threads(threads)
    return threads


def head_dim(config):
    """The width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def memory_estimate(model, device, args, longest_prompt, reference=False):
    """What a run of train.py will hold, in GB: weights, optimizer, cache, activations. As a dict.

    It is computed, not measured. Of the last two the larger counts: sampling and updating take
    turns. args: the flags of train.py; longest_prompt: in tokens; reference: whether a frozen copy
    of the model is kept.
    """
    config = model.config.get_text_config()
    on_gpu = device.type == "cuda"
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    if reference:
        weights *= 2
    if on_gpu:
        weights += 2 * trained  # autocast's bf16 copies
    optimizer = 12 * trained  # fp32 gradients and AdamW's two moments

    size = 2 if on_gpu else 4  # bytes of a number in autocast's precision
    cached = model.dtype.itemsize  # autocast leaves keys and values in the precision of weights
    layers = config.num_hidden_layers
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    rows = min(args.rollout_batch_size, args.num_prompts * args.num_generations)
    columns = longest_prompt + args.max_completion_length
    cache = 2 * layers * kv_heads * head_dim(config) * cached * rows * columns

    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    layer = 37 * width + 4 * size * inner  # bytes a token, counted once with saved_tensors_hooks
    if args.gradient_checkpointing:
        activations = layers * 4 * width + layer
    else:
        activations = layers * layer
    return {
        "weights": weights / 1e9,
        "optimizer": optimizer / 1e9,
        "cache": cache / 1e9,
        "activations": activations * args.max_tokens_per_batch / 1e9,
    }


def stop_token_ids(model, tokenizer):
    """Every token that ends a completion, sorted.

    The tokenizer's eos, those of the generation_config, and the chat template's end of turn.
    """
    named = model.generation_config.eos_token_id
    stops = list(named) if isinstance(named, list) else [named]
    stops.append(tokenizer.eos_token_id)
    template = str(tokenizer.chat_template or "")
    vocabulary = tokenizer.get_vocab()
    stops += [vocabulary[end] for end in CHAT_ENDS if end in template and end in vocabulary]
    return sorted({stop for stop in stops if stop is not None})


def positions_of(model):
    """How many tokens prompt and completion can be together; a billion where there is no limit.

    With longrope or dynamic scaling it is the length up to which rotary frequencies are fixed. A
    longer sample would change them for its whole batch.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or 10**9
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        original = rope.get("original_max_position_embeddings")
        return original or getattr(config, "original_max_position_embeddings", None) or limit
    return limit


def check_positions(model, tokens):
    """Raises UserError when prompt and completion can be longer than the model's positions.

    tokens: of both together, at most.
    """
    limit = positions_of(model)
    if tokens > limit:
        raise UserError(
            f"prompt and completion can take {tokens} tokens and the model has {limit} positions: "
            "lower --max-completion-length, or --max-prompt-length (longer prompts are left out)"
        )
