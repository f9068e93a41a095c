"""Rollout: load a model, sample completions from it, and score them. Knows models, not rewards.

`sample` draws G completions for each prompt: the prompt is prefilled once and its key/value cache is shared out to the G
samples, rows leave the batch as they end, and a token is drawn from plain softmax(logits / temperature). Nothing of the
model's generation_config takes part: its top_k, top_p or repetition penalty would make the sampler another distribution
than the one that the policy gradient differentiates.

`score` gives the log-prob of every sampled token and the entropy of the distribution it came from, with gradient. Both
are taken at the sampler's temperature, so that before any update the sampler's log-probs and the scorer's agree. The LM
head runs only where a completion token is predicted, and in chunks, so that no [B, T, V] tensor ever exists.

A sample is a dict: prompt_ids and completion_ids (lists of token ids; the completion ends with its stop token, unless
it is truncated), logp (the sampler's, a list), truncated (bool).
"""

import os
import time
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from data import UserError
from runs import latest_checkpoint

LOGITS_AT_ONCE = 2**25  # logits in one chunk of the LM head: 128 MB in fp32, whatever the vocabulary
SPREAD = 1.5  # in a micro-batch the longest sample has at most so many times the tokens of the shortest
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
    if path.is_dir():
        return str(path if (path / "config.json").exists() else latest_checkpoint(path) or path)
    if name == "tiny":
        return str(Path(__file__).parent / "tiny")
    owner = next((owner for prefix, owner in OWNERS.items() if name.startswith(prefix)), None)
    if "/" not in name and owner:
        return f"{owner}/{name}"
    if "/" not in name or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"--model {name}: there is no such directory, and a hub id is OWNER/NAME (or starts with {', '.join(OWNERS)})")
    return name


def from_hub_or_disk(loader, name, **options):
    """`loader.from_pretrained`, with the many ways in which it can fail turned into one line."""
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
    """The tokenizer of a directory or a hub id."""
    from transformers import AutoTokenizer

    if not os.path.isdir(name):
        print(f"looking for {name} in the cache and on the hub", flush=True)  # without a network that takes most of a minute
    return from_hub_or_disk(AutoTokenizer, name)


def load_model(name, device, dtype=torch.float32):
    """The causal language model of a directory or a hub id, without dropout.

    Weights are fp32 by default: at a learning rate of 1e-6 an update is lost in the rounding of bf16 weights.
    Raises UserError with one line when the model cannot be had.
    """
    from transformers import AutoModelForCausalLM

    model = from_hub_or_disk(AutoModelForCausalLM, name, dtype=dtype, use_safetensors=True)
    for module in model.modules():  # dropout would make two passes over the same tokens disagree, and the ratio with them
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # F.dropout with a rate of the module's own
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model.to(device).eval()


def fastest_thread_count(model):
    """Measures a few forward passes with one thread and with all: for a small model, or on a busy machine, one is faster."""
    if sum(p.numel() for p in model.parameters()) > 50e6:
        return os.cpu_count() or 1
    ids, seconds = torch.zeros(64, 48, dtype=torch.long), {}
    for threads in (1, os.cpu_count() or 1):
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
    optimizer = 12 * trained  # fp32 gradients and AdamW's two moments
    layers, width = config.num_hidden_layers, config.hidden_size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    rows = min(args.rollout_batch_size, args.num_prompts * args.num_generations)
    cache = 2 * layers * heads * head_dim * 4 * rows * (longest_prompt + args.max_completion_length)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    layer = 30 * width + (8 if device.type == "cuda" else 16) * inner  # bytes a token, counted with saved_tensors_hooks
    kept = layers * 4 * width + layer if args.gradient_checkpointing else layers * layer
    parts = {"weights": weights, "optimizer": optimizer, "cache": cache, "activations": kept * args.max_tokens_per_batch}
    return {name: size / 1e9 for name, size in parts.items()}


def stop_token_ids(model, tokenizer):
    """Every token that ends a completion: the tokenizer's eos, those of the generation_config, the chat template's end of turn."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    template, vocabulary = str(tokenizer.chat_template or ""), tokenizer.get_vocab()
    named += [vocabulary[token] for token in CHAT_ENDS if token in template and token in vocabulary]
    return sorted({token for token in [tokenizer.eos_token_id, *named] if token is not None})


def check_positions(model, tokens):
    """Raises UserError when prompt and completion together can be longer than the model has positions for."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and tokens > limit:
        raise UserError(f"prompt and completion can take {tokens} tokens and the model has {limit} positions: lower --max-completion-length")


def draw(logits, uniform, temperature):
    """One token a row from softmax(logits / temperature), by inverting its distribution function at `uniform`.

    logits: [B, V]; uniform: [B] in [0, 1); temperature 0 takes the most likely token. Returns the tokens [B] and their
    log-probs [B]. One number a row decides, so what a row draws does not depend on which other rows are in the batch.
    """
    scaled = logits.float() / (temperature or 1.0)  # [B, V]
    probs = torch.softmax(scaled, dim=-1)
    top, best = scaled.max(dim=-1, keepdim=True)  # [B, 1]
    if temperature == 0:
        token = best
    else:
        cdf = probs.cumsum(dim=-1)
        threshold = uniform.unsqueeze(1) * cdf[:, -1:]  # the sum is 1 only up to rounding
        token = torch.searchsorted(cdf, threshold, right=True).clamp(max=logits.shape[1] - 1)
    logp = scaled.gather(1, token) - top + probs.gather(1, best).log()  # the log of an unlikely token's prob would lose digits
    return token.squeeze(1), logp.squeeze(1)


@torch.no_grad()
def sample(model, prompts, num_generations, *, max_completion_length, temperature, stop_ids, generator):
    """Samples `num_generations` completions for each prompt, all at once: the caller bounds the number of rows.

    prompts: list of lists of token ids; max_completion_length in tokens, the stop token included; stop_ids: the tokens
    that end a completion; generator: a CPU torch.Generator, the only source of randomness (the same on every device).
    Returns a list of samples (see above), those of one prompt next to each other.
    """
    model.eval()  # in train mode gradient checkpointing turns the cache off, and decoding becomes quadratic
    device, G, T = model.device, num_generations, max_completion_length
    B, L = len(prompts) * G, max(map(len, prompts))
    uniforms = torch.rand(B, T, generator=generator).T.to(device)  # a row's own numbers, whatever shares its batch
    stop = torch.tensor(stop_ids, device=device)

    # Prefill each prompt once, left-padded so that all end at the same place; then share the cache out to its G samples.
    ids = torch.tensor([[0] * (L - len(prompt)) + prompt for prompt in prompts], device=device)  # [B/G, L]
    mask = torch.tensor([[0] * (L - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    cache.batch_repeat_interleave(G)
    logits, mask = out.logits[:, -1].repeat_interleave(G, dim=0), mask.repeat_interleave(G, dim=0)
    position = positions[:, -1:].repeat_interleave(G, dim=0)  # [B, 1]

    tokens = torch.zeros(B, T, dtype=torch.long, device=device)
    logps = torch.zeros(B, T, device=device)
    lengths = torch.full((B,), T, device=device)
    truncated = torch.ones(B, dtype=torch.bool, device=device)
    alive = torch.arange(B, device=device)  # the rows still being written
    for t in range(T):
        token, logp = draw(logits, uniforms[t, alive], temperature)
        tokens[alive, t], logps[alive, t] = token, logp
        ended = torch.isin(token, stop)
        lengths[alive[ended]], truncated[alive[ended]] = t + 1, False
        going = (~ended).nonzero().squeeze(1)
        if len(going) == 0 or t == T - 1:
            break
        if len(going) < len(alive):
            cache.batch_select_indices(going)
            alive, token, mask, position = alive[going], token[going], mask[going], position[going]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        position = position + 1
        out = model(input_ids=token.unsqueeze(1), attention_mask=mask, position_ids=position, past_key_values=cache)
        logits = out.logits[:, -1]

    return [
        {"prompt_ids": prompts[row // G], "completion_ids": row_tokens[:n], "logp": row_logps[:n], "truncated": cut}
        for row, (row_tokens, row_logps, n, cut) in enumerate(
            zip(tokens.tolist(), logps.tolist(), lengths.tolist(), truncated.tolist())
        )
    ]


def collate(samples, pad_id, device):
    """Samples as tensors for `score` and the losses; what stands in the padding never matters.

    Returns a dict: input_ids [B, L] (prompt, completion, then padding), predicts bool [B, L] (True where the next token
    is a completion token), completion_ids [B, T] and mask bool [B, T]. The mask comes from the completions' lengths,
    never from comparing ids with the padding token, which is the end-of-text token of many models.
    """
    B, T = len(samples), max(len(s["completion_ids"]) for s in samples)
    L = max(len(s["prompt_ids"]) + len(s["completion_ids"]) for s in samples)
    input_ids, completion_ids = torch.full((B, L), pad_id), torch.full((B, T), pad_id)
    predicts, mask = torch.zeros(B, L, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    for row, s in enumerate(samples):
        prompt, completion = s["prompt_ids"], s["completion_ids"]
        p, n = len(prompt), len(completion)
        input_ids[row, : p + n] = torch.tensor(prompt + completion)
        completion_ids[row, :n] = torch.tensor(completion)
        predicts[row, p - 1 : p + n - 1] = True
        mask[row, :n] = True
    batch = {"input_ids": input_ids, "predicts": predicts, "completion_ids": completion_ids, "mask": mask}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def micro_batches(samples, max_tokens):
    """Packs samples, sorted by length, into lists of at most `max_tokens` padded tokens (one sample at least).

    A list also ends where the next sample is SPREAD times as long as its first, so that little of a batch is padding: the
    embedded model writes short or long completions and seldom others, and its updates take about a fifth less time.
    """
    length = lambda s: len(s["prompt_ids"]) + len(s["completion_ids"])  # noqa: E731
    packed = []
    for sample in sorted(samples, key=length):  # the newest is the longest
        if not packed or (len(packed[-1]) + 1) * length(sample) > max_tokens or length(sample) > SPREAD * length(packed[-1][0]):
            packed.append([])
        packed[-1].append(sample)
    return packed


def token_statistics(hidden, targets, head, softcap, temperature):
    """Log-probs [N] of the targets [N] and entropies [N] (in nats, without gradient) from hidden states [N, D]."""
    logits = head(hidden).float()  # [N, V]; log-softmax in fp32 under autocast too
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    normaliser = logits.logsumexp(dim=-1)
    logp = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - normaliser
    with torch.no_grad():
        entropy = normaliser - (torch.softmax(logits, dim=-1) * logits).sum(dim=-1)
    return logp, entropy.detach()


def score(model, batch, temperature):
    """Log-probs (with gradient where it is enabled) and entropies of the completion tokens, both [B, T], 0 in the padding.

    batch: from `collate`. Rows are right-padded and attention is causal, so no real token sees the padding and no
    attention mask is needed. Every chunk but a single one is recomputed in the backward pass instead of being kept.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft wraps the model
    head, softcap = causal_lm.get_output_embeddings(), getattr(causal_lm.config, "final_logit_softcapping", None)
    hidden = causal_lm.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state  # [B, L, D]
    hidden, targets = hidden[batch["predicts"]], batch["completion_ids"][batch["mask"]]  # [N, D], [N]

    chunk = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    parts = []
    for h, y in zip(hidden.split(chunk), targets.split(chunk)):
        arguments = (h, y, head, softcap, temperature)
        if len(targets) > chunk and torch.is_grad_enabled():
            parts.append(checkpoint(token_statistics, *arguments, use_reentrant=False))
        else:
            parts.append(token_statistics(*arguments))
    logp, entropy = (torch.cat(column) for column in zip(*parts))
    empty = torch.zeros(batch["mask"].shape, device=logp.device)  # [B, T]
    return empty.masked_scatter(batch["mask"], logp), empty.masked_scatter(batch["mask"], entropy)
