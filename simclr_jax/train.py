"""The training loop: sets a run up, restores its newest checkpoint, trains, saves and evaluates."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from clu import parameter_overview

from simclr_jax import (
  config as recipes,
  data,
  diagnostics,
  fields,
  methods,
  optim,
  runs,
  sharding,
  train_state,
)
from simclr_jax.data import Dataset
from simclr_jax.encoder import Encoder
from simclr_jax.errors import ConfigError, NotFinite, Stopped
from simclr_jax.evaluate import knn
from simclr_jax.runtime import checkpoint, distributed, environment, files, goodput, logs, paths
from simclr_jax.runtime.preemption import GracefulStop, Watchdog

MIN_SAVE_STEPS = 20  # fewest steps between two checkpoints that are saved once per epoch


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

    recorder = _Recorder(setup, workdir, first, clock, cleanup)
    trace = _Trace(setup.config.profile_steps, setup.steps, workdir / 'profile', recorder.log)
    for i in range(first, setup.steps):
      with clock.measure('data'):
        step_fn.loader.wait(i)
      trace.before_step(i + 1)
      state, metrics = step_fn(state, i)
      done = i + 1
      recorder.metrics.push(done, metrics)
      watchdog.heartbeat()
      if i == first:
        jax.block_until_ready(metrics)
        clock.first_step_done()
      trace.after_step(done, metrics)
      stopped = recorder.after_step(done, state, stop, idle=not step_fn.loader.ready(done))
      if stopped:
        break
    recorder.finish(done, state, stop, stopped)
    return stop.exit_code


@dataclasses.dataclass(frozen=True)
class _Setup:
  """What a run needs before its first step.

  Attributes:
    config: the recipe, with `data.examples`.
    train: the training images.
    test: the labelled images for the online kNN; None: no online kNN.
    steps: length of the training.
    mesh: the devices.
  """

  config: ml_collections.ConfigDict
  train: Dataset
  test: Dataset | None
  steps: int
  mesh: jax.sharding.Mesh


def _set_up(config, workdir, train, cleanup) -> _Setup:
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
    return _Setup(filled, images, test, steps, sharding.make_mesh())

  setup = distributed.run_on_all(prepare)
  distributed.check_equal(_identity(setup.config))
  data.check_same(
    {'checksum of the training images': setup.train, 'checksum of the test images': setup.test}
  )
  return setup


def _restore(
  setup: _Setup, workdir: pathlib.Path, cleanup: contextlib.ExitStack, quiet: bool
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


class _Recorder:
  """Logs, saves and evaluates after each step, and at the end of the run.

  Attributes:
    log: the log of the run.
    metrics: the metrics of the last step, which are logged during the next one.
  """

  def __init__(
    self,
    setup: _Setup,
    workdir: pathlib.Path,
    first: int,
    clock: goodput.Clock,
    cleanup: contextlib.ExitStack,
  ):
    """`first`: the step from which the run starts or resumes."""
    config, steps = setup.config, setup.steps
    self._workdir, self._clock, self._steps = workdir, clock, steps
    self._saver = cleanup.enter_context(
      checkpoint.Saver(workdir / 'checkpoints', config.keep_checkpoints)
    )
    self.log = logs.Log(workdir, first, steps, config.tensorboard, distributed.is_main_process())
    cleanup.callback(self.log.close)
    self.log.event(first, 'start', {'time': clock.started})
    self.metrics = _Metrics(config, workdir, self.log, clock, first, steps, len(setup.train))
    self._metadata = {'config': config.to_dict(), 'versions': environment.versions()}
    self._evaluate = _online_knn(config, setup.train, setup.test) if setup.test else None
    epoch = max(len(setup.train) // config.batch_size, 1)
    self._save_every = config.checkpoint_every_steps or max(epoch, MIN_SAVE_STEPS)
    self._evaluate_every = config.knn_every_epochs * epoch
    self._saved = first

  def after_step(
    self, done: int, state: train_state.TrainState, stop: GracefulStop, idle: bool
  ) -> bool:
    """Saves and evaluates when due.

    Args:
      done: number of finished steps.
      state: the state after them.
      stop: knows whether a signal has arrived.
      idle: whether the next batch is not loaded yet, so that the devices have to wait anyway.

    Returns:
      Whether to stop.
    """
    last = done == self._steps
    stopped = stop.requested()
    save = last or done % self._save_every == 0
    evaluate = None if stopped else self._evaluate
    if evaluate and not last and done % self._evaluate_every:
      evaluate = None  # not due
    if save or evaluate or stopped or idle:
      self.metrics.flush()  # raises if the loss is not finite, before the state is saved
    if save:
      self._save(done, state)
    if evaluate:
      try:
        with self._clock.measure('evaluation'):
          accuracy = evaluate(state)
        self.log.write(done, {'knn_acc': accuracy} | self._clock.fields())
        self.log.info(f'step {done}/{self._steps}  online kNN {accuracy:.1%}')
      except Stopped:
        stopped = True
      self.metrics.restart_clock(done)
    return stopped

  def finish(
    self, done: int, state: train_state.TrainState, stop: GracefulStop, stopped: bool
  ) -> None:
    """Saves the state of a stopped run, waits until it is on disk, and records the event."""
    stopped = stopped and done < self._steps
    if stopped and self._saved != done:
      self._save(done, state)
    with self._clock.measure('checkpoint'):
      self._saver.wait()
    self.log.event(done, 'stopped' if stopped else 'complete', self._clock.fields())
    if stopped:
      self.log.info(
        f'{stop.signal_name}: saved step {done} of {self._steps}; rerun the same command to resume'
      )
    else:
      self.log.info(f'complete: {self._steps} steps, in {self._workdir}')

  def _save(self, done, state):
    with self._clock.measure('checkpoint'):
      self.log.flush()
      self._saver.save(done, state, self._metadata)
    self._saved = done


class _Metrics:
  """The metrics of the steps, fetched while the next step runs on the device."""

  def __init__(self, config, workdir, log, clock, first, steps, examples):
    self._pending: tuple[int, dict[str, jax.Array]] | None = None
    self._config, self._workdir, self._log, self._clock = config, workdir, log, clock
    self._steps, self._examples = steps, examples
    self._records = [r for r in logs.read(workdir) if 'loss' in r]
    self._reported = set(diagnostics.findings(config, []))
    self.restart_clock(first)

  def restart_clock(self, done: int) -> None:
    """Starts the interval over which the speed is measured; `done`: number of finished steps."""
    self._since, self._since_step = time.monotonic(), done
    self._waited = self._clock.seconds['data']

  def push(self, done: int, metrics: dict[str, jax.Array]) -> None:
    """Records the metrics of the previous step, and keeps those of the step that was just dispatched."""
    self.flush()
    self._pending = (done, metrics)

  def flush(self) -> None:
    """Waits for the last dispatched step, and records its metrics if it is to be logged.

    Raises:
      NotFinite: the loss or the gradient of this step is not finite.
    """
    if not self._pending:
      return
    (done, metrics), self._pending = self._pending, None
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    values = {k: v for k, v in values.items() if k in ('loss', 'grad_norm') or not np.isnan(v)}
    if not np.isfinite([values['loss'], values['grad_norm']]).all():
      self._log.write(done, values | self._clock.fields())
      raise NotFinite(
        f'step {done}: loss {values["loss"]}, gradient norm {values["grad_norm"]}, learning rate '
        f'{values["learning_rate"]:.4g}: training stopped before the next checkpoint; '
        f'{_newest(self._workdir / "checkpoints")}. A lower learning_rate or a longer warm-up usually '
        'helps'
      )
    if done % self._config.log_every_steps == 0 or done in (1, self._steps):
      self._record(done, values)

  def _record(self, done, values):
    seconds = max(time.monotonic() - self._since, 1e-9)
    batch = self._config.batch_size
    values['data_wait'] = (self._clock.seconds['data'] - self._waited) / seconds
    values['steps_per_second'] = (done - self._since_step) / seconds
    values['examples_per_second'] = values['steps_per_second'] * batch
    values['epoch'] = done * batch / self._examples
    self.restart_clock(done)
    self._log.write(done, values | self._clock.fields())
    self._log.progress(done, values)
    self._records.append({'step': done, **values})
    del self._records[1:-200]  # the first step and the recent ones are enough for diagnostics
    for name, sentence in diagnostics.findings(self._config, self._records).items():
      if name not in self._reported:
        self._log.info(sentence)
        self._reported.add(name)


class _Trace:
  """A profiler trace of the steps FIRST to LAST of `profile_steps`, counted from 1; () traces nothing."""

  def __init__(self, profile_steps: Sequence[int], steps: int, folder: pathlib.Path, log: logs.Log):
    self._first, last = profile_steps or (0, 0)
    self._last, self._folder, self._log = min(last, steps), folder, log
    self._running = False

  def before_step(self, step: int) -> None:
    """Starts the trace if this is its first step."""
    if step == self._first:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after_step(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Waits for the metrics of this step and writes the trace, if this is its last step."""
    if self._running and step >= self._last:
      jax.block_until_ready(metrics)
      jax.profiler.stop_trace()
      self._running = False
      self._log.info(f'wrote a trace of steps {self._first} to {self._last}: {self._folder}')


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


def _online_knn(config, train, test) -> Callable[[train_state.TrainState], float]:
  """A function from a `TrainState` to the kNN accuracy of its encoder on test images."""
  method = methods.build(config)
  bank = train.sample(config.knn_images or len(train))
  queries = test.sample(-(-config.knn_images // 5) or len(test))

  def evaluate(state):
    variables = method.encoder(state.params, state.state)
    encoder = Encoder(recipes.architecture(config), variables)
    return knn.accuracy(*encoder.embed(bank), *encoder.embed(queries))

  return evaluate


def _newest(folder):
  saved = checkpoint.steps(folder)
  return f'the newest checkpoint is of step {saved[-1]}' if saved else 'there is no checkpoint yet'
