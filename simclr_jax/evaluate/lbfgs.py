"""Multinomial logistic regression on frozen features by L-BFGS (optax) on all devices, for transfer."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simclr_jax import losses, sharding
from simclr_jax.data.labels import hold_out
from simclr_jax.evaluate import metrics
from simclr_jax.runtime import preemption

SWEEP = np.logspace(-6, 5, 45)  # L2 strengths of the transfer protocol: weights of ||W||^2 / 2
STEPS = 100  # largest number of L-BFGS steps per fit
TOLERANCE = 1e-5  # L-BFGS stops if no entry of the gradient of the mean loss is larger


def sweep_l2(
  train: np.ndarray,
  labels: np.ndarray,
  test: np.ndarray,
  validation: float = 0.2,
  seed: int = 0,
  fitted: Callable[[int, bool], None] | None = None,
  every: int = 1,
) -> tuple[np.ndarray, float]:
  """The transfer protocol of SimCLR (appendix B.8): the L2 strength is chosen on a validation split.

  A fraction of each class is held out. The value of `SWEEP` with the highest accuracy on this validation split (the
  strongest, if several are equal) is used to fit the entire training set. With several labels per image, the
  classifiers are one-vs-rest and the criterion is mean average precision.

  Args:
    train, test: features `[n, d]`; they are not standardised.
    labels: classes of the training images, int `[n]`; with several labels per image, bool `[n, C]`.
    validation: fraction of the training images that is held out.
    seed: seed of the validation split.
    fitted: called after each fit with the number of fits, and whether it converged; the last call is for the fit that
      is used.
    every: only every n-th value of `SWEEP` is tried, for features so many that all would take hours.

  Returns:
    Logits of the test images, float32 `[n, C]`, C being the highest training label + 1; and the L2 strength.

  Raises:
    ConfigError: there are too few images for a validation split.
    Stopped: a signal arrived.
  """
  multilabel = labels.ndim == 2
  rest, held_out = hold_out(len(labels), validation, seed, None if multilabel else labels)
  classes = labels.shape[1] if multilabel else int(labels.max()) + 1
  metric = metrics.mean_average_precision if multilabel else metrics.top_k
  weights = SWEEP[::-every]
  converged: list[bool] = []

  def count(done):
    converged.append(done)
    if fitted:
      fitted(len(converged), done)

  scores = [
    metric(logits(w, train[held_out]), labels[held_out])
    for w in path(train[rest], labels[rest], weights, classes, fitted=count)
  ]
  best = int(np.argmax(scores))
  *_, last = path(train, labels, weights[: best + 1], classes, fitted=count)
  return logits(last, test), float(weights[best])


def logits(w: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Logits `[n, C]` of features x `[n, d]`; the last row of w `[d + 1, C]` is the bias."""
  return x @ w[:-1] + w[-1]


def path(
  x: np.ndarray,
  labels: np.ndarray,
  weights: np.ndarray,
  classes: int,
  steps: int = STEPS,
  fitted: Callable[[bool], None] | None = None,
) -> Iterator[np.ndarray]:
  """The regularisation path: each fit starts from the solution of the previous one.

  The objective is the summed cross entropy plus weight ||W||^2 / 2; the bias is not regularised.

  Args:
    x: features `[n, d]`; the rows are split over the devices.
    labels: classes, int `[n]`; or bool `[n, C]`, for C one-vs-rest classifiers.
    weights: L2 strengths, the strongest first.
    classes: C, at least the highest label + 1.
    steps: largest number of L-BFGS steps per fit.
    fitted: called after each fit with whether it converged within `steps`.

  Yields:
    For each weight, float32 `[d + 1, C]`: the kernel, and as the last row, the bias.

  Raises:
    Stopped: a signal arrived.
  """
  mesh = sharding.make_mesh()
  fill = -len(x) % mesh.size
  padded_labels = np.pad(
    labels.astype(np.int32), [(0, fill), (0, 0)][: labels.ndim], constant_values=-1
  )
  padded = {'x': np.pad(np.asarray(x, np.float32), ((0, fill), (0, 0))), 'label': padded_labels}
  rows = sharding.put_batch(mesh, padded)
  w = jnp.zeros((x.shape[1] + 1, classes))
  for weight in weights:
    preemption.check()
    with jax.set_mesh(mesh):
      w, gradient = _minimize(rows, w, jnp.float32(weight), steps)
    if fitted:
      fitted(float(gradient) <= TOLERANCE)
    yield np.asarray(w)


@functools.partial(jax.jit, static_argnames='steps')
def _minimize(rows, start, weight, steps):
  """The solution for one weight, starting from `start`, and the largest entry of its gradient.

  Rows with the label -1 are padding.
  """
  label = rows['label']
  real = label >= 0
  n = jnp.sum(real if label.ndim == 1 else real[:, 0])

  def objective(w):
    z = jnp.matmul(rows['x'], w[:-1], precision='highest') + w[-1]
    if label.ndim == 1:
      mean, _ = losses.cross_entropy(z, label)
    else:
      mean = jnp.sum(optax.sigmoid_binary_cross_entropy(z, label), where=real) / n
    return mean + weight / n * jnp.sum(w[:-1] ** 2) / 2

  solver = optax.lbfgs()
  evaluate = optax.value_and_grad_from_state(objective)

  def unfinished(carry):
    _, _, i, largest = carry
    return (i < steps) & (largest > TOLERANCE)

  def step(carry):
    w, state, i, _ = carry
    value, grad = evaluate(w, state=state)
    updates, state = solver.update(grad, state, w, value=value, grad=grad, value_fn=objective)
    return optax.apply_updates(w, updates), state, i + 1, jnp.abs(grad).max()

  initial = (start, solver.init(start), 0, jnp.float32(jnp.inf))
  w, _, _, largest = jax.lax.while_loop(unfinished, step, initial)
  return w, largest
