#include "model.h"

#include <ATen/ops/argmax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "failure.h"

namespace {

constexpr char kPrefix[] = "model.";  // a program holds the model as its attribute `model`

at::Tensor integers(const std::vector<int64_t>& values) { return at::tensor(values, at::kLong); }

int64_t likeliest(const at::Tensor& logits) {
  const at::Tensor row = logits.reshape({-1});
  const int64_t best = row.argmax().item<int64_t>();
  if (!std::isfinite(row[best].item<float>()))
    throw Failure(kOther, "the model produced NaN or infinite logits");
  return best;
}

}  // namespace

Model::Model(const std::string& folder)
    : folder_(folder), facts_(open_folder(folder)), weights_(map_weights(folder + "/model.safetensors")) {
  const std::vector<int64_t> shape = {1, facts_.key_value_heads, facts_.cache_length,
                                      facts_.head_dim};
  for (int64_t i = 0; i < 2 * facts_.self_layers; ++i)
    cached_.push_back(at::zeros(shape, facts_.dtype));
}

std::vector<at::Tensor> Model::run(const std::string& name, std::vector<at::Tensor> inputs) {
  auto& program = programs_[name];
  if (!program) {
    program = std::make_unique<torch::inductor::AOTIModelPackageLoader>(folder_ + "/programs.pt2",
                                                                        name);
    std::unordered_map<std::string, at::Tensor> constants;
    for (const std::string& constant : program->get_constant_fqns()) {
      const bool is_ours = constant.rfind(kPrefix, 0) == 0;
      const auto found = weights_.find(is_ours ? constant.substr(sizeof kPrefix - 1) : constant);
      if (found == weights_.end())
        throw Failure(kModel, "program '" + name + "' needs '" + constant +
                                  "', which model.safetensors lacks; export the model again");
      constants.emplace(constant, found->second);
    }
    // used where they lie: the programs share one mapping of the file
    program->load_constants(constants, /*use_inactive=*/false, /*check_full_update=*/true,
                            /*user_managed=*/true);
  }
  return program->boxed_run(std::move(inputs));
}

void Model::see(const Tiles& tiles) {
  if (static_cast<int64_t>(pictures_.size()) == facts_.max_images)
    throw Failure(kUsage, "the model was exported for " + std::to_string(facts_.max_images) +
                              " pictures; export it again with a larger --max-images");
  const int64_t side = facts_.pictures.tile_size;
  const at::Tensor values =
      at::tensor(tiles.values).view({1, tiles.count, 3, side, side}).to(facts_.dtype);
  const bool is_full = tiles.count == facts_.pictures.max_num_tiles;
  pictures_.push_back(
      run(is_full ? "vision_full" : "vision", {values, integers({tiles.aspect_ratio_id})}));
  cross_.clear();
  for (int64_t i = 0; i < 2 * facts_.cross_layers; ++i) {
    std::vector<at::Tensor> parts;
    for (const auto& picture : pictures_) parts.push_back(picture.at(i));
    cross_.push_back(parts.size() == 1 ? parts[0] : at::cat(parts, 2));
  }
}

int64_t Model::prefill(const std::vector<int64_t>& ids, int64_t image_begin) {
  const auto count = static_cast<int64_t>(ids.size());
  if (count >= facts_.max_seq_len)
    throw Failure(kUsage, "the prompt has " + std::to_string(count) +
                              " tokens and the model was exported for " +
                              std::to_string(facts_.max_seq_len) +
                              "; export it again with a larger --max-seq-len");
  std::vector<at::Tensor> inputs = {integers(ids).view({1, count}), integers({0}),
                                    at::empty({count}, at::kLong), integers({count - 1})};
  if (!cross_.empty()) {
    // a position sees the pictures up to its own, of those that stand side by side
    std::vector<int64_t> visible(2 * count, 0);
    int64_t end = 0;
    for (int64_t at = image_begin; at < count; ++at) {
      const auto picture = static_cast<size_t>(at - image_begin);
      if (picture < pictures_.size()) end += pictures_[picture].at(0).size(2);
      visible[2 * at + 1] = end;
    }
    inputs.push_back(integers(visible).view({count, 2}));
  }
  inputs.insert(inputs.end(), cached_.begin(), cached_.end());
  inputs.insert(inputs.end(), cross_.begin(), cross_.end());
  length_ = count;
  return likeliest(run(cross_.empty() ? "prefill_text" : "prefill", std::move(inputs)).at(0));
}

int64_t Model::decode(int64_t id) {
  std::vector<at::Tensor> inputs = {integers({id}).view({1, 1}), integers({length_})};
  inputs.insert(inputs.end(), cached_.begin(), cached_.end());
  inputs.insert(inputs.end(), cross_.begin(), cross_.end());
  ++length_;
  return likeliest(run(cross_.empty() ? "decode_text" : "decode", std::move(inputs)).at(0));
}
