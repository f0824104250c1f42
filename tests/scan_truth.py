"""The scan in float64 on a GPU, one thread a channel and one token after another: the truth for thousands of cases.

`selective_scan_ref` says the same in PyTorch and is what this kernel is tested against, but takes a dozen launches a
token. This file shares nothing with the kernels that it judges: not their sources, their compiler options or launcher.
"""

import ctypes
import functools

import torch

THREADS = 32
SOURCE = r"""
extern "C" __global__ void scan_truth(
    const double* u, const double* delta, const double* A,
    const double* B, long long B_row, long long B_channel, long long B_state, long long B_token,
    const double* C, long long C_row, long long C_channel, long long C_state, long long C_token,
    const double* D, const double* z, const double* delta_bias, const double* initial, double* y, double* last,
    long long channels, long long dim, long long length, long long states, long long softplus) {
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;  // of the (B, D, ...) tensors
  if (i >= channels) return;
  const long long b = i / dim, d = i % dim;
  double h[256];
  for (long long n = 0; n < states; ++n) h[n] = initial ? initial[i * states + n] : 0.0;
  for (long long t = 0; t < length; ++t) {
    const double x = u[i * length + t];
    double step = delta[i * length + t];
    if (delta_bias) step += delta_bias[d];
    if (softplus) step = fmax(step, 0.0) + log1p(exp(-fabs(step)));
    const double* B_t = B + b * B_row + d * B_channel + t * B_token;
    const double* C_t = C + b * C_row + d * C_channel + t * C_token;
    double sum = 0.0;
    for (long long n = 0; n < states; ++n) {
      h[n] = exp(step * A[d * states + n]) * h[n] + step * x * B_t[n * B_state];
      sum += h[n] * C_t[n * C_state];
    }
    if (D) sum += D[d] * x;
    if (z) sum *= z[i * length + t] / (1.0 + exp(-z[i * length + t]));
    y[i * length + t] = sum;
  }
  for (long long n = 0; n < states; ++n) last[i * states + n] = h[n];
}
"""


def scan_truth(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, *, initial_state=None):
    """y (B, D, L) and the last state (B, D, N) in float64, for CUDA tensors in any dtype and layout."""
    batch, dim, length = u.shape
    states = A.shape[1]
    rows, weights = [_exact(x) for x in (u, delta)], _exact(A)
    more = [_exact(x) for x in (D, z, delta_bias, initial_state)]
    B, C = (_per_channel(_exact(x), batch, dim, length) for x in (B, C))
    y, last = u.new_empty(batch, dim, length, dtype=torch.float64), u.new_empty(batch, dim, states, dtype=torch.float64)
    pointers = [0 if x is None else x.data_ptr() for x in (*more, y, last)]
    arguments = [*(x.data_ptr() for x in rows), weights.data_ptr()]
    for x in (B, C):
        arguments += [x.data_ptr(), *x.stride()]
    _launch(batch * dim, [*arguments, *pointers, batch * dim, dim, length, states, int(delta_softplus)])
    return y, last


def _exact(x):
    return None if x is None else x.double().contiguous()


def _per_channel(x, batch, dim, length):
    """B or C as a view (B, D, N, L)."""
    if x.dim() == 2:
        return x[None, :, :, None].expand(batch, -1, -1, length)
    if x.dim() == 3:
        return x[:, None].expand(-1, dim, -1, -1)
    if x.shape[1] == 1:
        return x.expand(-1, dim, -1, -1)
    return x.repeat_interleave(dim // x.shape[1], dim=1)


@functools.cache
def _function(device):
    from cuda.bindings import driver
    from cuda.core import Program, ProgramOptions

    major, minor = torch.cuda.get_device_capability(device)
    cubin = Program(SOURCE, "c++", ProgramOptions(arch=f"sm_{major}{minor}", std="c++17")).compile("cubin").code
    module = _result(driver.cuModuleLoadData(bytes(cubin)))
    return _result(driver.cuModuleGetFunction(module, b"scan_truth"))


def _launch(channels, arguments):
    """On torch's current stream; every argument is an address or a number of 64 bits."""
    from cuda.bindings import driver

    if channels == 0:
        return
    stream = torch.cuda.current_stream().cuda_stream
    grid, values = -(-channels // THREADS), (tuple(arguments), (ctypes.c_int64,) * len(arguments))
    _result(
        driver.cuLaunchKernel(_function(torch.cuda.current_device()), grid, 1, 1, THREADS, 1, 1, 0, stream, values, 0)
    )


def _result(answer):
    error, *results = answer
    assert int(error) == 0, error
    return results[0] if results else None
