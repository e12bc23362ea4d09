// Stable stream compaction of n flags in one launch: raw pointers and a stream, no framework.
//
//   index[0 .. count)   positions of the true flags, increasing
//   index[count .. n)   positions of the false flags, decreasing
//   count[0]            number of true flags
//
// Let t(p) be the number of true flags before position p. A true flag goes to index[t(p)], a false
// one to index[n - 1 - (p - t(p))]. Filling the false positions from the back needs no total.
// Up to 16 384 flags are the work of one CTA. Of more, each CTA counts the flags before its own by
// itself: they are few bytes, in L2 after the first read, and neither a workspace nor atomics nor
// an order of the CTAs is needed.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ham_kernels {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kMaxThreads = 1024;
constexpr uint32_t kFlagsPerThread = 16;  // one 16-byte load
constexpr uint32_t kTile = kMaxThreads * kFlagsPerThread;
constexpr uint32_t kAllLanes = 0xffffffffu;
#ifdef HAM_COMPACT_BLOCKS  // of tests
constexpr uint32_t kMaxBlocks = HAM_COMPACT_BLOCKS;
#else
constexpr uint32_t kMaxBlocks = 64;  // each reads up to n bytes more
#endif

__device__ inline uint32_t inclusive_scan(uint32_t value) {
  const uint32_t lane = threadIdx.x % kWarp;
#pragma unroll
  for (uint32_t distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

struct BlockSum {
  uint32_t before;  // over the warps before the calling one
  uint32_t total;   // over all warps of the block
};

// Sums one value per warp over the block. `slots` is shared memory, one word per warp; a caller
// that loops alternates between two of them, and then the one barrier in here is enough.
__device__ inline BlockSum sum_over_warps(uint32_t warp_value, uint32_t* slots) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t warp = threadIdx.x / kWarp;
  if (lane == 0) slots[warp] = warp_value;
  __syncthreads();
  const uint32_t scan = inclusive_scan(lane < blockDim.x / kWarp ? slots[lane] : 0);
  return {__shfl_sync(kAllLanes, scan, warp) - warp_value, __shfl_sync(kAllLanes, scan, kWarp - 1)};
}

// Writes the index entries of 32 consecutive positions, one per lane. Bit i of `row` is the flag of
// position row_start + i; `trues` is t(row_start). The lanes' true entries are adjacent in memory
// and so are the false ones: the writes coalesce without a detour through shared memory.
__device__ inline void scatter_row(uint32_t row, uint32_t row_start, uint32_t trues, uint32_t n,
                                   int32_t* __restrict__ index) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t position = row_start + lane;
  const uint32_t before = trues + __popc(row & ((1u << lane) - 1));
  const bool flag = (row >> lane) & 1;
  if (position < n) index[flag ? before : n - 1 - (position - before)] = position;
}

// n <= 1024: one flag per thread, just enough warps.
__global__ void __launch_bounds__(kMaxThreads)
    compact_small(const uint8_t* __restrict__ flags, uint32_t n, int32_t* __restrict__ index,
                  int32_t* __restrict__ count) {
  __shared__ uint32_t slots[kWarp];
  const uint32_t thread = threadIdx.x;
  const uint32_t row = __ballot_sync(kAllLanes, thread < n && flags[thread] != 0);
  const BlockSum trues = sum_over_warps(__popc(row), slots);
  scatter_row(row, thread / kWarp * kWarp, trues.before, n, index);
  if (thread == 0) count[0] = trues.total;
}

// flags[start .. start + 16), zeros from n on. Byte loads serve the ragged end and a base pointer
// that is not 16-byte aligned (a slice of a larger tensor).
__device__ inline uint4 load_flags(const uint8_t* __restrict__ flags, uint32_t start, uint32_t n) {
  const bool aligned = reinterpret_cast<uintptr_t>(flags) % sizeof(uint4) == 0;
  if (aligned && start + kFlagsPerThread <= n) {
    return *reinterpret_cast<const uint4*>(flags + start);
  }
  uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll
  for (uint32_t i = 0; i < kFlagsPerThread; ++i) {
    if (start + i < n) word[i / 4] |= static_cast<uint32_t>(flags[start + i]) << (i % 4 * 8);
  }
  return {word[0], word[1], word[2], word[3]};
}

// Bit i is set where byte i is nonzero.
__device__ inline uint32_t true_bits(uint4 bytes) {
  const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
  uint32_t bits = 0;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t word = words[i];
    const uint32_t ones = ((((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word) >> 7) & 0x01010101u;
    bits |= ((ones * 0x01020408u) >> 24) << (4 * i);  // gathers bits 0, 8, 16, 24
  }
  return bits;
}

// t(end) for the whole block, where `end` is a multiple of kTile and at most n.
__device__ inline uint32_t trues_before(const uint8_t* __restrict__ flags, uint32_t end, uint32_t n,
                                        uint32_t* slots) {
  uint32_t trues = 0;
  for (uint32_t start = threadIdx.x * kFlagsPerThread; start < end; start += kTile) {
    trues += __popc(true_bits(load_flags(flags, start, n)));
  }
  const uint32_t of_warp = __shfl_sync(kAllLanes, inclusive_scan(trues), kWarp - 1);
  return sum_over_warps(of_warp, slots).total;
}

// Any n < 2^31: `share` tiles of 16 384 flags for each block, with a running count of the true
// ones. A warp owns 512 consecutive flags, 16 per lane, and writes them as 16 rows of 32.
__global__ void __launch_bounds__(kMaxThreads)
    compact_tiles(const uint8_t* __restrict__ flags, uint32_t n, uint32_t share,
                  int32_t* __restrict__ index, int32_t* __restrict__ count) {
  __shared__ uint32_t slots[2][kWarp];
  const uint32_t thread_start = threadIdx.x * kFlagsPerThread;
  const uint32_t warp_start = threadIdx.x / kWarp * (kWarp * kFlagsPerThread);
  const uint32_t first = blockIdx.x * share * kTile;
  const uint32_t end = n - first <= share * kTile ? n : first + share * kTile;
  uint4 next = load_flags(flags, first + thread_start, n);
  uint32_t trues = first == 0 ? 0 : trues_before(flags, first, n, slots[1]);  // before the tile
  for (uint32_t tile = first; tile < end; tile += kTile) {
    const uint32_t bits = true_bits(next);
    next = load_flags(flags, tile + kTile + thread_start, n);  // in flight during this tile

    const uint32_t warp_trues = __shfl_sync(kAllLanes, inclusive_scan(__popc(bits)), kWarp - 1);
    const BlockSum tile_trues = sum_over_warps(warp_trues, slots[(tile - first) / kTile % 2]);

    // Lanes 2r and 2r + 1 hold the two halves of row r.
    const uint32_t pair = bits | __shfl_down_sync(kAllLanes, bits, 1) << kFlagsPerThread;
    uint32_t row_trues = trues + tile_trues.before;
#pragma unroll
    for (uint32_t r = 0; r < kFlagsPerThread; ++r) {
      const uint32_t row = __shfl_sync(kAllLanes, pair, 2 * r);
      scatter_row(row, tile + warp_start + r * kWarp, row_trues, n, index);
      row_trues += __popc(row);
    }
    trues += tile_trues.total;
  }
  if (end == n && threadIdx.x == 0) count[0] = trues;
}

// flags: n bytes, a nonzero one is true; index: n words; count: one word; all on the stream's
// device. n < 2^31, and 0 is fine. Does not wait; returns the error of the launch.
inline cudaError_t compact(const uint8_t* flags, uint32_t n, int32_t* index, int32_t* count,
                           cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.stream = stream;
  if (n <= kMaxThreads) {
    const uint32_t warps = n == 0 ? 1 : (n + kWarp - 1) / kWarp;
    config.gridDim = dim3(1);
    config.blockDim = dim3(warps * kWarp);
    return cudaLaunchKernelEx(&config, compact_small, flags, n, index, count);
  }
  const uint32_t tiles = (n + kTile - 1) / kTile;
  const uint32_t share = (tiles + kMaxBlocks - 1) / kMaxBlocks;
  config.gridDim = dim3((tiles + share - 1) / share);
  config.blockDim = dim3(kMaxThreads);
  return cudaLaunchKernelEx(&config, compact_tiles, flags, n, share, index, count);
}

}  // namespace ham_kernels
