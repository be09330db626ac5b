"""The tables [model] and [data] that a recipe may contain, of all workloads.

It imports no torch: reading a recipe is fast.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from apollo_bench.workloads.custom_model import CustomModel
from apollo_bench.workloads.image_classification.image_settings import (
    ImageFolderData,
    PhotographData,
    ResNetModel,
    ResNeXtModel,
    SmallImageData,
)
from apollo_bench.workloads.language_modeling.language_settings import (
    LSTMModel,
    TextData,
    TextFileData,
)
from apollo_bench.workloads.translation.translation_settings import (
    AlignedTextData,
    SentencePairData,
    TransformerModel,
)

Model = Annotated[
    ResNetModel | ResNeXtModel | LSTMModel | TransformerModel | CustomModel,
    Field(discriminator="family"),
]


def kind(data: Any) -> Any:
    """Return the kind of the table [data]; its default is small images.

    Messages of pydantic contain the name of this function, so it is named as the key.
    """
    if isinstance(data, dict):
        return data.get("kind", "small-images")
    return getattr(data, "kind", None)


Data = Annotated[
    Annotated[SmallImageData, Tag("small-images")]
    | Annotated[PhotographData, Tag("photographs")]
    | Annotated[TextData, Tag("text")]
    | Annotated[SentencePairData, Tag("sentence-pairs")]
    | Annotated[ImageFolderData, Tag("image-folder")]
    | Annotated[TextFileData, Tag("text-file")]
    | Annotated[AlignedTextData, Tag("aligned-text")],
    Discriminator(kind),
]

# kinds of the user's data; each has a recipe of its name
CUSTOM_KINDS = ("image-folder", "text-file", "aligned-text")
DEFAULT_DATA = SmallImageData()
