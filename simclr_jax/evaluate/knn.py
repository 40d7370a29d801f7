"""The weighted k-nearest-neighbour classifier of contrastive learning (Wu et al. 2018)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import losses


@functools.partial(jax.jit, static_argnames=('k', 'classes'))
def _vote(queries, bank, labels, k, classes, temperature):
  similarity = jnp.matmul(queries, bank.T, precision='highest')  # [b, m]
  top, index = jax.lax.top_k(similarity, k)
  weight = jnp.exp((top - top[:, :1]) / temperature)  # relative to the nearest: no overflow
  votes = jax.nn.one_hot(labels[index], classes) * weight[..., None]  # [b, k, classes]
  return jnp.argmax(votes.sum(axis=1), axis=-1)


def predict(
  bank: np.ndarray,
  labels: np.ndarray,
  queries: np.ndarray,
  k: int = 200,
  temperature: float = 0.1,
  block: int = 1024,
) -> np.ndarray:
  """Classes of `queries` by the k training images nearest in cosine similarity.

  A neighbour of similarity s counts exp(s / temperature) for its class.

  Args:
    bank: training features, `[m, d]`.
    labels: their classes, whole numbers from 0, `[m]`.
    queries: features to classify, `[n, d]`.
    k: neighbours; at most m.
    temperature: above 0.
    block: queries at a time, which bounds the memory to `[block, m]`.

  Returns:
    int `[n]`.
  """
  k = min(k, len(bank))
  normalize = jax.jit(losses.l2_normalize)
  bank = normalize(jnp.asarray(bank, jnp.float32))
  labels = jnp.asarray(labels, jnp.int32)
  classes = int(labels.max()) + 1
  found = []
  for start in range(0, len(queries), block):
    q = normalize(jnp.asarray(queries[start : start + block], jnp.float32))
    found.append(np.asarray(_vote(q, bank, labels, k, classes, temperature)))
  return np.concatenate(found)


def accuracy(
  bank: np.ndarray,
  labels: np.ndarray,
  queries: np.ndarray,
  query_labels: np.ndarray,
  k: int = 200,
  temperature: float = 0.1,
) -> float:
  """Share of `queries` that `predict` puts into their class `query_labels`."""
  return float(np.mean(predict(bank, labels, queries, k, temperature) == query_labels))
