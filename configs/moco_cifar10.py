"""MoCo on CIFAR-10 with the settings of the authors' demo: ResNet-18, 4,096 keys in the queue.

  simclr-jax pretrain --config=moco_cifar10 --workdir=runs/moco_cifar10 --config.data.dir=TFDS_DIR

Published kNN accuracy (k = 200, temperature 0.1) after 200, 400 and 800 epochs: `:asymmetric`
82.6, 86.3, 88.7 %, `:symmetric` 85.3, 88.5, 89.7 %; `:asymmetric` after 1, 5, 10, 20, 50 and 100
epochs: 32.0, 38.0, 48.0, 61.4, 73.3, 78.1 %. The demo measures it on the output z of the head, and
so does this recipe; afterwards: `simclr-jax knn --features=z`. Hardware: one V100. Time: 20 seconds
per epoch. Not yet repeated here.

The demo counts epochs from 1, so the learning rate of the last epoch is 0. For runs of one epoch
or less, add --config.schedule_first_epoch=0.
"""

import ml_collections

from simclr_jax import fields

VARIANTS = {
  'asymmetric': 'the first view is the query, the second the key',
  'symmetric': 'each view is the query once',
}


def get_config(variant: str = 'asymmetric') -> ml_collections.ConfigDict:
  config = fields.recipe('moco')
  config.epochs = 200
  config.batch_size = 512
  config.image_size = 32
  config.data.name = 'cifar10'
  config.data.num_classes = 10
  config.augment.view1 = 'moco_cifar10'
  config.augment.eval = 'moco_eval'

  config.model.depth = 18
  config.model.stem = 'cifar'
  config.model.variant = 'torchvision'
  config.model.normalize = 'cifar10'
  config.model.bn_groups = 8
  config.model.bn_layout = 'strided'  # the demo's split of a batch
  config.model.head = 'linear'
  config.model.head_norm = 'none'

  config.knn_features = 'z'
  config.temperature = 0.1
  config.queue_size = 4096
  config.key_momentum = 0.99
  config.symmetric = variant == 'symmetric'

  config.optimizer = 'sgd'
  config.learning_rate = 0.06
  config.learning_rate_scaling = 'none'
  config.schedule = 'cosine_by_epoch'
  config.schedule_first_epoch = 1
  config.weight_decay = 5e-4
  config.weight_decay_on = 'all'
  return config
