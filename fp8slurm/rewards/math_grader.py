"""Grader `math`: math-verify's reader, latex2sympy, reads an answer's pieces as they are; these are compared exactly.

math-verify's own comparison pays what it should not: it falls back to the last number of what it cannot read (a set by
its predicate), takes units and single letters off expressions, folds A and a, and rounds to six decimals.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import product
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
from math_verify.grader import should_treat_as_complex
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from fp8slurm.rewards.graders import last_boxed, last_number

MATH_TAIL = 4000
"""Characters at the end of a response without a box that are searched for its answer."""
DIGITS = 40
"""Digits to which numbers are computed that are no fractions."""
LEAST_DECIMALS = 6
"""Digits behind the point, and in all, that a decimal needs to stand for the number that it rounds (0.333333: 1/3)."""
POINTS = (Fraction(7, 5), Fraction(-13, 11), Fraction(29, 9), Fraction(-3, 17))
"""What the variables of two expressions are set to: expressions that agree at all four are taken to be the same."""
_AS_IS = NormalizationConfig(boxed="none")
_MENDED = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
"""Reads \\frac12 and 2^(1/2) too; takes a brace from where it stands in other cases."""
_CHARACTERS = str.maketrans(
    {chr(c): chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)}
    | {
        "\u2212": "-",
        "\u2013": "-",
        "\u00a0": " ",
        "\u3000": " ",
        "、": ",",
        "。": ".",
        "²": "^2",
        "³": "^3",
        "°": "^\\circ ",
    }
    | {"\u00d7": "\\times ", "÷": "\\div ", "·": "\\cdot ", "π": "\\pi ", "∞": "\\infty ", "\u222a": "\\cup "}
    | {"≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "\u2019": "'", "\u2032": "'"}
    | {chr(0x2460 + i): f" ({i + 1}) " for i in range(9)}
)
_WIDE = r"\u1100-\u11ff\u3000-ヿ㄰-㆏\u3400-\u9fff가-\ud7af"
"""Letters of Chinese, Japanese and Korean, which stand beside numbers without white space."""
_COUNTING = "[一二三四五六七八九十百千万萬亿億兆负負成折倍만억조천백]|分之|マイナス|마이너스"
"""Of them what changes a number: numerals, powers of ten, minus, "of which"."""
_COMMANDS = """
frac dfrac tfrac cfrac sqrt left right text textbf textit textrm mathrm mathbf mathbb mathit mbox pi theta
alpha beta gamma infty cup cap times cdot div pm mp le leq ge geq ne neq lt gt in mid begin end sin cos tan
cot sec csc log ln exp lim sum int binom emptyset varnothing circ degree angle triangle quad qquad overline
displaystyle boxed ldots dots lfloor rfloor
"""
_KNOWN = re.compile(rf"\\\\(?:(?:{'|'.join(_COMMANDS.split())})(?![A-Za-z])|[{{}}%$,;!])")
_WORDS_BOX = r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}"
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|,|;|!|:)(?![A-Za-z])\s*")
_SEPARATOR = re.compile(
    r"[,;]|\\\\|\\q?quad(?![A-Za-z])|\\(?:text|mathrm|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}"
    r"|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|[和或及]"
)
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d)")
_NUMBERED = re.compile(r"(?:^|(?<=[\s,;$}]))\(\s*(\d|[ivx]{1,4}|[a-h])\s*\)")
_NUMBERS = ("1 2 3 4 5 6 7 8 9".split(), "i ii iii iv v vi vii viii ix".split(), "a b c d e f g h".split())
_PREDICATE = re.compile(
    r"\s*(\([^()]*\)|[A-Za-z](?:_\{?\w\}?)?)\s*(\\in\s*(?:\\mathbb\s*\{?\s*\w\s*\}?|\w))?"
    r"\s*(?:\\mid(?![A-Za-z])|\\vert(?![A-Za-z])|\||:)(.+)",
    re.DOTALL,
)
_REALS = re.compile(r"\\in\s*(?:\\mathbb\s*\{?\s*R\s*\}?|R)$")
_TIMES_TEN = r"10\s*\^\s*(?:\{\s*[-+]?\d{1,3}\s*\}|\d)"
_PLAIN = re.compile(
    r"[-+]?\s*(?:\d+\s+\d+\s*/\s*\d+|\d+\s*/\s*\d+|(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
    rf"(?:\s*\\(?:times|cdot)\s*{_TIMES_TEN})?|{_TIMES_TEN}"
)
_SCIENTIFIC = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+))[eE]([-+]?)(\d{1,3})")
_REPEATING = re.compile(r"([-+]?)(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}")
_BASE = re.compile(r"([0-9A-Fa-f]+)_\{?\s*(?:\\text\s*\{)?\s*(\d+|two|eight|ten)\s*\}*")
_DEGREES = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\s*\^\s*\{?\s*\d\s*\}?)?)\s*[({]?\s*(\d+)\s*\^\s*\{?\s*\\circ\s*\}?\s*[)}]?"
)
_CLOCK = re.compile(r"0*(\d{1,2}):([0-5]\d)")
_GEOMETRY = re.compile(r"\\(?:angle|triangle|widehat|parallel|perp|sim|cong|overset|overrightarrow|vec)(?![A-Za-z])")
_NUMBER_COMMANDS = re.compile(r"\\(?:[dtc]?frac|sqrt|pi|times|cdot|pm|circ)(?![A-Za-z])")
_POWERED = r"(?:\s*\^\s*(\d|\{\s*-?\d\s*\}))?"
_UNIT_NAMES = {
    "mm": "mm millimeter millimeters millimetre millimetres", "cm": "cm centimeter centimeters centimetre centimetres",
    "dm": "dm", "m": "m meter meters metre metres", "km": "km kilometer kilometers kilometre kilometres",
    "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yard yards", "mi": "mi mile miles",
    "mg": "mg milligram milligrams", "g": "g gram grams", "kg": "kg kilogram kilograms", "t": "ton tons",
    "ms": "ms", "s": "s sec second seconds", "min": "min minute minutes", "h": "h hr hrs hour hours", "day": "day days",
    "ml": "ml mL milliliter milliliters", "l": "L l liter liters litre litres", "mph": "mph", "km/h": "km/h kmh",
    "m/s": "m/s", "mi/h": "mi/h", "C": "C coulomb coulombs", "J": "J joule joules", "N": "N newton newtons",
    "W": "W watt watts", "V": "V volt volts", "Hz": "Hz hertz", "Pa": "Pa pascal pascals", "K": "K kelvin",
    "dollar": "dollar dollars", "cent": "cent cents", "euro": "euro euros",
}  # fmt: skip
_UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in names.split()}
_PLAIN_UNITS = sorted(set(_UNITS) - {*"CJNWVKlsht"}, key=len, reverse=True)
_BARE_UNIT = re.compile(rf"(.*?[\d}})])(\s*)({'|'.join(map(re.escape, _PLAIN_UNITS))}){_POWERED}\s*$", re.DOTALL)
_TEXT_UNIT = re.compile(rf"(.*(?:[\d}})!]|\\pi))\s*{_WORDS_BOX}{_POWERED}\s*$", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """An answer in its pieces: what brackets, commas and words around them say, down to leaves that latex2sympy reads.

    kind: "list" (commas, and, or), "numbered" ((1) .. (2) ..), "set", "where" (a set by its predicate, parts are
    the conditions), "union", a pair of brackets such as "[)", or "leaf".
    """

    kind: str
    text: str
    """As it was written, sizes and dollar signs left out."""
    parts: tuple[Answer, ...] = ()
    known: Any = None
    """A leaf's value, where it comes from a value and not from text."""
    joined: str = ""
    """Of a list or conditions: "and" or "or" where such a word stands between them."""
    variable: str = ""
    """Of a set by its predicate."""

    @cached_property
    def value(self) -> Any:
        """A leaf as sympy reads it, units and all; None: it cannot be read."""
        return self.known if self.known is not None else _read(self.text)

    @cached_property
    def key(self) -> str:
        return re.sub(r"\s|\{\}", "", self.text)


def grade(response: str, label: str) -> float:
    """1 if the last box of the response, or else its last answer, equals the label, else 0.

    The label is LaTeX or plain. Only the end of a response without a box is looked at. ValueError: an empty label.
    """
    expected = _label(label)
    if not expected.text:
        raise ValueError(f"the label {label!r:.80} is empty")
    box = last_boxed(response)
    answers = [structure(box)] if box is not None else _unboxed(response[-MATH_TAIL:])
    return float(any(same(expected, answer) for answer in answers))


def _label(label: str) -> Answer:
    if "\\boxed" in label:
        label = last_boxed(label) or label
    formulas = re.findall(r"(?<!\\)\$((?:[^$\\]|\\.)+)\$", label)
    around = re.sub(r"(?<!\\)\$(?:[^$\\]|\\.)+\$|\b(?:and|or)\b", " ", label)
    if formulas and re.search(r"[A-Za-z]{2,}\W+[A-Za-z]{2,}", around):
        label = ", ".join(formulas)
    return structure(label)


def _unboxed(tail: str) -> list[Answer]:
    """What math-verify takes for the answer of a text, as it is written there, and else the value that it reads."""
    tail = re.sub(rf"(?<=[{_WIDE}\uff01-\uff5e])(?=[-\d$\\.])", " ", tail).translate(_CHARACTERS)
    formulas = LatexExtractionConfig(normalization_config=_MENDED)
    found = parse(tail, [formulas, ExprExtractionConfig()], parsing_timeout=None)
    if not found:
        return []
    value, text = found[0], found[-1]
    if isinstance(text, str) and text:
        percent = "\\%" if not isinstance(value, str) and _percent_of(value) is not None and "%" not in text else ""
        answer = structure(text + percent)
        if isinstance(value, str) or answer.kind != "leaf" or answer.value is not None:
            return [answer]
    return [] if isinstance(value, str) else [Answer("leaf", str(value), known=value)]


def structure(text: str) -> Answer:
    """The pieces of a whole answer; of one that is longer than MATH_TAIL nothing is read."""
    if len(text) > MATH_TAIL:
        return Answer("leaf", text)
    text = _clean(text)
    at = re.match(
        r"(?:[A-Za-z]|\([A-Za-z](?:\s*,\s*[A-Za-z])*\))\s*(?:\\in(?![A-Za-z])|=)\s*(?=[(\[]|\\\{|\\mathbb)", text
    )
    if at:
        whole = _pieces(text[at.end() :])
        if whole.kind not in ("leaf", "list") or "mathbb" in whole.text:
            return whole
    return _pieces(text)


def _clean(text: str) -> str:
    """Without what changes no meaning: doubled backslashes, dollar signs, brackets' sizes, spaces in numbers."""
    if _KNOWN.search(text) and not re.search(r"(?<!\\)(?:\\\\)*\\(?!\\)", text):
        text = text.replace("\\\\", "\\")  # escaped once too often: no command is left that begins with one
    text = text.translate(_CHARACTERS).replace("\n", " ").replace("\\$", "").replace("$", "")
    text = re.sub(r"(?<=\d)\{,\}(?=\d)|(?<=\d)(?:,?\\[,;! ]|~|,\\!)\s*(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<!\\)\\(?=\s)", "", _SIZES.sub(" ", text)).replace("~", " ").replace("\\%", "%").strip()
    text = re.sub(r"(?<=[\w)}\]%])\s*[.,;]$", "", text)
    while (inner := _inside(re.sub(r"^\\f?box(?:ed)?\s*(?=\{)", "", text), "{", "}")) is not None:
        text = inner.strip()
    words = re.fullmatch(_WORDS_BOX, text)
    if words and (number := re.fullmatch(r"\s*([-+]?[\d.,]*\d)\s*([A-Za-z ]*)", words[1])):
        text = f"{number[1]}\\text{{{number[2]}}}" if number[2].strip() else number[1]
    return text


def _depths(text: str) -> list[int]:
    """How many brackets are open before each character."""
    depths, depth, at = [], 0, 0
    for token in re.finditer(r"\\(begin|end)(?![A-Za-z])|\\?[({[]|\\?[)}\]]|\\.", text, re.DOTALL):
        depths += [depth] * (token.start() - at + 1)
        opened = token[1] == "begin" or token[0][-1] in "({["
        closed = token[1] == "end" or token[0][-1] in ")}]"
        depth += (opened - closed) if token[0] not in ("\\(", "\\)", "\\[", "\\]") else 0
        depths += [depth] * (len(token[0]) - 1)
        at = token.end()
    return depths + [depth] * (len(text) - at + 1)


def _inside(text: str, opening: str, closing: str) -> str | None:
    """What one pair of brackets holds that is the whole text."""
    if not (text.startswith(opening) and text.endswith(closing)) or len(text) < len(opening) + len(closing):
        return None
    depths = _depths(text)
    last = len(text) - len(closing)
    return text[len(opening) : last] if min(depths[len(opening) : last + 1]) > 0 and depths[-1] == 0 else None


def _cut(text: str, separator: re.Pattern[str], numbers: bool = False) -> tuple[list[str], str]:
    """The pieces between separators that stand in no bracket, and the separators; `numbers`: not in 1,234."""
    depths, pieces, start, between = _depths(text), [], 0, ""
    kept = {i for m in _THOUSANDS.finditer(text) for i in range(*m.span())} if numbers else set()
    for match in separator.finditer(text):
        if depths[match.start()] == 0 and match.start() not in kept:
            pieces.append(text[start : match.start()])
            start, between = match.end(), between + match[0]
    return [piece.strip() for piece in (*pieces, text[start:]) if piece.strip()], between


def _pieces(text: str, bracketed: bool = False) -> Answer:
    text = text.strip()
    marks = [m for m in _NUMBERED.finditer(text)]
    if len(marks) > 1 and [m[1] for m in marks] in [numbers[: len(marks)] for numbers in _NUMBERS]:
        ends = [m.start() for m in marks[1:]] + [len(text)]
        parts = [text[m.end() : end].strip(" ,;.") for m, end in zip(marks, ends)]
        if marks[0].start() == 0 and all(parts):
            return Answer("numbered", text, tuple(map(_pieces, parts)))
    parts, between = _cut(text, _SEPARATOR, numbers=not bracketed)
    if len(parts) > 1:
        joined = "or" if re.search("or|或", between) else "and" if re.search("and|[和及]", between) else ""
        return Answer("list", text, tuple(map(_pieces, parts)), joined=joined)
    text = parts[0] if parts else ""
    parts, _ = _cut(text, re.compile(r"\\(?:cup|lor)(?![A-Za-z])"))
    if len(parts) > 1:
        return Answer("union", text, tuple(map(_pieces, parts)))
    if (inner := _inside(text, "\\{", "\\}")) is not None:
        if at := _PREDICATE.fullmatch(inner):
            conditions = _pieces(at[3], bracketed=True)
            every = conditions.parts if conditions.kind == "list" and conditions.joined != "or" else (conditions,)
            if at[2]:
                every += (Answer("leaf", f"{at[1]} {at[2].strip()}"),)
            kept = tuple(part for part in every if not _REALS.search(part.text))
            return Answer("where", text, kept, joined=conditions.joined.replace("or", ""), variable=at[1])
        content = _pieces(inner, bracketed=True)
        return Answer("set", text, content.parts if content.kind == "list" else (content,) if content.text else ())
    for brackets in ("()", "[]", "(]", "[)"):
        if (inner := _inside(text, *brackets)) is not None:
            content = _pieces(inner, bracketed=True)
            if content.kind == "list":
                return Answer(brackets, text, content.parts)
            return content if brackets in ("()", "[]") and content.kind == "leaf" else Answer("leaf", text)
    around = re.fullmatch(rf"([{_WIDE}:\s]*)([^{_WIDE}]*?)([{_WIDE}\s]*)", text)
    if around and _number_like(around[2]) and not re.search(_COUNTING, around[1] + around[3]):
        text = around[2].strip()
    return Answer("leaf", text)


def _read(text: str) -> Any:
    """What latex2sympy reads; numbers are read here, exactly. None: it cannot be read."""
    if len(text) > MATH_TAIL:
        return None
    text = re.sub(r"^([A-Za-z]\w*)\s*\\approx(?![A-Za-z])", r"\1=", text).replace("\\varnothing", "\\emptyset")
    text = _DEGREES.sub(r"\1(\\frac{\2\\pi}{180})", text)
    if _PLAIN.fullmatch(text):
        number = last_number(text)
        return None if number is None else sympy.Rational(number.numerator, number.denominator)
    if (number := _scientific(text)) is not None:
        return number
    if at := _REPEATING.fullmatch(text):
        digits = at[3] + at[4]
        value = sympy.Rational(int(digits) - int(at[3] or 0), 10 ** len(at[3]) * (10 ** len(at[4]) - 1)) + int(
            at[2] or 0
        )
        return -value if at[1] == "-" else value
    for part, config in product(dict.fromkeys((text, text.rpartition("=")[2])), (_AS_IS, _MENDED)):
        latex = normalize_latex(part, config)
        try:
            value = latex2sympy(
                latex,
                is_real=not should_treat_as_complex(latex),
                normalization_config=None,
                conversion_config=ConversionConfig(lowercase_symbols=False),
            )
        except (MemoryError, RecursionError):
            raise
        except Exception:  # noqa: S112  (it raises Exception itself where it cannot read)
            continue
        if not isinstance(value, sympy.Basic):
            return value
        value = value.xreplace({f: sympy.Rational(str(f)) for f in value.atoms(sympy.Float)})
        variables = value.free_symbols
        return value.xreplace(dict.fromkeys(variables, sympy.I)) if {v.name for v in variables} == {"i"} else value
    return None


def _scientific(text: str, sure: bool = True) -> Any:
    """The number in the notation of programs: 1.5e3, 1e-9. With `sure` none that may be Euler's e: 3e+1 is 1 + 3e."""
    at = _SCIENTIFIC.fullmatch(text)
    if at is None or (sure and "." not in at[1] and at[2] and len(at[3]) < 2 and at[1].lstrip("+-") != "1"):
        return None
    return sympy.Rational(at[1]) * sympy.Integer(10) ** int(at[2] + at[3])


def same(expected: Answer, answer: Answer) -> bool:
    """Whether two answers are equal. Order counts in tuples, in numbered parts, and where only one of the two
    names what it gives (a = 2, b = 5)."""
    if expected.key == answer.key and expected.key and expected.known is None:
        return True
    kinds = expected.kind, answer.kind
    if "numbered" in kinds:
        return (
            kinds[0] in ("numbered", "list", "()")
            and kinds[1] in ("numbered", "list", "()")
            and _in_order(expected, answer)
        )
    if kinds == ("leaf", "leaf"):
        return _same_leaf(expected, answer)
    if kinds == ("where", "where"):
        return _same_predicate(expected, answer)
    pairs = ("()", "[]", "(]", "[)")
    if kinds[0] in pairs and kinds[1] in pairs:
        return (kinds[0] == kinds[1] or len(expected.parts) > 2) and _in_order(expected, answer)
    if set(kinds) == {"()", "list"}:
        return _in_order(expected, answer)
    first, second = _members(expected), _members(answer)
    if first is not None and second is not None:
        words = {expected.joined, answer.joined} - {""}
        if len(words) == 2 and any(isinstance(p.value, Relational) for p in first if p.kind == "leaf"):
            return False
        return _same_members(first, _renamed(second, _parameter(second), _parameter(first)))
    if kinds == ("union", "union") and _matched(expected.parts, answer.parts):
        return True
    names = [_set_variables(expected), _set_variables(answer)]
    if all(names) and names[0] != names[1]:
        return False
    a, b = _as_set(expected), _as_set(answer)
    return a is not None and b is not None and _same_sets(a, b)


def _set_variables(answer: Answer) -> set[str]:
    """What a relation is about; a set's own variable has no name outside."""
    own = _variables(answer.value) if answer.kind == "leaf" else set()
    return own.union(*map(_set_variables, answer.parts)) - {answer.variable}


def _in_order(expected: Answer, answer: Answer) -> bool:
    return len(expected.parts) == len(answer.parts) and all(map(same, expected.parts, answer.parts))


def _members(answer: Answer) -> Sequence[Answer] | None:
    if answer.kind in ("list", "set"):
        parts = [m for p in answer.parts for m in (_members(p) if p.kind == "leaf" else None) or (p,)]
        return parts
    if answer.kind == "leaf" and "\\pm" in answer.text and isinstance(answer.value, sympy.FiniteSet):
        return [Answer("leaf", str(v), known=v) for v in answer.value.args]
    return None


def _same_members(first: Sequence[Answer], second: Sequence[Answer]) -> bool:
    names = [[_name(p) for p in parts] for parts in (first, second)]
    for mine, other in (names, names[::-1]):
        if None not in mine and len(set(mine)) > 1 and not any(other):
            return len(first) == len(second) and all(map(same, first, second))
    return _matched(first, second)


def _name(answer: Answer) -> str | None:
    """The a of a = 2."""
    at = re.match(r"\s*(\\?[A-Za-z]+(?:_\{?\w+\}?)?)\s*=", answer.text)
    return at[1] if answer.kind == "leaf" and at else None


def _matched(first: Sequence[Answer], second: Sequence[Answer]) -> bool:
    """Whether every part of one side equals a part of its own on the other."""
    if len(first) != len(second):
        return False
    left = list(second)
    for part in first:
        at = next((i for i, other in enumerate(left) if same(part, other)), None)
        if at is None:
            return False
        del left[at]
    return True


def _same_predicate(expected: Answer, answer: Answer) -> bool:
    a, b = _as_set(expected), _as_set(answer)
    if a is not None and b is not None:
        return _same_sets(a, b)
    if len({expected.joined, answer.joined} - {""}) == 2:
        return False
    parts = _renamed(answer.parts, answer.variable, expected.variable)
    return _matched(expected.parts, _renamed(parts, _parameter(parts), _parameter(expected.parts)))


def _parameter(parts: Sequence[Answer]) -> str:
    """The k of "k \\in \\mathbb{Z}", whose name does not count."""
    at = [m[1] for p in parts if (m := re.fullmatch(r"([A-Za-z])\s*\\in\s*\\mathbb\s*\{?\s*[ZN]\s*\}?.*", p.text))]
    return at[0] if len(at) == 1 else ""


def _renamed(parts: Sequence[Answer], old: str, new: str) -> Sequence[Answer]:
    """With another letter for a variable; as they are where the new letter has a meaning in them already."""
    letters = re.compile(r"(\\[A-Za-z]+)|([A-Za-z])")
    used = {m[2] for p in parts for m in letters.finditer(p.text)}
    if old == new or len(old) != 1 or len(new) != 1 or new in used:
        return parts
    return [_pieces(letters.sub(lambda m: new if m[0] == old else m[0], p.text)) for p in parts]


def _as_set(answer: Answer) -> Any:
    """A set of numbers as sympy has it, None where it is none."""
    if answer.kind == "leaf":
        value = answer.value
        if isinstance(value, sympy.Eq) and isinstance(value.rhs, sympy.Set):
            return value.rhs
        if _is_relation(value) and len(value.free_symbols) == 1 and not value.atoms(AppliedUndef):
            try:
                return value.as_set()
            except (NotImplementedError, TypeError, ValueError, AttributeError):
                return None
        return value if isinstance(value, sympy.Set) else None
    if answer.kind in ("where", "union", "list"):
        if answer.kind == "where" and not answer.parts:
            return sympy.Reals
        sets = [_as_set(part) for part in answer.parts]
        if not sets or any(s is None for s in sets) or (answer.kind == "list" and not answer.joined):
            return None
        if answer.kind == "where" and _set_variables(answer):
            return None
        return (sympy.Union if answer.kind == "union" or answer.joined == "or" else sympy.Intersection)(*sets)
    values: list[Any] = [part.value if part.kind == "leaf" else None for part in answer.parts]
    if not all(isinstance(v, sympy.Expr) and not v.free_symbols for v in values):
        return None
    if answer.kind == "set":
        return sympy.FiniteSet(*(v.doit() for v in values))
    if len(values) != 2 or not all(v.is_extended_real for v in values):
        return None
    return sympy.Interval(
        *(v.doit() for v in values), left_open=answer.kind[0] == "(", right_open=answer.kind[1] == ")"
    )


def _same_sets(a: Any, b: Any) -> bool:
    return bool(a == b or a.symmetric_difference(b).is_empty)


def _is_relation(value: Any) -> bool:
    return isinstance(value, (Relational, sympy.And))


def _variables(value: Any) -> set[str]:
    return {s.name for s in value.free_symbols} if isinstance(value, sympy.Basic) else set()


def _same_leaf(expected: Answer, answer: Answer) -> bool:
    if (words := _same_words(expected.text, answer.text)) is not None:
        return words
    for pattern in (_BASE, _CLOCK):
        a, b = pattern.fullmatch(expected.text), pattern.fullmatch(answer.text)
        if a and b:
            return a.groups() == b.groups()
        if a:  # a time of day is no ratio; a label's base may be left out
            return pattern is _BASE and a[1] == answer.text
        if b and pattern is _BASE:
            return b[2].isdigit() and 2 <= int(b[2]) <= 36 and _equal(expected.value, _in_base(*b.groups()))
    both = ("=" in expected.text) == ("=" in answer.text)
    if _GEOMETRY.search(expected.text + answer.text) or (both and _primes(expected.text) != _primes(answer.text)):
        return False
    if _same_values(expected, answer):
        return True
    (number, unit, sure), (given, other, _) = _without_unit(expected.text), _without_unit(answer.text)
    if (
        (unit is None and other is None)
        or (unit and other and unit != other)
        or not (sure or unit is None or other is not None)
    ):
        return False
    return _same_values(Answer("leaf", number), Answer("leaf", given))


def _primes(text: str) -> int:
    """Derivatives and other primes, which latex2sympy leaves out."""
    return text.count("'") + text.count("\\prime")


def _same_words(expected: str, answer: str) -> bool | None:
    """The verdict on words such as \\text{even}; None where neither is one."""
    texts = [re.sub(_WORDS_BOX, r"\1", t) for t in (expected, answer)]
    is_words = [
        (re.fullmatch(rf"\(?\s*(?:{_WORDS_BOX}\s*)+\)?", t) or re.fullmatch(r"[A-Za-z]+(?:[ '][A-Za-z]+)*", t))
        and (len(re.findall(r"[A-Za-z]", bare)) > 3 or t != bare)
        for t, bare in zip((expected, answer), texts)
    ]
    bare = [" ".join(t.replace("(", " ").replace(")", " ").casefold().split()).strip(" .") for t in texts]
    if any(is_words) or all(re.fullmatch("[a-f]", t) for t in bare):
        return bare[0] == bare[1]
    return None


def _in_base(digits: str, base: str) -> Any:
    try:
        return sympy.Integer(int(digits, int(base)))
    except ValueError:
        return None


def _number_like(text: str) -> bool:
    return bool(re.search(r"\d|\\pi", text)) and not re.search(r"[^\W\d_]", _NUMBER_COMMANDS.sub("", text))


def _without_unit(text: str) -> tuple[str, str | None, bool]:
    """A number without the unit behind it, the unit ("": an unknown one, None: none), and whether it can be nothing
    else: the m of 12m may be a variable, that of 12 m and of 12\\text{m} is none."""
    if len(text) <= MATH_TAIL and (at := _TEXT_UNIT.fullmatch(text)):
        word, power = at[2].replace("~", " ").strip(), (at[3] or "").strip("{} ")
        if (_number_like(at[1]) or _inside(at[1].strip(), "(", ")") is not None) and not re.search(_COUNTING, word):
            return at[1].strip(), _UNITS[word] + power if word in _UNITS else "", True
    if len(text) <= MATH_TAIL and (at := _BARE_UNIT.fullmatch(text)) and _number_like(at[1]):
        return at[1].strip(), _UNITS[at[3]] + (at[4] or "").strip("{} "), bool(at[2]) or len(at[3]) > 1
    return text, None, True


def _same_values(expected: Answer, answer: Answer) -> bool:
    a, b = expected.value, answer.value
    if _is_number(a) and (number := _scientific(answer.text, sure=False)) is not None and _equal(a, number):
        return True
    for mine, other in ((expected, b), (answer, a)):
        decimal = re.fullmatch(r"-?(\d*)\.(\d+)", mine.text)
        if decimal and _is_number(other) and not _rational(other, finite=True):
            enough = min(len(decimal[2]), len((decimal[1] + decimal[2]).lstrip("0"))) >= LEAST_DECIMALS
            apart = sympy.N(sympy.Abs(other - mine.value), DIGITS)
            return bool(enough and apart <= sympy.Rational(1, 2 * 10 ** len(decimal[2])))
    percents = [_percent_of(v) for v in (a, b)]
    if percents != [None, None]:
        first, second = (v if p is None else p for v, p in zip((a, b), percents))
        if _equal(first, second):
            return True
        a, b = (v if p is None else p / 100 for v, p in zip((a, b), percents))
    return _equal(a, b)


def _percent_of(value: Any) -> Any:
    """The 50 of 50%."""
    hundredth = sympy.UnevaluatedExpr(sympy.Rational(1, 100))
    return (
        value.args[0] if isinstance(value, sympy.Mul) and len(value.args) == 2 and value.args[1] == hundredth else None
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, sympy.Expr) and not value.free_symbols and not value.atoms(AppliedUndef)


def _rational(value: Any, finite: bool = False) -> Any:
    """A number as a sympy Rational if it is one, else None; `finite`: only with decimals that have an end."""
    value = value if value.is_Rational else value.doit()
    if not value.is_Rational or (finite and set(sympy.factorint(value.q, limit=10)) - {2, 5}):
        return None
    return value


def _equal(a: Any, b: Any) -> bool:
    """Whether two values of sympy are equal, exactly."""
    if a is None or b is None:
        return False
    if _is_relation(a) and _is_relation(b):
        return _same_relations(a, b)
    for first, second in ((a, b), (b, a)):
        if isinstance(first, sympy.Eq) and not _is_relation(second):
            if isinstance(second, sympy.Expr) and _names(first.lhs, first is a):
                return _equal(first.rhs, second)
            return isinstance(second, sympy.Set) and first.rhs == second
        if (
            isinstance(first, sympy.And)
            and not _is_relation(second)
            and all(isinstance(r, sympy.Eq) for r in first.args)
        ):
            return _equal(getattr(first, "_unsorted_args", first.args)[-1].rhs, second)
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        shapes = getattr(a, "shape", None), getattr(b, "shape", None)
        return shapes[0] == shapes[1] is not None and all(map(_equal, a, b))
    if isinstance(a, sympy.Set) or isinstance(b, sympy.Set):
        return isinstance(a, sympy.Set) and isinstance(b, sympy.Set) and _same_sets(a, b)
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        return _same_expressions(a, b)
    return bool(a == b)


def _names(left: Any, label: bool) -> bool:
    """Whether the left side of an equation only names the right side, as x and f(x) do. An answer may name a sum or a
    product that a question asks for (x + y = 5), but not 2x or x^2: the right side is no value of x."""
    if left.is_Symbol or isinstance(left, AppliedUndef):
        return True
    return not label and not left.is_Pow and left.as_coeff_Mul()[0] == 1


def _same_expressions(a: sympy.Expr, b: sympy.Expr) -> bool:
    if a == b:
        return True
    if _is_number(a) and _is_number(b):
        first, second = _rational(a), _rational(b)
        return first == second if first is not None and second is not None else _close(a, b)
    values = _at_points(a, b)
    return values is not None and all(_close(x, y) for x, y in values)


def _close(a: Any, b: Any) -> bool:
    """Whether two numbers agree in DIGITS - 10 digits."""
    x, y = sympy.N(a, DIGITS), sympy.N(b, DIGITS)
    if not (x.is_number and y.is_number) or x.has(sympy.nan, sympy.zoo) or y.has(sympy.nan, sympy.zoo):
        return False
    if x.is_infinite or y.is_infinite:
        return bool(x == y)
    return bool(sympy.Abs(x - y) <= sympy.Float(10) ** (10 - DIGITS) * max(sympy.Abs(x), sympy.Abs(y)))


def _at_points(a: Any, b: Any) -> list[tuple[Any, Any]] | None:
    """Both at POINTS, where both have values; None: other variables, or values at fewer than two points."""
    functions = sorted({*a.atoms(AppliedUndef), *b.atoms(AppliedUndef)}, key=str)
    names = {f: sympy.Dummy(str(f)) for f in functions}
    a, b = a.xreplace(names), b.xreplace(names)
    lower = [
        {s: sympy.Symbol(s.name.lower(), real=s.is_real) for s in e.free_symbols if s not in names.values()}
        for e in (a, b)
    ]
    if all(len(set(low.values())) == len(low) for low in lower):
        a, b = a.xreplace(lower[0]), b.xreplace(lower[1])
    if {s.name for s in a.free_symbols} != {s.name for s in b.free_symbols}:
        return None
    by_name = sorted({s.name for s in a.free_symbols})
    values = []
    for i in range(len(POINTS)):
        point = {n: sympy.Rational(*(POINTS[(i + j) % 4] + j // 4).as_integer_ratio()) for j, n in enumerate(by_name)}
        x, y = (sympy.N(e.subs({s: point[s.name] for s in e.free_symbols}), DIGITS) for e in (a, b))
        finite = [v.is_number and v.is_finite for v in (x, y)]
        if all(finite):
            values.append((x, y))
        elif any(finite):
            return None
    return values if len(values) > 1 else None


def _same_relations(a: Any, b: Any) -> bool:
    first, second = (list(r.args) if isinstance(r, sympy.And) else [r] for r in (a, b))
    left = list(second)
    for relation in first:
        at = next((i for i, other in enumerate(left) if _same_relation(relation, other)), None)
        if at is None:
            break
        del left[at]
    else:
        return not left
    return (
        _polynomial(first)
        and _polynomial(second)
        and a.free_symbols == b.free_symbols
        and _same_sets(a.as_set(), b.as_set())
    )


def _polynomial(relations: Sequence[Any]) -> bool:
    """Whether sympy solves these at once: inequalities in one variable and its absolute values."""
    names = set().union(*(r.free_symbols for r in relations))
    return len(names) == 1 and all(
        isinstance(r, Relational)
        and not isinstance(r, sympy.Eq)
        and (r.lhs - r.rhs).replace(sympy.Abs, lambda x: x).is_polynomial(*names)
        for r in relations
    )


def _same_relation(a: Any, b: Any) -> bool:
    """Whether one is the other times a number: for inequalities a positive one, or both sides exchanged."""
    if not isinstance(a, Relational) or not isinstance(b, Relational):
        return bool(a == b)
    turned = {sympy.Gt: sympy.Lt, sympy.Ge: sympy.Le}
    kinds = [turned.get(type(r), type(r)) for r in (a, b)]
    if kinds[0] is not kinds[1] or not all(isinstance(side, sympy.Expr) for r in (a, b) for side in r.args):
        return bool(a == b)
    left, right = (r.rhs - r.lhs if type(r) in turned else r.lhs - r.rhs for r in (a, b))
    values = _at_points(left, right)
    if not values or any(y == 0 for _, y in values):
        return False
    ratio = values[0][0] / values[0][1]
    alike = all(_close(x, ratio * y) for x, y in values) and ratio != 0
    return bool(alike and (kinds[0] in (sympy.Eq, sympy.Ne) or (ratio.is_real and ratio > 0)))
