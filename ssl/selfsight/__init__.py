"""Self-supervised pretraining of Vision Transformers on images nobody labelled.

import selfsight as ss
encoder = ss.load_encoder("runs/digits/encoder")
features = encoder.embed(images)                      # (B, D)
ss.pretrain("recipes/digits/mae.yaml", {"train.epochs": 10})
ss.evaluate("runs/digits/encoder", train="digits:train", test="digits:test")
ss.embed("runs/digits/encoder", "digits:test").vectors        # by pool: (N, D)
ss.export(encoder, "exported", to="onnx")
"""

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

_here = Path(__file__).resolve().parent
if not (_here / "data").is_dir() and (_here.parents[1] / "data" / "__init__.py").is_file():
    __path__.append(str(_here.parents[1]))  # a checkout without symbolic links (a zip, Windows)

__version__ = "0.1.0"

# Before torch: idle OpenMP threads that spin make a busy machine 20 to 400 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from selfsight.comparison import compare
    from selfsight.encoder import Encoder
    from selfsight.eval.embed import embed
    from selfsight.eval.evaluate import evaluate
    from selfsight.exports.export import export
    from selfsight.finish import report_again
    from selfsight.loading import load_encoder
    from selfsight.recipe import Recipe
    from selfsight.train import pretrain

# torch takes seconds to import, so that a name is imported when it is first asked for.
_HOMES = {
    "Encoder": "selfsight.encoder",
    "Recipe": "selfsight.recipe",
    "compare": "selfsight.comparison",
    "embed": "selfsight.eval.embed",
    "evaluate": "selfsight.eval.evaluate",
    "export": "selfsight.exports.export",
    "load_encoder": "selfsight.loading",
    "pretrain": "selfsight.train",
    "report_again": "selfsight.finish",
}
__all__ = ["Encoder", "Recipe", "compare", "embed", "evaluate", "export", "load_encoder", "pretrain", "report_again"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'selfsight' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
