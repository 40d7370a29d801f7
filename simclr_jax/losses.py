"""The contrastive objectives."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simclr_jax import sharding


def l2_normalize(x: jax.Array) -> jax.Array:
  """Rows of `x` `[..., d]` at unit length, in float32; a zero row stays zero (SimCLR's floor, 1e-12)."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))


def nt_xent(
  z: jax.Array,
  temperature: float,
  normalize: bool = True,
  negatives: jax.Array | None = None,
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
    negatives: more of them for every anchor, `[K, d]`, unit rows without a gradient, whole on every
      device: the memory of SimCLR v2.

  Returns:
    The float32 scalar loss in nats, and float32 scalar metrics:
    `contrastive_acc`, how often the positive beats all 2n - 2 + K negatives;
    `contrastive_acc_n`, the number that SimCLR's code reports: only the n second views are
    candidates for a first view, so that negatives of the same view are left out;
    `chance_loss`, log(2n - 1 + K), the loss of equal similarities;
    and `z`, the normalised projections, whole on every device.

  Raises:
    ValueError: `z` is not a matrix with an even number of rows.
  """
  similarity, positive, candidates = _pairs(z, normalize)
  logits = similarity / temperature  # [2n, 2n]
  m = len(logits)
  anchor = jnp.asarray(np.arange(m))
  logits = jnp.where(anchor[:, None] == anchor[None, :], -jnp.inf, logits)
  positive_logit = _pick(logits, positive)  # [2n]

  across = logits.reshape(m // 2, 2, m // 2, 2)[:, 0, :, 1]  # [n, n], first view against second
  accuracy_n = jnp.mean(jnp.argmax(across, axis=1) == np.arange(m // 2))
  hit = jnp.argmax(logits, axis=1) == positive
  total = jax.nn.logsumexp(logits, axis=1)
  more = 0
  if negatives is not None:
    memory = (
      jnp.matmul(sharding.shard_rows(candidates), negatives.T, precision='highest') / temperature
    )  # [2n, K]
    total = jnp.logaddexp(total, jax.nn.logsumexp(memory, axis=1))
    hit &= positive_logit >= memory.max(axis=1)
    more = len(negatives)
  return jnp.mean(total - positive_logit), {
    'contrastive_acc': jnp.mean(hit),
    'contrastive_acc_n': accuracy_n,
    'chance_loss': math.log(m - 1 + more),
    'z': candidates,
  }


def info_nce(
  q: jax.Array, k: jax.Array, negatives: jax.Array, temperature: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """InfoNCE (MoCo, equation 1): the cross entropy of finding a query's key among K others.

  Args:
    q, k: queries and their keys, `[n, d]` float32, unit rows.
    negatives: `[K, d]` for all queries, or `[n, K, d]`, K for each.
    temperature: divides the similarities; above 0.

  Returns:
    The mean over the queries in nats, and the scalar metrics `contrastive_acc` and
    `contrastive_acc5`, how often the key is the first, or among the first five, of 1 + K, and
    `chance_loss`, log(1 + K).
  """
  positive, others = _scores(q, k, negatives, temperature)
  total = jnp.logaddexp(positive, jax.nn.logsumexp(others, axis=1))
  return jnp.mean(total - positive), _rank(positive, others)


def info_nce_in_batch(
  q: jax.Array, k: jax.Array, temperature: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """InfoNCE with the n - 1 other keys of the batch as a query's negatives.

  Args:
    q: `[n, d]` float32, unit rows, which may be sharded.
    k: `[n, d]`, row i belongs to q's row i; whole on every device.
    temperature: divides the similarities; above 0.

  Returns:
    As `info_nce`, with K = n - 1.
  """
  logits = jnp.matmul(q, k.T, precision='highest') / temperature  # [n, n]
  own = jnp.asarray(np.arange(len(q)))
  positive = _pick(logits, own)
  others = jnp.where(own[:, None] == own[None, :], -jnp.inf, logits)
  loss = jnp.mean(jax.nn.logsumexp(logits, axis=1) - positive)
  return loss, {**_rank(positive, others), 'chance_loss': math.log(len(q))}


def nce(
  v: jax.Array,
  positives: jax.Array,
  negatives: jax.Array,
  temperature: float,
  examples: int,
  Z: jax.Array,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
  """Noise-contrastive estimation with a constant normaliser (InstDisc, equations 4 to 7).

  The probability of an image given its feature is P = exp(v f / T) / Z; the loss tells the positive
  from K noise samples, each drawn with probability 1 / N.

  Args:
    v: features `[n, d]`, unit rows.
    positives: the bank's rows of the same images, `[n, d]`.
    negatives: rows drawn uniformly, `[K, d]` or `[n, K, d]`.
    temperature: divides the similarities; above 0.
    examples: N, the size of the data set.
    Z: scalar; 0 when it is not known yet: then it becomes N times the mean of exp(v f / T) over this
      batch, as in the paper's code.

  Returns:
    The loss in nats, summed over the 1 + K decisions and averaged over the images; Z; and metrics as
    `info_nce`, with the `chance_loss` of P = 1 / N for all.
  """
  positive, others = _scores(v, positives, negatives, temperature)  # [n], [n, K]
  K = others.shape[1]
  first = jnp.mean(jnp.exp(jnp.concatenate([positive[:, None], others], axis=1))) * examples
  Z = jax.lax.stop_gradient(jnp.where(Z > 0, Z, first))
  noise, tiny = K / examples, 1e-7
  p, p_others = jnp.exp(positive) / Z, jnp.exp(others) / Z
  data = jnp.log(p / (p + noise + tiny))
  rest = jnp.sum(jnp.log(noise / (p_others + noise + tiny)), axis=1)
  chance = math.log(1 + K) + K * math.log1p(1 / K)
  metrics = {**_rank(positive, others), 'chance_loss': chance}
  return -jnp.mean(data + rest), Z, metrics


def nt_logistic(
  z: jax.Array, temperature: float, semi_hard: bool = False
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """NT-Logistic (SimCLR, table 2): -log sigmoid(u v+ / T) - log sigmoid(-u v- / T).

  As in the paper's comparison (appendix B.10), a negative is a projection of the other view of
  another image. Without mining, the second term is averaged over all n - 1 negatives; with it, it is
  that of the semi-hard negative: the most similar one that is less similar than the positive.

  Args:
    z: projections `[2n, d]`, rows 2i and 2i + 1 of image i, normalised here.
    temperature: divides the similarities; above 0.
    semi_hard: mine negatives. An anchor without a semi-hard one has no second term.

  Returns:
    The mean over the 2n anchors, and the metrics `contrastive_acc_n` and `z` of `nt_xent`.
  """
  positive, similarity, is_negative, metrics = _across(z)
  attract = -jax.nn.log_sigmoid(positive / temperature)
  if semi_hard:
    negative, found = _semi_hard(positive, similarity, is_negative)
    repel = jnp.where(found, -jax.nn.log_sigmoid(-negative / temperature), 0.0)
  else:
    repel = _mean(-jax.nn.log_sigmoid(-similarity / temperature), is_negative)
  return jnp.mean(attract + repel), metrics


def margin_triplet(
  z: jax.Array, margin: float, semi_hard: bool = False
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Margin triplet (SimCLR, table 2): max(u v- - u v+ + margin, 0).

  Negatives as for `nt_logistic`; a semi-hard one is within the margin too, that is, more similar than
  the positive less the margin (Schroff et al. 2015). An anchor without one costs nothing.

  Args:
    z: projections `[2n, d]`, rows 2i and 2i + 1 of image i, normalised here.
    margin: in cosine similarity, at least 0.
    semi_hard: mine negatives, instead of the mean over all.

  Returns:
    The mean over the 2n anchors, and the metrics `contrastive_acc_n` and `z` of `nt_xent`.
  """
  positive, similarity, is_negative, metrics = _across(z)
  if semi_hard:
    negative, found = _semi_hard(positive, similarity, is_negative)
    loss = jnp.where(found, jnp.maximum(negative - positive + margin, 0.0), 0.0)
  else:
    loss = _mean(jnp.maximum(similarity - positive[:, None] + margin, 0.0), is_negative)
  return jnp.mean(loss), metrics


def pairwise_margin(
  z: jax.Array, margin: float, positive_margin: float = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The classic contrastive loss (Hadsell et al. 2006) on the distance D of unit vectors.

  Similar pairs pay max(D - positive_margin, 0)^2, dissimilar ones max(margin - D, 0)^2, averaged over
  an anchor's n - 1 negatives (as for `nt_logistic`). The paper's positive margin is 0.

  Args:
    z: projections `[2n, d]`, rows 2i and 2i + 1 of image i, normalised here.
    margin, positive_margin: Euclidean distances; those of unit vectors go from 0 to 2.

  Returns:
    The mean over the 2n anchors, and the metrics `contrastive_acc_n` and `z` of `nt_xent`.
  """
  positive, similarity, is_negative, metrics = _across(z)

  def distance(s):  # the floor keeps the gradient finite where two vectors coincide
    return jnp.sqrt(jnp.maximum(2 - 2 * s, 1e-12))

  attract = jnp.maximum(distance(positive) - positive_margin, 0.0) ** 2
  repel = _mean(jnp.maximum(margin - distance(similarity), 0.0) ** 2, is_negative)
  return jnp.mean(attract + repel), metrics


def _pairs(z, normalize=True):
  """All similarities `[2n, 2n]` of projections `[2n, d]`, where each row's positive is, and all z."""
  if z.ndim != 2 or z.shape[0] % 2:
    raise ValueError(f'projections of pairs must be [2n, d], got {list(z.shape)}')
  z = z.astype(jnp.float32)
  if normalize:
    z = l2_normalize(z)
  candidates = sharding.replicate(z)  # [2n, d], the step's one all-gather
  similarity = jnp.matmul(z, candidates.T, precision='highest')
  # Constants from numpy: jnp.arange over a sharded axis compiles to integer collectives.
  return similarity, np.arange(len(z)) ^ 1, candidates


def _across(z):
  """Positive similarity `[2n]`, all similarities, which are negatives of the other view; metrics."""
  similarity, positive, candidates = _pairs(z)
  row = jnp.asarray(np.arange(len(positive)))
  other_view = (row[:, None] % 2) != (row[None, :] % 2)
  is_negative = other_view & (row[None, :] != positive[:, None])
  positive_similarity = _pick(similarity, positive)
  best = jnp.max(jnp.where(is_negative, similarity, -2.0), axis=1)
  metrics = {'contrastive_acc_n': jnp.mean(positive_similarity > best), 'z': candidates}
  return positive_similarity, similarity, is_negative, metrics


def _pick(x, column):
  """`x[i, column[i]]`, without a gather over sharded rows."""
  # Vectors are constants of the program; an [n, n] one would be megabytes of it.
  chosen = jnp.asarray(np.arange(x.shape[1]))[None, :] == jnp.asarray(column)[:, None]
  return jnp.sum(jnp.where(chosen, x, 0.0), axis=1)


def _semi_hard(positive, similarity, is_negative):
  below = is_negative & (similarity < positive[:, None])
  hardest = jnp.max(jnp.where(below, similarity, -2.0), axis=1)
  return hardest, below.any(axis=1)


def _mean(x, where):
  return jnp.sum(jnp.where(where, x, 0.0), axis=1) / where.sum(axis=1)


def _scores(q, k, negatives, temperature):
  """Logits of the positives `[n]` and of the negatives `[n, K]`."""
  positive = jnp.sum(q * k, axis=1)
  pattern = 'nd,kd->nk' if negatives.ndim == 2 else 'nd,nkd->nk'
  others = jnp.einsum(pattern, q, jax.lax.stop_gradient(negatives), precision='highest')
  return positive / temperature, others / temperature


def _rank(positive, others):
  ahead = jnp.sum(others >= positive[:, None], axis=1)  # a tie is a miss: so is collapse
  return {
    'contrastive_acc': jnp.mean(ahead == 0),
    'contrastive_acc5': jnp.mean(ahead < 5),
    'chance_loss': math.log(1 + others.shape[1]),
  }


def cross_entropy(logits: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean cross entropy, in nats, and accuracy over the rows of `[n, classes]` whose label is not -1."""
  known = label >= 0
  count = jnp.maximum(known.sum(), 1)
  error = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
  hit = jnp.argmax(logits, axis=-1) == label
  return jnp.sum(error * known) / count, jnp.sum(hit & known) / count


def distillation(
  student: jax.Array, teacher: jax.Array, temperature: float = 1.0, hard: bool = False
) -> jax.Array:
  """How far a student's answers are from its teacher's: cross entropy of the softened softmaxes.

      mean_i  -t^2 sum_y  P_teacher(y | x_i; t) log P_student(y | x_i; t),   P(y | x; t) = softmax(f(x) / t)_y

  The factor t^2, of Hinton et al. 2015 and of SimCLR's code, keeps the size of the gradient.

  Args:
    student, teacher: logits `[n, classes]`; the teacher's get no gradient.
    temperature: t.
    hard: the teacher's best class has probability 1; then only the student is softened.

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
