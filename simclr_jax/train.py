"""The training loop: sets a run up, restores its newest checkpoint, trains, saves and evaluates."""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
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
  methods,
  optim,
  recorder,
  run_config,
  runs,
  sharding,
  train_state,
)
from simclr_jax.compile_check import gpus
from simclr_jax.data import Dataset
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import checkpoint, distributed, environment, files, goodput, paths
from simclr_jax.runtime.preemption import GracefulStop, Watchdog
from simclr_jax.runtime.text import printable

# What a run writes into its workdir beside config.json.
WRITTEN = ('setup.txt', 'metrics.jsonl', 'metrics', 'checkpoints')


def pretrain(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  command: str = '',
  train: Dataset | None = None,
  quiet: bool = False,
  test: Dataset | None = None,
  callbacks: Sequence[recorder.Callback | Callable[..., Any]] = (),
  extend: bool = False,
  progress: bool = True,
  devices: Sequence[jax.Device] | None = None,
) -> int:
  """Trains to the end of the recipe; resumes from the newest checkpoint in `workdir` if there is one.

  Args:
    config: a recipe (`config.load`).
    workdir: the run directory; gets `config.json`, `setup.txt`, `checkpoints/`, `metrics.jsonl` and `metrics/`
      (TensorBoard).
    command: the command line, recorded for the report.
    train: the training set; None: the data set of the recipe is loaded.
    quiet: do not print the summary of data, recipe and devices at the start.
    test: with `train`, labelled images for the online kNN; None: no online kNN.
    callbacks: called after steps, epochs and evaluations, see `recorder.Callback`.
    extend: continue a complete run with the larger `epochs` or `steps` of the recipe.
    progress: show the progress; if False, and `quiet`, nothing is printed.
    devices: the devices to train on (default: all).

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
    mesh = sharding.make_mesh(list(devices) if devices else None)
    setup = _set_up(config, workdir, (train, test), extend, mesh, cleanup)
    watchdog.heartbeat(compiling=True)
    state, step_fn = _restore(setup, workdir, cleanup, quiet, progress)
    watchdog.heartbeat(compiling=True)
    first = int(state.step)
    complete = first >= setup.steps
    missing = recorder.missing_at_end(setup, workdir) if complete else []
    if complete and not missing:
      if progress:
        print(f'{workdir} is complete: {first} steps', flush=True)
      return stop.exit_code
    if distributed.is_main_process():
      _write_config(setup, workdir, command)
      _describe(setup, state, workdir, quiet or complete)

    record = recorder.Recorder(setup, workdir, first, clock, cleanup, callbacks, progress)
    announce = None if quiet else _announcement(mesh)
    trace = recorder.Trace(setup.config.profile_steps, setup.steps, workdir / 'profile', record.log)
    for i in range(first, setup.steps):
      with clock.measure('data'):
        step_fn.loader.wait(i)
      trace.before_step(i + 1)
      state, metrics = step_fn(state, i, announce if i == first else None)
      done = i + 1
      record.metrics.push(done, metrics)
      watchdog.heartbeat()
      if i == first:
        jax.block_until_ready(metrics)
        clock.first_step_done()
        record.first_step_done(done)
      trace.after_step(done, metrics)
      stopped = record.after_step(done, state, stop, idle=not step_fn.loader.ready(done))
      if stopped:
        break
    if complete:
      done, stopped = first, 'knn_acc' in missing and record.evaluate(first, state)
    record.finish(done, state, stop, stopped)
    return stop.exit_code


def _set_up(config, workdir, loaded, extend, mesh, cleanup) -> recorder.Setup:
  """Locks the workdir, loads the data, and checks that recipe, data, devices and workdir fit together.

  Errors that need no data come first, because reading the data may take minutes.
  """

  def prepare():
    distributed.check_accelerator()
    recipes.check(config)
    if distributed.is_main_process():
      _lock(workdir, cleanup)
    absolute = _absolute(config)
    old = _recipe_to_resume(workdir)
    if old:
      absolute = run_config.with_old_defaults(absolute, workdir)
      _check_recipe(old, absolute, workdir, extend)
    train, test = loaded if loaded[0] is not None else _load(absolute)
    filled = recipes.with_examples(absolute, len(train), data.value_range(train))
    if old:
      _check_recipe(old, filled, workdir, extend)
    images = _describe_images(filled, train)
    _check_images(images, train, workdir)
    steps = optim.train_steps(filled, len(train))
    warmup = optim.warmup_steps(filled, len(train))
    recipes.check_against(filled, train, mesh.size, warmup, steps)
    _warn(filled, train)
    queries = _queries(train, test) if filled.knn_every_epochs else None
    attempts = _attempts(workdir, old, filled, extend)
    return recorder.Setup(filled, train, queries, steps, mesh, images, attempts, test)

  setup = distributed.run_on_all(prepare)
  distributed.check_equal(_identity(setup.config))
  data.check_same(
    {'checksum of the training images': setup.train, 'checksum of the test images': setup.test}
  )
  return setup


def _restore(
  setup: recorder.Setup,
  workdir: pathlib.Path,
  cleanup: contextlib.ExitStack,
  quiet: bool,
  progress: bool,
) -> tuple[train_state.TrainState, train_state.Step]:
  """The state of the newest checkpoint, or else the initial one, and the step."""
  config, folder = setup.config, workdir / 'checkpoints'
  resuming = checkpoint.exists(folder)
  pretrained = None if resuming else runs.load_pretrained(config)
  state, step_fn = train_state.build(
    config,
    setup.train,
    setup.mesh,
    pretrained=pretrained,
    teacher=runs.load_teacher(config),
    resuming=resuming,
  )
  cleanup.callback(step_fn.loader.close)
  if pretrained and not quiet:
    head = 'with' if methods.head_fits(state.params, pretrained) else 'without'
    print(f'initialised from {config.init_from}, {head} its projection head')
  restored = checkpoint.restore(folder, checkpoint.abstract(state), quarantine=True)
  if restored:
    state = restored[0]
    if distributed.is_main_process():
      checkpoint.remove_old(folder, config.keep_checkpoints)
    if progress:
      print(f'resuming {workdir} from step {int(state.step)} of {setup.steps}', flush=True)
  return state, step_fn


def _lock(workdir, cleanup) -> None:
  """Creates the workdir and holds its lock until `cleanup`: refuses a second run in it, and a folder of other files."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    # Buckets have no locks.
    ours = paths.is_remote(workdir) or cleanup.enter_context(
      files.locked(workdir / '.lock', wait=False)
    )
  except OSError as error:
    reason = error.strerror or str(error).rpartition(': ')[2]
    raise ConfigError(f'--workdir={workdir} cannot be written: {reason}') from None
  if not ours:
    raise ConfigError(f'another run is using --workdir={workdir}')
  for name in () if paths.is_remote(workdir) else ('checkpoints', 'metrics'):
    if (workdir / name).is_symlink():
      raise ConfigError(
        f'{workdir / name} is a link, and a run deletes old files in it: put the folder itself there'
      )
  foreign = [name for name in WRITTEN if (workdir / name).exists()]
  if foreign and not run_config.is_run(workdir):
    raise ConfigError(
      f'--workdir={workdir} is not a run, but has {foreign[0]}, which a run would replace: choose another --workdir'
    )


def _absolute(config):
  """The recipe with absolute paths, so that the run can be read from any folder."""
  config = config.copy_and_resolve_references()
  for part, name in ((config.data, 'dir'), (config.data, 'table'), (config, 'init_from')):
    part[name] = paths.absolute_list(part[name])
  return config.lock()


def _recipe_to_resume(workdir) -> dict[str, Any] | None:
  """The recipe of the run in `workdir`; None if there is no run with checkpoints."""
  if not checkpoint.exists(workdir / 'checkpoints'):
    return None
  return run_config.read(workdir)


def _check_recipe(old, config, workdir, extend):
  """Refuses to resume a run with another recipe."""
  ignored = run_config.LENGTH if extend else ()
  if not config.data.examples:  # the data is not loaded yet
    ignored = (*ignored, 'data.examples', 'data.range')
  run_config.check_unchanged(old, config, str(workdir), ignored)


def _load(config) -> tuple[Dataset, Dataset | None]:
  """The training images, and the test images if they can be read."""
  try:
    return data.load_splits(config.data)
  except ConfigError as error:
    train = data.load(
      config.data, 'train'
    )  # raises the same error if the training images are the problem
    logging.warning('online kNN evaluation disabled: %s', error)
    return train, None


def _describe_images(config, train) -> dict[str, Any]:
  """What a run records of its training images, plain data."""
  place = config.data.dir or config.data.name or config.data.source
  images = {'fingerprint': f'{train.fingerprint():08x}', 'images': len(train), 'place': place}
  return images | ({'modified': list(train.modified())} if hasattr(train, 'modified') else {})


def _check_images(images, train, workdir):
  """Refuses to continue a run with other images than those it was trained on.

  For files, the times of the last change show the images that were replaced, in addition to the fingerprint, which has
  names, sizes and a sample of contents only.
  """
  old = (checkpoint.newest_metadata(workdir / 'checkpoints') or {}).get('images')
  if old and old['fingerprint'] != images['fingerprint']:
    raise ConfigError(
      f'{workdir} was trained on other images: {old["images"]:,} in {old["place"]} (fingerprint '
      f'{old["fingerprint"]}), now {images["images"]:,} in {images["place"]} (fingerprint '
      f'{images["fingerprint"]}): restore the images or choose a new --workdir'
    )
  if not old or old.get('modified', images.get('modified')) == images.get('modified'):
    return
  changed = train.newer_than(old['modified'][1])
  if 0 < len(changed) < len(train):
    raise ConfigError(
      f'{len(changed):,} images were changed after the run in {workdir} had started, such as '
      f'{printable(changed[0])}: restore the images or choose a new --workdir'
    )
  logging.warning(
    'the image files have other times than when the run started, as if they had been copied; '
    'names, sizes and a sample of their contents are the same'
  )


def _attempts(workdir, old, config, extend) -> list[dict[str, int]]:
  """The schedules that a run was extended from: step and old length of each."""
  if not old:
    if extend:
      raise ConfigError(f'--extend: {workdir} has no finished run to extend; leave --extend away')
    return []
  attempts = run_config.record(workdir).get('extended', [])
  before, after = ({k: c[k] for k in run_config.LENGTH} for c in (old, config))
  if extend and before != after:
    newest = checkpoint.last_step(workdir / 'checkpoints')
    total = optim.train_steps(ml_collections.ConfigDict(old), config.data.examples)
    if newest < total:
      raise ConfigError(
        f'--extend: {workdir} is not complete (step {newest:,} of {total:,}): finish it first, by the same '
        'command without --extend'
      )
    if optim.train_steps(config, config.data.examples) <= total:
      raise ConfigError(
        f'--extend: {workdir} has {total:,} steps already: set epochs or steps to a larger value'
      )
    attempts = [*attempts, {'from_step': total, **before}]
  return attempts


def _identity(config) -> dict[str, Any]:
  """What must be equal in all processes of a run: the recipe without its local fields, and versions."""
  table = fields.of_recipe(config.method)
  flat = {k: v for k, v in recipes.flatten(config).items() if k not in table or not table[k].local}
  # Tuples become lists, as in the values that other processes send as JSON.
  return json.loads(json.dumps(flat | environment.versions()))


def _write_config(setup, workdir, command):
  about = {'command': command, 'versions': environment.versions(), 'images': setup.images}
  if setup.extended:
    about['extended'] = setup.extended
  run_config.write(workdir, setup.config, about)


def _describe(setup, state, workdir, quiet):
  """Prints a summary of data, recipe and devices; the details go to `setup.txt` in the workdir."""
  config, mesh, train = setup.config, setup.mesh, setup.train
  kinds = ', '.join(sorted({d.device_kind for d in mesh.devices.flat}))
  versions = environment.versions()
  # Other processes may hold parts of the parameters.
  statistics = jax.process_count() == 1
  overview = parameter_overview.get_parameter_overview(state.params, include_stats=statistics)
  lines = [f'{name} {version}' for name, version in versions.items()]
  files.write_text(
    workdir / 'setup.txt',
    '\n'.join([str(config), *lines, f'mesh {dict(mesh.shape)}', overview, '']),
  )
  if quiet:
    return
  network = config.model.encoder or f'ResNet-{config.model.depth}'
  if not config.model.encoder and config.model.width_multiplier != 1:
    network += f' x {config.model.width_multiplier:g}'
  size = sum(x.size for x in jax.tree.leaves(state.params)) / 1e6
  epochs = setup.steps * config.batch_size / len(train)
  for line in [
    *data.summary(config.data, train, setup.held_out),
    f'method: {config.method}, {network}, {size:.2f} million parameters, views of {config.image_size} px',
    f'training: {setup.steps:,} steps of {config.batch_size:,} images ({epochs:.4g} epochs); '
    f'{config.optimizer}, learning rate {optim.peak_rate(config):.3g}, {config.schedule}',
    f'devices: {mesh.size} x {kinds}; jax {versions.get("jax", jax.__version__)}',
    *methods.notes(config, mesh.size),
    f'workdir: {workdir} (recipe, versions, parameters: setup.txt)',
  ]:
    print(line)
  for attempt in setup.extended[-1:]:
    rate = float(optim.schedule(config, len(train))(attempt['from_step']))
    print(
      f'extended at step {attempt["from_step"]:,}: the {config.schedule} schedule now covers all '
      f'{setup.steps:,} steps, so the learning rate continues at {rate:.3g}'
    )
  print('compiling the first step ...', flush=True)


def _announcement(mesh) -> Callable[[Any], None] | None:
  """A function that prints how much memory a step needs, and how much a GPU has; None where this is not known."""
  gpu = mesh.local_devices[0]
  if gpu.platform != 'gpu' or not distributed.is_main_process() or not gpu.memory_stats():
    return None
  return lambda memory: print(gpus.announce(gpu, memory), flush=True)


def _warn(config, train):
  """Logs the problems of a recipe that are known before the first step."""
  for sentence in diagnostics.findings(config, []).values():
    logging.warning('%s', sentence)
  if config.data.num_classes and not train.labelled and not config.data.labels:
    logging.warning('the training images have no labels: ignore probe_acc')


def _queries(train, test) -> Dataset | None:
  """The labelled test images for the online kNN, or None if there are none."""
  if not test or not train.labelled:
    return None
  if not test.labelled:
    logging.warning('online kNN evaluation disabled: the test images have no labels')
    return None
  return test
