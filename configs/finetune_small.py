"""Fine-tuning with few labels on small data: the default recipe of `simclr-jax finetune`.

  simclr-jax finetune --workdir=RUN --labels=1%,10% --seeds=5

The augmentation is that of the pretraining with milder crops, which show at least half of the
image. The classifier is zero-initialised, all other layers start from the pretrained weights; the
first layer of the projection head is kept (SimCLR v2). The commands train for at least 10 epochs,
unless steps or epochs are set.
"""

import ml_collections

from simclr_jax import fields


def get_config() -> ml_collections.ConfigDict:
  config = fields.recipe('supervised')
  config.steps = 200
  config.batch_size = 64
  config.head_layer = 1
  config.data.unlabelled = 'drop'

  config.optimizer = 'adamw'
  config.learning_rate = 1e-3
  config.learning_rate_scaling = 'none'
  config.weight_decay = 0.05

  config.log_every_steps = 100
  config.keep_checkpoints = 1
  config.knn_every_epochs = 0
  config.tensorboard = False
  return config
