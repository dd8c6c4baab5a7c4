"""Drawings inside a page, element by element; what they are given is escaped."""

from markupsafe import Markup

from robofactory.html.text import escaped


def element(name: str, *inside: str, **attributes: object) -> Markup:
    """`<name attributes>inside</name>`; text is escaped unless an `element` made it.

    Args:
        attributes: `class_` is `class`, `text_anchor` is `text-anchor`; numbers have two digits.
    """
    stated = Markup("").join(
        Markup(" {}='{}'").format(key.rstrip("_").replace("_", "-"), escaped(_number(value)))
        for key, value in attributes.items()
    )
    start = Markup("<{}{}").format(name, stated)
    return start + (Markup(">{}</{}>").format(Markup("").join(map(escaped, inside)), name) if inside else Markup("/>"))


def drawing(width: int, height: int, label: str, *inside: Markup, class_: str = "") -> Markup:
    """The whole, with its words for those who cannot see it."""
    named = {"class_": class_} if class_ else {}
    return element("svg", *inside, viewBox=f"0 0 {width} {height}", role="img", aria_label=label, **named)


def _number(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
