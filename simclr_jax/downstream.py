"""Trainings that start from another run: fine-tuning with few labels or all labels, and distillation.

Every training is a run with its own directory, which is resumed and logged like any other run.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from simclr_jax import config as recipes, encoder, fields, run_config, runs, train
from simclr_jax.data import Dataset, labels as subsets
from simclr_jax.errors import Stopped
from simclr_jax.evaluate import logistic, metrics
from simclr_jax.evaluate.results import Result, mean_and_std
from simclr_jax.runtime import distributed, files, paths

# Row of the table -> `data.labels` -> for each seed, the result of `test`.
Tests = dict[str, dict[str, list[dict[str, Any]]]]


def recipe(
  spec: str, source: ml_collections.ConfigDict, overrides: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """A recipe that inherits data and network from another run.

  Args:
    spec: a recipe, see `config.load`; if its name ends in `_small`, `augment.view1` is inherited, too.
    source: the recipe of the other run.
    overrides: fields that the user set; they have priority over inherited values.

  Raises:
    ConfigError: as for `config.load`.
  """
  table = fields.of_recipe(source.method)
  values = {k: v for k, v in recipes.flatten(source).items() if table[k].inherited}
  values['model.bn_groups'] = 1  # the groups of the pretraining may not divide another batch size
  if spec.endswith('_small'):
    values['augment.view1'] = source.augment.view1
  return recipes.load(spec, {**values, **overrides})


def with_labels(
  config: ml_collections.ConfigDict, dataset: Dataset, labels: str, seed: int
) -> tuple[ml_collections.ConfigDict, Dataset]:
  """Selects a subset of the labels.

  Args:
    config: a recipe.
    dataset: the training set, with all labels.
    labels: the subset, as `data.labels`: a fraction, such as '1%', or a number per class.
    seed: seed of the training and of the subset.

  Returns:
    The recipe with these labels, locked, and the training set with these labels.

  Raises:
    ConfigError: the subset cannot be selected, or the recipe does not fit it.
  """
  config = config.copy_and_resolve_references()
  config.seed, config.data.label_seed, config.data.labels = seed, seed, labels
  config.data.num_classes = dataset.classes
  images = subsets.select(dataset, config.data)
  if config.data.unlabelled == 'drop':  # the batch cannot be larger than the remaining images
    devices = jax.device_count()
    config.batch_size = min(config.batch_size, max(len(images) // devices, 1) * devices)
  recipes.check(config)
  return config.lock(), images


def run(
  config: ml_collections.ConfigDict, dataset: Dataset, workdir: pathlib.Path, command: str
) -> None:
  """Trains a run, or resumes it, until it is complete.

  Args:
    config: its recipe.
    dataset: its training set.
    workdir: its directory.
    command: the command line, recorded.

  Raises:
    Stopped: a signal arrived.
    ConfigError, CheckpointError, NotFinite: as for `train.pretrain`.
  """
  print(f'\n{workdir}', flush=True)
  code = train.pretrain(config, workdir, command, dataset, quiet=True)
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
) -> Tests:
  """Fine-tunes a run on subsets of the labels, with several seeds, and evaluates each result.

  Args:
    workdir: directory of the pretrained run; the fine-tuned runs are saved in `workdir/name/`.
    config: the recipe of the fine-tuning.
    dataset, test_images: labelled images to train on and to test on.
    labels: subsets, each as `data.labels`.
    seeds: number of seeds. Each seed selects the labels, the order and the augmentation.
    name: name of the folder.
    baselines: whether the same network is also trained from scratch, and logistic regression on raw pixels
      evaluated, with the same labels.
    command: the command line, recorded.

  Returns:
    Results with the rows 'fine-tuned' and, with `baselines`, 'from scratch' and 'raw pixels'.

  Raises:
    ConfigError: a subset cannot be selected, or an image cannot be read.
    Stopped: a signal arrived.
  """
  starts = {'fine-tuned': str(paths.absolute(workdir))}
  if baselines:
    starts = {'from scratch': ''} | starts
    pixels = [encoder.raw_pixels(x) for x in (dataset, test_images)]
  tests: Tests = {}
  for text in labels:
    for seed in range(seeds):
      for row, start in starts.items():
        subset_config, subset = with_labels(config, dataset, text, seed)
        _set_init_from(subset_config, start)
        folder = workdir / name / f'{short(text)}-seed{seed}{"" if start else "-scratch"}'
        run(subset_config, subset, folder, command)
        tests.setdefault(row, {}).setdefault(text, []).append(test(folder, test_images))
      if baselines:
        result = _pixels(dataset, text, seed, *pixels)
        tests.setdefault('raw pixels', {}).setdefault(text, []).append(result)
  return tests


def _set_init_from(config, start):
  """Sets `init_from`. From scratch (''), no layer of the head is kept and no layer is frozen."""
  with config.unlocked():
    config.init_from = start
    if not start:
      config.head_layer, config.fine_tune_after_block = 0, -1


def short(text: str) -> str:
  """`data.labels` as part of the name of a folder: '1%' -> '1pct'."""
  return text.replace('%', 'pct').replace(' ', '')


def _pixels(dataset, text, seed, train_pixels, test_pixels):
  """The accuracy of logistic regression on raw pixels, trained on a subset of the labels."""
  count = subsets.per_class(text, len(dataset), len(np.unique(dataset.labels)))
  subset = subsets.balanced_subset(dataset.labels, count, seed)
  x, test_x = logistic.standardize(train_pixels[0], test_pixels[0])
  return {'top1': logistic.accuracy(x[subset], train_pixels[1][subset], test_x, test_pixels[1])}


def all_labels(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  dataset: Dataset,
  test_images: Dataset,
  *,
  start: str,
  command: str,
) -> dict[str, Any]:
  """Fine-tunes with all labels and evaluates the result.

  Args:
    workdir: directory of the new run.
    config: the recipe of the fine-tuning.
    dataset, test_images: labelled images to train on and to test on.
    start: directory of the run to start from; '': from scratch.
    command: the command line, recorded.

  Returns:
    The result of `test`. Raises the same errors as `few_labels`.
  """
  config, images = with_labels(config, dataset, '100%', 0)
  _set_init_from(config, start)
  run(config, images, workdir, command)
  return test(workdir, test_images)


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
    run(student_config, images, folder, command)
    tests.append(test(folder, test_images))
  return tests


def summary(tests: Tests, dataset: Dataset, title: str) -> Result:
  """The results of `few_labels` as a table of `evaluate.results`: top-1 in %, mean and deviation over the seeds.

  Args:
    tests: the results.
    dataset: the training set, with all labels.
    title: title of the table.
  """
  columns = list(next(iter(tests.values())))
  classes = len(np.unique(dataset.labels))
  counts = [subsets.per_class(c, len(dataset), classes) for c in columns]
  return {
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
  }
