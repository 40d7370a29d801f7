"""From a recipe to its optimizer and learning-rate schedule."""

import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from simclr_jax.errors import ConfigError

SCHEDULES = ('cosine', 'cosine_by_epoch', 'multistep')


def train_steps(config: ml_collections.ConfigDict, examples: int) -> int:
  """Length of the training: `steps`, or SimCLR's `examples * epochs // batch_size + 1`."""
  return config.steps or examples * config.epochs // config.batch_size + 1


def warmup_steps(config: ml_collections.ConfigDict, examples: int) -> int:
  """Steps in which the learning rate rises: `warmup_epochs * examples // batch_size`."""
  return int(config.warmup_epochs * examples // config.batch_size)


def schedule(config: ml_collections.ConfigDict, examples: int) -> optax.Schedule:
  """The learning rate of each step.

  Its peak is `learning_rate * batch_size / 256` ('linear'), `learning_rate * sqrt(batch_size)`
  ('sqrt') or `learning_rate` itself ('none').

  'cosine' is SimCLR's: linear warm-up, then half a cosine to 0, changing at every step; the very
  first update has rate 0 if there is a warm-up. The other two are MoCo's and change between epochs:
  'cosine_by_epoch' is half a cosine over whole epochs, counted from `schedule_first_epoch`;
  'multistep' multiplies by 0.1 at each of `decay_epochs`.

  Raises:
    ConfigError: every rate would be 0.

  Source: SimCLR's model_util.py (WarmUpAndCosineDecay), MoCo's main_moco.py (adjust_learning_rate).
  """
  scale = {'linear': config.batch_size / 256, 'sqrt': config.batch_size**0.5, 'none': 1.0}
  peak = config.learning_rate * scale[config.learning_rate_scaling]
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
        'schedule_first_epoch=1 makes the last epoch one with learning rate 0, and this run has no '
        'other: set schedule_first_epoch=0 or train for longer'
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
  """What LARS adapts layer by layer: kernels, but not that of a supervised head."""
  return {k: jax.tree.map(lambda p: p.ndim > 1 and k != 'classifier', v) for k, v in params.items()}  # noqa: B023


def build(config: ml_collections.ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
  """The recipe's optimizer.

  'lars' is SimCLR's: layer-wise adaptation leaves out BatchNorm, biases and a supervised head, which get
  plain momentum SGD. 'sgd' and 'nesterov' add the weight decay to the gradient before the momentum.
  'adamw' decays apart from the gradient. `weight_decay_on` says whether BatchNorm and biases are
  decayed too (MoCo: yes). The online probe (`params['probe']`) has an Adam of its own, so that it
  does not depend on the recipe.
  """
  decayed = kernels if config.weight_decay_on == 'kernels' else None
  if config.optimizer == 'lars':
    method = optax.lars(
      rate,
      weight_decay=config.weight_decay,
      weight_decay_mask=decayed or True,
      trust_coefficient=0.001,
      eps=0.0,
      trust_ratio_mask=_adapted,
      momentum=config.momentum,
    )
  elif config.optimizer == 'adamw':
    method = optax.adamw(rate, weight_decay=config.weight_decay, mask=decayed)
  else:
    method = optax.chain(
      optax.add_decayed_weights(config.weight_decay, decayed),
      optax.sgd(rate, momentum=config.momentum, nesterov=config.optimizer == 'nesterov'),
    )

  def part(params):
    return {k: 'probe' if k == 'probe' else 'method' for k in params}

  return optax.partition({'method': method, 'probe': optax.adam(1e-3)}, part)
