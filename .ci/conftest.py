"How pytest runs the checks: in two workers, the long ones first; an `xdist_group` shares its worker and fixtures"
import os
from collections import Counter

import pytest


def pytest_collection_modifyitems(items):
    "Begin with the tests, or groups of tests, that take longest: then both workers are busy to the end"
    def group(item): return (mark := item.get_closest_marker('xdist_group')) and mark.args[0] or item.nodeid
    def seconds(item): return (mark := item.get_closest_marker('seconds')) and mark.args[0] or 1
    total = Counter()
    for item in items: total[group(item)] += seconds(item)
    items.sort(key=lambda item: -total[group(item)])

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    "Where CI=true nothing may be missing: a test that is skipped has failed"
    report = yield
    if report.skipped and os.environ.get('CI') == 'true':
        report.outcome, report.longrepr = 'failed', f'skipped, a failure where CI=true: {call.excinfo.value}'
    return report
