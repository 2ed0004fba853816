"""SURM: structured unrestricted-rank matrices (arXiv 2406.17740).

Letters: M (out, in) structured, T tokens; a kernel c (p, q, N) makes p outputs of q inputs by
circular convolutions of length N. FFTs run in fp32 (fp64 for fp64) with an explicit length.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from scalepeft.adapters.base import Adapter, AdapterConfig, Base, math_dtype
from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT, Positive

TOKENS = 1024  # of which a gradient of a Kronecker factor is formed at one time


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SURMConfig(AdapterConfig):
    """Settings of SURM.

    Attributes:
        structure: of M: ``circulant``, ``toeplitz``, ``kronecker``, ``ldr`` (low displacement
            rank), or ``auto``: circulant on square layers, kronecker on the others.
        placement: ``lora``: ``y = W x + scaling M x``; ``adapter``: ``y = y0 + gelu(scaling M y0) +
            c`` behind the layer (the paper's after o_proj and down_proj), which cannot be merged.
        ldr_rank: r, terms of the sum; for ``structure: ldr``.
        factors: [rows, columns] of A, for ``structure: kronecker``; null: as balanced as can be.
        init_std: of the factor that is not zero at the start.
        scaling: of M.
    """

    name: str = "surm"
    structure: Literal["auto", "circulant", "toeplitz", "kronecker", "ldr"] = "auto"
    placement: Literal["lora", "adapter"] = "lora"
    ldr_rank: Positive = 4
    factors: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    init_std: Annotated[float, Field(gt=0)] = 0.02
    scaling: Annotated[float, Field(gt=0)] = 1.0

    def __post_init__(self) -> None:
        """Raise UserError for settings of another structure."""
        if self.factors is not None and self.structure != "kronecker":
            raise UserError(f"factors={self.factors} need structure: kronecker; remove them")
        if self.ldr_rank != 4 and self.structure != "ldr":
            raise UserError(f"ldr_rank={self.ldr_rank} needs structure: ldr; remove it")


def smooth_length(n: int) -> int:
    """The smallest even length >= n whose prime factors are 2, 3, 5 and 7."""
    length = n + n % 2
    while pow(2 * 3 * 5 * 7, length.bit_length(), length):  # 0: no other prime divides it
        length += 2
    return length


def balanced(n: int) -> tuple[int, int]:
    """The pair (large, small) with large * small = n that lies nearest to a square."""
    small = next(i for i in range(math.isqrt(n), 0, -1) if n % i == 0)
    return n // small, small


def _convolve(x: Tensor, kernel: Tensor, keep: int) -> Tensor:
    """(T, q, m) with (p, q, N) -> (T, p, keep): ``y_p = sum_q c_pq (*) x_q``, cut to ``keep``."""
    n = kernel.shape[-1]
    return torch.fft.irfft(_mix(torch.fft.rfft(x, n), torch.fft.rfft(kernel, n)), n)[..., :keep]


def _mix(x: Tensor, kernel: Tensor) -> Tensor:
    """Spectra (T, q, f) with (p, q, f) -> (T, p, f)."""
    if kernel.shape[:2] == (1, 1):
        return x * kernel[0]
    return torch.einsum("tqf,pqf->tpf", x, kernel)


class _Spectral(torch.autograd.Function):
    """A chain of convolutions, in the kernels' dtype, that saves x and the kernels alone. ``cuts[i]
    = (q, keep)``: kernel i reads q vectors and keeps so many numbers of each of its outputs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cuts: list[tuple[int, int]], *kernels: Tensor) -> Tensor:
        ctx.save_for_backward(x, *kernels)
        ctx.cuts = cuts
        z = x.to(kernels[0].dtype)
        for (q, keep), kernel in zip(cuts, kernels, strict=True):
            z = _convolve(z.flatten(1).unflatten(1, (q, -1)), kernel, keep)
        return z.flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *kernels = ctx.saved_tensors
        inputs = [x.to(kernels[0].dtype).unflatten(1, (ctx.cuts[0][0], -1))]
        for i, kernel in enumerate(kernels[:-1]):
            z = _convolve(inputs[i], kernel, ctx.cuts[i][1])
            inputs.append(z.flatten(1).unflatten(1, (ctx.cuts[i + 1][0], -1)))
        (dz,) = grads
        d_kernels: list[Tensor | None] = [None] * len(kernels)
        for i in range(len(kernels))[::-1]:
            kernel, z = kernels[i], inputs[i]
            p, _, n = kernel.shape
            dy = torch.fft.rfft(dz.reshape(len(x), p, ctx.cuts[i][1]), n)
            spectrum = torch.fft.rfft(z, n).conj()
            if kernel.shape[:2] == (1, 1):
                dk = (dy * spectrum).sum(0, keepdim=True)
            else:
                dk = torch.einsum("tpf,tqf->pqf", dy, spectrum)
            d_kernels[i] = torch.fft.irfft(dk, n)
            if i or ctx.needs_input_grad[0]:
                back = _mix(dy, torch.fft.rfft(kernel, n).conj().transpose(0, 1))
                dz = torch.fft.irfft(back, n)[..., : z.shape[-1]].flatten(1)
        return dz.to(x.dtype) if ctx.needs_input_grad[0] else None, None, *d_kernels


class _Kronecker(torch.autograd.Function):
    """``(A kron B) x`` over rows as two small products, saving x, A and B alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, b)
        z = x.view(len(x), a.shape[1], b.shape[1]) @ b.to(x.dtype).mT
        return (a.to(x.dtype) @ z).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, a, b = ctx.saved_tensors
        x = x.view(len(x), a.shape[1], b.shape[1])
        dy = grads[0].reshape(len(x), len(a), len(b))
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        da = torch.zeros_like(a)
        # A batch of small products and a sum: a transposed copy would cost more than both.
        for dy_part, x_part in zip(dy.split(TOKENS), x.split(TOKENS), strict=True):
            da += (dy_part @ (x_part @ low_b.mT).mT).sum(0, dtype=a.dtype)
        dz = low_a.mT @ dy
        db = (dz.reshape(-1, len(b)).mT @ x.reshape(-1, b.shape[1])).to(b.dtype)
        return (dz @ low_b).flatten(1) if ctx.needs_input_grad[0] else None, da, db


class SURM(Adapter):
    """``W' = W + scaling M``, M structured and of any rank; exactly one of its factors starts at 0.

    ========= ================================================== ===================================
    circulant ``M x = c (*) x``, ``c = a * c0`` elementwise      ``2 out in / b``; b = gcd(out, in):
                                                                 blocks of b x b (square: 2 in)
    toeplitz  ``M = T_a T_b``, both symmetric (first columns     ``2 in``; rectangular: one Toeplitz
              a and b)                                           matrix instead, ``out + in - 1``
    kronecker ``M = A kron B``                                   ``|A| + |B|``
    ldr       ``M = sum_i Z_1(g_i) Z_-1(h_i)``, circulant        ``2 r in``, square layers only
              times skew-circulant
    ========= ================================================== ===================================

    The forms on rectangular layers are a choice: the paper has square ones. ``placement: adapter``
    adds c (out,) and is not affine. Raises UserError: dimensions that the structure cannot split.
    """

    Config = SURMConfig
    weight_decay = frozenset({"a", "c0", "b", "t", "A", "B", "g", "h"})
    paper = "arXiv 2406.17740"

    def declare(self) -> None:
        """The factors of M; c (out,) in an adapter's place."""
        config, self.columns = self.config, self.in_features
        self.c: nn.Parameter | None = None
        if config.placement == "adapter":
            self.unmergeable_reason = "y + gelu(M y) + c is not affine in x"
            self.columns = self.out_features
            self.c = self.new_parameter(self.columns)
        self.structure = config.structure
        if config.structure == "auto":
            self.structure = "circulant" if self.columns == self.out_features else "kronecker"
        for name, shape in self._shapes(self.out_features, self.columns).items():
            self.register_parameter(name, self.new_parameter(*shape))

    def _shapes(self, out: int, inp: int) -> dict[str, tuple[int, ...]]:
        """The factors of M; the first one starts at zero."""
        where = f"adapter.structure={self.structure}: a layer of {out} x {inp}"
        remedy = "; take structure: kronecker (or auto), or leave the layer out of target_modules"
        if self.structure == "circulant":
            b = math.gcd(out, inp)
            if b == 1:
                raise UserError(f"{where} has no common divisor for circulant blocks{remedy}")
            return {"a": (out // b, inp // b, b), "c0": (out // b, inp // b, b)}
        if self.structure == "toeplitz":
            return {"a": (inp,), "b": (inp,)} if out == inp else {"t": (out + inp - 1,)}
        if self.structure == "ldr":
            if out != inp:
                raise UserError(f"{where} is not square, as low displacement rank needs{remedy}")
            return {"g": (self.config.ldr_rank, inp), "h": (self.config.ldr_rank, inp)}
        rows, columns = self.config.factors or (balanced(out)[0], balanced(inp)[1])
        if out % rows or inp % columns:
            raise UserError(
                f"adapter.factors=[{rows}, {columns}]: must divide the layer's {out} x {inp};"
                f" take [{balanced(out)[0]}, {balanced(inp)[1]}], or leave them out"
            )
        return {"A": (rows, columns), "B": (out // rows, inp // columns)}

    def reset_parameters(self) -> None:
        """Zero for the first factor and c, a Gaussian of ``init_std`` for the second."""
        super().reset_parameters()
        for parameter in [p for name, p in self.named_parameters() if name != "c"][1:]:
            nn.init.normal_(parameter, std=self.config.init_std)

    def _chain(self, dtype: torch.dtype) -> tuple[list[tuple[int, int]], list[Tensor]]:
        """(cuts, kernels) of the convolutions that make up scaling M."""
        out, columns, scaling = self.out_features, self.columns, self.config.scaling
        factors = {name: p.to(dtype) for name, p in self.named_parameters()}
        if self.structure == "circulant":
            kernel = factors["a"] * factors["c0"] * scaling
            return [(kernel.shape[1], kernel.shape[2])], [kernel]
        if self.structure == "ldr":
            g, h = factors["g"][None] * scaling, factors["h"][:, None]
            return [(1, columns), (len(h), columns)], [torch.cat([h, -h], dim=-1), g]
        length = smooth_length(out + columns - 1)
        if out == columns:
            first, second = (self._symmetric(factors[name], length) for name in "ba")
            return [(1, out), (1, out)], [first, second * scaling]
        # T_ij = t[i - j + in - 1]; the entries above the diagonal stand at the end of the circle.
        t = factors["t"] * scaling
        gap = t.new_zeros(length - len(t))
        return [(1, out)], [torch.cat([t[columns - 1 :], gap, t[: columns - 1]])[None, None]]

    @staticmethod
    def _symmetric(column: Tensor, length: int) -> Tensor:
        gap = column.new_zeros(length - 2 * len(column) + 1)
        return torch.cat([column, gap, column[1:].flip(0)])[None, None]

    def product(self, x: Tensor) -> Tensor:
        """``scaling M x`` over the last dimension, in the dtype of x."""
        rows, dtype = x.reshape(-1, x.shape[-1]), math_dtype(x.dtype)
        if self.structure == "kronecker":
            a, b = getattr(self, "A").to(dtype), getattr(self, "B").to(dtype)  # noqa: B009
            y: Tensor = _Kronecker.apply(rows, a * self.config.scaling, b)
        else:
            cuts, kernels = self._chain(dtype)
            # The cast stands outside: inside, torch 2.11 compiles one that changes nothing to zero
            # gradients.
            padded = rows if len(rows) else F.pad(rows, (0, 0, 0, 1))  # no FFT takes none
            y = _Spectral.apply(padded, cuts, *kernels)[: len(rows)].to(x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def delta(self, x: Tensor) -> Tensor | None:
        """``scaling M x`` in LoRA's place."""
        return self.product(x) if self.c is None else None

    def transform_output(self, y: Tensor) -> Tensor:
        """``y + gelu(scaling M y) + c`` in an adapter's place."""
        return y if self.c is None else y + F.gelu(self.product(y)) + self.c.to(y.dtype)

    def flops(self) -> int:
        """Real FFTs at ``2.5 N log2 N``, or the two Kronecker products."""
        if self.structure == "kronecker":
            (o1, i1), (o2, i2) = (getattr(self, k).shape for k in "AB")
            return int(2 * i1 * o2 * (i2 + o1))
        sizes = (kernel.shape for kernel in self._chain(torch.float32)[1])
        return round(sum(2.5 * n * math.log2(n) * (p + q) + 4 * n * p * q for p, q, n in sizes))

    def to_peft(self, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """PEFT's C3A for circulant blocks: its kernel is ours reversed, times in."""
        if self.structure != "circulant" or self.c is not None:
            return None
        kernel = (getattr(self, "a") * getattr(self, "c0")).detach()  # noqa: B009
        reverse = kernel.flip(-1).roll(1, -1) * (self.in_features * self.config.scaling)
        return {"peft_type": "C3A", "block_size": kernel.shape[-1]}, {"c3a_kernel": reverse}
