# %% [markdown]
# # Label-efficient learning
#
# The recipe of SimCLR v2: pretrain on all images without labels, fine-tune with a few labels, then distil the fine-tuned
# network into a smaller one on all images. With your own images, replace `digits` by your folder.

# %%
import json
import os
import pathlib
import tempfile

import matplotlib.pyplot as plt

import simclr_jax as sj

SMALL = os.environ.get('SIMCLR_JAX_TUTORIAL') == 'small'  # a few steps, to test the notebook
WORK = pathlib.Path(tempfile.mkdtemp())
LABELS, SEEDS = ((2,), 1) if SMALL else ((2, 10), 3)
DATA = 'digits'

# %% [markdown]
# ## 1. Pretrain without labels

# %%
length = {'steps': 5, 'warmup_epochs': 0} if SMALL else {'epochs': 4}
run = sj.pretrain(DATA, 'simclr_digits', WORK / 'run', progress=False, **length)
print(run.step, 'steps, loss', run.history['loss'][-1], 'chance', run.history['chance_loss'][-1])

# %% [markdown]
# ## 2. Fine-tune with few labels, and compare
#
# Each seed draws other labels. Three baselines get the same labels: logistic regression on raw pixels and on the untrained
# encoder, and the same network trained from scratch, twice as long as the fine-tuning.

# %%
labels = ','.join(map(str, LABELS))
steps = '--config.steps=5 --scratch-steps=5' if SMALL else '--scratch-learning-rate=0.01'
# !simclr-jax finetune --workdir={WORK}/run --labels={labels} --seeds={SEEDS} {steps} 2>/dev/null | tail -15

# %%
saved = json.loads((WORK / 'run/evaluation.json').read_text())
result = next(r for name, r in saved.items() if name.startswith('finetun'))
for row, cells in result['rows'].items():
  means = [cell[0] for cell in cells]
  deviations = [cell[1] or 0 for cell in cells]
  plt.errorbar(LABELS, means, deviations, marker='o', capsize=3, label=row)
plt.xscale('log')
plt.xticks(LABELS, [str(count) for count in LABELS])
plt.xlabel('labels per class')
plt.ylabel(f'top-1 % on {result["test_images"]} images')
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# Read the plot as follows. The distance between "fine-tuned" and "from scratch" is what the unlabelled images are worth;
# it shrinks as labels are added. The bars are standard deviations over the draws of labels. If they overlap, more seeds are
# needed before the difference means anything.
#
# ## 3. Distil into a smaller network
#
# The student sees all images and only the predictions of the teacher. It has half of the width, about a quarter of the
# parameters.

# %%
short = '--config.steps=5' if SMALL else ''
teachers = ','.join(f'{WORK}/run/finetune/{LABELS[0]}-seed{seed}' for seed in range(SEEDS))
# !simclr-jax distill --teacher={teachers} --workdir={WORK}/students --config.model.width_multiplier=0.25 {short} 2>/dev/null | tail -8

# %% [markdown]
# ## When it does not help
#
# - With many labels: supervised training from scratch catches up.
# - With few unlabelled images: contrastive pretraining needs thousands.
# - If the classes differ in something that the augmentation removes, such as colour. Then change `augment.view1`.
# - If published weights of similar images exist: `simclr-jax import` them and fine-tune those.
