r"""Judges an answer: is it equal to the gold one? Nothing in it is learned.

The answer is cut out of what follows the completion's thought (the last balanced \boxed{}). Then
the first check that can decide decides:

    1. length, balance      over 1,000 characters or unbalanced braces: wrong
    2. a choice             gold A or (A) 5: (A), A. 5 and \textbf{(A) }5 are right
    3. the same text        without LaTeX spacing, \left, \dfrac, $, degrees: right
    4. units                5 cm is not 5 m; a unit on one side only is ignored
    5. two numbers          exact fractions: 1,234 = 1234, 07 = 7, 0.50 = \frac{2}{4}, 4e3 = 4000;
                            75+25 is no answer where a number is asked for, nor is 50/5 for 10
    6. a word               gold "east": only the word itself (to sympy seat = east: e*a*s*t)
    7. hostile size         towers of powers, exponents and factorials of five digits: wrong
    8. algebra              both are parsed, each as a whole, and sympy compares them

The cheap checks come first (their texts, units and numbers: notation.py). They decide nearly all
answers that are integers. Algebra (algebra.py) runs sympy on text that a policy wrote, so it runs
in a worker process. The kernel limits the worker's time and memory. When an answer kills the
worker, the answer is wrong and a new worker starts. `allow` limits what all answers together take.

Readings, where grading is a convention: 50% equals 50 and 0.5. A decimal equals a gold that is not
an integer when they agree to one part in a million (0.333333 for 1/3); an integer must be met
exactly. 1010 is accepted for 1010_2, because its question asks for base two. Only the last box
counts: several boxed numbers are not a set. A letter by itself is a variable and no unit: 7 is not
7m. i is the imaginary unit. A pair must come in order, with or without its brackets; a list is a
set.

`python -m tasks.verify` shows it on a few answers.
"""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from engine.errors import UserError
from tasks.notation import bare, clean, normalise, number, same_number, split_unit, without_units

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT = 3.0  # seconds of work for one judgement; an honest one takes some milliseconds
START_LIMIT = 30.0  # seconds of work for the worker to import sympy; a second is usual
MEMORY_LIMIT = 2 * 1024**3  # bytes of address space for the worker
MAX_ANSWER = 1000  # characters
MAX_DEPTH = 20  # nested braces and brackets

# -------------------------------------------------------------------------------------------------
# Cutting the answer out

BOX = re.compile(
    r"""
    \\(?:boxed|fbox) \s* (?P<open>\{)               # \boxed{
    | \\(?:boxed|fbox) [ ]+ (?P<bare>[^\s{}$\\]+)   # \boxed 7
    | \\.                                           # \{ and \} are no braces
    | (?P<brace>[{}])
    """,
    re.DOTALL | re.VERBOSE,
)


def after_thought(text, opened=False):
    """What follows the last </think>: the part of a completion that answers.

    opened: whether the prompt ended in an open <think>.
    Returns None for a thought that has begun and not ended, and the text itself where there is no
    thought.
    """
    thought, ended, rest = text.rpartition("</think>")
    if "<think>" in rest or (opened and not ended):
        return None
    return rest


def last_boxed(text):
    r"""The content of the last balanced \boxed{...}, \fbox{...} or \boxed 7, or None."""
    content_starts = []  # one entry an open brace: where the content of its box starts, or None
    last_start = -1
    last = None
    for token in BOX.finditer(text):
        start = None
        if token["bare"]:
            start = token.start("bare")
            content = token["bare"].rstrip(".,")
        elif token["open"]:
            content_starts.append(token.end())
        elif token["brace"] == "{":
            content_starts.append(None)
        elif token["brace"] and content_starts:
            start = content_starts.pop()
            content = text[start : token.start()] if start is not None else None
        if start is not None and start > last_start:
            last_start = start
            last = content
    return last


def after_marker(text, marker):
    """The rest of the line behind the last `marker`, without $, * and a full stop, or None."""
    _, found, after = text.rpartition(marker)
    if not found:
        return None
    answer = after.partition("\n")[0].strip().strip("*$").rstrip(".").strip("*$ ")
    return last_boxed(answer) or answer


def extract_answer(completion, styles=("boxed",), *, judge_thoughts=False, opened=False):
    """The final answer as the completion writes it, or None.

    styles: where to look; the first one that is there counts. "boxed" is the last balanced box,
    "####" and "Answer:" are the rest of the line behind the last such marker.
    judge_thoughts: look at the whole completion, in place of what follows its thought; opened: see
    `after_thought`.
    """
    text = completion if judge_thoughts else after_thought(completion, opened)
    if text is None:
        return None
    for style in styles:
        answer = last_boxed(text) if style == "boxed" else after_marker(text, style)
        if answer is not None:
            return answer.strip()
    return None


# -------------------------------------------------------------------------------------------------
# What is decided without algebra

INTEGER = re.compile("-?[0-9]{1,99}")
WORDS = re.compile(
    r"""
    [A-Za-z]{3,}
    | [A-Za-z]{2,} [ .'’] [A-Za-z]+ (?:[ .'’-] [A-Za-z]+){0,4}   # no solution, Mrs. Hilt
    | (?i:no|up)
    """,
    re.VERBOSE,
)
CHOICE = re.compile(
    r"""
    (?: \( (?P<inside>[A-J]) \) | (?P<before>[A-J]) [).:] ) [ ]?
    (?! [,;] | (?:and|or)(?![a-z]) | .* (?<![A-Za-z]) [A-J]\) )     # (A) or (B)
    (?P<value>.+)
    """,
    re.VERBOSE,
)
BASED = re.compile(r"([0-9][0-9a-zA-Z]*)(?:_\{?([0-9]{1,2})\}?)?")  # 1010_2
TOWER = re.compile(
    r"""
    \^ [{(\s+-]* (?P<base>[0-9]+) \s* \}? \s*       # an exponent that is a number
    \^ [{(\s+-]* (?P<exponent>[0-9]+) \s* \}? \s*   # with an exponent of its own
    (?P<more>\^)?
    """,
    re.VERBOSE,
)
HOSTILE = re.compile(
    r"""
    \^ [{(\s+-]* [0-9][0-9,]{4}                    # an exponent of five digits
    | [0-9]{5} [)}\s]* !                           # a factorial of five digits
    | ! [)}\s]* !                                  # a factorial of a factorial
    | (?<![_^0-9.]) [0-9.]+ [ ] [0-9]              # 2 3, which sympy multiplies to 6
    """,
    re.VERBOSE,
)


def usable(text):
    """Whether an answer may be looked at: not empty, not too long, braces balanced and not deep."""
    if len(text) > MAX_ANSWER or not text.strip():
        return False
    depth = deepest = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
        deepest = max(deepest, depth)
    brackets = text.count("(") + text.count("[")
    return depth == 0 and max(deepest, brackets) <= MAX_DEPTH


def hostile(text):
    """Whether sympy must not see an answer: its value is enormous, or it means something else."""
    text = text.replace("**", "^")
    for tower in TOWER.finditer(text):
        base, exponent = tower["base"], tower["exponent"]
        if tower["more"] or len(base + exponent) > 5 or int(base) ** int(exponent) > 10**4:
            return True
    return bool(HOSTILE.search(text))


def settle(answer, gold):
    """True or False where text, units and numbers decide, else None (algebra has to)."""
    return reduced(answer, gold)[0]


def reduced(answer, gold):
    """(What `settle` returns, and the answer and the gold without what has been dealt with)."""
    if not usable(answer) or not usable(gold):
        return False, answer, gold
    if INTEGER.fullmatch(answer) and INTEGER.fullmatch(gold):
        return int(answer) == int(gold), answer, gold
    answer, gold = without_choices(clean(answer), clean(gold))
    values = without_units(answer, gold)
    verdict = same_text(answer, gold)
    if verdict is None and values is None:
        verdict = False
    if verdict is None:
        answer, gold = values
        verdict = same_text(answer, gold)
    if verdict is None:
        verdict = same_numeral_or_word(answer, gold)
    if verdict is None and hostile(answer):
        verdict = False
    return verdict, answer, gold


def same_text(answer, gold):
    """True for the same text, False where nothing is left of one of the two, else None."""
    answer = bare(answer)
    gold = bare(gold)
    if not answer or not gold:  # nothing but spacing, dollar signs or a full stop
        return False
    return answer == gold or None


def without_choices(answer, gold):
    """Two clean texts with what counts in answers to multiple-choice questions.

    That is the letters, where one of the two has only a letter, and else the values.
    """
    answer_letter, answer_value = choice(bare(answer))
    gold_letter, gold_value = choice(bare(gold))
    letters = bool(answer_letter and gold_letter)
    if letters and (answer_letter != gold_letter or not answer_value or not gold_value):
        return answer_letter, gold_letter
    return answer_value or answer, gold_value or gold


def choice(text):
    """(letter, value) of a normalised answer: ("A", "5") for `(A)5` and `A. 5`, "" for lacking."""
    if re.fullmatch("[A-J]", text):
        return text, ""
    match = CHOICE.fullmatch(text)
    return (match["inside"] or match["before"], match["value"]) if match else ("", "")


ARITHMETIC = re.compile(
    r"(?: [-+*/^×÷·0-9.,()\[\]{}$£€¥₹ ] | \\\$ | \\(?:times|cdot|div|frac|left|right)(?![a-z]) )+",
    re.VERBOSE,
)
QUOTIENT = re.compile(r"/|÷|\\(?:div|frac)(?![a-z])")
OPERATION = re.compile(
    r"""
    [+*×·] | \\(?:times|cdot)(?![a-z])
    | (?<=[0-9)\]}$]) [ ]* [-(]              # 7-5, 7(5); not -5
    """,
    re.VERBOSE,
)
SCIENTIFIC = re.compile(
    r"[-+]?[0-9.]+ [ ]* (?:[*×·]|\\times|\\cdot) [ ]* 10 [ ]* \^ [ ]* \{? [ ]* -?[0-9]+ [ ]* \}?",
    re.VERBOSE,
)


def unfinished(answer, gold_number):
    """Whether an answer is a sum, product, difference or quotient where a number was asked for.

    answer: a clean text; gold_number: of notation.number. A policy that is rewarded for 75+25 where
    100 is right learns to set up problems, and no longer to compute. A quotient is finished where
    the number is none of the integers.
    """
    answer = answer.replace("**", "^").lstrip("-+ ")
    if not ARITHMETIC.fullmatch(answer) or SCIENTIFIC.fullmatch(answer):
        return False
    if QUOTIENT.search(answer) and gold_number.value.denominator == 1:
        return True
    return bool(OPERATION.search(answer)) and not number(answer)


def same_numeral_or_word(answer, gold):
    """True or False where two clean texts are numerals, or the gold one is a word, else None."""
    answer_number = number(answer)
    gold_number = number(gold)
    if gold_number and unfinished(answer, gold_number):
        return False
    if answer_number and gold_number:
        return same_number(answer_number, gold_number)
    answer = bare(answer)
    gold = bare(gold)
    if WORDS.fullmatch(gold):
        return answer.casefold() == gold.casefold()
    a = BASED.fullmatch(answer)
    g = BASED.fullmatch(gold)
    if a and g and (a[2] or g[2]):
        digits = [match[1].lstrip("0").lower() for match in (a, g)]
        return digits[0] == digits[1] and (a[2] or g[2]) == (g[2] or a[2])
    return None


# -------------------------------------------------------------------------------------------------
# math-verify's parser and sympy in a worker process

_lock = threading.Lock()
_worker = None
_seconds_left = None  # of what `allow` has given; None for no limit
_undecided = 0


def allow(seconds):
    """From now on algebra may take so many seconds in all; None for no limit, as at the start.

    What would still have to be decided afterwards counts as wrong. The judgement during which the
    time runs out is finished, so it may take TIME_LIMIT and the start of a worker longer.
    """
    global _seconds_left, _undecided
    with _lock:
        _seconds_left = seconds
        _undecided = 0


def undecided():
    """How many answers counted as wrong since the last `allow` because the time had run out."""
    return _undecided


class Undecided(Exception):
    """Raised where algebra is needed and its time has run out. An exception is not cached."""


def start_worker():
    """A fresh worker process, ready. Raises UserError when math-verify is not installed.

    Without that error every answer would be wrong, as if the policy learned nothing.
    """
    # Never by the path of this file: then tasks/ would be on sys.path, and tasks/math.py would be
    # taken for Python's own math.
    command = [sys.executable, "-P", "-m", "tasks.verify", "--worker", str(TIME_LIMIT)]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    worker = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    if not worker.stdout.readline():
        raise UserError("math-verify does not start: pip install -r requirements.txt")
    return worker


def ask(*request):
    """Asks the worker. request: (gold,), "can it be read?", or (gold, answer), "are they equal?".

    Returns its reply, or None when it died of the request. Any thread may call.
    Raises Undecided for a pair when the time of `allow` has run out.
    """
    global _seconds_left
    with _lock:
        if len(request) == 1 or _seconds_left is None:
            return ask_in_turn(request)
        if _seconds_left <= 0:
            raise Undecided
        started = time.monotonic()
        try:
            return ask_in_turn(request)
        finally:
            _seconds_left -= time.monotonic() - started


def ask_in_turn(request):
    """`ask` without its lock and its limit.

    A worker that ran out of its own time has died of the request for certain. After any other death
    a fresh worker is asked once more: a process may be killed from outside.
    """
    global _worker
    for _ in range(2):
        if _worker is None or _worker.poll() is not None:  # a forked process gets its own
            _worker = start_worker()
        worker = _worker
        reply = ""
        try:
            worker.stdin.write(json.dumps(request) + "\n")
            worker.stdin.flush()
            reply = worker.stdout.readline()
        except OSError:  # it was dead already
            pass
        finally:
            if not reply:  # dead, or Ctrl-C: the next call must not read this call's reply
                worker.kill()
                worker.wait()
                _worker = None
        if reply or -worker.returncode in (signal.SIGPROF, signal.SIGALRM):
            break
    return json.loads(reply) if reply else None


def serve(time_limit):
    """The worker: a line of JSON in, a line of JSON out. The kernel ends it after time_limit."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like a reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    limit_time(START_LIMIT)
    limit_memory()
    from tasks.algebra import judge

    judge("\\frac{1}{2}", "2x")  # loads what is imported late
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        limit_time(time_limit)
        try:
            reply = judge(*json.loads(line))
        except Exception:  # sympy raises all sorts of things on nonsense
            reply = False
        limit_time(0)
        print(json.dumps(reply), file=replies, flush=True)


def limit_time(seconds):
    """The kernel ends this process after so many seconds of work; 0 for no limit.

    By the clock it has ten times as long: a busy machine must not change a verdict.
    """
    for kind in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(kind, signal.SIG_DFL)  # no handler: the process dies, even in a C call
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)


def limit_memory():
    """Limits the memory of this process, where the system can (macOS can't)."""
    import resource

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))


# -------------------------------------------------------------------------------------------------
# The judge

PROSE = re.compile(
    r"""
    (?<![\\A-Za-z])
    (?!(?:and|sin|cos|tan|cot|sec|csc|log|exp|gcd|lcm|min|max|mod)(?![A-Za-z]))
    (?: (?<=[ ]) [A-Za-z]{3,} | [A-Za-z]{3,} (?=[ ]) )
    """,
    re.VERBOSE,
)
NUMBER_WORDS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
    " hundred thousand million half third quarter dozen".split()
)


@functools.lru_cache(maxsize=100_000)
def equal(answer, gold):
    """Whether an extracted answer equals the gold one. Cached: a bomb costs its time once.

    Raises Undecided where it needs algebra and the time of `allow` has run out.
    """
    verdict, answer, gold = reduced(answer, gold)
    if verdict is not None:
        return verdict
    if gold[0] == "(" and gold[-1] == ")" and is_bare_list(answer):
        answer = f"({answer})"
    return ask(gold, answer) is True


def is_bare_list(answer):
    """Whether an answer is `1,2`, which may be a tuple without its brackets."""
    return "," in answer and not re.search(r"[()[\]<>={]|\\(in|le|ge)(?!f)", answer)


def is_right(completion, answer, styles=("boxed",), *, judge_thoughts=False, opened=False):
    """Whether the completion's final answer is the gold one.

    completion: any string; answer: the gold one; the others: see `extract_answer`.
    It takes at most TIME_LIMIT, and some seconds more when a worker has to be started.
    Raises UserError where math-verify is needed and not installed, and nothing else.
    """
    global _undecided
    found = extract_answer(completion, styles, judge_thoughts=judge_thoughts, opened=opened)
    if not found or len(found) > MAX_ANSWER:
        return False
    try:
        return equal(found, answer)
    except Undecided:
        with _lock:
            _undecided += 1
        return False


def parses(answer):
    """Whether a gold is usable: the plain form in which a model would write it meets it.

    The plain form of a number, with or without its unit, is the number; of a word the word, unless
    it is a number ("forty two"); of an expression what the parser reads to the last character. A
    number amid prose ("The answer is 2") must be met by the number alone.
    """
    if not usable(answer):
        return False
    text = normalise(answer)
    value = split_unit(clean(answer)).value
    if number(value) or all(choice(text)) or BASED.fullmatch(text):
        return True
    if WORDS.fullmatch(text):
        return not NUMBER_WORDS & set(text.lower().split())
    if hostile(value):
        return False
    if PROSE.search(bare(value)):
        numbers = re.findall("[0-9][0-9.,/]*", value)
        return len(numbers) == 1 and settle(numbers[0], answer) is True
    return ask(value) is True


DEMO = (
    (r"\boxed{\frac{14}{4}}", "3.5"),
    (r"\boxed{x < 3}", r"(-\infty, 3)"),
    (r"\boxed{1,234\text{ cm}}", "1234"),
    (r"\boxed{5 \text{ or } 7}", "5"),
    (r"\boxed{9^{9^{9^9}}}", "9"),
    (r"\boxed{(x+1)^2", "x^2+2x+1"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1"),
)


def main():
    """Prints verdicts on a few answers."""
    print(f"{'completion ends in':38}  {'gold':16}  right")
    for completion, gold in DEMO:
        print(f"{completion:38}  {gold:16}  {is_right(completion, gold)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(float(sys.argv[2]))
    else:
        main()
