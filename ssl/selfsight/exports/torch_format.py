"""torch.export: a graph with its weights, that torch runs without any code of ours or timm's.

torch writes the graph as JSON and weights as plain bytes; only the example inputs of the trace would be a pickle, and they are
taken out. The reader (`torch.export.load`) is torch's own; read files of strangers with a torch that you would trust with it.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import torch

from selfsight.encoder import Encoder
from selfsight.errors import StorageError
from selfsight.exports.format import Format, Graph, features_of, shape_of, write_config

FILE = "model.pt2"


def trace(encoder: Encoder) -> torch.export.ExportedProgram:
    """The encoder's graph, for any number of images."""
    images = torch.zeros(2, *encoder.preprocessing.shape)
    return torch.export.export(Graph(encoder), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _write(encoder: Encoder, folder: Path, ours: dict[str, Any], dtype: torch.dtype) -> None:
    program = trace(encoder)
    program.example_inputs = None  # they are all that torch would pickle
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with this machine's paths
    torch.export.save(program, folder / FILE, extra_files={"selfsight.json": json.dumps(ours["preprocessing"])})
    if pickled := pickles_in(folder / FILE):
        raise StorageError(
            f"{folder / FILE}: this torch pickles {', '.join(pickled)}, which nobody should have to read"
        )
    write_config(folder, {"selfsight": ours})


def pickles_in(path: Path) -> list[str]:
    """Members of a .pt2 that are pickles."""
    with zipfile.ZipFile(path) as archive:
        found = [m.filename for m in archive.infolist() if m.filename.endswith((".pt", ".pkl")) and m.file_size]
        for name in archive.namelist():
            if name.endswith("_config.json"):
                entries = json.loads(archive.read(name)).get("config", {})
                found += [f"{name}: {key}" for key, entry in entries.items() if entry.get("use_pickle")]
    return found


TORCH = Format(
    files=(FILE,),
    require=lambda encoder: None,
    write=_write,
    clean=f"""
model = torch.export.load(folder + "/{FILE}").module()
def outputs(images):
    return dict(zip(("features", "patches"), model(images)))
""",
    expected=features_of,
    shape=shape_of,
    code=lambda encoder: f'model = torch.export.load(f"{{folder}}/{FILE}").module()\nfeatures, patches = model(images)',
)
