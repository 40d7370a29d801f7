"""launch/tpu.sh with a fake gcloud: its gcloud calls, and when it creates, deletes, retries and stops."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parent.parent / 'launch'
FAKE = pathlib.Path(__file__).parent / 'fake_gcloud.py'
ARGS = ['pretrain', '--config=simclr_digits']
LOCATION = ['--zone=us-central2-b', '--project=my-project']
STUB = """#!{python} -SE
# The interpreter of the fake workers: prints versions, or does what plan.json has for this attempt and records its arguments.
import os, sys
if sys.argv[1] == '-':
  override = os.environ['HOME'] + '/jax'
  print('python=3.12.0 jax=' + (open(override).read() if os.path.exists(override) else '0.10.2'), 'jaxlib=0.10.2 libtpu=0.0.30 flax=0.12.8 orbax-checkpoint=0.12.8')
  raise SystemExit
import json, pathlib, signal, time
home = pathlib.Path(os.environ['HOME'])
world = pathlib.Path(os.environ['FAKE_GCLOUD'])
plan = json.loads((world / 'plan.json').read_text()) if (world / 'plan.json').exists() else [{{}}]
count = world / ('attempt.' + home.name)
n = int(count.read_text()) if count.exists() else 0
count.write_text(str(n + 1))
step = plan[min(n, len(plan) - 1)]
step = step.get(home.name, step)
with open(world / 'ran.jsonl', 'a') as file:
  file.write(json.dumps([home.name, sys.argv[1:], dict(os.environ)]) + chr(10))
for line in range(step.get('lines', 1)):
  print('line', line, 'of attempt', n, flush=True)
if 'step' in step:
  workdir = next(arg.split('=', 1)[1] for arg in sys.argv if arg.startswith('--workdir='))
  if workdir.startswith('gs://'):
    workdir = world / 'gs' / workdir[5:]
  (pathlib.Path(workdir) / 'checkpoints' / str(step['step'])).mkdir(parents=True, exist_ok=True)
if step.get('hang'):
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
  if step['hang'] == 'ignore SIGTERM':
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
  print('hanging', flush=True)
  time.sleep(60)
sys.exit(step.get('code', 0))
"""


def executable(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)
  return path


class Cloud:
  """A fake Google Cloud and the laptop of its user, in one folder."""

  def __init__(self, folder, checkout):
    self.folder, self.checkout = folder, checkout
    self.world = folder / 'world'
    self.world.mkdir()
    self.bin = folder / 'bin'
    # Imported, not run as a script, so that Python caches its bytecode.
    code = f'import sys; sys.path.insert(0, {str(FAKE.parent)!r}); import fake_gcloud; fake_gcloud.main(sys.argv[1:])'
    executable(
      self.bin / 'gcloud', f'#!/bin/sh\nexec {sys.executable} -SE -c {shlex.quote(code)} "$@"\n'
    )
    self.python = executable(folder / 'stub' / 'python', STUB.format(python=sys.executable))
    kept = {k: v for k, v in os.environ.items() if k in ('LANG', 'TMPDIR')}
    self.env = {
      **kept,
      'PATH': f'{self.bin}:/usr/bin:/bin',
      'HOME': str(folder / 'home'),
      'SIMCLR_JAX_STATE': str(folder / 'state'),
      'FAKE_GCLOUD': str(self.world),
    }
    self.common = ['--name=ab', *LOCATION, '--poll=0.05', '--backoff=0.01', '--grace=10']
    self.cwd = folder

  def command_line(self, command, *flags, args=None):
    """The arguments of tpu.sh, with the flags that the command needs in these tests."""
    argv = [command, *self.common]
    if command in ('up', 'create'):
      argv += ['--yes', '--type=v4-8']
    if command == 'delete':
      argv += ['--yes']
    if command in ('up', 'run'):
      argv += ['--workdir=gs://bucket/run']
      args = ARGS if args is None else args
    if command in ('up', 'setup'):
      argv += [f'--python={self.python}']
    return [*argv, *flags, *(['--', *args] if args is not None else [])]

  def start(self, argv, **kwargs):
    return subprocess.Popen(
      ['bash', str(self.checkout / 'launch' / 'tpu.sh'), *argv],
      env=self.env, cwd=self.cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      # Without this, tpu.sh ignores Ctrl-C where pytest runs as a background job of a script.
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **kwargs,
    )  # fmt: skip

  def __call__(self, command, *flags, args=None, code=0, argv=None):
    process = self.start(argv or self.command_line(command, *flags, args=args))
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, (process.returncode, out, err, self.commands())
    assert 'unbound variable' not in err and ': line ' not in err, err
    return out + err

  def calls(self):
    path = self.world / 'calls.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def commands(self):
    """The gcloud calls in short: the subcommand; for ssh also the subcommand of worker.sh."""
    short = []
    for call in self.calls():
      if call[0] in ('auth', 'config'):
        continue
      name = next(
        (
          arg
          for arg in call
          if arg in ('create', 'describe', 'delete', 'ssh', 'scp', 'list', 'ls', 'rsync')
        ),
        call[0],
      )
      if name == 'ssh':
        command = next(arg for arg in call if arg.startswith('--command='))
        found = re.search(r'worker\.sh (\w+)', command)
        name += ' mkdir' if 'umask' in command else ' ' + (found[1] if found else 'exec')
      short.append(name)
    return short

  def ran(self):
    path = self.world / 'ran.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def write(self, name, value):
    (self.world / name).write_text(value if isinstance(value, str) else json.dumps(value))

  def faults(self, *faults):
    self.write('faults', ''.join('\t'.join(map(str, fault)) + '\n' for fault in faults))

  def have(self, *timeline, kind='queued', type='v4-8', workers=1, slices=1):
    """Creates a resource before the command runs."""
    (self.world / 'resources').mkdir(exist_ok=True)
    nodes = [f'ab-{s}' for s in range(slices)] if slices > 1 else ['ab']
    resource = dict(
      name='ab', kind=kind, type=type, nodes=nodes, workers=workers, timeline=timeline
    )
    self.write('resources/ab.json', resource)
    for s in range(slices):
      for w in range(workers):
        (self.world / 'HOST' / 'ab' / f'{s}.{w}').mkdir(parents=True, exist_ok=True)


@pytest.fixture(scope='session')
def checkout(tmp_path_factory):
  """A git checkout with the launcher in it, in a folder whose name needs quoting."""
  root = tmp_path_factory.mktemp('a checkout') / "it's here"
  shutil.copytree(LAUNCH, root / 'launch')
  (root / 'simclr_jax').mkdir()
  (root / 'simclr_jax' / '__init__.py').write_text('')
  git = ['git', '-C', str(root), '-c', 'user.name=a', '-c', 'user.email=a@b.c']
  subprocess.run([*git[:3], 'init', '-q'], check=True)
  subprocess.run([*git, 'add', '.'], check=True)
  subprocess.run([*git, 'commit', '-qm', 'all'], check=True)
  return root


@pytest.fixture
def cloud(tmp_path, checkout):
  made = Cloud(tmp_path, checkout)
  yield made
  for proc in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      if f'HOME={made.world}/HOST/'.encode() in (proc / 'environ').read_bytes():
        os.kill(int(proc.name), signal.SIGKILL)
    except OSError:
      pass


def test_up_from_nothing_to_done(cloud):
  """All steps, in order; the arguments arrive, the workdir is added, and the exit code is 0 without a retry."""
  out = cloud('up')
  commands = cloud.commands()
  assert commands[:5] == ['describe', 'create', 'describe', 'describe', 'describe']
  assert commands[5:14] == [
    'describe', 'ssh mkdir', 'scp', 'ssh setup', 'scp', 'ssh unpack', 'ssh status', 'scp', 'ssh check',
  ]  # fmt: skip
  assert commands[14] == 'ssh start' and commands.count('create') == 1 and 'delete' not in commands
  [[worker, argv, env]] = cloud.ran()
  assert argv == ['-m', 'simclr_jax', *ARGS, '--workdir=gs://bucket/run']
  assert env['JAX_COORDINATOR_PORT'] == '8476' and env['PYTHONUNBUFFERED'] == '1'
  assert pathlib.Path(env['PYTHONPATH'], 'simclr_jax').is_dir()
  assert '4 chips' in out and 'still exists and is billed' in out and 'delete --name=ab' in out


def test_pod_with_slices_and_spot(cloud):
  """Every worker of every slice runs once; the request is one queued resource with that many nodes."""
  out = cloud('up', '--type=v4-16', '--num-slices=2', '--spot', '--labels=team=vision')
  create = next(call for call in cloud.calls() if 'create' in call)
  assert create == [
    'compute', 'tpus', 'queued-resources', 'create', 'ab', '--zone=us-central2-b', '--project=my-project',
    '--accelerator-type=v4-16', '--labels=simclr-jax=ab,team=vision', '--node-count=2', '--node-prefix=ab',
    '--runtime-version=tpu-ubuntu2204-base', '--async', '--spot', '--quiet',
  ]  # fmt: skip
  assert sorted(worker for worker, _, _ in cloud.ran()) == ['0.0', '0.1', '1.0', '1.1']
  assert '16 chips on 4 hosts' in out


@pytest.mark.parametrize(
  ('flags', 'expected'),
  [
    (['--type=v6e-8'], ['--runtime-version=v2-alpha-tpuv6e']),
    (['--type=v5p-8'], ['--runtime-version=v2-alpha-tpuv5']),
    (['--type=v5e-16'], ['--accelerator-type=v5litepod-16', '--runtime-version=v2-alpha-tpuv5-lite']),
    (['--best-effort'], ['alpha', '--best-effort']),
    (['--spot', '--max-run-duration=2d'], ['alpha', '--spot', '--provisioning-model=spot', '--max-run-duration=2d']),
    (['--flex-start', '--max-run-duration=2d'], ['alpha', '--provisioning-model=flex-start']),
    (['--reserved', '--valid-until=6h'], ['--reserved', '--valid-until-duration=6h']),
    (['--network=n', '--subnet=s', '--iap'], ['--network=n', '--subnetwork=s', '--internal-ips']),
    (['--service-account=a@b.iam', '--disk=projects/p/zones/z/disks/d'], ['--service-account=a@b.iam', '--data-disk=source=projects/p/zones/z/disks/d,mode=read-write']),
    (['--no-queue', '--spot'], ['tpu-vm', '--version=tpu-ubuntu2204-base', '--spot']),
  ],
)  # fmt: skip
def test_create_flags(cloud, flags, expected):
  """Each flag becomes the flag of gcloud; gcloud alpha is used only for the flags that it alone has."""
  cloud('create', *flags)
  create = next(call for call in cloud.calls() if 'create' in call)
  assert set(expected) <= set(create), create
  assert ('alpha' in create) == ('alpha' in expected)


def test_ssh_routes(cloud):
  """How ssh connects: to the internal address, or through IAP, which the stable `tpu-vm ssh` does not have."""
  cloud.have('READY', kind='vm')
  cloud('exec', '--no-queue', '--iap', args=['true'])
  assert (
    cloud.calls()[-1][:4] == ['alpha', 'compute', 'tpus', 'tpu-vm']
    and '--tunnel-through-iap' in cloud.calls()[-1]
  )
  cloud('exec', '--no-queue', '--internal-ip', args=['true'])
  assert cloud.calls()[-1][0] == 'compute' and '--internal-ip' in cloud.calls()[-1]


# What `up` does for each state of the resource: the gcloud calls that change a resource, and the exit code.
STATES = {
  'NONE': (['create'], 0),
  'ACCEPTED': ([], 0),
  'WAITING_FOR_RESOURCES': ([], 0),
  'PROVISIONING': ([], 0),
  'CREATING': ([], 0),
  'ACTIVE': ([], 0),
  'SUSPENDING': (['delete', 'create'], 0),
  'SUSPENDED': (['delete', 'create'], 0),
  'FAILED': (['delete', 'create'], 0),
  'DELETING': (['delete', 'create'], 0),
  'SURPRISE': ([], 1),
}


@pytest.mark.parametrize('command', ['create', 'up', 'delete'])
@pytest.mark.parametrize('state', STATES)
def test_states(cloud, state, command):
  """Idempotent: an active TPU is used, a dead one is replaced, and a TPU in an unknown state is not touched."""
  changes, code = STATES[state]
  if state != 'NONE':
    after = {'SUSPENDING': 'SUSPENDED', 'DELETING': 'SUSPENDED', 'SURPRISE': 'SURPRISE'}.get(
      state, 'ACTIVE'
    )
    cloud.have(state, *([] if state in ('SUSPENDED', 'FAILED') else [after]))
  if command == 'delete':
    changes, code = ['delete'] if state != 'NONE' else [], 0
  flags = ['--python=/nowhere'] if command == 'up' else []  # fails at setup, for speed
  out = cloud(command, *flags, code=1 if flags else code)
  assert [c for c in cloud.commands() if c in ('create', 'delete')] == changes
  assert command != 'up' or ('/nowhere does not exist' in out) == (state != 'SURPRISE')


@pytest.mark.parametrize('state', ['READY', 'PREEMPTED', 'STOPPED'])
def test_states_of_a_vm(cloud, state):
  """The same for a TPU VM without a queue, whose states have other names."""
  cloud.have(state, kind='vm')
  out = cloud('create', '--no-queue', code=1 if state == 'STOPPED' else 0)
  changes = [c for c in cloud.commands() if c in ('create', 'delete')]
  assert changes == (['delete', 'create'] if state == 'PREEMPTED' else [])
  assert state != 'STOPPED' or 'start it' in out


@pytest.mark.parametrize(
  'error',
  [
    'ERROR: (gcloud) PERMISSION_DENIED: Location us-x is not found or access is unauthorized.',
    'ERROR: (gcloud) UNAVAILABLE: network is unreachable',
    'ERROR: (gcloud.auth) There was a problem refreshing your current auth tokens: Reauthentication needed',
  ],
)
@pytest.mark.parametrize('command', ['up', 'create', 'delete'])
def test_unknown_state_creates_nothing(cloud, error, command):
  """Only gcloud's NOT_FOUND means that no TPU exists: a second pod because of a flaky network would be billed."""
  cloud.faults(('describe', 1, error, 99))
  out = cloud(command, code=1)
  assert 'nothing was done' in out and error[-20:] in out
  assert not {'create', 'delete'} & set(cloud.commands())


def test_other_type_is_refused(cloud):
  """A TPU of another type with the same name is neither used nor deleted; the same after a lost race to create."""
  cloud.have('ACTIVE', type='v4-16')
  assert 'is a v4-16, not a v4-8' in cloud('up', code=1)
  cloud.faults(('describe', 1, 'ERROR: NOT_FOUND: no', 1))
  assert 'is a v4-16, not a v4-8' in cloud('up', code=1)
  assert 'delete' not in cloud.commands()


def test_lost_race_with_the_same_type(cloud):
  """ALREADY_EXISTS after NOT_FOUND: someone else created the same TPU, so that TPU is used."""
  cloud.have('ACTIVE')
  cloud.faults(('describe', 1, 'ERROR: NOT_FOUND: no', 1))
  assert 'in the meantime' in cloud('up')


def test_dry_run_matches_the_real_run(cloud):
  """The printed commands, parsed as a shell does, are the calls of the real run without its polling; nothing is changed."""
  path, cloud.env['PATH'] = cloud.env['PATH'], '/usr/bin:/bin'
  gcloud = cloud.bin / 'gcloud'
  gcloud.rename(cloud.bin / 'away')
  secret = cloud.folder / 'a secret.env'
  secret.write_text('WANDB_API_KEY=hunter2\n')
  secret.chmod(0o600)
  argv = cloud.command_line(
    'up',
    '--dry-run',
    f'--env-file={secret}',
    '--type=v4-16',
    '--num-slices=2',
    "--env=A=it's; $(x)",
    args=[*ARGS, '--config.note=a b'],
  )
  before = sorted(cloud.folder.rglob('*'))
  out, err = cloud.start(argv).communicate(timeout=60)
  assert sorted(cloud.folder.rglob('*')) == before and 'hunter2' not in out + err
  printed = [shlex.split(line) for line in out.splitlines() if not line.startswith('#')]
  assert all(line[0] == 'gcloud' for line in printed)
  (cloud.bin / 'away').rename(gcloud)
  cloud.env['PATH'] = path
  cloud('up', argv=[arg for arg in argv if arg != '--dry-run'])

  def without_polling(calls):
    calls = [call for call in calls if call[0] == 'compute']
    end = next(i for i, call in enumerate(calls) if any('worker.sh start' in arg for arg in call))
    calls = calls[: end + 2]  # the start on both slices
    return [call for call, before in zip(calls, [None, *calls]) if call != before]

  assert without_polling([line[1:] for line in printed]) == without_polling(cloud.calls())
  assert 'job.sh' in out and 'export A=' in out


NASTY = [
  "it's", '"double"', '$(touch PWNED)', '`touch PWNED`', '; touch PWNED', 'a\nb', '*', '?', '~', '$HOME', 'ünïcödé 画像', '', ' ', '\\',
  '\\n', "'", "''\\''", '-n', '--', '!!', '&& false', '| cat', '> out', '#x', '{a,b}', '\t', '%s', '$\'x\'', '(', 'end\\',
]  # fmt: skip


@pytest.mark.parametrize('shell', ['bash', 'dash'])
def test_arguments_arrive_byte_for_byte(cloud, shell):
  """With any login shell on the workers, the program gets exactly the given arguments, and nothing in them is executed."""
  if not shutil.which(shell):
    pytest.skip(f'{shell} is not installed: apt-get install {shell}')
  cloud.env['FAKE_REMOTE_SHELL'] = shell
  envs = [f'--env=V{i}={text}' for i, text in enumerate(NASTY)]
  cloud('up', *envs, args=['pretrain', *NASTY])
  [[_, argv, env]] = cloud.ran()
  assert argv == ['-m', 'simclr_jax', 'pretrain', *NASTY, '--workdir=gs://bucket/run']
  assert [env[f'V{i}'] for i in range(len(NASTY))] == NASTY
  out = cloud(
    'exec', args=[sys.executable, '-SE', '-c', 'import sys; print(ascii(sys.argv[1:]))', *NASTY]
  )
  assert ascii(NASTY) in out
  assert not list(cloud.folder.rglob('*PWNED*')) and not list(cloud.folder.rglob('out'))
  # `resume` reads the same arguments from the saved state.
  cloud('resume')
  assert cloud.ran()[-1][1] == argv and cloud.ran()[-1][2]['V0'] == NASTY[0]


def test_broken_ssh_is_retried(cloud):
  """Lost connections (255), and nodes that gcloud skips with exit code 0, are retried and not taken for success."""
  cloud.faults(
    ('ssh .*setup', 255, 'Connection closed', 2),
    ('ssh .*start', 'lose', '', 1),
    ('scp .*job', 255, 'Connection reset', 1),
  )
  out = cloud('up')
  commands = cloud.commands()
  assert (
    commands.count('ssh setup') == 3 and commands.count('ssh start') == 2 and len(cloud.ran()) == 1
  )
  assert '0 of 1 workers answered; no answer from worker 0' in out and 'ssh-add' in out


def test_revoked_permissions_are_not_retried(cloud):
  """PERMISSION_DENIED during setup ends the launcher at once."""
  cloud.faults(('ssh .*setup', 1, 'ERROR: PERMISSION_DENIED: no', 9))
  assert 'PERMISSION_DENIED' in cloud('up', code=1)
  assert cloud.commands().count('ssh setup') == 1


@pytest.mark.parametrize('code', [1, 2, 3, 130])
def test_program_failures_are_not_retried(cloud, code):
  """An invalid recipe, NaN or an exception: no retry, the exit code of the program, the worker and the last 30 lines of its log."""
  cloud.write('plan.json', [{'code': code, 'lines': 40}])
  out = cloud('up', code=code)
  assert f'worker 0: exit code {code} (' in out and 'line 39' in out and 'line 5 ' not in out
  assert len(cloud.ran()) == 1 and cloud.commands().count('create') == 1


def test_one_worker_of_many_fails(cloud):
  """The launcher reports the worker that failed first, not its peers, which abort with 134."""
  outcomes = {
    '0.0': {'code': 134},
    '0.1': {'code': 134},
    '1.0': {'code': 1, 'lines': 3},
    '1.1': {'code': 134},
  }
  cloud.write('plan.json', [outcomes])
  out = cloud('up', '--type=v4-16', '--num-slices=2', code=1)
  assert (
    'worker 0 of slice 1: exit code 1 (' in out and 'last 30 lines of worker 0 of slice 1' in out
  )


@pytest.mark.parametrize('code', [75, 134, 143, 137, 4])
def test_retries_on_the_same_workdir(cloud, code):
  """Preempted after saving, a peer died, killed, hung: restarted with the same arguments, workdir and TPU."""
  cloud.write('plan.json', [{'code': code, 'step': 10}, {'step': 20}])
  out = cloud('up')
  first, second = cloud.ran()
  assert (
    first[1] == second[1]
    and 'retry 1 of 10, from checkpoint 10' in out
    and 'done: checkpoint 20' in out
  )
  assert cloud.commands().count('create') == 1


def test_killed_twice_is_out_of_memory(cloud):
  """Exit code 137 is retried once."""
  cloud.write('plan.json', [{'code': 137, 'step': 1}, {'code': 137, 'step': 2}])
  assert 'the second time' in cloud('up', code=137)
  assert len(cloud.ran()) == 2


def test_preempted_tpu_is_recreated(cloud):
  """SUSPENDED during a run: the TPU is deleted, requested and set up again, and the run resumes from its workdir."""
  cloud.write('timelines.json', [['PROVISIONING', *['ACTIVE'] * 4, 'SUSPENDED'], ['ACTIVE']])
  cloud.write('plan.json', [{'hang': 1, 'step': 10}, {'step': 20}])
  out = cloud('up', '--spot')
  changes = [c for c in cloud.commands() if c in ('create', 'delete', 'ssh setup', 'ssh start')]
  assert changes == [
    'create',
    'ssh setup',
    'ssh start',
    'delete',
    'create',
    'ssh setup',
    'ssh start',
  ]
  assert 'preempted: ab is SUSPENDED' in out and cloud.ran()[0][1] == cloud.ran()[1][1]


def test_no_progress_ends_the_retries(cloud):
  """Restarts without a new checkpoint cost money: after --stall of these restarts the launcher stops."""
  cloud.write('plan.json', [{'code': 75, 'step': 10}, {'code': 75}])
  out = cloud('up', '--stall=2', code=1)
  assert '2 starts in a row without a new checkpoint (10)' in out and len(cloud.ran()) == 3


def test_retries_are_bounded(cloud):
  """With progress, the launcher stops after --retries, with exit code 75 (try again later)."""
  cloud.write('plan.json', [{'code': 75, 'step': step} for step in range(9)])
  assert 'giving up after 2 retries' in cloud('up', '--retries=2', code=75)
  assert len(cloud.ran()) == 3


def test_max_wait(cloud):
  """After --max-wait, the request stays in the queue, and the launcher prints how to delete it."""
  cloud.write('timelines.json', [['WAITING_FOR_RESOURCES']])
  out = cloud('up', '--max-wait=1', code=75)
  assert 'was still WAITING_FOR_RESOURCES after 1' in out and 'delete --name=ab' in out


def test_failed_request_is_reported(cloud):
  """FAILED while waiting is retried at most --retries times; the reason that Google Cloud gives is shown."""
  cloud.write('timelines.json', [['WAITING_FOR_RESOURCES', 'FAILED']])
  out = cloud('up', '--retries=1', code=75)
  assert 'There is no more capacity' in out and cloud.commands().count('create') == 2


def test_deleted_by_someone_else(cloud):
  """A TPU that someone else deletes during a run is not recreated."""
  cloud.write('plan.json', [{'hang': 1}])
  cloud.faults(('nothing', 0, '', 0))
  process = cloud.start(cloud.command_line('up'))
  wait_for(lambda: cloud.ran())
  (cloud.world / 'resources' / 'ab.json').unlink()
  _, err = process.communicate(timeout=30)
  assert (
    process.returncode == 1
    and 'was deleted during the run' in err
    and cloud.commands().count('create') == 1
  )


def wait_for(condition, seconds=30):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


@pytest.mark.parametrize('group', [True, False])
def test_interrupted_while_waiting(cloud, group):
  """Ctrl-C (to the group) and kill (to the process): prints what is billed and how to delete it; no process is left here."""
  cloud.write('timelines.json', [['WAITING_FOR_RESOURCES']])
  process = cloud.start(cloud.command_line('up', '--poll=30'), start_new_session=True)
  wait_for(lambda: cloud.commands().count('describe') >= 2)
  time.sleep(0.3)
  (os.killpg if group else os.kill)(process.pid, signal.SIGINT if group else signal.SIGTERM)
  _, err = process.communicate(timeout=10)
  assert process.returncode == (130 if group else 143)
  assert (
    'interrupted' in err
    and 'the TPU is billed until it is deleted' in err
    and 'delete --name=ab' in err
  )
  with pytest.raises(ProcessLookupError):
    os.killpg(process.pid, 0)
  assert not (cloud.folder / 'state' / 'ab' / 'lock').exists()


def test_interrupted_run_continues(cloud):
  """The run continues without the terminal: attach finds it, a second `up` does not restart it, stop lets it save."""
  cloud.write('plan.json', [{'hang': 1, 'step': 5}, {'step': 9}])
  process = cloud.start(cloud.command_line('up'), start_new_session=True)
  wait_for(lambda: cloud.ran())
  other = cloud('up', code=1)
  assert 'another tpu.sh (process' in other
  os.killpg(process.pid, signal.SIGINT)
  process.communicate(timeout=10)
  assert '"state": "running", "exit_code": null' in cloud('status', '--json')
  again = cloud.start(cloud.command_line('up'))
  wait_for(lambda: cloud.commands().count('ssh status') >= 3)
  assert 'running' in cloud('status') and len(cloud.ran()) == 1
  assert cloud.commands().count('ssh setup') == 1 and cloud.commands().count('ssh unpack') == 1
  assert 'stopped' in cloud('stop')
  _, err = again.communicate(timeout=30)
  assert again.returncode == 75 and 'stopped as requested' in err and len(cloud.ran()) == 1
  assert 'exit code 75' in cloud('status')
  cloud('resume')
  assert 'done' in cloud('attach')
  assert [ran[1] for ran in cloud.ran()] == [cloud.ran()[0][1]] * 2


def test_stop_force(cloud):
  """A run that ignores SIGTERM is reported after --grace, and killed only with --force."""
  cloud.write('plan.json', [{'hang': 'ignore SIGTERM'}])
  cloud('create')
  cloud('wait')
  cloud('setup')
  cloud('sync')
  cloud('run')
  wait_for(lambda: 'hanging' in cloud('logs'))
  assert 'wait, or run tpu.sh stop --force' in cloud('stop', '--grace=0', code=1)
  cloud('stop', '--force', '--grace=1')
  assert 'exit code 137' in cloud('status')


def test_another_run_is_not_disturbed(cloud):
  """A run with other arguments is refused while a run is active, also if another machine started that run."""
  cloud.write('plan.json', [{'hang': 1}])
  cloud.have('ACTIVE')
  cloud('setup')
  cloud('sync')
  cloud('run')
  assert 'already running another run' in cloud('run', args=[*ARGS, '--config.seed=2'], code=1)


def test_logs(cloud):
  """The last lines of one or all workers, and -f until the run ends, without a gap after a lost connection."""
  cloud.write('plan.json', [{'lines': 300}])
  cloud('up', '--type=v4-16')
  assert 'line 299' in cloud('logs', '--lines=5') and 'line 1 ' not in cloud('logs', '--lines=5')
  out = cloud('logs', '--worker=all', '--lines=5')
  assert '=== worker 0' in out and '=== worker 1' in out
  cloud.faults(
    ('follow', 'cut', '', 1), ('follow', 255, 'Connection closed', 1), ('follow', 'cut', '', 1)
  )
  out = cloud('logs', '-f', '--worker=1')
  assert [line for line in out.splitlines() if line.startswith('line')] == [
    f'line {i} of attempt 0' for i in range(300)
  ]


def test_unequal_workers_are_refused(cloud):
  """A pod whose workers have different versions could stall or train a different model."""
  cloud.have('ACTIVE', workers=2, type='v4-16')
  (cloud.world / 'HOST' / 'ab' / '0.1' / 'jax').write_text('0.9.0')
  out = cloud('up', '--type=v4-16', code=1)
  assert 'differ in jax: 0.10.2 on worker 0, 0.9.0 on worker 1' in out and not cloud.ran()


def test_autodelete(cloud):
  """--autodelete deletes the TPU after success and after failure."""
  cloud('up', '--autodelete')
  assert cloud.commands()[-1] == 'delete'
  cloud.write('plan.json', [{}, {'code': 3}])
  assert 'still exists' not in cloud('up', '--autodelete', code=3)
  assert cloud.commands()[-1] == 'delete' and not (cloud.world / 'resources' / 'ab.json').exists()


def test_secrets(cloud):
  """Secrets are in a file of mode 600 only: in no gcloud call, log or saved state of the launcher."""
  secret = cloud.folder / 'my secrets'
  secret.write_text("# mine\nWANDB_API_KEY=hun$(ter)'2\nOTHER=x y\n")
  secret.chmod(0o640)
  assert 'can be read by others (mode 640): chmod 600' in cloud(
    'up', f'--env-file={secret}', code=2
  )
  secret.chmod(0o600)
  out = cloud('up', f'--env-file={secret}', '--verbose')
  assert '+ gcloud compute tpus queued-resources ssh' in out
  [[_, _, env]] = cloud.ran()
  assert env['WANDB_API_KEY'] == "hun$(ter)'2" and env['OTHER'] == 'x y'
  [copy] = (cloud.world / 'HOST').rglob('env')
  assert (
    stat.S_IMODE(copy.stat().st_mode) == 0o600 and stat.S_IMODE(copy.parent.stat().st_mode) == 0o700
  )
  seen = (
    out
    + (cloud.world / 'calls.jsonl').read_text()
    + ''.join(
      p.read_text()
      for p in (cloud.folder / 'state').rglob('*')
      if p.suffix != '.tgz' and p.is_file()
    )
  )
  seen += ''.join(p.read_text() for p in (cloud.world / 'HOST').rglob('log'))
  assert 'hun$' not in seen
  for flag in ('--env=WANDB_API_KEY=hunter2', '--env=HF_TOKEN=hunter2'):
    out = cloud('up', flag, code=2)
    assert '--env-file' in out and 'hunter2' not in out
  out = cloud('up', args=['pretrain', '--config.api_key=hunter2'], code=2)
  assert '--env-file' in out and 'hunter2' not in out


def test_sync_skips_secrets(cloud, tmp_path):
  """sync copies the files that git tracks, without keys; uncommitted changes are refused without --dirty."""
  root = tmp_path / 'repo'
  shutil.copytree(cloud.checkout, root)
  cloud.checkout = root
  for name in ('.env', 'deploy.pem', 'sub/.env.local', 'id_rsa'):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text('x')
  (root / 'account.json').write_text('{"type": "service_account", "private_key": "x"}')
  (root / 'notes.txt').write_text('-----BEGIN RSA ' + 'PRIVATE KEY-----\n')
  (root / 'harmless.json').write_text('{"a": 1}')
  (root / 'with space.txt').write_text('x')
  cloud.have('ACTIVE')
  cloud('setup')
  assert 'uncommitted changes' in cloud('sync', code=1)
  out = cloud('sync', '--dirty')
  [source] = (cloud.world / 'HOST').rglob('source-*')
  names = {str(path.relative_to(source)) for path in source.rglob('*') if path.is_file()}
  assert {'harmless.json', 'with space.txt', 'launch/tpu.sh'} <= names
  assert not any(re.search(r'env|pem|id_rsa|account|notes|^\.git', name) for name in names)
  assert 'account.json' in out and 'notes.txt' in out


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--zone=mars'], 'is not a zone'),
    (['--type=v4-7'], 'is not a TPU type'),
    (['--type=tpu7x-8'], 'Kubernetes Engine only'),
    (['--name=Bad_Name'], 'lower-case letters'),
    (['--name=-rf'], 'lower-case letters'),
    (['--project=$(x)'], 'is not a project ID'),
    (['--env=1A=b'], 'KEY=VALUE'),
    (['--env=A'], 'KEY=VALUE'),
    (['--zon=x'], 'did you mean --zone?'),
    (['--retries=many'], 'must be an integer'),
    (['--poll=often'], 'a number of seconds'),
    (['--max-wait=6x'], 'such as 6h'),
    (['--spot', '--reserved'], 'choose one'),
    (['--flex-start'], 'needs --max-run-duration'),
    (['--no-queue', '--num-slices=2'], 'needs a queued resource'),
    (['--workdir=gs://bucket'], 'not the bucket itself'),
    (['--workdir=gs://bucket/../x'], "must not contain '..'"),
    (['--workdir=runs/x'], 'absolute path'),
    (['--workdir=/'], 'absolute path'),
    (['--labels=A=b'], 'KEY=VALUE'),
    (['--network=a,b'], 'letters, digits'),
    (['--python=python3'], 'absolute path'),
    (['--env-file=/nowhere'], 'no such file'),
    (['--spot=yes'], 'takes no value'),
    (['--zone='], 'is empty'),
    (['stray'], 'unexpected argument stray'),
  ],
)  # fmt: skip
def test_invalid_flags(cloud, flags, message):
  """A one-line error with the fix, and exit code 2, before any gcloud call."""
  out = cloud('up', *flags, code=2)
  assert message in out and len(out.strip().splitlines()) == 1, out
  assert not cloud.commands()


def test_invalid_arguments(cloud):
  """The arguments after -- are checked too."""
  assert 'a simclr-jax command is required after --' in cloud('up', args=[], code=2)
  assert 'is not a simclr-jax command' in cloud('up', args=['--config=x'], code=2)
  assert 'two workdirs' in cloud('up', args=[*ARGS, '--workdir=gs://other/x'], code=2)
  assert 'unknown command fly' in cloud('fly', argv=['fly'], code=2)
  assert '--name=NAME (or TPU_NAME) is required' in cloud('up', argv=['up'], code=2)
  assert 'no terminal to confirm this: give --yes' in cloud(
    'up', argv=[arg for arg in cloud.command_line('up') if arg != '--yes'], code=2
  )
  assert not set(cloud.commands())


def test_gcloud_is_missing(cloud):
  """A missing gcloud, or a gcloud without an account, is reported with the fix."""
  (cloud.bin / 'gcloud').unlink()
  cloud.env['PATH'] = str(cloud.bin)
  tools = 'bash dirname cat mktemp rm sed awk sort head tr grep mkdir mv sleep date cut tail'
  for tool in tools.split():
    (cloud.bin / tool).symlink_to(shutil.which(tool))
  assert 'gcloud is not installed' in cloud('create', code=1)
  executable(cloud.bin / 'gcloud', '#!/bin/bash\nexit 0\n')
  assert 'gcloud auth login' in cloud('create', code=1)


def test_precedence_of_flags(cloud):
  """Command line, environment, tpu.conf, saved flags of the TPU, gcloud configuration: in that order."""

  def create_zone(name, *flags):  # fmt: skip
    cloud('create', argv=['create', f'--name={name}', '--type=v4-8', '--yes', *flags])
    return next(
      arg
      for call in reversed(cloud.calls())
      if 'create' in call
      for arg in call
      if arg.startswith('--zone=')
    )

  (cloud.world / 'config').mkdir()
  (cloud.world / 'config' / 'project').write_text('its-project')
  (cloud.world / 'config' / 'compute_zone').write_text('us-gcloud1-a')
  assert create_zone('a1') == '--zone=us-gcloud1-a'
  (cloud.folder / 'tpu.conf').write_text('# mine\nzone = us-file1-a\n')
  assert create_zone('a2') == '--zone=us-file1-a'
  cloud.env['TPU_ZONE'] = 'us-environment1-a'
  assert create_zone('a3') == '--zone=us-environment1-a'
  assert create_zone('a4', '--zone=us-flag1-a') == '--zone=us-flag1-a'
  del cloud.env['TPU_ZONE']
  (cloud.folder / 'tpu.conf').unlink()
  cloud('status', argv=['status', '--name=a4'])
  assert '--zone=us-flag1-a' in cloud.calls()[-1] or '--zone=us-flag1-a' in cloud.calls()[-2]
  (cloud.folder / 'tpu.conf').write_text('zone = us-file1-a\nbogus = 1\n')
  assert 'tpu.conf, line 2: unknown flag bogus' in cloud('create', code=2)


def test_from_another_folder(cloud):
  """tpu.sh works from any current folder."""
  cloud.cwd = pathlib.Path('/')
  cloud('up')


@pytest.mark.parametrize('workdir', ['gs://bucket/run', '/data/runs/a'])
@pytest.mark.parametrize('name', ['-x', '--help', 'other:there', 'a b'])
def test_paths_are_neither_flags_nor_machines(cloud, name, workdir):
  """A folder or file that looks like a flag, or like a path on another machine, is one on this machine."""
  path = cloud.folder / name
  flags = ['--name=ab', *LOCATION, '--type=v4-8', f'--workdir={workdir}', '--dry-run', '--dirty']
  out = cloud('fetch', argv=['fetch', *flags, '--', name])
  copies = [line for line in out.splitlines() if 'rsync' in line or ' scp ' in line]
  assert len(copies) == 1 and str(path) in copies[0].replace("'", '')
  assert f' {name} ' not in copies[0]
  assert not path.exists()  # a dry run creates nothing
  assert 'fetch takes one folder' in cloud('fetch', argv=['fetch', *flags, '--', name, 'b'], code=2)
  path.write_text('A=b\n')
  path.chmod(0o600)
  out = cloud('run', argv=['run', *flags, f'--env-file={name}', '--', 'pretrain', '--config=x'])
  assert f'{path} ab:' in out.replace("'", '')


def test_workdirs_without_wildcards(cloud):
  """gcloud expands wildcards: a workdir with one would be several folders."""
  for name in ('run*', 'run?', 'r[un]'):
    out = cloud('fetch', f'--workdir=gs://bucket/{name}', code=2)
    assert 'must not contain *' in out


def test_fetch_list_doctor(cloud):
  """The other commands."""
  cloud.write('plan.json', [{'step': 7}])
  cloud('up')
  cloud('fetch', 'here it is')
  assert (cloud.folder / 'here it is' / 'checkpoints' / '7').is_dir()
  assert 'ab\tACTIVE' in cloud('list')
  executable(cloud.bin / 'ssh-add', '#!/bin/sh\n')
  out = cloud('doctor', '--type=v6e-8', '--workdir=gs://bucket/run')
  assert 'FAIL' not in out and 'gs://bucket/run is writable' in out
  assert 'FAIL  v4-32 in us-central2-b: not available in this zone' in cloud(
    'doctor', '--type=v4-32', code=1
  )
  assert 'tpu.sh COMMAND' in cloud('help', argv=['help'])


def test_stale_process_file(cloud):
  """A process ID that now belongs to another process is not taken for the run, and that process is not killed."""
  cloud.have('ACTIVE')
  cloud('setup')
  cloud('sync')
  home = cloud.world / 'HOST' / 'ab' / '0.0' / 'simclr_jax_runs' / 'ab'
  bystander = subprocess.Popen(['sleep', '60'])
  (home / 'process').write_text(f'{bystander.pid} 12345\n')
  assert 'worker 0: lost' in cloud('status')
  cloud('stop')
  assert bystander.poll() is None
  bystander.kill()
  bystander.wait()
  cloud('up')


def test_lock_has_all_packages():
  """All packages of setup.py, and those for TPUs, are pinned with checksums; if not, run `make lock`."""
  setup = (LAUNCH.parent / 'setup.py').read_text()
  required = re.findall(
    r"^    '([a-z-]+)", setup.split('install_requires=[')[1].split('\n  ],')[0], re.M
  )
  locked = dict(
    re.findall(
      r'^([a-z0-9-]+)==\S+ \\\n( +--hash=sha256:)', (LAUNCH / 'requirements.txt').read_text(), re.M
    )
  )
  missing = set(required) - set(locked) - {'tensorflow'}  # not on Linux
  assert len(required) > 10 and not missing, f'make lock: {missing}'
  assert {'libtpu', 'jaxlib', 'setuptools'} <= set(locked)
  text = (LAUNCH / 'requirements.txt').read_text() + (LAUNCH / 'uv.txt').read_text()
  for entry in re.split(r'\n(?=[a-z])', text):
    assert entry.startswith('#') or '--hash=sha256:' in entry


@pytest.mark.faults
@pytest.mark.skipif(
  not shutil.which('gcloud'),
  reason='install gcloud, https://cloud.google.com/sdk, and run make test-faults',
)
def test_real_gcloud_accepts_the_arguments(cloud):
  """The real gcloud parses every kind of call, and then fails because it has no account here."""
  cloud.write('plan.json', [{'step': 1}])
  cloud(
    'up',
    '--type=v4-16',
    '--num-slices=2',
    '--spot',
    '--valid-until=6h',
    '--iap',
    '--network=n',
    '--subnet=s',
    '--disk=projects/p/zones/z/disks/d',
  )
  cloud('fetch')
  cloud('list')
  cloud('delete')
  cloud('create', '--flex-start', '--max-run-duration=2d', '--name=cd')
  cloud('create', '--best-effort', '--name=ef')
  cloud('create', '--spot', '--max-run-duration=2d', '--name=gh')
  cloud('up', '--no-queue', '--iap', '--name=ij')
  cloud('delete', '--no-queue', '--name=ij')
  cloud('fetch', '--workdir=/tmp/x', '--no-queue', '--name=ij', code=1)
  kinds = {}
  for call in cloud.calls():
    kinds.setdefault(tuple(sorted({re.sub(r'[=:].*', '', arg) for arg in call})), call)
  empty = cloud.folder / 'no account'
  env = {
    **{k: v for k, v in os.environ.items() if not k.startswith(('CLOUDSDK', 'GOOGLE'))},
    'CLOUDSDK_CONFIG': str(empty), 'CLOUDSDK_CORE_CHECK_GCE_METADATA': 'false', 'CLOUDSDK_CORE_DISABLE_PROMPTS': '1',
    'CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU': 'http://127.0.0.1:9/', 'CLOUDSDK_CORE_DISABLE_USAGE_REPORTING': 'true',
  }  # fmt: skip
  tried = 0
  for call in kinds.values():
    if call[0] in ('auth', 'config'):
      continue
    done = subprocess.run(
      ['gcloud', *call],
      env=env,
      capture_output=True,
      text=True,
      stdin=subprocess.DEVNULL,
      cwd=cloud.folder,
    )
    assert 'active account' in done.stderr, (call, done.stderr)
    tried += 1
  assert tried > 10
  invalid = subprocess.run(
    ['gcloud', 'compute', 'tpus', 'queued-resources', 'delete', 'ab', '--bogus'],
    env=env,
    capture_output=True,
    text=True,
  )
  assert invalid.returncode == 2 and 'unrecognized' in invalid.stderr


@pytest.mark.parametrize('name', ['tpu.sh', 'worker.sh', 'local.sh'])
def test_scripts_are_clean(name):
  """The scripts parse, and shellcheck reports nothing for them and the files that they source."""
  script = LAUNCH / name
  for path in LAUNCH.glob('*.sh'):
    subprocess.run(['bash', '-n', str(path)], check=True)
    assert 'eval' not in path.read_text()
  found = shutil.which('shellcheck') or shutil.which(
    'shellcheck', path=str(pathlib.Path(sys.executable).parent)
  )
  if not found:
    pytest.skip("shellcheck is not installed: pip install '.[dev]'")
  subprocess.run([found, '-x', '-P', str(LAUNCH.parent), str(script)], check=True)


def test_old_bash_is_refused():
  """macOS has bash 3.2: a one-line error instead of a syntax error."""
  text = (LAUNCH / 'tpu.sh').read_text()
  guard = text[: text.index('set -Eeuo')]
  old = guard.replace('BASH_VERSINFO[0]', '3').replace('BASH_VERSINFO[1]', '2')
  done = subprocess.run(['bash', '-c', old], capture_output=True, text=True)
  assert (
    done.returncode == 2
    and 'bash 4.4 or newer' in done.stderr
    and len(done.stderr.splitlines()) == 1
  )
