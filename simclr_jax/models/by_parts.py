"""Layers that are computed on parts of the batch, one part after the other, so that few arrays of the batch are kept.

BatchNorm needs the statistics of the whole batch before it can normalise one image. So a network is computed layer by
layer: a convolution runs over all parts, then the statistics are those of the whole batch, and normalisation and ReLU
wait until the next convolution runs over the parts. The output of a convolution is kept for the whole batch; all that
lies between two convolutions exists for one part only. Nothing is approximated.

`Delayed` stands for an array that is not computed yet; `apply` calls a function, or delays it if one of its arguments is
delayed; `evaluate` computes it by parts.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

PyTree = Any
PARTS = 8


@flax.struct.dataclass
class Delayed:
  """An array of the batch, `[n, ...]`, as a function of others.

  Attributes:
    function: `function(shared, rows)` -> the rows of the array that belong to these rows.
    shared: arrays that all rows need, such as kernels.
    rows: arrays `[n, ...]`.
  """

  function: Callable[[PyTree, PyTree], jax.Array] = flax.struct.field(pytree_node=False)
  shared: PyTree
  rows: PyTree

  @property
  def shape(self) -> tuple[int, ...]:
    return jax.eval_shape(self.function, self.shared, self.rows).shape


Array = jax.Array | Delayed


def delay(x: Array) -> Any:
  """x `[n, ...]`, so that what is computed from it is computed by parts."""
  return x if isinstance(x, Delayed) else Delayed(lambda shared, rows: rows, (), x)


def apply(function: Callable[..., jax.Array], *args: Array) -> Any:
  """`function(*args)`; a `Delayed` if one of the arguments is.

  Args:
    function: computes each row from the same row of the delayed arguments. It must not close over traced arrays.
    *args: the arguments; those that are not delayed are the same for every part.
  """
  if not any(isinstance(x, Delayed) for x in args):
    return function(*args)
  functions = [x.function if isinstance(x, Delayed) else None for x in args]

  def of_part(shared, rows):
    parts = [f(*x) if f else x[0] for f, *x in zip(functions, shared, rows, strict=True)]
    return function(*parts)

  shared = tuple(x.shared if isinstance(x, Delayed) else x for x in args)
  rows = tuple(x.rows if isinstance(x, Delayed) else () for x in args)
  return Delayed(of_part, shared, rows)


def evaluate(x: Array) -> jax.Array:
  """The array `[n, ...]` that x stands for. Without a delay, x itself.

  Each device computes its rows in `number_of_parts` parts. In the backward pass, they are computed again.
  """
  if not isinstance(x, Delayed):
    return x
  return _evaluate(x.function, x.shared, x.rows)


def number_of_parts(rows: int) -> int:
  """The number of parts of the rows of a device: 8, or the largest number below that divides them."""
  return next(p for p in range(PARTS, 0, -1) if rows % p == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _evaluate(function, shared, rows):
  def of_device(shared, rows):
    return _loop(lambda total, part: (total, function(shared, part)), (), rows)[1]

  return _on_devices(of_device, P('data'))(shared, rows)


def _forward(function, shared, rows):
  return _evaluate(function, shared, rows), (shared, rows)


def _backward(function, kept, dy):
  def of_device(shared, rows):
    def of_part(total, part):
      rows, dy = part
      d_shared, d_rows = jax.vjp(function, shared, rows)[1](dy)
      return jax.tree.map(jnp.add, total, d_shared), d_rows

    zeros = jax.tree.map(jnp.zeros_like, shared)
    total, d_rows = _loop(of_part, zeros, rows, overwrite=True)
    return jax.tree.map(lambda x: x[None], total), d_rows

  shared, rows = kept
  d_shared, d_rows = _on_devices(of_device, (P('data'), P('data')))(shared, (rows, dy))
  return jax.tree.map(lambda x: x.sum(0), d_shared), d_rows


_evaluate.defvjp(_forward, _backward)


def _on_devices(function, out_specs):
  """`function(shared, rows)` on every device, with its own rows."""
  if jax.sharding.get_abstract_mesh().empty:
    return function
  return jax.shard_map(function, in_specs=(P(), P('data')), out_specs=out_specs, check_vma=False)


def _loop(function, total, rows, overwrite=False):
  """`total, y = function(total, part)` for each part of the rows: the last total, and y of all rows.

  If `overwrite`, the last array of rows is not needed any more; an array of y with its shape takes its place.
  """
  n = len(jax.tree.leaves(rows)[0])
  count = number_of_parts(n)
  leaves, structure = jax.tree.flatten(rows)
  *kept, last = (x.reshape(count, n // count, *x.shape[1:]) for x in leaves)

  def of_part(total, i, last):
    part = [lax.dynamic_index_in_dim(x, i, keepdims=False) for x in (*kept, last)]
    return function(total, jax.tree.unflatten(structure, part))

  shapes, structure_of_y = jax.tree.flatten(jax.eval_shape(of_part, total, 0, last)[1])
  # The first values of the results depend on the rows: XLA may place a constant in memory long before.
  value = last.ravel()[0]
  results = [jnp.full((count, *x.shape), value, x.dtype) for x in shapes]
  alike = (i for i, x in enumerate(results) if (x.shape, x.dtype) == (last.shape, last.dtype))
  place = next(alike, None) if overwrite else None
  if place is not None:
    results[place] = last

  def step(i, carry):
    total, results = carry
    total, y = of_part(total, i, last if place is None else results[place])
    y = jax.tree.leaves(y)
    return total, [
      lax.dynamic_update_index_in_dim(x, new, i, 0) for x, new in zip(results, y, strict=True)
    ]

  total, results = lax.fori_loop(0, count, step, (total, results))
  results = [x.reshape(n, *x.shape[2:]) for x in results]
  return total, jax.tree.unflatten(structure_of_y, results)
