"""SimCLR v2's distillation on ImageNet: a fine-tuned teacher, unlabelled images, 400 epochs.

  simclr-jax distill --teacher=RUN/finetune/1pct-seed0 --workdir=STUDENT \\
      --config=distill_imagenet:small --config.model.depth=50

The augmentation is crop and flip. LARS with learning rate 0.1 sqrt(batch size), weight decay 1e-4
and a warm-up of 5 %, as in the pretraining; batch size 4096.

Published for a ResNet-50 student: 73.9 % with 1 % of the labels, 77.5 % with 10 %. Not yet
repeated here.
"""

import ml_collections

from simclr_jax import fields

VARIANTS = {
  'small': 'a student smaller than its teacher: temperature 1',
  'self': "self-distillation, a student of the teacher's size: temperature 0.1",
}


def get_config(variant: str = 'small') -> ml_collections.ConfigDict:
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
