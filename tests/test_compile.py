"""Compiled blocks: how many graphs there are, that they compute the same, and where they are left aside.

Graphs are counted by dynamo, with a backend that runs them as they are: no compiler is needed.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from selfsight.compiled import compile_blocks
from selfsight.data.placer import Batch
from selfsight.encoder import build_encoder, evaluating, preprocessing_of
from selfsight.errors import UsageError
from selfsight.objectives import build_objective
from selfsight.objectives.base import Objective, blocks_of
from selfsight.objectives.configs import DINOConfig, MAEConfig, ObjectiveConfig
from selfsight.recipe import DataConfig, EncoderConfig, load, validate
from selfsight.switches import switch

# Torch looks at the .grad of what it traces, and warns of it with its own filter off where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

DINO = DINOConfig(local_views=2, local_view={"size": 8}, outputs=16, head_width=16, bottleneck=8)  # type: ignore[arg-type]
MAE = MAEConfig(decoder_width=16, decoder_depth=3, decoder_heads=2)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def make(config: ObjectiveConfig, depth: int, drop_path: float = 0.3) -> Objective:
    built = EncoderConfig(image_size=16, channels=1, patch=4, width=16, depth=depth, heads=2, drop_path=drop_path)
    torch.manual_seed(0)
    encoder = build_encoder(built, preprocessing_of(DataConfig(train="x"), built), 0)
    torch.manual_seed(1)
    return build_objective(config, encoder).train()


def make_batch(objective: Objective, step: int = 0, count: int = 4) -> Batch:
    draw = torch.Generator().manual_seed(step)
    views = tuple(torch.randn(count, 1, view.size or 16, view.size or 16, generator=draw) for view in objective.views)
    return Batch(views, torch.arange(step * count, (step + 1) * count), seed=7)


def learn(objective: Objective, steps: int) -> list[float]:
    """Losses of so many steps of gradient descent."""
    losses = []
    for step in range(steps):
        loss = objective(make_batch(objective, step)).total
        loss.backward()
        with torch.no_grad():
            for parameter in objective.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad)
                    parameter.grad = None
        objective.after_step(step + 1, steps)
        losses.append(loss.item())
    return losses


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("config", [MAE, DINO], ids=["mae", "dino"])
def test_graphs_grow_with_neither_depth_nor_steps(config: ObjectiveConfig) -> None:
    found = []
    for depth in (3, 5):
        torch.compiler.reset()
        counters.clear()
        objective = make(config, depth)
        names = list(objective.state_dict())
        compile_blocks(objective, blocks_of(objective), backend="eager")
        assert list(objective.state_dict()) == names
        learn(objective, 1)
        found.append(graphs())
        learn(objective, 2)
        assert graphs() == found[-1]
    # MAE: the first block, which has no drop path, the others, the decoder's, and its last one. DINO: those two kinds at two sizes,
    # and the teacher's two at the one that it sees.
    assert found == ([4, 4] if config is MAE else [6, 6])
    assert "recompiles" not in counters or not counters["recompile_limit"]


@pytest.mark.parametrize("config", [MAE, DINO], ids=["mae", "dino"])
def test_compiled_blocks_compute_the_same(config: ObjectiveConfig) -> None:
    plain, compiled = make(config, 3), make(config, 3)
    compile_blocks(compiled, blocks_of(compiled), backend="eager")
    assert learn(plain, 3) == learn(compiled, 3)
    assert graphs()


def test_every_block_is_compiled_teachers_and_decoders_too() -> None:
    dino, mae = make(DINO, 2), make(MAE, 2)
    assert len({*blocks_of(dino)}) == 4 and {*dino.encoder.blocks} < {*blocks_of(dino)}
    assert len({*blocks_of(mae)}) == 5


def test_what_is_scored_runs_as_it_is_written() -> None:
    objective = make(MAE, 2)
    ran: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*given: Any) -> Any:
            ran.append(1)
            return graph.forward(*given)

        return run

    compile_blocks(objective, blocks_of(objective), backend=backend)
    images = torch.zeros(3, 1, 16, 16)
    with evaluating(objective.encoder), torch.no_grad():
        objective.encoder.embed(images)
    assert not ran and not graphs()
    learn(objective, 1)
    assert len(ran) == 5  # and after that as compiled as before
    with evaluating(objective.encoder), torch.no_grad():
        objective.encoder.embed(images)
    assert len(ran) == 5


def test_cuda_graphs_are_asked_for_where_they_can_work(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    begun: list[int] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append(options))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    for cuda_graphs, mode in ((False, "default"), (True, "reduce-overhead")):
        objective = make(MAE, 2)
        compile_blocks(objective, blocks_of(objective), cuda_graphs)
        assert asked[-5:] == [{"dynamic": False, "mode": mode}] * 5
        learn(objective, 2)
        assert len(begun) == 2 * cuda_graphs  # once for each forward pass


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "train: cuda_graphs needs compile: --train.compile true"),
        ({"train.compile": True, "train.accumulate": 2}, "must not outlive a replay"),
        ({"train.compile": True, "train.checkpoint_blocks": True}, "must not outlive a replay"),
    ],
)
def test_cuda_graphs_say_what_they_do_not_go_with(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load("digits/mae", {"train.cuda_graphs": True, **fields})


def test_a_cpu_has_no_cuda_graphs() -> None:
    recipe = load("digits/mae", {"train.cuda_graphs": True, "train.compile": True})
    assert validate(recipe.model_dump(mode="json"), "again").train.cuda_graphs
    with pytest.raises(UsageError, match=r"train\.cuda_graphs: are a GPU's"):
        switch(recipe, make(MAE, 1), None, torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", [MAE, DINO], ids=["mae", "dino"])
def test_replayed_graphs_compute_the_same_on_a_gpu(config: ObjectiveConfig) -> None:
    losses = []
    for cuda_graphs in (False, True):
        torch.compiler.reset()
        objective = make(config, 3).cuda()
        compile_blocks(objective, blocks_of(objective), cuda_graphs)
        losses.append([])
        for step in range(6):
            host = make_batch(objective, step)
            batch = Batch(tuple(view.cuda() for view in host.views), host.positions, host.seed)
            with torch.autocast("cuda", torch.bfloat16):
                loss = objective(batch).total
            loss.backward()
            with torch.no_grad():
                for parameter in objective.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.1 * parameter.grad)
                        parameter.grad = None
            objective.after_step(step + 1, 6)
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
