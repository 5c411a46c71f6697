"Forecasts of many pairs under Ray"
import time

import pandas as pd
import psutil
import pytest
from project import bin, start

pytestmark = pytest.mark.xdist_group('serve')


@pytest.mark.seconds(50)
def test_ray_with_an_actor_that_dies(tmp_path):
    "Two actors of Ray, one of which is killed, write the bytes that one process writes"
    from corrnb.blocks import predict_pairs
    from corrnb.testing import TOY_TITLES, toy_run
    run, pairs = toy_run(tmp_path/'run'), tmp_path/'pairs.csv'
    titles = [*TOY_TITLES, *(f'Will it rain in town {i}?' for i in range(60))]
    rows = [(f'{i} {j}', a, b) for i, a in enumerate(titles) for j, b in enumerate(titles[i+1:])]
    pd.DataFrame(rows, columns=['id', 'contract_a_title', 'contract_b_title']).to_csv(pairs, index=False)
    command = [bin/'corrnb', 'predict', '--model', run, '--pairs', pairs, '--members', 'gp,neighbours', '--out']
    process = start(*command, tmp_path/'ray.csv', '--workers', '2', cwd=tmp_path)
    killed = kill_an_actor(process)
    assert process.wait(120) == 0 and killed, 'the command failed, or no actor was there to be killed'
    predict_pairs(run, str(pairs), str(tmp_path/'one.csv'), ['gp', 'neighbours'])
    assert (tmp_path/'ray.csv').read_bytes() == (tmp_path/'one.csv').read_bytes()

def kill_an_actor(process):
    "Kill an actor that holds the model as soon as there is one; was there one?"
    while process.poll() is None:
        for p in process.children(recursive=True):
            try:
                if 'MapWorker' in ' '.join(p.cmdline()) and p.memory_info().rss > 300 << 20: return p.kill() is None
            except psutil.NoSuchProcess: pass
        time.sleep(0.05)
    return False
