"""Parse MODEL.WEIGHTS: a file and, after a question mark, options, as in Detectron2.

Examples:

    resnet50.pth
    moco.pth?key=encoder_q
    detectron.pkl?matching_heuristics=True&key=model_ema
"""

from dataclasses import dataclass
from urllib.parse import parse_qs

from refbn_d2.checkpoint.files import load_checkpoint
from refbn_d2.utils.errors import CheckpointError


@dataclass(frozen=True)
class WeightsSource:
    """A parsed value of MODEL.WEIGHTS."""

    file: str  # or a URL
    key: str | None = None  # see `load_checkpoint`
    matching_heuristics: bool = False  # match names by their ends, as Detectron2 does

    @property
    def is_url(self) -> bool:
        """Return whether Detectron2 has to fetch it ("detectron2://", "https://", ...)."""
        return "://" in self.file


def parse_source(text: str) -> WeightsSource:
    """Parse `FILE?key=KEY&matching_heuristics=True`.

    Raises:
        CheckpointError: there is something else after the question mark.
    """
    file, _, query = text.partition("?")
    fields = parse_qs(query, keep_blank_values=True)
    key, heuristics = fields.pop("key", [None]), fields.pop("matching_heuristics", ["False"])
    valid = len(key) == 1 and key[0] != "" and heuristics in (["True"], ["False"])
    if fields or not valid or (query and "=" not in query):
        raise CheckpointError(
            f"MODEL.WEIGHTS {text}: allowed after the question mark are key=KEY, where KEY says "
            "where in the file the weights are, and matching_heuristics=True, joined by &."
        )
    return WeightsSource(file, key[0], heuristics == ["True"])


def load_source(text: str) -> dict:
    """Load the checkpoint file that MODEL.WEIGHTS names, with its key.

    `matching_heuristics` has no effect: this package matches names by rules
    (`loading.load_weights`).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is a URL; or an error of `parse_source` or `load_checkpoint`.
    """
    source = parse_source(text)
    if source.is_url:
        raise CheckpointError(
            f"MODEL.WEIGHTS {text} is a URL, which only the Detectron2 engine downloads: use "
            "--engine detectron2, or download the file and give its path."
        )
    return load_checkpoint(source.file, key=source.key)
