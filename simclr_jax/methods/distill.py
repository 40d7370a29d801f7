"""Distillation (SimCLR v2, section 2, equation 3): a student learns what a fine-tuned teacher answers.

With `alpha` = 1 from images alone; below it, the cross-entropy of the labels that are known (`data.labels`)
takes part. The teacher looks at the same view as the student, in evaluation mode, in the same step.
"""

import json
from typing import Any

import flax.struct
import jax.numpy as jnp
import ml_collections

from simclr_jax import losses
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import features
from simclr_jax.methods import Method, supervised
from simclr_jax.models import resnet

FIELDS = {
  **supervised.FIELDS,
  'teacher': ('', None),  # the run whose classifier teaches
  'temperature': (1.0, (1e-3, None)),  # of both softmaxes
  'alpha': (1.0, (0.0, 1.0)),  # weight of the teacher; the labels have 1 - alpha
  'hard_labels': (False, (False, True)),  # the teacher's best class instead of its probabilities
}


@flax.struct.dataclass
class Teacher:
  """A classifier.

  Attributes:
    variables: its weights.
    architecture: JSON, of `evaluate.features`; what is compiled depends on it.
  """

  variables: Any
  architecture: str = flax.struct.field(pytree_node=False)


def build(config: ml_collections.ConfigDict) -> Method:
  """The student, as in `supervised`; loss: alpha x distillation + (1 - alpha) x cross-entropy."""
  net, init, variables = supervised.network(config)
  dtype = resnet.compute_dtype(config.dtype)

  def given():
    from simclr_jax.interop import orbax  # which needs to know the methods

    if not config.teacher:
      raise ConfigError('teacher is empty: set it to the workdir of a fine-tuned run')
    found = orbax.load_classifier(config.teacher)
    classes = found.architecture['classes']
    if classes != config.data.num_classes:
      raise ConfigError(
        f'data.num_classes={config.data.num_classes}, but the teacher {config.teacher} knows {classes}'
      )
    return Teacher(found.variables, json.dumps(found.architecture))

  def loss(params, state, batch, rng):
    del rng
    x, teacher = batch['views'][:, 0], batch['given']
    teach = features.make_forward(json.loads(teacher.architecture), dtype)
    answers = teach(teacher.variables, x)
    h, logits, stats = net.apply(variables(params, state), x, True)
    distilled = losses.distillation(logits, answers, config.temperature, config.hard_labels)
    entropy, accuracy = losses.cross_entropy(logits, batch['label'])
    value = config.alpha * distilled
    if config.alpha < 1:
      value += (1 - config.alpha) * entropy
    agreement = jnp.mean(logits.argmax(-1) == answers.argmax(-1))
    metrics = supervised.figures(value, accuracy, h, logits) | {'agreement': agreement}
    if config.alpha == 1:
      del metrics['train_acc']
    return value, ({**state, 'stats': stats}, metrics)

  return Method(
    init,
    loss,
    encoder=lambda params, state: supervised.encoder(variables(params, state)),
    views=1,
    start=supervised.starter(config),
    given=given,
    classifier=variables,
  )
