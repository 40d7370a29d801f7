"""What happens after each step of a training: metrics, checkpoints, the online kNN, profiler traces."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from simclr_jax import config as recipes, diagnostics, methods, train_state
from simclr_jax.data import Dataset
from simclr_jax.encoder import Encoder
from simclr_jax.errors import NotFinite, Stopped
from simclr_jax.evaluate import knn
from simclr_jax.runtime import checkpoint, distributed, environment, goodput, logs
from simclr_jax.runtime.preemption import GracefulStop

MIN_SAVE_STEPS = 20  # fewest steps between two checkpoints that are saved once per epoch


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a run needs before its first step.

  Attributes:
    config: the recipe, with `data.examples`.
    train: the training images.
    test: the labelled images for the online kNN; None: no online kNN.
    steps: length of the training.
    mesh: the devices.
    images: fingerprint, number and place of the training images, recorded in each checkpoint.
    extended: for each extension of the run, the step from which it continued, and the length before.
    held_out: the test images, with or without labels, for the summary.
  """

  config: ml_collections.ConfigDict
  train: Dataset
  test: Dataset | None
  steps: int
  mesh: jax.sharding.Mesh
  images: Mapping[str, Any]
  extended: Sequence[Mapping[str, int]] = ()
  held_out: Dataset | None = None


class Callback:
  """What `train.pretrain` calls during a training. All methods do nothing; a plain function serves as `on_step`.

  A method that returns True, or is interrupted by Ctrl-C, stops the training: the state is saved, and the same call
  resumes.
  """

  def on_step(self, step: int, metrics: dict[str, float]) -> bool | None:
    """Called once per step, from 1, with all metrics of the step, while the next step runs."""

  def on_epoch(self, epoch: int, metrics: dict[str, float]) -> bool | None:
    """Called after the last step of each epoch, from 1, with the means of the metrics over its steps."""

  def on_evaluation(self, step: int, metrics: dict[str, float]) -> bool | None:
    """Called after an online evaluation, with `knn_acc`, 0 to 1."""


class Recorder:
  """Logs, saves and evaluates after each step, and at the end of the run.

  Attributes:
    log: the log of the run.
    metrics: the metrics of the last step, which are logged during the next one.
  """

  def __init__(
    self,
    setup: Setup,
    workdir: pathlib.Path,
    first: int,
    clock: goodput.Clock,
    cleanup: contextlib.ExitStack,
    callbacks: Sequence[Callback | Callable[..., Any]] = (),
    shows: bool = True,
  ):
    """`first`: the step from which the run starts or resumes; `shows`: whether lines and progress are printed."""
    config, steps = setup.config, setup.steps
    self._workdir, self._clock, self._steps = workdir, clock, steps
    self._saver = cleanup.enter_context(
      checkpoint.Saver(workdir / 'checkpoints', config.keep_checkpoints)
    )
    self.log = logs.Log(
      workdir, first, steps, config.tensorboard, distributed.is_main_process(), shows
    )
    cleanup.callback(self.log.close)
    self.log.event(first, 'start', {'time': clock.started})
    self._callbacks = _Callbacks(callbacks, config.batch_size, len(setup.train))
    self.metrics = Metrics(
      config, workdir, self.log, clock, first, steps, len(setup.train), self._callbacks
    )
    self._metadata = {
      'config': config.to_dict(), 'versions': environment.versions(), 'images': dict(setup.images),
      'extended': [dict(e) for e in setup.extended],
    }  # fmt: skip
    self._evaluate = _online_knn(config, setup.train, setup.test) if setup.test else None
    epoch = max(len(setup.train) // config.batch_size, 1)
    self._save_every = config.checkpoint_every_steps or max(epoch, MIN_SAVE_STEPS)
    self._evaluate_every = config.knn_every_epochs * epoch
    self._saved = first

  def first_step_done(self, done: int) -> None:
    """Reports the time of the first step, which is mostly compilation, and excludes it from the speed."""
    self.log.info(f'first step after {self._clock.seconds["start"]:.0f} s, including compilation')
    self.metrics.restart_clock(done)
    self.log.restart(done)

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
    stopped = stop.requested() or self._callbacks.stop
    save = last or done % self._save_every == 0
    due = last or (self._evaluate_every and done % self._evaluate_every == 0)
    evaluate = self._evaluate is not None and due and not stopped
    if save or evaluate or stopped or idle:
      self.metrics.flush()  # raises if the loss is not finite, before the state is saved
    if save:
      self._save(done, state)
    return (self.evaluate(done, state) if evaluate else False) or stopped

  def evaluate(self, done: int, state: train_state.TrainState) -> bool:
    """The online kNN, if the run has one, after `done` steps; returns whether a signal stopped it."""
    if self._evaluate is None:
      return False
    try:
      with self._clock.measure('evaluation'):
        accuracy = self._evaluate(state)
      self.log.write(done, {'knn_acc': accuracy} | self._clock.fields())
      self.log.info(f'step {done}/{self._steps}  online kNN {accuracy:.1%}')
      self._callbacks.evaluation(done, {'knn_acc': accuracy})
      return False
    except Stopped:
      return True
    finally:
      self.metrics.restart_clock(done)
      self.log.restart(done)

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
        f'{"stopped by a callback" if self._callbacks.stop else stop.signal_name}: saved step {done} of '
        f'{self._steps}; rerun the same command to resume'
      )
    else:
      self.log.info(f'complete: {self._steps} steps, in {self._workdir}')

  def _save(self, done, state):
    with self._clock.measure('checkpoint'):
      self.log.flush()
      self._saver.save(done, state, self._metadata)
    self._saved = done


def missing_at_end(setup: Setup, workdir: pathlib.Path) -> list[str]:
  """What belongs to the end of a run and is missing after its last step: 'knn_acc', the event 'complete', 'config.json'.

  All processes must call this function.
  """
  last = [r for r in logs.read(workdir) if r['step'] == setup.steps]
  has_knn = setup.test is None or any('knn_acc' in r for r in last)
  is_complete = any(r.get('event') == 'complete' for r in last)
  has_recipe = (workdir / 'config.json').is_file()
  there = {'knn_acc': has_knn, 'complete': is_complete, 'config.json': has_recipe}
  return distributed.gather([name for name, present in there.items() if not present])[0]


class _Callbacks:
  """Calls callbacks; `stop`: whether one of them returned True."""

  def __init__(self, callbacks, batch_size, examples):
    self._callbacks, self._batch_size, self._examples = callbacks, batch_size, examples
    self._epoch: list[dict[str, float]] = []  # metrics of the steps of the epoch
    self.stop = False

  def step(self, step, metrics, last):
    if not self._callbacks:
      return
    self._call('on_step', step, metrics)
    self._epoch.append(metrics)
    epoch, before = (s * self._batch_size // self._examples for s in (step, step - 1))
    if epoch > before or last:
      means = {k: float(np.mean([m[k] for m in self._epoch if k in m])) for k in metrics}
      self._epoch = []
      self._call('on_epoch', max(epoch, 1) if epoch > before else epoch + 1, means)

  def evaluation(self, step, metrics):
    self._call('on_evaluation', step, metrics)

  def _call(self, name, number, metrics):
    for callback in self._callbacks:
      method = getattr(
        callback, name, callback if name == 'on_step' and callable(callback) else None
      )
      try:
        if method and method(number, dict(metrics)) is True:
          self.stop = True
      except KeyboardInterrupt:
        self.stop = True


class Metrics:
  """The metrics of the steps, fetched while the next step runs on the device."""

  def __init__(self, config, workdir, log, clock, first, steps, examples, callbacks):
    self._callbacks = callbacks
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
    epoch = done * self._config.batch_size / self._examples
    self._callbacks.step(done, values | {'epoch': epoch}, done == self._steps)
    if done % self._config.log_every_steps == 0 or done in (1, self._steps):
      self._record(done, values | {'epoch': epoch})
    self._log.progress(done, values | {'epoch': epoch}, self._config.batch_size)

  def _record(self, done, values):
    # The speed of the first step is unknown: its time is mostly compilation.
    seconds = time.monotonic() - self._since if done > self._since_step else np.nan
    values['data_wait'] = (self._clock.seconds['data'] - self._waited) / seconds
    values['steps_per_second'] = (done - self._since_step) / seconds
    values['examples_per_second'] = values['steps_per_second'] * self._config.batch_size
    self.restart_clock(done)
    self._log.write(done, values | self._clock.fields())
    self._records.append({'step': done, **values})
    del self._records[1:-200]  # the first step and the recent ones are enough for diagnostics
    for name, sentence in diagnostics.findings(self._config, self._records).items():
      if name not in self._reported:
        self._log.info(sentence)
        self._reported.add(name)


class Trace:
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


def _online_knn(config, train, test) -> Callable[[train_state.TrainState], float]:
  """A function from a `TrainState` to the kNN accuracy of its encoder on test images."""
  method = methods.build(config)
  bank = train.sample(config.knn_images or len(train))
  queries = test.sample(-(-config.knn_images // 5) or len(test))

  def evaluate(state):
    architecture = recipes.architecture(config)
    if config.knn_features == 'z':
      architecture |= {'features': 'z'}
      variables = methods.projection(config, state.params, state.state)
    else:
      variables = method.encoder(state.params, state.state)
    encoder = Encoder(architecture, variables)
    return knn.accuracy(*encoder.embed(bank), *encoder.embed(queries))

  return evaluate


def _newest(folder):
  saved = checkpoint.steps(folder)
  return f'the newest checkpoint is of step {saved[-1]}' if saved else 'there is no checkpoint yet'
