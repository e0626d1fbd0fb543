"""The order of the samples: the generator against its published vectors, permutations and subsets
against chance."""

import itertools
import math

import pytest
import torch
from bounds import chi_square, chi_square_limit

from fastsmooth.data.chunks import Loader
from fastsmooth.data.order import in_order, permutation, philox, philox_rounds, subset
from fastsmooth.data.stream import Stream

ONES = 0xFFFFFFFF
KNOWN = [  # kat_vectors of Random123: counter, key, output of philox4x32-10
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES, ONES, ONES, ONES], [ONES, ONES], [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as Salmon et al. 2011 print it, in integers of any length."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        x, y = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (y >> 32) ^ b ^ k0, y % 2**32, (x >> 32) ^ d ^ k1, x % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [a, b, c, d]


class Indices(Loader):
    """A loader whose samples are their indices, and whose labels say whose random numbers augment
    them."""

    def __init__(self, n: int):
        self.labels = torch.arange(n)

    def reader(self, segments):
        return Reader(segments)


class Reader:
    def __init__(self, segments):
        self.segments, self.index = iter(segments), None

    def begin(self) -> None:
        if self.index is None:
            index, self.epoch, start = next(self.segments)
            self.index = index[start:]

    def take(self, count: int):
        self.begin()
        taken, self.index = self.index[:count], self.index[count:]
        assert len(taken) == count  # the segment holds what is asked of it
        return taken, torch.full((count,), self.epoch)

    def advance(self) -> None:
        self.index = None

    def close(self) -> None:
        pass


def stream(n: int, seed: int = 0, epoch: int = 0, start: int = 0, **more) -> Stream:
    made = Stream(Indices(n), seed, epoch + 1, "digits", **more)
    made.load_state_dict({"seed": seed, "epoch": epoch, "cursor": start, "fingerprint": "digits"})
    return made


def epoch_batches(seed: int, epoch: int, n: int, batch_size: int, start: int = 0, **more):
    """The sample indices of the batches of an epoch, as a Stream serves them."""
    served = stream(n, seed, epoch, start, **more)
    served.batch_size = batch_size
    for index, epochs in served.rest_of_epoch():
        assert (epochs == epoch).all()
        yield index


def order(n: int, batch_size: int, seed: int = 0, epoch: int = 0, **more) -> list[int]:
    batches = list(epoch_batches(seed, epoch, n, batch_size, **more))
    return torch.cat(batches).tolist() if batches else []


def rank_correlations(orders: list[torch.Tensor]) -> torch.Tensor:
    """Spearman's, of the positions that the samples have in each two orders; its deviation is 1 /
    sqrt(n - 1)."""
    return torch.corrcoef(torch.stack(orders).argsort(dim=1).double())


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_words_that_random123_publishes(counter, key, words):
    assert (
        philox_rounds([torch.tensor([word]) for word in counter], key).squeeze(1).tolist() == words
    )


def test_philox_equals_plain_integer_arithmetic_on_many_counters():
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (4, 300), generator=generator)
    for key in ([0, 1], [ONES, 0x80000000], [0x12345678, 0x9ABCDEF0]):
        words = philox_rounds(list(counters), key)
        expected = [philox_in_python(counter, key) for counter in counters.T.tolist()]
        assert words.T.tolist() == expected


def test_philox_words_depend_on_seed_epoch_sample_and_stream_up_to_their_highest_bits():
    index = torch.tensor([0, 5, 2**31, 2**32 - 1, 2**32, 2**40 + 5])
    for seed, epoch, stream in [
        (0, 0, 0),
        (1, 0, 0),
        (2**32, 0, 0),
        (2**63 - 1, 0, 0),
        (0, 1, 0),
        (0, 2**32 - 1, 0),
        (0, 0, 25),
    ]:
        words = philox(seed, epoch, index, stream)
        key = [seed % 2**32, seed // 2**32]
        expected = [
            philox_in_python([i % 2**32, epoch, stream, i // 2**32], key) for i in index.tolist()
        ]
        assert words.T.tolist() == expected
        assert words.min() >= 0 and words.max() < 2**32


@pytest.mark.parametrize("n", [1, 2, 7, 97, 1437])
def test_every_epoch_visits_each_image_once_at_any_batch_size(n):
    for batch_size, epoch in itertools.product((1, 2, 3, 32, n, n + 5), (0, 1, 7)):
        batches = list(epoch_batches(3, epoch, n, batch_size))
        assert sorted(torch.cat(batches).tolist()) == list(range(n))
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (
            math.ceil(n / batch_size) - 1
        )
        assert 1 <= len(batches[-1]) <= batch_size


def test_any_batch_size_gives_the_same_order():
    expected = permutation(5, 2, 1437).tolist()
    for batch_size in (1, 2, 31, 32, 33, 1000, 1437, 5000):
        assert order(1437, batch_size, seed=5, epoch=2) == expected


def test_dropping_the_last_batch_leaves_only_whole_batches_of_the_same_order():
    for n, batch_size in [(97, 10), (97, 97), (100, 10), (5, 7), (7, 2)]:
        kept = order(n, batch_size, drop_last=True)
        assert kept == order(n, batch_size)[: n // batch_size * batch_size]


def test_an_epoch_goes_on_exactly_where_it_stopped():
    whole = [batch.tolist() for batch in epoch_batches(1, 4, 97, 8)]
    for done in range(len(whole) + 1):
        rest = [batch.tolist() for batch in epoch_batches(1, 4, 97, 8, start=8 * done)]
        assert rest == whole[done:]


def test_an_epoch_goes_on_exactly_across_changes_of_the_batch_size():
    whole = permutation(1, 4, 97).tolist()
    seen, sizes = [], itertools.cycle([8, 13, 1, 30])
    while len(seen) < 97:
        seen += next(epoch_batches(1, 4, 97, next(sizes), start=len(seen))).tolist()
    assert seen == whole
    served, seen, sizes = stream(97, 1, 4), [], itertools.cycle([8, 13, 1, 30])
    served.batch_size = wanted = next(sizes)
    for index, _ in served.rest_of_epoch():
        seen += index.tolist()
        assert len(index) == min(wanted, 97 - len(seen) + len(index)) and served.cursor == len(seen)
        served.batch_size = wanted = next(sizes)  # in force at the very next batch
    assert seen == whole and (served.epoch, served.cursor) == (5, 0)


def test_epochs_follow_each_other_each_in_its_own_order():
    served = Stream(Indices(50), 3, 3, "digits", drop_last=True)
    served.batch_size = 8
    for epoch in range(3):
        batches = list(served.rest_of_epoch())
        assert (
            torch.cat([x for x, _ in batches]).tolist() == permutation(3, epoch, 50)[:48].tolist()
        )
        assert torch.cat([y for _, y in batches]).unique().tolist() == [epoch]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7, 97])
def test_ranks_serve_together_what_one_alone_serves(n, drop_last):
    for world, batch_size in itertools.product((2, 3, 4, 8), (1, 2, 5, 32)):
        ranks = [
            list(epoch_batches(1, 0, n, batch_size, rank=r, world=world, drop_last=drop_last))
            for r in range(world)
        ]
        alone = list(epoch_batches(1, 0, n, batch_size, drop_last=drop_last))
        for k, parts in enumerate(zip(*ranks, strict=True)):
            assert sorted(torch.cat(parts).tolist()) == sorted(alone[k].tolist())
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert all(len(batches) == len(alone) for batches in ranks)


def test_the_same_seed_and_epoch_give_the_same_order_again():
    assert order(500, 32, seed=9, epoch=3) == order(500, 7, seed=9, epoch=3)


def test_orders_of_different_epochs_and_seeds_are_uncorrelated():
    n = 2000
    keys = [
        *itertools.product((0, 1, 2, 2**32, 2**32 + 1, 2**62), (0, 1, 2, 199)),
        (1234, 5),
        (1234, 6),
    ]
    orders = [torch.arange(n), *(permutation(seed, epoch, n) for seed, epoch in keys)]
    different = ~torch.eye(len(orders), dtype=torch.bool)
    assert rank_correlations(orders)[different].abs().max() < 5 / math.sqrt(n - 1)
    for a, b in itertools.combinations(orders, 2):
        # images at the same place: Poisson of mean 1, and P(12 or more) < 1e-9
        assert (a == b).sum() < 12


def test_neighbours_in_one_epoch_are_not_neighbours_in_the_next():
    n = 3000
    pairs = [set(itertools.pairwise(permutation(0, epoch, n).tolist())) for epoch in range(5)]
    for a, b in itertools.combinations(pairs, 2):
        assert len(a & b) < 12  # Poisson of mean 1


def test_all_orders_of_four_images_are_equally_frequent():
    draws = 1200
    index = {p: k for k, p in enumerate(itertools.permutations(range(4)))}
    for fixed in ("seed", "epoch"):
        counts = [0] * 24
        for k in range(draws):
            counts[
                index[tuple(permutation(*((7, k) if fixed == "seed" else (k, 7)), 4).tolist())]
            ] += 1
        assert chi_square(counts, draws / 24) < chi_square_limit(23), f"same {fixed}"


def test_every_image_is_equally_frequent_at_every_position():
    n, epochs = 41, 1000
    counts = torch.zeros(n, n)
    for epoch in range(epochs):
        counts[torch.arange(n), permutation(0, epoch, n)] += 1
    # A permutation matrix less its mean has covariance 1 / (n - 1) in each of (n - 1)^2 dimensions.
    statistic = (n - 1) / epochs * (counts - epochs / n).square().sum().item()
    assert statistic < chi_square_limit((n - 1) ** 2)


def test_samples_in_order_are_all_samples_once_by_index():
    for n, batch_size in [(1, 1), (10, 3), (10, 10), (10, 99)]:
        batches = list(in_order(n, batch_size))
        assert torch.cat(batches).tolist() == list(range(n))
        assert max(map(len, batches)) == min(n, batch_size)


def test_a_subset_holds_distinct_images():
    for n, batch_size in [(1, 1), (10, 10), (97, 31), (1437, 1024)]:
        chosen = subset(0, 5, 2, n, batch_size)
        assert chosen.dtype == torch.int64 and len(set(chosen.tolist())) == batch_size
        assert chosen.min() >= 0 and chosen.max() < n


def test_a_subset_is_a_function_of_seed_step_and_draw():
    keys = list(itertools.product((0, 1, 2**32), (0, 1, 10_000), (0, 1, 15)))
    drawn = [frozenset(subset(*key, 1000, 50).tolist()) for key in keys]
    assert drawn == [frozenset(subset(*key, 1000, 50).tolist()) for key in keys]
    assert len(set(drawn)) == len(keys)
    for a, b in itertools.combinations(drawn, 2):
        assert len(a & b) < 16  # 2.5 on average; hypergeometric, and P(16 or more) < 1e-8


def test_a_subset_shares_nothing_with_the_order_of_the_epoch_of_the_same_number():
    for number in range(5):
        first, chosen = (
            set(x.tolist())
            for x in (permutation(0, number, 1000)[:50], subset(0, number, 0, 1000, 50))
        )
        assert len(first & chosen) < 16


def test_all_subsets_of_two_out_of_six_are_equally_frequent():
    draws = 2000
    index = {frozenset(pair): k for k, pair in enumerate(itertools.combinations(range(6), 2))}
    counts = [0] * 15
    for k in range(draws):
        counts[index[frozenset(subset(0, k // 16, k % 16, 6, 2).tolist())]] += 1
    assert chi_square(counts, draws / 15) < chi_square_limit(14)


def test_every_image_is_equally_often_in_a_subset():
    n, size, draws = 50, 15, 1000
    counts = torch.zeros(n)
    for draw in range(draws):
        counts[subset(4, 77, draw, n, size)] += 1
    share = size / n
    # The indicators less their mean have covariance n share (1 - share) / (n - 1) in each of n - 1
    # dimensions.
    statistic = (
        (counts - draws * share).square().sum().item() * (n - 1) / (draws * n * share * (1 - share))
    )
    assert statistic < chi_square_limit(n - 1)
