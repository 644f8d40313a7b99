"""What the tests of the background builder share."""

from __future__ import annotations

import numpy as np
from fake_driver import FakeDriver
from stream_helpers import Request, World

from vllm_magicpig import _C


def sealed(world: World, request: Request) -> list[int]:
    """Segments of a request, per layer."""
    (table,), (length,) = world.batch([request])
    return [len(layer.layer.index.find(table, int(length))) for layer in world.layers]


class Busy:
    """Work for the builder that takes it most of a second, on an idle machine, while a test looks at
    what is queued behind it: segments no larger than any other, so that their turn comes first, with
    offsets of 255 tables by 2**num_bits buckets."""

    num_segments = 160

    def __init__(self, driver: FakeDriver, builder: _C.SegmentBuilder, num_bits: int = 15) -> None:
        self.world = world = World(
            driver,
            builder=builder,
            num_blocks=self.num_segments,
            num_kv_heads=1,
            num_tables=255,
            num_bits=num_bits,
            levels=[32],
        )
        world.set_centers()
        self.layer = world.layers[0]
        self.index = self.layer.layer.index
        self.starts = np.arange(self.num_segments) * 32
        # Whatever lies in the pages is as good as any code: this is about time.
        world.block_tables[0] = np.arange(self.num_segments)
        world.seq_lens[0] = self.num_segments * 32
        world.slots[0] = 0
        self.step = _C.StreamStep(
            world.metadata,
            1,
            1,
            np.zeros(0, np.int32),
            np.zeros(0, np.int64),
            np.zeros(1, np.int32),
            np.zeros(1, np.int64),
            np.ones(1, np.int64),
        )

    def reissue(self) -> None:
        self.layer.layer.pages.note_writes(self.starts)

    def start(self) -> None:
        self.layer.native.launch_stored(self.world.main, self.step)
        self.world.synchronize()
