"""Train a detector with RefBN in a plain loop over Detectron2's model and data, without a trainer.

python examples/plain_detectron2.py --config-file CONFIG.yaml MODEL.RESNETS.NORM RefBN
"""

import argparse
import os

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage

import refbn_d2  # noqa: F401  (registers "RefBN" and the keys of MODEL.REFBN)
from refbn_d2.config import refbn_options
from refbn_d2.plugin import reference_batch


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--config-file", required=True)
    p.add_argument("--resume", action="store_true", help="continue the run in OUTPUT_DIR")
    p.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = p.parse_args(argv)
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)

    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    model = build_model(cfg).train()
    data_loader = build_detection_train_loader(cfg)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    reference = reference_batch(model, data_loader, refbn_options(cfg), cfg.DATASETS.TRAIN)
    checkpointer = DetectionCheckpointer(
        model, cfg.OUTPUT_DIR, optimizer=optimizer, scheduler=scheduler, reference=reference
    )
    loaded = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    start_iter, max_iter, losses = loaded.get("iteration", 0), cfg.SOLVER.MAX_ITER, []
    with EventStorage(start_iter) as storage:
        for iteration, data in zip(range(start_iter, max_iter), data_loader, strict=False):
            with reference.step(iteration):
                loss = sum(model(data).values())
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            scheduler.step()
            storage.step()
            losses.append(loss.item())
    checkpointer.save("model_final", iteration=max_iter)
    print(f"From iteration {start_iter}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")


if __name__ == "__main__":
    main()
