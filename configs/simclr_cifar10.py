"""SimCLR on CIFAR-10, as the released code has it: ResNet-18, CIFAR stem, LARS, no blur.

  simclr-jax pretrain --config=simclr_cifar10 --workdir=runs/cifar10 --config.data.dir=TFDS_DIR

Variant `:v1` (default) is the paper's: 2-layer head, weight decay 1e-6, additive brightness. Variant
`:v2` is what that repository says today: 3 layers, 1e-4, multiplicative.

Hardware: one GPU. Published for this recipe, 1000 epochs: about 91 % linear; not yet repeated here.
"""

import ml_collections


def get_config(variant: str = 'v1') -> ml_collections.ConfigDict:
  if variant not in ('v1', 'v2'):
    raise ValueError(f'the variant {variant!r} is not v1 or v2')
  v1 = variant == 'v1'
  config = ml_collections.ConfigDict()
  config.method = 'simclr'
  config.seed = 0
  config.epochs = 1000
  config.steps = 0  # above 0: instead of the epochs
  config.batch_size = 512
  config.image_size = 32
  config.dtype = 'auto'  # of the convolutions: bfloat16 on TPU and GPU, float32 on CPU

  config.data = ml_collections.ConfigDict()
  config.data.source = 'tfds'
  config.data.name = 'cifar10'
  config.data.dir = ''  # empty: TFDS's own default
  config.data.train_split = 'train'
  config.data.test_split = 'test'
  config.data.num_classes = 10  # for the online probe; 0: no labels

  config.augment = ml_collections.ConfigDict()
  config.augment.crop_area_min = 0.08
  config.augment.crop_area_max = 1.0
  config.augment.crop_min_object_covered = 0.1
  config.augment.flip = True
  config.augment.color_strength = 0.5
  config.augment.color_probability = 0.8
  config.augment.brightness = 'additive' if v1 else 'multiplicative'
  config.augment.grayscale_probability = 0.2
  config.augment.blur_probability = 0.0
  config.augment.blur_sigma = 'example'

  config.model = ml_collections.ConfigDict()
  config.model.depth = 18
  config.model.width_multiplier = 1.0
  config.model.stem = 'cifar'
  config.model.dialect = 'simclr'
  config.model.head = 'mlp'
  config.model.head_layers = 2 if v1 else 3
  config.model.head_dim = 128

  config.temperature = 0.5
  config.loss_scale = 2.0  # the released code sums the two directions that the paper averages

  config.optimizer = 'lars'
  config.learning_rate = 1.0
  config.learning_rate_scaling = 'linear'
  config.warmup_epochs = config.get_ref('epochs') * 0.01
  config.weight_decay = 1e-6 if v1 else 1e-4
  config.momentum = 0.9

  config.log_every_steps = 20
  config.checkpoint_every_steps = 0  # 0: once an epoch
  config.keep_checkpoints = 2
  config.knn_every_epochs = 10  # the online kNN; 0: never
  config.tensorboard = True
  return config
