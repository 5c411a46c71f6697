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
from nbformat.v4 import new_output
from reference import Reference

root = Path(__file__).resolve().parents[1]
# what smalldocs warns of on every page that nbdev makes
EXPECTED = 'output-file is not read|format commonmark is not built|html-math-method is ignored'


def process():
    "Notebooks as pages, in _proc: nbdev_proc_nbs, without its installing Quarto where there is none"
    import nbdev.quarto
    from nbdev import processors
    from nbdev.config import get_config
    cfg = get_config()
    reference = Reference(root/cfg.lib_path.name, cfg.git_url)
    nbdev.quarto._ensure_quarto = lambda: None
    processors.exec_show_docs = documented_by(reference)   # without it nbdev executes the code of every notebook
    names = processors._def_names
    processors._def_names = lambda cell, shown: names(cell, shown)[::-1]   # nbdev inserts the last one first
    shutil.rmtree(root/'_proc', ignore_errors=True)  # else a page whose notebook is gone would stay
    nbdev.quarto.nbdev_proc_nbs.__wrapped__(n_workers=0)
    join_streams(root/'_proc')
    links_between_pages(root/'_proc', f'{cfg.doc_host}{cfg.doc_baseurl}', reference)
    return reference

def room_of(page):
    "The room that a page of the library is about; '' for other pages"
    return re.sub(r'^\d+[a-z]?_', '', page.stem) if re.match(r'\d', page.name) else ''

def room_pages(folder):
    "Names of the library's pages by room, without suffix"
    return {room_of(p): p.stem for p in sorted(folder.glob('*.ipynb')) if room_of(p)}

def documented_by(reference):
    "The processor that answers nbdev's calls of `show_doc` from the source of the modules"
    from execnb.nbio import mk_cell
    from nbdev.process import Processor
    pages = room_pages(root/'nbs')

    class Documented(Processor):
        def begin(self):
            self.names = [n for cell in self.nb.cells for n in shown_names(cell)]
            self.room = next((m[1] for cell in self.nb.cells
                              if (m := re.search(r'^#\| *default_exp (\w+)', cell.source, re.M))), None)
            if len(self.names) > 2:
                text = reference.summary(self.room, self.names, pages)
                self.nb.cells.insert(2, mk_cell(text, 'markdown'))

        def cell(self, cell):
            if names := list(shown_names(cell)):
                text = '\n\n'.join(reference.markdown(self.room, name, pages) for name in names)
                data = {'text/markdown': text.splitlines(True), 'text/plain': ['']}
                cell.outputs = [new_output('display_data', data=data)]
    return Documented

def shown_names(cell):
    "What a cell of nbdev's shows the documentation of"
    if cell.cell_type == 'code': yield from re.findall(r'^show_doc\(([\w.]+)\)', cell.source, re.M)

def join_streams(folder):
    "What a cell printed bit by bit is one block on its page, as in Jupyter"
    join = CoalesceStreamsPreprocessor()
    for page in folder.rglob('*.ipynb'): nbformat.write(join.preprocess(nbformat.read(page, 4), {})[0], page)

def links_between_pages(folder, site, reference):
    "nbdev links names to the published site, equal names of two rooms to one of them; link them to this build's pages"
    pages = room_pages(folder)
    for page in folder.rglob('*.ipynb'):
        up, text = '../'*(len(page.relative_to(folder).parts) - 1), page.read_text()
        lines = re.findall(r'from corrnb\.(\w+) import ([\w, ]+)', text)
        imported = {name: room for room, names in lines for name in names.split(', ')}
        if room_of(page) in reference.rooms: imported |= reference.rooms[room_of(page)].imports
        def link(m):
            found = reference.find(m[2], room_of(page), imported)
            if not found: return m[1]   # private, or of several rooms
            return f'[{m[1]}]({up}{pages[found[0]]}.ipynb#{".".join(found)})'
        page.write_text(re.sub(rf'\[(`([\w.]+)(?:\(\))?`)\]\({re.escape(site)}[^)]*\)', link, text))

def render(folder, reference):
    "The site, in `folder`; the names of what made it"
    quarto = shutil.which('quarto')
    command = [quarto, 'render'] if quarto else [sys.executable, '-m', 'smalldocs.cli', 'render', '.']
    done = subprocess.run(command, cwd=root/'_proc', stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = [line for line in done.stdout.splitlines() if 'warning' in line.lower()]
    warnings = [line for line in lines if not re.search(EXPECTED, line)]
    if done.returncode or (warnings and not quarto): sys.exit('\n'.join([done.stdout] if done.returncode else warnings))
    if not quarto: formulas(root/'_proc'/'_docs')
    functions_first(root/'_proc'/'_docs', reference)
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


def functions_first(folder, reference):
    "In the index of the search a function's title is its name, and functions stand before what else mentions them"
    entries = json.loads((folder/'search.json').read_text())
    def named(entry):
        room, _, name = entry['href'].partition('#')[2].partition('.')
        return (room, name) if room in reference.rooms and name in reference.rooms[room].definitions else None
    for entry in entries:
        if found := named(entry):
            room, name = found
            entry.update(title=name, section=f'corrnb.{room}.{name}', text=reference.entry(room, name))
    entries.sort(key=lambda entry: (named(entry) is None, entry['title'][:1].isupper()))   # equal hits keep this order
    (folder/'search.json').write_text(json.dumps(entries, ensure_ascii=False, indent=1))


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

def reference_problems(folder, reference):
    "One line for each public name whose entry is missing, has no table of parameters or shows more than it should"
    found = {}
    for path in folder.glob('[0-9]*.html'):
        text = path.read_text()
        if 'Call self as a function' in text: yield f'{path.name}: a function without a docstring, "Call self as ..."'
        entries = re.findall(r'<h3 id="(\w+\.[\w.]+)"(.*?)(?=<h[1-6] |<div id="cell-|\Z)', text, re.S)
        found |= {name: (path.name, entry) for name, entry in entries}
    for room, name in reference.names():
        page, entry = found.get(f'{room}.{name}', (None, ''))
        if page is None:
            yield f'corrnb.{room}.{name} is on no page'
            continue
        signature = re.search(r'<pre.*?</pre>', entry, re.S)
        if not signature or '](' in re.sub('<[^>]+>', '', signature[0]): yield f'{page}: the signature of {name}'
        if reference.has_table(room, name) and '<table' not in entry: yield f'{page}: no parameters of {name}'

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
    reference = process()
    made_by = render(folder, reference)
    problems = [f'{p} is not in the sidebar of _quarto.yml' for p in missing_pages()]
    problems += [f'{p}: the site drops the text below the title; it needs a cell of its own' for p in lost_text()]
    problems += sorted(set(link_problems(folder, get_config().git_url)))
    problems += reference_problems(folder, reference)
    assert not problems, '\n'.join(problems)
    return len(list(folder.rglob('*.html'))), made_by

if __name__ == '__main__':
    try: n, made_by = build(*(Path(a).resolve() for a in sys.argv[1:]))
    except AssertionError as e: sys.exit(str(e))
    print(f'{n} pages by {made_by}, links checked: {"_docs/index.html" if not sys.argv[1:] else sys.argv[1]}')
