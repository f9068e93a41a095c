"""A model and the machine it runs on: device, weights, threads, memory, stop tokens."""

import copy
import logging
import os
import re
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from engine.errors import UserError, printable, reason
from engine.files import fingerprint, read_json
from engine.runs import ROOT, checkpoints, own_checkpoints, settings_of

CHAT_ENDS = ("<|im_end|>", "<|eot_id|>")  # end a chat turn, also where the eos is another token
OLD_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
# What a config counts and transformers makes one by one. No model has so many.
COUNTED = re.compile(r"(num|n)_(\w+_)?(blocks|codebooks|experts|labels|layers?)|depth")
MOST_COUNTED = 10_000
OWNERS = {
    "Qwen": "Qwen",
    "Llama-3": "meta-llama",
    "Mistral-": "mistralai",
    "DeepSeek-R1-Distill": "deepseek-ai",
    "SmolLM2": "HuggingFaceTB",
    "gemma-3-": "google",
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
    """What --model means: a directory, a run of train.py (its last checkpoint), a .gguf file or a
    folder with one, or a hub id.

    "tiny" is the embedded model, from wherever a script is called. A known owner may be left out:
    Qwen2.5-1.5B becomes Qwen/Qwen2.5-1.5B. A directory is returned with its whole path, since
    adapters remember the model that they were made for. Raises UserError when the name can only be
    a directory and there is none.
    """
    if name == "tiny":
        return str(ROOT / "tiny")
    path = Path(os.path.expanduser(name)).absolute()
    if os.path.isdir(path):  # False for names that no file can have
        if (path / "config.json").exists() or has_adapters(path):
            return str(path)
        found = own_checkpoints(path) if "run" in settings_of(path) else checkpoints(path)
        found = found or only_gguf(path)
        return str(found[-1] if found else path)
    if is_gguf(name):
        if not os.path.isfile(path):
            raise UserError(f"--model {name}: there is no such file")
        return str(path)
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


def is_gguf(name):
    """Whether a name is that of a GGUF file, in which llama.cpp keeps a whole model."""
    return str(name).endswith(".gguf")


def only_gguf(folder):
    """The .gguf file in a folder, as a list; [] where there is none. Raises UserError for several.

    They would be one model in several precisions.
    """
    found = sorted(path for path in folder.iterdir() if is_gguf(path))
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise UserError(f"--model {folder} holds several GGUF files ({names}): name one of them")
    return found


def from_hub_or_disk(loader, name, **options):
    """`loader.from_pretrained(name, **options)`. Its many errors become a UserError of one line.

    name: a directory, a .gguf file or a hub id.
    """
    from transformers.utils.logging import disable_progress_bar, set_verbosity

    disable_progress_bar()
    # The hub's client logs a dozen lines of retries, and transformers quotes a config as it is;
    # what went wrong is said below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    set_verbosity(logging.CRITICAL)
    try:
        if is_gguf(name):
            options["gguf_file"] = os.path.basename(name)
            name = os.path.dirname(name)
            require_gguf()
        check_counts(name)
        # The code that a model's folder may bring is never run, and nobody is asked about it.
        return loader.from_pretrained(name, trust_remote_code=False, **options)
    except UserError:
        raise
    except Exception as error:  # of many kinds, from a folder of which anything may be wrong
        why = reason(error)
        if "ignore_mismatched_sizes" in why:
            why = "its tensors have other shapes than its config.json says"
        if os.path.isdir(name):
            raise UserError(f"--model {name} cannot be loaded: {why}") from error
        raise UserError(
            f"--model {name}: not on this machine and not to be had from the hub ({why}); check "
            "the name, log in if it is gated (hf auth login), or download it where there is a "
            "network (hf download) and give its directory"
        ) from error


def require_gguf():
    """Raises UserError where the package that reads GGUF files is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("a .gguf file needs: pip install gguf") from None


def check_counts(name):
    """Raises UserError when a model's config.json counts a billion layers, and would be a hang.

    name: a directory or a hub id. Raises what transformers raises when a hub id cannot be had.
    """
    from transformers import PretrainedConfig

    if os.path.isdir(name):
        parts = [read_json(Path(name) / "config.json")]
    else:
        parts = [PretrainedConfig.get_config_dict(name)[0]]
    for part in parts:
        parts += [value for value in part.values() if isinstance(value, dict)]
        for key, value in part.items():
            if isinstance(value, int) and value > MOST_COUNTED and COUNTED.fullmatch(key):
                raise UserError(f"--model {name}: its config.json has {key} {value:.3g}")


def load_tokenizer(name):
    """The tokenizer of a directory or a hub id. Raises UserError when it cannot be had."""
    from transformers import AutoTokenizer

    if not os.path.exists(name):  # without a network the search takes most of a minute
        print(f"looking for {printable(name)} in the cache and on the hub", flush=True)
    tokenizer = from_hub_or_disk(AutoTokenizer, name)
    try:
        tokenizer.decode(tokenizer("1 + 1").input_ids)
    except Exception as error:  # wrong values of its config show first when it is used
        raise UserError(f"--model {name}: its tokenizer fails: {reason(error)}") from error
    return tokenizer


def has_adapters(name):
    """Whether a directory holds low-rank adapters, as a checkpoint of train.py --lora-rank does."""
    return (Path(name) / "adapter_model.safetensors").exists()


def load_model(name, device, dtype=torch.float32):
    """The causal language model of a directory or a hub id, in eval mode.

    Weights are fp32 by default: at a learning rate of 1e-6 an update is lost in the rounding of
    bf16 weights. Adapters of a --lora-rank run are merged into their model.
    Raises UserError when the model cannot be had, when tensors are missing, left over or of another
    shape, and when weights are not finite.
    """
    from transformers import AutoModelForCausalLM

    if has_adapters(name):
        base = base_of_adapters(name)
        model = load_model(base, device, dtype)
        digest = read_json(Path(name) / "trainer.json").get("base")
        known = isinstance(digest, str) and digest.startswith(str(dtype))
        if known and digest != base_digest(model):
            raise UserError(
                f"--model {name}: its base model {base} has changed since these adapters were "
                "trained"
            )
        model = add_adapters(model, None, name).merge_and_unload().requires_grad_(True)
    else:
        read_json(Path(name) / "generation_config.json")  # transformers ignores a damaged one
        model, found = from_hub_or_disk(
            AutoModelForCausalLM,
            name,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
        check_tensors(name, found["missing_keys"], found["unexpected_keys"])
        if is_gguf(name):
            model = plain_copy(model)
    check_finite(model, f"--model {name}")
    return model.to(device).eval()


def plain_copy(model):
    """A model as transformers makes it from a config: one that was read from GGUF cannot be saved.

    Its weights are full numbers already.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def check_tensors(name, missing, unexpected):
    """Raises UserError when tensors are missing, which would be random numbers, or left over.

    missing, unexpected: their names. Old checkpoints hold buffers that today's models compute.
    """
    unexpected = [key for key in unexpected if not key.endswith(OLD_BUFFERS)]
    for keys, what in ((missing, "has no tensor"), (unexpected, "has a tensor that is no part of")):
        if keys:
            first = ", ".join(sorted(keys)[:3])
            raise UserError(
                f"--model {name} {what} {first} ({len(keys)} in all): its weights and its "
                "config.json do not belong together"
            )


def check_finite(model, what):
    """Raises UserError when a weight is NaN or infinite. what: whose weights, for the message."""
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            raise UserError(f"{what}: the weights are not finite ({name})")


def base_digest(model):
    """The type of a model's weights and their fingerprint, as a text."""
    return f"{model.dtype} {fingerprint(model.named_parameters())}"


def base_of_adapters(name):
    """The model that the adapters in a directory were made for: a directory or a hub id.

    A relative directory counts from here or from the adapters. Raises UserError when it is neither.
    """
    base = read_json(Path(name) / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"--model {name}: adapter_config.json does not name the base model")
    for path in (Path(base), Path(name) / base):
        if path.is_dir():
            base = str(path)
            break
    if has_adapters(base):  # perhaps themselves, without end
        raise UserError(f"--model {name}: its base model {base} holds adapters, too")
    return resolve_model(base)


def add_adapters(model, rank, checkpoint=None):
    """The model with LoRA adapters on every linear layer, fresh or from a checkpoint.

    All else is frozen. Raises UserError where peft is not installed, or the adapters do not fit.
    """
    try:
        from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    except ImportError:
        raise UserError("adapters need peft: pip install peft") from None
    if not checkpoint:
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear"
        )
        return get_peft_model(model, config).eval()
    from safetensors import safe_open

    try:
        adapted = PeftModel.from_pretrained(model, checkpoint, is_trainable=True).eval()
        with safe_open(Path(checkpoint) / "adapter_model.safetensors", "pt") as file:
            saved = set(file.keys())
    except Exception as error:  # of many kinds, as in from_hub_or_disk
        raise UserError(f"{checkpoint}: its adapters cannot be loaded: {reason(error)}") from error
    expected = set(get_peft_model_state_dict(adapted))
    check_tensors(checkpoint, expected - saved, saved - expected)
    return adapted


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
    Raises UserError when one of them is not a token.
    """
    named = model.generation_config.eos_token_id
    stops = list(named) if isinstance(named, list) else [named]
    stops.append(tokenizer.eos_token_id)
    template = str(tokenizer.chat_template or "")
    vocabulary = tokenizer.get_vocab()
    stops += [vocabulary[end] for end in CHAT_ENDS if end in template and end in vocabulary]
    stops = [stop for stop in stops if stop is not None]
    if not all(type(stop) is int and 0 <= stop < 2**63 for stop in stops):
        raise UserError(f"the model's eos_token_id {named!r} is not a token, nor a list of tokens")
    return sorted(set(stops))


def check_tokens(model, lists):
    """Raises UserError when token ids are beyond the model's embedding. lists: of ids."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max((max(ids, default=0) for ids in lists), default=0)
    if largest >= rows:
        raise UserError(
            f"the tokenizer makes token {largest} and the model knows {rows}: "
            "the tokenizer is another model's"
        )


def positions_of(model):
    """How many tokens prompt and completion can be together; a billion where there is no limit.

    With longrope or dynamic scaling it is the length up to which rotary frequencies are fixed. A
    longer sample would change them for its whole batch.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    limit = 10**9 if limit is None else limit
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        original = rope.get("original_max_position_embeddings")
        limit = original or getattr(config, "original_max_position_embeddings", None) or limit
    if type(limit) is not int or limit < 1:
        raise UserError(f"the model's config.json says that it has {limit!r} positions")
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
