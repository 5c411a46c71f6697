"""Speed and memory of corrnb with a model of the exact shape of Llama 3.1 8B and random weights.

    python h100.py RESULTS [PART ...] [--tiny] [--minutes 10] [--models FOLDER]

Parts run one after the other, each in a process of its own, the most important first: check, query, nf4, bf16, run,
merged, trl, whole, load. Every figure is printed and saved in RESULTS the moment it is measured. The same command again
goes on with the steps that are missing. `check` says whether corrnb is right on this device (gpu_check.py). bf16 and
trl make their weights on the GPU; the others read them from FOLDER (22 GB, made once; one in memory, such as /dev/shm,
is the fastest). What cannot be measured because bitsandbytes, faiss or trl is missing becomes a line that says so.
Texts are cut by Llama 3's tokenizer, a file of the package llama-models (pip install --no-deps llama-models). `--tiny`:
a model of two layers, also on a CPU, to see that everything works.
Random weights say nothing about accuracy, and speed does not depend on them.
"""
import argparse
import base64
import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# what a figure should reach on one H100
TARGETS = {'one query, p50, query': '<= 0.1 s', 'contracts embedded, query': '<= 5 s',
           'rows evaluated, query': '<= 4 s',
           'hybrid training at 16 rows, nf4': '>= 6500 tokens/s',
           'hybrid / cross-entropy, time at 16 rows, nf4': '<= 1.1',
           'hybrid training at 16 rows, bf16': '>= 10000 tokens/s',
           'hybrid / cross-entropy, time at 16 rows, bf16': '<= 1.1',
           'corrnb run --profile h100, run': '<= 180 s', 'one query, p50, merged': '<= 0.06 s',
           'corrnb / TRL, tokens/s': '>= 0.95'}
# the most important first, and the seconds after which a part is stopped
PARTS = dict(check=180, query=150, nf4=150, bf16=120, run=300, merged=120, trl=150, whole=240, load=120)
PEAK = 989e12               # dense bf16 of an H100 SXM, FLOP/s
TRAINED_TOKEN = 28.3e9      # FLOP of a trained token: 14.0 forward, as many backward (frozen weights), and the adapter
TARGET = 'underlying_event_correlation'


# -- what is measured with

def sizes(tiny: bool) -> dict:
    "How much of everything"
    if tiny:
        return dict(pairs=12, rows=24, epochs=1, evaluated=6, queries=3, written=4, tokens=200, steps=2, warm=1,
                    rounds=1)
    return dict(pairs=750, rows=525, epochs=3, evaluated=113, queries=100, written=60, tokens=300, steps=8, warm=2,
                rounds=3)

def llama_tokenizer(tiny: bool=False):
    "Llama 3's tokenizer from the package llama-models; without it, or if tiny, a small one that reads three digits too"
    from corrnb.models import LLAMA3_SPLIT, tiny_tokenizer
    if tiny: return tiny_tokenizer('three_digits')
    spec = importlib.util.find_spec('llama_models')
    if spec is None:
        print('no Llama 3 tokenizer (pip install --no-deps llama-models): with a small one, a text has more tokens',
              flush=True)
        return tiny_tokenizer('three_digits')
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    lines = (Path(spec.origin).parent/'llama3'/'tokenizer.model').read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    byte = bytes_to_unicode()
    def text(token): return ''.join(byte[b] for b in token)
    merges = sorted((rank, ranks[t[:i]], ranks[t[i:]], text(t[:i]), text(t[i:])) for t, rank in ranks.items()
                    for i in range(1, len(t))
                    if t[:i] in ranks and t[i:] in ranks)
    tok = Tokenizer(models.BPE({text(t): r for t, r in ranks.items()}, [m[3:] for m in merges], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), 'isolated')
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    special = ['<|begin_of_text|>', '<|end_of_text|>', *(f'<|reserved_special_token_{i}|>' for i in range(254))]
    tok.add_special_tokens(special)
    names = dict(bos_token=special[0], eos_token=special[1], pad_token=special[1])
    return PreTrainedTokenizerFast(tokenizer_object=tok, padding_side='left', **names)

def config(tiny: bool):
    "The shape of Llama 3.1 8B, or of a tiny model with the same kinds of layers"
    from transformers import LlamaConfig
    shape = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                 num_key_value_heads=8)
    if tiny:
        shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2)
    tokens = dict(vocab_size=520, bos_token_id=1, eos_token_id=2) if tiny else \
             dict(vocab_size=128256, bos_token_id=128000, eos_token_id=128001)
    rope = dict(rope_type='llama3', rope_theta=500000., factor=8., low_freq_factor=1., high_freq_factor=4.,
                original_max_position_embeddings=8192)
    return LlamaConfig(**shape, **tokens, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_parameters=rope,
                       tie_word_embeddings=False)

class Skip(Exception): "What cannot be measured here, and why"

def need(module: str, package: str=''):
    "Skip what needs a package that is not there, or does not work"
    try: importlib.import_module(module)
    except Exception as e: raise Skip(f'pip install {package or module} ({str(e).strip().splitlines()[0]})')

def read_part(results: Path, part: str) -> dict:
    "What is known of a part: its figures, and which of its steps are done"
    file = results/f'{part}.json'
    return json.loads(file.read_text()) if file.exists() else dict(part=part, done=[], figures=[])

class Bench:
    "A part: its figures, printed and saved as they come, and the model it measures"
    def __init__(self, results: Path, models: Path, part: str, tiny: bool):
        import torch
        self.folder, self.part, self.tiny, self.n, self.failed = results, part, tiny, sizes(tiny), []
        self.known = read_part(results, part) | dict(tiny=tiny)
        self.machine, self.cuda = machine(), torch.cuda.is_available()
        self.model_folder = models/('tiny' if tiny else 'llama-3.1-8b-random')
        self.device, self.dtype = ('cuda:0', torch.bfloat16) if self.cuda else ('cpu', torch.float32)
        if not self.cuda: torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 2)))
        os.environ['MODEL_CACHE_DIR'] = str(models/'cache')

    def save(self):
        from corrnb.files import atomic_write
        atomic_write(self.folder/f'{self.part}.json', json.dumps(self.known, indent=1))

    def record(self, what: str, value: float|None, unit: str, note: str=''):
        "A figure, in place of an earlier one"
        figure = dict(what=what, value=value, unit=unit, note=note, machine=self.machine, tokenizer=self.tokenizer_name)
        self.known['figures'] = [f for f in self.known['figures'] if f['what'] != what] + [figure]
        self.save()
        print(line(figure, self.tiny), flush=True)

    def step(self, f, *args):
        "Measure something unless that was done before; whatever goes wrong, the next step has its turn"
        name = ' '.join([f.__name__, *map(str, args)])
        if name in self.known['done']: return
        try: f(self, *args)
        except Skip as e: self.skip(str(e))
        except Exception as e:
            print(f'{self.part}: {name} failed: {type(e).__name__}: {e}'[:600], flush=True)
            traceback.print_exc()
            self.failed.append(name)
        else:
            self.known['done'].append(name)
            self.save()

    def skip(self, reason: str):
        "Lines for the targets of this part that have no figure"
        known = {f['what'] for f in self.known['figures'] if f['value'] is not None or f['note'] == reason}
        mine = [what for what in TARGETS if what.endswith(f', {self.part}') or self.part == 'trl' and 'TRL' in what]
        for what in mine or [f'{self.part}, NF4']:
            if what not in known: self.record(what, None, '', reason)

    def sync(self):
        import torch
        if self.cuda: torch.cuda.synchronize()

    @contextmanager
    def clock(self):
        "A list that holds the seconds of the block when it is over"
        took = []
        self.sync()
        start = time.perf_counter()
        yield took
        self.sync()
        took.append(time.perf_counter() - start)

    def reset_memory(self):
        "Free what nobody holds, and measure the peak from here"
        import torch
        from accelerate.utils.memory import clear_device_cache
        clear_device_cache(garbage_collection=True)
        if self.cuda: torch.cuda.reset_peak_memory_stats()

    def peak(self) -> str:
        "The largest memory since then; on a CPU of the whole process"
        import torch
        if self.cuda:
            again = torch.cuda.memory_stats().get('num_alloc_retries', 0)
            retries = f', {again} allocator retries' if again else ''
            return f'peak memory {torch.cuda.max_memory_allocated()/1e9:.1f} GB{retries}'
        return f'peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6:.1f} GB (process)'

    def share(self, tokens_per_second: float) -> str:
        "Of what the card could train at its peak"
        import torch
        if self.tiny or not self.cuda or not any(card in torch.cuda.get_device_name() for card in ('H100', 'H200')):
            return ''
        return f', {tokens_per_second*TRAINED_TOKEN/PEAK:.0%} of the peak'

    def random_model(self):
        "A model with random weights, made where it will work"
        import torch
        from transformers import AutoModelForCausalLM
        torch.manual_seed(0)
        with torch.device(self.device): model = AutoModelForCausalLM.from_config(config(self.tiny), dtype=self.dtype)
        model.config.name_or_path = self.model_folder.name
        return model.eval()

    def write_model(self):
        "Random weights on the disk, unless they are there"
        from corrnb.files import atomic_dir
        if self.model_folder.exists(): return
        model = self.random_model()
        with self.clock() as took, atomic_dir(self.model_folder) as tmp:
            model.save_pretrained(tmp, max_shard_size='5GB')
            self.tokenizer.save_pretrained(tmp)
        self.record('random weights written', took[0], 's', f'{model.num_parameters()/1e9:.2f} billion')

    def load(self, quantize: bool):
        "The model from the disk"
        from corrnb.models import load_model
        if quantize: need('bitsandbytes')
        self.write_model()
        return load_model(str(self.model_folder), quantize=quantize, device=self.device, dtype=self.dtype)

    @cached_property
    def model(self):
        "The part's model with an adapter"
        from corrnb.models import add_lora
        return add_lora(self.load(True) if self.part in ('query', 'nf4', 'whole') else self.random_model())

    @cached_property
    def tokenizer(self):
        "The tokenizer; Llama's is put together once, which takes a while"
        from corrnb.files import atomic_dir
        from corrnb.models import load_tokenizer
        if (folder := self.model_folder.parent/'tokenizer').exists() and not self.tiny:
            return load_tokenizer(str(folder))
        tokenizer = llama_tokenizer(self.tiny)
        if len(tokenizer) > 100_000:
            with atomic_dir(folder) as tmp: tokenizer.save_pretrained(tmp)
        return tokenizer

    @property
    def tokenizer_name(self): return f'{len(self.tokenizer)} tokens'

    @cached_property
    def grid(self):
        from corrnb.answers import AnswerGrid
        from corrnb.prompts import ANSWER_PREFIX
        return AnswerGrid(self.tokenizer, prefix=ANSWER_PREFIX)

def line(figure: dict, tiny: bool=False) -> str:
    "A figure as a line of the table; the tiny model has no targets"
    value, target = figure['value'], '' if tiny else TARGETS.get(figure['what'], '')
    shown = 'skipped' if value is None else f'{value:,.0f}' if value >= 1000 else f'{value:.3g}'
    return f"{figure['what']:52} {shown:>9} {figure['unit']:10} {target:18} {figure['note']}".rstrip()


# -- the rows

def market_rows(n: int, tokenizer, tokens: int):
    "`n` pairs of the simulated market with written fields, with as many similar pairs as make about `tokens` tokens"
    import pandas as pd

    from corrnb.demo import simulate_market
    from corrnb.models import encode
    from corrnb.prompts import ANSWER_PREFIX, correlation_type, make_prompt, row_completion
    pairs = simulate_market().pairs
    rows = pd.concat([pairs]*(-(-n//len(pairs)))).head(n).reset_index(drop=True)
    rows['id'], rows['correlation_type'] = [f'row {i}' for i in range(n)], rows[TARGET].map(correlation_type)
    rows['correlation_reasoning'] = [f'What moves {a} also moves {b}, though each has news of its own.'
                                     for a, b in zip(rows.contract_a_event_id, rows.contract_b_event_id)]
    rows['analysis_confidence'] = [0.6 + 0.05*(i % 7) for i in range(n)]
    others = pairs.rename(columns={TARGET: 'value'})
    others = others[['contract_a_title', 'contract_b_title', 'value']].to_dict('records')
    def near(i, k): return [others[(7*i + 11*j + 1) % len(others)] for j in range(k)]
    def length(k):
        prompts = [make_prompt(r.contract_a_title, r.contract_b_title, near(i, k))
                   for i, r in enumerate(rows.head(40).itertuples())]
        texts = [p + ANSWER_PREFIX + '0.50' + row_completion(r, TARGET)
                 for p, r in zip(prompts, rows.to_dict('records'))]
        return sum(map(len, encode(tokenizer, texts)))/len(texts)
    k = min(range(1, 13), key=lambda k: abs(length(k) - tokens))
    return rows, [near(i, k) for i in range(n)], k

def distinct_pairs(n: int):
    "`n` pairs whose contracts all have titles of their own"
    import pandas as pd

    from corrnb.demo import simulate_market
    pairs = simulate_market().pairs
    rows = pd.concat([pairs]*(-(-n//len(pairs)))).head(n).reset_index(drop=True)
    rows['id'], rows['split'] = [f'pair {i}' for i in range(n)], 'train'
    for side in 'ab':
        rows[f'contract_{side}_title'] = [f'{t} ({side.upper()}{i})'
                                          for i, t in enumerate(rows[f'contract_{side}_title'])]
    return rows


# -- training

def trainers():
    "The hybrid trainer and one for cross-entropy alone, with clocks in them"
    import torch.nn.functional as F

    from corrnb.training import RegressionAugmentedTrainer
    class CrossEntropy(RegressionAugmentedTrainer):
        "The usual loss on number and text, without the tree, and logits only where something is learned"
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            m, t = self.grid.n_nodes - 1, inputs['labels'].shape[1]
            ids, real, place = (inputs[k][:, :-m] for k in ('input_ids', 'real', 'position_ids'))
            logits = model(input_ids=ids, position_ids=place, attention_mask=real.long(), logits_to_keep=t + 1,
                           use_cache=False).logits
            labels = ids[:, -t:].masked_fill(~real[:, -t:], -100)
            return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten())
    return {'hybrid': RegressionAugmentedTrainer, 'cross-entropy': CrossEntropy}

def timed_training(bench: Bench, trainer, count) -> float:
    "Tokens/s (no padding, no tree) of a trainer's steps after the first few; `count(batch)`: tokens of a batch"
    from transformers import PrinterCallback, TrainerCallback
    ends, tokens, collate = [], [], trainer.data_collator
    def counting(items):
        batch = collate(items)
        tokens.append(int(count(batch)))
        return batch
    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            ends.clear(), tokens.clear()     # also where it begins again with smaller batches
        def on_step_end(self, *args, **kwargs):
            bench.sync()
            ends.append(time.perf_counter())
    trainer.data_collator = counting
    trainer.add_callback(Clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.data_collator = collate
    trainer.remove_callback(Clock)
    warm, batches = bench.n['warm'], trainer.args.gradient_accumulation_steps
    return sum(tokens[warm*batches:len(ends)*batches])/(ends[-1] - ends[warm - 1])

def our_trainer(bench: Bench, model, rows, near, batch: int, cls, folder, epochs=1, validation=None):
    "corrnb's trainer with the settings of the profile"
    from corrnb.batches import TrainingRows
    from corrnb.parameters import TrainingConfig
    from corrnb.training import make_trainer
    c = TrainingConfig(output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=batch)
    quiet = dict(disable_tqdm=True, logging_strategy='no') | (dict(save_strategy='no') if validation is None else {})
    held_out = None if validation is None else TrainingRows(validation[0], TARGET, c, validation[1])
    return make_trainer(model, bench.grid, TrainingRows(rows, TARGET, c, near), c, held_out, cls, **quiet)

def train_speed(bench: Bench, batch: int):
    "Tokens/s and memory of both losses at so many rows a step"
    rows, near, _ = market_rows((bench.n['steps'] + bench.n['warm'])*batch, bench.tokenizer, bench.n['tokens'])
    speed, name = {}, bench.part
    for loss, cls in trainers().items():
        bench.model, bench.reset_memory()
        with tempfile.TemporaryDirectory() as folder:
            trainer = our_trainer(bench, bench.model, rows, near, batch, cls, folder)
            speed[loss] = timed_training(bench, trainer, lambda b: b['n_tokens'].sum())
        size = trainer.args.per_device_train_batch_size
        at_once = '' if size == batch else f', only {size} rows fit at a time'
        bench.record(f'{loss} training at {batch} rows, {name}', speed[loss], 'tokens/s',
                  bench.peak() + bench.share(speed[loss]) + at_once)
    bench.record(f'hybrid / cross-entropy, time at {batch} rows, {name}', speed['cross-entropy']/speed['hybrid'], '')

def whole_run(bench: Bench):
    "All rows and epochs of the profile, with validation and checkpoints"
    from transformers import PrinterCallback
    n, name = bench.n, bench.part
    rows, near, k = market_rows(n['rows'] + n['evaluated'], bench.tokenizer, n['tokens'])
    bench.model, bench.reset_memory()
    with tempfile.TemporaryDirectory() as folder:
        held_out = rows[n['rows']:].reset_index(drop=True), near[n['rows']:]
        hybrid, first = trainers()['hybrid'], slice(n['rows'])
        trainer = our_trainer(bench, bench.model, rows[first], near[first], 4, hybrid, folder, n['epochs'], held_out)
        tokens = sum(trainer.data_collator([trainer.train_dataset[0, i]])['n_tokens'].item() for i in range(n['rows']))
        trainer.remove_callback(PrinterCallback)
        with bench.clock() as took: trainer.train()
    speed = tokens*n['epochs']/took[0]
    bench.record(f"whole training, {n['rows']} rows x {n['epochs']} epochs, {name}", took[0], 's',
              f"{tokens/n['rows']:.0f} tokens a row, {k} similar pairs; {speed:,.0f} tokens/s{bench.share(speed)}; "
              f"{bench.peak()}")


# -- inference

def answer_speed(bench: Bench):
    "Embedding, evaluation, and one query from its titles to its distribution, against writing"
    from corrnb.inference import CorrelationPredictor
    need('faiss', 'faiss-cpu')
    import pandas as pd

    from corrnb.embeddings import spread_layers
    from corrnb.rag import PairRetriever
    from corrnb.stack import equal_weights, fit_members
    n, name, (_, _, k) = bench.n, bench.part, market_rows(40, bench.tokenizer, bench.n['tokens'])
    if name == 'merged': embedder, model = bench.load(True), bench.model.merge_and_unload()
    else: embedder = model = bench.model
    for weight_name, p in model.named_parameters():    # as `CorrelationPredictor.from_folder` does
        if 'lora_' in weight_name: p.data = p.data.to(bench.dtype)
    known, layers = distinct_pairs(n['pairs'] + n['evaluated'] + n['queries'] + 1), [-1] if bench.tiny else [6, -1]
    known, rest = known[:n['pairs']], known[n['pairs']:].reset_index(drop=True)
    PairRetriever.build(known.head(8), TARGET, embedder, bench.tokenizer, layers)          # warm
    bench.reset_memory()
    with bench.clock() as took: retriever = PairRetriever.build(known, TARGET, embedder, bench.tokenizer, layers)
    bench.record(f'contracts embedded, {name}', took[0], 's',
              f"{2*n['pairs']} texts of {n['pairs']} pairs, and the index; {bench.peak()}")
    novelty = pd.Series(['both_new'])
    members, _ = fit_members(known.head(200), TARGET, novelty, retriever, spread_layers(embedder))
    stack = equal_weights(['gp', 'neighbours', 'language_model'])
    predictor = CorrelationPredictor(model, bench.grid, retriever, k, stack=stack, members=members,
                                     batch_tokens=16384)
    predictor.predict(rest.contract_a_title.iloc[-1], rest.contract_b_title.iloc[-1])   # checks the tree, once a model
    query_speed(bench, predictor, rest[n['evaluated']:n['evaluated'] + n['queries']], k)
    bench.reset_memory()
    with bench.clock() as took: predictor.predict_many(rest.head(n['evaluated']))
    bench.record(f'rows evaluated, {name}', took[0], 's',
              f"{n['evaluated']} rows in both orders, with embedding, search and process; {bench.peak()}")

def query_speed(bench: Bench, predictor, rows, k: int):
    "Seconds of one query, and of writing an answer to the same prompt"
    import torch

    from corrnb.models import encode
    times, n, name = [], bench.n, bench.part
    for r in rows.itertuples():
        with bench.clock() as took: predictor.predict(r.contract_a_title, r.contract_b_title)
        times.append(took[0])
    near, _ = predictor.neighbours(rows.tail(1), k)
    prompts = predictor.prompts(rows.tail(1), near)
    ids = torch.tensor([encode(bench.tokenizer, prompts[:1])[0] + bench.grid.prefix_ids], device=bench.device)
    p50, p95 = statistics.median(times), sorted(times)[min(len(times) - 1, int(.95*len(times)))]
    bench.record(f'one query, p50, {name}', p50, 's',
              f'{len(times)} of about {ids.shape[1]} tokens in both orders, with embedding, search and process')
    bench.record(f'one query, p95, {name}', p95, 's', f'{p95/p50:.2f} times p50')
    query_profile(bench, predictor, rows.head(10))
    seconds, length = [], dict(min_new_tokens=n['written'], max_new_tokens=n['written'])
    for _ in range(3):
        with torch.inference_mode(), bench.clock() as took:
            predictor.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **length,
                                     pad_token_id=bench.tokenizer.pad_token_id)
        seconds.append(took[0])
    middle = statistics.median(seconds)
    bench.record(f"writing {n['written']} tokens, {name}", middle, 's', f'{middle/p50:.1f} times a query')


# -- where the time goes

def profile_table(bench: Bench, run, name: str):
    "Run something under the profiler: the share of the time in which the GPU works, and what takes longest"
    from torch.profiler import ProfilerActivity, profile
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    with bench.clock() as took, profile(activities=activities) as found:
        run()
        bench.sync()
    averages = found.key_averages()
    on_gpu = sum(e.self_device_time_total for e in averages if 'cuda' in str(e.device_type).lower())/1e6
    by = 'self_device_time_total' if bench.cuda else 'self_cpu_time_total'
    file = bench.folder/f'profile-{name.replace(", ", "-").replace(" ", "-")}.txt'
    file.write_text('\n\n'.join(averages.table(sort_by=key, row_limit=12, max_name_column_width=70)
                                for key in (by, 'self_cpu_time_total')))
    if bench.cuda: bench.record(f'GPU at work, {name}', on_gpu/took[0], '', f'{took[0]:.2f} s under the profiler')
    for e in sorted(averages, key=lambda e: -getattr(e, by))[:10]:
        print(f'    {getattr(e, by)/1e3:9.1f} ms {e.count:6} x {e.key[:90]}', flush=True)

def step_profile(bench: Bench, batch: int):
    "One hybrid step"
    from transformers import PrinterCallback
    rows, near, _ = market_rows(batch, bench.tokenizer, bench.n['tokens'])
    bench.model, bench.reset_memory()
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(bench, bench.model, rows, near, batch, trainers()['hybrid'], folder)
        trainer.remove_callback(PrinterCallback)
        trainer.train()                                             # warm
        profile_table(bench, trainer.train, f'hybrid step of {batch} rows, {bench.part}')

def query_profile(bench: Bench, predictor, rows):
    "A few queries"
    def run():
        for r in rows.itertuples(): predictor.predict(f'{r.contract_a_title} again', r.contract_b_title)
    profile_table(bench, run, f'{len(rows)} queries, {bench.part}')


# -- from start to report

def pipeline(bench: Bench):
    "The command line on as many pairs as the profile is made for"
    need('faiss', 'faiss-cpu')
    need('bitsandbytes')
    from corrnb.demo import simulate_market
    bench.write_model()
    n, part = bench.n, ('train', 'val', 'test')
    pairs = simulate_market().pairs.sample(n['pairs'], random_state=0).reset_index(drop=True)
    bounds = n['pairs']*7//10, n['pairs']*17//20
    pairs['split'] = [part[sum(i >= b for b in bounds)] for i in range(len(pairs))]
    with tempfile.TemporaryDirectory() as folder:
        pairs.to_csv(f'{folder}/pairs.csv', index=False)
        command = [sys.executable, '-m', 'corrnb', 'run', '--profile', 'h100', '--pairs', f'{folder}/pairs.csv',
                   '--runs-dir', folder, '--name', 'whole', '-p', 'model_name', str(bench.model_folder)]
        if bench.tiny: command += ['-p', 'embedding_layers', '-1', '-p', 'num_train_epochs', '1']
        with bench.clock() as took: done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout[-3000:], flush=True)
        log = Path(folder, 'whole', 'run.log')
        if log.exists(): (bench.folder/'run.log').write_text(log.read_text())
        if done.returncode: raise RuntimeError((done.stdout + done.stderr)[-2000:])
    stages = ', '.join(' '.join(line.split()[1:4]) for line in done.stdout.splitlines() if line.startswith('['))
    bench.record(f'corrnb run --profile h100, {bench.part}', took[0], 's', f"{n['pairs']} pairs, NF4: {stages}")


# -- loading

def load_time(bench: Bench):
    "How long the weights take from the disk to the device"
    from corrnb.models import load_model
    load_model('tiny')                                     # warm
    bench.write_model()
    load_in(bench, 'bf16 weights', False)
    bench.load(True)                                       # NF4 is in the cache now
    load_in(bench, 'NF4 from the cache', True)
    shutil.rmtree(os.environ['MODEL_CACHE_DIR'])
    load_in(bench, 'NF4, quantized while loading, and put into the cache', True)

def load_in(bench: Bench, what: str, quantize: bool):
    "Seconds to load one kind of weights"
    bench.reset_memory()
    with bench.clock() as took: bench.load(quantize)
    bench.record(f'load {what}', took[0], 's', f'{bench.peak()}; the files may be in the memory of the system')


# -- against TRL

def sft_trainer(bench: Bench, ours, folder: str):
    "TRL's SFTTrainer for the same rows in the same batches, with the same model, adapter, optimizer and schedule"
    import datasets
    import trl

    from corrnb.models import add_lora, encode
    grid, tokenizer = bench.grid, bench.tokenizer
    def row(x):
        head = encode(tokenizer, [x['prompt']])[0] + grid.prefix_ids
        answer = next(a for a, v in zip(grid.answer_ids, grid.values.tolist()) if abs(v - x['value']) < .0051)
        tail = answer + encode(tokenizer, [x['completion']], bos=False)[0] + [tokenizer.eos_token_id]
        return dict(input_ids=head + tail, labels=[-100]*len(head) + tail)
    shared = ('num_train_epochs', 'per_device_train_batch_size', 'learning_rate', 'lr_scheduler_type', 'warmup_steps',
              'optim', 'seed', 'max_grad_norm', 'save_strategy', 'logging_strategy', 'disable_tqdm', 'report_to',
              'use_cpu', 'bf16', 'dataloader_pin_memory', 'gradient_checkpointing')
    data = datasets.Dataset.from_list([row(ours.train_dataset[key]) for key in ours._get_train_sampler()])
    sft = trl.SFTTrainer(model=add_lora(bench.random_model()), train_dataset=data, processing_class=tokenizer,
                         args=trl.SFTConfig(folder, max_length=None, **{k: getattr(ours.args, k) for k in shared}))
    sft.args.train_sampling_strategy = 'sequential'
    return sft

def against_trl(bench: Bench):
    "Tokens/s of corrnb and TRL in turns"
    for package in ('datasets', 'trl'): need(package)
    rows, near, _ = market_rows(4*(bench.n['steps'] + bench.n['warm']), bench.tokenizer, bench.n['tokens'])
    pad = bench.tokenizer.pad_token_id
    def counted(batch):
        return (batch['attention_mask'] if 'attention_mask' in batch else batch['input_ids'] != pad).sum()
    speed = {'corrnb': [], 'TRL': []}
    with tempfile.TemporaryDirectory() as folder:
        ours = our_trainer(bench, bench.model, rows, near, 4, trainers()['hybrid'], folder)
        sft = sft_trainer(bench, ours, folder)
        for _ in range(bench.n['rounds']):
            speed['corrnb'].append(timed_training(bench, ours, lambda b: b['n_tokens'].sum()))
            speed['TRL'].append(timed_training(bench, sft, counted))
    for name, s in speed.items():
        bench.record(f'{name} at 4 rows, bf16', statistics.median(s), 'tokens/s', f'median of {len(s)}')
    bench.record('corrnb / TRL, tokens/s', statistics.median(a/b for a, b in zip(*speed.values())), '',
              f"trl {version('trl')}")


# -- the parts

STEPS = dict(query=[(answer_speed,)], nf4=[(train_speed, 16), (step_profile, 16), (train_speed, 4)],
             bf16=[(train_speed, 16), (step_profile, 16), (train_speed, 4)], run=[(pipeline,)],
             merged=[(answer_speed,)], trl=[(against_trl,)], whole=[(whole_run,)], load=[(load_time,)])

def machine() -> str:
    "Device and versions"
    import torch
    if torch.cuda.is_available():
        device = f'{torch.cuda.get_device_name()} ({torch.cuda.get_device_properties(0).total_memory/2**30:.0f} GiB)'
    else:
        info = Path('/proc/cpuinfo')
        lines = info.read_text().splitlines() if info.exists() else []
        names = [text.split(': ')[1] for text in lines if text.startswith('model name')]
        device = names[0].strip() if names else platform.processor()
    found = []
    for p in ('torch', 'transformers', 'peft', 'bitsandbytes', 'trl'):
        try: found.append(f'{p} {version(p)}')
        except PackageNotFoundError: found.append(f'no {p}')
    return f"{device}; Python {platform.python_version()}, {', '.join(found)}"

def held_memory() -> float:
    "Bytes of the GPU that are not free, before this process has taken any"
    import torch
    free, total = torch.cuda.mem_get_info()
    return total - free

def child(results: Path, models: Path, part: str, tiny: bool) -> int:
    "One part, in this process"
    from transformers.utils import logging as hf_logging
    warnings.filterwarnings('ignore')
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    bench = Bench(results, models, part, tiny)
    if bench.cuda and (held := held_memory()) > 1e9: print(f'another process holds {held/1e9:.1f} GB of the GPU')
    for step in STEPS[part]: bench.step(*step)
    return 1 if bench.failed else 0

def run_part(a, part: str, seconds: float) -> str:
    "A part in a process of its own; what went wrong, if anything did"
    if part == 'check':
        where = [] if not a.tiny else ['--device', 'cpu']
        try: done = subprocess.run([sys.executable, Path(__file__).with_name('gpu_check.py'), *where], timeout=seconds)
        except subprocess.TimeoutExpired: return f'its {seconds:.0f} s are over'
        return f'{done.returncode} checks failed' if done.returncode else ''
    steps = {' '.join([f.__name__, *map(str, args)]) for f, *args in STEPS[part]}
    if steps <= set((known := read_part(a.results, part))['done']):
        for figure in known['figures']: print(line(figure, a.tiny), flush=True)
        return ''
    if seconds < 5: return 'no time is left; the same command goes on'
    command = [sys.executable, __file__, a.results, part, '--child', '--models', a.models,
               *(['--tiny'] if a.tiny else [])]
    env = dict(TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1',
               CUDA_VISIBLE_DEVICES='0') | os.environ    # one GPU, and no network
    with open(a.results/f'{part}.log', 'w') as log:
        try: done = subprocess.run([str(c) for c in command], stderr=log, text=True, timeout=seconds, env=env)
        except subprocess.TimeoutExpired: return f'its {seconds:.0f} s are over; the same command goes on'
    return f"see {a.results/f'{part}.log'}" if done.returncode else ''

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path, help='folder for figures and logs')
    parser.add_argument('parts', nargs='*', metavar='PART', help=f"which parts; default all: {', '.join(PARTS)}")
    parser.add_argument('--models', type=Path, help='folder for weights, 22 GB; default: models in RESULTS')
    parser.add_argument('--tiny', action='store_true', help='a tiny model, also on a CPU')
    parser.add_argument('--minutes', type=float, default=30, help='for all parts; what is left over is not begun')
    parser.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
    a = parser.parse_intermixed_args()
    if unknown := set(a.parts) - set(PARTS): parser.error(f"no part {unknown.pop()!r}: there are {', '.join(PARTS)}")
    a.results, parts = a.results.resolve(), a.parts or list(PARTS)
    a.models = (a.models or a.results/'models').resolve()
    if a.child: return child(a.results, a.models, parts[0], a.tiny)
    if any(read_part(a.results, p).get('tiny', a.tiny) != a.tiny for p in PARTS):
        parser.error(f'{a.results} holds figures of another model: take another folder')
    import torch
    if not a.tiny and not torch.cuda.is_available(): return 'No GPU: add --tiny to see on a CPU that everything works'
    end, failed = time.monotonic() + 60*a.minutes, []
    for folder in (a.results, a.models): folder.mkdir(parents=True, exist_ok=True)
    print(machine(), line(dict(what='what', value=None, unit='unit', note='note')).replace('skipped', ' figure'),
          sep='\n', flush=True)
    for part in parts:
        if wrong := run_part(a, part, min(PARTS[part], end - time.monotonic())):
            failed.append(part)
            print(f'{part} did not finish: {wrong}', flush=True)
    return 1 if failed else 0

if __name__ == '__main__': sys.exit(main())
