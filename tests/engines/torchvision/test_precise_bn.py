"""TEST.PRECISE_BN: the oracle pools the stem convolution's outputs for the same batches."""

import itertools
from pathlib import Path

import torch

from refbn_d2.checkpoint.files import load_checkpoint
from refbn_d2.engines.torchvision.data import build_train_loader, load_train_dicts
from refbn_d2.engines.torchvision.modeling import build_model
from refbn_d2.engines.torchvision.trainer import train
from tests.device import on_cpu


@on_cpu
def test_precise_statistics_are_saved_and_training_stays_the_same(tiny_cfg, tmp_path):
    norms = (f"MODEL.{part}.NORM" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"))
    tiny_cfg.merge_from_list([value for key in norms for value in (key, "BN")])
    tiny_cfg.merge_from_list(["SOLVER.MAX_ITER", 3, "SOLVER.WARMUP_ITERS", 0])
    states, precise = {}, {"TEST.PRECISE_BN.ENABLED": True, "TEST.PRECISE_BN.NUM_ITER": 4}
    for name, overrides in (("plain", {}), ("precise", precise)):
        cfg = tiny_cfg.clone()
        cfg.merge_from_list([*itertools.chain(*overrides.items()), "OUTPUT_DIR", name])
        (tmp_path / name).mkdir()
        train(cfg, tmp_path / name, resume=False)
        states[name] = load_checkpoint(Path(tmp_path / name / "model_final.pth"))
    plain, state = states["plain"]["model"], states["precise"]["model"]
    changed = {name for name in plain if not torch.equal(plain[name], state[name])}
    assert changed and all("running_" in n or "num_batches" in n for n in changed)

    cfg.MODEL.WEIGHTS = ""
    model = build_model(cfg)
    model.load_state_dict(state)
    stem, seen = model.backbone.bottom_up.stem.conv1, []
    stem.norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].double()))
    model.train()
    batches = build_train_loader(
        cfg, load_train_dicts(cfg).dicts, 3, 0, 1, states["precise"]["seed"]
    )
    with torch.no_grad():
        for batch in itertools.islice(batches, 4):
            model(batch)
    x = torch.cat([y.transpose(0, 1).flatten(1) for y in seen], 1)
    norm = "backbone.bottom_up.stem.conv1.norm"
    torch.testing.assert_close(
        state[f"{norm}.running_mean"].double(), x.mean(1), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        state[f"{norm}.running_var"].double(), x.var(1), rtol=1e-3, atol=1e-4
    )
