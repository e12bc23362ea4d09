// Runs csrc/winograd.cpp on buffers of exactly their size, under AddressSanitizer
// (test_winograd_host.py).
//
// Arguments: lanes threads is_bf16 n height width c_in c_out. Compares with the direct sum; exit 1
// where it differs.

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "winograd.cpp"

static int32_t one_by_one(int64_t begin, int64_t end, int64_t,
                          void (*work)(int64_t, int64_t, void*), void* context) {
  for (int64_t i = end; i-- > begin;)
    work(i, i + 1, context);  // backwards: no unit may count on the one before it
  return 0;
}

static float widened(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

int main(int, char** argv) {
  const int lanes = std::atoi(argv[1]), is_bf16 = std::atoi(argv[3]);
  const int64_t threads = std::atoi(argv[2]);
  int64_t shape[5];
  for (int i = 0; i < 5; ++i) shape[i] = std::atoi(argv[4 + i]);
  const auto [n, h, w, c_in, c_out] = shape;
  std::mt19937 generator(n * 7919 + h * 31 + w);
  std::normal_distribution<float> normal;
  std::vector<float> x(n * h * w * c_in), weight(c_out * c_in * 9), u(36 * c_in * c_out),
      y(n * h * w * c_out);
  std::vector<uint16_t> x_half(x.size()), y_half(y.size());
  for (size_t i = 0; i < x.size(); ++i) {
    uint32_t bits;
    x[i] = normal(generator);
    __builtin_memcpy(&bits, &x[i], 4);
    x_half[i] = bits >> 16;
    if (is_bf16) x[i] = widened(x_half[i]);
  }
  for (float& v : weight) v = normal(generator) / std::sqrt(9.0f * c_in);
  const int64_t stride[4] = {c_in * 9, 9, 3, 1};
  if (ham_winograd_weights(weight.data(), stride, c_out, c_in, 0, u.data(), lanes, one_by_one))
    return 2;
  const void* from = is_bf16 ? static_cast<const void*>(x_half.data()) : x.data();
  void* to = is_bf16 ? static_cast<void*>(y_half.data()) : y.data();
  if (ham_winograd_convolve(from, u.data(), to, shape, is_bf16, lanes, threads, one_by_one))
    return 3;
  for (int64_t b = 0; b < n; ++b)
    for (int64_t i = 0; i < h; ++i)
      for (int64_t j = 0; j < w; ++j)
        for (int64_t o = 0; o < c_out; ++o) {
          double sum = 0;
          for (int64_t a = 0; a < 3; ++a)
            for (int64_t d = 0; d < 3; ++d)
              if (i + a >= 1 && i + a <= h && j + d >= 1 && j + d <= w)
                for (int64_t c = 0; c < c_in; ++c)
                  sum += double(x[((b * h + i + a - 1) * w + j + d - 1) * c_in + c]) *
                         weight[(o * c_in + c) * 9 + a * 3 + d];
          const int64_t at = ((b * h + i) * w + j) * c_out + o;
          const double found = is_bf16 ? widened(y_half[at]) : y[at];
          if (!(std::fabs(found - sum) <= (is_bf16 ? 0.005 * std::fabs(sum) + 1e-4 : 1e-4))) {
            std::printf("image %ld, row %ld, column %ld, channel %ld: %g instead of %g\n", long(b),
                        long(i), long(j), long(o), found, sum);
            return 1;
          }
        }
}
