"""The experiments of learning.ipynb: each is a run of the library's stages, on rows that are split here, in a folder of
its own. What is there is not run again.

    CORRNB_DATA_DIR=... python learning.py RESULTS [PATTERN ...]

Those called `members-...` train no language model: the stack of the others, and the baselines, in a minute. Those
called `stack-...` put the forecasts of a language model that were saved beside the other members as they are today.
"""
import io
import json
import os
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from corrnb.answers import AnswerDistribution
from corrnb.baselines import baseline_predictions
from corrnb.data import check_pairs, read_pairs
from corrnb.demo import simulate_market
from corrnb.embeddings import spread_layers
from corrnb.evaluation import distribution_metrics, regression_metrics
from corrnb.files import atomic_write
from corrnb.labelling import pairs_from_prices
from corrnb.models import load_model, load_tokenizer
from corrnb.parameters import RunConfig
from corrnb.rag import PairRetriever
from corrnb.splits import add_novelty, contract_groups, contract_kfold, split_pairs
from corrnb.stack import equal_weights, fit_members, fit_pool, fit_stack
from corrnb.stages import build_index, evaluate, prepare, train

TARGET, FOLDS = 'price_correlation', 5
BASE = dict(target=TARGET, model_name='embedded', use_4bit=False, text_loss_weight=0, lora_r=8, lora_alpha=16,
            lora_last_layers=12, prompt_variants=1, neighbour_dropout=0., rag_top_k=4, both_orders=False)
PLAN = {f'futures-{f}': dict(dataset=f'futures-{f}') for f in range(FOLDS)}
PLAN |= {'market': dict(dataset='market', num_train_epochs=1), 'events': dict(dataset='events', num_train_epochs=2)}
EVENTS = [f'events-{f}' for f in range(FOLDS)]
MARKETS = [f'market-{seed}' for seed in range(21)]   # 0 is the demo
MORE = [f'{n}-prices' for n in EVENTS]
PLAN = {f'members-{n}': dict(dataset=n) for n in [*PLAN, *EVENTS, *MARKETS, *MORE]} | PLAN | {
    f'stack-{n}': dict(dataset=n) for n in PLAN}
PLAN |= {f'futures-0-{name}': dict(settings, dataset='futures-0', untuned=False) for name, settings in
         {'w0': dict(regression_loss_weight=0.), 'w1': dict(regression_loss_weight=1.),
          'w20': dict(regression_loss_weight=20.), 'crps10': dict(regression_loss_type='crps'),
          'soft10': dict(soft_targets=True), 'k0': dict(rag_top_k=0), 'seed1': dict(seed=1),
          'head': dict(comparisons=['linear_head'])}.items()}


def contract_split(pairs: pd.DataFrame, fold: int) -> pd.DataFrame:
    "Sides of one contract fold: of what is not test, one of seven inner contract folds is for validation"
    pairs = pairs.assign(split=list(contract_kfold(pairs, FOLDS))[fold].split)
    rest = pairs[pairs.split == 'train']
    inner = next(contract_kfold(rest, 7, seed=fold))
    return add_novelty(pairs.assign(split=inner.split.replace('test', 'val').reindex(pairs.index).fillna(pairs.split)))

def with_more_pairs(pairs: pd.DataFrame, folder: Path, most: int=2000) -> pd.DataFrame:
    "The same test rows; with the others a draw of all pairs that prices give and that hold no held-out contract"
    found = check_pairs(pairs_from_prices(folder/'prices.csv.gz', folder/'contracts.csv'), TARGET)
    every = pd.concat([pairs, found.assign(split='train')], ignore_index=True)
    groups, test, new = contract_groups(every).astype(str), every.split == 'test', every.index >= len(pairs)
    held = np.setdiff1d(groups[test], groups[~test & ~new])
    ends = pd.DataFrame(np.sort(every[['contract_a_id', 'contract_b_id']].to_numpy(str), axis=1))
    usable = every[new & ~np.isin(groups, held).any(1) & ~ends.duplicated()]
    return add_novelty(pd.concat([pairs, usable.sample(min(most, len(usable)), random_state=0)], ignore_index=True))

def data(name: str) -> pd.DataFrame:
    "Pairs with their sides: contract folds 'futures-0' to 'events-4-prices', or one split: 'events', 'market-1'"
    kind, *fold = name.split('-')
    if kind == 'market':    # a draw of the simulation has other pairs and other prices of the same contracts
        seeds = [int(fold[0])] if fold else range(3)
        draws = pd.concat([simulate_market(seed).pairs for seed in seeds]).drop_duplicates('id')
        pairs = split_pairs(check_pairs(draws, TARGET), 'contract', seed=seeds[0])
        return pairs.assign(true_correlation=pairs.underlying_event_correlation)
    folder = Path(os.environ['CORRNB_DATA_DIR'])/kind
    pairs = read_pairs(folder/'pairs.csv', TARGET, folder/'contracts.csv' if kind == 'events' else None)
    if not fold: return split_pairs(pairs, 'contract')
    pairs = contract_split(pairs, int(fold[0]))
    return with_more_pairs(pairs, folder) if 'prices' in fold else pairs

def experiment(results: Path, name: str, dataset: str, **settings):
    "Run all stages in a folder, and keep what every method forecasts for the held-out rows"
    if name.startswith('members-'): return without_language_model(results, name, dataset)
    if name.startswith('stack-'): return stacked(results, name, dataset)
    run, clock = results/'runs'/name, [time.perf_counter()]
    pairs = atomic_write(results/'pairs'/f'{dataset}.parquet', data(dataset).to_parquet())
    config = RunConfig(**BASE | dict(pairs=str(pairs)) | settings)
    for stage in (prepare, build_index, train):
        if stage != train or not (run/'model').exists(): stage(config, run)
        clock.append(time.perf_counter())
    found = evaluate(config, run)
    clock.append(time.perf_counter())
    seconds = dict(zip(('prepare', 'index', 'train', 'evaluate'), np.diff(clock).tolist()))
    log = json.loads((run/'training_log.json').read_text())
    facts = dict(settings, dataset=dataset, seconds=seconds, history=log, stack=found.metrics['stack'])
    rows = found.forecasts.rows.join(found.forecasts.points.add_prefix('point_'))
    save(results/f'{name}.npz', facts, rows, found.forecasts.distributions)

def without_language_model(results: Path, name: str, dataset: str):
    "Forecasts of the test rows by all that needs no language model to be trained, from training and validation rows"
    pairs, start = data(dataset), time.perf_counter()
    known, rows = (pairs[i].reset_index(drop=True) for i in (pairs.split != 'test', pairs.split == 'test'))
    members, out_of_fold = members_of(results, pairs, known, rows)
    stack, found = fit_pool(out_of_fold), members.forecasts(rows)
    found |= dict(equal_average=equal_weights([*found])(found), model=stack(found))
    vectors = dict(train_vectors=members.retriever.vectors(known), row_vectors=members.retriever.vectors(rows))
    near = members.retriever.known(rows, BASE['rag_top_k'])
    points = baseline_predictions(known, rows, TARGET, neighbours=near, **vectors)
    points = points.assign(**{n: d.mean.numpy() for n, d in found.items()})
    keep(results/f'{name}.npz', dataset, start, members, stack, rows.join(points.add_prefix('point_')), found)

def members_of(results: Path, pairs: pd.DataFrame, known: pd.DataFrame, rows: pd.DataFrame) -> tuple:
    "`fit_members` with vectors of the embedded model"
    model, tokenizer = load_model('embedded', device='cpu'), load_tokenizer('embedded')
    retriever = PairRetriever.build(pairs, TARGET, model, tokenizer, RunConfig().embedding_layers, results/'vectors')
    return fit_members(known, TARGET, rows.novelty, retriever, tuple(spread_layers(model)))

def stacked(results: Path, name: str, dataset: str):
    "The forecasts of a language model as they were saved, with the other members and the weights as they are today"
    pairs, start, saved = data(dataset), time.perf_counter(), read(results/f'{dataset}.npz')
    train, val, rows = (pairs[pairs.split == s].reset_index(drop=True) for s in ('train', 'val', 'test'))
    known = pairs[pairs.split != 'test'].reset_index(drop=True)
    members, out_of_fold = members_of(results, pairs, known, rows)
    def of_model(side, model): return part(saved, model, pd.Index(saved['rows'].id).get_indexer(side.id))
    validation = members.given(train).forecasts(val) | dict(language_model=of_model(val, 'language_model'))
    stack = fit_stack(out_of_fold, validation, val[TARGET].to_numpy(float), contract_groups(val))
    found = members.forecasts(rows) | {m: of_model(rows, m) for m in ('language_model', 'untuned_model')}
    found |= dict(equal_average=equal_weights([*stack.weights])(found), model=stack(found))
    points = pd.DataFrame({n: d.mean.numpy() for n, d in found.items()})
    keep(results/f'{name}.npz', dataset, start, members, stack, rows.join(points.add_prefix('point_')), found)

def part(result: dict, method: str, places: np.ndarray) -> AnswerDistribution:
    "Some rows of a saved forecast, which has all of them"
    assert (places >= 0).all(), 'rows without a forecast: the data have changed since it was made'
    d = result['forecasts'][method]
    return AnswerDistribution(d.values, d.log_probs[torch.tensor(places)])

def keep(path: Path, dataset: str, start: float, members, stack, rows, forecasts):
    "Save what was made since `start`"
    facts = dict(dataset=dataset, seconds=dict(all=time.perf_counter() - start), history=[],
                 stack=dict(weights=stack.weights), slopes=members.slopes)
    save(path, facts, rows, forecasts)

def save(path: Path, facts: dict, rows: pd.DataFrame, forecasts: dict):
    "Write what `read` reads"
    arrays = {m: d.log_probs.numpy().astype(np.float32) for m, d in forecasts.items()}
    buffer = io.BytesIO()
    table = np.frombuffer(rows.to_parquet(), np.uint8)
    np.savez_compressed(buffer, rows=table, facts=np.array(json.dumps(facts)), **arrays)
    atomic_write(path, buffer.getvalue())

def read(path: Path) -> dict:
    "A saved result: its facts, rows with points of all methods, and distributions by method"
    values = torch.arange(-100, 101)/100
    with np.load(path, allow_pickle=False) as f:
        facts, rows = json.loads(str(f['facts'])), pd.read_parquet(io.BytesIO(f['rows'].tobytes()))
        names = [n for n in f.files if n not in ('rows', 'facts')]
        return dict(facts, name=path.stem, rows=rows,
                    forecasts={n: AnswerDistribution(values, torch.tensor(f[n])) for n in names})

def pooled(results: list[dict], side: str) -> tuple[pd.DataFrame, dict, dict]:
    "Rows of one side of several results, point forecasts by method, and distributions by method"
    picks = [(r, (r['rows'].split == side).to_numpy()) for r in results]
    rows = pd.concat([r['rows'][i] for r, i in picks], ignore_index=True)
    forecasts = {}
    for name, first in results[0]['forecasts'].items():
        log_probs = torch.cat([r['forecasts'][name].log_probs[torch.tensor(i)] for r, i in picks])
        forecasts[name] = AnswerDistribution(first.values, log_probs)
    return rows, {c.removeprefix('point_'): rows[c].to_numpy() for c in rows if c.startswith('point_')}, forecasts

def table(rows: pd.DataFrame, points: dict, forecasts: dict, target: str=TARGET) -> pd.DataFrame:
    "Metrics of each method; of distributions also CRPS, coverage and width of intervals, and the MAE of the mean"
    lines = {name: regression_metrics(rows[target], p) for name, p in points.items()}
    for name, d in forecasts.items():
        lines[name]['mae_of_mean'] = lines[name]['mae']
        lines[name] |= distribution_metrics(d.probs, d.values, rows[target])   # mae is that of the median
    return pd.DataFrame(lines).T.infer_objects()

if __name__ == '__main__':
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 2)))
    results, patterns = Path(sys.argv[1]).resolve(), sys.argv[2:] or ['*']
    for name, settings in PLAN.items():
        if (results/f'{name}.npz').exists() or not any(fnmatch(name, p) for p in patterns): continue
        if name.startswith('stack-') and not (results/f'{settings["dataset"]}.npz').exists(): continue
        print(f'== {name} {settings}', flush=True)
        experiment(results, name, **settings)
