"""`simclr-jax VERB ...`: parses words, calls the function that does the work, turns errors into codes.

Exit codes: 0 done, 1 a failure named on stderr, 2 wrong usage or recipe, 3 the loss is not finite, 4 a step
hung, 75 stopped by SIGTERM after saving, 130 stopped by Ctrl-C (the first one lets `pretrain` save; in several processes
it counts as SIGTERM), 134 another process died.
"""

import logging
import os
import pathlib
import shlex
import sys
import traceback

from absl.logging import get_absl_logger

from simclr_jax import arguments
from simclr_jax.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
  """Runs one verb; `argv` defaults to the process's arguments. Returns the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  # TensorFlow only reads files and writes logs here: it has nothing to announce.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  logging.basicConfig(format='%(levelname)s: %(message)s')
  # Orbax raises what its threads also log, with tracebacks.
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  get_absl_logger().addFilter(lambda record: not (record.exc_info and 'orbax' in record.pathname))
  sys.unraisablehook = _unraisable
  args, overrides = arguments.parse(argv)
  args.command = 'simclr-jax ' + shlex.join(argv)
  try:
    code = _run(args, overrides)
  except KeyboardInterrupt:
    code = _fail('stopped by Ctrl-C', 130)
  from simclr_jax import distributed

  if code and distributed.several():
    distributed.leave(code)
  return code


def _run(args, overrides):
  # After parsing: JAX takes seconds to import, and --help should not.
  import jax

  from simclr_jax import distributed
  from simclr_jax.checkpoint import CheckpointError
  from simclr_jax.stopping import Stopped, Watchdog
  from simclr_jax.train import EXIT_NAN, NotFinite

  try:
    if args.verb not in arguments.ALONE:
      distributed.join(args.coordinator, args.num_processes, args.process_id)
    # What hangs in one of several processes holds all of them; alone, it may just be long.
    with Watchdog(Watchdog.FIRST if distributed.several() else 0):
      return VERBS[args.verb](args, overrides)
  except ConfigError as error:
    return _fail(error, 2)
  except Stopped as stop:
    return stop.args[0]
  except NotFinite as error:
    return _fail(error, EXIT_NAN)
  except (CheckpointError, OSError) as error:
    return _fail(error, 1)
  except Exception as error:
    if isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in str(error):
      return _fail('this does not fit into the memory of the device: lower the batch size', 1)
    if not distributed.several():
      raise
    traceback.print_exc()
    return distributed.left_alone(error)


def _unraisable(error):
  # When Orbax gives up on a damaged checkpoint, its reads that are still under way find their event
  # loop closed, each with a traceback from another thread.
  if str(error.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(error)


def _fail(error, code):
  print(f'simclr-jax: error: {error}', file=sys.stderr)
  return code


def _pretrain(args, overrides):
  from simclr_jax import config, train
  from simclr_jax.data import discover

  if not (args.data or args.config):
    args.parser.error('say --data=WHERE, or --config=RECIPE, or both')
  if not (args.data or args.workdir):
    args.parser.error('say --workdir=RUN')
  workdir = args.workdir or pathlib.Path(
    'runs', pathlib.Path(args.data).expanduser().resolve().name.split('.')[0]
  )
  found = discover.fields(args.data) if args.data else {}
  if args.config:
    recipe = config.load(args.config, {**found, **overrides})
  elif (workdir / 'config.json').exists():
    recipe = config.from_dict(config.read_run(workdir), {**found, **overrides})
  else:
    recipe = _suitable(found, overrides)
  return train.pretrain(recipe, workdir, args.command)


def _suitable(found, overrides):
  """A recipe for the data, printed as the words that would name it."""
  import jax

  from simclr_jax import config, data
  from simclr_jax.data import discover

  images = data.load(config.load('simclr_images', {**found, **_data_only(overrides)}).data, 'train')
  accelerators = 0 if jax.default_backend() == 'cpu' else jax.device_count()
  name, chosen = discover.recipe(images, accelerators)
  values = {**chosen, **{k: v for k, v in found.items() if v}}
  words = [f'--config={name}', *(f'--config.{k}={v}' for k, v in values.items())]
  print(f'{len(images):,} images, typically {discover.typical_side(images)} pixels: taking')
  print(f'  {shlex.join(words)}', flush=True)
  return config.load(name, {**chosen, **found, **overrides})


def _data_only(overrides):
  return {k: v for k, v in overrides.items() if k.startswith('data.')}


def _check_data(args, overrides):
  from simclr_jax import config
  from simclr_jax.data import check, discover

  found = {**discover.fields(args.data), 'data.on_device': 'no', **overrides}
  return check.report(config.load('simclr_images', found).data, args.sheet)


def _run_config(args, overrides):
  """The recipe of --workdir; only where its data lies may be overridden."""
  from simclr_jax import config

  for field in overrides:
    if not field.startswith('data.'):
      raise ConfigError(f"--config.{field}: only data.* can be set here, the rest is the run's")
  return config.from_dict(config.read_run(args.workdir), overrides)


def _probe(args, overrides):
  from simclr_jax.evaluate import run

  recipe = _run_config(args, overrides)
  if args.protocol != 'logistic':
    run.linear_probe(
      args.workdir,
      recipe,
      args.protocol,
      args.epochs,
      args.batch_size,
      args.learning_rate,
      args.cached,
      args.seeds,
      args.baselines,
    )
  else:
    run.label_efficiency(args.workdir, recipe, args.labels, args.draws, args.baselines)
  return 0


def _knn(args, overrides):
  from simclr_jax.evaluate import run

  recipe = _run_config(args, overrides)
  run.nearest_neighbours(args.workdir, recipe, args.k, args.temperature, args.baselines)
  return 0


def _finetune(args, overrides):
  from simclr_jax.evaluate import run

  place = {k: v for k, v in overrides.items() if k == 'data.dir'}
  run.finetune(
    args.workdir,
    run.config_of(args.workdir, place),
    args.config,
    overrides,
    args.labels,
    args.seeds,
    args.name,
    args.baselines,
    args.command,
  )
  return 0


def _distill(args, overrides):
  from simclr_jax.evaluate import run

  run.distill(args.teacher, args.workdir, args.config, overrides, args.command)
  return 0


def _simclrv2(args, overrides):
  from simclr_jax import config
  from simclr_jax.data import discover
  from simclr_jax.evaluate import run

  found = discover.fields(args.data) if args.data else {}
  size = {'model.depth': args.student_depth, 'model.width_multiplier': args.student_width}
  student = {k: str(v) for k, v in size.items() if v}
  for spec in (args.finetune, args.distill):
    config.load(spec)  # a typing error is told now and not in an hour
  run.simclrv2(
    args.workdir,
    config.load(args.config, {**found, **overrides}),
    args.finetune,
    args.distill,
    student,
    args.labels,
    args.seeds,
    args.command,
  )
  return 0


def _transfer(args, overrides):
  from simclr_jax.evaluate import run

  if overrides and not args.finetune:
    args.parser.error('--config.* is for --finetune')
  run.transfer(
    args.workdir,
    run.config_of(args.workdir),
    args.to,
    args.data_dir,
    args.config,
    overrides,
    args.finetune,
    args.baselines,
    args.command,
  )
  return 0


def _embed(args, overrides):
  from simclr_jax import config, data, distributed
  from simclr_jax.data import discover
  from simclr_jax.evaluate import embed
  from simclr_jax.interop import orbax

  embed.check(args.out)
  encoder = orbax.load_encoder(args.workdir)
  if args.data:
    found = {**discover.fields(args.data), **_data_only(overrides)}
    recipe = config.load('simclr_images', found)
  else:
    recipe = _run_config(args, overrides)
  dataset = distributed.together(lambda: data.load(recipe.data, args.split))
  if not len(dataset):
    raise ConfigError(f'--data={args.data} holds no images')
  data.agree({'the images': dataset})
  embed.embed(encoder, dataset, args.out)
  return 0


def _export(args, overrides):
  from simclr_jax.interop import orbax

  _run_config(args, overrides)
  orbax.export(orbax.load_encoder(args.workdir), args.out)
  print(f'wrote {args.out}')
  return 0


def _report(args, overrides):
  from simclr_jax.report import page

  out = args.out or args.workdir / 'report.html'
  page.write(args.workdir, _run_config(args, overrides), out)
  print(f'wrote {out}')
  return 0


def _compile_check(args, overrides):
  import json

  import jax

  from simclr_jax import config
  from simclr_jax.aot import check, hardware, report

  os.environ.update(hardware.ENVIRONMENT)
  jax.config.update('jax_platforms', 'cpu')  # only describes the TPU
  topology = hardware.topology(args.topology, args.slices)
  recipe = config.load(args.config, overrides)
  if args.find_batch:
    found = check.find_batch(
      recipe, topology, lambda text: print(text, file=sys.stderr, flush=True)
    )
    about = {'recipe': args.config, 'topology': args.topology, 'largest_batch': found}
    print(json.dumps(about) if args.json else f'the largest batch that fits: {found:,}')
    return 0 if found else 1
  words = shlex.join([args.config, *(f'--config.{k}={v}' for k, v in overrides.items())])
  result = check.check(recipe, topology, words, args.hlo)
  print(json.dumps(result, indent=1) if args.json else report.report(result))
  if result['problems']:
    return _fail('; '.join(result['problems']), 1)
  return 0


VERBS = {
  'pretrain': _pretrain,
  'check-data': _check_data,
  'probe': _probe,
  'knn': _knn,
  'finetune': _finetune,
  'distill': _distill,
  'simclrv2': _simclrv2,
  'transfer': _transfer,
  'embed': _embed,
  'export': _export,
  'report': _report,
  'compile-check': _compile_check,
}
