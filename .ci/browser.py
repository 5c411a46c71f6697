"""Tests in a browser: `browser.py site` clicks through the documentation in _docs, `browser.py lab` works in JupyterLab.
`--pictures FOLDER` keeps what was seen. Drives the system's Chromium with Playwright."""
import argparse, functools, http.server, json, os, re, shutil, socket, subprocess, sys, tempfile, threading, time
from contextlib import contextmanager
from pathlib import Path

root = Path(__file__).resolve().parents[1]
WIDE, NARROW = dict(width=1280, height=900), dict(width=390, height=844)
SEEN = {'home': 'index.html', 'api': '07_answers.html', 'tutorial': 'tutorials/getting_started.html', 'benchmark': 'benchmarks/learning.html'}


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


LAYOUT = '''() => {
    const wide = document.scrollingElement.scrollWidth - window.innerWidth;
    const images = [...document.querySelectorAll("main img")].filter(i => !i.complete || !i.naturalWidth).length;
    const cut = [...document.querySelectorAll("main pre, main table")].filter(e => {
        for (let p = e; p && p.tagName != "MAIN"; p = p.parentElement) if (["auto", "scroll"].includes(getComputedStyle(p).overflowX)) return false;
        return e.getBoundingClientRect().right > document.querySelector("main").getBoundingClientRect().right + 2 }).length;
    return {wide, images, cut, title: document.querySelector("h1")?.innerText} }'''

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
            print(f"{size['width']} px: {len(pages)} pages; search led to {click_through(page, url, size is NARROW)}")
            for name, path in SEEN.items() if pictures else ():
                page.goto(f'{url}/{path}')
                page.screenshot(path=Path(pictures)/f"{name}-{size['width']}.png")
    assert not problems + errors, '\n'.join(problems + errors)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('test', choices=['site', 'lab'])
    parser.add_argument('--pictures', metavar='FOLDER', help='keep pictures of what was seen')
    args = parser.parse_args()
    if args.pictures: Path(args.pictures).mkdir(parents=True, exist_ok=True)
    try: dict(site=test_site)[args.test](args.pictures)
    except AssertionError as e: sys.exit(f'FAILED {e}')
    print('ok')
