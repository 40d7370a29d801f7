"""Distillation on small data: the default recipe of `simclr-jax distill`.

  simclr-jax distill --teacher=RUN/finetune/1pct-seed0 --workdir=STUDENT --config.model.width_multiplier=0.25

The student is trained on the teacher's predictions (soft labels) for all images, without labels
(SimCLR v2).
"""

import ml_collections

from simclr_jax import fields


def get_config() -> ml_collections.ConfigDict:
  config = fields.recipe('distill')
  config.epochs = 5
  config.batch_size = 64

  config.optimizer = 'adamw'
  config.learning_rate = 0.003
  config.learning_rate_scaling = 'none'
  config.weight_decay = 1e-4

  config.log_every_steps = 100
  config.keep_checkpoints = 1
  config.knn_every_epochs = 0
  config.tensorboard = False
  return config
