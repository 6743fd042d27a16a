"""A scan over a time axis that is spread over several devices."""

import math
from typing import cast

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ._abstract_scan import AbstractScan
from ._arguments import check_instance
from ._auto_scan import AutoScan


class ShardedScan(AbstractScan):
    """Spreads time over the devices of a mesh: each has a segment of it.

    ```python
    mesh = jax.sharding.Mesh(jax.devices(), "time")
    root_finder = pdx.ParallelNewton(scan=pdx.ShardedScan(mesh))
    solver = pdx.ParallelSolver(diffrax.Tsit5(), num_steps=2**24, root_finder=root_finder)
    ```

    A scan goes in three steps: every device combines the steps of its own segment; the totals, one element of every
    device, are gathered and combined everywhere; every device puts what comes before its segment in front of it. All else
    that is done with the steps, from their Jacobians to the tests of convergence, is done by the device that has them; the
    derivative is one more scan of this kind.

    The result is that of one device to rounding. The other axes of the mesh are left alone: with a mesh of `"batch"` and
    `"time"`, `jax.vmap` of a solve, called with initial states that are sharded over `"batch"`, is spread over both.

    With processes on several hosts, call `jax.distributed.initialize()` first, make the mesh of `jax.devices()`, and run
    the same program with the same inputs in each. Whatever is solved for stays where it is: a process sees its own segment
    of a trajectory, and the whole of what is no longer as time, such as the final state.

    **Arguments:**

    - `mesh`: a `jax.sharding.Mesh`. Its axes are used in automatic mode, whatever their types.
    - `axis`: the axis of the mesh that time is spread over, or a tuple of axes.
    - `local`: how a device combines its own steps.

    **Raises:** `TypeError` for what is no mesh or no scan; `ValueError` for an axis that the mesh does not have.

    Cost, with `P` devices: a `local` scan of `N / P` steps, one of `P` steps on every device, and one composition of
    every step with what comes before. Communication: `P` elements a scan, of `D (D + 1)` numbers for a linear recurrence
    with dense transitions, `2 D` with diagonal ones; a few rows between neighbours and a few thousand numbers for an
    iteration's tests. Memory: that of the `local` scan for `N / P` steps, and the products of all transitions of a
    segment (to multiply by them is cheaper than to run through the segment once more).

    It is best where `P` is a power of two and `N` a multiple of 512 `P`. Where `N` is no multiple of `P`, scans alone are
    spread, and everything else is done by every device. Steps in sequence, such as a predictor's coarse
    ones, are made by every device for itself. Where a policy cuts the sequence, every segment of at most 16384 steps is
    spread over all devices.
    """

    mesh: Mesh = eqx.field(static=True)
    axis: str | tuple[str, ...] = eqx.field(static=True, default="time")
    local: AbstractScan = AutoScan()

    def __check_init__(self):
        check_instance("ShardedScan", "mesh", self.mesh, Mesh, "jax.sharding.Mesh(jax.devices(), 'time')")
        missing = [name for name in self._axes if name not in self.mesh.axis_names]
        if missing or len(self._axes) == 0:
            raise ValueError(
                f"`ShardedScan(mesh, axis={self.axis!r})`: the mesh has the axes {tuple(self.mesh.axis_names)}. Name "
                "that over which time is to be spread."
            )
        if not isinstance(self.local, AbstractScan) or isinstance(self.local, ShardedScan):
            raise TypeError(
                f"`ShardedScan(local={self.local!r})`: expected the scan that one device makes, for example "
                "`AssociativeScan()`."
            )

    @property
    def _axes(self) -> tuple[str, ...]:
        return (self.axis,) if isinstance(self.axis, str) else tuple(self.axis)

    @property
    def num_devices(self) -> int:
        """`P`, the number of segments."""
        return math.prod(self.mesh.shape[name] for name in self._axes)

    @property
    def _automatic_mesh(self) -> Mesh:
        # Arrays on axes of any other mode would have their shardings as part of their type, and every operation on them
        # would have to say what its result's is.
        return Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=(AxisType.Auto,) * len(self.mesh.axis_names))

    def _sharding(self, *axes) -> NamedSharding:
        return NamedSharding(self._automatic_mesh, PartitionSpec(*axes))

    def place(self, tree):
        def place(x):
            # Spread unevenly, arrays are where XLA's partitioner has bugs.
            return lax.with_sharding_constraint(x, self._sharding(*[self._axes][: x.shape[0] % self.num_devices == 0]))

        return jtu.tree_map(place, tree)

    def replicate(self, tree):
        return lax.with_sharding_constraint(tree, self._sharding())

    def write(self, y, rows, start):
        # Each device looks for each of its rows whether it is among those: an update at a traced place would be made on
        # the whole array, gathered.
        offset = jnp.arange(y.shape[0]) - start
        inside = (offset >= 0) & (offset < rows.shape[0])
        chosen = rows[jnp.clip(offset, 0, rows.shape[0] - 1)]
        return self.place(jnp.where(inside.reshape(-1, *[1] * (y.ndim - 1)), chosen, y))

    def prefix(self, compose, elements, *, reverse=False):
        leaves = jtu.tree_leaves(elements)
        if len(leaves) == 0:
            return elements
        num_steps = leaves[0].shape[0]
        missing = -num_steps % self.num_devices
        # What is added is at the far end, where nothing comes after it.
        low, high = (missing, 0) if reverse else (0, missing)

        def fill(x):
            return lax.pad(x, jnp.zeros((), x.dtype), [(low, high, 0)] + [(0, 0, 0)] * (x.ndim - 1))

        def segment(elements):
            return self._stretch(compose, elements, reverse)

        # The other axes of the mesh stay with the partitioner, which knows of the batch.
        over_time = PartitionSpec(self._axes)
        spread = jax.shard_map(
            segment, mesh=self._automatic_mesh, in_specs=over_time, out_specs=over_time, axis_names=set(self._axes)
        )
        if missing == 0:
            return spread(elements)
        products = spread(jtu.tree_map(fill, self.place(elements)))
        return self.place(jtu.tree_map(lambda x: x[low : low + num_steps], products))

    def _stretch(self, compose, elements, reverse: bool):
        """The products up to each step of one device's segment."""
        products = self.local.prefix(compose, elements, reverse=reverse)
        last = jtu.tree_map(lambda x: x[0] if reverse else x[-1], products)
        totals = self.local.prefix(compose, lax.all_gather(last, self._axes), reverse=reverse)
        device = cast(jax.Array, lax.axis_index(self._axes))
        first, before = (self.num_devices - 1, device + 1) if reverse else (0, device - 1)
        # The first device has nothing before it, and composes with anything.
        before = jnp.clip(before, 0, self.num_devices - 1)
        before = jtu.tree_map(lambda total, x: jnp.broadcast_to(total[before], x.shape), totals, products)
        return jtu.tree_map(lambda x, own: jnp.where(device == first, own, x), compose(before, products), products)
