"""Distillation (SimCLR v2, section 2, equation 3): a student is trained on the predictions of a fine-tuned teacher.

With `alpha` = 1, labels are not used; with `alpha` below 1, the cross-entropy of the labels that `data.labels`
selects is added. Teacher and student get the same view in the same step; the teacher is in evaluation mode.
"""

import json

import jax.numpy as jnp
import ml_collections

from simclr_jax import losses
from simclr_jax.fields import Choices, Field, Range, of_method
from simclr_jax.methods import Method, supervised
from simclr_jax.models import classifier, encoders

FIELDS = {
  **of_method('supervised'),
  'teacher': Field('', 'the run whose classifier is the teacher', compiled=False),
  'temperature': Field(1.0, 'temperature of both softmaxes', Range(1e-3)),
  'alpha': Field(
    1.0,
    'weight of the distillation loss; the weight of the cross-entropy of the labels is 1 - alpha',
    Range(0.0, 1.0),
  ),
  'hard_labels': Field(
    False,
    "train on the teacher's most probable class instead of its probabilities",
    Choices(False, True),
  ),
}


def build(config: ml_collections.ConfigDict) -> Method:
  """The student is built as in `supervised`; loss: alpha x distillation + (1 - alpha) x cross-entropy."""
  dtype = encoders.compute_dtype(config.dtype)

  def objective(h, student, batch):
    x, teacher = batch['views'][:, 0], batch['teacher']
    predict = classifier.forward(json.loads(teacher.architecture), dtype)
    target = predict(teacher.variables, x)
    loss = losses.distillation(student, target, config.temperature, config.hard_labels)
    metrics = {'agreement': jnp.mean(student.argmax(-1) == target.argmax(-1))}
    if config.alpha == 1:
      return loss, metrics
    supervised_loss, supervised_metrics = supervised.cross_entropy(h, student, batch)
    loss = config.alpha * loss + (1 - config.alpha) * supervised_loss
    return loss, metrics | supervised_metrics

  return supervised.from_classifier(config, objective, needs_teacher=True)
