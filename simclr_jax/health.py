"""Metrics of a batch of embeddings: standard deviation, alignment, uniformity, effective rank."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import sharding

IMAGES = 256  # largest number of images that are evaluated


@jax.named_scope('embedding_metrics')  # compile-check finds its collectives by this name
def embedding_metrics(z: jax.Array) -> dict[str, jax.Array]:
  """Metrics of embeddings that show collapse.

  Args:
    z: embeddings of v views of n images, unit rows, `[n, v, d]`; only the first `IMAGES` images are evaluated.

  Returns:
    float32 scalars:
    `z_std`: standard deviation over the images, averaged over the dimensions and multiplied by sqrt(d); about 1 if
      the embeddings are uniform on the sphere, 0 if they are all equal;
    `alignment` (with two or more views): mean squared distance of the first two views, 0 to 4;
    `uniformity`: log of the mean of exp(-2 distance^2) over pairs of images (both Wang and Isola 2020);
    `rank`: effective rank (RankMe, Garrido et al. 2023), exp of the entropy of the normalised singular values, 1 to d.
  """
  n, v, d = z.shape
  z = sharding.replicate(z[:IMAGES]).astype(jnp.float32)
  first = z[:, 0]  # [n, d]
  squared = jnp.maximum(2 - 2 * jnp.matmul(first, first.T, precision='highest'), 0.0)
  different = ~np.eye(len(first), dtype=bool)  # pairs of different images
  # The Gram matrices of rows and of columns have the same nonzero eigenvalues; the smaller one is used.
  factor = first if len(first) < d else first.T
  eigenvalues = jnp.linalg.eigvalsh(jnp.matmul(factor, factor.T, precision='highest'))
  nonzero = eigenvalues > 1e-6 * eigenvalues.max()  # smaller ones are rounding errors of float32
  singular = jnp.where(nonzero, jnp.sqrt(jnp.maximum(eigenvalues, 0.0)), 0.0)
  p = singular / singular.sum() + 1e-7
  metrics = {
    'z_std': jnp.std(first, axis=0).mean() * math.sqrt(d),
    'uniformity': jnp.log(jnp.sum(jnp.exp(-2 * squared) * different) / different.sum()),
    'rank': jnp.exp(-jnp.sum(p * jnp.log(p))),
  }
  if v > 1:
    metrics['alignment'] = jnp.mean(jnp.sum((z[:, 0] - z[:, 1]) ** 2, axis=1))
  return metrics
