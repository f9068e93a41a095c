r"""How an answer is judged: a number computed from text, with nothing learned in it, so nothing that can be flattered.

The answer is cut out of the completion (its last balanced \boxed{}), then judged by the first check that can settle it:

    1. length, balance      over 1,000 characters or unbalanced braces: wrong, at no cost
    2. units                5 cm is not 5 m; a unit on one side only is ignored (the question names it)
    3. the same text        after LaTeX spacing, \left, \dfrac, $, degrees are out of the way: right
    4. two numbers          exact fractions: 1,234 = 1234, 07 = 7, 0.50 = \frac{2}{4}, 4.5e33 = 4.5 \times 10^{33}; settled
    5. a word               gold "east": only the word itself is right (to a computer algebra system seat = east: e*a*s*t)
    6. hostile size         towers of powers, exponents and factorials of five digits, deep nesting: wrong, at no cost
    7. math-verify          parses \boxed{gold} and \boxed{answer} and asks sympy whether they are equal

Cheap and certain checks come first, and the competition integers of most training sets never get past the fourth. The
last one runs sympy on text that a policy was rewarded for, so it runs in one worker process, under a limit of time and
memory that the kernel enforces, and a worker that dies of an answer is replaced: the answer was wrong. math-verify's own
time-outs are off: they are Python signal handlers, which fail off the main thread and wait for a C call to return.

Readings, where grading is a convention: 50% equals 50 and 0.5. A decimal equals a gold that is no integer when they
agree to one part in a million (0.333333 for 1/3); an integer must be met exactly. 1010 is accepted for 1010_2, whose
question asks for base two. Only the last box counts: several boxed numbers are not a set.

`python reward.py` shows it on a few answers.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from fractions import Fraction

TIME_LIMIT = 3.0  # seconds for one judgement, where an honest one takes some milliseconds
START_LIMIT = 120.0  # seconds for the worker to import sympy, where a second is usual
MEMORY_LIMIT = 2 * 1024**3  # bytes of address space for the worker
MAX_ANSWER = 1000  # characters
MAX_DEPTH = 20  # nested braces and brackets

# ---------------------------------------------------------------------------------------------------------------------
# Cutting the answer out

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?P<open>\{)|\\(?:boxed|fbox) +(?P<bare>[^\s{}$\\]+)|\\.|(?P<brace>[{}])", re.DOTALL)


def last_boxed(text):
    r"""The content of the last balanced \boxed{...} (or \fbox{...}, or \boxed 7), or None. One pass, whatever the nesting."""
    opened, last = [], (-1, None)  # for every open brace, where the content of its box starts, or None
    for token in BOX.finditer(text):
        if token["bare"]:
            last = max(last, (token.start("bare"), token["bare"].rstrip(".,")))
        elif token["open"]:
            opened.append(token.end())
        elif token["brace"] == "{":
            opened.append(None)
        elif token["brace"] and opened:
            start = opened.pop()
            if start is not None and start > last[0]:
                last = (start, text[start : token.start()])
    return last[1]


def extract_answer(completion, styles=("boxed",)):
    """The final answer as the completion writes it, or None. styles: where to look, the first place that has one counts.

    "boxed": the last balanced box. "####" and "Answer:": the rest of the line behind the last of them. "#": all that
    stands behind the last '#'.
    """
    for style in styles:
        if style == "boxed":
            answer = last_boxed(completion)
        elif style == "#":
            answer = completion.rpartition("#")[2] if "#" in completion else None
        else:
            _, marker, after = completion.rpartition(style)
            answer = after.partition("\n")[0].strip().strip("*$").rstrip(".").strip("*$ ") if marker else None
            answer = answer and (last_boxed(answer) or answer)
        if answer is not None:
            return answer.strip()
    return None


# ---------------------------------------------------------------------------------------------------------------------
# What can be settled without algebra

REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"(?<!\\)(\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\displaystyle|\\[!,;:()[\]]|\\?\$)", ""),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac\s*([0-9])\s*([0-9])(?![0-9])", r"\\frac{\1}{\2}"),
    (r"\^\s*(\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])|°", ""),
    (r"\{,\}", ","),
    ("[−–]", "-"),
    (r"\\%", "%"),
    (r"(?<!\\)\\ |~|\s+", " "),
    (r"(?<=[0-9.])[eE]([+-]?[0-9]+)$", r" \\times 10^{\1}"),  # sympy reads 4.5e33 as 4.5 * e * 33
)]  # fmt: skip
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
NEEDLESS_SPACE = re.compile(r"(?<![0-9A-Za-z]) +| +(?![0-9A-Za-z])")  # not between two numbers: 1 1/2 is not 11/2
WORDS = re.compile(r"[A-Za-z]{3,}|[A-Za-z]{2,}( [A-Za-z]+){1,4}")
PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
HOSTILE = re.compile(
    r"(\^|\*\*)[{(\s+-]*[0-9]+[})\s]*(\^|\*\*)|(\^|\*\*)[{(\s+-]*[0-9.,]{5}|[0-9]{5}[)}\s]*!|![)}\s]*!"
    r"|(?<![_^0-9.])[0-9]+ [0-9]"  # no size, but no answer either: sympy multiplies 2 3 to 6
)

INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)"
NUMBER = re.compile(
    rf"([+-]?) ?(?:(?P<mixed>[0-9]+) ?(?:(?=\\)|(?<= )))?(?:\\frac ?\{{ ?(?P<minus>-?)(?P<top>{INTEGER}) ?\}} ?\{{ ?(?P<bottom>{INTEGER}) ?\}}"
    rf"|(?P<over>{INTEGER}) ?/ ?(?P<under>{INTEGER}))"
    rf"|([+-]?) ?(?P<whole>{INTEGER})?(?P<decimals>\.[0-9]*)?(?P<repeat>\\overline ?\{{ ?[0-9]+ ?\}})?(?: ?(?:\\times|\\cdot|\*|×) ?10 ?\^ ?\{{? ?(?P<power>[+-]?[0-9]{{1,3}}) ?\}}?)?"
)
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
BASED = re.compile(r"([0-9a-zA-Z]+)_\{?([0-9]{1,2})\}?")

UNIT = re.compile(
    r"(?:\\(?:text|textrm|mathrm|mbox) ?\{ ?([A-Za-z][A-Za-z./ ]*)\}|(?<=[0-9 }])(cm|mm|km|kg|mg|ft|mi|ml|lb|oz|mph)"
    r"|(?<= )((?:square |sq |cubic )?[a-z]{3,}|in))\.?( ?\^ ?\{? ?[23] ?\}?)?$"
)
UNIT_NAMES = {
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "kilometer": "km", "meter": "m", "metre": "m", "inche": "in", "inch": "in",
    "foot": "ft", "feet": "ft", "mile": "mi", "hr": "hour", "min": "minute", "sec": "second", "kilogram": "kg", "gram": "g", "pound": "lb",
    "ounce": "oz", "degree": "", "unit": "", "point": "",
}  # fmt: skip


def clean(text):
    """The answer without what only changes its looks; spaces that may mean something stay."""
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return text.strip().rstrip(".").rstrip()


def normalise(text):
    """The form in which two texts are compared: clean, without text commands and needless spaces. `(B)` becomes `B`."""
    text = NEEDLESS_SPACE.sub("", re.sub(" +", " ", TEXT.sub(r" \1 ", clean(text))))
    return text[1:-1] if re.fullmatch(r"\([A-Za-z]\)", text) else text


def split_unit(text):
    r"""A clean answer as (value, unit): `12\text{ cm}^2` is ("12", "cm^2"). The unit is "" where there is none."""
    match = UNIT.search(text)
    value = text[: match.start()].rstrip() if match else ""
    if not re.search("[0-9]", value):
        return text, ""  # a text answer, not a unit
    unit = (match[1] or match[2] or match[3]).lower().replace(".", "").strip()
    if unit in SCALES or unit == "percent":
        return f"{value} {unit}", ""
    kind, _, rest = unit.rpartition(" ") if unit.startswith(("square ", "sq ", "cubic ")) else ("", "", unit)
    rest = rest[:-1] if rest.endswith("s") and len(rest) > 2 else rest
    name = UNIT_NAMES.get(rest, rest)
    power = re.sub("[^23]", "", match[4] or "") or {"": "", "cubic": "3"}.get(kind, "2")
    return value, f"{name}^{power}" if name and power else name


def number(text):
    """The exact value of a clean numeral as (Fraction, whether it is a percentage), or None for anything else."""
    percent = re.search(" ?(%| percent)$", text)
    text = text[: percent.start()] if percent else text
    before, _, scale = text.rpartition(" ")
    text = before if scale in SCALES else text
    match = NUMBER.fullmatch(text)
    if not match or not re.search("[0-9]", text):
        return None
    value = lambda name: Fraction(re.sub("[ ,]", "", match[name] or "0"))  # noqa: E731
    if match["top"] or match["over"]:
        below = value("bottom") + value("under")
        if not below:
            return None
        result = value("mixed") + (-1 if match["minus"] else 1) * (value("top") + value("over")) / below
    else:
        whole, decimals, repeat = value("whole"), (match["decimals"] or "")[1:], re.sub("[^0-9]", "", match["repeat"] or "")
        if repeat and not match["decimals"]:
            return None
        result = whole + Fraction(int(decimals or 0), 10 ** len(decimals))
        if repeat:
            result += Fraction(int(repeat), 10 ** len(decimals) * (10 ** len(repeat) - 1))
        result *= Fraction(10) ** int(match["power"] or 0)
    return result * SCALES.get(scale if before else "", 1) * (-1 if text.startswith("-") else 1), bool(percent)


def same_number(answer, gold):
    """Whether two results of `number` are equal; a percentage may be meant as 50 or as 0.5."""
    meant = lambda pair, other: [pair[0], pair[0] / 100] if pair[1] and not other[1] else [pair[0]]  # noqa: E731
    for a in meant(answer, gold):
        for g in meant(gold, answer):
            if a == g or g.denominator > 1 and abs(a - g) <= abs(g) / 10**6:
                return True
    return False


def usable(text):
    """Whether an answer may be looked at: not empty, not too long, brackets balanced and not deep, no hostile size."""
    depth = deepest = 0
    for bracket in re.findall(r"(?<!\\)[{}]", text) if len(text) <= MAX_ANSWER else "":
        depth += 1 if bracket == "{" else -1
        deepest = max(deepest, depth if depth >= 0 else MAX_DEPTH + 1)
    round_ones = text.count("(") + text.count("[")
    return bool(text.strip()) and len(text) <= MAX_ANSWER and depth == 0 and max(deepest, round_ones) <= MAX_DEPTH


def settle(answer, gold):
    """True or False where text, units and numbers decide, else None (algebra has to)."""
    if not (usable(answer) and usable(gold)):
        return False
    (answer, answer_unit), (gold, gold_unit) = split_unit(clean(answer)), split_unit(clean(gold))
    if answer_unit and gold_unit and answer_unit != gold_unit:
        return False
    a, g = normalise(answer), normalise(gold)
    if not a or not g:  # nothing but spacing, dollar signs or a full stop
        return False
    if a == g:
        return True
    numbers = number(answer), number(gold)
    if None not in numbers:
        return same_number(*numbers)
    if WORDS.fullmatch(g):
        return a.casefold() == g.casefold()
    based = BASED.fullmatch(a), BASED.fullmatch(g)
    if None not in based:
        return based[0][2] == based[1][2] and based[0][1].lstrip("0").lower() == based[1][1].lstrip("0").lower()
    if HOSTILE.search(answer) or re.match(r"\\\{", a) and g[0] in "([" or re.match(r"\\\{", g) and a[0] in "([":
        return False  # a set is not a tuple or an interval
    return None


# ---------------------------------------------------------------------------------------------------------------------
# math-verify, at arm's length

_lock, _worker = threading.Lock(), None


def start_worker():
    """A fresh worker process, ready. Raises UserError when there can be none: an installation without math-verify would
    otherwise look like a policy that is always wrong."""
    command = [sys.executable, os.path.abspath(__file__), "--worker", str(TIME_LIMIT)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if not worker.stdout.readline():
        from data import UserError

        raise UserError("math-verify, which judges the answers, does not start: pip install -r requirements.txt")
    return worker


def ask(*request):
    """The worker's reply to (gold,), "does it parse?", or to (gold, answer), "are they equal?"; None when it died of it.

    Any thread may call. Only a worker that ran out of its own time has died of the request for certain: after any other
    death a fresh one is asked once more, so that what kills processes from outside does not look like a wrong answer.
    """
    global _worker
    with _lock:
        for _ in range(2):
            if _worker is None or _worker.poll() is not None:  # in a forked process, poll finds no child: it gets its own
                _worker = start_worker()
            worker, reply = _worker, ""
            try:
                worker.stdin.write(json.dumps(request) + "\n")
                worker.stdin.flush()
                reply = worker.stdout.readline()
            except OSError:  # it was dead already
                pass
            finally:
                if not reply:  # dead, or this call was interrupted and the next one must not read its reply
                    worker.kill()
                    worker.wait()
                    _worker = None
            if reply or worker.returncode == -signal.SIGALRM:
                break
        return json.loads(reply) if reply else None


def serve(time_limit):
    """The worker: a line of JSON in, a line of JSON out. The kernel ends it when a request takes too long."""
    import resource

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like a reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; the worker ends with its stdin
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # no handler: the process dies, even inside a C call
    signal.setitimer(signal.ITIMER_REAL, START_LIMIT)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    except (ValueError, OSError):  # macOS
        pass
    from math_verify import LatexExtractionConfig, parse, verify

    # Bare LaTeX misparses (3\sqrt{13} becomes 3), boxed LaTeX does not.
    read = lambda text: parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=0)  # noqa: E731

    def reply(gold, answer=None):
        if answer is None:
            return any(not isinstance(value, str) and not re.search("zoo|nan", str(value)) for value in read(gold))
        return verify(read(gold), read(answer), timeout_seconds=0, allow_set_relation_comp=True)  # x < 3 is (-oo, 3)

    reply("\\frac{1}{2}", "2x")  # loads what is imported late
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, time_limit)
        try:
            answer = bool(reply(*json.loads(line)))
        except Exception:  # sympy raises all sorts of things on nonsense
            answer = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


@functools.lru_cache(maxsize=100_000)
def equal(answer, gold):
    """Whether an extracted answer equals the gold one. Remembered: one hostile answer costs its time limit once."""
    settled = settle(answer, gold)
    if settled is not None:
        return settled
    answer, gold = split_unit(clean(answer))[0], split_unit(clean(gold))[0]
    if gold[0] in "([" and gold[-1] in ")]" and "," in answer and not re.search(r"[()[\]<>={]|\\(in|le|ge)(?!f)", answer):
        answer = gold[0] + answer + gold[-1]  # a tuple without its brackets: still ordered
    return ask(gold, answer) is True


def is_right(completion, answer, styles=("boxed",)):
    """Whether the completion's final answer is the gold one.

    completion: any string; answer: the gold one; styles: see `extract_answer`. With ("#",), the embedded arithmetic, the
    text itself must be the same: 7+8 is no answer to a sum. Raises nothing for any string, and takes at most TIME_LIMIT
    (some seconds more when a worker has to be started, or was killed from outside). Raises UserError only where math-verify
    is needed and not installed.
    """
    found = extract_answer(completion, styles)
    if not found or len(found) > MAX_ANSWER:
        return False
    return found == answer if styles == ("#",) else equal(found, answer)


def parses(answer):
    """Whether an answer can serve as gold. If not, its row must be skipped: nothing could ever be judged right."""
    if not usable(answer):
        return False
    answer = split_unit(clean(answer))[0]
    if number(answer) is not None or WORDS.fullmatch(normalise(answer)):
        return True
    if HOSTILE.search(answer) or len(PROSE.findall(TEXT.sub(r" \1 ", answer))) > 5:  # math-verify reads prose as a product of letters
        return False
    return ask(answer) is True


def main():
    print("completion ends in                      gold              right")
    for completion, gold in ((r"\boxed{\frac{14}{4}}", "3.5"), (r"\boxed{x < 3}", r"(-\infty, 3)"), (r"\boxed{1,234\text{ cm}}", "1234"),
                             (r"\boxed{5 \text{ or } 7}", "5"), (r"\boxed{9^{9^{9^9}}}", "9"), (r"\boxed{(x+1)^2", "x^2+2x+1"),
                             (r"\boxed{(x+1)^2}", "x^2+2x+1")):  # fmt: skip
        print(f"{completion:38}  {gold:16}  {is_right(completion, gold)}")


if __name__ == "__main__":
    serve(float(sys.argv[2])) if sys.argv[1:2] == ["--worker"] else main()
