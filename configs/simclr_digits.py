"""SimCLR on handwritten digits that come with the package: the demo.

  simclr-jax pretrain --config=simclr_digits --workdir=runs/digits

Hardware: two CPU cores. Time: about four minutes to train. Result: see the README's table.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.method = 'simclr'
  config.seed = 0
  config.epochs = 14
  config.steps = 0  # above 0: instead of the epochs
  config.batch_size = 256
  config.image_size = 32
  config.dtype = 'auto'  # of the convolutions: bfloat16 on TPU and GPU, float32 on CPU

  config.data = ml_collections.ConfigDict()
  config.data.source = 'digits'
  config.data.name = ''
  config.data.dir = ''
  config.data.train_split = 'train'
  config.data.test_split = 'test'
  config.data.num_classes = 10  # for the online probe; 0: no labels

  config.augment = ml_collections.ConfigDict()
  config.augment.crop_area_min = 0.2
  config.augment.crop_area_max = 1.0
  config.augment.crop_min_object_covered = 0.1
  config.augment.flip = False  # a mirrored digit is another sign
  config.augment.color_strength = 1.0
  config.augment.color_probability = 0.8
  config.augment.brightness = 'multiplicative'
  config.augment.grayscale_probability = 0.5  # the tint would give an image away
  config.augment.blur_probability = 0.0
  config.augment.blur_sigma = 'example'

  config.model = ml_collections.ConfigDict()
  config.model.depth = 8
  config.model.width_multiplier = 0.5
  config.model.stem = 'strided'
  config.model.dialect = 'simclr'
  config.model.head = 'mlp'
  config.model.head_layers = 2
  config.model.head_dim = 64

  config.temperature = 0.2
  config.loss_scale = 1.0

  config.optimizer = 'lars'
  config.learning_rate = 4.0
  config.learning_rate_scaling = 'linear'
  config.warmup_epochs = config.get_ref('epochs') * 0.1
  config.weight_decay = 1e-6
  config.momentum = 0.9

  config.log_every_steps = 10
  config.checkpoint_every_steps = 0  # 0: once an epoch
  config.keep_checkpoints = 2
  config.knn_every_epochs = 10  # the online kNN; 0: never
  config.tensorboard = True
  return config
