"""Batch norm over two real ranks is that of one process with all rows; run as a program, this file is one rank."""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import warm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from train.step import batch_norm
from train.step.batch_norm import GlobalBatchNorm, counting_rows, synchronise_batch_norm

REPOSITORY = Path(__file__).resolve().parents[2]
CHANNELS = 3
RANKS = 2
STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Global batches, the rows that each rank has of them (a rank without any sends a filler), and what is allowed."""

    rows_of_ranks: tuple[int, ...]
    image: tuple[int, ...] = ()
    offset: float = 0.0
    momentum: float | None = 0.3
    tolerance: float = 1e-5
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    activation: bool = False

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """For each step all rows, and the gradients of what batch norm makes of them."""
        generator = torch.Generator().manual_seed(0)
        shape = (2, sum(self.rows_of_ranks), CHANNELS, *self.image)
        pairs = [torch.randn(shape, generator=generator) for _ in range(STEPS)]
        return [(self._as_input(pair[0] * 2 + self.offset), self._as_input(pair[1] + 0.5)) for pair in pairs]

    def _as_input(self, rows: Tensor) -> Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return rows.to(self.dtype, memory_format=layout)

    def shares(self, rank: int) -> list[tuple[Tensor, Tensor]]:
        """A rank's part of the batches; a filler's gradients are not zero here, so that they would be noticed."""
        num_rows, first = self.rows_of_ranks[rank], sum(self.rows_of_ranks[:rank])
        if not num_rows:
            shape = (1, CHANNELS, *self.image)
            return [(torch.zeros(shape, dtype=self.dtype), torch.ones(shape, dtype=self.dtype))] * STEPS
        return [(x[first : first + num_rows], dy[first : first + num_rows]) for x, dy in self.batches()]

    def model(self) -> nn.Sequential:
        torch.manual_seed(1)
        if self.activation:
            from timm.layers import BatchNormAct2d

            norm = BatchNormAct2d(CHANNELS, momentum=self.momentum or 0.1, act_layer=nn.ReLU, inplace=True)
        else:
            norm = (nn.BatchNorm2d if self.image else nn.BatchNorm1d)(CHANNELS, momentum=self.momentum)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.get_buffer("running_mean").add_(0.5)
        return nn.Sequential(norm)


SCENARIOS = {
    "flat": Scenario(rows_of_ranks=(3, 5)),
    "images": Scenario(rows_of_ranks=(3, 5), image=(4, 2)),
    "flat and a filler": Scenario(rows_of_ranks=(8, 0)),
    "images and a filler": Scenario(rows_of_ranks=(0, 8), image=(4, 2)),
    "one row each": Scenario(rows_of_ranks=(1, 1)),
    "one image and a filler": Scenario(rows_of_ranks=(1, 0), image=(4, 2)),
    "far from zero": Scenario(rows_of_ranks=(3, 5), offset=1000.0, tolerance=1e-3),
    "averaged statistics": Scenario(rows_of_ranks=(3, 5), momentum=None),
    "one row": Scenario(rows_of_ranks=(1, 0)),
}
if importlib.util.find_spec("timm"):
    SCENARIOS |= {"timm's with an activation": Scenario(rows_of_ranks=(3, 5), image=(4, 2), activation=True)}
LOW_PRECISION = {
    f"{dtype}, {name}": replace(scenario, dtype=getattr(torch, dtype))
    for dtype in ("bfloat16", "float16")
    for name, scenario in {
        "flat": Scenario(rows_of_ranks=(30, 50)),
        "images": Scenario(rows_of_ranks=(3, 5), image=(4, 2), channels_last=True),
        "images and a filler": Scenario(rows_of_ranks=(0, 8), image=(4, 2)),
        "far from zero": Scenario(rows_of_ranks=(3, 5), offset=30.0),
    }.items()
}


def train_on(model: nn.Module, batches: list[tuple[Tensor, Tensor]], *, num_rows: int | None = None) -> dict[str, Any]:
    """Forward and backward through all batches: outputs, gradients, and the state that is left."""
    outputs, gradients = [], []
    for batch, dy in batches:
        x = batch.clone().requires_grad_()
        with counting_rows(model, num_rows):
            y = model(x)
        y.backward(dy)
        outputs.append(y.detach())
        gradients.append(x.grad)
    weights = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"outputs": outputs, "gradients": gradients, "weights": weights, "state": model.state_dict()}


def run_rank(rank: int, folder: Path) -> None:
    """One rank's way through all scenarios."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    results = {}
    for name, scenario in (SCENARIOS | LOW_PRECISION).items():
        model = scenario.model()
        synchronise_batch_norm(model)
        num_rows = None if scenario.rows_of_ranks[rank] else 0
        results[name] = train_on(model, scenario.shares(rank), num_rows=num_rows)
    torch.save(results, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What each rank got, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, __file__, str(folder)]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests' / 'support'}"}
    processes = [warm.Popen([*command, str(rank)], env=environment) for rank in range(RANKS)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * RANKS
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_are_one_process_with_all_rows(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    scenario = SCENARIOS[name]
    model = scenario.model().train(name != "one row")  # which is normalised by the running statistics
    wanted = train_on(model, scenario.batches())
    found = [rank[name] for rank in ranks]
    close = {"rtol": scenario.tolerance, "atol": scenario.tolerance}
    for part in ("outputs", "gradients"):
        for step in range(STEPS):
            rows = [one[part][step][:n] for one, n in zip(found, scenario.rows_of_ranks, strict=True)]
            torch.testing.assert_close(torch.cat(rows), wanted[part][step], **close)
    sums = {name: sum(one["weights"][name] for one in found) for name in wanted["weights"]}
    torch.testing.assert_close(sums, wanted["weights"], **close)
    for one in found:
        torch.testing.assert_close(dict(one["state"]), dict(wanted["state"]), **close)


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_two_ranks_round_low_precision_once(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    """Against one process in float64, outputs and gradients are off by half a unit in the last place at most."""
    scenario = LOW_PRECISION[name]
    exact = train_on(scenario.model().double(), [(x.double(), dy.double()) for x, dy in scenario.batches()])
    found = [rank[name] for rank in ranks]
    rounding = torch.finfo(scenario.dtype).eps / 2
    for part in ("outputs", "gradients"):
        for step in range(STEPS):
            rows = [one[part][step][:n] for one, n in zip(found, scenario.rows_of_ranks, strict=True)]
            assert {row.dtype for row in rows} == {scenario.dtype}
            torch.testing.assert_close(torch.cat(rows).double(), exact[part][step], rtol=1.01 * rounding, atol=1e-5)
    sums = {name: sum(one["weights"][name].double() for one in found) for name in exact["weights"]}
    torch.testing.assert_close(sums, exact["weights"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if 0 in scenario.rows_of_ranks])
def test_a_filler_gets_finite_values_and_gives_no_gradient(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    filler = ranks[SCENARIOS[name].rows_of_ranks.index(0)][name]
    assert all(output.isfinite().all() for output in filler["outputs"])
    assert not any(gradient.any() for gradient in (*filler["gradients"], *filler["weights"].values()))


# ---- one process --------------------------------------------------------------------------------------------


def as_global(model: nn.Module, *, twin: Callable[[], nn.Module]) -> nn.Module:
    """A second model with the same state, its batch norm made global."""
    other = twin()
    other.load_state_dict(model.state_dict())
    synchronise_batch_norm(other)
    return other


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "name", [name for name in ("flat", "images", "timm's with an activation") if name in SCENARIOS]
)
def test_one_process_is_batch_norm_to_the_bit(name: str, training: bool) -> None:
    scenario = SCENARIOS[name]
    model = scenario.model().train(training)
    other = as_global(model, twin=scenario.model).train(training)
    found, wanted = train_on(other, scenario.batches()), train_on(model, scenario.batches())
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@settings(deadline=None)
@given(
    num_rows=st.integers(2, 6),
    num_fillers=st.integers(1, 3),
    image=st.sampled_from([(), (2, 3)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    channels_last=st.booleans(),
)
def test_rows_that_do_not_count_change_nothing_for_the_others(
    num_rows: int, num_fillers: int, image: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    scenario = Scenario(rows_of_ranks=(num_rows + num_fillers,), image=image)
    layout = torch.channels_last if image and channels_last else torch.contiguous_format
    batches = [(x.to(dtype, memory_format=layout), dy.to(dtype)) for x, dy in scenario.batches()]
    found = train_on(as_global(scenario.model(), twin=scenario.model), batches, num_rows=num_rows)
    wanted = train_on(scenario.model(), [(x[:num_rows], dy[:num_rows]) for x, dy in batches])
    error = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    for step in range(STEPS):
        output, gradient = found["outputs"][step], found["gradients"][step]
        assert output.dtype == dtype
        assert output.is_contiguous(memory_format=layout)
        assert output.isfinite().all()
        assert not gradient[num_rows:].any()
        torch.testing.assert_close(output[:num_rows], wanted["outputs"][step], rtol=error, atol=error)
        torch.testing.assert_close(gradient[:num_rows], wanted["gradients"][step], rtol=error, atol=error)
    torch.testing.assert_close(found["weights"], wanted["weights"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dict(found["state"]), dict(wanted["state"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("image", [(), (2, 2)])
def test_gradients_are_those_of_finite_differences(image: tuple[int, ...]) -> None:
    model = Scenario(rows_of_ranks=(5,), image=image).model().double()
    synchronise_batch_norm(model)
    rows = torch.randn(5, CHANNELS, *image, dtype=torch.float64, requires_grad=True)

    def counted(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with counting_rows(model, 4):
            return torch.func.functional_call(model, {"0.weight": weight, "0.bias": bias}, rows)[:4]

    assert torch.autograd.gradcheck(counted, (rows, *model.parameters()))


@pytest.mark.parametrize("image", [(), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_is_given_what_its_kernel_takes(
    monkeypatch: pytest.MonkeyPatch, image: tuple[int, ...], dtype: torch.dtype
) -> None:
    """The kernel's formula and its demands, read in PyTorch's `Normalization.cuh`, stand in for it on the CPU."""

    def kernel(dy: Tensor, x: Tensor, *others: Tensor) -> Tensor:
        *channels, count = others
        assert dy.dtype == x.dtype == dtype
        assert count.dtype == torch.int32
        assert all(one.dtype == torch.float32 and one.is_contiguous() for one in channels)
        dy, x = dy.double(), x.double()
        mean, scale, weight, sum_dy, sum_dy_xmu = (one.double().view(-1, *[1] * len(image)) for one in channels)
        dx = (dy - sum_dy / count.sum() - (x - mean) * scale**2 * sum_dy_xmu / count.sum()) * scale * weight
        return dx.to(dtype)

    monkeypatch.setattr(torch, "batch_norm_backward_elemt", kernel)
    scenario = Scenario(rows_of_ranks=(6,), image=image, dtype=dtype)
    found = []
    for gradient in (batch_norm._input_gradient, batch_norm._cuda_input_gradient):
        monkeypatch.setattr(batch_norm, "_input_gradient", gradient)
        model = scenario.model()
        synchronise_batch_norm(model)
        found.append(train_on(model, scenario.batches(), num_rows=5)["gradients"])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("num_rows", "num_counting"), [(1, None), (1, 0), (4, 1), (4, 0)])
def test_fewer_than_two_values_use_the_running_statistics_and_leave_them(
    num_rows: int, num_counting: int | None
) -> None:
    scenario = Scenario(rows_of_ranks=(num_rows,))
    model = scenario.model().eval()
    other = as_global(model, twin=scenario.model)
    found = train_on(other, scenario.batches(), num_rows=num_counting)
    wanted = train_on(model, scenario.batches())
    torch.testing.assert_close(found["outputs"], wanted["outputs"])
    assert all(torch.equal(found["state"][name], value) for name, value in wanted["state"].items())


def test_an_image_alone_has_statistics_of_its_own() -> None:
    scenario = Scenario(rows_of_ranks=(1,), image=(4, 2))
    model = scenario.model()
    other = as_global(model, twin=scenario.model)
    torch.testing.assert_close(train_on(other, scenario.batches()), train_on(model, scenario.batches()))


def test_parameters_buffers_names_and_modes_stay() -> None:
    outer = nn.BatchNorm2d(4, eps=0.1, momentum=0.2)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), outer, nn.Sequential(nn.BatchNorm1d(4).eval()))
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    keys = list(model.state_dict())
    synchronise_batch_norm(model)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(model.state_dict()) == keys
    assert before.keys() == after.keys()
    assert all(after[name] is tensor for name, tensor in before.items())
    found = [module for module in model.modules() if isinstance(module, GlobalBatchNorm)]
    assert [(norm.eps, norm.momentum, norm.training) for norm in found] == [(0.1, 0.2, True), (1e-5, 0.1, False)]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False)])
def test_a_batch_norm_without_weights_or_statistics_is_refused(norm: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"the batch norm 1\.0 has no weights or no running statistics"):
        synchronise_batch_norm(nn.Sequential(nn.Linear(4, 4), nn.Sequential(norm)))


def test_a_batch_norm_that_computes_more_is_refused() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return 2 * super().forward(input)

    with pytest.raises(ValueError, match=r"the batch norm 0 is a Doubled, which computes more than one"):
        synchronise_batch_norm(nn.Sequential(Doubled(4)))


if __name__ == "__main__":
    run_rank(int(sys.argv[2]), Path(sys.argv[1]))
