"""Graders that need no process of their own: time linear in the response, no arithmetic on unbounded numbers."""

from __future__ import annotations

import re
from fractions import Fraction

TAIL = 20_000
"""Characters at the end of a response in which an answer that is not boxed is looked for."""
TOLERANCE = Fraction(1, 10**9)
"""Largest relative difference of a decimal from a fraction such as 1/3 that it rounds. Else numbers are exact."""
_LONGEST_NUMBER = 400
_FAR = 40
"""Characters between two boxes, or two letters, that make one answer."""
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*(\{)|\\.|[{}]", re.DOTALL)
_BETWEEN = re.compile(r"[\s,;$.\uff0c\u3001]*(?:and|or|[和或]|\\text\{\s*(?:and|or)\s*\})?[\s,;$]*")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}|\\[dt]?frac\s*(\d)\s*(\d)")
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_EXPONENT = r"\s*\^\s*(?:\{\s*([-+]?\d{1,3})\s*\}|([-+]?\d{1,3})(?!\d))"
_NAME = r"0-9A-Za-z_\u00aa\u00b5\u00ba\u00c0-\u024f\u0370-\u052f\u1e00-\u1fff"
"""Digits, and letters of the alphabets in which names and formulas are written (Latin, Greek, Cyrillic): a number
behind one is part of a name. Chinese, Japanese, Korean and other words stand beside numbers without white space."""
_NUMBER = re.compile(
    rf"(?<![{_NAME}.^])"
    r"(?<![\^_]\{)(?<![\^_][-+])(?<![\^_]\{[-+])([-+]?)\s?\$?\s?"  # not the 2 of cm^2 or x_{2}
    rf"(?:(\d{{1,9}})[ \t]+(?=\d+\s*/\s*\d))?({_PLAIN})"  # 2 1/2
    rf"(?:[eE]([-+]?\d{{1,3}})(?!\d)|(?:\s*(?:[x*\u00d7]|\\times|\\cdot)\s*10)?{_EXPONENT})?"  # 2e3, 2 x 10^3, 2^5
    rf"(?:\s*/\s*({_PLAIN}))?"
)
_UNIT = re.compile(
    r"(\d[\s\\,]*)\\(?:text|mathrm|textrm|mbox)\s*\{(?!\s*(?:(?:or|and)\s*\}|[万萬亿億억만千百]))[^{}]*\}"
)
"""What is written behind a number: \\text{ sheets in 2 weeks}."""
_OFFERED = re.compile(
    r"[\s$]*(?:[,;\uff0c\uff1b\u3001和或及と]|または|또는|\b(?:or|and)\b|\\text\{\s*(?:or|and)\s*\})[\s,;$]*"
)
_MINUS_WORD = re.compile(r"(?:[负負]|マイナス|마이너스)\s?$")
_TENS = r"[万萬亿億억兆]|만(?=\s|원|명|개|$)|千(?![克米瓦卡焦帕字])|百(?!分)|分之"
"""A power of ten, or "of which", in Chinese, Japanese or Korean behind a number; a thousand grams are a unit."""
_TENS_BEHIND = re.compile(rf"\s?(?:\\text\s?\{{\s?)?((?:{_TENS})+)(\s?\d)?")
_POWER = {"百": 2, "千": 3, "万": 4, "萬": 4, "만": 4, "亿": 8, "億": 8, "억": 8}
_TIMES_TEN = re.compile(r"(?:[x*\u00d7]|\\times|\\cdot)\s*10\s*\^")
# what is repeated keeps what it took (*+): a response of 20,000 line breaks must not cost more than reading it
_LETTER_FIRST = re.compile(
    r"\W*+(?:(?:text|textbf|mathrm|mathbf)\s*+\{)?+\W*+(?:(?i:(?:answer|option|choice)\b)\W*+(?:is\b\W*+)?+)?+([A-Za-z])(?![A-Za-z0-9])"
)
_LETTER = r"(?:[*_(\"'`<\[{$\s]|\\(?:text|textbf|mathrm|mathbf)\s*+\{)*+([A-Z])(?![A-Za-z0-9'])"
_SAID = [
    re.compile(rf"(?i:\b(?:{word}))\**+\s*+(?:(?i:is|[:=\uff1a])\**+\s*+:?+\s*+(?i:option|choice)?+\s*+)?+{_LETTER}")
    for word in ("answer", "choice|option")
]
"""What is said of the answer counts for more than what is said of an option, which may be that it is wrong."""
_WORD_OR = r"\b(?:or|and)\b|\\text\{\s{0,9}(?:or|and)\s{0,9}\}"
_OR = re.compile(rf"[^A-Za-z0-9,;]{{0,{_FAR}}}(?:{_WORD_OR}|[/&])[^A-Za-z0-9]{{0,{_FAR}}}[A-Z](?![A-Za-z0-9'])")
_OR_IN_BOX = re.compile(
    rf"[^A-Za-z0-9]{{0,{_FAR}}}(?:[,;/&]|{_WORD_OR})[^A-Za-z0-9]{{0,{_FAR}}}[A-Za-z](?![A-Za-z0-9'])"
)
"""A second letter soon behind the first: no choice was made."""
_ALONE = re.compile(r"[^A-Za-z0-9]*([A-Za-z])[^A-Za-z0-9]*")


def exact(response: str, label: str) -> float:
    """1 if the response is the label, white space around both left out, else 0."""
    return float(response.strip() == label.strip())


def digits(response: str, label: str, weight: float) -> float:
    """(1 - weight) * exact + weight * share of the positions whose characters agree, of the longer of the two."""
    response, label = response.strip(), label.strip()
    positions = max(len(response), len(label), 1)
    share = sum(a == b for a, b in zip(response, label)) / positions if label else float(not response)
    return (1 - weight) * float(response == label) + weight * share


def numeric(response: str, label: str) -> float:
    """1 if the number of the last \\boxed{}, or else the last number of the response, equals the label's, else 0.

    Thousands separators, $, %, units and trailing zeros do not count; fractions do. A box that offers several has
    chosen none. Numbers are compared exactly; only a decimal with digits behind the point may differ by TOLERANCE from
    a fraction whose decimals have no end, as 0.333333333333 from 1/3.
    """
    box = last_boxed(response)
    expected, value = last_number(label), last_number(response if box is None else box, alone=box is not None)
    if expected is None or value is None:
        return 0.0
    if _ends(expected) == _ends(value) or 1 in (expected.denominator, value.denominator):
        return float(expected == value)
    return float(abs(expected - value) <= TOLERANCE * max(abs(expected), abs(value)))


def _ends(value: Fraction) -> bool:
    """Whether its decimals have an end."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def answer_part(response: str, thinking: bool = False, truncated: bool = False) -> str:
    """What of a response may hold its answer: the text behind the last </think>, or all of a response without thinking.

    Nothing ("") where the thinking has no end, for a user would see no answer, and of a truncated response without a
    closed box, whose last number may be half of one. thinking: whether the prompt opened it.
    """
    _, end, shown = response.rpartition("</think>")
    if "<think>" in shown or (thinking and not end) or (truncated and last_boxed(shown) is None):
        return ""
    return shown


def choice(response: str, label: str) -> float:
    """1 if the letter that the response settles on is the label's, else 0."""
    letter = chosen_letter(response)
    return float(letter is not None and letter == chosen_letter(label))


def boxed_answers(text: str) -> list[tuple[int, int, int]]:
    """(start of \\boxed, start and end of what is in its braces) of every closed \\boxed{} or \\fbox{}, by start."""
    open_braces: list[tuple[int, int] | None] = []
    boxes = []
    for match in _BRACES.finditer(text):
        if match[1]:
            open_braces.append((match.start(), match.end()))
        elif match[0] == "{":
            open_braces.append(None)
        elif match[0] == "}" and open_braces:
            opened = open_braces.pop()
            if opened is not None:
                boxes.append((*opened, match.start()))
    return sorted(boxes)


def last_boxed(text: str) -> str | None:
    """What the last closed \\boxed{} holds; several with only commas, "and" or "or" between are joined. None: none."""
    boxes = boxed_answers(text)
    if not boxes:
        return None
    parts = [boxes[-1]]
    for earlier in reversed(boxes[:-1]):
        end, start = earlier[2], parts[-1][0]
        if end > start or start - end > _FAR or not _BETWEEN.fullmatch(text, end + 1, start):
            break
        parts.append(earlier)
    return ", ".join(text[start:end].strip() for _, start, end in reversed(parts))


def last_number(text: str, alone: bool = False) -> Fraction | None:
    """The last number of a text: 1,234.50, -3, 2.5e3, 2 \\times 10^3, 3/4, 1 3/4, \\frac{3}{4}.

    None: there is none (or one of 400 digits, or one with Chinese or Japanese numerals in it), or with `alone` it is
    one of several that were offered ("1, 2", "1 or 2").
    """
    text = text[-TAIL:].replace("\u2212", "-").replace("{,}", ",")
    text = text.replace("\\,", "").replace("\\!", "").replace("\\$", "$")
    text = _FRACTION.sub(lambda m: f" {m[1] or m[3]}/{m[2] or m[4]}", text)
    text = re.sub(r"([-+])\s+(?=\S+/)", r"\1", text)
    text = _UNIT.sub(r"\1 ", text)
    last, before = None, None
    for match in _NUMBER.finditer(text):
        last, before = match, last
    if last is None or len(last[0]) > _LONGEST_NUMBER:
        return None
    if alone and before is not None and _OFFERED.fullmatch(text, before.end(), last.start()):
        return None
    tens = _TENS_BEHIND.match(text, last.end())
    if (tens and (tens[2] or tens[1] not in _POWER)) or re.search(rf"(?:{_TENS})$", text[: last.start()][-9:]):
        return None
    sign, whole, number, exponent, braced, bare, under = last.groups()
    value = Fraction(number.replace(",", "")) * Fraction(10) ** int(exponent or 0)
    power = int(braced or bare or 1)
    if (braced or bare) and _TIMES_TEN.search(last[0]):
        value *= Fraction(10) ** power
    elif abs(power) * len(number) > _LONGEST_NUMBER or (power < 0 and value == 0):
        return None
    else:
        value **= power
    if under is not None:
        below = Fraction(under.replace(",", ""))
        if below == 0:
            return None
        value /= below
        if whole is not None and value < 1:
            value += int(whole)
    if tens:
        value *= 10 ** _POWER[tens[1]]
    minus = sign == "-" and not _is_dash(text, last.start())
    return -value if minus or _MINUS_WORD.search(text[: last.start()][-9:]) else value


def _is_dash(text: str, at: int) -> bool:
    """Whether the "-" before a number, with white space behind it, is a list's bullet or stands between two numbers."""
    before = text[:at].rstrip(" \t")
    return text[at + 1].isspace() and (before[-1:].isdigit() or before.endswith(("\n", ")", "]", "}")))


def chosen_letter(text: str) -> str | None:
    """The letter of the last box, else of the last "answer is X", else of the last "option X", else a text or last line
    that is only a letter. None: there is none, or two ("A or B")."""
    box = last_boxed(text)
    if box is not None:
        match = _LETTER_FIRST.match(box)
        return match[1].upper() if match and not _OR_IN_BOX.match(box, match.end()) else None
    tail = text[-TAIL:].strip()
    for pattern in _SAID:
        matches = list(pattern.finditer(tail))
        if matches:
            return matches[-1][1] if not _OR.match(tail, matches[-1].end()) else None
    line = tail.rsplit("\n", 1)[-1]
    match = _ALONE.fullmatch(line)
    return match[1].upper() if match else None


def label_error(grader: str, label: str) -> str | None:
    """Why no response could ever equal this label, or None. A function of the user's reads labels as it likes."""
    if ":" not in grader and not label.strip():
        return f"the label is empty, and {grader} compares the answer with it"
    if grader == "numeric" and last_number(label) is None:
        return f"the label {label!r:.80} has no number, which grader numeric compares"
    if grader == "choice" and chosen_letter(label) is None:
        return f"the label {label!r:.80} is no letter, which grader choice compares"
    return None
