"""ONNX: input "images", normalised; outputs "features", by the encoder's own pool, and "patches", the patch tokens."""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from selfsight.encoder import Encoder
from selfsight.exports.format import Format, Graph, features_of, require_extra, shape_of, write_config

FILE = "model.onnx"
OPSET = 20
MOST_IN_ONE_FILE = 1.9e9  # bytes of weights; protobuf ends at 2 GiB


def _write(encoder: Encoder, folder: Path, ours: dict[str, Any], dtype: torch.dtype) -> None:
    size = sum(p.numel() * p.element_size() for p in encoder.parameters())
    images = torch.zeros(2, *encoder.preprocessing.shape)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # what it could not fold is nobody's concern
    program = torch.onnx.export(
        Graph(encoder),
        (images,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["features", "patches"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    told = {**ours["preprocessing"], "pool": encoder.pool, "selfsight": ours.get("version", "")}
    program.model.metadata_props.update({key: json.dumps(value) for key, value in told.items()})
    for node in program.model.graph.all_nodes():  # stack traces, with this machine's paths
        node.metadata_props.clear()
    program.save(folder / FILE, external_data=size > MOST_IN_ONE_FILE)
    write_config(folder, {"selfsight": ours | {"opset": OPSET}})


ONNX = Format(
    files=(FILE,),
    require=lambda encoder: require_extra("onnx", "onnxscript", "onnxruntime"),
    write=_write,
    clean=f"""
import onnxruntime
session = onnxruntime.InferenceSession(folder + "/{FILE}", providers=["CPUExecutionProvider"])
def outputs(images):
    names = ["features", "patches"]
    return dict(zip(names, map(torch.from_numpy, session.run(names, {{"images": images.numpy()}}))))
""",
    expected=features_of,
    shape=shape_of,
    code=lambda encoder: (
        "import onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession(f"{{folder}}/{FILE}")\n'
        'features, patches = session.run(["features", "patches"], {"images": images.numpy()})'
    ),
)
