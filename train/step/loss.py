"""A linear layer fused with its cross-entropy, chunk by chunk: the logits of all tokens are never held at once.

Shapes: M tokens, H hidden width, V vocabulary, C tokens of a chunk. A suffix says a tensor's shape: `hidden_MH`.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 2048  # 80 MB of logits at 10,000 words; smaller chunks are slower on a CPU
# Float16 would lose probabilities near 1e-7; times 16 it keeps them. The sum over a chunk whose every token is the same
# wrong word stays below its largest number, 65,504, for hidden values up to 1, as those of an LSTM are.
GRADIENT_SCALE = 16.0


def linear_cross_entropy(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor,
    targets_M: Tensor,
    *,
    label_smoothing: float = 0.0,
    token_weights_M: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (natural log) of the logits `hidden_MH @ weight_VH.T + bias_V`, summed over tokens: two scalars.

    The first is smoothed as in `torch.nn.functional.cross_entropy`, each token times its weight where weights are
    given, and has gradients; the second is plain and has none. Both are at least float32. Forward computes the
    gradients, if any are needed, and backward multiplies them by the incoming one. Under autocast the products have its
    type, but not on the CPU: many have no unit for it, and there a product in bfloat16 takes up to 50 times as long as
    one in float32.
    """
    device = hidden_MH.device.type
    autocast = torch.is_autocast_enabled(device) and device != "cpu"
    input_type = torch.promote_types(hidden_MH.dtype, weight_VH.dtype)
    product_type = torch.get_autocast_dtype(device) if autocast else input_type
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(
            hidden_MH,
            weight_VH,
            bias_V,
            targets_M,
            token_weights_M,
            label_smoothing,
            product_type,
            torch.is_grad_enabled(),
        )


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward saves the gradients, at least in float32 and times GRADIENT_SCALE."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, targets_M, token_weights_M, smoothing, product_type, grad_enabled = arguments
        hidden_MH, weight_VH, bias_V = (x.to(product_type) for x in inputs)
        exact_type = torch.promote_types(product_type, torch.float32)
        wanted = grad_enabled and any(ctx.needs_input_grad)
        gradients = [torch.zeros_like(x, dtype=exact_type) for x in inputs if wanted]
        objective, plain = (torch.zeros((), dtype=exact_type, device=bias_V.device) for _ in range(2))
        for chunk, log_p_CV, buffer_CV in _chunks(hidden_MH, weight_VH, bias_V, exact_type=exact_type):
            target_log_p_C = log_p_CV.gather(1, targets_M[chunk, None])[:, 0]
            plain -= target_log_p_C.sum()
            weights_C = 1.0 if token_weights_M is None else token_weights_M[chunk]
            objective -= (1 - smoothing) * (weights_C * target_log_p_C).sum()
            if smoothing:
                objective -= smoothing * (weights_C * log_p_CV.mean(1)).sum()
            if wanted:
                d_CV = _logit_gradients(log_p_CV, targets_M[chunk], smoothing=smoothing, out=buffer_CV)
                if token_weights_M is not None:
                    d_CV *= token_weights_M[chunk, None]
                gradients[0][chunk] = d_CV @ weight_VH
                gradients[1] += d_CV.T @ hidden_MH[chunk]
                gradients[2] += d_CV.sum(0, dtype=exact_type)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(plain)
        return objective, plain

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        factor = grad_outputs[0] / GRADIENT_SCALE
        return (*(gradient * factor for gradient in ctx.saved_tensors), None, None, None, None, None)


def _chunks(
    hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor, *, exact_type: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunks of nearly one size: their rows, log probabilities (C, V), and a (C, V) buffer of the inputs' type.

    The memory of both is reused for the next chunk.
    """
    num_tokens, num_words = len(hidden_MH), len(weight_VH)
    num_chunks = max(1, math.ceil(num_tokens / CHUNK_TOKENS))
    chunk_tokens = math.ceil(num_tokens / num_chunks)
    logits_CV = hidden_MH.new_empty((chunk_tokens, num_words))
    log_p_CV = torch.empty_like(logits_CV, dtype=exact_type)
    for start in range(0, num_tokens, max(1, chunk_tokens)):
        rows = slice(start, min(num_tokens, start + chunk_tokens))
        size = rows.stop - rows.start
        torch.addmm(bias_V, hidden_MH[rows], weight_VH.T, out=logits_CV[:size])
        torch.log_softmax(logits_CV[:size], dim=1, dtype=exact_type, out=log_p_CV[:size])
        yield rows, log_p_CV[:size], logits_CV[:size]


def _logit_gradients(log_p_CV: Tensor, targets_C: Tensor, *, smoothing: float, out: Tensor) -> Tensor:
    """Gradients of the smoothed sum w.r.t. the logits, times GRADIENT_SCALE, in `out`; overwrites `log_p_CV`."""
    p_CV = log_p_CV.exp_()
    if smoothing:
        p_CV -= smoothing / p_CV.shape[1]
    p_CV[torch.arange(len(targets_C), device=targets_C.device), targets_C] -= 1 - smoothing
    return torch.mul(p_CV, GRADIENT_SCALE, out=out)
