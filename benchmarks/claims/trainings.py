"""The trainings that claims compare, and the fields that they have at each size."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

CIFAR10 = {
  'data.name': 'cifar10',
  'data.num_classes': 0,  # no online probe: labels are for evaluations
  'data.test_split': 'test',
  'image_size': 32,
  'keep_checkpoints': 1,
  'knn_every_epochs': 0,
  'tensorboard': False,
}
# Size -> fields of every training.
SIZES = {
  'small': {
    **CIFAR10,
    'data.train_split': 'train[:10000]',
    'data.test_split': 'test[:2000]',
    'decay_epochs': (2, 3),
    'dtype': 'float32',
    'epochs': 4,
    'log_every_steps': 10,
    'model.depth': 8,
    'model.stem': 'strided',
    'model.width_multiplier': 0.25,
    'schedule_first_epoch': 0,
  },
  'full': {
    **CIFAR10,
    'data.train_split': 'train[:45000]',
    'decay_epochs': (120, 160),
    'epochs': 200,
    'model.depth': 18,
    'model.stem': 'cifar',
    'model.width_multiplier': 1.0,
    'schedule_first_epoch': 0,
  },
}
# Images that choose learning rates and temperatures; no training has them, and no result is of them.
VALIDATION = {'small': 'train[10000:12000]', 'full': 'train[45000:]'}
# MoCo's demo on CIFAR-10, for the mechanisms that it is compared to.
DEMO = {
  'augment.eval': 'moco_eval',
  'augment.view1': 'moco_cifar10',
  'learning_rate': 0.06,
  'learning_rate_scaling': 'none',
  'model.head': 'linear',
  'model.head_norm': 'none',
  'model.normalize': 'cifar10',
  'model.variant': 'torchvision',
  'schedule': 'cosine',
  'temperature': 0.1,
  'weight_decay': 5e-4,
  'weight_decay_on': 'all',
}
# Size -> recipe -> fields. Learning rates were chosen on the images of VALIDATION.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
  'small': {
    'simclr_cifar10': {'batch_size': 128, 'learning_rate': 4.0},
    'moco_cifar10': {**DEMO, 'batch_size': 128, 'queue_size': 4096},
    'memory_bank_imagenet': {**DEMO, 'batch_size': 128, 'negatives': 4096},
    'end_to_end_imagenet': {**DEMO, 'batch_size': 128},
  },
  'full': {
    'simclr_cifar10': {'batch_size': 512},
    'moco_cifar10': {**DEMO, 'batch_size': 512, 'queue_size': 4096},
    'memory_bank_imagenet': {**DEMO, 'batch_size': 512, 'negatives': 4096},
    'end_to_end_imagenet': {**DEMO, 'batch_size': 512},
  },
}
TIMES = ' x'  # a field with this ending is a factor on the value of the size: {'epochs x': 4}


@dataclasses.dataclass(frozen=True)
class Training:
  """A training, of any size and seed.

  Attributes:
    kind: a method of `runner.Runner`: pretrain, finetune, distill, probe, cost or untrained.
    recipe: a built-in recipe, or the protocol of a linear probe.
    fields: the fields that differ from those of the recipe and the size, as sorted pairs.
    source: the training whose weights are fine-tuned or probed, or that is the teacher; None: none.
    labels: the labels of a fine-tuning, as `data.labels`.
  """

  kind: str
  recipe: str
  fields: tuple[tuple[str, Any], ...] = ()
  source: 'Training | None' = None
  labels: str = ''

  def but(self, **fields: Any) -> 'Training':
    """The same training with other fields; `__` in a name is a dot, and a final `_x` makes a factor."""
    return dataclasses.replace(self, fields=_pairs({**dict(self.fields), **_names(fields)}))

  @functools.cached_property
  def key(self) -> str:
    """A name for a folder; equal for equal trainings."""
    text = json.dumps(dataclasses.asdict(self), sort_keys=True)
    return f'{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:10]}'

  def describe(self) -> str:
    """The recipe and the fields that differ from it, as text."""
    parts = [self.recipe, *(f'{name}={value}' for name, value in self.fields)]
    parts += [f'labels={self.labels}'] if self.labels else []
    parts += [f'of ({self.source.describe()})'] if self.source else []
    return ' '.join(map(str, parts))

  def trainings(self) -> list['Training']:
    """This training, after those that it starts from."""
    return [*(self.source.trainings() if self.source else []), self]


@dataclasses.dataclass(frozen=True)
class Best:
  """Of several trainings, the one that is best on the validation images with seed 0.

  Attributes:
    candidates: pretrainings.
  """

  candidates: tuple[Training, ...]

  def trainings(self) -> list[Training]:
    """The candidates."""
    return list(self.candidates)


Setting = Training | Best


def best(training: Training, itself: bool = False, **values: Sequence[Any]) -> Best:
  """The best value of one field, such as `best(SIMCLR, learning_rate=(2, 8))`; `itself`: or that of the training."""
  ((name, choices),) = values.items()
  others = [training.but(**{name: value}) for value in choices]
  return Best((*[training] * itself, *others))


def pretrain(recipe: str, **fields: Any) -> Training:
  """A pretraining; names of fields as for `Training.but`."""
  return Training('pretrain', recipe, _pairs(_names(fields)))


def finetune(source: Training, labels: str, **fields: Any) -> Training:
  """Fine-tuning of a pretraining, by the default recipe; `init_from=''`: the same network from scratch."""
  return Training('finetune', 'finetune_small', _pairs(_names(fields)), source, labels)


def distill(teacher: Training, **fields: Any) -> Training:
  """Distillation of a fine-tuned network, by the default recipe."""
  return Training('distill', 'distill_small', _pairs(_names(fields)), teacher)


def probe(source: Training, protocol: str) -> Training:
  """A linear probe by one of `evaluate.probe.PROTOCOLS`, on features that are computed once."""
  return Training('probe', protocol, (), source)


def cost(training: Training) -> Training:
  """Time and memory of the training step of a pretraining."""
  return dataclasses.replace(training, kind='cost')


def _names(fields: Mapping[str, Any]) -> dict[str, Any]:
  names = {name: name.replace('__', '.').replace('_x', TIMES) for name in fields}
  return {names[name]: value for name, value in fields.items()}


def _pairs(fields: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
  return tuple(sorted(fields.items()))


def fields_at(size: str, training: Training) -> dict[str, Any]:
  """The fields of the recipe of a pretraining at a size."""
  values = {**SIZES[size], **RECIPES[size].get(training.recipe, {})}
  factors = {k.removesuffix(TIMES): v for k, v in training.fields if k.endswith(TIMES)}
  for name, factor in factors.items():
    values[name] = type(values[name])(values[name] * factor)
  return {**values, **{k: v for k, v in training.fields if not k.endswith(TIMES)}}


SIMCLR = pretrain('simclr_cifar10')
MOCO = pretrain('moco_cifar10')
MEMORY_BANK = pretrain('memory_bank_imagenet')
END_TO_END = pretrain('end_to_end_imagenet')
# MoCo v2 with the augmentation of SimCLR.
MOCO_V2 = MOCO.but(
  augment__view1='simclr_cifar10_v1',
  augment__eval='simclr_eval',
  model__head='mlp',
  temperature=0.2,
)
UNTRAINED = Training('untrained', 'simclr_cifar10')
