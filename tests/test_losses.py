"""The losses compared with their definitions, written as loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simclr_jax import losses


def loop_nt_xent(z, temperature, normalize):
  """Equation 1 of the SimCLR paper, one anchor and one candidate at a time."""
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
  """The gradient by fourth-order central differences."""
  z = np.asarray(z, np.float64)
  gradient = np.zeros_like(z)
  for index in np.ndindex(*z.shape):

    def shifted(s, index=index):
      shifted_z = z.copy()
      shifted_z[index] += s * h
      return loop_nt_xent(shifted_z, temperature, normalize)

    gradient[index] = (8 * (shifted(1) - shifted(-1)) - (shifted(2) - shifted(-2))) / (12 * h)
  return gradient


@pytest.mark.parametrize('normalize', [True, False])
@pytest.mark.parametrize('temperature', [0.05, 0.1, 0.5, 1.0])
def test_nt_xent_against_its_definition(temperature, normalize):
  """Breaks if a negative is missing, the positive is the wrong row, or the loss is not the mean
  over the 2n anchors.
  """
  z = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
  if not normalize:
    z *= 0.3
  value, gradient = jax.value_and_grad(lambda z: losses.nt_xent(z, temperature, normalize)[0])(z)
  np.testing.assert_allclose(value, loop_nt_xent(z, temperature, normalize), rtol=1e-5)
  expected = loop_gradient(z, temperature, normalize)
  error = np.abs(gradient - expected).max() / np.abs(expected).max()
  assert error < 1e-5, error


def test_nt_xent_against_optax():
  """Breaks if rows 2i and 2i + 1 are not the positive pair; optax finds pairs by label."""
  z = jax.random.normal(jax.random.key(0), (64, 16))
  labels = np.arange(64) // 2
  ours = losses.nt_xent(z, 0.2)[0]
  np.testing.assert_allclose(ours, optax.losses.ntxent(z, labels, temperature=0.2), rtol=1e-5)


def test_nt_xent_at_low_temperature_and_large_batch():
  """Breaks if the softmax overflows at temperature 0.05 with 2n = 8192, or an array [2n, 2n, d] is
  allocated.
  """
  z = jax.ShapeDtypeStruct((8192, 128), jnp.float32)
  compiled = jax.jit(jax.grad(lambda z: losses.nt_xent(z, 0.05)[0])).lower(z).compile()
  matrix = 8192 * 8192 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * matrix
  identical = jnp.ones((8192, 128))  # all similarities at their maximum, 1 / 0.05
  np.testing.assert_allclose(jax.jit(losses.nt_xent)(identical, 0.05)[0], np.log(8191), rtol=1e-5)


def test_nt_xent_of_zero_rows_is_finite():
  """Breaks if projections of all zeros make the loss or its gradient NaN."""
  z = jnp.zeros((8, 4)).at[0].set(1.0)
  value, gradient = jax.value_and_grad(lambda z: losses.nt_xent(z, 0.1)[0])(z)
  assert np.isfinite(value) and np.isfinite(gradient).all()


def test_nt_xent_of_bfloat16_is_float32():
  """Breaks if the logits are computed in the bfloat16 of the encoder."""
  z = jax.random.normal(jax.random.key(0), (32, 16)).astype(jnp.bfloat16)
  value = losses.nt_xent(z, 0.1)[0]
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, loop_nt_xent(z.astype(jnp.float32), 0.1, True), rtol=1e-5)


def test_contrastive_accuracies():
  """Breaks if `contrastive_acc` excludes negatives of the same view, or `contrastive_acc_n`
  includes them.
  """
  # The two first views are nearest to each other; of the second views, the positive is the nearest.
  z = jnp.array([[1.0, 0], [0.9, -0.4], [1.0, 0.05], [0.9, 0.45]])
  metrics = losses.nt_xent(z, 0.1)[1]
  similarity = np.array(losses.l2_normalize(z) @ losses.l2_normalize(z).T)
  np.fill_diagonal(similarity, -np.inf)
  all_candidates = np.mean(similarity.argmax(1) == np.array([1, 0, 3, 2]))
  other_view = np.mean(similarity[0::2, 1::2].argmax(1) == np.arange(2))
  np.testing.assert_allclose(metrics['contrastive_acc'], all_candidates)
  np.testing.assert_allclose(metrics['contrastive_acc_n'], other_view)
  assert (all_candidates, other_view) == (0.5, 1.0)


def test_odd_number_of_rows_is_refused():
  """Breaks if a batch in which a row has no pair is accepted."""
  with pytest.raises(ValueError, match='2n'):
    losses.nt_xent(jnp.zeros((3, 2)), 0.1)


# The other losses, one anchor and one negative at a time in float64.


def unit(x):
  x = np.asarray(x, np.float64)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def log_sigmoid(x):
  return -np.log1p(np.exp(-x))


def loop_pairs(z, term, semi_hard=None):
  """Mean over the anchors of `term(positive, negatives)`, of similarities.

  The negatives are of the other view; with `semi_hard`, only the hardest that is easier than the positive.
  """
  z = unit(z)
  total = 0.0
  for i in range(len(z)):
    positive = z[i] @ z[i ^ 1]
    negatives = [z[i] @ z[j] for j in range(len(z)) if (i + j) % 2 and j != i ^ 1]
    if semi_hard:
      below = [s for s in negatives if s < positive]
      negatives = [max(below)] if below else []
    total += term(positive, negatives)
  return total / len(z)


def logistic_term(p, negatives):
  return -log_sigmoid(p / 0.3) + (np.mean([-log_sigmoid(-s / 0.3) for s in negatives] or [0.0]))


def triplet_term(p, negatives):
  return np.mean([max(s - p + 0.4, 0.0) for s in negatives] or [0.0])


def margin_term(p, negatives):
  def d(s):
    return np.sqrt(2 - 2 * s)

  return max(d(p) - 0.1, 0) ** 2 + np.mean([max(1.2 - d(s), 0.0) ** 2 for s in negatives])


def numeric_gradient(f, x, h=1e-5):
  """The gradient by central differences."""
  x = np.asarray(x, np.float64)
  gradient = np.zeros_like(x)
  for index in np.ndindex(*x.shape):
    step = np.zeros_like(x)
    step[index] = h
    gradient[index] = (f(x + step) - f(x - step)) / (2 * h)
  return gradient


def assert_equals(ours, theirs, x):
  """Compares value and gradient of a loss, `ours(x)[0]`, with `theirs(x)` in float64."""
  value, gradient = jax.value_and_grad(lambda x: ours(x)[0])(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(value, theirs(x), rtol=1e-5)
  expected = numeric_gradient(theirs, x)
  assert np.abs(expected).max() > 1e-3
  np.testing.assert_allclose(gradient, expected, atol=2e-5 * np.abs(expected).max())


Z = np.random.default_rng(1).normal(size=(12, 4)).astype(np.float32)


@pytest.mark.parametrize('semi_hard', [False, True])
def test_nt_logistic(semi_hard):
  """Breaks if a negative is of the same view, or semi-hard mining takes one harder than the
  positive.
  """
  assert_equals(
    lambda z: losses.nt_logistic(z, 0.3, semi_hard),
    lambda z: loop_pairs(z, logistic_term, semi_hard),
    Z,
  )


@pytest.mark.parametrize('semi_hard', [False, True])
def test_margin_triplet(semi_hard):
  """Breaks if the hinge has the wrong sign, or semi-hard mining ignores the margin."""
  assert_equals(
    lambda z: losses.margin_triplet(z, 0.4, semi_hard),
    lambda z: loop_pairs(z, triplet_term, semi_hard),
    Z,
  )


def test_pairwise_margin():
  """Breaks if similarities are used as distances, or a hinge is not squared."""
  assert_equals(
    lambda z: losses.pairwise_margin(z, 1.2, 0.1), lambda z: loop_pairs(z, margin_term), Z
  )


def test_semi_hard_mining_without_a_candidate():
  """Breaks if an anchor without a semi-hard negative gives NaN, or a similarity of -2 as its
  negative.
  """
  # Positives are opposite, negatives are close.
  z = jnp.array([[1.0, 0], [-1.0, 0], [-1.0, 0.1], [1.0, 0.1]])
  triplet, logistic = losses.margin_triplet(z, 0.4, True)[0], losses.nt_logistic(z, 0.3, True)[0]
  np.testing.assert_allclose(triplet, 0.0)
  np.testing.assert_allclose(logistic, loop_pairs(z, logistic_term, True), rtol=1e-5)


def test_pairwise_margin_of_equal_projections_has_finite_gradients():
  """Breaks if the gradient of the distance, a square root, is infinite at 0."""
  gradient = jax.grad(lambda z: losses.pairwise_margin(z, 1.0)[0])(jnp.ones((4, 3)))
  assert np.isfinite(gradient).all()


def test_nt_xent_with_a_memory():
  """Breaks if the rows of the memory are not negatives of every anchor, or are not counted in the
  chance level.
  """
  memory = unit(np.random.default_rng(2).normal(size=(5, 4)))

  def loop(z):
    z = unit(z)
    total = 0.0
    for i in range(len(z)):
      candidates = [z[i] @ z[j] for j in range(len(z)) if j != i] + [z[i] @ m for m in memory]
      total += np.log(np.sum(np.exp(np.array(candidates) / 0.2))) - z[i] @ z[i ^ 1] / 0.2
    return total / len(z)

  def ours(z):
    return losses.nt_xent(z, 0.2, negatives=jnp.asarray(memory, jnp.float32))

  assert_equals(ours, loop, Z)
  metrics = ours(jnp.asarray(Z))[1]
  np.testing.assert_allclose(metrics['chance_loss'], np.log(11 + 5))
  assert metrics['contrastive_acc'] <= losses.nt_xent(jnp.asarray(Z), 0.2)[1]['contrastive_acc']


@pytest.mark.parametrize('shape', [(7, 4), (3, 7, 4)])
def test_info_nce(shape):
  """Breaks if the positive is not a candidate, or the negatives of one query are used for another."""
  rng = np.random.default_rng(0)
  q, k, negatives = (unit(rng.normal(size=s)) for s in ((3, 4), (3, 4), shape))

  def loop(q):
    total = 0.0
    for i in range(3):
      own = negatives if len(shape) == 2 else negatives[i]
      logits = np.array([q[i] @ k[i], *(q[i] @ n for n in own)]) / 0.1
      total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[0]
    return total / 3

  assert_equals(lambda q: losses.info_nce(q, k, jnp.asarray(negatives), 0.1), loop, q)
  metrics = losses.info_nce(q, k, jnp.asarray(negatives), 0.1)[1]
  own = np.broadcast_to(negatives, (3, 7, 4))
  rank = [sum(q[i] @ n > q[i] @ k[i] for n in own[i]) for i in range(3)]
  np.testing.assert_allclose(metrics['contrastive_acc'], np.mean([r == 0 for r in rank]))
  np.testing.assert_allclose(metrics['contrastive_acc5'], np.mean([r < 5 for r in rank]))
  np.testing.assert_allclose(metrics['chance_loss'], np.log(8))


def test_info_nce_in_batch():
  """Breaks if the positive of a query is also its negative, or keys get no gradient."""
  rng = np.random.default_rng(0)
  queries_and_keys = rng.normal(size=(2, 5, 4))

  def loop(x):
    q, k = unit(x)
    total = 0.0
    for i in range(5):
      total += np.log(sum(np.exp(q[i] @ k[j] / 0.2) for j in range(5))) - q[i] @ k[i] / 0.2
    return total / 5

  def ours(x):
    return losses.info_nce_in_batch(*losses.l2_normalize(x), 0.2)

  assert_equals(ours, loop, queries_and_keys)
  np.testing.assert_allclose(ours(jnp.asarray(queries_and_keys))[1]['chance_loss'], np.log(5))


def test_nce():
  """Breaks if Z is not N times the mean of the first batch, changes later, or has a gradient."""
  rng = np.random.default_rng(0)
  v, bank = unit(rng.normal(size=(3, 4))), 0.9 * rng.normal(size=(20, 4))
  positives, negatives, N = bank[:3], bank[5:12], 20

  def scores(v, i):
    return np.exp(np.array([v[i] @ positives[i], *(v[i] @ n for n in negatives)]) / 0.5)

  Z = N * np.mean([scores(v, i) for i in range(3)])

  def loop(v):
    total = 0.0
    for i in range(3):
      p = scores(v, i) / Z
      noise = 7 / N
      total -= np.log(p[0] / (p[0] + noise)) + np.sum(np.log(noise / (p[1:] + noise)))
    return total / 3

  def ours(v, Z):
    loss, Z, metrics = losses.nce(v, jnp.asarray(positives), jnp.asarray(negatives), 0.5, N, Z)
    return loss, (Z, metrics)

  assert_equals(lambda v: ours(v, 0.0), loop, v)
  first_Z, _ = ours(v, 0.0)[1]
  np.testing.assert_allclose(first_Z, Z, rtol=1e-5)
  later_Z, metrics = ours(v + 0.1, jnp.float32(3.0))[1]
  assert later_Z == 3.0
  # All probabilities are 1 / N: the chance level.
  uniform = losses.nce(0 * v, jnp.asarray(positives), jnp.asarray(negatives), 0.5, N, 0.0)
  np.testing.assert_allclose(uniform[0], metrics['chance_loss'], rtol=1e-5)
