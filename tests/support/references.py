"""Every method in its plainest dense form, in fp64, written from the papers' definitions.

Nothing here comes from scalepeft. ``weight(name, p, w, config)`` gives (W', extra bias or None),
``apply`` the layer's output; p holds the adapter's parameters by name in fp64, w is W (out, in).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Parameters = dict[str, Tensor]


def eye(d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)


def reflections(u: Tensor) -> Tensor:
    """H(u1) H(u2) ... H(ur), one dense reflection after the other."""
    q = eye(len(u))
    for column in u.T:
        q = q @ (eye(len(u)) - 2 * torch.outer(column, column) / (column @ column))
    return q


def neumann2(u: Tensor) -> Tensor:
    """``I - U (D^-1 - D^-1 A D^-1) U^T``: the two-term series of the HOFT paper."""
    gram = u.T @ u
    d_inverse = torch.diag(2 / torch.diagonal(gram))
    return eye(len(u)) - u @ (d_inverse - d_inverse @ torch.triu(gram, 1) @ d_inverse) @ u.T


def rotation(stored: Tensor, config: Any) -> Tensor:
    """Q (d, d) of each form: P and R / 4 are the halves of what is stored."""
    if config.form == "pairs":
        return (neumann2 if getattr(config, "inverse", "") == "neumann2" else reflections)(stored)
    half = stored.shape[1] // 2
    p, r = stored[:, :half], 4 * stored[:, half:]
    if config.form == "cayley":
        a = p @ r.T - r @ p.T
        return torch.linalg.solve(eye(len(a)) - a, eye(len(a)) + a)
    q = eye(len(p))
    for i in range(half):
        q = q @ reflections(torch.stack([r[:, i] + p[:, i], r[:, i] - p[:, i]], dim=1))
    return q


def _hoft(p: Parameters, w: Tensor, config: Any) -> Tensor:
    m = 1 + p["scale"] if "scale" in p else torch.ones(len(w), dtype=torch.float64)
    return rotation(p["U"], config) @ torch.diag(m) @ w @ rotation(p["V"], config)


def _hra(p: Parameters, w: Tensor, config: Any) -> Tensor:
    return w @ rotation(p["V"], config)


def givens_pairs(d: int) -> list[tuple[int, int]]:
    """The pairs of the tournament: of each the first survives, an odd one is carried."""
    pairs, survivors = [], list(range(d))
    while len(survivors) > 1:
        pairs += list(zip(survivors[::2], survivors[1::2], strict=False))
        survivors = survivors[::2]
    return pairs


def givens(blocks: Tensor, d: int) -> Tensor:
    """R (d, d), pair by pair: each block mixes two rows of what stands so far."""
    rows = list(eye(d))
    for g, (i, j) in zip(blocks, givens_pairs(d), strict=True):
        rows[i], rows[j] = (
            g[0, 0] * rows[i] + g[0, 1] * rows[j],
            g[1, 0] * rows[i] + g[1, 1] * rows[j],
        )
    return torch.stack(rows)


def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """``x R`` for widths whose R is too large: the columns of x, last rotation first."""
    columns = list(x.T)
    pairs = givens_pairs(x.shape[1])
    for g, (i, j) in reversed(list(zip(blocks, pairs, strict=True))):
        columns[i], columns[j] = (
            columns[i] * g[0, 0] + columns[j] * g[1, 0],
            columns[i] * g[0, 1] + columns[j] * g[1, 1],
        )
    return torch.stack(columns, dim=1)


def givens_blocks(p: Tensor) -> Tensor:
    """(d - 1,) angles before tanh, or (d - 1, 4) differences from I -> (d - 1, 2, 2)."""
    if p.dim() == 2:
        return eye(2) + p.view(-1, 2, 2)
    t = math.pi * torch.tanh(p)
    upper = torch.stack([torch.cos(t), -torch.sin(t)], dim=1)
    lower = torch.stack([torch.sin(t), torch.cos(t)], dim=1)
    return torch.stack([upper, lower], dim=1)


def givens_penalty(p: Tensor) -> Tensor:
    """``sum <alpha, beta>^2`` over blocks with columns alpha, beta; without its weight."""
    total = torch.zeros((), dtype=p.dtype)
    for g in givens_blocks(p):
        total = total + (g[:, 0] @ g[:, 1]) ** 2
    return total


def _goft(p: Parameters, w: Tensor, config: Any) -> Tensor:
    d = w.shape[1]
    s = 1 + p["scale"] if "scale" in p else torch.ones(d, dtype=torch.float64)
    return w @ torch.diag(s) @ givens(givens_blocks(p["p"]), d).T


def _skew(entries: Tensor, b: int) -> Tensor:
    """The entries above the diagonal row by row, and their negatives below."""
    places = [(i, j) for i in range(b) for j in range(i + 1, b)]
    k = torch.zeros(b, b, dtype=torch.float64)
    k[[i for i, _ in places], [j for _, j in places]] = entries
    return k - k.T


def cayley(k: Tensor) -> Tensor:
    return (eye(len(k)) - k) @ torch.linalg.inv(eye(len(k)) + k)


def _oft(p: Parameters, w: Tensor, config: Any) -> Tensor:
    return w @ torch.block_diag(*(cayley(_skew(k, config.block_size)) for k in p["K"])).T


def _oftv2(p: Parameters, w: Tensor, config: Any) -> Tensor:
    """``(I + K) (I + K + K^2 + K^3)``: the inverse of ``I - K`` as a series of 5 terms in all."""
    blocks = []
    for entries in p["K"]:
        k, one = _skew(entries, config.block_size), eye(config.block_size)
        blocks.append((one + k) @ (one + k + k @ k + k @ k @ k))
    return w @ torch.block_diag(*blocks).T


def butterfly(d: int, b: int, i: int) -> Tensor:
    """P_i (d, d): in runs of b 2^i channels the even pieces of b / 2 come first, then the odd."""
    if i == 0:
        return eye(d)
    order = []
    for start in range(0, d, b << i):
        pieces = [list(range(c, c + b // 2)) for c in range(start, start + (b << i), b // 2)]
        order += [c for piece in pieces[::2] + pieces[1::2] for c in piece]
    matrix = torch.zeros(d, d, dtype=torch.float64)
    for row, column in enumerate(order):
        matrix[row, column] = 1
    return matrix


def _boft(p: Parameters, w: Tensor, config: Any) -> Tensor:
    d, b, m = w.shape[1], config.block_size, config.factors
    r = eye(d)
    for i, entries in enumerate(p["K"].chunk(m)):
        permutation = butterfly(d, b, i)
        blocks = torch.block_diag(*(cayley(_skew(k, b)) for k in entries))
        r = permutation @ blocks @ permutation.T @ r
    return torch.diag(1 + p["scale"]) @ w @ r.T


def _lora_scaling(config: Any) -> float:
    return config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)


def _lora(p: Parameters, w: Tensor, config: Any) -> Tensor:
    if config.start == "pissa":
        a, b = p["A0"] + p["A"], p["B0"] + p["B"]
        return w - _lora_scaling(config) * p["B0"] @ p["A0"] + _lora_scaling(config) * b @ a
    return w + _lora_scaling(config) * p["B"] @ p["A"]


def _dora(p: Parameters, w: Tensor, config: Any) -> Tensor:
    """The norm in the denominator takes no gradient (section 4.3 of the paper)."""
    changed = _lora(p, w, config)
    m = w.norm(dim=1).detach() * (1 + p["magnitude"])
    return (m / changed.detach().norm(dim=1))[:, None] * changed


def _hira(p: Parameters, w: Tensor, config: Any) -> Tensor:
    return w * (1 + p["B"] @ p["A"])


def _hut(p: Parameters, w: Tensor, config: Any) -> tuple[Tensor, Tensor | None]:
    """M_A tiled over r groups of columns, M_B over r groups of rows, entry by entry."""
    (out, inp), r = w.shape, config.rank
    p_a = torch.stack([1 + p["a"][:, j // (inp // r)] for j in range(inp)], dim=1)
    p_b = torch.stack([1 + p["b"][i // (out // r)] for i in range(out)])
    return p_a * w * p_b, p.get("shift")


def _hadamard(p: Parameters, w: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    if config.position == "before":
        return w @ torch.diag(1 + p["scale"]), w @ p["shift"]
    return torch.diag(1 + p["scale"]) @ w, p["shift"]


def _ia3(p: Parameters, w: Tensor, config: Any) -> Tensor:
    if config.target_modules[0] in config.feedforward_modules:
        return w @ torch.diag(1 + p["scale"])
    return torch.diag(1 + p["scale"]) @ w


def _by_index(values: Tensor, index: list[list[int]]) -> Tensor:
    return values[torch.tensor(index)]


def circulant(c: Tensor) -> Tensor:
    """``C_ij = c[(i - j) mod n]``."""
    n = len(c)
    return _by_index(c, [[(i - j) % n for j in range(n)] for i in range(n)])


def skew_circulant(h: Tensor) -> Tensor:
    """The circulant with the entries above the diagonal negated."""
    return circulant(h) * (torch.tril(torch.ones(len(h), len(h))) * 2 - 1).double()


def symmetric_toeplitz(column: Tensor) -> Tensor:
    """``T_ij = column[|i - j|]``."""
    n = len(column)
    return _by_index(column, [[abs(i - j) for j in range(n)] for i in range(n)])


def toeplitz(t: Tensor, out: int, inp: int) -> Tensor:
    """``T_ij = t[i - j + in - 1]``."""
    return _by_index(t, [[i - j + inp - 1 for j in range(inp)] for i in range(out)])


def structured(p: Parameters, out: int, inp: int, config: Any) -> Tensor:
    """SURM's ``scaling M``; which structure it is shows in the names of the parameters."""
    if "A" in p:
        m = torch.kron(p["A"], p["B"])
    elif "t" in p:
        m = toeplitz(p["t"], out, inp)
    elif "g" in p:
        pairs = zip(p["g"], p["h"], strict=True)
        m = sum(circulant(g) @ skew_circulant(h) for g, h in pairs)
    elif "c0" in p:
        kernel = p["a"] * p["c0"]
        m = torch.cat([torch.cat([circulant(c) for c in row], dim=1) for row in kernel])
    else:
        m = symmetric_toeplitz(p["a"]) @ symmetric_toeplitz(p["b"])
    return config.scaling * m


def _surm(p: Parameters, w: Tensor, config: Any) -> Tensor:
    assert config.placement == "lora"
    return w + structured(p, *w.shape, config)


WEIGHTS = {
    "boft": _boft, "dora": _dora, "goft": _goft, "hadamard": _hadamard, "hira": _hira,
    "hoft": _hoft, "hra": _hra, "hut": _hut, "ia3": _ia3, "lora": _lora, "oft": _oft,
    "oftv2": _oftv2, "qgoft": _goft, "shoft": _hoft, "surm": _surm,
}  # fmt: skip


def weight(name: str, p: Parameters, w: Tensor, config: Any) -> tuple[Tensor, Tensor | None]:
    """(W', what the method adds to the bias or None) of an affine method."""
    found = WEIGHTS[name](p, w, config)
    return found if isinstance(found, tuple) else (found, None)


def apply(
    name: str, p: Parameters, w: Tensor, bias: Tensor | None, config: Any, x: Tensor
) -> Tensor:
    """The layer's output (..., out), the bias of the base added last."""
    if getattr(config, "placement", "") == "adapter":
        y = x @ w.T
        y = y + F.gelu(y @ structured(p, len(w), len(w), config).T) + p["c"]
    else:
        changed, extra = weight(name, p, w, config)
        y = x @ changed.T
        y = y if extra is None else y + extra
    return y if bias is None else y + bias
