"""Products on weights as they are stored, and squared gradients from thin factors, against float64 and autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from streammerge.fisher import linear
from streammerge.fisher.linear import Factors, LinearFunctions, MixedSequencesError, product, product_back
from streammerge.workers import Workers

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles, the last of them smaller."""
    monkeypatch.setattr(linear, "_TILE", 50)
    monkeypatch.setattr(linear, "_SQUARES", {"cpu": (4, 5)})


@pytest.fixture(params=[True, False], ids=["units", "no units"])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """A processor with matrix units for bfloat16, and one without: this one can play both."""
    monkeypatch.setattr(linear, "_has_bfloat16_units", lambda: request.param)
    return request.param


# ---- Products -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pieces", "units")
@pytest.mark.parametrize("values", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7, 11), (1, 1, 1, 1), (2, 9, 13, 64)])
def test_products_against_float64(
    one: Workers, values: torch.dtype, stored: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    """With one rounding at the end: a sum in the narrow dtype would be off by more."""
    sequences, tokens, rows, columns = shape
    x, g = normal(sequences, tokens, columns, dtype=values), normal(sequences, tokens, rows, seed=1, dtype=values)
    weight, bias = normal(rows, columns, seed=2, dtype=stored), normal(rows, seed=3, dtype=values)
    cases = [
        (product(x, weight, None, one), x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T),
        (product(x, weight, bias, one), x.double() @ weight.double().T + bias.double(), None),
        (product_back(g, weight, one), g.double() @ weight.double(), g.double().abs() @ weight.double().abs()),
    ]
    for found, expected, size in cases:
        assert found.dtype == values and found.shape == expected.shape
        size = cases[0][2] + bias.double().abs() if size is None else size
        accumulated = 1e-14 if values == torch.float64 else 4e-6
        assert ((found.double() - expected).abs() <= expected.abs() * EPS[values] + size * accumulated).all()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("count", [2, 3, 5])
def test_any_number_of_workers_gives_the_same_bits(one: Workers, count: int) -> None:
    x, g, weight = normal(19, 33), normal(19, 27, seed=1), normal(27, 33, seed=2, dtype=torch.bfloat16)
    factors = Factors(0, 27, 33, [(normal(4, 6, 27), normal(4, 6, 33, seed=1))])
    with Workers(count) as workers:
        assert torch.equal(product(x, weight, None, workers), product(x, weight, None, one))
        assert torch.equal(product_back(g, weight, workers), product_back(g, weight, one))
        found = [torch.empty(0)] * 27

        def some(row: int) -> None:
            found[row] = factors.mean_squares(range(row, row + 1), 4, workers).clone()

        workers.run(some, range(27))
    expected = [factors.mean_squares(range(row, row + 1), 4, one).clone() for row in range(27)]
    assert torch.equal(torch.cat(found), torch.cat(expected))


def test_an_empty_input_gives_an_empty_product(one: Workers) -> None:
    """As an expert that no token chose."""
    assert product(normal(0, 8), normal(5, 8, dtype=torch.bfloat16), None, one).shape == (0, 5)


# ---- Mean squares ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pieces")
def test_mean_squares_are_those_of_autograd(one: Workers) -> None:
    """Gradients of five sequences, in groups of three and two, of a loss with their own weights per token."""
    weight = normal(9, 13).requires_grad_()
    inputs, outputs = normal(5, 7, 13, seed=1), normal(5, 7, 9, seed=2)
    expected = torch.zeros(9, 13, dtype=torch.float64)
    for x, g in zip(inputs, outputs, strict=True):
        (gradient,) = torch.autograd.grad((functional.linear(x, weight) * g).sum(), weight)
        expected += gradient.double() ** 2 / 5
    groups = [(outputs[:3], inputs[:3]), (outputs[3:], inputs[3:])]
    factors = Factors(0, 9, 13, groups)
    pieces = [factors.mean_squares(range(at, min(at + 4, 9)), 5, one).clone() for at in range(0, 9, 4)]
    torch.testing.assert_close(torch.cat(pieces).double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitudes_are_those_of_autograd(one: Workers, dtype: torch.dtype) -> None:
    """|weight * gradient|, summed; the gradient by itself in every sequence, the weight as it is stored."""
    weight = normal(9, 13, dtype=dtype)
    inputs, outputs = normal(5, 7, 13, seed=1), normal(5, 7, 9, seed=2)
    expected = 0.0
    for x, g in zip(inputs, outputs, strict=True):
        live = weight.double().requires_grad_()
        (gradient,) = torch.autograd.grad((functional.linear(x.double(), live) * g.double()).sum(), live)
        expected += (live * gradient).abs().sum().item()
    factors = Factors(0, 9, 13, [(outputs[:3], inputs[:3]), (outputs[3:], inputs[3:])])
    pieces = [range(at, min(at + 4, 9)) for at in range(0, 9, 4)]
    found = [factors.magnitude(rows, weight[rows.start : rows.stop], one) for rows in pieces]
    assert sum(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_factors_are_squared_in_float32_or_wider(dtype: torch.dtype, wide: torch.dtype) -> None:
    factors = Factors(3, 2, 2, [(normal(1, 2, 2, dtype=dtype), normal(1, 2, 2, dtype=dtype))]).widened()
    assert {side.dtype for group in factors.groups for side in group} == {wide} and factors.start == 3


# ---- What a linear function leaves ----------------------------------------------------------------------------------


class Net(nn.Module):
    """A linear layer with a bias, a stack of two experts, a weight used twice, and one that is nobody's business."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)
        self.experts = nn.Parameter(torch.randn(3, 6, 6))
        self.twice = nn.Parameter(torch.randn(6, 6))
        self.unknown = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(x))
        x = functional.linear(x, self.experts[0]) + functional.linear(input=x, weight=self.experts[2])
        x = functional.linear(torch.tanh(functional.linear(x, self.twice)), self.twice)
        return functional.linear(x, self.unknown)


def known(net: Net) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in net.named_parameters() if name != "unknown"}


@pytest.mark.parametrize("together", [1, 2, 4])
def test_linear_functions_leave_the_factors_of_their_gradients(one: Workers, together: int) -> None:
    net, inputs = Net(), normal(4, 5, 6, seed=1)
    expected = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in net.named_parameters()}
    at_inputs = []
    for x in inputs:
        net.zero_grad()
        x = x[None].clone().requires_grad_()
        (net(x) ** 2).sum().backward()
        at_inputs.append(x.grad)
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None
            expected[name] += parameter.grad.double() ** 2 / 4

    net.requires_grad_(False)
    functions = LinearFunctions(known(net), one)
    for x, gradient in zip(inputs.split(together), torch.cat(at_inputs).split(together), strict=True):
        x = x.clone().requires_grad_()
        with functions.group(*x.shape[:2]):
            (net(x) ** 2).sum().backward()
        torch.testing.assert_close(x.grad, gradient, rtol=1e-4, atol=1e-4)

    assert set(functions.factors) == {"layer.weight", "experts", "twice"}
    assert {factors.start for factors in functions.factors["experts"]} == {0, 72}, "the second expert is not used"
    for name, of_weight in functions.factors.items():
        for factors in of_weight:
            assert (factors.rows, factors.columns) == (6, 6) and len(factors.groups) == 4 // together
            found = factors.mean_squares(range(6), 4, one).clone()
            wanted = expected[name].view(-1)[factors.start : factors.start + 36].view(6, 6)
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


def test_no_weight_gets_a_gradient_and_a_bias_does_if_asked(one: Workers) -> None:
    net, x = Net(), normal(1, 5, 6)
    (net(x) ** 2).sum().backward()
    assert net.layer.bias.grad is not None
    expected = net.layer.bias.grad.clone()
    net.zero_grad()
    with LinearFunctions(known(net), one).group(1, 5):
        (net(x) ** 2).sum().backward()
    torch.testing.assert_close(net.layer.bias.grad, expected, rtol=1e-4, atol=1e-4)
    assert net.layer.weight.grad is net.experts.grad is net.twice.grad is None
    assert net.unknown.grad is not None, "an ordinary linear function"


def test_a_forward_without_gradients_leaves_nothing(one: Workers) -> None:
    net = Net().requires_grad_(False)
    functions = LinearFunctions(known(net), one)
    with torch.no_grad(), functions.group(1, 5):
        found = net(normal(1, 5, 6))
    assert not functions.factors
    torch.testing.assert_close(found, net(normal(1, 5, 6)))


def test_an_expert_that_no_token_chose_leaves_nothing_that_counts(one: Workers) -> None:
    weight = normal(4, 6)
    functions = LinearFunctions({"w": weight}, one)
    x = normal(1, 5, 6).requires_grad_()
    with functions.group(1, 5):
        empty = functional.linear(x[0, :0], weight)
        (functional.linear(x, weight).sum() + empty.sum()).backward()
    (factors,) = functions.factors["w"]
    wanted = x.detach()[0].sum(0).square().expand(4, 6)
    torch.testing.assert_close(factors.mean_squares(range(4), 1, one), wanted)


def test_mixed_sequences_are_noticed_before_anything_is_computed(one: Workers) -> None:
    net = Net().requires_grad_(False)
    functions = LinearFunctions(known(net), one)
    with pytest.raises(MixedSequencesError), functions.group(2, 5):
        net(normal(7, 6))
    with functions.group(1, 5):
        net(normal(3, 6))  # of one sequence, any tokens will do
    with functions.group(2, 5):
        net(normal(10, 6))  # flattened, but in order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", [torch.matmul, lambda a, b: a @ b, Tensor.matmul, torch.bmm])
def test_products_in_half_precision_are_made_in_float32(
    one: Workers, units: bool, dtype: torch.dtype, call: Callable[..., Tensor]
) -> None:
    """Of attention; one rounding, where the processor has no units for the dtype."""
    left, right = normal(3, 5, 40, dtype=dtype), normal(3, 40, 7, seed=1, dtype=dtype)
    multiplied: list[torch.dtype] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "mm" in str(func):
                multiplied.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Watch(), LinearFunctions({}, one).group(1, 1):
        found = call(left, right)
        call(left.float(), right.float())
    detour = dtype == torch.float16 or not units
    assert multiplied == [torch.float32 if detour else dtype, torch.float32] and found.dtype == dtype
    assert not detour or torch.equal(found, (left.float() @ right.float()).to(dtype))


def test_whether_there_are_units_is_what_the_processor_says() -> None:
    linear._has_bfloat16_units.cache_clear()
    with open("/proc/cpuinfo") as file:
        assert linear._has_bfloat16_units() is not {"amx_bf16", "avx512_bf16"}.isdisjoint(file.read().split())
