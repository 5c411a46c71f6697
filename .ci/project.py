"What checks of the project have in common: where things are, commands and their environment, what files and runs hold"
import atexit
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import SkipTest
from unittest.mock import patch

import nbformat
import psutil

root = Path(__file__).resolve().parents[1]
bin = Path(sys.executable).parent
one_thread = {f'{lib}_NUM_THREADS': '1' for lib in ('OMP', 'MKL', 'OPENBLAS')}
env = os.environ | one_thread | {'TOKENIZERS_PARALLELISM': 'false', 'HF_HUB_OFFLINE': '1', 'CUDA_VISIBLE_DEVICES': '',
                                 'PATH': f"{bin}{os.pathsep}{os.environ['PATH']}"}
settings = 'DATABASE_URL PGHOST PGDATABASE MODEL_NAME USE_4BIT RAG_TOP_K MAX_NEW_TOKENS TEMPERATURE ONE_KERNEL'
for name in settings.split(): env.pop(name, None)


def call(*args, cwd=root, env=env, more_env={}):
    "Run a command; its output, which is the message of the AssertionError if it fails"
    done = subprocess.run([str(a) for a in args], cwd=cwd, env=env | more_env,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert not done.returncode, f"`{' '.join(map(str, args))}` failed:\n{done.stdout}"
    return done.stdout

LIBRARIES = ('torch', 'transformers.trainer', 'transformers.models.llama.modeling_llama', 'peft', 'datasets', 'faiss',
             'numba', 'sklearn.covariance', 'sklearn.feature_extraction.text', 'sklearn.model_selection', 'scipy.stats',
             'matplotlib.pyplot', 'pandas', 'pyarrow.parquet', 'sqlalchemy.orm', 'sqlalchemy.dialects.sqlite',
             'pydantic_settings', 'papermill', 'IPython', 'nbdev.test')

def _forked(run, log, *args):
    "In a process of its own: run a function whose output goes into a file"
    for stream in (1, 2): os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = (open(stream, 'w', closefd=False, buffering=1) for stream in (1, 2))
    try: run(*args)
    finally: atexit._run_exitfuncs()   # multiprocessing leaves them out

def forked(run, log, *args):
    "Run a function in a fork of a process that has imported the libraries, once for all; is it well?"
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload(LIBRARIES)
    with patch.dict(os.environ, env, clear=True), contextlib.chdir(root):
        process = server.Process(target=_forked, args=(run, log, *args))
        process.start()
    process.join()
    return process.exitcode == 0

def _test_notebook(notebook):
    from nbdev.test import nbdev_test
    nbdev_test(path=notebook)

def run_notebook(notebook, log):
    "What `nbdev_test` does; AssertionError"
    assert forked(_test_notebook, log, notebook), f'nbdev_test --path {notebook} failed:\n{log.read_text()}'

def _execute(notebook, folder, parameters):
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    from papermill.execute import parameterize_notebook
    from papermill.iorw import load_notebook_node
    nbformat.write(parameterize_notebook(load_notebook_node(str(notebook)), parameters), page := folder/'page.ipynb')
    shell = CaptureShell(folder)
    with contextlib.chdir(folder):
        try: shell.run_all(read_nb(page), exc_stop=True)
        except Exception: sys.exit(shell.prettytb(fname=notebook))

def execute(notebook, folder, **parameters):
    "Run a page's cells from top to bottom; AssertionError; SkipTest where it asks for what this machine lacks"
    log = folder/'log'
    given = {name: str(value) for name, value in parameters.items()}
    if forked(_execute, log, root/'nbs'/notebook, folder, given): return
    if skipped := re.search(r'SkipTest: (.*)', said := log.read_text()): raise SkipTest(skipped[1])
    raise AssertionError(f'{notebook} failed:\n{said}')

def start(*args, cwd=root, output=subprocess.DEVNULL, more_env={}):
    "Start a command"
    return psutil.Popen([str(a) for a in args], cwd=cwd, env=env | more_env, stdout=output, stderr=subprocess.STDOUT)

def wait_for_checkpoint(run, process):
    "Wait until a run that a process is training has a complete checkpoint"
    while not list(run.glob('checkpoints/*/complete.json')):
        assert process.poll() is None, 'the command ended without a checkpoint'
        time.sleep(0.05)

MARKUP = ('<script>alert(1)</script>', 'costs $1 or $2', '**bold** [link](http://example.org)',
          '<marquee>&lt;up&gt;', '$x_1$ and $$y$$', '\\(z\\) `code` <img src=x onerror=alert(2)>', '\x1b[31mred\x1b[0m')

def markup_rows(path):
    "Pairs of the demo in a CSV file, with markup of all kinds in their titles"
    from corrnb.demo import simulate_market, write_demo
    from corrnb.schema import make_engine, read_pairs_table
    engine = make_engine(f'sqlite:///{path.with_suffix(".sqlite")}')
    write_demo(engine, simulate_market())
    pairs = read_pairs_table(engine, 'price_correlation')
    for side in 'ab':
        ids = sorted(pairs[f'contract_{side}_id'].unique())
        more = {c: MARKUP[i % len(MARKUP)] for i, c in enumerate(ids)}
        pairs[f'contract_{side}_title'] = pairs[f'contract_{side}_id'].map(more) + ' ' + pairs[f'contract_{side}_title']
    pairs.to_csv(path, index=False)

def project_copy(folder):
    "Copy what is made from notebooks and what it is made of, so that a check changes nothing here"
    ignore = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'runs')
    for name in ('nbs', 'corrnb'): shutil.copytree(root/name, folder/name, symlinks=True, ignore=ignore)
    files = 'settings.ini', 'setup.py', 'MANIFEST.in', 'README.md', 'LICENSE', '_quarto.yml'
    for name in files: shutil.copy(root/name, folder)
    return folder

def pages():
    "All notebooks of the project"
    return [p for p in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]

def contents(folder, pattern):
    "Content of the files below a folder, by name"
    found = [p for p in sorted(folder.rglob(pattern)) if '.ipynb_checkpoints' not in p.parts]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}

def same(here, made, advice):
    "Fail, naming the files, where two sets of files differ"
    differ = sorted(n for n in here.keys() | made.keys() if here.get(n) != made.get(n))
    assert not differ, f"{', '.join(differ)} out of date: {advice}"

def everything(*folders):
    "Content and time of the files below folders, but for locks, the log and the record of the last command"
    other = '.lock', 'run.log', 'params.json'
    files = [p for f in folders for p in f.rglob('*') if p.is_file() and p.name not in other]
    return {p: (p.stat().st_mtime, p.read_bytes()) for p in files}

def difference(a, b):
    "Largest difference of the numbers in two JSON values, relative above 1; infinity where they differ otherwise"
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return max((difference(a[k], b[k]) for k in a), default=0)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b): return max(map(difference, a, b), default=0)
    number = (int, float)
    if isinstance(a, number) and isinstance(b, number):
        return abs(a - b)/max(1, abs(a), abs(b))  # limits of R2 on few rows are in the thousands
    return 0 if a == b else float('inf')

NO_COMPARISONS = '-p', 'comparisons', '[]'   # two trainings fewer, where a run is only compared with another

def read_metrics(run):
    "Metrics of a run folder, without what it cost: no two runs take the same time"
    metrics = json.loads((run/'metrics.json').read_text())
    assert metrics.pop('cost')['seconds_per_query']['model'] > 0
    return metrics
