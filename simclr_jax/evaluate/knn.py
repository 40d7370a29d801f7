"""The weighted k-nearest-neighbour classifier of contrastive learning (Wu et al. 2018)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from simclr_jax import losses, sharding
from simclr_jax.runtime import preemption

BLOCK = 32768  # bank rows at a time on each device


def predict(
  bank: np.ndarray,
  labels: np.ndarray,
  queries: np.ndarray,
  k: int = 200,
  temperature: float = 0.1,
  block: int = 1024,
) -> np.ndarray:
  """Classes of `queries` by the k training images nearest in cosine similarity.

  A neighbour of similarity s votes for its class with weight exp(s / temperature). The bank is split over the
  devices; a device computes `[block, BLOCK]` similarities at a time.

  Args:
    bank: training features, `[m, d]`.
    labels: their classes, integers from 0, `[m]`.
    queries: features to classify, `[n, d]`.
    k: number of neighbours; at most m.
    temperature: above 0.
    block: queries at a time.

  Returns:
    int `[n]`.
  """
  k = min(k, len(bank))
  similarity, index = neighbours(bank, queries, k, block)
  classes = int(labels.max()) + 1
  weight = np.exp(
    (similarity - similarity[:, :1]) / temperature
  )  # relative to the nearest: no overflow
  rows = np.repeat(np.arange(len(queries)), k)
  cells = rows * classes + labels[index].reshape(-1)
  votes = np.bincount(cells, weight.reshape(-1), minlength=len(queries) * classes)
  return votes.reshape(len(queries), classes).argmax(1)


def neighbours(
  bank: np.ndarray, queries: np.ndarray, k: int, block: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
  """The k rows of `bank` that are nearest to each query, nearest first. Arguments as of `predict`.

  Returns:
    Cosine similarities float32 `[n, k]`, and row indices int `[n, k]`; of equal similarities the first row.
  """
  mesh = sharding.make_mesh()
  each = -(-len(bank) // mesh.size)  # rows a device
  side = min(BLOCK, each)
  each += -each % side
  normalize = jax.jit(losses.l2_normalize)
  whole = np.zeros((mesh.size * each, bank.shape[1]), np.float32)
  whole[: len(bank)] = normalize(jnp.asarray(bank, jnp.float32))
  # [devices, blocks, side, d], the first axis split
  whole = sharding.put_batch(mesh, {'bank': whole.reshape(mesh.size, -1, side, bank.shape[1])})[
    'bank'
  ]
  search = _search(mesh, min(k, len(bank)), len(bank))
  blocks = []
  for start in range(0, len(queries), block):
    preemption.check()
    q = np.zeros((block, bank.shape[1]), np.float32)
    part = queries[start : start + block]
    q[: len(part)] = normalize(jnp.asarray(part, jnp.float32))
    with jax.set_mesh(mesh):
      blocks.append([np.asarray(x)[: len(part)] for x in search(whole, q)])
  return tuple(np.concatenate(x) for x in zip(*blocks))


@functools.lru_cache(maxsize=4)
def _search(mesh, k, rows):
  """A jitted function: bank, queries `[b, d]` -> similarities and rows `[b, k]`."""

  def of_device(number, blocks, q):  # blocks [c, side, d]
    count, side, _ = blocks.shape
    most = min(k, count * side)

    def merge(best, block):
      i, rows_of_block = block
      index = (number * count + i) * side + jnp.arange(side)
      s = jnp.matmul(q, rows_of_block.T, precision='highest')
      s = jnp.where(index < rows, s, -jnp.inf)  # padding
      s = jnp.concatenate([best[0], s], 1)
      index = jnp.concatenate([best[1], jnp.broadcast_to(index, (len(q), side))], 1)
      top, at = jax.lax.top_k(s, most)
      return (top, jnp.take_along_axis(index, at, 1)), None

    none = jnp.full((len(q), most), -jnp.inf), jnp.zeros((len(q), most), jnp.int32)
    return jax.lax.scan(merge, none, (jnp.arange(count), blocks))[0]

  def search(bank, q):
    numbers = jnp.arange(len(bank))
    s, index = jax.vmap(of_device, (0, 0, None))(numbers, bank, q)  # [devices, b, k]
    s, index = (sharding.replicate(x).swapaxes(0, 1).reshape(len(q), -1) for x in (s, index))
    top, at = jax.lax.top_k(s, k)
    return top, jnp.take_along_axis(index, at, 1)

  whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
  return jax.jit(search, in_shardings=(split, whole), out_shardings=whole)


def accuracy(
  bank: np.ndarray,
  labels: np.ndarray,
  queries: np.ndarray,
  query_labels: np.ndarray,
  k: int = 200,
  temperature: float = 0.1,
) -> float:
  """Share of `queries` whose class `query_labels` is predicted."""
  return float(np.mean(predict(bank, labels, queries, k, temperature) == query_labels))
