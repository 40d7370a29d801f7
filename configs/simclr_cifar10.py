"""SimCLR on CIFAR-10 with the settings of the released code: ResNet-18, CIFAR stem, LARS, no blur.

  simclr-jax pretrain --config=simclr_cifar10 --workdir=runs/cifar10 --config.data.dir=TFDS_DIR

Hardware: one GPU. Published for 1000 epochs: about 91 % linear (README of google-research/simclr).
Not yet repeated here.
"""

import ml_collections

from simclr_jax import fields

VARIANTS = {
  'v1': 'as in the paper: 2-layer head, weight decay 1e-6, additive brightness',
  'v2': 'as in the current code: 3-layer head, weight decay 1e-4, multiplicative brightness',
}


def get_config(variant: str = 'v1') -> ml_collections.ConfigDict:
  config = fields.recipe('simclr')
  config.epochs = 1000
  config.batch_size = 512
  config.image_size = 32

  config.data.name = 'cifar10'
  config.data.num_classes = 10

  config.augment.view1 = f'simclr_cifar10_{variant}'

  config.model.depth = 18
  config.model.stem = 'cifar'
  config.model.head_layers = 2 if variant == 'v1' else 3

  config.temperature = 0.5
  config.loss_scale = 2.0  # the released code sums the two directions that the paper averages

  config.learning_rate = 1.0
  config.warmup_epochs = config.get_ref('epochs').to_float() * 0.01
  config.weight_decay = 1e-6 if variant == 'v1' else 1e-4
  return config
