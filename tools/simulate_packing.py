"""Does packing by cost, attention's square included, pay? Seconds of the slowest data-parallel rank over the mean.

    simulate_packing.py [--ranks 8] [--samples 256] [--budget 34816] [--equal-at 14000 27000] [--repeat 20] [RUN ...]

Response lengths are those that RUN/rollouts has (rollout.save_every), or log-normal. A sequence of n tokens costs
n + n^2 / E: E, --equal-at, is the length at which attention takes as long as everything else; by FLOPs 27,000 for
Qwen3-4B, less where products are in FP8 and attention is not. Ranks wait for one another once an update: what counts is the
sum over a rank's micro-batches.
"""

import argparse
import heapq
import json
import random
from pathlib import Path

from fp8slurm.rl.packing import balanced_bins


def to_and_fro(bins: list[list[int]], weights: list[float], ranks: int) -> list[list[list[int]]]:
    """As rl/packing.py deals micro-batches to ranks, by these weights of the sequences."""
    order = sorted(range(len(bins)), key=lambda b: (-sum(weights[i] for i in bins[b]), b))
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    for position, b in enumerate(order):
        turn, rank = divmod(position, ranks)
        dealt[rank if turn % 2 == 0 else ranks - 1 - rank].append(bins[b])
    return dealt


def by_cost(lengths: list[int], costs: list[float], budget: int, ranks: int) -> list[list[int]]:
    """As many bins as balanced_bins makes; each sequence, the dearest first, to the cheapest bin that has room."""
    count = len(balanced_bins(lengths, budget, ranks))
    bins: list[list[int]] = [[] for _ in range(count)]
    heap, held = [(0.0, b) for b in range(count)], [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: (-costs[i], i)):
        full = []
        while heap and held[heap[0][1]] and held[heap[0][1]] + lengths[i] > budget:
            full.append(heapq.heappop(heap))
        if not heap:
            return balanced_bins(lengths, budget, ranks)  # tokens do not fit that way
        load, b = heapq.heappop(heap)
        bins[b].append(i)
        held[b] += lengths[i]
        for entry in (*full, (load + costs[i], b)):
            heapq.heappush(heap, entry)
    return bins


def excess(dealt: list[list[list[int]]], costs: list[float]) -> float:
    """Cost of the dearest rank over the mean, less 1."""
    each = [sum(costs[i] for bin_ in own for i in bin_) for own in dealt]
    return max(each) * len(each) / sum(each) - 1


def lengths_of(runs: list[Path], rng: random.Random, samples: int, median: float, sigma: float, most: int) -> list[int]:
    if not runs:
        return [min(most, max(16, int(median * 2.718281828 ** rng.gauss(0, sigma)))) + 200 for _ in range(samples)]
    rows = [
        json.loads(x) for run in runs for f in sorted(run.glob("rollouts/*.jsonl")) for x in f.read_text().splitlines()
    ]
    return [len(row["tokens"]) + 200 for row in rng.sample(rows, min(samples, len(rows)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--budget", type=int, default=34816)
    parser.add_argument("--equal-at", type=float, nargs="+", default=[14000, 27000])
    parser.add_argument("--repeat", type=int, default=20, help="draws of lengths; the mean is printed")
    a = parser.parse_args()
    print(
        "| median, sigma, longest | E | micro-batches a rank | by tokens, as today | dealt by cost | packed and dealt by cost |\n|---|---|---|---|---|---|"
    )
    for median, sigma, most in ((1500, 0.8, 8192), (4000, 0.8, 32768), (8000, 0.8, 32768), (8000, 1.2, 32768)):
        for equal in a.equal_at:
            rng, sums, counts = random.Random(0), [0.0] * 3, 0
            for _ in range(a.repeat):
                lengths = lengths_of(a.runs, rng, a.samples, median, sigma, most)
                costs = [n + n * n / equal for n in lengths]
                bins = balanced_bins(lengths, a.budget, a.ranks)
                counts += len(bins) // a.ranks
                packed = by_cost(lengths, costs, a.budget, a.ranks)
                tokens = [float(n) for n in lengths]
                ways = ((bins, tokens), (bins, costs), (packed, costs))
                sums = [s + excess(to_and_fro(b, w, a.ranks), costs) for s, (b, w) in zip(sums, ways, strict=True)]
            shown = " | ".join(f"{100 * s / a.repeat:.1f}%" for s in sums)
            print(f"| {median}, {sigma}, {most} | {equal:,.0f} | {counts / a.repeat:.1f} | {shown} |")


if __name__ == "__main__":
    main()
