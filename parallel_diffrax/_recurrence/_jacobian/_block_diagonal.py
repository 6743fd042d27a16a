"""Diagonal blocks of the Jacobian: quasi-Newton for components that act on each other in small groups."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ..._scan import BlockDiagonalTransitions
from ._base import AbstractJacobian, linearised, rows


class BlockDiagonal(AbstractJacobian):
    """Diagonal blocks of every step's Jacobian, exactly. Between `Diagonal` and `Dense`; for a second-order system the
    blocks of each position with its velocity keep what makes it oscillate, which a diagonal does not.

    **Arguments:**

    - `groups`: which components (of the raveled state) each block couples: a sequence of sequences of equal length that
        together name every component once. `BlockDiagonal.of_consecutive` and `BlockDiagonal.of_parts` write common ones.

    Cost of an iteration, for blocks of size `b`: `D` Jacobian-vector products of a step, one after the other, and
    `D b^2` multiplications a step for the scan; memory `N D b`.

    **Raises:** `ValueError` for groups of unequal length or that name a component twice or not at all; and, when it is
    used, if they do not fit the size of the state.

    ??? cite "Reference"

        Gonzalez, "Parallel Newton methods", arXiv 2603.16850 (2026).
    """

    groups: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    def __init__(self, groups: Sequence[Sequence[int]]):
        self.groups = tuple(tuple(int(k) for k in group) for group in groups)
        flat = sorted(k for group in self.groups for k in group)
        if len(flat) == 0 or len({len(g) for g in self.groups}) != 1 or flat != list(range(len(flat))):
            raise ValueError(
                f"`BlockDiagonal({groups!r})`: expected groups of equal length that together name each of the components "
                "0 .. D-1 once, for example `[(0, 2), (1, 3)]` for two positions followed by their velocities."
            )

    @classmethod
    def of_consecutive(cls, size: int, block: int) -> "BlockDiagonal":
        """Blocks of `block` neighbouring components of a state of `size` numbers: `(0, 1), (2, 3), ...`."""
        _check_divides("of_consecutive", size, block)
        return cls(np.arange(size).reshape(-1, block).tolist())

    @classmethod
    def of_parts(cls, size: int, parts: int = 2) -> "BlockDiagonal":
        """Blocks for a state of `size` numbers that is `parts` vectors one after the other, each block the `k`-th entries
        of all: with two parts, position `k` and velocity `k` of `(positions, velocities)`."""
        _check_divides("of_parts", size, parts)
        return cls(np.arange(size).reshape(parts, -1).T.tolist())

    def linearise(self, residual, y):
        groups = np.asarray(self.groups)
        if groups.size != y.shape[1]:
            raise ValueError(
                f"`BlockDiagonal(groups)` names {groups.size} components, but the state has {y.shape[1]} numbers."
            )
        r, product, aux = linearised(residual, y)
        columns = np.empty((groups.size, groups.shape[1]), int)
        columns[groups] = groups[:, None, :]
        entries = rows(product, y, jnp.asarray(columns))
        return r, BlockDiagonalTransitions(entries[:, groups], self.groups), aux


def _check_divides(name, size, count):
    if size < 1 or count < 1 or size % count != 0:
        raise ValueError(f"`BlockDiagonal.{name}({size}, {count})`: {count} must divide {size}.")
