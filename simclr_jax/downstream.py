"""Trainings that start from another run: fine-tuning with few labels or all labels, and distillation.

Every training is a run with its own directory, which is resumed and logged like any other run.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from simclr_jax import (
  config as recipes,
  encoder,
  fields,
  methods,
  optim,
  run_config,
  runs,
  sharding,
  train,
)
from simclr_jax.data import Dataset, augment, labels as subsets
from simclr_jax.errors import Stopped
from simclr_jax.evaluate import logistic, metrics
from simclr_jax.evaluate.results import Result, assess, mean_and_std
from simclr_jax.runtime import distributed, files, logs, paths, progress

# Row of the table -> `data.labels` -> for each seed, the result of `test`.
Tests = dict[str, dict[str, list[dict[str, Any]]]]

# Training from scratch, as a baseline: settings that train any of the networks on few images. Twice as many steps
# as the fine-tuning, or 30 epochs if that is more, because random weights need longer than pretrained ones; a tenth of them
# is the warm-up.
SCRATCH = {
  'optimizer': 'adamw',
  'learning_rate': 3e-3,
  'learning_rate_scaling': 'none',
  'weight_decay': 0.05,
  'weight_decay_on': 'kernels',
  'schedule': 'cosine',
}
SCRATCH_FACTOR, SCRATCH_EPOCHS = 2, 30
LEAST_EPOCHS = 10  # of `finetune_small`, whose steps are for few labels
MILD_CROP = 0.5  # the least area of crops for labelled images
FITTED = 0.5  # a training whose accuracy on its own augmented images is lower was too short, or its learning rate is wrong


class Scratch(NamedTuple):
  """Settings of the training from scratch; 0: the default."""

  steps: int = 0
  learning_rate: float = 0.0


def recipe(
  spec: str, source: ml_collections.ConfigDict, overrides: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """A recipe that inherits data and network from another run.

  Args:
    spec: a recipe, see `config.load`; for `finetune_small` and `distill_small`, `augment.view1` is inherited, too, with
      crops that show at least half of the image.
    source: the recipe of the other run.
    overrides: fields that the user set; they have priority over inherited values.

  Raises:
    ConfigError: as for `config.load`.
  """
  table = fields.of_recipe(source.method)
  values = {k: v for k, v in recipes.flatten(source).items() if table[k].inherited}
  values['model.bn_groups'] = 1  # the groups of the pretraining may not divide another batch size
  if spec in ('finetune_small', 'distill_small'):
    values['augment.view1'] = _mild(source.augment)
  return recipes.load(spec, {**values, **overrides})


def least_epochs(spec: str, overrides: Mapping[str, Any]) -> int:
  """Epochs that a fine-tuning has at least: those of `finetune_small`, unless the user sets the length."""
  return (
    LEAST_EPOCHS if spec == 'finetune_small' and not {'steps', 'epochs'} & set(overrides) else 0
  )


def with_labels(
  config: ml_collections.ConfigDict,
  dataset: Dataset,
  labels: str,
  seed: int,
  least_epochs: int = 0,
) -> tuple[ml_collections.ConfigDict, Dataset]:
  """Selects a subset of the labels.

  Args:
    config: a recipe.
    dataset: the training set, with all labels.
    labels: the subset, as `data.labels`: a fraction, such as '1%', or a number per class.
    seed: seed of the training and of the subset.
    least_epochs: epochs on the subset that the training has at least.

  Returns:
    The recipe with these labels, locked, and the training set with these labels.

  Raises:
    ConfigError: the subset cannot be selected, or the recipe does not fit it.
  """
  config = config.copy_and_resolve_references()
  config.seed, config.data.label_seed, config.data.labels = seed, seed, labels
  config.data.num_classes = dataset.classes
  images = subsets.select(dataset, config.data)
  # The batch cannot be larger than the images. It does not depend on the devices, see `run`.
  largest = len(images) - len(images) % config.accumulate_steps
  config.batch_size = min(config.batch_size, largest)
  if least_epochs:
    config.steps = max(config.steps, -(-least_epochs * len(images) // config.batch_size))
  recipes.check(config)
  return config.lock(), images


def from_scratch(
  config: ml_collections.ConfigDict,
  images: Dataset,
  scratch: Scratch = Scratch(),  # noqa: B008  (immutable)
) -> ml_collections.ConfigDict:
  """The recipe of the same network and labels without pretraining, as a baseline: `SCRATCH`.

  Crops show at least half of the image, as in `finetune_small`. No layer of the head is kept, and no layer is frozen.

  Args:
    config: a recipe of fine-tuning, as `with_labels` returns it.
    images: its training set.
    scratch: settings that the user chose.
  """
  config = config.copy_and_resolve_references()
  steps = SCRATCH_FACTOR * optim.train_steps(config, len(images))
  steps = max(steps, -(-SCRATCH_EPOCHS * len(images) // config.batch_size))
  config.init_from, config.head_layer, config.fine_tune_after_block = '', 0, -1
  config.update(SCRATCH)
  config.steps = scratch.steps or steps
  config.warmup_epochs = 0.1 * config.steps * config.batch_size / len(images)
  config.learning_rate = scratch.learning_rate or config.learning_rate
  config.augment.view1 = _mild(config.augment)
  recipes.check(config)
  return config.lock()


def _mild(pipelines):
  """`augment.view1` with crops that show at least half of the image, as ops with all their arguments."""
  texts = []
  for op in augment.parse(augment.with_ops(pipelines.view1, pipelines.ops)):
    arguments = op.arguments if op.definition.sized else {**op.arguments, 'p': op.p}
    if 'area_min' in arguments:
      least = min(max(arguments['area_min'], MILD_CROP), arguments['area_max'])
      arguments = {**arguments, 'area_min': least}
    texts.append(f'{op.name}({", ".join(f"{k}={v!r}" for k, v in arguments.items())})')
  return ' | '.join(texts)


def run(
  config: ml_collections.ConfigDict,
  dataset: Dataset,
  workdir: pathlib.Path,
  command: str,
  test_images: Dataset | None = None,
) -> None:
  """Trains a run, or resumes it, until it is complete.

  A batch that is not divisible by the number of devices is trained on the most devices that divide it, so that the
  result does not depend on the devices.

  Args:
    config: its recipe.
    dataset: its training set.
    workdir: its directory.
    command: the command line, recorded.
    test_images: for the online kNN, if the recipe has one.

  Raises:
    Stopped: a signal arrived.
    ConfigError, CheckpointError, NotFinite: as for `train.pretrain`.
  """
  print(f'\n{workdir}', flush=True)
  rows = config.batch_size // config.accumulate_steps
  devices = sharding.devices_for(rows)
  if len(devices) < jax.device_count():
    print(f'{rows} images per step: training on {len(devices)} of {jax.device_count()} devices')
  code = train.pretrain(
    config, workdir, command, dataset, quiet=True, test=test_images, devices=devices
  )
  if code:
    raise Stopped(code)


def test(workdir: pathlib.Path, dataset: Dataset) -> dict[str, Any]:
  """Evaluates the classifier of a run on labelled images.

  Args:
    workdir: directory of the run; gets the result as `test.json`.
    dataset: the images.

  Returns:
    `metrics.classification`; `confusion`, see `metrics.confusion`; `parameters`, the number of parameters.

  Raises:
    ConfigError: the run has no classifier, or an image cannot be read.
    Stopped: a signal arrived.
  """
  classifier = runs.load_classifier(workdir)
  logits, label = classifier.embed(dataset)
  result = {
    **metrics.classification(logits, label),
    'confusion': metrics.confusion(logits, label).tolist(),
    'parameters': sum(x.size for x in jax.tree.leaves(classifier.variables['params'])),
  }
  if distributed.is_main_process():
    files.write_json(workdir / 'test.json', result, indent=None)
  print(f'{workdir}: top-1 {result["top1"]:.1%}', flush=True)
  return result


def few_labels(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  dataset: Dataset,
  test_images: Dataset,
  *,
  labels: Sequence[str],
  seeds: int,
  name: str,
  baselines: bool,
  command: str,
  scratch: Scratch = Scratch(),  # noqa: B008  (immutable)
  least_epochs: int = 0,
) -> Tests:
  """Fine-tunes a run on subsets of the labels, with several seeds, and evaluates each result.

  Args:
    workdir: directory of the pretrained run; the fine-tuned runs are saved in `workdir/name/`.
    config: the recipe of the fine-tuning.
    dataset, test_images: labelled images to train on and to test on.
    labels: subsets, each as `data.labels`.
    seeds: number of seeds. Each seed selects the labels, the order and the augmentation.
    name: name of the folder.
    baselines: whether the same network is also trained from scratch, and logistic regression on raw pixels and on
      the features of the untrained encoder evaluated, with the same labels.
    command: the command line, recorded.
    scratch: settings of the training from scratch.
    least_epochs: as for `with_labels`.

  Returns:
    Results with the rows 'fine-tuned' and, with `baselines`, 'raw pixels', 'untrained encoder' and 'from scratch'.

  Raises:
    ConfigError: a subset cannot be selected, or an image cannot be read.
    Stopped: a signal arrived.
  """
  rows: dict[str, Row] = {}
  if baselines:
    untrained = encoder.untrained(runs.load_encoder(workdir).architecture)
    rows |= {
      'raw pixels': _logistic(encoder.raw_pixels, test_images),
      'untrained encoder': _logistic(untrained.embed, test_images),
    }

  def train_and_test(config, subset, folder):
    run(config, subset, folder, command, test_images)
    return {**test(folder, test_images), **_fit(folder)}

  def scratch_row(config, subset, folder):
    recipe = from_scratch(config, subset, scratch)
    return train_and_test(recipe, subset, folder.with_name(f'{folder.name}-scratch'))

  def fine_tuned_row(config, subset, folder):
    with config.unlocked():
      config.init_from = str(paths.absolute(workdir))
    return train_and_test(config, subset, folder)

  rows |= {'from scratch': scratch_row} if baselines else {}
  rows['fine-tuned'] = fine_tuned_row
  tests: Tests = {row: {text: [] for text in labels} for row in rows}
  for text in labels:
    for seed in range(seeds):
      for row, evaluate in rows.items():
        subset_config, subset = with_labels(config, dataset, text, seed, least_epochs)
        folder = workdir / name / f'{short(text)}-seed{seed}'
        tests[row][text].append(evaluate(subset_config, subset, folder))
  return tests


# Recipe, training set, directory of the fine-tuned run -> result of `test`, or only `top1`.
Row = Callable[[ml_collections.ConfigDict, Dataset, pathlib.Path], dict[str, Any]]


def _logistic(features, test_images) -> Row:
  """The row of a logistic regression on features, trained on a subset of the labels."""
  test_features, test_labels = features(test_images)

  def evaluate(config, subset, folder):
    train_features, train_labels = features(subset)
    x, test_x = logistic.standardize(train_features, test_features)
    return {'top1': logistic.accuracy(x, train_labels, test_x, test_labels)}

  return evaluate


def _fit(folder):
  """`train_top1`, the last accuracy of a run on its own augmented images."""
  accuracies = [r['train_acc'] for r in logs.read(folder) if 'train_acc' in r]
  return {'train_top1': accuracies[-1]} if accuracies else {}


def plan(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  dataset: Dataset,
  *,
  labels: Sequence[str],
  seeds: int,
  baselines: bool,
  scratch: Scratch = Scratch(),  # noqa: B008  (immutable)
  least_epochs: int = 0,
) -> str:
  """A sentence with the number, the lengths and about the time of the trainings of `few_labels`; arguments as there.

  Raises:
    ConfigError: a subset cannot be selected, or the recipe does not fit it.
  """
  parts, images = [], 0
  for text in labels:
    tuned, subset = with_labels(config, dataset, text, 0, least_epochs)
    recipes_of = {'fine-tuning': tuned}
    if baselines:
      recipes_of['from scratch'] = from_scratch(tuned, subset, scratch)
    for kind, recipe in recipes_of.items():
      steps = optim.train_steps(recipe, len(subset))
      images += seeds * steps * recipe.batch_size
      parts.append(f'{kind} with {text}: {seeds} x {steps:,} steps of {recipe.batch_size}')
  count = seeds * len(parts)
  return f'{count} training{"s" * (count > 1)} ({"; ".join(parts)}){_about(workdir, images)}'


def _about(workdir, images):
  """The time of training on so many images, one view of each, at the speed of the pretraining."""
  rates = [r['examples_per_second'] for r in logs.read(workdir) if r.get('examples_per_second')]
  if not rates:
    return ''
  views = methods.build(run_config.load(workdir)).views
  time = progress.duration(images / (views * float(np.median(rates))))
  return f', {time} at the speed of the pretraining, plus compilation'


def short(text: str) -> str:
  """`data.labels` as part of the name of a folder: '1%' -> '1pct'."""
  return text.replace('%', 'pct').replace(' ', '')


def all_labels(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  dataset: Dataset,
  test_images: Dataset,
  *,
  start: str,
  command: str,
  least_epochs: int = 0,
) -> dict[str, Any]:
  """Fine-tunes with all labels and evaluates the result.

  Args:
    workdir: directory of the new run.
    config: the recipe of the fine-tuning.
    dataset, test_images: labelled images to train on and to test on.
    start: directory of the run to start from; '': from scratch.
    command: the command line, recorded.
    least_epochs: as for `with_labels`.

  Returns:
    The result of `test`, and `train_top1`. Raises the same errors as `few_labels`.
  """
  config, images = with_labels(config, dataset, '100%', 0, least_epochs)
  with config.unlocked():
    config.init_from = start
  if not start:
    config = from_scratch(config, images)
  run(config, images, workdir, command, test_images)
  return {**test(workdir, test_images), **_fit(workdir)}


def students(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  dataset: Dataset,
  test_images: Dataset,
  *,
  teachers: Sequence[pathlib.Path],
  command: str,
) -> list[dict[str, Any]]:
  """Distils each teacher into a student and evaluates the students.

  Args:
    workdir: directory of the students; each is saved in `workdir/NAME_OF_TEACHER`.
    config: the recipe of the distillation.
    dataset: training images; a student gets only the labels that its teacher was trained with.
    test_images: labelled images to test on.
    teachers: directories of fine-tuned runs.
    command: the command line, recorded.

  Returns:
    For each student, the result of `test`. Raises the same errors as `few_labels`.
  """
  tests = []
  for teacher in teachers:
    source = run_config.read(teacher)
    labels = source['data']['labels'] or '100%'
    student_config, images = with_labels(config, dataset, labels, source['seed'])
    with student_config.unlocked():
      student_config.teacher = str(paths.absolute(teacher))
    folder = workdir / teacher.name
    run(student_config, images, folder, command, test_images)
    tests.append(test(folder, test_images))
  return tests


def summary(tests: Tests, dataset: Dataset, test_images: Dataset, title: str) -> Result:
  """The results of `few_labels` as a table of `evaluate.results`: top-1 in %, mean and deviation over the seeds.

  Args:
    tests: the results.
    dataset, test_images: as for `few_labels`.
    title: title of the table.
  """
  columns = list(next(iter(tests.values())))
  classes = len(np.unique(dataset.labels))
  counts = [subsets.per_class(c, len(dataset), classes) for c in columns]
  result = {
    'title': title,
    'columns': [
      f'{c} ({n:,} per class)' if '%' in c else f'{n:,} per class' for c, n in zip(columns, counts)
    ],
    'rows': {
      row: [mean_and_std([100 * r['top1'] for r in results]) for results in by_labels.values()]
      for row, by_labels in tests.items()
    },
    'labels_per_class': counts,
    'settings': {'training_images': len(dataset)},
    'runs': tests,
    'class_names': list(test_images.class_names),
    'notes': _unfitted(tests),
  }
  return assess(result, test_images.labels, classes=dataset.classes)


def _unfitted(tests):
  """A note for each row whose trainings were too short."""
  notes = {}
  for row, by_labels in tests.items():
    for text, results in by_labels.items():
      for sentence in unfitted(results):
        options = ' (--scratch-steps, --scratch-learning-rate)' * (row == 'from scratch')
        notes[row] = f'with {text}, {sentence}{options}'
  return notes


def unfitted(tests: Sequence[Mapping[str, Any]]) -> list[str]:
  """A sentence if trainings were too short, by their accuracy on their own images; `tests`: results of `test`."""
  fit = [r['train_top1'] for r in tests if 'train_top1' in r]
  if not fit or np.mean(fit) >= FITTED:
    return []
  return [
    f'only {np.mean(fit):.0%} of the augmented training images are classified correctly at the end: train longer or '
    'change the learning rate'
  ]
