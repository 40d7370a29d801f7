"""Multinomial logistic regression on frozen features: with few labels, and as transfer is measured."""

import functools
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from simclr_jax import losses, sharding, stopping
from simclr_jax.data import labels as subsets
from simclr_jax.evaluate import metrics

REGULARIZATION = 0.01  # times the number of features: the weight of ||W||^2 / 2 for few labels
SWEEP = np.logspace(-6, 5, 45)  # that weight, as the transfer protocol tries it

TOLERANCE = 1e-5  # largest entry of the gradient of the mean loss at which `fits` stops


def standardize(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
  """Features less their mean, divided by their standard deviation, both over `train`; no labels needed."""
  mean, std = train.mean(axis=0), train.std(axis=0) + 1e-6
  return [(x - mean) / std for x in (train, *others)]


def fit(x: np.ndarray, labels: np.ndarray, weight: float, **options) -> LogisticRegression:
  """scikit-learn's L-BFGS fit to x `[n, d]`: summed cross entropy + weight ||W||^2 / 2, the bias free."""
  model = LogisticRegression(C=1 / weight, max_iter=1000, **options)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', ConvergenceWarning)  # at 1,000 iterations the accuracy stands
    return model.fit(x, labels)


def accuracy(
  x: np.ndarray,
  labels: np.ndarray,
  test: np.ndarray,
  test_labels: np.ndarray,
  regularization: float = REGULARIZATION,
) -> float:
  """Accuracy on `test` of `fit` to x `[n, d]`, with weight `regularization` times d."""
  weight = regularization * x.shape[1]
  if len(x) < x.shape[1]:
    # The best W is a combination of the examples, so the fit is the same, and much faster, in
    # orthonormal coordinates of their span.
    span = np.linalg.qr(x.T)[0]  # [d, n]
    x, test = x @ span, test @ span
  # The accuracy does not move below this tolerance, and the time triples.
  return fit(x, labels, weight, tol=1e-2).score(test, test_labels)


def label_efficiency(
  train: np.ndarray,
  train_labels: np.ndarray,
  test: np.ndarray,
  test_labels: np.ndarray,
  labels_per_class: list[int],
  draws: int = 5,
  regularization: float = REGULARIZATION,
) -> list[dict[str, float]]:
  """Test accuracy against the number of labels, on standardised features.

  The same draws are used for every feature set.

  Args:
    train, test: features `[n, d]`.
    train_labels, test_labels: classes `[n]`.
    labels_per_class: the numbers to try.
    draws: random subsets for each number.
    regularization: times d, the weight of ||W||^2 / 2; so the same for any number of features.

  Returns:
    For each number: `labels_per_class`, `mean` and `std` (over the draws, n - 1) of the accuracy.

  Raises:
    ValueError: a class has fewer labels.
  """
  train, test = standardize(train, test)
  fewest = np.unique(train_labels, return_counts=True)[1].min()
  if max(labels_per_class) > fewest:
    raise ValueError(f'a class has {fewest} images, fewer than {max(labels_per_class)}')
  rows = []
  for count in labels_per_class:
    scores = []
    for draw in range(draws):
      stopping.check()
      chosen = subsets.subset(train_labels, count, draw)
      scores.append(
        accuracy(train[chosen], train_labels[chosen], test, test_labels, regularization)
      )
    spread = float(np.std(scores, ddof=1)) if draws > 1 else 0.0
    rows.append({'labels_per_class': count, 'mean': float(np.mean(scores)), 'std': spread})
  return rows


def swept(
  train: np.ndarray, labels: np.ndarray, test: np.ndarray, validation: float = 0.2, seed: int = 0
) -> tuple[np.ndarray, float]:
  """The transfer protocol of SimCLR (appendix B.8): the regularisation is chosen on held-out training images.

  Of each class a part is held out; the weight of `SWEEP` that classifies it best (of several, the
  strongest) is used to fit all of the training set again. With several labels an image, each class is told
  from the rest, and the best weight has the highest mean average precision.

  Args:
    train, test: features `[n, d]`, taken as they are.
    labels: classes `[n]`; or bool `[n, C]`, any number an image.
    validation: the share that is held out.
    seed: of the choice.

  Returns:
    Scores of `test`, `[n, C]` with a column for each class up to the highest, and the weight.
  """
  several = labels.ndim == 2
  order = np.random.default_rng(seed).permutation(len(labels))
  members = [order] if several else [order[labels[order] == c] for c in np.unique(labels)]
  held = np.concatenate([m[: round(validation * len(m))] for m in members])
  if not len(held):
    raise ValueError(f'{len(labels)} images are too few to hold some out')
  rest = np.setdiff1d(np.arange(len(labels)), held)
  classes = labels.shape[1] if several else int(labels.max()) + 1
  weights, measure = SWEEP[::-1], metrics.mean_average_precision if several else metrics.top_k
  path = fits(train[rest], labels[rest], weights, classes)
  found = [measure(logits(w, train[held]), labels[held]) for w in path]
  best = int(np.argmax(found))
  last = list(fits(train, labels, weights[: best + 1], classes))[-1]
  return logits(last, test), float(weights[best])


def logits(w: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Of features x `[n, d]`, `[n, C]`; the last row of w `[d + 1, C]` is the bias."""
  return x @ w[:-1] + w[-1]


def fits(
  x: np.ndarray, labels: np.ndarray, weights: np.ndarray, classes: int, steps: int = 100
) -> Iterator[np.ndarray]:
  """The regressions of `fit` by optax's L-BFGS, on all devices: each begins where the last one ended.

  Args:
    x: features `[n, d]`; the rows are split over the devices.
    labels: int `[n]`, or bool `[n, C]` for C regressions of one class against the rest.
    weights: of the regularisation, the strongest first.
    classes: C, at least the highest label + 1.
    steps: of L-BFGS for each, at most.

  Yields:
    For each weight, float32 `[d + 1, C]`: the kernel and, last, the bias.
  """
  mesh = sharding.make_mesh()
  fill = -len(x) % mesh.size
  rows = {  # a label of -1 counts nothing
    'x': np.pad(np.asarray(x, np.float32), ((0, fill), (0, 0))),
    'label': np.pad(
      labels.astype(np.int32), [(0, fill), (0, 0)][: labels.ndim], constant_values=-1
    ),
  }
  rows = sharding.put_batch(mesh, rows)
  w = jnp.zeros((x.shape[1] + 1, classes))
  for weight in weights:
    stopping.check()
    with jax.set_mesh(mesh):
      w = _minimize(rows, w, jnp.float32(weight), steps)
    yield np.asarray(w)


@functools.partial(jax.jit, static_argnames='steps')
def _minimize(rows, start, weight, steps):
  label = rows['label']
  known = label >= 0
  n = jnp.sum(known if label.ndim == 1 else known[:, 0])

  def objective(w):
    z = jnp.matmul(rows['x'], w[:-1], precision='highest') + w[-1]
    if label.ndim == 1:
      mean, _ = losses.cross_entropy(z, label)
    else:
      mean = jnp.sum(optax.sigmoid_binary_cross_entropy(z, label), where=known) / n
    return mean + weight / n * jnp.sum(w[:-1] ** 2) / 2

  solver = optax.lbfgs()
  evaluate = optax.value_and_grad_from_state(objective)

  def go_on(carry):
    _, _, step, size = carry
    return (step < steps) & (size > TOLERANCE)

  def step(carry):
    w, state, i, _ = carry
    value, grad = evaluate(w, state=state)
    updates, state = solver.update(grad, state, w, value=value, grad=grad, value_fn=objective)
    return optax.apply_updates(w, updates), state, i + 1, jnp.abs(grad).max()

  return jax.lax.while_loop(go_on, step, (start, solver.init(start), 0, jnp.float32(jnp.inf)))[0]
