"""Loss functions: NT-Xent and its alternatives, InfoNCE, NCE, cross entropy, distillation."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simclr_jax import blockwise, sharding

Metrics = dict[str, Any]  # name -> jax.Array or float


def l2_normalize(x: jax.Array) -> jax.Array:
  """x `[..., d]` with rows of norm 1, float32; rows of zeros stay zero (epsilon 1e-12, as in SimCLR's code)."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))


def nt_xent(
  z: jax.Array,
  temperature: float,
  normalize: bool = True,
  negatives: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
  """Normalised temperature-scaled cross entropy (SimCLR, equation 1).

  Each of the 2n projections is an anchor: the other view of its image is the positive, the
  remaining 2n - 2 projections are the negatives. The loss is the mean over the 2n anchors, as in the
  paper; the code released with the paper optimises twice this value.

  Args:
    z: projections, `[2n, d]` of any float dtype; rows 2i and 2i + 1 are the views of image i.
      Rows may be sharded over devices: the candidates are gathered from all devices.
    temperature: divides the similarities; above 0.
    normalize: whether similarities are cosines, as in the paper, or else dot products.
    negatives: additional negatives for every anchor, `[K, d]`, unit rows without a gradient,
      replicated: the memory of SimCLR v2.

  Returns:
    The loss in nats, a float32 scalar, and metrics, float32 scalars except `z`.

    - `contrastive_acc`: how often the positive is more similar than all 2n - 2 + K negatives;
    - `contrastive_acc_n`: the accuracy that SimCLR's code reports: candidates for the first view of
      an image are the n second views only;
    - `chance_loss`: log(2n - 1 + K), the loss if all similarities are equal;
    - `z`: the projections `[2n, d]`, normalised if `normalize`, replicated.

  Raises:
    ValueError: `z` is not a matrix with an even number of rows.
  """
  z, candidates = _candidates(z, normalize)
  memory = jnp.zeros((0, z.shape[1])) if negatives is None else jax.lax.stop_gradient(negatives)
  m, K = len(z), len(memory)
  block = blockwise.block_rows(m, m + K, max(jax.sharding.get_abstract_mesh().size, 1))
  if block:
    terms = blockwise.nt_xent_terms(z, candidates, memory, temperature, block)
  else:
    products = [jnp.matmul(z, x.T, precision='highest') for x in (candidates, memory)]
    logits = jnp.concatenate(products, axis=1) / temperature  # [2n, 2n + K]
    row = jnp.asarray(np.arange(m))
    own = row[:, None] == jnp.asarray(np.arange(m + K))
    _, terms = blockwise.row_terms(jnp.where(own, -jnp.inf, logits), row, m)
  loss, hit, hit_n = terms  # [2n] each
  return jnp.mean(loss), {
    'contrastive_acc': jnp.mean(hit),
    'contrastive_acc_n': jnp.mean(hit_n.reshape(m // 2, 2)[:, 0]),
    'chance_loss': math.log(m - 1 + K),
    'z': candidates,
  }


def info_nce(
  q: jax.Array, k: jax.Array, negatives: jax.Array, temperature: float
) -> tuple[jax.Array, Metrics]:
  """InfoNCE (MoCo, equation 1): cross entropy of classifying the key of a query among K negatives.

  Args:
    q, k: queries and their keys, `[n, d]` float32, unit rows; k gets a gradient, too.
    negatives: `[K, d]`, shared by all queries, or `[n, K, d]`, K per query; they get no gradient.
    temperature: divides the similarities; above 0.

  Returns:
    The mean over the queries in nats, and scalar metrics. `contrastive_acc` and `contrastive_acc5` are how
    often the key is the most similar, or among the five most similar, of 1 + K candidates;
    `chance_loss` is log(1 + K), the loss if all similarities are equal.
  """
  positive, others = _scores(q, k, negatives, temperature)
  log_denominator = jnp.logaddexp(positive, jax.nn.logsumexp(others, axis=1))
  return jnp.mean(log_denominator - positive), _metrics(positive, others)


def info_nce_in_batch(q: jax.Array, k: jax.Array, temperature: float) -> tuple[jax.Array, Metrics]:
  """InfoNCE whose negatives are the n - 1 other keys of the batch, which get a gradient.

  Args:
    q: queries `[n, d]` float32, unit rows; they may be sharded.
    k: keys `[n, d]` float32, unit rows, replicated; row i is the key of query i.
    temperature: divides the similarities; above 0.

  Returns:
    As `info_nce`, with K = n - 1.
  """
  logits = jnp.matmul(q, k.T, precision='highest') / temperature  # [n, n]
  row = jnp.asarray(np.arange(len(q)))
  positive = _pick(logits, row)
  others = jnp.where(row[:, None] == row[None, :], -jnp.inf, logits)
  loss = jnp.mean(jax.nn.logsumexp(logits, axis=1) - positive)
  return loss, {**_metrics(positive, others), 'chance_loss': math.log(len(q))}


def nce(
  v: jax.Array,
  positives: jax.Array,
  negatives: jax.Array,
  temperature: float,
  examples: int,
  Z: jax.Array,
) -> tuple[jax.Array, jax.Array, Metrics]:
  """Noise-contrastive estimation with a constant normaliser (InstDisc, equations 4 to 7).

  The probability of an image with bank row f, given a feature v, is P = exp(v f / T) / Z. The loss is that of
  1 + K binary decisions between the positive and K noise samples, each drawn with probability 1 / N.

  Args:
    v: features `[n, d]` float32, unit rows.
    positives: the rows of the bank for the same images, `[n, d]`.
    negatives: rows of the bank, drawn uniformly, `[K, d]` or `[n, K, d]`.
    temperature: T, above 0.
    examples: N, number of images of the data set.
    Z: float32 scalar; 0 in the first step: Z is then estimated as N times the mean of exp(v f / T) over this
      batch, as in the paper's code.

  Returns:
    The loss in nats, summed over the 1 + K decisions and averaged over the images; Z, float32 scalar; and the
    metrics of `info_nce`, where `chance_loss` is the loss if P = 1 / N for all.
  """
  positive, others = _scores(v, positives, negatives, temperature)  # [n], [n, K]
  K = others.shape[1]
  estimate = jnp.mean(jnp.exp(jnp.concatenate([positive[:, None], others], axis=1))) * examples
  Z = jax.lax.stop_gradient(jnp.where(Z > 0, Z, estimate))
  noise, epsilon = K / examples, 1e-7
  p, p_others = jnp.exp(positive) / Z, jnp.exp(others) / Z
  log_data = jnp.log(p / (p + noise + epsilon))
  log_noise = jnp.sum(jnp.log(noise / (p_others + noise + epsilon)), axis=1)
  chance = math.log(1 + K) + K * math.log1p(1 / K)
  metrics = {**_metrics(positive, others), 'chance_loss': chance}
  return -jnp.mean(log_data + log_noise), Z, metrics


def nt_logistic(
  z: jax.Array, temperature: float, semi_hard: bool = False
) -> tuple[jax.Array, Metrics]:
  """NT-Logistic (SimCLR, table 2): -log sigmoid(u v+ / T) - log sigmoid(-u v- / T).

  As in the paper's comparison (appendix B.10), the negatives of an anchor are the n - 1 projections of other
  images in the other view. The second term is averaged over all negatives or, with mining, computed for the semi-hard
  negative: the most similar negative that is less similar than the positive.

  Args:
    z: projections `[2n, d]`, not normalised; rows 2i and 2i + 1 are the views of image i.
    temperature: divides the similarities; above 0.
    semi_hard: whether negatives are mined. An anchor without a semi-hard negative has no second term.

  Returns:
    The mean over the 2n anchors in nats, and the metrics `contrastive_acc_n` and `z` of `nt_xent`.
  """
  positive, similarity, is_negative, metrics = _cross_view(z)
  attract = -jax.nn.log_sigmoid(positive / temperature)
  if semi_hard:
    negative, exists = _semi_hard(positive, similarity, is_negative)
    repel = jnp.where(exists, -jax.nn.log_sigmoid(-negative / temperature), 0.0)
  else:
    repel = _mean(-jax.nn.log_sigmoid(-similarity / temperature), is_negative)
  return jnp.mean(attract + repel), metrics


def margin_triplet(
  z: jax.Array, margin: float, semi_hard: bool = False
) -> tuple[jax.Array, Metrics]:
  """Margin triplet (SimCLR, table 2): max(u v- - u v+ + margin, 0).

  Negatives are those of `nt_logistic`. The loss of a semi-hard negative is 0 unless it is within the margin of the
  positive (Schroff et al. 2015); the loss of an anchor without a semi-hard negative is 0.

  Args:
    z: projections `[2n, d]`, not normalised; rows 2i and 2i + 1 are the views of image i.
    margin: a difference of cosine similarities, at least 0.
    semi_hard: whether only the semi-hard negative counts; otherwise the loss is averaged over all negatives.

  Returns:
    The mean over the 2n anchors, and the metrics `contrastive_acc_n` and `z` of `nt_xent`.
  """
  positive, similarity, is_negative, metrics = _cross_view(z)
  if semi_hard:
    negative, exists = _semi_hard(positive, similarity, is_negative)
    loss = jnp.where(exists, jnp.maximum(negative - positive + margin, 0.0), 0.0)
  else:
    loss = _mean(jnp.maximum(similarity - positive[:, None] + margin, 0.0), is_negative)
  return jnp.mean(loss), metrics


def pairwise_margin(
  z: jax.Array, margin: float, positive_margin: float = 0.0
) -> tuple[jax.Array, Metrics]:
  """The margin-based contrastive loss of pairs (Hadsell et al. 2006), for unit vectors of distance D.

  The loss of a positive pair is max(D - positive_margin, 0)^2, that of a negative pair max(margin - D, 0)^2,
  averaged over the negatives of `nt_logistic`. In the paper the positive margin is 0.

  Args:
    z: projections `[2n, d]`, not normalised; rows 2i and 2i + 1 are the views of image i.
    margin, positive_margin: Euclidean distances of unit vectors, from 0 to 2.

  Returns:
    The mean over the 2n anchors, and the metrics `contrastive_acc_n` and `z` of `nt_xent`.
  """
  positive, similarity, is_negative, metrics = _cross_view(z)

  def distance(s):  # the epsilon keeps the gradient finite where two vectors are equal
    return jnp.sqrt(jnp.maximum(2 - 2 * s, 1e-12))

  attract = jnp.maximum(distance(positive) - positive_margin, 0.0) ** 2
  repel = _mean(jnp.maximum(margin - distance(similarity), 0.0) ** 2, is_negative)
  return jnp.mean(attract + repel), metrics


def cross_entropy(logits: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cross entropy of the labelled rows.

  Args:
    logits: `[n, classes]`.
    label: int `[n]`; rows with the label -1 are ignored.

  Returns:
    Mean cross entropy in nats, and accuracy, scalars; both 0 without labels.
  """
  labelled = label >= 0
  count = jnp.maximum(labelled.sum(), 1)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
  hit = jnp.argmax(logits, axis=-1) == label
  return jnp.sum(loss * labelled) / count, jnp.sum(hit & labelled) / count


def distillation(
  student: jax.Array, teacher: jax.Array, temperature: float = 1.0, hard: bool = False
) -> jax.Array:
  """Cross entropy between the predictions of a teacher and of a student, both softened by a temperature.

      mean_i  -t^2 sum_y  P_teacher(y | x_i; t) log P_student(y | x_i; t),   P(y | x; t) = softmax(f(x) / t)_y

  The factor t^2 (Hinton et al. 2015; SimCLR's code) makes the size of the gradient independent of t.

  Args:
    student, teacher: logits `[n, classes]`; those of the teacher get no gradient.
    temperature: t, above 0.
    hard: whether the target is the most probable class of the teacher instead of its probabilities.

  Returns:
    float32 scalar, in nats.

  Source: SimCLR v2 (Chen et al. 2020b), equation 2.
  """
  teacher = jax.lax.stop_gradient(teacher.astype(jnp.float32))
  target = jax.nn.softmax(teacher / temperature)
  if hard:
    target = jax.nn.one_hot(teacher.argmax(-1), teacher.shape[-1])
  log_p = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
  return -(temperature**2) * jnp.mean(jnp.sum(target * log_p, axis=-1))


def _candidates(z, normalize=True):
  """Projections of pairs `[2n, d]`, float32, unit rows if `normalize`; and the same, replicated."""
  if z.ndim != 2 or z.shape[0] % 2:
    raise ValueError(f'projections of pairs must be [2n, d], got {list(z.shape)}')
  z = z.astype(jnp.float32)
  if normalize:
    z = l2_normalize(z)
  return z, sharding.replicate(z)  # an all-gather over the devices


def _cross_view(z):
  """Similarity of the positives `[2n]`; all similarities `[2n, 2n]`; which of them are negatives; metrics.

  Negatives are the other images in the other view.
  """
  z, candidates = _candidates(z)
  similarity = jnp.matmul(z, candidates.T, precision='highest')
  # Constants from numpy: jnp.arange over a sharded axis compiles to integer collectives.
  positive, row = np.arange(len(z)) ^ 1, jnp.asarray(np.arange(len(z)))
  other_view = (row[:, None] % 2) != (row[None, :] % 2)
  is_negative = other_view & (row[None, :] != positive[:, None])
  positive_similarity = _pick(similarity, positive)
  best = jnp.max(jnp.where(is_negative, similarity, -2.0), axis=1)
  metrics = {'contrastive_acc_n': jnp.mean(positive_similarity > best), 'z': candidates}
  return positive_similarity, similarity, is_negative, metrics


def _pick(x, column):
  """`x[i, column[i]]` for every row i, without a gather over sharded rows."""
  # The mask is computed from vectors: as a constant, an [n, n] array would be stored in the program.
  mask = jnp.asarray(np.arange(x.shape[1]))[None, :] == jnp.asarray(column)[:, None]
  return jnp.sum(jnp.where(mask, x, 0.0), axis=1)


def _semi_hard(positive, similarity, is_negative):
  """Similarity of the semi-hard negative of each anchor `[2n]`, and whether there is one."""
  below = is_negative & (similarity < positive[:, None])
  hardest = jnp.max(jnp.where(below, similarity, -2.0), axis=1)
  return hardest, below.any(axis=1)


def _mean(x, mask):
  """The mean of each row over the entries where `mask` is true."""
  return jnp.sum(jnp.where(mask, x, 0.0), axis=1) / mask.sum(axis=1)


def _scores(q, k, negatives, temperature):
  """Logits of the positives `[n]` and of the negatives `[n, K]`."""
  positive = jnp.sum(q * k, axis=1)
  pattern = 'nd,kd->nk' if negatives.ndim == 2 else 'nd,nkd->nk'
  others = jnp.einsum(pattern, q, jax.lax.stop_gradient(negatives), precision='highest')
  return positive / temperature, others / temperature


def _metrics(positive, others):
  """Metrics of logits of the positives `[n]` and of the negatives `[n, K]`, see `info_nce`."""
  # Ties are errors, so that collapsed embeddings have accuracy 0.
  not_below = jnp.sum(others >= positive[:, None], axis=1)
  return {
    'contrastive_acc': jnp.mean(not_below == 0),
    'contrastive_acc5': jnp.mean(not_below < 5),
    'chance_loss': math.log(1 + others.shape[1]),
  }
