"A run that travels: moved, without its cache, with titles full of markup and trackers' files, its base model a folder"
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from project import MARKUP, bin, call, markup_rows, root

pytestmark = pytest.mark.xdist_group('travel')
TRACKERS = 'tensorboard', 'mlflow'


class Rendered(HTMLParser):
    "Elements of a page, and texts with dollar signs that a formula may be made of"
    def __init__(self):
        super().__init__()
        self.elements, self.formulas, self.inside, self.text = set(), [], [], ''
    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        self.inside.append('mathjax_ignore' in (dict(attrs).get('class') or ''))
    def handle_endtag(self, tag):
        if self.inside: self.inside.pop()
    def handle_data(self, data):
        self.text += data
        if data.count('$') > 1 and not any(self.inside): self.formulas.append(data)

def rendered(page):
    "What a browser makes of HTML"
    parser = Rendered()
    parser.feed(page)
    return parser

def holding(folder, *texts):
    "Files that hold one of these texts"
    files = [p for p in sorted(folder.rglob('*')) if p.is_file()]
    return [(p.name, text) for p in files for text in texts if text.encode() in p.read_bytes()]

@pytest.fixture(scope='module')
def travelled(tmp_path_factory):
    "A run of pairs with markup in their titles on a base model in a folder, moved and renamed with it: here, there"
    from corrnb.models import load_tokenizer, tiny_model
    here, there = tmp_path_factory.mktemp('here'), tmp_path_factory.mktemp('there')
    work = here/'work'
    tokenizer = load_tokenizer('tiny')
    for save in (tokenizer, tiny_model(len(tokenizer))): save.save_pretrained(work/'base')
    markup_rows(work/'rows.csv')
    given = '-p', 'model_name', work/'base', '-p', 'comparisons', '', '-p', 'report_to', ','.join(TRACKERS)
    given = *given, '--pairs', work/'rows.csv', '--name', 'first'
    call(bin/'corrnb', 'run', '--profile', 'tiny', *given, '--runs-dir', work/'runs', cwd=here)
    shutil.move(work, there/'moved')
    (there/'moved'/'runs'/'first').rename(there/'moved'/'runs'/'renamed')
    return here, there/'moved'

@pytest.mark.seconds(40)
def test_no_place_of_the_machine(travelled):
    "No file of a run, its model folder included, holds an absolute path"
    here, moved = travelled
    places = here, here.parent, Path.home(), root, sys.prefix
    assert not holding(moved/'runs', *map(str, places))

@pytest.mark.parametrize('tracker', TRACKERS)
def test_training_reports(travelled, tracker):
    "Training reports to TensorBoard and MLflow, into the run folder"
    assert list((travelled[1]/'runs'/'renamed').glob(f'{tracker}*')), f'no log of {tracker}'

def test_weights_are_loaded_once(travelled):
    "Index, training and evaluation share the weights of the base model, which are read once"
    log = (travelled[1]/'runs'/'renamed'/'run.log').read_text().split('evaluate has finished')[0]
    loads = [line for line in log.splitlines() if re.search(r' Loading weights (\d+) of \1$', line)]
    assert len(loads) == 1, loads

@pytest.mark.seconds(15)
def test_moved_and_without_a_cache(travelled):
    "Moved and renamed it predicts and is evaluated again, also where nothing can be cached, with one line about that"
    runs = travelled[1]/'runs'
    asked = 'predict', 'Will it rain in Paris?', 'Will it rain in Lyon?', '--model', runs/'renamed'
    said = call(bin/'corrnb', *asked, more_env={'MODEL_CACHE_DIR': '/dev/null/cache'})
    assert 'correlation ' in said and said.count('/dev/null/cache') == 1, said
    assert 'How good     MAE ' in call(bin/'corrnb', 'evaluate', '--model', runs/'renamed')

@pytest.mark.seconds(1)
def test_titles_are_text(travelled):
    "Titles are text in the report and in what the notebooks of the stages show: no element, no formula, no Markdown"
    from corrnb.data import clean_text
    run, shown = travelled[1]/'runs'/'renamed', []
    report = (run/'report.html').read_text('utf-8')
    found = rendered(report)
    assert len([text for text in map(clean_text, MARKUP) if text in found.text]) > 1 and 'marquee' not in found.elements
    assert '<script>alert' not in report and '<img src=x' not in report
    for notebook in sorted(run.glob('*.ipynb')):
        for cell in nbformat.read(notebook, 4).cells:
            for data in (o.get('data', {}) for o in cell.get('outputs', [])):
                assert not {'text/markdown', 'text/latex', 'application/javascript'} & data.keys()
                if 'text/html' in data: shown.append((notebook.name, rendered(data['text/html'])))
    assert rendered('<td>costs $1 or $2</td>').formulas and 'marquee' in rendered('<marquee>').elements   # it can fail
    assert shown and not [name for name, page in shown if {'script', 'marquee'} & page.elements]
    assert not [(name, page.formulas[:1]) for name, page in shown if page.formulas]
