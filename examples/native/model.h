// The exported programs, and a conversation of one turn with them.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "folder.h"

class Model {
 public:
  explicit Model(const std::string& folder);

  const ModelFacts& facts() const { return facts_; }

  // Encode a picture, of which the prompt holds one image token; call in the order of the pictures.
  void see(const Tiles& tiles);

  // Read the prompt, images first (at `image_begin`); the likeliest next token.
  int64_t prefill(const std::vector<int64_t>& ids, int64_t image_begin);

  // Read one more token; the likeliest next one.
  int64_t decode(int64_t id);

 private:
  std::vector<at::Tensor> run(const std::string& program, std::vector<at::Tensor> inputs);

  std::string folder_;
  ModelFacts facts_;
  std::unordered_map<std::string, at::Tensor> weights_;
  std::unordered_map<std::string, std::unique_ptr<torch::inductor::AOTIModelPackageLoader>>
      programs_;
  std::vector<at::Tensor> cached_;               // keys and values of the text, layer by layer
  std::vector<std::vector<at::Tensor>> pictures_;  // keys and values of each picture
  std::vector<at::Tensor> cross_;                // those of all pictures, joined
  int64_t length_ = 0;                           // positions that were read
};
