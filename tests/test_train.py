"""train.py end to end on the embedded model: resume, files, steps, the user's mistakes."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import train
from engine.errors import UserError
from engine.files import append_jsonl, read_jsonl, replacing, write_jsonl
from tests.conftest import ROOT, build_checkpoint, names_in

SMALL = f"""--data {ROOT}/tests/sums.py --num-prompts 6 --num-generations 4 --threads 1
    --max-completion-length 24 --device cpu --steps-per-generation 3 --num-iterations 1""".split()
NOISY = ("seconds", "tokens_per_second", "peak_memory_gb")  # differ between runs of the same sums


def run(output_dir, *flags):
    small = [] if "--resume" in flags else SMALL  # a resumed run brings its own
    return train.train(train.parse_args([*small, "--output-dir", str(output_dir), *flags]))


def weights(output_dir, step):
    folder = output_dir / f"checkpoint-{step}"
    model = load_file(folder / "model.safetensors")
    return {**model, **load_file(folder / "trainer.safetensors")}


def exact(rows):
    return [{k: v for k, v in row.items() if not k.startswith(NOISY)} for row in rows]


# --------------------------------------------------------------------------------------------------
# Resume


@pytest.mark.parametrize(
    "flags",
    [
        "--algo tepo --num-iterations 2 --learning-rate 1e-3 --beta 1",
        "--algo tepo --entropy-change covariance --dynamic-sampling off",
        "--algo grpo --beta 0.1 --weight-decay 0.1",
        "--algo dapo --max-sampling-rounds 2 --overlong filter",
    ],
)
def test_resume_is_bit_exact(tmp_path, flags):
    flags = flags.split()
    whole = run(tmp_path / "whole", *flags, "--steps", "4")
    run(tmp_path / "parts", *flags, "--steps", "2")
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:  # it died after its checkpoint
        file.write(json.dumps({"step": 3, "reward": 9.0}) + '\n{"step": 4, "rew')
    parts = run(tmp_path / "parts", "--resume", "--steps", "4")
    first = weights(tmp_path / "whole", 4)
    second = weights(tmp_path / "parts", 4)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert exact(parts) == exact(whole)
    assert read_jsonl(tmp_path / "parts" / "metrics.jsonl") == parts
    assert [path.name for path in (tmp_path / "parts").glob("check*")] == ["checkpoint-4"]


def test_resume_knows_its_model_and_lets_batch_sizes_change(tmp_path):
    model = build_checkpoint(tmp_path / "model", "qwen2")
    rows = [{"problem": f"What is {a} + 1?", "answer": str(a + 1)} for a in range(8)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    flags = ["--model", model, "--data", str(tmp_path / "data.jsonl"), "--algo", "grpo"]
    run(tmp_path / "run", *flags, "--steps", "1")
    smaller = ["--max-tokens-per-batch", "300", "--rollout-batch-size", "8"]
    assert len(run(tmp_path / "run", "--resume", "--steps", "2", *smaller)) == 2


def test_a_run_without_a_checkpoint_starts_over(tmp_path):
    whole = run(tmp_path / "whole", "--steps", "1")
    run(tmp_path / "died", "--steps", "1")
    shutil.rmtree(tmp_path / "died" / "checkpoint-1")
    assert exact(run(tmp_path / "died", "--resume")) == exact(whole)


def test_lora_trains_adapters_only_and_resumes(tmp_path):
    pytest.importorskip("peft")
    from engine.models import load_model, resolve_model
    from rollout import Sample, collate, score

    flags = ["--lora-rank", "4", "--learning-rate", "1e-3", "--gradient-checkpointing"]
    whole = run(tmp_path / "whole", *flags, "--steps", "2")
    run(tmp_path / "parts", *flags, "--steps", "1")
    parts = run(tmp_path / "parts", "--resume", "--steps", "2")
    assert exact(whole) == exact(parts)
    files = [tmp_path / name / "checkpoint-2" for name in ("whole", "parts")]
    first, second = (load_file(file / "adapter_model.safetensors") for file in files)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all("lora" in key for key in first)
    assert any(tensor.any() for key, tensor in first.items() if "lora_B" in key)
    batch = collate([Sample([5, 6], [7, 8, 9])], "cpu")
    trained = load_model(resolve_model(str(tmp_path / "whole")), "cpu")
    base = load_model(resolve_model("tiny"), "cpu")
    assert not torch.allclose(score(trained, batch, 1.0)[0], score(base, batch, 1.0)[0])
    merged = {name for name, p in trained.named_parameters() if p.requires_grad}
    assert merged == {name for name, _ in base.named_parameters()}
    rows = run(tmp_path / "on", "--model", str(tmp_path / "whole"), "--steps", "1")
    assert rows[0]["sampling_logp_difference"] < 1e-3
    with pytest.raises(UserError, match="adapters"):
        run(tmp_path / "more", "--model", str(tmp_path / "whole"), "--lora-rank", "2")


# --------------------------------------------------------------------------------------------------
# A step


@pytest.mark.parametrize("algo", ["grpo", "dapo", "tepo"])
@pytest.mark.parametrize("temperature", ["0.7", "1.0"])
def test_the_first_update_is_on_policy_and_later_ones_are_not(tmp_path, algo, temperature):
    flags = ["--algo", algo, "--steps", "1", "--temperature", temperature]
    (once,) = run(tmp_path / "once", *flags, "--steps-per-generation", "1")
    assert once["updates"] == 1
    assert once["max_ratio_deviation"] == once["kl_mask_fraction"] == once["kl"] == 0
    (often,) = run(tmp_path / "often", *flags, "--dynamic-sampling", "off")
    assert often["updates"] == 3
    assert often["max_ratio_deviation"] > 0
    assert often["kl"] > 0
    assert (often["kl_mask_fraction"] > 0) == (algo == "tepo")


@pytest.mark.parametrize("algo", ["grpo", "dapo", "tepo"])
def test_micro_batches_do_not_change_the_update(tmp_path, algo):
    flags = ["--algo", algo, "--steps", "1", "--num-iterations", "2"]
    run(tmp_path / "one", *flags, "--max-tokens-per-batch", "100000")
    run(tmp_path / "many", *flags, "--max-tokens-per-batch", "60")
    one = load_file(tmp_path / "one" / "checkpoint-1" / "model.safetensors")
    many = load_file(tmp_path / "many" / "checkpoint-1" / "model.safetensors")
    start = load_file(ROOT / "tiny" / "model.safetensors")
    for name in one:
        moved = (one[name] - start[name]).abs().max()
        assert moved > 0
        # Adam magnifies rounding where a gradient is about zero.
        assert (one[name] - many[name]).abs().max() < 0.05 * moved


def test_gradient_checkpointing_changes_no_step(tmp_path):
    flags = ["--steps", "2", "--num-iterations", "2", "--learning-rate", "1e-4"]
    plain = run(tmp_path / "plain", *flags)
    saving = run(tmp_path / "saving", *flags, "--gradient-checkpointing")
    for a, b in zip(exact(plain), exact(saving)):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_steps_take_fresh_prompts_and_every_epoch_updates(tmp_path):
    flags = "--steps 3 --num-iterations 2 --dynamic-sampling off --log-completions-steps 1"
    rows = run(tmp_path / "run", *flags.split())
    lines = read_jsonl(tmp_path / "run" / "completions.jsonl")
    prompts = {step: {r["prompt"] for r in lines if r["step"] == step} for step in (1, 2, 3)}
    assert not prompts[1] & prompts[2]
    assert not prompts[2] & prompts[3]
    assert [row["updates"] for row in rows] == [6, 6, 6]


def test_optimizer_flags_reach_the_optimizer(tmp_path):
    flags = {
        "plain": "",
        "decay": "--weight-decay 0.5",
        "beta2": "--adam-beta2 0.5",
        "clip": "--max-grad-norm 1e-3",
        "lr": "--learning-rate 1e-4",
    }
    moved = []
    for name, extra in flags.items():
        run(tmp_path / name, "--steps", "1", "--dynamic-sampling", "off", *extra.split())
        model = load_file(tmp_path / name / "checkpoint-1" / "model.safetensors")
        moved.append(model["model.norm.weight"])
    for i, a in enumerate(moved):
        assert all(not torch.equal(a, b) for b in moved[:i])


def test_refill_trains_on_mixed_groups_and_reports_all(tmp_path):
    flags = "--algo dapo --steps 1 --num-generations 2 --max-sampling-rounds 9".split()
    (row,) = run(tmp_path / "run", *flags)
    assert row["groups_trained"] == 6
    assert row["groups_sampled"] > 6
    assert row["groups_sampled"] % 6 == 0
    assert row["frac_reward_zero_std"] > 0


@pytest.mark.parametrize("algo", ["dapo", "tepo"])
def test_a_step_without_a_mixed_group_is_survived(tmp_path, algo):
    flags = f"--algo {algo} --max-completion-length 1 --steps 2 --max-sampling-rounds 2".split()
    rows = run(tmp_path / algo, *flags)  # completions of one token are never right
    assert [row["groups_trained"] for row in rows] == [0, 0]
    assert [row["updates"] for row in rows] == [0, 0]
    assert rows[0]["entropy"] is None
    assert rows[0]["reward"] == (0 if algo == "tepo" else -1)  # every completion is at the limit


def test_a_step_whose_completions_are_all_filtered_moves_nothing(tmp_path):
    flags = "--algo grpo --overlong filter --max-completion-length 1 --weight-decay 0.5 --steps 2"
    rows = run(tmp_path / "run", *flags.split())
    assert [row["updates"] for row in rows] == [0, 0]
    after = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    before = load_file(ROOT / "tiny" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_overlong_filter_drops_truncated_completions_only(tmp_path, monkeypatch):
    seen = []
    collate = train.collate
    monkeypatch.setattr(train, "collate", lambda part, *a: seen.extend(part) or collate(part, *a))
    flags = "--algo grpo --overlong filter --max-completion-length 12 --steps 1".split()
    run(tmp_path / "run", *flags)
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert 0 < row["completions/clipped_ratio"] < 1
    assert not any(s.truncated for s in seen)
    assert len(seen) == round(24 * (1 - row["completions/clipped_ratio"]))


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 6])
def test_mini_batches_are_even_after_a_filter(tmp_path, groups, monkeypatch):
    def first_groups(scores, G):
        return torch.arange(len(scores) // G) < groups

    monkeypatch.setattr(train, "mixed_groups", first_groups)
    (row,) = run(tmp_path / "run", "--steps", "1")
    assert row["groups_trained"] == groups
    assert row["updates"] == (groups + 1) // 2  # 6 prompts in 3 mini-batches: 2 each


def test_a_gradient_that_is_not_finite_stops_before_the_weights(tmp_path, monkeypatch):
    def broken(parameters, limit):
        return torch.tensor(float("nan"))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    with pytest.raises(UserError, match="gradient is nan"):
        run(tmp_path / "run", "--steps", "1")


@pytest.mark.parametrize("family", ["qwen2", "granite", "mistral", "gpt2"])
def test_a_real_shaped_model_trains_on_a_data_file(tmp_path, family):
    model = build_checkpoint(tmp_path / "model", family)
    rows = [{"problem": f"What is {a} + 1?", "answer": str(a + 1)} for a in range(8)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    flags = ["--model", model, "--data", str(tmp_path / "data.jsonl"), "--steps", "1"]
    (row,) = run(tmp_path / "run", *flags, "--algo", "grpo")
    assert row["updates"] == 3
    assert row["sampling_logp_difference"] < 1e-3


# --------------------------------------------------------------------------------------------------
# What a run leaves


def test_a_run_leaves_what_it_promises(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = run(tmp_path / "run", "--steps", "2", "--log-completions-steps", "1")
    folder = tmp_path / "run"
    files = {"args.json", "metrics.jsonl", "completions.jsonl", "curves.png", "checkpoint-2"}
    assert names_in(folder) == files
    promised = """step reward task_reward frac_reward_zero_std completions/mean_length
        completions/clipped_ratio entropy clip_ratio/low clip_ratio/high kl kl_mask_fraction
        grad_norm max_ratio_deviation tokens_per_second seconds/sample seconds/score
        seconds/update peak_memory_gb"""
    assert set(promised.split()) <= set(rows[0])
    completions = read_jsonl(folder / "completions.jsonl")
    assert {c["step"] for c in completions} == {1, 2}
    assert all(c["reward"] in (0.0, 1.0) for c in completions)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-2")
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint-2")
    original = AutoTokenizer.from_pretrained(ROOT / "tiny")
    assert tokenizer("1+2=").input_ids == original("1+2=").input_ids
    assert model.config.num_key_value_heads == 4


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "rows.jsonl", [{"step": 1}])
    with pytest.raises(TypeError):
        write_jsonl(tmp_path / "rows.jsonl", [{"step": 2}, {"step": object()}])
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"step": 1}]
    append_jsonl(tmp_path / "rows.jsonl", [{"step": 2}])
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"step": 1}, {"step": 2}]
    for text in ("old", "new"):
        with replacing(tmp_path / "folder") as folder:
            (folder / text).write_text("")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "folder"):
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "rows.jsonl"}


def test_every_run_gets_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(2):
        args = train.parse_args([*SMALL, "--steps", "1"])
        train.train(args)
        names.append(args.output_dir)
    assert names == ["runs/tepo-tiny-1", "runs/tepo-tiny-2"]


def test_a_run_from_the_embedded_model_keeps_its_defaults(tmp_path):
    run(tmp_path / "run", "--steps", "1")
    args = train.parse_args(["--model", str(tmp_path / "run")])
    assert args.data == "arithmetic"
    assert args.max_completion_length == 48
    assert args.epsilon == 0.02
    run(tmp_path / "again", "--steps", "1", "--model", str(tmp_path / "run"))
    run(tmp_path / "run", "--steps", "1", "--model", str(tmp_path / "again"), "--overwrite")
    for path in ("again", "run", "run/checkpoint-1"):  # also where two runs name each other
        assert train.parse_args(["--model", str(tmp_path / path)]).data == "arithmetic"
    real = train.parse_args(["--model", "Qwen2.5-1.5B"])
    assert real.gradient_checkpointing
    assert real.epsilon == 0.2
    assert train.parse_args(["--model", "Qwen2.5-1.5B", "--lora-rank", "8"]).learning_rate == 1e-5
    paper = train.parse_args(["--model", "Qwen2.5-7B", "--preset", "paper"])
    assert (paper.steps, paper.num_iterations, paper.learning_rate) == (72, 2, 5e-7)


# --------------------------------------------------------------------------------------------------
# The user's mistakes


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--model no/such/model/dir", "directory"),
        ("--model no-such-model", "OWNER/NAME"),
        ("--model nobody/has-this", "nobody/has-this"),
        ("--model Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B"),
        ("--data no-such-data", "no-such-data"),
        ("--algo ppo", "ppo"),
        ("--num-generations 1", "num-generations"),
        ("--num-prompts 8 --steps-per-generation 3", "mini-batches"),
        ("--overlong-cache 99", "overlong-cache"),
        ("--rollout-batch-size 2", "rollout-batch-size"),
        ("--max-completion-length 600", "512"),
        ("--preset paper", "real model"),
        ("--resume", "--output-dir"),
        ("--device cuda", "cuda"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(tmp_path, flags, word):
    if flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=word) as error:
        run(tmp_path / "new", *flags.split())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "flags",
    [
        "--algo dapo --beta 0.1",
        "--algo grpo --kl-mask all",
        "--temperature 0",
        "--temperature inf",
        "--learning-rate nan",
        "--learning-rate 0",
        "--epsilon-high nan",
        "--epsilon 1",
        "--adam-beta2 2",
        "--weight-decay -1",
        "--overlong-cache -5",
        "--threads -1",
        "--lora-rank -1",
        "--max-grad-norm 0",
        "--steps 0",
        "--steps 1.5",
        "--no-such-flag",
    ],
)
def test_a_wrong_flag_ends_with_code_two(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(flags.split())
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2  # usage, and what is wrong


def test_the_terminal_shows_two_lines_and_code_two(tmp_path):
    for flags in (["--algo", "ppo"], ["--model", "no/such/model/dir"], ["--no-such-flag"]):
        command = [sys.executable, "train.py", *flags, "--output-dir", tmp_path / "new"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) <= 2, done.stderr
        assert not (tmp_path / "new").exists()


def test_another_run_is_neither_mixed_with_nor_lost(tmp_path):
    run(tmp_path / "run", "--steps", "1")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="--overwrite"):
        run(tmp_path / "run", "--steps", "1")
    with pytest.raises(UserError, match="--epsilon"):
        run(tmp_path / "run", "--resume", "--epsilon", "0.1")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    run(tmp_path / "run", "--steps", "1", "--overwrite", "--seed", "1")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() != before
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("Dear")
    with pytest.raises(UserError, match="left alone"):
        run(tmp_path / "letters", "--overwrite")
    assert (tmp_path / "letters" / "dear.txt").exists()


def test_what_is_not_the_runs_own_is_left_alone(tmp_path):
    run(tmp_path / "run", "--steps", "1")
    notes = tmp_path / "run" / "notes"
    notes.mkdir()
    (notes / "dear.txt").write_text("Dear")
    with pytest.raises(UserError, match="left alone"):  # a folder inside a run is no run
        run(notes, "--overwrite")
    (tmp_path / "run" / "checkpoint-best").mkdir()
    (tmp_path / "run" / "checkpoint-notes.txt").write_text("")
    run(tmp_path / "run", "--resume", "--steps", "2")
    names = {path.name for path in (tmp_path / "run").glob("checkpoint*")}
    assert names == {"checkpoint-2", "checkpoint-best", "checkpoint-notes.txt"}
    assert (notes / "dear.txt").exists()


def test_a_run_of_another_script_is_refused(tmp_path):
    import eval as evaluation

    run(tmp_path / "run", "--steps", "1")
    for flag in ("--resume", "--overwrite"):
        with pytest.raises(UserError, match="run of"):
            evaluation.main([flag, "--output-dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "checkpoint-1").exists()


def test_an_output_dir_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="folder"):
        run(tmp_path / "file" / "sub")
