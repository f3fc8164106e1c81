// Text to token ids and back, by the table tokens.txt that `mmchat export` writes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

class Tokens {
 public:
  // Raises Failure if the table is missing or damaged.
  explicit Tokens(const std::string& path);

  // Ordinary tokens of UTF-8 text; names of special tokens in it are ordinary text. Raises Failure.
  std::vector<int64_t> encode(std::string_view text) const;

  int64_t special(const std::string& name) const;  // raises Failure if there is none of that name
  bool is_special(int64_t id) const { return special_ids_.count(id) != 0; }
  const std::string& bytes(int64_t id) const;  // of an ordinary token; "" for any other id

 private:
  using Ranges = std::vector<std::pair<char32_t, char32_t>>;
  enum class Kind { kLetter, kNumber, kSpace, kOther };

  Kind kind(char32_t character) const;
  size_t piece_end(const std::u32string& text, size_t begin) const;
  void merge(const std::string& piece, std::vector<int64_t>& ids) const;
  size_t rank(std::string_view bytes) const;

  std::vector<std::string> tokens_;
  std::unordered_map<std::string, size_t> ranks_;
  std::map<std::string, int64_t> specials_;
  std::map<int64_t, std::string> special_ids_;
  Ranges letters_, numbers_;
};

// Bytes in, whole UTF-8 characters out; what is no UTF-8 becomes U+FFFD.
class Utf8Stream {
 public:
  // for_terminal: drop control characters, so that an answer cannot command the terminal.
  explicit Utf8Stream(bool for_terminal) : for_terminal_(for_terminal) {}
  std::string push(std::string_view bytes);
  std::string finish();

 private:
  std::string release(bool at_end);
  bool for_terminal_;
  std::string held_;
};
