// JSON as mmchat writes it: enough for params.json, the manifest and the head of a safetensors file.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

class Json {
 public:
  // Raises Failure, naming `where`.
  static Json parse(std::string_view text, const std::string& where);

  const Json& operator[](const std::string& key) const;  // raises Failure if it is not there
  bool has(const std::string& key) const { return object_.count(key) != 0; }
  const std::map<std::string, Json>& object() const { return object_; }
  const std::vector<Json>& list() const { return list_; }
  const std::string& text() const { return text_; }
  double number() const { return number_; }
  int64_t integer() const { return static_cast<int64_t>(number_); }

 private:
  friend class JsonReader;
  double number_ = 0;  // of true and false: 1 and 0
  std::string text_;
  std::vector<Json> list_;
  std::map<std::string, Json> object_;
  std::string where_;
};
