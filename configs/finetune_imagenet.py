"""Fine-tuning on ImageNet with 1, 10 or 100 % of the labels, as SimCLR (v1) and SimCLR v2 do it.

  simclr-jax finetune --workdir=RUN --config=finetune_imagenet:v2_1pct --labels=1%

v2 keeps the first layer of the projection head for 1 and 10 %, uses LARS and a batch of 1024 (learning rate
0.005 sqrt(batch); the authors take 0.002 for wider networks and those with selective kernels), for
60, 30, 30 epochs. v1 uses Nesterov SGD and a batch of 4096, learning rate 0.05 per 256, for 60 and 30.
Published top-1 of ResNet-50: v2 57.9, 68.4, 76.3; v1 48.3 and 65.6. The papers' own lists of images are the
TFDS sets imagenet2012_subset/1pct and /10pct (--config.data.name); the learning rate for 100 % is that for 10 %,
which the paper leaves open. Not yet repeated here.
"""

import ml_collections

from simclr_jax import fields


def get_config(variant: str = 'v2_1pct') -> ml_collections.ConfigDict:
  variants = [f'{v}_{p}pct' for v in ('v1', 'v2') for p in (1, 10, 100)]
  if variant not in variants:
    raise ValueError(f'variant {variant!r} is not one of {", ".join(variants)}')
  version, share = variant.split('_')
  config = fields.recipe('supervised')
  config.data.unlabelled = 'drop'
  config.augment.view1 = 'supervised'
  config.weight_decay = 0.0
  config.knn_every_epochs = 0
  config.epochs = 60 if share == '1pct' else 30
  if version == 'v1':
    config.batch_size = 4096
    config.optimizer = 'nesterov'
    config.learning_rate = 0.05
  else:
    config.head_layer = 0 if share == '100pct' else 1
    config.batch_size = 1024
    config.optimizer = 'lars'
    config.learning_rate = 0.005
    config.learning_rate_scaling = 'sqrt'
  return config
