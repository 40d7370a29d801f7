"""Kills a command at random moments until it completes, and compares what it leaves: python kills.py COMMAND FOLDER

An undisturbed run is the reference. Then, in rounds, the same command is started in another folder and killed up to four
times with SIGKILL, with all its processes, and at last runs to its end. An attempt is a forked process, because importing
the program takes longer than such a tiny training.

Kills are of three kinds. At a file operation, such that a file that is written once is hit as often as one that is written a
hundred times; a record of metrics may be cut in the middle. Up to 0.3 s after such an operation, while C++ code writes.
At any time.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import threading
import time
from typing import Any, NamedTuple

import numpy as np

KILLS_PER_ROUND = 4
LONGEST = 900  # seconds of one attempt; a longer one hangs
PART = 8  # images per part of `embed`
STRENGTHS = 15  # every so many of the L2 strengths of `transfer`

NETWORK = {
  'model.depth': 8, 'model.width_multiplier': 0.125, 'model.head_dim': 16, 'model.stem': 'strided', 'image_size': 16,
  'warmup_epochs': 0, 'tensorboard': False,
}  # fmt: skip
TINY = {'steps': 4, 'batch_size': 8, 'checkpoint_every_steps': 2, 'log_every_steps': 1}


def fields(**values: Any) -> list[str]:
  """The arguments that set fields."""
  return [f'--config.{name}={value}' for name, value in values.items()]


def pretrain(data: pathlib.Path) -> list[str]:
  """8 steps, checkpoints after every second one, of which two are kept, the online kNN after 4 and 8."""
  values = {
    **NETWORK, **TINY, 'batch_size': 16, 'steps': 8, 'checkpoint_every_steps': 2, 'keep_checkpoints': 2,
    'knn_every_epochs': 1, 'learning_rate': 0.1, 'data.source': 'arrays', 'data.dir': data,
  }  # fmt: skip
  return ['pretrain', '--config=simclr_digits', '--workdir=run', *fields(**values)]


def finetune(_data: pathlib.Path) -> list[str]:
  """Two runs, and two from scratch."""
  options = ['--labels=2,4', '--baselines', '--scratch-steps=4']
  return ['finetune', '--workdir=run', *options, *fields(**TINY)]


def simclrv2(data: pathlib.Path) -> list[str]:
  """Four trainings, three results and a report."""
  options = ['--labels=2', '--scratch-steps=4', '--student-width=0.0625']
  recipes = [f'--{stage}={data / stage}.py' for stage in ('finetune', 'distill')]
  return ['simclrv2', *options, *recipes, *pretrain(data)[1:]]


def transfer(data: pathlib.Path) -> list[str]:
  """A sweep of logistic regression and a training."""
  options = [f'--to={data / "train.npz"}', '--finetune', '--no-baselines']
  return ['transfer', '--workdir=run', *options, *fields(**TINY)]


def embed(_data: pathlib.Path) -> list[str]:
  """Eight parts and a file."""
  return ['embed', '--workdir=run', '--out=features.npz']


COMMANDS = {f.__name__: f for f in (pretrain, finetune, simclrv2, transfer, embed)}
WITHOUT_RUN = ('pretrain', 'simclrv2')  # the others need one
# What a user might have in these folders.
USERS = (
  'notes.txt',
  'run/notes.txt',
  'run/mine/data.npy',
  'run/.simclr-jax-notes',
  'features.npz.new',
)


# Kills.


class Kill(NamedTuple):
  """Kills the process, if it comes to that, at the `number`-th operation of a kind; torn: in the middle of a record."""

  kind: str
  number: int
  delay: float = 0.0  # seconds after the beginning of the operation; 0: instead of it
  torn: bool = False


class Observer:
  """Sees the file operations of this process in the current folder.

  Args:
    kill: which of them kills the process; None: none.
    log: a file outside the folder, which gets the kinds of all operations.
  """

  WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

  def __init__(self, kill: Kill | None, log: pathlib.Path):
    self._folder, self._kill, self._log = f'{os.getcwd()}/', kill, log.open('w')
    self._count: collections.Counter = collections.Counter()
    sys.addaudithook(self._see)

  def _see(self, event, args):
    if event == 'open':
      path, directory = args[0], -1
      if not isinstance(args[2], int) or not args[2] & self.WRITING:
        return
    elif event in ('os.mkdir', 'os.remove', 'os.rmdir', 'record'):
      path, directory = args[0], args[-1]
    elif event == 'os.rename':
      path, directory = args[1], args[3]
    else:
      return
    if not isinstance(path, (str, pathlib.Path)):
      return
    parent = os.getcwd() if directory == -1 else os.readlink(f'/proc/self/fd/{directory}')
    path = os.path.join(parent, path)
    if path.startswith(self._folder):
      self._operation(f'{event} {kind(path.removeprefix(self._folder))}')

  def _operation(self, name):
    self._count[name] += 1
    self._log.write(f'{name}\n')
    self._log.flush()
    if self._kill and (name, self._count[name]) == self._kill[:2]:
      if self._kill.delay:
        threading.Timer(self._kill.delay, end).start()
      elif not (self._kill.torn and name.startswith('record ')):  # else `cut_records` ends it
        end()


def end() -> None:
  """Kills this process and its children."""
  os.killpg(0, signal.SIGKILL)


def kind(path: str) -> str:
  """A path without numbers and random names, which may differ between runs."""
  return re.sub(r'\d+', 'N', re.sub(r'[0-9a-f]{8,}', 'R', path))


def part_of_run(name: str) -> str:
  """What an operation writes, in three parts, each of which gets as many kills."""
  return next((part for part in ('checkpoints', 'metrics.jsonl') if part in name), 'other files')


def observe_records(kill: Kill | None) -> None:
  """Makes the writing of a record to metrics.jsonl an operation; it is cut in the middle if `kill` says so."""
  from simclr_jax.runtime import logs

  add = logs._Lines.add
  count: collections.Counter = collections.Counter()

  def observed(self, record, now=False):
    path = str(self._path)
    name = f'record {kind(path)}'
    sys.audit('record', path, -1)
    count[name] += 1
    if kill and kill.torn and (name, count[name]) == kill[:2]:
      self._file.write(json.dumps(record)[: len(record)])
      self._file.flush()
      end()
    add(self, record, now)

  logs._Lines.add = observed


# Attempts.


class Attempt(NamedTuple):
  """`code`: the exit code, None if it was killed; `operations`: kind -> number."""

  code: int | None
  seconds: float
  operations: collections.Counter


class Driver:
  """Runs one command again and again, always in `folder`/work, because runs record absolute paths.

  `folder` also gets the data, the logs, and what was left by rounds with differences.
  """

  def __init__(self, command: str, folder: pathlib.Path, seed: int):
    self._folder, self._random = folder, random.Random(f'{command} {seed}')
    self._arguments = COMMANDS[command](folder / 'data')
    self._template, self._work = folder / 'template', folder / 'work'
    self.attempts = 0
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder / 'data')
    for name in USERS:
      path = self._template / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(f'precious: {name}')
    if command not in WITHOUT_RUN:
      self._template.rename(self._work)
      assert self._run(arguments=pretrain(folder / 'data')).code == 0
      self._work.rename(self._template)
      (self._template / 'run' / 'checkpoints' / 'notes.txt').write_text('precious')

  def _run(self, kill=None, limit=LONGEST, arguments=None) -> Attempt:
    """Runs the command; `limit`: it is killed after so many seconds. It must succeed, or be killed."""
    self.attempts += 1
    log, operations = (self._folder / f'{self.attempts}.{s}' for s in ('log', 'operations'))
    start = time.monotonic()
    child = fork(self._work, log)
    if not child:
      observe_records(kill)
      Observer(kill, operations)
      sys.argv = ['simclr-jax', *(arguments or self._arguments)]
      sys.exit(cli.main())
    code = wait(child, limit)
    printed = log.read_text(errors='replace')
    assert code in (0, None) and 'Traceback' not in printed, f'{log}: {code}\n{printed[-3000:]}'
    counts = operations.read_text().splitlines() if operations.exists() else []
    return Attempt(code, time.monotonic() - start, collections.Counter(counts))

  def reference(self) -> dict[str, Any]:
    """Runs the command undisturbed; returns what it leaves, see `remains`."""
    shutil.copytree(self._template, self._work)
    self.undisturbed = self._run()
    assert self.undisturbed.code == 0, 'killed'
    return self._remains()

  def round(self, kills: int) -> tuple[list[str], dict[str, Any]]:
    """Kills the command up to `kills` times, and runs it to its end; returns the kills and what is left."""
    shutil.rmtree(self._work)
    shutil.copytree(self._template, self._work)
    killed = []
    while len(killed) < kills:
      kill, limit = self._draw()
      attempt = self._run(kill, limit)
      if attempt.code == 0:  # it came to its end before
        break
      killed.append(f'{self.attempts}.log: {attempt.seconds:.1f} s {kill or ""}')
    else:
      assert self._run().code == 0, 'killed'
    return killed, self._remains()

  def keep(self, name: str) -> None:
    """Keeps a copy of what the last round left."""
    shutil.copytree(self._work, self._folder / name, symlinks=True)

  def _draw(self) -> tuple[Kill | None, float]:
    draw, counts = self._random, self.undisturbed.operations
    if draw.random() < 0.25:
      return None, draw.uniform(0, self.undisturbed.seconds)
    names = sorted(counts)
    for grouped_by in (part_of_run, os.path.basename):
      group = draw.choice(sorted({grouped_by(name) for name in names}))
      names = [name for name in names if grouped_by(name) == group]
    name = draw.choice(names)
    number = draw.choice((1, draw.randint(1, counts[name])))
    delay = draw.choice((0.0, 0.0, draw.uniform(0, 0.3)))
    return Kill(name, number, delay, draw.random() < 0.5), LONGEST

  def _remains(self) -> dict[str, Any]:
    """`remains` in a forked process, because threads of JAX in this one would prevent further forks."""
    out, log = self._folder / 'remains.json', self._folder / 'remains.log'
    child = fork(self._folder, log)
    if not child:
      out.write_text(json.dumps(remains(self._work, self._template)))
      sys.exit(0)
    assert wait(child, LONGEST) == 0, log.read_text()
    return json.loads(out.read_text())


def fork(folder: pathlib.Path, log: pathlib.Path) -> int:
  """Forks this process; returns the child, 0 in the child, which is in `folder` and in its own group, and prints to `log`."""
  child = os.fork()
  with contextlib.suppress(PermissionError, ProcessLookupError):  # the child was faster
    os.setpgid(child, child)
  if not child:
    with log.open('w') as file:
      os.dup2(file.fileno(), 1)
      os.dup2(file.fileno(), 2)
    os.chdir(folder)
  return child


def wait(child: int, limit: float) -> int | None:
  """The exit code of a process; None if it was killed, by itself or here after `limit` seconds."""
  deadline = time.monotonic() + limit
  done, status = 0, 0
  while not done:
    time.sleep(0.01)
    done, status = os.waitpid(child, os.WNOHANG)
    if not done and time.monotonic() > deadline:
      assert limit < LONGEST, f'hangs: no end after {limit} s'
      os.killpg(child, signal.SIGKILL)
      deadline += 60
  code = os.waitstatus_to_exitcode(status)
  return None if code == -signal.SIGKILL else code


def write_data(folder: pathlib.Path) -> None:
  """Writes images of four classes, and recipes of short trainings."""
  folder.mkdir(exist_ok=True)
  rng = np.random.default_rng(0)
  for split, n in (('train', 64), ('test', 32)):
    labels = np.arange(n) % 4
    images = rng.integers(0, 120, (n, 8, 8, 3)) + 40 * labels[:, None, None, None]
    np.savez(folder / f'{split}.npz', images=images.astype(np.uint8), labels=labels)
  for stage in ('finetune', 'distill'):
    (folder / f'{stage}.py').write_text(
      f'from simclr_jax import config\n\ndef get_config():\n  return config.load("{stage}_small", {TINY})\n'
    )


# What a command leaves.


def remains(folder: pathlib.Path, template: pathlib.Path) -> dict[str, Any]:
  """All that must not depend on kills, as plain data: the files, and of each file what is no time and no path."""
  found: dict[str, Any] = {'files': sorted({kind_of_file(p, folder) for p in folder.rglob('*')})}
  for path in sorted(p for p in folder.rglob('*') if p.is_file() or p.parent.name == 'checkpoints'):
    name = str(path.relative_to(folder))
    if (template / name).is_file():
      found[name] = crc32(path.read_bytes())  # of the user, or of the run that was there
    elif path.name == 'metrics.jsonl':
      found[name] = records(path)
    elif path.parent.name == 'checkpoints' and path.name.isdecimal():
      found[name] = checkpoint_of(path)
    elif path.suffix == '.json' and 'checkpoints' not in path.parts:
      found[name] = json.loads(path.read_text()) | {'versions': None}
    elif path.suffix == '.npz':
      found[name] = crc32(path.read_bytes())
    elif path.suffix == '.html':
      found[name] = path.read_text().rstrip()[-7:]
  return found


def kind_of_file(path: pathlib.Path, folder: pathlib.Path) -> str:
  """The path of a file in `folder`, without the random names that Orbax gives to the parts of a checkpoint."""
  return re.sub(r'/d/[0-9a-f]{32}$', '/d/*', str(path.relative_to(folder)))


def records(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a run without times, and its last event."""
  timed = re.compile('time|seconds_.*|.*_per_second|data_wait')
  every = [json.loads(line) for line in path.read_text().splitlines()]
  plain = [{k: v for k, v in r.items() if not timed.fullmatch(k)} for r in every]
  events = [r for r in plain if 'event' in r]
  return [r for r in plain if 'event' not in r] + events[-1:]


def checkpoint_of(path: pathlib.Path) -> dict[str, Any]:
  """Checksums of the arrays of a checkpoint, and what else it has."""
  from simclr_jax.runtime import checkpoint

  try:
    tree, metadata = checkpoint.load_tree(path)
  except checkpoint.CheckpointError as error:
    return {'error': str(error)}
  plain = {name: metadata[name] for name in ('step', 'config', 'images', 'shapes')}
  return {'arrays': checkpoint.digest(tree), **plain}


def differences(a: Any, b: Any, place: str = '') -> list[str]:
  """Where two values of plain data differ."""
  if isinstance(a, dict) and isinstance(b, dict):
    keys = sorted(a.keys() | b.keys())
    return sum((differences(a.get(k), b.get(k), f'{place}/{k}') for k in keys), [])
  if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
    return sum((differences(x, y, f'{place}[{i}]') for i, (x, y) in enumerate(zip(a, b))), [])
  if a == b:
    return []
  if isinstance(a, list) and isinstance(b, list):
    counts = [collections.Counter(map(json.dumps, values)) for values in (a, b)]
    missing, new = (list((p - q).elements()) for p, q in (counts, counts[::-1]))
    return [f'{place}: missing {missing}, new {new}']
  return [f'{place}: {str(b)[:200]} instead of {str(a)[:200]}']


def main() -> int:
  """Prints each difference and a summary; returns 1 if there are differences."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('command', choices=COMMANDS)
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('--kills', type=int, default=12)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  start = time.monotonic()
  driver = Driver(args.command, args.folder.resolve(), args.seed)
  expected = driver.reference()
  kills, rounds, failures = 0, 0, 0
  while kills < args.kills:
    rounds += 1
    killed, found = driver.round(min(KILLS_PER_ROUND, args.kills - kills))
    kills += len(killed)
    wrong = differences(expected, found)
    if wrong:
      failures += 1
      driver.keep(f'round{rounds}')
    print(f'round {rounds}: {len(killed)} kills', *killed, *wrong, sep='\n  ', flush=True)
  print(
    f'{args.command}: {kills} kills in {rounds} rounds, {failures} rounds with differences, {driver.attempts} attempts, '
    f'{time.monotonic() - start:.0f} s (undisturbed: {driver.undisturbed.seconds:.0f} s)'
  )
  return failures > 0


if __name__ == '__main__':
  from simclr_jax import cli, commands
  from simclr_jax.evaluate import embed as embedding, lbfgs

  for module in commands.NAMES:
    commands.module(module)
  from simclr_jax import downstream, train  # noqa: F401  (before the fork)
  from simclr_jax.data import folder as _folder  # noqa: F401
  from simclr_jax.report import page  # noqa: F401
  from simclr_jax.runtime.checksum import crc32

  embedding.PART = PART
  lbfgs.SWEEP = lbfgs.SWEEP[::STRENGTHS]
  sys.exit(main())
