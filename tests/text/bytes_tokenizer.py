"""A tokenizer with a token for every byte and an end token, made by the tokenizers library."""

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from framework.text.tokenizer import Tokenizer

END = 256


def _alphabet():
    """The character that byte-level tokenizers write for each byte (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def bytes_tokenizer():
    """Return a Tokenizer whose id of a byte is the byte."""
    backend = Backend(models.BPE(vocab={character: byte for byte, character in _alphabet().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    assert backend.token_to_id("<end>") == END
    return Tokenizer(backend, eos_token="<end>", stop_ids=(END,))


def ids_of(text):
    """Ids of a text, without asking the tokenizer."""
    return list(text.encode())
