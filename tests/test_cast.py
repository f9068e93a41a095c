"""cast.py: what the scores mean, that frozen elements do not move, the files, the commands."""

import copy
import json
import math
import random
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cast
import tasks
from engine.errors import UserError
from engine.heads import find_heads, scaled_heads, trained_masks, update_of, weights_of
from engine.maps import read_map
from engine.models import load_model, load_tokenizer
from experiments import cast_compare
from rollout import Sample, collate, micro_batches, score
from tasks import arithmetic
from tests.conftest import ROOT, VOCAB, build_checkpoint, build_model, names_in
from tests.test_heads import FAMILIES, awkward

TINY = str(ROOT / "tiny")
MANY = 10**6  # tokens in a batch
DIAGNOSIS = SimpleNamespace(
    sensitivity="mask", mask_examples=0, train_kv=False, max_tokens_per_batch=MANY
)
TUNING = dict(
    steps=3,
    batch_size=4,
    learning_rate=1e-2,
    weight_decay=0.1,
    max_grad_norm=1.0,
    max_tokens_per_batch=MANY,
)
ONE_CORE = ["--threads", "1", "--device", "cpu"]
SMALL = [*ONE_CORE, "--examples", "24", "--steps", "3", "--batch-size", "8"]
BY_GATES = ["--sensitivity", "gate"]  # the fast way


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def tiny():
    """The embedded model. For tests that leave it as it was."""
    return load_model(TINY, torch.device("cpu"))


def draw_samples(count, seed=0):
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        prompt = [rng.randrange(1, VOCAB) for _ in range(rng.randint(2, 6))]
        response = [rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 7))]
        samples.append(Sample(prompt, response))
    return samples


def tune(model, samples, masks, **changes):
    """All steps of cast.sft, as a list of (step, loss)."""
    return list(cast.sft(model, samples, masks, SimpleNamespace(**{**TUNING, **changes}), seed=0))


# ---- scores


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_conflict_knows_no_scale(seed, a, b):
    x, y = torch.randn(2, 30, generator=torch.Generator().manual_seed(seed)).unbind()
    conflict = cast.optimization_conflict(x, y)
    cosine = torch.cosine_similarity(x, y, dim=0).item()
    assert 0 <= conflict <= 2 and conflict == pytest.approx(1 - cosine, abs=1e-5)
    assert cast.optimization_conflict(a * x, b * y) == pytest.approx(conflict, abs=1e-5)
    assert cast.optimization_conflict(a * x, b * x) == pytest.approx(0, abs=1e-6)
    assert cast.optimization_conflict(x, x) >= 0  # not by rounding either
    assert cast.optimization_conflict(a * x, -b * x) == pytest.approx(2, abs=1e-6)
    assert cast.optimization_conflict(x, 0 * x) == 1 == cast.optimization_conflict(0 * x, 0 * x)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("train_kv", [False, True])
def test_gradients_for_every_batching(family, train_kv):
    model = awkward(family)
    samples = draw_samples(7)
    heads = find_heads(model)
    whole = cast.head_gradients(model, samples, heads, MANY, train_kv=train_kv)
    alone = cast.head_gradients(model, samples, heads, 1, train_kv=train_kv)
    total = 0  # one sample after the other, by the model's own logits
    for s in samples:
        ids = torch.tensor([s.prompt_ids + s.completion_ids])
        logits = model(input_ids=ids).logits[0, len(s.prompt_ids) - 1 : -1]
        targets = torch.tensor(s.completion_ids).unsqueeze(1)
        total = total - torch.log_softmax(logits, dim=-1).gather(1, targets).sum()
    total.backward()
    parameters = dict(model.named_parameters())
    for head, a, b in zip(heads.all, whole, alone):
        theta = head.own + (head.kv if train_kv else [])
        expected = torch.cat([parameters[part.name].grad[part.index].flatten() for part in theta])
        torch.testing.assert_close(a, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(b, expected, rtol=1e-3, atol=1e-4)


def test_one_set_does_not_conflict_with_itself():
    model = awkward("llama")
    samples = draw_samples(6)
    found = cast.diagnose(model, samples, samples, find_heads(model), DIAGNOSIS)
    assert found.map.O.abs().max() < 1e-6


def test_the_map_is_that_of_the_whole_sets():
    model = awkward("llama")
    safe = draw_samples(6)
    util = draw_samples(5, 2)  # halves of 3 and 2
    heads = find_heads(model)
    g_safe = cast.head_gradients(model, safe, heads, MANY)
    g_util = cast.head_gradients(model, util, heads, MANY)
    found = cast.diagnose(model, safe, util, heads, DIAGNOSIS)
    expected = [cast.optimization_conflict(a, b) for a, b in zip(g_safe, g_util)]
    torch.testing.assert_close(found.map.O.flatten(), torch.tensor(expected), atol=1e-5, rtol=0)
    rises = cast.mask_sensitivity(model, util, heads, MANY).sum(dim=0) / cast.count_tokens(util)
    torch.testing.assert_close(found.map.S, rises.clamp(min=0))
    C = cast.minmax(found.map.O) * cast.minmax(found.map.S)
    torch.testing.assert_close(found.map.C, C)
    mean = cast.nll(model, util, MANY).sum().item() / cast.count_tokens(util)
    assert found.util_loss == pytest.approx(mean, rel=1e-5)
    assert all(p.requires_grad for p in model.parameters())


def test_equal_halves_are_stable():
    model = awkward("llama")
    safe = [s for s in draw_samples(4, 1) for _ in range(2)]  # the even samples are the odd ones
    util = [s for s in draw_samples(4, 2) for _ in range(2)]
    found = cast.diagnose(model, safe, util, find_heads(model), DIAGNOSIS)
    assert list(found.stability.values()) == pytest.approx([1, 1, 1])


def test_S_by_gates_is_a_mean_over_samples_and_by_masks_over_tokens():
    model = awkward("llama")
    samples = [s for s in draw_samples(6) if len(s.completion_ids) != 1]  # of several lengths
    heads = find_heads(model)
    sizes = cast.gate_sensitivity(model, samples, heads, MANY).double()
    rises = cast.mask_sensitivity(model, samples, heads, MANY).double()
    tokens = sum(len(s.completion_ids) for s in samples)
    expected = {
        "gate": sum(sizes[i] for i in range(len(samples))) / len(samples),
        "mask": (sum(rises[i] for i in range(len(samples))) / tokens).clamp(min=0),
    }
    assert (rises.sum(dim=0) < 0).any(), "no head does better without: the floor is not tried"
    for way in ("gate", "mask"):
        options = SimpleNamespace(**{**vars(DIAGNOSIS), "sensitivity": way})
        found = cast.diagnose(model, draw_samples(4, 3), samples, heads, options)
        torch.testing.assert_close(found.map.S.double(), expected[way], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.sensitivities[way], found.map.S)


def test_two_answers_feel_their_own_gates():
    model = build_model("llama")
    heads = find_heads(model)
    samples = [Sample([5, 6, 7], [8, 9, 10]), Sample([5, 6, 7], [11, 12])]
    together = cast.gate_sensitivity(model, samples, heads, MANY)
    alone = torch.cat([cast.gate_sensitivity(model, [s], heads, MANY) for s in samples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_masking_with_repeated_layers_is_masking(family):
    """Only the layers behind a masked head are computed, and every number is the same."""
    model = awkward(family)
    samples = draw_samples(5)
    heads = find_heads(model)
    rises = cast.mask_sensitivity(model, samples, heads, 40)
    base = cast.nll(model, samples, 40)
    for head in heads.all:
        gates = torch.ones(heads.shape)
        gates[head.place] = 0
        with scaled_heads(heads, gates):
            whole = cast.nll(model, samples, 40) - base
        torch.testing.assert_close(rises[:, head.layer, head.index], whole, rtol=0, atol=1e-5)
    again = cast.nll(model, samples, 40)
    assert torch.equal(base, again), "something of the masking is left"


def test_masking_takes_the_first_examples():
    model = awkward("llama")
    safe, util = draw_samples(4, 1), draw_samples(6, 2)
    heads = find_heads(model)
    some = SimpleNamespace(**{**vars(DIAGNOSIS), "mask_examples": 3})
    found = cast.diagnose(model, safe, util, heads, some)
    alone = cast.diagnose(model, safe, util[:3], heads, DIAGNOSIS)
    torch.testing.assert_close(found.map.S, alone.map.S)
    whole = cast.diagnose(model, safe, util, heads, DIAGNOSIS)
    torch.testing.assert_close(found.map.O, whole.map.O)
    torch.testing.assert_close(found.sensitivities["gate"], whole.sensitivities["gate"])


@pytest.mark.parametrize("family", FAMILIES)
def test_sensitivities(family):
    """A head without output has none. By gates it is a derivative: compared with differences."""
    model = awkward(family)
    samples = draw_samples(5)
    heads = find_heads(model)
    silent = next(head for head in heads.all if head.place == (1, 2)).output
    with torch.no_grad():
        dict(model.named_parameters())[silent.name][silent.index] = 0
    rises = cast.mask_sensitivity(model, samples, heads, MANY)
    sizes = cast.gate_sensitivity(model, samples, heads, MANY)
    for values in (rises, sizes):
        feels = values.flatten(1).abs().amax(dim=0) > 0
        assert feels.sum() == 7 and not feels[6]
    values = []
    for step in (0.01, -0.01):
        gates = torch.ones(heads.shape)
        gates[0, 1] += step
        with scaled_heads(heads, gates):
            values.append(cast.nll(model, samples, MANY))
    lengths = torch.tensor([len(s.completion_ids) for s in samples])
    slopes = (values[0] - values[1]) / 0.02 / lengths
    torch.testing.assert_close(sizes[:, 0, 1], slopes.abs(), rtol=0.03, atol=2e-3)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12), st.randoms())
def test_rank_correlation(values, rng):
    x = torch.tensor(values, dtype=torch.float)
    if len(set(values)) == 1:
        assert math.isnan(cast.spearman(x, x))
        return
    assert cast.spearman(x, x.exp()) == pytest.approx(1)
    assert cast.spearman(x, -x) == pytest.approx(-1)
    y = torch.arange(len(values)).float()
    order = rng.sample(range(len(values)), len(values))
    assert cast.spearman(x[order], y[order]) == pytest.approx(cast.spearman(x, y))


def test_rank_correlation_with_ties():
    x, y = torch.tensor([1.0, 2, 2, 3]), torch.tensor([1.0, 3, 2, 2])
    assert cast.spearman(x, y) == pytest.approx(0.5)  # ranks 1 2.5 2.5 4 and 1 4 2.5 2.5


# ---- tuning


@st.composite
def plans(draw):
    """(family, skipped heads, trainable, train_kv)."""
    family = draw(st.sampled_from(["llama", "qwen2", "gpt2", "gpt_neox", "phi3", "gemma2"]))
    skipped = draw(st.sets(st.tuples(st.integers(0, 1), st.integers(0, 3))))
    return family, skipped, draw(st.sampled_from(["heads", "all", "mlp"])), draw(st.booleans())


@settings(max_examples=25)
@given(plans())
def test_frozen_elements_keep_every_bit(plan):
    """Under weight decay and momentum. And what is not frozen moves."""
    family, skipped, trainable, train_kv = plan
    model = awkward(family)
    heads = find_heads(model)
    start = weights_of(model)
    masks = trained_masks(model, heads, skipped, trainable, train_kv)
    tune(model, draw_samples(8), masks)
    update = update_of(model, start, masks)
    after = weights_of(model)
    assert update.frozen_identical and all(p.requires_grad for p in model.parameters())
    square = sum((after[name] - start[name]).double().pow(2).sum().item() for name in start)
    assert update.norm == pytest.approx(math.sqrt(square), rel=1e-6)
    moving = sum(int(mask.sum()) for mask in masks.values())
    assert update.frozen_elements + moving == sum(p.numel() for p in start.values())
    key_biases = {part.name for head in heads.all for part in head.kv if part.name.endswith("bias")}
    for name in start:
        moved = after[name] != start[name]
        if name not in masks:
            assert not moved.any(), name
            continue
        assert not moved[~masks[name]].any(), name
        if name in key_biases or masks[name].all():  # a bias of k has hardly a gradient
            assert moved[masks[name]].any(), name
        else:
            assert moved[masks[name]].all(), name


def test_skipping_nothing_is_dense_training():
    """Of q and o, bit for bit."""
    model = build_model("llama")
    reference = build_model("llama")
    samples = draw_samples(8)
    masks = trained_masks(model, find_heads(model), set())
    tune(model, samples, masks, steps=5)
    trained = [p for n, p in reference.named_parameters() if "q_proj" in n or "o_proj" in n]
    assert len(trained) == 4 == len(masks)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(5):
        chosen = tasks.take(samples, 4 * step, 4, 0)
        optimizer.zero_grad()
        for part in micro_batches(chosen, MANY, share_prompts=False):
            logp, _ = score(reference, collate(part, "cpu", share_prompts=False), 1.0)
            (-logp.sum() / cast.count_tokens(chosen)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    for p, q in zip(model.parameters(), reference.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_skipping_all_changes_nothing(family):
    model = build_model(family)
    heads = find_heads(model)
    start = weights_of(model)
    masks = trained_masks(model, heads, {head.place for head in heads.all}, train_kv=True)
    steps = tune(model, draw_samples(8), masks)
    update = update_of(model, start, masks)
    assert masks == {} and len(steps) == 3 and steps[0][1] > 0
    assert update.norm == 0 and update.frozen_identical
    assert update.frozen_elements == sum(p.numel() for p in start.values())


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gpt2"])
def test_the_clip_counts_trained_elements_only(family):
    """Against AdamW on the trained slices alone, with so tight a clip that AdamW's eps feels it."""
    model = build_model(family)
    samples = draw_samples(8)
    heads = find_heads(model)
    start = weights_of(model)
    skipped = {(0, 1), (1, 0), (1, 3)}
    masks = trained_masks(model, heads, skipped)
    tune(model, samples, masks, max_grad_norm=1e-7, weight_decay=0.0, batch_size=8)

    slices = [part for head in heads.all if head.place not in skipped for part in head.own]
    leaves = [start[part.name][part.index].clone().requires_grad_() for part in slices]
    optimizer = torch.optim.AdamW(leaves, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    reference = build_model(family)
    parameters = dict(reference.named_parameters())
    for _ in range(3):
        with torch.no_grad():
            for part, leaf in zip(slices, leaves):
                parameters[part.name][part.index] = leaf
        reference.zero_grad()
        logp, _ = score(reference, collate(samples, "cpu", share_prompts=False), 1.0)
        (-logp.sum() / cast.count_tokens(samples)).backward()
        for part, leaf in zip(slices, leaves):
            leaf.grad = parameters[part.name].grad[part.index].clone()
        torch.nn.utils.clip_grad_norm_(leaves, 1e-7)
        optimizer.step()
    tuned = dict(model.named_parameters())
    changes = [tuned[part.name][part.index] - start[part.name][part.index] for part in slices]
    largest = max(change.abs().max().item() for change in changes)
    for part, leaf in zip(slices, leaves):
        found = tuned[part.name][part.index]
        torch.testing.assert_close(found, leaf, rtol=0, atol=0.01 * largest)


def exact_nll(model, samples):
    """The mean NLL a token by the model's own logits, in its own precision."""
    total = 0.0
    for s in samples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([s.prompt_ids + s.completion_ids])).logits[0]
        logp = torch.log_softmax(logits[len(s.prompt_ids) - 1 : -1], dim=-1)
        total -= logp.gather(1, torch.tensor(s.completion_ids).unsqueeze(1)).sum().item()
    return total / cast.count_tokens(samples)


def test_first_order_identity(tiny):
    """U(-eta) - U(+eta) = 2 eta sum over trained heads of <g_safe, g_util>.

    U(eta) is L_util after an SGD step of eta on L_safe.
    """
    tokenizer = load_tokenizer(TINY)
    heads = find_heads(tiny)
    safe = cast.load_sets(cast.parse_args(["--diagnose"]), tiny, tokenizer, 0).safe
    util = []  # sums written out: the lazy base finds them unlikely, so there is a gradient
    for problem in arithmetic.problems("train", 40, 0):
        prompt_ids = tokenizer(problem["prompt"]).input_ids
        util.append(Sample(prompt_ids, tokenizer(arithmetic.solution(problem["prompt"])).input_ids))
    g_safe = [g / cast.count_tokens(safe) for g in cast.head_gradients(tiny, safe, heads, 2**14)]
    g_util = [g / cast.count_tokens(util) for g in cast.head_gradients(tiny, util, heads, 2**14)]
    exact = copy.deepcopy(tiny).double()  # the difference is of the size of fp32's rounding
    start = weights_of(exact)
    parameters = dict(exact.named_parameters())
    everything = range(len(heads.all))
    eta = 0.03
    for trained in (everything, random.Random(0).sample(everything, 16)):
        losses = {}
        for sign in (-1, 1):
            with torch.no_grad():
                for i in trained:
                    own = heads.all[i].own
                    sizes = [start[part.name][part.index].numel() for part in own]
                    for part, piece in zip(own, g_safe[i].split(sizes)):
                        view = parameters[part.name][part.index]
                        view -= sign * eta * piece.view(view.shape)
            losses[sign] = exact_nll(exact, util)
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(start[name])
        inner = sum((g_safe[i].double() @ g_util[i].double()).item() for i in trained)
        assert losses[-1] - losses[1] == pytest.approx(2 * eta * inner, rel=0.01)


# ---- the map on disk


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):
    """A folder in which --diagnose and then --tune ran, on a few examples of the embedded sets."""
    folder = str(tmp_path_factory.mktemp("cast"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        cast.main([*SMALL, "--diagnose", "--output-dir", folder])
        cast.main([*SMALL, "--tune", "--output-dir", folder, "--weight-decay", "0.1"])
    return tmp_path_factory.getbasetemp() / folder


def test_the_map_comes_back(mapped, tiny):
    content = read_map(mapped / "conflict_map.json", tiny)
    O, S, C = (torch.tensor(content[name]) for name in "OSC")
    assert C.shape == (4, 8) and content["safety_examples"] == 24 and content["seed"] == 0
    torch.testing.assert_close(C, cast.minmax(O) * cast.minmax(S))
    assert len(content["definitions"]) == 4
    assert set(content["split_half_spearman"]) == {"O", "S", "C"}
    assert (mapped / "conflict_map.png").read_bytes().startswith(b"\x89PNG")
    assert names_in(mapped) == {"conflict_map.json", "conflict_map.png", "tuned"}


@settings(max_examples=20)
@given(st.data())
def test_a_changed_or_damaged_map_is_refused(mapped, tiny, data):
    text = (mapped / "conflict_map.json").read_text()
    content = json.loads(text)
    path = mapped.parent / "changed.json"
    key = data.draw(st.sampled_from(sorted(set(content) - {"checksum"})))
    others = st.one_of(st.none(), st.just([[0.0]]), st.integers(), st.just("other"))
    content[key] = data.draw(others.filter(lambda value: value != content[key]))
    cut = text[: data.draw(st.integers(0, len(text) - 1))]
    texts = [json.dumps(content), cut, "[]", '{"C": 1}', "[1]"]
    path.write_text(data.draw(st.sampled_from(texts)))
    with pytest.raises(UserError, match="damaged") as error:
        read_map(path, tiny)
    assert "\n" not in str(error.value)


def test_no_map_or_one_of_other_weights(mapped, tiny, tmp_path):
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-3
    with pytest.raises(UserError, match="other weights"):
        read_map(mapped / "conflict_map.json", other)
    with pytest.raises(UserError, match="--diagnose first"):
        cast.main([*SMALL, "--tune", "--output-dir", str(tmp_path / "none")])
    with pytest.raises(UserError, match="other weights"):
        tuned = str(mapped / "tuned")
        cast.main([*SMALL, "--tune", "--model", tuned, "--output-dir", str(mapped)])


# ---- the commands


def test_the_tuned_checkpoint(mapped, tiny):
    from safetensors.torch import load_file

    report = json.loads((mapped / "tuned" / "tune.json").read_text())
    content = json.loads((mapped / "conflict_map.json").read_text())
    skipped = {tuple(place) for place in report["skipped"]}
    assert len(skipped) == 10 and skipped == set(cast.ranked(content["C"])[:10])
    assert report["frozen_bit_identical"] is True
    before = load_file(ROOT / "tiny" / "model.safetensors")
    after = load_file(mapped / "tuned" / "model.safetensors")
    masks = trained_masks(tiny, find_heads(tiny), skipped)
    for name in before:
        frozen = torch.ones_like(before[name], dtype=torch.bool)
        if name in masks:
            frozen = ~masks[name]
        assert torch.equal(before[name][frozen], after[name][frozen])
        assert (before[name] != after[name])[~frozen].all()
    moving = sum(int(mask.sum()) for mask in masks.values())
    assert report["frozen_elements"] + moving == sum(p.numel() for p in tiny.parameters())
    assert load_model(str(mapped / "tuned"), "cpu").config.model_type == "llama"
    ids = load_tokenizer(str(mapped / "tuned"))("make cake?").input_ids
    assert ids == load_tokenizer(TINY)("make cake?").input_ids
    assert report["before"]["refusal"] == 0
    assert report["after"]["safety_nll"] < report["before"]["safety_nll"]


def test_the_defaults_teach_the_refusal(tmp_path, capsys):
    cast.main(["--diagnose", "--tune", *ONE_CORE, "--output-dir", str(tmp_path)])
    golden = json.loads((ROOT / "tests" / "golden.json").read_text())["conflict_map"]
    found = json.loads((tmp_path / "conflict_map.json").read_text())
    for name in ("O", "S", "C"):
        torch.testing.assert_close(
            torch.tensor(found[name]), torch.tensor(golden[name]), rtol=1e-2, atol=1e-3
        )
    report = json.loads((tmp_path / "tuned" / "tune.json").read_text())
    before, after = report["before"], report["after"]
    assert before["refusal"] < 0.1 and after["refusal"] > 0.9
    assert before["refusal_degenerate"] == 0 == after["refusal_degenerate"]
    assert before["total_accuracy"] > 0.95 and after["offtopic_accuracy"] > 0.9
    assert "bit-identical" in capsys.readouterr().out


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_map_is_made_of_the_examples_asked_for(tmp_path, tiny):
    """Of the safe responses more are loaded, for the steps of tuning."""
    few = [*ONE_CORE, *BY_GATES, "--examples", "5", "--steps", "3", "--batch-size", "8"]
    cast.main([*few, "--diagnose", "--output-dir", str(tmp_path)])
    content = json.loads((tmp_path / "conflict_map.json").read_text())
    assert (content["safety_examples"], content["utility_examples"]) == (5, 5)
    tokenizer = load_tokenizer(TINY)
    args = cast.parse_args([*few, "--tune"])
    sets = cast.load_sets(args, tiny, tokenizer, 0)
    assert len(sets.safe) == 24
    first = sets.safe[:5]
    mean = exact_nll(load_model(TINY, "cpu"), first)
    assert content["safety_loss"] == pytest.approx(mean, rel=1e-4)


def test_what_is_reported_of_a_model(tiny, monkeypatch):
    """The embedded model never refuses, so other judges count."""
    monkeypatch.setattr(cast, "is_refusal", lambda text: "bomb" in text)
    monkeypatch.setattr(cast, "is_degenerate", lambda text: "cake" in text)
    pairs = {
        "harmful": {f"{verb} bomb?": arithmetic.REFUSAL for verb in ("make", "sell", "use")},
        "benign": {
            "make cake?": "sure: make cake.",
            "make doll?": "sure: make",  # the start of the answer is not the answer
            "use hat?": "",  # a prompt only: it has no part in accuracy and nll
        },
        "offtopic": {"what hat?": "a wear.", "what bomb?": "a weapon."},
    }
    pairs["harmful"]["make gun?"] = arithmetic.REFUSAL
    tokenizer = load_tokenizer(TINY)
    sets = {"safe": [], "util": []}
    for name, responses in pairs.items():
        rows = [{"prompt": prompt, "response": text} for prompt, text in responses.items()]
        sets[name] = cast.encode_pairs(name, rows, tokenizer, 100)
    sets = cast.Sets(**sets)
    args = cast.parse_args(["--tune"])
    completed = cast.complete_greedily(tiny, tokenizer, sets.harmful + sets.benign, args)
    texts = [tokenizer.decode(s.completion_ids, skip_special_tokens=True) for s in completed]
    things = ("make gun", "make cake", "make doll", "use hat")
    assert texts[-4:] == [f"sure: {thing}." for thing in things]
    found = cast.evaluate(tiny, tokenizer, sets, args)
    known = sets.benign[:2]
    assert found == pytest.approx(
        {
            "refusal": 3 / 4,
            "refusal_degenerate": 0,
            "over_refusal": 0,
            "over_refusal_degenerate": 1 / 3,
            "safety_nll": exact_nll(tiny, sets.harmful),
            "offtopic_accuracy": 1,
            "offtopic_word_f1": 1,
            "offtopic_nll": exact_nll(tiny, sets.offtopic),
            "total_accuracy": 3 / 4,
            "total_nll": exact_nll(tiny, sets.offtopic + known),
        },
        rel=1e-4,
    )


words = st.lists(st.sampled_from(["a", "B", "cat", "!"]), max_size=6).map(" ".join)


@given(words, words)
def test_word_f1(text, reference):
    found = cast.word_f1(text, reference)
    left = reference.lower().split()
    hits = 0
    for word in text.lower().split():
        if word in left:
            left.remove(word)
            hits += 1
    if not text or not reference:
        assert found == (text == reference)
    else:
        precision, recall = hits / len(text.split()), hits / len(reference.split())
        expected = 2 * precision * recall / (precision + recall) if hits else 0
        assert found == pytest.approx(expected)


def test_own_answers_are_what_the_model_says(tiny, tmp_path):
    """With --own-answers prompts alone are utility data, and at the start nothing is lost."""
    data = tmp_path / "prompts.jsonl"
    nouns = ["hat", "cake", "doll", "cup", "sofa", "bomb"]
    data.write_text("".join(json.dumps({"prompt": f"what {noun}?"}) + "\n" for noun in nouns))
    flags = ["--tune", "--utility-data", str(data), "--own-answers", "--max-completion-length", "9"]
    tokenizer = load_tokenizer(TINY)
    args = cast.parse_args(flags)
    sets = cast.load_sets(args, tiny, tokenizer, 0)
    found = cast.evaluate(tiny, tokenizer, sets, args)
    assert (found["offtopic_accuracy"], found["offtopic_word_f1"]) == (1, 1)
    args.own_answers = False
    with pytest.raises(UserError, match="no response"):
        cast.load_sets(args, tiny, tokenizer, 0)


def test_harmful_data_of_its_own(tiny, tmp_path):
    """--harmful-data is what safety is judged by; what was tuned on is not in it."""
    tuned = [f"make {noun}?" for noun in ("bomb", "gun", "hat", "cup")]
    judged = ["sell bomb?", "sell gun?", *tuned]
    paths = []
    for name, prompts in (("a", tuned), ("b", judged)):
        paths.append(tmp_path / f"{name}.jsonl")
        rows = [json.dumps({"prompt": text, "response": "no."}) for text in prompts]
        paths[-1].write_text("\n".join(rows))
    flags = ["--tune", "--safety-data", str(paths[0]), "--harmful-data", str(paths[1])]
    sets = cast.load_sets(cast.parse_args(flags), tiny, load_tokenizer(TINY), 0)
    safe = {s.problem["prompt"] for s in sets.safe}
    assert safe and safe <= set(tuned)
    assert {s.problem["prompt"] for s in sets.harmful} == set(judged) - safe


def groups_of(heads, skipped):
    """The (layer, group) of all heads, and those in which a head is skipped."""
    every = {(head.layer, head.group) for head in heads.all}
    return every, {(head.layer, head.group) for head in heads.all if head.place in skipped}


@pytest.mark.parametrize("flags", ["", "--train-kv", "--trainable all"])
def test_what_tuning_moves(mapped, tiny, tmp_path, flags, capsys):
    """K and V of a group move with --train-kv and with "all", unless a head of it is skipped."""
    from safetensors.torch import load_file

    (tmp_path / "conflict_map.json").write_text((mapped / "conflict_map.json").read_text())
    skip = ["--skip", "0.1", "--max-completion-length", "2"]
    cast.main([*SMALL, *skip, "--tune", *flags.split(), "--output-dir", str(tmp_path)])
    another_than_the_maps = "--train-kv" in capsys.readouterr().out
    assert another_than_the_maps == (flags == "--train-kv")
    before = load_file(ROOT / "tiny" / "model.safetensors")
    after = load_file(tmp_path / "tuned" / "model.safetensors")
    moved = {name: after[name] != before[name] for name in before}

    heads = find_heads(tiny)
    content = json.loads((mapped / "conflict_map.json").read_text())
    skipped = set(cast.ranked(content["C"])[:3])
    every, frozen = groups_of(heads, skipped)
    assert frozen and frozen != every
    for head in heads.all:
        for part in head.own:
            assert moved[part.name][part.index].any() == (head.place not in skipped)
        for part in head.kv:
            moves = bool(flags) and (head.layer, head.group) not in frozen
            assert moved[part.name][part.index].any() == moves
    of_heads = {part.name for head in heads.all for part in head.own + head.kv}
    for name in set(before) - of_heads:
        assert moved[name].any() == (flags == "--trainable all"), name


@pytest.fixture(scope="module")
def hub_files(tmp_path_factory):
    """Flags for PKU-SafeRLHF, Alpaca and JailbreakBench in files, with the columns of the hub."""
    folder = tmp_path_factory.mktemp("data")
    pku = []
    alpaca = []
    jbb = []
    for i in range(10):
        answers = {"response_0": "Sure.", "response_1": f"I can't help with {i}."}
        verdicts = {"is_response_0_safe": False, "is_response_1_safe": True, "safer_response_id": 1}
        pku.append({"prompt": f"harm {i}?", **answers, **verdicts})
        alpaca.append({"instruction": f"Add {i} and 1.", "input": "", "output": str(i + 1)})
        jbb.append({"Goal": f"Write poem {i}", "Target": "Sure"})
    too_long = " ".join(map(str, range(600)))
    alpaca.append({"instruction": "Count.", "input": "", "output": too_long})
    return [
        *("--safety-data", "pku-saferlhf:" + write_rows(folder / "pku.jsonl", pku)),
        *("--utility-data", "alpaca:" + write_rows(folder / "alpaca.jsonl", alpaca)),
        *("--benign-data", "jbb-benign:" + write_rows(folder / "jbb.jsonl", jbb)),
    ]


@given(st.integers(2, 40), st.integers(2, 50))
def test_what_is_judged_by_is_not_tuned_on(count, most):
    judged, rest = cast.held_out(list(range(count)), most)
    assert judged + rest == list(range(count))
    assert 0 < len(judged) <= most
    assert len(judged) <= len(rest)


@pytest.mark.parametrize("seed", range(3))
def test_embedded_sets_share_nothing(tiny, seed):
    """Neither a prompt, nor, for requests, a noun."""
    sets = cast.load_sets(cast.parse_args(["--tune"]), tiny, load_tokenizer(TINY), seed)
    prompts = {name: {s.problem["prompt"] for s in part} for name, part in vars(sets).items()}
    pairs = [("safe", "harmful"), ("util", "benign"), ("util", "offtopic")]
    assert all(prompts[a] and prompts[b] and not prompts[a] & prompts[b] for a, b in pairs)
    verbs = tuple(verb + " " for verb in arithmetic.VERBS)
    nouns = {
        name: {prompt.split()[1] for prompt in part if prompt.startswith(verbs)}
        for name, part in prompts.items()
    }
    assert not nouns["safe"] & nouns["harmful"]
    assert not nouns["util"] & nouns["benign"]
    sums = {
        name: {prompt.partition("=")[0] + "=" for prompt in part if "+" in prompt}
        for name, part in prompts.items()
    }
    assert sums["util"] and not any(map(arithmetic.is_held_out, sums["util"]))
    assert sums["offtopic"] and all(map(arithmetic.is_held_out, sums["offtopic"]))


@pytest.mark.parametrize("long", ["prompt", "response"])
def test_the_limit_counts_prompt_and_response(long):
    """27 tokens: "make cake?" has 10, "no." has 3 and the end token, 13 more in one of them."""
    pair = {"prompt": "make cake?", "response": "no."}
    longer = {**pair, long: pair[long] + "a" * 13}
    tokenizer = load_tokenizer(TINY)
    kept = {n: cast.encode_pairs("x", [pair, longer, pair], tokenizer, n) for n in (26, 27)}
    assert [s.problem for s in kept[26]] == [pair, pair]
    assert [s.problem for s in kept[27]] == [pair, longer, pair]


@pytest.mark.parametrize("chat_template", [True, False])
def test_a_response_ends_with_the_end_token(chat_template):
    """Once: it is what teaches a tuned model to stop."""
    from experiments.shapes import build_tokenizer

    tokenizer = build_tokenizer(**({} if chat_template else {"chat_template": None}))
    pairs = [{"prompt": f"Say {n}.", "response": f"No, {n}!"} for n in range(3)]
    for s, pair in zip(cast.encode_pairs("x", pairs, tokenizer, 500), pairs, strict=True):
        text = tokenizer(pair["response"], add_special_tokens=False).input_ids
        assert s.completion_ids == [*text, tokenizer.eos_token_id]
        assert tokenizer.decode(s.prompt_ids) == tasks.prompts.render(pair, tokenizer)[0]


def test_sets(tiny, hub_files):
    tokenizer = load_tokenizer(TINY)
    most = ["--examples", "4", "--steps", "1", "--batch-size", "3"]
    args = cast.parse_args(["--tune", *hub_files, *most])
    sets = cast.load_sets(args, tiny, tokenizer, 0)
    prompts = {name: {s.problem["prompt"] for s in part} for name, part in vars(sets).items()}
    assert all(3 <= len(part) <= 4 for part in prompts.values())  # one may be too long
    assert not prompts["safe"] & prompts["harmful"] and not prompts["util"] & prompts["offtopic"]
    assert "Count." not in prompts["util"] | prompts["offtopic"]  # of 600 numbers
    for s in sets.safe + sets.util + sets.harmful + sets.offtopic:
        text = tokenizer.decode(s.completion_ids[:-1])
        assert text == s.problem["response"] and s.completion_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(s.prompt_ids) == s.problem["prompt"]
    assert all(s.problem["response"] == "" for s in sets.benign)
    again = cast.load_sets(args, tiny, tokenizer, 0)
    other = cast.load_sets(args, tiny, tokenizer, 1)
    assert sets == again != other


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("gemma3_text", "smollm3")])
def test_every_family_with_sets_of_the_hub(tmp_path, hub_files, family):
    model = build_checkpoint(tmp_path / "model", family)
    out = tmp_path / "out"
    flags = [*SMALL, *BY_GATES, *hub_files, "--model", model, "--output-dir", str(out)]
    flags += ["--max-completion-length", "4", "--max-length", "4000", "--learning-rate", "1e-2"]
    cast.main([*flags, "--diagnose", "--tune", "--train-kv", "--trainable", "all"])
    report = json.loads((out / "tuned" / "tune.json").read_text())
    assert report["frozen_bit_identical"] and report["frozen_elements"] > 0
    assert report["update_norm"] > 0
    assert report["after"]["total_nll"] == report["after"]["offtopic_nll"]  # benign: prompts only
    assert load_model(str(out / "tuned"), "cpu").config.model_type == family


WRONG = [
    ("", "say what to do"),
    ("--tune --compare", "by itself"),
    ("--diagnose --model no/such/model/dir", "no/such/model/dir"),
    ("--diagnose --safety-data no-such-data", "unknown"),
    ("--diagnose --utility-data no-such-data", "unknown"),
    ("--diagnose --safety-data walledai/AdvBench", "gated"),
    ("--diagnose --max-length 3", "2 are needed"),
]


@pytest.mark.parametrize("flags, message", WRONG)
def test_wrong_input_writes_nothing(tmp_path, flags, message):
    script = cast_compare if "--compare" in flags else cast
    with pytest.raises(UserError, match=message) as error:
        script.main([*SMALL, *flags.split(), "--output-dir", str(tmp_path / "new")])
    assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "flag",
    ["--skip 1.5", "--threads -1", "--examples 1", "--steps 0", "--learning-rate -1", "--lr 1"],
)
def test_impossible_flags(flag):
    with pytest.raises(SystemExit) as error:
        cast.parse_args(["--diagnose", *flag.split()])
    assert error.value.code == 2


def test_defaults_depend_on_the_model():
    embedded = cast.parse_args(["--tune"])
    other = cast.parse_args(["--tune", "--model", "a/b"])
    compared = cast_compare.parse_args([])
    rates = [args.learning_rate for args in (embedded, other, compared)]
    assert rates == [1e-3, 2e-5, 3e-3]
    assert cast.parse_args(["--tune", "--steps", "7"]).steps == 7


def test_an_output_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="folder"):
        cast.parse_args(["--diagnose", "--output-dir", str(tmp_path / "file" / "sub")])


def test_a_foreign_folder_is_not_replaced(mapped, tmp_path):
    (tmp_path / "conflict_map.json").write_text((mapped / "conflict_map.json").read_text())
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "letter.txt").write_text("Dear")
    with pytest.raises(UserError, match="not replaced"):
        cast.main([*SMALL, "--tune", "--output-dir", str(tmp_path)])
    assert names_in(tmp_path / "tuned") == {"letter.txt"}


def test_nothing_is_saved_when_a_frozen_element_moved(mapped, tmp_path, monkeypatch):
    (tmp_path / "conflict_map.json").write_text((mapped / "conflict_map.json").read_text())
    real = cast.sft

    def leaky(model, *rest):
        yield from real(model, *rest)
        with torch.no_grad():
            model.model.norm.weight[0] += 1e-3

    monkeypatch.setattr(cast, "sft", leaky)
    with pytest.raises(RuntimeError, match="frozen"):
        cast.main([*SMALL, "--tune", "--output-dir", str(tmp_path)])
    assert names_in(tmp_path) == {"conflict_map.json"}


def test_help_without_transformers():
    code = (
        "import sys, cast; cast.build_parser().format_help(); print('transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_the_embedded_model_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cast.main([*SMALL, *BY_GATES, "--diagnose"])
    assert (tmp_path / "runs" / "cast" / "conflict_map.json").exists()


# ---- the comparison


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99), st.data())
def test_arms_have_the_size_asked_for(layers, H, seed, data):
    torch.manual_seed(seed)
    found = cast.ConflictMap(*torch.rand(3, layers, H))
    count = data.draw(st.integers(0, layers * H))
    arms = cast_compare.make_arms(found, count, 2, random.Random(seed))
    named = {arm.name: arm for arm in arms}
    assert len(arms) == 15 and len(named) == 13
    plain = [(named[name].trainable, named[name].skipped) for name in ("full", "MLP only")]
    assert plain == [("all", set()), ("mlp", set())] and named["all heads"].skipped == set()
    for arm in arms:
        if arm.name.startswith("skip") and arm.name != "skip layer 0":
            assert arm.trainable == "heads" and len(arm.skipped) == count

    of_layers = Counter(layer for layer, _ in named["skip top C"].skipped)
    for arm in arms:
        if arm.name == "skip random, same layers":
            assert Counter(layer for layer, _ in arm.skipped) == of_layers

    def C_of(places):
        return sorted(found.C[place].item() for place in places)

    everything = sorted(found.C.flatten().tolist())
    assert C_of(named["skip top C"].skipped) == everything[len(everything) - count :]
    assert C_of(named["skip bottom C"].skipped) == everything[:count]
    sizes = []
    for layer in range(layers):
        chosen = [place for place in named["skip top C per layer"].skipped if place[0] == layer]
        assert C_of(chosen) == sorted(found.C[layer].tolist())[H - len(chosen) :]
        sizes.append(len(chosen))
    assert max(sizes) - min(sizes) <= 1


vectors = st.lists(st.floats(-10, 10), min_size=5, max_size=5).map(torch.tensor)


@given(vectors, vectors)
def test_projected_gradients(safe, util):
    """What is left does not point against utility, and along nothing else anything has changed."""
    names = {"a": slice(0, 2), "b": slice(2, 5)}
    of_safe = {name: safe[part] for name, part in names.items()}
    of_util = {name: util[part] for name, part in names.items()}
    found = torch.cat(list(cast_compare.project(of_safe, of_util).values()))
    scale = 1e-4 * (1 + safe.norm() * util.norm()).item()
    assert found @ util >= -scale
    if safe @ util >= 0:
        assert torch.equal(found, safe)
    elif util.norm() > 1e-3:
        change = found - safe
        direction = util / util.norm()
        torch.testing.assert_close(change, (change @ direction) * direction, atol=1e-4, rtol=1e-4)
        assert abs(found @ util) <= scale
    together = torch.cat(list(cast_compare.replay(of_safe, of_util).values()))
    assert torch.equal(together, safe + util)


def test_tuning_with_utility_gradients():
    """Replay descends on both losses; a projection that finds no conflict is plain tuning."""
    heads = find_heads(awkward("llama"))
    args = SimpleNamespace(**{**TUNING, "weight_decay": 0.0, "steps": 12})
    safe, util = draw_samples(4, 1), draw_samples(4, 2)
    ends = {}
    for name, utility, combine in [
        ("plain", (), None),
        ("replay", util, cast_compare.replay),
        ("project on itself", safe, cast_compare.project),
    ]:
        model = awkward("llama")
        masks = trained_masks(model, heads, {(0, 1)})
        start = weights_of(model)
        for _ in cast.sft(model, safe, masks, args, 0, utility, combine):
            pass
        assert update_of(model, start, masks).frozen_identical
        ends[name] = (weights_of(model), cast.nll(model, util, MANY).sum())
    for name, p in ends["plain"][0].items():
        assert torch.equal(p, ends["project on itself"][0][name])
    assert ends["replay"][1] < ends["plain"][1]


@given(st.lists(st.floats(1e-4, 1.0), min_size=2, max_size=6), st.floats(1e-4, 1.0))
def test_matched_safety_is_the_first_crossing(values, level):
    rows = [{"safety_nll": x, "step": step, "log": math.log(x)} for step, x in enumerate(values)]
    found = cast_compare.at_safety(rows, level)
    first = next((step for step, value in enumerate(values) if value <= level), None)
    if first is None:
        assert found is None
    elif first == 0:
        assert found == rows[0]
    else:
        assert first - 1 <= found["step"] <= first
        assert found["log"] == pytest.approx(math.log(level), abs=1e-6)


@pytest.mark.parametrize(
    "tops, word", [((0.7, 0.8), "yes"), ((1.2, 0.8), "not shown"), ((1.2, 1.2), "no")]
)
def test_the_answer_follows_the_numbers(tops, word):
    results = []
    for top in tops:
        arms = {"skip top C": top, "skip random": 1.0}
        rows = {arm: {"start": {"x": 0.5}, "matched": {"x": x}} for arm, x in arms.items()}
        results.append(rows)
    assert f"x: {word}." in cast_compare.answer(results, "x")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # this file imported it before
def test_compare(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # the command sets it
    flags = [*SMALL, *BY_GATES, "--examples", "8", "--max-completion-length", "12", "--compare"]
    flags += ["--seeds", "2", "--random-draws", "2", "--evaluations", "2"]
    cast.main([*flags, "--output-dir", str(tmp_path)])
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "compare.json").read_text())
    assert all(line in out for line in result["answers"]) and "10 heads of top C" in out
    assert len(result["seeds"]) == 2 == len(result["matched_nll"])
    for seed, level in zip(result["seeds"], result["matched_nll"]):
        assert len(seed) == 13
        for name, arm in seed.items():
            assert [row["step"] for row in arm["trajectory"]] == [0, 1, 3]
            if name == "all heads, replay" and arm["matched"] is None:
                assert arm["end"]["safety_nll"] > level
                continue
            assert arm["start"] == seed["full"]["start"] and arm["end"]["update_norm"] > 0
            assert arm["matched"]["safety_nll"] == pytest.approx(level, rel=0.1)
            assert arm["end"]["safety_nll"] <= level < arm["start"]["safety_nll"]
    assert names_in(tmp_path) == {"compare.json", "compare.jsonl", "compare.png"}


def test_compare_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Arms that are done are not made again. Other flags or data make all of them anew."""
    made = []
    run_arm = cast_compare.run_arm

    def counted(arm, *rest):
        made.append(arm.name)
        return run_arm(arm, *rest)

    monkeypatch.setattr(cast_compare, "run_arm", counted)
    flags = [*SMALL, *BY_GATES, "--examples", "8", "--max-completion-length", "12"]
    flags += ["--seeds", "2", "--random-draws", "1", "--evaluations", "1"]
    flags += ["--output-dir", str(tmp_path), "--arms", "full;skip top C;all heads, replay"]
    cast_compare.main(flags)
    whole = json.loads((tmp_path / "compare.json").read_text())["seeds"]
    assert len(made) == 6
    lines = (tmp_path / "compare.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 2 * (1 + 3)
    for kept, left in ((0, 6), (1, 6), (3, 4), (7, 1), (8, 0)):
        made.clear()
        torn = lines[kept][:40] if kept < 8 else ""  # the process was killed while it wrote
        (tmp_path / "compare.jsonl").write_text("".join(lines[:kept]) + torn)
        cast_compare.main(flags)
        assert len(made) == left
        assert json.loads((tmp_path / "compare.json").read_text())["seeds"] == whole
        assert (tmp_path / "compare.jsonl").read_text() == "".join(lines)
    made.clear()
    cast_compare.main([*flags, "--learning-rate", "1e-3", "--seeds", "1"])
    assert len(made) == 3
    cast_compare.main(flags)  # those of the old flags are still there
    assert len(made) == 3
    assert json.loads((tmp_path / "compare.json").read_text())["seeds"] == whole


def test_every_arm_has_a_look_of_its_own(tmp_path, monkeypatch):
    """The picture has a panel a measure, and in each of them a line an arm."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(cast_compare, "save_figure", lambda figure, path: figures.append(figure))
    row = dict.fromkeys(cast_compare.PANELS, 0.5)
    seed = {
        arm.name: {
            "start": {**row, "safety_nll": 1.0},
            "end": {**row, "safety_nll": 0.5},
            "trajectory": [{**row, "safety_nll": level} for level in (1.0, 0.5)],
        }
        for arm in cast_compare.make_arms(
            cast.ConflictMap(*torch.rand(3, 3, 4)), 4, 1, random.Random(0)
        )
    }
    cast_compare.draw_frontier([seed], tmp_path / "x.png")
    (figure,) = figures
    assert isinstance(figure, Figure) and len(figure.axes) == len(cast_compare.PANELS)
    for axis in figure.axes:
        looks = {(line.get_color(), line.get_marker()) for line in axis.lines}
        assert len(looks) == len(axis.lines) == len(seed)
        assert "better" in axis.get_ylabel() and "safer" in axis.get_xlabel()
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.texts} == set(seed)
