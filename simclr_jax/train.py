"""The pretraining loop: recipe -> mesh -> data -> method -> restore -> steps."""

import contextlib
import fcntl
import json
import pathlib
import signal
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from clu import parameter_overview

from simclr_jax import (
  checkpoint,
  config as recipes,
  data,
  distributed,
  goodput,
  health,
  logs,
  methods,
  optim,
  paths,
  sharding,
  stopping,
  train_state,
)
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import features, knn

EXIT_NAN = 3  # the loss is not finite
FEWEST = 20  # steps between two checkpoints, where an epoch is shorter


class NotFinite(RuntimeError):
  """The loss or its gradient is NaN or infinite."""


def pretrain(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  command: str = '',
  train=None,
  quiet: bool = False,
) -> int:
  """Trains to the end of the recipe, from the newest checkpoint in `workdir` if there is one.

  Args:
    config: a checked recipe (`config.load`).
    workdir: gets `config.json`, `checkpoints/`, `metrics.jsonl` and `metrics/` (TensorBoard).
    command: recorded, for the report.
    train: the training set, if it is loaded already.
    quiet: leave out the description at the start.

  Returns:
    0 when the training is complete; 75 or 130 when a signal stopped it after saving.

  Raises:
    ConfigError: the recipe does not fit the data, the devices or the workdir.
    CheckpointError: no checkpoint can be read, or one cannot be written.
    NotFinite: the loss became NaN or infinite; the last checkpoint is from before.
  """
  with (
    stopping.Stop() as stop,
    stopping.Watchdog(config.watchdog_seconds) as watchdog,
    contextlib.ExitStack() as cleanup,
  ):
    spent = goodput.Clock()

    def prepare():
      distributed.check_accelerator()
      images = data.load(config.data, 'train') if train is None else train
      filled = recipes.with_examples(config, len(images))
      if distributed.leader():
        cleanup.enter_context(_locked(workdir))
        _check_workdir(filled, workdir)
      steps = optim.train_steps(filled, len(images))
      warmup = optim.warmup_steps(filled, len(images))
      recipes.check_against(filled, images, jax.device_count(), warmup, steps)
      _warn(filled, images)
      test = _test_images(filled, images) if filled.knn_every_epochs else None
      return filled, images, steps, test

    config, train, steps, test = distributed.together(prepare)
    distributed.agree(_identity(config))
    data.agree({'the training images': train, 'the test images': test})
    online_knn = _online_knn(config, train, test) if test else None
    watchdog.beat(compiling=True)

    mesh = sharding.make_mesh()
    folder = workdir / 'checkpoints'
    begun = checkpoint.exists(folder)
    state, step_fn = train_state.build(config, train, mesh, start=not begun)
    cleanup.callback(lambda: step_fn.feed.close())
    if not quiet:
      _describe(config, mesh, train, steps, state)

    restored = checkpoint.restore(folder, checkpoint.abstract(state), quarantine=True)
    if restored:
      state = restored[0]
      print(f'resuming {workdir} from step {int(state.step)} of {steps}', flush=True)
    watchdog.beat(compiling=True)
    first = int(state.step)
    if first >= steps:
      print(f'{workdir} is complete: {first} steps', flush=True)
      return stop.exit_code
    if distributed.leader():
      _write_config(config, workdir, command)

    saver = cleanup.enter_context(checkpoint.Saver(folder, config.keep_checkpoints))
    log = logs.Log(workdir, first, steps, config.tensorboard, distributed.leader())
    cleanup.callback(log.close)
    log.event(first, 'start', {'time': spent.started})
    every_epoch = max(len(train) // config.batch_size, 1)
    save_every = config.checkpoint_every_steps or max(every_epoch, FEWEST)
    knn_every = config.knn_every_epochs * every_epoch
    metrics = _Metrics(config, workdir, log, spent, first, steps, len(train))
    trace = _Trace(config.profile_steps, steps, workdir / 'profile')

    def save(done):
      metrics.flush()  # nothing is saved before its loss is known to be finite
      with spent.on('checkpoint'):
        log.flush()
        saver.save(done, state, {'config': config.to_dict(), 'versions': checkpoint.versions()})

    done = first
    for i in range(first, steps):
      if not step_fn.feed.ready(i):
        metrics.flush()  # the device is idle from here on
        with spent.on('data'):
          step_fn.feed.wait(i)
      trace.before(i + 1)
      state, values = step_fn(state, i)
      done = i + 1
      metrics.flush()
      watchdog.beat()
      if done == first + 1:
        jax.block_until_ready(values)
        spent.begun()
      if trace.ends(done):
        jax.block_until_ready(values)
        log.say(trace.stop())
      metrics.pending = (done, values)
      if done % save_every == 0 or done == steps:
        save(done)
      stopped = stop.wanted()
      if online_knn and not stopped and (done % knn_every == 0 or done == steps):
        metrics.flush()
        try:
          with spent.on('evaluation'):
            accuracy = online_knn(state)
          log.write(done, {'knn_acc': accuracy} | spent.fields())
          log.say(f'step {done}/{steps}  online kNN {accuracy:.1%}')
        except stopping.Stopped:  # saved below
          stopped = True
        metrics.restart_clock(done)
      if stopped:
        break
    if stopped and done < steps:
      if done % save_every:
        save(done)
      with spent.on('checkpoint'):
        saver.wait()
      log.event(done, 'stopped', spent.fields())
      name = signal.Signals(stop.signal).name
      log.say(f'{name}: saved step {done} of {steps}; the same command goes on from there')
      return stop.exit_code
    with spent.on('checkpoint'):
      saver.wait()
    log.event(done, 'complete', spent.fields())
    log.say(f'complete: {steps} steps, in {workdir}')
    return stop.exit_code


class _Metrics:
  """What the steps report, fetched while the next step is on the device.

  Attributes:
    pending: (step, its metrics on the device), not fetched yet.
  """

  def __init__(self, config, workdir, log, spent, first, steps, examples):
    self.pending = None
    self._config, self._workdir, self._log, self._spent = config, workdir, log, spent
    self._steps, self._examples = steps, examples
    self._records = [r for r in logs.read(workdir) if 'loss' in r]
    self._known = set(health.findings(config, []))
    self.restart_clock(first)

  def restart_clock(self, done):
    """Speeds are of the time from here on."""
    self._since, self._since_step = time.monotonic(), done
    self._waited = self._spent.seconds['data']

  def flush(self):
    """Fetches what is pending, and logs it when due.

    Raises:
      NotFinite: the loss or its gradient is not.
    """
    if self.pending:
      (done, metrics), self.pending = self.pending, None
      values = {k: float(v) for k, v in jax.device_get(metrics).items()}
      values = {k: v for k, v in values.items() if k in ('loss', 'grad_norm') or not np.isnan(v)}
      if not np.isfinite([values['loss'], values['grad_norm']]).all():
        self._log.write(done, values | self._spent.fields())
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
    values['data_wait'] = (self._spent.seconds['data'] - self._waited) / seconds
    values['steps_per_second'] = (done - self._since_step) / seconds
    values['examples_per_second'] = values['steps_per_second'] * batch
    values['epoch'] = done * batch / self._examples
    self.restart_clock(done)
    self._log.write(done, values | self._spent.fields())
    self._log.progress(done, values)
    self._records.append({'step': done, **values})
    del self._records[1:-200]  # the first step and the recent ones tell enough
    for name, sentence in health.findings(self._config, self._records).items():
      if name not in self._known:
        self._log.say(sentence)
        self._known.add(name)


class _Trace:
  """A trace of the steps that `profile_steps` names, if it names any."""

  def __init__(self, wanted: Sequence[int], steps: int, folder: pathlib.Path):
    self._first, last = wanted or (0, 0)
    self._last, self._folder, self._on = min(last, steps), folder, False

  def before(self, step):
    if step == self._first:
      jax.profiler.start_trace(str(self._folder))
      self._on = True

  def ends(self, done):
    return self._on and done >= self._last

  def stop(self) -> str:
    """Writes it; returns a sentence that says so."""
    jax.profiler.stop_trace()
    self._on = False
    return f'wrote a trace of steps {self._first} to {self._last}: {self._folder}'


@contextlib.contextmanager
def _locked(workdir):
  """One run in a workdir at a time."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if paths.remote(workdir):  # buckets have no locks
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
  if not checkpoint.exists(workdir / 'checkpoints'):
    return  # nothing was trained that another recipe could spoil
  if not (workdir / 'config.json').exists():
    raise ConfigError(f'{workdir} has checkpoints, but its config.json is missing')
  recipes.check_unchanged(recipes.read_run(workdir), config, str(workdir))


def _identity(config) -> dict[str, Any]:
  """What all processes of a run must have in common."""
  own = ('data.dir', 'data.threads')
  fields = {k: v for k, v in recipes.flatten(config).items() if k not in own}
  # As it looks after the journey to the others: JSON knows no tuples.
  return json.loads(json.dumps(fields | checkpoint.versions()))


def _write_config(config, workdir, command):
  values = config.to_dict()
  if config.data.dir and '://' not in config.data.dir:
    values['data']['dir'] = str(pathlib.Path(config.data.dir).expanduser().resolve())
  about = {'config': values, 'command': command, 'versions': checkpoint.versions()}
  new = workdir / 'config.json.new'
  new.write_text(json.dumps(about, indent=1) + '\n')
  new.replace(workdir / 'config.json')


def _describe(config, mesh, train, steps, state):
  """What a log needs at its top to be understood later."""
  print(config)
  print('\n'.join(f'{name} {version}' for name, version in checkpoint.versions().items()))
  kinds = sorted({d.device_kind for d in mesh.devices.flat})
  print(f'{mesh.size} device(s): {", ".join(kinds)}; mesh {dict(mesh.shape)}')
  kind = list(train.images.shape[1:]) if isinstance(train, data.Arrays) else 'read from files'
  print(f'{len(train):,} images, {kind}; {steps:,} steps of {config.batch_size}')
  alone = jax.process_count() == 1  # parts of the parameters may be elsewhere
  print(parameter_overview.get_parameter_overview(state.params, include_stats=alone), flush=True)


def _warn(config, train):
  for sentence in health.findings(config, []).values():
    logging.warning('%s', sentence)
  if config.data.num_classes and not train.labelled and not config.data.labels:
    logging.warning('the data has no labels: probe_acc means nothing')


def _test_images(config, train):
  """The labelled images to measure an online kNN on, or None if there are none."""
  if not train.labelled:
    return None
  try:
    test = data.load(config.data, 'test')
  except ConfigError as error:
    logging.warning('no online kNN: %s', error)
    return None
  if not test.labelled:
    logging.warning('no online kNN: the test images have no labels')
    return None
  return test


def _online_knn(config, train, test):
  """A function: state -> kNN accuracy on the test split."""
  method = methods.build(config)
  bank = train.sample(config.knn_images or len(train))
  queries = test.sample(-(-config.knn_images // 5) or len(test))

  def measure(state):
    variables = method.encoder(state.params, state.state)
    encoder = features.Encoder(recipes.architecture(config), variables)
    known, asked = (encoder.embed(images) for images in (bank, queries))
    return knn.accuracy(*known, *asked)

  return measure


def _newest(folder):
  found = checkpoint.steps(folder)
  return f'the newest checkpoint is of step {found[-1]}' if found else 'there is no checkpoint yet'
