"""A process that serves does not go through what it has loaded again and again."""

from __future__ import annotations

import gc

from cluster.obs.garbage import keep_what_is_loaded


class Node:
    """Something that only the collector can free, once it refers to itself."""

    me: Node


def test_what_is_loaded_is_left_alone_and_later_garbage_is_not() -> None:
    keep_what_is_loaded()
    try:
        assert gc.get_freeze_count() > 1000
        assert len(gc.get_objects()) < 1000
        node = Node()
        node.me = node
        del node
        assert gc.collect() >= 1
    finally:
        gc.unfreeze()
