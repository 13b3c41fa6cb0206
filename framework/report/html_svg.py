"""The small parts of the plan's picture: elements, scales, the colour of each scheme."""

from __future__ import annotations

from math import ceil, floor, log10

from markupsafe import Markup, escape

# Okabe and Ito's colours, which survive colour blindness; the MX schemes and mixes are hatched besides.
COLOURS = {
    "float": ("#999999", False),
    "w8a8_dynamic": ("#0072B2", False),
    "w8a8_static": ("#56B4E9", False),
    "w8a8_mix": ("#56B4E9", True),
    "w4a4_dynamic": ("#D55E00", False),
    "w4a8_dynamic": ("#E69F00", False),
    "w4a16": ("#009E73", False),
    "w8a16": ("#CC79A7", False),
    "mxfp8": ("#0072B2", True),
    "mxfp4": ("#D55E00", True),
    "mxfp4_dualscale": ("#CC79A7", True),
    "w4a8_mxfp": ("#E69F00", True),
}
UNKNOWN = ("#666666", True)
MONO = 6.65  # advance of a character of the 11 px monospaced labels
SANS = 6.2  # a generous mean of the 12 px labels


def el(tag: str, *children: object, **attributes: object) -> Markup:
    """Return an element; all that is not markup is escaped. `_` in a name is `-`, a trailing one is dropped."""
    names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    given = Markup("").join(Markup(' {}="{}"').format(name, _number(value)) for name, value in names.items())
    inner = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), given, inner)


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> Markup:
    """Return a label."""
    return el("text", words, x=x, y=y, **({"class_": kind} if kind else {}), text_anchor=anchor)


def drawing(width: float, height: float, title: str, description: str, *parts: Markup) -> Markup:
    """Return a figure that shrinks with the page and can be read aloud."""
    return el(
        "svg", el("title", title), el("desc", description), *parts, role="img",
        viewBox=f"0 0 {_number(ceil(width))} {_number(ceil(height))}", width=ceil(width), height=ceil(height),
    )  # fmt: skip


def fill(scheme: str) -> str:
    """The class that fills a scheme's cells."""
    return f"s-{scheme}"


def hatches(schemes: list[str]) -> Markup:
    """Return the patterns of hatched schemes, to be placed once in a document."""
    parts = []
    for scheme in schemes:
        colour, hatched = COLOURS.get(scheme, UNKNOWN)
        if hatched:
            ground = el("rect", width=4, height=4, fill=colour)
            line = el("rect", width=1.4, height=4, class_="hatch")
            shape = {"width": 4, "height": 4, "patternUnits": "userSpaceOnUse", "patternTransform": "rotate(45)"}
            parts.append(el("pattern", ground, line, id=f"h-{scheme}", **shape))
    return el("svg", el("defs", *parts), width=0, height=0, class_="patterns", aria_hidden="true")


def fills(schemes: list[str]) -> Markup:
    """Return the style rules of `fill`."""
    rules = []
    for scheme in schemes:
        colour, hatched = COLOURS.get(scheme, UNKNOWN)
        rules.append(f".{fill(scheme)}{{fill:{f'url(#h-{scheme})' if hatched else colour}}}")
    return Markup("\n").join(escape(rule) for rule in rules)


def ticks(end: float, about: int = 5) -> list[float]:
    """Return round numbers from 0 to `end`, `about` so many."""
    rough = end / about
    power = 10.0 ** floor(log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [step * i for i in range(floor(end / step + 1e-9) + 1)]


def _number(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
