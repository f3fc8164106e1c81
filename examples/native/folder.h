// A folder that `mmchat export --format aoti` wrote: is it for us, and what is in it?
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <unordered_map>
#include <vector>

#include "picture.h"

struct ModelFacts {
  at::ScalarType dtype;
  bool is_chat;  // else a base model, which continues text
  int64_t max_seq_len, max_images, cache_length;
  int64_t self_layers, cross_layers, key_value_heads, head_dim, tokens_per_tile, image_token_id;
  PictureRules pictures;
};

// Raises Failure unless the folder is whole and made for this machine and this libtorch.
ModelFacts open_folder(const std::string& folder);

// The stored tensors by name, mapped from the file and not read.
std::unordered_map<std::string, at::Tensor> map_weights(const std::string& path);
