"""Export a backbone as ONNX or TorchScript, with its norms folded into its convolutions.

Shapes:

    images      (N, 3, H, W) float32, normalized as in training; H and W are multiples of 32
    maps        of a ResNet "res2", ... "res5"; of a detector's backbone its own, such as "p2", ...
"""

import io
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from refbn_d2.checkpoint.convert import Contents
from refbn_d2.config import CfgNode
from refbn_d2.engines.torchvision.modeling.backbone import build_backbone
from refbn_d2.engines.torchvision.supported import check_supported
from refbn_d2.export.verify import compare, load, model_config, resnet_config, resnet_state
from refbn_d2.layers import RefInstanceNorm2d, fold
from refbn_d2.utils.extras import needs
from refbn_d2.utils.torch_compat import need_torch

STRIDE = 32

Program = Callable[[Tensor], dict[str, Tensor]]  # images -> maps


def export(contents: Contents, to: str, cfg: CfgNode | None = None) -> tuple[bytes, str]:
    """Return the program's file, and a table of its maps' differences from the unfolded model's.

    Args:
        contents: in Detectron2's layout.
        to: "onnx" or "torchscript".
        cfg: see `model_config`; a detector needs it.

    Raises:
        ConfigError: this package cannot build the backbone.
        CheckpointError: the tensors do not fit it, or the program computes something else.
        MissingDependencyError: the packages that write ONNX are not installed.
    """
    model = _backbone(contents, cfg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
        data, run = (_onnx if to == "onnx" else _torchscript)(fold(model))
        if run is None:
            return data, "not verified, because onnxruntime is not installed"
        images = _images(1, 4, 5)  # another size and number than the program was made with
        with torch.no_grad():
            found, expected = run(images), model(images)
    return data, compare(found, expected, f"the {contents.resnet} against {to}", contents.source)


def _backbone(contents: Contents, cfg: CfgNode | None) -> nn.Module:
    if contents.is_detector:
        cfg = model_config(contents, cfg)
        check_supported(cfg)
        state = {
            name.removeprefix("backbone."): tensor
            for name, tensor in contents.tensors.items()
            if name.startswith("backbone.")
        }
    else:
        cfg, state = resnet_config(contents, cfg), resnet_state(contents)
        cfg.MODEL.RESNETS.OUT_FEATURES.remove("stem")
    return load(build_backbone(cfg), contents, state, cfg)


def _images(n: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, rows * STRIDE, columns * STRIDE, generator=generator)


def _onnx(model: nn.Module) -> tuple[bytes, Program | None]:
    need_torch("Writing ONNX", 2, 6)
    from torch.export import Dim  # since torch 2.1

    with needs("onnx"):  # torch.onnx.export needs both
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    if any(isinstance(module, RefInstanceNorm2d) for module in model.modules()):
        need_torch("Writing RefIN to ONNX", 2, 8)
    names = list(model.strides)
    sizes = {0: Dim("n"), 2: STRIDE * Dim("h"), 3: STRIDE * Dim("w")}
    program = torch.onnx.export(
        model,
        (_images(2, 2, 3),),
        input_names=["images"],
        output_names=names,
        dynamo=True,  # the default since torch 2.9
        dynamic_shapes=(sizes,),
        external_data=False,
        verbose=False,
    )
    data = program.model_proto.SerializeToString()
    try:
        import onnxruntime
    except ImportError:
        return data, None
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> dict[str, Tensor]:
        maps = session.run(names, {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, maps, strict=True)}

    return data, run


def _torchscript(model: nn.Module) -> tuple[bytes, Program]:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, _images(2, 2, 3), strict=False), file)
    file.seek(0)
    return file.getvalue(), torch.jit.load(file)
