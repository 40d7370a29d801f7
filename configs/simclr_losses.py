"""The losses that SimCLR's table 4 compares, each with ResNet-50 on ImageNet for 100 epochs.

  simclr-jax pretrain --config=simclr_losses:margin_triplet_sh --workdir=runs/margin_triplet_sh \\
      --config.data.dir=TFDS_DIR

Variants and the published linear accuracies: nt_xent (63.9 %), nt_logistic (51.6), nt_logistic_sh (57.9),
margin_triplet (50.9), margin_triplet_sh (57.5), where _sh has semi-hard negatives; and pairwise_margin,
which is not in the table. The paper tuned each over learning rates 0.01, 0.1, 0.3, 0.5, 1, margins 0,
0.4, 0.8, 1.6 and temperatures 0.1, 0.2, 0.5, 1 (appendix B.10) without saying which won: the values here
are the middle ones, to be tuned likewise. Hardware: as simclr_imagenet. Not yet repeated here.
"""

import ml_collections

from simclr_jax import fields

LOSSES = ('nt_xent', 'nt_logistic', 'margin_triplet', 'pairwise_margin')


def get_config(variant: str = 'nt_xent') -> ml_collections.ConfigDict:
  loss = variant.removesuffix('_sh')
  if loss not in LOSSES or (loss in ('nt_xent', 'pairwise_margin') and loss != variant):
    raise ValueError(f'the variant {variant!r} is not one of {", ".join(LOSSES)}, or one of the '
                     'middle two with _sh')  # fmt: skip
  config = fields.recipe('simclr')
  config.epochs = 100
  config.batch_size = 4096
  config.data.name = 'imagenet2012'
  config.data.test_split = 'validation'
  config.data.num_classes = 1000
  config.augment.view1 = 'simclr_v1'

  config.loss = loss
  config.semi_hard = loss != variant
  config.temperature = 0.1 if loss == 'nt_xent' else 0.2
  config.margin = 0.8
  config.loss_scale = 2.0 if loss == 'nt_xent' else 1.0

  config.learning_rate = 0.3  # times batch / 256
  config.warmup_epochs = 10.0
  config.weight_decay = 1e-6
  return config
