"""The weighted k-nearest-neighbour (kNN) classifier (Wu et al. 2018)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from simclr_jax import losses, sharding
from simclr_jax.runtime import preemption

TEMPERATURE = 0.1  # of the weights, by default
BLOCK = 32768  # rows of the bank that a device compares at a time


def predict(
  bank: np.ndarray,
  labels: np.ndarray,
  queries: np.ndarray,
  k: int = 200,
  temperature: float = TEMPERATURE,
  block: int = 1024,
) -> np.ndarray:
  """Classifies features by their k nearest neighbours in cosine similarity.

  A neighbour with similarity s votes for its class with weight exp(s / temperature). The bank is split over the
  devices; a device computes `[block, BLOCK]` similarities at a time.

  Args:
    bank: features of the training images, `[m, d]`.
    labels: classes of the training images, int `[m]`, from 0.
    queries: features to classify, `[n, d]`.
    k: number of neighbours; if larger than m, m.
    temperature: above 0.
    block: number of queries that are compared at a time.

  Returns:
    Predicted classes, int64 `[n]`.

  Raises:
    Stopped: a signal arrived.
  """
  return _classify(labels, *neighbours(bank, queries, k, block), temperature, block)


def _classify(labels, similarity, index, temperature, block=1024):
  """Classes by the votes of neighbours; `similarity`, `index`: of `neighbours`."""
  # Relative to the nearest neighbour, so that exp does not overflow.
  weight = np.exp((similarity - similarity[:, :1]) / temperature)
  return np.concatenate(
    [
      _vote(labels[index[i : i + block]], weight[i : i + block])
      for i in range(0, len(index), block)
    ]
  )


def _vote(labels, weight):
  """The class `[n]` with the largest sum of weights; labels and weights `[n, k]`. Of equal sums, the lowest class.

  A table with a column per class would need too much memory for many classes: only the classes of the neighbours are
  counted.
  """
  classes = int(labels.max()) + 1
  queries = np.arange(len(labels))[:, None]
  pairs, at = np.unique(queries * classes + labels, return_inverse=True)  # (query, class), sorted
  votes = np.bincount(at.reshape(-1), weight.reshape(-1))
  query, label = np.divmod(pairs, classes)
  order = np.lexsort((label, -votes, query))
  return label[order[np.searchsorted(query[order], np.arange(len(labels)))]]


def neighbours(
  bank: np.ndarray, queries: np.ndarray, k: int, block: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
  """The k nearest rows of `bank` for each query, nearest first. Arguments as for `predict`.

  Returns:
    Cosine similarities, float32 `[n, k]`, and indices of the rows, int32 `[n, k]`. Of equal similarities, the row with
    the lower index comes first.
  """
  mesh, d = sharding.make_mesh(), bank.shape[1]
  rows = -(-len(bank) // mesh.size)  # per device
  side = min(BLOCK, rows)
  rows += -rows % side
  normalize = jax.jit(losses.l2_normalize)
  padded = np.zeros((mesh.size * rows, d), np.float32)
  padded[: len(bank)] = normalize(jnp.asarray(bank, jnp.float32))
  blocks = sharding.put_batch(mesh, {'bank': padded.reshape(mesh.size, -1, side, d)})['bank']
  search = _search(mesh, min(k, len(bank)), len(bank))
  parts = -(-len(queries) // block)
  block = -(-len(queries) // parts)  # equal parts: little padding
  similarities, indices = [], []
  for start in range(0, len(queries), block):
    preemption.check()
    q = np.zeros((block, d), np.float32)
    part = queries[start : start + block]
    q[: len(part)] = normalize(jnp.asarray(part, jnp.float32))
    with jax.set_mesh(mesh):
      similarity, index = search(blocks, q)
    similarities.append(np.asarray(similarity)[: len(part)])
    indices.append(np.asarray(index)[: len(part)])
  return np.concatenate(similarities), np.concatenate(indices)


@functools.lru_cache(maxsize=4)
def _search(mesh, k, rows):
  """The jitted search in a bank of `rows` rows.

  Returns:
    `search(bank, q)`: bank `[devices, blocks, side, d]`, whose last rows are padding; q `[b, d]` -> similarities and
    row indices `[b, k]`. Every device searches its own part of the bank, then the results are merged.
  """

  def search_device(device, blocks, q):  # blocks [c, side, d]
    count, side, _ = blocks.shape
    k_device = min(k, count * side)

    def merge(best, block):
      i, block_rows = block
      index = (device * count + i) * side + jnp.arange(side)
      s = jnp.matmul(q, block_rows.T, precision='highest')
      s = jnp.where(index < rows, s, -jnp.inf)  # padding
      s = jnp.concatenate([best[0], s], 1)
      index = jnp.concatenate([best[1], jnp.broadcast_to(index, (len(q), side))], 1)
      top, at = jax.lax.top_k(s, k_device)
      return (top, jnp.take_along_axis(index, at, 1)), None

    none = jnp.full((len(q), k_device), -jnp.inf), jnp.zeros((len(q), k_device), jnp.int32)
    return jax.lax.scan(merge, none, (jnp.arange(count), blocks))[0]

  def search(bank, q):
    devices = jnp.arange(len(bank))
    s, index = jax.vmap(search_device, (0, 0, None))(devices, bank, q)  # [devices, b, k_device]
    s, index = (sharding.replicate(x).swapaxes(0, 1).reshape(len(q), -1) for x in (s, index))
    top, at = jax.lax.top_k(s, k)
    return top, jnp.take_along_axis(index, at, 1)

  replicated, by_device = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
  return jax.jit(search, in_shardings=(by_device, replicated), out_shardings=replicated)


def leave_one_out(features: np.ndarray, labels: np.ndarray, k: int = 200) -> float:
  """Top-1 accuracy, 0 to 1, of images that are each classified by their k nearest others; arguments as for `predict`."""
  similarity, index = neighbours(features, features, k + 1)
  itself = index == np.arange(len(features))[:, None]
  others = np.argsort(itself, axis=1, kind='stable')[
    :, :k
  ]  # duplicates may precede the image itself
  similarity, index = (np.take_along_axis(x, others, 1) for x in (similarity, index))
  return float(np.mean(_classify(labels, similarity, index, TEMPERATURE) == labels))


def accuracy(
  bank: np.ndarray,
  labels: np.ndarray,
  queries: np.ndarray,
  query_labels: np.ndarray,
  k: int = 200,
  temperature: float = TEMPERATURE,
) -> float:
  """Top-1 accuracy of `predict`, 0 to 1; `query_labels`: classes of the queries, int `[n]`."""
  return float(np.mean(predict(bank, labels, queries, k, temperature) == query_labels))
