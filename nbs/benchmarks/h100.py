"""Speed and memory of corrnb with a model of the exact shape of Llama 3.1 8B and random weights: loading, embedding, training, evaluation, one query.

    python h100.py RESULTS [PART ...] [--tiny] [--minutes 10]

Parts run one after the other, each in a process of its own: weights (made once, 16 GB in RESULTS), nf4, bf16, merged, trl. Every figure is printed and
saved the moment it is measured, so a run that is killed keeps what it has. `--tiny`: a model of two layers, on a CPU, to see that everything works.
Random weights say nothing about accuracy, and speed does not depend on them.
"""
import argparse, base64, importlib.util, json, os, platform, resource, shutil, statistics, subprocess, sys, tempfile, time, warnings
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# what a figure should reach on one H100
TARGETS = {'hybrid training at 16 rows, nf4': '>= 6000 tokens/s', 'hybrid training at 16 rows, bf16': '>= 10000 tokens/s',
           'hybrid / cross-entropy, time at 16 rows, nf4': '<= 1.15', 'hybrid / cross-entropy, time at 16 rows, bf16': '<= 1.15',
           'contracts embedded, nf4': '<= 10 s', 'contracts embedded, bf16': '<= 10 s',
           'rows evaluated, nf4': '<= 5 s', 'rows evaluated, bf16': '<= 5 s', 'one query, p50, nf4': '<= 0.1 s', 'one query, p50, bf16': '<= 0.1 s',
           'one query, p50, merged': '<= 0.1 s', 'corrnb / TRL, tokens/s': '>= 0.95'}
PARTS = ('weights', 'nf4', 'bf16', 'merged', 'trl')
PEAK, TRAINED_TOKEN = 989e12, 28.3e9      # dense bf16 of an H100 SXM, FLOP/s; FLOP of a trained token (frozen weights: 14.0 forward and as many backward, and LoRA)
TARGET = 'underlying_event_correlation'


# -- what is measured with

def sizes(tiny: bool) -> dict:
    "How much of everything"
    return dict(pairs=12, rows=24, epochs=1, evaluated=6, queries=3, written=4, tokens=200, steps=2, warm=1, rounds=1) if tiny else \
           dict(pairs=750, rows=525, epochs=3, evaluated=113, queries=100, written=60, tokens=300, steps=8, warm=2, rounds=3)

def llama_tokenizer(tiny: bool=False):
    "The tokenizer of Llama 3 from the package llama-models; without it, or for the tiny model, a small one that also reads three digits at a time"
    from corrnb.models import _LLAMA3_SPLIT, tiny_tokenizer
    if tiny: return tiny_tokenizer('three_digits')
    spec = importlib.util.find_spec('llama_models')
    if spec is None:
        print('No Llama 3 tokenizer (pip install --no-deps llama-models): a tiny one is used, so a text has more tokens than Llama would read')
        return tiny_tokenizer('three_digits')
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    lines = (Path(spec.origin).parent/'llama3'/'tokenizer.model').read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    byte = bytes_to_unicode()
    def text(token): return ''.join(byte[b] for b in token)
    merges = sorted((rank, ranks[t[:i]], ranks[t[i:]], text(t[:i]), text(t[i:])) for t, rank in ranks.items() for i in range(1, len(t))
                    if t[:i] in ranks and t[i:] in ranks)
    tok = Tokenizer(models.BPE({text(t): r for t, r in ranks.items()}, [m[3:] for m in merges], ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), 'isolated'), pre_tokenizers.ByteLevel(False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    special = ['<|begin_of_text|>', '<|end_of_text|>', *(f'<|reserved_special_token_{i}|>' for i in range(254))]
    tok.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=special[0], eos_token=special[1], pad_token=special[1], padding_side='left')

def config(tiny: bool):
    "The shape of Llama 3.1 8B, or of a tiny model with the same kinds of layers"
    from transformers import LlamaConfig
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2) if tiny else \
            dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
    rope = dict(rope_type='llama3', rope_theta=500000., factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=8192)
    return LlamaConfig(**shape, vocab_size=520 if tiny else 128256, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_parameters=rope, tie_word_embeddings=False,
                       bos_token_id=1 if tiny else 128000, eos_token_id=2 if tiny else 128001)

class Bench:
    "A part: its figures, printed and saved as they come"
    def __init__(self, results: Path, part: str, tiny: bool):
        import torch
        self.folder, self.part, self.tiny, self.figures, self.n = results, part, tiny, [], sizes(tiny)
        self.model_folder, self.cuda = results/('tiny' if tiny else 'llama-3.1-8b-random'), torch.cuda.is_available() and not tiny
        self.device, self.dtype = ('cuda', torch.bfloat16) if self.cuda else ('cpu', torch.float32)
        if not self.cuda: torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 2)))
        os.environ['MODEL_CACHE_DIR'] = str(results/'cache')

    def say(self, what: str, value: float|None, unit: str, note: str=''):
        "A figure"
        from corrnb.config import atomic_write
        self.figures.append(dict(part=self.part, what=what, value=value, unit=unit, note=note))
        atomic_write(self.folder/f'{self.part}.json', json.dumps(self.figures, indent=1))
        print(line(self.figures[-1], self.tiny), flush=True)

    def sync(self):
        import torch
        if self.cuda: torch.cuda.synchronize()

    @contextmanager
    def clock(self):
        "A list that holds the seconds of the block when it is over"
        took = []
        self.sync(); start = time.perf_counter()
        yield took
        self.sync(); took.append(time.perf_counter() - start)

    def reset_memory(self):
        "Free what nobody holds, and measure the peak from here"
        from accelerate.utils.memory import clear_device_cache
        import torch
        clear_device_cache(garbage_collection=True)
        if self.cuda: torch.cuda.reset_peak_memory_stats()

    def peak(self) -> str:
        "The largest memory since then; on a CPU of the whole process"
        import torch
        if self.cuda: return f'peak memory {torch.cuda.max_memory_allocated()/1e9:.1f} GB'
        return f'peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6:.1f} GB (process)'

    def load(self, quantize: bool):
        "The model with random weights"
        from corrnb.models import load_model
        return load_model(str(self.model_folder), quantize=quantize, device=self.device, dtype=self.dtype)

def line(figure: dict, tiny: bool=False) -> str:
    "A figure as a line of the table; the tiny model has no targets"
    value, target = figure['value'], '' if tiny else TARGETS.get(figure['what'], '')
    shown = 'skipped' if value is None else f'{value:,.0f}' if value >= 1000 else f'{value:.3g}'
    return f"{figure['what']:52} {shown:>9} {figure['unit']:10} {target:18} {figure['note']}".rstrip()


# -- the rows

def market_rows(n: int, tokenizer, tokens: int):
    "`n` pairs of the simulated market with written fields, and as many similar pairs each as make about `tokens` tokens of a row on average"
    import pandas as pd
    from corrnb.demo import simulate_market
    from corrnb.models import encode
    from corrnb.prompts import ANSWER_PREFIX, correlation_type, make_prompt, row_completion
    pairs = simulate_market().pairs
    rows = pd.concat([pairs]*(-(-n//len(pairs)))).head(n).reset_index(drop=True)
    rows['id'], rows['correlation_type'] = [f'row {i}' for i in range(n)], rows[TARGET].map(correlation_type)
    rows['correlation_reasoning'] = [f'What moves {r.contract_a_event_id} also moves {r.contract_b_event_id}, though each has news of its own.' for r in rows.itertuples()]
    rows['analysis_confidence'] = [0.6 + 0.05*(i % 7) for i in range(n)]
    others = pairs.rename(columns={TARGET: 'value'})[['contract_a_title', 'contract_b_title', 'value']].to_dict('records')
    def near(i, k): return [others[(7*i + 11*j + 1) % len(others)] for j in range(k)]
    def length(k):
        texts = [make_prompt(r.contract_a_title, r.contract_b_title, near(i, k)) + ANSWER_PREFIX + '0.50' + row_completion(r._asdict(), TARGET)
                 for i, r in enumerate(rows.head(40).itertuples())]
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
    for side in 'ab': rows[f'contract_{side}_title'] = [f'{t} ({side.upper()}{i})' for i, t in enumerate(rows[f'contract_{side}_title'])]
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
            logits = model(input_ids=ids, position_ids=place, attention_mask=real.long(), logits_to_keep=t + 1, use_cache=False).logits[:, :-1]
            labels = ids[:, -t:].masked_fill(~real[:, -t:], -100)
            return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
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
        def on_step_end(self, *args, **kwargs):
            bench.sync()
            ends.append(time.perf_counter())
    trainer.data_collator = counting
    trainer.add_callback(Clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.data_collator = collate
    trainer.remove_callback(Clock)
    warm = bench.n['warm']
    return sum(tokens[warm:len(ends)])/(ends[-1] - ends[warm - 1])

def our_trainer(bench: Bench, model, grid, rows, near, batch: int, cls, folder, epochs=1, validation=None, **arguments):
    "corrnb's trainer with the settings of the profile"
    from corrnb.training import TrainingConfig, TrainingRows, make_trainer
    c = TrainingConfig(output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=batch)
    quiet = dict(disable_tqdm=True, logging_strategy='no') | (dict(save_strategy='no') if validation is None else {})
    return make_trainer(model, grid, TrainingRows(rows, TARGET, c, near), c, validation and TrainingRows(*validation[:1], TARGET, c, *validation[1:]), cls,
                        **quiet, **arguments)

def train_speed(bench: Bench, name: str, model, grid, tokenizer):
    "Tokens/s and memory of both losses at 4 and 16 rows a step"
    n = bench.n['steps'] + bench.n['warm']
    for batch in (4, 16):
        rows, near, _ = market_rows(n*batch, tokenizer, bench.n['tokens'])
        speed = {}
        for loss, cls in trainers().items():
            bench.reset_memory()
            with tempfile.TemporaryDirectory() as folder:
                speed[loss] = timed_training(bench, our_trainer(bench, model, grid, rows, near, batch, cls, folder), lambda b: b['n_tokens'].sum())
            share = f", {speed[loss]*TRAINED_TOKEN/PEAK:.0%} of the H100's floor" if bench.cuda else ''
            bench.say(f'{loss} training at {batch} rows, {name}', speed[loss], 'tokens/s', bench.peak() + share)
        bench.say(f'hybrid / cross-entropy, time at {batch} rows, {name}', speed['cross-entropy']/speed['hybrid'], '')

def whole_run(bench: Bench, name: str, model, grid, tokenizer):
    "All rows and epochs of the profile, with validation and checkpoints"
    n = bench.n
    rows, near, k = market_rows(n['rows'] + n['evaluated'], tokenizer, n['tokens'])
    bench.reset_memory()
    with tempfile.TemporaryDirectory() as folder:
        held_out = rows[n['rows']:].reset_index(drop=True), near[n['rows']:]
        trainer = our_trainer(bench, model, grid, rows[:n['rows']], near[:n['rows']], 4, trainers()['hybrid'], folder, n['epochs'], held_out)
        tokens = sum(trainer.data_collator([trainer.train_dataset[0, i]])['n_tokens'].item() for i in range(n['rows']))
        from transformers import PrinterCallback
        trainer.remove_callback(PrinterCallback)
        with bench.clock() as took: trainer.train()
    floor = f", {tokens*n['epochs']*TRAINED_TOKEN/PEAK:.1f} s at the H100's peak" if bench.cuda else ''
    bench.say(f"whole training, {n['rows']} rows x {n['epochs']} epochs, {name}", took[0], 's',
              f"{tokens/n['rows']:.0f} tokens a row, {k} similar pairs; {tokens*n['epochs']/took[0]:,.0f} tokens/s{floor}; {bench.peak()}")


# -- inference

def answer_speed(bench: Bench, name: str, model, embedder, grid, tokenizer):
    "Embedding, evaluation, and one query from its titles to its distribution, against writing"
    import torch
    from corrnb.inference import CorrelationPredictor
    from corrnb.models import encode
    from corrnb.rag import PairRetriever
    n, (_, _, k) = bench.n, market_rows(40, tokenizer, bench.n['tokens'])
    known = distinct_pairs(n['pairs'] + n['evaluated'] + n['queries'] + 1)
    known, rest = known[:n['pairs']], known[n['pairs']:].reset_index(drop=True)
    bench.reset_memory()
    with bench.clock() as took: retriever = PairRetriever.build(known, TARGET, embedder, tokenizer, [6, -1] if not bench.tiny else [-1])
    bench.say(f'contracts embedded, {name}', took[0], 's', f"those of {n['pairs']} pairs, {2*n['pairs']} texts, and the index; {bench.peak()}")
    predictor = CorrelationPredictor(model, grid, retriever, k, batch_tokens=16384)
    predictor.predict(rest.contract_a_title.iloc[-1], rest.contract_b_title.iloc[-1])      # checks the tree, once for a model
    bench.reset_memory()
    with bench.clock() as took: predictor.predict_many(rest.head(n['evaluated']))
    bench.say(f'rows evaluated, {name}', took[0], 's', f"{n['evaluated']} rows in both orders, embedding and search included; {bench.peak()}")
    times, prompts = [], []
    for r in rest[n['evaluated']:n['evaluated'] + n['queries']].itertuples():
        with bench.clock() as took: predictor.predict(r.contract_a_title, r.contract_b_title)
        times.append(took[0])
    near, _ = predictor.neighbours(rest.tail(1), k)
    prompt = encode(tokenizer, predictor._prompts([tuple(rest.iloc[-1][['contract_a_title', 'contract_b_title']])], near)[:1])[0] + grid.prefix_ids
    p50, p95 = statistics.median(times), sorted(times)[min(len(times) - 1, int(.95*len(times)))]
    bench.say(f'one query, p50, {name}', p50, 's', f'{len(times)} queries of about {len(prompt)} tokens in both orders, embedding and search included')
    bench.say(f'one query, p95, {name}', p95, 's')
    ids = torch.tensor([prompt], device=bench.device)
    def write():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=n['written'], max_new_tokens=n['written'], do_sample=False,
                       pad_token_id=tokenizer.pad_token_id)
    seconds = []
    for _ in range(3):
        with torch.inference_mode(), bench.clock() as took: write()
        seconds.append(took[0])
    bench.say(f"writing {n['written']} tokens, {name}", statistics.median(seconds), 's', f'{statistics.median(seconds)/p50:.0f} times a query')


# -- the parts

def weights(bench: Bench):
    "Random weights on the disk, and how long they take to load"
    import torch
    from transformers import LlamaForCausalLM
    if not bench.model_folder.exists():
        from corrnb.config import atomic_dir
        default = torch.get_default_dtype()
        torch.set_default_dtype(bench.dtype)
        with bench.clock() as took, torch.device(bench.device): model = LlamaForCausalLM(config(bench.tiny))
        torch.set_default_dtype(default)
        with bench.clock() as saved, atomic_dir(bench.model_folder) as tmp: model.save_pretrained(tmp, max_shard_size='5GB')
        bench.say('random weights made and written', took[0] + saved[0], 's', f'{model.num_parameters()/1e9:.2f} billion')
        del model
    shutil.rmtree(bench.folder/'cache', ignore_errors=True)
    for what, quantize in {'bf16 weights': False, 'NF4, quantized while loading': True, 'NF4 from the cache': True}.items():
        bench.reset_memory()
        with bench.clock() as took: model = bench.load(quantize)
        bench.say(f'load {what}', took[0], 's', f'{bench.peak()}; the files may be in the memory of the system')
        del model

def one_kind(bench: Bench, quantize: bool):
    "Everything with one kind of weights"
    from corrnb.answers import AnswerGrid
    from corrnb.models import add_lora
    from corrnb.prompts import ANSWER_PREFIX
    tokenizer = llama_tokenizer(bench.tiny)
    grid, model = AnswerGrid(tokenizer, prefix=ANSWER_PREFIX), add_lora(bench.load(quantize))
    train_speed(bench, bench.part, model, grid, tokenizer)
    answer_speed(bench, bench.part, model, model, grid, tokenizer)
    whole_run(bench, bench.part, model, grid, tokenizer)

def merged(bench: Bench):
    "Queries with the adapter added to the weights of a second copy"
    from corrnb.answers import AnswerGrid
    from corrnb.models import add_lora
    from corrnb.prompts import ANSWER_PREFIX
    tokenizer = llama_tokenizer(bench.tiny)
    model = add_lora(bench.load(False)).merge_and_unload()
    answer_speed(bench, 'merged', model, bench.load(True), AnswerGrid(tokenizer, prefix=ANSWER_PREFIX), tokenizer)

def trl(bench: Bench):
    "TRL's SFTTrainer beside ours: the same rows in the same batches, the same model, adapter, optimizer and schedule"
    if importlib.util.find_spec('trl') is None: return bench.say('corrnb / TRL, tokens/s', None, '', 'TRL is not installed: pip install trl')
    import datasets
    from trl import SFTConfig, SFTTrainer
    from corrnb.answers import AnswerGrid
    from corrnb.models import add_lora, encode
    from corrnb.prompts import ANSWER_PREFIX
    tokenizer, n = llama_tokenizer(bench.tiny), bench.n['steps'] + bench.n['warm']
    grid, (rows, near, _) = AnswerGrid(tokenizer, prefix=ANSWER_PREFIX), market_rows(4*n, tokenizer, bench.n['tokens'])
    folder = tempfile.TemporaryDirectory()
    ours = our_trainer(bench, add_lora(bench.load(False)), grid, rows, near, 4, trainers()['hybrid'], folder.name)
    def row(x):
        head = encode(tokenizer, [x['prompt']])[0] + grid.prefix_ids
        tail = next(a for a, v in zip(grid.answer_ids, grid.values.tolist()) if abs(v - x['value']) < .0051) + encode(tokenizer, [x['completion']], bos=False)[0]
        return dict(input_ids=head + tail + [tokenizer.eos_token_id], labels=[-100]*len(head) + tail + [tokenizer.eos_token_id])
    order = list(ours._get_train_sampler())
    shared = ('num_train_epochs', 'per_device_train_batch_size', 'learning_rate', 'lr_scheduler_type', 'warmup_steps', 'optim', 'max_grad_norm', 'seed',
              'save_strategy', 'logging_strategy', 'disable_tqdm', 'report_to', 'use_cpu', 'bf16', 'dataloader_pin_memory', 'gradient_checkpointing')
    sft = SFTTrainer(model=add_lora(bench.load(False)), train_dataset=datasets.Dataset.from_list([row(ours.train_dataset[key]) for key in order]),
                     processing_class=tokenizer, args=SFTConfig(folder.name, max_length=None, **{k: getattr(ours.args, k) for k in shared}))
    sft.args.train_sampling_strategy = 'sequential'
    speed = {'corrnb': [], 'TRL': []}
    for _ in range(bench.n['rounds']):
        speed['corrnb'].append(timed_training(bench, ours, lambda b: b['n_tokens'].sum()))
        speed['TRL'].append(timed_training(bench, sft, lambda b: b['attention_mask'].sum() if 'attention_mask' in b else (b['input_ids'] != tokenizer.pad_token_id).sum()))
    for name, s in speed.items(): bench.say(f'{name} at 4 rows, bf16', statistics.median(s), 'tokens/s', f'median of {len(s)}')
    bench.say('corrnb / TRL, tokens/s', statistics.median(a/b for a, b in zip(*speed.values())), '', f"trl {version('trl')}")

def machine(tiny: bool) -> str:
    "Device and versions"
    import torch
    cpu = next((l.split(': ')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor()) if Path('/proc/cpuinfo').exists() else platform.processor()
    device = cpu if tiny or not torch.cuda.is_available() else f'{torch.cuda.get_device_name()} ({torch.cuda.get_device_properties(0).total_memory/2**30:.0f} GiB)'
    found = []
    for p in ('torch', 'transformers', 'peft', 'bitsandbytes', 'trl'):
        try: found.append(f'{p} {version(p)}')
        except PackageNotFoundError: found.append(f'no {p}')
    return f"{device}; Python {platform.python_version()}, {', '.join(found)}"

def child(results: Path, part: str, tiny: bool):
    "One part, in this process"
    from transformers.utils import logging as hf_logging
    warnings.filterwarnings('ignore')
    hf_logging.set_verbosity_error(); hf_logging.disable_progress_bar()
    bench = Bench(results, part, tiny)
    if part in ('nf4', 'bf16'): one_kind(bench, part == 'nf4')
    else: dict(weights=weights, merged=merged, trl=trl)[part](bench)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path, help='folder for figures and weights')
    parser.add_argument('parts', nargs='*', metavar='PART', help=f"which parts; default all: {', '.join(PARTS)}")
    parser.add_argument('--tiny', action='store_true', help='a tiny model on a CPU')
    parser.add_argument('--minutes', type=float, default=10, help='after which no part goes on')
    parser.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
    a = parser.parse_intermixed_args()
    if unknown := set(a.parts) - set(PARTS): parser.error(f"no part {unknown.pop()!r}: there are {', '.join(PARTS)}")
    if a.child: return child(a.results.resolve(), a.parts[0], a.tiny)
    import torch
    if not a.tiny and not torch.cuda.is_available(): return 'No GPU: add --tiny to see on a CPU that everything works'
    end, failed = time.monotonic() + 60*a.minutes, []
    a.results.mkdir(parents=True, exist_ok=True)
    print(machine(a.tiny), line(dict(what='what', value=None, unit='unit', note='note')).replace('skipped', ' figure'), sep='\n', flush=True)
    for part in a.parts or PARTS:
        command = [sys.executable, __file__, str(a.results), part, '--child', *(['--tiny'] if a.tiny else [])]
        try: done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=max(1, end - time.monotonic()))
        except subprocess.TimeoutExpired: done = None
        if done is None or done.returncode:
            failed.append(part)
            print(f"{part} did not finish: {'time is up' if done is None else done.stderr.strip()[-1500:]}", flush=True)
    return 1 if failed else 0

if __name__ == '__main__': sys.exit(main())
