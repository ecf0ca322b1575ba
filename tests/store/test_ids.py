import time

from expunge.store import ids


def test_ids_sort_in_the_order_they_were_drawn_even_within_a_millisecond():
    drawn = [ids.new_id() for _ in range(5000)]
    assert drawn == sorted(drawn)
    assert len(set(drawn)) == 5000
    assert all(len(i) == 26 and i == i.lower() and ids.is_id(i) for i in drawn)


def test_the_first_ten_characters_are_the_time():
    before = time.time_ns() // 1_000_000
    text = ids.new_id()
    after = time.time_ns() // 1_000_000
    alphabet = "0123456789abcdefghjkmnpqrstvwxyz"
    milliseconds = 0
    for letter in text[:10]:
        milliseconds = milliseconds * 32 + alphabet.index(letter)
    assert before <= milliseconds <= after + 1


def test_ids_go_on_rising_when_the_clock_is_set_back(monkeypatch):
    first = ids.new_id()
    monkeypatch.setattr(ids.time, "time_ns", lambda: 10**18)
    assert ids.new_id() > first


def test_what_is_not_an_id():
    good = ids.new_id()
    wrong = ("", good[:-1], good + "0", good.upper(), "u" * 26, "../" + good[3:], None, 7)
    assert not any(ids.is_id(w) for w in wrong)
