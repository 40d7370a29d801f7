"""Metrics of a batch of embeddings that show whether training is healthy: spread, alignment, uniformity, rank."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import sharding

IMAGES = 256  # the most that are evaluated


@jax.named_scope('embedding_metrics')  # compile-check finds its collectives by this name
def embedding_metrics(z: jax.Array) -> dict[str, jax.Array]:
  """Statistics of a batch of embeddings.

  Args:
    z: unit rows, `[n, v, d]`, v views of n images; only the first `IMAGES` images are evaluated.

  Returns:
    float32 scalars: `z_std`, mean over the dimensions of the standard deviation over the images, times
    sqrt(d), so that uniform coverage of the sphere gives about 1; `alignment` (with two views) and
    `uniformity` of Wang and Isola 2020, with exponents 2; `rank`, RankMe of Garrido et al. 2023: exp
    of the entropy of the normalised singular values, from 1 to d.
  """
  n, v, d = z.shape
  z = sharding.replicate(z[:IMAGES]).astype(jnp.float32)
  first = z[:, 0]  # [n, d]
  squared = jnp.maximum(2 - 2 * jnp.matmul(first, first.T, precision='highest'), 0.0)
  other = ~np.eye(len(first), dtype=bool)
  small = first if len(first) < d else first.T  # the smaller Gram matrix has the same eigenvalues
  eigenvalues = jnp.linalg.eigvalsh(jnp.matmul(small, small.T, precision='highest'))
  real = eigenvalues > 1e-6 * eigenvalues.max()  # the rest is float32's rounding
  singular = jnp.where(real, jnp.sqrt(jnp.maximum(eigenvalues, 0.0)), 0.0)
  share = singular / singular.sum() + 1e-7
  found = {
    'z_std': jnp.std(first, axis=0).mean() * math.sqrt(d),
    'uniformity': jnp.log(jnp.sum(jnp.exp(-2 * squared) * other) / other.sum()),
    'rank': jnp.exp(-jnp.sum(share * jnp.log(share))),
  }
  if v > 1:
    found['alignment'] = jnp.mean(jnp.sum((z[:, 0] - z[:, 1]) ** 2, axis=1))
  return found
