"""The emulated thread model itself: exchanges, barriers, types, and that it reports what hardware would not forgive."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.emulator.emulate import EmulatorError, Order, compile_kernels

LAUNCHERS = r"""
using namespace kernels;

void sums(const float* x, float* y) {
  __shared__ float scratch[REDUCTION_SCRATCH<1>];
  float value[1] = {x[blockIdx.x * blockDim.x + threadIdx.x]};
  row_reduce<Sum>(value, scratch);
  y[blockIdx.x * blockDim.x + threadIdx.x] = value[0];
}

void reversed(const float* x, float* y) {
  DYNAMIC_SHARED(float, shared);
  shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

extern "C" void block_sums(const float* x, float* y, int64_t blocks, int64_t threads) {
  emulator::launch(dim3(blocks), dim3(threads), 0, [=] { sums(x, y); });
}
extern "C" void reverse(const float* x, float* y, int64_t threads, int64_t bytes) {
  emulator::launch(dim3(1), dim3(threads), bytes, [=] { reversed(x, y); });
}
extern "C" void shuffles(const int* x, int* y) {
  emulator::launch(dim3(1), dim3(32), 0, [=] {
    const int lane = threadIdx.x, value = x[lane];
    y[lane] = __shfl_xor_sync(ALL_LANES, value, 5);
    y[32 + lane] = __shfl_up_sync(ALL_LANES, value, 3);
    y[64 + lane] = __shfl_down_sync(ALL_LANES, value, 7, 16);
    y[96 + lane] = __shfl_sync(ALL_LANES, value, 9);
    y[128 + lane] = int(__ballot_sync(ALL_LANES, value % 3 == 0));
    if (lane < 8) y[160 + lane] = __shfl_xor_sync(0xffu, value, 1);
  });
}
extern "C" void counts(int* y) {
  emulator::launch(dim3(3), dim3(50), 0, [=] { atomicAdd(y, 1); atomicMax(y + 1, int(threadIdx.x)); });
}
extern "C" void foreign_lane(int* y) {
  emulator::launch(dim3(1), dim3(32), 0, [=] { if (threadIdx.x < 8) y[threadIdx.x] = __shfl_sync(0xffu, 1, 20); });
}
extern "C" void copy_vectors(const bfloat16* x, bfloat16* y) {
  emulator::launch(dim3(1), dim3(2), 0, [=] { store(y + 8 * threadIdx.x, load<8>(x + 8 * threadIdx.x)); });
}
extern "C" void round_bfloat16(const float* x, bfloat16* y, float* z, int64_t size) {
  for (int64_t i = 0; i < size; ++i) y[i] = round_to<bfloat16>(x[i]), z[i] = to_float(y[i]);
}
extern "C" void round_float16(const float* x, float16* y, float* z, int64_t size) {
  for (int64_t i = 0; i < size; ++i) y[i] = round_to<float16>(x[i]), z[i] = to_float(y[i]);
}
"""


@pytest.fixture(scope="module")
def run():
    return compile_kernels(LAUNCHERS)


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_block_reduction(run, order: Order, threads: int) -> None:
    x = torch.randn(3, threads)
    y = torch.full_like(x, torch.nan)
    run("block_sums", x, y, 3, threads, order=order)
    torch.testing.assert_close(y, x.sum(1, keepdim=True).expand_as(y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", Order)
def test_a_barrier_orders_shared_memory(run, order: Order) -> None:
    x, y = torch.randn(256), torch.full((256,), torch.nan)
    run("reverse", x, y, 256, 1024, order=order)
    assert y.equal(x.flip(0))


def test_a_missing_barrier_is_seen() -> None:
    mutant = compile_kernels(LAUNCHERS.replace("__syncthreads();", "", 1))
    x, y = torch.randn(256), torch.full((256,), torch.nan)
    mutant("reverse", x, y, 256, 1024)
    assert not y.equal(x.flip(0))


def test_shuffles(run) -> None:
    x, y = torch.randint(100, (32,), dtype=torch.int32), torch.full((192,), -1, dtype=torch.int32)
    run("shuffles", x, y)
    lane = torch.arange(32)
    assert y[:32].equal(x[lane ^ 5])
    assert y[32:64].equal(x[torch.where(lane < 3, lane, lane - 3)])
    assert y[64:96].equal(x[torch.where(lane % 16 + 7 < 16, lane + 7, lane)])
    assert y[96:128].equal(x[9].expand(32))
    bits = sum(1 << index for index in range(32) if x[index] % 3 == 0)
    assert set((y[128:160].long() % 2**32).tolist()) == {bits}
    assert y[160:168].equal(x[lane[:8] ^ 1])
    assert (y[168:] == -1).all()


def test_atomics(run) -> None:
    y = torch.zeros(2, dtype=torch.int32)
    run("counts", y)
    assert y.tolist() == [150, 49]


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "round_bfloat16"), (torch.float16, "round_float16")])
def test_rounding_equals_torch(run, dtype: torch.dtype, name: str) -> None:
    """All values of the type, the points halfway between them, and random ones."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    positive = every[every.isfinite() & (every >= 0)].sort().values
    ties = (positive[1:].double() + positive[:-1].double()).div(2).float()
    x = torch.cat(
        [every, ties, -ties, torch.randn(10000) * torch.randn(10000).mul(20).exp(), torch.tensor([65519.99, 65520.0])]
    )
    y, z = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    run(name, x, y, z, x.numel())
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(z, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_mistakes_are_reported(run) -> None:
    memory = torch.zeros(64, dtype=torch.bfloat16)
    run("copy_vectors", memory[:16], memory[32:48])
    with pytest.raises(EmulatorError, match="16 bytes at an address"):
        run("copy_vectors", memory[1:17], memory[32:48])
    with pytest.raises(EmulatorError, match="argument 1 of copy_vectors is written outside"):
        run("copy_vectors", memory[:16], memory[32:40])
    with pytest.raises(EmulatorError, match="lane 20, which does not take part"):
        run("foreign_lane", torch.zeros(8, dtype=torch.int32))
    with pytest.raises(EmulatorError, match="1040 threads"):
        run("block_sums", torch.zeros(2000), torch.zeros(2000), 1, 1040)
    with pytest.raises(EmulatorError, match="dynamic shared memory"):
        run("reverse", torch.zeros(32), torch.zeros(32), 32, 1 << 20)


def test_threads_that_wait_for_ever_are_reported() -> None:
    text = (
        LAUNCHERS
        + r"""
    extern "C" void hang() {
      emulator::launch(dim3(1), dim3(64), 0, [=] { if (threadIdx.x < 40) __syncthreads(); else __syncwarp(); });
    }
    """
    )
    with pytest.raises(EmulatorError, match="never come"):
        compile_kernels(text)("hang")
