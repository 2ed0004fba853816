"""A report as one HTML file: no script, no network, everything escaped, light and dark."""

import base64
import re
from html import escape

from scalepeft.analysis.report.blocks import (
    Block,
    Cards,
    Code,
    Document,
    Fold,
    Heading,
    Picture,
    Quote,
    Table,
    Text,
    visible,
)
from scalepeft.analysis.report.draw import COLOURS


def _variables(which: int) -> str:
    return " ".join(f"--{name}: {colours[which]};" for name, colours in COLOURS.items())


LIGHT = f"--soft: #f5f6f8; --dim: #59626b; --warn: #fff1e5; {_variables(0)}"
DARK = f"--soft: #1d2125; --dim: #a3abb3; --warn: #3a2412; {_variables(1)}"
STYLE = (
    f"""
:root {{ color-scheme: light dark; {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
@media print {{ :root {{ {LIGHT} }} details > * {{ display: block; }} }}
"""
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "DejaVu Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; padding-top: 1rem;
  border-top: 1px solid var(--grid); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; overflow-wrap: anywhere; }
p { margin: .6rem 0; max-width: 46rem; overflow-wrap: anywhere; }
header p, figcaption { color: var(--dim); }
figcaption { font-size: .875rem; max-width: 46rem; }
nav { margin: 1rem 0 0; display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; font-size: .9375rem; }
a { color: var(--c0); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem;
  margin: 1rem 0 1.25rem; }
.card { background: var(--soft); border-radius: .5rem; padding: .8rem 1rem; min-width: 0; }
.card div { color: var(--dim); font-size: .875rem; overflow-wrap: anywhere; }
.card strong { display: block; font-size: 1.5rem; line-height: 1.3; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9375rem; }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--grid); text-align: left;
  vertical-align: top; max-width: 34rem; overflow-wrap: break-word; }
th { font-weight: 600; color: var(--dim); white-space: nowrap; }
.r { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1.25rem 0; }
svg, img { width: 100%; max-width: 56rem; height: auto; display: block; overflow: visible; }
svg text { font-family: inherit !important; }
.warn { background: var(--warn); border-left: 4px solid var(--c1); padding: .5rem .9rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--dim); overflow-wrap: anywhere; }
pre { margin: .35rem 0 .75rem; padding: .6rem .8rem; background: var(--soft);
  border-radius: .375rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .875rem/1.5 ui-monospace, Consolas,
  "Liberation Mono", Menlo, monospace; max-height: 32rem; overflow-y: auto; }
.quote > span { color: var(--dim); font-size: .875rem; }
"""
)
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
"""


def text(value: str) -> str:
    """Any text as HTML: it cannot become markup."""
    return escape(visible(value))


def page(document: Document) -> str:
    """The whole file."""
    names = [_anchor(section.title) for section in document.sections]
    parts = [
        HEAD.format(title=text(document.title), style=STYLE),
        f"<header>\n<h1>{text(document.title)}</h1>\n<p>{text(document.subtitle)}</p>\n<nav>",
        *(
            f'<a href="#{name}">{text(section.title)}</a>'
            for name, section in zip(names, document.sections, strict=True)
        ),
        "</nav>\n</header>\n<main>",
    ]
    for name, section in zip(names, document.sections, strict=True):
        parts.append(f'<section id="{name}">\n<h2>{text(section.title)}</h2>')
        parts += [block(b) for b in section.blocks]
        parts.append("</section>")
    return "\n".join([*parts, "</main>\n</body>\n</html>\n"])


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z]+", "-", title.lower()).strip("-")


def block(b: Block) -> str:
    """One block."""
    match b:
        case Text(value, warns):
            return f'<p class="warn">{text(value)}</p>' if warns else f"<p>{text(value)}</p>"
        case Heading(value):
            return f"<h3>{text(value)}</h3>"
        case Code(value):
            return f"<pre>{text(value)}</pre>"
        case Fold(title, blocks):
            inner = "\n".join(block(x) for x in blocks)
            return f"<details><summary>{text(title)}</summary>\n{inner}\n</details>"
        case Table():
            return _table(b)
        case Cards(items):
            cards = (
                f'<div class="card"><div>{text(label)}</div><strong>{text(value)}</strong>'
                f"<div>{text(note)}</div></div>"
                for label, value, note in items
            )
            return f'<div class="cards">{"".join(cards)}</div>'
        case Picture():
            return _picture(b)
        case Quote(label, value, folded):
            body = f'<pre dir="auto">{text(value)}</pre>'
            if folded:
                return f"<details><summary>{text(label)}</summary>{body}</details>"
            return f'<div class="quote"><span>{text(label)}</span>{body}</div>'


def _table(table: Table) -> str:
    def row(tag: str, cells: list[str]) -> str:
        marks = ['<{0} class="r">' if a == "r" else "<{0}>" for a in table.align]
        inner = (
            f"{mark.format(tag)}{text(cell)}</{tag}>"
            for mark, cell in zip(marks, cells, strict=True)
        )
        return f"<tr>{''.join(inner)}</tr>"

    head = f"<thead>{row('th', table.head)}</thead>" if any(table.head) else ""
    body = "\n".join(row("td", cells) for cells in table.rows)
    return f'<div class="wide"><table>{head}\n<tbody>{body}</tbody></table></div>'


INLINE = 300_000  # bytes: a picture that is larger as SVG goes in as PNG


def _picture(b: Picture) -> str:
    inner = b.svg
    if len(b.svg) > INLINE:
        data = base64.b64encode(b.png).decode()
        inner = f'<img alt="{text(b.alt)}" src="data:image/png;base64,{data}">'
    caption = f"<figcaption>{text(b.caption)}</figcaption>" if b.caption else ""
    return f"<figure>{inner}{caption}</figure>"
