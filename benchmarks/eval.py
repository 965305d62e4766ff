"""Evaluation's speed against what others run: kNN, the sweep of linear probes, extraction.

python benchmarks/eval.py --json          about ten minutes on two cores

Every ratio is the median over pairs of wall times, theirs / ours (above 1: ours is faster), the ways in turn on the same tensors;
`*_spread` is the largest ratio minus the smallest, `*_cpu` the ratio in CPU time of the process, which other work disturbs less.
Each side has all that it needs on the clock: of kNN the search and the vote of every k, of a sweep standardised features in and
trained weights out, with the same heads, batches and steps. Times are medians in seconds.

knn_vs_dino        facebookresearch/dino's eval_knn.py, its loop over k as released
knn_vs_faiss       faiss.IndexFlatIP: add and search for the largest k, without any vote
knn_vs_matmul      torch's matrix product and topk for the largest k, in chunks of 256 queries, without any vote
sweep_vs_single    one run of `fit_heads` after another (a sample of them, scaled to all)
sweep_vs_plain     one run of nn.Linear, cross_entropy and SGD after another (a sample of them, scaled to all)
sweep_vs_dinov2    facebookresearch/dinov2's dinov2/eval/linear.py: a ModuleDict of nn.Linear under one SGD, losses summed
extract_vs_forward see eval_extract.py
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from statistics import median

os.environ["OMP_WAIT_POLICY"] = "passive"

import faiss
import torch
from eval_extract import extract_vs_forward
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.eval import linear
from selfsight.eval.knn import DEFAULT_K, TEMPERATURE, predict, unit
from selfsight.eval.linear import HEADS, MOMENTUM, fit_heads, schedule

BANK, QUERIES, WIDTH, CLASSES = 50_000, 10_000, 384, 100
SAMPLES, POOLS, SWEPT = 10_000, 3, 10  # features of a sweep, and their classes
Ways = dict[str, Callable[[], object]]
Times = tuple[float, float]  # wall and CPU seconds


def paired(ways: Ways, repeats: int) -> dict[str, list[Times]]:
    """Times of several ways, in turn, after one round that warms caches."""
    found: dict[str, list[Times]] = {name: [] for name in ways}
    for round_ in range(repeats + 1):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            if round_:
                found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return found


def told(found: dict[str, list[Times]], ours: str, scale: dict[str, float] | None = None) -> dict[str, float]:
    """Median seconds, and ratios of theirs to ours with their spread; times of what ran in part are scaled up."""
    made: dict[str, float] = {}
    for name, times in found.items():
        factor = (scale or {}).get(name, 1)
        made[f"{name}_seconds"] = round(factor * median(wall for wall, _ in times), 3)
        if name != ours:
            wall, cpu = ([factor * b[i] / a[i] for a, b in zip(found[ours], times, strict=True)] for i in (0, 1))
            made[f"{ours}_vs_{name}"] = round(median(wall), 2)
            made[f"{ours}_vs_{name}_spread"] = round(max(wall) - min(wall), 2)
            made[f"{ours}_vs_{name}_cpu"] = round(median(cpu), 2)
    return made


def dinos_knn(bank: Tensor, labels: Tensor, queries: Tensor, k: int, classes: int) -> Tensor:
    """knn_classifier of facebookresearch/dino's eval_knn.py as released, up to the classes it ranks first."""
    train_features, predicted = bank.t(), []
    chunk = len(queries) // 100
    one_hot = torch.zeros(k, classes)
    for start in range(0, len(queries), chunk):
        features = queries[start : start + chunk]
        batch = len(features)
        distances, indices = torch.mm(features, train_features).topk(k, largest=True, sorted=True)
        retrieved = torch.gather(labels.view(1, -1).expand(batch, -1), 1, indices)
        one_hot.resize_(batch * k, classes).zero_()
        one_hot.scatter_(1, retrieved.view(-1, 1), 1)
        weights = distances.clone().div_(TEMPERATURE).exp_()
        votes = torch.sum(torch.mul(one_hot.view(batch, -1, classes), weights.view(batch, -1, 1)), 1)
        predicted.append(votes.sort(1, True)[1][:, 0])
    return torch.cat(predicted)


def faiss_search(bank: Tensor, queries: Tensor, k: int) -> object:
    """IndexFlatIP as its documentation uses it."""
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())
    return index.search(queries.numpy(), k)


def knn_speed(repeats: int) -> dict[str, float]:
    """One search for every k, against three others."""
    torch.manual_seed(0)
    labels, truth = torch.randint(CLASSES, (BANK,)), torch.randint(CLASSES, (QUERIES,))
    centres = torch.randn(CLASSES, WIDTH)
    bank, queries = (unit(centres[own] + 4 * torch.randn(len(own), WIDTH)) for own in (labels, truth))
    ways: Ways = {
        "knn": lambda: predict(bank, labels, queries, DEFAULT_K),
        "dino": lambda: [dinos_knn(bank, labels, queries, k, CLASSES) for k in DEFAULT_K],
        "faiss": lambda: faiss_search(bank, queries, max(DEFAULT_K)),
        "matmul": lambda: [(part @ bank.T).topk(max(DEFAULT_K)) for part in queries.split(256)],
    }
    answers = predict(bank, labels, queries, DEFAULT_K)
    same = (answers[:, 0] == dinos_knn(bank, labels, queries, DEFAULT_K[0], CLASSES)).double().mean().item()
    return told(paired(ways, repeats), "knn") | {"knn_same_answers_as_dino": round(same, 5)}


def plain_run(features: Tensor, labels: Tensor, head: linear.Head) -> nn.Module:
    """A linear probe as it is usually written."""
    probe = nn.Linear(features.shape[1] - 1, SWEPT)
    bias = {"params": [probe.bias], "weight_decay": 0.0}
    optimizer = torch.optim.SGD([{"params": [probe.weight]}, bias], head[0], MOMENTUM, weight_decay=head[1])
    for batch, scale in schedule(len(features), 0):
        for group in optimizer.param_groups:
            group["lr"] = head[0] * scale
        loss = F.cross_entropy(probe(features[batch, :-1]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return probe


def dinov2s_sweep(pools: Tensor, labels: Tensor) -> nn.Module:
    """setup_linear_classifiers and eval_linear of facebookresearch/dinov2's dinov2/eval/linear.py, on cached features.

    Its loop is this: a LinearClassifier for every combination in a ModuleDict, one SGD with a parameter group each, and every
    step one backward of the sum of their losses. Its groups have no decays; here they have ours.
    """
    heads, groups = nn.ModuleDict(), []
    for pool in range(len(pools)):
        for number, (rate, decay) in enumerate(HEADS):
            head = nn.Linear(pools.shape[2] - 1, SWEPT)
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
            heads[f"{pool}_{number}"] = head
            groups.append({"params": head.parameters(), "lr": rate, "weight_decay": decay})
    optimizer = torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=0)
    first = [group["lr"] for group in optimizer.param_groups]
    for batch, scale in schedule(pools.shape[1], 0):
        x, y = pools[:, batch, :-1], labels[batch]
        outputs = {name: head(x[int(name.partition("_")[0])]) for name, head in heads.items()}
        losses = {f"loss_{name}": nn.CrossEntropyLoss()(output, y) for name, output in outputs.items()}
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = rate * scale
    return heads


def sweep_speed(repeats: int, steps: int) -> dict[str, float]:
    """13 rates x 3 decays x 3 pools at once, against three others, all for so many steps."""
    torch.manual_seed(0)
    linear.LEAST_STEPS = linear.MOST_STEPS = steps
    labels = torch.randint(SWEPT, (SAMPLES,))
    features = torch.randn(SWEPT, WIDTH)[labels] + 4 * torch.randn(POOLS, SAMPLES, WIDTH)
    pools = torch.cat([features, torch.ones(POOLS, SAMPLES, 1)], 2)
    some = HEADS[::6]
    cpu = torch.device("cpu")
    ways: Ways = {
        "sweep": lambda: fit_heads(pools, labels, SWEPT, HEADS, 0, cpu),
        "single": lambda: [fit_heads(pools[0], labels, SWEPT, (head,), 0, cpu) for head in some],
        "plain": lambda: [plain_run(pools[0], labels, head) for head in some],
        "dinov2": lambda: dinov2s_sweep(pools, labels),
    }
    all_of_them = POOLS * len(HEADS) / len(some)
    found = told(paired(ways, repeats), "sweep", {"single": all_of_them, "plain": all_of_them})
    return found | {"sweep_steps": steps, "sweep_heads": POOLS * len(HEADS)}


def main() -> None:
    """Print the times and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200, help="of a probe's training (default: %(default)s)")
    parser.add_argument("--only", choices=("knn", "sweep", "extract"), help="one part")
    parser.add_argument("--json", action="store_true", help="print one object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "knn": lambda: knn_speed(options.repeats),
        "sweep": lambda: sweep_speed(options.repeats, options.steps),
        "extract": lambda: extract_vs_forward(options.repeats),
    }
    result: dict[str, float] = {"threads": options.threads, "repeats": options.repeats}
    for name, part in parts.items():
        if options.only in (None, name):
            result |= part()
    print(json.dumps(result, indent=1) if options.json else "\n".join(f"{k:40} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
