"""The engine is fast: the same tiny mixture of experts decoded by hone's engine and by transformers' generate().

Tokens per second, prefill included, greedy, float32, one thread each; outputs are compared token by token. Repeats of
both sides are interleaved. transformers runs with the fastest of its expert implementations at each batch size. The
long-tailed workload is served by the engine as it comes and by transformers in static batches of its best size.

    python benchmarks/engine_vs_transformers.py [--quick]
"""
# extra: bench-transformers

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import harness
import numpy as np
import tiny_model
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from hone.config.recipe import EngineSection
from hone.inference.engine.engine import Engine
from hone.model.checkpoint import load_model, save_model
from hone.model.families import ModelConfig
from hone.model.layers.attention import PackedAttention
from hone.model.transformer import Transformer
from hone.schema.sampling import Generate, SamplingParameters

CONFIG = tiny_model.CONFIG | {"initializer_range": 0.05}
BARS = {1: 5.0, 16: 2.5, 64: 1.4, 256: 1.2}
LONG_TAIL_BAR = 2.5
PROMPT_TOKENS, NEW_TOKENS = 16, 64
EXPERT_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
STATIC_BATCHES = (32, 64, 256)
# Two tokens whose float32 logits differ by less may change places when sums are added up in another order.
NEAR_TIE = 1e-4

Prompts = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--memory", choices=["hone", "transformers"], help="only print this side's peak memory")
    parser.add_argument("--model", type=Path, help="with --memory: the model folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.memory:
        print(peak_memory(arguments.memory, arguments.model))
        return
    repeats = 2 if arguments.quick else 7
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model = Transformer(ModelConfig.from_hugging_face(CONFIG)).initialize(0)
        save_model(model, model.config, folder)
        measure(folder, model, repeats)


def measure(folder: Path, model: Transformer, repeats: int) -> None:
    peer = load_peer(folder, torch.float32)
    engine = new_engine(model)
    peak, bandwidth = arithmetic_peak(), read_bandwidth()
    rows, ratios, sides = [], {}, {}
    for size in BARS:
        ours, theirs, differing = compare(engine, peer, size, repeats)
        ratios[size] = ours["median"] / theirs["median"]
        floor = floor_rate(model, size, peak, bandwidth)
        sides[size] = {"hone": ours, "transformers": theirs, "floor": floor, "differing": differing}
        rows.append((f"{size} requests", *cells(theirs), *cells(ours), ratios[size], BARS[size], floor, differing))
    tail_ours, tail_theirs, static = long_tail(engine, peer, repeats)
    tail = tail_ours["median"] / tail_theirs["median"]
    rows.append((f"long tail (static: {static})", *cells(tail_theirs), *cells(tail_ours), tail, LONG_TAIL_BAR, "", ""))
    columns = ["tokens/s", "generate()", "min-max", "hone", "min-max", "ratio", "bar", "floor", "differing"]
    harness.show_table("decoding, float32, one thread", columns, rows)
    reduced = bfloat16_rates(folder, repeats)
    first = {name: first_token(name, engine, peer, repeats) for name in ("hone", "transformers")}
    memory = {name: memory_of(name, folder) for name in ("hone", "transformers")}
    show_extras(reduced, first, memory, peak, bandwidth)
    bars = {**{str(size): ratios[size] >= bar for size, bar in BARS.items()}, "long_tail": tail >= LONG_TAIL_BAR}
    harness.finish(
        "engine_vs_transformers",
        {
            "claim": "the engine decodes >= 5 / 2.5 / 1.4 / 1.2 x as fast as generate() at 1 / 16 / 64 / 256 requests,"
            " >= 2.5 x on a long-tailed workload",
            "ratio": min(ratios[size] / bar for size, bar in BARS.items()),
            "ratios": {**{str(size): ratio for size, ratio in ratios.items()}, "long_tail": tail},
            "bars_met": bars,
            "tokens_per_second": {str(size): side for size, side in sides.items()},
            "long_tail": {"hone": tail_ours, "transformers": tail_theirs, "static_batch": static},
            "bfloat16": reduced,
            "first_token_milliseconds": first,
            "peak_memory_mib": memory,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "torch",
        "transformers",
    )


# --- the two sides -------------------------------------------------------------------------------------------------


def new_engine(model: Transformer) -> Engine:
    # Without the prefix cache: repeats of a prompt must be computed.
    return Engine(model, [], EngineSection(prefix_cache=False))


def generate_ours(engine: Engine, prompts: Prompts, lengths: list[int]) -> list[list[int]]:
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        engine.add(Generate(str(index), prompt, SamplingParameters(temperature=0, max_tokens=length)))
    done: dict[str, list[int]] = {}
    while engine.has_work:
        done |= {one.generated.request_id: one.generated.token_ids for one in engine.step().finished}
    return [done[str(index)] for index in range(len(prompts))]


def generate_theirs(peer: transformers.PreTrainedModel, prompts: Prompts, length: int) -> list[list[int]]:
    inputs = torch.tensor(prompts)
    outputs: Tensor = peer.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
        pad_token_id=0,
    )
    return outputs[:, inputs.shape[1] :].tolist()


def load_peer(folder: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def fastest_experts(peer: transformers.PreTrainedModel, prompts: Prompts) -> str:
    """Leaves the peer with the fastest of its implementations for this many requests."""
    seconds = {}
    for name in EXPERT_IMPLEMENTATIONS:
        peer.set_experts_implementation(name)
        try:
            generate_theirs(peer, prompts, 2)
        except RuntimeError:  # not every implementation takes float32 on a CPU
            continue
        seconds[name] = min(timed(lambda: generate_theirs(peer, prompts, 8))[0] for _ in range(2))
    best = min(seconds, key=seconds.__getitem__)
    peer.set_experts_implementation(best)
    return best


# --- workloads -----------------------------------------------------------------------------------------------------


def compare(
    engine: Engine, peer: transformers.PreTrainedModel, size: int, repeats: int
) -> tuple[dict[str, float], dict[str, float], int]:
    """Both sides' tokens per second, and how many sequences differ (each of them through a near tie)."""
    prompts = random_prompts(size, PROMPT_TOKENS)
    experts = fastest_experts(peer, prompts)
    generate_ours(engine, prompts, [NEW_TOKENS] * size)
    ours, theirs, differing = [], [], 0
    for _ in range(repeats):
        seconds, answers = timed(lambda: generate_ours(engine, prompts, [NEW_TOKENS] * size))
        ours.append(size * NEW_TOKENS / seconds)
        seconds, expected = timed(lambda: generate_theirs(peer, prompts, NEW_TOKENS))
        theirs.append(size * NEW_TOKENS / seconds)
        differing = sum(a != b for a, b in zip(answers, expected, strict=True))
        check_equal(engine.model, prompts, answers, expected)
    return harness.summary(ours), {**harness.summary(theirs), "experts": experts}, differing


def long_tail(
    engine: Engine, peer: transformers.PreTrainedModel, repeats: int
) -> tuple[dict[str, float], dict[str, float], int]:
    """256 requests of 4 to 128 new tokens, most of them short."""
    prompts = random_prompts(256, PROMPT_TOKENS)
    lengths = long_tailed_lengths(256)
    ours: list[float] = []
    theirs: dict[int, list[float]] = {size: [] for size in STATIC_BATCHES}
    fastest = {size: fastest_experts(peer, prompts[:size]) for size in STATIC_BATCHES}
    for _ in range(repeats):
        ours.append(sum(lengths) / timed(lambda: generate_ours(engine, prompts, lengths))[0])
        for size in STATIC_BATCHES:
            peer.set_experts_implementation(fastest[size])
            seconds, _ = timed(lambda size=size: in_static_batches(peer, prompts, lengths, size))
            theirs[size].append(sum(lengths) / seconds)
    best = max(STATIC_BATCHES, key=lambda size: float(np.median(theirs[size])))
    return harness.summary(ours), harness.summary(theirs[best]), best


def in_static_batches(
    peer: transformers.PreTrainedModel, prompts: Prompts, lengths: list[int], size: int
) -> list[list[int]]:
    """Every batch runs until its longest request is done."""
    answers = []
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        tokens = generate_theirs(peer, prompts[part], max(lengths[part]))
        answers += [one[:length] for one, length in zip(tokens, lengths[part], strict=True)]
    return answers


def bfloat16_rates(folder: Path, repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """The mode for speed at the price of exactness, on both sides."""
    engine, peer = new_engine(load_model(folder, torch.bfloat16)), load_peer(folder, torch.bfloat16)
    rates: dict[str, dict[str, dict[str, float]]] = {"hone": {}, "transformers": {}}
    for size in BARS:
        prompts = random_prompts(size, PROMPT_TOKENS)
        fastest_experts(peer, prompts)
        sides: dict[str, Callable[[], object]] = {
            "hone": lambda prompts=prompts: generate_ours(engine, prompts, [NEW_TOKENS] * len(prompts)),
            "transformers": lambda prompts=prompts: generate_theirs(peer, prompts, NEW_TOKENS),
        }
        for name, side in sides.items():
            side()
            times = [timed(side)[0] for _ in range(max(2, repeats // 2))]
            rates[name][str(size)] = harness.summary([size * NEW_TOKENS / seconds for seconds in times])
    return rates


def first_token(name: str, engine: Engine, peer: transformers.PreTrainedModel, repeats: int) -> dict[str, float]:
    """Milliseconds until one request has its first token, by prompt length."""
    found = {}
    for length in (16, 384):
        prompts = random_prompts(1, length)
        sides: dict[str, Callable[[], object]] = {
            "hone": lambda prompts=prompts: generate_ours(engine, prompts, [1]),
            "transformers": lambda prompts=prompts: generate_theirs(peer, prompts, 1),
        }
        sides[name]()
        found[str(length)] = float(np.median([1000 * timed(sides[name])[0] for _ in range(2 * repeats)]))
    return found


def memory_of(name: str, folder: Path) -> float:
    """Peak memory in MiB of a process that serves 64 requests, above one that has only imported the libraries."""
    command = [sys.executable, __file__, "--memory", name, "--model", str(folder)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def peak_memory(name: str, folder: Path) -> float:
    before = memory_status("VmRSS")
    prompts = random_prompts(64, PROMPT_TOKENS)
    if name == "hone":
        generate_ours(new_engine(load_model(folder)), prompts, [NEW_TOKENS] * 64)
    else:
        generate_theirs(load_peer(folder, torch.float32), prompts, NEW_TOKENS)
    return memory_status("VmHWM") - before


def memory_status(field: str) -> float:
    """MiB of this process by /proc: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


# --- the machine ---------------------------------------------------------------------------------------------------


def arithmetic_peak() -> float:
    """Floating point operations per second of a large float32 product."""
    left, right = torch.randn(2048, 512), torch.randn(512, 512)
    seconds = min(timed(lambda: functional.linear(left, right))[0] for _ in range(20))
    return 2 * 2048 * 512 * 512 / seconds


def read_bandwidth() -> float:
    """Bytes per second when data as large as the weights is read again and again."""
    data = torch.randn(2 * 2**20 // 4 * 3)
    seconds = min(timed(lambda: data.sum())[0] for _ in range(50))
    return data.nbytes / seconds


def floor_rate(model: Transformer, size: int, peak: float, bandwidth: float) -> float:
    """Tokens per second if a step took no longer than its products or, if that is more, reading its weights once."""
    moe = model.config.moe
    assert moe is not None
    total = sum(parameter.numel() for parameter in model.parameters()) - model.embedding.numel()
    expert = 3 * model.config.width * moe.expert_hidden
    experts = len(moe.sparse_layers) * moe.num_experts * expert
    active = total - experts + len(moe.sparse_layers) * moe.experts_per_token * expert
    share_read = 1 - (1 - moe.experts_per_token / moe.num_experts) ** size
    read = 4 * (total - experts + share_read * experts)
    return size / max(2 * active * size / peak, read / bandwidth)


# --- odds and ends -------------------------------------------------------------------------------------------------


def random_prompts(count: int, length: int) -> Prompts:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(2, tiny_model.VOCABULARY, (count, length), generator=generator).tolist()


def long_tailed_lengths(count: int) -> list[int]:
    drawn = np.random.default_rng(0).exponential(18.0, count)
    lengths = np.clip(4 + drawn, 4, 128).astype(int).tolist()
    lengths[count // 3] = 128
    return lengths


def check_equal(model: Transformer, prompts: Prompts, answers: list[list[int]], expected: list[list[int]]) -> None:
    """Where answers part, the two tokens must have been all but equally likely."""
    for prompt, ours, theirs in zip(prompts, answers, expected, strict=True):
        if ours != theirs:
            place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            logits = last_logits(model, prompt + ours[:place])
            gap = float(logits[ours[place]] - logits[theirs[place]])
            assert abs(gap) < NEAR_TIE, f"token {place} differs by {gap} in its logit: {ours[place]}, {theirs[place]}"


def last_logits(model: Transformer, token_ids: list[int]) -> Tensor:
    with torch.no_grad():
        starts = torch.tensor([0, len(token_ids)], dtype=torch.int32)
        attention = PackedAttention(starts, len(token_ids))
        hidden = model(torch.tensor(token_ids), torch.arange(len(token_ids)), attention)
        return model.unembed(hidden[-1:])[0]


def timed(function: Callable[[], object]) -> tuple[float, object]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def cells(side: dict[str, float]) -> tuple[str, str]:
    return f"{side['median']:,.0f}", f"{side['min']:,.0f}-{side['max']:,.0f}"


def show_extras(
    reduced: dict[str, dict[str, dict[str, float]]],
    first: dict[str, dict[str, float]],
    memory: dict[str, float],
    peak: float,
    bandwidth: float,
) -> None:
    sizes = [str(size) for size in BARS]
    rows = [
        *(
            (f"bfloat16, {size} requests, tokens/s", *(f"{reduced[name][size]['median']:,.0f}" for name in reduced))
            for size in sizes
        ),
        *(
            (f"first token after a prompt of {length}, ms", *(f"{first[name][length]:.2f}" for name in first))
            for length in ("16", "384")
        ),
        ("peak memory of 64 requests, MiB", *(f"{memory[name]:.0f}" for name in memory)),
    ]
    harness.show_table("beside it", ["", "hone", "transformers"], rows)
    print(f"machine: {peak / 1e9:.0f} GFLOP/s in a large product, {bandwidth / 1e9:.0f} GB/s read from cache")


if __name__ == "__main__":
    main()
