"""A fake `gcloud` for the tests of launch/tpu.sh.

Checks the arguments against the grammar of the real subcommands (Google Cloud SDK 528: flags of gcloud and of gcloud alpha,
required flags, no empty arguments), stores resources in files, advances their states with every describe, and has for each
worker a home folder in which `ssh --command` runs and into which `scp` copies. The folder $FAKE_GCLOUD contains:
  calls.jsonl    the arguments of every call
  faults         lines of regular expression, exit code, stderr and count, separated by tabs. Exit code `lose` exits with 0 and does
                 nothing, like the real gcloud when it cannot prepare a node; `cut` breaks ssh in the middle of its output
  timelines.json [[state, ...], ...]: the states of the first, second, ... resource that is created; the last state is final
  env.json       {"SLICE.WORKER": {KEY: VALUE}}: environment variables of the workers
  HOST/          the home folders of the workers, NAME/SLICE.WORKER/
  gs/            the buckets
$FAKE_REMOTE_SHELL is the workers' login shell.
"""

import json
import os
import pathlib
import sys

HERE = pathlib.Path(os.environ['FAKE_GCLOUD'])
FINAL_STATES = ('SUSPENDED', 'PREEMPTED', 'TERMINATED', 'FAILED')
COMMON_FLAGS = {'project=', 'format=', 'quiet', 'filter=', 'limit=', 'verbosity='}

SSH = 'zone= worker= internal-ip command= output-directory= dry-run plain force-key-file-overwrite ssh-key-file= ssh-key-expiration= ssh-key-expire-after= strict-host-key-checking= ssh-flag='
SCP = 'zone= worker= internal-ip dry-run plain scp-flag= recurse compress ssh-key-file= strict-host-key-checking= force-key-file-overwrite'
QR = (
  'zone= runtime-version= accelerator-type= topology= type= node-id= node-count= node-prefix= async data-disk= description= guaranteed '
  'internal-ips labels= metadata= metadata-from-file= network= range= reserved scopes= service-account= shielded-secure-boot spot '
  'subnetwork= tags= valid-after-duration= valid-after-time= valid-until-duration= valid-until-time= reservation-host-folder= '
  'reservation-host-organization= reservation-host-project='
)
QR_ALPHA = ' autocheckpoint-enabled best-effort boot-disk= max-run-duration= provisioning-model= workload-type= network-config= reservation='
VM = (
  'zone= accelerator-type= topology= type= version= description= network= subnetwork= internal-ips queue-count= preemptible spot '
  'reserved range= service-account= scopes= labels= metadata= metadata-from-file= tags= data-disk= shielded-secure-boot async'
)
SSH_EXTRA = ' tunnel-through-iap batch-size='
queued, vm = 'compute tpus queued-resources ', 'compute tpus tpu-vm '
# subcommand: (its flags, minimum and maximum of positional arguments, required flags)
GRAMMAR = {
  queued + 'create': (
    QR,
    (1, 1),
    ['zone', 'runtime-version', 'accelerator-type|type', 'node-id|node-count'],
  ),
  queued + 'describe': ('zone=', (1, 1), ['zone']),
  queued + 'delete': ('zone= force async', (1, 1), ['zone']),
  queued + 'list': ('zone=', (0, 0), ['zone']),
  queued + 'ssh': (SSH + SSH_EXTRA + ' node=', (1, 1), ['zone', 'command']),
  queued + 'scp': (SCP + SSH_EXTRA + ' node=', (2, 99), ['zone']),
  vm + 'create': (VM, (1, 1), ['zone']),
  vm + 'describe': ('zone=', (1, 1), ['zone']),
  vm + 'delete': ('zone= async', (1, 1), ['zone']),
  vm + 'list': ('zone=', (0, 0), ['zone']),
  vm + 'ssh': (SSH, (1, 1), ['zone']),
  vm + 'scp': (SCP, (2, 99), ['zone']),
  'compute tpus accelerator-types list': ('zone=', (0, 0), ['zone']),
  'auth list': ('', (0, 0), []),
  'config get-value': ('', (1, 1), []),
  'storage ls': ('recursive', (1, 9), []),
  'storage cp': ('recursive', (2, 9), []),
  'storage rm': ('recursive', (1, 9), []),
  'storage rsync': ('recursive', (2, 2), []),
}
ALPHA = {
  queued + 'create': (QR + QR_ALPHA, *GRAMMAR[queued + 'create'][1:]),
  vm + 'ssh': (SSH + SSH_EXTRA, *GRAMMAR[vm + 'ssh'][1:]),
  vm + 'scp': (SCP + SSH_EXTRA, *GRAMMAR[vm + 'scp'][1:]),
}


class Refused(Exception):
  pass


def parse(argv):
  """The subcommand, its flags and its positional arguments; raises Refused where the real gcloud exits with 2."""
  grammar = GRAMMAR
  args = list(argv)
  if args[:1] == ['alpha']:
    grammar, args = {**GRAMMAR, **ALPHA}, args[1:]
  command = next((c for c in grammar if args[: len(c.split())] == c.split()), None)
  if command is None:
    raise Refused(f'Invalid choice: {args}')
  known, (least, most), required = grammar[command]
  known = set(known.split()) | COMMON_FLAGS
  flags, positional = {}, []
  for arg in args[len(command.split()) :]:
    if not arg:
      raise Refused('empty argument')
    if not arg.startswith('--'):
      positional.append(arg)
      continue
    key, _, value = arg[2:].partition('=')
    takes = key + '=' in known
    if not takes and key not in known:
      raise Refused(f'unrecognized arguments: {arg}')
    if takes and not value or not takes and '=' in arg:
      raise Refused(f'argument --{key}: expected {"one" if takes else "no"} argument')
    flags.setdefault(key, []).append(value or True)
  for choice in required:
    if sum(key in flags for key in choice.split('|')) != 1:
      raise Refused(f'Exactly one of {choice} must be specified')
  if not least <= len(positional) <= most:
    raise Refused(f'unrecognized arguments: {positional}')
  return command, flags, positional


def injected(argv):
  path = HERE / 'faults'
  if not path.exists():
    return None
  import re  # imported here: most calls do not need it, and every test makes dozens of calls

  lines = [line.split('\t') for line in path.read_text().splitlines()]
  for line in lines:
    if int(line[3]) > 0 and re.search(line[0], ' '.join(argv)):
      line[3] = str(int(line[3]) - 1)
      path.write_text('\n'.join('\t'.join(fields) for fields in lines) + '\n')
      return line[1], line[2]
  return None


def fail(code, text):
  sys.stderr.write(text + '\n')
  sys.exit(code)


# --- resources


def path_of(name):
  return HERE / 'resources' / f'{name}.json'


def load(name, kind):
  path = path_of(name)
  resource = json.loads(path.read_text()) if path.exists() else None
  if resource is None or resource['kind'] != kind:
    fail(1, f"ERROR: (gcloud) NOT_FOUND: Resource 'projects/p/locations/z/{name}' was not found.")
  return resource


def save(resource):
  path_of(resource['name']).parent.mkdir(exist_ok=True)
  path_of(resource['name']).write_text(json.dumps(resource))


def create(kind, flags, name):
  if path_of(name).exists():
    fail(1, 'ERROR: (gcloud) ALREADY_EXISTS: Resource already exists')
  count = HERE / 'created'
  nth = int(count.read_text()) if count.exists() else 0
  count.write_text(str(nth + 1))
  timelines = HERE / 'timelines.json'
  ready = (
    ['CREATING', 'READY'] if kind == 'vm' else ['WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE']
  )
  timelines = json.loads(timelines.read_text()) if timelines.exists() else [ready]
  size = int(flags['accelerator-type'][0].rpartition('-')[2])
  slices = int(flags.get('node-count', ['1'])[0])
  nodes = [f'{flags["node-prefix"][0]}-{s}' for s in range(slices)] if slices > 1 else [name]
  timeline = timelines[min(nth, len(timelines) - 1)]
  # `tpu-vm create` waits until the VM is ready; the creation of a queued resource does not wait.
  timeline = ['READY'] if kind == 'vm' and timeline == ready else timeline
  save(
    dict(
      name=name,
      kind=kind,
      type=flags['accelerator-type'][0],
      nodes=nodes,
      workers=max(1, size // 8),
      timeline=timeline,
    )
  )
  for s in range(slices):
    for w in range(max(1, size // 8)):
      home_of(name, s, w).mkdir(parents=True)


def advance(resource):
  """Returns the current state and advances to the next one. In a final state, processes and disks are deleted."""
  state = resource['timeline'][0]
  if len(resource['timeline']) > 1:
    resource['timeline'] = resource['timeline'][1:]
    save(resource)
  if state in FINAL_STATES:
    wipe(resource['name'])
  return state


def home_of(name, s, w):
  return HERE / 'HOST' / name / f'{s}.{w}'


def processes(name):
  for proc in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      if f'HOME={HERE}/HOST/{name}/'.encode() in (proc / 'environ').read_bytes():
        yield int(proc.name)
    except OSError:
      pass


def wipe(name):
  import shutil
  import signal

  for pid in processes(name):
    os.kill(pid, signal.SIGKILL)
  shutil.rmtree(HERE / 'HOST' / name, ignore_errors=True)


# --- workers


def chosen(flag, count):
  return range(count) if flag == 'all' else [int(flag)]


def targets(kind, flags, name):
  resource = load(name, kind)
  if resource['timeline'][0] not in ('ACTIVE', 'READY'):
    fail(1, f'ERROR: (gcloud) {name} is in state {resource["timeline"][0]}')
  nodes = chosen(flags.get('node', ['0'])[0], len(resource['nodes']))
  return [(s, w) for s in nodes for w in chosen(flags.get('worker', ['0'])[0], resource['workers'])]


def ssh(kind, flags, name, cut=False):
  import contextlib
  import signal
  import subprocess

  code = 0
  extra = HERE / 'env.json'
  extra = json.loads(extra.read_text()) if extra.exists() else {}
  for s, w in targets(kind, flags, name):
    home = home_of(name, s, w)
    kept = {
      k: v
      for k, v in os.environ.items()
      if k in ('PATH', 'LANG', 'FAKE_GCLOUD', 'FAKE_PLAN', 'TF_CPP_MIN_LOG_LEVEL')
    }
    env = {**kept, 'HOME': str(home), 'TPU_WORKER_ID': str(w), **extra.get(f'{s}.{w}', {})}
    shell = os.environ.get('FAKE_REMOTE_SHELL', 'bash')
    process = subprocess.Popen(
      [shell, '-c', flags['command'][0]],
      cwd=home,
      env=env,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE if cut else None,
      start_new_session=True,
    )
    if cut:
      out = process.communicate()[0]
      os.write(1, out[: len(out) // 2])
      sys.exit(255)
    code = process.wait() or code
    # The end of the connection kills all processes that did not leave its session.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
  sys.exit(code)


def scp(kind, flags, paths):
  import shutil

  *sources, to = paths
  if ':' in to:
    name, _, path = to.partition(':')
    for s, w in targets(kind, flags, name):
      there = home_of(name, s, w) / path
      if not (there if path.endswith('/') else there.parent).is_dir():
        fail(1, f'scp: {path}: No such file or directory')
      for source in sources:
        shutil.copy(source, there)
    return
  name, _, path = sources[0].partition(':')
  [(s, w)] = targets(kind, flags, name)
  source = home_of(name, s, w) / path  # an absolute path stays absolute
  shutil.copytree(source, pathlib.Path(to) / source.name, dirs_exist_ok=True)


def bucket(url):
  return HERE / 'gs' / url.removeprefix('gs://') if url.startswith('gs://') else pathlib.Path(url)


def storage(action, urls):
  if action == 'ls':
    folder = bucket(urls[0])
    if not folder.is_dir():
      fail(1, 'ERROR: (gcloud.storage.ls) One or more URLs matched no objects.')
    for entry in sorted(folder.iterdir()):
      print(urls[0].rstrip('/') + '/' + entry.name + ('/' if entry.is_dir() else ''))
  elif action == 'rsync':
    import shutil

    shutil.copytree(bucket(urls[0]), bucket(urls[1]), dirs_exist_ok=True)
  elif action == 'cp':
    bucket(urls[1]).parent.mkdir(parents=True, exist_ok=True)
    bucket(urls[1]).write_bytes(
      sys.stdin.buffer.read() if urls[0] == '-' else bucket(urls[0]).read_bytes()
    )
  else:
    bucket(urls[0]).unlink()


def main(argv):
  with open(HERE / 'calls.jsonl', 'a') as file:
    file.write(json.dumps(argv) + '\n')
  try:
    command, flags, positional = parse(argv)
  except Refused as error:
    fail(2, f'ERROR: (gcloud) {error}')
  fault = injected(argv)
  if fault:
    if fault[0] == 'lose':
      return
    if fault[0] == 'cut':
      ssh('vm' if 'tpu-vm' in command else 'queued', flags, positional[0], cut=True)
    fail(int(fault[0]), fault[1])
  kind = 'vm' if 'tpu-vm' in command else 'queued'
  action = command.split()[-1]
  if command == 'auth list':
    print('somebody@example.com')
  elif command == 'config get-value':
    print(
      (HERE / 'config' / positional[0].replace('/', '_')).read_text()
      if (HERE / 'config').exists()
      else '(unset)'
    )
  elif command.startswith('storage'):
    storage(action, positional)
  elif command == 'compute tpus accelerator-types list':
    print('v4-8\nv4-16\nv6e-8')
  elif action == 'create':
    create(kind, flags, positional[0])
  elif action == 'delete':
    load(positional[0], kind)
    wipe(positional[0])
    path_of(positional[0]).unlink()
  elif action == 'list':
    for path in sorted((HERE / 'resources').glob('*.json')):
      resource = json.loads(path.read_text())
      if resource['kind'] == kind:
        print(resource['name'], resource['timeline'][0], resource['type'], sep='\t')
  elif action == 'ssh':
    ssh(kind, flags, positional[0])
  elif action == 'scp':
    scp(kind, flags, positional)
  elif 'networkEndpoints' in flags['format'][0]:  # describe of a node, also of a queued resource
    for path in (HERE / 'resources').glob('*.json'):
      resource = json.loads(path.read_text())
      if positional[0] in resource['nodes']:
        print(resource['workers'])
        return
    fail(1, 'ERROR: (gcloud) NOT_FOUND: no such node')
  else:
    resource = load(positional[0], kind)
    state = advance(resource)
    detail = 'HEALTHY' if kind == 'vm' else 'There is no more capacity' * (state == 'FAILED')
    print(state, resource['type'], ','.join(resource['nodes']), detail, sep='|')


if __name__ == '__main__':
  main(sys.argv[1:])
