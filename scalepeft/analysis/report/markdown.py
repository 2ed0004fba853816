"""A report as Markdown, with its plots as PNGs beside it."""

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

PICTURES = "report"
"""Folder of the PNGs, beside the file."""


def text(value: str) -> str:
    """Any text as one line of Markdown: neither markup nor HTML."""
    line = " ".join(visible(value).split())
    line = re.sub(r"([\\`*_{}\[\]|~$#])", r"\\\1", escape(line, quote=False))
    return re.sub(r"^([-+]|\d+[.)])(?= )", r"\\\1", line)


def page(document: Document) -> str:
    """The whole file."""
    parts = [f"# {text(document.title)}", text(document.subtitle)]
    for section in document.sections:
        parts += [f"## {text(section.title)}", *(block(b) for b in section.blocks)]
    return "\n\n".join(parts) + "\n"


def block(b: Block) -> str:
    """One block."""
    match b:
        case Text(value, warns):
            return f"**Note:** {text(value)}" if warns else text(value)
        case Heading(value):
            return f"### {text(value)}"
        case Code(value):
            return fenced(value)
        case Fold(title, blocks):
            inner = "\n\n".join(block(x) for x in blocks)
            return f"<details><summary>{escape(visible(title))}</summary>\n\n{inner}\n\n</details>"
        case Table():
            return _table(b)
        case Cards(items):
            return "\n".join(
                f"* {text(label)}: **{text(value)}** {text(note)}".rstrip()
                for label, value, note in items
            )
        case Picture(name, alt, _, _, caption):
            image = f"![{text(alt)}]({PICTURES}/{name}.png)"
            return f"{image}\n\n{text(caption)}" if caption else image
        case Quote(label, value, folded):
            if folded:
                return block(Fold(label, [Code(value)]))
            return f"{text(label)}:\n\n{fenced(value)}"


def fenced(value: str) -> str:
    """Text between fences that are longer than any within it."""
    shown = visible(value)
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shown}\n{fence}"


def _table(table: Table) -> str:
    rows = [[text(cell) or " " for cell in row] for row in (table.head, *table.rows)]
    rows.insert(1, ["---:" if a == "r" else "---" for a in table.align])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
