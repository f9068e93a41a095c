r"""Judges an answer: is it equal to the gold one? Nothing in it is learned.

The answer is cut out of the completion (its last balanced \boxed{}). Then the first check that can
decide decides:

    1. length, balance      over 1,000 characters or unbalanced braces: wrong
    2. units                5 cm is not 5 m; a unit on one side only is ignored
    3. the same text        without LaTeX spacing, \left, \dfrac, $, degrees: right
    4. two numbers          exact fractions: 1,234 = 1234, 07 = 7, 0.50 = \frac{2}{4}, 4e3 = 4000
    5. a word               gold "east": only the word itself (to sympy seat = east: e*a*s*t)
    6. hostile size         towers of powers, exponents and factorials of five digits: wrong
    7. math-verify          parses \boxed{gold} and \boxed{answer}; sympy says if they are equal

The cheap checks come first. They decide nearly all answers that are integers.
math-verify runs sympy on text that a policy wrote, so it runs in a worker process. The kernel
limits the worker's time and memory. When an answer kills the worker, the answer is wrong and a new
worker starts. math-verify's own time-outs are off: they are Python signal handlers, which fail off
the main thread and can't stop a C call.

Readings, where grading is a convention: 50% equals 50 and 0.5. A decimal equals a gold that is not
an integer when they agree to one part in a million (0.333333 for 1/3); an integer must be met
exactly. 1010 is accepted for 1010_2, because its question asks for base two. Only the last box
counts: several boxed numbers are not a set.

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
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT = 3.0  # seconds for one judgement; an honest one takes some milliseconds
START_LIMIT = 120.0  # seconds for the worker to import sympy; a second is usual
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


def extract_answer(completion, styles=("boxed",)):
    """The final answer as the completion writes it, or None.

    styles: where to look; the first one that is there counts. "boxed" is the last balanced box,
    "####" and "Answer:" are the rest of the line behind the last such marker.
    """
    for style in styles:
        answer = last_boxed(completion) if style == "boxed" else after_marker(completion, style)
        if answer is not None:
            return answer.strip()
    return None


# -------------------------------------------------------------------------------------------------
# Two texts in one form

REWRITES = (
    (r"(?<!\\)(\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\displaystyle|\\[!,;:()[\]]|\\?\$)", ""),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac\s*([0-9])\s*([0-9])(?![0-9])", r"\\frac{\1}{\2}"),
    (r"\^\s*(\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])|°", ""),
    (r"\{,\}", ","),
    (r"[−–]", "-"),
    (r"\\%", "%"),
    (r"(?<!\\)\\ |~|\s+", " "),
    (r"(?<=[0-9.])[eE]([+-]?[0-9]+)$", r" \\times 10^{\1}"),  # sympy: 4.5e33 = 4.5 * e * 33
)
TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}"
)
NEEDLESS_SPACE = re.compile(r"(?<![0-9A-Za-z]) +| +(?![0-9A-Za-z])")  # 1 1/2 is not 11/2


def clean(text):
    """The answer without what only changes its looks; spaces that may mean something stay."""
    for pattern, new in REWRITES:
        text = re.sub(pattern, new, text)
    return text.strip().rstrip(".").rstrip()


def normalise(text):
    """The form in which two texts are compared: clean, no text commands. `(B)` is `B`."""
    text = TEXT.sub(r" \1 ", clean(text))
    text = NEEDLESS_SPACE.sub("", re.sub(" +", " ", text))
    return text[1:-1] if re.fullmatch(r"\([A-Za-z]\)", text) else text


# -------------------------------------------------------------------------------------------------
# Units

UNIT = re.compile(
    r"""
    (?:
        \\(?:text|textrm|mathrm|mbox) [ ]? \{ [ ]? (?P<text>[A-Za-z][A-Za-z./ ]*) \}
      | (?<=[0-9 }]) (?P<short>cm|mm|km|kg|mg|ft|mi|ml|lb|oz|mph)      # 5cm
      | (?<=[ ]) (?P<word>(?:square[ ]|sq[ ]|cubic[ ])?[a-z]{3,}|in)   # 5 square feet
    )
    \.? (?P<power>[ ]?\^[ ]?\{?[ ]?[23][ ]?\}?)? $
    """,
    re.VERBOSE,
)
UNIT_WORDS = {
    "cm": "centimeter centimetre",
    "mm": "millimeter",
    "km": "kilometer",
    "m": "meter metre",
    "in": "inch inche",  # what is left of inches
    "ft": "foot feet",
    "mi": "mile",
    "hour": "hr",
    "minute": "min",
    "second": "sec",
    "kg": "kilogram",
    "g": "gram",
    "lb": "pound",
    "oz": "ounce",
    "": "degree unit point",
}
UNIT_NAMES = {word: unit for unit, words in UNIT_WORDS.items() for word in words.split()}
SCALES = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}


def split_unit(text):
    r"""A clean answer as (value, unit): `12\text{ cm}^2` is ("12", "cm^2"), `x` is ("x", "")."""
    match = UNIT.search(text)
    value = text[: match.start()].rstrip() if match else ""
    if not re.search("[0-9]", value):
        return text, ""  # a text answer, not a unit
    unit = (match["text"] or match["short"] or match["word"]).lower().replace(".", "").strip()
    if unit in SCALES or unit == "percent":
        return f"{value} {unit}", ""
    return value, unit_name(unit, match["power"] or "")


def unit_name(unit, power):
    """One name for all spellings of a unit. power: the exponent behind it as text, or ""."""
    kind = ""
    if unit.startswith(("square ", "sq ", "cubic ")):
        kind, _, unit = unit.rpartition(" ")
    if unit.endswith("s") and len(unit) > 2:
        unit = unit[:-1]
    name = UNIT_NAMES.get(unit, unit)
    exponent = re.sub("[^23]", "", power)
    if kind and not exponent:
        exponent = "3" if kind == "cubic" else "2"
    return f"{name}^{exponent}" if name and exponent else name


# -------------------------------------------------------------------------------------------------
# Numbers

INTEGER = "(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?:[ ][0-9]{3})+|[0-9]+)"  # 1,234 or 1 234 or 1234
FRACTION = re.compile(
    r"""
    [+-]? [ ]?
    (?: (?P<mixed>[0-9]+) [ ]? (?:(?=\\)|(?<=[ ])) )?    # the first 1 of 1\frac{1}{2} and of 1 1/2
    (?:
        \\frac [ ]? \{ [ ]? (?P<minus>-?)(?P<top>INTEGER) [ ]? \}
               [ ]? \{ [ ]? (?P<bottom>INTEGER) [ ]? \}
      | (?P<over>INTEGER) [ ]? / [ ]? (?P<under>INTEGER)
    )
    """.replace("INTEGER", INTEGER),
    re.VERBOSE,
)
DECIMAL = re.compile(
    r"""
    [+-]? [ ]?
    (?P<whole>INTEGER)?
    (?P<decimals>\.[0-9]*)?
    (?P<repeat>\\overline[ ]?\{[ ]?[0-9]+[ ]?\})?
    (?:
        [ ]? (?:\\times|\\cdot|\*|×)
        [ ]? 10 [ ]? \^ [ ]? \{? [ ]? (?P<power>[+-]?[0-9]{1,3}) [ ]? \}?
    )?
    """.replace("INTEGER", INTEGER),
    re.VERBOSE,
)
PERCENT = re.compile(" ?(%| percent)$")
BASED = re.compile(r"([0-9a-zA-Z]+)_\{?([0-9]{1,2})\}?")  # 1010_2


class Number(NamedTuple):
    """An exact value, and whether it was written as a percentage (50% has the value 50)."""

    value: Fraction
    percent: bool


def integer(digits):
    """The value of what INTEGER matched; 0 for None."""
    return int(re.sub("[ ,]", "", digits or "0"))


def fraction_value(match):
    """The absolute value of what FRACTION matched, or None for a division by zero."""
    top = integer(match["top"] or match["over"])
    bottom = integer(match["bottom"] or match["under"])
    if not bottom:
        return None
    sign = -1 if match["minus"] else 1
    return integer(match["mixed"]) + sign * Fraction(top, bottom)


def decimal_value(match):
    """The absolute value of what DECIMAL matched, or None for a repetition without a point."""
    decimals = (match["decimals"] or "")[1:]
    repeat = re.sub("[^0-9]", "", match["repeat"] or "")
    if repeat and not match["decimals"]:
        return None
    value = integer(match["whole"]) + Fraction(int(decimals or 0), 10 ** len(decimals))
    if repeat:
        value += Fraction(int(repeat), 10 ** len(decimals) * (10 ** len(repeat) - 1))
    return value * Fraction(10) ** int(match["power"] or 0)


def number(text):
    """The exact Number that a clean numeral means, or None for anything else."""
    percent = PERCENT.search(text)
    if percent:
        text = text[: percent.start()]
    before, _, last = text.rpartition(" ")
    scale = SCALES.get(last, 1)
    if last in SCALES:
        text = before
    if not re.search("[0-9]", text):
        return None
    if match := FRACTION.fullmatch(text):
        value = fraction_value(match)
    elif match := DECIMAL.fullmatch(text):
        value = decimal_value(match)
    else:
        return None
    if value is None:
        return None
    sign = -1 if text.startswith("-") else 1
    return Number(sign * scale * value, bool(percent))


def same_number(answer, gold):
    """Whether two Numbers are equal. A percentage may be meant as 50 or as 0.5."""
    for a in possible_values(answer, gold):
        for g in possible_values(gold, answer):
            if a == g:
                return True
            if g.denominator > 1 and abs(a - g) <= abs(g) / 10**6:
                return True
    return False


def possible_values(one, other):
    """What a Number may mean where it is compared with another one."""
    if one.percent and not other.percent:
        return [one.value, one.value / 100]
    return [one.value]


def same_in_base(answer, gold):
    """Whether two matches of BASED are the same digits in the same base."""
    if answer[2] != gold[2]:
        return False
    return answer[1].lstrip("0").lower() == gold[1].lstrip("0").lower()


# -------------------------------------------------------------------------------------------------
# What is decided without algebra

WORDS = re.compile("[A-Za-z]{3,}|[A-Za-z]{2,}( [A-Za-z]+){1,4}")
PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
HOSTILE = re.compile(
    r"""
    (\^|\*\*) [{(\s+-]* [0-9]+ [})\s]* (\^|\*\*)   # a tower of powers
    | (\^|\*\*) [{(\s+-]* [0-9.,]{5}               # an exponent of five digits
    | [0-9]{5} [)}\s]* !                           # a factorial of five digits
    | ! [)}\s]* !                                  # a factorial of a factorial
    | (?<![_^0-9.]) [0-9]+ [ ] [0-9]               # 2 3, which sympy multiplies to 6
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


def set_and_tuple(a, b):
    """Whether `a` is written as a set and `b` as a tuple or an interval."""
    return a.startswith("\\{") and b.startswith(("(", "["))


def settle(answer, gold):
    """True or False where text, units and numbers decide, else None (algebra has to)."""
    if not usable(answer) or not usable(gold):
        return False
    answer, answer_unit = split_unit(clean(answer))
    gold, gold_unit = split_unit(clean(gold))
    if answer_unit and gold_unit and answer_unit != gold_unit:
        return False
    answer_text = normalise(answer)
    gold_text = normalise(gold)
    if not answer_text or not gold_text:  # nothing but spacing, dollar signs or a full stop
        return False
    if answer_text == gold_text:
        return True
    answer_number = number(answer)
    gold_number = number(gold)
    if answer_number and gold_number:
        return same_number(answer_number, gold_number)
    if WORDS.fullmatch(gold_text):
        return answer_text.casefold() == gold_text.casefold()
    answer_based = BASED.fullmatch(answer_text)
    gold_based = BASED.fullmatch(gold_text)
    if answer_based and gold_based:
        return same_in_base(answer_based, gold_based)
    if HOSTILE.search(answer):
        return False
    if set_and_tuple(answer_text, gold_text) or set_and_tuple(gold_text, answer_text):
        return False
    return None


# -------------------------------------------------------------------------------------------------
# math-verify in a worker process

_lock = threading.Lock()
_worker = None


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
    """Asks the worker. request: (gold,), "does it parse?", or (gold, answer), "are they equal?".

    Returns its reply, or None when it died of the request. Any thread may call.
    A worker that ran out of its own time has died of the request for certain. After any other death
    a fresh worker is asked once more: a process may be killed from outside.
    """
    global _worker
    with _lock:
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
            if reply or worker.returncode == -signal.SIGALRM:
                break
        return json.loads(reply) if reply else None


def serve(time_limit):
    """The worker: a line of JSON in, a line of JSON out. The kernel ends it after time_limit."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like a reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # no handler: the process dies, even in a C call
    signal.setitimer(signal.ITIMER_REAL, START_LIMIT)
    limit_memory()
    judge("\\frac{1}{2}", "2x")  # loads what is imported late
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, time_limit)
        try:
            reply = judge(*json.loads(line))
        except Exception:  # sympy raises all sorts of things on nonsense
            reply = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)


def limit_memory():
    """Limits the memory of this process, where the system can (macOS can't)."""
    import resource

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))


def judge(gold, answer=None):
    """In the worker: whether gold parses, or, with an answer, whether the two are equal."""
    from math_verify import verify

    if answer is not None:
        # allow_set_relation_comp: x < 3 is (-oo, 3)
        return bool(
            verify(read(gold), read(answer), timeout_seconds=0, allow_set_relation_comp=True)
        )
    for value in read(gold):
        if not isinstance(value, str) and not re.search("zoo|nan", str(value)):
            return True
    return False


def read(text):
    r"""In the worker: an answer as math-verify reads it. Without a box 3\sqrt{13} becomes 3."""
    from math_verify import LatexExtractionConfig, parse

    return parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=0)


# -------------------------------------------------------------------------------------------------
# The judge


@functools.lru_cache(maxsize=100_000)
def equal(answer, gold):
    """Whether an extracted answer equals the gold one. Cached: a bomb costs its time once."""
    settled = settle(answer, gold)
    if settled is not None:
        return settled
    answer, _ = split_unit(clean(answer))
    gold, _ = split_unit(clean(gold))
    if gold[0] in "([" and gold[-1] in ")]" and is_bare_list(answer):
        answer = gold[0] + answer + gold[-1]
    return ask(gold, answer) is True


def is_bare_list(answer):
    """Whether an answer is `1,2`, which may be a tuple without its brackets."""
    return "," in answer and not re.search(r"[()[\]<>={]|\\(in|le|ge)(?!f)", answer)


def is_right(completion, answer, styles=("boxed",)):
    """Whether the completion's final answer is the gold one.

    completion: any string; answer: the gold one; styles: see `extract_answer`.
    It takes at most TIME_LIMIT, and some seconds more when a worker has to be started.
    Raises UserError where math-verify is needed and not installed, and nothing else.
    """
    found = extract_answer(completion, styles)
    if not found or len(found) > MAX_ANSWER:
        return False
    return equal(found, answer)


def parses(answer):
    """Whether an answer can serve as gold. If not, nothing could ever be judged equal to it."""
    if not usable(answer):
        return False
    answer, _ = split_unit(clean(answer))
    if number(answer) is not None or WORDS.fullmatch(normalise(answer)):
        return True
    if HOSTILE.search(answer):
        return False
    if len(PROSE.findall(TEXT.sub(r" \1 ", answer))) > 5:  # to sympy, prose is a product of letters
        return False
    return ask(answer) is True


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
