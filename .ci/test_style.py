"Rules that the source keeps, and that their checks find what breaks them"
import ast
import json
import re
import sys

import pytest
from IPython.core.inputtransformer2 import TransformerManager
from project import bin, call, pages, root

modules = {p.stem: p for p in sorted((root/'corrnb').glob('*.py')) if not p.name.startswith('_')}
numbers = dict(p.stem.split('_', 1)[::-1] for p in (root/'nbs').glob('[0-9][0-9]*_*.ipynb'))   # as text: 05, 05a, 06
typed = ['files', 'splits', 'parameters', 'manifests', 'batches', 'comparisons', 'baselines', 'intervals', 'plots',
         'stages', 'notebooks', 'testing', 'relations', 'bounds', 'related', 'book', 'blocks', 'api', 'summary', 'live',
         'past', 'as_of', 'quotes', 'questions']


def code_cells(notebook):
    "Sources of a notebook's code cells, but for that of the parameters"
    cells = [c for c in json.loads(notebook.read_text())['cells'] if c['cell_type'] == 'code']
    return [''.join(c['source']) for c in cells if 'parameters' not in c['metadata'].get('tags', [])]

def sources():
    "Name and syntax tree of modules, scripts and notebooks, and the room that a file belongs to"
    scripts = [*sorted((root/'nbs').rglob('*.py')), *sorted((root/'.ci').glob('*.py'))]
    for p in [*modules.values(), *scripts]:
        yield p.relative_to(root).as_posix(), ast.parse(p.read_text()), '' if p in scripts else p.stem
    plain = TransformerManager().transform_cell  # %magic and !command are no Python
    for p in pages():
        name = p.stem.split('_', 1)[-1]
        room = name if name in numbers and p.parent == root/'nbs' else ''
        yield p.relative_to(root).as_posix(), ast.parse('\n'.join(plain(cell) for cell in code_cells(p))), room

def imports(tree):
    "Imports of rooms: room, imported name (None: the room itself), name here"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            of = '.'*node.level + (node.module or '')
            for a in node.names:
                if of in ('.', 'corrnb'): yield a.name, None, a.asname or a.name
                elif m := re.fullmatch(r'(?:\.|corrnb\.)(\w+)', of): yield m[1], a.name, a.asname or a.name
        if isinstance(node, ast.Import):
            yield from ((m[1], None, a.asname) for a in node.names if (m := re.fullmatch(r'corrnb\.(\w+)', a.name)))

def upward(room, tree):
    "Rooms with larger numbers that a room imports"
    return sorted({other for other, _, _ in imports(tree) if numbers.get(other, '') > numbers[room]})

def is_private(name): return bool(re.match('_[^_]', name or ''))

def private_uses(tree, room=''):
    "Private names of other rooms: imported, as an attribute of the module, or in a text that says what to patch"
    found = {f'{other}.{name}' for other, name, _ in imports(tree) if is_private(name)}
    aliases = {here: other for other, name, here in imports(tree) if name is None and here and other in numbers}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            of = ast.unparse(node.value)
            if of in aliases: found.add(f'{aliases[of]}.{node.attr}')
            elif m := re.fullmatch(r'corrnb\.(\w+)', of): found.add(f'{m[1]}.{node.attr}')
        if isinstance(node, ast.Constant) and (m := re.fullmatch(r'corrnb\.(\w+\._[^_]\w*)', str(node.value))):
            found.add(m[1])
    return sorted(name for name in found if name.split('.')[0] != room)

def long_functions(tree, most=40):
    "Functions with more lines"
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef|ast.AsyncFunctionDef)]
    return [f'{f.name}: {n} lines' for f in functions if (n := f.end_lineno - f.lineno + 1) > most]

def n_lines(cell):
    "Lines of code of a cell, without comments, blank lines and imports"
    plain = TransformerManager().transform_cell(cell)
    imported = {i for node in ast.walk(ast.parse(plain)) if isinstance(node, ast.Import|ast.ImportFrom)
                for i in range(node.lineno, node.end_lineno + 1)}
    lines = [line.strip() for i, line in enumerate(plain.splitlines(), 1) if i not in imported]
    return sum(bool(line) and not line.startswith('#') for line in lines)

def none(problems): assert not problems, '\n'.join(problems)


@pytest.mark.seconds(10)
def test_ruff():
    "Notebooks and scripts: unused names, order of imports, quotes, lines up to 120 columns"
    call(bin/'ruff', 'check', '--output-format', 'concise', '.')

@pytest.mark.seconds(40)
def test_types():
    "mypy has nothing against the rooms with type hints"
    call(sys.executable, '-m', 'mypy', *(modules[name] for name in typed if name in modules))

def test_columns():
    "No line of the library has more than 120 columns, strings included; nbdev writes `__all__`"
    for name, p in modules.items():
        text = p.read_text()
        made = next(n for n in ast.parse(text).body if isinstance(n, ast.Assign))
        none([f'{name}.py:{i}: {len(line)} columns' for i, line in enumerate(text.splitlines(), 1)
              if len(line) > 120 and not made.lineno <= i <= made.end_lineno])

def test_functions_are_short():
    "No function of the library has more than 40 lines"
    none([f'{name}.py: {f}' for name, p in modules.items() for f in long_functions(ast.parse(p.read_text()))])

def test_cells_of_stages_are_short():
    "No cell of a stage notebook has more than 12 lines of code"
    none([f'{p.name}: {n} lines in the cell that begins with {cell.splitlines()[0]!r}'
          for p in sorted((root/'nbs'/'pipeline').glob('*.ipynb'))
          for cell in code_cells(p) if (n := n_lines(cell)) > 12])

def test_rooms_import_from_smaller_numbers():
    "No room imports one with a larger number"
    none([f'{name} imports {other}' for name, p in modules.items() for other in upward(name, ast.parse(p.read_text()))])

def test_private_names_stay_in_their_room():
    "No private name of a room is used in another, in a script or in a notebook"
    none([f'{name}: {use}' for name, tree, room in sources() for use in private_uses(tree, room)])

@pytest.mark.parametrize('source, found', [
    ('from .cli import main', ['cli']), ('from corrnb.cli import main', ['cli']), ('from . import cli', ['cli']),
    ('import corrnb.cli', ['cli']), ('def f():\n    from corrnb import cli as x', ['cli']),
    ('from .config import Settings\nimport json', [])])
def test_imports_upward_are_found(source, found): assert upward('schema', ast.parse(source)) == found

@pytest.mark.parametrize('source, found', [
    ('from .cli import _x', ['cli._x']), ('from corrnb.cli import _x as x', ['cli._x']),
    ('from corrnb import cli as c\nc._x()', ['cli._x']), ('import corrnb.cli\ncorrnb.cli._x', ['cli._x']),
    ('import corrnb.cli as c\nc._x', ['cli._x']), ('patch("corrnb.cli._x", 1)', ['cli._x']),
    ('from corrnb.schema import _x', []), ('from corrnb.cli import main\nmain.__doc__, self._x', [])])
def test_private_uses_are_found(source, found): assert private_uses(ast.parse(source), 'schema') == found

def test_long_code_is_found():
    "A function of 41 lines, a cell of 13 lines of code"
    body = '    pass\n'
    assert not long_functions(ast.parse('def f():\n' + body*39)) and long_functions(ast.parse('def f():\n' + body*40))
    head = '# comment\n\nimport os\nfrom a import (\n    b,\n)\n%pip list\n'
    assert n_lines(head + 'x\n'*11) == 12
