r"""How an answer is written: one form for its looks, its unit, its number. Texts only, no algebra.

clean       12\,345\text{ cm} is 12345\text{ cm}; what may mean something stays
normalise   the form in which two texts are compared: no \text{}, no needless spaces
split_unit  12\text{ cm}^2 is 12 and (("cm", 2),)
number      1,234 and \frac{1}{2} and 4.5e33 and 0.\bar{6} as exact fractions
"""

import re
from fractions import Fraction
from typing import NamedTuple

# -------------------------------------------------------------------------------------------------
# Two texts in one form

CHARACTERS = r"""
≤ \le | ≥ \ge | ≠ \ne | ± \pm | × \times | · \cdot | ⋅ \cdot | π \pi | θ \theta | ∞ \infty | ∪ \cup
∩ \cap | ∈ \in | ∅ \emptyset | ≈ \approx | − - | – - | ÷ / | ⁄ / | ½ \frac{1}{2} | ¼ \frac{1}{4}
¾ \frac{3}{4}
"""
TRANSLATION = {}
for pair in re.split(r"[|\n]", CHARACTERS.strip()):
    character, new = pair.split()
    TRANSLATION[ord(character)] = new + " " * new[-1].isalpha()
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
TEXT_COMMAND = (
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|boldsymbol|underline"
    r"|mbox|operatorname)"
)
TEXT = re.compile(TEXT_COMMAND + r"\s*\{([^{}]*)\}")
LARGE = r"(hundred|thousand|million|billion|trillion|percent)"

REWRITES = (
    (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda match: raised(match[0].translate(RAISED))),
    (r"[₀₁₂₃₄₅₆₇₈₉]+", lambda match: "_{" + match[0].translate(LOWERED) + "}"),
    (r"√ ?([0-9.]+|[A-Za-z])", r"\\sqrt{\1}"),
    (r"\{,\}", ","),
    (r"(?<=[0-9]),\\[!,;: ]\s*(?=[0-9]{3}(?![0-9]))", ","),  # 32,\! 349
    (r"(?<=[0-9])\\[!,;:]\s*(?=[0-9]{3}(?![0-9]))", ""),  # 10\,000
    (r"(?<!\\)(\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\displaystyle|\\[()[\]])", ""),
    (r"\\[bB]igg?[lrm]?(?![a-zA-Z])", ""),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"(?<!\\)\\[!,;:]|\\q?quad(?![a-zA-Z])", " "),
    (r"(?<!\\)\$", ""),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac\s*([0-9])\s*([0-9])(?![0-9])", r"\\frac{\1}{\2}"),
    (r"(\^\s*(\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])|°)", r"\\degree "),
    (r"\\degree\s*(?:C|\\(?:text|mathrm)\s*\{\s*C\s*\})(?![a-zA-Z])", r"\\text{celsius}"),
    (r"\\degree\s*(?:F|\\(?:text|mathrm)\s*\{\s*F\s*\})(?![a-zA-Z])", r"\\text{fahrenheit}"),
    (r"\\degree ", ""),
    (r"\\%", "%"),
    (r"(?<!\\)\\ |~|\s+", " "),
    (r"\\(?:mathrm|mathit|text|operatorname)\s*\{\s*([ie])\s*\}|\\([ij])math(?![a-zA-Z])", r"\1\2"),
    (r"\\(?:bar|dot|overline)\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))", r"\\overline{\1\2}"),
    (r"(?<=[0-9])(?<!\.\.)\.(?=[ )}/])", ""),  # 1./3
    (r"(?<=[0-9.])[eE]([+-]?[0-9]+)$", r" \\times 10^{\1}"),  # sympy: 4.5e33 = 4.5 * e * 33
    (r"(?<=[0-9])\s*(" + TEXT_COMMAND + r"\s*\{)\s*" + LARGE + r"(?![a-zA-Z])", r" \2 \1"),
    (TEXT_COMMAND + r"\s*\{\s*\}", " "),
    (r"(?<![A-Za-z])([AaPp])\.\s?([Mm])(?![A-Za-z])", r"\1\2"),  # a.m.
    (r"(?<=[0-9])(?:st|nd|rd|th)(?![a-zA-Z])", ""),
    (r"(?<=[0-9])\^\s*(?:th|\{\s*(?:" + TEXT_COMMAND + r"\s*\{(?:st|nd|rd|th)\}|th)\s*\})", ""),
    (r"(?<=[0-9]) \(([A-Za-z]{2}[A-Za-z ]*)\)$", r" \\text{\1}"),  # 9 (apples)
    (r" +", " "),
)
COMPILED = [(re.compile(pattern), new) for pattern, new in REWRITES]
NEEDLESS_SPACE = re.compile(r"(?<![0-9A-Za-z]) +| +(?![0-9A-Za-z])")  # 1 1/2 is not 11/2


def raised(power):
    """A power that was written in raised digits, as LaTeX."""
    return f"^{power}" if len(power) == 1 else f"^{{{power}}}"


def clean(text):
    r"""The answer without what only changes its looks; spaces that may mean something stay.

    Text around the whole of an answer with a number goes too: \text{5 apples} is 5 apples.
    """
    text = text.translate(TRANSLATION)
    for pattern, new in COMPILED:
        text = pattern.sub(new, text)
    text = text.strip()
    whole = TEXT.fullmatch(text)
    if whole and re.search("[0-9]", whole[1]):
        text = whole[1].strip()
    return text.rstrip(".").rstrip()


def normalise(text):
    """The form in which two texts are compared: clean, no text commands. `(B)` is `B`."""
    return bare(clean(text))


def bare(text):
    """`normalise` for a text that is clean."""
    text = TEXT.sub(r" \1 ", text).replace("\\$", "")
    text = NEEDLESS_SPACE.sub("", re.sub(" +", " ", text.strip()))
    return text[1:-1] if re.fullmatch(r"\([A-Za-z]\)", text) else text


# -------------------------------------------------------------------------------------------------
# Units

UNITS = r"""
m meter metre | cm centimeter centimetre | mm millimeter millimetre | km kilometer kilometre
in inch inche | ft foot feet | yd yard | mi mile | h hr hour | min minute | s sec second
ms millisecond | year yr | kg kilogram | g gram | mg milligram | lb pound £ GBP | oz ounce
L l liter litre | mL ml milliliter millilitre | gallon gal | N newton | J joule | W watt
kW kilowatt | V volt | Hz hertz | dollar \$ USD | cent ¢ | euro € EUR | yen ¥ | rupee ₹
am AM | pm PM
"""  # a name and its other spellings, without the s of the plural
UNIT_NAMES = {"unit": "", "point": ""}
for spellings in re.split(r"[|\n]", UNITS.strip()):
    UNIT_NAMES |= dict.fromkeys(spellings.split(), spellings.split()[0])
SHORT_FORMS = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h"}
POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3, "squared": 2, "cubed": 3}
LETTER_UNITS = frozenset("m s h g l L N J W V".split())
CLEAR_UNITS = frozenset("cm mm km kg mg ml mL lb oz Hz kW".split())  # hardly a product of letters
HALF_DAYS = {"am", "pm"}  # never ignored
NO_UNITS = frozenset(  # words behind a number that change or continue what it says
    "or and not no more less fewer most least than if when where about over under to from by is are"
    " at between mod modulo sin cos tan cot log exp"
    " hundred thousand million billion trillion percent".split()
)
SUFFIX = re.compile(
    rf"""
    (?P<text>{TEXT_COMMAND}\s*\{{ (?P<words>[^{{}}]*) \}})
    | (?P<currency>\\\$|[€£¥₹¢])
    | (?P<power>\^[ ]?(?:[1-4]|\{{[ ]?-?[1-4][ ]?\}}))
    | (?P<word>[A-Za-zµΩ]+\.?)
    | (?P<join>/|\\cdot(?![a-zA-Z]))
    | (?P<space>[ ])
    | \\[A-Za-z]+
    | .
    """,
    re.VERBOSE | re.DOTALL,
)
UNIT_TEXT = re.compile(r"(?:[A-Za-zµΩ$€£ ./*-]|\^-?[1-4])+")
UNIT_FRACTION = re.compile(rf"\\frac\s*\{{({TEXT.pattern})\}}\s*\{{({TEXT.pattern}(?:\^[23])?)\}}")
CURRENCY = re.compile(r"([+-]?) ?(\\\$|[€£¥₹]|\\pounds(?![a-zA-Z])|USD |EUR |GBP ) ?")


class Quantity(NamedTuple):
    """A clean answer in two. unit: pairs (name, exponent), () for none.

    certain: 2 for what must be a unit, 1 for what is one behind a plain number (m^2, m/s), 0 for a
    letter that may be a variable.
    """

    value: str
    unit: tuple = ()
    certain: int = 2


def split_unit(text):
    r"""The Quantity of a clean answer: `12\text{ cm}^2` is ("12", (("cm", 2),), 2)."""
    text = UNIT_FRACTION.sub(r"\1/\3", text)
    sign, currency = "", ""
    if before := CURRENCY.match(text):
        sign, currency = before[1], before[2].replace("\\pounds", "£")
        text = text[before.end() :]
    start = unit_start(text)
    value = re.sub(r"( |\\cdot|\\times)+$", "", text[:start])
    if not re.search(r"[0-9]|\\pi", value):
        return Quantity(sign + text, unit_names(currency))  # a text answer, not a unit
    unit = unit_names(text[start:])
    if dict(unit_names(currency)).keys() - dict(unit).keys():
        unit = unit_names(currency + " " + text[start:])
    return Quantity(sign + value, unit, 2 if currency else certainty(text[start:]))


def unit_start(text):
    """Where the unit starts that a clean answer ends in: its length where there is none."""
    start = len(text)
    behind = None  # the kind of the token to the right
    for token in reversed(list(SUFFIX.finditer(text))):
        kind = token.lastgroup
        if kind is None or (kind in ("text", "word") and not is_unit(token, behind)):
            break
        if kind in ("text", "word", "currency") or token[0] == "/" and behind:
            start = token.start()
        if kind != "space":
            behind = kind
    return start


def is_unit(token, behind):
    """Whether a match of SUFFIX may belong to a unit. behind: the kind of what follows it."""
    if token["text"]:
        words = token["words"]
        return bool(UNIT_TEXT.fullmatch(words)) and not NO_UNITS & set(words.lower().split())
    word = token["word"].rstrip(".")
    if len(word) == 1:
        return word in LETTER_UNITS and behind in (None, "power", "join")
    before = token.string[: token.start()][-1:]
    if word in UNIT_NAMES or word in SHORT_FORMS or word in POWER_WORDS:
        return before in tuple("0123456789 }/")
    return len(word) >= 3 and before in (" ", "/") and word.lower() not in NO_UNITS


def certainty(suffix):
    """How certain it is that a text is a unit (see Quantity)."""
    words = re.findall(r"[A-Za-zµΩ]+", suffix)
    if re.search(r"\\(?!cdot)|[€£¥₹¢]", suffix):
        return 2
    if CLEAR_UNITS & set(words) or max(map(len, words), default=3) >= 3:
        return 2
    if max(map(len, words)) == 2:
        return 2 if words[0] in HALF_DAYS or suffix != suffix.lstrip() else 1
    return 1 if re.search(r"[/^]", suffix) else 0


def unit_names(text):
    """A unit in one form for all its spellings: sorted pairs (name, exponent)."""
    text = re.sub(TEXT_COMMAND, " ", text).replace(".", "")
    words = re.findall(r"\\\$|[A-Za-zµΩ]+|[€£¥₹¢]|\^[{ ]*-?[1-4]|/", text)
    words = " ".join(SHORT_FORMS.get(word, word) for word in words).replace("/", " / ").split()
    exponents = {}
    last = None
    sign = power = 1
    for word in words:
        if word in ("/", "per"):
            sign = -1
        elif word.startswith("^"):
            if last is not None:
                exponents[last] *= int(word.strip("^{ "))
        elif word in ("squared", "cubed") and last is not None:
            exponents[last] *= POWER_WORDS[word]
        elif word in POWER_WORDS:
            power = POWER_WORDS[word]
        else:
            last = unit_name(word)
            exponents[last] = exponents.get(last, 0) + sign * power
            sign = power = 1
    return tuple(sorted((name, exponent) for name, exponent in exponents.items() if name))


def unit_name(word):
    """One name for the spellings of a word. Case counts in short ones: mW is not MW."""
    if word not in UNIT_NAMES and len(word) > 3:
        word = word.lower()
    if word not in UNIT_NAMES and len(word) > 3 and word.endswith("s"):
        word = word[:-1]
    return UNIT_NAMES.get(word, word)


def without_units(answer, gold):
    """Two clean texts without their units, or None where the units differ."""
    a = split_unit(answer)
    g = split_unit(gold)
    if a.unit and g.unit:
        if a.unit == g.unit:
            return a.value, g.value
        return None if a.certain == g.certain == 2 else (answer, gold)
    if HALF_DAYS & dict(a.unit + g.unit).keys():
        return None
    return a.value if a.certain else answer, g.value if g.certain == 2 else gold


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
        [ ]? (?:\\times|\\cdot|\*)
        [ ]? 10 [ ]? \^ [ ]? \{? [ ]? (?P<power>[+-]?[0-9]{1,3}) [ ]? \}?
    )?
    """.replace("INTEGER", INTEGER),
    re.VERBOSE,
)
PERCENT = re.compile(" ?(%| percent)$")
SCALES = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}


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
