"""Eight simulated devices, a compilation cache for all tests, and shared helpers and fixtures."""

import contextlib
import os
import pathlib
import tempfile

with contextlib.suppress(ImportError):  # PyTorch crashes if JAX or TensorFlow is loaded before it
  import torch._dynamo  # noqa: F401

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Most of the time is compilation; without LLVM's optimisations it takes less than half as long.
if 'xla_backend_optimization_level' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0'

import jax
import pytest

import simclr_jax  # noqa: F401  (sets XLA's flags before JAX reads them)
from simclr_jax import cli

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_platforms', 'cpu')
# Each program is compiled once for all tests, on all of pytest's workers, and for the subprocesses of tests.
if 'SIMCLR_JAX_TEST_CACHE' not in os.environ:
  _cache = tempfile.TemporaryDirectory(prefix='simclr_jax_test_cache')
  os.environ['SIMCLR_JAX_TEST_CACHE'] = _cache.name
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.environ['SIMCLR_JAX_TEST_CACHE']  # not the user's
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
jax.config.update('jax_compilation_cache_dir', os.environ['SIMCLR_JAX_TEST_CACHE'])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)

# The smallest run that uses every part of the recipe: `config.load('simclr_digits', TINY)`.
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
# The same with all outputs of a run: online kNN and TensorBoard.
SMALL = {**TINY, 'steps': '4', 'knn_every_epochs': '1', 'tensorboard': 'true'}


def fails(capsys, *argv, code=2) -> str:
  """Runs a command that must fail with this exit code and no traceback; returns its stderr."""
  try:
    exit_code = cli.main([str(a) for a in argv])
  except SystemExit as exit_request:  # argparse
    exit_code = exit_request.code
  stderr = capsys.readouterr().err
  assert exit_code == code, stderr
  assert 'Traceback' not in stderr
  return stderr


# Files that take longest start first, so that pytest's workers end together.
LONG = (
  'test_methods',
  'test_plugins',
  'test_stream',
  'test_resume',
  'test_parallelism',
  'test_cli',
)


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture
def test_data() -> pathlib.Path:
  """The folder of real data sets, which some tests need."""
  folder = os.environ.get('SIMCLR_JAX_TEST_DATA')
  if not folder:
    pytest.skip('set SIMCLR_JAX_TEST_DATA to a folder with CIFAR-10 and photographs')
  return pathlib.Path(folder)
