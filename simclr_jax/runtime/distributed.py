"""Multi-process runs: initialisation, collective errors, equality checks and barriers."""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from simclr_jax.errors import ConfigError, ExitCode

T = TypeVar('T')

HEARTBEAT = 60  # seconds without a heartbeat after which a process is considered dead
START = 600  # seconds that processes wait for each other at the start


def initialize(coordinator: str | None, processes: int | None, process: int | None) -> None:
  """Connects the processes of a run, before any device is used.

  On Cloud TPU, Slurm and other clusters that JAX supports, all values are detected. Elsewhere they are the arguments,
  or else the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Without these, the
  run has a single process, and nothing is done.

  Processes other than process 0 do not print to stdout afterwards.

  Args:
    coordinator: HOST:PORT, the address of process 0.
    processes: number of processes.
    process: index of this process, from 0.

  Raises:
    ConfigError: only some of the three values are set, or they are invalid.
  """
  if jax.distributed.is_initialized():
    return
  coordinator = coordinator or os.environ.get('JAX_COORDINATOR_ADDRESS')
  processes = _number('JAX_NUM_PROCESSES') if processes is None else processes
  process = _number('JAX_PROCESS_ID') if process is None else process
  if coordinator is not None and processes is not None and process is not None:
    _check_arguments(coordinator, processes, process)
    print(f'process {process} of {processes}: connecting to coordinator {coordinator}', flush=True)
  else:
    options = {
      '--coordinator': coordinator,
      '--num-processes': processes,
      '--process-id': process,
    }
    missing = [name for name, value in options.items() if value is None]
    if len(missing) < 3:
      raise ConfigError(f'{" and ".join(missing)} must be given, too, for a multi-process run')
    if not _in_cluster():  # the detection of JAX takes seconds
      return
  jax.distributed.initialize(
    coordinator,
    processes,
    process,
    initialization_timeout=int(os.environ.get('SIMCLR_JAX_START_SECONDS', START)),
    heartbeat_timeout_seconds=_heartbeat(),
    shutdown_timeout_seconds=30,
  )
  hosts = gather(socket.gethostname())
  for i, host in enumerate(hosts):
    print(f'process {i} of {len(hosts)} runs on {host}', flush=True)
  if not is_main_process():
    sys.stdout = open(os.devnull, 'w')  # noqa: SIM115  (until the process ends)
    logging.set_verbosity(logging.ERROR)


def _check_arguments(coordinator: str, processes: int, process: int) -> None:
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal():
    raise ConfigError(f'--coordinator={coordinator} is not HOST:PORT')
  if not 0 <= process < processes:
    raise ConfigError(
      f'--process-id={process} is not from 0 to {processes - 1}, --num-processes={processes}'
    )


def _heartbeat():
  return int(os.environ.get('SIMCLR_JAX_HEARTBEAT_SECONDS', HEARTBEAT))


def _number(variable):
  text = os.environ.get(variable)
  if text and not text.isdecimal():
    raise ConfigError(f'the environment variable {variable}={text!r} is not a number')
  return int(text) if text else None


def _in_cluster():
  """Whether the environment is one in which several processes are likely."""
  hosts = os.environ.get('TPU_WORKER_HOSTNAMES', '').split(',')
  tasks = os.environ.get('SLURM_STEP_NUM_TASKS', '1')
  slices = os.environ.get('MEGASCALE_NUM_SLICES', '1')
  return len(hosts) > 1 or slices != '1' or tasks != '1' or _on_a_tpu_pod()


def _on_a_tpu_pod():
  """Whether this machine is a host of a TPU slice with several hosts."""
  if not any(os.path.exists(path) for path in ('/dev/accel0', '/dev/vfio/0')):
    return False
  from jax._src.clusters import cloud_tpu_cluster  # JAX has no public function for this

  try:
    return cloud_tpu_cluster.GceTpuCluster.get_process_count() > 1
  except Exception:  # without a metadata server, this is not a Cloud TPU VM
    return False


def check_accelerator(tpus: Callable[[], tuple[int, Any]] | None = None) -> None:
  """Checks that JAX uses the TPU of a machine that has one.

  Args:
    tpus: `tpus()` -> (number, kind) of the TPU chips of the machine (default: JAX's own detection).

  Raises:
    ConfigError: JAX uses the CPU of a machine with a TPU, and JAX_PLATFORMS=cpu is not set.
  """
  platforms = jax.config.jax_platforms or ''  # type: ignore[attr-defined]  # JAX defines it at run time
  if jax.default_backend() != 'cpu' or platforms.startswith('cpu'):
    return
  from jax._src import hardware_utils  # JAX has no public function for this

  count = (tpus or hardware_utils.num_available_tpu_chips_and_device_id)()[0]
  if count:
    raise ConfigError(
      f"this machine has {count} TPU chips, but JAX sees only the CPU: pip install 'jax[tpu]', or set "
      'JAX_PLATFORMS=cpu'
    )


def is_distributed() -> bool:
  """Whether this is a multi-process run."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main_process() -> bool:
  """Whether this is process 0, which writes files and prints."""
  return jax.process_index() == 0


def peer_failure(error: BaseException) -> int:
  """The exit code of a process of a multi-process run after an exception.

  If a collective operation failed, another process has probably died. This function then waits until JAX's
  heartbeats detect the dead process: JAX prints its index on stderr and aborts this process with exit code 134.
  """
  if not isinstance(error, jax.errors.JaxRuntimeError):
    return 1
  print('another process may have died: waiting for its heartbeat', file=sys.stderr, flush=True)
  time.sleep(_heartbeat() + 30)
  return ExitCode.PEER_DIED


def exit(code: int) -> None:
  """Ends this process of a multi-process run without waiting for the other processes.

  The normal exit of Python waits for all processes, which may be waiting for this one. After a preemption, when all
  processes end, this function waits up to 20 s for the others: if process 0 ended first, they would report it as dead.
  """
  sys.stderr.flush()
  if code == ExitCode.PREEMPTED:
    from jax._src import distributed  # JAX has no public barrier with a time limit

    client: Any = distributed.global_state.client
    with contextlib.suppress(Exception):
      client.wait_at_barrier('simclr_jax_exit', 20_000)
  os._exit(code)


def gather(value: Any) -> list[Any]:
  """The values of all processes, by process index.

  Args:
    value: plain data that JSON can represent. All processes must call this function.
  """
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.int32(len(text)))
  padded = np.zeros(lengths.max(), np.uint8)
  padded[: len(text)] = text
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths)]


def run_on_all(work: Callable[[], T]) -> T:
  """Runs a function on all processes; if it fails on one process, all processes raise an error.

  Args:
    work: must not wait for other processes.

  Returns:
    The result of `work()` on this process.

  Raises:
    ConfigError: the error message of the first process that failed. If `work` raises another exception than
      ConfigError, its process raises this exception instead.
  """
  if jax.process_count() == 1:
    return work()
  results, failure, message = [], None, ''
  try:
    results.append(work())
  except Exception as error:
    failure, message = error, f'{error}' or type(error).__name__
  messages = gather(message)
  if failure and not isinstance(failure, ConfigError):
    raise failure
  for process, text in enumerate(messages):
    if text:
      raise ConfigError(f'process {process}: {text}')
  return results[0]


def check_equal(values: dict[str, Any]) -> None:
  """Checks that all processes have equal values.

  Args:
    values: name -> plain data that JSON can represent. All processes must call this function.

  Raises:
    ConfigError: naming each value that differs, and the processes.
  """
  first, *others = gather(values)
  for process, other in enumerate(others, 1):
    differing = [k for k in sorted(first.keys() | other.keys()) if first.get(k) != other.get(k)]
    if differing:
      each = '; '.join(
        f'{k} is {first.get(k)!r} on process 0 and {other.get(k)!r} on process {process}'
        for k in differing
      )
      raise ConfigError(f'configuration mismatch between processes: {each}')


def barrier(name: str) -> None:
  """Waits until all processes have called this function with the same name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
