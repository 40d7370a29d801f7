"""The training loop: sets a run up, restores its newest checkpoint, trains, saves and evaluates."""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
from absl import logging
from clu import parameter_overview

from simclr_jax import (
  config as recipes,
  data,
  diagnostics,
  fields,
  optim,
  recorder,
  runs,
  sharding,
  train_state,
)
from simclr_jax.data import Dataset
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import checkpoint, distributed, environment, files, goodput, paths
from simclr_jax.runtime.preemption import GracefulStop, Watchdog


def pretrain(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  command: str = '',
  train: Dataset | None = None,
  quiet: bool = False,
) -> int:
  """Trains to the end of the recipe; resumes from the newest checkpoint in `workdir` if there is one.

  Args:
    config: a recipe (`config.load`).
    workdir: the run directory; gets `config.json`, `checkpoints/`, `metrics.jsonl` and `metrics/` (TensorBoard).
    command: the command line, recorded for the report.
    train: the training set, if it is already loaded.
    quiet: do not print the configuration at the start.

  Returns:
    The exit code: 0 when the training is complete, 75 or 130 when a signal stopped it after saving.

  Raises:
    ConfigError: the recipe does not fit the data, the devices or the workdir.
    CheckpointError: no checkpoint can be read, or one cannot be written.
    NotFinite: the loss or its gradient became NaN or infinite; the last checkpoint is from an earlier step.
  """
  workdir = paths.path(workdir)
  with contextlib.ExitStack() as cleanup:
    stop = cleanup.enter_context(GracefulStop())
    watchdog = cleanup.enter_context(Watchdog(config.watchdog_seconds))
    clock = goodput.Clock()
    setup = _set_up(config, workdir, train, cleanup)
    watchdog.heartbeat(compiling=True)
    state, step_fn = _restore(setup, workdir, cleanup, quiet)
    watchdog.heartbeat(compiling=True)
    first = int(state.step)
    if first >= setup.steps:
      print(f'{workdir} is complete: {first} steps', flush=True)
      return stop.exit_code
    if distributed.is_main_process():
      _write_config(setup.config, workdir, command)

    record = recorder.Recorder(setup, workdir, first, clock, cleanup)
    trace = recorder.Trace(setup.config.profile_steps, setup.steps, workdir / 'profile', record.log)
    for i in range(first, setup.steps):
      with clock.measure('data'):
        step_fn.loader.wait(i)
      trace.before_step(i + 1)
      state, metrics = step_fn(state, i)
      done = i + 1
      record.metrics.push(done, metrics)
      watchdog.heartbeat()
      if i == first:
        jax.block_until_ready(metrics)
        clock.first_step_done()
      trace.after_step(done, metrics)
      stopped = record.after_step(done, state, stop, idle=not step_fn.loader.ready(done))
      if stopped:
        break
    record.finish(done, state, stop, stopped)
    return stop.exit_code


def _set_up(config, workdir, train, cleanup) -> recorder.Setup:
  """Loads the data, locks the workdir, and checks that recipe, data, devices and workdir fit together."""

  def prepare():
    distributed.check_accelerator()
    recipes.check(config)
    images = data.load(config.data, 'train') if train is None else train
    filled = recipes.with_examples(config, len(images))
    if distributed.is_main_process():
      cleanup.enter_context(_locked(workdir))
      _check_workdir(filled, workdir)
    steps = optim.train_steps(filled, len(images))
    warmup = optim.warmup_steps(filled, len(images))
    recipes.check_against(filled, images, jax.device_count(), warmup, steps)
    _warn(filled, images)
    test = _test_images(filled, images) if filled.knn_every_epochs else None
    return recorder.Setup(filled, images, test, steps, sharding.make_mesh())

  setup = distributed.run_on_all(prepare)
  distributed.check_equal(_identity(setup.config))
  data.check_same(
    {'checksum of the training images': setup.train, 'checksum of the test images': setup.test}
  )
  return setup


def _restore(
  setup: recorder.Setup, workdir: pathlib.Path, cleanup: contextlib.ExitStack, quiet: bool
) -> tuple[train_state.TrainState, train_state.Step]:
  """The state of the newest checkpoint, or else the initial one, and the step."""
  config, folder = setup.config, workdir / 'checkpoints'
  resuming = checkpoint.exists(folder)
  state, step_fn = train_state.build(
    config,
    setup.train,
    setup.mesh,
    pretrained=None if resuming else runs.load_pretrained(config),
    teacher=runs.load_teacher(config),
    resuming=resuming,
  )
  cleanup.callback(step_fn.loader.close)
  if not quiet:
    _describe(setup, state)
  restored = checkpoint.restore(folder, checkpoint.abstract(state), quarantine=True)
  if restored:
    state = restored[0]
    print(f'resuming {workdir} from step {int(state.step)} of {setup.steps}', flush=True)
  return state, step_fn


@contextlib.contextmanager
def _locked(workdir) -> Iterator[None]:
  """Refuses a second run in the same workdir at the same time."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if paths.is_remote(workdir):  # buckets have no locks
      yield
      return
    file = (workdir / '.lock').open('w')
  except OSError as error:
    raise ConfigError(f'--workdir={workdir} cannot be written: {error.strerror or error}') from None
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ConfigError(f'another run is using --workdir={workdir}') from None
    yield


def _check_workdir(config, workdir):
  """Refuses to resume a run with another recipe, or one whose recipe is missing."""
  if not checkpoint.exists(workdir / 'checkpoints'):
    return  # no run to resume
  if not (workdir / 'config.json').exists():
    raise ConfigError(
      f'{workdir} has checkpoints, but its config.json is missing: restore the file or choose a new --workdir'
    )
  recipes.check_unchanged(recipes.read_run(workdir), config, str(workdir))


def _identity(config) -> dict[str, Any]:
  """What must be equal in all processes of a run: the recipe without its local fields, and versions."""
  table = fields.of_recipe(config.method)
  flat = {k: v for k, v in recipes.flatten(config).items() if k not in table or not table[k].local}
  # Tuples become lists, as in the values that other processes send as JSON.
  return json.loads(json.dumps(flat | environment.versions()))


def _write_config(config, workdir, command):
  values = config.to_dict()
  if config.data.dir and not paths.is_remote(config.data.dir):
    values['data']['dir'] = str(pathlib.Path(config.data.dir).expanduser().resolve())
  about = {'config': values, 'command': command, 'versions': environment.versions()}
  files.write_json(workdir / 'config.json', about)


def _describe(setup, state):
  """Prints recipe, versions, devices, data set and parameters at the top of the log."""
  config, mesh, train = setup.config, setup.mesh, setup.train
  print(config)
  print('\n'.join(f'{name} {version}' for name, version in environment.versions().items()))
  kinds = sorted({d.device_kind for d in mesh.devices.flat})
  print(f'{mesh.size} device(s): {", ".join(kinds)}; mesh {dict(mesh.shape)}')
  kind = list(train.images.shape[1:]) if isinstance(train, data.Arrays) else 'read from files'
  print(f'{len(train):,} images, {kind}; {setup.steps:,} steps of {config.batch_size}')
  statistics = jax.process_count() == 1  # other processes may hold parts of the parameters
  print(
    parameter_overview.get_parameter_overview(state.params, include_stats=statistics), flush=True
  )


def _warn(config, train):
  """Logs the problems of a recipe that are known before the first step."""
  for sentence in diagnostics.findings(config, []).values():
    logging.warning('%s', sentence)
  if config.data.num_classes and not train.labelled and not config.data.labels:
    logging.warning('the training images have no labels: ignore probe_acc')


def _test_images(config, train) -> Dataset | None:
  """The labelled test images for the online kNN, or None if there are none."""
  if not train.labelled:
    return None
  try:
    test = data.load(config.data, 'test')
  except ConfigError as error:
    logging.warning('online kNN evaluation disabled: %s', error)
    return None
  if not test.labelled:
    logging.warning('online kNN evaluation disabled: the test images have no labels')
    return None
  return test
