"""The linear probe: a linear classifier trained by SGD on the features of a frozen encoder."""

import dataclasses
import functools
import time
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
from simclr_jax.encoder import Encoder, raw_pixels
from simclr_jax.evaluate import metrics
from simclr_jax.models import classifier, linear
from simclr_jax.runtime import preemption

PyTree = Any
HELD_OUT = 0.2  # share of the training images in the validation split that chooses a learning rate
RATES = tuple(float(r) for r in 10 ** np.arange(-4, 1.1, 0.5))  # of a sweep


@dataclasses.dataclass(frozen=True)
class Protocol:
  """A protocol of the linear probe. All have momentum 0.9, no weight decay and no warm-up.

  Attributes:
    pipeline: augmentation of the training images; test images are preprocessed by the pipeline of the encoder.
    learning_rate: base learning rate, scaled by batch_size / 256; 0: `RATES` are swept.
    batch_size, epochs: batch size and length of the training.
    nesterov: whether the momentum is Nesterov's.
    decays: fractions of the training after which the learning rate is divided by 10; (): cosine decay to 0.
    kernel_std: standard deviation of the initial kernel; the initial bias is 0.
    standardize: whether features are standardised by mean and standard deviation of the training images.
    min_steps: the training is at least this long, unless the user sets the epochs.
  """

  pipeline: str
  learning_rate: float
  batch_size: int
  epochs: int
  nesterov: bool
  decays: tuple[float, ...]
  kernel_std: float
  standardize: bool = False
  min_steps: int = 0

  def schedule(self, steps: int) -> optax.Schedule:
    """The factor on the learning rate, starting from 1."""
    if not self.decays:
      return optax.cosine_decay_schedule(1.0, steps)
    return optax.piecewise_constant_schedule(1.0, {round(steps * at): 0.1 for at in self.decays})


PROTOCOLS = {
  # Ours: SGD that is compared fairly on any features. Long enough to be within a point of L-BFGS.
  'sgd': Protocol(
    pipeline='supervised',
    learning_rate=0.0,
    batch_size=256,
    epochs=20,
    nesterov=True,
    decays=(),
    kernel_std=0.0,
    standardize=True,
    min_steps=3000,
  ),
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


Features = tuple[np.ndarray, np.ndarray]  # features float32 `[n, d]`, labels int32 `[n]`
Progress = Callable[[int, int, float], None]


def train_linear(
  encoder: Encoder | None,
  train: Dataset,
  test: Dataset,
  protocol: Protocol,
  settings: Settings = Settings(),  # noqa: B008  (frozen)
  progress: Progress | None = None,
  features: tuple[Features, Features] | None = None,
) -> dict[str, Any]:
  """The linear probe of an encoder in evaluation mode, on all devices.

  With several learning rates, a classifier for each is trained in parallel on the same features. A fifth of the
  training images is then a validation split. The learning rate of the classifier that is best on this split is used to
  train the final classifier on all training images.

  Standardisation uses the features of the training images without augmentation.

  Args:
    encoder: the encoder to evaluate; None: the raw pixels, which must be `cached`.
    train, test: labelled images. A batch size larger than `train` is reduced.
    protocol: one of `PROTOCOLS`.
    settings: overrides values of the protocol.
    progress: called with (step, steps, loss) every 50 steps; the sweep is included.
    features: features and labels of `train` and of `test`, if they are known already.

  Returns:
    `metrics.classification` on `test` after the last step; with several learning rates, `held_out`, the
    validation accuracy of each; the settings that were used, and the numbers of images. `classifier`: `kernel`,
    float32 `[d, C]`, and `bias`, float32 `[C]`, for features that are not standardised.

  Raises:
    ConfigError: an image cannot be read, or `train` is too small for a validation split.
    Stopped: a signal arrived.
  """
  embed = encoder.embed if encoder else raw_pixels
  x, labels = None, train.labels
  if settings.cached or protocol.standardize:
    x, labels = features[0] if features else embed(train)
  test_h, test_labels = features[1] if features else embed(test)
  settings = _complete(settings, protocol, len(train))
  rates, classes = settings.learning_rates, max(train.classes, test.classes)
  scale = metrics.scaling(x) if x is not None and protocol.standardize else None
  fit = functools.partial(_fit, encoder, protocol=protocol, scale=scale, classes=classes)
  phases, best, validated = (2 if len(rates) > 1 else 1), 0, {}
  if len(rates) > 1:
    rest, held_out = hold_out(len(train), max(HELD_OUT, 1.01 / len(train)), settings.seed)
    validation = (x, labels) if x is not None else embed(train)
    heads = fit(train, x, labels, rest, settings=settings, progress=_phase(progress, 0, phases))
    best, scores = _best(heads, *(part[held_out] for part in validation))
    validated = {'held_out': dict(zip(map(str, rates), scores))}
  chosen = dataclasses.replace(settings, learning_rates=(rates[best],))
  everything = np.arange(len(train))
  last = _phase(progress, phases - 1, phases)
  (head,) = fit(train, x, labels, everything, settings=chosen, progress=last)
  return {
    **metrics.classification(linear.logits(head, test_h), test_labels),
    **validated,
    'learning_rate': rates[best],
    'epochs': settings.epochs,
    'steps': _steps(settings, protocol, len(train)),
    'batch_size': settings.batch_size,
    'cached': settings.cached,
    'standardized': protocol.standardize,
    'train_images': len(train),
    'test_images': len(test),
    'classifier': head,
  }


def rate_warning(features: Features, protocol: Protocol, classes: int, seed: int = 0) -> str:
  """A sentence if the learning rate of a protocol is far from the best one of a quick sweep; otherwise ''.

  The sweep trains 500 steps without augmentation and uses a validation split of the training images.

  Args:
    features: of the training images.
    protocol: a protocol with one learning rate.
    classes: number of classes.
    seed: as in `Settings`.
  """
  x, labels = features
  if len(x) < 10:
    return ''
  own = protocol.learning_rate
  rates = tuple(own * 10.0**power for power in range(-3, 4))
  settings = Settings(batch_size=protocol.batch_size, learning_rates=rates, cached=True, seed=seed)
  settings = _complete(settings, protocol, len(x))
  quick = dataclasses.replace(settings, epochs=max(500 * settings.batch_size // len(x), 1))
  rest, held_out = hold_out(len(x), HELD_OUT, seed)
  heads = _fit(
    None, None, x, labels, rest,
    protocol=protocol, settings=quick, scale=None, classes=classes, progress=None,
  )  # fmt: skip
  best, scores = _best(heads, x[held_out], labels[held_out])
  if scores[best] - scores[3] <= max(0.02, 1 / len(held_out)):
    return ''
  return (
    f'the learning rate {own:g} of the protocol is far from the best one: in a quick sweep on held-out training '
    f'images it has {scores[3]:.1%}, {rates[best]:g} has {scores[best]:.1%}; use --protocol=sgd, or '
    '--learning-rate'
  )


def seconds(d: int, images: int, classes: int, protocol: Protocol, settings: Settings) -> float:
  """About how long the training on cached features takes, measured on 20 steps.

  Args:
    d: number of features.
    images: number of training images.
    classes: number of classes.
    protocol, settings: as for `train_linear`.
  """
  settings = _complete(settings, protocol, images)
  steps = _steps(settings, protocol, images) * (2 if len(settings.learning_rates) > 1 else 1)
  n = settings.batch_size or images
  x, labels = np.zeros((n, d), np.float32), np.zeros(n, np.int32)
  times: list[float] = []
  _fit(
    None, None, x, labels, np.arange(n), protocol=protocol, scale=None, classes=classes,
    settings=dataclasses.replace(settings, epochs=21, cached=True),
    progress=lambda *_: times.append(time.monotonic()),  # after the first step, which compiles, and the last
  )  # fmt: skip
  return (times[-1] - times[0]) / 20 * steps


def _folded(head, scale):
  """The classifier of features that are not standardised, which gives the same logits."""
  mean, inverse = (part.astype(np.float64) for part in scale)
  kernel = head['kernel'] * inverse[:, None]
  return {'kernel': np.float32(kernel), 'bias': np.float32(head['bias'] - mean @ kernel)}


def _complete(settings, protocol, images):
  """The settings with the values of the protocol where nothing else is set."""
  # The batch does not depend on the devices: one that they cannot share equally is trained on fewer.
  batch_size = min(settings.batch_size or protocol.batch_size, images)
  shortest = -(-protocol.min_steps * batch_size // images)
  epochs = settings.epochs or max(protocol.epochs, shortest)
  published = (protocol.learning_rate,) if protocol.learning_rate else RATES
  rates = settings.learning_rates or published
  return Settings(epochs, batch_size, rates, settings.cached, settings.seed)


def _steps(settings, protocol, images):
  return max(settings.epochs * images // settings.batch_size, 1)


def _phase(progress, phase, phases):
  """`progress` of one of several trainings of equal length."""
  return progress and (
    lambda step, steps, loss: progress(phase * steps + step, phases * steps, loss)
  )


def _best(heads, x, labels):
  """The index of the best head, and the accuracies of all.

  The highest accuracy counts, of equal ones the lowest loss. In a long sweep, an accuracy is averaged with those of the
  neighbouring learning rates: the curve is smooth, but few validation images make it noisy.
  """
  logits = [linear.logits(head, x) for head in heads]
  scores = [metrics.top_k(z, labels) for z in logits]
  each = [float(losses.cross_entropy(jnp.asarray(z), labels)[0]) for z in logits]
  smooth = scores
  if len(scores) >= 5:
    padded = np.pad(scores, 1, mode='edge')
    smooth = [float(s) for s in (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4]
  order = [(score, -loss if np.isfinite(loss) else -np.inf) for score, loss in zip(smooth, each)]
  return max(range(len(heads)), key=lambda i: order[i]), scores


def _init_heads(d, classes, count, std, seed):
  """`count` equal classifiers, stacked."""
  kernel = std * jax.random.normal(jax.random.key(seed), (d, classes))
  head = linear.init(d, classes) | {'kernel': kernel}
  return jax.tree.map(lambda x: jnp.stack([x] * count), head)


def _fit(encoder, train, x, labels, rows, *, protocol, settings, scale, classes, progress):
  """Trains a classifier for each of `settings.learning_rates`.

  Args:
    encoder, train: unused if the features are cached.
    x, labels: features and labels of the training images; x may be None if the features are not cached.
    rows: indices of the training images to train on.
    protocol, settings: as for `train_linear`; the settings are complete.
    scale: see `metrics.scaling`; None: the features are used as they are.
    classes: number of classes.
    progress: as for `train_linear`.

  Returns:
    The classifiers as a list, on the host, for features that are not standardised.
  """
  rates, batch_size = settings.learning_rates, min(settings.batch_size, len(rows))
  mesh = sharding.make_mesh(sharding.devices_for(batch_size))
  steps = max(settings.epochs * len(rows) // batch_size, 1)
  # The momentum does not depend on the learning rate, so one optimizer serves all classifiers.
  optimizer = optax.sgd(protocol.schedule(steps), momentum=0.9, nesterov=protocol.nesterov)
  step = training_step(encoder, protocol, optimizer, rates, batch_size, settings, mesh, scale)
  if settings.cached:
    constants, batches, close = _cached(x[rows], labels[rows], batch_size, settings.seed, mesh)
    d, variables = x.shape[1], {}
  else:
    size = encoder.architecture['image_size']
    images = loader.for_training(
      train.subset(rows) if len(rows) < len(train) else train,
      settings.seed, batch_size, (protocol.pipeline,), size, mesh,
    )  # fmt: skip
    constants, batches, close = images.constants, images, images.close
    d, variables = encoder.embed(train.subset(rows[:1]))[0].shape[1], encoder.variables
  heads = _init_heads(d, classes, len(rates), protocol.kernel_std, settings.seed)
  state = sharding.put_replicated(mesh, (heads, optimizer.init(heads)))
  variables = sharding.put_replicated(mesh, variables)
  try:
    for i in range(steps):
      state, loss = step(state, variables, constants, batches(i))
      preemption.check()
      if i % 50 == 0 or i + 1 == steps:
        value = float(loss)  # waits: the host must not be thousands of steps ahead of the devices
        if progress:
          progress(i + 1, steps, value)
  finally:
    close()
  stacked = jax.device_get(state[0])
  heads = [{k: v[i] for k, v in stacked.items()} for i in range(len(rates))]
  return [_folded(head, scale) for head in heads] if scale else heads


def _cached(x, labels, batch_size, seed, mesh):
  """Constants and batches of features for `training_step`, and a function that does nothing."""
  constants = sharding.put_replicated(mesh, {'images': x, 'label': labels})

  def batches(i):
    return sharding.put_batch(mesh, order.rows(seed, i, batch_size, len(x)))

  return constants, batches, lambda: None


def training_step(
  encoder: Encoder | None,
  protocol: Protocol,
  optimizer: optax.GradientTransformation,
  rates: tuple[float, ...],
  batch_size: int,
  settings: Settings,
  mesh: jax.sharding.Mesh,
  scale: tuple[np.ndarray, np.ndarray] | None = None,
) -> Callable[..., tuple[PyTree, jax.Array]]:
  """The jitted training step of a probe.

  Args:
    encoder: the frozen encoder; its architecture is compiled, its variables are an argument of the step. Unused if
      the features are cached.
    protocol, settings: augmentation and seed.
    optimizer: with learning rate 1.
    rates: base learning rates, scaled by `batch_size` / 256.
    batch_size: images per step.
    mesh: the devices.
    scale: standardises the features, see `metrics.scaling`.

  Returns:
    `step((heads, opt_state), variables, constants, batch) -> ((heads, opt_state), loss)`: `heads` has one
    classifier per rate, stacked; `variables` are those of the encoder; `loss` is that of the first classifier.
  """
  if encoder and not settings.cached:
    forward = classifier.forward(encoder.architecture)
    size = encoder.architecture['image_size']
  factors = jnp.asarray(rates, jnp.float32) * batch_size / 256

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
    if scale is not None:
      h = (h - scale[0]) * scale[1]
    grads, loss = jax.grad(losses_of, has_aux=True)(heads, h, batch['label'])
    updates, opt_state = optimizer.update(grads, opt_state)
    updates = jax.tree.map(lambda u: u * factors.reshape(-1, *[1] * (u.ndim - 1)), updates)
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
