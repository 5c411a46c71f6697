"""The experiments of learning.ipynb, one after the other, each in a file of its own; what is there is not run again.

    CORRNB_DATA_DIR=... python learning.py RESULTS [PATTERN ...]
"""
import io
import json
import os
import sys
import time
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from corrnb.answers import AnswerDistribution, AnswerGrid
from corrnb.config import Settings
from corrnb.files import atomic_write
from corrnb.data import check_pairs, read_pairs
from corrnb.splits import add_novelty, contract_kfold, split_pairs
from corrnb.demo import simulate_market
from corrnb.baselines import baseline_predictions
from corrnb.evaluation import distribution_metrics, regression_metrics
from corrnb.inference import MIXTURE_NEIGHBOURS, CorrelationPredictor, Mixture, fit_mixture
from corrnb.models import add_lora, load_model, load_tokenizer
from corrnb.prompts import ANSWER_PREFIX
from corrnb.rag import PairRetriever, neighbour_arrays
from corrnb.batches import TrainingRows
from corrnb.comparisons import LinearHead
from corrnb.parameters import TrainingConfig
from corrnb.training import RegressionAugmentedTrainer, make_trainer

TARGET, FOLDS = 'price_correlation', 5
BASE = dict(num_train_epochs=3, per_device_train_batch_size=4, learning_rate=2e-4, text_loss_weight=0, lora_r=8,
            lora_alpha=16, lora_last_layers=12, prompt_variants=1, neighbour_dropout=0.)
PLAN = {f'futures-{f}-{name}': dict(dataset=f'futures-{f}', k=4, **settings) for name, settings in
        {'w10': {}, 'untuned': dict(train=False), 'w0': dict(regression_loss_weight=0.)}.items() for f in range(FOLDS)}
PLAN |= {'market-untuned': dict(dataset='market', k=4, train=False),
         'market-w10': dict(dataset='market', k=4, num_train_epochs=1),
         'events-w10': dict(dataset='events', k=4, num_train_epochs=2),
         'market-w0': dict(dataset='market', k=4, num_train_epochs=1, regression_loss_weight=0.),
         'market-w10-k0': dict(dataset='market', k=0, num_train_epochs=1),
         'market-e3': dict(dataset='market', k=4, num_train_epochs=3, prompt_variants=3)}
PLAN |= {f'futures-{f}-d3': dict(dataset=f'futures-{f}', k=4, prompt_variants=3) for f in range(2)}
PLAN |= {f'futures-0-{name}': dict(dict(dataset='futures-0', k=4), **settings) for name, settings in
         {'w1': dict(regression_loss_weight=1.), 'crps10': dict(regression_loss_type='crps'),
          'soft10': dict(soft_targets=True), 'w20': dict(regression_loss_weight=20.),
          'head': dict(head=True), 'k0': dict(k=0), 'w10-seed1': dict(seed=1), 'w10-seed2': dict(seed=2),
          'w0-seed1': dict(seed=1, regression_loss_weight=0.)}.items()}


def contract_split(pairs: pd.DataFrame, fold: int) -> pd.DataFrame:
    "Sides of one contract fold: of what is not test, one of seven inner contract folds is for validation"
    pairs = pairs.assign(split=list(contract_kfold(pairs, FOLDS))[fold].split)
    rest = pairs[pairs.split == 'train']
    inner = next(contract_kfold(rest, 7, seed=fold))
    return add_novelty(pairs.assign(split=inner.split.replace('test', 'val').reindex(pairs.index).fillna(pairs.split)))

def data(name: str) -> pd.DataFrame:
    """Pairs with their sides: 'futures-0' to 'futures-4' (contract folds), 'events' and 'market' (three draws of the
    simulation; one contract split)"""
    kind, *fold = name.split('-')
    if kind == 'market':
        draws = pd.concat([simulate_market(seed).pairs for seed in range(3)])  # other pairs and prices, same contracts
        pairs = check_pairs(draws.drop_duplicates('id'), TARGET)
        return split_pairs(pairs, 'contract').assign(true_correlation=lambda d: d.underlying_event_correlation)
    folder = Path(os.environ['CORRNB_DATA_DIR'])/kind
    pairs = read_pairs(folder/'pairs.csv', TARGET, folder/'contracts.csv' if kind == 'events' else None)
    return contract_split(pairs, int(fold[0])) if fold else split_pairs(pairs, 'contract')

class DrawnRows(TrainingRows):
    "Every prompt variant of a row has its own draw of similar pairs, with other contracts hidden"
    def __init__(self, rows, target, config, draws: list):
        super().__init__(rows, target, config, draws[0])
        self.draws = draws

    def __getitem__(self, key):
        self.neighbours = self.draws[key[0] % len(self.draws) if isinstance(key, tuple) else 0]
        return super().__getitem__(key)

def experiment(dataset: str, k: int=0, seed: int=0, train: bool=True, test: bool=True, head: bool=False,
               layers: tuple=(6, -1), **settings) -> dict:
    "Fine-tune, predict the validation rows (and the test rows), and return everything that the tables need"
    start, frame, tokenizer = time.perf_counter(), data(dataset), load_tokenizer('embedded')
    model, cache = load_model('embedded', device='cpu', dtype=torch.bfloat16), Settings().MODEL_CACHE_DIR/'embeddings'
    sides = {s: frame[frame.split == s].reset_index(drop=True) for s in ('train', 'val', 'test')}
    retriever = PairRetriever.build(frame, TARGET, model, tokenizer, list(layers), cache)
    grid, config = AnswerGrid(tokenizer, prefix=ANSWER_PREFIX), TrainingConfig(**{**BASE, **settings, 'seed': seed})
    draws = [retriever.training_neighbours(sides['train'], MIXTURE_NEIGHBOURS, sides['val'].novelty, seed + i)
             for i in range(config.prompt_variants)]
    similar, apart = draws[0]
    history, seconds = [], dict(prepare=time.perf_counter() - start)
    if train:
        rows = DrawnRows(sides['train'], TARGET, config, [[s[:k] for s in found] for found, _ in draws])
        model = retriever.model = add_lora(model, config.lora_r, config.lora_alpha, last_layers=config.lora_last_layers,
                                           seed=seed)
        trainer = make_trainer(model, grid, rows, config, cls=LinearHead if head else RegressionAugmentedTrainer,
                               save_strategy='no', disable_tqdm=True)
        trainer.train()
        history, seconds['train'] = trainer.state.log_history, time.perf_counter() - start - seconds['prepare']
    predictor = CorrelationPredictor(model, grid, retriever, k, both_orders=False)  # half the time
    held_out = pd.concat([sides['val'], sides['test']] if test else [sides['val']], ignore_index=True)
    found, measured = predictor.neighbours(held_out, MIXTURE_NEIGHBOURS)
    if head: # asked in the order of the rows
        asked = TrainingRows(held_out, TARGET, config, [n[:k] for n in found])
        dist = AnswerDistribution(grid.values, torch.tensor(trainer.predict(asked).predictions))
    else: dist = predictor.model_distribution(held_out, found)
    values, distances = neighbour_arrays(found, measured)
    val, y = (held_out.split == 'val').to_numpy(), held_out[TARGET].to_numpy()
    mixture = fit_mixture(dist[torch.tensor(val)], values[val], distances[val], y[val],
                          training=(*neighbour_arrays(similar, apart), sides['train'][TARGET]))
    baselines = baseline_predictions(sides['train'], held_out, TARGET, neighbours=(values[:, :5], distances[:, :5]),
                                     train_vectors=retriever.vectors(sides['train']),
                                     row_vectors=retriever.vectors(held_out))
    seconds['all'] = time.perf_counter() - start
    keep = [c for c in ('id', 'contract_a_title', 'contract_b_title', 'contract_a_id', 'contract_b_id',
                        'contract_a_event_id', 'contract_b_event_id', 'split', 'novelty', TARGET,
                        'true_correlation', 'fisher_z_se', 'price_correlation_se', 'pair_kind') if c in held_out]
    return dict(rows=held_out[keep], baselines=baselines, log_probs=dist.log_probs.numpy(), values=values,
                distances=distances, mixture=asdict(mixture),
                history=history, seconds=seconds, n_train=len(sides['train']),
                settings=dict(dataset=dataset, k=k, seed=seed, train=train, test=test, head=head, layers=list(layers),
                              **settings))

def save(path: Path, result: dict):
    "One .npz without pickle"
    buffer, text = io.BytesIO(), {k: result[k] for k in ('mixture', 'history', 'seconds', 'n_train', 'settings')}
    rows = result['rows'].join(result['baselines'].add_prefix('baseline_')).to_parquet()
    np.savez_compressed(buffer, **{k: result[k].astype(np.float32) for k in ('log_probs', 'values', 'distances')},
                        rows=np.frombuffer(rows, np.uint8),
                        facts=np.array(json.dumps(text)))
    atomic_write(path, buffer.getvalue())

def read(path: Path) -> dict:
    """A saved result: settings, rows with baselines, points and distributions of the model, its mixture with the
    neighbours, and the neighbours alone"""
    with np.load(path, allow_pickle=False) as f:
        facts, rows = json.loads(str(f['facts'])), pd.read_parquet(io.BytesIO(f['rows'].tobytes()))
        model = AnswerDistribution(torch.arange(-100, 101)/100, torch.tensor(f['log_probs']))
        near = f['values'], f['distances']
    mixture = Mixture(**facts.pop('mixture'))
    forecasts = dict(model=model, mixture=mixture(model, *near),
                     neighbours=replace(mixture, model_weight=0)(model, *near))
    return dict(facts, name=path.stem, rows=rows, mixture=mixture, forecasts=forecasts)

def pooled(results: list[dict], side: str) -> tuple[pd.DataFrame, dict, dict]:
    "Rows of one side of several results, point forecasts by method, and distributions by forecast"
    picks = [(r, torch.tensor((r['rows'].split == side).to_numpy())) for r in results]
    rows = pd.concat([r['rows'][i.numpy()] for r, i in picks], ignore_index=True)
    forecasts = {v: AnswerDistribution(torch.arange(-100, 101)/100,
                                    torch.cat([r['forecasts'][v].log_probs[i] for r, i in picks]))
              for v in results[0]['forecasts']}
    baselines = {c.removeprefix('baseline_'): rows[c].to_numpy() for c in rows if c.startswith('baseline_')}
    return rows, baselines | {v: d.mean.numpy() for v, d in forecasts.items()}, forecasts

def table(rows: pd.DataFrame, points: dict, forecasts: dict, target: str=TARGET) -> pd.DataFrame:
    "Metrics of each method; of distributions also CRPS, coverage and width of intervals, MAE of median and mode"
    lines = {name: regression_metrics(rows[target], p) for name, p in points.items()}
    for name, d in forecasts.items():
        lines[name] |= distribution_metrics(d.probs, d.values, rows[target])
        lines[name] |= {f'mae_{point}': np.abs(getattr(d, point).numpy() - rows[target]).mean()
                        for point in ('median', 'mode')}
    return pd.DataFrame(lines).T.infer_objects()

if __name__ == '__main__':
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 2)))
    results, patterns = Path(sys.argv[1]), sys.argv[2:] or ['*']
    for name, settings in PLAN.items():
        path = results/f'{name}.npz'
        if path.exists() or not any(fnmatch(name, p) for p in patterns): continue
        print(f'== {name} {settings}', flush=True)
        save(path, experiment(**settings))
        print(f'== {name} done', flush=True)
