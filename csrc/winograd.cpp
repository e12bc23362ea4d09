// 3x3 convolutions of stride 1 and padding 1 on x86-64, by Winograd's F(4x4, 3x3): a quarter of the
// multiplications. A C interface of raw pointers and a parallel_for that the caller hands in
// (torch's, so that there is one pool of threads); no framework header. ham_kernels/ops/winograd.py
// calls it.
//
// The output is cut into 4x4 tiles. A thread transforms the inputs of a block of tiles, multiplies
// 36 small matrices, and transforms back, so that what lies between stays in its cache.

#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace {

constexpr int PANEL = 16;   // output channels that lie together in transformed weights
constexpr long CHUNK = 64;  // products of one sum
// Tiles of a block: with 28 (two strips of the AVX-512 register tile) most of it stays in a core's
// cache. Weights that no cache holds are read once per block, so that there it has more.
constexpr long TILES_PER_BLOCK = 28, TILES_OF_LARGE_WEIGHTS = 112, LARGE_WEIGHTS = 4L << 20;

struct bf16 {
  uint16_t bits;
};

struct Shape {
  long n, height, width, c_in, c_out;  // images are (n, height, width, c), dense

  long tiles_down() const { return (height + 3) / 4; }
  long tiles_across() const { return (width + 3) / 4; }
};

struct Tile {
  long image, top, left;

  Tile(const Shape& s, long tile)
      : image(tile / (s.tiles_down() * s.tiles_across())),
        top(tile / s.tiles_across() % s.tiles_down() * 4),
        left(tile % s.tiles_across() * 4) {}
};

// Blocks of tiles; where there are too few for all threads, each in groups of output panels.
struct Plan {
  long tiles, tiles_per_block, groups, panels_per_group;

  Plan(const Shape& s, long threads) : tiles(s.n * s.tiles_down() * s.tiles_across()) {
    const long panels = s.c_out / PANEL;
    const bool large = 36 * s.c_in * s.c_out > LARGE_WEIGHTS;
    long blocks = ceil_div(tiles, large ? TILES_OF_LARGE_WEIGHTS : TILES_PER_BLOCK);
    if (blocks >= threads) {
      groups = 1;
      blocks = ceil_div(blocks, threads) * threads;
    } else {
      groups = ceil_div(threads, blocks) < panels ? ceil_div(threads, blocks) : panels;
      blocks = ceil_div(threads, groups);
    }
    tiles_per_block = ceil_div(tiles, blocks);
    panels_per_group = ceil_div(panels, groups);
    groups = ceil_div(panels, panels_per_group);
  }

  long units() const { return ceil_div(tiles, tiles_per_block) * groups; }

  static long ceil_div(long a, long b) { return (a + b - 1) / b; }
};

struct Weights {
  const float* first;
  long stride[4], c_out, c_in;

  const float* at(long o, long c, long i, long j) const {
    return first + o * stride[0] + c * stride[1] + i * stride[2] + j * stride[3];
  }

  // Those of the convolution that takes the gradient of the output to that of the input.
  Weights back() const {
    return {at(0, 0, 2, 2), {stride[1], stride[0], -stride[2], -stride[3]}, c_in, c_out};
  }
};

struct Scratch {
  float* floats;

  explicit Scratch(long n)
      : floats(static_cast<float*>(std::aligned_alloc(64, (n + 15) / 16 * 64))) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(floats); }
};

#define HAM_PRAGMA(...) _Pragma(#__VA_ARGS__)
#ifdef __clang__
#define HAM_BEGIN(features) \
  HAM_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define HAM_END HAM_PRAGMA(clang attribute pop)
#else
#define HAM_BEGIN(features) HAM_PRAGMA(GCC push_options) HAM_PRAGMA(GCC target(features))
#define HAM_END HAM_PRAGMA(GCC pop_options)
#endif

HAM_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma")
namespace avx512 {
#define LANES 16
#define ROWS 14  // times two vectors of sums: 28 of 32 registers
#include "winograd.inl"
#undef LANES
#undef ROWS
}  // namespace avx512
HAM_END

HAM_BEGIN("avx2,fma")
namespace avx2 {
#define LANES 8
#define ROWS 6  // times two vectors of sums: 12 of 16 registers
#include "winograd.inl"
#undef LANES
#undef ROWS
}  // namespace avx2
HAM_END

using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain,
                                void (*work)(int64_t begin, int64_t end, void* context),
                                void* context);

// Runs work(begin, end) over [0, count) in parallel. 0: done; 1: no memory; 2: parallel_for failed.
template <class Work>
int in_parallel(ParallelFor parallel_for, long count, const Work& work) {
  struct Context {
    const Work& work;
    std::atomic<bool> done;
  } context{work, {true}};
  const auto call = [](int64_t begin, int64_t end, void* raw) {
    auto& c = *static_cast<Context*>(raw);
    if (!c.work(begin, end)) c.done = false;
  };
  if (parallel_for(0, count, 1, call, &context) != 0) return 2;
  return context.done ? 0 : 1;
}

template <class T>
int convolve(const void* x, const float* u, void* y, const Shape& s, int lanes, long threads,
             ParallelFor parallel_for) {
  const Plan plan(s, threads);
  const T* from = static_cast<const T*>(x);
  T* to = static_cast<T*>(y);
  return in_parallel(parallel_for, plan.units(), [&](long begin, long end) {
    return lanes == 16 ? avx512::convolve(from, u, to, s, plan, begin, end)
                       : avx2::convolve(from, u, to, s, plan, begin, end);
  });
}

}  // namespace

#define HAM_EXPORT extern "C" __attribute__((visibility("default")))

// Floats of the widest vectors that this processor serves: 16, 8, or 0 where it serves none of
// them.
HAM_EXPORT int ham_winograd_lanes() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 16;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 8 : 0;
}

// u (36, c_out / 16, c_in, 16) from w (c_out, c_in, 3, 3) with these strides; back: the u with
// which gradients go from output to input, (36, c_in / 16, c_out, 16). Channels are multiples
// of 16.
HAM_EXPORT int ham_winograd_weights(const float* w, const int64_t* stride, int64_t c_out,
                                    int64_t c_in, int back, float* u, int lanes,
                                    ParallelFor parallel_for) {
  const Weights own{w, {stride[0], stride[1], stride[2], stride[3]}, c_out, c_in};
  const Weights weights = back ? own.back() : own;
  return in_parallel(parallel_for, weights.c_out / PANEL, [&](long begin, long end) {
    if (lanes == 16)
      avx512::transform_panels(weights, u, begin, end);
    else
      avx2::transform_panels(weights, u, begin, end);
    return true;
  });
}

// y (n, height, width, c_out) from x (n, height, width, c_in), both dense fp32, or bf16 if is_bf16.
HAM_EXPORT int ham_winograd_convolve(const void* x, const float* u, void* y, const int64_t* shape,
                                     int is_bf16, int lanes, int64_t threads,
                                     ParallelFor parallel_for) {
  const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4]};
  return is_bf16 ? convolve<bf16>(x, u, y, s, lanes, threads, parallel_for)
                 : convolve<float>(x, u, y, s, lanes, threads, parallel_for);
}
