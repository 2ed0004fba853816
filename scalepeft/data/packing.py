"""Rows of a step dealt to ranks, to micro-batches and to lines of tokens, by their lengths."""

from collections.abc import Iterable
from heapq import heapreplace

PAD_TO = 8  # lengths are padded to a multiple of this, for tensor cores


def padded(length: int) -> int:
    """The length of a line that holds so many tokens."""
    return -(-length // PAD_TO) * PAD_TO


def deal(lengths: list[int], rows: Iterable[int], bins: int) -> list[list[int]]:
    """Some positions in ``lengths``, dealt so that the sums of all bins are near each other.

    The longest first, each to the bin with the least so far: the largest sum is at most 4/3 of the
    best one's (Graham, 1969). In a bin they ascend.
    """
    dealt: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, i) for i in range(bins)]  # sorted, so it is one
    for row in sorted(rows, key=lambda i: -lengths[i]):
        total, i = heap[0]
        dealt[i].append(row)
        heapreplace(heap, (total + lengths[row], i))
    return [sorted(rows) for rows in dealt]


def lines(lengths: list[int], rows: list[int], width: float) -> tuple[list[list[int]], int]:
    """(rows of each line, length of all lines) of a packed micro-batch of these positions in
    ``lengths``, for the least work.

    A token of a line of L tokens costs ``width + L``: attention reads the whole line, also what the
    mask hides. ``width`` is infinite where it reads nothing of other rows.
    """
    best, least = (list[list[int]](), 0), float("inf")
    for count in range(1, len(rows) + 1):
        dealt = deal(lengths, rows, count)
        length = padded(max(sum(lengths[i] for i in line) for line in dealt))
        cost = count * length * (1 + length / width)
        if cost < least:
            best, least = (dealt, length), cost
        if length == padded(max(lengths[i] for i in rows)):
            break  # more lines are no shorter
    return best


def micro_batches(
    lengths: list[int], ranks: int, tokens: int, width: float
) -> list[list[list[list[int]]]]:
    """Rank -> its micro-batches -> lines -> positions in ``lengths``. One has at most ``tokens``
    tokens with its padding, or is one row; all ranks have as many, some of them empty.
    """
    parts = deal(lengths, range(len(lengths)), ranks)
    count = max(1, -(-sum(lengths) // (ranks * tokens)))
    while True:
        packed = [[lines(lengths, rows, width) for rows in deal(lengths, part, count)]
                  for part in parts]  # fmt: skip
        batches = [batch for micro in packed for batch in micro]
        if all(len(b) * length <= tokens or sum(map(len, b)) == 1 for b, length in batches):
            return [[batch for batch, _ in micro] for micro in packed]
        count += 1
