"""Runs the trainings that the claims of the papers need, and writes docs/claims.md.

    python -m benchmarks.claims --data=TFDS_DIR [--size=full] [--workers=2] [--only=CLAIM,...] [--seeds=3]
    python -m benchmarks.claims --list
    python -m benchmarks.claims --write

TFDS_DIR contains CIFAR-10. First one seed of every training, then the others. Several commands may run at the same time,
each on one core; the same command resumes. The result of each training is a line of benchmarks/claims/results/SIZE.jsonl; a
training with a result is not repeated. Delete its line after a change of the code.
"""

import argparse
import fcntl
import json
import os
import pathlib
import subprocess
import sys
import time

from benchmarks.claims.plan import HERE, claims, jobs, read
from benchmarks.claims.trainings import SIZES


def work(args, selected) -> None:
  """Runs what has no result, until nothing is left that another process does not run."""
  from benchmarks.claims.runner import Runner

  runner = Runner(args.size, args.data, args.runs / args.size)
  runner.folder.mkdir(parents=True, exist_ok=True)
  path = HERE / f'results/{args.size}.jsonl'
  while True:
    results = read(path)
    todo = [(t, s) for t, s in jobs(selected, results, args.seeds) if (t.key, s) not in results]
    ready = [(t, s) for t, s in todo if all((x.key, s) in results for x in t.trainings()[:-1])]
    if not todo:
      return
    for training, seed in ready:
      with open(f'{runner.workdir(training, seed)}.lock', 'w') as lock:
        try:
          fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
          continue
        if (training.key, seed) not in read(path):
          run(runner, training, seed, path, len(todo))
        break
    else:
      time.sleep(5)  # all that is ready runs in other processes


def run(runner, training, seed, path, left) -> None:
  """Runs a training and adds its result to the file."""
  print(f'{left} left: seed {seed}, {training.kind} {training.describe()}', flush=True)
  result = {'key': training.key, 'training': training.describe(), 'seed': seed}
  result |= runner.run(training, seed)
  with path.open('a') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(json.dumps(result) + '\n')
  print(f'  {json.dumps(result["metrics"])} in {result["cpu_seconds"]} s', flush=True)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data', help='the TFDS folder with CIFAR-10')
  parser.add_argument(
    '--size', choices=SIZES, default='small', help='small: one core; full: one GPU'
  )
  parser.add_argument('--only', metavar='CLAIM,...', help='these claims only, see --list')
  parser.add_argument('--seeds', type=int, default=5, help='at most this many seeds per training')
  parser.add_argument(
    '--workers', type=int, default=1, help='number of processes, each on one core'
  )
  parser.add_argument('--runs', type=pathlib.Path, default=pathlib.Path('runs/claims'))
  parser.add_argument(
    '--list', action='store_true', help='list claims, trainings done and CPU time'
  )
  parser.add_argument('--write', action='store_true', help='only write docs/claims.md')
  args = parser.parse_args()
  known = claims()
  names = args.only.split(',') if args.only else list(known)
  if unknown := [name for name in names if name not in known]:
    parser.error(f'no claim {", ".join(unknown)}: the claims are {", ".join(known)}')
  selected = {name: known[name] for name in names}
  path = HERE / f'results/{args.size}.jsonl'
  if args.list:
    results = read(path)
    for name, claim in selected.items():
      wanted = jobs({name: claim}, results, args.seeds)
      done = [results[t.key, s] for t, s in wanted if (t.key, s) in results]
      seconds = sum(r['cpu_seconds'] for r in done)
      print(f'{name:28} {len(done):3} of {len(wanted):3} trainings, {seconds / 60:.0f} min')
    return 0
  if not args.write:
    if not args.data:
      parser.error('--data is required: the TFDS folder with CIFAR-10')
    if args.workers > 1:
      if code := many(args.workers):
        return code
    else:
      if args.size == 'small':
        use_one_core()
      work(args, selected)
  if 'CLAIMS_WORKER' in os.environ:  # the process that started this one writes the page
    return 0
  from benchmarks.claims import page

  page.write(known, read(path), args.size)
  return 0


def use_one_core() -> None:
  """Limits this process to a core, whatever the machine has, so that CPU times are comparable."""
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  if hasattr(os, 'sched_setaffinity'):  # not on macOS
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ.get('CLAIMS_WORKER', 0)) % len(cores)]})


def many(workers: int) -> int:
  """The same command in several processes; returns the exit code."""
  command = [sys.executable, '-m', 'benchmarks.claims', *sys.argv[1:], '--workers=1']
  processes = [
    subprocess.Popen(command, env={**os.environ, 'CLAIMS_WORKER': str(i)}) for i in range(workers)
  ]
  try:
    return max(process.wait() for process in processes)
  except KeyboardInterrupt:  # the processes got it, too, and save
    return max(process.wait() for process in processes)


if __name__ == '__main__':
  try:
    sys.exit(main())
  except KeyboardInterrupt:
    sys.exit('interrupted; the same command resumes')
