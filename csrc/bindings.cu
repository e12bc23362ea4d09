// The only file that knows torch: checks the tensors, allocates, and hands raw pointers to the
// kernels. Stable LibTorch ABI: built once against any torch >= 2.10, the library loads in every
// later one. The schemas are defined in Python (ham_kernels/ops/_library.py).

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <tuple>

#include "compact.cuh"

// Weak: a CPU build of torch does not have it, and the library must load there too.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace ham_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(int32_t device_index) {
  STD_TORCH_CHECK(
      aoti_torch_get_current_cuda_stream != nullptr,
      "ham_kernels: this torch has no CUDA streams (a CPU build); install a CUDA build of torch");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream) == 0,
                  "ham_kernels: torch reports no current CUDA stream on device ", device_index);
  return static_cast<cudaStream_t>(stream);
}

std::tuple<Tensor, Tensor> compact_cuda(const Tensor& flags) {
  STD_TORCH_CHECK(flags.scalar_type() == ScalarType::Bool, "flags: dtype is ",
                  torch::headeronly::toString(flags.scalar_type()), ", allowed is Bool");
  STD_TORCH_CHECK(flags.dim() == 1, "flags: has ", flags.dim(), " dimensions, allowed is 1");
  STD_TORCH_CHECK(flags.is_contiguous(), "flags: stride is ", flags.stride(0),
                  ", allowed is 1 (call .contiguous())");
  const int64_t n = flags.numel();
  STD_TORCH_CHECK(n <= std::numeric_limits<int32_t>::max(), "flags: has ", n,
                  " elements, allowed are at most 2147483647 (positions are int32)");

  const int32_t device = flags.get_device_index();
  const cudaStream_t stream = current_stream(device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor index = torch::stable::new_empty(flags, {n}, ScalarType::Int);
  Tensor count = torch::stable::new_empty(flags, {1}, ScalarType::Int);
  const cudaError_t error =
      compact(static_cast<const uint8_t*>(flags.const_data_ptr()), static_cast<uint32_t>(n),
              index.mutable_data_ptr<int32_t>(), count.mutable_data_ptr<int32_t>(), stream);
  STD_TORCH_CHECK(error == cudaSuccess, "ham_kernels::compact: the launch failed on device ",
                  device, ": ", cudaGetErrorString(error));
  return {index, count};
}

}  // namespace
}  // namespace ham_kernels

STABLE_TORCH_LIBRARY_IMPL(ham_kernels, CUDA, m) {
  m.impl("compact", TORCH_BOX(&ham_kernels::compact_cuda));
}
