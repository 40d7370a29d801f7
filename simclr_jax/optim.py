"""The optimizer and the learning-rate schedule of a recipe."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from simclr_jax.errors import ConfigError

PyTree = Any


def train_steps(config: ml_collections.ConfigDict, examples: int) -> int:
  """Number of training steps: `steps`, or as in SimCLR's code, `examples * epochs // batch_size + 1`."""
  return config.steps or examples * config.epochs // config.batch_size + 1


def warmup_steps(config: ml_collections.ConfigDict, examples: int) -> int:
  """Number of warm-up steps: `warmup_epochs * examples // batch_size`."""
  return int(config.warmup_epochs * examples // config.batch_size)


def peak_rate(config: ml_collections.ConfigDict) -> float:
  """The learning rate after the warm-up: `learning_rate`, scaled as `learning_rate_scaling` says.

  'linear': times batch_size / 256; 'sqrt': times sqrt(batch_size); 'none': not scaled.
  """
  scale = {'linear': config.batch_size / 256, 'sqrt': config.batch_size**0.5, 'none': 1.0}
  return config.learning_rate * scale[config.learning_rate_scaling]


def schedule(config: ml_collections.ConfigDict, examples: int) -> optax.Schedule:
  """The learning-rate schedule of a recipe, with peak `peak_rate`.

  'cosine' (SimCLR) changes at every step: linear warm-up from 0, then cosine decay to 0. 'cosine_by_epoch' and
  'multistep' (MoCo) change at the start of an epoch: cosine decay over the epochs, counted from
  `schedule_first_epoch`; or multiplication by 0.1 at each of `decay_epochs`.

  Args:
    config: a recipe.
    examples: number of training images.

  Returns:
    A function from the step, from 0, to the learning rate, float32.

  Raises:
    ConfigError: the learning rate would be 0 in all steps.

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
        'schedule_first_epoch=1 gives the last epoch a learning rate of 0, and this run has one epoch only: '
        'set schedule_first_epoch=0 or train longer'
      )
  else:
    rates = peak * 0.1 ** sum([(epoch >= e).astype(int) for e in config.decay_epochs], 0 * epoch)
  rates = jnp.asarray(rates, jnp.float32)
  starts = -(
    -epoch[1:] * examples // config.batch_size
  )  # first step of the second, third, ... epoch
  return lambda step: rates[jnp.sum(starts <= step)]


def kernels(params: PyTree) -> PyTree:
  """A mask: True for kernels; False for biases and BatchNorm parameters, which are vectors."""
  return jax.tree.map(lambda p: p.ndim > 1, params)


def _lars_mask(params):
  """True for parameters with the layer-wise adaptation of LARS: kernels, except that of a supervised classifier."""
  return {k: jax.tree.map(lambda p: p.ndim > 1 and k != 'classifier', v) for k, v in params.items()}  # noqa: B023


class Group(NamedTuple):
  """The learning rate of some of the parameters, see `Method.optimizer_groups`.

  Attributes:
    rate_factor: factor on the learning rate of the recipe.
    constant_rate: whether the peak rate is used in every step, without warm-up and decay, as for SimSiam's predictor.
  """

  rate_factor: float = 1.0
  constant_rate: bool = False


def build(
  config: ml_collections.ConfigDict,
  rate: optax.Schedule,
  groups: Mapping[str, Group] | None = None,
) -> optax.GradientTransformation:
  """The optimizer of a recipe.

  'lars' (SimCLR): biases, BatchNorm parameters and a supervised classifier are excluded from the layer-wise
  adaptation and get SGD with momentum. 'sgd' and 'nesterov': the weight decay is added to the gradient before the
  momentum. 'adamw': the weight decay is decoupled from the gradient. With `weight_decay_on='all'` (MoCo), biases and
  BatchNorm parameters have weight decay, too. The online probe, `params['probe']`, has its own Adam with learning
  rate 1e-3, independent of the recipe.

  Args:
    config: a recipe.
    rate: the learning rate, see `schedule`.
    groups: top-level keys of the parameters with their own learning rate -> this learning rate.
  """
  groups = dict(groups or {})
  transforms = {'method': _transform(config, rate), 'probe': optax.adam(1e-3)}
  for key, group in groups.items():
    transforms[key] = _transform(config, _group_schedule(config, rate, group))

  def label(params):
    return {k: k if k == 'probe' or k in groups else 'method' for k in params}

  return optax.partition(transforms, label)


def norms(arrays: Sequence[jax.Array]) -> jax.Array:
  """The L2 norm of each array, float32 `[len(arrays)]`.

  Arrays of equal shape are stacked, so that a GPU does not launch one kernel for each of the hundreds of
  arrays of a ResNet.
  """
  by_shape = collections.defaultdict(list)
  for i, x in enumerate(arrays):
    by_shape[x.shape].append(i)
  sums = [
    jnp.sum(jnp.square(jnp.stack([arrays[i] for i in indices])), axis=range(1, 1 + len(shape)))
    for shape, indices in by_shape.items()
  ]
  order = np.argsort(np.concatenate(list(by_shape.values())))
  return jnp.sqrt(jnp.concatenate(sums)[order])


def _scale_by_trust_ratio(coefficient):
  """`optax.scale_by_trust_ratio`, whose norms are those of `norms`."""

  def update(updates, state, params):
    updates, structure = jax.tree.flatten(updates)
    params = jax.tree.leaves(params)
    u, p = jnp.split(norms([*updates, *params]), [len(updates)])
    ratio = jnp.where((u > 0) & (p > 0), coefficient * p / jnp.where(u > 0, u, 1.0), 1.0)
    return jax.tree.unflatten(
      structure, [x * r for x, r in zip(updates, ratio, strict=True)]
    ), state

  return optax.GradientTransformation(lambda params: optax.ScaleByTrustRatioState(), update)


def continued(opt_state: PyTree, momentum: PyTree, step: int) -> PyTree:
  """The state of SGD with momentum after `step` steps of another program.

  Args:
    opt_state: the initial state of `build`.
    momentum: top-level key of the parameters -> the sum of gradients of each parameter, like PyTorch's
      `momentum_buffer`: buffer = momentum * buffer + gradient, without the learning rate.
    step: number of finished steps.
  """

  def replace(part):
    if isinstance(part, optax.TraceState):
      return optax.TraceState({**part.trace, **momentum})
    if isinstance(part, optax.ScaleByScheduleState):
      return part._replace(count=np.int32(step))
    return part

  kinds = (optax.TraceState, optax.ScaleByScheduleState)
  return jax.tree.map(replace, opt_state, is_leaf=lambda part: isinstance(part, kinds))


def _group_schedule(config, rate, group):
  peak = peak_rate(config)
  return lambda step: group.rate_factor * (peak if group.constant_rate else rate(step))


def _transform(config, rate):
  decayed = kernels if config.weight_decay_on == 'kernels' else None
  if config.optimizer == 'lars':
    return optax.chain(
      optax.add_decayed_weights(config.weight_decay, decayed or True),
      optax.masked(_scale_by_trust_ratio(0.001), _lars_mask),
      optax.scale_by_learning_rate(rate),
      optax.trace(config.momentum),
    )
  if config.optimizer == 'adamw':
    return optax.adamw(rate, weight_decay=config.weight_decay, mask=decayed)
  return optax.chain(
    optax.add_decayed_weights(config.weight_decay, decayed),
    optax.sgd(rate, momentum=config.momentum, nesterov=config.optimizer == 'nesterov'),
  )
