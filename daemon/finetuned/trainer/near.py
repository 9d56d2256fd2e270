"""Rows that share most of their token sequences, by MinHash and locality-sensitive hashing.

Source: Broder, On the resemblance and containment of documents, 1997; Leskovec et al., Mining of Massive Datasets, 3.4.
The signatures are rensa's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

ALIKE = 0.8  # share of shingles, estimated
MOST_ROWS = 100_000  # looked at, so that memory stays bounded: 136 bytes a row
_SHINGLE = 5  # tokens
_SHORTEST = 20  # tokens; below, a changed word leaves too little to compare
_PERMUTATIONS, _BANDS = 64, 8  # two rows that share 80% meet in a band with a probability of 77%
_SEED = 20250
_PRIME = np.uint64(0x9E3779B97F4A7C15)


class NearDuplicates:
    """Gathers signatures of rows, and tells at the end which are like an earlier one."""

    def __init__(self) -> None:
        # Half of each hash: two that differ look alike once in 65,536 times, which is less than estimating errs.
        self._signatures = np.empty((MOST_ROWS, _PERMUTATIONS), np.uint16)
        self._rows = np.empty(MOST_ROWS, np.int64)
        self.seen = 0

    def see(self, tokens: NDArray[np.int32], lengths: NDArray[np.int64], numbers: NDArray[np.int64]) -> None:
        """Take rows of `lengths` tokens each, end to end in `tokens`, with their numbers."""
        wanted = np.flatnonzero(lengths >= _SHORTEST)[: MOST_ROWS - self.seen]
        if not len(wanted):
            return
        ends = np.cumsum(lengths)
        shingles = _shingles(tokens)
        parts = [shingles[ends[row] - lengths[row] : ends[row] - _SHINGLE + 1] for row in wanted]
        bounds = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(parts), bounds, _PERMUTATIONS, _SEED)
        places = slice(self.seen, self.seen + len(wanted))
        self._signatures[places] = np.array(matrix.to_rows(), np.uint32)  # cut to their lower halves
        self._rows[places] = numbers[wanted]
        self.seen = places.stop

    def found(self) -> NDArray[np.int64]:
        """Give the numbers of rows that are like one before them, in order."""
        signatures, rows = self._signatures[: self.seen], self._rows[: self.seen]
        alike = np.zeros(len(rows), bool)
        wide = _PERMUTATIONS // _BANDS
        for band in range(_BANDS):
            part = np.ascontiguousarray(signatures[:, band * wide : (band + 1) * wide])
            _, first, group = np.unique(part.view(f"V{2 * wide}").ravel(), return_index=True, return_inverse=True)
            partner = first[group]
            later = np.flatnonzero((partner < np.arange(len(rows))) & ~alike)
            same = (signatures[later] == signatures[partner[later]]).mean(axis=1)
            alike[later[same >= ALIKE]] = True
        return np.sort(rows[alike])


def _shingles(tokens: NDArray[np.int32]) -> NDArray[np.uint64]:
    """Hash every run of tokens of a shingle's length; those that span two rows are not used."""
    wide = tokens.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(max(0, len(wide) - _SHINGLE + 1), np.uint64)
    for place in range(_SHINGLE):
        hashes = (hashes ^ wide[place : place + len(hashes)]) * _PRIME
        hashes ^= hashes >> np.uint64(29)
    return hashes
