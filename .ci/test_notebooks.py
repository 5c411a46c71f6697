"Every notebook of the library is a test, and what is made from notebooks is up to date"
import pytest
from nbdev.doclinks import nbglob
from project import bin, call, contents, project_copy, root, run_notebook, same

tested = [f for f in nbglob(root/'nbs', as_path=True) if not (f.parent/'.notest').exists()]
notebooks = sorted(f.relative_to(root).as_posix() for f in tested)


@pytest.mark.parametrize('notebook', notebooks[::-1])  # the later ones use the earlier ones and take longer
@pytest.mark.seconds(15)
def test_notebook(notebook, tmp_path):
    "All cells of a notebook run"
    run_notebook(notebook, tmp_path/'log')

def test_export_is_in_sync(tmp_path):
    "corrnb/*.py is what the notebooks export"
    copy = project_copy(tmp_path)
    for module in (copy/'corrnb').glob('*.py'):
        if not module.name.startswith('__'): module.unlink()  # a module whose notebook is gone does not come back
    call(bin/'nbdev_export', cwd=copy)
    same(contents(root/'corrnb', '*.py'), contents(copy/'corrnb', '*.py'), 'run nbdev_export')

def test_notebooks_are_clean(tmp_path):
    "nbdev_clean changes no notebook"
    copy = project_copy(tmp_path)
    call(bin/'nbdev_clean', cwd=copy)
    same(contents(root/'nbs', '*.ipynb'), contents(copy/'nbs', '*.ipynb'), 'run nbdev_clean')
