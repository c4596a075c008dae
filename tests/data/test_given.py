"""Whatever a program calls an image becomes one, known by its content; anything else is refused at once."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.decode import BadImage, Decoder, PixelBytes
from pipeline.data.given import GivenSource
from pipeline.data.images import open_given
from pipeline.data.source import UNLABELLED
from pipeline.errors import DataError
from pipeline.files import digest_bytes
from pipeline.params import DataParams

from .test_folder import EXTENSIONS, make

DECODER = Decoder(background=(255, 255, 255), exif=True, max_pixels=10**6)
ARRAY = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)


def test_files_and_folders_are_taken_once_in_order(tmp_path: Path) -> None:
    make(tmp_path, "z.xyz", "dir/b.jpg", "dir/a.jpg", "dir/sub/c.jpg", "dir/n.txt")
    samples = GivenSource(
        [tmp_path / "z.xyz", str(tmp_path / "dir"), tmp_path / "dir/a.jpg"], EXTENSIONS
    ).list_samples()
    assert samples.paths == [f"{tmp_path}/{name}" for name in ("z.xyz", "dir/a.jpg", "dir/b.jpg", "dir/sub/c.jpg")]
    assert (samples.root / samples.paths[1]).read_bytes() == b"dir/a.jpg"
    assert set(samples.targets.tolist()) == {UNLABELLED} and samples.ignored == {".txt": 1}
    assert samples.stamps[0].tolist()[3] == (tmp_path / "z.xyz").stat().st_ino
    with pytest.raises(DataError, match="No such file"):
        GivenSource([tmp_path / "nothing.jpg"], EXTENSIONS).list_samples()
    with pytest.raises(DataError, match="No image"):
        GivenSource([make(tmp_path / "empty", "x.txt")], EXTENSIONS).list_samples()


def test_a_string_is_one_path(tmp_path: Path) -> None:
    make(tmp_path, "dir/a.jpg")
    assert GivenSource(str(tmp_path / "dir"), EXTENSIONS).list_samples().paths == [f"{tmp_path}/dir/a.jpg"]


def test_images_without_a_file_are_known_by_their_content(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(ARRAY).save(buffer, "PNG")
    given = [buffer.getvalue(), ARRAY, Image.fromarray(ARRAY)]
    images = open_given(given, DataParams(), tmp_path)
    assert images.paths == ["image 0", "image 1", "image 2"] and images.path(1) == "image 1"
    contents = [images.read(position) for position in range(3)]
    assert images.digest(0) == digest_bytes(buffer.getvalue())
    assert images.digest(1) == images.digest(2) != images.digest(0)
    for data in contents:
        assert data and (np.asarray(DECODER(data)) == ARRAY).all()
    images.remember()
    assert not list(tmp_path.iterdir()), "what is gone with the process is not remembered"


def test_equal_samples_of_another_shape_or_mode_are_another_image() -> None:
    grey = ARRAY[:, :, 0]
    images = [ARRAY, ARRAY.transpose(1, 0, 2), grey, grey.reshape(5, 6), grey.reshape(10, 3)]
    assert len({digest_bytes(PixelBytes.of(Image.fromarray(np.ascontiguousarray(image)))) for image in images}) == 5


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"])
def test_every_mode_is_decoded_as_from_a_lossless_file(mode: str) -> None:
    image = Image.fromarray(ARRAY).convert("L" if mode == "I;16" else mode)
    image = Image.fromarray(np.asarray(image, np.uint16) * 257) if mode == "I;16" else image
    decoded = DECODER(PixelBytes.of(image))
    if mode in ("CMYK", "YCbCr", "HSV"):
        assert (np.asarray(decoded) == np.asarray(image.convert("RGB"))).all()
        return
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert (np.asarray(decoded) == np.asarray(DECODER(buffer.getvalue()))).all()


def test_a_mode_without_a_range_is_a_bad_image() -> None:
    with pytest.raises(BadImage, match="unsupported mode"):
        DECODER(PixelBytes.of(Image.fromarray(ARRAY[:, :, 0].astype(np.float32))))


def test_a_file_cannot_pass_for_pixels() -> None:
    with pytest.raises(BadImage, match="not an image"):
        DECODER(bytes(PixelBytes.of(Image.fromarray(ARRAY))))


@pytest.mark.parametrize(
    "given", [7, None, [3.5], [None], [["a.jpg"]], {1: 2}, ARRAY.astype(float), ARRAY[None], object()]
)
def test_anything_else_is_a_type_error(given: Any) -> None:
    with pytest.raises(TypeError):
        GivenSource(given, EXTENSIONS)
