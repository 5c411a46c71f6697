"`corrnb serve` as a process: many clients, killed and started again, told to stop; what its document promises"
import concurrent.futures
import os
import re
import signal
import time
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import psutil
import pytest
from browser import free_port
from project import bin, call, env, root

pytestmark = pytest.mark.xdist_group('serve')
KEY = 'k3y-0f-the-tests'


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A run folder with the tiny model, and a port"
    from corrnb.testing import toy_run
    folder = tmp_path_factory.mktemp('serve')
    return SimpleNamespace(folder=folder, run=toy_run(folder/'run'), port=free_port(), log=folder/'log')

@contextmanager
def started(place, *options):
    "A server: the process, and a client with its key; it is dead behind the block"
    command = [str(bin/'corrnb'), 'serve', '--model', str(place.run), '--port', str(place.port), *options]
    own = env | {'API_KEY': KEY, 'MODEL_CACHE_DIR': str(place.folder/'cache')}
    limits = httpx.Limits(max_connections=50)
    with place.log.open('a') as log, httpx.Client(base_url=f'http://127.0.0.1:{place.port}', timeout=60, limits=limits,
                                                  headers={'X-API-Key': KEY}) as client:
        process = psutil.Popen(command, cwd=place.folder, env=own, stdout=log, stderr=log)
        try:
            while not answers(client):
                assert process.poll() is None, place.log.read_text()
                time.sleep(0.1)
            yield process, client
        finally:
            if process.poll() is None: process.kill()
            process.wait()

def answers(client):
    "Does anybody listen?"
    try: return client.get('/health').status_code == 200
    except httpx.TransportError: return False

def question(i): return dict(contract_a=f'Will it rain in town {i}?', contract_b='Will gold rise?')

def predict(client, i): return client.post('/predict-correlation', json=question(i))

def wait_for_queue(client, n):
    "Wait until so many questions were accepted"
    end = time.time() + 30
    while number(client, 'corrnb_queue_length') < n: assert time.time() < end, 'the questions did not arrive'

PAIRS = 125   # different ones of a thousand questions: applications ask about the same contracts again

def number(client, name):
    "A number that the server counts"
    return float(re.search(rf'(?m)^{re.escape(name)} (.*)', client.get('/metrics').text)[1])

def many_clients(place, client, clients):
    "A thousand questions of sixteen clients get what each pair gets alone, and no pair is computed twice"
    from corrnb.inference import CorrelationPredictor
    found = [*clients.map(lambda i: predict(client, 7919*i % PAIRS), range(1000))]
    assert {r.status_code for r in found} == {200}
    predictor = CorrelationPredictor.from_run(place.run, device='cpu')
    alone = [predictor.predict(*question(i).values()).correlation for i in range(PAIRS)]
    differences = [abs(r.json()['underlying_correlation'] - alone[7919*i % PAIRS]) for i, r in enumerate(found)]
    assert max(differences) <= 1e-4, f'answered together, a forecast differs by {max(differences):.2g}'
    assert number(client, 'corrnb_answers_total{source="model"}') == PAIRS
    batches = number(client, 'corrnb_batch_size_count')
    assert batches < .8*PAIRS, f'{PAIRS} pairs were answered in {batches:.0f} passes: none shared'
    return found[0].json()['underlying_correlation']

def several(client, clients, requests):
    "Requests of 40 pairs each that are new, accepted and not answered yet"
    batches = [dict(pairs=[question(1000 + 100*j + i) for i in range(40)]) for j in range(requests)]
    pending = [clients.submit(client.post, '/predict-correlations', json=batch) for batch in batches]
    wait_for_queue(client, 40*requests)
    return pending

def document_holds(place, client):
    "Schemathesis finds nothing in what /openapi.json promises"
    # that titles differ, and are more than markup, is more than a schema can say: the hooks see to it
    options = ('-H', f'X-API-Key: {KEY}', '--max-examples', '8', '--phases', 'examples,coverage,fuzzing',
               '--generation-deterministic')   # else another day may find what this one has not
    path = os.pathsep.join([str(root/'.ci'), env.get('PYTHONPATH', '')])
    hooks = dict(SCHEMATHESIS_HOOKS='schemathesis_hooks', PYTHONPATH=path)
    call(bin/'schemathesis', 'run', f'{client.base_url}/openapi.json', *options, cwd=place.folder, more_env=hooks)
    assert client.get('/ready', params=dict(key=KEY), headers={'X-API-Key': 'other'}).status_code == 401

@pytest.mark.seconds(90)
def test_server(place):
    "Killed while it answers many and begun again, it answers; told to stop, it answers what it has accepted"
    with started(place) as (process, client), concurrent.futures.ThreadPoolExecutor(16) as clients:
        first = many_clients(place, client, clients)
        pending = several(client, clients, 5)
        process.kill()
        lost = [p for p in pending if isinstance(p.exception(), httpx.TransportError)]
        assert lost, 'killed too late'
    with started(place) as (process, client), concurrent.futures.ThreadPoolExecutor(16) as clients:
        assert predict(client, 0).json()['underlying_correlation'] == first
        document_holds(place, client)
        pending = several(client, clients, 8)
        process.send_signal(signal.SIGTERM)
        assert {p.result().status_code for p in pending} == {200}
        process.wait(20)
        assert not answers(client)
    assert KEY not in place.log.read_text() and 'Traceback' not in place.log.read_text()

@pytest.mark.seconds(10)
def test_without_a_run(tmp_path):
    "Without a trained run it says which command makes one"
    with pytest.raises(AssertionError, match='`corrnb run --profile quick` makes one'):
        call(bin/'corrnb', 'serve', cwd=tmp_path, more_env={'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '1')})
