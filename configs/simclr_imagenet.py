"""SimCLR on ImageNet.

  simclr-jax pretrain --config=simclr_imagenet --workdir=runs/simclr --config.data.dir=TFDS_DIR

Variant `:v1` (default) is Chen et al. 2020a: ResNet-50, batch 4096, 100 epochs. Published: linear 64.5 %
(64.6 for this batch and length, table B.1; 69.3 after 1000 epochs, table 6), 1.5 hours on 128 TPU v3
cores. Variant `:v2` is Chen et al. 2020b: ResNet-152 with three times the width and selective kernels,
3-layer head, 800 epochs, memory of 65,536 negatives. Published: linear 79.8 %; its ResNet-50
(--config.model.depth=50 --config.model.width_multiplier=1 --config.model.sk_ratio=0) 71.7 %, without
the memory (--config.queue_size=0) about 71.1 % by its author. The large one splits its 877 M parameters,
momentum and slow copy over the devices and computes activations twice: so it takes 13.7 of the 15.5 GiB of each of 128 TPU
v3 cores (`compile-check`). Not yet repeated here.
"""

import ml_collections

from simclr_jax import fields


def get_config(variant: str = 'v1') -> ml_collections.ConfigDict:
  if variant not in ('v1', 'v2'):
    raise ValueError(f'the variant {variant!r} is not v1 or v2')
  config = fields.recipe('simclr')
  config.batch_size = 4096
  config.data.name = 'imagenet2012'
  config.data.test_split = 'validation'
  config.data.num_classes = 1000
  config.augment.view1 = f'simclr_{variant}'
  config.temperature = 0.1
  config.loss_scale = 2.0  # the released code sums the two directions that the paper averages

  if variant == 'v1':
    config.epochs = 100
    config.learning_rate = 0.3  # times batch / 256: 4.8
    config.warmup_epochs = 10.0
    config.weight_decay = 1e-6
  else:
    config.epochs = 800
    config.model.depth = 152
    config.model.width_multiplier = 3.0
    config.model.sk_ratio = 0.0625
    config.model.head_layers = 3
    config.queue_size = 65536
    config.key_momentum = 0.999
    config.learning_rate = 0.1  # times sqrt(batch): 6.4
    config.learning_rate_scaling = 'sqrt'
    config.warmup_epochs = config.get_ref('epochs').to_float() * 0.05
    config.weight_decay = 1e-4
    config.sharding = 'fsdp'
    config.rematerialize = True
  return config
