"""What a report is made of: sections of blocks, which html.py and markdown.py write down.

All texts in blocks are plain: the writers escape them.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Text:
    """A paragraph; ``warns`` of something that is wrong with what is reported."""

    text: str
    warns: bool = False


@dataclass(frozen=True)
class Table:
    """``align`` has a letter a column: l or r."""

    head: list[str]
    rows: list[list[str]]
    align: str


@dataclass(frozen=True)
class Cards:
    """The figures a reader looks for first: (label, value, note)."""

    items: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Picture:
    """A plot, as SVG whose colours are CSS variables, and as PNG on white."""

    name: str
    alt: str
    svg: str
    png: bytes
    caption: str = ""


@dataclass(frozen=True)
class Quote:
    """Text of a model or a data set: shown as it is, never interpreted. Long ones are folded."""

    label: str
    text: str
    folded: bool = False


@dataclass(frozen=True)
class Code:
    """A command or a file."""

    text: str


@dataclass(frozen=True)
class Fold:
    """Blocks behind a line that opens them."""

    title: str
    blocks: "list[Block]"


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str


Block = Text | Table | Cards | Picture | Quote | Code | Fold | Heading


@dataclass(frozen=True)
class Section:
    """A chapter of the report."""

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Document:
    """The whole report."""

    title: str
    subtitle: str
    sections: list[Section] = field(default_factory=list)

    def pictures(self) -> list[Picture]:
        """All plots, in their order."""
        return [b for section in self.sections for b in section.blocks if isinstance(b, Picture)]


def _unseen() -> dict[int, str]:
    """Code point -> what is shown in its place."""
    # Explicit direction marks would turn round what stands beside them; Arabic and Hebrew text
    # needs none of these.
    turning = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x061C)
    found = {i: f"[U+{i:04X}]" for i in (*turning, *range(0x80, 0xA0))}
    found |= {i: chr(0x2400 + i) for i in range(32) if chr(i) not in "\t\n"}
    found |= dict.fromkeys((*range(0xD800, 0xE000), 0xFFFE, 0xFFFF), "\ufffd")
    return found | {0x7F: "\u2421", 0x2028: "\n", 0x2029: "\n"}


UNSEEN = _unseen()


def visible(text: str, limit: int | None = None) -> str:
    """Text with control characters made visible, cut at ``limit`` characters with a word of it."""
    shown = text[:limit].replace("\r\n", "\n").translate(UNSEEN)
    if limit is not None and len(text) > limit:
        shown += f" […] (cut here; {len(text):,} characters)"
    return shown
