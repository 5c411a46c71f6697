"""The documentation site, made from the notebooks: `docs.py [FOLDER]` builds it in _docs (or FOLDER) and checks its
pages and links. Quarto renders it where it is installed, otherwise smalldocs, which reads the same _quarto.yml."""
import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import yaml
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

root = Path(__file__).resolve().parents[1]
EXECUTED = {'export', 'exports', 'exporti', 'exec_doc'}  # cells that define what is documented
# what smalldocs warns of on every page that nbdev makes
EXPECTED = 'output-file is not read|format commonmark is not built|html-math-method is ignored'


def process():
    "Notebooks as pages, in _proc: nbdev_proc_nbs, without its installing Quarto where there is none"
    import nbdev.quarto
    from nbdev import processors
    from nbdev.config import get_config
    nbdev.quarto._ensure_quarto = lambda: None
    executes = processors._do_eval  # nbdev also executes tests that import something, without the cells that they need
    def only_exported(cell):
        return executes(cell) and (EXECUTED & set(cell.directives_) or processors._is_showdoc(cell))
    processors._do_eval = only_exported
    shutil.rmtree(root/'_proc', ignore_errors=True)  # else a page whose notebook is gone would stay
    nbdev.quarto.nbdev_proc_nbs.__wrapped__(n_workers=0)
    join_streams(root/'_proc')
    cfg = get_config()
    links_between_pages(root/'_proc', f'{cfg.doc_host}{cfg.doc_baseurl}')

def join_streams(folder):
    "What a cell printed bit by bit is one block on its page, as in Jupyter"
    join = CoalesceStreamsPreprocessor()
    for page in folder.rglob('*.ipynb'): nbformat.write(join.preprocess(nbformat.read(page, 4), {})[0], page)

def links_between_pages(folder, site):
    "nbdev links names to the published site; link them to the pages of this build"
    pages = {re.sub(r'^\d+_', '', p.stem): p.name for p in folder.glob('*.ipynb')}
    for page in folder.rglob('*.ipynb'):
        up = '../'*(len(page.relative_to(folder).parts) - 1)
        text = re.sub(rf'\[(`_\w+`)\]\({re.escape(site)}[^)]*\)', r'\1', page.read_text())  # private: has no heading
        page.write_text(re.sub(rf'{re.escape(site)}/(\w+)\.html', lambda m: up + pages[m[1]], text))

def render(folder):
    "The site, in `folder`; the names of what made it"
    quarto = shutil.which('quarto')
    command = [quarto, 'render'] if quarto else [sys.executable, '-m', 'smalldocs.cli', 'render', '.']
    done = subprocess.run(command, cwd=root/'_proc', stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = [line for line in done.stdout.splitlines() if 'warning' in line.lower()]
    warnings = [line for line in lines if not re.search(EXPECTED, line)]
    if done.returncode or (warnings and not quarto): sys.exit('\n'.join([done.stdout] if done.returncode else warnings))
    if not quarto: formulas(root/'_proc'/'_docs')
    shutil.rmtree(folder, ignore_errors=True)
    shutil.move(root/'_proc'/'_docs', folder)
    return 'Quarto' if quarto else 'smalldocs'

def formulas(folder):
    "TeX as MathML, which browsers show by themselves; smalldocs would load KaTeX from the network"
    from latex2mathml.converter import convert
    display = dict(display='block', inline='inline')
    def mathml(m): return m[1] + convert(html.unescape(m[3])[2:-2], display=display[m[2]]) + '</span>'
    for page in folder.rglob('*.html'):
        text = re.sub(r'(<span class="math (inline|display)">)(.*?)</span>', mathml, page.read_text(), flags=re.S)
        page.write_text(re.sub(r'<link [^>]*katex[^>]*>|<script [^>]*katex[^>]*></script>', '', text))


class Page(HTMLParser):
    "Ids, links and text of an HTML page"
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.text = set(), [], []
        source = path.read_text()
        self.errors = [word for word in ('cell-output-error', 'Traceback (most recent') if word in source]
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[name] for name in ('id', 'name') if attrs.get(name)}
        self.links += [attrs[name] for name in ('href', 'src') if attrs.get(name)]
        if tag in ('script', 'img', 'iframe') or (tag == 'link' and 'stylesheet' in attrs.get('rel', '')):
            loaded = attrs.get('src') or attrs.get('href') or ''
            if re.match('https?:|//', loaded): self.errors.append(f'loads {loaded}')

    def handle_data(self, data): self.text.append(data)

def source_problem(link, repo):
    "What is wrong with a link to the source on GitHub, if anything"
    m = re.fullmatch(rf'{re.escape(repo)}/(blob|edit|tree)/main/([^#]+)(?:#L(\d+))?', link)
    if not m:
        return None if link == repo or link.startswith(f'{repo}/issues') else 'not of the form REPO/blob/main/FILE#LINE'
    path = root/m[2]
    if not path.exists(): return 'no such file'
    if not m[3]: return None
    line = path.read_text().splitlines()[int(m[3])-1]
    if not re.match(r'\s*(def|class|async def|@|\w+\s*[:=]|_repr|for )', line): return 'that line defines nothing'

def link_problems(folder, repo):
    "One line for each broken link of the site"
    pages = {p: Page(p) for p in folder.rglob('*.html')}
    for path, page in pages.items():
        name = path.relative_to(folder)
        yield from (f'{name}: {e}' for e in page.errors)
        if re.search(r'\b0%\| +\|', ' '.join(page.text)): yield f'{name}: a progress bar that stands at 0 %'
        if found := re.search(r'(?<![\w.])/(home|root|work|Users)/\w+', ' '.join(page.text)):
            yield f'{name}: the path of a machine, {found[0]}'
        for link in page.links:
            parts = urlsplit(link)
            if link.startswith(repo):
                if problem := source_problem(link, repo): yield f'{name}: {link}: {problem}'
            elif parts.scheme or parts.netloc: continue
            else:
                target = (path.parent/unquote(parts.path)).resolve() if parts.path else path
                if target.is_dir(): target = target/'index.html'
                if not target.exists(): yield f'{name}: {link} leads nowhere'
                elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                    yield f'{name}: {link}: no such heading'

def sidebar_pages(contents):
    "Paths of the pages in a sidebar's contents"
    for item in contents:
        if isinstance(item, str): yield item
        else: yield from sidebar_pages(item.get('contents', [])) if 'contents' in item else [item['href']]

def missing_pages():
    "Notebooks that the sidebar of _quarto.yml lacks"
    listed = set(sidebar_pages(yaml.safe_load((root/'_quarto.yml').read_text())['website']['sidebar']['contents']))
    return sorted({p.relative_to(root/'_proc').as_posix() for p in (root/'_proc').rglob('*.ipynb')} - listed)

def lost_text():
    "Notebooks with text in the cell of their title: nbdev takes title and description from it and drops the rest"
    for path in sorted((root/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in path.parts: continue
        cells = json.loads(path.read_text())['cells']
        cells = [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']
        title = next((c for c in cells if re.search(r'(?m)^# ', c)), '')
        if re.sub(r'(?m)^(# |> |- \S+:).*', '', title).strip(): yield path.relative_to(root).as_posix()

def build(folder=root/'_docs'):
    "Build and check the site; how many pages and what made it. AssertionError with what is wrong"
    from nbdev.config import get_config
    os.chdir(root)
    process()
    made_by = render(folder)
    problems = [f'{p} is not in the sidebar of _quarto.yml' for p in missing_pages()]
    problems += [f'{p}: the site drops the text below the title; it needs a cell of its own' for p in lost_text()]
    problems += sorted(set(link_problems(folder, get_config().git_url)))
    assert not problems, '\n'.join(problems)
    return len(list(folder.rglob('*.html'))), made_by

if __name__ == '__main__':
    try: n, made_by = build(*(Path(a).resolve() for a in sys.argv[1:]))
    except AssertionError as e: sys.exit(str(e))
    print(f'{n} pages by {made_by}, links checked: {"_docs/index.html" if not sys.argv[1:] else sys.argv[1]}')
