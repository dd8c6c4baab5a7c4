"""Templates, which escape everything that they are given; each page is one file that opens from disk, without a network.

A template lies beside the code that fills it: `evaluation/report.html` is `robofactory/evaluation/report.html`. A page
extends `html/page.html`, and `html/parts.html` has what several pages show.
"""

import base64
import contextlib
import hashlib
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from robofactory.errors import UserError, shown
from robofactory.html.media import data_url
from robofactory.html.text import visible

PACKAGE = Path(__file__).parents[1]
HERE = Path(__file__).parent


def render(template: str, **values: object) -> Markup:
    """A template's HTML: a whole page, or a part that may be a value of another template."""
    return Markup(_environment().get_template(template).render(values))


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PACKAGE, encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (HERE / "page.js").read_text(encoding="utf-8")
    # Whatever gets into a page: nothing is fetched, and no other script than this one runs.
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{hashed}'; base-uri 'none'; form-action 'none'"
    )
    style = (HERE / "page.css").read_text(encoding="utf-8")
    environment.globals.update(style=Markup(style), script=Markup(script), policy=policy, data_url=data_url)
    return environment


@contextlib.contextmanager
def spared(what: str, say: Callable[[str], object]) -> Iterator[None]:
    """Draw in here what is drawn of data that is safe already: if that fails, this is said, and all else goes on.

    This is the one place that catches everything: a defect in a picture must not cost a training. It is said as what
    it is.
    """
    try:
        yield
    except (UserError, OSError) as error:  # such as a full disk
        say(f"warning: {what} could not be drawn: {shown(error)}")
    except Exception as error:
        lines = "".join(traceback.format_exception(error))
        say(f"warning: {what} could not be drawn; this is a defect of robofactory, please report it:\n{lines}")
