"""The linear evaluation: a classifier trained by gradient descent on the features of a frozen encoder."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec as P

from simclr_jax import losses, sharding, stopping
from simclr_jax.data import augment, feed, order
from simclr_jax.evaluate import features, metrics
from simclr_jax.models import linear

HELD_OUT = 0.1  # of the training images, to choose a learning rate with


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How a linear classifier is trained. No weight decay, no warm-up, momentum 0.9.

  Attributes:
    pipeline: of the training images; at the test, the encoder's own.
    learning_rate: for each 256 images of the batch.
    batch_size, epochs: their usual values.
    nesterov: the kind of momentum.
    decays: the shares of the training after which the rate falls to a tenth; (): half a cosine to 0.
    kernel_std: of the kernel at the beginning.
  """

  pipeline: str
  learning_rate: float
  batch_size: int
  epochs: int
  nesterov: bool
  decays: tuple[float, ...]
  kernel_std: float

  def schedule(self, steps: int) -> optax.Schedule:
    """The factor on the learning rate, from 1 on."""
    if not self.decays:
      return optax.cosine_decay_schedule(1.0, steps)
    return optax.piecewise_constant_schedule(1.0, {round(steps * at): 0.1 for at in self.decays})


PROTOCOLS = {
  # Chen et al. 2020a, appendix B.6, with the batch and epochs of the released CIFAR-10 command.
  'simclr': Protocol('supervised', 0.1, 512, 100, True, (), 0.0),
  # He et al. 2020, section 4.1, and MoCo's main_lincls.py: rate 30 at a batch of 256.
  'moco': Protocol('torch_crop(0.08, 1) | flip', 30.0, 256, 100, False, (0.6, 0.8), 0.01),
}


def train_linear(
  encoder: features.Encoder,
  train,
  test,
  protocol: Protocol,
  epochs: int | None = None,
  batch_size: int | None = None,
  learning_rates: tuple[float, ...] = (),
  cached: bool = False,
  seed: int = 0,
  report: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
  """The linear evaluation of an encoder, in evaluation mode, on all devices.

  Several learning rates are tried at once, each with a classifier of its own on the same features; then
  a tenth of the training images is held out, and the classifier that is best on it is tested.

  Args:
    encoder: what is evaluated.
    train, test: labelled images.
    protocol: of `PROTOCOLS`.
    epochs, batch_size, learning_rates: instead of the protocol's; a larger batch than the data is cut.
    cached: compute the features once, of uncropped images: minutes instead of hours on a CPU.
    seed: of order, augmentation, the kernel and what is held out.
    report: told (step, steps, loss) now and then.

  Returns:
    `metrics.classification` on `test` after the last step; `learning_rate`; with several, `held_out`,
    the accuracy of each; and the settings.

  Raises:
    RuntimeError: the encoder changed, by a bit of a parameter or of a BatchNorm statistic.
  """
  before = encoder.digest()
  rates = learning_rates or (protocol.learning_rate,)
  classes = max(train.classes, test.classes)
  held = None
  if len(rates) > 1:
    chosen = np.random.default_rng(seed).permutation(len(train))
    cut = max(round(HELD_OUT * len(train)), 1)
    train, held = train.only(np.sort(chosen[cut:])), train.only(np.sort(chosen[:cut]))
  mesh = sharding.make_mesh()
  batch_size = min(batch_size or protocol.batch_size, len(train))
  batch_size = max(batch_size - batch_size % mesh.size, mesh.size)
  epochs = epochs or protocol.epochs
  total = max(epochs * len(train) // batch_size, 1)

  test_h, test_labels = encoder.embed(test)
  heads = _start(test_h.shape[1], classes, len(rates), protocol.kernel_std, seed)
  # The momentum does not depend on the rate, so one optimizer serves all of them.
  optimizer = optax.sgd(protocol.schedule(total), momentum=0.9, nesterov=protocol.nesterov)
  step = _stepper(encoder, protocol.pipeline, optimizer, rates, batch_size, cached, seed, mesh)
  if cached:
    h, labels = encoder.embed(train)
    constants = sharding.put_replicated(mesh, {'images': h, 'label': labels})
    close = None

    def batches(i):
      return sharding.put_batch(mesh, order.rows(seed, i, batch_size, len(train)))
  else:
    size = encoder.architecture['image_size']
    batches = feed.for_training(train, seed, batch_size, (protocol.pipeline,), size, mesh)
    constants, close = batches.constants, batches.close
  state = sharding.put_replicated(mesh, (heads, optimizer.init(heads)))
  variables = sharding.put_replicated(mesh, encoder.variables)
  for i in range(total):
    state, error = step(state, variables, constants, batches(i))
    stopping.check()
    if report and (i % 50 == 0 or i + 1 == total):
      report(i + 1, total, float(error))
  if close:
    close()

  heads = jax.device_get(state[0])
  each = [{k: v[i] for k, v in heads.items()} for i in range(len(rates))]
  found = {}
  best = 0
  if held is not None:
    held_h, held_labels = encoder.embed(held)
    scores = [metrics.top_k(np.asarray(linear.logits(head, held_h)), held_labels) for head in each]
    best, found['held_out'] = int(np.argmax(scores)), dict(zip(map(str, rates), scores))
  if encoder.digest() != before:
    raise RuntimeError('the encoder changed during its evaluation')
  return {
    **metrics.classification(np.asarray(linear.logits(each[best], test_h)), test_labels),
    **found,
    'learning_rate': rates[best],
    'epochs': epochs,
    'batch_size': batch_size,
    'cached': cached,
    'train_images': len(train),
    'test_images': len(test),
  }


def _start(d, classes, count, std, seed):
  """`count` equal classifiers, stacked."""
  kernel = std * jax.random.normal(jax.random.key(seed), (d, classes))
  head = linear.init(d, classes) | {'kernel': kernel}
  return jax.tree.map(lambda x: jnp.stack([x] * count), head)


def _stepper(encoder, pipeline, optimizer, rates, batch_size, cached, seed, mesh):
  """A jitted function: (heads and slots), the encoder's variables, a batch -> the next ones, mean loss."""
  forward = features.make_forward(encoder.architecture)
  size = encoder.architecture['image_size']
  scale = jnp.asarray(rates, jnp.float32) * batch_size / 256

  def losses_of(heads, h, label):
    each = jax.vmap(lambda head: losses.cross_entropy(linear.logits(head, h), label)[0])(heads)
    return each.sum(), each[0]

  def step(state, variables, constants, rows):
    heads, slots = state
    batch = feed.pick(constants, rows)
    h = batch['images']
    if not cached:
      views = augment.views(
        h, batch['epoch'], batch['position'], (pipeline,), seed, size, batch.get('crops')
      )
      h = jax.lax.stop_gradient(forward(variables, views[:, 0]))
    grads, error = jax.grad(losses_of, has_aux=True)(heads, h, batch['label'])
    updates, slots = optimizer.update(grads, slots)
    updates = jax.tree.map(lambda u: u * scale.reshape(-1, *[1] * (u.ndim - 1)), updates)
    return (optax.apply_updates(heads, updates), slots), error

  whole, by_row = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
  jitted = jax.jit(
    step, in_shardings=(whole, whole, whole, by_row), out_shardings=whole, donate_argnums=0
  )

  @functools.wraps(step)
  def run(*args):
    with jax.set_mesh(mesh):
      return jitted(*args)

  return run
