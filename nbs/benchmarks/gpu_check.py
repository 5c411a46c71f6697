"""Is corrnb right on this device? Random models, no download, three minutes at most

    python gpu_check.py [NAME ...] [--device cuda]

Each check prints ok or what is wrong, and the next one has its turn. The same script runs on a CPU (--device cpu).
"""
import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

TARGET = 'underlying_event_correlation'
PROMPTS = ['Will rates rise? | Will gold fall?:\n',
           'A | B: 0.34\nWill rates rise by June, after all? | Will it rain?:\n']
KINDS = dict(float32=1e-4, bfloat16=.02, float16=.02, nf4=.02)     # means against brute force in the same type


# -- models and rows

def model_of(kind: str, device: str):
    "A random Llama of four layers, with random weights that are the same everywhere"
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from corrnb.models import load_model, tiny_tokenizer
    tokenizer = tiny_tokenizer('three_digits')
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                         num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=1,
                         eos_token_id=2, pad_token_id=0, initializer_range=.1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    if kind != 'nf4': return model.to(device, getattr(torch, kind)), tokenizer
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f'{folder}/random')
        return load_model(f'{folder}/random', quantize=True, device=device, cache_dir=Path(folder)), tokenizer

def adapted(kind: str, device: str):
    "The model with an adapter that changes it, the same everywhere, its tokenizer and grid"
    import torch

    from corrnb.answers import AnswerGrid
    from corrnb.models import add_lora
    from corrnb.prompts import ANSWER_PREFIX
    model, tokenizer = model_of(kind, device)
    model = add_lora(model)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if 'lora_B' in name: p.data.copy_(torch.randn(p.shape, generator=generator)*.02)
    return model, tokenizer, AnswerGrid(tokenizer, prefix=ANSWER_PREFIX)

def adapter(model):
    "All weights that learn, as one vector"
    import torch
    return torch.cat([p.detach().float().flatten().cpu() for p in model.parameters() if p.requires_grad])

def market(n: int):
    "Pairs of the simulated market, with something written"
    from corrnb.demo import simulate_market
    from corrnb.prompts import correlation_type
    rows = simulate_market().pairs.head(n).assign(split='train').reset_index(drop=True)
    return rows.assign(correlation_type=rows[TARGET].map(correlation_type), correlation_reasoning='one moves the other',
                       analysis_confidence=.8)

def trainer_of(model, grid, folder: str, n: int, arguments=None, **settings):
    "A trainer on `n` rows that prints nothing"
    from transformers import PrinterCallback

    from corrnb.batches import TrainingRows
    from corrnb.parameters import TrainingConfig
    from corrnb.training import make_trainer
    c = TrainingConfig(**dict(output_dir=folder, num_train_epochs=1) | settings)
    rows = TrainingRows(market(n), TARGET, c)
    quiet = dict(disable_tqdm=True, logging_strategy='no')
    trainer = make_trainer(model, grid, rows, c, **quiet | (arguments or {}))
    trainer.remove_callback(PrinterCallback)
    return trainer

def apart(x, y) -> float:
    "Largest difference relative to the largest value"
    x, y = (t.detach().double().cpu() for t in (x, y))
    return ((x - y).abs().max()/y.abs().max().clamp_min(1e-9)).item()

def below(value: float, limit: float, what: str) -> str:
    "What is shown of a difference; AssertionError where it is too large"
    assert value <= limit, f'{what} {value:.2g}, allowed {limit:.2g}'
    return f'{what} {value:.1g}'


# -- checks: each returns what it has seen, or raises

def tree(device: str) -> str:
    "Answers of the tree against brute force in every type, and against the CPU in float32"
    import torch

    from corrnb.answers import AnswerDistribution
    shown, reference = [], None
    for kind, limit in KINDS.items():
        model, _, grid = adapted(kind, device)
        with torch.no_grad():
            fast, slow = (grid.log_probs(model, PROMPTS, m).float().cpu() for m in ('tree', 'sequences'))
        means = [AnswerDistribution(grid.values, x).mean for x in (fast, slow)]
        shown.append(below((means[0] - means[1]).abs().max().item(), limit, f'{kind}: means differ by'))
        if kind == 'float32': reference = fast
    model, _, grid = adapted('float32', 'cpu')
    with torch.no_grad(): here = grid.log_probs(model, PROMPTS)
    return '; '.join([*shown, below((here - reference).abs().max().item(), 1e-3, 'log p against the CPU')])

def step(device: str) -> str:
    "Hybrid loss and the adapter's gradients against the CPU in float32; in bfloat16 near it"
    import torch
    found = {}
    for place, kind in (('cpu', 'float32'), (device, 'float32'), (device, 'bfloat16'), (device, 'nf4')):
        model, _, grid = adapted(kind, place)
        with tempfile.TemporaryDirectory() as folder:
            straight = dict(lr_scheduler_type='constant', warmup_steps=0, save_strategy='no')
            trainer = trainer_of(model, grid, folder, 8, straight, per_device_train_batch_size=8, optim='sgd',
                                 learning_rate=1)
            before = adapter(model)
            trainer.train()       # one step along the gradient, which is clipped to length one
        found[place, kind] = torch.tensor(trainer.state.log_history[-1]['train_loss']), adapter(model) - before
    (loss, gradient), (same, same_gradient) = found['cpu', 'float32'], found[device, 'float32']
    assert .5 < gradient.norm() < 1.5, f'the step is {gradient.norm():.2g} long'
    shown = [below(apart(same, loss), 1e-4, 'float32: loss'), below(apart(same_gradient, gradient), 1e-3, 'gradient')]
    near = found[device, 'bfloat16']
    shown += [below(apart(near[0], loss), .02, 'bfloat16: loss'),
              below(1 - torch.cosine_similarity(near[1], gradient, 0).item(), .05, 'cosine of gradients below 1 by')]
    loss, gradient = found[device, 'nf4']
    assert loss.isfinite() and gradient.norm() > 0, f'nf4: loss {loss}, gradient {gradient.norm()}'
    return ', '.join([*shown, f'nf4: loss {loss:.3f}'])

def killed(device: str) -> str:
    "A training that is killed after its first checkpoint and goes on ends as one that is not"
    import torch
    weights = {}
    with tempfile.TemporaryDirectory() as d:
        for name in ('whole', 'killed'):
            folder = Path(d, name)
            command = [sys.executable, __file__, '--train', str(folder), '--device', device]
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            while name == 'killed' and process.poll() is None:
                if [*folder.glob('checkpoint-*/complete.json')]: process.send_signal(signal.SIGKILL)
                time.sleep(.01)
            process.wait()
            if name == 'killed':
                assert not (folder/'weights.pt').exists(), 'it was over before it was killed'
                done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
                assert not done.returncode, done.stderr[-1500:]
            weights[name] = torch.load(folder/'weights.pt', weights_only=True)
    return below(apart(weights['killed'], weights['whole']), 1e-3, 'weights differ by')

def train_here(folder: str, device: str):
    "What `killed` runs: a short training with a checkpoint every epoch"
    import torch
    model, _, grid = adapted('bfloat16' if device != 'cpu' else 'float32', device)
    trainer = trainer_of(model, grid, folder, 16, num_train_epochs=6)
    trainer.train(resume_from_checkpoint=True)
    torch.save(adapter(model), f'{folder}/weights.pt')

def memory(device: str) -> str:
    "Where rows do not fit, half as many are tried"
    import torch
    if device == 'cpu': return 'only where there is a GPU'
    model, _, grid = adapted('float32', device)
    total, before = torch.cuda.get_device_properties(0).total_memory, torch.cuda.memory_allocated()
    with tempfile.TemporaryDirectory() as folder:
        def trainer_now(): return trainer_of(model, grid, folder, 64, no_files, per_device_train_batch_size=64)
        no_files = dict(save_strategy='no')
        torch.cuda.reset_peak_memory_stats()
        trainer_now().train()
        needed = torch.cuda.max_memory_allocated() - before
        trainer = trainer_now()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + .7*needed)/total)
        try: trainer.train()
        finally: torch.cuda.set_per_process_memory_fraction(1.)
    rows = trainer.args.per_device_train_batch_size
    assert rows < 64 and trainer.state.global_step == 1, f'{rows} rows at a time, {trainer.state.global_step} steps'
    return f'64 rows to a step, {rows} at a time'

def vectors(device: str) -> str:
    "Vectors of titles against the CPU, and a Gaussian process on them"
    import numpy as np

    from corrnb.gp import PairGP
    from corrnb.rag import PairRetriever
    rows, found = market(60), {}
    for place in ('cpu', device):
        model, tokenizer = model_of('float32', place)
        retriever = PairRetriever.build(rows, TARGET, model, tokenizer, [2, -1])
        gp = PairGP(retriever.embed, (1, 3)).fit(rows.head(40), TARGET)
        found[place] = retriever.vectors(rows), gp.distribution(rows.tail(20)).mean.numpy()
    differences = [np.abs(a - b).max() for a, b in zip(found['cpu'], found[device])]
    return f"{below(differences[0], 1e-4, 'vectors')}, {below(differences[1], 1e-2, 'means of the process')}"

def index(device: str) -> str:
    "The index finds what it holds"
    import faiss
    import torch

    from corrnb.rag import SemanticRAG
    rows = market(200)
    x = torch.randn(len(rows), 64, device=device)
    rag = SemanticRAG().build_index(x, rows.to_dict('records'))
    similar, distances = rag.search(x[7], k=3)
    assert similar[0]['id'] == rows.id[7] and distances[0] < 1e-6, similar[0]
    return f"faiss {faiss.__version__}, {'with' if hasattr(faiss, 'StandardGpuResources') else 'without'} GPU"

def pipeline(device: str) -> str:
    "The tiny pipeline from start to report, and a forecast"
    with tempfile.TemporaryDirectory() as d:
        start = time.perf_counter()
        command = [sys.executable, '-m', 'corrnb', 'run', '--profile', 'tiny', '--runs-dir', d, '--name', 'check']
        hidden = dict(CUDA_VISIBLE_DEVICES='') if device == 'cpu' else {}
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | hidden)
        assert not done.returncode, (done.stdout + done.stderr)[-1500:]
        took = time.perf_counter() - start
        metrics = json.loads(Path(d, 'check', 'metrics.json').read_text())
    return f'{took:.1f} s, {len(metrics)} entries in metrics.json'

CHECKS = (tree, step, vectors, memory, index, killed, pipeline)


def main() -> int:
    names = {f.__name__: f for f in CHECKS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME', help=f"which checks; default all: {', '.join(names)}")
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--train', help=argparse.SUPPRESS)
    a = parser.parse_args()
    if unknown := set(a.names) - set(names): parser.error(f"no check {unknown.pop()!r}: {', '.join(names)}")
    warnings.filterwarnings('ignore')
    from transformers.utils import logging as hf_logging
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if a.train: return train_here(a.train, a.device)
    failed = 0
    for name in a.names or names:
        start = time.perf_counter()
        try: text = 'ok: ' + names[name](a.device)
        except Exception as e:
            traceback.print_exc()
            text, failed = f'WRONG: {type(e).__name__}: {e}', failed + 1
        print(f'{name:10}{time.perf_counter() - start:6.1f} s  {text}'[:1500], flush=True)
    return failed

if __name__ == '__main__': sys.exit(main())
