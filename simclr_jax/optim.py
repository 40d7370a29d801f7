"""From a recipe to its optimizer and learning-rate schedule."""

import jax
import ml_collections
import optax


def train_steps(config: ml_collections.ConfigDict, examples: int) -> int:
  """Length of the training: `steps`, or SimCLR's `examples * epochs // batch_size + 1`."""
  return config.steps or examples * config.epochs // config.batch_size + 1


def warmup_steps(config: ml_collections.ConfigDict, examples: int) -> int:
  """Steps in which the learning rate rises: `warmup_epochs * examples // batch_size`."""
  return int(config.warmup_epochs * examples // config.batch_size)


def schedule(config: ml_collections.ConfigDict, examples: int) -> optax.Schedule:
  """Linear warm-up to the scaled learning rate, then half a cosine to 0.

  The peak is `learning_rate * batch_size / 256` ('linear'), `learning_rate * sqrt(batch_size)`
  ('sqrt') or `learning_rate` itself ('none'). The very first update has rate 0 if there is a warm-up.

  Source: SimCLR's model_util.py (WarmUpAndCosineDecay).
  """
  scale = {'linear': config.batch_size / 256, 'sqrt': config.batch_size**0.5, 'none': 1.0}
  peak = config.learning_rate * scale[config.learning_rate_scaling]
  warmup, total = warmup_steps(config, examples), train_steps(config, examples)
  cosine = optax.cosine_decay_schedule(peak, max(total - warmup, 1))
  if not warmup:
    return cosine
  return optax.join_schedules([lambda step: step / warmup * peak, cosine], [warmup])


def _matrices(params):
  """True for kernels, False for biases and BatchNorm parameters, which are all vectors."""
  return jax.tree.map(lambda p: p.ndim > 1, params)


def build(config: ml_collections.ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
  """The recipe's optimizer.

  'lars' is SimCLR's: weight decay and layer-wise adaptation leave out BatchNorm and biases, which get
  plain momentum SGD. 'sgd' adds the weight decay to the gradient before the momentum. 'adamw' decays
  apart from the gradient. In all three, BatchNorm and biases are not decayed. The online probe
  (`params['probe']`) has an Adam of its own, so that it does not depend on the recipe.
  """
  if config.optimizer == 'lars':
    method = optax.lars(
      rate,
      weight_decay=config.weight_decay,
      weight_decay_mask=_matrices,
      trust_coefficient=0.001,
      eps=0.0,
      trust_ratio_mask=_matrices,
      momentum=config.momentum,
    )
  elif config.optimizer == 'sgd':
    method = optax.chain(
      optax.add_decayed_weights(config.weight_decay, _matrices),
      optax.sgd(rate, momentum=config.momentum),
    )
  else:
    method = optax.adamw(rate, weight_decay=config.weight_decay, mask=_matrices)

  def part(params):
    return {k: 'probe' if k == 'probe' else 'method' for k in params}

  return optax.partition({'method': method, 'probe': optax.adam(1e-3)}, part)
