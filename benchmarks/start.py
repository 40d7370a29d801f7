"""Seconds from the start of the process to the first training step, and to kNN's answer, cold and warm.

    python benchmarks/start.py [--config=RECIPE] [--data=DATASET] [--repeats=N] [--config.FIELD=VALUE ...]

Cold: nothing is compiled yet; warm: the programs were kept by the cold start before. Prints medians of N pairs, and which
part of the start was imports, compiling (tracing included, and reading kept programs) and the rest: data, running.
"""

import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

# Run instead of the command itself: adds up what JAX and the imports report.
PROGRAM = """
import sys, time
imports, depth = [0.0], [0]
real = __builtins__.__import__

def timed(*args, **kwargs):
  depth[0] += 1
  start = time.perf_counter()
  try:
    return real(*args, **kwargs)
  finally:
    depth[0] -= 1
    if not depth[0]:
      imports[0] += time.perf_counter() - start

__builtins__.__import__ = timed
import jax
compiling = [0.0]

def add(name, seconds, **_):
  if name.startswith('/jax/core/compile/'):
    compiling[0] += seconds

jax.monitoring.register_event_duration_secs_listener(add)

def report():
  print('parts', imports[0], compiling[0], flush=True)

from simclr_jax import cli
from simclr_jax.evaluate import results
from simclr_jax.recorder import Recorder
for owner, name in ((Recorder, 'first_step_done'), (results, 'save')):
  def wrapped(*args, _call=getattr(owner, name), **kwargs):
    _call(*args, **kwargs)
    report()
  setattr(owner, name, wrapped)
sys.exit(cli.main())
"""


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--config', default='simclr_digits', help='the recipe')
  parser.add_argument('--data', help='images (default: those of the recipe)')
  parser.add_argument('--repeats', type=int, default=3, help='pairs of a cold and a warm start')
  args, fields = parser.parse_known_args()
  found = {(command, start): [] for command in ('pretrain', 'knn') for start in ('cold', 'warm')}
  with tempfile.TemporaryDirectory() as folder:
    for i in range(args.repeats):
      run = pathlib.Path(folder, str(i))
      data = [f'--data={args.data}'] if args.data else []
      train = ['pretrain', f'--config={args.config}', *data, *fields]
      steps = ['--config.steps=1', '--config.warmup_epochs=0', '--config.knn_every_epochs=0']
      for start in ('cold', 'warm'):
        train_one = [*train, *steps, f'--workdir={run / start}']
        found['pretrain', start].append(measure(train_one, run))
      for start in ('cold', 'warm'):
        found['knn', start].append(measure(['knn', f'--workdir={run / "cold"}'], run))
  print('| command | start | seconds | imports | compiling | rest | cold / warm |')
  print('|---|---|---|---|---|---|---|')
  for (command, start), rows in found.items():
    total, imports, compiling = map(statistics.median, zip(*rows))
    ratios = [cold[0] / warm[0] for cold, warm in zip(found[command, 'cold'], rows)]
    print(
      f'| {command} | {start} | {total:.1f} | {imports:.1f} | {compiling:.1f} | {total - imports - compiling:.1f} '
      f'| {statistics.median(ratios):.1f} |'
    )


def measure(command, folder):
  """Seconds until the answer, and those of imports and compiling; the kept programs are in `folder`."""
  environment = {**os.environ, 'XDG_CACHE_HOME': str(folder / 'cache')}
  start = time.monotonic()
  with subprocess.Popen(
    [sys.executable, '-c', PROGRAM, *command], env=environment, text=True, stdout=subprocess.PIPE
  ) as process:
    lines = []
    for line in process.stdout:
      lines.append(line)
      if match := re.match(r'parts (\S+) (\S+)', line):
        seconds = time.monotonic() - start
        process.stdout.read()
        return seconds, float(match[1]), float(match[2])
  sys.exit(''.join(lines))


if __name__ == '__main__':
  main()
