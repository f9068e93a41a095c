"""The judge: a table of verdicts by hand, and hostile text: no crash, no delay, no reward."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from tasks import verify
from tasks.verify import after_marker, extract_answer, is_right, last_boxed, number, parses
from tests.conftest import ROOT

# prediction | gold | is it right
TABLE = r"""
# integers and commas
42 | 42 | yes
42 | 43 | no
-7 | -7 | yes
7 | -7 | no
+7 | 7 | yes
07 | 7 | yes
1,234 | 1234 | yes
1234 | 1,234 | yes
10,\!000 | 10000 | yes
10{,}000 | 10,000 | yes
10\,000 | 10000 | yes
10 000 | 10000 | yes
10 000 | 0 | no
1,234,567 | 1234567 | yes
1,234 | 1,235 | no
12,34 | 1234 | no
2, 345 | 2345 | no
2 3 | 6 | no
2 3x | 6x | no
42. | 42 | yes
$42$ | 42 | yes
\(42\) | 42 | yes
42.0 | 42 | yes
42.5 | 42 | no
100000007 | 100000008 | no
12345678.5 | 12345678 | no
3 | 13 | no
\text{42} | 42 | yes
2^{10} | 1024 | yes
2^{10} | 1025 | no
5! | 120 | yes
\binom{5}{2} | 10 | yes
1010 | 1010_2 | yes
1010_{2} | 1010_2 | yes
1010_3 | 1010_2 | no
2A_{16} | 2a_{16} | yes
5 million | 5000000 | yes
5 \text{ million} | 5,000,000 | yes
5 million | 5 | no
# decimals and powers of ten
0.5 | .5 | yes
0.50 | 0.5 | yes
3.14 | 3.141 | no
0.30000000000000004 | 0.3 | yes
4.5e33 | 4.5 \times 10^{33} | yes
4.5 \times 10^{33} | 4.5e33 | yes
4.5\cdot 10^{33} | 4.5e33 | yes
45e32 | 4.5e33 | yes
4.5e32 | 4.5e33 | no
4.5 \times 10^{34} | 4.5 \times 10^{33} | no
1.6e-19 | 0 | no
1.6e-19 | 2e-19 | no
0.000001 | 1e-6 | yes
6.02E23 | 6.02 \times 10^{23} | yes
10^{3} | 1000 | yes
1.6 \times 10^{-19} | 1.6e-19 | yes
-1.5 | 1.5 | no
0.333333 | \frac{1}{3} | yes
0.33 | \frac{1}{3} | no
0.\overline{3} | \frac{1}{3} | yes
0.1\overline{6} | \frac{1}{6} | yes
0.3 | 0.\overline{3} | no
# fractions
\frac{1}{2} | 0.5 | yes
\frac12 | \frac{1}{2} | yes
\dfrac{1}{2} | \frac{1}{2} | yes
\tfrac{3}{4} | 0.75 | yes
1/2 | \frac{1}{2} | yes
2/4 | \frac{1}{2} | yes
\frac{2}{1} | 2 | yes
-\frac{1}{2} | \frac{-1}{2} | yes
\frac{1}{-2} | -\frac{1}{2} | yes
-\frac12 | \frac12 | no
\frac{1}{3} | \frac{1}{2} | no
\frac{2}{1} | \frac{1}{2} | no
1\frac{1}{2} | \frac{3}{2} | yes
1 1/2 | 1.5 | yes
1 1/2 | \frac{11}{2} | no
11/2 | 1 1/2 | no
1 | 1 1/2 | no
-1\frac{1}{2} | -1.5 | yes
\frac{1,000}{3} | \frac{1000}{3} | yes
\frac{\pi}{2} | \frac{1}{2}\pi | yes
\frac{x}{2} | 0.5x | yes
\frac{1}{0} | 0 | no
\frac{a+b}{2} | \frac{b+a}{2} | yes
\frac{a-b}{2} | \frac{b-a}{2} | no
3:4 | \frac{3}{4} | yes
4:3 | 3:4 | no
# radicals and constants
3\sqrt{13} | 3\sqrt{13} | yes
\sqrt{117} | 3\sqrt{13} | yes
3 | 3\sqrt{13} | no
\sqrt{13} | 3\sqrt{13} | no
\frac{1}{\sqrt{2}} | \frac{\sqrt{2}}{2} | yes
\sqrt[3]{8} | 2 | yes
\sqrt{4} | 2 | yes
\sqrt2 | \sqrt{2} | yes
\sqrt{3}\cdot 2 | 2\sqrt{3} | yes
1+\sqrt{2} | \sqrt{2}+1 | yes
1-\sqrt{2} | \sqrt{2}-1 | no
1.414214 | \sqrt{2} | yes
1.41 | \sqrt{2} | no
2\pi | 2 \pi | yes
6.28 | 2\pi | no
\pi | 3.14 | no
e^2 | e^{2} | yes
\ln 2 | \ln(2) | yes
\log_2 8 | 3 | yes
2+3i | 3i+2 | yes
2-3i | 2+3i | no
\infty | \infty | yes
-\infty | \infty | no
# units, money, degrees
12\text{ cm} | 12 | yes
12 | 12\text{ cm} | yes
12 cm | 12 | yes
12 cm | 12\text{ cm} | yes
12\mathrm{cm} | 12\text{ cm} | yes
12\text{ m} | 12\text{ cm} | no
12\text{ centimeters} | 12\text{ cm} | yes
12\text{ cm}^2 | 12\text{ cm}^{2} | yes
12\text{ cm}^2 | 12\text{ cm} | no
12\text{ cm}^2 | 12 | yes
12 square centimeters | 12\text{ cm}^2 | yes
12\text{ square units} | 12 | yes
24\pi\text{ cm}^3 | 24\pi | yes
13 cm | 12\text{ cm} | no
\$5 | 5 | yes
5 dollars | \$5 | yes
\$1,250.50 | 1250.5 | yes
90^\circ | 90 | yes
90 | 90^{\circ} | yes
90 degrees | 90^\circ | yes
45^\circ | 90^\circ | no
12 apples | 12 | yes
2 hours | 2\text{ hours} | yes
2 minutes | 2\text{ hours} | no
6 \text{ PM} | 6 \text{ AM} | no
5x | 5 | no
# percent
50\% | 50\% | yes
50% | 50\% | yes
50\% | 50 | yes
50\% | 0.5 | yes
0.5 | 50\% | yes
50 | 50\% | yes
50 percent | 50\% | yes
5\% | 50\% | no
0.05 | 50\% | no
50 | 0.5 | no
20\% | \frac{1}{5} | yes
# tuples, intervals, sets, several values
(1,2) | (1, 2) | yes
(1,2) | (2,1) | no
\left(1,2\right) | (1,2) | yes
(\frac{1}{2}, 3) | (0.5,3) | yes
(1,2,3) | (1,3,2) | no
(1,2) | (1,2,3) | no
1,2 | (1,2) | yes
2,1 | (1,2) | no
2,2 | (2,2) | yes
\{1,2\} | (1,2) | no
(1,2) | \{1,2\} | no
[1,2] | (1,2) | no
(1,2] | [1,2) | no
[1,2] | [1, 2] | yes
(-\infty,3) | x<3 | yes
x<3 | (-\infty,3) | yes
x \le 3 | (-\infty,3) | no
x \in [1,2] | [1,2] | yes
1 \le x \le 2 | [1,2] | yes
(3,4) \cup (1,2) | (1,2) \cup (3,4) | yes
(1,2) \cup (3,5) | (1,2) \cup (3,4) | no
(-\infty,-2]\cup[2,+\infty) | (-\infty, -2] \cup [2, \infty) | yes
\{1,2\} | \{2, 1\} | yes
\{1,2,2\} | \{1,2\} | yes
\{1\} | \{1,2\} | no
2,1 | 1,2 | yes
1, 2, 3 | 1,2 | no
1 | 1,2 | no
1,2 | 1 | no
1 \text{ and } 2 | 1,2 | yes
1 \text{ or } 2 | 1 | no
1 or 2 | 1 | no
\pm 2 | -2,2 | yes
2 | \pm 2 | no
1\pm\sqrt{2} | 1+\sqrt{2},1-\sqrt{2} | yes
(3,4),(1,2) | (1,2),(3,4) | yes
(2,1),(3,4) | (1,2),(3,4) | no
\emptyset | \{\} | yes
\mathbb{R} | (-\infty,\infty) | yes
# algebra
x^2+2x+1 | (x+1)^2 | yes
x^2+2x | (x+1)^2 | no
2x+1 | 1+2x | yes
2x+1 | 2y+1 | no
x=5 | 5 | yes
5 | x=5 | yes
x=5 | x=6 | no
y=2x+1 | y=1+2x | yes
2x+1 | y=2x+1 | yes
y=2x+1 | y=2x-1 | no
x+y=1 | y+x=1 | yes
2x+2y=2 | x+y=1 | yes
n(n+1)/2 | \frac{n^2+n}{2} | yes
x_1 | x_2 | no
x>2 | x \ge 2 | no
x=5=7 | 5 | no
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix} | yes
\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix} | \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | no
# text
\text{Monday} | Monday | yes
monday | \text{Monday} | yes
Tuesday | \text{Monday} | no
\textbf{(B)} | B | yes
(B) | B | yes
B | (B) | yes
C | B | no
\text{(B)} | \text{(C)} | no
east | \text{east} | yes
seat | east | no
\text{west} | \text{east} | no
\text{no solution} | no solution | yes
\text{No solutions} | \text{no solution} | no
yes | \text{Yes} | yes
no | \text{yes} | no
\text{odd} | \text{even} | no
Monday | 5 | no
\text{five} | \text{four} | no
"""

# What the judge gets wrong. Each row has the right verdict; the test expects the other one.
KNOWN_MISSES = r"""
# degrees are taken off, so trigonometric functions and radians do not meet them
\sin 30^\circ | 0.5 | yes
45^\circ | \frac{\pi}{4} | yes
# i is a letter like any other
e^{i\pi} | -1 | yes
# units are compared, not converted
0.05\text{ m} | 5\text{ cm} | yes
0.5\text{ hours} | 30\text{ minutes} | yes
# words are compared, not read
\text{eleven} | 11 | yes
\text{None} | \text{no solution} | yes
# a word is a word, even where it is a product of letters
bca | abc | yes
# notation that math-verify does not read
\overline{AB} | AB | yes
\{x \mid x > 2\} | x > 2 | yes
|x| < 3 | -3 < x < 3 | yes
# math-verify compares a lone letter as text, folds case, drops what stands left of = or behind
# \approx, and takes an ordered pair for a solution set
X | x | no
2x - x | x | yes
7 = 5 | 5 | no
5 \approx 5.01 | 5 | no
(1,2) | 1,2 | no
"""


def cases(table):
    """The rows of a table as (answer, gold, whether it is right)."""
    for line in table.strip().splitlines():
        if not line.startswith("#"):
            answer, gold, right = line.rsplit(" | ", 2)
            yield answer, gold, right == "yes"


@pytest.fixture(autouse=True)
def forget():
    verify.equal.cache_clear()


def test_table():
    rows = list(cases(TABLE))
    assert len(rows) >= 200 and len(set(rows)) == len(rows)
    wrong = []
    for answer, gold, right in rows:
        if is_right(f"Thus the answer is $\\boxed{{{answer}}}$.", gold) != right:
            wrong.append((answer, gold))
    assert not wrong
    assert not [gold for _, gold, _ in rows if not parses(gold)]


def test_known_misses():
    """When one of them turns right it belongs in the table above."""
    hits = []
    for answer, gold, right in cases(KNOWN_MISSES):
        if is_right(f"\\boxed{{{answer}}}", gold) == right:
            hits.append((answer, gold))
    assert not hits


BAD_GOLD = [
    "",
    "  ",
    r"\frac{",
    "}{",
    "6:00",
    r"\{x \mid x > 2\}",
    "10^{10^{10}}",
    "x" * 1001,
    "(" * 500 + ")" * 500,
    "a proof that there are more primes than any number of them",
]


@pytest.mark.parametrize("gold", BAD_GOLD)
def test_bad_gold(gold):
    assert not parses(gold)


# ---- where the answer stands

BOXES = [
    (r"\boxed{5}", "5"),
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed {5}", "5"),
    (r"\fbox{5}", "5"),
    (r"\boxed 7.", "7"),
    (r"$\boxed 7$", "7"),
    (r"\boxed{}", ""),
    (r"\boxed{{{5}}}", "{{5}}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
    (r"} } \boxed{5} {", "5"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{5", None),
    (r"\boxed{1} or rather \boxed{2", "1"),
    (r"\boxed{1 \boxed{2}", "2"),
    (r"\boxed", None),
    ("boxed{5}", None),
    ("", None),
    (r"\boxed{a\\b}", r"a\\b"),
    ("\\boxed{\n5\n}", "\n5\n"),
    (r"\boxedy{5}", None),
]


@pytest.mark.parametrize("text, content", BOXES)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


@given(st.lists(st.sampled_from([r"\boxed{", "{", "}", "x", r"\{", r"\}"]), max_size=30))
def test_last_boxed_slowly(parts):
    text = "".join(parts)
    starts = [sum(map(len, parts[:i])) for i in range(len(parts))]
    expected = None
    for i, part in enumerate(parts):
        if part != r"\boxed{":
            continue
        depth = 1
        for end, other in zip(starts[i + 1 :], parts[i + 1 :]):
            depth += (other in (r"\boxed{", "{")) - (other == "}")
            if depth == 0:
                expected = text[starts[i] + len(part) : end]
                break
    assert last_boxed(text) == expected


STYLES = [
    ("So 3*4=12\n#### 12\nDone", ("####",), "12"),
    ("#### $1,234.", ("####",), "1,234"),
    ("Answer: 5\nAnswer: $\\frac12$.", ("Answer:",), "\\frac12"),
    ("**Answer:** 5", ("Answer:",), "5"),
    ("Answer: $\\boxed{5}$", ("Answer:",), "5"),
    ("\\boxed{3}\n#### 12", ("boxed", "####"), "3"),
    ("#### 12", ("boxed", "####"), "12"),
    ("Answer: 5", ("boxed",), None),
    ("#### 5", ("boxed", "Answer:"), None),
]


@pytest.mark.parametrize("text, styles, answer", STYLES)
def test_styles(text, styles, answer):
    assert extract_answer(text, styles) == answer


def test_no_answer_is_wrong():
    for completion in ("", "5", r"\boxed{}", r"\boxed{ }", r"\boxed{5", r"\boxed{1}\boxed{}", "#"):
        for gold in ("5", "", " "):
            assert not is_right(completion, gold)
            assert not is_right(completion, gold, ("boxed", "####"))
    for answer in ("{7x", "7x}", "}7x{", "{{7x}"):
        assert not is_right(f"Answer: {answer}", "7x", ("Answer:",))


@given(st.integers(-(10**9), 10**9), st.integers(1, 999), st.integers(-9, 9))
def test_numerals(n, d, power):
    exact = {
        f"{n}": n,
        f"{n:,}": n,
        f"{n}/{d}": Fraction(n, d),
        f"\\frac{{{n}}}{{{d}}}": Fraction(n, d),
    }
    if n:  # -0.5 is not the Fraction of "0.5"
        exact[f"{n}.{d:03}"] = Fraction(f"{n}.{d:03}")
        exact[f"{n}.5 \\times 10^{{{power}}}"] = Fraction(f"{n}.5") * Fraction(10) ** power
    for text, value in exact.items():
        assert number(text) == (value, False)
    assert number(f"{abs(n)} {d}/1000").value == abs(n) + Fraction(d, 1000)


# ---- hostile text

BOMBS = [
    "10^{10^{10}}",
    "9^9^9^9",
    "9**9**9",
    "10^{100000000}",
    "(10^{100000000}) \\bmod 7",
    "1000000!",
    "9!!!!!!!",
    r"\binom{10^9}{10^8}",
    r"\sum_{i=1}^{10^9} i!",
    r"\int e^{x^x} dx",
    r"\prod_{k=1}^{99999999} k",
    "(((((((1)))))))" * 60,
    "x^{x^{x^{x^{x^{x}}}}}",
    "{" * 400 + "5" + "}" * 400,
    "(" * 300 + "5" + ")" * 300,
    r"\frac{1}{" * 100 + "2" + "}" * 100,
    r"\sqrt{" * 100 + "2" + "}" * 100,
    "9" * 999,
    "1/" * 400 + "2",
    "5^" * 300 + "5",
    "(x+1)^{9999}",
    "(x+y+z+w)^{999}",
    "2^{(3^{(4^{5})})}",
    "10^{9999}^{9999}",
    r"\sin(\cos(" * 50 + "1" + "))" * 50,
    r"\begin{pmatrix}" * 20,
    "1,2,3,4,5,6,7,8,9," * 50 + "1",
    "__import__('os').system('true')",
    "lambda: 0",
    "\\input{/etc/passwd}",
    "5" + " " * 990,
    "}" * 900,
    "5\\text{" * 100,
    "{{{{" * 100 + "}}}}" * 100,
    "\ud800",
    "\x00",
    "٣",
    "²",
    "５",
]


@pytest.fixture
def short_limit(monkeypatch):
    """Workers with half a second for an answer. Usual ones come back afterwards."""
    stop_worker()
    monkeypatch.setattr(verify, "TIME_LIMIT", 0.5)
    yield
    stop_worker()


def stop_worker():
    if verify._worker:
        verify._worker.kill()
        verify._worker.wait()
        verify._worker = None


def timed(function, *arguments):
    """(What the function returns, its seconds.)"""
    started = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - started


SLACK = 10  # for a worker to start on a busy machine


def test_bombs(short_limit):
    for bomb in BOMBS:
        for gold in ("4", r"\sqrt{2}x"):
            right, seconds = timed(is_right, f"\\boxed{{{bomb}}}", gold)
            assert not right and seconds < verify.TIME_LIMIT + SLACK, bomb
            right, seconds = timed(is_right, f"\\boxed{{{bomb}}}", gold)
            assert not right and seconds < 0.1, bomb


USUAL_BOMBS = [
    "10^{10^{10}}",
    "9^9^9^9",
    "9**9**9",
    "10^{100000000}",
    "x^{123456}",
    "100000!",
    "9!!!!",
    "{" * 30 + "5" + "}" * 30,
    "(" * 30 + "5" + ")" * 30,
]


@pytest.mark.parametrize("bomb", USUAL_BOMBS)
def test_usual_bombs_without_worker(bomb):
    assert verify.settle(bomb, "x+1") is False and not parses(bomb)


# What a policy might write: LaTeX by the piece, any unicode, very long. The gold is no word of it.
LATEX = (
    r"\boxed{ { } ( ) [ ] \{ \} \frac{ ^{ ^ _ ! , . 0 1 2 99 x y \sqrt{ \left( \right) \text{ "
    r"\infty \cup = < + - * / % $ \\ & | : # #### Answer: \pm \times e i"
)
PIECES = st.sampled_from([*LATEX.split(), " ", "\n"])
JUNK = st.one_of(
    st.text(max_size=200),
    st.binary(max_size=200).map(lambda raw: raw.decode("utf-8", "replace")),
    st.lists(PIECES, max_size=60).map("".join),
)
ANY_STYLES = st.sampled_from([("boxed",), ("boxed", "####"), ("boxed", "Answer:")])
JUNK_GOLD = (
    "8675309",
    r"\frac{\sqrt{8675309}}{31337}",
    r"\{8675309, 31337\}",
    r"(8675309, \infty)",
)


@settings(max_examples=600)
@example(".", ("boxed",), True)  # an answer of which nothing is left
@example("$", ("boxed",), True)
@example(r"\text{ }", ("boxed",), True)
@given(JUNK, ANY_STYLES, st.booleans())
def test_junk(text, styles, in_a_box):
    text = f"\\boxed{{{text}}}" if in_a_box else text
    for gold in JUNK_GOLD:
        right, seconds = timed(is_right, text, gold, styles)
        assert right is False and seconds < verify.TIME_LIMIT + SLACK


NEVER_CLOSED = [r"\boxed{", "{", "\\", r"\boxed{{}", "^{", r"\boxed{1}{", r"\boxed "]
LONG_PIECES = [
    *NEVER_CLOSED,
    "}",
    "#",
    "Answer:",
    "a",
    " ",
    "$",
    r"\boxed{}",
    "\n",
    "9",
    "é",
    "Answer: *$",
]


@pytest.mark.parametrize("piece", LONG_PIECES)
def test_long_text(piece):
    text = piece * (100_000 // len(piece))
    for whole in (text, f"\\boxed{{{text}", f"\\boxed{{{text}}}", f"{text}\\boxed{{"):
        right, seconds = timed(is_right, whole, "8675309", ("boxed", "####", "Answer:"))
        assert not right and seconds < 1.5
    assert is_right(f"{text} $\\boxed{{8675309}}$", "8675309") or piece in NEVER_CLOSED
    assert timed(parses, text)[1] < 1.5


REPEATED = ["0", "1 ", "1,", "1,000", "{}", "}", r"\text{a", "a b ", "^{", r"\left"]
REPEATED += [" ", "$", ".", r"\frac", "5 sq ", r"\!", "-", "1/", "!", "^1"]


@pytest.mark.parametrize("n", [1, 10, 100, 990])
@pytest.mark.parametrize("piece", REPEATED)
def test_repetitions(piece, n):
    text = (piece * n)[:999]
    assert timed(verify.settle, text, "5x")[1] < 0.5
    assert timed(verify.settle, "5" + text, "5")[1] < 0.5
    assert timed(verify.clean, text)[1] < 0.5
    assert timed(number, text)[1] < 0.5
    assert timed(after_marker, "#### " + text, "####")[1] < 0.5


# ---- the worker


def test_worker_out_of_time(short_limit):
    assert is_right(r"\boxed{x+1}", "1+x")
    first = verify._worker.pid
    reply, seconds = timed(verify.ask, "x+1", r"\binom{10^9}{10^8}")
    assert reply is None and 0.5 < seconds < 0.5 + SLACK
    assert verify._worker is None
    assert is_right(r"\boxed{y+1}", "1+y") and verify._worker.pid != first


@pytest.mark.skipif(not os.path.exists("/proc/self/limits"), reason="Linux only")
def test_worker_memory_limit():
    assert verify.ask("x", "x") is True
    with open(f"/proc/{verify._worker.pid}/limits") as file:
        assert f"Max address space         {verify.MEMORY_LIMIT} " in file.read()


def test_worker_killed_from_outside():
    for i in range(3):
        assert verify.ask("x", "x") is True
        verify._worker.kill()
        assert verify.ask(f"{i}+z", f"z+{i}") is True


def test_threads():
    assert verify.ask("x", "x") is True
    worker = verify._worker
    verdicts = {}

    def judge(i):  # right and wrong in turn: a swapped reply shows
        verdicts[i] = is_right(f"\\boxed{{{i}x+{i}}}", f"{i}(x+{1 + i % 2})")

    threads = [threading.Thread(target=judge, args=(i,)) for i in range(2, 42)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {i: i % 2 == 0 for i in range(2, 42)}
    assert verify._worker is worker  # one for all


def test_interrupt():
    assert verify.ask("x", "x") is True

    class Interrupted:
        def readline(self):
            raise KeyboardInterrupt

    verify._worker.stdout = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        verify.ask("x", "x")
    assert verify.ask("x", "y") is False and verify.ask("x", "x") is True


def test_fork():
    assert verify.ask("x", "x") is True
    parents = verify._worker.pid
    child = os.fork()
    if child == 0:
        replies = [verify.ask("x", "x"), verify.ask("x+1", "1+x"), verify.ask("x", "y")]
        own = verify._worker.pid != parents
        os._exit(0 if own and replies == [True, True, False] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert verify.ask("x", "y") is False and verify.ask("x", "x") is True


def test_without_math_verify(monkeypatch):
    stop_worker()
    monkeypatch.setattr(verify.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="math-verify"):
        is_right(r"\boxed{x+y}", "y+x")
    assert is_right(r"\boxed{5}", "5.0")  # numbers do not need it


def test_worker_in_another_directory(tmp_path, monkeypatch):
    """tasks/math.py must not be taken for Python's math, wherever the program was started."""
    stop_worker()
    monkeypatch.chdir(ROOT / "tasks")
    assert is_right(r"\boxed{x+y}", "y+x")
    stop_worker()
    (tmp_path / "tasks.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert is_right(r"\boxed{x+z}", "z+x")
    stop_worker()


def test_worker_speaks_json_and_ends_with_its_input():
    command = [sys.executable, "-P", "-m", "tasks.verify", "--worker", "5"]
    asked = '["x"]\n["x", "x+0"]\n["x+", "2"]\n'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=environment)
    ready, *replies = done.stdout.splitlines()
    assert done.returncode == 0 and ready == "ready" and len(replies) == 3
    assert all(isinstance(json.loads(reply), bool) for reply in replies)


def test_worker_time_limit():
    """The kernel ends the worker, so nobody else has to watch the clock."""
    command = [sys.executable, "-P", "-m", "tasks.verify", "--worker", "0.2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    asked = json.dumps(["x+1", r"\binom{10^9}{10^8}"]) + "\n"
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGALRM and done.stdout == "ready\n"


def test_demo():
    command = [sys.executable, "-m", "tasks.verify"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    verdicts = [line.split()[-1] for line in done.stdout.splitlines()[1:]]
    assert verdicts == ["True", "True", "True", "False", "False", "False", "True"]
    assert done.stderr == ""
