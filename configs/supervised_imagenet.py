"""The supervised baseline on ImageNet: ResNet-50, 90 epochs, all labels.

  simclr-jax pretrain --config=supervised_imagenet --workdir=runs/supervised --config.data.dir=TFDS_DIR

Published: 76.5 % (the baseline of SimCLR and MoCo; 76.6 in SimCLR v2's table, whose author gives
SGD with learning rate 0.1 * batch size / 256, weight decay 1e-4 and a cosine schedule). Nesterov
momentum, batch size, epochs, warm-up and no weight decay on biases and BatchNorm are common
choices, not the papers'. Not yet repeated here.
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
