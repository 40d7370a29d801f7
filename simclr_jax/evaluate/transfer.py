"""Transfer: what the features of one data set are worth on others (SimCLR, section 6.3 and appendix B.8).

Logistic regression (`logistic.swept`) on frozen features, images resized to the encoder's size by their
shorter side and cut to the central square; and fine-tuning with all labels.
"""

import dataclasses
import pathlib
import re
from typing import Any

import ml_collections
import numpy as np

from simclr_jax import config as recipes, data, distributed, paths
from simclr_jax.data import discover
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import features, finetune, logistic, metrics

MAP = '11-point mAP'
# Data sets of the paper that are not measured by top-1.
METRICS = {
  'oxford_iiit_pet': 'mean per class',
  'oxford_flowers102': 'mean per class',
  'caltech101': 'mean per class',
  'fgvc_aircraft': 'mean per class',
  'voc': MAP,
}
HELD_OUT = 0.2  # of a data set without a test split


@dataclasses.dataclass(frozen=True)
class Task:
  """A data set to transfer to.

  Attributes:
    train, test: its images.
    place: the fields of a recipe that say where they are.
    metric: 'top-1', 'mean per class' or, with several labels an image, `MAP`.
    truth: the labels of train and of test, int `[n]` or, several an image, bool `[n, C]`.
  """

  train: Any
  test: Any
  place: dict[str, str]
  metric: str
  truth: tuple[np.ndarray, np.ndarray]


def metric(what: str) -> str:
  """How the paper measures a data set of this name; 'top-1' for all that it does not have."""
  return METRICS.get(what.split('/')[0].split(':')[0], 'top-1')


def load(what: str, folder: str = '') -> Task:
  """What `--data` would take.

  The training set of TFDS's with a validation and a test split is both the others. Without a test split, a
  fifth of the training images is the test set.

  Args:
    what: as of `discover.fields`.
    folder: TFDS's `data_dir`.

  Raises:
    ConfigError: it is missing, or has no labels.
  """
  place = discover.fields(what)
  if place['data.source'] == 'tfds':
    place |= _splits(place['data.name'], place['data.dir'] or folder)
  config = recipes.load('simclr_images', place).data
  train = data.load(config, 'train')
  test = data.load(config, 'test') if config.test_split else None
  if config.source == 'tfds' and not train.labelled:
    from simclr_jax.data import tfds  # needs TensorFlow

    several = tfds.positives(config, config.train_split)
    if test and several is not None:
      return Task(train, test, place, MAP, (several, tfds.positives(config, config.test_split)))
  if not train.labelled:
    raise ConfigError(f'{what} has no labels')
  if not test:
    order = np.random.default_rng(0).permutation(len(train))
    cut = round(HELD_OUT * len(train))
    train, test = train.only(np.sort(order[cut:])), train.only(np.sort(order[:cut]))
  if not test.labelled:
    raise ConfigError(f'the test images of {what} have no labels')
  return Task(train, test, place, metric(what), (train.labels, test.labels))


def _splits(name, folder):
  from simclr_jax.data import tfds  # needs TensorFlow

  prepared = tfds.split_names(name, folder)
  test = next((split for split in discover.TEST if split in prepared), '')
  train = 'train+validation' if {'train', 'validation', 'test'} <= set(prepared) else 'train'
  return {'data.dir': folder, 'data.train_split': train, 'data.test_split': test}


def linear(encoders: dict[str, features.Encoder], task: Task) -> dict[str, float]:
  """The metric of logistic regression on the features of each encoder; None: raw pixels."""
  measure = {MAP: metrics.mean_average_precision, 'mean per class': metrics.mean_per_class}
  measure, (known, truth) = measure.get(task.metric, metrics.top_k), task.truth
  found = {}
  for name, encoder in encoders.items():
    embed = _whole(encoder).embed if encoder else features.raw_pixels
    x, test = (embed(part)[0] for part in (task.train, task.test))
    if not encoder:
      x, test = logistic.standardize(x, test)
    scores, _ = logistic.swept(x, known, test)
    if truth.ndim == 1:  # classes of the test images alone
      unseen = max(0, truth.max() + 1 - scores.shape[1])
      scores = np.pad(scores, ((0, 0), (0, unseen)), constant_values=-np.inf)
    found[name] = measure(scores, truth)
  return found


def _whole(encoder):
  view = {**encoder.architecture, 'eval_view': 'center_crop(1)'}
  return dataclasses.replace(encoder, architecture=view)


def tuned(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  spec: str,
  overrides: dict[str, str],
  called: str,
  task: Task,
  pretrained: bool,
  command: str,
) -> float:
  """The metric after training with all labels, from the run `workdir` on or, not `pretrained`, from scratch.

  The training is in workdir/transfer/.
  """
  recipe = finetune.recipe(spec, config, {**task.place, 'data.test_split': '', **overrides})
  chosen, images = finetune.with_labels(recipe, task.train, '100%', 0)
  with chosen.unlocked():
    if pretrained:
      chosen.init_from = str(paths.absolute(workdir))
    else:
      chosen.head_layer, chosen.fine_tune_after_block = 0, -1
  name = re.sub(r'[:/]+', '-', called.strip('/'))
  folder = workdir / 'transfer' / (name if pretrained else f'{name}-scratch')
  finetune.run(chosen, images, folder, command)
  result = finetune.test(folder, task.test)
  return result['mean_per_class' if task.metric == 'mean per class' else 'top1']


def table(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  encoders: dict[str, features.Encoder],
  to: list[str],
  folder: str,
  spec: str,
  overrides: dict[str, str],
  fine_tune: bool,
  command: str,
) -> dict[str, Any]:
  """All data sets `to`: a result to be kept. One that is missing has a row that says so.

  With the untrained encoder among `encoders`, what is fine-tuned is trained from scratch, too.
  """
  trainings = {'from scratch': False} if 'untrained' in encoders else {}
  trainings = trainings | {'fine-tuned': True} if fine_tune else {}
  columns = [*encoders, *trainings]
  rows, notes, sizes = {}, {}, {}
  for what in to:
    place = pathlib.PurePosixPath(what.rstrip('/'))
    called = place.parent.name if re.fullmatch(r'\d+\.\d+\.\d+', place.name) else place.name
    called = what if any(name.startswith(f'{called} (') for name in rows) else called
    print(f'\n{what}', flush=True)
    try:
      task = distributed.together(lambda what=what: load(what, folder))
    except ConfigError as error:
      name = f'{called} ({metric(what)})'
      rows[name], notes[name] = [[None, None]] * len(columns), f'missing: {error}'
      print(notes[name], flush=True)
      continue
    name = f'{called} ({task.metric})'
    sizes[name] = [len(task.train), len(task.test)]
    found = linear(encoders, task)
    if fine_tune and task.metric == MAP:
      notes[name] = 'not fine-tuned: it has several labels an image'
    else:
      for column, pretrained in trainings.items():
        found[column] = tuned(workdir, config, spec, overrides, called, task, pretrained, command)
    rows[name] = [[100 * found[c], None] if c in found else [None, None] for c in columns]
    print('  '.join(f'{c} {100 * found[c]:.1f}' for c in found), flush=True)
  return {
    'title': 'Transfer: logistic regression on frozen features, %',
    'columns': columns,
    'rows': rows,
    'notes': notes,
    'settings': {'images': sizes},
  }
