"""The report in headless Chromium: `make test-browser`. Not part of `make test`, since it needs Chromium.

Writes a screenshot to runs/report.png.
"""

import pathlib
import re
import shutil
import subprocess

import pytest
from conftest import TINY

from simclr_jax import cli

CHROMIUM = (
  shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
)
# Puts 'loaded images/images, whether the page scrolls sideways' into the title.
COUNT_IMAGES = """<script>
addEventListener('load', () => {
  const images = [...document.images];
  const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  document.title = `${images.filter(i => i.complete && i.naturalWidth).length}/${images.length} ${wide}`;
});
</script>"""


def browse(tmp_path, *arguments):
  """Runs Chromium, headless and without a network; returns its output."""
  command = [
    CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-sync',
    '--disable-background-networking', '--disable-component-update', '--disable-quic',
    '--proxy-server=127.0.0.1:9', f'--user-data-dir={tmp_path / "profile"}', *arguments,
  ]  # fmt: skip
  return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(not CHROMIUM, reason='Chromium is not installed: apt-get install chromium')
def test_report_in_chromium(tmp_path):
  """Breaks if an image does not load, the page needs the network, or it scrolls sideways."""
  run = pathlib.Path('runs/demo')
  if not (run / 'checkpoints').is_dir():
    run = tmp_path / 'run'
    fields = [f'--config.{k}={v}' for k, v in TINY.items()]
    assert cli.main(['pretrain', '--config=simclr_digits', f'--workdir={run}', *fields]) == 0
    assert cli.main(['probe', f'--workdir={run}', '--protocol=logistic', '--labels=1,5']) == 0
  page = tmp_path / 'report.html'
  assert cli.main(['report', f'--workdir={run}', f'--out={page}']) == 0
  counted = tmp_path / 'counted.html'
  counted.write_text(page.read_text().replace('</html>', f'{COUNT_IMAGES}</html>'))
  for width in (1100, 400):
    dom = browse(tmp_path, f'--window-size={width},900', '--dump-dom', counted.as_uri())
    title = re.search(r'<title>(\d+)/(\d+) (true|false)</title>', dom)
    assert title, dom[:1000]
    loaded, images, wide = title.groups()
    assert int(loaded) == int(images) >= 4
    assert wide == 'false', f'the page is wider than {width} pixels'
  shot = pathlib.Path('runs/report.png').resolve()
  shot.parent.mkdir(exist_ok=True)
  browse(tmp_path, '--window-size=1100,3000', f'--screenshot={shot}', page.as_uri())
  assert shot.stat().st_size > 50_000
  print(f'screenshot: {shot}')
