"""The simulated engine's scheduler: steps, prefix cache, preemption, block accounting."""

from __future__ import annotations

import random

import pytest

from cluster.engine.simulated.scheduler import Scheduler, Sequence, Shape
from cluster.engine.simulated.timing import Timing
from cluster.engine.simulated.tokens import TokenSource, continuation
from cluster.prefix import block_hashes

TIMING = Timing(1.0, 0.01, 0.0, 0.1, 0.001, 100, 1000.0, 0.5)
BLOCK = 4


def scheduler(num_blocks: int = 64, max_tokens: int = 16, max_sequences: int = 8) -> Scheduler:
    return Scheduler(Shape(BLOCK, num_blocks, max_tokens, max_sequences), TIMING)


def sequence(name: str, prompt: list[int], output: int, remote: bool = False) -> Sequence:
    names = block_hashes(prompt, BLOCK, "").tolist()
    return Sequence(name, len(prompt), output, names, remote)


def run(engine: Scheduler, limit: int = 1000) -> list[tuple[float, list[str]]]:
    """Steps until nothing is left to compute: (seconds, who got a token)."""
    steps = []
    for _ in range(limit):
        step = engine.begin(1.0)
        if step is None:
            return steps
        sampled = engine.finish(step)
        steps.append((step.seconds, [s.sequence_id for s in sampled]))
        for s in sampled:
            if s.generated >= s.output:
                engine.pool.release(engine.remove(s.sequence_id))
    raise AssertionError("does not end")


def test_a_prompt_is_computed_in_chunks_and_then_decoded() -> None:
    engine = scheduler()
    engine.add(sequence("a", list(range(40)), 3))
    steps = run(engine)
    assert [sampled for _, sampled in steps] == [[], [], ["a"], ["a"], ["a"]]
    assert [seconds for seconds, _ in steps] == pytest.approx(
        [1.16, 1.16, 1.08, 1 + 0.1 + 0.040, 1 + 0.1 + 0.041]
    )
    assert engine.idle and engine.pool.used == 0


def test_a_prefix_is_found_and_only_the_rest_computed() -> None:
    engine = scheduler()
    engine.add(sequence("a", list(range(12)), 1))
    run(engine)
    again = sequence("b", [*range(12), 50, 51], 1)
    engine.add(again)
    seconds, _ = run(engine)[0]
    assert (again.cached, seconds) == (12, pytest.approx(1.02))
    same = sequence("c", list(range(12)), 1)
    engine.add(same)
    run(engine)
    assert same.cached == 8  # the block of the last token is computed again, to have its logits


def test_decodes_go_on_beside_a_long_prompt() -> None:
    engine = scheduler()
    engine.add(sequence("a", [1, 2], 20))
    assert engine.finish(engine.begin(0.0))  # type: ignore[arg-type]
    engine.add(sequence("b", list(range(100, 160)), 1))
    with_b = run(engine)
    first = next(i for i, (_, sampled) in enumerate(with_b) if "b" in sampled)
    assert first == 3 and all("a" in sampled for _, sampled in with_b[:first])


def test_a_handoff_waits_until_it_has_landed_then_goes_on_behind_its_first_token() -> None:
    engine = scheduler()
    remote = sequence("d", list(range(10)), 3, remote=True)
    engine.add(remote)
    assert engine.begin(0.0) is None
    assert engine.reserved == [remote] and len(remote.blocks) == 3
    engine.landed("d")
    assert remote.generated == 1
    steps = run(engine)
    assert [sampled for _, sampled in steps] == [["d"], ["d"]]
    assert [seconds for seconds, _ in steps] == pytest.approx([1.110, 1.111])
    again = sequence("e", list(range(10)), 1)
    engine.add(again)
    run(engine)
    assert again.cached == 8  # what was handed off is found


def test_the_last_to_come_gives_its_blocks_up_and_is_recomputed() -> None:
    engine = scheduler(num_blocks=8, max_tokens=32)
    first, second = sequence("a", [1] * 9, 12), sequence("b", [2] * 9, 12)
    engine.add(first)
    engine.add(second)
    steps = run(engine)
    assert second.preempted and not first.preempted
    assert sum(len(sampled) for _, sampled in steps) == 24
    assert engine.pool.used == 0


def test_blocks_are_never_lost_whatever_happens() -> None:
    rng = random.Random(5)
    engine = scheduler(num_blocks=40, max_tokens=12)
    alive: dict[str, Sequence] = {}
    for i in range(3000):
        if rng.random() < 0.3 and len(alive) < 12:
            prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 30))]
            new = sequence(f"s{i}", prompt, rng.randrange(1, 10), remote=rng.random() < 0.3)
            alive[new.sequence_id] = new
            engine.add(new)
        if alive and rng.random() < 0.1:
            name = rng.choice(list(alive))
            engine.pool.release(engine.remove(name))
            del alive[name]
        step = engine.begin(float(i))
        for reserved in engine.reserved:
            if rng.random() < 0.8:
                engine.landed(reserved.sequence_id)
        engine.reserved.clear()
        for s in engine.finish(step) if step else ():
            if s.generated >= s.output:
                engine.pool.release(engine.remove(s.sequence_id))
                del alive[s.sequence_id]
        held = {block for s in alive.values() for block in s.blocks}
        assert engine.pool.used == len(held)
    for name in list(alive):
        engine.pool.release(engine.remove(name))
    assert engine.pool.used == 0 and engine.idle


def test_tokens_follow_from_those_before_them() -> None:
    answer = continuation([1, 2, 3], 50, seed=7, vocab_size=500)
    assert answer == continuation([1, 2, 3], 50, seed=7, vocab_size=500)
    assert answer[20:] == continuation([1, 2, 3, *answer[:20]], 30, seed=7, vocab_size=500)
    assert len(set(answer)) > 25
    assert TokenSource([1, 2, 4], 7, 500).draw() != answer[0]
