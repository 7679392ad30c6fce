"""Make figures small enough for the repository: ``python docs/figures/shrink.py NAME.png FIGURE.png``."""

import sys

from PIL import Image

target, source = sys.argv[1:]
image = Image.open(source).convert("RGB")
image.thumbnail((1000, 1000))
image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(target, optimize=True)
