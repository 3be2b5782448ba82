"""The captions of validation images that are shown, with where their words looked."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_model import DECODING, FORMS, VIEW, VOCABULARY, Form, advance, caption_views, make_model, make_views, pack

from captioner.model.bundle import Bundle
from train.data.batches import CaptionBatch
from train.evaluation.predictions import read_captions, write_captions
from train.evaluation.validation import NUM_SAMPLES, Evaluation, Evaluator
from train.step.step import CaptionLoss

NUM_IMAGES = NUM_SAMPLES + 4


class Batches(list):
    """A loader's one epoch."""

    ledger: Any = None


def batches_of(*batches: range) -> Any:
    views = torch.from_numpy(make_views(NUM_IMAGES))
    return Batches(
        [[
            CaptionBatch(
                views[batch.start : batch.stop], pack([[[4, 5]]] * len(batch), max_tokens=7), list(batch),
                list(map(str, batch)), list(map(str, batch)), [["a dog"]] * len(batch), 0,
            )
            for batch in batches
        ]]
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_sample_captions_have_the_attention_of_their_decoding(form: Form, tmp_path: Any) -> None:
    bundle = Bundle(model=make_model(form), view=VIEW, vocabulary=VOCABULARY, decoding=DECODING, name="abc")
    batches = batches_of(range(5), range(5, NUM_SAMPLES + 1), range(NUM_SAMPLES + 1, NUM_IMAGES))
    samples = batches_of(range(NUM_SAMPLES))
    evaluator = Evaluator(
        split=SimpleNamespace(num_samples=NUM_IMAGES),  # type: ignore[bad-argument-type]
        loss_model=CaptionLoss(bundle.model, view=VIEW).eval(),
        open_loader=lambda _split, **options: samples if options else batches,
        decoding=DECODING,
        vocabulary=VOCABULARY,
        accelerator=SimpleNamespace(device=torch.device("cpu"), autocast=torch.no_grad),  # type: ignore[bad-argument-type]
    )
    _, rows, ledger = evaluator.caption_split()
    images, captions, attention = evaluator.sample_captions(
        Evaluation(captions=rows, metrics={}, ledger=ledger, seconds=0.0)
    )
    decoded = caption_views(bundle, make_views(NUM_SAMPLES))
    assert captions == [VOCABULARY.decode(caption.tokens) for caption in decoded]
    assert len(images) == NUM_SAMPLES
    if form == "attention":
        stepped = advance(bundle, make_views(NUM_SAMPLES), [caption.tokens for caption in decoded])
        for seen, caption, weights_TR in zip(attention, captions, stepped, strict=True):
            assert seen is not None
            assert "".join(seen.words) == caption
            assert seen.weights_TR == pytest.approx(weights_TR, abs=1e-5)
    else:
        assert attention == [None] * NUM_SAMPLES
    write_captions(tmp_path / "c.jsonl", rows)
    assert [row.caption for row in read_captions(tmp_path / "c.jsonl")] == [row.caption for row in rows]
