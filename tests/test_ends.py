"""How commands end: signals, and outputs that go away."""

import json
import os
import pathlib
import pty
import signal
import subprocess
import sys
import time

import pytest
from common import records
from conftest import TINY

from simclr_jax.errors import ExitCode

ENVIRONMENT = {
  **os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1', 'PYTHONUNBUFFERED': '1',
}  # fmt: skip
STEPS = 400  # long enough for a signal; most tests end before


def program(*argv, closed=(), **kwargs) -> subprocess.Popen:
  """Starts `simclr-jax`; `closed`: descriptors that are closed before."""
  close = ''.join(f' {descriptor}>&-' for descriptor in closed)
  command = ['sh', '-c', f'exec "$@"{close}', 'sh', sys.executable, '-m', 'simclr_jax', *argv]
  return subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, **kwargs)


def training(workdir, **fields):
  """The arguments of a small training."""
  values = {**TINY, **fields}
  return [
    'pretrain',
    '--config=simclr_digits',
    f'--workdir={workdir}',
    *(f'--config.{k}={v}' for k, v in values.items()),
  ]


def wait_for_step(process, workdir, step):
  """Waits until a training has logged a step; fails if it ends before."""
  deadline = time.monotonic() + 240
  while not any(r['step'] >= step for r in records(workdir)):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)


def events(workdir):
  """The events in metrics.jsonl."""
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [r['event'] for r in lines if 'event' in r]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The workdir of a finished training whose stdout and stderr were on full disks."""
  workdir = tmp_path_factory.mktemp('ends') / 'run'
  with pathlib.Path('/dev/full').open('w') as full:
    process = program(*training(workdir, steps=4), stdout=full, stderr=full)
    assert process.wait(240) == 0
  return workdir


def test_a_full_disk_behind_the_log(run):
  """Breaks if a training fails because its log cannot be written."""
  assert events(run) == ['start', 'complete']


def test_an_evaluation_is_saved_without_its_table(run):
  """Breaks if a result is lost because its table cannot be printed."""
  with pathlib.Path('/dev/full').open('w') as full:
    argv = ['knn', f'--workdir={run}', '--k=5', '--no-baselines']
    process = program(*argv, stdout=full, stderr=subprocess.PIPE, text=True)
    message = process.communicate(timeout=240)[1]
  assert process.returncode == 0
  assert message == (
    'simclr-jax: stdout cannot be written (No space left on device): its output is lost\n'
  )
  assert json.loads((run / 'evaluation.json').read_text())['knn']['rows']['pretrained']


LOGIN = """
import os, sys
os.login_tty(0)
os.execv(sys.executable, [sys.executable, '-m', 'simclr_jax', *sys.argv[1:]])
"""


def test_a_closed_terminal_saves(tmp_path):
  """Breaks if a training is lost when its terminal is closed: SIGHUP, then errors of every write."""
  workdir, (master, slave) = tmp_path / 'run', pty.openpty()
  command = [sys.executable, '-c', LOGIN, *training(workdir, steps=STEPS)]
  process = subprocess.Popen(command, env=ENVIRONMENT, stdin=slave)
  os.close(slave)
  os.set_blocking(master, False)
  try:
    deadline = time.monotonic() + 240
    while not any(r['step'] >= 2 for r in records(workdir)):
      assert process.poll() is None and time.monotonic() < deadline
      try:
        os.read(master, 1 << 16)  # a terminal that is not read blocks its program
      except BlockingIOError:
        time.sleep(0.02)
    os.close(master)
    assert process.wait(60) == ExitCode.PREEMPTED
  finally:
    process.kill()
  assert events(workdir) == ['start', 'stopped']
  assert list((workdir / 'checkpoints').glob('[0-9]*'))


@pytest.mark.parametrize('closed', [(1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize(
  'argv, code', [(['fields'], 0), (['knn', '--workdir=/nowhere'], 2), (['pretend'], 2)]
)
def test_closed_streams(argv, code, closed, tmp_path):
  """Breaks if a command needs stdout or stderr, or prints an exception on what is left of them."""
  process = program(*argv, closed=closed, stdout=-1, stderr=-1, text=True, cwd=tmp_path)
  stdout, stderr = process.communicate(timeout=60)
  assert process.returncode == code
  assert 'Traceback' not in stderr and 'Exception' not in stderr
  assert (stdout == '') == (1 in closed or code != 0)
  assert not list(tmp_path.iterdir())


DESCRIPTORS = """
import os, sys
from simclr_jax import cli
try:
  cli.main()
except SystemExit:
  pass
print(os.open(os.devnull, os.O_RDONLY), file=open(os.environ['OUT'], 'w'))
"""


def test_closed_descriptors_are_not_given_to_files(tmp_path):
  """Breaks if a file of the program gets the number of stdout, into which libraries print."""
  out = tmp_path / 'number'
  command = ['sh', '-c', 'exec "$@" <&- >&- 2>&-', 'sh', sys.executable, '-c', DESCRIPTORS]
  subprocess.run([*command, '--version'], env={**os.environ, 'OUT': str(out)}, check=True)
  assert int(out.read_text()) >= 3


@pytest.mark.parametrize('stream', ['stdout', 'stderr'])
def test_a_reader_that_goes_away(stream, tmp_path):
  """Breaks if `simclr-jax ... | head -1` ends the command, or prints an exception."""
  read, write = os.pipe()
  other = 'stderr' if stream == 'stdout' else 'stdout'
  argv = ['fields'] if stream == 'stdout' else ['knn', '--workdir=/nowhere']
  process = program(*argv, **{stream: write, other: subprocess.PIPE}, text=True)
  os.close(write)
  os.close(read)
  printed = ''.join(filter(None, process.communicate(timeout=60)))
  assert process.returncode == (0 if stream == 'stdout' else 2) and printed == ''


def test_a_stream_that_is_not_ready(tmp_path):
  """Breaks if output is lost, or an error is raised, because another program made the pipe non-blocking."""
  read, write = os.pipe()
  os.set_blocking(write, False)
  for unbuffered in ('', '1'):
    environment = {**ENVIRONMENT, 'PYTHONUNBUFFERED': unbuffered}
    command = [sys.executable, '-c', LONG_OUTPUT]
    process = subprocess.Popen(command, env=environment, stdout=write, cwd=tmp_path)
    size = 0
    while size < 300_001:
      time.sleep(0.01)
      size += len(os.read(read, 1 << 16))
    assert process.wait(30) == 0 and size == 300_001


LONG_OUTPUT = """
from simclr_jax.runtime import streams
streams.protect()
print('x' * 300_000)
"""


def test_names_that_the_terminal_cannot_show(tmp_path):
  """Breaks if a character that stdout cannot encode ends a command with a traceback."""
  environment = {**os.environ, 'PYTHONIOENCODING': 'ascii'}
  command = [sys.executable, '-m', 'simclr_jax', 'knn', f'--workdir={tmp_path}/b\u00e4r\udcff']
  completed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  assert completed.returncode == 2
  assert r'b\xe4r\xff is not a run directory' in completed.stderr


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_an_evaluation(run, number):
  """Breaks if a signal ends a command that has nothing to save with another exit code, or it goes on."""
  argv = ['probe', f'--workdir={run}', '--epochs=1000', '--no-baselines']
  process = program(*argv, stdout=-1, stderr=-1, text=True)
  for line in process.stdout:
    if line.startswith('linear probe'):
      break
  process.send_signal(number)
  stderr = process.communicate(timeout=60)[1]
  assert process.returncode == ExitCode.PREEMPTED
  assert stderr == f'simclr-jax: stopped by {number.name}\n'


def test_a_signal_while_the_data_is_loaded(tmp_path):
  """Breaks if a signal before the first step waits for it, or leaves more than an empty run."""
  process = program(*training(tmp_path / 'run'), stdout=-1, stderr=-1, text=True)
  for line in process.stdout:
    if line.startswith('digits'):
      break
  process.send_signal(signal.SIGUSR2)
  stderr = process.communicate(timeout=60)[1]
  assert process.returncode == ExitCode.PREEMPTED and 'Traceback' not in stderr
  assert not list(tmp_path.glob('run/checkpoints/*'))
