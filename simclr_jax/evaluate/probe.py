"""Linear classifiers on frozen features, trained by gradient descent."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from simclr_jax import sharding
from simclr_jax.data import augment, feed, order
from simclr_jax.evaluate import features

PyTree = Any


def init(d: int, classes: int) -> PyTree:
  """A classifier of zeros: kernel `[d, classes]` and bias."""
  return {'kernel': jnp.zeros((d, classes)), 'bias': jnp.zeros((classes,))}


def loss(head: PyTree, h: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cross entropy and accuracy over the rows of h `[n, d]` whose label `[n]` is not -1."""
  return cross_entropy(h @ head['kernel'] + head['bias'], label)


def cross_entropy(logits: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean cross entropy and accuracy over the rows of logits `[n, classes]` whose label is not -1."""
  known = label >= 0
  count = jnp.maximum(known.sum(), 1)
  error = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
  hit = jnp.argmax(logits, axis=-1) == label
  return jnp.sum(error * known) / count, jnp.sum(hit & known) / count


def online_loss(head: PyTree, h: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`loss` for a probe that trains along with the encoder and must not touch it."""
  return loss(head, jax.lax.stop_gradient(h.astype(jnp.float32)), label)


def linear(
  encoder: features.Encoder,
  train,
  test,
  epochs: int = 100,
  batch_size: int = 512,
  learning_rate: float = 0.1,
  cached: bool = False,
  seed: int = 0,
  report: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
  """SimCLR's linear evaluation (appendix B.6): Nesterov SGD on the encoder's features.

  Momentum 0.9, learning rate `learning_rate * batch_size / 256` on half a cosine, no weight decay, no
  warm-up; training images are randomly cropped and flipped. The encoder stays in evaluation mode and
  is compared with itself, bit by bit, at the end.

  Args:
    encoder: what is evaluated.
    train, test: labelled images.
    epochs, batch_size, learning_rate: of the training; a larger batch than the data is cut.
    cached: compute the features once, of uncropped images: minutes instead of hours on a CPU.
    seed: of order and augmentation.
    report: told (step, steps, loss) now and then.

  Returns:
    `top1`, the accuracy on `test` after the last step; `train_top1`, of the last batch; and the
    settings.

  Raises:
    RuntimeError: the encoder changed.
  """
  before = encoder.digest()
  classes = max(train.classes, test.classes)
  batch_size = min(batch_size, len(train))
  total = max(epochs * len(train) // batch_size, 1)
  peak = learning_rate * batch_size / 256
  optimizer = optax.sgd(optax.cosine_decay_schedule(peak, total), momentum=0.9, nesterov=True)
  forward = features.make_forward(encoder.architecture)
  size = encoder.architecture['image_size']
  pipelines = ('supervised',)

  @jax.jit
  def step(head, slots, variables, constants, rows):
    batch = feed.pick(constants, rows)
    h = batch['images']
    if not cached:
      views = augment.views(
        h, batch['epoch'], batch['position'], pipelines, seed, size, batch.get('crops')
      )
      h = forward(variables, views[:, 0])
    gradient = jax.value_and_grad(loss, has_aux=True)
    (error, accuracy), grads = gradient(head, h, batch['label'])
    updates, slots = optimizer.update(grads, slots)
    return optax.apply_updates(head, updates), slots, error, accuracy

  test_h, test_labels = encoder.embed(test)
  head = init(test_h.shape[1], classes)
  slots = optimizer.init(head)
  if cached:
    h, labels = encoder.embed(train)
    constants = {'images': jnp.asarray(h), 'label': jnp.asarray(labels)}
    batches = functools.partial(order.rows, seed, batch_size=batch_size, examples=len(train))
  else:
    mesh = sharding.make_mesh(jax.local_devices()[:1])
    batches = feed.for_training(train, seed, batch_size, pipelines, size, mesh)
    constants = batches.constants
  for i in range(total):
    head, slots, error, accuracy = step(head, slots, encoder.variables, constants, batches(i))
    if report and (i % 50 == 0 or i + 1 == total):
      report(i + 1, total, float(error))
  if not cached:
    batches.close()
  _, top1 = jax.jit(loss)(head, test_h, jnp.asarray(test_labels))
  if encoder.digest() != before:
    raise RuntimeError('the encoder changed during its evaluation')
  return {
    'top1': float(top1),
    'train_top1': float(accuracy),
    'epochs': epochs,
    'batch_size': batch_size,
    'learning_rate': learning_rate,
    'cached': cached,
    'train_images': len(train),
    'test_images': len(test),
  }
