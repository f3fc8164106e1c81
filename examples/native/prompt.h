// The prompt of one question about pictures, as Llama 3.2 Vision reads it.
#pragma once

#include <string>
#include <vector>

#include "tokens.h"

struct Prompt {
  std::vector<int64_t> ids;
  int64_t image_begin;  // where the image tokens stand, one after the other
};

// Scaffolding is made of ids, text is encoded without special tokens.
inline Prompt make_prompt(const Tokens& tokens, const std::string& text, size_t pictures,
                          int64_t image_token_id, bool is_chat) {
  Prompt prompt{{tokens.special("<|begin_of_text|>")}, 0};
  auto& ids = prompt.ids;
  const auto add = [&](const std::string& part) {
    for (int64_t id : tokens.encode(part)) ids.push_back(id);
  };
  const auto header = [&](const std::string& role) {
    ids.push_back(tokens.special("<|start_header_id|>"));
    add(role);
    ids.push_back(tokens.special("<|end_header_id|>"));
    add("\n\n");
  };
  if (is_chat) header("user");
  prompt.image_begin = static_cast<int64_t>(ids.size());
  ids.insert(ids.end(), pictures, image_token_id);
  add(text);
  if (is_chat) {
    ids.push_back(tokens.special("<|eot_id|>"));
    header("assistant");
  }
  return prompt;
}
