"""Run the quickstart's machinery with two small steps: two_steps.py FOLDER CONFIG."""

import sys
from pathlib import Path

from refbn_d2.quickstart.steps import Step, run
from refbn_d2.utils.arguments import run_or_exit

out, config = sys.argv[1:]
training, exported = f"{out}/run", f"{out}/exported.pth"
train = ("-m", "refbn_d2.engines", "--engine", "torchvision", "--config-file", config)
convert = ("-m", "refbn_d2.export", f"{training}/model_final.pth", exported)
steps = [
    Step("train", "Train", "", train, 3, output_dir=training),
    Step("export", "Export", "", (*convert, "--to", "detectron2", "--norm", "FrozenBN"), 1,
         leaves=exported),
]  # fmt: skip
run_or_exit(lambda folder: run(folder, steps), Path(out))
