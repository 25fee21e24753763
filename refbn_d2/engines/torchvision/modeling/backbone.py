"""Provide ResNet, ResNeXt and FPN with Detectron2's parameter names and initialization.

Shapes:
    N images, H x W the padded input, C channels
    images      (N, 3, H, W)
    res<i>      (N, C_i, H / 2^i, W / 2^i), i = 2..5; a dilated res5 has res4's size
    p<i>        (N, FPN.OUT_CHANNELS, H / 2^i, W / 2^i), i = 2..6
"""

import functools
import logging
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import Tensor, nn

from refbn_d2.checkpoint.resnets import BLOCKS
from refbn_d2.engines.torchvision.modeling.norms import Norm, freeze, norm_factory

logger = logging.getLogger(__name__)


class Conv2d(nn.Conv2d):
    """relu(norm(conv(x))), with the norm as the convolution's child `norm`, as in Detectron2"""

    def __init__(self, *args, norm: nn.Module | None = None, relu: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.norm, self.relu = norm, relu

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.norm is not None:
            x = self.norm(x)
        return F.relu_(x) if self.relu else x


class Stem(nn.Module):
    """7x7 convolution and 3x3 max pooling, each with stride 2."""

    def __init__(self, out_channels: int, norm: Norm) -> None:
        super().__init__()
        own_norm = norm(out_channels)
        self.conv1 = Conv2d(3, out_channels, 7, 2, 3, bias=False, norm=own_norm, relu=True)
        c2_msra_fill(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.conv1(x), kernel_size=3, stride=2, padding=1)


class _Block(nn.Module):
    """relu(residual(x) + shortcut(x)), with the residual branch conv1, conv2, ... in this order"""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.shortcut = None
        if in_channels != out_channels:
            own_norm = norm(out_channels)
            self.shortcut = Conv2d(in_channels, out_channels, 1, stride, bias=False, norm=own_norm)

    def _fill(self, *residual: Conv2d) -> None:
        for conv in [*residual, self.shortcut]:
            if conv is not None:
                c2_msra_fill(conv)

    def _add_shortcut(self, residual: Tensor, x: Tensor) -> Tensor:
        residual += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(residual)


class BasicBlock(_Block):
    """Block of ResNet-18 and 34: two 3x3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm) -> None:
        super().__init__(in_channels, out_channels, stride, norm)

        def conv(in_channels: int, stride: int, relu: bool) -> Conv2d:
            own_norm = norm(out_channels)
            return Conv2d(
                in_channels, out_channels, 3, stride, 1, bias=False, norm=own_norm, relu=relu
            )

        self.conv1 = conv(in_channels, stride, relu=True)
        self.conv2 = conv(out_channels, 1, relu=False)
        self._fill(self.conv1, self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        return self._add_shortcut(self.conv2(self.conv1(x)), x)


class BottleneckBlock(_Block):
    """Block of ResNet-50, 101, 152 and ResNeXt: a 1x1, a grouped 3x3 and a 1x1 convolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        norm: Norm,
        channels: int,
        groups: int,
        stride_in_1x1: bool,
        dilation: int,
    ) -> None:
        super().__init__(in_channels, out_channels, stride, norm)
        stride1, stride3 = (stride, 1) if stride_in_1x1 else (1, stride)

        def conv(in_channels: int, out_channels: int, kernel: int, **kwargs) -> Conv2d:
            own_norm = norm(out_channels)
            return Conv2d(in_channels, out_channels, kernel, bias=False, norm=own_norm, **kwargs)

        self.conv1 = conv(in_channels, channels, 1, stride=stride1, relu=True)
        self.conv2 = conv(
            channels,
            channels,
            3,
            stride=stride3,
            padding=dilation,
            dilation=dilation,
            groups=groups,
            relu=True,
        )
        self.conv3 = conv(channels, out_channels, 1)
        self._fill(self.conv1, self.conv2, self.conv3)

    def forward(self, x: Tensor) -> Tensor:
        return self._add_shortcut(self.conv3(self.conv2(self.conv1(x))), x)


def resnet_stage(
    cfg, stage: int, blocks: int, stride: int, dilation: int = 1, bottleneck: bool = True
) -> nn.Sequential:
    """Return the blocks of res<stage>; the first one has the stride."""
    resnets = cfg.MODEL.RESNETS
    widen = 2 ** (stage - 2)
    out_channels = resnets.RES2_OUT_CHANNELS * widen
    in_channels = resnets.STEM_OUT_CHANNELS if stage == 2 else out_channels // 2
    block: Callable[..., _Block] = BasicBlock
    if bottleneck:
        block = functools.partial(
            BottleneckBlock,
            channels=resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP * widen,
            groups=resnets.NUM_GROUPS,
            stride_in_1x1=resnets.STRIDE_IN_1X1,
            dilation=dilation,
        )
    norm = norm_factory(resnets.NORM, cfg.MODEL.DEVICE)
    layers = []
    for _ in range(blocks):
        layers.append(block(in_channels, out_channels, stride, norm))
        in_channels, stride = out_channels, 1
    return nn.Sequential(*layers)


class ResNet(nn.Module):
    """ResNet: images (N, 3, H, W) -> {name: feature map}.

    He et al., "Deep Residual Learning for Image Recognition", 2016.

    Attributes:
        strides, channels: {name: int} of the maps in RESNETS.OUT_FEATURES.
        size_divisibility: H and W must be multiples of it.
    """

    size_divisibility = 1

    def __init__(self, cfg) -> None:
        super().__init__()
        resnets = cfg.MODEL.RESNETS
        norm = norm_factory(resnets.NORM, cfg.MODEL.DEVICE)
        self.stem = Stem(resnets.STEM_OUT_CHANNELS, norm)
        strides, channels = {"stem": 4}, {"stem": resnets.STEM_OUT_CHANNELS}
        self.stages = []
        last = max(int(name[3:]) if name != "stem" else 1 for name in resnets.OUT_FEATURES)
        total = 4
        for stage in range(2, last + 1):
            dilation = resnets.RES5_DILATION if stage == 5 else 1
            stride = 1 if stage == 2 or dilation == 2 else 2
            total *= stride
            name = f"res{stage}"
            blocks, bottleneck = BLOCKS[resnets.DEPTH][stage - 2], resnets.DEPTH >= 50
            self.add_module(name, resnet_stage(cfg, stage, blocks, stride, dilation, bottleneck))
            self.stages.append(name)
            strides[name] = total
            channels[name] = resnets.RES2_OUT_CHANNELS * 2 ** (stage - 2)
        self.strides = {name: strides[name] for name in resnets.OUT_FEATURES}
        self.channels = {name: channels[name] for name in resnets.OUT_FEATURES}
        for stage, name in enumerate(["stem", *self.stages], start=1):
            if stage <= cfg.MODEL.BACKBONE.FREEZE_AT:
                freeze(getattr(self, name))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = {}
        for name in ["stem", *self.stages]:
            x = getattr(self, name)(x)
            if name in self.strides:
                maps[name] = x
        return maps


class FPN(nn.Module):
    """p_i = output_i(m_i),   m_i = lateral_i(res_i) + upsampled m_(i+1)

    The input are images (N, 3, H, W), the output is {name: feature map}. p6 is p5 with stride 2.
    Lin et al., "Feature Pyramid Networks for Object Detection", 2017. Attributes are those of
    `ResNet`.
    """

    def __init__(self, cfg) -> None:
        super().__init__()
        fpn = cfg.MODEL.FPN
        norm = norm_factory(fpn.NORM, cfg.MODEL.DEVICE)
        bottom_up = ResNet(cfg)
        self.in_features, self.average = list(fpn.IN_FEATURES), fpn.FUSE_TYPE == "avg"
        self.levels = [int(math.log2(bottom_up.strides[name])) for name in self.in_features]
        for name, level in zip(self.in_features, self.levels, strict=True):
            convs = {
                f"fpn_lateral{level}": (bottom_up.channels[name], 1),
                f"fpn_output{level}": (fpn.OUT_CHANNELS, 3),
            }
            for conv_name, (in_channels, kernel) in convs.items():
                conv = Conv2d(
                    in_channels,
                    fpn.OUT_CHANNELS,
                    kernel,
                    padding=kernel // 2,
                    bias=fpn.NORM == "",
                    norm=norm(fpn.OUT_CHANNELS),
                )
                self.add_module(conv_name, conv)
            for conv_name in convs:
                c2_xavier_fill(getattr(self, conv_name))
        self.bottom_up = bottom_up
        self.strides = {f"p{i}": 2**i for i in [*self.levels, self.levels[-1] + 1]}
        self.channels = dict.fromkeys(self.strides, fpn.OUT_CHANNELS)
        self.size_divisibility = 2 ** self.levels[-1]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        bottom_up = self.bottom_up(x)
        maps, merged = {}, None
        for name, level in zip(self.in_features[::-1], self.levels[::-1], strict=True):
            lateral = getattr(self, f"fpn_lateral{level}")(bottom_up[name])
            if merged is not None:
                lateral = lateral + F.interpolate(merged, scale_factor=2.0, mode="nearest")
                if self.average:
                    lateral = lateral / 2
            merged = lateral
            maps[f"p{level}"] = getattr(self, f"fpn_output{level}")(merged)
        top = self.levels[-1]
        maps[f"p{top + 1}"] = F.max_pool2d(maps[f"p{top}"], kernel_size=1, stride=2)
        return {name: maps[name] for name in self.strides}


def build_backbone(cfg) -> ResNet | FPN:
    """Build the backbone named by MODEL.BACKBONE.NAME."""
    norms = (cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM)
    norms += (cfg.MODEL.ROI_BOX_HEAD.NORM, cfg.MODEL.ROI_MASK_HEAD.NORM)
    if "SyncBN" in norms and torch.device(cfg.MODEL.DEVICE).type == "cpu":
        logger.warning("SyncBN needs a GPU: on the CPU every worker normalizes its own batch (BN)")
    return {"build_resnet_backbone": ResNet, "build_resnet_fpn_backbone": FPN}[
        cfg.MODEL.BACKBONE.NAME
    ](cfg)
