"""Text as it gets into a page."""

from markupsafe import Markup, escape

from robofactory.errors import shown


def visible(value: object) -> object:
    """Control characters in text are visible; also those that turn the direction of what follows."""
    return shown(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value


def escaped(value: object) -> Markup:
    """For where no template is."""
    return escape(visible(value))
