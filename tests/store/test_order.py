"""The order of rows: every one once in an epoch, from any place on the same, and from everywhere at once."""

from itertools import islice

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mechjax.store.order import Order

SIZES = {"rows": st.integers(1, 60), "chunk": st.integers(1, 9), "chunks": st.integers(1, 9),
         "seed": st.none() | st.tuples(st.integers(0, 2**32 - 1))}  # fmt: skip
FEW = settings(max_examples=100, deadline=None)


def given_rows(order, start=0, epochs=2):
    windows = list(order.windows(start, epochs))
    return np.concatenate(windows) if windows else np.zeros(0, int)


@FEW
@given(how=st.fixed_dictionaries(SIZES))
def test_order__of_an_epoch__has_each_row_once(how):
    order = Order(**how)
    rows = given_rows(order, epochs=2)
    for epoch in np.split(rows, 2):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(order.rows))
    if order.seed is None:
        np.testing.assert_array_equal(rows, np.tile(np.arange(order.rows), 2))


@FEW
@given(how=st.fixed_dictionaries(SIZES), data=st.data())
def test_order__from_any_place__goes_on_as_it_would(how, data):
    order = Order(**how)
    start = data.draw(st.integers(0, 2 * order.rows))
    np.testing.assert_array_equal(given_rows(order, start), given_rows(order)[start:])


@FEW
@given(how=st.fixed_dictionaries(SIZES))
def test_order__holds_no_more_than_a_window(how):
    order = Order(**how)
    assert max(map(len, order.windows(0, 2))) <= order.chunk * order.chunks


def test_order__of_another_key_epoch_or_window__is_another():
    order = Order(4096, 8, 64, (7,))
    first, second = np.split(given_rows(order), 2)
    other = given_rows(Order(4096, 8, 64, (8,)), epochs=1)
    assert (first != second).mean() > 0.99
    assert (first != other).mean() > 0.99
    a, b = (np.argsort(window) for window in islice(order.windows(0, 1), 2))
    assert (a != b).mean() > 0.9


def unevenness(order, batch=400):
    """How unevenly a batch is drawn from eighths of the rows: chi-squared over 7 degrees of freedom, its mean."""
    rows = given_rows(order, epochs=1)
    batches = rows[: len(rows) // batch * batch].reshape(-1, batch)
    counts = np.stack([np.bincount(b * 8 // order.rows, minlength=8) for b in batches])
    return (np.square(counts - batch / 8) / (batch / 8)).sum(1).mean()


def test_order__of_a_batch__is_from_everywhere():
    """Rows drawn from all give 7, and from windows of chunks that are, 7 (1 - w)(1 + batch chunk / window) = 11.3.

    Here w = 1/10 is the part of the rows that a window holds. Windows of rows that lie together give 7 * 400.
    """
    assert abs(unevenness(Order(40_000, 8, 500, (1,))) - 11.3) < 1.5
    assert unevenness(Order(40_000, 4000, 1, (1,))) > 2000
    rows = given_rows(Order(40_000, 8, 500, (1,)), epochs=1)
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.02


def test_order__has_the_bits_that_it_always_had():
    """A place that was saved means the same under any numpy: these numbers never change."""
    np.testing.assert_array_equal(given_rows(Order(12, 2, 3, (0, 7)), epochs=1), _ALWAYS)


_ALWAYS = [6, 7, 2, 1, 0, 3, 5, 4, 8, 11, 9, 10]
