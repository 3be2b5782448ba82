"""Fine-tune a Hugging Face captioning model under Accelerate on streamed tar shards, with an exact resume.

    pip install transformers
    accelerate launch examples/fine_tune_transformers.py data/shards checkpoints 5     # run again to resume

The model is tiny and starts from random weights, so that nothing is downloaded; use `from_pretrained` instead.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from captioner.streaming import StreamingLoader

SIDE = 32


class Collate:
    """In a worker: turns images of one size and tokenized captions into the model's inputs."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def __call__(self, samples: list[tuple[np.ndarray, str]]) -> dict[str, torch.Tensor]:
        """`pixel_values` (B, 3, SIDE, SIDE) in -1..1 and `labels` (B, T), -100 where a caption has ended."""
        images, captions = zip(*samples, strict=True)
        pixels = torch.from_numpy(np.stack(images)).movedim(-1, 1).float() / 127.5 - 1
        tokens = self.tokenizer(list(captions), padding=True, truncation=True, max_length=32, return_tensors="pt")
        return {"pixel_values": pixels, "labels": tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)}


def prepare(sample: dict, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """In a worker: a decoded image at its size, and one of its captions."""
    captions = sample["json"]["captions"]
    return np.array(sample["jpg"].resize((SIDE, SIDE))), captions[rng.integers(len(captions))]


def learn_tokenizer(shards: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the training captions' words; each process reads all captions, and no images."""
    samples = StreamingLoader(
        shards, split="train", batch_size=64, shuffle=False, fields=["json"], collate=list, rank=0, world_size=1
    )
    captions = (caption for batch in samples for sample in batch for caption in json.loads(sample["json"])["captions"])
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(captions, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]", "[BOS]", "[EOS]"]))
    words.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]")


def make_model(tokenizer: PreTrainedTokenizerFast) -> VisionEncoderDecoderModel:
    """A tiny ViT encoder and GPT-2 decoder."""
    encoder = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=SIDE, patch_size=8
    )
    decoder = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=40,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))
    model.config.decoder_start_token_id = tokenizer.bos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def main(shards: str, checkpoints: str, epochs: int) -> None:
    """Train to this number of epochs, from the newest checkpoint if there is one."""
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # the decoder needs no pooled image
    accelerator = Accelerator(kwargs_handlers=[unused])
    set_seed(0)
    tokenizer = learn_tokenizer(shards)
    model = make_model(tokenizer)
    loader = StreamingLoader(
        shards, split="train", batch_size=32, last_batch="drop", decode="pil", transform=prepare,
        collate=Collate(tokenizer), num_workers=2,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)  # returned unchanged
    accelerator.register_for_checkpointing(loader)
    latest = Path(checkpoints) / "latest"
    if latest.exists():
        accelerator.load_state(str(Path(checkpoints) / latest.read_text()))
    while loader.epoch < epochs:
        for batch in loader:
            loss = model(**{name: tensor.to(accelerator.device) for name, tensor in batch.items()}).loss
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        name = f"epoch-{loader.epoch}"
        accelerator.print(f"{name}: loss {loss.item():.3f}")
        accelerator.save_state(str(Path(checkpoints) / name))
        accelerator.wait_for_everyone()  # all ranks have written their parts
        if accelerator.is_main_process:
            latest.with_suffix(".new").write_text(name)
            latest.with_suffix(".new").replace(latest)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
