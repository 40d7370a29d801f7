"""The end-to-end mechanism (MoCo, figure 2a): the negatives are the other keys of the batch.

  simclr-jax pretrain --config=end_to_end_imagenet --workdir=runs/end_to_end --config.data.dir=TFDS_DIR

Published (He et al. 2020, figure 3): linear accuracy 54.7, 56.4 and 57.3 % for batch sizes 256,
512 and 1024, read from the plot, so approximate. The learning rate is proportional to the batch
size; without this, batch size 1024 loses 2 %. Hardware: 8 GPUs of 32 GB for 1024. Not yet repeated
here.
"""

import ml_collections

from simclr_jax import fields


def get_config() -> ml_collections.ConfigDict:
  config = fields.recipe('end_to_end')
  config.epochs = 200
  config.batch_size = 1024
  config.data.name = 'imagenet2012'
  config.data.test_split = 'validation'
  config.data.num_classes = 1000
  config.augment.view1 = 'moco_v1'
  config.augment.eval = 'moco_eval'

  config.model.variant = 'torchvision'
  config.model.normalize = 'imagenet'
  config.model.bn_groups = 8
  config.model.head = 'linear'
  config.model.head_norm = 'none'

  config.temperature = 0.07

  config.optimizer = 'sgd'
  config.learning_rate = 0.03  # times batch / 256
  config.schedule = 'multistep'
  config.decay_epochs = (120, 160)
  config.weight_decay = 1e-4
  config.weight_decay_on = 'all'
  return config
