"""Stop strings, whatever tokens they fall into."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class StopStrings:
    """Finds the token that completes a stop string in a response's decoded text.

    Args:
        tokenizer: of transformers. strings: the stops, not empty.
    """

    def __init__(self, tokenizer, strings: Sequence[str]):
        self.tokenizer, self.strings, self.known = tokenizer, strings, len(tokenizer)
        # A token that is not skipped is at least one byte of text; one more on the left, because some tokenizers drop
        # the space in front of the first.
        self.reach = 1 + max(len(s.encode()) for s in strings)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.skipped = np.array(sorted(special | {*tokenizer.all_special_ids}), dtype=np.int64)

    def completed(self, responses: list[np.ndarray]) -> np.ndarray:
        """Whether each response (R,) now contains a stop string, given that it did not without its last token."""
        # Rows of the vocabulary that the tokenizer does not know decode to nothing.
        told = (r[~np.isin(r, self.skipped) & (r < self.known)] for r in responses)
        tails = [r[-self.reach :] for r in told]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        return np.array([any(stop in text for stop in self.strings) for text in texts], dtype=bool)
