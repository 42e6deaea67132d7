"""The pieces of a report's page: one file, no scripts, nothing to load; every text that comes in is
escaped here.

Only functions that return `Html` make markup; whatever else is put into it is text.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence

_LARGE = 400_000  # bytes of a PNG that is embedded as it is; larger ones become WebP


class Html(str):
    """Markup that is safe to put on the page."""


def text(value: object) -> Html:
    """Anything as text."""
    return value if isinstance(value, Html) else Html(html.escape(str(value), quote=True))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """<name attribute="...">content</name>; `class_` is class. Content that is not
    Html is escaped.
    """
    more = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{more}>{''.join(text(part) for part in content)}</{name}>")


def join(parts: Iterable[object], between: str = "\n") -> Html:
    return Html(text(between).join(text(part) for part in parts))


def section(anchor: str, title: str, *content: object) -> Html:
    return tag("section", tag("h2", title), *content, id=anchor)


def table(headings: Sequence[object], rows: Iterable[Sequence[object]], texts: int = 1) -> Html:
    """The first `texts` columns are names, the others numbers; a row of one cell is a heading of
    those below it.

    Scrolls sideways by itself where the page is too narrow.
    """

    def line(cells: Sequence[object], name: str) -> Html:
        if len(cells) == 1 < len(headings):
            return tag("tr", tag("th", cells[0], colspan=len(headings)), class_="group")
        return tag(
            "tr",
            *(
                tag(name, cell, **({} if i < texts else {"class_": "n"}))
                for i, cell in enumerate(cells)
            ),
        )

    body = tag("tbody", *(line(row, "td") for row in rows))
    return tag("div", tag("table", tag("thead", line(headings, "th")), body), class_="wide")


def figure(content: Html, caption: object, **attributes: object) -> Html:
    return tag("figure", content, tag("figcaption", caption), **attributes)


def svg_figure(svg: str, title: str, described: str, note: str = "") -> Html:
    """A plot of report_plots, with its title above and what is to be said about it below."""
    return tag(
        "figure",
        tag("h3", title),
        tag("div", Html(svg), role="img", aria_label=described),
        tag("figcaption", note) if note else Html(""),
        class_="plot",
    )


def picture(path: str, alt: str) -> Html:
    """An image file in the page itself; as text where it is none."""
    with open(path, "rb") as file:
        content = file.read()
    if path.endswith(".svg"):
        kind = (
            "svg+xml"  # as an image: scripts in it do not run, and nothing that it names is loaded
        )
    elif content.startswith(b"\x89PNG\r\n\x1a\n"):
        kind, content = ("png", content) if len(content) < _LARGE else _smaller(content)
    else:
        return tag("p", f"{os.path.basename(path)} is no picture", class_="missing")
    data = base64.b64encode(content).decode()
    return Html(f'<img alt="{html.escape(alt, quote=True)}" src="data:image/{kind};base64,{data}">')


def _smaller(content: bytes) -> tuple[str, bytes]:
    from PIL import Image, UnidentifiedImageError

    smaller = io.BytesIO()
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.convert("RGB").save(smaller, "WEBP", quality=90)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return "png", content
    return "webp", smaller.getvalue()


def folded(title: str, content: str) -> Html:
    """Long text under a heading that opens it; printed in full."""
    return tag("details", tag("summary", title), tag("pre", content.rstrip("\n")))


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str, Html]]) -> Html:
    """The whole document; a section is (anchor, title, markup)."""
    links = join([tag("a", name, href=f"#{anchor}") for anchor, name, _ in sections], " ")
    body = join(
        [
            tag("header", tag("h1", title), tag("p", subtitle), tag("nav", links)),
            tag("main", *(section(anchor, name, content) for anchor, name, content in sections)),
        ]
    )
    return Html(f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{tag("title", title)}
<style>{CSS}</style>
</head>
<body>
{body}
</body>
</html>
""")


CSS = """
:root { color-scheme: light dark;
  --page: #ffffff; --text: #1d2327; --soft: #5b666e; --line: #d9dfe3; --card: #f5f7f8; --link: #1b62a5; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181b; --text: #e3e8eb; --soft: #9daab3; --line: #333c43; --card: #1c2226; --link: #7db8ec; }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 72rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
header p, figcaption, .soft { color: var(--soft); font-size: .875rem; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin-top: .6rem; font-size: .9rem; }
.wide { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td.n, th.n { text-align: right; padding-left: .7rem; padding-right: .2rem; }
td.n { white-space: nowrap; }
td small { color: var(--soft); }
tr.group th { color: var(--text); padding-top: .9rem; }
.plots, .grids, .pictures { display: grid; align-items: start; }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.4rem 2rem; }
.grids { grid-template-columns: repeat(auto-fill, minmax(min(46%, 15rem), 1fr)); gap: .9rem; }
.groups { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: .6rem 1.6rem; }
.group.large { grid-column: 1 / -1; }
.pictures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; }
figcaption { margin-top: .25rem; overflow-wrap: anywhere; }
figure h3 { margin-top: .2rem; }
.plot svg { display: block; width: 100%; max-width: 36rem; height: auto; overflow: visible; }
.plot svg text { font-family: inherit !important; }
img { display: block; max-width: 100%; height: auto; }
.grids img { width: 100%; }
.pictures img { background: #ffffff; border-radius: 4px; padding: 4px; }
pre { margin: .4rem 0 1rem; padding: .7rem .8rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 4px;
  font: .8rem/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .4rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
.missing { color: #c2453c; }
@media (max-width: 30rem) { table { font-size: .82rem; } th, td { padding-right: .4rem; } td.n, th.n { padding-left: .4rem; } }
@media print {
  :root { color-scheme: light;
    --page: #ffffff; --text: #000000; --soft: #444444; --line: #bbbbbb; --card: #ffffff; --link: #000000; }
  @page { margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  nav { display: none; }
  .plots { grid-template-columns: 1fr 1fr; }
  .grids { grid-template-columns: repeat(4, 1fr); }
  .wide { overflow: visible; }
  pre { font-size: 7.5pt; }
  details::details-content { content-visibility: visible; block-size: auto; }
  figure, tr, h2, h3 { break-inside: avoid; }
  h2, h3, summary, tr.group { break-after: avoid; }
}
"""
