"""Encoders, the decoder, decoding and the model folder."""
