// Runs ham_kernels::compact on the host for a batch of cases.
//
// stdin, per case: uint32 n, uint32 offset, n flag bytes. The flags are put `offset` bytes after a
// 16-byte boundary.
// stdout, per case: int32 error, int32 count[3], int32 index[n + 2 * kGuard]. The kernel gets the
// middle one of the counts and the middle n of the indices; everything starts as kPoison.

#include <cstdio>
#include <vector>

#include "compact.cuh"

constexpr uint32_t kGuard = 64;
constexpr int32_t kPoison = -0x55555555;

struct alignas(16) Chunk {
  // Not zero: a flag that is read beyond the end counts as true.
  uint8_t bytes[16] = {255, 255, 255, 255, 255, 255, 255, 255,
                       255, 255, 255, 255, 255, 255, 255, 255};
};

template <typename T>
void write(const std::vector<T>& values) {
  fwrite(values.data(), sizeof(T), values.size(), stdout);
}

int main() {
  uint32_t header[2];
  while (fread(header, sizeof(uint32_t), 2, stdin) == 2) {
    const auto [n, offset] = header;
    std::vector<Chunk> buffer((offset + n) / sizeof(Chunk) + 2);
    uint8_t* flags = buffer[0].bytes + offset;
    if (fread(flags, 1, n, stdin) != n) return 1;

    std::vector<int32_t> index(n + 2 * kGuard, kPoison);
    std::vector<int32_t> count(3, kPoison);
    const cudaError_t error =
        ham_kernels::compact(flags, n, index.data() + kGuard, &count[1], nullptr);
    write(std::vector<int32_t>{error});
    write(count);
    write(index);
  }
  return 0;
}
