"""The table of recipe fields: default, allowed values, help, and how a run treats a changed value.

Fields of a single method are in the file of this method, as `FIELDS`. This file does not import JAX, so that
invalid fields are reported at once.
"""

import ast
import pathlib
from typing import Any, NamedTuple

import ml_collections

from simclr_jax import plugins
from simclr_jax.errors import ConfigError
from simclr_jax.validation import Choices, Range, did_you_mean


class Field(NamedTuple):
  """A field of a recipe.

  Attributes:
    default: the default value; values of the field have the same type.
    help: one sentence.
    allowed: the allowed values; None: all values of the type.
    resumable: whether a run may be resumed with another value, because results do not depend on the field.
    compiled: whether the compiled programs depend on the field.
    inherited: whether fine-tuning and distillation take the value from the run that they start from.
    local: whether processes of one run may have different values.
  """

  default: Any
  help: str
  allowed: Range | Choices | None = None
  resumable: bool = False
  compiled: bool = True
  inherited: bool = False
  local: bool = False


METHODS = pathlib.Path(__file__).parent / 'methods'
SEED = Range(0, 2**32 - 1)
FLAG = Choices(False, True)

TABLE: dict[str, Field] = {
  'method': Field('simclr', 'a built-in method, or the path of a Python file that defines one'),
  'code': Field((), 'checksums of your own files that the recipe names; filled in by the program'),
  'seed': Field(0, 'seed of all randomness', SEED, compiled=False),
  'epochs': Field(100, 'length of the training', Range(0)),
  'steps': Field(0, 'length of the training in steps; overrides epochs if above 0', Range(0)),
  'batch_size': Field(256, 'images per step, over all devices', Range(2)),
  'image_size': Field(224, 'side of the views in pixels', Range(8, 4096), inherited=True),
  'dtype': Field(
    'auto', 'dtype of the convolutions; auto: bfloat16 on TPU and GPU, float32 on CPU',
    Choices('auto', 'float32', 'bfloat16'), inherited=True,
  ),
  'data.source': Field(
    'tfds', 'kind of data set',
    Choices('arrays', 'digits', 'folder', 'tfds'), inherited=True,
  ),
  'data.name': Field('', 'TFDS name of the data set', inherited=True),
  'data.dir': Field(
    '', 'local or gs:// folder of the data set; empty: the default of TFDS',
    resumable=True, compiled=False, inherited=True, local=True,
  ),
  'data.train_split': Field('train', 'training split', inherited=True),
  'data.test_split': Field('test', 'test split; empty: none', resumable=True, inherited=True),
  'data.table': Field(
    '', 'CSV file with the columns path, label and, optionally, split; empty: labels are the names of sub-folders',
    resumable=True, compiled=False, inherited=True, local=True,
  ),
  'data.holdout': Field(
    0.2, 'fraction of each class that is held out as the test split, if the data set has none; 0: none',
    Range(0.0, 0.9), compiled=False, inherited=True,
  ),
  'data.holdout_seed': Field(
    0, 'seed of the choice of the held-out images', SEED, compiled=False, inherited=True
  ),
  'data.channels': Field(3, 'number of channels of the images', Range(1, 256), inherited=True),
  'data.alpha': Field(
    'white', 'background of transparent images; ignore: their colours without the alpha channel',
    Choices('white', 'black', 'gray', 'ignore'), compiled=False, inherited=True,
  ),
  'data.range': Field(
    (0.0, 0.0), 'LOW,HIGH: values of 16-bit and float images that become black and white; 0, 0: measured',
    compiled=False, inherited=True,
  ),
  'data.labels': Field(
    '', 'training labels to use: a fraction, such as 1%, or a number per class; empty: all'
  ),
  'data.label_seed': Field(0, 'seed of the choice of labels', SEED, compiled=False),
  'data.unlabelled': Field(
    'keep', 'keep or drop images whose label is not used', Choices('keep', 'drop')
  ),
  'data.num_classes': Field(
    0, 'number of classes of the online probe or classifier; 0: no labels', Range(0)
  ),
  'data.examples': Field(
    0, 'number of training images; 0: counted when the data is loaded', Range(0)
  ),
  'data.skip_bad': Field(
    0, 'largest number of corrupt images that may be skipped', Range(0), inherited=True
  ),
  'data.max_pixels': Field(
    100_000_000, 'larger images are not decoded', Range(1, 2**31 - 1), inherited=True
  ),
  'data.on_device': Field(
    'auto', 'keep the images in device memory; auto: images of one size, up to 4 GiB',
    Choices('auto', 'yes', 'no'), inherited=True,
  ),
  'data.resize_on': Field(
    'device', 'where views are resized; host: fewer bytes to the device, more work on the host',
    Choices('device', 'host'), inherited=True,
  ),
  'data.scaled_decoding': Field(
    True, 'decode JPEG at 1/2, 1/4 or 1/8 where a view is that much smaller', FLAG, inherited=True
  ),
  'data.shuffle_buffer': Field(
    4096, 'records; for TFRecord files, which have no random access', Range(1), inherited=True
  ),
  'data.threads': Field(
    0, 'decoding threads; 0: one per core', Range(0), resumable=True, inherited=True, local=True
  ),
  'augment.view1': Field('simclr_v1', 'augmentation pipeline: a name, or ops joined by |'),
  'augment.view2': Field('', 'augmentation pipeline of the second view; empty: the same as view1'),
  'augment.eval': Field('simclr_eval', 'preprocessing pipeline of evaluations', inherited=True),
  'augment.ops': Field('', 'a Python file with ops of your own', inherited=True),
  'model.encoder': Field(
    '', 'a Python file with an encoder of your own; empty: ResNet', inherited=True
  ),
  'model.depth': Field(
    50, 'layers of the ResNet', Choices(8, 18, 34, 50, 101, 152, 200), inherited=True
  ),
  'model.width_multiplier': Field(
    1.0, 'factor on all channel counts', Range(1 / 64), inherited=True
  ),
  'model.stem': Field(
    'imagenet', 'imagenet: 7x7 stride 2 and max-pool; strided: 3x3 stride 2; cifar: 3x3 stride 1',
    Choices('imagenet', 'strided', 'cifar'), inherited=True,
  ),
  'model.variant': Field(
    'simclr', 'simclr, torchvision as in MoCo, or haiku as in BYOL: padding, projection shortcuts, initialisation, '
    'BatchNorm variance',
    Choices('simclr', 'torchvision', 'haiku'), inherited=True,
  ),
  'model.sk_ratio': Field(
    0.0, 'selective kernels and ResNet-D; SimCLR v2 has 0.0625', Range(0.0, 1.0), inherited=True
  ),
  'model.se_ratio': Field(0.0, 'squeeze and excitation', Range(0.0, 1.0), inherited=True),
  'model.normalize': Field(
    'none', 'mean and standard deviation with which the network normalises pixels',
    Choices('none', 'imagenet', 'cifar10'), inherited=True,
  ),
  'model.bn_groups': Field(
    1, 'number of BatchNorm groups of the global batch; 1: statistics of the global batch', Range(1),
    inherited=True,
  ),
  'model.bn_layout': Field(
    'contiguous', 'strided: example i is in group i % bn_groups', Choices('contiguous', 'strided'),
    inherited=True,
  ),
  'model.head': Field(
    'mlp', 'projection head', Choices('none', 'linear', 'mlp'), inherited=True
  ),
  'model.head_layers': Field(2, 'number of layers of an mlp head', Range(1, 4), inherited=True),
  'model.head_hidden': Field(
    0, 'width of the hidden layers of the head; 0: the width of the features', Range(0), inherited=True
  ),
  'model.head_dim': Field(128, 'size of the output of the head', Range(1), inherited=True),
  'model.head_norm': Field(
    'all', 'BatchNorm in the head: all (SimCLR: the last without offset), hidden, none (MoCo), '
    'all_last_plain (the last without scale and offset)',
    Choices('all', 'hidden', 'none', 'all_last_plain'), inherited=True,
  ),
  'init_from': Field(
    '', 'a run, an exported encoder or a file of weights of another program to start from; empty: random weights'
  ),
  'init_network': Field('', 'the network of init_from, if the file contains several, such as encoder_q'),
  'sharding': Field(
    'replicated', 'fsdp: parameters and optimizer state are sharded over the devices',
    Choices('replicated', 'fsdp'), resumable=True,
  ),
  'accumulate_steps': Field(
    1, 'number of micro-batches per step; BatchNorm statistics are per micro-batch, negatives see accumulate_negatives',
    Range(1),
  ),
  'accumulate_negatives': Field(
    'batch', 'with accumulate_steps, negatives of simclr and end_to_end: of the whole batch, which takes one more '
    'forward pass, or of each micro-batch; moco and memory_bank have all of their queue or bank',
    Choices('batch', 'micro_batch'),
  ),
  'rematerialize': Field(
    'false', 'true: recompute the activations of each block of a ResNet in the backward pass; parts: also compute each '
    'block on 8 parts of the batch, with BatchNorm over all of them; less memory, slower',
    Choices('false', 'true', 'parts'), resumable=True,
  ),
  'optimizer': Field('lars', 'the optimizer', Choices('lars', 'sgd', 'nesterov', 'adamw')),
  'learning_rate': Field(0.3, 'base learning rate', Range(0.0)),
  'learning_rate_scaling': Field(
    'linear', 'linear: times batch_size / 256; sqrt: times sqrt(batch_size)',
    Choices('linear', 'sqrt', 'none'),
  ),
  'schedule': Field(
    'cosine', 'cosine: per step, with warm-up; cosine_by_epoch; multistep: x 0.1 at decay_epochs',
    Choices('cosine', 'cosine_by_epoch', 'multistep'),
  ),
  'decay_epochs': Field((120, 160), 'epochs at which the multistep schedule decays'),
  'schedule_first_epoch': Field(0, '1: cosine_by_epoch counts epochs from 1', Range(0, 1)),
  'warmup_epochs': Field(0.0, 'linear warm-up of the learning rate', Range(0.0)),
  'weight_decay': Field(1e-6, 'weight decay', Range(0.0)),
  'weight_decay_on': Field(
    'kernels', 'kernels: decay kernels only; all: also BatchNorm parameters and biases', Choices('kernels', 'all')
  ),
  'momentum': Field(0.9, 'momentum of the optimizer', Range(0.0, 1.0)),
  'first_loss': Field(
    (0.0, 0.0), 'expected range of the loss of the first step; 0, 0: unknown', resumable=True
  ),
  'log_every_steps': Field(20, 'steps between two logged records of metrics', Range(1), resumable=True),
  'checkpoint_every_steps': Field(
    0, 'steps between two checkpoints; 0: once per epoch, but at least 20 steps', Range(0),
    resumable=True,
  ),
  'keep_checkpoints': Field(2, 'number of newest checkpoints to keep', Range(1), resumable=True),
  'knn_every_epochs': Field(10, 'epochs between online kNN evaluations; 0: never', Range(0), resumable=True),
  'knn_images': Field(
    10_000, 'training images of the online kNN, with a fifth as many test images; 0: all', Range(0),
    resumable=True,
  ),
  'knn_features': Field(
    'h', 'features of the online kNN: h, of the encoder, or z, of the projection head as in the CIFAR-10 demo of MoCo',
    Choices('h', 'z'), resumable=True, compiled=False,
  ),
  'tensorboard': Field(True, 'write TensorBoard files', FLAG, resumable=True),
  'watchdog_seconds': Field(
    1800.0, 'the process exits if no step finishes for this time; 0: never', Range(0.0), resumable=True
  ),
  'profile_steps': Field((), 'FIRST,LAST: trace these steps to WORKDIR/profile', resumable=True),
}  # fmt: skip

# Old names and values of fields in config.json of old runs -> current names and values.
RENAMED = {'model.dialect': 'model.variant'}
# Values of fields that old runs did not have, where the default would change their results.
OLD_DEFAULTS = {'data.holdout': 0.0, 'data.alpha': 'ignore', 'accumulate_negatives': 'micro_batch'}
OLD_VALUES = {
  'model.head_norm': {True: 'all', False: 'none'},
  'rematerialize': {True: 'true', False: 'false'},
}


def upgraded_value(field: str, value: Any) -> Any:
  """The current value of a field for which true and false were values once, see `OLD_VALUES`."""
  return OLD_VALUES.get(field, {}).get(value, value) if isinstance(value, bool) else value


def method_names() -> list[str]:
  """The names of the built-in methods: the files of simclr_jax/methods/."""
  return sorted(p.stem for p in METHODS.glob('[a-z]*.py'))


def of_method(method: str) -> dict[str, Field]:
  """The `FIELDS` of a method. The file is parsed, not executed, so that JAX is not imported.

  Args:
    method: a built-in method, or the path of a Python file.

  Returns:
    Name -> field; empty if the file defines no `FIELDS`.

  Raises:
    ConfigError: there is no such method, or its `FIELDS` contain more than `Field`, `Range`, `Choices`,
      `of_method` and literals.
  """
  path = pathlib.Path(method) if plugins.is_file(method) else METHODS / f'{method}.py'
  if not path.is_file() or (path.parent == METHODS and path.stem not in method_names()):
    names = method_names()
    raise ConfigError(
      f'method={method!r} is not one of {", ".join(names)}, nor a .py file{did_you_mean(method, names)}'
    )
  allowed = {'Field': Field, 'Range': Range, 'Choices': Choices, 'of_method': of_method}
  try:
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == 'FIELDS':
        code = compile(ast.Expression(node.value), str(path), 'eval')
        return eval(code, {'__builtins__': {}, **allowed})
  except ConfigError:
    raise
  except Exception as error:
    raise ConfigError(
      f'FIELDS in {path} cannot be read: {error}; write a dict of Field(default, help, allowed)'
    ) from None
  return {}


def of_recipe(method: str) -> dict[str, Field]:
  """All fields of a recipe for `method`, in order: those of all methods, then those of this method."""
  return {**TABLE, **of_method(method)}


def recipe(method: str) -> ml_collections.ConfigDict:
  """A recipe for a method, with the default value of every field."""
  config = ml_collections.ConfigDict()
  for name, field in of_recipe(method).items():
    *group, key = name.split('.')
    part = config
    for level in group:
      if level not in part:
        part[level] = ml_collections.ConfigDict()
      part = part[level]
    part[key] = field.default
  config.method = method
  return config
