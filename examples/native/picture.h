// From the bytes of a picture to normalised tiles, as mmchat prepares them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct Picture {  // RGB, 8 bits, rows from the top
  int height, width;
  std::vector<uint8_t> pixels;
};

struct PictureRules {
  int tile_size, max_num_tiles;
  float mean[3], std[3];
  bool alpha_over_white;  // else transparency is ignored
};

struct Tiles {
  int aspect_ratio_id;  // of the canvas, from 1
  int count;
  std::vector<float> values;  // [count, 3, tile_size, tile_size]
};

// Decode a JPEG, PNG, BMP or GIF and turn it upright. Raises Failure.
Picture read_picture(const std::string& path, bool alpha_over_white);

// Pillow's bilinear resize of 8-bit pictures, bit for bit.
Picture resize(const Picture& picture, int height, int width);

// Choose the canvas, resize, pad with black, normalise and cut into tiles, row by row.
Tiles cut_into_tiles(const Picture& picture, const PictureRules& rules);
