"""The experiments of learning.ipynb, one after the other, each in a file of its own; what is there already is not run again.

    CORRNB_DATA_DIR=... python learning.py RESULTS [PATTERN]
"""
import io, json, os, sys, time
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

import numpy as np, pandas as pd, torch
from corrnb.answers import AnswerGrid
from corrnb.config import Settings, atomic_write, content_hash
from corrnb.data import _add_events, check_pairs, contract_groups, read_pairs, split_pairs
from corrnb.demo import simulate_market
from corrnb.evaluation import baseline_predictions
from corrnb.inference import MIXTURE_NEIGHBOURS, CorrelationPredictor, fit_mixture
from corrnb.models import add_lora, load_model, load_tokenizer
from corrnb.prompts import ANSWER_PREFIX
from corrnb.rag import PairRetriever, neighbour_arrays
from corrnb.training import TrainingConfig, TrainingRows, make_trainer

TARGET, LAYER, FOLDS = 'price_correlation', 18, 5
BASE = dict(num_train_epochs=3, per_device_train_batch_size=4, learning_rate=1e-3, text_loss_weight=0, lora_r=8, lora_alpha=16, lora_last_layers=6,
            prompt_variants=2, neighbour_dropout=0.1)


def contract_split(pairs: pd.DataFrame, fold: int, val_share=0.15) -> pd.DataFrame:
    "Sides of one contract fold: a pair with a contract of the fold is a test row, of the rest one with a validation contract a validation row"
    groups = contract_groups(pairs)
    names = sorted(set(groups.ravel()), key=lambda n: content_hash('folds', n))
    test = set(names[fold::FOLDS])
    rest = sorted(set(names) - test, key=lambda n: content_hash('validation', fold, n))
    val = set(rest[:round(val_share*len(rest))])
    def touches(side): return np.array([a in side or b in side for a, b in groups])
    return pairs.assign(split=np.select([touches(test), touches(val)], ['test', 'val'], 'train'))

def data(name: str) -> pd.DataFrame:
    "Pairs with their sides: 'futures-0' to 'futures-4' (contract folds), 'events' and 'market' (one contract split)"
    kind, *fold = name.split('-')
    if kind == 'market':
        pairs = check_pairs(simulate_market().pairs, TARGET)
        return split_pairs(pairs, 'contract').assign(true_correlation=lambda d: d.underlying_event_correlation)
    folder = Path(os.environ['CORRNB_DATA_DIR'])/kind
    pairs = read_pairs(folder/'pairs.csv', TARGET, folder/'contracts.csv' if kind == 'events' else None)
    return contract_split(pairs, int(fold[0])) if fold else split_pairs(pairs, 'contract')

def experiment(dataset: str, k: int=0, seed: int=0, train: bool=True, test: bool=True, **settings) -> dict:
    "Fine-tune, predict the validation rows (and the test rows), and return everything that the tables need"
    start, frame, tokenizer = time.perf_counter(), data(dataset), load_tokenizer('embedded')
    model, cache = load_model('embedded', device='cpu'), Settings().MODEL_CACHE_DIR/'embeddings'
    sides = {s: frame[frame.split == s].reset_index(drop=True) for s in ('train', 'val', 'test')}
    retriever = PairRetriever.build(frame, TARGET, model, tokenizer, LAYER, cache)
    grid, config = AnswerGrid(tokenizer, prefix=ANSWER_PREFIX), TrainingConfig(**{**BASE, **settings, 'seed': seed})
    history, seconds = [], dict(prepare=time.perf_counter() - start)
    if train:
        near = {s: retriever.neighbours(sides[s], k)[0] if k else None for s in ('train', 'val')}
        rows = {s: TrainingRows(sides[s], TARGET, config, near[s]) for s in near}
        model = retriever.model = add_lora(model, config.lora_r, config.lora_alpha, last_layers=config.lora_last_layers, seed=seed)
        trainer = make_trainer(model, grid, rows['train'], config, rows['val'], save_strategy='no', load_best_model_at_end=False, disable_tqdm=True)
        trainer.train()
        history, seconds['train'] = trainer.state.log_history, time.perf_counter() - start - seconds['prepare']
    predictor = CorrelationPredictor(model, grid, retriever, k)
    held_out = pd.concat([sides['val'], sides['test']] if test else [sides['val']], ignore_index=True)
    found, gaps = predictor.neighbours(held_out, MIXTURE_NEIGHBOURS)
    dist = predictor.model_distribution(held_out, found)
    values, distances = neighbour_arrays(found, gaps)
    val, y = (held_out.split == 'val').to_numpy(), held_out[TARGET].to_numpy()
    mixture = fit_mixture(dist[torch.tensor(val)], values[val], distances[val], y[val])
    baselines = baseline_predictions(sides['train'], held_out, TARGET, neighbours=(values[:, :5], distances[:, :5]),
                                     train_vectors=retriever.vectors(sides['train']), row_vectors=retriever.vectors(held_out))
    seconds['all'] = time.perf_counter() - start
    keep = [c for c in ('id', 'contract_a_title', 'contract_b_title', 'contract_a_id', 'contract_b_id', 'contract_a_event_id', 'contract_b_event_id', 'split', 'novelty', TARGET,
                        'true_correlation', 'fisher_z_se', 'price_correlation_se', 'pair_kind') if c in held_out]
    return dict(rows=held_out[keep], baselines=baselines, log_probs=dist.log_probs.numpy(), values=values, distances=distances, mixture=asdict(mixture),
                history=history, seconds=seconds, n_train=len(sides['train']), settings=dict(dataset=dataset, k=k, seed=seed, train=train, test=test, **settings))

def save(path: Path, result: dict):
    "One .npz without pickle"
    buffer, text = io.BytesIO(), {k: result[k] for k in ('mixture', 'history', 'seconds', 'n_train', 'settings')}
    np.savez_compressed(buffer, **{k: result[k].astype(np.float32) for k in ('log_probs', 'values', 'distances')},
                        rows=np.frombuffer(result['rows'].join(result['baselines'].add_prefix('baseline_')).to_parquet(), np.uint8),
                        facts=np.array(json.dumps(text)))
    atomic_write(path, buffer.getvalue())

if __name__ == '__main__':
    from learning_plan import PLAN
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 2)))
    results, pattern = Path(sys.argv[1]), (sys.argv[2:] or ['*'])[0]
    for name, settings in PLAN.items():
        path = results/f'{name}.npz'
        if path.exists() or not fnmatch(name, pattern): continue
        print(f'== {name} {settings}', flush=True)
        save(path, experiment(**settings))
        print(f'== {name} done', flush=True)
