"""NT-Xent without the `[2n, 2n]` matrix of similarities: its rows are computed in blocks, and again in the backward pass.

The log of the denominator of each row is all that is kept. The memory is that of one block, `[block, 2n]`; the backward
pass takes one matrix product more than that of the whole matrix.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

WHOLE = 2**28  # bytes; if the part of the matrix on a device is larger, it is computed in blocks
BLOCK = 2**25  # bytes of a block

Terms = tuple[jax.Array, jax.Array, jax.Array]


def block_rows(rows: int, columns: int, devices: int) -> int:
  """The number of rows that a device computes at once; 0: all of them.

  Args:
    rows, columns: of the matrix of similarities, float32.
    devices: number of devices over which its rows are split.
  """
  if 4 * rows * columns <= WHOLE * devices:
    return 0
  return max(BLOCK // (4 * columns), 1)


def notes(rows: int, memory: int, devices: int) -> list[str]:
  """What a training says about blocks: nothing, or one sentence. `rows`: 2n; `memory`: K."""
  block = block_rows(rows, rows + memory, devices)
  if not block:
    return []
  size = 4 * rows * (rows + memory) / devices / 2**30
  return [
    f'NT-Xent of {rows:,} views in blocks of {block:,} rows: the whole matrix takes {size:.3g} GiB on a device, and '
    'the result is the same'
  ]


def nt_xent_terms(
  z: jax.Array, candidates: jax.Array, memory: jax.Array, temperature: float, block: int
) -> Terms:
  """`row_terms` of the similarities of z with candidates and memory, in blocks.

  Args:
    z: the anchors, float32 `[2n, d]`; their rows may be sharded. Rows 2i and 2i + 1 are the views of image i.
    candidates: the same rows, replicated.
    memory: more negatives, float32 `[K, d]`, replicated; they get no gradient. K may be 0.
    temperature: divides the similarities; above 0.
    block: number of rows that a device computes at once; it need not divide the number of rows.
  """
  terms = functools.partial(_terms, temperature, block)
  if not jax.sharding.get_abstract_mesh().empty:
    # Each device has its own loop over blocks. In a loop over blocks of all rows, each block would be communicated.
    specs = (P('data'), P(), P(), P('data'))
    terms = jax.shard_map(terms, in_specs=specs, out_specs=P('data'), check_vma=False)
  return terms(z, candidates, memory, np.arange(len(z), dtype=np.int32))


def row_terms(logits: jax.Array, row: jax.Array, candidates: int) -> tuple[jax.Array, Terms]:
  """The terms of NT-Xent of some anchors.

  Args:
    logits: of the anchors with all candidates and, after these, the memory, `[a, 2n + K]`; -inf with themselves.
    row: int `[a]`, indices of the anchors among the candidates.
    candidates: 2n.

  Returns:
    The log of the denominators, `[a]`; and the terms, `[a]` each: the loss; whether the positive is the first maximum
    of the logits; and whether it is that of the second views (odd candidates), which is meant for first views only.
  """
  column, positive = jnp.asarray(np.arange(logits.shape[1])), (row ^ 1)[:, None]
  positive_logit = jnp.sum(jnp.where(column == positive, logits, 0.0), axis=1, keepdims=True)
  log_denominator = jax.nn.logsumexp(logits, axis=1)
  # Comparisons take half the time of argmax on a CPU.
  below = (logits < positive_logit) | ((logits == positive_logit) & (column >= positive))
  second_view = (column % 2 == 1) & (column < candidates)
  hit, hit_n = below.all(axis=1), (below | ~second_view).all(axis=1)
  return log_denominator, (log_denominator - positive_logit[:, 0], hit, hit_n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _terms(temperature, block, anchors, candidates, memory, row):
  """`nt_xent_terms` of anchors `[a, d]`, whose indices among the candidates are `row`, int32 `[a]`."""
  return _forward(temperature, block, anchors, candidates, memory, row)[0]


def _forward(temperature, block, anchors, candidates, memory, row):
  columns = jnp.concatenate([candidates, memory])

  def of_block(x):
    anchors, row = x
    return row_terms(_logits(anchors, row, columns, temperature), row, len(candidates))

  blocks = jax.lax.map(of_block, (_blocks(anchors, block), _blocks(row, block)))
  log_denominator, terms = jax.tree.map(lambda x: x.reshape(-1)[: len(anchors)], blocks)
  return terms, (anchors, candidates, memory, row, log_denominator)


def _backward(temperature, block, kept, cotangents):
  """The gradient of the logits of a row: its cotangent times the difference of their softmax and 1 at the positive."""
  anchors, candidates, memory, row, log_denominator = kept
  columns, m = jnp.concatenate([candidates, memory]), len(candidates)

  def of_block(d_candidates, x):
    anchors, row, log_denominator, cotangent = x
    g = jnp.exp(_logits(anchors, row, columns, temperature) - log_denominator[:, None])
    g -= np.arange(len(columns)) == (row ^ 1)[:, None]
    g *= cotangent[:, None] / temperature  # [block, 2n + K]
    # The sum is transposed, because products with the transposed g are slower on a CPU.
    d_candidates += jnp.matmul(anchors.T, g[:, :m], precision='highest')
    return d_candidates, jnp.matmul(g, columns, precision='highest')

  blocks = tuple(_blocks(x, block) for x in (anchors, row, log_denominator, cotangents[0]))
  d_candidates, d_anchors = jax.lax.scan(of_block, jnp.zeros_like(candidates.T), blocks)
  d_anchors = d_anchors.reshape(-1, anchors.shape[1])[: len(anchors)]
  return d_anchors, d_candidates.T, jnp.zeros_like(memory), None


_terms.defvjp(_forward, _backward)


def _logits(anchors, row, columns, temperature):
  """Logits of anchors with all columns; -inf with themselves."""
  logits = jnp.matmul(anchors, columns.T, precision='highest') / temperature
  return jnp.where(np.arange(len(columns)) == row[:, None], -jnp.inf, logits)


def _blocks(x, block):
  """x `[a, ...]` as `[k, block, ...]`; the last block is filled with zeros."""
  padding = [(0, -len(x) % block), *[(0, 0)] * (x.ndim - 1)]
  return jnp.pad(x, padding).reshape(-1, block, *x.shape[1:])
