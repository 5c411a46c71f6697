"The built wheel in an environment of its own, in an empty folder: everything works without a checkout"
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
from project import NO_COMPARISONS, bin, call, contents, env, project_copy, read_metrics, same

pytestmark = pytest.mark.xdist_group('wheel')
TITLES = 'Will the Fed cut rates in March?', 'Will inflation be below 3 % in March?'


@pytest.fixture(scope='session')
def installed(tmp_path_factory):
    "`corrnb` installed from a wheel: the environment, an empty folder, and `corrnb` typed there"
    tmp = tmp_path_factory.mktemp('wheel')
    source, venv, folder = project_copy(tmp/'source'), tmp/'venv', tmp/'empty'
    python, clean = venv/'bin'/'python', {k: v for k, v in env.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')}
    pip = sys.executable, '-m', 'pip', '--disable-pip-version-check', '--quiet'
    call(*pip, 'wheel', '--no-deps', '--no-build-isolation', '--use-pep517', '--no-index', '-w', tmp, source, env=clean)
    shutil.rmtree(source)
    call(sys.executable, '-m', 'venv', '--without-pip', venv, env=clean)
    call(*pip, '--python', python, 'install', '--no-deps', '--no-index', next(tmp.glob('corrnb-*.whl')), env=clean)
    own = call(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', env=clean).strip()
    # makes the dependencies visible, but no editable corrnb: .pth files in the folder that is named are not read
    Path(own, 'dependencies.pth').write_text(sysconfig.get_path('purelib') + '\n')
    (venv/'share').symlink_to(Path(sys.prefix)/'share')  # where nbconvert has its templates
    files = {p for p in Path(own, 'corrnb').rglob('*') if p.is_file()}
    folder.mkdir()
    clean['PATH'] = f"{venv/'bin'}{os.pathsep}{os.environ['PATH']}"
    def corrnb(*args): return call(venv/'bin'/'corrnb', *args, cwd=folder, env=clean)
    def run_python(code): return call(python, '-c', code, cwd=folder, env=clean)
    return SimpleNamespace(venv=venv, files=files, folder=folder, corrnb=corrnb, python=run_python)

@pytest.fixture(scope='session')
def run(installed):
    "A run with the tiny model"
    installed.corrnb('run', '--profile', 'tiny', *NO_COMPARISONS, '--name', 'first')
    return installed.folder/'runs'/'first'

@pytest.mark.seconds(30)
def test_no_checkout_in_sight(installed):
    "What runs is the wheel's, and the help knows commands and parameters"
    where = installed.python('import corrnb; print(corrnb.__file__)').strip()
    assert where.startswith(str(installed.venv)), where
    assert 'page.html' in {p.name for p in installed.files}, 'the page of `corrnb serve` is missing'
    help = installed.corrnb('--help')
    commands = 'run', 'predict', 'serve', 'sweep', 'compare', 'label', 'notebooks'
    assert all(command in help for command in commands), help
    assert 'regression_loss_weight' in installed.corrnb('run', '--help')

@pytest.mark.seconds(40)
def test_run_and_predict(installed, run):
    "A run with the tiny model, and a forecast from it"
    assert (run/'report.html').exists() and read_metrics(run)
    answer = json.loads(installed.corrnb('predict', *TITLES, '--json').splitlines()[-1])
    assert any(isinstance(v, float) and -1 <= v <= 1 for v in answer.values()), answer

@pytest.mark.seconds(5)
def test_notebooks_are_those_of_the_checkout(installed, tmp_path):
    "`corrnb notebooks` writes the stage notebooks and profiles that it writes in a checkout"
    installed.corrnb('notebooks', 'mine')
    call(bin/'corrnb', 'notebooks', tmp_path/'mine')
    of_wheel, of_checkout = (contents(f/'mine', '*.*') for f in (installed.folder, tmp_path))
    stages = {f'{s}.ipynb' for s in ('prepare', 'index', 'train', 'evaluate', 'compare')}
    assert stages | {'profiles/tiny.yaml'} <= of_wheel.keys(), sorted(of_wheel)
    same(of_checkout, of_wheel, 'the wheel holds other notebooks than the checkout')

def test_installed_files_stay(installed):
    "Runs write nothing where the wheel is installed"
    files = {p for p in next(installed.venv.glob('lib/*/site-packages/corrnb')).rglob('*') if p.is_file()}
    assert {p.suffix for p in files - installed.files} <= {'.pyc', '.nbi', '.nbc'}   # what Python and numba compile
