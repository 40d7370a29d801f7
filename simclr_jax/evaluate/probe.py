"""The linear probe: a linear classifier trained by SGD on the features of a frozen encoder."""

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
  """A published protocol of the linear probe. All have momentum 0.9, no weight decay and no warm-up.

  Attributes:
    pipeline: augmentation of the training images; test images are preprocessed by the pipeline of the encoder.
    learning_rate: base learning rate, scaled by batch_size / 256.
    batch_size, epochs: batch size and length of the training.
    nesterov: whether the momentum is Nesterov's.
    decays: fractions of the training after which the learning rate is divided by 10; (): cosine decay to 0.
    kernel_std: standard deviation of the initial kernel; the initial bias is 0.
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
  # Chen et al. 2020a, appendix B.6; batch size and epochs are those of the released CIFAR-10 command.
  'simclr': Protocol(
    pipeline='supervised',
    learning_rate=0.1,
    batch_size=512,
    epochs=100,
    nesterov=True,
    decays=(),
    kernel_std=0.0,
  ),
  # He et al. 2020, section 4.1, and MoCo's main_lincls.py.
  'moco': Protocol(
    pipeline='torch_crop(0.08, 1) | flip',
    learning_rate=30.0,
    batch_size=256,
    epochs=100,
    nesterov=False,
    decays=(0.6, 0.8),
    kernel_std=0.01,
  ),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a probe that override its protocol.

  Attributes:
    epochs, batch_size: None: the value of the protocol.
    learning_rates: base learning rates, scaled by batch_size / 256; (): the value of the protocol.
    cached: whether the features are computed once, without augmentation: minutes instead of hours on a CPU.
    seed: seed of the order, the augmentation, the initial kernel and the validation split.
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
  """The linear probe of an encoder in evaluation mode, on all devices.

  With several learning rates, a classifier for each is trained in parallel on the same features. A tenth of the
  training images is then a validation split, and the classifier that is best on this split is tested.

  Args:
    encoder: the encoder to evaluate.
    train, test: labelled images. A batch size larger than `train` is reduced.
    protocol: one of `PROTOCOLS`.
    settings: overrides values of the protocol.
    progress: called with (step, steps, loss) every 50 steps.

  Returns:
    `metrics.classification` on `test` after the last step; with several learning rates, `held_out`, the
    validation accuracy of each; the settings that were used, and the numbers of images.

  Raises:
    ConfigError: an image cannot be read, or `train` is too small for a validation split.
    Stopped: a signal arrived.
  """
  rates = settings.learning_rates or (protocol.learning_rate,)
  classes = max(train.classes, test.classes)
  validation = None
  if len(rates) > 1:
    rest, held_out = hold_out(len(train), HELD_OUT, settings.seed)
    train, validation = train.subset(rest), train.subset(held_out)
  devices = jax.device_count()
  batch_size = min(settings.batch_size or protocol.batch_size, len(train))
  batch_size = max(batch_size - batch_size % devices, devices)
  epochs = settings.epochs or protocol.epochs

  test_h, test_labels = encoder.embed(test)
  heads = _init_heads(test_h.shape[1], classes, len(rates), protocol.kernel_std, settings.seed)
  settings = Settings(epochs, batch_size, rates, settings.cached, settings.seed)
  heads = _fit(encoder, train, heads, protocol, settings, progress)
  best, validated = 0, {}
  if validation is not None:
    h, labels = encoder.embed(validation)
    scores = [metrics.top_k(linear.logits(head, h), labels) for head in heads]
    best, validated = int(np.argmax(scores)), {'held_out': dict(zip(map(str, rates), scores))}
  return {
    **metrics.classification(linear.logits(heads[best], test_h), test_labels),
    **validated,
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


def _fit(encoder, train, heads, protocol, settings, progress):
  """Trains stacked classifiers, one for each of `settings.learning_rates`; returns them as a list, on the host."""
  mesh, batch_size, rates = sharding.make_mesh(), settings.batch_size, settings.learning_rates
  steps = max(settings.epochs * len(train) // batch_size, 1)
  # The momentum does not depend on the learning rate, so one optimizer serves all classifiers.
  optimizer = optax.sgd(protocol.schedule(steps), momentum=0.9, nesterov=protocol.nesterov)
  step = training_step(encoder, protocol, optimizer, rates, batch_size, settings, mesh)
  constants, batches, close = _batches(encoder, train, protocol, batch_size, settings, mesh)
  state = sharding.put_replicated(mesh, (heads, optimizer.init(heads)))
  variables = sharding.put_replicated(mesh, encoder.variables)
  for i in range(steps):
    state, loss = step(state, variables, constants, batches(i))
    preemption.check()
    if progress and (i % 50 == 0 or i + 1 == steps):
      progress(i + 1, steps, float(loss))
  close()
  stacked = jax.device_get(state[0])
  return [{k: v[i] for k, v in stacked.items()} for i in range(len(rates))]


def _batches(encoder, train, protocol, batch_size, settings, mesh):
  """Constants and batches for `training_step`, and a function that stops the loading."""
  if settings.cached:
    h, labels = encoder.embed(train)
    constants = sharding.put_replicated(mesh, {'images': h, 'label': labels})

    def batches(i):
      rows = order.rows(settings.seed, i, batch_size, len(train))
      return sharding.put_batch(mesh, rows)

    return constants, batches, lambda: None
  size = encoder.architecture['image_size']
  images = loader.for_training(train, settings.seed, batch_size, (protocol.pipeline,), size, mesh)
  return images.constants, images, images.close


def training_step(
  encoder: Encoder,
  protocol: Protocol,
  optimizer: optax.GradientTransformation,
  rates: tuple[float, ...],
  batch_size: int,
  settings: Settings,
  mesh: jax.sharding.Mesh,
) -> Callable[..., tuple[PyTree, jax.Array]]:
  """The jitted training step of a probe.

  Args:
    encoder: the frozen encoder; its architecture is compiled, its variables are an argument of the step.
    protocol, settings: augmentation and seed.
    optimizer: with learning rate 1.
    rates: base learning rates, scaled by `batch_size` / 256.
    batch_size: images per step.
    mesh: the devices.

  Returns:
    `step((heads, opt_state), variables, constants, batch) -> ((heads, opt_state), loss)`: `heads` has one
    classifier per rate, stacked; `variables` are those of the encoder; `loss` is that of the first classifier.
  """
  forward = classifier.forward(encoder.architecture)
  size = encoder.architecture['image_size']
  scale = jnp.asarray(rates, jnp.float32) * batch_size / 256

  def losses_of(heads, h, label):
    each = jax.vmap(lambda head: losses.cross_entropy(linear.logits(head, h), label)[0])(heads)
    return each.sum(), each[0]

  def step(state, variables, constants, rows):
    heads, opt_state = state
    batch = loader.with_images(constants, rows)
    h = batch['images']  # the features, if they are cached
    if not settings.cached:
      views = augment.views(
        h, batch['epoch'], batch['position'], (protocol.pipeline,), settings.seed, size,
        batch.get('crops'),
      )  # fmt: skip
      h = jax.lax.stop_gradient(forward(variables, views[:, 0]))
    grads, loss = jax.grad(losses_of, has_aux=True)(heads, h, batch['label'])
    updates, opt_state = optimizer.update(grads, opt_state)
    updates = jax.tree.map(lambda u: u * scale.reshape(-1, *[1] * (u.ndim - 1)), updates)
    return (optax.apply_updates(heads, updates), opt_state), loss

  replicated, by_row = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
  jitted = jax.jit(
    step,
    in_shardings=(replicated, replicated, replicated, by_row),
    out_shardings=replicated,
    donate_argnums=0,
  )

  def run(*args):
    with jax.set_mesh(mesh):
      return jitted(*args)

  return run
