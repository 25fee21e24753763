"""Select the images of the reference batch, and keep their moments in every RefBN layer."""

from refbn_d2.reference.adaptation import adapt_reference
from refbn_d2.reference.batch import ReferenceBatch
from refbn_d2.reference.detection import image_rows
from refbn_d2.reference.selection import (
    draw_images,
    find_images,
    identity_of,
    is_landscape,
    select_reference,
)

__all__ = [
    "ReferenceBatch",
    "adapt_reference",
    "draw_images",
    "find_images",
    "identity_of",
    "image_rows",
    "is_landscape",
    "select_reference",
]
