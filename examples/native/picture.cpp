#include "picture.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <memory>
#include <utility>

#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_JPEG
#define STBI_ONLY_PNG
#define STBI_ONLY_BMP
#define STBI_ONLY_GIF
#define STBI_MAX_DIMENSIONS 65535
#include <stb/stb_image.h>

#include "failure.h"

namespace {

constexpr size_t kMostBytes = size_t{64} << 20, kMostPixels = size_t{64} << 20;

std::string read_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw Failure(kPicture, "'" + path + "' cannot be opened; check the path");
  const auto size = static_cast<int64_t>(file.tellg());
  if (size < 0 || size > static_cast<int64_t>(kMostBytes))
    throw Failure(kPicture, "'" + path + "' is no file of at most 64 MiB; make it smaller");
  std::string data(size, '\0');
  file.seekg(0);
  if (!file.read(data.data(), size)) throw Failure(kPicture, "'" + path + "' cannot be read");
  return data;
}

// ---- orientation: cameras store how the picture is to be turned in the EXIF part of a JPEG --------

unsigned read_number(const std::string& data, size_t at, int bytes, bool big_endian) {
  unsigned found = 0;
  for (int i = 0; i < bytes; ++i) {
    const unsigned byte = at + i < data.size() ? static_cast<uint8_t>(data[at + i]) : 0;
    found |= byte << 8 * (big_endian ? bytes - 1 - i : i);
  }
  return found;
}

// data: from "Exif" on. The orientation 1 to 8; 1, upright, where there is none.
int orientation_of_exif(const std::string& data) {
  constexpr unsigned kOrientation = 0x0112;
  const bool big = data.compare(6, 2, "MM") == 0;
  const size_t entries = 6 + read_number(data, 10, 4, big);
  const unsigned count = read_number(data, entries, 2, big);
  for (unsigned i = 0; i < count; ++i) {
    const size_t entry = entries + 2 + 12 * i;
    if (read_number(data, entry, 2, big) != kOrientation) continue;
    const unsigned value = read_number(data, entry + 8, 2, big);
    return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
  }
  return 1;
}

int orientation_of_jpeg(const std::string& data) {
  size_t at = 2;
  while (at + 4 < data.size() && static_cast<uint8_t>(data[at]) == 0xFF) {
    const unsigned marker = read_number(data, at + 1, 1, true);
    const unsigned length = read_number(data, at + 2, 2, true);
    if (marker == 0xDA) break;  // the picture itself begins
    if (marker == 0xE1 && length > 16 && data.compare(at + 4, 6, std::string("Exif\0\0", 6)) == 0)
      return orientation_of_exif(data.substr(at + 4, length - 2));
    at += 2 + length;
  }
  return 1;
}

Picture turned(const Picture& in, int orientation) {
  if (orientation == 1) return in;
  const bool swaps = orientation >= 5;
  const int height = swaps ? in.width : in.height, width = swaps ? in.height : in.width;
  Picture out{height, width, std::vector<uint8_t>(in.pixels.size())};
  // which of the eight: is the row, is the column counted from the far end?
  const bool far_row = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  const bool far_column =
      orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      int row = swaps ? x : y, column = swaps ? y : x;
      if (far_row) row = in.height - 1 - row;
      if (far_column) column = in.width - 1 - column;
      const size_t from = (static_cast<size_t>(row) * in.width + column) * 3;
      std::memcpy(&out.pixels[(static_cast<size_t>(y) * width + x) * 3], &in.pixels[from], 3);
    }
  }
  return out;
}

// One colour of a pixel over white, in the integers that Pillow computes with.
uint8_t over_white(unsigned colour, unsigned alpha) {
  const unsigned sum = colour * alpha * 128 + 255 * (255 - alpha) * 128 + (0x80 << 7);
  return ((sum >> 8) + sum) >> 8 >> 7;
}

// ---- resizing -------------------------------------------------------------------------------------

constexpr int kPrecision = 22;  // bits of a weight behind the point

struct Weights {  // for each place of the output: which places of the input it is made of
  std::vector<int> first;
  std::vector<std::vector<int>> values;
};

Weights bilinear_weights(int in_size, int out_size) {
  const double scale = static_cast<double>(in_size) / out_size;
  const double support = std::max(scale, 1.0), inverse = 1.0 / support;
  Weights found;
  for (int place = 0; place < out_size; ++place) {
    const double centre = (place + 0.5) * scale;
    const int first = std::max(static_cast<int>(centre - support + 0.5), 0);
    const int end = std::min(static_cast<int>(centre + support + 0.5), in_size);
    std::vector<double> weights;
    double total = 0;
    for (int x = 0; x < end - first; ++x) {
      const double distance = std::fabs((x + first - centre + 0.5) * inverse);
      weights.push_back(distance < 1.0 ? 1.0 - distance : 0.0);
      total += weights.back();
    }
    std::vector<int> fixed;
    for (double weight : weights) {
      if (total != 0.0) weight /= total;
      fixed.push_back(static_cast<int>(0.5 + weight * (1 << kPrecision)));
    }
    found.first.push_back(first);
    found.values.push_back(std::move(fixed));
  }
  return found;
}

// Weighted sum of `values` samples that lie `step` bytes apart, rounded to 8 bits.
uint8_t weigh(const uint8_t* sample, size_t step, const std::vector<int>& values) {
  int sum = 1 << (kPrecision - 1);
  for (int weight : values) {
    sum += *sample * weight;
    sample += step;
  }
  return static_cast<uint8_t>(std::clamp(sum >> kPrecision, 0, 255));
}

Picture resize_rows(const Picture& in, int width) {
  const Weights weights = bilinear_weights(in.width, width);
  Picture out{in.height, width, std::vector<uint8_t>(size_t{3} * in.height * width)};
  uint8_t* target = out.pixels.data();
  for (int y = 0; y < in.height; ++y) {
    const uint8_t* row = &in.pixels[size_t{3} * y * in.width];
    for (int x = 0; x < width; ++x)
      for (int channel = 0; channel < 3; ++channel)
        *target++ = weigh(row + 3 * weights.first[x] + channel, 3, weights.values[x]);
  }
  return out;
}

Picture resize_columns(const Picture& in, int height) {
  const Weights weights = bilinear_weights(in.height, height);
  const size_t row_bytes = size_t{3} * in.width;
  Picture out{height, in.width, std::vector<uint8_t>(row_bytes * height)};
  uint8_t* target = out.pixels.data();
  for (int y = 0; y < height; ++y) {
    const uint8_t* row = &in.pixels[row_bytes * weights.first[y]];
    for (size_t x = 0; x < row_bytes; ++x) *target++ = weigh(row + x, row_bytes, weights.values[y]);
  }
  return out;
}

// ---- the canvas -----------------------------------------------------------------------------------

struct Layout {
  int tiles_h, tiles_w, aspect_ratio_id, height, width;  // the last two: of the resized picture
};

Layout choose_layout(int height, int width, int tile_size, int max_num_tiles) {
  std::vector<std::pair<int, int>> grids;
  for (int h = 1; h <= max_num_tiles; ++h)
    for (int w = 1; w * h <= max_num_tiles; ++w) grids.emplace_back(h, w);
  std::vector<double> scales;
  double least_enlarging = INFINITY, most = 0;
  for (const auto& [h, w] : grids) {
    scales.push_back(std::min(static_cast<double>(h * tile_size) / height,
                              static_cast<double>(w * tile_size) / width));
    if (scales.back() >= 1) least_enlarging = std::min(least_enlarging, scales.back());
    most = std::max(most, scales.back());
  }
  const double scale = std::isinf(least_enlarging) ? most : least_enlarging;
  int best = -1;
  for (int i = 0; i < static_cast<int>(grids.size()); ++i) {
    const auto area = [&](int k) { return grids[k].first * grids[k].second; };
    if (scales[i] == scale && (best < 0 || area(i) < area(best))) best = i;
  }
  const auto [tiles_h, tiles_w] = grids[best];
  const int target_h = std::min(std::max(height, tile_size), tiles_h * tile_size);
  const int target_w = std::min(std::max(width, tile_size), tiles_w * tile_size);
  const double scale_h = static_cast<double>(target_h) / height;
  const double scale_w = static_cast<double>(target_w) / width;
  Layout found{tiles_h, tiles_w, best + 1, target_h, target_w};
  const auto shrunk = [](int length, double by, int target) {
    return std::min(std::max(static_cast<int>(std::floor(length * by)), 1), target);
  };
  if (scale_w < scale_h)
    found.height = shrunk(height, scale_w, target_h);
  else
    found.width = shrunk(width, scale_h, target_w);
  return found;
}

}  // namespace

Picture read_picture(const std::string& path, bool alpha_over_white) {
  const std::string data = read_bytes(path);
  const auto* bytes = reinterpret_cast<const stbi_uc*>(data.data());
  const int size = static_cast<int>(data.size());
  int width = 0, height = 0, channels = 0;
  if (!stbi_info_from_memory(bytes, size, &width, &height, &channels))
    throw Failure(kPicture, "'" + path + "' is no JPEG, PNG, BMP or GIF picture; save it as PNG");
  if (static_cast<size_t>(width) * height > kMostPixels)
    throw Failure(kPicture, "'" + path + "' has more than 67,108,864 pixels; make it smaller");
  const std::unique_ptr<stbi_uc, void (*)(void*)> pixels(
      stbi_load_from_memory(bytes, size, &width, &height, &channels, 4), stbi_image_free);
  if (!pixels)
    throw Failure(kPicture, "'" + path + "' is damaged: " + stbi_failure_reason());
  Picture found{height, width, std::vector<uint8_t>(size_t{3} * height * width)};
  for (size_t i = 0; i < static_cast<size_t>(height) * width; ++i) {
    const stbi_uc* pixel = pixels.get() + 4 * i;
    for (int channel = 0; channel < 3; ++channel)
      found.pixels[3 * i + channel] =
          alpha_over_white ? over_white(pixel[channel], pixel[3]) : pixel[channel];
  }
  return turned(found, data.compare(0, 2, "\xFF\xD8") == 0 ? orientation_of_jpeg(data) : 1);
}

Picture resize(const Picture& picture, int height, int width) {
  Picture out = width == picture.width ? picture : resize_rows(picture, width);
  return height == picture.height ? out : resize_columns(out, height);
}

Tiles cut_into_tiles(const Picture& picture, const PictureRules& rules) {
  const int side = rules.tile_size;
  const Layout layout = choose_layout(picture.height, picture.width, side, rules.max_num_tiles);
  const Picture fitted = resize(picture, layout.height, layout.width);
  Tiles found{layout.aspect_ratio_id, layout.tiles_h * layout.tiles_w, {}};
  found.values.resize(size_t{3} * found.count * side * side);
  float* target = found.values.data();
  for (int tile = 0; tile < found.count; ++tile) {
    const int top = tile / layout.tiles_w * side, left = tile % layout.tiles_w * side;
    for (int channel = 0; channel < 3; ++channel) {
      for (int y = top; y < top + side; ++y) {
        for (int x = left; x < left + side; ++x) {
          const bool inside = y < fitted.height && x < fitted.width;
          const size_t from = (static_cast<size_t>(y) * fitted.width + x) * 3 + channel;
          const float level = static_cast<float>((inside ? fitted.pixels[from] : 0) * (1.0 / 255));
          *target++ = (level - rules.mean[channel]) / rules.std[channel];
        }
      }
    }
  }
  return found;
}
