"""SimCLR on the built-in handwritten digits: the demo.

  simclr-jax pretrain --config=simclr_digits --workdir=runs/digits

Hardware: two CPU cores. Time: one minute. Result: the table at the top of the README.
"""

import ml_collections

from simclr_jax import fields


def get_config() -> ml_collections.ConfigDict:
  config = fields.recipe('simclr')
  config.epochs = 4
  config.batch_size = 128
  config.image_size = 32

  config.data.source = 'digits'
  config.data.num_classes = 10

  # No flip: a mirrored digit is another sign. Much gray: the tint would give an image away.
  config.augment.view1 = 'simclr_crop(0.2, 1) | simclr_jitter(1.0, p=0.8) | grayscale(p=0.5)'

  config.model.depth = 8
  config.model.width_multiplier = 0.5
  config.model.stem = 'strided'
  config.model.head_dim = 64

  config.temperature = 0.2

  config.learning_rate = 8.0
  config.warmup_epochs = config.get_ref('epochs').to_float() * 0.1

  config.log_every_steps = 10
  return config
