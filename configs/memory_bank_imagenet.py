"""The memory bank (MoCo, figure 2b): one stored feature per image of ImageNet.

  simclr-jax pretrain --config=memory_bank_imagenet --workdir=runs/bank --config.data.dir=TFDS_DIR

Published linear accuracy: `:info_nce` 58.0 % (He et al. 2020, figure 3); `:nce` 54.3 % (the same
figure) and 54.0 % (InstDisc). The negatives are drawn once per batch; the papers draw them for
each image (--config.negatives_per=example), which for 65,536 negatives and 256 images takes 8 GiB
and gathers the entire bank on each device. The bank, 626 MiB, is sharded over the devices. MoCo's
paper does not state the momentum of the bank; 0.5 is InstDisc's. Hardware: 8 GPUs. Not yet
repeated here.
"""

import ml_collections

from simclr_jax import fields

VARIANTS = {
  'info_nce': "MoCo's loss with 65,536 negatives",
  'nce': "InstDisc's loss with 4,096 negatives",
}


def get_config(variant: str = 'info_nce') -> ml_collections.ConfigDict:
  config = fields.recipe('memory_bank')
  config.epochs = 200
  config.batch_size = 256
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

  config.loss = variant
  config.negatives = 65536 if variant == 'info_nce' else 4096
  config.temperature = 0.07
  config.bank_momentum = 0.5

  config.optimizer = 'sgd'
  config.learning_rate = 0.03
  config.schedule = 'multistep'
  config.decay_epochs = (120, 160)
  config.weight_decay = 1e-4
  config.weight_decay_on = 'all'
  return config
