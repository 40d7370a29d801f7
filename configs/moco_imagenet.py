"""MoCo on ImageNet: ResNet-50, 65,536 keys in the queue, batch size 256.

  simclr-jax pretrain --config=moco_imagenet:v2 --workdir=runs/moco --config.data.dir=TFDS_DIR

Published linear accuracy (README of facebookresearch/moco, 5 trials): `:v1` (He et al. 2020) 60.8
+- 0.2 %; `:v2` (Chen et al. 2020) 67.5 +- 0.1 %, and 71.1 % after 800 epochs
(--config.epochs=800). Hardware: 8 V100. Time: 53 hours. Not yet repeated here.

The loss is low at the start, rises for about 256 steps while keys replace the random initial keys
of the queue, then falls.
"""

import ml_collections

from simclr_jax import fields

VARIANTS = {
  'v1': 'linear head, temperature 0.07, multi-step schedule',
  'v2': '2-layer head, stronger augmentation, temperature 0.2, cosine schedule',
}


def get_config(variant: str = 'v1') -> ml_collections.ConfigDict:
  config = fields.recipe('moco')
  config.epochs = 200
  config.batch_size = 256
  config.data.name = 'imagenet2012'
  config.data.test_split = 'validation'
  config.data.num_classes = 1000
  config.augment.view1 = f'moco_{variant}'
  config.augment.eval = 'moco_eval'

  config.model.variant = 'torchvision'
  config.model.normalize = 'imagenet'
  config.model.bn_groups = 8  # the published runs: 8 GPUs with 32 images each
  config.model.head = 'linear' if variant == 'v1' else 'mlp'
  config.model.head_norm = 'none'

  config.temperature = 0.07 if variant == 'v1' else 0.2
  config.queue_size = 65536
  config.key_momentum = 0.999

  config.optimizer = 'sgd'
  config.learning_rate = 0.03
  config.schedule = 'multistep' if variant == 'v1' else 'cosine_by_epoch'
  config.decay_epochs = (120, 160)
  config.weight_decay = 1e-4
  config.weight_decay_on = 'all'
  config.first_loss = (0.0, 0.5) if variant == 'v1' else (6.2, 6.7)
  return config
