"""The experiments of next_period.ipynb: the correlation of the next period, from texts, quotes and the past

    CORRNB_DATA_DIR=... python next_period.py RESULTS [NAME ...]

Each NAME (those of `NAMES`) takes a minute or two and writes RESULTS/NAME.parquet: held-out rows with what was known of
them, their label, and what every method says. What is there is not run again.
"""
import os
import sys
from dataclasses import asdict, replace
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.covariance import LedoitWolf

from corrnb.answers import AnswerDistribution
from corrnb.as_of import AsOf, correlations_as_of, known_at
from corrnb.data import read_pairs
from corrnb.demo import simulate_market
from corrnb.embeddings import spread_layers
from corrnb.files import atomic_write
from corrnb.labels import LabelRules, pair_correlations, pair_ends
from corrnb.models import load_model, load_tokenizer
from corrnb.parameters import RunConfig
from corrnb.past import fit_past
from corrnb.prices import price_series
from corrnb.rag import PairRetriever
from corrnb.splits import contract_groups, contract_kfold
from corrnb.stack import fit_members, fit_pool

TARGET, FOLDS = 'price_correlation', 5
RULES = dict(events=LabelRules(None, min_changes=20, min_moves=5, min_joint_moves=0, max_share=1.),
             futures=LabelRules(None, last=1500), rolling=LabelRules(None, last=500))
DATES = [f'{year}-01-01' for year in range(2008, 2016)]
LENGTHS = (20, 40, 80, 120, 160, 200)   # days of the past in the simulated market


def shared_pairs(kind: str) -> pd.DataFrame:
    "Pairs of the shared data with texts, without their label"
    folder = Path(os.environ['CORRNB_DATA_DIR'])/kind
    pairs = read_pairs(folder/'pairs.csv', TARGET, folder/'contracts.csv' if kind == 'events' else None)
    return pairs.drop(columns=['price_correlation', 'fisher_z_se', 'price_correlation_se', 'n_changes'])

def prices(kind: str) -> pd.DataFrame:
    return pd.read_csv(Path(os.environ['CORRNB_DATA_DIR'])/kind/'prices.csv.gz')

def asked_rows(kind: str, when: str, rules: LabelRules, period: str|None=None) -> pd.DataFrame:
    "Pairs with a label behind a time, and what is known at it"
    found = correlations_as_of(prices(kind), when, pairs := shared_pairs(kind), period, rules=rules)
    rows = pairs.join(found.drop(columns=['contract_a_id', 'contract_b_id']))
    if kind == 'futures': rows = rows.drop(columns=['quote_a', 'quote_b'])   # no probabilities
    return rows[rows.reason == ''].drop(columns='reason').reset_index(drop=True)

def halves(kind: str) -> pd.DataFrame:
    "Pairs with the second half of their history as label and the first half as past; of futures the last 1,500 days"
    rows, rules = asked_rows(kind, 'middle', RULES[kind]), RULES[kind]
    if rules.last is None: return rows
    series = price_series(prices(kind))
    ends = pair_ends(series, rows)[0]
    until = AsOf('middle').cuts(series, ends, rules)
    known = known_at(series, ends, replace(rules, last=rules.last//2), until)
    return rows.assign(**{c: known[c] for c in known if c in rows})

def retriever(rows: pd.DataFrame, results: Path) -> tuple[PairRetriever, tuple]:
    "What embeds, and the layers that the Gaussian process reads"
    model, tokenizer = load_model('embedded', device='cpu'), load_tokenizer('embedded')
    layers = RunConfig().embedding_layers
    found = PairRetriever.build(rows.assign(split='train'), TARGET, model, tokenizer, layers, results/'vectors')
    return found, tuple(spread_layers(model))

def one_fold(known: pd.DataFrame, rows: pd.DataFrame, embeds: tuple) -> pd.DataFrame:
    "Rows with forecasts of a stack, a slope and an update that were fitted on the known rows"
    return rows.assign(shrunk=slope(known)*rows.past_correlation, **forecasts(known, rows, embeds))

def forecasts(known: pd.DataFrame, rows: pd.DataFrame, embeds: tuple) -> dict:
    "Means and 90 % intervals of the stack without and with what is known, and the numbers of the update"
    members, held = fit_members(known, TARGET, rows.novelty, *embeds)
    asked, labels = members.out_of_fold(known, held), known[TARGET].to_numpy()[held.row]
    stack = fit_pool(asked, labels, held.weight)
    update = fit_past(known.iloc[held.row], stack(asked), TARGET, held.weight)
    before = stack(members.forecasts(rows))
    quoted, after = update.explained(before, rows)
    found = {}
    for name, d in dict(forecast=before, quotes=quoted, with_past=after).items(): found |= described(name, d, rows)
    return found | {f'update_{name}': x for name, x in asdict(update).items()}

def described(name: str, d: AnswerDistribution, rows: pd.DataFrame) -> dict:
    "Mean, interval and CRPS of a method"
    low, high = d.interval(.9)
    numbers = dict(low=low, high=high, crps=d.crps(torch.tensor(rows[TARGET].to_numpy(float))))
    return {name: d.mean.numpy()} | {f'{name}_{what}': x.numpy() for what, x in numbers.items()}

def slope(rows: pd.DataFrame) -> float:
    "The best factor of the past"
    rows = rows[rows.past_correlation.notna()]
    return float((rows.past_correlation*rows[TARGET]).sum()/(rows.past_correlation**2).sum())

def by_contract(rows: pd.DataFrame, results: Path, known: pd.DataFrame|None=None) -> pd.DataFrame:
    "Each fold of contracts from the others; `known`: the same pairs at an earlier time, to be learned from instead"
    embeds, done = retriever(rows, results), []
    for fold in contract_kfold(rows, FOLDS):
        test = rows[fold.split == 'test'].assign(novelty=fold.novelty)
        train = rows[fold.split == 'train']
        if known is not None: train = known[known.id.isin(train.id)]
        done.append(one_fold(train.reset_index(drop=True), test.reset_index(drop=True), embeds))
    return pd.concat(done, ignore_index=True)

def both_new(rows: pd.DataFrame, results: Path, folds: int=10) -> pd.DataFrame:
    "Each pair once, from pairs that share neither contract (nor event) with it"
    embeds, groups, done = retriever(rows, results), contract_groups(rows), []
    fold_of = pd.Series({g: i % folds for i, g in enumerate(pd.unique(groups.ravel()))})
    fold = np.sort(fold_of[groups.ravel()].to_numpy().reshape(-1, 2), axis=1)
    for ends in combinations_with_replacement(range(folds), 2):
        test, train = (fold == ends).all(1), ~np.isin(fold, ends).any(1)
        if test.any():
            new = rows[test].assign(novelty='both_new')
            done.append(one_fold(rows[train].reset_index(drop=True), new.reset_index(drop=True), embeds))
    return pd.concat(done, ignore_index=True)

def rolling(results: Path) -> pd.DataFrame:
    "Futures at each date: labels of the year that follows, all numbers from the year before and other contracts"
    years = {date: asked_rows('futures', date, RULES['rolling'], '365D') for date in DATES}
    done = []
    for before, date in zip(DATES, DATES[1:]):
        rows = years[date].assign(id=lambda r: r.contract_a_id + r.contract_b_id)
        known = years[before].assign(id=lambda r: r.contract_a_id + r.contract_b_id)
        found = by_contract(rows, results, known)
        done.append(found.assign(ledoit_wolf=ledoit_wolf(found, date)))
    return pd.concat(done, ignore_index=True)

def ledoit_wolf(rows: pd.DataFrame, date: str, days: int=500) -> np.ndarray:   # (n,), NaN without enough history
    "Correlations of the shrunk covariance of the last days before a date, changes scaled to one"
    table = prices('futures').assign(ts=lambda p: pd.to_datetime(p.ts)).pivot(index='ts', columns='contract_id',
                                                                              values='price')
    changes = table[table.index < date].iloc[-2*days:].dropna(axis=1, thresh=days).dropna().diff().dropna()[-days:]
    shrunk = LedoitWolf().fit(changes/changes.std()).covariance_
    scale = np.sqrt(np.diag(shrunk))
    found = pd.DataFrame(shrunk/scale/scale[:, None], changes.columns, changes.columns)
    ends = rows[['contract_a_id', 'contract_b_id']].to_numpy()
    return np.array([found.at[a, b] if {a, b} <= {*found} else np.nan for a, b in ends])

def market(results: Path) -> pd.DataFrame:
    "The simulated market, correlations constant: labels from one draw of prices, pasts of several lengths from another"
    now, before = simulate_market(0), simulate_market(1)
    rows = now.pairs.reset_index(drop=True)
    embeds, done = retriever(rows, results), []
    for length in LENGTHS:
        past = pair_correlations(before.prices, rows, None, length + 1, min(30, length - 3), 'logit')
        names = dict(price_correlation='past_correlation', fisher_z_se='past_fisher_z_se', n_changes='past_n_changes')
        asked = rows.join(past[[*names]].rename(columns=names)).assign(days=length)
        asked = asked[asked.past_correlation.notna() & (asked.past_n_changes == length)].reset_index(drop=True)
        for fold in contract_kfold(asked, FOLDS):
            known, test = (asked[fold.split == side].assign(novelty=fold.novelty).reset_index(drop=True)
                           for side in ('train', 'test'))
            done.append(one_fold(known, test, embeds))
    return pd.concat(done, ignore_index=True)

def experiment(name: str, results: Path) -> pd.DataFrame:
    "Held-out rows of one experiment"
    kind, *way = name.split('-')
    if kind == 'rolling': return rolling(results)
    if kind == 'market': return market(results)
    rows = halves(kind)
    return both_new(rows, results) if way else by_contract(rows, results)

NAMES = ('events', 'futures', 'rolling', 'market', 'events-both_new', 'futures-both_new')

if __name__ == '__main__':
    torch.set_num_threads(1)
    results, names = Path(sys.argv[1]).resolve(), sys.argv[2:] or NAMES
    for name in names:
        if (results/f'{name}.parquet').exists(): continue
        print(f'== {name}', flush=True)
        atomic_write(results/f'{name}.parquet', experiment(name, results).to_parquet())
