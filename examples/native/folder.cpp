#include "folder.h"

#include <ATen/Version.h>
#include <ATen/ops/from_blob.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <torch/version.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "failure.h"
#include "json.h"

namespace {

constexpr int64_t kCacheStep = 256;  // positions

Json read_json(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file)
    throw Failure(kModel, "'" + path + "' is missing; name a folder of mmchat export --format aoti");
  std::ostringstream text;
  text << file.rdbuf();
  return Json::parse(text.str(), "'" + path + "'");
}

std::string torch_version() {
  return std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR) + "." +
         std::to_string(TORCH_VERSION_PATCH);
}

// `x86_64 AVX2`: architecture and vector instructions.
std::string processor_name() {
  utsname system{};
  uname(&system);
  return std::string(system.machine) + " " + at::get_cpu_capability();
}

// Whether code for one processor runs on another of the same architecture.
bool runs(const std::string& made_for, const std::string& here) {
  static const std::vector<std::string> kLevels = {"DEFAULT", "NO AVX", "AVX2", "AVX512"};
  const auto level = [](const std::string& name) {
    const auto found = std::find(kLevels.begin(), kLevels.end(), name.substr(name.find(' ') + 1));
    return found - kLevels.begin();
  };
  const auto machine = [](const std::string& name) { return name.substr(0, name.find(' ')); };
  const auto unknown = static_cast<std::ptrdiff_t>(kLevels.size());
  if (machine(made_for) != machine(here) || level(made_for) == unknown || level(here) == unknown)
    return made_for == here;
  return level(made_for) <= level(here);
}

void check_record(const Json& record) {
  const auto refuse = [](const std::string& reason) {
    throw Failure(kModel, "the model was exported " + reason);
  };
  if (record["format"].text() != "aoti")
    refuse("as " + record["format"].text() + "; export it with --format aoti");
  if (record["scheme"].text() != "none")
    refuse("with --quantize " + record["scheme"].text() +
           ", whose operators are mmchat's own; export it without, with --dtype float32");
  if (record["dtype"].text() != "float32")
    refuse("in " + record["dtype"].text() +
           ", whose operators are mmchat's own; export it with --dtype float32");
  if (record["device"].text() != "cpu")
    refuse("for " + record["device"].text() + "; export it with --device cpu");
  if (record["torch"].text() != torch_version())
    refuse("with torch " + record["torch"].text() + ", and this is libtorch " + torch_version() +
           "; export it again");
  if (!runs(record["processor"].text(), processor_name()))
    refuse("for a processor with " + record["processor"].text() + ", and this one has " +
           processor_name() + "; export it again here");
}

void check_sizes(const std::string& folder, const Json& manifest) {
  for (const auto& [name, file] : manifest["files"].object()) {
    std::error_code problem;
    const auto size = std::filesystem::file_size(folder + "/" + name, problem);
    if (problem) throw Failure(kModel, "'" + folder + "/" + name + "' is missing; export again");
    if (static_cast<int64_t>(size) != file["size"].integer())
      throw Failure(kModel, "'" + folder + "/" + name + "' has " + std::to_string(size) +
                                " bytes, not those recorded; export again");
  }
}

PictureRules picture_rules(const Json& params) {
  const Json &vision = params["vision_config"], &processor = params["image_processor"];
  PictureRules rules{};
  rules.tile_size = static_cast<int>(vision["image_size"].integer());
  rules.max_num_tiles = static_cast<int>(vision["max_num_tiles"].integer());
  rules.alpha_over_white = processor["alpha"].text() == "white";
  for (int i = 0; i < 3; ++i) {
    rules.mean[i] = static_cast<float>(processor["image_mean"].list().at(i).number());
    rules.std[i] = static_cast<float>(processor["image_std"].list().at(i).number());
  }
  return rules;
}

at::ScalarType scalar_type(const std::string& name) {
  static const std::unordered_map<std::string, at::ScalarType> kTypes = {
      {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16},
      {"I64", at::kLong},   {"I32", at::kInt},   {"I8", at::kChar},  {"U8", at::kByte},
      {"BOOL", at::kBool}};
  const auto found = kTypes.find(name);
  if (found == kTypes.end()) throw Failure(kModel, "weights of type " + name + " are unknown");
  return found->second;
}

// A private mapping: what the programs write to it, if anything, stays out of the file.
std::pair<char*, size_t> map_file(const std::string& path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status{};
  if (descriptor < 0 || fstat(descriptor, &status))
    throw Failure(kModel, "'" + path + "' cannot be opened: " + std::strerror(errno));
  const size_t size = status.st_size;
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, descriptor, 0);
  close(descriptor);
  if (data == MAP_FAILED)
    throw Failure(kMemory, "'" + path + "' cannot be mapped: " + std::strerror(errno));
  return {static_cast<char*>(data), size};
}

}  // namespace

ModelFacts open_folder(const std::string& folder) {
  const Json manifest = read_json(folder + "/mmchat-manifest.json");
  if (!manifest.has("export"))
    throw Failure(kModel, "'" + folder + "' was not written by mmchat export");
  const Json& record = manifest["export"];
  check_record(record);
  check_sizes(folder, manifest);
  const Json params = read_json(folder + "/params.json");
  const Json &text = params["text_config"], &vision = params["vision_config"];
  const int64_t cross = text["cross_attention_layers"].list().size();
  const int64_t side = vision["image_size"].integer() / vision["patch_size"].integer();
  const int64_t length = record["max_seq_len"].integer();
  return {
      .dtype = at::kFloat,
      .is_chat = params["chat_format"].text() != "base",
      .max_seq_len = length,
      .max_images = record["max_images"].integer(),
      .cache_length = (length / kCacheStep + 1) * kCacheStep,
      .self_layers = text["num_hidden_layers"].integer() - cross,
      .cross_layers = cross,
      .key_value_heads = text["num_key_value_heads"].integer(),
      .head_dim = text["hidden_size"].integer() / text["num_attention_heads"].integer(),
      .tokens_per_tile = side * side + 1,
      .image_token_id = text["vocab_size"].integer(),
      .pictures = picture_rules(params),
  };
}

std::unordered_map<std::string, at::Tensor> map_weights(const std::string& path) {
  const auto [data, size] = map_file(path);  // mapped as long as the process lives
  uint64_t head = 0;
  if (size >= 8) std::memcpy(&head, data, 8);
  if (size < 8 || head > size - 8) throw Failure(kModel, "'" + path + "' is cut short");
  const Json header = Json::parse({data + 8, head}, "'" + path + "'");
  std::unordered_map<std::string, at::Tensor> found;
  for (const auto& [name, entry] : header.object()) {
    if (name == "__metadata__") continue;
    std::vector<int64_t> shape;
    int64_t count = 1;
    for (const Json& length : entry["shape"].list()) {
      shape.push_back(length.integer());
      count *= length.integer();
    }
    const auto type = scalar_type(entry["dtype"].text());
    const uint64_t begin = entry["data_offsets"].list().at(0).integer() + 8 + head;
    if (begin > size || count * c10::elementSize(type) > size - begin)
      throw Failure(kModel, "'" + path + "': tensor '" + name + "' lies beyond the end");
    found.emplace(name, at::from_blob(data + begin, shape, at::TensorOptions().dtype(type)));
  }
  return found;
}
