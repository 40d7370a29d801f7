"""Several processes that are one run: equal to one process, stopped, restarted, hurt. `make test-faults`.

Every process is the real command. Two processes of two devices each take half a minute.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from common import records
from conftest import TINY

pytestmark = pytest.mark.faults
FAULTY = pathlib.Path(__file__).with_name('faulty.py')
STEPS = 12
SETTINGS = {**TINY, 'steps': str(STEPS), 'checkpoint_every_steps': '4', 'keep_checkpoints': '9',
            'learning_rate': '0.05'}  # fmt: skip
HEARTBEAT = 10


def words(workdir, recipe='simclr_digits', **changes):
  settings = {**SETTINGS, **changes}
  return ['pretrain', f'--config={recipe}', f'--workdir={workdir}',
          *(f'--config.{k}={v}' for k, v in settings.items())]  # fmt: skip


class Job:
  """Processes x devices of one run; `words` of all, or a list of each."""

  def __init__(self, folder, words, processes, devices, program=('-m', 'simclr_jax'), start=None):
    with socket.socket() as s:
      s.bind(('localhost', 0))
      port = s.getsockname()[1]
    each = words if isinstance(words[0], list) else [words] * processes
    self.folder = folder
    folder.mkdir(parents=True, exist_ok=True)
    self.processes = []
    for i in range(processes) if start is None else start:
      env = {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': str(devices),
        'SIMCLR_JAX_HEARTBEAT_SECONDS': str(HEARTBEAT),
        'SIMCLR_JAX_START_SECONDS': '20' if start else '120',
      }
      if processes > 1:
        env |= {
          'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
          'JAX_NUM_PROCESSES': str(processes),
          'JAX_PROCESS_ID': str(i),
        }
      with (folder / f'{i}.log').open('w') as log:
        self.processes.append(
          subprocess.Popen(
            [sys.executable, *program, *each[i]], env=env, stdout=log, stderr=log, process_group=0
          )
        )

  def log(self, i):
    return (self.folder / f'{i}.log').read_text()

  def wait(self, timeout=240):
    """Exit codes, all of them within this time."""
    deadline = time.monotonic() + timeout
    try:
      return [p.wait(max(deadline - time.monotonic(), 0.1)) for p in self.processes]
    except subprocess.TimeoutExpired:
      raise AssertionError(
        'still running:\n' + '\n'.join(self.log(i)[-1500:] for i in range(len(self.processes)))
      ) from None
    finally:
      for p in self.processes:
        if p.poll() is None:
          p.send_signal(signal.SIGKILL)

  def until(self, pattern, i=0, timeout=180):
    """Waits for a line of process i."""
    deadline = time.monotonic() + timeout
    while not re.search(pattern, self.log(i)):
      assert self.processes[i].poll() is None, self.log(i)[-3000:]
      assert time.monotonic() < deadline, self.log(i)[-3000:]
      time.sleep(0.1)


def done(folder, workdir, processes, devices, **changes):
  job = Job(folder, words(workdir, **changes), processes, devices)
  codes = job.wait()
  assert codes == [0] * processes, job.log(0)[-3000:] + job.log(processes - 1)[-3000:]
  return job


def saved(workdir):
  return sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdecimal())


def crc(workdir, step=STEPS):
  path = workdir / 'checkpoints' / str(step) / '_CHECKPOINT_METADATA'
  return json.loads(path.read_text())['custom_metadata']['crc32']


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """An uninterrupted run of 2 x 2."""
  folder = tmp_path_factory.mktemp('two')
  done(folder / 'logs', folder / 'run', 2, 2)
  return folder / 'run'


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  """An uninterrupted run of one process with four devices."""
  folder = tmp_path_factory.mktemp('one')
  done(folder / 'logs', folder / 'run', 1, 4)
  return folder / 'run'


def close(a, b):
  for x, y in zip(records(a), records(b), strict=True):
    assert x['step'] == y['step']
    np.testing.assert_allclose(x['loss'], y['loss'], rtol=1e-5)
    np.testing.assert_allclose(x['param_norm'], y['param_norm'], rtol=1e-5)


def test_processes_do_not_change_the_numbers(one, two):
  """Breaks if a process has other images or trains alone."""
  close(one, two)
  assert saved(two) == [4, 8, 12]
  said = (two.parent / 'logs' / '0.log').read_text()
  assert 'process 1 of 2 runs on' in said and 'complete: 12 steps' in said
  assert 'complete' not in (two.parent / 'logs' / '1.log').read_text()  # one of them reports


def test_another_number_of_processes_goes_on(one, tmp_path):
  """Breaks if a checkpoint can be read by as many processes as wrote it only: 4x1, 2x2, 1x1."""
  run = tmp_path / 'run'
  done(tmp_path / 'a', run, 4, 1)
  for step in (8, 12):
    shutil.rmtree(run / 'checkpoints' / str(step))
  job = done(tmp_path / 'b', run, 2, 2)
  assert 'from step 4 of' in job.log(0)
  shutil.rmtree(run / 'checkpoints' / '12')
  job = done(tmp_path / 'c', run, 1, 1)
  assert 'from step 8 of' in job.log(0)
  close(one, run)


def test_split_parameters_in_two_processes(one, tmp_path):
  """Breaks if arrays whose parts are on several hosts are not saved, checked or restored whole."""
  settings = {'sharding': 'fsdp', 'model.width_multiplier': '1.0', 'steps': '4', 'batch_size': '16',
              'checkpoint_every_steps': '2'}  # fmt: skip
  run = tmp_path / 'run'
  done(tmp_path / 'a', run, 2, 2, **settings)
  whole = crc(run, 4)
  shutil.rmtree(run / 'checkpoints' / '4')
  done(tmp_path / 'b', run, 2, 2, **settings)
  assert crc(run, 4) == whole  # bit for bit
  shutil.rmtree(run / 'checkpoints' / '4')
  job = done(tmp_path / 'c', run, 1, 4, **{**settings, 'sharding': 'replicated'})
  assert 'from step 2 of' in job.log(0)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_saves_in_all(number, two, tmp_path):
  """Breaks if the others do not hear of it, save another step, or the rest differs by a bit."""
  job = Job(tmp_path / 'a', words(tmp_path / 'run'), 2, 2)
  job.until(r'step 5/')
  job.processes[1].send_signal(number)
  assert job.wait(60) == [75, 75], job.log(0)[-2000:] + job.log(1)[-2000:]
  last = saved(tmp_path / 'run')[-1]
  assert f'saved step {last} of 12' in job.log(0)
  done(tmp_path / 'b', tmp_path / 'run', 2, 2)
  assert crc(tmp_path / 'run') == crc(two)
  assert [r['batch_hash'] for r in records(tmp_path / 'run')] == [
    r['batch_hash'] for r in records(two)
  ]


def test_sigterm_while_evaluating(tmp_path):
  """Breaks if the online kNN does not listen, in one process or in two."""
  for processes, devices in ((1, 2), (2, 1)):
    run = tmp_path / f'run{processes}'
    changes = {'knn_every_epochs': '1', 'knn_images': '0', 'batch_size': '600', 'steps': '4'}
    job = Job(tmp_path / f'log{processes}', words(run, **changes), processes, devices)
    job.until(r'step 1/')
    job.processes[-1].send_signal(signal.SIGTERM)
    assert job.wait(120) == [75] * processes, job.log(0)[-2000:]
    assert saved(run) and 'SIGTERM: saved step' in job.log(0)


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_frozen_process_ends_the_job(number, tmp_path):
  """Breaks if the survivor waits for ever, or does not say for whom."""
  job = Job(tmp_path / 'a', words(tmp_path / 'run', steps='2000'), 2, 1)
  job.until(r'step 5/')
  start = time.monotonic()
  os.killpg(job.processes[1].pid, number)
  code = job.processes[0].wait(HEARTBEAT + 50)
  took = time.monotonic() - start
  os.killpg(job.processes[1].pid, signal.SIGKILL)
  assert code not in (0, 75), job.log(0)[-2000:]
  assert code in (134, -signal.SIGABRT) and took < HEARTBEAT + 40
  assert re.search(r'heartbeats\):\s+1\b', job.log(0)), job.log(0)[-3000:]


def test_a_process_that_hangs_ends_all_with_their_stacks(tmp_path):
  """Breaks if heartbeats of a process whose work hangs count as work."""
  run = words(tmp_path / 'run', watchdog_seconds='8')
  program = [str(FAULTY), '1', '6', 'hang']
  job = Job(tmp_path / 'a', run, 2, 1, program)
  assert job.wait(120) == [4, 4], job.log(0)[-2000:] + job.log(1)[-2000:]
  assert 'faulty.py' in job.log(1) and 'in pretrain' in job.log(0)
  assert 'nothing was finished in 8 s' in job.log(0)


def test_an_exception_in_one_process_ends_all(tmp_path):
  """Breaks if the traceback is lost, or the others wait for the 300 seconds of a shutdown."""
  job = Job(tmp_path / 'a', words(tmp_path / 'run'), 2, 1, [str(FAULTY), '1', '6', 'raise'])
  start = time.monotonic()
  codes = job.wait(180)
  assert codes[1] == 1 and codes[0] != 0
  assert 'RuntimeError: out of order' in job.log(1)
  assert time.monotonic() - start < 150


def test_a_process_that_never_comes(tmp_path):
  """Breaks if the one that waits does not say for how many, and where."""
  job = Job(tmp_path / 'a', words(tmp_path / 'run'), 2, 1, start=[0])
  assert job.wait(90)[0] != 0
  assert 'process 0 of 2: meeting at localhost:' in job.log(0)


def test_differing_recipes_are_refused(tmp_path):
  """Breaks if a run begins whose processes want different things, or does not say which."""
  both = [words(tmp_path / 'run'), words(tmp_path / 'run', temperature='0.3')]
  job = Job(tmp_path / 'a', both, 2, 1)
  assert job.wait(90) == [2, 2], job.log(0)[-2000:]
  for i in range(2):
    assert 'temperature is 0.2 on process 0 and 0.3 on process 1' in job.log(i)
    assert 'Traceback' not in job.log(i)


def test_a_mistake_on_one_process_is_told_by_all(tmp_path):
  """Breaks if the others wait for a process that has refused to begin."""
  (tmp_path / 'empty').mkdir()
  wrong = words(tmp_path / 'run', **{'data.source': 'folder', 'data.dir': str(tmp_path / 'empty')})
  job = Job(tmp_path / 'a', [words(tmp_path / 'run'), wrong], 2, 1)
  assert job.wait(90) == [2, 2], job.log(0)[-2000:]
  assert 'process 1: ' in job.log(0) and 'Traceback' not in job.log(0) + job.log(1)


def test_other_images_are_refused(tmp_path):
  """Breaks if a pixel that one host has otherwise goes unnoticed."""
  images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
  each = []
  for i in range(2):
    images[5, 0, 0, 0] = i
    folder = tmp_path / f'images{i}'
    folder.mkdir()
    np.savez(folder / 'train.npz', images=images)
    each.append(words(tmp_path / 'run', **{'data.source': 'arrays', 'data.dir': str(folder)}))
  job = Job(tmp_path / 'a', each, 2, 1)
  assert job.wait(90) == [2, 2], job.log(0)[-2000:]
  for i in range(2):
    assert 'the training images is' in job.log(i) and 'Traceback' not in job.log(i)


def test_a_damaged_checkpoint_in_two_processes(two, tmp_path):
  """Breaks if the processes fall back to different steps, or both move the damaged one."""
  run = tmp_path / 'run'
  shutil.copytree(two, run)
  chunk = max((run / 'checkpoints' / '12').rglob('d/*'), key=lambda p: p.stat().st_size)
  data = bytearray(chunk.read_bytes())
  data[len(data) // 2] ^= 1
  chunk.write_bytes(data)
  job = done(tmp_path / 'a', run, 2, 2)
  assert 'from step 8 of' in job.log(0)
  assert (run / 'checkpoints' / 'corrupt-12').exists()
  assert crc(run) == crc(two)


def test_evaluations_in_two_processes(two, tmp_path):
  """Breaks if an evaluation of several hosts differs from that of one, or both write it."""
  run = tmp_path / 'run'
  shutil.copytree(two, run)
  argv = ['knn', f'--workdir={run}', '--k=5']
  assert Job(tmp_path / 'a', argv, 2, 1).wait() == [0, 0]
  several = json.loads((run / 'evaluation.json').read_text())['knn']['rows']
  assert Job(tmp_path / 'b', argv, 1, 1).wait() == [0]
  alone = json.loads((run / 'evaluation.json').read_text())['knn']['rows']
  assert several['pretrained'][0][0] == pytest.approx(alone['pretrained'][0][0], abs=0.2)


# One process.


def alone(folder, workdir, limit=None, **changes):
  """A run of one process: (exit code, output). `limit`: bytes that a file may have."""

  def before():
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2'}
  env.pop('JAX_COMPILATION_CACHE_DIR', None)
  ended = subprocess.run(
    [sys.executable, '-m', 'simclr_jax', *words(workdir, **changes)],
    env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240,
    preexec_fn=before if limit else None,
  )  # fmt: skip
  return ended.returncode, ended.stdout


def test_a_full_disk_is_an_error_and_older_checkpoints_stay(tmp_path):
  """Breaks if a run whose checkpoints cannot be written exits as if done, or damages the last good one."""
  run = tmp_path / 'run'
  job = Job(tmp_path / 'a', words(run), 1, 2)
  job.until(r'step 6/')
  job.processes[0].send_signal(signal.SIGTERM)
  assert job.wait(60) == [75]
  before = saved(run)
  code, output = alone(tmp_path, run, limit=100_000)
  assert code == 1, output[-2000:]
  assert 'was not written' in output and 'Traceback' not in output
  assert saved(run) == before
  code, output = alone(tmp_path, run)
  assert code == 0 and f'from step {before[-1]} of' in output


def test_killed_while_saving(one, tmp_path):
  """Breaks if half a checkpoint passes for a whole one, or stays for ever."""
  run = tmp_path / 'run'
  job = Job(tmp_path / 'a', words(run, checkpoint_every_steps='1'), 1, 4)
  deadline = time.monotonic() + 120
  while not any((run / 'checkpoints').glob('*-tmp*')):
    assert time.monotonic() < deadline and job.processes[0].poll() is None, job.log(0)
  job.processes[0].send_signal(signal.SIGKILL)
  job.wait()
  done(tmp_path / 'b', run, 1, 4, checkpoint_every_steps='1')
  assert crc(run) == crc(one)
  assert not any((run / 'checkpoints').glob('*-tmp*'))


def test_sigterm_twice(tmp_path):
  """Breaks if the second one interrupts the save of the first."""
  run = tmp_path / 'run'
  job = Job(tmp_path / 'a', words(run), 1, 2)
  job.until(r'step 5/')
  for _ in range(2):
    job.processes[0].send_signal(signal.SIGTERM)
    time.sleep(0.05)
  assert job.wait(60) == [75]
  assert 'Traceback' not in job.log(0) and saved(run)


def test_metrics_that_cannot_be_written(tmp_path):
  """Breaks if a run goes on without its records, or ends with a traceback."""
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'metrics').write_text('in the way')
  code, output = alone(tmp_path, tmp_path / 'run', tensorboard='true')
  assert code == 1 and 'Traceback' not in output, output[-2000:]


def test_a_trace(tmp_path):
  """Breaks if no trace of the steps is written."""
  code, output = alone(tmp_path, tmp_path / 'run', profile_steps='5,7')
  assert code == 0 and 'wrote a trace of steps 5 to 7' in output, output[-2000:]
  assert list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb'))
