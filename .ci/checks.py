"""What `make test` checks: all library notebooks, that everything made from notebooks is up to date, whole runs of the
pipeline with the tiny model, from the embedded market and from PostgreSQL, that the tutorials and the README's code run, and the documentation site. Its last line is `N passed, N failed`, with
`, N skipped` behind it where something could not be run. `checks.py readme` writes README.md (`make readme`)."""
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path
from unittest import SkipTest
from urllib.parse import quote

import nbformat
import psutil
import yaml
from nbconvert import MarkdownExporter
from nbdev.doclinks import nbglob
from traitlets.config import Config

root = Path(__file__).resolve().parents[1]
bin = Path(sys.executable).parent
one_thread = {f'{lib}_NUM_THREADS': '1' for lib in ('OMP', 'MKL', 'OPENBLAS')}
env = os.environ | one_thread | {'TOKENIZERS_PARALLELISM': 'false', 'HF_HUB_OFFLINE': '1', 'CUDA_VISIBLE_DEVICES': '',
                                 'PATH': f"{bin}{os.pathsep}{os.environ['PATH']}"}
for name in ('DATABASE_URL', 'PGHOST', 'PGDATABASE', 'MODEL_NAME', 'USE_4BIT', 'RAG_TOP_K', 'MAX_NEW_TOKENS', 'TEMPERATURE'): env.pop(name, None)
images = Path('nbs/images/readme')  # where pictures of the README are kept
tiny_runs = tempfile.TemporaryDirectory()  # the run with the tiny model, which several checks read


def call(*args, cwd=root, more_env={}, **kwargs):
    "Run a command, its output kept for the error message"
    done = subprocess.run([str(a) for a in args], cwd=cwd, env=env | more_env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    if done.returncode: raise AssertionError(f"`{' '.join(map(str, args))}` failed:\n{done.stdout}")
    return done.stdout

def project_copy(folder):
    "Copy what notebooks are exported from and to, so that a check changes nothing here"
    for name in ('nbs', 'corrnb'): shutil.copytree(root/name, folder/name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('settings.ini', '_quarto.yml'): shutil.copy(root/name, folder/name)
    return folder

def contents(folder, pattern):
    "Content of the files below a folder, by name"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob(pattern)) if '.ipynb_checkpoints' not in p.parts}

def same(here, made, advice):
    "Fail, naming the files, where two sets of files differ"
    differ = sorted(n for n in here.keys() | made.keys() if here.get(n) != made.get(n))
    assert not differ, f"{', '.join(differ)} out of date: {advice}"

def source_only(cell):
    "Take quarto's directives out of a code cell; `echo: false` hides its source"
    lines = cell.source.splitlines()
    directives = [line for line in lines if line.startswith('#|')]
    if any(re.fullmatch(r'#\|\s*echo:\s*false', d) for d in directives): cell.metadata['tags'] = ['no-source']
    cell.source = '\n'.join(line for line in lines if line not in directives).strip('\n')

def render_readme():
    "Text and pictures of the README, from nbs/index.ipynb by way of nbdev's documentation filters"
    with tempfile.TemporaryDirectory() as tmp:
        copy = project_copy(Path(tmp))
        ini = copy/'settings.ini'  # links into a documentation site would lead nowhere
        ini.write_text(re.sub(r'(?m)^skip_procs\s*=.*$', 'skip_procs = add_links', ini.read_text()))
        call(sys.executable, '-c', r"from nbdev.serve import proc_nbs; proc_nbs(n_workers=0, skip_file_re=r'^(?!index\.ipynb)')", cwd=copy)
        nb = nbformat.read(copy/'_proc'/'index.ipynb', as_version=4)
    front = yaml.safe_load(nb.cells.pop(0).source.strip().strip('-'))
    for cell in nb.cells:
        if cell.cell_type == 'code': source_only(cell)
    nb.metadata['language_info'] = {'name': 'python'}  # nbdev_clean takes it away
    tags = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags=['no-source']))
    text, resources = MarkdownExporter(config=tags).from_notebook_node(nb, resources=dict(output_files_dir=images.as_posix(), unique_key='index'))
    text = re.sub(r'(\]\(|src=")(?=images/|[\w/-]+\.ipynb)', r'\1nbs/', text)  # pages are notebooks in nbs
    text = re.sub(r'\n{3,}', '\n\n', re.sub(r'(?m)^[ \t]+$', '', f"# {front['title']}\n\n> {front['description']}\n\n{text}"))
    return text.strip() + '\n', {Path(name).name: data for name, data in resources.get('outputs', {}).items()}

def write_readme():
    "README.md and its pictures"
    text, pictures = render_readme()
    shutil.rmtree(root/images, ignore_errors=True)
    for name, data in pictures.items():
        (root/images).mkdir(parents=True, exist_ok=True)
        (root/images/name).write_bytes(data)
    (root/'README.md').write_text(text)


def export_is_in_sync():
    "corrnb/*.py is what the notebooks export"
    with tempfile.TemporaryDirectory() as tmp:
        copy = project_copy(Path(tmp))
        call(bin/'nbdev_export', cwd=copy)
        same(contents(root/'corrnb', '*.py'), contents(copy/'corrnb', '*.py'), 'run nbdev_export')

def notebooks_are_clean():
    "nbdev_clean changes no notebook"
    with tempfile.TemporaryDirectory() as tmp:
        copy = project_copy(Path(tmp))
        call(bin/'nbdev_clean', cwd=copy)
        same(contents(root/'nbs', '*.ipynb'), contents(copy/'nbs', '*.ipynb'), 'run nbdev_clean')

def readme_is_in_sync():
    "README.md is what nbs/index.ipynb says"
    text, pictures = render_readme()
    readme = root/'README.md'
    here = {'README.md': readme.read_bytes() if readme.exists() else b''} | contents(root/images, '*.png')
    same(here, {'README.md': text.encode()} | pictures, 'run make readme')

def difference(a, b):
    "Largest difference of the numbers in two JSON values; infinity where they differ otherwise"
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys(): return max((difference(a[k], b[k]) for k in a), default=0)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b): return max(map(difference, a, b), default=0)
    number = (int, float)
    if isinstance(a, number) and isinstance(b, number): return abs(a - b)/max(1, abs(a), abs(b))  # limits of R2 on few rows are in the thousands
    return 0 if a == b else float('inf')

def read_metrics(run):
    "Metrics of a run folder, without what it cost: no two runs take the same time"
    metrics = json.loads((run/'metrics.json').read_text())
    assert metrics.pop('cost')['seconds_per_query']['model'] > 0
    return metrics

demo_metrics = {}  # of the run in `pipeline_runs`

def kill_while_training(run, *command):
    "Start a command and kill it as soon as the run has a complete checkpoint"
    process = subprocess.Popen([str(a) for a in command], cwd=root, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(run.glob('checkpoints/*/complete.json')):
        assert process.poll() is None, 'the run ended without a checkpoint'
        time.sleep(0.05)
    process.kill()
    process.wait()

def pipeline_runs():
    "One whole run with the tiny model, about a minute; typed again it has nothing to do; afresh, killed and continued it gives the same metrics"
    start = time.time()
    call(sys.executable, '-c', 'import corrnb.inference')  # three of the four stages are mostly this: a yardstick for slow machines
    limit = max(60, 12*(time.time() - start))
    tmp = tiny_runs.name
    start = time.time()
    print(call(bin/'corrnb', 'run', '--profile', 'tiny', '--runs-dir', tmp), end='')
    seconds, run = time.time() - start, next(Path(tmp).iterdir())
    wanted = ['params.json', 'metrics.json', 'predictions.parquet', 'report.html', 'training_cost.json',
              *(f'{s}.ipynb' for s in ('prepare', 'index', 'train', 'evaluate')),
              *(f'model/{f}' for f in ('adapter_config.json', 'adapter_model.safetensors', 'metrics.json'))]
    print(f'pipeline with the tiny model: {seconds:.0f} s')
    missing = [name for name in wanted if not (run/name).exists()]
    assert not missing, f"not in the run folder: {', '.join(missing)}"
    assert seconds < limit, f'took {seconds:.0f} s, more than {limit:.0f} s'
    assert call(bin/'corrnb', 'run', '--profile', 'tiny', '--runs-dir', tmp).count('unchanged, skipped') == 4, 'the second run did something'
    before = read_metrics(run)
    demo_metrics.update(before)
    kill_while_training(run, bin/'corrnb', 'run', '--profile', 'tiny', '--runs-dir', tmp, '--fresh')
    output = call(bin/'corrnb', 'run', '--profile', 'tiny', '--runs-dir', tmp)
    assert output.count('unchanged, skipped') == 2, f'the killed run did not go on with its training:\n{output}'
    gap = difference(before, read_metrics(run))
    assert gap <= 1e-6, f'the same seed, killed and continued, gave other metrics, by {gap:.2g}'

def pipeline_reads_postgres():
    "The same run from a PostgreSQL table gives the same metrics and writes the password nowhere"
    from corrnb.demo import write_demo
    from corrnb.schema import make_engine
    from corrnb.testing import test_server
    with test_server() as server, tempfile.TemporaryDirectory() as tmp:
        url = server.new_database()
        write_demo(make_engine(url))
        call(bin/'corrnb', 'run', '--profile', 'tiny', '-p', 'pairs', 'database', '--runs-dir', tmp, more_env={'DATABASE_URL': url})
        password = make_engine(url).url.password
        leaks = [p.name for p in Path(tmp).rglob('*') if p.is_file() and any(s.encode() in p.read_bytes() for s in (password, quote(password), url))]
        assert not leaks, f"the password is in {', '.join(leaks)}"
        metrics = read_metrics(next(Path(tmp).glob('*/metrics.json')).parent)
    only_demo = {'truth', 'truth_intervals', 'demo_version'}  # a table knows no true correlations
    gap = difference(*({k: v for k, v in m.items() if k not in only_demo} for m in (demo_metrics, metrics)))
    assert gap <= 1e-6, f'the metrics differ from those of the demo, by {gap:.2g}'

def everything(*folders):
    "Content and time of the files below folders, but for locks and the record of the last command"
    return {p: (p.stat().st_mtime, p.read_bytes()) for f in folders for p in f.rglob('*') if p.is_file() and p.name not in ('.lock', 'params.json')}

sweep_metrics, reported = {}, set()  # of the runs in `sweep_goes_on`

def sweep_goes_on():
    "A sweep killed half-way and typed again repeats nothing that was done, and what it leaves can be moved"
    installed = [t for t in ('tensorboard', 'mlflow') if util.find_spec(t)]
    values = ['-p', 'regression_loss_weight', '0,10', *(['-p', 'report_to', ','.join(installed)] if installed else [])]
    with tempfile.TemporaryDirectory() as tmp:
        sweep = Path(tmp)/'sweep'
        command = [bin/'corrnb', 'sweep', '--profile', 'tiny', '--name', 'sweep', '--runs-dir', tmp, *values]
        kill_while_training(sweep/'runs'/'regression_loss_weight=10', *command)
        parts = sweep/'base', sweep/'runs'/'regression_loss_weight=0'
        done = everything(*parts)
        assert parts[1]/'stages'/'evaluate.json' in done, 'killed too early'
        output = call(*command)
        assert done == everything(*parts), 'a finished part of the sweep was done again'
        assert output.count('unchanged, skipped') == 2 and '2/2' in output, output
        runs = {p.name: p for p in (sweep/'runs').iterdir()}
        sweep_metrics.update({name: read_metrics(p) for name, p in runs.items()})
        reported.update(t for t in installed if all(list(p.glob(f'{t}*')) for p in runs.values()))
        moved = sweep.rename(Path(tmp)/'moved')
        (moved/'compare.html').unlink()
        call(bin/'corrnb', 'compare', moved)
        assert 'regression_loss_weight' in (moved/'compare.html').read_text()
        leaks = [p.name for p in moved.glob('*.*') if str(sweep).encode() in p.read_bytes()]
        assert not leaks, f"the old place of the sweep is in {', '.join(leaks)}"

def training_reports():
    "Training reports to TensorBoard and MLflow, into the run folder"
    if missing := [t for t in ('tensorboard', 'mlflow') if not util.find_spec(t)]: raise SkipTest(f"not installed: {', '.join(missing)}")
    assert reported == {'tensorboard', 'mlflow'}, f'only {reported} have logs'

def sweep_with_ray():
    "Runs of a sweep side by side in Ray give the metrics of one after the other"
    if not util.find_spec('ray'): raise SkipTest('not installed: ray')
    with tempfile.TemporaryDirectory() as tmp:
        call(bin/'corrnb', 'sweep', '--profile', 'tiny', '--name', 'ray', '--runs-dir', tmp, '--workers', '2', '-p', 'regression_loss_weight', '0,10')
        metrics = {p.name: read_metrics(p) for p in Path(tmp).glob('ray/runs/*')}
    gap = difference(metrics, sweep_metrics)
    assert gap <= 1e-6, f'the metrics differ, by {gap:.2g}'

def kill_launch(run, command):
    "Start training in two processes and kill all that belongs to it as soon as the run has a complete checkpoint"
    process = psutil.Popen([str(a) for a in command], cwd=root, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(run.glob('checkpoints/*/complete.json')):
        assert process.poll() is None, 'the launch ended without a checkpoint'
        time.sleep(0.05)
    family = [process, *process.children(recursive=True)]  # the trainings have sessions of their own
    for p in family:
        with contextlib.suppress(psutil.NoSuchProcess): p.kill()
    psutil.wait_procs(family)

def two_processes_train():
    "The train stage under `accelerate launch` with two processes (DDP), killed and continued with weights spread over them (FSDP), gives the losses of one process"
    if not demo_metrics: raise SkipTest('the run of one process failed')
    def launch(*way):
        return (bin/'accelerate', 'launch', *way, '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no',
                '-m', 'corrnb.launch', run)
    with tempfile.TemporaryDirectory() as tmp:
        same = ('--profile', 'tiny', '-p', 'per_device_train_batch_size', '4', '--runs-dir', tmp, '--name', 'two')     # twice 4 rows are the profile's 8
        run = Path(tmp)/'two'
        call(bin/'corrnb', 'index', *same)
        kill_launch(run, launch('--multi_gpu'))
        call(*launch('--use_fsdp', '--fsdp_version', '2'))
        assert 'FSDP: each of 2 processes' in (run/'train.ipynb').read_text(), 'the weights were not spread'
        assert call(bin/'corrnb', 'run', *same).count('unchanged, skipped') == 3, 'the launched training did not count'
        gap = difference(demo_metrics, read_metrics(run))
    assert gap <= 1e-4, f'two processes gave other metrics, by {gap:.2g}'

def h100_benchmark_runs():
    "The benchmark of the H100 with a tiny model on a CPU: every kind of part leaves its figures, and typed again it measures nothing"
    with tempfile.TemporaryDirectory() as tmp:
        command = (sys.executable, root/'nbs/benchmarks/h100.py', tmp, '--tiny', '--minutes', '60', 'nf4', 'merged', 'trl')
        call(*command)
        before = {p.name: p.read_bytes() for p in Path(tmp).glob('*.json')}
        call(*command)
        assert before == {p.name: p.read_bytes() for p in Path(tmp).glob('*.json')}, 'it measured again what it had'
        found = {f['what']: f for text in before.values() for f in json.loads(text)['figures']}
    wanted = ('hybrid training at 16 rows, nf4', 'rows evaluated, nf4', 'one query, p50, nf4', 'one query, p50, merged')
    missing = [what for what in wanted if not found.get(what, {}).get('value')]
    assert not missing and any(what.startswith('whole training') for what in found), f"no figures: {', '.join(missing)}"
    trl = found['corrnb / TRL, tokens/s']      # a figure, or the reason why there is none
    assert trl['value'] or 'pip install trl' in trl['note'], trl

def execute(notebook, **parameters):
    "Run a page's cells from top to bottom as papermill does, SkipTest where it asks for what this machine lacks"
    given = [x for name, value in parameters.items() for x in ('-p', name, value)]
    with tempfile.TemporaryDirectory() as tmp:
        try: call(bin/'papermill', root/'nbs'/notebook, Path(tmp)/'out.ipynb', '--cwd', tmp, '--kernel', 'python3', '--no-progress-bar', *given)
        except AssertionError as e:
            if skipped := re.search(r'SkipTest: (.*)', str(e)): raise SkipTest(skipped[1])
            raise

def readme_code_runs():
    "The cells of README and getting started run, with the tiny model"
    for page in ('index.ipynb', 'tutorials/getting_started.ipynb'): execute(page, profile='tiny', runs_dir=tiny_runs.name)

def tutorial_runs():
    "The tutorial from an empty PostgreSQL database to a prediction runs"
    execute('tutorials/own_table_own_prices.ipynb')

def site_is_whole():
    "The documentation builds, with every page in its sidebar and no broken link"
    with tempfile.TemporaryDirectory() as tmp: print(call(sys.executable, '-W', 'ignore', '.ci/docs.py', Path(tmp)/'site').splitlines()[-1])

def broken_links_are_found():
    "The check of the site's links finds what is wrong on a bad page, and nothing else"
    from docs import link_problems
    repo = 'https://github.com/corrnb/corrnb'
    good = f'<h1 id="a">A</h1> <a href="#a">A</a> <a href="{repo}/blob/main/LICENSE">L</a>'
    bad = ['<a href="b.html">', '<a href="#b">', '<img src="https://example.org/a.png">', f'<a href="{repo}/blob/main/corrnb/no.py#L3">',
           f'<a href="{repo}/blob/main/corrnb/config.py#L1">', '/home/someone', '<pre class="cell-output-error">', 'predict:   0%|          | 0/5']
    with tempfile.TemporaryDirectory() as tmp:
        page = Path(tmp)/'page.html'
        for html, expected in [(good, 0), *((good + b, 1) for b in bad)]:
            page.write_text(html)
            found = list(link_problems(Path(tmp), repo))
            assert len(found) == expected, f'{html}: {found}'

def shell_lines(text):
    "Commands in the sh blocks of a Markdown text, without comments"
    for block in re.findall(r'```sh\n(.*?)```', text, re.S): yield from (line for line in block.splitlines() if shlex.split(line, comments=True))

def commands_exist():
    "Every corrnb and make command on a page is one"
    from corrnb.cli import _parser
    targets, wrong = set(re.findall(r'(?m)^([a-z-]+):', (root/'Makefile').read_text())), []
    pages = [p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    for page in pages:
        for line in shell_lines('\n'.join(c.source for c in nbformat.read(page, 4).cells if c.cell_type == 'markdown')):
            words = shlex.split(line, comments=True)
            if '/' in words[0]: words[0] = Path(words[0]).name
            if words[0] == 'make' and not {w for w in words[1:] if '=' not in w} <= targets: wrong.append(f'{page.name}: {line}')
            if words[0] != 'corrnb': continue
            with contextlib.redirect_stderr(io.StringIO()) as said:
                try: _parser().parse_args(words[1:])
                except SystemExit: wrong.append(f'{page.name}: {line}: {said.getvalue().splitlines()[-1]}')
    assert not wrong, '\n'.join(wrong)


def test_notebooks():
    "Names of the library notebooks that pass and that fail"
    names = [f.name for f in nbglob(root/'nbs', as_path=True) if not (f.parent/'.notest').exists()]
    command = [str(bin/'nbdev_test'), '--n_workers', '2', '--timing', '--do_print']
    process = subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout:
        print(line, end='', flush=True)
        lines.append(line.strip())
    title = 'nbdev Tests Failed On The Following Notebooks:'
    failed = [name for name in names if title in lines and name in lines[lines.index(title):]]
    if process.wait() and not failed: failed = names  # it did not get as far as testing
    return [name for name in names if name not in failed], failed

def run_check(f):
    "Run a check; did it pass? None: it could not be run"
    start = time.time()
    try: f()
    except SkipTest as e: return print(f'SKIPPED {f.__doc__}: {e}', flush=True)
    except Exception as e: return print(f'FAILED  {f.__doc__}: {e}', flush=True) or False
    return print(f'ok      {f.__doc__} ({time.time()-start:.0f} s)', flush=True) or True

def main():
    passed, failed = test_notebooks()
    results = [run_check(f) for f in (export_is_in_sync, notebooks_are_clean, readme_is_in_sync, commands_exist, broken_links_are_found, pipeline_runs)]
    with ThreadPoolExecutor(2) as pool:
        results += pool.map(run_check, (sweep_goes_on, site_is_whole, two_processes_train, pipeline_reads_postgres, h100_benchmark_runs, tutorial_runs, readme_code_runs))
    results += [run_check(f) for f in (training_reports, sweep_with_ray)]   # of the sweep
    n_passed, n_failed, n_skipped = len(passed) + results.count(True), len(failed) + results.count(False), results.count(None)
    print(f'{n_passed} passed, {n_failed} failed' + (f', {n_skipped} skipped' if n_skipped else ''))
    return n_failed > 0

if __name__ == '__main__': sys.exit(write_readme() if sys.argv[1:] == ['readme'] else main())
