"""Problems: what a model is asked, and the answer it should find (reward.py judges what it answers). No torch in here.

`load_problems` returns problems, dicts of the bare question ("prompt"), the gold "answer", the "styles" in which a
completion may state its own (see reward.extract_answer) and the "instruction" that is put behind the question; and counts:
how many rows there were, how many were kept, and why the others were not. A row is read by the columns it has, so the hub's
sets and a local copy take the same path:

    row --question_of, gold_of--> question, gold --select--> problem (no duplicate, conflict, unusable gold) --render--> prompt

The embedded data set, `arithmetic`, needs no download: it belongs to the embedded model and stands in tiny.py.
"""

import json
import logging
import os
import random
import re
from pathlib import Path

from reward import last_boxed, parses, settle


class UserError(Exception):
    """A mistake that the user can mend. The scripts print it in a line and exit with code 2; the message says what to do."""


BOXED = "Please reason step by step, and put your final answer within \\boxed{}."  # Qwen's own words

# name: hub id, config, {what the set is for: the hub's split}, styles of answers
SETS = {
    "gsm8k": ("openai/gsm8k", "main", {"train": "train", "test": "test"}, ("boxed", "####")),
    "math": ("DigitalLearningGmbH/MATH-lighteval", None, {"train": "train", "test": "test"}, ("boxed",)),
    "dapo-math-17k": ("BytedTsinghua-SIA/DAPO-Math-17k", None, {"train": "train"}, ("boxed", "Answer:")),
    "dapo-math-17k-processed": ("open-r1/DAPO-Math-17k-Processed", "en", {"train": "train"}, ("boxed", "Answer:")),
    "deepscaler": ("agentica-org/DeepScaleR-Preview-Dataset", None, {"train": "train"}, ("boxed",)),
    "math500": ("HuggingFaceH4/MATH-500", None, {"test": "test"}, ("boxed",)),
    "aime24": ("HuggingFaceH4/aime_2024", None, {"test": "train"}, ("boxed",)),
    "aime25": ("math-ai/aime25", None, {"test": "test"}, ("boxed",)),
    "amc23": ("math-ai/amc23", None, {"test": "test"}, ("boxed",)),
    "amc": ("AI-MO/aimo-validation-amc", None, {"test": "train"}, ("boxed",)),
    "minerva": ("math-ai/minervamath", None, {"test": "test"}, ("boxed",)),
    "olympiad": ("math-ai/olympiadbench", None, {"test": "test"}, ("boxed",)),
    "omni": ("KbsdJames/Omni-MATH", None, {"test": "test"}, ("boxed",)),
}

# name: kind, hub id, config, split. The mmlu split is never test: that one is for scores.
PAIRS = {
    "pku-saferlhf": ("safety", "PKU-Alignment/PKU-SafeRLHF", None, "train"),
    "llm-lat": ("safety", "LLM-LAT/harmful-dataset", None, "train"),
    "jbb": ("safety", "JailbreakBench/JBB-Behaviors", "behaviors", "harmful"),
    "jbb-benign": ("over-refusal", "JailbreakBench/JBB-Behaviors", "behaviors", "benign"),
    "xstest": ("over-refusal", "Paul/XSTest", None, "train"),
    "alpaca": ("utility", "tatsu-lab/alpaca", None, "train"),
    "gsm8k": ("utility", "openai/gsm8k", "main", "train"),
    "mmlu": ("utility", "cais/mmlu", "all", "dev"),
}
GATED = {"advbench": "jbb", "harmbench": "jbb", "xstest": "xstest", "wildguardmix": "pku-saferlhf"}  # walledai, allenai: the open stand-in
SAFE_ANSWER = "I'm sorry, but I can't help with that."  # the response where a set has harmful requests and no safe answer

MALFORMED = (AttributeError, IndexError, KeyError, TypeError)  # what reading a row raises whose columns are not of the hub's types

DAPO_WRAPPER = re.compile(
    r"Solve the following math problem step by step\.\s*The last line of your response should be of the form Answer: \$?Answer"
    r".*?where \$?Answer is the answer to the problem\.\s*(.*?)\s*Remember to put your answer on its own line after [\"“]Answer:[\"”]\.?\s*",
    re.DOTALL,
)


def names(split):
    """The data sets that have a "train" or a "test" side; the embedded one comes first."""
    return ["arithmetic", *(name for name, (_, _, splits, _) in SETS.items() if split in splits)]


def question_of(row):
    """The bare question of a row, "" when it has none. A chat is its last user message; DAPO's wrapper comes off."""
    text = next((row[name] for name in ("problem", "question", "prompt") if row.get(name)), "")
    if isinstance(text, list):
        text = next((turn["content"] for turn in reversed(text) if turn["role"] == "user"), "")
    wrapped = DAPO_WRAPPER.fullmatch(text.strip())
    return wrapped[1] if wrapped else text.strip()


def gold_of(row):
    """The gold answer of a row as text, "" when it has none. Which column has it, and how, tells the set apart."""
    if row.get("reward_model"):  # DAPO, both versions
        gold = row["reward_model"]["ground_truth"]
    elif "final_answer" in row:  # OlympiadBench: ["$2$"], or several in one
        gold = ", ".join(row["final_answer"]) if isinstance(row["final_answer"], list) else row["final_answer"]
    elif "answer" in row:
        gold = row["answer"]
        if isinstance(gold, str) and "####" in gold:  # GSM8K: the working, then #### 1,234
            gold = gold.rpartition("####")[2].replace(",", "")
    else:  # MATH: the last box of the solution. DAPO without its reward_model: the solution is the answer
        gold = last_boxed(row.get("solution") or "") if "problem" in row else row.get("solution")
    if gold is None or gold != gold:  # NaN: what a table makes of a missing number
        return ""
    if isinstance(gold, float) and gold.is_integer():  # AMC: 142.0
        gold = int(gold)
    gold = re.sub(r"(?<!\\)\$", "", str(gold)).strip()
    return re.sub(r"^([-+]?[0-9.]+)[eE]\+?(-?[0-9]+)$", r"\1 \\times 10^{\2}", gold)  # Minerva: 4.5e33


def load_rows(label, hub_id, config, split, root=None):
    """Yields the rows of a hub's set, from its folder under `root` where there is one. Raises UserError if it has neither."""
    if root and not Path(root).is_dir():
        raise UserError(f"--data-root {root} (or DATA_DIR): there is no such folder")
    folder = next((str(path) for name in (label, hub_id) if root and (path := Path(root) / name).is_dir()), None)
    yield from folder_rows(folder or hub_id, config, split, None if folder else hub_id)


def folder_rows(path, config, split, hub_id=None):
    """Yields what load_dataset(path, config, split=...) has. Its many errors become one line that says what to do."""
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a dozen lines of retries; what went wrong is said below
    try:
        # A folder is read anew: the cache would take it for any other folder with the same file names, or for what it was before.
        rows = datasets.load_dataset(path, config, split=split, streaming=not hub_id)
        for batch in rows.with_format("arrow").iter(10_000):  # about ten times as fast as row by row
            yield from batch.to_pylist()
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        if hub_id:
            raise UserError(
                f"{hub_id} cannot be loaded ({why}); without a network: run `hf download {hub_id} --repo-type dataset --local-dir "
                f"FOLDER/{hub_id}` on a machine that has one, copy FOLDER here and give --data-root FOLDER (or set DATA_DIR)"
            ) from None
        raise UserError(f"{path}: no data set that can be loaded as config {config}, split {split} ({why})") from None


def local_rows(path, split):
    """Yields the rows of a .jsonl, .json or .parquet file, or of a folder that load_dataset reads."""
    path = Path(path)
    try:
        if path.is_dir():
            import datasets

            configs = datasets.get_dataset_config_names(str(path))
            config = next((name for name in ("default", "all", "main", "en") if name in configs), configs[0])
            splits = datasets.get_dataset_split_names(str(path), config)
            # One split is the data, whatever it is called; of several, the one that was asked for.
            yield from folder_rows(str(path), config, splits[0] if len(splits) == 1 else split)
        elif path.suffix == ".parquet":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        elif path.suffix in (".jsonl", ".json"):
            text = path.read_text(encoding="utf-8")
            rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError("not a list of objects")
            yield from rows
        else:
            raise ValueError("not a .jsonl, .json or .parquet file and not a folder")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be read as a data set: {' '.join(str(error).split())[:200]}") from None


def tidied(counts, kept, label):
    """The counts without the reasons that never came up. Raises UserError when nothing was kept."""
    counts["kept"] = kept
    counts = {reason: count for reason, count in counts.items() if count or reason in ("rows", "kept")}
    if not kept:
        raise UserError(f"{label}: no usable row ({', '.join(f'{reason}: {count}' for reason, count in counts.items())})")
    return counts


def select(rows, name):
    """Rows as {question: gold}, each question once, and the counts of `load_problems`. Raises UserError if nothing is left."""
    counts = dict.fromkeys("rows|kept|malformed|no question|no answer|duplicate prompt|conflicting answers|gold can't be parsed".split("|"), 0)
    golds, times, conflicting = {}, {}, set()
    for row in rows:
        if not counts["rows"] and not ({"problem", "question", "prompt"} & set(row) and {"answer", "final_answer", "solution", "reward_model"} & set(row)):
            raise UserError(f"--data {name}: needs a column prompt, problem or question and a column answer; it has {', '.join(row)}")
        counts["rows"] += 1
        try:
            question, gold = question_of(row), gold_of(row)
        except MALFORMED:
            counts["malformed"] += 1
            continue
        if not question or not gold:
            counts["no answer" if question else "no question"] += 1
        elif question not in golds:
            golds[question], times[question] = gold, 1
        else:
            times[question] += 1
            if gold != golds[question] and settle(gold, golds[question]) is not True:
                conflicting.add(question)
    for question in list(golds):
        if question in conflicting:  # one of the answers is wrong, and nobody knows which
            counts["conflicting answers"] += times[question]
            del golds[question]
            continue
        counts["duplicate prompt"] += times[question] - 1
        if not parses(golds[question]):
            counts["gold can't be parsed"] += 1
            del golds[question]
    return golds, tidied(counts, len(golds), f"--data {name}")


def load_problems(name, split="train", root=None):
    """The problems of a data set.

    name: "arithmetic" (embedded), a key of SETS, or a path: a .jsonl, .json or .parquet file or a folder that
    datasets.load_dataset reads, with the columns prompt, problem or question, and answer (or those of a set in SETS).
    split: "train" or "test". root: a folder with local copies of hub sets, by name or hub id (default: $DATA_DIR).
    Returns (problems, counts), counts a dict reason -> rows with "rows" and "kept" first; kept and the reasons add up to
    rows. Raises UserError for an unknown name, a split that a set does not have, a hub out of reach, or no usable row.
    """
    if name == "arithmetic":
        from tiny import arithmetic_problems

        problems = arithmetic_problems(split, 10_000 if split == "train" else 500)
        return [{**problem, "styles": ("#",), "instruction": ""} for problem in problems], {"rows": len(problems), "kept": len(problems)}
    if name in SETS:
        hub_id, config, splits, styles = SETS[name]
        if split not in splits:
            use = "for evaluation only, never trained on" if split == "train" else "for training only: it has no held-out split"
            raise UserError(f"--data {name}: {hub_id} is {use}")
        rows = load_rows(name, hub_id, config, splits[split], root or os.environ.get("DATA_DIR"))
    elif Path(name).exists():
        styles, rows = ("boxed", "####", "Answer:"), local_rows(name, split)
    else:
        raise UserError(f"--data {name}: unknown; neither a file or folder nor one of arithmetic, {', '.join(SETS)}")
    golds, counts = select(rows, name)
    problems = [{"prompt": prompt, "answer": gold, "styles": styles, "instruction": BOXED} for prompt, gold in golds.items()]
    return problems, counts


def take(problems, cursor, count, seed):
    """`count` problems from position `cursor` of an endless stream: one shuffled pass over all of them after another."""
    chosen, orders = [], {}
    for position in range(cursor, cursor + count):
        epoch, index = divmod(position, len(problems))
        if epoch not in orders:
            orders[epoch] = random.Random(f"{seed}, pass {epoch}").sample(range(len(problems)), len(problems))
        chosen.append(problems[orders[epoch][index]])
    return chosen


def render(problem, tokenizer):
    """The text of a problem's prompt, and how it was made: "chat template" where the tokenizer has one, else "plain"."""
    text = "\n".join(part for part in (problem["prompt"], problem["instruction"]) if part)
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False), "chat template"
    return text + "\n" if problem["instruction"] else text, "plain"


def encode_prompts(problems, tokenizer, max_prompt_length):
    """Adds "prompt_ids" to each problem and leaves out those of more than max_prompt_length tokens: never cuts one.

    Returns (problems, dropped, how): new dicts, how many were too long, and how they were rendered (see `render`).
    Raises UserError when all are too long.
    """
    kept, how = [], "plain"
    for problem in problems:
        text, how = render(problem, tokenizer)
        # A chat template has written its own special tokens.
        ids = tokenizer(text, add_special_tokens=how == "plain").input_ids
        if len(ids) <= max_prompt_length:
            kept.append({**problem, "prompt_ids": ids})
    if not kept:
        raise UserError(f"all {len(problems)} prompts are longer than {max_prompt_length} tokens: raise --max-prompt-length")
    return kept, len(problems) - len(kept), how


def load_prompts(name, split, tokenizer, max_prompt_length, root=None):
    """load_problems and encode_prompts in one, reported on the terminal: rows kept, dropped and why, the first prompt, its gold."""
    problems, counts = load_problems(name, split, root)
    problems, too_long, how = encode_prompts(problems, tokenizer, max_prompt_length)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    print(f"{name}: {reasons}, {too_long} longer than {max_prompt_length} tokens; {how}")
    print(f"  first prompt {render(problems[0], tokenizer)[0]!r}\n  its gold answer {problems[0]['answer']!r}")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and responses (used by cast.py)


def read_pair(row):
    """A row of any set in PAIRS, or of a local file, as (prompt, response); "" for what it lacks."""
    if "safer_response_id" in row:  # PKU-SafeRLHF: "safer" may still be unsafe
        safe = [i for i in (row["safer_response_id"], 0, 1) if row[f"is_response_{i}_safe"]]
        return row["prompt"], row[f"response_{safe[0]}"] if safe else ""
    if "Goal" in row:
        return row["Goal"], SAFE_ANSWER
    if "instruction" in row:
        return "\n".join(part for part in (row["instruction"], row.get("input")) if part), row["output"]
    if "choices" in row:
        lettered = [f"{letter}. {choice}" for letter, choice in zip("ABCDEFGHIJ", row["choices"])]
        return "\n".join([row["question"], *lettered, "Answer:"]), "ABCDEFGHIJ"[row["answer"]]
    prompt = row.get("prompt") or row.get("question")
    return prompt, row.get("response") or row.get("chosen") or row.get("answer")


def load_pairs(name, kind, split=None, root=None):
    """Prompts with the response that is wanted.

    name: a key of PAIRS or the path of a local file or folder (columns prompt and response, or those of a set in PAIRS);
    kind: "safety" (harmful requests, safe responses), "utility" or "over-refusal" (harmless requests that look harmful,
    no response wanted: ""); split: another split of the hub's set; root: see `load_problems`.
    Returns (pairs, counts), pairs dicts "prompt", "response". Raises UserError for an unknown or gated name, a set of
    another kind, mmlu's test split, a hub out of reach, or no usable row.
    """
    if not Path(name).exists():  # a hub id of one of PAIRS is that set
        name = next((key for key, (own, hub_id, *_) in PAIRS.items() if hub_id == name and own == kind), name)
    short = name.rpartition("/")[2].lower()
    if name not in PAIRS and short in GATED and not Path(name).exists():
        raise UserError(f"{name} is gated: the hub wants a login and an agreement for it; its open stand-in here is {GATED[short]}")
    if name in PAIRS:
        set_kind, hub_id, config, own_split = PAIRS[name]
        if kind != set_kind:
            raise UserError(f"{name} is a {set_kind} set, not a {kind} set; those are {', '.join(n for n in PAIRS if PAIRS[n][0] == kind)}")
        if name == "mmlu" and split == "test":
            raise UserError("mmlu: its test split is for scores and never trained on; use dev or validation")
        rows = load_rows(name, hub_id, config, split or own_split, root or os.environ.get("DATA_DIR"))
    elif Path(name).exists():
        rows = local_rows(name, split or "train")
    else:
        raise UserError(f"{name}: unknown; neither a file or folder nor one of {', '.join(n for n in PAIRS if PAIRS[n][0] == kind)}")
    pairs, counts = {}, dict.fromkeys("rows|kept|malformed|no prompt|no response|labelled unsafe|duplicate prompt".split("|"), 0)
    for row in rows:
        counts["rows"] += 1
        try:
            prompt, response = read_pair(row)
            prompt, response = (prompt or "").strip(), "" if response is None else str(response)
        except MALFORMED:
            counts["malformed"] += 1
            continue
        if not prompt:
            counts["no prompt"] += 1
        elif kind == "over-refusal" and row.get("label") == "unsafe":  # XSTest's contrasts: refusing those is right
            counts["labelled unsafe"] += 1
        elif not response and kind != "over-refusal":
            counts["no response"] += 1
        elif prompt in pairs:
            counts["duplicate prompt"] += 1
        else:
            pairs[prompt] = "" if kind == "over-refusal" else response
    counts = tidied(counts, len(pairs), name)
    return [{"prompt": prompt, "response": response} for prompt, response in pairs.items()], counts
