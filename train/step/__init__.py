"""One optimizer step: model, loss, schedule."""
