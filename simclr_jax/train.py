"""The pretraining loop: recipe -> mesh -> data -> method -> restore -> steps."""

import contextlib
import fcntl
import json
import os
import pathlib
import signal
import time

import jax
import ml_collections
import numpy as np
from absl import logging
from clu import parameter_overview

from simclr_jax import (
  checkpoint,
  config as recipes,
  data,
  health,
  logs,
  methods,
  optim,
  sharding,
  train_state,
)
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import features, knn

EXIT_NAN = 3  # the loss is not finite
EXIT_PREEMPTED = 75  # SIGTERM: saved; the same command goes on


class NotFinite(RuntimeError):
  """The loss or its gradient is NaN or infinite."""


class Stopped(RuntimeError):
  """A signal stopped a training that other work waited for, after saving; `args[0]` is the exit code."""


class Stop:
  """Turns SIGTERM and the first Ctrl-C into a wish that the loop grants between two steps.

  A second Ctrl-C stops at once. (Several processes need jax.distributed's own handler instead, so
  that all save the same step.)
  """

  def __init__(self):
    self.signal: int | None = None
    self._old: dict[int, object] = {}

  def __enter__(self):
    for number in (signal.SIGTERM, signal.SIGINT):
      self._old[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *error):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _note(self, number, frame):
    self.signal = number
    if number == signal.SIGINT:
      signal.signal(number, signal.default_int_handler)
      os.write(2, b'\nCtrl-C: saving after this step; press again to stop at once\n')

  @property
  def exit_code(self) -> int:
    """The process's exit code: 75 after SIGTERM, 130 after Ctrl-C, 0 without a signal."""
    return {None: 0, signal.SIGTERM: EXIT_PREEMPTED, signal.SIGINT: 130}[self.signal]


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
  with Stop() as stop, _locked(workdir), contextlib.ExitStack() as cleanup:
    train = data.load(config.data, 'train') if train is None else train
    config = recipes.with_examples(config, len(train))
    _check_workdir(config, workdir)
    steps = optim.train_steps(config, len(train))
    warmup = optim.warmup_steps(config, len(train))
    recipes.check_against(config, train, jax.device_count(), warmup, steps)
    _warn(config, train)
    online_knn = _online_knn(config, train) if config.knn_every_epochs else None

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
    first = int(state.step)
    if first >= steps:
      print(f'{workdir} is complete: {first} steps', flush=True)
      return 0
    _write_config(config, workdir, command)

    saver = cleanup.enter_context(checkpoint.Saver(folder, config.keep_checkpoints))
    log = logs.Log(workdir, first, steps, config.tensorboard)
    cleanup.callback(log.close)
    every_epoch = max(len(train) // config.batch_size, 1)
    save_every = config.checkpoint_every_steps or every_epoch
    knn_every = config.knn_every_epochs * every_epoch
    records, known = logs.read(workdir), set(health.findings(config, []))
    clock, clock_step, waited = time.monotonic(), first, 0.0
    pending = None

    def finish(done, metrics):
      """Fetches the metrics of step `done`; while the loop runs, the next one is on the device."""
      nonlocal clock, clock_step, waited
      values = {k: float(v) for k, v in jax.device_get(metrics).items()}
      values = {k: v for k, v in values.items() if k in ('loss', 'grad_norm') or not np.isnan(v)}
      if not np.isfinite([values['loss'], values['grad_norm']]).all():
        log.write(done, values)
        raise NotFinite(
          f'step {done}: loss {values["loss"]}, gradient norm {values["grad_norm"]}, learning rate '
          f'{values["learning_rate"]:.4g}: training stopped before the next checkpoint; '
          f'{_newest(folder)}. A lower learning_rate or a longer warm-up usually helps'
        )
      if done % config.log_every_steps and done not in (1, steps):
        return
      now = time.monotonic()
      values['data_wait'] = waited / max(now - clock, 1e-9)
      values['steps_per_second'] = (done - clock_step) / max(now - clock, 1e-9)
      values['examples_per_second'] = values['steps_per_second'] * config.batch_size
      values['epoch'] = done * config.batch_size / len(train)
      clock, clock_step, waited = now, done, 0.0
      log.write(done, values)
      log.progress(done, values)
      records.append({'step': done, **values})
      del records[1:-200]  # the first step and the recent ones tell enough
      for name, sentence in health.findings(config, records).items():
        if name not in known:
          log.say(sentence)
          known.add(name)

    def flush():
      nonlocal pending
      if pending:
        finish(*pending)
      pending = None

    def save(done):
      flush()  # nothing is saved before its loss is known to be finite
      saver.save(done, state, {'config': config.to_dict(), 'versions': checkpoint.versions()})

    done = first
    for i in range(first, steps):
      if not step_fn.feed.ready(i):
        flush()  # the device is idle from here on
        start = time.monotonic()
        step_fn.feed.wait(i)
        waited += time.monotonic() - start
      state, metrics = step_fn(state, i)
      done = i + 1
      flush()
      pending = (done, metrics)
      if done % save_every == 0 or done == steps:
        save(done)
      if online_knn and (done % knn_every == 0 or done == steps):
        flush()
        accuracy = online_knn(state)
        log.write(done, {'knn_acc': accuracy})
        log.say(f'step {done}/{steps}  online kNN {accuracy:.1%}')
        clock, clock_step, waited = time.monotonic(), done, 0.0
      if stop.signal:
        break
    if stop.signal and done < steps:
      if done % save_every:
        save(done)
      saver.wait()
      name = signal.Signals(stop.signal).name
      log.say(f'{name}: saved step {done} of {steps}; the same command goes on from there')
      return stop.exit_code
    saver.wait()
    log.say(f'complete: {steps} steps, in {workdir}')
    return 0


@contextlib.contextmanager
def _locked(workdir):
  """One run in a workdir at a time."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = (workdir / '.lock').open('w')
  except OSError as error:
    raise ConfigError(f'--workdir={workdir} cannot be written: {error.strerror}') from None
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


def _write_config(config, workdir, command):
  values = config.to_dict()
  if config.data.dir and '://' not in config.data.dir:
    values['data']['dir'] = str(pathlib.Path(config.data.dir).expanduser().resolve())
  about = {'config': values, 'command': command, 'versions': checkpoint.versions()}
  new = workdir / 'config.json.new'
  new.write_text(json.dumps(about, indent=1) + '\n')
  new.rename(workdir / 'config.json')


def _describe(config, mesh, train, steps, state):
  """What a log needs at its top to be understood later."""
  print(config)
  print('\n'.join(f'{name} {version}' for name, version in checkpoint.versions().items()))
  kinds = sorted({d.device_kind for d in mesh.devices.flat})
  print(f'{mesh.size} device(s): {", ".join(kinds)}; mesh {dict(mesh.shape)}')
  kind = list(train.images.shape[1:]) if isinstance(train, data.Arrays) else 'read from files'
  print(f'{len(train):,} images, {kind}; {steps:,} steps of {config.batch_size}')
  print(parameter_overview.get_parameter_overview(state.params), flush=True)


def _warn(config, train):
  for sentence in health.findings(config, []).values():
    logging.warning('%s', sentence)
  if config.data.num_classes and not train.labelled and not config.data.labels:
    logging.warning('the data has no labels: probe_acc means nothing')


def _online_knn(config, train):
  """A function state -> kNN accuracy on the test split, or None if there is nothing to measure."""
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
  method = methods.build(config)
  bank = train.sample(config.knn_images or len(train))
  queries = test.sample(-(-config.knn_images // 5) or len(test))

  def measure(state):
    variables = method.encoder(state.params, state.state)
    encoder = features.Encoder(recipes.architecture(config), variables)
    return knn.accuracy(*encoder.embed(bank), *encoder.embed(queries))

  return measure


def _newest(folder):
  found = checkpoint.steps(folder)
  return f'the newest checkpoint is of step {found[-1]}' if found else 'there is no checkpoint yet'
