"""export the weights for another tool

Formats of --to:
  orbax        variables/ and encoder.json, which this program reads; docs/export.md reads them without it
  safetensors  PyTorch: torchvision's names; load_torch.py beside it where no class of torchvision is exact
  timm         PyTorch: a folder for timm.create_model, or for the Hugging Face Hub, with a model card
  huggingface  the same as timm
  detectron2   model.pkl for object detection with detectron2
  moco         a checkpoint of facebookresearch/moco with queue, key encoder and momentum, of a MoCo run
  onnx         model.onnx for any runtime of ONNX
  stablehlo    a program of JAX without this package, for CPU, GPU and TPU; also encoders of your own
  savedmodel   TensorFlow; also encoders of your own

The files are read back by another library and compared with the encoder at two sizes of images: the difference is
printed and kept in verified.json; above 1e-5 of the largest feature, nothing is written. A format that cannot contain the
network exactly is refused. docs/weights.md has the table.
"""

import argparse

from simclr_jax.commands import options

FORMATS = (
  'orbax', 'safetensors', 'timm', 'huggingface', 'detectron2', 'moco', 'onnx', 'stablehlo', 'savedmodel',
)  # fmt: skip
LISTED = 100_000  # images of a run; more take minutes to list


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  options.workdir(parser, 'a run, or an exported encoder')
  parser.add_argument('--to', choices=FORMATS, default='orbax', help='format')
  parser.add_argument(
    '--out', required=True, type=options.path, metavar='DIR', help='output folder, new or empty'
  )
  parser.add_argument(
    '--with',
    dest='top',
    choices=('projector', 'classifier'),
    help='also the projection head, or the classifier of a fine-tuned run',
  )
  parser.add_argument(
    '--images',
    type=options.dataset,
    metavar='DATASET',
    help='images for the comparison (default: those of the run, or two photographs)',
  )
  parser.add_argument(
    '--license', metavar='TEXT', help='license of the weights, for the model card'
  )


def run(args: argparse.Namespace) -> int:
  """Writes the folder."""
  from simclr_jax import run_config
  from simclr_jax.commands import common

  common.check_overrides(args.overrides)
  config = run_config.load(args.workdir, args.overrides)
  _check(args)
  if args.to == 'orbax':
    _orbax(args)
    print(f'wrote {args.out}')
    return 0
  from simclr_jax.interop import export

  model = _model(args)
  export.check(model, args.to, args.out)
  dataset, images = _images(args, config)
  verified = export.write(
    model, args.to, args.out, dataset, images, args.license or '', _results(args.workdir, model)
  )
  for size, differences in verified['difference'].items():
    text = ', '.join(f'{name} {value:.1e}' for name, value in differences.items())
    print(f'{verified["reader"]} at {size} pixels, relative difference: {text}')
  print(f'wrote {args.out} in {verified["seconds"]} s: {export.module(args.to).needs(model)}')
  return 0


def _check(args):
  """Refuses arguments that have no effect on the format."""
  from simclr_jax.errors import ConfigError

  if args.to == 'orbax':
    for name in ('images', 'license'):
      if getattr(args, name):
        raise ConfigError(f'--{name} has no effect with --to=orbax')
    if args.top == 'classifier':
      raise ConfigError(
        '--to=orbax has no classifier: use --to=safetensors, onnx, stablehlo or savedmodel'
      )
  if args.to == 'moco' and args.top:
    raise ConfigError('--with has no effect with --to=moco: the projection head always goes along')


def _orbax(args):
  from simclr_jax import runs
  from simclr_jax.interop import orbax

  encoder = runs.load_encoder(args.workdir)
  orbax.export(encoder, args.out, _head(args, encoder) if args.top else None)


def _head(args, encoder):
  """The flax variables of the projection head of --workdir."""
  from simclr_jax import runs
  from simclr_jax.errors import ConfigError
  from simclr_jax.interop import model, orbax

  if not orbax.is_export(args.workdir):
    return model.of(runs.load_projection(args.workdir)).variables['head']
  head = orbax.load_head(args.workdir, encoder.architecture)
  if head is None:
    raise ConfigError(f'{args.workdir} has no projection head: leave out --with=projector')
  return head


def _model(args):
  """The `interop.model.Model` of --workdir."""
  import dataclasses

  from simclr_jax import optim, run_config, runs
  from simclr_jax.errors import ConfigError
  from simclr_jax.interop import moco_checkpoint, model, orbax

  training = None
  if args.to == 'moco':
    if orbax.is_export(args.workdir):
      raise ConfigError(f'--to=moco needs a run, and {args.workdir} is an exported encoder')
    config, state = runs.load_state(args.workdir)
    rate = optim.schedule(config, config.data.examples)
    training = moco_checkpoint.training(config, state, float(rate(int(state.step))))
  if args.top == 'classifier':
    encoder = _classifier(args)
  else:
    encoder = runs.load_encoder(args.workdir)
    if args.top or training:
      encoder = model.with_head(encoder, _head(args, encoder))
  command = run_config.record(args.workdir).get('command', '')
  return dataclasses.replace(
    model.of(encoder), training=training, provenance={'command': command, **encoder.provenance}
  )


def _classifier(args):
  """The network with the classifier of --workdir."""
  from simclr_jax import runs
  from simclr_jax.errors import ConfigError
  from simclr_jax.interop import orbax

  if orbax.is_export(args.workdir):
    raise ConfigError(
      f'{args.workdir} is an exported encoder, which has no classifier: name a fine-tuned run'
    )
  try:
    return runs.load_classifier(args.workdir)
  except ConfigError as error:
    raise ConfigError(
      f'{error}; the classifiers of probe are not kept: finetune --config.fine_tune_after_block=4 trains one on the frozen encoder'
    ) from None


def _results(workdir, model) -> list[str]:
  """The tables of the evaluations of the network."""
  from simclr_jax.commands import common
  from simclr_jax.encoder import Encoder
  from simclr_jax.evaluate import results

  found = results.load(workdir)
  encoder = Encoder(model.architecture, model.variables['encoder'], model.provenance)
  checkpoint = common.checkpoint(encoder)['checkpoint']
  return [results.table(r) for r in found.values() if r.get('checkpoint') == checkpoint]


def _images(args, config):
  """Images for the comparison, and their description."""
  from sklearn.datasets import load_sample_images

  from simclr_jax import data
  from simclr_jax.commands import common
  from simclr_jax.data import objects
  from simclr_jax.errors import ConfigError

  if args.images:
    config = common.recipe_with_images(args.workdir, args.overrides, args.images)
    return data.load(config.data, 'train'), f'images of {args.images}'
  known = config.data.dir or config.data.source != 'folder'
  if known and config.data.examples <= LISTED:
    try:
      return data.load(config.data, 'train'), 'training images of the run'
    except (ConfigError, OSError):
      pass  # moved, or in memory
  return objects.dataset(load_sample_images()['images']), 'two photographs of scikit-learn'
