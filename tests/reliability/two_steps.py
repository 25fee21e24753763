"""Run the quickstart's machinery with two small steps: two_steps.py FOLDER CONFIG."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools/quickstart"))

from steps import Step, run  # noqa: E402

from refbn_d2.utils.arguments import run_or_exit  # noqa: E402

out, config = sys.argv[1:]
training, exported = f"{out}/run", f"{out}/exported.pth"
train = ("tools/train_net.py", "--engine", "torchvision", "--config-file", config)
convert = ("tools/convert_checkpoint.py", f"{training}/model_final.pth", exported)
steps = [
    Step("train", "Train", "", train, 3, output_dir=training),
    Step("export", "Export", "", (*convert, "--to", "detectron2", "--norm", "FrozenBN"), 1,
         leaves=exported),
]  # fmt: skip
run_or_exit(lambda folder: run(folder, steps), Path(out))
