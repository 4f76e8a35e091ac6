"""The elementwise parts of M3GNet's gated edge networks between two matrix products, for a block of edges.

`Kernels` computes them with torch, for every device and precision; `magus_anharmonic.potential.native` with one compiled loop
each (``edge_kernels.c``), for single precision on a CPU. Symbols: a gated network of u units has a first layer, whose sums
``before`` (B, 2 u) hold both branches side by side, and a second, whose sums ``y`` (B, 2 u) are again (inner | gate); its output
is silu(inner) * sigmoid(gate) * weight, with weight = e0 @ beside, or the silu of that for the network of the atoms.
All arrays are contiguous; what ends in ``_`` in a signature's description is changed in place.
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu

_silu = torch.ops.aten.silu
_silu_backward = torch.ops.aten.silu_backward
_sigmoid_backward = torch.ops.aten.sigmoid_backward


class Kernels:
    """The torch form."""

    def first_forward(
        self,
        centre: torch.Tensor,
        neighbour: torch.Tensor,
        own: torch.Tensor,
        other: torch.Tensor,
        before: torch.Tensor,
        hidden: torch.Tensor,
    ) -> None:
        """before_ += own[centre] + other[neighbour]; hidden_ = silu(before)."""
        before += own.index_select(0, centre)
        before += other.index_select(0, neighbour)
        _silu.out(before, out=hidden)

    def first_backward(
        self,
        centre: torch.Tensor,
        neighbour: torch.Tensor,
        before: torch.Tensor,
        by_hidden: torch.Tensor,
        by_own: torch.Tensor,
        by_other: torch.Tensor,
    ) -> None:
        """by_hidden_ (gradient by silu(before)) becomes that by ``before``, and is added to by_own_[centre] and by_other_[neighbour]."""
        _silu_backward.grad_input(by_hidden, before, grad_input=by_hidden)
        add_rows(by_own, centre, by_hidden)
        add_rows(by_other, neighbour, by_hidden)

    def edge_forward(self, basis: torch.Tensor, beside: torch.Tensor, y: torch.Tensor, edge: torch.Tensor) -> None:
        """edge_ (B, u) += the network's output; basis (B, 4), beside (4, u)."""
        edge.addcmul_(basis @ beside, _gated(y))

    def atom_forward(self, basis: torch.Tensor, beside: torch.Tensor, y: torch.Tensor, centre: torch.Tensor, atom: torch.Tensor) -> None:
        """atom_[centre] += the network's output; atom (N, u) is float64."""
        add_rows(atom, centre, silu(basis @ beside, inplace=True).mul_(_gated(y)).to(atom.dtype))

    def edge_backward(
        self, basis: torch.Tensor, beside: torch.Tensor, y: torch.Tensor, gradient: torch.Tensor, by_y: torch.Tensor, by_basis: torch.Tensor
    ) -> None:
        """by_y_ (B, 2 u) from the gradient by the output (B, u); by_basis_ (B, 4) grows."""
        weight = basis @ beside
        by_weight = _gated_backward(y, weight, gradient, by_y)
        by_basis.addmm_(by_weight, beside.T)

    def atom_backward(
        self,
        basis: torch.Tensor,
        beside: torch.Tensor,
        y: torch.Tensor,
        by_atom: torch.Tensor,
        centre: torch.Tensor,
        by_y: torch.Tensor,
        by_basis: torch.Tensor,
    ) -> None:
        """As `edge_backward`, from the gradient by the atom features (N, u)."""
        raw = basis @ beside
        by_weight = _gated_backward(y, silu(raw), by_atom.index_select(0, centre), by_y)
        by_basis.addmm_(_silu_backward(by_weight, raw), beside.T)

    def three_forward(self, y: torch.Tensor, edge: torch.Tensor) -> None:
        """edge_ (B, u) += silu(inner) * sigmoid(gate)."""
        edge += _gated(y)

    def three_backward(self, y: torch.Tensor, gradient: torch.Tensor, by_y: torch.Tensor) -> None:
        """by_y_ (B, 2 u) from the gradient by the output (B, u)."""
        _gated_backward(y, None, gradient, by_y)


def _gated(y: torch.Tensor) -> torch.Tensor:
    inner, gate = y.chunk(2, 1)
    return silu(inner).mul_(gate.sigmoid())


def _gated_backward(y: torch.Tensor, weight: torch.Tensor | None, gradient: torch.Tensor, by_y: torch.Tensor) -> torch.Tensor:
    """Gradient by the weight (B, u); by_y is filled."""
    inner, gate = y.chunk(2, 1)
    by_inner, by_gate = by_y.chunk(2, 1)
    sigma = gate.sigmoid()
    by_weight = gradient * silu(inner)
    weighted = gradient if weight is None else gradient * weight
    by_inner.copy_(_silu_backward(weighted * sigma, inner))
    by_gate.copy_(_sigmoid_backward(by_weight if weight is None else by_weight * weight, sigma))
    return by_weight.mul_(sigma)


def add_rows(target: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """``target[index] += rows``; with an expanded index scatter_add is faster than index_add on a CPU."""
    target.scatter_add_(0, index[:, None].expand_as(rows), rows)
