"""Every format on one screen. A new one is a file with a `Format`, a line here, and a test."""

from collections.abc import Mapping

from selfsight.exports.format import Format
from selfsight.exports.onnx_format import ONNX
from selfsight.exports.timm_format import TIMM
from selfsight.exports.torch_format import TORCH
from selfsight.exports.transformers_format import TRANSFORMERS

FORMATS: Mapping[str, Format] = {"timm": TIMM, "transformers": TRANSFORMERS, "onnx": ONNX, "torch": TORCH}
