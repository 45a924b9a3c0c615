// Damages blobs at random, repairs their checksums and decodes what is accepted. test_codec.py builds this with the
// address and undefined-behaviour sanitizers: any access outside a blob or an output aborts it.
#include <cstdlib>
#include <memory>
#include <random>

#include "../../../../csrc/codec_encode.h"

using namespace armillary::codec;

int main(int, char** arguments) {
  std::mt19937 random(1);
  const auto below = [&](size_t n) { return size_t(random() % n); };
  size_t accepted = 0, refused = 0;
  for (int round = std::atoi(arguments[1]); round; --round) {
    const uint32_t channels = 1 + below(3), height = 1 + below(40), width = 1 + below(40);
    const size_t values = size_t(channels) * height * width;
    std::vector<float> image(values), step(channels, 0.25f);
    std::unique_ptr<bool[]> valid(new bool[values]);
    const float scale = std::pow(10.0f, float(below(9)) - 2.0f);
    std::normal_distribution<float> normal(0.0f, std::min(scale, 1e3f));
    for (size_t i = 0; i < values; ++i) {
      image[i] = std::clamp(normal(random) * (below(200) ? 1 : scale), -5e8f, 5e8f);  // what int32 steps of .25 hold
      valid[i] = below(30);
    }
    const bool plain = below(4) == 0, masked = below(2);
    if (plain)
      for (float& x : image) x = std::fmod(x, 6e4f);
    const Image source{image.data(), channels, height, width, plain ? nullptr : step.data(),
                       masked ? valid.get() : nullptr};
    const std::vector<uint8_t> blob = plain ? encode_float16(source) : encode_bitplane(source);

    for (int damage = 0; damage < 40; ++damage) {
      size_t size = blob.size();
      if (below(4) == 0) size = below(2) ? below(size + 1) : size + below(64);
      std::unique_ptr<uint8_t[]> bytes(new uint8_t[size]);  // exactly as long as the blob, for the sanitizer
      for (size_t i = 0; i < size; ++i) bytes[i] = i < blob.size() ? blob[i] : uint8_t(random());
      const size_t head = kHeader + 4 * size_t(channels);
      const size_t early = std::min(size, head + 64);
      for (size_t flips = below(4); flips && size; --flips)
        bytes[below(below(2) ? early : size)] ^= uint8_t(1u << below(8));
      if (size >= kHeader && below(8)) {
        const uint32_t payload = uint32_t(size - std::min(size, head));
        if (below(2)) std::memcpy(&bytes[16], &payload, 4);
        const uint32_t crc = crc32(&bytes[kCrcFrom], size - kCrcFrom);
        std::memcpy(&bytes[4], &crc, 4);
      }
      Blob found;
      if (!parse(bytes.get(), size, found).empty() || !check(found).empty()) {
        ++refused;
        continue;
      }
      ++accepted;
      const size_t pixels = size_t(found.channels) * found.pixels;
      std::unique_ptr<float[]> out(new float[pixels]);
      std::unique_ptr<bool[]> seen(new bool[pixels]);
      decode(found, out.get(), below(2) ? seen.get() : nullptr);
    }
  }
  std::printf("%zu accepted, %zu refused\n", accepted, refused);
  return accepted > 100 && refused > 100 ? 0 : 1;
}
