"""When a layer's weights are waited for, and when a chunk's gradient is told of: the first contribution shows it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ps.errors import GradientError
from ps.sharding import Chunk, Plan, make_plan
from ps.types import WireDtype
from workers.engine.flat_model import FlatModel, without_values
from workers.models.groups import parameter_table

WIDTH = 300


class Net(nn.Module):
    """Everything that is special: a tied weight, one that is read elsewhere, one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.read = nn.Linear(WIDTH, WIDTH, bias=False)
        self.sometimes = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embed.weight
        #: The branch that may be left out is taken.
        self.branch = True
        #: `first` is used twice, each time with a backward of its own.
        self.twice = False

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = self._again(self._again(hidden)) if self.twice else self.first(hidden)
        # Never called: its weight is read.
        hidden = nn.functional.linear(hidden.tanh(), self.read.weight)
        if self.branch:
            hidden = hidden + self.sometimes(hidden)
        logits: Tensor = self.head(hidden)
        return logits.float().logsumexp(-1).mean()

    def _again(self, hidden: Tensor) -> Tensor:
        again: Tensor = checkpoint(self.first, hidden, use_reentrant=True)
        return again.tanh()


TOKENS = torch.arange(24).reshape(2, 12)


class Bench:
    """A flat model whose weights have come, and what it asked for and told of."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, *, accumulate_fp16: bool = False, overlap: bool = True
    ) -> None:
        with without_values():
            self.net = Net()
        self.plan: Plan = make_plan(parameter_table(self.net, decay_all=False), 2)
        wire = {torch.float32: WireDtype.FP32, torch.float16: WireDtype.FP16, torch.bfloat16: WireDtype.BF16}[dtype]
        self.flat = FlatModel(
            self.net,
            self.plan,
            torch.device("cpu"),
            dtype,
            wire,
            accumulate_fp16,
            lambda name: torch.zeros(self.net.get_parameter(name).shape),
            overlap=overlap,
        )
        generator = torch.Generator().manual_seed(1)
        values = (torch.randn(self.plan.size, generator=generator) * 0.1).to(dtype)
        self.wire = (values.view(torch.int16).numpy().view(np.uint16) if wire.itemsize == 2 else values.numpy()).copy()
        for chunk in self.plan.chunks:
            self.bring(chunk)
        #: What was waited for, as chunk indices; None: all.
        self.needed: list[list[int] | None] = []
        self.told: list[int] = []
        #: The gradient of each chunk when it was told of.
        self.gradients: dict[int, Tensor] = {}

    def bring(self, chunk: Chunk) -> None:
        self.flat.decode(chunk, self.wire[chunk.start : chunk.stop])

    def need(self, chunks: Sequence[Chunk] | None) -> None:
        self.needed.append(None if chunks is None else [chunk.index for chunk in chunks])

    def tell(self, chunk: Chunk) -> None:
        self.told.append(chunk.index)
        self.gradients[chunk.index] = self.flat.gradients[chunk.start : chunk.stop].clone()

    def chunks_of(self, *names: str) -> list[int]:
        """The chunks that parameters touch."""
        tensors = {index for index, tensor in enumerate(self.plan.table.tensors) if tensor.name in names}
        assert len(tensors) == len(names)
        return [chunk.index for chunk in self.plan.chunks if tensors & {run.tensor for run in chunk.runs}]

    def contribute(self, slots: int = 1) -> None:
        """As `Contributor` does; afterwards what was told of is checked against the end of the backward."""
        self.needed.clear()
        self.told.clear()
        self.flat.clear(divide=True)
        with self.flat.needing(self.need):
            for _ in range(slots - 1):
                self.net(TOKENS).backward()
            loss = self.net(TOKENS)
        with self.flat.finishing(self.tell):
            loss.backward()
        assert len(set(self.told)) == len(self.told)
        for index in self.told:
            chunk = self.plan.chunks[index]
            assert torch.equal(self.gradients[index], self.flat.gradients[chunk.start : chunk.stop]), index
            assert self.gradients[index].any()


def test_the_first_contribution_waits_for_all_weights_and_pushes_at_the_end() -> None:
    bench = Bench()
    bench.contribute(slots=2)
    assert bench.needed == [None]
    assert bench.told == []


def test_a_module_waits_for_its_own_weights_when_it_is_called() -> None:
    bench = Bench()
    bench.contribute()
    bench.contribute(slots=2)
    read = bench.chunks_of("read.weight")
    embed = bench.chunks_of("embed.weight")
    modules = [
        embed,
        bench.chunks_of("first.weight", "first.bias"),
        bench.chunks_of("sometimes.weight", "sometimes.bias"),
        # Tied.
        embed,
    ]
    assert bench.needed == [read, *modules, *modules]


def test_a_module_that_the_first_forward_left_out_is_waited_for_at_the_beginning() -> None:
    bench = Bench()
    bench.net.branch = False
    bench.contribute()
    bench.net.branch = True
    bench.contribute()
    first = bench.needed[0]
    assert first is not None
    assert set(first) >= set(bench.chunks_of("read.weight", "sometimes.weight", "sometimes.bias"))


def test_what_is_learned_is_learned_from_whole_forwards() -> None:
    bench = Bench()
    bench.flat.clear(divide=True)
    with pytest.raises(IndexError), bench.flat.needing(bench.need):
        bench.net(TOKENS + WIDTH)
    # An evaluation may call less, or none of it.
    with bench.flat.needing(bench.need, layerwise=False):
        pass
    assert bench.needed == [None, None]
    bench.contribute()
    assert bench.needed == [None]
    with bench.flat.needing(bench.need, layerwise=False), torch.no_grad():
        bench.net(TOKENS)
    assert bench.needed == [None, None]


def test_nobody_waits_outside_of_a_contribution() -> None:
    bench = Bench()
    bench.contribute()
    bench.needed.clear()
    bench.net(TOKENS)
    assert bench.needed == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_may_come_while_other_layers_are_computed_with(dtype: torch.dtype) -> None:
    """Autograd keeps the weights of the layers that were computed: it is not to take others' for theirs."""
    bench, plain = Bench(dtype), Bench(dtype)
    for one in (bench, plain):
        one.contribute()
    plain.contribute()
    bench.flat.clear(divide=True)
    bench.flat.weights.fill_(7)
    come: set[int] = set()

    def need(chunks: Sequence[Chunk] | None) -> None:
        assert chunks is not None
        for chunk in chunks:
            if chunk.index not in come:
                come.add(chunk.index)
                bench.bring(chunk)

    with bench.flat.needing(need):
        loss = bench.net(TOKENS)
    loss.backward()
    assert come == set(range(len(bench.plan.chunks)))
    assert torch.equal(bench.flat.gradients, plain.flat.gradients)


# -- Chunks of the gradient ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "accumulate_fp16"), [(torch.float32, False), (torch.bfloat16, False), (torch.float16, True)]
)
def test_chunks_are_told_of_as_the_backward_finishes_them(dtype: torch.dtype, accumulate_fp16: bool) -> None:
    """From the end to the beginning; a tied weight is finished when its first use is."""
    bench = Bench(dtype, accumulate_fp16=accumulate_fp16)
    bench.contribute(slots=2)
    for _ in range(2):
        bench.contribute(slots=2)
        assert sorted(bench.told) == list(range(len(bench.plan.chunks)))
        embed = bench.chunks_of("embed.weight")
        assert set(bench.told[-len(embed) :]) == set(embed)
        places = {
            name: max(bench.told.index(index) for index in bench.chunks_of(name))
            for name in ("sometimes.weight", "first.weight", "embed.weight")
        }
        assert list(places.values()) == sorted(places.values())


def test_only_the_last_backward_of_a_contribution_finishes_chunks() -> None:
    bench = Bench()
    bench.contribute()
    bench.flat.clear(divide=True)
    bench.told.clear()
    bench.net(TOKENS).backward()
    assert bench.told == []


def test_a_chunk_with_a_parameter_that_is_not_used_is_left_for_the_end() -> None:
    bench = Bench()
    bench.contribute()
    bench.net.branch = False
    bench.contribute()
    unused = set(bench.chunks_of("sometimes.weight", "sometimes.bias"))
    assert set(bench.told) == set(range(len(bench.plan.chunks))) - unused
    bench.net.branch = True
    bench.contribute()
    assert unused <= set(bench.told)


def test_a_gradient_that_comes_more_than_once_is_left_for_the_end() -> None:
    bench, plain = Bench(), Bench(overlap=False)
    for one in (bench, plain):
        one.net.twice = True
        one.contribute()
        one.contribute()
    repeated = set(bench.chunks_of("first.weight", "first.bias"))
    assert set(bench.told) == set(range(len(bench.plan.chunks))) - repeated
    assert torch.equal(bench.flat.gradients, plain.flat.gradients)
    # Once it is known, it may come once, too.
    bench.net.twice = False
    bench.contribute()
    assert not repeated & set(bench.told)


def test_a_gradient_that_comes_again_when_it_may_have_been_pushed_is_an_error() -> None:
    bench = Bench()
    bench.contribute()
    bench.net.twice = True
    with pytest.raises(GradientError, match=r"the gradient of first\.\w+ came twice.*worker\.overlap=false"):
        bench.contribute()


def test_without_overlap_nothing_is_told_of_and_a_gradient_may_come_as_it_likes() -> None:
    bench, plain = Bench(overlap=False), Bench()
    plain.net.twice = True
    plain.contribute()
    bench.contribute()
    bench.net.twice = True
    bench.contribute()
    assert bench.told == []
    assert torch.equal(bench.flat.gradients, plain.flat.gradients)


def test_what_a_backward_that_failed_has_shown_is_not_learned() -> None:
    bench = Bench()
    bench.flat.clear(divide=True)
    loss = bench.net(TOKENS)
    with pytest.raises(KeyError, match="no more"), bench.flat.finishing(bench.tell):
        raise KeyError("no more")
    del loss
    bench.contribute()
    assert bench.told == []
    bench.contribute()
    assert bench.told != []
