"""The package as a library: trains an encoder on images in memory or on disk, and gives the run as an object."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from simclr_jax import (
  config as recipes,
  data as datasets,
  fields as field_table,
  own_code,
  run_config,
  runs,
  train as training,
)
from simclr_jax.data import Dataset, discover, objects, suggest
from simclr_jax.encoder import Encoder
from simclr_jax.errors import ConfigError
from simclr_jax.recorder import Callback
from simclr_jax.runtime import checkpoint, logs, paths

IN_MEMORY = {
  'data.source': 'arrays', 'data.name': '', 'data.dir': '', 'data.table': '', 'data.train_split': 'train',
  'data.test_split': '',
}  # fmt: skip


def pretrain(
  data: Any = None,
  recipe: str | os.PathLike | ml_collections.ConfigDict | None = None,
  workdir: str | os.PathLike | None = None,
  *,
  labels: Any = None,
  test: Any = None,
  method: Any = None,
  encoder: Any = None,
  ops: Any = None,
  callbacks: Callback | Callable[..., Any] | Sequence[Callback | Callable[..., Any]] = (),
  progress: bool = True,
  overrides: Mapping[str, Any] | None = None,
  **fields: Any,
) -> 'Run':
  """Trains an encoder without labels, or resumes a training.

      run = simclr_jax.pretrain(images, epochs=5)
      features = run.encoder(images)

  Ctrl-C saves the state after the current step and returns the run; the same call with `workdir=run.workdir` resumes.

  Args:
    data: images. A folder or anything else that `--data` accepts; an array, uint8 `[N, h, w, 3]`; a list of arrays, of
      Pillow images or of paths; a pair (images, labels); see `data.objects.dataset`. None: the data set of the recipe.
    recipe: the name of a built-in recipe, such as 'simclr_images:cpu', the path of a recipe, or a recipe of
      `load_recipe`. None: suggested by the number and size of the images.
    workdir: the run directory; resumed if it contains a run. None: a new folder, runs/NAME, runs/NAME-2, ...
    labels: for images in memory: N integers or strings. Only evaluations use them.
    test: images for evaluations, of the same kinds as `data`. None: the test split of `data`, or, with labels, a part
      of the images that is held out (`data.holdout`).
    method, encoder, ops: of your own, as Python objects, modules or paths, see `own_code.file_of`. `method` may be the
      name of a built-in method.
    callbacks: called after steps, epochs and evaluations, see `Callback`; a function is called as `f(step, metrics)`.
      Metrics are floats. If one returns True, the training stops as after Ctrl-C.
    progress: print the setup and show the progress. If False, nothing is printed.
    overrides: fields of the recipe with a dot in their name, such as `{'model.depth': 18}`.
    **fields: other fields of the recipe, such as `epochs=5, batch_size=64`.

  Returns:
    The run. `run.interrupted` tells whether it was stopped before its last step.

  Raises:
    ConfigError: one sentence; invalid fields, images or run directories.
    CheckpointError: no checkpoint can be read, or one cannot be written.
    NotFinite: the loss or its gradient became NaN or infinite.
  """
  if isinstance(data, ml_collections.ConfigDict):  # pretrain(recipe, workdir)
    data, recipe, workdir = None, data, workdir or recipe
  if data is None and recipe is None:
    raise ConfigError('pretrain: pass images or a recipe')
  values = {**(overrides or {}), **fields}
  new = workdir is None
  folder = _new_workdir(data, recipe) if workdir is None else paths.path(workdir)
  try:
    own = _own_files({'method': method, 'encoder': encoder, 'ops': ops}, folder / 'code')
    config, train, held_out = _prepare(data, recipe, labels, test, own, values, progress)
  except BaseException:
    if new:
      shutil.rmtree(folder)
      with contextlib.suppress(OSError):  # runs/ has other runs
        folder.parent.rmdir()
    raise
  if not isinstance(callbacks, Sequence):
    callbacks = [callbacks]
  try:
    training.pretrain(
      config, folder, train=train, test=held_out, callbacks=callbacks, quiet=not progress, progress=progress
    )  # fmt: skip
  except KeyboardInterrupt:  # the second Ctrl-C, or one in another thread
    if not checkpoint.exists(folder / 'checkpoints'):
      raise
  return Run(folder, train, held_out)


def _new_workdir(data, recipe) -> pathlib.Path:
  """A new folder, runs/NAME, runs/NAME-2, ...; it exists, so that no other run takes it."""
  if jax.process_count() > 1:
    raise ConfigError('workdir is required in a run of several processes')
  if objects.is_place(data):
    name = discover.name_of(os.fspath(data))
  else:
    name = (
      pathlib.Path(str(recipe)).stem.split(':')[0]
      if data is None and objects.is_place(recipe)
      else 'images'
    )
  for number in itertools.count(1):
    folder = pathlib.Path('runs', name if number == 1 else f'{name}-{number}')
    try:
      folder.mkdir(parents=True)
      return folder
    except FileExistsError:
      continue
  raise AssertionError


def _own_files(objects_, folder) -> dict[str, str]:
  """Recipe field -> path of the file, for the method, encoder and ops of the user's own."""
  names = {'method': 'method', 'encoder': 'model.encoder', 'ops': 'augment.ops'}
  given = {kind: value for kind, value in objects_.items() if value is not None}
  if paths.is_remote(folder) and not all(map(objects.is_place, given.values())):
    raise ConfigError(f'{", ".join(given)}: for a workdir in a bucket, pass the path of a .py file')
  return {names[kind]: own_code.file_of(value, kind, folder) for kind, value in given.items()}


def _prepare(data, recipe, labels, test, own, values, progress):
  """The recipe, and the training and test images; None if the recipe says where they are."""
  place: dict[str, Any] = {'watchdog_seconds': 0.0}  # it would end the process of a notebook
  if isinstance(recipe, ml_collections.ConfigDict):
    place = {}
  if objects.is_place(data):
    if labels is not None:
      raise ConfigError(
        'labels are for images in memory: those of a folder are its sub-folders or data.table'
      )
    place |= discover.fields(os.fspath(data), values)
  elif data is not None:
    place |= IN_MEMORY | ({} if test is None else {'data.test_split': 'test'})
  if test is not None:
    place['data.holdout'] = 0.0
  config = _recipe(recipe or 'simclr_images', place, own, values)
  train = held_out = None
  if data is not None and not objects.is_place(data):
    train = objects.dataset(data, labels, config.data)
    if test is None:
      train, held_out = datasets.hold_out(config.data, train)
    place |= _fields_of(train, config, values)
    config = _recipe(recipe or 'simclr_images', place, own, values)
  elif recipe is None or test is not None:
    train, held_out = datasets.load_splits(config.data)
  if test is not None:
    held_out = _same_classes(train, objects.load(test, None, config.data, 'test'))
  if recipe is None:
    recipe, suggested = _suggested(train, progress)
    place |= suggested
  return _recipe(recipe, place, own, values), train, held_out


def _recipe(spec, place, own, values) -> ml_collections.ConfigDict:
  """A recipe with the fields of the data, the files of the user's own, and the fields that the user set."""
  values = {**place, **values, **{field: path for field, path in own.items() if field != 'method'}}
  if isinstance(spec, ml_collections.ConfigDict):
    config = copy.deepcopy(spec).unlock()
  else:
    config = None
  if 'method' not in own:
    return (
      recipes.load(os.fspath(spec), values) if config is None else recipes.finish(config, values)
    )
  config = config or recipes.load(os.fspath(spec))
  new = field_table.recipe(own['method'])
  shared = recipes.flatten(new).keys() - {'method', 'code'}
  new.update_from_flattened_dict({k: v for k, v in recipes.flatten(config).items() if k in shared})
  return recipes.finish(new, values)


def _fields_of(train, config, values) -> dict[str, Any]:
  """The fields of a recipe that depend on images in memory."""
  fields: dict[str, Any] = {'data.examples': 0}
  if isinstance(train, datasets.Arrays):
    fields['data.range'] = train.range  # the same for test images and later ones
  if config.data.num_classes and 'data.num_classes' not in values:
    fields['data.num_classes'] = train.classes
  return fields


def _suggested(train, progress) -> tuple[str, dict[str, str]]:
  """The name and the fields of a recipe that suits the images."""
  name, fields = suggest.recipe(train)
  if progress:
    values = ', '.join(f'{k}={v}' for k, v in fields.items())
    print(f'recipe: {name}, {values} (for a median side of {suggest.median_side(train)} px)')
  return name, fields


def _same_classes(train, test) -> Dataset:
  """The test images with the numbers of the training classes of the same names."""
  names = list(train.class_names)
  if not (test.labelled and names) or names == list(test.class_names):
    return test
  names += [name for name in test.class_names if name not in names]
  number = np.array([names.index(name) for name in test.class_names], np.int32)
  return test.with_labels(number[test.labels])


def load_data(data: Any, split: str = 'train', labels: Any = None) -> Dataset:
  """A data set.

  Args:
    data: the `data` part of a recipe, or as for `pretrain`.
    split: 'train' or 'test', for data that has splits.
    labels: for images in memory.

  Raises:
    ConfigError: the data is missing, corrupt, or of an unknown kind.
  """
  if isinstance(data, ml_collections.ConfigDict):
    return datasets.load(data, split)
  if not objects.is_place(data) or labels is not None:
    return objects.load(data, labels, recipes.load('simclr_images').data, split)
  return datasets.load(recipes.load('simclr_images', discover.fields(os.fspath(data))).data, split)


def load_run(workdir: str | os.PathLike) -> 'Run':
  """A run that `pretrain` or the command wrote.

  Raises:
    ConfigError: `workdir` is not a run directory.
  """
  return Run(workdir)


class Run:
  """A training: complete, interrupted, or still running in another process.

  Attributes:
    workdir: the run directory.
    config: the recipe.
  """

  def __init__(
    self, workdir: str | os.PathLike, train: Dataset | None = None, test: Dataset | None = None
  ):
    """`train`, `test`: the images of the run, if they are loaded already.

    Raises:
      ConfigError: `workdir` is not a run directory.
    """
    self.workdir = paths.path(workdir)
    self.config = run_config.load(self.workdir)
    self._train, self._test = train, test

  @property
  def step(self) -> int:
    """The step of the newest checkpoint."""
    return checkpoint.last_step(self.workdir / 'checkpoints')

  @property
  def complete(self) -> bool:
    """Whether the training has reached its last step."""
    events = [r['event'] for r in logs.read(self.workdir) if 'event' in r]
    return events[-1:] == ['complete']

  @property
  def interrupted(self) -> bool:
    """Whether the training was stopped before its last step; `pretrain` with the same workdir resumes it."""
    return not self.complete

  @property
  def history(self) -> dict[str, np.ndarray]:
    """The logged metrics: arrays of one length, `step` int64, all others float64, NaN where a metric was not logged.

    `pandas.DataFrame(run.history)` is a table with a row per logged step. `log_every_steps` sets how many are logged.
    """
    rows: dict[int, dict[str, float]] = {}
    for record in logs.read(self.workdir):
      if 'event' not in record:
        rows.setdefault(record['step'], {}).update(record)
    names = dict.fromkeys(name for row in rows.values() for name in row)
    columns = {
      name: np.array([row.get(name) for row in rows.values()], float) for name in names
    }  # None becomes NaN
    return {**columns, 'step': np.array(list(rows), np.int64)}

  @functools.cached_property
  def encoder(self) -> Encoder:
    """The frozen encoder of the newest checkpoint: `encoder(images)` -> features, float32 `[n, d]`."""
    return runs.load_encoder(self.workdir)

  def embed(self, out: str | os.PathLike, data: Any = None) -> pathlib.Path:
    """Writes the features of images to a file.

    Args:
      out: .npz, .npy, .csv or .parquet, see `evaluate.embed.embed`.
      data: images, as for `pretrain`. None: the training images of the run.

    Returns:
      The path of the file.

    Raises:
      ConfigError: `out` cannot be written, or an image cannot be read.
    """
    from simclr_jax.evaluate import embed

    path = paths.path(out)
    embed.embed(self.encoder, self._images(data, 'train'), path)
    return path

  def knn(
    self, train: Any = None, test: Any = None, k: int = 200, temperature: float = 0.1
  ) -> float:
    """The accuracy of the weighted kNN classifier on the features, see `evaluate.knn.predict`.

    Args:
      train: labelled images, as for `pretrain`: a pair (images, labels), or a folder. None: those of the run.
      test: labelled images to classify. None: those of the run.
      k, temperature: number of neighbours, and temperature of their weights.

    Returns:
      Top-1 accuracy, 0 to 1.

    Raises:
      ConfigError: there are no labels, or an image cannot be read.
    """
    from simclr_jax.evaluate import knn

    bank, queries = self._labelled(train, test)
    return knn.accuracy(*self.encoder.embed(bank), *self.encoder.embed(queries), k, temperature)

  def probe(
    self, train: Any = None, test: Any = None, protocol: str = 'sgd', **settings: Any
  ) -> dict[str, Any]:
    """The linear probe: a linear classifier trained on the frozen features, see `evaluate.probe.train_linear`.

    Args:
      train, test: labelled images, as for `knn`.
      protocol: 'sgd', or the published 'simclr' or 'moco'.
      **settings: of `evaluate.probe.Settings`, such as `epochs=20, seed=1`. Features are computed once unless
        `cached=False`.

    Returns:
      `top1`, 0 to 1, and further metrics and settings.

    Raises:
      ConfigError: there are no labels, or a setting does not exist.
    """
    from simclr_jax.evaluate import probe

    if protocol not in probe.PROTOCOLS:
      raise ConfigError(f'protocol={protocol!r} is not one of {", ".join(probe.PROTOCOLS)}')
    known = [field.name for field in dataclasses.fields(probe.Settings)]
    for name in settings:
      if name not in known:
        raise ConfigError(f'probe has no setting {name!r}, only {", ".join(known)}')
    chosen = probe.Settings(**{'cached': True, **settings})
    images = self._labelled(train, test)
    score = probe.train_linear(self.encoder, *images, probe.PROTOCOLS[protocol], chosen)
    return {name: value for name, value in score.items() if name != 'classifier'}

  def report(self, out: str | os.PathLike | None = None) -> pathlib.Path:
    """Writes the HTML report of the run.

    Args:
      out: the file. None: report.html in the run directory.

    Returns:
      The path of the file. Of images that were in memory, only the run that `pretrain` returns shows any.
    """
    from simclr_jax.report import page

    path = self.workdir / 'report.html' if out is None else paths.path(out)
    images = None if self._train is None else (self._train, self._test)
    page.write(self.workdir, self.config, path, images)
    return path

  def export(self, out: str | os.PathLike) -> pathlib.Path:
    """Writes the encoder alone to a new folder, which `load_encoder` reads, see `interop.orbax`.

    Raises:
      ConfigError: the folder is not empty.
    """
    from simclr_jax.interop import orbax

    orbax.export(self.encoder, out)
    return paths.path(out)

  def _images(self, data, split) -> Dataset:
    """Images that the user passed, or else a split of the images of the run."""
    if data is not None:
      return objects.load(data, None, self.config.data, split)
    loaded = self._train if split == 'train' else self._test
    if loaded is None:
      if datasets.in_memory(self.config.data):
        raise ConfigError(
          f'{self.workdir} was trained on images in memory: pass the {split} images'
        )
      loaded = datasets.load(self.config.data, split)
    return loaded

  def _labelled(self, train, test) -> tuple[Dataset, Dataset]:
    """Labelled training and test images with the same classes."""
    bank, queries = self._images(train, 'train'), self._images(test, 'test')
    for split, images in (('training', bank), ('test', queries)):
      if not images.labelled:
        raise ConfigError(f'the {split} images have no labels: pass (images, labels)')
    return bank, _same_classes(bank, queries)

  def __repr__(self) -> str:
    state = 'complete' if self.complete else 'interrupted'
    return f'Run({str(self.workdir)!r}, step {self.step}, {state})'
