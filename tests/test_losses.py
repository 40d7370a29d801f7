"""NT-Xent against its definition, written as two loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simclr_jax import losses


def loop_nt_xent(z, temperature, normalize):
  """Equation 1 of the paper, one anchor and one candidate at a time."""
  z = np.asarray(z, np.float64)
  if normalize:
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
  total = 0.0
  for i in range(len(z)):
    partner = i + 1 if i % 2 == 0 else i - 1
    denominator = 0.0
    for k in range(len(z)):
      if k != i:
        denominator += np.exp(z[i] @ z[k] / temperature)
    total += np.log(denominator) - z[i] @ z[partner] / temperature
  return total / len(z)


def loop_gradient(z, temperature, normalize, h=1e-5):
  """Central differences, fourth order."""
  z = np.asarray(z, np.float64)
  gradient = np.zeros_like(z)
  for at in np.ndindex(*z.shape):

    def shifted(s, at=at):
      moved = z.copy()
      moved[at] += s * h
      return loop_nt_xent(moved, temperature, normalize)

    gradient[at] = (8 * (shifted(1) - shifted(-1)) - (shifted(2) - shifted(-2))) / (12 * h)
  return gradient


@pytest.mark.parametrize('normalize', [True, False])
@pytest.mark.parametrize('temperature', [0.05, 0.1, 0.5, 1.0])
def test_value_and_gradient_equal_the_definition(temperature, normalize):
  """Breaks if a negative is lost, the positive misplaced, or the scale is not the mean over 2n."""
  z = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
  if not normalize:
    z *= 0.3
  value, gradient = jax.value_and_grad(lambda z: losses.nt_xent(z, temperature, normalize)[0])(z)
  np.testing.assert_allclose(value, loop_nt_xent(z, temperature, normalize), rtol=1e-5)
  expected = loop_gradient(z, temperature, normalize)
  error = np.abs(gradient - expected).max() / np.abs(expected).max()
  assert error < 1e-5, error


def test_equals_optax():
  """Breaks if rows 2i and 2i + 1 stop being the pair: optax takes pairs by label."""
  z = jax.random.normal(jax.random.key(0), (64, 16))
  labels = np.arange(64) // 2
  ours = losses.nt_xent(z, 0.2)[0]
  np.testing.assert_allclose(ours, optax.losses.ntxent(z, labels, temperature=0.2), rtol=1e-5)


def test_finite_at_low_temperature_and_large_batch():
  """Breaks if the softmax overflows at temperature 0.05 with 2n = 8192, or [2n, 2n, d] appears."""
  z = jax.ShapeDtypeStruct((8192, 128), jnp.float32)
  compiled = jax.jit(jax.grad(lambda z: losses.nt_xent(z, 0.05)[0])).lower(z).compile()
  matrix = 8192 * 8192 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * matrix
  same = jnp.ones((8192, 128))  # all similarities at their maximum, 1 / 0.05
  np.testing.assert_allclose(jax.jit(losses.nt_xent)(same, 0.05)[0], np.log(8191), rtol=1e-5)


def test_a_zero_row_is_finite():
  """Breaks if a dead projection (all zeros) makes loss or gradient NaN."""
  z = jnp.zeros((8, 4)).at[0].set(1.0)
  value, gradient = jax.value_and_grad(lambda z: losses.nt_xent(z, 0.1)[0])(z)
  assert np.isfinite(value) and np.isfinite(gradient).all()


def test_bfloat16_is_computed_in_float32():
  """Breaks if logits are formed in the encoder's bfloat16."""
  z = jax.random.normal(jax.random.key(0), (32, 16)).astype(jnp.bfloat16)
  value = losses.nt_xent(z, 0.1)[0]
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, loop_nt_xent(z.astype(jnp.float32), 0.1, True), rtol=1e-5)


def test_accuracies():
  """Breaks if `contrastive_acc` leaves out same-view negatives or `contrastive_acc_n` counts them."""
  # The two first views are nearest to each other; among second views each finds its own.
  z = jnp.array([[1.0, 0], [0.9, -0.4], [1.0, 0.05], [0.9, 0.45]])
  metrics = losses.nt_xent(z, 0.1)[1]
  similarity = np.array(losses.l2_normalize(z) @ losses.l2_normalize(z).T)
  np.fill_diagonal(similarity, -np.inf)
  everyone = np.mean(similarity.argmax(1) == np.array([1, 0, 3, 2]))
  across = np.mean(similarity[0::2, 1::2].argmax(1) == np.arange(2))
  np.testing.assert_allclose(metrics['contrastive_acc'], everyone)
  np.testing.assert_allclose(metrics['contrastive_acc_n'], across)
  assert (everyone, across) == (0.5, 1.0)


def test_odd_rows_are_refused():
  """Breaks if a batch without pairs is accepted."""
  with pytest.raises(ValueError, match='2n'):
    losses.nt_xent(jnp.zeros((3, 2)), 0.1)
