"""The contrastive objectives."""

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import sharding


def l2_normalize(x: jax.Array) -> jax.Array:
  """Rows of `x` `[..., d]` scaled to unit length; a zero row stays zero (SimCLR's floor, 1e-12)."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))


def nt_xent(
  z: jax.Array, temperature: float, normalize: bool = True
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Normalised temperature-scaled cross entropy (SimCLR, equation 1).

  Each of the 2n projections is an anchor: the other view of its image is the positive, the
  remaining 2n - 2 projections are the negatives. The loss is the paper's mean over the 2n anchors;
  the code released with the paper optimises twice this value.

  Args:
    z: projections, `[2n, d]` of any float dtype; rows 2i and 2i + 1 are the views of image i.
      Rows may be sharded over devices: the candidates are gathered from all of them.
    temperature: divides the similarities; above 0.
    normalize: use cosine similarity, as the paper does, instead of the dot product.

  Returns:
    The float32 scalar loss in nats, and float32 scalar metrics:
    `contrastive_acc`, how often the positive beats all 2n - 2 negatives, and
    `contrastive_acc_n`, the number that SimCLR's code reports: only the n second views are
    candidates for a first view, so that negatives of the same view are left out.

  Raises:
    ValueError: `z` is not a matrix with an even number of rows.
  """
  if z.ndim != 2 or z.shape[0] % 2:
    raise ValueError(f'nt_xent needs z of shape [2n, d], got {list(z.shape)}')
  z = z.astype(jnp.float32)
  if normalize:
    z = l2_normalize(z)
  m = z.shape[0]
  # Constants from numpy: jnp.arange over a sharded axis compiles to integer collectives.
  anchor = np.arange(m)
  positive = anchor ^ 1

  candidates = sharding.replicate(z)  # [2n, d], the step's one all-gather
  logits = jnp.matmul(z, candidates.T, precision='highest') / temperature  # [2n, 2n]
  logits = jnp.where(anchor[:, None] == anchor[None, :], -jnp.inf, logits)
  is_positive = positive[:, None] == anchor[None, :]
  positive_logit = jnp.sum(jnp.where(is_positive, logits, 0.0), axis=1)  # [2n]
  loss = jnp.mean(jax.nn.logsumexp(logits, axis=1) - positive_logit)

  accuracy = jnp.mean(jnp.argmax(logits, axis=1) == positive)
  across = logits.reshape(m // 2, 2, m // 2, 2)[:, 0, :, 1]  # [n, n], first view against second
  accuracy_n = jnp.mean(jnp.argmax(across, axis=1) == np.arange(m // 2))
  return loss, {'contrastive_acc': accuracy, 'contrastive_acc_n': accuracy_n}
