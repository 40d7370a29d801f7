"""Multinomial logistic regression on frozen features by optax's L-BFGS, on all devices: how transfer is measured."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simclr_jax import losses, sharding
from simclr_jax.data.labels import hold_out
from simclr_jax.evaluate import metrics
from simclr_jax.runtime import preemption

SWEEP = np.logspace(-6, 5, 45)  # weights of ||W||^2 / 2 that the transfer protocol tries
TOLERANCE = 1e-5  # largest entry of the gradient of the mean loss at which `path` stops


def sweep_l2(
  train: np.ndarray, labels: np.ndarray, test: np.ndarray, validation: float = 0.2, seed: int = 0
) -> tuple[np.ndarray, float]:
  """The transfer protocol of SimCLR (appendix B.8): the L2 strength is chosen on a validation split.

  A share of each class is held out; the weight of `SWEEP` with the best accuracy on this split (of equal ones, the
  strongest) is used to fit the whole training set again. With several labels per image, each class is classified
  against the rest, and the best weight has the highest mean average precision.

  Args:
    train, test: features `[n, d]`, not standardised here.
    labels: classes `[n]`; or bool `[n, C]`, any number per image.
    validation: the share that is held out.
    seed: of the choice.

  Returns:
    Scores of `test`, `[n, C]` with a column for each class up to the highest, and the weight.
  """
  multilabel = labels.ndim == 2
  rest, held = hold_out(len(labels), validation, seed, None if multilabel else labels)
  classes = labels.shape[1] if multilabel else int(labels.max()) + 1
  weights, measure = SWEEP[::-1], metrics.mean_average_precision if multilabel else metrics.top_k
  scores = [
    measure(logits(w, train[held]), labels[held])
    for w in path(train[rest], labels[rest], weights, classes)
  ]
  best = int(np.argmax(scores))
  *_, last = path(train, labels, weights[: best + 1], classes)
  return logits(last, test), float(weights[best])


def logits(w: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Of features x `[n, d]`, `[n, C]`; the last row of w `[d + 1, C]` is the bias."""
  return x @ w[:-1] + w[-1]


def path(
  x: np.ndarray, labels: np.ndarray, weights: np.ndarray, classes: int, steps: int = 100
) -> Iterator[np.ndarray]:
  """The regularisation path: each regression starts from the solution of the one before it.

  Args:
    x: features `[n, d]`; the rows are split over the devices.
    labels: int `[n]`, or bool `[n, C]` for C regressions of one class against the rest.
    weights: of ||W||^2 / 2, with the summed cross entropy; the strongest first.
    classes: C, at least the highest label + 1.
    steps: of L-BFGS for each, at most.

  Yields:
    For each weight, float32 `[d + 1, C]`: the kernel and, last, the bias.
  """
  mesh = sharding.make_mesh()
  fill = -len(x) % mesh.size
  rows = {  # rows with the label -1 are ignored
    'x': np.pad(np.asarray(x, np.float32), ((0, fill), (0, 0))),
    'label': np.pad(
      labels.astype(np.int32), [(0, fill), (0, 0)][: labels.ndim], constant_values=-1
    ),
  }
  rows = sharding.put_batch(mesh, rows)
  w = jnp.zeros((x.shape[1] + 1, classes))
  for weight in weights:
    preemption.check()
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

  def unfinished(carry):
    _, _, step, size = carry
    return (step < steps) & (size > TOLERANCE)

  def step(carry):
    w, state, i, _ = carry
    value, grad = evaluate(w, state=state)
    updates, state = solver.update(grad, state, w, value=value, grad=grad, value_fn=objective)
    return optax.apply_updates(w, updates), state, i + 1, jnp.abs(grad).max()

  return jax.lax.while_loop(unfinished, step, (start, solver.init(start), 0, jnp.float32(jnp.inf)))[
    0
  ]
