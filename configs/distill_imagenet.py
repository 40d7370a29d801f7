"""SimCLR v2's distillation on ImageNet without labels: a fine-tuned teacher, crop and flip, 400 epochs.

  simclr-jax distill --teacher=RUN/finetune/1pct-seed0 --workdir=STUDENT --config=distill_imagenet:small --config.model.depth=50

`self`: a student of the teacher's size, temperature 0.1. `small`: a smaller one, temperature 1. LARS, learning rate
0.1 sqrt(batch), weight decay 1e-4, warm-up of 5 %, as in the pretraining; batch 4096.
Published with a ResNet-50 student: 73.9 % with 1 % of the labels, 77.5 % with 10 %. Not yet repeated here.
"""

import ml_collections

from simclr_jax import fields


def get_config(variant: str = 'small') -> ml_collections.ConfigDict:
  if variant not in ('self', 'small'):
    raise ValueError(f'variant {variant!r} is not one of self, small')
  config = fields.recipe('distill')
  config.epochs = 400
  config.batch_size = 4096
  config.augment.view1 = 'supervised'
  config.temperature = 0.1 if variant == 'self' else 1.0

  config.learning_rate = 0.1
  config.learning_rate_scaling = 'sqrt'
  config.warmup_epochs = config.get_ref('epochs').to_float() * 0.05
  config.weight_decay = 1e-4
  config.knn_every_epochs = 0
  return config
