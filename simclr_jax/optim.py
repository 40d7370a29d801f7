"""From a recipe to its optimizer and learning-rate schedule."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from simclr_jax.errors import ConfigError


def train_steps(config: ml_collections.ConfigDict, examples: int) -> int:
  """Length of the training: `steps`, or SimCLR's `examples * epochs // batch_size + 1`."""
  return config.steps or examples * config.epochs // config.batch_size + 1


def warmup_steps(config: ml_collections.ConfigDict, examples: int) -> int:
  """Steps of the warm-up: `warmup_epochs * examples // batch_size`."""
  return int(config.warmup_epochs * examples // config.batch_size)


def peak_rate(config: ml_collections.ConfigDict) -> float:
  """`learning_rate * batch_size / 256` ('linear'), `learning_rate * sqrt(batch_size)` ('sqrt') or
  `learning_rate` itself ('none')."""
  scale = {'linear': config.batch_size / 256, 'sqrt': config.batch_size**0.5, 'none': 1.0}
  return config.learning_rate * scale[config.learning_rate_scaling]


def schedule(config: ml_collections.ConfigDict, examples: int) -> optax.Schedule:
  """The learning rate of each step.

  The peak is `peak_rate`.

  'cosine' is SimCLR's: linear warm-up, then half a cosine to 0, changing at every step; the very
  first update has rate 0 if there is a warm-up. The other two are MoCo's and change between epochs:
  'cosine_by_epoch' is half a cosine over whole epochs, counted from `schedule_first_epoch`;
  'multistep' multiplies by 0.1 at each of `decay_epochs`.

  Raises:
    ConfigError: every rate would be 0.

  Source: SimCLR's model_util.py (WarmUpAndCosineDecay), MoCo's main_moco.py (adjust_learning_rate).
  """
  peak = peak_rate(config)
  total = train_steps(config, examples)
  if config.schedule == 'cosine':
    warmup = warmup_steps(config, examples)
    cosine = optax.cosine_decay_schedule(peak, max(total - warmup, 1))
    if not warmup:
      return cosine
    return optax.join_schedules([lambda step: step / warmup * peak, cosine], [warmup])

  epochs = math.ceil(total * config.batch_size / examples) if config.steps else config.epochs
  epoch = np.arange(epochs + 1)
  if config.schedule == 'cosine_by_epoch':
    rates = peak * 0.5 * (1 + np.cos(np.pi * (epoch + config.schedule_first_epoch) / epochs))
    rates = np.where(epoch + config.schedule_first_epoch < epochs, rates, 0.0)
    if not rates[:-1].any():
      raise ConfigError(
        'schedule_first_epoch=1 gives the last epoch a learning rate of 0, and this run has only one '
        'epoch: set schedule_first_epoch=0 or train longer'
      )
  else:
    rates = peak * 0.1 ** sum([(epoch >= e).astype(int) for e in config.decay_epochs], 0 * epoch)
  rates = jnp.asarray(rates, jnp.float32)
  starts = -(-epoch[1:] * examples // config.batch_size)  # first step of each epoch but the first
  return lambda step: rates[jnp.searchsorted(starts, step, side='right')]


def kernels(params):
  """True for kernels, False for biases and BatchNorm parameters, which are all vectors."""
  return jax.tree.map(lambda p: p.ndim > 1, params)


def _adapted(params):
  """True for what LARS adapts layer by layer: kernels, except that of a supervised head."""
  return {k: jax.tree.map(lambda p: p.ndim > 1 and k != 'classifier', v) for k, v in params.items()}  # noqa: B023


class Group(NamedTuple):
  """The learning rate of a part of the parameters, see `Method.optimizer_groups`.

  Attributes:
    rate_factor: times the learning rate of the recipe.
    constant_rate: the peak rate in every step, without warm-up and decay, as SimSiam's predictor has.
  """

  rate_factor: float = 1.0
  constant_rate: bool = False


def build(
  config: ml_collections.ConfigDict,
  rate: optax.Schedule,
  groups: Mapping[str, Group] | None = None,
) -> optax.GradientTransformation:
  """The recipe's optimizer.

  'lars' is SimCLR's: layer-wise adaptation excludes BatchNorm, biases and a supervised head, which get
  plain momentum SGD. 'sgd' and 'nesterov' add the weight decay to the gradient before the momentum.
  'adamw' decouples the decay from the gradient. With `weight_decay_on='all'` (MoCo), BatchNorm parameters and biases
  are decayed too. The online probe (`params['probe']`) has an Adam of its own, so that it
  does not depend on the recipe.

  Args:
    config: a recipe.
    rate: its learning rate, `schedule`.
    groups: top-level key of the parameters -> its learning rate, where it is not that of the recipe.
  """
  groups = dict(groups or {})
  transforms = {'method': _transform(config, rate), 'probe': optax.adam(1e-3)}
  for key, group in groups.items():
    transforms[key] = _transform(config, _group_schedule(config, rate, group))

  def part(params):
    return {k: k if k == 'probe' or k in groups else 'method' for k in params}

  return optax.partition(transforms, part)


def _group_schedule(config, rate, group):
  peak = peak_rate(config)
  return lambda step: group.rate_factor * (peak if group.constant_rate else rate(step))


def _transform(config, rate):
  decayed = kernels if config.weight_decay_on == 'kernels' else None
  if config.optimizer == 'lars':
    return optax.lars(
      rate,
      weight_decay=config.weight_decay,
      weight_decay_mask=decayed or True,
      trust_coefficient=0.001,
      eps=0.0,
      trust_ratio_mask=_adapted,
      momentum=config.momentum,
    )
  if config.optimizer == 'adamw':
    return optax.adamw(rate, weight_decay=config.weight_decay, mask=decayed)
  return optax.chain(
    optax.add_decayed_weights(config.weight_decay, decayed),
    optax.sgd(rate, momentum=config.momentum, nesterov=config.optimizer == 'nesterov'),
  )
