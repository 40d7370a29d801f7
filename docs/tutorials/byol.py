# %% [markdown]
# # A new method: BYOL
#
# BYOL (Grill et al. 2020) has no negatives. An online network predicts the output of a target network for the other view; the
# target is an exponential moving average (EMA) of the online network. Below is the whole method, outside of the package; the
# package trains, resumes, evaluates and exports it as if it were built in.
#
# With the prediction $q(g(f(x)))$ of one view and the output $z'$ of the target for the other, both normalised, the loss is
# $|q - z'|^2 = 2 - 2 \cos(q, z')$, added over both directions.

# %%
import os
import pathlib
import tempfile

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import simclr_jax as sj
from simclr_jax import losses
from simclr_jax.fields import Choices, Field, Range
from simclr_jax.methods import Method
from simclr_jax.models import mlp, network
from simclr_jax.momentum import encode, init_ema, update_ema

SMALL = os.environ.get('SIMCLR_JAX_TUTORIAL') == 'small'  # a few steps, to test the notebook
WORK = pathlib.Path(tempfile.mkdtemp())

# %% [markdown]
# ## The method
#
# `build` returns three functions: `init` makes the parameters, which are learned, and the state, which is everything else;
# `loss` returns the loss, the new state and metrics; `encoder` says which weights are evaluated. `FIELDS` are fields of the
# recipe.

# %%
FIELDS = {
  'key_momentum': Field(0.9, 'momentum of the EMA', Range(0.0, 1.0)),
  'predictor': Field('mlp', 'mlp, or none: no predictor', Choices('mlp', 'none')),
}


def byol(config):
  net = network.build(config)
  size = config.model.head_dim
  layers = 2 if config.predictor == 'mlp' else 0
  predictor = mlp.MLP(layers, size, hidden=256, norm='hidden')

  def init(rng, batch):
    params, stats = net.init(rng, batch['views'][:, 0])
    target = init_ema(params, stats)  # before the predictor is added: the target has none
    fresh = predictor.init(rng, jnp.zeros((2, size)), train=False)
    params['predictor'] = fresh.get('params', {})
    return params, {'stats': stats, 'target': target, 'predictor': fresh.get('batch_stats', {})}

  def loss(params, state, batch, rng):
    target = update_ema(state['target'], params, config.key_momentum)
    stats, predictor_stats, total = state['stats'], state['predictor'], 0.0
    for i in range(2):
      outputs, stats = net.apply(params, stats, batch['views'][:, i])
      q, predictor_stats = network.apply_train(
        predictor, params['predictor'], predictor_stats, outputs[-1]
      )
      z, target = encode(net, target, batch['views'][:, 1 - i])  # unit rows, no gradient
      total += jnp.mean(jnp.sum((losses.l2_normalize(q[-1]) - z) ** 2, axis=-1))
    embeddings = jnp.stack([losses.l2_normalize(outputs[-1]), z], axis=1)
    metrics = {'loss': total, 'features': outputs[0], 'embeddings': embeddings}
    return total, ({'stats': stats, 'target': target, 'predictor': predictor_stats}, metrics)

  def encoder(params, state):
    return network.encoder(params, state['stats'])

  return Method(init, loss, encoder, ema_state=('target',))


# %% [markdown]
# ## Train, and compare
#
# Equal images, views, network, optimizer and number of steps; the learning rate of SimCLR's recipe is not tuned for BYOL. Two
# ablations: without the predictor, and with a target that is the online network itself (momentum 0, still without gradient).

# %%
train, test = sj.load_data('digits'), sj.load_data('digits', 'test')
if SMALL:
  train, test = train.subset(np.arange(500)), test.subset(np.arange(200))
length = {'steps': 4, 'warmup_epochs': 0} if SMALL else {'epochs': 3}
common = {'model.width_multiplier': 0.25, 'knn_every_epochs': 0, 'tensorboard': False}
variants = {
  'SimCLR': {},
  'BYOL': {'method': byol},
  'BYOL without predictor': {'method': byol, 'predictor': 'none'},
  'BYOL without EMA': {'method': byol, 'key_momentum': 0.0},
}
seeds = range(1 if SMALL else 3)
runs = {
  name: [
    sj.pretrain(
      train, 'simclr_digits', WORK / f'{name} {seed}', test=test, progress=False,
      overrides=common, seed=seed, **length, **fields,
    )
    for seed in seeds
  ]
  for name, fields in variants.items()
}  # fmt: skip

# %%
print(
  f'{len(test)} test images, chance {max(np.bincount(test.labels)) / len(test):.1%}, {len(seeds)} seeds'
)
print(f'{"":24}kNN, mean and range       std per dimension  effective rank')
for name, each in runs.items():
  knn = [100 * run.knn(train, test, k=20) for run in each]
  std, rank = (np.mean([run.history[m][-1] for run in each]) for m in ('z_std', 'rank'))
  print(
    f'{name:24}{np.mean(knn):5.1f} % ({min(knn):.1f} to {max(knn):.1f}) {std:16.2f} {rank:15.1f}'
  )

# %%
for name, each in runs.items():
  plt.plot(each[0].history['step'], each[0].history['z_std'], label=name)
plt.axhline(0.05, color='gray', ls='--', lw=1)
plt.xlabel('step')
plt.ylabel('standard deviation per dimension')
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# A standard deviation near 1 means that embeddings fill the sphere, near 0 (below the dashed line) that all images have the
# same embedding: collapse. In the run that is shown, no variant collapsed, and none of the BYOL variants learned useful
# features: their kNN accuracy is near chance, while that of SimCLR is far above. This does not rank the methods. It shows that
# an embedding can be spread out and useless, so look at `knn` and not only at the loss. The training has about 140 steps with
# SimCLR's learning rate; the paper trains BYOL for 1,000 epochs. Try more epochs, another optimizer, and `key_momentum`.
#
# ## Where to go from here
#
# - Save the cell with the method as `byol.py`, and use it from the command line: `method='byol.py'` in a recipe. See "Code of
#   your own" in the documentation.
# - BYOL on ImageNet has a cosine schedule of the momentum from 0.996 to 1, LARS and a batch of 4,096.
