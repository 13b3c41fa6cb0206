"""Small models for engine tests: one that really reads its paged cache, one that recites."""

import torch

from framework.engine.cache import KVCache

VOCAB, HEADS, DIM, LAYERS = 97, 2, 8, 2


class AttentionModel:
    """Two layers of causal attention. fp64, so that rounding decides nothing."""

    def __init__(self, seed=0):
        make = torch.Generator().manual_seed(seed)

        def matrix(*shape):
            return torch.randn(*shape, dtype=torch.float64, generator=make)

        width = HEADS * DIM
        self.embedding = matrix(VOCAB, width)
        self.places = matrix(4096, width)
        self.layers = [[matrix(width, width) / width**0.5 for _ in range(4)] for _ in range(LAYERS)]
        self.head = matrix(width, VOCAB)
        self.batches = []

    def cache(self, pages):
        cache = KVCache(LAYERS, pages, HEADS, (DIM, DIM), torch.float64, "cpu")
        for keys, values in cache.layers:
            # whoever reads a row that nobody wrote shall see it
            keys.fill_(float("nan"))
            values.fill_(float("nan"))
        return cache

    def __call__(self, batch, cache):
        """Logits of the wanted rows; every sequence's keys and values are fetched page by page."""
        self.batches.append(batch)
        x = self.embedding[batch.token_ids] + self.places[batch.positions]
        for (q, k, v, o), (keys, values) in zip(self.layers, cache, strict=True):
            # slot by slot, as the engine names them
            for slot, key, value in zip(batch.slots.tolist(), x @ k, x @ v, strict=True):
                keys[slot // 128, slot % 128] = key.view(HEADS, DIM)
                values[slot // 128, slot % 128] = value.view(HEADS, DIM)
            row, mixed = 0, []
            lengths = zip(batch.query_lengths, batch.context_lengths, strict=True)
            for b, (length, context) in enumerate(lengths):
                pages = batch.block_table[b].tolist()
                past_keys = torch.cat([keys[page] for page in pages])[:context]
                past_values = torch.cat([values[page] for page in pages])[:context]
                mixed.append(_attend((x @ q)[row : row + length], past_keys, past_values))
                row += length
            x = x + torch.cat(mixed) @ o
        return (x[batch.logit_rows] @ self.head).float()

    def dense(self, ids):
        """Logits [T, vocab] of a whole text at once: no cache, no pages, no batch."""
        x = self.embedding[torch.tensor(ids)] + self.places[: len(ids)]
        for q, k, v, o in self.layers:
            keys, values = ((x @ m).view(len(ids), HEADS, DIM) for m in (k, v))
            x = x + _attend(x @ q, keys, values) @ o
        return (x @ self.head).float()

    def greedy(self, prompt, count):
        """The next `count` tokens, each by a fresh dense pass."""
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.dense(ids)[-1].argmax()))
        return ids[len(prompt) :]


def _attend(queries, keys, values):
    """Causal attention of the last n tokens [n, H * D] over all L of them [L, H, D]."""
    n, length = len(queries), len(keys)
    scores = torch.einsum("nhd,lhd->hnl", queries.view(n, HEADS, DIM), keys)
    later = torch.ones(n, length, dtype=torch.bool).triu(length - n + 1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    return torch.einsum("hnl,lhd->nhd", weights, values).reshape(n, -1)


class Recitation:
    """Says the given tokens one after the other, whatever it is asked; the prompt has `start` tokens."""

    def __init__(self, token_ids, start, vocab=512):
        self.token_ids, self.start, self.vocab = token_ids, start, vocab

    def cache(self, pages=8):
        return KVCache(1, pages, 1, (8, 8), torch.float32, "cpu")

    def __call__(self, batch, cache):
        logits = torch.zeros(len(batch.logit_rows), self.vocab)
        for row, place in enumerate(batch.positions[batch.logit_rows].tolist()):
            logits[row, self.token_ids[min(place + 1 - self.start, len(self.token_ids) - 1)]] = 5.0
        return logits
