"""Multi-process runs: same results as one process; preempted, restarted, with faults. `make test-faults`.

Every process runs the real command. A run of two processes with two devices each takes half a minute.
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


def command(workdir, recipe='simclr_digits', **changes):
  settings = {**SETTINGS, **changes}
  return ['pretrain', f'--config={recipe}', f'--workdir={workdir}',
          *(f'--config.{k}={v}' for k, v in settings.items())]  # fmt: skip


class Job:
  """One run: `processes` processes with `devices` devices each.

  Args:
    arguments: of the command; a list of lists: those of each process.
    program: of the Python interpreter.
    start: the processes to start; all by default.
  """

  def __init__(
    self, folder, arguments, processes, devices, program=('-m', 'simclr_jax'), start=None
  ):
    with socket.socket() as s:
      s.bind(('localhost', 0))
      port = s.getsockname()[1]
    per_process = arguments if isinstance(arguments[0], list) else [arguments] * processes
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
            [sys.executable, *program, *per_process[i]],
            env=env,
            stdout=log,
            stderr=log,
            process_group=0,
          )
        )

  def log(self, i):
    return (self.folder / f'{i}.log').read_text()

  def wait(self, timeout=240):
    """The exit codes. Fails if a process is still running after `timeout` seconds, and kills it."""
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

  def wait_for_line(self, pattern, i=0, timeout=180):
    """Waits until the log of process i matches `pattern`."""
    deadline = time.monotonic() + timeout
    while not re.search(pattern, self.log(i)):
      assert self.processes[i].poll() is None, self.log(i)[-3000:]
      assert time.monotonic() < deadline, self.log(i)[-3000:]
      time.sleep(0.1)

  def wait_for_step(self, workdir, step, timeout=180):
    """Waits until a run has recorded a step; the log has a line every five seconds only."""
    deadline = time.monotonic() + timeout
    while not any(r['step'] >= step for r in records(workdir)):
      assert all(p.poll() is None for p in self.processes), self.log(0)[-3000:]
      assert time.monotonic() < deadline, self.log(0)[-3000:]
      time.sleep(0.01)


def finish(folder, workdir, processes, devices, **changes):
  """Runs to the end of the training; returns the `Job`."""
  job = Job(folder, command(workdir, **changes), processes, devices)
  codes = job.wait()
  assert codes == [0] * processes, job.log(0)[-3000:] + job.log(processes - 1)[-3000:]
  return job


def saved_steps(workdir):
  """The steps of the checkpoints."""
  return sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdecimal())


def checksums(workdir, step=STEPS):
  """CRC-32 of every array in a checkpoint."""
  path = workdir / 'checkpoints' / str(step) / '_CHECKPOINT_METADATA'
  return json.loads(path.read_text())['custom_metadata']['crc32']


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
  """An uninterrupted run of two processes with two devices each."""
  folder = tmp_path_factory.mktemp('two')
  finish(folder / 'logs', folder / 'run', 2, 2)
  return folder / 'run'


@pytest.fixture(scope='module')
def one_process(tmp_path_factory):
  """An uninterrupted run of one process with four devices."""
  folder = tmp_path_factory.mktemp('one')
  finish(folder / 'logs', folder / 'run', 1, 4)
  return folder / 'run'


def assert_same_losses(a, b):
  for x, y in zip(records(a), records(b), strict=True):
    assert x['step'] == y['step']
    np.testing.assert_allclose(x['loss'], y['loss'], rtol=1e-5)
    np.testing.assert_allclose(x['param_norm'], y['param_norm'], rtol=1e-5)


def test_results_do_not_depend_on_the_number_of_processes(one_process, two_processes):
  """Breaks if a process loads the wrong images, or processes train without each other."""
  assert_same_losses(one_process, two_processes)
  assert saved_steps(two_processes) == [4, 8, 12]
  log = (two_processes.parent / 'logs' / '0.log').read_text()
  assert 'process 1 of 2 runs on' in log and 'complete: 12 steps' in log
  other_log = (two_processes.parent / 'logs' / '1.log').read_text()
  assert 'complete' not in other_log  # only process 0 prints


def test_resuming_with_another_number_of_processes(one_process, tmp_path):
  """Breaks if a checkpoint can be restored only by as many processes as saved it: 4x1, 2x2, 1x1
  (processes x devices).
  """
  run = tmp_path / 'run'
  finish(tmp_path / 'a', run, 4, 1)
  for step in (8, 12):
    shutil.rmtree(run / 'checkpoints' / str(step))
  job = finish(tmp_path / 'b', run, 2, 2)
  assert 'from step 4 of' in job.log(0)
  shutil.rmtree(run / 'checkpoints' / '12')
  job = finish(tmp_path / 'c', run, 1, 1)
  assert 'from step 8 of' in job.log(0)
  assert_same_losses(one_process, run)


def test_fsdp_in_two_processes(one_process, tmp_path):
  """Breaks if arrays that are sharded over several hosts are not saved, verified or restored
  completely.
  """
  settings = {'sharding': 'fsdp', 'model.width_multiplier': '1.0', 'steps': '4', 'batch_size': '16',
              'checkpoint_every_steps': '2'}  # fmt: skip
  run = tmp_path / 'run'
  finish(tmp_path / 'a', run, 2, 2, **settings)
  expected = checksums(run, 4)
  shutil.rmtree(run / 'checkpoints' / '4')
  finish(tmp_path / 'b', run, 2, 2, **settings)
  assert checksums(run, 4) == expected  # bit for bit
  shutil.rmtree(run / 'checkpoints' / '4')
  job = finish(tmp_path / 'c', run, 1, 4, **{**settings, 'sharding': 'replicated'})
  assert 'from step 2 of' in job.log(0)


@pytest.mark.parametrize('signal_number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_saves_in_all(signal_number, two_processes, tmp_path):
  """Breaks if the other processes do not stop, save a different step, or the resumed run differs by
  one bit.
  """
  job = Job(tmp_path / 'a', command(tmp_path / 'run'), 2, 2)
  job.wait_for_step(tmp_path / 'run', 5)
  job.processes[1].send_signal(signal_number)
  assert job.wait(60) == [75, 75], job.log(0)[-2000:] + job.log(1)[-2000:]
  saved_step = saved_steps(tmp_path / 'run')[-1]
  assert f'saved step {saved_step} of 12' in job.log(0)
  finish(tmp_path / 'b', tmp_path / 'run', 2, 2)
  assert checksums(tmp_path / 'run') == checksums(two_processes)
  assert [r['batch_hash'] for r in records(tmp_path / 'run')] == [
    r['batch_hash'] for r in records(two_processes)
  ]


def test_sigterm_while_evaluating(tmp_path):
  """Breaks if the online kNN ignores SIGTERM, in one process or in two."""
  for processes, devices in ((1, 2), (2, 1)):
    run = tmp_path / f'run{processes}'
    changes = {'knn_every_epochs': '1', 'knn_images': '0', 'batch_size': '600', 'steps': '4'}
    job = Job(tmp_path / f'log{processes}', command(run, **changes), processes, devices)
    job.wait_for_line(r'step 1/')
    job.processes[-1].send_signal(signal.SIGTERM)
    assert job.wait(120) == [75] * processes, job.log(0)[-2000:]
    assert saved_steps(run) and 'SIGTERM: saved step' in job.log(0)


@pytest.mark.parametrize('signal_number', [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_frozen_process_ends_the_job(signal_number, tmp_path):
  """Breaks if the remaining process waits for ever, or does not print the index of the dead one."""
  job = Job(tmp_path / 'a', command(tmp_path / 'run', steps='2000'), 2, 1)
  job.wait_for_step(tmp_path / 'run', 5)
  start = time.monotonic()
  os.killpg(job.processes[1].pid, signal_number)
  code = job.processes[0].wait(HEARTBEAT + 50)
  seconds = time.monotonic() - start
  os.killpg(job.processes[1].pid, signal.SIGKILL)
  assert code not in (0, 75), job.log(0)[-2000:]
  assert code in (134, -signal.SIGABRT) and seconds < HEARTBEAT + 40
  assert re.search(r'heartbeats\):\s+1\b', job.log(0)), job.log(0)[-3000:]


def test_a_process_that_hangs_ends_all_with_their_stacks(tmp_path):
  """Breaks if the watchdog counts heartbeats of a process whose training step hangs as progress."""
  arguments = command(tmp_path / 'run', watchdog_seconds='8')
  program = [str(FAULTY), '1', '6', 'hang']
  job = Job(tmp_path / 'a', arguments, 2, 1, program)
  assert job.wait(120) == [4, 4], job.log(0)[-2000:] + job.log(1)[-2000:]
  assert 'faulty.py' in job.log(1) and 'in pretrain' in job.log(0)
  assert 'no step finished in 8 s' in job.log(0)


def test_an_exception_in_one_process_ends_all(tmp_path):
  """Breaks if the traceback is lost, or the other process waits 300 seconds for the shutdown."""
  job = Job(tmp_path / 'a', command(tmp_path / 'run'), 2, 1, [str(FAULTY), '1', '6', 'raise'])
  start = time.monotonic()
  codes = job.wait(180)
  assert codes[1] == 1 and codes[0] != 0
  assert 'RuntimeError: injected fault' in job.log(1)
  assert time.monotonic() - start < 150


def test_a_process_that_never_starts(tmp_path):
  """Breaks if the waiting process does not print the number of processes and the address of the
  coordinator.
  """
  job = Job(tmp_path / 'a', command(tmp_path / 'run'), 2, 1, start=[0])
  assert job.wait(90)[0] != 0
  assert 'process 0 of 2: connecting to coordinator localhost:' in job.log(0)


def test_differing_recipes_are_refused(tmp_path):
  """Breaks if processes with different recipes start training, or the error does not name the field
  and its values.
  """
  arguments = [command(tmp_path / 'run'), command(tmp_path / 'run', temperature='0.3')]
  job = Job(tmp_path / 'a', arguments, 2, 1)
  assert job.wait(90) == [2, 2], job.log(0)[-2000:]
  for i in range(2):
    assert 'temperature is 0.2 on process 0 and 0.3 on process 1' in job.log(i)
    assert 'Traceback' not in job.log(i)


def test_a_configuration_error_of_one_process_ends_all(tmp_path):
  """Breaks if the other process waits for one that has exited with a configuration error, or does
  not print the error.
  """
  (tmp_path / 'empty').mkdir()
  without_images = command(
    tmp_path / 'run', **{'data.source': 'folder', 'data.dir': str(tmp_path / 'empty')}
  )
  job = Job(tmp_path / 'a', [command(tmp_path / 'run'), without_images], 2, 1)
  assert job.wait(90) == [2, 2], job.log(0)[-2000:]
  assert 'process 1: ' in job.log(0) and 'Traceback' not in job.log(0) + job.log(1)


def test_other_images_are_refused(tmp_path):
  """Breaks if processes whose images differ in one pixel start training."""
  images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
  arguments = []
  for i in range(2):
    images[5, 0, 0, 0] = i
    folder = tmp_path / f'images{i}'
    folder.mkdir()
    np.savez(folder / 'train.npz', images=images)
    arguments.append(
      command(tmp_path / 'run', **{'data.source': 'arrays', 'data.dir': str(folder)})
    )
  job = Job(tmp_path / 'a', arguments, 2, 1)
  assert job.wait(90) == [2, 2], job.log(0)[-2000:]
  for i in range(2):
    assert 'checksum of the training images is' in job.log(i) and 'Traceback' not in job.log(i)


def test_a_damaged_checkpoint_in_two_processes(two_processes, tmp_path):
  """Breaks if the processes resume from different steps, or both rename the damaged checkpoint."""
  run = tmp_path / 'run'
  shutil.copytree(two_processes, run)
  chunk = max((run / 'checkpoints' / '12').rglob('d/*'), key=lambda p: p.stat().st_size)
  data = bytearray(chunk.read_bytes())
  data[len(data) // 2] ^= 1
  chunk.write_bytes(data)
  job = finish(tmp_path / 'a', run, 2, 2)
  assert 'from step 8 of' in job.log(0)
  assert (run / 'checkpoints' / 'corrupt-12').exists()
  assert checksums(run) == checksums(two_processes)


def test_evaluations_in_two_processes(two_processes, tmp_path):
  """Breaks if an evaluation in two processes has another result than in one, or both processes
  write the result.
  """
  run = tmp_path / 'run'
  shutil.copytree(two_processes, run)
  argv = ['knn', f'--workdir={run}', '--k=5']
  assert Job(tmp_path / 'a', argv, 2, 1).wait() == [0, 0]
  distributed = json.loads((run / 'evaluation.json').read_text())['knn']['rows']
  assert Job(tmp_path / 'b', argv, 1, 1).wait() == [0]
  single = json.loads((run / 'evaluation.json').read_text())['knn']['rows']
  assert distributed['pretrained'][0][0] == pytest.approx(single['pretrained'][0][0], abs=0.2)


# One process.


def run_one_process(folder, workdir, limit=None, **changes):
  """Runs the command in one process; returns (exit code, output). `limit`: the largest file, in
  bytes.
  """

  def limit_file_size():
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2'}
  env.pop('JAX_COMPILATION_CACHE_DIR', None)
  env['JAX_ENABLE_COMPILATION_CACHE'] = 'false'  # nor the user's
  completed = subprocess.run(
    [sys.executable, '-m', 'simclr_jax', *command(workdir, **changes)],
    env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240,
    preexec_fn=limit_file_size if limit else None,
  )  # fmt: skip
  return completed.returncode, completed.stdout


def test_a_full_disk_is_an_error_and_older_checkpoints_stay(tmp_path):
  """Breaks if a run that cannot save exits with 0, or damages an older checkpoint."""
  run = tmp_path / 'run'
  job = Job(tmp_path / 'a', command(run), 1, 2)
  job.wait_for_step(run, 6)
  job.processes[0].send_signal(signal.SIGTERM)
  assert job.wait(60) == [75]
  steps = saved_steps(run)
  code, output = run_one_process(tmp_path, run, limit=100_000)
  assert code == 1, output[-2000:]
  assert 'was not written' in output and 'Traceback' not in output
  assert saved_steps(run) == steps
  code, output = run_one_process(tmp_path, run)
  assert code == 0 and f'from step {steps[-1]} of' in output


def test_killed_while_saving(one_process, tmp_path):
  """Breaks if an incomplete checkpoint is restored, or is never removed."""
  run = tmp_path / 'run'
  job = Job(tmp_path / 'a', command(run, checkpoint_every_steps='1'), 1, 4)
  deadline = time.monotonic() + 120
  while not any((run / 'checkpoints').glob('*-tmp*')):
    assert time.monotonic() < deadline and job.processes[0].poll() is None, job.log(0)
  job.processes[0].send_signal(signal.SIGKILL)
  job.wait()
  finish(tmp_path / 'b', run, 1, 4, checkpoint_every_steps='1')
  assert checksums(run) == checksums(one_process)
  assert not any((run / 'checkpoints').glob('*-tmp*'))


def test_sigterm_twice(tmp_path):
  """Breaks if a second SIGTERM interrupts the save that the first one started."""
  run = tmp_path / 'run'
  job = Job(tmp_path / 'a', command(run), 1, 2)
  job.wait_for_step(run, 5)
  for _ in range(2):
    job.processes[0].send_signal(signal.SIGTERM)
    time.sleep(0.05)
  assert job.wait(60) == [75]
  assert 'Traceback' not in job.log(0) and saved_steps(run)


def test_metrics_that_cannot_be_written(tmp_path):
  """Breaks if a run replaces a file of the user where its metrics belong, or ends with a traceback."""
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'metrics').write_text('a file instead of a folder')
  code, output = run_one_process(tmp_path, tmp_path / 'run', tensorboard='true')
  assert code == 2 and 'metrics, which a run would replace' in output, output[-2000:]
  assert (tmp_path / 'run' / 'metrics').read_text() == 'a file instead of a folder'


def test_profiler_trace(tmp_path):
  """Breaks if the profiler trace of `profile_steps` is not written."""
  code, output = run_one_process(tmp_path, tmp_path / 'run', profile_steps='5,7')
  assert code == 0 and 'wrote a trace of steps 5 to 7' in output, output[-2000:]
  assert list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb'))
