// Enough of CUDA to run a kernel on the host, block by block: one std::thread per CUDA thread. The
// tests put this folder before the toolkit's, so csrc compiles unchanged and its real kernel bodies
// run. Every exchange within a warp is a barrier of its 32 lanes: a kernel in which not all of them
// take part hangs (the test has a time limit). -fsanitize=thread reports a missing __syncthreads;
// the barriers are pthread's because it understands these exactly.

#pragma once

#include <pthread.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __shared__ static  // one block at a time, so one copy is the block's

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct dim3 {
  uint32_t x, y, z;
  constexpr dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace host_cuda {

class Barrier {
 public:
  explicit Barrier(uint32_t threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  Barrier barrier{32};
  uint32_t lane_value[2][32] = {};
};

inline std::unique_ptr<Barrier> block_barrier;
inline std::vector<std::unique_ptr<Warp>> warps;
inline thread_local uint32_t exchanges = 0;

}  // namespace host_cuda

inline thread_local dim3 threadIdx;
inline dim3 blockDim, blockIdx;

inline void __syncthreads() { host_cuda::block_barrier->wait(); }

inline uint32_t __popc(uint32_t value) { return std::popcount(value); }

namespace host_cuda {

// Publishes `value` to the warp and returns all 32 values. Two buffers in turn: a lane can be at
// most one exchange ahead of the others, so nobody overwrites what a slower lane still reads.
inline const uint32_t* exchange(uint32_t mask, uint32_t value) {
  if (mask != 0xffffffffu) std::abort();  // partial warps are not modelled
  Warp& warp = *warps[threadIdx.x / 32];
  uint32_t* buffer = warp.lane_value[exchanges++ % 2];
  buffer[threadIdx.x % 32] = value;
  warp.barrier.wait();
  return buffer;
}

}  // namespace host_cuda

inline uint32_t __shfl_sync(uint32_t mask, uint32_t value, uint32_t lane) {
  return host_cuda::exchange(mask, value)[lane % 32];
}

inline uint32_t __shfl_up_sync(uint32_t mask, uint32_t value, uint32_t distance) {
  const uint32_t* values = host_cuda::exchange(mask, value);
  const uint32_t lane = threadIdx.x % 32;
  return lane >= distance ? values[lane - distance] : value;
}

inline uint32_t __shfl_down_sync(uint32_t mask, uint32_t value, uint32_t distance) {
  const uint32_t* values = host_cuda::exchange(mask, value);
  const uint32_t lane = threadIdx.x % 32;
  return lane + distance < 32 ? values[lane + distance] : value;
}

inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
  const uint32_t* values = host_cuda::exchange(mask, predicate);
  uint32_t bits = 0;
  for (uint32_t lane = 0; lane < 32; ++lane) bits |= values[lane] << lane;
  return bits;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const uint32_t threads = config->blockDim.x;
  if (config->gridDim.x == 0 || threads == 0 || threads > 1024 || threads % 32 != 0) {
    return cudaErrorInvalidConfiguration;
  }
  blockDim = config->blockDim;
  for (uint32_t b = config->gridDim.x; b-- > 0;) {  // the last first: no block may count on others
    blockIdx = dim3(b);
    host_cuda::block_barrier = std::make_unique<host_cuda::Barrier>(threads);
    host_cuda::warps.clear();
    for (uint32_t w = 0; w < threads / 32; ++w) {
      host_cuda::warps.push_back(std::make_unique<host_cuda::Warp>());
    }
    std::vector<std::thread> block;
    for (uint32_t t = 0; t < threads; ++t) {
      block.emplace_back([=] {
        threadIdx = dim3(t);
        kernel(arguments...);
      });
    }
    for (std::thread& thread : block) thread.join();
  }
  return cudaSuccess;
}
