"""Every model type of which transformers can make a causal language model: run right, or refused?

    python -m experiments.families                       # all of them: some minutes on one core
    python -m experiments.families --only llama phimoe

A tiny model of each type, with large random weights, is given to `rollout.check_model`, as train.py
does before a run. The verdict is one of

    shared      it runs, and a row may hold several completions of a prompt
    plain       it runs, with one completion a row
    refused     check_model says no, in one line
    unsteady    check_model says yes, and the model disagrees with itself: its logits change with
                the tokens behind them (it picks keys by a score, and scores are equal)
    not built   no tiny model of this type could be made here
    WRONG       check_model says yes, and a number is not what the model itself says
    CRASH       something other than a UserError was raised, or it took too long

What passes is tried again on samples that are longer and less even than those of check_model:
log-probs, entropies and gradients against the model's logits of each row alone; and two passes
under gradient checkpointing, which must agree bit for bit. Everything that changes at some distance
(a window, a number of keys that are looked at) is set to 64 tokens, which no sample reaches but
rows of several completions do, and then to 20, which only the longer samples reach. Two verdicts
stand for the two. Dropout and the noise of routers are on in the configs, as in some real ones.
"""

import argparse
import io
import multiprocessing
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout

import torch
from tqdm import tqdm

from engine.errors import UserError
from engine.models import recompute_activations
from rollout import check_model, collate, sample, score

VOCABULARY = 61
LONGEST = 64  # tokens of prompt and completion together, at most
DISTANCES = (64, 20)
TOLERANCE = 5e-3  # in nats; of gradients, relative to the norm

# --------------------------------------------------------------------------------------------------
# Tiny models

SIZES = {  # what a config's numbers become, by their names
    VOCABULARY: "vocab_size decoder_vocab_size vocab_size_per_layer_input",
    256: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions "
    "context_length model_max_length",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner "
    "ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size "
    "moe_shared_expert_intermediate_size shared_intermediate_size mlp_dim intermediate_size_mlp "
    "shared_experts_intermediate_size dense_intermediate_size expert_ffn_hidden_size "
    "feed_forward_size encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size",
    32: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size "
    "output_embedding_size word_embed_proj_dim backbone_hidden_size lru_width "
    "attention_hidden_size hidden_size_global pronunciation_embed_dim shape_embed_dim "
    "index_n_heads",
    28: "image_size",
    16: "kv_lora_rank q_lora_rank o_lora_rank hidden_size_per_layer_input laurel_rank "
    "chunk_size mamba_chunk_size block_size ffn_round_up_to_multiple_of block_multiple_of "
    "ssm_state_size mamba_d_state state_size prompt_length",
    14: "patch_size",
    8: "head_dim d_kv d_head dim_head v_head_dim qk_nope_head_dim qk_rope_head_dim index_head_dim "
    "linear_key_head_dim linear_value_head_dim linear_head_dim swa_head_dim rotary_dim "
    "kv_channels query_pre_attn_scalar attention_head_size mamba_n_heads mamba_d_head "
    "mamba_num_heads mamba_head_dim",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
    "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
    "attention_heads swa_num_attention_heads linear_num_value_heads "
    "linear_num_heads num_experts num_local_experts n_routed_experts moe_num_experts",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_encoder_layers num_decoder_layers num_blocks depth num_layers_per_stack "
    "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads "
    "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k n_groups zero_expert_num",
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts max_window_layers "
    "moe_num_shared_experts first_k_dense_replace num_dense_layers",
    0.3: "initializer_range init_std",
    0.1: "router_jitter_noise input_jitter_noise",
}
SIZES = {name: size for size, names in SIZES.items() for name in names.split()}
DISTANCE = [
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "attention_chunk_size",
    "window_size",
    "local_attention",
    "local_attention_window_len",
    "keep_window_size",
    "index_topk",
    "floor_scale",
    "log_scaling_n_floor",
    "rel_extent",
]
TEXT_TOKENS = ("bos", "eos", "pad", "decoder", "forced", "cls", "sep")  # the others mark pictures
CHANGES = {  # what single types need besides
    "bamba": dict(attn_layer_indices=[1]),
    "cohere_compass_text": dict(
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    ),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4)),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "diffllama": dict(attention_dropout=0.0),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1),
    "falcon_h1": dict(mamba_d_ssm=64),
    "gemma3n_text": dict(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0],
    ),
    "gemma4_text": dict(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
    ),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(num_heads=8),
    "nemotron": dict(num_key_value_heads=2),
    "qwen4_exp_text": dict(
        indexer_n_heads=32,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=20,
        indexer_compress_ratio=4,
    ),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "reformer": dict(axial_pos_shape=(16, 16), axial_pos_embds_dim=(16, 16)),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(
        num_hidden_layers=5,
        layers_block_type=["linear_attention", "linear_attention", "hybrid"]
        + ["linear_attention", "hybrid"],
        attention_hidden_size=64,
        attention_head_dim=16,
        mamba_dt_rank=4,
    ),
    "zamba2": dict(attention_hidden_size=64, attention_head_dim=16),
    "zaya": dict(num_experts_per_tok=1),
}


def one_layer_of_each_kind(config):
    """Changes that keep one layer of each kind, for a config with lists of an entry a layer."""
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 3:
        return {}
    lists = {
        name: list(value)
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == count
    }
    kinds = list(zip(*lists.values()))  # of each layer
    if not kinds:
        return {}
    kept = sorted({kinds.index(kind) for kind in kinds})
    if len(kept) == 1:
        kept.append(count - 1)
    changes = {name: [value[i] for i in kept] for name, value in lists.items()}
    return {**changes, "num_hidden_layers": len(kept)}


def small(config, distance):
    """Changes to a config, by name, that make its model tiny."""
    from transformers import PreTrainedConfig

    changes = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = type(value)(**small(value, distance))
        elif name == "head_dim" and value is None:
            changes[name] = SIZES[name]
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        elif name in DISTANCE:
            changes[name] = distance
        elif name in SIZES:
            changes[name] = SIZES[name]
        elif name.endswith(("_token_id", "_token_index")):
            changes[name] = 0 if name.startswith(TEXT_TOKENS) else VOCABULARY + 8
        elif "drop" in name:
            changes[name] = type(value)(0.1)
    if "kv_lora_rank" in changes:  # latent attention has a key head for each query head
        changes["num_key_value_heads"] = SIZES["num_attention_heads"]
    return {**changes, **one_layer_of_each_kind(config), **CHANGES.get(config.model_type, {})}


def build(kind, distance):
    """A tiny model of a type, with weights so large that its logits are far from flat."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config_class = CONFIG_MAPPING[kind]
    switches = {}
    if getattr(config_class, "use_sliding_window", None) is False:
        switches = {"use_sliding_window": True, "sliding_window": distance, "max_window_layers": 1}
    if getattr(config_class, "is_decoder", None) is False:
        switches["is_decoder"] = True
    changes = {**switches, **small(config_class(**switches), distance)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**changes))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0.0, 0.3)
            else:  # norms and biases, which begin at 1 or 0
                p.add_(0.1 * torch.randn(p.shape))
    model.eval()
    model(input_ids=torch.arange(10).unsqueeze(0), use_cache=False)  # raises for an unsound config
    return model


# --------------------------------------------------------------------------------------------------
# The second trial


def own_statistics(model, samples, temperature):
    """Log-probs and entropies, [n] each, from the model's own logits of each row alone."""
    logps = []
    entropies = []
    for s in samples:
        ids = torch.tensor([s.prompt_ids + s.completion_ids])
        logits = model(input_ids=ids).logits[0, len(s.prompt_ids) - 1 : -1].float() / temperature
        choice = torch.distributions.Categorical(logits=logits)
        logps.append(choice.log_prob(torch.tensor(s.completion_ids)))
        entropies.append(choice.entropy())
    return torch.cat(logps), torch.cat(entropies)


@torch.no_grad()
def is_steady(model, samples):
    """Whether the logits behind a token are the same with and without the tokens that follow it."""
    for s in samples:
        ids = torch.tensor([s.prompt_ids + s.completion_ids])
        whole = model(input_ids=ids).logits[0]
        for end in range(len(s.prompt_ids), ids.shape[1]):
            last = model(input_ids=ids[:, :end]).logits[0, -1]
            if not (last - whole[end - 1]).abs().max() <= TOLERANCE:
                return False
    return True


def gradient(model, logp):
    """The gradient of a weighted sum of log-probs [n], as one vector."""
    model.zero_grad()
    (logp * torch.linspace(-1.0, 1.0, len(logp))).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def trial_samples(model, temperature):
    """Samples of up to 60 tokens, prompt and completion together, of uneven lengths."""
    prompts = [[(11 * i + 5 * n) % VOCABULARY for i in range(n)] for n in (5, 40, 17)]
    return sample(
        model,
        prompts,
        6,
        max_completion_length=20,
        temperature=temperature,
        stop_ids=list(range(0, VOCABULARY, 15)),
        generator=torch.Generator().manual_seed(1),
    )


def second_trial(model, samples, temperature, share_prompts):
    """What is computed wrongly by a model that check_model let pass: a list of short texts."""
    batch = collate(samples, "cpu", share_prompts)
    mask = batch["mask"]
    own_logp, own_entropy = own_statistics(model, samples, temperature)
    own_gradient = gradient(model, own_logp)
    sampled = torch.tensor([logp for s in samples for logp in s.logp])
    logp, entropy = score(model, batch, temperature)
    scored_gradient = gradient(model, logp[mask])
    gaps = {
        "sampled log-probs": (sampled - own_logp).abs().max(),
        "scored log-probs": (logp[mask] - own_logp).abs().max(),
        "entropies": (entropy[mask] - own_entropy).abs().max(),
        "gradient": (scored_gradient - own_gradient).norm() / own_gradient.norm(),
    }
    if recompute_activations(model):
        first, _ = score(model, batch, temperature)
        second, _ = score(model, batch, temperature)
        recomputed = gradient(model, second[mask])
        gaps["two checkpointed passes"] = 0.0 if torch.equal(first, second) else torch.inf
        gaps["checkpointed log-probs"] = (second - logp).abs().max()
        gaps["checkpointed gradient"] = (recomputed - scored_gradient).norm()
        gaps["checkpointed gradient"] /= scored_gradient.norm()
    return [f"{what} {float(gap):.2g} off" for what, gap in gaps.items() if not gap <= TOLERANCE]


# --------------------------------------------------------------------------------------------------
# The sweep


def one_line(error):
    """An exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def judge(kind, distance):
    """(verdict, reason) for one type, with its windows at a distance."""
    try:
        model = build(kind, distance)
    except Exception as error:
        return "not built", one_line(error)
    try:
        share_prompts = check_model(model, LONGEST)
    except UserError as error:
        return "refused", str(error).split("cannot be run here: ")[-1]
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "CRASH", f"{one_line(error)} ({place.filename}, line {place.lineno})"
    try:
        temperature = 0.7
        samples = trial_samples(model, temperature)
        if not is_steady(model, samples):
            return "unsteady", ""
        found = second_trial(model, samples, temperature, share_prompts)
    except Exception as error:
        found = [one_line(error)]
    if found:
        return "WRONG", "; ".join(found)
    reason = "" if model.supports_gradient_checkpointing else "no gradient checkpointing"
    return ("shared" if share_prompts else "plain"), reason


def child(kind, distance, connection):
    """Judges a type in a process of its own, silently."""
    warnings.simplefilter("ignore")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        result = judge(kind, distance)
    connection.send(result)


def judge_apart(kind, distance, seconds):
    """`judge` in a forked process, which neither a crash nor a hang outlives."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(kind, distance, theirs))
    process.start()
    theirs.close()
    try:
        result = ours.recv() if ours.poll(seconds) else ("CRASH", f"not done in {seconds} s")
    except EOFError:
        result = ("CRASH", "the process died")
    process.kill()
    process.join()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these model types only")
    parser.add_argument("--seconds", type=int, default=120, help="time limit of one model")
    args = parser.parse_args()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    torch.set_num_threads(1)
    build("llama", LONGEST)  # what is imported here need not be imported by every child
    counts = {distance: Counter() for distance in DISTANCES}
    for kind in tqdm(args.only or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), disable=None):
        results = [judge_apart(kind, distance, args.seconds) for distance in DISTANCES]
        for distance, (verdict, _) in zip(DISTANCES, results):
            counts[distance][verdict] += 1
        verdicts = " / ".join(dict.fromkeys(verdict for verdict, _ in results))
        reasons = " / ".join(dict.fromkeys(reason for _, reason in results if reason))
        tqdm.write(f"{kind:<24} {verdicts:<16} {reasons}"[:300].rstrip())
    for distance, count in counts.items():
        summary = ", ".join(f"{number} {verdict}" for verdict, number in count.most_common())
        print(f"windows of {distance} tokens: {count.total()} types, {summary}")


if __name__ == "__main__":
    main()
