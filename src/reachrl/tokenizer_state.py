"""Tokenizers as their vocabulary has them: what a file keeps of the last call before it was saved never acts."""

from typing import Any

# Options of a call that `transformers` takes for defaults of the next one when it finds them in a tokenizer's file.
_OF_A_CALL = (
    *("truncation", "truncation_strategy", "stride", "max_length"),
    *("padding", "padding_strategy", "pad_to_multiple_of"),
)


def forget_calls(reader: Any) -> None:
    """Switch off truncation, padding and sampling of pieces; every call must ask for what it wants.

    Args:
        reader: a tokenizer of the package tokenizers, or a tokenizer or processor of `transformers`; what holds no
            tokenizer is left as it is.
    """
    wrapped = getattr(reader, "tokenizer", reader)
    for key in _OF_A_CALL:
        getattr(wrapped, "init_kwargs", {}).pop(key, None)
    backend = getattr(wrapped, "backend_tokenizer", wrapped)
    if not hasattr(backend, "no_truncation"):
        return
    backend.no_truncation()
    backend.no_padding()
    for key in ("dropout", "alpha"):  # of BPE, of Unigram: other tokens at every call
        if getattr(backend.model, key, None) is not None:
            setattr(backend.model, key, None)
