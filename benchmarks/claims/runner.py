"""Runs a training of a claim and evaluates it."""

import dataclasses
import fcntl
import functools
import pathlib
import time
from typing import Any

import jax
import numpy as np

from benchmarks import mechanisms
from benchmarks.claims.trainings import SIMCLR, TIMES, VALIDATION, Training, fields_at
from simclr_jax import config, data, downstream, encoder, run_config, runs, train, train_state
from simclr_jax.data import Dataset
from simclr_jax.evaluate import knn, logistic, probe
from simclr_jax.runtime import checkpoint, logs

COMMAND = 'python -m benchmarks.claims'
LOGGED = ('loss', 'chance_loss', 'contrastive_acc', 'contrastive_acc_n', 'z_std', 'rank')
TIMED_STEPS = 5


@dataclasses.dataclass(frozen=True)
class Runner:
  """Runs trainings of one size.

  Attributes:
    size: a key of `trainings.SIZES`.
    data: the TFDS folder.
    folder: gets the run directories.
  """

  size: str
  data: str
  folder: pathlib.Path

  def run(self, training: Training, seed: int) -> dict[str, Any]:
    """Trains, or resumes, and evaluates.

    Returns:
      `metrics`, accuracies in %, and `cpu_seconds` of this process.

    Raises:
      KeyboardInterrupt: a signal stopped the training, after it was saved.
    """
    start = time.process_time()
    metrics = getattr(self, f'_{training.kind}')(training, seed)
    metrics = {name: round(float(value), 4) for name, value in metrics.items()}
    return {'metrics': metrics, 'cpu_seconds': round(time.process_time() - start, 1)}

  def workdir(self, training: Training, seed: int) -> pathlib.Path:
    """The run directory of a training."""
    return (self.folder / f'{training.key}-seed{seed}').absolute()

  def _source(self, training: Training, seed: int) -> pathlib.Path:
    """The run directory that a training starts from; trained again if the result is from another machine."""
    workdir = self.workdir(training.source, seed)
    with open(f'{workdir}.lock', 'w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not checkpoint.exists(workdir / 'checkpoints'):
        self.run(training.source, seed)
    return workdir

  @functools.cached_property
  def images(self) -> tuple[Dataset, Dataset, Dataset]:
    """Labelled images: training, test and validation."""
    fields = {**fields_at(self.size, SIMCLR), 'data.dir': self.data, 'data.num_classes': 10}

    def load(split):
      return data.load(
        config.load('simclr_cifar10', {**fields, 'data.train_split': split}).data, 'train'
      )

    return (
      load(fields['data.train_split']),
      load(fields['data.test_split']),
      load(VALIDATION[self.size]),
    )

  def _recipe(self, training, seed):
    fields = {**fields_at(self.size, training), 'data.dir': self.data, 'seed': seed}
    return config.load(training.recipe, fields)

  def _pretrain(self, training, seed):
    recipe, workdir = self._recipe(training, seed), self.workdir(training, seed)
    if train.pretrain(recipe, workdir, COMMAND, quiet=True, progress=False):
      raise KeyboardInterrupt
    last = {name: value for record in logs.read(workdir) for name, value in record.items()}
    metrics = self._evaluate(runs.load_encoder(workdir))
    if recipe.model.head != 'none':
      z = self._evaluate(runs.load_projection(workdir))
      metrics |= {f'{name}_z': value for name, value in z.items()}
    return metrics | {name: last[name] for name in LOGGED if name in last}

  def _untrained(self, training, seed):
    architecture = config.architecture(self._recipe(training, seed))
    return self._evaluate(encoder.untrained(architecture, seed))

  def _evaluate(self, features_of):
    """kNN (k = 200, temperature 0.1) and logistic regression on standardised features; on validation images, too."""
    (x, labels), *others = [features_of.embed(images) for images in self.images]
    metrics = {}
    for name, (other, other_labels) in zip(('', '_validation'), others):
      scaled, scaled_other = logistic.standardize(x, other)
      linear = logistic.accuracy(scaled, labels, scaled_other, other_labels)
      metrics[f'linear{name}'] = 100 * linear
      metrics[f'knn{name}'] = 100 * knn.accuracy(x, labels, other, other_labels)
    return metrics

  def _finetune(self, training, seed):
    start = self._source(training, seed)
    fields = dict(training.fields)
    recipe = downstream.recipe('finetune_small', run_config.load(start), fields)
    epochs = downstream.least_epochs('finetune_small', fields)
    recipe, images = downstream.with_labels(recipe, self.images[0], training.labels, seed, epochs)
    if fields.get('init_from') == '':
      recipe = downstream.from_scratch(recipe, images)
    else:
      with recipe.unlocked():
        recipe.init_from = str(start)
    return self._train_classifier(training, recipe, images, seed)

  def _distill(self, training, seed):
    teacher = self._source(training, seed)
    fields = dict(training.fields)
    share = fields.pop('share of the images', 1.0)
    source = run_config.load(teacher)
    for name in [name for name in fields if name.endswith(TIMES)]:
      value = source.model.width_multiplier  # the only field with a factor
      fields[name.removesuffix(TIMES)] = value * fields.pop(name)
    recipe = downstream.recipe('distill_small', source, fields)
    recipe, images = downstream.with_labels(recipe, self.images[0], training.source.labels, seed)
    with recipe.unlocked():
      recipe.teacher = str(teacher)
      # As many steps with a part of the images as with all.
      recipe.epochs = round(recipe.epochs * len(self.images[0]) / (share * len(images)))
    if share < 1:
      labelled_first = np.argsort(images.labels < 0, kind='stable')
      images = images.subset(np.sort(labelled_first[: round(share * len(images))]))
    return self._train_classifier(training, recipe, images, seed)

  def _train_classifier(self, training, recipe, images, seed):
    workdir = self.workdir(training, seed)
    downstream.run(recipe, images, workdir, COMMAND)
    test = downstream.test(workdir, self.images[1])
    return {'top1': 100 * test['top1'], 'parameters': test['parameters']}

  def _probe(self, training, seed):
    features = runs.load_encoder(self._source(training, seed))
    settings = probe.Settings(cached=True, seed=seed)
    protocol = probe.PROTOCOLS[training.recipe]
    score = probe.train_linear(features, *self.images[:2], protocol, settings)
    return {'linear': 100 * score['top1']}

  def _cost(self, training, seed):
    """CPU seconds per step, median, and MiB that the compiled step needs besides the images."""
    recipe = self._recipe(training, seed)
    images = data.load(recipe.data, 'train')
    state, step = train_state.build(recipe, images)
    mib = mechanisms.mib_of_step(step, state, images)
    seconds = []
    for i in range(TIMED_STEPS + 1):
      start = time.process_time()
      state, metrics = step(state, i)
      jax.block_until_ready((state, metrics))
      seconds.append(time.process_time() - start)
    return {'seconds': np.median(seconds[1:]), 'mib': mib}
