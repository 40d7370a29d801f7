"""The supervised baseline: ResNet-50 with labels, the optimizer of the papers' supervised models.

  simclr-jax pretrain --config=supervised_imagenet --workdir=runs/supervised --config.data.dir=TFDS_DIR

Published: 76.5 % for ResNet-50 (the baseline of SimCLR and MoCo; 76.6 in SimCLR v2's table, whose author
gives SGD with learning rate 0.1 per 256, weight decay 1e-4 and a cosine schedule). Nesterov's momentum, batch,
epochs, warm-up and the sparing of biases are common choices, not theirs. Not yet repeated here.
"""

import ml_collections

from simclr_jax import fields


def get_config() -> ml_collections.ConfigDict:
  config = fields.recipe('supervised')
  config.epochs = 90
  config.batch_size = 1024
  config.data.name = 'imagenet2012'
  config.data.test_split = 'validation'
  config.data.num_classes = 1000
  config.augment.view1 = 'supervised'

  config.model.head = 'none'

  config.optimizer = 'nesterov'
  config.learning_rate = 0.1  # times batch / 256
  config.warmup_epochs = 5.0
  config.weight_decay = 1e-4
  return config
