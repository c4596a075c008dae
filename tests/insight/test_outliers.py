"""Foreign images are far, hidden ones are named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from pipeline.data.decode import Decoder
from pipeline.files import digest_bytes
from pipeline.insight.looks import Looks, _joined, look_of
from pipeline.insight.outliers import FAR, outlier_scores, quality_problems

DECODER = Decoder((255, 255, 255), True, 1 << 26)


def looks_like(image: Image.Image) -> Looks:
    import io

    stream = io.BytesIO()
    image.save(stream, "PNG")
    return look_of(stream.getvalue(), DECODER, np.frombuffer(digest_bytes(stream.getvalue()), np.uint8))


def photo(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def like_each_other(n: int) -> Looks:
    one = looks_like(photo(0))
    return one.take(np.zeros(n, np.int64))


def test_what_is_far_from_its_class_ranks_first_even_in_company() -> None:
    generator = np.random.default_rng(0)
    targets = np.arange(600) % 3
    features = (generator.normal(size=(3, 40)) * 3)[targets] + generator.normal(size=(600, 40))
    features[:12] += generator.normal(size=40) * 6  # a dozen that are alike
    scores = outlier_scores(features.astype(np.float32), targets, like_each_other(600))
    assert roc_auc_score(np.arange(600) < 12, scores) > 0.98
    assert (scores[:12] > FAR).mean() > 0.7 and (scores[12:] > FAR).mean() < 0.01


def test_few_images_have_no_outliers() -> None:
    for n in (1, 2, 4):
        scores = outlier_scores(np.ones((n, 3), np.float32), np.zeros(n, np.int64), like_each_other(n))
        assert not (scores > FAR).any()


@pytest.mark.parametrize(
    ("image", "name"),
    [
        (photo(1).point(lambda value: value // 12), "too dark"),
        (photo(1).point(lambda value: 235 + value // 13), "too bright"),
        (photo(1, (5, 4)).resize((160, 120), Image.Resampling.BICUBIC), "blurred"),
        (photo(1).resize((20, 15)), "tiny"),
        (photo(1, (640, 60)), "odd shape"),
        (photo(1).convert("L").convert("RGB"), "grey"),
    ],
)
def test_what_is_hard_to_see_is_named(image: Image.Image, name: str) -> None:
    others = [looks_like(photo(seed)) for seed in range(12)]
    bad, names = quality_problems(_joined([*others, looks_like(image)]))
    assert name in names[-1].split(", ") and bad[-1] > 1
    assert names[:-1] == [""] * 12 and bad[:-1].max() <= 1


def test_a_grey_collection_is_not_odd_for_it() -> None:
    greys = _joined([looks_like(photo(seed).convert("L").convert("RGB")) for seed in range(6)])
    assert quality_problems(greys)[1] == [""] * 6


def test_an_image_that_has_gone_has_no_problem_of_its_own() -> None:
    others = _joined([looks_like(photo(seed)) for seed in range(6)])
    gone = replace(others, width=others.width * 0, height=others.height * 0)
    assert quality_problems(_joined([others, gone]))[1] == [""] * 12
