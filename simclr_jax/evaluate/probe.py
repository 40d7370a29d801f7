"""The linear evaluation: a classifier trained by SGD on the features of a frozen encoder."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec as P

from simclr_jax import losses, sharding
from simclr_jax.data import Dataset, augment, loader, order
from simclr_jax.data.labels import hold_out
from simclr_jax.encoder import Encoder
from simclr_jax.evaluate import metrics
from simclr_jax.models import classifier, linear
from simclr_jax.runtime import preemption

PyTree = Any
HELD_OUT = 0.1  # share of the training images in the validation split that chooses a learning rate


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How a linear classifier is trained. No weight decay, no warm-up, momentum 0.9.

  Attributes:
    pipeline: augmentation of the training images; test images use the pipeline of the encoder.
    learning_rate: per 256 images of the batch.
    batch_size, epochs: the published values.
    nesterov: Nesterov momentum.
    decays: shares of the training after which the rate is divided by 10; (): cosine decay to 0.
    kernel_std: standard deviation of the initial kernel.
  """

  pipeline: str
  learning_rate: float
  batch_size: int
  epochs: int
  nesterov: bool
  decays: tuple[float, ...]
  kernel_std: float

  def schedule(self, steps: int) -> optax.Schedule:
    """The factor on the learning rate, starting from 1."""
    if not self.decays:
      return optax.cosine_decay_schedule(1.0, steps)
    return optax.piecewise_constant_schedule(1.0, {round(steps * at): 0.1 for at in self.decays})


PROTOCOLS = {
  # Chen et al. 2020a, appendix B.6, with the batch and epochs of the released CIFAR-10 command.
  'simclr': Protocol('supervised', 0.1, 512, 100, True, (), 0.0),
  # He et al. 2020, section 4.1, and MoCo's main_lincls.py: rate 30 at a batch of 256.
  'moco': Protocol('torch_crop(0.08, 1) | flip', 30.0, 256, 100, False, (0.6, 0.8), 0.01),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a probe is trained, where it differs from the protocol.

  Attributes:
    epochs, batch_size: None: those of the protocol.
    learning_rates: per 256 images of the batch; several are trained in parallel; (): that of the protocol.
    cached: the features are computed once, of uncropped images: minutes instead of hours on a CPU.
    seed: of order, augmentation, the kernel and the validation split.
  """

  epochs: int | None = None
  batch_size: int | None = None
  learning_rates: tuple[float, ...] = ()
  cached: bool = False
  seed: int = 0


def train_linear(
  encoder: Encoder,
  train: Dataset,
  test: Dataset,
  protocol: Protocol,
  settings: Settings = Settings(),  # noqa: B008  (frozen)
  progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
  """The linear evaluation of an encoder, in evaluation mode, on all devices.

  Several learning rates are trained in parallel, each with a classifier of its own on the same features; then
  a tenth of the training images is a validation split, and the classifier that is best on it is tested.

  Args:
    encoder: what is evaluated.
    train, test: labelled images. A batch size larger than `train` is reduced.
    protocol: of `PROTOCOLS`.
    settings: other values than those of the protocol.
    progress: called with (step, steps, loss) every 50 steps.

  Returns:
    `metrics.classification` on `test` after the last step; `learning_rate`; with several, `held_out`,
    the validation accuracy of each; and the settings.
  """
  rates = settings.learning_rates or (protocol.learning_rate,)
  classes, seed = max(train.classes, test.classes), settings.seed
  validation = None
  if len(rates) > 1:
    rest, held_out = hold_out(len(train), HELD_OUT, seed)
    train, validation = train.subset(rest), train.subset(held_out)
  mesh = sharding.make_mesh()
  batch_size = min(settings.batch_size or protocol.batch_size, len(train))
  batch_size = max(batch_size - batch_size % mesh.size, mesh.size)
  epochs = settings.epochs or protocol.epochs
  total = max(epochs * len(train) // batch_size, 1)

  test_h, test_labels = encoder.embed(test)
  heads = _init_heads(test_h.shape[1], classes, len(rates), protocol.kernel_std, seed)
  # The momentum does not depend on the rate, so one optimizer serves all of them.
  optimizer = optax.sgd(protocol.schedule(total), momentum=0.9, nesterov=protocol.nesterov)
  step = training_step(encoder, protocol, optimizer, rates, batch_size, settings, mesh)
  constants, batches, close = _batches(encoder, train, protocol, batch_size, settings, mesh)
  state = sharding.put_replicated(mesh, (heads, optimizer.init(heads)))
  variables = sharding.put_replicated(mesh, encoder.variables)
  for i in range(total):
    state, error = step(state, variables, constants, batches(i))
    preemption.check()
    if progress and (i % 50 == 0 or i + 1 == total):
      progress(i + 1, total, float(error))
  close()

  stacked = jax.device_get(state[0])
  heads = [{k: v[i] for k, v in stacked.items()} for i in range(len(rates))]
  best, chosen = 0, {}
  if validation is not None:
    h, labels = encoder.embed(validation)
    scores = [metrics.top_k(np.asarray(linear.logits(head, h)), labels) for head in heads]
    best, chosen = int(np.argmax(scores)), {'held_out': dict(zip(map(str, rates), scores))}
  return {
    **metrics.classification(np.asarray(linear.logits(heads[best], test_h)), test_labels),
    **chosen,
    'learning_rate': rates[best],
    'epochs': epochs,
    'batch_size': batch_size,
    'cached': settings.cached,
    'train_images': len(train),
    'test_images': len(test),
  }


def _init_heads(d, classes, count, std, seed):
  """`count` equal classifiers, stacked."""
  kernel = std * jax.random.normal(jax.random.key(seed), (d, classes))
  head = linear.init(d, classes) | {'kernel': kernel}
  return jax.tree.map(lambda x: jnp.stack([x] * count), head)


def _batches(encoder, train, protocol, batch_size, settings, mesh):
  """Constants and batches for `training_step`, and a function that ends the loading."""
  if settings.cached:
    h, labels = encoder.embed(train)
    constants = sharding.put_replicated(mesh, {'images': h, 'label': labels})

    def batches(i):
      rows = order.rows(settings.seed, i, batch_size, len(train))
      return sharding.put_batch(mesh, rows)

    return constants, batches, lambda: None
  size = encoder.architecture['image_size']
  loaded = loader.for_training(train, settings.seed, batch_size, (protocol.pipeline,), size, mesh)
  return loaded.constants, loaded, lambda: loaded.close()


def training_step(
  encoder: Encoder,
  protocol: Protocol,
  optimizer: optax.GradientTransformation,
  rates: tuple[float, ...],
  batch_size: int,
  settings: Settings,
  mesh: jax.sharding.Mesh,
) -> Callable[..., tuple[PyTree, jax.Array]]:
  """A jitted function `(heads and optimizer state, variables of the encoder, constants, batch)` -> `(the next heads
  and optimizer state, mean loss of the first head)`."""
  forward = classifier.forward(encoder.architecture)
  size = encoder.architecture['image_size']
  scale = jnp.asarray(rates, jnp.float32) * batch_size / 256

  def losses_of(heads, h, label):
    each = jax.vmap(lambda head: losses.cross_entropy(linear.logits(head, h), label)[0])(heads)
    return each.sum(), each[0]

  def step(state, variables, constants, rows):
    heads, slots = state
    batch = loader.with_images(constants, rows)
    h = batch['images']
    if not settings.cached:
      views = augment.views(
        h, batch['epoch'], batch['position'], (protocol.pipeline,), settings.seed, size,
        batch.get('crops'),
      )  # fmt: skip
      h = jax.lax.stop_gradient(forward(variables, views[:, 0]))
    grads, error = jax.grad(losses_of, has_aux=True)(heads, h, batch['label'])
    updates, slots = optimizer.update(grads, slots)
    updates = jax.tree.map(lambda u: u * scale.reshape(-1, *[1] * (u.ndim - 1)), updates)
    return (optax.apply_updates(heads, updates), slots), error

  whole, by_row = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
  jitted = jax.jit(
    step, in_shardings=(whole, whole, whole, by_row), out_shardings=whole, donate_argnums=0
  )

  def run(*args):
    with jax.set_mesh(mesh):
      return jitted(*args)

  return run
