"""Features of a small set by 1, 2 and 4 processes; run by test_eval_ranks.py as a program, forked after torch is imported."""

import json
import os
import sys
import traceback
from pathlib import Path

import torch
from launch import free_port
from safetensors.torch import save_file

from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.eval import features
from selfsight.eval.cache import Cache
from selfsight.eval.evaluate import evaluate
from selfsight.eval.extracted import Extractor
from selfsight.eval.ranks import started
from selfsight.recipe import DataConfig, EncoderConfig

CPU = torch.device("cpu")


def encoder() -> Encoder:
    config = EncoderConfig(image_size=8, channels=1, patch=2, width=16, depth=2, heads=2)
    return build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 3).eval()


def rank_of(folder: Path, world: int) -> None:
    """What one rank does: the features of each set, and a whole evaluation."""
    features.BATCH = 16
    with started() as ranks:
        for name in ("one", "few", "many"):
            got = Extractor(CPU, ranks=ranks).features(encoder(), ("mean", "cls"), Shards(str(folder / name)))
            assert ranks.main or len(got.vectors["mean"]) < len(Shards(str(folder / name))) or world == 1
            if ranks.main and got.hashes is not None:
                save_file({**got.vectors, "hashes": got.hashes, "labels": got.labels}, folder / f"{name}-{world}.st")
        sets = str(folder / "many"), str(folder / "few")
        for time in range(2):  # the second time from the cache
            found = evaluate(
                encoder(), *sets, evaluators=("knn",), k=(3,), ranks=ranks, cache=Cache(folder / f"kept-{world}")
            )
            if ranks.main:
                (folder / f"scores-{world}-{time}.json").write_text(json.dumps(found))
            else:
                assert found == {"scores": [], "differences": [], "warnings": []}


def main(folder: Path, worlds: list[int]) -> int:
    """Fork the ranks of each world in turn; 1 if any rank failed."""
    torch.set_num_threads(1)  # before the first operation: a fork does not copy threads
    for world in worlds:
        port, children = free_port(), []
        for rank in range(world):
            child = os.fork()
            if not child:
                told = {"WORLD_SIZE": world, "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in told.items()} if world > 1 else {}
                code = 1
                try:
                    rank_of(folder, world)
                    code = 0
                except BaseException:  # noqa: BLE001 - whatever it is, the parent shows it and fails
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        if any([os.waitpid(child, 0)[1] for child in children]):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [int(world) for world in sys.argv[2:]]))
