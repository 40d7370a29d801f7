"""`simclr-jax COMMAND ...`: parses the arguments, runs the command, converts exceptions to exit codes."""

import argparse
import difflib
import logging
import os
import shlex
import sys
import traceback

from simclr_jax import __version__, commands, fields
from simclr_jax.errors import ConfigError, ExitCode, NotFinite, Stopped
from simclr_jax.runtime import signals, streams
from simclr_jax.runtime.text import printable
from simclr_jax.validation import did_you_mean

DESCRIPTION = """Contrastive pretraining of image encoders in JAX: SimCLR, MoCo.

Rerun a command to resume it: `pretrain` on the same --workdir continues from the latest checkpoint.
"""


def main(argv: list[str] | None = None) -> int:
  """Runs a command and returns the exit code (`errors.ExitCode`).

  Args:
    argv: arguments; None: those of the process, whose stdout and stderr may go away while the command runs.
  """
  if argv is None:
    streams.protect()
    argv = sys.argv[1:]
  args = parse(argv)
  _quiet_libraries()
  try:
    code = _run(args)
  except KeyboardInterrupt:
    code = _fail('stopped by Ctrl-C', ExitCode.INTERRUPTED)
  if code and 'jax' in sys.modules:
    from simclr_jax.runtime import distributed

    if distributed.is_distributed():
      distributed.exit(code)
  return int(code)


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses a command line.

  Returns:
    The arguments of the command, and `name_of_command`; `module`, its module; `parser`, its parser; `overrides`, the
    fields set by --config.FIELD=VALUE; `command`, the command line.

  Raises:
    SystemExit: with exit code 2, after an error message on stderr.
  """
  epilog = '\n'.join(['exit codes:', *(f'  {int(c):<5}{c.meaning}' for c in sorted(ExitCode))])
  parser = _parser('simclr-jax', DESCRIPTION, epilog)
  parser.add_argument('--version', action='version', version=f'simclr_jax {__version__}')
  subparsers = parser.add_subparsers(metavar='COMMAND', required=True, parser_class=_subparser)
  for name in commands.NAMES:
    module = commands.module(name)
    summary, _, details = (module.__doc__ or '').partition('\n\n')
    details += getattr(module, 'DETAILS', '')
    text = f'{summary[0].upper()}{summary[1:]}.\n\n{details}'
    command = subparsers.add_parser(name, help=summary, description=text)
    command.set_defaults(name_of_command=name, parser=command, module=module)
    command.set_defaults(coordinator=None, num_processes=None, process_id=None)
    module.add_arguments(command)
    if name not in commands.SINGLE_PROCESS:
      _add_distributed(command)
  if argv and not argv[0].startswith('-') and argv[0] not in commands.NAMES:
    guess = did_you_mean(argv[0], commands.NAMES)
    parser.error(
      f'unknown command {argv[0]!r}{guess}; the commands are {", ".join(commands.NAMES)}'
    )
  args, rest = parser.parse_known_args(argv)
  args.overrides = _overrides(rest, args.parser)
  if args.overrides and args.name_of_command in commands.WITHOUT_FIELDS:
    args.parser.error(f'--config.{next(iter(args.overrides))} has no effect on this command')
  args.command = 'simclr-jax ' + shlex.join(argv)
  return args


class _Formatter(argparse.RawDescriptionHelpFormatter):
  """Shows defaults that are informative."""

  def _get_help_string(self, action):
    if action.default in (None, False, (), '', argparse.SUPPRESS):
      return action.help
    return f'{action.help} (default: {str(action.default).replace("%", "%%")})'


def _parser(name, description, epilog=None):
  return argparse.ArgumentParser(
    name, description=description, epilog=epilog, formatter_class=_Formatter, allow_abbrev=False
  )


def _subparser(prog, description, **_):
  return _parser(prog, description)


def _add_distributed(parser):
  from simclr_jax.commands import options

  group = parser.add_argument_group(
    'distributed (multi-process) options', 'Detected automatically on Cloud TPU and Slurm.'
  )
  group.add_argument(
    '--coordinator', metavar='HOST:PORT', help='address of process 0 (the coordinator)'
  )
  group.add_argument(
    '--num-processes', type=options.positive, metavar='N', help='number of processes'
  )
  group.add_argument('--process-id', type=int, metavar='I', help='index of this process, from 0')


def _overrides(rest, parser):
  """The fields set by --config.FIELD=VALUE or --config.FIELD VALUE; an error for other arguments."""
  overrides = {}
  rest = list(rest)
  while rest:
    argument = rest.pop(0)
    name, equals, value = argument.partition('=')
    if not name.startswith('--config.'):
      parser.error(f'unexpected argument {argument!r}{_suggestion(name, equals + value, parser)}')
    if not equals:
      if not rest:
        parser.error(f'{name} needs a value: {name}=VALUE')
      value = rest.pop(0)
    overrides[name.removeprefix('--config.')] = value
  return overrides


# What users of other programs type -> the field of a recipe.
SYNONYMS = {
  'lr': 'learning_rate', 'base_lr': 'learning_rate', 'bs': 'batch_size', 'batch': 'batch_size', 'wd': 'weight_decay',
  'size': 'image_size', 'img_size': 'image_size', 'resolution': 'image_size', 'arch': 'model.depth',
  'depth': 'model.depth', 'width': 'model.width_multiplier', 'workers': 'data.threads', 'num_workers': 'data.threads',
  'tau': 'temperature', 'precision': 'dtype', 'optim': 'optimizer', 'model': 'model.depth', 'resume': '--workdir',
  'output': '--workdir', 'out': '--workdir', 'output_dir': '--workdir', 'run': '--workdir', 'dir': '--data',
  'dataset': '--data', 'data_dir': '--data', 'data_path': '--data', 'recipe': '--config', 'cfg': '--config',
}  # fmt: skip


def _suggestion(name, value, parser):
  """The option or the field that was probably meant: ', did you mean ...?', or ''."""
  options = [o for action in parser._actions for o in action.option_strings if o.startswith('--')]
  if not name.startswith('-'):
    return next(
      (f', did you mean {o}={name}?' for o in ('--data', '--workdir') if o in options), ''
    )
  takes_fields = parser.get_default('name_of_command') in commands.WITH_FIELDS
  names = [*fields.of_recipe('moco'), *fields.of_recipe('simclr')]
  names = [n for n in names if takes_fields or n.startswith('data.')]
  known = {n: f'--config.{n}' for n in names}
  known |= {n.rpartition('.')[2]: f'--config.{n}' for n in reversed(names)}
  known |= {o.lstrip('-').replace('-', '_'): o for o in options}
  bare = name.lstrip('-').replace('-', '_')
  bare = SYNONYMS.get(bare, bare).lstrip('-')
  close = difflib.get_close_matches(bare, known, n=1, cutoff=0.7)
  return f', did you mean {known[close[0]]}{value}?' if close else ''


class LogFormatter(logging.Formatter):
  """Writes messages, which may contain names of files, in visible characters."""

  def formatMessage(self, record: logging.LogRecord) -> str:
    """The message in one line."""
    return printable(super().formatMessage(record))


def _quiet_libraries():
  """Suppresses log messages of libraries that are not useful to users."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  handler = logging.StreamHandler()
  handler.setFormatter(LogFormatter('%(levelname)s: %(message)s'))
  logging.basicConfig(handlers=[handler])
  # Orbax logs exceptions with tracebacks in its threads, although it also raises them.
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  logging.getLogger('absl').addFilter(
    lambda record: not (record.exc_info and 'orbax' in record.pathname)
  )
  sys.unraisablehook = _unraisable


def _unraisable(error):
  # After Orbax has failed on a damaged checkpoint, its pending reads in other threads raise this error.
  if str(error.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(error)


def _run(args) -> int:
  """Runs the command; returns the exit code."""
  try:
    if args.name_of_command in commands.SINGLE_PROCESS:
      with signals.at_once():
        if args.name_of_command in commands.COMPILING:
          _keep_programs()
        return args.module.run(args)
    return _run_watched(args)
  except ConfigError as error:
    return _fail(error, ExitCode.USAGE)
  except Stopped as stop:
    return stop.args[0]
  except NotFinite as error:
    return _fail(error, ExitCode.NOT_FINITE)
  except OSError as error:
    return _fail(error, ExitCode.ERROR)
  except Exception as error:
    return _unexpected(error)


def _run_watched(args):
  """Runs a command that may be one of several processes."""
  check = getattr(args.module, 'check', None)
  with signals.at_once():
    if check:
      check(args)  # before JAX is imported and before other processes are waited for
    from simclr_jax.runtime import distributed
    from simclr_jax.runtime.preemption import Watchdog

  # Signals have their usual meaning here: while C++ code waits for the other processes, no Python code can handle them.
  distributed.initialize(args.coordinator, args.num_processes, args.process_id)
  # Processes that compile together wait for each other, so either all or none may have kept a program.
  if not distributed.is_distributed():
    _keep_programs()
  # A process that hangs blocks the other processes. A single process may take any time.
  with signals.at_once(), Watchdog(Watchdog.FIRST if distributed.is_distributed() else 0):
    return args.module.run(args)


def _keep_programs():
  from simclr_jax.runtime import compile_cache

  compile_cache.enable()


def _unexpected(error) -> int:
  """The exit code of an exception that is not caused by invalid usage; raises unknown ones again."""
  import jax

  from simclr_jax.runtime import distributed
  from simclr_jax.runtime.checkpoint import CheckpointError

  if isinstance(error, CheckpointError):
    return _fail(error, ExitCode.ERROR)
  if isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in str(error):
    return _fail('out of device memory: use a smaller batch_size', ExitCode.ERROR)
  if not distributed.is_distributed():
    raise error
  traceback.print_exc()
  return distributed.peer_failure(error)


def _fail(error, code) -> int:
  print(f'simclr-jax: error: {printable(error)}', file=sys.stderr)
  return code
