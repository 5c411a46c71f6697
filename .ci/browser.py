"""Tests in a browser: `browser.py site` clicks through the documentation in _docs, `browser.py page` asks on the page
of `corrnb serve`, `browser.py lab [NOTEBOOK ...]` works in JupyterLab, `browser.py titles` looks there at titles full
of markup. `--pictures FOLDER` keeps what was seen.
Drives the system's Chromium with Playwright."""
import argparse
import functools
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

root = Path(__file__).resolve().parents[1]
WIDE, NARROW = dict(width=1280, height=900), dict(width=390, height=844)
SEEN = {'home': 'index.html', 'api': '14_answers.html', 'tutorial': 'tutorials/getting_started.html',
        'benchmark': 'benchmarks/learning.html'}
SEARCHED = ('AnswerGrid', 'soft_targets', 'train', 'related', 'forecasts', 'pair_correlations', 'Book.hedges')
# what `lab` runs unless told otherwise
SHORT = ('pipeline/prepare.ipynb', 'pipeline/index.ipynb', '13_prompts.ipynb', '14_answers.ipynb')


@contextmanager
def chromium():
    "A browser that reaches this machine only"
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not path: sys.exit('no Chromium here: this test needs one (on Debian: apt-get install chromium)')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=['--no-sandbox'])  # containers run as root
        try: yield browser
        finally: browser.close()

def new_page(browser, size, errors):
    "An empty page; errors of its scripts go into `errors`"
    page = browser.new_context(viewport=size).new_page()
    page.route(re.compile(r'^https?://(?!(127\.0\.0\.1|localhost)[:/])'), lambda route: route.abort())
    page.on('pageerror', lambda e: errors.append(f'{page.url}: {e}'))
    page.set_default_timeout(30_000)
    return page

@contextmanager
def served(folder):
    "The address at which a folder is served"
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally: server.shutdown()


LAYOUT = """() => {
    const wide = document.scrollingElement.scrollWidth - window.innerWidth;
    const images = [...document.querySelectorAll("main img")].filter(i => !i.complete || !i.naturalWidth).length;
    const cut = [...document.querySelectorAll("main pre, main table")].filter(e => {
        for (let p = e; p && p.tagName != "MAIN"; p = p.parentElement)
            if (["auto", "scroll"].includes(getComputedStyle(p).overflowX)) return false;
        const right = document.querySelector("main").getBoundingClientRect().right;
        return e.getBoundingClientRect().right > right + 2 }).length;
    return {wide, images, cut, title: document.querySelector("h1")?.innerText} }"""

# cells of code, in lines of at most 120 columns, that the page shows in more lines than they have
WRAPPED = """() => [...document.querySelectorAll("main pre.cell-code > code")].filter(code => {
    if (Math.max(...code.textContent.split("\\n").map(line => line.length)) > 120) return false;
    const height = code.getBoundingClientRect().height;
    code.style.whiteSpace = "pre";
    const plain = code.getBoundingClientRect().height;
    code.style.whiteSpace = "";
    return height > plain + 1 }).map(code => code.textContent.slice(0, 60)) """

def check_layout(page, url, pages):
    "Every page has a title, all its pictures, and nothing that sticks out; what is wrong"
    for name in pages:
        page.goto(f'{url}/{name}')
        page.wait_for_load_state('load')
        found = page.evaluate(LAYOUT)
        where = f'{name} at {page.viewport_size["width"]} px'
        if not found['title']: yield f'{where}: no title'
        if found['wide'] > 1: yield f'{where}: wider than the window by {found["wide"]} px'
        if found['images']: yield f'{where}: {found["images"]} pictures missing'
        if found['cut']: yield f'{where}: {found["cut"]} blocks stick out'
        if page.viewport_size == WIDE: yield from (f'{where}: code wraps: {code!r}' for code in page.evaluate(WRAPPED))

def first_hit(page, word):
    "Title of what the search finds first"
    box, hits = page.locator('input[type=search]:visible').first, page.locator('.search-result-title:visible')
    box.fill('')
    hits.first.wait_for(state='hidden')
    box.fill(word)
    hits.first.wait_for()
    return hits.first.inner_text()

def check_search(page, url, names):
    "The search finds functions before what mentions them; what is wrong"
    page.goto(f'{url}/index.html')
    for name in names:
        hit = first_hit(page, name)
        if hit.lower() != name.lower(): yield f'the search for {name} finds {hit!r} first'

def click_through(page, url, narrow):
    "By way of the sidebar to a tutorial, by way of the search to a function"
    page.goto(f'{url}/index.html')
    if narrow: page.locator('.quarto-btn-toggle, .sd-sidebar-toggle, [data-bs-target*="sidebar"]').first.click()
    page.locator('#quarto-sidebar').get_by_role('link', name='Getting started').click()
    page.wait_for_url('**/tutorials/getting_started.html')
    assert 'Getting started' in page.locator('h1').inner_text()
    if narrow: page.locator('.navbar-toggler').first.click()
    box = page.locator('input[type=search]:visible').first
    box.fill('soft_targets')
    hit = page.locator('.search-result, .aa-Item a').first
    hit.wait_for()
    assert 'soft_targets' in page.locator('.smalldocs-search-results:visible, .aa-Panel').first.inner_text()
    hit.click()
    page.wait_for_load_state('load')
    assert 'soft_targets' in page.locator('main').inner_text(), f'{page.url} does not mention what was searched'
    return page.url.removeprefix(url)

def test_site(pictures=None):
    "Layout of every page and a walk through the site, on a desk and on a phone"
    folder, errors, problems = root/'_docs', [], []
    pages = sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*.html'))
    assert pages, 'no site in _docs: make docs'
    with chromium() as browser, served(folder) as url:
        for size in (WIDE, NARROW):
            page = new_page(browser, size, errors)
            problems += check_layout(page, url, pages)
            if size is WIDE: problems += check_search(page, url, SEARCHED)
            print(f"{size['width']} px: {len(pages)} pages; search led to {click_through(page, url, size is NARROW)}")
            for name, path in SEEN.items() if pictures else ():
                page.goto(f'{url}/{path}')
                page.screenshot(path=Path(pictures)/f"{name}-{size['width']}.png")
    assert not problems + errors, '\n'.join(problems + errors)


def free_port():
    "A port that nobody listens on"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@contextmanager
def jupyter_lab(folder, home):
    "The address of a JupyterLab on a folder, with settings of its own"
    port = free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {'HF_HUB_OFFLINE': '1', 'PYTHONPATH': str(root), 'PATH': path}
    env |= {f'JUPYTER_{name}_DIR': str(home/name) for name in ('CONFIG', 'DATA', 'RUNTIME')}
    env |= {f'JUPYTERLAB_{name}_DIR': str(home/name) for name in ('SETTINGS', 'WORKSPACES')}
    command = [sys.executable, '-m', 'jupyter', 'lab', str(folder), '--no-browser', '--allow-root', f'--port={port}',
               '--ServerApp.port_retries=0', '--IdentityProvider.token=test']
    log = (home/'lab.log').open('w')
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        for _ in range(240):
            assert process.poll() is None, f'JupyterLab did not start:\n{(home/"lab.log").read_text()}'
            with socket.socket() as s:
                if not s.connect_ex(('127.0.0.1', port)): break
            time.sleep(0.5)
        yield f'http://127.0.0.1:{port}', 'token=test'
    finally:
        os.killpg(process.pid, 15)
        process.wait()
        log.close()

def clear(notebook):
    "Take outputs and execution counts out of a notebook"
    nb = json.loads(notebook.read_text())
    for cell in nb['cells']:
        if cell['cell_type'] == 'code': cell.update(outputs=[], execution_count=None)
    notebook.write_text(json.dumps(nb))

def open_notebook(page, lab, folder, path):
    "A notebook without outputs in a JupyterLab window of its own, its kernel ready; its cells"
    clear(folder/path)
    url, token = lab
    page.goto(f'{url}/lab/workspaces/{Path(path).stem}/tree/{path}?{token}', timeout=120_000)
    cells = page.locator('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook-cell')
    cells.first.wait_for(timeout=120_000)
    page.get_by_text(re.compile(r'\| Idle$')).first.wait_for(timeout=120_000)
    return cells

def set_parameter(page, cell, old, new):
    "Change a line of a cell as a person would: click into it, select all, type the changed text"
    text = cell.locator('.cm-content')
    source = '\n'.join(text.locator('.cm-line').all_inner_texts())
    assert old in source, f'no line {old!r} in the cell of parameters'
    text.click()
    page.keyboard.press('Control+a')
    page.keyboard.insert_text(source.replace(old, new))

def saved(notebook):
    "Cells of a notebook as it was saved last; waits while JupyterLab is writing it"
    while True:
        try: return json.loads(notebook.read_text())['cells']
        except json.JSONDecodeError: time.sleep(0.2)

def outputs(cells, kind):
    "Errors ('error') or what went to stderr ('stderr') in the outputs of cells: number of the cell and text"
    for i, cell in enumerate(cells):
        for o in cell.get('outputs', ()):
            if o['output_type'] == kind == 'error': yield f"cell {i}: {o['ename']}: {o['evalue']}"
            elif o.get('name') == kind: yield f"cell {i}: {''.join(o['text']).strip()}"

def run_all(page, notebook, timeout=900):
    "Run > Run All Cells, and save until every cell has run or one has failed; the errors"
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
    end = time.time() + timeout
    while time.time() < end:
        page.wait_for_timeout(1000)
        page.keyboard.press('Control+s')
        errors = list(outputs(cells := saved(notebook), 'error'))
        code = [c for c in cells if c['cell_type'] == 'code' and ''.join(c['source']).strip()]
        if errors or all(c['execution_count'] for c in code): return errors
    return [f'not done after {timeout} s']

def shut_down(browser, lab):
    "End the kernels of all notebooks"
    (url, token), request = lab, browser.new_context().request
    for session in request.get(f'{url}/api/sessions?{token}').json():
        request.delete(f"{url}/api/sessions/{session['id']}?{token}")

def run_notebooks(browser, lab, folder, notebooks, pictures=None):
    "Notebooks from top to bottom, each as it is opened for the first time; errors, of stages also warnings"
    for path in notebooks:
        page, start = new_page(browser, dict(width=1400, height=1000), []), time.time()
        open_notebook(page, lab, folder, path)
        errors = run_all(page, folder/path)
        said = list(outputs(saved(folder/path), 'stderr'))
        print(f'{path}: {time.time()-start:.0f} s', *errors, *said, sep='\n    ', flush=True)
        if pictures: page.screenshot(path=Path(pictures)/f"lab-{path.replace('/', '-').removesuffix('.ipynb')}.png")
        page.context.close()
        shut_down(browser, lab)
        yield from (f'{path}, {problem}' for problem in errors + (said if path.startswith('pipeline/') else []))

def too_early(browser, lab, folder):
    "A stage that is opened before the first one says which comes first"
    page, path = new_page(browser, dict(width=1400, height=1000), []), 'pipeline/index.ipynb'
    open_notebook(page, lab, folder, path)
    found = run_all(page, folder/path)
    assert 'run prepare.ipynb first' in ''.join(found), f'{path} was opened first, with the error: {found}'
    page.context.close()
    shut_down(browser, lab)

def change_and_run(browser, lab, folder, pictures=None):
    "Open a pipeline notebook, change a parameter, run all cells: does the table that it shows know the change?"
    page, path = new_page(browser, dict(width=1400, height=1000), []), 'pipeline/prepare.ipynb'
    cells = open_notebook(page, lab, folder, path)
    set_parameter(page, cells.filter(has_text='run_dir: str').first, 'limit: int = 96 ', 'limit: int = 31 ')
    assert not (found := run_all(page, folder/path)), '\n'.join(found)
    assert 'limit: int = 31' in (folder/path).read_text(), 'the changed notebook was not saved'
    table = cells.filter(has_text='split_report').locator('.jp-RenderedHTMLCommon table')
    assert re.search(r'\b31\b', table.inner_text()), f'the table does not know the new limit:\n{table.inner_text()}'
    table.scroll_into_view_if_needed()
    if pictures: page.screenshot(path=Path(pictures)/'lab.png')
    print(f'{path} with limit 31 ran to the end')

def test_lab(pictures=None, notebooks=()):
    "In JupyterLab: open a stage too early, run notebooks as they are, change a parameter of the first stage and run it"
    library = sorted(p.name for p in (root/'nbs').glob('[0-9][0-9]_*.ipynb'))
    pipeline = [f'pipeline/{name}.ipynb' for name in ('prepare', 'index', 'train', 'evaluate')]
    notebooks = pipeline + library if 'all' in notebooks else notebooks or SHORT
    with tempfile.TemporaryDirectory() as tmp, chromium() as browser:
        copy, home = Path(tmp)/'nbs', Path(tmp)/'home'
        home.mkdir()
        shutil.copytree(root/'nbs', copy, ignore=shutil.ignore_patterns('runs', '.ipynb_checkpoints'))
        with jupyter_lab(copy, home) as lab:
            too_early(browser, lab, copy)
            problems = list(run_notebooks(browser, lab, copy, notebooks, pictures))
            change_and_run(browser, lab, copy, pictures)
    assert not problems, '\n'.join(problems)


# what a page of JupyterLab has made of markup: formulas, and elements that only a title asks for
RENDERED = """() => {
    const inside = what => [...document.querySelectorAll(`.jp-OutputArea :is(${what})`)];
    const formulas = inside("mjx-container, .MathJax, .MathJax_Preview").length;
    const asked = inside("script, marquee, img[src=x], a[href*=example], strong, code, .ansi-red-fg");
    const made = asked.filter(e => e.tagName != "A" || e.innerText == "link");   // an address is a link by itself
    const elements = made.map(e => e.outerHTML.slice(0, 80));
    return {formulas, elements,
            text: inside("pre, td, li").map(e => e.textContent).join(" ")} }"""
# the same titles without protection, which shows that the check can fail
UNSAFE = [dict(output_type='display_data', metadata={}, data={kind: ['costs $1 or $2 **bold** <marquee>up</marquee>']})
          for kind in ('text/html', 'text/markdown')]

def all_at_once(home):
    "Have JupyterLab show all cells of a notebook, also those out of sight"
    settings = home/'SETTINGS'/'@jupyterlab'/'notebook-extension'/'tracker.jupyterlab-settings'
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(dict(windowingMode='none')))

def shown(browser, lab, notebook):
    "What JupyterLab shows of a notebook that has been executed and is trusted"
    errors = []
    page, (url, token) = new_page(browser, dict(width=1400, height=1000), errors), lab
    page.on('dialog', lambda dialog: (errors.append(f'a title ran a script: {dialog.message}'), dialog.dismiss()))
    page.goto(f'{url}/lab/workspaces/{notebook.stem}/tree/{notebook.name}?{token}', timeout=120_000)
    page.locator('.jp-Notebook-cell .jp-OutputArea-output').first.wait_for(timeout=120_000)
    page.wait_for_timeout(3000)   # formulas come last
    found = page.evaluate(RENDERED)
    page.context.close()
    return found, errors

def test_titles(pictures=None):
    "Titles full of markup are text in JupyterLab, in the notebooks of all stages of a run; unprotected they are not"
    from project import MARKUP, bin, call, markup_rows

    from corrnb.data import clean_text
    with tempfile.TemporaryDirectory() as tmp, chromium() as browser:
        home, run = Path(tmp)/'home', Path(tmp)/'runs'/'titles'
        all_at_once(home)
        markup_rows(Path(tmp)/'rows.csv')
        given = '--pairs', Path(tmp)/'rows.csv', '-p', 'comparisons', '', '--name', run.name, '--runs-dir', run.parent
        call(bin/'corrnb', 'run', '--profile', 'tiny', *given)
        unsafe = json.loads((run/'prepare.ipynb').read_text())
        next(c for c in unsafe['cells'] if c['cell_type'] == 'code')['outputs'] += UNSAFE
        (run/'unsafe.ipynb').write_text(json.dumps(unsafe))
        env = {f'JUPYTER_{name}_DIR': str(home/name) for name in ('CONFIG', 'DATA')}
        call(sys.executable, '-m', 'jupyter', 'trust', *run.glob('*.ipynb'), more_env=env)
        with jupyter_lab(run, home) as lab:
            seen = {p.stem: shown(browser, lab, p) for p in sorted(run.glob('*.ipynb'))}
    bad, problems = seen.pop('unsafe')[0], []
    assert bad['formulas'] and bad['elements'], f'JupyterLab renders nothing at all: {bad}'
    for name, (found, errors) in seen.items():
        problems += errors + [f'{name}.ipynb: {what}' for what in found['elements']]
        if found['formulas']: problems.append(f"{name}.ipynb: {found['formulas']} formulas")
    texts = ' '.join(found['text'] for found, _ in seen.values())
    shown_as_text = [text for text in map(clean_text, MARKUP) if text in texts]
    if len(shown_as_text) < 4: problems.append(f'few titles are shown: {shown_as_text}')
    assert not problems, '\n'.join(problems)
    print(f"in {', '.join(seen)}, these are text:", *shown_as_text, sep='\n    ')


@contextmanager
def corrnb_serve(folder):
    "The address of a server with the tiny model"
    from corrnb.testing import toy_run
    port, log = free_port(), folder/'log'
    command = [sys.executable, '-m', 'corrnb', 'serve', '--model', str(toy_run(folder/'run')), '--port', str(port)]
    env = os.environ | {'PYTHONPATH': str(root), 'MODEL_CACHE_DIR': str(folder/'cache')}
    with log.open('w') as output: process = subprocess.Popen(command, stdout=output, stderr=output, env=env, cwd=folder)
    try:
        while 'running on' not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield f'http://127.0.0.1:{port}'
    finally:
        process.terminate()
        process.wait()

def ask_on_page(page, pictures=None):
    "Two titles, then a list of contracts; what is wrong"
    where = f'{page.viewport_size["width"]} px'
    def picture(name):
        if pictures: page.screenshot(path=Path(pictures)/f'{name}-{page.viewport_size["width"]}.png', full_page=True)
    page.get_by_label('First contract').fill('Will it rain?')
    page.get_by_label('Second contract').fill('will it RAIN?')
    page.get_by_role('button', name='Forecast').click()
    if 'same' not in page.get_by_role('alert').first.inner_text(): yield f'{where}: equal titles are not refused'
    page.get_by_label('Second contract').fill('<img src=x onerror="document.title = 1"> by June?')
    page.get_by_role('button', name='Forecast').click()
    page.locator('#plot polygon').wait_for()
    number = page.locator('#number').inner_text().replace('\u2212', '-')
    if not -1 <= float(number) <= 1: yield f'{where}: the forecast is {number}'
    if page.locator('#members tr').count() != 3: yield f'{where}: not every member has a line'
    if not page.locator('#neighbours td.figure').count(): yield f'{where}: no similar pairs'
    picture('pair')
    page.get_by_role('tab', name='A list of contracts').click()
    titles = ['Will <b>gold</b> rise?', '=1+1', *(f'Will it rain in town {i}?' for i in range(18))]
    page.get_by_label('Contracts, one on a line').fill('\n'.join(titles))
    page.get_by_role('button', name='Matrix').click()
    page.get_by_role('button', name='Download CSV').wait_for()
    page.locator('#map').hover(position=dict(x=60, y=60))
    if '|' not in page.locator('#cell').inner_text(): yield f'{where}: pointing at the matrix says nothing'
    with page.expect_download() as download: page.get_by_role('button', name='Download CSV').click()
    lines = Path(download.value.path()).read_text().splitlines()
    if len(lines) != 21 or not lines[2].startswith('"\'=1+1",'): yield f'{where}: the CSV file is not the matrix'
    picture('book')
    if (wide := page.evaluate(LAYOUT)['wide']) > 1: yield f'{where}: wider than the window by {wide} px'
    if page.title() != 'corrnb' or page.locator('main img, body img').count(): yield f'{where}: a title became markup'

def test_page(pictures=None):
    "The page of `corrnb serve`, on a desk and on a phone"
    errors, problems = [], []
    with tempfile.TemporaryDirectory() as folder, corrnb_serve(Path(folder)) as url, chromium() as browser:
        for size in (WIDE, NARROW):
            page = new_page(browser, size, errors)
            asked = []
            page.on('request', lambda r: asked.append(r.url))
            page.goto(url)
            problems += ask_on_page(page, pictures)
            problems += [f'asked {a}' for a in asked if not a.startswith((url, 'blob:'))]
            print(f"{size['width']} px: two titles and a list were asked, in {len(asked)} requests")
    assert not problems + errors, '\n'.join(problems + errors)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    sub = parser.add_subparsers(dest='test', required=True)
    site, lab = sub.add_parser('site', help='click through _docs'), sub.add_parser('lab', help='work in JupyterLab')
    lab.add_argument('notebooks', nargs='*', metavar='NOTEBOOK',
                     help=f"to run, relative to nbs, or 'all' of pipeline and library (default: {' '.join(SHORT)})")
    titles = sub.add_parser('titles', help='look at titles full of markup in JupyterLab')
    page = sub.add_parser('page', help='ask on the page of `corrnb serve`')
    for p in (site, lab, titles, page):
        p.add_argument('--pictures', metavar='FOLDER', help='keep pictures of what was seen')
    args = vars(parser.parse_args())
    if args['pictures']: Path(args['pictures']).mkdir(parents=True, exist_ok=True)
    tests = dict(site=test_site, lab=test_lab, titles=test_titles, page=test_page)
    try: tests[args.pop('test')](**args)
    except AssertionError as e: sys.exit(f'FAILED {e}')
    print('ok')
