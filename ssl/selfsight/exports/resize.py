"""The same encoder for images of another size."""

from pydantic import ValidationError

from selfsight.encoder import PLANE_TABLES, Encoder, build_encoder
from selfsight.errors import UsageError
from selfsight.loading import refuse_bomb
from selfsight.recipe import EncoderConfig
from selfsight.section import explain
from selfsight.weights import Source, adopt


def resized(encoder: Encoder, size: int) -> tuple[Encoder, tuple[str, ...]]:
    """An encoder of images of `size` pixels with the same weights, and what was resampled, line by line.

    Raises:
        UsageError: a size that is not in whole patches, or an architecture whose tensors depend on it in another way.
    """
    old = encoder.preprocessing.image_size
    try:
        config = EncoderConfig.model_validate(encoder.config.model_dump() | {"image_size": size})
    except ValidationError as error:
        raise UsageError(f"--image-size: {'; '.join(explain(error, 'encoder.', EncoderConfig))}") from None
    inputs = encoder.preprocessing._replace(image_size=size)
    refuse_bomb(config, inputs, encoder.state_dict(), f"--image-size {size}")
    made = build_encoder(config, inputs, seed=0)
    own = {name: table.data for name, table in encoder.named_parameters() if name in PLANE_TABLES}
    source = Source(encoder.backbone.state_dict(), own, config.tube)
    lines = adopt(made, source, f"the encoder of {old} pixels")[1:]
    if getattr(encoder.backbone, "rope", None) is not None:
        lines.append(f"rotary positions computed for a grid of {' x '.join(map(str, made.plane_grid))}")
    return made.eval(), (f"made for images of {size} pixels, trained on {old}", *lines)
