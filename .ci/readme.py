"README.md from nbs/index.ipynb: `make readme`"
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
import yaml
from nbconvert import MarkdownExporter
from project import call, project_copy, root
from traitlets.config import Config

images = Path('nbs/images/readme')  # where pictures of the README are kept


def source_only(cell):
    "Take quarto's directives out of a code cell; `echo: false` hides its source"
    lines = cell.source.splitlines()
    directives = [line for line in lines if line.startswith('#|')]
    if any(re.fullmatch(r'#\|\s*echo:\s*false', d) for d in directives): cell.metadata['tags'] = ['no-source']
    cell.source = '\n'.join(line for line in lines if line not in directives).strip('\n')

def render():
    "Text and pictures of the README, by way of nbdev's documentation filters"
    with tempfile.TemporaryDirectory() as tmp:
        copy = project_copy(Path(tmp))
        ini = copy/'settings.ini'  # links into a documentation site would lead nowhere
        ini.write_text(re.sub(r'(?m)^skip_procs\s*=.*$', 'skip_procs = add_links', ini.read_text()))
        only_index = r"from nbdev.serve import proc_nbs; proc_nbs(n_workers=0, skip_file_re=r'^(?!index\.ipynb)')"
        call(sys.executable, '-c', only_index, cwd=copy)
        nb = nbformat.read(copy/'_proc'/'index.ipynb', as_version=4)
    front = yaml.safe_load(nb.cells.pop(0).source.strip().strip('-'))
    for cell in nb.cells:
        if cell.cell_type == 'code': source_only(cell)
    nb.metadata['language_info'] = {'name': 'python'}  # nbdev_clean takes it away
    tags = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags=['no-source']))
    resources = dict(output_files_dir=images.as_posix(), unique_key='index')
    text, resources = MarkdownExporter(config=tags).from_notebook_node(nb, resources=resources)
    text = re.sub(r'(\]\(|src=")(?=images/|[\w/-]+\.ipynb)', r'\1nbs/', text)  # pages are notebooks in nbs
    text = re.sub(r'(?m)^[ \t]+$', '', f"# {front['title']}\n\n> {front['description']}\n\n{text}")
    pictures = {Path(name).name: data for name, data in resources.get('outputs', {}).items()}
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', pictures

def write():
    "README.md and its pictures"
    text, pictures = render()
    shutil.rmtree(root/images, ignore_errors=True)
    for name, data in pictures.items():
        (root/images).mkdir(parents=True, exist_ok=True)
        (root/images/name).write_bytes(data)
    (root/'README.md').write_text(text)

if __name__ == '__main__': write()
