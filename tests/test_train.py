"""The training loop end to end on the embedded model: exact resume, exact first ratio, files, and errors in one line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import train
from data import UserError
from runs import read_jsonl, replacing, write_jsonl
from tests.conftest import ROOT, build_checkpoint

SMALL = "--num-prompts 6 --num-generations 4 --max-completion-length 24 --threads 1 --device cpu --steps-per-generation 3".split()
NOISY = ("seconds", "tokens_per_second", "peak_memory_gb")  # what differs between two runs of the same arithmetic


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # `--model tiny` is a path


def run(output_dir, *flags):
    return train.train(train.parse_args([*SMALL, "--output-dir", str(output_dir), *flags]))


def weights(output_dir, step):
    folder = output_dir / f"checkpoint-{step}"
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "trainer.safetensors")}


def exact(rows):
    return [{key: value for key, value in row.items() if not key.startswith(NOISY)} for row in rows]


@pytest.mark.parametrize("flags", [
    "--algo tepo --num-iterations 2 --learning-rate 1e-3 --beta 1",
    "--algo tepo --entropy-change covariance --dynamic-sampling off",
    "--algo grpo --beta 0.1 --weight-decay 0.1",
    "--algo dapo --max-sampling-rounds 2 --overlong filter",
])  # fmt: skip
def test_resuming_is_bit_exact(tmp_path, flags):
    flags = flags.split()
    whole = run(tmp_path / "whole", *flags, "--steps", "4")
    run(tmp_path / "parts", *flags, "--steps", "2")
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:  # a run that died later than its last checkpoint
        file.write(json.dumps({"step": 3, "reward": 9.0}) + '\n{"step": 4, "rew')
    parts = run(tmp_path / "parts", "--resume", "--steps", "4")
    first, second = weights(tmp_path / "whole", 4), weights(tmp_path / "parts", 4)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert exact(parts) == exact(whole)
    written = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert written == parts
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint*")] == ["checkpoint-4"]


def test_a_run_that_died_before_its_first_checkpoint_starts_over(tmp_path):
    whole = run(tmp_path / "whole", "--steps", "1")
    run(tmp_path / "died", "--steps", "1")
    import shutil

    shutil.rmtree(tmp_path / "died" / "checkpoint-1")
    assert exact(run(tmp_path / "died", "--resume")) == exact(whole)


@pytest.mark.parametrize("algo", ["grpo", "dapo", "tepo"])
@pytest.mark.parametrize("temperature", ["0.7", "1.0"])
def test_the_first_update_has_ratio_one_and_an_empty_kl_mask_and_later_ones_do_not(tmp_path, algo, temperature):
    once = run(tmp_path / "once", "--algo", algo, "--steps", "1", "--steps-per-generation", "1", "--temperature", temperature)
    assert once[0]["updates"] == 1 and once[0]["max_ratio_deviation"] == 0 == once[0]["kl_mask_fraction"] == once[0]["kl"]
    often = run(tmp_path / "often", "--algo", algo, "--steps", "1", "--temperature", temperature, "--dynamic-sampling", "off")
    assert often[0]["updates"] == 3 and often[0]["max_ratio_deviation"] > 0 and often[0]["kl"] > 0
    assert (often[0]["kl_mask_fraction"] > 0) == (algo == "tepo")


@pytest.mark.parametrize("algo", ["grpo", "dapo", "tepo"])
def test_micro_batches_do_not_change_the_update(tmp_path, algo):
    for name, budget in (("one", "100000"), ("many", "60")):
        run(tmp_path / name, "--algo", algo, "--steps", "1", "--max-tokens-per-batch", budget, "--num-iterations", "2")
    one, many = (load_file(tmp_path / name / "checkpoint-1" / "model.safetensors") for name in ("one", "many"))
    start = load_file(ROOT / "tiny" / "model.safetensors")
    for name in one:
        moved = (one[name] - start[name]).abs().max()
        assert moved > 0
        assert (one[name] - many[name]).abs().max() < 0.05 * moved  # Adam magnifies rounding where a gradient is about zero


def test_a_run_leaves_what_it_promises(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = run(tmp_path / "run", "--steps", "2", "--log-completions-steps", "1")
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {"args.json", "metrics.jsonl", "completions.jsonl", "curves.png", "checkpoint-2"}
    expected = """step reward accuracy frac_reward_zero_std completions/mean_length completions/clipped_ratio entropy clip_ratio/low
        clip_ratio/high kl kl_mask_fraction grad_norm max_ratio_deviation tokens_per_second seconds/sample seconds/score
        seconds/update peak_memory_gb""".split()
    assert set(expected) <= set(rows[0])
    completions = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert {c["step"] for c in completions} == {1, 2} and all(c["reward"] in (0.0, 1.0) for c in completions)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-2")
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint-2")
    assert tokenizer("1+2=").input_ids == AutoTokenizer.from_pretrained(ROOT / "tiny")("1+2=").input_ids
    assert model.config.num_key_value_heads == 4


def test_steps_take_fresh_prompts_and_every_epoch_updates(tmp_path):
    rows = run(tmp_path / "run", "--steps", "3", "--num-iterations", "2", "--dynamic-sampling", "off", "--log-completions-steps", "1")
    lines = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    prompts = {step: {line["prompt"] for line in map(json.loads, lines) if line["step"] == step} for step in (1, 2, 3)}
    assert not prompts[1] & prompts[2] and not prompts[2] & prompts[3]
    assert [row["updates"] for row in rows] == [6, 6, 6]


def test_optimizer_flags_reach_the_optimizer(tmp_path):
    flags = {"plain": "", "decay": "--weight-decay 0.5", "beta2": "--adam-beta2 0.5", "clip": "--max-grad-norm 1e-3", "lr": "--learning-rate 1e-4"}
    moved = {}
    for name, extra in flags.items():
        run(tmp_path / name, "--steps", "1", "--dynamic-sampling", "off", *extra.split())
        moved[name] = load_file(tmp_path / name / "checkpoint-1" / "model.safetensors")["model.norm.weight"]
    names = list(moved)
    assert all(not torch.equal(moved[a], moved[b]) for i, a in enumerate(names) for b in names[:i])


def test_refill_trains_on_mixed_groups_only_and_reports_the_reward_of_all(tmp_path):
    rows = run(tmp_path / "run", "--algo", "dapo", "--steps", "1", "--num-generations", "2", "--max-sampling-rounds", "9")
    row = rows[0]
    assert row["groups_trained"] == 6 and row["groups_sampled"] > 6 and row["groups_sampled"] % 6 == 0
    assert row["frac_reward_zero_std"] > 0


def test_a_step_without_any_mixed_group_is_survived(tmp_path):
    """Completions of one token are never right: nothing to learn, nothing to break."""
    for algo in ("dapo", "tepo"):
        rows = run(tmp_path / algo, "--algo", algo, "--max-completion-length", "1", "--steps", "2", "--max-sampling-rounds", "2")
        assert [row["groups_trained"] for row in rows] == [0, 0] and [row["updates"] for row in rows] == [0, 0]
        assert rows[0]["reward"] == (0 if algo == "tepo" else -1)  # overlong punishment: every completion is at the limit


def test_a_step_whose_every_token_is_filtered_out_moves_nothing(tmp_path):
    flags = ["--algo", "grpo", "--overlong", "filter", "--max-completion-length", "1", "--weight-decay", "0.5", "--steps", "2"]
    rows = run(tmp_path / "run", *flags)
    assert [row["updates"] for row in rows] == [0, 0] and rows[0]["entropy"] is None
    after, before = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors"), load_file(ROOT / "tiny" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("algo", ["grpo", "dapo", "tepo"])
def test_a_filtered_completion_has_no_part_in_the_gradient(algo):
    args = train.parse_args(["--algo", algo])
    old = -torch.rand(3, 4) - 0.1
    logp = (old + 0.1 * torch.randn(3, 4)).requires_grad_()
    mask = torch.ones(3, 4, dtype=torch.bool)
    kept = mask & torch.tensor([[True], [False], [True]])
    batch = {"old_logp": old, "old_entropy": torch.ones(3, 4), "advantages": torch.tensor([1.0, -1.0, 0.5]), "mask": mask, "loss_mask": kept}
    totals = {"tokens": 8, "sequences": 2, "mean_logp": 0.0, "mean_advantage": 0.0}
    loss, _ = train.objective(args, batch, logp, torch.ones(3, 4), totals)
    loss.backward()
    assert (logp.grad[1] == 0).all() and (logp.grad[[0, 2]] != 0).any()


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 6])
def test_mini_batches_are_even_after_a_filter(tmp_path, groups, monkeypatch):
    import dapo

    monkeypatch.setattr(dapo, "mixed_groups", lambda scores, G: torch.arange(len(scores) // G) < groups)
    rows = run(tmp_path / "run", "--steps", "1")
    assert rows[0]["groups_trained"] == groups and rows[0]["updates"] == -(-groups // 2)  # 6 prompts in 3 mini-batches: 2 each


def test_a_model_whose_logits_the_scorer_does_not_know_is_refused(tmp_path):
    from transformers import AutoTokenizer, GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(vocab_size=98, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                           initializer_range=0.5, logits_scaling=8.0, eos_token_id=0, pad_token_id=0, bos_token_id=None)  # fmt: skip
    GraniteForCausalLM(config).save_pretrained(tmp_path / "granite")
    AutoTokenizer.from_pretrained(ROOT / "tiny").save_pretrained(tmp_path / "granite")
    with pytest.raises(UserError, match="sampler and scorer differ .* granite"):
        run(tmp_path / "run", "--model", str(tmp_path / "granite"), "--data", "arithmetic", "--dynamic-sampling", "off", "--steps", "1")


def test_a_run_of_another_script_is_refused(tmp_path):
    run(tmp_path / "run", "--steps", "1")
    import eval as evaluation

    for flag in ("--resume", "--overwrite"):
        with pytest.raises(UserError, match="run of"):
            evaluation.main([flag, "--output-dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "checkpoint-1").exists()


@pytest.mark.parametrize("flags, message", [
    ("--model no/such/model/dir", "there is no such directory"),
    ("--model no-such-model", "OWNER/NAME"),
    ("--model nobody/has-this", "nobody/has-this: not on this machine"),
    ("--model Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B: not on this machine"),
    ("--data no-such-data", "unknown"),
    ("--algo dapo --beta 0.1", "dapo has no KL term"),
    ("--algo grpo --kl-mask all", "belongs to --algo tepo"),
    ("--temperature 0", "above 0"),
    ("--num-generations 1", "at least 2"),
    ("--num-prompts 8 --steps-per-generation 3", "equal mini-batches"),
    ("--adam-beta2 2", "adam-beta2"),
    ("--weight-decay -1", "at least 0"),
    ("--overlong-cache -5", "at least 1"),
    ("--threads -1", "at least 0"),
    ("--lora-rank -1", "at least 0"),
    ("--max-grad-norm 0", "above 0"),
    ("--rollout-batch-size 2", "sampled together"),
    ("--max-completion-length 600", "512 positions"),
    ("--preset paper", "real model"),
    ("--steps 0", "at least 1"),
    ("--resume", "needs --output-dir"),
    ("--device cuda", "has none"),
])  # fmt: skip
def test_wrong_input_is_one_line_and_writes_nothing(tmp_path, flags, message):
    if flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path / "new", *flags.split())
    assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


def test_the_terminal_shows_two_lines_at_most_and_exit_code_two(tmp_path):
    for flags in (["--algo", "ppo"], ["--model", "no/such/model/dir"], ["--no-such-flag"]):
        done = subprocess.run([sys.executable, "train.py", *flags, "--output-dir", tmp_path / "new"], capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "new").exists()
        assert len(done.stderr.strip().splitlines()) <= 2, done.stderr


def test_another_run_is_neither_mixed_with_nor_lost(tmp_path):
    run(tmp_path / "run", "--steps", "1")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="--resume, --overwrite"):
        run(tmp_path / "run", "--steps", "1")
    with pytest.raises(UserError, match="leave out --epsilon"):
        run(tmp_path / "run", "--resume", "--epsilon", "0.1")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    run(tmp_path / "run", "--steps", "1", "--overwrite", "--seed", "1")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() != before
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("Dear")
    with pytest.raises(UserError, match="left alone"):
        run(tmp_path / "letters", "--overwrite")
    assert (tmp_path / "letters" / "dear.txt").exists()


def test_an_output_dir_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a directory"):
        run(tmp_path / "file" / "sub")


def test_a_run_trained_from_the_embedded_model_keeps_its_defaults(tmp_path):
    run(tmp_path / "run", "--steps", "1")
    args = train.parse_args(["--model", str(tmp_path / "run")])
    assert args.data == "arithmetic" and args.max_completion_length == 48
    assert train.parse_args(["--model", "Qwen2.5-1.5B"]).gradient_checkpointing
    assert train.parse_args(["--model", "Qwen2.5-1.5B", "--lora-rank", "8"]).learning_rate == 1e-5


def test_without_an_output_dir_every_run_gets_a_fresh_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "tiny", tmp_path / "tiny")
    names = []
    for _ in range(2):
        args = train.parse_args([*SMALL, "--steps", "1"])
        train.train(args)
        names.append(args.output_dir)
    assert names == ["runs/tepo-tiny-1", "runs/tepo-tiny-2"]


def test_nothing_but_train_knows_the_others():
    """The house rules: data.py without torch, the objectives without models, nobody imports train.py."""
    imports = lambda name: [line for line in (ROOT / name).read_text().splitlines() if line.strip().startswith(("import ", "from "))]  # noqa: E731
    assert not any("torch" in line for line in imports("data.py"))
    for name in ("grpo.py", "dapo.py", "tepo.py"):
        allowed = ("import torch", "from grpo import")
        assert all(line.startswith(allowed) for line in imports(name)), name
    for path in ROOT.glob("*.py"):
        assert not any(line.split()[1] == "train" for line in imports(path.name))


def test_lora_trains_adapters_only_and_its_checkpoint_loads_and_resumes(tmp_path):
    pytest.importorskip("peft")
    from models import load_model, resolve_model
    from rollout import collate, score

    flags = ["--lora-rank", "4", "--learning-rate", "1e-3", "--gradient-checkpointing"]
    whole = run(tmp_path / "whole", *flags, "--steps", "2")
    run(tmp_path / "parts", *flags, "--steps", "1")
    parts = run(tmp_path / "parts", "--resume", "--steps", "2")
    assert exact(whole) == exact(parts)
    saved = {name: load_file(tmp_path / name / "checkpoint-2" / "adapter_model.safetensors") for name in ("whole", "parts")}
    assert all(torch.equal(saved["whole"][key], saved["parts"][key]) for key in saved["whole"])
    assert all("lora" in key for key in saved["whole"]) and any(tensor.any() for key, tensor in saved["whole"].items() if "lora_B" in key)
    batch = collate([{"prompt_ids": [5, 6], "completion_ids": [7, 8, 9]}], "cpu")
    trained, base = load_model(resolve_model(str(tmp_path / "whole")), "cpu"), load_model("tiny", "cpu")
    assert not torch.allclose(score(trained, batch, 1.0)[0], score(base, batch, 1.0)[0])
    assert {name for name, p in trained.named_parameters() if p.requires_grad} == {name for name, _ in base.named_parameters()}  # merged
    whole = run(tmp_path / "on", "--model", str(tmp_path / "whole"), "--steps", "1")
    assert whole[0]["sampling_logp_difference"] < 1e-3
    with pytest.raises(UserError, match="holds adapters itself"):
        run(tmp_path / "more", "--model", str(tmp_path / "whole"), "--lora-rank", "2", "--steps", "1")


def test_a_gradient_that_is_not_finite_stops_before_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: torch.tensor(float("nan")))
    with pytest.raises(UserError, match="gradient is nan"):
        run(tmp_path / "run", "--steps", "1")


def test_compiled_decoding_samples_from_the_weights_just_trained(tmp_path, monkeypatch):
    compile = torch.compile
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", lambda step, mode, **options: compile(step, backend="eager", **options))
    flags = ["--learning-rate", "1e-3", "--steps", "3"]
    plain, compiled = run(tmp_path / "plain", *flags), run(tmp_path / "compiled", "--compile", *flags)
    assert [row["completions/mean_length"] for row in compiled] == [row["completions/mean_length"] for row in plain]
    assert all(row["sampling_logp_difference"] < 1e-3 for row in compiled)  # a copy of older weights would be far off
    assert max(row["max_ratio_deviation"] for row in compiled) > 1e-2


def test_a_model_whose_logits_are_not_those_of_its_head_is_refused_before_an_update(tmp_path):
    model = build_checkpoint(tmp_path / "model", "granite", chat_template=None)
    (tmp_path / "data.jsonl").write_text('{"problem": "What is 1 + 1?", "answer": "2"}\n')
    with pytest.raises(UserError, match="log-probs of sampler and scorer differ"):
        run(tmp_path / "run", "--model", model, "--data", str(tmp_path / "data.jsonl"), "--steps", "1", "--dynamic-sampling", "off")
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_what_fails_half_way_leaves_the_old_files_and_nothing_else(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "rows.jsonl", [{"step": 1}])
    with pytest.raises(TypeError):
        write_jsonl(tmp_path / "rows.jsonl", [{"step": 2}, {"step": object()}])
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError))  # killed before the end
        write_jsonl(tmp_path / "rows.jsonl", [{"step": 2}])
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"step": 1}]
    write_jsonl(tmp_path / "rows.jsonl", [{"step": 2}], mode="a")
    write_jsonl(tmp_path / "rows.jsonl", read_jsonl(tmp_path / "rows.jsonl"))
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"step": 1}, {"step": 2}]
    for text in ("old", "new"):
        with replacing(tmp_path / "folder") as folder:
            folder.mkdir()
            (folder / text).write_text("")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "folder") as folder:
        folder.mkdir()
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "rows.jsonl"}
