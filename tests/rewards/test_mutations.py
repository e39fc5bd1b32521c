"""Pairs by mutation: a label, an equal rewriting, an unequal neighbour. Which is which follows from how they are made.

Run as a script it prints what docs/eval.md shows: by kind, equal ones that are refused and unequal ones that are paid.
"""

import random
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction

from fp8slurm.config.schema import RewardSection
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.rewards.pool import RewardPool

SEED = 20261130
EACH = 50
"""Labels of a kind, each with an equal and an unequal response."""
Random = random.Random
Triple = tuple[str, str, str]
KINDS: dict[str, dict[str, Callable[[Random], Triple]]] = {"math": {}, "numeric": {}}


def kind(grader: str, name: str) -> Callable[[Callable[[Random], Triple]], Callable[[Random], Triple]]:
    def register(make: Callable[[Random], Triple]) -> Callable[[Random], Triple]:
        KINDS[grader][name] = make
        return make

    return register


def boxed(r: Random, answer: str) -> str:
    return r.choice(
        [
            "\\boxed{%s}",
            "So the answer is $\\boxed{%s}$.",
            "\\[\\boxed{%s}\\]",
            "所以答案是\\boxed{%s}。",
            "**\\boxed{ %s }**",
        ]
    ).replace("%s", answer)


def dressed(r: Random, number: str) -> str:
    forms = [
        "%s",
        "\\boxed{%s}",
        "The answer is %s.",
        "#### %s",
        "Answer: $%s$",
        "答案是%s。",
        "共%s个",
        "\\boxed{共%s个}",
    ]
    return r.choice([*forms, "答えは%sです", "정답은 %s입니다", "정답은%s입니다", "\\boxed{%s人}"]).replace(
        "%s", number
    )


def other(r: Random, low: int, high: int, *not_these: int) -> int:
    return r.choice([n for n in range(low, high + 1) if n not in not_these])


def terms(r: Random, parts: list[str]) -> str:
    """A sum in any order; each part begins with its sign."""
    r.shuffle(parts)
    return "".join(parts).removeprefix("+")


def signed(n: int, letter: str = "") -> str:
    return f"{n:+d}{letter}" if not letter or abs(n) != 1 else f"{'+' if n > 0 else '-'}{letter}"


def frac(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    return f"{'-' if value < 0 else ''}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


# What both graders read: numbers


def integers(r: Random) -> Triple:
    n = r.choice([r.randint(2, 99), r.randint(100, 10**7), r.randint(10**15, 10**24)])
    equal = r.choice([f"{n}", f"{n:,}", f"{n}.0", f"{n}.00", f"{2 * n}/2", f"\\frac{{{3 * n}}}{{3}}"])
    unequal = r.choice(
        [f"{n + 1}", f"{n - 1:,}", f"-{n}", f"{10 * n}", f"{n}.5", f"{n + 1}.0", f"\\frac{{{3 * n + 1}}}{{3}}"]
    )
    return str(n), equal, unequal


def fractions(r: Random) -> Triple:
    value = Fraction(r.randint(1, 60), r.randint(2, 30)) * r.choice([1, 1, -1])
    while value.denominator == 1 or abs(value) == 1:
        value += Fraction(1, 7)
    k, p, q = r.randint(2, 9), abs(value.numerator), value.denominator
    minus = "-" if value < 0 else ""
    equal = [f"{minus}\\frac{{{k * p}}}{{{k * q}}}", f"{minus}{p}/{q}", f"{minus}\\dfrac{{{p}}}{{{q}}}"]
    if p > q and not minus:
        equal += [f"{p // q}\\frac{{{p % q}}}{{{q}}}", f"{p // q} {p % q}/{q}"]
    neighbours = [1 / value, -value, value + Fraction(1, q), Fraction(value.numerator, q + 1), value + 1]
    unequal = r.choice([n for n in neighbours if n != value])
    return frac(value), r.choice(equal), r.choice([frac(unequal), f"{unequal.numerator}/{unequal.denominator}"])


def decimals(r: Random) -> Triple:
    places = r.randint(1, 12)
    n = r.randint(1, 10 ** (places + 3))
    value = Fraction(n, 10**places)

    def text(n: int) -> str:
        digits = f"{abs(n):0{places + 1}d}"
        return f"{'-' if n < 0 else ''}{digits[:-places]}.{digits[-places:]}"

    equal = r.choice([text(n) + "0", text(n) + "000", frac(value), f"\\frac{{{n}}}{{{10**places}}}"])
    unequal = r.choice([text(n + 1), text(n) + "1", text(-n), frac(value + Fraction(1, 10 ** (places + 1)))])
    return text(n), equal, unequal


def powers_of_ten(r: Random) -> Triple:
    """6.63 x 10^-34 and what is near it."""
    n, e = r.randint(101, 999), r.randint(2, 40) * r.choice([1, -1, -1])
    if n % 10 == 0:
        n += 1
    mantissa = f"{n // 100}.{n % 100:02d}"
    label = f"{mantissa} \\times 10^{{{e}}}"
    equal = r.choice(
        [
            f"{mantissa}\\times10^{{{e}}}",
            f"{n} \\times 10^{{{e - 2}}}",
            f"{mantissa}e{e}",
            f"{mantissa} \\cdot 10^{{{e}}}",
        ]
    )
    near = f"{(n + 1) // 100}.{(n + 1) % 100:02d}"
    unequal = r.choice(
        [
            f"{near} \\times 10^{{{e}}}",
            f"{mantissa} \\times 10^{{{e + 1}}}",
            f"-{label}",
            f"{near}e{e}",
            f"{mantissa} \\times 10^{{{-e}}}",
        ]
    )
    return label, equal, unequal


for _name, _make in (
    ("integers", integers),
    ("fractions", fractions),
    ("decimals", decimals),
    ("powers of ten", powers_of_ten),
):
    KINDS["math"][_name] = lambda r, make=_make: (lambda t: (t[0], boxed(r, t[1]), boxed(r, t[2])))(make(r))
    KINDS["numeric"][_name] = lambda r, make=_make: (lambda t: (t[0], dressed(r, t[1]), dressed(r, t[2])))(make(r))


@kind("numeric", "money, percent, units")
def _(r: Random) -> Triple:
    n = r.randint(2, 50_000)
    forms = [
        "${}",
        "\\${}",
        "{}%",
        "{}\\%",
        "{} dollars",
        "{} \\text{{ apples}}",
        "{} cm^2",
        "€{}",
        "{}元",
        "{}킬로그램",
        "{} м",
        "x = {}",
    ]
    return str(n), r.choice(forms).format(f"{n:,}"), r.choice(forms).format(f"{n + r.choice([1, -1, 10]):,}")


@kind("numeric", "words of tens, offers, thinking")
def _(r: Random) -> Triple:
    n = r.randint(2, 9999)
    equal = [
        f"共{n}个",
        f"{n}千克",
        f"先算出{n + 1}，再减1，得{n}。",
        f"<think>{n + 1}</think>It is {n}.",
        f"\\boxed{{{n}}}, see x_2",
    ]
    unequal = [
        f"共{n}万个",
        f"{n}億円",
        f"\\boxed{{{n - 1}、{n}}}",
        f"\\boxed{{{n + 1}或{n}}}",
        f"<think>It is {n}",
        f"负{n}",
        f"x{n}",
        f"\\alpha_{{{n}}}",
        f"{n}分之{n}1",
    ]
    return str(n), r.choice(equal), r.choice(unequal)


def pick(r: Random, *cases: tuple[str, list[str], list[str]]) -> Triple:
    """Of one of (label, equal answers, unequal answers), one of each, in a box where it has none."""
    label, *answers = r.choice(cases)
    equal, unequal = (t if "\\boxed{" in t else boxed(r, t) for t in map(r.choice, answers))
    return label, equal, unequal


# What only `math` reads


@kind("math", "tiny exact numbers")
def _(r: Random) -> Triple:
    a, k, f = other(r, 2, 9), r.randint(7, 60), r.randint(10, 25)
    unit = r.choice(["", " \\text{ J s}", "\\text{ m}", "\\,\\mathrm{kg}"])
    return pick(
        r,
        (f"\\frac{{1}}{{{f}!}}", [f"\\frac{{{f + 1}}}{{{f + 1}!}}" + unit], [f"\\frac{{1}}{{{f + 1}!}}" + unit]),
        (
            f"\\frac{{{a}}}{{10^{{{k}}}}}",
            [f"{a} \\times 10^{{-{k}}}" + unit],
            [f"\\frac{{{a + 1}}}{{10^{{{k}}}}}" + unit],
        ),
        (
            f"\\frac{{{a}}}{{10^{{{k}}}}}{unit}",
            [f"\\frac{{{a * 3}}}{{3 \\cdot 10^{{{k}}}}}"],
            [f"\\frac{{{a}}}{{10^{{{k + 1}}}}}{unit}"],
        ),
        (f"{a}^{{-{k}}}", [f"\\frac{{1}}{{{a}^{{{k}}}}}"], ["0", f"{a}^{{-{k + 1}}}", f"-{a}^{{-{k}}}"]),
    )


@kind("math", "roots, pi, logarithms")
def _(r: Random) -> Triple:
    a, b = r.randint(2, 30), r.choice([2, 3, 5, 6, 7, 10, 11, 13])
    return pick(
        r,
        (
            f"{a}\\sqrt{{{b}}}",
            [f"\\sqrt{{{a * a * b}}}", f"\\frac{{{a * b}}}{{\\sqrt{{{b}}}}}", f"\\sqrt{{{b}}} \\cdot {a}"],
            [f"{a}\\sqrt{{{b + 1}}}", f"\\sqrt{{{a * b}}}", f"{a + 1}\\sqrt{{{b}}}", f"-{a}\\sqrt{{{b}}}"],
        ),
        (
            f"{a}\\pi",
            [f"\\pi \\cdot {a}", f"\\frac{{{3 * a}\\pi}}{{3}}", f"{a}π"],
            [f"{a}", f"{a + 1}\\pi", f"{a}\\pi^2", f"\\frac{{\\pi}}{{{a}}}", f"{a}\\pi + 10^{{-9}}"],
        ),
        (f"{a} \\ln {b}", [f"\\ln({b}^{{{a}}})"], [f"\\ln({a}) + \\ln({b + 1})", f"\\ln({b})^{{{a}}}"]),
        (f"\\sqrt[3]{{{a * a + 1}}}", [f"({a * a + 1})^{{1/3}}"], [f"\\sqrt{{{a * a + 1}}}"]),
    )


@kind("math", "Euler's number")
def _(r: Random) -> Triple:
    a, b, c = r.randint(2, 9), other(r, -9, 9, 0), other(r, -9, 9, 0)
    equal = terms(r, [f"+{a}e^2", signed(b, "e"), signed(c)])
    unequal = r.choice(
        [
            f"{a + 1}e^2{signed(b, 'e')}{signed(c)}",
            f"{a}e^2{signed(-b, 'e')}{signed(c)}",
            f"{a}e^2{signed(b, 'e')}{signed(c + 1)}",
        ]
    )
    ten = Fraction(a) * Fraction(10) ** c
    return pick(
        r,
        (f"{a}e^2{signed(b, 'e')}{signed(c)}", [equal], [unequal]),
        (f"{a}e{c:+d}", [terms(r, [f"+{a}e", signed(c)])], [frac(ten), f"{a}e{c + 1:+d}", f"{a} \\times 10^{{{c}}}"]),
        (f"{a}e^{{{c}x}}", [f"e^{{{c}x}} \\cdot {a}"], [f"{a}e^{{{-c}x}}"]),
    )


@kind("math", "sums with letters that are also units")
def _(r: Random) -> Triple:
    x, y = r.sample(["m", "g", "L", "s", "h", "t", "in", "cm", "a", "k", "n"], 2)
    if set(x) & set(y):
        y = "x"
    a, b = other(r, -12, 12, 0, 1, -1), other(r, 2, 12)
    label = f"{a}{x}{signed(b, y)}"
    unequal = r.choice(
        [
            f"{a}{x}{signed(b)}",
            f"{a}{x}{signed(b, 'z')}",
            f"{a}{x}{signed(-b, y)}",
            f"{a}{x}{signed(b + 1, y)}",
            f"{a}{signed(b, y)}",
        ]
    )
    return label, boxed(r, terms(r, [signed(a, x), signed(b, y)])), boxed(r, unequal)


@kind("math", "polynomials, quotients")
def _(r: Random) -> Triple:
    a, b = other(r, -9, 9, 0), other(r, -9, 9, 0)
    expanded = f"x^2{signed(-(a + b), 'x') if a + b else ''}{signed(a * b)}"
    factors = f"(x{signed(-a)})(x{signed(-b)})"
    wrong = f"x^2{signed(-(a + b), 'x') if a + b else ''}{signed(a * b + 1)}"
    return pick(
        r,
        (expanded, [factors], [wrong]),
        (factors, [expanded], [wrong, f"(x{signed(-a)})(x{signed(-b - 10)})"]),
        (
            f"\\frac{{x{signed(a)}}}{{x{signed(b + 10)}}}",
            [f"\\frac{{{signed(a)}+x}}{{{b + 10}+x}}".replace("{+", "{")],
            [f"\\frac{{x{signed(a + 1)}}}{{x{signed(b + 10)}}}"],
        ),
        ("R^2 - r^2", ["(R-r)(R+r)"], ["0", "(r-R)(R+r)", "r^2-R^2"]),
        ("\\sin 2x", ["2\\sin x \\cos x"], ["2\\sin x", "\\sin x \\cos x", "\\cos 2x"]),
    )


UNITS = [
    ("cm", "centimeters"),
    ("km", "kilometers"),
    ("kg", "kilograms"),
    ("mm", "millimeters"),
    ("min", "minutes"),
    ("ft", "feet"),
]


@kind("math", "a number with its unit")
def _(r: Random) -> Triple:
    n, i = r.randint(2, 5000), r.randrange(len(UNITS))
    (short, long), wrong = UNITS[i], UNITS[i - 1][0]
    forms = ["{} {}", "{}\\text{{ {}}}", "{}\\,\\mathrm{{{}}}", "{} \\text{{{}}}", "{}\\ \\text{{{}}}"]
    label = r.choice(forms).format(n, short)
    equal = r.choice([*(f.format(n, short) for f in forms), f"{n}", f"{n} \\text{{ {long}}}", f"{n}.0 {short}"])
    unequal = r.choice(
        [
            *(f.format(n + 1, short) for f in forms),
            f"{n} \\text{{ {wrong}}}",
            f"{n} {wrong}",
            f"{n}{short}^2",
            f"{n + 1}",
            f"-{n} {short}",
        ]
    )
    return label, boxed(r, equal), boxed(r, unequal)


@kind("math", "words around a number")
def _(r: Random) -> Triple:
    n = r.randint(2, 5000)
    forms = [
        "{}元",
        "{} 个",
        "共{}人",
        "{}\\text{{本}}",
        "{}\\text{{ apples}}",
        "\\${}",
        "{}개",
        "{}\\text{{ dollars}}",
        "x={}",
        "{}.",
    ]
    unequal = r.choice([r.choice(forms).format(n + 1), f"{n}万元", f"-{n}", f"负{n}", f"{n}x", f"{n}分之1"])
    return str(n), boxed(r, r.choice(forms).format(n)), boxed(r, unequal)


@kind("math", "no box")
def _(r: Random) -> Triple:
    n = r.randint(2, 5000)
    forms = [
        "答案：{}",
        "The answer is ${}$.",
        "It is {}.",
        "答案是{}。",
        "The final answer is {}",
        "故答案为：${}$",
        "**Answer:** {}",
    ]
    return str(n), r.choice(forms).format(n), r.choice(forms).format(r.choice([n + 1, -n, 10 * n]))


@kind("math", "percent, degrees")
def _(r: Random) -> Triple:
    n = r.randint(2, 99)
    return pick(
        r,
        (
            f"{n}\\%",
            [f"{n}%", f"{n}", f"0.{n:02d}", f"\\frac{{{n}}}{{100}}"],
            [f"{n + 1}\\%", f"0.{n:03d}", f"-{n}\\%"],
        ),
        (
            f"{n}^\\circ",
            [f"{n}^{{\\circ}}", f"{n}", f"{n}°", f"{n}\\text{{ degrees}}"],
            [f"{n + 1}^\\circ", f"{180 - n if n != 90 else 1}^\\circ"],
        ),
    )


@kind("math", "equations")
def _(r: Random) -> Triple:
    m, b = other(r, -9, 9, 0, 1, -1), other(r, -9, 9, 0)
    equal = [
        f"y={signed(b)}{signed(m, 'x')}".replace("=+", "="),
        f"y - {m}x = {b}".replace("- -", "+ "),
        f"2y = {2 * m}x{signed(2 * b)}",
        f"{m}x{signed(b)}=y",
    ]
    unequal = [f"y = {m}x{signed(b + 1)}", f"y = {-m}x{signed(b)}", f"x = {m}y{signed(b)}", f"y = {m + 10}x{signed(b)}"]
    return pick(r, (f"y = {m}x{signed(b)}", equal, unequal))


@kind("math", "inequalities")
def _(r: Random) -> Triple:
    a = r.randint(-20, 20)
    b = a + r.randint(1, 9)
    less, le = r.choice([("<", "\\le"), ("\\lt", "\\leq")])
    return pick(
        r,
        (
            f"x {less} {a}",
            [f"{a} > x", f"2x < {2 * a}", f"(-\\infty, {a})"],
            [f"x {le} {a}", f"x > {a}", f"x < {a + 1}", f"y < {a}"],
        ),
        (
            f"{a} {less} x {le} {b}",
            [f"{b} \\ge x > {a}", f"({a}, {b}]", f"{a}<x≤{b}"],
            [f"{a} {le} x {le} {b}", f"{a} {less} x {less} {b}", f"{a} < x \\le {b + 1}", f"[{a}, {b})"],
        ),
        (
            f"x < {a} \\text{{ or }} x > {b}",
            [f"x > {b} \\text{{ or }} x < {a}"],
            [f"x < {a} \\text{{ and }} x > {b}", f"x > {b}", f"x < {b} \\text{{ or }} x > {a}"],
        ),
    )


@kind("math", "intervals, unions")
def _(r: Random) -> Triple:
    a = r.randint(-20, 20)
    b, (left, right) = a + r.randint(1, 9), r.choice(["()", "[]", "[)", "(]"])
    c = b + r.randint(1, 9)
    turned = {"(": "[", "[": "(", ")": "]", "]": ")"}
    lower, upper = "<" if left == "(" else "\\le", "<" if right == ")" else "\\le"
    label = f"{left}{a}, {b}{right}"
    equal = [
        f"\\left{left}{a},{b}\\right{right}",
        f"\\{{x \\mid {a} {lower} x {upper} {b}\\}}",
        f"{left}{a},\\frac{{{2 * b}}}{{2}}{right}",
        f"x \\in {label}",
    ]
    unequal = [
        f"{turned[left]}{a},{b}{right}",
        f"{left}{a},{b}{turned[right]}",
        f"{left}{a},{b + 1}{right}",
        f"{left}{a - 1},{b}{right}",
        f"\\{{{a},{b}\\}}",
    ]
    union = f"(-\\infty, {a}{right} \\cup {left}{b}, \\infty)"
    return pick(
        r,
        (label, equal, unequal),
        (
            union,
            [f"{left}{b},+\\infty) \\cup (-\\infty,{a}{right}"],
            [
                f"(-\\infty, {a}{turned[right]} \\cup {left}{b}, \\infty)",
                f"{left}{b}, \\infty)",
                f"(-\\infty, {a}{right} \\cup {left}{c}, \\infty)",
            ],
        ),
    )


@kind("math", "sets by predicate")
def _(r: Random) -> Triple:
    a = r.randint(-20, 20)
    b, bar = a + r.randint(1, 9), r.choice(["\\mid", "|", ":"])
    k = r.randint(2, 9)
    return pick(
        r,
        (
            f"\\{{x {bar} x \\geq {a}\\}}",
            [
                f"\\{{x|x\\ge {a}\\}}",
                f"\\{{y \\mid y \\ge {a}\\}}",
                f"[{a}, \\infty)",
                f"\\{{x \\in \\mathbb{{R}} \\mid {a} \\le x\\}}",
            ],
            [
                f"\\{{x {bar} x \\leq {a}\\}}",
                f"\\{{x {bar} x > {a}\\}}",
                f"\\{{x {bar} x = {a}\\}}",
                f"{a}",
                f"\\{{{a}\\}}",
                f"\\{{x \\in \\mathbb{{Z}} \\mid x \\ge {a}\\}}",
            ],
        ),
        (
            f"\\{{x {bar} x \\neq {a}\\}}",
            [f"\\{{x | x\\ne {a}\\}}", f"(-\\infty,{a}) \\cup ({a},\\infty)"],
            [f"\\{{x|x = {a}\\}}", f"\\{{x|x \\ne {a + 1}\\}}", f"{a}", f"\\{{x|x \\ge {a}\\}}"],
        ),
        (
            f"\\{{x {bar} {a} < x < {b}\\}}",
            [f"({a},{b})", f"\\{{x \\mid {b} > x > {a}\\}}", f"\\{{t : {a}<t<{b}\\}}"],
            [
                f"\\{{x {bar} {a} \\le x < {b}\\}}",
                f"\\{{x {bar} {a} < x < {b + 1}\\}}",
                f"[{a},{b})",
                f"\\{{{a},{b}\\}}",
            ],
        ),
        (
            f"\\{{x {bar} x = {k}n\\pi, n \\in \\mathbb{{Z}}\\}}",
            [f"\\{{x \\mid x={k}\\pi n,\\, n\\in \\mathbb{{Z}}\\}}"],
            [
                f"\\{{x {bar} x = n\\pi, n \\in \\mathbb{{Z}}\\}}",
                f"\\{{x {bar} x = {k + 1}n\\pi, n \\in \\mathbb{{Z}}\\}}",
                f"\\{{x {bar} x = {k}n\\pi, n \\in \\mathbb{{N}}\\}}",
            ],
        ),
    )


@kind("math", "sets, lists")
def _(r: Random) -> Triple:
    values = r.sample(range(-30, 60), r.randint(2, 4))
    shuffled = r.sample(values, len(values))
    changed = [*shuffled[:-1], 77]
    braces = r.random() < 0.5
    wrap = "\\{{{}\\}}" if braces else "{}"
    label = wrap.format(", ".join(map(str, values)))
    equal = [
        wrap.format(",".join(map(str, shuffled))),
        wrap.format(", ".join(f"\\frac{{{2 * v}}}{{2}}" for v in shuffled)),
    ]
    unequal = [
        wrap.format(", ".join(map(str, v)))
        for v in (shuffled[:-1], changed, [*shuffled, 78], [-v or 79 for v in shuffled[:1]] + shuffled[1:])
    ]
    if not braces:
        equal += [
            " \\text{ and } ".join(map(str, shuffled)),
            ", ".join(f"x={v}" for v in shuffled),
            " or ".join(map(str, shuffled)),
        ]
        unequal += [" \\text{ and } ".join(map(str, changed)), str(values[-1])]
    if any(label.replace(" ", "") == u.replace(" ", "") for u in unequal):
        return _sets_again(r)
    return pick(r, (label, equal, unequal))


_sets_again = KINDS["math"]["sets, lists"]


@kind("math", "tuples, lists of points")
def _(r: Random) -> Triple:
    a, b, c, d = r.sample(range(-30, 60), 4)
    return pick(
        r,
        (
            f"({a}, {b})",
            [f"\\left({a},{b}\\right)", f"({a},\\frac{{{2 * b}}}{{2}})", f"(x,y)=({a},{b})"],
            [f"({b},{a})", f"({a},{c})", f"({a},{b},{c})", f"{b}", f"({a})"],
        ),
        (f"({a}, {b}, {c})", [f"({a},{b},{c})"], [f"({a},{c},{b})", f"({a},{b})", f"({a},{b},{d})"]),
        (
            f"$({a},{b})$, $({c},{d})$",
            [f"({a},{b}),({c},{d})", f"({c}, {d}), ({a}, {b})", f"({a},{b}) \\text{{ and }} ({c},{d})"],
            [f"({c},{d})", f"({a},{b})", f"({b},{a}),({c},{d})", f"({a},{c}),({b},{d})"],
        ),
    )


@kind("math", "several blanks")
def _(r: Random) -> Triple:
    a, b, c = r.sample(range(-30, 60), 3)
    return pick(
        r,
        (
            f"(1) ${a}$ (2) ${b}$",
            [f"{a}, {b}", f"(1) {a}; (2) {b}", f"(1) \\boxed{{{a}}}, \\boxed{{{b}}}"],
            [f"{b}", f"{b}, {a}", f"(1) {a} (2) {c}", f"{a}", f"{a}, {b}, {c}"],
        ),
        (f"(1) ${a}$; (2) ${b}$; (3) ${c}$", [f"{a}, {b}, {c}"], [f"{c}", f"{a}, {c}, {b}", f"{a}, {b}"]),
        (
            f"$a={a}$, $b={b}$",
            [f"a={a}, b={b}", f"b={b}, a={a}", f"{a}, {b}"],
            [f"b={b}", f"a={b}, b={a}", f"{b}, {a}", f"a={a}, b={c}", f"{b}"],
        ),
        (f"{a}; {b}", [f"{a};{b}", f"{a}, {b}", f"{a} \\text{{ and }} {b}"], [f"{a}", f"{b}", f"{a}; {c}"]),
    )


@kind("math", "plus or minus")
def _(r: Random) -> Triple:
    a, b = r.randint(2, 9), r.choice([2, 3, 5, 7])
    return pick(
        r,
        (
            f"\\pm {a}",
            [f"{a}, -{a}", f"\\pm{a}", f"-{a} \\text{{ or }} {a}", f"x = \\pm {a}"],
            [f"{a}", f"\\pm {a + 1}", f"-{a}", f"{a}, {a}"],
        ),
        (
            f"{a} \\pm \\sqrt{{{b}}}",
            [f"{a}+\\sqrt{{{b}}}, {a}-\\sqrt{{{b}}}"],
            [f"{a}+\\sqrt{{{b}}}", f"{a} \\pm \\sqrt{{{b + 8}}}", f"-{a} \\pm \\sqrt{{{b}}}"],
        ),
    )


@kind("math", "matrices, complex numbers, bases")
def _(r: Random) -> Triple:
    a, b, c, d = r.sample(range(2, 40), 4)
    matrix = "\\begin{{pmatrix}} {} & {} \\\\ {} & {} \\end{{pmatrix}}".format
    base, digits = r.randint(6, 9), "".join(str(r.randint(1, 5)) for _ in range(r.randint(2, 5)))
    return pick(
        r,
        (
            matrix(a, b, c, d),
            [matrix(a, f"\\frac{{{2 * b}}}{{2}}", c, d)],
            [matrix(b, a, c, d), matrix(a, b, c, d + 1), matrix(a, c, b, d)],
        ),
        (
            f"{a}+{b}i",
            [f"{b}i+{a}", f"{a} + {b} i", f"{a}+i{b}"],
            [f"{a}-{b}i", f"{b}+{a}i", f"{a}+{b}", f"{a}+{b + 1}i"],
        ),
        (f"{digits}_{base}", [f"{digits}_{{{base}}}", digits], [f"{digits}_{base + 1}", f"{digits}1_{base}"]),
        (f"{int(digits, base)}", [f"{digits}_{base}"], [f"{digits}_{{{base + 1}}}"]),
    )


@kind("math", "words, angles")
def _(r: Random) -> Triple:
    word, wrong = r.sample(
        [
            "even",
            "silent",
            "listen",
            "Monday",
            "increasing",
            "Evelyn",
            "no solution",
            "rhombus",
            "odd",
            "true",
            "false",
        ],
        2,
    )
    letter, second = r.sample("ABCDE", 2)
    return pick(
        r,
        (
            f"\\text{{{word}}}",
            [word, f"\\text{{ {word} }}", f"\\textbf{{{word}}}", f"\\mathrm{{{word}}}"],
            [wrong, f"\\text{{{wrong}}}", f"\\text{{not {word}}}"],
        ),
        (
            letter,
            [f"\\text{{{letter}}}", f"({letter})", f"\\textbf{{({letter})}}"],
            [second, f"\\text{{({second})}}", f"{letter}, {second}"],
        ),
        ("\\angle ABC", ["\\angle  ABC"], ["\\angle BAC", "\\angle CAB", "\\angle ABD"]),
    )


@kind("math", "repeating decimals, ratios, times")
def _(r: Random) -> Triple:
    a, b = r.randint(1, 8), r.randint(2, 9)
    h, m = r.randint(1, 12), r.randint(10, 58)
    third = Fraction(r.randint(1, 90) * 3 + 1, 3)
    six = f"{third.numerator * 10**6 // 3 + (third % 1 > Fraction(1, 2)):07d}"
    return pick(
        r,
        (f"0.\\overline{{{a}}}", [frac(Fraction(a, 9))], [f"0.{a}", frac(Fraction(a, 10)), f"0.\\overline{{{a + 1}}}"]),
        (f"{a}:{b}", [f"{3 * a}:{3 * b}"], [f"{a + b}:{b}", f"{a}:{b + 1}"]),
        (f"{h}:{m}", [f"{h}:{m}"], [f"{h}:{m + 1}", f"{h % 12 + 1}:{m}"]),
        (frac(third), [f"{six[:-6]}.{six[-6:]}"], [f"{six[:-6]}.{six[-6:-3]}", f"{six[:-6]}.{int(six[-6:]) + 2:06d}"]),
    )


@kind("math", "thinking")
def _(r: Random) -> Triple:
    n = r.randint(2, 999)
    equal = [f"<think>maybe \\boxed{{{n + 1}}}</think>\\boxed{{{n}}}", f"so it is {n + 1}</think>The answer is ${n}$."]
    unequal = [
        f"<think>so \\boxed{{{n}}}",
        f"<think>so \\boxed{{{n}}}</think>It is \\boxed{{{n + 1}}}.",
        f"<think>so \\boxed{{{n}}}</think>I do not know.",
    ]
    return str(n), r.choice(equal), r.choice(unequal)


@kind("math", "escaped twice")
def _(r: Random) -> Triple:
    name = r.choice(
        [
            "fractions",
            "roots, pi, logarithms",
            "intervals, unions",
            "plus or minus",
            "sets, lists",
            "words, angles",
            "matrices, complex numbers, bases",
        ]
    )
    label, equal, unequal = KINDS["math"][name](r)
    inner = [text[text.index("\\boxed{") + 7 :].rpartition("}")[0] for text in (equal, unequal)]
    double = [text.replace("\\", "\\\\") for text in inner]
    if r.random() < 0.5:
        return label, f"\\boxed{{{double[0]}}}", f"\\boxed{{{double[1]}}}"
    return label.replace("\\", "\\\\"), equal, unequal


LIMITS = ("another form: units, degrees", "another form: equations", "another form: sets")
"""Kinds whose equal forms the grader does not all know: refused ones are counted, and no unequal one may be paid either."""


@kind("math", LIMITS[0])
def _(r: Random) -> Triple:
    n = r.randint(2, 90)
    return pick(
        r,
        (
            f"{n} \\text{{ m}}",
            [f"{100 * n} \\text{{ cm}}"],
            [f"{100 * n + 1} \\text{{ cm}}", f"{100 * n}", f"{n} \\text{{ cm}}"],
        ),
        (f"{60 * n} \\text{{ min}}", [f"{n} \\text{{ h}}"], [f"{n + 1} \\text{{ h}}", f"{n}"]),
        (
            f"\\sin {n}^\\circ",
            [f"\\cos {90 - n}^\\circ"],
            [f"\\cos {n if n != 45 else 44}^\\circ", f"\\sin {n + 1}^\\circ"],
        ),
        (f"{n}^\\circ", [f"\\frac{{{n}\\pi}}{{180}}"], [f"\\frac{{{n}\\pi}}{{360}}", f"{n}\\pi"]),
        (f"{n} \\text{{ dollars}}", [f"{100 * n} \\text{{ cents}}"], [f"{n} \\text{{ cents}}", f"{100 * n}"]),
    )


@kind("math", LIMITS[1])
def _(r: Random) -> Triple:
    a = r.randint(2, 20)
    return pick(
        r,
        (f"y = \\frac{{{a}}}{{x}}", [f"xy = {a}"], [f"xy = {a + 1}", f"x = {a}y"]),
        (f"x^2 = {a * a}", [f"x = \\pm {a}", f"x = {a} \\text{{ or }} x = -{a}"], [f"x = {a}", f"x = \\pm {a + 1}"]),
        (f"|x| < {a}", [f"-{a} < x < {a}", f"(-{a}, {a})"], [f"x < {a}", f"-{a} \\le x < {a}", f"|x| > {a}"]),
        (f"x^2 < {a * a}", [f"-{a} < x < {a}"], [f"x < {a}", f"-{a} < x \\le {a}"]),
        (f"f(x) = {a}x", [f"y = {a}x"], [f"y = {a + 1}x", f"f(x) = {a}"]),
    )


@kind("math", LIMITS[2])
def _(r: Random) -> Triple:
    a = r.randint(2, 20)
    return pick(
        r,
        (
            f"\\{{x \\mid x \\ne {a}\\}}",
            [f"\\mathbb{{R}} \\setminus \\{{{a}\\}}", f"x \\ne {a}"],
            [f"\\{{{a}\\}}", f"x = {a}"],
        ),
        (
            f"{a}k\\pi, k \\in \\mathbb{{Z}}",
            [f"{a}n\\pi, n \\in \\mathbb{{Z}}"],
            [f"{a + 1}n\\pi, n \\in \\mathbb{{Z}}", f"{a}n\\pi"],
        ),
        ("\\{x \\in \\mathbb{Z} \\mid 0 < x < 4\\}", ["\\{1, 2, 3\\}"], ["\\{1, 2, 3, 4\\}", "(0, 4)"]),
        (f"(1, {a + 3})", [f"(1, {a + 2}) \\cup ({a + 1}, {a + 3})"], [f"(1, {a + 1}) \\cup ({a + 2}, {a + 3})"]),
        (
            "\\mathbb{R}",
            ["(-\\infty, \\infty)", "\\{x \\mid x \\in \\mathbb{R}\\}"],
            ["(0, \\infty)", "\\mathbb{Q}", "\\infty"],
        ),
        ("\\emptyset", ["\\{\\}", "\\varnothing"], ["\\{0\\}", "0"]),
    )


def triples(grader: str, each: int = EACH) -> Iterator[tuple[str, Triple]]:
    for name, make in KINDS[grader].items():
        r = random.Random(f"{SEED} {grader} {name}")
        for _ in range(each):
            yield name, make(r)


def grade(grader: str, pairs: list[tuple[str, str]]) -> list[float]:
    """The rewards of (label, response), from one process of the real pool."""
    groups = [
        SampleGroup(Prompt(i, (), label), [Sample([], [], [], "stop", text=t)]) for i, (label, t) in enumerate(pairs)
    ]
    with RewardPool(RewardSection(kind=grader, timeout_s=60), workers=1) as pool:
        pool.score(groups)
        assert pool.failures == 0
    return [g.samples[0].reward for g in groups]


def verdicts(grader: str, each: int = EACH) -> list[tuple[str, Triple, float, float]]:
    """(kind, (label, equal, unequal), reward of the equal one, of the unequal one)."""
    made = list(triples(grader, each))
    rewards = grade(grader, [(label, text) for _, (label, *texts) in made for text in texts])
    return [(name, triple, *rewards[2 * i : 2 * i + 2]) for i, (name, triple) in enumerate(made)]


def check(grader: str) -> None:
    got = verdicts(grader)
    assert [(name, label, unequal) for name, (label, _, unequal), _, paid in got if paid] == []
    assert [(name, label, equal) for name, (label, equal, _), paid, _ in got if not paid and name not in LIMITS] == []


def test_numeric_pays_no_neighbour() -> None:
    check("numeric")


def test_math_pays_no_neighbour() -> None:
    check("math")


if __name__ == "__main__":
    each = int(sys.argv[1]) if len(sys.argv) > 1 else EACH
    print("| grader | kind | labels | equal refused | unequal paid |\n|---|---|---|---|---|")
    for grader in KINDS:
        got = verdicts(grader, each)
        for name in KINDS[grader]:
            refused = [triple for of, triple, paid, _ in got if of == name and not paid]
            paid = [triple for of, triple, _, paid in got if of == name and paid]
            print(f"| `{grader}` | {name} | {each} | {len(refused)} | {len(paid)} |")
            for word, number, wrong in (("refused", 1, refused), ("paid", 2, paid)):
                for triple in wrong[:8]:
                    print(f"  {word}: {triple[0]} ;; {triple[number]}", file=sys.stderr)
