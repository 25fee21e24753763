"""Describe the ResNets that Detectron2 can build, and infer which one a state dict holds.

Names are Detectron2's without a place ("res2.0.conv1.weight"). Shapes are those of a state dict: a
convolution's weight is (out, in / groups, kernel, kernel).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import mode

from refbn_d2.utils.errors import CheckpointError

# Blocks of res2..res5 by depth; from 50 on they are bottlenecks.
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BLOCKS[152] = (3, 8, 36, 3)

VECTORS = ("weight", "bias", "running_mean", "running_var", "ref_mean", "ref_var")
SCALARS = ("num_batches_tracked", "ref_count")  # of a norm
# What BRN, CBN and MABN keep for the rest of their run; evaluation does not need it.
RUN_STATE = ("steps", "second_moments", "gradient_moments")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ResNetSpec:
    """A ResNet or ResNeXt up to res<last_stage>, whose stem is one 7x7 convolution."""

    depth: int
    groups: int = 1
    width: int = 64  # channels per group of res2's bottlenecks
    stem: int = 64  # channels of the stem
    res2: int = 256  # channels of res2, doubled by each stage; 64 below depth 50
    last_stage: int = 5

    def __str__(self) -> str:
        name = f"ResNet-{self.depth}"
        if self.groups > 1:
            name = f"ResNeXt-{self.depth} {self.groups}x{self.width}d"
        elif self.width != 64:
            name += f" of width {self.width}"
        if not self.is_torchvisions:
            name += f" (stem {self.stem}, res2 {self.res2} channels)"
        return name

    @property
    def is_torchvisions(self) -> bool:
        """Return whether torchvision's ResNet class can build it."""
        return (self.stem, self.res2) == (64, 256 if self.depth >= 50 else 64)

    def convolutions(self) -> Iterator[tuple[str, Shape]]:
        """Yield (layer, shape of its weight), in the order of the forward pass."""
        yield "stem.conv1", (self.stem, 3, 7, 7)
        inputs = self.stem
        for stage in range(2, self.last_stage + 1):
            widen = 2 ** (stage - 2)
            outputs, inner = self.res2 * widen, self.groups * self.width * widen
            for index in range(BLOCKS[self.depth][stage - 2]):
                block = f"res{stage}.{index}"
                if inputs != outputs:
                    yield f"{block}.shortcut", (outputs, inputs, 1, 1)
                if self.depth >= 50:
                    yield f"{block}.conv1", (inner, inputs, 1, 1)
                    yield f"{block}.conv2", (inner, inner // self.groups, 3, 3)
                    yield f"{block}.conv3", (outputs, inner, 1, 1)
                else:
                    yield f"{block}.conv1", (outputs, inputs, 3, 3)
                    yield f"{block}.conv2", (outputs, outputs, 3, 3)
                inputs = outputs

    def shapes(self, norm: Iterable[str]) -> dict[str, Shape]:
        """Return {name: shape} of all convolutions' weights and of the tensors `norm` of norms."""
        shapes = {}
        for layer, shape in self.convolutions():
            shapes[f"{layer}.weight"] = shape
            shapes |= {f"{layer}.norm.{t}": () if t in SCALARS else shape[:1] for t in norm}
        return shapes

    def config(self) -> dict[str, int]:
        """Return {key: value} of MODEL.RESNETS with which Detectron2 builds it."""
        values = {
            "DEPTH": self.depth,
            "NUM_GROUPS": self.groups,
            "WIDTH_PER_GROUP": self.width,
            "STEM_OUT_CHANNELS": self.stem,
            "RES2_OUT_CHANNELS": self.res2,
        }
        return {f"MODEL.RESNETS.{key}": value for key, value in values.items()}


def infer_resnet(shapes: Mapping[str, Shape]) -> ResNetSpec:
    """Return the ResNet that most tensors belong to; some may be missing or have other shapes.

    Raises:
        CheckpointError: Detectron2 cannot build it.
    """
    layers = {}  # (stage, block, convolution) -> shape
    for name, shape in shapes.items():
        match = re.fullmatch(r"res(\d)\.(\d+)\.conv(\d)\.weight", name)
        if match and len(shape) == 4:
            layers[tuple(map(int, match.groups()))] = shape
    if not layers:
        raise CheckpointError("it has no block of a ResNet")
    last_stage = max(stage for stage, _, _ in layers)
    blocks = tuple(
        max((block + 1 for at, block, _ in layers if at == stage), default=0)
        for stage in range(2, last_stage + 1)
    )
    last_conv = max(conv for _, _, conv in layers)
    known = {d: (b, 3 if d >= 50 else 2) for d, b in BLOCKS.items()}
    fitting = (d for d, (b, c) in known.items() if b[: len(blocks)] == blocks and c == last_conv)
    depth = next(fitting, None)
    if depth is None:
        raise CheckpointError(
            f"its stages have {_numbers(blocks)} blocks of {last_conv} convolutions; allowed: "
            + ", ".join(f"ResNet-{d} has {_numbers(b)} of {c}" for d, (b, c) in known.items())
        )
    # The majority decides, so that a single tensor of a wrong shape does not change the result.
    stems = [
        shapes[name][axis]
        for name, axis in (
            ("stem.conv1.weight", 0),
            ("stem.conv1.norm.weight", 0),
            ("res2.0.conv1.weight", 1),
            ("res2.0.shortcut.weight", 1),
        )
        if len(shapes.get(name, ())) > axis
    ]
    stem = mode(stems or [64])
    res2 = mode(s[0] >> (stage - 2) for (stage, _, conv), s in layers.items() if conv == last_conv)
    if depth < 50:
        return ResNetSpec(depth, stem=stem, res2=res2, last_stage=last_stage)
    groups, width = mode(
        (s[0] // max(s[1], 1), s[1] >> (stage - 2))
        for (stage, _, conv), s in layers.items()
        if conv == 2
    )
    return ResNetSpec(depth, groups, width, stem, res2, last_stage)


def _numbers(blocks: Iterable[int]) -> str:
    return " ".join(map(str, blocks))


# Other known architectures. Each pattern must match the beginning of some name (after a place). The
# first row whose patterns all match decides.
_OTHERS = (
    ("a ResNet with a deep stem", r"(conv1\.\d|stem\.conv[23])\.", r"(layer1|res2)\."),
    ("a ResNet with attention in its blocks (SE, ECA)", r"layer\d\.\d+\.(se|attn)\."),
    ("an SENet of the old kind", r"layer0\.conv1\."),
    ("a ResNet that pools in its shortcuts", r"layer\d\.0\.downsample\.2\."),
    ("a Res2Net", r"layer\d\.\d+\.convs\."),
    ("an SKNet", r"layer\d\.\d+\.conv\d\.(conv|paths)\."),
    ("a ResNetV2 or BiT", r"stages\.\d\.blocks\.\d+\.norm1\.", r"stages\.\d\.blocks\.\d+\.conv2\."),
    ("a ByobNet (timm's resnet..ts, CLIP's ResNets, RepVGG)", r"stem\.conv\w+\.conv\."),
    ("a detector of torchvision's own", r"body\.layer1\.", r"fpn\.inner_blocks\."),
    ("a Swin Transformer", r"(layers|features)\.\d\.(blocks\.)?\d+\.attn\.relative_position"),
    ("a ViT (timm)", r"(net\.)?blocks\.\d+\.attn\."),
    ("a ViT (torchvision)", r"encoder\.layers\.encoder_layer_"),
    ("a ConvNeXt (timm)", r"stages\.\d\.blocks\.\d+\.(gamma|conv_dw)"),
    ("a ConvNeXt (torchvision)", r"features\.\d\.\d+\.layer_scale"),
    ("an EfficientNet or MobileNet (timm)", r"conv_stem\.", r"blocks\.\d+\."),
    ("an EfficientNet or MobileNetV3 (torchvision)", r"features\.\d+\.(\d+\.)?block\."),
    ("a MobileNetV2", r"features\.\d+\.conv\.\d"),
    ("a DenseNet", r"features\.denseblock\d"),
    ("a SqueezeNet", r"features\.\d+\.squeeze\."),
    ("a VGG or AlexNet", r"features\.0\.weight", r"(classifier\.6|pre_logits)\."),
    ("a RegNet", r"(trunk_output\.block\d|s\d\.b\d)"),
    ("an Inception or GoogLeNet", r"(Mixed_5b|inception3a)\."),
    ("an HRNet", r"stage\d\.\d\.branches\."),
)


def recognize_unsupported(names: Iterable[str], arch: str = "") -> str | None:
    """Return a known architecture that Detectron2 does not build, by its tensors' names; or None.

    Args:
        arch: the model's name, if the file stores it ("arch" in timm's checkpoints).
    """
    own_names = [re.sub(r"^backbone\.(bottom_up\.)?", "", name) for name in names]
    for what, *patterns in _OTHERS:
        if all(any(re.match(pattern, name) for name in own_names) for pattern in patterns):
            return what
    if re.search("resnet(aa|blur)", arch):  # its tensors are a plain ResNet's
        return "an anti-aliased ResNet"
    return None
