"""The tables [model] and [data] of image classification."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from apollo_bench.config_section import PositiveInt
from apollo_bench.workloads.base_settings import DataSettings, ModelSettings


class ResNetModel(ModelSettings):
    """Residual network for small images."""

    family: Literal["resnet"]
    depth: Annotated[int, Field(ge=8)]  # 6n + 2
    width: PositiveInt = 16  # channels of the first stage

    @model_validator(mode="after")
    def _check_depth(self) -> ResNetModel:
        if (self.depth - 2) % 6:
            raise ValueError(f"depth is {self.depth}, allowed are 8, 14, 20, ... (6n + 2)")
        return self

    def __str__(self) -> str:
        return f"ResNet-{self.depth}, width {self.width}"


class ResNeXtModel(ModelSettings):
    """Residual network of grouped convolutions, for photographs."""

    family: Literal["resnext"]
    depth: Literal[50, 101]
    groups: PositiveInt = 32  # per 3x3 convolution
    group_width: PositiveInt = 4  # channels per group in the first stage

    def __str__(self) -> str:
        return f"ResNeXt-{self.depth} {self.groups}x{self.group_width}d"


class ImageData(DataSettings):
    """The part of the training images that is used."""

    model_arguments: ClassVar[tuple[str, ...]] = ("in_channels", "classes")

    # training examples, from the end, that are held out and evaluated on instead of the test set
    validation: Annotated[int, Field(ge=0)] = 0


class SmallImageData(ImageData):
    """Images of one size, kept decoded in memory."""

    kind: Literal["small-images"] = "small-images"
    crop_padding: Annotated[int, Field(ge=0)] = 4  # pixels
    flip: bool = True


class PhotographData(ImageData):
    """Images of any size, decoded for each use; random resized crops, at test time center crops."""

    renamed_keys: ClassVar[dict[str, str]] = {"smallest_area": "min_area"}

    kind: Literal["photographs"]
    size: PositiveInt = 224  # pixels, of the model's input
    min_area: Annotated[float, Field(gt=0, le=1)] = 0.08  # of a random crop, relative to the image
    flip: bool = True
    test_resize: PositiveInt = 256  # pixels, shorter side of a test image before its center crop

    @model_validator(mode="after")
    def _check_crop(self) -> PhotographData:
        if self.test_resize < self.size:
            raise ValueError(f"test_resize is {self.test_resize}, allowed is size or more")
        return self


class ImageFolderData(PhotographData):
    """Images of the user, in one folder per class; cropped as photographs."""

    is_custom: ClassVar[bool] = True

    kind: Literal["image-folder"]  # type: ignore[assignment]
    size: PositiveInt = 64
    min_area: Annotated[float, Field(gt=0, le=1)] = 0.25
    test_resize: PositiveInt = 72
    # of the images of each class, where the folder has no test split; drawn once
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
