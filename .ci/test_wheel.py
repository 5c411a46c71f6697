"The built wheel in an environment of its own, in an empty folder: everything works without a checkout"
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from project import NO_COMPARISONS, call, difference, env, project_copy, read_metrics

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

@pytest.mark.seconds(60)
def test_sweep_of_edited_notebooks(installed, run):
    "`corrnb notebooks` copies the stage notebooks; a sweep over two values runs the edited copies"
    copies = installed.folder/'mine'
    installed.corrnb('notebooks', 'mine')
    stages = {p.stem for p in copies.glob('*.ipynb')}
    assert stages >= {'prepare', 'index', 'train', 'evaluate', 'compare'}, stages
    assert (copies/'profiles'/'tiny.yaml').exists()
    for stage in 'prepare', 'evaluate':
        nb = nbformat.read(copies/f'{stage}.ipynb', as_version=4)
        edit = f'from pathlib import Path\nPath(run_dir, "edited-{stage}.txt").write_text("by hand")'
        nb.cells.append(nbformat.v4.new_code_cell(edit))
        nbformat.write(nb, copies/f'{stage}.ipynb')
    swept = '-p', 'regression_loss_weight', '0,10', '--notebooks', 'mine'
    installed.corrnb('sweep', '--profile', 'tiny', '--name', 'sweep', *swept, *NO_COMPARISONS)
    sweep = installed.folder/'runs'/'sweep'
    edited = {p.name: p for p in (sweep/'runs').iterdir()}
    assert (sweep/'compare.html').exists() and len(edited) == 2
    by_hand = [(p/f'edited-{stage}.txt').read_text() for p in edited.values() for stage in ('prepare', 'evaluate')]
    assert by_hand == ['by hand']*4 and not list(run.glob('edited*'))
    gap = difference(read_metrics(run), read_metrics(edited['regression_loss_weight=10']))
    assert gap <= 1e-6, f'a cell that only writes a file changed the metrics, by {gap:.2g}'

def test_installed_files_stay(installed):
    "Runs write nothing where the wheel is installed"
    files = {p for p in next(installed.venv.glob('lib/*/site-packages/corrnb')).rglob('*') if p.is_file()}
    assert {p.suffix for p in files - installed.files} <= {'.pyc', '.nbi', '.nbc'}   # what Python and numba compile
