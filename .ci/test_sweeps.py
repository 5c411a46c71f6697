"Sweeps of edited notebooks: killed and continued, moved, side by side in Ray, a worker killed"
import contextlib
import shutil
from types import SimpleNamespace

import nbformat
import psutil
import pytest
from project import NO_COMPARISONS, bin, call, difference, everything, read_metrics, start, wait_for_checkpoint

pytestmark = pytest.mark.xdist_group('sweep')
FIRST, SECOND = 'regression_loss_weight=0', 'regression_loss_weight=10'  # the runs


def sweep_command(folder, notebooks, *options):
    "`corrnb sweep` into a folder"
    return (bin/'corrnb', 'sweep', '--profile', 'tiny', '--name', folder.name, '--runs-dir', folder.parent,
            '--notebooks', notebooks, *NO_COMPARISONS, '-p', 'regression_loss_weight', '0,10', *options)

def changed(before, after):
    "Names of files that are not as before; to compare their contents in an assertion would take minutes to print"
    return sorted(p.name for p in before.keys() | after.keys() if before.get(p) != after.get(p))

def metrics_of(sweep):
    "Metrics of the runs of a sweep"
    return {p.name: read_metrics(p) for p in (sweep/'runs').iterdir()}

@pytest.fixture(scope='session')
def edited(tmp_path_factory):
    "The stage notebooks, copied to be edited; two of them have a cell more, which writes a file"
    folder = tmp_path_factory.mktemp('edited')/'mine'
    call(bin/'corrnb', 'notebooks', folder)
    for stage in 'prepare', 'evaluate':
        nb = nbformat.read(folder/f'{stage}.ipynb', as_version=4)
        edit = f'from pathlib import Path\nPath(run_dir, "edited-{stage}.txt").write_text("by hand")'
        nb.cells.append(nbformat.v4.new_code_cell(edit))
        nbformat.write(nb, folder/f'{stage}.ipynb')
    return folder

@pytest.fixture(scope='session')
def killed(tmp_path_factory, edited):
    "A sweep killed in its second run, typed again and moved: both folders, finished files before and after, output"
    sweep = tmp_path_factory.mktemp('sweeps')/'sweep'
    command = sweep_command(sweep, edited)
    process = start(*command)
    wait_for_checkpoint(sweep/'runs'/SECOND, process)
    process.kill()
    process.wait()
    finished = sweep/'base', sweep/'runs'/FIRST
    before = everything(*finished)
    assert finished[1]/'stages'/'evaluate.json' in before, 'killed too early'
    output = call(*command)
    after = everything(*finished)
    folder = sweep.rename(sweep.with_name('moved'))
    return SimpleNamespace(old=sweep, folder=folder, before=before, after=after, output=output)

@pytest.mark.seconds(90)
def test_finished_parts_are_not_repeated(killed):
    "A sweep killed half-way and typed again repeats nothing that was done"
    assert not changed(killed.before, killed.after), 'a finished part of the sweep was done again'
    assert killed.output.count('unchanged, skipped') == 2 and '2/2' in killed.output, killed.output

@pytest.mark.seconds(10)
def test_sweep_can_be_moved(killed):
    "A sweep can be compared again where it was moved, and what it holds does not know its old place"
    (killed.folder/'compare.html').unlink()
    call(bin/'corrnb', 'compare', killed.folder)
    assert 'regression_loss_weight' in (killed.folder/'compare.html').read_text()
    leaks = [p.name for p in killed.folder.glob('*.*') if str(killed.old).encode() in p.read_bytes()]
    assert not leaks, f"the old place of the sweep is in {', '.join(leaks)}"

def test_edited_notebooks_run(killed):
    "What was written into the copies by hand has run, for each run of the sweep"
    runs = [*(killed.folder/'runs').iterdir()]
    by_hand = [(run/f'edited-{stage}.txt').read_text() for run in runs for stage in ('prepare', 'evaluate')]
    assert {run.name for run in runs} == {FIRST, SECOND} and by_hand == ['by hand']*4

def ray_worker(run):
    "The Ray worker that holds a run folder, and its kernel"
    for p in psutil.process_iter(['cmdline']):
        if not ' '.join(p.info['cmdline'] or ()).startswith('ray::'): continue
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if any(f.path == str(run/'.lock') for f in p.open_files()): return p, *p.children(recursive=True)
    raise AssertionError(f'no Ray worker holds {run}')

@pytest.mark.seconds(120)
def test_worker_of_ray_is_killed(killed, edited, tmp_path):
    "Of two runs side by side in Ray one is killed, the other goes on; typed again, metrics as of one after the other"
    sweep, log = tmp_path/'ray', tmp_path/'log'
    shutil.copytree(killed.folder, sweep, ignore=shutil.ignore_patterns('runs'))   # the same rows and index
    with log.open('w') as f: process = start(*sweep_command(sweep, edited, '--workers', '2'), output=f)
    wait_for_checkpoint(sweep/'runs'/SECOND, process)
    first = sweep/'runs'/FIRST
    side_by_side = (first/'params.json').exists() and not (first/'stages'/'evaluate.json').exists()
    for p in ray_worker(sweep/'runs'/SECOND): p.kill()
    assert side_by_side, 'one after the other'
    assert process.wait() == 1, f'it does not say that a run failed:\n{log.read_text()}'
    said = log.read_text()
    assert '1 of 2 runs failed' in said and f'{SECOND}: its Ray task died' in said, said
    before = everything(first)
    assert first/'stages'/'evaluate.json' in before, "the other worker's run has not ended"
    output = call(*sweep_command(sweep, edited, '--workers', '2'))
    assert not changed(before, everything(first)), 'the finished run was done again'
    gap = difference(metrics_of(killed.folder), metrics_of(sweep))
    assert gap <= 1e-6, f'the metrics differ, by {gap:.2g}:\n{output}'
