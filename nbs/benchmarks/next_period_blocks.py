"""All pairs of many contracts of one calendar: past correlations by blocks, combined with forecasts in the same pass

    python next_period_blocks.py FOLDER [-n 10000] [--days 150]

Writes FOLDER/pairs.parquet (places of both contracts, past correlation, mean and standard deviation after it) and
FOLDER/facts.json: time, memory and errors. One thread. Prices are drawn from two factors a sector, so that the true
correlations are known. The forecast stands for that of a stack: one distribution for pairs of one sector, and another
one for the rest.
"""
import argparse
import json
import resource
import time
from math import log
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from corrnb.answers import AnswerDistribution
from corrnb.files import atomic_write
from corrnb.gp import GRID, cells
from corrnb.past import PastUpdate, past_blocks
from corrnb.prices import PriceSeries, price_series

SECTORS = 50
UPDATE = PastUpdate(drift=log(.02), spread=.05)


def market(n: int, days: int) -> tuple[PriceSeries, pd.DataFrame, np.ndarray]:
    "Prices, contracts in the order of the series, and the loadings that make their true correlations"
    rng = np.random.default_rng(0)
    loadings = np.zeros((n, SECTORS + 1))
    loadings[:, -1] = rng.uniform(0, .4, n)                              # the market
    loadings[np.arange(n), np.arange(n) % SECTORS] = rng.uniform(.3, .8, n)
    own = np.sqrt(1 - (loadings**2).sum(1))
    changes = rng.normal(size=(days, SECTORS + 1)) @ loadings.T + rng.normal(size=(days, n))*own
    ids, ts = [f'{i:06}' for i in range(n)], pd.date_range('2031-01-01', periods=days)
    prices = pd.DataFrame(dict(contract_id=np.repeat(ids, days), ts=np.tile(ts, n), price=changes.cumsum(0).T.ravel()))
    titles = [f'Contract {i} of sector {i % SECTORS}' for i in range(n)]
    return price_series(prices), pd.DataFrame(dict(contract_id=ids, title=titles)), loadings

FORECASTS = cells(GRID, torch.tensor([.05, .35]), [.05, .15])   # of different sectors, and of one

def of_texts(block: pd.DataFrame) -> AnswerDistribution:
    "The forecasts of a block before prices are known"
    return FORECASTS[same_sector(*(block[f'contract_{side}_id'].cat.codes.to_numpy() for side in 'ab'))]

def same_sector(a: np.ndarray, b: np.ndarray) -> np.ndarray: return (a % SECTORS == b % SECTORS).astype(int)

def kept(block: pd.DataFrame, after: AnswerDistribution) -> dict[str, np.ndarray]:
    "The columns that are written"
    places = {side: block[f'contract_{side}_id'].cat.codes.to_numpy('int32') for side in 'ab'}
    numbers = dict(past=block.past_correlation, mean=after.mean, sd=after.std)
    return places | {name: np.asarray(x, 'float32') for name, x in numbers.items()}

def squares(found: dict, loadings: np.ndarray) -> np.ndarray:   # (3,)
    "Sums of squared errors of past, forecast and both"
    truth = np.einsum('ij,ij->i', loadings[found['a']], loadings[found['b']])
    forecast = FORECASTS.mean.numpy()[same_sector(found['a'], found['b'])]
    return np.array([((x - truth)**2).sum() for x in (found['past'], forecast, found['mean'])])

def run(n: int, days: int, folder: Path, size: int = 50_000) -> dict:
    "Write all pairs of n contracts; what that took"
    folder.mkdir(parents=True, exist_ok=True)
    series, contracts, loadings = market(n, days)
    next(past_blocks(series, contracts, of_texts, UPDATE, size=10))      # compile
    before, start, total, pairs, writer = of_memory(), time.process_time(), np.zeros(3), 0, None
    clock = time.perf_counter()
    for block, after in past_blocks(series, contracts, of_texts, UPDATE, size=size):
        found = kept(block, after)
        total, pairs = total + squares(found, loadings), pairs + len(block)
        table = pa.table(found)
        writer = writer or pq.ParquetWriter(folder/'pairs.parquet', table.schema)
        writer.write_table(table)
    writer.close()
    rmse = dict(zip(('past', 'forecast', 'both'), np.sqrt(total/pairs).tolist()))
    return dict(contracts=n, days=days, pairs=pairs, cpu_seconds=time.process_time() - start,
                wall_seconds=time.perf_counter() - clock, gb_before=before, gb_most=of_memory(),
                bytes=(folder/'pairs.parquet').stat().st_size, rmse=rmse)

def of_memory() -> float:
    "Most memory so far, in GB"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('-n', type=int, default=10_000, help='contracts')
    parser.add_argument('--days', type=int, default=150, help='prices of each')
    given = parser.parse_args()
    torch.set_num_threads(1)
    facts = run(given.n, given.days, given.folder)
    atomic_write(given.folder/'facts.json', json.dumps(facts, indent=1))
    print(json.dumps(facts))
