"""Eight simulated devices, a compilation cache for all tests, and what test modules share."""

import os
import pathlib
import tempfile

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Compiling takes most of the time; without LLVM's optimisations it takes less than half.
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_backend_optimization_level=0'

import jax
import pytest

import simclr_jax  # noqa: F401  (sets XLA's flags before JAX reads them)
from simclr_jax import cli

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_platforms', 'cpu')
# Programs that several tests share are compiled once, also in the processes that tests start.
_cache = tempfile.TemporaryDirectory(prefix='simclr_jax_test_cache')
os.environ['JAX_COMPILATION_CACHE_DIR'] = _cache.name
jax.config.update('jax_compilation_cache_dir', _cache.name)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)

# The smallest recipe that still has every part: set with `config.load('simclr_digits', TINY)`.
TINY = {
  'model.width_multiplier': '0.125',
  'model.head_dim': '16',
  'batch_size': '32',
  'steps': '20',
  'learning_rate': '0.3',
  'warmup_epochs': '0',
  'knn_every_epochs': '0',
  'log_every_steps': '1',
  'tensorboard': 'false',
}
# The same with everything that a run can write.
SMALL = {**TINY, 'steps': '4', 'knn_every_epochs': '1', 'tensorboard': 'true'}


def fails(capsys, *argv, code=2) -> str:
  """What a command prints on stderr that must fail with this exit code, and without a traceback."""
  try:
    result = cli.main([str(a) for a in argv])
  except SystemExit as stop:  # argparse
    result = stop.code
  error = capsys.readouterr().err
  assert result == code, error
  assert 'Traceback' not in error
  return error


@pytest.fixture
def test_data() -> pathlib.Path:
  """The folder of real data sets that some tests read."""
  folder = os.environ.get('SIMCLR_JAX_TEST_DATA')
  if not folder:
    pytest.skip('SIMCLR_JAX_TEST_DATA names no folder with CIFAR-10 and photographs')
  return pathlib.Path(folder)
