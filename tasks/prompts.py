"""Prompts: a problem as the text, and the tokens, that a model is asked with.

    problem --prompted--> with what the flags add --render--> text --tokenized--> token ids

A chat model gets its prompts through the chat template of its tokenizer, which is the work of a
stranger: it is given little time and memory.
"""

import argparse
import inspect
import json
import signal
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.errors import UserError, reason
from tasks.rows import MARKUP, plain_chat, unicode

# -------------------------------------------------------------------------------------------------
# What the flags add to a prompt


def template_kwargs(text):
    """The type of --chat-template-kwargs: the text itself. Raises ArgumentTypeError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        example = '{"enable_thinking": false}'
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a JSON object such as {example}")
    return text


def add_prompt_flags(parser, examples=True):
    """The flags that `prompted` reads. examples: also those that make no sense for safety data."""
    flag = parser.add_argument
    flag(
        "--system-prompt",
        metavar="TEXT",
        type=unicode,
        help="the chat's system turn, in place of the data's",
    )
    flag(
        "--chat-template-kwargs",
        metavar="JSON",
        type=template_kwargs,
        help="for the chat template, e.g. '{\"enable_thinking\": false}'",
    )
    if examples:
        flag("--few-shot", metavar="FILE", help="worked examples, asked and answered before each")
        flag(
            "--instruction",
            metavar="TEXT",
            type=unicode,
            help="put behind each problem, in place of the data's",
        )


MOST_EXAMPLES = 100


def few_shot_examples(path):
    """The pairs in the file of --few-shot, as dicts "prompt", "response". Raises UserError."""
    from tasks.safety import load_pairs

    try:
        pairs, _ = load_pairs(path, "utility")
    except UserError as error:
        raise UserError(f"--few-shot {error}") from None
    if len(pairs) > MOST_EXAMPLES:
        raise UserError(f"--few-shot {path}: {len(pairs):,} examples; at most {MOST_EXAMPLES}")
    return pairs


def template_options(text, tokenizer):
    """The dict of --chat-template-kwargs. text: JSON, or None. Raises UserError."""
    options = json.loads(text or "{}")
    if not options:
        return {}
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("--chat-template-kwargs: this model's tokenizer has no chat template")
    method = inspect.signature(tokenizer.apply_chat_template).parameters
    taken = {"self", "messages", *method} - {"tools", "documents"}
    wrong = ", ".join(sorted(taken & options.keys()))
    if wrong:
        raise UserError(f"--chat-template-kwargs: {wrong}: that is no variable of a chat template")
    return options


def prompted(problems, tokenizer, args):
    """The problems with what the flags of `add_prompt_flags` add. args: with those flags.

    The examples of --few-shot become turns of the user and the assistant. A user's turn ends in the
    instruction in all of them. An example that asks the very same as a problem is left out there.
    Returns new dicts. Raises UserError for examples that cannot be read, for a tokenizer without
    the chat template that is to get --chat-template-kwargs, for kwargs that are not the template's,
    and for a prompt that is rendered already.
    """
    system = args.system_prompt
    instruction = getattr(args, "instruction", None)
    path = getattr(args, "few_shot", None)
    examples = [] if path is None else few_shot_examples(path)
    options = template_options(args.chat_template_kwargs, tokenizer)
    if not (system is not None or instruction is not None or examples or options):
        return problems

    found = []
    for problem in problems:
        if "messages" not in problem and is_rendered(problem["prompt"], tokenizer):
            raise UserError(
                "--system-prompt, --few-shot, --instruction and --chat-template-kwargs are for "
                "plain prompts, and these are rendered already: "
                f"{problem['prompt'][:60]!r}"
            )
        turns = problem.get("messages") or [{"role": "user", "content": problem["prompt"]}]
        if system is not None:
            turns = [turn for turn in turns if turn["role"] != "system"]
            turns = [{"role": "system", "content": system}, *turns]
        if instruction is None:
            asked = problem.get("instruction", "")
        else:
            asked = instruction
        others = [e for e in examples if e["prompt"] != problem["prompt"].strip()]
        shown = [turn for example in others for turn in example_turns(example, asked)]
        opening = [turn for turn in turns[:1] if turn["role"] == "system"]
        turns = [*opening, *shown, *turns[len(opening) :]]
        new = {**problem, "instruction": asked}
        if len(turns) > 1:
            new["messages"] = turns
        if options:
            new["chat_template_kwargs"] = options
        found.append(new)
    return found


def example_turns(example, instruction):
    """An example as turns of the user and the assistant. A system turn of its own is left out."""
    question = example.get("messages") or [{"role": "user", "content": example["prompt"]}]
    question = [turn for turn in question if turn["role"] != "system"]
    answer = {"role": "assistant", "content": example["response"]}
    return [*with_instruction(question, instruction), answer]


def with_instruction(turns, instruction):
    """The turns of a chat, the last of them with an instruction behind it."""
    *earlier, last = turns
    text = "\n".join(part for part in (last["content"], instruction) if part)
    return [*earlier, {**last, "content": text}]


# -------------------------------------------------------------------------------------------------
# From a problem to text, and to tokens


def render(problem, tokenizer):
    """The text of a problem's prompt, and how it was made.

    problem: "prompt", and "messages" where it is a chat; an "instruction" is put behind the prompt,
    or behind the last turn of the chat; "chat_template_kwargs" are for the template.
    How: "chat template" where the tokenizer has one, else "plain". A plain prompt without an
    instruction stays as it is; with one, it ends in a line break; of a chat the turns begin with
    "System: ", "User: ", "Assistant: ", and it ends in "Assistant:". "already rendered" is a prompt
    that begins with a token of the chat template: it stays as it is, without an instruction.
    Raises UserError where the template fails.
    """
    messages = problem.get("messages")
    turns = messages or [{"role": "user", "content": problem["prompt"]}]
    if not messages and is_rendered(problem["prompt"], tokenizer):
        return problem["prompt"], "already rendered"
    instruction = problem.get("instruction", "")
    turns = with_instruction(turns, instruction)
    if getattr(tokenizer, "chat_template", None):
        options = problem.get("chat_template_kwargs", {})
        return templated(turns, tokenizer, options), "chat template"
    if messages:
        return f"{plain_chat(turns)}\n\nAssistant:", "plain"
    text = turns[-1]["content"]
    if instruction:
        text += "\n"
    return text, "plain"


def is_rendered(prompt, tokenizer):
    """Whether a prompt begins with a token of the chat template, or a special one: <|im_start|>."""
    match = MARKUP.match(prompt)
    if not match:
        return False
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token) for token in added if token.special}
    return match["token"] in special or match["token"] in str(
        getattr(tokenizer, "chat_template", None)
    )


RENDER_SECONDS = 5  # for one prompt; an honest template takes a millisecond
RENDER_LENGTH = 5_000_000  # characters
MOST_BYTES = 2 * 1024**3  # of memory that the work of a stranger may ask for


def templated(turns, tokenizer, options):
    """The turns as the tokenizer's chat template writes them. Raises UserError where it can't.

    The template is the work of a stranger, too: it may raise, loop and print without end.
    """
    try:
        with limits(RENDER_SECONDS):
            text = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False, **options
            )
        if len(text) > RENDER_LENGTH:
            raise ValueError(f"it has written {len(text):,} characters")
        return unicode(text)
    except Exception as error:
        roles = ", ".join(turn["role"] for turn in turns[:8])
        raise UserError(
            f"the tokenizer's chat template cannot write a prompt of the turns {roles}: "
            f"{type(error).__name__}: {reason(error)}"
        ) from None


@contextmanager
def limits(seconds):
    """Limits time and memory of what runs inside, on the main thread and where the system can.

    Raises TimeoutError or MemoryError inside.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are for the main thread
        return

    def stop(number, frame):
        raise TimeoutError(f"not ready after {seconds} seconds")

    handler = signal.signal(signal.SIGALRM, stop)
    # Again and again: Python swallows what is raised while it drops a weak reference.
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
    try:
        with memory_limit():
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def memory_limit():
    """Limits the memory that this process may ask for beyond what it has (macOS can't)."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    if before[0] == resource.RLIM_INFINITY:
        with suppress(OSError, ValueError):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + MOST_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def tokenized(rendered, tokenizer):
    """The token ids of what `render` returned for each problem, all at once: one by one is slow."""
    ids = [None] * len(rendered)
    for plain in (True, False):
        numbers = [i for i, (_, how) in enumerate(rendered) if (how == "plain") == plain]
        texts = [rendered[i][0] for i in numbers]
        # A chat template has written its own special tokens.
        found = tokenizer(texts, add_special_tokens=plain).input_ids if texts else []
        for i, tokens in zip(numbers, found):
            ids[i] = tokens
    return ids


def encode(problems, tokenizer, max_prompt_length):
    """Adds "prompt_ids" to each problem and leaves out those that are too long: it never cuts one.

    max_prompt_length: in tokens. Returns new dicts. Their "prompt_form" says how the prompt was
    rendered. Where it ends inside a thought, "opened_thought" is True.
    Raises UserError when all are too long, or one is empty.
    """
    kept = []
    rendered = [render(problem, tokenizer) for problem in problems]
    for problem, (text, how), ids in zip(problems, rendered, tokenized(rendered, tokenizer)):
        if not ids:
            raise UserError("a prompt is empty: a model needs at least one token to begin with")
        if len(ids) <= max_prompt_length:
            problem = {**problem, "prompt_ids": ids, "prompt_form": how}
            if text.rstrip().endswith("<think>"):
                problem["opened_thought"] = True
            kept.append(problem)
    if not kept:
        raise UserError(
            f"all {len(problems)} prompts are longer than {max_prompt_length} tokens: "
            "raise --max-prompt-length"
        )
    return kept
