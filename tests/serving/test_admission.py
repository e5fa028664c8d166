"""Admission counts images: a bounded queue, turns of keys, and nothing lost when requests leave."""

import pytest
from t2i.pipelines.serving.admission import Admission, Draining, KeyLimit, QueueFull, Ticket
from t2i.pipelines.serving.api.responses import explain_failure
from t2i.pipelines.serving.store import ImageStore


def list_admitted(*tickets: Ticket) -> list[bool]:
    return [ticket.is_admitted for ticket in tickets]


def test_requests_draw_while_there_is_room_and_wait_in_order():
    admission = Admission(max_running=4, max_queued=8)
    first, second, third, fourth = (admission.enter(images) for images in (2, 2, 3, 1))
    # The fourth would fit beside the first two's rest, but the third has its turn before
    assert list_admitted(first, second, third, fourth) == [True, True, False, False]
    assert (admission.running_images, admission.queued_images) == (4, 4)
    admission.leave(first)
    assert list_admitted(third, fourth) == [False, False]
    admission.leave(second)
    assert list_admitted(third, fourth) == [True, True] and admission.queued_images == 0


def test_a_full_queue_refuses_with_the_time_to_wait():
    admission = Admission(max_running=2, max_queued=3)
    admission.enter(2)
    admission.enter(3)
    admission.seconds_per_image = 2.0
    with pytest.raises(QueueFull, match="3 images wait, and the queue takes 3") as caught:
        admission.enter(1)
    assert caught.value.retry_after == 6.0


def test_a_request_larger_than_a_batch_draws_alone():
    admission = Admission(max_running=4, max_queued=16)
    small, large = admission.enter(1), admission.enter(9)
    assert list_admitted(small, large) == [True, False]
    admission.leave(small)
    assert list_admitted(large) == [True]
    assert list_admitted(admission.enter(1)) == [False]


def test_requests_that_are_read_have_their_places():
    admission = Admission(max_running=2, max_queued=1, max_queued_per_key=1)
    full = pytest.raises(QueueFull, match="1 images wait, and the queue takes 1;")
    with admission.expect(1), admission.expect(1), admission.expect(1), full, admission.expect(1):
        pass
    # And have left them
    with admission.expect(9):
        pass
    admission.drain()
    with pytest.raises(Draining), admission.expect(1):
        pass


def test_no_place_is_given_to_a_request_that_is_read_if_none_may_wait():
    admission = Admission(max_running=1, max_queued=0)
    with admission.expect(1), pytest.raises(QueueFull), admission.expect(1):
        pass
    admission.enter(1)
    with pytest.raises(QueueFull), admission.expect(1):
        pass


def test_cancelled_requests_say_nothing_of_the_time_that_an_image_takes():
    admission = Admission(max_running=1, max_queued=1)
    admission.leave(admission.enter(1), has_drawn=False)
    assert admission.seconds_per_image == 1.0
    admission.leave(admission.enter(1))
    assert admission.seconds_per_image < 1.0


def test_a_large_request_lets_as_many_images_of_other_keys_pass_as_it_has():
    admission = Admission(max_running=8, max_queued=10)
    first, large = admission.enter(1, "a"), admission.enter(10, "a")
    # The queue is full, but these need not wait
    passing = [admission.enter(images, "b") for images in (2, 5)]
    assert list_admitted(large, *passing) == [False, True, True]
    admission.leave(passing[1])
    last = admission.enter(3, "c")
    admission.leave(passing[0])
    assert list_admitted(large, last) == [False, True]
    with pytest.raises(QueueFull):
        admission.enter(1, "b")
    admission.leave(first)
    assert list_admitted(large) == [False]
    admission.leave(last)
    assert list_admitted(large) == [True]


def test_keys_take_turns():
    admission = Admission(max_running=1, max_queued=16, max_queued_per_key=3)
    running = admission.enter(1, "a")
    waiting = {name: admission.enter(1, name[0]) for name in ("a1", "a2", "a3", "b1", "c1")}
    with pytest.raises(KeyLimit, match="of this key") as caught:
        admission.enter(1, "a")
    assert explain_failure(caught.value).code == "key_limit"
    order = []
    while waiting:
        admission.leave(running)
        (name,) = [name for name, ticket in waiting.items() if ticket.is_admitted]
        running = waiting.pop(name)
        order.append(name)
    # Whoever asks for much waits behind one request of everybody else
    assert order == ["a1", "b1", "c1", "a2", "a3"]


def test_a_key_that_draws_nothing_has_a_little_more_room():
    admission = Admission(max_running=4, max_queued=8)
    much = [admission.enter(1, "a") for _ in range(6)]
    assert list_admitted(*much) == [True] * 4 + [False] * 2
    little = [admission.enter(images, key) for key, images in (("b", 1), ("b", 1), ("c", 1))]
    assert list_admitted(*little) == [True, False, False] and admission.running_images == 5
    # One has passed the first that waits: now it is that one's turn
    admission.leave(much[0])
    assert list_admitted(*much[4:], *little[1:]) == [False] * 4
    admission.leave(much[1])
    assert list_admitted(*much[4:], *little[1:]) == [True, False, False, True]


def test_positions_count_the_images_before():
    admission = Admission(max_running=1, max_queued=16)
    running = admission.enter(1, "a")
    first, second, other = admission.enter(2, "a"), admission.enter(1, "a"), admission.enter(4, "b")
    admission.seconds_per_image = 2.0
    # The one that draws is half done on average, and rounded up
    assert admission.find_positions() == {first: (0, 2.0), other: (2, 6.0), second: (6, 14.0)}
    assert running not in admission.find_positions()


def test_those_who_leave_the_queue_make_room():
    admission = Admission(max_running=1, max_queued=2)
    admission.enter(1)
    gone, next_one = admission.enter(1), admission.enter(1)
    admission.leave(gone)
    assert admission.queued_images == 1
    admission.leave(gone)  # leaving twice changes nothing
    assert admission.queued_images == 1 and not next_one.is_admitted


def test_memory_admits_no_more_pixels_than_fit():
    admission = Admission(max_running=8, max_queued=8)
    admission.set_room(admission.lanes[0], max_pixels=300)
    first, second = admission.enter(2, pixels=200), admission.enter(2, pixels=200)
    assert list_admitted(first, second) == [True, False]
    # Alone it is admitted, and the pipeline decides
    admission.leave(first)
    large = admission.enter(1, pixels=1000)
    assert list_admitted(second, large) == [True, False]
    admission.leave(second)
    assert list_admitted(large) == [True]


def test_inputs_of_the_requests_that_draw_fit_into_memory_together():
    admission = Admission(max_running=8, max_queued=8, lanes=2, max_input_bytes=100)
    first, second, third, text = (
        admission.enter(1, key, input_bytes=size) for key, size in zip("abcd", (60, 40, 40, 0))
    )
    assert list_admitted(first, second, third, text) == [True, True, False, True]
    admission.leave(second)
    assert list_admitted(third) == [True]


def test_lanes_with_the_fewest_images_take_the_next_request():
    admission = Admission(max_running=4, max_queued=8, lanes=2)
    tickets = [admission.enter(images) for images in (3, 1, 1, 2)]
    lanes = [admission.lanes.index(ticket.lane) for ticket in tickets]
    assert lanes == [0, 1, 1, 1] and admission.max_running == 10
    # No lane has room for two, and then one has
    waiting = admission.enter(2)
    assert not waiting.is_admitted
    admission.leave(tickets[3])
    assert waiting.lane is admission.lanes[1]


def test_a_closed_lane_takes_nothing_and_requests_wait_for_it():
    admission = Admission(max_running=4, max_queued=8)
    admission.set_room(admission.lanes[0], None)
    waiting = admission.enter(1)
    assert not waiting.is_admitted
    admission.set_room(admission.lanes[0], 1e6)
    assert waiting.is_admitted


def test_a_server_that_shuts_down_takes_no_request_and_ends_those_it_has():
    admission = Admission(max_running=1, max_queued=2)
    running, waiting = admission.enter(1), admission.enter(1)
    admission.drain()
    with pytest.raises(Draining):
        admission.enter(1)
    admission.leave(running)
    assert list_admitted(waiting) == [True]


def test_a_signal_may_drain_while_its_thread_admits():
    admission = Admission(max_running=1, max_queued=2)
    with admission.lock:
        admission.drain()
    assert admission.draining


def test_stored_images_end_by_time_and_by_room(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("t2i.pipelines.serving.store.time.monotonic", lambda: now[0])
    store = ImageStore(lifetime=10, max_bytes=10)
    first, second = store.add(b"12345", "image/png"), store.add(b"67890", "image/png")
    assert first != second and store.find(first) == (b"12345", "image/png")
    third = store.add(b"x", "image/webp")
    assert store.find(first) is None and store.find(second) and store.find(third)
    now[0] = 11.0
    assert store.find(third) is None and store.bytes == 0
