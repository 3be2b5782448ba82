"""Errors of the library carry data and reach other processes whole; commands add remedies that name their flags."""

import pickle

import pytest

from captioner.cli import Remedies, with_remedy
from captioner.errors import (
    DeviceMemoryError,
    NoAttentionError,
    NotCalibratedError,
    StreamingError,
    TooManyBadSamplesError,
    UserError,
)
from captioner.files.ownership import AlreadyOwnedError, NotWritableError
from captioner.model.encoders import FixedCropError, SmallImagesError, WeightsError
from captioner.streaming.cache import CacheFolderError, CacheTooSmallError
from captioner.streaming.reader import SampleError
from infer import main as captioning
from sharding import make_shards
from train import evaluate
from train import main as training

ERRORS = (
    AlreadyOwnedError("run/owner.json", "is training in this folder", 7, "node3"),
    CacheFolderError("cache", "No space left on device"),
    CacheTooSmallError("cache", 10**9, "s3://shards/train-000000.tar", 2 * 10**9),
    DeviceMemoryError(),
    FixedCropError("vit_b_32", 192, 224),
    NoAttentionError(),
    NotWritableError("run", "Permission denied"),
    NotCalibratedError("a greedy search"),
    SampleError("undecodable", "sample 7 cannot be decoded"),
    SmallImagesError("inception_v3", 299, 256),
    TooManyBadSamplesError(3, 2, "sample 7 cannot be decoded"),
    WeightsError("resnet18", "weights.pth", "there is no such file"),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_are_one_line_and_survive_pickling(error: UserError) -> None:
    sent = pickle.loads(pickle.dumps(error))
    assert type(sent) is type(error)
    assert str(sent) == str(error)
    assert "\n" not in str(error)
    assert vars(sent) == vars(error)


def test_the_remedy_is_that_of_the_nearest_class_and_may_hold_the_errors_data() -> None:
    error = TooManyBadSamplesError(3, 2, "a.tar")
    assert with_remedy(error, {}) == str(error)
    assert with_remedy(error, {UserError: "a", StreamingError: "b"}) == f"{error}: b"
    assert with_remedy(UserError("{x}"), {UserError: "a", StreamingError: "b"}) == "{x}: a"
    assert with_remedy(error, {TooManyBadSamplesError: "tolerate {error.found}"}) == f"{error}: tolerate 3"


@pytest.mark.parametrize("remedies", [make_shards.REMEDIES, training.REMEDIES, evaluate.REMEDIES, captioning.REMEDIES])
def test_the_commands_remedies_fit_their_errors(remedies: Remedies) -> None:
    for kind in remedies:
        (error,) = (each for each in ERRORS if type(each) is kind)
        line = with_remedy(error, remedies)
        assert "--" in line
        assert "{" not in line
