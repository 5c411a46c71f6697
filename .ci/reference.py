"""The reference of the library on its site, read from the modules' source: for each public function and class a
signature, the docstring and a table of parameters, fields and methods, with the comments that stand behind them."""
import ast
import html
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef
PROPERTIES = {'property', 'cached_property'}


@dataclass
class Row:
    "A line of a table: a parameter, a field or what is returned"
    name: str
    type: str = ''
    default: str = ''
    text: str = ''


def comments(source: str) -> dict[int, str]:
    "Comments by line; one that goes on in the next lines is one comment"
    lines = source.splitlines()
    found: dict[int, tuple[str, int]] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT: continue
        line, text = token.start[0], token.string.lstrip('#').strip()
        alone = lines[line-1].lstrip().startswith('#')
        above = next((start for start, (_, end) in found.items() if end == line - 1), None) if alone else None
        if above is None: found[line] = text, line
        else: found[above] = f'{found[above][0]} {text}', line
    return {line: text for line, (text, _) in found.items()}

def unparsed(node: ast.AST | None) -> str: return '' if node is None else ast.unparse(node)

def type_of(node: ast.AST | None) -> str:
    "An annotation as text; of `Annotated` the type alone"
    if isinstance(node, ast.Subscript) and unparsed(node.value) == 'Annotated': return unparsed(node.slice.elts[0])
    return unparsed(node)

def parameters(function: Function, comment: dict[int, str]) -> list[Row]:
    "Rows of a function's parameters, and of what it returns"
    a, last = function.args, {}
    positional = [*a.posonlyargs, *a.args]
    defaults = dict(zip([p.arg for p in positional[::-1]], a.defaults[::-1]))
    defaults |= {p.arg: d for p, d in zip(a.kwonlyargs, a.kw_defaults) if d is not None}
    named = [(p.arg, p) for p in positional] + [('*' + p.arg, p) for p in [a.vararg] if p]
    if a.kwonlyargs and not a.vararg: named.append(('*', a.kwonlyargs[0]))
    named += [(p.arg, p) for p in a.kwonlyargs] + [('**' + p.arg, p) for p in [a.kwarg] if p]
    for name, p in named: last[p.lineno] = name        # a comment belongs to the last that stands in its line
    if function.returns: last[function.returns.lineno] = 'Returns'
    def text(name, line): return comment.get(line, '') if last.get(line) == name else ''
    rows = [Row(n) if n == '*' else Row(n, type_of(p.annotation), unparsed(defaults.get(p.arg)), text(n, p.lineno))
            for n, p in named]
    if function.returns and unparsed(function.returns) != 'None':
        rows.append(Row('Returns', unparsed(function.returns), '', text('Returns', function.returns.lineno)))
    return rows

def default(value: ast.AST | None) -> tuple[str, str]:
    "The default that an assigned value stands for, and its description where pydantic's `Field` has one"
    if not isinstance(value, ast.Call): return unparsed(value), ''
    given = {k.arg: k.value for k in value.keywords}
    if unparsed(value.func) == 'field':
        factory = given.get('default_factory')
        return unparsed(given['default']) if 'default' in given else f'{unparsed(factory)}()' if factory else '', ''
    if unparsed(value.func) == 'mapped_column': return '', ''
    if unparsed(value.func) != 'Field': return unparsed(value), ''
    described = given.get('description')
    text = str(described.value) if isinstance(described, ast.Constant) else ''
    if value.args: return unparsed(value.args[0]).replace('...', ''), text
    factory = given.get('default_factory', given.get('default'))
    return unparsed(factory.body if isinstance(factory, ast.Lambda) else factory), text

def fields(cls: ast.ClassDef, comment: dict[int, str], alone: set[int]) -> list[Row]:
    "Rows of a class's annotated fields; their comments stand behind them or `alone` in the line above"
    rows = []
    for node in cls.body:
        if not isinstance(node, ast.AnnAssign) or unparsed(node.target).startswith('_'): continue
        value, described = default(node.value)
        above = node.lineno - 1 in alone
        lines = range(node.lineno - above, (node.end_lineno or node.lineno) + 1)
        text = described or ' '.join(comment[i] for i in lines if i in comment)
        rows.append(Row(unparsed(node.target), type_of(node.annotation), value, text))
    return rows

def decorators(node: Definition) -> set[str]: return {unparsed(d) for d in node.decorator_list}

def wrapped(name: str, parts: list[str], most: int = 88) -> str:
    "`name(parts)` on as few lines as fit"
    line = f"{name}({', '.join(parts)})"
    if len(line) <= most: return line
    lines = ['']
    for part in parts:
        if lines[-1] and len(lines[-1]) + len(part) + 2 > most - 4: lines.append('')
        lines[-1] += (' ' if lines[-1] else '') + part + ','
    return f'{name}(\n' + '\n'.join('    ' + x for x in lines).rstrip(',') + '\n)'


@dataclass
class Room:
    "A module: what it defines, and what it imports from others"
    path: Path

    @property
    def name(self) -> str: return self.path.stem

    @cached_property
    def source(self) -> str: return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module: return ast.parse(self.source)

    @cached_property
    def comments(self) -> dict[int, str]: return comments(self.source)

    @cached_property
    def alone(self) -> set[int]:
        "Lines that hold a comment and nothing else"
        return {i for i, line in enumerate(self.source.splitlines(), 1) if line.lstrip().startswith('#')}

    @cached_property
    def imports(self) -> dict[str, str]:
        "Rooms of the names that the module imports"
        return imports(self.tree)

    @cached_property
    def definitions(self) -> dict[str, Definition]:
        "Public functions, classes and patched methods (`Class.method`) by name, in the order of the source"
        found = {}
        for node in self.tree.body:
            if not isinstance(node, Function | ast.ClassDef): continue
            patched = 'patch' in {d.split('(')[0] for d in decorators(node)}
            of = f'{unparsed(node.args.args[0].annotation)}.' if patched else ''
            if not node.name.startswith('_') or patched and node.name.startswith('__'): found[of + node.name] = node
        return found

    def methods(self, cls: ast.ClassDef) -> Iterator[Function]:
        "Public methods in the body of a class, and of those with a double underscore the documented"
        for node in cls.body:
            if not isinstance(node, Function): continue
            if not node.name.startswith('_') or node.name == '__call__' and ast.get_docstring(node): yield node

    def rows(self, node: Definition, method: bool) -> list[Row]:
        "Rows of the parameters of a function or class"
        if not isinstance(node, ast.ClassDef):
            rows = parameters(node, self.comments)
            return rows[1:] if method and 'staticmethod' not in decorators(node) else rows
        init = next((n for n in node.body if isinstance(n, Function) and n.name == '__init__'), None)
        made = [] if init is None else parameters(init, self.comments)[1:]
        return [row for row in made if row.name != 'Returns'] + fields(node, self.comments, self.alone)

def imports(tree: ast.AST) -> dict[str, str]:
    "Rooms of the names that are imported anywhere in a syntax tree"
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom): continue
        if of := re.fullmatch(r'(?:\.|corrnb\.)(\w+)', '.'*node.level + (node.module or '')):
            found |= {alias.asname or alias.name: of[1] for alias in node.names}
    return found


class Reference:
    "What the site says of every public name of a package"
    def __init__(self, folder: Path, git_url: str):
        self.rooms = {p.stem: Room(p) for p in sorted(folder.glob('[a-z]*.py'))}
        self.git_url, self.folder = git_url, folder

    def names(self) -> Iterator[tuple[str, str]]:
        "Room and name of all that has an entry"
        for room in self.rooms.values(): yield from ((room.name, name) for name in room.definitions)

    def has_table(self, room: str, name: str) -> bool:
        "Does a name have parameters, fields or a result to tell about?"
        return any(r.type or r.default or r.text
                   for r in self.rooms[room].rows(self.rooms[room].definitions[name], '.' in name))

    def find(self, name: str, room: str, imported: dict[str, str], cls: str = '') -> tuple[str, str] | None:
        "Room and full name of what a word in backticks means where it stands; None where that is open"
        own = self.rooms[room].definitions if room in self.rooms else {}
        if f'{cls}.{name}' in own: return room, f'{cls}.{name}'
        if name in own: return room, name
        if len(methods := [n for n in own if n.endswith(f'.{name}')]) == 1: return room, methods[0]
        start = name.split('.')[0]
        if start in imported: rooms = [imported[start]]
        else: rooms = list(self.rooms)
        rooms = [r for r in rooms if r in self.rooms and name in self.rooms[r].definitions]
        return (rooms[0], name) if len(rooms) == 1 else None

    def linked(self, text: str, room: str, cls: str, pages: dict[str, str]) -> str:
        "A comment as HTML, what stands in backticks as code, linked where it is a name of the package"
        def link(m): return self.link(m[1], f'<code>{m[1]}</code>', room, cls, pages)
        return re.sub(r'`([^`]+)`', link, html.escape(text, quote=False))

    def link(self, name: str, shown: str, room: str, cls: str, pages: dict[str, str]) -> str:
        "A name as a link to its entry, or as it is where it has none"
        found = self.find(name.removesuffix('()'), room, self.rooms[room].imports, cls)
        return f'<a href="{pages[found[0]]}.html#{".".join(found)}">{shown}</a>' if found else shown

    def table(self, rows: list[Row], room: str, cls: str, pages: dict[str, str]) -> str:
        "Rows as an HTML table, without columns that are empty"
        columns = [c for c in ('type', 'default', 'text') if any(getattr(row, c) for row in rows)]
        if not columns: return ''
        lines = []
        def type_link(m): return self.link(m[0], m[0], room, '', pages)
        for row in [r for r in rows if r.name != '*']:
            cells = dict(type=re.sub(r'\b[A-Z]\w+', type_link, code(row.type)), default=code(row.default),
                         text=self.linked(row.text, room, cls, pages))
            name = '<strong>Returns</strong>' if row.name == 'Returns' else code(row.name)
            lines.append([name, *(cells[c] for c in columns)])
        return html_table(lines, ['name', *(dict(text='what it is').get(c, c) for c in columns)])

    def methods(self, room: Room, name: str, cls: ast.ClassDef, pages: dict[str, str]) -> str:
        "The methods in the body of a class, a line each"
        lines, ids = [], []
        for node in room.methods(cls):
            names = [row.name for row in room.rows(node, True) if row.name not in ('Returns', '*')]
            call = node.name if PROPERTIES & decorators(node) else f"{node.name}({', '.join(names)})"
            lines.append([code(call), self.linked(first(node), room.name, name, pages)])
            ids.append(f'{room.name}.{name}.{node.name}')
        return html_table(lines, ['method', 'what it does'], ids) if lines else ''

    def signature(self, room: Room, name: str, node: Definition) -> str:
        "How a function is called or a class is made"
        rows = [row for row in room.rows(node, '.' in name) if row.name != 'Returns']
        parts = [f'{row.name}={row.default}' if row.default else row.name for row in rows]
        if not isinstance(node, ast.ClassDef):
            prefix = 'async ' if isinstance(node, ast.AsyncFunctionDef) else ''
            return prefix + (name if PROPERTIES & decorators(node) else wrapped(name, parts))
        bases = ', '.join(map(unparsed, node.bases))
        return f'class {name}({bases})' if bases else 'class ' + wrapped(name, parts)

    def markdown(self, room_name: str, name: str, pages: dict[str, str]) -> str:
        "All about a name: link to the source, heading, signature, docstring, tables"
        room = self.rooms[room_name]
        node = room.definitions[name]
        source = f'{self.git_url}/blob/main/{self.folder.name}/{room.path.name}#L{node.lineno}'
        doc = (ast.get_docstring(node) or '').split('\n\n', 1)
        cls = name.split('.')[0] if '.' in name or isinstance(node, ast.ClassDef) else ''
        parts = [f'---\n\n[source]({source}){{target="_blank" style="float:right; font-size:smaller"}}',
                 f'### {name} {{#{room_name}.{name}}}', f'```python\n{self.signature(room, name, node)}\n```']
        if doc[0]: parts += [f'*{doc[0].strip()}*', *doc[1:]]
        parts.append(self.table(room.rows(node, '.' in name), room_name, cls, pages))
        if isinstance(node, ast.ClassDef): parts.append(self.methods(room, name, node, pages))
        return '\n\n'.join(p for p in parts if p)

    def summary(self, room_name: str, names: list[str], pages: dict[str, str]) -> str:
        "Names of a page with the first sentence of each, folded away"
        def line(name):
            text = self.linked(first(self.rooms[room_name].definitions[name]), room_name, name.split('.')[0], pages)
            return [f'<a href="#{room_name}.{name}">{code(name)}</a>', text]
        return ('<details class="contents"><summary>Functions and classes on this page</summary>\n'
                f'{html_table([line(name) for name in names])}\n</details>')

    def entry(self, room_name: str, name: str) -> str:
        "What the search knows of a name: its docstring and its parameters"
        room, node = self.rooms[room_name], self.rooms[room_name].definitions[name]
        rows = room.rows(node, '.' in name)
        return ' '.join([ast.get_docstring(node) or '', *(f'{row.name}: {row.text};' for row in rows if row.text)])

def first(node: Definition) -> str: return (ast.get_docstring(node) or '').split('\n\n')[0]

def code(text: str) -> str: return f'<code>{html.escape(text, quote=False)}</code>' if text else ''

def html_table(lines: list[list[str]], head: list[str] | None = None, ids: list[str] | None = None) -> str:
    "Cells of HTML as a table; no empty line, which would end it in Markdown"
    def row(cells, tag): return ''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)
    made = [f'<tr id="{i}">' if i else '<tr>' for i in ids or [''] * len(lines)]
    body = '\n'.join(f'{tr}{row(cells, "td")}</tr>' for tr, cells in zip(made, lines))
    top = f'<thead><tr>{row(head, "th")}</tr></thead>\n' if head else ''
    return f'<table class="parameters">\n{top}<tbody>\n{body}\n</tbody>\n</table>'
