"Installs corrnb; everything about the project is said in settings.ini"
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser()
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
readme = here/'README.md'
extras = 'cpu', 'gpu', 'api', 'ray', 'tensorboard', 'mlflow', 'dev', 'docs'
notebooks = 'corrnb.stage_notebooks'  # a folder beside the modules of a wheel; editable installs read nbs/pipeline

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    python_requires=f">={cfg['min_python']}",
    packages=[*find_packages(include=['corrnb*']), notebooks],
    package_dir={notebooks: 'nbs/pipeline'},
    package_data={notebooks: ['*.ipynb', 'profiles/*.yaml'],
                  cfg['lib_path']: ['py.typed', 'page.html', 'report.html.j2']},
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in extras},
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
)
