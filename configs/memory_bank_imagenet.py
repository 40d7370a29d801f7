"""The memory bank as MoCo compares it: one remembered feature for each of 1.28 million images.

  simclr-jax pretrain --config=memory_bank_imagenet --workdir=runs/bank --config.data.dir=TFDS_DIR

Variant `:info_nce` (default): 65,536 negatives; published (He et al. 2020, figure 3): linear 58.0 %. Variant
`:nce`: InstDisc's loss with 4,096 negatives; published there: 54.3 %, and 54.0 % by InstDisc itself. One draw
of negatives serves the whole batch; the papers draw for each example (--config.negatives_per=example),
which at 65,536 takes 8 GiB for 256 images and gathers the whole bank on each device. The bank, 626 MiB, is split over the devices. MoCo's paper does
not state the bank's momentum; 0.5 is InstDisc's. Hardware: 8 GPUs. Not yet repeated here.
"""

import ml_collections

from simclr_jax import fields


def get_config(variant: str = 'info_nce') -> ml_collections.ConfigDict:
  if variant not in ('info_nce', 'nce'):
    raise ValueError(f'the variant {variant!r} is not info_nce or nce')
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
  config.model.head_norm = False

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
