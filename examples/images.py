"""Make an image of every prompt of a text file, all in one call, and a grid of them; from IMAGE, if one is given.

python examples/images.py BUNDLE prompts.txt FOLDER [IMAGE]
"""

import sys
from pathlib import Path

import fmedge

bundle, source, target, *start = sys.argv[1:]
prompts = [line for line in Path(source).read_text("utf-8").splitlines() if line.strip()]
options = fmedge.Diffusion(seed=7, image=start[0], strength=0.6) if start else fmedge.Diffusion(seed=7)
folder = Path(target)
folder.mkdir(parents=True, exist_ok=True)

made = []
with fmedge.load_image(bundle) as model:
    for update in model.stream(prompts, options):
        print(f"{update.stage} {update.done}/{update.total}", file=sys.stderr)
        for image in update.finished:  # as soon as their batch is ready
            image.save(folder / f"{image.prompt_index:05}.png")  # prompt, seed and settings are in the file
            made.append(image.image)
fmedge.sheet_of(made).save(folder / "grid.png")
