"""Rows of a step dealt to ranks, to micro-batches and to lines of tokens, by their lengths."""

from heapq import heapify, heapreplace

PAD_TO = 8  # lengths are padded to a multiple of this, for tensor cores


def padded(length: int) -> int:
    """The length of a line that holds so many tokens."""
    return -(-length // PAD_TO) * PAD_TO


def deal(lengths: list[int], bins: int) -> list[list[int]]:
    """Positions in ``lengths``, dealt so that the sums of all bins are near each other.

    The longest first, each to the bin with the least so far: the largest sum is at most 4/3 of the
    best one's (Graham, 1969). In a bin they keep their order.
    """
    dealt: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, i) for i in range(bins)]
    heapify(heap)
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, i = heap[0]
        dealt[i].append(row)
        heapreplace(heap, (total + lengths[row], i))
    return [sorted(rows) for rows in dealt]


def lines(lengths: list[int], width: float) -> tuple[list[list[int]], int]:
    """(rows of each line, length of all lines) of a packed micro-batch, for the least work.

    A token of a line of L tokens costs ``width + L``: attention reads the whole line, also what the
    mask hides. ``width`` is infinite where it reads nothing of other rows.
    """
    best, least = ([list(range(len(lengths)))], padded(sum(lengths))), float("inf")
    for count in range(1, len(lengths) + 1):
        dealt = deal(lengths, count)
        length = padded(max(sum(lengths[i] for i in line) for line in dealt))
        cost = count * length * (1 + length / width)
        if cost < least:
            best, least = (dealt, length), cost
        if length == padded(max(lengths)):
            break  # more lines are no shorter
    return best


def micro_batches(
    lengths: list[int], ranks: int, tokens: int, width: float
) -> list[list[list[list[int]]]]:
    """Rank -> its micro-batches, as many on each rank -> lines -> positions in ``lengths``.

    A micro-batch has at most ``tokens`` tokens with its padding, or is one row; on a rank that has
    fewer rows than others have micro-batches some are empty.
    """
    parts = deal(lengths, ranks)
    count = max(1, -(-sum(lengths) // (ranks * tokens)))
    while True:
        packed = [[_packed(lengths, rows, width) for rows in _split(lengths, part, count)]
                  for part in parts]  # fmt: skip
        if all(size <= tokens or rows == 1 for micro in packed for _, size, rows in micro):
            return [[batch for batch, *_ in micro] for micro in packed]
        count += 1


def _split(lengths: list[int], rows: list[int], count: int) -> list[list[int]]:
    dealt = deal([lengths[i] for i in rows], count)
    return [[rows[i] for i in part] for part in dealt]


def _packed(lengths: list[int], rows: list[int], width: float) -> tuple[list[list[int]], int, int]:
    """(lines, tokens with padding, rows) of a micro-batch."""
    if not rows:
        return [], 0, 0
    dealt, length = lines([lengths[i] for i in rows], width)
    return [[rows[i] for i in line] for line in dealt], len(dealt) * length, len(rows)
