r"""Whether two answers in LaTeX are equal, by sympy. It runs in the worker process of verify.py.

Of math-verify only the parser is used. A text counts only when the parser reads it to its last
character. The comparison is here, because math-verify's own takes two equations without solutions
for equal, rounds to six places, and finds the last fraction of what it can't read.

Two expressions are equal when they have the same values at a few fixed points, to 25 digits. So are
equations and inequalities that are multiples of each other. Sets, tuples, intervals and matrices
are equal when their parts are.
"""

import functools
import re
import zlib

from latex2sympy2_extended.latex2sympy2 import (
    ConversionConfig,
    is_expr_of_only_symbols,
    latex2sympy,
)
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from sympy import (
    And,
    Derivative,
    Eq,
    FiniteSet,
    Float,
    I,
    Interval,
    MatrixBase,
    Ne,
    Rational,
    Set,
    Symbol,
    Tuple,
    Union,
    nan,
    simplify,
    together,
    zoo,
)
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

POINTS = 5  # at which expressions are compared
DIGITS = 50  # with which they are evaluated there


def judge(gold, answer=None):
    """Whether two clean texts are equal, or, without an answer, whether gold equals itself.

    Raises all sorts of exceptions on nonsense.
    """
    golds = read(gold)
    answers = golds if answer is None else read(answer)
    return any(same(g, a) for g in golds for a in answers)


# -------------------------------------------------------------------------------------------------
# Reading

NAMES = r"\\(?:text|math|operatorname|mbox|begin|end|hat|vec|bar|over)[a-z]*\s*\{[a-zA-Z ]*\}"
FOR_THE_PARSER = (
    (r"\*\*", "^"),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*([0-9]{2,})", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])((?:arc)?(?:sin|cos|tan)h?|cot|log|ln|exp|pi)(?![A-Za-z])", r"\\\1 "),
    (r"\\varnothing", r"\\emptyset"),
    (r"\\operatorname\s*\{\s*([a-z]+)\s*\}", r"\\\1 "),
    (r"\\(odot|oplus|star)(?![a-zA-Z])", r"\\mathcal{\1}"),
    # To the parser gamma is Euler's number, I is i, and E_1 is no symbol.
    (r"\\([gG])amma(?![a-zA-Z]| *\()", r"\\mathcal{\1}"),
    (rf"({NAMES}|\\[a-zA-Z]+)|([EI])", lambda m: m[1] or f"\\mathcal{{{m[2]}}}"),
    # It leaves primes out: f'(x) is not f(x).
    (r"([a-zA-Z])((?:'|\^\s*\{?(?:\s*\\prime)+\s*\}?)+)", lambda m: prime(m[1], m[2])),
    # 2 \frac{1}{2} is 5/2, and to the parser 2(3) would be 2 + 3.
    (
        r"(?<![0-9.}^_])([0-9]+) ?\\frac\{([0-9]+)\}\{([0-9]+)\}",
        lambda m: f"\\frac{{{int(m[1]) * int(m[3]) + int(m[2])}}}{{{m[3]}}}",
    ),
    (r"((?<![_0-9])[0-9]+|\\frac\{[0-9]+\}\{[0-9]+\}) ?(?=\(|\\frac)", r"\1\\cdot "),
    (r"\) ?(?=[0-9(]|\\frac)", r")\\cdot "),
)
UNREADABLE = re.compile(
    r"""
    \\[lc]?dots | \.\. | …      # 1, 2, \ldots, 9: the parser leaves the dots out
    | ["'] | \\prime            # 5'10": the parser leaves quotes out
    | \\pmod                    # to the parser \pm and od
    | [0-9]_                    # the base of a number, which the parser leaves out
    | \.[0-9]*\([0-9]           # 0.(3)
    """,
    re.VERBOSE,
)
OR = re.compile(r"\\text\s*\{\s*or\s*\}|(?<![a-zA-Z])or(?![a-zA-Z])")


def prime(letter, primes):
    """A letter with primes as a symbol that the parser knows."""
    return f"\\mathcal{{{letter}{'p' * (primes.count(chr(39)) + primes.count('prime'))}}}"


@functools.lru_cache(maxsize=1000)
def read(text):
    r"""What a text may mean to sympy: one value, or two for `\frac{1}{3} \approx 0.333`.

    Raises an exception for a text that can't be read to its last character, and for one that says
    something false: 7 = 5, 5 \approx 5.01.
    """
    exact, approx, rounded = text.rpartition("\\approx")
    if not approx:
        return [parsed(text)]
    values = [right_side(parsed(exact)), parsed(rounded)]
    if values[0].is_Symbol:
        return values[1:]
    places = len(rounded.partition(".")[2].strip())
    if not abs((values[0] - values[1]).evalf()) <= 0.51 * 10**-places:
        raise ValueError(text)
    return values


def parsed(text):
    """A text as the parser of math-verify reads it. Raises an exception where it can't."""
    terms = text.split(":")
    if len(terms) > 2:  # 1:2:3; the parser divides twice
        first, *others = map(parsed, terms)
        return Tuple(Symbol(":"), *(other / first for other in others))
    inclusive = OR.search(text)
    for pattern, new in FOR_THE_PARSER:
        text = re.sub(pattern, new, text)
    if UNREADABLE.search(text):
        raise ValueError(text)
    form = NormalizationConfig(basic_latex=True, malformed_operators=True, boxed="none")
    value = latex2sympy(
        normalize_latex(text, form),
        is_real=True,
        normalization_config=None,
        conversion_config=ConversionConfig(lowercase_symbols=False),
    )
    if isinstance(value, FiniteSet) and inclusive and all(is_inequality(arg) for arg in value.args):
        return Union(*(arg.as_set() for arg in value.args))  # x < 1 or x > 2
    links = value._unsorted_args if isinstance(value, And) else [value]
    if not all(isinstance(link, Eq) for link in links):
        return value
    for link in links:  # A = 2 + 3 = 5
        if not link.free_symbols and not same(link.lhs, link.rhs):
            raise ValueError(text)
    if not links[0].lhs.free_symbols and len(links) == 1:
        return links[0].rhs
    return Eq(links[0].lhs, links[-1].rhs, evaluate=False)


# -------------------------------------------------------------------------------------------------
# Comparing


def is_inequality(value):
    """Whether a value of `parsed` is x < 1, x != 1 or 1 < x < 2."""
    if isinstance(value, And):
        return all(is_inequality(arg) for arg in value._unsorted_args)
    return isinstance(value, Relational) and not isinstance(value, Eq)


def same(gold, answer):
    """Whether two values of `parsed` are equal."""
    if isinstance(answer, Eq) and not isinstance(gold, Eq):
        answer = right_side(answer)
    elif isinstance(gold, Eq) and not isinstance(answer, Eq) and not is_curve(gold):
        gold = gold.rhs
    if isinstance(gold, Eq) or isinstance(answer, Eq):
        return isinstance(gold, Eq) and isinstance(answer, Eq) and same_equation(gold, answer)
    if is_inequality(gold) and is_inequality(answer) and same_inequality(gold, answer):
        return True
    if is_inequality(gold) or is_inequality(answer):
        return same_solutions(gold, answer)
    if isinstance(gold, Interval) and isinstance(answer, Interval):
        open_ends = (gold.left_open, gold.right_open) == (answer.left_open, answer.right_open)
        return open_ends and same(gold.start, answer.start) and same(gold.end, answer.end)
    if isinstance(gold, Set) or isinstance(answer, Set):
        return same_set(gold, answer)
    if isinstance(gold, Tuple) and isinstance(answer, Tuple):
        return len(gold) == len(answer) and all(map(same, gold, answer))
    if gold.has(Derivative) or answer.has(Derivative):
        return gold == answer  # dy/dx: sympy takes y for a constant
    gold = gold.doit()
    answer = answer.doit()
    if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase):
        return gold.shape == answer.shape and all(map(same, gold.flat(), answer.flat()))
    return same_value(gold, answer)


def right_side(value):
    """5 for x = 5, AB = 5 and f(2) = 5. Raises ValueError for x^2 = 5, another value for itself."""
    if not isinstance(value, Eq):
        return value
    if is_curve(value) and not is_expr_of_only_symbols(value.lhs):
        raise ValueError(value)
    return value.rhs


def is_curve(equation):
    """Whether an equation does more than name a value: 2x + y = 1, but not y = 2x or f(x) = 2x."""
    return not isinstance(equation.lhs, (Symbol, AppliedUndef, Derivative, Tuple))


def same_equation(gold, answer):
    """Whether two equations have the same left sides and equal right ones, or are multiples."""
    if gold.lhs == answer.lhs:
        return same(gold.rhs, answer.rhs)
    return ratio(gold.lhs - gold.rhs, answer.lhs - answer.rhs) is not None


def same_inequality(gold, answer):
    """Whether one inequality is a multiple of the other: x > y + 1 and 2y + 2 < 2x."""
    if isinstance(gold, And) and isinstance(answer, And):
        return same_elements(gold._unsorted_args, answer._unsorted_args)
    if isinstance(gold, And) or isinstance(answer, And):
        return False
    if isinstance(gold, Ne) or isinstance(answer, Ne):
        return type(gold) is type(answer) and same_equation(gold, answer)
    if (gold.rel_op in "<>") != (answer.rel_op in "<>"):
        return False
    quotient = ratio(gold.gts - gold.lts, answer.gts - answer.lts)
    return quotient is not None and quotient.is_extended_positive


def ratio(a, b):
    """The constant a / b, with denominators cleared, or None where it is none or 0.

    Without symbols there is none: 1 = 2 is false like any other false equation.
    """
    a, b = (together(one).as_numer_denom()[0] for one in (a, b))
    if a.free_symbols != b.free_symbols or not a.free_symbols:
        return None
    pairs = sampled(a, b)
    if not all(x and y for x, y in pairs):
        return None
    first = pairs[0][0] / pairs[0][1]
    return first if all(close(x / y, first, tolerance(a, b)) for x, y in pairs) else None


def same_solutions(gold, answer):
    """Whether x < 3 is (-oo, 3), or 1 < x and x < 2 is 1 < x < 2."""
    if is_inequality(gold) and is_inequality(answer) and gold.free_symbols != answer.free_symbols:
        return False
    sets = [one.as_set() if is_inequality(one) else one for one in (gold, answer)]
    return all(isinstance(one, Set) for one in sets) and same_set(*sets)


def same_set(gold, answer):
    """Whether two values, one of them a set, are the same set; a number is the set of itself."""
    if isinstance(gold, Set) and isinstance(answer, Set):
        gold = gold.doit()
        answer = answer.doit()
        if gold == answer:
            return True
    if not isinstance(gold, (FiniteSet, Union)) and not isinstance(answer, (FiniteSet, Union)):
        both = isinstance(gold, Set) and isinstance(answer, Set)
        return both and gold.symmetric_difference(answer).is_empty is True
    golds = gold.args if isinstance(gold, (FiniteSet, Union)) else [gold]
    answers = answer.args if isinstance(answer, (FiniteSet, Union)) else [answer]
    return same_elements(golds, answers)


def same_elements(golds, answers):
    """Whether each of the one is in the other, and the other way round.

    Equations count as their right sides only where they name the same thing: x = 1 or x = 2, but
    not x = 1, y = 2.
    """
    names = []
    for side in (golds, answers):
        names.append({str(one.lhs).partition("_")[0] for one in side if isinstance(one, Eq)})
    if names[0] != names[1] and max(map(len, names)) > 1:
        return False
    found = [{j for j, a in enumerate(answers) if same(g, a)} for g in golds]
    return all(found) and len(set().union(*found)) == len(answers)


def same_value(gold, answer):
    """Whether two expressions have the same value wherever both are compared."""
    if gold.has(nan, zoo) or answer.has(nan, zoo):
        return False
    if gold == answer:
        return True
    try:
        pairs = sampled(gold, answer)
    except TypeError:  # a function without a value: f(x + 1)
        return simplify(gold - answer) == 0
    pairs = [pair for pair in pairs if pair[0].is_finite or pair[1].is_finite]
    return bool(pairs) and all(close(a, g, tolerance(gold, answer)) for g, a in pairs)


def tolerance(gold, answer):
    """The relative difference that makes no difference: a millionth where there are decimals."""
    if not gold.has(Float) and not answer.has(Float):
        return 1e-25
    whole = not gold.free_symbols and numerical(gold) % 1 == 0
    return 1e-12 if whole else 1.0001e-6  # an integer must be met exactly


def close(a, b, limit):
    """Whether two finite numbers are equal up to a relative difference."""
    if not (a.is_finite and b.is_finite):
        return False
    if a.is_Rational and b.is_Rational:
        return a == b
    size = max(abs(a), abs(b))
    return bool(abs(a - b) <= limit * size or size < 1e-90)  # what is left of 0 in disguise


def sampled(a, b):
    """Pairs of the values of two expressions at fixed random points; i is the imaginary unit.

    Raises TypeError where one has no value.
    """
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    pairs = []
    for point in range(POINTS if symbols else 1):
        place = {}
        for position, symbol in enumerate(symbols):
            place[symbol] = I if symbol.name == "i" else coordinate(symbol.name, position, point)
        pairs.append(tuple(numerical(one.xreplace(place)) for one in (a, b)))
    return pairs


def coordinate(name, position, point):
    """The value of a symbol at a point. Positive, then negative, then of both signs."""
    seed = zlib.crc32(f"{name} {point}".encode())
    negative = (False, False, True, position % 2, seed % 2)[point]
    return (-1 if negative else 1) * Rational(1 + seed % 97, 101) * (1 + 2 * (point % 2))


def numerical(expression):
    """An expression without symbols as a number. Raises TypeError where it has no value."""
    result = expression.doit()
    if not result.is_Rational:
        result = result.evalf(DIGITS)
    if not result.is_number:
        raise TypeError(result)
    return result
