"Whole runs with the tiny model: killed and continued, from PostgreSQL, in two processes, by the pages that show one"
import contextlib
import html
import re
import shutil
import time
from types import SimpleNamespace
from urllib.parse import quote

import psutil
import pytest
from project import bin, call, difference, execute, read_metrics, start, wait_for_checkpoint

pytestmark = pytest.mark.xdist_group('run')
TINY = bin/'corrnb', 'run', '--profile', 'tiny'


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    "A run with the tiny model: folder of runs, run folder, seconds, metrics"
    runs, begin = tmp_path_factory.mktemp('runs'), time.time()
    printed = call(*TINY, '--runs-dir', runs)
    seconds, run = time.time() - begin, next(runs.iterdir())
    return SimpleNamespace(runs=runs, run=run, seconds=seconds, metrics=read_metrics(run), printed=printed)

@pytest.mark.seconds(60)
def test_run_leaves_everything_and_is_not_repeated(tiny):
    "A run has all its files and takes about a minute; typed again it has nothing to do"
    imports = float(re.search(r'\(imports (\d+)\)', tiny.printed)[1])   # a yardstick for slow machines
    limit = max(60, 12*imports)
    wanted = ['params.json', 'metrics.json', 'predictions.parquet', 'report.html', 'training_cost.json',
              *(f'{s}.ipynb' for s in ('prepare', 'index', 'train', 'evaluate')),
              *(f'model/{f}' for f in ('adapter_config.json', 'adapter_model.safetensors', 'metrics.json'))]
    missing = [name for name in wanted if not (tiny.run/name).exists()]
    assert not missing, f"not in the run folder: {', '.join(missing)}"
    assert not list(tiny.run.glob('checkpoints/*/complete.json')), 'a finished run has kept its checkpoints'
    assert tiny.seconds < limit, f'took {tiny.seconds:.0f} s, more than {limit:.0f} s'
    assert call(*TINY, '--runs-dir', tiny.runs).count('unchanged, skipped') == 4, 'the second run did something'

def report_faults(page, metrics):
    "What a colleague should not see in a report, or would miss"
    from corrnb.summary import headline, sentence
    text = html.unescape(re.sub(r'<style>.*?</style>|<[^>]*>', ' ', page, flags=re.DOTALL))
    first = re.search(r'<h[1-6][^>]*>(.*?)</h', page)
    if not first or html.unescape(first[1]) != headline(metrics): yield 'its first heading is not the result'
    if sentence(metrics).replace('R2', 'R²') not in text: yield 'the result in one sentence is missing'
    if page.find('class="lead"') > page.find('<img') or '<img' not in page: yield 'no picture behind the sentence'
    if re.search(r'\b(NaN|nan|None|null)\b', text): yield 'it shows NaN or None'
    if found := re.findall(r'(?<![\w.])/(?:home|root|tmp|work|usr|var|opt)/\S*', text): yield f'it shows {found[0]}'
    if found := re.findall(r'(?:href|src)="(?!data:|#|https?:)([^"]*)"', page): yield f'it leads to {found[0]}'
    if '<tbody>' not in page or re.search(r'<tr[^>]*>\s*<th>\d+</th>', page): yield 'a table has an index'
    if not re.search(r'<time>\d+ \w+ 20\d\d</time>', page): yield 'it has no date'

def test_ends_with_ten_lines(tiny):
    "A run ends with at most ten lines, whose numbers are those of metrics.json; their commands can be typed"
    lines, metrics = tiny.printed.rstrip().split('\n\n')[-1].splitlines(), tiny.metrics
    assert len(lines) <= 10, tiny.printed
    said = dict(re.split(r'  +', line, maxsplit=1) for line in lines)
    model, best = (metrics['test'][m] for m in ('model', metrics['best_baseline']))
    assert said['Predicted'].startswith(f"{metrics['target']} of {model['n']} held-out pairs")
    assert f"MAE {model['mae']:.3f} (" in said['How good'] and f"R2 {model['r2']:.3f} (" in said['How good']
    assert f"MAE {best['mae']:.3f};" in said['Against']
    better = sum(m['mae'] < model['mae'] - 1e-9 for m in metrics['test'].values())
    assert said['Rank by MAE'].startswith(f"number {better + 1} of {len(metrics['test'])}")
    assert ('not near the top' in said['Rank by MAE']) == (better > 2)
    assert f"{metrics['intervals']['test']['coverage_90']:.0%}".replace('%', ' % of the labels') in said['How sure']
    assert said['Report'].split(' (')[0] == str(tiny.run/'report.html') and f'--model {tiny.run}' in said['Next']

def test_report(tiny):
    "The report begins with the result, and holds nothing that only its author would understand; the check can fail"
    page = (tiny.run/'report.html').read_text('utf-8')
    assert not list(report_faults(page, tiny.metrics))
    wrong = {'first heading': ('<h1>', '<h1>4. Evaluate</h1><h1>'), 'one sentence': ('With an MAE', 'With a mean'),
             'NaN': ('</main>', '<p>NaN</p></main>'), 'shows /home': ('</main>', '<p>/home/me/x</p></main>'),
             'leads to ../35_stages': ('</main>', '<a href="../35_stages.ipynb">x</a></main>'),
             'an index': ('<tbody>', '<tbody><tr><th>0</th></tr>'), 'no date': ('<time>', '<time>on '),
             'no picture': ('<img', '<image')}
    for fault, (old, new) in wrong.items():
        assert fault in ' '.join(report_faults(page.replace(old, new), tiny.metrics)), fault

@pytest.mark.seconds(60)
def test_from_postgres_killed_and_continued(tiny, tmp_path):
    "From PostgreSQL, killed in its training and continued: the metrics of the demo, and the password nowhere"
    from corrnb import testing
    from corrnb.demo import write_demo
    from corrnb.schema import make_engine
    with testing.test_server() as server:
        url = server.new_database()
        write_demo(engine := make_engine(url))
        password = engine.url.password
        command = *TINY, '-p', 'pairs', 'database', '--name', 'run', '--runs-dir', tmp_path
        given = {'DATABASE_URL': url}
        process = start(*command, more_env=given)
        wait_for_checkpoint(tmp_path/'run', process)
        kernels = process.children(recursive=True)
        process.kill()
        process.wait()
        left = psutil.wait_procs(kernels, timeout=3)[1]   # a kernel looks for its parent every second
        assert kernels and not left, 'the kernel of a killed run has not ended'
        output = call(*command, more_env=given)
    assert output.count('unchanged, skipped') == 1, f'only the table is read again:\n{output}'
    secrets = [s.encode() for s in (password, quote(password), url)]
    leaks = [p.name for p in tmp_path.rglob('*') if p.is_file() and any(s in p.read_bytes() for s in secrets)]
    assert not leaks, f"the password is in {', '.join(leaks)}"
    only_demo = {'truth', 'truth_intervals', 'demo_version'}  # a table knows no true correlations
    both = tiny.metrics, read_metrics(tmp_path/'run')
    gap = difference(*({k: v for k, v in m.items() if k not in only_demo} for m in both))
    assert gap <= 1e-6, f'the metrics differ from those of the demo, by {gap:.2g}'

@pytest.mark.seconds(70)
def test_two_processes(tiny, tmp_path):
    "Training under `accelerate launch` with two processes (DDP), killed and continued, gives the losses of one process"
    run = shutil.copytree(tiny.run, tmp_path/'two')   # its rows and index are the same
    half = '-p', 'per_device_train_batch_size', '4'  # twice 4 rows are the profile's 8
    same = ('--profile', 'tiny', *half, '--runs-dir', tmp_path, '--name', 'two')
    launch = (bin/'accelerate', 'launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1',
              '--mixed_precision', 'no', '--dynamo_backend', 'no', '-m', 'corrnb.launch', run)
    assert call(bin/'corrnb', 'index', *same).count('unchanged, skipped') == 2
    process = start(*launch)
    wait_for_checkpoint(run, process)
    family = [process, *process.children(recursive=True)]  # the trainings have sessions of their own
    for p in family:
        with contextlib.suppress(psutil.NoSuchProcess): p.kill()
    psutil.wait_procs(family)
    assert not (run/'stages'/'train.json').exists(), 'killed too late'
    call(*launch)
    assert call(bin/'corrnb', 'run', *same).count('unchanged, skipped') == 3, 'the launched training did not count'
    gap = difference(tiny.metrics, read_metrics(run))
    assert gap <= 1e-4, f'two processes gave other metrics, by {gap:.2g}'

@pytest.mark.seconds(25)
@pytest.mark.parametrize('page', ['index.ipynb', 'tutorials/getting_started.ipynb'])
def test_page_runs(tiny, tmp_path, page):
    "The cells of README and getting started run, with the tiny model"
    execute(page, tmp_path, profile='tiny', runs_dir=tiny.runs)
