// CUB's stream compaction as bench_kernels.py times it: positions of the true flags, and how many.
// Not part of the package; built by cub.py. temp == nullptr asks for the size of the workspace.

#include <thrust/iterator/counting_iterator.h>

#include <cstdint>
#include <cub/device/device_select.cuh>

// flags: n bytes; index: room for n words; count: one word; all on the stream's device.
extern "C" int cub_select(void* temp, size_t* temp_bytes, const uint8_t* flags, int32_t* index,
                          int32_t* count, int32_t n, void* stream) {
  const thrust::counting_iterator<int32_t> positions(0);
  return cub::DeviceSelect::Flagged(temp, *temp_bytes, positions, flags, index, count, n,
                                    static_cast<cudaStream_t>(stream));
}
