"""describe this installation and computer, for a bug report

Examples:
  simclr-jax doctor
  simclr-jax doctor --data=my_photographs

Prints versions, devices, variables that matter, folders and free disk space. Nothing is sent anywhere. The home folder
is written as ~, the name of the user as USER, and values that may be secrets as (hidden). Exit code 1 if JAX cannot
start its devices, or if the images of --data cannot be read.
"""

import argparse
import collections
import contextlib
import functools
import getpass
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile

from simclr_jax.commands import options
from simclr_jax.runtime import environment
from simclr_jax.runtime.text import printable

# An extra of setup.py -> the package that shows that it is installed.
EXTRAS = {
  'cuda': 'jax-cuda13-plugin',
  'cuda12': 'jax-cuda12-plugin',
  'compile-check': 'libtpu',
  'compile-check-gpu': 'jax-cuda12-plugin',
  'dev': 'pytest',
  'docs': 'mkdocs-material',
  'interop': 'timm',
  'onnx': 'onnxruntime',
  'tpu': 'libtpu',
}
VARIABLES = ('JAX_', 'XLA_', 'LIBTPU', 'CUDA_VISIBLE_DEVICES', 'TFDS_DATA_DIR')  # how names start
SECRET = re.compile(r'key|token|secret|passw|credential|auth|://[^/]*@|[?&]sig', re.IGNORECASE)
SECONDS = 120  # until JAX has its devices; it can wait forever for the other machines of a TPU
CGROUPS = pathlib.Path('/sys/fs/cgroup')
NAMED = 10  # data sets that are named

# In a process of its own: wrong XLA_FLAGS end the process, and the memory of a GPU is left to others.
DEVICES = """
import json, os
os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
try:
  import jax
  found = [(str(d), d.device_kind, d.memory_stats() or {}) for d in jax.local_devices()]
except Exception as error:
  found = f'{type(error).__name__}: {error}' if str(error) else 'JAX finds no device of JAX_PLATFORMS'
print(json.dumps(found))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  parser.add_argument('--json', action='store_true', help='print one JSON object')
  parser.add_argument(
    '--data',
    type=options.dataset,
    metavar='FOLDER',
    help='also count the images in this folder, without decoding them',
  )


def run(args: argparse.Namespace) -> int:
  """Prints what it finds; exit code 1 if there are no devices or no images."""
  devices, started = _devices()
  report = {
    'versions': _versions(),
    'machine': _machine(),
    'devices': devices,
    'variables': _variables(),
    'folders': {
      'compiled programs': _compiled_programs(),
      'TFDS data sets': _tfds(),
      'free, working folder': _free(os.curdir),
      'free, temporary folder': _free(None),
    },
  }
  readable = True
  if args.data:
    report['data'], readable = _images(args.data)
  report = {
    section: {printable(name): _anonymous(printable(value)) for name, value in lines.items()}
    for section, lines in report.items()
  }
  print(json.dumps(report, indent=1) if args.json else _text(report))
  return int(not (started and readable))


def _text(report):
  width = max(len(name) for lines in report.values() for name in lines) + 2
  return '\n'.join(
    '\n'.join([section, *(f'  {name:{width}}{value}' for name, value in lines.items())])
    for section, lines in report.items()
  )


def _versions():
  found = environment.versions()
  for name in ('tensorflow', 'tensorflow-datasets'):
    found[name] = _version(name)
  if found['tensorflow'] == 'not installed':
    found['tensorflow'] = _version('tensorflow-cpu')
  extras = [name for name, package in EXTRAS.items() if _version(package) != 'not installed']
  return found | {'extras': ', '.join(extras) or 'none'}


def _version(package):
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return 'not installed'


def _machine():
  model = re.search(r'^model name\s*: (.+)', _read('/proc/cpuinfo'), re.MULTILINE)
  usable = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  lines = {
    'platform': platform.platform(),
    'CPU': model[1] if model else platform.processor() or platform.machine(),
    'cores': f'{usable} of {os.cpu_count()}',
    'memory': _size(memory),
  }
  limit = _memory_limit()
  if limit and limit < memory:
    lines['memory limit (cgroup)'] = _size(limit)
  return lines


def _memory_limit():
  """The lowest limit of the control groups of this process, in bytes; None without one."""
  limits = []
  for line in _read('/proc/self/cgroup').splitlines():
    _, controllers, group = line.split(':', 2)
    if controllers == 'memory':  # version 1
      top, file = CGROUPS / 'memory', 'memory.limit_in_bytes'
    elif not controllers:
      top, file = CGROUPS, 'memory.max'
    else:
      continue
    own = top / group.strip('/')
    texts = [_read(folder / file).strip() for folder in (own, *own.parents)]
    limits += [int(text) for text in texts if text.isdigit()]
  return min(limits, default=None)


def _devices():
  """The devices of JAX, or why there are none; whether there are any."""
  lines = _nvidia()
  try:
    result = subprocess.run(
      [sys.executable, '-P', '-c', DEVICES], capture_output=True, text=True, timeout=SECONDS
    )
  except subprocess.TimeoutExpired:
    return {**lines, 'error': f'JAX did not start its devices in {SECONDS} s'}, False
  if result.returncode:
    return {**lines, 'error': _reason(result)}, False
  found = json.loads(result.stdout.splitlines()[-1])
  if isinstance(found, str):
    return {**lines, 'error': found}, False
  for name, kind, memory in found:
    used, limit = memory.get('bytes_in_use'), memory.get('bytes_limit')
    lines[name] = kind if limit is None else f'{kind}, {_size(used)} of {_size(limit)} in use'
  return lines, True


def _reason(result):
  """Why the process ended: XLA's fatal error, or else the last line that it wrote."""
  lines = [line for line in result.stderr.splitlines() if line.strip()]
  fatal = [line.partition('] ')[2] for line in lines if re.match(r'F\d+ .*\] ', line)]
  text = (fatal + lines[-1:] + ['no message'])[0]
  return f'JAX ended with exit code {result.returncode}: {text}'


def _nvidia():
  """GPUs and the driver, without JAX; empty without NVIDIA's software."""
  query = '--query-gpu=name,driver_version,memory.used,memory.total'
  try:
    result = subprocess.run(
      ['nvidia-smi', query, '--format=csv,noheader'], capture_output=True, text=True, timeout=30
    )
  except (OSError, subprocess.TimeoutExpired):
    return {}
  if result.returncode:  # a driver that does not run
    return {'nvidia-smi': (result.stdout or result.stderr).partition('\n')[0]}
  gpus = [line.split(', ') for line in result.stdout.splitlines()]
  return {
    f'nvidia-smi {i}': f'{gpu[0]}, driver {gpu[1]}, {gpu[2]} of {gpu[3]} in use'
    for i, gpu in enumerate(gpus)
    if len(gpu) == 4
  }


def _variables():
  found = {n: v for n, v in sorted(os.environ.items()) if n.startswith(VARIABLES)}
  return {n: '(hidden)' if SECRET.search(f'{n}={v}') else v for n, v in found.items()}


def _compiled_programs():
  try:
    from simclr_jax.runtime import compile_cache

    folder = compile_cache.folder()
    if folder is None:
      return 'left to JAX, see the variables'
    sizes = [file.stat().st_size for file in folder.glob(f'*{compile_cache.SUFFIX}')]
  except Exception as error:  # a wrong value of a variable, or packages that do not fit together
    return f'not usable: {error}'
  return f'{folder}, {len(sizes):,} programs, {_size(sum(sizes))}'


def _tfds():
  place = os.path.expanduser(os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets')
  if '://' in place:
    return 'not a local folder, not checked'
  if not os.path.isdir(place):
    return f'{place} does not exist'
  folder = pathlib.Path(place)
  prepared = [*folder.glob('*/*/dataset_info.json'), *folder.glob('*/*/*/dataset_info.json')]
  names = sorted({file.relative_to(folder).parts[0] for file in prepared})
  more = f' and {len(names) - NAMED} more' if len(names) > NAMED else ''
  return f'{folder}: {", ".join(names[:NAMED]) or "no data sets"}{more}'


def _free(folder):
  """Free space of the disk of a folder; None: of the temporary folder."""
  try:
    return _size(shutil.disk_usage(folder or tempfile.gettempdir()).free)
  except OSError as error:
    return f'unknown: {error.strerror}'


def _images(place):
  """The images of a folder by suffix, or why it cannot be read; whether all can be read."""
  try:
    from simclr_jax.data import folder

    found = folder.list_images(place)
  except Exception as error:  # a package is missing, or the folder cannot be listed
    return {'error': error}, False
  counts = collections.Counter(pathlib.PurePath(path).suffix.lower() for path in found.paths)
  lines = {'images': ', '.join(f'{s} {n:,}' for s, n in counts.most_common()) or 'none'}
  if found.other_files:
    lines['other files'] = f'{found.other_files.total():,}'
  local = [os.path.join(place, path) for path in found.paths if '://' not in place]
  unreadable = sum(not os.access(path, os.R_OK) for path in local)
  if unreadable:
    lines['not readable'] = f'{unreadable:,} images'
  return lines, bool(counts) and not unreadable


@functools.cache
def _private():
  """Patterns of what tells who the user is -> what is written instead."""
  end = r'(?![\w.-])'
  home = os.path.expanduser('~')
  patterns = {r'://[^/@\s]+@': '://(hidden)@'}
  if len(home) > 1:
    patterns[re.escape(home) + end] = '~'
  with contextlib.suppress(OSError, KeyError):  # a container without names of users
    patterns[f'(?<=/){re.escape(getpass.getuser())}{end}'] = 'USER'
  return patterns


def _anonymous(text):
  for pattern, replacement in _private().items():
    text = re.sub(pattern, replacement, text)
  return text


def _size(n):
  return f'{n / 2**30:,.1f} GiB' if n >= 2**30 else f'{n / 2**20:,.1f} MiB'


def _read(path):
  """The text of a file of the system; '' if there is none."""
  try:
    return pathlib.Path(path).read_text()
  except OSError:
    return ''
