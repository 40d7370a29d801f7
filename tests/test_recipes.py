"""Every hyper-parameter of the recipes in configs/ with its source: papers and their released code.

The table is `RECIPES`; `PIPELINES` and `CONSTANTS` are what names in it stand for, `RATES` what the
learning rates come to, `PROTOCOLS` how encoders are evaluated. A row ends with the source of its
value:

  v1        Chen et al. 2020a, SimCLR, arXiv 2002.05709: section, table or appendix
  v2        Chen et al. 2020b, SimCLR v2, arXiv 2006.10029
  simclr    google-research/simclr at 383d414: file:line, or a section of its README
  simclr1   the same at 85e8552, its first version
  #n        the author's answer in issue n there
  moco1     He et al. 2020, MoCo, arXiv 1911.05722
  moco2     Chen et al. 2020c, MoCo v2, arXiv 2003.04297
  moco      facebookresearch/moco at 5a429c0: file:line
  demo      colab/moco_cifar10_demo.ipynb there, at f736491: title of the cell
  instdisc  Wu et al. 2018, arXiv 1805.01978; zhirongw/lemniscate.pytorch at f7cfe29: file:line

`OWN`: not published, chosen in this project. Where a source starts with DIFFERS, the value is the
one in use here, and the source says what is published instead.
"""

import dataclasses
import inspect
import itertools
import math
import pathlib
import runpy

import numpy as np
import pytest

from simclr_jax import config, optim
from simclr_jax.data import augment
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import knn, lbfgs, probe
from simclr_jax.models import norm, resnet

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
OWN = 'this project'
TRAIN_IMAGES = {'imagenet': 1_281_167, '1%': 12_811, '10%': 128_116, 'cifar10': 50_000}

# Parts that recipes share.

IMAGENET = [
  ('data.source', 'tfds', 'this project: simclr has TFDS too'),
  ('data.name', 'imagenet2012', 'v1 2.3, moco1 4'),
  ('data.train_split', 'train', 'simclr run.py:66'),
  ('data.test_split', 'validation', 'simclr run.py:95'),
  ('data.num_classes', 1000, 'v1 2.3, moco1 4'),
  ('data.unlabelled', 'keep', OWN),
  ('image_size', 224, 'v1 A, moco main_moco.py:327-348'),
]
CIFAR10 = [
  ('data.source', 'tfds', 'this project: simclr has TFDS too'),
  ('data.name', 'cifar10', 'simclr README: CIFAR-10, demo'),
  ('data.train_split', 'train', 'simclr README: CIFAR-10, demo'),
  ('data.test_split', 'test', 'simclr README: CIFAR-10, demo'),
  ('data.num_classes', 10, 'simclr README: CIFAR-10, demo'),
  ('data.unlabelled', 'keep', OWN),
  ('image_size', 32, 'simclr README: CIFAR-10, demo'),
]
PLAIN = [
  ('steps', 0, 'the length is given in epochs'),
  ('accumulate_steps', 1, 'a batch is computed at once'),
  ('dtype', 'auto', 'DIFFERS: bfloat16 convolutions on TPU and GPU, the papers: float32'),
  ('model.encoder', '', 'a ResNet'),
  ('model.head_hidden', 0, 'as h: simclr model_util.py:141-177, moco builder.py:34-41'),
  ('augment.ops', '', 'no ops of others'),
]

# The networks.

RESNET18_CIFAR = [
  ('model.depth', 18, 'simclr README: CIFAR-10, demo: Set arguments'),
  ('model.width_multiplier', 1.0, 'simclr run.py:219, demo'),
  ('model.sk_ratio', 0.0, 'simclr run.py:227'),
  ('model.stem', 'cifar', 'v1 B.9, demo: Define base encoder: 3x3, stride 1, no pooling'),
]
RESNET50 = [
  ('model.depth', 50, 'v1 2.3, moco1 4, moco main_moco.py:46'),
  ('model.width_multiplier', 1.0, 'v1 2.3, moco1 4'),
  ('model.sk_ratio', 0.0, 'simclr run.py:227'),
  ('model.stem', 'imagenet', 'He et al. 2016, of the ResNets of v1 and moco1'),
]
RESNET152_3X_SK = [
  ('model.depth', 152, 'v2 3.1, table 1'),
  ('model.width_multiplier', 3.0, 'v2 3.1, table 1'),
  ('model.sk_ratio', 0.0625, 'simclr run.py:227: recommended'),
  ('model.stem', 'imagenet', 'simclr resnet.py; with SK it is ResNet-D'),
]
SIMCLR_NETWORK = [
  ('model.variant', 'simclr', 'simclr resnet.py'),
  ('model.se_ratio', 0.0, 'simclr run.py:231'),
  ('model.normalize', 'none', 'simclr data_util.py: pixels in [0, 1]; #12, #15'),
  ('model.bn_groups', 1, 'v1 2.2: global BN; simclr run.py:215'),
  ('model.head', 'mlp', 'v1 2.3; simclr run.py:198'),
  ('model.head_norm', 'all', 'simclr model_util.py:141-177'),
]
MOCO_NETWORK = [
  ('model.variant', 'torchvision', 'moco main_moco.py: torchvision.models'),
  ('model.se_ratio', 0.0, 'moco main_moco.py: torchvision.models'),
  ('model.bn_groups', 8, 'moco1 3.3, moco README:43-50: BN of each of 8 GPUs'),
  ('model.head_dim', 128, 'moco1 3.3; moco main_moco.py:155'),
  ('model.head_norm', 'none', 'moco builder.py:34-41'),
]

# How they are trained.

SIMCLR_LARS = [
  ('method', 'simclr', 'v1 algorithm 1'),
  ('augment.view2', '', 'v1 2.1: both views from the same family'),
  ('augment.eval', 'simclr_eval', 'v1 B.5; simclr data_util.py'),
  ('optimizer', 'lars', 'v1 2.3, v2 3.1'),
  ('momentum', 0.9, 'v2 3.1; simclr run.py:174'),
  ('weight_decay_on', 'kernels', 'simclr model_util.py: not BN, not biases'),
  ('schedule', 'cosine', 'v1 2.3: linear warm-up, cosine, no restarts; v2 3.1'),
]
NT_XENT = [
  ('loss', 'nt_xent', 'v1 equation 1'),
  ('hidden_norm', True, 'v1 equation 1; simclr run.py, --hidden_norm'),
  ('loss_scale', 2.0, 'simclr objective.py:34-88: the sum of both directions, not their mean'),
]
MOCO_SGD = [
  ('augment.view2', '', 'moco loader.py:11-20: both views from the same pipeline'),
  ('augment.eval', 'moco_eval', 'moco main_lincls.py: Resize(256), CenterCrop(224)'),
  ('optimizer', 'sgd', 'moco1 4; moco main_moco.py:291-296: no Nesterov'),
  ('momentum', 0.9, 'moco1 4; moco main_moco.py:95'),
  ('weight_decay_on', 'all', 'moco main_moco.py:291-296: one group, BN and biases too'),
  ('warmup_epochs', 0.0, 'moco main_moco.py:488-498'),
]
MOCO_IMAGENET = [
  ('epochs', 200, 'moco1 4; moco main_moco.py:59'),
  ('learning_rate', 0.03, 'moco1 4; moco main_moco.py:81'),
  ('learning_rate_scaling', 'linear', 'moco README:53: 0.015 for a batch of 128'),
  ('weight_decay', 1e-4, 'moco1 4; moco main_moco.py:100'),
  ('model.normalize', 'imagenet', 'moco main_moco.py:323-325'),
]
MOCO_STEPS = [
  ('schedule', 'multistep', 'moco1 4; moco main_moco.py:488-498: times 0.1'),
  ('decay_epochs', (120, 160), 'moco1 4; moco main_moco.py:89'),
]
MOCO_DEMO = [
  ('method', 'moco', 'demo: Define MoCo wrapper'),
  ('epochs', 200, 'demo: Set arguments'),
  ('batch_size', 512, 'demo: Set arguments'),
  ('knn_features', 'z', 'demo: Define train/test: test() calls net, the encoder with its head'),
  ('augment.view1', 'moco_cifar10', 'demo: Define data loaders'),
  ('model.normalize', 'cifar10', 'demo: Define data loaders'),
  ('model.head', 'linear', 'demo: Define base encoder'),
  ('model.bn_layout', 'strided', 'demo: SplitBatchNorm: example i is in split i % 8'),
  ('temperature', 0.1, 'demo: Set arguments'),
  ('queue_size', 4096, 'demo: Set arguments'),
  ('key_momentum', 0.99, 'demo: Set arguments'),
  ('shuffle', 'permute', 'demo: _batch_shuffle_single_gpu'),
  ('learning_rate', 0.06, 'demo: Set arguments'),
  ('learning_rate_scaling', 'none', 'demo: 0.06 is for the batch of 512'),
  ('schedule', 'cosine_by_epoch', 'demo: Define train/test'),
  ('schedule_first_epoch', 1, 'demo: the epochs run from 1 to 200'),
  ('weight_decay', 5e-4, 'demo: Set arguments'),
]
MEMORY_BANK = [
  ('method', 'memory_bank', 'moco1 figure 2b'),
  ('batch_size', 256, 'moco1 4; instdisc main.py:34-77'),
  ('augment.view1', 'moco_v1', 'moco1 3.3; instdisc main.py:118-125'),
  ('model.head', 'linear', 'moco1 3.3; instdisc main.py:34-77: low-dim'),
  ('model.bn_layout', 'contiguous', 'as GPUs split a batch'),
  ('temperature', 0.07, 'moco1 3.3; instdisc main.py:34-77'),
  ('negatives_per', 'batch', 'DIFFERS: instdisc NCEAverage.py:20 draws for each example'),
  ('bank_momentum', 0.5, 'instdisc main.py:34-77; moco1 gives no value'),
]
SIMCLR_FINE_TUNING = [  # network, image size and data are those of the run that is fine-tuned
  ('method', 'supervised', 'v1 B.5, v2 3.1'),
  ('steps', 0, 'the length is given in epochs'),
  ('accumulate_steps', 1, 'a batch is computed at once'),
  ('data.unlabelled', 'drop', 'v1 B.5, v2 3.1: only labelled images'),
  ('augment.view1', 'supervised', 'v1 B.5, v2 3.1: crop and flip'),
  ('fine_tune_after_block', -1, 'v1 B.5: the whole network; simclr README: 1% of labels'),
  ('momentum', 0.9, 'v1 B.5, v2 3.1'),
  ('weight_decay', 0.0, 'v1 B.5, v2 3.1'),
  ('weight_decay_on', 'kernels', 'nothing is decayed'),
  ('warmup_epochs', 0.0, 'v1 B.5, v2 3.1'),
  ('schedule', 'cosine', 'simclr model_util.py:59-83'),
]
FINE_TUNING_V1 = [
  ('head_layer', 0, 'v1 algorithm 1: g is thrown away; simclr run.py:210'),
  ('batch_size', 4096, 'v1 B.5'),
  ('optimizer', 'nesterov', 'v1 B.5'),
  ('learning_rate', 0.05, 'v1 B.5'),
  ('learning_rate_scaling', 'linear', 'v1 B.5'),
]
FINE_TUNING_V2 = [
  ('batch_size', 1024, 'v2 3.1; simclr README: 1% of labels'),
  ('optimizer', 'lars', 'v2 3.1; simclr README: 1% of labels'),
  ('learning_rate', 0.005, 'v2 3.1: of standard ResNets; simclr README: 1% of labels'),
  ('learning_rate_scaling', 'sqrt', 'v2 3.1; simclr README: 1% of labels'),
]
DISTILLATION = [  # image size and data are those of the teacher's run
  ('method', 'distill', 'v2 2, equation 2'),
  ('steps', 0, 'the length is given in epochs'),
  ('accumulate_steps', 1, 'a batch is computed at once'),
  ('epochs', 400, 'v2 3.1'),
  ('batch_size', 4096, 'v2 3.1: as pretraining'),
  ('augment.view1', 'supervised', 'v2 3.1: crop and flip'),
  ('alpha', 1.0, 'v2 3.1: only unlabelled examples'),
  ('hard_labels', False, 'v2 equation 2: the probabilities of the teacher'),
  ('data.unlabelled', 'keep', 'v2 3.1: only unlabelled examples'),
  ('head_layer', 0, 'v2 3.1: without the projection head'),
  ('fine_tune_after_block', -1, 'v2 3.1: the whole student'),
  ('optimizer', 'lars', 'v2 3.1'),
  ('momentum', 0.9, 'v2 3.1'),
  ('learning_rate', 0.1, 'v2 3.1: as pretraining'),
  ('learning_rate_scaling', 'sqrt', 'v2 3.1: as pretraining'),
  ('schedule', 'cosine', 'v2 3.1: as pretraining'),
  ('warmup_epochs', 400 * 0.05, 'v2 3.1: 5 % of the epochs'),
  ('weight_decay', 1e-4, 'v2 3.1: as pretraining'),
  ('weight_decay_on', 'kernels', 'simclr model_util.py: not BN, not biases'),
]

# Recipes with published results.

SIMCLR_IMAGENET_V1 = [  # v1 2.3: the default setting
  *PLAIN, *IMAGENET, *RESNET50, *SIMCLR_NETWORK, *SIMCLR_LARS,
  ('epochs', 100, 'v1 2.3; simclr1 README'),
  ('batch_size', 4096, 'v1 2.3; simclr1 README'),
  ('augment.view1', 'simclr_v1', 'v1 2.3 and A'),
  ('model.head_dim', 128, 'v1 2.3; simclr run.py:202'),
  ('model.head_layers', 2, 'v1 2.3; simclr1 run.py: num_nlh_layers=1'),
  ('learning_rate', 0.3, 'v1 2.3; simclr run.py:42'),
  ('learning_rate_scaling', 'linear', 'v1 2.3: 0.3 x batch / 256'),
  ('warmup_epochs', 10.0, 'v1 2.3; simclr run.py:50'),
  ('weight_decay', 1e-6, 'v1 2.3; simclr1 README'),
  ('queue_size', 0, 'v1 2.2: no memory bank'),
]  # fmt: skip
SIMCLR_CIFAR10 = [
  *PLAIN, *CIFAR10, *RESNET18_CIFAR, *SIMCLR_NETWORK, *SIMCLR_LARS, *NT_XENT,
  ('epochs', 1000, 'simclr README: CIFAR-10'),
  ('batch_size', 512, 'simclr README: CIFAR-10'),
  ('model.head_dim', 128, 'v1 2.3; simclr run.py:202'),
  ('temperature', 0.5, 'v1 B.9; simclr README: CIFAR-10'),
  ('learning_rate', 1.0, 'v1 B.9; simclr README: CIFAR-10'),
  ('learning_rate_scaling', 'linear', 'simclr run.py:46'),
  ('warmup_epochs', 1000 * 0.01, 'simclr run.py:50: 10 epochs, of whatever length'),
  ('queue_size', 0, 'v1 2.2: no memory bank'),
]  # fmt: skip
MOCO_IMAGENET_BOTH = [
  *PLAIN, *IMAGENET, *RESNET50, *MOCO_NETWORK, *MOCO_SGD, *MOCO_IMAGENET,
  ('method', 'moco', 'moco1 algorithm 1'),
  ('batch_size', 256, 'moco1 4; moco main_moco.py:71'),
  ('model.bn_layout', 'contiguous', 'as GPUs split a batch'),
  ('queue_size', 65536, 'moco1 4.1; moco main_moco.py:159'),
  ('key_momentum', 0.999, 'moco1 4.1; moco main_moco.py:165'),
  ('symmetric', False, 'moco1 algorithm 1'),
  ('shuffle', 'permute', 'moco1 3.3; moco builder.py:89-105'),
]  # fmt: skip

PUBLISHED = {
  'simclr_imagenet:v1': [
    *SIMCLR_IMAGENET_V1, *NT_XENT,
    ('temperature', 0.1, 'v1 table 5; simclr1 README'),
  ],
  'simclr_imagenet:v2': [
    *PLAIN, *IMAGENET, *RESNET152_3X_SK, *SIMCLR_NETWORK, *SIMCLR_LARS, *NT_XENT,
    ('epochs', 800, 'v2 3.1; #77'),
    ('batch_size', 4096, 'v2 3.1'),
    ('augment.view1', 'simclr_v2', 'v2 3.1: as v1; simclr data_util.py: multiplicative brightness'),
    ('model.head_layers', 3, 'v2 3.1; simclr run.py:206'),
    ('model.head_dim', 128, 'simclr run.py:202'),
    ('temperature', 0.1, 'simclr run.py:190, README: ImageNet; v2 gives no value'),
    ('queue_size', 65536, 'v2 3.1: 64K'),
    ('key_momentum', 0.999, 'v2 3.1'),
    ('learning_rate', 0.1, 'v2 3.1; #77'),
    ('learning_rate_scaling', 'sqrt', 'v2 3.1; #77'),
    ('warmup_epochs', 800 * 0.05, 'v2 3.1: 5 % of the epochs; #77'),
    ('weight_decay', 1e-4, 'v2 3.1'),
  ],
  'simclr_cifar10:v1': [
    *SIMCLR_CIFAR10,
    ('augment.view1', 'simclr_cifar10_v1', 'v1 B.9: strength 0.5, no blur'),
    ('model.head_layers', 2, 'v1 2.3; simclr1 run.py: num_nlh_layers=1'),
    ('weight_decay', 1e-6, 'v1 B.9: as on ImageNet; simclr1 README'),
  ],
  'simclr_cifar10:v2': [
    *SIMCLR_CIFAR10,
    ('augment.view1', 'simclr_cifar10_v2', 'simclr README: CIFAR-10, data_util.py'),
    ('model.head_layers', 3, 'simclr run.py:206'),
    ('weight_decay', 1e-4, 'simclr README: CIFAR-10'),
  ],
  # v1 table 4. Appendix B.10 tunes rate, margin and temperature on grids without saying which won.
  'simclr_losses:nt_xent': [
    *SIMCLR_IMAGENET_V1,
    ('loss', 'nt_xent', 'DIFFERS: v1 B.10 has negatives of the other view only, here of both'),
    ('hidden_norm', True, 'v1 equation 1; simclr run.py, --hidden_norm'),
    ('loss_scale', 2.0, 'simclr objective.py:34-88: the sum of both directions, not their mean'),
    ('temperature', 0.1, 'v1 table 5'),
  ],
  'simclr_losses:nt_logistic': [
    *SIMCLR_IMAGENET_V1,
    ('loss', 'nt_logistic', 'v1 tables 2 and 4'),
    ('loss_scale', 1.0, OWN),
    ('semi_hard', False, 'v1 table 4'),
    ('temperature', 0.2, 'this project, of the grid in v1 B.10'),
  ],
  'simclr_losses:nt_logistic_sh': [
    *SIMCLR_IMAGENET_V1,
    ('loss', 'nt_logistic', 'v1 tables 2 and 4'),
    ('loss_scale', 1.0, OWN),
    ('semi_hard', True, 'v1 table 4: (sh)'),
    ('temperature', 0.2, 'this project, of the grid in v1 B.10'),
  ],
  'simclr_losses:margin_triplet': [
    *SIMCLR_IMAGENET_V1,
    ('loss', 'margin_triplet', 'v1 tables 2 and 4'),
    ('loss_scale', 1.0, OWN),
    ('semi_hard', False, 'v1 table 4'),
    ('margin', 0.8, 'this project, of the grid in v1 B.10'),
  ],
  'simclr_losses:margin_triplet_sh': [
    *SIMCLR_IMAGENET_V1,
    ('loss', 'margin_triplet', 'v1 tables 2 and 4'),
    ('loss_scale', 1.0, OWN),
    ('semi_hard', True, 'v1 table 4: (sh)'),
    ('margin', 0.8, 'this project, of the grid in v1 B.10'),
  ],
  'moco_imagenet:v1': [
    *MOCO_IMAGENET_BOTH, *MOCO_STEPS,
    ('augment.view1', 'moco_v1', 'moco1 3.3; moco main_moco.py:340-348'),
    ('model.head', 'linear', 'moco1 3.3: the last fc layer; moco builder.py:34-41'),
    ('temperature', 0.07, 'moco1 3.3; moco main_moco.py:170'),
    ('first_loss', (0.0, 0.5), "this project: about 0.12 by MoCo's code"),
  ],
  'moco_imagenet:v2': [
    *MOCO_IMAGENET_BOTH,
    ('augment.view1', 'moco_v2', 'moco2 3; moco README:51, main_moco.py:327-338'),
    ('model.head', 'mlp', 'moco2 3; moco README:51'),
    ('model.head_layers', 2, 'moco2 3; moco builder.py:34-41'),
    ('temperature', 0.2, 'moco2 3; moco README:51'),
    ('schedule', 'cosine_by_epoch', 'moco2 3; moco README:51, main_moco.py:488-498'),
    ('schedule_first_epoch', 0, 'moco main_moco.py:488-498: the epochs run from 0'),
    ('first_loss', (6.2, 6.7), "this project: about 6.30 by MoCo's code"),
  ],
  'moco_cifar10:asymmetric': [
    *PLAIN, *CIFAR10, *RESNET18_CIFAR, *MOCO_NETWORK, *MOCO_SGD, *MOCO_DEMO,
    ('symmetric', False, 'demo: Set arguments'),
  ],
  'moco_cifar10:symmetric': [
    *PLAIN, *CIFAR10, *RESNET18_CIFAR, *MOCO_NETWORK, *MOCO_SGD, *MOCO_DEMO,
    ('symmetric', True, 'demo: Results, Symmetric'),
  ],
  'end_to_end_imagenet': [
    *PLAIN, *IMAGENET, *RESNET50, *MOCO_NETWORK, *MOCO_SGD, *MOCO_IMAGENET, *MOCO_STEPS,
    ('method', 'end_to_end', 'moco1 figure 2a'),
    ('batch_size', 1024, 'moco1 figure 3, 4.1: the largest; its rate grows linearly'),
    ('augment.view1', 'moco_v1', 'moco1 3.3, 4.1: the same pretext task'),
    ('model.head', 'linear', 'moco1 3.3, 4.1: the same pretext task'),
    ('model.bn_layout', 'contiguous', 'as GPUs split a batch'),
    ('temperature', 0.07, 'moco1 3.3, 4.1: the same loss'),
    ('shuffle', 'permute', 'moco1 3.3: shuffled as in MoCo'),
    ('shared_encoder', False, 'this project; moco1 figure 2a: they can be different'),
  ],
  'memory_bank_imagenet:info_nce': [
    *PLAIN, *IMAGENET, *RESNET50, *MOCO_NETWORK, *MOCO_SGD, *MOCO_IMAGENET, *MOCO_STEPS,
    *MEMORY_BANK,
    ('loss', 'info_nce', 'moco1 4.1'),
    ('negatives', 65536, 'moco1 figure 3'),
  ],
  'memory_bank_imagenet:nce': [
    *PLAIN, *IMAGENET, *RESNET50, *MOCO_NETWORK, *MOCO_SGD, *MOCO_IMAGENET, *MOCO_STEPS,
    *MEMORY_BANK,
    ('loss', 'nce', 'moco1 4.1; instdisc NCECriterion.py'),
    ('negatives', 4096, 'moco1 4.1; instdisc main.py:34-77'),
  ],
  'supervised_imagenet': [
    *PLAIN, *IMAGENET, *RESNET50,
    ('method', 'supervised', '#83: train_mode=finetune without a checkpoint'),
    ('epochs', 90, 'v1 figure 7, table B.3'),
    ('batch_size', 1024, OWN),
    ('augment.view1', 'supervised', 'v1 table B.3: crop; simclr data_util.py: crop and flip'),
    ('augment.view2', '', 'there is one view'),
    ('augment.eval', 'simclr_eval', 'v1 B.5; simclr data_util.py'),
    ('model.variant', 'simclr', 'simclr resnet.py'),
    ('model.se_ratio', 0.0, 'simclr run.py:231'),
    ('model.normalize', 'none', 'simclr data_util.py'),
    ('model.bn_groups', 1, 'simclr run.py:215'),
    ('model.head', 'none', 'simclr run.py:210'),
    ('head_layer', 0, 'simclr run.py:210'),
    ('fine_tune_after_block', -1, 'simclr run.py:129'),
    ('optimizer', 'nesterov', '#10: SGD; simclr model_util.py: use_nesterov=True'),
    ('momentum', 0.9, 'simclr run.py:174'),
    ('learning_rate', 0.1, '#10'),
    ('learning_rate_scaling', 'linear', '#10'),
    ('schedule', 'cosine', '#10'),
    ('warmup_epochs', 5.0, OWN),
    ('weight_decay', 1e-4, '#10'),
    ('weight_decay_on', 'kernels', "this project: the classifier's bias is decayed in simclr"),
  ],
  'finetune_imagenet:v1_1pct': [
    *SIMCLR_FINE_TUNING, *FINE_TUNING_V1,
    ('epochs', 60, 'v1 B.5'),
  ],
  'finetune_imagenet:v1_10pct': [
    *SIMCLR_FINE_TUNING, *FINE_TUNING_V1,
    ('epochs', 30, 'v1 B.5'),
  ],
  'finetune_imagenet:v1_100pct': [
    *SIMCLR_FINE_TUNING, *FINE_TUNING_V1,
    ('epochs', 30, 'this project: v1 B.2 and B.5 give none for 100 %'),
  ],
  'finetune_imagenet:v2_1pct': [
    *SIMCLR_FINE_TUNING, *FINE_TUNING_V2,
    ('epochs', 60, 'v2 3.1; simclr README: 1% of labels'),
    ('head_layer', 1, 'v2 3.1; simclr README: 1% of labels: ft_proj_selector'),
  ],
  'finetune_imagenet:v2_10pct': [
    *SIMCLR_FINE_TUNING, *FINE_TUNING_V2,
    ('epochs', 30, 'v2 3.1'),
    ('head_layer', 1, 'v2 3.1'),
  ],
  'finetune_imagenet:v2_100pct': [
    *SIMCLR_FINE_TUNING, *FINE_TUNING_V2,
    ('epochs', 30, 'v2 3.1'),
    ('head_layer', 0, 'v2 3.1: from the input of the projection head'),
  ],
  'distill_imagenet:self': [*DISTILLATION, ('temperature', 0.1, 'v2 3.1')],
  'distill_imagenet:small': [*DISTILLATION, ('temperature', 1.0, 'v2 3.1')],
}  # fmt: skip

# Recipes without published results: what is chosen here is pinned too.

OWN_IMAGES = [
  *PLAIN, *SIMCLR_NETWORK, *SIMCLR_LARS, *NT_XENT,
  ('data.source', 'folder', OWN),
  ('data.name', '', OWN),
  ('data.train_split', 'train', OWN),
  ('data.test_split', 'test', OWN),
  ('data.num_classes', 0, OWN),
  ('data.unlabelled', 'keep', OWN),
  ('model.sk_ratio', 0.0, 'simclr run.py:227'),
  ('model.head_layers', 2, 'v1 2.3'),
  ('weight_decay', 1e-6, 'v1 2.3'),
  ('queue_size', 0, 'v1 2.2: no memory bank'),
]  # fmt: skip
OWN_IMAGES_GPU = [
  *OWN_IMAGES,
  ('epochs', 1000, 'v1 table 6, B.9; --data chooses it by the number of images'),
  ('batch_size', 512, 'this project: of one accelerator'),
  ('warmup_epochs', 1000 * 0.1, 'v1 2.3: 10 of 100'),
  ('model.width_multiplier', 1.0, 'v1 2.3'),
  ('model.head_dim', 128, 'v1 2.3'),
]
OWN_IMAGES_CIFAR = [  # as simclr_cifar10:v1
  *OWN_IMAGES_GPU,
  ('augment.view1', 'simclr_cifar10_v1', 'v1 B.9'),
  ('model.depth', 18, 'simclr README: CIFAR-10'),
  ('temperature', 0.5, 'v1 B.9'),
  ('learning_rate', 1.0, 'v1 B.9'),
  ('learning_rate_scaling', 'linear', 'simclr run.py:46'),
]
SMALL_CLASSIFIER = [
  ('accumulate_steps', 1, OWN),
  ('batch_size', 64, OWN),
  ('fine_tune_after_block', -1, 'v1 B.5, v2 3.1: the whole network'),
  ('momentum', 0.9, 'v1 B.5'),
  ('learning_rate_scaling', 'none', OWN),
  ('schedule', 'cosine', 'simclr model_util.py:59-83'),
  ('warmup_epochs', 0.0, 'v1 B.5'),
  ('weight_decay_on', 'kernels', OWN),
]

CHOSEN_HERE = {
  'simclr_digits': [
    *PLAIN, *SIMCLR_NETWORK, *SIMCLR_LARS,
    ('data.source', 'digits', 'this project: they come with the package'),
    ('data.name', '', OWN),
    ('data.train_split', 'train', OWN),
    ('data.test_split', 'test', OWN),
    ('data.num_classes', 10, 'ten digits'),
    ('data.unlabelled', 'keep', OWN),
    ('image_size', 32, OWN),
    ('epochs', 4, 'this project: a minute on two CPU cores'),
    ('batch_size', 128, OWN),
    ('augment.view1', 'simclr_crop(0.2, 1) | simclr_jitter(1.0, p=0.8) | grayscale(p=0.5)',
     'this project: no flip, a mirrored digit is another sign; much gray, the tint tells images'),
    ('model.depth', 8, OWN),
    ('model.width_multiplier', 0.5, OWN),
    ('model.sk_ratio', 0.0, OWN),
    ('model.stem', 'strided', OWN),
    ('model.head_layers', 2, 'v1 2.3'),
    ('model.head_dim', 64, OWN),
    ('loss', 'nt_xent', 'v1 equation 1'),
    ('hidden_norm', True, 'v1 equation 1; simclr run.py, --hidden_norm'),
    ('loss_scale', 1.0, 'v1 algorithm 1: the mean'),
    ('temperature', 0.2, OWN),
    ('queue_size', 0, 'v1 2.2: no memory bank'),
    ('learning_rate', 8.0, OWN),
    ('learning_rate_scaling', 'linear', OWN),
    ('warmup_epochs', 4 * 0.1, 'v1 2.3: 10 of 100'),
    ('weight_decay', 1e-6, 'v1 2.3'),
  ],
  'simclr_images:224': [
    *OWN_IMAGES_GPU,
    ('image_size', 224, 'v1 A'),
    ('augment.view1', 'simclr_v2', 'v1 A, with the brightness of v2'),
    ('model.depth', 50, 'v1 2.3'),
    ('model.stem', 'imagenet', 'v1 2.3'),
    ('temperature', 0.1, 'v1 table 5'),
    ('learning_rate', 0.075, 'v1 B.1'),
    ('learning_rate_scaling', 'sqrt', 'v1 B.1'),
  ],
  'simclr_images:64': [
    *OWN_IMAGES_CIFAR,
    ('image_size', 64, OWN),
    ('model.stem', 'strided', OWN),
  ],
  'simclr_images:32': [
    *OWN_IMAGES_CIFAR,
    ('image_size', 32, 'v1 B.9'),
    ('model.stem', 'cifar', 'v1 B.9'),
  ],
  'simclr_images:cpu': [
    *OWN_IMAGES,
    ('image_size', 96, OWN),
    ('epochs', 20, 'this project: a quarter of an hour on two CPU cores'),
    ('batch_size', 128, OWN),
    ('augment.view1', 'simclr_crop(0.2, 1) | flip | simclr_jitter(0.5, p=0.8) | grayscale(p=0.2)',
     'this project: a small network learns more from milder views in a short time'),
    ('model.depth', 8, OWN),
    ('model.width_multiplier', 0.5, OWN),
    ('model.stem', 'imagenet', OWN),
    ('model.head_dim', 64, OWN),
    ('temperature', 0.2, OWN),
    ('learning_rate', 4.0, OWN),
    ('learning_rate_scaling', 'linear', OWN),
    ('warmup_epochs', 20 * 0.1, 'v1 2.3: 10 of 100'),
  ],
  # The classic contrastive loss is not in v1 table 4.
  'simclr_losses:pairwise_margin': [
    *SIMCLR_IMAGENET_V1,
    ('loss', 'pairwise_margin', 'this project: Hadsell et al. 2006'),
    ('loss_scale', 1.0, OWN),
    ('margin', 0.8, 'this project, of the grid in v1 B.10'),
  ],
  'finetune_small': [
    *SMALL_CLASSIFIER,
    ('method', 'supervised', 'v1 B.5'),
    ('steps', 200, 'this project: however many labels'),
    ('data.unlabelled', 'drop', 'v1 B.5, v2 3.1: only labelled images'),
    ('head_layer', 1, 'v2 3.1'),
    ('optimizer', 'adamw', OWN),
    ('learning_rate', 1e-3, OWN),
    ('weight_decay', 0.05, OWN),
  ],
  'distill_small': [
    *SMALL_CLASSIFIER,
    ('method', 'distill', 'v2 2, equation 2'),
    ('steps', 0, OWN),
    ('epochs', 5, OWN),
    ('data.unlabelled', 'keep', 'v2 3.1'),
    ('head_layer', 0, 'v2 3.1: without the projection head'),
    ('temperature', 1.0, 'v2 3.1'),
    ('alpha', 1.0, 'v2 3.1: only unlabelled examples'),
    ('hard_labels', False, 'v2 equation 2'),
    ('optimizer', 'adamw', OWN),
    ('learning_rate', 0.003, OWN),
    ('weight_decay', 1e-4, 'v2 3.1'),
  ],
}  # fmt: skip

RECIPES = {**PUBLISHED, **CHOSEN_HERE}

# What a recipe or protocol augments with: (op, arguments, probability, source), in order.

SIMCLR_CROP = ('simclr_crop', {'area_min': 0.08, 'area_max': 1, 'min_object_covered': 0.1}, 1,
               'v1 A: area from 0.08; simclr data_util.py:298-320: covered 0.1')  # fmt: skip
SIMCLR_GRAY = ('grayscale', {}, 0.2, 'v1 A; simclr data_util.py, random_color_jitter')
SIMCLR_BLUR = ('simclr_blur', {'per': 'batch'}, 0.5, 'v1 A; simclr data_util.py:393-440')
MOCO_CROP = ('torch_crop', {'area_min': 0.2, 'area_max': 1}, 1, 'moco main_moco.py:327-348')
MOCO_GRAY = ('grayscale', {}, 0.2, 'moco main_moco.py:327-348, demo: Define data loaders')
FLIP = ('flip', {}, 0.5, 'v1 A, moco main_moco.py:327-348, demo: Define data loaders')


def simclr_jitter(strength, brightness, p, source):
  return 'simclr_jitter', {'strength': strength, 'brightness': brightness}, p, source


def torch_jitter(brightness, contrast, saturation, hue, p, source):
  arguments = {'brightness': brightness, 'contrast': contrast, 'saturation': saturation, 'hue': hue}
  return 'torch_jitter', arguments, p, source


PIPELINES = {
  'simclr_v1': [
    SIMCLR_CROP, FLIP, simclr_jitter(1, 'additive', 0.8, 'v1 A'), SIMCLR_GRAY, SIMCLR_BLUR,
  ],
  'simclr_v2': [
    SIMCLR_CROP, FLIP,
    simclr_jitter(1, 'multiplicative', 0.8, 'v1 A; simclr run.py:239, data_util.py:53-75'),
    SIMCLR_GRAY, SIMCLR_BLUR,
  ],
  'simclr_cifar10_v1': [
    SIMCLR_CROP, FLIP, simclr_jitter(0.5, 'additive', 0.8, 'v1 B.9 and A'), SIMCLR_GRAY,
  ],
  'simclr_cifar10_v2': [
    SIMCLR_CROP, FLIP,
    simclr_jitter(0.5, 'multiplicative', 0.8, 'simclr README: CIFAR-10, data_util.py:53-75'),
    SIMCLR_GRAY,
  ],
  'supervised': [SIMCLR_CROP, FLIP],
  'crop_flip_blur': [SIMCLR_CROP, FLIP, SIMCLR_BLUR],  # for images of other than 3 channels
  'moco_v1': [
    MOCO_CROP, MOCO_GRAY,
    torch_jitter(0.4, 0.4, 0.4, 0.4, 1, 'moco main_moco.py:340-348; instdisc main.py:118-125'),
    FLIP,
  ],
  'moco_v2': [
    MOCO_CROP,
    torch_jitter(0.4, 0.4, 0.4, 0.1, 0.8, 'moco main_moco.py:327-338'),
    MOCO_GRAY,
    ('torch_blur', {'sigma_min': 0.1, 'sigma_max': 2}, 0.5, 'moco main_moco.py:327-338'),
    FLIP,
  ],
  'moco_cifar10': [
    ('torch_crop', {'area_min': 0.08, 'area_max': 1}, 1, 'demo: RandomResizedCrop(32)'),
    FLIP,
    torch_jitter(0.4, 0.4, 0.4, 0.1, 0.8, 'demo: Define data loaders'),
    MOCO_GRAY,
  ],
  'simclr_eval': [
    ('center_crop', {'fraction': 0.875}, 1, 'v1 B.5: 224 of 256; simclr data_util.py:176-243'),
  ],
  'moco_eval': [
    ('torch_center_crop', {'fraction': 224 / 256}, 1, 'moco main_lincls.py: Resize, CenterCrop'),
  ],
  # of PROTOCOLS
  'torch_crop(0.08, 1) | flip': [
    ('torch_crop', {'area_min': 0.08, 'area_max': 1}, 1, 'moco main_lincls.py: RandomResizedCrop'),
    FLIP,
  ],
  # chosen here: simclr_digits, simclr_images:cpu
  'simclr_crop(0.2, 1) | simclr_jitter(1.0, p=0.8) | grayscale(p=0.5)': [
    ('simclr_crop', {'area_min': 0.2, 'area_max': 1, 'min_object_covered': 0.1}, 1, OWN),
    simclr_jitter(1.0, 'multiplicative', 0.8, OWN),
    ('grayscale', {}, 0.5, OWN),
  ],
  'simclr_crop(0.2, 1) | flip | simclr_jitter(0.5, p=0.8) | grayscale(p=0.2)': [
    ('simclr_crop', {'area_min': 0.2, 'area_max': 1, 'min_object_covered': 0.1}, 1, OWN),
    FLIP,
    simclr_jitter(0.5, 'multiplicative', 0.8, OWN),
    SIMCLR_GRAY,
  ],
}  # fmt: skip

# What comes out: training images, steps, warm-up steps, {epoch: rate at its start}, source.
# The lengths of all recipes follow simclr model_util.py:53-62: epochs x images // batch + 1 steps.

MOCO_V1_RATES = {0: 0.03, 119: 0.03, 120: 0.003, 159: 0.003, 160: 0.0003, 199: 0.0003}
DEMO_RATES = {0: 0.059996, 99: 0.03, 199: 0.0}
SIMCLR_RATES = ('imagenet', 31_279, 3127, {0: 0.0, 10: 4.8, 55: 2.4, 100: 0.0}, 'v1 2.3: 4.8')

RATES = {
  'simclr_imagenet:v1': SIMCLR_RATES,
  'simclr_imagenet:v2': (
    'imagenet', 250_228, 12_511, {0: 0.0, 20: 3.2, 40: 6.4, 420: 3.2, 800: 0.0}, 'v2 3.1: 6.4'),
  'simclr_losses:nt_xent': SIMCLR_RATES,
  'simclr_losses:nt_logistic': SIMCLR_RATES,
  'simclr_losses:nt_logistic_sh': SIMCLR_RATES,
  'simclr_losses:margin_triplet': SIMCLR_RATES,
  'simclr_losses:margin_triplet_sh': SIMCLR_RATES,
  'simclr_cifar10:v1': (
    'cifar10', 97_657, 976, {0: 0.0, 10: 2.0, 505: 1.0, 1000: 0.0}, 'simclr README: CIFAR-10'),
  'simclr_cifar10:v2': (
    'cifar10', 97_657, 976, {0: 0.0, 10: 2.0, 505: 1.0, 1000: 0.0}, 'simclr README: CIFAR-10'),
  'moco_imagenet:v1': ('imagenet', 1_000_912, 0, MOCO_V1_RATES, 'moco main_moco.py:488-498'),
  'moco_imagenet:v2': (
    'imagenet', 1_000_912, 0, {0: 0.03, 1: 0.02999815, 100: 0.015, 199: 1.85e-6},
    'moco main_moco.py:488-498'),
  'moco_cifar10:asymmetric': ('cifar10', 19_532, 0, DEMO_RATES, 'demo: Define train/test'),
  'moco_cifar10:symmetric': ('cifar10', 19_532, 0, DEMO_RATES, 'demo: Define train/test'),
  'end_to_end_imagenet': (
    'imagenet', 250_228, 0, {0: 0.12, 119: 0.12, 120: 0.012, 159: 0.012, 160: 0.0012, 199: 0.0012},
    'moco1 4.1: 0.03 x batch / 256'),
  'memory_bank_imagenet:info_nce': ('imagenet', 1_000_912, 0, MOCO_V1_RATES, 'moco1 4'),
  'memory_bank_imagenet:nce': ('imagenet', 1_000_912, 0, MOCO_V1_RATES, 'instdisc main.py'),
  'supervised_imagenet': ('imagenet', 112_603, 6255, {0: 0.0, 5: 0.4, 90: 0.0}, '#10'),
  'finetune_imagenet:v1_1pct': ('1%', 188, 0, {0: 0.8, 30: 0.4, 60: 0.0}, 'v1 B.5: 0.8'),
  'finetune_imagenet:v1_10pct': ('10%', 939, 0, {0: 0.8, 15: 0.4, 30: 0.0}, 'v1 B.5: 0.8'),
  'finetune_imagenet:v1_100pct': ('imagenet', 9384, 0, {0: 0.8, 15: 0.4, 30: 0.0}, 'v1 B.5: 0.8'),
  'finetune_imagenet:v2_1pct': ('1%', 751, 0, {0: 0.16, 30: 0.08, 60: 0.0}, 'v2 3.1: 0.16'),
  'finetune_imagenet:v2_10pct': ('10%', 3754, 0, {0: 0.16, 15: 0.08, 30: 0.0}, 'v2 3.1: 0.16'),
  'finetune_imagenet:v2_100pct': (
    'imagenet', 37_535, 0, {0: 0.16, 15: 0.08, 30: 0.0}, 'v2 3.1: 0.16'),
  'distill_imagenet:self': (
    'imagenet', 125_114, 6255, {0: 0.0, 20: 6.4, 210: 3.2, 400: 0.0}, 'v2 3.1: 6.4'),
  'distill_imagenet:small': (
    'imagenet', 125_114, 6255, {0: 0.0, 20: 6.4, 210: 3.2, 400: 0.0}, 'v2 3.1: 6.4'),
}  # fmt: skip

# How encoders are evaluated.

PROTOCOLS = {
  'sgd': [
    ('pipeline', 'supervised', OWN),
    ('learning_rate', 0.0, OWN),
    ('batch_size', 256, OWN),
    ('epochs', 20, OWN),
    ('nesterov', True, OWN),
    ('decays', (), OWN),
    ('kernel_std', 0.0, OWN),
    ('standardize', True, OWN),
    ('min_steps', 3000, OWN),
  ],
  'simclr': [
    ('pipeline', 'supervised', 'v1 B.6 and B.5: crop and flip'),
    ('learning_rate', 0.1, 'v1 B.6: x batch / 256; simclr README: linear head'),
    # Of the CIFAR-10 command; for ImageNet v1 B.6 has 4096 and 90.
    ('batch_size', 512, 'simclr README: linear head'),
    ('epochs', 100, 'simclr README: linear head'),
    ('nesterov', True, 'v1 B.6 and B.5; simclr model_util.py'),
    ('decays', (), 'simclr model_util.py:59-83: cosine'),
    ('kernel_std', 0.0, 'simclr README: linear head: zero_init_logits_layer'),
    ('standardize', False, 'simclr README: linear head'),
    ('min_steps', 0, 'simclr README: linear head'),
  ],
  'moco': [
    ('pipeline', 'torch_crop(0.08, 1) | flip', 'moco main_lincls.py'),
    ('learning_rate', 30.0, 'moco1 4.1; moco main_lincls.py:77'),
    ('batch_size', 256, 'moco main_lincls.py:67'),
    ('epochs', 100, 'moco1 4.1; moco main_lincls.py:55'),
    ('nesterov', False, 'moco main_lincls.py'),
    ('decays', (60 / 100, 80 / 100), 'moco main_lincls.py:85'),
    ('kernel_std', 0.01, 'moco main_lincls.py:236'),
    ('standardize', False, 'moco main_lincls.py'),
    ('min_steps', 0, 'moco main_lincls.py'),
  ],
}
PROTOCOL_RATES = {  # {% of the training: factor on the learning rate}, source
  'sgd': ({0: 1.0, 50: 0.5, 100: 0.0}, OWN),
  'simclr': ({0: 1.0, 50: 0.5, 100: 0.0}, 'simclr model_util.py:59-83: cosine'),
  'moco': ({0: 1.0, 59: 1.0, 60: 0.1, 79: 0.1, 80: 0.01, 99: 0.01}, 'moco main_lincls.py:85'),
}

# What names in the recipes stand for, and what no recipe can change.

KNN = {name: p.default for name, p in inspect.signature(knn.predict).parameters.items()}

CONSTANTS = [
  ('normalize=imagenet', resnet.NORMALIZE['imagenet'],
   ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 'moco main_moco.py:323-325'),
  ('normalize=cifar10', resnet.NORMALIZE['cifar10'],
   ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)), 'demo: Define data loaders'),
  ('blocks of ResNet-18, bottleneck', resnet.DEPTHS[18], ((2, 2, 2, 2), False), 'simclr resnet.py'),
  ('blocks of ResNet-50, bottleneck', resnet.DEPTHS[50], ((3, 4, 6, 3), True), 'simclr resnet.py'),
  ('blocks of ResNet-152, bottleneck', resnet.DEPTHS[152], ((3, 8, 36, 3), True),
   'simclr resnet.py'),
  ('blocks of ResNet-8, bottleneck', resnet.DEPTHS[8], ((1, 1, 1), False), OWN),
  ('stem=imagenet: kernel, stride, pool', resnet.STEMS['imagenet'], (7, 2, True),
   'simclr resnet.py'),
  ('stem=cifar: kernel, stride, pool', resnet.STEMS['cifar'], (3, 1, False), 'v1 B.9, demo'),
  ('stem=strided: kernel, stride, pool', resnet.STEMS['strided'], (3, 2, False), OWN),
  ('momentum of BatchNorm', norm.BatchNorm.momentum, 0.9, 'simclr run.py:58; 1 - 0.1 of torch'),
  ('epsilon of BatchNorm', norm.BatchNorm.epsilon, 1e-5, 'simclr resnet.py; torch'),
  ('k of kNN', KNN['k'], 200, 'demo: Set arguments; instdisc test.py:67-135'),
  ('temperature of kNN', KNN['temperature'], 0.1, 'demo: Set arguments'),
  ('weights of the transfer protocol', len(lbfgs.SWEEP), 45, 'v1 B.8.1'),
  ('the smallest', lbfgs.SWEEP[0], 1e-6, 'v1 B.8.1'),
  ('the largest', lbfgs.SWEEP[-1], 1e5, 'v1 B.8.1'),
]  # fmt: skip

# Fields that need no row: no published number depends on them, or the user fills them in.
PLUMBING = {
  'code', 'seed', 'sharding', 'rematerialize', 'first_loss', 'init_from', 'init_network', 'init_state', 'teacher',
  'data.table', 'data.holdout', 'data.holdout_seed', 'data.channels', 'data.alpha', 'data.range',
  'data.dir', 'data.labels', 'data.label_seed', 'data.examples', 'data.skip_bad', 'data.max_pixels',
  'data.on_device', 'data.resize_on', 'data.scaled_decoding', 'data.shuffle_buffer', 'data.threads',
  'log_every_steps', 'checkpoint_every_steps', 'keep_checkpoints', 'knn_every_epochs', 'knn_images',
  'knn_features', 'tensorboard', 'watchdog_seconds', 'profile_steps',
}  # fmt: skip
# Fields that fine-tuning and distillation take from the run that they start from.
OF_THE_RUN = ('model.', 'data.', 'augment.', 'image_size', 'dtype')
# Field -> another one, and its values with which alone the field does anything; None: it is absent.
ONLY_WITH = {
  'epochs': ('steps', (0,)),
  'augment.view2': ('method', ('simclr', 'moco', 'end_to_end')),
  'decay_epochs': ('schedule', ('multistep',)),
  'accumulate_negatives': ('accumulate_steps', ()),  # no recipe accumulates
  'schedule_first_epoch': ('schedule', ('cosine_by_epoch',)),
  'model.bn_layout': ('model.bn_groups', (8,)),
  'model.head_layers': ('model.head', ('mlp',)),
  'model.head_hidden': ('model.head', ('mlp',)),
  'model.head_dim': ('model.head', ('linear', 'mlp')),
  'model.head_norm': ('model.head', ('linear', 'mlp')),
  'temperature': ('loss', (None, 'nt_xent', 'nt_logistic', 'info_nce', 'nce')),
  'margin': ('loss', ('margin_triplet', 'pairwise_margin')),
  'semi_hard': ('loss', ('nt_logistic', 'margin_triplet')),
  'hidden_norm': ('loss', ('nt_xent',)),
  'key_momentum': ('queue_size', (4096, 65536)),
}


def needs_a_row(spec, field, flat):
  """Whether the field says something about this recipe, of all fields `flat`."""
  of_the_run = spec.startswith(('finetune', 'distill')) and field.startswith(OF_THE_RUN)
  if of_the_run or field in PLUMBING:
    return False
  other, values = ONLY_WITH.get(field, ('method', (flat['method'],)))
  return flat.get(other) in values


def same(value, published):
  if isinstance(published, tuple):
    return len(value) == len(published) and all(map(same, value, published))
  if isinstance(published, float):
    return math.isclose(value, published, rel_tol=1e-9)
  return value == published


def wrong(rows, found):
  """A line for each row (field, value, source) that `found`, field -> value, contradicts."""
  return [
    f'{field} is {found.get(field, "missing")!r}, not {value!r} ({source})'
    for field, value, source in rows
    if field not in found or not same(found[field], value)
  ]


@pytest.mark.parametrize('spec', RECIPES)
def test_recipe(spec):
  """Breaks if a value of a recipe, or a default that it relies on, is not the one in the table."""
  rows, flat = RECIPES[spec], config.flatten(config.load(spec))
  listed = [field for field, _, _ in rows]
  problems = wrong(rows, flat)
  problems += [f'{f} has two rows' for f in set(listed) if listed.count(f) > 1]
  problems += [f'{f} has no row' for f in flat if f not in listed and needs_a_row(spec, f, flat)]
  assert not problems, f'{spec}: ' + '; '.join(problems)


def test_every_recipe_is_in_the_table():
  """Breaks if a recipe or a variant can be added without its values being looked up."""
  specs = [
    f'{name}:{variant}' if variant else name
    for name in config.names()
    for variant in config.variants(name) or ['']
  ]
  assert sorted(specs) == sorted(RECIPES)


@pytest.mark.parametrize('name', config.names())
def test_no_variant_is_hidden(name):
  """Breaks if a recipe takes a variant that it does not list, or its default is not the first."""
  listed = list(config.variants(name))
  get_config = runpy.run_path(CONFIGS / f'{name}.py')['get_config']
  defaults = [p.default for p in inspect.signature(get_config).parameters.values()]
  assert defaults == listed[:1]
  with pytest.raises(ConfigError):
    config.load(f'{name}:unlisted')


def test_every_row_has_a_source():
  """Breaks if a value comes from nowhere."""
  parts = [*RECIPES.values(), *PROTOCOLS.values(), *PIPELINES.values(), CONSTANTS, RATES.values()]
  assert [row for part in parts for row in part if not row[-1]] == []


@pytest.mark.parametrize('text', PIPELINES)
def test_pipeline(text):
  """Breaks if an op, the order, a crop's area, a strength or a probability is another one."""
  ops = [(op.name, op.arguments, op.p) for op in augment.parse(text)]
  pairs = itertools.zip_longest(ops, PIPELINES[text], fillvalue=())
  problems = [f'{op}, not {row}' for op, row in pairs if op != row[:3]]
  assert not problems, f'{text}: ' + '; '.join(problems)


def test_every_pipeline_is_in_the_table():
  """Breaks if a recipe or a protocol can augment in a way that the table does not list."""
  used = {
    value
    for rows in [*RECIPES.values(), *PROTOCOLS.values()]
    for field, value, _ in rows
    if value and field in ('augment.view1', 'augment.view2', 'augment.eval', 'pipeline')
  }
  assert used | set(augment.PIPELINES) == set(PIPELINES)


@pytest.mark.parametrize('spec', RATES)
def test_learning_rates(spec):
  """Breaks if peak, warm-up, decay or length of a training are not those that the papers give."""
  images, steps, warmup, rates, source = RATES[spec]
  images, recipe = TRAIN_IMAGES[images], config.load(spec)
  assert optim.train_steps(recipe, images) == steps, source
  assert optim.warmup_steps(recipe, images) == warmup, source
  rate = optim.schedule(recipe, images)
  begin = {epoch: math.ceil(epoch * images / recipe.batch_size) for epoch in rates}
  found = {epoch: float(rate(step)) for epoch, step in begin.items()}
  assert found == pytest.approx(rates, rel=5e-3, abs=1e-9), source


def test_every_published_length_is_in_the_table():
  """Breaks if a published recipe has no learning rates to compare with."""
  assert set(RATES) == set(PUBLISHED)


@pytest.mark.parametrize('name', PROTOCOLS)
def test_protocol(name):
  """Breaks if a linear evaluation is not the published one."""
  found = dataclasses.asdict(probe.PROTOCOLS[name])
  problems = wrong(PROTOCOLS[name], found)
  assert not problems, f'{name}: ' + '; '.join(problems)
  assert set(found) == {field for field, _, _ in PROTOCOLS[name]}
  assert set(PROTOCOLS) == set(probe.PROTOCOLS)
  (factors, source), schedule = PROTOCOL_RATES[name], probe.PROTOCOLS[name].schedule(100)
  assert {at: float(schedule(at)) for at in factors} == pytest.approx(factors), source


def test_constants():
  """Breaks if a name in a recipe stands for other numbers, or an evaluation has other ones."""
  assert [row for row in CONSTANTS if not same(*row[1:3])] == []
  np.testing.assert_allclose(np.diff(np.log10(lbfgs.SWEEP)), 11 / 44)  # evenly spaced
