"""Every field that a recipe has, with its neutral value; a recipe sets what it wants otherwise."""

import ml_collections

from simclr_jax import methods


def recipe(method: str) -> ml_collections.ConfigDict:
  """A recipe for a file of `simclr_jax/methods/`, with that method's own fields (its `FIELDS`)."""
  config = ml_collections.ConfigDict()
  config.method = method
  config.seed = 0
  config.epochs = 100
  config.steps = 0  # above 0: instead of the epochs
  config.batch_size = 256  # of all devices together
  config.image_size = 224
  config.dtype = 'auto'  # of the convolutions: bfloat16 on TPU and GPU, float32 on CPU

  config.data = ml_collections.ConfigDict()
  config.data.source = 'tfds'  # a file of simclr_jax/data/
  config.data.name = ''
  config.data.dir = ''  # local or gs://; empty: TFDS's own default
  config.data.train_split = 'train'
  config.data.test_split = 'test'
  config.data.labels = (
    ''  # training labels that are known: 1%, 10%, or a number a class; empty: all
  )
  config.data.label_seed = 0  # which ones
  config.data.unlabelled = 'keep'  # or drop: the images whose label is not known
  config.data.num_classes = 0  # for the online probe; 0: no labels
  config.data.examples = 0  # training images; 0: counted when the data is opened
  config.data.skip_bad = 0  # images that may be left out because they cannot be decoded
  config.data.max_pixels = 100_000_000  # of an image; larger ones are not decoded
  config.data.on_device = 'auto'  # keep the images there: yes, no, auto (of one size, up to 4 GiB)
  config.data.resize_on = 'device'  # or host: fewer bytes to the device, much more work on the host
  config.data.scaled_decoding = True  # JPEG at 1/2, 1/4 or 1/8 where a view is that much smaller
  config.data.shuffle_buffer = 4096  # records of TFRecord files, which cannot be read in any order
  config.data.threads = 0  # that decode; 0: one a core

  # Pipelines of simclr_jax/data/augment.py: a name, or ops separated by |.
  config.augment = ml_collections.ConfigDict()
  config.augment.view1 = 'simclr_v1'
  config.augment.view2 = ''  # empty: as view1
  config.augment.eval = 'simclr_eval'

  config.model = ml_collections.ConfigDict()
  config.model.depth = 50
  config.model.width_multiplier = 1.0
  config.model.stem = 'imagenet'
  config.model.dialect = 'simclr'
  config.model.sk_ratio = 0.0  # selective kernels and ResNet-D; SimCLR v2 has 0.0625
  config.model.se_ratio = 0.0  # squeeze and excitation
  config.model.normalize = 'none'  # pixel mean and standard deviation: none, imagenet, cifar10
  config.model.bn_groups = 1  # BatchNorm groups of the global batch; 1: all of it together
  config.model.bn_layout = 'contiguous'  # or strided: example i is in group i % bn_groups
  config.model.head = 'mlp'
  config.model.head_layers = 2
  config.model.head_dim = 128
  config.model.head_norm = True  # SimCLR's BatchNorm; False: MoCo's biases

  # How a step is laid out; of these only accumulate_steps changes what is computed.
  config.sharding = (
    'replicated'  # or fsdp: parameters and the optimizer's slots split over the devices
  )
  config.accumulate_steps = (
    1  # parts of a batch, one after the other: negatives and BatchNorm are of a part
  )
  config.rematerialize = (
    False  # compute a block's activations again for its gradient: slower, less memory
  )

  config.optimizer = 'lars'
  config.learning_rate = 0.3
  config.learning_rate_scaling = 'linear'  # with the batch size
  config.schedule = 'cosine'  # every step; cosine_by_epoch; multistep: a tenth at each decay_epochs
  config.decay_epochs = (120, 160)
  config.schedule_first_epoch = 0  # 1: cosine_by_epoch counts from 1
  config.warmup_epochs = 0.0
  config.weight_decay = 1e-6
  config.weight_decay_on = 'kernels'  # or all: BatchNorm and biases too
  config.momentum = 0.9

  # Loss of the first step by an independent measurement: a first hint that all is well. 0, 0: unknown.
  config.first_loss = (0.0, 0.0)

  config.log_every_steps = 20
  config.checkpoint_every_steps = 0  # 0: once an epoch, or every 20 steps if that is longer
  config.keep_checkpoints = 2
  config.knn_every_epochs = 10  # the online kNN; 0: never
  config.knn_images = 10_000  # in its bank, and a fifth as many queries; 0: all
  config.tensorboard = True
  config.watchdog_seconds = 1800.0  # without a finished step the process ends; 0: it waits for ever
  config.profile_steps = ()  # (first, last): a trace of these steps, in WORKDIR/profile

  for field, (value, _) in methods.module(method).FIELDS.items():
    config[field] = value
  return config
