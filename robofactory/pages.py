"""What the HTML pages of several rooms share: each is one file that opens from disk, no network, no file beside it."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
img{max-width:100%} h1{font-size:1.5rem} h2{font-size:1.1rem;margin-top:2rem} pre{background:#f5f5f5;padding:1rem;overflow:auto}
table{border-collapse:collapse} td,th{padding:.25rem .9rem .25rem 0;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#161616}pre{background:#222}td,th{border-color:#333}}
"""


def document(title: str, body: Iterable[str], style: str = "") -> str:
    """A page of these pieces of HTML; `style` is added to the common one."""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
        f"<meta name=viewport content='width=device-width,initial-scale=1'><style>{STYLE}{style}</style>"
        f"{''.join(body)}</html>\n"
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain texts in rows."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def picture(title: str, data: bytes, kind: str = "png") -> str:
    """An encoded picture, inside the page; its title is for those who cannot see it."""
    return f"<img alt='{escape(title, quote=True)}' src='data:image/{kind};base64,{base64.b64encode(data).decode()}'>"
