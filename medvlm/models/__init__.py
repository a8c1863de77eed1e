"""Vision tower, projector and language model, composed on `transformers` classes."""
