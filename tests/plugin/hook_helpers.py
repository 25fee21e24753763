"""Detectron2's own trainer, watched by a hook that keeps the references of each step."""

import torch


def references(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "ref_" in name}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trainer_of(cfg):
    """A DefaultTrainer without evaluation, which keeps the references after each step."""
    from detectron2.engine import DefaultTrainer, HookBase

    class Trainer(DefaultTrainer):
        def build_hooks(self):
            return [hook for hook in super().build_hooks() if "Eval" not in type(hook).__name__]

    class Keep(HookBase):
        def __init__(self):
            self.seen = []

        def before_train(self):
            self.trainer.captured = [references(self.trainer.model)]

        def after_step(self):
            self.seen.append(references(self.trainer.model))

    torch.manual_seed(3)
    trainer = Trainer(cfg)
    trainer.keep = Keep()
    trainer.register_hooks([trainer.keep])
    return trainer


def hook_of(trainer):
    from refbn_d2.plugin.hook import ReferenceBatchHook

    [hook] = [hook for hook in trainer._hooks if isinstance(hook, ReferenceBatchHook)]
    return hook


CHANGES = {  # steps of 4, REFRESH_PERIOD 3, in which the reference changes
    "static": [False, False, False, False],
    "full": [False, False, False, True],  # at 0 it is that of the capture
    "slice": [True, False, False, True],
    "concat": [True, False, False, True],
}
