"README, tutorials, benchmark and documentation site"
import contextlib
import io
import json
import re
import shlex
import sys
from pathlib import Path
from unittest.mock import patch

import nbformat
import pytest
import readme
import typer
from docs import link_problems, reference_problems
from project import call, contents, execute, pages, root, same
from reference import Reference


def test_readme_is_in_sync():
    "README.md is what nbs/index.ipynb says"
    text, pictures = readme.render()
    file = root/'README.md'
    here = {'README.md': file.read_bytes() if file.exists() else b''} | contents(root/readme.images, '*.png')
    same(here, {'README.md': text.encode()} | pictures, 'run make readme')

@pytest.mark.seconds(20)
def test_site_is_whole(tmp_path):
    "The documentation builds, with every page in its sidebar and no broken link"
    print(call(sys.executable, '-W', 'ignore', '.ci/docs.py', tmp_path/'site').splitlines()[-1])

repo = 'https://github.com/corrnb/corrnb'
good = f'<h1 id="a">A</h1> <a href="#a">A</a> <a href="{repo}/blob/main/LICENSE">L</a>'
bad = ['<a href="b.html">', '<a href="#b">', '<img src="https://example.org/a.png">',
       f'<a href="{repo}/blob/main/corrnb/no.py#L3">', f'<a href="{repo}/blob/main/corrnb/config.py#L1">',
       '/home/someone', '<pre class="cell-output-error">', 'predict:   0%|          | 0/5']

@pytest.mark.parametrize('added', ['', *bad])
def test_broken_links_are_found(tmp_path, added):
    "The check of the site's links finds what is wrong on a bad page, and nothing else"
    (tmp_path/'page.html').write_text(good + added)
    found = list(link_problems(tmp_path, repo))
    assert len(found) == bool(added), found

MODULE = """from .b import g
def f(
    a: int,  # rows, see `g`
    *,
    b: str|None = None   # a name
) -> int:  # how many,
    # of all
    "What it does"
class C:
    "A thing"
    x: Annotated[float, AfterValidator(g)] = 1.5  # its size
    def m(self, y): "A method"
"""
ENTRY = '<h3 id="a.{0}">{0}</h3><pre>{0}()</pre><table></table>'

@pytest.fixture
def reference(tmp_path):
    "The reference of a package of two modules"
    (tmp_path/'a.py').write_text(MODULE)
    (tmp_path/'b.py').write_text('def g(): "Another"')
    return Reference(tmp_path, repo)

def test_reference(reference):
    "An entry shows names, types, defaults and comments, and links what it mentions"
    text = reference.markdown('a', 'f', dict(a='0_a', b='1_b'))
    for part in ('f(a, *, b=None)', '*What it does*', '<code>str | None</code>', '<td>how many, of all</td>',
                 'rows, see <a href="1_b.html#b.g"><code>g</code></a>'): assert part in text, text
    text = reference.markdown('a', 'C', dict(a='0_a', b='1_b'))
    for part in ('class C(x=1.5)', '<td><code>float</code></td>', '<td>its size</td>',
                 '<code>m(y)</code>', 'id="a.C.m"'): assert part in text, text

@pytest.mark.parametrize('old, new, wrong', [
    ('', '', ''), (ENTRY.format('f'), '', 'a.f is on no page'), ('<pre>C()', '<pre>C([x](y.html))', 'signature of C'),
    ('</pre><table></table>', '</pre>', 'no parameters'), ('</pre>', '</pre>Call self as a function.', 'docstring')])
def test_bad_entries_are_found(tmp_path, reference, old, new, wrong):
    "The check of the reference finds what is wrong on a bad page, and nothing else"
    (tmp_path/'0_a.html').write_text((ENTRY.format('f') + ENTRY.format('C')).replace(old, new))
    (tmp_path/'1_b.html').write_text(ENTRY.format('g').replace('"a.', '"b.'))
    found = ' '.join(reference_problems(tmp_path, reference))
    assert wrong in found if wrong else not found, found

def shell_lines(text):
    "Commands in the sh blocks of a Markdown text, without comments"
    for block in re.findall(r'```sh\n(.*?)```', text, re.S):
        yield from (words for line in block.splitlines() if (words := shlex.split(line, comments=True)))

def corrnb_refuses(words):
    "What the command line has against a command, which is parsed and not run; None if nothing"
    from corrnb import cli
    assert any(isinstance(x, typer.Typer) for x in vars(cli).values()), 'the command would run: cli has no typer.Typer'
    nothing = patch('typer.core.TyperCommand.invoke', lambda self, ctx: None)
    with nothing, contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try: code = cli.main(words)
        except SystemExit as e: code = e.code
    return err.getvalue().strip() or f'exit code {code}' if code else None

@pytest.mark.parametrize('command', ['run --profile tiny -p seed 1', 'sweep -p seed=1,2 --workers 2', 'predict A B'])
def test_commands_are_taken(command): assert not corrnb_refuses(command.split())

@pytest.mark.parametrize('command', ['predict A', 'run --profil tiny', 'sweep --workers two', 'walk'])
def test_wrong_commands_are_found(command): assert corrnb_refuses(command.split())

def test_commands_exist():
    "Every corrnb and make command on a page is one"
    targets, wrong = set(re.findall(r'(?m)^([a-z-]+):', (root/'Makefile').read_text())), []
    for page in pages():
        text = '\n'.join(c.source for c in nbformat.read(page, 4).cells if c.cell_type == 'markdown')
        for words in shell_lines(text):
            program, line = Path(words[0]).name, f"{page.name}: {' '.join(words)}"
            if program == 'make' and not {w for w in words[1:] if '=' not in w} <= targets: wrong.append(line)
            if program == 'corrnb' and (refused := corrnb_refuses(words[1:])): wrong.append(f'{line}: {refused}')
    assert not wrong, '\n'.join(wrong)

@pytest.mark.parametrize('name', ['venue_json', 'own_table_own_prices', 'book', 'serve', 'sweep'])
@pytest.mark.seconds(40)
def test_tutorial_runs(tmp_path, name):
    "The tutorials run with the tiny model: venue JSON, PostgreSQL, a book and its hedge, a server, a sweep"
    execute(f'tutorials/{name}.ipynb', tmp_path)

@pytest.mark.seconds(80)
def test_h100_benchmark_runs(tmp_path):
    "The benchmark of the H100 with a tiny model on a CPU: parts leave figures; typed again it measures nothing"
    script = root/'nbs'/'benchmarks'/'h100.py'
    command = (sys.executable, script, tmp_path, '--tiny', 'query', 'nf4', 'trl')
    call(*command)
    before = {p.name: p.read_bytes() for p in tmp_path.glob('*.json')}
    call(*command)
    same(before, {p.name: p.read_bytes() for p in tmp_path.glob('*.json')}, 'it measured again what it had')
    found = {f['what']: f for text in before.values() for f in json.loads(text)['figures']}
    wanted = ('hybrid training at 16 rows, nf4', 'rows evaluated, query', 'one query, p50, query')
    missing = [what for what in wanted if not found.get(what, {}).get('value')]
    assert not missing, f"no figures: {', '.join(missing)}"
    trl = found['corrnb / TRL, tokens/s']  # a figure, or the reason why there is none
    assert trl['value'] or 'pip install trl' in trl['note'], trl
