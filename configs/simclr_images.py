"""SimCLR on your own images: the default recipe of `simclr-jax pretrain --data=DIR`.

  simclr-jax pretrain --config=simclr_images:224 --data=DIR --workdir=runs/mine

The variants differ in the size of the views. `:224` is Chen et al. 2020a with the square-root
learning-rate scaling for batch sizes far below 4096 (appendix B.1), but with the augmentation of
SimCLR v2. `:64` and `:32` have the augmentation, learning rate and temperature that it found best
for CIFAR-10 (B.9), but a ResNet-18 instead of its ResNet-50. Hardware: one accelerator; for `:cpu`
two CPU cores. Time of `:cpu`: about 15 minutes. The epochs and batch sizes here are for 50,000 images; without --config,
`pretrain` chooses variant, epochs and batch size by the number and size of the images. No
published result: it depends on the images.
"""

import ml_collections

from simclr_jax import fields

VARIANTS = {
  '224': 'ResNet-50, 224 pixels',
  '64': 'ResNet-18, 64 pixels',
  '32': 'ResNet-18, 32 pixels',
  'cpu': 'a small ResNet-8, 96 pixels',
}


def get_config(variant: str = '224') -> ml_collections.ConfigDict:
  config = fields.recipe('simclr')
  config.batch_size = 512
  config.epochs = 1000
  config.data.source = 'folder'
  config.augment.view1 = 'simclr_v2'
  config.loss_scale = 2.0  # the released code sums the two directions that the paper averages
  config.warmup_epochs = config.get_ref('epochs').to_float() * 0.1

  if variant == '224':
    config.temperature = 0.1
    config.learning_rate = 0.075
    config.learning_rate_scaling = 'sqrt'
  elif variant == 'cpu':
    config.image_size = 96
    config.batch_size = 128
    config.epochs = 20
    config.model.depth = 8
    config.model.width_multiplier = 0.5
    config.model.head_dim = 64
    # Milder than the papers': a small network learns more from it in a short time.
    config.augment.view1 = (
      'simclr_crop(0.2, 1) | flip | simclr_jitter(0.5, p=0.8) | grayscale(p=0.2)'
    )
    config.temperature = 0.2
    config.learning_rate = 4.0
    config.knn_every_epochs = 5
    config.knn_images = 4000
  else:
    config.image_size = int(variant)
    config.model.depth = 18
    config.model.stem = 'cifar' if variant == '32' else 'strided'
    config.augment.view1 = 'simclr_cifar10_v1'
    config.temperature = 0.5
    config.learning_rate = 1.0
  return config
