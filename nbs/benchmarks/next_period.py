"""The experiments of next_period.ipynb: the correlation of the next period, from texts, quotes and the past

    CORRNB_DATA_DIR=... python next_period.py RESULTS [NAME ...]

Each NAME (those of `NAMES`) takes some minutes, `market` half an hour, and writes RESULTS/NAME.parquet: held-out rows
with what was known of them, their label, and what every method says. What is there is not run again.
"""
import os
import sys
from dataclasses import asdict, replace
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from corrnb.answers import AnswerDistribution
from corrnb.as_of import AsOf, correlations_as_of, covariance_correlations, known_at
from corrnb.data import read_pairs
from corrnb.demo import simulate_market
from corrnb.embeddings import spread_layers
from corrnb.evaluation import past_slope
from corrnb.files import atomic_write
from corrnb.labels import LabelRules, pair_correlations, pair_ends
from corrnb.models import load_model, load_tokenizer
from corrnb.parameters import RunConfig
from corrnb.past import SPREAD, PastUpdate, fit_past
from corrnb.prices import price_series
from corrnb.rag import PairRetriever
from corrnb.splits import contract_groups, contract_kfold
from corrnb.stack import fit_members, fit_pool

TARGET, FOLDS = 'price_correlation', 5
RULES = dict(events=LabelRules(None, min_changes=20, min_moves=5, min_joint_moves=0, max_share=1.),
             futures=LabelRules(None, last=1500), rolling=LabelRules(None, last=500))
DATES = [f'{year}-01-01' for year in range(2005, 2016)]
LENGTHS = (20, 40, 80, 120, 160, 200)   # days of the past in the simulated market
MARKETS = 10


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

def stacked(known: pd.DataFrame, rows: pd.DataFrame, embeds: tuple) -> tuple:
    "The stack's forecasts of rows; and rows of the fit as often as they were asked, their forecasts and weights"
    members, asked = fit_members(known, TARGET, rows.novelty, *embeds)
    stack = fit_pool(asked)
    return stack(members.forecasts(rows)), (known.iloc[asked.row], stack(asked.forecasts), asked.weight)

def informed(update: PastUpdate, before: AnswerDistribution, rows: pd.DataFrame) -> pd.DataFrame:
    "Rows with means and 90 % intervals without and with what is known, and the numbers of the update"
    quoted, after = update.explained(before, rows)
    narrow = replace(update, **dict.fromkeys(SPREAD, 0.))(before, rows)   # the spread as it was fitted with the mean
    found, methods = {}, dict(forecast=before, quotes=quoted, with_past=after, narrow=narrow)
    for name, d in methods.items(): found |= described(name, d, rows)
    return rows.assign(**found, **{f'update_{name}': x for name, x in asdict(update).items()})

def one_fold(known: pd.DataFrame, rows: pd.DataFrame, embeds: tuple) -> pd.DataFrame:
    "Rows with forecasts of a stack, a slope and an update that were fitted on the known rows"
    before, (asked, of_asked, weight) = stacked(known, rows, embeds)
    rows = rows.assign(shrunk=past_slope(known, TARGET)*rows.past_correlation)
    return informed(fit_past(asked, of_asked, TARGET, weight), before, rows)

def described(name: str, d: AnswerDistribution, rows: pd.DataFrame) -> dict:
    "Mean, interval and CRPS of a method"
    low, high = d.interval(.9)
    numbers = dict(low=low, high=high, crps=d.crps(torch.tensor(rows[TARGET].to_numpy(float))))
    return {name: d.mean.numpy()} | {f'{name}_{what}': x.numpy() for what, x in numbers.items()}

def contract_folds(rows: pd.DataFrame):
    "Held-out and other rows of each fold of contracts"
    for fold in contract_kfold(rows, FOLDS):
        of_test = (fold.split == 'test').to_numpy()
        yield rows[of_test].assign(novelty=fold.novelty).reset_index(drop=True), rows[~of_test].reset_index(drop=True)

def by_contract(rows: pd.DataFrame, results: Path) -> pd.DataFrame:
    "Each fold of contracts from the others"
    embeds = retriever(rows, results)
    return pd.concat([one_fold(known, test, embeds) for test, known in contract_folds(rows)], ignore_index=True)

def both_new(rows: pd.DataFrame, results: Path, folds: int=6) -> pd.DataFrame:
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
    """Futures at each date, labels of the year that follows: members from the labels of the year before and of other
    contracts, update and slope from what was forecast at all dates before and has come out since"""
    years = [asked_rows('futures', date, RULES['rolling'], '365D') for date in DATES]
    embeds, earlier, done = retriever(years[-1], results), [], []
    for before, now, date in zip(years, years[1:], DATES[1:]):
        known_of = before.set_index(['contract_a_id', 'contract_b_id'])
        found = []
        for test, known in contract_folds(now):
            pairs = pd.MultiIndex.from_frame(known[['contract_a_id', 'contract_b_id']]).intersection(known_of.index)
            found.append((test, stacked(known_of.loc[pairs].reset_index(), test, embeds)[0]))
        rows, forecast = joined(found)
        if earlier:
            past, of_past = joined(earlier)
            slope = past_slope(past, TARGET)
            covariances = covariance_correlations(price_series(prices('futures')), rows, pd.Timestamp(date, tz='UTC'))
            rows = rows.assign(shrunk=slope*rows.past_correlation).join(covariances)
            done.append(informed(fit_past(past, of_past, TARGET), forecast, rows))
        earlier.append((rows, forecast))
    return pd.concat(done, ignore_index=True)

def joined(parts: list) -> tuple[pd.DataFrame, AnswerDistribution]:
    "Rows and forecasts of all parts"
    rows, forecasts = zip(*parts)
    log_probs = torch.cat([f.log_probs for f in forecasts])
    return pd.concat(rows, ignore_index=True), AnswerDistribution(forecasts[0].values, log_probs)

def market(results: Path) -> pd.DataFrame:
    "Several simulated markets"
    return pd.concat([one_market(i, results).assign(market=i) for i in range(MARKETS)], ignore_index=True)

def one_market(number: int, results: Path) -> pd.DataFrame:
    "Correlations are constant: labels from one draw of prices, pasts of several lengths from another one"
    rows, before = simulate_market(2*number).pairs.reset_index(drop=True), simulate_market(2*number + 1).prices
    embeds, pasts, done = retriever(rows, results), {n: market_past(before, rows, n) for n in LENGTHS}, []
    for fold in contract_kfold(rows, FOLDS):
        of_test = (fold.split == 'test').to_numpy()
        known, test = rows[~of_test].reset_index(drop=True), rows[of_test].assign(novelty=fold.novelty)
        forecast, (asked, of_asked, weight) = stacked(known, test.reset_index(drop=True), embeds)
        in_turn = [past[~of_test].reset_index(drop=True).iloc[i::len(pasts)] for i, past in enumerate(pasts.values())]
        update = fit_past(asked.join(pd.concat(in_turn)), of_asked, TARGET, weight)   # a past of one length each
        for length, past in pasts.items():
            done.append(informed(update, forecast, test.join(past).assign(days=length)))
    return pd.concat(done, ignore_index=True)

def market_past(prices: pd.DataFrame, rows: pd.DataFrame, days: int) -> pd.DataFrame:
    "Correlations of the last days that both contracts were traded, missing where these are fewer"
    names = dict(price_correlation='past_correlation', fisher_z_se='past_fisher_z_se', n_changes='past_n_changes')
    found = pair_correlations(prices, rows, None, days + 1, days, 'logit')[[*names]].rename(columns=names)
    return found.set_axis(rows.index)

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
