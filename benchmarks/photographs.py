"""Shards of random photographs, each with bytes of its own on the disk, where those of `selfsight bench --synthetic` are 64 in all.

python benchmarks/photographs.py FOLDER COUNT
"""

import argparse
import os
from pathlib import Path

from selfsight.data.packing import Encoding, Sample, write_shards
from selfsight.data.synthetic import images


def main() -> None:
    """Write FOLDER/photographs-*.tar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("count", type=int)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    photographs = (Sample(image) for image in images(options.count))
    write_shards(photographs, options.folder, "photographs", Encoding(format="jpeg"))
    os.sync()  # what is not on the disk yet cannot leave the page cache


if __name__ == "__main__":
    main()
