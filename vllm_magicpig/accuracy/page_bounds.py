"""Quest's summary of a page: the elementwise minimum and maximum of its keys."""

from __future__ import annotations

import torch


class PageBounds:
    """Of the full pages from position `start` on, made once each; the keys only grow."""

    def __init__(self, page_tokens: int, start: int) -> None:
        self._page_tokens, self._start = page_tokens, start
        self._lows: list[torch.Tensor] = []
        self._highs: list[torch.Tensor] = []
        self._num_pages = 0

    def extend(self, keys: torch.Tensor) -> None:
        """keys: float [num_kv_heads, n, head_size], all of the sequence."""
        full = max(keys.shape[1] - self._start, 0) // self._page_tokens
        if full <= self._num_pages:
            return
        first = self._start + self._num_pages * self._page_tokens
        fresh = keys[:, first : self._start + full * self._page_tokens]
        pages = fresh.reshape(len(keys), -1, self._page_tokens, keys.shape[2])
        self._lows.append(pages.amin(2))
        self._highs.append(pages.amax(2))
        self._num_pages = full

    def logit_bounds(
        self, queries: torch.Tensor, keys: torch.Tensor, middle: range
    ) -> torch.Tensor:
        """Upper bounds of q.k over each page of the middle, which starts at `start`.

        queries: float [num_q_heads, head_size]. Returns float [num_q_heads, pages]; the last page may
        be cut short by the window, and then counts the tokens before it alone.
        """
        full = len(middle) // self._page_tokens
        rest = keys[:, middle.start + full * self._page_tokens : middle.stop]
        nothing = keys[:, :0]
        low = torch.cat([nothing, *self._lows], 1)[:, :full]
        high = torch.cat([nothing, *self._highs], 1)[:, :full]
        if rest.shape[1]:
            low = torch.cat([low, rest.amin(1, keepdim=True)], 1)
            high = torch.cat([high, rest.amax(1, keepdim=True)], 1)
        grouped = queries.reshape(len(keys), -1, queries.shape[1])
        above = torch.bmm(grouped.clamp(min=0), high.transpose(1, 2))
        below = torch.bmm(grouped.clamp(max=0), low.transpose(1, 2))
        return (above + below).flatten(0, 1)
