"""A scan over a time axis spread over several devices."""

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
    """Spreads time over the devices of a mesh: each device holds one segment.

    Use it for long sequences if there are several devices.

    ```python
    mesh = jax.sharding.Mesh(jax.devices(), "time")
    root_finder = pdx.ParallelNewton(scan=pdx.scans.ShardedScan(mesh))
    solver = pdx.ParallelSolver(diffrax.Tsit5(), num_steps=2**24, root_finder=root_finder)
    ```

    A scan has three parts. Every device combines the steps of its own segment. The totals, one element per device, are
    gathered, and every device combines all of them. Every device composes the total of the segments before its own with
    the products of its segment. Each device also does all other work on its own steps, from their Jacobians to the
    convergence tests. The derivative is one more scan of this kind.

    The result equals the result on one device to rounding. The scan does not use the other axes of the mesh: with a mesh of
    `"batch"` and `"time"`, `jax.vmap` of a solve, called with initial states that are sharded over `"batch"`, is spread
    over both.

    With processes on several hosts, call `jax.distributed.initialize()` first, make the mesh of `jax.devices()`, and run
    the same program with the same inputs in each process. Results stay on their devices: a process sees its own segment of
    a trajectory, and the whole of any result without a time axis, such as the final state.

    Use a power-of-two device count `P` and a `num_steps` divisible by `512 P`. If `N` is not divisible by `P`, only scans
    are spread, and every device does everything else. Every device computes sequential steps for itself, for example the
    coarse steps of a predictor. If a policy cuts the sequence into segments, of at most 16384 steps, each of them is spread
    over all devices.

    **Arguments:** `mesh`, a `jax.sharding.Mesh`, whose axes the scan uses in automatic mode, independent of their types;
    `axis`, the axis of the mesh over which time is spread, or a tuple of axes; `local`, the scan of each device over its own
    steps. Only its `prefix` is used, so `AutoScan` uses no kernels here.

    **Cost:** with `P` devices: a `local` scan of `N / P` steps and one of `P` steps on every device, and one composition per
    step with the total of the segments before. Communication: `P` elements per scan, of `D (D + 1)` numbers in a linear
    recurrence with dense transitions or `2 D` with diagonal ones; a few steps between neighbours and a few thousand numbers
    for the tests of an iteration. Memory: the `local` scan of `N / P` steps, and the products of all transitions of a
    segment (multiplying by them is cheaper than going through the segment again).

    **Raises:** `TypeError` if `mesh` is not a mesh or `local` not a scan; `ValueError` for an axis that the mesh does not
    have.
    """

    mesh: Mesh = eqx.field(static=True)
    axis: str | tuple[str, ...] = eqx.field(static=True, default="time")
    local: AbstractScan = AutoScan()

    def __check_init__(self):
        check_instance("ShardedScan", "mesh", self.mesh, Mesh, "jax.sharding.Mesh(jax.devices(), 'time')")
        missing = [name for name in self._axes if name not in self.mesh.axis_names]
        if missing or len(self._axes) == 0:
            axes = tuple(self.mesh.axis_names)
            message = f"the mesh has the axes {axes}. Name the axis over which to spread time."
            raise ValueError(f"`ShardedScan(mesh, axis={self.axis!r})`: {message}")
        if not isinstance(self.local, AbstractScan) or isinstance(self.local, ShardedScan):
            message = "expected the scan that one device makes, for example `AssociativeScan()`."
            raise TypeError(f"`ShardedScan(local={self.local!r})`: {message}")

    @property
    def _axes(self) -> tuple[str, ...]:
        return (self.axis,) if isinstance(self.axis, str) else tuple(self.axis)

    @property
    def num_devices(self) -> int:
        """`P`, the number of segments."""
        return math.prod(self.mesh.shape[name] for name in self._axes)

    @property
    def _automatic_mesh(self) -> Mesh:
        # In any other mode, shardings would be part of the types of arrays, and every operation would have to state the
        # sharding of its result.
        return Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=(AxisType.Auto,) * len(self.mesh.axis_names))

    def _sharding(self, *axes) -> NamedSharding:
        return NamedSharding(self._automatic_mesh, PartitionSpec(*axes))

    def place(self, tree):
        def place(x):
            # Not spread unevenly: XLA's partitioner has bugs there.
            return lax.with_sharding_constraint(x, self._sharding(*[self._axes][: x.shape[0] % self.num_devices == 0]))

        return jtu.tree_map(place, tree)

    def replicate(self, tree):
        return lax.with_sharding_constraint(tree, self._sharding())

    def write(self, y, rows, start):
        # Each device selects the entries that it replaces. XLA would gather the whole array for an update at a traced
        # index.
        offset = jnp.arange(y.shape[0]) - jnp.asarray(start, int)
        inside = (offset >= 0) & (offset < rows.shape[0])
        chosen = rows[jnp.clip(offset, 0, rows.shape[0] - 1)]
        return self.place(jnp.where(inside.reshape(-1, *[1] * (y.ndim - 1)), chosen, y))

    def prefix(self, compose, elements, *, reverse=False):
        leaves = jtu.tree_leaves(elements)
        if len(leaves) == 0:
            return elements
        num_steps = leaves[0].shape[0]
        missing = -num_steps % self.num_devices
        # The padding is at the far end, where no step comes after it.
        low, high = (missing, 0) if reverse else (0, missing)

        def fill(x):
            return lax.pad(x, jnp.zeros((), x.dtype), [(low, high, 0)] + [(0, 0, 0)] * (x.ndim - 1))

        def segment(elements):
            return self._segment_products(compose, elements, reverse)

        # The other axes of the mesh are left to the partitioner, which knows the batch.
        over_time = PartitionSpec(self._axes)
        spread = jax.shard_map(
            segment, mesh=self._automatic_mesh, in_specs=over_time, out_specs=over_time, axis_names=set(self._axes)
        )
        if missing == 0:
            return spread(elements)
        products = spread(jtu.tree_map(fill, self.place(elements)))
        return self.place(jtu.tree_map(lambda x: x[low : low + num_steps], products))

    def _segment_products(self, compose, elements, reverse: bool):
        """The prefix products at the steps of one device's segment."""
        products = self.local.prefix(compose, elements, reverse=reverse)
        last = jtu.tree_map(lambda x: x[0] if reverse else x[-1], products)
        totals = self.local.prefix(compose, lax.all_gather(last, self._axes), reverse=reverse)
        device = cast(jax.Array, lax.axis_index(self._axes))
        first, before = (self.num_devices - 1, device + 1) if reverse else (0, device - 1)
        # No segment comes before the first device's: its composition is dropped.
        before = jnp.clip(before, 0, self.num_devices - 1)
        before = jtu.tree_map(lambda total, x: jnp.broadcast_to(total[before], x.shape), totals, products)
        return jtu.tree_map(lambda x, own: jnp.where(device == first, own, x), compose(before, products), products)
