"""The main job on a real dataset that needs no download, small enough for two cores and three minutes."""

from selfsight.console import say, show_scores
from selfsight.train import pretrain

RECIPE = "digits/mae"


def quickstart(fields: dict[str, str]) -> None:
    """Pretrain a small ViT on handwritten digits, score it beside the floors, and say where everything is."""
    say("1,438 handwritten digits (8 x 8 pixels), no labels used: hiding 60 % of each image, learning to fill it in")
    found = pretrain(RECIPE, {"run_dir": "runs/quickstart"} | fields)
    show_scores(found)
    say(
        "Raw pixels are hard to beat here: the digits are tiny and aligned. What pretraining added is the distance from\n"
        "random-init (the same network, untrained) to pretrained. Next: selfsight shards build YOUR_IMAGES shards"
    )
